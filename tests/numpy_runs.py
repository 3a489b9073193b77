"""Runs made of numpy arrays: what a model would have recorded, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tensorsleuth.store import Module, Prompt, PromptTokens, RunManifest, RunWriter, TensorKey, Trace

Array = npt.NDArray[Any]


@dataclass
class Values:
    """An array as the writer takes it."""

    array: Array
    memo: Any = None

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    @contextmanager
    def values(self) -> Iterator[Array]:
        yield np.ascontiguousarray(self.array)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a site: `[1, positions, features]` from position `start` on, or whole without positions.

    `count` is the number of positions, the length of the second axis unless given; `rank` stored it.
    """

    module: str
    array: Array
    start: int | None = 0
    phase: str = "prefill"
    step: int = 0
    prompt: int | None = 0
    order: int = 0
    slot: str = ""
    dims: str = "b s h"
    rank: int = 0
    count: int | None = None
    port: str = "output"


def add_run(
    trace: Trace,
    run: str,
    tensors: Sequence[Tensor],
    *,
    role: str = "target",
    tokens: dict[int, Sequence[int]] | None = None,
    n_prompt: int | None = None,
    provenance: dict[str, Any] | None = None,
    status: str = "complete",
    tp: int = 1,
    modules: Sequence[str] = (),
    dtype: str = "float32",
) -> None:
    """Record a run of numpy arrays with one writer per rank.

    Args:
        trace: where to.
        run: its name.
        tensors: what it recorded, in order.
        role: its role.
        tokens: per prompt.
        n_prompt: length of the prompts, all tokens unless given.
        provenance: of the manifest.
        status: of the manifest.
        tp: number of ranks.
        modules: paths of the model's modules, for the manifest.
        dtype: of the manifest.
    """
    listing = {prompt: tuple(ids) for prompt, ids in (tokens or {}).items()}
    prompts = tuple(Prompt(p, str(p), None, n_prompt or len(ids)) for p, ids in listing.items())
    manifest = trace.begin_run(
        RunManifest(
            0, run, role, "import", "numpy", dtype, "cpu", tp, "running", "2026-01-02T03:04:05+00:00",
            provenance or {}, prompts, tuple(PromptTokens(p, ids) for p, ids in listing.items()),
            tuple(Module(path, "Module", None, 0, -1, 0) for path in modules),
        )
    )  # fmt: skip
    for rank in range(tp):
        with RunWriter(trace.run_folder(run), run, rank=rank, manifest=manifest.to_json) as writer:
            for tensor in tensors:
                if tensor.rank == rank:
                    writer.put(_key(tensor), Values(tensor.array))
    trace.finish_run(replace(manifest, status=status))


def _key(tensor: Tensor) -> TensorKey:
    count = None if tensor.start is None else tensor.count or tensor.array.shape[1]
    return TensorKey(
        tensor.prompt, tensor.phase, tensor.step, 0, tensor.order, tensor.module, tensor.port, tensor.slot,
        tensor.dims if tensor.start is not None else "", tensor.start, count,
    )  # fmt: skip
