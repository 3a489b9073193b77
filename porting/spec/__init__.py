"""spec describes an architecture: typed, versioned, every field with its source."""
