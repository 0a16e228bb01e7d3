"""Keys: their texts, their files, their slots, and what they never show."""

import base64
import hashlib
import os
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519

from secure_cnn import archive
from secure_cnn.archive.format import slots as slots_module
from secure_cnn.archive.format.core import Core
from secure_cnn.archive.format.header import parse_header, seal_header
from secure_cnn.archive.format.slots import (
    Slot,
    SlotKind,
    check_beside,
    check_together,
    known_kinds,
    pack_slots,
    parse_slots,
    register,
)
from secure_cnn.archive.keys.identity import HYBRID, X25519
from secure_cnn.archive.keys.keyfile import encode_key
from secure_cnn.archive.keys.passphrase import ARGON2ID

FILE_KEY, CORE_HASH = b"f" * 32, b"c" * 32
PASSPHRASE = "correct horse"


def cheap(text: str = PASSPHRASE) -> archive.Passphrase:
    """A passphrase that costs nothing to guess."""
    return archive.Passphrase(text, cost=archive.INSECURE_TEST_COST)


class Vault:
    """A key service: AES key wrap would do; XOR with a hash of its context shows what is bound."""

    def __init__(self, secret=b"vault", *, ignore_context=False):
        self.secret, self.ignore_context = secret, ignore_context

    def wrap(self, key, context):
        seed = self.secret if self.ignore_context else self.secret + context
        pad = hashlib.shake_256(seed).digest(len(key))
        return bytes(a ^ b for a, b in zip(key, pad, strict=True))

    def unwrap(self, wrapped, context):
        return self.wrap(wrapped, context)


KEK = archive.generate_kek()


@pytest.fixture(params=["hybrid", "x25519", "passphrase", "kek", "service", "lax service"])
def pair(request):
    """Recipient and identity of each kind; two objects, as on two machines."""
    if request.param == "passphrase":
        return cheap(), cheap()
    if request.param == "kek":
        return KEK, archive.KeyEncryptionKey.from_text(KEK.to_text())
    if "service" in request.param:
        lax = "lax" in request.param
        return tuple(archive.ServiceKey(Vault(ignore_context=lax), "key/1") for _ in range(2))
    identity = archive.generate_identity(post_quantum=request.param == "hybrid")
    return identity.recipient, identity


def test_slots_open_for_their_owner(pair):
    """The file key comes back, and every slot has the length of its kind."""
    recipient, identity = pair
    slot = recipient.wrap(FILE_KEY, CORE_HASH)
    assert len(slot.body) in recipient.kind.body_lengths
    assert identity.unwrap([slot], CORE_HASH) == FILE_KEY
    assert FILE_KEY not in slot.body


def test_slots_are_bound_to_their_file(pair):
    """A slot that was moved to another core does not open."""
    recipient, identity = pair
    with pytest.raises((archive.Tampered, archive.WrongKey)):
        identity.unwrap([recipient.wrap(FILE_KEY, CORE_HASH)], b"d" * 32)


def test_each_byte_of_a_slot_counts(pair):
    """A changed slot does not open, and no change raises anything but our errors."""
    recipient, identity = pair
    slot = recipient.wrap(FILE_KEY, CORE_HASH)
    for at in range(0, len(slot.body), 7 if len(slot.body) > 200 else 1):
        if slot.kind == ARGON2ID.number and at < 12:
            continue  # the cost: see the test of its caps
        body = bytearray(slot.body)
        body[at] ^= 0x40
        changed = type(slot)(kind=slot.kind, key_id=slot.key_id, body=bytes(body))
        with pytest.raises((archive.Tampered, archive.WrongKey)):
            identity.unwrap([changed], CORE_HASH)


def test_two_wraps_of_one_key_differ(pair):
    """Nothing is reused between two slots of one recipient."""
    recipient, _ = pair
    first, second = (recipient.wrap(FILE_KEY, CORE_HASH).body for _ in range(2))
    assert first[12:32] != second[12:32]
    assert first[-32:] != second[-32:]


def test_hybrid_keys_are_those_of_x_wing():
    """The public key is what X-Wing expands from the seed, by an independent computation."""
    identity = archive.generate_identity()
    text = identity.to_text().removeprefix("secure-cnn-identity-secret-1-")
    seed = base64.urlsafe_b64decode(text + "==")[1:33]
    expanded = hashlib.shake_256(seed).digest(96)
    inner = mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64]).public_key()
    outer = x25519.X25519PrivateKey.from_private_bytes(expanded[64:]).public_key()
    assert identity.recipient.public == inner.public_bytes_raw() + outer.public_bytes_raw()


@pytest.mark.parametrize("post_quantum", [True, False])
def test_texts_round_trip(post_quantum):
    """Each text form gives the key back, with white space around it."""
    me, signer = archive.generate_identity(post_quantum=post_quantum), archive.generate_signer()
    assert archive.Identity.from_text(f" {me.to_text()}\n").recipient == me.recipient
    assert archive.Recipient.from_text(me.recipient.to_text()) == me.recipient
    assert archive.Signer.from_text(signer.to_text()).verifier == signer.verifier
    assert archive.Verifier.from_text(signer.verifier.to_text()) == signer.verifier


def test_a_wrong_text_is_refused_without_repeating_it():
    """One wrong character, another kind of key or a cut text is an error that shows no secret."""
    me = archive.generate_identity(post_quantum=False)
    text = me.to_text()
    wrong = [text[:-1], text[:-2] + "__", text + "A", text[:40] + "é" + text[41:], "", text[:30]]
    wrong.append(archive.generate_signer().to_text())
    wrong.append(me.recipient.to_text())
    for bad in wrong:
        with pytest.raises(archive.InvalidKey) as caught:
            archive.Identity.from_text(bad)
        assert text[35:60] not in str(caught.value)


def test_unusable_public_keys_are_refused():
    """A point of small order, a wrong length and a wrong kind never seal anything."""
    with pytest.raises(archive.InvalidKey):
        archive.Recipient(X25519, bytes(32)).wrap(FILE_KEY, CORE_HASH)
    for kind, public in (
        (X25519, bytes(31)),
        (HYBRID, b"\xff" * 1216),
        (HYBRID, bytes(1215)),
        (ARGON2ID, bytes(32)),
    ):
        with pytest.raises(archive.InvalidKey):
            archive.Recipient(kind, public)


def test_secrets_are_in_no_repr():
    """repr, str and format of whatever holds a secret show public ids only."""
    me, signer, secret = archive.generate_identity(), archive.generate_signer(), cheap()
    shown = f"{me!r} {me} {signer!r} {signer} {secret!r} {secret} {me.recipient!r} {KEK!r} {KEK}"
    assert PASSPHRASE not in shown
    for key in (me.to_text(), signer.to_text(), KEK.to_text()):
        assert key.rsplit("-1-")[1][:20] not in shown
    assert me.recipient.key_id.hex() in repr(me)


def test_key_files_are_private_and_never_overwritten(tmp_path):
    """A key file is 0600 under any umask, readable again, and not replaced."""
    old = os.umask(0)
    try:
        me, signer = archive.generate_identity(), archive.generate_signer()
        archive.write_key(tmp_path / "me", me)
        archive.write_key(tmp_path / "sign", signer)
    finally:
        os.umask(old)
    for path in (tmp_path / "me", tmp_path / "sign"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert archive.read_identity(tmp_path / "me").recipient == me.recipient
    assert archive.read_signer(tmp_path / "sign").verifier == signer.verifier
    before = (tmp_path / "me").read_bytes()
    with pytest.raises(archive.KeyFileError, match="never overwritten"):
        archive.write_key(tmp_path / "me", archive.generate_identity())
    assert (tmp_path / "me").read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602])
def test_key_files_that_others_reach_are_refused(tmp_path, mode):
    """Group and world may neither read nor write a key file; the message says what to run."""
    archive.write_key(tmp_path / "key", archive.generate_signer())
    (tmp_path / "key").chmod(mode)
    with pytest.raises(archive.KeyFileError, match="chmod 600"):
        archive.read_signer(tmp_path / "key")


def test_files_that_hold_no_key_are_refused(tmp_path):
    """Missing, folder, pipe, empty, two keys, wrong key, noise and huge: one kind of error."""
    path = tmp_path / "key"
    archive.write_key(path, archive.generate_signer())
    line = path.read_text().splitlines()[-1]
    bodies = [b"", (line + "\n" + line).encode(), line.encode(), b"\xff\0", b"x" * 100_000]
    for body in bodies:
        path.write_bytes(body)
        with pytest.raises(archive.KeyFileError, match="key"):
            archive.read_identity(path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for other in (tmp_path / "none", tmp_path, tmp_path / "pipe"):
        with pytest.raises(archive.KeyFileError):
            archive.read_identity(other)
    with pytest.raises(archive.KeyFileError):
        archive.write_key(tmp_path / "no" / "key", archive.generate_signer())


@pytest.mark.parametrize(
    ("field", "value"),
    [(0, 2**32 - 1), (0, (1 << 20) + 1), (0, 0), (1, 17), (1, 0), (2, 17), (2, 0), (1, 2**32 - 1)],
)
def test_kdf_costs_from_a_file_are_capped(monkeypatch, field, value):
    """A cost outside the limits is refused before a single derivation."""
    good = cheap().wrap(FILE_KEY, CORE_HASH)
    body = bytearray(good.body)
    body[4 * field : 4 + 4 * field] = value.to_bytes(4, "big")
    bad = type(good)(kind=good.kind, key_id=good.key_id, body=bytes(body))
    monkeypatch.setattr("secure_cnn.archive.keys.passphrase.Argon2id", None)
    with pytest.raises(archive.LimitExceeded, match="Argon2id"):
        cheap().unwrap([good, bad], CORE_HASH)


def test_passphrase_slots_are_counted(monkeypatch):
    """Many slots cannot make one opening cost many derivations."""
    slot = cheap("other").wrap(FILE_KEY, CORE_HASH)
    monkeypatch.setattr("secure_cnn.archive.keys.passphrase.Argon2id", None)
    with pytest.raises(archive.LimitExceeded, match="at most 8"):
        cheap().unwrap([slot] * 9, CORE_HASH)


def test_passphrases_agree_across_keyboards_and_are_never_empty():
    """Composed and decomposed letters are one passphrase; an empty one is none."""
    assert cheap("e\u0301").unwrap([cheap("\u00e9").wrap(FILE_KEY, CORE_HASH)], CORE_HASH)
    for bad in ("", "\ud800"):
        with pytest.raises(archive.InvalidKey):
            archive.Passphrase(bad)


def test_slots_of_unknown_kinds_are_passed_over():
    """A file sealed for a newer kind of recipient too stays readable for ours."""
    me = archive.generate_identity(post_quantum=False)
    ours = me.recipient.wrap(FILE_KEY, CORE_HASH)
    new = type(ours)(kind=99, key_id=bytes(16), body=b"anything")
    core = Core(
        file_id="00" * 32,
        created="",
        name="",
        lineage=None,
        audience=(),
        claims={},
        plaintext_length=0,
        segment_length=4096,
        signer=None,
    )
    header = parse_header(seal_header(core, [new, ours], FILE_KEY, 512))
    slots = header.copies[0].slots
    assert [slot.name for slot in slots] == ["kind 99", "x25519"]
    assert me.unwrap(slots, CORE_HASH) == FILE_KEY


@pytest.mark.parametrize("post_quantum", [True, False])
def test_signatures_hold_for_their_type_and_text_only(post_quantum):
    """A statement of one type is none of another, and a signature of a file is none at all."""
    signer = archive.generate_signer(post_quantum=post_quantum)
    again = archive.Signer.from_text(signer.to_text())
    assert again.verifier == signer.verifier
    assert archive.Verifier.from_text(signer.verifier.to_text()) == signer.verifier
    signature = again.sign_statement("text/plain", b"hello")
    signer.verifier.check_statement(signature, "text/plain", b"hello")
    wrong = [
        (signature, "text/html", b"hello"),
        (signature, "text/plain", b"hell"),
        (signature, "text/plai", b"nhello"),
        (signature[:-1], "text/plain", b"hello"),
        (signature + b"x", "text/plain", b"hello"),
        (signer.sign(b"hello", b""), "text/plain", b"hello"),
    ]
    for attempt in wrong:
        with pytest.raises(archive.Tampered):
            signer.verifier.check_statement(*attempt)


def test_a_verifier_of_another_length_than_its_kind_is_refused():
    """A key of both algorithms cannot pass for one of Ed25519, or the other way round."""
    one, both = (archive.generate_signer(post_quantum=p).verifier for p in (False, True))
    prefix = "secure-cnn-verifier-1"
    for kind, public in ((2, one.public), (1, both.public), (3, one.public)):
        with pytest.raises(archive.InvalidKey):
            archive.Verifier.from_text(encode_key(prefix, kind, public))
    for length in (0, 31, 33, 1983):
        with pytest.raises(archive.InvalidKey):
            archive.Verifier(bytes(length))


def test_slots_of_another_kind_do_not_open(pair):
    """What one kind wrapped does not open as another, whatever the slot calls itself."""
    recipient, identity = pair
    slot = recipient.wrap(FILE_KEY, CORE_HASH)
    for kind in known_kinds():
        if kind.number != slot.kind:
            moved = type(slot)(kind=kind.number, key_id=slot.key_id, body=slot.body)
            with pytest.raises(archive.WrongKey):
                identity.unwrap([moved], CORE_HASH)


def test_keys_come_from_file_environment_and_command(tmp_path):
    """Each gives the same key, and a clear error where there is none."""
    archive.write_key(tmp_path / "kek", KEK)
    script = f"print({KEK.to_text()!r})"
    found = [
        archive.read_kek(tmp_path / "kek"),
        archive.kek_from_environment({"SECURE_CNN_KEK": KEK.to_text()}),
        archive.kek_from_environment({"X": f" {KEK.to_text()} "}, "X"),
        archive.kek_from_command([sys.executable, "-c", script]),
    ]
    assert {key.key_id for key in found} == {KEK.key_id}
    missing = [
        lambda: archive.kek_from_environment({}),
        lambda: archive.kek_from_environment({"SECURE_CNN_KEK": ""}),
        lambda: archive.kek_from_command([]),
        lambda: archive.kek_from_command([str(tmp_path / "none")]),
        lambda: archive.kek_from_command([sys.executable, "-c", script + "; raise SystemExit(3)"]),
    ]
    for call in missing:
        with pytest.raises(archive.KeyServiceError) as caught:
            call()
        assert KEK.to_text()[30:] not in str(caught.value)
    for text in ("hello", KEK.to_text()[:-1], archive.generate_signer().to_text()):
        with pytest.raises(archive.InvalidKey):
            archive.kek_from_environment({"SECURE_CNN_KEK": text})


class Keyring:
    """The package `keyring`, as far as it is used; its backend is said to be in some module."""

    def __init__(self, module, entries):
        self.backend = type("Backend", (), {"__module__": module})()
        self.entries = entries

    def get_keyring(self):
        return self.backend

    def get_password(self, service, user):
        if self.entries is None:
            raise RuntimeError("locked")
        return self.entries.get((service, user))


def test_keys_come_from_a_keyring_that_protects_them(monkeypatch):
    """A real keyring gives the key; none, an unprotected, a locked and an empty one are refused."""
    entries = {("secure-cnn", "me"): KEK.to_text()}
    monkeypatch.setitem(sys.modules, "keyring", Keyring("keyring.backends.macOS", entries))
    assert archive.kek_from_keyring("secure-cnn", "me").key_id == KEK.key_id
    with pytest.raises(archive.KeyServiceError, match="has no key"):
        archive.kek_from_keyring("secure-cnn", "you")
    for module in ("keyring.backends.fail", "keyring.backends.null", "keyrings.alt.file"):
        monkeypatch.setitem(sys.modules, "keyring", Keyring(module, entries))
        with pytest.raises(archive.KeyServiceError, match="protects nothing"):
            archive.kek_from_keyring("secure-cnn", "me")
    monkeypatch.setitem(sys.modules, "keyring", Keyring("keyring.backends.macOS", None))
    with pytest.raises(archive.KeyServiceError, match="RuntimeError"):
        archive.kek_from_keyring("secure-cnn", "me")
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(archive.KeyServiceError, match="pip install keyring"):
        archive.kek_from_keyring("secure-cnn", "me")


class Broken:
    """A key service that does something else."""

    def __init__(self, answer):
        self.answer = answer

    def wrap(self, key, context):
        return self.answer(key)

    unwrap = wrap


def fail(key):
    raise ConnectionError("down")


@pytest.mark.parametrize(
    "answer",
    [fail, lambda key: b"", lambda key: bytes(1025), lambda key: key, lambda key: None],
    ids=["down", "nothing", "too much", "the key itself", "no bytes"],
)
def test_a_service_that_does_not_wrap_is_refused(answer):
    """Down, empty, too long, in clear or no bytes at all: nothing is sealed under it."""
    with pytest.raises(archive.KeyServiceError):
        archive.ServiceKey(Broken(answer), "k").wrap(FILE_KEY, CORE_HASH)


def test_a_service_that_is_down_or_lies_opens_nothing():
    """Its own error is one of ours; another key than the one wrapped is damage."""
    slot = archive.ServiceKey(Vault(), "k").wrap(FILE_KEY, CORE_HASH)
    with pytest.raises(archive.KeyServiceError, match="ConnectionError"):
        archive.ServiceKey(Broken(fail), "k").unwrap([slot], CORE_HASH)
    for answer in (lambda wrapped: bytes(32), lambda wrapped: b""):
        with pytest.raises(archive.Tampered):
            archive.ServiceKey(Broken(answer), "k").unwrap([slot], CORE_HASH)
    with pytest.raises(archive.Tampered):
        archive.ServiceKey(Vault(b"another"), "k").unwrap([slot], CORE_HASH)
    with pytest.raises(archive.WrongKey):
        archive.ServiceKey(Vault(), "other").unwrap([slot], CORE_HASH)
    for name in ("", "\ud800"):
        with pytest.raises(archive.InvalidKey):
            archive.ServiceKey(Vault(), name)


@pytest.fixture
def new_kind(monkeypatch):
    """A kind of slot that one test makes known: two to a file, with a label of its own."""
    monkeypatch.setattr(slots_module, "_KINDS", dict(slots_module._KINDS))

    def refuse(slots):
        if any(slot.body == b"bad." for slot in slots):
            raise archive.LimitExceeded("together")

    return register(
        SlotKind(
            number=77,
            name="NEW",
            body_lengths=range(4, 5),
            label="new",
            most=2,
            what="new ones",
            together=refuse,
        )
    )


def test_a_kind_says_what_it_stands_beside(new_kind):
    """A label beside another is refused, no label stands beside all, and counts have a limit."""
    for beside in ([], [ARGON2ID.number], [4, 5, 4]):
        check_beside([new_kind.number, *beside])
    for other in (HYBRID, X25519):
        with pytest.raises(
            archive.InvalidKey, match=f"or all new, got 1 {other.label} and 1 new: "
        ):
            check_beside([new_kind.number, other.number])
    with pytest.raises(
        archive.InvalidKey,
        match=r"all hybrid or all X25519 or all new, got 2 hybrid, 1 X25519 and 1 new: the file",
    ):
        check_beside([new_kind.number, 1, 2, 4, 1])
    with pytest.raises(archive.LimitExceeded, match="at most 2 new ones"):
        check_beside([new_kind.number] * 3)
    slot = Slot(kind=new_kind.number, key_id=bytes(16), body=b"good")
    check_together([slot])
    with pytest.raises(archive.LimitExceeded, match="together"):
        check_together([slot, Slot(kind=new_kind.number, key_id=bytes(16), body=b"bad.")])


def test_a_known_kind_has_its_lengths_and_an_unknown_one_is_passed_over(new_kind):
    """Readers refuse a body of another length only where they know the kind."""
    unknown = Slot(kind=78, key_id=bytes(16), body=b"longer")
    known = Slot(kind=new_kind.number, key_id=bytes(16), body=b"good")
    assert parse_slots(pack_slots([unknown, known])) == (unknown, known)
    assert (unknown.name, known.name) == ("kind 78", "new")
    with pytest.raises(archive.Tampered, match="slot 0 has a wrong length"):
        parse_slots(pack_slots([Slot(kind=new_kind.number, key_id=bytes(16), body=b"longer")]))


def test_no_two_kinds_share_a_number(new_kind):
    """A number that is taken is refused, and its kind stays; the same kind again does no harm."""
    assert register(new_kind) is new_kind
    for taken in (new_kind, HYBRID):
        other = replace(taken, label="")
        assert other == taken
        with pytest.raises(
            archive.InvalidKey,
            match=f"expected a number .* got {taken.number}, which is {taken.name}",
        ):
            register(other)
        assert any(kind is taken for kind in known_kinds())
        assert not any(kind is other for kind in known_kinds())


def test_a_taken_number_is_refused_by_optimized_python_too():
    """Where assertions are gone, no later kind takes the place of the hybrid one."""
    script = (
        "from dataclasses import replace\n"
        "from secure_cnn import archive\n"
        "from secure_cnn.archive.format.slots import known_kinds, register\n"
        "from secure_cnn.archive.keys.identity import HYBRID\n"
        "try:\n"
        "    register(replace(HYBRID, label=''))\n"
        "except archive.InvalidKey:\n"
        "    print('refused', known_kinds()[0] is HYBRID)\n"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "refused True\n"


@pytest.mark.parametrize(
    "wrong",
    [
        {"number": 1 << 16},
        {"number": -1},
        {"number": "78"},
        {"number": [78]},
        {"body_lengths": range(0)},
        {"body_lengths": range(1, (1 << 16) + 1)},
        {"body_lengths": range(-1, 4)},
    ],
)
def test_a_kind_that_no_slot_can_hold_is_not_registered(new_kind, wrong):
    """Number and body length have two bytes each in a slot."""
    kind = replace(new_kind, **{"number": 78, **wrong})
    with pytest.raises(archive.InvalidKey, match="0 to 65535, got"):
        register(kind)
    assert not any(known is kind for known in known_kinds())
