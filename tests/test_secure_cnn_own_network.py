"""A network of one's own from the first step to its evaluation, and no code that a file names."""

import hashlib
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import privacy
from secure_cnn import Architecture, ModelError, OwnNetwork, RunError, read_model, run
from secure_cnn.cli.network import own_network
from secure_cnn.engine import WeightAverage
from secure_cnn.recipe import Variant
from secure_cnn.record import RunRecord

MINE = """
from torch import nn

def net(spec, *, wide=4):
    channels = spec.shape[0]
    return nn.Sequential(nn.Conv2d(channels, wide, 3), nn.BatchNorm2d(wide), nn.ReLU(),
                         nn.BatchNorm2d(wide), nn.Flatten(),
                         nn.Linear(36 * wide, len(spec.classes)))
"""
NAME = "mine.py:net"
PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "batch_size": 16}


def net(spec, *, wide=4):
    """The same network without a layer that mixes examples."""
    return nn.Sequential(
        nn.Conv2d(spec.shape[0], wide, 3),
        nn.GroupNorm(2, wide),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36 * wide, len(spec.classes)),
    )


@pytest.fixture
def recipe(recipe):
    """Makes recipes of the network."""
    return partial(recipe, model=NAME)


@pytest.fixture
def own():
    """The network as Python brings it."""
    return OwnNetwork(name=NAME, make=net)


@pytest.fixture
def mine(tmp_path):
    """A file of the user's."""
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    return path


@pytest.mark.parametrize("settings", [{}, PRIVATE, {"eps": 0.05}], ids=["plain", "private", "adv"])
def test_it_is_trained_and_read_back(recipe, quick, own, settings):
    """By `run` and `read_model`, with the same function; its name and size are on record."""
    done = run(recipe(**settings, baseline=False), network=own)
    assert done.record.model.name == NAME
    assert done.record.model.parameters == sum(p.numel() for p in done.model.parameters())
    loaded = read_model(done.folder.model, unlocking=None, network=own)
    assert loaded.architecture.model == NAME
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(loaded.model(images), done.model(images))


def test_the_weights_follow_from_the_seed(recipe, quick, own):
    """Two runs of one seed are one run, whatever the global generator was at."""
    first = run(recipe("a"), network=own)
    torch.rand(7)
    again = run(recipe("b"), network=own)
    a, b = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (None, "is not one of ours, and no code is run because a file names it"),
        (OwnNetwork(name="mine.py:other", make=net), "expected --model mine.py:net, got"),
        (OwnNetwork(name=NAME, make=net, options={"wide": 8}), "--model-option wide=8"),
    ],
    ids=["none", "name", "options"],
)
def test_another_network_is_refused_wherever_it_is_asked_for(
    recipe, quick, own, tmp_path, other, words
):
    """To start, to go on and to read; nothing is touched."""
    with pytest.raises(ModelError, match=words):
        run(recipe("none"), network=other)
    assert not (tmp_path / "none").exists()
    done = run(recipe(), network=own)
    with pytest.raises(ModelError, match=words):
        read_model(done.folder.model, unlocking=None, network=other)


def test_a_network_of_the_same_name_and_another_shape_is_refused(recipe, quick, own):
    """The weights of the file do not fit it."""
    done = run(recipe(), network=own)
    changed = OwnNetwork(name=NAME, make=lambda spec: net(spec, wide=8))
    with pytest.raises(ModelError, match="checkpoint of another model"):
        read_model(done.folder.model, unlocking=None, network=changed)


def test_a_network_beside_one_of_ours_is_refused(recipe, own):
    """It would be ignored, which is worse than an error."""
    with pytest.raises(ModelError, match="is compact, one of ours; leave mine"):
        run(recipe(model="compact"), network=own)


def test_options_of_the_file_are_never_given_to_the_function():
    """They are compared as text: the function gets those that the person said."""
    called = []

    def spy(spec, **options):
        called.append(options)
        return net(spec)

    theirs = Architecture(
        model=NAME, channels=1, height=8, width=8, classes=("a", "b"), options={"wide": 1}
    )
    with pytest.raises(ModelError, match="--model-option wide=1"):
        theirs.build(network=OwnNetwork(name=NAME, make=spy))
    assert called == []


@pytest.mark.parametrize(
    "values",
    [
        {"options": {"wide": 1}},
        {"model": NAME, "options": [1]},
        {"model": NAME, "options": {"a b": 1}},
        {"model": ":net"},
        {"model": "mine.py:"},
        {"model": "x" * 300 + ":net"},
        {"model": "mi\nne:net"},
    ],
    ids=str,
)
def test_an_architecture_from_a_stranger_is_checked(values):
    """What it says of a foreign network is text of one line, and plain values."""
    good = {"model": "compact", "channels": 1, "height": 8, "width": 8, "classes": ["a", "b"]}
    with pytest.raises(ModelError):
        Architecture.from_dict({**good, **values})


def test_architectures_come_back_from_json():
    """With their options; those of ours are written as they always were."""
    theirs = Architecture(
        model=NAME, channels=1, height=4, width=4, classes=("a", "b"), options={"wide": [1, "x"]}
    )
    assert Architecture.from_dict(json.loads(json.dumps(theirs.to_dict()))) == theirs
    ours = Architecture(model="compact", channels=1, height=8, width=8, classes=("a", "b"))
    assert set(ours.to_dict()) == {"model", "channels", "height", "width", "classes"}


def test_a_resumed_run_is_the_uninterrupted_one(recipe, quick, own, stopped_after):
    """With the network brought again; without it nothing goes on."""
    whole = run(recipe("whole"), network=own)
    with stopped_after(3):
        assert run(recipe(), network=own).record.status == "interrupted"
    with pytest.raises(ModelError, match="is not one of ours"):
        run(recipe(), resume=True)
    done = run(recipe(), network=own, resume=True)
    a, b = whole.model.state_dict(), done.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_command_line_trains_resumes_and_evaluates_it(
    cli, quick, mine, shapes, tmp_path, stopped_after
):
    """Every refusal says the words that were missing."""
    out = tmp_path / "run"
    words = ["--model", f"{mine}:net", "--model-option", "wide=8"]
    common = ["--data", shapes, "--epochs", 2, "--batch-size", 16]
    with stopped_after(3):
        code, _, err = cli("train", *words, *common, "--out", out)
    assert code == 130
    assert "--resume --model mine.py:net --model-option wide=8" in " ".join(err.split())
    code, _, err = cli("train", "--resume", "--out", out)
    assert code == 3
    assert "--model mine.py:net --model-option wide=8" in " ".join(err.split())
    code, _, err = cli("train", "--resume", "--out", out, *words[:2])
    assert code == 3
    assert cli("train", "--resume", "--out", out, *words)[0] == 0
    assert RunRecord.read(out / "run.json").settings["model_options"] == {"wide": 8}
    model = out / "checkpoints" / "model.safetensors"
    code, _, err = cli("evaluate", model, "--data", shapes)
    assert code == 3
    assert "--model mine.py:net --model-option wide=8" in " ".join(err.split())
    for place in (model, out):
        code, printed, _ = cli("evaluate", place, "--data", shapes, *words)
        assert code == 0
        assert "accuracy" in printed


def test_a_file_that_changed_is_noticed(cli, quick, mine, shapes, tmp_path, stopped_after):
    """A run does not go on with other code; an evaluation says so, for the weights still fit."""
    out, words = tmp_path / "run", ["--model", f"{mine}:net"]
    with stopped_after(3):
        cli("train", *words, "--data", shapes, "--epochs", 2, "--batch-size", 16, "--out", out)
    mine.write_text(MINE.replace("nn.ReLU", "nn.Tanh"), encoding="utf-8")
    code, _, err = cli("train", "--resume", "--out", out, *words, columns=400)
    assert code == 3
    assert "the network mine.py:net changed since the run began: the file that makes it\n" in err
    assert "hint: put the code back as it was, or start anew in another folder" in err
    mine.write_text(MINE, encoding="utf-8")
    assert cli("train", "--resume", "--out", out, *words)[0] == 0
    evaluate = ["evaluate", out, *words]
    assert "note" not in cli(*evaluate)[2]
    mine.write_text(MINE.replace("nn.ReLU", "nn.Tanh"), encoding="utf-8")
    code, _, err = cli(*evaluate, columns=400)
    assert code == 0
    assert "the file that makes mine.py:net is not the one of the training" in err


def test_tensors_of_other_shapes_are_noticed_before_a_run_goes_on(
    recipe, quick, own, stopped_after
):
    """In the same file: what it imports may have changed. Earlier records do not say, and go on."""
    with stopped_after(3):
        part = run(recipe(), network=own)
    other = OwnNetwork(name=NAME, make=lambda spec: net(spec, wide=8))
    with pytest.raises(RunError, match="began: names or shapes of its tensors; put the code back"):
        run(recipe(), network=other, resume=True)
    text = json.loads(part.folder.record.read_text())
    for name in ("source", "structure"):
        assert re.fullmatch("[0-9a-f]{64}", text["model"].pop(name))
    part.folder.record.write_text(json.dumps(text))
    assert run(recipe(), network=own, resume=True).record.status == "complete"


class Plain(nn.Linear):
    """Has no method of its own, and so names no file."""


def test_the_source_is_the_file_of_the_function(mine, tmp_path):
    """Through what is wrapped around it; of a class too; none for what has no file."""
    digest = hashlib.sha256(mine.read_bytes()).hexdigest()
    assert own_network(f"{mine}:net").source == digest
    assert own_network(f"{mine}:net+group-norm").source == digest
    classes = tmp_path / "classes.py"
    classes.write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self): pass\n"
    )
    digest = hashlib.sha256(classes.read_bytes()).hexdigest()
    assert own_network(f"{classes}:Net").source == digest
    typed = {}
    exec("def net(): pass", typed)
    for make in (typed["net"], Plain, dict):
        assert OwnNetwork(name="a:b", make=make).source == ""
    builder = own_network("torchvision:resnet18")
    resnet = pytest.importorskip("torchvision.models.resnet")
    assert builder.source == hashlib.sha256(Path(resnet.__file__).read_bytes()).hexdigest()


def test_layers_that_mix_examples_end_a_private_run_before_it_begins(
    cli, quick, mine, shapes, tmp_path
):
    """With the cure for who types, and with the cure it runs."""
    private = ["--data", shapes, "--epochs", 2, "--epsilon", 8, "--delta", 0.001]
    private += ["--batch-size", 16]
    out = tmp_path / "run"
    code, _, err = cli("train", "--model", f"{mine}:net", *private, "--out", out)
    assert code == 4
    assert "1: BatchNorm2d mixes examples, and 1 more" in " ".join(err.split())
    assert "+group-norm behind --model" in " ".join(err.split())
    assert len(err) < 400
    assert not out.exists()
    fixed = ["--model", f"{mine}:net+group-norm"]
    assert cli("train", *fixed, *private, "--no-baseline", "--out", out)[0] == 0
    assert RunRecord.read(out / "run.json").settings["model"] == f"{NAME}+group-norm"


@pytest.mark.slow
def test_the_audit_of_a_run_asks_for_its_network(cli, quick, mine, shapes, tmp_path):
    """And audits it as it was trained."""
    out, fixed = tmp_path / "run", ["--model", f"{mine}:net+group-norm"]
    private = ["--data", shapes, "--epochs", 2, "--epsilon", 8, "--delta", 0.001]
    private += ["--batch-size", 16, "--no-baseline"]
    assert cli("train", *fixed, *private, "--out", out)[0] == 0
    audit = ["audit", "--run", out, "--out", tmp_path / "audit", "--canaries", 4, "--steps", 12]
    code, _, err = cli(*audit)
    assert code == 3
    assert "is not one of ours" in err
    assert cli(*audit, *fixed)[0] == 0


def test_a_module_that_is_named_in_a_record_is_not_imported(recipe, quick, own, monkeypatch, cli):
    """Whoever edits a record or a checkpoint has no code run."""
    done = run(recipe(), network=own)
    monkeypatch.setitem(sys.modules, "this", None)  # importing it would fail in another way
    text = done.folder.record.read_text().replace(NAME, "this:s").replace("complete", "interrupted")
    done.folder.record.write_text(text)
    code, _, err = cli("train", "--resume", "--out", done.folder.root)
    assert code == 3
    assert "no code is run because a file names it" in " ".join(err.split())


def test_statistics_are_averaged_with_the_weights(own):
    """A copy that averages everything by hand is the oracle; what is frozen is left alone."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model[2].requires_grad_(False)
    frozen = model[2].weight.clone()
    average = WeightAverage(model, decay=0.9)
    expected = {name: v.clone() for name, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(20):
        model(torch.randn(8, 3, dtype=torch.double)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
    with average.applied(model):
        found = {name: v.clone() for name, v in model.state_dict().items()}
    for name in ("0.weight", "1.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(found[name], expected[name])
    assert torch.equal(found["2.weight"], frozen)
    assert "2.weight" not in average.state_dict()["averages"]
    assert found["1.num_batches_tracked"] == 20


def test_a_private_refusal_keeps_its_class(recipe, own, tmp_path):
    """So that who catches it in Python still does."""
    mixing = OwnNetwork(
        name=NAME, make=lambda spec: nn.Sequential(nn.BatchNorm2d(1), net(spec, wide=4))
    )
    with pytest.raises(privacy.UnsupportedLayer, match="group-norm"):
        run(recipe(**PRIVATE), network=mixing)
    assert Variant(private=True, method=None).name == "private"
