"""`secure-cnn evaluate`: accuracy, recall and robust accuracy of a checkpoint, and its verdicts."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, cast

import typer

import defenses
from defenses.checks.checks import CheckSettings
from defenses.threat import Norm
from secure_cnn.checkpoint import LoadedModel, Unlocking
from secure_cnn.cli import findings
from secure_cnn.cli.finished import located, opened
from secure_cnn.cli.images import tested_images
from secure_cnn.cli.keys import IdentityFile, Kek, PassphraseFile, Trusted, unlocking_from
from secure_cnn.cli.network import ModelOptions, own_network
from secure_cnn.cli.options import (
    Background,
    Groups,
    ImageFit,
    JsonFile,
    interruptible,
    make_folder,
    message,
    number,
    reading_for,
)
from secure_cnn.data import ImageData
from secure_cnn.engine import keep_freed_memory
from secure_cnn.errors import RunError
from secure_cnn.evaluate import ClassificationReport, batch_for, evaluate_model
from secure_cnn.files import write_file
from secure_cnn.nonexpansive import lipschitz_bound
from secure_cnn.own_network import OwnNetwork
from secure_cnn.pages import write_robustness
from secure_cnn.printable import Terminal
from secure_cnn.recipe.outcome import attacked_examples
from secure_cnn.record import RobustnessRecord, hardware, versions

__all__ = ["evaluate"]

_MISSED = 7
_NO_THREAT = (
    "--attack, --surrogate, --exhaustive, --save-images, --state, --out and --require robust: the "
    "checkpoint claims no robustness; say how large the perturbations are with --eps"
)


def evaluate(
    *,
    checkpoint: Annotated[
        Path, typer.Argument(help="A run's folder, or a model.sealed or model.safetensors file.")
    ],
    data: Annotated[
        str | None, typer.Option(help="Test images; the data set it was trained on.")
    ] = None,
    groups: Groups = None,
    image_fit: ImageFit = None,
    background: Background = None,
    model: Annotated[
        str | None,
        typer.Option(help="What makes the network if it is one of your own, as in its training."),
    ] = None,
    model_option: ModelOptions = None,
    eps: Annotated[
        float | None,
        typer.Option(
            parser=number,
            metavar="NUMBER",
            help="Attack with perturbations this large, as 0.03 or 8/255.",
        ),
    ] = None,
    norm: Annotated[
        str | None, typer.Option(help="linf (the default), l2, l1 or l0; with --eps.")
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="Attacks in turn; apgd and apgdt by default. autoattack is the ensemble, "
            "autoattack-plus and autoattack-rand its other versions."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Test images to attack; 0 takes all.")] = 1000,
    seed: Annotated[int, typer.Option(help="Chooses the attacked images and random starts.")] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images a forward pass, and between two writes of --state; by default 256, fewer "
            "for a network that takes long."
        ),
    ] = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Try every attack on every correct image.")
    ] = False,
    verdicts: Annotated[
        bool, typer.Option(help="Check whether the robust accuracy can be believed.")
    ] = True,
    surrogate: Annotated[
        Path | None,
        typer.Option(help="A plainly trained checkpoint, for the check by transfer; same keys."),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with code 7 unless robust>=SHARE, robust-low>=SHARE (lower end of the "
            "interval), clean>=SHARE, or verdicts (none failed)."
        ),
    ] = None,
    certify: Annotated[
        float | None,
        typer.Option(
            parser=number,
            metavar="NUMBER",
            help="Certify l2 radii too, by smoothing with Gaussian noise of this sigma.",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Keep what is done in this file, and go on from it; of --certify in FILE.certify."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for robustness.json and .html.")] = None,
    save_images: Annotated[
        Path | None,
        typer.Option(help="Write all attacked images, before and after, to a safetensors file."),
    ] = None,
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    kek: Kek = None,
    trusted: Trusted = None,
    json_file: JsonFile = None,
) -> None:
    """Evaluate a checkpoint on test images, under attack too where it claims to be robust."""
    keep_freed_memory()
    requirements = findings.read_requirements(require or [])
    unlocking = unlocking_from(identity, passphrase_file, kek, trusted or [])
    network = own_network(model, model_option or []) if model else None
    path, data, groups = located(checkpoint, data, groups)
    loaded = opened(path, unlocking, network)
    reading = reading_for(loaded, image_fit, background)
    images = tested_images(loaded, path, data, groups, reading, unlocking)
    threat = _threat(loaded, eps, norm)
    attacking = bool(attack or surrogate or exhaustive or save_images or out)
    kept, demanded = state is not None and certify is None, any(e.attacked for e in requirements)
    if threat is None and (attacking or kept or demanded):
        raise RunError(_NO_THREAT)
    with interruptible(partial(_way_on, state)):
        size = batch_for(loaded.model, images.test) if batch_size is None else batch_size
        found = evaluate_model(loaded.model, images.test, images.spec.classes, batch_size=size)
        robust = threat and defenses.evaluate(
            loaded.model,
            images.test,
            threat,
            attacks=attack or None,
            samples=min(samples, len(images.test)) if samples else None,
            batch_size=size,
            seed=seed,
            exhaustive=exhaustive,
            verdicts=verdicts and _check_settings(surrogate, unlocking, network),
            examples=None if save_images else 8,
            state=state,
        )
        robust = robust and replace(robust, data=images.name)
        _show(found, robust)
        if save_images is not None:
            _save_images(save_images, robust)
        known = (found, robust, _bounded(loaded, images, size))
        keep = partial(_keep, json_file, out, loaded, images, *known)
        keep(None)  # what is finished is not lost with what comes after it
        if certify is not None:
            keep(_certified(loaded, images, certify, samples, size, seed, state))
    _demand(requirements, found, robust)


def _demand(
    requirements: Sequence[findings.Requirement],
    found: ClassificationReport,
    robust: defenses.RobustnessReport | None,
) -> None:
    """Leaves with its exit code where something was demanded and is not so."""
    missed = [words for each in requirements if (words := each.missed(found.accuracy, robust))]
    if missed:
        Terminal(stderr=True).print("\n".join(missed), style="bold red")
        raise typer.Exit(_MISSED)


def _way_on(state: Path | None) -> str:
    """How an interrupted evaluation goes on."""
    if state is None:
        return "with --state FILE beside it, the same command would have gone on from there"
    return f"the same command again goes on from {state}"


def _threat(
    loaded: LoadedModel, eps: float | None, norm: str | None
) -> defenses.ThreatModel | None:
    """The threat model given, or the one that the checkpoint claims to be robust in."""
    if norm is not None and eps is None:
        raise RunError(f"--norm: expected --eps with it, the size in {norm}; give both or neither")
    claimed = loaded.claims.get("robustness")
    if eps is None and isinstance(claimed, dict):
        eps, norm = claimed.get("eps"), claimed.get("norm")
    if eps is None:
        return None
    return defenses.ThreatModel(norm=cast(Norm, norm or "linf"), eps=eps)


def _check_settings(
    surrogate: Path | None, unlocking: Unlocking | None, network: OwnNetwork | None
) -> CheckSettings:
    """The usual checks, with the surrogate where one is given."""
    if surrogate is None:
        return CheckSettings()
    return CheckSettings(surrogate=opened(surrogate, unlocking, network).model)


def _certified(
    loaded: LoadedModel,
    images: ImageData,
    sigma: float,
    samples: int,
    batch_size: int,
    seed: int,
    state: Path | None,
) -> defenses.CertificationReport:
    """What smoothing proves of as many images as were attacked."""
    proven = defenses.certify(
        loaded.model,
        images.test,
        defenses.Smoothing(sigma=sigma),
        batch_size=batch_size,
        images=min(samples, len(images.test)) if samples else None,
        seed=seed,
        state=None if state is None else state.with_name(f"{state.name}.certify"),
    )
    Terminal().print(findings.certificates(proven))
    return proven


def _bounded(
    loaded: LoadedModel, images: ImageData, batch_size: int
) -> defenses.LipschitzReport | None:
    """What the model's own features prove of all test images, where they prove anything."""
    bound = lipschitz_bound(loaded.model)
    if bound is None:
        return None
    proven = defenses.certify_lipschitz(
        loaded.model,
        images.test,
        head=bound.head,
        constant=bound.constant,
        batch_size=batch_size,
    )
    Terminal().print(findings.bounds(proven))
    return proven


def _save_images(path: Path, robust: defenses.RobustnessReport | None) -> None:
    """Every image that was attacked, with what the attacks made of it."""
    if robust is None or robust.examples is None:
        return message("note: no image was attacked, so that there is none to save")
    try:
        robust.examples.save(path)
    except OSError as error:
        raise RunError(f"{path}: expected a place to write to: {error.strerror}") from error
    message(f"images: {path}")


def _show(found: ClassificationReport, robust: defenses.RobustnessReport | None) -> None:
    """Prints the figures, then each attack's and the verdicts."""
    console = Terminal()
    console.print(findings.table(found, robust))
    if robust is not None:
        console.print(findings.attacks(robust))
        if robust.undrawn:
            message(
                f"note: the model answers at random, and {', '.join(robust.undrawn)} met one draw "
                "of it at a time, so that the figures are too high; try --attack autoattack-rand"
            )
        if robust.verdicts:
            console.print(findings.verdicts(robust))


def _keep(
    json_file: Path | None,
    out: Path | None,
    loaded: LoadedModel,
    images: ImageData,
    found: ClassificationReport,
    robust: defenses.RobustnessReport | None,
    bounded: defenses.LipschitzReport | None,
    proven: defenses.CertificationReport | None,
) -> None:
    """Writes what is known where it was asked for."""
    if json_file is not None:
        _write_json(json_file, found, robust, bounded, proven)
    if out is not None and robust is not None:
        _write_page(out, loaded, images, robust, proven)


def _write_json(
    path: Path,
    found: ClassificationReport,
    robust: defenses.RobustnessReport | None,
    bounded: defenses.LipschitzReport | None,
    proven: defenses.CertificationReport | None,
) -> None:
    """All figures in one file."""
    figures = {
        "clean": found.to_dict(),
        "robust": robust.to_dict() if robust else None,
        "lipschitz": bounded.to_dict() if bounded else None,
        "certified": proven.to_dict() if proven else None,
    }
    try:
        write_file(path, (json.dumps(figures, indent=1) + "\n").encode(), overwrite=True)
    except OSError as error:
        raise RunError(f"{path}: expected a place to write to: {error.strerror}") from error


def _write_page(
    out: Path,
    loaded: LoadedModel,
    images: ImageData,
    robust: defenses.RobustnessReport,
    proven: defenses.CertificationReport | None,
) -> None:
    """The record and its page in a folder, which is made."""
    record = RobustnessRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware("cpu"),
        versions=versions(),
        model=loaded.architecture.model,
        data=f"{robust.samples} of {len(images.test)} test images of {images.name}",
        classes=images.spec.classes,
        report=robust.to_dict(),
        certification=proven.to_dict() if proven else None,
    )
    make_folder(out)
    write_robustness(
        record,
        attacked_examples(robust, loaded.model, images.spec.classes, loaded.architecture.model),
        out,
    )
    message(f"report: {out / 'robustness.html'}")
