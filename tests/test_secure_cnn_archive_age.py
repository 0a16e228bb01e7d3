"""Files for who uses age: read back by the text of its specification alone."""

import base64
import hmac

import pytest
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secure_cnn import archive

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()
LETTERS = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"


def polymod(words):
    """The checksum of BIP 173, from its reference code."""
    generator, check = [0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3], 1
    for word in words:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ word
        for bit in range(5):
            check ^= generator[bit] if (top >> bit) & 1 else 0
    return check


def bech32(prefix, raw):
    """The text of a key."""
    bits = "".join(f"{byte:08b}" for byte in raw)
    bits += "0" * (-len(bits) % 5)
    words = [int(bits[at : at + 5], 2) for at in range(0, len(bits), 5)]
    spread = [ord(c) >> 5 for c in prefix] + [0] + [ord(c) & 31 for c in prefix]
    check = polymod(spread + words + [0] * 6) ^ 1
    words += [check >> 5 * (5 - place) & 31 for place in range(6)]
    return prefix + "1" + "".join(LETTERS[word] for word in words)


def derive(key, salt, info):
    """HKDF-SHA-256."""
    return HKDF(hashes.SHA256(), 32, salt=salt, info=info).derive(key)


def decode(text):
    """Base64 without padding."""
    return base64.b64decode(text + b"=" * (-len(text) % 4))


def read_age(raw, private):
    """The plaintext of an age file for the holder of an X25519 key."""
    head, _, rest = raw.partition(b"\n--- ")
    mac, _, body = rest.partition(b"\n")
    lines = head.split(b"\n")
    assert lines[0] == b"age-encryption.org/v1"
    public, file_key = private.public_key().public_bytes_raw(), None
    for stanza, wrapped in zip(lines[1::2], lines[2::2], strict=True):
        assert stanza.startswith(b"-> X25519 ")
        share = decode(stanza.split()[2])
        shared = private.exchange(X25519PublicKey.from_public_bytes(share))
        key = derive(shared, share + public, b"age-encryption.org/v1/X25519")
        try:
            file_key = ChaCha20Poly1305(key).decrypt(bytes(12), decode(wrapped), None)
        except InvalidTag:
            continue
    assert len(file_key) == 16
    expected = hmac.digest(derive(file_key, b"", b"header"), head + b"\n---", "sha256")
    assert decode(mac) == expected
    cipher, plain = ChaCha20Poly1305(derive(file_key, body[:16], b"payload")), b""
    chunks = [body[at : at + 65552] for at in range(16, len(body), 65552)]
    for index, chunk in enumerate(chunks):
        nonce = index.to_bytes(11, "big") + bytes([index == len(chunks) - 1])
        plain += cipher.decrypt(nonce, chunk, None)
    return plain


def test_the_key_pair_of_the_specification(tmp_path):
    """The recipient that `age.md` shows is that of its identity, 32 bytes of 0x42."""
    private = X25519PrivateKey.from_private_bytes(b"\x42" * 32)
    known = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"
    assert bech32("age", private.public_key().public_bytes_raw()) == known
    path, out = tmp_path / "a", tmp_path / "a.age"
    archive.save(path, {"x": 1}, recipients=[ME.recipient])
    archive.decrypt(path, tmp_path / "plain", identity=ME)
    archive.export_age(path, out, identity=ME, recipients=[known])
    assert read_age(out.read_bytes(), private) == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("count", [0, 16_000, 16_368, 20_000, 1_100_000])
def test_an_age_file_holds_the_plaintext(tmp_path, count):
    """For each of two recipients, of any number of chunks and blocks."""
    state = {"x": torch.arange(count, dtype=torch.int32)}
    path, out = tmp_path / "a", tmp_path / "a.age"
    archive.save(path, state, recipients=[ME.recipient], signer=SIGNER)
    archive.decrypt(path, tmp_path / "plain", identity=ME)
    plain = (tmp_path / "plain").read_bytes()
    pair = [X25519PrivateKey.generate() for _ in range(2)]
    texts = [bech32("age", one.public_key().public_bytes_raw()) for one in pair]
    archive.export_age(path, out, identity=ME, recipients=texts, trusted=[SIGNER.verifier])
    for private in pair:
        assert read_age(out.read_bytes(), private) == plain


def test_a_recipient_in_upper_case_is_the_same_one(tmp_path):
    """BIP 173 allows either case, which codes for cameras use, but never both."""
    private = X25519PrivateKey.generate()
    text = bech32("age", private.public_key().public_bytes_raw())
    path, out = tmp_path / "a", tmp_path / "a.age"
    archive.save(path, {}, recipients=[ME.recipient])
    archive.decrypt(path, tmp_path / "plain", identity=ME)
    archive.export_age(path, out, identity=ME, recipients=[text.upper()])
    assert read_age(out.read_bytes(), private) == (tmp_path / "plain").read_bytes()
    mixed = text[:20] + text[20:].upper()
    with pytest.raises(archive.InvalidKey, match="mixed"):
        archive.export_age(path, tmp_path / "b", identity=ME, recipients=[mixed])


def test_what_is_no_recipient_is_refused(tmp_path):
    """A typing error, another kind of key, a weak point, nobody: nothing is written."""
    path, out = tmp_path / "a", tmp_path / "a.age"
    archive.save(path, {}, recipients=[ME.recipient], signer=SIGNER)
    good = bech32("age", X25519PrivateKey.generate().public_key().public_bytes_raw())
    wrong = [
        [good[:-1] + ("q" if good[-1] != "q" else "p")],
        [good[:-1]],
        [good[:20] + good[20:].upper()],
        ["AGE" + good[3:]],
        [good, "age1pq1xyz"],
        [bech32("agf", bytes(range(32)))],
        [bech32("age", bytes(32))],
        [bech32("age", bytes(31))],
        [""],
        ["é"],
        [],
    ]
    for recipients in wrong:
        with pytest.raises(archive.InvalidKey):
            archive.export_age(path, out, identity=ME, recipients=recipients)
    with pytest.raises(archive.UntrustedSigner):
        archive.export_age(path, out, identity=ME, recipients=[good], trusted=[])
    assert list(tmp_path.iterdir()) == [path]


def test_a_broken_segment_leaves_no_age_file(tmp_path):
    """What cannot be read whole is not handed on in part."""
    path, out = tmp_path / "a", tmp_path / "a.age"
    archive.save(path, {"x": torch.ones(9000)}, recipients=[ME.recipient], segment_length=4096)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    text = bech32("age", X25519PrivateKey.generate().public_key().public_bytes_raw())
    with pytest.raises(archive.Tampered):
        archive.export_age(path, out, identity=ME, recipients=[text])
    assert list(tmp_path.iterdir()) == [path]
