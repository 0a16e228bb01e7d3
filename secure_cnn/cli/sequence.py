"""`secure-cnn archive ls` and `prune`: a folder of checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from secure_cnn import archive
from secure_cnn.cli.keys import Verifiers, verifiers_from
from secure_cnn.cli.options import message
from secure_cnn.printable import printable

__all__ = ["ls", "prune"]

_Folder = Annotated[Path, typer.Argument(help="A folder of checkpoints.")]
_HighWater = Annotated[
    Path | None,
    typer.Option(
        help="A file elsewhere that remembers the newest: shows that the whole folder is older."
    ),
]
_AcceptMissingMark = Annotated[
    bool,
    typer.Option(
        "--accept-missing-mark",
        help="Open a folder without its mark, if you know otherwise that the newest is the newest.",
    ),
]


def ls(
    folder: _Folder,
    trusted: Verifiers,
    high_water: _HighWater = None,
    accept_missing_mark: _AcceptMissingMark = False,
    deep: Annotated[bool, typer.Option("--deep", help="Read and check every file whole.")] = False,
) -> None:
    """Print the checkpoints of a folder, oldest first, after all of them were found there."""
    store = archive.CheckpointStore(
        folder,
        trusted=verifiers_from(trusted),
        high_water=high_water,
        accept_missing_mark=accept_missing_mark,
    )
    for one in _there(folder, store.verify(deep=deep)):
        metric = "" if one.metric is None else f"  metric {one.metric:g}"
        created = printable(one.created)
        typer.echo(f"{one.generation:>8}  step {one.step}  {created}  {one.name}{metric}")


def prune(
    folder: _Folder,
    signer: Annotated[Path, typer.Option(help="The signing key of the folder.")],
    keep_last: Annotated[int | None, typer.Option(help="So many of the newest stay.")] = None,
    keep_best: Annotated[int | None, typer.Option(help="So many of the best stay.")] = None,
    every: Annotated[int | None, typer.Option(help="Each so-many-th stays.")] = None,
    high_water: _HighWater = None,
    accept_missing_mark: _AcceptMissingMark = False,
) -> None:
    """Remove the checkpoints that no rule given here keeps; the newest always stays."""
    if keep_last is None and keep_best is None and every is None:
        raise typer.BadParameter("expected --keep-last, --keep-best or --every, got none")
    key = archive.read_signer(signer)
    # To write would make the folder; to read does not.
    before = archive.CheckpointStore(
        folder, trusted=[key.verifier], accept_missing_mark=accept_missing_mark
    )
    _there(folder, before.list())
    with archive.CheckpointStore(
        folder,
        signer=key,
        keep_last=keep_last,
        keep_best=keep_best,
        every=every,
        high_water=high_water,
        accept_missing_mark=accept_missing_mark,
    ) as store:
        count = len(store.list())
        kept = store.prune()
    message(f"removed {count - len(kept)}, kept {len(kept)} in {folder}")


def _there(folder: Path, checkpoints: Sequence[archive.Checkpoint]) -> Sequence[archive.Checkpoint]:
    """The checkpoints of a folder, of which there must be one: an emptied folder is not whole."""
    if not folder.is_dir():
        raise archive.StorageError(
            f"{folder}: expected a folder of checkpoints, found no such folder; look at the path"
        )
    if not checkpoints:
        raise archive.StorageError(
            f"{folder}: expected checkpoints, found none; give the folder of a store"
        )
    return checkpoints
