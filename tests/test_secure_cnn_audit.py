"""`secure-cnn audit`: the recipe's own training, its table, its files and its exit code."""

import json
import sys

import pytest
from support.audit_records import record_of, report_of
from support.run_records import make_record

from privacy import SecureGenerator
from secure_cnn import Recipe
from secure_cnn.cli import main
from secure_cnn.errors import RunError
from secure_cnn.pages.audit import audit_figure, render_audit
from secure_cnn.record import AuditRecord

QUICK = ["--canaries", "4", "--steps", "12", "--epsilon", "8", "--epochs", "2"]


def run(monkeypatch, *options):
    """The command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["secure-cnn", "audit", *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_an_honest_recipe_passes(shapes, tmp_path, monkeypatch, capsys):
    """Adversarial and shifted images too; table, JSON and page are there, the exit code is 0."""
    out = tmp_path / "audit"
    code = run(monkeypatch, "--data", shapes, "--eps", "0.1", "--shift", "1", "--out", out, *QUICK)
    assert code == 0
    printed = capsys.readouterr()
    assert "claimed" in printed.out
    assert "passed: nothing in 12 steps" in printed.err
    found = json.loads((out / "audit.json").read_text())
    assert found["kind"] == "audit"
    assert found["report"]["passed"] is True
    assert found["settings"]["eps"] == 0.1
    assert len(found["report"]["in_scores"]) + len(found["report"]["out_scores"]) == 48
    assert "<svg" in (out / "audit.html").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["audit.html", "audit.json"]


def test_a_recipe_whose_noise_is_off_fails_with_exit_code_4(shapes, tmp_path, monkeypatch, capsys):
    """And the files say so."""
    perturb = SecureGenerator.perturb
    monkeypatch.setattr(
        SecureGenerator,
        "perturb",
        lambda self, values, *, deviation, scale: perturb(
            self, values, deviation=deviation / 2, scale=scale
        ),
    )
    code = run(monkeypatch, "--data", shapes, "--out", tmp_path, *QUICK)
    assert code == 4
    assert "FAILED: " in capsys.readouterr().err
    assert json.loads((tmp_path / "audit.json").read_text())["report"]["passed"] is False
    assert "FAILED" in (tmp_path / "audit.html").read_text()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--data", "nowhere"], 3, "nowhere"),
        (["--device", "abacus"], 3, "device: expected one that this machine has"),
        (["--attack", "pgd"], 3, "expected eps"),
        (["--canaries", "1"], 4, "canaries"),
        (["--canaries", "5000"], 4, "ask for fewer canaries"),
        (["--run", "nowhere"], 3, "run.json"),
        (["--run", "nowhere", "--epsilon", "1"], 3, "--run: audits the run with its own settings"),
    ],
)
def test_bad_input_is_one_line(options, code, words, tmp_path, monkeypatch, capsys):
    """With the exit code of its kind, and nothing written."""
    out = tmp_path / "audit"
    assert run(monkeypatch, *options, "--out", out) == code
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_the_picture_is_the_same_every_time_and_text_is_escaped():
    """Bars beyond the claim and infinite bounds are drawn too."""
    record = record_of()
    assert audit_figure(record) == audit_figure(record)
    assert "&lt;i&gt;&amp;" in render_audit(record)
    broken = record_of(
        bounds=[{"method": "gdp", "epsilon": float("inf"), "confidence": 0.95}],
        in_scores=[10.0, 10.0],
        out_scores=[0.0, 0.0],
        passed=False,
    )
    assert "inf" in audit_figure(broken)


def test_a_report_without_scores_is_refused():
    """The picture would have nothing to show."""
    values = report_of()
    del values["in_scores"]
    with pytest.raises(RunError, match=r"audit\.report: expected entries in_scores"):
        AuditRecord(created="", hardware={}, versions={}, settings={}, report=values)


def test_the_page_says_what_cannot_be_seen():
    """Every sentence, as text; a record of an older audit has none and is shown all the same."""
    page = render_audit(record_of(unseen=["Nothing <b>rare</b>."], false_alarm=1e-4))
    assert "<li>Nothing &lt;b&gt;rare&lt;/b&gt;.</li>" in page
    assert "of an older audit" in render_audit(record_of())


@pytest.mark.parametrize(("given", "audited"), [(None, 90), (64, 64)])
def test_a_run_is_audited_with_the_batch_size_that_it_had(
    tmp_path, monkeypatch, capsys, given, audited
):
    """Where nobody gave one, another version may have chosen it: the record knows its rate."""
    settings = Recipe(out="", epsilon=3.0, batch_size=given).to_dict()
    make_record(settings=settings).write(tmp_path / "run.json")  # a tenth of 900 images a step

    def watched(recipe, *_):
        raise RunError(f"batch size {recipe.batch_size}")

    monkeypatch.setattr(sys.modules["secure_cnn.cli.audit"], "_audited", watched)
    assert run(monkeypatch, "--run", tmp_path, "--out", tmp_path / "audit") == 3
    assert f"batch size {audited}" in capsys.readouterr().err
