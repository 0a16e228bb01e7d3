"""Puts measured figures into README.md: the demo's output and the benchmark's table.

Run by `make docs`; a figure in README is never typed. Text between `<!-- NAME -->` and
`<!-- /NAME -->` is replaced.
"""

import re
from pathlib import Path

from secure_cnn.report import Measurements, Row

DOCS = Path(__file__).parent


def replaced(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of `name`."""
    marks = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not marks.search(text):
        raise SystemExit(f"README.md: expected <!-- {name} --> and <!-- /{name} -->, found none")
    return marks.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def bench_table(measured: Measurements) -> str:
    """One row for each variant and case: milliseconds, ratio and its interval."""
    lines = ["| network | variant | ms/step | ÷ plain | 95 % interval | rounds |"]
    lines.append("|---|---|--:|--:|--:|--:|")
    ratios = {(r.case, r.variant): r for r in measured.rows if r.metric == "time_ratio"}
    lines += [
        _line(row, ratios[row.case, row.variant]) for row in measured.rows if row.metric == "time"
    ]
    hardware, versions = measured.hardware, measured.versions
    lines.append("")
    lines.append(
        f"{hardware['cpu']}, {hardware['threads']} threads; torch {versions['torch']}, "
        f"opacus {versions['opacus']}, torchattacks {versions['torchattacks']}; "
        f"measured {measured.created[:10]}."
    )
    return "\n".join(lines)


def _line(time: Row, ratio: Row) -> str:
    return (
        f"| {time.case} | {time.variant} | {1000 * time.median:.1f} | {ratio.median:.2f} "
        f"| {ratio.low:.2f} to {ratio.high:.2f} | {time.n} |"
    )


def main() -> None:
    """Rewrites README.md."""
    readme = DOCS.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    demo = (DOCS / "demo.txt").read_text(encoding="utf-8").rstrip()
    text = replaced(text, "demo", f"```\n{demo}\n```")
    text = replaced(text, "bench", bench_table(Measurements.read(DOCS / "benchmarks.json")))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
