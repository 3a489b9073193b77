"""The configuration that a port was compiled with, restored exactly from neuron_config.json.

The library's own loader keeps every argument (experts, fused projections, buckets, dtype). What is read here is
compared with the file again, so that an argument that gets lost on the way is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...store.errors import InputError

FILE = "neuron_config.json"
#: Arguments that are set anew where a compiled configuration runs on a CPU.
_PLACED = frozenset({"on_cpu", "tp_degree", "batch_size", "seq_len", "max_context_length", "torch_dtype"})
#: Derived while a NeuronConfig is made, and not its arguments.
_DERIVED = frozenset({"is_prefill_stage", "attn_cls", "overrides_torch_dtype"})


@dataclass(frozen=True)
class SavedConfig:
    """What neuron_config.json says.

    Attributes:
        tp: tensor-parallel degree.
        batch: rows per forward pass.
        seq_len: length of the cache.
        context: length of the prefill.
        dtype: name of the dtype.
        options: all other arguments of the NeuronConfig.
        n_layers: number of layers, None if it is not said.
    """

    tp: int
    batch: int
    seq_len: int
    context: int
    dtype: str
    options: Mapping[str, Any]
    n_layers: int | None


def read_saved_config(folder: Path) -> SavedConfig:
    """Read the configuration of a compiled folder.

    Raises:
        InputError: there is none, or it is not one.
    """
    path = folder / FILE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        neuron = body["neuron_config"]
        return SavedConfig(
            int(neuron["tp_degree"]),
            int(neuron["batch_size"]),
            int(neuron["seq_len"]),
            int(neuron["max_context_length"]),
            str(neuron["torch_dtype"]).removeprefix("torch."),
            {name: value for name, value in neuron.items() if name not in _PLACED | _DERIVED and value is not None},
            body.get("num_hidden_layers"),
        )
    except OSError as error:
        raise InputError(f"{folder} holds no {FILE}; name the folder that the port was compiled into") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no configuration of a compiled port: {error!r}") from error


def lost_on_the_way(folder: Path, config: Any) -> list[str]:
    """Arguments whose value in a restored configuration is not that of the file, as `name: file -> restored`.

    Args:
        folder: the compiled folder.
        config: what the port's configuration class loaded from it.
    """
    saved = json.loads((folder / FILE).read_text(encoding="utf-8"))["neuron_config"]
    found = json.loads(config.to_json_string())["neuron_config"]
    return [f"{name}: {value!r} -> {found.get(name)!r}" for name, value in saved.items() if found.get(name) != value]
