"""diagnosis names causes: hypotheses tested against the tensors of a suspect, with evidence in numbers."""
