"""importers turn what other tools dumped into runs of a trace.

`import_dump` recognises a layout by its files, reads every tensor without running any code, cuts it by prompt and
position, and reports each file that was left out with the reason. One module per layout: `nxdi` (NxD Inference's
capture hook and the equivalence skill's dumps), `vllm_neuron`, `folder` (plain .pt, .npy and .safetensors files).
"""

from .formats import FORMATS, detect
from .run import ImportOptions, ImportSummary, import_dump

__all__ = ["import_dump", "ImportOptions", "ImportSummary", "FORMATS", "detect"]
