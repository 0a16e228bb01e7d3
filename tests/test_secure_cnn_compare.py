"""Runs side by side: who is beaten by whom, what may not be compared, and what is chosen."""

import io
import json
import math
import re
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.leakage_records import SHIFTS, attack_of, membership_of
from support.leakage_records import record_of as leakage_of
from support.run_records import PROTECTED, Page, make_record, make_result
from support.saved_runs import saved_run

from defenses import wilson_interval
from secure_cnn.cli import main
from secure_cnn.errors import RunError
from secure_cnn.pages import comparison_table, render_comparison
from secure_cnn.pages.tradeoff import _apart, tradeoff_map
from secure_cnn.record import (
    AuditRecord,
    ControlRecord,
    DataRecord,
    RunRecord,
    SavedRun,
    ThreatRecord,
    compare_runs,
)
from secure_cnn.record.tradeoff import (
    Estimate,
    Needs,
    TradeoffPoint,
    choose,
    pareto_front,
    points_of,
)
from secure_cnn.record.wording import fraction


def audit(bound=1.5, claimed=2.0, passed=True, **recipe):
    """An audit of the recipe of `make_record`."""
    report = {
        "in_scores": [1.0, 2.0],
        "out_scores": [0.0, 1.0],
        "bounds": [{"method": "gdp", "epsilon": bound, "confidence": 0.95}],
        "checks": [],
        "claimed_epsilon": claimed,
        "delta": 1e-5,
        "verdict": "FAILED: too little noise" if not passed else "passed",
        "passed": passed,
    }
    recipe = {"batch_size": 128, "seed": None, "augment": ["shift"], "out": "x"} | recipe
    return AuditRecord(
        created="2025-01-01", hardware={}, versions={}, settings=recipe, report=report
    )


def run_command(monkeypatch, *options):
    """The command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["secure-cnn", "compare", *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def exact(value):
    """A measurement without spread."""
    return None if value is None else Estimate(value=value, low=value, high=value)


measure = st.none() | st.sampled_from([0.1, 0.5, 0.9])
points = st.builds(
    lambda a, r, robust, epsilon, time: TradeoffPoint(
        name="x", accuracy=exact(a), macro_recall=r, robust_accuracy=exact(robust),
        epsilon=epsilon, time=exact(time),
    ),
    st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from([0.1, 0.9, math.nan]),
    measure, measure, measure,
)  # fmt: skip


def better(a, b, larger):
    """Whether a is at least as good as b, None being worst; and whether it is better."""
    if b is None:
        return True, a is not None
    if a is None:
        return False, False
    return (a >= b, a > b) if larger else (a <= b, a < b)


def beats(a, b):
    """The stated rule, read literally."""
    value = lambda estimate: None if estimate is None else estimate.value  # noqa: E731
    recall = lambda point: None if math.isnan(point.macro_recall) else point.macro_recall  # noqa: E731
    each = [
        better(a.accuracy.value, b.accuracy.value, True),
        better(recall(a), recall(b), True),
        better(value(a.robust_accuracy), value(b.robust_accuracy), True),
        better(a.epsilon, b.epsilon, False),
        better(value(a.time), value(b.time), False),
    ]
    return all(fine for fine, _ in each) and any(more for _, more in each)


@given(st.lists(points, max_size=7), measure, measure, measure)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_the_front_is_what_its_rule_says(found, epsilon, robust, time):
    """And a choice is on it, keeps the limits, and is as accurate as any that keeps them."""
    front = pareto_front(found)
    assert list(front) == [not any(beats(other, own) for other in found) for own in found]
    needs = Needs(epsilon=epsilon, robust_accuracy=robust, time=time)
    chosen = choose(found, needs)
    fit = [point for point in found if needs.met_by(point)]
    assert (chosen is None) == (not fit)
    if chosen is not None:
        assert needs.met_by(chosen)
        assert front[next(i for i, point in enumerate(found) if point is chosen)]
        assert chosen.accuracy.value == max(point.accuracy.value for point in fit)


def test_a_limit_is_kept_by_what_was_measured_only():
    """No ε is not a small one, and a limit of zero is one."""
    plain = TradeoffPoint(name="plain", accuracy=exact(0.9), macro_recall=0.9)
    for needs in (Needs(epsilon=1e9), Needs(robust_accuracy=0.0), Needs(time=1e9)):
        assert not needs.met_by(plain)
    private = replace(plain, epsilon=0.0)
    assert Needs(epsilon=0.0).met_by(private)
    assert Needs(epsilon=0.0).words == "ε ≤ 0"
    for wrong in (-1.0, math.nan):
        with pytest.raises(RunError, match=r"needs\.epsilon"):
            Needs(epsilon=wrong)


def test_points_carry_the_intervals_of_the_record():
    """Accuracy's is Wilson's, over the images in the confusion matrix."""
    result = make_result("plain", 3, accuracy=0.8)
    (point,) = points_of(make_record(("plain",), results=[result]))
    low, high = wilson_interval(24, 30)
    assert (point.accuracy.low, point.accuracy.high) == pytest.approx((low, high))
    assert point.robust_accuracy == Estimate(value=0.6, low=0.55, high=0.65)


def test_marks_are_moved_apart_and_no_further_than_needed():
    """Even on the very same spot or in a corner; marks with room stay where they are."""
    box = (8.0, 8.0, 300.0, 200.0)
    crowd = [(100.0, 100.0)] * 3 + [(8.0, 8.0), (9.0, 9.0), (250.0, 150.0)]
    marks = _apart(crowd, box)
    for first in range(len(marks)):
        for second in range(first):
            assert math.dist(marks[first], marks[second]) > 16
    assert marks[-1] == crowd[-1]
    assert all(8 <= x <= 300 and 8 <= y <= 200 for x, y in marks)
    assert max(math.dist(a, b) for a, b in zip(crowd, marks, strict=True)) < 40


def test_a_panel_is_drawn_only_where_it_tells_something():
    """One point, or nothing measured, is no picture."""
    one = TradeoffPoint(name="a", accuracy=exact(0.9), macro_recall=0.9)
    colors = {"a": "#0b62a8", "b": "#0b62a8"}
    assert tradeoff_map([one], colors) == []
    assert tradeoff_map([one, replace(one, name="b")], colors) == []
    private = replace(one, name="b", epsilon=3.0, time=exact(2.0))
    (svg,) = tradeoff_map([one, private], colors)
    assert ">none</text>" in svg
    assert tradeoff_map([one, private], colors) == [svg]
    full = [replace(p, robust_accuracy=exact(0.5), time=exact(1.0)) for p in (one, private)]
    assert len(tradeoff_map(full, colors)) == 3


def test_the_same_plain_training_is_shown_once():
    """The one that was attacked, whichever comes first; another network's stays."""
    bare = make_result("plain", 3, robust_accuracy=None, robust_low=None, robust_high=None,
                       robust_recall=None, attacks={})  # fmt: skip
    first = saved_run("first", results=[bare, make_result(PROTECTED, 3)])
    found = compare_runs([first, saved_run("second", accuracy=0.7)])
    assert list(found.results) == ["plain", f"first: {PROTECTED}", f"second: {PROTECTED}"]
    assert [point.name for point in found.points] == list(found.results)
    assert found.points[0].robust_accuracy is not None
    model = replace(first.record.model, name="resnet20")
    other = replace(first, name="other", record=replace(first.record, model=model))
    mixed = compare_runs([first, other])
    assert sum(result.variant == "plain" for result in mixed.results.values()) == 2
    assert any("networks differ" in note for note in mixed.notes)


def test_runs_on_other_data_are_refused_by_name():
    """Also another split of the same data; and a run twice, and one without result."""
    first = saved_run("first")
    data = first.record.data
    for change in ({"fingerprint": "sha256:11"}, {"test": 91}, {"name": "plants"}):
        record = make_record(data=DataRecord(**(vars(data) | change)))
        with pytest.raises(RunError, match=r"second: expected the data of first, animals \(900"):
            compare_runs([first, SavedRun(name="second", record=record)])
    with pytest.raises(RunError, match="first: expected each run once"):
        compare_runs([first, first])
    empty = SavedRun(name="empty", record=make_record(results=[], status="running"))
    with pytest.raises(RunError, match="empty: expected a result"):
        compare_runs([first, empty])


def test_a_keyed_fingerprint_is_said_to_be_one_and_not_cut_to_nothing():
    """It is no digest of the data that two runs could share."""
    first = saved_run("first")
    data = replace(first.record.data, fingerprint="hmac-sha256:" + 64 * "a", test=91)
    private = SavedRun(name="second", record=make_record(data=data))
    with pytest.raises(RunError, match="under a key of its own, which cannot be compared") as told:
        compare_runs([first, private])
    assert "hmac" not in str(told.value)
    page = Page(render_comparison(compare_runs([private]), Needs())).text
    assert "under a key of the first run, so that it cannot be compared: hmac-sha256:aaaa" in page


def test_what_was_measured_under_other_conditions_is_not_compared():
    """Another threat model's robust accuracy is left out, and another δ is said."""
    privacy = replace(saved_run("x").record.privacy, delta=1e-4)
    threat = ThreatRecord(norm="linf", eps=0.2, bounds=(0, 1))
    other = saved_run("second", threat=threat, privacy=privacy)
    found = compare_runs([saved_run("first"), other])
    robust = {point.name: point.robust_accuracy for point in found.points}
    assert robust[f"second: {PROTECTED}"] is None
    assert robust[f"first: {PROTECTED}"] is not None
    notes = " ".join(found.notes)
    assert "another threat model, so not shown: second" in notes
    assert "δ = 0.0001 or 1e-5" in notes
    assert "not on one scale" in notes


def test_an_audit_is_shown_beside_its_claim():
    """A failed one is a warning above everything; plain has none."""
    run = replace(saved_run("first"), audit=audit())
    found = compare_runs([run])
    assert [point.audited for point in found.points] == [None, (1.5, 2.0)]
    assert "≥ 1.50\nof 2.00" in render_comparison(found, Needs())
    failed = compare_runs([replace(run, audit=audit(passed=False))])
    assert "too little noise" in failed.warnings[0]
    assert choose(failed.points, Needs(epsilon=9)) is None
    assert "too little noise" in render_comparison(failed, Needs())


FAILED = ControlRecord(name="planted leak", expected="TPR 1", got="TPR 0.2", passed=False)


def test_leakage_is_shown_beside_the_variant_that_it_is_of():
    """In the table, in a panel where two have it, in JSON; where no run has it, nowhere."""
    bare = compare_runs([saved_run("first"), saved_run("second")])
    page = render_comparison(bare, Needs())
    assert "AUC" not in page
    assert "leakage" not in json.dumps(bare.to_dict())
    leaky = replace(saved_run("first"), leakage=leakage_of(variant=PROTECTED))
    found = compare_runs([leaky, saved_run("second", accuracy=0.7)])
    points = {point.name: point.leakage for point in found.points}
    leaked = points.pop(f"first: {PROTECTED}")
    assert set(points.values()) == {None}
    areas = leaky.leakage.membership.strongest.areas
    assert leaked.auc == Estimate(value=areas[0], low=min(areas), high=max(areas))
    rate = leaky.leakage.membership.strongest.rate(0.01)
    assert (leaked.fpr, leaked.tpr.value, leaked.tpr.high) == (0.01, rate.tpr, rate.tpr_high)
    page = render_comparison(found, Needs())
    assert f"{rate.tpr:.3g}\nFPR {fraction(rate.realised_fpr)}\n0.01 asked\n" in page
    assert "intervals and leakage are not taken into account" in page
    assert "a measurement, never a verification" in page
    assert 'aria-label="Accuracy and leakage"' not in page
    plain = replace(saved_run("second", accuracy=0.7), leakage=leakage_of(variant="plain"))
    both = render_comparison(compare_runs([leaky, plain]), Needs())
    assert 'aria-label="Accuracy and leakage"' in both
    assert pareto_front(compare_runs([leaky, plain]).points) == pareto_front(found.points)


@pytest.mark.parametrize("audited", [False, True])
def test_the_terminal_s_table_fits_eighty_letters(audited):
    """With all that can be measured nothing is cut, and what nobody measured has no column."""
    leaky = replace(saved_run("first"), leakage=leakage_of(variant=PROTECTED))
    leaky = replace(leaky, audit=audit() if audited else None)
    found = compare_runs([leaky, saved_run("second", accuracy=0.7)])
    console = Console(width=80, file=io.StringIO())
    console.print(comparison_table(found, found.points[1]))
    text = console.file.getvalue()
    for words in (
        "● plain",
        "● ★ first:",
        "○ second:",
        "AUC 0.738",
        "TPR 0.0769",
        "FPR 0.00978",
        "2.00×",
    ):
        assert words in text
    assert "55.0–65.0" in text
    assert ("of 2.00" in text, "audited" in text) == (audited, audited)


def test_few_examples_tell_the_rate_at_ten_percent_or_none():
    """Which of them it is stands beside it."""
    for others, fpr in ((120, 0.1), (5, None)):
        small = leakage_of(variant=PROTECTED, membership=membership_of(others=others, models=1))
        leaked = replace(saved_run("first"), leakage=small).leaked(PROTECTED)
        assert leaked.fpr == fpr
        assert (leaked.tpr is None) == (fpr is None)


def test_leakage_whose_controls_failed_counts_as_not_measured():
    """With a warning; what it found against ε does not count either."""
    broken = membership_of(broken=("lira: TPR at least 0.5",))
    void = leakage_of(
        variant=PROTECTED, membership=broken, controls=[FAILED], epsilon=2.991, delta=1e-5
    )
    found = compare_runs([replace(saved_run("first"), leakage=void)])
    assert [point.leakage for point in found.points] == [None, None]
    assert found.points[1].epsilon == 2.991
    assert (
        "controls of its leakage failed, so it counts as not measured: planted leak"
        in (found.warnings[0])
    )
    assert not any("AUC" in note for note in found.notes)


def test_an_attack_beyond_epsilon_takes_it_away():
    """As a failed audit does; the figures of the attack stay."""
    broken = leakage_of(
        variant=PROTECTED, epsilon=2.991, delta=1e-5,
        membership=membership_of(broken=("lira: TPR at least 0.5",)),
    )  # fmt: skip
    found = compare_runs([replace(saved_run("first"), leakage=broken)])
    assert found.points[1].epsilon is None
    assert found.points[1].leakage is not None
    assert found.warnings == (
        "first: attacks find more than its ε allows, so its ε does not count: "
        "lira: TPR at least 0.5",
    )


def test_the_same_plain_training_keeps_what_either_run_knows_of_it():
    """One attacked, the other asked for its members, in either order."""
    bare = make_result("plain", 3, robust_accuracy=None, robust_low=None, robust_high=None,
                       robust_recall=None, attacks={})  # fmt: skip
    first = saved_run("first", results=[bare])
    first = replace(first, leakage=leakage_of(variant="plain"))
    for runs in ([first, saved_run("second")], [saved_run("second"), first]):
        plain = compare_runs(runs).points[0]
        assert plain.robust_accuracy is not None
        assert plain.leakage is not None


def test_another_plain_training_with_the_same_figures_at_the_end_stays_apart():
    """Many name all test images right: the longer one leaks more, and is not the shorter one."""
    weak, strong = (
        leakage_of(variant="plain", membership=membership_of({"lira": shift}))
        for shift in (0.2, 2.0)
    )
    first = replace(saved_run("first"), leakage=weak)
    longer = make_record(("plain",), length=5, results=[make_result("plain", 3)])
    for other, count in (
        (SavedRun(name="other", record=longer, leakage=strong), 2),
        (SavedRun(name="other", record=longer), 2),
        (replace(saved_run("other"), leakage=strong), 2),
        (replace(saved_run("other"), leakage=weak), 1),
    ):
        found = compare_runs([first, other]).points
        plain = [point for point in found if point.name.endswith("plain")]
        assert len(plain) == count
        assert plain[0].leakage is not None
        if other.leakage is strong:
            assert plain[1].leakage.auc.value > 0.9


def test_measurements_that_were_not_made_alike_are_said_to_be():
    """More attacks and more shadow models find more."""
    many = replace(saved_run("first"), leakage=leakage_of(variant=PROTECTED))
    few = replace(many, name="second", leakage=leakage_of(
        variant=PROTECTED, membership=membership_of(models=5, attacks=[attack_of("rmia")])
    ))  # fmt: skip
    notes = " ".join(compare_runs([many, few]).notes)
    assert "5 attacks with 16 shadow models (first), 1 attack with 4 shadow models (second)" in (
        notes
    )
    assert "* Leakage was not measured alike" in notes
    assert "0.738 *\n" in render_comparison(compare_runs([many, few]), Needs())
    assert "not measured alike" not in " ".join(compare_runs([many]).notes)
    assert " *\n" not in render_comparison(compare_runs([many]), Needs())


def test_the_page_says_what_differs_and_escapes_it():
    """Settings by name and run; the same in both is left out."""
    second = saved_run("<i>&", settings={"batch_size": 64, "seed": None, "augment": ["<b>"]})
    page = render_comparison(compare_runs([saved_run("first"), second]), Needs(epsilon=9))
    assert "&lt;i&gt;&amp;" in page
    assert "<i>&" not in page
    assert "&lt;b&gt;" in page
    assert re.search(r">batch size</th><td[^>]*>128</td><td[^>]*>64</td>", page)
    assert ">seed</th>" not in page
    assert "★" in page
    assert "No variant keeps the limits" in render_comparison(
        compare_runs([saved_run("first")]), Needs(epsilon=0.1)
    )


def folder_of(parent, name, **fields):
    """A run's folder with its record."""
    folder = parent / name
    folder.mkdir()
    saved_run(name, **fields).record.write(folder / "run.json")
    return folder


def controls_of(*attacks):
    """Those of attacks on memberships, all in order."""
    return tuple(
        ControlRecord(name=f"{attack}, {kind}", expected="x", got="x", passed=True)
        for attack in attacks
        for kind in ("permuted", "planted")
    )


def test_what_another_run_leaks_is_refused(tmp_path):
    """By its number, a variant that the run does not have, and what the model finds.

    Its own is read.
    """
    folder = folder_of(tmp_path, "first", run_id="cd" * 16)
    for wrong, words in (({"run": "ef" * 16}, "that of another run"), (
        {"run": "cd" * 16, "variant": "pgd"}, f"pgd, where the run has plain, {PROTECTED}"
    ), (
        {"run": "cd" * 16, "variant": PROTECTED, "accuracy": 0.123},
        "that of a model whose accuracy is 0.123, where the run's has 0.",
    ), (
        {"run": "cd" * 16, "variant": PROTECTED, "accuracy": 0.8, "controls": controls_of("lira")},
        "attacks without their controls: rmia, bavaria, attack-p, global-threshold;",
    ), (
        {"run": "cd" * 16, "variant": PROTECTED, "accuracy": 0.8, "controls": ()},
        "attacks without their controls: lira, rmia",
    )):  # fmt: skip
        leakage_of(**wrong).write(folder / "leakage.json")
        with pytest.raises(RunError, match=r"leakage\.json: .*secure-cnn leakage") as told:
            SavedRun.read(folder, "first")
        assert words in str(told.value)
    (_, result) = RunRecord.read(folder / "run.json").results
    own = leakage_of(
        run="cd" * 16, variant=PROTECTED, accuracy=result.accuracy, controls=controls_of(*SHIFTS)
    )
    own.write(folder / "leakage.json")
    assert SavedRun.read(folder, "first").leakage == own


def test_more_runs_than_colours_are_told_apart():
    """No two lines of the legend have the same sign in the same colour; colours do come again."""
    runs = [saved_run(f"run {n}", accuracy=0.8) for n in range(9)]
    page = render_comparison(compare_runs(runs), Needs())
    figure = page.partition('aria-label="Accuracy and recall by class"')[2].partition("</svg>")[0]
    drawn = re.findall(r'<text[^>]*style="[^"]*fill: ([^"]*)"[^>]*>([^<]*)</text>', figure)
    signs = [each for each in drawn if each[1] in set("▬●■▲◆")]
    assert len(signs) == len(set(signs)) == 10
    assert len({color for color, _ in signs}) < 10


def test_the_command_prints_writes_and_chooses(tmp_path, monkeypatch, capsys):
    """The table on stdout, the rest on stderr, both files in the folder."""
    first, second = folder_of(tmp_path, "first"), folder_of(tmp_path, "second", accuracy=0.7)
    audit().write(first / "audit.json")
    out = tmp_path / "new" / "out"
    assert run_command(monkeypatch, first, second, "--out", out, "--max-epsilon", "3") == 0
    printed = capsys.readouterr()
    assert "2 runs on animals" in printed.out
    assert f"chosen under ε ≤ 3: first: {PROTECTED}" in printed.err
    found = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert found["kind"] == "comparison"
    assert [point["name"] for point in found["points"]] == [
        *("plain", f"first: {PROTECTED}", f"second: {PROTECTED}")
    ]
    assert (out / "compare.html").read_text(encoding="utf-8").count("<svg") == 4
    assert sorted(path.name for path in out.iterdir()) == ["compare.html", "compare.json"]


def test_the_command_fails_in_one_line(tmp_path, monkeypatch, capsys):
    """Exit code 3 for runs that cannot be compared, 7 where no variant keeps the limits."""
    first = folder_of(tmp_path, "first")
    assert run_command(monkeypatch, first, "--max-epsilon", "0.5") == 7
    assert "no variant keeps the limits: ε ≤ 0.5" in capsys.readouterr().err
    assert run_command(monkeypatch, first, tmp_path / "nowhere") == 3
    assert "nowhere/run.json" in capsys.readouterr().err
    audit(batch_size=64).write(first / "audit.json")
    assert run_command(monkeypatch, first) == 3
    assert "got another batch_size" in capsys.readouterr().err


def test_leakage_of_an_older_version_is_to_be_measured_anew(tmp_path):
    """It is not damaged, and the command stands there."""
    run = saved_run("first")
    run.record.write(tmp_path / "run.json")
    content = leakage_of(variant=PROTECTED, run=run.record.run_id).to_dict()
    del content["promised"]
    (tmp_path / "leakage.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"older version .*; make it anew with secure-cnn leakage"):
        SavedRun.read(tmp_path, "first")
