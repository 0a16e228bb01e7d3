"""What sealing a checkpoint costs, against saving it plainly and against sealing it otherwise.

All variants write the same tensors to the same folder, in turn within one run, each from a disk at
rest and over the file of the round before: what a call left to be written would else be paid by the
next. Two comparisons are kept apart: `save_vs_…` is against a rival as people call it,
`durable_save_vs_…` against the same call followed by a sync. Ours always syncs, so that a power cut
loses nothing.

There are two loads, too. A `load` ends when the values are in the tensors of a model that was
there before, as after `load_state_dict`: ours decrypts into them, rivals load and copy. A
`fresh_load` ends when each value of new tensors was read once. The call of
`safetensors.torch.load_file` alone reads nothing: it maps the file, which is read when the values
are used.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch

from secure_cnn import archive
from secure_cnn.archive.format.stream import OVERHEAD, create_stream
from secure_cnn.bench.memory import resident_growth
from secure_cnn.bench.rivals import ArchiveRival, Tensors, raw_cipher
from secure_cnn.bench.timing import measured_row, ratios, take_turns
from secure_cnn.errors import RunError
from secure_cnn.record import Row

__all__ = [
    "ArchiveWorkload",
    "Turn",
    "archive_workload",
    "in_turn",
    "measure_archive",
    "measure_cipher",
    "measure_head",
    "measure_size",
    "measure_stall",
]

SEALED = "sealed"
SIGNED = "sealed+signed"

_TENSORS = 100
_MIB = 1 << 20
_LEAST_TIMED = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ArchiveWorkload:
    """A checkpoint, and the empty folder to write it to: its file system is measured too."""

    case: str
    tensors: Tensors
    folder: Path


def archive_workload(mebibytes: int, folder: Path) -> ArchiveWorkload:
    """A checkpoint of 100 random float32 tensors, each one hundredth of the whole."""
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
    """A call to time, and what comes before it (a disk at rest) and after it and is not timed."""

    call: Callable[[], object]
    before: Callable[[], object] = os.sync
    after: Callable[[], object] = bool


def in_turn(
    turns: Mapping[str, Turn], *, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each call, round by round, in an order drawn anew; one round first for warmth."""

    def timed(turn: Turn) -> float:
        turn.before()
        start = clock()
        turn.call()
        seconds = clock() - start
        turn.after()
        return seconds

    calls = {name: partial(timed, turn) for name, turn in turns.items()}
    return take_turns(calls, rounds=rounds, warmup=1)


def measure_archive(
    load: ArchiveWorkload,
    rivals: Mapping[str, ArchiveRival],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Times whole saves, whole loads, and the load of one tensor; what ends a load is said above.

    There are rows of `save`, `durable_save`, `load` and `fresh_load` of every variant that has it;
    for ours of the ratios to each rival, such as `load_vs_safetensors`, below 1 if ours is faster;
    and of `one_tensor_vs_load`, against a `fresh_load` of all.
    """
    identity, signer = archive.generate_identity(), archive.generate_signer()
    ours = {SEALED: _sealed(identity, None), SIGNED: _sealed(identity, signer)}
    model = {name: torch.zeros_like(tensor) for name, tensor in load.tensors.items()}
    turns = _turns(load, model, {**ours, **rivals})
    for name, rival in rivals.items():
        path = load.folder / f"{name}.durable"
        durable = partial(_save_and_sync, rival, path, load.tensors)
        turns[f"durable_save {name}"] = Turn(call=durable)
    first = next(iter(load.tensors))
    for name, trusted in ((SEALED, None), (SIGNED, [signer.verifier])):
        one = partial(_load_one, load.folder / name, first, identity, trusted)
        turns[f"one_tensor {name}"] = Turn(call=one)
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


def measure_stall(
    load: ArchiveWorkload, *, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[Row]:
    """How long a training loop stands still at a background save, against copying the tensors.

    There are rows of `stall`, `copy` and `stall_vs_copy`; and of `background_save`, from the call
    to the commit.
    """
    identity, signer = archive.generate_identity(), archive.generate_signer()
    copies = [torch.zeros_like(tensor) for tensor in load.tensors.values()]

    def copy() -> None:
        for target, tensor in zip(copies, load.tensors.values(), strict=True):
            target.copy_(tensor)

    with archive.CheckpointStore(
        load.folder / "store", recipients=[identity.recipient], signer=signer, keep_last=1
    ) as store:

        def save() -> None:
            store.save(cast(archive.State, load.tensors), step=0)

        def save_and_wait() -> None:
            save()
            store.wait()

        turns = {
            "copy": Turn(call=copy),
            "stall": Turn(call=save, after=store.wait),
            "background_save": Turn(call=save_and_wait),
        }
        seconds = in_turn(turns, rounds=rounds, clock=clock)
    rows = [measured_row(load.case, SIGNED, name, own, "s") for name, own in seconds.items()]
    stall = ratios(seconds["stall"], seconds["copy"])
    return [*rows, measured_row(load.case, SIGNED, "stall_vs_copy", stall, "x")]


def measure_head(
    load: ArchiveWorkload, *, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[Row]:
    """Times `inspect`, `add_recipient` and `remove_recipient`, whatever the size of the file."""
    me, other = archive.generate_identity(), archive.generate_identity()
    path = load.folder / "head"
    _sealed(me, None).save(path, load.tensors)

    def add() -> None:
        archive.change_recipients(path, identity=me, add=[other.recipient])

    def remove() -> None:
        archive.change_recipients(path, identity=me, remove=[other.recipient.key_id.hex()])

    turns = {
        "inspect": Turn(call=lambda: archive.inspect(path)),
        "add_recipient": Turn(call=add, after=remove),
        "remove_recipient": Turn(before=add, call=remove),
    }
    seconds = in_turn(turns, rounds=rounds, clock=clock)
    return [measured_row(load.case, SEALED, name, own, "s") for name, own in seconds.items()]


def measure_cipher(
    load: ArchiveWorkload, *, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[Row]:
    """`payload_vs_aesgcm`, the speed of our segments as a part of that of AES-256-GCM alone.

    Both encrypt as many bytes as the workload has, and at least 1 GiB, in warm memory.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in load.tensors.values())
    # Less would time the start of the threads, not the cipher.
    length = max(size, _LEAST_TIMED)
    floe, piece = create_stream(bytes(32), b"", _MIB), _MIB - OVERHEAD

    def segments(calls: int) -> None:
        plain, sealed = memoryview(bytes(floe.piece)), memoryview(bytearray(_MIB))
        for position in range(calls):
            floe.encrypt_into(position, False, plain, sealed)

    turns = {
        "raw": Turn(before=bool, call=partial(_on_threads, raw_cipher(piece), length // piece)),
        "ours": Turn(before=bool, call=partial(_on_threads, segments, length // _MIB)),
    }
    seconds = in_turn(turns, rounds=rounds, clock=clock)
    share = ratios(seconds["raw"], seconds["ours"])
    return [measured_row(load.case, SEALED, "payload_vs_aesgcm", share, "x")]


def measure_size(load: ArchiveWorkload) -> list[Row]:
    """What a sealed file and its making take beyond the tensors.

    There are rows of `size_overhead` of each of our variants, a part of the plain safetensors file;
    and, where the system tells, of `save_memory` and `load_memory` in MiB: the most that a save has
    resident beyond what was there, and a load beyond the tensors that it returns.
    """
    identity, signer = archive.generate_identity(), archive.generate_signer()
    rows = []
    for name, by in ((SEALED, None), (SIGNED, signer)):
        variant, path = _sealed(identity, by), load.folder / name
        saving = resident_growth(partial(variant.save, path, load.tensors))
        info = archive.inspect(path)
        overhead = info.file_length / info.plaintext_length - 1
        rows.append(measured_row(load.case, name, "size_overhead", [overhead], "1"))
        loading = resident_growth(partial(archive.load, path, identity=identity))
        if saving is not None and loading is not None:
            beyond = loading - info.plaintext_length
            rows.append(measured_row(load.case, name, "save_memory", [saving / _MIB], "MiB"))
            rows.append(measured_row(load.case, name, "load_memory", [beyond / _MIB], "MiB"))
    return rows


def _sealed(identity: archive.Identity, signer: archive.Signer | None) -> ArchiveRival:
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
    for tensor in load(path).values():
        tensor.sum()


def _save_and_sync(rival: ArchiveRival, path: Path, tensors: Tensors) -> None:
    """Is on the disk when it returns, as our saves are."""
    rival.save(path, tensors)
    for place in (path, path.parent):
        fd = os.open(place, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _load_one(
    path: Path, name: str, identity: archive.Identity, trusted: Sequence[archive.Verifier] | None
) -> None:
    state = archive.load(path, identity=identity, trusted=trusted, only=[name])
    cast(Tensors, state)[name].sum()


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


def _on_threads(work: Callable[[int], None], calls: int) -> None:
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [max(1, calls // threads)] * threads))
