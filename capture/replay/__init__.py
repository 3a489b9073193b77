"""replay runs modules of a reference on the inputs that another run gave its own.

`replay` does so for a comparison: the reference's modules compute on the target's values, once in the reference's
precision and once in the baseline's; both are runs of their own, and comparing the target with them tells which
modules add error of their own. `component_test` does the same with random inputs.
"""

from .run import ReplayRequest, ReplaySummary, replay, replayed_sites

__all__ = ["ReplayRequest", "ReplaySummary", "replay", "replayed_sites"]
