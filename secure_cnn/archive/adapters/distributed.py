"""`torch.distributed.checkpoint` over sealed files: data, names and plan all sealed, no pickle.

A checkpoint is a folder: one sealed file for each rank that has something to write, and then
`metadata.sealed`, which names every file with its core hash and so makes the checkpoint count.
Torch's own `.metadata`, a pickle in clear, is neither written nor read.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from secure_cnn.archive.adapters.planning import (
    Contents,
    Place,
    SealedLoadPlanner,
    SealedSavePlanner,
    contents_of,
    hand_over,
    resolve,
    tree_of,
)
from secure_cnn.archive.errors import RolledBack, StateError, StorageError
from secure_cnn.archive.format.claims import JSON
from secure_cnn.archive.format.slots import AnyIdentity, AnyRecipient
from secure_cnn.archive.format.state import encode_state
from secure_cnn.archive.format.tensors import Pieces
from secure_cnn.archive.info import inspect
from secure_cnn.archive.keys import check_recipients, check_signer
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.loading import load, open_lazy
from secure_cnn.archive.sealing import Draft, save
from secure_cnn.archive.storage import Path

__all__ = ["SealedLoadPlanner", "SealedReader", "SealedSavePlanner", "SealedWriter"]

_METADATA_FILE = "metadata.sealed"


@final
class SealedWriter(StorageWriter):
    """Writes a distributed checkpoint into a folder, sealed and signed by each rank.

    Every rank needs the same folder, recipients and signer, and no identity: who trains need not be
    able to read what is there. The folder must not hold a checkpoint yet; nothing in it counts
    before `metadata.sealed` is there, which is written last, and in which everyone can read claims
    and name. Each rank holds its whole share in memory. Ranks exchange plans over their process
    group, which is trusted. Errors of ranks come as torch's `CheckpointException`; its `failures`
    has ours, by rank.
    """

    def __init__(
        self,
        folder: Path,
        *,
        recipients: Sequence[AnyRecipient],
        signer: Signer | None = None,
        claims: Mapping[str, JSON] | None = None,
        name: str = "",
    ) -> None:
        self._folder, self._rank = pathlib.Path(folder), 0
        self._recipients, self._signer = check_recipients(recipients), check_signer(signer)
        self._claims, self._name = claims, name

    def reset(self, checkpoint_id: Path | None = None) -> None:
        """Takes another folder, if torch was given one."""
        if checkpoint_id is not None:
            self._folder = pathlib.Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Makes the folder, and refuses one that holds a checkpoint."""
        if not kwargs.get("use_collectives", True):
            raise StateError("use_collectives: expected True, so that one file names all others")
        self._rank = kwargs.get("rank", 0)
        if is_coordinator and (self._folder / _METADATA_FILE).exists():
            raise StorageError(f"{self._folder}: holds a checkpoint already; choose another folder")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self._folder}: cannot make it: {error.strerror}") from error

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Seals what this rank has to write, in one file; no file if that is nothing."""
        share = [resolve(item, planner) for item in plan.items]
        file = f"rank-{self._rank}.sealed"
        core_hash = self._seal(file, share) if share else ""
        written: Future[list[WriteResult]] = Future()
        written.set_result(
            [
                WriteResult(
                    item.index,
                    tensor.nbytes,
                    Place(file=file, core_hash=core_hash, tensor=str(number)),
                )
                for number, (item, tensor) in enumerate(zip(plan.items, share, strict=True))
            ]
        )
        return written

    def _seal(self, file: str, share: list[torch.Tensor]) -> str:
        """Seals tensors in a file; gives the core hash of what was written, unread."""
        plaintext = Pieces(
            encode_state({str(number): tensor for number, tensor in enumerate(share)})
        )
        draft = Draft(recipients=self._recipients, signer=self._signer, name=file)
        # It replaces what a save that died left; nothing of that counts.
        return draft.write(self._folder / file, plaintext, len(plaintext), overwrite=True)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Seals the metadata: from now on the checkpoint counts."""
        places = {result.index: result.storage_data for share in results for result in share}
        save(
            self._folder / _METADATA_FILE,
            tree_of(Contents(metadata=metadata, places=places)),
            recipients=self._recipients,
            signer=self._signer,
            claims=self._claims,
            name=self._name,
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Whether it is a local path."""
        return "://" not in str(checkpoint_id)


@final
class SealedReader(StorageReader):
    """Reads a distributed checkpoint that `SealedWriter` wrote; a plain one is never accepted.

    The metadata is opened and checked when this is made. Each rank's file must then be the very one
    that the metadata names, so that no file of another checkpoint can stand in; and all ranks must
    have read the same metadata. Tensors are copied into place one by one, each after its segments
    held: when a load fails, what was copied before it stays. Errors of ranks come as torch's
    `CheckpointException`; its `failures` has ours, by rank.

    Args:
        trusted: Whose signatures count; each file must have one of theirs.
        expect: Claims that must be in `metadata.sealed` with these values.
        core_hash: The core hash that `metadata.sealed` must have: the one of `inspect`. Without,
            an older checkpoint may stand in the place of the one that was meant.

    Example:
        >>> import warnings, secure_cnn.archive as archive
        >>> import torch.distributed.checkpoint as dcp
        >>> warnings.simplefilter("ignore")  # torch warns that this is a single process
        >>> me, target = archive.generate_identity(), {"weight": torch.zeros(2), "step": 0}
        >>> saved = dcp.save(
        ...     {"weight": torch.ones(2), "step": 7}, planner=SealedSavePlanner(),
        ...     storage_writer=SealedWriter("saved", recipients=[me.recipient]))
        >>> dcp.load(target, planner=SealedLoadPlanner(),
        ...          storage_reader=SealedReader("saved", identity=me))
        >>> target
        {'weight': tensor([1., 1.]), 'step': 7}
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: AnyIdentity,
        trusted: Sequence[Verifier] | None = None,
        expect: Mapping[str, object] | None = None,
        core_hash: str | None = None,
    ) -> None:
        self._identity, self._trusted = identity, trusted
        self._expect, self._core_hash = expect, core_hash
        self._open(folder)

    def _open(self, folder: Path) -> None:
        self._folder = pathlib.Path(folder)
        path = self._folder / _METADATA_FILE
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
        """Opens another folder, if torch was given one."""
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
        """The plans as they are, if all ranks read the same metadata."""
        if len({plan.storage_data for plan in plans}) > 1:
            raise RolledBack(
                f"{self._folder}: ranks read different checkpoints; somebody changed the folder "
                "meanwhile: load again"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Hands over what this rank asked for; each stored tensor is read once."""
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
        place = self._contents.places.get(item.storage_index)
        if place is None:
            raise StateError(f"{self._folder}: holds no {item.storage_index}; save it again")
        return place

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Whether it is a local path."""
        return SealedWriter.validate_checkpoint_id(checkpoint_id)
