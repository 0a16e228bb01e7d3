"""`secure-cnn bench`: what each protection costs, as a table and as JSON."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import defenses
from secure_cnn.bench import Workload, document, measure_steps, protections, synthetic
from secure_cnn.data import DataSpec
from secure_cnn.errors import RunError
from secure_cnn.models import build_model
from secure_cnn.report import Row

__all__ = ["app", "group", "step", "workload"]

app = typer.Typer(help="What each protection costs against plain training.", no_args_is_help=True)

# Model, image shape and batch size of the published table.
CASES: dict[str, tuple[tuple[int, int, int], int]] = {
    "compact": ((1, 28, 28), 256),
    "vgg11": ((3, 32, 32), 64),
    "resnet20": ((3, 32, 32), 64),
    "resnet18": ((3, 64, 64), 32),
}


@app.callback()
def group() -> None:
    """What each protection costs against plain training."""


@app.command()
def step(
    case: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(CASES)}.")] = None,
    objective: Annotated[
        list[str] | None, typer.Option(help="Adversarial methods to time too.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 15,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this file.")
    ] = None,
) -> None:
    """Time one training step of every variant, in turn within one run."""
    threat = defenses.ThreatModel(norm="linf", eps=8 / 255)
    methods = {name: defenses.AdversarialTraining(threat, name) for name in objective or []}  # type: ignore[arg-type]
    loads = [workload(name) for name in case or ["compact"]]
    rows: list[Row] = []
    console = Console(stderr=True)
    for load in track(loads, "timing", console=console, disable=not console.is_terminal):
        rows += measure_steps(load, protections(methods), rounds=rounds)
    Console().print(_table(rows))
    if json_file is not None:
        document(rows).write(json_file)


def workload(name: str) -> Workload:
    """One of the published cases."""
    if name not in CASES:
        raise RunError(f"case: expected one of {', '.join(CASES)}, got {name}")
    shape, batch = CASES[name]
    spec = DataSpec(shape=shape, classes=tuple(str(digit) for digit in range(10)))
    return Workload(case=name, model=build_model(name, spec), split=synthetic(spec, batch))


def _table(rows: list[Row]) -> Table:
    """Seconds and ratio of every variant."""
    table = Table()
    for column in ("case", "variant", "ms/step", "÷ plain", "95 % interval", "rounds"):
        table.add_column(column, justify="left" if column in ("case", "variant") else "right")
    ratios = {(row.case, row.variant): row for row in rows if row.metric == "time_ratio"}
    for row in (row for row in rows if row.metric == "time"):
        ratio = ratios[row.case, row.variant]
        table.add_row(
            row.case,
            row.variant,
            f"{1000 * row.median:.1f}",
            f"{ratio.median:.2f}",
            f"{ratio.low:.2f}-{ratio.high:.2f}",
            str(row.n),
        )
    return table
