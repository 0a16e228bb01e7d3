"""The one verifier of certificates, and the one writer: whatever the kind, the same envelope."""

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

from secure_cnn.archive.certificates import destruction, erasure
from secure_cnn.archive.certificates.destruction import Certificate
from secure_cnn.archive.certificates.erasure import Erasure
from secure_cnn.archive.certificates.statement import (
    CHECKED,
    MADE,
    MOST_BYTES,
    Envelope,
    read_envelope,
    read_open,
)
from secure_cnn.archive.errors import (
    CertificateError,
    InvalidKey,
    LimitExceeded,
    RolledBack,
    StorageError,
    Tampered,
    UnsupportedVersion,
    UntrustedSigner,
)
from secure_cnn.archive.format.claims import JSON, canonical_json, parse_json
from secure_cnn.archive.keys import check_signer, check_trusted
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.storage import Path, lock_file, new_file, opened, write_file
from secure_cnn.files import write_at

__all__ = [
    *("AnyCertificate", "Verified", "check_certificate", "envelope_of", "read_certificate"),
    *("verify_certificate", "write_certificate"),
]

AnyCertificate: TypeAlias = Certificate | Erasure

_READERS: Mapping[str, Callable[[JSON], AnyCertificate]] = {
    destruction.TYPE: Certificate.from_json,
    erasure.TYPE: Erasure.from_json,
}
_TYPES: Mapping[type, str] = {Certificate: destruction.TYPE, Erasure: erasure.TYPE}


@final
@dataclass(frozen=True, kw_only=True)
class Verified:
    """A certificate whose signatures hold, made by somebody trusted.

    Attributes:
        value: What it says.
        made_by: Who did it.
        checked_by: Who of those trusted checked it, and signed for that.
        others: Who else signed for having checked it: not trusted, so that it vouches for nothing.
        digest: SHA-256 of the file as it was made, 64 hexadecimal digits. The next certificate of
            a model names it as its `previous`; a checker who signs later does not change it.

    Example:
        >>> assert "digest" in Verified.__dataclass_fields__
    """

    value: AnyCertificate
    made_by: Verifier
    checked_by: tuple[Verifier, ...]
    others: tuple[Verifier, ...]
    digest: str

    @property
    def kind(self) -> str:
        """`destruction` or `erasure`."""
        return "erasure" if isinstance(self.value, Erasure) else "destruction"

    def __str__(self) -> str:
        nobody = [] if self.checked_by or self.others else [("checked by", "nobody")]
        rows = [
            ("kind", self.kind),
            ("made by", repr(self.made_by)),
            *(("checked by", repr(each)) for each in self.checked_by),
            *(("not trusted", f"{each!r}, who signed as a checker") for each in self.others),
            *nobody,
        ]
        told = "\n".join(f"{name:<15} {text}" for name, text in rows)
        return f"{told}\n{self.value}\n{'digest':<15} {self.digest}"


def envelope_of(value: AnyCertificate, signer: Signer | None) -> Envelope:
    """What is written of a certificate; unsigned, which nobody can verify, without a signer."""
    statement = canonical_json(value.to_json(), "certificate").decode()
    envelope = Envelope(type=_TYPES[type(value)], statement=statement)
    return envelope if signer is None else envelope.signed(signer, MADE)


def write_certificate(path: Path, value: Erasure, *, signer: Signer) -> str:
    """Signs what was done and writes it: a file that is there whole or not at all.

    Args:
        path: Where it goes; it must not exist.
        signer: Who did it.

    Returns:
        Its digest, which the next certificate of the model names as its `previous`.

    Raises:
        CertificateError: It is no statement of what was done.
        InvalidKey: The signer is none.
        StorageError: The file is there, or the operating system refuses.

    Example:
        >>> write_certificate("c", None, signer=None)
        Traceback (most recent call last):
        secure_cnn.archive.errors.CertificateError: c: expected an Erasure, got NoneType; ...
    """
    if not isinstance(value, Erasure):
        raise CertificateError(
            f"{path}: expected an Erasure, got {type(value).__name__}; shred writes its own"
        )
    if check_signer(signer) is None:
        raise InvalidKey(f"{path}: expected a signer for the certificate, got none; name one")
    envelope = envelope_of(value, signer)
    raw = envelope.to_bytes()
    if len(raw) > MOST_BYTES:
        raise LimitExceeded(
            f"{path}: expected a certificate of at most {MOST_BYTES} bytes, got {len(raw)}; make "
            "one for fewer people at a time"
        )
    write_file(path, raw, overwrite=False)
    return envelope.digest


def verify_certificate(
    path: Path, *, trusted: Sequence[Verifier], previous: Path | None = None
) -> Verified:
    """What a certificate says, after everything that can be checked here was found to hold.

    That is: the file has its one form to the byte, every signature in it holds, who made it is
    trusted, and what it says can be true together, proofs of absence among it. Neither network nor
    data is needed. What it cannot show stands in the certificate itself.

    Args:
        trusted: Whose certificates count, and whose checks.
        previous: The certificate before it in the model's life, verified too, and that this one
            goes on from there.

    Raises:
        UntrustedSigner: It is not made by one of those trusted.
        Tampered: It is no certificate, or a byte of it is another.
        CertificateError: It was signed, and says what cannot be true.
        RolledBack: It does not follow the previous one.
        UnsupportedVersion: It is of a kind that this version does not know.
        LimitExceeded: It is longer than certificates are.
        StorageError: It cannot be read.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me, signer = archive.generate_identity(), archive.generate_signer()
        >>> archive.save("m", {}, recipients=[me.recipient])
        >>> done = archive.shred("m", certificate="c", signer=signer)
        >>> found = archive.verify_certificate("c", trusted=[signer.verifier])
        >>> found.kind, found.value == done, found.checked_by
        ('destruction', True, ())
    """
    trusted = check_trusted(trusted)
    found = _judged(read_envelope(path), trusted, path)
    if previous is not None:
        before = _judged(read_envelope(previous), trusted, previous)
        _check_follows(found.value, before, path)
    return found


def read_certificate(path: Path, *, trusted: Sequence[Verifier]) -> Certificate:
    """What a certificate of destruction says, as `verify_certificate` finds it.

    Raises:
        UntrustedSigner: It is not signed by one of those trusted.
        Tampered: It is no certificate of destruction, or a signature does not hold.

    Example:
        >>> read_certificate("nowhere", trusted=[])
        Traceback (most recent call last):
        secure_cnn.archive.errors.StorageError: nowhere: cannot read: ...
    """
    found = verify_certificate(path, trusted=trusted).value
    if isinstance(found, Certificate):
        return found
    raise Tampered(
        f"{path}: expected a certificate of destruction, got one of erasure; verify_certificate "
        "reads every kind"
    )


def check_certificate(
    path: Path, *, signer: Signer, trusted: Sequence[Verifier], previous: Path | None = None
) -> Verified:
    """Verifies a finished certificate and adds the signature of somebody who checked it.

    It is over the whole file as it was made, the signature of its author included, and over the
    role: nobody can pass it off as that of who did it. The file is replaced in one step. Whoever
    holds it can take such a signature out again; they cannot put one in.

    Args:
        signer: Who checked it, somebody else than who made it.
        trusted: By whom it must be made.
        previous: As for `verify_certificate`.

    Returns:
        What it says now.

    Raises:
        InvalidKey: The signer is none, or has signed it already.
        ArchiveError: As `verify_certificate`; the file is as it was.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me, signer = archive.generate_identity(), archive.generate_signer()
        >>> other = archive.generate_signer()
        >>> archive.save("m", {}, recipients=[me.recipient])
        >>> done = archive.shred("m", certificate="c", signer=signer)
        >>> found = archive.check_certificate("c", signer=other, trusted=[signer.verifier])
        >>> found.checked_by == (other.verifier,)
        True
    """
    trusted = check_trusted(trusted)
    if check_signer(signer) is None:
        raise InvalidKey(f"{path}: expected a signer who checked it, got none; name one")
    with opened(path) as fd:
        lock_file(fd, path)
        status = os.fstat(fd)
        if not os.path.samestat(status, os.stat(path)):
            raise StorageError(f"{path}: another process has changed it just now; try again")
        envelope = read_open(fd, path)
        found = _judged(envelope, trusted, path)
        if previous is not None:
            before = _judged(read_envelope(previous), trusted, previous)
            _check_follows(found.value, before, path)
        signed = envelope.signed(signer, CHECKED)
        raw, mode = signed.to_bytes(), stat.S_IMODE(status.st_mode)
        with new_file(path, length=len(raw), overwrite=True, mode=mode) as out:
            write_at(out, memoryview(raw), 0)
    return _judged(signed, (*trusted, signer.verifier), path)


def _judged(envelope: Envelope, trusted: Sequence[Verifier], path: Path) -> Verified:
    """What an envelope whose signatures hold says, if somebody trusted made it."""
    made, checked = envelope.by(MADE), envelope.by(CHECKED)
    if not made or made[0] not in trusted:
        whose = f"by {made[0]!r}" if made else "by nobody"
        raise UntrustedSigner(
            f"{path}: expected a certificate made by one of the {len(trusted)} trusted, got one "
            f"made {whose}; ask who made it"
        )
    reader = _READERS.get(envelope.type)
    if reader is None:
        raise UnsupportedVersion(
            f"{path}: is a certificate of another kind, {envelope.type}; read it with a newer "
            "secure-cnn"
        )
    value = reader(parse_json(envelope.statement.encode(), "the statement"))
    if canonical_json(value.to_json(), "statement").decode() != envelope.statement:
        raise CertificateError(f"{path}: says something in another form than certificates do")
    return Verified(
        value=value,
        made_by=made[0],
        checked_by=tuple(each for each in checked if each in trusted),
        others=tuple(each for each in checked if each not in trusted),
        digest=envelope.digest,
    )


def _check_follows(after: AnyCertificate, before: Verified, path: Path) -> None:
    """Passes if one erasure goes on where the one before it ended."""
    earlier = before.value
    if not isinstance(after, Erasure) or not isinstance(earlier, Erasure):
        raise CertificateError(
            f"{path}: expected two certificates of erasure, got one of destruction, which nothing "
            "goes before"
        )
    run, model = earlier.run_after, after.run_before
    wrong = {
        f"names {after.previous[:16] or 'none'} as the one before, which is "
        f"{before.digest[:16]}": after.previous != before.digest,
        "begins with another model than that one left": (run.run, run.digest)
        != (model.run, model.digest),
        "begins with other data than that one left": earlier.data_after != after.data_before,
        f"counts {after.cumulative.people} people so far, after {earlier.cumulative.people} and "
        f"{after.people} more": after.cumulative.people != earlier.cumulative.people + after.people,
        "was done before it": after.done < earlier.done,
    }
    for words, fails in wrong.items():
        if fails:
            raise RolledBack(
                f"{path}: {words}; get the certificates of this model in their order again"
            )
