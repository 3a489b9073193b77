"""nxdi captures NxD Inference models: the real sources on a CPU, or a compiled model on a Neuron device.

On a CPU, `stand_in` supplies the closed packages, `application` builds a port, `ranks` runs one process per
tensor-parallel rank; on a device, `device` plans what the compiled graph carries and streams it into shards.
"""
