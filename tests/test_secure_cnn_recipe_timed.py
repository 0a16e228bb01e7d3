"""A recipe as a benchmark trains it: what `run` makes of it, epoch by epoch, and nothing else."""

from dataclasses import replace

import pytest
import torch

from secure_cnn import Recipe, RunError, run
from secure_cnn.data import load_data
from secure_cnn.recipe.timed import RecipeTraining


class Keeping:
    """Keeps the weights that it is to judge."""

    def __init__(self):
        self.kept = []

    def judge(self, model):
        self.kept.append({name: w.clone() for name, w in model.state_dict().items()})


@pytest.mark.parametrize(
    "settings",
    [{}, {"model": "quick", "average_decay": 0.0}, {"model": "quick", "shift": 1, "seed": 3}],
    ids=str,
)
def test_it_is_the_training_of_a_run(shapes, tmp_path, quick, settings):
    """The weights that are judged last are those that a run keeps, to the bit."""
    recipe = Recipe(out=tmp_path / "run", data=shapes, epochs=2, learning_rate=0.2, **settings)
    kept = run(recipe).model.state_dict()
    watch = Keeping()
    training = RecipeTraining(recipe=replace(recipe, seed=7))
    training(load_data(shapes, seed=recipe.seed), seed=recipe.seed, watch=watch)
    assert len(watch.kept) == 2
    assert set(watch.kept[-1]) == set(kept)
    assert all(torch.equal(watch.kept[-1][name], kept[name]) for name in kept)
    assert not all(torch.equal(watch.kept[0][name], kept[name]) for name in kept)


def test_a_protected_recipe_is_refused():
    """Its time is that of its protection, which other commands measure."""
    with pytest.raises(RunError, match="expected one without protections, got private"):
        RecipeTraining(recipe=Recipe(out="x", epsilon=1.0))
