"""What follows a run while it goes on: `metrics.jsonl`, and a function that is called."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
from support.run_records import make_epoch

from secure_cnn import run
from secure_cnn.errors import RunError
from secure_cnn.recipe import metrics
from secure_cnn.record import EpochRecord, RunRecord

BASE = {"epochs": 3, "batch_size": 16, "robust_samples": 4}
KEYS = [
    *("variant", "epoch", "step", "seconds", "learning_rate", "test_loss", "test_accuracy"),
    *("train_loss", "epsilon"),
]


@pytest.fixture
def recipe(recipe):
    """Makes recipes of three epochs."""
    return partial(recipe, **BASE)


@pytest.fixture(autouse=True)
def _quick(quick):
    """No pages and no timing here."""


def lines(done):
    """What the run's file holds."""
    return [json.loads(line) for line in done.folder.metrics.read_text().splitlines()]


def test_a_line_an_epoch_with_the_keys_that_are_documented(recipe):
    """They are those of the record, of every training of the run in its order."""
    done = run(recipe(eps=0.05))
    found = lines(done)
    assert [(each["variant"], each["epoch"]) for each in found] == [
        (variant, epoch) for variant in ("plain", "n-fgsm") for epoch in (1, 2, 3)
    ]
    assert all(list(each) == KEYS for each in found)
    assert found == [asdict(epoch) for epoch in done.record.epochs]
    for key in KEYS:
        assert key in metrics.__doc__


def test_no_private_training_loss_is_among_them(recipe):
    """Epsilon does not cover it, nor the baseline's, which is of the same images."""
    done = run(recipe(epsilon=8.0, delta=1e-3))
    for each in lines(done):
        assert each["train_loss"] is None
        assert (each["epsilon"] is None) == (each["variant"] == "plain")


def test_what_is_no_number_is_null(tmp_path):
    """Every line is JSON as its standard has it."""
    path = tmp_path / "metrics.jsonl"
    metrics.append_metrics(path, make_epoch("plain", 1, test_loss=float("nan")))
    metrics.append_metrics(path, make_epoch("plain", 2, test_loss=float("inf")))
    values = [
        json.loads(line, parse_constant=lambda word: pytest.fail(word))
        for line in path.read_text().splitlines()
    ]
    assert [each["test_loss"] for each in values] == [None, None]


@pytest.mark.parametrize(("steps", "torn"), [(2, False), (4, True), (6, False), (6, True)])
def test_a_resumed_run_writes_no_epoch_twice(recipe, stopped_after, steps, torn):
    """Also where a kill left half a line, or one of an epoch that is trained again."""
    asked = recipe()
    with stopped_after(steps):
        part = run(asked)
    if torn:
        with part.folder.metrics.open("a") as file:
            file.write('{"variant": "plain", "epo')
    done = run(asked, resume=True)
    assert lines(done) == [asdict(epoch) for epoch in done.record.epochs]
    assert len(lines(done)) == 3


def test_a_link_in_its_place_is_not_written_through(recipe, tmp_path, stopped_after):
    """Who may write into the folder must not choose another file to be added to."""
    other = tmp_path / "other"
    other.write_text("mine")
    asked = recipe(baseline=False)

    def plant(epoch):
        if epoch.epoch == 1:
            place = tmp_path / "run" / "metrics.jsonl"
            place.unlink()
            place.symlink_to(other)

    with pytest.raises(RunError, match=r"metrics\.jsonl: expected a file that can be written"):
        run(asked, on_epoch=plant)
    assert other.read_text() == "mine"


def test_a_function_is_told_every_epoch_once_it_is_saved(recipe):
    """With the epoch's record; the training's state is on the disk by then."""
    told = []
    asked = recipe()
    root = Path(asked.out)

    def tell(epoch):
        assert isinstance(epoch, EpochRecord)
        folder = [each.name for each in (root / "checkpoints").iterdir()]
        assert folder == ["training.safetensors"]
        assert RunRecord.read(root / "run.json").epochs[-1] == epoch
        told.append(epoch)

    done = run(asked, on_epoch=tell)
    assert tuple(told) == done.record.epochs


@pytest.mark.parametrize("error", [ValueError("tracker"), KeyboardInterrupt()])
def test_what_the_function_raises_is_raised_and_loses_nothing(recipe, error):
    """The run is interrupted, and goes on behind that epoch as if nothing had happened."""
    whole = run(recipe("whole", baseline=False))
    asked, told = recipe(baseline=False), []

    def tell(epoch):
        told.append(epoch.epoch)
        if told == [1, 2]:
            raise error

    with pytest.raises(type(error)):
        run(asked, on_epoch=tell)
    assert RunRecord.read(whole.folder.record).status == "complete"
    done = run(asked, resume=True, on_epoch=tell)
    assert told == [1, 2, 3]
    assert [e.test_loss for e in done.record.epochs] == [e.test_loss for e in whole.record.epochs]


@pytest.mark.parametrize("wrong", [3, "print", [print]])
def test_what_cannot_be_called_is_refused_before_the_folder_is_made(recipe, wrong, tmp_path):
    """Not after the first epoch."""
    with pytest.raises(RunError, match="on_epoch: expected a function or None"):
        run(recipe(), on_epoch=wrong)
    assert not (tmp_path / "run").exists()
