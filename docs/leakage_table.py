"""What four trainings give and leak: plain, private, adversarial, and both, into leakage.json.

`python docs/leakage_table.py` trains them on the first images of Fashion-MNIST, attacks them and
measures who was in their data. It goes on where it was stopped, from its folder in runs/.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from cells import blocks, index, made_on, spread, table

import defenses
from privacy.leakage import MEMBERSHIP_ATTACKS
from secure_cnn import Recipe, load_data, run
from secure_cnn.checkpoint import read_model
from secure_cnn.interruption import StopRequest
from secure_cnn.leakage import LeakageSettings, MembershipSettings, measure_leakage, target_of
from secure_cnn.record import (
    MEMBERSHIP_ATTACKS_IN_WORDS,
    Measurements,
    Row,
    RunRecord,
    hardware,
    versions,
)

DOCUMENT = Path(__file__).with_name("leakage.json")
WORK = Path("runs/leakage-table")
IMAGES, EPOCHS, SHADOWS, ATTACKED = 1000, 12, 8, 300
THREAT = defenses.ThreatModel(norm="linf", eps=0.1)
PROTECTIONS = {"plain": {}, "DP": {"epsilon": 3.0}, "AT": {"eps": THREAT.eps}}
PROTECTIONS["DP and AT"] = {**PROTECTIONS["DP"], **PROTECTIONS["AT"]}
COLUMNS = {
    "accuracy": "accuracy",
    "train_accuracy": "of its training images",
    "macro_recall": "recall",
    "robust": "robust accuracy",
    "epsilon": "ε",
    "auc": "AUC",
    "tpr@0.1": "TPR at 0.1",
    "tpr@0.01": "TPR at 0.01",
    "tpr@0.001": "TPR at 0.001",
}
"""What so few images cannot tell has no column."""


def leakage_table(measured: Measurements) -> str:
    """A protection a line, with what it gives and what is told of its members, and whose."""
    figures = index(measured.rows)
    names = list(dict.fromkeys(row.variant for row in measured.rows))
    case = measured.rows[0].case
    shown = [m for m in COLUMNS if any(row.metric == m for row in measured.rows)]
    lines = [[n, *(spread(figures.get((case, n, m)), digits=3) for m in shown)] for n in names]
    heads = [f"{COLUMNS[m]}{whose(measured, m)}" for m in shown]
    return blocks(table(["", *heads], lines), made_on(measured))


def whose(measured: Measurements, metric: str) -> str:
    """Of whose members a rate is: more of them than one target has are of all models together."""
    if not metric.startswith("tpr"):
        return ""
    most = max(row.n for row in measured.rows if row.metric == metric)
    return ", all models" if most > IMAGES else ", target"


def attacks_table() -> str:
    """Each attack by name, and what it does: in the words of the page."""
    lines = [[f"`{name}`", words] for name, words in MEMBERSHIP_ATTACKS_IN_WORDS.items()]
    return table(["attack", "what it does"], lines).replace("--:", "---")


def images(path: Path) -> str:
    """The first images of Fashion-MNIST, as many to train on as to test on."""
    if not path.exists():
        data = load_data("fashion-mnist")
        np.savez(
            path,
            train_images=data.train.images[:IMAGES, 0].numpy(),
            train_labels=data.train.labels[:IMAGES].numpy(),
            test_images=data.test.images[:IMAGES, 0].numpy(),
            test_labels=data.test.labels[:IMAGES].numpy(),
        )
    return str(path)


def found(name: str, data: str) -> Iterator[Row]:
    """What one training gives, and what it leaks."""
    out = WORK / name.replace(" ", "-")
    settings = {**PROTECTIONS[name], "epochs": EPOCHS, "baseline": False, "robust_samples": 1}
    recipe = Recipe(out=out, data=data, model="compact", **settings)
    if not (out / "run.json").exists() or RunRecord.read(out / "run.json").status != "complete":
        run(recipe, resume=(out / "checkpoints/training.safetensors").exists(), force=True)
    record = RunRecord.read(out / "run.json")
    target = target_of(record, read_model(out / record.checkpoints[0], unlocking=None), data)
    told = MembershipSettings(shadows=SHADOWS, attacks=tuple(MEMBERSHIP_ATTACKS))
    settled = LeakageSettings(membership=told)
    leaked = measure_leakage(target, settled, out, stop=StopRequest()).record
    if leaked.void:
        raise SystemExit(f"{name}: a control failed, so that no figure counts")
    (result,) = record.results
    told = {
        "accuracy": result.accuracy,
        "train_accuracy": leaked.train_accuracy,
        "macro_recall": result.macro_recall,
        "epsilon": result.epsilon,
    }
    for metric, value in told.items():
        if value is not None:
            yield row_of(name, metric, value, value, value, 1)
    robust = defenses.evaluate(target.model, target.data.test, THREAT, samples=ATTACKED)
    low, high = robust.worst_case_interval
    yield row_of(name, "robust", robust.worst_case_accuracy, low, high, robust.samples)
    for each in leaked.rows:
        yield row_of(name, each.metric, each.median, each.low, each.high, each.n)


def row_of(name: str, metric: str, value: float, low: float, high: float, n: int) -> Row:
    """A figure of one protection."""
    values = {"median": value, "low": low, "high": high}
    return Row(case="compact", variant=name, metric=metric, unit="1", n=n, **values)


def main() -> None:
    """Measures all four and writes the document."""
    WORK.mkdir(parents=True, exist_ok=True)
    data = images(WORK / "images.npz")
    rows = tuple(row for name in PROTECTIONS for row in found(name, data))
    Measurements(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware("cpu"),
        versions=versions(),
        rows=rows,
    ).write(DOCUMENT)


if __name__ == "__main__":
    main()
