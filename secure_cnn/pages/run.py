"""The page: one self-contained HTML file that shows a run to a reader who was not there.

Every sentence that claims something is made here, from the record alone, and says under which
conditions it holds or that it does not. The template only places them. Deliberately not here:
scripts, fonts and anything else that a browser would have to fetch; the page forbids it to itself.
"""

from pathlib import Path
from typing import Literal

from secure_cnn.pages import figures
from secure_cnn.pages.classes import recall_table
from secure_cnn.pages.curves import accuracy_curve, epsilon_curve, loss_curve
from secure_cnn.pages.examples import Examples, example_figure
from secure_cnn.pages.template import fill
from secure_cnn.pages.tradeoff import Tradeoff
from secure_cnn.record import wording
from secure_cnn.record.document import write_text
from secure_cnn.record.results import EpochRecord, ResultRecord
from secure_cnn.record.run import RunRecord, ThreatRecord
from secure_cnn.record.tradeoff import Needs, points_of
from secure_cnn.record.wording import Fact

__all__ = ["render_page", "write_page"]


def write_page(record: RunRecord, examples: Examples | None, path: str | Path) -> None:
    """Write the page of a run to `path`, atomically.

    Guarantee: the file needs no network and runs no script, and says so to the browser (its content
    security policy). Text from the record is escaped.

    Args:
        record: The run; it may still be running.
        examples: Test images to show, or None.
        path: The file to write; an existing one is replaced in one step.

    Raises:
        RunError: The place cannot be written to.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from secure_cnn.record import DataRecord, ModelRecord
        >>> data = DataRecord(name="pets", fingerprint="", train=8, test=2, shape=(1, 8, 8),
        ...                   classes=("cat", "dog"))
        >>> model = ModelRecord(name="compact", parameters=9000)
        >>> with TemporaryDirectory() as folder:
        ...     page = Path(folder, "report.html")
        ...     write_page(RunRecord(created="2025-01-01", data=data, model=model), None, page)
        ...     page.read_text(encoding="utf-8").startswith("<!doctype html>")
        True
    """
    write_text(Path(path), render_page(record, examples))


def render_page(record: RunRecord, examples: Examples | None = None) -> str:
    """The page of a run as text; the same record gives the same text.

    Args:
        record: The run; it may still be running.
        examples: Test images to show, or None.

    Example:
        >>> from secure_cnn.record import DataRecord, ModelRecord
        >>> data = DataRecord(name="pets", fingerprint="", train=8, test=2, shape=(1, 8, 8),
        ...                   classes=("cat", "dog"))
        >>> model = ModelRecord(name="compact", parameters=9000)
        >>> page = render_page(RunRecord(created="2025-01-01", data=data, model=model))
        >>> "Not private" in page
        True
    """
    outcome, baseline = _outcome(record), _baseline(record)
    colors = figures.variant_colors(record)
    results = {result.variant: result for result in record.results}
    before = None if baseline is None else baseline.variant
    attacks = list(dict.fromkeys(name for result in record.results for name in result.attacks))
    values = {
        "record": record,
        "examples": examples,
        "outcome": outcome,
        "baseline": baseline,
        "variant": _variant(record),
        "pending": _pending(record),
        "facts": _facts(record, outcome, baseline),
        "privacy": _privacy(record),
        "robustness": _robustness(record, outcome),
        "uncovered": _uncovered(record),
        "threat": record.threat and _against(record.threat),
        "attacks": attacks,
        "colors": colors,
        "curves": _curves(record),
        "tradeoff": Tradeoff.between(points_of(record), colors, Needs()),
        "recalls": recall_table(results, record.data.classes, before),
        "recall": figures.class_recall(record) if record.results else None,
        "confusion": outcome and figures.confusion_matrix(record, outcome.variant),
        "costs": [figures.cost_bars(record, ratio) for ratio in _ratios(record)],
        "pictures": _pictures(examples),
        "shown": figures.MOST_CLASSES,
    }
    return fill("run.html.jinja", values)


def _outcome(record: RunRecord) -> ResultRecord | None:
    """What the run is about: its last protected result, or the plain one if there is no other."""
    protected = [result for result in record.results if result.variant != "plain"]
    return next(iter(protected[::-1] or record.results), None)


def _baseline(record: RunRecord) -> ResultRecord | None:
    """The plain result beside a protected one."""
    outcome = _outcome(record)
    plain = [result for result in record.results if result.variant == "plain"]
    return plain[0] if plain and outcome is not plain[0] else None


def _variant(record: RunRecord) -> str:
    """The name of what the run is about, before there is a result too."""
    outcome = _outcome(record)
    if outcome is not None:
        return outcome.variant
    return record.epochs[-1].variant if record.epochs else "nothing yet"


def _pending(record: RunRecord) -> list[str]:
    """The variants that have trained and have no result yet."""
    finished = {result.variant for result in record.results}
    trained = dict.fromkeys(epoch.variant for epoch in record.epochs)
    return [variant for variant in trained if variant not in finished]


def _spent(record: RunRecord) -> float | None:
    """ε spent by the variant the run is about."""
    parts: list[EpochRecord | ResultRecord] = [*record.epochs, *record.results]
    spent = [part.epsilon for part in parts if part.variant == _variant(record)]
    return next((epsilon for epsilon in reversed(spent) if epsilon is not None), None)


def _curves(record: RunRecord) -> list[str]:
    """The curves for which there is something to draw."""
    if not record.epochs:
        return []
    curves = [accuracy_curve(record), loss_curve(record)]
    private = any(epoch.epsilon is not None for epoch in record.epochs)
    return [*curves, epsilon_curve(record)] if private else curves


def _pictures(examples: Examples | None) -> list[str]:
    """The example images, one figure each."""
    if examples is None:
        return []
    return [example_figure(examples, index) for index in range(len(examples))]


def _ratios(record: RunRecord) -> list[Literal["time_ratio", "memory_ratio"]]:
    """The costs against plain that are on record."""
    measured = {row.metric for row in record.cost}
    every: tuple[Literal["time_ratio"], Literal["memory_ratio"]] = ("time_ratio", "memory_ratio")
    return [ratio for ratio in every if ratio in measured]


def _facts(
    record: RunRecord, outcome: ResultRecord | None, baseline: ResultRecord | None
) -> list[Fact]:
    """The figures of the summary."""
    facts = [_privacy_fact(record), _robust_fact(record, outcome, baseline)]
    if outcome is None:
        return facts
    pairs = [("Accuracy", "accuracy"), ("Macro recall", "macro_recall")]
    for name, value in pairs:
        before = (
            f"plain: {wording.share(getattr(baseline, value))}" if baseline else "no plain baseline"
        )
        detail = before if outcome.variant != "plain" else "on the test images"
        facts.append(Fact(name=name, value=wording.share(getattr(outcome, value)), detail=detail))
    return [*facts, _cost_fact(record, outcome, baseline)]


def _privacy_fact(record: RunRecord) -> Fact:
    """ε with its δ, or that there is none."""
    spent = _spent(record)
    if record.privacy is None or spent is None:
        return Fact(name="Privacy", value="none", detail="no bound on what the model memorised")
    detail = f"ε spent, at δ = {wording.delta(record.privacy.delta)}"
    return Fact(name="Privacy", value=f"ε = {wording.epsilon(spent)}", detail=detail)


def _robust_fact(
    record: RunRecord, outcome: ResultRecord | None, baseline: ResultRecord | None
) -> Fact:
    """Robust accuracy with its interval and its attacks, or that it is unknown."""
    if outcome is None or outcome.robust_accuracy is None:
        return Fact(name="Robust accuracy", value="unknown", detail="not evaluated")
    interval = (
        f"95% interval {wording.share(outcome.robust_low)} to {wording.share(outcome.robust_high)}"
    )
    against = f"worst of {', '.join(outcome.attacks) or 'unnamed attacks'}"
    before = ""
    if baseline is not None and baseline.robust_accuracy is not None:
        before = f"; plain: {wording.share(baseline.robust_accuracy)}"
    value = wording.share(outcome.robust_accuracy)
    return Fact(name="Robust accuracy", value=value, detail=f"{interval}; {against}{before}")


def _cost_fact(record: RunRecord, outcome: ResultRecord, baseline: ResultRecord | None) -> Fact:
    """What a step costs: a benchmark's ratio if there is one, else what this run saw."""
    name, own = "Time per step", outcome.seconds_per_step
    rows = [row for row in record.cost if row.metric == "time_ratio"]
    row = next((row for row in rows if row.variant == outcome.variant), None)
    if row is not None:
        detail = f"of plain, {row.low:.2f} to {row.high:.2f}, n = {row.n}"
        return Fact(name=name, value=f"{row.median:.2f}×", detail=detail)
    plain = baseline.seconds_per_step if baseline else None
    if own is not None and plain:
        return Fact(name=name, value=f"{own / plain:.2f}×", detail="of plain, as seen in this run")
    if own is not None:
        return Fact(name=name, value=f"{own * 1000:.3g} ms", detail="no plain step to compare")
    return Fact(name=name, value="unknown", detail="not measured")


def _privacy(record: RunRecord) -> str:
    """What is guaranteed to the people in the training data, and on which terms."""
    terms, spent = record.privacy, _spent(record)
    if terms is None or spent is None:
        return (
            f"Not private: {_variant(record)} carries no differential-privacy guarantee. Its "
            "weights may reveal single training images."
        )
    return (
        f"({wording.epsilon(spent)}, {wording.delta(terms.delta)})-differential privacy for each "
        f"training image, where neighbours are “{terms.relation}”: gradients clipped to norm "
        f"{terms.max_grad_norm:.4g}, noise {terms.noise_multiplier:.4g} times that norm, each "
        f"image joining a step with probability {terms.sampling_rate:.4g}; the plan is "
        f"{terms.steps} steps for ε = {wording.epsilon(terms.epsilon)}, counted by "
        f"“{terms.accountant}”. "
        "It covers the weights of this variant and everything computed from them."
    )


def _uncovered(record: RunRecord) -> list[str]:
    """What a reader might think ε covers, and it does not."""
    if _spent(record) is None:
        return []
    facts = []
    parts: list[EpochRecord | ResultRecord] = [*record.epochs, *record.results]
    if any(part.variant == "plain" for part in parts):
        facts.append(
            "The plain baseline was trained without privacy on the same data. Its figures on this "
            "page are not covered by ε: leave them out where the page itself must be private."
        )
    facts += [
        "The number of training images is exact and is treated as public; the fingerprint of the "
        "data is keyed, and says nothing without the key."
        if record.data.fingerprint.startswith("hmac-")
        else "The number of training images and the fingerprint of the data are exact and are "
        "treated as public.",
        "Test images and what is measured on them are not protected by ε, which is about training "
        "images only.",
        "ε is that of one run. Choosing the best of several runs on the same data spends more.",
        "Training loss is not shown for private variants: it reads the training images once more, "
        "without noise.",
    ]
    return facts


def _robustness(record: RunRecord, outcome: ResultRecord | None) -> str:
    """What was found under attack, and what that is worth."""
    if record.threat is None:
        return "Robustness was not evaluated: the run names no threat model."
    if outcome is None or outcome.robust_accuracy is None:
        return f"Robustness was not evaluated: no attack was run within {_against(record.threat)}."
    attacks = ", ".join(outcome.attacks) or "attacks that the record does not name"
    low, high = wording.share(outcome.robust_low), wording.share(outcome.robust_high)
    share = wording.share(outcome.robust_accuracy)
    return (
        f"{share} of the attacked test images are still classified "
        f"correctly in the worst case, image by image, over {attacks} ({_against(record.threat)}). "
        f"The 95% interval, {low} to {high}, is about the choice of test images. This is a "
        "measurement, not a proof: a stronger attack may find more."
    )


def _against(threat: ThreatRecord) -> str:
    """A threat model in one phrase."""
    return wording.threat(threat.norm, threat.eps, threat.bounds)
