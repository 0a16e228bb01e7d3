"""What is in a data set, as one hash, and proofs that something is not in it.

The leaves are keyed digests of 32 bytes, each once, in their order as numbers. Hashes of leaves and
nodes have other prefixes (RFC 6962), so that no node passes for a leaf, and the root binds the
number of leaves. That an item is absent is shown by the two leaves between which it would stand,
side by side, or by the one at an end.

What a proof cannot show: that the tree holds all of the data, or that whoever holds the key sorted
it. It binds them to one set of digests, nothing more.
"""

import hashlib
import hmac
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from secure_cnn.archive.certificates.fields import check_fields
from secure_cnn.archive.errors import CertificateError
from secure_cnn.archive.format.core import is_hex

__all__ = ["Absence", "DataRoot", "MerkleTree", "Neighbour", "keyed_digest", "verify_absence"]

_LEAF, _NODE, _ROOT = b"\0", b"\1", b"\2"
_MOST_LEVELS = 62
_MAX_LEAVES = 1 << _MOST_LEVELS
_HASH = 32
_LEAST_KEY = 32


@final
@dataclass(frozen=True, kw_only=True)
class DataRoot:
    """A data set at one time.

    Attributes:
        root: The root of its tree, 64 hexadecimal digits.
        leaves: How many digests are in it, 0 to 2^62.
    """

    root: str
    leaves: int

    def __post_init__(self) -> None:
        check_fields(self)
        if not is_hex(self.root, 32):
            raise CertificateError(
                f"root: expected 64 hexadecimal digits, got {self.root[:80]!r}; give that of "
                "a MerkleTree"
            )
        if not 0 <= self.leaves <= _MAX_LEAVES:
            raise CertificateError(
                f"leaves: expected a number from 0 to {_MAX_LEAVES}, got {self.leaves!r}; give "
                "that of a MerkleTree"
            )


@final
@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A leaf, and what shows that it is in the tree.

    Attributes:
        digest: The leaf, 64 hexadecimal digits.
        position: Its place among the sorted leaves, from 0.
        path: The hashes beside its way to the root, lowest first, as RFC 6962 has them: 64
            hexadecimal digits each, in one text.
    """

    digest: str
    position: int
    path: str

    def __post_init__(self) -> None:
        check_fields(self)
        levels = len(self.path) // (2 * _HASH)
        if not is_hex(self.digest, _HASH) or not is_hex(self.path, _HASH * levels):
            raise CertificateError("a neighbour: expected hashes of 64 hexadecimal digits")
        if levels > _MOST_LEVELS:
            raise CertificateError(
                f"a neighbour: expected a path of at most {_MOST_LEVELS} hashes, got {levels}"
            )
        if not 0 <= self.position <= _MAX_LEAVES:
            raise CertificateError(
                f"a neighbour: expected a position from 0, got {self.position!r}"
            )


@final
@dataclass(frozen=True, kw_only=True)
class Absence:
    """Why a digest is not in a tree: its neighbours, which stand side by side.

    Attributes:
        digest: What is absent, 64 hexadecimal digits.
        left: The last leaf before it; None where it would be the first.
        right: The first leaf behind it; None where it would be the last.
    """

    digest: str
    left: Neighbour | None
    right: Neighbour | None

    def __post_init__(self) -> None:
        check_fields(self)
        if not is_hex(self.digest, 32):
            raise CertificateError("an absence: expected a digest of 64 hexadecimal digits")


@final
class MerkleTree:
    """The sorted tree of a data set.

    A class because every proof needs the inner hashes, which are made once: twice as many hashes as
    leaves.

    Args:
        digests: Of 32 bytes each, in any order; what comes twice counts once.

    Raises:
        CertificateError: One is no 32 bytes.

    Example:
        >>> key = bytes(32)
        >>> tree = MerkleTree(keyed_digest(key, "person", name) for name in (b"ada", b"bob"))
        >>> proof = tree.absence(keyed_digest(key, "person", b"eve"))
        >>> verify_absence(proof, tree.data)
        True
    """

    def __init__(self, digests: Iterable[bytes]) -> None:
        self._leaves = sorted({_checked(each) for each in digests})
        self._levels = [[_hash(_LEAF, each) for each in self._leaves]]
        while len(self._levels[-1]) > 1:
            below = self._levels[-1]
            above = [_hash(_NODE, below[at], below[at + 1]) for at in range(0, len(below) - 1, 2)]
            # A last one without a partner goes up as it is.
            self._levels.append(above + below[len(below) - len(below) % 2 :])

    @property
    def data(self) -> DataRoot:
        """Its root, and how many leaves it has."""
        top = self._levels[-1][0] if self._leaves else b""
        size = len(self._leaves)
        return DataRoot(root=_root(top, size).hex(), leaves=size)

    def absence(self, digest: bytes) -> Absence:
        """Why a digest is not in it.

        Raises:
            CertificateError: It is in it.
        """
        at = bisect_left(self._leaves, _checked(digest))
        if at < len(self._leaves) and self._leaves[at] == digest:
            raise CertificateError(
                f"{digest.hex()}: expected a digest that is not in the data, got one that is; take "
                "it out first"
            )
        return Absence(
            digest=digest.hex(),
            left=self._neighbour(at - 1) if at else None,
            right=self._neighbour(at) if at < len(self._leaves) else None,
        )

    def _neighbour(self, position: int) -> Neighbour:
        path, at = [], position
        for level in self._levels[:-1]:
            if at ^ 1 < len(level):
                path.append(level[at ^ 1].hex())
            at //= 2
        return Neighbour(digest=self._leaves[position].hex(), position=position, path="".join(path))


def keyed_digest(key: bytes, kind: str, item: bytes) -> bytes:
    """HMAC-SHA256 of an item under a key that only the controller has, 32 bytes.

    Who has no key cannot try names or images until one fits. The key is needed for as long as
    somebody may ask whether they are in a certificate, and destroyed with the last of them.

    Args:
        key: 32 random bytes or more, in `secure_cnn.archive` nowhere kept.
        kind: What the item is, `person` or `image`: the same bytes of two kinds differ.
        item: The id or the content.

    Raises:
        CertificateError: The key is shorter, or no bytes.
    """
    if not isinstance(key, bytes) or len(key) < _LEAST_KEY:
        got = f"{len(key)}" if isinstance(key, bytes) else type(key).__name__
        raise CertificateError(
            f"key: expected {_LEAST_KEY} random bytes or more, got {got}; os.urandom(32) makes some"
        )
    name = kind.encode()
    return hmac.digest(key, b"%d:%s:" % (len(name), name) + item, "sha256")


def verify_absence(proof: Absence, data: DataRoot) -> bool:
    """Whether a proof shows, for a tree as `MerkleTree` builds it, that its digest is not in it."""
    left, right = proof.left, proof.right
    if left is None and right is None:
        return data.leaves == 0 and data.root == _root(b"", 0).hex()
    if left is not None and not (left.digest < proof.digest and _is_in(left, data)):
        return False
    if right is not None and not (proof.digest < right.digest and _is_in(right, data)):
        return False
    before = -1 if left is None else left.position
    after = data.leaves if right is None else right.position
    return before + 1 == after


def _is_in(leaf: Neighbour, data: DataRoot) -> bool:
    """Whether the leaf is at its place in the tree: RFC 9162, section 2.1.3.2."""
    at, last = leaf.position, data.leaves - 1
    if at > last:
        return False
    found = _hash(_LEAF, bytes.fromhex(leaf.digest))
    path = bytes.fromhex(leaf.path)
    for start in range(0, len(path), _HASH):
        beside = path[start : start + _HASH]
        if last == 0:
            return False
        if at % 2 or at == last:
            found = _hash(_NODE, beside, found)
            while at % 2 == 0 and at:
                at, last = at // 2, last // 2
        else:
            found = _hash(_NODE, found, beside)
        at, last = at // 2, last // 2
    return last == 0 and _root(found, data.leaves).hex() == data.root


def _root(top: bytes, size: int) -> bytes:
    return _hash(_ROOT, size.to_bytes(8, "big"), top)


def _hash(prefix: bytes, *parts: bytes) -> bytes:
    return hashlib.sha256(prefix + b"".join(parts)).digest()


def _checked(digest: bytes) -> bytes:
    if not isinstance(digest, bytes) or len(digest) != 32:
        got = f"{len(digest)}" if isinstance(digest, bytes) else type(digest).__name__
        raise CertificateError(f"a digest: expected 32 bytes, got {got}; make it by keyed_digest")
    return digest
