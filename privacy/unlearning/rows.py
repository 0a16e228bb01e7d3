"""Features and labels that callers pass in, and who is in a training: rows known by their digests.

A head on fixed features is a function of sums over rows. Whoever takes a row out of the sums must
be sure that it is in them, or they are those of no training at all.
"""

import hashlib
import math
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from privacy import validate
from privacy.errors import PlanError, UnlearningError

__all__ = [
    "Labels",
    "Present",
    "array_of",
    "checked_features",
    "checked_labels",
    "positive",
    "tensor_in",
    "whole",
    "within",
]

Labels = npt.NDArray[np.int64]
_DIGEST_BYTES, _KEY_BYTES = 16, 32
_SMALLEST, _LARGEST = 1e-30, 1e30


def array_of(value: Any) -> npt.NDArray[Any]:
    """The value as an array; what is none has no axis, so that who asked can tell."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.dtype in (torch.bfloat16, torch.float16):
            value = value.to_dense().float()
        found: npt.NDArray[Any] = value.detach().cpu().numpy()
        return found
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return np.empty((), dtype=object)


def checked_features(features: Any, *, width: int | None = None) -> npt.NDArray[np.floating[Any]]:
    """Finite floats `[n, width]` of at least one row, as an array; of a tensor, on the CPU."""
    found = array_of(features)
    if found.ndim != 2 or found.dtype.kind not in "fiu" or not found.size:
        raise UnlearningError(
            f"features: expected numbers [rows, features], got {_described(features)}"
        )
    if width is not None and found.shape[1] != width:
        raise UnlearningError(
            f"features: expected {width} in each row, as in the training, got {found.shape[1]}"
        )
    if not np.isfinite(found).all():
        raise UnlearningError("features: expected finite numbers, got some that are not")
    if max(float(found.max()), -float(found.min())) > _LARGEST:
        raise UnlearningError(f"features: expected numbers up to {_LARGEST:g}, got larger ones")
    return found


def checked_labels(labels: Any, *, rows: int, classes: int) -> Labels:
    """Classes of so many rows, whole numbers from 0 to below `classes`, int64 `[rows]`."""
    found = array_of(labels)
    if found.shape != (rows,) or found.dtype.kind not in "iu":
        raise UnlearningError(
            f"labels: expected whole numbers [{rows}], one for each row, got {_described(labels)}"
        )
    if int(found.min()) < 0 or int(found.max()) >= classes:
        raise UnlearningError(
            f"labels: expected classes from 0 to {classes - 1}, got {found.min()} to {found.max()}"
        )
    return found.astype(np.int64)


def positive(name: str, value: Any) -> float:
    """A number above 0, in the range in which squares and their sums are numbers too."""
    try:
        found = validate.positive(name, value)
    except PlanError as error:
        raise UnlearningError(str(error)) from None
    if not _SMALLEST <= found <= _LARGEST:
        raise UnlearningError(f"{name}: expected {_SMALLEST:g} to {_LARGEST:g}, got {found:g}")
    return found


def whole(name: str, value: Any, *, least: int) -> int:
    """A whole number of at least `least`."""
    try:
        return validate.whole(name, value, least=least)
    except PlanError as error:
        raise UnlearningError(str(error)) from None


def within(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> float:
    """A setting that is a finite number and fits."""
    try:
        found = validate.real(name, value)
    except PlanError:
        found = math.nan
    if math.isnan(found) or not fits(found):
        raise UnlearningError(f"{name}: expected {expected}, got {validate.shown(value)}")
    return found


@final
@dataclass(frozen=True, kw_only=True)
class Present:
    """Who is in a training: a keyed digest of each row and label, as often as it is there.

    The key is drawn anew for each training, so that digests that come into other hands without it
    tell nobody's presence. With it, as in `state`, whoever has a row can tell whether it is there.

    Attributes:
        per_class: How many rows each class has, int64 `[classes]`.
    """

    per_class: Labels
    _key: bytes = field(repr=False)
    _digests: dict[bytes, int] = field(repr=False)

    @classmethod
    def nobody(cls, *, classes: int) -> "Present":
        """Before the first row."""
        key = secrets.token_bytes(_KEY_BYTES)
        return cls(per_class=np.zeros(classes, dtype=np.int64), _key=key, _digests={})

    def joined(self, rows: npt.NDArray[np.int32], labels: Labels) -> "Present":
        """With these rows."""
        digests = dict(self._digests)
        for digest in self._of(rows, labels):
            digests[digest] = digests.get(digest, 0) + 1
        return replace(self, per_class=self.per_class + self._counted(labels), _digests=digests)

    def without(self, rows: npt.NDArray[np.int32], labels: Labels) -> "Present":
        """Without these rows.

        Raises:
            UnlearningError: One is not there, or not as often; or nobody of a class would be left.
        """
        digests = dict(self._digests)
        for digest, times in Counter(self._of(rows, labels)).items():
            left = digests.get(digest, 0) - times
            if left < 0:
                row = next(i for i, d in enumerate(self._of(rows, labels)) if d == digest)
                raise UnlearningError(
                    f"row {row}: expected one of the training that is still in it, with its label, "
                    "got another, or one that was removed before; give the very features of the "
                    "training: computed anew they may differ in the last bits"
                )
            digests[digest] = left
            if not left:
                del digests[digest]
        per_class = self.per_class - self._counted(labels)
        emptied = np.flatnonzero(per_class == 0)
        if len(emptied):
            raise UnlearningError(
                f"labels: expected somebody of each class to be left, got all that there are of "
                f"class {emptied[0]}; train anew with the classes that remain"
            )
        return replace(self, per_class=per_class, _digests=digests)

    def state(self) -> dict[str, torch.Tensor]:
        """Key, digests and how often each is there, in no order that tells of the rows' own."""
        digests = sorted(self._digests)
        return {
            "key": _bytes_of([self._key], _KEY_BYTES),
            "digests": _bytes_of(digests, _DIGEST_BYTES),
            "times": torch.tensor([self._digests[digest] for digest in digests]),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], per_class: Labels) -> "Present":
        """Reads back what `state` gave of rows of which each class has so many.

        Raises:
            UnlearningError: It is another thing, or of another number of rows.
        """
        key = _bytes_in(state, "key", _KEY_BYTES)
        digests = _bytes_in(state, "digests", _DIGEST_BYTES)
        times = tensor_in(state, "times", torch.int64, (len(digests),)).tolist()
        rows = int(per_class.sum())
        if len(key) != 1 or min(times, default=1) < 1 or sum(times) != rows:
            raise UnlearningError(
                f"state: expected one key, and the digests of {rows} rows, got {len(key)} and "
                f"those of {sum(times)}"
            )
        known = dict(zip(digests, times, strict=True))
        if len(known) != len(digests):
            raise UnlearningError("state: expected each digest once, got some more often")
        return cls(per_class=per_class, _key=key[0], _digests=known)

    def _of(self, rows: npt.NDArray[np.int32], labels: Labels) -> Iterator[bytes]:
        for row, label in zip(rows, labels.tolist(), strict=True):
            text = label.to_bytes(8, "little") + row.tobytes()
            yield hashlib.blake2b(text, key=self._key, digest_size=_DIGEST_BYTES).digest()

    def _counted(self, labels: Labels) -> Labels:
        return np.bincount(labels, minlength=len(self.per_class)).astype(np.int64)


def tensor_in(
    state: Mapping[str, Any], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """A tensor of a state, on the CPU, of this kind; a length of -1 may be any."""
    found = state.get(name)
    if (
        not isinstance(found, torch.Tensor)
        or (found.dtype, found.layout, found.dim()) != (dtype, torch.strided, len(shape))
        or any(own not in (-1, length) for own, length in zip(shape, found.shape, strict=True))
    ):
        raise UnlearningError(
            f"state: expected {name} of {dtype} {list(shape)}, got {_described(found)}"
        )
    return found.detach().cpu()


def _bytes_of(values: list[bytes], length: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(values)), dtype=torch.uint8).view(-1, length)


def _bytes_in(state: Mapping[str, Any], name: str, length: int) -> list[bytes]:
    raw = tensor_in(state, name, torch.uint8, (-1, length)).contiguous().numpy().tobytes()
    return [raw[at : at + length] for at in range(0, len(raw), length)]


def _described(value: Any) -> str:
    """Of a tensor its kind and shape, without its values."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{value.dtype} {list(value.shape)}"
    return validate.shown(value)
