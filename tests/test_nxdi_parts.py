"""The parts of NxD Inference capture that need no sources: plans, hooks, padding, weights, ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorsleuth.capture.generate import Generation, run_batch
from tensorsleuth.capture.layout import Row, StepLayout
from tensorsleuth.capture.nxdi.adapter import NxdiCausalModel
from tensorsleuth.capture.nxdi.application import check_keys, loaded_by_another_name
from tensorsleuth.capture.nxdi.captured import CapturedTensorHook
from tensorsleuth.capture.nxdi.device_plan import plan_device_capture
from tensorsleuth.capture.nxdi.device_run import CompiledPasses, compiled_pass, dims_by_name
from tensorsleuth.capture.nxdi.job import RankJob
from tensorsleuth.capture.nxdi.port import load_class, parse_class
from tensorsleuth.capture.nxdi.ranks import RankGroup
from tensorsleuth.capture.nxdi.run import length_for
from tensorsleuth.capture.pending import PendingTensor
from tensorsleuth.capture.prompts import EncodedPrompt
from tensorsleuth.capture.selection import Selection
from tensorsleuth.store import CaptureError, InputError, TensorKey

MODULES = {
    "": "NeuronXModel",
    "layers": "ModuleList",
    **{
        f"layers.{layer}{name}": kind
        for layer in range(11)
        for name, kind in {
            "": "NeuronXDecoderLayer",
            ".self_attn": "NeuronXAttention",
            ".self_attn.qkv_proj": "GroupQueryAttention_QKV",
            ".self_attn.qkv_proj.q_proj": "ColumnParallelLinear",
            ".self_attn.qkv_proj.k_proj": "ColumnParallelLinear",
            ".self_attn.qkv_proj.v_proj": "ColumnParallelLinear",
            ".self_attn.o_proj": "GroupQueryAttention_O",
            ".self_attn.rotary_emb": "RotaryEmbedding",
            ".self_attn.rank_util": "SPMDRank",
            ".mlp.router": "RouterTopK",
            ".mlp.router.linear_router": "Linear",
        }.items()
    },
    "lm_head": "ColumnParallelLinear",
}
PREFILL = StepLayout("prefill", 0, 2, 8, (Row(0, 0, 0, 5, 0), Row(1, 1, 0, 3, 0)))


@pytest.mark.parametrize("name", ["torch_dtype", "tp_degree", "batch_size", "max_context_length"])
def test_compile_passes_that_differ_in_more_than_their_sites_are_refused(name: str, tmp_path: Path) -> None:
    class Compiled:
        def __init__(self, folder: str) -> None:
            self.neuron_config = SimpleNamespace(
                tensor_capture_config=SimpleNamespace(modules_to_capture=["norm"], capture_inputs=False),
                on_device_sampling_config=object(), torch_dtype=torch.bfloat16, tp_degree=2, batch_size=1,
                max_context_length=64, is_continuous_batching=False,
            )  # fmt: skip
            if folder.endswith("second"):
                setattr(self.neuron_config, name, "another")

        def load(self, folder: str) -> None:
            pass

    passes = iter(CompiledPasses(Compiled, [tmp_path / "first", tmp_path / "second"], 0))
    next(passes)
    with pytest.raises(InputError, match=f"second was compiled with {name}=another"):
        next(passes)


def test_globs_become_exact_names_and_broken_choices_working_ones() -> None:
    plan = plan_device_capture(MODULES, Selection(include=("layers.*",), layers=frozenset({1, 10})))
    (only,) = plan.passes
    assert set(only.modules) <= set(MODULES)
    assert len(set(only.modules)) == len(only.modules)
    assert not [name for name in only.modules if name.endswith(("self_attn", "qkv_proj", ".router", "rank_util"))]
    assert {"layers.1.self_attn.o_proj", "layers.10.mlp.router.linear_router"} <= set(only.modules)
    assert "layers.1.self_attn.rotary_emb" not in only.modules
    assert any("self_attn: replaced by" in note and "cosine" in note for note in plan.notes)
    assert any("qkv_proj: replaced by" in note and "k_proj" in note for note in plan.notes)


def test_a_budget_splits_the_capture_into_passes() -> None:
    everything = plan_device_capture(MODULES, Selection(), budget=10_000).passes[0].modules
    split = plan_device_capture(MODULES, Selection(inputs=True), budget=21).passes
    assert [name for part in split for name in part.modules] == list(everything)
    assert all(part.n_outputs <= 21 for part in split)
    assert split[0].slots()[:2] == ((everything[0], "output"), (everything[0], "input"))


def test_a_plan_brings_the_sampling_that_capture_needs() -> None:
    (only,) = plan_device_capture(MODULES, Selection(include=("lm_head",))).passes
    options = only.neuron_options()
    assert options["tensor_capture_config"] == {"modules_to_capture": ["lm_head"], "capture_inputs": False}
    assert options["output_logits"]
    assert options["on_device_sampling_config"]


def test_a_plan_without_modules_or_budget_is_refused() -> None:
    with pytest.raises(InputError, match="no module is selected"):
        plan_device_capture(MODULES, Selection(include=("nothing",)))
    with pytest.raises(InputError, match="carries no module"):
        plan_device_capture(MODULES, Selection(inputs=True), budget=1)


def test_a_model_compiled_without_capture_is_refused() -> None:
    with pytest.raises(InputError, match="compiled without tensor capture"):
        compiled_pass(SimpleNamespace(tensor_capture_config=None))
    capture = SimpleNamespace(modules_to_capture=["a"], capture_inputs=True)
    with pytest.raises(InputError, match="without on-device sampling"):
        compiled_pass(SimpleNamespace(tensor_capture_config=capture, on_device_sampling_config=None))
    found = compiled_pass(SimpleNamespace(tensor_capture_config=capture, on_device_sampling_config=object()))
    assert found.slots() == (("a", "output"), ("a", "input"))


class Sink:
    """Keeps what a recorder hands over."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str, str, int | None], tuple[TensorKey, torch.Tensor]] = {}

    def put(self, key: TensorKey, source: PendingTensor) -> None:
        with source.values() as array:
            self.kept[key.module, key.port, key.slot, key.prompt] = key, torch.from_numpy(array.copy())

    def flush(self) -> None:
        """Nothing waits."""


def test_captured_tensors_are_stored_by_prompt_without_padding() -> None:
    sink = Sink()
    hook = CapturedTensorHook([("mlp.up_proj", "output"), ("norm", "output")], sink, dims_by_name(2))
    up = torch.arange(2 * 8 * 3.0).reshape(2, 8, 3)
    nothing, unused = torch.zeros(1, dtype=torch.bfloat16), torch.full((1,), torch.nan, dtype=torch.bfloat16)
    with hook.step(PREFILL):
        hook(None, [up, nothing, torch.ones(2, 8, 1), unused])
    key, values = sink.kept["mlp.up_proj", "output", "", 1]
    assert (key.phase, key.dims, key.position_start, key.position_count) == ("prefill", "b s h[tp]", 0, 3)
    assert torch.equal(values, up[1:2, :3])
    assert sink.kept["registered", "output", "0", 0][1].shape == (1, 5, 1)
    assert ("registered", "1") not in {(module, slot) for module, _, slot, _ in sink.kept}
    assert hook.skipped == {"norm": "the module produced nothing: it was not called, or capture was off for this step"}


def test_an_application_that_returns_no_captures_is_an_error() -> None:
    hook = CapturedTensorHook([("norm", "output")], Sink(), dims_by_name(1))
    with pytest.raises(CaptureError, match="returned no captured tensors"), hook.step(PREFILL):
        pass
    with pytest.raises(CaptureError, match="compiled with another list"), hook.step(PREFILL):
        hook(None, [])


class Echo:
    """An application that predicts the sum of what it was fed, and notes its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.n_resets = 0

    def reset(self) -> None:
        self.n_resets += 1

    def __call__(self, ids: torch.Tensor, **arguments: Any) -> SimpleNamespace:
        self.calls.append({"ids": ids, **arguments})
        logits = torch.zeros(len(ids), 1, 16)
        logits[:, 0, 3] = 1
        return SimpleNamespace(logits=logits)


class Layouts:
    """Notes the layouts it is told."""

    def __init__(self) -> None:
        self.cache_rows: dict[int, int] = {}
        self.seen: list[StepLayout] = []

    def step(self, layout: StepLayout) -> AbstractContextManager[None]:
        self.seen.append(layout)
        return nullcontext()


PAIR = [EncodedPrompt("a", None, (5, 6, 7)), EncodedPrompt("b", None, (8,))]


def test_prompts_are_padded_on_the_right_and_layouts_to_the_bucket() -> None:
    application, layouts = Echo(), Layouts()
    drive = NxdiCausalModel(application, batch=3, length=8, pad_token=9, one_by_one=False, recorders=[layouts])
    generation = Generation(new_tokens=2, padding="right", pad_token=9)
    assert run_batch(drive, PAIR, 4, generation, drive.step) == [(3, 3), (3, 3)]
    prefill, decode = application.calls
    assert prefill["ids"].tolist() == [[5, 6, 7], [8, 9, 9], [5, 6, 7]]
    assert prefill["position_ids"].tolist() == [[0, 1, 2], [0, 1, 1], [0, 1, 2]]
    assert decode["attention_mask"] is None
    assert decode["position_ids"].tolist() == [[3], [1], [3]]
    assert [(layout.batch, layout.length, len(layout.rows)) for layout in layouts.seen] == [(3, 8, 2), (3, 1, 2)]
    assert layouts.cache_rows == {4: 0, 5: 1}
    assert application.n_resets == 1


def test_prompts_are_prefilled_one_by_one_with_continuous_batching() -> None:
    application, layouts = Echo(), Layouts()
    drive = NxdiCausalModel(application, batch=2, length=8, pad_token=0, one_by_one=True, recorders=[layouts])
    run_batch(drive, PAIR, 0, Generation(new_tokens=2, padding="right"), drive.step)
    assert [call["seq_ids"].tolist() for call in application.calls] == [[0], [1], [0, 1]]
    assert [layout.rows[0].prompt for layout in layouts.seen[:2]] == [0, 1]
    assert [layout.batch for layout in layouts.seen] == [1, 1, 2]


def test_a_prompt_longer_than_the_bucket_is_refused() -> None:
    drive = NxdiCausalModel(Echo(), batch=2, length=2, pad_token=0, one_by_one=False)
    with pytest.raises(InputError, match="3 tokens does not fit a prefill of 2"):
        run_batch(drive, PAIR, 0, Generation(padding="right"), lambda _: nullcontext())


def test_missing_and_unexpected_weights_are_listed_and_caches_are_not() -> None:
    check_keys({"a", "kv_mgr.past.0"}, {"a"}, "Model")
    with pytest.raises(InputError, match=r"1 missing \(a\); 2 unexpected \(b, c\)"):
        check_keys({"a"}, {"b", "c"}, "Model")


def test_a_port_is_named_by_file_and_class(tmp_path: Path) -> None:
    package = tmp_path / "my_neuron_port"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "sizes.py").write_text("WIDTH = 3\n")
    file = package / "modeling.py"
    file.write_text("from .sizes import WIDTH\nclass Model:\n    width = WIDTH\n")
    assert load_class(parse_class(f"{file}:Model")).width == 3
    with pytest.raises(InputError, match="defines no class Other; its classes: Model"):
        load_class(parse_class(f"{file}:Other"))
    (package / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(InputError, match="cannot be imported: ModuleNotFoundError"):
        load_class(parse_class(f"{package / 'broken.py'}:Model"))
    for text in ("Model", "x.py:", ":Model", "missing.py:Model"):
        with pytest.raises(InputError, match=r"write FILE:CLASS|does not exist"):
            parse_class(text)


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    job = RankJob(
        "model",
        "p:C",
        "",
        "rendezvous",
        "folder",
        "run",
        "float32",
        2,
        64,
        (EncodedPrompt("a", None, (1, 2), (3,)), EncodedPrompt("b", "text", (4,))),
        Generation(new_tokens=3, stop_tokens=frozenset({2, 1}), padding="right"),
        Selection(("a*",), ("b",), frozenset({3}), range(4, 9), True),
        options={"fused_qkv": True},
    )
    job.write(tmp_path / "job.json")
    assert RankJob.read(tmp_path / "job.json") == job


RANK = """
import os, sys, time
rank, events, parent = sys.argv[1:]
os.write(int(events), b'{"kind": "ready"}\\n')
line = sys.stdin.readline().strip()
if rank == line:
    print("it went wrong", flush=True)
    sys.exit(3)
time.sleep(0 if line == "all" else 600)
"""


def group(tmp_path: Path) -> RankGroup:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    return RankGroup([sys.executable, str(script)], 3, tmp_path, {})


def alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("line", ["all", "1"])
def test_ranks_end_together(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorsleuth.capture.nxdi.ranks.GRACE_SECONDS", 0.5)
    ready: list[int] = []
    with group(tmp_path) as ranks:

        def on_event(rank: int, event: dict[str, Any]) -> None:
            ready.append(rank)
            if len(ready) == 3:
                ranks.tell(line)

        codes = ranks.run(on_event)
    assert sorted(ready) == [0, 1, 2]
    assert codes == ([0, 0, 0] if line == "all" else [-9, 3, -9])
    assert not any(alive(rank.process.pid) for rank in ranks.ranks)


def test_an_interrupted_parent_leaves_no_rank_behind(tmp_path: Path) -> None:
    def interrupt(rank: int, event: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), group(tmp_path) as ranks:
        ranks.run(interrupt)
    assert not any(alive(rank.process.pid) for rank in ranks.ranks)


@pytest.mark.skipif(sys.platform != "linux", reason="only the Linux kernel ends children with their parent")
def test_a_killed_parent_takes_its_ranks_with_it(tmp_path: Path) -> None:
    code = f"""
import os, sys, subprocess, time
child = (
    "import sys; from tensorsleuth.capture.nxdi.ranks import Parent;"
    "Parent(1, int(sys.argv[1])); print(1, flush=True); import time; time.sleep(600)"
)
process = subprocess.Popen([sys.executable, "-c", child, str(os.getpid())], stdout=subprocess.PIPE)
process.stdout.readline()
open({str(tmp_path / "pid")!r}, "w").write(str(process.pid))
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
    assert os.getpid() != pid


def test_a_module_that_is_used_in_two_places_needs_its_weight_once() -> None:
    model = torch.nn.Module()
    model.norm, model.other = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)
    model.experts = torch.nn.ModuleDict({"norm": model.norm})
    expected = model.to(torch.bfloat16).state_dict()
    assert loaded_by_another_name(expected, {"norm.weight": torch.ones(4)}) == {"experts.norm.weight"}


def test_the_prefill_bucket_holds_a_sliding_window() -> None:
    prompts, generation = [EncodedPrompt("a", None, (5,) * 60)], Generation(new_tokens=5)
    assert length_for(prompts, generation, SimpleNamespace(sliding_window=None)) == 128
    assert length_for(prompts[:1], generation, SimpleNamespace(sliding_window=130)) == 192
    assert length_for([EncodedPrompt("a", None, (5,))], generation, SimpleNamespace()) == 64
