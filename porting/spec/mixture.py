"""Mixtures of experts: router, experts and shared expert, decided by recomputing the block's output.

Every combination of a way to route, a way to store weights and an activation is tried on the values of the observed
block; exactly one may give its output.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.activations import ACT2FN

from ...store.errors import InputError
from .architecture import Experts, MixtureOfExperts, Router, SharedExpert
from .expressions import Expressions
from .feed_forward import activation_of, analyse_feed_forward, is_linear, width_of
from .observation import Observation, source_line
from .routing import candidates
from .sources import Sources
from .wiring import same

_N_EXPERTS = ("config.num_local_experts", "config.num_experts", "config.n_routed_experts")
_FIELD = "feed_forward.experts"


#: Enough that ways to route which differ at all differ on some token.
_TOKENS = 256


def _called(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a block makes of tokens: (token, feature) of (token, feature)."""
    output = module(x[None])
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first.reshape(x.shape)


def is_mixture(module: Any) -> bool:
    """Whether a block holds experts: a list of equal blocks, or tensors with one matrix per expert."""
    return _list_of(module) is not None or any(p.ndim == 3 for p in module.parameters())


def _list_of(module: Any) -> str | None:
    name: str
    for name, child in module.named_modules():
        if isinstance(child, torch.nn.ModuleList) and len(child) > 1 and any(map(is_linear, child[0].children())):
            return name
    return None


@dataclass(frozen=True)
class _Weights:
    """All experts' weights in one way of reading them: (expert, output, input), biases (expert, output) or None."""

    stored: Experts
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None

    def outputs(self, x: torch.Tensor, act: torch.nn.Module) -> torch.Tensor:
        """What every expert makes of every token: (expert, token, feature)."""
        gate, up = (torch.einsum("th,eih->eti", x, w) for w in (self.gate, self.up))
        if self.biases is not None:
            gate, up = gate + self.biases[0][:, None], up + self.biases[1][:, None]
        if self.stored.formula == "clamped":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        else:
            inner = act(gate) * up
        result = torch.einsum("eti,ehi->eth", inner, self.down)
        return result if self.biases is None else result + self.biases[2][:, None]


class MixtureAnalysis:
    """Explains one block."""

    def __init__(self, seen: Observation, path: str, numbers: Expressions, sources: Sources) -> None:
        """Look at the block.

        Args:
            seen: the observed model.
            path: of the block.
            numbers: expressions over the configuration.
            sources: receives where fields come from.
        """
        self._seen, self._path, self._numbers, self._sources = seen, path, numbers, sources
        self._module = seen.model.get_submodule(path)
        self._where = f"{type(self._module).__name__} at {path} ({source_line(self._module, 'def forward')})"
        self._key, self._act = activation_of(numbers, self._where)
        self.claims: tuple[str, ...] = ()

    def run(self) -> MixtureOfExperts:
        """Explain the block.

        Raises:
            InputError: no combination gives its output, or several do.
        """
        hidden = self._seen.call(self._path).input.shape[-1]
        x = torch.randn(_TOKENS, hidden, generator=torch.Generator().manual_seed(0))
        output = _called(self._module, x)
        weights = list(self._readings(hidden))
        if not weights:
            raise InputError(f"unsupported: experts of {self._where} are stored in no known way")
        n_experts = weights[0].gate.shape[0]
        module, scores, bias = self._router(x, n_experts)
        shared, rest = self._shared(x, output)
        found = []
        for reading, (router, routing) in itertools.product(weights, self._routers(module, scores, n_experts)):
            routed = torch.einsum("te,eth->th", routing, reading.outputs(x, ACT2FN[self._act]))
            if same(routed, rest):
                found.append((reading, replace(router, bias=bias)))
        if len(found) != 1:
            raise InputError(
                f"unsupported: {len(found)} ways to route tokens and read experts explain {self._where}, not one"
            )
        ((reading, router),) = found
        line = source_line(self._module, "topk") or source_line(self._module, "self.gate(")
        self._sources.measured(f"{_FIELD}.router", "output recomputed from scores and experts", line)
        self._sources.measured(f"{_FIELD}.experts", "output recomputed from scores and experts", line)
        self._claim(router, reading.stored, shared)
        name = self._path.rpartition(".")[2]
        return MixtureOfExperts(name, type(self._module).__name__, router, reading.stored, shared)

    def _router(self, x: torch.Tensor, n_experts: int) -> tuple[str, torch.Tensor, bool]:
        """The projection with one output per expert."""
        for name, module in self._module.named_modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(weight, torch.Tensor) and tuple(weight.shape) == (n_experts, x.shape[1]):
                return name, torch.nn.functional.linear(x, weight, bias), bias is not None
        raise InputError(f"unsupported: {self._where} has no projection with one score per expert")

    def _routers(self, name: str, scores: torch.Tensor, n_experts: int) -> Iterator[tuple[Router, torch.Tensor]]:
        count = self._numbers.find(n_experts, _N_EXPERTS, only=True)
        if count is None:
            raise InputError(f"unsupported: {n_experts} experts in {self._where}, which no configuration key gives")
        plain = Router(name, False, "", False, False, count, self._numbers.number("config.num_experts_per_tok"))
        yield from candidates(plain, scores, self._corrections(name, n_experts), self._numbers)

    def _corrections(self, router: str, n_experts: int) -> dict[tuple[str, str], torch.Tensor]:
        """Tensors with one number per expert that choosing may add, by module and name; and none."""
        found = {("", ""): torch.zeros(n_experts)}
        beside = [name for name, child in self._module.named_children() if not list(child.children())]
        for name in dict.fromkeys((router, *beside)):
            module = self._module.get_submodule(name)
            for key, tensor in (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)):
                if tensor.numel() == n_experts and not (name == router and key == "bias"):
                    found["" if name == router else name, key] = tensor.detach().flatten()
        return found

    def _readings(self, hidden: int) -> Iterator[_Weights]:
        listed = _list_of(self._module)
        if listed is not None:
            yield from self._of_modules(listed, hidden)
        else:
            yield from self._of_tensors(hidden)

    def _of_modules(self, listed: str, hidden: int) -> Iterator[_Weights]:
        experts = self._module.get_submodule(listed)
        names = [name for name, child in experts[0].named_children() if is_linear(child)]
        shapes = {name: tuple(experts[0].get_submodule(name).weight.shape) for name in names}
        downs = [name for name, shape in shapes.items() if shape[0] == hidden]
        ups = [name for name in names if name not in downs]
        if len(downs) != 1 or len(ups) != 2:
            return
        stacked = {name: torch.stack([e.get_submodule(name).weight.detach() for e in experts]) for name in names}
        for gate, up in (ups, ups[::-1]):
            stored = self._stored("modules", listed, (gate, up, downs[0]), "separate", "", shapes[gate][0])
            yield _Weights(stored, stacked[gate], stacked[up], stacked[downs[0]], None)

    def _of_tensors(self, hidden: int) -> Iterator[_Weights]:
        tensors = {name: p.detach() for name, p in self._module.named_parameters() if p.ndim == 3}
        if len(tensors) != 2:
            return
        for (first, a), (second, b) in itertools.permutations(tensors.items()):
            for how in ("rows", "columns"):
                wide, down = (a, b) if how == "rows" else (a.transpose(1, 2), b.transpose(1, 2))
                if wide.shape[2] != hidden or down.shape[1] != hidden or wide.shape[1] != 2 * down.shape[2]:
                    continue
                yield from self._halves(how, first, second, wide, down)

    def _halves(self, how: str, first: str, second: str, wide: torch.Tensor, down: torch.Tensor) -> Iterator[_Weights]:
        width = down.shape[2]
        suffix = "_bias" if f"{first}_bias" in dict(self._module.named_parameters()) else ""
        biases = [self._module.get_parameter(f"{n}{suffix}").detach() for n in (first, second)] if suffix else []
        module = first.rpartition(".")[0] if first.rpartition(".")[0] == second.rpartition(".")[0] else ""
        local = [name.removeprefix(f"{module}.") if module else name for name in (first, second)]
        for layout, gates, ups in (
            ("gate_first", slice(0, width), slice(width, None)),
            ("up_first", slice(width, None), slice(0, width)),
            ("interleaved", slice(0, None, 2), slice(1, None, 2)),
        ):
            stored = self._stored(how, module, (local[0], local[0], local[1]), layout, suffix, width)
            added = (biases[0][:, gates], biases[0][:, ups], biases[1]) if biases else None
            for formula in ("gated", "clamped") if biases else ("gated",):
                yield _Weights(replace(stored, formula=formula), wide[:, gates], wide[:, ups], down, added)

    def _stored(
        self, how: str, module: str, names: tuple[str, str, str], layout: str, bias: str, width: int
    ) -> Experts:
        number = width_of(self._numbers, width, self._where)
        key = f"config.{self._key}"
        return Experts(how, module, *names, layout, bias, "gated", key, self._act, number)

    def _shared(self, x: torch.Tensor, output: torch.Tensor) -> tuple[SharedExpert | None, torch.Tensor]:
        """A block beside the experts, and the output without it."""
        listed = _list_of(self._module)
        for name, _ in self._module.named_children():
            calls = [c for c in self._seen.inside(f"{self._path}.{name}") if is_linear(c.module)]
            if name == listed or len(calls) not in (2, 3) or not self._seen.calls_of(f"{self._path}.{name}"):
                continue
            path = f"{self._path}.{name}"
            block = analyse_feed_forward(self._seen, path, calls, self._numbers, self._sources)
            given = _called(self._module.get_submodule(name), x)
            gate = self._gate_beside(name)
            if gate:
                given = torch.sigmoid(self._module.get_submodule(gate)(x)) * given
            return SharedExpert(block, gate), output - given
        return None, output

    def _gate_beside(self, shared: str) -> str:
        """A projection to one feature, called beside the shared expert."""
        for name, child in self._module.named_children():
            if name != shared and is_linear(child) and child.weight.shape[0] == 1:
                self._sources.add(f"{_FIELD}.shared.gate", source_line(self._module, f"self.{name}("))
                return str(name)
        return ""

    def _claim(self, router: Router, experts: Experts, shared: SharedExpert | None) -> None:
        inside = f"{experts.module}." if experts.module else ""
        names = (experts.gate, experts.up, experts.down)
        claimed = [f"{router.module}.{kind}".lstrip(".") for kind in ("weight", "bias")]
        claimed.append(f"{router.correction_module or router.module}.{router.correction}".lstrip("."))
        for name, _ in self._module.named_parameters():
            local = name.removeprefix(inside) if name.startswith(inside) else ""
            if experts.stored == "modules":
                local = local.partition(".")[2].removesuffix(".weight")
            if local in names or (experts.bias and local.removesuffix(experts.bias) in names):
                claimed.append(name)
            if shared is not None and name.startswith((f"{shared.block.module}.", f"{shared.gate or '-'}.")):
                claimed.append(name)
        self.claims = tuple(claimed)
