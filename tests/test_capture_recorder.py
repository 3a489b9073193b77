"""Which tensors a recorder finds, what it calls them, and what it leaves behind."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorsleuth.capture.layout import Row, StepLayout
from tensorsleuth.capture.recorder import record
from tensorsleuth.capture.selection import Selection, parse_layers, parse_positions
from tensorsleuth.store import InputError, Prompt, RunExistsError, Trace, repair, site_name, verify
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Nested:
    value: Tensor
    label: str
    nothing: None = None


class Containers(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {
            "tuple": (x, [x + 1, None, 3]),
            "named": Pair(x + 2, x + 3),
            "dataclass": Nested(x + 4, "text"),
            "output": BaseModelOutput(last_hidden_state=x + 5, hidden_states=(x + 6, x + 7)),
            "../../etc/passwd\x00": x + 8,
            "cache": object(),
        }


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
        y = self.attention(x) * scale + self.mlp(x)
        return y if bias is None else y + bias


class Network(nn.Module):
    def __init__(self, n_layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(Block() for _ in range(n_layers))
        self.head = nn.Linear(4, 10, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, bias=torch.ones(4, dtype=x.dtype))
        return self.head(x)


IDS = torch.tensor([[1, 2, 3]])


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def sites(trace: Trace, read: Any, where: str = "phase != 'static'") -> list[str]:
    return [
        site_name(*(tensor.row[column] for column in ("module", "port", "slot", "call")))
        for tensor in read(trace, where)
    ]


def test_tensors_are_found_in_nested_containers_and_named_by_their_way(trace: Trace, read: Any) -> None:
    model = Containers()
    with record(trace, model, run="run", role="reference"):
        model(torch.zeros(2))
    slots = {tensor.row["slot"]: float(tensor.values[0]) for tensor in read(trace)}
    assert slots == {
        "tuple.0": 0,
        "tuple.1.0": 1,
        "named.left": 2,
        "named.right": 3,
        "dataclass.value": 4,
        "output.last_hidden_state": 5,
        "output.hidden_states.0": 6,
        "output.hidden_states.1": 7,
        "../../etc/passwd\x00": 8,
    }
    assert verify(trace).problems == ()


def test_outputs_come_in_execution_order_and_repeated_forwards_are_steps(trace: Trace, read: Any) -> None:
    model = Network(1)
    with torch.no_grad(), record(trace, model, run="run", role="reference"):
        model(IDS)
        model(IDS + 1)
    rows = [tensor.row for tensor in read(trace, "phase != 'static'")]
    order = ["embedding", "layers.0.attention", "layers.0.mlp", "layers.0", "head", ""]
    assert [row["module"] for row in rows] == order * 2
    assert [row["exec_order"] for row in rows] == [0, 1, 2, 3, 4, 5] * 2
    assert [(row["phase"], row["step"], row["prompt"]) for row in rows] == [("forward", n // 6, 0) for n in range(12)]
    modules = {row["path"]: row for row in trace.query("SELECT * FROM modules").to_pylist()}
    assert modules["layers.0.mlp"] | {"run": None} == {
        "run": None,
        "path": "layers.0.mlp",
        "class": "Linear",
        "parent": "layers.0",
        "depth": 3,
        "exec_order": 2,
        "n_parameters": 20,
    }
    assert (modules[""]["parent"], modules[""]["depth"], modules["layers"]["exec_order"]) == (None, 0, -1)


def test_a_shared_module_is_recorded_once_per_call_and_calls_are_counted(trace: Trace, read: Any) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(self.first(x)))

    model = Shared()
    with torch.no_grad(), record(trace, model, run="run", role="reference"):
        model(torch.ones(1, 2))
        model(torch.ones(1, 2))
    assert sites(trace, read) == ["first", "first#1", "first#2", "(root)"] * 2
    assert sites(trace, read, "phase = 'static'") == ["first:parameter[weight]", "first:parameter[bias]"]


def test_a_recursive_module_gets_its_own_output_per_call(trace: Trace, read: Any) -> None:
    class Countdown(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return x + n if n == 0 else self(x, n - 1) + n

    model = nn.ModuleDict({"countdown": Countdown()})
    with record(trace, model, run="run", role="reference"):
        model["countdown"](torch.zeros(1), 2)
    found = [(tensor.row["call"], tensor.row["step"], float(tensor.values[0])) for tensor in read(trace)]
    assert found == [(2, 0, 0.0), (1, 0, 1.0), (0, 0, 3.0)]


def test_inputs_are_recorded_under_their_own_port_with_keyword_names(trace: Trace, read: Any) -> None:
    model = Network(1)
    with torch.no_grad(), record(trace, model, run="run", role="reference", selection=Selection(inputs=True)):
        model(IDS)
    found = sites(trace, read)
    assert found[:4] == ["(root):input", "embedding:input", "embedding", "layers.0:input[0]"]
    assert found[4:] == [
        "layers.0:input[bias]",
        "layers.0.attention:input",
        "layers.0.attention",
        "layers.0.mlp:input",
        "layers.0.mlp",
        "layers.0",
        "head:input",
        "head",
        "(root)",
    ]
    by_site = dict(zip(found, read(trace, "phase != 'static'"), strict=True))
    np.testing.assert_array_equal(by_site["head:input"].values, by_site["layers.0"].values)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(include=("*mlp",)), ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]),
        (Selection(include=("layers.*",), exclude=("*.mlp", "*.attention")), ["layers.0", "layers.1", "layers.2"]),
        (Selection(include=("",)), ["(root)"]),
        (Selection(layers=frozenset({1}), exclude=("layers.?.*",)), ["embedding", "layers.1", "head", "(root)"]),
        (Selection(include=("layers.*",), layers=parse_layers("0,2"), exclude=("*.*.*",)), ["layers.0", "layers.2"]),
    ],
)
def test_selections_keep_modules(trace: Trace, read: Any, selection: Selection, expected: list[str]) -> None:
    model = Network()
    with torch.no_grad(), record(trace, model, run="run", role="reference", selection=selection):
        model(IDS)
    assert sites(trace, read) == expected
    static = {tensor.row["module"] for tensor in read(trace, "phase = 'static'")}
    assert static <= {"" if site == "(root)" else site for site in expected}


def test_layer_and_position_texts() -> None:
    assert parse_layers("0-3, 7") == {0, 1, 2, 3, 7}
    assert parse_positions("16-31") == range(16, 32)
    assert parse_positions("5") == range(5, 6)
    for text in ("", "a", "3-1", "1,,2", "-1"):
        with pytest.raises(InputError):
            parse_layers(text)
        with pytest.raises(InputError):
            parse_positions(text)


def test_positions_keep_only_some_tokens_and_a_copy_of_them(trace: Trace, read: Any) -> None:
    model = Network(1)
    layout = StepLayout("prefill", 0, 1, 3, (Row(0, 0, 0, 3, 0),))
    selection = Selection(positions=range(1, 2), include=("embedding",))
    with (
        torch.no_grad(),
        record(trace, model, run="run", role="reference", selection=selection) as recorder,
        recorder.step(layout),
    ):
        model(IDS)
    (tensor,) = read(trace, "phase = 'prefill'")
    assert (tensor.row["position_start"], tensor.row["position_count"]) == (1, 1)
    np.testing.assert_array_equal(tensor.values, model.embedding(IDS)[:, 1:2].detach())


def test_statistics_only_stores_no_values(trace: Trace) -> None:
    model = Network(1)
    for run, statistics_only in (("full", False), ("light", True)):
        with torch.no_grad(), record(trace, model, run=run, role="reference", statistics_only=statistics_only):
            model(IDS)
    columns = "module, port, slot, dtype, shape, nbytes, checksum, mean, std, min, max, absmax, n_nan, n_zero"
    rows = [trace.query(f"SELECT {columns} FROM tensors WHERE run = '{run}' ORDER BY seq") for run in ("full", "light")]
    assert rows[0].equals(rows[1])
    assert trace.manifest("light").provenance["captured"]["stored_nbytes"] == 0
    (tensor_id,) = trace.query("SELECT min(tensor_id) FROM tensors WHERE run = 'light'").column(0).to_pylist()
    with pytest.raises(InputError, match="statistics only; capture the run with values"):
        trace.tensor(tensor_id)
    assert verify(trace).problems == ()


def test_small_parameters_and_buffers_are_kept_and_large_ones_are_not(trace: Trace, read: Any) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 100_000)).eval()
    with torch.no_grad(), record(trace, model, run="run", role="reference"):
        pass
    assert sites(trace, read, "phase = 'static'") == [
        "0:parameter[weight]",
        "0:parameter[bias]",
        "0:buffer[running_mean]",
        "0:buffer[running_var]",
        "0:buffer[num_batches_tracked]",
        "1:parameter[bias]",
    ]


def test_hooks_are_gone_after_the_block_and_the_users_own_stay(trace: Trace) -> None:
    model = Network(1)
    seen: list[str] = []
    model.head.register_forward_hook(lambda *_: seen.append("head"))
    for run in ("first", "second"):
        with torch.no_grad(), record(trace, model, run=run, role="reference"):
            assert hooks_of(model) > 1
            model(IDS)
        assert hooks_of(model) == 1
    assert seen == ["head", "head"]
    sums = trace.query("SELECT run, count(*), string_agg(checksum, ',' ORDER BY seq) FROM tensors GROUP BY run")
    (_, n_first, first), (_, n_second, second) = (tuple(row.values()) for row in sums.to_pylist())
    assert (n_first, first) == (n_second, second)
    assert [trace.manifest(run).ordinal for run in trace.run_names()] == [1, 2]


def test_a_module_that_raises_leaves_a_failed_run_with_what_came_before(trace: Trace, read: Any) -> None:
    class Fails(nn.Module):
        broken = True

        def forward(self, x: Tensor) -> Tensor:
            if self.broken:
                raise ArithmeticError("no such luck")
            return x

    model = nn.Sequential(nn.Linear(4, 4), Fails(), nn.Linear(4, 4))
    with (
        pytest.raises(ArithmeticError, match="no such luck"),
        torch.no_grad(),
        record(trace, model, run="run", role="reference"),
    ):
        model(torch.ones(2, 4))
    assert hooks_of(model) == 0
    assert trace.manifest("run").status == "failed"
    assert trace.query("SELECT status FROM runs").column(0).to_pylist() == ["failed"]
    assert sites(trace, read) == ["0"]
    assert verify(trace).problems == ()
    assert repair(trace) == []
    assert trace.manifest("run").status == "failed"
    model[1].broken = False
    with torch.no_grad(), record(trace, model, run="again", role="reference"):
        model(torch.ones(2, 4))
    assert sites(trace, read, "run = 'again' AND phase != 'static'") == ["0", "1", "2", "(root)"]


def test_a_module_whose_exception_the_model_catches_keeps_its_calls_apart(trace: Trace, read: Any) -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if float(x[0]) < 0:
                raise ValueError("negative")
            return x * 2

    class Retries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.picky = Picky()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.picky(-x)
            except ValueError:
                return self.picky(x)

    model = Retries()
    with record(trace, model, run="run", role="reference"):
        model(torch.ones(1))
    assert sites(trace, read) == ["picky#1", "(root)"]


def test_calling_a_part_of_the_model_is_recorded_too(trace: Trace, read: Any) -> None:
    model = Network(1)
    with torch.no_grad(), record(trace, model, run="run", role="reference"):
        model.head(torch.ones(1, 4))
    (tensor,) = read(trace, "phase != 'static'")
    assert (tensor.row["module"], tensor.row["step"]) == ("head", 0)


def test_module_names_that_look_like_paths_write_nothing_outside_the_trace(trace: Trace, tmp_path: Path) -> None:
    model = nn.Module()
    names = (
        "/etc/x",
        "a/b",
        "nul\x00byte",
        "new\nline",
        "..\\w",
        "ü" * 200,
        "x" * 5000,
        "\u2028",
        "'; DROP TABLE runs",
    )
    for name in names:
        model._modules[name] = nn.Identity()
    outside = {path for path in tmp_path.rglob("*") if trace.path not in path.parents}
    with record(trace, model, run="run", role="reference"):
        for module in list(model.children()):
            module(torch.ones(1))
    assert {path for path in tmp_path.rglob("*") if trace.path not in path.parents} == outside
    assert {path.name for path in trace.run_folder("run").iterdir()} == {"run.json", "rank0-0.h5"}
    rows = trace.query("SELECT module, alias FROM tensors ORDER BY seq").to_pylist()
    assert [row["module"] for row in rows] == list(names)
    assert verify(trace).problems == ()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", ".hidden", "x" * 65, "a\x00b", "a\n", "-x", "ü"])
def test_run_names_that_are_no_plain_names_are_refused(trace: Trace, name: str) -> None:
    before = sorted(trace.path.rglob("*"))
    model = nn.Identity()
    with pytest.raises(InputError, match="run name"), record(trace, model, run=name, role="reference"):
        model(torch.ones(1))
    assert sorted(trace.path.rglob("*")) == before


def test_unknown_roles_and_taken_names_are_refused(trace: Trace) -> None:
    model = nn.Identity()
    with pytest.raises(InputError, match="role 'teacher' is unknown"), record(trace, model, run="a", role="teacher"):
        pass
    with record(trace, model, run="a", role="target"):
        pass
    with pytest.raises(RunExistsError, match="already has a run 'a'"), record(trace, model, run="a", role="target"):
        pass


def test_provenance_tells_where_a_run_came_from(trace: Trace) -> None:
    model = Network(1).to(torch.bfloat16)
    facts: dict[str, Any] = {"mine": 1}
    with (
        torch.no_grad(),
        record(
            trace,
            model,
            run="run",
            role="baseline",
            model_name="tiny",
            prompts=[Prompt(0, "p", None, 3)],
            provenance=facts,
        ),
    ):
        facts["later"] = 2
        model(IDS)
    manifest = trace.manifest("run")
    assert (manifest.role, manifest.model, manifest.dtype, manifest.device) == ("baseline", "tiny", "bfloat16", "cpu")
    assert {"mine", "later", "torch_threads", "host", "git", "weights_fingerprint"} <= set(manifest.provenance)
    assert manifest.provenance["captured"]["n_tensors"] == 12
    assert manifest.prompts == (Prompt(0, "p", None, 3),)


def test_equal_weights_have_equal_fingerprints_and_others_do_not(trace: Trace) -> None:
    model = Network(1)
    prints = []
    for run in ("a", "b", "c"):
        with record(trace, model, run=run, role="reference"):
            pass
        prints.append(trace.manifest(run).provenance["weights_fingerprint"])
        if run == "b":
            model.head.weight.data[0, 0] += 1
    assert prints[0] == prints[1] != prints[2]


def test_equal_views_share_their_bytes(trace: Trace, read: Any) -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(4, 4))
    with torch.no_grad(), record(trace, model, run="run", role="reference"):
        model(torch.arange(8.0).reshape(2, 4))
    first, second, last, root = read(trace, "phase != 'static'")
    assert not first.row["alias"]
    assert second.row["alias"]
    assert root.row["alias"]
    assert (first.row["dataset"], first.row["file_offset"]) == (second.row["dataset"], second.row["file_offset"])
    assert last.row["file_offset"] == root.row["file_offset"]
    captured = trace.manifest("run").provenance["captured"]
    assert captured["stored_nbytes"] == captured["nbytes"] - 2 * 8 * 4
