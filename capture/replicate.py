"""Replicates of a baseline: the same model, dtype and tokens, with other rounding.

What a clean port may differ by is measured rather than assumed: the scatter between a baseline and its replicates is
the null distribution that `sleuth compare --replicate` holds a target against.

- attention: the other attention implementation (eager for sdpa, sdpa for anything else).
- summation: every matrix product with weights is split along its inner axis, and the parts, each rounded to the
  model's dtype, are added: what tensor parallelism does to row-parallel layers.
- threads: another number of threads, which splits sums and products elsewhere; may change nothing.
- perturb: the embeddings are multiplied by 1 +- eps, eps being the distance from 1 to the next number of the dtype.
  Integer inputs have no neighbours, so that is the earliest place where a model can be perturbed. The signs depend on
  the seed, the token and its position only, so that prefill, decode and every batching see the same perturbation.
  That is several times what rounding does in the first layers: a baseline for models that cannot run in FP32.
- nudge: the same for one element in sixteen, which adds about the energy of a single rounding and changes all
  rounding downstream: a clean run as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..store.errors import InputError
from ..store.trace import Trace
from .generate import CausalModel
from .hf import ModelSource

KINDS = ("attention", "summation", "threads", "perturb", "nudge")
#: Part of the elements that a nudge moves. Rounding to nearest has a mean square of eps^2 / 24 relative to the value
#: (uniform within half a step, steps of eps / 2 to eps); moving all by eps has eps^2, up to one more rounding.
NUDGED = 1 / 16
#: What a kind can be told, as in `summation:4`.
_SETTINGS = {"summation": "parts", "threads": "threads", "perturb": "seed", "nudge": "seed"}
_PRIME = 1_000_003


@dataclass(frozen=True)
class Replicate:
    """How a run differs from the one that it replicates.

    Attributes:
        kind: one of `KINDS`.
        seed: of the perturbation.
        parts: parts of a split sum.
        threads: number of threads; 0 for another number than the current one.
    """

    kind: str
    seed: int = 0
    parts: int = 2
    threads: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"{self.kind!r} is no kind of replicate; choose one of {', '.join(KINDS)}")

    def source(self, source: ModelSource, default: str | None) -> ModelSource:
        """The model to load: with the other attention implementation, or as it is.

        Args:
            source: the model that is replicated.
            default: attention implementation that it runs with.
        """
        if self.kind != "attention":
            return source
        return replace(source, attention="eager" if (source.attention or default) == "sdpa" else "sdpa")

    def facts(self, trace: Trace, run: str, fingerprint: str, dtype: str) -> dict[str, Any]:
        """What provenance says: the settings that matter, and the runs that this one replicates."""
        settings = asdict(self)
        chosen = {name: settings[name] for name in ("kind", _SETTINGS.get(self.kind)) if name}
        if self.kind == "threads":
            chosen["threads"] = self.n_threads()
        if self.kind in ("perturb", "nudge"):
            chosen["eps"] = torch.finfo(getattr(torch, dtype)).eps
        return {**chosen, "of": _replicated(trace, run, fingerprint, dtype)}

    def n_threads(self) -> int:
        """Number of threads of a `threads` replicate."""
        current = torch.get_num_threads()
        return self.threads or (current - 1 if current > 1 else 2)

    @contextmanager
    def running(self, model: torch.nn.Module, adapter: CausalModel) -> Iterator[CausalModel]:
        """Make a model run as the replicate; yields the adapter to drive it with."""
        if self.kind in ("perturb", "nudge"):
            share = NUDGED if self.kind == "nudge" else 1.0
            with _perturbed(model, adapter, self.seed, share) as perturbed:
                yield perturbed
        elif self.kind == "summation":
            with _SplitProducts(self.parts):
                yield adapter
        elif self.kind == "threads":
            before = torch.get_num_threads()
            torch.set_num_threads(self.n_threads())
            try:
                yield adapter
            finally:
                torch.set_num_threads(before)
        else:
            yield adapter


def parse_replicate(text: str) -> Replicate:
    """Read `attention`, `summation:4`, `threads:2` or `perturb:7`.

    Raises:
        InputError: the kind is unknown, or what follows it is no number.
    """
    kind, _, value = text.partition(":")
    if not value:
        return Replicate(kind)
    name = _SETTINGS.get(kind)
    if kind in KINDS and (name is None or not value.isdecimal()):
        raise InputError(f"replicate {text!r} cannot be read; write for example summation:2, threads:2 or perturb:1")
    settings: dict[str, Any] = {name: int(value)} if name else {}
    return replace(Replicate(kind), **settings)


def _replicated(trace: Trace, run: str, fingerprint: str, dtype: str) -> list[str]:
    """Runs of the same checkpoint and dtype that are no replicates themselves."""
    found = []
    for name in trace.run_names():
        if name != run:
            manifest = trace.manifest(name)
            same = manifest.provenance.get("checkpoint_fingerprint") == fingerprint and manifest.dtype == dtype
            if same and manifest.stack == "hf" and "replicate" not in manifest.provenance:
                found.append(name)
    return found


class _SplitProducts(TorchFunctionMode):
    """Splits the inner axis of matrix products with weights, and adds the rounded parts."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        if parts < 2:
            raise InputError(f"a sum of {parts} parts is no other sum; split it into 2 or more")
        self._parts = parts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and not set(kwargs) - {"bias"} and args[0].shape[-1] >= self._parts:
            weight = args[1]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            total = self._sum(args[0], weight, lambda x, w: torch.nn.functional.linear(x, w), -1)
            return total if bias is None else total + bias
        if func is torch.addmm and not kwargs and args[1].shape[-1] >= self._parts:
            return self._sum(args[1], args[2], torch.mm, 0) + args[0]
        if func in (torch.bmm, torch.Tensor.bmm) and not kwargs and isinstance(args[1], torch.nn.Parameter):
            return self._sum(args[0], args[1], torch.bmm, 1)
        return func(*args, **kwargs)

    def _sum(
        self, x: torch.Tensor, weight: torch.Tensor, product: Callable[..., torch.Tensor], inner: int
    ) -> torch.Tensor:
        total: torch.Tensor | None = None
        parts = (torch.tensor_split(x, self._parts, -1), torch.tensor_split(weight, self._parts, inner))
        with torch._C.DisableTorchFunctionSubclass():
            for left, right in zip(*parts, strict=True):
                part = product(left, right)
                total = part if total is None else total + part
        assert total is not None
        return total


@contextmanager
def _perturbed(model: torch.nn.Module, adapter: CausalModel, seed: int, share: float) -> Iterator[CausalModel]:
    """Hook the embedding; the adapter tells the hook which tokens and positions are being embedded."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(embedding, torch.nn.Module):
        raise InputError(f"{type(model).__name__} has no input embedding to perturb; choose another kind of replicate")
    now: dict[str, torch.Tensor] = {}

    def drive(
        input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        now["ids"], now["positions"] = input_ids, position_ids
        return adapter(input_ids, attention_mask, position_ids, cache)

    def perturb(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        ids, positions = now["ids"], now["positions"]
        if output.shape[:2] != ids.shape:  # what an encoder reads: its rows begin at position 0
            ids = args[0]
            positions = torch.arange(ids.shape[1]).expand_as(ids)
        signs = _signs(ids, positions, output.shape[-1], seed, share).to(output.device)
        return (output.float() * (1.0 + torch.finfo(output.dtype).eps * signs)).to(output.dtype)

    handle = embedding.register_forward_hook(perturb)
    try:
        yield drive
    finally:
        handle.remove()


def _signs(ids: torch.Tensor, positions: torch.Tensor, width: int, seed: int, share: float) -> torch.Tensor:
    """-1 or 1 per token and feature, 0 for all but a share of them: `[batch, length, width]`."""
    generator = torch.Generator()
    signs = torch.empty(*ids.shape, width)
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            place = int(ids[row, column]) * _PRIME + int(positions[row, column])
            generator.manual_seed((seed * _PRIME * _PRIME + place) % (1 << 63))
            drawn = torch.rand(width, generator=generator)
            signs[row, column] = torch.where(drawn < share / 2, -1.0, torch.where(drawn < share, 1.0, 0.0))
    return signs
