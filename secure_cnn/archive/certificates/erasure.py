"""What a certificate says of people who left a model."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import final

from secure_cnn.archive.certificates.artefact import ARTEFACT_KINDS, Artefact
from secure_cnn.archive.certificates.fields import as_json, check_fields, from_json
from secure_cnn.archive.certificates.figures import Cumulative, Evidence, RunState, check_bound
from secure_cnn.archive.certificates.merkle import Absence, DataRoot, verify_absence
from secure_cnn.archive.errors import CertificateError
from secure_cnn.archive.format.claims import JSON
from secure_cnn.archive.format.core import is_hex
from secure_cnn.printable import printable

__all__ = ["NOT_KNOWN", "NO_GUARANTEE", "TYPE", "Erasure"]

TYPE = "application/vnd.secure-cnn.erasure.v1"
NO_GUARANTEE = "no guarantee"
"""What the guarantee of a method without one says."""
NOT_KNOWN = (
    "Whether the training took place as it is told: a training history can be forged (Thudi et al. "
    "2021, arXiv 2110.11891). This certificate proves a procedure, and no property of the weights.",
    "Whether the digests are all of the data: who holds the key made them, and their tree.",
    "Copies of data and model that somebody made or downloaded before.",
)
"""What no certificate of erasure can know; each says at least this."""

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_CLOSE = 0.01


@final
@dataclass(frozen=True, kw_only=True)
class Erasure:
    """What was done, once, for people who left a model and its data.

    Everything is checked where it is made, and again where it is read: types and ranges, that each
    request is proven absent from the data, and whether all of it can be true together.

    Attributes:
        certificate_id: 32 hexadecimal digits, at random.
        received, identity_confirmed, deadline: UTC times, `2026-11-30T12:00:00Z`; "" where nobody
            said.
        done: When it was done; what the clock here said.
        ground: Why, in the controller's words; "" where nobody said.
        requests: Digests by `keyed_digest`, 64 hexadecimal digits, of each person or of each of
            their images: never bare hashes, which anybody could find by trying names.
        people, images: How many left.
        run_before, run_after: The model with them, and without.
        data_before, data_after: The data with them, and without.
        absence: Proofs that each request, and what else is told, is not in `data_after`.
        artefacts: What held data of theirs and what became of it; every kind is in it.
        method: Its name.
        guarantee: One sentence with its numbers. Of a method without, it has "no guarantee".
        exact: Whether the model is one of a training without them.
        epsilon, delta: What bounds the difference to such a training; None where it is exact, and
            where there is no guarantee.
        assumptions: What has to hold for the guarantee, a sentence each.
        cumulative: Everybody who has left in the model's life.
        weight_change: The norm of what the weights changed by, 0 or more.
        evidence: What was measured.
        not_known: What cannot be known, a sentence each; those of `NOT_KNOWN` are among them.
        versions, hardware: By what it was done.
        previous: The digest of the certificate before in the model's life, as `write_certificate`
            returned it; "" for the first.

    Raises:
        CertificateError: Something of this does not hold.

    Example:
        >>> assert Erasure.__dataclass_fields__["previous"].default == ""
    """

    certificate_id: str = field(default_factory=lambda: secrets.token_hex(16))
    received: str = ""
    identity_confirmed: str = ""
    deadline: str = ""
    done: str
    ground: str = ""
    requests: tuple[str, ...]
    people: int
    images: int
    run_before: RunState
    run_after: RunState
    data_before: DataRoot
    data_after: DataRoot
    absence: tuple[Absence, ...]
    artefacts: tuple[Artefact, ...]
    method: str
    guarantee: str
    exact: bool
    epsilon: float | None = None
    delta: float | None = None
    assumptions: tuple[str, ...]
    cumulative: Cumulative
    weight_change: float
    evidence: tuple[Evidence, ...] = ()
    not_known: tuple[str, ...] = NOT_KNOWN
    versions: Mapping[str, str]
    hardware: Mapping[str, str | int | float | bool | None]
    previous: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_ids(self)
        _check_times(self)
        _check_counts(self)
        _check_absence(self)
        _check_guarantee(self)
        _check_cumulative(self)
        _check_weights(self)
        _check_words(self)

    @property
    def late(self) -> bool:
        """Whether it was done after the deadline, where there is one."""
        return bool(self.deadline) and self.done > self.deadline

    def __str__(self) -> str:
        rows = [
            *_told_times(self),
            ("ground", self.ground or "not told"),
            (
                "people",
                f"{self.people}, with {self.images} images; {self.cumulative.people} so far",
            ),
            ("model", f"{self.run_before.name} -> {self.run_after.name}"),
            (
                "data",
                f"{self.data_before.leaves} -> {self.data_after.leaves} digests; "
                f"{len(self.absence)} proven absent",
            ),
            ("method", _told_method(self)),
            ("guarantee", self.guarantee),
            *(("assumes", text) for text in self.assumptions),
            *(("evidence", str(each)) for each in self.evidence),
            *(
                (each.kind, ": ".join(filter(None, (each.name, each.action, each.detail))))
                for each in self.artefacts
            ),
            *(("not known", text) for text in self.not_known),
        ]
        return "\n".join(f"{name:<15} {printable(text)}" for name, text in rows)

    def to_json(self) -> JSON:
        """As it stands in a statement."""
        return as_json(self)

    @classmethod
    def from_json(cls, value: JSON) -> "Erasure":
        """That of a statement.

        Raises:
            CertificateError: It says what cannot be.
        """
        return from_json(cls, value, "erasure")


def _told_times(it: Erasure) -> list[tuple[str, str]]:
    """What is told of the request's times, and when it was done."""
    told = {
        "received": it.received or "not told",
        "identity sure": it.identity_confirmed,
        "deadline": it.deadline,
        "done": it.done + (", after the deadline" if it.late else ""),
    }
    return [(name, text) for name, text in told.items() if text]


def _told_method(it: Erasure) -> str:
    """Its name, and in a word what it promises."""
    if it.exact:
        return f"{it.method} (exact)"
    if it.epsilon is None:
        return f"{it.method} ({NO_GUARANTEE})"
    so_far = it.cumulative
    bound = f"epsilon {it.epsilon:.4g}, delta {it.delta:g}"
    if so_far.epsilon is not None and so_far.epsilon > it.epsilon:
        bound += f"; epsilon {so_far.epsilon:.4g} so far"
    return f"{it.method} (not exact: {bound})"


def _check_ids(it: Erasure) -> None:
    if not is_hex(it.certificate_id, 16):
        raise CertificateError(
            f"certificate_id: expected 32 hexadecimal digits, got {it.certificate_id[:40]!r}"
        )
    if it.previous and not is_hex(it.previous, 32):
        raise CertificateError(
            'previous: expected a digest of 64 hexadecimal digits, or "" for the first certificate '
            f"of a model, got {it.previous[:80]!r}"
        )
    for digest in it.requests:
        if not is_hex(digest, 32):
            raise CertificateError(
                "requests: expected digests of 64 hexadecimal digits under the controller's key; "
                "make them by keyed_digest"
            )


def _check_times(it: Erasure) -> None:
    """Each time is one, and they are in order: received, confirmed, done."""
    for name in ("received", "identity_confirmed", "deadline", "done"):
        text = getattr(it, name)
        if (text or name == "done") and not _is_time(text):
            raise CertificateError(
                f"{name}: expected a time in UTC as 2026-11-30T12:00:00Z, got {text[:40]!r}"
            )
    told = [
        (name, getattr(it, name))
        for name in ("received", "identity_confirmed", "done")
        if getattr(it, name)
    ]
    for (first, before), (second, after) in pairwise(told):
        if before > after:
            raise CertificateError(
                f"{second}: expected a time not before {first} ({before}), got {after}"
            )
    if it.deadline and it.received > it.deadline:
        raise CertificateError(
            f"deadline: expected a time not before it was received ({it.received}), "
            f"got {it.deadline}"
        )


def _check_counts(it: Erasure) -> None:
    if it.people < 1 or it.images < it.people:
        raise CertificateError(
            f"people and images: expected at least one person, with an image each, got {it.people} "
            f"and {it.images}"
        )
    asked = len(set(it.requests))
    if not it.people <= asked <= it.images or asked != len(it.requests):
        raise CertificateError(
            f"requests: expected different digests, for each of {it.people} people or of "
            f"{it.images} images, got {asked} of {len(it.requests)}"
        )
    gone = it.data_before.leaves - it.data_after.leaves
    if gone < asked:
        raise CertificateError(
            f"data_after: expected at least {asked} digests less than before, since so many left, "
            f"got {gone} less"
        )


def _check_absence(it: Erasure) -> None:
    proven = [proof.digest for proof in it.absence]
    if len(set(proven)) != len(proven):
        raise CertificateError("absence: expected one proof for each digest, got two of one")
    if missing := len(set(it.requests) - set(proven)):
        raise CertificateError(
            f"absence: expected a proof for each of {len(it.requests)} requests, {missing} have "
            "none; make them by MerkleTree.absence"
        )
    for proof in it.absence:
        if not verify_absence(proof, it.data_after):
            raise CertificateError(
                f"absence: the proof for {proof.digest} does not hold for data_after; make it by "
                "the tree of the data without the people"
            )


def _check_guarantee(it: Erasure) -> None:
    """Exact, bounded, or none: one of the three, and the sentence says which."""
    check_bound(it.epsilon, it.delta, "")
    bounded, denied = it.epsilon is not None, NO_GUARANTEE in it.guarantee.lower()
    if it.exact and bounded:
        raise CertificateError("epsilon: expected None for an exact method, got a number")
    if denied and (it.exact or bounded):
        raise CertificateError(
            f'guarantee: says "{NO_GUARANTEE}" of a method that is said to have one; correct one'
        )
    if not (denied or it.exact or bounded):
        raise CertificateError(
            f'guarantee: expected the words "{NO_GUARANTEE}" of a method that is neither exact nor '
            "bounded by an epsilon"
        )
    if it.epsilon is not None:
        numbers = [float(text) for text in _NUMBER.findall(it.guarantee)]
        if not any(abs(each - it.epsilon) <= _CLOSE * it.epsilon for each in numbers):
            raise CertificateError(
                f"guarantee: expected a sentence with its epsilon of {it.epsilon:.3g}, got "
                f"{it.guarantee[:200]!r}"
            )
    if not denied and not it.assumptions:
        raise CertificateError("assumptions: expected what has to hold for the guarantee, got none")


def _check_cumulative(it: Erasure) -> None:
    so_far = it.cumulative
    if so_far.people < it.people:
        raise CertificateError(
            f"cumulative.people: expected at least the {it.people} of this time, got "
            f"{so_far.people}"
        )
    if it.epsilon is not None and so_far.epsilon is not None and so_far.epsilon < it.epsilon:
        raise CertificateError(
            f"cumulative.epsilon: expected at least the {it.epsilon:g} of this time, got "
            f"{so_far.epsilon:g}"
        )
    alone = not it.previous and so_far.people == it.people
    if alone and (so_far.epsilon, so_far.delta) != (it.epsilon, it.delta):
        raise CertificateError(
            "cumulative: expected the epsilon and delta of this time, since nobody left before; "
            "correct one"
        )


def _check_weights(it: Erasure) -> None:
    """A change has another digest, none has the same; a method without a guarantee changes some."""
    same = it.run_before.digest == it.run_after.digest
    if it.weight_change < 0 or same != (it.weight_change == 0):
        raise CertificateError(
            f"weight_change: expected 0 for the same weights and more for others, got "
            f"{it.weight_change:g} for {'the same' if same else 'others'}"
        )
    if same and not it.exact and it.epsilon is None:
        raise CertificateError(
            "weight_change: expected a method without a guarantee to change the weights, got 0; it "
            "did nothing"
        )


def _check_words(it: Erasure) -> None:
    for name in ("method", "guarantee"):
        text = getattr(it, name)
        if not text.strip() or not text.isprintable():
            raise CertificateError(f"{name}: expected one line of text, got {text[:80]!r}")
    for name in ("assumptions", "not_known"):
        if not all(text.strip() for text in getattr(it, name)):
            raise CertificateError(f"{name}: expected sentences, got an empty one")
    if missing := [text for text in NOT_KNOWN if text not in it.not_known]:
        raise CertificateError(f"not_known: expected also {missing[0]!r}; begin with NOT_KNOWN")
    kinds = {each.kind for each in it.artefacts}
    if lost := [kind for kind in ARTEFACT_KINDS if kind not in kinds]:
        raise CertificateError(
            f"artefacts: expected every kind, missing: {', '.join(lost)}; whole_inventory adds "
            "what is not known"
        )


def _is_time(text: str) -> bool:
    if not _TIME.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
