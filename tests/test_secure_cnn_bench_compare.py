"""What changed beyond the noise: the rule, its direction, and the gate."""

import json
import math

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from secure_cnn.bench.comparison import Change, compare, higher_is_better
from secure_cnn.cli.bench import compare_command
from secure_cnn.errors import RunError
from secure_cnn.record import CONTROL, Measurements, Row

VALUES = st.tuples(*[st.floats(0.001, 1000)] * 3).map(sorted)


def row(low, median, high, *, metric="time_ratio", variant="private", case="net", unit="x"):
    """A figure with its interval."""
    return Row(
        case=case,
        variant=variant,
        metric=metric,
        low=low,
        median=median,
        high=high,
        unit=unit,
        n=9,
    )


def document(*rows, hardware=None, versions=None):
    """A benchmark of these figures."""
    return Measurements(
        created="2026-01-01", hardware=hardware or {}, versions=versions or {}, rows=rows
    )


def change(before, after, **about):
    """One figure before and after."""
    return Change(before=row(*before, **about), after=row(*after, **about))


@settings(deadline=None, max_examples=100)
@given(before=VALUES, after=VALUES)
def test_beyond_the_noise_is_apart(before, after):
    """A change has no point in both intervals; it is worse one way and better the other."""
    there, back = change(before, after), change(after, before)
    apart = not max(before[0], after[0]) <= min(before[2], after[2])
    assert there.beyond_noise == back.beyond_noise == apart
    assert there.worse == (apart and after[1] > before[1])
    assert not (there.worse and back.worse)
    assert there.worse or back.worse or not apart


@settings(deadline=None, max_examples=50)
@given(values=st.lists(VALUES, min_size=1, max_size=8))
def test_nothing_changed_against_itself(values):
    """Whatever the figures are, at any tolerance."""
    rows = [row(*each, variant=str(number)) for number, each in enumerate(values)]
    found = compare(document(*rows), document(*reversed(rows)))
    assert found.worse(0.0) == ()
    assert not any(each.beyond_noise for each in found.changes)
    assert (found.only_before, found.only_after, found.warnings) == ((), (), ())


def test_a_slowed_step_is_worse_and_by_how_much():
    """Control: 30 % slower, with intervals apart; within the noise it would be nothing."""
    slowed = change((0.9, 1.0, 1.1), (1.2, 1.3, 1.4))
    assert slowed.worse
    assert slowed.worsening == pytest.approx(0.3)
    noisy = change((0.9, 1.0, 1.25), (1.2, 1.3, 1.4))
    assert not noisy.worse
    touching = change((0.9, 1.0, 1.2), (1.2, 1.3, 1.4))
    assert not touching.beyond_noise


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        *((name, False) for name in ("time", "time_attack", "time_ratio", "memory", "disk")),
        *((name, False) for name in ("stall", "load_vs_safetensors", "epsilon_same_time")),
        *((name, False) for name in ("exponent", "noise_share", "size_overhead")),
        *((name, True) for name in ("accuracy", "robust_accuracy_same_time", "agreement")),
        *((name, True) for name in ("macro_recall_same_examples", "images_per_second")),
    ],
)
def test_which_way_is_better(metric, higher):
    """Costs should fall; shares that are right, and speeds, should rise."""
    assert higher_is_better(metric) == higher
    risen = change((0.4, 0.5, 0.6), (0.7, 0.8, 0.9), metric=metric)
    assert risen.worse != higher
    assert (risen.worsening < 0) == higher


def test_the_tolerance_is_a_part_of_the_figure_before():
    """Just above it is worse, just below it is not; the worst comes first."""
    before = document(row(1, 1, 1, variant="a"), row(2, 2, 2, variant="b"))
    after = document(row(1.04, 1.04, 1.04, variant="a"), row(2.2, 2.2, 2.2, variant="b"))
    found = compare(before, after)
    assert [each.before.variant for each in found.worse(0.05)] == ["b"]
    assert [each.before.variant for each in found.worse(0.03)] == ["b", "a"]
    for tolerance in (-0.1, math.nan):
        with pytest.raises(RunError, match="tolerance: expected at least 0"):
            found.worse(tolerance)


def test_from_nothing_to_something_is_infinitely_worse():
    """And no change is none, also of nothing; a NaN cannot be compared, and is said."""
    assert change((0, 0, 0), (1, 1, 1)).worsening == math.inf
    assert change((0, 0, 0), (0, 0, 0)).worsening == 0
    nothing = (math.nan,) * 3
    unknown = compare(document(row(*nothing)), document(row(1, 1, 1)))
    assert unknown.worse(0.0) == ()
    assert unknown.warnings == ("net, private, time_ratio: not comparable",)
    other = Change(before=row(1, 1, 1, unit="s"), after=row(9, 9, 9, unit="ms"))
    assert not other.comparable
    assert not other.worse


def test_rows_of_one_file_alone_are_told():
    """Neither is a change: a case may be new, a rival missing."""
    old, new, both = row(1, 1, 1, case="old"), row(1, 1, 1, case="new"), row(1, 1, 1)
    found = compare(document(old, both), document(both, new))
    assert (found.only_before, found.only_after) == ((old,), (new,))
    assert len(found.changes) == 1


def test_what_cannot_be_compared_is_refused():
    """Nothing in common, also for want of the metric; a figure that is there twice."""
    one = document(row(1, 1, 1))
    with pytest.raises(RunError, match="figures in common, got none"):
        compare(one, document(row(1, 1, 1, case="other")))
    with pytest.raises(RunError, match=r"metrics \(memory\)"):
        compare(one, one, metrics=["memory"])
    with pytest.raises(RunError, match="net, private, time_ratio: expected one row, got two"):
        compare(one, document(row(1, 1, 1), row(2, 2, 2)))


def test_another_machine_other_versions_and_noise_are_warned_of():
    """Each difference by name; a file whose control failed, too."""
    noisy = row(1.1, 1.2, 1.3, variant=CONTROL)
    before = document(row(1, 1, 1), hardware={"cpu": "a", "cores": 2}, versions={"torch": "2"})
    after = document(row(1, 1, 1), noisy, hardware={"cpu": "b", "cores": 2}, versions={})
    warnings = compare(before, after).warnings
    assert warnings[:2] == ("hardware: cpu was a, is b", "versions: torch was 2, is unknown")
    assert warnings[2].startswith("after: net: plain against plain gave 1.20")
    assert len(warnings) == 3


def run(tmp_path, before, after, *options):
    """The command on two documents."""
    app = typer.Typer()
    app.command()(compare_command)
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, content in zip(paths, (before, after), strict=True):
        content.write(path)
    return CliRunner().invoke(app, [*map(str, paths), *options], env={"COLUMNS": "160"})


def test_the_gate_has_an_exit_code_of_its_own(tmp_path):
    """7 for worse than tolerated, 0 for better, tolerated, or another metric."""
    good = document(row(1.0, 1.0, 1.0), row(1, 1, 1, metric="memory_ratio"))
    bad = document(row(1.5, 1.5, 1.5), row(1, 1, 1, metric="memory_ratio"))
    worse = run(tmp_path, good, bad)
    assert worse.exit_code == 7
    assert "WORSE" in worse.stdout
    assert "+50.0 %" in worse.stdout
    assert run(tmp_path, bad, good).exit_code == 0
    assert run(tmp_path, good, good).exit_code == 0
    tolerated = run(tmp_path, good, bad, "--tolerance", "0.6")
    assert tolerated.exit_code == 0
    assert "tolerated" in tolerated.stdout
    assert run(tmp_path, good, bad, "--metric", "memory_ratio").exit_code == 0


def test_a_file_of_another_schema_is_refused(tmp_path):
    """A later schema may mean something else by the same names."""
    made = document(row(1, 1, 1))
    done = run(tmp_path, made, made)
    assert done.exit_code == 0
    later = json.loads((tmp_path / "b.json").read_text()) | {"schema": 2}
    (tmp_path / "b.json").write_text(json.dumps(later))
    app = typer.Typer()
    app.command()(compare_command)
    refused = CliRunner().invoke(app, [str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert isinstance(refused.exception, RunError)
    assert "schema: expected 1, got 2" in str(refused.exception)
