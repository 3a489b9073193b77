"""What NxD's experts compute inside their forward: the values that each token's own experts made of it.

The experts are one fused module, which computes every expert on every token, or on blocks of tokens that a router
sent there, or on one token's experts at a time. Whichever it was, the same is recorded, as port `tap` of the
`expert_mlps` module, token by token and in the order of the token's choices (`(b s) k h`):

    experts          numbers of the chosen experts, -1 for one that did not compute the token (`(b s) k`)
    experts_gate     gate projection, experts_up: up projection, split over ranks
    experts_act      activation of the gate, experts_product: what the down projection is given, split over ranks
    experts_down     what each expert returns, a summand on each rank

Experts with a limited capacity drop tokens in a way that is not seen from outside; they have no such taps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses import FakeTensor

Emit = Callable[[str, str, torch.Tensor], None]
Call = dict[str, torch.Tensor]
#: Tokens `[rows]`, number of the expert, and values `[rows, features]` by name.
Block = tuple[torch.Tensor, torch.Tensor, Call]

#: Slots of port `tap`: the numbers of the experts, then what they computed.
CHOSEN = "experts"
SPLIT = ("experts_gate", "experts_up", "experts_act", "experts_product")
SUMMED = "experts_down"
EXPERT_TAPS = (CHOSEN, *SPLIT, SUMMED)


@contextmanager
def expert_taps(model: torch.nn.Module, emit: Emit) -> Iterator[None]:
    """Report what fused experts compute; modules with `forward_all_experts` and `mlp_op` are such.

    Args:
        model: the model.
        emit: called with the module's path, the slot and the tensor.
    """
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if hasattr(module, "forward_all_experts") and hasattr(module, "mlp_op"):
                _Tapped(path, module, emit).attach(stack)
        yield


class _Tapped:
    """The experts of one layer."""

    def __init__(self, path: str, module: torch.nn.Module, emit: Emit) -> None:
        self._path, self._module, self._emit = path, module, emit
        self._calls: list[Call] = []
        self._blocks: list[Block] | None = None

    def attach(self, stack: ExitStack) -> None:
        """Listen until the stack is closed."""
        for name in ("mlp_op", "mlp_op_tkg"):
            op = getattr(self._module, name, None)
            if op is None:
                continue
            projection = getattr(op, "gate_up_proj", None) or op.up_proj
            for owner, method, report in (
                (op, "forward", self._hear_down),
                (projection, "forward", self._hear_projection),
                (op, "_activation_fn", lambda _, value: self._hear("experts_act", value)),
                (op, "_activation", lambda _, value: self._hear("experts_product", value)),
            ):
                stack.enter_context(_reporting(owner, method, report))
        for method, report in (
            ("forward_all_experts", self._all_experts),
            ("forward_selective_loading", self._selected),
            ("torch_blockwise_matmul_inference", self._in_blocks),
            ("forward_blockwise", self._blockwise),
        ):
            stack.enter_context(_reporting(self._module, method, report, before=self._begin))

    def _begin(self, method: str) -> None:
        self._calls = []
        if method == "forward_blockwise":
            self._blocks = None

    def _hear(self, name: str, value: torch.Tensor) -> None:
        if not self._calls or SUMMED in self._calls[-1]:
            self._calls.append({})
        self._calls[-1][name] = value

    def _hear_projection(self, given: Any, value: torch.Tensor) -> None:
        if hasattr(self._module.mlp_op, "gate_up_proj"):
            gate, up = value.chunk(2, dim=-1)
            self._hear("experts_gate", gate)
            self._hear("experts_up", up)
        else:
            self._hear("experts_up", value)

    def _hear_down(self, given: Any, value: torch.Tensor) -> None:
        self._hear(SUMMED, value)

    def _all_experts(self, given: dict[str, Any], value: torch.Tensor) -> None:
        chosen = given["expert_index"]
        if given.get("chosen_expert_indices") is None and len(self._calls) == 1 and len(chosen) == len(value):
            tokens = torch.arange(len(chosen), device=chosen.device)[:, None]
            self._report(chosen, {name: _flat(found)[chosen, tokens] for name, found in self._calls[0].items()})

    def _selected(self, given: dict[str, Any], value: torch.Tensor) -> None:
        chosen = given["expert_index"]
        if len(self._calls) == len(chosen) and len(chosen):
            names = self._calls[0]
            self._report(chosen, {name: torch.stack([_flat(c[name])[:, 0] for c in self._calls]) for name in names})

    def _in_blocks(self, given: dict[str, Any], value: torch.Tensor) -> None:
        tokens = given["token_position_to_id"].view(given["num_blocks"], given["block_size"])
        if len(self._calls) == len(tokens):
            calls = [{name: _flat(found)[0] for name, found in call.items()} for call in self._calls]
            self._blocks = list(zip(tokens, given["block_to_expert"], calls, strict=True))

    def _blockwise(self, given: dict[str, Any], value: torch.Tensor) -> None:
        if self._blocks and len(given["expert_index"]) == len(value):
            self._report(*by_choice(given["expert_index"], self._blocks))
        self._blocks = None

    def _report(self, chosen: torch.Tensor, values: Call) -> None:
        self._emit(self._path, CHOSEN, chosen)
        for name in (*SPLIT, SUMMED):
            if name in values:
                self._emit(self._path, name, values[name])
        self._calls = []


def by_choice(chosen: torch.Tensor, blocks: Sequence[Block]) -> tuple[torch.Tensor, Call]:
    """Values of blocks of tokens, put at the token and the choice that each row belongs to.

    Args:
        chosen: `[tokens, k]`, the experts of every token.
        blocks: rows of tokens beyond the last one are padding.

    Returns:
        The experts with -1 where no block held the token, and values `[tokens, k, features]`.
    """
    n_tokens = len(chosen)
    values = {name: found.new_zeros(*chosen.shape, found.shape[-1]) for name, found in blocks[0][2].items()}
    if isinstance(chosen, FakeTensor) or chosen.is_meta:
        return chosen, values
    computed = torch.full_like(chosen, -1)
    for tokens, expert, found in blocks:
        rows = ((tokens >= 0) & (tokens < n_tokens)).nonzero()[:, 0]
        places, choices = (chosen[tokens[rows]] == expert).nonzero(as_tuple=True)
        held = rows[places]
        computed[tokens[held], choices] = expert.to(computed.dtype)
        for name, value in found.items():
            values[name][tokens[held], choices] = value[held]
    return computed, values


def _flat(value: torch.Tensor) -> torch.Tensor:
    """`[experts, tokens, features]` of what may have an axis of length one behind the experts."""
    return value.squeeze(1) if value.ndim == 4 else value


@contextmanager
def _reporting(
    owner: Any,
    name: str,
    report: Callable[[dict[str, Any], torch.Tensor], None],
    before: Callable[[str], None] = lambda _: None,
) -> Iterator[None]:
    """Replace a function of one instance by one that also reports its arguments by name, and what it returns."""
    original = getattr(owner, name, None)
    if original is None:
        yield
        return
    signature = None if inspect.isbuiltin(original) else inspect.signature(original)  # torch.sigmoid has none

    def method(*args: Any, **kwargs: Any) -> Any:
        before(name)
        found = original(*args, **kwargs)
        report(signature.bind(*args, **kwargs).arguments if signature else {}, found)
        return found

    own = owner.__dict__.get(name)
    owner.__dict__[name] = method
    try:
        yield
    finally:
        if own is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = own
