"""A variant: one training of a run, by which of the recipe's protections are on in it."""

from dataclasses import dataclass

from defenses.attacks.by_name import ATTACKS
from defenses.attacks.pgd import SingleStep
from secure_cnn.record import variant_name

__all__ = ["SINGLE_STEPS", "Variant"]

SINGLE_STEPS = tuple(name for name, kind in ATTACKS.items() if issubclass(kind, SingleStep))
"""Attacks of one step, by name."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One training of a run: which of the recipe's protections are on."""

    private: bool
    method: str | None

    @property
    def name(self) -> str:
        """The protections joined by `+`, such as `private+pgd`; `plain` where there are none."""
        parts = ["private"] * self.private + ([self.method] if self.method else [])
        return variant_name(parts)

    @property
    def single_step(self) -> bool:
        """Whether it trains on single steps, and so may overfit to them."""
        return self.method in SINGLE_STEPS
