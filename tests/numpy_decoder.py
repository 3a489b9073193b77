"""A two-layer decoder in numpy that plays reference, baseline and port: fast, and a seam for every bug.

It is written apart from the laws of the diagnosis. Weights are drawn with gains around 1 and rounded to BF16, so that
all runs start from the same numbers; the baseline and the port round every site to BF16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from numpy_runs import Tensor, add_run
from tensorsleuth.store import Trace

Array = npt.NDArray[np.float64]
HIDDEN, HEADS, KV_HEADS, DIM, WIDE, VOCABULARY, LAYERS = 32, 4, 2, 8, 48, 64, 2
PROMPT, DECODED = 20, 2
CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "num_hidden_layers": LAYERS,
    "intermediate_size": WIDE,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}


def bf16(values: Array) -> Array:
    """Round to BF16."""
    return np.asarray(values).astype(ml_dtypes.bfloat16).astype(np.float64)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def norm(x: Array, weight: Array, keep: Callable[[Array], Array]) -> Array:
    del keep
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def angles(positions: Array) -> tuple[Array, Array]:
    frequencies = 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
    turned = np.concatenate([positions[:, None] * frequencies] * 2, axis=1)
    return np.cos(turned), np.sin(turned)


def rotate(heads: Array, cos: Array, sin: Array) -> Array:
    half = DIM // 2
    other = np.concatenate([-heads[..., half:], heads[..., :half]], -1)
    return heads * cos[:, None] + other * sin[:, None]


def causal(queries: Array, keys: Array) -> Array:
    return keys[None] <= queries[:, None]


@dataclass(frozen=True)
class Port:
    """The pieces of which the decoder is made; a bug replaces one."""

    weights: dict[str, Array]
    embed: Callable[[Array], Array] = lambda rows: rows
    norm: Callable[..., Array] = norm
    angles: Callable[[Array], tuple[Array, Array]] = angles
    rotate: Callable[[Array, Array, Array], Array] = rotate
    scale: float = DIM**-0.5
    visible: Callable[[Array, Array], Array] = causal
    share: Callable[[int], int] = lambda head: head * KV_HEADS // HEADS
    cache: Callable[[Array, Array, int], tuple[Array, Array]] = lambda key, value, prompt: (key, value)
    mixed: Callable[[Array], Array] = lambda heads: heads
    project: Callable[[str, Array, Array], Array] = lambda name, x, weight: x @ weight.T
    act: Callable[[Array], Array] = silu
    add: Callable[[int, Array, Array], Array] = lambda layer, stream, block: stream + block
    logits: Callable[[Array], Array] = lambda logits: logits
    keep: Callable[[Array], Array] = bf16
    sites: dict[str, Array] = field(default_factory=dict)

    def put(self, name: str, values: Array) -> Array:
        """Round a site's values and note them."""
        rounded = self.keep(values)
        self.sites[name] = rounded
        return rounded

    def run(self, tokens: Sequence[int]) -> dict[str, Array]:
        """All sites of one prompt, `[positions, features]`."""
        self.sites.clear()
        w, ids = self.weights, np.asarray(tokens)
        positions = np.arange(len(ids), dtype=np.float64)
        stream = self.put("model.embed_tokens", self.embed(w["model.embed_tokens"][ids]))
        cos, sin = self.angles(positions)
        cos, sin = self.put("model.rotary_emb[0]", cos), self.put("model.rotary_emb[1]", sin)
        for layer in range(LAYERS):
            stream = self._layer(layer, stream, cos, sin)
        last = self.put("model.norm", self.norm(stream, w["model.norm"], self.keep))
        self.put("lm_head", self.logits(self.project("lm_head", last, w["lm_head"])))
        return dict(self.sites)

    def _layer(self, layer: int, stream: Array, cos: Array, sin: Array) -> Array:
        w, at = self.weights, f"model.layers.{layer}"
        normed = self.put(f"{at}.input_layernorm", self.norm(stream, w[f"{at}.input_layernorm"], self.keep))
        q, k, v = (
            self.put(name, self.project(name, normed, w[name])).reshape(len(normed), -1, DIM)
            for name in (f"{at}.self_attn.{letter}_proj" for letter in "qkv")
        )
        q, k = self.keep(self.rotate(q, cos, sin)), self.keep(self.rotate(k, cos, sin))
        heads = self.mixed(self._attend(q, k, v))
        name = f"{at}.self_attn.o_proj"
        attended = self.put(name, self.project(name, self.keep(heads), w[name]))
        stream = self.keep(self.add(2 * layer, stream, attended))
        name = f"{at}.post_attention_layernorm"
        normed = self.put(name, self.norm(stream, w[name], self.keep))
        gate, up = (
            self.put(name, self.project(name, normed, w[name])) for name in (f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj")
        )
        act = self.put(f"{at}.mlp.act_fn", self.act(gate))
        name = f"{at}.mlp.down_proj"
        down = self.put(name, self.project(name, self.keep(act * up), w[name]))
        return self.put(at, self.add(2 * layer + 1, stream, down))

    def _attend(self, q: Array, k: Array, v: Array) -> Array:
        n = len(q)
        k, v = self.cache(k, v, PROMPT)
        scores_seen = self.visible(np.arange(n), np.arange(n))
        scores_seen = scores_seen & (causal(np.arange(n), np.arange(n)) | (np.arange(n) < PROMPT))
        out = np.zeros((n, HEADS, DIM))
        for head in range(HEADS):
            shared = self.share(head)
            scores = np.where(scores_seen, q[:, head] @ k[:, shared].T * self.scale, -1e30)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = self.keep(weights / weights.sum(-1, keepdims=True)) @ v[:, shared]
        return out.reshape(n, -1)


def draw_weights(seed: int = 5) -> dict[str, Array]:
    """Weights by module path, representable in BF16."""
    generator = np.random.default_rng(seed)

    def matrix(out: int, wide: int) -> Array:
        return bf16(generator.normal(size=(out, wide)) * 1.5 / math.sqrt(wide))

    def gain() -> Array:
        return bf16(np.exp(0.3 * generator.normal(size=HIDDEN)))

    weights = {"model.embed_tokens": bf16(0.3 * generator.normal(size=(VOCABULARY, HIDDEN)))}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        weights[f"{at}.input_layernorm"], weights[f"{at}.post_attention_layernorm"] = gain(), gain()
        for letter, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"{at}.self_attn.{letter}_proj"] = matrix(heads * DIM, HIDDEN)
        weights[f"{at}.self_attn.o_proj"] = matrix(HIDDEN, HEADS * DIM)
        weights[f"{at}.mlp.gate_proj"], weights[f"{at}.mlp.up_proj"] = matrix(WIDE, HIDDEN), matrix(WIDE, HIDDEN)
        weights[f"{at}.mlp.down_proj"] = matrix(HIDDEN, WIDE)
    weights["model.norm"], weights["lm_head"] = gain(), matrix(VOCABULARY, HIDDEN)
    return weights


def draw_tokens(prompts: int = 4, seed: int = 3) -> dict[int, list[int]]:
    """Token ids by prompt."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (prompts, PROMPT + DECODED))
    return {prompt: row.tolist() for prompt, row in enumerate(ids)}


def record(trace: Trace, run: str, port: Port, *, role: str = "target", matrices: bool = True, tp: int = 1) -> None:
    """Run the decoder over all prompts and record every site, prefill and one decode step per token.

    Args:
        trace: where to.
        run: its name.
        port: the decoder.
        role: its role; weights and config are kept with the reference.
        matrices: keep matrices too, not norm gains alone.
        tp: ranks that the run claims to have.
    """
    tokens, tensors = draw_tokens(), []
    dtype = np.float32 if role == "reference" else ml_dtypes.bfloat16
    for prompt, ids in tokens.items():
        for order, (name, values) in enumerate(port.run(ids).items()):
            module, _, slot = name.partition("[")
            spans = [(0, PROMPT), *((p, p + 1) for p in range(PROMPT, PROMPT + DECODED))]
            tensors += [
                Tensor(module, values[None, a:b].astype(dtype), a, "decode" if a else "prefill", max(a - PROMPT + 1, 0),
                       prompt, order, slot.rstrip("]"))
                for a, b in spans
            ]  # fmt: skip
    if role == "reference":
        for name, values in port.weights.items():
            if values.ndim == 1 or matrices:
                array = values.astype(np.float32)
                tensors.append(Tensor(name, array, None, "static", slot="weight", prompt=None, port="parameter"))
    provenance = {"config": CONFIG} if role == "reference" else {}
    add_run(
        trace, run, tensors, role=role, tokens=tokens, n_prompt=PROMPT, provenance=provenance, tp=tp,
        dtype="float32" if role == "reference" else "bfloat16",
    )  # fmt: skip


def exact(values: Array) -> Array:
    """Round to FP32, as the reference does."""
    return np.asarray(values, np.float32).astype(np.float64)


def references(trace: Trace, *, matrices: bool = True) -> Port:
    """Record reference and baseline; returns the correct port."""
    port = Port(draw_weights())
    record(trace, "fp32", replace(port, keep=exact, sites={}), role="reference", matrices=matrices)
    record(trace, "bf16", replace(port, sites={}), role="baseline")
    return port
