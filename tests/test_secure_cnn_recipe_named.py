"""Recipes by name, and whether they hold: `secure-cnn recipes`, `train --recipe`, `reproduce`."""

import json
from dataclasses import replace
from statistics import fmean, stdev
from types import SimpleNamespace

import numpy as np
import pytest

from secure_cnn import Recipe, RunError, build_model, load_data
from secure_cnn.recipe import named as room
from secure_cnn.recipe.named import NAMED, NamedRecipe, named_recipe, stored_results
from secure_cnn.recipe.notes import notes_before
from secure_cnn.recipe.reproduction import _figures, agreements, reproduce
from secure_cnn.record import Measurements, Row, RunRecord

METRICS = {
    *("accuracy", "macro_recall", "epsilon", "delta"),
    *("autoattack", "attacked", "verdicts_failed"),
}
PROVEN = {"certified@0.1", "certified@0.25", "certified@0.5"}


@pytest.fixture
def tiny(shapes, monkeypatch, quick):
    """A named recipe of a second, the only one there is."""
    recipe = Recipe(out="runs/tiny", data=shapes, model="compact", epochs=2, learning_rate=0.2)
    one = NamedRecipe(name="tiny", says="Small.", recipe=recipe, source="none", chosen="untuned")
    monkeypatch.setattr(room, "NAMED", {"tiny": one})
    monkeypatch.setattr("secure_cnn.cli.recipes.NAMED", {"tiny": one})
    return one


def stored(values, metric="accuracy", case="tiny"):
    """The rows on record of one figure."""
    common = {"case": case, "variant": "plain", "unit": "1", "n": len(values)}
    mean, spread = fmean(values), stdev(values)
    ends = {"low": min(values), "high": max(values)}
    return [
        Row(metric=metric, median=mean, **ends, **common),
        Row(metric=f"{metric}_sd", median=spread, low=spread, high=spread, **common),
    ]


@pytest.mark.parametrize("name", NAMED)
def test_every_named_recipe_is_explained_and_has_its_own_settings(name):
    """What the listing shows of it makes it again."""
    one = NAMED[name]
    assert (one.name, one.says[-1]) == (name, ".")
    assert one.settings
    assert one.source
    assert one.chosen
    again = Recipe(**{"out": one.recipe.out, **one.settings})
    assert again == one.recipe


def test_what_is_on_record_is_of_recipes_that_are_there():
    """Each figure with its standard deviation, of one protection."""
    rows = stored_results().rows
    assert {row.case for row in rows} <= set(NAMED)
    assert {row.metric.removesuffix("_sd") for row in rows} <= METRICS | PROVEN | {"seconds"}
    for row in rows:
        assert row.variant == NAMED[row.case].recipe.variant.name


def test_settings_beside_a_name_win(cli, tiny, tmp_path):
    """And what is not given is the recipe's, not the command's default."""
    out = tmp_path / "run"
    code, _, _ = cli("train", "--recipe", "tiny", "--out", out, "--epochs", "1", "--no-baseline")
    settings = RunRecord.read(out / "run.json").settings
    assert code == 0
    assert Recipe.from_dict(settings) == replace(tiny.recipe, out=out, epochs=1, baseline=False)


def test_a_recipe_for_any_images_asks_which(cli, tiny, monkeypatch, shapes, tmp_path):
    """In training and in reproducing; a name that is none is answered with those that are."""
    monkeypatch.setitem(room.NAMED, "tiny", replace(tiny, any_data=True))
    for words in (("train", "--recipe", "tiny", "--out", tmp_path / "r"), ("reproduce", "tiny")):
        code, _, err = cli(*words)
        assert (code, "say which with --data" in err) == (3, True)
    with pytest.raises(RunError, match="expected one of tiny, got 'best'"):
        named_recipe("best")


def test_a_resumed_run_takes_no_recipe(cli, tmp_path):
    """It has settings of its own."""
    code, _, err = cli("train", "--out", tmp_path, "--resume", "--recipe", "robust")
    assert (code, "--recipe" in err) == (3, True)


def test_the_listing_shows_what_is_there(cli, tiny, monkeypatch):
    """In a table, and one in full."""
    rows = tuple(stored([0.5, 0.75]))
    found = Measurements(created="2026-01-01", hardware={}, versions={}, rows=rows)
    monkeypatch.setattr("secure_cnn.cli.recipes.stored_results", lambda: found)
    code, shown, _ = cli("recipes")
    assert (code, "accuracy 62.5% (50.0% to 75.0%, 2 seeds)" in shown) == (0, True)
    code, shown, _ = cli("recipes", "tiny")
    assert (code, "learning_rate = 0.2" in shown, "out =" in shown) == (0, True, False)


def test_figures_are_those_of_the_runs_and_nothing_is_done_twice(tiny, tmp_path, monkeypatch):
    """Mean, worst, best and standard deviation over the seeds; finished runs are read."""
    found = reproduce(tiny, tmp_path, seeds=2, attacked=None)
    results = [RunRecord.read(tmp_path / f"seed-{n}/run.json").results[-1] for n in (0, 1)]
    reached = [each.accuracy for each in results]
    rows = {row.metric: row for row in found.rows}
    assert set(rows) == {
        *("accuracy", "macro_recall", "seconds"),
        *("accuracy_sd", "macro_recall_sd", "seconds_sd"),
    }
    assert rows["accuracy"].median == pytest.approx(fmean(reached))
    assert (rows["accuracy"].low, rows["accuracy"].high) == (min(reached), max(reached))
    assert rows["accuracy_sd"].median == pytest.approx(stdev(reached))
    monkeypatch.setattr("secure_cnn.recipe.reproduction.run", None)
    assert reproduce(tiny, tmp_path, seeds=2, attacked=None).rows == found.rows


def test_what_was_interrupted_goes_on(tiny, tmp_path, stopped_after):
    """With the figures of one that was not."""
    with stopped_after(3):
        assert reproduce(tiny, tmp_path / "cut", seeds=1, attacked=None) is None
    cut = reproduce(tiny, tmp_path / "cut", seeds=1, attacked=None)
    whole = reproduce(tiny, tmp_path / "whole", seeds=1, attacked=None)
    figures = [{row.metric: row.median for row in each.rows} for each in (cut, whole)]
    assert figures[0]["accuracy"] == figures[1]["accuracy"]
    assert figures[0]["macro_recall"] == figures[1]["macro_recall"]


def test_a_run_whose_model_or_data_were_changed_is_refused(tiny, tmp_path, shapes):
    """The model must find on today's images what its record says; a control is untouched."""
    data = tmp_path / "mine.npz"
    arrays = dict(np.load(shapes))
    np.savez(data, **arrays)
    mine = replace(tiny, recipe=replace(tiny.recipe, data=str(data)))
    lame = replace(mine, recipe=replace(mine.recipe, learning_rate=1e-9))
    for named, folder in ((mine, "good"), (lame, "lame")):
        reproduce(named, tmp_path / folder, seeds=1, attacked=None)
    good, other = (tmp_path / f"{n}/seed-0/checkpoints/model.safetensors" for n in ("good", "lame"))
    own = good.read_bytes()
    good.write_bytes(other.read_bytes())
    with pytest.raises(RunError, match=r"does not find on .* what its record says"):
        reproduce(mine, tmp_path / "good", seeds=1, attacked=None)
    good.write_bytes(own)
    assert reproduce(mine, tmp_path / "good", seeds=1, attacked=None) is not None
    record = tmp_path / "good/seed-0/run.json"
    whole = record.read_text()
    told = json.loads(whole)
    told["results"][-1]["accuracy"] -= 0.01
    record.write_text(json.dumps(told))
    with pytest.raises(RunError, match="data, model or record were changed"):
        reproduce(mine, tmp_path / "good", seeds=1, attacked=None)
    record.write_text(whole)
    np.savez(data, **{**arrays, "images": arrays["images"][::-1]})
    with pytest.raises(RunError, match="data, model or record were changed"):
        reproduce(mine, tmp_path / "good", seeds=1, attacked=None)


def test_a_run_that_was_killed_before_its_first_state_begins_anew(tiny, tmp_path, stopped_after):
    """Nothing was saved, so no step was taken."""
    with stopped_after(3):
        assert reproduce(tiny, tmp_path, seeds=1, attacked=None) is None
    (tmp_path / "seed-0/checkpoints/training.safetensors").unlink()
    assert reproduce(tiny, tmp_path, seeds=1, attacked=None) is not None


def test_what_was_tried_on_other_images_is_not_said_of_these(
    cli, tiny, monkeypatch, shapes, tmp_path
):
    """Trials are of the recipe's own data; those that are given are said of any."""
    recipe = replace(tiny.recipe, data="digits", epsilon=8.0, trials=40)
    monkeypatch.setitem(room.NAMED, "tiny", replace(tiny, recipe=recipe))
    common = ("train", "--recipe", "tiny", "--data", shapes, "--epochs", "1", "--no-baseline")
    for more, said in (((), None), (("--trials", "7"), 7)):
        out = tmp_path / str(said)
        assert cli(*common, *more, "--out", out)[0] == 0
        assert RunRecord.read(out / "run.json").settings["trials"] == said


def test_what_a_recipe_switches_on_can_be_switched_off(cli, tiny, monkeypatch, tmp_path):
    """By the option's own negative."""
    recipe = replace(tiny.recipe, flip=True)
    monkeypatch.setitem(room.NAMED, "tiny", replace(tiny, recipe=recipe))
    words = ("train", "--recipe", "tiny", "--epochs", "1", "--no-baseline", "--out")
    for more, flips in (((), True), (("--no-flip",), False)):
        out = tmp_path / str(flips)
        assert cli(*words, out, *more)[0] == 0
        assert RunRecord.read(out / "run.json").settings["flip"] is flips


def test_a_folder_of_other_runs_is_refused(tiny, tmp_path):
    """By the setting that differs; and so are no seeds at all."""
    reproduce(tiny, tmp_path, seeds=1, attacked=None)
    other = replace(tiny, recipe=replace(tiny.recipe, epochs=3))
    with pytest.raises(RunError, match="another epochs than the recipe"):
        reproduce(other, tmp_path, seeds=1, attacked=None)
    with pytest.raises(RunError, match="seeds: expected a whole number, at least 1"):
        reproduce(tiny, tmp_path, seeds=0, attacked=None)


@pytest.mark.slow
def test_a_private_and_robust_recipe_says_what_it_rests_on(tiny, tmp_path):
    """Epsilon, delta, AutoAttack's figure and the verdicts that failed."""
    both = replace(tiny.recipe, epsilon=8.0, eps=0.02, epochs=1)
    found = reproduce(replace(tiny, recipe=both), tmp_path, seeds=1, attacked=4)
    figures = {row.metric: row.median for row in found.rows}
    assert set(figures) >= METRICS
    assert figures["epsilon"] <= 8.0
    assert 0 <= figures["autoattack"] <= 1
    assert figures["attacked"] == 4


def test_those_attacked_are_no_persons_that_were_trained_on(tmp_path, monkeypatch):
    """The images are read as the run has read them, persons included."""
    recipe = Recipe(out=tmp_path, data="photos", eps=0.02, groups="folder", image_size=8, seed=3)
    asked = []

    def load(data, **how):
        asked.append((data, how))
        return SimpleNamespace(test=range(24))

    found = SimpleNamespace(verdicts=(), samples=24, worst_case_accuracy=0.5)
    monkeypatch.setattr("secure_cnn.recipe.settings.load_data", load)
    monkeypatch.setattr("defenses.evaluate", lambda *_, **__: found)
    result = SimpleNamespace(accuracy=0.75, macro_recall=0.75)
    record = SimpleNamespace(results=(result,), epochs=(), privacy=None)
    figures = _figures(recipe, record, None, state=tmp_path / "state", attacked=None)
    assert figures["autoattack"] == 0.5
    assert asked == [("photos", {"reading": recipe.reading, "groups": "folder", "seed": 3})]


def test_agreement_is_that_of_two_means():
    """Students' interval: planted means within and without; times are the machine's."""
    before = stored([0.80, 0.81, 0.82]) + stored([1.0, 2.0, 3.0], "seconds")
    margin = 9.9248 * 0.01 * np.sqrt(1 / 3 + 1 / 2)  # t at 0.995 of two degrees of freedom
    near, far = 0.81 + 0.99 * margin, 0.81 + 1.01 * margin
    for mean, agrees in ((near, True), (far, False)):
        after = stored([mean - 0.01, mean + 0.01]) + stored([90.0, 91.0], "seconds")
        (one,) = agreements(before, after)
        assert (one.metric, one.agrees) == ("accuracy", agrees)
        assert one.margin == pytest.approx(margin, rel=1e-4)
    assert agreements(stored([0.1, 0.2], case="other"), stored([0.1, 0.2])) == []


def test_the_command_says_whether_the_figures_hold(cli, tiny, tmp_path, monkeypatch):
    """With exit code 7 where they do not, and a note where none are on record."""
    words = ("reproduce", "tiny", "--seeds", "2", "--out", tmp_path, "--json", tmp_path / "f.json")
    code, shown, err = cli(*words)
    assert (code, "accuracy" in shown, "nothing is on record for tiny" in err) == (0, True, True)
    (mean,) = [r for r in Measurements.read(tmp_path / "f.json").rows if r.metric == "accuracy"]
    for shift, expected in ((0.0, 0), (0.4, 7)):
        value = mean.median + (shift if mean.median < 0.5 else -shift)
        rows = tuple(stored([value - 0.001, value + 0.001]))
        found = Measurements(created="2026-01-01", hardware={}, versions={}, rows=rows)
        monkeypatch.setattr("secure_cnn.cli.recipes.stored_results", lambda f=found: f)
        code, _, err = cli(*words)
        assert (code, "NOT within the spread" in err) == (expected, expected == 7)


def test_a_run_with_the_settings_of_a_recipe_says_so():
    """Whatever its seed and folder are; with one setting changed it is another training."""
    one = named_recipe("fashion-private-3").recipe
    said = "Its settings are those of the recipe fashion-private-3."
    assert said in notes_before(replace(one, out="elsewhere", seed=7, baseline=False))
    assert said not in notes_before(replace(one, epochs=101))
    anywhere = replace(named_recipe("robust").recipe, data="photographs")
    assert "Its settings are those of the recipe robust." in notes_before(anywhere)
    assert not any("recipe" in note for note in notes_before(replace(one, data="mnist")))


def test_a_size_of_changes_is_shown_as_it_is_given(cli):
    """A fraction of 255 where it is one."""
    assert "eps = 8/255" in cli("recipes", "robust")[1]
    assert "eps = 0.1\n" in cli("recipes", "fashion-robust")[1]


def test_what_is_proven_of_a_model_is_among_its_figures(tmp_path, monkeypatch):
    """Where its features have a constant; the farther, the fewer images."""
    data = load_data("digits")
    monkeypatch.setattr("secure_cnn.recipe.settings.load_data", lambda *_, **__: data)
    result = SimpleNamespace(accuracy=0.75, macro_recall=0.75)
    record = SimpleNamespace(results=(result,), epochs=(), privacy=None)
    recipe = Recipe(out=tmp_path, data="digits")
    for name in ("nonexpansive", "scattering"):
        model = build_model(name, data.spec)
        figures = _figures(recipe, record, model, state=tmp_path / "state", attacked=None)
        assert (set(figures) >= PROVEN) == (name == "nonexpansive")
        shares = [figures[each] for each in sorted(PROVEN & set(figures))]
        assert shares == sorted(shares, reverse=True)
