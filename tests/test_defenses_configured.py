"""Attacks and objectives as values: what they show of themselves, take, and refuse by name."""

import copy
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import defenses
from defenses import (
    AdversarialTraining,
    Attack,
    AttackError,
    ThreatModel,
    attack,
    custom_attack,
    replayed,
)
from defenses.attacks import APGDT, FGSM, NFGSM, PGD

LINF = ThreatModel(norm="linf", eps=0.1)


def network() -> nn.Module:
    """A small one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels."""
    return torch.rand(count, 1, 4, 4), torch.arange(count) % 3


@dataclass(frozen=True, kw_only=True, repr=False)
class Brighter(Attack):
    """An own attack that can be trained on: lighter by a share of the ball."""

    name = "brighter"
    norms = ("linf", "l2")
    trainable = True

    share: float = 0.5

    def _search(self, model, images, labels, targets):
        return self.threat.project(images, images + self.share * self.threat.eps)


@pytest.mark.parametrize(
    ("made", "settings"),
    [
        (PGD(LINF, steps=3, step_size=0.02, early_stop=True), {"steps": 3, "step_size": 0.02}),
        (NFGSM(LINF, noise=1.5), {"noise": 1.5}),
        (Brighter(LINF, share=1.0), {"share": 1.0}),
    ],
    ids=["pgd", "n-fgsm", "own"],
)
def test_a_configured_attack_is_trained_on(made, settings):
    """The losses are those of its images, and the settings tell how it was configured."""
    objective, model, (images, labels) = AdversarialTraining(LINF, made), network(), batch()
    losses = objective(model, images, labels)
    assert objective.attack == made
    assert objective.settings["method"] == made.name
    assert settings.items() <= objective.settings.items()
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(0)))
    found = made(model, images, labels, seed=seed)
    wanted = nn.functional.cross_entropy(model(found), labels, reduction="none")
    torch.testing.assert_close(losses, wanted)


def test_a_name_and_the_value_of_that_name_are_the_same():
    """Control: the name is short for the attack with its usual settings."""
    named = AdversarialTraining(LINF, "pgd", steps=4)
    valued = AdversarialTraining(LINF, PGD(LINF, steps=4))
    model, given = network(), batch()
    assert named.settings == valued.settings
    torch.testing.assert_close(named(model, *given), valued(model, *given))


def test_the_noise_of_a_configured_single_step_can_be_raised():
    """As of one by name: the guard and the warm-up know it."""
    objective = AdversarialTraining(LINF, FGSM(LINF))
    assert objective.single_step
    assert objective.noise == 0
    objective.noise = 2.0
    assert objective.noise == 2.0


def darken(model, images, labels):
    """A function, which says nothing of itself."""
    return (images - 0.05).clamp(0, 1)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (PGD(ThreatModel(norm="linf", eps=0.2)), {}, r"method: expected an attack on linf eps=0.1"),
        (PGD(LINF), {"steps": 3}, r"steps: expected none beside a configured attack.*PGD\("),
        (PGD(LINF), {"step_size": 0.1}, "step_size: expected none beside"),
        (PGD(LINF), {"early_stop": True}, "early_stop: expected none beside"),
        (APGDT(LINF), {}, r"apgdt: .*n-fgsm, ffgsm, fgsm, pgd.*trainable = True"),
        (custom_attack(darken, LINF), {}, r"darken: .*trainable = True"),
        (PGD, {}, r"method: expected one of .*or a configured attack"),
        ("pdg", {}, r"did you mean 'pgd'\?"),
    ],
)
def test_an_attack_that_is_not_to_be_trained_on_is_refused(method, settings, message):
    """With the cure."""
    with pytest.raises(AttackError, match=message):
        AdversarialTraining(LINF, method, **settings)


def test_an_own_attack_under_our_name_is_refused():
    """A record would call it ours."""

    @dataclass(frozen=True, kw_only=True, repr=False)
    class Weak(Brighter):
        name = "pgd"

    with pytest.raises(AttackError, match=r"pgd: .*name of its own"):
        AdversarialTraining(LINF, Weak(LINF))


def test_values_show_what_they_are():
    """By the class that makes them, and what they were configured with."""
    ball = "linf eps=0.1 in [0, 1]"
    assert repr(PGD(LINF, steps=10)).startswith(f"PGD({ball}; step_size=0.025, steps=10")
    assert repr(attack("fgsm", LINF)) == f"FGSM({ball})"
    assert repr(custom_attack(darken, LINF)) == f"CustomAttack('darken', {ball})"
    assert repr(attack("jitter", LINF)).startswith(f"TorchAttack('jitter', {ball}; ")
    assert repr(Brighter(LINF)) == f"Brighter({ball}; share=0.5)"
    shown = repr(AdversarialTraining(LINF, "pgd", steps=4))
    assert shown.startswith(f"AdversarialTraining({ball}; method='pgd', ")
    assert "steps=4" in shown
    for name in defenses.OBJECTIVES:
        objective = defenses.adversarial_objective(name, LINF)
        assert repr(objective).startswith(f"{type(objective).__name__}({ball}; method='{name}'")
    assert (
        repr(defenses.GaussianAugmentation(sigma=0.25))
        == "GaussianAugmentation(method='gaussian', sigma=0.25, label_smoothing=0.0)"
    )
    assert repr(defenses.OverfittingGuard(LINF)) == f"OverfittingGuard({ball}; gap=0.2, steps=10)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGD(LINF, alpha=0.1), r"pgd takes no setting 'alpha' \(did you mean 'step_size'"),
        (lambda: PGD(LINF, stepsize=0.1), r"did you mean 'step_size'\?\); its settings: "),
        (lambda: PGD(LINF, 10), r"PGD: expected the threat alone .*steps=10"),
        (lambda: Brighter(LINF, shares=1.0), r"did you mean 'share'\?"),
        (lambda: replace(PGD(LINF), alpha=0.1), "takes no setting 'alpha'"),
        (lambda: attack("pgd", LINF, alpha=0.1), r"did you mean 'step_size'\?"),
        (lambda: attack("PGD", LINF), r"no linf attack is called 'PGD' \(did you mean 'pgd'\?\)"),
        (lambda: attack("apgd-t", LINF), r"did you mean 'apgdt'\?"),
        (lambda: attack("apgdt", LINF, target_classes=None), r"target_classes: .*leave it out"),
        (lambda: next(replayed(None, 3)), "replayed: .*batches"),
    ],
)
def test_a_wrong_call_is_told_what_was_meant(make, message):
    """In one typed error."""
    with pytest.raises(AttackError, match=message):
        make()


def test_attacks_are_still_copied_and_pickled():
    """The check of names does not stand in their way."""
    made = PGD(LINF, steps=3)
    assert copy.copy(made) == copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == made
    assert replace(made, steps=4).steps == 4
    assert APGDT(LINF, target_classes=None).target_classes == 9
