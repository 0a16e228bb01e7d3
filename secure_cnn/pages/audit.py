"""The page of a privacy audit: scores of canaries in and out, and bounds against the claim."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from secure_cnn.pages.canvas import INK, MUTED, SERIES, WIDTH, Canvas, render
from secure_cnn.pages.template import Fact, Table, fill
from secure_cnn.record import wording
from secure_cnn.record.document import write_text
from secure_cnn.record.run import AuditRecord

__all__ = ["audit_figure", "render_audit", "write_audit"]

_OUT, _IN = SERIES[0], SERIES[1]
_HEIGHT, _NAMES = 430, 132
_BINS = 41


def write_audit(record: AuditRecord, folder: str | Path) -> None:
    """Writes `audit.json` and the page `audit.html` into a folder, each atomically."""
    record.write(Path(folder, "audit.json"))
    write_text(Path(folder, "audit.html"), render_audit(record))


def render_audit(record: AuditRecord) -> str:
    """The page of an audit as text; it needs no network and runs no script."""
    report = record.report
    given = {name: value for name, value in record.settings.items() if value is not None}
    values = {
        "record": record,
        "report": report,
        "settings": dict(sorted(given.items())),
        "facts": _facts(report),
        "picture": audit_figure(record),
        "scores": _scores(report),
        "bounds": _bound_rows(report),
    }
    return fill("audit.html.jinja", values)


def audit_figure(record: AuditRecord) -> str:
    """Scores in and out as histograms with the Gaussians fitted to them; bounds below the claim."""
    title = "Scores of canaries in and out, and lower bounds on epsilon against the claim"
    return render("audit", title, (WIDTH, _HEIGHT), partial(_draw, record.report))


def _facts(report: Mapping[str, Any]) -> list[Fact]:
    bounds = [(float(each["epsilon"]), float(each["confidence"])) for each in report["bounds"]]
    claimed = float(report["claimed_epsilon"])
    facts = [
        Fact(
            name="Claimed, one step",
            value=f"ε = {claimed:.3g}",
            detail=f"at δ = {wording.delta(float(report['delta']))}, without amplification",
        )
    ]
    if bounds:
        largest, confidence = max(bounds)
        held = "within the claim" if largest <= claimed else "above the claim"
        detail = f"{held}; largest lower bound, each at {100 * confidence:g}% confidence"
        facts.append(Fact(name="Measured, one step", value=f"ε ≥ {largest:.3g}", detail=detail))
    inside, outside = len(report["in_scores"]), len(report["out_scores"])
    detail = f"{inside} with the canary in the sample, {outside} without"
    facts.append(Fact(name="Scores", value=str(inside + outside), detail=detail))
    passed = sum(bool(check["passed"]) for check in report["checks"])
    value = f"{passed} of {len(report['checks'])}"
    return [*facts, Fact(name="Checks", value=value, detail="passed")]


def _scores(report: Mapping[str, Any]) -> Table:
    rows = []
    for name, words in (("in_scores", "in the sample"), ("out_scores", "not in the sample")):
        scores = np.asarray(report[name], dtype=float)
        found = (scores.mean(), scores.std(ddof=1), scores.min(), np.median(scores), scores.max())
        rows.append((words, str(len(scores)), *(f"{each:.4g}" for each in found)))
    return ("canary", "scores", "mean", "deviation", "lowest", "median", "highest"), rows


def _bound_rows(report: Mapping[str, Any]) -> Table:
    claimed = f"{float(report['claimed_epsilon']):.4g}"
    rows = [
        (
            str(each["method"]),
            f"{float(each['epsilon']):.4g}",
            claimed,
            f"{100 * float(each['confidence']):g}%",
        )
        for each in report["bounds"]
    ]
    return ("method", "ε at least", "claimed", "confidence"), rows


def _draw(report: Mapping[str, Any], canvas: Canvas) -> None:
    canvas.title("Scores of canaries")
    canvas.text(0, 31, "in the sample", color=_IN, bold=True)
    canvas.text(96, 31, "not in the sample", color=_OUT, bold=True)
    axes = canvas.axes(8, 44, WIDTH - 16, 180, grid="x")
    _histograms(axes, report)
    canvas.settle(axes)
    canvas.text(WIDTH / 2, 252, "clipping norms", color=MUTED, align="center")
    canvas.text(0, 290, "Lower bounds on the ε of one step", bold=True, size=12.5)
    canvas.text(0, 308, f"at δ = {wording.delta(float(report['delta']))}", color=MUTED)
    _bounds(canvas, report)


def _histograms(axes: Axes, report: Mapping[str, Any]) -> None:
    """Both samples on the same bins, each with the Gaussian of its mean and deviation."""
    samples = [np.asarray(report[name], dtype=float) for name in ("out_scores", "in_scores")]
    both = np.concatenate(samples)
    low, high = float(both.min()), float(both.max())
    margin = 0.05 * (high - low) or 0.5
    edges = np.linspace(low - margin, high + margin, _BINS + 1)
    grid = np.linspace(edges[0], edges[-1], 400)
    for scores, color in zip(samples, (_OUT, _IN), strict=True):
        axes.hist(scores, bins=edges.tolist(), density=True, color=color, alpha=0.3)
        mean, deviation = float(scores.mean()), float(scores.std(ddof=1))
        if deviation > 0.02 * (high - low):
            square = ((grid - mean) / deviation) ** 2
            heights = np.exp(-square / 2) / (deviation * math.sqrt(2 * math.pi))
            axes.plot(grid, heights, color=color, lw=1.8)
        axes.axvline(mean, color=color, lw=1, ls=(0, (4, 3)))
    axes.set(xlim=(edges[0], edges[-1]), yticks=[])


def _bounds(canvas: Canvas, report: Mapping[str, Any]) -> None:
    """A bar for each bound, and the claim as a line that none may pass."""
    claimed = float(report["claimed_epsilon"])
    bounds = [(b["method"], float(b["epsilon"]), float(b["confidence"])) for b in report["bounds"]]
    widest = 1.25 * max([claimed, *(e for _, e, _ in bounds if math.isfinite(e) and e < 9e9)])
    width = WIDTH - _NAMES - 40
    axes = canvas.axes(_NAMES, 318, width, 84)
    axes.set(xlim=(0, widest or 1.0), ylim=(max(1, len(bounds)) - 0.4, -0.6), xticks=[], yticks=[])
    for row, (method, epsilon, confidence) in enumerate(bounds):
        y = 318 + 84 * (row + 0.6) / max(1, len(bounds))
        shown = min(epsilon, widest)
        axes.barh(row, shown, height=0.5, color=SERIES[1] if epsilon <= claimed else SERIES[2])
        canvas.text(
            _NAMES - 8, y, f"{method}, {100 * confidence:g} %", align="right", room=_NAMES - 8
        )
        canvas.text(WIDTH, y, f"{epsilon:.3g}", align="right", bold=True)
    axes.axvline(claimed, color=INK, lw=1.6)
    x = _NAMES + width * claimed / (widest or 1.0)
    canvas.text(x, 416, f"claimed {claimed:.3g}", align="center", bold=True)
