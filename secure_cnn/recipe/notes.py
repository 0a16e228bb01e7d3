"""What is said beside a run's figures: in its record, on its page and on the screen."""

from collections.abc import Iterable

from secure_cnn.models import BANDS_REACH
from secure_cnn.recipe.diagnosis import Conditions, learned, not_learned_note
from secure_cnn.recipe.guard import overfitting_note
from secure_cnn.recipe.named import recipe_like
from secure_cnn.recipe.outcome import Outcome
from secure_cnn.recipe.settings import Recipe
from secure_cnn.recipe.training import Training
from secure_cnn.record import PLAIN, ResultRecord

__all__ = ["COPIES_NOTE", "notes_before", "notes_on", "trials_note"]

COPIES_NOTE = (
    "A private step was timed with one copy of each example; {copies} copies take about so many "
    "times as long."
)
_BASELINE_NOTE = (
    "The plain model was trained on the same images without protections, to show what they cost. "
    "Its figures are not covered by epsilon, and its weights were not kept."
)
_IMAGES_NOTE = (
    "ε is about persons. How many training images there are is on record exactly, and is taken as "
    "public: ε does not cover by how many of them a person changes that number."
)

_NAMED_NOTE = "Its settings are those of the recipe {name}."
_BANDS_NOTE = (
    f"The bands of this network are made for changes of up to {BANDS_REACH:g}; larger ones, as of "
    "{eps:g} here, show on black and on white too: compact may do as well."
)


def notes_before(recipe: Recipe) -> tuple[str, ...]:
    """What is known of a run before its first step."""
    notes: tuple[str, ...] = (_BASELINE_NOTE,) if len(recipe.variants) > 1 else ()
    named = recipe_like(recipe)
    if named is not None:
        notes += (_NAMED_NOTE.format(name=named.name),)
    if recipe.unit == "person":
        notes += (_IMAGES_NOTE,)
    if recipe.model == "banded" and recipe.norm == "linf" and (recipe.eps or 0.0) > BANDS_REACH:
        notes += (_BANDS_NOTE.format(eps=recipe.eps),)
    return notes if recipe.epsilon is None else (*notes, trials_note(recipe))


def trials_note(recipe: Recipe) -> str:
    """What epsilon leaves out, since choosing among trainings on the same data spends too."""
    tried = "how many is not stated" if recipe.trials is None else f"{recipe.trials}, as stated"
    return (
        "ε is that of this training alone: it does not charge the settings that were tried on "
        f"these private data ({tried})."
    )


def notes_on(
    training: Training, outcome: Outcome, before: Iterable[ResultRecord]
) -> tuple[str, ...]:
    """What must be said of a training that has ended: what its guard did, and what it lacks.

    `before` are the results of the run so far, the baseline's among them.
    """
    recipe, variant, seams = training.recipe, training.variant, training.seams
    plain = [result for result in before if result.variant == PLAIN != variant.name]
    weights = [weight for weight in training.model.parameters() if weight.requires_grad]
    plan = None if seams.private is None else seams.private.plan
    conditions = Conditions(
        steps=seams.schedule.steps,
        batch_size=training.chosen.batch_size,
        learning_rate=seams.schedule.peak,
        chosen_rate=recipe.learning_rate is not None,
        clipped=recipe.clip_grad_norm > 0,
        parameters=sum(weight.numel() for weight in weights),
        noise_multiplier=None if plan is None else plan.noise_multiplier,
        eps=None if variant.method is None else recipe.eps,
        plain_learned=learned(plain[0].confusion) if plain else None,
    )
    confusion = outcome.result.confusion
    return (
        "" if training.guard is None else training.guard.note,
        not_learned_note(variant.name, confusion, outcome.loss, conditions),
        overfitting_note(variant, recipe.threat, training.model, training.data, seed=recipe.seed),
    )
