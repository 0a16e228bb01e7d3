"""Recipients that come and go, files with a new key, and the end of a file; power cuts included."""

import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from forging import SECTOR, Parts, purpose_key

from secure_cnn import archive
from secure_cnn.archive.format import slots as slots_module
from secure_cnn.archive.format.slots import NO_KEY_ID, Slot, SlotKind, register
from secure_cnn.archive.keys.identity import HYBRID, X25519
from secure_cnn.archive.keys.passphrase import ARGON2ID

ME, YOU, STRANGER = (archive.generate_identity(post_quantum=False) for _ in range(3))
SIGNER = archive.generate_signer()
TRUSTED = [SIGNER.verifier]
STATE = {"layer.weight": torch.arange(2500, dtype=torch.float32), "layer.bias": torch.ones(3)}


def seal(path, **settings):
    """A small signed file for ME."""
    settings = {"recipients": [ME.recipient], "signer": SIGNER, **settings}
    archive.save(path, STATE, segment_length=4096, **settings)
    return path


def key_id(identity):
    """As `inspect` lists it."""
    return identity.recipient.key_id.hex()


def opens(path, identity):
    """Whether an identity opens a file, whose content then is what it was."""
    try:
        state = archive.load(path, identity=identity, trusted=TRUSTED)
    except archive.WrongKey:
        return False
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    return True


def payload_of(path):
    """Everything behind the head."""
    parts = Parts.of(path.read_bytes())
    return parts.stream + b"".join(parts.segments) + parts.footer


@pytest.mark.parametrize("kind", ["hybrid", "x25519", "passphrase", "kek", "service"])
def test_recipients_of_every_kind_come_and_go(tmp_path, kind):
    """The payload keeps every byte, the signature holds, and who was removed is shut out."""
    cheap = archive.Passphrase("example", cost=archive.INSECURE_TEST_COST)
    pairs = {
        "hybrid": (new := archive.generate_identity(), new.recipient),
        "x25519": (YOU, YOU.recipient),
        "passphrase": (cheap, cheap),
        "kek": (kek := archive.generate_kek(), kek),
        "service": (service := archive.ServiceKey(Vault(), "k"), service),
    }
    identity, recipient = pairs[kind]
    me = archive.generate_identity() if kind == "hybrid" else ME
    path = seal(tmp_path / "a", recipients=[me.recipient, recipient])
    mine, other = archive.inspect(path).slots
    archive.change_recipients(path, identity=me, remove=[other.key_id])
    payload = payload_of(path)
    assert not opens(path, identity)
    room = archive.inspect(path).file_length
    archive.change_recipients(path, identity=me, add=[recipient])
    assert opens(path, identity)
    archive.change_recipients(path, identity=identity, remove=[mine.key_id])
    assert opens(path, identity)
    assert not opens(path, me)
    assert payload_of(path) == payload
    assert archive.inspect(path).file_length == room
    assert archive.verify(path, trusted=TRUSTED, deep=identity).verified


class Vault:
    """A key service of the tests: XOR with a key of its own, bound to its context."""

    def __init__(self, secret=b"vault"):
        self.secret, self.calls = secret, []

    def wrap(self, key, context):
        self.calls.append(("wrap", context))
        pad = hashlib.shake_256(self.secret + context).digest(len(key))
        return b"v1:" + bytes(a ^ b for a, b in zip(key, pad, strict=True))

    def unwrap(self, wrapped, context):
        self.calls.append(("unwrap", context))
        if not wrapped.startswith(b"v1:"):
            raise ValueError("not mine")
        return self.wrap(wrapped[3:], context)[3:]


def test_who_was_added_later_is_told_from_the_audience(tmp_path):
    """The signed audience stays; a slot that came later is marked so."""
    path = seal(tmp_path / "a")
    archive.change_recipients(path, identity=ME, add=[YOU.recipient])
    slots = archive.verify(path, trusted=TRUSTED).slots
    assert [(slot.key_id, slot.sealed_for) for slot in slots] == [
        (key_id(ME), True),
        (key_id(YOU), False),
    ]
    assert "(added later)" in str(archive.inspect(path))


def test_adding_somebody_again_wraps_anew(tmp_path):
    """No recipient has two slots, and the new one is fresh."""
    path = seal(tmp_path / "a")
    before = Parts.of(path.read_bytes()).slots
    archive.change_recipients(path, identity=ME, add=[ME.recipient])
    after = Parts.of(path.read_bytes()).slots
    assert len(after) == 1
    assert after[0][2] != before[0][2]
    assert opens(path, ME)


def test_changes_that_make_no_sense_change_nothing(tmp_path):
    """A stranger, an unknown id, nobody left, a weaker kind and a full head are refused."""
    path = seal(tmp_path / "a")
    raw = path.read_bytes()
    change = archive.change_recipients
    with pytest.raises(archive.WrongKey):
        change(path, identity=STRANGER, add=[STRANGER.recipient])
    with pytest.raises(archive.InvalidKey, match="00000"):
        change(path, identity=ME, remove=["00" * 16])
    with pytest.raises(archive.InvalidKey, match="at least one"):
        change(path, identity=ME, remove=[key_id(ME)])
    with pytest.raises(archive.InvalidKey, match="all hybrid"):
        change(path, identity=ME, add=[archive.generate_identity().recipient])
    crowd = [archive.generate_identity(post_quantum=False).recipient for _ in range(10)]
    with pytest.raises(archive.LimitExceeded, match="no room"):
        change(path, identity=ME, add=crowd)
    with pytest.raises(archive.StorageError):
        change(tmp_path / "none", identity=ME)
    assert path.read_bytes() == raw
    change(path, identity=ME, add=crowd[:2])


class Lying:
    """A recipient that declares one thing and wraps another."""

    def __init__(self, kind, slot, key_id=b"k" * 16):
        self.kind, self.key_id, self.slot = kind, key_id, slot

    def wrap(self, file_key, core_hash):
        return self.slot


def slot(kind=HYBRID.number, key_id=b"k" * 16, body=bytes(1168)):
    """One that the hybrid kind allows, unless told otherwise."""
    return Slot(kind=kind, key_id=key_id, body=body)


@pytest.mark.parametrize(
    ("recipient", "words"),
    [
        (Lying(HYBRID, slot(kind=900, body=bytes(32))), "slot of kind 1, got 900; wrap as"),
        (Lying(HYBRID, slot(kind=2, body=bytes(80))), "slot of kind 1, got 2; wrap as"),
        (Lying(HYBRID, slot(kind=1.0)), "slot of kind 1, got float; wrap as"),
        (Lying(HYBRID, slot(kind=None)), "slot of kind 1, got NoneType; wrap as"),
        (
            Lying(HYBRID, slot(key_id=ME.recipient.key_id)),
            "slot with the recipient's key_id, got another",
        ),
        (Lying(HYBRID, slot(key_id="k" * 16)), "slot.key_id: expected 16 bytes, got str"),
        (
            Lying(ARGON2ID, slot(3, b"k", bytes(92)), NO_KEY_ID),
            "slot.key_id: expected 16 bytes, got 1;",
        ),
        (Lying(HYBRID, slot(body=bytes(1169))), "body of 1168 bytes, got 1169; make it"),
        (Lying(HYBRID, slot(body=b"")), "body of 1168 bytes, got 0; make"),
        (Lying(HYBRID, slot(body="x" * 1168)), "body of 1168 bytes, got str; make"),
        (Lying(HYBRID, slot(body=bytearray(1168))), "body of 1168 bytes, got bytearray; make"),
        (Lying(HYBRID, None), "expected a Slot, got NoneType; return"),
        (Lying(HYBRID, bytes(1168)), "expected a Slot, got bytes; return"),
    ],
)
def test_a_slot_is_held_against_what_its_recipient_declares(tmp_path, recipient, words):
    """By each door that wraps; nothing is written."""
    me = archive.generate_identity()
    path = seal(tmp_path / "a", recipients=[me.recipient])
    raw = path.read_bytes()
    both = [me.recipient, recipient]
    with archive.CheckpointStore(tmp_path / "s", recipients=both, signer=SIGNER) as store:
        for call in (
            lambda: archive.save(tmp_path / "b", STATE, recipients=both),
            lambda: archive.rotate(path, identity=me, recipients=both, signer=SIGNER),
            lambda: archive.change_recipients(path, identity=me, add=[recipient]),
            lambda: (store.save(STATE, step=1), store.wait()),
        ):
            with pytest.raises(archive.InvalidKey, match=f"^Lying.*{words}"):
                call()
    assert path.read_bytes() == raw
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "s"]
    assert not list((tmp_path / "s").glob("*.sealed"))


def test_a_recipient_cannot_change_its_kind_between_check_and_wrap(tmp_path):
    """What is written is asked again: a weaker slot beside a hybrid one is refused at no time."""

    class Turning(Lying):
        """Declares one kind after the other."""

        @property
        def kind(self):
            return next(self.kinds)

        @kind.setter
        def kind(self, kinds):
            self.kinds = kinds

    me = archive.generate_identity()
    weak = slot(X25519.number, body=bytes(80))
    for honest in range(1, 6):
        kinds = itertools.chain([HYBRID] * honest, itertools.repeat(X25519))
        with pytest.raises(archive.InvalidKey, match=r"all hybrid or all X25519|slot of kind 1"):
            archive.save(tmp_path / "a", STATE, recipients=[me.recipient, Turning(kinds, weak)])
    assert not list(tmp_path.iterdir())


def test_a_recipient_of_ones_own_needs_a_registered_kind(tmp_path, monkeypatch):
    """Then its label counts, in a new file and in one that is there."""
    monkeypatch.setattr(slots_module, "_KINDS", dict(slots_module._KINDS))
    kind = SlotKind(number=900, name="MINE", body_lengths=range(32, 33), label="X25519", alone="no")
    mine = Lying(kind, slot(900, body=bytes(32)))
    strong, weak = archive.generate_identity(), ME
    paths = [
        seal(tmp_path / name, recipients=[me.recipient])
        for name, me in (("strong", strong), ("weak", weak))
    ]
    for path, me in zip(paths, (strong, weak), strict=True):
        with pytest.raises(archive.InvalidKey, match=r"add\[0\].kind.*register\(kind\) first"):
            archive.change_recipients(path, identity=me, add=[mine])
    register(kind)
    archive.save(tmp_path / "b", STATE, recipients=[weak.recipient, mine])
    archive.change_recipients(paths[1], identity=weak, add=[mine])
    assert [each.kind for each in archive.inspect(paths[1]).slots] == ["x25519", "mine"]
    with pytest.raises(archive.InvalidKey, match="all hybrid or all X25519"):
        archive.save(tmp_path / "c", STATE, recipients=[strong.recipient, mine])
    with pytest.raises(archive.InvalidKey, match="all hybrid or all X25519"):
        archive.change_recipients(paths[0], identity=strong, add=[mine])


def test_two_changes_at_once_are_refused(tmp_path):
    """Who holds the lock changes the file; another gets a clear error and changes nothing."""
    path = seal(tmp_path / "a")
    script = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        raw = path.read_bytes()
        for call in (
            lambda: archive.change_recipients(path, identity=ME, add=[YOU.recipient]),
            lambda: archive.rotate(path, identity=ME, recipients=[ME.recipient], signer=SIGNER),
            lambda: archive.shred(path),
        ):
            with pytest.raises(archive.StorageError, match="another process"):
                call()
        assert path.read_bytes() == raw
        assert opens(path, ME)
        other.stdin.close()
        other.wait()
    archive.change_recipients(path, identity=ME, add=[YOU.recipient])


def test_a_file_opens_while_its_recipients_change(tmp_path):
    """A reader never meets a state that it takes for damage."""
    path, key = seal(tmp_path / "a"), tmp_path / "key"
    archive.write_key(key, ME)
    script = (
        "import sys, threading\n"
        "from secure_cnn import archive\n"
        "me, told = archive.read_identity(sys.argv[2]), threading.Event()\n"
        "threading.Thread(target=lambda: (sys.stdin.read(), told.set())).start()\n"
        "while not told.is_set():\n"
        "    archive.change_recipients(sys.argv[1], identity=me, add=[me.recipient])\n"
    )
    command = [sys.executable, "-c", script, str(path), str(key)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as writer:
        seen = {path.read_bytes()}
        while len(seen) < 20:  # reads and changes alternate, however slow either of them is
            assert writer.poll() is None
            assert opens(path, ME)
            seen.add(path.read_bytes())
        writer.stdin.close()
    assert writer.returncode == 0


def recorded(path, monkeypatch):
    """The writes between one sync and the next while YOU takes ME's place in a file."""
    pwrite, fdatasync, epochs = os.pwrite, os.fdatasync, [[]]

    def write(fd, data, at):
        epochs[-1].append((at, bytes(data)))
        return pwrite(fd, data, at)

    def sync(fd):
        fdatasync(fd)
        epochs.append([])

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", write)
        patch.setattr(os, "fdatasync", sync)
        archive.change_recipients(path, identity=ME, add=[YOU.recipient], remove=[key_id(ME)])
    return epochs


def crashes(raw, epochs):
    """Files as a power cut can leave them: whole epochs, then any sectors of the next."""
    disk = bytearray(raw)
    for epoch in epochs:
        sectors = [
            (start, data[start - at : start - at + SECTOR])
            for at, data in epoch
            for start in range(at, at + len(data), SECTOR)
        ]
        for written in itertools.product((False, True), repeat=len(sectors)):
            torn = bytearray(disk)
            for (start, data), there in zip(sectors, written, strict=True):
                if there:
                    torn[start : start + len(data)] = data
            yield bytes(torn)
        for start, data in sectors:
            disk[start : start + len(data)] = data
    yield bytes(disk)


@pytest.mark.parametrize("post_quantum", [False, True], ids=["one sector", "several sectors"])
def test_a_power_cut_while_changing_recipients_loses_nothing(tmp_path, monkeypatch, post_quantum):
    """Whatever sectors reached the disk: the file opens for one side or the other, and mends."""
    if post_quantum:
        monkeypatch.setattr(sys.modules[__name__], "ME", archive.generate_identity())
        monkeypatch.setattr(sys.modules[__name__], "YOU", archive.generate_identity())
    path = seal(tmp_path / "a")
    raw = path.read_bytes()
    epochs = recorded(path, monkeypatch)
    assert [len(epoch) for epoch in epochs] == [1, 1, 1, 1]
    after = path.read_bytes()
    assert Parts.of(after).mark == bytes(32)
    seen = set()
    for torn in crashes(raw, epochs):
        if torn in seen:
            continue
        seen.add(torn)
        path.write_bytes(torn)
        before, now = opens(path, ME), opens(path, YOU)
        assert before or now
        assert archive.inspect(path).slots
        assert archive.verify(path, trusted=TRUSTED).verified
        archive.change_recipients(path, identity=ME if before else YOU, add=[YOU.recipient])
        assert opens(path, YOU)
        assert Parts.of(path.read_bytes()).mark == bytes(32)
    assert len(seen) > (12 if post_quantum else 3)


def test_a_failing_disk_while_changing_recipients_is_one_clear_error(tmp_path, monkeypatch):
    """An error at any write or sync is ours, and the file opens afterwards."""
    pwrite, fdatasync = os.pwrite, os.fdatasync
    for name, inner in (("pwrite", pwrite), ("fdatasync", fdatasync)):
        for failing in range(3):
            path = seal(tmp_path / f"{name}{failing}")
            calls = []

            def call(*args, inner=inner, calls=calls, failing=failing):
                calls.append(args)
                if len(calls) == failing + 1:
                    raise OSError(errno.EIO, "Input/output error")
                return inner(*args)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, call)
                with pytest.raises(archive.StorageError, match="Input/output"):
                    archive.change_recipients(path, identity=ME, add=[YOU.recipient])
            assert opens(path, ME)
            archive.change_recipients(path, identity=ME, add=[YOU.recipient])
            assert opens(path, YOU)


def interrupted(path, mark=None):
    """The parts of a file whose change was cut off: its mark stands, copy A is noise."""
    parts = Parts.of(path.read_bytes())
    file_key = parts.file_key(ME._private)
    parts.mark = purpose_key(file_key, b"mark") if mark is None else mark
    parts.copies[0] = b"\x01" * len(parts.copies[0])
    return parts


def test_a_mark_only_excuses_what_it_should(tmp_path):
    """With the mark one noisy copy is passed over; a made-up mark, or two noisy copies, are not."""
    path = seal(tmp_path / "a")
    good = interrupted(path)
    made_up = interrupted(path, mark=b"\x01" * 32)
    path.write_bytes(good.raw())
    assert opens(path, ME)
    path.write_bytes(made_up.raw())
    with pytest.raises(archive.Tampered):
        archive.load(path, identity=ME)
    good.copies[1] = good.copies[0]
    path.write_bytes(good.raw())
    with pytest.raises(archive.Tampered):
        archive.load(path, identity=ME)
    without = interrupted(seal(tmp_path / "b"), mark=bytes(32))
    path.write_bytes(without.raw())
    with pytest.raises(archive.Tampered):
        archive.inspect(path)


def test_every_changed_byte_of_an_interrupted_file_is_refused_or_passed_over(tmp_path):
    """Nothing but our errors, and never another content."""
    path = seal(tmp_path / "a")
    parts = interrupted(path)
    raw = parts.raw()
    head = len(raw) - len(payload_of(path))
    for at in range(0, head, 3):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        try:
            state = archive.load(path, identity=ME)
        except archive.ArchiveError:
            continue
        assert torch.equal(state["layer.bias"], STATE["layer.bias"])
        # What opened had its damage in the copy that the mark excuses.
        assert head - 2 * parts.copy_length <= at < head - parts.copy_length


def test_rotation_shuts_out_whoever_kept_the_file_key(tmp_path):
    """All that is secret is new; what the file says stays, and it is signed again."""
    place = archive.Lineage(run="r", step=3, generation=2, previous=None)
    settings = {"claims": {"epsilon": 3.0}, "private_claims": {"customer": "acme"}}
    path = seal(tmp_path / "a", name="x", lineage=place, **settings)
    path.chmod(0o600)
    old, kept = archive.inspect(path), Parts.of(path.read_bytes())
    old_key = kept.file_key(ME._private)
    archive.rotate(path, identity=ME, recipients=[YOU.recipient], signer=SIGNER)
    assert opens(path, YOU)
    assert not opens(path, ME)
    new = Parts.of(path.read_bytes())
    assert new.file_key(YOU._private) != old_key
    assert new.stream != kept.stream
    assert not {*new.segments} & {*kept.segments}
    info = archive.verify(path, trusted=TRUSTED, deep=YOU)
    for name in ("name", "lineage", "claims", "plaintext_length", "segment_length"):
        assert getattr(info, name) == getattr(old, name)
    assert info.core_hash != old.core_hash
    assert info.file_id != old.file_id
    assert archive.load(path, identity=YOU, expect={"customer": "acme"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_rotation_signs_only_what_was_signed(tmp_path):
    """A signed file needs a signer, who vouches for nothing but what a trusted one vouched for."""
    path, unsigned = seal(tmp_path / "a"), seal(tmp_path / "b", signer=None)
    mallory = archive.generate_signer()
    for file, settings, error in (
        (path, {}, archive.InvalidKey),
        (path, {"signer": mallory}, archive.UntrustedSigner),
        (unsigned, {"signer": SIGNER}, archive.UntrustedSigner),
        (path, {"signer": SIGNER, "identity": STRANGER}, archive.WrongKey),
        (path, {"signer": SIGNER, "recipients": []}, archive.InvalidKey),
    ):
        raw = file.read_bytes()
        with pytest.raises(error):
            archive.rotate(file, **{"identity": ME, "recipients": [YOU.recipient], **settings})
        assert file.read_bytes() == raw
    archive.rotate(unsigned, identity=ME, recipients=[YOU.recipient])
    assert archive.inspect(unsigned).signer is None
    archive.rotate(path, identity=ME, recipients=[ME.recipient], signer=mallory, trusted=TRUSTED)
    assert archive.verify(path, trusted=[mallory.verifier]).verified


def test_a_broken_segment_stops_a_rotation(tmp_path):
    """The old file stays, no new one appears."""
    path = seal(tmp_path / "a", signer=None)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(archive.Tampered):
        archive.rotate(path, identity=ME, recipients=[YOU.recipient])
    assert path.read_bytes() == raw
    assert list(tmp_path.iterdir()) == [path]


def test_shredding_destroys_the_keys_before_the_name(tmp_path):
    """Another name of the same file shows it: its slots are noise, synced, and nobody opens it."""
    path = seal(tmp_path / "a")
    (tmp_path / "other").hardlink_to(path)
    before = Parts.of(path.read_bytes())
    done = archive.shred(path, certificate=tmp_path / "certificate", signer=SIGNER)
    assert not path.exists()
    assert (done.file, done.core_hash, done.other_names) == ("a", before.core_hash.hex(), 1)
    assert any("backups" in text for text in done.unknown)
    assert "not known" in str(done)
    raw = (tmp_path / "other").read_bytes()
    after = Parts.of(raw)
    for copy in after.copies:
        assert before.slots[0][2][32:] not in copy
        assert before.slots[0][1] not in copy
    for call in (archive.inspect, lambda path: archive.load(path, identity=ME)):
        with pytest.raises((archive.Tampered, archive.LimitExceeded)):
            call(tmp_path / "other")
    assert archive.read_certificate(tmp_path / "certificate", trusted=TRUSTED) == done


def test_certificates_count_only_when_signed_by_whom_one_trusts(tmp_path):
    """Unsigned, of another, edited, or no certificate at all: refused."""
    certificate, mallory = tmp_path / "c", archive.generate_signer()
    archive.shred(seal(tmp_path / "a"), certificate=certificate, signer=mallory)
    with pytest.raises(archive.UntrustedSigner):
        archive.read_certificate(certificate, trusted=TRUSTED)
    raw = certificate.read_bytes()
    edited = raw.replace(b'\\"file\\":\\"a\\"', b'\\"file\\":\\"b\\"')
    assert edited != raw
    certificate.write_bytes(edited)
    with pytest.raises(archive.Tampered):
        archive.read_certificate(certificate, trusted=[mallory.verifier])
    statement = json.loads(raw)["statement"]
    for bad in (b"", b"{}", b"[]", json.dumps({"statement": 1, "signatures": []}).encode()):
        certificate.write_bytes(bad)
        with pytest.raises(archive.Tampered):
            archive.read_certificate(certificate, trusted=TRUSTED)
    certificate.write_text(json.dumps({"statement": statement, "signatures": [{"x": 1}]}))
    with pytest.raises(archive.Tampered):
        archive.read_certificate(certificate, trusted=TRUSTED)
    archive.shred(seal(tmp_path / "b"), certificate=tmp_path / "unsigned")
    with pytest.raises(archive.UntrustedSigner):
        archive.read_certificate(tmp_path / "unsigned", trusted=TRUSTED)


def test_shredding_stops_before_it_starts(tmp_path):
    """A link, a certificate that is there, a signer without one: the file is as it was."""
    path = seal(tmp_path / "a")
    raw = path.read_bytes()
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "c").write_text("here")
    for file, settings, error in (
        (tmp_path / "link", {}, archive.StorageError),
        (path, {"certificate": tmp_path / "c"}, archive.StorageError),
        (path, {"certificate": tmp_path / "no" / "c"}, archive.StorageError),
        (path, {"signer": SIGNER}, archive.InvalidKey),
    ):
        with pytest.raises(error):
            archive.shred(file, **settings)
        assert path.read_bytes() == raw
        assert opens(path, ME)
