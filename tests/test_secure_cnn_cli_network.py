"""A network from the command line: ours by name, or the user's own code; or refused."""

import json

import numpy as np
import pytest
import torch
from support.commands import overhead
from torch import nn

from secure_cnn.cli.network import network
from secure_cnn.data import DataSpec
from secure_cnn.errors import RunError

SPEC = DataSpec(shape=(1, 8, 8), classes=("a", "b"))
MINE = """
from torch import nn

class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 2))

def of(spec, *, wide=1):
    channels, height, width = spec.shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 2 * wide))

def narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
def colour(): return nn.Conv2d(3, 2, 1)
def number(): return 7
def broken(): raise KeyError("mine")
def dropping(): return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2))
constant = 3
"""


@pytest.fixture
def mine(tmp_path):
    """A file of the user's."""
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    return path


def test_a_name_is_one_of_ours():
    """And the error of another one says what else can be given."""
    assert network("compact", SPEC).name == "compact"
    with pytest.raises(RunError, match=r"compact, .*module:callable or file\.py:callable, got vgg"):
        network("vgg", SPEC)


@pytest.mark.parametrize("name", ["Small", "of"])
def test_a_file_makes_the_network(mine, name):
    """A class without an argument, a function that wants the data; named after their file."""
    made = network(f"{mine}:{name}", SPEC)
    assert made(torch.zeros(3, *SPEC.shape)).shape == (3, 2)
    assert made.name == f"mine:{name}"


def test_a_module_makes_the_network(mine, monkeypatch):
    """By its dotted name, from where Python finds modules."""
    monkeypatch.syspath_prepend(mine.parent)
    assert isinstance(network("mine:Small", SPEC), nn.Sequential)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{}:absent", "expected a function or a class of that name"),
        ("{}:constant", "expected a function or a class of that name"),
        ("{}:number", "expected it to make a torch module, got int"),
        ("{}:narrow", r"expected logits \[n, 2 or more\] of 1x8x8 images, got \[2, 1\]"),
        ("{}:colour", "expected a network for images of 1x8x8, got .*channels"),
        ("{}.py:of", "expected a module or a file that can be imported, got FileNotFoundError"),
        ("no.such.module:of", "expected a module or a file that can be imported, got ModuleNot"),
        (":of", "expected a module or a file that can be imported, got ValueError"),
    ],
)
def test_what_cannot_be_measured_is_refused(mine, given, words):
    """With what was expected and what came, before anything is timed."""
    with pytest.raises(RunError, match=words):
        network(given.format(mine), SPEC)


def test_a_mistake_in_the_users_code_stays_theirs(mine):
    """Its own error with its own traceback, not a word of ours about it."""
    with pytest.raises(KeyError, match="mine"):
        network(f"{mine}:broken", SPEC)


def test_looking_at_it_leaves_no_trace(mine):
    """The images that are tried go through a copy: no statistic has seen them, none is frozen."""
    made = network(f"{mine}:dropping", SPEC)
    assert made.training
    assert made[0].num_batches_tracked == 0


@pytest.mark.parametrize("text", ["torchvision.models:squeezenet1_1", "mine"])
def test_the_bench_measures_it(tmp_path, mine, text):
    """A network of torchvision on colour images, and one of the user's own, from the shell."""
    if text != "mine":
        pytest.importorskip("torchvision", reason="torchvision is no dependency")
    images = np.zeros((16, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(16) % 2
    np.savez(tmp_path / "it.npz", images=images, labels=labels)
    overhead(
        *("--model", f"{mine}:of" if text == "mine" else text, "--data"),
        *(str(tmp_path / "it.npz"), "--batch", "4", "--rounds", "1", "--save-every", "1"),
        *("--no-memory", "--no-average", "--no-sealed", "--json", str(tmp_path / "it.json")),
    )
    rows = json.loads((tmp_path / "it.json").read_text(encoding="utf-8"))["rows"]
    name = "mine:of" if text == "mine" else text
    assert rows[0]["case"].startswith(f"{name}, ")
    assert {"plain", "private", "n-fgsm"} <= {row["variant"] for row in rows}
    assert str(tmp_path) not in json.dumps([row["case"].partition(",")[0] for row in rows])
