"""A run that did not learn says so and why it may be; one that learned says nothing."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from torch import nn

import defenses
from secure_cnn import Recipe, load_data, run
from secure_cnn.recipe.diagnosis import Conditions, learned, not_learned_note
from secure_cnn.recipe.guard import overfitting_note
from secure_cnn.recipe.variant import Variant

USUAL = Conditions(
    steps=500,
    batch_size=128,
    learning_rate=0.1,
    chosen_rate=False,
    clipped=True,
    parameters=10_000,
)


@pytest.fixture(autouse=True)
def _quick(quick):
    """No pages and no timing here."""


def guesses(classes, count, *, of=None, seed=0):
    """The confusion of a model that calls everything `of`, or guesses among all classes."""
    random = np.random.default_rng(seed)
    truth = np.arange(classes * count) % classes
    called = random.integers(classes, size=len(truth)) if of is None else np.full(len(truth), of)
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (truth, called), 1)
    return confusion.tolist()


def right(classes, count, share):
    """The confusion of a model that is right on a share of each class, and else one class off."""
    hits = round(share * count)
    found = hits * np.eye(classes, dtype=int)
    return (found + (count - hits) * np.roll(np.eye(classes, dtype=int), 1, axis=1)).tolist()


def hit(classes, count, hits):
    """The confusion of a model that is right on so many images, spread over the classes."""
    found = np.zeros((classes, classes), int)
    for image in range(classes * count):
        row = image % classes
        found[
            row, row if image < hits else (row + 1 + image // classes % (classes - 1)) % classes
        ] += 1
    return found.tolist()


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_a_model_that_calls_everything_one_class_has_not_learned(classes):
    """And the note says each sign that is there."""
    confusion = guesses(classes, 200, of=1)
    note = not_learned_note("plain", confusion, math.log(classes), USUAL)
    assert note.startswith("The training plain did not learn: accuracy is at chance")
    assert "100.0 % of the test images are called one class" in note
    assert f"against ln {classes}" in note


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_guessing_is_told_from_learning(classes):
    """Guesses are found; a level of 1 in 20 lets some of them pass, and it is not this one."""
    assert not learned(guesses(classes, 200))


@pytest.mark.parametrize(
    ("classes", "count", "share", "loss"),
    [
        (10, 100, 0.25, 2.1),
        (10, 1000, 0.60, math.log(10)),  # overconfident, and still right
        (2, 500, 0.85, math.log(2)),
        (2, 500, 0.70, 0.6),
        (4, 6, 0.9, None),
        (100, 100, 0.08, 4.2),
    ],
)
def test_a_run_that_learned_has_no_note(classes, count, share, loss):
    """However sure or unsure it is of what it says."""
    assert not_learned_note("private", right(classes, count, share), loss, USUAL) == ""


def test_the_commonest_class_is_what_there_is_to_beat():
    """Calling 95 of 100 images what 95 are is no learning; finding half of the others is."""
    assert not learned([[950, 0], [50, 0]])
    assert learned([[945, 5], [25, 25]])
    # Data of which 99 % are one class: calling nearly all so is right if the others are found.
    assert learned([[9900, 0], [20, 80]])


def test_too_few_test_images_are_said_to_be_too_few():
    """Two of four right among two classes prove nothing, and three of four neither."""
    note = not_learned_note("plain", [[2, 0], [1, 1]], 0.6, USUAL)
    assert "accuracy is not told from chance by 4 test images (75.0 %;" in note


@pytest.mark.parametrize(("classes", "count"), [(2, 5), (3, 8), (4, 6), (10, 20)])
def test_few_test_images_tell_learning_where_chance_would_rarely_do_as_well(classes, count):
    """By the binomial's own sum, one time in 20: 14 of 24 are no chance where a third would be."""
    total, chance = classes * count, stats.binom(classes * count, 1 / classes)
    for hits in range(total + 1):
        confusion = hit(classes, count, hits)
        assert learned(confusion, 0.9 * math.log(classes)) == (chance.sf(hits - 1) < 0.05)
    assert learned(hit(3, 8, 14))
    assert not learned(hit(3, 8, 12))


def test_a_lucky_guess_is_told_by_its_loss():
    """What few images cannot tell from chance for sure, and its loss calls a guess, is one."""
    lucky = hit(3, 8, 14)
    assert "the test loss is that of a guess" in not_learned_note("plain", lucky, 1.1, USUAL)
    assert learned(lucky, 0.9)
    assert learned(hit(3, 8, 17), 1.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 6}, "6 steps are too few: give more epochs, or a smaller batch size than 128"),
        ({"chosen_rate": True}, "the learning rate 0.1 does not fit"),
        ({"clipped": False}, "clip_grad_norm is 0"),
        ({"eps": 0.5, "plain_learned": True}, "eps 0.5 is too large, since the plain training"),
        ({"eps": 0.5}, "eps 0.5 is too large: try"),
        ({"noise_multiplier": 12.8}, "a step's is 10 times as long as the sum that it hides"),
        ({"plain_learned": False, "eps": 0.5}, "since the plain training did not learn either"),
        ({}, "Its settings do not say why"),
    ],
)
def test_the_reasons_are_those_that_the_settings_support(changes, said):
    """Each one alone; and the protections are no reason where the plain training failed too."""
    lost = guesses(10, 100, of=0)
    note = not_learned_note("private", lost, None, replace(USUAL, **changes))
    assert said in note
    assert note.count("or that") == 0


def test_a_training_that_stands_still_is_noted_in_the_record_and_a_good_one_is_not(
    shapes, tmp_path
):
    """Through `run`: at a rate of next to nothing the network stays as it was drawn."""
    base = {"data": shapes, "epochs": 4, "batch_size": 16, "robust_samples": 4}
    stuck = run(Recipe(out=tmp_path / "a", learning_rate=1e-9, **base))
    told = [note for note in stuck.record.notes if "did not learn" in note]
    assert len(told) == 1
    assert "16 steps are too few" in told[0]
    assert "the learning rate 1e-09 does not fit" in told[0]
    good = run(Recipe(out=tmp_path / "b", **base))
    assert good.record.results[-1].accuracy > 0.8
    assert not [note for note in good.record.notes if "did not learn" in note]


@pytest.mark.parametrize(
    ("single_step", "iterative", "told"),
    [(0.9, 0.05, True), (0.9, 0.4, True), (0.9, 0.6, False), (0.3, 0.12, False), (0.5, 0.5, False)],
)
def test_overfitting_to_single_steps_is_noted_where_it_is_likely(
    monkeypatch, single_step, iterative, told
):
    """Far apart by difference and by ratio; a weak model alone is not enough."""
    seen = defenses.training.overfitting.OverfittingVerdict(
        single_step=single_step, iterative=iterative, overfitted=single_step - iterative > 0.2
    )
    monkeypatch.setattr(defenses.OverfittingGuard, "check", lambda *_: seen)
    data, threat = load_data("digits"), defenses.ThreatModel(norm="linf", eps=0.1)
    for private in (True, False):
        variant = Variant(private=private, method="n-fgsm")
        note = overfitting_note(variant, threat, nn.Identity(), data, seed=0)
        assert (note != "") == told
        assert ("with guard" in note) == (told and not private)
    pgd = Variant(private=False, method="pgd")
    assert overfitting_note(pgd, threat, nn.Identity(), data, seed=0) == ""
