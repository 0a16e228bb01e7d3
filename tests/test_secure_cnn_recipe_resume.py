"""Interrupted and resumed: what the uninterrupted run would have given, or a refusal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

import privacy
from defenses import OverfittingGuard
from secure_cnn import Sealing, Unlocking, archive, run
from secure_cnn.checkpoint import read_state, write_state
from secure_cnn.errors import RunError
from secure_cnn.record import RunRecord

# Four steps an epoch, three epochs.
BASE = {"epochs": 3, "batch_size": 16, "robust_samples": 4, "baseline": False}
PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "batch_size": 64, "epochs": 6}


@pytest.fixture
def recipe(recipe):
    """Makes recipes of three epochs without a baseline."""
    return partial(recipe, **BASE)


@pytest.fixture(autouse=True)
def _quick(quick):
    """No pages and no timing here."""


def asked_before(asked):
    """Whether the recipe's run was begun."""
    return Path(asked.out).exists()


def weights_equal(first, second):
    """Whether two runs ended with bit-identical weights."""
    a, b = first.model.state_dict(), second.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_clocks(record):
    """A record without what depends on how long something took, where it is, and which run."""
    plain = record.to_dict()
    for key in ("seconds", "created", "hardware", "settings", "run_id"):
        plain.pop(key)
    for epoch in plain["epochs"]:
        epoch.pop("seconds")
    return plain


def resumed_as(asked, whole):
    """The rest of a run, which must end as the uninterrupted one did: same weights and record."""
    done = run(asked, resume=True)
    assert weights_equal(done, whole)
    assert without_clocks(done.record) == without_clocks(whole.record)
    return done


def killed(asked, monkeypatch, owner, name, step):
    """A run that is killed in a function that was replaced, which is put back afterwards."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, step)
        with pytest.raises(MemoryError):
            run(asked)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "muon", "weight_decay": 0.1, "eps": 0.05},
        {"shift": 1, "flip": True, "label_smoothing": 0.1},
        {"average_decay": 0.0},
        {"eps": 0.05, "attack": "n-fgsm"},
        {
            "eps": 0.05,
            "attack": "pgd",
            "attack_steps": 2,
            "attack_precision": "bfloat16",
            "optimizer": "adamw",
        },
        {
            "eps": 0.05,
            "attack": "trades",
            "attack_steps": 2,
            "eps_warmup": 0.7,
        },
        {"eps": 0.05, "attack": "free", "attack_steps": 3},
        {"gaussian_sigma": 0.2},
        {"eps": 0.05, "attack": "n-fgsm", "baseline": True},
    ],
    ids=[
        "sgd",
        "adamw",
        "muon",
        "augmented",
        "no-average",
        "n-fgsm",
        "pgd-adamw",
        "trades-warmup",
        "free",
        "gaussian",
        "with-baseline",
    ],
)
def test_resumed_equals_uninterrupted(recipe, stopped_after, settings):
    """Stopped within an epoch, at its end and in the last one: the same weights and record."""
    whole = run(recipe("whole", **settings))
    asked = recipe("parts", **settings)
    # With a baseline, the fourth stop is in the training that comes after it.
    for steps in (2, 2, 6, 5)[: 4 if settings.get("baseline") else 3]:
        with stopped_after(steps):
            part = run(asked, resume=asked_before(asked))
        assert part.record.status == "interrupted"
        assert part.model is None
        assert RunRecord.read(part.folder.record).status == "interrupted"
    done = resumed_as(asked, whole)
    assert [path.name for path in done.folder.model.parent.iterdir()] == ["model.safetensors"]


@pytest.fixture
def touchy(monkeypatch):
    """A guard that takes a difference of one image for a collapse, so that it acts often."""
    module = sys.modules["secure_cnn.recipe.guard"]
    monkeypatch.setattr(module, "OverfittingGuard", partial(OverfittingGuard, gap=0.01))


UNGUARDED = {
    **{"eps": 0.2, "attack": "fgsm", "epochs": 8},
    **{"learning_rate": 0.3, "clip_grad_norm": 0.0},
}
OVERFITTING = {**UNGUARDED, "guard": True}
IN_ITS_SIXTH_EPOCH = 22  # at whose end it is taken back


@pytest.mark.usefixtures("touchy")
def test_a_guarded_training_goes_on_with_its_guard(recipe, stopped_after, monkeypatch):
    """Taken back and with its noise raised, stopped before and after: the same weights and note."""
    whole = run(recipe("whole", **OVERFITTING))
    (note,) = [each for each in whole.record.notes if "guard saw" in each]
    assert "epoch 6:" in note
    assert "taken back to the last good epoch" in note
    free = run(recipe("free", **UNGUARDED))
    assert not any("guard saw" in each for each in free.record.notes)
    assert not weights_equal(free, whole)  # control: it acted on the weights
    asked = recipe("parts", **OVERFITTING)
    for steps in (3, 6, 5, 4, 7):
        with stopped_after(steps):
            run(asked, resume=asked_before(asked))
    monkeypatch.setattr(sys.modules["secure_cnn.recipe.run"], "judge", killed_once())
    with pytest.raises(MemoryError):
        run(asked, resume=True)
    resumed_as(asked, whole)


@pytest.mark.usefixtures("touchy")
@pytest.mark.parametrize("lost", ["guard", "objective"])
def test_a_guard_that_lost_its_memory_ends_elsewhere(recipe, stopped_after, lost):
    """Control of the comparison: without the good state, or with the noise it began with."""
    whole, asked = run(recipe("whole", **OVERFITTING)), recipe("parts", **OVERFITTING)
    first = read_fresh(recipe("fresh", **OVERFITTING), stopped_after)
    with stopped_after(IN_ITS_SIXTH_EPOCH):
        part = run(asked)
    state = read_state(part.folder.training, unlocking=None)
    write_state(part.folder.training, {**state, lost: first[lost]}, sealing=None)
    assert not weights_equal(run(asked, resume=True), whole)


def killed_once():
    """A judge that is killed the first time, after the training was completed."""
    module, calls = sys.modules["secure_cnn.recipe.run"], iter(range(9))
    inner = module.judge

    def judge(*args):
        if next(calls) == 0:
            raise MemoryError
        return inner(*args)

    return judge


def test_the_comparison_can_fail(recipe, stopped_after):
    """Control: a training that lost its attack's generator, or its average, ends elsewhere."""
    settings = {"eps": 0.05, "attack": "n-fgsm"}
    whole = run(recipe("whole", **settings))
    for lost in ("objective", "average", "optimizer"):
        asked = recipe(lost, **settings)
        with stopped_after(6):
            part = run(asked)
        state = read_state(part.folder.training, unlocking=None)
        fresh = read_fresh(recipe(f"fresh-{lost}", **settings), stopped_after)
        write_state(part.folder.training, {**state, lost: fresh[lost]}, sealing=None)
        assert not weights_equal(run(asked, resume=True), whole)


def read_fresh(asked, stopped_after):
    """The state of a training after one step."""
    with stopped_after(1):
        part = run(asked)
    return read_state(part.folder.training, unlocking=None)


def test_a_run_that_was_killed_goes_on_from_its_last_epoch(recipe, monkeypatch):
    """No chance to save on leaving: the epoch under way is trained again, to the same end."""
    whole, asked = run(recipe("whole")), recipe("parts")
    inner, count = torch.optim.SGD.step, iter(range(1, 100))

    def step(self, *args, **kwargs):
        if next(count) == 7:
            raise MemoryError
        return inner(self, *args, **kwargs)

    killed(asked, monkeypatch, torch.optim.SGD, "step", step)
    resumed_as(asked, whole)


def test_an_epoch_on_record_that_was_not_saved_is_trained_again(recipe, monkeypatch):
    """Killed between the record and the checkpoint: no epoch is on record twice."""
    whole, asked = run(recipe("whole")), recipe("parts")
    module = sys.modules["secure_cnn.recipe.folder"]
    inner, count = module.write_state, iter(range(1, 100))

    def write(*args, **kwargs):
        if next(count) == 3:
            raise MemoryError
        inner(*args, **kwargs)

    killed(asked, monkeypatch, module, "write_state", write)
    assert len(RunRecord.read(f"{asked.out}/run.json").epochs) == 2
    resumed_as(asked, whole)


def test_a_run_that_was_killed_while_judged_is_judged_again(recipe, monkeypatch):
    """After the last step: nothing is trained anew, and the result is there."""
    whole, asked = run(recipe("whole")), recipe("parts")
    module = sys.modules["secure_cnn.recipe.run"]
    killed(asked, monkeypatch, module, "judge", lambda *_: (_ for _ in ()).throw(MemoryError()))
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: pytest.fail("trained again"))
    resumed_as(asked, whole)


def test_a_private_run_goes_on_within_its_plan(recipe, stopped_after):
    """Same plan; steps add up to it; epsilon never falls and ends where the plan says."""
    asked = recipe(**PRIVATE)
    with stopped_after(2):
        first = run(asked)
    with stopped_after(2):
        second = run(asked, resume=True)
    done = run(asked, resume=True)
    assert first.record.privacy == second.record.privacy == done.record.privacy
    assert [e.step for e in done.record.epochs] == [1, 2, 3, 4, 5, 6]
    epsilons = [e.epsilon for e in done.record.epochs]
    assert epsilons == sorted(epsilons)
    assert epsilons[: len(first.record.epochs)] == [e.epsilon for e in first.record.epochs]
    assert done.record.claims["privacy"]["steps"] == done.record.privacy.steps == 6
    assert epsilons[-1] == pytest.approx(done.record.privacy.epsilon)
    assert epsilons[-1] <= 8.0


def test_a_private_run_with_poisson_samples_goes_on_too(recipe, stopped_after, monkeypatch):
    """At a sampling rate below one, interrupted within an epoch, under attack."""
    module = sys.modules["secure_cnn.recipe.run"]
    monkeypatch.setattr(module, "make_plan", cache(module.make_plan))  # it takes two seconds
    asked = recipe(**{**PRIVATE, "batch_size": 16, "epochs": 1, "eps": 0.05, "optimizer": "adamw"})
    with stopped_after(3):
        run(asked)
    done = run(asked, resume=True)
    assert done.record.claims["privacy"]["steps"] == 4
    assert done.record.results[-1].epsilon <= 8.0


def test_noise_is_fresh_after_a_resume(recipe, stopped_after):
    """Two resumes of one checkpoint part ways: repeated noise would be no noise."""
    asked = recipe("first", **PRIVATE)
    with stopped_after(3):
        part = run(asked)
    shutil.copytree(part.folder.root, part.folder.root.parent / "second")
    assert not weights_equal(run(asked, resume=True), run(recipe("second", **PRIVATE), resume=True))


def test_a_moved_folder_resumes(recipe, stopped_after, tmp_path):
    """Where the folder is, is no setting of the training."""
    whole = run(recipe("whole"))
    with stopped_after(3):
        run(recipe("old"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert weights_equal(run(recipe("new"), resume=True), whole)


@pytest.fixture
def interrupted(recipe, stopped_after):
    """A run that was stopped in its second epoch."""
    with stopped_after(5):
        return run(recipe())


def test_other_settings_are_refused(recipe, interrupted):
    """Each changed setting is named, and nothing in the folder is touched."""
    before = interrupted.folder.training.read_bytes()
    with pytest.raises(RunError, match="other settings: epochs, seed; resume with its own"):
        run(recipe(epochs=9, seed=1), resume=True)
    assert interrupted.folder.training.read_bytes() == before


def test_a_run_of_a_version_with_other_defaults_is_refused(recipe, interrupted):
    """What nobody chose was another figure then: it says so, and touches nothing."""
    state, record = interrupted.folder.training, interrupted.folder.record
    before, text = read_state(state, unlocking=None), record.read_text()
    content = json.loads(text)
    del content["settings"]["clip_grad_norm"]
    record.write_text(json.dumps(content))
    with pytest.raises(RunError, match="begun by an earlier version, which chose learning rate"):
        run(recipe(), resume=True)
    record.write_text(text)
    for chosen in ({"learning_rate": 0.25, "steps": 12}, {"learning_rate": 0.1, "steps": 24}):
        write_state(state, {**before, "chosen": chosen}, sealing=None)
        with pytest.raises(RunError, match="which another version chose"):
            run(recipe(), resume=True)
    write_state(state, before, sealing=None)
    assert run(recipe(), resume=True).record.status == "complete"


def test_a_record_that_was_edited_does_not_change_the_training(recipe, interrupted):
    """The checkpoint knows its own settings."""
    text = interrupted.folder.record.read_text()
    interrupted.folder.record.write_text(text.replace('"epochs": 3', '"epochs": 9'))
    with pytest.raises(RunError, match="checkpoint: it was trained with another epochs"):
        run(recipe(epochs=9), resume=True)


def test_a_plan_that_was_edited_is_refused(recipe, stopped_after):
    """A checkpoint of a larger budget does not go on under a smaller one, nor the reverse."""
    with stopped_after(2):
        part = run(recipe(**PRIVATE))
    state = read_state(part.folder.training, unlocking=None)
    state["private"]["plan"]["noise_multiplier"] *= 2
    write_state(part.folder.training, state, sealing=None)
    with pytest.raises(privacy.PlanError, match="plan"):
        run(recipe(**PRIVATE), resume=True)


def test_a_complete_run_is_not_resumed(recipe):
    """There is nothing to do, and its model is left alone."""
    done = run(recipe())
    before = done.folder.model.read_bytes()
    with pytest.raises(RunError, match="complete; there is nothing to resume"):
        run(recipe(), resume=True)
    assert done.folder.model.read_bytes() == before


def test_no_run_is_not_resumed(recipe, tmp_path):
    """A folder that is not there, and one without a record."""
    with pytest.raises(RunError, match=r"run\.json"):
        run(recipe(), resume=True)
    assert not (tmp_path / "run").exists()


def test_changed_data_is_refused(recipe, interrupted, tmp_path, shapes):
    """The same name with another pixel is another data set."""
    arrays = dict(np.load(shapes))
    arrays["images"][0, 0, 0] ^= 1
    np.savez(tmp_path / "shapes.npz", **arrays)
    moved = recipe(data=tmp_path / "shapes.npz", model="compact")
    replace(interrupted.record, settings=moved.to_dict()).write(interrupted.folder.record)
    with pytest.raises(RunError, match="the data changed since the run began"):
        run(moved, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "private"}, "expected a training of plain under way"),
        ({"variant": 3}, "expected a training of plain under way"),
        ({"step": "many"}, "expected a training of plain under way"),
        ({"model": {}}, "does not fit this training"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "does not fit this training"),
        ({"average": {"averages": {}, "updates": 1}}, "another model"),
        ({"average": 1}, "does not fit this training"),
        ({"settings": None}, "does not fit this training"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(recipe, interrupted, change, message):
    """One typed error of one kind, whatever is wrong with it."""
    path = interrupted.folder.training
    write_state(path, {**read_state(path, unlocking=None), **change}, sealing=None)
    with pytest.raises(RunError, match=message):
        run(recipe(), resume=True)


def test_a_model_is_no_training_under_way(recipe, interrupted):
    """A finished model's file in its place is refused."""
    other = run(recipe("other"))
    shutil.copy(other.folder.model, interrupted.folder.training)
    with pytest.raises(RunError, match="training of plain under way, got another file"):
        run(recipe(), resume=True)


def test_a_damaged_checkpoint_is_refused(recipe, interrupted):
    """Cut short: an error of the archive that names the file's fault, no traceback of torch."""
    path = interrupted.folder.training
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(archive.StateError):
        run(recipe(), resume=True)


def test_a_sealed_run_goes_on_sealed(recipe, stopped_after):
    """With its key it ends where the plain one ends; the state under way is sealed too."""
    identity, signer = archive.generate_identity(), archive.generate_signer()
    sealing = Sealing(recipients=(identity.recipient,), signer=signer)
    whole = run(recipe("whole"))
    with stopped_after(5):
        part = run(recipe(), sealing=sealing)
    assert part.folder.training.name == "training.sealed"
    archive.verify(part.folder.training, trusted=[signer.verifier])
    stranger = Unlocking(identity=archive.generate_identity())
    with pytest.raises(archive.WrongKey):
        run(recipe(), sealing=sealing, unlocking=stranger, resume=True)
    with pytest.raises(RunError, match="is sealed; give the identity"):
        run(recipe(), sealing=sealing, resume=True)
    done = run(recipe(), sealing=sealing, unlocking=Unlocking(identity=identity), resume=True)
    assert weights_equal(done, whole)
    assert [path.name for path in done.folder.model.parent.iterdir()] == ["model.sealed"]


def test_sealing_is_never_silently_lost(recipe, stopped_after):
    """A sealed run resumed without recipients would go on in the clear: refused. So is the rest."""
    identity = archive.generate_identity()
    sealing = Sealing(recipients=(identity.recipient,))
    with stopped_after(1):
        run(recipe("sealed"), sealing=sealing)
        run(recipe("plain"))
    with pytest.raises(RunError, match=r"are sealed, .*name its recipients and signer again"):
        run(recipe("sealed"), unlocking=Unlocking(identity=identity), resume=True)
    with pytest.raises(RunError, match=r"are plain, .*name no recipient"):
        run(recipe("plain"), sealing=sealing, resume=True)


def test_sealing_is_not_lost_before_the_first_step_either(recipe, monkeypatch):
    """A run that was killed within its first step has a checkpoint already."""
    sealing = Sealing(recipients=(archive.generate_identity().recipient,))
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            run(recipe(), sealing=sealing)
    with pytest.raises(RunError, match="are sealed"):
        run(recipe(), resume=True)


def test_a_signal_to_the_program_is_a_clean_end(shapes, tmp_path):
    """SIGTERM to the real command: exit code 130, a checkpoint, a hint; then it resumes."""
    words = [sys.executable, "-c", "from secure_cnn.cli import main; main()", "train"]
    words += ["--out", str(tmp_path / "run"), "--data", shapes, "--epochs", "100000"]
    running = subprocess.Popen(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    training = tmp_path / "run" / "checkpoints" / "training.safetensors"
    while not training.exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=600)
    assert running.returncode == 130, told
    assert "--resume" in told
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "interrupted"
    state = read_state(training, unlocking=None)
    assert 0 < state["step"] < 100_000
    assert len(record["epochs"]) == state["step"]  # one step an epoch here
