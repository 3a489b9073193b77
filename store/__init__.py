"""store keeps tensors: HDF5 shards with their own index are the truth, a DuckDB catalog is what one queries.

`Trace` opens a trace and reads tensors; `RunWriter` records one rank of a run; `verify`, `repair`, `index`,
`export` and `merge` look after what is stored. Nothing here imports torch.
"""

from .errors import (
    CaptureError,
    CatalogLockedError,
    FormatError,
    InputError,
    IntegrityError,
    RunExistsError,
    SleuthError,
    StorageError,
    TraceNotFoundError,
    UnsupportedDtypeError,
)
from .index import TensorKey
from .integrity import Salvage, Verification, repair, verify
from .manifest import Module, Prompt, PromptTokens, RunManifest
from .run_writer import RunWriter
from .trace import StoredTensor, Trace, site_name
from .transfer import export, index, merge

__all__ = [
    "Trace",
    "StoredTensor",
    "site_name",
    "RunManifest",
    "Prompt",
    "PromptTokens",
    "Module",
    "RunWriter",
    "TensorKey",
    "verify",
    "Verification",
    "repair",
    "Salvage",
    "index",
    "export",
    "merge",
    "SleuthError",
    "InputError",
    "UnsupportedDtypeError",
    "TraceNotFoundError",
    "RunExistsError",
    "FormatError",
    "IntegrityError",
    "CatalogLockedError",
    "StorageError",
    "CaptureError",
]
