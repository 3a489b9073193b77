"""logits judges next-token distributions, teacher-forced, per prompt and position, from stored traces alone."""
