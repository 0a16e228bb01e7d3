"""The state file: a killed evaluation goes on where it was, and no other evaluation may use it."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_defenses_evaluation import LINF, tensors
from test_defenses_scope import Net
from torch import nn

from defenses import EvaluationError, ThreatModel, attack, evaluate
from defenses.checks.checks import CheckSettings
from defenses.evaluation.journal import Journal, digest_of, digest_of_model

GENTLE = ThreatModel(norm="linf", eps=0.03)
FEW = CheckSettings(samples=12, steps=2, queries=5, draws=2, planted=2)


class Killed(BaseException):
    """What no library code catches."""


class Mortal(nn.Module):
    """A model that answers so many times, and is then killed."""

    def __init__(self, net, lives):
        super().__init__()
        self.net, self.lives = net, lives

    def forward(self, images):
        self.lives -= 1
        if self.lives < 0:
            raise Killed
        return self.net(images)


def subject(n=45):
    """A net with random weights, and images that it gets right."""
    torch.manual_seed(0)
    net, data = Net().eval(), tensors(n)
    with torch.no_grad():
        data.labels = net(data.images.float() / 255).argmax(1)
    data.labels[::9] = (data.labels[::9] + 1) % 4
    return net, data


def run(model, data, *, state=None, **changes):
    """A small evaluation with two attacks and the verdicts."""
    settings = {
        "attacks": [attack("fgsm", GENTLE), attack("pgd", GENTLE, steps=3)],
        "batch_size": 8,
        "verdicts": FEW,
        "progress": False,
    }
    return evaluate(model, data, GENTLE, state=state, **settings | changes)


def same_examples(one, other):
    """Whether two reports show the same images."""
    names = ("clean", "adversarial", "labels", "predictions")
    return all(torch.equal(getattr(one.examples, n), getattr(other.examples, n)) for n in names)


@pytest.mark.parametrize("exhaustive", [False, True])
def test_a_killed_evaluation_ends_as_an_uninterrupted_one(tmp_path, exhaustive):
    """Killed again and again, in every phase; each call gets further than the one before."""
    net, data = subject()
    whole = run(Mortal(net, 10**9), data, exhaustive=exhaustive)
    state, kills, seen = tmp_path / "state.json", 0, []
    report = None
    while report is None:
        try:
            report = run(Mortal(net, 10 + 4 * kills), data, state=state, exhaustive=exhaustive)
        except Killed:
            kills += 1
            seen.append(state.read_text() if state.exists() else "")
    assert kills >= 4
    assert len(set(seen)) >= 3  # killed in several phases
    assert report == whole
    assert same_examples(report, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_what_is_done_is_not_done_again(tmp_path):
    """A finished evaluation only asks for the clean predictions."""
    net, data = subject()
    first = run(Mortal(net, 10**9), data, state=tmp_path / "state")
    again = Mortal(net, 10**9)
    assert run(again, data, state=tmp_path / "state") == first
    assert 10**9 - again.lives == 6  # 45 images in batches of 8


def test_a_random_model_resumes_alike(tmp_path):
    """Every batch has random draws of its own, whatever ran before it."""

    class Random(nn.Module):
        def __init__(self, net, lives):
            super().__init__()
            self.inner = Mortal(net, lives)

        def forward(self, images):
            return self.inner(images + 0.05 * torch.randn_like(images))

    net, data = subject()
    whole = run(Random(net, 10**9), data, verdicts=False)
    with pytest.raises(Killed):
        run(Random(net, 20), data, verdicts=False, state=tmp_path / "state")
    resumed = run(Random(net, 10**9), data, verdicts=False, state=tmp_path / "state")
    assert resumed == whole


def moved(net):
    """The same net with one weight changed in the last place."""
    with torch.no_grad():
        net.head.bias[0] = torch.nextafter(net.head.bias[0], torch.tensor(9.0))
    return net


CHANGES = {
    "model": lambda net, data: run(moved(net), data, state="s"),
    "images": lambda net, data: run(
        net, SimpleNamespace(images=data.images.flip(3), labels=data.labels), state="s"
    ),
    "attacks": lambda net, data: run(net, data, state="s", attacks=["fgsm"]),
    "threat model": lambda net, data: evaluate(
        net, data, LINF, attacks=["fgsm"], state="s", progress=False
    ),
    "seed or settings": lambda net, data: run(net, data, state="s", seed=1),
}


@pytest.mark.parametrize("part", CHANGES)
def test_the_state_of_another_evaluation_is_refused(part, tmp_path, monkeypatch):
    """In one typed error that names what is different; the file stays as it was."""
    monkeypatch.chdir(tmp_path)
    net, data = subject()
    run(net, data, state="s")
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(EvaluationError, match=f"other .*{part}"):
        CHANGES[part](net, data)
    assert (tmp_path / "s").read_bytes() == before


def test_another_surrogate_is_another_evaluation(tmp_path):
    """By its weights too."""
    net, data = subject()
    told = [
        CheckSettings(samples=4, steps=1, queries=1, draws=1, planted=1, surrogate=each)
        for each in (Net(), Net())
    ]
    run(net, data, verdicts=told[0], state=tmp_path / "s")
    with pytest.raises(EvaluationError, match="settings"):
        run(net, data, verdicts=told[1], state=tmp_path / "s")


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"schema": 9}', "\x00"])
def test_a_file_that_is_no_state_is_refused(tmp_path, text):
    """And not overwritten."""
    path = tmp_path / "precious"
    path.write_text(text)
    with pytest.raises(EvaluationError, match="another path"):
        Journal(path, {})
    assert path.read_text() == text


def test_a_state_in_no_folder_is_refused_before_the_work(tmp_path):
    """Not after the first batch."""
    with pytest.raises(EvaluationError, match="folder that exists"):
        Journal(tmp_path / "nowhere" / "s", {})


def test_a_state_whose_predictions_do_not_fit_is_refused(tmp_path):
    """Code that is edited between two calls shows in what the model answers."""
    net, data = subject()
    state = tmp_path / "s"
    run(net, data, state=state)
    values = json.loads(state.read_text())
    predictions = values["content"]["trial"]["predictions"]
    predictions[3] = (predictions[3] + 1) % 4
    state.write_text(json.dumps(values))
    with pytest.raises(EvaluationError, match="sees other classes"):
        run(net, data, state=state)


def test_a_digest_covers_every_bit():
    """Of values, dtypes, shapes, names and classes; the order counts."""
    zeros = torch.zeros(4)
    digests = {
        digest_of(*parts)
        for parts in (
            (zeros,),
            (-zeros,),
            (zeros.view(2, 2),),
            (zeros.double(),),
            (zeros.bfloat16(),),
            (torch.zeros(0),),
            (torch.tensor(0.0),),
            (torch.zeros(4, dtype=torch.bool),),
            ("a", "bc"),
            ("ab", "c"),
            (),
        )
    }
    assert len(digests) == 11
    linear = nn.Linear(2, 2)
    layers = [nn.Sequential(linear), nn.Sequential(linear, nn.ReLU()), nn.Sequential(nn.ReLU())]
    assert len({digest_of_model(each) for each in (linear, *layers)}) == 4
    transposed = torch.arange(4.0).view(2, 2).t()
    assert digest_of(transposed) == digest_of(transposed.contiguous())
