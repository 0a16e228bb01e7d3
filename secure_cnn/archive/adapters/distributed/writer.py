"""Writes a distributed checkpoint: a sealed file for each rank, and then what binds them."""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from secure_cnn.archive.adapters.distributed.metadata import Contents, Place, tree_of
from secure_cnn.archive.adapters.distributed.planners import resolve
from secure_cnn.archive.errors import StateError, StorageError
from secure_cnn.archive.format.claims import JSON
from secure_cnn.archive.format.header import copy_length_for, seal_prefix
from secure_cnn.archive.format.pieces import Pieces
from secure_cnn.archive.format.slots import SlotWriter
from secure_cnn.archive.format.state import encode_state
from secure_cnn.archive.keys.doors import check_recipients, check_signer
from secure_cnn.archive.keys.signatures import Signer
from secure_cnn.archive.opening import Path
from secure_cnn.archive.sealed import save
from secure_cnn.archive.sealing import new_core, write_sealed

__all__ = ["METADATA_FILE", "SealedWriter"]

METADATA_FILE = "metadata.sealed"

_SEGMENT_LENGTH = 1 << 20


@final
class SealedWriter(StorageWriter):
    """Writes a distributed checkpoint into a folder, sealed and signed by each rank.

    Every rank needs the same recipients and signer, and no identity: who trains need not be able to
    read what is there. The folder must not hold a checkpoint yet; nothing in it counts before
    `metadata.sealed` is there, which is written last. Each rank holds its whole share in memory.
    Ranks exchange plans over their process group, which is trusted.

    Errors of ranks come as torch's `CheckpointException`; its `failures` has ours, by rank.

    Args:
        folder: Where the files go; made if it is missing. All ranks see the same one.
        recipients: Who can open the checkpoint, as for `save`.
        signer: Who vouches for it.
        claims: What everyone can read, in `metadata.sealed`.
        name: A logical name, which everyone can read.

    Example:
        See `SealedReader`.

        >>> SealedWriter("folder", recipients=[]).validate_checkpoint_id("folder")
        True
    """

    def __init__(
        self,
        folder: Path,
        *,
        recipients: Sequence[SlotWriter],
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
        """Makes the folder, and refuses one that holds a checkpoint.

        Raises:
            StorageError: There is a checkpoint, or the folder cannot be made.
            StateError: Ranks are to save without talking to each other.
        """
        if not kwargs.get("use_collectives", True):
            raise StateError("use_collectives: expected True, so that one file names all others")
        self._rank = kwargs.get("rank", 0)
        if is_coordinator and (self._folder / METADATA_FILE).exists():
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
        """Seals what this rank has to write, in one file; no file if that is nothing.

        Raises:
            StateError: Something is no tensor, and the planner would pickle it.
            ArchiveError: As for `save`.
        """
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
        """Seals tensors in a file of the folder; gives the core hash of what was written.

        It is not read back: what stands there by then may be another's.
        """
        plaintext = Pieces(
            encode_state({str(number): tensor for number, tensor in enumerate(share)})
        )
        core = new_core(
            name=file,
            lineage=None,
            claims={},
            recipients=self._recipients,
            signer=self._signer,
            plaintext_length=len(plaintext),
            segment_length=_SEGMENT_LENGTH,
        )
        write_sealed(
            self._folder / file,
            core,
            plaintext,
            recipients=self._recipients,
            signer=self._signer,
            overwrite=True,  # what a save that died left; nothing of it counts
        )
        copy_length = copy_length_for([who.kind for who in self._recipients])
        return hashlib.sha256(seal_prefix(core, copy_length)).hexdigest()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Seals the metadata: from now on the checkpoint counts.

        Raises:
            StateError: The planner adds something that is no plain data.
            StorageError: There is a checkpoint by now, or the operating system refuses.
        """
        places = {result.index: result.storage_data for share in results for result in share}
        save(
            self._folder / METADATA_FILE,
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
