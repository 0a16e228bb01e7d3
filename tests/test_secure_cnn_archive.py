"""Sealed files: what holds, what everyone may know, and what every attack we know of ends in."""

import hashlib
import hmac
import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from secure_cnn import archive
from secure_cnn.archive import claims as claims_module
from secure_cnn.archive import sealed
from secure_cnn.archive.header import Core, derive_key, hash_core, parse_header, seal_header
from secure_cnn.archive.payload import encrypt_file, write_at
from secure_cnn.archive.pieces import Pieces
from secure_cnn.archive.signatures import merkle_root
from secure_cnn.archive.state import encode_state
from secure_cnn.archive.stream import HEADER_LENGTH, create_stream, open_stream

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


def offsets(path: Path) -> tuple[int, int]:
    """Where payload and footer of a file start."""
    core = parse_header(path.read_bytes()).core
    layout = sealed._layout(core)
    return layout.offset, layout.end


def new_footer(old: bytes, leaves: list[bytes]) -> bytes:
    """The footer that fits the new ciphertext, with the old signature; none if there was none."""
    return b"".join(leaves) + merkle_root(leaves) + old[-64:] if old else old


def forge(path: Path, *, core=None, state=None, footer=new_footer, same_stream=False) -> None:
    """Rewrites a file as a reader can, who has the file key but not the signing key."""
    raw = path.read_bytes()
    header = parse_header(raw)
    file_key = ME.unwrap(header.slots, header.core_hash)
    new_core = core(header.core) if core else header.core
    core_hash = hash_core(new_core.to_bytes())
    layout, old_end = sealed._layout(new_core), sealed._layout(header.core).end
    key = derive_key(file_key, b"payload")
    floe = create_stream(key, core_hash, new_core.segment_length)
    if same_stream:
        floe = open_stream(key, core_hash, raw[layout.offset : layout.offset + HEADER_LENGTH])
    with path.open("r+b") as file:
        plaintext = Pieces(encode_state(STATE if state is None else state))
        leaves = encrypt_file(file.fileno(), layout, floe, plaintext, hashed=True)
        write_at(file.fileno(), memoryview(footer(raw[old_end:], leaves)), layout.end)
        slots = [ME.recipient.wrap(file_key, core_hash)]
        write_at(file.fileno(), memoryview(seal_header(new_core, slots, file_key)), 0)


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


def independent_reader(raw: bytes, private: X25519PrivateKey) -> tuple[dict, bytes]:
    """Core and plaintext by docs/format.md alone, with nothing of ours."""
    magic, version, flags, core_length, slots_length = struct.unpack_from(">8sHHII", raw)
    assert (magic, version, flags) == (b"\x93SCNN\r\n\x00", 0, 0)
    core_end = 20 + core_length
    core = json.loads(raw[20:core_end])
    core_hash = hashlib.sha256(raw[:16] + raw[20:core_end]).digest()
    kind, length, key_id = struct.unpack_from(">HH16s", raw, core_end)
    body = raw[core_end + 20 : core_end + 20 + length]
    assert (kind, slots_length) == (2, 100)
    public = private.public_key().public_bytes_raw()
    assert key_id == hashlib.sha256(public).digest()[:16]
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    file_key = suite.decrypt(body, private, info=b"secure-cnn/sealed/v0/slot|" + core_hash)

    def derived(purpose):
        info = b"secure-cnn/sealed/v0/" + purpose
        return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(file_key)

    mac_at = core_end + slots_length
    mac = hmac.digest(derived(b"header"), raw[:mac_at], "sha256")
    assert mac == raw[mac_at : mac_at + 32]
    at = core["payload_offset"]
    parameters, iv, tag = raw[at : at + 10], raw[at + 10 : at + 42], raw[at + 42 : at + 74]

    def expand(key, purpose, size):
        return HKDFExpand(hashes.SHA384(), size, parameters + iv + purpose + core_hash).derive(key)

    assert tag == expand(derived(b"payload"), b"HEADER_TAG:", 32)
    message_key = expand(derived(b"payload"), b"MESSAGE_KEY:", 48)
    cipher = AESGCM(expand(message_key, b"DEK:" + bytes(8), 32))
    leaves = [hashlib.sha256(b"\0" + raw[at : at + 74]).digest()]
    plain, position, at = b"", 0, at + 74
    while len(plain) < core["plaintext_length"]:
        size = min(core["segment_length"], core["plaintext_length"] - len(plain) + 32)
        segment = raw[at : at + size]
        last = len(plain) + size - 32 == core["plaintext_length"]
        assert struct.unpack(">I", segment[:4])[0] == (size if last else 0xFFFFFFFF)
        plain += cipher.decrypt(segment[4:16], segment[16:], struct.pack(">QB", position, last))
        leaves.append(hashlib.sha256(b"\0" + segment).digest())
        position, at = position + 1, at + size
    assert raw[at : at + 32 * len(leaves)] == b"".join(leaves)
    root, signature = raw[at + 32 * len(leaves) : -64], raw[-64:]
    left = hashlib.sha256(b"\1" + leaves[0] + leaves[1]).digest()
    right = hashlib.sha256(b"\1" + leaves[2] + leaves[3]).digest()
    assert root == hashlib.sha256(b"\1" + left + right).digest()
    kind_of = b"application/vnd.secure-cnn.sealed.v0"
    signed = b"DSSEv1 36 " + kind_of + b" 64 " + core_hash + root
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(core["signer"])).verify(signature, signed)
    return core, plain


def test_an_independent_reader_agrees(tmp_path):
    """A reader written from the format's text alone gets the same core, plaintext and signature."""
    path = seal(tmp_path / "a", name="example")
    core, plain = independent_reader(path.read_bytes(), ME._private)
    assert core["claims"] == CLAIMS
    assert core["name"] == "example"
    assert equal(safetensors.torch.load(plain), STATE)
    archive.decrypt(path, tmp_path / "plain", identity=ME)
    assert (tmp_path / "plain").read_bytes() == plain


def refused(path: Path, *, trusted=None) -> None:
    """Passes if loading ends in one of our errors."""
    with pytest.raises(archive.ArchiveError):
        archive.load(path, identity=ME, trusted=trusted)


def flips(path: Path):
    """Changes each byte of a file in turn, of the padding every ninth; yields its offset."""
    raw = path.read_bytes()
    core_length, slots_length = struct.unpack_from(">II", raw, 12)
    end = 20 + core_length + slots_length + 32
    with path.open("r+b", buffering=0) as file:
        for at in [*range(end), *range(end, 4096, 9), *range(4096, len(raw))]:
            os.pwrite(file.fileno(), bytes([raw[at] ^ (1 << at % 8)]), at)
            yield at
            os.pwrite(file.fileno(), raw[at : at + 1], at)


@pytest.mark.parametrize("signer", [None, SIGNER], ids=["unsigned", "signed"])
@pytest.mark.parametrize("count", [3, 600], ids=["one segment", "two segments"])
def test_every_changed_byte_is_refused(tmp_path, signer, count):
    """Each byte of the file, padding and footer included, is bound by something."""
    path = seal(tmp_path / "a", {"x": torch.arange(count)}, signer=signer)
    for at in flips(path):
        if count == 3 or (at > 4096 and at % 5 == 0):
            refused(path)
    assert archive.load(path, identity=ME)


def test_verify_refuses_every_changed_byte_that_is_signed(tmp_path):
    """Without any key, all but slots and MAC is verified."""
    path = seal(tmp_path / "a", {"x": torch.arange(3)})
    core_length, slots_length = struct.unpack_from(">II", path.read_bytes(), 12)
    unsigned = range(20 + core_length, 20 + core_length + slots_length + 32)
    for at in flips(path):
        if at not in unsigned:
            with pytest.raises(archive.ArchiveError):
                archive.verify(path, trusted=TRUSTED)
    info = archive.verify(path, trusted=TRUSTED)
    assert info.verified
    assert info.signer == SIGNER.verifier
    assert str(info).startswith("VERIFIED")


def test_every_truncation_is_refused(tmp_path):
    """A file cut anywhere is refused, and one that is longer too."""
    path = seal(tmp_path / "a", {"x": torch.arange(600)})
    raw = path.read_bytes()
    path.write_bytes(raw + b"\0")
    refused(path)
    lengths = {*range(1200), *range(0, len(raw), 7), *range(len(raw) - 300, len(raw))}
    for length in sorted(lengths, reverse=True):
        os.truncate(path, length)
        expected = archive.Truncated if length else archive.NotSealed
        with pytest.raises(expected):
            archive.load(path, identity=ME)


@pytest.mark.parametrize("signer", [None, SIGNER], ids=["unsigned", "signed"])
def test_segments_cannot_be_moved_or_taken_from_another_file(tmp_path, signer):
    """Swapped segments, and a segment or a whole payload of a sibling, are refused."""
    state = {"x": torch.zeros(3000)}
    one, two = (seal(tmp_path / name, state, signer=signer) for name in "ab")
    ours, other = one.read_bytes(), two.read_bytes()
    start, end = offsets(one)
    first = start + 74
    a, b = ours[first : first + 4096], ours[first + 4096 : first + 8192]
    changed = [
        ours[:first] + b + a + ours[first + 8192 :],
        ours[:first] + a + a + ours[first + 8192 :],
        ours[:first] + other[first : first + 4096] + ours[first + 4096 :],
        ours[:start] + other[start:end] + ours[end:],
        ours[:start] + other[start:],
        other[:start] + ours[start:],
    ]
    for raw in changed:
        one.write_bytes(raw)
        with pytest.raises(archive.Tampered):
            archive.load(one, identity=ME)


def test_plain_files_are_never_accepted(tmp_path):
    """A safetensors file, a zip, an empty file, a missing one and a folder are refused."""
    safetensors.torch.save_file(STATE, tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("x", "y")
    (tmp_path / "empty").touch()
    for name in ("plain", "zip", "empty"):
        for call in (
            lambda path: archive.load(path, identity=ME),
            lambda path: archive.verify(path, trusted=TRUSTED),
            archive.inspect,
        ):
            with pytest.raises(archive.NotSealed):
                call(tmp_path / name)
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(archive.StorageError):
            archive.load(path, identity=ME)


@pytest.mark.parametrize("same_stream", [True, False])
@pytest.mark.parametrize(
    "footer",
    [
        pytest.param(new_footer, id="new hashes and root"),
        pytest.param(lambda old, leaves: b"".join(leaves) + old[-96:], id="new hashes, old root"),
        pytest.param(lambda old, leaves: old, id="old footer"),
    ],
)
def test_a_reader_cannot_put_other_weights_under_a_signature(tmp_path, footer, same_stream):
    """Someone with the file key re-encrypts other weights; the signature no longer holds."""
    path = seal(tmp_path / "a")
    other = {**STATE, "layer.bias": torch.zeros(3)}
    forge(path, state=other, footer=footer, same_stream=same_stream)
    for trusted in (TRUSTED, None):
        with pytest.raises(archive.Tampered):
            archive.load(path, identity=ME, trusted=trusted)
    with pytest.raises(archive.Tampered):
        archive.verify(path, trusted=TRUSTED)
    with pytest.raises(archive.Tampered):
        archive.decrypt(path, tmp_path / "out", identity=ME, trusted=TRUSTED)
    assert not (tmp_path / "out").exists()


def replaced(**changes):
    """A function that changes fields of a core."""

    def change(core: Core) -> Core:
        fields = {name: getattr(core, name) for name in Core.__dataclass_fields__}
        return Core(**{**fields, **changes})

    return change


def test_the_forgery_itself_is_well_made(tmp_path):
    """The control: on an unsigned file the same rewriting works, since nobody vouched for it."""
    path = seal(tmp_path / "a", signer=None)
    other = {**STATE, "layer.bias": torch.zeros(3)}
    forge(path, state=other, same_stream=True)
    assert equal(archive.load(path, identity=ME), other)
    forge(path, state=STATE, core=replaced(claims={"epsilon": 1.0}))
    assert equal(archive.load(path, identity=ME, expect={"epsilon": 1.0}), STATE)
    with pytest.raises(archive.UntrustedSigner):
        archive.load(path, identity=ME, trusted=TRUSTED)


def test_claims_cannot_be_edited(tmp_path):
    """Edited by an outsider, or by a reader who redoes MAC and payload: refused."""
    path = seal(tmp_path / "a")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"epsilon":3.0', b'"epsilon":1.0'))
    for trusted in (TRUSTED, None):
        with pytest.raises(archive.Tampered):
            archive.load(path, identity=ME, trusted=trusted)
    path.write_bytes(raw)
    forge(path, core=replaced(claims={"epsilon": 1.0}))
    with pytest.raises(archive.Tampered):
        archive.verify(path, trusted=TRUSTED)
    unsigned = seal(tmp_path / "b", signer=None)
    edited = unsigned.read_bytes().replace(b'"epsilon":3.0', b'"epsilon":1.0')
    unsigned.write_bytes(edited)
    with pytest.raises(archive.Tampered):
        archive.load(unsigned, identity=ME)


def test_only_trusted_signers_count(tmp_path):
    """Unsigned, signed by another, re-signed by a reader, or nobody trusted: UntrustedSigner."""
    mallory = archive.generate_signer()
    resigned = seal(tmp_path / "c")
    core = replaced(signer=mallory.verifier.public.hex(), claims={"epsilon": 0.1})

    core_hash = hash_core(core(parse_header(resigned.read_bytes()).core).to_bytes())

    def resign(old, leaves):
        root = merkle_root(leaves)
        return b"".join(leaves) + root + mallory.sign(core_hash, root)

    forge(resigned, core=core, footer=resign)
    assert archive.verify(resigned, trusted=[mallory.verifier]).claims == {"epsilon": 0.1}
    files = [
        seal(tmp_path / "a", signer=None),
        seal(tmp_path / "b", signer=mallory),
        resigned,
    ]
    for path in files:
        for trusted in (TRUSTED, []):
            with pytest.raises(archive.UntrustedSigner):
                archive.load(path, identity=ME, trusted=trusted)
            with pytest.raises(archive.UntrustedSigner):
                archive.verify(path, trusted=trusted)


def test_the_signature_is_checked_before_anything_is_decrypted(tmp_path):
    """With a trust list, an untrusted file never meets the identity."""

    class Never:
        def unwrap(self, slots, core_hash):
            raise AssertionError

    path = seal(tmp_path / "a", signer=archive.generate_signer())
    with pytest.raises(archive.UntrustedSigner):
        archive.load(path, identity=Never(), trusted=TRUSTED)
    path = seal(tmp_path / "b")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(archive.Tampered):
        archive.load(path, identity=Never(), trusted=TRUSTED)


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

    monkeypatch.setattr(sealed.torch, "empty", remembered)
    with pytest.raises(archive.Tampered):
        archive.load(path, identity=ME)
    assert targets
    assert not targets[0].any()


def test_expected_claims_are_compared_before_decrypting(tmp_path, monkeypatch):
    """A missing or other claim is refused; the right ones pass, tuples as lists."""
    path = seal(tmp_path / "a")
    wanted = {"epsilon": 3, "attacks": ("pgd",)}
    assert archive.load(path, identity=ME, trusted=TRUSTED, expect=wanted)
    monkeypatch.setattr(sealed, "decrypt_memory", None)
    for wrong in ({"epsilon": 1.0}, {"delta": 1e-5}, {"attacks": []}, {"private": False}):
        with pytest.raises(archive.ClaimMismatch):
            archive.load(path, identity=ME, expect=wrong)
    with pytest.raises(archive.StateError, match=r"expect\.epsilon"):
        archive.load(path, identity=ME, expect={"epsilon": float("inf")})


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
    assert (info.verified, info.version, info.name) == (False, 0, "run 7")
    assert info.claims == CLAIMS
    assert info.slots == (f"x25519 {ME.recipient.key_id.hex()}",)
    assert info.file_length == path.stat().st_size
    assert str(info).startswith("UNVERIFIED")
    assert '"epsilon" = 3.0' in str(info)


def test_inspect_prints_nothing_that_a_terminal_obeys(tmp_path):
    """Escape sequences in names and claims of an unverified file are shown, not sent."""
    evil = "\x1b[2J\u202e\r"
    path = seal(tmp_path / "a", name=evil, claims={evil: [evil]})
    assert str(archive.inspect(path)).replace("\n", "").isprintable()


def test_names_and_shapes_of_tensors_are_hidden(tmp_path):
    """Nothing of the plaintext stands in the file: neither names, nor dtypes, nor values."""
    raw = seal(tmp_path / "a").read_bytes()
    for clear in (b"layer", b"weight", b"F32", STATE["layer.weight"].numpy().tobytes()[400:440]):
        assert clear not in raw


def test_two_saves_have_nothing_secret_in_common(tmp_path):
    """File id, wrapped key, IV, nonces and ciphertext are fresh each time."""
    one, two = (seal(tmp_path / name).read_bytes() for name in "ab")
    start, end = offsets(tmp_path / "a")
    assert one[start + 10 : start + 74] != two[start + 10 : start + 74]
    pairs = [(one[at : at + 32], two[at : at + 32]) for at in range(start + 78, end - 64, 64)]
    assert all(left != right for left, right in pairs)
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
        header = parse_header(path.read_bytes())
        keys.add(ME.unwrap(header.slots, header.core_hash))
    assert len(keys) == 2
    assert len({path.read_bytes()[4096 + 10 : 4096 + 42] for path in files}) == 2


def test_nothing_is_overwritten_unasked(tmp_path):
    """A file that is there stays, byte for byte, unless overwrite is asked for."""
    path = seal(tmp_path / "a")
    before = path.read_bytes()
    with pytest.raises(archive.StorageError, match="overwrite=True"):
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
        if offset > 4096:
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

    monkeypatch.setattr(sealed, "encrypt_file", racing)
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


def with_core(raw: bytes, core: bytes) -> bytes:
    """A file with other core bytes and lengths that fit, as an outsider can make it."""
    core_length, slots_length = struct.unpack_from(">II", raw, 12)
    rest = raw[20 + core_length : 20 + core_length + slots_length + 32]
    head = raw[:12] + struct.pack(">II", len(core), slots_length) + core + rest
    return head.ljust(4096, b"\0") + raw[4096:]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("plaintext_length", 2**63, archive.LimitExceeded),
        ("plaintext_length", 2**48 + 1, archive.LimitExceeded),
        ("plaintext_length", 2**47, archive.LimitExceeded),
        ("plaintext_length", 2**30, archive.Truncated),
        ("plaintext_length", -1, archive.LimitExceeded),
        ("plaintext_length", 1.5, archive.Tampered),
        ("plaintext_length", True, archive.Tampered),
        ("segment_length", 4095, archive.LimitExceeded),
        ("segment_length", (64 << 20) + 1, archive.LimitExceeded),
        ("segment_length", 2**70, archive.LimitExceeded),
        ("payload_offset", 0, archive.LimitExceeded),
        ("payload_offset", 5000, archive.Tampered),
        ("payload_offset", 8192, archive.Tampered),
        ("payload_offset", 2**40, archive.LimitExceeded),
        ("suite", "none", archive.UnsupportedVersion),
        ("signer", "zz", archive.Tampered),
        ("signer", 3, archive.Tampered),
        ("file_id", "00", archive.Tampered),
        ("claims", [], archive.Tampered),
        ("name", None, archive.Tampered),
        ("unknown", 1, archive.Tampered),
    ],
)
def test_lying_cores_are_refused_before_memory_is_taken(tmp_path, monkeypatch, field, value, error):
    """Lengths are checked against limits and file size; nothing is allocated from them."""
    path = seal(tmp_path / "a")
    raw = path.read_bytes()
    core = json.loads(raw[20 : raw.index(b"}", raw.index(b'"suite"')) + 1])
    path.write_bytes(with_core(raw, json.dumps({**core, field: value}).encode()))
    monkeypatch.setattr(sealed.torch, "empty", None)
    for call in (archive.inspect, lambda path: archive.load(path, identity=ME)):
        with pytest.raises(error):
            call(path)


@pytest.mark.parametrize(
    "core",
    [
        b'{"a":1,"a":2}',
        b"[" * 50_000,
        b"[" * 100 + b"]" * 100,
        b"\xff",
        b"",
        b"NaN",
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":' + b"9" * 1000 + b"}",
        b'{"a":' + b"9" * 5000 + b"}",
    ],
)
def test_malformed_cores_are_refused(core):
    """Double keys, depth bombs, numbers without end and noise are one error."""
    with pytest.raises(archive.Tampered):
        Core.from_bytes(core)


def test_the_first_of_two_equal_keys_is_named():
    """The message says which key stands twice."""
    with pytest.raises(archive.Tampered, match="'b' twice"):
        claims_module.parse_json(b'{"a":{"b":1,"b":1}}', "the core")


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (8, 1, archive.UnsupportedVersion),
        (10, 1, archive.UnsupportedVersion),
    ],
)
def test_other_versions_and_flags_are_refused(tmp_path, at, value, error):
    """There is no way down to a weaker format, and none up to an unknown one."""
    path = seal(tmp_path / "a")
    raw = bytearray(path.read_bytes())
    raw[at : at + 2] = struct.pack(">H", value)
    path.write_bytes(raw)
    with pytest.raises(error):
        archive.inspect(path)


def test_header_lengths_are_capped(tmp_path):
    """A head of more than 1 MiB, or more than 256 slots, is refused from its numbers alone."""
    path = seal(tmp_path / "a")
    raw = path.read_bytes()
    for lengths in ((2**32 - 1, 0), (0, 2**32 - 1), (1 << 20, 0)):
        path.write_bytes(raw[:12] + struct.pack(">II", *lengths) + raw[20:])
        with pytest.raises(archive.LimitExceeded):
            archive.inspect(path)
    core_length, _ = struct.unpack_from(">II", raw, 12)
    core = json.loads(raw[20 : 20 + core_length])
    packed = json.dumps({**core, "payload_offset": 16384}).encode()
    slots = bytes(20) * 257
    head = raw[:12] + struct.pack(">II", len(packed), len(slots)) + packed + slots + bytes(32)
    path.write_bytes(head.ljust(16384, b"\0") + raw[4096:])
    with pytest.raises(archive.LimitExceeded, match="256"):
        archive.inspect(path)


def test_recipients_are_checked(tmp_path):
    """Nobody, too many, and a mix of quantum-safe and classical recipients are refused."""
    with pytest.raises(archive.InvalidKey, match="at least one"):
        seal(tmp_path / "a", recipients=[])
    with pytest.raises(archive.InvalidKey, match="all hybrid"):
        seal(tmp_path / "a", recipients=[ME.recipient, archive.generate_identity().recipient])
    with pytest.raises(archive.LimitExceeded):
        seal(tmp_path / "a", recipients=[ME.recipient] * 257)
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
    assert len(errors) == 13
    assert all(issubclass(error, archive.ArchiveError) for error in errors)
    assert issubclass(archive.ArchiveError, SecureCNNError)
