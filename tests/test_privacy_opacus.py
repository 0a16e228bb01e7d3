"""The drop-in: an Opacus user's script runs with one import changed, and its promises are kept."""

import copy
import itertools
import math
import warnings

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus.utils.batch_memory_manager import BatchMemoryManager
from scipy import stats
from torch import nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import defenses
from privacy import (
    BudgetExceeded,
    GaussianSteps,
    PlanError,
    StepError,
    UnsupportedLayer,
    epsilon_of,
)
from privacy.opacus import PrivacyEngine
from secure_cnn.archive import load_plain, save_plain

SAMPLES, BATCH, CLASSES = 64, 16, 4
OPACUS_WARNINGS = pytest.mark.filterwarnings(
    "ignore:Secure RNG turned off:UserWarning",
    "ignore:Full backward hook is firing:UserWarning",
    "ignore:Optimal order is the largest alpha:UserWarning",
)


def data_of(count: int = SAMPLES, side: int = 8) -> TensorDataset:
    """Images on a noisy ground, with the quarter that names the class bright."""
    random = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, side, side, generator=random) * 0.3
    labels = torch.arange(count) % CLASSES
    half = side // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[:, half * row : half * (row + 1), half * column : half * (column + 1)] += 0.7
    return TensorDataset(images, labels)


def network(*, inplace: bool = True) -> nn.Module:
    """A small one; its in-place ReLU is more than Opacus' hooks admit."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=inplace),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )


def published_network() -> nn.Module:
    """The layers of the network in Opacus' MNIST example, for images of 28x28."""
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten()),
        *(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def published_epoch(model, loader, optimizer) -> None:
    """The loop of the same example."""
    model.train()
    criterion = nn.CrossEntropyLoss()
    for images, labels in loader:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()


def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """The share of right answers, in eval mode."""
    model.eval()
    with torch.no_grad():
        right = model(dataset.tensors[0]).argmax(1) == dataset.tensors[1]
    return right.float().mean().item()


def three(
    engine=None, *, model=None, dataset=None, batch_size=BATCH, lr=0.5, loader=None, **settings
):
    """Module, optimizer and loader made private; the noise is negligible if not said otherwise."""
    model = network() if model is None else model
    loader = DataLoader(dataset or data_of(), batch_size=batch_size) if loader is None else loader
    settings = {"noise_multiplier": 1e-6, "max_grad_norm": 1.0, **settings}
    return (engine or PrivacyEngine()).make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        data_loader=loader,
        **settings,
    )


def with_epsilon(
    engine, *, target_epsilon=2.0, epochs=2, model=None, dataset=None, batch_size=BATCH
):
    """The same for a budget."""
    model = network() if model is None else model
    return engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(dataset or data_of(), batch_size=batch_size),
        target_epsilon=target_epsilon,
        target_delta=1e-3,
        epochs=epochs,
        max_grad_norm=1.0,
    )


def parameters_of(model: nn.Module) -> torch.Tensor:
    """All of them in one row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def backward(model, batch) -> None:
    """Forward and backward on one batch."""
    F.cross_entropy(model(batch[0]), batch[1]).backward()


def never_drawn(loader: DataLoader, monkeypatch) -> None:
    """Makes every coin of the loader's sampling fall on the same side."""
    generator = loader.batch_sampler._generator
    monkeypatch.setattr(generator, "bernoulli", lambda n, p: torch.zeros(n, dtype=torch.bool))


@OPACUS_WARNINGS
@pytest.mark.parametrize(
    ("engine_class", "settings"),
    [
        (opacus.PrivacyEngine, {}),
        (PrivacyEngine, {}),
        (PrivacyEngine, {"grad_sample_mode": "hooks"}),
    ],
    ids=["opacus", "fused", "hooks"],
)
def test_the_published_example_runs_with_the_import_changed(engine_class, settings):
    """Network and loop of Opacus' MNIST example: it learns, and epsilon is reported."""
    dataset = data_of(256, side=28)
    engine = engine_class(secure_mode=False)
    model, optimizer, loader = three(
        engine,
        model=published_network(),
        dataset=dataset,
        batch_size=64,
        lr=0.5,
        noise_multiplier=0.7,
        **settings,
    )
    for _ in range(6):
        published_epoch(model, loader, optimizer)
    steps = GaussianSteps(noise_multiplier=0.7, sampling_rate=0.25, steps=24)
    assert engine.get_epsilon(1e-3) == pytest.approx(epsilon_of([steps], 1e-3), rel=1e-3)
    assert engine.accountant.history == [(0.7, 0.25, 24)]
    assert accuracy(model, dataset) > 0.7


@OPACUS_WARNINGS
@pytest.mark.parametrize("settings", [{}, {"grad_sample_mode": "hooks"}], ids=["fused", "hooks"])
def test_the_published_example_keeps_a_target(settings):
    """The loop's own epochs fit into the budget, and fill it."""
    dataset, model = data_of(200, side=28), published_network()
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(dataset, batch_size=64),
        target_epsilon=3.0,
        target_delta=1e-3,
        epochs=2,
        max_grad_norm=1.0,
        **settings,
    )
    for _ in range(2):
        published_epoch(model, loader, optimizer)
    assert 2.8 < engine.get_epsilon(1e-3) <= 3.0


@OPACUS_WARNINGS
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make", [network, published_network])
def test_the_gradient_is_that_of_opacus_hooks(make, reduction):
    """The whole data set as one batch and next to no noise: the same step, to 1e-5."""
    dataset = data_of(96, side=28 if make is published_network else 8)
    moved = []
    for mode in ("fused", "hooks"):
        model = network(inplace=False) if make is network else make()
        before = parameters_of(model)
        private, optimizer, loader = three(
            PrivacyEngine(),
            model=model,
            dataset=dataset,
            batch_size=len(dataset),
            lr=1.0,
            noise_multiplier=1e-9,
            max_grad_norm=0.3,
            loss_reduction=reduction,
            grad_sample_mode=mode,
        )
        ((images, labels),) = loader
        F.cross_entropy(private(images), labels, reduction=reduction).backward()
        optimizer.step()
        moved.append(parameters_of(model) - before)
    scale = moved[1].abs().max().item()
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-5 * max(1.0, scale))
    largest = 0.3 if reduction == "mean" else 0.3 * len(dataset)
    assert 0.1 * largest < moved[0].norm() <= largest * (1 + 1e-5)


def test_the_rate_is_exact_and_no_batch_is_lost():
    """391 batches stay 391, at batch / samples: Opacus gives 390 at another rate."""
    dataset = TensorDataset(torch.rand(50_000, 2), torch.zeros(50_000))
    engine = PrivacyEngine()
    _, optimizer, loader = three(
        engine, model=nn.Linear(2, 2), dataset=dataset, batch_size=128, noise_multiplier=1.0
    )
    assert len(loader) == 391
    assert optimizer.plan.event(1).sampling_rate == 128 / 50_000
    assert optimizer.expected_batch_size == 128
    drawn = [len(batch[0]) for batch in loader]
    assert len(drawn) == 391
    assert len(set(drawn)) > 10
    # Both sides of a normal approximation to the binomial; two percent off would be refused.
    deviation = math.sqrt(391 * 50_000 * (128 / 50_000))
    assert abs(sum(drawn) - 391 * 128) < 5 * deviation < 0.03 * 391 * 128


def test_a_short_last_batch_is_no_reason_to_exceed_the_target():
    """100 examples by 16 are 7 steps a pass: two passes are planned as 14, the 15th refused."""
    engine = PrivacyEngine()
    model, optimizer, loader = with_epsilon(engine, dataset=data_of(100))
    for _ in range(2):
        published_epoch(model, loader, optimizer)
    assert optimizer.ledger.steps == optimizer.plan.steps == 14
    spent, before = engine.get_epsilon(1e-3), parameters_of(model)
    assert 1.9 < spent <= 2.0
    batch = next(iter(loader))
    optimizer.zero_grad()
    backward(model, batch)
    with pytest.raises(BudgetExceeded, match="14 steps that target_epsilon=2 allows"):
        optimizer.step()
    assert engine.get_epsilon(1e-3) == spent
    assert torch.equal(parameters_of(model), before)


def test_an_empty_sample_is_a_step(monkeypatch):
    """One row of zeros comes, counts nothing, and is noised and written down like any other."""
    engine = PrivacyEngine()
    model, optimizer, loader = three(engine, noise_multiplier=1.0)
    never_drawn(loader, monkeypatch)
    before = parameters_of(model)
    for images, labels in loader:
        assert not images.any()
        assert images.shape == (1, 1, 8, 8)
        assert labels.tolist() == [0]
        optimizer.zero_grad()
        backward(model, (images, labels))
        optimizer.step()
    assert optimizer.ledger.steps == 4
    assert not torch.equal(parameters_of(model), before)


def test_an_empty_sample_has_no_gradient(monkeypatch):
    """Control: its row of filling is not in the sum."""
    model, optimizer, loader = three(noise_multiplier=1e-9)
    never_drawn(loader, monkeypatch)
    before = parameters_of(model)
    published_epoch(model, loader, optimizer)
    torch.testing.assert_close(parameters_of(model), before, rtol=0, atol=1e-7)


def test_batch_memory_manager_changes_memory_only():
    """Cut into batches of at most 5: the same step, one noised step a sample."""
    moved = []
    for most in (None, 5):
        engine = PrivacyEngine()
        model, optimizer, loader = three(engine, batch_size=SAMPLES, noise_multiplier=1e-9)
        before = parameters_of(model)
        if most is None:
            published_epoch(model, loader, optimizer)
        else:
            with BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=most, optimizer=optimizer
            ) as cut:
                published_epoch(model, cut, optimizer)
        assert optimizer.ledger.steps == 1
        moved.append(parameters_of(model) - before)
    assert moved[0].norm() > 0.01
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-6)


def test_batch_memory_manager_on_poisson_samples(monkeypatch):
    """Samples of every size, an empty one too; an abandoned pass leaves nothing behind."""
    engine = PrivacyEngine()
    model, optimizer, loader = three(engine, noise_multiplier=1.0)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=3, optimizer=optimizer
    ) as cut:
        backward(model, next(iter(cut)))
        optimizer.step()
        taken = optimizer.ledger.steps
        published_epoch(model, cut, optimizer)
        assert optimizer.ledger.steps == taken + 4
        never_drawn(loader, monkeypatch)
        published_epoch(model, cut, optimizer)
        assert optimizer.ledger.steps == taken + 8


def test_an_abandoned_sample_leaves_nothing_in_the_sum():
    """Half of a sample, then a new pass: the step is that of the new sample alone."""
    moved = []
    for abandoned in (False, True):
        model, optimizer, loader = three(batch_size=SAMPLES, noise_multiplier=1e-9)
        before = parameters_of(model)
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=SAMPLES // 2, optimizer=optimizer
        ) as cut:
            if abandoned:
                backward(model, next(iter(cut)))
                optimizer.step()
            published_epoch(model, cut, optimizer)
        moved.append(parameters_of(model) - before)
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-7)


def test_gradients_from_before_are_not_stepped():
    """Neither that of a frozen parameter nor that of a trainable one."""
    model = network()
    model[0].bias.requires_grad_(False)
    frozen = model[0].bias.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    private, optimizer, loader = three(model=model, batch_size=SAMPLES, lr=1.0)
    before = parameters_of(model)
    model[0].bias.grad = torch.ones_like(frozen)
    backward(private, next(iter(loader)))
    optimizer.step()
    assert torch.equal(model[0].bias, frozen)
    assert (parameters_of(model) - before).norm() <= 1 + 1e-4


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # torch, on one core
def test_workers_may_draw_ahead():
    """Two worker processes read; the steps are the same in number."""
    engine = PrivacyEngine()
    loader = DataLoader(data_of(), batch_size=BATCH, num_workers=2)
    model, optimizer, loader = three(engine, loader=loader, noise_multiplier=1.0)
    published_epoch(model, loader, optimizer)
    assert optimizer.ledger.steps == 4


def test_the_noise_has_its_deviation_and_ignores_seeds():
    """Gradients are zero: what moves is noise of sigma C / batch; five percent off is rejected."""
    moved = []
    for _ in range(2):
        model = nn.Linear(64, 500)
        private, optimizer, loader = three(
            model=nn.Sequential(nn.Flatten(), model),
            noise_multiplier=1.5,
            max_grad_norm=2.0,
            lr=1.0,
        )
        before = model.weight.detach().clone()
        for images, _ in loader:
            torch.manual_seed(0)
            (0 * private(images)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            moved.append((model.weight.detach() - before).double().flatten())
            before = model.weight.detach().clone()

    def p_value(wanted: float) -> float:
        law = stats.chi2(sum(map(len, moved)))
        square = float((torch.cat(moved) / wanted).square().sum())
        return min(law.cdf(square), law.sf(square))

    deviation = 1.5 * 2.0 / BATCH
    assert p_value(deviation) > 1e-4
    assert p_value(1.05 * deviation) < 1e-9
    assert p_value(deviation / 1.05) < 1e-9
    correlation = torch.corrcoef(torch.stack(moved)) - torch.eye(len(moved))
    assert correlation.abs().max() < 0.05


def test_every_example_is_clipped():
    """One example with a huge loss moves the parameters by at most C / batch."""
    moved = []
    for factor in (0.0, 1e4):
        model, optimizer, loader = three(batch_size=SAMPLES, noise_multiplier=1e-9, lr=1.0)
        before = parameters_of(model)
        ((images, labels),) = loader
        losses = F.cross_entropy(model(images), labels, reduction="none")
        weights = torch.ones(len(losses))
        weights[3] = factor
        (losses * weights).mean().backward()
        optimizer.step()
        moved.append(parameters_of(model) - before)
    distance = (moved[1] - moved[0]).norm().item()
    assert distance == pytest.approx(1.0 / SAMPLES, rel=1e-3)


def test_an_example_that_is_not_finite_counts_nothing():
    """It is counted and left out; the parameters stay finite."""
    model, optimizer, loader = three(batch_size=SAMPLES)
    ((images, labels),) = loader
    images = images.clone()
    images[5] = math.nan
    backward(model, (images, labels))
    optimizer.step()
    assert optimizer.non_finite == 1
    assert parameters_of(model).isfinite().all()


def test_attacks_in_between_change_nothing():
    """Gradients at the images, in training and in eval mode, by grad and by backward."""
    moved = []
    for attacked in (False, True):
        model, optimizer, loader = three(batch_size=SAMPLES, noise_multiplier=1e-9)
        before = parameters_of(model)
        ((images, labels),) = loader
        images = images.clamp(0, 1)
        if attacked:
            for mode in (True, False):
                model.train(mode)
                shifted = images.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(model(shifted), labels), shifted)
                backward(model, (shifted, labels))
                assert torch.allclose(shifted.grad, gradient)
                assert gradient.abs().max() > 0
            model.train()
            assert all(p.grad is None for p in model.parameters())
            threat = defenses.ThreatModel(norm="linf", eps=0.1)
            assert not torch.equal(defenses.attack("pgd", threat)(model, images, labels), images)
        optimizer.zero_grad()
        backward(model, (images, labels))
        optimizer.step()
        moved.append(parameters_of(model) - before)
    assert torch.allclose(moved[0], moved[1], atol=1e-7)


def test_two_forward_passes_may_share_one_backward():
    """A clean and a shifted pass of the same rows, as in TRADES: clipped as one gradient."""
    model, optimizer, loader = three(batch_size=SAMPLES, noise_multiplier=1e-9, lr=1.0)
    before = parameters_of(model)
    ((images, labels),) = loader
    clean, shifted = model(images), model(images * 0.9)
    (F.cross_entropy(clean, labels) + 50 * (clean - shifted).square().sum(1).mean()).backward()
    optimizer.step()
    assert 0 < (parameters_of(model) - before).norm() <= 1 + 1e-5


def test_more_than_one_backward_pass_is_refused():
    """On the same outputs, and on fresh ones: neither may count twice."""
    model, optimizer, loader = three()
    batch = next(iter(loader))
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(StepError, match="more than one backward pass"):
        optimizer.step()
    optimizer.zero_grad()
    backward(model, batch)
    backward(model, batch)
    with pytest.raises(StepError, match="more than one backward pass"):
        optimizer.step()
    assert optimizer.ledger.steps == 0
    for forget in (optimizer.zero_grad, model.zero_grad):
        forget()
        backward(model, batch)
    optimizer.step()
    assert optimizer.ledger.steps == 1


def test_zero_grad_between_forward_and_backward_is_harmless():
    """Many loops do it there."""
    model, optimizer, loader = three()
    images, labels = next(iter(loader))
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert optimizer.ledger.steps == 1


@pytest.mark.parametrize("depth", [1, 5])
def test_a_closure_that_steps_spends_no_more_than_the_target(depth):
    """Each of its steps counts; the one around it is refused where they were the last."""
    engine = PrivacyEngine()
    module, optimizer, loader = with_epsilon(engine, epochs=1)
    batches = (batch for _ in range(9) for batch in loader)

    def closure(left):
        if left:
            optimizer.step(lambda: closure(left - 1))
        images, labels = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(module(images), labels).backward()

    steps = optimizer.plan.steps
    for _ in range(steps - 1):
        optimizer.step(lambda: closure(0))
    with pytest.raises(BudgetExceeded, match="are spent"):
        optimizer.step(lambda: closure(depth))
    assert optimizer.ledger.steps == steps
    assert engine.get_epsilon(1e-3) <= 2.0


def test_the_original_optimizer_takes_no_step_of_its_own():
    """It would step on what is in `.grad`, uncounted; the plain module has it back."""
    module, optimizer, _ = three()
    with pytest.raises(StepError, match="beside the private step"):
        optimizer.original_optimizer.step()
    module.to_standard_module()
    optimizer.original_optimizer.step()


def test_a_closure_is_called_once():
    """As some training frameworks do."""
    model, optimizer, loader = three()
    batch, calls = next(iter(loader)), []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == optimizer.ledger.steps == 1


def _no_backward(model, optimizer, loader):
    next(iter(loader))


def _eval_mode(model, optimizer, loader):
    model.eval()
    backward(model, next(iter(loader)))


def _attack_only(model, optimizer, loader):
    images, labels = next(iter(loader))
    backward(model, (images.requires_grad_(), labels))


def _no_sample(model, optimizer, loader):
    backward(model, data_of().tensors)


def _same_sample_twice(model, optimizer, loader):
    batch = next(iter(loader))
    backward(model, batch)
    optimizer.step()
    optimizer.zero_grad()
    backward(model, batch)


def _skipped_sample(model, optimizer, loader):
    batches = iter(loader)
    next(batches)
    backward(model, next(batches))


def _other_rows(model, optimizer, loader):
    images, labels = next(iter(loader))
    backward(model, (images.repeat(2, 1, 1, 1), labels.repeat(2)))


def _penalty(model, optimizer, loader):
    images, labels = next(iter(loader))
    penalty = sum(p.square().sum() for p in model.parameters())
    (F.cross_entropy(model(images), labels) + penalty).backward()


def _unfrozen(model, optimizer, loader):
    backward(model, next(iter(loader)))
    model._module[0].bias.requires_grad_(False)


def _stale_forward(model, optimizer, loader):
    batches = iter(loader)
    batch = next(batches)
    loss, stale = (F.cross_entropy(model(batch[0]), batch[1]) for _ in range(2))
    loss.backward()
    optimizer.step()
    next(batches)
    stale.backward()


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (_no_backward, "no backward pass has reached"),
        (_eval_mode, "elsewhere|no backward pass has reached"),
        (_attack_only, "no backward pass has reached"),
        (_no_sample, "no sample was drawn"),
        (_same_sample_twice, "no sample was drawn"),
        (_skipped_sample, "2 batches were drawn for one"),
        (_other_rows, "one row an example"),
        (_penalty, "0.weight.*elsewhere than the outputs"),
        (_unfrozen, "0.bias"),
        (_stale_forward, "more than one backward pass"),
    ],
)
def test_a_loop_that_would_void_the_guarantee_is_refused(misuse, message):
    """Each is one error of ours, and no step is taken on it."""
    engine = PrivacyEngine()
    model, optimizer, loader = three(engine, batch_size=SAMPLES // 2)
    misuse(model, optimizer, loader)
    steps, before = optimizer.ledger.steps, parameters_of(model)
    with pytest.raises(StepError, match=message):
        optimizer.step()
    assert optimizer.ledger.steps == steps
    assert torch.equal(parameters_of(model), before)


class _Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(64, 4), nn.Linear(4, 4)

    def forward(self, images):
        return self.used(images.flatten(1))


class _Endless(IterableDataset):
    def __iter__(self):
        yield from data_of()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poisson_sampling": False}, "must not be accounted"),
        ({"clipping": "per_layer"}, 'expected "flat"'),
        ({"max_grad_norm": [1.0, 1.0]}, "expected one number"),
        ({"noise_generator": torch.Generator()}, "cryptographic always"),
        ({"batch_first": False}, "dimension 0"),
        ({"wrap_model": False}, "privacy.attach"),
        ({"loss_reduction": "none"}, '"mean" or "sum"'),
        ({"noise_multiplier": 0.0}, "noise_multiplier: expected a finite number > 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier: expected a finite number > 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: expected a finite number > 0"),
        ({"target_unclipped_quantile": 0.5}, "adaptive clipping"),
        ({"batch_size": SAMPLES + 1}, "the number of samples"),
        ({"loader": DataLoader(_Endless(), batch_size=4)}, "map-style"),
        ({"loader": DataLoader(data_of(), batch_size=None)}, "expected one with a batch_size"),
        (
            {"loader": DataLoader(data_of(), 4, sampler=WeightedRandomSampler([1.0] * 64, 64))},
            "Subset",
        ),
        (
            {"loader": DataLoader(data_of(), 4, sampler=RandomSampler(data_of(), num_samples=9))},
            "Su",
        ),
        (
            {
                "loader": DataLoader(
                    data_of(), 4, sampler=RandomSampler(data_of(), replacement=True)
                )
            },
            "Subset",
        ),
        ({"loader": DataLoader([{"image": torch.rand(8)}] * SAMPLES, 4)}, "forward="),
    ],
)
def test_what_the_fused_mode_does_not_offer_is_refused(settings, message):
    """With the reason, before anything was changed."""
    model = network()
    with pytest.raises(PlanError, match=message):
        three(model=model, **settings)
    assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize(
    ("model", "optimizer", "error", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, affine=False), nn.Linear(64, 4)), None,
         UnsupportedLayer, "1: BatchNorm1d mixes examples"),
        (network().eval(), None, UnsupportedLayer, "module.train()"),
        (network(), torch.optim.SGD(network().parameters()), StepError, "it lacks 0.weight"),
        (network(), torch.optim.LBFGS, StepError, "LBFGS"),
        (nn.Sequential(nn.Flatten(), nn.LSTM(64, 4)), None, UnsupportedLayer, "3 rows"),
        (_Unused(), None, UnsupportedLayer, "unused.weight"),
    ],
)  # fmt: skip
def test_a_model_or_optimizer_that_does_not_fit_is_refused(model, optimizer, error, message):
    """One typed error with the cure; the model stays plain."""
    if optimizer is None or isinstance(optimizer, type):
        optimizer = (optimizer or torch.optim.SGD)(model.parameters())
    with pytest.raises(error, match=message):
        PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(data_of(), BATCH),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_an_unknown_keyword_is_a_type_error():
    """Nothing is passed on unseen."""
    with pytest.raises(TypeError, match="max_gradnorm"):
        three(max_gradnorm=1.0)


def test_the_choice_of_examples_is_a_subset():
    """Control: what the refusal of samplers proposes works, and sets the rate."""
    _, optimizer, loader = three(dataset=Subset(data_of(), range(40)))
    assert optimizer.plan.event(1).sampling_rate == BATCH / 40
    assert len(loader) == 3


def test_one_engine_keeps_one_account():
    """A target admits no second training; two without one are added up."""
    engine = PrivacyEngine()
    with_epsilon(engine, target_epsilon=100.0)
    with pytest.raises(PlanError, match="budgets add up"):
        three(engine)
    engine = PrivacyEngine()
    for _ in range(2):
        model, optimizer, loader = three(engine, noise_multiplier=2.0)
        published_epoch(model, loader, optimizer)
    both = GaussianSteps(noise_multiplier=2.0, sampling_rate=0.25, steps=8)
    assert engine.get_epsilon(1e-3) == pytest.approx(epsilon_of([both], 1e-3), rel=1e-3)
    with pytest.raises(PlanError, match="budgets add up"):
        with_epsilon(engine)
    with pytest.raises(PlanError, match="gdp"):
        three(PrivacyEngine(accountant="gdp"))


@OPACUS_WARNINGS
def test_modes_are_not_mixed_on_one_engine():
    """Their accounts are kept apart, so the engine refuses to hold both."""
    engine = PrivacyEngine()
    three(engine)
    with pytest.raises(PlanError, match="another mode"):
        three(engine, grad_sample_mode="hooks")
    engine = PrivacyEngine()
    three(engine, grad_sample_mode="functorch")
    with pytest.raises(PlanError, match="one of Opacus' modes"):
        three(engine)


MODES = {
    "hooks": {"grad_sample_mode": "hooks"},
    "functorch": {"grad_sample_mode": "functorch"},
    "no wrapper": {"grad_sample_mode": "hooks", "wrap_model": False},
    "ghost": {"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss()},
}


@OPACUS_WARNINGS
@pytest.mark.parametrize(
    ("mode", "given"),
    [
        *itertools.product(MODES, ["the module", "a part of it"]),
        *itertools.product(["hooks", "functorch", "ghost"], ["the wrapper"]),
    ],
)
def test_a_module_with_hooks_of_opacus_is_refused(mode, given):
    """Before any pass, so the module stays as it was; the cure that is said works."""
    model = network(inplace=False)
    opacus_own = three(opacus.PrivacyEngine(), model=model, **MODES[mode])[0]
    module = {"the module": model, "a part of it": nn.Sequential(*model)}.get(given, opacus_own)
    before = [{**vars(layer)} for layer in model.modules()]
    written = [{**vars(parameter)} for parameter in model.parameters()]
    engine = PrivacyEngine()
    with pytest.raises(
        StepError, match=r"expected a plain module, got .* of Opacus .*call remove_hooks\(\)"
    ):
        three(engine, model=module)
    assert [vars(layer) for layer in model.modules()] == before
    assert [vars(parameter) for parameter in model.parameters()] == written
    opacus_own.remove_hooks()
    private, optimizer, loader = three(engine, model=model, noise_multiplier=1.0)
    published_epoch(private, loader, optimizer)
    assert optimizer.ledger.steps == 4


@OPACUS_WARNINGS
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
def test_a_module_in_a_fused_training_is_refused_by_opacus_modes(mode):
    """It would fail in the first step; after the cure it trains."""
    model = network(inplace=False)
    private, _, _ = three(model=model)
    for given in (model, private):
        engine = PrivacyEngine()
        with pytest.raises(StepError, match=r"^0: expected a plain module.*to_standard_module\(\)"):
            three(engine, model=given, grad_sample_mode=mode)
    plain = private.to_standard_module()
    three(engine, model=plain, grad_sample_mode=mode)


def test_after_the_training_has_ended_no_step_is_taken():
    """Also where the module has been made private anew."""
    model, optimizer, loader = three()
    batch = next(iter(loader))
    plain = model.to_standard_module()
    for again in (False, True):
        if again:
            three(model=plain)
        F.cross_entropy(plain(batch[0]), batch[1]).backward()
        with pytest.raises(StepError, match=r"^this training was detached: .*make_private"):
            optimizer.step()


def test_secure_mode_is_always_on():
    """It needs no further package and warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, loader = three(PrivacyEngine(secure_mode=True), noise_multiplier=1.0)
    published_epoch(model, loader, optimizer)
    assert optimizer.ledger.steps == 4


@OPACUS_WARNINGS
def test_opacus_modes_are_opacus_own(tmp_path):
    """Its classes, its four results for ghost, its adaptive settings, its checkpoints."""
    engine = PrivacyEngine()
    model, optimizer, loader = three(
        engine, model=network(inplace=False), grad_sample_mode="hooks", noise_multiplier=1.0
    )
    assert isinstance(model, opacus.GradSampleModule)
    assert isinstance(optimizer, opacus.optimizers.DPOptimizer)
    published_epoch(model, loader, optimizer)
    path = tmp_path / "opacus.pt"
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer)
    engine.load_checkpoint(path=path, module=model, optimizer=optimizer)
    assert len(three(grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss())) == 4
    _, optimizer, _ = three(
        grad_sample_mode="hooks",
        clipping="adaptive",
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2,
        max_clipbound=10.0,
        min_clipbound=0.1,
        unclipped_num_std=1.0,
    )
    assert optimizer.target_unclipped_quantile == 0.5


def test_a_pickled_checkpoint_is_refused(tmp_path):
    """With the cure; nothing is written."""
    engine = PrivacyEngine()
    model, optimizer, _ = three(engine)
    with pytest.raises(PlanError, match=r"optimizer\.state_dict\(\)"):
        engine.save_checkpoint(path=tmp_path / "m.pt", module=model, optimizer=optimizer)
    with pytest.raises(PlanError, match="pickle"):
        engine.load_checkpoint(path=tmp_path / "m.pt", module=model)
    assert list(tmp_path.iterdir()) == []


def test_a_training_resumes_with_its_ledger(tmp_path):
    """Through a file without pickle: weights, momentum, plan and epsilon; the budget is one."""
    engine = PrivacyEngine()
    model, optimizer, loader = with_epsilon(engine, target_epsilon=100.0)
    optimizer.param_groups[0]["momentum"] = 0.9
    published_epoch(model, loader, optimizer)
    state = {"module": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_plain(tmp_path / "run.safetensors", state)
    state = load_plain(tmp_path / "run.safetensors")
    resumed = PrivacyEngine()
    again, other, loader = with_epsilon(resumed, target_epsilon=100.0)
    again.load_state_dict(state["module"])
    other.load_state_dict(state["optimizer"])
    assert torch.equal(parameters_of(again), parameters_of(model))
    assert resumed.get_epsilon(1e-3) == engine.get_epsilon(1e-3) > 0
    assert len(other.state) == len(optimizer.state) > 0
    published_epoch(again, loader, other)
    assert resumed.get_epsilon(1e-3) <= 100.0
    with pytest.raises(BudgetExceeded):
        published_epoch(again, loader, other)
    with pytest.raises(PlanError, match="epsilon never falls"):
        other.load_state_dict(state["optimizer"])


def test_a_state_without_its_ledger_is_refused():
    """A plain optimizer's state, and one of another plan."""
    _, optimizer, _ = three()
    with pytest.raises(PlanError, match='under "privacy"'):
        optimizer.load_state_dict(optimizer.original_optimizer.state_dict())
    _, other, _ = three(noise_multiplier=3.0)
    with pytest.raises(PlanError, match="settings it was made with"):
        optimizer.load_state_dict(other.state_dict())


def test_a_schedule_of_the_learning_rate_works():
    """It takes the private optimizer for one, and moves the original's rate."""
    model, optimizer, loader = three(lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    published_epoch(model, loader, optimizer)
    schedule.step()
    assert optimizer.original_optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    with pytest.raises(StepError, match="cannot join"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_a_copy_and_the_standard_module_are_plain():
    """Their gradients are ordinary, and the private training knows nothing of them."""
    model, optimizer, loader = three()
    images, labels = next(iter(loader))
    copied = copy.deepcopy(model)
    backward(copied, (images, labels))
    assert all(p.grad is not None for p in copied.parameters())
    assert all(p.grad is None for p in model.parameters())
    plain = model.to_standard_module()
    backward(plain, (images, labels))
    assert all(p.grad is not None for p in plain.parameters())
    with pytest.raises(StepError, match=r"^this training was detached"):
        optimizer.step()
    three(model=plain)


def test_a_module_is_made_private_once():
    """Twice is refused, and names the cure."""
    model, _, _ = three()
    with pytest.raises(StepError, match="detach the earlier"):
        three(model=model._module)


def test_validation_sees_what_opacus_misses():
    """A BatchNorm without parameters passes Opacus' validator; it is found and replaced here."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten())
    assert opacus.validators.ModuleValidator.is_valid(model)
    engine = PrivacyEngine()
    assert not engine.is_compatible(module=model, optimizer=None, data_loader=None)
    with pytest.raises(UnsupportedLayer, match="1: BatchNorm2d"):
        engine.validate(module=model, optimizer=None, data_loader=None)
    assert engine.is_compatible(module=engine.get_compatible_module(model))
    assert isinstance(model[1], nn.BatchNorm2d)
    with pytest.raises(UnsupportedLayer, match="training mode"):
        engine.validate(module=nn.Linear(1, 1).eval())


def test_batch_norm_put_back_into_training_is_refused():
    """Frozen it is accepted; after model.train() neither the forward pass nor the step is."""
    frozen = nn.BatchNorm1d(64).eval().requires_grad_(False)
    model, optimizer, loader = three(model=nn.Sequential(nn.Flatten(), frozen, nn.Linear(64, 4)))
    backward(model, next(iter(loader)))
    optimizer.step()
    optimizer.zero_grad()
    batch = next(iter(loader))
    model.train()
    with pytest.raises(UnsupportedLayer, match="1: BatchNorm1d"):
        backward(model, batch)
    frozen.eval()
    backward(model, batch)
    frozen.train()
    with pytest.raises(UnsupportedLayer, match="1: BatchNorm1d"):
        optimizer.step()
