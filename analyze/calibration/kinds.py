"""Kinds of sites: what sites of different layers, and of different models of a family, have in common."""

from __future__ import annotations

import re

from ..sites import Site

_LAYER = re.compile(r"^(.*?\d+)(?:\.(.*))?$")


def layer_of(module: str) -> str:
    """The path of the layer that a module belongs to, `model.layers.3`; empty outside numbered layers."""
    match = _LAYER.match(module)
    return match[1] if match else ""


def kind_of(site: Site) -> str:
    """The path within the layer, `self_attn.o_proj` or `(layer)[0]`; the whole path outside numbered layers."""
    match = _LAYER.match(site.module)
    component = site.module if match is None else match[2] or "(layer)"
    return Site(component, site.port, site.slot, site.call).name


def kind_in_phase(kind: str, phase: str) -> str:
    """A kind of site in one phase: `prefill self_attn.o_proj`."""
    return f"{phase} {kind}"
