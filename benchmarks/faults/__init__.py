"""The fault benchmark: bugs of known kind, place and size, planted in five architectures, and what is made of them."""
