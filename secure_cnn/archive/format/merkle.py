"""The hash tree over a payload's ciphertext: what a signature covers; the tree of RFC 6962."""

import hashlib
from collections.abc import Sequence

__all__ = ["leaf_hash", "merkle_root"]


def leaf_hash(data: bytes | memoryview) -> bytes:
    """SHA-256 over a zero byte and the data: a leaf of the tree."""
    digest = hashlib.sha256(b"\0")
    digest.update(data)
    return digest.digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes: nodes are SHA-256(1, left, right), an odd last one moves up.

    Args:
        leaves: At least one 32-byte hash.
    """
    level = list(leaves)
    while len(level) > 1:
        odd = level[len(level) & ~1 :]
        pairs = zip(level[::2], level[1::2], strict=False)
        level = [hashlib.sha256(b"\1" + left + right).digest() for left, right in pairs] + odd
    return level[0]
