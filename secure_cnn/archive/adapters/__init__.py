"""Adapters: other libraries' checkpoint interfaces over sealed files."""
