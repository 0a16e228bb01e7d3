"""Every word of every figure is on the canvas and touches no other, whatever the figures are.

Measured by matplotlib's own extents of the text that it draws, in a font wider than most browsers'.
"""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from support import audit_records
from support.leakage_records import extraction_of, inversion_of, membership_of
from support.leakage_records import record_of as leakage_record
from support.robustness_records import record_of as robustness_record
from support.run_records import make_epoch, make_examples, make_record, make_result

from secure_cnn.pages import (
    InversionPicture,
    class_recall,
    confusion_matrix,
    cost_bars,
    example_figure,
    render_leakage,
    render_robustness,
)
from secure_cnn.pages.audit import audit_figure
from secure_cnn.pages.bench import render_bench
from secure_cnn.pages.canvas import colors_of, render
from secure_cnn.pages.classes import recall_dots
from secure_cnn.pages.figures import curves
from secure_cnn.pages.robustness import certificate_curve
from secure_cnn.pages.tradeoff import tradeoff_map
from secure_cnn.record import Measurements, Row
from secure_cnn.record.tradeoff import Estimate, TradeoffPoint

WIDE = ("W" * 40, "MMMMMMMMMMMMMM", "mm", "猫" * 20, "[red]:cat:")
SLACK = 1.0


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn from here on: their sizes, and their words with their places."""
    figures = []
    save, draw = Figure.savefig, Text.draw

    def saved(self, *words, **options):
        figures.append((tuple(self.bbox.size), []))
        save(self, *words, **options)

    def written(self, renderer, *words, **options):
        if self.get_text().strip() and self.get_visible():
            figures[-1][1].append((self.get_text(), self.get_window_extent(renderer)))
        draw(self, renderer, *words, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    monkeypatch.setattr(Text, "draw", written)
    return figures


def faults(size, words):
    """The words that leave the canvas, and the pairs that touch."""
    width, height = size
    outside = [
        text
        for text, box in words
        if box.x0 < -SLACK or box.y0 < -SLACK or box.x1 > width + SLACK or box.y1 > height + SLACK
    ]
    touching = [
        (one, other)
        for (one, a), (other, b) in combinations(words, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > SLACK and min(a.y1, b.y1) - max(a.y0, b.y0) > 3
    ]
    return [*outside, *touching]


def check(drawn):
    """Something was drawn, and all of it can be read."""
    assert drawn
    for size, words in drawn:
        assert not faults(size, words), faults(size, words)[:4]


RANGES = {
    "usual": (0.1, 0.5, 0.9),
    "narrow": (0.1075, 0.10751, 0.1076),
    "narrower": (0.5, 0.500001, 0.500002),
    "nothing": (0.0, 0.0, 0.0),
    "everything": (1.0, 1.0, 1.0),
    "from nothing to everything": (0.0, 0.5, 1.0),
}


@pytest.mark.parametrize("shares", RANGES)
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e9])
@pytest.mark.parametrize("length", [1, 3, 1200])
def test_curves(drawn, shares, scale, length):
    """Accuracies in any range, losses and budgets of any size, any number of epochs."""
    found = RANGES[shares]
    epochs = [
        make_epoch(
            variant,
            number,
            test_accuracy=found[number % 3],
            test_loss=scale * (1 + found[number % 3]),
            epsilon=scale * number if "private" in variant else None,
        )
        for variant in ("plain", "private+n-fgsm")
        for number in range(1, length + 1)
    ]
    curves(make_record(epochs=epochs))
    check(drawn)


@pytest.mark.parametrize("median", [1e-6, 1.0, 123.456, 1e6])
def test_costs(drawn, median):
    """Of any size, under any name."""
    rows = [
        Row(case=WIDE[0], variant=v, metric="time_ratio", median=median, low=median / 2,
            high=2 * median, unit="x", n=3)
        for v in ("plain", "private+n-fgsm")
    ]  # fmt: skip
    cost_bars(make_record(cost=rows), "time_ratio")
    check(drawn)


@pytest.mark.parametrize("classes", [2, 5, 24, 90])
def test_classes(drawn, classes):
    """Names as wide as they come; recall of all and of nothing."""
    names = tuple(f"{WIDE[k % len(WIDE)]}{k}" if k % 2 else f"{k}" for k in range(classes))
    variants = ("plain", "private+n-fgsm")
    results = [
        make_result(v, classes, accuracy=share, recall=(share,) * classes)
        for v, share in zip(variants, (0.0, 1.0), strict=True)
    ]
    record = make_record(names=names, results=results)
    class_recall(record)
    confusion_matrix(record, "plain")
    recall_dots({r.variant: r for r in results}, names, colors_of(variants))
    check(drawn)


def test_examples(drawn):
    """Under the widest names."""
    examples = make_examples(names=WIDE[:3])
    example_figure(examples, 0)
    check(drawn)


@pytest.mark.parametrize("shares", RANGES)
@pytest.mark.parametrize("eps", [1e-6, 0.1, 1e5])
def test_robustness(drawn, shares, eps):
    """The curve against eps, the recalls, and the certificate."""
    low, middle, high = RANGES[shares]
    verdict = {
        **{"name": "x", "outcome": "pass", "figure": None, "sentence": "s"},
        "curve": [
            {"eps": factor * eps, "accuracy": share, "interval": [low, high], "correct": 1}
            for factor, share in ((0.0, high), (1.0, middle), (2.0, middle), (4.0, low))
        ],
    }
    threat = {"norm": "l2", "eps": eps, "bounds": [0.0, 1.0]}
    render_robustness(robustness_record(threat=threat, verdicts=[verdict]))
    points = [(radius * eps, middle, low, high) for radius in (0.0, 0.5, 1.0)]
    certificate_curve({WIDE[0]: points, "σ = 0.25": points})
    check(drawn)


@pytest.mark.parametrize("shares", RANGES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_the_map(drawn, shares, scale):
    """Any accuracies, budgets and times."""
    low, middle, high = RANGES[shares]
    share = [Estimate(value=v, low=low, high=high) for v in (low, middle, high)]
    points = [
        TradeoffPoint(
            name=f"{number}",
            accuracy=each,
            macro_recall=each.value,
            robust_accuracy=each,
            epsilon=None if number == 0 else scale * number,
            time=Estimate(
                value=scale * (1 + number), low=scale * (1 + number), high=scale * (2 + number)
            ),
        )
        for number, each in enumerate(share)
    ]
    tradeoff_map(points, colors_of(point.name for point in points))
    check(drawn)


@pytest.mark.parametrize("seconds", [1e-7, 0.0031, 40.0, 1e4])
def test_benchmarks(drawn, seconds):
    """Times of any size, whose logarithmic axis has labels however narrow it is."""
    rows = [
        Row(case=case, variant=v, metric=m, median=x, low=x, high=x, unit=unit, n=5)
        for v in ("plain", f"private+{WIDE[0]}")
        for case, m, x, unit in (
            *(("net", m, seconds, "s") for m in ("time", "time_forward", "time_backward")),
            *(("net", m, 1.0, "x") for m in ("time_ratio", "images_per_second")),
            *((f"batch {2**k}", "time", seconds * (1 + k / 100), "s") for k in range(3, 12)),
            ("batch", "exponent", 0.9, "1"),
        )
    ]
    render_bench(Measurements(created="2026-01-01", hardware={}, versions={}, rows=tuple(rows)))
    check(drawn)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_audits(drawn, scale):
    """Scores and bounds of any size, and the names of all methods."""
    bounds = [
        {"method": method, "epsilon": scale * size, "confidence": 0.975}
        for method, size in (("gdp", 0.5), ("threshold", 1.0), ("counting", 2.0))
    ]
    audit_figure(
        audit_records.record_of(
            in_scores=[scale, 1.5 * scale, 0.4 * scale],
            out_scores=[0.0, -scale, 0.2 * scale],
            bounds=bounds,
            claimed_epsilon=scale,
        )
    )
    check(drawn)


@pytest.mark.parametrize("others", [1, 60, 10**7])
@pytest.mark.parametrize("shift", [-8.0, 0.9, 8.0])
@pytest.mark.parametrize("epsilon", [None, 900.0])
def test_memberships(drawn, others, shift, epsilon):
    """Attacks that find nothing, all or the contrary, on any number, under any name."""
    names = (*WIDE, *(f"class {k}" for k in range(30)))
    shifts = {name: shift + k / 100 for k, name in enumerate(WIDE)}
    delta = None if epsilon is None else 1e-5
    render_leakage(
        leakage_record(
            membership=membership_of(shifts, others=others, models=3, classes=names),
            epsilon=epsilon,
            delta=delta,
        )
    )
    check(drawn)


@pytest.mark.parametrize("identified", [0, 7, 16])
@pytest.mark.parametrize("count", [1, 5, 8])
def test_inversions(drawn, identified, count):
    """Any share of images, any number in a picture."""
    found = [inversion_of(p, 10**6, identified) for p in ("plain", "clipped", "noised")]
    images = np.zeros((count, 1, 4, 4))
    picture = InversionPicture(title=WIDE[0], originals=images, reconstructions=images)
    render_leakage(leakage_record(membership=None, inversion=found), [picture])
    check(drawn)


@pytest.mark.parametrize("shares", RANGES)
@pytest.mark.parametrize("budgets", [(1,), (100, 1000, 10000), tuple(range(1, 10**6, 10**5))])
def test_extractions(drawn, shares, budgets):
    """Any accuracies, budgets, pools and answers."""
    low, middle, high = RANGES[shares]
    found = [
        extraction_of(pool=pool, answers=answers, queries=queries, accuracy=middle, fidelity=high,
                      baseline=low, baseline_fidelity=None)
        for pool in WIDE[:2] for answers in WIDE for queries in budgets
    ]  # fmt: skip
    render_leakage(leakage_record(membership=None, extraction=found, accuracy=high))
    check(drawn)


def test_words_that_are_cut_off_or_touch_are_found(drawn):
    """Control: what this file would not see is worth nothing."""

    def draw(canvas):
        canvas.text(-20, 10, "cut off at the left")
        canvas.text(10, 60, "one")
        canvas.text(14, 62, "on another")
        canvas.text(10, 90, "alone")

    render("control", "a control", (200, 100), draw)
    assert faults(*drawn[0]) == ["cut off at the left", ("one", "on another")]
