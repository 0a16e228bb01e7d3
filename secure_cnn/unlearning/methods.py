"""The ways in which people leave a run, and what each of them promises.

`auto` takes the cheapest whose promise holds for the run: what a training in shards need not train
again, or the sums of a last layer, then what a private training has promised all along, then a
training anew.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from privacy import GaussianSteps, PrivacyError, group_epsilon
from privacy.unlearning import SCRUB, SSD, FineTuning, Heuristic, NegGradPlus, SalUn
from secure_cnn.errors import RunError
from secure_cnn.recipe import Recipe
from secure_cnn.unlearning.requests import Request
from secure_cnn.unlearning.source import Source

__all__ = ["HEURISTICS", "METHODS", "Guarantee", "Method", "chosen_method", "units_of"]

METHODS = ("sharded", "rewind", "ridge", "retrain", "group-privacy")
"""Those with a guarantee."""
HEURISTICS: Mapping[str, Callable[[], Heuristic]] = {
    "fine-tuning": FineTuning,
    "neggrad+": NegGradPlus,
    "ssd": SSD,
    "scrub": SCRUB,
    "salun": SalUn,
}
"""Those without, which are only taken where that is said."""
_NON_ADAPTIVE = (
    "The requests do not depend on the model: exactness is lost to whoever asks because of what it "
    "answered (Gupta et al. 2021, arXiv 2106.04378)."
)
_CHOICES = (
    "Settings, network and preprocessing were chosen before, perhaps with the images of those who "
    "left; that is not undone."
)
_INDEPENDENT = (
    "Who leaves was decided without looking at the model; and every step was sampled and noised as "
    "the model's file claims."
)
_NEWEST = (
    "Nobody left the same run by another request, which this one does not know of: people leave "
    "the newest run, of which the others are a part."
)
_MACHINE = (
    "Stages that were kept are those that this machine and these versions would train: they are of "
    "the machine and the versions that the record of the run before names."
)
_SUMS = (
    "The sums of the run before, in which those who left still are, are destroyed with it: from "
    "old and new sums together one can tell who left."
)
_OBSERVER = "Nothing is said of who has seen the model before, or compares both."


@final
@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What a method promises, in a sentence, and what for that must be so.

    `epsilon` and `delta` bound how far the model can be from one without the people; both are None
    where it is exactly such a model, and where nothing `holds`.
    """

    says: str
    assumptions: tuple[str, ...]
    epsilon: float | None = None
    delta: float | None = None
    holds: bool = True

    @property
    def exact(self) -> bool:
        """Whether nothing of them is left at all."""
        return self.holds and self.epsilon is None


@final
@dataclass(frozen=True, kw_only=True)
class Method:
    """The way that is taken, why, and what it promises."""

    name: str
    why: str
    guarantee: Guarantee


def chosen_method(
    asked: str, source: Source, request: Request, *, limit: float, no_guarantee: bool
) -> Method:
    """The method that was asked for, or the cheapest whose promise holds.

    Args:
        asked: One of `METHODS` or `HEURISTICS`, or `auto`.
        source: The run.
        request: Who leaves.
        limit: The largest epsilon that counts as a promise to all who have left together.
        no_guarantee: Whether one of `HEURISTICS` may be taken.

    Raises:
        RunError: There is no such method, or its promise does not hold here, with the reason.
    """
    if asked in HEURISTICS:
        return _heuristic(asked, source, no_guarantee=no_guarantee)
    if asked not in (*METHODS, "auto"):
        raise RunError(
            f"method: expected auto, {', '.join(METHODS)}, or without a guarantee "
            f"{', '.join(HEURISTICS)}, got {asked!r}"
        )
    if asked in ("sharded", "rewind") or (asked == "auto" and source.recipe.is_sharded):
        return _in_stages(asked, source)
    if asked == "ridge" or (asked == "auto" and source.recipe.head == "ridge"):
        return _subtracted(source)
    if asked == "group-privacy" or (asked == "auto" and source.recipe.epsilon):
        bounded = _bounded(source, request, limit=limit)
        if isinstance(bounded, Method):
            return bounded
        if asked != "auto":
            raise RunError(f"method: {bounded}")
        return _retrained(source, bounded)
    neither = "the run was trained neither in shards nor privately"
    return _retrained(source, "it was asked for" if asked == "retrain" else neither)


def _in_stages(asked: str, source: Source) -> Method:
    """By the stages of its training, which are `sharded`, or of one network: `rewind`."""
    shards, slices = source.recipe.shards, source.recipe.slices
    name = "rewind" if source.recipe.is_sharded and shards == 1 else "sharded"
    if not source.recipe.is_sharded or asked not in ("auto", name):
        raise RunError(f"method: {_no_stages(asked, source.recipe)}")
    return Method(
        name=name,
        why=f"the run was trained in {shards} shards of {slices} slices"
        if shards > 1
        else f"the run was trained in {slices} slices, and a state of it is kept before each",
        guarantee=Guarantee(
            says="The model is, bit for bit, the one that the same training gives without them: "
            "every stage that had seen one of their images was trained again without.",
            assumptions=(_NON_ADAPTIVE, _CHOICES, _OBSERVER, _MACHINE, *_begun_with(source)),
        ),
    )


def _no_stages(asked: str, recipe: Recipe) -> str:
    """Why the stages that were asked for are not there."""
    if asked == "sharded":
        return (
            "expected a run that was trained in shards (--shards, --slices) for sharded, got "
            + ("one network in slices; take rewind" if recipe.is_sharded else "one that was not")
            + ("" if recipe.is_sharded else "; take retrain")
        )
    if recipe.is_sharded:
        return f"expected one network in slices for rewind, got {recipe.shards}; take sharded"
    if recipe.epsilon is not None:
        return (
            "expected a run that is not private for rewind: in which step somebody was first "
            "drawn is kept nowhere, since epsilon holds for those alone who do not know it; take "
            "auto"
        )
    return (
        "expected a run that was trained in slices (--slices) for rewind, got one that kept no "
        "state from within its first epoch, which shows everybody; take retrain"
    )


def _subtracted(source: Source) -> Method:
    if source.recipe.head != "ridge":
        raise RunError(
            "method: expected a run whose last layer was solved for (--head ridge) for ridge, got "
            "one that was trained by steps; take retrain"
        )
    return Method(
        name="ridge",
        why="the run's last layer was solved for on fixed features",
        guarantee=Guarantee(
            says="The model is the one that the same training gives without them: the sums that "
            "its last layer is solved from are, number for number, those of the others alone, and "
            "its other layers are formulas that never saw an image.",
            assumptions=(_CHOICES, _OBSERVER, _SUMS),
        ),
    )


def _retrained(source: Source, why: str) -> Method:
    return Method(
        name="retrain",
        why=why,
        guarantee=Guarantee(
            says="The model was trained from its first step on the images of the others alone.",
            assumptions=(_CHOICES, _OBSERVER, *_begun_with(source), *_unsure(source)),
        ),
    )


def _heuristic(asked: str, source: Source, *, no_guarantee: bool) -> Method:
    if not no_guarantee:
        raise RunError(
            f"method: {asked} has no guarantee: nobody knows what is left of the people; say "
            "--no-guarantee (no_guarantee) if it is wanted all the same, or take auto"
        )
    if source.recipe.epsilon is not None:
        raise RunError(
            f"method: expected a run that is not private for {asked}, whose steps see those who "
            "stay without noise, which epsilon would not cover; take auto"
        )
    if source.recipe.is_sharded or source.recipe.head == "ridge":
        raise RunError(
            f"method: expected a run that was trained neither with --head ridge nor in shards for "
            f"{asked}, since from those people leave exactly; take auto"
        )
    return Method(
        name=asked,
        why="it was asked for, without a guarantee",
        guarantee=Guarantee(
            says="There is no guarantee: the weights were changed so that the people seem "
            "forgotten, and what is left of them is not known.",
            assumptions=(),
            holds=False,
        ),
    )


def _bounded(source: Source, request: Request, *, limit: float) -> Method | str:
    """By what a private training promises to a group; or the reason why it promises too little."""
    spent = _steps(source)
    if spent is None:
        return "expected a private run for group-privacy, got one without epsilon"
    steps, delta = spent
    gone = _gone(source)
    if gone and steps.unit == "person":
        return "people left the model before, and how many is not on record of a run by persons"
    size = gone + units_of(source, request, steps.unit)
    epsilon = group_epsilon([steps], delta, size=size)
    group = f"{size} {steps.unit}s" if size > 1 else f"one {steps.unit}"
    if epsilon > limit:
        return (
            f"a private training promises {group} together epsilon {epsilon:.3g} at delta "
            f"{delta:.3g}, above the limit of {limit:g}"
        )
    before = f" (of whom {gone} left before)" if gone else ""
    return Method(
        name="group-privacy",
        why=f"the run was private, and promises that much to {group}",
        guarantee=Guarantee(
            says=f"The model, unchanged, is ({epsilon:.3g}, {delta:.3g})-indistinguishable from "
            f"one that was trained without {group}{before}.",
            assumptions=(_CHOICES, _INDEPENDENT, _NEWEST, *_unsure(source)),
            epsilon=epsilon,
            delta=delta,
        ),
    )


def units_of(source: Source, request: Request, unit: str) -> int:
    """How many examples, or persons, leave: with a copy of an image whoever else has it."""
    if unit != "person":
        return len(request.left)
    return max(request.people, len({each.person for each in request.left}))


def _begun_with(source: Source) -> tuple[str, ...]:
    """What has to hold of weights that the training began with, if it did."""
    digest = source.record.model.weights
    if not digest:
        return ()
    return (
        f"The weights that the training began with (SHA-256 {digest}) were not trained on images "
        "of theirs.",
    )


def _unsure(source: Source) -> tuple[str, ...]:
    """What has to hold of images of which it could not be told whether they are the run's."""
    if source.certain:
        return ()
    return (
        "The images are those of the training: the key to tell is in no file of a private run that "
        "is not sealed.",
    )


def _gone(source: Source) -> int:
    """Images that were in the model's training and left its data since, by its promise alone."""
    claims = source.loaded.claims.get("data")
    told: Mapping[str, object] = claims if isinstance(claims, Mapping) else {}
    trained, left = told.get("train"), told.get("left", 0)
    here = len(source.data.train) + len(source.there.missing)
    if type(trained) is not int or type(left) is not int or trained - left != here:
        raise RunError(
            f"{source.model_path}: expected images of which those that left and those that are "
            f"there make up the {trained} of its training, got {left} and {here}; put the "
            "inventory of its run back"
        )
    return left


def _steps(source: Source) -> tuple[GaussianSteps, float] | None:
    """What the model's own file claims of its private steps."""
    claims = source.loaded.claims.get("privacy")
    if not isinstance(claims, Mapping):
        return None
    try:
        steps = GaussianSteps(
            noise_multiplier=claims["noise_multiplier"],
            sampling_rate=claims["sampling_rate"],
            steps=claims["steps"],
            unit=claims.get("unit", "example"),
        )
        return steps, float(claims["delta"])
    except (KeyError, TypeError, ValueError, PrivacyError) as error:
        raise RunError(
            f"{source.model_path}: expected claims of a private training, got others: {error}"
        ) from error
