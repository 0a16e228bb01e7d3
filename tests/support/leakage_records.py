"""The record of a leakage measurement with made-up figures: attacks of a known strength."""

from statistics import NormalDist

from privacy.statistics import area_interval, clopper_pearson
from secure_cnn.record import (
    ClassRecord,
    ControlRecord,
    ExposedRecord,
    ExtractionRecord,
    InversionRecord,
    LeakageRecord,
    MembershipAttackRecord,
    MembershipRecord,
    RateRecord,
)

_NORMAL = NormalDist()
SHIFTS = {"lira": 0.9, "rmia": 0.8, "bavaria": 0.85, "attack-p": 0.3, "global-threshold": 0.25}
"""By attack, how far the scores of members are above those of others, in deviations."""
FPRS = (0.1, 0.01, 0.001)


def tpr_of(fpr, shift):
    """Of a Gaussian that is so far above another."""
    if fpr in (0.0, 1.0):
        return fpr
    return _NORMAL.cdf(_NORMAL.inv_cdf(fpr) + shift)


def rate_of(of, fpr, shift, members=2250, others=2250, **changes):
    """The rate of an attack of that shift, with the interval of its counts."""
    hits, false_alarms = round(tpr_of(fpr, shift) * members), round(fpr * others)
    low, high = clopper_pearson(hits, members, error=0.025)
    values = {
        "of": of,
        "fpr": fpr,
        "tpr": hits / members,
        "tpr_low": low,
        "tpr_high": high,
        "realised_fpr": false_alarms / others,
        "hits": hits,
        "members": members,
        "false_alarms": false_alarms,
        "others": others,
        "ties": 0,
        "ppv": {
            f"{100 * prior:g} %": prior * hits / (prior * hits + (1 - prior) * false_alarms)
            for prior in (0.01, 0.1, 0.5)
            if hits + false_alarms
        },
    }
    return RateRecord(**(values | changes))


def class_of(name, shift, others):
    """A class of a third of the images."""
    area, count = _NORMAL.cdf(shift / 2**0.5), max(1, others // 3)
    low, high = area_interval(area, count, count, error=0.025)
    return ClassRecord(name=name, area=area, low=low, high=high, members=count, others=count)


def attack_of(name, shift=None, others=2250, models=17, classes=("cat", "dog", "eel"), **changes):
    """An attack of that shift on a target with so many others and on its shadow models."""
    shift = SHIFTS.get(name, 0.0) if shift is None else shift
    grid = [0.0, *(10 ** (-4 + k / 10) for k in range(41))]
    told = [fpr for fpr in FPRS if fpr * others >= 10]
    told_of_all = [fpr for fpr in FPRS if fpr * others * models >= 10]
    values = {
        "name": name,
        "queries": 2,
        "areas": [_NORMAL.cdf((shift + 0.02 * (k % 3 - 1)) / 2**0.5) for k in range(1, models + 1)],
        "rates": [
            *(rate_of("target", fpr, shift, others, others) for fpr in told),
            *(rate_of("all", fpr, shift, others * models, others * models) for fpr in told_of_all),
            *(rate_of("oracle", fpr, shift + 0.05, others, others, ties=3) for fpr in told),
        ],
        "curve": [(min(1.0, fpr), tpr_of(min(1.0, fpr), shift)) for fpr in grid],
        "classes": [
            class_of(each, shift + 0.15 * (k % 3), others) for k, each in enumerate(classes)
        ],
    }
    return MembershipAttackRecord(**(values | changes))


def membership_of(shifts=SHIFTS, others=2250, models=17, classes=("cat", "dog", "eel"), **changes):
    """Attacks of these shifts on one target."""
    values = {
        "members": others,
        "others": others,
        "shadows": models - 1,
        "attacks": [attack_of(name, s, others, models, classes) for name, s in shifts.items()],
        "exposed": [ExposedRecord(digest=f"{k:02x}" * 32, found=8 - k, of=8) for k in range(1, 6)],
    }
    return MembershipRecord(**(values | changes))


def inversion_of(protection, batch, identified, asked=16, **changes):
    """So many images identified, and worse ones where fewer were."""
    low, high = clopper_pearson(identified, asked, error=0.025)
    share = identified / asked
    values = {"psnr": 8 + 14 * share, "ssim": 0.05 + 0.85 * share, "candidates": 1000}
    values |= {"protection": protection, "batch": batch, "identified": identified, "asked": asked}
    return InversionRecord(**(values | {"low": low, "high": high} | changes))


def extraction_of(pool="unseen", answers="probabilities", queries=1000, **changes):
    """A copy that gains on a student who never asked."""
    values = {
        "pool": pool,
        "answers": answers,
        "queries": queries,
        "accuracy": 0.84,
        "fidelity": 0.88,
        "baseline": 0.79,
        "baseline_fidelity": 0.8,
        "transfer": 0.61,
        "baseline_transfer": 0.44,
    }
    return ExtractionRecord(**(values | changes))


def record_of(**changes):
    """A plain model's memberships alone, all controls in order."""
    values = {
        "created": "2026-03-05T10:20:00+00:00",
        "hardware": {"cpu": "a processor", "memory": 2**34},
        "versions": {"torch": "2.9"},
        "model": "compact",
        "variant": "plain",
        "data": "animals",
        "classes": ("cat", "dog", "eel"),
        "run": "",
        "recipe": "ab" * 32,
        "settings": {"shadows": 16, "pool": 4500},
        "accuracy": 0.86,
        "train_accuracy": 0.99,
        "controls": [
            ControlRecord(
                name="permuted labels", expected="0.5 in the interval", got="0.492 to 0.511",
                passed=True,
            ),
        ],
        "membership": membership_of(),
    }  # fmt: skip
    return LeakageRecord(**(values | changes))
