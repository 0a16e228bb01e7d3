"""`secure-cnn bench`: what each protection costs, as a table and as JSON."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.progress import track

import defenses
from defenses import OBJECTIVES, AdversarialObjective, adversarial_objective
from defenses.threat import Norm
from defenses.training.objective import Precision
from secure_cnn.bench import Protection, compare, protections
from secure_cnn.bench import archive as archives
from secure_cnn.bench.loader import LoaderSettings, measure_loader, write_photographs
from secure_cnn.bench.memory import measure_memory
from secure_cnn.bench.rivals import ARCHIVE_RIVALS, RIVALS, archive_rivals, rival_step
from secure_cnn.bench.robustness import judges, measure_robustness
from secure_cnn.bench.step import (
    CASES,
    Workload,
    copies_against,
    copies_makers,
    kernel_choices,
    measure_steps,
    noise_share,
    stepper,
    workload,
)
from secure_cnn.bench.timing import document
from secure_cnn.checkpoint import read_model
from secure_cnn.cli import bench_tables as tables
from secure_cnn.cli.bench_overhead import overhead_command
from secure_cnn.cli.bench_strategies import strategies_command, strategies_way_on
from secure_cnn.cli.keys import IdentityFile, Kek, PassphraseFile, unlocking_from
from secure_cnn.cli.options import (
    Background,
    ImageFit,
    JsonFile,
    interruptible,
    message,
    nothing_kept,
    number,
    reading_for,
)
from secure_cnn.data import load_data
from secure_cnn.engine import keep_freed_memory
from secure_cnn.printable import Terminal
from secure_cnn.record import Measurements, Row, version

__all__ = [
    "app",
    "archive_command",
    "compare_command",
    "group",
    "loader_command",
    "robustness_command",
    "step",
]

_BFLOAT16 = "-bfloat16"
_WORSE = 7

app = typer.Typer(help="What each protection costs against plain training.", no_args_is_help=True)
app.command("overhead")(interruptible(nothing_kept)(overhead_command))
app.command("strategies")(interruptible(strategies_way_on)(strategies_command))


@app.callback()
def group() -> None:
    """What each protection costs against plain training."""
    # torch's profiler writes a line at each start and stop, and one for a GPU that is not there, on
    # stderr. No level silences the first alone; whoever wants them sets the variable.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@app.command("robustness")
@interruptible(nothing_kept)
def robustness_command(
    *,
    checkpoint: Annotated[Path, typer.Argument(help="A model.sealed or model.safetensors file.")],
    data: Annotated[str, typer.Option(help="Its test images are attacked.")],
    image_fit: ImageFit = None,
    background: Background = None,
    eps: Annotated[
        float, typer.Option(parser=number, metavar="NUMBER", help="Size of the perturbation.")
    ],
    norm: Annotated[str, typer.Option(help="linf, l2 or l1.")] = "linf",
    samples: Annotated[int, typer.Option(help="The first so many test images.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Images judged at once.")] = 100,
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    kek: Kek = None,
    json_file: JsonFile = None,
) -> None:
    """Time AutoAttack on a checkpoint, and pyautoattack in turn with it where it is installed."""
    keep_freed_memory()
    loaded = read_model(checkpoint, unlocking=unlocking_from(identity, passphrase_file, kek, []))
    reading = reading_for(loaded, image_fit, background)
    variants = judges(defenses.ThreatModel(norm=cast(Norm, norm), eps=eps))
    if "pyautoattack" not in variants:
        message("skipped pyautoattack: it is not installed")
    load = Workload(
        case=loaded.architecture.model,
        model=loaded.model,
        split=load_data(data, reading=reading).test.first(samples),
    )
    rows = measure_robustness(load, variants, batch_size=batch_size)
    Terminal().print(tables.robustness_table(rows))
    if json_file is not None:
        rivals = {"pyautoattack": version("pyautoattack")} if len(variants) > 1 else {}
        document(rows, rivals=rivals).write(json_file)


@app.command("compare")
def compare_command(
    before: Annotated[Path, typer.Argument(help="The earlier file of `--json`.")],
    after: Annotated[Path, typer.Argument(help="The later one.")],
    tolerance: Annotated[
        float, typer.Option(help="By what part of itself a figure may get worse.")
    ] = 0.05,
    metric: Annotated[
        list[str] | None, typer.Option(help="Only this metric; may be repeated.")
    ] = None,
) -> None:
    """Show what changed beyond the noise; exit code 7 where something got worse than tolerated.

    A figure changed if its intervals before and after do not overlap.
    """
    found = compare(Measurements.read(before), Measurements.read(after), metrics=metric or [])
    worse = found.worse(tolerance)
    console = Terminal(stderr=True)
    for warning in found.warnings:
        console.print(f"warning: {warning}")
    Terminal().print(tables.comparison_table(found, worse))
    for title, rows in (("before", found.only_before), ("after", found.only_after)):
        for row in rows:
            told = f"only {title}: {row.case}, {row.variant}, {row.metric}"
            console.print(told)
    console.print(tables.comparison_summary(found, worse, tolerance))
    if worse:
        raise typer.Exit(_WORSE)


@app.command("archive")
@interruptible(nothing_kept)
def archive_command(
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
    json_file: JsonFile = None,
) -> None:
    """Time saving, loading and stalls of sealed checkpoints, in turn within one run."""
    rivals, skipped = archive_rivals(rival or ["torch.save", "safetensors"])
    for name, reason in skipped.items():
        message(f"skipped {name}: {reason}")
    rows: list[Row] = []
    for size in mebibytes or [100]:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            load = archives.archive_workload(size, Path(place))
            rows += archives.measure_size(load)
            rows += archives.measure_archive(load, rivals, rounds=rounds)
            rows += archives.measure_stall(load, rounds=rounds)
            rows += archives.measure_head(load, rounds=rounds)
            rows += archives.measure_cipher(load, rounds=rounds)
    Terminal().print(tables.archive_table(rows))
    if json_file is not None:
        told = {name: version for one in rivals.values() for name, version in one.versions.items()}
        document(rows, rivals=told).write(json_file)


@app.command("loader")
def loader_command(
    case: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(CASES)}.")] = None,
    workers: Annotated[
        list[int] | None, typer.Option(help="Processes that read ahead; may be repeated.")
    ] = None,
    prefetch: Annotated[
        list[int] | None, typer.Option(help="Batches that each reads ahead; may be repeated.")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="Threads of the computation; may be repeated.")
    ] = None,
    images: Annotated[int, typer.Option(help="Photographs in the folder that is made.")] = 256,
    batch: Annotated[int, typer.Option(help="Images in a physical batch, a divisor of it.")] = 32,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 7,
    json_file: JsonFile = None,
) -> None:
    """Time private training from a folder of JPEGs, and from memory, in turn within one run."""
    keep_freed_memory()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        write_photographs(Path(place), images)
        for count in threads or [torch.get_num_threads()]:
            settings = LoaderSettings(
                images=images,
                batch=batch,
                workers=tuple(workers or [0, 1, 2]),
                prefetch=tuple(prefetch or [2, 8]),
                threads=count,
                rounds=rounds,
            )
            for name in case or ["resnet20"]:
                rows += measure_loader(name, Path(place), settings=settings)
    Terminal().print(tables.loader_table(rows))
    if json_file is not None:
        document(rows).write(json_file)


@app.command()
@interruptible(nothing_kept)
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
    json_file: JsonFile = None,
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
    Terminal().print(tables.step_table(rows))
    if json_file is not None:
        document(rows).write(json_file)
    if kernels:
        for load in loads:
            Terminal().print(tables.kernel_table(load.case, kernel_choices(load)))


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
