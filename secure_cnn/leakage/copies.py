"""Copies of a model from its answers alone: what they are worth, and what their attacks do to it.

Each copy stands beside a student that never asked: images of the same kind make a good model
without the victim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses import Attack
from privacy.leakage import AnswerMode, Labels, Probabilities, TopProbabilities, extract
from privacy.leakage.signals import Answer
from secure_cnn.data import Split
from secure_cnn.errors import DataError, RunError
from secure_cnn.leakage import arguments
from secure_cnn.leakage.pools import Pool
from secure_cnn.leakage.student import StudentTraining
from secure_cnn.progress import part_progress
from secure_cnn.record import ExtractionRecord

__all__ = ["ANSWERS", "ExtractionSettings", "measure_extraction"]

_BATCH = 500

ANSWERS: Mapping[str, AnswerMode] = MappingProxyType(
    {
        "probabilities": Probabilities(),
        "top 3, 2 digits": TopProbabilities(count=3, digits=2),
        "labels": Labels(),
    }
)
"""What of its logits a victim shows, by name."""


@final
@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """How extraction is measured.

    Attributes:
        budgets: Questions; those that are more than a pool has are left out for it, and of a pool
            that grows those that its own images are enough for.
        answers: Names in `ANSWERS` of what the victim shows.
        attack: Made on copies and applied to the victim; None makes none.
        attacked: Images that it is made on, of those that the victim has right.
        seed: Of students and the attack.

    Raises:
        RunError: A value is out of range, or there is no such answer.
    """

    budgets: tuple[int, ...] = (100, 1000, 5000)
    answers: tuple[str, ...] = tuple(ANSWERS)
    attack: Attack | None = None
    attacked: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for budget in arguments.tuple_of("budgets", self.budgets, object):
            arguments.whole("budgets", budget, least=1)
        arguments.whole("attacked", self.attacked, least=1)
        arguments.whole("seed", self.seed, least=0)
        if self.attack is not None:
            arguments.called("attack", self.attack, "an attack of defenses, or None")
        for name in arguments.tuple_of("answers", self.answers, str):
            if name not in ANSWERS:
                raise RunError(f"answers: expected some of {', '.join(ANSWERS)}, got {name!r}")


def measure_extraction(
    victim: Answer,
    judged: Split,
    pools: Sequence[Pool],
    learn: StudentTraining,
    settings: ExtractionSettings,
) -> tuple[ExtractionRecord, ...]:
    """What copies of a model are worth, for each pool, answer and budget.

    Guarantee: of the victim nothing but its answers is used; the same seed gives the same copies.

    Args:
        victim: Answers with logits, in evaluation mode where it is a module.
        judged: Images that no pool has, on which accuracy, fidelity and transfer are measured.
        pools: What copiers have.
        learn: How students are trained, those that ask and those that do not.
        settings: How much is asked, and what is answered.

    Returns:
        A record for each pool, answer and budget, in this order.

    Raises:
        Stopped: A stop was requested, of `learn`.
        DataError: No budget is within a pool.
        LeakageError: The victim does not answer with finite logits.
    """
    asked = [(pool, _within(pool, settings.budgets)) for pool in pools]
    total = sum(len(budgets) for _, budgets in asked) * len(settings.answers)
    judge, rows = _Judge(victim, judged, settings), []
    with part_progress("copy", total) as advance:
        for pool, budgets in asked:
            alone = [judge.baseline(pool, budget, learn) for budget in budgets]
            for name in settings.answers:
                for budget, baseline in zip(budgets, alone, strict=True):
                    rows.append(judge.row(pool, name, budget, baseline, learn))
                    advance(len(rows))
    return tuple(rows)


def _within(pool: Pool, budgets: Sequence[int]) -> list[int]:
    found = [budget for budget in budgets if pool.least <= budget <= pool.most]
    if not found and min(budgets) > pool.most:
        raise DataError(f"{pool.name}: expected at least {min(budgets)} images, got {pool.most}")
    if not found:
        raise DataError(
            f"{pool.name}: expected a budget of {pool.least} or more, so that it grows, got "
            f"{max(budgets)}; leave it out"
        )
    return found


@final
@dataclass(frozen=True)
class _Worth:
    """What a student is worth."""

    accuracy: float
    fidelity: float
    transfer: float | None


_NOTHING = (None, None, None)


class _Judge:
    """What students are held against."""

    def __init__(self, victim: Answer, judged: Split, settings: ExtractionSettings) -> None:
        self._victim, self._settings = victim, settings
        self._test = judged.batch(torch.arange(len(judged)))
        self._said = _classes(victim, self._test[0])
        right = (self._said == self._test[1]).nonzero().flatten()
        self._right = right[: settings.attacked]

    def baseline(self, pool: Pool, budget: int, learn: StudentTraining) -> _Worth | None:
        """A student of the copier's own labels alone; None where it has none."""
        if pool.labels is None:
            return None
        with torch.no_grad():
            classes = self._victim(self._test[0][:1]).shape[1]
        own = F.one_hot(pool.labels[:budget], classes).float()
        student = learn(pool.images[:budget], own, seed=self._settings.seed)
        said = _classes(student, self._test[0])
        return _Worth(
            accuracy=float((said == self._test[1]).double().mean()),
            fidelity=float((said == self._said).double().mean()),
            transfer=self._transfer(student),
        )

    def row(
        self, pool: Pool, name: str, budget: int, alone: _Worth | None, learn: StudentTraining
    ) -> ExtractionRecord:
        """A copy, and the student that never asked beside it."""
        mode, seed = ANSWERS[name], self._settings.seed
        questions = pool.questions(
            budget, lambda images: self._taught(mode, images), learn, seed=seed
        )
        (copy,) = extract(
            self._victim, questions, learn, test=self._test, budgets=[budget], mode=mode, seed=seed
        )
        assert isinstance(copy.student, nn.Module), "as `learn` gives it"
        beside = (alone.accuracy, alone.fidelity, alone.transfer) if alone else _NOTHING
        return ExtractionRecord(
            pool=pool.name,
            answers=name,
            queries=budget,
            accuracy=copy.accuracy,
            fidelity=copy.fidelity,
            baseline=beside[0],
            baseline_fidelity=beside[1],
            transfer=self._transfer(copy.student),
            baseline_transfer=beside[2],
        )

    def _taught(self, mode: AnswerMode, images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([mode(self._victim(part)) for part in torch.split(images, _BATCH)])

    def _transfer(self, student: nn.Module) -> float | None:
        """The share of the victim's right answers that an attack on the student turns wrong."""
        attack = self._settings.attack
        if attack is None or not len(self._right):
            return None
        images, labels = (each[self._right] for each in self._test)
        moved = attack(student, images, labels, seed=self._settings.seed)
        return float((_classes(self._victim, moved) != labels).double().mean())


def _classes(answer: Answer, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([answer(part).argmax(1) for part in torch.split(images, _BATCH)])
