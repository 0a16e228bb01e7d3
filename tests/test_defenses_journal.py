"""The state file: a killed evaluation goes on where it was, and no other evaluation may use it."""

import base64
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.evaluated import LINF
from support.journalled import run, subject
from support.networks import Net
from torch import nn

from defenses import EvaluationError, Smoothing, certify, evaluate
from defenses.checks.checks import CheckSettings
from defenses.measuring.journal import Journal, digest_of, digest_of_model, write_text


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
            report = run(
                Mortal(net, 10 * 3**kills // 2**kills), data, state=state, exhaustive=exhaustive
            )
        except Killed:
            kills += 1
            seen.append(state.read_text() if state.exists() else "")
    assert kills >= 4
    assert len(set(seen)) >= 3  # killed in several phases
    assert report == whole
    assert same_examples(report, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_what_is_done_is_not_done_again(tmp_path):
    """A finished evaluation only asks about the clean images."""
    net, data = subject()
    first = run(Mortal(net, 10**9), data, state=tmp_path / "state")
    again = Mortal(net, 10**9)
    assert run(again, data, state=tmp_path / "state") == first
    assert 10**9 - again.lives == 12  # 45 images in batches of 8, twice


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


def forge(content):
    """By name, what a forger may write into the content of a state."""
    trial = content["trial"]
    first, second = trial["outcomes"]["fgsm"], trial["outcomes"]["pgd"]
    wrong = next(i for i, value in enumerate(first) if value == -1)
    fallen = next(i for i, value in enumerate(first) if value == 0)
    position, shown = next(iter(trial["shown"].items()))
    shape, pixels, prediction = shown
    far = base64.b64encode(np.full(shape, 0.5, np.float32).tobytes()).decode()
    return {
        "a wrong image survived": lambda: first.__setitem__(wrong, 1),
        "a wrong image fell": lambda: first.__setitem__(wrong, 0),
        "a fallen image fell again": lambda: second.__setitem__(fallen, 0),
        "a first attack unfinished": lambda: first.__setitem__(fallen, -1),
        "an unknown outcome": lambda: first.__setitem__(fallen, 2),
        "an outcome that is no number": lambda: first.__setitem__(fallen, True),
        "a row too short": lambda: first.pop(),
        "a row too long": lambda: first.append(1),
        "another attack": lambda: trial["outcomes"].update({"square": list(second)}),
        "attacks in another order": lambda: trial.update(
            {"outcomes": {"pgd": second, "fgsm": first}}
        ),
        "an image out of range": lambda: trial["shown"].update({"45": shown}),
        "an image below range": lambda: trial["shown"].update({"-1": shown}),
        "an image of no number": lambda: trial["shown"].update({"x": shown}),
        "an image of another shape": lambda: trial["shown"].update(
            {position: [[1, 4, 16], pixels, prediction]}
        ),
        "an image of another size": lambda: trial["shown"].update(
            {position: [[1, 8, 9], pixels, prediction]}
        ),
        "an image outside": lambda: trial["shown"].update({position: [shape, far, prediction]}),
        "an image of no class": lambda: trial["shown"].update({position: [shape, pixels, 4]}),
        "pixels that are none": lambda: trial["shown"].update({position: [shape, "!", 0]}),
        "no trial": lambda: content.pop("trial"),
        "a trial that is none": lambda: content.update({"trial": [1]}),
        "no outcomes": lambda: trial.pop("outcomes"),
        "verdicts that are none": lambda: content.update({"verdicts": 3}),
        "too many verdicts": lambda: content["verdicts"].append(content["verdicts"][0]),
        "a verdict that is none of ours": lambda: content["verdicts"][3].update(name="sky is blue"),
        "a verdict without an outcome": lambda: content["verdicts"][3].pop("outcome"),
    }


def test_a_forged_state_is_refused(tmp_path):
    """More broken than possible, out of range, of other kinds: none is believed, all say so."""
    net, data = subject()
    state = tmp_path / "s"
    run(net, data, state=state)
    honest = state.read_text()
    for name in forge(json.loads(honest)["content"]):
        values = json.loads(honest)
        forge(values["content"])[name]()
        state.write_text(json.dumps(values))
        assert state.read_text().strip() != honest.strip(), name
        with pytest.raises(EvaluationError, match="another path"):
            run(net, data, state=state)
    state.write_text(honest)
    run(net, data, state=state)  # the control: nothing but the forgeries was refused


def resumed(state, values, net, data):
    """The report from a state of these values, and how often the model was asked for it."""
    state.write_text(json.dumps(values))
    asked = Mortal(net, 10**9)
    return run(asked, data, state=state), 10**9 - asked.lives


def test_verdicts_are_resumed_by_name(tmp_path):
    """A state from before a check was added, or with the checks in another order, goes on.

    Each verdict stays with its name, and only the missing one is run, wherever it stands.
    """
    net, data = subject()
    state = tmp_path / "s"
    whole = run(Mortal(net, 10**9), data, state=state)
    values = json.loads(state.read_text())
    _, least = resumed(state, values, net, data)
    verdicts = list(values["content"]["verdicts"])
    for missing in (1, 7, len(verdicts) - 1):
        kept = verdicts[:missing] + verdicts[missing + 1 :]
        values["content"]["verdicts"] = kept[::-1]
        again, asked = resumed(state, values, net, data)
        assert again == whole
        assert asked > least
        assert json.loads(state.read_text())["content"]["verdicts"] == verdicts
    values["content"]["verdicts"] = verdicts[5:] + verdicts[:5]
    assert resumed(state, values, net, data) == (whole, least)


def certified(net, data, *, state):
    """A small certification."""
    smoothing = Smoothing(sigma=0.25, selection=10, samples=100)
    return certify(net, data, smoothing, images=2, state=state, progress=False)


@pytest.mark.parametrize("work", [run, certified])
def test_the_state_of_another_version_of_ours_is_refused(work, tmp_path):
    """Other checks, attacks or noise may be behind the same names."""
    net, data = subject(n=18)
    state = tmp_path / "s"
    work(net, data, state=state)
    values = json.loads(state.read_text())
    ours = next(e for e in values["identity"]["versions"].split(", ") if "secure-cnn" in e)
    values["identity"]["versions"] = values["identity"]["versions"].replace(ours, "secure-cnn 0")
    state.write_text(json.dumps(values))
    with pytest.raises(EvaluationError, match="other versions"):
        work(net, data, state=state)
    del values["identity"]["versions"]
    state.write_text(json.dumps(values))
    with pytest.raises(EvaluationError, match="other versions"):
        work(net, data, state=state)


@pytest.mark.parametrize(
    "forgery",
    [
        {"hits": [101]},
        {"hits": [-1]},
        {"hits": [1.5]},
        {"hits": []},
        {"selected": [4]},
        {"selected": ["0"]},
        {"classes": 1},
        {"classes": None},
        {"selected": [0] * 9, "hits": [1] * 9},
        {"other": 1, "hits": None},
    ],
)
def test_a_forged_certification_is_refused(tmp_path, forgery):
    """More hits than samples, classes that are none, more images than there are."""
    net, data = subject(n=8)
    smoothing, state = Smoothing(sigma=0.25, selection=10, samples=100), tmp_path / "s"
    certify(net, data, smoothing, images=2, state=state, progress=False)
    values = json.loads(state.read_text())
    for name in ("selected", "hits"):
        values["content"][name] = values["content"][name][:1]
    values["content"] |= forgery
    state.write_text(json.dumps(values))
    with pytest.raises(EvaluationError, match="another path"):
        certify(net, data, smoothing, images=2, state=state, progress=False)


def test_a_state_that_is_no_regular_file_is_refused(tmp_path):
    """A pipe would be waited for, and a device has no end; neither is replaced."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises((EvaluationError, IsADirectoryError)):
            Journal(path, {})
    with pytest.raises(OSError, match="regular file"):
        write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()


def test_nesting_without_end_is_refused(tmp_path):
    """It is no state, and not what Python's recursion says of it."""
    path = tmp_path / "s"
    path.write_text("[" * 200_000)
    with pytest.raises(EvaluationError, match="another path"):
        Journal(path, {})


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
