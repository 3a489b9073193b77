"""What a module's name tells about its tensors: when it ran, and whether its values are one rank's shard.

Dumps hold neither. Names follow the usual decoder layout (embedding, layers, norm, head) with NxD's parallel layers:
a column-parallel projection leaves its output split over ranks, a row-parallel one takes a split input.
"""

from __future__ import annotations

import re

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")
_NUMBER = re.compile(r"\d+")
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings")
_HEADS = ("lm_head", "logits")
#: Places within a layer, in the order of execution.
_WITHIN = ("input_layernorm", "self_attn", "attention", "attn", "post_attention_layernorm", "mlp", "feed_forward")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "rotary_emb", "q_layernorm", "k_layernorm", "o_proj")
_MLP = ("router", "gate_proj", "up_proj", "gate_up_proj", "act_fn", "experts", "expert_mlps", "down_proj")
_COLUMN_PARALLEL = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "Wqkv", "gate_proj", "up_proj", "gate_up_proj", "act_fn"),
        *("q_layernorm", "k_layernorm", "q_norm", "k_norm", "lm_head"),
    }
)
_ROW_PARALLEL = frozenset({"o_proj", "down_proj"})


def leaf(module: str) -> str:
    """Last component of a module path."""
    return module.rpartition(".")[2]


def is_embedding(module: str) -> bool:
    """Whether the module looks token embeddings up."""
    return leaf(module) in _EMBEDDINGS


def is_head(module: str) -> bool:
    """Whether the module computes logits, and so perhaps for the last token only."""
    return leaf(module) in _HEADS


def holds_shard(module: str, port: str) -> bool:
    """Whether, at a tensor-parallel degree above one, a site holds one rank's part of the features."""
    return leaf(module) in (_ROW_PARALLEL if port == "input" else _COLUMN_PARALLEL)


def execution_key(module: str, port: str) -> tuple[object, ...]:
    """Sorts sites in the usual order of execution; a container comes after what it contains, an input before both."""
    layer = _LAYER.search(module)
    if layer is None:
        place = 0 if is_embedding(module) else 3 if is_head(module) else 2 if "norm" in leaf(module) else 1
        return (place, 0, (), _natural(module), port != "input")
    inside = module[layer.end() :]
    parts = inside.split(".") if inside else []
    ranks = tuple(_rank(part, depth) for depth, part in enumerate(parts))
    # Inputs of a container are there before its parts run, outputs after them.
    done = ranks + ((-1,) if port == "input" else (1 << 20,))
    return (1, int(layer[1]), done, _natural(inside), True)


def _rank(part: str, depth: int) -> int:
    for table in (_WITHIN,) if depth == 0 else (_ATTENTION, _MLP):
        if part in table:
            return table.index(part)
    return 100


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    """Sorts numbers in a name by value."""
    marked = _NUMBER.sub(lambda match: f"\0{match[0].zfill(12)}\0", text)
    return tuple((0, piece) for piece in marked.split("\0"))


def annotate(dims: str, sharded: str, copies: int = 1) -> str:
    """Mark the axis of a dims text that is split over tensor-parallel ranks.

    Args:
        dims: as inferred from the shape, for example `b s h`.
        sharded: `s` for positions, `features` for heads or hidden units, empty for none.
        copies: consecutive ranks that hold the same part.
    """
    if not sharded or not dims:
        return dims
    if dims.startswith("("):
        flattened, _, rest = dims.partition(")")
        axes = [f"{flattened})", *rest.split()]
    else:
        axes = dims.split(" ")
    position = next((index for index, axis in enumerate(axes) if axis == "s" or axis.endswith(" s)")), 0)
    axis = position if sharded == "s" else axes.index("n") if "n" in axes else len(axes) - 1
    axes[axis] += "[tp]" if copies == 1 else f"[tp/{copies}]"
    return " ".join(axes)
