"""The identity of a run: its flags, its data, its name, and the version of the code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from lars.config.config import Config


def as_dict(*parts: Any) -> dict[str, Any]:
    """All fields of the given dataclass objects as plain values for JSON and checkpoints."""
    return {f.name: _plain(getattr(part, f.name)) for part, f in _fields(*parts)}


def same_run(config: Config, source: Any) -> dict[str, Any]:
    """The values that must not change when a run is resumed, except for the effective batch size."""
    values = {
        f.name: _plain(getattr(part, f.name))
        for part, f in _fields(config, source)
        if f.metadata.get("same_run", True) and f.name != "effective_batch_size"
    }
    return values | {
        "train_size": source.train_size,
        "fingerprint of the images' names and labels": source.fingerprint,
    }


def flag_defaults(*parts: Any) -> dict[str, Any]:
    """The default of each flag of the given dataclass objects."""
    return {f.name: _plain(f.default) for _, f in _fields(*parts)}


def defaults(config: Config, source: Any) -> dict[str, Any]:
    """The values that apply to checkpoints that are older than a flag."""
    values = flag_defaults(config, source)
    # Before this flag existed, the average had no warm-up.
    return values | {"ema_warmup": config.ema_warmup if config.ema_decay is None else False}


def same_on_all_ranks(config: Config, source: Any) -> dict[str, Any]:
    """Flags that must agree on all ranks: all except paths, names and the number of decoding processes."""
    return {
        f.name: _plain(getattr(part, f.name))
        for part, f in _fields(config, source)
        if f.name not in ("workers", "single_threaded")
        and (
            f.metadata.get("same_run", True)
            or f.metadata.get("choices")
            or f.type not in ("str", "str | None")
        )
    }


def run_folder(config: Config) -> Path:
    """The folder of a run."""
    return Path(config.log_dir) / (config.run_name or run_name(config))


def run_name(config: Config) -> str:
    """The default folder name. It is derived from flags, so the same command finds it on any number of ranks."""
    if config.effective_batch_size is None:
        batch = f"bs{config.batch_size}x{config.batches_per_allreduce}"
    else:
        batch = f"ebs{config.effective_batch_size}"
    scaling = "" if config.lr_scaling == "keep" else f"-{config.lr_scaling}"
    optimizer = config.base_op.rpartition(":")[2]
    start = "" if config.init is None else f"_from-{Path(config.init).stem}"
    start += "_frozen" if config.freeze_backbone else ""
    return (
        f"{config.model.rpartition(':')[2]}_{optimizer}_{batch}_lr{config.base_lr:g}{scaling}"
        f"_wd{config.wd:g}_ep{config.epochs}_seed{config.seed}{start}"
    )


def versions(source: Any) -> dict[str, str]:
    """Versions of Python, torch and the code. ``code`` is a hash of lars, of the source's package and of the script."""
    code = hashlib.sha256()
    for module in ("__main__", type(source).__module__.partition(".")[0], "lars"):
        path = Path(getattr(sys.modules[module], "__file__", None) or "-")
        files = [path]
        if path.name == "__init__.py":
            files = sorted([*path.parent.rglob("*.py"), *path.parent.rglob("*.c")])
        for file in filter(Path.is_file, files):
            code.update(file.read_bytes())
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "code": code.hexdigest()[:12],
    }


def _fields(*parts: Any) -> list[tuple[Any, dataclasses.Field[Any]]]:
    return [(part, f) for part in parts for f in dataclasses.fields(part)]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
