"""Attention of an encoder-decoder's layers: self-attention with or without a bias by distance, and cross-attention."""

from __future__ import annotations

import torch

from .architecture import MaskCase, Number
from .attention import AttentionAnalysis
from .feed_forward import is_linear
from .observation import Call, Softmax, source_line
from .relative_positions import bias_by_distance, is_nothing

#: Keys that encoder-decoder configurations have, beside or instead of the usual ones.
_OTHER_NAMES = {"heads": ("config.num_heads",), "kv_heads": ("config.num_heads",), "head_dim": ("config.d_kv",)}
#: Masked scores are far below any real one.
_MASKED = -1e4


class StackAttentionAnalysis(AttentionAnalysis):
    """Analyses one attention of one layer; what it adds to scores by distance is kept in `bias`."""

    #: Bias by head and distance (see `bias_by_distance`), None where there is none.
    bias: torch.Tensor | None = None

    @property
    def is_cross(self) -> bool:
        """Whether keys come from elsewhere than queries."""
        calls = [c for c in self._linears() if c.output.ndim == 3]
        first = calls[0].input
        return any(c.input.shape != first.shape or not torch.equal(c.input, first) for c in calls[1:3])

    @property
    def memory(self) -> torch.Tensor:
        """What keys and values are made of."""
        return self._linears()[1].input

    @property
    def tables(self) -> list[Call]:
        """Calls of embedding tables inside the attention."""
        return [c for c in self._inside if isinstance(c.module, torch.nn.Embedding)]

    def _linears(self) -> list[Call]:
        return [c for c in self._inside if is_linear(c.module)]

    def _heads_of(self, tensor: torch.Tensor, heads: int) -> torch.Tensor:
        return tensor.reshape(*tensor.shape[:2], heads, -1).transpose(1, 2)

    def _flat(self, call: Call, heads: int) -> torch.Tensor:
        whole = call.output.shape[-1] % heads == 0
        return self._heads_of(call.output, heads) if whole else call.output

    def _number(self, field: str, value: float, expressions: tuple[str, ...]) -> Number:
        return super()._number(field, value, (*_OTHER_NAMES[field.rpartition(".")[2]], *expressions))

    def _scores(self, softmax: Softmax, factor: float) -> tuple[Number, Number | None]:
        scores = softmax.scores
        visible = scores[0, 0] > _MASKED
        if self.is_cross:
            if not bool((scores > _MASKED).all()):
                raise self._fail("keys that no query sees, although none is padding")
            return super()._scores(softmax, factor)
        found = bias_by_distance((softmax.left.double() @ softmax.right.double()) / factor, scores, visible)
        line = source_line(self._module, "scores")
        if found is None:
            raise self._fail("scores that are neither a multiple of query times key nor that and a bias by distance")
        scale, bias = found
        self.bias = None if is_nothing(bias, scores[..., visible]) else bias
        return self._scale(scale, line), None

    def _scale(self, scale: float, line: str) -> Number:
        if abs(scale - 1.0) < 1e-5:
            self._sources.measured("attention.scale", "scores are query times key", line)
            return Number("1.0", 1.0)
        return super()._scale(scale, line)

    def _mask(self, softmax: Softmax) -> MaskCase:
        if bool((softmax.scores > _MASKED).all()):
            self._sources.measured("attention.mask", "no score is masked")
            return MaskCase("", "full")
        return super()._mask(softmax)

    def _sinks(self, softmax: Softmax, scale: float) -> str:
        if softmax.scores.shape[-1] != softmax.right.shape[-1]:
            raise self._fail("additional scores in the softmax")
        return ""
