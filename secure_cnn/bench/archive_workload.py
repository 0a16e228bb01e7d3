"""What is saved in the measurements of archives, and how a call that writes is timed.

Each call starts from a disk at rest: what the one before left to be written would else be paid by
the next.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from secure_cnn import archive
from secure_cnn.bench.archive_rivals import ArchiveRival, Tensors
from secure_cnn.bench.timing import interleave
from secure_cnn.errors import RunError

__all__ = [
    "SEALED",
    "SIGNED",
    "ArchiveWorkload",
    "Turn",
    "archive_workload",
    "in_turn",
    "sealed",
]

SEALED = "sealed"
SIGNED = "sealed+signed"

_TENSORS = 100
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ArchiveWorkload:
    """What is saved, and where.

    Attributes:
        case: Name of the row in the results.
        tensors: The checkpoint.
        folder: An empty folder; the file system under it is part of what is measured.
    """

    case: str
    tensors: Tensors
    folder: Path


def archive_workload(mebibytes: int, folder: Path) -> ArchiveWorkload:
    """A checkpoint of 100 random float32 tensors, each one hundredth of the whole.

    Args:
        mebibytes: Size of all of them, at least 1.

    Raises:
        RunError: The size is below 1.
    """
    if mebibytes < 1:
        raise RunError(f"size: expected at least 1 MiB, got {mebibytes}")
    generator = torch.Generator().manual_seed(0)
    count = mebibytes * _MIB // 4 // _TENSORS
    tensors = {
        f"layer{index}.weight": torch.randn(count, generator=generator) for index in range(_TENSORS)
    }
    return ArchiveWorkload(case=f"fp32-{mebibytes}MiB", tensors=tensors, folder=folder)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A call to time, with what comes before and after it and is not timed.

    Attributes:
        call: What is timed.
        before: Called first; by default the disk is brought to rest.
        after: Called last.
    """

    call: Callable[[], object]
    before: Callable[[], object] = os.sync
    after: Callable[[], object] = bool


def in_turn(
    turns: Mapping[str, Turn], *, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each call, round by round, in an order drawn anew; one round first for warmth.

    Args:
        rounds: Counted rounds, at least 1.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}

    def timed(name: str, turn: Turn) -> Callable[[], None]:
        def take() -> None:
            turn.before()
            start = clock()
            turn.call()
            seconds[name].append(clock() - start)
            turn.after()

        return take

    interleave(
        {name: timed(name, turn) for name, turn in turns.items()},
        rounds=rounds,
        warmup=1,
        clock=lambda: 0.0,
    )
    return {name: own[-rounds:] for name, own in seconds.items()}


def sealed(identity: archive.Identity, signer: archive.Signer | None) -> ArchiveRival:
    """Our own save and load, in the form of a rival's; signed and verified if there is a signer."""
    trusted = None if signer is None else [signer.verifier]

    def save(path: Path, tensors: Tensors) -> None:
        archive.save(
            path,
            cast(archive.State, tensors),
            recipients=[identity.recipient],
            signer=signer,
            overwrite=True,
        )

    def load(path: Path) -> Tensors:
        return cast(Tensors, archive.load(path, identity=identity, trusted=trusted))

    def load_into(path: Path, tensors: Tensors) -> None:
        state = cast(archive.State, tensors)
        archive.load_into(state, path, identity=identity, trusted=trusted)

    return ArchiveRival(save=save, load=load, load_into=load_into)
