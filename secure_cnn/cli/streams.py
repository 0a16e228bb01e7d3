"""Standard input and output where a file is meant, `-`: bytes, whole, and never on a terminal."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

import typer

from secure_cnn.archive import StorageError
from secure_cnn.archive.storage import Path as AnyPath
from secure_cnn.archive.storage import Spool
from secure_cnn.cli.keys import ENVIRONMENT

__all__ = ["source", "target"]

_STREAM = "-"


@contextmanager
def source(place: Path, passphrase_file: Path | None = None) -> Iterator[AnyPath]:
    """What a command reads: the file, or for `-` all that comes on standard input, in memory."""
    if str(place) != _STREAM:
        yield place
        return
    if str(passphrase_file) == _STREAM and not os.environ.get(ENVIRONMENT):
        raise typer.BadParameter(
            f"-: standard input is the file; give the passphrase in a file, or in {ENVIRONMENT}"
        )
    stream = _binary(sys.stdin, "a file on standard input, as in `< FILE`")
    with Spool("standard input") as held:
        try:
            shutil.copyfileobj(stream, held.file)
            held.file.flush()
        except OSError as error:
            raise StorageError(f"{held}: cannot read: {error.strerror}") from error
        yield held


@contextmanager
def target(place: Path) -> Iterator[AnyPath]:
    """What a command writes: a new file, or for `-` standard output, once all of it is there."""
    if str(place) != _STREAM:
        yield place
        return
    stream = _binary(sys.stdout, "standard output in a file or a pipe, as in `> FILE`")
    with Spool("standard output") as held:
        yield held
        held.file.seek(0)
        try:
            shutil.copyfileobj(held.file, stream)
            stream.flush()
        except OSError as error:
            # Python flushes once more at its end, and would fail aloud.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise StorageError(
                f"{held}: cannot write all of it: {error.strerror}; what reads it has a part"
            ) from error


def _binary(stream: TextIO | None, expected: str) -> BinaryIO:
    """The bytes behind a stream, which there must be, and which is no terminal."""
    if stream is None or stream.closed or stream.isatty():
        got = "none" if stream is None or stream.closed else "a terminal"
        raise typer.BadParameter(f"-: expected {expected}, got {got}")
    return stream.buffer
