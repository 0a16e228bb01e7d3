"""Sealed files: what comes back, what everyone may know, and what a failure leaves behind."""

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PublicKey
from forging import Parts, root_of

from secure_cnn import archive
from secure_cnn.archive import loading, sealing
from secure_cnn.archive.format.payload import Payload, encrypt_file

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()
TRUSTED = [SIGNER.verifier]
STATE = {"layer.weight": torch.arange(2500, dtype=torch.float32), "layer.bias": torch.ones(3)}
CLAIMS = {"epsilon": 3.0, "private": True, "attacks": ["pgd"]}


def seal(path: Path, state=None, **settings) -> Path:
    """A small signed file of three segments."""
    settings = {"recipients": [ME.recipient], "signer": SIGNER, "claims": CLAIMS, **settings}
    archive.save(path, STATE if state is None else state, segment_length=4096, **settings)
    return path


def equal(left: dict, right: dict) -> bool:
    """Whether two flat states are the same."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_round_trip_for_every_recipient(tmp_path):
    """Each of several recipients opens the file; a stranger does not."""
    secret = archive.Passphrase("example", cost=archive.INSECURE_TEST_COST)
    one, two = archive.generate_identity(), archive.generate_identity()
    path = seal(tmp_path / "a", recipients=[one.recipient, secret, two.recipient])
    for identity in (one, two, secret):
        assert equal(archive.load(path, identity=identity, trusted=TRUSTED), STATE)
    for stranger in (archive.generate_identity(), ME, archive.Passphrase("wrong")):
        with pytest.raises(archive.WrongKey):
            archive.load(path, identity=stranger)


@pytest.mark.parametrize("count", [0, 1, 900, 1016, 5000, 9000])
@pytest.mark.parametrize("signer", [None, SIGNER])
def test_any_number_of_segments_round_trips(tmp_path, count, signer):
    """Sizes around the ends of segments, signed and unsigned, whole and as plain file."""
    state = {"x": torch.arange(count)}
    path = seal(tmp_path / "a", state, signer=signer)
    assert equal(archive.load(path, identity=ME), state)
    archive.decrypt(path, tmp_path / "plain", identity=ME)
    assert equal(safetensors.torch.load_file(tmp_path / "plain"), state)


@pytest.mark.parametrize("post_quantum", [False, True], ids=["ed25519", "with ml-dsa-65"])
def test_an_independent_reader_agrees(tmp_path, post_quantum):
    """A reader written from the format's text alone gets the same core, plaintext and signature."""
    signer = archive.generate_signer(post_quantum=post_quantum)
    place = archive.Lineage(run="r", step=3, generation=2, previous="ab" * 32)
    path = seal(tmp_path / "a", name="example", signer=signer, lineage=place)
    parts = Parts.of(path.read_bytes())
    assert parts.raw() == path.read_bytes()
    told, file_key = parts.told, parts.file_key(ME._private)
    assert (told["claims"], told["name"]) == (CLAIMS, "example")
    assert told["lineage"] == {"run": "r", "step": 3, "generation": 2, "previous": "ab" * 32}
    assert told["audience"] == [ME.recipient.key_id.hex()]
    assert parts.copies == [parts.copy(parts.slots, file_key)] * 2
    assert parts.mark == bytes(32)
    plain = parts.plaintext(file_key)
    assert equal(safetensors.torch.load(plain), STATE)
    archive.decrypt(path, tmp_path / "plain", identity=ME)
    assert (tmp_path / "plain").read_bytes() == plain
    hashed = 32 * len(parts.leaves)
    assert parts.footer[: hashed + 32] == b"".join(parts.leaves) + root_of(parts.leaves)
    public = signer.verifier.public
    signature = parts.footer[hashed + 32 + len(public) :]
    assert parts.footer[hashed + 32 :].startswith(public)
    Ed25519PublicKey.from_public_bytes(public[:32]).verify(signature[:64], parts.signed)
    if post_quantum:
        MLDSA65PublicKey.from_public_bytes(public[32:]).verify(signature[64:], parts.signed)
    info = archive.inspect(path)
    assert (info.core_hash, info.lineage) == (parts.core_hash.hex(), place)


def test_a_bad_segment_wipes_the_target(tmp_path, monkeypatch):
    """When one segment fails, what the others left in memory is zero before the error is seen."""
    path = seal(tmp_path / "a", {"x": torch.ones(9000)}, signer=None)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    targets = []
    empty = torch.empty

    def remembered(*args, **settings):
        targets.append(empty(*args, **settings))
        return targets[-1]

    monkeypatch.setattr(loading.torch, "empty", remembered)
    with pytest.raises(archive.Tampered):
        archive.load(path, identity=ME)
    assert targets
    assert not targets[0].any()


def test_expected_claims_are_compared_before_decrypting(tmp_path, monkeypatch):
    """A missing or other claim is refused; the right ones pass, tuples as lists."""
    path = seal(tmp_path / "a")
    wanted = {"epsilon": 3, "attacks": ("pgd",)}
    assert archive.load(path, identity=ME, trusted=TRUSTED, expect=wanted)
    monkeypatch.setattr(Payload, "read_into", None)
    for wrong in ({"epsilon": 1.0}, {"attacks": []}, {"private": False}):
        with pytest.raises(archive.ClaimMismatch):
            archive.load(path, identity=ME, expect=wrong)
    with pytest.raises(archive.StateError, match=r"expect\.epsilon"):
        archive.load(path, identity=ME, expect={"epsilon": float("inf")})


def test_private_claims_are_for_recipients_only(tmp_path):
    """They stand nowhere in clear, can be expected, and cannot be mixed with public ones.

    Nine bytes stand in 20 kB of ciphertext by chance with a probability of 4e-18.
    """
    private = {"customer": "acme & co", "loss": [0.1, 0.2]}
    path = seal(tmp_path / "a", private_claims=private)
    assert b"acme & co" not in path.read_bytes()
    assert archive.inspect(path).claims == CLAIMS
    with archive.open_lazy(path, identity=ME, trusted=TRUSTED) as file:
        assert (file.claims, file.private_claims) == (CLAIMS, private)
    wanted = {"epsilon": 3.0, "customer": "acme & co"}
    for only in (None, ["layer.bias"]):
        assert archive.load(path, identity=ME, expect=wanted, only=only)
        for wrong in ({"customer": "other"}, {"nobody": "said"}):
            with pytest.raises(archive.ClaimMismatch):
                archive.load(path, identity=ME, expect=wrong, only=only)
    with pytest.raises(archive.StateError, match="public or private"):
        seal(tmp_path / "b", private_claims={"epsilon": 1.0})
    with pytest.raises(archive.StateError, match="private_claims"):
        seal(tmp_path / "b", private_claims={"x": float("nan")})


@pytest.mark.parametrize(
    "wrong",
    [
        {"run": 3},
        {"step": -1},
        {"step": 2**63},
        {"step": True},
        {"generation": 1.0},
        {"previous": "zz"},
        {"previous": ""},
    ],
    ids=str,
)
def test_a_lineage_is_checked_when_made(wrong):
    """Only what the format can hold becomes a lineage."""
    with pytest.raises(archive.StateError, match=f"lineage.{next(iter(wrong))}"):
        archive.Lineage(**{"run": "r", "step": 0, "generation": 0, "previous": None, **wrong})


def test_what_was_decided_on_one_look_holds_for_the_next(tmp_path):
    """A core hash from `verify` keeps a file that was put in the place of another from opening."""
    old = seal(
        tmp_path / "old", lineage=archive.Lineage(run="r", step=1, generation=1, previous=None)
    )
    first = archive.verify(old, trusted=TRUSTED)
    after = archive.Lineage(run="r", step=2, generation=2, previous=first.core_hash)
    new = seal(tmp_path / "new", lineage=after)
    info = archive.verify(new, trusted=TRUSTED)
    assert info.lineage == after
    assert "step 2, generation 2" in str(info)
    assert archive.load(new, identity=ME, core_hash=info.core_hash)
    new.write_bytes(old.read_bytes())
    for only in (None, ["layer.bias"]):
        with pytest.raises(archive.RolledBack):
            archive.load(new, identity=ME, trusted=TRUSTED, core_hash=info.core_hash, only=only)


def test_verify_goes_deep_with_an_identity(tmp_path):
    """With a key, slots' MAC and the inside are checked too; the plaintext is not kept."""
    path = seal(tmp_path / "a")
    assert archive.verify(path, trusted=TRUSTED, deep=ME).verified
    parts = Parts.of(path.read_bytes())
    parts.copies = [copy[:40] + bytes([copy[40] ^ 1]) + copy[41:] for copy in parts.copies]
    path.write_bytes(parts.raw())
    with pytest.raises(archive.Tampered):
        archive.verify(path, trusted=TRUSTED, deep=ME)
    with pytest.raises(archive.WrongKey):
        archive.verify(seal(tmp_path / "b"), trusted=TRUSTED, deep=archive.generate_identity())


def test_bad_claims_are_refused_with_their_path(tmp_path):
    """Claims that JSON cannot hold exactly are refused, and nothing is written."""
    for bad in ({"x": float("nan")}, {"x": {1: 2}}, {"x": [torch.ones(1)]}, {"x": b""}):
        with pytest.raises(archive.StateError, match=r"claims\.x"):
            seal(tmp_path / "a", claims=bad)
    with pytest.raises(archive.LimitExceeded):
        seal(tmp_path / "a", claims={"x": "y" * (1 << 20)})
    with pytest.raises(archive.StateError, match="name"):
        seal(tmp_path / "a", name=3)
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_public_facts_and_says_unverified(tmp_path):
    """Claims, name, signer, slots and sizes are there for everyone; trust is not."""
    path = seal(tmp_path / "a", name="run 7", recipients=[ME.recipient])
    info = archive.inspect(path)
    assert (info.verified, info.version, info.name) == (False, 1, "run 7")
    assert info.claims == CLAIMS
    key_id = ME.recipient.key_id.hex()
    assert info.slots == (archive.SlotInfo(kind="x25519", key_id=key_id, sealed_for=True),)
    assert info.file_length == path.stat().st_size
    assert str(info).startswith("UNVERIFIED")
    assert '"epsilon" = 3.0' in str(info)


def test_inspect_prints_nothing_that_a_terminal_obeys(tmp_path):
    """Escape sequences in names and claims of an unverified file are shown, not sent."""
    evil = "\x1b[2J\u202e\r"
    path = seal(tmp_path / "a", name=evil, claims={evil: [evil]})
    assert str(archive.inspect(path)).replace("\n", "").isprintable()


def test_names_and_shapes_of_tensors_are_hidden(tmp_path):
    """Nothing of the plaintext stands in the file: neither names, nor dtypes, nor values.

    Five bytes stand in 20 kB of ciphertext by chance with a probability of 2e-8; F32 alone would,
    with its three, in one file of a thousand.
    """
    raw = seal(tmp_path / "a").read_bytes()
    for clear in (b"layer", b"weight", b'"F32"', STATE["layer.weight"].numpy().tobytes()[400:440]):
        assert clear not in raw


def test_two_saves_have_nothing_secret_in_common(tmp_path):
    """File id, wrapped key, IV, nonces and ciphertext are fresh each time."""
    one, two = (seal(tmp_path / name).read_bytes() for name in "ab")
    a, b = Parts.of(one), Parts.of(two)
    assert a.stream[10:] != b.stream[10:]
    ours, theirs = b"".join(a.segments), b"".join(b.segments)
    places = range(78, len(ours) - 64, 64)
    assert all(ours[at : at + 32] != theirs[at : at + 32] for at in places)
    assert a.copies[0][:200] != b.copies[0][:200]
    assert len({archive.inspect(tmp_path / name).file_id for name in "ab"}) == 2


def test_forked_processes_do_not_repeat_keys(tmp_path):
    """A file saved by a child after fork has keys and nonces of its own."""
    child = os.fork()
    if child == 0:
        archive.save(tmp_path / "child", {"x": 1}, recipients=[ME.recipient])
        os._exit(0)
    archive.save(tmp_path / "parent", {"x": 1}, recipients=[ME.recipient])
    assert os.waitpid(child, 0)[1] == 0
    files = [tmp_path / "child", tmp_path / "parent"]
    keys = set()
    for path in files:
        keys.add(Parts.of(path.read_bytes()).file_key(ME._private))
    assert len(keys) == 2
    assert len({Parts.of(path.read_bytes()).stream[10:42] for path in files}) == 2


def test_nothing_is_overwritten_unasked(tmp_path):
    """A file that is there stays, byte for byte, unless overwrite is asked for."""
    path = seal(tmp_path / "a")
    before = path.read_bytes()
    with pytest.raises(archive.StorageError, match="already there; choose another path"):
        seal(path)
    with pytest.raises(archive.StorageError):
        archive.decrypt(path, path, identity=ME)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(archive.StorageError, match="symbolic"):
        seal(tmp_path / "link", overwrite=True)
    with pytest.raises(archive.StorageError):
        seal(tmp_path, overwrite=True)
    assert path.read_bytes() == before
    seal(path, {"x": torch.zeros(1)}, overwrite=True)
    assert archive.load(path, identity=ME).keys() == {"x"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failures_leave_the_old_file_and_no_temporary(tmp_path, monkeypatch, error):
    """A full disk or an interrupt in the middle of writing changes nothing on disk."""
    path = seal(tmp_path / "a")
    before = path.read_bytes()
    plain = tmp_path / "plain"
    plain.write_bytes(b"old")
    pwrite = os.pwrite

    def failing(fd, data, offset):
        if offset > 2500:
            raise error
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    expected = archive.StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        seal(path, overwrite=True)
    with pytest.raises(expected):
        archive.decrypt(path, plain, identity=ME, overwrite=True)
    assert path.read_bytes() == before
    assert plain.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [path, plain]


def test_short_reads_and_writes_are_continued(tmp_path, monkeypatch):
    """The operating system may do less than it was asked for; the file is whole all the same."""
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:700], at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:900]], at))
    assert equal(archive.load(seal(tmp_path / "a"), identity=ME), STATE)


def test_a_file_that_came_meanwhile_stays(tmp_path, monkeypatch):
    """Without overwrite, a file made by another while ours was written is not replaced."""
    path = tmp_path / "a"

    def racing(*args, **settings):
        path.write_bytes(b"theirs")
        return encrypt_file(*args, **settings)

    monkeypatch.setattr(sealing, "encrypt_file", racing)
    with pytest.raises(archive.StorageError):
        seal(path)
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("overwrite", [True, False])
def test_bytes_are_on_disk_before_the_name_is(tmp_path, monkeypatch, overwrite):
    """The file is fsynced before it gets its name, and the folder after."""
    path, seen = tmp_path / "a", []
    fsync = os.fsync

    def recorded(fd):
        seen.append((os.path.isdir(f"/proc/self/fd/{fd}"), path.exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", recorded)
    seal(path, overwrite=overwrite)
    assert seen == [(False, False), (True, True)]


def test_folders_that_cannot_be_written_are_an_error_of_ours(tmp_path):
    """A missing folder ends in one clear error."""
    with pytest.raises(archive.StorageError, match="cannot write"):
        seal(tmp_path / "none" / "a")


def test_decrypted_files_are_private(tmp_path):
    """The plain weights are readable by their owner alone."""
    archive.decrypt(seal(tmp_path / "a"), tmp_path / "plain", identity=ME, trusted=TRUSTED)
    assert (tmp_path / "plain").stat().st_mode & 0o777 == 0o600


def test_recipients_are_checked(tmp_path):
    """Nobody, too many, and a mix of quantum-safe and classical recipients are refused."""
    with pytest.raises(archive.InvalidKey, match="at least one"):
        seal(tmp_path / "a", recipients=[])
    with pytest.raises(archive.InvalidKey, match="all hybrid"):
        seal(tmp_path / "a", recipients=[ME.recipient, archive.generate_identity().recipient])
    with pytest.raises(archive.LimitExceeded):
        seal(tmp_path / "a", recipients=[ME.recipient] * 257)
    cheap = archive.Passphrase("example", cost=archive.INSECURE_TEST_COST)
    with pytest.raises(archive.LimitExceeded, match="passphrases"):
        seal(tmp_path / "a", recipients=[cheap] * 9)
    seal(tmp_path / "a", recipients=[ME.recipient] * 256)
    assert equal(archive.load(tmp_path / "a", identity=ME), STATE)


def test_every_public_error_is_an_archive_error():
    """One except clause catches all of it."""
    from secure_cnn.errors import SecureCNNError

    errors = [
        value
        for name in archive.__all__
        if isinstance(value := getattr(archive, name), type) and issubclass(value, Exception)
    ]
    assert len(errors) == 18
    assert all(issubclass(error, archive.ArchiveError) for error in errors)
    assert issubclass(archive.ArchiveError, SecureCNNError)
