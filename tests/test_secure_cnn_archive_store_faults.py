"""A store in a bad world: calls that fail, disks that are full, processes that are killed."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import printed_by

from secure_cnn import archive
from secure_cnn.archive.errors import StorageError
from secure_cnn.archive.store.store import CheckpointStore

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()


def writer(folder, **settings):
    """A store that can do everything and keeps two."""
    return CheckpointStore(
        folder, recipients=[ME.recipient], signer=SIGNER, identity=ME, keep_last=2, **settings
    )


def reader(folder):
    """A store that only reads."""
    return CheckpointStore(folder, identity=ME, trusted=[SIGNER.verifier])


def state(number):
    """A state that differs for each number."""
    return {"weight": torch.full((2000,), float(number)), "step": number}


def holds_whole(folder):
    """The newest generation, after the state of each that is kept was found to be its own."""
    store = reader(folder)
    for it in store.verify(deep=True):
        loaded = store.load(it.generation)
        assert loaded["step"] == it.step == it.generation
        assert torch.equal(loaded["weight"], state(it.generation)["weight"])
    return store.find("latest").generation


class Faults:
    """Counts calls of the operating system that write, and makes one of them fail."""

    CALLS = ("open", "pwrite", "fsync", "ftruncate", "posix_fallocate", "replace", "link", "unlink")

    def __init__(self, monkeypatch, *, failing, error):
        self.count, self._failing, self._error = 0, failing, error
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))
        for name, call in (("replace", os.replace), ("unlink", os.unlink)):
            monkeypatch.setattr(Path, name, self._method(call))

    def _method(self, call):
        def method(path, *arguments, missing_ok=False):
            try:
                return call(path, *arguments)
            except FileNotFoundError:
                if not missing_ok:
                    raise

        return method

    def _wrap(self, call):
        def wrapped(*arguments, **settings):
            reads = call.__name__ == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR)
            if not reads:
                self.count += 1
                if self.count == self._failing:
                    raise OSError(self._error, os.strerror(self._error))
            return call(*arguments, **settings)

        wrapped.__name__ = call.__name__
        return wrapped


def save_with_fault(folder, monkeypatch, failing, error):
    """Opens a store of three generations and saves a fourth; which call failed, and how."""
    with writer(folder) as store:
        for number in (1, 2, 3):
            store.save(state(number), step=number)
    raised = None
    with monkeypatch.context() as patch:
        faults = Faults(patch, failing=failing, error=error)
        try:
            with writer(folder) as store:
                store.save(state(4), step=4)
        except StorageError as caught:
            raised = caught
    return faults.count, raised


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_any_call_may_fail(tmp_path, monkeypatch, error):
    """Each call that writes, in turn: a clear error, nothing lost, and the next save works."""
    calls, _ = save_with_fault(tmp_path / "count", monkeypatch, 0, error)
    assert calls > 20
    surfaced = 0
    for failing in range(1, calls + 1):
        folder = tmp_path / str(failing)
        _, raised = save_with_fault(folder, monkeypatch, failing, error)
        newest = holds_whole(folder)
        assert newest in (3, 4)
        if raised is None:
            assert newest == 4
        else:
            surfaced += 1
            assert os.strerror(error) in str(raised)
        with writer(folder) as store:
            assert store.save(state(newest + 1), step=newest + 1) == newest + 1
        assert holds_whole(folder) == newest + 1
        assert not list(folder.glob(".*.tmp"))
        assert len(list(folder.glob("*.sealed"))) == 2
    assert surfaced >= calls - 2


def test_a_store_that_failed_goes_on_by_itself(tmp_path, monkeypatch):
    """Without being opened again, wherever it failed: it looks what became of the commit."""
    folder = tmp_path / "s"
    with writer(folder) as store:
        expected = 0
        for failing in range(1, 40):
            with monkeypatch.context() as patch:
                faults = Faults(patch, failing=failing, error=errno.ENOSPC)
                store.save(state(expected + 1), step=expected + 1)
                with contextlib.suppress(StorageError):
                    store.wait()
            found = [it.generation for it in store.list()]
            assert found[-1:] in ([expected], [expected + 1], [])
            expected = found[-1] if found else 0
            if faults.count < failing:
                break
        assert expected > 3
        assert faults.count < failing
    assert holds_whole(folder) == expected


def test_a_full_disk_is_found_before_the_old_is_touched(tmp_path):
    """A real limit of the operating system: no file over 64 KiB."""
    folder = tmp_path / "s"
    with writer(folder) as store:
        store.save(state(1), step=1)
        store.wait()
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
            store.save({"weight": torch.zeros(1 << 16)}, step=2)
            with pytest.raises(StorageError, match="nothing was changed"):
                store.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert store.save(state(2), step=2) == 2
    assert holds_whole(folder) == 2


KILLED = """
import os, random, signal, sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
from test_secure_cnn_archive_store_faults import holds_whole, state, writer

folder, moments = sys.argv[1], int(sys.argv[2])
random.seed(int(sys.argv[4]))

def train(acknowledge):
    with writer(folder) as store:
        number = len(store._files.read().history)
        while True:
            number += 1
            os.write(acknowledge, b"b" + number.to_bytes(4, "big"))
            store.save(state(number), step=number)
            store.wait()
            os.write(acknowledge, b"e" + number.to_bytes(4, "big"))

newest, between = 0, 0
for moment in range(moments):
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            train(into)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    os.close(into)
    # When the first save ended the child is under way; from then on any moment is as good.
    said = os.read(out, 5)
    while said[-5:-4] != b"e":
        said += os.read(out, 5)
    time.sleep(random.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child ended by itself"
    while more := os.read(out, 1 << 16):
        said += more
    os.close(out)
    asked = int.from_bytes(said[-4:], "big")
    told = asked - (said[-5:-4] == b"b")
    found = holds_whole(folder)
    assert told in (found, found - 1), (told, found)
    assert found > newest
    newest = found
    between += told < asked
print(newest, between)
"""


def kill_at_random_moments(folder, moments, *, seed):
    """Generations saved in all, and how many deaths were in the middle of a save."""
    # The keys are made on import: the process that forks has one pair for all of its children.
    words = (sys.executable, "-c", KILLED, folder, moments, Path(__file__).parent, seed)
    return tuple(map(int, printed_by(*words).split()))


@pytest.mark.slow
def test_a_killed_writer_leaves_the_last_complete_generation(tmp_path):
    """`kill -9` at 25 random moments, one run after the other in the same folder."""
    generations, amid = kill_at_random_moments(tmp_path / "s", 25, seed=1)
    assert generations > 25
    # Else no moment was in the middle of a save, and nothing was shown.
    assert amid > 0


EXIT = """
import sys, torch
from secure_cnn import archive
from secure_cnn.archive.store.store import CheckpointStore
signer = archive.generate_signer()
me = archive.generate_identity(post_quantum=False)
print(signer.verifier.to_text(), me.to_text(), flush=True)
store = CheckpointStore(sys.argv[1], recipients=[me.recipient], signer=signer)
store.save({"w": torch.ones(1 << 22)}, step=1)
"""


def test_a_program_that_ends_without_closing_loses_nothing_in_silence(tmp_path):
    """The interpreter waits for the save; should it fail then, stderr says so."""
    words = [sys.executable, "-c", EXIT, tmp_path / "s"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0
    verifier, identity = done.stdout.split()
    store = CheckpointStore(
        tmp_path / "s",
        identity=archive.Identity.from_text(identity),
        trusted=[archive.Verifier.from_text(verifier)],
    )
    if "after interpreter shutdown" in done.stderr:
        assert store.list() == ()
    else:
        assert done.stderr == ""
        assert torch.equal(store.load()["w"], torch.ones(1 << 22))
