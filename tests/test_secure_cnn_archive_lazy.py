"""One tensor at a time: the right bytes, the segments that hold them and no others, all checked."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
from forging import Parts, forge
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_cnn import archive
from secure_cnn.archive.format.payload import Payload, encrypt_file
from secure_cnn.archive.format.stream import Layout, create_stream
from secure_cnn.archive.format.tensors import Pieces

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()
TRUSTED = [SIGNER.verifier]


def seal(path, state, **settings):
    """A file of small segments."""
    settings = {"recipients": [ME.recipient], "signer": SIGNER, **settings}
    archive.save(path, state, segment_length=4096, **settings)
    return path


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 9000), st.data())
def test_any_range_is_the_slice_of_the_whole(tmp_path_factory, length, data):
    """Reading from here to there gives these bytes, at every edge of a segment."""
    plain = bytes(i * 31 % 251 for i in range(length))
    floe = create_stream(bytes(32), b"", 1000)
    layout = Layout(offset=0, segment_length=1000, plaintext_length=length)
    start = data.draw(st.integers(0, length))
    size = data.draw(st.integers(0 if start == 0 else min(1, length - start), length - start))
    if start == length and length:
        return
    with open(tmp_path_factory.mktemp("x") / "x", "w+b") as file:
        leaves = encrypt_file(file.fileno(), layout, floe, Pieces([memoryview(plain)]), hashed=True)
        target = bytearray(size)
        Payload(file.fileno(), layout, floe, leaves).read_into(memoryview(target), start)
    assert bytes(target) == plain[start : start + size]


STATES = {
    "flat": {f"t{i}": torch.arange(i * 100).float() for i in range(9)},
    "tree": {"a": [torch.ones(3), {"b": torch.zeros(2000)}], "c": (torch.tensor(5),), "d": None},
    "odd": {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(True),
        "half": torch.arange(7, dtype=torch.bfloat16),
        "strided": torch.arange(5000).reshape(50, 100).t(),
    },
}


@pytest.mark.parametrize("name", STATES)
def test_each_tensor_is_what_load_gives(tmp_path, name):
    """Names, shapes, dtypes and every bit, of flat and nested states."""
    path = seal(tmp_path / "a", STATES[name])
    archive.decrypt(path, tmp_path / "plain", identity=ME)
    whole = safetensors.torch.load_file(tmp_path / "plain")
    with archive.open_lazy(path, identity=ME, trusted=TRUSTED) as file:
        assert set(file.names) == set(whole)
        for tensor in file.names:
            assert file.shape(tensor) == whole[tensor].shape
            assert file.dtype(tensor) == whole[tensor].dtype
            assert torch.equal(file.tensor(tensor), whole[tensor])
    some = list(whole)[::2]
    loaded = archive.load(path, identity=ME, only=some)
    assert list(loaded) == some
    assert all(torch.equal(loaded[tensor], whole[tensor]) for tensor in some)


def test_tied_tensors_are_found_under_each_of_their_names(tmp_path):
    """A state dict's key names its tensor, whether it was stored under it or under its twin's."""
    weight = torch.arange(10.0)
    path = seal(tmp_path / "a", {"embed.weight": weight, "head": {"weight": weight}})
    with archive.open_lazy(path, identity=ME) as file:
        assert file.names == ("embed.weight", "head.weight")
        assert torch.equal(file.tensor("head.weight"), weight)
    assert archive.load(path, identity=ME, only=["head.weight"]).keys() == {"head.weight"}


def test_only_the_segments_of_a_tensor_are_read(tmp_path, monkeypatch):
    """Of 50 segments, one tensor costs its own and the first; damage elsewhere does not matter."""
    state = {f"t{i}": torch.full((1000,), float(i)) for i in range(50)}
    path = seal(tmp_path / "a", state)
    preadv, read = os.preadv, []

    def counted(fd, buffers, at):
        read.append(sum(map(len, buffers)))
        return preadv(fd, buffers, at)

    with archive.open_lazy(path, identity=ME, trusted=TRUSTED) as file:
        monkeypatch.setattr(os, "preadv", counted)
        assert file.tensor("t30").tolist() == [30.0] * 1000
        assert sum(read) <= 3 * 4096
        monkeypatch.undo()
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with archive.open_lazy(path, identity=ME, trusted=TRUSTED) as file:
        assert file.tensor("t1").tolist() == [1.0] * 1000
        broken = 0
        for name in file.names:
            try:
                file.tensor(name)
            except archive.Tampered:
                broken += 1
        assert 1 <= broken <= 3
    with pytest.raises(archive.Tampered):
        archive.load(path, identity=ME)


def test_a_failed_tensor_leaves_nothing_behind(tmp_path, monkeypatch):
    """What the good segments of a bad tensor left in memory is zero before the error is seen."""
    path = seal(tmp_path / "a", {"x": torch.ones(9000)}, signer=None)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    targets, empty = [], torch.empty
    with archive.open_lazy(path, identity=ME) as file:
        with monkeypatch.context() as patch:
            patch.setattr(
                torch, "empty", lambda *a, **k: targets.append(empty(*a, **k)) or targets[-1]
            )
            with pytest.raises(archive.Tampered):
                file.tensor("x")
        assert len(targets[0]) == 36000
        assert not targets[0].any()


def test_a_segment_changed_while_the_file_is_open_is_refused(tmp_path):
    """Leaves were signed, so a reader who swaps a segment under an open file is caught."""
    path = seal(tmp_path / "a", {"x": torch.zeros(3000), "y": torch.zeros(3000)})
    other = forge(
        path.read_bytes(), ME._private, plaintext=safetensors.torch.save({"x": torch.ones(6000)})
    )
    with archive.open_lazy(path, identity=ME, trusted=TRUSTED) as file:
        parts = Parts.of(path.read_bytes())
        parts.segments = other.segments[: len(parts.segments)]
        with path.open("r+b") as raw:
            raw.write(parts.raw())
        with pytest.raises(archive.Tampered):
            file.tensor("x")
        os.truncate(path, 5000)
        with pytest.raises(archive.ArchiveError):
            file.tensor("y")


def test_names_that_are_not_there_are_refused(tmp_path):
    """A missing name, and a file that was closed, end in errors of ours."""
    path = seal(tmp_path / "a", {"x": torch.zeros(3)})
    with archive.open_lazy(path, identity=ME) as file:
        for call in (file.tensor, file.shape, file.dtype):
            with pytest.raises(archive.StateError, match="'y'"):
                call("y")
    with pytest.raises(archive.StorageError, match="closed"):
        file.tensor("x")
    with pytest.raises(archive.StateError):
        archive.load(path, identity=ME, only=["y"])


def test_threads_share_a_file(tmp_path):
    """Many tensors read at once are what they would be alone."""
    state = {f"t{i}": torch.full((700,), float(i)) for i in range(40)}
    path = seal(tmp_path / "a", state)
    with (
        archive.open_lazy(path, identity=ME) as file,
        ThreadPoolExecutor(4) as pool,
    ):
        found = dict(zip(file.names, pool.map(file.tensor, file.names), strict=True))
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_long_index_takes_more_than_one_segment(tmp_path):
    """Hundreds of names do not fit the first segment; they are all there."""
    state = {f"a.rather.long.name.{i}": torch.tensor(i) for i in range(300)}
    path = seal(tmp_path / "a", state)
    with archive.open_lazy(path, identity=ME) as file:
        assert len(file.names) == 300
        assert file.tensor("a.rather.long.name.123").item() == 123
    segments = math.ceil(archive.inspect(path).plaintext_length / 4064)
    assert segments > 5
