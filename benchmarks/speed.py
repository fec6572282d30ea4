"""What the bound costs: per step, within a whole step, per epoch, with many samples or classes, and for many seeds at once.

    python benchmarks/speed.py [--parts terms,compiled,steps,refresh,scaling,seeds] [--quick] [--threads 1] [--out results/bench.json]

Writes one JSON file (parts that are not asked for stay as they were) and prints a table. Forms that are compared take turns, and ratios
are medians of ratios within one round. With one thread (the default) the clock is the processor time of the process, so that other work
on the machine counts for little; with more threads it is the time on the wall. FLOP are those of matrix products and convolutions
(torch.utils.flop_counter), kept bytes those saved for the backward pass, peak bytes the most allocated at once during forward and backward.
"""
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

BASE = {"n": 256, "classes": 101, "dim": 512, "modalities": 2}
GRID = {"n": (16, 64, 256, 1024), "classes": (6, 31, 101, 316), "dim": (64, 512, 2048), "modalities": (2, 3, 4)}
SLOW = 30  # ms: functions that take longer take part in few rounds
LARGEST = 2**26  # numbers in one array: forms that need larger ones are left out


def clock(threads):
    return time.process_time if threads == 1 else time.perf_counter


def take_turns(functions, seconds, threads=1, least=3, most=60):
    """Milliseconds of each function, {name: [one per round]}, after a round that does not count; about `seconds` of processor time."""
    now, found = clock(threads), {name: [] for name in functions}
    start = time.process_time()
    for number in range(most + 1):
        for name, function in functions.items():
            if number > least and min(found[name][1:]) > SLOW:  # enough of it
                continue
            before = now()
            function()
            found[name].append(1e3 * (now() - before))
        if number >= least and time.process_time() - start > seconds:
            break
    return {name: values[1:] for name, values in found.items()}


def ratio(found, name, other):
    return statistics.median(a / b for a, b in zip(found[name], found[other], strict=False))


# --- one term, forward and backward


def problem(n, classes, dim, modalities):
    import torch
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    means = torch.randn(classes, dim, generator=g)[labels]
    draw = lambda: (means + torch.randn(n, dim, generator=g)).requires_grad_()  # noqa: E731
    z = {f"m{j}": draw() for j in range(modalities)}
    return z, draw(), labels, {name: torch.randn(n, dim, generator=g) for name in z}


def products(z, fused, classes):
    """The matrix products of the bound alone: distances of all sources, one C x C product per modality; forward and backward."""
    import torch
    sources = [*z.values(), fused]
    centroids = torch.randn(len(sources), classes, fused.shape[1]).unbind()
    tables = torch.randn(len(z), classes, classes).unbind()
    phi = [torch.rand(len(fused), classes) for _ in sources]
    leaves = [p.clone().requires_grad_() for p in phi[:-1]]
    plain = [v.detach() for v in sources]

    def bare():
        return ([v @ c.T for v, c in zip(plain, centroids, strict=True)], [p @ q.T for p, q in zip(phi, tables, strict=False)],
                [p @ q for p, q in zip(phi, tables, strict=False)], [p @ c for p, c in zip(phi, centroids, strict=True)])

    def differentiated():
        out = [v @ c.T for v, c in zip(sources, centroids, strict=True)] + [p @ q.T for p, q in zip(leaves, tables, strict=True)]
        return torch.autograd.grad(out, [*sources, *leaves], phi + phi[:-1])

    return {"products": differentiated, "products, bare": bare}


class Literal:
    """Theorem 3.1 and Eq. (11) with the joint assignments of Eqs. (3) and (4) as arrays (n, C, C); two modalities or more."""

    def __init__(self, loss, inputs, labels):
        import torch

        from ibma.assignments import class_centroids, one_hot_targets
        self.loss, self.stats = loss, loss.statistics
        weights = one_hot_targets(labels, loss.num_classes)
        self.weights, self.x = weights, list(inputs.values())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.centroids = [class_centroids(x, weights) for x in self.x]
        self.log_prior = (weights.mean(0) + 1e-6).log()
        self.torch = torch

    def distances(self, z, centroids):
        if self.loss.normalize:
            z, centroids = (self.torch.nn.functional.normalize(v, dim=-1) for v in (z, centroids))
        return self.torch.cdist(z, centroids).square() / self.loss.temperature

    def joint(self, d, other):  # Eqs. (3), (4): softmax over pairs of classes, (n, C, C)
        return (-(d.unsqueeze(2) + other.unsqueeze(1))).flatten(1).softmax(1).view(len(d), d.shape[1], other.shape[1])

    def __call__(self, z, fused):
        own = [self.distances(v, c) for v, c in zip([*z.values(), fused], self.stats.centroids, strict=True)]
        x = [self.distances(v, c) for v, c in zip(self.x, self.centroids, strict=True)]
        total, m = 0.0, len(z)

        def compress(d, dx):
            joint = self.joint(d, dx)
            return (joint * (joint.clamp(min=1e-30).log() - (-d).log_softmax(1).unsqueeze(2) - self.log_prior)).sum((1, 2)).mean()

        for j in range(m):
            total = total + compress(own[j], x[j])
            for o in range(m):
                if o != j:
                    total = total - (self.joint(own[j], own[o]) * self.stats.log_table[j]).sum((1, 2)).mean() / (m - 1)
        for dx in x:
            total = total + compress(own[-1], dx)
        columns = self.stats.log_table[-1].T.unsqueeze(0) * self.weights.unsqueeze(2)  # (n, y, a)
        return total - (columns * (-own[-1]).softmax(1).unsqueeze(1)).sum((1, 2)).mean()


def all_pairs_club(estimator, x, z):
    """vCLUB as its authors' code has it: every code under every input, an array (n, n, D); and the negative log-likelihood of its network."""
    mean, logvar = estimator.conditional(x)
    positive = -((mean - z) ** 2) / 2 / logvar.exp()
    negative = -((z.unsqueeze(0) - mean.unsqueeze(1)) ** 2).mean(1) / 2 / logvar.exp()
    return (positive.sum(-1) - negative.sum(-1)).mean()


def forms(n, classes, dim, modalities):
    """{name: (function of one step, largest array it needs in numbers)}"""
    import torch

    from ibma.mi_estimators import EstimatorIBLoss
    from ibma.objective import IBBLoss
    z, fused, labels, inputs = problem(n, classes, dim, modalities)
    leaves = [*z.values(), fused]

    def started(**options):
        loss = IBBLoss(classes, tuple(z), dim, **options)
        for _ in range(2):
            loss.observe(z, fused, labels)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss.refresh()
        return loss

    def stepped(value, more=None):
        def step():
            torch.autograd.grad(value(), leaves, allow_unused=True)
            if more is not None:
                more().backward()
        return step

    def of(loss):
        return stepped(lambda: loss(z, fused, labels))

    found = {name: (f, n * dim) for name, f in products(z, fused, classes).items()}
    paper = started()
    for name, options in {"paper": {}, "tight": {"bound": "tight"}, "paper, streaming": {"refresh": "streaming"}, "released": {"bound": "released"}}.items():
        found[name] = (of(paper if not options else started(**options)), n * dim)
    batch = paper._prepare(z, fused, labels, None)
    found["paper, plain"] = (stepped(lambda: paper._plain(batch, False).sum()), n * dim)
    literal = Literal(paper, inputs, labels)
    found["literal"] = (stepped(lambda: literal(z, fused)), n * classes**2)
    widths = dict.fromkeys(z, dim)
    estimators = {kind: EstimatorIBLoss(kind, widths, dim) for kind in ("vib", "apib", "club")}
    vib = estimators["vib"]

    def sampled():
        codes = {name: vib.transform(name, v) for name, v in z.items()}
        return vib(codes, vib.transform("fused", fused), labels)

    club = estimators["club"]
    found["VIB"] = (stepped(sampled), n * dim)
    found["APIB (HSIC)"] = (stepped(lambda: estimators["apib"](z, fused, labels, inputs)), n * n)
    learning = lambda: club.learning_loss(z, fused, inputs)  # noqa: E731
    found["CLUB"] = (stepped(lambda: club(z, fused, labels, inputs), learning), n * dim)
    pairs = [(club.upper.own[j], inputs[j], z[j]) for j in z] + [(club.upper.joint[j], inputs[j], fused) for j in z]
    found["CLUB, all pairs"] = (stepped(lambda: sum(all_pairs_club(*p) for p in pairs), learning), n * n * dim)
    return found


def memory(function):
    """FLOP, bytes kept for the backward pass, and the most bytes allocated at once."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry
    kept, flop = {}, [0]

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            count = flop_registry.get(function._overloadpacket)
            flop[0] += count(*args, **kwargs or {}, out_val=out) if count else 0
            return out

    with Counted(), torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t, lambda t: t):
        function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    level = peak = 0
    for _, change in events:
        level += change
        peak = max(peak, level)
    return {"flop": flop[0], "kept_bytes": sum(kept.values()), "peak_bytes": peak}


def terms(quick, threads, only_base=False):
    """Times and memory of all forms around the base case, one quantity varied at a time."""
    cases = [dict(BASE)] + [BASE | {key: value} for key, values in GRID.items() for value in values if value != BASE[key]]
    rows = []
    for case in cases[: 1 if only_base else 2 if quick else None]:
        if quick:
            case = case | {"n": 16, "classes": 5, "dim": 8}
        chosen = {name: f for name, (f, size) in forms(**case).items() if size <= LARGEST}
        found = take_turns(chosen, 0.1 if quick else 15 if case == BASE else 2, threads, least=1 if quick else 3)
        for name, values in found.items():
            rows.append(case | {"form": name, "ms": statistics.median(values), "best_ms": min(values), "over_products": ratio(found, name, "products"),
                                "over_bare_products": ratio(found, name, "products, bare"), "over_paper": ratio(found, name, "paper"), "rounds": len(values)} | memory(chosen[name]))
            print("  {n:5d} {classes:4d} {dim:5d} {modalities}  {form:18s} {ms:10.3f} ms  {over_products:8.2f} x products".format(**rows[-1]), flush=True)
    return rows


# --- within a whole training step


def profiles(quick):
    """{name: (task inputs, encoders, batch size, classes, dim)}: shapes of the paper's networks, and a small profile."""
    audio, frames = (1, 128, 188), (3, 3, 224, 224)
    if quick:
        return {"small": None}
    return {"small": None,
            "ResNet-18 + ResNet-18": ({"audio": ("spectrogram", audio), "video": ("frames", frames)}, {"audio": {"backbone": "resnet18"}, "video": {"backbone": "resnet18"}}, 8, 6),
            "ResNet-18 + BERT-base": ({"image": ("image", (3, 224, 224)), "text": ("text", (64,))}, {"image": {"backbone": "resnet18"}, "text": {"backbone": "bert"}}, 8, 101)}


def random_data(modalities, n, classes):
    import torch

    from ibma.data.core import Modality, MultimodalData, Task
    g = torch.Generator().manual_seed(0)
    inputs = {name: torch.randint(1, 1000, (n, *shape), generator=g) if kind == "text" else torch.randn(n, *shape, generator=g) for name, (kind, shape) in modalities.items()}
    task = Task("single_label", classes, {name: Modality(kind, shape, 30_522 if kind == "text" else None) for name, (kind, shape) in modalities.items()})
    return MultimodalData.from_arrays(inputs, torch.arange(n) % classes, task=task)


def steps(quick, threads):
    """Median times of a whole step (forward, backward, Adam) and of the bound in it, alone."""
    import torch

    from ibma.data import load
    from ibma.methods import create
    from ibma.objective import IBBLoss
    rows = []
    for name, profile in profiles(quick).items():
        if profile is None:
            data, n, dim = load("digits"), 64, 64
            batch, method = data[:n], create("ibma", data, loss={"refresh": "streaming"})
        else:
            modalities, encoders, n, classes = profile
            dim, data = 512, random_data(modalities, n, classes)
            batch, method = data[:n], create("ibma", data, dim=512, encoders=encoders, loss={"refresh": "streaming"})
        method.train()
        classes = method.task.num_classes
        optimizer = torch.optim.Adam(method.parameters(), 1e-4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method.on_fit_start([batch])

        def step(method=method, optimizer=optimizer, batch=batch):
            optimizer.zero_grad(set_to_none=True)
            sum(method.loss(batch).values()).backward()
            optimizer.step()

        z, fused, labels, _ = problem(n, classes, dim, 2)
        functions, present = {"step": step}, {name: torch.ones(n, dtype=torch.bool) for name in z}
        for label, extra, mask in (("bound", {}, None), ("bound, masks", {}, present), ("bound, streaming", {"refresh": "streaming"}, None)):
            loss = IBBLoss(classes, tuple(z), dim, **extra)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss.observe(z, fused, labels)
                loss.refresh()
            functions[label] = lambda loss=loss, z=z, fused=fused, labels=labels, mask=mask: torch.autograd.grad(loss(z, fused, labels, mask), [*z.values(), fused])
        found = take_turns(functions, 3 if profile is None else 1, threads, least=1 if profile or quick else 5, most=60 if profile is None else 2)
        row = {"profile": name, "n": n, "classes": classes, "dim": dim, "rounds": len(found["step"]), **{f"{key}_ms": statistics.median(values) for key, values in found.items()},
               "bound_share": ratio(found, "bound", "step"), "bound_with_masks_share": ratio(found, "bound, masks", "step"), "streaming_own_share": ratio(found, "bound, streaming", "step") - ratio(found, "bound", "step")}
        rows.append(row)
        print("  {profile:24s} step {step_ms:10.2f} ms, bound alone {bound_ms:7.3f} ms = {bound_share:.2%}, statistics of streaming {streaming_own_share:.2%}".format(**row), flush=True)
        del method, optimizer, batch, data
    return rows


# --- epochs


def refresh(quick, threads):
    """Forward passes counted, and test accuracy of both ways to refresh, seed by seed."""
    from ibma.data import load
    from ibma.methods import create
    from ibma.training import TrainingConfig, evaluate, fit
    seeds, epochs = (2, 2) if quick else (10, 5)
    rows, now = [], clock(threads)
    for seed in range(seeds):
        data = load("sim-3", n=300 if quick else 1200, seed=seed)
        train, valid, test = data.split(seed=seed)
        row = {"seed": seed, "train": len(train), "epochs": epochs, "batch": 64}
        for mode in ("epoch", "streaming"):
            method, rowsseen = create("ibma", data, seed=seed, loss={"refresh": mode}), []
            handle = method.model.fusion.register_forward_hook(lambda module, inputs, output, seen=rowsseen: seen.append(len(output)))
            before = now()
            fit(method, train, config=TrainingConfig(epochs=epochs, lr=1e-3, batch_size=64, seed=seed))
            row |= {f"{mode}_seconds": now() - before, f"{mode}_samples_encoded": sum(rowsseen)}
            handle.remove()
            row[f"{mode}_accuracy"] = evaluate(method, test)["accuracy"]
        rows.append(row)
        print("  seed {seed}: accuracy {epoch_accuracy:.4f} / {streaming_accuracy:.4f}, samples encoded {epoch_samples_encoded} / {streaming_samples_encoded}".format(**row), flush=True)
    return rows


ONE_EPOCH = r"""
import json, re, sys, time, warnings
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from ibma.objective import IBBLoss
n, classes, dim, size, mode, threads = (int(v) if v.isdigit() else v for v in sys.argv[2:8])
torch.set_num_threads(threads)
warnings.simplefilter("ignore")
g = torch.Generator().manual_seed(0)
x = torch.randn(n, dim, generator=g)  # the data themselves: two modalities, views of one array with a shift
labels = torch.randint(classes, (n,), generator=g)
def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
start = peak()
encoders = torch.nn.ModuleList(torch.nn.Linear(dim, dim) for _ in range(2))
loss = IBBLoss(classes, ("a", "b"), dim, refresh=mode)
optimizer = torch.optim.SGD(encoders.parameters(), 1e-3)
before, passes = time.process_time(), 0
for rows in torch.randperm(n, generator=g).split(size):
    a, b = (encoder(x[rows] + s) for encoder, s in zip(encoders, (0.0, 0.1)))
    optimizer.zero_grad()
    loss({"a": a, "b": b}, a + b, labels[rows]).backward()
    optimizer.step()
if mode == "epoch":
    with torch.no_grad():
        for rows in torch.arange(n).split(size):
            a, b = (encoder(x[rows] + s) for encoder, s in zip(encoders, (0.0, 0.1)))
            loss.observe({"a": a, "b": b}, a + b, labels[rows])
loss.refresh()
print(json.dumps({"seconds": time.process_time() - before, "peak_gib": peak(), "data_gib": start}))
"""


def scaling(quick, threads):
    """Seconds and peak memory of the process for one epoch of linear encoders, the bound and its statistics on vector features."""
    cases = [(n, 101, 64, 1024, "streaming") for n in (10**3, 10**4, 10**5, 10**6)] + [(10**4, 10**4, 64, 256, "streaming")]
    rows = []
    for n, classes, dim, size, mode in [(200, 5, 8, 64, "streaming"), (200, 5, 8, 64, "epoch")] if quick else cases:
        root = str(Path(__file__).resolve().parents[1])
        done = subprocess.run([sys.executable, "-c", ONE_EPOCH, root, *map(str, (n, classes, dim, size, mode, threads))], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"an epoch with n={n}, C={classes} failed:\n{done.stderr[-2000:]}")
        rows.append({"n": n, "classes": classes, "dim": dim, "batch": size, "refresh": mode} | json.loads(done.stdout.splitlines()[-1]))
        print("  n={n}, C={classes}: {seconds:.2f} s, peak {peak_gib:.2f} GiB".format(**rows[-1]), flush=True)
    return rows


def compiled(quick, threads):
    """The bound as it is written, its definition, and the definition as torch.compile has it: does a compiled graph pay?"""
    import torch
    import torch._inductor.config

    from ibma.objective import IBBLoss
    rows = []
    for n, classes, dim in [(64, 6, 512)] if quick else [(64, 6, 512), (256, 101, 512)]:
        for bound in ("paper", "tight"):
            torch._dynamo.reset()
            torch._inductor.config.force_disable_caches = True  # a first call, not the second one of this machine
            z, fused, labels, _ = problem(n, classes, dim, 2)
            loss = IBBLoss(classes, tuple(z), dim, bound=bound)
            loss.observe(z, fused, labels)
            loss.refresh()
            batch, sources = loss._prepare(z, fused, labels, None), [*z.values(), fused]

            def written(features, loss=loss, batch=batch):  # from the checked batch on, as the two others
                return loss._terms_of(batch._replace(features=features), False).sum()

            def definition(features, loss=loss, batch=batch):
                return loss._plain(batch._replace(features=features), False).sum()

            graph = torch.compile(definition)
            steps = {"written": lambda: torch.autograd.grad(written(sources), sources),  # noqa: B023
                     "definition": lambda: torch.autograd.grad(definition(sources), sources),  # noqa: B023
                     "definition, compiled": lambda: torch.autograd.grad(graph(sources), sources)}  # noqa: B023
            before = time.perf_counter()
            steps["definition, compiled"]()
            first = time.perf_counter() - before
            found = take_turns(steps, 0.2 if quick else 4, threads)
            rows.append({"bound": bound, "n": n, "classes": classes, "dim": dim, "first_call_seconds": first, "ms": {name: statistics.median(v) for name, v in found.items()},
                         "definition": ratio(found, "definition", "written"), "compiled": ratio(found, "definition, compiled", "written")})
            print("  {bound}, n={n}, C={classes}: definition {definition:.2f}, compiled {compiled:.2f} of the time as written; first call {first_call_seconds:.0f} s".format(**rows[-1]), flush=True)
    return rows


def seeds(quick, threads):
    """Ten seeds of a small model on sim-3, in turn and in one program."""
    import torch
    rows = []
    for number in sorted({threads} if quick else {threads, os.cpu_count()}):
        torch.set_num_threads(number)
        rows += [{"threads": number, **row} for row in _seeds(quick, number)]
    torch.set_num_threads(threads)
    return rows


def _seeds(quick, threads):
    from ibma.data import load
    from ibma.many import fit_many
    from ibma.methods import create
    from ibma.training import TrainingConfig, evaluate, fit
    count, epochs = (2, 2) if quick else (10, 5)
    data = load("sim-3", n=300 if quick else 1200, seed=0)
    train, valid, test = data.split(seed=0)
    rows, now = [], clock(threads)
    for label, name, options in (("ce", "ce", {}), ("ibma", "ibma", {}), ("ibma, streaming", "ibma", {"loss": {"refresh": "streaming"}})):
        settings = [TrainingConfig(epochs=epochs, lr=1e-3, batch_size=64, seed=s) for s in range(count)]
        best = {"in turn": [], "at once": []}
        for warm in (True, False, False, False)[: 2 if quick else 4]:
            if warm:  # what is loaded and built once is not counted
                fit(create(name, data, seed=0, **options), train, config=TrainingConfig(epochs=1))
                fit_many([create(name, data, seed=0, **options)], train, TrainingConfig(epochs=1))
                continue
            before, one = now(), [create(name, data, seed=s, **options) for s in range(count)]
            for method, config in zip(one, settings, strict=True):
                fit(method, train, config=config)
            best["in turn"].append(now() - before)
            before = now()
            many = [create(name, data, seed=s, **options) for s in range(count)]
            fit_many(many, train, settings[0], seeds=range(count))
            best["at once"].append(now() - before)
        accuracies = [[evaluate(method, test)["accuracy"] for method in group] for group in (one, many)]
        rows.append({"method": label, "seeds": count, "epochs": epochs, "batch": 64, "train": len(train), "seconds_in_turn": statistics.median(best["in turn"]), "seconds_at_once": statistics.median(best["at once"]),
                     "ratio": statistics.median(b / a for a, b in zip(*best.values(), strict=True)), "accuracy_in_turn": accuracies[0], "accuracy_at_once": accuracies[1]})
        print(f"  {threads} threads, " + "{method}: {seconds_in_turn:.2f} s in turn, {seconds_at_once:.2f} s at once, ratio {ratio:.2f}".format(**rows[-1]), flush=True)
    return rows


PARTS = {"terms": terms, "compiled": compiled, "steps": steps, "refresh": refresh, "scaling": scaling, "seeds": seeds}


def machine(threads):
    import torch

    from ibma.runs import _commit
    commit, dirty = _commit()
    return {"commit": f"{commit}{' with changes' if dirty else ''}", "cores": os.cpu_count(), "threads": threads, "load": round(os.getloadavg()[0], 1), "processor": platform.machine(), "python": platform.python_version(), "torch": torch.__version__,
            "clock": "processor time" if threads == 1 else "wall time", "gigabytes": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="results/bench.json")
    args = parser.parse_args(arguments)
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    import torch
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    record = json.loads(out.read_text()) if out.exists() else {}
    for part in args.parts.split(","):
        print(f"{part}: {PARTS[part].__doc__}", flush=True)
        rows = PARTS[part](args.quick, args.threads)
        record[part] = {"machine": machine(args.threads), "rows": rows}  # the load is that of the measurement: afterwards
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1, default=float) + "\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"written to {out}; peak of this process {peak:.1f} GiB")


if __name__ == "__main__":
    main()
