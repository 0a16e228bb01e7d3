"""Recipes and the runs they make: settings, folders, records, claims, and what is refused."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import defenses
import privacy
from secure_cnn import (
    Recipe,
    Sealing,
    Unlocking,
    archive,
    build_model,
    load_data,
    read_model,
    run,
)
from secure_cnn.bench import step_costs
from secure_cnn.errors import DataError, ModelError, RunError, SecureCNNError
from secure_cnn.evaluate import evaluate_model
from secure_cnn.files import locked_folder
from secure_cnn.recipe import RunFolder, Variant
from secure_cnn.recipe.notes import notes_before
from secure_cnn.recipe.seams import make_plan, make_seams
from secure_cnn.record import RunRecord

PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "batch_size": 64}
ROBUST = {"eps": 0.05, "attack": "fgsm"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"optimizer": "lion"}, "optimizer: expected sgd or adamw or muon, got lion"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number > 0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"warmup": 1.0}, "warmup: expected a share"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"average_decay": 1.0}, "average_decay"),
        ({"average_decay": math.nan}, "average_decay"),
        ({"shift": -1}, "shift"),
        ({"seed": -1}, "seed"),
        ({"robust_samples": 0}, "robust_samples"),
        ({"norm": "l3"}, "norm: expected linf or l2"),
        ({"attack": "pgd"}, "attack=pgd: expected eps"),
        ({"attack_steps": 3}, "attack_steps: expected eps"),
        ({"attack_precision": "bfloat16"}, "attack_precision=bfloat16: expected eps"),
        ({"eps": 0.1, "attack_precision": "half"}, "attack_precision: expected float32 or bfloat"),
        ({"eps_warmup": 0.5}, "eps_warmup: expected eps"),
        ({"eps": 0.1, "eps_warmup": 1.0}, "eps_warmup: expected a share"),
        ({"eps": 0.1, "attack": "free", "epsilon": 3.0}, "attack=free: .*carries a perturbation"),
        ({"delta": 1e-5}, "delta: expected epsilon"),
        ({"eps": 0.1, "epsilon": 3.0, "guard": True}, "guard: not in a private training"),
        ({"eps": 0.1, "attack": "pgd", "guard": True}, "guard: expected .* single steps.*got pgd"),
        ({"guard": True}, "guard: expected .* single steps.*got plain"),
        ({"gaussian_sigma": 0.25, "eps": 0.1}, "gaussian_sigma: expected it without eps"),
        ({"gaussian_sigma": 0.25, "attack": "pgd"}, "attack=pgd: expected eps"),
    ],
)
def test_a_setting_out_of_range_is_refused_when_the_recipe_is_made(settings, message):
    """Each message begins with the setting's name."""
    with pytest.raises(RunError, match=message):
        Recipe(out="run", **settings)


def test_protections_are_off_unless_asked_for():
    """Nothing, one, the other, both; with and without the baseline that shows their cost."""
    names = {
        (): ["plain"],
        ("epsilon",): ["plain", "private"],
        ("eps",): ["plain", "n-fgsm"],
        ("epsilon", "eps"): ["plain", "private+n-fgsm"],
    }
    for given, expected in names.items():
        asked = Recipe(out="run", **dict.fromkeys(given, 0.5))
        assert [variant.name for variant in asked.variants] == expected
        alone = Recipe(out="run", baseline=False, **dict.fromkeys(given, 0.5))
        assert [variant.name for variant in alone.variants] == expected[-1:]
    assert Recipe(out="run", eps=0.1, attack="pgd").variant == Variant(private=False, method="pgd")


def test_a_recipe_survives_json():
    """What a record holds makes the same recipe again, and what it does not know is refused."""
    asked = Recipe(out="run", epsilon=3.0, eps=0.1, attack="pgd", attack_steps=3, flip=True)
    settings = json.loads(json.dumps(asked.to_dict()))
    assert Recipe.from_dict(settings) == asked
    with pytest.raises(RunError, match="settings: unknown colour, taste; the run was made by"):
        Recipe.from_dict({**settings, "taste": "sour", "colour": "red"})


def test_changed_settings_are_named_and_a_moved_folder_is_no_change():
    """In both directions: changed here, unknown here, unknown there."""
    asked = Recipe(out="here", epochs=3)
    assert asked.changed_from(Recipe(out="there", epochs=3).to_dict()) == []
    assert asked.changed_from(Recipe(out="here", epochs=5, seed=1).to_dict()) == ["epochs", "seed"]
    assert asked.changed_from({**asked.to_dict(), "new": 1}) == ["new"]
    assert asked.changed_from({k: v for k, v in asked.to_dict().items() if k != "flip"}) == ["flip"]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"data": "nowhere"}, DataError),
        ({"model": "lenet"}, ModelError),
        ({"shift": 8}, RunError),
        ({"device": "cuda:99"}, RunError),
        ({"device": "abacus"}, RunError),
        ({**PRIVATE, "epsilon": 1e-12}, privacy.PlanError),
        ({**PRIVATE, "epsilon": -1.0}, privacy.PlanError),
        ({**PRIVATE, "epsilon": math.nan}, privacy.PlanError),
        ({**PRIVATE, "delta": 1 / 64}, privacy.PlanError),
        ({**PRIVATE, "delta": 0.0}, privacy.PlanError),
        ({**PRIVATE, "max_grad_norm": 0.0}, privacy.PlanError),
        ({**PRIVATE, "batch_size": 65}, privacy.PlanError),
        ({"gaussian_sigma": 0.0}, defenses.AttackError),
        ({"gaussian_sigma": math.nan}, defenses.AttackError),
        ({"eps": 8.0}, defenses.ThreatModelError),
        ({"eps": -0.1}, defenses.ThreatModelError),
        ({"eps": 0.1, "attack": "magic"}, defenses.AttackError),
        ({"eps": 0.1, "attack": "n-fgsm", "norm": "l2"}, defenses.AttackError),
        ({"eps": 0.1, "attack": "n-fgsm", "attack_steps": 3}, defenses.AttackError),
        ({"eps": 0.1, "attack": "pgd", "attack_steps": 0}, defenses.AttackError),
        ({"eps": 0.1, "attack": "free", "attack_precision": "bfloat16"}, defenses.AttackError),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(recipe, tmp_path, settings, kind):
    """One typed error of one line, no folder made, and an earlier run left alone even by force."""
    with pytest.raises(kind) as caught:
        run(recipe(**settings))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    earlier = a_run(tmp_path / "run")
    with pytest.raises(kind):
        run(recipe(**settings), force=True)
    assert earlier.read_text() == "{}"


def test_a_layer_that_mixes_examples_is_refused_by_name(recipe):
    """BatchNorm in a private training: its dotted name, and what to put instead."""
    asked = recipe(**PRIVATE)
    data = load_data(asked.data)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), nn.Flatten())
    plan = make_plan(asked, len(data.train))
    with pytest.raises(privacy.UnsupportedLayer, match=r"0\.1: BatchNorm2d mixes.*GroupNorm"):
        make_seams(asked, asked.variant, model, data, plan=plan)


def test_an_objective_without_bounded_contributions_is_refused(recipe, monkeypatch):
    """A private training takes only objectives that say that each loss is its own example's."""
    asked = recipe(**PRIVATE)
    data = load_data(asked.data)
    plan = make_plan(asked, len(data.train))
    shared = type("Shared", (), {"per_example": False, "__call__": lambda *_: None})
    monkeypatch.setattr("secure_cnn.recipe.seams.objective_for", lambda *_: shared())
    with pytest.raises(privacy.StepError, match="Shared: expected an objective with per_example"):
        make_seams(asked, asked.variant, build_model("compact", data.spec), data, plan=plan)


def test_a_private_training_probes_what_its_objective_says(recipe, monkeypatch):
    """An objective that mixes examples under a false flag never sees a private image."""
    asked = recipe(**PRIVATE)
    data = load_data(asked.data)
    plan = make_plan(asked, len(data.train))
    seen = []

    class Mixing:
        per_example = True

        def __call__(self, model, images, labels):
            seen.append(images)
            losses = nn.functional.cross_entropy(model(images), labels, reduction="none")
            return losses * losses.detach().mean()

    monkeypatch.setattr("secure_cnn.recipe.seams.objective_for", lambda *_: Mixing())
    with pytest.raises(privacy.StepError, match="Mixing: changing one example moved the loss"):
        make_seams(asked, asked.variant, build_model("compact", data.spec), data, plan=plan)
    private, _ = data.train.batch(torch.arange(len(data.train)))
    assert seen
    assert not any((private == image).flatten(1).all(1).any() for each in seen for image in each)


def test_averaged_weights_are_the_default_of_adversarial_training(recipe):
    """The best bargain there is: on unless switched off."""
    assert Recipe(out="run", eps=0.1).average_decay > 0


def test_the_perturbation_warms_up_over_optimizer_steps(recipe):
    """From a first share to all of it, and no further."""
    asked = recipe(eps=0.1, eps_warmup=0.5, epochs=4)
    data = load_data(asked.data)
    model = build_model("compact", data.spec)
    seams = make_seams(asked, asked.variant, model, data, plan=None)
    images, labels = data.train.batch(torch.arange(8))
    growing, found = int(0.5 * seams.schedule.steps), []
    for _ in range(seams.schedule.steps):
        found.append(seams.objective.strength)
        seams.update(seams.objective(model, images, labels))
    assert found[0] == 1 / growing
    assert found == sorted(found)
    assert found[growing - 2] < 1
    assert found[growing:] == [1.0] * (seams.schedule.steps - growing)


def a_run(root):
    """The least that passes for an earlier run; its record."""
    (root / "checkpoints").mkdir(parents=True)
    (root / "report.html").touch()
    (root / "run.json").write_text("{}")
    return root / "run.json"


def begin(folder, *, force=False):
    """As a run does it, for a moment."""
    with folder.begun(force=force):
        pass


def test_a_folder_is_made_with_all_above_it(tmp_path):
    """Also where it is there already, and empty."""
    folder = RunFolder(root=tmp_path / "a" / "b", sealed=False)
    begin(folder)
    assert (tmp_path / "a" / "b" / "checkpoints").is_dir()
    (tmp_path / "empty").mkdir()
    begin(RunFolder(root=tmp_path / "empty", sealed=False))


def test_a_run_is_replaced_by_force_only(tmp_path):
    """Without force nothing is touched; with it the earlier run goes whole."""
    record = a_run(tmp_path / "run")
    folder = RunFolder(root=tmp_path / "run", sealed=False)
    with pytest.raises(RunError, match=r"exists already, and a run is never .*--force"):
        begin(folder)
    assert record.exists()
    begin(folder, force=True)
    assert [path.name for path in folder.root.iterdir()] == ["checkpoints"]


def test_what_was_measured_of_a_run_goes_with_it(tmp_path):
    """An audit, what it leaks, and its shadow models with them; nothing else that lies there."""
    a_run(tmp_path / "run")
    folder = RunFolder(root=tmp_path / "run", sealed=False)
    folder.shadows.mkdir()
    for name in ("audit.json", "audit.html", "leakage.json", "leakage.html"):
        (folder.root / name).touch()
    for name in ("table.json", "signals.npz", "exposed.key", ".signals.npz.0123456789abcdef.tmp"):
        (folder.shadows / name).touch()
    other = folder.shadows / "notes.txt"
    other.touch()
    with pytest.raises(RunError, match=r"holds more than a run.*: leakage/notes\.txt"):
        begin(folder, force=True)
    other.unlink()
    begin(folder, force=True)
    assert [path.name for path in folder.root.iterdir()] == ["checkpoints"]


def test_a_link_in_place_of_the_shadow_models_is_not_followed(tmp_path):
    """What it leads to is not the run's."""
    a_run(tmp_path / "run")
    folder = RunFolder(root=tmp_path / "run", sealed=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.json").touch()
    folder.shadows.symlink_to(tmp_path / "mine")
    with pytest.raises(RunError, match=r"holds more than a run.*: leakage;"):
        begin(folder, force=True)
    assert (tmp_path / "mine" / "table.json").exists()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("left", [(), ("checkpoints/",), (".run.json.0123456789abcdef.tmp",)])
def test_what_a_run_left_that_was_killed_before_its_record_is_no_run(tmp_path, left, force):
    """Its folder would be refused by plain, `--resume` and `--force` alike otherwise."""
    folder = RunFolder(root=tmp_path / "run", sealed=False)
    folder.root.mkdir()
    for name in left:
        (folder.root / name).mkdir() if name.endswith("/") else (folder.root / name).touch()
    with pytest.raises(RunError, match=r"no run has begun here.*without --resume"):
        folder.recorded()
    begin(folder, force=force)
    assert [path.name for path in folder.root.iterdir()] == ["checkpoints"]
    folder.model.touch()
    with pytest.raises(RunError, match=r"exists already|holds no run"):
        begin(folder, force=force)


def test_a_run_is_kept_out_while_another_begins(tmp_path):
    """The lock is held from before the old record goes; nobody takes the folder in between."""
    record = a_run(tmp_path / "run")
    folder = RunFolder(root=tmp_path / "run", sealed=False)
    with folder.begun(force=True):
        assert not record.exists()
        for force in (False, True):
            with pytest.raises(RunError, match="a run is under way in it"):
                begin(folder, force=force)


def test_a_run_that_is_being_measured_is_not_replaced(tmp_path):
    """What its model leaks would be written beside another one."""
    record = a_run(tmp_path / "run")
    folder = RunFolder(root=tmp_path / "run", sealed=False)
    folder.shadows.mkdir()
    (folder.shadows / "table.json").touch()
    words = "leakage: a measurement of the run is under way in it; wait for its end, or interrupt"
    with locked_folder(folder.shadows), pytest.raises(RunError, match=words):
        begin(folder, force=True)
    assert record.exists()
    begin(folder, force=True)
    assert not folder.shadows.exists()


def test_a_folder_that_is_taken_is_said_without_the_system_s_words(tmp_path, monkeypatch):
    """The hint is what to do; that no lock can be had at all is another matter."""
    folder = RunFolder(root=tmp_path, sealed=False)
    with folder.locked(), pytest.raises(RunError, match=r"or interrupt it$"):
        begin(folder, force=False)

    def unable(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unable)
    with pytest.raises(RunError, match="expected a folder that can be locked: No locks available"):
        begin(folder, force=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"recipe": {"out": "run"}}, r"recipe: expected a Recipe, got dict; .*from_dict"),
        ({"sealing": [1]}, r"sealing: .*got list; give Sealing\(recipients"),
        ({"unlocking": "key"}, r"unlocking: .*got str; give Unlocking\(identity"),
        ({"measure_cost": True}, "measure_cost: expected a function or None, got bool"),
        ({"force": "no"}, "force: expected True or False, got str"),
        ({"resume": None}, "resume: expected True or False, got NoneType"),
    ],
)
def test_arguments_of_another_kind_are_refused_at_once(recipe, tmp_path, words, message):
    """In words of ours, before anything is loaded or made."""
    asked = words.get("recipe") or recipe()
    with pytest.raises(RunError, match=message):
        run(**{**words, "recipe": asked})
    assert not (tmp_path / "run").exists()


def test_the_record_of_a_replaced_run_goes_last(tmp_path, monkeypatch):
    """Killed in between, what is left is still a run that `--force` replaces."""
    record = a_run(tmp_path / "run")
    folder = RunFolder(root=tmp_path / "run", sealed=False)
    for place in (folder.model, folder.training, folder.page):
        place.touch()
    removed = []
    monkeypatch.setattr(Path, "unlink", lambda path, **_: removed.append(path))
    begin(folder, force=True)
    assert len(removed) == 4
    assert removed[-1] == record


def test_force_replaces_nothing_but_a_run(tmp_path):
    """Not a folder of other things, not a run with a key beside it, not a file, not a link."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    a_run(tmp_path / "run")
    (tmp_path / "run" / "me.key").touch()
    (tmp_path / "file").touch()
    a_run(tmp_path / "target")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name, message in {
        "photos": "holds no run",
        "run": "holds more than a run.*me.key",
        "file": "expected a folder that can be made",
        "link": "expected a folder that can be made.*got a link",
    }.items():
        with pytest.raises(RunError, match=message):
            begin(RunFolder(root=tmp_path / name, sealed=False), force=True)
    assert (tmp_path / "photos" / "cat.png").exists()
    assert (tmp_path / "run" / "me.key").exists()
    assert (tmp_path / "run" / "run.json").exists()
    assert (tmp_path / "target" / "run.json").exists()


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    """A file in the way, or, for whoever is not the superuser, a folder without permission."""
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="expected a folder that can be made"):
        begin(RunFolder(root=tmp_path / "file" / "run", sealed=False))
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(RunError, match="expected a folder that can be"):
            begin(RunFolder(root=tmp_path / "locked" / "run", sealed=False))


def test_a_folder_names_its_files_after_their_protection(tmp_path):
    """Sealed and plain checkpoints are told apart by name."""
    names = {
        sealed: (folder.model.name, folder.training.name)
        for sealed in (True, False)
        for folder in [RunFolder(root=tmp_path, sealed=sealed)]
    }
    assert names[True] == ("model.sealed", "training.sealed")
    assert names[False] == ("model.safetensors", "training.safetensors")


def test_a_whole_run_with_both_protections(recipe, tmp_path):
    """Everything on: record, page, checkpoint, costs, and figures that can be had again."""
    done = run(recipe(**PRIVATE, **ROBUST), measure_cost=step_costs)
    record = RunRecord.read(tmp_path / "run" / "run.json")
    assert record.to_dict() == done.record.to_dict()
    assert record.status == "complete"
    assert [result.variant for result in record.results] == ["plain", "private+fgsm"]
    assert {row.variant for row in record.cost} == {"plain", "private", "fgsm", "private+fgsm"}
    assert record.checkpoints == ("checkpoints/model.safetensors",)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "model.safetensors"
    ]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 5
    assert '<span class="status">complete</span>' in page
    assert "still running" not in page
    loaded = read_model(done.folder.model, unlocking=None)
    assert not done.model.training
    for name, value in done.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    data = load_data(recipe().data)
    found = evaluate_model(loaded.model, data.test, data.spec.classes)
    assert found.accuracy == record.results[-1].accuracy == loaded.claims["accuracy"]


def test_a_private_record_says_nothing_that_epsilon_does_not_cover(recipe, quick):
    """No training loss in any epoch, the baseline's and the followers' file included.

    Epsilon is in each of its own, never falling, at most the budget.
    """
    done = run(recipe(**PRIVATE, epochs=3))
    plain = [e for e in done.record.epochs if e.variant == "plain"]
    private = [e for e in done.record.epochs if e.variant == "private"]
    assert plain
    assert all(e.epsilon is None for e in plain)
    assert all(e.train_loss is None for e in (*plain, *private))
    lines = (done.folder.root / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train_loss"] for line in lines] == [None] * 6
    epsilons = [e.epsilon for e in private]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == done.record.results[-1].epsilon <= 8.0
    assert [e.step for e in private] == [1, 2, 3]
    assert done.record.privacy.steps == 3
    assert done.record.privacy.epsilon == pytest.approx(epsilons[-1])
    assert any("not covered by epsilon" in note for note in done.record.notes)


def test_a_private_training_state_holds_neither_losses_nor_keys(
    recipe, quick, stopped_after, tmp_path
):
    """The checkpoint of a training under way: weights, optimizer, average, plan and ledger."""
    with stopped_after(1):
        run(recipe(**PRIVATE, epochs=3, baseline=False))
    state = archive.load_plain(tmp_path / "run" / "checkpoints" / "training.safetensors")
    assert set(state) == {
        *("variant", "step", "settings", "model", "optimizer", "average", "private"),
        *("run", "fingerprint", "pool_fingerprint", "train_fingerprint"),
        *("weights", "skipped", "chosen"),
    }
    assert set(state["private"]) == {"plan", "ledger", "max_grad_norm"}


def test_epochs_are_as_many_as_were_asked_for(recipe):
    """Also where the steps of a private training do not divide evenly."""
    asked = recipe(**(PRIVATE | {"batch_size": 40}), epochs=3)
    data = load_data(asked.data)
    plan = privacy.DPPlan(samples=64, batch_size=40, epochs=3, noise_multiplier=1.0)
    model = build_model("compact", data.spec)
    schedule = make_seams(asked, asked.variant, model, data, plan=plan).schedule
    ends = {step: schedule.epoch_ended(step) for step in range(1, schedule.steps + 1)}
    assert ends == {1: None, 2: 1, 3: 2, 4: None, 5: 3}


def test_claims_are_of_the_protected_training_only(recipe, quick, tmp_path):
    """Bit for bit the claims of a run that never trained a baseline."""
    both = run(recipe(**ROBUST))
    alone = run(recipe(**ROBUST, baseline=False, out=tmp_path / "alone"))
    assert [result.variant for result in both.record.results] == ["plain", "fgsm"]
    assert both.record.claims == alone.record.claims
    claims, result = both.record.claims, both.record.results[-1]
    assert claims["variant"] == "fgsm"
    assert claims["robustness"]["robust_accuracy"] == result.robust_accuracy
    assert claims["robustness"]["attacks"] == dict(result.attacks)
    assert claims["robustness"]["images"] == 4
    assert "privacy" not in claims


def test_claims_of_a_private_training_state_their_conditions(recipe, quick):
    """What was spent, at which delta, with which noise, in which steps, under which relation."""
    done = run(recipe(**PRIVATE, baseline=False))
    told, plan = done.record.claims["privacy"], done.record.privacy
    assert told["epsilon"] == done.record.results[-1].epsilon <= 8.0
    for name in ("delta", "noise_multiplier", "max_grad_norm", "sampling_rate", "steps"):
        assert told[name] == getattr(plan, name)
    assert "add or remove" in told["relation"]
    assert "robustness" not in done.record.claims


def test_a_sealed_run_opens_with_its_key_only(recipe, quick, tmp_path):
    """Recipient and signer: claims bound, another key refused, a changed claim refused."""
    identity, signer = archive.generate_identity(), archive.generate_signer()
    sealing = Sealing(recipients=(identity.recipient,), signer=signer)
    done = run(recipe(**ROBUST, baseline=False), sealing=sealing)
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert path == done.folder.model
    assert path.name == "model.sealed"
    trusted = Unlocking(identity=identity, trusted=[signer.verifier])
    loaded = read_model(path, unlocking=trusted)
    for name, value in done.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    claims = dict(archive.verify(path, trusted=[signer.verifier]).claims)
    assert claims.pop("architecture") == loaded.architecture.to_dict()
    assert claims == json.loads(json.dumps(done.record.claims))
    with pytest.raises(archive.WrongKey):
        read_model(path, unlocking=Unlocking(identity=archive.generate_identity()))
    with pytest.raises(SecureCNNError):
        read_model(path, unlocking=None)
    stranger = archive.generate_signer().verifier
    with pytest.raises(archive.UntrustedSigner):
        read_model(path, unlocking=Unlocking(identity=identity, trusted=[stranger]))
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"variant":"fgsm"', b'"variant":"pgd!"'))
    assert path.read_bytes() != content
    with pytest.raises(archive.Tampered):
        read_model(path, unlocking=trusted)


def test_recipients_that_do_not_go_together_show_before_any_step(recipe, quick, monkeypatch):
    """A file would be no stronger than its weakest recipient; no step is lost to learning it."""
    recipients = [archive.generate_identity(post_quantum=p).recipient for p in (True, False)]
    monkeypatch.setattr("secure_cnn.recipe.training.train", lambda *_, **__: pytest.fail("a step"))
    with pytest.raises(archive.InvalidKey):
        run(recipe(), sealing=Sealing(recipients=recipients))


def test_a_second_run_in_the_same_folder_is_refused(recipe, quick, tmp_path):
    """The record of the first is left as it was; force begins anew."""
    first = run(recipe())
    before = first.folder.record.read_bytes()
    with pytest.raises(RunError, match="never overwritten"):
        run(recipe(epochs=3))
    assert first.folder.record.read_bytes() == before
    again = run(recipe(epochs=3), force=True)
    assert len(again.record.epochs) == 3


def test_the_record_stays_running_while_it_runs(recipe, quick, monkeypatch):
    """From the first moment there is a record, and it says that the run has not ended."""
    seen = []
    inner = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        seen.append(RunRecord.read(asked.out + "/run.json").status)
        return inner(self, *args, **kwargs)

    asked = recipe()
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    run(asked)
    assert set(seen) == {"running"}


def test_the_global_random_state_is_neither_read_nor_moved(recipe, quick, tmp_path):
    """Two runs around other draws are the same, and the draws are those of no run at all."""
    torch.random.default_generator.manual_seed(3)
    undisturbed = torch.rand(2)
    torch.random.default_generator.manual_seed(3)
    first = run(recipe(**ROBUST, shift=1, flip=True, baseline=False))
    assert torch.equal(torch.rand(2), undisturbed)
    second = run(recipe(**ROBUST, shift=1, flip=True, baseline=False, out=tmp_path / "b"))
    for a, b in zip(
        first.model.state_dict().values(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_training_that_overfits_to_one_step_is_guarded(tmp_path, quick):
    """FGSM at a large eps on digits ends as N-FGSM, less apart from PGD by far; and says so."""
    apart = {}
    for guard in (True, False):
        done = run(
            Recipe(
                out=tmp_path / str(guard),
                **{"eps": 0.2, "attack": "fgsm", "epochs": 14, "guard": guard},
                **{"baseline": False, "robust_samples": 4},
            )
        )
        images, labels = load_data("digits").test.batch(torch.arange(300))
        seen = defenses.OverfittingGuard(defenses.ThreatModel(norm="linf", eps=0.2)).check(
            done.model, defenses.HeldOut(images=images, labels=labels)
        )
        apart[guard] = seen.single_step - seen.iterative
        assert guard or seen.overfitted  # control: without the guard it does overfit
        told = [note for note in done.record.notes if "catastrophic overfitting" in note]
        assert any(("noise 0 -> 1 eps" if guard else "% under PGD. Train") in note for note in told)
    # Over three seeds and one or two threads: 0.26 to 0.34 without, 0.09 to 0.13 less with.
    assert apart[True] < apart[False] - 0.04


def test_a_training_on_single_steps_has_no_guard_unless_asked(recipe, quick, monkeypatch):
    """Private or not: nothing looks at its training images; the finished model is asked once."""
    asked = []
    monkeypatch.setattr(
        defenses.OverfittingGuard, "rescue", lambda *_, **__: pytest.fail("looked at images")
    )
    check = defenses.OverfittingGuard.check
    monkeypatch.setattr(
        defenses.OverfittingGuard,
        "check",
        lambda guard, model, images: asked.append(images) or check(guard, model, images),
    )
    run(recipe(**PRIVATE, baseline=False, eps=0.05))
    assert [type(images) for images in asked] == [defenses.HeldOut]


def test_a_model_trained_on_noise_is_certified(tmp_path, quick):
    """From the recipe to a radius; one that never saw noise is certified far less (control)."""
    settings = {"epochs": 10, "baseline": False}
    noisy = Recipe(out=tmp_path / "noisy", gaussian_sigma=0.5, **settings)
    assert [variant.name for variant in noisy.variants] == ["gaussian"]
    certified = {}
    for recipe in (noisy, Recipe(out=tmp_path / "plain", **settings)):
        done = run(recipe)
        assert done.record.threat is None
        report = defenses.certify(
            done.model,
            load_data("digits").test,
            defenses.Smoothing(sigma=0.5, samples=200),
            images=60,
            progress=False,
        )
        certified[done.record.results[-1].variant] = report.certified(0.25).accuracy
    assert certified["gaussian"] > certified["plain"] + 0.15


def test_noise_and_privacy_compose(recipe, quick):
    """Each loss is of its own example, so a private update takes it."""
    done = run(recipe(**PRIVATE, gaussian_sigma=0.1, baseline=False))
    assert done.record.results[-1].variant == "private+gaussian"
    assert done.record.claims["privacy"]["epsilon"] <= 8.0
    assert "robustness" not in done.record.claims


@pytest.mark.parametrize("rows", [None, 3, ["no row"], "rows"])
def test_costs_that_are_no_rows_are_refused_and_the_training_is_kept(recipe, rows):
    """Before the model is written; a resumed run finishes without them."""
    asked = recipe()
    with pytest.raises(RunError, match="measure_cost: expected a sequence"):
        run(asked, measure_cost=lambda *_, **__: rows)
    assert run(asked, resume=True).record.status == "complete"


@pytest.mark.parametrize(("eps", "said"), [(0.1, False), (0.2, True)])
def test_changes_beyond_the_bands_are_said(eps, said):
    """Where the network is made for smaller ones."""
    notes = notes_before(Recipe(out="runs/1", model="banded", eps=eps, baseline=False))
    assert any("made for changes of up to 0.1" in note for note in notes) is said
