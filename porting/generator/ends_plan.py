"""Both ends of a port: embeddings, and the projection to logits."""

from __future__ import annotations

from typing import Any

from ..spec.architecture import Architecture, Number
from .norm_plan import norm_constructor


def embedding_plan(spec: Architecture, stem: str) -> dict[str, Any]:
    embedding = spec.embedding
    lines = []
    summary = []
    factor = embedding.factor
    if factor is not None and not embedding.in_module:
        if embedding.factor_rounded:
            lines.append(f"factor = torch.tensor({_of_self(factor)}, dtype=inputs_embeds.dtype)")
            lines.append("inputs_embeds = inputs_embeds * factor")
        else:
            lines.append(f"inputs_embeds = inputs_embeds * {_of_self(factor)}")
        summary.append("scaled")
    positions = embedding.positions
    name = positions.module.rpartition(".")[2] if positions is not None else ""
    if positions is not None:
        shifted = f"position_ids + {positions.offset}" if positions.offset else "position_ids"
        lines.append(f"inputs_embeds = inputs_embeds + self.{name}({shifted})")
        summary.append("with learned positions added")
    scaled = factor is not None and embedding.in_module
    return {
        "scaled_module": scaled,
        "class_name": f"Neuron{stem}ScaledEmbedding" if scaled else "ParallelEmbedding",
        "factor": factor.expression if factor is not None else "",
        "positions": name,
        "rows": positions.rows.expression if positions is not None else "",
        "lines": lines,
        "summary": f"Token embeddings, {' and '.join(summary)}." if summary else "",
    }


def _of_self(number: Number) -> str:
    return number.expression.replace("config.", "self.config.")


def head_plan(spec: Architecture, stem: str) -> dict[str, Any]:
    head = spec.head
    define = head.scale is not None or head.softcap is not None
    init, forward = [], []
    words = []
    if head.scale is not None:
        init.append(f"self.logit_scale = {head.scale.expression}")
        words.append("times a factor")
    if head.softcap is not None:
        init.append(f"self.softcap = {head.softcap.expression}")
        words.append("bounded by a tanh")
    scaled = "logits * self.logit_scale" if head.scale is not None else "logits"
    if head.softcap is not None:
        forward.append(f"return self.softcap * torch.tanh({scaled} / self.softcap)")
    else:
        forward.append(f"return {scaled}")
    arguments = ["config"] if define else ["config.hidden_size", "config.vocab_size"]
    return {
        "define": define,
        "summary": f", {' and '.join(words)}" if words else "",
        "init": init,
        "forward": forward,
        "arguments": arguments,
        "constructor": f"Neuron{stem}LMHead" if define else "ColumnParallelLinear",
        "norm": norm_constructor(head.norm, "config.hidden_size", stem),
    }
