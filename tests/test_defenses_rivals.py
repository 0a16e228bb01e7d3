"""Every attack that another library has too fools about as many images as theirs, or more.

The libraries are the dependency group `rivals`; where they are missing the tests skip and say so.
Both sides get the same network, images and radius; random starts differ, so that a few images may
be fooled by one alone. Of DeepFool there is also a second implementation here, written out for one
image at a time, which runs everywhere.
"""

import warnings

import numpy as np
import pytest
import torch
from support.searched import digits, right
from torch import nn

from defenses import ThreatModel, attack, attack_scope

LINF, L2 = ThreatModel(norm="linf", eps=0.1), ThreatModel(norm="l2", eps=0.5)
L1, L0 = ThreatModel(norm="l1", eps=3.0), ThreatModel(norm="l0", eps=6)
NOISE = 3  # images of 60, of those that only the other one fools, beyond those that only ours does


def assert_no_weaker(threat, name, theirs, **settings):
    """Ours leaves no more standing than theirs, but for what random starts do."""
    model, images, labels = digits()
    found = attack(name, threat, **settings)(model, images, labels, seed=0)
    inside = threat.contains(images, theirs)
    standing = right(model, images, labels)
    ours = standing & ~right(model, found, labels)
    other = standing & ~right(model, theirs, labels) & inside
    assert other.sum() > 3
    assert int((other & ~ours).sum()) - int((ours & ~other).sum()) <= NOISE


FOOLBOX = {
    "fgsm": (LINF, "LinfFastGradientAttack", {"random_start": False}, {}),
    "bim": (
        LINF,
        "LinfBasicIterativeAttack",
        {"steps": 10, "rel_stepsize": 0.25},
        {"steps": 10, "step_size": 0.025},
    ),
    "pgd": (LINF, "LinfPGD", {"steps": 40}, {"steps": 40}),
    "pgd in l2": (L2, "L2PGD", {"steps": 40}, {"steps": 40}),
    "deepfool": (L2, "L2DeepFoolAttack", {"steps": 50}, {}),
    "deepfool in linf": (LINF, "LinfDeepFoolAttack", {"steps": 50}, {}),
    "cw": (L2, "L2CarliniWagnerAttack", {"binary_search_steps": 5, "steps": 200}, {}),
    "eaden": (L1, "EADAttack", {"binary_search_steps": 5, "steps": 200}, {}),
    "eadl1": (
        L1,
        "EADAttack",
        {"binary_search_steps": 9, "steps": 100, "decision_rule": "L1"},
        {"binary_search_steps": 9, "max_iterations": 100},
    ),
}


@pytest.mark.parametrize("case", FOOLBOX)
def test_an_attack_of_ours_is_no_weaker_than_foolboxs(case):
    """In the same ball; theirs that look for the shortest change count where it is short enough."""
    warnings.simplefilter("ignore")
    foolbox = pytest.importorskip(
        "foolbox", reason="foolbox is not installed: pip install --group rivals"
    )
    threat, name, options, ours = FOOLBOX[case]
    model, images, labels = digits()
    # Foolbox projects to rounding; ours are judged to a tolerance of a few units in the last place.
    radius = threat.eps * (1 - 1e-6)
    with attack_scope(model, seed=0):
        victim = foolbox.PyTorchModel(model, bounds=(0, 1))
        _, found, _ = getattr(foolbox.attacks, name)(**options)(
            victim, images, labels, epsilons=radius
        )
    assert_no_weaker(threat, case.partition(" ")[0], found, **ours)


ART = {
    "apgd": (
        LINF,
        "AutoProjectedGradientDescent",
        {"max_iter": 50, "nb_random_init": 1},
        {"steps": 50},
    ),
    "apgd in l2": (
        L2,
        "AutoProjectedGradientDescent",
        {"max_iter": 50, "nb_random_init": 1},
        {"steps": 50},
    ),
    "square": (LINF, "SquareAttack", {"max_iter": 300, "nb_restarts": 1}, {"queries": 300}),
    "square in l2": (L2, "SquareAttack", {"max_iter": 300, "nb_restarts": 1}, {"queries": 300}),
}


@pytest.mark.parametrize("case", ART)
def test_an_attack_of_ours_is_no_weaker_than_arts(case):
    """The adversarial robustness toolbox works on arrays; its losses are told apart by name."""
    warnings.simplefilter("ignore")
    reason = "the toolbox is not installed: pip install --group rivals"
    evasion = pytest.importorskip("art.attacks.evasion", reason=reason)
    estimators = pytest.importorskip("art.estimators.classification", reason=reason)
    threat, name, options, ours = ART[case]
    model, images, labels = digits()
    norm = {"linf": np.inf, "l2": 2}[threat.norm]
    options |= {"eps": threat.eps * (1 - 1e-6), "norm": norm, "verbose": False}
    if "AutoP" in name:
        options |= {"loss_type": "cross_entropy", "eps_step": 2 * threat.eps, "batch_size": 60}
    with attack_scope(model, seed=0):
        victim = estimators.PyTorchClassifier(
            model,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(images.shape[1:]),
            nb_classes=10,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )
        found = getattr(evasion, name)(victim, **options).generate(images.numpy(), labels.numpy())
    assert_no_weaker(threat, case.partition(" ")[0], torch.from_numpy(found), **ours)


def deepfool_of(model, image, label, threat):
    """The paper's loop for one image: the sum of all steps is stretched, and by itself bounded."""
    total, point = torch.zeros_like(image), image
    for _ in range(50):
        leaf = point.clone().requires_grad_()
        logits = model(leaf[None])[0]
        if int(logits.argmax()) != label:
            break
        steps = []
        for other in range(len(logits)):
            if other == label:
                continue
            gap = logits[other] - logits[label]
            (slope,) = torch.autograd.grad(gap, leaf, retain_graph=True)
            order = 1 if threat.norm == "linf" else 2
            distance = gap.detach().abs() / torch.linalg.vector_norm(slope, order)
            way = slope.sign() if order == 1 else slope / torch.linalg.vector_norm(slope)
            steps.append((float(distance), (distance + 1e-4) * way))
        total = total + min(steps, key=lambda step: step[0])[1]
        point = (image + 1.02 * total).clamp(0, 1)
    return point


@pytest.mark.parametrize("threat", [LINF, L2])
def test_deepfool_is_the_papers_image_by_image(threat):
    """The same images to rounding, where they are within the radius; the others are shortened."""
    model, images, labels = digits()
    with attack_scope(model, seed=0):
        expected = torch.stack(
            [
                deepfool_of(model, image, int(label), threat)
                for image, label in zip(images, labels, strict=True)
            ]
        )
    found = attack("deepfool", threat)(model, images, labels, seed=0)
    near = threat.contains(images, expected)
    assert 10 < near.sum() < 60
    torch.testing.assert_close(found[near], expected[near], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        found[~near], threat.project(images, expected)[~near], atol=1e-3, rtol=0
    )
