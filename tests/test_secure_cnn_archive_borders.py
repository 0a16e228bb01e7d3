"""What comes in over the borders of the archive, and what must not go out: typed refusals."""

import copy
import json
import os
import pickle
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cryptography.hazmat.primitives.kdf import argon2

from secure_cnn import archive
from secure_cnn.archive import (
    ArchiveError,
    Argon2Cost,
    ClaimMismatch,
    KeyFileError,
    LimitExceeded,
    SecretKeptError,
    StateError,
)
from secure_cnn.archive.format.stream import create_stream
from secure_cnn.cli.keys import passphrase_from

ME = archive.generate_identity(post_quantum=False)
TO = [ME.recipient]
CHEAP = archive.INSECURE_TEST_COST


def seal(path, state, **settings):
    """A sealed file."""
    archive.save(path, state, **{"recipients": TO, "overwrite": True, **settings})
    return path


# Claims


@pytest.mark.parametrize(
    ("says", "wanted", "holds"),
    [
        (1, True, False),
        (True, 1, False),
        (1.0, True, False),
        (0, False, False),
        (True, True, True),
        (3.0, 3, True),
        ("1", 1, False),
        (None, False, False),
        ([1, {"a": 1}], [1, {"a": True}], False),
        ([1, {"a": True}], [1, {"a": True}], True),
        ([1], [1, 2], False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
    ],
)
@pytest.mark.parametrize("kind", ["claims", "private_claims"])
def test_a_number_does_not_satisfy_an_expected_truth(tmp_path, says, wanted, holds, kind):
    """As JSON has them, at any depth, public or private."""
    path = seal(tmp_path / "m", {}, **{kind: {"audited": says}})
    if holds:
        assert archive.load(path, identity=ME, expect={"audited": wanted}) == {}
    else:
        with pytest.raises(ClaimMismatch):
            archive.load(path, identity=ME, expect={"audited": wanted})


ITSELF: list[object] = []
ITSELF.append(ITSELF)
BAD_CLAIMS = {
    "nan": float("nan"),
    "infinity": float("inf"),
    "surrogate": "caf\udce9",
    "surrogate in a key": {"caf\udce9": 1},
    "huge number": 1 << 2000,
    "itself": ITSELF,
    "bytes": b"x",
    "a set": {1},
    "a tensor": torch.ones(1),
    "keys that are numbers": {1: 2},
}


@pytest.mark.parametrize("kind", ["claims", "private_claims"])
@pytest.mark.parametrize("claim", BAD_CLAIMS.values(), ids=BAD_CLAIMS.keys())
def test_what_a_save_would_refuse_is_refused_before_it(tmp_path, kind, claim):
    """By `check`, in the same words, before hours of training; and nothing is written."""
    with pytest.raises(StateError) as early:
        archive.check({}, **{kind: {"a": claim}})
    with pytest.raises(StateError) as late:
        archive.save(tmp_path / "m", {}, recipients=TO, **{kind: {"a": claim}})
    assert str(early.value) == str(late.value)
    assert os.listdir(tmp_path) == []


def test_check_refuses_what_a_save_refuses_and_nothing_else(tmp_path):
    """States, names, claims that are too long or stand twice; and passes what a save takes."""
    good = {"w": torch.ones(2), "n": {1: (2, None)}, "name": "café"}
    archive.check(good, claims={"a": [1, "é"]}, private_claims={"b": {}}, name="é", recipients=TO)
    for state in ({"a": object()}, {"classes": ["caf\udce9"]}, {"w": torch.ones(1).to_sparse()}):
        with pytest.raises(StateError):
            archive.check(state)
        with pytest.raises(StateError):
            archive.save_plain(tmp_path / "m", state)
    for settings, error in (
        ({"claims": {"a": "x" * (1 << 20)}}, LimitExceeded),
        ({"claims": {"a": 1}, "private_claims": {"a": 1}}, StateError),
        ({"name": "caf\udce9"}, StateError),
        ({"recipients": [*TO, archive.generate_identity().recipient]}, archive.InvalidKey),
    ):
        with pytest.raises(error):
            archive.check({}, **settings)
        with pytest.raises(error):
            archive.save(tmp_path / "m", {}, **{"recipients": TO, **settings})


# Tensors


def with_byte(value, *, plain=None):
    """The bytes of a safetensors file with a bool tensor that has one byte of this value."""
    raw = bytearray(safetensors.torch.save({"mask": torch.ones(3, dtype=torch.bool)}))
    raw[-2] = value
    return bytes(raw)


@pytest.mark.parametrize("value", [2, 0x80, 0xFF])
def test_a_bool_is_one_of_two_bytes(tmp_path, monkeypatch, value):
    """However it is read: plain, sealed, one tensor alone, into memory, and by a deep verify."""
    (tmp_path / "plain").write_bytes(with_byte(value))
    with pytest.raises(StateError, match="bool"):
        archive.load_plain(tmp_path / "plain")
    with pytest.raises(StateError, match="bool"):
        archive.import_(tmp_path / "plain")
    signer = archive.generate_signer()
    with monkeypatch.context() as patch:  # a writer who does not look
        raw = memoryview(with_byte(value))
        patch.setattr("secure_cnn.archive.sealing.encode_state", lambda *_: [raw])
        seal(tmp_path / "m", {}, signer=signer)
    target = {"mask": torch.ones(3, dtype=torch.bool)}
    with archive.open_lazy(tmp_path / "m", identity=ME) as file:
        for read in (
            lambda: archive.load(tmp_path / "m", identity=ME),
            lambda: archive.load(tmp_path / "m", identity=ME, only=["mask"]),
            lambda: file.tensor("mask"),
            lambda: archive.load_into(target, tmp_path / "m", identity=ME),
            lambda: archive.verify(tmp_path / "m", trusted=[signer.verifier], deep=ME),
        ):
            with pytest.raises(StateError, match="bool"):
                read()
    assert not target["mask"].any()


def test_a_bool_that_is_none_is_not_saved_either(tmp_path):
    """Else the file could be written and never read."""
    mask = torch.tensor([1, 2], dtype=torch.uint8).view(torch.bool)
    with pytest.raises(StateError, match="bool"):
        seal(tmp_path / "m", {"mask": mask})
    assert os.listdir(tmp_path) == []


ALL = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]


@pytest.mark.parametrize("dtype", sorted(set(ALL), key=str), ids=str)
def test_every_type_is_saved_or_refused_in_our_words(tmp_path, dtype):
    """All that safetensors has are saved; what it reads of them is the same."""
    try:
        tensor = torch.zeros(8, dtype=torch.uint8).view(dtype)
    except (RuntimeError, TypeError):
        pytest.skip("torch makes none of these")
    try:
        archive.save_plain(tmp_path / "m", {"w": tensor})
    except StateError:
        assert dtype not in safetensors.torch._TYPES.values()
        return
    there = safetensors.torch.load_file(tmp_path / "m")["w"]
    mine = archive.load_plain(tmp_path / "m")["w"]
    assert there.dtype == mine.dtype == dtype
    assert torch.equal(mine.view(torch.uint8), there.view(torch.uint8))


def freed():
    """A tensor whose memory was given back, as sharding libraries do."""
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


STRANGE = {
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "sparse rows": lambda: torch.eye(2).to_sparse_csr(),
    "meta": lambda: torch.ones(2, device="meta"),
    "freed": freed,
    "complex128": lambda: torch.ones(2, dtype=torch.complex128),
    "lazy": lambda: torch.nn.parameter.UninitializedParameter(),
}


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse|sparse).*")
@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE.keys())
def test_a_tensor_without_plain_bytes_is_refused_in_our_words(tmp_path, make):
    """By check, save, save_plain and the store."""
    state = {"w": make()}
    with pytest.raises(StateError):
        archive.check(state)
    with pytest.raises(StateError):
        seal(tmp_path / "m", state)
    with pytest.raises(StateError):
        archive.save_plain(tmp_path / "m", state)
    with (
        archive.CheckpointStore(
            tmp_path / "s", recipients=TO, signer=archive.generate_signer()
        ) as store,
        pytest.raises(StateError),
    ):
        store.save(state, step=0)


def test_inside_of_a_transform_a_tensor_is_refused_in_our_words(tmp_path):
    """Under `vmap` a tensor has no memory of its own."""

    def save(x):
        archive.save_plain(tmp_path / "m", {"w": x})
        return x

    with pytest.raises(StateError):
        torch.func.vmap(save)(torch.ones(2, 3))
    assert os.listdir(tmp_path) == []


# Files


@pytest.mark.parametrize("size", [632, 640, 648])
def test_a_header_of_any_length_is_read(tmp_path, size):
    """Also of 640 bytes, which begins like an old pickle; an old pickle is still told from it."""
    tensors, path = {"weight": torch.arange(4.0)}, tmp_path / "m"

    def length(note):
        return struct.unpack("<Q", safetensors.torch.save(tensors, {"n": note})[:8])[0]

    safetensors.torch.save_file(tensors, path, {"n": "x" * (size - length(""))})
    for read in (archive.load_plain, archive.import_):
        assert torch.equal(read(path)["weight"], tensors["weight"])
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:2] == struct.pack("<Q", 640)[:2]
    with pytest.raises(StateError, match="archive import"):
        archive.load_plain(path)
    assert torch.equal(archive.import_(path)["weight"], tensors["weight"])


PATHS = ["a" * 256, "a\0b", "caf\ud800"]


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_no_system_takes_is_refused_in_our_words(tmp_path, name):
    """By everything that writes and everything that reads."""
    path = f"{tmp_path}/{name}"
    for call in (
        lambda: seal(path, {}),
        lambda: archive.save_plain(path, {}),
        lambda: archive.load(path, identity=ME),
        lambda: archive.load_plain(path),
        lambda: archive.import_(path),
        lambda: archive.inspect(path),
        lambda: archive.read_identity(path),
        lambda: archive.write_key(path, ME),
        lambda: archive.shred(path),
        lambda: passphrase_from(Path(path)),
        lambda: archive.CheckpointStore(path, trusted=[archive.generate_signer().verifier]),
        lambda: archive.CheckpointStore(path, signer=archive.generate_signer()),
    ):
        with pytest.raises(ArchiveError):
            call()


def test_a_pipe_blocks_nothing_and_is_not_replaced(tmp_path):
    """By anything that reads or writes a file of the archive; and it is a pipe still."""
    sealed, pipe = seal(tmp_path / "m", {"w": torch.ones(1)}), tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    signer = archive.generate_signer()
    for call in (
        lambda: seal(pipe, {}),
        lambda: archive.save_plain(pipe, {}, overwrite=True),
        lambda: archive.decrypt(sealed, pipe, identity=ME, overwrite=True),
        lambda: archive.load(pipe, identity=ME),
        lambda: archive.load_plain(pipe),
        lambda: archive.import_(pipe),
        lambda: archive.inspect(pipe),
        lambda: archive.shred(pipe),
        lambda: archive.read_identity(pipe),
        lambda: archive.read_signer(pipe),
        lambda: archive.read_kek(pipe),
        lambda: archive.write_key(pipe, ME),
        lambda: archive.read_certificate(pipe, trusted=[]),
        lambda: archive.export_card(sealed, pipe, overwrite=True),
        lambda: archive.CheckpointStore(tmp_path / "s", signer=signer, high_water=pipe),
        lambda: passphrase_from(pipe),
    ):
        with pytest.raises(ArchiveError):
            call()
        assert stat.S_ISFIFO(os.lstat(pipe).st_mode)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_passphrase_others_can_reach_is_refused_as_a_key_is(tmp_path, mode):
    """One rule for all files that hold a secret."""
    path = tmp_path / "passphrase"
    path.write_text("secret\n")
    path.chmod(mode)
    with pytest.raises(KeyFileError, match="chmod 600"):
        passphrase_from(path)
    path.chmod(0o600)
    assert repr(passphrase_from(path)) == "Passphrase(…)"


OPEN = """
import sys
from secure_cnn import archive
me = archive.read_identity(sys.argv[2])
def slow(done, total):
    print("open", flush=True)
    sys.stdin.read()
archive.decrypt(sys.argv[1], sys.argv[3], identity=me, progress=slow)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_plaintext_is_left_by_a_process_that_was_killed(tmp_path, number):
    """In the middle of `decrypt`, after 8 MiB of plaintext were on their way to the disk."""
    sealed, out = seal(tmp_path / "m", {"w": torch.ones(4 << 20)}), tmp_path / "out"
    archive.write_key(tmp_path / "me.key", ME)
    out.mkdir()
    command = [sys.executable, "-c", OPEN, sealed, tmp_path / "me.key", out / "plain"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"open\n"
        child.send_signal(number)
        assert child.wait(60) == -number
    assert os.listdir(out) == []


# Secrets


def secrets():
    """Everything that holds a secret."""
    return [
        ME,
        archive.generate_identity(),
        archive.generate_signer(post_quantum=True),
        archive.Passphrase("correct horse", cost=CHEAP),
        archive.generate_kek(),
        archive.ServiceKey(object(), "name"),
        create_stream(bytes(32), b"", 4096),
    ]


@pytest.mark.parametrize("secret", secrets(), ids=lambda it: type(it).__name__)
def test_a_secret_is_neither_copied_nor_pickled(secret):
    """Alone or within something else; nor does it stand in the repr or the variables."""
    for carry in (
        copy.copy,
        copy.deepcopy,
        *(lambda it, p=p: pickle.dumps(it, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
        lambda it: it.__getstate__(),
    ):
        with pytest.raises(SecretKeptError):
            carry(secret)
        if carry is not copy.copy and carry.__name__ != "<lambda>":
            with pytest.raises(SecretKeptError):
                carry({"settings": [secret]})
    assert not hasattr(secret, "__dict__")
    assert "correct" not in repr(secret)


def test_public_halves_travel():
    """Control: who can read and whom to trust is no secret."""
    signer = archive.generate_signer()
    for public in (ME.recipient, signer.verifier):
        assert copy.deepcopy(public) == public == pickle.loads(pickle.dumps(public))


# Passphrases


def test_all_passphrases_of_a_file_cost_no_more_than_one_may(tmp_path, monkeypatch):
    """Eight that each ask for the most: refused before any is tried, and never written."""
    most = Argon2Cost(memory_kib=1 << 20, iterations=16, lanes=1)
    half = Argon2Cost(memory_kib=1 << 19, iterations=16, lanes=1)
    tried = []

    class Free:
        """Argon2id that costs nothing."""

        def __init__(self, **settings):
            tried.append(settings)

        def derive(self, secret):
            return secret.ljust(32)[:32]

    monkeypatch.setattr("secure_cnn.archive.keys.passphrase.Argon2id", Free)
    assert argon2.Argon2id is not Free
    both = [archive.Passphrase(name, cost=half) for name in ("one", "two")]
    seal(tmp_path / "m", {}, recipients=both)
    assert archive.load(tmp_path / "m", identity=both[1]) == {}
    third = archive.Passphrase("three", cost=CHEAP)
    with pytest.raises(LimitExceeded, match="together"):
        seal(tmp_path / "n", {}, recipients=[*both, third])
    with pytest.raises(LimitExceeded, match="together"):
        archive.change_recipients(tmp_path / "m", identity=both[0], add=[third])
    slots = [archive.Passphrase(str(n), cost=most).wrap(bytes(32), bytes(32)) for n in range(8)]
    tried.clear()
    with pytest.raises(LimitExceeded, match="together"):
        both[0].unwrap(slots, bytes(32))
    assert tried == []


def test_claims_on_the_command_line_are_strict_json():
    """Nests too deeply, stands twice, is no number: wrong usage, not a traceback."""
    from typer import BadParameter

    from secure_cnn.cli.claims import claims_from

    assert claims_from(["a=1", "b=text", 'c={"d": [true]}']) == {
        "a": 1,
        "b": "text",
        "c": {"d": [True]},
    }
    for bad in ("a=" + "[" * 100_000, 'a={"b": 1, "b": 2}', "a=NaN", "a=1e999"):
        with pytest.raises(BadParameter):
            claims_from([bad])


def test_a_hostile_claim_is_printed_as_text(tmp_path):
    """Names and claims of a file cannot move the cursor of who inspects it."""
    hostile = "cat\x1b[2J\u202e\x7f\n[red]"
    path = seal(tmp_path / "m", {}, claims={hostile: hostile}, name=hostile)
    text = str(archive.inspect(path))
    assert not set(text) & set("\x1b\u202e\x7f")
    assert json.dumps(hostile).replace("\x7f", "\\x7f") in text
