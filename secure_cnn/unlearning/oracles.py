"""Oracles: models that the run's own recipe trains without those who left, to compare with.

What a method without a guarantee leaves of people is not known; how far its model is from such
models can be measured.
"""

from dataclasses import replace
from functools import partial

from privacy.unlearning import OracleGap, oracle_gap
from secure_cnn.errors import RunError
from secure_cnn.interruption import StopRequest
from secure_cnn.progress import part_progress, tell_share
from secure_cnn.recipe.initial import initial_model
from secure_cnn.recipe.once import train_once
from secure_cnn.unlearning.forgetting import Forgotten
from secure_cnn.unlearning.source import leaving

__all__ = ["check_oracles", "measure_gap"]

_FEWEST, _MOST, _WHOLE = 2, 100, 100.0


def check_oracles(oracles: int, margin: float) -> None:
    """Passes for none, or 2 to 100, and a margin above 0.

    Raises:
        RunError: It is another number.
    """
    if oracles and (type(oracles) is not int or not _FEWEST <= oracles <= _MOST):
        raise RunError(f"oracles: expected none, or {_FEWEST} to {_MOST}, got {oracles}")
    if not 0 < margin <= _WHOLE:
        raise RunError(f"margin: expected points of accuracy above 0, up to 100, got {margin:g}")


def measure_gap(found: Forgotten, *, oracles: int, margin: float, stop: StopRequest) -> OracleGap:
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
    if source.recipe.is_sharded:
        raise RunError(
            "oracles: expected a run that was not trained in shards, whose model is the oracle's, "
            "bit for bit; leave them out"
        )
    assert found.run.model is not None, "the run is complete"
    models = []
    with part_progress("oracle", oracles) as tell:
        for number in range(oracles):
            recipe = replace(
                source.recipe,
                seed=source.recipe.seed + 1 + number,
                batch_size=source.recipe.batch_size
                and min(source.recipe.batch_size, len(found.data.train)),
            )
            files = source.files
            initial = initial_model(recipe, found.data, files.network, files.unlocking)
            advance = partial(tell_share, tell, number)
            models.append(train_once(recipe, initial, found.data, stop=stop, advance=advance))
            tell(number + 1)
    return oracle_gap(
        found.run.model,
        [model.cpu() for model in models],
        forget=leaving(source.data, found.request),
        retain=found.data.train,
        test=found.data.test,
        margin=margin,
    )
