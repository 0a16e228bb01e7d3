"""Who comes from Opacus: what his script does there, it does here, or is told why not."""

import collections
import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from opacus import schedulers
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from privacy import BudgetExceeded, PlanError, StepError, UnsupportedLayer, accounting
from privacy.opacus import PrivacyEngine

SAMPLES, BATCH, DELTA = 64, 16, 1e-3
BUDGET = {"epochs": 2, "target_epsilon": 5.0, "target_delta": DELTA}


@pytest.fixture(autouse=True)
def by_rdp_alone(monkeypatch):
    """These tests ask what is charged, not how tightly: the slower accountant stays out."""
    accounting._tightest.cache_clear()
    monkeypatch.setattr(accounting, "_LARGEST_PRV_EPSILON", -1.0)
    yield
    accounting._tightest.cache_clear()


def data_of(count: int = SAMPLES) -> TensorDataset:
    """Four features, two classes."""
    return TensorDataset(torch.rand(count, 4), torch.arange(count) % 2)


def private(model=None, dataset=None, *, engine=None, batch_size=BATCH, collate=None, **settings):
    """Engine, model, optimizer and loader of a small training."""
    engine = engine or PrivacyEngine()
    model = nn.Linear(4, 2) if model is None else model
    loader = DataLoader(dataset or data_of(), batch_size=batch_size, collate_fn=collate)
    call = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **settings}
    make = engine.make_private_with_epsilon if "epochs" in call else engine.make_private
    if "epochs" in call:
        del call["noise_multiplier"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return engine, *make(module=model, optimizer=optimizer, data_loader=loader, **call)


def epoch(model, optimizer, loader) -> int:
    """One pass as Opacus' tutorials write it; how many batches came."""
    batches = 0
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        batches += 1
    return batches


# --- persons -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, BUDGET], ids=["make_private", "with_epsilon"])
def test_several_examples_of_a_person_are_warned_of(settings):
    """As `privacy.attach` does: the largest group, and what epsilon is for it."""
    data = data_of()
    data.groups = [0, 0, 0, *range(3, SAMPLES)]
    says = "groups: 1 of 62 persons have .* the largest group 3.* over the loader.*privacy.attach"
    with pytest.warns(UserWarning, match=says) as caught:
        private(dataset=data, **settings)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="groups: 1 of 30 persons"):
        private(dataset=Subset(data, range(32)), **settings)


@pytest.mark.parametrize("groups", [None, range(SAMPLES), "something else"])
def test_who_has_one_example_is_not_warned_of(groups):
    """Nor what is no list of ids."""
    data = data_of()
    data.groups = groups
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        private(dataset=data)


# --- errors --------------------------------------------------------------------------------------


def _batch_norm():
    private(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))


def _eval_mode():
    private(nn.Linear(4, 2).eval())


def _validate():
    PrivacyEngine().validate(module=nn.Sequential(nn.BatchNorm1d(4)))


class _HalfUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, images):
        return self.used(images)


def _unused():
    private(_HalfUsed())


def _thawed_between_steps():
    norm = nn.BatchNorm1d(4).eval().requires_grad_(False)
    _, model, _, loader = private(nn.Sequential(norm, nn.Linear(4, 2)))
    norm.train()
    model(next(iter(loader))[0])


def _thawed_before_the_step():
    norm = nn.BatchNorm1d(4).eval().requires_grad_(False)
    _, model, optimizer, loader = private(nn.Sequential(norm, nn.Linear(4, 2)))
    images, labels = next(iter(loader))
    F.cross_entropy(model(images), labels).backward()
    norm.train()
    optimizer.step()


@pytest.mark.parametrize(
    "refused",
    [_batch_norm, _eval_mode, _validate, _unused, _thawed_between_steps, _thawed_before_the_step],
)
def test_a_refused_module_is_caught_by_who_catches_opacus(refused):
    """With ours by who catches ours: the same error is both."""
    with pytest.raises(UnsupportedModuleError) as caught:
        refused()
    assert isinstance(caught.value, UnsupportedLayer)
    assert isinstance(caught.value, ValueError)


def _foreign_parameters():
    PrivacyEngine().make_private(
        module=nn.Linear(4, 2),
        optimizer=torch.optim.SGD(nn.Linear(4, 2).parameters(), lr=0.1),
        data_loader=DataLoader(data_of(), batch_size=BATCH),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


def _two_backward_passes():
    _, model, optimizer, loader = private()
    images, labels = next(iter(loader))
    for _ in range(2):
        F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def _no_backward_pass():
    _, _, optimizer, loader = private()
    next(iter(loader))
    optimizer.step()


@pytest.mark.parametrize("refused", [_foreign_parameters, _two_backward_passes, _no_backward_pass])
def test_what_opacus_answers_with_a_value_error_is_one(refused):
    """And ours too."""
    with pytest.raises(ValueError, match=r"optimizer|backward") as caught:
        refused()
    assert isinstance(caught.value, StepError)


# --- loaders -------------------------------------------------------------------------------------


def test_a_memory_managers_loader_is_as_long_as_its_batches():
    """Expected, as in Opacus: a pass is 4 samples of 16, in batches of 2."""
    _, model, optimizer, loader = private()
    assert len(loader) == 4
    manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer)
    with manager as cut:
        assert len(cut) == 32
        came = sum(epoch(model, optimizer, cut) for _ in range(5))
    # A pass has 4 binomial samples of 64 by 1/4, their halves rounded up: 33 batches, deviation
    # 3.5; five passes 165, deviation 8. Seven of those are exceeded by chance with 1e-11.
    assert 109 < came < 221
    assert optimizer.ledger.steps == 20


def test_the_sampler_says_what_opacus_says():
    """By class and by names; its numbers are those of the training."""
    _, _, _, loader = private()
    sampler = loader.batch_sampler
    assert isinstance(sampler, UniformWithReplacementSampler)
    assert (sampler.num_samples, sampler.sample_rate, sampler.steps) == (64, 0.25, 4)
    assert sampler.generator is None


@pytest.mark.parametrize("wrapped", [False, True], ids=["tensors", "lists of one"])
def test_a_loader_of_bare_tensors_trains(wrapped):
    """As an autoencoder's: no labels."""
    images = torch.rand(SAMPLES, 4)
    dataset = TensorDataset(images) if wrapped else list(images)
    _, model, optimizer, loader = private(nn.Linear(4, 4), dataset)
    for batch in loader:
        assert isinstance(batch, list if wrapped else torch.Tensor)
        images = batch[0] if wrapped else batch
        optimizer.zero_grad()
        (model(images) - images).square().mean(1).mean().backward()
        optimizer.step()
    assert optimizer.ledger.steps == 4


Pair = collections.namedtuple("Pair", "image label")


class Words(collections.UserDict):
    """A dictionary of a class of its own, as tokenizers give it."""


def _stacked(examples):
    return torch.stack([e[0] for e in examples]), torch.tensor([int(e[1]) for e in examples])


COLLATED = {
    "list": lambda e: list(_stacked(e)),
    "tuple": _stacked,
    "named tuple": lambda e: Pair(*_stacked(e)),
    "nested": lambda e: (_stacked(e)[0], {"label": _stacked(e)[1]}),
    "own dictionary": lambda e: (_stacked(e)[0], Words(label=_stacked(e)[1])),
    "tensor": lambda e: _stacked(e)[0],
}


def _shape_of(batch):
    if isinstance(batch, torch.Tensor):
        return batch.shape[1:], batch.dtype
    if isinstance(batch, dict | collections.UserDict):
        return type(batch), {key: _shape_of(value) for key, value in batch.items()}
    return type(batch), [_shape_of(value) for value in batch]


@pytest.mark.parametrize("collate", COLLATED.values(), ids=COLLATED)
def test_an_empty_sample_is_of_the_type_of_the_others(collate, monkeypatch):
    """Types, names and shapes, at every depth; of one row, whose values are nobody's."""
    _, _, _, loader = private(collate=collate, batch_size=SAMPLES)
    full = next(iter(loader))
    generator = loader.batch_sampler._generator
    monkeypatch.setattr(generator, "bernoulli", lambda n, p: torch.zeros(n, dtype=torch.bool))
    empty = next(iter(loader))
    assert _shape_of(empty) == _shape_of(full)
    first = empty if isinstance(empty, torch.Tensor) else empty[0]
    assert first.shape == (1, 4)
    assert not first.any()


def test_a_batch_of_which_no_empty_one_can_be_made_is_refused_before_the_first_step():
    """Not at the first empty sample, in the middle of a training."""
    with pytest.raises(PlanError, match=r"data_loader: expected tensors.*got str at \[1\]\[0\]"):
        private(collate=lambda e: (_stacked(e)[0], [str(label) for _, label in e]))


def test_a_batch_of_names_is_refused_with_the_cure():
    """Nobody knows which of them the module is given."""
    with pytest.raises(
        PlanError, match=r"dict, .*forward=lambda model, batch: model\(batch\['image"
    ):
        private(collate=_by_name)


def _mixed(examples):
    images, labels = default_collate(examples)
    return (images + images.roll(1, 0)) / 2, labels


def _reordered(examples):
    return default_collate(sorted(examples, key=lambda each: float(each[0].sum())))


def _fewer(examples):
    return default_collate(examples[:-1] or examples)


def _padded(examples):
    """To the longest of sequences."""
    images = nn.utils.rnn.pad_sequence([image for image, _ in examples], batch_first=True)
    return images, torch.tensor([label for _, label in examples])


class _MeanOfRealPositions(nn.Module):
    """What is zero is filling; a mean over that, too, is refused (`test_privacy_padding.py`)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(4, 3)

    def forward(self, positions):
        real = positions.any(2, keepdim=True)
        return (self.features(positions).tanh() * real).sum(1) / real.sum(1).clamp(min=1)


class Whole(TensorDataset):
    """It could be read whole, past its collate_fn; a DataLoader reads one example after another."""

    batch_by_indices = True

    def batch(self, indices):
        return tuple(each[indices] for each in self.tensors)


NOT_APART = {
    "mixup": (_mixed, "it mixes examples"),
    "sorted": (_reordered, "in another order"),
    "dropped": (_fewer, "expected 6 rows in every tensor"),
}


@pytest.mark.parametrize("kind", [TensorDataset, Whole])
@pytest.mark.parametrize(("collate", "says"), NOT_APART.values(), ids=NOT_APART)
def test_a_collate_fn_whose_rows_are_not_its_examples_is_refused(collate, says, kind):
    """Of the loader before the first step, and when it is written later; the training goes on."""
    dataset = kind(*data_of().tensors)
    with pytest.raises(PlanError, match=says):
        private(dataset=dataset, collate=collate)
    _, model, optimizer, loader = private(dataset=dataset)
    with pytest.raises(PlanError, match=says):
        loader.collate_fn = collate
    epoch(model, optimizer, loader)
    assert optimizer.ledger.steps == 4


def test_a_collate_fn_that_keeps_examples_apart_trains():
    """Padding, of the loader and written later; and the default, written back."""
    sequences = [(torch.rand(1 + i % 3, 4), i % 2) for i in range(SAMPLES)]
    net = nn.Sequential(_MeanOfRealPositions(), nn.Linear(3, 2))
    _, model, optimizer, loader = private(net, sequences, collate=_padded)
    epoch(model, optimizer, loader)
    loader.collate_fn = lambda examples: _padded(examples)
    epoch(model, optimizer, loader)
    assert optimizer.ledger.steps == 8
    _, model, optimizer, loader = private()
    loader.collate_fn = default_collate
    epoch(model, optimizer, loader)
    assert optimizer.ledger.steps == 4


def _by_name(examples):
    return dict(zip(("image", "label"), _stacked(examples), strict=True))


def test_a_batch_of_names_trains_where_it_is_said_how():
    """The cure, literally."""
    _, model, optimizer, loader = private(
        collate=_by_name, forward=lambda model, batch: model(batch["image"])
    )
    for batch in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(batch["image"]), batch["label"]).backward()
        optimizer.step()
    assert optimizer.ledger.steps == 4
    with pytest.raises(PlanError, match="forward: Opacus' own modes"):
        private(forward=lambda model, batch: model(batch), grad_sample_mode="hooks")


class TwoHeads(nn.Module):
    """Two inputs, and two outputs in a structure."""

    def __init__(self, structure):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(5, 1)
        self.structure = structure

    def forward(self, images, more):
        hidden = self.body(torch.cat([images, more], 1)).tanh()
        return self.structure(self.first(hidden), self.second(hidden))


STRUCTURES = {
    "tuple": (lambda a, b: (a, b), lambda outputs: outputs),
    "dictionary": (
        lambda a, b: {"logits": a, "value": b},
        lambda outputs: (outputs["logits"], outputs["value"]),
    ),
    "nested": (lambda a, b: (a, [b, a.argmax(1)]), lambda outputs: (outputs[0], outputs[1][0])),
}


@pytest.mark.parametrize(("structure", "parts"), STRUCTURES.values(), ids=STRUCTURES)
def test_two_inputs_and_two_outputs_are_clipped_together(structure, parts):
    """One gradient an example, as one example at a time in float64 says."""
    rows = TensorDataset(torch.rand(12, 4), torch.rand(12, 2), torch.arange(12) % 2)
    net = TwoHeads(structure)

    def loss(outputs, labels):
        logits, value = parts(outputs)
        return F.cross_entropy(logits, labels) + 3 * value.square().sum(1).mean()

    exact, wanted = copy.deepcopy(net).double(), 0.0
    for image, more, label in rows:
        outputs = exact(image[None].double(), more[None].double())
        gradients = torch.autograd.grad(loss(outputs, label[None]), list(exact.parameters()))
        row = torch.cat([gradient.flatten() for gradient in gradients])
        wanted = wanted + row * min(1.0, 0.3 / float(row.norm())) / 12
    before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    _, model, optimizer, loader = private(
        net, rows, batch_size=12, noise_multiplier=1e-9, max_grad_norm=0.3
    )
    ((images, more, labels),) = loader
    loss(model(images, more), labels).backward()
    optimizer.step()
    moved = 10 * (before - nn.utils.parameters_to_vector(net.parameters()).detach())
    torch.testing.assert_close(moved.double(), wanted, rtol=1e-4, atol=1e-5)


def test_outputs_that_are_no_rows_are_refused():
    """With what was expected."""
    with pytest.raises(UnsupportedLayer, match="rows"):
        private(nn.Sequential(nn.Linear(4, 2), nn.Flatten(0)))


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_the_loader_of_an_ended_training_says_so(cut):
    """Its samples belong to steps that nobody takes; also in the middle of a pass."""
    _, model, optimizer, loader = private()
    if cut:
        loader = BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=2, optimizer=optimizer
        ).__enter__()
    batches = iter(loader)
    next(batches)
    model.to_standard_module()
    for again in (batches, iter(loader)):
        with pytest.raises(StepError, match=r"this training was detached.*make_private"):
            list(again)


# --- optimizer and account -----------------------------------------------------------------------


def test_an_accountant_of_ones_own_counts_by_its_hook():
    """`get_optimizer_hook_fn` of Opacus reads the optimizer; each sample is one accumulation."""
    _, model, optimizer, loader = private()
    own = RDPAccountant()
    optimizer.attach_step_hook(own.get_optimizer_hook_fn(sample_rate=0.25))
    assert optimizer.accumulated_iterations == 1
    epoch(model, optimizer, loader)
    assert own.history == [(1.0, 0.25, 4)]


def test_the_hook_of_the_engines_own_account_charges_nothing_twice():
    """Opacus' scripts attach it by hand; the steps of this engine are charged already."""
    engine, model, optimizer, loader = private()
    optimizer.attach_step_hook(engine.accountant.get_optimizer_hook_fn(sample_rate=0.25))
    epoch(model, optimizer, loader)
    assert engine.accountant.history == [(1.0, 0.25, 4)]


def test_the_hook_of_an_account_charges_the_steps_of_others():
    """Control: another optimizer's steps are charged, also on an account that is an engine's."""
    engine = PrivacyEngine()
    _, model, optimizer, loader = private()
    optimizer.attach_step_hook(engine.accountant.get_optimizer_hook_fn(sample_rate=0.25))
    epoch(model, optimizer, loader)
    assert engine.accountant.history == [(1.0, 0.25, 4)]
    assert isinstance(engine.accountant, PRVAccountant)


def test_a_falling_noise_under_a_target_is_followed_until_the_budget_is_spent():
    """Charged step by step: fewer steps than planned, and never more than the target."""
    engine, model, optimizer, loader = private(
        target_epsilon=3.0, target_delta=DELTA, epochs=6, engine=PrivacyEngine()
    )
    schedule = schedulers.ExponentialNoise(optimizer, gamma=0.6)

    def train():
        for _ in range(6):
            epoch(model, optimizer, loader)
            schedule.step()

    with pytest.raises(BudgetExceeded, match="target_epsilon=3"):
        train()
    assert 4 < optimizer.ledger.steps < optimizer.plan.steps == 24
    assert 2.0 < engine.get_epsilon(DELTA) <= 3.0
    noises = [noise for noise, _, _ in engine.accountant.history]
    assert noises == sorted(noises, reverse=True)
    assert len(noises) > 1
    # The next step would have been too much: the noise of now, once more.
    noise = optimizer.noise_multiplier
    engine.accountant.history.append((noise, 0.25, 1))
    assert engine.get_epsilon(DELTA) > 3.0


def test_a_noise_written_low_under_a_target_buys_no_step():
    """Next to no noise: one step alone is more than the budget."""
    engine, model, optimizer, loader = private(target_epsilon=3.0, target_delta=DELTA, epochs=6)
    optimizer.noise_multiplier = 1e-3
    with pytest.raises(BudgetExceeded):
        epoch(model, optimizer, loader)
    assert engine.get_epsilon(DELTA) == 0
    optimizer.noise_multiplier = optimizer.plan.event().noise_multiplier
    epoch(model, optimizer, loader)
    assert 0 < engine.get_epsilon(DELTA) <= 3.0


def test_an_engine_shows_what_it_is():
    """Its settings, and what was made private with it."""
    engine = PrivacyEngine(accountant="rdp")
    assert repr(engine) == "PrivacyEngine(accountant='rdp', secure_mode=False, ledger=None)"
    _, model, optimizer, loader = private(engine=engine)
    epoch(model, optimizer, loader)
    assert math.isfinite(engine.get_epsilon(DELTA))
    assert repr(engine).startswith("PrivacyEngine(")
