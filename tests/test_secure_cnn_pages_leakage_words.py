"""What the page of leakage says beside its figures, so that none is read for more than it is."""

import re

import pytest
from support.leakage_records import (
    attack_of,
    extraction_of,
    inversion_of,
    membership_of,
    rate_of,
    record_of,
)

from secure_cnn.pages import render_leakage
from secure_cnn.pages.membership import interval
from secure_cnn.record import ControlRecord

PRIVATE = {"epsilon": 3.0, "delta": 1e-5}


def facts_of(page):
    """The figures of the summary by their names."""
    found = re.findall(r'<span class="name">(.*?)</span><b>(.*?)</b><span>(.*?)</span>', page)
    return {name: (value, detail) for name, value, detail in found}


def weak(name="lira, permuted", width=0.427):
    """A control of memberships that are drawn by chance, whose area may be so far from a half."""
    expected = f"areas of all models 0.5 within {width:.3g}"
    return ControlRecord(name=name, expected=expected, got="0.56 of model 6", passed=True)


def test_the_summary_has_images_from_the_run_s_own_gradients():
    """A private run shares noised ones: what a clipped one gives away is not its figure."""
    inversion = [
        inversion_of("plain", 1, 15),
        inversion_of("clipped", 4, 9),
        inversion_of("noised", 4, 1),
        inversion_of("noised", 1, 0),
    ]
    private = facts_of(render_leakage(record_of(inversion=inversion, **PRIVATE)))
    assert private["Images identified"][0] == "1 of 16"
    assert "noised gradients, as of this training, batch 4" in private["Images identified"][1]
    plain = facts_of(render_leakage(record_of(inversion=inversion)))
    assert plain["Images identified"][0] == "15 of 16"
    clipped = facts_of(render_leakage(record_of(inversion=inversion[:2], **PRIVATE)))
    assert clipped["Images identified"][0] == "not told"


@pytest.mark.parametrize(
    ("identified", "asked", "fails"), [(0, 4, True), (10, 16, True), (15, 16, False)]
)
def test_an_attack_that_fails_without_protection_says_nothing_of_one(identified, asked, fails):
    """Its control is the plain gradient of one image: said above, in the section and its figure."""
    inversion = [inversion_of("plain", 1, identified, asked), inversion_of("noised", 1, 0, asked)]
    page = render_leakage(record_of(inversion=inversion, **PRIVATE))
    assert ("it fails without protection too" in page) == fails
    assert ("no control of theirs fired" in page) == fails
    found = facts_of(page)["Images identified"][1]
    assert ("says nothing of a protection" in found) == fails
    assert f"{identified} of {asked} images from plain gradients of one image" in page


def test_without_a_plain_gradient_nothing_shows_that_images_can_be_found():
    """It is said, and is no control that fired."""
    page = render_leakage(record_of(inversion=[inversion_of("noised", 1, 0)], **PRIVATE))
    assert "No plain gradient was attacked" in page
    assert "no control of theirs fired" in page


def test_a_rate_stands_beside_the_false_positive_rate_at_which_it_was_found():
    """By which it is a guess: a threshold of shadow models may name more than was asked."""
    found = {"hits": 26, "tpr": 0.26, "tpr_low": 0.2, "tpr_high": 0.3}
    named = {"false_alarms": 17, "realised_fpr": 0.17}
    rate = rate_of("target", 0.1, 0.3, 100, 100, **found, **named)
    membership = membership_of(attacks=[attack_of("lira", 0.3, rates=[rate])])
    page = render_leakage(record_of(membership=membership))
    value, detail = facts_of(page)["TPR at FPR 0.1"]
    assert (value, detail.partition(";")[0]) == ("0.260", "realised FPR 0.170: a guess finds 0.170")
    assert "0.260\n0.200–0.300\nFPR 0.170" in page


def test_the_verdict_has_the_spread_and_says_how_the_attack_was_chosen():
    """The strongest of many on the model itself flatters it; of one there was no choice."""
    page = render_leakage(record_of())
    assert "with a probability of 0.738 (0.733–0.742 over 17 models)" in page
    assert "strongest on this very model, which flatters it" in page
    one = render_leakage(record_of(membership=membership_of({"lira": 0.9})))
    assert "which flatters it" not in one


def test_a_copy_stands_beside_the_one_that_never_asked():
    """Of the best copy that has one; where none has, that is said."""
    alone = extraction_of("noise", fidelity=0.2, baseline=None, baseline_fidelity=None)
    page = render_leakage(record_of(extraction=[extraction_of(), alone]))
    value, detail = facts_of(page)["Fidelity of a copy"]
    assert value == "88.0%"
    assert detail.startswith("80.0% of a copy that never asked;")
    assert "Whoever has noise has no labels" in page
    (_, detail) = facts_of(render_leakage(record_of(extraction=[alone])))["Fidelity of a copy"]
    assert detail.startswith("no copy was made that never asked;")


def test_budgets_and_attacks_that_are_missing_are_told():
    """Which were asked; and columns of nothing are no columns."""
    bare = {"transfer": None, "baseline_transfer": None}
    page = render_leakage(record_of(extraction=[extraction_of(queries=100, **bare)]))
    assert "Asked: 100 questions. A budget of more images than a pool has is left out." in page
    assert "No attack was tried on copies" in page
    assert "attacks that transfer" not in page
    two = render_leakage(record_of(extraction=[extraction_of(queries=n) for n in (100, 1000)]))
    assert "Asked: 100 and 1,000 questions." in two
    assert "attacks that transfer" in two
    assert "No attack was tried on copies" not in two
    why = "5,000 questions were not asked."
    assert why in render_leakage(record_of(extraction=[extraction_of()], left_out=[why]))


def test_one_budget_is_drawn_as_bars():
    """A line of one dot shows nothing."""
    one = render_leakage(record_of(extraction=[extraction_of()]))
    two = render_leakage(record_of(extraction=[extraction_of(queries=n) for n in (100, 1000)]))
    assert "Copies from the pool unseen: accuracy and fidelity after 1,000 questions" in one
    assert "by queries" not in one
    assert "accuracy and fidelity by queries" in two


def test_controls_that_cannot_fail_are_not_counted_as_fired():
    """So few images leave a permuted area nearly everything; which are told."""
    strong = weak("rmia, permuted", 0.2)
    page = render_leakage(record_of(controls=[weak(), strong]))
    assert "1 of 2 controls" in page
    assert "too weak to tell anything" in page
    assert "All 2 controls" not in page
    fine = render_leakage(record_of(controls=[strong]))
    assert "too weak" not in fine


def table_of(page, label):
    """Head and rows of a table by the label of its region, each a list of texts."""
    part = page.split(f'aria-label="{label}"')[1].partition("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", part, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def test_the_title_names_run_and_data():
    """Two pages of one network are told apart."""
    page = render_leakage(record_of(run="cd" * 16))
    assert "<title>What compact (plain) leaks of animals</title>" in page
    assert "<h1>What compact (plain) leaks of animals</h1>" in page
    assert "run cdcdcdcdcdcd" in page


def test_the_rates_above_the_table_are_those_in_it():
    """Not a TPR@0.01 where so few images tell 0.1 alone."""
    membership = membership_of(others=120, models=1)
    page = render_leakage(record_of(membership=membership))
    assert "TPR@0.1 is the TPR at a FPR of 0.1" in page
    assert "TPR@0.01" not in page
    none = render_leakage(record_of(membership=membership_of(others=5, models=1)))
    assert "So few images tell no rate" in none


def test_why_a_verdict_has_no_worth_is_said():
    """No threshold of the strongest attack kept to its rate."""
    rate = rate_of("target", 0.1, 0.9, false_alarms=900, realised_fpr=0.4)
    membership = membership_of(attacks=[attack_of("lira", rates=[rate])])
    page = render_leakage(record_of(membership=membership))
    assert "<h3>What a verdict is worth</h3>" in page
    assert "Not told: no threshold of lira kept to the false positive rate" in page
    assert "Not told: no threshold" not in render_leakage(record_of())


def test_both_ends_of_an_interval_have_the_decimals_of_the_larger():
    """Six digits at one end tell no more than its width does."""
    assert interval(0.000253, 0.0545) == "0.0003–0.0545"
    assert interval(0.0, 0.000371) == "0.000000–0.000371"
    assert interval(0.2, 0.3) == "0.200–0.300"
    assert interval(0.0, 0.0) == "0.000–0.000"


def test_every_rate_in_numbers_is_narrow():
    """What belongs together stands in one cell, below one another."""
    page = render_leakage(record_of())
    head, first, *_ = table_of(page, "Every rate in numbers")
    assert head[:6] == ["attack", "whose", "FPR asked", "FPR realised", "TPR", "ties"]
    rate = record_of().membership.strongest.rates[0]
    assert first[3] == f"0.100\n{rate.false_alarms:,} of 2,250"
    assert first[4].split("\n")[0] == f"{rate.tpr:.3f}"
    assert first[4].split("\n")[2] == f"{rate.hits:,} of 2,250"
