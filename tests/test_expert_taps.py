"""Fused experts of NxD: what each token's experts computed is recorded, and compared with experts that are modules."""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.analyze.stored_pairs import aligned_pair
from tensorsleuth.analyze.verdict import Thresholds
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import ModelSource
from tensorsleuth.capture.hf_run import HuggingFaceCapture, capture_hugging_face
from tensorsleuth.capture.nxdi.expert_taps import EXPERT_TAPS, by_choice
from tensorsleuth.capture.nxdi.run import NxdiCapture, capture_on_cpu
from tensorsleuth.capture.prompts import PromptInput
from tensorsleuth.store import Trace

PORT = "neuronx_distributed_inference.models.mixtral.modeling_mixtral:NeuronMixtralForCausalLM"
EXPERTS = "model.layers.0.block_sparse_moe.experts"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n_tokens=st.integers(1, 12), chosen=st.integers(1, 3), size=st.integers(1, 5))
def test_blocks_of_tokens_are_put_back_in_place(seed: int, n_tokens: int, chosen: int, size: int) -> None:
    """Blocks hold the tokens of one expert, and padding; an expert that left a token out is marked."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(4, generator=generator)[:chosen] for _ in range(n_tokens)])
    values = torch.randn(4, n_tokens, 3, generator=generator)
    left_out = (int(torch.randint(n_tokens, (1,), generator=generator)), int(index[0, 0]))
    blocks = []
    for expert in range(4):
        tokens = [t for t in (index == expert).any(dim=1).nonzero()[:, 0].tolist() if (t, expert) != left_out]
        for start in range(0, len(tokens), size):
            part = torch.tensor((tokens[start : start + size] + [n_tokens] * size)[:size])
            blocks.append((part, torch.tensor(expert), {"x": values[expert, part.clamp(max=n_tokens - 1)]}))
    if not blocks:
        return
    computed, found = by_choice(index, blocks)
    for token in range(n_tokens):
        for choice, expert in enumerate(index[token].tolist()):
            if (token, expert) == left_out:
                assert computed[token, choice] == -1
            else:
                assert computed[token, choice] == expert
                assert torch.equal(found["x"][token, choice], values[expert, token])


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A mixtral of one layer against its port, whose expert 1 has a gate projection of 1.01 times the weights."""
    if not (os.environ.get("NXDI_SRC") and os.environ.get("NXD_SRC")):
        pytest.skip("needs the NxD Inference sources: set NXDI_SRC and NXD_SRC to checkouts of them")
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        eos_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(folder / "right")
    with torch.no_grad():
        model.model.layers[0].block_sparse_moe.experts[1].w1.weight.mul_(1.01)
    model.save_pretrained(folder / "wrong")
    trace = Trace.create(folder / "trace")
    texts = [PromptInput(str(n), token_ids=tuple(range(3 + n, 8 + 3 * n))) for n in range(4)]
    generation = Generation(new_tokens=4, batch_size=4)
    source = ModelSource(folder / "right")
    capture_hugging_face(trace, HuggingFaceCapture(source, "ref", "reference", prompts=texts, generation=generation))
    options = {"dtype": "float32", "teacher": "ref", "generation": Generation(batch_size=4)}
    capture_on_cpu(trace, NxdiCapture(folder / "wrong", PORT, "port", "target", **options))
    compare(trace, ComparisonRequest("ref", "port", thresholds=Thresholds(relative_l2=1e-5)))
    return trace


def test_both_ways_of_computing_experts_are_recorded_alike(compared: Trace) -> None:
    """Prefill computes blocks of tokens, decode every expert on every token."""
    rows = compared.query(
        """SELECT DISTINCT phase, slot, dims FROM tensors
           WHERE run = 'port' AND port = 'tap' AND starts_with(slot, 'experts')"""
    ).to_pylist()
    assert {(row["phase"], row["slot"]) for row in rows} == {(p, s) for p in ("prefill", "decode") for s in EXPERT_TAPS}
    assert {row["dims"] for row in rows} == {"(b s) k", "(b s) k h"}
    shapes = "SELECT DISTINCT phase, shape[1] AS n FROM tensors WHERE run = 'port' AND ends_with(module, '.mlp_op')"
    assert {(row["phase"], row["n"]) for row in compared.query(shapes).to_pylist()} == {("prefill", 1), ("decode", 4)}


def test_every_module_of_every_expert_is_compared_and_the_wrong_one_found(compared: Trace) -> None:
    rows = compared.query("SELECT site, status FROM coverage WHERE contains(site, '.experts.')").to_pylist()
    assert {row["site"] for row in rows} == {
        f"{EXPERTS}.{number}{part}" for number in range(4) for part in ("", ".w1", ".w2", ".w3", ".act_fn")
    }
    assert {row["status"] for row in rows} == {"matched"}
    errors = compared.query(
        "SELECT site, max(relative_l2) AS error FROM measurements WHERE prompt IS NULL GROUP BY site, exec_order "
        "ORDER BY exec_order"
    ).to_pylist()
    wrong = [row["site"] for row in errors if row["error"] > 1e-5]
    assert wrong[0] == f"{EXPERTS}.1.w1"
    assert {site for site in wrong if ".experts." in site} == {
        f"{EXPERTS}.1{part}" for part in ("", ".w1", ".w2", ".act_fn")
    }
    assert {row["site"]: row["error"] for row in errors}[f"{EXPERTS}.1.w1"] == pytest.approx(0.01, rel=1e-3)


def test_a_stored_pair_is_read_again_with_the_experts_tokens(compared: Trace) -> None:
    tap = "layers.0.mlp.expert_mlps:tap[experts_up]"
    pieces = [
        piece
        for by_prompt in aligned_pair(compared, "port", f"{EXPERTS}.2.w3", tap).values()
        for site in by_prompt.values()
        for piece in site
    ]
    assert sum(len(piece.positions) for piece in pieces) > 4
    for piece in pieces:
        torch.testing.assert_close(torch.tensor(piece.target), torch.tensor(piece.reference), rtol=1e-4, atol=1e-5)
