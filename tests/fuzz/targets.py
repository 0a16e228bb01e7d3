"""What the fuzzer feeds: bytes of an attacker in, one of our errors or a true answer out.

Each target takes any bytes. Whatever leaves it, but a return, is a finding: an exception that is
not of our tree, or an `AssertionError` that says which promise was broken.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from forging import Parts

from secure_cnn import archive
from secure_cnn.archive.card import model_card
from secure_cnn.archive.format.header import MAX_HEADER, parse_header
from secure_cnn.archive.format.slots import pack_slots
from secure_cnn.archive.format.state import decode_state, encode_state, index_of, tensor_names
from secure_cnn.archive.format.stream import HEADER_LENGTH, OVERHEAD, Floe, open_stream
from secure_cnn.archive.info import describe

FOLDER = Path(__file__).parent
VECTORS = FOLDER.parent / "vectors" / "v1"
INDEX = json.loads((VECTORS / "index.json").read_text(encoding="utf-8"))
ME = archive.Identity.from_text(INDEX["identities"]["x25519"])
TRUSTED = [archive.Verifier.from_text(INDEX["verifiers"]["maker"])]
SEALED = {path.stem: path.read_bytes() for path in sorted(VECTORS.glob("*.sealed"))}
KEY, AAD, SEGMENT = bytes(32), b"fuzz", 64
PLAIN = bytes(range(100))


def core_hash_of(raw: bytes) -> str:
    """What names a file, from its bytes alone."""
    return hashlib.sha256(raw[: 20 + int.from_bytes(raw[12:16], "big")]).hexdigest()


@contextlib.contextmanager
def file_of(raw: bytes) -> Iterator[str]:
    """A path to a file without a name."""
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        file.flush()
        yield f"/dev/fd/{file.fileno()}"


def opened(raw: bytes) -> bytes | None:
    """The plain file of what opens with our key; None if nothing does."""
    with file_of(raw) as path, contextlib.suppress(archive.ArchiveError):
        return b"".join(encode_state(archive.load(path, identity=ME)))
    return None


def vouched(raw: bytes) -> str | None:
    """The core hash of what our signer signed; None if that is nothing of this."""
    with file_of(raw) as path, contextlib.suppress(archive.ArchiveError):
        return archive.verify(path, trusted=TRUSTED).core_hash
    return None


OPENED = {opened(raw) for raw in SEALED.values()} | {None}
VOUCHED = {vouched(raw) for raw in SEALED.values()} | {None}


def header(raw: bytes) -> None:
    """A head that is taken says of itself only what its bytes say, and stays in its limits."""
    with contextlib.suppress(archive.ArchiveError):
        head = parse_header(raw)
        assert raw.startswith(head.prefix)
        assert len(head.prefix) < head.payload_offset <= min(MAX_HEADER, len(raw))
        assert head.core_hash.hex() == core_hash_of(raw)
        for copy in head.copies:
            assert copy.maced[4:] == pack_slots(copy.slots)
            assert len(copy.maced) + len(copy.mac) <= head.copy_length
        info = describe(head, None, len(raw), verified=False)
        assert str(info).isprintable() or "\n" in str(info)
        assert "UNVERIFIED" in model_card(info)


def stream(raw: bytes) -> None:
    """A segment opens to what was sealed at its place, or leaves a buffer of zeros."""
    segments = [raw[at : at + SEGMENT] for at in range(HEADER_LENGTH, len(raw), SEGMENT)]
    try:
        floe = open_stream(KEY, AAD, raw[:HEADER_LENGTH])
    except archive.ArchiveError:
        return
    for position, segment in enumerate(segments):
        last = position == len(segments) - 1
        out = bytearray(b"\xaa" * max(0, len(segment) - OVERHEAD))
        try:
            floe.decrypt_into(position, last, memoryview(segment), [memoryview(out)])
        except archive.ArchiveError:
            assert not out.strip(b"\0") or not out.strip(b"\xaa")
        else:
            start = position * floe.piece
            assert out == PLAIN[start : start + floe.piece]


def file(raw: bytes) -> None:
    """What opens, or passes as signed, is what somebody sealed or signed."""
    with file_of(raw) as path, contextlib.suppress(archive.ArchiveError):
        str(archive.inspect(path))
    assert vouched(raw) in VOUCHED
    assert opened(raw) in OPENED


def forged(raw: bytes) -> None:
    """Any core by a recipient, who has the file key and so makes all fit that binds it."""
    parts = Parts.of(SEALED["unsigned"])
    file_key = parts.file_key(ME._private)
    plain = parts.plaintext(file_key)
    parts.core = raw
    parts.copies = [parts.copy([parts.x25519_slot(file_key, ME._private)], file_key)] * 2
    with contextlib.suppress(Exception):  # what no segment length fits keeps its stream
        parts.encrypt(file_key, plain, iv=bytes(32))
        parts.fit_footer()
    assert opened(parts.raw()) in OPENED
    assert vouched(parts.raw()) in VOUCHED


def state(raw: bytes) -> None:
    """A plaintext by someone who may seal: a tree that can be saved again, or our error."""
    # The length is made to fit: mutation would hardly ever hit it.
    length = (raw.rfind(b"}") + 1).to_bytes(8, "little")
    data = torch.frombuffer(bytearray(length + raw), dtype=torch.uint8)
    with contextlib.suppress(archive.StateError):
        index = index_of(data)
        tensor_names(index)
        tree = decode_state(data)
        again = b"".join(encode_state(tree))
        decode_state(torch.frombuffer(bytearray(again), dtype=torch.uint8))


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (header, stream, file, forged, state)
}


def seeds(name: str) -> list[bytes]:
    """Where mutation starts: the vectors, or what is in them, and the corpus kept here."""
    made = {
        "header": [raw[: len(raw) - 300] for raw in SEALED.values()],
        "stream": [whole_stream()],
        "file": list(SEALED.values()),
        "forged": [Parts.of(SEALED[name]).core for name in ("unsigned", "lineage", "claims")],
        "state": [
            plaintext_of(name)[8:] for name in ("dtypes", "odd-tensors", "private-claims", "tree")
        ],
    }[name]
    return made + [path.read_bytes() for path in sorted((FOLDER / "corpus" / name).glob("*"))]


def whole_stream() -> bytes:
    """The stream of `PLAIN` in four segments."""
    floe = Floe(KEY, AAD, SEGMENT, bytes(32))
    raw, out = floe.header, memoryview(bytearray(SEGMENT))
    starts = range(0, len(PLAIN), floe.piece)
    for position, start in enumerate(starts):
        part = PLAIN[start : start + floe.piece]
        raw += out[: floe.encrypt_into(position, position == len(starts) - 1, part, out)]
    return raw


def plaintext_of(name: str) -> bytes:
    """The safetensors file in a vector."""
    parts = Parts.of(SEALED[name])
    return parts.plaintext(parts.file_key(ME._private))
