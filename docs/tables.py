"""Puts measured figures into README.md and docs/benchmarks.md: the demo's output and the tables.

Run by `make docs`; a figure in README is never typed. Text between `<!-- NAME -->` and
`<!-- /NAME -->` is replaced. `docs/overhead*.json` are tables of their own, once they are there.
"""

import re
from dataclasses import replace
from pathlib import Path

from secure_cnn.report import Measurements, Row
from secure_cnn.report.bench_figures import SHOWN_PARTS
from secure_cnn.report.bench_noise import noise_checks

DOCS = Path(__file__).parent


def replaced(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of `name`."""
    marks = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not marks.search(text):
        raise SystemExit(f"expected <!-- {name} --> and <!-- /{name} -->, found none")
    return marks.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def bench_table(measured: Measurements) -> str:
    """One row for each variant and case: milliseconds, ratio, interval and memory."""
    figures = {(row.case, row.variant, row.metric): row for row in measured.rows}
    lines = [
        "| network | variant | ms/step | ÷ plain | 95 % interval | peak memory ÷ plain |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in measured.rows:
        if row.metric == "time":
            ratio = figures[row.case, row.variant, "time_ratio"]
            peak = figures.get((row.case, row.variant, "memory_ratio"))
            lines.append(_line(row, ratio, peak))
    return "\n".join([*lines, "", conditions(measured)])


def conditions(measured: Measurements) -> str:
    """On what, with what, how often and when."""
    ratios = [row for row in measured.rows if row.metric == "time_ratio"]
    fewest, most = min(r.n for r in ratios), max(r.n for r in ratios)
    rounds = f"{most}" if fewest == most else f"{fewest} to {most}"
    return made_on(measured, f"medians of {rounds} rounds, ")


def made_on(measured: Measurements, rounds: str = "") -> str:
    """On what, with what and when."""
    hardware, versions = measured.hardware, measured.versions
    return (
        f"{hardware['cpu']}, {hardware['threads']} threads; torch {versions['torch']}, "
        f"opacus {versions['opacus']}, torchattacks {versions['torchattacks']}; {rounds}"
        f"measured {measured.created[:10]}."
    )


def overhead_table(measured: Measurements) -> str:
    """One row for each variant: time, ratio, interval, the parts in ms, memory and disk."""
    figures = {(row.case, row.variant, row.metric): row for row in measured.rows}
    used = [part for part in SHOWN_PARTS if any(r.metric == f"time_{part}" for r in measured.rows)]
    heads = [
        "case",
        "variant",
        "ms/step",
        "÷ plain",
        "95 % interval",
        *used,
        "memory ÷",
        "disk KiB",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "--:|" * (len(heads) - 2)]
    for speed in (row for row in measured.rows if row.metric == "images_per_second"):
        case, variant = speed.case, speed.variant
        time, ratio = (figures[case, variant, name] for name in ("time", "time_ratio"))
        cells = [case, variant, f"{1000 * time.median:.1f}", f"{ratio.median:.2f}"]
        cells.append(f"{ratio.low:.2f} to {ratio.high:.2f}")
        scales = [(f"time_{part}", 1000.0, 2) for part in used]
        for metric, scale, digits in [*scales, ("memory_ratio", 1, 2), ("disk", 1 / 1024, 0)]:
            row = figures.get((case, variant, metric))
            cells.append("" if row is None else f"{scale * row.median:.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    checks = [check.verdict for check in noise_checks(measured.rows)]
    return "\n".join([*lines, "", conditions(measured), *checks])


def exponent_table(measured: Measurements) -> str:
    """How the cost of each variant grows with each kind of work."""
    errors = {(r.case, r.variant): r.median for r in measured.rows if r.metric == "exponent_error"}
    lines = ["| grows with | variant | exponent | standard error |", "|---|---|--:|--:|"]
    lines += [
        f"| {row.case} | {row.variant} | {row.median:.2f} | {errors[row.case, row.variant]:.2f} |"
        for row in measured.rows
        if row.metric == "exponent"
    ]
    return "\n".join(lines)


def shares(measured: Measurements) -> str:
    """What share of a private step its noise and its sample take."""
    lines = ["| network | share of the private step | 95 % interval |", "|---|--:|--:|"]
    lines += [
        f"| {row.case} | {row.median:.1%} | {row.low:.1%} to {row.high:.1%} |"
        for row in measured.rows
        if row.metric == "noise_share"
    ]
    return "\n".join(lines)


def archive_table(measured: Measurements) -> str:
    """One row for each ratio, share or time of a sealed file."""
    lines = ["| size | variant | figure | median | 95 % interval |", "|---|---|---|--:|--:|"]
    for row in measured.rows:
        low, median, high = row.words
        lines.append(f"| {row.case} | {row.variant} | {row.metric} | {median} | {low} to {high} |")
    return "\n".join([*lines, "", made_on(measured)])


def front(measured: Measurements) -> Measurements:
    """The rows that README shows: two networks, and what most people ask first."""
    asked = ("plain", "private", "n-fgsm", "pgd", "trades", "private+n-fgsm", "torchattacks-pgd")
    rows = [
        row
        for row in measured.rows
        if row.case in ("compact", "resnet20")
        and (row.variant in asked or row.variant.startswith("opacus"))
    ]
    return replace(measured, rows=tuple(rows))


def _line(time: Row, ratio: Row, peak: Row | None) -> str:
    memory = "" if peak is None else f"{peak.median:.2f}"
    return (
        f"| {time.case} | {time.variant} | {1000 * time.median:.1f} | {ratio.median:.2f} "
        f"| {ratio.low:.2f} to {ratio.high:.2f} | {memory} |"
    )


def rewrite(path: Path, contents: dict[str, str]) -> None:
    """Puts each content between its marks in the file."""
    text = path.read_text(encoding="utf-8")
    for name, content in contents.items():
        text = replaced(text, name, content)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Rewrites README.md and docs/benchmarks.md."""
    demo = (DOCS / "demo.txt").read_text(encoding="utf-8").rstrip()
    parts = [Measurements.read(path) for path in sorted(DOCS.glob("benchmarks*.json"))[::-1]]
    measured = replace(parts[0], rows=tuple(row for part in parts for row in part.rows))
    head = bench_table(front(measured))
    rewrite(DOCS.parent / "README.md", {"demo": f"```\n{demo}\n```", "bench": head})
    tables = {"step": bench_table(measured), "noise": shares(measured)}
    costs = [Measurements.read(path) for path in sorted(DOCS.glob("overhead*.json"))]
    if costs:
        tables["overhead"] = "\n\n".join(overhead_table(each) for each in costs)
        tables["scaling"] = "\n\n".join(exponent_table(each) for each in costs)
    if (DOCS / "archive.json").exists():
        tables["archive"] = archive_table(Measurements.read(DOCS / "archive.json"))
    rewrite(DOCS / "benchmarks.md", tables)


if __name__ == "__main__":
    main()
