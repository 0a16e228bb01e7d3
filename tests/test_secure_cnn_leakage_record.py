"""The document of what a model leaks: it is read back equal, and refuses what makes no sense."""

import json
import math

import pytest
from support.leakage_records import (
    attack_of,
    extraction_of,
    inversion_of,
    membership_of,
    rate_of,
    record_of,
)

from privacy.leakage import Promise
from secure_cnn.errors import RunError
from secure_cnn.record import ControlRecord, ExposedRecord, LeakageRecord
from secure_cnn.record.document import OlderVersionError

FAILED = ControlRecord(name="planted leak", expected="TPR 1", got="TPR 0.2", passed=False)


def test_a_record_is_read_back_equal(tmp_path):
    """All parts of it; a perfect reconstruction, whose PSNR is infinite, too."""
    record = record_of(
        epsilon=1.0,
        delta=1e-5,
        variant="private",
        inversion=[inversion_of("plain", 1, 16, psnr=math.inf)],
        extraction=[extraction_of(baseline=None, baseline_fidelity=None, transfer=None)],
    )
    record.write(tmp_path / "leakage.json")
    assert LeakageRecord.read(tmp_path / "leakage.json") == record
    assert json.loads((tmp_path / "leakage.json").read_text())["kind"] == "leakage"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rate_of("target", 0.1, 1.0, hits=3000), "rate.hits: expected at most as many"),
        (lambda: rate_of("target", 0.1, 1.0, tpr=math.nan), "rate: expected a share"),
        (lambda: rate_of("target", 0.1, 1.0, tpr=0.01), "rate.tpr: expected a rate within"),
        (lambda: rate_of("target", 0.1, 1.0, ties=-1), "rate.hits: expected at most as many"),
        (
            lambda: rate_of("target", 0.1, 1.0, tpr=0.0, tpr_low=0.0),
            r"rate\.tpr: expected the share of \d+ of 2250, got 0\.0",
        ),
        (lambda: rate_of("all", 0.1, 1.0, realised_fpr=0.0), "rate.realised_fpr: expected the"),
        (
            lambda: attack_of("lira", areas=[0.5] * 17),
            r"\[lira\]\.areas: expected at least 0\.[67]",
        ),
        (
            lambda: attack_of("x", rates=[rate_of("target", 0.1, 1.0)] * 2),
            r"membership\[x\]\.rates: expected each once",
        ),
        (
            lambda: attack_of(
                "x", rates=[rate_of("target", 0.1, 1.0), rate_of("oracle", 0.1, 1.0, others=100)]
            ),
            r"membership\[x\]\.rates: expected one number of members",
        ),
        (lambda: attack_of("lira", areas=[math.nan]), r"membership\[lira\]: expected a share"),
        (lambda: attack_of("lira", areas=[]), "membership.areas: expected that of the target"),
        (lambda: attack_of("lira", curve=[(0.5, 0.6), (0.4, 0.7)]), r"curve: expected pairs that"),
        (lambda: membership_of({}), "membership.attacks: expected at least one"),
        (lambda: membership_of(attacks=[attack_of("a")] * 2), "membership.attacks: .*once"),
        (lambda: membership_of(others=0), "membership.others: expected some"),
        (lambda: ExposedRecord(digest="ab", found=3, of=2), "exposed.found: expected at most"),
        (lambda: inversion_of("plain", 1, 3, low=0.9, high=1.0), "inversion.low: expected an"),
        (lambda: inversion_of("plain", 1, 3, candidates=0), "inversion.identified"),
        (lambda: extraction_of(queries=-1), "extraction.queries: expected at least 0"),
        (lambda: record_of(epsilon=1.0), "leakage.epsilon: expected epsilon with delta"),
        (lambda: record_of(epsilon=-1.0, delta=1e-5), "leakage.epsilon: expected at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make, message):
    """A page would print it otherwise."""
    with pytest.raises(RunError, match=message):
        make()


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0, 900.0])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.1])
def test_what_is_allowed_is_what_the_measurement_holds_against(epsilon, delta):
    """The same formula as in `privacy`, of which a record knows nothing."""
    for promised in ((), ((epsilon, delta), (epsilon / 2, 0.2))):
        record = record_of(epsilon=epsilon, delta=delta, promised=promised)
        promise = Promise(pairs=promised or ((epsilon, delta),))
        for fpr in (0.0, 1e-4, 0.01, 0.5, 1.0):
            assert record.allowed_tpr(fpr) == promise.allowed_tpr(fpr)
    assert record_of().allowed_tpr(0.1) is None


def test_a_failed_control_and_a_broken_promise_fail_it():
    """Each alone; only the control makes it void."""
    assert record_of().passed
    void = record_of(controls=[*record_of().controls, FAILED])
    assert (void.void, void.broken, void.passed) == (True, (), False)
    broken = record_of(membership=membership_of(broken=("lira: too much",)), epsilon=1, delta=0)
    assert (broken.void, broken.broken, broken.passed) == (False, ("lira: too much",), False)


def test_the_most_that_is_found_is_the_target_s_wherever_it_resolves_it():
    """Else that of all models together; else nothing. An oracle is nobody's attack."""
    membership = membership_of(others=2250)
    attack, rate = membership.most_found(0.01)
    assert (attack.name, rate.of, rate.others) == ("lira", "target", 2250)
    attack, rate = membership.most_found(0.001)
    assert (attack.name, rate.of, rate.others) == ("lira", "all", 17 * 2250)
    assert membership_of(others=90).most_found(0.001) is None
    assert membership.resolution == pytest.approx(10 / 2250)
    told_by_none = membership_of(attacks=[attack_of("x", rates=[rate_of("oracle", 0.1, 1.0)])])
    assert told_by_none.most_found(0.1) is None
    assert told_by_none.strongest.resolved_rate(0.1) is None


def test_a_threshold_that_names_far_too_many_is_no_figure_at_the_rate_asked():
    """A guess that names a fifth of all finds a fifth of the members, not at a rate of 0.01."""
    guess = rate_of("target", 0.01, 0.0, hits=450, tpr=0.2, tpr_low=0.18, tpr_high=0.22,
                    false_alarms=450, realised_fpr=0.2)  # fmt: skip
    honest = attack_of("lira", 0.9)
    membership = membership_of(attacks=[attack_of("ties", 0.0, rates=[guess]), honest])
    assert not guess.kept
    assert membership.most_found(0.01) == (honest, honest.rate(0.01))
    alone = membership_of(attacks=[attack_of("ties", 0.0, rates=[guess])])
    assert alone.most_found(0.01) is None
    assert [row.metric for row in record_of(membership=alone).rows] == ["auc"]


def test_the_rows_are_those_that_are_resolved():
    """The area with its spread over models, and no rate that the examples cannot tell."""
    record = record_of(inversion=[inversion_of("noised", 4, 1)])
    rows = {row.metric: row for row in record.rows}
    assert list(rows) == ["auc", "tpr@0.1", "tpr@0.01", "tpr@0.001", "identified-noised-4"]
    areas = record.membership.strongest.areas
    assert (rows["auc"].low, rows["auc"].high, rows["auc"].n) == (min(areas), max(areas), 17)
    assert rows["tpr@0.001"].n == 17 * 2250
    few = record_of(membership=membership_of(others=40))
    assert [row.metric for row in few.rows] == ["auc", "tpr@0.1"]


def test_a_record_of_an_older_version_is_told_from_a_damaged_one(tmp_path):
    """What has a default came later; what has none was there from the beginning."""
    path = tmp_path / "leakage.json"
    whole = record_of(epsilon=1.0, delta=1e-5).to_dict()
    path.write_text(json.dumps({name: v for name, v in whole.items() if name != "promised"}))
    with pytest.raises(OlderVersionError, match=r"leakage\.json: .*'promised'.* older version"):
        LeakageRecord.read(path)
    path.write_text(json.dumps({n: v for n, v in whole.items() if n not in ("promised", "run")}))
    with pytest.raises(RunError, match=r"expected 'run', got no such entry; the file is damaged"):
        LeakageRecord.read(path)
