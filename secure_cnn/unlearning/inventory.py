"""Who is in the data of a run: each image known by a digest under a key of the run.

Without the key a digest tells nobody whether an image was there. Beside the stages of a training in
shards it is kept as they are, sealed or plain, and says again later, when images are gone from a
folder, which of the others were trained on: a new cut of what is left would mix them up.
"""

import hmac
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from secure_cnn.data import ImageData, Split
from secure_cnn.errors import RunError
from secure_cnn.unlearning.requests import Request
from secure_cnn.unlearning.shards import Stage, image_bytes

__all__ = ["Inventory"]

_BYTES = 32
_MOST = 1 << 28


@final
@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The images of a run.

    Attributes:
        train: Digests of those trained on, with label and person, in the order of the data.
        test: The same of those tested on.
    """

    train: tuple[bytes, ...]
    test: tuple[bytes, ...]
    key: bytes = field(repr=False)

    @classmethod
    def of(cls, data: ImageData, *, key: bytes | None = None) -> "Inventory":
        """That of these images, under a new key or the one of an earlier run."""
        key = secrets.token_bytes(_BYTES) if key is None else key
        train, test = _rows(key, data.train, data.groups), _rows(key, data.test, data.test_groups)
        return cls(train=tuple(train), test=tuple(test), key=key)

    def without(self, request: Request) -> "Inventory":
        """That of those who stay."""
        return replace(
            self,
            train=tuple(self.train[row] for row in request.without(len(self.train))),
            test=tuple(self.test[row] for row in request.without_tested(len(self.test))),
        )

    def fingerprint(self, stage: Stage) -> str:
        """Hexadecimal digest of the images and labels of a stage, in their order."""
        digest = hmac.new(self.key, b"stage", "sha256")
        for row in stage.rows.tolist():
            digest.update(self.train[row])
        return digest.hexdigest()

    def recognised(self, data: ImageData) -> tuple[ImageData, int]:
        """The data as the run had them, in whatever way they come now; and how many are new.

        Images that the run did not have are left out: they came later, or were forgotten before.
        Test images may be gone: nothing was trained on them.

        Raises:
            RunError: Training images of the run are missing, or are said to be somebody else's.
        """
        rows = self._rows(data)
        missing = Counter(self.train) - Counter(rows)
        if missing:
            raise RunError(
                "data: expected the training images of the run, with their labels and persons, got "
                f"{data.name} without {sum(missing.values())} of {len(self.train)}; put them back, "
                "say where they are with --data, or train anew on what remains"
            )
        places = _places(rows)
        train = [places[digest].pop() for digest in self.train]
        test = [places[digest].pop() for digest in self.test if places.get(digest)]
        if not test:
            raise RunError(
                f"data: expected test images of the run, got {data.name} without any of "
                f"{len(self.test)}; put them back, or say where they are with --data"
            )
        return _chosen(data, train, test), len(rows) - len(train) - len(test)

    def tested(self, data: ImageData) -> Split | None:
        """The images that the run tested on, in whatever way they and others come now.

        Those that are there; None where none is.
        """
        places = _places(self._rows(data))
        rows = [places[digest].pop() for digest in self.test if places.get(digest)]
        return _pool(data).some(torch.tensor(rows, dtype=torch.int64)) if rows else None

    def _rows(self, data: ImageData) -> list[bytes]:
        """Digests of all images, those to test on last."""
        parts = ((data.train, data.groups), (data.test, data.test_groups))
        return [digest for part, groups in parts for digest in _rows(self.key, part, groups)]

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


def _rows(key: bytes, split: Split, groups: Sequence[str] | None) -> Iterator[bytes]:
    """A digest of each image with its label, and with whose it is where that is known."""
    for row, label in enumerate(split.labels.tolist()):
        person = b"" if groups is None else groups[row].encode()
        text = b"row" + label.to_bytes(8, "big") + len(person).to_bytes(8, "big") + person
        yield hmac.digest(key, text + image_bytes(split, row), "sha256")


def _places(rows: Sequence[bytes]) -> dict[bytes, list[int]]:
    """Where each digest is, the first place last."""
    places: dict[bytes, list[int]] = {}
    for row, digest in reversed(list(enumerate(rows))):
        places.setdefault(digest, []).append(row)
    return places


def _chosen(data: ImageData, train: list[int], test: list[int]) -> ImageData:
    """Rows of training and test images together, as a training and a test part."""
    if train + test == list(range(len(data.train) + len(data.test))):
        return data
    pool = _pool(data)
    groups = None if data.groups is None else (*data.groups, *(data.test_groups or ()))
    return ImageData(
        name=data.name,
        train=pool.some(torch.tensor(train, dtype=torch.int64)),
        test=pool.some(torch.tensor(test, dtype=torch.int64)),
        spec=data.spec,
        groups=groups and tuple(groups[row] for row in train),
        test_groups=groups and tuple(groups[row] for row in test),
    )


def _pool(data: ImageData) -> Split:
    """All images, those to test on last."""
    ids = None
    if data.train.ids is not None and data.test.ids is not None:
        ids = (*data.train.ids, *data.test.ids)
    return Split(
        images=torch.cat([data.train.images, data.test.images]),
        labels=torch.cat([data.train.labels, data.test.labels]),
        ids=ids,
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
