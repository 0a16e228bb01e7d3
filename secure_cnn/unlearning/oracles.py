"""Oracles: models that the run's own recipe trains without those who left, to compare with.

What a method without a guarantee leaves of people is not known; how far its model is from such
models can be measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import final

from torch import nn

from privacy.unlearning import OracleGap, Relearning, oracle_gap, relearning_time
from secure_cnn.archive.certificates import Evidence
from secure_cnn.data import Split
from secure_cnn.errors import RunError
from secure_cnn.evaluate import evaluate_model
from secure_cnn.interruption import StopRequest
from secure_cnn.progress import part_progress, tell_share
from secure_cnn.recipe.initial import initial_model
from secure_cnn.recipe.once import train_once
from secure_cnn.unlearning.forgetting import Forgotten
from secure_cnn.unlearning.source import leaving

__all__ = ["Beside", "beside_oracles", "check_oracles", "evidence_of"]

_FEWEST, _MOST, _WHOLE = 2, 100, 100.0
_TAUGHT, _STEPS = 512, 300
"""Of who left, to be taught again, and steps after which that ends."""


@final
@dataclass(frozen=True, kw_only=True)
class Beside:
    """A model beside those that were really trained without who left.

    Attributes:
        gap: Of its accuracies.
        relearning: How soon it knows who left again, as well as the model before did; None where
            that one knew nobody, and of a private run, which says nothing of its training images.
    """

    gap: OracleGap
    relearning: Relearning | None


def check_oracles(oracles: int, margin: float) -> None:
    """Passes for none, or 2 to 100, and a margin above 0.

    Raises:
        RunError: It is another number.
    """
    if oracles and (type(oracles) is not int or not _FEWEST <= oracles <= _MOST):
        raise RunError(f"oracles: expected none, or {_FEWEST} to {_MOST}, got {oracles}")
    if not 0 < margin <= _WHOLE:
        raise RunError(f"margin: expected points of accuracy above 0, up to 100, got {margin:g}")


def beside_oracles(found: Forgotten, *, oracles: int, margin: float, stop: StopRequest) -> Beside:
    """Trains oracles by the run's recipe, with other seeds, and holds the new model against them.

    Of a private run they are private too, and what they cost the others is on top of its epsilon:
    nothing of them is kept, and only their accuracies are told.

    Args:
        found: Who left, and how.
        oracles: How many, 2 to 100.
        margin: Percentage points of accuracy that do not matter, above 0.
        stop: Looked at after every step.

    Raises:
        RunError: There are too few or too many, or the run was trained in shards, from which people
            leave exactly.
        UnlearningError: The margin cannot be.
        Stopped: A stop was requested.
    """
    check_oracles(oracles, margin)
    source = found.source
    if source.recipe.is_sharded or source.recipe.head == "ridge":
        raise RunError(
            "oracles: expected a run that was trained neither in shards nor with --head ridge, "
            "whose model is the oracle's, bit for bit; leave them out"
        )
    assert found.run.model is not None, "the run is complete"
    models = _trained(found, oracles, stop)
    left = leaving(source.data, found.request)
    gap = oracle_gap(
        found.run.model,
        models,
        forget=left,
        retain=found.data.train,
        test=found.data.test,
        margin=margin,
    )
    return Beside(gap=gap, relearning=_relearning(found, models, left.first(_TAUGHT)))


def _trained(found: Forgotten, oracles: int, stop: StopRequest) -> list[nn.Module]:
    """So many models of the run's recipe, each of a seed of its own, on who stays."""
    source, models = found.source, []
    with part_progress("oracle", oracles) as tell:
        for number in range(oracles):
            recipe = source.recipe_for(len(found.data.train))
            recipe = replace(recipe, seed=recipe.seed + 1 + number)
            files = source.files
            initial = initial_model(recipe, found.data, files.network, files.unlocking)
            advance = partial(tell_share, tell, number)
            models.append(train_once(recipe, initial, found.data, stop=stop, advance=advance).cpu())
            tell(number + 1)
    return models


def _relearning(found: Forgotten, oracles: list[nn.Module], left: Split) -> Relearning | None:
    """How soon who left is known again, beside models that never knew them."""
    source = found.source
    if source.recipe.epsilon is not None or found.run.model is None:
        return None
    before = evaluate_model(source.loaded.model, left, source.data.spec.classes).accuracy
    if not before:
        return None
    return relearning_time(found.run.model, oracles, forget=left, accuracy=before, most=_STEPS)


def evidence_of(beside: Beside | None) -> Iterator[Evidence]:
    """What was found beside models trained without them, as a certificate has it, if it was."""
    if beside is None:
        return
    yield from _gap_rows(beside.gap)
    if beside.relearning is not None:
        yield _relearning_row(beside.relearning)


def _relearning_row(found: Relearning) -> Evidence:
    """Steps to teach them again; far fewer than such models take, and they were never forgotten."""
    own = found.most if found.unlearned is None else found.unlearned
    words = "or more, against" if found.unlearned is None else "against"
    others = ", ".join(f"{found.most} or more" if n is None else f"{n}" for n in found.oracles)
    return Evidence(
        name=f"steps until who left is known again as before ({words} {others} of models trained "
        "without them)",
        value=float(own),
        low=None,
        high=None,
        n=len(found.oracles),
    )


def _gap_rows(gap: OracleGap) -> Iterator[Evidence]:
    """How far the accuracies are from those of models trained without them, in points."""
    names = {"forget": "who left", "retain": "who stayed", "test": "test"}
    for part, each in gap.parts.items():
        low, high = each.interval
        yield Evidence(
            name=f"accuracy above that of models trained without them, in points, {names[part]}",
            value=each.points,
            low=max(-_WHOLE, low),
            high=min(_WHOLE, high),
            n=len(each.oracles),
        )
    low, high = gap.average_gap_interval
    yield Evidence(
        name=f"average gap to them, in points ({gap.verdict}; {gap.forget.margin:g} points do not "
        "matter)",
        value=gap.average_gap,
        low=low,
        high=min(_WHOLE, high),
        n=len(gap.forget.oracles),
    )
