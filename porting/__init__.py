"""porting makes ports of models to NxD Inference, and knows what this machine has to run them with.

`environment` finds the Neuron SDK, the NxD and NxD Inference sources, their versions and the platform.
"""
