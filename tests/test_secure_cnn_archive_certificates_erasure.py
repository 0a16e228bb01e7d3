"""What a certificate of erasure may say: types, ranges, and what can be true together."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.erasures import LEFT, PEOPLE, bounded, digests, following, make_erasure

from secure_cnn.archive import CertificateError, Erasure
from secure_cnn.archive.certificates import (
    ARTEFACT_KINDS,
    NO_GUARANTEE,
    NOT_KNOWN,
    Artefact,
    Cumulative,
    Evidence,
    MerkleTree,
    RunState,
    whole_inventory,
)
from secure_cnn.archive.format.claims import canonical_json, parse_json

IT = make_erasure()


def without_guarantee(**changed):
    """What a heuristic may say."""
    told = "There is no guarantee; the gap to re-training was measured."
    plain = {"exact": False, "method": "fine-tuning", "guarantee": told, "assumptions": ()}
    return make_erasure(**{**plain, **changed})


def test_what_holds_is_taken():
    """The three sorts of method, one that changed no weight, and one done late."""
    assert IT.exact
    assert bounded(6.573).epsilon == 6.573
    assert without_guarantee().epsilon is None
    same = replace(IT.run_after, digest=IT.run_before.digest)
    assert bounded(0.5, run_after=same, weight_change=0).weight_change == 0
    assert make_erasure(run_after=same, weight_change=0).exact
    assert not IT.late
    assert replace(IT, deadline="2026-11-15T00:00:00Z").late
    assert following(IT, "a" * 64).cumulative.people == 3


def test_times_may_be_unknown():
    """All but when it was done."""
    it = make_erasure(received="", identity_confirmed="", deadline="", ground="")
    assert not it.late


def test_ids_are_drawn():
    """Nobody has to think of one."""
    plain = {name: getattr(IT, name) for name in Erasure.__dataclass_fields__}
    del plain["certificate_id"]
    assert len({Erasure(**plain).certificate_id for _ in range(3)}) == 3


@pytest.mark.parametrize("it", [IT, bounded(0.268), without_guarantee(), following(IT, "a" * 64)])
def test_there_and_back(it):
    """Through canonical JSON it is what it was, and has one text."""
    text = canonical_json(it.to_json(), "it")
    again = Erasure.from_json(parse_json(text, "it"))
    assert again == it
    assert canonical_json(again.to_json(), "it") == text
    assert it.guarantee in str(it)


def test_whole_numbers_and_lists_are_taken_for_what_is_declared():
    """A float for an int that is one, a tuple for a list, so that equal things are equal."""
    it = make_erasure(weight_change=1, evidence=[], requests=list(IT.requests))
    assert (type(it.weight_change), it.evidence, it.requests) == (float, (), IT.requests)
    assert make_erasure(weight_change=np.float64(1.25)) == IT


def test_nothing_in_it_can_be_changed():
    """Neither a field nor a mapping, nor what it was made of."""
    versions = {"secure-cnn": "0.1.0"}
    it = make_erasure(versions=versions)
    versions["torch"] = "0"
    assert dict(it.versions) == {"secure-cnn": "0.1.0"}
    with pytest.raises(TypeError):
        it.versions["torch"] = "0"


def test_hostile_text_makes_no_lines():
    """In what is printed each text stays on its line."""
    known = [Artefact(kind="logs", name="a\nguarantee b\x1b", action="destroyed", detail="")]
    it = make_erasure(artefacts=whole_inventory(known))
    assert len(str(it).splitlines()) == len(str(IT).splitlines())
    assert "\x1b" not in str(it)


AFTER = MerkleTree(digests([each for each in PEOPLE if each not in LEFT]))
BEFORE = MerkleTree(digests(PEOPLE))
WRONG = {
    "an id": ({"certificate_id": "0" * 31}, "certificate_id"),
    "capitals in an id": ({"certificate_id": "A" * 32}, "certificate_id"),
    "no time": ({"done": ""}, "done"),
    "a time of elsewhere": ({"done": "2026-11-20T10:30:00+02:00"}, "done"),
    "a day that is none": ({"done": "2026-02-30T10:30:00Z"}, "done"),
    "confirmed before received": ({"identity_confirmed": "2026-10-02T09:00:00Z"}, "not before"),
    "done before confirmed": ({"done": "2026-11-01T10:00:00Z"}, "not before"),
    "done before received": (
        {"identity_confirmed": "", "done": "2026-10-01T10:00:00Z"},
        "not before",
    ),
    "a deadline before": ({"deadline": "2026-10-01T10:00:00Z"}, "deadline"),
    "more people than images": ({"images": 1}, "people and images"),
    "nobody": ({"people": 0, "images": 0, "requests": ()}, "people and images"),
    "a request too few": ({"requests": IT.requests[:1]}, "requests"),
    "a request twice": ({"requests": IT.requests[:1] * 2}, "requests"),
    "more requests than images": ({"images": 2, "requests": ("1" * 64, *IT.requests)}, "requests"),
    "a request that is no digest": ({"requests": ("ada", "bob")}, "keyed_digest"),
    "as many data as before": ({"data_after": IT.data_before}, "data_after"),
    "no proof": ({"absence": ()}, "absence"),
    "a proof too few": ({"absence": IT.absence[1:]}, "absence"),
    "a proof twice": ({"absence": IT.absence[:1] * 2}, "absence"),
    "a proof for other data": (
        {"data_after": MerkleTree(digests(PEOPLE[9:])).data},
        "does not hold",
    ),
    "exact and bounded": ({"epsilon": 1.0, "delta": 0.0}, "epsilon"),
    "exact and no guarantee": ({"guarantee": "No guarantee."}, "guarantee"),
    "neither, unsaid": ({"exact": False}, NO_GUARANTEE),
    "epsilon without delta": ({"exact": False, "epsilon": 1.0}, "delta"),
    "an exact method without assumptions": ({"assumptions": ()}, "assumptions"),
    "an empty assumption": ({"assumptions": (" ",)}, "assumptions"),
    "fewer so far than now": (
        {"cumulative": Cumulative(people=1, epsilon=None, delta=None)},
        "cumulative",
    ),
    "a bound so far that this time has not": (
        {"cumulative": Cumulative(people=2, epsilon=1.0, delta=0.0)},
        "cumulative",
    ),
    "a negative norm": ({"weight_change": -1.0}, "weight_change"),
    "a norm that is none": ({"weight_change": float("nan")}, "weight_change"),
    "no norm for other weights": ({"weight_change": 0.0}, "weight_change"),
    "a norm for the same weights": (
        {"run_after": replace(IT.run_after, digest=IT.run_before.digest)},
        "weight_change",
    ),
    "no method": ({"method": ""}, "method"),
    "two lines of guarantee": ({"guarantee": "a\nb"}, "guarantee"),
    "unknowns left out": ({"not_known": NOT_KNOWN[1:]}, "not_known"),
    "an artefact left out": ({"artefacts": IT.artefacts[1:]}, "raw images"),
    "a predecessor that is no digest": ({"previous": "1"}, "previous"),
    "a list of something else": ({"requests": "abc"}, "requests"),
    "a truth value for a number": ({"people": True}, "people"),
    "a number for a truth value": ({"exact": 1}, "exact"),
    "a mapping of objects": ({"versions": {"torch": object()}}, "versions"),
    "a name that is no text": ({"hardware": {1: "a"}}, "hardware"),
    "a text that is too long": ({"ground": "a" * 4001}, "ground"),
    "a text that has no bytes": ({"ground": "\ud800"}, "ground"),
    "too many": ({"evidence": IT.evidence * 5000}, "evidence"),
}


@pytest.mark.parametrize(("changed", "words"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused(changed, words):
    """Each with the name of what is wrong; unchanged it passes."""
    with pytest.raises(CertificateError, match=words):
        make_erasure(**changed)


def test_a_bound_is_said_with_its_number():
    """A sentence of another epsilon than the field is refused; one of three digits is not."""
    for epsilon in (0.0, 0.0123456, 1.0, 6.573, 123.456):
        assert bounded(epsilon).epsilon == epsilon
    it = bounded(6.573)
    for guarantee in ("Within (1, 1e-05) of it.", "Nearly as if without them.", "Within 16.573."):
        with pytest.raises(CertificateError, match=r"epsilon of 6\.57"):
            replace(it, guarantee=guarantee)
    with pytest.raises(CertificateError, match=r"at least the 6\.573"):
        replace(it, previous="a" * 64, cumulative=Cumulative(people=5, epsilon=6.0, delta=1e-5))


def test_a_method_without_a_guarantee_says_so_and_does_something():
    """It changes weights, and claims nothing."""
    same = replace(IT.run_after, digest=IT.run_before.digest)
    with pytest.raises(CertificateError, match="did nothing"):
        without_guarantee(run_after=same, weight_change=0)
    for changed in ({"epsilon": 1.0, "delta": 0.0}, {"exact": True}):
        with pytest.raises(CertificateError, match=NO_GUARANTEE):
            without_guarantee(**changed)


def test_people_may_have_left_before_the_first_certificate():
    """Their number is more than that of this time, and their bound too."""
    it = bounded(1.0)
    so_far = Cumulative(people=5, epsilon=3.0, delta=1e-5)
    assert replace(it, cumulative=so_far).cumulative == so_far


def test_requests_may_be_for_images():
    """One for each image of the people, all of them proven absent."""
    more = digests([b"a", b"b"])
    it = make_erasure(
        data_before=MerkleTree([*digests(PEOPLE), *more]).data,
        requests=(*IT.requests, *(each.hex() for each in more)),
        absence=(*IT.absence, *map(AFTER.absence, more)),
    )
    assert len(it.requests) == 4


@given(st.sampled_from(sorted(Erasure.__dataclass_fields__)), st.data())
def test_a_statement_with_other_types_is_refused(name, data):
    """Whatever stands in a field of a file: refused by name, or a certificate that holds."""
    value = data.draw(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70)
        | st.lists(st.text(max_size=70) | st.integers(), max_size=2)
        | st.dictionaries(st.text(max_size=5), st.integers(), max_size=2)
    )  # fmt: skip
    plain = {**IT.to_json(), name: value}
    with contextlib.suppress(CertificateError):
        assert isinstance(Erasure.from_json(plain), Erasure)


def test_a_statement_with_other_fields_is_refused():
    """One too few, one too many, and none."""
    plain = IT.to_json()
    for other in ({**plain, "new": 1}, {n: v for n, v in plain.items() if n != "exact"}, [], None):
        with pytest.raises(CertificateError, match="fields of version 1"):
            Erasure.from_json(other)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Artefact(kind="photos", name="", action="destroyed", detail=""),
        lambda: Artefact(kind="logs", name="", action="lost", detail=""),
        lambda: Artefact(kind="logs", name="a/b", action="destroyed", detail=""),
        lambda: Artefact(kind="logs", name="a", action="none exist", detail=""),
        lambda: Artefact(kind="logs", name="", action="retained until 2027-01-31", detail=""),
        lambda: Artefact(kind="logs", name="", action="retained until later", detail="why"),
        lambda: RunState(run="", digest="0" * 64, name="a"),
        lambda: RunState(run="1", digest="", name="a"),
        lambda: RunState(run="1", digest="0" * 64, name="/home/a"),
        lambda: Evidence(name="", value=1, low=None, high=None, n=1),
        lambda: Evidence(name="a", value=1, low=2, high=3, n=1),
        lambda: Evidence(name="a", value=1, low=None, high=3, n=1),
        lambda: Evidence(name="a", value=1, low=None, high=None, n=0),
        lambda: Evidence(name="a", value=float("inf"), low=None, high=None, n=1),
        lambda: Cumulative(people=0, epsilon=None, delta=None),
        lambda: Cumulative(people=1, epsilon=-1, delta=0),
        lambda: Cumulative(people=1, epsilon=1, delta=1),
        lambda: Cumulative(people=1, epsilon=1, delta=None),
    ],
)
def test_wrong_parts_are_refused(call):
    """Kinds and actions that are none, paths, intervals beside their value."""
    with pytest.raises(CertificateError):
        call()


def test_an_inventory_has_every_kind_in_order():
    """What nobody looked for is not known."""
    known = [Artefact(kind="logs", name=name, action="destroyed", detail="") for name in ("a", "b")]
    whole = whole_inventory(known)
    assert tuple(dict.fromkeys(each.kind for each in whole)) == ARTEFACT_KINDS
    assert [each for each in whole if each.action != "not known"] == known
