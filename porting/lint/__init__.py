"""lint checks a port against the API of a release of NxD Inference, without the SDK."""
