"""A model has one figure: that of its training and that of its file are the same."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from secure_cnn import Recipe, run
from secure_cnn.cli.network import own_network

MINE = """
from torch import nn

def net(spec):
    channels = spec.shape[0]
    return nn.Sequential(
        nn.Conv2d(channels, 24, 3, stride=2, padding=1), nn.GroupNorm(12, 24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, stride=2, padding=1, groups=24), nn.GroupNorm(12, 24),
        nn.Conv2d(24, 24, 1), nn.GroupNorm(6, 24), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(24, len(spec.classes)))
"""
PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "baseline": False}
SETTINGS = {
    "plain": {},
    "average": {"average_decay": 0.9},
    "adversarial": {"eps": 0.05, "baseline": False, "robust_samples": 4},
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A network of small maps, in a file of the user's."""
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return own_network("mine.py:net")


@pytest.mark.parametrize(
    "settings",
    [*SETTINGS.values(), pytest.param(PRIVATE, marks=pytest.mark.slow)],
    ids=[*SETTINGS, "private"],
)
def test_evaluating_the_file_gives_the_figures_of_the_run_bit_for_bit(
    cli, shapes, tmp_path, quick, own, settings
):
    """GroupNorm over few values rounds by layout, and what follows amplifies that.

    A net of torchvision's got 45.8 % from its training and 50.0 % from its file.
    """
    out, found = tmp_path / "run", tmp_path / "found.json"
    recipe = Recipe(out=out, data=shapes, model=own.name, epochs=2, batch_size=16, **settings)
    done = run(recipe, network=own)
    words = ("--data", shapes, "--model", own.name, "--samples", 4, "--no-verdicts")
    code, _, err = cli("evaluate", out, *words, "--json", found)
    assert code == 0, err
    clean, result = json.loads(Path(found).read_text())["clean"], done.record.results[-1]
    assert clean["accuracy"] == result.accuracy
    assert clean["confusion"] == [list(row) for row in result.confusion]
    assert clean["loss"] == done.record.epochs[-1].test_loss


def test_the_model_that_is_given_back_lies_as_that_of_its_file(shapes, tmp_path, quick, own):
    """Strides too, also where a layout has two readings: kernels of 1x1, and depthwise ones."""
    done = run(Recipe(out=tmp_path / "run", data=shapes, model=own.name, epochs=1), network=own)
    expected = {n: torch.empty(p.shape).stride() for n, p in done.model.named_parameters()}
    assert {n: p.stride() for n, p in done.model.named_parameters()} == expected
    assert not any(module.training for module in done.model.modules())
    assert isinstance(done.model, nn.Sequential)
