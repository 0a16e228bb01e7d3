"""Who is in the data of a run: each image known by a digest under a key of the run.

Without the key a digest tells nobody whether an image was there. Beside the stages of a training in
shards it is kept as they are, sealed or plain, and says again later, when images are gone from a
folder, which of the others were trained on: a new cut of what is left would mix them up.
"""

import hmac
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from secure_cnn.data import ImageData, Split
from secure_cnn.errors import RunError
from secure_cnn.unlearning.shards import Stage, image_bytes

__all__ = ["Inventory"]

_BYTES = 32
_MOST = 1 << 28


@final
@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The images of a run.

    Attributes:
        train: Digests of those trained on, with their labels, in the order of the data.
        test: The same of those tested on.
    """

    train: tuple[bytes, ...]
    test: tuple[bytes, ...]
    key: bytes = field(repr=False)

    @classmethod
    def of(cls, data: ImageData, *, key: bytes | None = None) -> "Inventory":
        """That of these images, under a new key or the one of an earlier run."""
        key = secrets.token_bytes(_BYTES) if key is None else key
        return cls(train=tuple(_rows(key, data.train)), test=tuple(_rows(key, data.test)), key=key)

    def image_digest(self, split: Split, row: int) -> bytes:
        """HMAC-SHA256 of an image, whatever its label: what requests and proofs are about."""
        return hmac.digest(self.key, b"image" + image_bytes(split, row), "sha256")

    def fingerprint(self, stage: Stage) -> str:
        """Hexadecimal digest of the images and labels of a stage, in their order."""
        digest = hmac.new(self.key, b"stage", "sha256")
        for row in stage.rows.tolist():
            digest.update(self.train[row])
        return digest.hexdigest()

    def recognised(self, data: ImageData) -> tuple[ImageData, int]:
        """The data as the run had them, in whatever way they come now; and how many are new.

        Images that the run did not have are left out: they came later, or were forgotten before.

        Raises:
            RunError: Images of the run are missing.
        """
        rows = [*_rows(self.key, data.train), *_rows(self.key, data.test)]
        places: dict[bytes, list[int]] = {}
        for row, digest in reversed(list(enumerate(rows))):
            places.setdefault(digest, []).append(row)
        missing = Counter((*self.train, *self.test)) - Counter(rows)
        if missing:
            raise RunError(
                f"data: expected the images of the run, got {data.name} without "
                f"{sum(missing.values())} of {len(self.train) + len(self.test)}; put them back, or "
                "say where they are with --data"
            )
        parts = [[places[digest].pop() for digest in part] for part in (self.train, self.test)]
        return _chosen(data, *parts), len(rows) - sum(map(len, parts))

    def to_state(self) -> dict[str, Any]:
        """As tensors."""
        return {
            "key": _tensor([self.key]),
            "train": _tensor(self.train),
            "test": _tensor(self.test),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Inventory":
        """Reads back what `to_state` gave."""
        found = {name: _read(state.get(name), name) for name in ("key", "train", "test")}
        if len(found["key"]) != 1:
            raise RunError("inventory: expected one key in the file, got another file")
        return cls(train=found["train"], test=found["test"], key=found["key"][0])


def _rows(key: bytes, split: Split) -> Iterator[bytes]:
    for row, label in enumerate(split.labels.tolist()):
        text = b"row" + label.to_bytes(8, "big") + image_bytes(split, row)
        yield hmac.digest(key, text, "sha256")


def _chosen(data: ImageData, train: list[int], test: list[int]) -> ImageData:
    """Rows of training and test images together, as a training and a test part."""
    if train + test == list(range(len(data.train) + len(data.test))):
        return data
    images = torch.cat([data.train.images, data.test.images])
    labels = torch.cat([data.train.labels, data.test.labels])
    groups = None if data.groups is None else (*data.groups, *(data.test_groups or ()))
    ids = None if data.ids is None else (*data.ids, *(data.test_ids or ()))
    return ImageData(
        name=data.name,
        train=Split(images=images[train], labels=labels[train]),
        test=Split(images=images[test], labels=labels[test]),
        spec=data.spec,
        groups=groups and tuple(groups[row] for row in train),
        test_groups=groups and tuple(groups[row] for row in test),
        ids=ids and tuple(ids[row] for row in train),
        test_ids=ids and tuple(ids[row] for row in test),
    )


def _tensor(digests: tuple[bytes, ...] | list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, _BYTES)


def _read(tensor: object, name: str) -> tuple[bytes, ...]:
    fits = isinstance(tensor, Tensor) and tensor.dtype == torch.uint8 and tensor.dim() == 2
    if not isinstance(tensor, Tensor) or not fits or tensor.shape[1] != _BYTES:
        raise RunError(f"inventory: expected the digests {name}, got another file")
    if len(tensor) > _MOST:
        raise RunError(f"inventory: expected at most {_MOST} digests, got {len(tensor)}")
    raw = tensor.contiguous().numpy().tobytes()
    return tuple(raw[at : at + _BYTES] for at in range(0, len(raw), _BYTES))
