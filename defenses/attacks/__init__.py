"""Attacks: one configured value, the searches behind it, and the adapter of torchattacks."""
