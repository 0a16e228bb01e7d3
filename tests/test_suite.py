"""The suite itself: that what its tests draw follows from their names, and what they may not do."""

import ast
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from privacy.noise import SecureGenerator

TESTS = sorted(Path(__file__).parent.glob("*.py"))
LEAST_WAIT = 600
# What no seed moves, or what is seeded by the time of day where it is given nothing.
UNSEEDED = {"os.urandom", "random.SystemRandom", "secrets.token_bytes", "torch.seed"}
UNSEEDED_IF_EMPTY = {"np.random.default_rng", "np.random.Generator", "random.Random"}


def drawn():
    """A number from each source that a test may draw from."""
    return (
        *SecureGenerator().words(2).tolist(),
        torch.rand(()).item(),
        np.random.rand(),  # noqa: NPY002 - what old code draws from is meant
        random.random(),
    )


@pytest.fixture
def draw_from(request):
    """What starts all of them anew for a name."""
    plugins = request.config.pluginmanager.get_plugins()
    return next(each.draw_from for each in plugins if hasattr(each, "draw_from"))


def test_what_a_test_draws_follows_from_its_name(request, draw_from):
    """The same name, the same numbers; another name, others; and no two keys are alike."""
    mine = drawn()
    draw_from(request.node.nodeid)
    assert drawn() == mine
    assert drawn()[:2] != mine[:2]  # the next generator has another key
    draw_from("another test")
    assert all(one != other for one, other in zip(drawn(), mine, strict=True))


@pytest.mark.secret
def test_what_is_secret_follows_from_nothing(request, draw_from):
    """The keys of the operating system: equal with a probability of 2^-128."""
    mine = SecureGenerator().words(2).tolist()
    draw_from(request.node.nodeid)
    assert SecureGenerator().words(2).tolist() != mine


def calls(source):
    """Every call in a source: its line, the dotted name that is called, and its arguments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def left_to_chance(source):
    """Lines that draw what no name decides."""
    for line, name, call in calls(source):
        bare = name in UNSEEDED_IF_EMPTY and not (call.args or call.keywords)
        if name in UNSEEDED or bare:
            yield f"{line}: {name}"


def short_waits(source):
    """Lines that give another process less time than a loaded machine may take."""
    for line, name, call in calls(source):
        for keyword in call.keywords:
            if keyword.arg == "timeout" and isinstance(keyword.value, ast.Constant):
                value = keyword.value.value
                if isinstance(value, int | float) and value < LEAST_WAIT:
                    yield f"{line}: {name}(timeout={value})"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_test_is_left_to_chance_or_in_a_hurry(path):
    """A failure that comes once in a hundred runs, or on a slow machine, is found by nobody."""
    source = path.read_text(encoding="utf-8")
    assert list(left_to_chance(source)) == []
    assert list(short_waits(source)) == []


def test_chance_and_hurry_are_caught():
    """Control: what the rules are there for."""
    assert list(left_to_chance("key = os.urandom(4)\nnp.random.default_rng(0)")) == [
        "1: os.urandom"
    ]
    assert list(left_to_chance("np.random.default_rng()")) == ["1: np.random.default_rng"]
    assert list(short_waits("run(timeout=60)\nrun(timeout=600)")) == ["1: run(timeout=60)"]
