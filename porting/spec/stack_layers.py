"""One layer of an encoder or a decoder: which modules it consists of, and what each is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ...store.errors import InputError
from .architecture import Attention, FeedForward, Layer
from .expressions import Expressions
from .feed_forward import analyse_feed_forward, is_linear
from .feed_forward import claims as feed_forward_claims
from .layer_wiring import LayerWiring, Step
from .norms import is_norm
from .observation import Call, Observation, source_line
from .sources import Sources
from .stack_attention import StackAttentionAnalysis
from .wiring import same


@dataclass(frozen=True)
class LayerParts:
    """What a layer consists of: `cross` is None in an encoder's."""

    layer: Layer
    attention: Attention
    cross: Attention | None
    feed_forward: FeedForward

    @property
    def comparable(self) -> object:
        """What layers of one stack have in common."""
        layer = self.layer
        return layer.nodes, layer.output, layer.norms, self.attention, self.cross, self.feed_forward


class StackLayerAnalysis(LayerWiring):
    """Explains how the modules of one layer feed each other, however deep inside the layer they are."""

    def __init__(
        self, seen: Observation, path: str, numbers: Expressions, sources: Sources, cross_sources: Sources
    ) -> None:
        """Look at one layer.

        Args:
            seen: the observed model.
            path: of the layer.
            numbers: expressions over the configuration.
            sources: receives where fields come from.
            cross_sources: the same for attention to the encoder's output.

        Raises:
            InputError: it has not one self-attention, at most one cross-attention, and one feed-forward block.
        """
        super().__init__(seen, path, numbers, sources)
        self.path = path
        self.units = list(self._find_units())
        attentions = {
            call.path: StackAttentionAnalysis(seen, call.path, numbers, sources)
            for call in self.units
            if call.path in seen.softmaxes
        }
        looking = [a_path for a_path, analysis in attentions.items() if analysis.is_cross]
        own = [a_path for a_path in attentions if a_path not in looking]
        blocks = [c.path for c in self.units if c.path not in attentions and not is_norm(c.module)]
        if len(own) != 1 or len(looking) > 1 or len(blocks) != 1:
            raise self._fail(
                f"{len(own)} self-attentions, {len(looking)} cross-attentions and {len(blocks)} feed-forward blocks"
            )
        self.attention, self.cross, self.block = own[0], looking[0] if looking else "", blocks[0]
        self.self_attention = attentions[self.attention]
        self._looking = None
        if self.cross:
            self._looking = StackAttentionAnalysis(seen, self.cross, numbers, cross_sources)
        self.claims: set[str] = set()

    def _fail(self, what: str) -> InputError:
        line = source_line(self._module, "def forward")
        return InputError(f"unsupported: {what} in {type(self._module).__name__} at {self._path} ({line})")

    def _find_units(self) -> Iterator[Call]:
        """Norms, attentions and feed-forward blocks: modules that are not made of such."""
        inside = self._seen.inside(self._path)
        taken: list[str] = []
        for call in inside:
            if any(call.path.startswith(f"{path}.") for path in taken):
                continue
            within = [c for c in inside if c.path.startswith(f"{call.path}.")]
            made_of_units = any(is_norm(c.module) or c.path in self._seen.softmaxes for c in within)
            if is_linear(call.module):
                raise self._fail(f"a projection {call.path} that belongs to no block")
            unit = is_norm(call.module) or call.path in self._seen.softmaxes
            if unit or (not made_of_units and any(is_linear(c.module) for c in within)):
                taken.append(call.path)
                yield call

    def parts(self, memory: torch.Tensor | None) -> LayerParts:
        """Explain the whole layer.

        Args:
            memory: what the encoder returned; None in an encoder.

        Raises:
            InputError: a step is none that is understood.
        """
        layer = self.run()
        norms = [call.path for call in self.units if is_norm(call.module)]
        self.claims |= {f"{path}.{kind}" for path in norms for kind in ("weight", "bias")}
        cross = None
        if self._looking is not None:
            if memory is None or not same(self._looking.memory, memory):
                raise self._fail("keys of cross-attention that are not made of what the encoder returned")
            cross = self._attention(self._looking, self.cross)
        attention = self._attention(self.self_attention, self.attention)
        calls = [c for c in self._seen.inside(self.block) if is_linear(c.module)]
        block = analyse_feed_forward(self._seen, self.block, calls, self._numbers, self._sources)
        self.claims |= {f"{self.block}.{name}" for name in feed_forward_claims(block)}
        return LayerParts(layer, attention, cross, replace(block, module=self._local(self.block)))

    def _attention(self, analysis: StackAttentionAnalysis, path: str) -> Attention:
        found = analysis.run()
        self.claims |= {f"{path}.{name}" for name in found.claims}
        if found.attention.query_key_norm is not None or found.attention.rotary[0].rotary is not None:
            raise self._fail("normed or rotated queries and keys")
        return replace(found.attention, module=self._local(path))

    def _local(self, path: str) -> str:
        return path.removeprefix(f"{self._path}.")

    def _role(self, call: Call) -> str:
        if is_norm(call.module):
            return "norm"
        return {self.attention: "attention", self.cross: "cross_attention"}.get(call.path, "feed_forward")

    def _steps(self) -> Iterator[Step]:
        for call in self.units:
            outer, _, name = call.path.rpartition(".")
            line = source_line(self._seen.model.get_submodule(outer), f"self.{name}(")
            yield Step(call, self._local(call.path), self._role(call), line)
