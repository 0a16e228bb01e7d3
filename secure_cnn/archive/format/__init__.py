"""The format: what the bytes of a sealed file are, from its core to the payload's segments."""
