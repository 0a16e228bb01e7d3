"""Evaluation: which images an attack leaves standing, kept under way, reported and compared."""
