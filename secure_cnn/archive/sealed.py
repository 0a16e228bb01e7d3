"""Sealed files: save, load, decrypt, inspect and verify.

Here the parts meet. When reading, everything in `opening` comes first; then the payload, each
segment against its signed hash before it is decrypted; then the safetensors file. Nothing is handed
out before all of it held. Sequences of files are in `store`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence

import torch

from secure_cnn.archive.errors import StateError, Tampered
from secure_cnn.archive.format.claims import JSON, check_claims, copy_claims
from secure_cnn.archive.format.core import Lineage
from secure_cnn.archive.format.header import copy_length_for, seal_prefix
from secure_cnn.archive.format.payload import Payload, Progress, hash_file
from secure_cnn.archive.format.pieces import Pieces
from secure_cnn.archive.format.slots import SlotKind, SlotReader, SlotWriter
from secure_cnn.archive.format.state import (
    State,
    build_state,
    decode_state,
    encode_state,
    index_of,
    named_tensors,
)
from secure_cnn.archive.info import ArchiveInfo, describe
from secure_cnn.archive.keys.doors import check_recipients, check_signer
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.lazy import empty_bytes, open_lazy, read_index, read_tensor
from secure_cnn.archive.opening import (
    Path,
    layout_of,
    opened,
    read_header,
    signed_leaves,
    signer_of,
    unlock,
)
from secure_cnn.archive.output import new_file
from secure_cnn.archive.sealing import new_core, write_sealed

__all__ = ["check", "decrypt", "inspect", "load", "save", "verify"]

_SEGMENT_LENGTH = 1 << 20


def save(  # noqa: PLR0913  (each is one decision of who saves)
    path: Path,
    state: State,
    *,
    recipients: Sequence[SlotWriter],
    signer: Signer | None = None,
    claims: Mapping[str, JSON] | None = None,
    private_claims: Mapping[str, JSON] | None = None,
    name: str = "",
    lineage: Lineage | None = None,
    overwrite: bool = False,
    segment_length: int = _SEGMENT_LENGTH,
    progress: Progress | None = None,
) -> None:
    """Encrypts a state to recipients, signs it, and puts it at `path` whole or not at all.

    Args:
        path: Where the file goes.
        state: A tree of dict, list, tuple, plain data and tensors; see `encode_state`. A flat dict
            of tensors keeps its names. One tensor, number, text or None is a tree too.
        recipients: Who can open the file: 1 to 256 of `Recipient`, `Passphrase`,
            `KeyEncryptionKey` and `ServiceKey`. Hybrid and X25519 recipients do not mix, since the
            file would be no stronger than the weaker.
        signer: Who vouches for it. Without one, `load(trusted=…)` will refuse the file.
        claims: A JSON object that everyone can read, bound into MAC, payload and signature.
        private_claims: A JSON object that recipients only can read, bound as the tensors are. It
            has no key in common with `claims`.
        name: A logical name that everyone can read.
        lineage: Where the file stands in a sequence; everyone can read it.
        overwrite: Whether a file at `path` may be replaced.
        segment_length: Bytes of an encrypted segment, 4 KiB to 64 MiB.
        progress: Called now and then with the bytes encrypted so far, and those there are in all.
            What it raises ends the save, and no file is left.

    Raises:
        StateError: State, claims or lineage hold something that the format cannot; the message has
            its path.
        InvalidKey: No recipients, a mix, or what is no recipient or signer.
        KeyServiceError: A key service did not wrap the file key.
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
    recipients, signer = check_recipients(recipients), check_signer(signer)
    public, private = _apart(claims, private_claims)
    plaintext = Pieces(encode_state(state, private))
    core = new_core(
        name=name,
        lineage=lineage,
        claims=public,
        recipients=recipients,
        signer=signer,
        plaintext_length=len(plaintext),
        segment_length=segment_length,
    )
    write_sealed(
        path,
        core,
        plaintext,
        recipients=recipients,
        signer=signer,
        overwrite=overwrite,
        progress=progress,
    )


def check(
    state: State = None,
    *,
    claims: Mapping[str, JSON] | None = None,
    private_claims: Mapping[str, JSON] | None = None,
    name: str = "",
    recipients: Sequence[SlotWriter] = (),
) -> None:
    """Passes if `save`, and `save_plain`, will take these: to be asked before hours of work.

    Cheap: the bytes of tensors are not looked at, and nothing is written. What remains for `save`
    to refuse is the disk, and a bool tensor with bytes that are none.

    Args:
        state: As for `save`; with tensors of the types that it will have.
        claims: As for `save`.
        private_claims: As for `save`.
        name: As for `save`.
        recipients: As for `save`; with none, one is thought of.

    Raises:
        InvalidKey: The recipients do not mix, or are none.
        StateError: State, claims or name hold something that the format cannot.
        LimitExceeded: The claims are too long.

    Example:
        >>> check({"weight": torch.ones(2)}, claims={"epsilon": float("nan")})
        Traceback (most recent call last):
        ...
        secure_cnn.archive.errors.StateError: claims.epsilon: expected plain JSON ...
    """
    named_tensors(state)
    recipients = check_recipients(recipients)
    public, _ = _apart(claims, private_claims)
    core = new_core(
        name=name,
        lineage=None,
        claims=public,
        recipients=recipients,
        signer=None,
        plaintext_length=0,
        segment_length=_SEGMENT_LENGTH,
    )
    seal_prefix(core, copy_length_for([who.kind for who in recipients] or [SlotKind.HYBRID]))


def load(
    path: Path,
    *,
    identity: SlotReader,
    trusted: Sequence[Verifier] | None = None,
    expect: Mapping[str, object] | None = None,
    core_hash: str | None = None,
    only: Sequence[str] | None = None,
) -> State:
    """The state in a sealed file, after everything about it held.

    Args:
        path: A sealed file. A plain file is never accepted.
        identity: An `Identity`, a `Passphrase`, a `KeyEncryptionKey` or a `ServiceKey`.
        trusted: If given, the file must be signed by one of these, which is checked before anything
            is decrypted: to trust somebody is to require a signature, and an empty list refuses
            every file. If None, a signature that is there must still hold, but says nothing about
            who made the file.
        expect: Claims that must be in the file with these values. Public ones are compared before
            the payload is decrypted, private ones before anything is handed out.
        core_hash: The core hash the file must have, from `inspect`, `verify` or the lineage of its
            successor: whatever was decided on that is then true of what is loaded.
        only: Names of tensors; then the state is a dict of these, and the segments of others are
            not read. None loads everything.

    Returns:
        The tree that was saved; its tensors are in main memory.

    Raises:
        ArchiveError: One of its members: `NotSealed`, `UnsupportedVersion`, `LimitExceeded`,
            `Truncated`, `RolledBack`, `UntrustedSigner`, `Tampered`, `WrongKey`,
            `KeyServiceError`, `ClaimMismatch`, `StateError` or `StorageError`; `InvalidKey` where
            identity or trusted are something else.

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
    wanted = expect or {}
    if only is not None:
        if isinstance(only, str) or not isinstance(only, Iterable):
            raise StateError(f"only: expected a list of names, got {type(only).__name__}")
        with open_lazy(
            path, identity=identity, trusted=trusted, expect=wanted, core_hash=core_hash
        ) as file:
            return {name: file.tensor(name) for name in only}
    with opened(path) as fd:
        header, payload = unlock(
            fd, identity=identity, trusted=trusted, expect=wanted, core_hash=core_hash
        )
        target = empty_bytes(payload.layout.plaintext_length)
        payload.read_into(target.numpy().data)
    if wanted.keys() - header.core.claims.keys():
        check_claims({**index_of(target).claims, **header.core.claims}, wanted)
    return decode_state(target)


def decrypt(
    path: Path,
    out: Path,
    *,
    identity: SlotReader,
    trusted: Sequence[Verifier] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the plain safetensors file inside a sealed file, with mode 0600, whole or not at all.

    Args:
        path: A sealed file.
        out: Where the plain file goes.
        identity: As for `load`.
        trusted: As for `load`.
        overwrite: Whether a file at `out` may be replaced.
        progress: Called now and then with the bytes decrypted so far, and those there are in all.

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
    with opened(path) as fd:
        _, payload = unlock(fd, identity=identity, trusted=trusted, expect={}, core_hash=None)
        length = payload.layout.plaintext_length
        with new_file(out, length=length, overwrite=overwrite, mode=0o600) as plain:
            payload.copy_to(plain, progress)


def inspect(path: Path) -> ArchiveInfo:
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
    with opened(path) as fd:
        header = read_header(fd)
        return describe(header, signer_of(fd, header), os.fstat(fd).st_size, verified=False)


def verify(
    path: Path,
    *,
    trusted: Sequence[Verifier],
    deep: SlotReader | None = None,
    progress: Progress | None = None,
) -> ArchiveInfo:
    """What a sealed file says, after a trusted signature held over core and payload.

    Needs no decryption key. The slots are not signed, so that they can be exchanged: who can open
    the file is not verified, what it holds is.

    Args:
        path: A sealed file.
        trusted: The file must be signed by one of these; an empty list refuses every file.
        deep: An identity, with which the file is also decrypted, its slots' MAC checked and its
            inside read to the end, without keeping any of it.
        progress: Called now and then with the bytes read so far, and those there are to read:
            with `deep` each twice.

    Raises:
        UntrustedSigner: The file is unsigned, or signed by someone else.
        Tampered: The signature does not hold, or the payload is not what was signed.
        ArchiveError: As for `inspect`; with `deep`, as for `load`.

    Example:
        >>> import tempfile, secure_cnn.archive as archive
        >>> me, signer = archive.generate_identity(), archive.generate_signer()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(f"{folder}/m", {}, recipients=[me.recipient], signer=signer)
        ...     archive.verify(f"{folder}/m", trusted=[signer.verifier], deep=me).verified
        True
    """
    with opened(path) as fd:
        header = read_header(fd)
        passes = 1 if deep is None else 2
        signed = signed_leaves(fd, header, trusted)
        if signed != hash_file(fd, layout_of(header), _part(progress, 0, passes)):
            raise Tampered("the payload is not the one that was signed; get the file again")
        if deep is not None:
            _, payload = unlock(
                fd,
                identity=deep,
                trusted=trusted,
                expect={},
                core_hash=header.core_hash.hex(),
            )
            payload.check(_part(progress, 1, passes))
            _check_inside(payload)
        return describe(header, signer_of(fd, header), os.fstat(fd).st_size, verified=True)


def _apart(
    claims: Mapping[str, JSON] | None, private_claims: Mapping[str, JSON] | None
) -> tuple[dict[str, JSON], dict[str, JSON]]:
    """Public and private claims, which have no key in common."""
    public = copy_claims(claims, "claims")
    private = copy_claims(private_claims, "private_claims")
    if twice := public.keys() & private.keys():
        raise StateError(f"claims: expected {sorted(twice)} to be public or private, got both")
    return public, private


def _check_inside(payload: Payload) -> None:
    """Passes if the plaintext is a state; its segments were checked, and only bools are read."""
    index = read_index(payload)
    for span in index.spans.values():
        if span.dtype is torch.bool:
            read_tensor(payload, index, span)
    build_state(index, lambda name: torch.empty(0))


def _part(progress: Progress | None, before: int, passes: int) -> Progress | None:
    """How one of several passes over a payload is told, after so many before it."""
    if progress is None:
        return None
    return lambda done, total: progress(before * total + done, passes * total)
