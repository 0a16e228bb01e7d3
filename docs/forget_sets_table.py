"""What a method without a guarantee leaves of each kind of people, and of each one of them.

`python docs/forget_sets_table.py` lets the network of `unlearning_table.py` forget a tenth of its
images drawn at random, a whole class, the tenth that eight shadow models say is most exposed, and a
tenth whose labels are wrong, and holds it against models that never saw them. Of the random tenth
each image is told by U-LiRA, from four trainings. It goes on where it was stopped.
"""

import copy
import hmac
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from cells import blocks, index, made_on, spread, table
from torch import Tensor, nn
from unlearning_table import (
    FORGOTTEN,
    IMAGES,
    MARGIN,
    METHODS,
    TESTED,
    WORK,
    Batches,
    Ways,
    batch,
    rows_of,
    trained,
    write,
)

from privacy.leakage import (
    Question,
    ShadowDesign,
    copies,
    membership_report,
    score_tables,
)
from privacy.unlearning import Heuristic, margins, oracle_gap, unlearning_lira
from secure_cnn import load_data
from secure_cnn.data import ImageData
from secure_cnn.record import Measurements, Row

DOCUMENT = Path(__file__).with_name("forget-sets.json")
ORACLES, TRAININGS, SHADOWS, CLASS = 3, 4, 8, 6
CHOSEN: Ways = {
    "nothing": (),
    **{name: METHODS[name] for name in ("SalUn", "SalUn, then fine-tuning")},
}
"""The model as it was, and what came nearest in `unlearning_table.py`."""
LIRA = {"lira_area": "mean", "lira_worst": "worst 5 %", "lira_worst_by_chance": "by chance"}
GAPS = {
    "oracle_gap": "average gap",
    "forget_gap": "who left",
    "retain_gap": "who stays",
    "test_gap": "strangers",
}
_KEY = b"nobody's key: this is public data"


def forget_sets_table(measured: Measurements) -> str:
    """A kind of people and a method a line: the gaps in percentage points."""
    return _lines(measured, GAPS, digits=2)


def lira_table(measured: Measurements) -> str:
    """A method a line: how well each image tells who forgot it from who never saw it."""
    return _lines(measured, LIRA, digits=3)


def _lines(measured: Measurements, columns: dict[str, str], *, digits: int) -> str:
    figures = index(measured.rows)
    kinds = dict.fromkeys((r.case, r.variant) for r in measured.rows if r.metric in columns)
    lines = [
        [case, variant, *(spread(figures.get((case, variant, m)), digits=digits) for m in columns)]
        for case, variant in kinds
    ]
    return blocks(table(["who left", "method", *columns.values()], lines), made_on(measured))


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """The images that are trained on, as float in [0, 1], and their labels."""

    data: ImageData

    @cached_property
    def everybody(self) -> tuple[Tensor, Tensor]:
        """In the order of `unlearning_table`, whose first tenth is its random one."""
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))
        (found,) = batch(self.data.train, order)
        return found

    def some(self, rows: Tensor, labels: Tensor | None = None) -> Batches:
        """These as one batch, perhaps with other labels."""
        images, own = self.everybody
        return [(images[rows], (own if labels is None else labels)[rows])]

    @cached_property
    def wrong(self) -> Tensor:
        """The labels, each of the first tenth another than its own."""
        labels = self.everybody[1].clone()
        random = torch.Generator().manual_seed(1)
        others = torch.randint(1, 10, (FORGOTTEN,), generator=random)
        labels[:FORGOTTEN] = (labels[:FORGOTTEN] + others) % 10
        return labels


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """Some people who leave: rows of the images, and the labels that were trained on."""

    name: str
    slug: str
    rows: Tensor
    labels: Tensor
    seed: int

    def forget(self, images: Images) -> Batches:
        """Who leaves."""
        return images.some(self.rows, self.labels)

    def retain(self, images: Images) -> Batches:
        """Who stays."""
        stays = torch.ones(IMAGES, dtype=torch.bool)
        stays[self.rows] = False
        return images.some(stays.nonzero().flatten(), self.labels)


def most_exposed(images: Images) -> Tensor:
    """The tenth that most models which were trained on them give away."""
    pictures, labels = images.everybody
    dataset = torch.utils.data.TensorDataset(pictures, labels)

    def train(rows: Tensor, seed: int) -> nn.Module:
        name = f"shadow-{seed}-{len(rows)}-{int(rows.sum())}"
        return trained(name, images.data.spec, seed, images.some(rows))[0]

    halves = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(2)).split(IMAGES // 2)
    design = ShadowDesign.around(
        *(half.numpy() for half in halves),
        shadows=SHADOWS,
        pool=None,
        seed=0,
        apart=copies(dataset),
    )
    tables = score_tables(train, dataset, design, recipe="train", questions={"": Question()})
    report = membership_report(tables[""], key=_KEY, exposed=FORGOTTEN)
    numbers = {_digest(number): number for number in range(IMAGES)}
    return torch.tensor([numbers[each.digest] for each in report.exposed])


def _digest(number: int) -> str:
    """By which a report of leakage tells an image."""
    return hmac.digest(_KEY, f"example {number}".encode(), "sha256").hex()


def kinds_of(images: Images) -> Iterator[Kind]:
    """Whom the network forgets."""
    labels, tenth = images.everybody[1], torch.arange(FORGOTTEN)
    yield Kind(name="a random tenth", slug="", rows=tenth, labels=labels, seed=0)
    of_class = (labels == CLASS).nonzero().flatten()
    yield Kind(name="one class", slug="class-", rows=of_class, labels=labels, seed=100)
    exposed = most_exposed(images)
    yield Kind(name="the most exposed", slug="exposed-", rows=exposed, labels=labels, seed=200)
    yield Kind(name="mislabelled", slug="wrong-", rows=tenth, labels=images.wrong, seed=300)


def forgotten(
    kind: Kind, images: Images, methods: tuple[Heuristic, ...], original: nn.Module
) -> nn.Module:
    """What methods, one after the other, make of a model; without one a copy of it."""
    model = copy.deepcopy(original)
    for each in methods:
        each(model, kind.retain(images), kind.forget(images))
    return model


def gaps_of(kind: Kind, images: Images) -> Iterator[Row]:
    """Each method, and the model as it was, beside models that never saw these people."""
    spec, retain, forget = images.data.spec, kind.retain(images), kind.forget(images)
    wrong = kind.labels is not images.everybody[1]
    everybody = images.some(torch.arange(IMAGES), kind.labels)
    original, _ = trained(f"{kind.slug if wrong else ''}original", spec, 0, everybody)
    oracles = [
        trained(f"{kind.slug}oracle-{n}", spec, kind.seed + n, retain)[0]
        for n in range(1, ORACLES + 1)
    ]
    test = batch(images.data.test, torch.arange(TESTED))
    for name, methods in CHOSEN.items():
        model = forgotten(kind, images, methods, original)
        gap = oracle_gap(model, oracles, forget=forget, retain=retain, test=test, margin=MARGIN)
        print(kind.name, name, gap, flush=True)
        yield from (replace(row, case=kind.name) for row in rows_of(name, gap, None))


def each_of_them(kind: Kind, images: Images) -> Iterator[Row]:
    """How well each image tells models that forgot it from models that never saw it."""
    spec, forget = images.data.spec, kind.forget(images)
    everybody, retain = images.some(torch.arange(IMAGES)), kind.retain(images)
    seeds = (0, *range(11, 10 + TRAININGS))
    originals = [
        trained("original" if not seed else f"original-{seed}", spec, seed, everybody)[0]
        for seed in seeds
    ]
    never = [trained(f"oracle-{n}", spec, n, retain)[0] for n in range(1, 2 * TRAININGS + 1)]
    told = {
        name: [forgotten(kind, images, methods, each) for each in originals]
        for name, methods in CHOSEN.items()
    }
    told["other trainings without them"] = never[TRAININGS:]
    for name, models in told.items():
        signals = [margins(each, forget) for each in (models, never[:TRAININGS])]
        found = unlearning_lira(*signals)
        print(name, found.mean_area, found.worst_area, found.worst_by_chance, flush=True)
        for metric, value in (
            ("lira_area", found.mean_area),
            ("lira_worst", found.worst_area),
            ("lira_worst_by_chance", found.worst_by_chance),
        ):
            numbers = {"median": value, "low": value, "high": value}
            yield Row(case=kind.name, variant=name, metric=metric, unit="1", n=FORGOTTEN, **numbers)


def main() -> None:
    """Measures all, and writes the document."""
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    images = Images(data=load_data("fashion-mnist"))
    kinds = list(kinds_of(images))
    rows = [row for kind in kinds for row in gaps_of(kind, images)]
    measured = write(DOCUMENT, [*rows, *each_of_them(kinds[0], images)])
    print(forget_sets_table(measured))
    print(lira_table(measured))


if __name__ == "__main__":
    main()
