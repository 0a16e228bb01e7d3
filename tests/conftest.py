"""What several test files need: a data set that is learnt in seconds, and a run cut short."""

import importlib
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from secure_cnn import Recipe, handcrafted
from secure_cnn.cli import main
from secure_cnn.interruption import StopRequest

TRAIN, TEST, CLASSES = 64, 24, 4
# The module: the package has a function of the same name.
RUN = importlib.import_module("secure_cnn.recipe.run")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A `.npz` file of 64 training and 24 test images: a bright quarter on a noisy ground."""
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("", TRAIN), ("test_", TEST)):
        labels = np.arange(count) % CLASSES
        images = random.integers(0, 120, (count, 8, 8), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 2)
            image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 100
        arrays |= {f"{part}images": images, f"{part}labels": labels}
    path = tmp_path_factory.mktemp("shapes") / "shapes.npz"
    np.savez(path, **arrays)
    return str(path)


class _After(StopRequest):
    """A stop request that is made by itself once the loop has looked at it so many times."""

    def __init__(self, steps):
        super().__init__()
        self._left = steps

    @property
    def requested(self):
        self._left -= 1
        return self._left <= 0

    @requested.setter
    def requested(self, value):
        pass


@pytest.fixture
def stopped_after(monkeypatch):
    """Makes a context whose runs are asked to stop after so many steps, as by a signal."""

    @contextmanager
    def stopping(steps):
        @contextmanager
        def stop_by_itself():
            yield _After(steps)

        with monkeypatch.context() as patch:
            patch.setattr(RUN, "stop_on_signals", stop_by_itself)
            yield

    return stopping


@pytest.fixture
def recipe(shapes, tmp_path):
    """Makes recipes of two epochs on the small data set, each in a folder of its own name."""

    def make(name="run", **changes):
        base = {"out": tmp_path / name, "data": shapes, "epochs": 2, "batch_size": 16}
        return Recipe(**(base | {"robust_samples": 4} | changes))

    return make


@pytest.fixture
def quick(monkeypatch):
    """Runs that neither draw a page nor time steps, for tests that are about neither."""
    monkeypatch.setattr("secure_cnn.recipe.folder.write_page", lambda *_: None)
    monkeypatch.setattr("secure_cnn.cli.train.step_costs", None)


@pytest.fixture
def cli(monkeypatch, capfd):
    """Runs the command as its console script does; exit code, standard output and error."""

    def call(*words, columns=120):
        monkeypatch.setattr(sys, "argv", ["secure-cnn", *map(str, words)])
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as left:
            main()
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        return left.value.code or 0, printed.out, printed.err

    return call


collect_ignore = ["fuzz/run.py"]  # a program of its own, which needs the fuzzer


@pytest.fixture
def few_noise_images(monkeypatch):
    """The model `handcrafted` is drawn from few images, which takes a moment and is as random."""
    monkeypatch.setattr(handcrafted, "_IMAGES", 32)
    handcrafted._drawn.cache_clear()
    yield
    handcrafted._drawn.cache_clear()
