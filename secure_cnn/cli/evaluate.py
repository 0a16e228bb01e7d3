"""`secure-cnn evaluate`: accuracy, recall and robust accuracy of a checkpoint."""

import json
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.table import Table

import defenses
from defenses.threat import Norm
from secure_cnn.checkpoint import LoadedModel, read_model
from secure_cnn.cli.keys import unlocking_from
from secure_cnn.data import ImageData, load_data
from secure_cnn.data.named import NAMES
from secure_cnn.errors import ModelError, RunError
from secure_cnn.evaluate import ClassificationReport, evaluate_model

__all__ = ["evaluate"]


def evaluate(
    *,
    checkpoint: Annotated[Path, typer.Argument(help="A model.sealed or model.safetensors file.")],
    data: Annotated[
        str | None, typer.Option(help="Test images; the data set it was trained on.")
    ] = None,
    eps: Annotated[
        float | None, typer.Option(help="Attack with perturbations of this size.")
    ] = None,
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    attack: Annotated[
        list[str] | None, typer.Option(help="Attacks in turn; pgd and apgd by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Test images to attack; 0 takes all.")] = 1000,
    seed: Annotated[
        int, typer.Option(help="Chooses the images that are attacked, and random starts.")
    ] = 0,
    identity: Annotated[
        Path | None, typer.Option(help="The identity that opens a sealed checkpoint.")
    ] = None,
    passphrase_file: Annotated[Path | None, typer.Option(help="Or the passphrase; - asks.")] = None,
    trusted: Annotated[
        list[str] | None,
        typer.Option(help="Demand a signature by this verifier, or one in this file."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
) -> None:
    """Evaluate a checkpoint on test images, under attack too where it claims to be robust."""
    loaded = read_model(
        checkpoint, unlocking=unlocking_from(identity, passphrase_file, trusted or [])
    )
    images = _images(loaded, data, checkpoint)
    if images.spec.classes != loaded.architecture.classes:
        raise ModelError(
            f"{checkpoint}: expected images of the classes "
            f"{', '.join(loaded.architecture.classes[:8])}, got "
            f"{', '.join(images.spec.classes[:8])}; give the data that it was trained for with "
            "--data"
        )
    found = evaluate_model(loaded.model, images.test, images.spec.classes)
    robust = _robust(loaded, images, eps, norm, attack, samples, seed)
    Console().print(_table(found, robust))
    if json_file is not None:
        figures = {"clean": found.to_dict(), "robust": robust.to_dict() if robust else None}
        try:
            json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(
                f"{json_file}: expected a place to write to: {error.strerror}"
            ) from error


def _robust(
    loaded: LoadedModel,
    images: ImageData,
    eps: float | None,
    norm: str,
    attack: list[str] | None,
    samples: int,
    seed: int,
) -> defenses.RobustnessReport | None:
    """Robust accuracy under the threat model given, or the one that the checkpoint claims."""
    claimed = loaded.claims.get("robustness")
    if eps is None and isinstance(claimed, dict):
        eps, norm = claimed.get("eps"), claimed.get("norm", norm)
    if eps is None:
        return None
    threat = defenses.ThreatModel(norm=cast(Norm, norm), eps=eps)
    chosen = min(samples, len(images.test)) if samples else None
    attacks = attack or ["pgd", "apgd"]
    return defenses.evaluate(
        loaded.model, images.test, threat, attacks=attacks, samples=chosen, seed=seed
    )


def _images(loaded: LoadedModel, data: str | None, checkpoint: Path) -> ImageData:
    """The data given, or that which the checkpoint names; split as in its training."""
    claims = loaded.claims.get("data")
    claimed = claims if isinstance(claims, dict) else {}
    name, split_seed = data or claimed.get("name"), claimed.get("split_seed")
    if data is None and name not in NAMES:
        raise ModelError(
            f"{checkpoint}: was trained on {name or 'data that it does not name'}, which is no "
            "data set that has a name; say where it is with --data"
        )
    seed = split_seed if type(split_seed) is int and split_seed >= 0 else 0
    images = load_data(str(name), seed=seed)
    if claimed.get("fingerprint") != images.fingerprint:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"note: {name} is not the data that the checkpoint names: its training images may be "
            "among these test images",
            markup=False,
        )
    return images


def _table(found: ClassificationReport, robust: defenses.RobustnessReport | None) -> Table:
    """Clean and robust figures, overall and per class."""
    table = Table()
    table.add_column("")
    table.add_column("clean", justify="right")
    recalls = [found.recall]
    if robust is not None:
        threat = robust.threat
        title = (
            f"{' and '.join(robust.robust)}, {threat.norm} {threat.eps:g}, {robust.samples} images"
        )
        table.add_column(title, justify="right")
        recalls.append(robust.worst_case_recall)
    low, high = robust.worst_case_interval if robust else (0.0, 0.0)
    table.add_row(
        "accuracy",
        _percent(found.accuracy),
        *(
            [f"{_percent(robust.worst_case_accuracy)} ({100 * low:.1f}-{100 * high:.1f})"]
            if robust
            else []
        ),
    )
    table.add_row(
        "macro recall",
        _percent(found.macro_recall),
        *([_percent(robust.worst_case_macro_recall)] if robust else []),
        end_section=True,
    )
    for index, name in enumerate(found.classes):
        table.add_row(f"recall of {name}", *(_percent(recall[index]) for recall in recalls))
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
