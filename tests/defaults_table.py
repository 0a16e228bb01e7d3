"""What the default settings reach: data sets of several kinds, with each protection, three seeds.

`python tests/defaults_table.py` (`make defaults`) trains them all and writes docs/defaults.json; it
goes on where it was stopped. The photographs come with scikit-image, which nothing else needs.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from support.photographs import originals, textures, write_folder, write_npz

import defenses
from secure_cnn import Recipe, load_data, run
from secure_cnn.record import Measurements, Row, hardware, versions

DOCUMENT = Path(__file__).parents[1] / "docs" / "defaults.json"
SEEDS = 3
EPSILON = 8.0
ATTACKED, ATTACK_STEPS = 300, 20


VARIANTS = ("plain", "private", "n-fgsm", "private+n-fgsm")
BODY = "body.safetensors"
PUBLIC, OWN = (1, 3, 5, 7, 9), (0, 2, 4, 6, 8)  # classes of Fashion-MNIST


@dataclass(frozen=True, kw_only=True)
class Set:
    """A data set, how it is made, and for how long and how strongly its trainings go."""

    name: str
    make: Callable[[Path], str]
    epochs: int
    private_epochs: int
    eps: float = 0.0
    variants: tuple[str, ...] = VARIANTS
    settings: dict[str, Any] = field(default_factory=dict)

    def settings_of(self, variant: str) -> dict[str, Any]:
        """What the recipe of a variant says; all else is the default."""
        private = "private" in variant
        return {
            "epochs": self.private_epochs if private else self.epochs,
            **({"epsilon": EPSILON} if private else {}),
            **({"eps": self.eps} if "n-fgsm" in variant else {}),
            **self.settings,
        }


def _folder(root: Path, *counts: int, **settings: Any) -> str:
    return write_folder(root / "set", originals(), *counts, **settings)


def _npz(root: Path, *counts: int, drawn: bool = False, **settings: Any) -> str:
    pictures = textures() if drawn else originals()
    return write_npz(root / "set.npz", pictures, *counts, **settings)


def _named(_: Path, *, name: str) -> str:
    return name


def _halves(root: Path, *, body: bool) -> str:
    """Few images of five classes; and a body from many of the five others, if it is wanted."""
    few = _some(root / "few.npz", OWN, train=500, test=2000)
    if body:
        many = _some(root / "many.npz", PUBLIC, train=12_000, test=500)
        done = run(Recipe(out=root / "body", data=many, epochs=5))
        shutil.copy(done.folder.model, root / BODY)
    return few


def _some(path: Path, classes: tuple[int, ...], **counts: int) -> str:
    """The first images of some classes of Fashion-MNIST, numbered from 0."""
    data, arrays = load_data("fashion-mnist"), {}
    for part, split in (("train", data.train), ("test", data.test)):
        labels = torch.tensor([classes.index(c) if c in classes else -1 for c in range(10)])[
            split.labels
        ]
        kept = (labels >= 0).nonzero().flatten()[: counts[part]]
        prefix = "" if part == "train" else "test_"
        arrays[f"{prefix}images"] = split.images[kept, 0].numpy()
        arrays[f"{prefix}labels"] = labels[kept].numpy()
    np.savez(path, **arrays)
    return str(path)


SETS = (
    Set(
        name="digits: 1,438 grey 8x8",
        make=partial(_named, name="digits"),
        epochs=20,
        private_epochs=20,
        eps=0.05,
    ),
    Set(
        name="300 colour photographs 32x32, a file",
        make=lambda root: _npz(root, 300, 1000),
        epochs=20,
        private_epochs=20,
        eps=0.01,
    ),
    Set(
        name="3,000 grey photographs 16x16, a folder",
        make=lambda root: _folder(root, 3000, 1000, side=16, grey=True),
        epochs=10,
        private_epochs=10,
        eps=0.01,
    ),
    Set(
        name="3,000 pale colour photographs 32x32, a file",
        make=lambda root: _npz(root, 3000, 1000, contrast=0.25),
        epochs=5,
        private_epochs=5,
        eps=0.005,
    ),
    Set(
        name="2,000 drawn textures 32x32, a file",
        make=lambda root: _npz(root, 2000, 1000, drawn=True),
        epochs=5,
        private_epochs=20,
        eps=0.005,
    ),
    Set(
        name="10,000 colour photographs 32x32, a folder",
        make=lambda root: _folder(root, 10_000, 2000),
        epochs=2,
        private_epochs=10,
        eps=0.01,
    ),
    Set(
        name="fashion-mnist: 60,000 grey 28x28",
        make=partial(_named, name="fashion-mnist"),
        epochs=1,
        private_epochs=1,
        eps=0.05,
    ),
    Set(
        name="600 colour photographs 64x64, a folder",
        make=lambda root: _folder(root, 600, 500, side=64),
        epochs=10,
        private_epochs=10,
        eps=0.01,
    ),
    Set(
        name="500 grey 28x28, five classes, epsilon 1",
        make=partial(_halves, body=False),
        epochs=10,
        private_epochs=10,
        variants=("private",),
        settings={"epsilon": 1.0},
    ),
    Set(
        name="the same, the head alone on a body of five other classes",
        make=partial(_halves, body=True),
        epochs=10,
        private_epochs=10,
        variants=("private",),
        settings={"epsilon": 1.0, "train_only": ("head.*",)},
    ),
)


def tried(data: str, each: Set, variant: str, seed: int) -> dict[str, Any]:
    """One training, as it is noted down."""
    body = Path(data).with_name(BODY)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            out=Path(folder, "run"),
            data=data,
            seed=seed,
            baseline=False,
            robust_samples=1,
            weights=str(body) if body.exists() else None,
            **each.settings_of(variant),
        )
        assert recipe.variant.name == variant
        done = run(recipe)
    (result,) = done.record.results
    told = {
        "set": each.name,
        "variant": variant,
        "seed": seed,
        "accuracy": result.accuracy,
        "steps": done.record.epochs[-1].step,
        "notes": [note for note in done.record.notes if "did not learn" in note],
    }
    if done.record.privacy is not None:
        told["noise_multiplier"] = done.record.privacy.noise_multiplier
    if recipe.threat is not None:
        told["robust_accuracy"] = withstood(done.model, recipe.threat, load_data(data))
    return told


def withstood(model: torch.nn.Module, threat: defenses.ThreatModel, data: Any) -> float:
    """The share of some test images that PGD leaves right."""
    index = torch.arange(min(ATTACKED, len(data.test)))
    images, labels = data.test.batch(index)
    found = defenses.attack("pgd", threat, steps=ATTACK_STEPS)(model, images, labels, seed=0)
    with torch.no_grad():
        return float((model(found).argmax(1) == labels).float().mean())


def rows_of(lines: list[dict[str, Any]]) -> Iterator[Row]:
    """Of each set and variant the mean over the seeds, between the worst and the best of them."""
    for each in SETS:
        for variant in each.variants:
            own = [line for line in lines if (line["set"], line["variant"]) == (each.name, variant)]
            for metric in ("accuracy", "robust_accuracy", "steps", "noise_multiplier"):
                values = [float(line[metric]) for line in own if metric in line]
                if values:
                    yield row(each.name, variant, metric, values)
            if own:
                told = each.settings_of(variant)
                for metric in ("epochs", "epsilon", "eps"):
                    if metric in told:
                        yield row(each.name, variant, metric, [float(told[metric])])


def row(case: str, variant: str, metric: str, values: list[float]) -> Row:
    """A figure with its spread."""
    return Row(
        case=case,
        variant=variant,
        metric=metric,
        median=min(max(values), max(min(values), fmean(values))),
        low=min(values),
        high=max(values),
        unit="1",
        n=len(values),
    )


def main() -> None:
    """Trains what has not been trained yet, and writes the document."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--journal", type=Path, default=Path("runs/defaults.jsonl"))
    given = parser.parse_args()
    given.journal.parent.mkdir(parents=True, exist_ok=True)
    given.journal.touch()
    torch.set_num_threads(1)
    lines = [json.loads(line) for line in given.journal.read_text().splitlines()]
    done = {(line["set"], line["variant"], line["seed"]) for line in lines}
    for seed in range(given.seeds):
        for each in SETS:
            left = [v for v in each.variants if (each.name, v, seed) not in done]
            if not left:
                continue
            root = Path(tempfile.mkdtemp())
            try:
                data = each.make(root)
                for variant in left:
                    lines.append(tried(data, each, variant, seed))
                    with given.journal.open("a") as journal:
                        print(json.dumps(lines[-1]), file=journal, flush=True)
            finally:
                shutil.rmtree(root)
    Measurements(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware("cpu"),
        versions=versions(),
        rows=tuple(rows_of(lines)),
    ).write(DOCUMENT)


if __name__ == "__main__":
    main()
