"""`secure-cnn bench overhead`: what every protection costs, as a table, as JSON and as a page."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.progress import track
from rich.table import Table

import defenses
from defenses import OBJECTIVES, AdversarialObjective, adversarial_objective
from secure_cnn.bench import RIVALS, Workload, rival_step
from secure_cnn.bench.archive_rivals import ARCHIVE_RIVALS, archive_rivals
from secure_cnn.bench.memory import MakeStep
from secure_cnn.bench.overhead import (
    OverheadSettings,
    on_this_machine,
    overhead,
    overhead_workload,
)
from secure_cnn.bench.parts import PARTS
from secure_cnn.bench.savers import RivalSaver
from secure_cnn.bench.scaling import AXES, measure_scaling
from secure_cnn.bench.trained import TrainedSettings, measure_trained
from secure_cnn.bench.variant import PLAIN, Variant, combinations
from secure_cnn.cli.network import network
from secure_cnn.data import load_data
from secure_cnn.memory import keep_freed_memory
from secure_cnn.models import MODELS
from secure_cnn.pages import write_bench
from secure_cnn.printable import Terminal
from secure_cnn.record import Row, noise_checks

__all__ = ["overhead_command"]

_DEFAULT, _TRAINED = OverheadSettings(), TrainedSettings()
_ITERATIVE = ("pgd", "trades", "mart")
_WIDEST = 160


def overhead_command(
    *,
    model: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(MODELS)}; or module:callable or file.py:callable, which runs "
            "that code."
        ),
    ] = "compact",
    data: Annotated[
        str, typer.Option(help="digits, fashion-mnist, mnist, cifar10, a folder or a .npz file.")
    ] = "digits",
    batch: Annotated[int, typer.Option(help="Images a step.")] = _DEFAULT.batch_size,
    objective: Annotated[
        list[str] | None,
        typer.Option(help=f"Adversarial training, repeatable: {', '.join(OBJECTIVES)}."),
    ] = None,
    eps: Annotated[float, typer.Option(help="Size of the perturbation, linf.")] = 8 / 255,
    private: Annotated[bool, typer.Option(help="With DP-SGD, alone and combined.")] = True,
    average: Annotated[bool, typer.Option(help="With averaged weights.")] = True,
    sealed: Annotated[
        bool, typer.Option(help="With sealed checkpoints, in the loop and beside it.")
    ] = True,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = _DEFAULT.steps,
    rival: Annotated[
        list[str] | None,
        typer.Option(help=f"Others too: {', '.join((*RIVALS, *ARCHIVE_RIVALS))}."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = _DEFAULT.rounds,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    scaling: Annotated[
        list[str] | None, typer.Option(help=f"How cost grows, repeatable: {', '.join(AXES)}.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Train too: accuracy for the same work and time.")
    ] = False,
    epochs: Annotated[int, typer.Option(help="Of --train.")] = _TRAINED.epochs,
    robust_samples: Annotated[
        int, typer.Option(help="Test images that --train attacks.")
    ] = _TRAINED.robust_samples,
    folder: Annotated[
        Path | None, typer.Option(help="Where checkpoints go: its file system is measured too.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this file.")
    ] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write a page here.")] = None,
) -> None:
    """Time, memory and disk of each protection against plain training, all in one run."""
    keep_freed_memory()
    settings = OverheadSettings(batch_size=batch, steps=save_every, rounds=rounds, memory=memory)
    threat = defenses.ThreatModel(norm="linf", eps=eps)
    names = objective or ["n-fgsm"]
    made = partial(combinations, private=private, average=average)
    variants = made(_methods(names, threat, steps=None), sealed=sealed)
    images = load_data(data)
    measured = network(model, images.spec)
    load = overhead_workload(measured, images, settings)
    steps, savers, told = _rivals(load, rival or [], variants[PLAIN])
    found = overhead(
        measured, images, variants | savers, settings=settings, rivals=steps, folder=folder
    )
    rows = list(found.rows)
    if train:
        trained = TrainedSettings(
            epochs=epochs,
            batch_size=batch,
            save_every=save_every,
            threat=threat,
            robust_samples=robust_samples,
        )
        rows += measure_trained(measured, images, variants, trained, case=load.case)
    for axis in _shown(scaling or []):
        rows += measure_scaling(
            axis,
            # What a save costs does not grow with the work of a step.
            lambda size: made(_methods(names, threat, steps=size.attack_steps), sealed=False),
            rounds=rounds,
        )
    document = on_this_machine(rows, measured, rivals=told)
    _tell(rows)
    if json_file is not None:
        document.write(json_file)
    if page is not None:
        write_bench(page, document)


def _methods(
    names: Sequence[str], threat: defenses.ThreatModel, *, steps: int | None
) -> dict[str, AdversarialObjective]:
    """The objectives, with so many steps where they are iterative; None is their usual number."""
    return {
        name: adversarial_objective(
            cast(Any, name), threat, steps=steps if name in _ITERATIVE else None
        )
        for name in names
    }


def _rivals(
    load: Workload, names: Sequence[str], plain: Variant
) -> tuple[dict[str, MakeStep], dict[str, Variant], dict[str, str]]:
    """Others' steps, the plain training saved by others, and versions; prints who is skipped."""
    steps: dict[str, MakeStep] = {}
    skipped: dict[str, str] = {}
    for name in (name for name in names if name in RIVALS):
        make = partial(rival_step, load, name)
        try:
            make()()
        except Exception as error:  # whatever it is, it is why there is no figure
            skipped[name] = f"{type(error).__name__}: {error}"
        else:
            steps[name] = make
    here, missing = archive_rivals([name for name in names if name not in RIVALS])
    for name, reason in (skipped | missing).items():
        Terminal(stderr=True).print(f"skipped {name}: {reason}")
    savers = {
        f"saved-{name}": replace(plain, saver=partial(RivalSaver, each))
        for name, each in here.items()
    }
    told = {name: version for one in here.values() for name, version in one.versions.items()}
    return steps, savers, told


def _shown(axes: list[str]) -> Iterator[str]:
    """The axes, with a bar on a terminal."""
    console = Terminal(stderr=True, wrap=True)
    yield from track(axes, "scaling", console=console, disable=not console.is_terminal)


def _tell(rows: list[Row]) -> None:
    """The tables on stdout, what to think of them on stderr."""
    # A file or a pipe has no width: nothing is cut there.
    console = Terminal(width=None if Terminal().is_terminal else _WIDEST)
    messages = Terminal(stderr=True)
    console.print(_cost_table(rows))
    console.print(_parts_table(rows))
    for table in (_exponent_table(rows), _trained_table(rows)):
        if table.row_count:
            console.print(table)
    for check in noise_checks(rows):
        messages.print(check.verdict, style="" if check.quiet else "bold red")


def _cost_table(rows: list[Row]) -> Table:
    """What a step of each variant takes."""
    table = _headed("variant", "ms/step", "÷ plain", "95 % interval", "images/s", "MiB", "disk KiB")
    found = {(row.case, row.variant, row.metric): row for row in rows}
    for row in (row for row in rows if row.metric == "images_per_second"):
        time, ratio = (found[row.case, row.variant, name] for name in ("time", "time_ratio"))
        memory = found.get((row.case, row.variant, "memory"))
        disk = found.get((row.case, row.variant, "disk"))
        table.add_row(
            row.variant,
            f"{1000 * time.median:.2f}",
            f"{ratio.median:.2f}",
            f"{ratio.low:.2f}-{ratio.high:.2f}",
            f"{row.median:.0f}",
            "–" if memory is None else f"{memory.median:.2f}",
            "–" if disk is None else f"{disk.median / 1024:.0f}",
        )
    return table


def _parts_table(rows: list[Row]) -> Table:
    """Milliseconds of each part of a step."""
    used = [part for part in PARTS if any(row.metric == f"time_{part}" for row in rows)]
    table = _headed("ms/step", *used)
    parts = {(row.variant, row.metric): row.median for row in rows}
    shown = [row.variant for row in rows if row.metric == "time_other"]
    for variant in shown:
        values = (parts.get((variant, f"time_{part}")) for part in used)
        table.add_row(variant, *("–" if v is None else f"{1000 * v:.2f}" for v in values))
    return table


def _exponent_table(rows: list[Row]) -> Table:
    """How the cost grows, with the standard error."""
    table = _headed("cost grows as a power of", "variant", "exponent", "standard error")
    errors = {(r.case, r.variant): r.median for r in rows if r.metric == "exponent_error"}
    for row in (row for row in rows if row.metric == "exponent"):
        error = errors[row.case, row.variant]
        table.add_row(row.case, row.variant, f"{row.median:.3f}", f"{error:.3f}")
    return table


def _trained_table(rows: list[Row]) -> Table:
    """What each variant came to with the same examples, and in the same time."""
    names = ("accuracy", "macro_recall", "robust_accuracy", "epsilon")
    table = _headed("trained", "with the same", *(name.replace("_", " ") for name in names))
    found = {(row.variant, row.metric): row.median for row in rows}
    for variant in dict.fromkeys(row.variant for row in rows if row.metric == "training_time"):
        for when in ("examples", "time"):
            values = [found.get((variant, f"{name}_same_{when}")) for name in names]
            cells = [
                "–" if v is None else f"{v:.2f}" if name == "epsilon" else f"{100 * v:.1f} %"
                for name, v in zip(names, values, strict=True)
            ]
            table.add_row(variant, when, *cells)
    return table


def _headed(first: str, *others: str) -> Table:
    """An empty table, numbers on the right."""
    table = Table()
    table.add_column(first, no_wrap=True)
    for column in others:
        words = column in ("variant", "with the same")
        table.add_column(column, justify="left" if words else "right")
    return table
