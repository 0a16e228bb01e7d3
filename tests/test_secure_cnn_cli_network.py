"""A network from the command line: ours by name, or the user's own code; or refused."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from support.commands import overhead
from torch import nn

from secure_cnn.cli.network import network, own_network
from secure_cnn.data import DataSpec
from secure_cnn.errors import ModelError

SPEC = DataSpec(shape=(1, 8, 8), classes=("a", "b"))
MINE = """
from torch import nn

class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 2))

def of(spec, *, wide=1):
    channels, height, width = spec.shape
    hidden = nn.Linear(channels * height * width, 4 * wide)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(4 * wide, len(spec.classes)))

def narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
def colour(): return nn.Conv2d(3, 2, 1)
def number(): return 7
def wide(num_classes, *, width=3, act="relu"):
    layers = {"relu": nn.ReLU, "tanh": nn.Tanh}
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), layers[act](),
                         nn.Linear(width, num_classes))

def norms(spec):
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2))

def lazy(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
def bare(): return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(2))
def needs_two(spec, depth): return Small()
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
    with pytest.raises(
        ModelError, match=r"compact, .*module:callable or file\.py:callable, got vgg"
    ):
        network("vgg", SPEC)


@pytest.mark.parametrize("name", ["Small", "of"])
def test_a_file_makes_the_network(mine, name):
    """A class without an argument, a function that wants the data; named after their file."""
    made = network(f"{mine}:{name}", SPEC)
    assert made(torch.zeros(3, *SPEC.shape)).shape == (3, 2)
    assert made.name == f"mine.py:{name}"


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
        ("{}:narrow", r"expected logits \[n, 2\], one for each class, of 1x8x8 .*got \[2, 1\]"),
        ("{}:lazy", "parameters are there, got lazy ones: 1.weight"),
        ("{}:bare", "expected a network with parameters to train, got none"),
        ("{}:colour", "expected a network for images of 1x8x8, got .*channels"),
        (
            "{}.py:of",
            "expected a file with the function that makes the network, found no such file",
        ),
        ("no.such.module:of", "expected a module or a file that can be imported, got ModuleNot"),
        (":of", "expected a module or a file that can be imported, got ValueError"),
    ],
)
def test_what_cannot_be_measured_is_refused(mine, given, words):
    """With what was expected and what came, before anything is timed."""
    with pytest.raises(ModelError, match=words):
        network(given.format(mine), SPEC)


def test_a_name_that_is_nearly_one_is_answered_with_it(mine):
    """A function that is not there, and a file that is not."""
    with pytest.raises(ModelError, match=r"found none; it has .*Small"):
        own_network(f"{mine}:small")
    with pytest.raises(ModelError, match=r"no such file; give its path from here"):
        own_network("elsewhere/nets.py:small")


def test_a_mistake_in_the_users_code_stays_theirs(mine):
    """Its own error with its own traceback, not a word of ours about it."""
    with pytest.raises(KeyError, match="mine"):
        network(f"{mine}:broken", SPEC)


def test_looking_at_it_leaves_no_trace(mine):
    """The images that are tried go through a copy: no statistic has seen them, none is frozen."""
    made = network(f"{mine}:dropping", SPEC)
    assert made.training
    assert made[0].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("options", "width", "kind"),
    [([], 3, nn.ReLU), (["width=5"], 5, nn.ReLU), (["act=tanh", "width=2"], 2, nn.Tanh)],
)
def test_options_reach_the_function_that_makes_it(mine, options, width, kind):
    """Numbers as JSON has them, all else as text; the number of classes where it has its name."""
    made = network(f"{mine}:wide", SPEC, options)
    assert (made[1].out_features, type(made[2]), made[3].out_features) == (width, kind, 2)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("{}:wide", ["widht=5"], "expected options that it takes.*got .*widht.*unexpected"),
        ("{}:needs_two", [], "expected options .*: missing a required argument: 'depth'"),
        ("{}:wide", ["width"], "--model-option: expected NAME=VALUE, got width"),
        ("{}:wide", ["2=3"], "--model-option: expected NAME=VALUE, got 2=3"),
        ("compact", ["width=5"], "--model-option: compact takes none, got width=5"),
    ],
)
def test_an_option_that_nothing_takes_is_refused(mine, text, options, words):
    """By its name; a mistake within the function stays the function's."""
    with pytest.raises(ModelError, match=words):
        network(text.format(mine), SPEC, options)


def test_the_seed_alone_decides_its_weights(mine):
    """Whatever was drawn before; and what is drawn afterwards is as if nothing had been made."""
    own = own_network(f"{mine}:wide")
    before = torch.get_rng_state()
    one = own.build(SPEC, generator_seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = own.build(SPEC, generator_seed=7), own.build(SPEC, generator_seed=8)
    assert torch.equal(one[1].weight, again[1].weight)
    assert not torch.equal(one[1].weight, other[1].weight)


def test_layers_that_mix_examples_are_replaced_when_that_is_said(mine):
    """The name keeps it, so that whoever opens the checkpoint says it too."""
    own = own_network(f"{mine}:norms+group-norm")
    assert own.name == "mine.py:norms+group-norm"
    assert isinstance(own.build(SPEC)[1], nn.GroupNorm)
    assert isinstance(own_network(f"{mine}:norms").build(SPEC)[1], nn.BatchNorm2d)


def test_networks_of_torchvision_have_as_many_classes_as_the_data(monkeypatch):
    """Its builders take the number by name, and do not say so."""
    module = ModuleType("torchvision.models")
    module.net = lambda **options: nn.Sequential(
        nn.Flatten(), nn.Linear(64, options["num_classes"])
    )
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", module)
    made = network("torchvision:net", SPEC)
    assert made.name == "torchvision.models:net"
    assert made[1].out_features == 2


def test_torchvision_that_is_not_there_is_said(monkeypatch):
    """As any module that cannot be imported."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ModelError, match=r"torchvision\.models: expected a module.*ModuleNotFound"):
        network("torchvision:resnet18", SPEC)


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
    name = "mine.py:of" if text == "mine" else text
    assert rows[0]["case"].startswith(f"{name}, ")
    assert {"plain", "private", "n-fgsm"} <= {row["variant"] for row in rows}
    assert str(tmp_path) not in json.dumps([row["case"].partition(",")[0] for row in rows])
