"""Runs that start from weights and train a part: plain and private, resumed, and refused."""

import contextlib
import json

import numpy as np
import pytest
import torch

from secure_cnn import (
    ModelError,
    Recipe,
    RunError,
    Sealing,
    Unlocking,
    archive,
    build_model,
    read_model,
    run,
)
from secure_cnn.data import DataSpec
from secure_cnn.record import RunRecord

PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "batch_size": 16}
SPEC = DataSpec(shape=(1, 8, 8), classes=("a", "b", "c", "d"))
ME = archive.generate_identity(post_quantum=False)


@pytest.fixture
def weights(tmp_path):
    """Weights of the model for three classes, as if trained elsewhere."""
    spec = DataSpec(shape=(1, 8, 8), classes=("a", "b", "c"))
    state = build_model("compact", spec, generator_seed=9).state_dict()
    path = tmp_path / "w.safetensors"
    archive.save_plain(path, dict(state))
    return path


def taken(done, weights):
    """Whether the body is that of the file, bit for bit, and the head has moved from its draw."""
    state, began = done.model.state_dict(), archive.load_plain(weights)
    body = all(torch.equal(state[n], began[n]) for n in began if not n.startswith("head."))
    head = build_model("compact", SPEC).state_dict()["head.weight"]
    return body and not torch.equal(state["head.weight"], head)


@pytest.mark.parametrize("settings", [{}, PRIVATE, {"eps": 0.05}, {"optimizer": "adamw"}], ids=str)
def test_what_is_frozen_does_not_move(recipe, quick, weights, settings):
    """Not by a gradient, noise, weight decay or the average; the head does."""
    done = run(recipe(weights=weights, train_only=["head.*"], weight_decay=0.1, **settings))
    assert taken(done, weights)
    record = RunRecord.read(done.folder.record)
    assert record.model.parameters == sum(p.numel() for p in done.model.head.parameters())
    assert len(record.model.weights) == 64
    assert record.claims["weights"]["sha256"] == record.model.weights
    notes = " ".join(record.notes)
    assert "9 of 11 tensors taken; of another shape and drawn anew: head.weight" in notes
    assert "Frozen are 9 tensors" in notes
    assert ("ε does not cover the weights" in notes) == ("epsilon" in settings)
    loaded = read_model(done.folder.model, unlocking=None)
    assert loaded.claims["weights"] == record.claims["weights"]


@pytest.mark.parametrize("private", [{}, PRIVATE], ids=["plain", "private"])
def test_a_resumed_run_goes_on_from_the_same_weights(
    recipe, quick, weights, stopped_after, tmp_path, private
):
    """With its baseline not yet trained or half way; other patterns or weights are refused."""
    settings = {"weights": weights, "freeze": ["conv1.*"], **private}
    with stopped_after(3):
        assert run(recipe(**settings)).record.status == "interrupted"
    with pytest.raises(RunError, match="other settings: freeze"):
        run(recipe(**settings | {"freeze": ["conv2.*"]}), resume=True)
    kept = weights.read_bytes()
    archive.save_plain(
        weights, dict(build_model("compact", SPEC, generator_seed=1).state_dict()), overwrite=True
    )
    with pytest.raises(RunError, match="the weights changed since the run began"):
        run(recipe(**settings), resume=True)
    weights.write_bytes(kept)
    done = run(recipe(**settings), resume=True)
    assert done.record.status == "complete"
    began = archive.load_plain(weights)
    assert torch.equal(done.model.conv1.weight, began["conv1.weight"])
    if not private:
        whole = run(recipe("whole", **settings)).model.state_dict()
        assert all(torch.equal(whole[n], t) for n, t in done.model.state_dict().items())


def test_runs_of_earlier_versions_resume(recipe, quick, stopped_after):
    """Their settings say nothing of weights."""
    with stopped_after(3):
        part = run(recipe())
    text = json.loads(part.folder.record.read_text())
    for name in ("weights", "train_only", "freeze", "model_options"):
        del text["settings"][name]
    part.folder.record.write_text(json.dumps(text))
    assert run(recipe(), resume=True).record.status == "complete"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_only": ["hed.*"]}, "train_only: expected a pattern"),
        ({"freeze": ["*"]}, "left to train, got none"),
        ({"freeze": ["head.*"]}, "expected what is frozen among the weights.*head.weight"),
        ({"model": "resnet20", "freeze": ["stage1.*"]}, "expected what is frozen.*and 12 more"),
        ({"weights": "nowhere"}, "nowhere: expected a file of weights"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_touched(
    recipe, weights, tmp_path, settings, words
):
    """A frozen layer that was drawn at random would never learn."""
    with pytest.raises(ModelError, match=words):
        run(recipe(**{"weights": weights, **settings}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["train_only", "freeze"])
@pytest.mark.parametrize("value", ["head.*", [1], [""], None])
def test_patterns_are_a_list_of_texts(recipe, name, value):
    """A text alone would be read letter by letter."""
    with pytest.raises(RunError, match=f"{name}: expected a list of patterns"):
        recipe(**{name: value})


def test_weights_of_the_private_images_themselves_are_refused(recipe, quick, tmp_path):
    """What a plain run on them wrote says so; for other images it starts from that file."""
    plain = run(recipe("plain")).folder.model
    with pytest.raises(ModelError, match="these very images, without privacy"):
        run(recipe(weights=plain, **PRIVATE))
    assert not (tmp_path / "run").exists()
    assert run(recipe(weights=plain)).record.status == "complete"


def test_the_state_of_a_training_on_the_private_images_is_refused_too(recipe, quick, tmp_path):
    """It says nothing in claims; what it was trained on is among its own values."""
    with pytest.raises(KeyboardInterrupt):
        run(recipe("plain"), on_epoch=_interrupt)
    state = tmp_path / "plain" / "checkpoints" / "training.safetensors"
    with pytest.raises(ModelError, match="these very images, without privacy"):
        run(recipe(weights=state, **PRIVATE))
    assert not (tmp_path / "run").exists()


def test_weights_of_an_earlier_private_run_on_the_same_images_are_refused(recipe, quick, tmp_path):
    """Both epsilons would add up, and the second run states its own alone.

    Who can open the file has the key of the fingerprint.
    """
    sealing, unlocking = Sealing(recipients=[ME.recipient]), Unlocking(identity=ME)
    first = run(recipe("first", **PRIVATE), sealing=sealing).folder.model
    with pytest.raises(ModelError, match="these very images, by a private run of its own"):
        run(recipe(weights=first, **PRIVATE), sealing=sealing, unlocking=unlocking)
    with pytest.raises(KeyboardInterrupt):
        run(recipe("begun", **PRIVATE), on_epoch=_interrupt)
    state = tmp_path / "begun" / "checkpoints" / "training.safetensors"
    with pytest.raises(ModelError, match="these very images, by a private run of its own"):
        run(recipe(weights=state, **PRIVATE))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("epsilon", [None, 8.0], ids=["plain", "private"])
def test_weights_of_another_split_of_the_same_images_are_refused(recipe, quick, epsilon):
    """The seed divides them: what was trained on there may be tested on here, and the reverse."""
    settings = {"data": "digits", "epochs": 1, "batch_size": 256}
    sealing, unlocking = Sealing(recipients=[ME.recipient]), Unlocking(identity=ME)
    done = run(recipe("other", **settings, epsilon=epsilon, seed=1), sealing=sealing)
    wanted = recipe(weights=done.folder.model, **settings, epsilon=8.0, seed=2)
    with pytest.raises(ModelError, match="these very images"):
        run(wanted, sealing=sealing, unlocking=unlocking)


@pytest.mark.parametrize("private", [{}, PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize("finished", [True, False], ids=["model", "state"])
def test_weights_of_the_same_training_images_are_refused_whatever_they_were_tested_on(
    recipe, quick, shapes, tmp_path, private, finished
):
    """One test image less in the file, and the images in another order."""
    sealing, unlocking = Sealing(recipients=[ME.recipient]), Unlocking(identity=ME)
    asked = recipe("first", baseline=False, **private)
    with contextlib.nullcontext() if finished else pytest.raises(KeyboardInterrupt):
        run(asked, sealing=sealing, on_epoch=None if finished else _interrupt)
    arrays = dict(np.load(shapes))
    for name in arrays:
        arrays[name] = arrays[name][1:] if name.startswith("test") else arrays[name][::-1]
    np.savez(tmp_path / "other.npz", **arrays)
    weights = tmp_path / "first" / "checkpoints" / f"{'model' if finished else 'training'}.sealed"
    wanted = recipe(weights=weights, **PRIVATE | {"data": tmp_path / "other.npz"})
    with pytest.raises(ModelError, match="these very images"):
        run(wanted, sealing=sealing, unlocking=unlocking)


@pytest.mark.parametrize(
    "large", [torch.tensor(1e300, dtype=torch.float64), torch.tensor(1e30)], ids=["cast", "forward"]
)
@pytest.mark.parametrize("private", [{}, PRIVATE], ids=["plain", "private"])
def test_weights_too_large_to_compute_with_are_refused_before_anything_is_touched(
    recipe, tmp_path, private, large
):
    """Finite in the file; infinite as the model's numbers, or what the model makes of an image."""
    state = build_model("compact", SPEC).state_dict()
    archive.save_plain(tmp_path / "w", {name: large.expand_as(t) for name, t in state.items()})
    with pytest.raises(ModelError, match=r"weights: expected .*finite"):
        run(recipe(weights=tmp_path / "w", **private))
    assert not (tmp_path / "run").exists()


def _interrupt(_):
    raise KeyboardInterrupt


def test_sealed_weights_are_opened_by_who_may(cli, quick, weights, shapes, tmp_path):
    """The identity opens them; without it nothing begins, and a signature can be demanded."""
    signer = archive.generate_signer(post_quantum=False)
    archive.write_key(tmp_path / "me.key", ME)
    sealed = tmp_path / "w.sealed"
    state = archive.load_plain(weights)
    archive.save(sealed, state, recipients=[ME.recipient], signer=signer)
    words = ["train", "--data", shapes, "--epochs", 2, "--train-only", "head.*", "--weights"]
    out = ["--out", tmp_path / "run"]
    code, _, err = cli(*words, sealed, *out)
    assert code == 3
    assert "is sealed" in err
    opened = [*words, sealed, "--identity", tmp_path / "me.key"]
    other = archive.generate_signer(post_quantum=False).verifier.to_text()
    assert cli(*opened, "--trusted", other, *out)[0] == 6
    code, _, err = cli(*words, weights, "--trusted", other, *out)
    assert code == 3
    assert "--trusted: expected weights that are sealed" in err
    assert not (tmp_path / "run").exists()
    code, _, err = cli(*opened, "--trusted", signer.verifier.to_text(), *out)
    assert code == 0
    assert "9 of 11 tensors taken" in " ".join(err.split())
    assert run(
        Recipe(out=tmp_path / "py", data=shapes, epochs=1, weights=sealed),
        unlocking=Unlocking(identity=ME),
    ).record.model.weights


@pytest.mark.slow
def test_a_private_audit_starts_from_the_weights_too(cli, quick, recipe, weights, tmp_path):
    """The recipe of the run, with what it froze."""
    done = run(recipe(weights=weights, train_only=["head.*"], baseline=False, **PRIVATE))
    words = ["audit", "--run", done.folder.root, "--out", tmp_path / "audit"]
    assert cli(*words, "--canaries", 4, "--steps", 12)[0] == 0
