"""component_mapping.json: written, read back, overriding; the commands that take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_runs import Array, Tensor, add_run
from tensorsleuth.analyze.align import match_prompts
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.analyze.component_export import export_components
from tensorsleuth.analyze.component_mapping import read_component_mapping
from tensorsleuth.analyze.matching import MappedRuns, map_runs
from tensorsleuth.analyze.pairs import SiteMapping
from tensorsleuth.cli.app import main
from tensorsleuth.store import InputError, Trace

TOKENS = {0: list(range(12))}
LAYERS, P = 8, 11


def signal(seed: int, width: int = 16) -> Array:
    return np.random.default_rng(seed).standard_normal((1, P, width)).astype(np.float32)


def sites(layer: int) -> dict[str, Array]:
    """A layer of the reference; every fourth has no rotary scaling."""
    names = {"q_proj": 16, "k_proj": 4, "v_proj": 4, "o_proj": 16}
    found = {
        f"model.layers.{layer}.self_attn.{n}": signal(100 * layer + i, w) for i, (n, w) in enumerate(names.items())
    }
    if layer % 4 != 3:
        found[f"model.layers.{layer}.qk_norm"] = signal(100 * layer + 9)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A reference and a target with a fused projection in every layer."""
    trace = Trace.create(tmp_path_factory.mktemp("model") / "trace")
    reference = {name: values for layer in range(LAYERS) for name, values in sites(layer).items()}
    target: dict[str, Array] = {}
    for name, values in reference.items():
        layer = name.split(".")[2]
        if name.endswith("v_proj"):
            parts = [reference[name.replace("v_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            target[f"layers.{layer}.self_attn.qkv_proj.Wqkv"] = np.concatenate(parts, 2)
        elif name.endswith("o_proj"):
            target[f"layers.{layer}.self_attn.o_proj.o_proj"] = target[f"layers.{layer}.self_attn.o_proj"] = values
        elif name.endswith("qk_norm"):
            target[f"layers.{layer}.qk_norm"] = values
    target["spmd_rank"] = signal(7, 3)
    record(trace, "r", reference, modules=["model.layers.9.self_attn.q_proj"])
    record(trace, "t", target, modules=["layers.9.self_attn.qkv_proj.Wqkv"])
    return trace


def record(trace: Trace, run: str, values: dict[str, Array], **options: Any) -> None:
    tensors = [Tensor(name, array, order=place) for place, (name, array) in enumerate(values.items())]
    add_run(trace, run, tensors, tokens=TOKENS, **options)


def mapped(trace: Trace, file: Path | None = None) -> MappedRuns:
    return map_runs(trace, ("r", None, "t"), match_prompts(trace, "r", None, "t"), file=file)


def write(folder: Path, *entries: object, **more: object) -> Path:
    path = folder / "component_mapping.json"
    path.write_text(json.dumps({"mapping_size": len(entries), "component_mapping": entries, **more}))
    return path


def pairs(mapping: SiteMapping) -> set[tuple[str, str, str]]:
    return {(p.reference.name, p.target.name, f"{p.columns}{p.reference_columns}") for p in mapping.pairs}


def test_layers_that_agree_are_written_once(model: Trace) -> None:
    found = mapped(model)
    body = export_components(found.mapping, found.reference, found.target)
    attention, target = "model.layers.{i}.self_attn.", "layers.{i}.self_attn."
    assert body["component_mapping"] == [
        [[f"{attention}o_proj"], [f"{target}o_proj.o_proj"]],
        [[f"{attention}o_proj"], [f"{target}o_proj"]],
        [["model.layers.{j}.qk_norm"], ["layers.{j}.qk_norm"]],
        [[f"{attention}{name}_proj" for name in "qkv"], [f"{target}qkv_proj.Wqkv"]],
        [[], ["spmd_rank"]],
    ]
    assert body["mapping_size"] == 5
    assert body["variables"] == {"i": {"range": [0, 7]}, "j": {"range": [0, 6], "except": [3]}}
    assert body["reasoning"][3] == "qkv_proj.Wqkv concatenates q_proj, k_proj, v_proj"
    assert "transforms" not in body


def test_what_was_written_reads_back_as_the_same_pairs(model: Trace, tmp_path: Path) -> None:
    found = mapped(model)
    path = tmp_path / "mapping.json"
    path.write_text(json.dumps(export_components(found.mapping, found.reference, found.target)))
    again = mapped(model, path).mapping
    assert pairs(again) == pairs(found.mapping)
    assert (again.origin, again.gaps) == ("mapping.json", found.mapping.gaps)
    assert {pair.score for pair in again.pairs} == {1.0}


def test_a_layer_that_differs_is_written_by_itself(trace: Trace, tmp_path: Path) -> None:
    record(trace, "r", {f"layers.{i}.mlp": signal(i) for i in range(4)})
    record(trace, "t", {f"layers.{i}.{'ffn' if i == 2 else 'mlp'}": signal(i) for i in range(4)})
    found = mapped(trace)
    body = export_components(found.mapping, found.reference, found.target)
    assert body["component_mapping"] == [
        [["layers.{i}.mlp"], ["layers.{i}.mlp"]],
        [["layers.2.mlp"], ["layers.2.ffn"]],
    ]
    assert body["variables"] == {"i": {"range": [0, 3], "except": [2]}}


def test_a_rearrangement_survives_the_file(trace: Trace, tmp_path: Path) -> None:
    record(trace, "r", {"q": signal(1), "qkv": signal(2)})
    swapped = signal(1).reshape(1, P, 2, 8)[:, :, ::-1].reshape(1, P, 16)
    record(trace, "t", {"x": swapped, "a": signal(2)[:, :, :8], "b": signal(2)[:, :, 8:]})
    found = mapped(trace)
    body = export_components(found.mapping, found.reference, found.target)
    assert body["transforms"] == [{"target": [[8, 16], [0, 8]]}, None]
    assert body["component_mapping"][1] == [["qkv"], ["a", "b"]]
    path = write(tmp_path, *body["component_mapping"], transforms=body["transforms"])
    assert pairs(mapped(trace, path).mapping) == pairs(found.mapping)


@pytest.mark.parametrize(
    ("variable", "values"),
    [
        ([1, 4], [1, 4]),
        ("0..2", [0, 1, 2]),
        ({"range": [0, 3]}, [0, 1, 2, 3]),
        ({"range": [0, 4], "except": [2]}, [0, 1, 3, 4]),
        ({"range": [0, 7], "except": {"every": 4, "from": 3}}, [0, 1, 2, 4, 5, 6]),
    ],
)
def test_variables_may_leave_layers_out(tmp_path: Path, variable: object, values: list[int]) -> None:
    path = write(tmp_path, [["a.{i}.q", "a.{i}.k"], ["b.{i}"]], variables={"i": variable}, reasoning=["fused in {i}"])
    components = read_component_mapping(path).components
    assert [component.sources for component in components] == [(f"a.{i}.q", f"a.{i}.k") for i in values]
    assert components[0].reasoning == f"fused in {values[0]}"


def test_the_users_pairs_override_those_that_were_found(model: Trace, tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [["model.layers.0.self_attn.o_proj"], ["layers.1.self_attn.o_proj"]],
        [["model.layers.2.qk_norm"], []],
        reasoning=["a whim", "the port folds it into the weights"],
    )
    mapping = mapped(model, path).mapping
    targets = {p.target.name: p.reason for p in mapping.pairs if p.reference.name == "model.layers.0.self_attn.o_proj"}
    assert targets == {"layers.1.self_attn.o_proj": "component_mapping.json: a whim; its values differ"}
    assert [(g.site.name, g.status) for g in mapping.gaps] == [("model.layers.2.qk_norm", "skipped")]
    assert "the port folds it into the weights" in mapping.gaps[0].reason
    others = {p.target.name for p in mapping.pairs if p.reference.name == "model.layers.1.self_attn.o_proj"}
    assert others == {"layers.1.self_attn.o_proj.o_proj"}


def test_modules_that_were_not_recorded_are_no_error(model: Trace, tmp_path: Path) -> None:
    path = write(tmp_path, [["model.layers.9.self_attn.q_proj"], ["layers.9.self_attn.qkv_proj.Wqkv"]])
    assert pairs(mapped(model, path).mapping) == pairs(mapped(model).mapping)


@pytest.mark.parametrize(
    ("entries", "more", "message"),
    [
        ([[["model.layers.8.self_attn.q_proj"], ["spmd_rank"]]], {}, "run 'r' has no module 'model.layers.8"),
        ([[["model.layers.0.qk_norm"], ["layers.0.qk_nrm"]]], {}, "'layers.0.qk_nrm'; close ones: layers.0.qk_norm"),
        ([[["model.layers.0.qk_norm[3]"], ["spmd_rank"]]], {}, "it recorded ''"),
        ([[["a.{i}"], ["b"]]], {}, "variable 'i' is used but not listed"),
        ([[["a.{i}"], ["b"]]], {"variables": {"i": "many"}}, "variable 'i' needs"),
        ([["a"]], {}, "entry 0 is not"),
        ([[[], []]], {}, "entry 0 is not"),
        ([], {"mapping_size": 3}, "mapping_size 3 but holds 0"),
        ([[["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"], ["layers.0.qk_norm"]]], {},
         "the numbers of features do not add up"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_one_clear_error(
    model: Trace, tmp_path: Path, entries: list[object], more: dict[str, object], message: str
) -> None:
    path = write(tmp_path, *entries, **more)
    with pytest.raises(InputError, match=message):
        mapped(model, path)


def test_a_file_that_is_not_json_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_component_mapping(path)
    path.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_component_mapping(path)
    path.write_text("[]")
    with pytest.raises(InputError, match="component_mapping"):
        read_component_mapping(path)


def test_a_comparison_notes_where_its_mapping_came_from(model: Trace, tmp_path: Path) -> None:
    from tensorsleuth.analyze.verdict import Thresholds

    path = write(tmp_path, [["model.layers.{i}.qk_norm"], ["layers.{i}.qk_norm"]], variables={"i": [0, 1]})
    request = ComparisonRequest("r", "t", thresholds=Thresholds(relative_l2=1e-6), mapping=path)
    summary = compare(model, request)
    assert (summary.verdict, summary.n_unmatched) == ("pass", 0)
    assert model.query("SELECT origin FROM mappings").to_pylist() == [{"origin": "component_mapping.json"}]
    entries = model.query("SELECT transform, transform_spec FROM mapping_entries ORDER BY entry").to_pylist()
    assert json.loads(entries[1]["transform_spec"]) == {"axis": -1, "start": 16, "stop": 20}


def test_the_command_shows_writes_and_reads_mappings(
    model: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    arguments = ["map", str(model.path), "--reference", "r", "--target", "t"]
    assert main([*arguments, "--write", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "Wqkv concatenates q_proj, k_proj, v_proj" in shown
    assert "38 sites matched, 0 unmatched" in shown
    assert main([*arguments, "--mapping", str(path), "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["origin"] == "out.json"
    assert {pair["transform"] for pair in body["pairs"]} == {"identity", "slice"}
    assert main(["compare", *arguments[1:], "--tolerance", "1e-6", "--mapping", str(path)]) == 0


def test_holes_end_the_command_with_code_3(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    record(trace, "r", {"mlp": signal(1)})
    record(trace, "t", {"x": signal(2)})
    assert main(["map", str(trace.path), "--reference", "r", "--target", "t"]) == 3
    assert "without a counterpart" in capsys.readouterr().out
    assert main(["map", str(trace.path), "--reference", "r", "--target", "port"]) == 2
    assert "no run 'port'" in capsys.readouterr().err
