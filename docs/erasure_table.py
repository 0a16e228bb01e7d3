"""What training in shards gives and saves, beside one network on all images, into erasure.json.

`python docs/erasure_table.py` trains both on Fashion-MNIST and lets single images leave. It goes on
where it was stopped, from its folder in runs/.
"""

import csv
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median

import torch
from cells import blocks, index, made_on, spread, table

from secure_cnn import Recipe, load_data, run
from secure_cnn.record import Measurements, Row, RunRecord, hardware, versions
from secure_cnn.unlearning import Forgetting, forget, run_sharded
from secure_cnn.unlearning.shards import stages_of

DOCUMENT = Path(__file__).with_name("erasure.json")
WORK = Path("runs/erasure-table")
SHARDS = SLICES = 10
REQUESTS = 10
RECIPE = {"data": "fashion-mnist", "model": "compact", "epochs": 10, "baseline": False}
COLUMNS = {
    "accuracy": "accuracy",
    "macro_recall": "recall",
    "share": "trained again for one image, of its training",
    "share_by_formula": "by the formula",
    "time_share": "time of that, of the whole",
    "weight_change": "change of the weights",
}


def erasure_table(measured: Measurements) -> str:
    """A training a line."""
    figures = index(measured.rows)
    names = list(dict.fromkeys(row.variant for row in measured.rows))
    shown = [m for m in COLUMNS if any(row.metric == m for row in measured.rows)]
    case = measured.rows[0].case
    lines = [[n, *(spread(figures.get((case, n, m)), digits=3) for m in shown)] for n in names]
    return blocks(table(["", *(COLUMNS[m] for m in shown)], lines), made_on(measured))


def complete(out: Path) -> RunRecord | None:
    """The record of a run that an earlier call has finished."""
    if not (out / "run.json").exists():
        return None
    record = RunRecord.read(out / "run.json")
    return record if record.status == "complete" else None


def one_network() -> Iterator[Row]:
    """All images, one network."""
    out = WORK / "one"
    record = complete(out) or run(Recipe(out=out, **RECIPE), force=True).record
    yield from accuracy_of("one network", record)


def in_shards() -> Iterator[Row]:
    """Ten networks, and images that leave, one at a time."""
    name, out = f"{SHARDS} shards of {SLICES} slices", WORK / "shards"
    recipe = Recipe(out=out, shards=SHARDS, slices=SLICES, **RECIPE)
    record = complete(out) or run_sharded(recipe, resume=(out / "run.json").exists()).record
    yield from accuracy_of(name, record)
    shares = shares_of(recipe)
    formula = sum(r * r for r in range(1, SLICES + 1)) / sum(range(1, SLICES + 1)) / SLICES / SHARDS
    yield row_of(name, "share", shares)
    yield row_of(name, "share_by_formula", [formula])
    times, changes, seen = [], [], []
    chosen = torch.randperm(len(shares), generator=torch.Generator().manual_seed(0))[:REQUESTS]
    for image in chosen.tolist():
        ids = WORK / "ids.csv"
        with ids.open("w", newline="") as file:
            csv.writer(file).writerows([["index"], [image]])
        began = time.monotonic()
        found = forget(Forgetting(run=out, ids=ids, out=WORK / "left"), force=True)
        times.append((time.monotonic() - began) / record.seconds)
        changes.append(found.weight_change)
        seen.append(found.work.images / found.work.all_images)
    yield row_of(name, "time_share", times)
    yield row_of(name, "weight_change", changes)
    yield row_of(name, "share_of_requests", seen)


def shares_of(recipe: Recipe) -> list[float]:
    """For every image the part of the training, counted in images, that its leaving repeats."""
    stages = stages_of(recipe, load_data("fashion-mnist"))
    total = sum(len(stage.rows) for of_shard in stages for stage in of_shard)
    shares = []
    for of_shard in stages:
        sizes = [len(stage.rows) for stage in of_shard]
        for number, own in enumerate(b - a for a, b in zip([0, *sizes], sizes, strict=False)):
            shares += [sum(sizes[number:]) / total] * own
    return shares


def accuracy_of(name: str, record: RunRecord) -> Iterator[Row]:
    """What a finished run finds."""
    (result,) = record.results
    yield row_of(name, "accuracy", [result.accuracy])
    yield row_of(name, "macro_recall", [result.macro_recall])
    yield row_of(name, "seconds", [record.seconds])


def row_of(name: str, metric: str, values: list[float]) -> Row:
    """A figure of one training: the mean of shares, the median of what was timed."""
    middle = fmean(values) if metric.startswith("share") else median(values)
    return Row(
        case="compact",
        variant=name,
        metric=metric,
        median=middle,
        low=min(values),
        high=max(values),
        unit="s" if metric == "seconds" else "1",
        n=len(values),
    )


def main() -> None:
    """Measures both and writes the document."""
    WORK.mkdir(parents=True, exist_ok=True)
    rows = (*one_network(), *in_shards())
    Measurements(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(torch.device("cpu")),
        versions=versions(),
        rows=rows,
    ).write(DOCUMENT)


if __name__ == "__main__":
    main()
