"""FLOE against its published answers, and against people who cut, swap and mix segments."""

import struct
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_cnn.archive.errors import ArchiveError, LimitExceeded, Tampered
from secure_cnn.archive.format import stream
from secure_cnn.archive.format.payload import Layout
from secure_cnn.archive.format.tensors import Pieces

VECTORS = Path(__file__).parents[1] / "../shared/vectors/floe"
KEY = bytes(32)


def encrypt(plaintext: bytes, *, key=KEY, aad=b"aad", segment_length=64) -> list[bytes]:
    """The header and the segments of a whole message."""
    floe = stream.create_stream(key, aad, segment_length)
    layout = Layout(offset=0, segment_length=segment_length, plaintext_length=len(plaintext))
    parts = [floe.header]
    for index in range(layout.segments):
        start, length = layout.plaintext(index)
        out = memoryview(bytearray(segment_length))
        used = floe.encrypt_into(
            index, layout.is_last(index), plaintext[start : start + length], out
        )
        parts.append(bytes(out[:used]))
    return parts


def decrypt(parts: list[bytes], *, key=KEY, aad=b"aad") -> bytes:
    """The plaintext of a header and segments."""
    floe = stream.open_stream(key, aad, parts[0])
    plain = b""
    for index, segment in enumerate(parts[1:]):
        out = bytearray(max(0, len(segment) - stream.OVERHEAD))
        last = index == len(parts) - 2
        floe.decrypt_into(index, last, memoryview(segment), [memoryview(out)])
        plain += bytes(out)
    return plain


def stored(length: int, segment_length: int) -> int:
    """Bytes of a whole stream as the layout of a file has it."""
    return Layout(offset=0, segment_length=segment_length, plaintext_length=length).end


def cut(message: bytes, segment_length: int) -> list[bytes]:
    """Header and segments of a message in one piece."""
    body = message[stream.HEADER_LENGTH :]
    segments = [body[at : at + segment_length] for at in range(0, len(body), segment_length)]
    return [message[: stream.HEADER_LENGTH], *segments]


@pytest.mark.skipif(not VECTORS.exists(), reason="the published FLOE answers are not here")
@pytest.mark.parametrize("language", ["go", "java"])
@pytest.mark.parametrize(("name", "segment_length"), [("64", 64), ("4K", 4096)])
def test_published_answers_open(language, name, segment_length):
    """Messages made by other implementations give their published plaintext."""
    stem = f"{language}_GCM256_IV256_{name}"
    message = bytes.fromhex((VECTORS / f"{stem}_ct.txt").read_text())
    plaintext = bytes.fromhex((VECTORS / f"{stem}_pt.txt").read_text())
    parts = cut(message, segment_length)
    assert len(parts) > 2
    assert decrypt(parts, aad=b"This is AAD") == plaintext
    assert stored(len(plaintext), segment_length) == len(message)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.binary(max_size=200), st.integers(33, 80))
def test_round_trip(plaintext, segment_length):
    """What was encrypted comes back, at any length and segment length."""
    parts = encrypt(plaintext, segment_length=segment_length)
    assert decrypt(parts) == plaintext
    assert len(b"".join(parts)) == stored(len(plaintext), segment_length)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda a, b: [a[0], a[2], a[1], *a[3:]], id="swapped"),
        pytest.param(lambda a, b: [a[0], a[1], *a[3:]], id="dropped"),
        pytest.param(lambda a, b: [a[0], a[1], a[1], *a[3:]], id="doubled"),
        pytest.param(lambda a, b: a[:-1], id="last one cut off"),
        pytest.param(lambda a, b: [*a, a[-1]], id="last one again"),
        pytest.param(lambda a, b: [*a[:2], b[2], *a[3:]], id="spliced"),
        pytest.param(lambda a, b: [b[0], *a[1:]], id="other header"),
        pytest.param(lambda a, b: [*a[:-1], a[-1][:-1]], id="last one cut short"),
        pytest.param(lambda a, b: [*a[:-1], a[-1] + b"\0"], id="last one longer"),
    ],
)
def test_rearranged_segments_are_refused(change):
    """Segments count at their place, in their message, with its end."""
    ours, other = encrypt(bytes(100)), encrypt(bytes(100))
    with pytest.raises(ArchiveError):
        decrypt(change(ours, other))


def test_other_key_or_context_is_refused_at_the_header():
    """Key and associated data are committed to before any segment is touched."""
    header = encrypt(b"hello")[0]
    for key, aad in ((b"x" * 32, b"aad"), (KEY, b"other")):
        with pytest.raises(Tampered, match="does not belong"):
            stream.open_stream(key, aad, header)


@pytest.mark.parametrize("at", range(stream.HEADER_LENGTH))
def test_changed_header_is_refused(at):
    """Each byte of the stream header is bound."""
    header = bytearray(encrypt(b"hello")[0])
    header[at] ^= 1
    with pytest.raises(ArchiveError):
        stream.open_stream(KEY, b"aad", bytes(header))


def test_failed_segment_leaves_zeros():
    """The target of a failed decryption holds nothing of the plaintext."""
    header, segment = encrypt(b"a secret of weight")
    floe = stream.open_stream(KEY, b"aad", header)
    out = bytearray(b"x" * (len(segment) - stream.OVERHEAD))
    broken = segment[:-1] + bytes([segment[-1] ^ 1])
    with pytest.raises(Tampered):
        floe.decrypt_into(0, True, memoryview(broken), [memoryview(out)])
    assert bytes(out) == bytes(len(out))


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=3), st.data())
def test_however_it_is_cut_a_segment_opens_or_leaves_zeros(plaintext, cuts, data):
    """Into one buffer, into several and into empty ones; with one bit changed, into none."""
    header, segment = encrypt(plaintext, segment_length=80)
    floe = stream.open_stream(KEY, b"aad", header)
    ends = [0, *sorted(min(cut, len(plaintext)) for cut in cuts), len(plaintext)]
    outs = [bytearray(b"\xaa" * (stop - start)) for start, stop in pairwise(ends)]
    views = [memoryview(out) for out in outs]
    floe.decrypt_into(0, True, memoryview(segment), views)
    assert b"".join(outs) == plaintext
    broken = bytearray(segment)
    broken[data.draw(st.integers(4, len(segment) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(Tampered):
        floe.decrypt_into(0, True, memoryview(broken), views)
    assert not any(b"".join(outs))


def test_nonces_are_fresh():
    """The same plaintext twice gives nothing in common but the parameters."""
    first, second = encrypt(bytes(100)), encrypt(bytes(100))
    assert first[0][10:] != second[0][10:]
    nonces = [segment[4:16] for segment in first[1:] + second[1:]]
    assert len(set(nonces)) == len(nonces)


@pytest.mark.parametrize("position", [0, (1 << 20) - 1, 1 << 20, (5 << 20) + 7])
def test_keys_rotate_every_2_to_the_20_segments(position):
    """The key of a segment is that of the standard, computed apart, for its block of 2^20."""
    floe = stream.create_stream(KEY, b"aad", 64)
    out = memoryview(bytearray(64))
    floe.encrypt_into(position, False, b"x" * 32, out)
    prefix = floe.header[:42]
    message_key = HKDFExpand(hashes.SHA384(), 48, prefix + b"MESSAGE_KEY:aad").derive(KEY)
    block = struct.pack(">Q", position >> 20 << 20)
    key = HKDFExpand(hashes.SHA384(), 32, prefix + b"DEK:" + block + b"aad").derive(message_key)
    bound = struct.pack(">QB", position, 0)
    assert AESGCM(key).decrypt(bytes(out[4:16]), bytes(out[16:]), bound) == b"x" * 32


def test_a_segment_counts_at_its_position_only():
    """A segment is refused at another place, within its key's reach and beyond it."""
    floe = stream.create_stream(KEY, b"aad", 64)
    out = memoryview(bytearray(64))
    floe.encrypt_into(5, False, bytes(32), out)
    plain = memoryview(bytearray(32))
    floe.decrypt_into(5, False, out, [plain])
    for position in (6, 5 + (1 << 20)):
        with pytest.raises(Tampered):
            floe.decrypt_into(position, False, out, [plain])


@pytest.mark.parametrize("segment_length", [0, 32, (64 << 20) + 1, 2**32 - 1])
def test_segment_length_is_capped(segment_length):
    """A segment length outside the limits is refused before any buffer is made."""
    with pytest.raises(LimitExceeded):
        stream.create_stream(KEY, b"", segment_length)


def test_plaintext_of_a_wrong_length_is_refused():
    """Only the last segment may be short, and none may be long."""
    floe = stream.create_stream(KEY, b"", 64)
    out = memoryview(bytearray(128))
    for length, last in ((31, False), (33, True)):
        with pytest.raises(LimitExceeded):
            floe.encrypt_into(0, last, bytes(length), out)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.binary(max_size=9), max_size=6), st.data())
def test_pieces_read_like_joined_bytes(buffers, data):
    """A read over several buffers is the slice of their concatenation."""
    joined = b"".join(buffers)
    pieces = Pieces([memoryview(buffer) for buffer in buffers])
    start = data.draw(st.integers(0, len(joined)))
    length = data.draw(st.integers(0, len(joined) - start))
    assert len(pieces) == len(joined)
    read = pieces.read(start, length, memoryview(bytearray(length)))
    assert bytes(read) == joined[start : start + length]
