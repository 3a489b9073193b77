"""references is the knowledge base: known pitfalls of ports, with their symptoms and remedies."""
