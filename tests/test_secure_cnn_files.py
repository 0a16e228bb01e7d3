"""Only regular files are read, written and replaced; what is written is whole or not there."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from secure_cnn import files

KINDS = ("pipe", "device", "socket", "folder")


@pytest.fixture
def strange(tmp_path, request):
    """Something at a path that is no regular file."""
    path = tmp_path / "strange"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        if os.geteuid() != 0:
            pytest.skip("only root makes devices")
        try:  # the null device, by another name
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("no devices here")
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize("strange", KINDS, indirect=True)
def test_what_is_no_file_is_neither_read_nor_replaced(strange):
    """At once, where a pipe would block for ever; and it is there as before."""
    before = os.lstat(strange)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT):
        with pytest.raises(files.IrregularFileError, match="expected a regular file"):
            files.open_regular(strange, flags)
    for overwrite in (False, True):
        with pytest.raises(files.IrregularFileError), files.new_file(strange, overwrite=overwrite):
            pass
    after = os.lstat(strange)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert os.listdir(strange.parent) == ["strange"]


@pytest.mark.parametrize("strange", KINDS, indirect=True)
def test_a_link_to_what_is_no_file_is_no_file(strange, tmp_path):
    """A link is followed to what it leads to, which is then what counts."""
    link = tmp_path / "link"
    link.symlink_to(strange)
    with pytest.raises(files.IrregularFileError):
        files.open_regular(link)
    with pytest.raises(files.IrregularFileError, match="symbolic link"):
        files.check_target(link)


def test_a_link_to_a_file_is_read_and_not_replaced(tmp_path):
    """Unless the caller wants no links at all."""
    (tmp_path / "file").write_bytes(b"hello")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with files.reading(tmp_path / "link") as file:
        assert file.read() == b"hello"
    with pytest.raises(OSError, match="symbolic link"):
        files.open_regular(tmp_path / "link", follow=False)
    with (
        pytest.raises(files.IrregularFileError),
        files.new_file(tmp_path / "link", overwrite=True),
    ):
        pass
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("path", ["a\0b", 7, None, "\ud800", b"\0"])
def test_what_is_no_path_is_an_error_of_the_system(path):
    """Not a ValueError, and above all not the open file of that number."""
    with pytest.raises(OSError, match="expected a path"):
        files.open_regular(path)


@pytest.fixture(params=[True, False], ids=["unnamed", "named"])
def unnamed(request, monkeypatch):
    """Whether the system has files without a name."""
    if not request.param:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return request.param


def test_a_file_is_there_whole_or_not_at_all(tmp_path, unnamed):
    """Under both ways of writing: new, refused, replaced, and given up."""
    path = tmp_path / "a"
    with files.new_file(path, overwrite=False, mode=0o600) as fd:
        os.write(fd, b"one")
        assert not path.exists()
        assert len(os.listdir(tmp_path)) == (0 if unnamed else 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError), files.new_file(path, overwrite=False):
        pass
    with files.new_file(path, overwrite=True) as fd:
        os.write(fd, b"two")
        assert path.read_bytes() == b"one"
    with pytest.raises(KeyboardInterrupt), files.new_file(path, overwrite=True):
        raise KeyboardInterrupt
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path, unnamed):
    """Nor is a pipe that came meanwhile, where a file may be replaced."""
    path = tmp_path / "a"
    with pytest.raises(FileExistsError), files.new_file(path, overwrite=False):
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    path.unlink()
    with pytest.raises(files.IrregularFileError), files.new_file(path, overwrite=True):
        os.mkfifo(path)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["a" * 255, "\N{PILE OF POO}" * 63, "é" * 127])
def test_a_name_as_long_as_the_system_takes_can_be_written(tmp_path, unnamed, name):
    """The temporary name beside it is no longer than the name itself may be."""
    with files.new_file(tmp_path / name, overwrite=True) as fd:
        os.write(fd, b"one")
    assert os.listdir(tmp_path) == [name]


KILLED = """
import os, sys, time
from secure_cnn import files
if sys.argv[2] == "named":
    del os.O_TMPFILE
with files.new_file(sys.argv[1], overwrite=True, mode=0o600) as fd:
    os.write(fd, b"secret")
    print("writing", flush=True)
    time.sleep(60)
"""


def killed(path, how):
    """A writer that was killed in the middle."""
    command = [sys.executable, "-c", KILLED, str(path), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"writing\n"
        yield
        child.send_signal(signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL


def test_kill_leaves_nothing_where_files_need_no_name(tmp_path):
    """`kill -9` in the middle of a write."""
    for _ in killed(tmp_path / "a", "unnamed"):
        pass
    if hasattr(os, "O_TMPFILE"):
        assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path, unnamed):
    """Elsewhere a file of mode 0600 is left, for so long; a living writer's is not touched."""
    for _ in killed(tmp_path / "a", "named"):
        (left,) = tmp_path.iterdir()
        assert stat.S_IMODE(left.stat().st_mode) == 0o600
        with files.new_file(tmp_path / "a", overwrite=True):
            pass
        assert left.exists()
    assert left.read_bytes() == b"secret"
    (tmp_path / ".a.not-ours.tmp").touch()
    with files.new_file(tmp_path / "a", overwrite=True):
        pass
    assert sorted(os.listdir(tmp_path)) == [".a.not-ours.tmp", "a"]


def test_a_file_system_without_unnamed_files_is_written_to(tmp_path, monkeypatch):
    """It says so, and the file gets a name from the start."""
    real = os.open

    def refusing(path, flags, *more, **settings):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *more, **settings)

    monkeypatch.setattr(os, "open", refusing)
    with files.new_file(tmp_path / "a", overwrite=False) as fd:
        os.write(fd, b"one")
        assert len(os.listdir(tmp_path)) == 1
    assert Path(tmp_path, "a").read_bytes() == b"one"


def test_every_reader_of_data_and_records_refuses_a_pipe(tmp_path):
    """At once, and in the words of its room; what writes a page or a state leaves it a pipe."""
    import defenses
    from defenses.measuring.journal import Journal
    from defenses.measuring.journal import write_text as write_state
    from secure_cnn.data import binary, load_data
    from secure_cnn.errors import DataError, RunError
    from secure_cnn.record import RunRecord
    from secure_cnn.record.document import write_text

    (tmp_path / "classes" / "a").mkdir(parents=True)
    (tmp_path / "classes" / "b").mkdir()
    pipes = [tmp_path / name for name in ("a.npz", "classes/a/1.png", "classes/b/1.png", "a.gz")]
    for pipe in (*pipes, tmp_path / "classes/a/2.png", tmp_path / "classes/b/2.png"):
        os.mkfifo(pipe)
    for read, error in (
        (lambda: load_data(str(pipes[0])), DataError),
        (lambda: load_data(str(tmp_path / "classes")), DataError),
        (lambda: binary.mnist_source("mnist", [pipes[3]] * 4, ("a", "b")), DataError),
        (lambda: binary.cifar_source("cifar10", pipes[3], ("a", "b")), DataError),
        (lambda: RunRecord.read(pipes[3]), RunError),
        (lambda: write_text(pipes[3], "text"), RunError),
        (lambda: write_state(pipes[3], "text"), OSError),
        (lambda: Journal(pipes[3], {}), defenses.EvaluationError),
    ):
        with pytest.raises(error, match=r"regular file|another kind"):
            read()
    assert all(stat.S_ISFIFO(os.lstat(pipe).st_mode) for pipe in pipes)


def test_the_commands_on_sealed_files_clean_up_when_they_are_ended(tmp_path):
    """SIGTERM where files need a name: the half-written plain file goes."""
    code = KILLED.replace('print("writing", flush=True)\n    time.sleep(60)', "work()").replace(
        "from secure_cnn import files",
        "import signal, typer\nfrom secure_cnn import files\nfrom secure_cnn.cli import archive\n"
        "def work():\n    print('writing', flush=True)\n    time.sleep(60)\n"
        "archive._tidy(typer.Context(typer.main.get_command(archive.app)))",
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a"), "named"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"writing\n"
        assert len(os.listdir(tmp_path)) == 1
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []
