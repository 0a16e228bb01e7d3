"""A named recipe trained anew with several seeds, and its figures against those on record.

Each seed is an ordinary run in a folder of its own; what is finished there is not done again, and
what was interrupted goes on. Which test images are attacked, and how, follows from the recipe.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t as student
from torch import nn

import defenses
from secure_cnn.checkpoint import read_model
from secure_cnn.errors import RunError
from secure_cnn.evaluate import batch_for, evaluate_model
from secure_cnn.nonexpansive import lipschitz_bound
from secure_cnn.recipe.folder import RunFolder
from secure_cnn.recipe.identity import KEYED
from secure_cnn.recipe.named import NamedRecipe
from secure_cnn.recipe.run import run
from secure_cnn.recipe.seams import make_device
from secure_cnn.recipe.settings import Recipe
from secure_cnn.record import Measurements, Row, RunRecord, hardware, versions

__all__ = ["Agreement", "agreements", "reproduce"]

_SPREAD = "_sd"
_CONFIDENCE = 0.99
_ROUNDING = 1e-9
_RADII = (0.1, 0.25, 0.5)
"""In l2, up to which answers are proven where they can be."""
_CONDITIONS = ("seconds", "attacked")
"""What belongs to the machine, or was asked for: no figure of the recipe."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Whether a figure that was reproduced lies where the one on record lets it be expected.

    The two means, over the seeds of each, may differ by `margin` at most: two of the same recipe do
    in 99 of 100 cases (Student's t, by the standard deviation on record).
    """

    metric: str
    found: Row
    stored: Row
    margin: float

    @property
    def agrees(self) -> bool:
        """Whether it lies within."""
        return abs(self.found.median - self.stored.median) <= self.margin


def reproduce(
    named: NamedRecipe, folder: Path, *, seeds: int, data: str | None = None, attacked: int | None
) -> Measurements | None:
    """Trains, evaluates and attacks a named recipe with the seeds 0 up to `seeds`.

    Guarantee: a seed whose run is complete in `folder` is read, never trained again; one that was
    interrupted goes on, and so does its evaluation. The figures are those of the finished models;
    what a run shows of the test images after each epoch chooses nothing.

    Args:
        named: What to reproduce.
        folder: Where the runs are, `seed-0` and so on; made where it is not there.
        seeds: How many, at least 1.
        data: Images to train on; those of the recipe by default.
        attacked: Test images that AutoAttack tries where the recipe has a threat model; None takes
            all.

    Returns:
        Of each figure the mean as `median`, the worst and the best seed, and as `..._sd` its
        standard deviation; None where it was interrupted.

    Raises:
        RunError: There are no seeds, the data must be said, or the folder holds other runs.
    """
    if type(seeds) is not int or seeds < 1:
        raise RunError(f"seeds: expected a whole number, at least 1, got {seeds!r}")
    if named.any_data and data is None:
        raise RunError(f"data: {named.name} is for any images; say which with --data")
    found: list[dict[str, float]] = []
    kept = "all" if attacked is None else attacked
    for seed in range(seeds):
        place = folder / f"seed-{seed}"
        recipe = replace(named.recipe, out=place, seed=seed, baseline=False, robust_samples=1)
        if data is not None and data != named.recipe.data:
            recipe = replace(recipe, data=data, trials=None)
        done = _trained(recipe)
        if done is None:
            return None
        found.append(
            _figures(recipe, *done, state=folder / f"{place.name}-{kept}.state", attacked=attacked)
        )
    return Measurements(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(make_device(named.recipe)),
        versions=versions(),
        rows=tuple(_rows(named.name, named.recipe.variant.name, found)),
    )


def agreements(stored: Sequence[Row], found: Sequence[Row]) -> list[Agreement]:
    """Each figure of `found` beside the one on record of the same recipe, but for times."""
    known = {(row.case, row.metric): row for row in stored}
    # A figure of some images is not held against one of all.
    asked = {row.median for row in (*stored, *found) if row.metric == "attacked"}
    compared = []
    for row in found:
        if row.metric == "autoattack" and len(asked) > 1:
            continue
        before = known.get((row.case, row.metric))
        spread = known.get((row.case, row.metric + _SPREAD))
        if before is None or spread is None or row.metric in _CONDITIONS or before.n < 2:
            continue
        quantile = float(student.ppf((1 + _CONFIDENCE) / 2, before.n - 1))
        margin = quantile * spread.median * math.sqrt(1 / before.n + 1 / row.n)
        margin = max(margin, _ROUNDING * abs(before.median))
        compared.append(Agreement(metric=row.metric, found=row, stored=before, margin=margin))
    return compared


def _trained(recipe: Recipe) -> tuple[RunRecord, nn.Module] | None:
    """The run of a recipe in its folder: read, gone on with or begun; None if interrupted."""
    folder = RunFolder(root=Path(recipe.out), sealed=False)
    begun = folder.record.exists()
    if begun:
        record = folder.recorded()
        changed = recipe.changed_from(record.settings)
        if changed:
            raise RunError(
                f"{folder.root}: its run has another {', '.join(changed)} than the recipe; choose "
                "another folder"
            )
        if record.status == "complete":
            return record, _checked_model(recipe, folder, record)
    # One that was killed before it had saved anything had not taken a step.
    saved = folder.training.exists()
    done = run(recipe, resume=begun and saved, force=begun and not saved)
    return None if done.model is None else (done.record, done.model)


def _checked_model(recipe: Recipe, folder: RunFolder, record: RunRecord) -> nn.Module:
    """The model of a finished run, which must find on today's images what its record says."""
    data = recipe.images()
    model = read_model(folder.model, unlocking=None).model
    found = evaluate_model(
        model, data.test, data.spec.classes, batch_size=batch_for(model, data.test)
    )
    told, result = record.data.fingerprint, record.results[-1]
    other = not told.startswith(KEYED) and told != data.fingerprint
    own = (result.accuracy, result.macro_recall, result.confusion)
    if other or own != (found.accuracy, found.macro_recall, found.confusion):
        raise RunError(
            f"{folder.root}: its model does not find on {recipe.data} what its record says; data, "
            "model or record were changed since it was trained: choose another folder"
        )
    return model


def _figures(
    recipe: Recipe, record: RunRecord, model: nn.Module, *, state: Path, attacked: int | None
) -> dict[str, float]:
    """What a finished run reached."""
    result = record.results[-1]
    figures = {
        "accuracy": result.accuracy,
        "macro_recall": result.macro_recall,
        "seconds": sum(epoch.seconds for epoch in record.epochs),
    }
    if record.privacy is not None:
        figures |= {"epsilon": record.privacy.epsilon, "delta": record.privacy.delta}
    test = recipe.images().test
    bound = lipschitz_bound(model)
    if bound is not None:
        proven = defenses.certify_lipschitz(model, test, head=bound.head, constant=bound.constant)
        figures |= {f"certified@{r:g}": proven.certified(r).accuracy for r in _RADII}
    if recipe.threat is not None:
        samples = None if attacked is None else min(attacked, len(test))
        report = defenses.evaluate(
            model,
            test,
            recipe.threat,
            attacks=["autoattack"],
            samples=samples,
            verdicts=True,
            state=state,
        )
        failed = sum(each.outcome == "fail" for each in report.verdicts)
        figures |= {
            "autoattack": report.worst_case_accuracy,
            "attacked": float(report.samples),
            "verdicts_failed": float(failed),
        }
    return figures


def _rows(case: str, variant: str, found: list[dict[str, float]]) -> Iterator[Row]:
    for metric in found[0]:
        values = [each[metric] for each in found]
        row = Row(
            case=case,
            variant=variant,
            metric=metric,
            median=min(max(values), max(min(values), fmean(values))),  # rounding lies outside else
            low=min(values),
            high=max(values),
            unit="s" if metric == "seconds" else "1",
            n=len(values),
        )
        yield row
        if len(values) > 1:
            spread = stdev(values)
            yield replace(row, metric=metric + _SPREAD, median=spread, low=spread, high=spread)
