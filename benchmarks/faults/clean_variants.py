"""Correct ports that compute the same in other ways: none of them may be called wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensorsleuth.capture.drive import observer_effect
from tensorsleuth.capture.generate import Generation, Padding, padded
from tensorsleuth.capture.layout import layout_from_mask
from tensorsleuth.capture.prompts import EncodedPrompt
from tensorsleuth.capture.recorder import record
from tensorsleuth.store import Trace
from tensorsleuth.store.manifest import Prompt, PromptTokens
from torch import Tensor, nn
from torch.nn import functional

from .architectures import PAD, Architecture
from .bench import BATCH, TARGET, Bench, Driver, Report
from .planting import epsilon_name, modules, norms
from .port import Attention, attentions, make_port, row_parallel_projections


@dataclass(frozen=True)
class Variant:
    """A correct port.

    Attributes:
        name: short name.
        summary: what is computed differently.
        change: made to the port.
        ranks, reduce: of the port, see `port.make_port`; 0 ranks leave the library's model as it is.
        attention: the library's attention, where the port has none of its own.
        batch_size, padding: how prompts are batched.
        threads: threads that it runs on.
        run: records it in another way than prefill and decode in batches.
        needs: features an architecture must have.
        without: features it must not have.
    """

    name: str
    summary: str
    change: Callable[[Any], None] = lambda _: None
    ranks: int = 2
    reduce: str = "wide"
    attention: str = "eager"
    batch_size: int = BATCH
    padding: Padding = "left"
    threads: int = 1
    run: Driver | None = None
    needs: str = ""
    without: str = ""

    def applies_to(self, architecture: Architecture) -> bool:
        """Whether the architecture can be computed this way."""
        needs, without = frozenset(self.needs.split()), frozenset(self.without.split())
        return needs <= architecture.features and not without & architecture.features

    def model(self, bench: Bench, dtype: torch.dtype) -> Any:
        """The port."""
        model = bench.checkpoint.model(dtype)
        if self.ranks == 0:
            model.set_attn_implementation(self.attention)
        else:
            make_port(model, self.ranks, self.reduce)
        self.change(model)
        return model

    def generation(self) -> Generation:
        """How prompts are batched."""
        return Generation(batch_size=self.batch_size, padding=self.padding, pad_token=PAD)

    def examine(self, bench: Bench, name: str) -> Report:
        """Record it, and return what the analysis says."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            model = self.model(bench, torch.bfloat16)
            return bench.examine(model, name, generation=self.generation(), run=self.run)
        finally:
            torch.set_num_threads(before)


def _split_sum(chunks: int, *, reverse: bool = False) -> Callable[[Any], None]:
    """Row-parallel projections as FP32 sums of `chunks` parts, rounded once."""

    def change(model: Any) -> None:
        for projection in row_parallel_projections(model):
            projection.forward = _accumulated(projection, chunks, reverse)

    return change


def _accumulated(projection: nn.Linear, chunks: int, reverse: bool) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        parts = list(zip(hidden.float().chunk(chunks, -1), projection.weight.float().chunk(chunks, 1), strict=True))
        total = torch.zeros(*hidden.shape[:-1], projection.out_features)
        for part, weight in parts[::-1] if reverse else parts:
            total = total + functional.linear(part, weight)
        if projection.bias is not None:
            total = total + projection.bias.float()
        return total.to(hidden.dtype)

    return forward


def _wide_scores(model: Any) -> None:
    for attention in attentions(model):
        attention.scores_dtype = torch.float32
        attention.softmax_dtype = torch.float32


def _scale_first(model: Any) -> None:
    for attention in attentions(model):
        attention.queries = lambda heads, scale=attention.scale: (heads.float() * scale).to(heads.dtype)
        attention.scale = 1.0


def _scale_after(model: Any) -> None:
    for attention in attentions(model):
        attention.scale_scores = True


def _wide_rotation(model: Any) -> None:
    for attention in attentions(model):
        narrow = attention.rotate
        attention.rotate = lambda heads, cos, sin, narrow=narrow: narrow(heads.float(), cos.float(), sin.float()).to(
            heads.dtype
        )


class _Blockwise(Attention):
    """Attention over keys in blocks with a running maximum and sum, as FlashAttention computes it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, step: Any) -> Tensor:
        times = query.shape[1] // key.shape[1]
        key, value = self.repeat(key, times), self.repeat(value, times)
        shape = query.shape[:-1]
        top = torch.full((*shape, 1), -1e30)
        total, mixed = torch.zeros(*shape, 1), torch.zeros(*shape, value.shape[-1])
        if self.sinks is not None:
            top = self.sinks.float().reshape(1, -1, 1, 1).expand(*shape, 1)
            total = torch.ones(*shape, 1)
        for start in range(0, key.shape[2], 8):
            span = slice(start, start + 8)
            scores = query.float() @ key[:, :, span].float().transpose(2, 3) * self.scale
            if self.softcap is not None:
                scores = torch.tanh(scores / self.softcap) * self.softcap
            if mask is not None:
                scores = scores + mask[..., span].float()
            new = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights, shrink = torch.exp(scores - new), torch.exp(top - new)
            total = total * shrink + weights.sum(-1, keepdim=True)
            mixed = mixed * shrink + weights.to(value.dtype).float() @ value[:, :, span].float()
            top = new
        # A padding row sees no key at all.
        return (mixed / total.clamp(min=1e-30)).to(value.dtype)


def _blockwise(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.forward = _Blockwise(layer.self_attn)


class _FusedAttention(Attention):
    """One projection for Q, K and V."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        parts = (module.q_proj, module.k_proj, module.v_proj)
        self.widths = [part.out_features for part in parts]
        fused = nn.Linear(parts[0].in_features, sum(self.widths), bias=parts[0].bias is not None)
        fused.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        if fused.bias is not None:
            fused.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
        del module.q_proj, module.k_proj, module.v_proj
        module.qkv_proj = fused

    def __call__(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        query, key, value = self.module.qkv_proj(hidden_states).split(self.widths, -1)
        lookup = {"q_proj": query, "k_proj": key, "v_proj": value}
        view = _Projected(self.module, lookup)
        return replace_module(self, view, hidden_states, *arguments, **named)


class _Projected:
    """A module whose projections have been computed already."""

    def __init__(self, module: Any, lookup: dict[str, Tensor]) -> None:
        self._module, self._lookup = module, lookup

    def __getattr__(self, name: str) -> Any:
        lookup = self.__dict__["_lookup"]
        return (lambda _: lookup[name]) if name in lookup else getattr(self.__dict__["_module"], name)


def replace_module(attention: Attention, module: Any, *arguments: Any, **named: Any) -> Any:
    """Call an attention with another module for the duration of the call."""
    kept, attention.module = attention.module, module
    try:
        return Attention.__call__(attention, *arguments, **named)
    finally:
        attention.module = kept


def _fused_qkv(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.forward = _FusedAttention(layer.self_attn)


def _fused_gate_up(model: Any) -> None:
    for _path, mlp in modules(model, "mlp"):
        fused = nn.Linear(mlp.gate_proj.in_features, 2 * mlp.gate_proj.out_features, bias=False)
        fused.weight = nn.Parameter(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), requires_grad=False)
        del mlp.gate_proj, mlp.up_proj
        mlp.gate_up_proj = fused
        mlp.forward = lambda hidden, mlp=mlp: _gated(mlp, hidden)


def _gated(mlp: Any, hidden: Tensor) -> Tensor:
    gate, up = mlp.gate_up_proj(hidden).chunk(2, -1)
    down: Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
    return down


def _norm_order(*, late_cast: bool) -> Callable[[Any], None]:
    """The gain applied before (`late_cast`) or after the result is rounded; variance as a sum over n."""

    def change(model: Any) -> None:
        offset = model.config.model_type == "gemma2"
        for norm in norms(model):
            norm.forward = lambda hidden, norm=norm: _normalised(norm, hidden, offset, late_cast)

    return change


def _normalised(norm: Any, hidden: Tensor, offset: bool, late_cast: bool) -> Tensor:
    wide = hidden.float()
    variance = wide.square().sum(-1, keepdim=True) / wide.shape[-1]
    scaled = wide / torch.sqrt(variance + getattr(norm, epsilon_name(norm)))
    gain = norm.weight.float() + 1.0 if offset else norm.weight.float()
    return (scaled * gain).to(hidden.dtype) if late_cast else scaled.to(hidden.dtype) * gain.to(hidden.dtype)


def _wide_activation(model: Any) -> None:
    for _path, mlp in modules(model, "mlp"):
        original = mlp.act_fn.forward
        mlp.act_fn.forward = lambda values, original=original: original(values.float()).to(values.dtype)


def _dense_experts(model: Any) -> None:
    """Every expert sees every token; unchosen ones get weight 0. Experts are summed in reverse, in FP32."""
    for _path, block in modules(model, "block_sparse_moe"):
        block.forward = lambda hidden, block=block: _all_experts(block, hidden)


def _all_experts(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = block.gate(flat)
    values, chosen = logits.float().softmax(-1).topk(block.top_k, dim=-1)
    weights = torch.zeros(logits.shape).scatter_(1, chosen, values / values.sum(-1, keepdim=True)).to(flat.dtype)
    total = torch.zeros(flat.shape)
    for number in reversed(range(block.num_experts)):
        total = total + (block.experts[number](flat) * weights[:, number, None]).float()
    return total.to(flat.dtype).reshape(hidden.shape), logits


def _compiled(model: Any) -> None:
    for module in norms(model):
        module.forward = torch.compile(module.forward, dynamic=True)


def _run_chunked(trace: Trace, model: Any, prompts: Sequence[EncodedPrompt], facts: dict[str, Any]) -> None:
    tokens = [
        PromptTokens(n, (*prompt.token_ids, *(prompt.forced or ())), len(prompt.token_ids))
        for n, prompt in enumerate(prompts)
    ]
    listing = [Prompt(n, prompt.id, prompt.text, len(prompt.token_ids)) for n, prompt in enumerate(prompts)]
    with torch.no_grad():
        bare = next(_chunks(model, prompts[:BATCH], 0, None))
        with record(
            trace,
            model,
            run=TARGET,
            role="target",
            selection=facts.pop("chosen"),
            stack="hf",
            prompts=listing,
            tokens=lambda: tokens,
            provenance=facts,
        ) as recorder:
            seen = [
                logits
                for start in range(0, len(prompts), BATCH)
                for logits in _chunks(model, prompts[start : start + BATCH], start, recorder)
            ]
            facts["observer_effect"] = observer_effect(bare, seen[0])


def _chunks(model: Any, batch: Sequence[EncodedPrompt], first: int, recorder: Any, size: int = 11) -> Iterator[Tensor]:
    """Logits of every chunk and decode step of one batch."""
    ids, mask = padded(batch, Generation(pad_token=PAD))
    forced = torch.tensor([prompt.forced for prompt in batch])[:, :-1]
    width = ids.shape[1]
    ids, mask = torch.cat([ids, forced], 1), torch.cat([mask, torch.ones_like(forced)], 1)
    edges = [*range(0, width, size), *range(width, ids.shape[1] + 1)]
    cache = None
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        seen, phase = mask[:, :stop], "prefill" if start < width else "decode"
        layout = layout_from_mask(
            seen, stop - start, phase=phase, step=number, prompts=range(first, first + len(batch))
        )
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, start:]
        arguments = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        if recorder is None:
            output = model(input_ids=ids[:, start:stop], **arguments)
        else:
            with recorder.step(layout):
                output = model(input_ids=ids[:, start:stop], **arguments)
        cache = output.past_key_values
        yield output.logits.clone()


VARIANTS = (
    Variant("library", "The baseline's own model once more.", ranks=0),
    Variant("sdpa", "The library's model with fused attention.", ranks=0, attention="sdpa", without="sinks softcap"),
    Variant("port-1", "The port on one rank.", ranks=1),
    Variant("port-2", "The port on two ranks, reduced in FP32."),
    Variant("port-4", "The port on four ranks, reduced in FP32.", ranks=4),
    Variant("port-2-narrow", "Two ranks, reduced in BF16.", reduce="narrow"),
    Variant("port-4-narrow", "Four ranks, reduced in BF16.", ranks=4, reduce="narrow"),
    Variant("split-k-8", "Row-parallel products in eight parts, accumulated in FP32.", _split_sum(8), ranks=1),
    Variant("split-k-reversed", "The same in reverse, sixteen parts.", _split_sum(16, reverse=True), ranks=1),
    Variant("wide-scores", "Scores and softmax in FP32.", _wide_scores),
    Variant("scale-queries", "Queries are scaled in FP32 and rounded before the product.", _scale_first),
    Variant("scale-scores", "Scores are scaled after the product.", _scale_after),
    Variant("wide-rotation", "RoPE is applied in FP32.", _wide_rotation),
    Variant("blockwise", "Attention in blocks of keys with a running softmax.", _blockwise),
    Variant("fused-qkv", "One projection for Q, K and V.", _fused_qkv),
    Variant("fused-gate-up", "One projection for gate and up.", _fused_gate_up, needs="dense"),
    Variant("norm-late-cast", "Norms round after the gain.", _norm_order(late_cast=True)),
    # Where the model rounds after the gain, rounding before it as well is a loss of precision, not another order.
    Variant("norm-early-cast", "Norms round before the gain.", _norm_order(late_cast=False), needs="early_cast"),
    Variant("wide-activation", "The activation in FP32.", _wide_activation, needs="dense"),
    Variant("dense-experts", "All experts see all tokens.", _dense_experts, needs="split_experts"),
    # The library's windowed caches count padding as tokens, so that right padding is wrong in decode, in FP32 too.
    Variant("right-padding", "Padding on the right.", padding="right", without="window"),
    Variant("batch-1", "No batches, no padding.", batch_size=1),
    Variant("batch-4", "Other batches.", batch_size=4),
    Variant("batch-all", "One batch.", batch_size=64),
    Variant("chunked-prefill", "Prefill in chunks.", run=_run_chunked),
    Variant("two-threads", "Two threads.", threads=2),
    Variant("compiled-norms", "Norms through torch.compile.", _compiled),
)
