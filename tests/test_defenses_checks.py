"""Verdicts: masked models are called out by the check that is made for it, honest ones pass."""

from types import SimpleNamespace

import pytest
import torch
from support.suspects import (
    ALL,
    BLACK_BOX,
    FAIR,
    FALLS,
    GRADIENT,
    ITERATIVE,
    LINF,
    LOGITS,
    NOISE,
    PLANTED,
    SAME,
    TRANSFER,
    TWICE,
    Honest,
    Wrapped,
    data_for,
)
from torch import nn

import secure_cnn
from defenses import AdversarialTraining, EvaluationError, ThreatModel, ThreatModelError, evaluate
from defenses.checks.checks import CheckSettings, check
from defenses.checks.masking import (
    accuracy_falls,
    noise_is_weaker,
    radii,
    twice_the_steps_change_little,
)
from defenses.checks.soundness import plant, random_points
from defenses.measuring.verdict import Verdict

L2 = ThreatModel(norm="l2", eps=0.5)
QUICK = CheckSettings(samples=120, steps=15, queries=150, draws=5, planted=24, spot=8)


class OnGrid(torch.autograd.Function):
    """The identity, whose gradient is there for images of whole bytes only."""

    @staticmethod
    def forward(context, images):
        bytes_ = images * 255
        context.save_for_backward((bytes_ - bytes_.round()).abs().flatten(1).amax(1) < 1e-3)
        return images.clone()

    @staticmethod
    def backward(context, gradient):
        (whole,) = context.saved_tensors
        return gradient * whole.view(-1, 1, 1, 1)


def noisy(images):
    return images + 0.02 * torch.randn_like(images)


def coarse(images):
    return (images * 6).round() / 6


def outcomes(model, threat=LINF, **settings):
    """The outcome of every check by name."""
    chosen = CheckSettings(**{**vars_of(QUICK), **settings})
    found = check(model, data_for(model), threat, settings=chosen, progress=False)
    assert tuple(verdict.name for verdict in found) == ALL
    assert all(verdict.sentence.endswith(".") for verdict in found)
    return {verdict.name: verdict.outcome for verdict in found}


def vars_of(settings):
    """The fields of frozen settings."""
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def failed(found):
    """The checks that failed."""
    return {name for name, outcome in found.items() if outcome == "fail"}


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_an_honest_model_passes_everything(seed, linear, threat):
    """Every check runs and passes, with an honest surrogate too."""
    model = Honest(seed, linear=linear).eval()
    assert set(outcomes(model, threat, surrogate=Honest(seed + 50)).values()) == {"pass"}


MASKED = {
    "saturated": (Wrapped(after=lambda logits: 1e4 * logits), {GRADIENT, FALLS}),
    "quantised": (Wrapped(before=coarse), {GRADIENT, PLANTED, NOISE, FALLS, BLACK_BOX}),
    "random": (Wrapped(before=noisy), {SAME}),
    "clean images only": (Wrapped(before=OnGrid.apply), {ITERATIVE, PLANTED, NOISE, BLACK_BOX}),
}


@pytest.mark.parametrize("kind", MASKED)
def test_a_masked_model_is_called_out(kind):
    """At least by these checks."""
    model, expected = MASKED[kind]
    assert expected <= failed(outcomes(model))


def test_a_surrogate_finds_what_quantisation_hides():
    """The transfer check fails with the net behind it as a surrogate, and names no other way."""
    model = Wrapped(before=coarse)
    assert outcomes(model)[TRANSFER] == "not checked"
    assert outcomes(model, surrogate=model.net)[TRANSFER] == "fail"


@pytest.mark.parametrize("cut", ["detach", "no_grad"])
def test_a_model_without_gradients_is_called_out(cut):
    """The gradient check fails, and what needs a gradient is not checked."""

    def detached(images):
        if cut == "detach":
            return images.detach()
        with torch.no_grad():
            return images.clone()

    model = Wrapped(before=detached)
    found = outcomes(model)
    assert found[GRADIENT] == "fail"
    assert found[ITERATIVE] == found[FALLS] == "not checked"
    verdicts = check(model, data_for(model), LINF, settings=QUICK, progress=False)
    (told,) = [each.sentence for each in verdicts if each.name == ITERATIVE]
    assert "gradient" in told


def test_a_model_that_is_always_wrong_has_nothing_to_check():
    """No verdict is passed for want of images."""
    model = Honest()
    data = data_for(model)
    data.labels = (data.labels + 1) % 4
    found = {v.name: v.outcome for v in check(model, data, LINF, settings=QUICK, progress=False)}
    assert {found[name] for name in ALL[6:]} <= {"not checked"}


@pytest.mark.parametrize("linear", [True, False])
def test_noise_and_planting_are_checked_in_l1_too(linear):
    """An honest model passes both; in one that is flat almost everywhere nothing planted is found.

    Noise does not beat Auto-PGD there, whose five starts are random points too.
    """
    threat, work = ThreatModel(norm="l1", eps=4), {"samples": 40, "steps": 15, "planted": 20}
    found = outcomes(Honest(linear=linear), threat, **work)
    assert (found[NOISE], found[PLANTED]) == ("pass", "pass")
    found = outcomes(Wrapped(before=lambda x: (x * 30).round() / 30), threat, **work)
    assert (found[NOISE], found[PLANTED]) == ("pass", "fail")


@pytest.mark.parametrize(("by_gradient", "outcome"), [(0, "fail"), (30, "fail"), (60, "pass")])
def test_noise_that_finds_what_many_steps_do_not_fails_in_l1(by_gradient, outcome):
    """There is no single step to compare one draw with, so it is compared with all of them."""
    subject = SimpleNamespace(
        threat=ThreatModel(norm="l1", eps=4),
        settings=CheckSettings(draws=2),
        images=torch.zeros(60, 1, 2, 2),
        right=torch.ones(60, dtype=torch.bool),
        count=60,
        seed=0,
        iterated=torch.arange(60) < by_gradient,
        mistaken=lambda *_: torch.ones(60, dtype=torch.bool),
        missed_by_gradient=lambda found: found & (torch.arange(60) >= by_gradient),
    )
    assert noise_is_weaker(subject).outcome == outcome


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_random_points_in_l1_lie_on_the_sphere(share):
    """Within the bounds they only come closer; signs and pixels are treated alike."""
    threat, images = ThreatModel(norm="l1", eps=1.0), torch.full((4000, 1, 2, 2), 0.5)
    points = random_points(images, threat, torch.Generator().manual_seed(0), share=share)
    change = (points - images).flatten(1)
    length = change.abs().sum(dim=1)
    assert length.max() <= share * (1 + 1e-6)
    unclipped = length[change.abs().amax(1) < 0.499]
    torch.testing.assert_close(unclipped, torch.full_like(unclipped, share))
    assert threat.contains(images, points).all()
    # Uniform on the simplex of four: a share is Beta(1, 3), of mean 1/4 and median 1 - 2^(-1/3).
    whole = random_points(
        torch.zeros(4000, 1, 2, 2),
        ThreatModel(norm="l1", eps=1.0, bounds=(-1.0, 1.0)),
        torch.Generator().manual_seed(1),
    ).flatten(1)
    assert (whole.abs().mean(0) - 0.25).abs().max() < 0.02
    assert (whole.abs().median(0).values - (1 - 2 ** (-1 / 3))).abs().max() < 0.02
    assert (whole.sign().mean(0)).abs().max() < 0.06


@pytest.mark.parametrize("norm", ["l1", "l0"])
def test_other_norms_say_what_they_cannot_check(norm):
    """Every check is there; some are not checked."""
    threat = ThreatModel(norm=norm, eps=3)
    found = outcomes(Honest(), threat, samples=6, steps=2, queries=5)
    assert "not checked" in found.values()
    assert failed(found) <= {FALLS, BLACK_BOX, TWICE}


@pytest.mark.parametrize(
    ("after", "word"),
    [
        (lambda x: x * float("nan"), "finite logits"),
        (lambda x: x.softmax(1), "probabilities"),
        (lambda x: x[:, :1], "at least 2 classes"),
        (lambda x: x[:, :3], "for a model of 3 classes"),
        (lambda x: {"logits": x}, "dict"),
    ],
)
def test_unusable_answers_are_called_out(after, word):
    """The first verdict fails and says why; all others could not be checked."""
    data = data_for(Honest())
    first, *others = check(Wrapped(after=after), data, LINF, settings=QUICK, progress=False)
    assert (first.name, first.outcome) == (LOGITS, "fail")
    assert word in first.sentence
    assert {verdict.outcome for verdict in others} == {"not checked"}
    with pytest.raises(EvaluationError, match=word):
        evaluate(Wrapped(after=after), data, LINF, progress=False)


def test_unusable_images_raise():
    """In another range, say."""
    data = data_for(Honest())
    data.images = data.images.float()
    with pytest.raises(ThreatModelError, match="normalised"):
        check(Honest(), data, LINF, progress=False)


@pytest.mark.parametrize("name", ["samples", "steps", "queries", "draws", "planted", "spot"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_wrong_settings_are_refused(name, value):
    """By name."""
    with pytest.raises(EvaluationError, match=name):
        CheckSettings(**{name: value})


def test_a_surrogate_must_be_a_module():
    """A path, say, is none."""
    with pytest.raises(EvaluationError, match="surrogate"):
        CheckSettings(surrogate="model.pt")


def test_checks_repeat_and_leave_the_model_alone():
    """The same seed gives the same verdicts; weights, modes and random state stay."""
    model = Honest().train()
    data, before = data_for(model), torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    one, other = (
        check(model, data, LINF, settings=QUICK, batch_size=size, progress=False)
        for size in (64, 64)
    )
    assert one == other
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def test_evaluation_gives_the_verdicts_too():
    """As asked for, and none otherwise; the curve starts at the clean accuracy."""
    model = Honest()
    data = data_for(model)
    report = evaluate(model, data, LINF, attacks=["fgsm"], verdicts=QUICK, progress=False)
    assert tuple(verdict.name for verdict in report.verdicts) == ALL
    (curve,) = [verdict.curve for verdict in report.verdicts if verdict.curve]
    assert [point.eps for point in curve] == [0.0, *radii(LINF, torch.zeros(1, 8, 8))]
    assert curve[0].accuracy == 1.0
    assert evaluate(model, data, LINF, attacks=["fgsm"], progress=False).verdicts == ()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.3), ("l2", 1), ("l1", 5), ("l0", 4)])
def test_radii_go_up_to_what_holds_every_image(norm, eps):
    """Ascending, through eps, to the largest radius that means something."""
    image = torch.zeros(3, 4, 4)
    found = radii(ThreatModel(norm=norm, eps=eps), image)
    assert eps in found
    assert list(found) == sorted(set(found))
    corner = torch.ones(1, 3, 4, 4)
    widest = ThreatModel(norm=norm, eps=found[-1])
    assert widest.contains(torch.zeros_like(corner), corner).all()
    narrower = ThreatModel(norm=norm, eps=found[-2])
    assert not narrower.contains(torch.zeros_like(corner), corner).any()


def stub(fooled_at, *, n=200, steps=(0, 0)):
    """A subject of n correct images of which so many are fooled at each radius."""

    def first(count):
        return torch.arange(n) < count

    return SimpleNamespace(
        threat=ThreatModel(norm="linf", eps=0.1),
        settings=CheckSettings(),
        images=torch.zeros(n, 1, 2, 2),
        right=first(n),
        count=n,
        iterated=first(steps[0]),
        iterated_longer=first(steps[1]),
        iterative=lambda threat, steps: threat.eps,
        fooled_by=lambda eps: first(fooled_at(eps)),
    )


@pytest.mark.parametrize(
    ("fooled_at", "outcome", "word"),
    [
        (lambda eps: 200 if eps > 0.3 else 100, "pass", "falls"),
        (lambda eps: 150 if 0.1 < eps < 0.5 else 200 if eps > 0.5 else 160, "fail", "rises"),
        (lambda eps: 190, "fail", "any image"),
        (lambda eps: 199, "pass", "falls"),
    ],
)
def test_a_curve_must_fall_to_nothing(fooled_at, outcome, word):
    """Beyond what chance does, and no further."""
    found = accuracy_falls(stub(fooled_at, steps=(fooled_at(0.1), 0)))
    assert found.outcome == outcome
    assert word in found.sentence


@pytest.mark.parametrize(
    ("steps", "outcome"), [((100, 100), "pass"), ((100, 104), "pass"), ((100, 120), "fail")]
)
def test_an_attack_must_have_converged(steps, outcome):
    """Twice the steps may find a few more, not a tenth."""
    assert twice_the_steps_change_little(stub(lambda eps: 0, steps=steps)).outcome == outcome


def test_planting_is_not_found_by_chance():
    """Control: noise as large as the ball does not find what was planted."""
    model = Honest()
    images = data_for(model).images[:24].float() / 255
    draw = torch.Generator().manual_seed(3)

    def chance(readout, image, label, *, seed):
        return random_points(image, LINF, draw)

    found = plant(model, images, LINF, chance, seed=0)
    assert found.planted >= 20
    assert found.found <= 2


def test_a_verdict_is_one_of_three():
    """And comes back from plain values."""
    with pytest.raises(EvaluationError, match="outcome"):
        Verdict(name="x", outcome="maybe", figure=None, sentence="")


def fashion(n):
    """Training and test images of Fashion-MNIST, or a skip that says why."""
    try:
        data = secure_cnn.load_data("fashion-mnist")
    except secure_cnn.SecureCNNError as error:
        pytest.skip(f"Fashion-MNIST is not here: {error}")
    return data.train.batch(torch.arange(n)), data.test


def trained(method, eps, images, labels, *, epochs, batch_size, learning_rate):
    """A small CNN, trained on adversarial images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10)),
    )
    steps = {"steps": 5} if method == "pgd" else {}
    objective = AdversarialTraining(ThreatModel(norm="linf", eps=eps), method=method, **steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=order).split(batch_size):
            optimizer.zero_grad()
            objective(model, images[rows], labels[rows]).mean().backward()
            optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_single_step_training_is_called_out_and_pgd_training_is_not():
    """The real thing: FGSM at eps 0.3 resists one step and nothing else; PGD at 0.1 is honest."""
    (images, labels), test = fashion(10_000)
    collapsed = trained("fgsm", 0.3, images, labels, epochs=10, batch_size=50, learning_rate=5e-4)
    told = {}
    for name, model, eps in (
        ("collapsed", collapsed, 0.3),
        (
            "honest",
            trained("pgd", 0.1, images, labels, epochs=3, batch_size=100, learning_rate=1e-3),
            0.1,
        ),
    ):
        verdicts = check(
            model,
            test,
            ThreatModel(norm="linf", eps=eps),
            settings=CheckSettings(samples=250, steps=25, queries=300),
            progress=False,
        )
        told[name] = {verdict.name: verdict.outcome for verdict in verdicts}
    assert FAIR in failed(told["collapsed"])
    assert failed(told["honest"]) == set()
    assert [name for name in ALL if told["honest"][name] != "pass"] == [TRANSFER]
