"""`secure-cnn audit`: is a recipe's private training what its plan says?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.table import Table
from torch import nn

import privacy
from privacy.audit import AuditReport, AuditSettings
from privacy.audit import audit as audit_training
from privacy.sampling import MapStyle
from secure_cnn.cli.network import ModelName, ModelOptions, own_network, settings_of
from secure_cnn.cli.options import (
    Background,
    ImageFit,
    ImageSize,
    given_settings,
    interruptible,
    make_folder,
    nothing_kept,
    number,
    settings_from,
)
from secure_cnn.data import DataSpec, ImageData
from secure_cnn.engine import keep_freed_memory, training_mode
from secure_cnn.errors import RunError
from secure_cnn.own_network import OwnNetwork, is_own_name
from secure_cnn.pages import write_audit
from secure_cnn.printable import Terminal
from secure_cnn.recipe import Recipe
from secure_cnn.recipe.initial import initial_model
from secure_cnn.recipe.persons import samples_of
from secure_cnn.recipe.seams import Batches, Seams, make_device, make_plan, make_seams
from secure_cnn.record import AuditRecord, RunRecord, hardware, versions

__all__ = ["audit"]

_FAILED = 4
_DEFAULT = Recipe(out="", epsilon=8.0, epochs=60)
_SETTINGS = AuditSettings()


@interruptible(nothing_kept)
def audit(
    *,
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Folder for audit.json and audit.html; earlier ones are replaced.")
    ] = Path("runs/audit"),
    run: Annotated[
        Path | None,
        typer.Option(help="Audit the recipe of this run's folder, with its own settings."),
    ] = None,
    data: Annotated[str, typer.Option(help="As in train.")] = _DEFAULT.data,
    image_size: ImageSize = None,
    image_fit: ImageFit = _DEFAULT.image_fit,
    background: Background = _DEFAULT.background,
    model: ModelName = "compact",
    model_option: ModelOptions = None,
    epochs: Annotated[int, typer.Option(help="Passes that the plan is made for.")] = 60,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = _DEFAULT.optimizer,
    epsilon: Annotated[float, typer.Option(help="Privacy budget of the whole training.")] = 8.0,
    delta: Annotated[
        float | None,
        typer.Option(parser=number, metavar="NUMBER", help="Its delta, below 1 / samples."),
    ] = None,
    max_grad_norm: Annotated[float, typer.Option(help="Clipping norm.")] = _DEFAULT.max_grad_norm,
    float_safe: Annotated[bool, typer.Option("--float-safe", help="As in train.")] = False,
    attack: Annotated[str | None, typer.Option(help="As in train; needs --eps.")] = None,
    eps: Annotated[
        float | None,
        typer.Option(
            parser=number,
            metavar="NUMBER",
            help="Size of the perturbation: with adversarial training.",
        ),
    ] = None,
    norm: Annotated[str, typer.Option(help="linf or l2.")] = _DEFAULT.norm,
    attack_steps: Annotated[int | None, typer.Option(help="Steps of an iterative attack.")] = None,
    shift: Annotated[int, typer.Option(help="Largest random shift, in pixels.")] = _DEFAULT.shift,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images at random.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is not secret.")] = _DEFAULT.seed,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    canaries: Annotated[int, typer.Option(help="Canaries in the data.")] = _SETTINGS.canaries,
    steps: Annotated[
        int,
        typer.Option(help="Steps to watch, three times; what happens seldomer is not seen."),
    ] = _SETTINGS.steps,
    confidence: Annotated[
        float, typer.Option(help="Of each lower bound; the gate has its own.")
    ] = _SETTINGS.confidence,
) -> None:
    """Audit a private training; exit code 4 where noise, samples or clipping are not the plan's."""
    keep_freed_memory()
    settings = replace(_SETTINGS, canaries=canaries, steps=steps, confidence=confidence, seed=seed)
    network = own_network(model, model_option or [])
    # Every option that has a setting's name is that setting.
    recipe = (
        _recorded(context, run, out)
        if run is not None
        else Recipe(**{**settings_from(context), **settings_of(network)})
    )
    if not _told(_audited(recipe, network, settings), recipe, out):
        raise typer.Exit(_FAILED)


def _told(report: AuditReport, recipe: Recipe, out: Path) -> bool:
    """Writes the record and its page, and prints what was found; whether the audit passed."""
    record = AuditRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(recipe.device),
        versions=versions(),
        settings=recipe.to_dict(),
        report=report.to_dict(),
    )
    make_folder(out)
    write_audit(record, out)
    Terminal().print(_table(report))
    messages = Terminal(stderr=True)
    messages.print(report.verdict, style="" if report.passed else "bold red")
    messages.print("what no check can see is listed in the report")
    messages.print(f"report: {out / 'audit.html'}")
    return report.passed


def _recorded(context: typer.Context, run: Path, out: Path) -> Recipe:
    """The recipe of an earlier run; silently ignoring other settings would mislead."""
    given = given_settings(context)
    if is_own_name(context.params["model"]):
        given.remove("--model")  # a record is only text, and runs no code
    if given:
        raise RunError(
            f"--run: audits the run with its own settings, got {', '.join(given)} too; leave them "
            "out"
        )
    record = RunRecord.read(run / "run.json")
    recipe = Recipe.from_dict({**record.settings, "out": str(out), "device": "cpu"})
    if recipe.epsilon is None or record.privacy is None:
        raise RunError(f"{run}: its training is not private; there is nothing to audit")
    if recipe.batch_size is None and recipe.unit == "example":
        # As it was chosen then: another version may choose otherwise.
        then = round(record.privacy.sampling_rate * record.data.train)
        recipe = replace(recipe, batch_size=then)
    if recipe.copies > 1:
        # It would put its canaries' losses in the place of copies, and call an honest sum wrong.
        raise RunError(
            f"copies: expected 1, got {recipe.copies}: the audit knows no copies of examples yet; "
            "audit the same training with one"
        )
    return recipe


def _audited(recipe: Recipe, own: OwnNetwork | None, settings: AuditSettings) -> AuditReport:
    """Audits the recipe's own training, put together as `train` does."""
    device = make_device(recipe)
    images = recipe.images()
    initial = initial_model(recipe, images, own, unlocking=None)
    plan = make_plan(recipe, samples_of(recipe, images))
    assert plan is not None, "the recipe is private"

    def make_training(audited: privacy.DPPlan, dataset: MapStyle) -> tuple["_Training", Any]:
        network = initial.build().to(device)
        # The seams look at shapes and the training split, and of it at what a map-style set has.
        groups = getattr(dataset, "groups", None)
        audited_images = cast(ImageData, _TrainOnly(dataset, images.spec, groups))
        # The plan says how long; of the schedule only its peak is used.
        short = replace(recipe, epochs=1)
        seams = make_seams(short, recipe.variant, network, audited_images, plan=audited)
        training_mode(network)
        return _Training(seams, network), seams.objective

    return audit_training(
        make_training, plan, images.train, settings=settings, groups=images.groups
    )


@dataclass(frozen=True)
class _TrainOnly:
    """The audited examples in the place of a data set's images."""

    train: MapStyle
    spec: DataSpec
    groups: Sequence[int] | None


@dataclass(frozen=True)
class _Training:
    """The recipe's private training as the audit watches it: its batches, its step."""

    seams: Seams
    model: nn.Module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The recipe's."""
        return self.seams.optimizer

    @property
    def batches(self) -> Batches:
        """Augmented where the recipe is, on the device."""
        return self.seams.batches(0)

    def step(self, losses: torch.Tensor) -> bool:
        """The recipe's private update."""
        return self.seams.update(losses)


def _table(report: AuditReport) -> Table:
    """The claim, the bounds and the checks."""
    table = Table(
        title=f"one step, coin opened: noise {report.noise_multiplier:.3g}, "
        f"{report.steps} steps, {report.canaries} canaries"
    )
    for name, side in (("", "left"), ("found", "right"), ("against", "right"), ("", "left")):
        table.add_column(name, justify=cast(Any, side))
    claimed = f"{report.claimed_epsilon:.3g}"
    table.add_row(f"claimed ε at δ={report.delta:.3g}", claimed, "", "", end_section=True)
    for bound in report.bounds:
        words = f"ε ≥, {bound.method}, {100 * bound.confidence:g} %"
        held = "" if bound.epsilon <= report.claimed_epsilon else "above the claim"
        table.add_row(words, f"{bound.epsilon:.3g}", claimed, held)
    table.add_section()
    for check in report.checks:
        verdict = "passed" if check.passed else "FAILED"
        table.add_row(check.name, f"{check.measured:.4g}", f"{check.limit:.4g}", verdict)
    return table
