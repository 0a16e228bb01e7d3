"""What a recipe reaches: ways to clip, the float-safe sum, copies, the noise of N-FGSM."""

import copy
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import defenses
import privacy
from defenses.attacks.by_name import ATTACKS
from defenses.attacks.pgd import SingleStep
from secure_cnn import ModelError, Recipe, archive, build_model, load_data, run
from secure_cnn.cli import main
from secure_cnn.errors import RunError
from secure_cnn.optimizers import Muon
from secure_cnn.recipe.ranges import CLIPPINGS
from secure_cnn.recipe.seams import make_plan, make_seams, objective_for
from secure_cnn.recipe.variant import Variant
from secure_cnn.record import Row, RunRecord

PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "batch_size": 64, "baseline": False}
ADDED = (
    *("clipping", "float_safe", "copies", "attack_noise"),
    *("image_size", "image_fit", "background"),
)
COPIES = 4


@pytest.fixture
def recipe(shapes, tmp_path):
    """Makes recipes of two epochs on the small data set."""

    def make(name="run", **changes):
        base = {"out": tmp_path / name, "data": shapes, "epochs": 2, "robust_samples": 4}
        return Recipe(**(base | changes))

    return make


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clipping": "automatic"}, "clipping=automatic: expected epsilon"),
        ({"float_safe": True}, "float_safe: expected epsilon"),
        ({"copies": 4, "flip": True}, "copies=4: expected epsilon"),
        ({"copies": 4, "epsilon": 1.0}, "copies=4: expected shift, flip, eps or gaussian_sigma"),
        ({"copies": 0, "epsilon": 1.0, "flip": True}, "copies: expected a whole number >= 1"),
        ({"copies": True, "epsilon": 1.0, "flip": True}, "copies: expected a whole number >= 1"),
        ({"copies": 2.0, "epsilon": 1.0, "flip": True}, "copies: expected a whole number >= 1"),
        ({"clipping": "hard", "epsilon": 1.0}, "clipping: expected flat or automatic or per-layer"),
        ({"float_safe": 1, "epsilon": 1.0}, "float_safe: expected True or False, got 1"),
        ({"attack_noise": 1.0}, "attack_noise: expected training with n-fgsm, got plain"),
        ({"attack_noise": 1.0, "eps": 0.1, "attack": "pgd"}, "attack_noise: expected .*got pgd"),
        ({"attack_noise": -1.0, "eps": 0.1}, "attack_noise: expected a number >= 0"),
        ({"attack_noise": float("nan"), "eps": 0.1}, "attack_noise: expected a number >= 0"),
        ({"attack_noise": True, "eps": 0.1}, "attack_noise: expected a number >= 0, got True"),
        ({"attack_noise": "a", "eps": 0.1}, "attack_noise: expected a number >= 0, got 'a'"),
        ({"copies": 0}, "copies: expected a whole number >= 1, got 0"),
        ({"epochs": 2.5}, "epochs: expected at least 1, a whole number, got 2.5"),
        ({"epochs": "3"}, "epochs: expected at least 1, a whole number, got '3'"),
        ({"epochs": np.int64(3)}, "epochs: expected at least 1"),
        ({"batch_size": True}, "batch_size: expected at least 1"),
        ({"shift": 1.5}, "shift: expected at least 0 pixels, a whole number, got 1.5"),
        ({"flip": "yes"}, "flip: expected True or False, got 'yes'"),
        ({"guard": 1, "eps": 0.1}, "guard: expected True or False, got 1"),
        ({"baseline": None}, "baseline: expected True or False, got None"),
        ({"seed": True}, "seed: expected a whole number"),
        ({"learning_rate": "x"}, "learning_rate: expected a number > 0, got 'x'"),
        ({"warmup": None}, "warmup: expected a share"),
        ({"optimizer": np.zeros(2)}, "optimizer: expected sgd or adamw or muon"),
        ({"attack": 3, "eps": 0.1}, "attack: expected the name of an attack, got 3"),
        ({"gaussian_sigma": np.float32(0.5)}, "gaussian_sigma: expected a number"),
        ({"gaussian_sigma": False}, "gaussian_sigma: expected a number, got False"),
        ({"device": 0}, "device: expected a name"),
        ({"data": None}, "data: expected a text or a Path, got None"),
        ({"out": None}, "out: expected a text or a Path, got None"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_when_the_recipe_is_made(settings, message):
    """Each message begins with the setting's name; none is silently without effect."""
    with pytest.raises(RunError, match=message):
        Recipe(**{"out": "run", **settings})


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"model": "nosuch"}, ModelError, "model: expected auto, one of compact, .*got nosuch"),
        ({"model": None}, ModelError, "model: expected auto, one of compact"),
        ({"eps": 5}, defenses.ThreatModelError, "eps: .*got 5"),
        ({"eps": -1}, defenses.ThreatModelError, "eps: .*got -1"),
        ({"eps": "a"}, defenses.ThreatModelError, "eps: .*got 'a'"),
        ({"eps": 0.1, "attack": "bogus"}, defenses.AttackError, "expected one of .*got 'bogus'"),
        ({"eps": 0.1, "attack": "fgsm", "attack_steps": 4}, defenses.AttackError, "'steps'"),
        ({"eps": 0.1, "attack": "pgd", "attack_steps": 2.5}, defenses.AttackError, "got 2.5"),
        ({"gaussian_sigma": -1}, defenses.AttackError, "sigma: .*got -1"),
        ({"epsilon": -1}, privacy.PlanError, "epsilon: expected a number > 0, got -1"),
        ({"epsilon": "3"}, privacy.PlanError, "epsilon: expected a number > 0, got '3'"),
        ({"epsilon": 1.0, "delta": 0.5}, privacy.PlanError, "delta: .*got 0.5"),
        ({"max_grad_norm": 0}, privacy.PlanError, "max_grad_norm: expected a number > 0, got 0"),
        ({"max_grad_norm": -1}, privacy.PlanError, "max_grad_norm: expected a number > 0"),
    ],
)
def test_what_another_room_refuses_is_refused_when_the_recipe_is_made(settings, kind, message):
    """With that room's error, and so with its exit code."""
    with pytest.raises(kind, match=message):
        Recipe(out="run", **settings)


@pytest.mark.parametrize("settings", [3, None, {}, {"epochs": 3}])
def test_what_are_no_settings_of_a_run_make_no_recipe(settings):
    """Neither another value, nor some without their folder."""
    with pytest.raises(RunError, match=r"settings: expected those of to_dict\(\), with `out`"):
        Recipe.from_dict(settings)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_of_a_single_step_is_guarded(name):
    """The attacks say which they are, and the objectives agree; no list of names is kept."""
    single = issubclass(ATTACKS[name], SingleStep)
    assert Variant(private=False, method=name).single_step == single
    if ATTACKS[name].trainable:
        asked = Recipe(out="run", eps=0.1, attack=name)
        assert asked.robust_objective().single_step == single


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_every_way_to_clip_is_in_the_plan_and_trains(recipe, quick, clipping):
    """The plan's own clipping, in the training and in the claims; `flat` is what goes unsaid."""
    asked = recipe(**PRIVATE, clipping=clipping, float_safe=clipping == "flat")
    plan = make_plan(asked, 64)
    assert (plan.clipping.kind, plan.float_safe) == (clipping, clipping == "flat")
    assert make_plan(recipe(**PRIVATE), 64).clipping == privacy.FlatClipping()
    done = run(asked)
    claims = done.record.claims["privacy"]
    assert claims["epsilon"] <= 8.0
    assert claims.get("clipping", "flat") == clipping
    assert claims.get("float_safe", False) == (clipping == "flat")
    assert "copies" not in claims


def one_step(asked, data, model):
    """A private training of one step on all examples, with next to no noise, and its batch."""
    count = len(data.train)
    plan = privacy.DPPlan(
        samples=count, batch_size=count, epochs=1, max_grad_norm=0.05, noise_multiplier=1e-9
    )
    seams = make_seams(asked, asked.variant, model, data, plan=plan)
    (batch,) = [next(iter(seams.batches(0)))]
    return seams, batch


def test_copies_are_averaged_before_they_are_clipped(recipe):
    """One step equals the oracle: each copy's gradient alone, their mean an example, clipped."""
    asked = recipe(**PRIVATE, copies=COPIES, shift=1, flip=True, epochs=1)
    data = load_data(asked.data)
    model = build_model("compact", data.spec)
    before = copy.deepcopy(model)
    seams, (images, labels) = one_step(asked, data, model)
    count = len(data.train)
    assert len(images) == len(labels) == COPIES * count
    assert torch.equal(labels, labels[::COPIES].repeat_interleave(COPIES))
    first, second = images[::COPIES], images[1::COPIES]
    assert (first != second).flatten(1).any(1).float().mean() > 0.5  # augmented apart
    assert seams.update(seams.objective(model, images, labels))
    exact = copy.deepcopy(before).double()
    rows = [
        torch.cat([part.flatten() for part in torch.autograd.grad(loss, exact.parameters())])
        for loss in (
            F.cross_entropy(exact(image[None]), label[None])
            for image, label in zip(images.double(), labels, strict=True)
        )
    ]
    means = torch.stack(rows).view(count, COPIES, -1).mean(1)
    factors = (0.05 / means.norm(dim=1)).clamp(max=1)
    assert (factors < 1).any()
    rate = seams.optimizer.param_groups[0]["lr"]
    expected = -rate * (factors[:, None] * means).sum(0) / count
    moved = torch.cat(
        [
            (new - old).detach().double().flatten()
            for old, new in zip(before.parameters(), model.parameters(), strict=True)
        ]
    )
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-7)
    apart = torch.stack(rows)
    apart = apart * (0.05 / apart.norm(dim=1)).clamp(max=1)[:, None]
    other = -rate * apart.sum(0) / (COPIES * count)
    gap = (expected - other).abs().max()
    assert (moved - other).abs().max() > 0.5 * gap > 1e-5  # control: no copy clipped by itself


def test_a_private_step_gets_a_column_of_losses_for_each_copy(recipe, quick, monkeypatch):
    """`[rows, K]`, also under attack; epsilon and steps are those of a run without copies."""
    seen, inner = set(), privacy.PrivateTraining.step

    def step(self, losses):
        seen.add(tuple(losses.shape[1:]))
        return inner(self, losses)

    monkeypatch.setattr(privacy.PrivateTraining, "step", step)
    row = Row(
        **{"case": "compact", "variant": "private", "metric": "time_ratio", "unit": "x", "n": 1},
        **{"median": 1.2, "low": 1.2, "high": 1.2},
    )
    asked = recipe(**PRIVATE, copies=COPIES, eps=0.05, shift=1)
    done = run(asked, measure_cost=lambda *_, **__: [row])
    assert seen == {(COPIES,)}
    alone = run(recipe("alone", **PRIVATE, eps=0.05, shift=1))
    assert seen == {(COPIES,), ()}
    assert done.record.privacy == alone.record.privacy
    assert done.record.claims["privacy"]["copies"] == COPIES
    assert any("with one copy of each example" in note for note in done.record.notes)


def test_the_noise_of_n_fgsm_is_the_recipes(recipe):
    """Its own 2 by default; another where asked for."""
    for given, noise in ((None, 2.0), (0.5, 0.5), (0.0, 0.0)):
        asked = recipe(eps=0.1, attack_noise=given)
        objective = objective_for(asked, asked.variant)
        assert objective.noise == noise
        assert asked.variant.name == "n-fgsm"


def without_added(path):
    """Makes a folder what an earlier version would have left."""
    record = json.loads(path.read_text())
    for name in ADDED:
        del record["settings"][name]
    path.write_text(json.dumps(record))


def test_a_run_of_an_earlier_version_goes_on(recipe, quick, stopped_after):
    """Neither its record nor its state says how it clipped: as this version does by default."""
    asked = recipe(**PRIVATE, epochs=3)
    with stopped_after(1):
        part = run(asked)
    without_added(part.folder.record)
    state = archive.load_plain(part.folder.training)
    for name in ADDED:
        del state["settings"][name]
    archive.save_plain(part.folder.training, state, overwrite=True)
    settings = part.folder.recorded().settings
    assert not set(ADDED) & set(settings)
    assert Recipe.from_dict(settings) == replace(asked, model="handcrafted")
    with pytest.raises(RunError, match="the run has other settings: clipping; resume"):
        run(recipe(**PRIVATE, epochs=3, clipping="automatic"), resume=True)
    assert run(asked, resume=True).record.status == "complete"


def test_settings_cut_from_a_record_do_not_change_the_training(recipe, quick, stopped_after):
    """Control: the state knows how it was clipped, whatever its record no longer says."""
    asked = recipe(**PRIVATE, epochs=3, float_safe=True)
    with stopped_after(1):
        part = run(asked)
    without_added(part.folder.record)
    usual = Recipe.from_dict(part.folder.recorded().settings)
    assert not usual.float_safe
    with pytest.raises(RunError, match="it was trained with another float_safe"):
        run(usual, resume=True)


@pytest.mark.parametrize("command", ["train", "audit"])
def test_the_command_line_hands_them_on(shapes, tmp_path, monkeypatch, capsys, quick, command):
    """Every option arrives in the recipe under its name."""
    words = {
        "train": [
            *("--attack-noise", "1.5", "--clipping", "automatic", "--copies", "2"),
            *("--no-baseline", "--robust-samples", "4"),
        ],
        "audit": ["--canaries", "4", "--steps", "12"],
    }[command]
    shared = ["--epsilon", "8", "--epochs", "2", "--eps", "0.05", "--shift", "1"]
    options = [*shared, "--float-safe", "--data", shapes, *words]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["secure-cnn", command, *options, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, capsys.readouterr().err
    if command == "train":
        settings = RunRecord.read(out / "run.json").settings
        own = (settings["attack_noise"], settings["clipping"], settings["copies"])
        assert own == (1.5, "automatic", 2)
    else:
        settings = json.loads((out / "audit.json").read_text())["settings"]
    found = {name: settings[name] for name in ("eps", "shift", "float_safe")}
    assert found == {"eps": 0.05, "shift": 1, "float_safe": True}


def test_the_audit_of_a_run_with_copies_is_refused(recipe, quick, monkeypatch, capsys):
    """It knows none, and would call an honest training wrong."""
    done = run(recipe(**PRIVATE, copies=2, flip=True))
    words = ["secure-cnn", "audit", "--run", str(done.folder.root)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 3
    assert "copies: expected 1, got 2: the audit knows no copies" in capsys.readouterr().err


def test_muon_takes_private_steps_and_goes_on_with_them(recipe, stopped_after):
    """What an optimizer does to a noised gradient costs nothing, and its state is kept."""
    asked = recipe(**PRIVATE, optimizer="muon", epochs=2)
    with stopped_after(3):
        assert run(asked).record.status == "interrupted"
    done = run(asked, resume=True).record
    assert (done.status, done.chosen[-1].learning_rate) == ("complete", 0.1)
    assert 0 < done.privacy.epsilon <= asked.epsilon


def test_muon_trains_what_is_not_frozen(recipe):
    """Filters by its own steps, the rest by SGD's, all at the rate that is usual for it."""
    asked = recipe(optimizer="muon", weight_decay=0.1, model="compact")
    data = load_data(asked.data)
    model = build_model("compact", data.spec)
    model.conv2.requires_grad_(False)
    seams = make_seams(asked, asked.variant, model, data, plan=None)
    assert isinstance(seams.optimizer, Muon)
    filters, rest = seams.optimizer.param_groups
    assert [id(weight) for weight in filters["params"][-1:]] == [id(model.conv3.weight)]
    assert len(filters["params"] + rest["params"]) == len(list(model.parameters())) - 1
    for group in (filters, rest):
        assert (group["momentum"], group["weight_decay"]) == (0.9, 0.1)
    assert seams.schedule.peak == 0.1
