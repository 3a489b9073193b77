"""Words in module paths that capturing and analysis both know."""

from __future__ import annotations

#: What an attention module is called, as the last part of its path.
ATTENTIONS = frozenset({"self_attn", "attention", "attn", "self_attention"})


def is_attention(module: str) -> bool:
    """Whether a module is an attention by its name."""
    return module.rpartition(".")[2] in ATTENTIONS
