"""Runs whose last layer is solved for: people leave them by subtraction, exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.leaving import csv_file, data_of, forget_in, some_rows

from privacy.unlearning import RidgeHead
from secure_cnn import Recipe, archive, run
from secure_cnn.checkpoint import Sealing, Unlocking, read_model, read_state
from secure_cnn.data import load_data
from secure_cnn.errors import RunError
from secure_cnn.interruption import Stopped, StopRequest
from secure_cnn.models import MODELS, Architecture
from secure_cnn.recipe import defaults, folder, ridge
from secure_cnn.recipe.initial import initial_model
from secure_cnn.recipe.once import train_once
from secure_cnn.record import RunRecord
from secure_cnn.unlearning import Forgetting, heads, run_ridge
from secure_cnn.unlearning.oracles import beside_oracles

RIDGE = Recipe(out="", head="ridge")


@pytest.fixture
def no_pages(monkeypatch):
    """Runs write no page, which takes longer than all else of these."""
    monkeypatch.setattr(folder, "write_page", lambda *_: None)


@pytest.fixture
def keys():
    me, signer = archive.generate_identity(), archive.generate_signer()
    return Sealing(recipients=(me.recipient,), signer=signer), Unlocking(identity=me)


def without(rows, count=40):
    return [row for row in range(count) if row not in rows]


def sums_of(place, unlocking=None):
    return read_state(place.sums, unlocking=unlocking)


# Training


def test_a_run_by_least_squares_is_a_run(tmp_path, shapes):
    done = run_ridge(replace(RIDGE, out=tmp_path / "run", data=shapes))
    assert done.record.status == "complete"
    assert done.record.model.name == "nonexpansive"
    assert done.record.settings["penalty"] == defaults.PENALTIES["nonexpansive"]
    assert done.record.results[0].accuracy > 0.9
    assert done.folder.page.is_file()
    assert "no step was taken" in " ".join(done.record.notes)
    assert set(read_state(done.folder.sums, unlocking=None)) >= {"gram", "moments", "model"}
    loaded = read_model(done.folder.model, unlocking=None)
    assert loaded.claims["accuracy"] == done.record.results[0].accuracy
    with pytest.raises(RunError, match="is complete"):
        run_ridge(replace(RIDGE, out=tmp_path / "run", data=shapes), resume=True)
    # Its files are its own: another run may replace them.
    again = run_ridge(replace(RIDGE, out=tmp_path / "run", data=shapes, penalty=5.0), force=True)
    assert again.record.settings["penalty"] == 5.0
    assert again.record.model_digest != done.record.model_digest


@pytest.mark.usefixtures("no_pages")
def test_its_last_layer_is_the_head_on_the_features_of_the_model(tmp_path):
    """By the head's own door, on all features at once."""
    data = data_of()
    recipe = replace(RIDGE, out=tmp_path / "run", penalty=0.1, model="scattering")
    model = run_ridge(recipe, data=data).model
    features = model[:-1].double()(data.train.batch(torch.arange(40))[0].double())
    head = RidgeHead(features.numpy(), data.train.labels, classes=2, bound=1.0, penalty=0.1)
    np.testing.assert_array_equal(model[-1].weight.detach(), head.weights[:-1].T.astype("f4"))
    np.testing.assert_array_equal(model[-1].bias.detach(), head.weights[-1].astype("f4"))


@pytest.mark.usefixtures("no_pages")
def test_shadows_and_oracles_of_it_are_trained_so_too(tmp_path):
    data = data_of()
    done = run_ridge(replace(RIDGE, out=tmp_path / "run"), data=data)
    recipe, told = RIDGE.on(data), []
    initial = initial_model(recipe, data, None, None)
    model = train_once(recipe, initial, data, stop=StopRequest(), advance=told.append)
    for one, other in zip(model.parameters(), done.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert told == [0.0]


@pytest.mark.parametrize("name", sorted(defaults.PENALTIES))
def test_no_feature_exceeds_its_bound(name, few_noise_images):
    spec = data_of().spec
    model = Architecture.for_data(name, spec).build()
    images = torch.cat([torch.rand(6, 1, 8, 8), torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)])
    images = torch.cat([images, (images > 0.5).float()])
    assert float(model[:-1](images).abs().max()) <= ridge._BOUNDS[name]


@pytest.mark.usefixtures("no_pages")
def test_an_interrupted_run_begins_anew_and_is_the_same(tmp_path, monkeypatch):
    recipe, data = replace(RIDGE, out=tmp_path / "run"), data_of()
    whole = run_ridge(replace(recipe, out=tmp_path / "whole"), data=data)
    judged = heads.reported

    def stopped(*_):
        raise Stopped

    monkeypatch.setattr(heads, "reported", stopped)
    part = run_ridge(recipe, data=data)
    assert part.record.status == "interrupted"
    assert part.model is None
    monkeypatch.setattr(heads, "reported", judged)
    with pytest.raises(RunError, match="data changed"):
        run_ridge(recipe, data=data_of(seed=1), resume=True)
    with pytest.raises(RunError, match="other settings: penalty"):
        run_ridge(replace(recipe, penalty=3.0), data=data, resume=True)
    sealing = Sealing(recipients=(archive.generate_identity().recipient,))
    with pytest.raises(RunError, match="goes on as it began"):
        run_ridge(recipe, data=data, sealing=sealing, resume=True)
    done = run_ridge(recipe, data=data, resume=True)
    assert done.record.run_id == part.record.run_id
    assert done.record.model_digest == whole.record.model_digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(
            ({name: value}, f"{name}: expected a last layer that is trained by steps")
            for name, value in {
                **{"epochs": 3, "batch_size": 8, "optimizer": "adamw", "learning_rate": 0.1},
                **{"clip_grad_norm": 0.0, "weight_decay": 0.1, "warmup": 0.2, "epsilon": 1.0},
                **{"label_smoothing": 0.1, "average_decay": 0.0, "shift": 1, "flip": True},
                **{"max_grad_norm": 2.0, "eps": 0.1, "gaussian_sigma": 0.1, "shards": 2},
                **{"slices": 2, "checkpoint_minutes": 1.0, "weights": "w.safetensors"},
                **{"train_only": ["head.*"], "freeze": ["head.*"]},
            }.items()
        ),
        ({"model": "compact"}, "head=ridge: expected auto, nonexpansive or"),
        ({"model": "my:network"}, "head=ridge: expected auto"),
        ({"penalty": 0.0}, "penalty: expected a number > 0"),
        ({"head": "lasso"}, "head: expected gradient or ridge, got lasso"),
        ({"head": "gradient", "penalty": 1.0}, "penalty: expected head=ridge"),
        ({"guard": True, "eps": 0.1}, "steps"),
    ],
)
def test_what_means_nothing_with_it_is_refused(change, words):
    with pytest.raises(RunError, match=words):
        replace(RIDGE, **change)


def test_settings_that_are_the_usual_ones_are_no_contradiction():
    assert replace(RIDGE, train_only=[], epochs=20, flip=False).head == "ridge"
    assert set(defaults.PENALTIES) <= set(MODELS)


def test_what_cannot_be_is_refused_before_the_folder_is_made(tmp_path, monkeypatch):
    data, recipe = data_of(), replace(RIDGE, out=tmp_path / "run")
    one = some_rows(data, [row for row in range(40) if row % 2])
    with pytest.raises(RunError, match="each class, got none of cat"):
        run_ridge(recipe, data=one)
    with pytest.raises(RunError, match="use run"):
        run_ridge(Recipe(out=tmp_path / "run"), data=data)
    with pytest.raises(RunError, match="run_ridge"):
        run(recipe, data=data)
    for name, words in (("_MOST_WIDTH", "features of an image"), ("_MOST_IMAGES", "exact, got 40")):
        with monkeypatch.context() as patch:
            patch.setattr(ridge, name, 39)
            with pytest.raises(RunError, match=words):
                run_ridge(recipe, data=data)
    assert not (tmp_path / "run").exists()


def test_a_run_of_before_there_were_heads_is_one_by_steps():
    recipe = Recipe(out="")
    settings = {n: v for n, v in recipe.to_dict().items() if n not in ("head", "penalty")}
    assert recipe.changed_from(settings) == []
    assert replace(recipe, head="ridge").changed_from(settings) == ["head"]


# Forgetting


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("sealed", [False, True])
def test_what_is_left_is_bit_for_bit_a_training_without_them(tmp_path, keys, sealed):
    data, recipe = data_of(), replace(RIDGE, out=tmp_path / "run")
    own = dict(zip(("sealing", "unlocking"), keys, strict=True)) if sealed else {}
    sealing = {name: value for name, value in own.items() if name == "sealing"}
    before = run_ridge(recipe, data=data, **sealing)
    ids = csv_file(tmp_path / "ids.csv", "index", [3, 17])
    found = forget_in(Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new"), data, **own)
    oracle = run_ridge(
        replace(recipe, out=tmp_path / "oracle"), data=some_rows(data, without((3, 17)))
    )
    assert found.run.record.model_digest == oracle.record.model_digest
    assert before.record.model_digest != oracle.record.model_digest
    assert (found.method.name, found.method.guarantee.exact) == ("ridge", True)
    assert found.weight_change > 0
    new = sums_of(found.run.folder, own.get("unlocking"))
    trained = sums_of(oracle.folder)
    assert torch.equal(new["gram"], trained["gram"])
    assert torch.equal(new["moments"], trained["moments"])
    # And from there on.
    more = csv_file(tmp_path / "more.csv", "index", [5])
    wanted = Forgetting(run=tmp_path / "new", ids=more, out=tmp_path / "newer")
    again = forget_in(wanted, data, **own)
    oracle = run_ridge(
        replace(recipe, out=tmp_path / "oracle2"), data=some_rows(data, without((3, 5, 17)))
    )
    assert again.run.record.model_digest == oracle.record.model_digest


@pytest.mark.usefixtures("no_pages")
def test_one_killed_between_goes_on_to_the_same_model(tmp_path, monkeypatch):
    """After the inventory, after the sums, after the model: whatever was written last."""
    data, recipe = data_of(), replace(RIDGE, out=tmp_path / "run")
    run_ridge(recipe, data=data)
    ids = csv_file(tmp_path / "ids.csv", "index", [3, 17])
    whole = forget_in(Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "w"), data)

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    from secure_cnn.unlearning import begun

    for place, name in ((heads, "write_state"), (heads, "reported"), (begun, "write_model")):
        wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, killed)
            with pytest.raises(Killed):
                forget_in(wanted, data)
        assert RunRecord.read(tmp_path / name / "run.json").status == "running"
        done = forget_in(wanted, data, resume=True)
        assert done.run.record.model_digest == whole.run.record.model_digest
        # A finished one is found finished, for its certificate.
        assert forget_in(wanted, data, resume=True).run.record == done.run.record


@pytest.mark.usefixtures("no_pages")
def test_sums_that_are_not_its_own_are_refused_and_nothing_is_changed(tmp_path, keys):
    data, recipe = data_of(), replace(RIDGE, out=tmp_path / "run")
    first = run_ridge(recipe, data=data)
    others = run_ridge(replace(recipe, out=tmp_path / "others"), data=data_of(seed=1))
    again = run_ridge(replace(recipe, out=tmp_path / "again"), data=data)
    wider = run_ridge(replace(recipe, out=tmp_path / "wider", penalty=3.0), data=data)
    own = first.folder.sums.read_bytes()
    ids = csv_file(tmp_path / "ids.csv", "index", [3, 17])
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    state = sums_of(first.folder)

    def refused(words):
        with pytest.raises(RunError, match=words) as caught:
            forget_in(wanted, data)
        assert "--method retrain" in str(caught.value)
        assert not (tmp_path / "new").exists()

    for other in (others, wider):
        first.folder.sums.write_bytes(other.folder.sums.read_bytes())
        refused("those of another")
    for change in ({"gram": state["gram"] + 1}, {"model": "0" * 64}, {"digests": None}):
        archive.save_plain(first.folder.sums, {**state, **change}, overwrite=True)
        refused("put")
    first.folder.sums.unlink()
    refused("no such file")
    found = forget_in(replace(wanted, method="retrain"), data)
    assert found.method.name == "retrain"
    # Of the same images, settings and machine they are the same sums, whoever trained.
    first.folder.sums.write_bytes(again.folder.sums.read_bytes())
    exact = forget_in(replace(wanted, out=tmp_path / "exact"), data)
    assert exact.run.record.model_digest == found.run.record.model_digest
    first.folder.sums.write_bytes(own)


@pytest.mark.usefixtures("no_pages")
def test_sums_that_somebody_else_sealed_are_refused(tmp_path, keys):
    sealing, unlocking = keys
    data, recipe = data_of(), replace(RIDGE, out=tmp_path / "run")
    done = run_ridge(recipe, data=data, sealing=sealing)
    state = sums_of(done.folder, unlocking)
    stranger = archive.generate_signer()
    archive.save(
        done.folder.sums, state, recipients=sealing.recipients, signer=stranger, overwrite=True
    )
    ids = csv_file(tmp_path / "ids.csv", "index", [3])
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    with pytest.raises(archive.UntrustedSigner):
        forget_in(wanted, data, sealing=sealing, unlocking=unlocking)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_pages")
def test_other_methods_and_oracles_have_no_place_there(tmp_path, shapes):
    data = data_of()
    run_ridge(replace(RIDGE, out=tmp_path / "run"), data=data)
    ids = csv_file(tmp_path / "ids.csv", "index", [3])
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    with pytest.raises(RunError, match="those people leave exactly"):
        forget_in(replace(wanted, method="ssd", no_guarantee=True), data)
    with pytest.raises(RunError, match="trained in shards"):
        forget_in(replace(wanted, method="sharded"), data)
    found = forget_in(wanted, data)
    with pytest.raises(RunError, match="the oracle's"):
        beside_oracles(found, oracles=2, margin=1.0, stop=StopRequest())
    run(Recipe(out=tmp_path / "steps", data=shapes, epochs=1, model="compact"))
    steps = replace(wanted, run=tmp_path / "steps", out=tmp_path / "x", method="ridge")
    with pytest.raises(RunError, match="was trained by steps; take retrain"):
        forget_in(steps, load_data(shapes))
    assert not (tmp_path / "x").exists()


def test_the_command_trains_and_forgets_and_certifies_what_is_to_be_destroyed(
    cli, shapes, tmp_path
):
    signer = archive.generate_signer()
    archive.write_key(tmp_path / "signer.key", signer)
    first, second = tmp_path / "first", tmp_path / "second"
    code, _, told = cli("train", "--head", "ridge", "--penalty", "1/10", "--data", shapes,
                        "--out", first)  # fmt: skip
    assert code == 0, told
    assert "sums.safetensors" in told
    code, _, told = cli("train", "--head", "ridge", "--epochs", 3, "--out", tmp_path / "no")
    assert code == 3
    assert "leave one of the two out" in " ".join(told.split())
    assert not (tmp_path / "no").exists()
    ids = csv_file(tmp_path / "ids.csv", "index", [3])
    code, out, told = cli("forget", first, "--ids", ids, "--out", second, "--signer",
                          tmp_path / "signer.key")  # fmt: skip
    assert code == 0, told
    assert "method: ridge" in out
    found = archive.verify_certificate(second / "certificate.json", trusted=[signer.verifier])
    known = {each.name: each for each in found.value.artefacts if each.kind == "derived caches"}
    assert known["sums.safetensors, old run"].action == "kept, untouched by the request"
    assert "destroy" in known["sums.safetensors, old run"].detail
    assert known["sums.safetensors, new run"].action == "re-trained"
    assert any("destroyed with it" in each for each in found.value.assumptions)
