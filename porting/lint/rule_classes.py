"""Rules about classes: what the library requires of the classes that a port derives from its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .api import Entry
from .diagnostics import Finding, rule
from .signatures import of_function, override_problem
from .source import PortClass, PortFile

#: Attributes that NeuronBaseModel's docstring asks setup_attr_for_model to set.
MODEL_ATTRIBUTES = (
    "on_device_sampling",
    "tp_degree",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_batch_size",
    "buckets",
)
#: Modules that it asks init_model to make.
MODEL_PARTS = ("embed_tokens", "layers", "norm", "lm_head")
_LIBRARY_ROOTS = ("NeuronBaseForCausalLM", "NeuronApplicationBase", "NeuronBaseModel")
#: A decoder layer's outputs: hidden states, key-value pair, cosine, sine, residual.
_LAYER_OUTPUTS = 5


@rule("incompatible-override", "error", "a method overrides one of the library's and cannot be called like it")
def incompatible_override(file: PortFile) -> Iterator[Finding]:
    """Overrides whose parameters or kind do not fit the library's calls."""
    for cls in _own(file):
        for name, node in cls.methods.items():
            if name in ("__init__", "forward"):
                continue
            for base in cls.library_bases():
                found = file.release.method(base, name)
                if found is None:
                    continue
                own = of_function(node, method=True)
                why = override_problem(own, found[1], file.release.calls(base, name, _replaced(cls)))
                if why is not None:
                    fix = f"give it the parameters of {found[0].text}.{name}: {', '.join(found[1].positional)}"
                    yield Finding(node, f"{cls.name}.{name} {why}", fix)
                break


@rule("missing-hook", "error", "a class leaves out a method that the library calls and does not implement")
def missing_hook(file: PortFile) -> Iterator[Finding]:
    """Abstract methods that nothing implements."""
    for cls in _own(file):
        if cls.derives_from("NeuronBaseModel") and not _is_extended(cls):
            for name in ("setup_attr_for_model", "init_model"):
                if _is_missing(cls, name):
                    message = f"{cls.name} has no {name}, which NeuronBaseModel leaves to it"
                    yield Finding(cls.node, message, f"define {name}(self, config)")


@rule("missing-config-class", "warning", "a causal model does not name its configuration class")
def missing_config_class(file: PortFile) -> Iterator[Finding]:
    """Causal models without get_config_cls: they cannot be built from a compiled folder or by generic tools."""
    for cls in _own(file):
        if cls.derives_from("NeuronBaseForCausalLM") and not _is_extended(cls) and _is_missing(cls, "get_config_cls"):
            message = f"{cls.name} has no get_config_cls: it cannot be made without passing a configuration"
            yield Finding(
                cls.node, message, "define get_config_cls as a class method that returns the configuration class"
            )


@rule("missing-loading-hook", "note", "a causal model cannot load weights of a model name, or tied ones")
def missing_loading_hook(file: PortFile) -> Iterator[Finding]:
    """Hooks that are needed in some situations only."""
    why = {
        "load_hf_model": "quantizing, and loading by a name instead of a folder, fail",
        "update_state_dict_for_tied_weights": "a checkpoint with tie_word_embeddings cannot be loaded",
    }
    for cls in _own(file):
        if cls.derives_from("NeuronBaseForCausalLM") and not _is_extended(cls):
            for name, consequence in why.items():
                if _is_missing(cls, name):
                    yield Finding(
                        cls.node, f"{cls.name} has no {name}: {consequence}", f"define {name} as a static method"
                    )


@rule("missing-model-class", "error", "a causal model does not name the model class it runs")
def missing_model_class(file: PortFile) -> Iterator[Finding]:
    """Causal models without `_model_cls`."""
    for cls in _own(file):
        if not cls.derives_from("NeuronBaseForCausalLM") or _is_extended(cls):
            continue
        own = any(name == "_model_cls" for one in _port_lineage(cls) for name in _class_attributes(one.node))
        inherited = any(
            "_model_cls" in file.release.class_facts(base).get("attributes", ())
            for base in cls.library_bases()
            if base.name not in _LIBRARY_ROOTS
        )
        if not own and not inherited and not any(one.text.endswith("ImageToText") for one in cls.library_bases()):
            yield Finding(cls.node, f"{cls.name} has no _model_cls", "set it to the port's subclass of NeuronBaseModel")


@rule("missing-model-attribute", "error", "setup_attr_for_model does not set an attribute that the base model reads")
def missing_model_attribute(file: PortFile) -> Iterator[Finding]:
    """Model classes without the attributes of the base model's contract."""
    yield from _missing_members(file, "setup_attr_for_model", MODEL_ATTRIBUTES, "set it from the configuration")


@rule("missing-model-part", "error", "init_model does not make a module that the base model calls")
def missing_model_part(file: PortFile) -> Iterator[Finding]:
    """Model classes without embedding, layers, final norm or head."""
    yield from _missing_members(file, "init_model", MODEL_PARTS, "make it in init_model, under this name")


def _missing_members(file: PortFile, method: str, names: tuple[str, ...], fix: str) -> Iterator[Finding]:
    for cls in _own(file):
        if not cls.derives_from("NeuronBaseModel") or _is_extended(cls) or cls.own_method("forward"):
            continue
        if method == "init_model" and cls.own_method("get_model_output"):
            names = tuple(name for name in names if name == "lm_head")
        defined = cls.own_method(method)
        if defined is None or not cls.fully_known:
            continue
        known = {name for one in _port_lineage(cls) for name in _self_attributes(one)}
        for base in cls.library_bases():
            if base.name not in ("NeuronBaseModel",):
                known |= set(file.release.class_facts(base).get("attributes", ()))
        for name in names:
            if name not in known:
                yield Finding(defined[1], f"{cls.name}.{method} does not set self.{name}", fix)


@rule("forward-override", "warning", "a model class overrides forward, and with it sampling, caches and capture")
def forward_override(file: PortFile) -> Iterator[Finding]:
    """Overrides of NeuronBaseModel.forward."""
    for cls in _own(file):
        if cls.derives_from("NeuronBaseModel") and "forward" in cls.methods:
            yield Finding(
                cls.methods["forward"],
                f"{cls.name} overrides forward: masks, cache updates, sampling and tensor capture of the base are lost",
                "override get_model_output, or a module inside, instead",
            )


@rule(
    "decoder-layer-output", "error", "a decoder layer does not return (hidden states, key-values, cos, sin, residual)"
)
def decoder_layer_output(file: PortFile) -> Iterator[Finding]:
    """Layers of a model whose return values the base model would misread."""
    for cls in _own(file):
        if not cls.derives_from("NeuronBaseModel") or cls.own_method("get_model_output") or cls.own_method("forward"):
            continue
        for layer in _layer_classes(cls):
            for node, length in _returned_tuples(layer):
                if length != _LAYER_OUTPUTS:
                    yield Finding(
                        node,
                        f"{layer.name}.forward returns {length} values; the base model reads five: hidden states, "
                        "key-values, cos, sin, residual",
                        "return (hidden_states, present_key_value, cos_cache, sin_cache, None)",
                    )


@rule("sliding-window-unset", "warning", "attention has a sliding window, and the model does not tell the mask of it")
def sliding_window_unset(file: PortFile) -> Iterator[Finding]:
    """Attention with `sliding_window=` in a port whose model never sets `self.sliding_window`."""
    if any(
        isinstance(node, ast.Attribute)
        and node.attr in ("sliding_window", "has_mixed_attn", "window_size")
        and isinstance(node.ctx, ast.Store)
        for node in file.walk(ast.Attribute)
    ):
        return
    if not any(cls.derives_from("NeuronBaseModel") for cls in _own(file)):
        return
    for cls in _own(file):
        if not cls.derives_from("NeuronAttentionBase"):
            continue
        for node in cls.file.within(cls.node):
            if isinstance(node, ast.keyword) and node.arg == "sliding_window" and not _is_none(node.value):
                yield Finding(
                    node.value,
                    f"{cls.name} has a sliding window, but the model sets no self.sliding_window: masks ignore it",
                    "set self.sliding_window in setup_attr_for_model",
                )


@rule("moe-without-config", "error", "a port with experts whose configuration class is not a MoENeuronConfig")
def moe_without_config(file: PortFile) -> Iterator[Finding]:
    """Experts need the keys of MoENeuronConfig."""
    makes = [
        node
        for node in file.walk(ast.Call)
        if isinstance(node, ast.Call) and getattr(file.resolve(node.func), "name", "") == "initialize_moe_module"
    ]
    if not makes:
        return
    for cls in _own(file):
        if not cls.derives_from("InferenceConfig"):
            continue
        returned = list(_neuron_config_classes(cls))
        if returned and not any(returned):
            method = cls.own_method("get_neuron_config_cls")
            yield Finding(
                method[1] if method else cls.node,
                f"{cls.name} configures experts, but its get_neuron_config_cls is not a MoENeuronConfig",
                "return MoENeuronConfig, or a subclass of it, from get_neuron_config_cls",
            )


@rule("no-required-attributes", "note", "a configuration class checks no attribute of the checkpoint's configuration")
def no_required_attributes(file: PortFile) -> Iterator[Finding]:
    """Configuration classes without get_required_attributes."""
    for cls in _own(file):
        if cls.derives_from("InferenceConfig") and not _is_extended(cls):
            own = cls.own_method("get_required_attributes")
            inherited = any(
                "get_required_attributes" in file.release.class_facts(base).get("methods", ())
                for base in cls.library_bases()
                if base.name != "InferenceConfig"
            )
            if own is None and not inherited:
                yield Finding(
                    cls.node,
                    f"{cls.name} has no get_required_attributes: a missing attribute shows up late",
                    "return the names that the port reads",
                )


def _own(file: PortFile) -> Iterator[PortClass]:
    yield from file.classes.values()


def _port_lineage(cls: PortClass) -> Iterator[PortClass]:
    yield from (one for one in cls.lineage() if isinstance(one, PortClass))


def _is_extended(cls: PortClass) -> bool:
    """Whether another class of the file derives from it: then it may leave things to that one."""
    return any(other is not cls and cls in list(_port_lineage(other)) for other in cls.file.classes.values())


def _is_missing(cls: PortClass, name: str) -> bool:
    if cls.own_method(name) is not None or not cls.fully_known:
        return False
    nearest = next((base for base in cls.bases if isinstance(base, Entry) and base.kind == "class"), None)
    bases = [nearest] if nearest is not None else list(cls.library_bases())[:1]
    return all(cls.file.release.is_abstract(base, name) for base in bases) and bool(bases)


def _replaced(cls: PortClass) -> set[str]:
    """Methods of the library that a class replaces without calling them."""
    own = {name for one in _port_lineage(cls) for name in one.methods}
    called = {
        node.func.attr
        for one in _port_lineage(cls)
        for node in one.file.within(one.node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Call)
    }
    return own - called


def _class_attributes(node: ast.ClassDef) -> Iterator[str]:
    for item in node.body:
        targets = (
            item.targets if isinstance(item, ast.Assign) else [item.target] if isinstance(item, ast.AnnAssign) else []
        )
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _self_attributes(cls: PortClass) -> Iterator[str]:
    for node in cls.file.within(cls.node):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr" and len(node.args) > 1:
            yield from (str(item.value) for item in node.args[1:2] if isinstance(item, ast.Constant))
    yield from _class_attributes(cls.node)
    yield from cls.methods


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _layer_classes(cls: PortClass) -> Iterator[PortClass]:
    """Classes of the port that `self.layers` is made of."""
    for node in cls.file.within(cls.node):
        if not isinstance(node, ast.Assign) or not any(
            isinstance(target, ast.Attribute) and target.attr == "layers" and _is_self(target.value)
            for target in node.targets
        ):
            continue
        for call in ast.walk(node.value):
            made = cls.file.resolve(call.func) if isinstance(call, ast.Call) else None
            if isinstance(made, PortClass) and "forward" in made.methods:
                yield made


def _returned_tuples(layer: PortClass) -> Iterator[tuple[ast.AST, int]]:
    """Tuples that a layer's forward returns, with their length."""
    forward = layer.methods["forward"]
    assigned = {
        target.id: node.value
        for node in ast.walk(forward)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Tuple)
    }
    grown = {
        node.target.id
        for node in ast.walk(forward)
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(forward):
        if not isinstance(node, ast.Return) or layer.file.function_around(node) is not forward:
            continue
        value = node.value
        if isinstance(value, ast.Name) and value.id not in grown:
            value = assigned.get(value.id)
        if isinstance(value, ast.Tuple) and not any(isinstance(item, ast.Starred) for item in value.elts):
            yield node, len(value.elts)


def _neuron_config_classes(cls: PortClass) -> Iterator[bool]:
    """For each class that get_neuron_config_cls returns, whether it is a MoENeuronConfig."""
    method = cls.own_method("get_neuron_config_cls")
    if method is None:
        inherited = [
            base
            for base in cls.library_bases()
            if "get_neuron_config_cls" in cls.file.release.class_facts(base).get("methods", ())
        ]
        if inherited and inherited[0].name == "InferenceConfig":
            yield False
        return
    for node in cls.file.within(method[1]):
        if isinstance(node, ast.Return) and node.value is not None:
            thing = method[0].file.resolve(node.value)
            if isinstance(thing, PortClass):
                yield thing.derives_from("MoENeuronConfig")
            elif isinstance(thing, Entry) and thing.kind == "class":
                yield any(one.name == "MoENeuronConfig" for one in cls.file.release.lineage(thing))
            else:
                yield True
