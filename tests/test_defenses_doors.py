"""Whatever an argument is, a door opens or says in one line of ours what it expected."""

import inspect
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import defenses
from defenses import AttackError, DefenseError, EvaluationError, ThreatModel

THREATS = {
    "linf": ThreatModel(norm="linf", eps=0.1),
    "l2": ThreatModel(norm="l2", eps=0.5),
    "l1": ThreatModel(norm="l1", eps=2.0),
    "l0": ThreatModel(norm="l0", eps=3),
}
LINF = THREATS["linf"]
STRANGE = [
    *(None, "", "nan", "\udce9", b"x", True, False, 0, -1, 2.5, 1j, float, object()),
    *(math.nan, math.inf, -math.inf, 5e-324, 1e308, 10**30, 10**400, -(10**5000)),
    *([], [1], (1, 2), {}, {"a": 1}, LINF, nn.Linear(2, 2)),
    *(np.int64(2), np.float32(0.5), np.array([1, 2]), np.array("pgd")),
    *(torch.tensor(1), torch.tensor(0.5), torch.tensor([1, 2]), torch.zeros(0, 1, 4, 4)),
]
OBJECTIVES = {
    **{
        name: partial(defenses.AdversarialTraining, method=name)
        for name in ("n-fgsm", "ffgsm", "fgsm", "pgd")
    },
    "trades": partial(defenses.Trades, steps=1),
    "mart": partial(defenses.Mart, steps=1),
    "free": defenses.FreeAdversarialTraining,
}
IMAGES, LABELS = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
BYTES = torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20) % 2


def net():
    """Five classes of 4 x 4 pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5))


def refused_in_one_line(call):
    """Passes if a call ends well, or in one line of our own."""
    message = ""
    try:
        call()
    except DefenseError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 2000


def plain(state):
    """A state with its tensors as lists."""
    return {key: part.tolist() if torch.is_tensor(part) else part for key, part in state.items()}


def knock(door, fitting, names=None):
    """Gives each of a door's arguments each strange value, the others fitting."""
    for name in names or inspect.signature(door).parameters:
        for value in STRANGE:
            refused_in_one_line(partial(door, **{**fitting, name: value}))


@pytest.mark.parametrize("norm", THREATS)
def test_configuring_an_attack(norm):
    """Every setting of every attack, and those that it does not have."""
    for name in defenses.attack_names(norm):
        make = partial(defenses.attack, name, THREATS[norm])
        known = {"steps", "step_size", "restarts", "draws", "loss", "surrogate", "other"}
        knock(make, {}, known | set(make().settings))


def test_naming_an_attack():
    """Its name, its ball, and a function of one's own."""
    knock(defenses.attack, {"name": "pgd", "threat": LINF}, ["name", "threat"])
    knock(defenses.attack_names, {"norm": "linf"}, ["norm"])
    knock(defenses.custom_attack, {"function": lambda *given: given[1], "threat": LINF})
    knock(ThreatModel, {"norm": "linf", "eps": 0.1})
    for value in STRANGE:
        knock(ThreatModel, {"norm": "l2", "eps": 0.1, "bounds": (0, value)}, ["eps"])


def test_running_an_attack():
    """Model, images, labels, targets and seed."""
    attack = defenses.attack("pgd", LINF, steps=1)
    fitting = {"model": net(), "images": IMAGES, "labels": LABELS}
    knock(attack, fitting, ["images", "labels", "targets", "seed"])
    for value in (None, "model", torch.zeros(1), lambda images: images):
        with pytest.raises(AttackError, match=r"model: expected a torch\.nn\.Module"):
            attack(value, IMAGES, LABELS)


@pytest.mark.parametrize("norm", THREATS)
def test_running_an_attack_of_extreme_settings(norm):
    """What was accepted when it was configured does not overflow in torch later."""
    for name in defenses.attack_names(norm):
        settings = defenses.attack(name, THREATS[norm]).settings
        few = {"steps": 2, "restarts": 2, "iterations": 2, "queries": 5, "max_iterations": 2}
        few = {key: few[key] for key in few.keys() & settings}
        for key in (key for key, value in settings.items() if isinstance(value, float)):
            for value in (0.0, 5e-324, 1e12):
                attack = defenses.attack(name, THREATS[norm], **few | {key: value})
                refused_in_one_line(partial(attack, net(), IMAGES, LABELS, seed=1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_making_and_using_an_objective(name):
    """Its settings, what it is called with, what it is set to, and the state it goes on from."""
    make = OBJECTIVES[name]
    fixed = {"method"} & make.keywords.keys() if isinstance(make, partial) else set()
    knock(make, {"threat": LINF}, inspect.signature(make).parameters.keys() - fixed)
    knock(defenses.AdversarialTraining, {"threat": LINF, "method": "pgd"}, ["method"])
    made = make(LINF)
    knock(made, {"model": net(), "images": IMAGES, "labels": LABELS}, ["images", "labels"])
    with pytest.raises(AttackError, match=r"model: expected a torch\.nn\.Module"):
        made(None, IMAGES, LABELS)
    made.strength = 0
    knock(made, {"model": net(), "images": IMAGES, "labels": LABELS}, ["images", "labels"])
    for attribute in ("strength", "noise"):
        if attribute == "strength" or name in ("n-fgsm", "ffgsm", "fgsm"):
            knock(lambda value, a=attribute: setattr(made, a, value), {}, ["value"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_state_is_taken_whole_or_not_at_all(name):
    """A part that cannot be leaves the others as they were."""
    made, other = OBJECTIVES[name](LINF), OBJECTIVES[name](LINF, seed=1)
    knock(made.load_state_dict, {})
    made(net(), IMAGES, LABELS)
    state = made.state_dict()
    if name == "free":
        state["change"] = torch.zeros(3, 1, 4, 4)
    for key in state:
        for value in STRANGE:
            before = made.state_dict()
            try:
                made.load_state_dict({**other.state_dict(), key: value})
            except DefenseError:
                assert plain(made.state_dict()) == plain(before)


def test_making_objectives_by_name_and_noise():
    """Also of the one that only adds noise."""
    knock(defenses.adversarial_objective, {"name": "trades", "threat": LINF})
    knock(defenses.adversarial_objective, {"name": "free", "threat": LINF}, ["steps"])
    knock(defenses.GaussianAugmentation, {"sigma": 0.1})
    knock(
        defenses.GaussianAugmentation(sigma=0.1),
        {"model": net(), "images": IMAGES, "labels": LABELS},
        ["images", "labels"],
    )


@pytest.mark.parametrize("name", [*OBJECTIVES, "gaussian"])
def test_labels_that_the_model_does_not_know(name):
    """Torch says so as an IndexError, and on an accelerator not at all where it happens."""
    made = OBJECTIVES[name](LINF) if name in OBJECTIVES else defenses.GaussianAugmentation(sigma=1)
    for labels in (torch.tensor([0, 1, 5]), torch.tensor([0, 1, -1])):
        with pytest.raises(AttackError, match="labels: expected"):
            made(net(), IMAGES, labels)
    with pytest.raises(AttackError, match="model: expected"):
        made(nn.Identity(), IMAGES, LABELS)


def test_planting():
    """Triggers, flips, and how much of what is planted where."""
    knock(defenses.Trigger, {"target": 0})
    knock(defenses.Blend, {"target": 0})
    knock(defenses.LabelFlip, {"source": 0, "target": 1})
    images, labels = BYTES
    for plant in (defenses.plant_trigger, defenses.plant_clean_label):
        fitting = {"images": images, "labels": labels, "fraction": 0.1}
        knock(
            plant,
            {**fitting, "trigger": defenses.Trigger(target=1)},
            ["images", "labels", "trigger", "fraction", "seed"],
        )
    flip = defenses.LabelFlip(source=0, target=1)
    knock(defenses.flip_labels, {"images": images, "labels": labels, "flip": flip, "fraction": 0.1})
    with pytest.raises(AttackError, match="harden: expected a function"):
        defenses.plant_clean_label(
            images, labels, defenses.Trigger(target=1), fraction=0.1, harden="more"
        )


def but_the_model(door):
    """The names of a door's arguments; what a model of other shapes raises is its own."""
    return inspect.signature(door).parameters.keys() - {"model"}


def test_measuring(tmp_path, monkeypatch):
    """An evaluation, the checks, the same once more, and two compared."""
    monkeypatch.chdir(tmp_path)  # where a strange name of a state file is one
    data = SimpleNamespace(images=IMAGES, labels=LABELS)
    about = {"model": net(), "data": data, "threat": LINF, "progress": False}
    evaluate = defenses.evaluate
    knock(evaluate, {**about, "attacks": ["fgsm"]}, but_the_model(evaluate))
    few = defenses.CheckSettings(samples=2, steps=1, queries=1)
    knock(defenses.check, {**about, "settings": few}, ["settings", "batch_size", "seed"])
    knock(defenses.CheckSettings, {})
    report = evaluate(**about, attacks=["fgsm"])
    knock(defenses.compare, {"first": report, "second": report})
    again = {"report": report, "model": about["model"], "data": data, "progress": False}
    knock(defenses.rerun, again, but_the_model(defenses.rerun))
    knock(defenses.wilson_interval, {"successes": 1, "trials": 2})
    for measure in (evaluate, defenses.check):
        with pytest.raises(EvaluationError, match=r"model: expected a torch\.nn\.Module"):
            measure(**{**about, "model": None})
    with pytest.raises(EvaluationError, match=r"model: expected a torch\.nn\.Module"):
        defenses.rerun(report, None, data)


def test_certifying_and_scanning():
    """What randomised smoothing and the searches for what was planted are given."""
    knock(defenses.Smoothing, {"sigma": 0.5})
    images, labels = BYTES
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    about = {"model": model, "images": images, "labels": labels}
    obeys = {**about, "attack": defenses.Trigger(target=0)}
    knock(defenses.attack_success_rate, obeys, but_the_model(defenses.attack_success_rate))
    knock(defenses.spectral_scan, about, but_the_model(defenses.spectral_scan))
    with pytest.raises(AttackError, match=r"model: expected a torch\.nn\.Module"):
        defenses.spectral_scan(None, images, labels)


def test_watching_a_training():
    """The guard, its images, the probe and the replays."""
    knock(defenses.OverfittingGuard, {"threat": LINF})
    for kind in (defenses.HeldOut, defenses.TrainingImages):
        knock(kind, {"images": IMAGES, "labels": LABELS})
    about = {"objective": defenses.AdversarialTraining(LINF), "model": net()}
    batch = {"images": torch.rand(6, 1, 4, 4), "labels": torch.arange(6) % 3}
    knock(defenses.check_per_example, {**about, **batch}, ["objective", "images", "labels"])
    batches = [(IMAGES, LABELS)]
    for name in ("times", "done"):
        knock(lambda **given: next(defenses.replayed(batches, **given), None), {"times": 2}, [name])
