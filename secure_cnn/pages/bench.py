"""The page of a benchmark of protections: figures, the numbers beside them, and the noise.

Measurements go in, text comes out. Deliberately not here: measuring.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from secure_cnn.pages.bench_figures import (
    SHOWN_PARTS,
    parts_bars,
    ratio_bars,
    scaling_curves,
    trained_dots,
)
from secure_cnn.pages.figures import colors_of
from secure_cnn.pages.template import fill
from secure_cnn.pages.tradeoff import Tradeoff
from secure_cnn.record.document import write_text
from secure_cnn.record.measurements import Measurements, Row
from secure_cnn.record.noise import noise_checks
from secure_cnn.record.tradeoff import Estimate, Needs, TradeoffPoint

__all__ = ["SHOWN_PARTS", "render_bench", "write_bench"]

_TRAINED = ("accuracy", "macro_recall", "robust_accuracy", "epsilon")


def write_bench(path: Path, measured: Measurements) -> None:
    """Writes the page of a benchmark, atomically.

    Args:
        measured: What `secure-cnn bench overhead` found.

    Raises:
        RunError: The place cannot be written to.
    """
    write_text(path, render_bench(measured))


def render_bench(measured: Measurements) -> str:
    """The page as text; it needs no network and runs no script."""
    cases = [_case(measured, case) for case in _cases(measured.rows)]
    axes = [_axis(measured, axis) for axis in _axes(measured.rows)]
    sections = [(f"case-{n}", case["name"]) for n, case in enumerate(cases, start=1)]
    sections += [("growth", "How cost grows")] if axes else []
    values = {
        "measured": measured,
        "checks": noise_checks(measured.rows),
        "cases": cases,
        "axes": axes,
        "sections": [*sections, ("conditions", "Conditions")],
        "ms": _milliseconds,
    }
    return fill("bench.html.jinja", values)


def _cases(rows: Iterable[Row]) -> list[str]:
    """What was measured as a training, not as a point of a curve."""
    return list(dict.fromkeys(row.case for row in rows if row.metric == "images_per_second"))


def _axes(rows: Iterable[Row]) -> list[str]:
    """What was let grow."""
    return list(dict.fromkeys(row.case for row in rows if row.metric == "exponent"))


def _case(measured: Measurements, case: str) -> dict[str, Any]:
    """Everything that the page shows of one case."""
    rows = [row for row in measured.rows if row.case == case]
    check = next((each for each in noise_checks(rows)), None)
    ratios = [row for row in rows if row.metric == "time_ratio"]
    found = {(row.variant, row.metric): row for row in rows}
    parts = {
        variant: {
            part: found[variant, f"time_{part}"].median
            for part in SHOWN_PARTS
            if (variant, f"time_{part}") in found
        }
        for variant in (row.variant for row in ratios)
    }
    parts = {variant: own for variant, own in parts.items() if own}
    used = [part for part in SHOWN_PARTS if any(part in own for own in parts.values())]
    trained = _trained(rows)
    return {
        "name": case,
        "ratios": ratios,
        "found": found,
        "parts": parts,
        "used": used,
        "trained": trained,
        "when": ("examples", "time"),
        "figures": [
            ratio_bars(case, ratios, check),
            *([parts_bars(case, parts)] if parts else []),
        ],
        "tradeoff": _tradeoff(rows),
        "dots": trained_dots(case, trained) if trained else None,
    }


def _trained(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """What each trained variant came to, by metric."""
    wanted = {f"{name}_same_{when}" for name in _TRAINED for when in ("examples", "time")}
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.metric in wanted:
            found.setdefault(row.variant, {})[row.metric] = row.median
    return found


def _tradeoff(rows: Sequence[Row]) -> Tradeoff | None:
    """What the variants give and take after as many examples; where a protection was measured."""
    found = {(row.variant, row.metric.removesuffix("_same_examples")): row for row in rows}

    def estimate(variant: str, metric: str) -> Estimate | None:
        row = found.get((variant, metric))
        return None if row is None else Estimate(value=row.median, low=row.low, high=row.high)

    points = []
    for variant in dict.fromkeys(variant for variant, _ in found):
        accuracy, recall = estimate(variant, "accuracy"), estimate(variant, "macro_recall")
        epsilon = estimate(variant, "epsilon")
        if accuracy is not None and recall is not None:
            points.append(
                TradeoffPoint(
                    name=variant,
                    accuracy=accuracy,
                    macro_recall=recall.value,
                    robust_accuracy=estimate(variant, "robust_accuracy"),
                    epsilon=None if epsilon is None else epsilon.value,
                    time=estimate(variant, "time_ratio"),
                )
            )
    protected = any(point.robust_accuracy or point.epsilon is not None for point in points)
    colors = colors_of(point.name for point in points)
    return Tradeoff.between(points, colors, Needs()) if protected else None


def _axis(measured: Measurements, axis: str) -> dict[str, Any]:
    """The curves of one axis and their exponents."""
    times: dict[str, dict[float, float]] = {}
    errors = {
        row.variant: row.median
        for row in measured.rows
        if row.case == axis and row.metric == "exponent_error"
    }
    exponents = [r for r in measured.rows if r.case == axis and r.metric == "exponent"]
    for row in measured.rows:
        what, _, size = row.case.rpartition(" ")
        if what == axis and row.metric == "time":
            times.setdefault(row.variant, {})[float(size)] = row.median
    return {
        "name": axis,
        "exponents": exponents,
        "sizes": sorted({size for own in times.values() for size in own}),
        "times": times,
        "errors": errors,
        "figure": scaling_curves(axis, times) if times else None,
    }


def _milliseconds(seconds: float) -> str:
    """For a table."""
    return f"{1000 * seconds:.2f}" if seconds >= 1e-5 else f"{1000 * seconds:.1g}"
