"""Weights to start from, and what of a model is trained: files of all kinds, and their refusals."""

import hashlib
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from torch import nn

from secure_cnn import ModelError, Unlocking, archive
from secure_cnn.engine import training_mode
from secure_cnn.weights import Weights, freeze, is_sealed, read_weights, start_from

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer(post_quantum=False)


def model(classes=3):
    """A body with a statistic, and a head."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4), flat=nn.Flatten(),
            head=nn.Linear(144, classes),
        )
    )  # fmt: skip


def other():
    """The state of another draw of it."""
    return {name: t + 1 for name, t in model().state_dict().items()}


def to_safetensors(state, path):
    safetensors.torch.save_file(state, path)


def to_torch(state, path):
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {}}}, path)


def to_lightning(state, path):
    torch.save({"state_dict": {f"model.{name}": t for name, t in state.items()}}, path)


def to_parallel(state, path):
    torch.save({f"module._orig_mod.{name}": t for name, t in state.items()}, path)


def to_counted(state, path):
    torch.save({"epoch": torch.tensor(3), "state_dict": state}, path)


def to_sealed(state, path):
    archive.save(path, state, recipients=[ME.recipient], signer=SIGNER)


def to_training(state, path):
    archive.save_plain(path, {"step": 3, "model": state, "average": {"averages": state}})


WRITERS = [to_safetensors, to_torch, to_counted, to_lightning, to_parallel, to_sealed, to_training]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_weights_of_every_kind_of_file_arrive(tmp_path, write):
    """All of them, bit for bit, with the digest that `sha256sum` would tell."""
    path, state = tmp_path / "w", other()
    write(state, path)
    opens = Unlocking(identity=ME) if write is to_sealed else None
    weights = read_weights(path, unlocking=opens)
    target = model()
    report = start_from(target, weights)
    assert set(report.matched) == state.keys()
    assert (report.missing, report.unexpected, report.reshaped) == ((), (), {})
    assert all(torch.equal(target.state_dict()[name], state[name]) for name in state)
    assert weights.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert is_sealed(path) == (write is to_sealed)


def test_the_head_of_another_number_of_classes_is_drawn_anew_and_said(tmp_path):
    """With both shapes; what only one side has is said too."""
    state = other() | {"extra.weight": torch.zeros(1)}
    del state["norm.running_mean"]
    to_safetensors(state, tmp_path / "w")
    target = model(classes=5)
    drawn = target.head.weight.clone()
    report = start_from(target, read_weights(tmp_path / "w", unlocking=None))
    assert torch.equal(target.head.weight, drawn)
    assert torch.equal(target.conv.weight, state["conv.weight"])
    assert list(report.reshaped) == ["head.weight", "head.bias"]
    assert (report.missing, report.unexpected) == (("norm.running_mean",), ("extra.weight",))
    for words in ("6 of 9 tensors taken", "float32 [3, 144] there, float32 [5, 144] here"):
        assert words in report.words
    assert "not in the file and drawn anew: norm.running_mean" in report.words
    assert "in the file alone and left out: extra.weight" in report.words


def test_weights_of_a_kind_that_is_not_taken_are_named_with_it(tmp_path):
    """Not as if they were of another model: the names are the same."""
    state = {n: t.to(torch.float8_e4m3fn) for n, t in other().items() if t.is_floating_point()}
    to_safetensors(state, tmp_path / "w")
    with pytest.raises(
        ModelError, match=r"conv\.weight \(float8_e4m3fn \[4, 1, 3, 3\] there, float32"
    ):
        start_from(model(), read_weights(tmp_path / "w", unlocking=None))


def test_numbers_too_large_for_the_model_are_refused():
    """Finite in 64 bits, infinite in the model's 32; the model stays as it was drawn."""
    target = model()
    before = target.conv.bias.clone()
    weights = {"conv.bias": torch.full((4,), 1e300, dtype=torch.float64)}
    with pytest.raises(ModelError, match=r"conv\.bias of w .*float32"):
        start_from(target, Weights(file="w", digest="", tensors=weights))
    assert torch.equal(target.conv.bias, before)


def test_halves_become_floats_and_counters_stay_whole(tmp_path):
    """A smaller float is taken at its value; a number of another kind is not."""
    state = {n: t.half() if t.is_floating_point() else t for n, t in other().items()}
    state["norm.num_batches_tracked"] = torch.tensor(1.5)
    to_safetensors(state, tmp_path / "w")
    target = model()
    report = start_from(target, read_weights(tmp_path / "w", unlocking=None))
    assert list(report.reshaped) == ["norm.num_batches_tracked"]
    assert torch.equal(target.conv.weight, state["conv.weight"].float())


def test_a_prefix_is_kept_where_the_model_has_it_too():
    """Nothing is guessed where names agree as they are."""
    inner = nn.ModuleDict({"module": nn.Linear(1, 2)})
    state = {name: torch.ones_like(t) for name, t in inner.state_dict().items()}
    weights = read_like(state)
    start_from(inner, weights)
    assert torch.equal(inner["module"].weight, torch.ones(2, 1))


def read_like(state):
    """Weights as if they had been read."""
    return Weights(file="w", digest="0" * 64, tensors=state)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a.weight": torch.ones(2)}, "nothing in w fits the model: it has a.weight, the model"),
        ({"conv.weight": torch.ones(2)}, "nothing in w fits the model"),
        ({"conv.bias": torch.tensor([1, float("nan"), 1, 1])}, "finite numbers.*conv.bias of w"),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_changes(state, words):
    """Rather than a training from chance that believes it had a start."""
    target = model()
    before = {name: t.clone() for name, t in target.state_dict().items()}
    with pytest.raises(ModelError, match=words):
        start_from(target, read_like(state))
    assert all(torch.equal(before[n], t) for n, t in target.state_dict().items())


def test_files_that_hold_no_weights_are_refused(tmp_path):
    """Missing, without tensors, of code, sealed without a key, plain where a signer is demanded."""
    path = tmp_path / "w"
    with pytest.raises(ModelError, match="w: expected a file of weights: No such file"):
        read_weights(path, unlocking=None)
    archive.save_plain(path, {"step": 3, "model": {"lr": 0.1}})
    with pytest.raises(ModelError, match="named tensors of a model, got none"):
        read_weights(path, unlocking=None)
    torch.save(model(), path)
    with pytest.raises(archive.StateError, match="state_dict"):
        read_weights(path, unlocking=None)
    signed = Unlocking(identity=ME, trusted=[SIGNER.verifier])
    to_torch(other(), path)
    with pytest.raises(ModelError, match="plain file, which carries no signature"):
        read_weights(path, unlocking=signed)
    path.unlink()
    to_sealed(other(), path)
    assert read_weights(path, unlocking=signed).tensors
    with pytest.raises(ModelError, match="is sealed; give the identity"):
        read_weights(path, unlocking=None)
    stranger = archive.generate_signer(post_quantum=False).verifier
    with pytest.raises(archive.UntrustedSigner):
        read_weights(path, unlocking=Unlocking(identity=ME, trusted=[stranger]))


NAMES = {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("only", "frozen", "trained"),
    [
        ([], [], NAMES),
        (["head.*"], [], {"head.weight", "head.bias"}),
        (["head.*", "norm.*"], ["*.bias"], {"head.weight", "norm.weight"}),
        ([], ["conv.*"], NAMES - {"conv.weight", "conv.bias"}),
        (["*.weight"], ["c*", "n*"], {"head.weight"}),
    ],
)
def test_patterns_say_what_is_trained(only, frozen, trained):
    """What is not named by the first, or is by the second, is frozen and told."""
    target = model()
    told = freeze(target, train_only=only, freeze=frozen)
    assert {n for n, p in target.named_parameters() if p.requires_grad} == trained
    assert set(told) == NAMES - trained


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_only": ["haed.*"]}, "train_only: .*got haed.*there are .*head"),
        ({"freeze": ["head"]}, "freeze: expected a pattern .*there are head.bias"),
        ({"freeze": ["*"]}, "left to train, got none"),
        ({"train_only": ["head.*"], "freeze": ["*.weight", "*.bias"]}, "left to train, got none"),
    ],
)
def test_patterns_that_name_nothing_or_everything_are_refused(settings, words):
    """A typing error must not train what was to be kept."""
    with pytest.raises(ModelError, match=words):
        freeze(model(), **settings)


def test_a_tied_parameter_is_known_by_each_of_its_names():
    """Frozen under one name, it is frozen."""
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    freeze(tied, freeze=["b.weight"])
    assert not tied["a"].weight.requires_grad


def test_frozen_layers_keep_their_statistics():
    """In training mode too: what BatchNorm has seen is a part of what is frozen."""
    target = model()
    freeze(target, train_only=["head.*"])
    training_mode(target)
    before = target.norm.running_mean.clone()
    target(torch.randn(8, 1, 8, 8))
    assert torch.equal(target.norm.running_mean, before)
    assert target.head.training
    free = model()
    training_mode(free)
    free(torch.randn(8, 1, 8, 8))
    assert not torch.equal(free.norm.running_mean, before)
