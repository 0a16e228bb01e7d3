"""What examples put into the released sum: none more than the clipping norm, and nothing else.

Where a contribution hides in the noise, it is looked for along the directions in which it would be
too large; and in steps with hardly any noise the sum itself is held against its definition.
"""

import math
from collections.abc import Sequence

from scipy import stats
from torch import Tensor

from privacy.audit.checks import Check
from privacy.audit.scores import CanaryScoreAuditor

__all__ = [
    "MISMATCH",
    "check_clipped_sum",
    "check_contribution",
    "check_images",
    "check_largest",
    "check_objective",
    "check_release",
    "check_sum",
    "mismatch",
]

MISMATCH = 0.01
"""Largest part of a clipped sum that need not be that of the definition, in clipping norms for the
root of the number of examples: rounding makes 1e-5, convolutions in TF32 1e-3."""
_TOLERANCE = 0.01
"""How far a measured sum may lie from the definition's beyond chance: rounding, low precision."""
_UNEXPLAINED = 1e-5
"""Change of a parameter, as a part of it, that rounding explains."""


def check_contribution(auditor: CanaryScoreAuditor, *, error: float) -> Check:
    """One example may move the clipped sum by the clipping norm and no further."""
    moved = auditor.mean_difference(confidence=1 - error)
    return Check(
        name="contribution",
        passed=moved <= 1 + _TOLERANCE,
        measured=moved,
        limit=1.0,
        says="clipping norms by which one example moves the sum, at least",
    )


def check_sum(sums: Tensor, excess: Tensor, *, noise_multiplier: float, error: float) -> Check:
    """No more may be added up than the definition's clipped sum, less may.

    Many small excesses of all examples together show here, where none of them shows alone.

    Args:
        sums: Norms of the definition's sums, [steps, k] of k kinds.
        excess: What was added beyond them along their own directions, noise with it, [steps, k].
    """
    steps, kinds = sums.shape
    beyond = (excess - _TOLERANCE * sums).double().sum(0) / (noise_multiplier * math.sqrt(steps))
    measured = float(beyond.max())
    limit = float(stats.norm.isf(error / kinds))
    return Check(
        name="sum",
        passed=measured <= limit,
        measured=measured,
        limit=limit,
        says="what is added up beyond the clipped gradients, in deviations of the noise",
    )


def check_largest(beyond: Tensor, *, noise_multiplier: float, error: float) -> Check:
    """In no physical batch, and by no canary, may more be added than the clipping norm each.

    Args:
        beyond: What was added beyond the definition in one direction each, noise with it: towards
            what is clipped off of a physical batch, or along a canary; float [k].
    """
    measured = float(beyond.max()) / noise_multiplier
    limit = float(stats.norm.isf(error / len(beyond)))
    return Check(
        name="largest contribution",
        passed=measured <= limit,
        measured=measured,
        limit=limit,
        says="most that one physical batch or canary added beyond its clipped gradients, in "
        "deviations of the noise",
    )


def mismatch(residual: Tensor, total: Tensor, *, examples: int, noise_multiplier: float) -> float:
    """What one step with hardly any noise added up that is not the definition's sum, or less of it.

    Args:
        residual: What the step added up beyond the definition's sum, noise with it; float [d].
        total: The definition's sum; float [d].
        noise_multiplier: Of this step, far below 1.

    Returns:
        Its size in clipping norms for the root of the number of examples; infinite where it is not
        a number.
    """
    residual, total = residual.double(), total.double()
    size = max(float(total.norm()), 1e-12)
    along = max(-1.0, min(0.0, float(residual @ total) / size**2))
    rest = float((residual - along * total).square().sum())
    if not math.isfinite(rest):
        return math.inf
    noise = noise_multiplier**2 * residual.numel()
    return math.sqrt(max(0.0, rest - noise) / max(1, examples))


def check_clipped_sum(mismatches: Sequence[float]) -> Check:
    """With hardly any noise, what is added up must be the definition's sum, or less of it.

    Whatever couples examples or bends a gradient shows here, however many parameters there are.

    Args:
        mismatches: One a step, as `mismatch` gives it.
    """
    measured = max(mismatches)
    return Check(
        name="clipped sum",
        passed=measured <= MISMATCH,
        measured=measured,
        limit=MISMATCH,
        says="clipping norms an example that are not the definition's, in steps with hardly any "
        "noise",
    )


def check_images(foreign: int) -> Check:
    """What the step works on must be what was read for it: else its coins are for nothing.

    Images that no row has, as they are, may be rows that were augmented: they are not counted.

    Args:
        foreign: Images of rows that were not read for the batch in which they are.
    """
    return Check(
        name="images",
        passed=foreign == 0,
        measured=float(foreign),
        limit=0.0,
        says="images in the batches that are of rows which were not read for them",
    )


def check_objective(apart: bool) -> Check:
    """No loss may know other examples, not even by a constant: its gradient would be theirs too.

    Asked of a few examples at the first parameters: what sets in only later is not seen.

    Args:
        apart: Whether changing one example left the losses of the others as they were.
    """
    return Check(
        name="objective",
        passed=apart,
        measured=float(not apart),
        limit=0.0,
        says="the objective keeps examples apart: 1 if changing one, or leaving one out, moved the "
        "losses of others",
    )


def check_release(unexplained: float) -> Check:
    """Nothing may change but by the released gradient, in the optimizer's step."""
    return Check(
        name="release",
        passed=unexplained <= _UNEXPLAINED,
        measured=unexplained,
        limit=_UNEXPLAINED,
        says="largest change of parameters, buffers, tensors of the model or the optimizer, or of "
        "what lies in .grad, that no released gradient explains, as a part of them",
    )
