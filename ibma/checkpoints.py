"""Checkpoints of a training run: written atomically, verified when read, locked against a second writer.

A run folder holds `epoch-0003.pt` (what `torch.save` writes; read it with `torch.load(..., weights_only=True)`) and `epoch-0003.json`, which carries the
SHA-256 of the first. The JSON file is written last, so a checkpoint without it was never finished. A kill at any moment leaves the previous one.
"""
from __future__ import annotations

import hashlib
import io
import json
import os
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CheckpointFolder", "write_atomically"]


def write_atomically(path, content: bytes) -> None:
    """A reader sees the old file or the new one, never half of it, even after a power cut. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class CheckpointFolder:
    """The checkpoints of one run. `lock()` it before writing.

    `save` keeps the last two epochs and the best ones they refer to, and removes the others.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}.pt"

    def epochs(self) -> list[int]:
        """Epochs (0: before training) with a finished checkpoint, ascending; not verified."""
        found = (re.fullmatch(r"epoch-(\d+)\.json", path.name) for path in self.folder.glob("epoch-*.json"))
        return sorted(int(match[1]) for match in found if match)

    @contextmanager
    def lock(self):
        """Hold the folder alone. Raises RuntimeError where another process has it, OSError where it cannot be written."""
        import filelock

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / ".lock", timeout=0)
            lock.acquire()
        except filelock.Timeout:
            raise RuntimeError(f"another process is training in run_dir {self.folder.name!r}; wait for it, or choose another folder") from None
        except OSError as error:
            raise OSError(f"run_dir {self.folder.name!r} cannot be written ({error.strerror or error}); choose a folder on a writable disk") from error
        try:
            for left_over in self.folder.glob(".*.part"):  # of a writer that was killed
                left_over.unlink()
            yield self
        finally:
            lock.release()

    def save(self, epoch: int, state: dict, best: int | None = None) -> Path:
        """Write the state after `epoch` epochs; `best` is the epoch whose weights are the best so far. Raises OSError naming the cause."""
        import torch

        content = io.BytesIO()
        torch.save(state, content)
        content = content.getvalue()
        path = self.path(epoch)
        note = {"epoch": epoch, "best": best, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        try:
            path.with_suffix(".json").unlink(missing_ok=True)  # replacing an epoch: between the two writes it counts as absent
            write_atomically(path, content)
            write_atomically(path.with_suffix(".json"), json.dumps(note).encode())
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(error.errno, f"checkpoint {path.name} ({len(content) / 2**20:.1f} MiB) cannot be written: {error.strerror or error}; "
                                       "the earlier ones are kept") from error
        self._prune(epoch)
        return path

    def load(self, epoch: int) -> dict:
        """The state after an epoch, verified. Raises ValueError where the file is truncated, changed or missing."""
        import torch

        try:
            note, content = json.loads(self.path(epoch).with_suffix(".json").read_text()), self.path(epoch).read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(f"checkpoint {self.path(epoch).name} cannot be read ({error})") from error
        if hashlib.sha256(content).hexdigest() != note["sha256"]:
            raise ValueError(f"checkpoint {self.path(epoch).name} is damaged: {len(content)} of {note['bytes']} bytes, or other content than was written")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def latest(self) -> dict | None:
        """The newest usable state, or None. A damaged checkpoint is reported by a warning, and the one before it is taken.

        A state whose best weights (of another epoch) are damaged is not usable either: it could not finish as it would have.
        """
        for epoch in reversed(self.epochs()):
            try:
                state = self.load(epoch)
                if state.get("best_epoch") not in (None, epoch):
                    self.load(state["best_epoch"])
                return state
            except ValueError as error:
                warnings.warn(f"{error}; going back to the checkpoint before it", UserWarning, stacklevel=3)
        return None

    def _best_of(self, epoch):
        try:
            return json.loads(self.path(epoch).with_suffix(".json").read_text())["best"]
        except (OSError, ValueError, KeyError):
            return None

    def _prune(self, newest):
        for epoch in self.epochs():
            if epoch > newest:  # of a damaged future that was abandoned
                self._remove(epoch)
        last = self.epochs()[-2:]
        kept = {*last, *(self._best_of(epoch) for epoch in last)}
        for epoch in self.epochs():
            if epoch not in kept:
                self._remove(epoch)

    def _remove(self, epoch):
        self.path(epoch).with_suffix(".json").unlink(missing_ok=True)  # first: a checkpoint without it does not exist
        self.path(epoch).unlink(missing_ok=True)
