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

__all__ = ["NAMED", "NamedRecipe", "named_recipe", "recipe_like", "stored_results"]

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


_ASIDE = {"seed", "device", "baseline", "robust_samples", "checkpoint_minutes"}
"""Settings with which a recipe is trained the same: where, how often, and what is judged."""
_FASHION = 60_000
"""Training images of Fashion-MNIST: a step on all of them."""
_HEAD_SOURCE = (
    "Wavelets: Tramèr and Boneh 2021, arXiv 2011.11660; random patches: Coates and Ng 2011; "
    "whitened by images of noise; steps on all images and a large rate: docs/experiments.md"
)
_HEAD_CHOSEN = (
    "on 5,000 training images of Fashion-MNIST that were kept back, among 40 settings; that "
    "choice is not in epsilon"
)


def _private(name: str, *, epsilon: float, steps: int, rate: float) -> NamedRecipe:
    """A head on features that cost nothing, trained on all images of Fashion-MNIST at each step."""
    return NamedRecipe(
        name=name,
        says=f"Fashion-MNIST at epsilon {epsilon:g}: a linear layer on handcrafted features.",
        recipe=Recipe(
            out=f"runs/{name}",
            data="fashion-mnist",
            model="handcrafted",
            epsilon=epsilon,
            delta=1e-5,
            epochs=steps,
            batch_size=_FASHION,
            learning_rate=rate,
            warmup=0.0,
            trials=40,
        ),
        source=_HEAD_SOURCE,
        chosen=_HEAD_CHOSEN,
    )


def _robust(name: str, *, attack: str, steps: int | None, epochs: int) -> NamedRecipe:
    """A small network of bands, which are as wide as they are for this size of changes."""
    return NamedRecipe(
        name=name,
        says=f"Fashion-MNIST against changes of 0.1 in linf, by {epochs} epochs of {attack}.",
        recipe=Recipe(
            out=f"runs/{name}",
            data="fashion-mnist",
            model="banded",
            epochs=epochs,
            batch_size=128,
            optimizer="muon",
            learning_rate=0.1,
            weight_decay=5e-4,
            average_decay=0.998,
            shift=1,
            eps=0.1,
            attack=attack,
            attack_steps=steps,
        ),
        source="FGSM-RS: Wong et al. 2020, arXiv 2001.03994; PGD: Madry et al. 2018, arXiv "
        "1706.06083; Muon: Jordan et al. 2024; bands of brightness: docs/experiments.md",
        chosen="5,000 of the training images, kept back, by PGD along five gradients; the trials "
        "are in docs/experiments.md",
    )


def _both(name: str, *, epsilon: float) -> NamedRecipe:
    """The network of bands, privately: what an attack makes of an image is that one example's."""
    return NamedRecipe(
        name=name,
        says=f"Fashion-MNIST at epsilon {epsilon:g} and against changes of 0.1 in linf at once.",
        recipe=Recipe(
            out=f"runs/{name}",
            data="fashion-mnist",
            model="banded",
            epochs=10,
            batch_size=2048,
            optimizer="muon",
            learning_rate=0.1,
            epsilon=epsilon,
            delta=1e-5,
            eps=0.1,
            attack="ffgsm",
            trials=12,
        ),
        source="FGSM-RS: Wong et al. 2020, arXiv 2001.03994; Muon on the noised gradient: Jordan "
        "et al. 2024; bands of brightness: docs/experiments.md",
        chosen="5,000 of the training images, kept back, among 12 settings at epsilon 3; that "
        "choice is not in epsilon",
    )


_ALL = (
    _private("fashion-private-1", epsilon=1.0, steps=100, rate=5.0),
    _private("fashion-private-3", epsilon=3.0, steps=100, rate=10.0),
    _private("fashion-private-8", epsilon=8.0, steps=120, rate=15.0),
    NamedRecipe(
        name="fashion-fast",
        says="Fashion-MNIST without a protection, in five short epochs of a small network.",
        recipe=Recipe(
            out="runs/fashion-fast",
            data="fashion-mnist",
            model="quick",
            epochs=5,
            batch_size=64,
            learning_rate=0.1,
            weight_decay=5e-4,
            warmup=0.2,
            average_decay=0.0,
        ),
        source="fixed first filters, a rate that rises and falls: airbench, arXiv 2404.00498",
        chosen="5,000 of the training images, kept back; the trials are in docs/experiments.md",
    ),
    NamedRecipe(
        name="fashion-private-certified-3",
        says="Fashion-MNIST at epsilon 3, with answers that are proven to withstand l2 changes.",
        recipe=Recipe(
            out="runs/fashion-private-certified-3",
            data="fashion-mnist",
            model="nonexpansive",
            epsilon=3.0,
            delta=1e-5,
            epochs=100,
            batch_size=_FASHION,
            learning_rate=24.0,
            max_grad_norm=0.3,
            warmup=0.0,
            trials=10,
        ),
        source="wavelets that move less than images do: Bruna and Mallat 2013, arXiv 1203.1513; a "
        "margin over a Lipschitz constant: Tsuzuku et al. 2018, arXiv 1802.04034",
        chosen="5,000 training images of Fashion-MNIST that were kept back, among 10 settings; "
        "that choice is not in epsilon",
    ),
    _robust("fashion-robust-fast", attack="ffgsm", steps=None, epochs=8),
    _robust("fashion-robust", attack="pgd", steps=2, epochs=12),
    _both("fashion-private-robust-1", epsilon=1.0),
    _both("fashion-private-robust-3", epsilon=3.0),
    NamedRecipe(
        name="private",
        says="Training at epsilon 8 on any images: as it is done where nothing else is said.",
        recipe=Recipe(out="runs/private", epsilon=8.0),
        source="the defaults of this package: docs/defaults.md",
        chosen="other data sets than yours, see docs/defaults.md",
        any_data=True,
    ),
    NamedRecipe(
        name="robust",
        says="Training against changes of 8/255, on any images, by single steps of an attack.",
        recipe=Recipe(out="runs/robust", model="compact", eps=8 / 255, attack="n-fgsm"),
        source="N-FGSM: de Jorge et al. 2022, arXiv 2202.01181; averaged weights: FastAT benchmark",
        chosen="not tuned",
        any_data=True,
    ),
    NamedRecipe(
        name="private-robust",
        says="Both at once, on any images: epsilon 8, and changes of 8/255.",
        recipe=Recipe(
            out="runs/private-robust",
            model="compact",
            epsilon=8.0,
            optimizer="muon",
            eps=8 / 255,
            attack="ffgsm",
        ),
        source="as fashion-private-robust-3",
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


def recipe_like(recipe: Recipe) -> NamedRecipe | None:
    """The recipe with a name that has these settings, but for those that train nothing else."""
    settings = recipe.to_dict()
    for each in NAMED.values():
        apart = _ASIDE | ({"data"} if each.any_data else set())
        if set(each.recipe.changed_from(settings)) <= apart:
            return each
    return None


def stored_results() -> Measurements:
    """What the named recipes reached: `case` is the name, `median` the mean over the seeds.

    `low` and `high` are the worst and the best seed; of each figure there is its standard deviation
    too, `accuracy_sd`.
    """
    return Measurements.read(_RESULTS)
