"""Checks of a robust accuracy: whether a figure may be believed, and what says so."""
