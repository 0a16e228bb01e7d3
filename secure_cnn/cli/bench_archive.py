"""`secure-cnn bench archive`: what sealing a checkpoint costs, as a table and as JSON."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from secure_cnn.bench.archive import measure_archive
from secure_cnn.bench.archive_parts import (
    measure_cipher,
    measure_head,
    measure_size,
    measure_stall,
)
from secure_cnn.bench.archive_rivals import ARCHIVE_RIVALS, archive_rivals
from secure_cnn.bench.archive_workload import archive_workload
from secure_cnn.bench.step import document
from secure_cnn.cli.options import message
from secure_cnn.printable import Terminal
from secure_cnn.record import Row

__all__ = ["archive"]


def archive(
    mebibytes: Annotated[
        list[int] | None, typer.Option("--size", help="MiB of float32 tensors; may be repeated.")
    ] = None,
    rival: Annotated[
        list[str] | None, typer.Option(help=f"Time others too: {', '.join(ARCHIVE_RIVALS)}.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where to write: its file system is measured too.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 7,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this file.")
    ] = None,
) -> None:
    """Time saving, loading and stalls of sealed checkpoints, in turn within one run."""
    rivals, skipped = archive_rivals(rival or ["torch.save", "safetensors"])
    for name, reason in skipped.items():
        message(f"skipped {name}: {reason}")
    rows: list[Row] = []
    for size in mebibytes or [100]:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            load = archive_workload(size, Path(place))
            rows += measure_size(load)
            rows += measure_archive(load, rivals, rounds=rounds)
            rows += measure_stall(load, rounds=rounds)
            rows += measure_head(load, rounds=rounds)
            rows += measure_cipher(load, rounds=rounds)
    Terminal().print(_table(rows))
    if json_file is not None:
        told = {name: version for one in rivals.values() for name, version in one.versions.items()}
        document(rows, rivals=told).write(json_file)


def _table(rows: list[Row]) -> Table:
    """Every row, seconds as milliseconds."""
    table = Table()
    for column in ("case", "variant", "metric", "median", "95 % interval", "rounds"):
        table.add_column(column, justify="left" if column in ("case", "variant") else "right")
    for row in rows:
        low, median, high = row.words
        table.add_row(row.case, row.variant, row.metric, median, f"{low}-{high}", str(row.n))
    return table
