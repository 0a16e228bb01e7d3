"""The page of a robustness evaluation: figures with their conditions, and whether to believe them.

Plain values go in, text comes out. Deliberately not here: the evaluation itself.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secure_cnn.pages.certificate import certificate_curve
from secure_cnn.pages.examples import Examples, example_figure
from secure_cnn.pages.robustness_figures import eps_curve, recall_bars, recall_rows
from secure_cnn.pages.template import fill
from secure_cnn.record import wording
from secure_cnn.record.document import write_text
from secure_cnn.record.reports import RobustnessRecord
from secure_cnn.record.wording import Table

__all__ = ["render_robustness", "write_robustness"]

_SIGNS = {"pass": "✓ pass", "fail": "✗ FAIL", "not checked": "– not checked"}


def write_robustness(
    record: RobustnessRecord, examples: Examples | None, folder: str | Path
) -> None:
    """Writes `robustness.json` and the page `robustness.html` into a folder, each atomically.

    Raises:
        RunError: The place cannot be written to.
    """
    record.write(Path(folder, "robustness.json"))
    write_text(Path(folder, "robustness.html"), render_robustness(record, examples))


def render_robustness(record: RobustnessRecord, examples: Examples | None = None) -> str:
    """The page of an evaluation as text; it needs no network and runs no script.

    Args:
        examples: Attacked test images to show, or None.
    """
    report, summary = record.report, record.report["summary"]
    recalls = recall_rows(record.classes, summary)
    curve = next((each["curve"] for each in report["verdicts"] if each["curve"]), None)
    pictures = (
        () if examples is None else [example_figure(examples, k) for k in range(len(examples))]
    )
    values = {
        "record": record,
        "report": report,
        "summary": summary,
        "threat": _threat(report["threat"]),
        "headline": _headline(report),
        "trust": _trust(report["verdicts"]),
        "undrawn": _undrawn(report),
        "attacks": _attacks(report),
        "verdicts": [(_SIGNS[each["outcome"]], each) for each in report["verdicts"]],
        "curve": curve and eps_curve(curve, report["threat"], summary),
        "curve_table": _curve_table(curve or ()),
        "recall": recall_bars(recalls),
        "recall_table": (
            ("class", "clean", "worst case"),
            [(name, *map(wording.share, shares)) for name, *shares in recalls],
        ),
        "pictures": pictures,
        **_certificate(record.certification),
    }
    return fill("robustness.html.jinja", values)


def _headline(report: Mapping[str, Any]) -> str:
    """The robust accuracy in one sentence with everything that it rests on."""
    summary = report["summary"]
    low, high = summary["worst_case_interval"]
    return (
        f"{wording.share(summary['worst_case_accuracy'])} of {summary['samples']} test images are "
        f"classified correctly whatever {_listed(list(report['outcomes']))} changed within "
        f"{_threat(report['threat'])}; 95% interval {wording.share(low)} to {wording.share(high)}."
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
    """What the verdicts say together."""
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


def _attacks(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each attack."""
    summary = report["summary"]
    return [
        {
            "name": name,
            "tried": summary["tried"][name],
            "fooled": summary["fooled"][name],
            "alone": summary["individual_accuracy"][name],
            "after": summary["attack_accuracy"][name],
            "interval": summary["attack_intervals"][name],
            "settings": ", ".join(f"{key} {value}" for key, value in settings.items()),
        }
        for name, settings in report["settings"].items()
    ]


def _threat(threat: Mapping[str, Any]) -> str:
    """A threat model in one phrase."""
    return wording.threat(threat["norm"], threat["eps"], threat["bounds"])


def _listed(names: Sequence[str]) -> str:
    """Names as English lists them."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _curve_table(curve: Sequence[Mapping[str, Any]]) -> Table:
    """The points of the curve."""
    rows = [
        (
            f"{point['eps']:.3g}",
            wording.share(point["accuracy"]),
            _between(point["interval"]),
        )
        for point in curve
    ]
    return ("eps", "accuracy", "95% interval"), rows


def _certificate(certification: Mapping[str, Any] | None) -> dict[str, Any]:
    """What randomised smoothing proved, if anything."""
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
    rows = [(f"{r:.3f}", wording.share(a), _between((low, high))) for r, a, low, high in curve]
    return {
        "certificate": certificate_curve({f"σ = {smoothing['sigma']:g}": curve}),
        "certified": said,
        "certificate_table": (("l2 radius", "certified accuracy", "95% interval"), rows),
    }


def _between(ends: Sequence[float]) -> str:
    """An interval in percent."""
    return f"{wording.share(ends[0])} to {wording.share(ends[1])}"
