"""Checkpoints by time: within an epoch, whole, on record before they are seen, and gone on from."""

import sys
from functools import partial

import pytest
import torch

import privacy
from secure_cnn import run
from secure_cnn.checkpoint import read_state, write_state
from secure_cnn.recipe.training import Training
from secure_cnn.record import RunRecord

# Eight steps an epoch, two epochs.
BASE = {"epochs": 2, "batch_size": 8, "robust_samples": 4, "baseline": False}
PRIVATE = {"epsilon": 8.0, "delta": 1e-3}
FOLDER = sys.modules["secure_cnn.recipe.folder"]
RUN = sys.modules["secure_cnn.recipe.run"]


@pytest.fixture
def recipe(recipe):
    """Makes recipes of a plain or a private training alone."""
    return partial(recipe, **BASE)


@pytest.fixture(autouse=True)
def _quick(quick):
    """No pages and no timing here."""


@pytest.fixture
def minute(monkeypatch):
    """A clock by which each optimizer step takes one minute, and nothing else any time."""
    done = [0]
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        inner = optimizer.step

        def step(self, *args, inner=inner, **kwargs):
            done[0] += 1
            return inner(self, *args, **kwargs)

        monkeypatch.setattr(optimizer, "step", step)
    monkeypatch.setattr(RUN, "Training", partial(Training, clock=lambda: 60.0 * done[0]))


@pytest.fixture
def written(monkeypatch):
    """What each state on the disk is the state of, and what the record knew of by then."""
    seen = []

    def write(path, state, *, sealing):
        record = RunRecord.read(path.parent.parent / "run.json")
        seen.append((state["step"], record.released))
        write_state(path, state, sealing=sealing)

    monkeypatch.setattr(FOLDER, "write_state", write)
    return seen


@pytest.mark.usefixtures("minute")
@pytest.mark.parametrize(
    ("minutes", "steps"),
    [
        (0.0, [0, 8, 16]),
        (3.0, [0, 3, 6, 8, 11, 14, 16]),
        (2.5, [0, 3, 6, 8, 11, 14, 16]),
        (1.0, list(range(17))),
        (8.0, [0, 8, 16]),
        (100.0, [0, 8, 16]),
    ],
)
def test_the_training_is_saved_by_time_too(recipe, written, minutes, steps):
    """Whenever the minutes are over, counted from the last checkpoint, of whatever kind."""
    run(recipe(checkpoint_minutes=minutes))
    assert [step for step, _ in written] == steps


@pytest.mark.usefixtures("minute")
def test_steps_of_a_private_training_are_on_record_before_a_checkpoint_shows_them(recipe, written):
    """A checkpoint shows weights: what was released until then is known to the record first."""
    done = run(recipe(checkpoint_minutes=3.0, **PRIVATE))
    assert [step for step, _ in written] == [0, 3, 6, 8, 11, 14, 16]
    assert all(released >= step for step, released in written)
    assert done.record.claims["privacy"]["steps"] == 16


@pytest.mark.usefixtures("minute")
def test_a_private_sample_is_never_cut_by_a_checkpoint(recipe, written, monkeypatch):
    """Of a sample in many physical batches only the last ends in a state to go on from."""
    small = privacy.PhysicalBatches(size=8, multiple=1)
    module = sys.modules["secure_cnn.recipe.seams"]
    monkeypatch.setattr(module.privacy, "PhysicalBatches", lambda *_, **__: small)
    run(recipe(checkpoint_minutes=1e-9, batch_size=32, epochs=3, **PRIVATE))
    assert [step for step, _ in written] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("minute")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw", "shift": 1, "flip": True},
        {"eps": 0.05, "attack": "n-fgsm", "eps_warmup": 0.7},
        {"eps": 0.05, "attack": "free", "attack_steps": 3, "epochs": 3},
    ],
    ids=["sgd", "adamw", "n-fgsm-warmup", "free"],
)
def test_a_killed_run_goes_on_from_the_last_checkpoint_within_its_epoch(
    recipe, monkeypatch, settings
):
    """No chance to save on leaving; the end is bit for bit that of the whole run."""
    settings = {"checkpoint_minutes": 3.0, **settings}
    whole, asked = run(recipe("whole", **settings)), recipe("parts", **settings)
    with monkeypatch.context() as patch:
        inner, count = Training.state, iter(range(99))

        def state(self, step):
            if next(count) == 3:
                raise MemoryError
            return inner(self, step)

        patch.setattr(Training, "state", state)
        with pytest.raises(MemoryError):
            run(asked)
    kept = whole.folder.root.parent / "parts" / "checkpoints" / "training.safetensors"
    assert read_state(kept, unlocking=None)["step"] == 6
    done = run(asked, resume=True)
    a, b = done.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    told, expected = (
        [(e.epoch, e.step, e.train_loss, e.test_loss) for e in each.record.epochs]
        for each in (done, whole)
    )
    assert told == expected


@pytest.mark.usefixtures("minute")
@pytest.mark.parametrize("write", range(2, 6))
def test_killed_between_record_and_state_what_was_released_is_spent(recipe, monkeypatch, write):
    """The record knows of steps that no state shows: they count, and so many fewer are taken."""
    asked = recipe(checkpoint_minutes=3.0, **PRIVATE)
    with monkeypatch.context() as patch:
        count = iter(range(1, 99))

        def killed(*args, **kwargs):
            if next(count) == write:
                raise MemoryError
            write_state(*args, **kwargs)

        patch.setattr(FOLDER, "write_state", killed)
        with pytest.raises(MemoryError):
            run(asked)
    known = RunRecord.read(f"{asked.out}/run.json").released
    done = run(asked, resume=True)
    held = [0, 3, 6, 8][write - 2]
    assert known > held
    said = f"{known - held} noised steps were released after"
    assert any(said in note for note in done.record.notes)
    assert done.record.claims["privacy"]["steps"] == 16
    assert done.record.epochs[-1].step <= 16 - (known - held)
