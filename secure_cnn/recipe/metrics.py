"""`metrics.jsonl`: a line of JSON an epoch, for whatever follows a run while it goes on.

Each line is an object with the keys of `EpochRecord`, always all of them, in its order:

    variant epoch step seconds learning_rate test_loss test_accuracy train_loss epsilon

`epoch` counts from 1 and `step` the optimizer's steps; `seconds` are those of the epoch; losses are
in nats. What is not known or no number is null: `train_loss` in a private run, its baseline
included, since no epsilon covers it, and `epsilon` in a training that is not private.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from secure_cnn.errors import RunError
from secure_cnn.files import open_regular, write_at, write_file
from secure_cnn.record import EpochRecord

__all__ = ["append_metrics", "write_metrics"]


def write_metrics(path: Path, epochs: Iterable[EpochRecord]) -> None:
    """Makes the file hold these epochs and no others; one that does already is left as it is."""
    content = b"".join(map(_line, epochs))
    try:
        if not path.is_file() or path.read_bytes() != content:
            write_file(path, content, overwrite=True)
    except OSError as error:
        raise _unwritten(path, error) from error


def append_metrics(path: Path, epoch: EpochRecord) -> None:
    """Adds an epoch's line; it is on the disk when this returns."""
    try:
        fd = open_regular(path, os.O_WRONLY | os.O_CREAT, follow=False)
        try:
            write_at(fd, memoryview(_line(epoch)), os.fstat(fd).st_size)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise _unwritten(path, error) from error


def _line(epoch: EpochRecord) -> bytes:
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(epoch).items()
    }
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def _unwritten(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: expected a file that can be written: {error.strerror or error}")
