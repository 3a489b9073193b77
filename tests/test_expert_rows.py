"""Rows of experts find their tokens by the sum that the block makes of them, and only so."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorsleuth.analyze.expert_rows import BlockCall, find_rows
from tensorsleuth.analyze.routed_tokens import rounding_of

Truth = dict[int, dict[int, int]]
WIDTH = 48


def block(
    seed: int,
    n_tokens: int,
    n_experts: int,
    chosen: int,
    n_unknown: int = 0,
    dtype: str = "float32",
    ties: bool = False,
) -> tuple[BlockCall, Truth]:
    """A block as transformers computes it, and the true row of every known token."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    scores = rng.standard_normal((n_tokens, n_experts))
    order = np.argsort(-scores, axis=1)[:, :chosen]
    if ties:
        scores = np.round(scores)
        swap = rng.random(n_tokens) < 0.5
        order = np.argsort(-scores + np.where(swap, 1e-9, -1e-9)[:, None] * np.arange(n_experts), axis=1)[:, :chosen]
    weights = np.exp(np.take_along_axis(scores, order, axis=1))
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(kind)
    values = rng.standard_normal((n_experts, n_tokens, WIDTH)).astype(kind)
    output = np.zeros((n_tokens, WIDTH), kind)
    known = np.sort(rng.choice(n_tokens, n_tokens - n_unknown, replace=False))
    index = {int(token): place for place, token in enumerate(known)}
    rows, truth = {}, {}
    for expert in range(n_experts):
        choices, tokens = np.nonzero(np.equal(order.T, expert))
        if len(tokens):
            rows[expert] = values[expert, tokens]
            output[tokens] += rows[expert] * weights[tokens, choices][:, None]
            truth[expert] = {index[int(t)]: row for row, t in enumerate(tokens) if int(t) in index}
    return BlockCall(scores[known], output[known], rows, chosen, rounding_of(kind)), truth


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_tokens=st.integers(1, 24),
    sizes=st.sampled_from([(4, 1), (4, 2), (6, 3), (16, 4)]),
    share=st.floats(0, 0.6),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_every_known_token_finds_its_row(
    seed: int, n_tokens: int, sizes: tuple[int, int], share: float, dtype: str
) -> None:
    """Some tokens were not stored: their rows lie between those of the others."""
    call, truth = block(seed, n_tokens, *sizes, n_unknown=int(share * n_tokens), dtype=dtype)
    check_rows(call, truth)


def check_rows(call: BlockCall, truth: Truth) -> None:
    """No row is mistaken, and those that the output depends on are found."""
    found = find_rows(call).row
    heavy = shares(call) > 16 * call.rounding * np.sqrt(call.chosen + 1)
    for expert, rows in truth.items():
        assert {token: rows[token] for token in found[expert]} == dict(found[expert])
        assert {token for token in rows if heavy[token, expert]} <= set(found[expert])


def shares(call: BlockCall) -> npt.NDArray[np.float64]:
    """`[T, E]`: weights of the experts that are chosen, which sum up to 1; 0 of others."""
    chosen = np.argsort(-call.scores, axis=1)[:, : call.chosen]
    weights = np.zeros(call.scores.shape)
    np.put_along_axis(weights, chosen, np.exp(np.take_along_axis(call.scores, chosen, axis=1)), axis=1)
    return weights / weights.sum(axis=1, keepdims=True)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_rows_in_the_order_of_tokens_are_found(seed: int, dtype: str) -> None:
    call, truth = block(seed, 20, 4, 2, dtype=dtype)
    ranks = {expert: {token: rank for rank, token in enumerate(sorted(rows))} for expert, rows in truth.items()}
    by_token = {expert: call.rows[expert][[rows[token] for token in sorted(rows)]] for expert, rows in truth.items()}
    check_rows(replace(call, rows=by_token), ranks)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), similar=st.floats(0.05, 1.0))
def test_a_row_that_hardly_counts_is_not_mistaken_for_one_like_it(seed: int, similar: float) -> None:
    """Rows of one expert resemble each other, one token's has next to no weight, and the order is not the usual."""
    call, truth = block(seed, 16, 4, 2, dtype="bfloat16")
    rng = np.random.default_rng(seed)
    kind = call.output.dtype
    base = {e: rng.standard_normal(WIDTH) for e in call.rows}
    rows = {e: (base[e] + similar * values.astype(float)).astype(kind) for e, values in call.rows.items()}
    weights = shares(call) ** 3
    output = np.zeros(call.output.shape, kind)
    for expert, of_tokens in truth.items():
        for token, row in of_tokens.items():
            output[token] += (rows[expert][row].astype(float) * weights[token, expert]).astype(kind)
    orders = {e: rng.permutation(len(values)) for e, values in rows.items()}
    mixed = {e: values[orders[e]] for e, values in rows.items()}
    for expert, found in find_rows(replace(call, rows=mixed, output=output)).row.items():
        for token, row in found.items():
            right = rows[expert][truth[expert][token]].astype(float)
            apart = np.linalg.norm(mixed[expert][row].astype(float) - right)
            assert apart <= 0.1 * np.linalg.norm(right)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_tokens_whose_scores_tie_find_their_rows_too(seed: int, dtype: str) -> None:
    call, truth = block(seed, 12, 4, 2, dtype=dtype, ties=True)
    check_rows(call, truth)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_rows_in_any_other_order_are_found_or_left_out_never_mistaken(seed: int) -> None:
    call, truth = block(seed, 16, 4, 2)
    rng = np.random.default_rng(seed)
    orders = {expert: rng.permutation(len(rows)) for expert, rows in call.rows.items()}
    shuffled = replace(call, rows={expert: rows[orders[expert]] for expert, rows in call.rows.items()})
    for expert, found in find_rows(shuffled).row.items():
        for token, row in found.items():
            assert orders[expert][row] == truth[expert][token]


@pytest.mark.parametrize("tampered", ["output", "rows"])
def test_what_the_output_does_not_prove_is_left_out(tampered: str) -> None:
    call, truth = block(3, 20, 4, 2, dtype="bfloat16")
    noise = np.random.default_rng(0).standard_normal((200, WIDTH)).astype(np.float32) * 0.2
    if tampered == "rows":
        wrong = replace(call, rows={**call.rows, 1: (call.rows[1] + noise[: len(call.rows[1])]).astype(np.float32)})
        found = find_rows(wrong).row
        assert found[1] == {}
        assert all(truth[expert][token] == row for expert in found for token, row in found[expert].items())
        assert sum(map(len, found.values())) == 2 * sum(token not in truth[1] for token in range(20))
    else:
        found = find_rows(replace(call, output=(call.output + noise[:20]).astype(np.float32))).row
        assert set(map(len, found.values())) == {0}


@pytest.mark.parametrize("seed", range(12))
def test_a_router_that_sends_each_token_to_fewer_experts_leads_to_no_wrong_row(seed: int) -> None:
    call, truth = block(seed, 16, 8, 1)
    found = find_rows(replace(call, chosen=2))
    for expert, rows in found.row.items():
        assert rows.items() <= truth.get(expert, {}).items()
    sent = {expert: frozenset(rows) for expert, rows in truth.items()}
    fewer = [e for e, rows in call.rows.items() if len(rows) < np.sum(np.argsort(-call.scores)[:, :2] == e)]
    assert fewer
    assert all(found.sent[expert] <= sent[expert] for expert in fewer)


def test_too_few_features_prove_nothing() -> None:
    """Any output is a sum of as many rows as it has features."""
    call, _ = block(1, 8, 4, 2)
    narrow = replace(call, output=call.output[:, :6], rows={e: rows[:, :6] for e, rows in call.rows.items()})
    assert set(map(len, find_rows(narrow).row.values())) == {0}


def test_what_a_block_adds_beside_its_experts_is_no_contradiction() -> None:
    call, truth = block(2, 12, 4, 2)
    beside = np.random.default_rng(5).standard_normal((12, 1, WIDTH)).astype(np.float32)
    more = replace(call, output=call.output + 0.7 * beside[:, 0])
    assert set(map(len, find_rows(more).row.values())) == {0}
    assert {e: dict(rows) for e, rows in find_rows(replace(more, beside=beside)).row.items()} == truth
