"""AutoAttack: four attacks that need no tuning, run until one fools (Croce & Hein 2020).

After arXiv 2003.01690, section 5, with the constants that the published figures were made with. A
robust accuracy is called AutoAttack's only after the standard ensemble; what is cheaper has
another name.

Deliberately not here: running them. `evaluate(..., attacks=["autoattack"])` does, and attacks each
image until it is fooled.
"""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

from defenses.attacks.apgd import APGD, APGDT
from defenses.attacks.attack import Attack
from defenses.attacks.boundary import FAB, UntargetedFAB
from defenses.attacks.by_name import attack
from defenses.attacks.square import Square
from defenses.errors import AttackError
from defenses.quantities import is_word, shown
from defenses.threat import ThreatModel

__all__ = ["Preset", "ensemble"]

Preset = Literal["standard", "plus", "rand", "quick"]


def ensemble(threat: ThreatModel, preset: Preset = "standard") -> tuple[Attack, ...]:
    """The attacks of an ensemble, in their order.

    The `"standard"` is APGD on the cross-entropy (100 steps), APGD-T (100 steps towards each of 9
    wrong classes), FAB-T (the same) and Square (5000 queries), each from one start. A model of
    fewer than 10 classes has fewer targets, all its wrong classes; with 2 or 3 classes the loss of
    APGD-T is the difference of two logits, since its ratio compares four. In l1 (Croce & Hein
    2021, arXiv 2103.01208) APGD has five starts and APGD-T five wrong classes.

    `"plus"` is APGD on the cross-entropy and on the difference of logits ratio (5 starts each), FAB
    without a target (5 starts), Square, APGD-T and FAB-T: three times the cost and more, as FAB
    without a target takes a gradient for every class. The loss of the second needs 3 classes.

    `"rand"` is the version for models that answer at random: APGD on the same two losses, from one
    start, with the mean of the gradients of 20 draws. Its images are to be judged over repeated
    draws, as `evaluate` does.

    `"quick"` is no AutoAttack: APGD on the cross-entropy of logits brought to one range, and
    APGD-T towards 3 wrong classes, 50 steps each. A factor on the logits changes nothing of it. An
    image that withstands it costs 204 forward and backward passes, where the standard costs some
    1,900 and 5,000 queries. Its robust accuracy is an upper bound, usually within a point or two of
    the standard's. In l0, which has no standard, it is SparseFool and One Pixel.
    """
    if not is_word(preset, get_args(Preset)):
        known = ", ".join(get_args(Preset))
        raise AttackError(f"preset: expected one of {known}; got {shown(preset)}")
    if threat.norm == "l0" and preset != "quick":
        raise AttackError("autoattack: expected a threat model in linf, l2 or l1, got l0")
    return _PRESETS[preset](threat)


def _standard(threat: ThreatModel) -> tuple[Attack, ...]:
    """Every constant spelled out: the defaults of an attack may change, the standard's may not."""
    restarts, target_classes = (5, 5) if threat.norm == "l1" else (1, 9)
    return (
        APGD(threat, steps=100, loss="ce", restarts=restarts),
        APGDT(threat, steps=100, target_classes=target_classes),
        FAB(threat, steps=100, target_classes=9),
        Square(threat, queries=5000, largest_share=0.8, restarts=1),
    )


def _plus(threat: ThreatModel) -> tuple[Attack, ...]:
    return (
        APGD(threat, steps=100, loss="ce", restarts=5),
        APGD(threat, steps=100, loss="dlr", restarts=5),
        UntargetedFAB(threat, steps=100, restarts=5),
        Square(threat, queries=5000, largest_share=0.8, restarts=1),
        APGDT(threat, steps=100, target_classes=9),
        FAB(threat, steps=100, target_classes=9),
    )


def _rand(threat: ThreatModel) -> tuple[Attack, ...]:
    return (
        APGD(threat, steps=100, loss="ce", restarts=1, draws=20),
        APGD(threat, steps=100, loss="dlr", restarts=1, draws=20),
    )


def _quick(threat: ThreatModel) -> tuple[Attack, ...]:
    if threat.norm == "l0":
        return (attack("sparsefool", threat), attack("onepixel", threat))
    return (
        APGD(threat, steps=50, loss="scaled-ce", restarts=1),
        APGDT(threat, steps=50, target_classes=3),
    )


_PRESETS: Mapping[Preset, Callable[[ThreatModel], tuple[Attack, ...]]] = {
    "standard": _standard,
    "plus": _plus,
    "rand": _rand,
    "quick": _quick,
}
