"""Adversarial training: objectives with one loss an example, and what guards them."""
