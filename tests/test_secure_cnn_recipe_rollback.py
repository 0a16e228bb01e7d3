"""What a resumed run believes: states of its own, and every noised step that was released."""

import contextlib
import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import privacy
from secure_cnn import Sealing, Unlocking, archive, run
from secure_cnn.checkpoint import read_model, read_state, write_state
from secure_cnn.data import load_data
from secure_cnn.errors import RunError
from secure_cnn.interruption import StopRequest
from secure_cnn.recipe import RunFolder
from secure_cnn.recipe.identity import KEYED, keyed_fingerprint
from secure_cnn.record import ResultRecord, RunRecord

# One noised step of an expected 16 of 64 images; four an epoch.
PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "batch_size": 16, "epochs": 3}
STEPS = 12


@pytest.fixture
def recipe(recipe):
    """Makes private recipes without a baseline."""
    return partial(recipe, model="compact", baseline=False, **PRIVATE)


@pytest.fixture(autouse=True)
def _quick(quick):
    """No pages and no timing here."""


@pytest.fixture(scope="module")
def keys():
    """A reader and a signer."""
    return archive.generate_identity(post_quantum=False), archive.generate_signer()


def signed(keys):
    """As the victim of a forger calls `run`."""
    reader, signer = keys
    sealing = Sealing(recipients=(reader.recipient,), signer=signer)
    return {"sealing": sealing, "unlocking": Unlocking(identity=reader)}


def edited(folder, **changes):
    """The plain state of a folder, with other values in it."""
    state = read_state(folder.training, unlocking=None)
    write_state(folder.training, {**state, **changes}, sealing=None)
    return state


def of_plan(done, steps):
    """What so many steps of a run's plan cost."""
    plan = done.record.privacy
    event = privacy.GaussianSteps(
        noise_multiplier=plan.noise_multiplier, sampling_rate=plan.sampling_rate, steps=steps
    )
    return privacy.epsilon_of([event], plan.delta)


def test_steps_are_on_record_before_they_can_be_seen(recipe, monkeypatch, stopped_after):
    """Whenever a state is written, the record on the disk knows of its steps already."""
    seen = []

    def write(path, state, *, sealing):
        record = RunRecord.read(path.parent.parent / "run.json")
        seen.append((state["step"], record.released, state["private"]["ledger"]))
        write_state(path, state, sealing=sealing)

    monkeypatch.setattr(sys.modules["secure_cnn.recipe.folder"], "write_state", write)
    with stopped_after(6):
        run(recipe())
    assert [(step, released) for step, released, _ in seen] == [(0, 0), (4, 4), (6, 6)]
    assert [sum(row["steps"] for row in rows) for *_, rows in seen] == [0, 4, 6]


@pytest.fixture
def rolled_back(recipe, stopped_after, tmp_path):
    """A run that was stopped in step 1, and the state of then put back in a later one."""

    def make(later):
        with stopped_after(1):
            part = run(recipe())
        kept = tmp_path / "kept"
        shutil.copy(part.folder.training, kept)
        with stopped_after(later - 1):
            part = run(recipe(), resume=True)
        assert part.record.released == later
        shutil.copy(kept, part.folder.training)
        return part

    return make


def test_an_older_state_in_its_place_is_refused(recipe, rolled_back):
    """Five steps beyond a distance of four: the reason is named, nothing is touched."""
    part = rolled_back(6)
    before = part.folder.training.read_bytes()
    with pytest.raises(
        RunError, match=r"record knows of 6 released steps, the state of 1, and .*every 4"
    ):
        run(recipe(), resume=True)
    assert part.folder.training.read_bytes() == before


def test_what_was_released_after_the_state_counts(recipe, rolled_back):
    """Four steps within a checkpoint's distance: spent, said, and so many fewer are taken."""
    part = rolled_back(5)
    done = run(recipe(), resume=True)
    assert done.record.status == "complete"
    assert any("4 noised steps were released after" in note for note in done.record.notes)
    assert max(epoch.step for epoch in done.record.epochs) < STEPS
    claimed = done.record.claims["privacy"]
    assert (claimed["steps"], claimed["epsilon"]) == (STEPS, of_plan(part, STEPS))
    assert done.record.released == STEPS


def test_what_counted_once_is_not_forgotten_by_the_next_resume(recipe, rolled_back, stopped_after):
    """The state that is written on resuming knows of it."""
    rolled_back(5)
    with stopped_after(1):
        part = run(recipe(), resume=True)
    state = read_state(part.folder.training, unlocking=None)
    assert (state["step"], state["skipped"], part.record.released) == (2, 4, 6)
    with stopped_after(6):
        part = run(recipe(), resume=True)
    state = read_state(part.folder.training, unlocking=None)
    assert (state["step"], part.record.released) == (8, STEPS)
    done = run(recipe(), resume=True)
    assert done.record.claims["privacy"]["steps"] == STEPS


def test_an_older_record_in_its_place_is_refused(recipe, stopped_after):
    """The record is written first, so it cannot know less."""
    with stopped_after(2):
        part = run(recipe())
    older = part.folder.record.read_bytes()
    with stopped_after(4):
        run(recipe(), resume=True)
    part.folder.record.write_bytes(older)
    with pytest.raises(
        RunError, match=r"knows of 2 released steps, the state of 6; .* written first"
    ):
        run(recipe(), resume=True)


def test_a_state_that_is_gone_is_no_fresh_start(recipe, stopped_after):
    """What was released stays spent."""
    with stopped_after(6):
        part = run(recipe())
    part.folder.training.unlink()
    with pytest.raises(RunError, match="state of the training is missing"):
        run(recipe(), resume=True)


def test_a_complete_run_that_is_called_interrupted_is_no_fresh_start(recipe):
    """The model stays, and nothing is trained."""
    done = run(recipe())
    before = done.folder.model.read_bytes()
    replace(done.record, status="interrupted").write(done.folder.record)
    with pytest.raises(RunError, match="state of the training is missing"):
        run(recipe(), resume=True)
    assert done.folder.model.read_bytes() == before


def test_the_baselines_state_does_not_hide_what_was_released(recipe, stopped_after):
    """A state from before the private training began, under a record of its eighth step."""
    asked = recipe(baseline=True)
    with stopped_after(3):
        part = run(asked)
    assert read_state(part.folder.training, unlocking=None)["variant"] == "plain"
    replace(part.record, released=8).write(part.folder.record)
    with pytest.raises(RunError, match="knows of 8 released steps, the state of 0"):
        run(asked, resume=True)
    replace(part.record, released=3).write(part.folder.record)
    done = run(asked, resume=True)
    assert done.record.claims["privacy"]["steps"] == STEPS
    assert done.record.epochs[-1].step < STEPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 5}, "ledger knows of 6 noised steps, but it is the state of step 5"),
        ({"step": 11}, "ledger knows of 6 noised steps"),
        ({"skipped": 1}, "ledger knows of 6 noised steps"),
        ({"step": 5, "skipped": True}, "ledger knows of 6 noised steps"),
        ({"step": 6.0}, "training of private under way"),
        ({"step": True}, "training of private under way"),
        ({"step": -1, "skipped": 7}, "training of private under way"),
        ({"run": None}, "number of its run.*--force"),
        ({"run": {"id": "0" * 32, "key": "0" * 64}}, "state of another run"),
        ({"fingerprint": KEYED + "0" * 64}, "data changed"),
    ],
)
def test_a_state_that_contradicts_itself_is_refused(recipe, stopped_after, change, message):
    """Step, ledger, run and data must fit together; unsealed, that is all that can be seen."""
    with stopped_after(6):
        part = run(recipe())
    edited(part.folder, **change)
    with pytest.raises(RunError, match=message):
        run(recipe(), resume=True)


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 1e6}, {"sampling_rate": 1e-9}, {"steps": 2}, {"steps": 6.0}]
)
def test_a_ledger_of_other_steps_is_refused(recipe, stopped_after, change):
    """Through the recipe as through `load_state_dict`."""
    with stopped_after(6):
        part = run(recipe())
    state = read_state(part.folder.training, unlocking=None)
    state["private"]["ledger"][0].update(change)
    edited(part.folder, private=state["private"])
    with pytest.raises((RunError, privacy.PlanError), match="ledger"):
        run(recipe(), resume=True)


def forged(recipe, part, state, keys):
    """A state that anybody could seal, in the place of a signed one."""
    reader, _ = keys
    archive.save(
        part.folder.training,
        state,
        recipients=[reader.recipient],
        name=part.folder.training.name,
        overwrite=True,
    )


def test_a_forged_state_is_refused_by_a_signed_run(recipe, stopped_after, keys):
    """Sealed to the public recipient, unsigned or signed by a stranger: the run's own is wanted."""
    reader, _ = keys
    with stopped_after(6):
        part = run(recipe(), sealing=signed(keys)["sealing"])
    genuine = part.folder.training.read_bytes()
    state = read_state(part.folder.training, unlocking=Unlocking(identity=reader))
    forged(recipe, part, state, keys)
    with pytest.raises(archive.UntrustedSigner, match="--trusted"):
        run(recipe(), **signed(keys), resume=True)
    stranger = archive.generate_signer()
    foreign = Sealing(recipients=(reader.recipient,), signer=stranger)
    write_state(part.folder.training, state, sealing=foreign)
    with pytest.raises(archive.UntrustedSigner):
        run(recipe(), **signed(keys), resume=True)
    assert not part.folder.model.exists()
    both = Unlocking(identity=reader, trusted=[stranger.verifier])
    with stopped_after(1):
        run(recipe(), sealing=signed(keys)["sealing"], unlocking=both, resume=True)
    part.folder.training.write_bytes(genuine)
    with pytest.raises(archive.UntrustedSigner):
        run(recipe(), sealing=signed(keys)["sealing"], unlocking=both, resume=True)


def test_a_signed_run_does_not_go_on_unsigned(recipe, stopped_after, keys):
    """Not even where its state was replaced by an unsigned one."""
    reader, _ = keys
    with stopped_after(2):
        part = run(recipe(), sealing=signed(keys)["sealing"])
    unsigned = {
        "sealing": Sealing(recipients=(reader.recipient,)),
        "unlocking": Unlocking(identity=reader),
    }
    with pytest.raises(RunError, match="is signed, and it goes on as it began"):
        run(recipe(), **unsigned, resume=True)
    state = read_state(part.folder.training, unlocking=Unlocking(identity=reader))
    forged(recipe, part, state, keys)
    with pytest.raises(RunError, match="is signed, and it goes on as it began"):
        run(recipe(), **unsigned, resume=True)


def test_an_unsigned_run_is_not_signed_afterwards(recipe, stopped_after, keys):
    """The signature would vouch for a state that anybody could have made."""
    reader, _ = keys
    with stopped_after(2):
        run(recipe(), sealing=Sealing(recipients=(reader.recipient,)))
    with pytest.raises(archive.UntrustedSigner):
        run(recipe(), **signed(keys), resume=True)


def test_a_signed_state_of_another_run_is_refused(recipe, stopped_after, keys):
    """The same recipe, data and signer: another run's state has another run's ledger."""
    for name in ("one", "two"):
        with stopped_after(2):
            part = run(recipe(name), sealing=signed(keys)["sealing"])
    shutil.copy(part.folder.training, part.folder.root.parent / "one" / "checkpoints")
    with pytest.raises(RunError, match="state of another run"):
        run(recipe("one"), **signed(keys), resume=True)


def test_a_forged_record_changes_no_signed_claim(recipe, stopped_after, keys):
    """Figures, conditions, claims and notes that anybody could write into the unsigned record."""
    with stopped_after(8):
        part = run(recipe(), sealing=signed(keys)["sealing"])
    document = json.loads(part.folder.record.read_text())
    document["privacy"] |= {"epsilon": 0.1, "noise_multiplier": 1e6, "steps": 1, "trials": 1}
    document["claims"] = {"privacy": {"epsilon": 0.1}, "accuracy": 1.0}
    document["versions"] = {"torch": "9"}
    for epoch in document["epochs"]:
        epoch |= {"epsilon": 0.1, "test_accuracy": 1.0}
    classes = len(part.record.data.classes)
    best = ResultRecord(
        variant="private",
        accuracy=1.0,
        macro_recall=1.0,
        recall=(1.0,) * classes,
        confusion=((0,) * classes,) * classes,
        epsilon=0.1,
    )
    document["results"] = replace(part.record, results=(best,)).to_dict()["results"]
    part.folder.record.write_text(json.dumps(document))
    done = run(recipe(), **signed(keys), resume=True)
    claims = archive.verify(done.folder.model, trusted=[keys[1].verifier]).claims
    assert claims["privacy"]["epsilon"] == of_plan(part, STEPS)
    assert claims["privacy"]["noise_multiplier"] == part.record.privacy.noise_multiplier
    assert claims["privacy"]["trials"] == {"settings": None, "charged": False}
    steps = privacy.GaussianSteps(
        **{n: claims["privacy"][n] for n in ("noise_multiplier", "sampling_rate", "steps")}
    )
    delta = claims["privacy"]["delta"]
    assert claims["privacy"]["groups"] == [
        {
            "size": size,
            "epsilon": privacy.group_epsilon([steps], delta, size=size),
            "delta": delta,
        }
        for size in (2, 3, 4, 5, 7, 10)
    ]
    assert claims["accuracy"] == done.record.results[-1].accuracy
    assert done.record.privacy == part.record.privacy
    assert claims["versions"] == part.record.versions


def test_settings_of_a_forged_record_are_not_signed(recipe, stopped_after, keys):
    """Those in the state are bound to the weights, whichever training is under way."""
    for baseline in (False, True):
        name = f"run-{baseline}"
        with stopped_after(2):
            part = run(recipe(name, baseline=baseline), sealing=signed(keys)["sealing"])
        other = recipe(name, baseline=baseline, epsilon=50.0)
        replace(part.record, settings=other.to_dict()).write(part.folder.record)
        with pytest.raises(RunError, match="trained with another epsilon"):
            run(other, **signed(keys), resume=True)


def test_one_run_at_a_time_in_a_folder(recipe, stopped_after):
    """Two that go on from one state would release twice what either knows of."""
    with stopped_after(2):
        part = run(recipe())
    with part.folder.locked():
        with pytest.raises(RunError, match="a run is under way in it"):
            run(recipe(), resume=True)
        with pytest.raises(RunError, match="a run is under way in it"):
            run(recipe(), force=True)
    assert run(recipe(), resume=True).record.status == "complete"


def test_the_public_fingerprint_tells_no_neighbours_apart(recipe, keys, shapes):
    """Keyed by a secret of the run, which only the recipients of the sealed model read."""
    reader, signer = keys
    done = run(recipe(), sealing=signed(keys)["sealing"])
    data = load_data(shapes)
    info = archive.verify(done.folder.model, trusted=[signer.verifier])
    told = info.claims["data"]["fingerprint"]
    assert told.startswith(KEYED)
    assert told == done.record.data.fingerprint
    loaded = read_model(done.folder.model, unlocking=Unlocking(identity=reader))
    key = loaded.private_claims["data_fingerprint_key"]
    assert keyed_fingerprint(data.fingerprint, key) == told
    public = done.folder.model.read_bytes() + done.folder.record.read_bytes()
    for secret in (key, data.fingerprint, data.pool_fingerprint, data.train_fingerprint):
        assert secret.encode() not in public
    assert key not in repr(loaded)
    again = run(recipe("again"), sealing=signed(keys)["sealing"])
    assert again.record.data.fingerprint != told


def test_a_run_without_privacy_keeps_the_plain_fingerprint(recipe, shapes):
    """Nothing of it is secret, and two runs can be seen to have the same data."""
    done = run(recipe(epsilon=None, delta=None))
    assert done.record.data.fingerprint == load_data(shapes).fingerprint
    assert done.record.claims["data"]["fingerprint"] == load_data(shapes).fingerprint


def test_changed_private_data_are_refused(recipe, stopped_after, tmp_path, shapes):
    """The key is in the state, so a changed pixel shows."""
    with stopped_after(2):
        part = run(recipe())
    arrays = dict(np.load(shapes))
    arrays["images"][0, 0, 0] ^= 1
    np.savez(tmp_path / "shapes.npz", **arrays)
    asked = recipe(data=tmp_path / "shapes.npz")
    replace(part.record, settings=asked.to_dict()).write(part.folder.record)
    edited(part.folder, settings=asked.to_dict())
    with pytest.raises(RunError, match="the data changed since the run began"):
        run(asked, resume=True)


@pytest.mark.parametrize(
    ("trials", "words"), [(None, "how many is not stated"), (7, "7, as stated")]
)
def test_what_was_tried_is_said_and_not_charged(recipe, trials, words):
    """Beside epsilon, in record, notes and claims."""
    done = run(recipe(trials=trials))
    assert done.record.privacy.trials == trials
    assert done.record.claims["privacy"]["trials"] == {"settings": trials, "charged": False}
    assert any(words in note and "does not charge" in note for note in done.record.notes)


@pytest.mark.parametrize("trials", [0, -1, True, 1.5])
def test_trials_are_a_count(recipe, trials):
    """And mean nothing without epsilon."""
    with pytest.raises(RunError, match="trials"):
        recipe(trials=trials)
    with pytest.raises(RunError, match="trials: expected epsilon"):
        recipe(trials=1, epsilon=None, delta=None)


def test_an_earlier_record_is_still_read(recipe):
    """What earlier versions did not write has its default."""
    done = run(recipe())
    document = json.loads(done.folder.record.read_text())
    for name in ("run_id", "released"):
        del document[name]
    assert "signer" not in document
    assert "trials" not in document["privacy"]
    old = RunRecord.from_dict(document)
    assert (old.run_id, old.signer, old.released, old.privacy.trials) == ("", "", 0, None)


def test_a_stop_after_the_last_step_is_listened_to(recipe, stopped_after, monkeypatch):
    """Within the evaluation: interrupted, the training saved, no model that claims; then done."""
    asked = recipe(eps=0.1, attack="fgsm")
    with stopped_after(STEPS + 3):
        part = run(asked)
    assert part.record.status == RunRecord.read(part.folder.record).status == "interrupted"
    assert not part.folder.model.exists()
    assert read_state(part.folder.training, unlocking=None)["step"] == STEPS
    with monkeypatch.context() as patch:
        patch.setattr(privacy.PrivateTraining, "step", lambda *_: pytest.fail("trained again"))
        done = run(asked, resume=True)
    assert done.record.status == "complete"
    assert done.record.claims["privacy"]["steps"] == STEPS
    assert len(done.record.epochs) == 3
    assert not done.folder.training.exists()


def test_a_stop_while_costs_are_measured_or_the_page_drawn(recipe, monkeypatch):
    """The two last pieces: interrupted, and the next try goes on from the saved training."""
    module = sys.modules["secure_cnn.recipe.run"]
    asked = []

    def request():
        asked.append(StopRequest())
        return contextlib.nullcontext(asked[-1])

    def cost(*_, before_step, **__):
        asked[-1].set()
        before_step()
        pytest.fail("went on after it was asked to stop")

    with monkeypatch.context() as patch:
        patch.setattr(module, "stop_on_signals", request)
        part = run(recipe(), measure_cost=cost)
        assert (part.record.status, part.model) == ("interrupted", None)
        assert part.folder.training.exists()

    def page(record, examples, path):
        if record.checkpoints:
            asked[-1].set()

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["secure_cnn.recipe.folder"], "write_page", page)
        patch.setattr(module, "stop_on_signals", request)
        part = run(recipe(), resume=True)
        assert part.record.status == "interrupted"
        assert part.folder.training.exists()
    assert run(recipe(), resume=True).record.status == "complete"


@pytest.mark.parametrize(
    "stranger",
    ["checkpoints/notes.txt", "checkpoints/mine/a.png", "checkpoints/epoch-3.sealed", ".git/HEAD"],
)
def test_force_names_what_it_did_not_write(recipe, stranger):
    """Also inside of checkpoints; nothing of the run is touched then."""
    done = run(recipe())
    place = done.folder.root / stranger
    place.parent.mkdir(exist_ok=True)
    place.write_text("mine")
    before = done.folder.model.read_bytes()
    with pytest.raises(
        RunError, match=stranger.rpartition("/")[0] if "mine" in stranger else "more"
    ):
        run(recipe(), force=True)
    assert place.read_text() == "mine"
    assert done.folder.model.read_bytes() == before


def test_force_takes_no_name_for_a_file(tmp_path):
    """A folder or a link of a run's name is somebody's; a killed writer's piece is the run's."""
    folder = RunFolder(root=tmp_path / "run", sealed=False)
    with folder.begun(force=False):
        pass
    folder.record.write_text("{}")
    for make in (
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(tmp_path),
        lambda path: os.mkfifo(path),
    ):
        make(folder.model)
        refused = pytest.raises(RunError, match=r"more than a run.*checkpoints/model\.safetensors")
        with refused, folder.begun(force=True):
            pass
        folder.model.rmdir() if folder.model.is_dir() and not folder.model.is_symlink() else (
            folder.model.unlink()
        )
    piece = folder.model.with_name(f".{folder.model.name}.{'0' * 16}.tmp")
    piece.touch()
    with folder.begun(force=True):
        pass
    assert not piece.exists()
    assert not folder.record.exists()


def test_a_state_with_values_that_no_training_leaves_is_refused(recipe, stopped_after):
    """As the state's fault: not as a training that diverges, nor silently averaged anew."""
    asked = recipe(epsilon=None, delta=None)
    with stopped_after(6):
        part = run(asked)
    kept = part.folder.training.read_bytes()
    state = read_state(part.folder.training, unlocking=None)
    name, weight = next(iter(state["model"].items()))
    broken = {name: weight.clone().fill_(float("nan"))}
    average = state["average"]
    spoilt = {**average, "averages": {**average["averages"], **broken}}
    changes = [
        ({"model": {**state["model"], **broken}}, f"not finite, in model.{name}"),
        ({"average": spoilt}, f"not finite, in average.{name}"),
        *[({"average": {**average, "updates": n}}, "number of updates") for n in (-3, 2.5, True)],
    ]
    for change, words in changes:
        edited(part.folder, **change)
        with pytest.raises(RunError, match=words):
            run(asked, resume=True)
        part.folder.training.write_bytes(kept)
    assert run(asked, resume=True).record.status == "complete"


def test_a_link_in_the_place_of_the_checkpoints_or_the_record_is_refused(
    recipe, stopped_after, tmp_path
):
    """Who goes on would write where the link leads; what was expected is said once."""
    with stopped_after(6):
        part = run(recipe())
    for place in (part.folder.training.parent, part.folder.record):
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(RunError, match=r"expected .*, got a symbolic link") as refused:
            run(recipe(), resume=True)
        assert str(refused.value).count("expected") == 1
        place.unlink()
        (tmp_path / "elsewhere").rename(place)
    part.folder.record.unlink()
    part.folder.record.mkdir()
    with pytest.raises(RunError, match=r"json: expected a regular file, got a folder; check"):
        run(recipe(), resume=True)
