"""What every attack on a sealed file that we know of ends in: the right error, and no plaintext."""

import json
import os
import struct
import zipfile

import pytest
import safetensors.torch
import torch
from forging import Parts, forge, root_of

from secure_cnn import archive
from secure_cnn.archive import loading
from secure_cnn.archive.format import claims as claims_module
from secure_cnn.archive.format.core import Core
from secure_cnn.archive.format.state import encode_state

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()
BOTH = archive.generate_signer(post_quantum=True)
TRUSTED = [SIGNER.verifier]
STATE = {"layer.weight": torch.arange(2500, dtype=torch.float32), "layer.bias": torch.ones(3)}
CLAIMS = {"epsilon": 3.0, "private": True, "attacks": ["pgd"]}
OTHER = {**STATE, "layer.bias": torch.zeros(3)}


def seal(path, state=None, **settings):
    """A small signed file of three segments."""
    settings = {"recipients": [ME.recipient], "signer": SIGNER, "claims": CLAIMS, **settings}
    archive.save(path, STATE if state is None else state, segment_length=4096, **settings)
    return path


def equal(left, right):
    """Whether two flat states are the same."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def plain(state):
    """The safetensors file of a state."""
    return b"".join(encode_state(state))


def changed(path, **parts):
    """Puts other parts into a file."""
    file = Parts.of(path.read_bytes())
    for name, value in parts.items():
        setattr(file, name, value(file) if callable(value) else value)
    path.write_bytes(file.raw())


def refused(path, error=archive.ArchiveError, **settings):
    """Passes if loading, whole and in part, ends in this error."""
    for only in (None, ["layer.bias"]):
        with pytest.raises(error):
            archive.load(path, identity=ME, only=only, **settings)


def flips(path):
    """Changes each byte of a file in turn; yields its offset."""
    raw = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at in range(len(raw)):
            os.pwrite(file.fileno(), bytes([raw[at] ^ (1 << at % 8)]), at)
            yield at
            os.pwrite(file.fileno(), raw[at : at + 1], at)


NUMBERS = (archive.LimitExceeded, archive.Tampered, archive.Truncated)


def expected(at, file):
    """The errors that a changed byte at this place may end in."""
    if at < 8:
        return archive.NotSealed
    if at < 12:
        return archive.UnsupportedVersion
    if at < len(file.prefix):
        # A digit of a length, a letter of the suite; all else is the core hash's.
        return NUMBERS if at < 20 else (*NUMBERS, archive.UnsupportedVersion)
    head = len(file.raw()) - len(file.stream + b"".join(file.segments) + file.footer)
    if file.footer or at < head:
        return archive.Tampered
    # Without a signature the length and mark of a segment are read before its tag.
    return (archive.Tampered, archive.Truncated)


@pytest.mark.parametrize("signer", [None, SIGNER], ids=["unsigned", "signed"])
def test_every_changed_byte_is_refused(tmp_path, signer):
    """Each byte, of mark, padding, second copy and footer too, ends in the right error."""
    path = seal(tmp_path / "a", {"x": torch.arange(600)}, signer=signer)
    file = Parts.of(path.read_bytes())
    for at in flips(path):
        if at < 4000 or at % 5 == 0:
            with pytest.raises(expected(at, file)):
                archive.load(path, identity=ME)
    assert archive.load(path, identity=ME)


def test_every_changed_byte_of_the_post_quantum_signature_is_refused(tmp_path):
    """Both signatures must hold: neither half can be broken alone."""
    path = seal(tmp_path / "a", {"x": torch.arange(3)}, signer=BOTH)
    start = path.stat().st_size - 1984 - 3373
    for at in flips(path):
        if at >= start and at % 13 == 0:
            with pytest.raises(archive.Tampered):
                archive.load(path, identity=ME, trusted=[BOTH.verifier])
    for name, half in (("b", slice(0, 64)), ("c", slice(64, None))):
        path = seal(tmp_path / name, {"x": torch.arange(3)}, signer=BOTH)
        raw = bytearray(path.read_bytes())
        signature = bytearray(raw[-3373:])
        signature[half] = bytes(len(signature[half]))
        raw[-3373:] = signature
        path.write_bytes(raw)
        refused(path, archive.Tampered)


def test_the_post_quantum_signature_cannot_be_stripped(tmp_path):
    """The Ed25519 half alone is no signature of the same signer, nor of its half alone."""
    path = seal(tmp_path / "a", signer=BOTH)
    half = archive.Verifier(BOTH.verifier.public[:32])
    file = Parts.of(path.read_bytes())
    kept = file.footer[-3373:][:64]
    forged = forge(path.read_bytes(), ME._private, signer=half.signer_id)
    hashes = b"".join(forged.leaves) + root_of(forged.leaves)
    forged.footer = hashes + half.public + kept
    path.write_bytes(forged.raw())
    refused(path, archive.Tampered, trusted=[half])
    refused(path, archive.UntrustedSigner, trusted=[BOTH.verifier])


def test_verify_refuses_every_changed_byte_that_is_signed(tmp_path):
    """Without any key, all but slots, MAC and mark is verified."""
    path = seal(tmp_path / "a", {"x": torch.arange(3)})
    file = Parts.of(path.read_bytes())
    first = -(-len(file.prefix) // 512) * 512
    unsigned = range(first, first + 512 + 2 * file.copy_length)
    for at in flips(path):
        if at not in unsigned:
            with pytest.raises(archive.ArchiveError):
                archive.verify(path, trusted=TRUSTED)
    info = archive.verify(path, trusted=TRUSTED)
    assert info.verified
    assert info.signer == SIGNER.verifier
    assert str(info).startswith("VERIFIED")


@pytest.mark.parametrize("signer", [None, SIGNER], ids=["unsigned", "signed"])
def test_every_truncation_is_refused(tmp_path, signer):
    """A file cut anywhere is `Truncated`, and one that is longer `Tampered`."""
    path = seal(tmp_path / "a", {"x": torch.arange(600)}, signer=signer)
    raw = path.read_bytes()
    path.write_bytes(raw + b"\0")
    refused(path, archive.Tampered)
    for length in range(len(raw) - 1, -1, -1):
        os.truncate(path, length)
        expected = archive.Truncated if length else archive.NotSealed
        with pytest.raises(expected):
            archive.load(path, identity=ME)
        if length % 100 == 0:
            for call in (
                archive.inspect,
                lambda path: archive.open_lazy(path, identity=ME),
                lambda path: archive.change_recipients(path, identity=ME),
                archive.shred,
                lambda path: archive.rotate(path, identity=ME, recipients=[ME.recipient]),
            ):
                with pytest.raises(expected):
                    call(path)


@pytest.mark.parametrize("signer", [None, SIGNER], ids=["unsigned", "signed"])
@pytest.mark.parametrize("at_will", [False, True], ids=["footer as it was", "footer that fits"])
def test_segments_cannot_be_moved_or_taken_from_another_file(tmp_path, signer, at_will):
    """Swapped, doubled and foreign segments, streams and heads are refused."""
    state = {"x": torch.zeros(3000)}
    one, two = (seal(tmp_path / name, state, signer=signer) for name in "ab")
    theirs = Parts.of(two.read_bytes())
    rearranged = [
        {"segments": lambda f: [f.segments[1], f.segments[0], *f.segments[2:]]},
        {"segments": lambda f: [f.segments[0], f.segments[0], *f.segments[2:]]},
        {"segments": lambda f: [theirs.segments[0], *f.segments[1:]]},
        {"segments": theirs.segments},
        {"stream": theirs.stream},
        {"stream": theirs.stream, "segments": theirs.segments},
        {"stream": theirs.stream, "segments": theirs.segments, "footer": theirs.footer},
        {"core": theirs.core},
        {"copies": theirs.copies},
        {"core": theirs.core, "copies": theirs.copies},
    ]
    raw = one.read_bytes()
    for parts in rearranged:
        one.write_bytes(raw)
        changed(one, **parts)
        if at_will:
            file = Parts.of(one.read_bytes())
            file.fit_footer()
            one.write_bytes(file.raw())
        with pytest.raises(archive.Tampered):
            archive.load(one, identity=ME)


def test_plain_files_are_never_accepted(tmp_path):
    """A safetensors file, a zip, an empty file, a missing one and a folder are refused."""
    safetensors.torch.save_file(STATE, tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("x", "y")
    (tmp_path / "empty").touch()
    calls = (
        lambda path: archive.load(path, identity=ME),
        lambda path: archive.load(path, identity=ME, only=["x"]),
        lambda path: archive.open_lazy(path, identity=ME),
        lambda path: archive.verify(path, trusted=TRUSTED),
        lambda path: archive.change_recipients(path, identity=ME),
        lambda path: archive.rotate(path, identity=ME, recipients=[ME.recipient]),
        archive.inspect,
        archive.shred,
    )
    for call in calls:
        for name in ("plain", "zip", "empty"):
            with pytest.raises(archive.NotSealed):
                call(tmp_path / name)
        for path in (tmp_path, tmp_path / "none"):
            with pytest.raises(archive.StorageError):
                call(path)


AGE = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"
READERS = {
    "load": lambda path, **keys: archive.load(path, **keys),
    "load one tensor": lambda path, **keys: archive.load(path, only=["layer.bias"], **keys),
    "load_into": lambda path, **keys: archive.load_into(
        {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}, path, **keys
    ),
    "open_lazy": lambda path, **keys: archive.open_lazy(path, **keys).close(),
    "decrypt": lambda path, **keys: archive.decrypt(path, f"{path}.plain", **keys),
    "export_age": lambda path, **keys: archive.export_age(
        path, f"{path}.age", recipients=[AGE], **keys
    ),
    "verify": lambda path, identity, trusted: archive.verify(path, trusted=trusted),
    "verify deep": lambda path, identity, trusted: archive.verify(
        path, trusted=trusted, deep=identity
    ),
    "model card": lambda path, identity, trusted: archive.export_card(
        path, f"{path}.md", trusted=trusted
    ),
    "rotate": lambda path, **keys: archive.rotate(
        path, recipients=[ME.recipient], signer=SIGNER, **keys
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_to_trust_somebody_is_to_require_a_signature(tmp_path, name):
    """Of every function that reads: unsigned, signed by another, and nobody trusted at all."""
    unsigned = seal(tmp_path / "unsigned", signer=None)
    other = seal(tmp_path / "other", signer=archive.generate_signer())
    signed = seal(tmp_path / "signed")
    for path, trusted in ((unsigned, TRUSTED), (other, TRUSTED), (unsigned, []), (signed, [])):
        raw = path.read_bytes()
        with pytest.raises(archive.UntrustedSigner):
            READERS[name](path, identity=ME, trusted=trusted)
        assert path.read_bytes() == raw
    assert {entry.name for entry in tmp_path.iterdir()} == {"unsigned", "other", "signed"}
    READERS[name](signed, identity=ME, trusted=TRUSTED)


def test_the_forgery_itself_is_well_made(tmp_path):
    """The control: on an unsigned file a reader's rewriting works, since nobody vouched for it."""
    path = seal(tmp_path / "a", signer=None)
    path.write_bytes(forge(path.read_bytes(), ME._private, plaintext=plain(OTHER)).raw())
    assert equal(archive.load(path, identity=ME), OTHER)
    path.write_bytes(forge(path.read_bytes(), ME._private, claims={"epsilon": 1.0}).raw())
    assert equal(archive.load(path, identity=ME, expect={"epsilon": 1.0}), OTHER)
    refused(path, archive.UntrustedSigner, trusted=TRUSTED)


@pytest.mark.parametrize(
    "footer",
    [
        pytest.param(lambda file, old: file.footer, id="new hashes and root"),
        pytest.param(lambda file, old: old, id="old footer"),
        pytest.param(lambda file, old: file.footer[:-128] + old[-128:], id="old root"),
    ],
)
def test_a_reader_cannot_put_other_weights_under_a_signature(tmp_path, footer):
    """Someone with the file key encrypts other weights; the signature no longer holds."""
    path = seal(tmp_path / "a")
    old = Parts.of(path.read_bytes()).footer
    forged = forge(path.read_bytes(), ME._private, plaintext=plain(OTHER))
    forged.footer = footer(forged, old)
    path.write_bytes(forged.raw())
    for trusted in (TRUSTED, None):
        refused(path, archive.Tampered, trusted=trusted)
    with pytest.raises(archive.Tampered):
        archive.verify(path, trusted=TRUSTED)
    with pytest.raises(archive.Tampered):
        archive.decrypt(path, tmp_path / "out", identity=ME, trusted=TRUSTED)
    with pytest.raises(archive.Tampered):
        archive.rotate(path, identity=ME, recipients=[ME.recipient], signer=SIGNER)
    assert not (tmp_path / "out").exists()


def test_a_reader_cannot_keep_tags_and_change_weights(tmp_path):
    """CryptoTensors signs tags, which a key holder can keep while weights change; we sign hashes.

    The segment that is put in decrypts, as a reader with the key can make it; its hash is another,
    and that is compared before the tag is looked at.
    """
    path = seal(tmp_path / "a")
    file = Parts.of(path.read_bytes())
    file_key = file.file_key(ME._private)
    segment = file.segments[0]
    text = bytearray(
        file.segment_cipher(file_key).decrypt(segment[4:16], segment[16:], struct.pack(">QB", 0, 0))
    )
    text[-1] ^= 1
    again = file.segment_cipher(file_key).encrypt(
        segment[4:16], bytes(text), struct.pack(">QB", 0, 0)
    )
    file.segments[0] = segment[:16] + again
    path.write_bytes(file.raw())
    with pytest.raises(archive.Tampered, match="not the one that was signed"):
        archive.load(path, identity=ME)


def test_claims_cannot_be_edited(tmp_path):
    """Edited by an outsider, or by a reader who redoes MAC and payload: refused."""
    for signer in (SIGNER, None):
        path = seal(tmp_path / f"{signer is None}", signer=signer)
        raw = path.read_bytes()
        path.write_bytes(raw.replace(b'"epsilon":3.0', b'"epsilon":1.0'))
        refused(path, archive.Tampered)
    path = seal(tmp_path / "c")
    path.write_bytes(forge(path.read_bytes(), ME._private, claims={"epsilon": 1.0}).raw())
    refused(path, archive.Tampered)
    with pytest.raises(archive.Tampered):
        archive.verify(path, trusted=TRUSTED)


def test_only_trusted_signers_count(tmp_path):
    """Unsigned, signed by another, signed anew by a reader, or nobody trusted: UntrustedSigner."""
    mallory = archive.generate_signer()
    again = seal(tmp_path / "c")
    forged = forge(
        again.read_bytes(),
        ME._private,
        signer=mallory.verifier.signer_id,
        claims={"epsilon": 0.1},
    )
    hashes, root = b"".join(forged.leaves), root_of(forged.leaves)
    signature = mallory.sign(forged.core_hash, root)
    forged.footer = hashes + root + mallory.verifier.public + signature
    again.write_bytes(forged.raw())
    assert archive.verify(again, trusted=[mallory.verifier]).claims == {"epsilon": 0.1}
    for path in (seal(tmp_path / "a", signer=None), seal(tmp_path / "b", signer=mallory), again):
        for trusted in (TRUSTED, []):
            refused(path, archive.UntrustedSigner, trusted=trusted)
            with pytest.raises(archive.UntrustedSigner):
                archive.verify(path, trusted=trusted)


def test_another_key_in_the_footer_is_refused(tmp_path):
    """The signer's key is the one that the core names, though another signed correctly."""
    mallory, path = archive.generate_signer(), seal(tmp_path / "a")
    file = Parts.of(path.read_bytes())
    signature = mallory.sign(file.core_hash, root_of(file.leaves))
    file.footer = file.footer[:-96] + mallory.verifier.public + signature
    path.write_bytes(file.raw())
    refused(path, archive.Tampered)
    with pytest.raises(archive.Tampered):
        archive.inspect(path)


def test_a_stripped_signature_is_refused(tmp_path):
    """An outsider cannot make a signed file an unsigned one; a reader can, and is not trusted."""
    path = seal(tmp_path / "a")
    file = Parts.of(path.read_bytes())
    file.tell(signer=None)
    file.footer = b""
    raw = path.read_bytes()
    path.write_bytes(file.raw())
    refused(path, archive.Tampered)
    stripped = forge(raw, ME._private, signer=None)
    path.write_bytes(stripped.raw())
    assert equal(archive.load(path, identity=ME), STATE)
    refused(path, archive.UntrustedSigner, trusted=TRUSTED)


def test_the_signature_is_checked_before_anything_is_decrypted(tmp_path):
    """With a trust list, an untrusted or broken file never meets the identity."""

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


def test_what_works_on_cryptotensors_0_2_3_does_not_work_here(tmp_path):
    """A plain file passed for a sealed one; names in clear; context unbound; tags signed."""
    safetensors.torch.save_file(OTHER, tmp_path / "plain")
    refused(tmp_path / "plain", archive.NotSealed, trusted=TRUSTED)
    path = seal(tmp_path / "a")
    for clear in (b"layer", b"weight", b'"F32"', b"data_offsets"):
        assert clear not in path.read_bytes()
    sibling = seal(tmp_path / "b", OTHER)
    for part in ("segments", "stream", "copies"):
        raw = path.read_bytes()
        changed(path, **{part: getattr(Parts.of(sibling.read_bytes()), part)})
        refused(path, archive.Tampered)
        path.write_bytes(raw)
    forged = forge(path.read_bytes(), ME._private, plaintext=plain(OTHER))
    path.write_bytes(forged.raw())
    refused(path, archive.Tampered, trusted=TRUSTED)


def test_what_works_on_the_dcp_extension_does_not_work_here(tmp_path):
    """A pickle in the file's metadata runs no code; a plain checkpoint in its place is refused."""
    ran = tmp_path / "ran"
    # A pickle that would touch a file: os.system is looked up by name when it is loaded.
    bomb = b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR."
    (tmp_path / "bomb").write_bytes(bomb)
    refused(tmp_path / "bomb", archive.NotSealed)
    path = seal(tmp_path / "a", signer=None)
    path.write_bytes(forge(path.read_bytes(), ME._private, plaintext=bomb).raw())
    refused(path, archive.StateError)
    metadata = {"secure_cnn.state": bomb.decode(), "secure_cnn.claims": bomb.decode()}
    inside = safetensors.torch.save(OTHER, metadata=metadata)
    path = seal(tmp_path / "b", signer=None)
    path.write_bytes(forge(path.read_bytes(), ME._private, plaintext=inside).raw())
    with pytest.raises(archive.StateError):
        archive.load(path, identity=ME)
    assert not ran.exists()
    torch.save(OTHER, tmp_path / "checkpoint")
    refused(tmp_path / "checkpoint", archive.NotSealed)


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
        ("suite", "none", archive.UnsupportedVersion),
        ("signer", "zz", archive.Tampered),
        ("signer", 3, archive.Tampered),
        ("signer", "none:" + "00" * 32, archive.Tampered),
        ("signer", "ed25519:" + "00" * 31, archive.Tampered),
        ("signer", "ed25519+ml-dsa-65:" + "00" * 32, archive.Truncated),
        ("file_id", "00", archive.Tampered),
        ("claims", [], archive.Tampered),
        ("name", None, archive.Tampered),
        ("audience", None, archive.Tampered),
        ("audience", ["zz"], archive.Tampered),
        ("audience", "00", archive.Tampered),
        ("lineage", [], archive.Tampered),
        ("lineage", {}, archive.Tampered),
        ("lineage", {"run": "", "step": -1, "generation": 0, "previous": None}, archive.Tampered),
        ("lineage", {"run": "", "step": 0, "generation": 0, "previous": 0}, archive.Tampered),
        ("unknown", 1, archive.Tampered),
    ],
)
def test_lying_cores_are_refused_before_memory_is_taken(tmp_path, monkeypatch, field, value, error):
    """Lengths are checked against limits and file size; nothing is allocated from them."""
    path = seal(tmp_path / "a")
    file = Parts.of(path.read_bytes())
    file.tell(**{field: value})
    path.write_bytes(file.raw())
    monkeypatch.setattr(loading.torch, "empty", None)
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
    ("raw", "taken"),
    [
        (b"[" * 128 + b"]" * 128, True),
        (b"[" * 129 + b"]" * 129, False),
        (b"[" * 127 + b"1" + b"]" * 127, True),
        (b"[" * 128 + b"1" + b"]" * 128, False),
        (b'{"a":' * 127 + b"[]" + b"}" * 127, True),
        (b'{"a":' * 128 + b"[]" + b"}" * 128, False),
        (b"[0," + b"[" * 128 + b"]" * 128 + b"]", False),
        (b"[" * 100_000, False),
        (b"[%d]" % (2**1024 - 1), True),
        (b"[%d]" % 2**1024, False),
        (b"[%d]" % -(2**1024), False),
        (b"[" + b"9" * 5000 + b"]", False),
        (b"[1e400]", False),
        (b"[NaN]", False),
    ],
    ids=range(14),
)
def test_json_has_limits(raw, taken):
    """128 levels, 1024 bits, finite: what is beyond is an error of ours."""
    if taken:
        assert claims_module.parse_json(raw, "the core") == json.loads(raw)
    else:
        with pytest.raises(archive.Tampered, match="the core is no JSON"):
            claims_module.parse_json(raw, "the core")


@pytest.mark.parametrize(("part", "value"), [("version", 0), ("version", 2), ("flags", 1)])
def test_other_versions_and_flags_are_refused(tmp_path, part, value):
    """There is no way down to a weaker format, and none up to an unknown one."""
    path = seal(tmp_path / "a")
    changed(path, **{part: value})
    with pytest.raises(archive.UnsupportedVersion):
        archive.inspect(path)
    refused(path, archive.UnsupportedVersion)


def test_header_lengths_are_capped(tmp_path):
    """A head of more than 1 MiB, or more than 256 slots, is refused from its numbers alone."""
    path = seal(tmp_path / "a")
    raw = path.read_bytes()
    many = [(2**32 - 1, 512), (0, 2**32 - 512), (1 << 20, 512), (0, 1 << 19)]
    for lengths in many:
        path.write_bytes(raw[:12] + struct.pack(">II", *lengths) + raw[20:])
        with pytest.raises(archive.LimitExceeded):
            archive.inspect(path)
    for copy_length in (0, 511, 513):
        path.write_bytes(raw[:16] + struct.pack(">I", copy_length) + raw[20:])
        with pytest.raises(archive.Tampered):
            archive.inspect(path)
    file = Parts.of(raw)
    for slots in ([(99, bytes(16), b"")] * 257, [(2, bytes(16), bytes(81))]):
        file.copy_length = 8192
        file.copies = [file.copy(slots, bytes(32))] * 2
        path.write_bytes(file.raw())
        with pytest.raises((archive.LimitExceeded, archive.Tampered)):
            archive.inspect(path)


def test_slots_that_run_out_of_their_copy_are_refused(tmp_path):
    """A slots length beyond the copy, and bytes behind the MAC, are refused."""
    path = seal(tmp_path / "a")
    file = Parts.of(path.read_bytes())
    copy = file.copies[0]
    for bad in (
        struct.pack(">I", 2**32 - 1) + copy[4:],
        struct.pack(">I", 512) + copy[4:],
        struct.pack(">I", 99) + copy[4:],
        copy[:-1] + b"x",
    ):
        file.copies = [bad, bad]
        path.write_bytes(file.raw())
        refused(path, archive.Tampered)


def test_a_head_is_read_again_while_it_is_being_changed(tmp_path, monkeypatch):
    """A read that met a change half-way is made once more before the file is called damaged."""
    from secure_cnn.archive import opening

    path = seal(tmp_path / "a")
    inner, seen = opening.read_at, []

    def torn(fd, length, offset):
        raw = inner(fd, length, offset)
        seen.append(length)
        if len(seen) == 2:
            file = Parts.of(path.read_bytes())
            file.copies[0] = b"x" * len(file.copies[0])
            raw = file.raw()[:length]
        return raw

    monkeypatch.setattr(opening, "read_at", torn)
    assert equal(archive.load(path, identity=ME), STATE)
    assert len(seen) > 3


def test_a_stream_header_made_by_a_reader_is_refused_on_opening(tmp_path):
    """A fresh IV with a tag that fits is not what was signed, before any segment is read."""
    path = seal(tmp_path / "a")
    file = Parts.of(path.read_bytes())
    again = forge(path.read_bytes(), ME._private)
    assert again.core_hash == file.core_hash
    assert again.stream != file.stream
    file.stream = again.stream
    path.write_bytes(file.raw())
    with pytest.raises(archive.Tampered, match="payload is not the one that was signed"):
        archive.open_lazy(path, identity=ME)
