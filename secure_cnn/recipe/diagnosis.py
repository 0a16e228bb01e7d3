"""Whether a training learned anything, told from its test images, and why it may not have.

Training losses of private images are not looked at: epsilon does not cover them. A sign is a fact
about the finished model; a reason is a setting that could explain it, with what to change.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from privacy.statistics import clopper_pearson

__all__ = ["Conditions", "learned", "not_learned_note"]

_ERROR = 0.05
"""How often the accuracy of a model at chance passes for one above it: at most one time in 20."""
_SURE = 0.005
"""The same of one whose loss is that of a guess: more is asked of its accuracy, one in 200."""
_NEARLY_ALL = 0.98
_LITTLE = 0.1
"""Of the way from chance to perfect: less, with the loss of a uniform guess, is next to nothing."""
_NEAR = 0.03
_FEW_STEPS = 100

_Confusion = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under what a training was done, as far as it can explain that it did not learn.

    `chosen_rate` says whether somebody chose the learning rate. `noise_multiplier` is None without
    privacy, `eps` None without adversarial examples. `plain_learned` is None where the run has no
    baseline.
    """

    steps: int
    batch_size: int
    learning_rate: float
    chosen_rate: bool
    clipped: bool
    parameters: int
    noise_multiplier: float | None = None
    eps: float | None = None
    plain_learned: bool | None = None


def learned(confusion: _Confusion, loss: float | None = None) -> bool:
    """Whether the test images show that a model learned; see `not_learned_note`."""
    return not _signs(confusion, loss)


def not_learned_note(
    name: str, confusion: _Confusion, loss: float | None, conditions: Conditions
) -> str:
    """What shows that a training did not learn, and why it may be; empty where it learned.

    Args:
        name: Of the variant, such as `private`.
        confusion: Of the test images: `confusion[i][j]` of class i were called j.
        loss: Mean cross-entropy of the test images in nats, where it is known.
        conditions: Those of the training.

    Example:
        >>> conditions = Conditions(
        ...     steps=6, batch_size=64, learning_rate=0.1, chosen_rate=False, clipped=True,
        ...     parameters=1000)
        >>> not_learned_note("plain", [[50, 50], [50, 50]], 0.69, conditions)[:45]
        'The training plain did not learn: accuracy is'
        >>> not_learned_note("plain", [[90, 10], [10, 90]], 0.3, conditions)
        ''
    """
    signs = _signs(confusion, loss)
    if not signs:
        return ""
    reasons = _reasons(conditions)
    return f"The training {name} did not learn: {', '.join(signs)}. " + (
        f"It may be that {'; or that '.join(reasons)}." if reasons else _UNKNOWN
    )


_UNKNOWN = (
    "Its settings do not say why: look at some images with their labels, and at the test loss "
    "epoch by epoch."
)


def _signs(confusion: _Confusion, loss: float | None) -> list[str]:
    """What is seen of a model that knows next to nothing; empty for one that learned."""
    counts = np.asarray(confusion, dtype=np.int64)
    total, right, classes = int(counts.sum()), int(np.trace(counts)), len(counts)
    often, called = counts.sum(1) / total, counts.sum(0) / total
    chance, top = float(often.max()), int(called.argmax())
    low, _ = clopper_pearson(right, total, error=_ERROR)
    surely, _ = clopper_pearson(right, total, error=_SURE)
    share = right / total
    signs = []
    if low <= chance:
        told = "at chance" if share <= chance else f"not told from chance by {total} test images"
        signs.append(
            f"accuracy is {told} ({100 * share:.1f} %; the commonest class alone is "
            f"{100 * chance:.1f} %)"
        )
    if called[top] >= _NEARLY_ALL and often[top] < _NEARLY_ALL * called[top]:
        signs.append(f"{100 * called[top]:.1f} % of the test images are called one class")
    guess = math.log(classes)
    little = surely <= chance or share - chance <= _LITTLE * (1 - chance)
    if loss is not None and little and abs(loss - guess) <= _NEAR * guess:
        signs.append(f"the test loss is that of a guess, {loss:.2f} against ln {classes}")
    return signs


def _reasons(conditions: Conditions) -> list[str]:
    """Settings that can explain it, the likeliest first."""
    c, reasons = conditions, list[str]()
    if c.plain_learned is False:
        reasons.append("it is not the protection, since the plain training did not learn either")
    if c.steps < _FEW_STEPS:
        reasons.append(
            f"{c.steps} {'step is' if c.steps == 1 else 'steps are'} too few: give more epochs, or "
            f"a smaller batch size than {c.batch_size}"
        )
    if c.chosen_rate:
        reasons.append(
            f"the learning rate {c.learning_rate:g} does not fit: leave it out, or try a tenth"
        )
    if not c.clipped and c.noise_multiplier is None:
        reasons.append("gradients exploded, since clip_grad_norm is 0: leave it out")
    if c.eps is not None and c.plain_learned is not False:
        known = "" if c.plain_learned is None else ", since the plain training learned"
        reasons.append(f"eps {c.eps:g} is too large{known}: try a smaller one, or eps_warmup")
    if c.noise_multiplier is not None and c.plain_learned is not False:
        times = c.noise_multiplier * math.sqrt(c.parameters) / c.batch_size
        reasons.append(
            f"the noise is too large: a step's is {times:.2g} times as long as the sum that it "
            "hides can be; give a larger epsilon, more images, or a smaller network"
        )
    return reasons
