"""Makes the vectors of format version 1: a file for each scenario, and an index of what it ends in.

Run once for a version of the format: ``PYTHONPATH=tests python tests/vectors/make.py``. Files of a
released version are never made again, since they have to open for ever; a new scenario is added by
running this into another folder and copying its file and its line. The keys in the index are for
these files alone.
"""

import base64
import hashlib
import json
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from forging import Parts, forge, pad, purpose_key, root_of

from secure_cnn import archive
from secure_cnn.archive.format.state import encode_state

FOLDER = Path(__file__).parent / "v1"
SEGMENT = 4096

IDENTITIES = {
    "x25519": archive.generate_identity(post_quantum=False),
    "x25519-other": archive.generate_identity(post_quantum=False),
    "hybrid": archive.generate_identity(),
    "kek": archive.generate_kek(),
}
SIGNERS = {
    "maker": archive.generate_signer(),
    "mallory": archive.generate_signer(),
    "post-quantum": archive.generate_signer(post_quantum=True),
}
PASSPHRASE = "correct horse battery staple"
ME, OTHER = IDENTITIES["x25519"], IDENTITIES["x25519-other"]
MAKER = SIGNERS["maker"]
SMALL = {"weight": torch.arange(6, dtype=torch.float32).reshape(2, 3), "bias": torch.ones(2)}
LARGE = {"weight": torch.arange(1100, dtype=torch.float32)}


class Exclusive:
    """The key service of the vectors: XOR with SHAKE-256 of a word and the context."""

    def wrap(self, key: bytes, context: bytes) -> bytes:
        """The key, wrapped."""
        pad = hashlib.shake_256(b"vectors" + context).digest(len(key))
        return bytes(a ^ b for a, b in zip(key, pad, strict=True))

    unwrap = wrap


SERVICE = archive.ServiceKey(Exclusive(), "vectors/key/1")
CHEAP = archive.Passphrase(PASSPHRASE, cost=archive.INSECURE_TEST_COST)

_Entry = dict[str, object]
_ENTRIES: list[_Entry] = []


def sealed(state=None, **settings) -> bytes:
    """A file for ME by MAKER."""
    settings = {"recipients": [ME.recipient], "signer": MAKER, **settings}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        archive.save(path, SMALL if state is None else state, segment_length=SEGMENT, **settings)
        return path.read_bytes()


def altered(raw: bytes, change: Callable[[Path], None]) -> bytes:
    """A file after something was done to it in place."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(raw)
        change(path)
        return path.read_bytes()


def add(name: str, what: str, raw: bytes, outcome: str = "opens", **call) -> None:
    """One scenario: the file, how it is opened, and what that ends in."""
    call = {"identity": "x25519", "trusted": ["maker"], **call}
    entry: _Entry = {"file": f"{name}.sealed", "what": what, "open": call, "outcome": outcome}
    _ENTRIES.append(entry)
    assert len(raw) <= 8192, (name, len(raw))
    (FOLDER / f"{name}.sealed").write_bytes(raw)


def edited(raw: bytes, **parts) -> bytes:
    """A file with other parts; values may be functions of what is there."""
    file = Parts.of(raw)
    for part, value in parts.items():
        setattr(file, part, value(file) if callable(value) else value)
    return file.raw()


def told(raw: bytes, **fields) -> bytes:
    """A file whose core says something else, as an outsider can make it."""
    file = Parts.of(raw)
    file.tell(**fields)
    return file.raw()


def flipped(raw: bytes, at: int) -> bytes:
    """A file with one bit changed."""
    at %= len(raw)
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def refitted(raw: bytes, **parts) -> bytes:
    """A file with other parts, and leaves and root that fit them."""
    file = Parts.of(edited(raw, **parts))
    file.fit_footer()
    return file.raw()


def good_recipients() -> None:
    """Each kind of recipient, alone and together."""
    add("x25519", "one X25519 recipient, signed", sealed())
    add("unsigned", "nobody vouches for it", sealed(signer=None), trusted=None)
    add(
        "unsigned-trust-asked",
        "unsigned, a signer is demanded",
        sealed(signer=None),
        "UntrustedSigner",
    )
    hybrid = {"recipients": [IDENTITIES["hybrid"].recipient]}
    add("hybrid", "ML-KEM-768 with X25519", sealed(**hybrid), identity="hybrid")
    add("passphrase", "Argon2id", sealed(recipients=[CHEAP]), identity="passphrase")
    add("kek", "a key-encryption key", sealed(recipients=[IDENTITIES["kek"]]), identity="kek")
    add("service", "a key service", sealed(recipients=[SERVICE]), identity="service")
    everybody = [ME.recipient, CHEAP, IDENTITIES["kek"], SERVICE, OTHER.recipient]
    raw = sealed(recipients=everybody)
    for who in ("x25519", "passphrase", "kek", "service", "x25519-other"):
        add(f"five-recipients-{who}", "any of five recipients opens it", raw, identity=who)
    raw = sealed(recipients=[ME.recipient, OTHER.recipient])
    add("two-recipients", "the second of two", raw, identity="x25519-other")
    add("stranger", "sealed for another", sealed(), "WrongKey", identity="x25519-other")
    wrong = sealed(recipients=[archive.Passphrase("another", cost=archive.INSECURE_TEST_COST)])
    add("wrong-passphrase", "the passphrase is another", wrong, "WrongKey", identity="passphrase")
    file = Parts.of(sealed(signer=None))
    slots = [(99, bytes(16), b"something new"), *file.slots]
    file.copies = [file.copy(slots, file.file_key(ME._private))] * 2
    add("unknown-slot", "a slot of an unknown kind is passed over", file.raw(), trusted=None)


def good_contents() -> None:
    """What can be inside."""
    add("empty-state", "no tensor at all", sealed({}))
    add("two-segments", "a plaintext of two segments", sealed(LARGE))
    header = len(b"".join(encode_state({"x": torch.zeros(100, dtype=torch.uint8)}))) - 100
    whole = {"x": torch.arange(SEGMENT - 32 - header).to(torch.uint8)}
    raw = sealed(whole)
    assert json.loads(Parts.of(raw).core)["plaintext_length"] == SEGMENT - 32
    add("whole-segment", "a plaintext of exactly one segment", raw)
    dtypes = [
        *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32),
        *(torch.int32, torch.uint64, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    ]
    add("dtypes", "each dtype", sealed({str(d): torch.arange(3).to(d) for d in dtypes}))
    weight = torch.arange(4.0)
    add("tied", "one tensor under two names", sealed({"a": weight, "b": {"c": weight}}))
    tree = {"step": 3, 7: (None, [1.5, float("inf")], "text \u00e9"), "t": torch.tensor(2)}
    add("tree", "plain data, a 0-d tensor and integer keys", sealed(tree))
    odd = {"empty": torch.zeros(0, 3), "strided": torch.arange(6).reshape(2, 3).t()}
    add("odd-tensors", "an empty and a strided tensor", sealed(odd))
    inside = safetensors.torch.save(SMALL, metadata={"format": "pt"})
    foreign = forge(sealed(signer=None), ME._private, plaintext=inside).raw()
    add("foreign-plaintext", "safetensors of another tool inside", foreign, trusted=None)
    claims = {"epsilon": 3.0, "delta": 1e-5, "model": {"name": "compact", "layers": [8, 16]}}
    add("claims", "claims that are expected", sealed(claims=claims), expect={"epsilon": 3.0})
    add(
        "unicode-claims",
        "claims and name outside ASCII",
        sealed(claims={"\u00e9": "\u4e2d"}, name="\u00fc"),
    )
    private = sealed(private_claims={"customer": "acme"})
    add("private-claims", "claims inside", private, expect={"customer": "acme"})
    place = archive.Lineage(run="run 1", step=1000, generation=7, previous="ab" * 32)
    raw = sealed(lineage=place)
    add("lineage", "a place in a sequence", raw, core_hash=Parts.of(raw).core_hash.hex())
    raw = sealed(signer=SIGNERS["post-quantum"])
    add("ml-dsa", "Ed25519 and ML-DSA-65", raw, trusted=["post-quantum"])
    broken = flipped(raw, -1)
    add("ml-dsa-half-broken", "only Ed25519 holds", broken, "Tampered", trusted=["post-quantum"])
    broken = flipped(raw, -3373)
    add("ed25519-half-broken", "only ML-DSA-65 holds", broken, "Tampered", trusted=["post-quantum"])


def changed_recipients() -> None:
    """Slots that were exchanged, and changes that were cut off."""
    hers, mine = [OTHER.recipient], [ME.recipient.key_id.hex()]
    raw = sealed()
    more = altered(raw, lambda path: archive.change_recipients(path, identity=ME, add=hers))
    add("recipient-added", "one was added later", more, identity="x25519-other")
    fewer = altered(more, lambda path: archive.change_recipients(path, identity=OTHER, remove=mine))
    add("recipient-removed", "one was removed", fewer, "WrongKey")
    before, after = Parts.of(raw), Parts.of(fewer)
    mark = purpose_key(before.file_key(ME._private), b"mark")
    noise = bytes(range(256)) * 2
    for name, what, copies in (
        ("mark-only", "a change was cut off before the first copy", before.copies),
        ("torn-first-copy", "cut off in the first copy", [noise, before.copies[1]]),
        ("torn-second-copy", "cut off in the second copy", [before.copies[0], noise]),
    ):
        add(name, what, edited(raw, mark=mark, copies=copies))
    between = edited(raw, mark=mark, copies=[after.copies[0], before.copies[1]])
    add("between-copies-old", "cut off between the copies: the old side", between)
    add("between-copies-new", "the new side", between, identity="x25519-other")
    add(
        "forged-mark",
        "a mark of someone without the file key",
        edited(raw, mark=noise[1:33]),
        "Tampered",
    )
    add(
        "copies-differ",
        "no mark, and copies that differ",
        edited(raw, copies=[before.copies[0], noise]),
        "Tampered",
    )
    add(
        "both-copies-torn",
        "a mark, and no copy that holds",
        edited(raw, mark=mark, copies=[noise, noise]),
        "Tampered",
    )
    theirs = Parts.of(sealed())
    add(
        "slots-of-another-file",
        "slots moved from a sibling",
        edited(raw, copies=theirs.copies),
        "Tampered",
    )
    broken = [flipped(before.copies[0], 40)] * 2
    add("slot-changed", "a bit of the wrapped key", edited(raw, copies=broken), "Tampered")
    end = 4 + 100
    broken = [flipped(before.copies[0], end)] * 2
    add("mac-changed", "a bit of the MAC", edited(raw, copies=broken), "Tampered")
    broken = [flipped(before.copies[0], -1)] * 2
    add("copy-padding", "a bit behind the MAC", edited(raw, copies=broken), "Tampered")
    slots = [(3, bytes(16), struct.pack(">III", 2**32 - 1, 1, 1) + bytes(80))]
    dear = [before.copy(slots, bytes(32))] * 2
    add(
        "costly-passphrase",
        "Argon2id with 4 TiB",
        edited(raw, copies=dear),
        "LimitExceeded",
        identity="passphrase",
    )
    file = Parts.of(raw)
    file.copy_length = 1536
    slots = [(3, bytes(16), struct.pack(">III", 8, 1, 1) + bytes(80))] * 9
    file.copies = [file.copy(slots, bytes(32))] * 2
    file.footer, core = b"", file.told
    file.tell(**{**core, "signer": None})
    nine = file.raw()
    add(
        "nine-passphrases",
        "more than eight of them",
        nine,
        "LimitExceeded",
        identity="passphrase",
        trusted=None,
    )


def bad_heads() -> None:
    """What is no sealed file of this version, or has a head that lies."""
    raw = sealed(claims={"epsilon": 3.0})
    add(
        "plain-safetensors", "a plain file in its place", safetensors.torch.save(SMALL), "NotSealed"
    )
    add("plain-zip", "a zip file", b"PK\x03\x04" + bytes(100), "NotSealed")
    add("empty-file", "nothing", b"", "NotSealed")
    add("version-0", "the draft", edited(raw, version=0), "UnsupportedVersion")
    add("version-2", "a later version", edited(raw, version=2), "UnsupportedVersion")
    add("critical-flag", "an unknown flag", edited(raw, flags=0x8000), "UnsupportedVersion")
    add("suite", "another cipher suite", told(raw, suite="none"), "UnsupportedVersion")
    huge = raw[:12] + struct.pack(">I", 2**32 - 1) + raw[16:]
    add("core-length", "a core of 4 GiB", huge, "LimitExceeded")
    huge = raw[:16] + struct.pack(">I", 2**32 - 512) + raw[20:]
    add("copy-length", "copies of 4 GiB", huge, "LimitExceeded")
    add(
        "copy-length-odd",
        "a copy of 513 bytes",
        raw[:16] + struct.pack(">I", 513) + raw[20:],
        "Tampered",
    )
    add("plaintext-length", "2^63 bytes inside", told(raw, plaintext_length=2**63), "LimitExceeded")
    add(
        "plaintext-longer",
        "a GiB more than there is",
        told(raw, plaintext_length=2**30),
        "Truncated",
    )
    add("segment-length", "segments of 1 GiB", told(raw, segment_length=2**30), "LimitExceeded")
    twice = edited(raw, core=lambda file: file.core.replace(b'"name":"",', b'"name":"","name":"",'))
    add("key-twice", "a key of the core stands twice", twice, "Tampered")
    add("unknown-field", "a field that version 1 has not", told(raw, more=1), "Tampered")
    add(
        "claims-edited",
        "a claim changed by an outsider",
        told(raw, claims={"epsilon": 1.0}),
        "Tampered",
    )
    forged = forge(raw, ME._private, claims={"epsilon": 1.0}).raw()
    add("claims-forged", "a claim changed by a reader who redoes the rest", forged, "Tampered")
    core_end = len(Parts.of(raw).prefix)
    assert core_end % 512
    add("core-padding", "a bit between core and mark", flipped(raw, core_end), "Tampered")
    mark_at = len(pad(Parts.of(raw).prefix))
    add("mark-padding", "a bit behind the mark", flipped(raw, mark_at + 40), "Tampered")
    add("cut-in-head", "cut in the head", raw[:600], "Truncated")
    add("cut-in-first-bytes", "cut in the first bytes", raw[:11], "Truncated")
    add("cut-by-one", "the last byte is missing", raw[:-1], "Truncated")
    add("one-more", "a byte too many", raw + b"\0", "Tampered")
    add(
        "claim-differs",
        "another claim than expected",
        raw,
        "ClaimMismatch",
        expect={"epsilon": 1.0},
    )
    add("claim-missing", "a claim that is not there", raw, "ClaimMismatch", expect={"delta": 1e-5})
    add("another-file", "another core hash than expected", raw, "RolledBack", core_hash="00" * 32)


def bad_payloads() -> None:
    """Segments moved, mixed and forged; signatures that do not hold."""
    raw = sealed(LARGE, signer=None)
    file, sibling = Parts.of(raw), Parts.of(sealed(LARGE, signer=None))
    first, second = file.segments
    again = [first, first[: len(second)]]
    for name, what, segments in (
        ("segment-doubled", "the first again in place of the second", again),
        ("segment-of-another-file", "the first of a sibling", [sibling.segments[0], second]),
        ("tag-changed", "a bit of a tag", [flipped(first, -1), second]),
        ("ciphertext-changed", "a bit of the ciphertext", [flipped(first, 1000), second]),
        ("nonce-changed", "a bit of a nonce", [first, flipped(second, 5)]),
    ):
        error = "Truncated" if name == "segment-doubled" else "Tampered"
        add(name, what, edited(raw, segments=segments), error, trusted=None)
    add(
        "stream-of-another-file",
        "a sibling's stream header",
        edited(raw, stream=sibling.stream),
        "Tampered",
        trusted=None,
    )
    add(
        "stream-tag",
        "a bit of the stream header's tag",
        edited(raw, stream=flipped(file.stream, -1)),
        "Tampered",
        trusted=None,
    )
    raw = sealed(LARGE)
    file = Parts.of(raw)
    broken = [flipped(file.segments[0], -1), file.segments[1]]
    add(
        "signed-tag-changed",
        "a bit of a tag, under a signature",
        edited(raw, segments=broken),
        "Tampered",
    )
    add(
        "signed-refitted",
        "the same, with leaves and root that fit",
        refitted(raw, segments=broken),
        "Tampered",
    )
    other = b"".join(encode_state({"weight": torch.zeros(1100)}))
    forged = forge(raw, ME._private, plaintext=other)
    add(
        "reader-forges-weights",
        "other weights by a reader, old signature",
        forged.raw(),
        "Tampered",
    )
    forged.footer = file.footer
    add("reader-keeps-footer", "other weights, old footer", forged.raw(), "Tampered")
    add("signature-changed", "a bit of the signature", flipped(raw, -1), "Tampered")
    add("root-changed", "a bit of the root", flipped(raw, -100), "Tampered")
    add("leaf-changed", "a bit of a leaf", flipped(raw, -140), "Tampered")
    mallory = SIGNERS["mallory"]
    signature = mallory.sign(file.core_hash, root_of(file.leaves))
    swapped_key = edited(raw, footer=file.footer[:-96] + mallory.verifier.public + signature)
    add("another-signers-key", "a correct signature of another key", swapped_key, "Tampered")
    add("another-signer", "made by somebody else", sealed(signer=mallory), "UntrustedSigner")
    resigned = forge(sealed(), ME._private, signer=mallory.verifier.signer_id)
    root = root_of(resigned.leaves)
    signed = mallory.verifier.public + mallory.sign(resigned.core_hash, root)
    resigned.footer = b"".join(resigned.leaves) + root + signed
    add("signed-anew", "a reader signs it with another key", resigned.raw(), "UntrustedSigner")
    stripped = forge(sealed(), ME._private, signer=None).raw()
    add("signature-stripped", "a reader makes it unsigned", stripped, "UntrustedSigner")


def bad_plaintexts() -> None:
    """What a recipient can put inside, unsigned: refused as well."""
    raw = sealed(signer=None)

    def inside(name: str, what: str, plaintext: bytes) -> None:
        add(
            name,
            what,
            forge(raw, ME._private, plaintext=plaintext).raw(),
            "StateError",
            trusted=None,
        )

    def entry(**changes) -> bytes:
        tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
        header = json.dumps({"a": tensor}).encode()
        return len(header).to_bytes(8, "little") + header + bytes(8)

    inside("no-safetensors", "noise inside", bytes(20))
    inside(
        "header-too-long", "a header longer than the file", (2**40).to_bytes(8, "little") + b"{}"
    )
    inside("overlap", "offsets that do not tile the data", entry(data_offsets=[4, 12]))
    inside("shape-too-large", "a shape of 2^60", entry(shape=[2**60]))
    inside("unknown-dtype", "a dtype that nobody knows", entry(dtype="F128"))
    lost = {"secure_cnn.state": '{"tensor":"nowhere"}'}
    inside(
        "lost-tensor", "a tree of tensors not there", safetensors.torch.save(SMALL, metadata=lost)
    )
    pickle = {"secure_cnn.state": "cos\nsystem\n(S'true'\ntR."}
    inside("pickle", "a pickle for the tree", safetensors.torch.save(SMALL, metadata=pickle))


def finish(entry: _Entry) -> _Entry:
    """An entry with the hash of the plaintext, by the independent reader, where there is one."""
    raw = (FOLDER / str(entry["file"])).read_bytes()
    if entry["outcome"] != "opens":
        return entry
    identities = {**IDENTITIES, "passphrase": CHEAP, "service": SERVICE}
    with tempfile.TemporaryDirectory() as folder:
        source, plain = Path(folder) / "x", Path(folder) / "y"
        source.write_bytes(raw)
        archive.decrypt(source, plain, identity=identities[entry["open"]["identity"]])
        return {**entry, "plaintext_sha256": hashlib.sha256(plain.read_bytes()).hexdigest()}


def main() -> None:
    """Writes all files and their index."""
    if FOLDER.exists():
        sys.exit(f"{FOLDER} is there: files of a version are made once")
    FOLDER.mkdir()
    for group in (
        good_recipients,
        good_contents,
        changed_recipients,
        bad_heads,
        bad_payloads,
        bad_plaintexts,
    ):
        group()
    index = {
        "format": 1,
        "identities": {name: key.to_text() for name, key in IDENTITIES.items()},
        "passphrase": PASSPHRASE,
        "service": {
            "name": "vectors/key/1",
            "wrap": "XOR with SHAKE-256 of the word, then the context",
            "word": base64.b64encode(b"vectors").decode(),
        },
        "verifiers": {name: signer.verifier.to_text() for name, signer in SIGNERS.items()},
        "vectors": [finish(entry) for entry in _ENTRIES],
    }
    (FOLDER / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
