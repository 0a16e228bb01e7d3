"""How a training saves its checkpoint while it runs: sealed in the loop, beside it, or by a rival.

A saver is asked at the start of a stretch of steps and settled at its end. What a background save
has not finished by then is waited for: in a long training the next save would wait for it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol, TypeAlias, cast, final

import torch

from secure_cnn import archive
from secure_cnn.archive.store.store import CheckpointStore
from secure_cnn.bench.archive_rivals import ArchiveRival

__all__ = ["BackgroundSaver", "MakeSaver", "RivalSaver", "Saver", "SealedSaver", "bytes_in"]


class Saver(Protocol):
    """Saves the states of one training into one folder."""

    def save(self, state: Mapping[str, object]) -> None:
        """Begins a save, or makes it; the state may change once this returns."""

    def settle(self) -> None:
        """Returns once what was begun is on the disk."""

    def close(self) -> None:
        """Lets go of what is held open."""


MakeSaver: TypeAlias = Callable[[Path], Saver]
"""Makes a saver for an empty folder."""


@final
class SealedSaver:
    """Seals and signs in the loop, over the file before; a class because it holds the keys."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "training.sealed"
        self._recipient = archive.generate_identity().recipient
        self._signer = archive.generate_signer()

    def save(self, state: Mapping[str, object]) -> None:
        """On the disk when this returns."""
        archive.save(
            self._path,
            cast(archive.State, state),
            recipients=[self._recipient],
            signer=self._signer,
            overwrite=True,
        )

    def settle(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""


@final
class BackgroundSaver:
    """Copies in the loop, seals beside it, in a `CheckpointStore` that keeps the last one."""

    def __init__(self, folder: Path) -> None:
        identity, self._saves = archive.generate_identity(), 0
        self._store = CheckpointStore(
            folder,
            recipients=[identity.recipient],
            signer=archive.generate_signer(),
            keep_last=1,
        )

    def save(self, state: Mapping[str, object]) -> None:
        """Returns once the tensors are copied."""
        self._store.save(cast(archive.State, state), step=self._saves)
        self._saves += 1

    def settle(self) -> None:
        """Waits for the seal and the commit."""
        self._store.wait()

    def close(self) -> None:
        """Waits, and lets others write to the folder."""
        self._store.close()


@final
class RivalSaver:
    """Saves the tensors of the state as somebody else's call does, in the loop."""

    def __init__(self, rival: ArchiveRival, folder: Path) -> None:
        self._write = partial(rival.save, folder / "training")

    def save(self, state: Mapping[str, object]) -> None:
        """As others call it: no sync; dense, since some refuse other layouts."""
        self._write({name: tensor.contiguous() for name, tensor in _tensors(state, "")})

    def settle(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _tensors(value: object, name: str) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a tree by the path that leads to them."""
    if isinstance(value, torch.Tensor):
        return [(name, value.detach())]
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _tensors(item, f"{name}.{key}")]
    return []
