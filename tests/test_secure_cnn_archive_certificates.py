"""Certificates: one envelope for every kind, one verifier, and no byte that may be another."""

import hashlib
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.erasures import following, make_erasure

from secure_cnn import archive
from secure_cnn.archive.certificates.statement import Envelope, parse_envelope
from secure_cnn.archive.certificates.verifying import envelope_of

SIGNER = archive.Signer(bytes(range(32)))
CHECKER = archive.Signer(bytes(range(1, 33)))
TRUSTED = [SIGNER.verifier]
DONE = archive.Certificate(
    destroyed="2026-11-20T10:30:00Z",
    file="m",
    file_id="1" * 64,
    core_hash="2" * 64,
    file_length=10,
    overwritten=5,
    other_names=0,
    unknown=("a",),
)


def bare():
    """A certificate as the first version wrote it: without type and role."""
    envelope = envelope_of(DONE, SIGNER)
    old = Envelope(
        type=envelope.type,
        statement=envelope.statement,
        signatures=envelope.signatures,
        bare=True,
    )
    return old.to_bytes()


@pytest.fixture
def path(tmp_path):
    """A signed certificate of erasure."""
    archive.write_certificate(tmp_path / "certificate.json", make_erasure(), signer=SIGNER)
    return tmp_path / "certificate.json"


def test_what_was_written_is_what_is_verified(path):
    """Value, author and digest come back; the file is there already for a second one."""
    found = archive.verify_certificate(path, trusted=TRUSTED)
    assert found.value == make_erasure()
    assert (found.kind, found.made_by) == ("erasure", SIGNER.verifier)
    assert (found.checked_by, found.others) == ((), ())
    with pytest.raises(archive.StorageError, match="already there"):
        archive.write_certificate(path, make_erasure(), signer=SIGNER)


def test_the_digest_is_that_of_the_file_as_it_was_made(tmp_path):
    """It is what any program finds, and a checker does not change it."""
    path = tmp_path / "c"
    digest = archive.write_certificate(path, make_erasure(), signer=SIGNER)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    found = archive.check_certificate(path, signer=CHECKER, trusted=TRUSTED)
    assert found.digest == digest
    assert digest != hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_second_person_checks(path):
    """Their signature counts for those who trust them, and not as that of who did it."""
    found = archive.check_certificate(path, signer=CHECKER, trusted=TRUSTED)
    assert found.checked_by == (CHECKER.verifier,)
    alone = archive.verify_certificate(path, trusted=TRUSTED)
    assert (alone.checked_by, alone.others) == ((), (CHECKER.verifier,))
    both = archive.verify_certificate(path, trusted=[*TRUSTED, CHECKER.verifier])
    assert (both.checked_by, both.others) == ((CHECKER.verifier,), ())
    with pytest.raises(archive.UntrustedSigner):
        archive.verify_certificate(path, trusted=[CHECKER.verifier])


def test_nobody_checks_twice_nor_their_own(path):
    """Refused, and the file is as it was."""
    raw = path.read_bytes()
    with pytest.raises(archive.InvalidKey, match="has not signed it"):
        archive.check_certificate(path, signer=SIGNER, trusted=TRUSTED)
    assert path.read_bytes() == raw
    archive.check_certificate(path, signer=CHECKER, trusted=TRUSTED)
    with pytest.raises(archive.InvalidKey, match="has not signed it"):
        archive.check_certificate(path, signer=CHECKER, trusted=TRUSTED)


def test_a_check_needs_a_certificate_that_holds(path):
    """What does not verify gets no signature."""
    raw = path.read_bytes()
    with pytest.raises(archive.UntrustedSigner):
        archive.check_certificate(path, signer=CHECKER, trusted=[CHECKER.verifier])
    assert path.read_bytes() == raw


def test_a_signature_is_for_its_role(path):
    """A checker's signature does not pass for an author's, nor the reverse."""
    archive.check_certificate(path, signer=CHECKER, trusted=TRUSTED)
    value = json.loads(path.read_bytes())
    made, checked = value["signatures"]
    for signatures in (
        [{**checked, "role": "made"}],
        [{**checked, "role": "made"}, {**made, "role": "checked"}],
        [{**made, "role": "checked"}],
    ):
        text = json.dumps({**value, "signatures": signatures}, sort_keys=True, separators=",:")
        path.write_text(text + "\n")
        with pytest.raises(archive.Tampered):
            archive.verify_certificate(path, trusted=[*TRUSTED, CHECKER.verifier])


def test_no_byte_may_be_another(tmp_path):
    """Every byte of a small certificate, each changed in three ways, is refused: also white space.

    With the signature of a checker whom nobody trusts in it.
    """
    path = tmp_path / "c"
    path.write_bytes(envelope_of(DONE, SIGNER).to_bytes())
    archive.check_certificate(path, signer=CHECKER, trusted=TRUSTED)
    raw = path.read_bytes()
    for at, byte in enumerate(raw):
        for other in {byte ^ 1, byte ^ 32, ord(" ")} - {byte}:
            with pytest.raises(archive.ArchiveError):
                parse_envelope(raw[:at] + bytes([other]) + raw[at + 1 :]).check()
    assert archive.verify_certificate(path, trusted=TRUSTED).value == DONE


@given(st.data())
def test_no_bytes_may_be_others(data):
    """Any splice: bytes cut out, put in, doubled; the one reader refuses what is not the file."""
    raw = data.draw(st.sampled_from([envelope_of(make_erasure(), SIGNER).to_bytes(), bare()]))
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 40)))
    put = data.draw(st.binary(max_size=20) | st.sampled_from([raw[start:end] * 2, b" ", b"\n"]))
    changed = raw[:start] + put + raw[end:]
    if changed == raw:
        return
    with pytest.raises(archive.ArchiveError):
        parse_envelope(changed).check()


@given(st.none() | st.text() | st.integers() | st.lists(st.dictionaries(st.text(), st.text())))
def test_any_json_that_is_no_certificate_is_refused(value):
    """With the right names around it, and without."""
    for each in (value, {"type": value, "statement": value, "signatures": value}):
        with pytest.raises(archive.ArchiveError):
            parse_envelope(json.dumps(each).encode())


def test_other_forms_of_one_content_are_refused(path):
    """Spaces, another order of keys, no last line end, letters unescaped, capital digits."""
    raw = path.read_bytes()
    value = json.loads(raw)
    backwards = dict(reversed(value.items()))
    capital = raw.replace(value["signatures"][0]["signature"].encode(), b"%s")
    others = [
        json.dumps(value, sort_keys=True).encode() + b"\n",
        json.dumps(backwards, separators=",:").encode() + b"\n",
        raw[:-1],
        raw + b"\n",
        b" " + raw,
        capital % value["signatures"][0]["signature"].upper().encode(),
    ]
    for each in others:
        assert each != raw
        path.write_bytes(each)
        with pytest.raises(archive.Tampered):
            archive.verify_certificate(path, trusted=TRUSTED)


def test_the_first_certificates_still_count(tmp_path):
    """Without type and role; a check makes them those of today, with the same digest."""
    path = tmp_path / "c"
    path.write_bytes(bare())
    assert set(json.loads(bare())) == {"statement", "signatures"}
    assert archive.read_certificate(path, trusted=TRUSTED) == DONE
    before = archive.verify_certificate(path, trusted=TRUSTED)
    assert before.kind == "destruction"
    after = archive.check_certificate(path, signer=CHECKER, trusted=TRUSTED)
    assert (after.value, after.digest) == (DONE, before.digest)
    assert "type" in json.loads(path.read_bytes())


def test_a_certificate_of_another_kind_is_told(path):
    """Of one that a later version makes, and of an erasure where destruction was expected."""
    with pytest.raises(archive.Tampered, match="verify_certificate"):
        archive.read_certificate(path, trusted=TRUSTED)
    new = Envelope(type="application/vnd.secure-cnn.masking.v1", statement="{}")
    path.write_bytes(new.signed(SIGNER, "made").to_bytes())
    with pytest.raises(archive.UnsupportedVersion, match="masking"):
        archive.verify_certificate(path, trusted=TRUSTED)


def test_what_was_signed_and_cannot_be_is_refused(path):
    """A maker whom one trusts signed a contradiction: it is no certificate."""
    plain = make_erasure().to_json()
    for name, value in (("people", 3), ("weight_change", 1), ("exact", False)):
        text = json.dumps({**plain, name: value}, sort_keys=True, separators=",:")
        envelope = Envelope(type="application/vnd.secure-cnn.erasure.v1", statement=text)
        path.write_bytes(envelope.signed(SIGNER, "made").to_bytes())
        with pytest.raises(archive.CertificateError):
            archive.verify_certificate(path, trusted=TRUSTED)


def test_a_long_file_is_not_read(tmp_path):
    """It is told by its length, whatever is in it."""
    with (tmp_path / "c").open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(archive.LimitExceeded):
        archive.verify_certificate(tmp_path / "c", trusted=TRUSTED)


def test_a_chain_of_certificates(tmp_path, path):
    """The second follows the first, also when somebody has checked that meanwhile."""
    first = archive.verify_certificate(path, trusted=TRUSTED)
    second = following(first.value, first.digest)
    archive.write_certificate(tmp_path / "2", second, signer=SIGNER)
    archive.check_certificate(path, signer=CHECKER, trusted=TRUSTED)
    found = archive.verify_certificate(tmp_path / "2", trusted=TRUSTED, previous=path)
    assert found.value == second
    with pytest.raises(archive.RolledBack, match="names none as the one before"):
        archive.verify_certificate(path, trusted=TRUSTED, previous=tmp_path / "2")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"previous": "0" * 64}, "names 0000"),
        ({"run_before": make_erasure().run_before}, "another model"),
        ({"data_before": make_erasure().data_before}, "other data"),
        ({"done": "2026-11-19T10:30:00Z"}, "done before it"),
    ],
)
def test_a_chain_that_does_not_hold(tmp_path, path, changed, words):
    """Another predecessor, model, data or time."""
    first = archive.verify_certificate(path, trusted=TRUSTED)
    second = replace(following(first.value, first.digest), **changed)
    archive.write_certificate(tmp_path / "2", second, signer=SIGNER)
    with pytest.raises(archive.RolledBack, match=re.escape(words)):
        archive.verify_certificate(tmp_path / "2", trusted=TRUSTED, previous=path)


def test_wrong_arguments_are_told(tmp_path):
    """No signer, no statement, no verifiers."""
    for call in (
        lambda: archive.write_certificate(tmp_path / "c", make_erasure(), signer=None),
        lambda: archive.write_certificate(tmp_path / "c", DONE, signer=SIGNER),
        lambda: archive.write_certificate(tmp_path / "c", make_erasure(), signer="text"),
        lambda: archive.check_certificate(tmp_path / "c", signer=None, trusted=TRUSTED),
        lambda: archive.verify_certificate(tmp_path / "c", trusted=SIGNER),
    ):
        with pytest.raises(archive.ArchiveError):
            call()
    assert list(tmp_path.iterdir()) == []
