"""TRADES, MART and free adversarial training: their losses, and how they meet a private update."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.objectives import PerExample, batch, seen_images
from torch import nn

import privacy
from defenses import (
    OBJECTIVES,
    AdversarialTraining,
    AttackError,
    FreeAdversarialTraining,
    Mart,
    ThreatModel,
    ThreatModelError,
    Trades,
    adversarial_objective,
    attack,
    attack_scope,
    replayed,
)

LINF = ThreatModel(norm="linf", eps=0.1)
TWO_PASSES = {"trades": Trades, "mart": Mart}


def trades_by_the_paper(model, images, adversarial, labels, beta=6.0):
    """The loss of the authors' repository, example by example."""
    clean, moved = model(images), model(adversarial)
    divergence = F.kl_div(F.log_softmax(moved, 1), F.softmax(clean, 1), reduction="none").sum(1)
    return F.cross_entropy(clean, labels, reduction="none") + beta * divergence


def mart_by_the_authors(model, images, adversarial, labels, beta=5.0):
    """The loss of the authors' repository, example by example."""
    logits, logits_adv = model(images), model(adversarial)
    adv_probs = F.softmax(logits_adv, dim=1)
    best = torch.argsort(adv_probs, dim=1)[:, -2:]
    new_y = torch.where(best[:, -1] == labels, best[:, -2], best[:, -1])
    loss_adv = F.cross_entropy(logits_adv, labels, reduction="none") + F.nll_loss(
        torch.log(1.0001 - adv_probs + 1e-12), new_y, reduction="none"
    )
    nat_probs = F.softmax(logits, dim=1)
    true_probs = nat_probs.gather(1, labels.unsqueeze(1)).squeeze(1)
    divergence = F.kl_div(torch.log(adv_probs + 1e-12), nat_probs, reduction="none").sum(1)
    return loss_adv + beta * divergence * (1.0000001 - true_probs)


@pytest.mark.parametrize(
    ("make", "oracle"), [(Trades, trades_by_the_paper), (Mart, mart_by_the_authors)]
)
def test_losses_and_gradients_are_the_authors(make, oracle):
    """Through both passes: the weights get the gradient of the published loss."""
    torch.manual_seed(0)
    model, (images, labels) = PerExample().double(), batch()
    images, twin = images.double(), copy.deepcopy(model)
    seen = seen_images(model)
    losses = make(LINF, seed=1)(model, images, labels)
    adversarial = seen[-1] if make is Trades else seen[-2]
    assert LINF.contains(images, adversarial).all()
    assert (adversarial - images).abs().amax() > 0.05
    expected = oracle(twin, images, adversarial, labels)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    losses.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_trades_climbs_the_divergence_from_the_clean_answer():
    """More than noise of the same size does, and more than where it started."""
    torch.manual_seed(0)
    model, (images, labels) = PerExample(), batch(32)
    seen = seen_images(model)
    Trades(LINF)(model, images, labels)
    adversarial = seen[-1]
    clean = model(images).softmax(1)

    def divergence(moved):
        return F.kl_div(model(moved).log_softmax(1), clean, reduction="batchmean").item()

    noise = (images + 0.1 * torch.randn_like(images).sign()).clamp(0, 1)
    assert divergence(adversarial) > 3 * divergence(noise) > 0


def forwards(model, objective, images, labels):
    """How many forward passes a call takes."""
    seen = seen_images(model)
    objective(model, images, labels)
    return len(seen)


def test_trades_reuses_the_clean_pass_where_the_modes_agree():
    """GroupNorm: 2 passes and the attack's steps; compared once, in the first call."""
    images, labels = batch()
    objective, first = Trades(LINF, steps=3), PerExample().train()
    assert forwards(first, objective, images, labels) == 2 + 3 + 1
    again = PerExample().train()
    objective(again, images, labels)
    assert forwards(again, objective, images, labels) == 2 + 3


class Moody(nn.Module):
    """A net whose answer depends on its mode, in one of several ways."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.norm = kind, nn.BatchNorm2d(1) if kind == "batch norm" else nn.Identity()
        self.head = nn.Linear(64, 4)

    def forward(self, images):
        images = self.norm(images)
        if self.kind == "functional dropout":
            images = F.dropout(images, 0.2, training=self.training)
        if self.kind == "own flag" and self.training:
            images = images * 1.1
        if self.kind == "rare draw" and self.training:
            images = images * (1 + (torch.rand(()) > 2))  # never changes it, but it draws
        return self.head(images.flatten(1))


@pytest.mark.parametrize("kind", ["batch norm", "functional dropout", "own flag", "rare draw"])
def test_trades_takes_the_clean_answer_in_evaluation_mode_where_the_modes_differ(kind):
    """In every call: as the authors do."""
    torch.manual_seed(0)
    images, labels = batch()
    model, objective = Moody(kind).train(), Trades(LINF, steps=2)
    for _ in range(2):
        objective(model, images, labels)
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    objective(model, images, labels)
    assert modes == [True, False, False, False, True]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_empty_batch_has_no_losses(name):
    """Poisson sampling draws them; the backward still works."""
    model, (images, labels) = PerExample(), batch(0)
    losses = adversarial_objective(name, LINF)(model, images, labels)
    assert losses.shape == (0,)
    losses.sum().backward()


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_with_opacus_each_example_has_the_gradient_of_its_own_loss(name):
    """Two forward passes, one backward pass: the rows of one example are added up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opacus = pytest.importorskip("opacus")
    torch.manual_seed(0)
    model, (images, labels) = PerExample().train(), batch()
    oracle = copy.deepcopy(model)
    private = opacus.GradSampleModule(model, loss_reduction="sum")
    seen = seen_images(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adversarial_objective(name, LINF, seed=5)(private, images, labels).sum().backward()
    adversarial = seen[-1] if name == "trades" else seen[-2]
    by_hand = trades_by_the_paper if name == "trades" else mart_by_the_authors
    for i in range(len(images)):
        row = slice(i, i + 1)
        loss = by_hand(oracle, images[row], adversarial[row], labels[row]).sum()
        expected = torch.autograd.grad(loss, list(oracle.parameters()))
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert len(parameter.grad_sample) == len(images)
            torch.testing.assert_close(parameter.grad_sample[i], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_a_private_step_is_the_clipped_sum_of_the_published_losses(name):
    """Every example sampled, next to no noise: each person is clipped once, though seen twice."""
    torch.manual_seed(0)
    model, norm, count = PerExample(), 0.05, 8
    before = copy.deepcopy(model)
    images, labels = batch(count)
    data = torch.utils.data.TensorDataset(images, labels)
    plan = privacy.DPPlan(
        samples=count, batch_size=count, epochs=1, max_grad_norm=norm, noise_multiplier=1e-9
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = seen_images(model)
    private = privacy.attach(plan, model, optimizer, data)
    drawn, drawn_labels = next(iter(private.batches))
    objective = adversarial_objective(name, LINF)
    private.check_objective(objective)
    assert private.step(objective(private.model, drawn, drawn_labels))
    adversarial = seen[-1] if name == "trades" else seen[-2]
    by_hand = trades_by_the_paper if name == "trades" else mart_by_the_authors
    total = [torch.zeros_like(p) for p in before.parameters()]
    for i in range(count):
        row = slice(i, i + 1)
        loss = by_hand(before, drawn[row], adversarial[row], drawn_labels[row]).sum()
        rows = torch.autograd.grad(loss, list(before.parameters()))
        factor = (norm / torch.cat([r.flatten() for r in rows]).norm()).clamp(max=1)
        total = [t + factor * r for t, r in zip(total, rows, strict=True)]
    for old, new, part in zip(before.parameters(), model.parameters(), total, strict=True):
        torch.testing.assert_close(old - part / count, new, rtol=1e-4, atol=2e-6)


def test_free_training_moves_its_perturbation_by_the_backward_pass_of_the_weights():
    """After one backward pass it is eps times the sign of the images' gradient."""
    torch.manual_seed(0)
    model, (images, labels) = PerExample(), batch()
    objective = FreeAdversarialTraining(LINF)
    seen = seen_images(model)
    losses = objective(model, images, labels)
    assert torch.equal(seen[-1], images)
    losses.mean().backward()
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), labels), leaf)
    objective(model, images, labels)
    torch.testing.assert_close(seen[-1], (images + 0.1 * gradient.sign()).clamp(0, 1))
    assert LINF.contains(images, seen[-1]).all()


def test_free_training_carries_its_perturbation_to_the_next_example_and_says_so():
    """The reason why no private update may take it."""
    torch.manual_seed(0)
    model, (images, labels) = PerExample(), batch()
    objective = FreeAdversarialTraining(LINF)
    objective(model, images, labels).sum().backward()
    seen = seen_images(model)
    objective(model, images.flip(0), labels)
    assert not torch.equal(seen[-1], images.flip(0))
    assert objective.per_example is False
    assert "carries" in objective.reason
    data = torch.utils.data.TensorDataset(images, labels)
    plan = privacy.DPPlan(samples=6, batch_size=6, epochs=1, noise_multiplier=1.0)
    private = privacy.attach(plan, model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    with pytest.raises(privacy.StepError, match="per_example"):
        private.check_objective(objective)


def test_a_resumed_free_training_goes_on_as_it_was():
    """Its perturbation is part of its state; smaller last batches keep the other places."""
    torch.manual_seed(0)
    model, (images, labels) = PerExample(), batch()
    one, two = FreeAdversarialTraining(LINF), FreeAdversarialTraining(LINF)
    one(model, images, labels).sum().backward()
    one(model, images[:2], labels[:2]).sum().backward()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(model, images, labels), two(model, images, labels))


def test_batches_are_replayed_from_where_they_were():
    """Each several times in a row; a resumed first batch less often."""
    batches = [(torch.zeros(1), torch.tensor([i])) for i in range(3)]
    found = [int(labels) for _, labels in replayed(batches, 2)]
    assert found == [0, 0, 1, 1, 2, 2]
    assert [int(y) for _, y in replayed(batches, 3, done=2)] == [0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_strength_scales_the_ball_and_zero_leaves_the_images_alone(name):
    """A warm-up; the state carries it."""
    torch.manual_seed(0)
    model, (images, labels) = PerExample(), batch()
    objective, farthest = adversarial_objective(name, LINF), {}
    for strength in (0.0, 0.5, 1.0):
        objective.strength = strength
        seen = seen_images(model)
        for _ in range(2):  # free training finds its perturbation in the first
            objective(model, images, labels).sum().backward()
        farthest[strength] = max((each - images).abs().max().item() for each in seen)
    assert farthest[0.0] == 0
    assert 0.3 < farthest[0.5] / farthest[1.0] < 0.7
    again = adversarial_objective(name, LINF)
    objective.strength = 0.25
    again.load_state_dict(objective.state_dict())
    assert again.strength == 0.25
    with pytest.raises(AttackError, match="strength"):
        objective.strength = 1.5


def test_half_strength_is_the_attack_of_half_the_eps():
    """Step size included."""
    torch.manual_seed(0)
    model, (images, labels) = PerExample(), batch()
    half = AdversarialTraining(ThreatModel(norm="linf", eps=0.05), "pgd", seed=3)
    scaled = AdversarialTraining(LINF, "pgd", seed=3)
    scaled.strength = 0.5
    torch.testing.assert_close(scaled(model, images, labels), half(model, images, labels))


def test_early_stopped_training_moves_the_unfooled_as_far_as_pgd_does():
    """The same images where the model holds; fooled ones are left where they were fooled."""
    torch.manual_seed(0)
    model, (images, _) = PerExample().eval(), batch(16)
    labels = model(images).argmax(1)
    threat = ThreatModel(norm="linf", eps=0.02)
    whole, stopped = (
        attack("pgd", threat, steps=5, early_stop=stop)(model, images, labels, seed=1)
        for stop in (False, True)
    )
    with attack_scope(model):
        held = model(stopped).argmax(1) == labels
    assert 0 < held.sum() < 16
    torch.testing.assert_close(whole[held], stopped[held], rtol=0, atol=1e-6)
    objective = AdversarialTraining(threat, "pgd", early_stop=True)
    assert objective.settings["early_stop"] is True
    assert objective(model, images, labels).shape == (16,)


@pytest.mark.parametrize(
    ("make", "given", "word"),
    [
        (Trades, {"beta": -1.0}, "beta"),
        (Trades, {"steps": 0}, "steps"),
        (Trades, {"threat": ThreatModel(norm="l1", eps=1.0)}, "linf or l2"),
        (Mart, {"beta": float("nan")}, "beta"),
        (Mart, {"steps": 0}, "steps"),
        (Mart, {"label_smoothing": 1.0}, "label_smoothing"),
        (FreeAdversarialTraining, {"replays": 0}, "replays"),
        (FreeAdversarialTraining, {"threat": ThreatModel(norm="l2", eps=1.0)}, "linf"),
    ],
)
def test_wrong_settings_are_refused(make, given, word):
    """By name, before any training."""
    with pytest.raises(AttackError, match=word):
        make(**({"threat": LINF} | given))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_have_names_and_settings_for_the_record(name):
    """Plain values; an unknown name lists those there are."""
    settings = adversarial_objective(name, LINF).settings
    assert settings["method"] == name
    assert all(isinstance(value, bool | int | float | str) for value in settings.values())
    with pytest.raises(AttackError, match="trades, mart, free"):
        adversarial_objective("awp", LINF)


@pytest.mark.parametrize("name", ["trades", "mart", "free"])
def test_normalised_images_are_refused(name):
    """In training too, the ball is one of plain pixels."""
    images, labels = batch()
    with pytest.raises(ThreatModelError, match="normalisation"):
        adversarial_objective(name, LINF)(PerExample(), 4 * images - 2, labels)


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_labels_out_of_range_are_refused(name):
    """Not by an index error from inside torch."""
    images, labels = batch()
    with pytest.raises(AttackError, match="labels"):
        adversarial_objective(name, LINF)(PerExample(), images, labels + 4)
