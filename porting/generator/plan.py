"""What a port contains, decided from a spec: which blocks, which arguments, which lines.

Templates print it; nothing is decided there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...store.errors import InputError
from ..spec.architecture import Architecture, Norm
from ..spec.document import numbers_in
from ..spec.encoder_decoder_facts import AnyArchitecture
from .attention_plan import attention_plan, heads_norm_plan, rotary_plan
from .conversion import conversion_of
from .ends_plan import embedding_plan, head_plan
from .feed_forward_plan import feed_forward_plan
from .latent_plan import latent_plan
from .layer_plan import layer_plan
from .norm_plan import norm_plan

#: Releases of the SDK by NxD Inference version.
RELEASES = {"2.27": "0.7", "2.28": "0.8", "2.29": "0.9"}
_REQUIRED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "pad_token_id", "vocab_size")


def plan(spec: Architecture, sdk: str | None) -> dict[str, Any]:
    """Everything that the templates print.

    Args:
        spec: the architecture.
        sdk: release of the Neuron SDK; None for a port that all of them run.

    Raises:
        InputError: the release is unknown, or the architecture needs a block that does not exist.
    """
    release = release_text(sdk)
    stem = stem_of(spec)
    latent = spec.attention.latent
    attention = (attention_plan if latent is None else latent_plan)(spec, stem, sdk or next(iter(RELEASES)))
    feed_forward = feed_forward_plan(spec, stem)
    derived = list(_derived(spec, attention, feed_forward))
    return {
        "spec": spec,
        "stem": stem,
        "facts_file": "architecture.json",
        "release": release,
        "latent": latent,
        "norm": norm_plan(spec),
        "heads_norm": heads_norm_plan(spec),
        "blocks": rotary_plan(spec, attention),
        "attention": attention,
        "feed_forward": feed_forward,
        "layer": layer_plan(spec, stem, attention, feed_forward),
        "embedding": embedding_plan(spec, stem),
        "head": head_plan(spec, stem),
        "conversion": conversion_of(spec),
        "neuron_config_base": "MoENeuronConfig" if feed_forward["mixture"] else "NeuronConfig",
        "derived": derived,
        "required": list(_required(spec)),
    }


def release_text(sdk: str | None) -> str:
    """How a port's first line names the release of the Neuron SDK it is for; empty for a port that all of them run.

    Raises:
        InputError: the release is unknown.
    """
    if sdk is not None and sdk not in RELEASES:
        raise InputError(f"SDK {sdk!r} is unknown; choose one of {', '.join(RELEASES)}")
    return f" {RELEASES[sdk]} (SDK {sdk})" if sdk else ""


def stem_of(spec: AnyArchitecture) -> str:
    """The model's name in class names: `Llama` of LlamaForCausalLM."""
    return re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", spec.class_name)


def _required(spec: Architecture) -> Iterator[str]:
    """Configuration keys that the port reads, in alphabetical order."""
    keys = set(_REQUIRED)
    for text in numbers_in(spec):
        keys |= set(re.findall(r"config\.(\w+)", text))
    yield from sorted(keys)


def _norm_before(spec: Architecture, module: str) -> Norm:
    """The norm whose output a module of the layer is given; the final one where it is given something else."""
    given = {term.node for node in spec.layer.nodes if node.name == module for term in node.terms}
    return next((named.norm for named in spec.layer.norms if named.name in given), spec.head.norm)


def _derived(spec: Architecture, attention: dict[str, Any], feed_forward: dict[str, Any]) -> Iterator[str]:
    """Lines that give the library's blocks the names they read."""
    if feed_forward["native"]:
        block = next(case.block for case in spec.feed_forward if case.block is not None)
        for name, expression in (
            ("hidden_act", block.activation),
            ("intermediate_size", block.intermediate.expression),
            ("rms_norm_eps", _norm_before(spec, block.module).eps.expression),
        ):
            # other norms read this epsilon: it is not given another value
            if expression != f"config.{name}" and (name != "rms_norm_eps" or f"config.{name}" not in expression):
                yield f"self.{name} = {expression.replace('config.', 'self.')}"
        if block.up_bias:
            yield "self.mlp_bias = True"
    if attention["native_window"]:
        window = attention["native_window"]
        yield "# a window as long as the cache hides nothing"
        yield f"if self.{window} is not None and self.{window} >= self.neuron_config.seq_len:"
        yield f"    self.{window} = None"
