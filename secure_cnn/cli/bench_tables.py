"""The tables of `secure-cnn bench`: what was measured, for people."""

from collections.abc import Collection, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

import privacy
from secure_cnn.bench.comparison import BenchmarkComparison, Change
from secure_cnn.bench.strategies import BEFORE
from secure_cnn.bench.timing import PARTS
from secure_cnn.record import Row

__all__ = [
    "archive_table",
    "comparison_summary",
    "comparison_table",
    "cost_table",
    "exponent_table",
    "kernel_table",
    "loader_table",
    "parts_table",
    "robustness_table",
    "step_table",
    "strategies_table",
    "trained_table",
]


def step_table(rows: list[Row]) -> Table:
    """Seconds and ratio of every variant."""
    rounds = sorted({row.n for row in rows if row.metric == "time"})
    caption = f"rounds: {' or '.join(map(str, rounds))}"
    for row in (row for row in rows if row.metric == "copies_ratio"):
        words = f"{row.median:.2f} ({row.low:.2f}-{row.high:.2f})"
        caption += f"\n{row.case}: {row.variant} ÷ as many plain steps: {words}"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    columns = ("case", "variant", "ms/step", "÷ plain", "95 %", "memory ÷")
    _add_columns(table, columns, left=columns[:2], whole=columns)
    found = _by_figure(rows)
    for row in (row for row in rows if row.metric == "time"):
        ratio = found[row.case, row.variant, "time_ratio"]
        peak = found.get((row.case, row.variant, "memory_ratio"))
        table.add_row(
            row.case,
            row.variant,
            f"{1000 * row.median:.1f}",
            f"{ratio.median:.2f}",
            f"{ratio.low:.2f}-{ratio.high:.2f}",
            "–" if peak is None else f"{peak.median:.2f}",
        )
    return table


def kernel_table(case: str, choices: Sequence[privacy.Choice]) -> Table:
    """Which kernel the tuner picked for each layer, and what the runner-up would have taken."""
    columns = ("layer", "input", "kernel", "ms", "next best", "ms")
    table = _add_columns(Table(title=f"clipping kernels of {case}"), columns, left=columns)
    for choice in choices:
        ranked = sorted(choice.seconds.items(), key=lambda item: item[1])
        shown = [cell for name, s in ranked[:2] for cell in (name, f"{1000 * s:.2f}")]
        shape = "x".join(str(size) for size in choice.inputs)
        table.add_row(choice.layer, shape, *(shown or [choice.kernel]))
    return table


def loader_table(rows: list[Row]) -> Table:
    """Milliseconds of an image, and images a second against those from memory."""
    rounds = sorted({row.n for row in rows})
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption=f"rounds: {' or '.join(map(str, rounds))}. bound: what decoding leaves possible",
        caption_justify="left",
    )
    columns = ("case", "variant", "ms/image", "rate ÷ memory", "95 %", "own processor ÷")
    _add_columns(table, columns, left=columns[:2], whole=columns)
    found = _by_figure(rows)
    for case, variant in dict.fromkeys((row.case, row.variant) for row in rows):
        time = found.get((case, variant, "time"))
        ratio = found.get((case, variant, "rate_ratio"))
        own = found.get((case, variant, "processor_ratio"))
        table.add_row(
            case,
            variant,
            "–" if time is None else f"{1000 * time.median:.2f}",
            "–" if ratio is None else f"{ratio.median:.2f}",
            "–" if ratio is None else f"{ratio.low:.2f}-{ratio.high:.2f}",
            "–" if own is None else f"{own.median:.2f}",
        )
    return table


def archive_table(rows: list[Row]) -> Table:
    """Every row, seconds as milliseconds."""
    columns = ("case", "variant", "metric", "median", "95 % interval", "rounds")
    table = _add_columns(Table(), columns, left=columns[:2])
    for row in rows:
        low, median, high = row.words
        table.add_row(row.case, row.variant, row.metric, median, f"{low}-{high}", str(row.n))
    return table


def robustness_table(rows: list[Row]) -> Table:
    """Every row, with its interval."""
    columns = ("variant", "metric", "median", "95 % interval")
    table = _add_columns(Table(), columns, left=columns[:1])
    for row in rows:
        unit = "" if row.unit == "1" else f" {row.unit}"
        interval = f"{row.low:.3f}-{row.high:.3f}"
        table.add_row(row.variant, row.metric, f"{row.median:.3f}{unit}", interval)
    return table


def comparison_table(found: BenchmarkComparison, worse: tuple[Change, ...]) -> Table:
    """What changed beyond the noise, worst first."""
    table = Table(title="beyond the noise: intervals that do not overlap")
    words = ("case", "variant", "metric", "")
    _add_columns(table, (*words[:3], "before", "after", "change", ""), left=words)
    changed = [change for change in found.changes if change.beyond_noise]
    for change in sorted(changed, key=lambda each: -each.worsening):
        rise = change.after.median - change.before.median
        part = f"{100 * rise / abs(change.before.median):+.1f} %" if change.before.median else "–"
        better = "worse, tolerated" if change.worse else "better"
        table.add_row(
            change.before.case,
            change.before.variant,
            change.before.metric,
            f"{change.before.median:.4g} {change.before.unit}",
            f"{change.after.median:.4g} {change.after.unit}",
            part,
            "WORSE" if change in worse else better,
        )
    return table


def comparison_summary(
    found: BenchmarkComparison, worse: tuple[Change, ...], tolerance: float
) -> str:
    """How many of how many."""
    changed = [change for change in found.changes if change.beyond_noise]
    better = sum(not change.worse for change in changed)
    return (
        f"{len(found.changes)} figures in both: {len(changed)} changed beyond the noise, {better} "
        f"better, {len(worse)} worse by more than {100 * tolerance:g} %"
    )


def cost_table(rows: list[Row]) -> Table:
    """What a step of each variant takes."""
    table = _headed("variant", "ms/step", "÷ plain", "95 % interval", "images/s", "MiB", "disk KiB")
    found = _by_figure(rows)
    for row in (row for row in rows if row.metric == "images_per_second"):
        time, ratio = (found[row.case, row.variant, name] for name in ("time", "time_ratio"))
        memory = found.get((row.case, row.variant, "memory"))
        disk = found.get((row.case, row.variant, "disk"))
        table.add_row(
            row.variant,
            f"{1000 * time.median:.2f}",
            f"{ratio.median:.2f}",
            f"{ratio.low:.2f}-{ratio.high:.2f}",
            f"{row.median:.0f}",
            "–" if memory is None else f"{memory.median:.2f}",
            "–" if disk is None else f"{disk.median / 1024:.0f}",
        )
    return table


def parts_table(rows: list[Row]) -> Table:
    """Milliseconds of each part of a step."""
    used = [part for part in PARTS if any(row.metric == f"time_{part}" for row in rows)]
    table = _headed("ms/step", *used)
    parts = {(row.variant, row.metric): row.median for row in rows}
    shown = [row.variant for row in rows if row.metric == "time_other"]
    for variant in shown:
        values = (parts.get((variant, f"time_{part}")) for part in used)
        table.add_row(variant, *("–" if v is None else f"{1000 * v:.2f}" for v in values))
    return table


def exponent_table(rows: list[Row]) -> Table:
    """How the cost grows, with the standard error."""
    table = _headed("cost grows as a power of", "variant", "exponent", "standard error")
    errors = {(r.case, r.variant): r.median for r in rows if r.metric == "exponent_error"}
    for row in (row for row in rows if row.metric == "exponent"):
        error = errors[row.case, row.variant]
        table.add_row(row.case, row.variant, f"{row.median:.3f}", f"{error:.3f}")
    return table


def trained_table(rows: list[Row]) -> Table:
    """What each variant came to with the same examples, and in the same time."""
    names = ("accuracy", "macro_recall", "robust_accuracy", "epsilon")
    table = _headed("trained", "with the same", *(name.replace("_", " ") for name in names))
    found = {(row.variant, row.metric): row.median for row in rows}
    for variant in dict.fromkeys(row.variant for row in rows if row.metric == "training_time"):
        for when in ("examples", "time"):
            values = [found.get((variant, f"{name}_same_{when}")) for name in names]
            cells = [
                "–" if v is None else f"{v:.2f}" if name == "epsilon" else f"{100 * v:.1f} %"
                for name, v in zip(names, values, strict=True)
            ]
            table.add_row(variant, when, *cells)
    return table


def strategies_table(rows: list[Row], target: float) -> Table:
    """What each strategy changes against the loop of a tutorial, medians over the seeds."""
    seeds = sorted({row.n for row in rows if row.metric == "seconds"})
    caption = (
        f"seeds: {' or '.join(map(str, seeds))}; medians. gain: in points, seed by seed against "
        f"{BEFORE}; ÷: its time against that of {BEFORE}"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    goal = f"s to {100 * target:g} %"
    columns = ("strategy", "accuracy", "gain", "recall", "gain", "s", "÷", goal, "÷", "reached")
    _add_columns(table, columns, left=columns[:1], whole=columns)
    found = {(row.variant, row.metric): row for row in rows}
    kinds = (
        *(("accuracy", _share), ("accuracy_gain", _points), ("macro_recall", _share)),
        *(("macro_recall_gain", _points), ("seconds", _tenths), ("time_ratio", _hundredths)),
        *(("seconds_to_target", _tenths), ("target_ratio", _hundredths), ("reached", _whole_share)),
    )
    for variant in dict.fromkeys(row.variant for row in rows):
        present = ((found.get((variant, metric)), shown) for metric, shown in kinds)
        table.add_row(variant, *("–" if row is None else shown(row) for row, shown in present))
    return table


def _share(row: Row) -> str:
    return f"{100 * row.median:.2f} %"


def _points(row: Row) -> str:
    return f"{100 * row.median:+.2f}"


def _tenths(row: Row) -> str:
    return f"{row.median:.1f}"


def _hundredths(row: Row) -> str:
    return f"{row.median:.2f}"


def _whole_share(row: Row) -> str:
    return f"{round(row.median * row.n)} of {row.n}"


def _headed(first: str, *others: str) -> Table:
    left = (first, "variant", "with the same")
    return _add_columns(Table(), (first, *others), left=left, whole=(first,))


def _add_columns(
    table: Table, columns: Sequence[str], *, left: Collection[str], whole: Collection[str] = ()
) -> Table:
    """Adds columns; those of words are on the left, and those to keep whole are never wrapped."""
    for column in columns:
        table.add_column(
            column, justify="left" if column in left else "right", no_wrap=column in whole
        )
    return table


def _by_figure(rows: list[Row]) -> dict[tuple[str, str, str], Row]:
    return {(row.case, row.variant, row.metric): row for row in rows}
