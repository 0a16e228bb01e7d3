"""How far work on a sealed file is: told truly, from one thread, and able to end it."""

import tempfile
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secure_cnn import archive
from secure_cnn.archive.format import payload as payload_module
from secure_cnn.archive.format.payload import Payload, encrypt_file, hash_file, share_out
from secure_cnn.archive.format.state import encode_state
from secure_cnn.archive.format.stream import Layout, create_stream
from secure_cnn.archive.format.tensors import Pieces

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()
SOMEBODY = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"
STATE = {"weight": torch.arange(20_000.0)}

Progress = Callable[[int, int], None]


def seal(path: Path, progress: Progress | None = None) -> None:
    """A signed file of twenty segments; one that is there is replaced."""
    archive.save(
        path,
        STATE,
        recipients=[ME.recipient],
        signer=SIGNER,
        overwrite=True,
        segment_length=4096,
        progress=progress,
    )


def rotate(path: Path, progress: Progress) -> None:
    """The same content under a new file key."""
    archive.rotate(path, identity=ME, recipients=[ME.recipient], signer=SIGNER, progress=progress)


def decrypt(path: Path, progress: Progress) -> None:
    """The plain file beside it."""
    plain = path.with_name("plain")
    archive.decrypt(path, plain, identity=ME, overwrite=True, progress=progress)


def export_age(path: Path, progress: Progress) -> None:
    """An age file beside it."""
    archive.export_age(
        path,
        path.with_name("age"),
        identity=ME,
        recipients=[SOMEBODY],
        overwrite=True,
        progress=progress,
    )


def verify(path: Path, progress: Progress) -> None:
    """The signature and all that it covers."""
    archive.verify(path, trusted=[SIGNER.verifier], progress=progress)


def verify_deep(path: Path, progress: Progress) -> None:
    """That, and then all of it decrypted."""
    archive.verify(path, trusted=[SIGNER.verifier], deep=ME, progress=progress)


# What is done to a file, and how often that reads all of it.
PASSES = {seal: 1, rotate: 1, decrypt: 1, export_age: 1, verify: 1, verify_deep: 2}


@pytest.fixture
def path(tmp_path):
    """A sealed file."""
    seal(tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture(params=[1, 10_000], ids=["each segment", "each few"])
def told_every(request, monkeypatch):
    """Small steps, so that small files have several."""
    monkeypatch.setattr(payload_module, "_TOLD_EVERY", request.param)


@pytest.fixture
def alone(monkeypatch):
    """The calling thread does all, so that it is never chance how much is left for it."""
    monkeypatch.setattr(payload_module, "_MAX_THREADS", 1)


@pytest.mark.usefixtures("told_every")
@pytest.mark.parametrize("act", PASSES)
def test_what_is_told_rises_to_the_length(path, act):
    """Every call is above the one before, with one total, which the last one reaches."""
    told = []
    act(path, lambda done, total: told.append((done, total)))
    length = PASSES[act] * archive.inspect(path).plaintext_length
    done = [each for each, _ in told]
    assert {total for _, total in told} == {length}
    assert done == sorted(set(done))
    assert done[-1] == length


@pytest.mark.usefixtures("told_every", "alone")
@pytest.mark.parametrize("act", [act for act in PASSES if act is not export_age])
def test_it_is_told_on_the_way(path, act):
    """Not only at the end."""
    told = []
    act(path, lambda done, total: told.append(done / total))
    assert told[0] < 0.2
    assert len(told) > 5


def blank(length: int) -> dict[str, torch.Tensor]:
    """A state whose plain file has so many bytes."""
    tensor = torch.zeros(length - 512, dtype=torch.uint8)
    beyond = sum(map(len, encode_state({"x": tensor}))) - len(tensor)
    return {"x": torch.zeros(length - beyond, dtype=torch.uint8)}


def test_an_age_file_is_told_of_by_block(tmp_path):
    """A length of a whole number of blocks, and one chunk more: no call is made twice."""
    for length in (8 << 20, (8 << 20) + (64 << 10)):
        path = tmp_path / f"{length}"
        archive.save(path, blank(length), recipients=[ME.recipient])
        assert archive.inspect(path).plaintext_length == length
        told = []
        export_age(path, lambda *call, told=told: told.append(call))
        blocks = [block << 20 for block in (4, 8) if block << 20 < length]
        assert told == [(done, length) for done in [*blocks, length]]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30_000), st.integers(100, 5000), st.integers(1, 10_000))
@example(0, 100, 1)
@example(68 * 9, 100, 1)
def test_any_length_adds_up(length, segment_length, told_every):
    """Four ways through a payload agree on its length, at steps that are not below what was set."""
    layout = Layout(offset=0, segment_length=segment_length, plaintext_length=length)
    floe = create_stream(bytes(32), b"", segment_length)
    told = {name: [] for name in ("encrypt", "hash", "copy", "check")}
    to = {name: lambda *call, calls=calls: calls.append(call) for name, calls in told.items()}
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryFile() as file,
        tempfile.TemporaryFile() as out,
    ):
        patch.setattr(payload_module, "_TOLD_EVERY", told_every)
        fd, plain = file.fileno(), Pieces([memoryview(bytes(length))])
        leaves = encrypt_file(fd, layout, floe, plain, hashed=True, progress=to["encrypt"])
        hash_file(fd, layout, to["hash"])
        payload = Payload(fd, layout, floe, leaves)
        payload.copy_to(out.fileno(), to["copy"])
        payload.check(to["check"])
    for calls in told.values():
        points = [0, *(done for done, _ in calls)]
        steps = [after - before for before, after in pairwise(points)]
        assert sum(steps) == length
        assert all(step >= told_every for step in steps[:-1])
        assert all(step > 0 for step in steps)
        assert {total for _, total in calls} <= {length}


@pytest.mark.usefixtures("told_every", "alone")
def test_no_more_is_told_than_was_written(path, monkeypatch):
    """Against what reached the file by then."""
    written, told = [], []
    write_at = payload_module.write_at

    def recorded(fd, data, offset):
        write_at(fd, data, offset)
        written.append(len(data))

    monkeypatch.setattr(payload_module, "write_at", recorded)
    decrypt(path, lambda done, total: told.append((done, sum(written))))
    assert len(told) > 5
    assert all(done == by_then for done, by_then in told)


@pytest.mark.usefixtures("told_every")
@pytest.mark.parametrize("act", PASSES)
def test_only_the_calling_thread_tells(path, act):
    """A bar that is no friend of threads is safe."""
    callers = set()
    act(path, lambda done, total: callers.add(threading.get_ident()))
    assert callers == {threading.get_ident()}


@pytest.mark.usefixtures("told_every")
@pytest.mark.parametrize("error", [RuntimeError("bar"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("last", [False, True], ids=["at once", "at the end"])
@pytest.mark.parametrize("act", PASSES)
def test_what_it_raises_ends_the_work(path, act, last, error):
    """The very error comes out, no thread is left, and nothing on the disk has changed."""
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    threads = threading.active_count()

    def fail(done, total):
        if done == total or not last:
            raise error

    with pytest.raises(type(error)) as raised:
        act(path, fail)
    assert raised.value is error
    assert threading.active_count() == threads
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_failure_is_not_told_as_done():
    """Of a hundred, five went well; nobody hears that all did."""
    told = []

    def work(index):
        if index == 5:
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        share_out(range(100), lambda: work, told.append)
    assert max(told, default=0) < 100


def test_damage_found_on_the_way_is_not_told_as_done(path):
    """A byte of the last segment is another."""
    told, raw = [], bytearray(path.read_bytes())
    header = archive.inspect(path)
    raw[header.file_length - 2000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(archive.Tampered):
        verify_deep(path, lambda done, total: told.append((done, total)))
    assert all(done < total for done, total in told)
