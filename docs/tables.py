"""Puts measured figures into README.md: the demo's output and the benchmark's table.

Run by `make docs`; a figure in README is never typed. Text between `<!-- NAME -->` and
`<!-- /NAME -->` is replaced.
"""

import re
from dataclasses import replace
from pathlib import Path

from secure_cnn.report import Measurements, Row

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
    hardware, versions = measured.hardware, measured.versions
    ratios = [row for row in measured.rows if row.metric == "time_ratio"]
    fewest, most = min(r.n for r in ratios), max(r.n for r in ratios)
    rounds = f"{most}" if fewest == most else f"{fewest} to {most}"
    lines.append("")
    lines.append(
        f"{hardware['cpu']}, {hardware['threads']} threads; torch {versions['torch']}, "
        f"opacus {versions['opacus']}, torchattacks {versions['torchattacks']}; medians of "
        f"{rounds} rounds, measured {measured.created[:10]}."
    )
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


def only(measured: Measurements, cases: tuple[str, ...]) -> Measurements:
    """The rows of some cases."""
    return replace(measured, rows=tuple(row for row in measured.rows if row.case in cases))


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
    head = bench_table(only(measured, ("compact", "resnet20")))
    rewrite(DOCS.parent / "README.md", {"demo": f"```\n{demo}\n```", "bench": head})
    rewrite(DOCS / "benchmarks.md", {"step": bench_table(measured), "noise": shares(measured)})


if __name__ == "__main__":
    main()
