"""A suite that draws nothing by chance: every test draws the same numbers in every run.

The keys of `SecureGenerator`, the seeds of attacks that were given none, and the generators of
torch, numpy and Python follow from the name of the test, whatever ran before it. A test about
secrecy itself is marked `secret` and gets what the operating system gives. `CHANCE=7 pytest` draws
others: so one sees how close to its bound a test comes.
"""

import hashlib
import os
import random
from itertools import count

# Before torch is imported: tests beside each other, and what they start, take one core each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch

from defenses import scope
from privacy import noise

CHANCE = os.environ.get("CHANCE", "")
# A slow machine is no failure; and what only some runs find belongs into a test of its own.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=not CHANCE)
hypothesis.settings.load_profile("suite")


class KnownKeys:
    """Stands for `os` where keys and seeds are made: those that it gives follow from a name.

    Example:
        >>> known = KnownKeys()
        >>> first = known.urandom(4)
        >>> known.urandom(4) == first
        False
        >>> known.start("")
        >>> known.urandom(4) == first
        True
    """

    getpid = staticmethod(os.getpid)

    def __init__(self) -> None:
        self.start("")

    def start(self, name: str) -> None:
        """From here on the keys follow from `name` alone."""
        self._name, self._turns = name, count()

    def urandom(self, size: int) -> bytes:
        """Another key at each call."""
        text = f"{CHANCE}|{self._name}|{next(self._turns)}"
        return hashlib.shake_256(text.encode()).digest(size)


KNOWN = KnownKeys()
DRAWING = (noise, scope)
"""Who asks the operating system for what a result depends on; nothing depends on a file's keys."""


def draw_from(name: str) -> None:
    """From here on everything that is drawn follows from `name`."""
    KNOWN.start(name)
    seed = int.from_bytes(hashlib.sha256(f"{CHANCE}|{name}".encode()).digest()[:4], "big")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what is seeded is what old code draws from
    torch.manual_seed(seed)


def pytest_configure(config: pytest.Config) -> None:
    """pytest-randomly shuffles the tests; what they draw must not follow the time of day."""
    if hasattr(config.option, "randomly_reset_seed"):
        config.option.randomly_reset_seed = False
    for module in DRAWING:
        module.os = KNOWN


def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> None:
    """What many tests share is drawn alike, whichever of them asks for it first."""
    if fixturedef.scope != "function":
        draw_from(f"{request.node.nodeid}::{fixturedef.argname}")


@pytest.fixture(autouse=True)
def _drawn_from_its_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test draws from its own name, and one about secrecy from the operating system."""
    draw_from(request.node.nodeid)
    if request.node.get_closest_marker("secret"):
        for module in DRAWING:
            monkeypatch.setattr(module, "os", os)


@pytest.fixture(autouse=True)
def _examples_write_elsewhere(request: pytest.FixtureRequest) -> None:
    """An example in a docstring may write files, so it runs in a folder of its own."""
    if isinstance(request.node, pytest.DoctestItem):
        folder = request.getfixturevalue("tmp_path")
        request.getfixturevalue("monkeypatch").chdir(folder)
