"""The tables of sealed files: how long each takes, ours against the others, and the goals."""

from collections.abc import Sequence

from cells import blocks, cases_of, made_on, spread, table

from secure_cnn.bench.rivals import ARCHIVE_RIVALS
from secure_cnn.record import Measurements, Row

# How long each takes is a table of its own, since the others have these figures too.
SEALED = ("sealed", "sealed+signed")
TIMES = ("save", "durable_save", "load", "fresh_load", "one_tensor")
AGAINST = tuple(f"_vs_{rival.removesuffix('.save')}" for rival in ARCHIVE_RIVALS)
# What a sealed file was meant to cost, set before it was measured: in the rows' own units, at most
# so much (or, of AT_LEAST, at least), for each of SEALED.
GOALS = {
    "save_vs_torch": (0.6, 0.9),
    "save_vs_safetensors": (1.0, 1.25),
    "load_vs_safetensors": (1.5, 1.5),
    "fresh_load_vs_safetensors": (1.5, 1.5),
    **{
        f"{what}{rival}": (1.0, 1.0)
        for what in ("save", "load", "fresh_load")
        for rival in AGAINST
        if rival not in ("_vs_torch", "_vs_safetensors")
    },
    "one_tensor_vs_load": (0.05, 0.05),
    "stall_vs_copy": (1.1, 1.1),
    "inspect": (0.02, 0.02),
    "add_recipient": (0.02, 0.02),
    "remove_recipient": (0.02, 0.02),
    "size_overhead": (0.0001, 0.0001),
    "payload_vs_aesgcm": (0.9, 0.9),
}
AT_LEAST = ("payload_vs_aesgcm",)
# Whose versions stand under them.
ARCHIVES_OF = ("torch", "safetensors", "cryptography", "age", "cryptotensors", "tensorizer")
# From a row's unit to that of a table.
SHOWN = {"s": (1000.0, " ms"), "x": (1.0, ""), "1": (100.0, " %"), "MiB": (1.0, " MiB")}


def archive_tables(measured: Measurements) -> str:
    """For each size the times of all, ours against the others, and what else ours takes."""
    parts = []
    for case in cases_of(measured, "save"):
        rows = [row for row in measured.rows if row.case == case]
        against = [row for row in rows if row.metric.endswith(AGAINST)]
        rest = [row for row in rows if row not in against and row.metric not in TIMES]
        parts += [f"### {case}", "Milliseconds:", times_table(rows)]
        if against:
            parts += ["Ours ÷ others, below 1 where ours is faster:", against_table(against)]
        if rest:
            parts += ["What else a sealed file takes:", rest_table(rest)]
    return blocks(*parts, f"Bold: misses its goal. {made_on(measured, made_of=ARCHIVES_OF)}")


def times_table(rows: Sequence[Row]) -> str:
    """A variant a line, what is done with its file across."""
    found = {(row.variant, row.metric): row for row in rows}
    # Each save of ours waits for the disk.
    found |= {
        (name, "durable_save"): found[name, "save"] for name in SEALED if (name, "save") in found
    }
    variants = dict.fromkeys(row.variant for row in rows if row.metric in TIMES)
    lines = [
        [it, *(spread(found.get((it, what)), scale=1000) for what in TIMES)] for it in variants
    ]
    return table(["variant", *(f"`{what}`" for what in TIMES)], lines)


def against_table(rows: Sequence[Row]) -> str:
    """One of ours against one of the others a line, what is done with the file across."""
    found = {(row.variant, row.metric): row for row in rows}
    lines = []
    for variant in SEALED:
        for rival in AGAINST:
            own = {what: found.get((variant, what + rival)) for what in TIMES}
            if any(own.values()):
                cells = [judged(own[what]) for what in TIMES[:-1]]
                goals = {what: words for what, row in own.items() if (words := limit_of(row))}
                same = len(set(goals.values())) == 1 and len(goals) > 1
                each = [f"{what} {words}" for what, words in goals.items()]
                told = next(iter(goals.values())) if same else ", ".join(each)
                lines.append([f"{variant} ÷ {rival.removeprefix('_vs_')}", *cells, told])
    return table(["ours ÷ other", *(f"`{what}`" for what in TIMES[:-1]), "goal"], lines)


def rest_table(rows: Sequence[Row]) -> str:
    """A figure of ours a line."""
    found = {(row.metric, row.variant): row for row in rows}
    lines = []
    for metric in dict.fromkeys(row.metric for row in rows):
        own = [found.get((metric, variant)) for variant in SEALED]
        goals = dict.fromkeys(filter(None, map(limit_of, own)))
        name = metric.replace("_vs_", " ÷ ").replace("_", " ")
        lines.append([name, *map(judged, own), ", ".join(goals)])
    return table(["figure", *SEALED, "goal"], lines)


def goal(row: Row) -> float:
    """What a figure that has a goal was meant to be, in its own unit."""
    return GOALS[row.metric][SEALED.index(row.variant)]


def limit_of(row: Row | None) -> str:
    """The goal of a figure in the unit of the table; empty where it has none."""
    if row is None or row.metric not in GOALS:
        return ""
    scale, unit = SHOWN[row.unit]
    return f"{'≥' if row.metric in AT_LEAST else '≤'} {scale * goal(row):g}{unit}"


def judged(row: Row | None) -> str:
    """A figure of ours, bold where its median is on the wrong side of its goal."""
    if row is None:
        return ""
    scale, unit = SHOWN[row.unit]
    text = spread(row, scale=scale, unit=unit)
    if row.metric not in GOALS:
        return text
    missed = row.median < goal(row) if row.metric in AT_LEAST else row.median > goal(row)
    return f"**{text}**" if missed else text
