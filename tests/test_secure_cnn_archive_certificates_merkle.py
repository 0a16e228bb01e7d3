"""Trees of data sets, against a tree written down as RFC 6962 defines it, and forged proofs."""

import hashlib
import hmac
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secure_cnn.archive import CertificateError
from secure_cnn.archive.certificates import (
    Absence,
    DataRoot,
    MerkleTree,
    Neighbour,
    keyed_digest,
    verify_absence,
)

# Of few values, so that neighbours, ends and repetitions come up.
DIGESTS = st.integers(0, 40).map(lambda number: number.to_bytes(32, "big"))
SETS = st.sets(DIGESTS, max_size=30)


def hashed(*parts):
    """SHA-256 of parts in a row."""
    return hashlib.sha256(b"".join(parts)).digest()


def top(leaves):
    """MTH of RFC 6962, section 2.1, word for word; of no leaves it is empty here."""
    if len(leaves) < 2:
        return hashed(b"\0", leaves[0]) if leaves else b""
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashed(b"\1", top(leaves[:half]), top(leaves[half:]))


def path(position, leaves):
    """PATH of RFC 6962, section 2.1.1."""
    if len(leaves) == 1:
        return []
    half = 1 << (len(leaves) - 1).bit_length() - 1
    if position < half:
        return [*path(position, leaves[:half]), top(leaves[half:])]
    return [*path(position - half, leaves[half:]), top(leaves[:half])]


def neighbour(position, leaves):
    """A leaf with a valid path, in a tree of these leaves in any order."""
    return Neighbour(
        digest=leaves[position].hex(),
        position=position,
        path="".join(each.hex() for each in path(position, leaves)),
    )


def test_the_tree_is_that_of_the_standard():
    """Sides written apart agree, for every size up to 70 and every place in it."""
    for size in range(71):
        leaves = sorted(hashed(bytes([number])) for number in range(size))
        tree = MerkleTree(reversed(leaves))
        root = hashed(b"\2", size.to_bytes(8, "big"), top(leaves))
        assert tree.data == DataRoot(root=root.hex(), leaves=size)
        for at, leaf in enumerate(leaves):
            below = (int.from_bytes(leaf, "big") - 1).to_bytes(32, "big")
            assert tree.absence(below).right == neighbour(at, leaves)


@given(SETS, DIGESTS)
def test_what_is_absent_is_proven_absent(leaves, digest):
    """And what is there has no proof."""
    tree = MerkleTree(leaves)
    if digest in leaves:
        with pytest.raises(CertificateError, match="not in the data"):
            tree.absence(digest)
    else:
        assert verify_absence(tree.absence(digest), tree.data)


@given(st.lists(DIGESTS), st.randoms())
def test_order_and_repetition_make_no_difference(digests, random):
    """A set of digests has one root."""
    other = [*digests, *digests[:3]]
    random.shuffle(other)
    assert MerkleTree(digests).data == MerkleTree(other).data


@given(SETS, SETS)
def test_another_set_has_another_root(one, other):
    """Also one leaf more, and none."""
    assume(one != other)
    assert MerkleTree(one).data.root != MerkleTree(other).data.root


@given(SETS.filter(bool), st.data())
def test_what_is_there_never_verifies_absent(leaves, data):
    """Whatever valid neighbours are put together, in order or not, one or two."""
    tree, ordered = MerkleTree(leaves), sorted(leaves)
    places = st.none() | st.integers(0, len(ordered) - 1)
    left, right = data.draw(places), data.draw(places)
    present = data.draw(st.sampled_from(ordered))
    proof = Absence(
        digest=present.hex(),
        left=None if left is None else neighbour(left, ordered),
        right=None if right is None else neighbour(right, ordered),
    )
    assert not verify_absence(proof, tree.data)


@given(SETS.filter(lambda each: len(each) > 2), DIGESTS, st.data())
def test_neighbours_that_are_not_side_by_side_prove_nothing(leaves, digest, data):
    """Real leaves around the digest with another one between them, or an end that is none."""
    assume(digest not in leaves)
    tree, ordered = MerkleTree(leaves), sorted(leaves)
    right = sum(each < digest for each in ordered)
    left = data.draw(st.integers(-1, right - 1))
    far = data.draw(st.integers(right, len(ordered)))
    assume((left, far) != (right - 1, right))
    proof = Absence(
        digest=digest.hex(),
        left=None if left < 0 else neighbour(left, ordered),
        right=None if far == len(ordered) else neighbour(far, ordered),
    )
    assert not verify_absence(proof, tree.data)


@given(SETS.filter(lambda each: len(each) > 1), DIGESTS, st.data())
def test_no_part_of_a_proof_may_be_another(leaves, digest, data):
    """Position, leaf, a hash of the path, its length, the number of leaves, the root."""
    assume(digest not in leaves)
    tree = MerkleTree(leaves)
    proof, known = tree.absence(digest), tree.data
    side = data.draw(st.sampled_from([each for each in ("left", "right") if getattr(proof, each)]))
    leaf = getattr(proof, side)
    at = 64 * data.draw(st.integers(0, len(leaf.path) // 64 - 1)) if leaf.path else 0
    others = [
        replace(leaf, position=data.draw(st.integers(0, 50).filter(leaf.position.__ne__))),
        replace(leaf, digest=hashed(b"other").hex()),
        replace(leaf, path=leaf.path + leaf.digest),
        replace(leaf, path=leaf.path[:at] + "0" * 64 + leaf.path[at + 64 :]),
        replace(leaf, path=leaf.path[64:]) if leaf.path else replace(leaf, position=51),
    ]
    for other in others:
        assert not verify_absence(replace(proof, **{side: other}), known)
    assert not verify_absence(proof, replace(known, leaves=data.draw(st.integers(51, 1 << 62))))
    assert not verify_absence(proof, replace(known, root="0" * 64))


def test_the_number_of_leaves_is_bound():
    """Of a tree of three the two on the left are no tree of two, though their hash is a node."""
    one, two, three = (bytes([number]) * 32 for number in (1, 2, 3))
    pair, whole = MerkleTree([one, two]), MerkleTree([one, two, three])
    assert path(2, [one, two, three]) == [top([one, two])]
    absent = pair.absence(three)
    assert verify_absence(absent, pair.data)
    assert not verify_absence(absent, whole.data)
    assert not verify_absence(absent, replace(pair.data, root=whole.data.root))
    assert not verify_absence(absent, replace(whole.data, leaves=2))


def test_a_node_passes_for_no_leaf():
    """Control: without the prefixes the two hashes below would be one leaf."""
    one, two = bytes([1]) * 32, bytes([2]) * 32
    inner = top([one, two])
    assert MerkleTree([inner]).data.root != MerkleTree([one, two]).data.root


def test_nothing_is_absent_from_no_data_only():
    """The tree of no leaves proves all absent; a proof without neighbours proves nothing else."""
    empty, full = MerkleTree([]), MerkleTree([bytes(32)])
    proof = empty.absence(bytes([1]) * 32)
    assert (proof.left, proof.right) == (None, None)
    assert verify_absence(proof, empty.data)
    assert not verify_absence(proof, full.data)
    assert not verify_absence(proof, replace(full.data, leaves=0))


@settings(max_examples=30)
@given(st.binary(min_size=32, max_size=64), st.text(max_size=5), st.binary(max_size=40))
def test_digests_are_hmacs(key, kind, item):
    """By the textbook's two hashes; of another key, kind or item it is another."""
    found = keyed_digest(key, kind, item)
    name = kind.encode()
    message = str(len(name)).encode() + b":" + name + b":" + item
    assert found == hmac.new(key, message, hashlib.sha256).digest()
    assert found != keyed_digest(key + b"1", kind, item)
    assert found != keyed_digest(key, kind + "1", item)
    assert found != keyed_digest(key, kind, item + b"1")


def test_kind_and_item_cannot_be_shifted():
    """What ends the one does not begin the other."""
    key = bytes(32)
    assert keyed_digest(key, "a:b", b"c") != keyed_digest(key, "a", b"b:c")
    assert keyed_digest(key, "", b"1:a:c") != keyed_digest(key, "a", b"c")


@pytest.mark.parametrize(
    "call",
    [
        lambda: keyed_digest(bytes(31), "person", b"ada"),
        lambda: keyed_digest("text" * 20, "person", b"ada"),
        lambda: MerkleTree([b"short"]),
        lambda: MerkleTree(["0" * 64]),
        lambda: MerkleTree([]).absence(b"short"),
        lambda: DataRoot(root="x" * 64, leaves=1),
        lambda: DataRoot(root="0" * 64, leaves=-1),
        lambda: DataRoot(root="0" * 64, leaves=True),
        lambda: Neighbour(digest="0" * 64, position=-1, path=""),
        lambda: Neighbour(digest="0" * 64, position=0, path="0" * 64 * 63),
        lambda: Neighbour(digest="0" * 64, position=0, path="0" * 65),
        lambda: Absence(digest="A" * 64, left=None, right=None),
    ],
)
def test_wrong_parts_are_refused(call):
    """A short key, digests that are none, places that are none."""
    with pytest.raises(CertificateError):
        call()
