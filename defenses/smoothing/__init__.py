"""Randomised smoothing: exact noise, what counts prove, certification and its report."""
