"""Which sites an error may have come from: dataflow order, nesting, parallel branches and captured inputs.

Module paths and execution order say what may feed what; they never prove it. Where inputs were captured, they decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..naming import MAIN_SLOTS
from .site_errors import SiteError

#: Siblings that read the same values: an error of the first kind does not reach the second.
_PARALLEL = {
    "k_proj": {"q_proj", "q_norm"},
    "v_proj": {"q_proj", "k_proj", "q_norm", "k_norm"},
    "k_norm": {"q_proj", "q_norm"},
    "q_norm": {"k_proj", "v_proj"},
    "up_proj": {"gate_proj", "act_fn"},
    "w3": {"w1", "act_fn"},
    "input_layernorm": {"rotary_emb"},
    "q_proj": {"rotary_emb", "rotary_emb_local"},
}
_EXPERTS = "experts"


class Dataflow:
    """The sites of one phase and who may feed whom; sites come in dataflow order."""

    def __init__(self, sites: Sequence[SiteError]) -> None:
        self.sites = sites
        self._modules = {site.module for site in sites}
        self._outputs: dict[str, SiteError] = {}
        self._inputs: dict[tuple[str, int], list[SiteError]] = {}
        for site in sites:
            if site.port == "input":
                self._inputs.setdefault((site.module, site.call), []).append(site)
            elif site.slot in MAIN_SLOTS:
                self._outputs[site.module] = site

    def is_leaf(self, module: str) -> bool:
        """Whether no site inside the module was compared."""
        inside = f"{module}." if module else ""
        return not any(other != module and other.startswith(inside) for other in self._modules)

    def inputs(self, site: SiteError) -> list[SiteError]:
        """The compared inputs of the module call that made a site; empty when they were not captured."""
        return self._inputs.get((site.module, site.call), []) if site.port != "input" else []

    def may_feed(self, source: SiteError, site: SiteError) -> bool:
        """Whether an error at `source`, earlier in dataflow order, may show at `site`."""
        if source.module == site.module:
            return True
        if _is_inside(source.module, site.module) or _is_inside(site.module, source.module):
            return True
        container, one, other = _branches(source.module, site.module)
        if container.rpartition(".")[2] == _EXPERTS:
            return False
        return not (source.module == _join(container, one) and one in _PARALLEL.get(other, ()))

    def passed_on(self, source: SiteError, site: SiteError) -> float:
        """Largest relative excess error that `source` can have handed to `site`.

        It cannot be more than what left any module around `source`, but not around `site`, that finished in between, if
        that module's output was compared and passed.
        """
        handed = source.excess
        container, branch, _ = _branches(source.module, site.module)
        outer = _join(container, branch)
        around = source.module.rpartition(".")[0]
        while len(around) >= len(outer):
            outlet = self._outputs.get(around)
            if outlet is not None and not outlet.failed and outlet.exec_order < site.exec_order:
                handed = min(handed, outlet.excess)
            around = around.rpartition(".")[0]
            if not around:
                break
        return handed

    def kept_in(self, site: SiteError, share: float) -> SiteError | None:
        """The output that shows that the error of `site` ends inside a module around it.

        It finished later, passes, and holds less than `share` of the site's relative excess error: the tokens of an
        expert of which one was exchanged at a tie, a mask that is written in another way.
        """
        around = site.module if site.port == "input" else site.module.rpartition(".")[0]
        while around:
            outlet = self._outputs.get(around)
            later = outlet is not None and outlet.exec_order > site.exec_order and not outlet.failed
            if outlet is not None and later and outlet.excess < share * site.excess:
                return outlet
            around = around.rpartition(".")[0]
        return None


def distinct(sites: Iterable[SiteError]) -> list[SiteError]:
    """Sites without those that hold the same values as an earlier one: a container that returns its last child's."""
    seen = set()
    kept = []
    for site in sites:
        known = site.content in seen and None not in site.content
        seen.add(site.content)
        if not known:
            kept.append(site)
    return kept


def _is_inside(module: str, container: str) -> bool:
    return container == "" or module.startswith(f"{container}.")


def _branches(first: str, second: str) -> tuple[str, str, str]:
    """The innermost module around both, and its children that lead to each; neither is inside the other."""
    one, other = first.split("."), second.split(".")
    depth = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return ".".join(one[:depth]), (one[depth:] or [""])[0], (other[depth:] or [""])[0]


def _join(container: str, child: str) -> str:
    return f"{container}.{child}" if container else child
