"""What else a sealed checkpoint costs: a standing loop, the head, size and memory."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import cast

import torch

from secure_cnn import archive
from secure_cnn.archive.format.stream import OVERHEAD, create_stream
from secure_cnn.archive.store.store import CheckpointStore
from secure_cnn.bench.archive_rivals import encrypt_raw
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

__all__ = ["measure_cipher", "measure_head", "measure_size", "measure_stall"]

_MIB = 1 << 20
_LEAST_TIMED = 1 << 30


def measure_stall(
    load: ArchiveWorkload, *, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[Row]:
    """How long a training loop stands still at a background save, against copying the tensors.

    Args:
        rounds: Counted rounds, at least 1.

    Returns:
        `stall`, `copy` and `stall_vs_copy`; and `background_save`, from the call to the commit.
    """
    identity, signer = archive.generate_identity(), archive.generate_signer()
    copies = [torch.zeros_like(tensor) for tensor in load.tensors.values()]

    def copy() -> None:
        for target, tensor in zip(copies, load.tensors.values(), strict=True):
            target.copy_(tensor)

    with CheckpointStore(
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
    """Times what should not depend on the size of the file.

    Args:
        rounds: Counted rounds, at least 1.

    Returns:
        `inspect`, `add_recipient` and `remove_recipient`, in seconds.
    """
    me, other = archive.generate_identity(), archive.generate_identity()
    path = load.folder / "head"
    sealed(me, None).save(path, load.tensors)

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
    """The speed of our segments as a part of that of AES-256-GCM alone, both in warm memory.

    Args:
        load: The workload, of which only the size is used, and at least 1 GiB.
        rounds: Counted rounds, at least 1.

    Returns:
        `payload_vs_aesgcm`: 1 is the speed of the bare cipher, below 1 is slower.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in load.tensors.values())
    # Less would time the start of the threads, not the cipher.
    length = max(size, _LEAST_TIMED)
    threads = len(os.sched_getaffinity(0))
    turns = {
        "raw": Turn(before=bool, call=encrypt_raw(length, _MIB - OVERHEAD, threads)),
        "ours": Turn(before=bool, call=_encrypt_segments(length, threads)),
    }
    seconds = in_turn(turns, rounds=rounds, clock=clock)
    share = ratios(seconds["raw"], seconds["ours"])
    return [measured_row(load.case, SEALED, "payload_vs_aesgcm", share, "x")]


def measure_size(load: ArchiveWorkload) -> list[Row]:
    """What a sealed file and its making take beyond the tensors.

    Returns:
        `size_overhead` of each of our variants, a part of the plain safetensors file; and, where
        the system tells, `save_memory` and `load_memory` in MiB: the most that a save has resident
        beyond what was there, and a load beyond the tensors that it returns.
    """
    identity, signer = archive.generate_identity(), archive.generate_signer()
    rows = []
    for name, by in ((SEALED, None), (SIGNED, signer)):
        variant, path = sealed(identity, by), load.folder / name
        saving = _resident_growth(partial(variant.save, path, load.tensors))
        info = archive.inspect(path)
        overhead = info.file_length / info.plaintext_length - 1
        rows.append(measured_row(load.case, name, "size_overhead", [overhead], "1"))
        loading = _resident_growth(partial(archive.load, path, identity=identity))
        if saving is not None and loading is not None:
            beyond = loading - info.plaintext_length
            rows.append(measured_row(load.case, name, "save_memory", [saving / _MIB], "MiB"))
            rows.append(measured_row(load.case, name, "load_memory", [beyond / _MIB], "MiB"))
    return rows


def _encrypt_segments(length: int, threads: int) -> Callable[[], None]:
    """Our segments of so many bytes in all, on so many threads, from warm memory."""
    floe = create_stream(bytes(32), b"", _MIB)

    def work(calls: int) -> None:
        plain, sealed = memoryview(bytes(floe.piece)), memoryview(bytearray(_MIB))
        for position in range(calls):
            floe.encrypt_into(position, False, plain, sealed)

    calls = max(1, length // _MIB // threads)

    def encrypt() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, [calls] * threads))

    return encrypt


def _resident_growth(work: Callable[[], object]) -> int | None:
    """The most resident bytes during work beyond those before; None where the system hides it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _resident("VmRSS")
        kept = work()
        peak = _resident("VmHWM")
    except OSError:
        return None
    del kept
    return max(0, peak - before)


def _resident(field: str) -> int:
    """A number of bytes from what the system says of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
