"""Puts measured figures into README.md and pages of docs: the demo's output and the tables.

Run by `make docs`; a figure in README is never typed. Text between `<!-- NAME -->` and
`<!-- /NAME -->` is replaced. Files other than `docs/benchmarks*.json` are tables of their own, once
they are there.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from archive_tables import archive_tables
from cells import blocks, cases_of, index, made_on, middle, spread, table
from certified_table import certified_table
from erasure_table import erasure_table
from forget_sets_table import forget_sets_table, lira_table
from leakage_table import attacks_table, leakage_table
from unlearning_table import unlearning_table

from secure_cnn.bench.step import CASES
from secure_cnn.pages import SHOWN_PARTS
from secure_cnn.recipe.named import NAMED, stored_results
from secure_cnn.record import Measurements, Row, noise_checks

DOCS = Path(__file__).parent

# What README shows: the networks, and the protections in words, with their rivals below them.
FRONT_CASES = ("compact", "resnet20")
OPACUS = "opacus"
FRONT_VARIANTS = {
    "private": "DP-SGD",
    OPACUS: "DP-SGD by the fastest mode of Opacus",
    "n-fgsm": "adversarial examples of one step (N-FGSM)",
    "pgd": "adversarial examples of ten steps (PGD)",
    "torchattacks-pgd": "the same ten by torchattacks",
    "private+n-fgsm": "DP-SGD and N-FGSM together",
}

# A private step on K copies of each example was meant to cost no more than K plain steps.
COPIES_GOAL = 1.0

# What a table of the defaults compares, in words.
DEFAULTED = {
    "plain": "plain",
    "private": "private",
    "n-fgsm": "adversarial",
    "private+n-fgsm": "both",
}


def replaced(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of `name`."""
    marks = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not marks.search(text):
        raise SystemExit(f"expected <!-- {name} --> and <!-- /{name} -->, found none")
    return marks.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def front_table(measured: Measurements) -> str:
    """What people ask first: a protection a line, its time and memory against plain by network."""
    rows = [row for row in measured.rows if row.case in FRONT_CASES]
    figures, lines = index(rows), []
    for variant, words in FRONT_VARIANTS.items():
        cells = []
        for case in FRONT_CASES:
            name = fastest_opacus(rows, case) if variant == OPACUS else variant
            cells.append(spread(figures.get((case, name, "time_ratio"))))
            cells.append(middle(figures.get((case, name, "memory_ratio"))))
        lines.append([words, *cells])
    heads = [word for case in FRONT_CASES for word in (f"{case}: time", f"{case}: memory")]
    times = [f"{1000 * figures[case, 'plain', 'time'].median:.1f} ms" for case in FRONT_CASES]
    told = f"A plain step takes {' and '.join(times)}. In brackets: 95 % intervals."
    measured = replace(measured, rows=tuple(rows))
    return blocks(table(["÷ plain", *heads], lines), f"{told} {conditions(measured)}")


def fastest_opacus(rows: Iterable[Row], case: str) -> str | None:
    """The mode of Opacus whose step takes the least time on this network, if any was timed."""
    times = {
        row.variant: row.median
        for row in rows
        if (row.case, row.metric) == (case, "time_ratio") and row.variant.startswith(OPACUS)
    }
    return min(times, key=lambda mode: times[mode], default=None)


def step_tables(measured: Measurements) -> str:
    """For each network a table with a variant a line: milliseconds, ratio and memory."""
    figures, parts = index(measured.rows), []
    for case in cases_of(measured, "time_ratio"):
        lines = [
            [
                row.variant,
                f"{1000 * row.median:.1f}",
                spread(figures[case, row.variant, "time_ratio"]),
                middle(figures.get((case, row.variant, "memory_ratio"))),
            ]
            for row in measured.rows
            if (row.case, row.metric) == (case, "time")
        ]
        shape, batch = CASES[case]
        caption = f"**{case}**, {batch} images of {'x'.join(map(str, shape))} a step"
        heads = ["variant", "ms/step", "time ÷ plain", "peak memory ÷ plain"]
        parts += [caption, table(heads, lines)]
        parts += [told_of_copies(row) for row in measured.rows if row.case == case]
    return blocks(*filter(None, parts), conditions(measured))


def told_of_copies(row: Row) -> str:
    """What K copies of each example cost against K plain steps; empty for any other figure."""
    if row.metric != "copies_ratio":
        return ""
    verdict = "met" if row.median <= COPIES_GOAL else "missed"
    return (
        f"`{row.variant}` ÷ as many plain steps: {spread(row)}; the goal, at most "
        f"{COPIES_GOAL:.1f}, is {verdict}."
    )


def conditions(measured: Measurements) -> str:
    """On what, with what, how often and when."""
    ratios = [row for row in measured.rows if row.metric == "time_ratio"]
    fewest, most = min(r.n for r in ratios), max(r.n for r in ratios)
    rounds = f"{most}" if fewest == most else f"{fewest} to {most}"
    return made_on(measured, f"medians of {rounds} rounds, ")


def overhead_tables(measured: Measurements) -> str:
    """For each case what a step of each variant costs, its parts, and what is noise."""
    figures, parts = index(measured.rows), []
    for case in cases_of(measured, "images_per_second"):
        rows = [row for row in measured.rows if row.case == case]
        variants = [row.variant for row in rows if row.metric == "images_per_second"]
        used = [part for part in SHOWN_PARTS if any(r.metric == f"time_{part}" for r in rows)]
        costs, times = [], []
        for variant in variants:
            step, ratio = figures[case, variant, "time"], figures[case, variant, "time_ratio"]
            memory, disk = (figures.get((case, variant, it)) for it in ("memory_ratio", "disk"))
            kept = "" if disk is None else f"{disk.median / 1024:.0f}"
            costs.append(
                [variant, f"{1000 * step.median:.1f}", spread(ratio), middle(memory), kept]
            )
            own = [figures.get((case, variant, f"time_{part}")) for part in used]
            times.append([variant, *("" if t is None else f"{1000 * t.median:.2f}" for t in own)])
        heads = ["variant", "ms/step", "time ÷ plain", "memory ÷ plain", "disk KiB"]
        parts += [f"**{case}**", table(heads, costs)]
        parts += ["Milliseconds of each part of a step:", table(["variant", *used], times)]
    checks = [check.verdict for check in noise_checks(measured.rows)]
    return blocks(*parts, *checks, conditions(measured))


def exponent_table(measured: Measurements) -> str:
    """How the cost of each variant grows with each kind of work."""
    figures = index(measured.rows)
    axes = cases_of(measured, "exponent")
    variants = dict.fromkeys(row.variant for row in measured.rows if row.metric == "exponent")

    def cell(axis: str, variant: str) -> str:
        found = figures.get((axis, variant, "exponent"))
        if found is None:
            return ""
        return f"{found.median:.2f} ± {figures[axis, variant, 'exponent_error'].median:.2f}"

    return table(["variant", *axes], [[v, *(cell(axis, v) for axis in axes)] for v in variants])


def noise_table(measured: Measurements) -> str:
    """What share of a private step its noise and its sample take."""
    rows = [row for row in measured.rows if row.metric == "noise_share"]
    lines = [[r.case, f"{r.median:.1%}", f"{r.low:.1%} to {r.high:.1%}"] for r in rows]
    return table(["network", "share of the private step", "95 % interval"], lines)


def loader_table(measured: Measurements) -> str:
    """Images a second from files against memory, by network and threads, and what is possible."""
    figures, lines = index(measured.rows), []
    variants = [row.variant for row in measured.rows if row.metric == "processor_ratio"]
    for case in cases_of(measured, "rate_ratio"):
        for variant in dict.fromkeys(variants):
            time = figures.get((case, variant, "time"))
            lines.append(
                [
                    case,
                    variant,
                    "" if time is None else f"{1000 * time.median:.2f}",
                    spread(figures.get((case, variant, "rate_ratio"))),
                    middle(figures.get((case, variant, "processor_ratio"))),
                ]
            )
        decoding, bound = figures[case, "decoding", "time"], figures[case, "bound", "rate_ratio"]
        lines.append([case, "possible", f"{1000 * decoding.median:.2f}", spread(bound), ""])
    heads = ["network", "read", "ms an image", "images a second ÷ memory", "own processor ÷ memory"]
    rounds = max(row.n for row in measured.rows)
    return blocks(table(heads, lines), made_on(measured, f"medians of {rounds} rounds, "))


def slow_path_table(measured: Measurements) -> str:
    """A private step against a plain one, for layers with rules and for those without."""
    lines = [
        [row.case.split(", digits")[0], spread(row)]
        for row in measured.rows
        if (row.variant, row.metric) == ("private", "time_ratio")
    ]
    made = made_on(measured, "digits, 64 images a step, ", made_of=("torch",))
    return blocks(table(["network", "private step ÷ plain step"], lines), made)


def robustness_table(measured: Measurements) -> str:
    """Our evaluation and its reference: the time of a batch, what they find, where they agree."""
    figures, parts = index(measured.rows), []
    for case in cases_of(measured, "robust_accuracy"):
        variants = [row.variant for row in measured.rows if row.metric == "robust_accuracy"]
        lines = [
            [
                variant,
                spread(figures[case, variant, "time"]),
                spread(figures[case, variant, "robust_accuracy"], scale=100, unit=" %"),
                spread(figures.get((case, variant, "time_ratio"))),
                spread(figures.get((case, variant, "agreement")), scale=100, unit=" %"),
            ]
            for variant in variants
        ]
        heads = ["evaluation", "seconds a batch", "withstand", "ours ÷ its time", "same verdict"]
        parts += [f"**{case}**", table(heads, lines)]
    return blocks(*parts, made_on(measured, made_of=("torch", "pyautoattack")))


def audit_tables(measured: Measurements) -> str:
    """Every defect that was planted and how often the audit found it; honest trainings below."""
    caught = [row for row in measured.rows if row.metric == "caught"]
    alarms = [row for row in measured.rows if row.metric == "false_alarm"]
    lines = [[row.variant, row.case, f"{round(row.median * row.n)} of {row.n}"] for row in caught]
    honest = [[row.variant, f"{round(row.median * row.n)} of {row.n}"] for row in alarms]
    return blocks(
        table(["planted", "in", "caught"], lines),
        table(["honest training", "failed"], honest),
        made_on(measured, made_of=("torch",)),
    )


def defaults_tables(measured: Measurements) -> str:
    """What the default settings reach on each data set, with each protection; and for how long."""
    figures, lines, told = index(measured.rows), [], []
    for case in cases_of(measured, "accuracy"):
        own = [figures.get((case, each, "accuracy")) for each in DEFAULTED]
        seeds = sorted({row.n for row in own if row is not None})
        shown = [spread(row, scale=100, unit=" %") for row in own]
        lines.append([case, *shown, " to ".join(map(str, seeds))])
        length = [plain_over_private(figures, case, metric) for metric in ("epochs", "steps")]
        noise, eps = (
            "" if row is None else f"{row.median:.3g}"
            for row in (
                figures.get((case, "private", "noise_multiplier")),
                figures.get((case, "n-fgsm", "eps")),
            )
        )
        robust = [figures.get((case, each, "robust_accuracy")) for each in list(DEFAULTED)[2:]]
        shown = [spread(row, scale=100, unit=" %") for row in robust]
        told.append([case, *length, noise, eps, *shown])
    heads = [
        "epochs",
        "steps",
        "noise multiplier",
        "eps",
        "adversarial under PGD",
        "both under PGD",
    ]
    return blocks(
        table(["data", *DEFAULTED.values(), "seeds"], lines),
        "Epochs and steps are those without and with privacy:",
        table(["data", *heads], told),
        made_on(measured, made_of=("torch",)),
    )


def recipes_table(measured: Measurements) -> str:
    """What each recipe with a name reached, under which protections; those on record alone."""
    figures, lines = index(measured.rows), []
    for name, named in NAMED.items():
        recipe = named.recipe
        own = {
            metric: figures.get((name, recipe.variant.name, metric))
            for metric in ("accuracy", "macro_recall", "autoattack", "attacked", "certified@0.25")
        }
        accuracy, attacked = own["accuracy"], own["attacked"]
        if accuracy is None:
            continue
        epsilon = "" if recipe.epsilon is None else f"{recipe.epsilon:g}"
        shares = [spread(own[it], scale=100, digits=2) for it in ("accuracy", "macro_recall")]
        robust = spread(own["autoattack"], scale=100)
        robust += "" if attacked is None else f" of {attacked.median:,.0f}"
        if own["certified@0.25"] is not None:
            robust = f"{spread(own['certified@0.25'], scale=100)} proven at 0.25 in l2"
        lines.append([f"`{name}`", epsilon, pixels(recipe.eps), *shares, robust, str(accuracy.n)])
    heads = ["recipe", "ε", "eps", "accuracy, %", "recall, %", "AutoAttack, %", "seeds"]
    told = "Means over the seeds, the worst and the best in brackets. "
    return blocks(table(heads, lines), told + made_on(measured, made_of=("torch",)))


def pixels(eps: float | None) -> str:
    """A radius in [0, 1], as a fraction of 255 where it is a whole one."""
    if eps is None:
        return ""
    return f"{255 * eps:.0f}/255" if math.isclose(255 * eps, round(255 * eps)) else f"{eps:g}"


def strategies_tables(measured: Measurements) -> str:
    """For each case every strategy: what it reached, how long it took, when it was there."""
    parts = []
    for case in cases_of(measured, "seconds"):
        found: dict[str, dict[str, Row]] = {}
        for row in (row for row in measured.rows if row.case == case):
            found.setdefault(row.variant, {})[row.metric] = row
        lines = []
        for variant, own in found.items():
            shares = [spread(own.get(it), scale=100) for it in ("accuracy", "macro_recall")]
            whole = [spread(own.get(it)) for it in ("seconds", "time_ratio")]
            goal = ("mean_seconds_to_target", "seconds_to_target", "target_ratio")
            there = [spread(own.get(it)) for it in goal]
            reached = f"{round(own['reached'].median * own['reached'].n)} of {own['reached'].n}"
            lines.append([variant, *shares, *whole, *there, reached])
        there = ["mean s to target", "s to target", "÷"]
        heads = ["strategy", "accuracy, %", "recall, %", "s", "÷", *there, "reached"]
        parts += [f"**{case}**", table(heads, lines)]
    seeds = max(row.n for row in measured.rows if row.metric == "seconds")
    return blocks(*parts, made_on(measured, f"medians of {seeds} seeds, ", made_of=("torch",)))


def plain_over_private(figures: dict[tuple[str, str, str], Row], case: str, metric: str) -> str:
    """A length without and with privacy, once where it is the same."""
    rows = [figures.get((case, each, metric)) for each in ("plain", "private")]
    return " / ".join(dict.fromkeys(f"{row.median:g}" for row in rows if row is not None))


def rewrite(path: Path, contents: dict[str, str]) -> None:
    """Puts each content between its marks in the file."""
    text = path.read_text(encoding="utf-8")
    for name, content in contents.items():
        text = replaced(text, name, content)
    path.write_text(text, encoding="utf-8")


PAGES: dict[str, tuple[str, Callable[[Measurements], dict[str, str]]]] = {
    "certified": ("how-to/erasure.md", lambda found: {"certified": certified_table(found)}),
    "defaults": ("defaults.md", lambda found: {"defaults": defaults_tables(found)}),
    "erasure": ("how-to/erasure.md", lambda found: {"erasure": erasure_table(found)}),
    "forget-sets": (
        "how-to/erasure.md",
        lambda found: {"forget-sets": forget_sets_table(found), "lira": lira_table(found)},
    ),
    "leakage": (
        "how-to/leakage.md",
        lambda found: {"leakage": leakage_table(found), "attacks": attacks_table()},
    ),
    "slow-path": ("how-to/slow-path.md", lambda found: {"slow-path": slow_path_table(found)}),
    "strategies": (
        "how-to/train-faster.md",
        lambda found: {"strategies": strategies_tables(found)},
    ),
    "unlearning": ("how-to/erasure.md", lambda found: {"unlearning": unlearning_table(found)}),
    "audit-plants": ("pitfalls.md", lambda found: {"audit-plants": audit_tables(found)}),
}
"""Of each document with a page of its own: the page, and its tables by their names."""


def main() -> None:
    """Rewrites README.md and the pages of docs/ that have tables."""
    demo = (DOCS / "demo.txt").read_text(encoding="utf-8").rstrip()
    parts = [Measurements.read(path) for path in sorted(DOCS.glob("benchmarks*.json"))[::-1]]
    measured = replace(parts[0], rows=tuple(row for part in parts for row in part.rows))
    shown = {"demo": f"```\n{demo}\n```", "bench": front_table(measured)}
    shown["recipes"] = recipes_table(stored_results())
    rewrite(DOCS.parent / "README.md", shown)
    rewrite(DOCS / "how-to/recipes.md", {"recipes": shown["recipes"]})
    tables = {"step": step_tables(measured), "noise": noise_table(measured)}
    costs = [Measurements.read(path) for path in sorted(DOCS.glob("overhead*.json"))]
    if costs:
        tables["overhead"] = blocks(*map(overhead_tables, costs))
        tables["scaling"] = blocks(*map(exponent_table, costs))
    if (DOCS / "robustness.json").exists():
        tables["robustness"] = robustness_table(Measurements.read(DOCS / "robustness.json"))
    if (DOCS / "loader.json").exists():
        tables["loader"] = loader_table(Measurements.read(DOCS / "loader.json"))
    if (DOCS / "archive.json").exists():
        tables["archive"] = archive_tables(Measurements.read(DOCS / "archive.json"))
    rewrite(DOCS / "benchmarks.md", tables)
    for name, (page, made) in PAGES.items():
        document = DOCS / f"{name}.json"
        if document.exists():
            rewrite(DOCS / page, made(Measurements.read(document)))


if __name__ == "__main__":
    main()
