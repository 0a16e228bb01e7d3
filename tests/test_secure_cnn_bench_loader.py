"""The loader's figures: planted times come out as they were, and a real round measures all."""

import os

import pytest
from support.reading_workers import living_workers, remember

from secure_cnn.bench.loader import (
    LoaderSettings,
    Photographs,
    _rows,
    _Took,
    measure_loader,
    write_photographs,
)
from secure_cnn.errors import RunError

# A process that is forked while torch computes in threads of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def own_processes():
    """A worker that an earlier test left to the garbage collector is not this one's."""
    remember()


def test_planted_times_become_ratios_and_the_bound(monkeypatch):
    """Two cores, a computation that uses 1.5 of them: decoding has half a core for itself."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    took = {
        "memory": [_Took(0.010, 0.015)],
        "workers-1": [_Took(0.0125, 0.018)],
        "decoding": [_Took(0.008, 0.010)],
    }
    found = {(row.variant, row.metric): row.median for row in _rows("net", took)}
    assert found == {
        ("memory", "time"): 0.010,
        ("memory", "rate_ratio"): 1.0,
        ("memory", "processor_ratio"): 1.0,
        ("workers-1", "time"): 0.0125,
        ("workers-1", "rate_ratio"): pytest.approx(0.8),
        ("workers-1", "processor_ratio"): pytest.approx(1.2),
        ("decoding", "time"): 0.010,
        ("bound", "rate_ratio"): pytest.approx(0.8),
    }


def test_a_round_measures_every_variant(tmp_path):
    """On a few small batches, with no process left."""
    write_photographs(tmp_path, 8)
    settings = LoaderSettings(
        images=8, batch=4, batches=1, workers=(0, 1), prefetch=(1, 2), rounds=1
    )
    rows = measure_loader("compact", tmp_path, settings=settings)
    metrics = {(row.variant, row.metric) for row in rows}
    ahead = ("workers-1, prefetch-1", "workers-1, prefetch-2")
    timed = {(n, m) for n in ("memory", "workers-0", *ahead) for m in METRICS}
    assert metrics == timed | {("decoding", "time"), ("bound", "rate_ratio")}
    assert all(row.median > 0 for row in rows)
    assert living_workers() == []


METRICS = ("time", "rate_ratio", "processor_ratio")


def test_the_photographs_are_of_the_size_that_is_said(tmp_path):
    """Files of 256 x 256 that are large enough to be work, and a data set of 64 x 64."""
    write_photographs(tmp_path, 2)
    image, label = Photographs(tmp_path)[1]
    assert (image.shape, label) == ((3, 64, 64), 1)
    assert image.std() > 0.05
    assert all(file.stat().st_size > 10_000 for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [
        {"images": 0},
        {"images": 9, "batch": 4},
        {"batch": 0},
        {"batches": 0},
        {"threads": 0},
        {"rounds": 0},
        {"workers": ()},
        {"workers": (-1,)},
        {"prefetch": ()},
        {"prefetch": (0,)},
    ],
)
def test_settings_out_of_range_are_refused(settings, tmp_path):
    names = "images|batch|batches|threads|rounds|workers|prefetch"
    with pytest.raises(RunError, match=rf"^({names}): expected"):
        LoaderSettings(**settings)
    with pytest.raises(RunError, match="expected 256 photographs"):
        measure_loader("compact", tmp_path, settings=LoaderSettings())
