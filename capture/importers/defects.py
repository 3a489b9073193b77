"""Known defects of NxD Inference's capture, recognised in the tensors that it wrote."""

from __future__ import annotations

import torch

from ...store.names import is_attention

_ROUTED = ("router", "gate", "expert", "moe")
#: Cosines are at most one, times the attention factor of scaled rotary embeddings.
_LARGEST_COSINE = 2.0

COSINES = (
    "holds cos_cache, not the attention output: the hook walks the module's dataclass in alphabetical order and keeps "
    "the first tensor; capture the module's o_proj instead"
)
OVERWRITTEN = (
    "labelled cte (prefill) but holds a single position: it is a decode step that was saved over the prefill under the "
    "same name, so its position is unknown; save every forward pass under its own step"
)
FIRST_OF_TUPLE = {
    "qkv_proj": "holds Q only, the first of (Q, K, V); imported as slot 0",
    "router": "holds the router logits only, the first of its outputs; imported as slot 0",
}


def placeholder_fault(tensor: torch.Tensor, module: str) -> str | None:
    """Why a tensor of one element stands for none, or None."""
    if tuple(tensor.shape) != (1,) or not tensor.is_floating_point():
        return None
    value = float(tensor.float()[0])
    if value != value:
        return "placeholder: a NaN in a slot for manual tensors that nothing filled"
    if value == 0.0:
        return (
            f"placeholder: a single zero, written when {module} recorded nothing in this step "
            "(in CPU mode the hook forgets its modules after the first forward pass)"
        )
    return None


def looks_like_cosines(tensor: torch.Tensor, module: str) -> bool:
    """Whether what should be an attention output can only be a table of rotary cosines.

    Cosines of `[batch, positions, head_dim]` are small, and either both halves of every row are the same bits, or the
    row of position 0 is one constant that no other element exceeds.
    """
    if not is_attention(module) or tensor.ndim != 3 or tensor.shape[-1] < 2 or not tensor.is_floating_point():
        return False
    values = tensor.float()
    largest = float(values.abs().max())
    if not 0.0 < largest <= _LARGEST_COSINE:
        return False
    half = tensor.shape[-1] // 2
    if tensor.shape[-1] % 2 == 0 and torch.equal(values[..., :half], values[..., half:]):
        return True
    first = values[:, 0]
    return tensor.shape[1] > 1 and bool((first == first[0, 0]).all()) and float(first[0, 0]) == largest


def selected_rows_fault(shape: tuple[int, ...], batch: int, length: int, module: str) -> str | None:
    """Why a flattened router tensor lost its tokens, or None.

    With continuous batching NxD Inference picks the rows of the running sequences out of every captured tensor. In a
    tensor that is flattened to `[batch * length, ...]` a row is a token, so that all but a few tokens are gone.
    """
    routed = any(word in part for part in module.split(".") for word in _ROUTED)
    if routed and len(shape) == 2 and length > 1 and shape[0] == batch:
        return (
            f"holds {shape[0]} of {batch * length} tokens: NxD Inference selected sequences by row in a tensor that is "
            "flattened to one row a token; capture with a full batch"
        )
    return None
