"""`secure-cnn leakage`: what the model of a run tells about the people in its data."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from privacy.leakage import resolved
from secure_cnn.cli.finished import located, opened
from secure_cnn.cli.keys import IdentityFile, Kek, PassphraseFile, Trusted, unlocking_from
from secure_cnn.cli.leakage_told import tell
from secure_cnn.cli.network import ModelOptions, own_network
from secure_cnn.cli.options import INTERRUPTED, make_folder, message
from secure_cnn.engine import keep_freed_memory
from secure_cnn.errors import RunError
from secure_cnn.interruption import Stopped, stop_on_signals
from secure_cnn.leakage import (
    LeakageSettings,
    Measured,
    MembershipSettings,
    Picture,
    Target,
    earlier,
    measure_leakage,
    others_asked,
    target_of,
)
from secure_cnn.pages import InversionPicture, write_leakage
from secure_cnn.printable import Terminal
from secure_cnn.record import LeakageRecord, RunRecord, wording
from secure_cnn.unlearning.stage_files import inventory_beside

__all__ = ["leakage"]

_OTHERS = ("inversion", "extraction")
_MISSED = 7
_FAILED = 4
_FEWEST_FOR_AREA = 50
"""Others than members, of whom an area is known to about 0.11."""
_FALSE_ALARMS = 10
_DEFAULT = MembershipSettings()
_FIGURE = r"auc|tpr@0\.1|tpr@0\.01|tpr@0\.001"
_PATTERN = re.compile(rf"({_FIGURE})\s*<=\s*(\d+(?:\.\d*)?|\.\d+)")


def leakage(
    *,
    run: Annotated[Path, typer.Argument(help="The folder of a run that is complete.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The model that the run left, if it was moved elsewhere.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Where its images are now, if elsewhere than they were.")
    ] = None,
    shadows: Annotated[
        int, typer.Option(help="Models trained as this one was, to know who was in their data.")
    ] = _DEFAULT.shadows,
    pool: Annotated[
        int | None,
        typer.Option(
            help="Images guessed about, at most, half of them test images; by default nine tenths "
            "of the test images, and as many of the training."
        ),
    ] = None,
    attacks: Annotated[
        str | None, typer.Option(help="Some attacks alone, as lira,rmia,bavaria.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="What else: inversion (images from gradients as this training's first step shares "
            "them), extraction (copies made of the model's answers), or both with a comma."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the shadow models.")] = _DEFAULT.seed,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for leakage.json, leakage.html and the table; the run's own."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train the shadow models anew where others were asked.")
    ] = False,
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with code 7 unless tpr@RATE<=SHARE, with RATE 0.1, 0.01 or 0.001, or "
            "auc<=SHARE, by the strongest attack at the threshold that is best for it."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="What makes the network if it is one of your own, as in its training."),
    ] = None,
    model_option: ModelOptions = None,
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    kek: Kek = None,
    trusted: Trusted = None,
) -> None:
    """Measure what a model leaks: who was in its data, told by models trained alike.

    Exit code 4 where more is found than its epsilon allows or a control fails, 7 where --require
    is not met.
    """
    keep_freed_memory()
    demands = [_demand(text) for text in require or []]
    told = _asked(shadows=shadows, pool=pool, attacks=attacks, seed=seed)
    others = _others(against)
    settings = LeakageSettings(
        membership=told, inversion="inversion" in others, extraction="extraction" in others
    )
    unlocking = unlocking_from(identity, passphrase_file, kek, trusted or [])
    network = own_network(model, model_option or []) if model else None
    _check_folder(run)
    path, place = (checkpoint, data) if checkpoint else located(run, data)[:2]
    record, inventory = RunRecord.read(run / "run.json"), inventory_beside(path, unlocking)
    target = target_of(
        record,
        opened(path, unlocking, network),
        place or str(record.settings.get("data")),
        network=network,
        unlocking=unlocking,
        recognised=lambda images: (
            images if inventory is None else inventory.recognised(images).whole.data
        ),
    )
    for each in demands:
        each.check(target, told)
    out = out or run
    make_folder(out)
    _tell_earlier(target, settings, out)
    found = _measured(target, settings, out, force=force)
    tell(found, out)
    missed = [words for each in demands if (words := each.missed(found))]
    if missed:
        Terminal(stderr=True).print("\n".join(missed), style="bold red")
    if not found.passed:
        raise typer.Exit(_FAILED)
    if missed:
        raise typer.Exit(_MISSED)


def _check_folder(run: Path) -> None:
    if run.is_dir():
        return
    got, cure = "nothing there", "give the folder that secure-cnn train wrote"
    if run.exists():
        got, cure = "a file", f"{cure}, and a model elsewhere by --checkpoint {run}"
    raise RunError(
        f"{run}: expected the folder of a run, whose recipe trains others like it, got {got}; "
        f"{cure}"
    )


def _tell_earlier(target: Target, settings: LeakageSettings, out: Path) -> None:
    """What is in the folder and was not asked for: whether it stays."""
    before = earlier(out, run=target.record.run_id, weights=target.weights)
    where = out / "leakage.json"
    if before.lost:
        message(f"{where}: {before.lost}, so that nothing of it is kept; --out keeps it")
    for name in _OTHERS:
        if before.record and getattr(before.record, name) and not getattr(settings, name):
            when = before.record.measured.get(name, "earlier")
            message(f"{where}: {name} of {when} is kept; --against {name} measures it anew")


def _measured(
    target: Target, settings: LeakageSettings, out: Path, *, force: bool
) -> LeakageRecord:
    """The measurement, written part by part; the first Ctrl-C ends it where it can go on."""
    membership = False

    def keep(known: Measured) -> None:
        nonlocal membership
        membership = True
        write_leakage(known.record, out, [_shown(each) for each in known.pictures])

    with stop_on_signals() as stop:
        try:
            return measure_leakage(target, settings, out, stop=stop, force=force, keep=keep).record
        except Stopped:
            again = "the same command without --force" if force else "the same command again"
            way = "goes on with the next shadow model"
            if membership:
                way = (
                    "trains no shadow model again, but measures anew what --against names: leave "
                    f"out what is in {out / 'leakage.json'} already"
                )
            message(f"interrupted\nhint: {again} {way}")
            raise typer.Exit(INTERRUPTED) from None


def _asked(*, shadows: int, pool: int | None, attacks: str | None, seed: int) -> MembershipSettings:
    """How membership is measured; what is out of range is told by its option."""
    names = _names("--attacks", attacks)
    try:
        return MembershipSettings(shadows=shadows, pool=pool, attacks=names, seed=seed)
    except RunError as error:
        raise RunError(f"--{error}") from error


def _others(against: str | None) -> tuple[str, ...]:
    """What is measured beside membership."""
    names = _names("--against", against)
    for name in names:
        if name not in _OTHERS:
            raise RunError(
                f"--against: expected {' or '.join(_OTHERS)}, got {name!r}; for both put a comma "
                "between them, for membership alone leave it out"
            )
    return names


def _shown(picture: Picture) -> InversionPicture:
    return InversionPicture(
        title=f"{picture.protection}, {picture.batch} a gradient",
        originals=picture.originals.numpy(),
        reconstructions=picture.found.numpy(),
    )


def _names(option: str, text: str | None) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    if text is not None and not names:
        raise RunError(f"{option}: expected names with commas, got {text!r}; or leave it out")
    return names


@dataclass(frozen=True, kw_only=True)
class _Demand:
    """One demand, as it was given: which figure may be how large."""

    text: str
    figure: str
    most: float

    @property
    def fpr(self) -> float | None:
        """The false positive rate that it is about; None of an area."""
        return None if self.figure == "auc" else float(self.figure.removeprefix("tpr@"))

    def check(self, target: Target, settings: MembershipSettings) -> None:
        """Refuses a rate that the pool cannot tell, before anything is trained for it."""
        asked = others_asked(target, settings)
        if self.fpr is None:
            if asked < _FEWEST_FOR_AREA:
                raise RunError(
                    f"--require {self.text}: expected a pool with {_FEWEST_FOR_AREA} test images "
                    f"for an area to be told, got one with {asked:,}; leave out --pool or give "
                    f"--pool {2 * _FEWEST_FOR_AREA} at least"
                )
            return
        if resolved(asked, self.fpr):
            return
        needed = round(_FALSE_ALARMS / self.fpr)
        most = others_asked(target, replace(settings, pool=2 * len(target.others)))
        cure = f"give --pool {2 * needed}"
        if most < needed:
            cure = (
                f"these data and attacks have at most {most:,}: ask for a larger rate, or for auc"
            )
        raise RunError(
            f"--require {self.text}: expected a pool with {needed:,} test images, since a rate "
            f"needs ten false alarms to be told, got one with {asked:,}; {cure}"
        )

    def missed(self, found: LeakageRecord) -> str | None:
        """What is missing, in words; None where it is met."""
        value = _largest(found, self.fpr)
        if value is None:
            return f"missed: {self.text}: a control failed, so that nothing is known of it"
        if value <= self.most:
            message(f"kept: {self.text}: {wording.fraction(value)}{self._how}")
            return None
        return f"missed: {self.text}: got {wording.fraction(value)}{self._how}"

    @property
    def _how(self) -> str:
        """Whose figure it is: it may be above every one in the table."""
        by = "by the strongest attack"
        if self.fpr is None:
            return f", {by}"
        return f", {by} at the threshold that is best for it, which no attacker knows"


def _largest(found: LeakageRecord, fpr: float | None) -> float | None:
    """Of the target, by the strongest attack, at the threshold that is best for it."""
    if found.membership is None or found.void:
        return None
    attacks = found.membership.attacks
    if fpr is None:
        return max(each.areas[0] for each in attacks)
    rates = [rate.tpr for each in attacks if (rate := each.rate(fpr, "oracle")) is not None]
    # Who guesses finds as many: where scores tie, a threshold finds fewer.
    return max(fpr, *rates) if rates else None


def _demand(text: str) -> _Demand:
    match = _PATTERN.fullmatch(text.strip())
    most = float(match[2]) if match else -1.0
    if match is None or not 0 <= most <= 1:
        raise typer.BadParameter(
            "expected auc<=SHARE, or tpr@RATE<=SHARE with RATE 0.1, 0.01 or 0.001 and a share in "
            f"[0, 1]; got {text!r}",
            param_hint="--require",
        )
    return _Demand(text=text, figure=match[1], most=most)
