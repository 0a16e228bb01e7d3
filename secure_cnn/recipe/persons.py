"""Persons as the unit of a run's privacy: how many there are, and what ε is for who has several.

Only a run whose unit is a person needs to know whose each image is; of others it is said where it
is known, for ε is then about one image only.
"""

import hashlib
import json

import privacy
from privacy.attach import group_cost
from privacy.persons import Persons
from secure_cnn.data import ImageData
from secure_cnn.errors import RunError
from secure_cnn.recipe.settings import Recipe

__all__ = ["GROUPED_NOTE", "group_cost_of", "groups_of", "persons_digest", "samples_of"]

GROUPED_NOTE = (
    "ε is about one image, and several may be of one person: for a person with several it is "
    "larger. By how much was told when the run began; it depends on the data, and is not written "
    "down."
)


def samples_of(recipe: Recipe, data: ImageData) -> int:
    """What the plan of a recipe counts: training images, or the persons that they are of."""
    groups = groups_of(recipe, data)
    return len(data.train) if groups is None else len(set(groups))


def groups_of(recipe: Recipe, data: ImageData) -> tuple[str, ...] | None:
    """Whose each training image is, where the recipe protects persons; else None.

    Refused are data of which nobody says so, and persons whom the model would be tested on too.
    """
    if recipe.unit != "person":
        return None
    if data.groups is None:
        raise RunError(
            f"unit=person: expected to know whose each image of {data.name} is; say so with groups "
            "(--groups folder, or --groups FILE.csv), or by an array groups in the .npz file"
        )
    if data.shared_persons:
        raise RunError(
            "unit=person: expected the images of each person on one side, got "
            f"{data.shared_persons} persons with training and test images: accuracy on who was "
            "trained on says nothing; "
            + (
                "--groups folder (groups) cuts the data by persons, where it has no test part"
                if recipe.groups is None
                else "move them to one side"
            )
        )
    return data.groups


def group_cost_of(plan: privacy.DPPlan | None, data: ImageData) -> str:
    """What ε is for a person with several images, where the plan protects images; else nothing.

    For who runs it: how many images somebody has is a figure of the data that no ε covers.
    """
    if plan is None or plan.unit == "person" or data.groups is None:
        return ""
    cost = group_cost(plan, Persons.of(data.groups, examples=len(data.groups)))
    return cost and f"{cost}; protect persons instead, with unit=person (--unit person)"


def persons_digest(data: ImageData) -> str:
    """A digest of whose each training image is; as secret as that is."""
    return hashlib.sha256(json.dumps(data.groups).encode()).hexdigest()
