"""`-` in `secure-cnn archive`: standard input and output where files are meant, bytes and whole."""

import argparse
import collections
import io
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from secure_cnn import archive
from secure_cnn.archive.storage import Spool
from secure_cnn.cli import main

STATE = {"layer.weight": torch.arange(6.0), "layer.bias": torch.ones(2)}
COMMAND = (sys.executable, "-c", "from secure_cnn.cli import main; main()", "archive")


@pytest.fixture
def room(tmp_path, monkeypatch):
    """An empty folder, in which the command runs, with the key of a reader in it."""
    identity = archive.generate_identity()
    archive.write_key(tmp_path / "me.key", identity)
    (tmp_path / "me.pub").write_text(identity.recipient.to_text())
    safetensors.torch.save_file(STATE, tmp_path / "plain")
    torch.save(STATE, tmp_path / "torch.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Typed(io.BytesIO):
    """A stream that a person types."""

    def isatty(self):
        return True


@pytest.fixture
def pipe(monkeypatch, capfd):
    """Runs the command on bytes; exit code, the bytes that it gave, standard error."""

    def call(*words, given=b"", out=None, typed=False):
        left = io.BytesIO() if out is None else out
        monkeypatch.setattr(sys, "argv", ["secure-cnn", "archive", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper((Typed if typed else io.BytesIO)(given)))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(left))
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, left.getvalue(), capfd.readouterr().err

    return call


@pytest.mark.parametrize("verb", [("seal", "plain"), ("import", "plain"), ("import", "torch.pt")])
def test_a_file_goes_through_pipes_bit_by_bit(room, pipe, verb):
    """Sealed and opened again without a file of either; and no file is called `-`."""
    name, source = verb
    code, sealed, err = pipe(
        name, "-", "-", "--recipient", "me.pub", given=(room / source).read_bytes()
    )
    assert (code, "sealed file: standard output\n" in err) == (0, True), err
    (room / "m").write_bytes(sealed)
    identity = archive.read_identity(room / "me.key")
    assert all(torch.equal(STATE[k], t) for k, t in archive.load("m", identity=identity).items())
    for words in (("open", "-", "--out", "-"), ("export", "-", "-")):
        code, plain, err = pipe(*words, "--identity", "me.key", given=sealed)
        assert (code, "plain file: standard output\n" in err) == (0, True), err
        assert safetensors.torch.load(plain).keys() == STATE.keys()
    code, plain, _ = pipe(
        *("export", "-", "-", "--only", "layer.bias", "--identity", "me.key"), given=sealed
    )
    assert safetensors.torch.load(plain).keys() == {"layer.bias"}
    code, card, _ = pipe("export", "-", "-", "--card", given=sealed)
    assert (code, b"# " in card) == (0, True)
    assert sorted(os.listdir()) == ["m", "me.key", "me.pub", "plain", "torch.pt"]


def test_nothing_is_given_of_what_does_not_open(room, pipe):
    """The wrong key, a changed byte at the end, no file at all: not one byte goes out."""
    archive.save("m", STATE, recipients=[archive.read_identity("me.key").recipient])
    sealed = (room / "m").read_bytes()
    archive.write_key("other.key", archive.generate_identity())
    opening = ("open", "-", "--out", "-", "--identity")
    for key, given, said in (
        ("other.key", sealed, "not sealed for"),
        ("me.key", sealed[:-1] + bytes([sealed[-1] ^ 1]), "was changed"),
        ("me.key", sealed[: len(sealed) // 2], "ends before"),
        ("me.key", b"", "sealed file"),
    ):
        code, out, err = pipe(*opening, key, given=given)
        assert (code, out, said in err) == (6, b"", True), err
    code, out, err = pipe("import", "-", "-", "--recipient", "me.pub", given=sealed)
    assert (code, out) == (6, b"")
    assert "standard input: is sealed" in err


def test_a_terminal_is_refused(room, pipe):
    """To read from and to write to, before anything is asked or done."""
    seal = ("seal", "-", "new", "--recipient", "me.pub")
    code, _, err = pipe(*seal, given=b"typed", typed=True)
    assert (code, "got a terminal" in err) == (2, True)
    out = Typed()
    code, given, err = pipe("seal", "plain", "-", "--recipient", "me.pub", out=out)
    assert (code, given, "got a terminal" in err) == (2, b"", True)
    assert not (room / "new").exists()


def test_the_passphrase_comes_from_elsewhere(room, pipe, monkeypatch):
    """One stream cannot hold the file and the answer to a question; the environment can."""
    cost = archive.INSECURE_TEST_COST
    archive.save("m", STATE, recipients=[archive.Passphrase("correct horse", cost=cost)])
    words = ("open", "-", "--out", "-", "--passphrase-file", "-")
    monkeypatch.setenv("SECURE_CNN_PASSPHRASE", "correct horse")
    code, out, err = pipe(*words, given=(room / "m").read_bytes())
    assert code == 0, err
    assert safetensors.torch.load(out).keys() == STATE.keys()
    monkeypatch.delenv("SECURE_CNN_PASSPHRASE")
    monkeypatch.setattr("getpass.getpass", lambda *_: "correct horse")
    code, out, err = pipe(*words, given=(room / "m").read_bytes())
    assert (code, out, "standard input is the file" in err) == (2, b"", True)


def test_a_key_command_does_not_eat_the_file(room, pipe):
    """It gets an empty standard input of its own."""
    key = archive.generate_kek()
    archive.write_key("kek", key)
    archive.save("m", STATE, recipients=[key])
    eats = "import sys; sys.stdin.read(); print(open('kek').read().split()[-1])"
    words = ("open", "-", "--out", "-", "--kek", f'command:{sys.executable} -c "{eats}"')
    code, out, err = pipe(*words, given=(room / "m").read_bytes())
    assert code == 0, err
    assert safetensors.torch.load(out).keys() == STATE.keys()


def test_a_reader_that_leaves_early_is_told_in_one_line(room):
    """Exit code 6, no traceback, also where Python flushes once more at its end."""
    big = {"w": torch.zeros(1 << 20)}
    archive.save("m", big, recipients=[archive.read_identity("me.key").recipient])
    words = (*COMMAND, "open", "m", "--out", "-", "--identity", "me.key")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ran:
        ran.stdout.close()
        err = ran.stderr.read()
    assert ran.wait() == 6
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"], err
    assert "standard output: cannot write all of it: Broken pipe" in err


def test_a_spool_has_no_name_and_is_gone_when_closed(tmp_path):
    """What is plain is in no folder, and another opens it by its descriptor alone."""
    with Spool("standard input") as held:
        held.file.write(b"secret")
        held.file.flush()
        assert str(held) == "standard input"
        with open(held, "rb") as again:
            assert again.read() == b"secret"
    assert held.file.closed
    assert not list(tmp_path.iterdir())


class Own:
    """A class that only its own program knows."""


STRANGERS = {
    "a.b[1]: a argparse.Namespace": {"a": {"b": [1, argparse.Namespace(x=1)]}},
    "optimizer.param_groups: a collections.defaultdict": {
        "w": torch.ones(2),
        "optimizer": {"param_groups": collections.defaultdict(list)},
    },
    f"got a {__name__}.Own": Own(),
    f"own[0]: a {__name__}.Own": {"own": (Own(),)},
}


@pytest.mark.parametrize("found", STRANGERS, ids=str)
def test_import_names_the_place_and_the_class_that_it_cannot_take(tmp_path, found):
    """And what to do where the file was made; no code of it runs."""
    torch.save(STRANGERS[found], tmp_path / "theirs.pt")
    with pytest.raises(archive.StateError) as refused:
        archive.import_(tmp_path / "theirs.pt")
    assert found in str(refused.value)
    assert "save state_dict() or plain data in its place" in str(refused.value)


class Hostile:
    """Leaves a file where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("tree", [Hostile(), {"a": Hostile()}, {"[red]\x1b[2J": Own()}])
def test_a_refused_file_runs_nothing_and_moves_no_cursor(tmp_path, monkeypatch, tree):
    """Neither the first reading, nor the second, which looks for the place."""
    monkeypatch.chdir(tmp_path)
    torch.save(tree, "theirs.pt")
    with pytest.raises(archive.StateError) as refused:
        archive.import_("theirs.pt")
    assert "\x1b" not in str(refused.value)
    assert os.listdir() == ["theirs.pt"]


def test_seal_names_the_command_for_a_torch_file(room, pipe):
    """The one that takes it."""
    code, _, err = pipe("seal", "torch.pt", "new", "--recipient", "me.pub")
    assert (code, "secure-cnn archive import" in err) == (6, True)
