"""From a path to a payload: everything that is checked before the first byte is decrypted.

In this order: lengths against limits and file size; the core hash that was asked for; signature and
trust; file key and MAC; public claims; the stream's header. Nothing is skipped for any caller.
"""

import os
from collections.abc import Mapping, Sequence

from secure_cnn.archive.errors import (
    InvalidKey,
    RolledBack,
    StateError,
    Tampered,
    Truncated,
    UntrustedSigner,
)
from secure_cnn.archive.format.claims import check_claims
from secure_cnn.archive.format.core import Core
from secure_cnn.archive.format.header import (
    FIXED_LENGTH,
    Header,
    derive_key,
    head_length,
    parse_header,
    read_lengths,
)
from secure_cnn.archive.format.payload import Payload, leaf_hash, merkle_root, read_at
from secure_cnn.archive.format.slots import AnyIdentity
from secure_cnn.archive.format.stream import HEADER_LENGTH, Layout, open_stream
from secure_cnn.archive.keys import check_identity, check_trusted
from secure_cnn.archive.keys.signatures import Verifier, footer_lengths

__all__ = ["footer_length", "layout_of", "read_header", "signed_leaves", "signer_of", "unlock"]


def layout_of(header: Header) -> Layout:
    """Where the payload of a file lies."""
    return Layout(
        offset=header.payload_offset,
        segment_length=header.core.segment_length,
        plaintext_length=header.core.plaintext_length,
    )


def footer_length(core: Core) -> int:
    """Bytes of leaf hashes, root, public key and signature; none if unsigned."""
    if core.signer is None:
        return 0
    return 32 * (core.segments + 2) + sum(footer_lengths(core.signer))


def read_header(fd: int) -> Header:
    """The head of an open file, with every length checked against the limits and the file."""
    size = os.fstat(fd).st_size
    length = min(size, head_length(*read_lengths(read_at(fd, min(size, FIXED_LENGTH), 0))))
    try:
        header = parse_header(read_at(fd, length, 0))
    except Tampered:
        # A change of recipients may have been written while we read: each of its states is valid.
        header = parse_header(read_at(fd, length, 0))
    expected = layout_of(header).end + footer_length(header.core)
    if size != expected:
        kind = Truncated if size < expected else Tampered
        raise kind(f"expected a file of {expected} bytes, got {size}; get it again")
    return header


def signer_of(fd: int, header: Header) -> Verifier | None:
    """The key that the core names as its signer's, from the footer; None if unsigned."""
    core = header.core
    if core.signer is None:
        return None
    public_length, _ = footer_lengths(core.signer)
    at = layout_of(header).end + 32 * (core.segments + 2)
    try:
        verifier = Verifier(read_at(fd, public_length, at))
    except InvalidKey:
        verifier = None
    if verifier is None or verifier.signer_id != core.signer:
        raise Tampered("the signer's key is not the one in the core; get the file again")
    return verifier


def signed_leaves(fd: int, header: Header, trusted: Sequence[Verifier] | None) -> list[bytes]:
    """The leaf hashes that the signer signed together with the core; empty if unsigned.

    Without `trusted` no signature is demanded, but one that is there must hold.
    """
    found = None if trusted is None else check_trusted(trusted)
    signer = signer_of(fd, header)
    if found is not None:
        _check_signer(signer, found)
    if signer is None:
        return []
    footer = read_at(fd, footer_length(header.core), layout_of(header).end)
    hashes_end = 32 * (header.core.segments + 1)
    leaves = [footer[at : at + 32] for at in range(0, hashes_end, 32)]
    root = footer[hashes_end : hashes_end + 32]
    if merkle_root(leaves) != root:
        raise Tampered("the hashes of the payload were changed; get the file again")
    signer.check(footer[hashes_end + 32 + len(signer.public) :], header.core_hash, root)
    return leaves


def unlock(
    fd: int,
    *,
    identity: AnyIdentity,
    trusted: Sequence[Verifier] | None,
    expect: Mapping[str, object],
    core_hash: str | None,
) -> tuple[Header, Payload]:
    """Head and payload, after all that can be checked before decrypting was checked.

    No argument has a default, so that no caller leaves a check out without saying so.
    """
    identity, trusted = check_identity(identity), trusted and check_trusted(trusted)
    _check_wanted(expect, core_hash)
    header = read_header(fd)
    if core_hash is not None and header.core_hash.hex() != core_hash:
        raise RolledBack(
            f"expected the file with core hash {core_hash}, got {header.core_hash.hex()}; "
            "an older or another file was put in its place"
        )
    leaves = signed_leaves(fd, header, trusted)
    file_key, _ = header.unlock(identity)
    public = header.core.claims
    check_claims(public, {name: value for name, value in expect.items() if name in public})
    layout = layout_of(header)
    stream_header = read_at(fd, HEADER_LENGTH, layout.offset)
    if leaves and leaf_hash(stream_header) != leaves[0]:
        raise Tampered("the payload is not the one that was signed; get the file again")
    if int.from_bytes(stream_header[2:6], "big") != layout.segment_length:
        raise Tampered("the payload has another segment length than the header; get the file again")
    floe = open_stream(derive_key(file_key, b"payload"), header.core_hash, stream_header)
    return header, Payload(fd, layout, floe, leaves)


def _check_signer(signer: Verifier | None, trusted: Sequence[Verifier]) -> None:
    if signer is None:
        raise UntrustedSigner(
            "the file is not signed, expected a signature of someone trusted; get a signed one, or "
            "name nobody to trust if who made it does not matter"
        )
    if signer not in trusted:
        raise UntrustedSigner(
            f"signed by {signer!r}, who is not among the {len(trusted)} trusted; "
            "add that verifier only if you know whose it is"
        )


def _check_wanted(expect: object, core_hash: object) -> None:
    """Refuses what no file could answer, before it reads like a changed one."""
    if not isinstance(expect, Mapping):
        raise StateError(
            f"expect: expected a dict of claims with their values, got {type(expect).__name__}; "
            "give {name: value}"
        )
    if not isinstance(core_hash, str | None):
        raise StateError(
            "core_hash: expected 64 hexadecimal digits, as inspect has them, got "
            f"{type(core_hash).__name__}"
        )
