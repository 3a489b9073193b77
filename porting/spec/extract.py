"""From a model folder or a configuration to its architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...capture.hf import ModelSource, is_encoder_decoder, load_config, model_family
from ...capture.packed import plain_shapes
from ...store.errors import InputError
from .architecture import Architecture, FeedForwardCase, Layer, MaskCase, RotaryCase
from .attention import AttentionAnalysis, LayerAttention, with_cases
from .checkpoint import checkpoint_keys
from .document import leaves, without_cases
from .encoder_decoder import analyse_encoder_decoder
from .encoder_decoder_facts import AnyArchitecture
from .ends import analyse_embedding, analyse_head
from .expressions import Expressions
from .feed_forward import analyse_feed_forward
from .feed_forward import claims as feed_forward_claims
from .hostile import hostile_model, tokens_for
from .layers import LayerAnalysis, cases_of, find_layers
from .mixture import MixtureAnalysis
from .observation import Observation, observe, source_line
from .packing import find_packing
from .sources import Sources

_IGNORED = (r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"attention\.(masked_)?bias$")


@dataclass(frozen=True)
class _Parts:
    layer: Layer
    attention: LayerAttention
    block: FeedForwardCase
    block_path: str
    block_claims: tuple[str, ...]


def analyse_model(path: Path) -> AnyArchitecture:
    """Analyse a model folder, or a config.json alone.

    The configuration is made small (`hostile`), the small model runs once, and every step of it is explained. With
    weights in the folder, their names and shapes must be the configuration's, and each must be consumed.

    Raises:
        InputError: the model cannot be read, or does something that is not understood: the message begins with
            `unsupported:` and names it.
    """
    config = load_config(ModelSource(path)).get_text_config()
    keys = checkpoint_keys(path)
    architecture = analyse(config, keys)
    if keys is not None:
        check_checkpoint(architecture, config, plain_shapes(keys))
    return architecture


def analyse(config: Any, shapes: Mapping[str, tuple[int, ...]] | None = None) -> AnyArchitecture:
    """Analyse the configuration of a decoder-only model or of an encoder-decoder; see `analyse_config`."""
    return analyse_encoder_decoder(config) if is_encoder_decoder(config) else analyse_config(config, shapes)


@torch.no_grad()
def analyse_config(config: Any, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Architecture:
    """Analyse a configuration.

    Args:
        config: the configuration.
        shapes: of the checkpoint's tensors by name, where there are any: they say how its weights are packed.

    Raises:
        InputError: as `analyse_model`.
    """
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise InputError(f"unsupported: {type(config).__name__} does not say how many layers the model has")
    packing, packed_in = find_packing(config, shapes)
    model = hostile_model(config)
    small = model.config
    seen = observe(model, tokens_for(small))
    numbers, sources = Expressions(small, config), Sources()
    layers = find_layers(model, small.num_hidden_layers)
    parts = [_analyse_layer(seen, f"{layers}.{n}", numbers, sources) for n in range(small.num_hidden_layers)]
    first = parts[0]
    for number, part in enumerate(parts):
        if _wiring(part.layer) != _wiring(first.layer):
            raise InputError(f"unsupported: layer {number} of {type(model).__name__} is wired unlike layer 0")
    embedding = analyse_embedding(seen, layers, numbers, sources)
    head = analyse_head(seen, layers, embedding, numbers, sources)
    found = [part.attention.attention for part in parts]
    if any(with_cases(a, (), ()) != with_cases(found[0], (), ()) for a in found):
        raise InputError(f"unsupported: attention of {type(model).__name__} differs between layers")
    rotary = cases_of([a.rotary[0].rotary for a in found], numbers, "rotary embedding", RotaryCase)
    mask = cases_of([_bare(a.mask[0]) for a in found], numbers, "mask", lambda c, m: MaskCase(c, m.kind, m.size))
    blocks = cases_of(
        [part.block for part in parts], numbers, "feed-forward block", lambda c, b: replace(b, condition=c)
    )
    architecture = Architecture(
        model_type=config.model_type,
        class_name=type(model).__name__,
        config_class=type(config).__name__,
        module_name=type(model).__module__,
        prefix=f"{model.base_model_prefix}." if layers.startswith(f"{model.base_model_prefix}.") else "",
        hidden=numbers.number("config.hidden_size"),
        n_layers=numbers.number("config.num_hidden_layers"),
        vocabulary=numbers.number("config.vocab_size"),
        embedding=embedding,
        layer=_without_index(first.layer, layers),
        attention=with_cases(found[0], rotary, mask),
        feed_forward=blocks,
        head=head,
        ignored=_IGNORED,
        packing=packing,
    )
    _check_claims(seen, layers, parts, architecture)
    _add_classes(sources, seen, layers, first)
    _add_keys(sources, architecture)
    if packing is not None:
        sources.add("packing", packed_in)
    return replace(architecture, sources=sources.entries())


def _analyse_layer(seen: Observation, path: str, numbers: Expressions, sources: Sources) -> _Parts:
    analysis = LayerAnalysis(seen, path, numbers, sources)
    attention = AttentionAnalysis(seen, analysis.attention, numbers, sources).run()
    block_path, calls = analysis.feed_forward()
    if analysis.has_experts:
        mixture = MixtureAnalysis(seen, block_path, numbers, sources)
        case = FeedForwardCase("", None, mixture.run())
        return _Parts(analysis.run(), attention, case, block_path, mixture.claims)
    block = analyse_feed_forward(seen, block_path, calls, numbers, sources)
    return _Parts(analysis.run(), attention, FeedForwardCase("", block), block_path, feed_forward_claims(block))


def _wiring(layer: Layer) -> object:
    return [(n.name, n.role, n.terms) for n in layer.nodes], layer.output, layer.norms


def _bare(mask: MaskCase) -> MaskCase:
    return MaskCase("", mask.kind, mask.size)


def _without_index(layer: Layer, layers: str) -> Layer:
    return Layer(layer.class_name, layers, layer.norms, layer.nodes, layer.output)


def _add_keys(sources: Sources, architecture: Architecture) -> None:
    """Add the configuration keys of everything that the port reads from there."""
    for field in ("model_type", "config_class"):
        sources.add(field, "config: model_type")
    for field, value in leaves(architecture):
        expression = str(value).partition(" = ")[0]
        if "config." in expression:
            sources.add(without_cases(field), f"config: {expression.replace('config.', '')}")


def _add_classes(sources: Sources, seen: Observation, layers: str, first: _Parts) -> None:
    """Add the classes of transformers that every part was read from."""
    model = seen.model
    attention = f"{layers}.0.{first.attention.attention.module}"
    parts = {
        "class_name": model,
        "module_name": model,
        "prefix": model,
        "embedding": model.get_submodule(layers.rpartition(".")[0]),
        "layer": model.get_submodule(f"{layers}.0"),
        "attention": model.get_submodule(attention),
        "feed_forward": model.get_submodule(first.block_path),
        "head": model,
    }
    for field, module in parts.items():
        sources.add(field, source_line(module, f"class {type(module).__name__}"))


def _check_claims(seen: Observation, layers: str, parts: list[_Parts], architecture: Architecture) -> None:
    """Every parameter of the small model is part of the description."""
    claimed = {f"{architecture.head.norm_module}.{k}" for k in ("weight", "bias")}
    claimed |= {f"{architecture.head.module}.{k}" for k in ("weight", "bias")}
    claimed.add(f"{architecture.embedding.module}.weight")
    if architecture.embedding.positions is not None:
        claimed.add(f"{architecture.embedding.positions.module}.weight")
    for number, part in enumerate(parts):
        inside = f"{layers}.{number}"
        claimed |= {f"{inside}.{norm.name}.{kind}" for norm in part.layer.norms for kind in ("weight", "bias")}
        attention = part.attention
        claimed |= {f"{inside}.{attention.attention.module}.{name}" for name in attention.claims}
        claimed |= {f"{part.block_path}.{name}" for name in part.block_claims}
    for name, _ in seen.model.named_parameters():
        if name not in claimed:
            raise InputError(f"unsupported: parameter {name} of {architecture.class_name} has no place in the port")


def check_checkpoint(architecture: AnyArchitecture, config: Any, keys: dict[str, tuple[int, ...]]) -> None:
    """Compare a checkpoint's names and shapes with what the configuration builds.

    Raises:
        InputError: a weight is missing, has another shape, or is none that the model knows.
    """
    with torch.device("meta"):
        model = model_family(config).from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    patterns = (*architecture.ignored, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if architecture.head.tied else set()
    tied |= {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    prefix = architecture.prefix if isinstance(architecture, Architecture) else ""
    known = dict(keys)
    if prefix and not any(name.startswith(prefix) for name in keys):
        known = {name if name in expected else f"{prefix}{name}": shape for name, shape in keys.items()}
    for name, shape in known.items():
        if any(re.search(pattern, name) for pattern in patterns):
            continue
        if name not in expected:
            raise InputError(f"unsupported: checkpoint weight {name} is none of {architecture.class_name}'s")
        if shape != expected[name]:
            raise InputError(
                f"unsupported: checkpoint weight {name} has shape {list(shape)}, "
                f"the configuration {list(expected[name])}"
            )
    buffers = {name for name, _ in model.named_buffers()}
    missing = sorted(set(expected) - set(known) - tied - buffers)
    if missing:
        raise InputError(
            f"the checkpoint lacks {len(missing)} weights of {architecture.class_name}: {', '.join(missing[:4])}"
        )
