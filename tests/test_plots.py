"""Pictures of comparisons: drawn for every catalog, the same bytes for the same numbers, under safe file names."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tensorsleuth.analyze.plots import plot_layers, plot_qq, plot_tokens
from tensorsleuth.analyze.plotting import layer_grid, marks, source
from tensorsleuth.analyze.plotting.qq import distributions
from tensorsleuth.analyze.plotting.scale import Scale
from tensorsleuth.analyze.plotting.tokens import MOST_CELLS, pooled, token_profile
from tensorsleuth.analyze.quantiles import PROBABILITIES, qq_numbers, quantiles_of_sorted
from tensorsleuth.cli.app import main
from tensorsleuth.cli.plot import file_name
from tensorsleuth.store import InputError, Trace, TraceNotFoundError, catalog, site_name

COMPONENTS = (
    "input_layernorm",
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    "self_attn",
    "post_attention_layernorm",
    *(f"mlp.{name}" for name in ("gate_proj", "act_fn", "up_proj", "down_proj")),
    "mlp",
    "residual",
)
LARGEST_FILE = 300_000


@dataclass(frozen=True)
class Row:
    """A measurement over all prompts, as far as pictures look at it."""

    module: str
    phase: str = "prefill"
    r: float | None = 1.05
    low: float | None = 0.98
    high: float | None = 1.11
    state: str = "measured"
    verdict: str = "pass"
    slot: str = ""
    target: str = "t"

    def failing(self, r: float) -> Row:
        return replace(self, r=r, low=0.9 * r, high=1.1 * r, verdict="fail")


def exact(module: str, phase: str = "prefill") -> Row:
    return Row(module, phase, None, None, None, "exact")


def model(n_layers: int, phases: Iterable[str], fails_from: int) -> list[Row]:
    """A decoder with sites outside layers, whose R rises without end from one layer on."""
    rows = []
    for phase in phases:
        rows += [exact("model.embed_tokens", phase), Row("model.rotary_emb", phase, slot="0")]
        for layer in range(n_layers):
            for i, component in enumerate((*COMPONENTS, "")):
                good = Row(f"model.layers.{layer}{'.' if component else ''}{component}", phase)
                bad = layer > fails_from or (layer == fails_from and i >= 4)
                rows.append(good.failing(1.3 * 1.7 ** (layer - fails_from) + i) if bad else good)
        rows += [Row("model.norm", phase), Row("lm_head", phase).failing(5.0)]
    return rows


def write(
    folder: Path, rows: list[Row], *, name: str = "port", baseline: str | None = "bf16", limit: str = '{"tau_r": 1.2}'
) -> Trace:
    """A trace whose catalog holds one comparison with these measurements."""
    trace = Trace.create(folder)
    n = len(rows)
    columns: dict[str, Any] = {
        "comparison": [name] * n,
        "measurement": pa.array(range(n), pa.int32()),
        "site": [site_name(row.module, "output", row.slot) for row in rows],
        "target_site": [row.target for row in rows],
        "module": [row.module for row in rows],
        "port": ["output"] * n,
        "slot": [row.slot for row in rows],
        "call": pa.array([0] * n, pa.int32()),
        "exec_order": pa.array(range(n), pa.int32()),
        "phase": [row.phase for row in rows],
        "n": pa.array([4096] * n, pa.int64()),
        "r_ratio": pa.array([row.r if baseline else None for row in rows], pa.float64()),
        "r_low": pa.array([row.low if baseline else None for row in rows], pa.float64()),
        "r_high": pa.array([row.high if baseline else None for row in rows], pa.float64()),
        "relative_l2": pa.array([row.r for row in rows], pa.float64()),
        "state": [row.state for row in rows],
        "verdict": [row.verdict for row in rows],
    }
    now = datetime(2026, 1, 1)
    with catalog.writing(trace.catalog_path) as connection:
        catalog.insert(connection, "measurements", columns)
        values = [name, "fp32", baseline, "neuron", "auto", limit, now, "fail", [], n, 0, 0]
        connection.execute(f"INSERT INTO comparisons VALUES ({', '.join('?' * len(values))})", values)
    return trace


def add_distributions(trace: Trace, measurement: int, baseline: np.ndarray, target: np.ndarray) -> None:
    """Give a measurement error quantiles and the numbers that follow from them."""
    quantiles = [quantiles_of_sorted(np.sort(side)) for side in (baseline, target)]
    found = qq_numbers(*quantiles, float(baseline.std()))
    with catalog.writing(trace.catalog_path) as connection:
        size = len(PROBABILITIES)
        columns = {"comparison": ["port"] * size, "measurement": pa.array([measurement] * size, pa.int32())}
        columns |= {"probability": PROBABILITIES, "baseline": quantiles[0], "target": quantiles[1]}
        catalog.insert(connection, "error_quantiles", columns)
        numbers = [None if math.isnan(v) else v for v in (found.slope, found.intercept, found.w1, found.ks)]
        connection.execute(
            "UPDATE measurements SET qq_slope = ?, qq_intercept = ?, qq_w1 = ?, ks = ?, n = ? WHERE measurement = ?",
            [*numbers, len(baseline), measurement],
        )


def add_tokens(trace: Trace, site: str, squares: dict[int, list[tuple[float, float, float]]]) -> None:
    """Give a site measurements by prompt, with (reference, baseline, target) sums of squares by position."""
    with catalog.writing(trace.catalog_path) as connection:
        for prompt, tokens in squares.items():
            connection.execute(
                "INSERT INTO measurements SELECT * REPLACE (? AS measurement, ? AS prompt) FROM measurements "
                "WHERE site = ? AND prompt IS NULL",
                [1000 + prompt, prompt, site],
            )
            n = len(tokens)
            columns: dict[str, Any] = {"comparison": ["port"] * n}
            columns["measurement"] = pa.array([1000 + prompt] * n, pa.int32())
            columns["position"] = pa.array(range(n), pa.int32())
            for i, column in enumerate(("reference_sq", "baseline_sq", "target_sq")):
                columns[column] = pa.array([token[i] for token in tokens], pa.float64())
            catalog.insert(connection, "token_errors", columns)


def check_picture(path: Path) -> np.ndarray:
    """The pixels of a file that is a PNG of sensible size and not blank."""
    assert path.stat().st_size < LARGEST_FILE
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(image.getcolors() or ()) > 3
        pixels = np.asarray(image.convert("RGB"))
    assert 250 < pixels.shape[0] < 3000
    assert 1000 < pixels.shape[1] < 2000
    return pixels


CATALOGS = {
    "small": model(4, ("prefill", "decode"), 1),
    "80 layers": model(80, ("prefill", "decode"), 37),
    "one site": [Row("lm_head", "forward")],
    "one exact site in a layer": [exact("model.layers.0.mlp")],
    "no layers": [Row(f"backbone.stage_{chr(97 + i)}" + ".block_with_a_long_name" * 4, "forward") for i in range(26)],
    "experts": [Row(f"h.{i}.moe.experts.{j}.gate.w{k}") for i in range(4) for j in range(64) for k in range(3)],
    "two stacks": [Row(f"{side}.layers.{i}.{name}") for side in ("enc", "dec") for i in range(6) for name in "ab"],
    "mathematics": [Row("$\\frac{$.odd\nname", slot="$x_$").failing(3.0)],
    "every state": [
        exact("layers.0.a"),
        Row("layers.0.b", r=math.inf, low=None, high=None, state="baseline_exact", verdict="fail"),
        Row("layers.1.a", r=math.inf, low=None, high=None, state="baseline_exact"),
        Row("layers.1.b", r=None, low=None, high=None, state="nonfinite", verdict="fail"),
        Row("layers.2.a", r=math.nan, low=math.nan, high=math.nan, state="nonfinite", verdict="undecided"),
        Row("layers.2.b", r=None, low=None, high=None, state="shape_mismatch", verdict="fail"),
        Row("layers.3.a", r=None, low=None, high=None),
        Row("layers.3.b", r=1e300, low=0.0, high=math.inf, verdict="fail"),
        Row("norm", r=0.0, low=0.0, high=0.0),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A small comparison with two phases."""
    return write(tmp_path_factory.mktemp("sound") / "t", [*model(1, ("prefill",), 1), Row("late", "decode")])


@pytest.mark.parametrize("case", CATALOGS)
def test_layers_are_drawn_for_every_catalog(tmp_path: Path, case: str) -> None:
    plot_layers(write(tmp_path / "t", CATALOGS[case]), "port", tmp_path / "a.png")
    check_picture(tmp_path / "a.png")


def test_a_comparison_without_baseline_shows_relative_l2(tmp_path: Path) -> None:
    rows = [Row("layers.0.a", r=1e-7), Row("layers.0.b", r=3e-4, verdict="fail"), exact("layers.1.a")]
    trace = write(tmp_path / "t", rows, baseline=None, limit='{"tau_r": 1.2, "relative_l2": 1e-6}')
    comparison = source.compared(trace)
    assert (comparison.quantity, comparison.limit) == ("relative L2", 1e-6)
    plot_layers(trace, "port", tmp_path / "a.png")
    check_picture(tmp_path / "a.png")
    plot_qq(trace, "port", tmp_path / "b.png")
    check_picture(tmp_path / "b.png")


def test_failing_cells_are_coloured_and_passing_ones_are_not(tmp_path: Path) -> None:
    scale = Scale.of("R", 1.2)
    rows = [Row("layers.0.a"), Row("layers.1.a").failing(3.0)]
    plot_layers(write(tmp_path / "bad", rows), "port", tmp_path / "bad.png")
    plot_layers(write(tmp_path / "good", rows[:1]), "port", tmp_path / "good.png")
    wanted = np.array([int(scale.colors[scale.band(3.0)][i : i + 2], 16) for i in (1, 3, 5)])
    seen = [
        (np.abs(check_picture(tmp_path / f"{name}.png") - wanted).max(axis=2) < 3).sum() for name in ("bad", "good")
    ]
    assert seen[0] > seen[1] + 20_000  # the colour bar shows it too


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    errors = np.random.default_rng(1).normal(size=(2, 500))
    for folder in ("a", "b"):
        trace = write(tmp_path / folder, model(1, ("prefill",), 0))
        add_distributions(trace, 3, *errors)
        plot_layers(trace, "port", tmp_path / f"{folder}-layers.png")
        plot_qq(trace, "port", tmp_path / f"{folder}-qq.png", site=("model.layers.0.self_attn.q_proj", "prefill"))
    for picture in ("layers", "qq"):
        assert (tmp_path / f"a-{picture}.png").read_bytes() == (tmp_path / f"b-{picture}.png").read_bytes()


def test_heights_rise_with_r_and_keep_small_exceedances_visible() -> None:
    scale = Scale.of("R", 1.2)
    values = [0.1, 0.8, 1.0, 1.2, 1.5, 2.0, 10.0, 1e3, 1e9]
    heights = [scale.height(value) for value in values]
    assert heights == sorted(heights)
    assert scale.height(1.2) > 0.15 * scale.height(1e3)
    assert [scale.band(value) for value in (0.5, 1.0, 1.19, 1.2, 1e9)] == [0, 1, 2, 3, 8]
    assert scale.height(math.inf) == math.inf
    assert scale.ticks(-1, 5)[1][:2] == ["1.2", "1"]


def test_sites_are_placed_by_layer_and_component(tmp_path: Path) -> None:
    rows = [
        exact("embed"),
        Row("h.0.experts.3.w"),
        Row("h.0.experts.11.w").failing(2.0),
        Row("h.0", slot="1"),
        Row("norm"),
    ]
    results = source.site_results(trace := write(tmp_path / "t", rows), source.compared(trace))["prefill"]
    names = [place.component if (place := layer_grid.place_of(site)) else None for site in results]
    assert names == [None, "experts.*.w", "experts.*.w", "(layer)[1]", None]
    assert [column.label for column in layer_grid.columns_of(results, 0.05)] == ["embed", "0", "norm"]
    assert layer_grid.worst(results[1:3]).verdict == "fail"
    assert marks.mark_of(results[0]) == "exact"


def test_a_site_compared_twice_keeps_both_results(tmp_path: Path) -> None:
    rows = [Row("norm"), replace(Row("norm").failing(3.0), target="other"), Row("h.0.a"), Row("h.0.a", target="other")]
    trace = write(tmp_path / "t", rows)
    comparison = source.compared(trace)
    results = source.site_results(trace, comparison)
    assert [len(column.sites) for column in layer_grid.columns_of(results["prefill"], 0.05)] == [2, 2]
    assert source.choose_site(results, comparison, "norm").target_site == "other"
    plot_layers(trace, "port", tmp_path / "a.png")
    check_picture(tmp_path / "a.png")


def test_very_many_components_share_rows() -> None:
    sites = [
        source.SiteResult(i, module, module, module, "prefill", 1.0, None, None, "measured", "pass")
        for i, module in enumerate(f"h.0.part{i % 30}.deep{i}.w" for i in range(90))
    ]
    rows, cut = layer_grid.rows_of(sites)
    assert (len(rows), cut) == (30, 1)


def test_one_phase_can_be_chosen(tmp_path: Path, sound: Trace) -> None:
    plot_layers(sound, "port", tmp_path / "a.png", phase="decode")
    check_picture(tmp_path / "a.png")
    with pytest.raises(InputError, match="no phase 'forward'; its phases: prefill, decode"):
        plot_layers(sound, "port", tmp_path / "b.png", phase="forward")


@pytest.mark.parametrize(
    ("scale", "shift"), [(1.0, 0.0), (1.3, 0.2), (2000.0, -40.0)], ids=["equal", "a little wider", "far wider"]
)
def test_qq_draws_what_the_numbers_say(tmp_path: Path, scale: float, shift: float) -> None:
    trace = write(tmp_path / "t", [Row("lm_head")])
    baseline = 1e-3 * np.random.default_rng(0).standard_t(3, 4000)
    add_distributions(trace, 0, baseline, scale * baseline + 1e-3 * shift)
    comparison = source.compared(trace)
    found = distributions(trace, comparison, source.choose_site(source.site_results(trace, comparison), comparison))
    low, high = np.quantile(baseline, [0.16, 0.84])
    assert found.sigma == pytest.approx((high - low) / (2 * 0.994457883), rel=1e-6)
    assert found.slope == pytest.approx(scale)
    assert found.intercept is not None
    assert found.intercept * found.sigma == pytest.approx(1e-3 * shift, abs=1e-9)
    assert found.probability[1] == 1.5e-4  # 4000 elements resolve no more
    plot_qq(trace, "port", tmp_path / "a.png")
    check_picture(tmp_path / "a.png")


def test_qq_of_an_exact_baseline_shows_the_target_alone(tmp_path: Path) -> None:
    trace = write(tmp_path / "t", [Row("embed", r=math.inf, low=None, high=None, state="baseline_exact")])
    add_distributions(trace, 0, np.zeros(100), np.linspace(-1.0, 1.0, 100))
    plot_qq(trace, "port", tmp_path / "a.png", site=("embed", "prefill"))
    check_picture(tmp_path / "a.png")


@pytest.mark.parametrize("state", ["exact", "nonfinite", "shape_mismatch", "measured"])
def test_qq_says_in_words_why_there_is_nothing_to_draw(tmp_path: Path, state: str) -> None:
    trace = write(tmp_path / "t", [Row("a", r=None, low=None, high=None, state=state)])
    plot_qq(trace, "port", tmp_path / "a.png")
    check_picture(tmp_path / "a.png")
    if state != "exact":
        assert main(["plot", "qq", str(trace.path), "-o", str(tmp_path / "b.png")]) == 2
        assert not (tmp_path / "b.png").exists()


def test_tokens_are_drawn_whatever_their_values(tmp_path: Path) -> None:
    trace = write(tmp_path / "t", [Row("a")])
    odd = [(1.0, 0.0, 0.0), (1.0, 0.0, 1.0), (math.nan, math.nan, math.nan)]
    add_tokens(trace, "a", {0: [(1.0, 1e-4, 4e-4)] * 5, 3: odd})
    comparison = source.compared(trace)
    profile = token_profile(trace, comparison, source.site_results(trace, comparison)["prefill"][0])
    assert profile.prompts == ["0", "3"]
    assert profile.values[0] == pytest.approx([2.0] * 5)
    assert profile.values[1][:2].tolist() == [-1.0, math.inf]
    assert math.isnan(profile.values[1][2])
    assert [row["value"] for row in profile.records()[5:7]] == [None, math.inf]
    plot_tokens(trace, "port", tmp_path / "a.png")
    check_picture(tmp_path / "a.png")


def test_long_prompts_keep_their_worst_token() -> None:
    values = np.full((2, 10_001), 1.0)
    values[1, 7_777] = 50.0
    cells, width = pooled(values)
    assert cells.shape[1] <= MOST_CELLS
    assert cells[1, 7_777 // width] == 50.0


def test_a_site_is_chosen_by_its_largest_finite_value(tmp_path: Path) -> None:
    infinite = Row("b", r=math.inf, state="baseline_exact")
    rows = [Row("a"), Row("a", "decode").failing(7.0), infinite, replace(infinite, phase="decode")]
    comparison = source.compared(trace := write(tmp_path / "t", rows))
    results = source.site_results(trace, comparison)
    assert source.choose_site(results, comparison).phase == "decode"
    assert source.choose_site(results, comparison, "a", "prefill").value == 1.05
    assert source.choose_site(results, comparison, "b").value == math.inf


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn[1]", "model.layers.0.self_attn-1"),
        ("../../etc/passwd", "etc-passwd"),
        ("/etc/passwd", "etc-passwd"),
        ("..\\..\\x", "x"),
        (".hidden", "hidden"),
        ("a\x00b\nc", "a-b-c"),
        ("...", "unnamed"),
    ],
)
def test_names_never_become_paths(name: str, expected: str) -> None:
    assert file_name(name) == expected


def test_long_names_stay_apart() -> None:
    names = [file_name("x" * 300 + end) for end in "ab"]
    assert names[0] != names[1]
    assert max(map(len, names)) <= 80


def test_a_hostile_comparison_writes_into_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = write(tmp_path / "t", [Row("../../up/and/away")], name="../evil/name")
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert main(["plot", "layers", str(trace.path)]) == 0
    assert [path.name for path in here.iterdir()] == ["evil-name-layers.png"]


def test_json_names_the_file_and_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write(tmp_path / "t", CATALOGS["every state"])
    add_distributions(trace, 7, np.linspace(-1, 1, 50), np.linspace(-2, 2, 50))
    add_tokens(trace, "layers.3.b", {0: [(1.0, 1e-4, 4e-4)] * 2})
    reports = {}
    for command in ("layers", "qq", "tokens"):
        path = tmp_path / f"{command}.png"
        assert main(["plot", command, str(trace.path), "port", "-o", str(path), "--json"]) == 0
        reports[command] = json.loads(capsys.readouterr().out)
        assert reports[command]["plot"] == str(path)
        check_picture(path)
    assert [site["value"] for site in reports["layers"]["sites"]][:4] == [None, "inf", "inf", None]
    assert reports["qq"]["site"] == "layers.3.b"
    assert reports["qq"]["slope"] == pytest.approx(2.0)
    assert reports["tokens"]["tokens"][1] == {"prompt": "0", "position": 1, "value": pytest.approx(2.0)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers", "TRACE", "nope"], "has no comparison 'nope'; its comparisons: port"),
        (["qq", "TRACE", "--site", "model.norms"], "measured no site 'model.norms'; it has model.norm"),
        (["qq", "TRACE", "--site", "late", "--phase", "prefill"], "measured 'late' in decode only, not in prefill"),
        (["qq", "TRACE", "--phase", "warmup"], "has no phase 'warmup'; its phases: prefill, decode"),
        (["tokens", "TRACE", "--site", "model.norm"], "no token errors are stored for it"),
        (["layers", "TRACE", "-o", "a.pdf"], "name a file that ends in .png"),
        (["layers", "TRACE", "-o", "/nonexistent/a.png"], "/nonexistent/a.png cannot be written"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_what_exists(
    sound: Trace, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plot", *(str(sound.path) if word == "TRACE" else word for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_comparison_is_optional_only_when_there_is_one(tmp_path: Path) -> None:
    write(tmp_path / "t", [Row("a")])
    with pytest.raises(InputError, match="2 comparisons; name one of port, second"):
        source.compared(write(tmp_path / "t", [Row("a")], name="second"))
    with catalog.writing((trace := Trace.create(tmp_path / "empty")).catalog_path):
        pass
    with pytest.raises(TraceNotFoundError, match="has no comparison; make one with 'sleuth compare"):
        source.compared(trace)


def test_the_command_line_starts_without_matplotlib() -> None:
    statement = "import sys, tensorsleuth, tensorsleuth.cli.app; print('matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
