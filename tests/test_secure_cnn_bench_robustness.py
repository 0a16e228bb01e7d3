"""The bench of the robustness evaluation: a clock and judges of our own, then the real ones."""

import json
import sys

import pytest
import torch

from defenses import ThreatModel, wilson_interval
from secure_cnn.bench.robustness import autoattack, judges, measure_robustness, pyautoattack
from secure_cnn.bench.step import Workload, synthetic
from secure_cnn.bench.timing import document
from secure_cnn.checkpoint import write_model
from secure_cnn.cli import main
from secure_cnn.data import DataSpec, load_data
from secure_cnn.errors import RunError
from secure_cnn.models import Architecture, build_model
from secure_cnn.record import Measurements, version, versions

SPEC = DataSpec(shape=(1, 8, 8), classes=("a", "b"))
LINF = ThreatModel(norm="linf", eps=0.02)


def workload(samples):
    """A small one."""
    model = build_model("compact", SPEC)
    return Workload(case="compact", model=model, split=synthetic(SPEC, samples))


class Clock:
    """Moved by the judges alone."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def judge(self, name, seconds, verdict):
        def call(model, images, labels):
            assert not model.training
            self.log.append((name, len(labels)))
            self.now += seconds
            return verdict(labels)

        return call


def test_every_batch_is_judged_by_all_in_turn_and_compared_with_the_first():
    """Times, their ratio (ours to the rival's), shares with their intervals."""
    clock, load = Clock(), workload(10)
    variants = {
        "ours": clock.judge("ours", 1.0, lambda labels: labels == 0),
        "rival": clock.judge("rival", 4.0, lambda labels: labels >= 0),
    }
    rows = measure_robustness(load, variants, batch_size=4, clock=lambda: clock.now)
    assert clock.log == [
        *[("ours", 4), ("rival", 4)],
        *[("rival", 4), ("ours", 4)],
        *[("ours", 2), ("rival", 2)],
    ]
    zeros = int((load.split.labels == 0).sum())
    found = {(row.variant, row.metric): row for row in rows}
    assert {key: row.median for key, row in found.items()} == {
        ("ours", "time"): 1.0,
        ("ours", "robust_accuracy"): zeros / 10,
        ("rival", "time"): 4.0,
        ("rival", "robust_accuracy"): 1.0,
        ("rival", "time_ratio"): 0.25,
        ("rival", "agreement"): zeros / 10,
    }
    share = found["ours", "robust_accuracy"]
    assert (share.low, share.high) == wilson_interval(zeros, 10)
    assert share.n == 10
    assert found["rival", "time_ratio"].n == 3
    assert Measurements.from_dict(document(rows).to_dict()).rows == tuple(rows)


def test_the_model_of_the_workload_is_left_alone():
    """It is copied: its layout and its modes stay."""
    load = workload(4)
    load.model.train()
    before = [parameter.stride() for parameter in load.model.parameters()]
    measure_robustness(load, {"none": lambda model, images, labels: labels > 9})
    assert load.model.training
    assert [parameter.stride() for parameter in load.model.parameters()] == before


def test_the_reference_is_left_out_where_it_is_not_installed(monkeypatch):
    """And says so when it is asked all the same."""
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setattr("secure_cnn.bench.robustness.find_spec", lambda _: None)
    assert list(judges(LINF)) == ["autoattack"]
    with pytest.raises(RunError, match="not installed"):
        pyautoattack(
            torch.nn.Flatten(),
            torch.rand(1, 1, 1, 2),
            torch.tensor([0]),
            threat=LINF,
            seed=0,
            memory_format=torch.contiguous_format,
        )


def test_ours_says_who_withstands():
    """On a model whose margin is known: two pixels, two logits, eps on each."""
    images = torch.tensor([[0.5, 0.47], [0.5, 0.45], [0.4, 0.5]]).view(3, 1, 1, 2)
    labels = torch.zeros(3, dtype=torch.int64)
    standing = autoattack(torch.nn.Flatten(), images, labels, threat=LINF, seed=0)
    assert standing.tolist() == [False, True, False]


@pytest.mark.slow
def test_the_reference_agrees():
    """On a small network, where it is installed."""
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    spec = DataSpec(shape=(1, 8, 8), classes=tuple("0123456789"))  # it takes no fewer
    load = Workload(case="c", model=build_model("compact", spec), split=synthetic(spec, 8))
    rows = measure_robustness(load, judges(ThreatModel(norm="linf", eps=0.01)))
    assert {row.median for row in rows if row.metric == "agreement"} == {1.0}


def test_the_command_times_a_checkpoint(tmp_path, monkeypatch, capsys):
    """Rows on the console and as JSON."""
    spec = load_data("digits").spec
    path, out = tmp_path / "model.safetensors", tmp_path / "rows.json"
    architecture = Architecture(
        model="compact", channels=1, height=8, width=8, classes=tuple(spec.classes)
    )
    write_model(path, architecture.build(), architecture, claims={}, sealing=None)
    words = ["bench", "robustness", str(path), "--data", "digits", "--eps", "0.1"]
    monkeypatch.setattr(sys, "argv", ["secure-cnn", *words, "--samples", "3", "--json", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "robust_accuracy" in capsys.readouterr().out
    document = json.loads(out.read_text())
    measured = {row["variant"] for row in document["rows"]}
    assert measured >= {"autoattack"}
    rivals = {variant.removesuffix("-channels-last") for variant in measured - {"autoattack"}}
    assert document["versions"].keys() - versions().keys() == rivals


def test_the_version_of_the_reference_is_written(tmp_path, monkeypatch):
    """As it is installed, where it was measured."""
    spec, ours = load_data("digits").spec, lambda model, images, labels: labels >= 0
    path, out = tmp_path / "model.safetensors", tmp_path / "rows.json"
    architecture = Architecture(
        model="compact", channels=1, height=8, width=8, classes=tuple(spec.classes)
    )
    write_model(path, architecture.build(), architecture, claims={}, sealing=None)
    three = {"autoattack": ours, "pyautoattack": ours, "pyautoattack-channels-last": ours}
    monkeypatch.setattr("secure_cnn.cli.bench.judges", lambda _: three)
    words = ["bench", "robustness", str(path), "--data", "digits", "--eps", "0.1"]
    monkeypatch.setattr(sys, "argv", ["secure-cnn", *words, "--samples", "3", "--json", str(out)])
    with pytest.raises(SystemExit):
        main()
    told = json.loads(out.read_text())["versions"]
    assert told == versions() | {"pyautoattack": version("pyautoattack")}
