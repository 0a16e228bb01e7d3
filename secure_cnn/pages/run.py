"""The page: one self-contained HTML file that shows a run to a reader who was not there.

Every sentence that claims something is made here, from the record alone, and says under which
conditions it holds or that it does not. The template only places them. Deliberately not here:
scripts, fonts and anything else that a browser would have to fetch; the page forbids it to itself.
"""

from pathlib import Path

from rich import box
from rich.table import Table

from secure_cnn.pages import classes, figures
from secure_cnn.pages.canvas import variant_colors
from secure_cnn.pages.figures import Examples, example_figures
from secure_cnn.pages.template import Fact, fill
from secure_cnn.pages.tradeoff import Tradeoff
from secure_cnn.record import Needs, ResultRecord, RunRecord, wording
from secure_cnn.record.document import write_text
from secure_cnn.record.tradeoff import points_of

__all__ = ["render_page", "summary_table", "write_page"]

_COLUMNS = ("accuracy", "macro recall", "robust accuracy", "ε", "s/step", "÷ plain")


def write_page(record: RunRecord, examples: Examples | None, path: str | Path) -> None:
    """Writes the page of a run, which may still be running, to `path`, atomically.

    Guarantee: the file needs no network and runs no script, and says so to the browser (its content
    security policy). Text from the record is escaped.
    """
    write_text(Path(path), render_page(record, examples))


def render_page(record: RunRecord, examples: Examples | None = None) -> str:
    """The page of a run as text; the same record gives the same text."""
    outcome, baseline = _outcome(record), _baseline(record)
    colors = variant_colors(record)
    results = {result.variant: result for result in record.results}
    before = None if baseline is None else baseline.variant
    values = {
        "record": record,
        "examples": examples,
        "outcome": outcome,
        "baseline": baseline,
        "variant": _variant(record),
        # Trained, and without a result yet.
        "pending": list(
            dict.fromkeys(e.variant for e in record.epochs if e.variant not in results)
        ),
        "facts": _facts(record, outcome, baseline),
        "privacy": _privacy(record),
        "robustness": _robustness(record, outcome),
        "uncovered": _uncovered(record),
        "threat": record.threat and record.threat.words,
        "attacks": list(dict.fromkeys(name for each in record.results for name in each.attacks)),
        "colors": colors,
        "curves": figures.curves(record),
        "tradeoff": Tradeoff.between(points_of(record), colors, Needs()),
        "recalls": classes.recall_table(results, record.data.classes, before),
        "recall": classes.class_recall(record) if record.results else None,
        "confusion": outcome and classes.confusion_matrix(record, outcome.variant),
        "costs": figures.costs(record),
        "pictures": example_figures(examples),
        "shown": classes.MOST_CLASSES,
    }
    return fill("run.html.jinja", values)


def summary_table(record: RunRecord) -> Table:
    """The same in short for a terminal: a row for each finished training of the run.

    Robust accuracy has its 95 % interval; seconds of a step and that step against the plain one
    were timed in turn, on the same images.
    """
    table = Table(title=f"{record.model.name} on {record.data.name}", box=box.SIMPLE_HEAD)
    table.add_column("training", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for result in record.results:
        table.add_row(result.variant, *_cells(record, result))
    return table


def _cells(record: RunRecord, result: ResultRecord) -> list[str]:
    cost = {row.metric: row.median for row in record.cost if row.variant == result.variant}
    robust = "–"
    if result.robust_accuracy is not None:
        low, high = result.robust_low or 0.0, result.robust_high or 0.0
        robust = f"{100 * result.robust_accuracy:.1f} % ({100 * low:.0f}-{100 * high:.0f})"
    epsilon = result.epsilon
    return [
        f"{100 * result.accuracy:.1f} %",
        f"{100 * result.macro_recall:.1f} %",
        robust,
        "∞" if epsilon is None else f"{epsilon:.2f}",
        f"{cost['time']:.4f}" if "time" in cost else "–",
        f"{cost['time_ratio']:.2f}x" if "time_ratio" in cost else "–",
    ]


def _outcome(record: RunRecord) -> ResultRecord | None:
    """What the run is about: its last protected result, or the plain one if there is no other."""
    protected = [result for result in record.results if result.variant != "plain"]
    return next(iter(protected[::-1] or record.results), None)


def _baseline(record: RunRecord) -> ResultRecord | None:
    outcome = _outcome(record)
    plain = [result for result in record.results if result.variant == "plain"]
    return plain[0] if plain and outcome is not plain[0] else None


def _variant(record: RunRecord) -> str:
    """The name of what the run is about, before there is a result too."""
    outcome = _outcome(record)
    if outcome is not None:
        return outcome.variant
    return record.epochs[-1].variant if record.epochs else "nothing yet"


def _spent(record: RunRecord) -> float | None:
    """ε spent by the variant the run is about."""
    spent = [part.epsilon for part in record.parts if part.variant == _variant(record)]
    return next((epsilon for epsilon in reversed(spent) if epsilon is not None), None)


def _facts(
    record: RunRecord, outcome: ResultRecord | None, baseline: ResultRecord | None
) -> list[Fact]:
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
    spent = _spent(record)
    if record.privacy is None or spent is None:
        return Fact(name="Privacy", value="none", detail="no bound on what the model memorised")
    detail = f"ε spent, at δ = {wording.delta(record.privacy.delta)}"
    return Fact(name="Privacy", value=f"ε = {wording.epsilon(spent)}", detail=detail)


def _robust_fact(
    record: RunRecord, outcome: ResultRecord | None, baseline: ResultRecord | None
) -> Fact:
    if outcome is None or outcome.robust_accuracy is None:
        return Fact(name="Robust accuracy", value="unknown", detail="not evaluated")
    interval = f"95% interval {wording.between((outcome.robust_low, outcome.robust_high))}"
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
    unit, protected, clipped = "image", "training image", "gradients"
    if terms.unit == "person":
        unit, protected = "person", "person in the training data, with all their images"
        clipped = f"the mean gradient of up to {terms.images_per_person} images of each"
    return (
        f"({wording.epsilon(spent)}, {wording.delta(terms.delta)})-differential privacy for each "
        f"{protected}, where neighbours are “{terms.relation}”: {clipped} clipped to norm "
        f"{terms.max_grad_norm:.4g}, noise {terms.noise_multiplier:.4g} times that norm, each "
        f"{unit} joining a step with probability {terms.sampling_rate:.4g}; the plan is "
        f"{terms.steps} steps for ε = {wording.epsilon(terms.epsilon)}, counted by "
        f"“{terms.accountant}”. "
        "It covers the weights of this variant and everything computed from them."
    )


def _uncovered(record: RunRecord) -> list[str]:
    """What a reader might think ε covers, and it does not."""
    if _spent(record) is None:
        return []
    facts = []
    if any(part.variant == "plain" for part in record.parts):
        facts.append(
            "The plain baseline was trained without privacy on the same data. Its figures on this "
            "page are not covered by ε: leave them out where the page itself must be private."
        )
    facts += [
        "The number of training images is exact and is treated as public; the fingerprint of the "
        "data is keyed, and says nothing without the key."
        if record.data.keyed
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
    if record.threat is None:
        return "Robustness was not evaluated: the run names no threat model."
    if outcome is None or outcome.robust_accuracy is None:
        return f"Robustness was not evaluated: no attack was run within {record.threat.words}."
    attacks = ", ".join(outcome.attacks) or "attacks that the record does not name"
    interval = wording.between((outcome.robust_low, outcome.robust_high))
    share = wording.share(outcome.robust_accuracy)
    return (
        f"{share} of the attacked test images are still classified "
        f"correctly in the worst case, image by image, over {attacks} ({record.threat.words}). "
        f"The 95% interval, {interval}, is about the choice of test images. This is a "
        "measurement, not a proof: a stronger attack may find more."
    )
