"""structure compares module trees: of a Hugging Face model and of its port, without loading weights."""
