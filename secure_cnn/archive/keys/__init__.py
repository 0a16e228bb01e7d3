"""Keys, and the check of those that a call is given: who opens, who signs, who is trusted.

The wrong half of a key pair would lead to an error that reads like an attack. No message shows a
text: it may be a secret. To import every kind here is what makes its slots known to readers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeGuard, TypeVar

from secure_cnn.archive.errors import InvalidKey
from secure_cnn.archive.format.slots import (
    NO_KEY_ID,
    AnyIdentity,
    AnyRecipient,
    check_key_id,
    check_kind,
)
from secure_cnn.archive.keys.identity import Identity, Recipient
from secure_cnn.archive.keys.kek import KeyEncryptionKey, ServiceKey
from secure_cnn.archive.keys.passphrase import Passphrase
from secure_cnn.archive.keys.signatures import Signer, Verifier

__all__ = [
    "check_identity",
    "check_recipients",
    "check_signer",
    "check_trusted",
    "key_ids",
    "trusted_with",
]

_Key = TypeVar("_Key")


def _one_of(kinds: Sequence[type]) -> str:
    *names, last = (kind.__name__ for kind in kinds)
    return f"{', '.join(names)} or {last}"


_RECIPIENT = f"a {_one_of([Recipient, Passphrase, KeyEncryptionKey, ServiceKey])}"
_IDENTITY = f"an {_one_of([Identity, Passphrase, KeyEncryptionKey, ServiceKey])}"
_SERVICE = "make it ServiceKey(service, name)"

_RECIPIENT_CURES: Mapping[type, str] = {
    Identity: "give identity.recipient",
    str: "give Recipient.from_text(line), or Passphrase(text)",
    Signer: "signers sign; give a recipient, of generate_identity()",
    Verifier: "verifiers check signatures; give a recipient, of generate_identity()",
}

_IDENTITY_CURES: Mapping[type, str] = {
    Recipient: "a recipient seals and opens nothing; give the Identity that it is of",
    str: "give read_identity(path), or Passphrase(text)",
    list: "give the one identity that opens the file",
    tuple: "give the one identity that opens the file",
    Signer: "signers sign; give an Identity",
    Verifier: "verifiers check signatures; give an Identity",
}

_SIGNER_CURES: Mapping[type, str] = {
    Verifier: "a verifier signs nothing; give the Signer that it is of",
    Identity: "identities open files; give a Signer, of generate_signer()",
    str: "give read_signer(path)",
}

_TRUSTED_CURES: Mapping[type, str] = {
    Signer: "give signer.verifier",
    str: "give Verifier.from_text(line), of the line in the .pub file",
    Identity: "identities open files; give the Verifier of who signed",
    Recipient: "recipients seal files; give the Verifier of who signed",
}


def check_recipients(who: object, *, name: str = "recipients") -> tuple[AnyRecipient, ...]:
    """Those who can be given the file key, each of a registered kind, so that its label counts."""
    found = _each(who, name, _RECIPIENT, _RECIPIENT_CURES, _is_recipient)
    for number, each in enumerate(found):
        kind = check_kind(each.kind, f"{name}[{number}].kind")
        key_id = check_key_id(each.key_id, f"{name}[{number}]")
        if not kind.named and key_id != NO_KEY_ID:
            raise InvalidKey(
                f"{name}[{number}].key_id: expected a key_id of zeros, got another, since its kind "
                "names nobody; give NO_KEY_ID"
            )
    return tuple(found)


def check_identity(who: object, *, name: str = "identity") -> AnyIdentity:
    """Who can take the file key out of a slot."""
    if (
        not isinstance(who, type)
        and callable(getattr(who, "unwrap", None))
        and not _is_service(who)
    ):
        return who  # type: ignore[return-value]  # by shape
    raise _refused(name, _IDENTITY, who, _IDENTITY_CURES)


def check_signer(who: object) -> Signer | None:
    """Who signs, if anybody."""
    if who is None or isinstance(who, Signer):
        return who
    raise _refused("signer", "a Signer or None", who, _SIGNER_CURES)


def check_trusted(who: object) -> tuple[Verifier, ...]:
    """Those whose signatures count."""
    return tuple(_each(who, "trusted", "a Verifier", _TRUSTED_CURES, _is_verifier))


def trusted_with(signer: Signer | None, trusted: Sequence[Verifier] | None) -> tuple[Verifier, ...]:
    """Whose signatures count for someone who may sign: the trusted, or the signer's own alone."""
    signer = check_signer(signer)
    if trusted is None and signer is None:
        raise InvalidKey("expected trusted verifiers or a signer, got neither; say whom to trust")
    if trusted is None and signer is not None:
        return (signer.verifier,)
    found = check_trusted(trusted)
    if signer is not None and signer.verifier not in found:
        raise InvalidKey(
            f"expected {signer.verifier!r} among the trusted, since it signs here; add it"
        )
    return found


def key_ids(who: object, *, name: str) -> set[str]:
    """Key ids in hexadecimal digits, of these or of those whose they are."""
    cures: dict[type, str] = {Identity: "give identity.recipient"}
    found = _each(who, name, "a Recipient or its key_id.hex()", cures, _has_key_id)
    return {
        each if isinstance(each, str) else check_key_id(each.key_id, f"{name}[{number}]").hex()
        for number, each in enumerate(found)
    }


def _each(
    who: object,
    name: str,
    expected: str,
    cures: Mapping[type, str],
    fits: Callable[[object], TypeGuard[_Key]],
) -> list[_Key]:
    """Each in a list, after all of them were found to fit."""
    if isinstance(who, str | bytes | Mapping) or not isinstance(who, Iterable):
        alone = type(who) not in cures and (_has_key_id(who) or _is_verifier(who))
        cure = f"; put it in a list, {name}=[...]" if alone else ""
        raise _refused(name, f"a list, each {expected}", who, cures, cure)
    found = []
    for number, each in enumerate(who):
        if not fits(each):
            raise _refused(f"{name}[{number}]", expected, each, cures)
        found.append(each)
    return found


def _is_verifier(who: object) -> TypeGuard[Verifier]:
    return isinstance(who, Verifier)


def _has_key_id(who: object) -> TypeGuard[AnyRecipient | str]:
    return isinstance(who, str) or _is_recipient(who)


def _is_recipient(who: object) -> TypeGuard[AnyRecipient]:
    """Whether it has the shape of a recipient."""
    shape = ("kind", "key_id", "wrap")
    return not isinstance(who, type) and all(hasattr(who, name) for name in shape)


def _is_service(who: object) -> bool:
    """Whether it is a bare key service, which knows nothing of slots."""
    return hasattr(who, "wrap") and hasattr(who, "unwrap") and not _is_recipient(who)


def _refused(
    name: str, expected: str, who: object, cures: Mapping[type, str], cure: str = ""
) -> InvalidKey:
    kind = "text" if isinstance(who, str) else type(who).__name__
    told = next((f"; {text}" for known, text in cures.items() if isinstance(who, known)), cure)
    told = f"; {_SERVICE}" if not told and _is_service(who) else told
    return InvalidKey(f"{name}: expected {expected}, got {kind}{told}")
