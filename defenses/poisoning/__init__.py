"""Poisoned training data: planted, obeyed by a model, found again."""
