"""AutoAttack: the constants of the standard, honest names, and the verdicts of the reference."""

import pytest
import torchattacks
from support.searched import LINF, digits, right

from defenses import AttackError, ThreatModel, attack, attack_scope
from defenses.attacks.autoattack import ensemble

L2, L1 = ThreatModel(norm="l2", eps=0.5), ThreatModel(norm="l1", eps=2.0)


@pytest.mark.parametrize(("threat", "starts", "targets"), [(LINF, 1, 9), (L2, 1, 9), (L1, 5, 5)])
def test_the_standard_is_the_papers(threat, starts, targets):
    """Order and constants, spelled out a second time."""
    members = ensemble(threat)
    assert [(member.name, member.settings) for member in members] == [
        ("apgd", {"steps": 100, "loss": "ce", "restarts": starts}),
        ("apgdt", {"steps": 100, "target_classes": targets}),
        ("fab", {"steps": 100, "target_classes": 9}),
        ("square", {"queries": 5000, "largest_share": 0.8, "restarts": 1}),
    ]
    assert all(member.threat == threat and member.radius == threat.eps for member in members)


@pytest.mark.parametrize("threat", [LINF, L2, L1])
def test_plus_and_rand_are_the_references(threat):
    """Order and constants, spelled out a second time."""
    assert [(member.name, member.settings) for member in ensemble(threat, "plus")] == [
        ("apgd", {"steps": 100, "loss": "ce", "restarts": 5}),
        ("apgd", {"steps": 100, "loss": "dlr", "restarts": 5}),
        ("fab-untargeted", {"steps": 100, "restarts": 5}),
        ("square", {"queries": 5000, "largest_share": 0.8, "restarts": 1}),
        ("apgdt", {"steps": 100, "target_classes": 9}),
        ("fab", {"steps": 100, "target_classes": 9}),
    ]
    assert [(member.name, member.settings) for member in ensemble(threat, "rand")] == [
        ("apgd", {"steps": 100, "loss": loss, "restarts": 1, "draws": 20}) for loss in ("ce", "dlr")
    ]


@pytest.mark.parametrize("threat", [LINF, L1])
def test_what_is_cheaper_is_cheaper(threat):
    """The quick ensemble takes a part of the attacks, and no more of any setting."""
    standard = {member.name: member.settings for member in ensemble(threat)}
    for member in ensemble(threat, "quick"):
        for key, value in member.settings.items():
            full = standard[member.name][key]
            assert isinstance(value, str) or value <= full


@pytest.mark.parametrize(
    ("threat", "preset", "word"),
    [
        (LINF, "cheap", "expected one of standard, plus, rand, quick; got 'cheap'"),
        (ThreatModel(norm="l0", eps=3), "standard", "linf, l2 or l1, got l0"),
    ],
)
def test_what_there_is_not_is_refused(threat, preset, word):
    """By name."""
    with pytest.raises(AttackError, match=word):
        ensemble(threat, preset)


def verdicts(threat, version):
    """Which images of the toy task withstand an ensemble."""
    model, images, labels = digits()
    standing = right(model, images, labels)
    for member in ensemble(threat, version):
        rows = standing.nonzero().flatten()
        found = member(model, images[rows], labels[rows], seed=0)
        assert threat.contains(images[rows], found).all()
        standing[rows] = right(model, found, labels[rows])
    return standing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threat", "version"),
    [(LINF, "standard"), (L2, "standard"), (L1, "standard"), (LINF, "plus"), (L2, "plus")],
)
def test_its_verdicts_are_the_references(threat, version):
    """On 60 images at most one differs; both leave some and take some."""
    reference = pytest.importorskip(
        "pyautoattack.autoattack", reason="pyautoattack is not installed"
    )
    model, images, labels = digits()
    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[threat.norm]
    with attack_scope(model, seed=0):
        judge = reference.AutoAttack(model, norm=norm, eps=threat.eps, seed=0, version=version)
        found, _ = judge.run_standard_evaluation(images, labels)
    expected, standing = right(model, found, labels), verdicts(threat, version)
    assert 5 < expected.sum() < right(model, images, labels).sum() - 5
    assert (expected != standing).sum() <= 1


@pytest.mark.parametrize("threat", [LINF, L2])
@pytest.mark.parametrize(
    ("name", "given"),
    [("apgd", {"steps": 100}), ("apgdt", {"steps": 30}), ("square", {"queries": 500})],
)
def test_a_member_fools_what_that_of_torchattacks_fools(threat, name, given):
    """With the same steps and other random starts: it misses at most two images of 60."""
    model, images, labels = digits()
    found = attack(name, threat, **given)(model, images, labels, seed=0)
    same = {key.replace("queries", "n_queries"): value for key, value in given.items()}
    kind = {"apgd": torchattacks.APGD, "apgdt": torchattacks.APGDT, "square": torchattacks.Square}
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    with attack_scope(model, seed=0):
        theirs = kind[name](model, norm=norm, eps=threat.eps, **same)(images, labels)
    ours, expected = right(model, found, labels), right(model, theirs, labels)
    assert expected.sum() < right(model, images, labels).sum() - 3
    assert (ours & ~expected).sum() <= 2
