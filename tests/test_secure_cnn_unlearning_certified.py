"""What is certified is what was done: of forged, older and half-finished runs nothing is."""

import json
import shutil
from dataclasses import replace

import pytest
from support.leaving import csv_file, data_of, forget_in, some_rows

from secure_cnn import Recipe, archive, run
from secure_cnn.errors import RunError
from secure_cnn.recipe import folder
from secure_cnn.unlearning import Case, Forgetting, certify, run_ridge, run_sharded, ways
from secure_cnn.unlearning.certificate import earlier_certificate

PLAIN = Recipe(out="", epochs=1, model="compact")
RIDGE = Recipe(out="", head="ridge")
SIGNER = archive.generate_signer()


@pytest.fixture(autouse=True)
def no_pages(monkeypatch):
    """Runs write no page, which takes longer than all else of these."""
    monkeypatch.setattr(folder, "write_page", lambda *_: None)


@pytest.fixture
def ids(tmp_path):
    return csv_file(tmp_path / "ids.csv", "index", [3])


def without(*rows):
    return some_rows(data_of(), [row for row in range(40) if row not in rows])


def edited(path, part, **values):
    """The record of a run, changed by hand."""
    document = json.loads((path / "run.json").read_text())
    document[part] |= values
    (path / "run.json").write_text(json.dumps(document))


def certified(wanted, **named):
    """What the command does: the certificate before, the forgetting, its certificate."""
    earlier = earlier_certificate(wanted.run, trusted=[SIGNER.verifier])
    found = forget_in(wanted, data_of(), **named)
    path = certify(found, signer=SIGNER, case=Case(), earlier=earlier)
    return archive.verify_certificate(path, trusted=[SIGNER.verifier]).value


def test_a_finished_run_that_was_trained_otherwise_is_not_the_forgotten_one(tmp_path, ids):
    run(replace(PLAIN, out=tmp_path / "run"), data=data_of())
    knows = tmp_path / "run/checkpoints/model.safetensors"
    run(replace(PLAIN, out=tmp_path / "begun", weights=knows), data=without(3))
    run(replace(PLAIN, out=tmp_path / "longer", epochs=2), data=without(3))
    for out in ("begun", "longer"):
        wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / out)
        with pytest.raises(RunError, match="others left, or by another method"):
            forget_in(wanted, data_of(), resume=True)
        assert not (tmp_path / out / "shards").exists(), "what is refused is not written to"
    # The control: one of the very same settings is what the forgetting would have trained.
    run(replace(PLAIN, out=tmp_path / "same"), data=without(3))
    same = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "same")
    assert forget_in(same, data_of(), resume=True).method.name == "retrain"


def test_a_ridge_head_of_another_penalty_or_without_sums_is_not_the_forgotten_one(tmp_path, ids):
    run_ridge(replace(RIDGE, out=tmp_path / "run"), data=data_of())
    run_ridge(replace(RIDGE, out=tmp_path / "other", penalty=5.0), data=without(3))
    run_ridge(replace(RIDGE, out=tmp_path / "bare"), data=without(3))
    (tmp_path / "bare/checkpoints/sums.safetensors").unlink()
    for out in ("other", "bare"):
        wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / out)
        with pytest.raises(RunError, match="others left, or by another method"):
            forget_in(wanted, data_of(), resume=True)


def test_settings_that_the_sums_contradict_are_refused(tmp_path, ids):
    run_ridge(replace(RIDGE, out=tmp_path / "run"), data=data_of())
    edited(tmp_path / "run", "settings", penalty=9.0)
    with pytest.raises(RunError, match="of other settings"):
        forget_in(Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new"), data_of())
    assert not (tmp_path / "new").exists()


def test_a_record_that_hides_what_a_training_began_with_is_refused(tmp_path, ids):
    run(replace(PLAIN, out=tmp_path / "first"), data=data_of())
    knows = tmp_path / "first/checkpoints/model.safetensors"
    run(replace(PLAIN, out=tmp_path / "run", weights=knows), data=data_of())
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    edited(tmp_path / "run", "model", weights="")
    with pytest.raises(RunError, match="how its training began"):
        forget_in(wanted, data_of())
    assert not (tmp_path / "new").exists()


def test_a_record_that_hides_shards_is_refused(tmp_path, ids):
    sharded = replace(PLAIN, out=tmp_path / "run", shards=2, slices=1)
    run_sharded(sharded, data=data_of())
    edited(tmp_path / "run", "settings", shards=1)
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    for method, allowed in (("auto", False), ("fine-tuning", True)):
        with pytest.raises(RunError, match="of its shards"):
            forget_in(replace(wanted, method=method, no_guarantee=allowed), data_of())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", [PLAIN, RIDGE], ids=["plain", "ridge"])
def test_one_killed_before_its_certificate_keeps_the_key_of_its_digests(tmp_path, ids, kind):
    train = run_ridge if kind is RIDGE else run
    train(replace(kind, out=tmp_path / "run"), data=data_of())
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    forget_in(wanted, data_of())  # killed here
    certified(wanted, resume=True)
    more = csv_file(tmp_path / "more.csv", "index", [4])
    certified(Forgetting(run=tmp_path / "new", ids=more, out=tmp_path / "newer"))
    chain = archive.verify_certificate(
        tmp_path / "newer/certificate.json",
        trusted=[SIGNER.verifier],
        previous=tmp_path / "new/certificate.json",
    )
    assert chain.value.cumulative.people == 2
    # Where the one before is gone, it is said that those of it are not counted.
    (tmp_path / "newer/certificate.json").unlink()
    last = csv_file(tmp_path / "last.csv", "index", [5])
    alone = certified(Forgetting(run=tmp_path / "newer", ids=last, out=tmp_path / "last"))
    assert alone.cumulative.people == 1
    assert any("people left this model 2 times" in each for each in alone.not_known)
    assert not any("left this model" in each for each in chain.value.not_known)


def test_the_certificate_of_an_older_run_of_the_same_model_is_refused(tmp_path, ids):
    private = replace(
        PLAIN, out=tmp_path / "run", epsilon=1.0, batch_size=40, delta=1e-3, baseline=False
    )
    run(private, data=data_of())
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "1", method="group-privacy")
    certified(wanted)
    more = csv_file(tmp_path / "more.csv", "index", [4])
    found = certified(replace(wanted, run=tmp_path / "1", ids=more, out=tmp_path / "2"))
    assert found.cumulative.people == 2
    shutil.copy(tmp_path / "1/certificate.json", tmp_path / "2/certificate.json")
    with pytest.raises(RunError, match="put the run's own back"):
        earlier_certificate(tmp_path / "2", trusted=[SIGNER.verifier])


def test_one_killed_before_it_had_a_record_can_begin_again(tmp_path, ids, monkeypatch):
    run_ridge(replace(RIDGE, out=tmp_path / "run"), data=data_of())
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ways, "head_carried_out", killed)
        with pytest.raises(KeyboardInterrupt):
            forget_in(wanted, data_of())
    assert forget_in(wanted, data_of()).method.name == "ridge"
