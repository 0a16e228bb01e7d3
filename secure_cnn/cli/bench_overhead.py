"""`secure-cnn bench overhead`: what every protection costs, as a table, as JSON and as a page."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.progress import track

import defenses
from defenses import OBJECTIVES, AdversarialObjective, adversarial_objective
from secure_cnn.bench import Protection, combinations
from secure_cnn.bench.memory import MakeStep
from secure_cnn.bench.overhead import OverheadSettings, on_this_machine, overhead, overhead_workload
from secure_cnn.bench.rivals import ARCHIVE_RIVALS, RIVALS, RivalSaver, archive_rivals, rival_step
from secure_cnn.bench.scaling import AXES, measure_scaling
from secure_cnn.bench.step import Workload
from secure_cnn.bench.timed_training import TrainedSettings, measure_trained
from secure_cnn.cli.bench_tables import cost_table, exponent_table, parts_table, trained_table
from secure_cnn.cli.network import ModelName, ModelOptions, network
from secure_cnn.cli.options import (
    Background,
    ImageFit,
    ImageSize,
    JsonFile,
    message,
    number,
)
from secure_cnn.data import ImageReading, load_data
from secure_cnn.data.reading import Fit
from secure_cnn.engine import keep_freed_memory
from secure_cnn.pages import write_bench
from secure_cnn.printable import Terminal
from secure_cnn.record import PLAIN, Row, noise_checks

__all__ = ["overhead_command"]

_DEFAULT, _TRAINED = OverheadSettings(), TrainedSettings()
_ITERATIVE = ("pgd", "trades", "mart")
_WIDEST = 160


def overhead_command(
    *,
    model: ModelName = "compact",
    model_option: ModelOptions = None,
    data: Annotated[
        str, typer.Option(help="digits, fashion-mnist, mnist, cifar10, a folder or a .npz file.")
    ] = "digits",
    image_size: ImageSize = None,
    image_fit: ImageFit = "crop",
    background: Background = "white",
    batch: Annotated[int, typer.Option(help="Images a step.")] = _DEFAULT.batch_size,
    objective: Annotated[
        list[str] | None,
        typer.Option(help=f"Adversarial training, repeatable: {', '.join(OBJECTIVES)}."),
    ] = None,
    eps: Annotated[
        float,
        typer.Option(
            parser=number,
            metavar="NUMBER",
            help="Size of the perturbation, linf.",
            show_default="8/255",
        ),
    ] = 8 / 255,
    private: Annotated[bool, typer.Option(help="With DP-SGD, alone and combined.")] = True,
    average: Annotated[bool, typer.Option(help="With averaged weights.")] = True,
    sealed: Annotated[
        bool, typer.Option(help="With sealed checkpoints, in the loop and beside it.")
    ] = True,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = _DEFAULT.steps,
    rival: Annotated[
        list[str] | None, typer.Option(help=f"Others too: {', '.join((*RIVALS, *ARCHIVE_RIVALS))}.")
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
    json_file: JsonFile = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write a page here.")] = None,
) -> None:
    """Time, memory and disk of each protection against plain training, all in one run."""
    keep_freed_memory()
    settings = OverheadSettings(batch_size=batch, steps=save_every, rounds=rounds, memory=memory)
    threat = defenses.ThreatModel(norm="linf", eps=eps)
    names = objective or ["n-fgsm"]
    made = partial(combinations, private=private, average=average)
    variants = made(_methods(names, threat, steps=None), sealed=sealed)
    reading = ImageReading(
        size=image_size, fit=cast(Fit, image_fit), background=cast(str, background)
    )
    images = load_data(data, reading=reading)
    measured = network(model, images.spec, model_option or [])
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
    load: Workload, names: Sequence[str], plain: Protection
) -> tuple[dict[str, MakeStep], dict[str, Protection], dict[str, str]]:
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
        message(f"skipped {name}: {reason}")
    savers = {
        f"saved-{name}": replace(plain, saver=partial(RivalSaver, each))
        for name, each in here.items()
    }
    told = {name: version for one in here.values() for name, version in one.versions.items()}
    return steps, savers, told


def _shown(axes: list[str]) -> Iterator[str]:
    console = Terminal(stderr=True, wrap=True)
    yield from track(axes, "scaling", console=console, disable=not console.is_terminal)


def _tell(rows: list[Row]) -> None:
    # A file or a pipe has no width: nothing is cut there.
    console = Terminal(width=None if Terminal().is_terminal else _WIDEST)
    console.print(cost_table(rows))
    console.print(parts_table(rows))
    for table in (exponent_table(rows), trained_table(rows)):
        if table.row_count:
            console.print(table)
    for check in noise_checks(rows):
        Terminal(stderr=True).print(check.verdict, style="" if check.quiet else "bold red")
