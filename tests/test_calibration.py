"""Replicates, calibrations and experts: what a clean port may differ by, and what it may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy_runs import Array, Tensor, add_run
from tensorsleuth import api
from tensorsleuth.analyze.compare import ComparisonRequest, ComparisonSummary, compare
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import HuggingFaceCausalModel, ModelSource, load_model
from tensorsleuth.capture.hf_run import HuggingFaceCapture, capture_hugging_face, run_recorded
from tensorsleuth.capture.prompts import PromptInput, teacher_prompts
from tensorsleuth.capture.replicate import KINDS, Replicate, parse_replicate
from tensorsleuth.capture.selection import Selection
from tensorsleuth.cli.app import main
from tensorsleuth.store import InputError, Trace, index
from transformers import Qwen3MoeConfig

PROMPTS, LENGTH, WIDTH, EXPERTS = 6, 16, 32, 4
TOKENS = {prompt: list(range(prompt, prompt + LENGTH + 1)) for prompt in range(PROMPTS)}
CONFIG = {"config": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}}
Values = dict[str, list[Array]]


def draw(seed: int, width: int = WIDTH) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, LENGTH, width)).astype(np.float32) for _ in range(PROMPTS)]


TRUTH: Values = {
    "layers.0.attn": draw(0),
    "layers.0.gate": [np.argsort(scores, axis=2).astype(np.float32) for scores in draw(1, EXPERTS)],
    "layers.0.experts": draw(2),
    "layers.1.attn": draw(3),
    "head": draw(4),
}
#: The best three experts of these tokens score almost alike: rounding decides.
TIES = [(0, 3), (1, 15), (2, 9), (4, 14)]
for prompt, position in TIES:
    TRUTH["layers.0.gate"][prompt][0, position] = [1.0, 0.5, 0.50001, -1.0]


def clean(seed: int, scale: float = 1e-3, flips: list[tuple[int, int]] | None = None) -> Values:
    """A clean run: small errors, and tokens whose experts, and all that depends on them, come out otherwise."""
    run = {
        site: [
            (value + scale * noise).astype(np.float32)
            for value, noise in zip(values, draw(seed * 10 + number, values[0].shape[2]), strict=True)
        ]
        for number, (site, values) in enumerate(TRUTH.items(), 1)
    }
    for prompt, position in TIES:
        away = (prompt, position) in (flips or [])
        run["layers.0.gate"][prompt][0, position] = [1.0, *((0.50001, 0.5) if away else (0.5, 0.50001)), -1.0]
        if away:
            run["layers.0.experts"][prompt][0, position] += 0.5
            for site in ("layers.1.attn", "head"):
                run[site][prompt][0, position:] += 0.1
    return run


def store(trace: Trace, name: str, values: Values, *, role: str = "target", **options: Any) -> None:
    tensors = [
        Tensor(site, array, prompt=prompt, order=order)
        for order, (site, arrays) in enumerate(values.items())
        for prompt, array in enumerate(arrays)
    ]
    add_run(trace, name, tensors, role=role, tokens=TOKENS, provenance=CONFIG, **options)


@pytest.fixture
def moe(trace: Trace) -> Trace:
    """A mixture of experts: the reference, and a baseline that sends one token elsewhere."""
    store(trace, "r", TRUTH, role="reference")
    store(trace, "b", clean(1, flips=TIES[:1]), role="baseline")
    return trace


def judge(trace: Trace, values: Values, name: str = "t", **options: Any) -> ComparisonSummary:
    store(trace, name, values)
    return compare(trace, ComparisonRequest("r", name, "b", **options))


def rows(trace: Trace, comparison: str = "t") -> dict[str, dict[str, Any]]:
    found = trace.query("SELECT * FROM measurements WHERE comparison = ? AND prompt IS NULL", [comparison])
    return {row["site"]: row for row in found.to_pylist()}


def test_a_flip_of_a_router_tie_is_no_fault(moe: Trace) -> None:
    assert judge(moe, clean(2, flips=TIES[1:3])).verdict == "pass"
    found = rows(moe)
    experts, attention = found["layers.0.experts"], found["layers.1.attn"]
    assert experts["r_ratio"] > 1.3
    assert experts["r_judged"] == pytest.approx(1.0, abs=0.1)
    assert experts["n_rerouted"] == 3  # one of the baseline, two of the target
    assert attention["n_rerouted"] == (LENGTH - 3) + 1 + (LENGTH - 9)  # in later layers, those after it as well
    assert found["layers.0.attn"]["n_rerouted"] == 0


def test_wrong_weights_of_the_experts_fail_though_flips_are_left_out(moe: Trace) -> None:
    values = clean(2, flips=TIES[1:3])
    values["layers.0.experts"] = [value * np.float32(1.01) for value in values["layers.0.experts"]]
    assert judge(moe, values).verdict == "fail"
    assert rows(moe)["layers.0.experts"]["verdict"] == "fail"
    assert rows(moe)["layers.0.gate"]["verdict"] == "pass"


def test_a_router_that_sends_many_tokens_elsewhere_fails(moe: Trace) -> None:
    values = clean(2)
    for prompt in range(PROMPTS):
        values["layers.0.gate"][prompt] = np.roll(values["layers.0.gate"][prompt], 1, axis=2)
    assert judge(moe, values).verdict == "fail"
    assert rows(moe)["layers.0.gate"]["verdict"] == "fail"


def test_faults_that_flips_of_the_baseline_drown_are_found(trace: Trace) -> None:
    """The baseline's flips make its error large, and R small; only the tokens that count show the fault."""
    store(trace, "r", TRUTH, role="reference")
    store(trace, "b", clean(1, flips=TIES), role="baseline")
    values = clean(2)
    values["layers.0.experts"] = [value * np.float32(1.01) for value in values["layers.0.experts"]]
    assert judge(trace, values).verdict == "fail"
    assert rows(trace)["layers.0.experts"]["r_ratio"] < 1.0
    assert rows(trace)["layers.0.experts"]["r_judged"] > 3.0


@pytest.mark.parametrize(("changed", "verdict"), [([(0, 2)], "pass"), ([(p, 5) for p in range(PROMPTS)], "fail")])
def test_chosen_experts_are_compared_as_sets(trace: Trace, changed: list[tuple[int, int]], verdict: str) -> None:
    experts = [np.tile(np.array([3, 1], np.int64), (1, LENGTH, 1)) for _ in range(PROMPTS)]
    target = [values[:, :, ::-1].copy() for values in experts]
    for prompt, position in changed:
        target[prompt][0, position] = [3, 2]
    for name, values in (("r", experts), ("b", experts), ("t", target)):
        store(trace, name, {"layers.0.router": values})
    assert compare(trace, ComparisonRequest("r", "t", "b")).verdict == verdict


@pytest.mark.parametrize(("factor", "verdict"), [(400.0, "fail"), (1.5, "undecided")])
def test_few_prompts_do_not_excuse_an_error_that_chance_cannot_make(trace: Trace, factor: float, verdict: str) -> None:
    """A rotation is the same in every prompt, so that six of them are never significant among so many sites."""
    sites = [f"layers.{n}.attn" for n in range(40)]
    for run, role, wrong in (("r", "reference", 0.0), ("b", "baseline", 1.0), ("t", "target", factor)):
        values = {site: draw(n) for n, site in enumerate(sites)}
        for n, arrays in enumerate(values.values()):
            for array, noise in zip(arrays, draw(100 * ord(run) + n), strict=True):
                array += np.float32(0.0 if run == "r" else 1e-3) * noise
        rotation, error = draw(999)[0], draw(ord(run))[0]
        values["rotary_emb"] = [rotation + np.float32(1e-3 * wrong) * error] * PROMPTS
        store(trace, run, values, role=role)
    compare(trace, ComparisonRequest("r", "t", "b"))
    found = rows(trace)
    rotary = found.pop("rotary_emb")
    assert rotary["q_value"] > 0.05
    assert rotary["verdict"] == verdict
    assert {row["verdict"] for row in found.values()} == {"pass"}


def test_replicates_widen_what_is_clean_and_nothing_else(moe: Trace) -> None:
    noisy, broken = clean(3, 1.3e-3), clean(4, 4e-3)
    assert judge(moe, noisy, "noisy").verdict == "fail"
    for number, scale in enumerate((1.25e-3, 0.8e-3, 1.1e-3)):
        store(moe, f"rep{number}", clean(5 + number, scale, flips=TIES[number : number + 1]), role="baseline")
    store(moe, "broken", broken)
    names = ("rep0", "rep1", "rep2")
    request = ComparisonRequest("r", "noisy", "b", "again", replicates=names)
    assert compare(moe, request).verdict == "pass"
    assert compare(moe, ComparisonRequest("r", "broken", "b", replicates=names)).verdict == "fail"
    row = rows(moe, "broken")["layers.0.experts"]
    assert row["q_value"] < 0.05
    assert 1.2 < row["r_limit"] <= 2.0
    q_values = moe.query("SELECT count(*) AS n FROM measurements WHERE q_value IS NULL AND state = 'measured'")
    assert q_values.to_pylist() == [{"n": 0}]


def test_replicates_that_cannot_tell_are_refused(moe: Trace) -> None:
    store(moe, "half", clean(3), dtype="float16")
    store(moe, "t", clean(2))
    for options, message in (
        ({"replicates": ("half",)}, "in float16"),
        ({"replicates": ("b",)}, "own replicate"),
        ({"replicates": ("half", "half")}, "twice"),
    ):
        with pytest.raises(InputError, match=message):
            compare(moe, ComparisonRequest("r", "t", "b", **options))  # type: ignore[arg-type]


def test_a_calibration_is_learnt_applied_and_survives_a_rebuild(moe: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(moe.path)
    for number, scale in enumerate((1.25e-3, 1.1e-3)):
        store(moe, f"good{number}", clean(20 + number, scale))
    store(moe, "noisy", clean(3, 1.3e-3))
    good = [option for n in (0, 1) for option in ("--good", f"r,b,good{n}")]
    assert main(["calibrate", folder, *good, "--name", "mine"]) == 0
    runs = ["--reference", "r", "--baseline", "b", "--target", "noisy"]
    assert main(["compare", folder, *runs]) == 1
    assert main(["compare", folder, *runs, "--calibration", "mine", "--name", "calibrated"]) == 0
    before = moe.query("FROM calibrations").to_pylist()
    moe.catalog_path.unlink()
    index(moe, rebuild=True)
    assert moe.query("FROM calibrations").to_pylist() == before
    assert api.open(folder).compare(reference="r", baseline="b", target="noisy", calibration="mine").verdict == "pass"
    assert main(["compare", folder, *runs, "--calibration", "other"]) == 2
    assert "its calibrations: mine" in capsys.readouterr().err


def test_a_broken_run_cannot_be_known_good(moe: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    values = clean(2)
    values["head"][0][0, 0, 0] = np.nan
    store(moe, "t", values)
    assert main(["calibrate", str(moe.path), "--good", "r,b,t"]) == 2
    assert "head is nonfinite" in capsys.readouterr().err


Folder = Callable[[str], Path]


def capture(trace: Trace, folder: Path, run: str, **options: Any) -> None:
    given = [PromptInput(str(n), token_ids=tuple(range(3 + n, 9 + 2 * n))) for n in range(3)]
    source = ModelSource(folder, seed=0)
    selection = Selection(include=("*embed*", "*mlp*", "*norm", "lm_head", "*moe", "*gate"))
    capture_hugging_face(
        trace,
        HuggingFaceCapture(
            source,
            run,
            "baseline",
            "bfloat16",
            prompts=given,
            generation=Generation(1 if "teacher" in options else 3),
            selection=selection,
            **options,
        ),
    )


def test_every_kind_of_replicate_says_what_it_replicates(trace: Trace, model_folder: Folder) -> None:
    folder = model_folder("mixtral")
    capture(trace, folder, "bf16")
    content = "SELECT list(checksum ORDER BY prompt, step) AS c FROM tensors WHERE run = ? AND module = 'lm_head'"
    plain = trace.query(content, ["bf16"]).to_pylist()
    for kind in KINDS:
        capture(trace, folder, kind, replicate=Replicate(kind, seed=1), teacher="bf16")
        provenance = trace.manifest(kind).provenance
        assert (provenance["replicate"]["kind"], provenance["replicate"]["of"]) == (kind, ["bf16"])
        assert provenance["observer_effect"]["identical"], kind
        same = trace.query(content, [kind]).to_pylist() == plain
        assert same == (kind == "threads") or kind == "attention"


def test_a_perturbation_moves_every_element_by_an_ulp_whatever_the_batch(trace: Trace, model_folder: Folder) -> None:
    folder = model_folder("llama")
    runs: dict[str, dict[str, Any]] = {"plain": {}}
    runs |= {"one": {"replicate": Replicate("perturb", 1)}, "again": {"replicate": Replicate("perturb", 1)}}
    runs |= {"other": {"replicate": Replicate("perturb", 2)}, "nudge": {"replicate": Replicate("nudge", 1)}}
    values: dict[str, Array] = {}
    for run, options in runs.items():
        capture(trace, folder, run, **options, **({} if run == "plain" else {"teacher": "plain"}))
        found = trace.query(
            "SELECT tensor_id FROM tensors WHERE run = ? AND module = 'model.embed_tokens' AND phase <> 'static' "
            "ORDER BY prompt, step",
            [run],
        ).to_pylist()
        stored = [trace.tensor(row["tensor_id"]).values.astype(np.float64).ravel() for row in found]
        values[run] = np.concatenate(stored)
    moved = np.abs(values["one"] / values["plain"] - 1.0)
    assert 2.0**-9 < moved.min() <= moved.max() < 2.0**-6
    assert np.array_equal(values["one"], values["again"])
    assert not np.array_equal(values["one"], values["other"])
    assert np.mean(values["nudge"] != values["plain"]) == pytest.approx(1 / 16, abs=0.03)


def test_a_perturbed_run_is_the_baseline_of_a_model_that_cannot_run_in_fp32(trace: Trace, model_folder: Folder) -> None:
    """Reference and target in BF16; the baseline is the reference with its inputs perturbed."""
    folder = model_folder("llama")
    capture(trace, folder, "bf16")
    capture(trace, folder, "perturbed", replicate=Replicate("perturb"), teacher="bf16")
    capture(trace, folder, "port", replicate=Replicate("summation"), teacher="bf16")
    clean_port = compare(trace, ComparisonRequest("bf16", "port", "perturbed"))
    assert clean_port.verdict == "pass"
    found = trace.query("SELECT max(r_judged) AS r FROM measurements WHERE comparison = 'port' AND prompt IS NULL")
    assert found.to_pylist()[0]["r"] < 1.2


def test_kinds_of_replicates_are_read_from_the_command_line() -> None:
    assert parse_replicate("summation:4") == Replicate("summation", parts=4)
    assert parse_replicate("nudge:7") == Replicate("nudge", seed=7)
    for text in ("noise", "attention:2", "threads:x"):
        with pytest.raises(InputError):
            parse_replicate(text)


def _rolled(module: Any, args: Any, output: Any) -> Any:
    """Scores of a router, moved to the next expert."""
    return output.roll(1, -1) if not isinstance(output, tuple) else (output[0].roll(1, -1), *output[1:])


def _set(model: Any, name: str, value: object) -> int:
    found = [module for module in model.modules() if hasattr(module, name)]
    for module in found:
        setattr(module, name, value)
    return len(found)


FAULTS: dict[str, Callable[[Any], object]] = {
    "one expert too few": lambda model: _set(model, "top_k", 1),
    "weights not normalised": lambda model: _set(model, "norm_topk_prob", False),
    "experts mixed up": lambda model: [
        module.register_forward_hook(_rolled) for path, module in model.named_modules() if path.endswith("mlp.gate")
    ],
}


def test_bugs_of_routing_fail_in_a_real_model_whose_clean_port_passes(trace: Trace, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = Qwen3MoeConfig(**sizes, **experts, **heads, bos_token_id=None, eos_token_id=None, initializer_range=0.3)
    config.save_pretrained(tmp_path / "model")
    source = ModelSource(tmp_path / "model", seed=0)
    rng = np.random.default_rng(0)
    texts = [PromptInput(str(n), token_ids=tuple(int(t) for t in rng.integers(0, 64, 4 + n))) for n in range(10)]

    def run(name: str, dtype: str, **options: Any) -> None:
        options = {"teacher": "fp32", **options}
        chosen = Selection(exclude=("*experts*",))
        capture_hugging_face(
            trace, HuggingFaceCapture(source, name, "target", dtype, prompts=texts, selection=chosen, **options)
        )

    run("fp32", "float32", teacher=None)
    run("bf16", "bfloat16")
    run("sum", "bfloat16", replicate=Replicate("summation"))
    assert compare(trace, ComparisonRequest("fp32", "sum", "bf16")).verdict == "pass"
    prompts = teacher_prompts(trace.manifest("fp32"))
    for name, fault in FAULTS.items():
        model = load_model(source, torch.bfloat16)
        assert fault(model)
        run_recorded(
            trace, model, HuggingFaceCausalModel(model), prompts, Generation(), run=name.replace(" ", "-"),
            role="target", stack="hf", model_name="broken", selection=Selection(exclude=("*experts*",)), facts={},
        )  # fmt: skip
        request = ComparisonRequest("fp32", name.replace(" ", "-"), "bf16")
        assert compare(trace, request).verdict == "fail", name
        first = trace.query(
            "SELECT arg_min(site, exec_order) AS site FROM measurements "
            "WHERE comparison = ? AND verdict = 'fail' AND prompt IS NULL",
            [request.comparison],
        ).to_pylist()
        assert first[0]["site"].startswith("model.layers.0.mlp"), name
