"""What a measurement of leakage found, told in a terminal."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from secure_cnn.printable import Terminal
from secure_cnn.record import (
    ExtractionRecord,
    InversionRecord,
    LeakageRecord,
    MembershipAttackRecord,
    MembershipRecord,
    wording,
)

__all__ = ["tell"]

_WELL = 0.9
"""The share of images that a search finds which works."""


def tell(found: LeakageRecord, out: Path) -> None:
    """Prints the figures of each part, what failed, and what there is to say of the whole."""
    console, errors = Terminal(), Terminal(stderr=True)
    if found.membership is not None:
        console.print(_memberships(found, found.membership))
        console.print("\n".join(_read_as(found.membership)), style="dim")
    if found.inversion:
        console.print(_images(found.inversion))
        if _finds_nothing(found.inversion):
            console.print(
                "of single images without a protection the search finds too few, so that of "
                "what it does not find nothing follows for a protection"
            )
    if found.extraction:
        console.print(_copies(found.extraction))
        for words in found.left_out:
            console.print(words, style="dim")
    for words in found.broken:
        errors.print(f"more than epsilon allows: {words}", style="bold red")
    for control in found.controls:
        if not control.passed:
            errors.print(
                f"control failed, so that nothing here counts: {control.name}: expected "
                f"{control.expected}, got {control.got}",
                style="bold red",
            )
    for words in _last(found, out):
        errors.print(words)


def _last(found: LeakageRecord, out: Path) -> Iterator[str]:
    """What there is to say of the whole."""
    if found.passed and found.membership is not None:
        yield _verdict(found, found.membership)
    yield from (f"note: {note}" for note in found.notes)
    yield "a measurement, never a verification of ε: that is secure-cnn audit"
    yield f"report: {out / 'leakage.html'}"


def _verdict(found: LeakageRecord, membership: MembershipRecord) -> str:
    best = membership.strongest
    promised = "nothing was promised of this training"
    if found.epsilon is not None:
        promised = f"nothing was found that ε = {wording.epsilon(found.epsilon)} rules out"
    return (
        f"strongest of {len(membership.attacks)}: {best.name}, area {best.areas[0]:.3f}, of all "
        f"models {min(best.areas):.3f}-{max(best.areas):.3f}; a guess: 0.5; {promised}"
    )


def _memberships(found: LeakageRecord, membership: MembershipRecord) -> Table:
    """Each attack with its area, and the rates that the sample can tell."""
    table = Table(
        title=f"who was trained on: {membership.members} members and {membership.others} others, "
        f"{membership.shadows} shadow models; accuracy {found.accuracy:.4f}, on its training "
        f"images {found.train_accuracy:.4f}"
    )
    # Rates that the pool resolves of the target; the page has those of all models together too.
    told = {rate.fpr for each in membership.attacks for rate in each.rates if rate.of == "target"}
    rates = sorted(told, reverse=True)
    table.add_column("attack", overflow="fold")
    for name in ("area", "of all models", *(f"TPR at FPR {rate:g}" for rate in rates)):
        table.add_column(name, justify="right")
    for each in membership.attacks:
        spread = f"{min(each.areas):.3f}-{max(each.areas):.3f}"
        row = [_rate(each, rate) for rate in rates]
        table.add_row(each.name, f"{each.areas[0]:.3f}", spread, *row)
    return table


def _rate(attack: MembershipAttackRecord, fpr: float) -> str:
    found = attack.rate(fpr)
    if found is None:
        return "not resolved"
    if not found.kept:
        return f"not kept: FPR {found.realised_fpr:.3f}"
    interval = f"{wording.fraction(found.tpr_low)}-{wording.fraction(found.tpr_high)}"
    came = wording.fraction(found.realised_fpr)
    return f"{wording.fraction(found.tpr)} at {came}\n{interval}"


def _read_as(membership: MembershipRecord) -> list[str]:
    """How the cells of its rates are read, of those kinds that there are."""
    rates = [rate for each in membership.attacks for rate in each.rates if rate.of == "target"]
    lines = []
    if any(rate.kept for rate in rates):
        lines.append(
            "TPR at FPR: at a threshold learnt from shadow models, beside the FPR that it came to, "
            "which is what a guess would find; below it the 95% interval"
        )
    if not all(rate.kept for rate in rates):
        lines.append(
            "not kept: that threshold names more than twice as many others as was asked, or, where "
            "scores tie, fewer than half: what it finds is no figure at that rate"
        )
    return lines


def _images(rows: Sequence[InversionRecord]) -> Table:
    table = Table(title=f"images found from gradients, among {rows[0].candidates:,} candidates")
    for name in ("gradient", "images in it", "identified", "95% interval"):
        table.add_column(name, justify="left" if name == "gradient" else "right")
    for each in rows:
        interval = f"{wording.fraction(each.low)}-{wording.fraction(each.high)}"
        table.add_row(
            each.protection, f"{each.batch}", f"{each.identified} of {each.asked}", interval
        )
    return table


def _finds_nothing(rows: Sequence[InversionRecord]) -> bool:
    """Whether the easiest case is out of the search's reach: one image, and no protection."""
    plain = [each for each in rows if each.protection == "plain"]
    easiest = min(plain, key=lambda each: each.batch, default=None)
    return easiest is not None and (easiest.high < _WELL or not easiest.identified)


def _copies(rows: Sequence[ExtractionRecord]) -> Table:
    table = Table(
        title="copies made of the model's answers; fidelity: how often they agree with it, and "
        "what one has that never asked"
    )
    for name in ("pool", "answers"):
        table.add_column(name, overflow="fold")
    for name in ("questions", "accuracy", "fidelity", "never asked"):
        table.add_column(name, justify="right")
    for each in rows:
        table.add_row(
            each.pool,
            each.answers,
            f"{each.queries:,}",
            wording.share(each.accuracy),
            wording.share(each.fidelity),
            wording.share(each.baseline_fidelity),
        )
    return table
