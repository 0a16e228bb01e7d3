"""The page of a robustness evaluation: figures with their conditions, and whether to believe them.

With it the picture of a certification: how many images are proven correct, by length of the attack.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from secure_cnn.pages.canvas import CARD, MUTED, SERIES, WIDTH, Canvas, percents, render, short
from secure_cnn.pages.classes import attacked_recall, recall_rows
from secure_cnn.pages.figures import Examples, example_figures
from secure_cnn.pages.template import fill
from secure_cnn.record import RobustnessRecord, wording
from secure_cnn.record.document import require, write_text

__all__ = ["CurvePoint", "certificate_curve", "render_robustness", "write_robustness"]

CurvePoint = tuple[float, float, float, float]
"""Radius, certified accuracy, and the two ends of its interval."""

_SIGNS = {"pass": "✓ pass", "fail": "✗ FAIL", "not checked": "– not checked"}
_LEFT, _PLOT, _LINE = 40, 160, 18
_CLEAN, _ATTACKED = SERIES[1], SERIES[2]


def write_robustness(
    record: RobustnessRecord, examples: Examples | None, folder: str | Path
) -> None:
    """Writes `robustness.json` and the page `robustness.html` into a folder, each atomically."""
    record.write(Path(folder, "robustness.json"))
    write_text(Path(folder, "robustness.html"), render_robustness(record, examples))


def render_robustness(record: RobustnessRecord, examples: Examples | None = None) -> str:
    """The page of an evaluation as text; it needs no network and runs no script."""
    report, summary = record.report, record.report["summary"]
    recalls = recall_rows(record.classes, summary)
    curve = next((each["curve"] for each in report["verdicts"] if each["curve"]), None)
    values = {
        "record": record,
        "report": report,
        "summary": summary,
        "threat": wording.threat(**report["threat"]),
        "headline": _headline(report),
        "trust": _trust(report["verdicts"]),
        "undrawn": _undrawn(report),
        "verdicts": [(_SIGNS[each["outcome"]], each) for each in report["verdicts"]],
        "curve": curve and _eps_curve(curve, float(report["threat"]["eps"]), summary),
        "curve_table": (
            ("eps", "accuracy", "95% interval"),
            [
                (f"{p['eps']:.3g}", wording.share(p["accuracy"]), wording.between(p["interval"]))
                for p in curve or ()
            ],
        ),
        "recall": attacked_recall(recalls),
        "recall_table": (
            ("class", "clean", "worst case"),
            [(name, *map(wording.share, shares)) for name, *shares in recalls],
        ),
        "pictures": example_figures(examples),
        **_certificate(record.certification),
    }
    return fill("robustness.html.jinja", values)


def certificate_curve(curves: Mapping[str, Sequence[CurvePoint]]) -> str:
    """Certified accuracy against the l2 radius, one line with its interval for each model.

    `curves` has by name, at least one and at most six, points of ascending radius up to the largest
    that could be certified: of a `CertificationReport`, `summary.curve` of its `to_dict`. A
    RunError says which is not of this form.
    """
    require(1 <= len(curves) <= len(SERIES), "curves", f"1 to {len(SERIES)}", len(curves))
    for name, points in curves.items():
        fits = len(points) > 0 and all(
            len(point) == 4 and 0 <= point[2] <= point[1] <= point[3] <= 1 for point in points
        )
        rises = all(a[0] < b[0] for a, b in pairwise(points))
        require(
            fits and rises and points[0][0] >= 0,
            f"curves.{name}",
            "points (radius, accuracy, low, high) of ascending radius and low <= accuracy <= high",
            list(points)[:2],
        )
    size = (WIDTH, 30 + _PLOT + 52 + _LINE * (len(curves) + 2))
    return render("certificate", "Certified accuracy by radius", size, partial(_proven, curves))


def _headline(report: Mapping[str, Any]) -> str:
    """The robust accuracy in one sentence with everything that it rests on."""
    summary = report["summary"]
    return (
        f"{wording.share(summary['worst_case_accuracy'])} of {summary['samples']} test images are "
        f"classified correctly whatever {_listed(list(report['outcomes']))} changed within "
        f"{wording.threat(**report['threat'])}; "
        f"95% interval {wording.between(summary['worst_case_interval'])}."
    )


def _undrawn(report: Mapping[str, Any]) -> str:
    """What is wrong with the attacks on a model that answers at random; nothing of others."""
    weak = [name for name, each in report["settings"].items() if each.get("draws", 1) == 1]
    if not weak or not report.get("repeats"):
        return ""
    return (
        f"The model answers at random, and {_listed(weak)} met one draw of it at a time, so that "
        "the figure is too high; give attacks 20 draws, as autoattack-rand has."
    )


def _trust(verdicts: Sequence[Mapping[str, Any]]) -> str:
    counts = {outcome: sum(each["outcome"] == outcome for each in verdicts) for outcome in _SIGNS}
    if not verdicts:
        return "Whether the attacks did their work was not checked: an upper bound, no more."
    if counts["fail"]:
        return (
            f"{counts['fail']} of {len(verdicts)} checks failed: the attacks have not measured "
            "how robust this model is, and the figure is too high or cannot be relied on."
        )
    return (
        f"{counts['pass']} checks passed, {counts['not checked']} could not be run: no sign that "
        "gradients are masked. This is a measurement, not a proof."
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _certificate(certification: Mapping[str, Any] | None) -> dict[str, Any]:
    if certification is None:
        return {"certificate": None}
    smoothing, summary = certification["smoothing"], certification["summary"]
    curve = [tuple(point) for point in summary["curve"]]
    said = (
        f"Of {len(summary['radii'])} test images, classified by the model smoothed with noise of "
        f"σ = {smoothing['sigma']:g} ({smoothing['samples']} samples an image; each statement "
        f"fails with a chance of at most {smoothing['alpha']:g}); "
        f"{wording.share(summary['abstention'])} abstained. This is about the smoothed model, and "
        "it is a proof up to that chance, not a measurement."
    )
    rows = [
        (f"{r:.3f}", wording.share(a), wording.between((low, high))) for r, a, low, high in curve
    ]
    return {
        "certificate": certificate_curve({f"σ = {smoothing['sigma']:g}": curve}),
        "certified": said,
        "certificate_table": (("l2 radius", "certified accuracy", "95% interval"), rows),
    }


def _eps_curve(curve: Sequence[Mapping[str, Any]], eps: float, summary: Mapping[str, Any]) -> str:
    """Accuracy against the size of the perturbation, from none upwards, with its 95 % band."""
    title = "Accuracy against the size of the perturbation"
    return render("eps-curve", title, (WIDTH, 236), partial(_attacked, curve, eps, summary))


def _attacked(
    curve: Sequence[Mapping[str, Any]], eps: float, summary: Mapping[str, Any], canvas: Canvas
) -> None:
    """The band, the line, and the evaluation's own figure as a diamond with its whisker."""
    canvas.title("Accuracy against eps")
    axes = canvas.axes(_LEFT, 34, WIDTH - _LEFT - 16, _PLOT, grid="y")
    radii = [point["eps"] for point in curve]
    shares = [point["accuracy"] for point in curve]
    low, high = zip(*(point["interval"] for point in curve), strict=True)
    # Equal ratios between the radii would crowd at the left of a linear axis.
    axes.set_xscale("function", functions=(np.sqrt, np.square))
    axes.set(xlim=(0, radii[-1]), ylim=(0, 1))
    axes.fill_between(radii, low, high, color=_CLEAN, alpha=0.18, lw=0)
    axes.plot(radii, shares, color=_CLEAN, lw=2, clip_on=False)
    axes.scatter(radii, shares, 30, c=_CLEAN, ec=CARD, lw=1, zorder=3, clip_on=False)
    worst, interval = summary["worst_case_accuracy"], summary["worst_case_interval"]
    axes.vlines(eps, *interval, color=_ATTACKED, lw=2, zorder=4)
    axes.scatter([eps], [worst], s=46, marker="D", c=CARD, ec=_ATTACKED, lw=1.8, zorder=5)
    percents(axes.yaxis, [0, 0.25, 0.5, 0.75, 1])
    ticks = [radius for k, radius in enumerate(radii) if k == 0 or k > 1]
    axes.set_xticks(ticks, [f"{radius:.2g}" for radius in ticks])
    axes.minorticks_off()
    canvas.settle(axes)
    middle = _LEFT + (WIDTH - _LEFT - 16) / 2
    canvas.text(middle, canvas.height - 10, "eps", color=MUTED, align="center")
    canvas.text(WIDTH, 12, f"◇ worst case {worst:.1%} at {eps:.3g}", color=_ATTACKED, align="right")


def _proven(curves: Mapping[str, Sequence[CurvePoint]], canvas: Canvas) -> None:
    canvas.title("Certified accuracy")
    width, below = WIDTH - _LEFT - 14, 30 + _PLOT + 32
    axes = canvas.axes(_LEFT, 30, width, _PLOT, grid="y")
    axes.set(xlim=(0, 1.02 * max(points[-1][0] for points in curves.values()) or 1.0), ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    percents(axes.yaxis)
    axes.tick_params(axis="x", pad=8)
    canvas.settle(axes)
    words = "l2 radius, pixels in [0, 1]"
    canvas.text(_LEFT + width / 2, below, words, color=MUTED, align="center")
    # A single curve is the subject of the picture, not its plain baseline: skip the grey.
    colors = SERIES[1:] if len(curves) < len(SERIES) else SERIES
    for number, ((name, points), color) in enumerate(zip(curves.items(), colors, strict=False)):
        radii, accuracy, low, high = zip(*points, strict=True)
        axes.fill_between(radii, low, high, color=color, alpha=0.16, lw=0)
        axes.plot(radii, accuracy, color=color, lw=2)
        axes.plot([radii[-1]] * 2, [accuracy[-1], 0], color=color, lw=1.2, ls=(0, (2, 2)))
        y = below + 22 + number * _LINE
        canvas.text(_LEFT, y, short(name, 30), color=color, bold=True, room=width - 96)
        canvas.text(WIDTH - 14, y, f"{accuracy[0]:.1%} at 0", align="right")
    notes = ("Share of images proven correct under every change", "this long; band: 95 % interval.")
    for number, note in enumerate(notes):
        bottom = canvas.height - 8 - _LINE * (1 - number)
        canvas.text(_LEFT, bottom, note, color=MUTED)
