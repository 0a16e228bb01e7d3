"""The envelope of a certificate: one statement, signed by who did it and by who checked it.

A file has one form: canonical JSON, to the byte. What is read is written again and compared, so
that no byte can be another, not even of white space; and every signature in it must hold, also of
those whom the reader does not trust. `docs/format.md`, section 13, is normative.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any, final

from secure_cnn.archive.errors import InvalidKey, LimitExceeded, StateError, StorageError, Tampered
from secure_cnn.archive.format.claims import canonical_json, parse_json
from secure_cnn.archive.format.payload import read_at
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.storage import Path, opened

__all__ = [
    *("BARE_TYPE", "CHECKED", "MADE", "MOST_BYTES", "MOST_SIGNATURES"),
    *("Envelope", "Signature", "parse_envelope", "read_envelope", "read_open"),
]

MADE = "made"
CHECKED = "checked"
MOST_BYTES = 16 << 20
MOST_SIGNATURES = 16
BARE_TYPE = "application/vnd.secure-cnn.shredded.v1"
"""What a file without a type is: the first certificates, of destruction alone, had none."""

_TYPE = re.compile(r"application/vnd\.secure-cnn\.[a-z]+\.v[1-9][0-9]?")


@final
@dataclass(frozen=True, kw_only=True)
class Signature:
    """One signature under a statement; `role` is "made" or "checked"."""

    verifier: Verifier
    signature: bytes
    role: str


@final
@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A statement and its signatures.

    Attributes:
        type: The media type, which says of what kind the statement is.
        statement: Canonical JSON text.
        signatures: That of who made it first, then of those who checked it, by their keys' texts.
        bare: Whether the file has neither type nor roles, as the first ones.
    """

    type: str
    statement: str
    signatures: tuple[Signature, ...] = ()
    bare: bool = False

    def to_bytes(self) -> bytes:
        """The whole file."""
        return self._written(self.signatures, bare=self.bare)

    @property
    def as_made(self) -> bytes:
        """The file as it was before anybody checked it: what those who check it sign."""
        made = tuple(each for each in self.signatures if each.role == MADE)
        return self._written(made, bare=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the file as it was made: another signature of a checker does not change it."""
        return hashlib.sha256(self.as_made).hexdigest()

    def by(self, role: str) -> tuple[Verifier, ...]:
        """Whose signatures of a role it bears."""
        return tuple(each.verifier for each in self.signatures if each.role == role)

    def signed(self, signer: Signer, role: str) -> "Envelope":
        """With one signature more.

        Raises:
            InvalidKey: Whoever signs has signed it already, or it has an author, or, to be checked,
                none.
            LimitExceeded: It has as many signatures as fit.
        """
        verifier = signer.verifier
        if any(each.verifier == verifier for each in self.signatures):
            raise InvalidKey(
                f"expected somebody who has not signed it, got {verifier!r}; a check by whoever "
                "made it is none"
            )
        if bool(self.by(MADE)) != (role == CHECKED):
            found = "one" if self.by(MADE) else "none"
            raise InvalidKey(f"expected one signature of who made it, got {found}; ask who made it")
        if len(self.signatures) >= MOST_SIGNATURES:
            raise LimitExceeded(f"expected at most {MOST_SIGNATURES} signatures, got one more")
        signature = signer.sign_statement(*self._signed(role))
        new = Signature(verifier=verifier, signature=signature, role=role)
        signatures = tuple(sorted((*self.signatures, new), key=_place))
        return Envelope(type=self.type, statement=self.statement, signatures=signatures)

    def check(self) -> None:
        """Passes if every signature holds.

        Raises:
            Tampered: One does not.
        """
        for each in self.signatures:
            each.verifier.check_statement(each.signature, *self._signed(each.role))

    def _signed(self, role: str) -> tuple[str, bytes]:
        """The type and the bytes that a signature of a role is over."""
        if role == MADE:
            return self.type, self.statement.encode()
        return f"{self.type}; role={CHECKED}", self.as_made

    def _written(self, signatures: tuple[Signature, ...], *, bare: bool) -> bytes:
        rows: list[dict[str, str]] = [
            {"verifier": each.verifier.to_text(), "signature": each.signature.hex()}
            | ({} if bare else {"role": each.role})
            for each in signatures
        ]
        kind = {} if bare else {"type": self.type}
        parts = {**kind, "statement": self.statement, "signatures": rows}
        return canonical_json(parts, "certificate") + b"\n"


def read_envelope(path: Path) -> Envelope:
    """The envelope in a file, every signature of which holds; whose they are is not judged.

    Raises:
        Tampered: It is no certificate, or a byte of it is another.
        LimitExceeded: It is longer than certificates are.
        StorageError: It cannot be read.
    """
    with opened(path) as fd:
        return read_open(fd, path)


def read_open(fd: int, path: Path) -> Envelope:
    """As `read_envelope`, from an open file."""
    size = os.fstat(fd).st_size
    if size > MOST_BYTES:
        raise LimitExceeded(
            f"{path}: expected a certificate of at most {MOST_BYTES} bytes, got {size}; it is "
            "another file"
        )
    try:
        raw = read_at(fd, size, 0)
    except OSError as error:
        raise StorageError(f"{path}: cannot read: {error.strerror}; try again") from error
    envelope = parse_envelope(raw)
    envelope.check()
    return envelope


def parse_envelope(raw: bytes) -> Envelope:
    """The envelope in bytes; no signature is checked.

    Raises:
        Tampered: It is no certificate, or not written in the one form that certificates have.
    """
    envelope = _envelope(parse_json(raw, "the certificate"))
    statement = envelope.statement.encode()
    value = parse_json(statement, "the statement")
    try:
        same = canonical_json(value, "statement") == statement and envelope.to_bytes() == raw
    except StateError:  # nests deeper than is written
        same = False
    if not same:
        raise Tampered(
            "the certificate is not in the one form that certificates have: it was changed, or "
            "written by another program; get it again from who made it"
        )
    return envelope


def _envelope(value: Any) -> Envelope:
    try:
        bare = value.keys() == {"statement", "signatures"}
        kind = BARE_TYPE if bare else value["type"]
        rows, statement = value["signatures"], value["statement"]
        statement.encode()
        if type(statement) is str and _TYPE.fullmatch(kind) and type(rows) is list:
            signatures = tuple(_signature(each, bare=bare) for each in rows[: MOST_SIGNATURES + 1])
            if _in_order(signatures):
                return Envelope(type=kind, statement=statement, signatures=signatures, bare=bare)
    except (KeyError, TypeError, ValueError, AttributeError, InvalidKey):
        pass
    raise Tampered("the file is no certificate; ask who made it for the file again")


def _signature(value: Any, *, bare: bool) -> Signature:
    return Signature(
        verifier=Verifier.from_text(value["verifier"]),
        signature=bytes.fromhex(value["signature"]),
        role=MADE if bare else value["role"],
    )


def _place(signature: Signature) -> tuple[bool, str]:
    return signature.role != MADE, signature.verifier.to_text()


def _in_order(signatures: tuple[Signature, ...]) -> bool:
    """Whether they stand as they are written: one author, before checkers, nobody twice."""
    roles = [each.role for each in signatures]
    names = {each.verifier for each in signatures}
    return (
        len(signatures) <= MOST_SIGNATURES
        and len(names) == len(signatures)
        and set(roles[1:]) <= {CHECKED}
        and roles[:1] in ([], [MADE])
        and list(signatures) == sorted(signatures, key=_place)
    )
