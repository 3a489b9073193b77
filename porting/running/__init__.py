"""running compiles a port, lets it answer a prompt, and validates it against the model it was made from."""
