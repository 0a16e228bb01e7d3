"""What sealing a checkpoint costs, against saving it plainly and against sealing it otherwise.

All variants write the same tensors to the same folder, in turn within one run, each from a disk at
rest and over the file of the round before. Two comparisons are kept apart: `save_vs_…` is against a
rival as people call it, `durable_save_vs_…` against the same call followed by a sync. Ours always
syncs, so that a power cut loses nothing.

There are two loads, too. A `load` ends when the values are in the tensors of a model that was
there before, as after `load_state_dict`: ours decrypts into them, rivals load and copy. A
`fresh_load` ends when each value of new tensors was read once. The call of
`safetensors.torch.load_file` alone reads nothing: it maps the file, which is read when the values
are used.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch

from secure_cnn import archive
from secure_cnn.bench.archive_rivals import ArchiveRival, Tensors
from secure_cnn.bench.archive_workload import (
    SEALED,
    SIGNED,
    ArchiveWorkload,
    Turn,
    in_turn,
    sealed,
)
from secure_cnn.bench.rows import measured_row
from secure_cnn.bench.timing import ratios
from secure_cnn.record import Row

__all__ = ["measure_archive"]


def measure_archive(
    load: ArchiveWorkload,
    rivals: Mapping[str, ArchiveRival],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Times whole saves, whole loads, and the load of one tensor; what ends a load is said above.

    Args:
        rounds: Counted rounds, at least 1.

    Returns:
        `save`, `durable_save`, `load` and `fresh_load` of every variant that has it; for ours the
        ratios to each rival, such as `load_vs_safetensors`, below 1 if ours is faster; and
        `one_tensor_vs_load`, against a `fresh_load` of all.
    """
    identity, signer = archive.generate_identity(), archive.generate_signer()
    ours = {
        SEALED: sealed(identity, None),
        SIGNED: sealed(identity, signer),
    }
    model = {name: torch.zeros_like(tensor) for name, tensor in load.tensors.items()}
    turns = {**_turns(load, model, ours), **_turns(load, model, rivals)}
    for name, rival in rivals.items():
        path = load.folder / f"{name}.durable"
        turns[f"durable_save {name}"] = Turn(call=_then_sync(rival, path, load.tensors))
    first = next(iter(load.tensors))
    for name, trusted in ((SEALED, None), (SIGNED, [signer.verifier])):
        turns[f"one_tensor {name}"] = Turn(
            call=_one_tensor(load.folder / name, first, identity, trusted)
        )
    seconds = in_turn(turns, rounds=rounds, clock=clock)
    rows = []
    for key, own in seconds.items():
        metric, variant = key.split()
        rows.append(measured_row(load.case, variant, metric, own, "s"))
    for name in ours:
        rows += _against(load.case, name, rivals, seconds)
        full = ratios(seconds[f"one_tensor {name}"], seconds[f"fresh_load {name}"])
        rows.append(measured_row(load.case, name, "one_tensor_vs_load", full, "x"))
    return rows


def _turns(
    load: ArchiveWorkload, model: Tensors, variants: Mapping[str, ArchiveRival]
) -> dict[str, Turn]:
    """Save and loads of each variant; each has saved once, so that it can load at once."""
    turns: dict[str, Turn] = {}
    for name, variant in variants.items():
        path = load.folder / name
        variant.save(path, load.tensors)
        turns[f"save {name}"] = Turn(call=partial(variant.save, path, load.tensors))
        if variant.load is not None:
            into = variant.load_into or partial(_load_and_copy, variant.load)
            turns[f"load {name}"] = Turn(call=partial(into, path, model))
            turns[f"fresh_load {name}"] = Turn(call=partial(_load_and_read, variant.load, path))
    return turns


def _load_and_copy(load: Callable[[Path], Tensors], path: Path, model: Tensors) -> None:
    """What `load_state_dict` does with a state that was loaded."""
    loaded = load(path)
    for name, tensor in loaded.items():
        model[name].copy_(tensor)


def _load_and_read(load: Callable[[Path], Tensors], path: Path) -> None:
    """Reads every value once."""
    for tensor in load(path).values():
        tensor.sum()


def _then_sync(rival: ArchiveRival, path: Path, tensors: Tensors) -> Callable[[], None]:
    """A save that is on the disk when it returns, as ours is."""

    def save() -> None:
        rival.save(path, tensors)
        for place in (path, path.parent):
            fd = os.open(place, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

    return save


def _one_tensor(
    path: Path,
    name: str,
    identity: archive.Identity,
    trusted: Sequence[archive.Verifier] | None,
) -> Callable[[], None]:
    """The load of one tensor."""

    def load() -> None:
        state = archive.load(path, identity=identity, trusted=trusted, only=[name])
        cast(Tensors, state)[name].sum()

    return load


def _against(
    case: str,
    variant: str,
    rivals: Mapping[str, ArchiveRival],
    seconds: Mapping[str, Sequence[float]],
) -> list[Row]:
    """Our ratios to each rival; a sync is ours in both comparisons."""
    rows = []
    for rival in rivals:
        short = rival.removesuffix(".save")
        for metric in ("save", "durable_save", "load", "fresh_load"):
            if f"{metric} {rival}" in seconds:
                ours = seconds[f"{metric.removeprefix('durable_')} {variant}"]
                found = ratios(ours, seconds[f"{metric} {rival}"])
                rows.append(measured_row(case, variant, f"{metric}_vs_{short}", found, "x"))
    return rows
