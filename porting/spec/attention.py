"""Self-attention: from the projections' outputs to the scores, every step explained by values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...store.errors import InputError
from .architecture import Attention, MaskCase, Number, QueryKeyNorm, Rotary, RotaryCase
from .expressions import Expressions
from .latent import LatentAnalysis
from .observation import Call, Observation, Softmax, source_line
from .query_key import QueryKeyNorms
from .rotary import Rotation, find_rotation, identify
from .sources import Sources
from .wiring import same

_HEADS = ("config.num_attention_heads",)
_KV_HEADS = ("config.num_key_value_heads", "config.num_kv_heads", "1", "config.num_attention_heads")
_HEAD_DIM = (
    "config.head_dim",
    "config.hidden_size // config.num_attention_heads",
    "config.qk_nope_head_dim + config.qk_rope_head_dim",
)
_LATENT_SCALE = "(config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5"
#: YaRN's temperature, squared: once for queries, once for keys.
_TEMPERATURE = '(0.1 * config.rope_scaling["mscale_all_dim"] * math.log(config.rope_scaling["factor"]) + 1) ** 2'
_SCALES = (
    "config.query_pre_attn_scalar ** -0.5",
    "config.attention_multiplier",
    "config.head_dim ** -0.5",
    "(config.hidden_size // config.num_attention_heads) ** -0.5",
    _LATENT_SCALE,
    f"{_LATENT_SCALE} * {_TEMPERATURE}",
)
_SOFTCAPS = ("config.attn_logit_softcapping",)
_WINDOWS = ("config.sliding_window",)
_CHUNKS = ("config.attention_chunk_size",)
#: Masked scores are far below any real one.
_MASKED = -1e4


@dataclass(frozen=True)
class LayerAttention:
    """What was found in one layer.

    Attributes:
        attention: with this layer's rotary embedding and mask as its only cases.
        claims: parameters that are accounted for, by module name.
    """

    attention: Attention
    claims: tuple[str, ...]


class AttentionAnalysis:
    """Analyses the attention of one layer."""

    def __init__(self, seen: Observation, path: str, numbers: Expressions, sources: Sources) -> None:
        """Look at one attention module.

        Args:
            seen: the observed model.
            path: of the module.
            numbers: expressions over the configuration.
            sources: receives where fields come from.
        """
        self._seen, self._path, self._numbers, self._sources = seen, path, numbers, sources
        self._module = seen.model.get_submodule(path)
        self._inside = seen.inside(path)

    def run(self) -> LayerAttention:
        """Explain the whole block.

        Raises:
            InputError: a step is none that is understood.
        """
        softmax = self._softmax()
        batch, heads, length, head_dim = softmax.left.shape
        self._shape = (batch, length)
        kv_heads = self._kv_heads(softmax)
        values = softmax.values
        assert values is not None
        latent = LatentAnalysis(self._seen, self._path, softmax, self._numbers, self._sources).run()
        norm, clip, factor = None, None, 1.0
        rotary: Rotary | None
        if latent is not None:
            layout, names, rotary = "latent", latent.modules, self._identified(latent.rotation)
        else:
            layout, names, (query, key, value) = self._projections(heads, kv_heads, head_dim, values)
            clip = self._clip(value, values)
            if clip is not None:
                query, key = (x.clamp(-self._clip_value, self._clip_value) for x in (query, key))
            keys = softmax.right.transpose(-1, -2)
            keys = keys[:, :: keys.shape[1] // kv_heads]
            norm, rotary, factor = self._query_key(query, key, softmax.left, keys)
        scale, softcap = self._scores(softmax, factor)
        mask = self._mask(softmax)
        output = self._output(softmax)
        number = self._number
        attention = Attention(
            module=self._path.rpartition(".")[2],
            class_name=type(self._module).__name__,
            heads=number("attention.heads", heads, _HEADS),
            kv_heads=number("attention.kv_heads", kv_heads, _KV_HEADS),
            head_dim=number("attention.head_dim", head_dim, _HEAD_DIM),
            layout=layout,
            projections=names,
            output=output,
            qkv_bias=(False,) * 3 if latent else self._biases(names),
            output_bias=self._has_bias(output),
            transposed=type(self._module.get_submodule(output)).__name__ == "Conv1D",
            scale=scale,
            rotary=(RotaryCase("", rotary),),
            mask=(mask,),
            query_key_norm=norm,
            softcap=softcap,
            clip=clip,
            latent=latent.latent if latent else None,
            sinks=self._sinks(softmax, self._numbers.value(scale.expression, self._numbers.small) / factor),
        )
        return LayerAttention(attention, self._claims(attention))

    def _fail(self, what: str, line: str = "") -> InputError:
        where = line or source_line(self._module, "def forward")
        return InputError(f"unsupported: {what} in {type(self._module).__name__} at {self._path} ({where})")

    def _number(self, field: str, value: float, expressions: tuple[str, ...]) -> Number:
        found = self._numbers.find(value, expressions, only=True)
        if found is None:
            raise self._fail(f"{field.rpartition('.')[2]} = {value}, which no configuration key gives")
        self._sources.number(field, found)
        return found

    def _softmax(self) -> Softmax:
        found = [s for s in self._seen.softmaxes.get(self._path, []) if s.left.ndim == 4]
        if len(found) != 1 or found[0].values is None:
            raise self._fail(f"{len(found)} softmaxes over scores instead of one")
        return found[0]

    def _kv_heads(self, softmax: Softmax) -> int:
        """KV heads: keys and values are repeated, each head in a row."""
        assert softmax.values is not None
        n = softmax.values.shape[1]
        keys = softmax.right.transpose(-1, -2)
        for kv_heads in (k for k in range(1, n + 1) if n % k == 0):
            repeated = (x[:, :: n // kv_heads].repeat_interleave(n // kv_heads, 1) for x in (keys, softmax.values))
            if all(torch.equal(a, b) for a, b in zip(repeated, (keys, softmax.values), strict=True)):
                return kv_heads
        return n

    def _linears(self) -> list[Call]:
        return [c for c in self._inside if getattr(c.module, "weight", None) is not None and c.module.weight.ndim == 2]

    def _heads_of(self, tensor: torch.Tensor, heads: int) -> torch.Tensor:
        batch, length = self._shape
        return tensor.reshape(batch, length, heads, -1).transpose(1, 2)

    def _projections(
        self, heads: int, kv_heads: int, head_dim: int, values: torch.Tensor
    ) -> tuple[str, tuple[str, ...], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Which projections give queries, keys and values, and how rows are laid out: values, not rotated, decide."""
        kv_values = values[:, :: values.shape[1] // kv_heads]
        width, kv_width = heads * head_dim, kv_heads * head_dim
        linears = self._linears()
        for call in linears:
            if call.output.shape[-1] != width + 2 * kv_width:
                continue
            plain = torch.split(call.output, [width, kv_width, kv_width], -1)
            cut = tuple(self._heads_of(x, n) for x, n in zip(plain, (heads, kv_heads, kv_heads), strict=True))
            if self._equal(cut[2], kv_values):
                return self._found("plain", (call,), cut)
            group = call.output.reshape(*self._shape, kv_heads, heads // kv_heads + 2, head_dim)
            queries = group[..., :-2, :].flatten(2, 3)
            cut = tuple(x.transpose(1, 2) for x in (queries, group[..., -2, :], group[..., -1, :]))
            if self._equal(cut[2], kv_values):
                return self._found("grouped", (call,), cut)
        if len(linears) >= 3:
            by_values = [c for c in linears if self._equal(self._flat(c, kv_heads), kv_values)]
            others = [c for c in linears if c not in by_values]
            if len(by_values) == 1 and len(others) >= 2:
                query, key = self._in_order(others, width, kv_width)
                calls = (query, key, by_values[0])
                cut = tuple(self._flat(c, n) for c, n in zip(calls, (heads, kv_heads, kv_heads), strict=True))
                return self._found("separate", calls, cut)
        names = ", ".join(c.path.rpartition(".")[2] for c in linears)
        raise self._fail(f"values that are no projection's output ({names})")

    def _flat(self, call: Call, heads: int) -> torch.Tensor:
        n = call.output.numel() // (self._shape[0] * self._shape[1])
        return self._heads_of(call.output, heads) if n % heads == 0 else call.output

    def _in_order(self, calls: list[Call], width: int, kv_width: int) -> tuple[Call, Call]:
        """Queries and keys: by name where both have the same width."""
        queries = [c for c in calls if c.output.shape[-1] == width and c.path.rpartition(".")[2].startswith("q")]
        keys = [c for c in calls if c.output.shape[-1] == kv_width and c.path.rpartition(".")[2].startswith("k")]
        if len(queries) != 1 or len(keys) != 1:
            raise self._fail("projections of queries and keys that cannot be told apart")
        return queries[0], keys[0]

    def _found(
        self, layout: str, calls: tuple[Call, ...], cut: tuple[torch.Tensor, ...]
    ) -> tuple[str, tuple[str, ...], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        names = tuple(call.path.removeprefix(f"{self._path}.") for call in calls)
        lines = [source_line(self._module, f"self.{name}(") for name in names]
        self._sources.measured("attention.layout", "values equal the projection's rows", lines[-1])
        self._sources.add("attention.projections", *lines)
        for name in names:
            self._sources.add("attention.qkv_bias", f"checkpoint: {self._path}.{name}.bias")
        query, key, value = cut
        return layout, names, (query, key, value)

    def _equal(self, found: torch.Tensor, wanted: torch.Tensor) -> bool:
        if found.shape != wanted.shape:
            return False
        if same(found, wanted):
            return True
        clip = getattr(self._numbers.small, "clip_qkv", None)
        return clip is not None and same(found.clamp(-clip, clip), wanted)

    @property
    def _clip_value(self) -> float:
        return float(self._numbers.small.clip_qkv)

    def _clip(self, before: torch.Tensor, values: torch.Tensor) -> Number | None:
        after = values[:, :: values.shape[1] // before.shape[1]]
        if same(before, after):
            return None
        number = self._numbers.number("config.clip_qkv")
        self._sources.number("attention.clip", number, source_line(self._module, "clamp"))
        return number

    def _query_key(
        self, query: torch.Tensor, key: torch.Tensor, query_after: torch.Tensor, key_after: torch.Tensor
    ) -> tuple[QueryKeyNorm | None, Rotary | None, float]:
        """Norm and rotary embedding of queries and keys, and a factor that queries have beside."""
        norms = QueryKeyNorms(self._seen, self._path, self._numbers, self._sources)
        norm, query, key = norms.before(query, key)
        ratio = _constant_ratio(query, query_after)
        if ratio is not None and _constant_ratio(key, key_after) == 1.0:
            self._sources.measured("attention.rotary", "queries and keys are not rotated")
            return norm, None, ratio
        rotations = [find_rotation(a, b) for a, b in ((query, query_after), (key, key_after))]
        if rotations[1] is None and norm is None:
            norm, query_after, key_after = norms.after(query_after, key_after)
            rotations = [find_rotation(a, b) for a, b in ((query, query_after), (key, key_after))]
        if rotations[0] is None or rotations[1] is None:
            raise self._fail("an operation between projections and scores that is no norm and no rotation")
        return norm, self._identified(rotations[1]), rotations[0].factor / rotations[1].factor

    def _identified(self, rotation: Rotation) -> Rotary:
        head_dim = self._numbers.find(self._softmax().left.shape[-1], _HEAD_DIM, only=True)
        assert head_dim is not None
        text = head_dim.expression
        rotary = identify(rotation, self._numbers, f"({text})" if " " in text else text)
        line = source_line(self._module, "rotary")
        if rotary is None:
            scaling = getattr(self._numbers.small, "rope_scaling", None)
            raise self._fail(f"a rotary embedding ({scaling}) whose angles no formula gives", line)
        field = "attention.rotary"
        self._sources.measured(field, "angles between projections and scores", line)
        self._sources.number(f"{field}.theta", rotary.theta)
        self._sources.number(f"{field}.dim", rotary.dim)
        return rotary

    def _scores(self, softmax: Softmax, factor: float) -> tuple[Number, Number | None]:
        """The factor on scores, and the bound of their tanh."""
        plain = (softmax.left.double() @ softmax.right.double()) / factor
        scores = softmax.scores[..., : plain.shape[-1]].double()
        real = scores > _MASKED
        line = source_line(self._module, "scaling") or source_line(self._module, "softmax")
        x, y = plain[real], scores[real]
        if softmax.scores.shape[-1] > plain.shape[-1]:  # with sinks, models subtract each row's maximum
            x, y = (_centred(value, real)[real] for value in (plain, scores))
        scale = float((x * y).sum() / (x * x).sum())
        if (y - scale * x).norm() <= 1e-4 * y.norm():
            return self._scale(scale, line), None
        for expression in _SOFTCAPS:
            cap = getattr(self._numbers.small, expression.removeprefix("config."), None)
            if cap is None:
                continue
            inner = cap * torch.atanh((y / cap).clamp(-1 + 1e-12, 1 - 1e-12))
            small = y.abs() < 0.9 * cap
            scale = float((x[small] * inner[small]).sum() / (x[small] ** 2).sum())
            if (y - cap * torch.tanh(scale * x / cap)).norm() <= 1e-4 * y.norm():
                softcap = self._numbers.number(expression)
                self._sources.number("attention.softcap", softcap, source_line(self._module, "softcap"))
                return self._scale(scale, line), softcap
        raise self._fail("scores that are no multiple of query times key (position biases such as ALiBi?)", line)

    def _scale(self, scale: float, line: str) -> Number:
        found = self._numbers.find(scale, _SCALES)
        if found is None:
            raise self._fail(f"a factor {scale:.6g} on scores that no configuration key gives", line)
        self._sources.number("attention.scale", found, line)
        return found

    def _mask(self, softmax: Softmax) -> MaskCase:
        length = softmax.left.shape[2]
        visible = (softmax.scores[..., :length] > _MASKED)[0, 0]
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        causal = j <= i
        self._sources.measured("attention.mask", "which scores are masked")
        if torch.equal(visible, causal):
            return MaskCase("", "causal")
        for kind, expressions in (("window", _WINDOWS), ("chunk", _CHUNKS)):
            for expression in expressions:
                size = getattr(self._numbers.small, expression.removeprefix("config."), None)
                if not isinstance(size, int):
                    continue
                inside = (i - j < size) if kind == "window" else (i // size == j // size)
                if torch.equal(visible, causal & inside):
                    number = self._numbers.number(expression)
                    self._sources.number("attention.mask.size", number)
                    return MaskCase("", kind, number)
        raise self._fail("a mask that is neither causal nor a window nor chunks")

    def _output(self, softmax: Softmax) -> str:
        assert softmax.mixed is not None
        given = softmax.mixed.transpose(1, 2).flatten(2)
        result = self._seen.call(self._path).output
        for call in self._linears():
            if call.input.numel() == given.numel() and same(call.input.reshape(given.shape), given):
                if not same(call.output.reshape(result.shape), result):
                    raise self._fail(f"an operation after {call.path}")
                name = call.path.removeprefix(f"{self._path}.")
                self._sources.measured("attention.output", "its input is softmax times values")
                self._sources.add("attention.output", source_line(self._module, f"self.{name}("))
                self._sources.add("attention.output_bias", f"checkpoint: {call.path}.bias")
                return name
        raise self._fail("an operation between attention and its output projection")

    def _sinks(self, softmax: Softmax, scale: float) -> str:
        extra = softmax.scores.shape[-1] - softmax.left.shape[2]
        if extra == 0:
            return ""
        scores = softmax.scores[0, :, 0]
        column = scores[:, -1] - scores[:, 0]  # of the first query, which sees the first key only
        plain = scale * (softmax.left[0, :, 0] * softmax.right[0, :, :, 0]).sum(-1)
        for name, parameter in self._module.named_parameters(recurse=False):
            fits = parameter.numel() == column.numel()
            if extra == 1 and fits and torch.allclose(parameter.detach().flatten(), column + plain, atol=1e-4):
                self._sources.add("attention.sinks", f"checkpoint: {self._path}.{name}")
                return str(name)
        raise self._fail("additional scores in the softmax")

    def _biases(self, names: tuple[str, ...]) -> tuple[bool, ...]:
        return tuple(self._has_bias(name) for name in (names if len(names) == 3 else names * 3))

    def _has_bias(self, name: str) -> bool:
        return getattr(self._module.get_submodule(name), "bias", None) is not None

    def _claims(self, attention: Attention) -> tuple[str, ...]:
        modules = [*attention.projections, attention.output]
        if attention.query_key_norm is not None:
            modules += [attention.query_key_norm.query, attention.query_key_norm.key]
        claimed = [f"{m}.{kind}" for m in modules for kind in ("weight", "bias")]
        norms = attention.query_key_norm
        if norms is not None and norms.list_name:
            inside = self._module.named_parameters()
            claimed += [name for name, _ in inside if name.startswith((f"{norms.query}.", f"{norms.key}."))]
        return tuple(claimed + ([attention.sinks] if attention.sinks else []))


def _constant_ratio(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """The factor between two tensors, None when there is none; exactly 1 for equal ones."""
    if before.shape != after.shape:
        return None
    if same(before, after):
        return 1.0
    factor = float((before * after).sum() / (before * before).sum())
    return factor if same(factor * before, after) else None


def _centred(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Values less the mean of each row's real ones."""
    mean = (values.masked_fill(~real, 0.0).sum(-1, keepdim=True)) / real.sum(-1, keepdim=True)
    return values - mean


def with_cases(attention: Attention, rotary: tuple[RotaryCase, ...], mask: tuple[MaskCase, ...]) -> Attention:
    """The attention with the cases of all layers."""
    return replace(attention, rotary=rotary, mask=mask)
