"""What a model's config says: numbers that a port can leave out, whatever the architecture calls them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: Keys whose value multiplies or divides activations somewhere.
_FACTORS = (
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "logit_scale",
    "scale_emb",
    "scale_depth",
    "query_pre_attn_scalar",
    "routed_scaling_factor",
    "residual_scale",
    "attn_scale",
    "scaling_factor",
    "final_logit_softcapping",
    "attn_logit_softcapping",
)


@dataclass(frozen=True)
class Factor:
    """A number that follows from the config: how it is written, and its value."""

    name: str
    value: float


class ModelConfig:
    """A config.json, in the layout of transformers 4 or 5, text models and the text part of others alike."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """`values` as `to_dict` gives them."""
        text = values.get("text_config")
        self._values: dict[str, Any] = {**values, **text} if isinstance(text, dict) else dict(values)

    def number(self, *keys: str) -> float | None:
        """The first of these keys that holds a number."""
        for key in keys:
            value = self._values.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
        return None

    def text(self, *keys: str) -> str | None:
        """The first of these keys that holds text."""
        return next((value for key in keys if isinstance(value := self._values.get(key), str)), None)

    @property
    def hidden_size(self) -> int | None:
        """Width of the residual stream."""
        return _whole(self.number("hidden_size", "n_embd", "d_model"))

    @property
    def heads(self) -> int | None:
        """Query heads."""
        return _whole(self.number("num_attention_heads", "n_head", "num_heads"))

    @property
    def kv_heads(self) -> int | None:
        """Key and value heads."""
        return _whole(self.number("num_key_value_heads")) or self.heads

    @property
    def head_dim(self) -> int | None:
        """Size of a head."""
        given = _whole(self.number("head_dim"))
        if given or not (self.hidden_size and self.heads):
            return given
        return self.hidden_size // self.heads

    @property
    def norm_epsilon(self) -> float | None:
        """Epsilon of the norms."""
        return self.number("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")

    @property
    def norm_epsilon_key(self) -> str:
        """The key that holds it."""
        keys = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
        return next((key for key in keys if key in self._values), "rms_norm_eps")

    @property
    def activation(self) -> str | None:
        """Name of the MLP's activation."""
        return self.text("hidden_act", "hidden_activation", "activation_function")

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary settings in one place: `rope_theta`, `rope_type`, and what scaling needs."""
        found: dict[str, Any] = {"rope_theta": self.number("rope_theta", "rotary_emb_base"), "rope_type": "default"}
        for key in ("rope_scaling", "rope_parameters"):
            nested = self._values.get(key)
            if isinstance(nested, dict):
                found |= {name: value for name, value in nested.items() if value is not None}
                found["rope_type"] = nested.get("rope_type", nested.get("type", "default"))
        found.setdefault("original_max_position_embeddings", self._values.get("original_max_position_embeddings"))
        return found

    @property
    def rotary_dim(self) -> int | None:
        """Dimensions of a head that are rotated."""
        share = self.number("partial_rotary_factor", "rotary_pct")
        if self.head_dim is None:
            return None
        return _whole(self.number("rotary_dim")) or int(self.head_dim * (share or 1.0))

    @property
    def attention_factor(self) -> float | None:
        """YaRN's factor on cosine and sine: given, or 0.1 ln(factor) + 1 (Peng et al. 2023, section 3.4)."""
        rope = self.rope
        if rope.get("attention_factor"):
            return float(rope["attention_factor"])
        if rope["rope_type"] == "yarn" and rope.get("factor"):
            return 0.1 * math.log(float(rope["factor"])) + 1.0
        return None

    @property
    def sliding_window(self) -> int | None:
        """Width of the attention's window."""
        return _whole(self.number("sliding_window"))

    def factors(self) -> Iterator[Factor]:
        """Every number by which a port may wrongly multiply or divide, simplest first."""
        for key in _FACTORS:
            value = self.number(key)
            if value:
                yield Factor(key, value)
                yield Factor(f"sqrt({key})", math.sqrt(abs(value)))
        if self.attention_factor:
            yield Factor("the rotary attention factor", self.attention_factor)
        for name, number in (
            ("hidden_size", self.hidden_size),
            ("head_dim", self.head_dim),
            ("num_hidden_layers", _whole(self.number("num_hidden_layers", "n_layer"))),
            ("num_experts_per_tok", _whole(self.number("num_experts_per_tok"))),
            ("num_attention_heads / num_key_value_heads", self._repeats),
        ):
            if number and number > 1:
                yield Factor(f"sqrt({name})", math.sqrt(number))
                yield Factor(name, float(number))

    @property
    def _repeats(self) -> int | None:
        return self.heads // self.kv_heads if self.heads and self.kv_heads else None

    def name_factor(self, value: float, tolerance: float) -> list[str]:
        """What a factor may be called: every number of the config that it, or its inverse, equals."""
        names = []
        for factor in self.factors():
            if abs(value / factor.value - 1) <= tolerance:
                names.append(factor.name)
            elif abs(value * factor.value - 1) <= tolerance:
                names.append(f"1 / {factor.name}")
        return list(dict.fromkeys(names))


def _whole(value: float | None) -> int | None:
    return int(value) if value is not None and value == int(value) else None
