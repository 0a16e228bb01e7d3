"""Sealed files: save, load, inspect, verify and decrypt.

Here the parts meet, in this order when reading: lengths against limits and file size; signature and
trust; file key and MAC; expected claims; then payload, each segment against its signed hash before
it is decrypted. Nothing is handed out before all of it held. Sequences of files are deliberately
not here.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeAlias

import torch

from secure_cnn.archive.claims import JSON, canonical_json, check_claims
from secure_cnn.archive.errors import (
    InvalidKey,
    LimitExceeded,
    StateError,
    StorageError,
    Tampered,
    Truncated,
    UntrustedSigner,
)
from secure_cnn.archive.header import (
    FIXED_LENGTH,
    MAX_HEADER,
    Core,
    Header,
    derive_key,
    hash_core,
    header_length,
    parse_header,
    read_lengths,
    seal_header,
)
from secure_cnn.archive.info import ArchiveInfo, describe
from secure_cnn.archive.keys import SlotReader, SlotWriter
from secure_cnn.archive.output import new_file
from secure_cnn.archive.payload import (
    Layout,
    decrypt_file,
    decrypt_memory,
    encrypt_file,
    hash_file,
    read_at,
    write_at,
)
from secure_cnn.archive.pieces import Pieces
from secure_cnn.archive.signatures import (
    SIGNATURE_LENGTH,
    Signer,
    Verifier,
    leaf_hash,
    merkle_root,
)
from secure_cnn.archive.slots import SlotKind
from secure_cnn.archive.state import State, decode_state, encode_state
from secure_cnn.archive.stream import HEADER_LENGTH, Floe, create_stream, open_stream

__all__ = ["decrypt", "inspect", "load", "save", "verify"]

_Path: TypeAlias = str | os.PathLike[str]

_SEGMENT_LENGTH = 1 << 20


def save(
    path: _Path,
    state: State,
    *,
    recipients: Sequence[SlotWriter],
    signer: Signer | None = None,
    claims: Mapping[str, JSON] | None = None,
    name: str = "",
    overwrite: bool = False,
    segment_length: int = _SEGMENT_LENGTH,
) -> None:
    """Encrypts a state to recipients, signs it, and puts it at `path` whole or not at all.

    Args:
        path: Where the file goes.
        state: A tree of dict, list, tuple, plain data and tensors; see `encode_state`. A flat dict
            of tensors keeps its names.
        recipients: Who can open the file: 1 to 256 of `Recipient` and `Passphrase`. Hybrid and
            X25519 recipients do not mix, since the file would be no stronger than the weaker.
        signer: Who vouches for it. Without one, `load(trusted=…)` will refuse the file.
        claims: A JSON object that everyone can read, bound into MAC, payload and signature.
        name: A logical name that everyone can read.
        overwrite: Whether a file at `path` may be replaced.
        segment_length: Bytes of an encrypted segment, 4 KiB to 64 MiB.

    Raises:
        StateError: State or claims hold something that the format cannot; the message has its path.
        InvalidKey: No recipients, or a mix.
        LimitExceeded: Too many recipients or claims, or a segment length outside its range.
        StorageError: There is a file already, or the operating system refuses.

    Example:
        >>> import tempfile, secure_cnn.archive as archive
        >>> me, state = archive.generate_identity(), {"weight": torch.ones(2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(f"{folder}/m.sealed", state, recipients=[me.recipient])
        ...     archive.load(f"{folder}/m.sealed", identity=me)
        {'weight': tensor([1., 1.])}
    """
    _check_recipients(recipients)
    plaintext = Pieces(encode_state(state))
    core = _core(
        len(plaintext), segment_length, [who.kind for who in recipients], signer, claims, name
    )
    file_key = os.urandom(32)
    core_hash = hash_core(core.to_bytes())
    slots = [who.wrap(file_key, core_hash) for who in recipients]
    floe = create_stream(derive_key(file_key, b"payload"), core_hash, segment_length)
    layout = _layout(core)
    length = layout.end + _footer_length(core)
    with new_file(path, length=length, overwrite=overwrite, mode=0o666) as fd:
        leaves = encrypt_file(fd, layout, floe, plaintext, hashed=signer is not None)
        if signer is not None:
            root = merkle_root(leaves)
            footer = b"".join(leaves) + root + signer.sign(core_hash, root)
            write_at(fd, memoryview(footer), layout.end)
        write_at(fd, memoryview(seal_header(core, slots, file_key)), 0)


def load(
    path: _Path,
    *,
    identity: SlotReader,
    trusted: Sequence[Verifier] | None = None,
    expect: Mapping[str, object] | None = None,
) -> State:
    """The state in a sealed file, after everything about it held.

    Args:
        path: A sealed file. A plain file is never accepted.
        identity: An `Identity` or a `Passphrase`.
        trusted: If given, the file must be signed by one of these, which is checked before anything
            is decrypted. If None, a signature that is there must still hold, but says nothing about
            who made the file.
        expect: Claims that must be in the file with these values, compared before the payload is
            decrypted.

    Returns:
        The tree that was saved; its tensors are in main memory.

    Raises:
        ArchiveError: One of its members: `NotSealed`, `UnsupportedVersion`, `LimitExceeded`,
            `Truncated`, `UntrustedSigner`, `Tampered`, `WrongKey`, `ClaimMismatch`, `StateError` or
            `StorageError`.

    Example:
        >>> import tempfile, secure_cnn.archive as archive
        >>> me, signer = archive.generate_identity(), archive.generate_signer()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(
        ...         f"{folder}/m", {"step": 7}, recipients=[me.recipient], signer=signer,
        ...         claims={"epsilon": 3.0})
        ...     archive.load(
        ...         f"{folder}/m", identity=me, trusted=[signer.verifier], expect={"epsilon": 3.0})
        {'step': 7}
    """
    with _opened(path) as fd:
        layout, floe, leaves = _unlock(fd, identity, trusted, expect)
        try:
            target = torch.empty(layout.plaintext_length, dtype=torch.uint8)
        except RuntimeError as error:
            raise LimitExceeded(f"{path}: no memory for {layout.plaintext_length} bytes") from error
        decrypt_memory(fd, layout, floe, leaves, target.numpy().data)
    return decode_state(target)


def decrypt(
    path: _Path,
    out: _Path,
    *,
    identity: SlotReader,
    trusted: Sequence[Verifier] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the plain safetensors file inside a sealed file, with mode 0600, whole or not at all.

    Args:
        path: A sealed file.
        out: Where the plain file goes.
        identity: As for `load`.
        trusted: As for `load`.
        overwrite: Whether a file at `out` may be replaced.

    Raises:
        ArchiveError: As for `load`; `StorageError` if there is a file at `out`.

    Example:
        >>> import tempfile, safetensors.torch, secure_cnn.archive as archive
        >>> me, state = archive.generate_identity(), {"weight": torch.ones(2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(f"{folder}/m.sealed", state, recipients=[me.recipient])
        ...     archive.decrypt(f"{folder}/m.sealed", f"{folder}/m.safetensors", identity=me)
        ...     safetensors.torch.load_file(f"{folder}/m.safetensors")
        {'weight': tensor([1., 1.])}
    """
    with _opened(path) as fd:
        layout, floe, leaves = _unlock(fd, identity, trusted, None)
        length = layout.plaintext_length
        with new_file(out, length=length, overwrite=overwrite, mode=0o600) as plain:
            decrypt_file(fd, layout, floe, leaves, plain)


def inspect(path: _Path) -> ArchiveInfo:
    """What a sealed file says in clear; needs no key and checks no signature.

    Raises:
        ArchiveError: The file is not sealed, is cut short, or its head is malformed.

    Example:
        >>> import tempfile, secure_cnn.archive as archive
        >>> me = archive.generate_identity()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(f"{folder}/m", {}, recipients=[me.recipient], claims={"epsilon": 3.0})
        ...     info = archive.inspect(f"{folder}/m")
        >>> info.claims, info.verified
        ({'epsilon': 3.0}, False)
    """
    with _opened(path) as fd:
        return describe(_read_header(fd), os.fstat(fd).st_size, verified=False)


def verify(path: _Path, *, trusted: Sequence[Verifier]) -> ArchiveInfo:
    """What a sealed file says, after a trusted signature held over core and payload.

    Needs no decryption key. The slots are not signed, so that they can be exchanged: who can open
    the file is not verified, what it holds is.

    Args:
        path: A sealed file.
        trusted: Whose signatures count.

    Raises:
        UntrustedSigner: The file is unsigned, or signed by someone else.
        Tampered: The signature does not hold, or the payload is not what was signed.
        ArchiveError: As for `inspect`.

    Example:
        >>> import tempfile, secure_cnn.archive as archive
        >>> me, signer = archive.generate_identity(), archive.generate_signer()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(f"{folder}/m", {}, recipients=[me.recipient], signer=signer)
        ...     archive.verify(f"{folder}/m", trusted=[signer.verifier]).verified
        True
    """
    with _opened(path) as fd:
        header = _read_header(fd)
        _check_trust(header.core, trusted)
        if _signed_leaves(fd, header) != hash_file(fd, _layout(header.core)):
            raise Tampered("the payload is not the one that was signed; get the file again")
        return describe(header, os.fstat(fd).st_size, verified=True)


def _check_recipients(recipients: Sequence[SlotWriter]) -> None:
    """Refuses sets of recipients that protect nothing, or less than they seem to."""
    kinds = {who.kind for who in recipients}
    if not kinds:
        raise InvalidKey("expected at least one recipient, got none; nobody could open the file")
    if {SlotKind.HYBRID, SlotKind.X25519} <= kinds:
        raise InvalidKey(
            "expected recipients that are all hybrid or all X25519, got both: the file would be no "
            "stronger than X25519; make a hybrid identity for everyone"
        )


def _core(
    length: int,
    segment_length: int,
    kinds: Sequence[SlotKind],
    signer: Signer | None,
    claims: Mapping[str, JSON] | None,
    name: str,
) -> Core:
    """The core of a new file."""
    if not isinstance(name, str):
        raise StateError(f"name: expected text, got {type(name).__name__}")
    core = Core(
        file_id=os.urandom(32).hex(),
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        name=name,
        claims=json.loads(canonical_json(dict(claims or {}), "claims")),
        plaintext_length=length,
        segment_length=segment_length,
        payload_offset=MAX_HEADER,
        signer=signer.verifier.public.hex() if signer else None,
    )
    # The offset is part of what it counts; MAX_HEADER has as many digits as an offset can have.
    return replace(core, payload_offset=header_length(len(core.to_bytes()), kinds))


@contextlib.contextmanager
def _opened(path: _Path) -> Iterator[int]:
    """A regular file open for reading, whose errors are ours."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise StorageError(f"{path}: expected a regular file")
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError(f"{path}: cannot read: {error.strerror}") from error


def _read_header(fd: int) -> Header:
    """The head of an open file, with every length checked against the limits and the file."""
    size = os.fstat(fd).st_size
    fixed = read_at(fd, min(size, FIXED_LENGTH), 0)
    read_lengths(fixed)
    header = parse_header(read_at(fd, min(size, MAX_HEADER), 0))
    expected = _layout(header.core).end + _footer_length(header.core)
    if size < expected:
        raise Truncated(f"expected a file of {expected} bytes, got {size}; get it again")
    if size > expected:
        raise Tampered(f"expected a file of {expected} bytes, got {size}; get it again")
    return header


def _layout(core: Core) -> Layout:
    """Where the payload of a file lies."""
    return Layout(
        offset=core.payload_offset,
        segment_length=core.segment_length,
        plaintext_length=core.plaintext_length,
    )


def _footer_length(core: Core) -> int:
    """Bytes behind the payload: leaf hashes, root and signature, or nothing."""
    return 0 if core.signer is None else 32 * (core.segments + 1) + 32 + SIGNATURE_LENGTH


def _check_trust(core: Core, trusted: Sequence[Verifier]) -> None:
    """Passes if the named signer is one of the trusted; the signature is checked elsewhere."""
    if core.signer is None:
        raise UntrustedSigner("the file is not signed; ask its maker for a signed one")
    signer = Verifier(bytes.fromhex(core.signer))
    if signer not in trusted:
        raise UntrustedSigner(
            f"signed by {signer!r}, who is not among the {len(trusted)} trusted; "
            "add that verifier only if you know whose it is"
        )


def _signed_leaves(fd: int, header: Header) -> list[bytes]:
    """The leaf hashes that the named signer signed together with the core; empty if unsigned."""
    core = header.core
    if core.signer is None:
        return []
    footer = read_at(fd, _footer_length(core), _layout(core).end)
    hashes_end = 32 * (core.segments + 1)
    leaves = [footer[at : at + 32] for at in range(0, hashes_end, 32)]
    root = footer[hashes_end : hashes_end + 32]
    if merkle_root(leaves) != root:
        raise Tampered("the hashes of the payload were changed; get the file again")
    Verifier(bytes.fromhex(core.signer)).check(footer[hashes_end + 32 :], header.core_hash, root)
    return leaves


def _unlock(
    fd: int,
    identity: SlotReader,
    trusted: Sequence[Verifier] | None,
    expect: Mapping[str, object] | None,
) -> tuple[Layout, Floe, list[bytes]]:
    """Everything needed to decrypt, after all that can be checked before decrypting was checked."""
    header = _read_header(fd)
    if trusted is not None:
        _check_trust(header.core, trusted)
    leaves = _signed_leaves(fd, header)
    file_key = identity.unwrap(header.slots, header.core_hash)
    header.check_mac(file_key)
    check_claims(header.core.claims, expect or {})
    layout = _layout(header.core)
    stream_header = read_at(fd, HEADER_LENGTH, layout.offset)
    if leaves and leaf_hash(stream_header) != leaves[0]:
        raise Tampered("the payload is not the one that was signed; get the file again")
    floe = open_stream(derive_key(file_key, b"payload"), header.core_hash, stream_header)
    if floe.segment_length != layout.segment_length:
        raise Tampered("the payload has another segment length than the header; get the file again")
    return layout, floe, leaves
