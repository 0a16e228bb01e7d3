"""Figures that a certificate has: of the model before and after, measured, and over its life."""

from dataclasses import dataclass
from typing import final

from secure_cnn.archive.certificates.fields import check_fields
from secure_cnn.archive.errors import CertificateError
from secure_cnn.archive.format.core import is_hex

__all__ = ["Cumulative", "Evidence", "RunState", "check_bound"]


@final
@dataclass(frozen=True, kw_only=True)
class RunState:
    """A model at one time.

    Attributes:
        run: The id of its run.
        digest: SHA-256 of its weights, 64 hexadecimal digits.
        name: What its folder is called, without the way there.
    """

    run: str
    digest: str
    name: str

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.run.strip():
            raise CertificateError("run: expected the id of a run, got an empty text")
        if not is_hex(self.digest, 32):
            raise CertificateError(
                f"digest: expected 64 hexadecimal digits of SHA-256, got {self.digest[:80]!r}"
            )
        if "/" in self.name or "\\" in self.name or not self.name.strip():
            raise CertificateError(
                f"name: expected that of a folder without the way there, got {self.name!r}"
            )


@final
@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One figure that was measured.

    Attributes:
        name: What was measured, on what.
        value: The figure.
        low, high: The ends of its interval, around it; both None where it has none.
        n: How many examples, models or trials it is of.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        within = "" if self.low is None else f" ({self.low:.4g} to {self.high:.4g})"
        return f"{self.name}: {self.value:.4g}{within}, n = {self.n}"

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.name.strip():
            raise CertificateError("evidence: expected the name of what was measured, got none")
        if self.n < 1:
            raise CertificateError(f"{self.name}: expected n of at least 1, got {self.n}")
        if (self.low is None) != (self.high is None):
            raise CertificateError(f"{self.name}: expected both ends of an interval, or neither")
        if self.low is None or self.high is None:
            return
        if not self.low <= self.value <= self.high:
            raise CertificateError(
                f"{self.name}: expected an interval around {self.value:g}, got "
                f"{self.low:g} to {self.high:g}"
            )


@final
@dataclass(frozen=True, kw_only=True)
class Cumulative:
    """Everybody who has left in the life of the model, this time included.

    Attributes:
        people: How many.
        epsilon, delta: What bounds all of them together; None where nothing does, or nothing needs
            to, since each left exactly.
    """

    people: int
    epsilon: float | None
    delta: float | None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.people < 1:
            raise CertificateError(f"cumulative.people: expected at least 1, got {self.people}")
        check_bound(self.epsilon, self.delta, "cumulative.")


def check_bound(epsilon: float | None, delta: float | None, path: str) -> None:
    """Passes for epsilon >= 0 with 0 <= delta < 1, and for neither."""
    if (epsilon is None) != (delta is None):
        raise CertificateError(f"{path}epsilon: expected a delta with it, or neither; got one")
    if epsilon is None or delta is None:
        return
    if epsilon < 0:
        raise CertificateError(f"{path}epsilon: expected 0 or more, got {epsilon:g}")
    if not 0 <= delta < 1:
        raise CertificateError(f"{path}delta: expected 0 <= delta < 1, got {delta:g}")
