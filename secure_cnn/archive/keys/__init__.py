"""Keys: what wraps a file key and what signs, as values, in files and behind services."""
