"""A trained method in one file: weights in safetensors, and how to build the method again as JSON in its header. No pickle, nothing is executed."""
from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from .checkpoints import write_atomically

__all__ = ["FORMAT", "load_model", "save_model"]

FORMAT = "ibma-model-1"


def _task_to_json(task) -> dict:
    return {**asdict(task), "class_weights": None}


def _task_from_json(found: dict):
    from .data.core import Modality, Task

    modalities = {name: Modality(m["kind"], tuple(m["shape"]), m["size"]) for name, m in found["modalities"].items()}
    rest = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items() if name != "modalities"}
    return Task(modalities=modalities, **rest)


def save_model(
    path,                        # ".safetensors" by custom
    method,                      # trained `Method`
    name: str,                   # its name in METHODS
    options: dict | None = None, # what `create` was given besides name, data and seed
    meta: dict | None = None,    # anything of JSON: history, settings, what it was trained on
) -> Path:
    "Write weights and description atomically. Raises TypeError where options are no JSON, OSError where the file cannot be written."
    from safetensors.torch import save

    about = {"format": FORMAT, "method": name, "options": options or {}, "task": _task_to_json(method.task), "meta": meta or {}}
    try:
        text = json.dumps(about)
    except TypeError as error:
        raise TypeError(f"options and meta of a model file must be JSON: {error}") from error
    # one copy per name: safetensors refuses tensors that share memory
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in method.state_dict().items()}
    path = Path(path)
    write_atomically(path, save(weights, metadata={"ibma": text}))
    return path


def read_about(path) -> dict:
    "The description in a model file's header, without its weights. Raises FileNotFoundError, ValueError where it is no model file of this package."
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no model file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("ibma", "null"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged or no safetensors file ({error})") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{path.name} is no model file of this version (expected {FORMAT!r} in its header): write one with ibma train, or save_model")
    return about


def load_model(
    path,
    device="cpu",
):  # -> (Method in evaluation mode, description: method, options, task, meta)
    "A method as it was saved. Raises FileNotFoundError, ValueError where file and package do not fit."
    from safetensors.torch import load_file

    from .methods import create

    about = read_about(path)
    try:
        method = create(about["method"], _task_from_json(about["task"]), **about["options"])
        method.load_state_dict(load_file(path))
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{Path(path).name} was written by another version of the method {about['method']!r}: {' '.join(str(error).split())[:300]}") from error
    return method.to(device).eval(), about
