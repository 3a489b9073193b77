"""The command group plot: pictures of a comparison."""

from __future__ import annotations

import re
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..store import InputError, Trace
from .console import Json, TracePath, print_json, say

if TYPE_CHECKING:
    from ..analyze.plotting.source import Compared, SiteResult

Comparison = Annotated[
    str | None, typer.Argument(metavar="[COMPARISON]", help="Name of the comparison; not needed if there is only one.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="PNG file; by default named after what is drawn, in this folder.")
]
Phase = Annotated[str | None, typer.Option(help="prefill, decode or forward.")]
Site = Annotated[str | None, typer.Option(help="Name of the site; the one with the largest finite R by default.")]

#: What a default file name keeps of a name; everything else, path separators above all, becomes a dash.
_UNSAFE = re.compile(r"[^A-Za-z0-9_.]+|\.{2,}")
_LONGEST_NAME = 80


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(name="plot", help="Draw pictures of a comparison.", no_args_is_help=True)
    for command in (layers, qq, histogram, tokens, tensor, logits):
        group.command()(command)
    app.add_typer(group)


def layers(
    trace: TracePath, comparison: Comparison = None, phase: Phase = None, output: Output = None, json: Json = False
) -> None:
    """Draw R of every site by layer and component: where it starts, at a glance."""
    from ..analyze.plotting.layers import draw_layers
    from ..analyze.plotting.source import compared, first_failure, site_results

    opened = Trace.open(trace)
    source = compared(opened, comparison)
    results = site_results(opened, source, phase)
    path = _png(output, source.name, "layers", *([phase] if phase else []))
    draw_layers(source, results, path)
    if json:
        sites = [asdict(site) for listed in results.values() for site in listed]
        print_json({"plot": path, "comparison": asdict(source), "sites": sites})
        return
    for name, listed in results.items():
        first = first_failure(listed)
        found = f"starts at {first.site}, {_value(source, first)}" if first else f"0 of {len(listed)} measurements fail"
        say(f"{name}: {found}")
    say(f"picture: {path}")


def qq(
    trace: TracePath,
    comparison: Comparison = None,
    site: Site = None,
    phase: Phase = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Draw the error distribution of one site against that of the baseline."""
    from ..analyze.plotting.qq import caption, distributions, draw_qq

    opened, source, result = _chosen(trace, comparison, site, phase)
    found = distributions(opened, source, result)
    if found.missing and result.state != "exact":
        reason = " ".join(found.missing.split())
        raise InputError(f"{result.site} ({result.phase}) has no picture: {reason} Name another site with --site")
    path = _png(output, source.name, "qq", result.site, result.phase)
    draw_qq(found, path)
    if json:
        numbers = {key: getattr(found, key) for key in ("n", "sigma", "slope", "intercept", "w1", "ks")}
        quantiles = {key: getattr(found, key).tolist() for key in ("probability", "baseline", "target")}
        print_json({"plot": path, "comparison": asdict(source), **asdict(result), **numbers, "quantiles": quantiles})
        return
    say(f"{result.site} ({result.phase}): {caption(found)}")
    say(f"picture: {path}")


def tokens(
    trace: TracePath,
    comparison: Comparison = None,
    site: Site = None,
    phase: Phase = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Draw R of every token of one site, prompt by prompt."""
    from ..analyze.plotting.tokens import draw_tokens, token_profile

    opened, source, result = _chosen(trace, comparison, site, phase)
    profile = token_profile(opened, source, result)
    if not profile.prompts:
        raise InputError(f"{result.site} ({result.phase}) has no picture: no token errors are stored for it")
    path = _png(output, source.name, "tokens", result.site, result.phase)
    draw_tokens(profile, path)
    if json:
        print_json({"plot": path, "comparison": asdict(source), **asdict(result), "tokens": profile.records()})
        return
    say(f"{result.site} ({result.phase}): {_value(source, result)} over all tokens of {len(profile.prompts)} prompts")
    say(f"picture: {path}")


def histogram(
    trace: TracePath,
    comparison: Comparison = None,
    site: Site = None,
    phase: Phase = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Draw how large the errors of one site are, the target's beside the baseline's."""
    from ..analyze.plotting.histogram import EDGES, caption, draw_histogram, error_histogram

    opened, source, result = _chosen(trace, comparison, site, phase)
    found = error_histogram(opened, source, result)
    path = _png(output, source.name, "histogram", result.site, result.phase)
    draw_histogram(found, path)
    if json:
        sides = {name: counts for name, counts in (("baseline", found.baseline), ("target", found.target)) if counts}
        counts = {name: {key: getattr(side, key) for key in ("zero", "nonfinite")} for name, side in sides.items()}
        filled = {
            name: [
                {"from": EDGES[i], "to": EDGES[i + 1], "positive": side.positive[i], "negative": side.negative[i]}
                for i in side.magnitudes.nonzero()[0]
            ]
            for name, side in sides.items()
        }
        bins = {name: {**counts[name], "bins": [_plain(row) for row in filled[name]]} for name in sides}
        print_json({"plot": path, "comparison": asdict(source), **asdict(result), **bins})
        return
    say(f"{result.site} ({result.phase}): {caption(found)}")
    say(f"picture: {path}")


def tensor(
    trace: TracePath,
    comparison: Comparison = None,
    site: Site = None,
    phase: Phase = None,
    prompt: Annotated[int | None, typer.Option(help="Index of the prompt; the first compared one by default.")] = None,
    what: Annotated[str, typer.Option(help="error, reference, baseline or target.")] = "error",
    tensor_id: Annotated[
        int | None, typer.Option("--id", help="Draw this stored tensor instead; 'sleuth tensors' lists ids.")
    ] = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Draw one tensor as a map of positions and features: its values, or its errors beside the baseline's."""
    from ..analyze.plotting.tensor import WHAT, compared_map, draw_tensor, stored_map

    if what not in WHAT:
        raise InputError(f"--what {what} is unknown; choose one of {', '.join(WHAT)}")
    if tensor_id is not None:
        found = stored_map(Trace.open(trace), tensor_id)
        path = _png(output, "tensor", str(tensor_id))
    else:
        opened, source, result = _chosen(trace, comparison, site, phase)
        found = compared_map(opened, source, result, prompt, what)
        path = _png(output, source.name, what, result.site, result.phase)
    draw_tensor(found, path)
    if json:
        maps = [
            {"name": one.name, "by_position": one.by_position.tolist(), "by_feature": one.by_feature.tolist()}
            for one in found.maps
        ]
        print_json({"plot": path, "title": found.title, "first_position": found.first_position, "maps": maps})
        return
    say(found.title)
    say(f"picture: {path}")


def logits(trace: TracePath, comparison: Comparison = None, output: Output = None, json: Json = False) -> None:
    """Draw KL, R and other first tokens of every position; 'sleuth logits' measures them."""
    from ..analyze.plotting.logits import draw_logits, logit_map
    from ..analyze.plotting.source import compared

    opened = Trace.open(trace)
    source = compared(opened, comparison)
    found = logit_map(opened, source)
    path = _png(output, source.name, "logits")
    draw_logits(found, path)
    if json:
        numbers = {"positions": int(found.compared.sum()), "flips": int(found.flips.sum()),
                   "failing": int(found.failing.sum())}  # fmt: skip
        print_json({"plot": path, "comparison": asdict(source), **numbers})
        return
    say(f"picture: {path}")


def _plain(row: dict[str, Any]) -> dict[str, int | float]:
    """Numpy's numbers as Python's."""
    return {key: value.item() for key, value in row.items()}


def _chosen(
    trace: str, comparison: str | None, site: str | None, phase: str | None
) -> tuple[Trace, Compared, SiteResult]:
    from ..analyze.plotting.source import choose_site, compared, site_results

    opened = Trace.open(trace)
    source = compared(opened, comparison)
    return opened, source, choose_site(site_results(opened, source), source, site, phase)


def _value(source: Any, result: Any) -> str:
    if result.value is None:
        return str(result.state).replace("_", " ")
    return f"{source.quantity} = {result.value:.3g}"


def _png(output: Path | None, *names: str) -> Path:
    """The file to write: as given, or made of names, which never become paths."""
    if output is None:
        return Path("-".join(file_name(name) for name in names) + ".png")
    if output.suffix.lower() != ".png":
        raise InputError(f"{output} is no PNG file; pictures are PNG, name a file that ends in .png")
    return output


def file_name(name: str) -> str:
    """A name as part of a file name: letters, digits, `_`, `.` and dashes, neither hidden nor too long."""
    safe = _UNSAFE.sub("-", name).strip("-.") or "unnamed"
    if len(safe) > _LONGEST_NAME:
        safe = f"{safe[: _LONGEST_NAME - 9]}-{zlib.crc32(name.encode()):08x}"
    return safe
