"""The end of a file: its wrapped keys are overwritten, it is removed, and a certificate says so.

Cryptographic erasure (NIST SP 800-88): without a slot nobody gets the file key, and without that
the payload is noise. What nobody can know stands in the certificate itself.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, final

from secure_cnn.archive.errors import InvalidKey, StorageError, Tampered, UntrustedSigner
from secure_cnn.archive.format.claims import canonical_json, parse_json
from secure_cnn.archive.format.core import is_hex, timestamp
from secure_cnn.archive.format.header import Header
from secure_cnn.archive.format.payload import read_at
from secure_cnn.archive.keys import check_signer, check_trusted
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.opening import read_header
from secure_cnn.archive.storage import Path, lock_file, new_file, opened
from secure_cnn.files import check_target, sync_folder, write_at

__all__ = ["Certificate", "read_certificate", "shred"]

_TYPE = "application/vnd.secure-cnn.shredded.v1"
_MAX_CERTIFICATE = 1 << 20
_UNKNOWN = (
    "copies of the file elsewhere: backups, snapshots, other machines",
    "what a disk, file system or journal keeps of blocks that were overwritten",
    "whether somebody kept the file key, or tensors that they read",
)


@final
@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was done to one file on one machine.

    Attributes:
        destroyed: UTC time, ISO 8601; what the clock here said.
        file: The name of the file, without its folder.
        file_id: Its id, as everyone could read it.
        core_hash: Its core hash.
        file_length: Its bytes.
        overwritten: How many of them, all that held the file key, were overwritten and synced.
        other_names: Other names of the same file (hard links) that still exist, now without keys.
        unknown: What cannot be known.

    Example:
        See `shred`.

        >>> sorted(Certificate.__dataclass_fields__)[:2]
        ['core_hash', 'destroyed']
    """

    destroyed: str
    file: str
    file_id: str
    core_hash: str
    file_length: int
    overwritten: int
    other_names: int
    unknown: tuple[str, ...] = _UNKNOWN

    def __str__(self) -> str:
        lines = [f"{name:<12} {json.dumps(value)}" for name, value in asdict(self).items()]
        return "\n".join(lines[:-1] + [f"not known    {json.dumps(text)}" for text in self.unknown])


def shred(
    path: Path, *, certificate: Path | None = None, signer: Signer | None = None
) -> Certificate:
    """Overwrites everything that holds the file key, syncs, and removes the file.

    Needs no key: whoever may write a file may destroy it. It cannot be undone.

    Args:
        path: A sealed file, whole; what is none, and a symbolic link, is not touched.
        certificate: Where a certificate goes, if one is wanted; it must not exist.
        signer: Who signs it.

    Example:
        >>> import tempfile, secure_cnn.archive as archive
        >>> me, signer = archive.generate_identity(), archive.generate_signer()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(f"{folder}/m", {}, recipients=[me.recipient])
        ...     done = archive.shred(f"{folder}/m", certificate=f"{folder}/c", signer=signer)
        ...     archive.read_certificate(f"{folder}/c", trusted=[signer.verifier]) == done
        True
    """
    signer = check_signer(signer)
    if signer is not None and certificate is None:
        raise InvalidKey("expected a path for the certificate that the signer signs, got none")
    try:
        check_target(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot shred: {error.strerror}; give a file itself") from None
    target = pathlib.Path(path)
    with opened(path, flags=os.O_RDWR) as fd:
        lock_file(fd, path)
        header = read_header(fd)
        done = _describe(target.name, header, os.fstat(fd))
        with contextlib.ExitStack() as stack:
            if certificate is not None:
                text = _seal(done, signer)
                out = stack.enter_context(
                    new_file(certificate, length=len(text), overwrite=False, mode=0o666)
                )
                write_at(out, memoryview(text), 0)
            write_at(fd, memoryview(os.urandom(done.overwritten)), header.mark_offset)
            os.fsync(fd)
            target.unlink()
            sync_folder(target.parent)
    return done


def read_certificate(path: Path, *, trusted: Sequence[Verifier]) -> Certificate:
    """What a certificate says, after a trusted signature held.

    Raises:
        UntrustedSigner: It is not signed by one of those trusted.
        Tampered: It is no certificate, or the signature does not hold.

    Example:
        See `shred`.

        >>> read_certificate("nowhere", trusted=[])
        Traceback (most recent call last):
        ...
        secure_cnn.archive.errors.StorageError: nowhere: cannot read: ...
    """
    trusted = check_trusted(trusted)
    with opened(path) as fd:
        raw = read_at(fd, min(os.fstat(fd).st_size, _MAX_CERTIFICATE), 0)
    statement, signatures = _parts(parse_json(raw, "the certificate"))
    for verifier, signature in signatures:
        if verifier in trusted:
            verifier.check_statement(signature, _TYPE, statement.encode())
            return _parse(statement)
    raise UntrustedSigner(
        f"{path}: is not signed by one of the {len(trusted)} trusted; ask who made it"
    )


def _describe(name: str, header: Header, status: os.stat_result) -> Certificate:
    """The certificate of a file that is about to go."""
    return Certificate(
        destroyed=timestamp(datetime.now(UTC)),
        file=name,
        file_id=header.core.file_id,
        core_hash=header.core_hash.hex(),
        file_length=status.st_size,
        overwritten=header.payload_offset - header.mark_offset,
        other_names=status.st_nlink - 1,
    )


def _seal(done: Certificate, signer: Signer | None) -> bytes:
    """The bytes of a certificate."""
    statement = canonical_json(asdict(done), "certificate")
    signatures = []
    if signer is not None:
        signature = signer.sign_statement(_TYPE, statement).hex()
        signatures.append({"verifier": signer.verifier.to_text(), "signature": signature})
    parts = {"statement": statement.decode(), "signatures": signatures}
    return canonical_json(parts, "certificate") + b"\n"


def _parts(value: Any) -> tuple[str, list[tuple[Verifier, bytes]]]:
    """Statement and signatures of a certificate, not checked yet."""
    try:
        statement, signatures = value["statement"], value["signatures"]
        if type(statement) is str:
            return statement, [
                (Verifier.from_text(one["verifier"]), bytes.fromhex(one["signature"]))
                for one in signatures
            ]
    except (KeyError, TypeError, ValueError, AttributeError, InvalidKey):
        pass
    raise Tampered("the file is no certificate of destruction; ask who made it")


def _parse(statement: str) -> Certificate:
    """The certificate in a statement whose signature held."""
    value: Any = parse_json(statement.encode(), "the statement")
    if not isinstance(value, dict) or value.keys() != {field.name for field in fields(Certificate)}:
        raise Tampered("the statement has other fields than version 1; use a newer secure-cnn")
    if not is_hex(value["core_hash"], 32) or not isinstance(value["unknown"], list):
        raise Tampered("the statement is malformed; ask who made it")
    return Certificate(**{**value, "unknown": tuple(value["unknown"])})
