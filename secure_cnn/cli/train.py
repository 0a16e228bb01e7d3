"""`secure-cnn train`: options into a recipe, the recipe into a run."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from defenses import OBJECTIVES
from secure_cnn.bench import step_costs
from secure_cnn.checkpoint import Unlocking
from secure_cnn.cli.keys import sealing_from, unlocking_from, verifiers_from
from secure_cnn.cli.network import MODEL_HELP, ModelOptions, own_network, settings_of
from secure_cnn.cli.options import (
    Background,
    Groups,
    ImageFit,
    ImageSize,
    given_settings,
    in_panels,
    interruptible,
    number,
    settings_from,
)
from secure_cnn.cli.train_told import tell, way_on
from secure_cnn.engine import keep_freed_memory
from secure_cnn.errors import RunError
from secure_cnn.own_network import OwnNetwork, is_own_name
from secure_cnn.recipe import Recipe, RunFolder, run
from secure_cnn.recipe.named import named_recipe
from secure_cnn.recipe.ranges import CLIPPINGS
from secure_cnn.unlearning import run_ridge, run_sharded
from secure_cnn.weights import is_sealed

__all__ = ["train"]

_DEFAULT = Recipe(out="")
_PANELS = {
    "Run": ("out", "recipe", "seed", "device", "checkpoint_minutes", "resume", "force"),
    "Images": ("data", "image_size", "image_fit", "background", "groups", "shift", "flip"),
    "Network": ("model", "model_option", "weights", "train_only", "freeze"),
    "Training": (
        *("epochs", "batch_size", "optimizer", "learning_rate", "clip_grad_norm", "weight_decay"),
        *("warmup", "label_smoothing", "average_decay"),
    ),
    "Privacy: off without --epsilon": (
        *("epsilon", "delta", "max_grad_norm", "clipping", "float_safe", "unit"),
        *("images_per_person", "copies", "trials", "baseline"),
    ),
    "Robustness: off without --eps": (
        *("eps", "eps_warmup", "norm", "attack", "attack_steps", "attack_noise"),
        *("attack_precision", "gaussian_sigma", "guard", "robust_samples"),
    ),
    "Erasure: off without --shards, --slices or --head": ("shards", "slices", "head", "penalty"),
    "Sealing: off without a recipient, a passphrase or a key": (
        *("recipient", "passphrase_file", "kek", "signer", "identity", "trusted"),
    ),
}
"""The options in the help, by what they are about."""


@in_panels(_PANELS)
def train(
    *,
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The run's folder; it must not exist.")],
    recipe: Annotated[
        str | None,
        typer.Option(help="Begin with these settings, one of secure-cnn recipes; others win."),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="digits, fashion-mnist, mnist, cifar10, a folder of class folders (DIR/cat/1.jpg "
            "or DIR/train/cat/1.jpg and DIR/test/cat/2.jpg), or a .npz file."
        ),
    ] = _DEFAULT.data,
    image_size: ImageSize = None,
    image_fit: ImageFit = _DEFAULT.image_fit,
    background: Background = _DEFAULT.background,
    model: Annotated[
        str, typer.Option(help=f"auto goes by protections and images. {MODEL_HELP}")
    ] = _DEFAULT.model,
    model_option: ModelOptions = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Start from the weights in this file: safetensors, sealed (--identity opens it, "
            "or --passphrase-file), or of torch.save."
        ),
    ] = None,
    train_only: Annotated[
        list[str] | None,
        typer.Option(help="Train these parameters only, as 'head.*'; may be repeated."),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Leave these parameters as they are, as 'conv1.*'; may be repeated."),
    ] = None,
    epochs: Annotated[
        int,
        typer.Option(
            help="Passes over the training images. With --epsilon more are more steps, each with "
            "more noise; how many of what is said when the training begins."
        ),
    ] = _DEFAULT.epochs,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images a step; by default chosen by the data and --epochs. With --epsilon those "
            "expected: fewer are more steps, in which the noise weighs more."
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="sgd, adamw or muon.")] = _DEFAULT.optimizer,
    learning_rate: Annotated[
        float | None, typer.Option(parser=number, metavar="NUMBER", help="At its peak.")
    ] = None,
    clip_grad_norm: Annotated[
        float,
        typer.Option(help="Largest norm of a step's gradient without privacy; 0 clips none."),
    ] = _DEFAULT.clip_grad_norm,
    weight_decay: Annotated[float, typer.Option()] = _DEFAULT.weight_decay,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps in which the learning rate rises.")
    ] = _DEFAULT.warmup,
    label_smoothing: Annotated[float, typer.Option()] = _DEFAULT.label_smoothing,
    average_decay: Annotated[
        float, typer.Option(help="Of the moving average of the weights; 0 switches it off.")
    ] = _DEFAULT.average_decay,
    shift: Annotated[int, typer.Option(help="Largest random shift, in pixels.")] = _DEFAULT.shift,
    flip: Annotated[bool, typer.Option(help="Mirror images at random.")] = False,
    epsilon: Annotated[
        float | None, typer.Option(help="Privacy budget; switches DP-SGD on.")
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(parser=number, metavar="NUMBER", help="Its delta, below 1 / samples."),
    ] = None,
    max_grad_norm: Annotated[float, typer.Option(help="Clipping norm.")] = _DEFAULT.max_grad_norm,
    clipping: Annotated[
        str, typer.Option(help=f"Of each example's gradient: {', '.join(CLIPPINGS)}.")
    ] = _DEFAULT.clipping,
    float_safe: Annotated[
        bool,
        typer.Option(help="Add sum and noise so that low bits leak nothing; slower."),
    ] = False,
    unit: Annotated[
        str,
        typer.Option(help="What epsilon protects: an example, or a person with all their images."),
    ] = _DEFAULT.unit,
    images_per_person: Annotated[
        int | None, typer.Option(help="With --unit person: most of one person in a step; 8.")
    ] = None,
    groups: Groups = None,
    copies: Annotated[
        int, typer.Option(help="Augmented copies of each example in a private step.")
    ] = _DEFAULT.copies,
    attack: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(OBJECTIVES)}; n-fgsm if --eps is given.")
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(
            parser=number,
            metavar="NUMBER",
            help="Size of the perturbation in [0, 1], as 0.03 or 8/255; switches adversarial "
            "training on.",
        ),
    ] = None,
    eps_warmup: Annotated[
        float, typer.Option(help="Share of the steps in which the perturbation grows to --eps.")
    ] = _DEFAULT.eps_warmup,
    norm: Annotated[str, typer.Option(help="linf or l2.")] = _DEFAULT.norm,
    attack_steps: Annotated[int | None, typer.Option(help="Steps of an iterative attack.")] = None,
    attack_noise: Annotated[
        float | None, typer.Option(help="Noise before the step of n-fgsm, in multiples of --eps.")
    ] = None,
    attack_precision: Annotated[
        str,
        typer.Option(help="float32 or bfloat16: of its convolutions; see docs/benchmarks.md."),
    ] = _DEFAULT.attack_precision,
    gaussian_sigma: Annotated[
        float | None,
        typer.Option(
            parser=number,
            metavar="NUMBER",
            help="Train on images with Gaussian noise, for evaluate --certify; not with --eps.",
        ),
    ] = None,
    guard: Annotated[
        bool,
        typer.Option(help="Take single-step training back where it overfits to its own step."),
    ] = False,
    trials: Annotated[
        int | None,
        typer.Option(help="Settings tried on these private data so far; stated beside epsilon."),
    ] = None,
    shards: Annotated[
        int, typer.Option(help="Train so many networks, each on its part of the images.")
    ] = _DEFAULT.shards,
    slices: Annotated[
        int,
        typer.Option(help="In so many stages: secure-cnn forget repeats the last ones of a shard."),
    ] = _DEFAULT.slices,
    head: Annotated[
        str,
        typer.Option(
            help="How the last layer is trained: gradient, or ridge: by least squares on fixed "
            "features, from which people leave exactly."
        ),
    ] = _DEFAULT.head,
    penalty: Annotated[
        float | None,
        typer.Option(
            parser=number, metavar="NUMBER", help="Of the squared weights of --head ridge."
        ),
    ] = None,
    robust_samples: Annotated[
        int, typer.Option(help="Test images attacked at the end; 0 takes all.")
    ] = _DEFAULT.robust_samples or 0,
    baseline: Annotated[
        bool, typer.Option(help="Also train without protections, to show what they cost.")
    ] = _DEFAULT.baseline,
    checkpoint_minutes: Annotated[
        float,
        typer.Option(
            help="Save the training after so many minutes within an epoch; 0: at its end alone."
        ),
    ] = _DEFAULT.checkpoint_minutes,
    seed: Annotated[int, typer.Option(help="Of everything that is not secret.")] = _DEFAULT.seed,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = _DEFAULT.device,
    recipient: Annotated[
        list[str] | None,
        typer.Option(help="Seal the checkpoints to this public key, or the keys in this file."),
    ] = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(help="Seal the checkpoints to the passphrase in this file; - asks."),
    ] = None,
    kek: Annotated[
        str | None,
        typer.Option(
            help="Seal the checkpoints to this key-encryption key: a file, env:NAME, "
            "command:PROGRAM or keyring:SERVICE/USER."
        ),
    ] = None,
    signer: Annotated[
        Path | None, typer.Option(help="Sign the checkpoints with this key file.")
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option(help="Opens the sealed state to resume from, or sealed --weights."),
    ] = None,
    trusted: Annotated[
        list[str] | None,
        typer.Option(
            help="With --resume: a public key whose states count, or a file of them; by default "
            "that of --signer. Of sealed --weights: who must have signed them."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, with its own settings.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is in --out.")] = False,
) -> None:
    """Train a network; each protection is off unless asked for.

    As in: secure-cnn train --data DIR --epsilon 8 --eps 8/255 --out runs/1
    """
    if resume:
        _refuse_settings(context)
    # Every option that has a setting's name is that setting.
    settings = {**settings_from(context), "robust_samples": robust_samples or None}
    network = own_network(model, model_option or [])
    settings |= settings_of(network)
    _train(
        Recipe(**settings) if recipe is None else _begun_with(recipe, context, settings),
        network,
        recipient,
        passphrase_file,
        kek,
        signer,
        identity,
        trusted,
        resume=resume,
        force=force,
    )


def _begun_with(name: str, context: typer.Context, settings: Mapping[str, Any]) -> Recipe:
    """A named recipe with the settings that were given beside it."""
    named = named_recipe(name)
    given = {option.removeprefix("--").replace("-", "_") for option in given_settings(context)}
    if named.any_data and "data" not in given:
        raise RunError(f"--recipe: {name} is for any images; say which with --data")
    own = {"model", "model_options"} if is_own_name(str(settings["model"])) else set()
    # What was tried was tried on the recipe's own images.
    tried = {"trials"} if "data" in given and settings["data"] != named.recipe.data else set()
    wins = {*given, *own, *tried, "out"}
    return replace(named.recipe, **{each: settings[each] for each in wins})


def _refuse_settings(context: typer.Context) -> None:
    """A resumed run has its own settings; silently ignoring others would mislead.

    A network of the user's own is named again: a record is only text, and runs no code.
    """
    given = given_settings(context)
    if context.params["recipe"] is not None:
        given.append("--recipe")
    if is_own_name(context.params["model"]):
        given.remove("--model")
    if given:
        raise RunError(
            f"--resume: goes on with the run's own settings, got {', '.join(given)} too; leave "
            "them out"
        )


def _train(
    recipe: Recipe,
    network: OwnNetwork | None,
    recipients: list[str] | None,
    passphrase_file: Path | None,
    kek: str | None,
    signer: Path | None,
    identity: Path | None,
    trusted: list[str] | None,
    *,
    resume: bool,
    force: bool,
) -> None:
    """Runs the recipe with the keys that were named, or goes on with the run in its folder."""
    keep_freed_memory()
    if resume:
        record = RunFolder(root=Path(recipe.out), sealed=False).recorded()
        recipe = Recipe.from_dict({**record.settings, "out": recipe.out})
    # Also where nothing is resumed yet: that a text or a file holds no key shows on the first day.
    verifiers_from(trusted or [])
    begin = run_sharded if recipe.is_sharded else partial(run, measure_cost=step_costs)
    if recipe.head == "ridge":
        begin = partial(run_ridge)
    with interruptible(partial(way_on, recipe)):
        done = begin(
            recipe,
            network=network,
            sealing=sealing_from(recipients or [], passphrase_file, kek, signer),
            unlocking=_unlocking(
                recipe, identity, passphrase_file, kek, trusted or [], resume=resume
            ),
            resume=resume,
            force=force,
        )
    tell(done)


def _unlocking(
    recipe: Recipe,
    identity: Path | None,
    passphrase_file: Path | None,
    kek: str | None,
    trusted: list[str],
    *,
    resume: bool,
) -> Unlocking | None:
    """What opens the state to go on from, or the weights to start from; None where neither is."""
    if resume or (recipe.weights is not None and is_sealed(Path(recipe.weights))):
        # Beside an identity that opens the weights, a passphrase or a key-encryption key seals.
        if not resume and identity is not None:
            passphrase_file = kek = None
        return unlocking_from(identity, passphrase_file, kek, trusted)
    if trusted and recipe.weights is not None:
        raise RunError(
            f"--trusted: expected weights that are sealed and signed, got {recipe.weights}, which "
            "is plain; leave --trusted out, or seal and sign them with secure-cnn archive"
        )
    return None
