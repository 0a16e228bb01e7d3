"""Who was in the data: figures and tables of attacks on memberships.

Rates and areas are fractions. A rate that the examples are too few to tell is in no table, and the
part of the curve left of it is hatched. Deliberately not here: what attacks do, which the record's
room says.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import floor, log10
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from secure_cnn.pages.canvas import CARD, INK, MUTED, SERIES, WIDTH, Canvas, render, short
from secure_cnn.pages.classes import MOST_CLASSES
from secure_cnn.pages.exposed import exposed_table, too_few
from secure_cnn.pages.template import Table
from secure_cnn.record import (
    MEMBERSHIP_ATTACKS_IN_WORDS,
    LeakageRecord,
    MembershipAttackRecord,
    MembershipRecord,
    RateRecord,
    wording,
)

__all__ = ["MembershipFigures", "interval", "membership_figures", "roc_figure"]

_MOST_CURVES = 4
_MOST_ATTACKS = 30
_LEAST_FPR = 1e-4
_TOLD_AT = (1e-4, 1e-3, 0.01, 0.1, 0.5)
_PLOT, _LINE, _LEFT, _NAMES = 250, 18, 44, 134
_WHOSE = {"target": "target", "all": "all models", "oracle": "target, oracle"}
_FOOT = 42 + _PLOT + 32
"""Where the plot with the labels of its axis ends."""
_DASHES = (0, (4, 3))
# The ground apart: inside of a hatching it has no theme.
_GROUND: dict[str, Any] = {"fc": MUTED, "alpha": 0.16, "lw": 0}
_HATCH: dict[str, Any] = {"fc": "none", "ec": MUTED, "alpha": 0.5, "hatch": "////", "lw": 0}

_Spread = tuple[str, float, float, float]
"""A name, its value, and the ends of its spread."""


class _Sign(NamedTuple):
    """A line of a legend, with a figure at its right end."""

    words: str
    color: str = MUTED
    lw: float = 0.0
    dashes: Any = "-"
    hatched: bool = False
    figure: str = ""


@dataclass(frozen=True, kw_only=True)
class MembershipFigures:
    """What the page shows of memberships; a figure without anything to draw is empty.

    `asked` is the largest false positive rate that is told, if any. `words` are the attacks and
    what each does, `same` which of them are one; `few` is said where shadow models are too few to
    tell who is exposed.
    """

    strongest: str
    roc: str
    roc_table: Table
    areas: str
    attacks: Table
    words: list[tuple[str, str]]
    same: str
    rates: Table
    ppv: Table | None
    asked: str
    classes: str
    class_table: Table
    exposed: Table
    few: str


def membership_figures(record: LeakageRecord, membership: MembershipRecord) -> MembershipFigures:
    """The figures of a record that has memberships, each with its table."""
    ranked = _ranked(membership)
    strongest, shown = membership.strongest, _shown(membership)
    by_class = [(each.name, each.area, each.low, each.high) for each in strongest.classes]
    most = sorted(by_class, key=lambda each: -each[1])[:MOST_CLASSES]
    return MembershipFigures(
        strongest=strongest.name,
        roc=roc_figure(record, membership),
        roc_table=_roc_table(record, membership, shown),
        areas=_spread_figure(
            "areas", "AUC of each attack", [_spread(each) for each in ranked[:_MOST_ATTACKS]]
        ),
        attacks=_attack_table(ranked),
        words=[
            (each.name, MEMBERSHIP_ATTACKS_IN_WORDS[each.name])
            for each in ranked
            if each.name in MEMBERSHIP_ATTACKS_IN_WORDS
        ],
        same=_same(membership),
        rates=_rate_table(ranked),
        ppv=_ppv_table(strongest),
        asked=f"{told[0]:g}" if (told := _told(ranked)) else "",
        classes=_spread_figure(
            "class-areas",
            "AUC by class of the strongest attack",
            # In the record's order, unless some are left out.
            by_class if len(most) == len(by_class) else most,
        )
        if most
        else "",
        class_table=_class_table(shown),
        exposed=exposed_table(membership),
        few=too_few(membership.shadows),
    )


def interval(low: float, high: float) -> str:
    """The ends of an interval of fractions, both with the decimals of the larger."""
    upper = wording.fraction(high)
    _, _, decimals = upper.partition(".")
    return f"{low:.{len(decimals)}f}–{upper}" if decimals.isdigit() else f"{low:g}–{upper}"


def roc_figure(record: LeakageRecord, membership: MembershipRecord) -> str:
    """True against false positive rate of the target, both in logarithms.

    With the diagonal, what ε and δ allow, and, hatched, what the examples are too few to tell.
    """
    shown = _shown(membership)
    lines = len(shown) + 2 + (record.epsilon is not None)
    title = "True against false positive rate of attacks on the target"
    size = (WIDTH, _FOOT + 18 + _LINE * lines)
    return render("roc", title, size, partial(_roc, record, membership, shown))


def _ranked(membership: MembershipRecord) -> list[MembershipAttackRecord]:
    return sorted(membership.attacks, key=lambda each: -each.areas[0])


def _shown(membership: MembershipRecord) -> list[MembershipAttackRecord]:
    """The strongest attacks, and the one that finds most where few may be wrongly named."""
    shown = _ranked(membership)[:_MOST_CURVES]
    found = next(filter(None, map(membership.most_found, (0.001, 0.01, 0.1))), None)
    if found is not None and found[0] not in shown:
        shown[-1] = found[0]
    return shown


def _spread(attack: MembershipAttackRecord) -> _Spread:
    return attack.name, attack.areas[0], min(attack.areas), max(attack.areas)


def _roc_table(
    record: LeakageRecord, membership: MembershipRecord, shown: Sequence[MembershipAttackRecord]
) -> Table:
    told = [fpr for fpr in _TOLD_AT if fpr >= membership.resolution * (1 - 1e-9)]
    head = ["FPR", *(each.name for each in shown)]
    rows = [[f"{fpr:g}", *(wording.fraction(_at(each, fpr)) for each in shown)] for fpr in told]
    if record.epsilon is not None:
        head.append("ε allows")
        for fpr, row in zip(told, rows, strict=True):
            row.append(wording.fraction(record.allowed_tpr(fpr)))
    return head, rows


def _at(attack: MembershipAttackRecord, fpr: float) -> float:
    """The largest true positive rate on its curve with no larger false one."""
    return max((tpr for each, tpr in attack.curve if each <= fpr * (1 + 1e-9)), default=0.0)


def _attack_table(attacks: Sequence[MembershipAttackRecord]) -> Table:
    """A row an attack; intervals and the oracle stand in further lines of their cells."""
    told = _told(attacks)
    rows = [
        (
            each.name,
            f"{wording.fraction(each.areas[0])}\n{interval(min(each.areas), max(each.areas))}",
            *(_rate_cell(each, fpr) for fpr in told),
            str(max((rate.ties for rate in map(each.resolved_rate, told) if rate), default=0)),
            str(each.queries),
        )
        for each in attacks
    ]
    return ("attack", "AUC", *(f"TPR@{fpr:g}" for fpr in told), "ties", "queries"), rows


def _told(attacks: Sequence[MembershipAttackRecord]) -> list[float]:
    """The false positive rates, falling, at which any attack has a figure."""
    fprs = sorted({rate.fpr for each in attacks for rate in each.rates}, reverse=True)
    return [fpr for fpr in fprs if any(each.resolved_rate(fpr) for each in attacks)]


def _rate_cell(attack: MembershipAttackRecord, fpr: float) -> str:
    rate, oracle = attack.resolved_rate(fpr), attack.rate(fpr, "oracle")
    if rate is None:
        return "–"
    lines = [wording.fraction(rate.tpr), interval(rate.tpr_low, rate.tpr_high)]
    lines.append(f"{'' if rate.kept else 'but '}FPR {wording.fraction(rate.realised_fpr)}")
    if rate.kept and rate.of == "all":
        lines.append("all models")
    elif rate.kept and oracle is not None:
        lines.append(f"oracle {wording.fraction(oracle.tpr)}")
    return "\n".join(lines)


def _rate_table(attacks: Iterable[MembershipAttackRecord]) -> Table:
    """Everything that is known of every threshold."""
    every = [(each.name, rate) for each in attacks for rate in each.rates]
    priors = _priors(rate for _, rate in every)
    rows = [
        (
            name,
            _WHOSE[rate.of],
            f"{rate.fpr:g}",
            f"{wording.fraction(rate.realised_fpr)}\n{rate.false_alarms:,} of {rate.others:,}",
            f"{wording.fraction(rate.tpr)}\n{interval(rate.tpr_low, rate.tpr_high)}\n"
            f"{rate.hits:,} of {rate.members:,}",
            str(rate.ties),
            *(_ppv(rate, prior) for prior in priors),
        )
        for name, rate in every
    ]
    head = ("attack", "whose", "FPR asked", "FPR realised", "TPR", "ties")
    return (*head, *(f"PPV, prior {prior}" for prior in priors)), rows


def _ppv_table(attack: MembershipAttackRecord) -> Table | None:
    """What a verdict of the strongest attack is worth, by how many there are to be found."""
    fprs = sorted({rate.fpr for rate in attack.rates}, reverse=True)
    found = map(attack.resolved_rate, fprs)
    rates = [rate for rate in found if rate is not None and rate.kept]
    priors = _priors(rates)
    if not priors:
        return None
    rows = [
        (
            f"{rate.fpr:g}{', all models' if rate.of == 'all' else ''}",
            *(_ppv(rate, prior) for prior in priors),
        )
        for rate in rates
    ]
    return ("FPR", *(f"prior {prior}" for prior in priors)), rows


def _priors(rates: Iterable[RateRecord]) -> list[str]:
    return list(dict.fromkeys(prior for rate in rates for prior in rate.ppv))


def _ppv(rate: RateRecord, prior: str) -> str:
    # Whoever names nobody is not right.
    return wording.fraction(rate.ppv.get(prior)) if rate.named else "nobody named"


def _class_table(attacks: Sequence[MembershipAttackRecord]) -> Table:
    """A class a row, with its images: those that the first attack is asked about."""
    found = [{each.name: each for each in attack.classes} for attack in attacks]
    rows = [
        (
            name,
            f"{each.members:,}",
            f"{each.others:,}",
            *(
                f"{wording.fraction(of[name].area)}\n{interval(of[name].low, of[name].high)}"
                if name in of
                else "–"
                for of in found
            ),
        )
        for name, each in found[0].items()
    ]
    return ("class", "members", "others", *(each.name for each in attacks)), rows


def _same(membership: MembershipRecord) -> str:
    """Which attacks are one with so few shadow models."""
    names = {each.name for each in membership.attacks}
    if membership.shadows > 2 or not {"lira", "lira-own-variance"} <= names:
        return ""
    return (
        "With 2 shadow models lira-own-variance is lira: one answer with an image and one without "
        "have no scatter of their own."
    )


def _roc(
    record: LeakageRecord,
    membership: MembershipRecord,
    shown: Sequence[MembershipAttackRecord],
    canvas: Canvas,
) -> None:
    canvas.title("Members found, by others wrongly named")
    canvas.text(0, 32, "TPR ↑", color=MUTED, size=10)
    left = _least(membership.resolution)
    axes = canvas.axes(_LEFT, 42, WIDTH - _LEFT - 14, _PLOT, grid="both")
    axes.set(xscale="log", yscale="log", xlim=(left, 1), ylim=(left, 1))
    ticks = [10.0**k for k in range(round(log10(left)), 1)]
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.tick_params(axis="x", pad=9)
    canvas.settle(axes)
    canvas.text(_LEFT + (WIDTH - _LEFT - 14) / 2, _FOOT, "FPR →", color=MUTED, align="center")
    legend = []
    for attack, color in zip(shown, SERIES[1:], strict=False):
        _curve(axes, attack, left, color)
        area = f"AUC {attack.areas[0]:.3f}"
        legend.append(_Sign(attack.name, color=color, lw=2, figure=area))
    if record.epsilon is not None and record.delta is not None:
        grid = [left ** (1 - k / 200) for k in range(201)]
        axes.plot(grid, [record.allowed_tpr(fpr) or 0.0 for fpr in grid], color=INK, lw=1.8)
        promise = f"ε = {record.epsilon:.3g}, δ = {wording.delta(record.delta)} allow no more"
        legend.append(_Sign(promise, color=INK, lw=1.8))
    axes.plot([left, 1], [left, 1], color=MUTED, lw=1.4, ls=_DASHES)
    _unresolved(axes, left, membership.resolution)
    few = f"too few others to tell: FPR below {membership.resolution:.2g}"
    guess = _Sign("a guess", color=MUTED, lw=1.4, dashes=_DASHES)
    _legend(canvas, [*legend, guess, _Sign(few, hatched=True)])


def _legend(canvas: Canvas, signs: Sequence[_Sign]) -> None:
    """A line for each sign, below the plot."""
    axes = canvas.axes(0, _FOOT + 14, 24, _LINE * len(signs))
    axes.set(xlim=(0, 1), ylim=(len(signs), 0), xticks=[], yticks=[])
    for row, sign in enumerate(signs):
        y = _FOOT + 14 + _LINE * (row + 0.5)
        if sign.hatched:
            axes.axhspan(row + 0.15, row + 0.85, **_GROUND)
            axes.axhspan(row + 0.15, row + 0.85, **_HATCH)
        else:
            axes.plot([0, 1], [row + 0.5] * 2, color=sign.color, lw=sign.lw, ls=sign.dashes)
        room = WIDTH - 32 - (76 if sign.figure else 0)
        canvas.text(32, y, short(sign.words, 60), room=room)
        canvas.text(WIDTH, y, sign.figure, align="right", bold=True)


def _least(resolution: float) -> float:
    """The power of ten at which the curve begins, so that what is not resolved can be seen."""
    return max(_LEAST_FPR, min(0.1, 10.0 ** floor(log10(resolution) - 0.3)))


def _curve(axes: Axes, attack: MembershipAttackRecord, left: float, color: str) -> None:
    """Steps: between two points of a curve no more is known than at the first."""
    shares = [max(tpr, left / 10) for _, tpr in attack.curve]
    rates = [max(fpr, left / 10) for fpr, _ in attack.curve]
    axes.step(rates, shares, where="post", color=color, lw=1.7)


def _unresolved(axes: Axes, left: float, resolution: float) -> None:
    if resolution > left:
        axes.axvspan(left, resolution, **_GROUND)
        axes.axvspan(left, resolution, **_HATCH)


def _spread_figure(name: str, title: str, rows: Sequence[_Spread]) -> str:
    """A dot and a whisker for each row, beside the line of a guess."""
    size = (WIDTH, 30 + 20 * len(rows) + 24)
    return render(name, title, size, partial(_dots, title, rows))


def _dots(title: str, rows: Sequence[_Spread], canvas: Canvas) -> None:
    canvas.title(title)
    low = min(0.5, *(each[2] for each in rows))
    high = max(0.5, *(each[3] for each in rows))
    margin = 0.06 * (high - low) or 0.02
    axes = canvas.axes(_NAMES, 26, WIDTH - _NAMES - 48, 20 * len(rows), grid="x")
    axes.set(xlim=(low - margin, high + margin), ylim=(len(rows), 0), yticks=[])
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter("{x:g}")
    canvas.settle(axes)
    axes.axvline(0.5, color=MUTED, lw=1.2, ls=_DASHES)
    for row, (name, value, least, largest) in enumerate(rows):
        axes.hlines(row + 0.5, least, largest, color=SERIES[1], lw=1.6, alpha=0.6)
        axes.scatter([value], [row + 0.5], s=40, c=SERIES[1], ec=CARD, lw=1, zorder=3)
        y = 26 + 20 * (row + 0.5)
        canvas.text(_NAMES - 8, y, short(name, 22), align="right", room=_NAMES - 8)
        canvas.text(WIDTH, y, f"{value:.3f}", align="right", bold=True)
