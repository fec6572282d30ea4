"""What one of several processes does: observe its share of an epoch, refresh, and write down its statistics."""
import torch
import torch.distributed as dist

from ibma.objective import IBBLoss

NAMES, CLASSES, DIM = ("audio", "image"), 3, 4


def epoch(seed: int, n: int = 20):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(3, n, DIM, generator=g)
    targets = torch.randint(CLASSES - 1, (n,), generator=g)
    targets[-2:] = CLASSES - 1  # a class that the first process never sees
    targets[3] = -1
    return dict(zip(NAMES, features[:2], strict=True)), features[2], targets, {"audio": torch.rand(n, generator=g) < 0.7}


def statistics(rank: int = 0, processes: int = 1, prototypes: str = "mean") -> dict:
    "Three epochs on every `processes`-th part of the data; parts have different sizes."
    loss = IBBLoss(CLASSES, NAMES, DIM, temperature=1.0, normalize=False, table="optimal", prototypes=prototypes)
    bounds = [0, 7, 20] if processes > 1 else [0, 20]
    rows = slice(bounds[rank], bounds[rank + 1])
    for seed in range(3):
        z, fused, targets, mask = epoch(seed)
        batch = {name: v[rows] for name, v in z.items()}, fused[rows], targets[rows], {name: v[rows] for name, v in mask.items()}
        if prototypes == "ema":
            loss(*batch)  # a training step: moves centroids that exist
        loss.observe(*batch)
        loss.refresh()
    return loss.state_dict()


def work(rank: int, processes: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    try:
        torch.save({prototypes: statistics(rank, processes, prototypes) for prototypes in ("mean", "ema")}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
