"""Multi-head latent attention: the projections down and up, explained by values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...store.errors import InputError
from .architecture import Latent, Norm, Number
from .expressions import Expressions
from .feed_forward import is_linear
from .norms import analyse_norm, is_norm
from .observation import Call, Observation, Softmax, source_line
from .rotary import Rotation, find_rotation
from .sources import Sources
from .wiring import same

_FIELD = "attention.latent"


@dataclass(frozen=True)
class FoundLatent:
    """What was found.

    Attributes:
        latent: the projections.
        modules: of the attention that are accounted for.
        rotation: of keys.
    """

    latent: Latent
    modules: tuple[str, ...]
    rotation: Rotation


class LatentAnalysis:
    """Explains the projections of one attention module."""

    def __init__(self, seen: Observation, path: str, softmax: Softmax, numbers: Expressions, sources: Sources) -> None:
        """Look at the module.

        Args:
            seen: the observed model.
            path: of the attention module.
            softmax: its scores and values.
            numbers: expressions over the configuration.
            sources: receives where fields come from.
        """
        self._seen, self._path, self._softmax = seen, path, softmax
        self._numbers, self._sources = numbers, sources
        self._module = seen.model.get_submodule(path)
        inside = seen.inside(path)
        self._linears = [c for c in inside if is_linear(c.module)]
        self._norms = [c for c in inside if is_norm(c.module)]

    def run(self) -> FoundLatent | None:
        """The projections, None when the module's keys and values come from no latent.

        Raises:
            InputError: they do, but something in between is not understood.
        """
        values = self._softmax.values
        assert values is not None
        up = next((c for c in self._linears if self._ends_in(c, values)), None)
        if up is None:
            return None
        latent_norm = self._norm_before(up)
        down = self._projection_before(latent_norm, up.input.shape[-1])
        rank, value = up.input.shape[-1], values.shape[-1]
        heads = values.shape[1]
        plain = up.output.shape[-1] // heads - value
        rotated = down.output.shape[-1] - rank
        keys = self._softmax.right.transpose(-1, -2)
        if not same(self._by_head(up.output, heads)[..., :plain], keys[..., :plain]):
            raise self._fail("keys that are not the latent's")
        rotation = _rotation(down.output[:, None, :, rank:], keys[:, :1, :, plain:])
        if rotation is None:
            raise self._fail("a rotated part of keys that no rotation gives")
        query_up, query_norm, query_down = self._queries(heads, plain)
        norms = [n for n in (latent_norm, query_norm) if n is not None]
        described = self._norm_of(norms)
        names = [self._name(c) for c in (query_down, query_norm, query_up, down, latent_norm, up)]
        for name in filter(None, names):
            self._sources.add(f"{_FIELD}.projections", source_line(self._module, f"self.{name}("))
        self._sources.measured(_FIELD, "keys and values equal the projections' outputs")
        biases = {getattr(c.module, "bias", None) is not None for c in (down, query_down) if c is not None}
        if len(biases) > 1 or any(getattr(c.module, "bias", None) is not None for c in (up, query_up)):
            raise self._fail("biases on some of the latent's projections")
        latent = Latent(
            query_down=names[0],
            query_norm=names[1],
            query_up=names[2],
            down=names[3],
            norm_module=names[4],
            norm=described,
            up=names[5],
            rank=self._number("rank", rank, "config.kv_lora_rank"),
            query_rank=None
            if query_down is None
            else self._number("query_rank", query_down.output.shape[-1], "config.q_lora_rank"),
            plain=self._number("plain", plain, "config.qk_nope_head_dim"),
            rotated=self._number("rotated", rotated, "config.qk_rope_head_dim"),
            value=self._number("value", value, "config.v_head_dim"),
            down_bias=biases == {True},
        )
        return FoundLatent(latent, tuple(filter(None, names)), rotation)

    def _fail(self, what: str) -> InputError:
        line = source_line(self._module, "def forward")
        return InputError(f"unsupported: {what} in {type(self._module).__name__} at {self._path} ({line})")

    def _name(self, call: Call | None) -> str:
        return "" if call is None else call.path.removeprefix(f"{self._path}.")

    def _by_head(self, tensor: torch.Tensor, heads: int) -> torch.Tensor:
        return tensor.reshape(*tensor.shape[:-1], heads, -1).transpose(1, 2)

    def _ends_in(self, call: Call, values: torch.Tensor) -> bool:
        heads, size = values.shape[1], values.shape[-1]
        width = call.output.shape[-1]
        if width % heads or width // heads <= size or call.output.ndim != 3:
            return False
        if same(call.input, self._seen.call(self._path).input):  # a fused projection of the hidden states
            return False
        return same(self._by_head(call.output, heads)[..., -size:], values)

    def _norm_before(self, call: Call) -> Call:
        found = [c for c in self._norms if same(c.output, call.input)]
        if len(found) != 1:
            raise self._fail("a latent that is no norm's output")
        return found[0]

    def _projection_before(self, norm: Call, width: int) -> Call:
        for call in self._linears:
            if call.output.shape[-1] >= width and same(call.output[..., :width], norm.input):
                return call
        raise self._fail("a latent's norm whose input is no projection")

    def _queries(self, heads: int, plain: int) -> tuple[Call, Call | None, Call | None]:
        queries = self._softmax.left
        for call in self._linears:
            if call.output.shape[-1] != heads * queries.shape[-1]:
                continue
            given = self._by_head(call.output, heads)
            if not same(given[..., :plain], queries[..., :plain]):
                continue
            if _rotation(given[..., plain:], queries[..., plain:]) is None:
                raise self._fail("a rotated part of queries that no rotation gives")
            if same(call.input, self._seen.call(self._path).input):
                return call, None, None
            norm = self._norm_before(call)
            return call, norm, self._projection_before(norm, call.input.shape[-1])
        raise self._fail("queries that are no projection's output")

    def _norm_of(self, calls: list[Call]) -> Norm:
        found = {
            analyse_norm(c.module, (c.input.shape[-1],), self._numbers, self._sources, f"{_FIELD}.norm", c.path)
            for c in calls
        }
        if len(found) != 1:
            raise self._fail("different norms on the latents")
        return found.pop()

    def _number(self, name: str, measured: int, expression: str) -> Number:
        found = self._numbers.find(measured, [expression], only=True)
        if found is None:
            raise self._fail(f"{name} = {measured}, which is not {expression}")
        self._sources.number(f"{_FIELD}.{name}", found)
        return found


def _rotation(before: torch.Tensor, after: torch.Tensor) -> Rotation | None:
    """The rotation, also where pairs that were side by side come out in two halves.

    Queries and keys are laid out alike, so that scores do not depend on it.
    """
    paired = after.reshape(*after.shape[:-1], 2, -1).transpose(-1, -2).flatten(-2)
    return find_rotation(before, after) or find_rotation(before, paired)
