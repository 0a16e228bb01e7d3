"""A report that can be run again: all that it rests on is in it, and gives the same figures."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.evaluated import tensors
from support.journalled import GENTLE, run, subject
from torch import nn

from defenses import (
    CertificationReport,
    CheckSettings,
    EvaluationError,
    RobustnessReport,
    Smoothing,
    ThreatModel,
    attack,
    attack_names,
    certify,
    compare,
    evaluate,
    rerun,
)
from defenses.measuring.journal import digest_of_model
from defenses.measuring.verdict import Verdict

LINF = ThreatModel(norm="linf", eps=0.1)
NET, DATA = subject(n=20)
FEW = CheckSettings(samples=4, steps=1, queries=1, draws=1, planted=1)


def test_a_report_from_json_runs_again_to_the_same_figures():
    """Verdicts and images too: with the model and the data it needs nothing else."""
    net, data = subject(n=30)
    data.name = "shapes"
    report = run(net, data, samples=20, seed=3, batch_size=7, exhaustive=True, verdicts=FEW)
    values = json.loads(json.dumps(report.to_dict()))
    assert {"model", "data", "batch_size", "exhaustive", "checks", "images"} <= values.keys()
    assert values["data"] == "shapes"
    assert values["batch_size"] == 7
    assert values["checks"]["steps"] == 1
    assert {"secure-cnn", "torch"} <= values["versions"].keys()
    again = rerun(RobustnessReport.from_dict(values), net, data, progress=False)
    assert again == report
    assert again.to_dict()["summary"] == values["summary"]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_settings_in_a_report_make_the_same_attack(norm):
    """Every attack comes back from the plain values that it is written down as."""
    threat = ThreatModel(norm=norm, eps=2 if norm == "l0" else 0.3)
    for name in attack_names(norm):
        made = attack(name, threat)
        kept = json.loads(json.dumps(made.settings))
        assert repr(attack(name, threat, **kept)) == repr(made)


@pytest.mark.parametrize("kind", ["robustness", "certification"])
def test_a_saved_report_comes_back_from_its_path(kind, tmp_path):
    """And what is none is refused in our errors: pipes, folders, other JSON, nothing."""
    if kind == "robustness":
        report, cls = evaluate(NET, DATA, LINF, attacks=["fgsm"], progress=False), RobustnessReport
    else:
        smoothing = Smoothing(sigma=0.25, samples=100)
        report, cls = certify(NET, DATA, smoothing, progress=False), CertificationReport
    path = tmp_path / "r.json"
    report.save(path)
    assert cls.load(path) == cls.load(str(path)) == report
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "list").write_text("[1]")
    (tmp_path / "text").write_bytes(b"\xff")
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "list", "text", "deep", "folder", "nothing"):
        with pytest.raises(EvaluationError, match=f"{tmp_path / name}: "):
            cls.load(tmp_path / name)
    with pytest.raises(EvaluationError, match="path: expected the file"):
        cls.load(None)


def test_a_report_on_disk_of_no_threat_model_says_what_is_wrong_with_it(tmp_path):
    """In the reader's error, with the file and the field."""
    report = evaluate(NET, DATA, LINF, attacks=["fgsm"], progress=False)
    values = report.to_dict()
    values["threat"]["norm"] = "l3"
    (tmp_path / "r.json").write_text(json.dumps(values))
    with pytest.raises(EvaluationError, match=f"{tmp_path / 'r.json'}: norm: expected"):
        RobustnessReport.load(tmp_path / "r.json")
    with pytest.raises(EvaluationError, match="expected the values of a report: KeyError"):
        RobustnessReport.from_dict({"schema": 3})


def test_a_path_in_place_of_a_report_is_told_how_to_read_it():
    """Where one is done again, and where two are compared."""
    for call in (lambda: rerun("r.json", NET, DATA), lambda: compare("r.json", "s.json")):
        with pytest.raises(EvaluationError, match=r"RobustnessReport.load\(path\)"):
            call()


def test_a_report_prints_what_it_found_and_no_more():
    """Clean and robust accuracy with interval, threat, attacks, the verdicts that failed."""
    report = evaluate(NET, DATA, LINF, attacks=["fgsm"], progress=False)
    low, high = report.worst_case_interval
    for part in (
        f"clean {report.clean_accuracy:.1%}, robust {report.worst_case_accuracy:.1%}",
        f"({low:.1%} to {high:.1%}) in linf eps={LINF.eps:g} in [0, 1]",
        "attacks: fgsm; no verdicts",
    ):
        assert part in str(report)
    wrong = Verdict(name="sky is green", outcome="fail", figure=None, sentence="No.")
    right = Verdict(name="sky is blue", outcome="pass", figure=None, sentence="Yes.")
    assert "failed verdicts: sky is green)" in str(replace(report, verdicts=(wrong, right)))
    assert "failed verdicts: none)" in str(replace(report, verdicts=(right,)))
    assert len(str(report)) < 300
    proven = certify(NET, DATA, Smoothing(sigma=0.25, samples=100), progress=False)
    assert len(str(proven)) < 300
    assert "certified" in str(proven)


def test_another_model_or_other_images_are_refused():
    """Before anything is attacked; a layer's settings belong to the model, as its weights do."""
    net, data = subject(n=12)
    report = run(net, data, verdicts=False)

    def forbidden(*_):
        raise AssertionError("attacked")

    with torch.no_grad():
        other = subject(n=12)[0]
        other.head.bias[0] += 1e-3
    padded = subject(n=12)[0]
    padded.conv.padding_mode = "circular"
    for model in (other, padded):
        with pytest.raises(EvaluationError, match="model"):
            rerun(report, model, data, own={"fgsm": forbidden}, progress=False)
    for wrong in (tensors(12), tensors(13), tensors(5)):
        with pytest.raises(EvaluationError, match="data"):
            rerun(report, net, wrong, own={"fgsm": forbidden}, progress=False)
    with pytest.raises(EvaluationError, match="surrogate"):
        rerun(run(net, data, verdicts=FEW), net, data, surrogate=net, progress=False)


def test_an_attack_of_ones_own_has_to_be_given():
    """By its name in the report."""
    net, data = subject(n=12)

    def still(model, images, labels):
        return images

    report = run(net, data, attacks=[still], verdicts=False)
    with pytest.raises(EvaluationError, match="still"):
        rerun(report, net, data, progress=False)
    assert rerun(report, net, data, own={"still": still}, progress=False) == report


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_finished_is_not_lost_with_what_comes_after_it(error):
    """The error goes through, with the report of the attacks that had ended."""
    net, data = subject(n=12)
    whole = run(net, data, attacks=[attack("fgsm", GENTLE)], verdicts=False)

    def broken(model, images, labels):
        raise error("planted")

    with pytest.raises(error) as caught:
        run(net, data, attacks=[attack("fgsm", GENTLE), broken], verdicts=False)
    assert caught.value.report == whole
    assert "fgsm" in caught.value.__notes__[0]


def test_all_attacked_images_are_kept_and_saved(tmp_path):
    """As safetensors, with their indices; by default there are eight, and none if none is asked."""
    net, data = subject(n=40)
    report = run(net, data, verdicts=False, samples=30, examples=None, state=tmp_path / "s")
    report.examples.save(tmp_path / "images")
    saved = load_file(tmp_path / "images")
    right = [i for i, yes in zip(report.indices, report.correct, strict=True) if yes]
    assert saved["indices"].tolist() == right
    torch.testing.assert_close(saved["clean"], data.images[saved["indices"]].float() / 255)
    assert GENTLE.contains(saved["clean"], saved["adversarial"]).all()
    fooled = saved["predictions"] != saved["labels"]
    assert int(fooled.sum()) == sum(report.correct) - sum(report.worst_case)
    again = run(net, data, verdicts=False, samples=30, examples=None, state=tmp_path / "s")
    assert torch.equal(again.examples.adversarial, report.examples.adversarial)
    assert len(run(net, data, verdicts=False).examples.clean) == 8
    assert run(net, data, verdicts=False, examples=0).examples is None
    for wrong in (-1, 1.5, True):
        with pytest.raises(EvaluationError, match="examples"):
            run(net, data, verdicts=False, examples=wrong)


def test_a_model_without_tensors_has_a_digest_too():
    """Two of other settings are others."""
    pools = [nn.MaxPool2d(2), nn.MaxPool2d(3), nn.MaxPool2d(2, stride=1)]
    assert len({digest_of_model(each) for each in pools}) == 3
