"""Opacus' layers in the drop-in, against one example at a time; who is compatible is trained."""

import copy

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from opacus.layers.dp_rnn import RNNLinear
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

from privacy import PrivacyError, StepError, UnsupportedLayer
from privacy.opacus import PrivacyEngine

WORDS, FEATURES, HIDDEN, SAMPLES = 20, 4, 3, 12


def sentences() -> TensorDataset:
    """Words and a class for each sentence."""
    return TensorDataset(torch.randint(WORDS, (SAMPLES, 5)), torch.randint(2, (SAMPLES,)))


class Reader(nn.Module):
    """Embedding, a recurrent layer, and a class from its last output."""

    def __init__(self, layer, width=HIDDEN, *, packed=False):
        super().__init__()
        self.words, self.layer, self.classes = (
            nn.Embedding(WORDS, FEATURES),
            layer,
            nn.Linear(width, 2),
        )
        self.packed = packed

    def forward(self, words):
        inputs = self.words(words)
        if self.packed:
            lengths = 1 + words[:, 0] % 5
            inputs = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
            return self.classes(self.layer(inputs)[1][-1])
        if not self.layer.batch_first:
            inputs = inputs.transpose(0, 1)
        outputs, _ = self.layer(inputs)
        return self.classes(outputs.mean(1 if self.layer.batch_first else 0))


class Attentive(nn.Module):
    """Embedding, attention of Opacus, and a class from its mean."""

    def __init__(self):
        super().__init__()
        self.words, self.classes = nn.Embedding(WORDS, FEATURES), nn.Linear(FEATURES, 2)
        self.attention = DPMultiheadAttention(FEATURES, 2, batch_first=True)

    def forward(self, words):
        inputs = self.words(words)
        return self.classes(self.attention(inputs, inputs, inputs)[0].mean(1))


def private(model, dataset=None, *, noise=1e-9):
    """Optimizer, loader and the rest of a training that sees the whole data set in each step."""
    dataset = dataset or sentences()
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(dataset, batch_size=len(dataset)),
        noise_multiplier=noise,
        max_grad_norm=0.5,
    )


def one_by_one(model, words, labels) -> torch.Tensor:
    """The mean of the clipped gradients in one row, float64, one example at a time."""
    exact, total = copy.deepcopy(model).double(), 0
    for word, label in zip(words, labels, strict=True):
        loss = F.cross_entropy(exact(word[None]), label[None])
        gradients = torch.autograd.grad(loss, list(exact.parameters()))
        row = torch.cat([gradient.flatten() for gradient in gradients])
        total = total + row * min(1.0, 0.5 / float(row.norm()))
    return total / len(words)


LAYERS = {
    "rnn": lambda: Reader(DPRNN(FEATURES, HIDDEN, batch_first=True)),
    "rnn relu": lambda: Reader(DPRNN(FEATURES, HIDDEN, nonlinearity="relu")),
    "lstm": lambda: Reader(DPLSTM(FEATURES, HIDDEN, batch_first=True)),
    "lstm, time first": lambda: Reader(DPLSTM(FEATURES, HIDDEN)),
    "lstm, two layers, both ways": lambda: Reader(
        DPLSTM(FEATURES, HIDDEN, num_layers=2, bidirectional=True, batch_first=True), 2 * HIDDEN
    ),
    "gru": lambda: Reader(DPGRU(FEATURES, HIDDEN, batch_first=True)),
    "gru without bias": lambda: Reader(DPGRU(FEATURES, HIDDEN, bias=False, batch_first=True)),
    "attention": Attentive,
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_of_opacus_is_clipped_example_by_example(make):
    """As one example at a time in float64 says; a wrong sum of time steps would be far off."""
    model = make()
    assert PrivacyEngine().is_compatible(module=model)
    module, optimizer, loader = private(model)
    ((words, labels),) = loader
    wanted = one_by_one(model, words, labels)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    F.cross_entropy(module(words), labels).backward()
    optimizer.step()
    moved = before - nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(moved.double(), wanted, rtol=1e-4, atol=1e-6)
    assert wanted.norm() > 0.01


def test_the_linear_maps_in_a_cell_do_not_take_the_slow_path():
    """They are `nn.Linear` in all but name."""
    model = Reader(DPLSTM(FEATURES, HIDDEN, batch_first=True))
    _, optimizer, _ = private(model)
    installed = optimizer._prepared.installation
    rules = {name: type(rule).__name__ for name, rule in installed.rules.items()}
    assert sum(isinstance(layer, RNNLinear) for layer in installed.layers.values()) == 2
    assert "FallbackRule" not in rules.values()


def test_names_of_the_state_are_those_of_torch():
    """What Opacus' renaming is for: the trained layer goes into `nn.LSTM`."""
    model = Reader(DPLSTM(FEATURES, HIDDEN, batch_first=True))
    module, _, _ = private(model)
    plain = nn.LSTM(FEATURES, HIDDEN, batch_first=True)
    plain.load_state_dict(module.to_standard_module().layer.state_dict())
    inputs = torch.rand(2, 5, FEATURES)
    torch.testing.assert_close(plain(inputs)[0], model.layer(inputs)[0])


def test_packed_sequences_are_refused():
    """Their rows are not the examples."""
    words = torch.tensor([[1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [4, 5, 6, 7, 8]] * 4)
    data = TensorDataset(words, torch.arange(SAMPLES) % 2)
    with pytest.raises(UnsupportedLayer, match="rows"):
        private(Reader(DPGRU(FEATURES, HIDDEN, batch_first=True), packed=True), data)


# --- who is compatible ---------------------------------------------------------------------------


class _Once(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, images):
        return self.used(images)


def _frozen():
    return nn.Linear(4, 2).requires_grad_(False)


MODULES = {
    "linear": lambda: nn.Linear(4, 2),
    "frozen norm": lambda: nn.Sequential(
        nn.BatchNorm1d(4).eval().requires_grad_(False), nn.Linear(4, 2)
    ),
    "norm": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)),
    "eval mode": lambda: nn.Linear(4, 2).eval(),
    "all frozen": _frozen,
    "lazy": lambda: nn.Sequential(nn.LazyLinear(2)),
    "data parallel": lambda: nn.DataParallel(nn.Linear(4, 2)),
    "complex": lambda: nn.Linear(4, 2, dtype=torch.cfloat),
    "unused layer": _Once,
    "two outputs": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), DPGRU(2, 2, batch_first=True)),
    "mixing": lambda: nn.Sequential(nn.Linear(4, 2), nn.Softmax(0)),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_who_is_compatible_is_made_private_and_nobody_else(make):
    """With optimizer and loader the answer is that of `make_private`, and nothing is changed."""
    data = TensorDataset(torch.rand(16, 4), torch.randint(2, (16,)))
    model = make()
    given = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(data, batch_size=4),
    }
    engine = PrivacyEngine()
    said = engine.is_compatible(**given)
    assert not any("forward" in vars(layer) for layer in model.modules())
    refused = None
    try:
        engine.make_private(**given, noise_multiplier=1.0, max_grad_norm=1.0)
    except PrivacyError as error:
        refused = error
    assert said == (refused is None)
    if refused is not None:
        with pytest.raises(type(refused)):
            PrivacyEngine().validate(**given)


@pytest.mark.parametrize("name", ["lazy", "data parallel", "complex", "all frozen", "norm"])
def test_what_no_loader_would_change_is_seen_without_one(name):
    """By the module alone."""
    assert not PrivacyEngine().is_compatible(module=MODULES[name]())


def test_an_optimizer_that_does_not_fit_is_not_compatible():
    """Also without a loader."""
    model = nn.Linear(4, 2)
    other = torch.optim.SGD(nn.Linear(4, 2).parameters(), lr=0.1)
    assert not PrivacyEngine().is_compatible(module=model, optimizer=other)
    with pytest.raises(StepError, match="optimizer"):
        PrivacyEngine().validate(module=model, optimizer=other)


def test_the_module_that_opacus_makes_compatible_is_trained():
    """Its LSTM becomes a DPLSTM, which has its weights and trains here."""
    model = Reader(nn.LSTM(FEATURES, HIDDEN, batch_first=True))
    engine = PrivacyEngine()
    fixed = engine.get_compatible_module(model)
    words, labels = sentences().tensors
    torch.testing.assert_close(fixed(words), model(words))
    module, optimizer, loader = private(fixed)
    F.cross_entropy(module(words), labels)
    ((words, labels),) = loader
    F.cross_entropy(module(words), labels).backward()
    optimizer.step()
    assert optimizer.ledger.steps == 1
