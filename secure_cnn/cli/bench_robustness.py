"""`secure-cnn bench robustness`: what the standard evaluation costs, beside its reference."""

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.table import Table

import defenses
from defenses.threat import Norm
from secure_cnn.bench.robustness import judges, measure_robustness
from secure_cnn.bench.step import Workload, document, subset
from secure_cnn.checkpoint import read_model
from secure_cnn.cli.keys import IdentityFile, PassphraseFile, unlocking_from
from secure_cnn.cli.options import message
from secure_cnn.data import load_data
from secure_cnn.memory import keep_freed_memory
from secure_cnn.printable import Terminal
from secure_cnn.record import Row, version

__all__ = ["robustness_command"]


def robustness_command(
    *,
    checkpoint: Annotated[Path, typer.Argument(help="A model.sealed or model.safetensors file.")],
    data: Annotated[str, typer.Option(help="Its test images are attacked.")],
    eps: Annotated[float, typer.Option(help="Size of the perturbation.")],
    norm: Annotated[str, typer.Option(help="linf, l2 or l1.")] = "linf",
    samples: Annotated[int, typer.Option(help="The first so many test images.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Images judged at once.")] = 100,
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this file.")
    ] = None,
) -> None:
    """Time AutoAttack on a checkpoint, and pyautoattack in turn with it where it is installed."""
    keep_freed_memory()
    loaded = read_model(checkpoint, unlocking=unlocking_from(identity, passphrase_file, []))
    variants = judges(defenses.ThreatModel(norm=cast(Norm, norm), eps=eps))
    if "pyautoattack" not in variants:
        message("skipped pyautoattack: it is not installed")
    load = Workload(
        case=loaded.architecture.model,
        model=loaded.model,
        split=subset(load_data(data).test, samples),
    )
    rows = measure_robustness(load, variants, batch_size=batch_size)
    Terminal().print(_table(rows))
    if json_file is not None:
        rivals = {"pyautoattack": version("pyautoattack")} if len(variants) > 1 else {}
        document(rows, rivals=rivals).write(json_file)


def _table(rows: list[Row]) -> Table:
    """Every row, with its interval."""
    table = Table()
    for column in ("variant", "metric", "median", "95 % interval"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        unit = "" if row.unit == "1" else f" {row.unit}"
        interval = f"{row.low:.3f}-{row.high:.3f}"
        table.add_row(row.variant, row.metric, f"{row.median:.3f}{unit}", interval)
    return table
