"""The vectors of every version of the format end in what their index says, for ever."""

import base64
import contextlib
import hashlib
import io
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from forging import Parts

from secure_cnn import archive
from secure_cnn.archive.format.core import Core

FOLDER = Path(__file__).parent / "vectors" / "v1"
INDEX = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
VERIFIERS = {name: archive.Verifier.from_text(text) for name, text in INDEX["verifiers"].items()}


class Service:
    """The key service that the index describes."""

    def wrap(self, key, context):
        word = base64.b64decode(INDEX["service"]["word"])
        pad = hashlib.shake_256(word + context).digest(len(key))
        return bytes(a ^ b for a, b in zip(key, pad, strict=True))

    unwrap = wrap


def identity(name):
    """Who opens a vector."""
    if name == "passphrase":
        return archive.Passphrase(INDEX["passphrase"])
    if name == "service":
        return archive.ServiceKey(Service(), INDEX["service"]["name"])
    kind = archive.KeyEncryptionKey if name == "kek" else archive.Identity
    return kind.from_text(INDEX["identities"][name])


def settings(vector):
    """How a vector is opened."""
    call = vector["open"]
    trusted = call["trusted"]
    return {
        "identity": identity(call["identity"]),
        "trusted": None if trusted is None else [VERIFIERS[name] for name in trusted],
        "expect": call.get("expect"),
        "core_hash": call.get("core_hash"),
    }


@pytest.mark.parametrize("vector", INDEX["vectors"], ids=lambda vector: Path(vector["file"]).stem)
def test_a_vector_ends_in_what_its_index_says(vector, tmp_path):
    """It opens with this plaintext, or raises exactly this error, whole and in part."""
    path, call = FOLDER / vector["file"], settings(vector)
    if vector["outcome"] == "opens":
        archive.decrypt(path, tmp_path / "x", identity=call["identity"], trusted=call["trusted"])
        plain = (tmp_path / "x").read_bytes()
        assert hashlib.sha256(plain).hexdigest() == vector["plaintext_sha256"]
        archive.load(path, **call)
        tensors = safetensors.torch.load(plain)
        with archive.open_lazy(path, **call) as file:
            assert set(file.names) >= set(tensors)
            assert all(
                torch.equal(file.tensor(name).reshape(-1).view(torch.uint8), raw)
                for name, raw in ((n, t.reshape(-1).view(torch.uint8)) for n, t in tensors.items())
            )
        return
    with pytest.raises(archive.ArchiveError) as caught:
        archive.load(path, **call)
    assert type(caught.value).__name__ == vector["outcome"]


def opens_at_rest(vector):
    """Whether a vector opens and is not in the middle of a change."""
    if vector["outcome"] != "opens":
        return False
    return not any(Parts.of((FOLDER / vector["file"]).read_bytes()).mark)


def test_a_reader_of_the_text_alone_opens_the_good_ones():
    """The independent reader agrees on every vector that is sealed for an X25519 key."""
    opened = 0
    for vector in INDEX["vectors"]:
        parts = Parts.of((FOLDER / vector["file"]).read_bytes()) if opens_at_rest(vector) else None
        if parts and vector["open"]["identity"] == "x25519":
            plain = parts.plaintext(parts.file_key(identity("x25519")._private))
            assert hashlib.sha256(plain).hexdigest() == vector["plaintext_sha256"]
            opened += 1
    assert opened >= 12


def test_there_are_enough_and_each_is_small():
    """Every file is in the index and the other way round; none is over 8 KiB."""
    files = {path.name for path in FOLDER.glob("*.sealed")}
    assert files == {vector["file"] for vector in INDEX["vectors"]}
    assert len(files) >= 40
    assert all((FOLDER / name).stat().st_size <= 8192 for name in files)
    errors = {vector["outcome"] for vector in INDEX["vectors"]}
    assert errors >= {
        *("opens", "ClaimMismatch", "LimitExceeded", "NotSealed", "RolledBack", "StateError"),
        *("Tampered", "Truncated", "UnsupportedVersion", "UntrustedSigner", "WrongKey"),
    }


EXAMPLE = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
EXAMPLE = EXAMPLE.partition("\n## 14. Example\n")[2].partition("\n## 15.")[0]
BYTES = re.compile(r"`((?:[0-9A-F]{2} ?)+)`")


def test_the_worked_example_of_the_text_is_what_its_code_makes(tmp_path, monkeypatch):
    """Every offset, length and byte of its table, and its core, save what is drawn anew."""
    code = re.search(r"```python\n(.*?)```", EXAMPLE, re.S)[1]
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext(tmp_path))
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, {})
    made, at = (tmp_path / "model.sealed").read_bytes(), 0
    for row in re.findall(r"^\| (\d+) \| (\d+) \| (.+) \|$", EXAMPLE, re.M):
        assert int(row[0]) == at
        part, at = made[at : at + int(row[1])], at + int(row[1])
        found = 0
        for literal in BYTES.findall(row[2]):
            found = part.index(bytes.fromhex(literal), found) + len(bytes.fromhex(literal))
        assert not row[2].startswith("`") or part.startswith(bytes.fromhex(BYTES.match(row[2])[1]))
    assert at == len(made) == int(re.search(r"has (\d+) bytes", EXAMPLE)[1])
    text = re.search(r"```json\n(.*?)\n```", EXAMPLE, re.S)[1].encode()
    core, shown = Core.from_bytes(made[20 : 20 + len(text)]), Core.from_bytes(text)
    drawn = {name: getattr(core, name) for name in ("audience", "created", "file_id", "signer")}
    assert shown.to_bytes() == text
    assert replace(shown, **drawn) == core
