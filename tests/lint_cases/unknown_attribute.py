"""An attribute that an imported module does not have."""

from neuronx_distributed.parallel_layers import parallel_state

GROUP = parallel_state.get_tensor_parallel_group()  # <- unknown-name
