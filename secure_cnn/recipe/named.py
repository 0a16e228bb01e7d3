"""Recipes by name: settings that were found to be good, each with its source.

A named recipe is an ordinary `Recipe`: any of its settings may be replaced. What it reached is in
results.json beside this file, which `secure-cnn reproduce` writes anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from secure_cnn.errors import RunError
from secure_cnn.recipe.settings import Recipe
from secure_cnn.record import Measurements

__all__ = ["NAMED", "NamedRecipe", "named_recipe", "stored_results"]

_RESULTS = Path(__file__).with_name("results.json")


@dataclass(frozen=True, kw_only=True)
class NamedRecipe:
    """A recipe that has a name.

    Attributes:
        name: What it is called, as in `secure-cnn train --recipe fashion-fast`.
        says: What it is for, in a sentence.
        recipe: Its settings; `out` is a proposal.
        source: Where its ideas come from.
        chosen: By what data its settings were chosen: what was tried on private images is not in
            their epsilon.
        any_data: Whether it is for any images, so that `data` must be said.
    """

    name: str
    says: str
    recipe: Recipe
    source: str
    chosen: str
    any_data: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its settings that are not the default, but for `out`."""
        usual = Recipe(out="").to_dict()
        own = self.recipe.to_dict()
        return {
            name: value for name, value in own.items() if value != usual[name] and name != "out"
        }


_ALL = (
    NamedRecipe(
        name="robust",
        says="Training against changes of 8/255, on any images, by single steps of an attack.",
        recipe=Recipe(out="runs/robust", eps=8 / 255, attack="n-fgsm", flip=True, shift=2),
        source="N-FGSM: de Jorge et al. 2022, arXiv 2202.01181; averaged weights: FastAT benchmark",
        chosen="not tuned",
        any_data=True,
    ),
)
NAMED: Mapping[str, NamedRecipe] = MappingProxyType({each.name: each for each in _ALL})
"""All of them by their names."""


def named_recipe(name: str) -> NamedRecipe:
    """The recipe of that name.

    Raises:
        RunError: There is none.

    Example:
        >>> named_recipe("robust").recipe.attack
        'n-fgsm'
    """
    if name not in NAMED:
        raise RunError(f"recipe: expected one of {', '.join(NAMED)}, got {name!r}")
    return NAMED[name]


def stored_results() -> Measurements:
    """What the named recipes reached: `case` is the name, `median` the mean over the seeds.

    `low` and `high` are the worst and the best seed; of each figure there is its standard deviation
    too, `accuracy_sd`.
    """
    return Measurements.read(_RESULTS)
