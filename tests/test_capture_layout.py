"""Batches are cut into prompts and positions; padding is never stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorsleuth.capture.layout import (
    Row,
    StepLayout,
    cut,
    cut_weights,
    holds_attention_weights,
    infer_dims,
    layout_from_mask,
)
from tensorsleuth.capture.recorder import record
from tensorsleuth.store import InputError, Trace
from tensorsleuth.store.dims import by_position, parse_dims
from torch import Tensor

LENGTHS = (2, 5, 3)
LONGEST = 5


def mask_of(side: str, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, n in enumerate(lengths):
        mask[row, slice(max(lengths) - n, None) if side == "left" else slice(n)] = 1
    return mask


def prefill(side: str) -> StepLayout:
    return layout_from_mask(mask_of(side), LONGEST, phase="prefill", step=0, prompts=[4, 5, 6])


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((3, 5, 8), "b s h"),
        ((3, 5), "b s"),
        ((3, 5, 2, 4), "b s n d"),
        ((3, 2, 5, 4), "b n s d"),
        ((1, 5, 8), "1 s h"),
        ((1, 5), "1 s"),
        ((1, 2, 5, 4), "1 n s d"),
        ((15, 8), "(b s) e"),
        ((15,), "(b s)"),
        ((3, 1, 8), ""),
        ((4, 8), ""),
        ((), ""),
        ((3,), ""),
        ((3, 2, 2, 5, 4), ""),
    ],
)
def test_axes_are_recognised_by_their_lengths(shape: tuple[int, ...], dims: str) -> None:
    assert infer_dims(shape, 3, 5, last_only=False) == dims


def test_a_head_that_computes_only_the_last_token_has_a_token_axis_of_length_one() -> None:
    assert infer_dims((3, 1, 8), 3, 5, last_only=True) == "b s h"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["b s h", "b s", "b s n d", "b n s d", "(b s) e", "(b s)", "1 s h", "last"])
def test_each_prompt_gets_its_own_positions_and_nothing_else(side: str, form: str) -> None:
    mask = mask_of(side)
    position = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)
    coded = torch.stack([position + 100 * row for row in range(3)])[range(3), range(3)]  # 100 * row + position
    coded = coded.masked_fill(mask == 0, -1).float()
    layout = prefill(side)
    values = {
        "b s h": coded[:, :, None].expand(3, 5, 8),
        "b s": coded,
        "b s n d": coded[:, :, None, None].expand(3, 5, 2, 4),
        "b n s d": coded[:, None, :, None].expand(3, 2, 5, 4),
        "(b s) e": coded.reshape(15, 1).expand(15, 8),
        "(b s)": coded.reshape(15),
        "1 s h": torch.arange(5.0)[None, :, None].expand(1, 5, 8),
        "last": torch.tensor([[[101.0]], [[104.0]], [[202.0]]]).expand(3, 1, 8),
    }[form]
    cuts = list(cut(values, layout, last_only=form == "last"))
    assert [part.prompt for part in cuts] == [4, 5, 6]
    for row, (part, n) in enumerate(zip(cuts, LENGTHS, strict=True)):
        start = n - 1 if form == "last" else 0
        assert (part.position_start, part.position_count) == (start, n - start)
        rows = by_position(part.values.contiguous().numpy(), part.dims)
        assert rows.shape[0] == n - start
        if form == "1 s h":
            columns = mask[row].nonzero().flatten()
            np.testing.assert_array_equal(rows[:, 0], columns.float())
        elif form != "last":
            np.testing.assert_array_equal(rows, np.arange(n)[:, None] + 100 * row + np.zeros(rows.shape))
        assert parse_dims(part.dims).axes[0].names[0] == "b"


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    window=st.tuples(st.integers(0, 6), st.integers(1, 6)),
    selected=st.booleans(),
)
def test_any_batch_keeps_exactly_the_selected_real_positions(
    lengths: list[int], side: str, window: tuple[int, int], selected: bool
) -> None:
    longest, batch = max(lengths), len(lengths)
    mask = mask_of(side, tuple(lengths))
    layout = layout_from_mask(mask, longest, phase="prefill", step=0, prompts=range(batch))
    tensor = torch.arange(batch * longest * 7.0).reshape(batch, longest, 7)
    positions = range(window[0], window[0] + window[1]) if selected else None
    kept = {
        (part.prompt, (part.position_start or 0) + offset): vector
        for part in cut(tensor, layout, last_only=False, positions=positions)
        for offset, vector in enumerate(part.values[0])
    }
    wanted = {
        (row, position): tensor[row, position + (longest - n if side == "left" else 0)]
        for row, n in enumerate(lengths)
        for position in range(n)
        if positions is None or position in positions
    }
    assert kept.keys() == wanted.keys()
    assert all(torch.equal(kept[key], wanted[key]) for key in wanted)


def test_decode_steps_continue_the_positions_and_leave_finished_prompts_out() -> None:
    mask = torch.cat([mask_of("left"), torch.tensor([[1, 1], [1, 0], [1, 1]])], 1)
    layout = layout_from_mask(mask, 1, phase="decode", step=2, prompts=[0, 1, 2])
    assert layout.rows == (Row(0, 0, 0, 1, 3), Row(2, 2, 0, 1, 4))


@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_weights_lose_the_keys_that_are_padding(side: str) -> None:
    layout = prefill(side)
    assert holds_attention_weights("layers.0.self_attn", "output", "1", (3, 2, 5, 5), layout)
    assert not holds_attention_weights("layers.0.self_attn", "output", "0", (3, 2, 5, 5), layout)
    assert not holds_attention_weights("layers.0.mlp", "output", "1", (3, 2, 5, 5), layout)
    weights = torch.rand(3, 2, 5, 5)
    for row, part in enumerate(cut_weights(weights, layout)):
        real = mask_of(side)[row].bool()
        assert (part.prompt, part.dims, part.position_count) == (4 + row, "b n s k", LENGTHS[row])
        assert torch.equal(part.values[0], weights[row][:, real][:, :, real])


def test_attention_weights_over_a_window_are_those_of_the_last_keys() -> None:
    mask = torch.cat([mask_of("right"), torch.ones(3, 2, dtype=torch.int64)], 1)
    layout = layout_from_mask(mask, 1, phase="decode", step=2, prompts=[0, 1, 2])
    weights = torch.rand(3, 2, 1, 4)
    kept = [part.values.shape[-1] for part in cut_weights(weights, layout)]
    assert kept == [2, 4, 3 - 1]  # of seven keys the last four; those of the first row's prompt lie before them


def test_a_mask_with_holes_is_refused() -> None:
    with pytest.raises(InputError, match="row 0 has holes"):
        layout_from_mask(torch.tensor([[1, 0, 1]]), 3, phase="prefill", step=0, prompts=[0])


def test_tensors_without_a_token_axis_are_kept_whole() -> None:
    (part,) = cut(torch.ones(7, 2), prefill("left"), last_only=False)
    assert (part.prompt, part.dims, part.position_start) == (None, "", None)
    single = StepLayout("prefill", 0, 1, 5, (Row(0, 9, 0, 5, 0),))
    (part,) = cut(torch.ones(7, 2), single, last_only=False)
    assert (part.prompt, part.dims) == (9, "")


def test_a_selection_copies_the_few_positions_it_keeps() -> None:
    tensor = torch.ones(1, 1000, 64)
    layout = StepLayout("prefill", 0, 1, 1000, (Row(0, 0, 0, 1000, 0),))
    (few,) = cut(tensor, layout, last_only=False, positions=range(3, 5))
    assert few.values.untyped_storage().nbytes() == 2 * 64 * 4
    (all_of_them,) = cut(tensor, layout, last_only=False, positions=range(1000))
    assert all_of_them.values.data_ptr() == tensor.data_ptr()


class Shapes(torch.nn.Module):
    """Emits tensors of every recognised shape from `[batch, length]` token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary, self.flat, self.lm_head, self.scalar = (torch.nn.Identity() for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = ids[..., None].float() * torch.arange(1.0, 8.0)
        self.rotary(torch.arange(ids.shape[1]).float()[None, :, None].expand(1, -1, 7))
        self.flat(x.reshape(-1, 7))
        self.scalar(x.new_tensor(3.0))
        return self.lm_head(x[:, -1:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_stores_the_shapes_and_positions_of_one_by_one_runs(trace: Trace, read: Any, side: str) -> None:
    ids = torch.arange(1, 16).reshape(3, 5) * mask_of(side)
    model = Shapes()
    together = layout_from_mask(mask_of(side), 5, phase="prefill", step=0, prompts=range(3))
    with (
        torch.no_grad(),
        record(trace, model, run="batch", role="reference") as recorder,
        recorder.step(together),
    ):
        model(ids)
    with torch.no_grad(), record(trace, model, run="single", role="reference") as recorder:
        for prompt, n in enumerate(LENGTHS):
            layout = StepLayout("prefill", 0, 1, n, (Row(0, prompt, 0, n, 0),))
            with recorder.step(layout):
                model(ids[prompt][mask_of(side)[prompt] == 1][None])
    columns = ("prompt", "phase", "step", "module", "slot", "dims", "position_start", "position_count", "shape")
    found = {
        run: {
            tuple(map(str, (tensor.row[column] for column in columns))): tensor.values
            for tensor in read(trace, f"run = '{run}' AND module != 'scalar'")
        }
        for run in ("batch", "single")
    }
    assert found["batch"].keys() == found["single"].keys()
    for key, values in found["batch"].items():
        if key[3] == "flat":
            np.testing.assert_array_equal(values, found["single"][key])
    scalars = read(trace, "module = 'scalar'")
    assert [tensor.row["prompt"] for tensor in scalars] == [None, 0, 1, 2]
    assert all(tensor.row["shape"] == [] and float(tensor.values) == 3.0 for tensor in scalars)
