"""Plain files of other tools become states; those that would run code do not."""

import collections

import pytest
import safetensors.torch
import torch

from secure_cnn import archive

ME = archive.generate_identity(post_quantum=False)


def test_a_safetensors_file_is_imported(tmp_path):
    """Another tool's tensors, sealed and opened again."""
    state = {"a.weight": torch.arange(6.0), "b": torch.tensor([1, 2], dtype=torch.int8)}
    safetensors.torch.save_file(state, tmp_path / "m", metadata={"format": "pt"})
    imported = archive.import_(tmp_path / "m")
    archive.save(tmp_path / "sealed", imported, recipients=[ME.recipient])
    loaded = archive.load(tmp_path / "sealed", identity=ME)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_checkpoint_is_imported(tmp_path, zipped):
    """Model, optimizer and numbers, from today's form of file and from that before 1.6."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    path = tmp_path / "m.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    archive.save(tmp_path / "sealed", archive.import_(path), recipients=[ME.recipient])
    loaded = archive.load(tmp_path / "sealed", identity=ME)
    assert loaded["epoch"] == 3
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    for name, value in state["model"].items():
        assert torch.equal(loaded["model"][name], value)


class Tied(torch.nn.Module):
    """The usual language model in small: its head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_names_that_save_model_left_out_come_back_tied(tmp_path):
    """All names of the model, the tied ones as one tensor; through a sealed file too."""
    model = Tied()
    safetensors.torch.save_model(model, tmp_path / "m", metadata={"format": "pt"})
    imported = archive.import_(tmp_path / "m")
    assert imported.keys() == model.state_dict().keys()
    assert imported["head.weight"] is imported["embedding.weight"]
    archive.save(tmp_path / "sealed", imported, recipients=[ME.recipient])
    loaded = archive.load(tmp_path / "sealed", identity=ME)
    other = Tied()
    other.load_state_dict(loaded)
    assert torch.equal(other.head.weight, model.head.weight)
    assert loaded["head.weight"] is loaded["embedding.weight"]


def test_other_notes_in_a_safetensors_file_name_no_tensors(tmp_path):
    """A note whose value is no tensor's name, or whose own name is one, changes nothing."""
    state = {"a": torch.zeros(2), "b": torch.ones(2)}
    notes = {"format": "pt", "b": "a", "empty": ""}
    safetensors.torch.save_file(state, tmp_path / "m", metadata=notes)
    found = archive.import_(tmp_path / "m")
    assert found.keys() == state.keys()
    assert found["b"].tolist() == [1, 1]


class Bomb:
    """Loading it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused(tmp_path, zipped):
    """The reader of torch builds no classes; nothing of the file is run."""
    ran = tmp_path / "ran"
    torch.save(
        {"w": torch.ones(1), "x": Bomb(ran)},
        tmp_path / "m",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(archive.StateError, match="state_dict"):
        archive.import_(tmp_path / "m")
    assert not ran.exists()


def test_what_is_no_state_is_refused(tmp_path):
    """A whole module, a sealed file, noise, a set, nothing and a folder: errors of ours."""
    path = tmp_path / "m"
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(archive.StateError):
        archive.import_(path)
    torch.save({"x": {1, 2}}, path)
    with pytest.raises(archive.StateError, match=r"state\.x"):
        archive.import_(path)
    torch.save(collections.OrderedDict(x=torch.ones(2).to_sparse()), path)
    with pytest.raises(archive.StateError):
        archive.import_(path)
    archive.save(path, {}, recipients=[ME.recipient], overwrite=True)
    with pytest.raises(archive.StateError, match="sealed"):
        archive.import_(path)
    for noise in (b"", b"PK\x03\x04noise", b"\x80\x02noise", b"noise"):
        path.write_bytes(noise)
        with pytest.raises(archive.StateError):
            archive.import_(path)
    for other in (tmp_path, tmp_path / "none"):
        with pytest.raises(archive.StorageError):
            archive.import_(other)
