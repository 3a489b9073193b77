"""Where a run came from: versions, host, source revision and a fingerprint of the weights."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import numpy as np
import torch
import xxhash

from .. import __version__
from .pending import is_storable, to_numpy

_PACKAGES = ("torch", "transformers", "numpy", "h5py", "duckdb", "safetensors")


def environment() -> dict[str, Any]:
    """Versions, host, threads and the revision of the working directory, as JSON-ready values."""
    return {
        "tensorsleuth": __version__,
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "host": platform.node(),
        "processor": platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "command": sys.argv,
        "git": _git_revision(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("NEURON_", "XLA_", "NXD_"))},
    }


def weights_fingerprint(model: torch.nn.Module) -> str:
    """XXH3-128 over the names, dtypes, shapes and bytes of all parameters and buffers, by name.

    Two runs with equal fingerprints computed with the same weights. Tensors that have no values (meta) or whose
    bits the shards cannot hold count by name, dtype and shape.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        if not tensor.is_meta and tensor.numel() and is_storable(tensor):
            digest.update(to_numpy(tensor).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
