"""`secure-cnn bench strategies`: what each way of training faster or better is worth."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, cast

import typer
from torch import nn

from secure_cnn.bench.plain_training import PlainTraining
from secure_cnn.bench.strategies import (
    STRATEGIES,
    StrategyLog,
    StrategySettings,
    measure_strategies,
    strategies,
)
from secure_cnn.bench.timing import document
from secure_cnn.cli.bench_tables import strategies_table
from secure_cnn.cli.network import ModelName, ModelOptions, own_network
from secure_cnn.cli.options import Background, ImageFit, ImageSize, JsonFile, message, number
from secure_cnn.data import DataSpec, ImageReading, load_data
from secure_cnn.data.reading import Fit
from secure_cnn.engine import keep_freed_memory
from secure_cnn.models import Architecture
from secure_cnn.own_network import OwnNetwork
from secure_cnn.printable import Terminal
from secure_cnn.recipe.named import named_recipe
from secure_cnn.recipe.timed import RecipeTraining

__all__ = ["strategies_command", "strategies_way_on"]

_DEFAULT = StrategySettings()
_WIDEST = 160


def strategies_way_on() -> str:
    """The way on after a Ctrl-C."""
    return "the same command goes on from the file of --state, if it has one"


def strategies_command(
    *,
    model: ModelName = "compact",
    model_option: ModelOptions = None,
    data: Annotated[
        str, typer.Option(help="digits, fashion-mnist, mnist, cifar10, a folder or a .npz file.")
    ] = "fashion-mnist",
    image_size: ImageSize = None,
    image_fit: ImageFit = "crop",
    background: Background = "white",
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Only these, repeatable: {', '.join(STRATEGIES)}; else all but bfloat16."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Measure this recipe of secure-cnn recipes too, as it is; a plain one."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each.")] = _DEFAULT.seeds,
    target: Annotated[
        float, typer.Option(help="Accuracy on the test images to which the time is taken.")
    ] = _DEFAULT.target,
    epochs: Annotated[int, typer.Option(help="Of the loop that all are held against.")] = 10,
    batch: Annotated[int, typer.Option(help="Images a step of that loop.")] = 64,
    learning_rate: Annotated[
        float, typer.Option(parser=number, metavar="NUMBER", help="Its rate at the beginning.")
    ] = 0.03,
    flip: Annotated[
        bool, typer.Option("--flip", help="Mirror half of the images, in all of them.")
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option(help="Keep each training's result in this file, and go on from it."),
    ] = None,
    processor_time: Annotated[
        bool,
        typer.Option(
            "--processor-time",
            help="Count the processor's seconds for this process, on a machine that does more.",
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Train with each strategy, in turn over seeds, and compare accuracy, recall and time."""
    keep_freed_memory()
    settings = StrategySettings(seeds=seeds, target=target)
    reading = ImageReading(
        size=image_size, fit=cast(Fit, image_fit), background=cast(str, background)
    )
    images = load_data(data, reading=reading)
    network, make = _networks(model, own_network(model, model_option or []), images.spec)
    plain = PlainTraining(make=make, epochs=epochs, batch_size=batch, learning_rate=learning_rate)
    case = f"{network}, {images.name}, {epochs} epochs, batch {batch}, target {100 * target:g} %"
    counted = "processor" if processor_time else "wall"
    conditions = {
        "case": case,
        "images": images.fingerprint,
        "rate": str(learning_rate),
        "flips": str(flip),
        "target": str(target),
        "clock": counted,
    }
    trained = strategies(plain, strategy or [])
    if recipe is not None:
        named = named_recipe(recipe)
        trained[named.name] = RecipeTraining(recipe=named.recipe)
        conditions[f"recipe {named.name}"] = json.dumps(named.settings)
    rows = measure_strategies(
        trained,
        images,
        settings=settings,
        case=case,
        clock=time.process_time if processor_time else time.perf_counter,
        log=StrategyLog.taken_up(state, conditions),
        keep=lambda log: None if state is None else log.write(state),
        tell=lambda name, seed, epoch, right: message(
            f"seed {seed + 1} of {seeds}, {name}: epoch {epoch}, accuracy {100 * right:.2f} %"
        ),
    )
    console = Terminal(width=None if Terminal().is_terminal else _WIDEST)
    console.print(strategies_table(rows, target))
    if json_file is not None:
        document(rows).write(json_file)


def _networks(
    text: str, own: OwnNetwork | None, spec: DataSpec
) -> tuple[str, Callable[[int], nn.Module]]:
    """The name of a network, and what makes a new one by its seed."""
    name = text if own is None else own.name
    architecture = Architecture.for_data(name, spec, options={} if own is None else own.options)
    return name, lambda seed: architecture.build(generator_seed=seed, network=own)
