"""Into tensors that are there: right bytes or zeros, and nothing before all was checked."""

import os
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_cnn import archive
from secure_cnn.archive.format.payload import share_out
from secure_cnn.archive.format.tensors import Pieces

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()
TRUSTED = [SIGNER.verifier]


def seal(path, state, **settings):
    """A signed file of small segments."""
    settings = {"recipients": [ME.recipient], "signer": SIGNER, **settings}
    archive.save(path, state, segment_length=4096, overwrite=True, **settings)
    return path


def zeros_like(state):
    """The same tree with zeros in it."""
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: zeros_like(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(zeros_like(item) for item in state)
    return state


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(0, 3000), max_size=8), st.booleans())
def test_it_gives_what_load_gives(tmp_path_factory, sizes, signed):
    """Tensors of any size against segments, so that they meet at every offset."""
    state = {f"t{i}": torch.rand(size) for i, size in enumerate(sizes)} | {"step": 3}
    path = seal(tmp_path_factory.mktemp("x") / "x", state, signer=SIGNER if signed else None)
    model = zeros_like(state) | {"step": 0}
    loaded = archive.load_into(model, path, identity=ME, trusted=TRUSTED if signed else None)
    fresh = archive.load(path, identity=ME)
    assert loaded["step"] == 3
    for name in fresh.keys() - {"step"}:
        assert torch.equal(model[name], fresh[name])
        assert loaded[name].data_ptr() == model[name].data_ptr()


def test_odd_states_come_back(tmp_path):
    """Trees, tied and empty tensors, scalars, and every width of element."""
    weight = torch.arange(3000.0)
    state = {
        "model": {"a": weight, "tied": weight},
        "optimizer": [{"step": torch.tensor(7)}, (torch.ones(9).bfloat16(), None)],
        0: torch.zeros(0, 3),
        "mask": torch.ones(5, dtype=torch.bool),
    }
    path = seal(tmp_path / "a", state)
    memory = torch.zeros(3000)
    model = zeros_like(state) | {"model": {"a": memory, "tied": memory}}
    loaded = archive.load_into(model, path, identity=ME, trusted=TRUSTED)
    assert torch.equal(memory, weight)
    assert loaded["optimizer"][0]["step"] == 7
    assert model["mask"].all()
    assert loaded["model"]["a"] is loaded["model"]["tied"]


def test_plain_data_alone_is_loaded(tmp_path):
    """There is no tensor to decrypt into."""
    path = seal(tmp_path / "a", {"step": 3})
    assert archive.load_into({"step": 0}, path, identity=ME) == {"step": 3}


def test_the_parameters_of_a_model_are_filled(tmp_path):
    """They need no gradient for it, and keep their memory."""
    saved, model = torch.nn.Linear(40, 50), torch.nn.Linear(40, 50)
    path = seal(tmp_path / "a", saved.state_dict())
    archive.load_into(dict(model.named_parameters()), path, identity=ME)
    assert all(map(torch.equal, model.parameters(), saved.parameters()))


def test_a_damaged_segment_leaves_zeros_everywhere(tmp_path):
    """Also in tensors whose own segments held."""
    path = seal(tmp_path / "a", {"a": torch.ones(9000), "b": torch.ones(9000)}, signer=None)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    model = {"a": torch.full([9000], 5.0), "b": torch.full([9000], 5.0)}
    with pytest.raises(archive.Tampered):
        archive.load_into(model, path, identity=ME)
    assert not model["a"].any()
    assert not model["b"].any()


WRONG = {
    "missing": ({"a": torch.full([2, 2], 5.0)}, "tensor b"),
    "more": ({"a": torch.full([2, 2], 5.0), "b": torch.ones(3), "c": torch.ones(1)}, "tensor c"),
    "shape": ({"a": torch.full([4], 5.0), "b": torch.ones(3)}, r"\[2, 2\]"),
    "dtype": ({"a": torch.full([2, 2], 5.0).double(), "b": torch.ones(3)}, "float64"),
    "strides": ({"a": torch.full([2, 2], 5.0).t(), "b": torch.ones(3)}, "contiguous"),
    "kind": ({"a": torch.full([2, 2], 5.0), "b": {1}}, "set"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_do_not_fit_are_refused_untouched(tmp_path, name):
    """Before a byte is decrypted into any of them."""
    path = seal(tmp_path / "a", {"a": torch.ones(2, 2), "b": torch.ones(3)})
    model, message = WRONG[name]
    with pytest.raises(archive.StateError, match=message):
        archive.load_into(model, path, identity=ME)
    assert (model["a"] == 5).all()


def test_tensors_that_overlap_are_refused(tmp_path):
    """One would be written over the other."""
    path = seal(tmp_path / "a", {"a": torch.ones(4), "b": torch.ones(4)})
    memory = torch.full([6], 5.0)
    with pytest.raises(archive.StateError, match="share memory"):
        archive.load_into({"a": memory[:4], "b": memory[2:]}, path, identity=ME)
    assert (memory == 5).all()
    archive.load_into({"a": torch.empty(8)[:4], "b": torch.empty(8)[4:]}, path, identity=ME)


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"trusted": [archive.generate_signer().verifier]}, archive.UntrustedSigner),
        ({"expect": {"epsilon": 1}}, archive.ClaimMismatch),
        ({"expect": {"customer": "other"}}, archive.ClaimMismatch),
        ({"core_hash": "00" * 32}, archive.RolledBack),
        ({"identity": archive.generate_identity()}, archive.WrongKey),
    ],
)
def test_a_file_that_is_not_wanted_changes_nothing(tmp_path, wanted, error):
    """Signer, claims, core hash and key come first."""
    secret = {"customer": "acme"}
    path = seal(tmp_path / "a", {"a": torch.ones(9)}, claims={"epsilon": 3}, private_claims=secret)
    model = {"a": torch.full([9], 5.0)}
    with pytest.raises(error):
        archive.load_into(model, path, **{"identity": ME, **wanted})
    assert (model["a"] == 5).all()


@settings(deadline=None, derandomize=True)
@given(st.lists(st.binary(max_size=9), max_size=6), st.data())
def test_parts_are_the_slice_of_joined_bytes(buffers, data):
    """No empty one among them, whatever the start and the length."""
    joined = b"".join(buffers)
    start = data.draw(st.integers(0, len(joined)))
    length = data.draw(st.integers(0, len(joined) - start))
    parts = Pieces([memoryview(buffer) for buffer in buffers]).parts(start, length)
    assert b"".join(parts) == joined[start : start + length]
    assert all(len(part) for part in parts)


def test_work_is_done_once_each():
    """By several threads."""
    done = []
    share_out(range(200), lambda: done.append)
    assert sorted(done) == list(range(200))


def test_after_a_failure_no_work_is_begun(monkeypatch):
    """Every thread is within its first piece until the one that failed has told of it and ended."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    before, choosing, failed = threading.active_count(), threading.Lock(), []
    told = threading.Event()
    seen = []

    def work(index):
        seen.append(index)
        thread = threading.current_thread()
        with choosing:
            fails = not failed and thread is not threading.main_thread()
            if fails:
                failed.append(thread)
        if fails:
            told.set()
            raise OSError("disk")
        assert told.wait(600)
        failed[0].join(600)

    with pytest.raises(OSError, match="disk"):
        share_out(range(1000), lambda: work)
    assert threading.active_count() == before
    assert len(seen) <= 4
    assert len(seen) == len(set(seen))


def test_work_is_done_without_more_threads(monkeypatch):
    """While the interpreter ends none can be started."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = []
    share_out(range(9), lambda: done.append)
    assert done == list(range(9))


@pytest.mark.parametrize("threads", [True, False])
def test_the_replaced_file_is_let_go(tmp_path, monkeypatch, threads):
    """Its descriptor is closed soon, also when no thread can be started for it."""
    path = seal(tmp_path / "a", {"a": torch.ones(9)})

    def held():
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.islink(link)]

    if not threads:

        def refuse(thread):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
    seal(path, {"a": torch.zeros(9)})
    for _ in range(3000):
        if not any("deleted" in name and str(tmp_path) in name for name in held()):
            break
        time.sleep(0.02)
    else:
        pytest.fail("the old file is still open")
    assert not archive.load(path, identity=ME)["a"].any()
