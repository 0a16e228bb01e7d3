"""A model that answers at random, asked often: what so many answers say, and what they do not.

An answer is written as a row of 1 (right) and 0, one for each draw; that of a deterministic model
has one. An image counts with the share of its draws that are right.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from defenses.errors import EvaluationError
from defenses.evaluation.counting import score_interval

__all__ = ["REPEATS", "Answers", "check_repeats", "interval", "moved", "share", "standing"]

Answers = tuple[str, ...]
"""By image, its draws; empty where it was not asked about."""

REPEATS = 20
"""How often a random model is asked about each image, unless its attacks have more draws."""

_ROUNDING = 1e-4  # of an image's logits: far above what another order of sums does in float32
_COARSE = 1e-2  # on an accelerator, which may multiply in fewer bits (TF32)


def moved(usual: Tensor, other: Tensor) -> Tensor:
    """Which answers differ by more than rounding, [n].

    Args:
        usual: Logits, [n, classes].
        other: Those of the same images, asked otherwise or once more.
    """
    sizes = usual.abs().amax(dim=1).double()
    sizes = sizes.clamp_min(1e-3 * float(sizes.max()))  # where large numbers cancelled out
    rounding = max(_ROUNDING, 32 * torch.finfo(usual.dtype).eps)
    if usual.device.type != "cpu":
        rounding = max(rounding, _COARSE)
    return (other.double() - usual.double()).abs().amax(dim=1) > rounding * sizes


def share(draws: str) -> float:
    """Of the draws that are right."""
    return draws.count("1") / len(draws)


def standing(
    correct: Sequence[bool],
    outcomes: Mapping[str, Sequence[bool | None]],
    repeats: Mapping[str, Answers],
) -> Iterator[tuple[str, Answers]]:
    """The answers of each image's worst version: clean, then after each attack and those before it.

    Args:
        correct: Is each clean image classified correctly, [n].
        repeats: By `"clean"` and attack the draws; empty of a deterministic model.

    Yields:
        `"clean"` or the attack, and the draws of n images.
    """
    rows = repeats.get("clean", tuple("01"[right] for right in correct))
    yield "clean", rows
    for name, found in outcomes.items():
        asked = repeats.get(name, tuple("0" if each is False else "" for each in found))
        pairs = zip(rows, asked, strict=True)
        rows = tuple(min(old, new or old, key=lambda row: row.count("1")) for old, new in pairs)
        yield name, rows


def interval(rows: Answers) -> tuple[float, float]:
    """The 95 % interval of the mean share: Wilson's, widened by what the draws add.

    Shares between 0 and 1 of mean p vary by at most p (1 - p), which is what Wilson's interval of
    n images takes: it holds for shares, a little too wide. Draws that images of a batch have in
    common add the variance of the mean over draws, which is measured from draw to draw. Of one
    draw it is Wilson's interval itself. The worst of several versions is taken by the same draws
    that it is judged by, so that the share of an attacked image is low rather than high.

    Args:
        rows: The draws of n >= 1 images, as many of each.
    """
    count, draws = len(rows), len(rows[0])
    right = sum(row.count("1") for row in rows)
    mean = right / (count * draws)
    common = 0.0
    if draws > 1:
        each = [sum(row[draw] == "1" for row in rows) / count for draw in range(draws)]
        common = sum((value - mean) ** 2 for value in each) / (draws - 1) / draws
    images = mean * (1 - mean) / count
    return score_interval(mean, count * images / (images + common) if common else count)


def check_repeats(
    repeats: Mapping[str, Answers], outcomes: Mapping[str, Sequence[bool | None]], count: int
) -> None:
    """Refuses draws that do not belong to these outcomes.

    Args:
        repeats: By `"clean"` and attack; empty of a deterministic model.
        outcomes: By attack: was any draw right; None where it was not tried.

    Raises:
        EvaluationError: Names, lengths or outcomes do not fit.
    """
    if not repeats:
        return
    clean = repeats.get("clean", ())
    draws = len(clean[0]) if clean else 0
    fits = draws > 0 and list(repeats) == ["clean", *outcomes]
    for name, rows in repeats.items():
        expected = outcomes.get(name, [True] * count)
        fits = fits and len(rows) == len(expected) == count
        for row, outcome in zip(rows, expected, strict=False):
            fits = fits and set(row) <= {"0", "1"} and len(row) == (0 if outcome is None else draws)
            fits = fits and (name == "clean" or not row or ("1" in row) is outcome)
    if not fits:
        raise EvaluationError(
            "repeats: expected as many draws of 0 and 1 for each image and attack"
        )
