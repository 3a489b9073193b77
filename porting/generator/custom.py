"""Which facts of an architecture the library has no module for: what a port brings along."""

from __future__ import annotations

from collections.abc import Iterator

from ..spec.architecture import Architecture
from ..spec.encoder_decoder_facts import AnyArchitecture, EncoderDecoder
from .norm_plan import norm_plan
from .plan import plan


def custom_parts(spec: AnyArchitecture) -> tuple[str, ...]:
    """Names of the facts that needed code of their own, for reports.

    Args:
        spec: the architecture.
    """
    return tuple(_of_stacks(spec) if isinstance(spec, EncoderDecoder) else _parts(spec))


def _of_stacks(spec: EncoderDecoder) -> Iterator[str]:
    yield "two stacks, their attention and caches"
    if spec.decoder.positions is not None:
        yield "relative positions"
    yield "feed-forward block"
    if spec.head.factor is not None:
        yield "logit factor"


def _parts(spec: Architecture) -> Iterator[str]:
    context = plan(spec, None)
    attention, mixture = context["attention"], context["feed_forward"]["mixture"]
    norm = norm_plan(spec)
    if norm["define"] and norm["kind"] == "plain":
        yield "norm"
    if spec.attention.latent is not None:
        yield "latent attention"
    if context["heads_norm"]:
        yield f"norm of queries and keys per {context['heads_norm']['scope']}"
    if attention.get("norm_after"):
        yield "norm of rotated queries and keys"
    rotate = attention["rotate"]
    if rotate:
        yield f"{rotate} rotary"
    yield from sorted(f"{kind} rotary" for kind in context["blocks"]["rotary_kinds"])
    if attention.get("local_mask"):
        yield f"{attention['local_mask']} by layer"
    if attention.get("query_factor"):
        yield "score factor"
    if attention.get("softcap"):
        yield "score softcap"
    if len(spec.attention.rotary) > 1:
        yield "rotary by layer"
    if context["feed_forward"]["classes"]:
        yield "feed-forward block"
    if mixture is not None and mixture["router"]:
        yield "router"
    if mixture is not None and mixture["shared"]:
        yield "shared expert"
    if spec.embedding.factor is not None:
        yield "embedding factor"
    if spec.embedding.positions is not None:
        yield "learned positions"
    if context["head"]["define"]:
        yield "logit factor or softcap"
