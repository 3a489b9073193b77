"""generator writes the NxD Inference port of an architecture."""
