"""How far the methods without a guarantee end from models that never saw who left.

`python docs/unlearning_table.py` trains a network on the first 4,000 images of Fashion-MNIST, and
five oracles without a random tenth of them, lets each method of `privacy.unlearning` forget that
tenth, with the settings it comes with and with those that were best on another tenth
(docs/unlearning_search.py), and writes the gaps into unlearning.json. It goes on where it was
stopped, from its folder in runs/.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from time import process_time

import torch
from cells import blocks, index, made_on, spread, table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from privacy.unlearning import (
    SCRUB,
    SSD,
    FineTuning,
    Heuristic,
    NegGradPlus,
    OracleGap,
    SalUn,
    oracle_gap,
)
from secure_cnn import build_model, load_data
from secure_cnn.data import DataSpec, Split
from secure_cnn.record import Measurements, Row, hardware, versions

DOCUMENT = Path(__file__).with_name("unlearning.json")
WORK = Path("runs/unlearning-table")
IMAGES, FORGOTTEN, TESTED, ORACLES, MARGIN = 4000, 400, 2000, 5, 2.0
STAGES = ((15, 0.02), (3, 0.002))
"""Epochs and learning rates of a training: until it knows some by heart, and then to rest."""
Ways = dict[str, tuple[Heuristic, ...]]
METHODS: Ways = {
    "fine-tuning": (FineTuning(),),
    "NegGrad+": (NegGradPlus(),),
    "SSD, selection 5": (SSD(selection=5.0),),  # at its 10 no weight is chosen of a tenth
    "SCRUB": (SCRUB(),),
    "SalUn": (SalUn(),),
    "SCRUB, chosen": (SCRUB(learning_rate=0.005),),
    "SalUn, chosen": (SalUn(epochs=5),),
    "SalUn, then fine-tuning": (
        SalUn(epochs=5, learning_rate=0.03),
        FineTuning(epochs=5, learning_rate=0.02, batch_size=64),
        FineTuning(epochs=2, learning_rate=0.002, batch_size=64),
    ),
}
"""As they come, and as chosen by docs/unlearning_search.py; several go one after the other."""
CONTROLS = ("nothing", "one more oracle")
COLUMNS = {
    "oracle_gap": "average gap",
    "forget_gap": "who left",
    "retain_gap": "who stays",
    "test_gap": "strangers",
    "time_ratio": "time",
}
Batches = list[tuple[Tensor, Tensor]]


def unlearning_table(measured: Measurements) -> str:
    """A method a line: its gaps in percentage points, and its share of a training's time."""
    figures = index(measured.rows)
    names = list(dict.fromkeys(row.variant for row in measured.rows))
    case = measured.rows[0].case
    lines = [
        [name, *(spread(figures.get((case, name, m)), digits=2) for m in COLUMNS)] for name in names
    ]
    return blocks(table(["", *COLUMNS.values()], lines), made_on(measured))


def batch(split: Split, rows: Tensor) -> Batches:
    """These images as one batch, in [0, 1]."""
    return [(split.images[rows].float() / 255, split.labels[rows])]


def trained(name: str, spec: DataSpec, seed: int, examples: Batches) -> tuple[nn.Module, float]:
    """A network and the processor seconds of its training; kept in the folder by its name."""
    model, path = build_model("compact", spec, generator_seed=seed), WORK / f"{name}.safetensors"
    if path.exists():
        state = load_file(path)
        seconds = float(state.pop("seconds"))
        model.load_state_dict(state)
        return model.eval(), seconds
    began = process_time()
    for epochs, rate in STAGES:
        # Plain descent with momentum is all that this method is; here from the first weights on.
        descent = FineTuning(epochs=epochs, learning_rate=rate, batch_size=64, seed=seed)
        descent(model, examples, [(examples[0][0][:1], examples[0][1][:1])])
    seconds = process_time() - began
    save_file({**model.state_dict(), "seconds": torch.tensor(seconds)}, path)
    print(f"{name}: {seconds:.0f} s", flush=True)
    return model.eval(), seconds


def rows_of(name: str, gap: OracleGap, ratio: float | None) -> Iterator[Row]:
    """The average gap, and the signed difference on each set."""

    def row(metric: str, value: float, ends: tuple[float, float], unit: str) -> Row:
        numbers = {"median": value, "low": ends[0], "high": ends[1]}
        n = len(gap.forget.oracles)
        return Row(case="compact", variant=name, metric=metric, unit=unit, n=n, **numbers)

    yield row("oracle_gap", gap.average_gap, gap.average_gap_interval, "points")
    for part, each in gap.parts.items():
        yield row(f"{part}_gap", each.points, each.interval, "points")
    if ratio is not None:
        yield row("time_ratio", ratio, (ratio, ratio), "x")


def measured_rows() -> Iterator[Row]:
    """Every method, and the two controls: the model as it was, and one more oracle."""
    data = load_data("fashion-mnist")
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))
    forget, retain = batch(data.train, order[:FORGOTTEN]), batch(data.train, order[FORGOTTEN:])
    test = batch(data.test, torch.arange(TESTED))
    original, _ = trained("original", data.spec, 0, batch(data.train, order))
    drawn = [trained(f"oracle-{n}", data.spec, n, retain) for n in range(1, ORACLES + 2)]
    oracles, seconds = [model for model, _ in drawn[:ORACLES]], drawn[-1][1]

    def gap(model: nn.Module) -> OracleGap:
        sets = {"forget": forget, "retain": retain, "test": test}
        found = oracle_gap(model, oracles, **sets, margin=MARGIN)
        print(found, flush=True)
        return found

    for name, model in zip(CONTROLS, (original, drawn[-1][0]), strict=True):
        yield from rows_of(name, gap(model), None)
    for name, methods in METHODS.items():
        model = build_model("compact", data.spec)
        model.load_state_dict(original.state_dict())
        began = process_time()
        changes = [method(model, retain, forget) for method in methods]
        ratio = (process_time() - began) / seconds
        print(name, *changes, flush=True)
        yield from rows_of(name, gap(model), ratio)


def in_words(*methods: Heuristic) -> str:
    """Methods, with what of each is not as it comes."""
    return ", then ".join(map(told_of, methods))


def told_of(method: Heuristic) -> str:
    """A method, with what of it is not as it comes."""
    usual = type(method)()
    own = {each.name: getattr(method, each.name) for each in fields(method)}
    changed = {name: value for name, value in own.items() if value != getattr(usual, name)}
    told = ", ".join(f"{name}={value}" for name, value in changed.items())
    return f"{type(method).__name__}({told})"


def write(path: Path, rows: Iterable[Row]) -> Measurements:
    """The document of these rows."""
    measured = Measurements(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware("cpu"),
        versions=versions(),
        rows=tuple(rows),
    )
    measured.write(path)
    return measured


def main() -> None:
    """Measures all, writes the document, and prints it as a table."""
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    print(unlearning_table(write(DOCUMENT, measured_rows())))


if __name__ == "__main__":
    main()
