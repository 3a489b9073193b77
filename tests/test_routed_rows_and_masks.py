"""Sites that hold a router's choice of tokens, or masks, are accounted for and mislead nobody."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy_runs import Array, Tensor, add_run
from tensorsleuth.analyze import masks, routed_rows
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.analyze.localization.suspects import suspects
from tensorsleuth.analyze.verdict import Thresholds
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import HuggingFaceCausalModel, ModelSource, load_model
from tensorsleuth.capture.hf_run import HuggingFaceCapture, capture_hugging_face, run_recorded
from tensorsleuth.capture.prompts import PromptInput, teacher_prompts
from tensorsleuth.capture.selection import Selection
from tensorsleuth.store import Trace

TOKENS = {0: list(range(9))}
LOWEST = {"float32": float(np.finfo(np.float32).min), "half": -65504.0, "infinite": -np.inf}


def rows(n: int, width: int = 8, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def experts(sizes: dict[int, int], step: int = 0, family: str = "moe.experts.{}.w1") -> list[Tensor]:
    """What siblings record when they are given so many rows each."""
    return [
        Tensor(family.format(member), rows(n), None, "decode" if step else "prefill", step, prompt=None)
        for member, n in sizes.items()
    ]


def causal(hidden: float | bool, n: int = 8) -> Array:
    """`[1, n, n]`: what token i must not see is `hidden`."""
    upper = np.triu(np.ones((1, n, n), bool), 1)
    return ~upper if isinstance(hidden, bool) else np.where(upper, np.float32(hidden), np.float32(0))


def status(trace: Trace, comparison: str = "t") -> dict[str, tuple[str, str]]:
    found = trace.query("SELECT site, status, reason FROM coverage WHERE comparison = ?", [comparison]).to_pylist()
    return {row["site"]: (row["status"], row["reason"]) for row in found}


# Rows of a router's choice


@pytest.mark.parametrize(
    "recorded",
    [
        pytest.param(experts({0: 3, 1: 5}), id="other numbers of rows"),
        pytest.param([*experts({0: 1, 2: 1}, 1), *experts({1: 1, 2: 1}, 2)], id="others are called"),
    ],
)
def test_experts_are_known_by_what_they_record(trace: Trace, recorded: list[Tensor]) -> None:
    add_run(trace, "r", recorded, tokens=TOKENS)
    assert routed_rows.routed_modules(trace, "r") == {tensor.module for tensor in recorded}


@pytest.mark.parametrize(
    "recorded",
    [
        pytest.param(experts({0: 4, 1: 4}), id="as many rows"),
        pytest.param([*experts({0: 4, 1: 4}), *experts({0: 1, 1: 1}, 1)], id="as many rows in every step"),
        pytest.param([*experts({0: 1, 1: 1}, 1), *experts({0: 1}, 2)], id="a run that ended within a step"),
        pytest.param(experts({0: 3}) + experts({0: 5}, family="other.{}.w1"), id="other modules"),
        pytest.param(
            [Tensor(f"layers.{n}", rows(n)[None], prompt=0) for n in (1, 2, 3)], id="token positions are known"
        ),
    ],
)
def test_layers_are_no_experts(trace: Trace, recorded: list[Tensor]) -> None:
    add_run(trace, "r", recorded, tokens=TOKENS)
    assert routed_rows.routed_modules(trace, "r") == set()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Trace:
    """A mixture of experts that are modules of their own: reference, baseline, and three targets."""
    trace = Trace.create(tmp_path_factory.mktemp("mixtral") / "trace")
    source = ModelSource(model_folder("mixtral"), seed=0, attention="eager")
    generator = np.random.default_rng(0)
    texts = [PromptInput(str(n), token_ids=tuple(map(int, generator.integers(0, 64, 6 + 2 * n)))) for n in range(8)]
    chosen = Selection(inputs=True)

    def capture(name: str, dtype: str, **options: Any) -> None:
        request = HuggingFaceCapture(source, name, "target", dtype, prompts=texts, selection=chosen, **options)
        capture_hugging_face(trace, request)

    batches = Generation(2, batch_size=4)
    capture("fp32", "float32", generation=batches)
    capture("bf16", "bfloat16", teacher="fp32", generation=Generation(batch_size=4))
    capture("alone", "bfloat16", teacher="fp32", generation=Generation(batch_size=1))
    prompts = teacher_prompts(trace.manifest("fp32"))
    changes: dict[str, tuple[torch.dtype, Callable[[Any], None]]] = {
        "ordered": (torch.bfloat16, _rows_in_reverse),
        "swapped": (torch.bfloat16, _gate_and_up_swapped),
        "scaled": (torch.float32, _one_expert_scaled),
        "exchanged": (torch.float32, _experts_exchanged),
        "unexplained": (torch.bfloat16, _more_than_experts),
    }
    for name, (dtype, change) in changes.items():
        model = load_model(source, dtype)
        change(model)
        run_recorded(
            trace, model, HuggingFaceCausalModel(model), prompts, Generation(batch_size=4), run=name, role="target",
            stack="hf", model_name=name, selection=chosen,
            facts={"generation": {"padding": "left"}, "config": model.config.to_dict()},
        )  # fmt: skip
    return trace


def _rows_in_reverse(model: Any) -> None:
    """Every expert computes its rows in reverse, which changes no token's result."""
    for layer in model.model.layers:
        for expert in layer.block_sparse_moe.experts:
            expert.forward = lambda x, expert=expert: _reversed(expert, x)


def _reversed(expert: Any, x: torch.Tensor) -> torch.Tensor:
    flipped = x.flip(0)
    product = expert.act_fn(expert.w1(flipped)) * expert.w3(flipped)
    out: torch.Tensor = expert.w2(product).flip(0)
    return out


def _gate_and_up_swapped(model: Any) -> None:
    for expert in model.model.layers[0].block_sparse_moe.experts:
        expert.w1, expert.w3 = expert.w3, expert.w1


def _one_expert_scaled(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].block_sparse_moe.experts[2].w3.weight.mul_(1.01)


def _experts_exchanged(model: Any) -> None:
    experts = model.model.layers[0].block_sparse_moe.experts
    experts[0], experts[1] = experts[1], experts[0]


def _more_than_experts(model: Any) -> None:
    """The blocks return something that their experts' rows do not explain."""
    for layer in model.model.layers:
        layer.block_sparse_moe.register_forward_hook(lambda _m, given, out: (out[0] + 0.3 * given[0], *out[1:]))


def of_experts(trace: Trace, run: str) -> dict[str, tuple[str, str]]:
    return {site: found for site, found in status(trace, run).items() if ".experts." in site}


def failing(trace: Trace, run: str) -> list[str]:
    query = "SELECT site FROM measurements WHERE comparison = ? AND verdict = 'fail' ORDER BY exec_order"
    return list(dict.fromkeys(row["site"] for row in trace.query(query, [run]).to_pylist()))


@pytest.mark.parametrize("run", ["bf16", "alone"])
def test_rows_of_experts_are_compared_by_token(mixtral: Trace, run: str) -> None:
    """Batches with padding on the left, and prompts one by one: whatever order the rows have."""
    summary = compare(mixtral, ComparisonRequest("fp32", run, thresholds=Thresholds(relative_l2=0.2)))
    assert (summary.verdict, summary.n_unmatched, failing(mixtral, run)) == ("pass", 0, [])
    found = of_experts(mixtral, run)
    assert len(found) > 8
    assert {state for state, _ in found.values()} == {"matched"}
    width = mixtral.manifest("fp32").provenance["config"]["hidden_size"]
    query = "SELECT site, sum(n) AS n FROM measurements WHERE comparison = ? AND prompt IS NULL GROUP BY site"
    sizes = {row["site"]: row["n"] for row in mixtral.query(query, [run]).to_pylist()}
    whole = [site for site in found if re.search(r"experts\.\d$", site)]
    flips = [int(part.split()[0]) for site in whole for part in found[site][1].split("without ")[1:]]
    n_tokens = sum(len(tokens.token_ids) - 1 for tokens in mixtral.manifest("fp32").tokens)
    assert sum(sizes[site] for site in whole) // width + sum(flips) == 2 * 2 * n_tokens  # two layers, two experts each


def test_modules_that_reorder_an_experts_rows_are_left_out_and_no_fault(mixtral: Trace) -> None:
    summary = compare(mixtral, ComparisonRequest("fp32", "ordered", "bf16"))
    assert (summary.n_unmatched, failing(mixtral, "ordered"), suspects(mixtral, "ordered")) == (0, [], [])
    found = of_experts(mixtral, "ordered")
    assert {found[site][0] for site in found if re.search(r"experts\.\d$", site)} == {"matched"}
    assert {found[site] for site in found if ".w1" in site} == {("skipped", routed_rows.REASON)}
    for part in ("gate", "gate:input", ":input", "[0]"):
        path = "model.layers.1.block_sparse_moe" + (part if part[0] in ":[" else f".{part}")
        assert status(mixtral, "ordered")[path][0] == "matched", path


def test_rows_that_the_blocks_output_does_not_prove_are_left_out(mixtral: Trace) -> None:
    compare(mixtral, ComparisonRequest("fp32", "unexplained", "bf16"))
    assert set(of_experts(mixtral, "unexplained").values()) == {("skipped", routed_rows.REASON)}


@pytest.mark.parametrize(
    ("run", "first"),
    [
        ("scaled", "model.layers.1.block_sparse_moe.experts.2.w3"),
        ("exchanged", "model.layers.0.block_sparse_moe.experts.0.w1"),
    ],
)
def test_a_fault_of_one_expert_is_found_there(mixtral: Trace, run: str, first: str) -> None:
    compare(mixtral, ComparisonRequest("fp32", run, thresholds=Thresholds(relative_l2=1e-5)))
    assert failing(mixtral, run)[0] == first


def test_a_fault_within_all_experts_is_found_at_the_first(mixtral: Trace) -> None:
    assert compare(mixtral, ComparisonRequest("fp32", "swapped", "bf16")).verdict == "fail"
    first, *_ = suspects(mixtral, "swapped")
    assert (first.site, first.kind) == ("model.layers.0.block_sparse_moe.experts.0.w1", "origin")


# Masks

HIDDEN = np.random.default_rng(1).standard_normal((1, 8, 16)).astype(np.float32)


def run_with_mask(trace: Trace, run: str, mask: Array | None, noise: int, role: str = "target") -> None:
    values = HIDDEN + 1e-3 * np.random.default_rng(noise).standard_normal(HIDDEN.shape)
    tensors = [Tensor("attn", values.astype(np.float32) if noise else HIDDEN, order=1)]
    if mask is not None:
        tensors.insert(0, Tensor("attn", mask, port="input", slot="attention_mask"))
    add_run(trace, run, tensors, role=role, tokens=TOKENS)


def with_masks(trace: Trace, reference: Array, target: Array | None) -> tuple[str, str]:
    """Verdict, and status of the mask."""
    run_with_mask(trace, "r", reference, 0, "reference")
    run_with_mask(trace, "b", reference, 1, "baseline")
    run_with_mask(trace, "t", target, 2)
    verdict = compare(trace, ComparisonRequest("r", "t", "b")).verdict
    assert status(trace)["attn"][0] == "matched"
    return verdict, status(trace)["attn:input[attention_mask]"][0]


@pytest.mark.parametrize("hidden", [True, *LOWEST.values()], ids=["bool", *LOWEST])
def test_equal_masks_are_compared(trace: Trace, hidden: float | bool) -> None:
    assert with_masks(trace, causal(hidden), causal(hidden)) == ("pass", "matched")


@pytest.mark.parametrize("hidden", [True, LOWEST["float32"]], ids=["bool", "additive"])
@pytest.mark.parametrize(
    "target", [causal(-1e9), causal(LOWEST["float32"])[:, :, :6], None], ids=["rewritten", "other keys", "absent"]
)
def test_other_masks_are_left_out(trace: Trace, hidden: float | bool, target: Array | None) -> None:
    assert with_masks(trace, causal(hidden), target) == ("pass", "skipped")
    wider = "attn:input[attention_mask] is another tensor: 6 elements per position instead of 8"
    assert status(trace)["attn:input[attention_mask]"][1] in (masks.REASON, wider)


def test_positions_that_differ_are_left_out(trace: Trace) -> None:
    positions = np.arange(8, dtype=np.int64)[None, :, None]
    assert with_masks(trace, positions, positions + 3) == ("pass", "skipped")


@pytest.mark.parametrize("value", [-1.0, -2e4], ids=["small", "large and mixed"])
def test_activations_are_no_masks(trace: Trace, value: float) -> None:
    values = causal(value)
    values[0, 0, 1] = value / 2
    assert with_masks(trace, values, values * 3) == ("fail", "matched")
