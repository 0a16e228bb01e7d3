"""What the command prints: each figure with what it takes to read it, and a verdict."""

from dataclasses import replace

import pytest
from support.leakage_records import (
    attack_of,
    extraction_of,
    inversion_of,
    membership_of,
    rate_of,
    record_of,
)

from secure_cnn.cli.leakage import _demand
from secure_cnn.cli.leakage_told import tell
from secure_cnn.record import wording


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """What is printed of a record, without the lines' breaks."""
    monkeypatch.setenv("COLUMNS", "200")

    def printed(**changes):
        tell(record_of(**changes), tmp_path)
        both = capsys.readouterr()
        return " ".join((both.out + both.err).split())

    return printed


def test_a_rate_stands_beside_the_rate_that_it_came_to(told):
    words = told()
    rate = attack_of("lira").rate(0.01)
    assert f"{wording.fraction(rate.tpr)} at {wording.fraction(rate.realised_fpr)}" in words
    assert "beside the FPR that it came to" in words
    assert "not kept" not in words


def test_a_rate_that_is_not_kept_is_explained(told):
    """One line below the table, where there is one."""
    wide = attack_of(
        "lira",
        rates=(rate_of("target", 0.1, 0.9, others=1000, false_alarms=970, realised_fpr=0.97),),
    )
    words = told(membership=replace(membership_of(), attacks=(wide,)))
    assert "not kept: FPR 0.970" in words
    assert "not kept: that threshold names more than twice as many others as was asked" in words


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "nothing was promised of this training"),
        ({"epsilon": 3.0, "delta": 1e-4}, "nothing was found that ε = 3.00 rules out"),
    ],
)
def test_there_is_a_verdict(told, changes, verdict):
    words = told(**changes)
    assert "strongest of 5: lira, area 0." in words
    assert verdict in words


def test_without_controls_that_passed_there_is_no_verdict(told):
    failed = replace(record_of().controls[0], passed=False)
    words = told(controls=(failed,))
    assert "nothing here counts" in words
    assert "strongest of" not in words


def test_images_and_copies_are_told_too(told):
    words = told(
        inversion=(inversion_of("plain", 1, 20, 20), inversion_of("noised", 1, 0, 20)),
        left_out=("1,000 questions were not asked.",),
        extraction=(extraction_of(), extraction_of(pool="noise", baseline_fidelity=None)),
    )
    assert "20 of 20" in words
    assert "0 of 20" in words
    assert "88.0%" in words
    assert "80.0%" in words
    assert "1,000 questions were not asked." in words
    assert "nothing follows" not in words


@pytest.mark.parametrize(("found", "of"), [(0, 4), (0, 20), (10, 20)])
def test_where_no_image_is_found_without_a_protection_nothing_follows_for_one(told, found, of):
    words = told(inversion=(inversion_of("plain", 1, found, of), inversion_of("noised", 1, 0, of)))
    assert "nothing follows for a protection" in words


def test_a_demand_says_whose_threshold_its_figure_has(capsys):
    """It may be above every figure of the table, which are at thresholds of shadow models."""
    record, how = record_of(), "by the strongest attack at the threshold that is best for it"
    assert how in _demand("tpr@0.1<=0.1").missed(record)
    assert _demand("tpr@0.1<=1").missed(record) is None
    assert how in " ".join(capsys.readouterr().err.split())
    assert _demand("auc<=0.1").missed(record).endswith("by the strongest attack")
