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
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from secure_cnn.archive.certificates import keyed_digest
from secure_cnn.data import ImageData, Split
from secure_cnn.errors import RunError
from secure_cnn.unlearning.shards import Stage, image_bytes

__all__ = ["Entry", "Inventory", "Recognised", "digests_of"]

_BYTES = 32
_MOST = 1 << 28
_NOBODY = bytes(_BYTES)
_SHOWN, _DIGITS = 5, 16


class Entry(NamedTuple):
    """An image as digests under the key of a run, 32 bytes each.

    Attributes:
        row: Of the image with its label and its person.
        image: Of its pixels alone, as `keyed_digest` gives it.
        person: Of whose it is, by the same; 32 zeros where nobody said.
    """

    row: bytes
    image: bytes
    person: bytes

    @property
    def items(self) -> tuple[bytes, ...]:
        """What a certificate knows of it: the image, and the person if one is known."""
        return (self.image,) if self.person == _NOBODY else (self.image, self.person)


@final
@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The images of a run.

    Attributes:
        train: Those trained on, in the order of the data.
        test: Those tested on.
    """

    train: tuple[Entry, ...]
    test: tuple[Entry, ...]
    key: bytes = field(repr=False)

    @classmethod
    def of(cls, data: ImageData, *, key: bytes | None = None) -> "Inventory":
        """That of these images, under a new key or the one of an earlier run."""
        key = secrets.token_bytes(_BYTES) if key is None else key
        train = _entries(key, data.train, data.groups)
        return cls(
            train=tuple(train), test=tuple(_entries(key, data.test, data.test_groups)), key=key
        )

    def some(self, train: Sequence[int], test: Sequence[int]) -> "Inventory":
        """That of these rows."""
        return replace(
            self,
            train=tuple(self.train[row] for row in train),
            test=tuple(self.test[row] for row in test),
        )

    def person(self, name: str) -> bytes:
        """The digest of a person's name."""
        return keyed_digest(self.key, "person", name.encode())

    def fingerprint(self, stage: Stage) -> str:
        """Hexadecimal digest of the images and labels of a stage, in their order."""
        digest = hmac.new(self.key, b"stage", "sha256")
        for row in stage.rows.tolist():
            digest.update(self.train[row].row)
        return digest.hexdigest()

    def recognised(self, data: ImageData) -> "Recognised":
        """The data as the run had them, in whatever way they come now.

        Images that the run did not have are left out: they came later, or were forgotten before.
        Test images may be gone: nothing was trained on them.

        Raises:
            RunError: None of the training images, or none of the test images, are there.
        """
        rows = self._rows(data)
        places, missing = _places(rows), list((Counter(self.train) - Counter(rows)).elements())
        train = [places[each].pop() for each in self.train if places.get(each)]
        test = [places[each].pop() for each in self.test if places.get(each)]
        for what, found, known in (("training", train, self.train), ("test", test, self.test)):
            if not found:
                raise RunError(
                    f"data: expected {what} images of the run, got {data.name} without any of "
                    f"{len(known)}; put them back, or say where they are with --data"
                )
        return Recognised(
            data=_chosen(data, train, test),
            inventory=replace(
                self,
                train=tuple(rows[row] for row in train),
                test=tuple(rows[row] for row in test),
            ),
            missing=tuple(missing),
            others=len(rows) - len(train) - len(test),
        )

    def tested(self, data: ImageData) -> Split | None:
        """The images that the run tested on, in whatever way they and others come now.

        Those that are there; None where none is.
        """
        places = _places(self._rows(data))
        rows = [places[each].pop() for each in self.test if places.get(each)]
        return _pool(data).some(torch.tensor(rows, dtype=torch.int64)) if rows else None

    def _rows(self, data: ImageData) -> list[Entry]:
        """All images, those to test on last."""
        parts = ((data.train, data.groups), (data.test, data.test_groups))
        return [each for part, groups in parts for each in _entries(self.key, part, groups)]

    def to_state(self) -> dict[str, Any]:
        """As tensors."""
        columns = {
            f"{part}.{name}": _tensor([getattr(each, name) for each in entries])
            for part, entries in (("train", self.train), ("test", self.test))
            for name in Entry._fields
        }
        return {"key": _tensor([self.key]), **columns}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Inventory":
        """Reads back what `to_state` gave."""
        key = _read(state.get("key"), "key")
        if len(key) != 1:
            raise RunError("inventory: expected one key in the file, got another file")
        train, test = (
            [_read(state.get(f"{part}.{name}"), f"{part}.{name}") for name in Entry._fields]
            for part in ("train", "test")
        )
        if len({*map(len, train)}) > 1 or len({*map(len, test)}) > 1:
            raise RunError("inventory: expected digests of as many images each, got another file")
        return cls(train=tuple(map(Entry, *train)), test=tuple(map(Entry, *test)), key=key[0])


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Recognised:
    """The images of a run among those that are there.

    Attributes:
        data: Them, those to train on in the order of the training.
        inventory: The same as digests.
        missing: Training images of the run that are not there.
        others: How many are there that the run did not have.
    """

    data: ImageData
    inventory: Inventory
    missing: tuple[Entry, ...] = ()
    others: int = 0

    @property
    def whole(self) -> "Recognised":
        """This, where nothing is missing.

        Raises:
            RunError: Training images are missing, or are said to be somebody else's.
        """
        if self.missing:
            raise RunError(
                f"data: expected the training images of the run, with their labels and persons, "
                f"got {self.data.name} without {digests_of(self.missing)} of "
                f"{len(self.missing) + len(self.inventory.train)}; put them back, or say where "
                "they are with --data"
            )
        return self


def digests_of(entries: Sequence[Entry]) -> str:
    """How many images, and by which digests a certificate would name the first of them."""
    shown = [each.image.hex()[:_DIGITS] for each in entries[:_SHOWN]]
    return f"{len(entries)} ({', '.join(shown)}{', ...' if len(entries) > _SHOWN else ''})"


def _entries(key: bytes, split: Split, groups: Sequence[str] | None) -> Iterator[Entry]:
    """Each image with its label, and with whose it is where that is known."""
    for row, label in enumerate(split.labels.tolist()):
        image = keyed_digest(key, "image", image_bytes(split, row))
        person = _NOBODY
        if groups is not None:
            person = keyed_digest(key, "person", groups[row].encode())
        text = b"row" + label.to_bytes(8, "big") + person + image
        yield Entry(row=hmac.digest(key, text, "sha256"), image=image, person=person)


def _places(rows: Sequence[Entry]) -> dict[Entry, list[int]]:
    """Where each is, the first place last."""
    places: dict[Entry, list[int]] = {}
    for row, entry in reversed(list(enumerate(rows))):
        places.setdefault(entry, []).append(row)
    return places


def _chosen(data: ImageData, train: list[int], test: list[int]) -> ImageData:
    """Rows of training and test images together, as a training and a test part."""
    if train + test == list(range(len(data.train) + len(data.test))):
        return data
    pool = _pool(data)
    groups = None
    if data.groups is not None:
        groups = (*data.groups, *(data.test_groups or ("",) * len(data.test)))
    return ImageData(
        name=data.name,
        train=pool.some(torch.tensor(train, dtype=torch.int64)),
        test=pool.some(torch.tensor(test, dtype=torch.int64)),
        spec=data.spec,
        groups=groups and tuple(groups[row] for row in train),
        test_groups=data.test_groups and groups and tuple(groups[row] for row in test),
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


def _tensor(digests: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, _BYTES)


def _read(tensor: object, name: str) -> tuple[bytes, ...]:
    fits = isinstance(tensor, Tensor) and tensor.dtype == torch.uint8 and tensor.dim() == 2
    if not isinstance(tensor, Tensor) or not fits or tensor.shape[1] != _BYTES:
        raise RunError(f"inventory: expected the digests {name}, got another file")
    if len(tensor) > _MOST:
        raise RunError(f"inventory: expected at most {_MOST} digests, got {len(tensor)}")
    raw = tensor.contiguous().numpy().tobytes()
    return tuple(raw[at : at + _BYTES] for at in range(0, len(raw), _BYTES))
