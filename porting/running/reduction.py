"""A checkpoint with fewer layers: the first ones, for test compilations that take minutes instead of hours."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ...store.errors import InputError

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SHARD_BYTES = 2_000_000_000


def reduce_checkpoint(folder: Path, n_layers: int, destination: Path) -> Path:
    """Write a checkpoint of the first layers of another.

    Args:
        folder: the checkpoint.
        n_layers: layers to keep.
        destination: folder for the new one; made if missing.

    Returns:
        `destination`.

    Raises:
        InputError: the checkpoint has no safetensors, or its configuration names no number of layers.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    reduced, full = _reduced_config(config, n_layers)
    if full is None:
        raise InputError(f"{folder / 'config.json'} names no number of layers; leave reduce_layers out")
    destination.mkdir(parents=True, exist_ok=True)
    (destination / "config.json").write_text(json.dumps(reduced, indent=2), encoding="utf-8")
    for file in folder.iterdir():
        if file.is_file() and file.name != "config.json" and ".safetensors" not in file.name and file.suffix != ".bin":
            shutil.copy2(file, destination / file.name)
    _copy_weights(folder, n_layers, destination)
    return destination


def _reduced_config(config: dict[str, Any], n_layers: int) -> tuple[dict[str, Any], int | None]:
    """A configuration with fewer layers, and how many it had; lists with an entry per layer are cut too."""
    inner = config.get("text_config")
    if isinstance(inner, dict) and any(name in inner for name in _COUNTS):
        reduced, full = _reduced_config(inner, n_layers)
        return {**config, "text_config": reduced}, full
    full = next((config[name] for name in _COUNTS if isinstance(config.get(name), int)), None)
    if full is None:
        return config, None
    return {
        name: min(n_layers, full)
        if name in _COUNTS
        else value[:n_layers]
        if isinstance(value, list) and len(value) == full
        else value
        for name, value in config.items()
    }, full


def _copy_weights(folder: Path, n_layers: int, destination: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no safetensors files, so that layers cannot be cut off")
    held: dict[str, Any] = {}
    places: dict[str, str] = {}
    nbytes = 0

    def flush() -> None:
        nonlocal held, nbytes
        name = f"model-{len(set(places.values())):05d}.safetensors"
        save_file(held, destination / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, name))
        held, nbytes = {}, 0

    for file in files:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (not a mapping)
                layer = _LAYER.search(key)
                if layer is not None and int(layer[1]) >= n_layers:
                    continue
                held[key] = weights.get_tensor(key)
                nbytes += held[key].nbytes
                if nbytes > _SHARD_BYTES:
                    flush()
    if held:
        flush()
    index = {"metadata": {}, "weight_map": places}
    (destination / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
