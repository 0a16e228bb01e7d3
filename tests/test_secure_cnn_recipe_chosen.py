"""What nobody set is on record as what it came to: in `run.json`, on the page, beside others."""

import json
import math

import pytest
from support.run_records import Page, make_record
from support.saved_runs import saved_run

from secure_cnn import Recipe, run
from secure_cnn.errors import RunError
from secure_cnn.pages import render_page
from secure_cnn.record import ChosenRecord, RunRecord, compare_runs

EPOCHS = 2


@pytest.fixture
def recipe(shapes, tmp_path):
    """Makes recipes on the small data set in which nobody chose batch size, rate, delta, attack."""

    def make(name="run", **changes):
        base = {"out": tmp_path / name, "data": shapes, "epochs": EPOCHS, "robust_samples": 4}
        return Recipe(**(base | changes))

    return make


@pytest.fixture(autouse=True)
def _quick(quick):
    """No pages and no timing here."""


def chosen(variant="plain", **fields):
    """What a training came to."""
    values = {"batch_size": 16, "steps": 8, "learning_rate": 0.1}
    return ChosenRecord(variant=variant, **(values | fields))


def test_each_variant_has_what_it_was_trained_with(recipe):
    """Held against what the training itself left: its steps, its last rates, its plan."""
    done = run(recipe(epsilon=8.0, eps=0.05, warmup=0.0))
    read = RunRecord.read(done.folder.record)
    assert read.settings["batch_size"] is read.settings["learning_rate"] is None
    plain, private = read.chosen
    steps = {epoch.variant: epoch.step for epoch in read.epochs}
    assert [plain.variant, private.variant] == list(steps)
    assert [plain.steps, private.steps] == list(steps.values())
    assert plain.steps == math.ceil(read.data.train / plain.batch_size) * EPOCHS
    assert (plain.delta, plain.attack) == (None, None)
    terms = read.privacy
    assert private.batch_size == pytest.approx(terms.sampling_rate * read.data.train)
    assert (private.steps, private.delta, private.attack) == (terms.steps, terms.delta, "n-fgsm")
    for each in read.chosen:
        rates = [epoch.learning_rate for epoch in read.epochs if epoch.variant == each.variant]
        assert 0 < max(rates) < each.learning_rate


def test_what_was_set_is_what_is_on_record(recipe):
    """And a resumed run keeps what its finished trainings came to."""
    asked = recipe(eps=0.05, batch_size=20, learning_rate=0.03, attack="pgd")

    def leave(epoch):
        if epoch.variant == "pgd":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(asked, on_epoch=leave)
    done = run(asked, resume=True)
    assert [each.variant for each in done.record.chosen] == ["plain", "pgd"]
    for each in done.record.chosen:
        assert (each.batch_size, each.learning_rate) == (20, 0.03)


def test_the_page_shows_it_in_place_of_not_set():
    """With the variant where they differ; and no bracket of an empty list or object."""
    settings = {"batch_size": None, "learning_rate": None, "delta": None, "attack": None}
    settings |= {"model_options": {}, "freeze": [], "seed": 0}
    both = (
        chosen(learning_rate=0.1),
        chosen("private+n-fgsm", batch_size=32, delta=1e-5, attack="n-fgsm"),
    )
    text = Page(render_page(make_record(settings=settings, chosen=both))).text
    for words in (
        "batch size 16 (plain), 32 (private+n-fgsm)",
        "learning rate 0.1 delta",
        "delta 1e-05 attack n-fgsm",
        "steps 8",
        "model options none freeze none",
    ):
        assert words in text
    assert "not set" not in text
    assert "{}" not in text
    assert "[]" not in text
    before = Page(render_page(make_record(settings=settings))).text
    assert "batch size not set" in before


def test_runs_side_by_side_differ_in_what_they_came_to():
    """Whether it was set or not."""
    first = saved_run("a", settings={"batch_size": None}, chosen=[chosen()])
    second = saved_run("b", settings={"batch_size": 32}, chosen=[chosen(batch_size=32)])
    third = saved_run("c", settings={"batch_size": 16}, chosen=[chosen()])
    assert ("batch size", "16", "32") in compare_runs([first, second]).differences
    assert compare_runs([first, third]).differences == ()


def test_an_earlier_record_is_read_and_a_doubled_variant_is_not():
    """The field is left out where it says nothing."""
    old = make_record()
    assert "chosen" not in json.loads(json.dumps(old.to_dict()))
    with pytest.raises(RunError, match="one for each variant"):
        make_record(chosen=[chosen(), chosen()])
    with pytest.raises(RunError, match="at least 1"):
        chosen(batch_size=0)
