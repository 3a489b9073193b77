"""tensorsleuth: capture a model's tensors once, then find where its port diverges, and why.

    import tensorsleuth as ts

    trace = ts.open("mytrace", create=True)
    with trace.record(model, run="fp32", role="reference"):
        model(input_ids)
    trace.sql("SELECT module, mean, std FROM tensors")

The verbs load on first use; importing the package loads neither torch nor duckdb.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import Trace, open
    from .store.errors import SleuthError

__all__ = ["open", "Trace", "SleuthError", "__version__"]

_HOMES = {"open": "api", "Trace": "api", "SleuthError": "store.errors"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
