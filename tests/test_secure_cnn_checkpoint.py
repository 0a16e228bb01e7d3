"""Checkpoints: what is written is read back whole, and everything else is refused by name."""

import os
import stat

import pytest
import safetensors.torch
import torch
from torch import nn

from secure_cnn import Architecture, ModelError, RunError, archive
from secure_cnn.checkpoint import (
    Sealing,
    Unlocking,
    read_model,
    read_state,
    write_model,
    write_state,
)

CLASSES = ("cat", "dog", "bär")
CLAIMS = {"accuracy": 0.5, "data": {"name": "pets", "train": 7}, "attacks": ["pgd"]}
IDENTITY, SIGNER = archive.generate_identity(), archive.generate_signer()
SEALING = Sealing(recipients=(IDENTITY.recipient,), signer=SIGNER)
UNLOCKING = Unlocking(identity=IDENTITY, trusted=[SIGNER.verifier])
WAYS = {"plain": (None, None), "sealed": (SEALING, UNLOCKING)}


def architecture(name="compact"):
    """A small one of the named architectures."""
    return Architecture(model=name, channels=1, height=8, width=8, classes=CLASSES)


@pytest.fixture(params=WAYS)
def way(request):
    """How to seal and unlock: not at all, or both."""
    return WAYS[request.param]


@pytest.mark.parametrize("name", ["compact", "resnet20"])
def test_a_model_comes_back_bit_for_bit(tmp_path, way, name):
    """Weights, architecture and claims; in evaluation mode, and with the same outputs."""
    sealing, unlocking = way
    model = architecture(name).build(generator_seed=3).to(memory_format=torch.channels_last)
    path = tmp_path / "model"
    write_model(path, model, architecture(name), claims=CLAIMS, sealing=sealing)
    loaded = read_model(path, unlocking=unlocking)
    assert loaded.architecture == architecture(name)
    assert {k: v for k, v in loaded.claims.items() if k != "architecture"} == CLAIMS
    assert not loaded.model.training
    assert loaded.model.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value)


def test_other_tools_read_the_tensors(tmp_path):
    """A plain model is a safetensors file of the state dict under its own names, for its owner."""
    model, path = architecture().build(), tmp_path / "model.safetensors"
    write_model(path, model, architecture(), claims=CLAIMS, sealing=None)
    tensors = safetensors.torch.load_file(path)
    assert tensors.keys() == model.state_dict().keys()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    write_model(tmp_path / "model.sealed", model, architecture(), claims=CLAIMS, sealing=SEALING)
    archive.decrypt(tmp_path / "model.sealed", tmp_path / "opened", identity=IDENTITY)
    assert safetensors.torch.load_file(tmp_path / "opened").keys() == tensors.keys()


def test_a_file_is_replaced_only_on_request(tmp_path, way):
    """Nothing changes without it, and nothing is left beside the file."""
    sealing, unlocking = way
    path, first = tmp_path / "model", architecture().build()
    write_model(path, first, architecture(), claims={"n": 1}, sealing=sealing)
    with pytest.raises(archive.StorageError, match="already there"):
        write_model(path, first, architecture(), claims={"n": 2}, sealing=sealing)
    assert read_model(path, unlocking=unlocking).claims["n"] == 1
    write_model(path, first, architecture(), claims={"n": 2}, sealing=sealing, overwrite=True)
    assert read_model(path, unlocking=unlocking).claims["n"] == 2
    assert list(tmp_path.iterdir()) == [path]


def test_plain_and_sealed_are_not_taken_for_each_other(tmp_path):
    """In neither direction: a key asks for a sealed file, no key for a plain one."""
    model = architecture().build()
    write_model(tmp_path / "plain", model, architecture(), claims={}, sealing=None)
    write_model(tmp_path / "sealed", model, architecture(), claims={}, sealing=SEALING)
    with pytest.raises(archive.NotSealed):
        read_model(tmp_path / "plain", unlocking=UNLOCKING)
    with pytest.raises(archive.StateError, match=r"sealed: is sealed; .*identity or pass"):
        read_model(tmp_path / "sealed", unlocking=None)


def test_a_signature_that_was_demanded_must_be_there(tmp_path):
    """Unsigned, or signed by another, is refused before anything is opened."""
    unsigned = Sealing(recipients=(IDENTITY.recipient,))
    write_model(
        tmp_path / "model", architecture().build(), architecture(), claims={}, sealing=unsigned
    )
    read_model(tmp_path / "model", unlocking=Unlocking(identity=IDENTITY))
    with pytest.raises(archive.UntrustedSigner):
        read_model(tmp_path / "model", unlocking=UNLOCKING)


def test_a_file_that_is_exchanged_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """Claims and weights come from one file, even where somebody puts another in its place."""
    model, inner = architecture().build(), archive.inspect
    for name, accuracy in (("model", 0.9), ("other", 0.1)):
        write_model(
            tmp_path / name, model, architecture(), claims={"accuracy": accuracy}, sealing=SEALING
        )

    def inspect(path):
        info = inner(path)
        (tmp_path / "other").replace(path)
        return info

    monkeypatch.setattr(archive, "inspect", inspect)
    with pytest.raises(archive.ClaimMismatch):
        read_model(tmp_path / "model", unlocking=UNLOCKING)


def test_what_is_no_model_of_ours_is_refused(tmp_path, way):
    """A training under way; for plain files, another tool's tensors too."""
    sealing, unlocking = way
    write_state(tmp_path / "training", {"step": 3, "model": {}}, sealing=sealing)
    with pytest.raises(ModelError, match=r"training.*expected a model of ours"):
        read_model(tmp_path / "training", unlocking=unlocking)
    if sealing is None:
        safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "other")
        with pytest.raises(ModelError, match="other: expected a model of ours"):
            read_model(tmp_path / "other", unlocking=None)
        (tmp_path / "text").write_text("no tensors at all")
        with pytest.raises(archive.StateError):
            read_model(tmp_path / "text", unlocking=None)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "lenet"},
        {"classes": ["one"]},
        {"height": 10**9},
        {"channels": "1"},
        {"extra": 1},
    ],
)
def test_a_strangers_architecture_is_checked(tmp_path, change):
    """Names, types and sizes in the claims decide what is built; none is believed."""
    told = {**architecture().to_dict(), **change}
    state = dict(architecture().build().state_dict())
    archive.save(
        tmp_path / "m", state, recipients=[IDENTITY.recipient], claims={"architecture": told}
    )
    with pytest.raises(ModelError):
        read_model(tmp_path / "m", unlocking=Unlocking(identity=IDENTITY))


def test_weights_of_another_model_are_refused_by_name(tmp_path, way):
    """A tensor that is missing, one too many, one of another shape: each is named."""
    sealing, unlocking = way
    tensors = dict(architecture().build().state_dict())
    reshaped, missing = list(tensors)[-2:]
    del tensors[missing]

    class Spoiled(nn.Module):
        def state_dict(self):
            return {**tensors, reshaped: torch.ones(1, 1), "stranger": torch.ones(1)}

    write_model(tmp_path / "m", Spoiled(), architecture(), claims={}, sealing=sealing)
    with pytest.raises(ModelError) as caught:
        read_model(tmp_path / "m", unlocking=unlocking)
    for name in (reshaped, missing, "stranger"):
        assert name in str(caught.value)


def test_a_training_state_comes_back_exactly(tmp_path, way):
    """Tensors, numbers, texts and an optimizer's integer keys; each save replaces the last."""
    sealing, unlocking = way
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "step": 7,
        "settings": {"out": "run", "epsilon": None, "rate": 0.1},
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "generator": torch.Generator().manual_seed(1).get_state(),
    }
    write_state(tmp_path / "training", {"step": 6}, sealing=sealing)
    write_state(tmp_path / "training", state, sealing=sealing)
    again = read_state(tmp_path / "training", unlocking=unlocking)
    assert again["step"] == 7
    assert again["settings"] == state["settings"]
    assert torch.equal(again["generator"], state["generator"])
    other = torch.optim.AdamW(nn.Linear(3, 2).parameters())
    other.load_state_dict(again["optimizer"])
    for key, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(other.state_dict()["state"][key][name], value)
    assert list(tmp_path.iterdir()) == [tmp_path / "training"]


def test_a_save_that_fails_leaves_the_last_one(tmp_path, way):
    """A state that cannot be written is refused with its path; the file before is whole."""
    sealing, unlocking = way
    path = tmp_path / "training"
    write_state(path, {"step": 6}, sealing=sealing)
    with pytest.raises(archive.StateError, match="objective"):
        write_state(path, {"step": 7, "objective": object()}, sealing=sealing)
    assert read_state(path, unlocking=unlocking) == {"step": 6}
    assert list(tmp_path.iterdir()) == [path]


def test_sealing_to_nobody_is_refused():
    """Nobody could open the file again."""
    with pytest.raises(RunError, match="at least one recipient"):
        Sealing(recipients=())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sealing(recipients=IDENTITY.recipient), "recipients: .*put it in a list"),
        (lambda: Sealing(recipients=[IDENTITY]), r"recipients\[0\]: .*give identity.recipient"),
        (lambda: Sealing(recipients=[1]), r"recipients\[0\]: expected .*got int"),
        (
            lambda: Sealing(recipients=[IDENTITY.recipient], signer=SIGNER.verifier),
            "signer: .*give the Signer",
        ),
        (lambda: Unlocking(identity=IDENTITY.recipient), "identity: .*opens nothing"),
        (lambda: Unlocking(identity=None), "identity: expected .*got NoneType"),
        (lambda: Unlocking(identity=IDENTITY, trusted=SIGNER.verifier), "trusted: .*in a list"),
        (lambda: Unlocking(identity=IDENTITY, trusted=[SIGNER]), "give signer.verifier"),
    ],
)
def test_another_key_than_is_needed_is_refused_when_it_is_given(make, message):
    """Not hours later, when the first checkpoint is written."""
    with pytest.raises(archive.InvalidKey, match=message):
        make()


def test_recipients_cannot_be_taken_away_later():
    """A list that the caller goes on with is not the one that counts."""
    who, whose = [IDENTITY.recipient], [SIGNER.verifier]
    sealing, unlocking = Sealing(recipients=who), Unlocking(identity=IDENTITY, trusted=whose)
    who.clear()
    whose.clear()
    assert sealing.recipients == (IDENTITY.recipient,)
    assert unlocking.trusted == (SIGNER.verifier,)


def test_what_is_no_sealing_and_no_unlocking_is_refused(tmp_path):
    """A key alone, or a list of them: said with what to give; nothing is written."""
    path = tmp_path / "model"
    with pytest.raises(RunError, match=r"sealing: .*got list; give Sealing\(recipients=\[...\]\)"):
        write_model(
            path, architecture().build(), architecture(), claims={}, sealing=[IDENTITY.recipient]
        )
    with pytest.raises(RunError, match=r"unlocking: .*got Identity; give Unlocking\(identity"):
        read_model(path, unlocking=IDENTITY)
    assert not path.exists()


def test_no_secret_shows_in_a_repr():
    """Neither how to seal nor how to unlock prints a key."""
    text = repr(SEALING) + repr(UNLOCKING)
    assert IDENTITY.to_text() not in text
    assert SIGNER.to_text() not in text
    assert "secret" not in text
