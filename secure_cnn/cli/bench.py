"""`secure-cnn bench`: what each protection costs, as a table and as JSON."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table

import defenses
from defenses import OBJECTIVES, AdversarialObjective, adversarial_objective
from defenses.training.objective import Precision
from secure_cnn.bench import (
    CASES,
    RIVALS,
    Protection,
    Workload,
    copies_against,
    copies_makers,
    document,
    kernel_choices,
    measure_memory,
    measure_steps,
    noise_share,
    protections,
    rival_step,
    stepper,
    workload,
)
from secure_cnn.cli.bench_archive import archive
from secure_cnn.cli.bench_compare import compare_command
from secure_cnn.cli.bench_overhead import overhead_command
from secure_cnn.cli.bench_robustness import robustness_command
from secure_cnn.memory import keep_freed_memory
from secure_cnn.printable import Terminal
from secure_cnn.record import Row

__all__ = ["app", "group", "step"]

_BFLOAT16 = "-bfloat16"

app = typer.Typer(help="What each protection costs against plain training.", no_args_is_help=True)
app.command("overhead")(overhead_command)
app.command("robustness")(robustness_command)
app.command("compare")(compare_command)
app.command()(archive)


@app.callback()
def group() -> None:
    """What each protection costs against plain training."""
    # torch's profiler writes a line at each start and stop, and one for a GPU that is not there, on
    # stderr. No level silences the first alone; whoever wants them sets the variable.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@app.command()
def step(
    case: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(CASES)}.")] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Time adversarial training too: {', '.join(OBJECTIVES)}; with {_BFLOAT16} behind "
            "the name with the attack's convolutions in bfloat16."
        ),
    ] = None,
    rival: Annotated[
        list[str] | None, typer.Option(help=f"Time others too: {', '.join(RIVALS)}.")
    ] = None,
    private: Annotated[
        bool, typer.Option(help="Time each with DP-SGD too, where its losses allow that.")
    ] = True,
    copies: Annotated[
        int | None,
        typer.Option(
            help="Time a private step on so many copies of each example, and as many plain steps."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 15,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory too.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Print the clipping kernel of each layer.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this file.")
    ] = None,
) -> None:
    """Time one training step of every variant, in turn within one run."""
    keep_freed_memory()
    threat = defenses.ThreatModel(norm="linf", eps=8 / 255)
    methods = {name: _objective(name, threat) for name in objective or []}
    loads = [workload(name) for name in case or ["compact"]]
    rows: list[Row] = []
    console = Terminal(stderr=True, wrap=True)
    for load in track(loads, "timing", console=console, disable=not console.is_terminal):
        makers = _makers(load, protections(methods, private=private), rival or [], copies)
        steps = {name: make() for name, make in makers.items()}
        rows += measure_steps(load.case, steps, rounds=rounds, copies=copies_against(copies))
        rows += [
            noise_share(load, row.median, rounds=rounds)
            for row in rows
            if (row.case, row.variant, row.metric) == (load.case, "private", "time")
        ]
        if memory:
            rows += measure_memory(load, makers)
    Terminal().print(_table(rows))
    if json_file is not None:
        document(rows).write(json_file)
    if kernels:
        for load in loads:
            Terminal().print(_kernel_table(load))


def _objective(name: str, threat: defenses.ThreatModel) -> AdversarialObjective:
    """Of that name, with the attack's convolutions in the precision that it ends in."""
    precision: Precision = "bfloat16" if name.endswith(_BFLOAT16) else "float32"
    return adversarial_objective(
        cast(Any, name.removesuffix(_BFLOAT16)), threat, precision=precision
    )


def _makers(
    load: Workload, variants: Mapping[str, Protection], rivals: Sequence[str], copies: int | None
) -> dict[str, Callable[[], Callable[[], None]]]:
    """What makes the step of every variant, in the order of the table."""
    makers = {name: partial(stepper, load, variant) for name, variant in variants.items()}
    return makers | copies_makers(load, copies) | {n: partial(rival_step, load, n) for n in rivals}


def _table(rows: list[Row]) -> Table:
    """Seconds and ratio of every variant."""
    rounds = sorted({row.n for row in rows if row.metric == "time"})
    caption = f"rounds: {' or '.join(map(str, rounds))}"
    for row in (row for row in rows if row.metric == "copies_ratio"):
        words = f"{row.median:.2f} ({row.low:.2f}-{row.high:.2f})"
        caption += f"\n{row.case}: {row.variant} ÷ as many plain steps: {words}"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    for column in ("case", "variant", "ms/step", "÷ plain", "95 %", "memory ÷"):
        name = column in ("case", "variant")
        table.add_column(column, justify="left" if name else "right", no_wrap=True)
    ratios = {(row.case, row.variant): row for row in rows if row.metric == "time_ratio"}
    memory = {(row.case, row.variant): row for row in rows if row.metric == "memory_ratio"}
    for row in (row for row in rows if row.metric == "time"):
        ratio = ratios[row.case, row.variant]
        peak = memory.get((row.case, row.variant))
        table.add_row(
            row.case,
            row.variant,
            f"{1000 * row.median:.1f}",
            f"{ratio.median:.2f}",
            f"{ratio.low:.2f}-{ratio.high:.2f}",
            "–" if peak is None else f"{peak.median:.2f}",
        )
    return table


def _kernel_table(load: Workload) -> Table:
    """Which kernel the tuner picked for each layer, and what the runner-up would have taken."""
    table = Table(title=f"clipping kernels of {load.case}")
    for column in ("layer", "input", "kernel", "ms", "next best", "ms"):
        table.add_column(column)
    for choice in kernel_choices(load):
        ranked = sorted(choice.seconds.items(), key=lambda item: item[1])
        shown = [cell for name, s in ranked[:2] for cell in (name, f"{1000 * s:.2f}")]
        shape = "x".join(str(size) for size in choice.inputs)
        table.add_row(choice.layer, shape, *(shown or [choice.kernel]))
    return table
