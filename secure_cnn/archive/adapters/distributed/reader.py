"""Reads a distributed checkpoint, after its metadata held and each file is the one it names."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, final

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from secure_cnn.archive.adapters.distributed.metadata import Place, contents_of
from secure_cnn.archive.adapters.distributed.planners import hand_over
from secure_cnn.archive.adapters.distributed.writer import METADATA_FILE, SealedWriter
from secure_cnn.archive.errors import RolledBack, StateError
from secure_cnn.archive.format.slots import SlotReader
from secure_cnn.archive.keys.signatures import Verifier
from secure_cnn.archive.lazy import open_lazy
from secure_cnn.archive.opening import Path
from secure_cnn.archive.sealed import inspect, load

__all__ = ["SealedReader"]


@final
class SealedReader(StorageReader):
    """Reads a distributed checkpoint that `SealedWriter` wrote; a plain one is never accepted.

    The metadata is opened and checked when this is made. Each rank's file must then be the very one
    that the metadata names, so that no file of another checkpoint can stand in; and all ranks must
    have read the same metadata. Tensors are copied into place one by one, each after its segments
    held: when a load fails, what was copied before it stays.

    Errors of ranks come as torch's `CheckpointException`; its `failures` has ours, by rank.

    Args:
        folder: A folder of `SealedWriter`. A plain checkpoint is never accepted.
        identity: As for `load`.
        trusted: Whose signatures count; each file must have one of theirs.
        expect: Claims that must be in `metadata.sealed` with these values.
        core_hash: The core hash that `metadata.sealed` must have: the one of `inspect`. Without,
            an older checkpoint may stand in the place of the one that was meant.

    Raises:
        ArchiveError: As for `load`.

    Example:
        >>> import tempfile, torch, warnings, secure_cnn.archive as archive
        >>> import torch.distributed.checkpoint as dcp
        >>> from secure_cnn.archive.adapters.distributed import *
        >>> warnings.simplefilter("ignore")  # torch warns that this is a single process
        >>> me, target = archive.generate_identity(), {"weight": torch.zeros(2), "step": 0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = dcp.save(
        ...         {"weight": torch.ones(2), "step": 7}, planner=SealedSavePlanner(),
        ...         storage_writer=SealedWriter(folder, recipients=[me.recipient]))
        ...     dcp.load(target, planner=SealedLoadPlanner(),
        ...              storage_reader=SealedReader(folder, identity=me))
        >>> target
        {'weight': tensor([1., 1.]), 'step': 7}
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: SlotReader,
        trusted: Sequence[Verifier] | None = None,
        expect: Mapping[str, object] | None = None,
        core_hash: str | None = None,
    ) -> None:
        self._identity, self._trusted = identity, trusted
        self._expect, self._core_hash = expect, core_hash
        self._open(folder)

    def _open(self, folder: Path) -> None:
        """Reads the metadata of a folder."""
        self._folder = pathlib.Path(folder)
        path = self._folder / METADATA_FILE
        core_hash = self._core_hash or inspect(path).core_hash
        state = load(
            path,
            identity=self._identity,
            trusted=self._trusted,
            expect=self._expect,
            core_hash=core_hash,
        )
        self._read_from, self._contents = core_hash, contents_of(state)

    def reset(self, checkpoint_id: Path | None = None) -> None:
        """Opens another folder, if torch was given one.

        Raises:
            ArchiveError: As for `load`.
        """
        if checkpoint_id is not None:
            self._open(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What was read when this was made."""
        return self._contents.metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing is left to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan, with what this rank read it from."""
        return LoadPlan(plan.items, self._read_from, plan.planner_data)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are, if all ranks read the same metadata.

        Raises:
            RolledBack: Two ranks read different ones.
        """
        if len({plan.storage_data for plan in plans}) > 1:
            raise RolledBack(
                f"{self._folder}: ranks read different checkpoints; somebody changed the folder "
                "meanwhile: load again"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Hands over what this rank asked for; each stored tensor is read once.

        Raises:
            StateError: The checkpoint lacks it, or the planner would unpickle it.
            ArchiveError: As for `load`.
        """
        wanted: dict[tuple[str, str], dict[str, list[ReadItem]]] = {}
        for item in plan.items:
            place = self._place(item)
            file = wanted.setdefault((place.file, place.core_hash), {})
            file.setdefault(place.tensor, []).append(item)
        for (name, core_hash), tensors in wanted.items():
            with open_lazy(
                self._folder / name,
                identity=self._identity,
                trusted=self._trusted,
                core_hash=core_hash,
            ) as share:
                for key, items in tensors.items():
                    tensor = share.tensor(key)
                    for item in items:
                        hand_over(item, tensor, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, item: ReadItem) -> Place:
        """Where an item is."""
        place = self._contents.places.get(item.storage_index)
        if place is None:
            raise StateError(f"{self._folder}: holds no {item.storage_index}; save it again")
        return place

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Whether it is a local path."""
        return SealedWriter.validate_checkpoint_id(checkpoint_id)
