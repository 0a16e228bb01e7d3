"""What `secure-cnn evaluate` is pointed at: a run that has ended, or a model's file."""

import shlex
from pathlib import Path

from secure_cnn.archive import InvalidKey, NotSealed, StorageError
from secure_cnn.checkpoint import LoadedModel, Unlocking, read_model
from secure_cnn.cli.options import message
from secure_cnn.data.named import NAMES
from secure_cnn.errors import DataError, ModelError, RunError
from secure_cnn.own_network import OwnNetwork
from secure_cnn.recipe import RunFolder

__all__ = ["located", "opened"]


def located(
    place: Path, data: str | None, groups: str | None = None
) -> tuple[Path, str | None, str | None]:
    """The file of the model, the data, and the file that says whose its images are.

    Those given, or of a run's folder its own, as typed.

    Raises:
        RunError: A folder holds no run, it has not ended, or its model is gone.
        DataError: Its data are not where they were.
    """
    if not place.is_dir():
        return place, data, groups
    if not (place / "run.json").is_file():
        raise RunError(
            f"{place}: expected the folder of a run, with run.json in it, found none; give the "
            "folder that train wrote, or a model file"
        )
    record = RunFolder(root=place, sealed=False).recorded()
    if record.status != "complete":
        words = {"interrupted": "was interrupted", "running": "is under way, or was killed"}
        raise RunError(
            f"{place}: its run {words[record.status]}, and has no model yet; end it with "
            f"secure-cnn train --out {shlex.quote(str(place))} --resume"
        )
    models = [place / each for each in record.checkpoints]
    if len(models) != 1 or not models[0].is_file():
        raise RunError(
            f"{place}: expected the model of its run in {', '.join(map(str, models)) or 'it'}, "
            "found none; put it back, or train it again"
        )
    named = str(record.settings.get("data"))
    if data is None and named not in NAMES and not Path(named).exists():
        raise DataError(
            f"{place}: was trained on {named}, which is not there from here; say where it is with "
            "--data"
        )
    told = record.settings.get("groups")
    if data is None and groups is None and isinstance(told, str) and Path(told).is_file():
        groups = told
    return models[0], data or named, groups


def opened(path: Path, unlocking: Unlocking | None, network: OwnNetwork | None) -> LoadedModel:
    """The model in a file; of a network of one's own it is said where its code has changed.

    Raises:
        ModelError: There is no file, which is no fault of its keys; or no model of ours in it.
        ArchiveError: It is sealed and nothing was given that opens it, or the reverse: a plain file
            in the place of a sealed one is not taken for it.
    """
    if unlocking is None and path.suffix == ".sealed" and path.exists():
        raise InvalidKey(
            f"{path}: is sealed; name what opens it with --identity, --passphrase-file or --kek"
        )
    try:
        loaded = read_model(path, unlocking=unlocking, network=network)
    except NotSealed as error:
        raise NotSealed(
            f"{path}: expected a sealed model, since what opens it was named, got a plain file; if "
            "it should be plain, leave --identity, --passphrase-file, --kek and --trusted out: it "
            "needs no key, and carries no signature"
        ) from error
    except StorageError as error:
        if path.exists():
            raise
        raise ModelError(
            f"{path}: expected the checkpoint of a model, found no such file"
        ) from error
    began = loaded.claims.get("network")
    if network is not None and isinstance(began, dict) and began.get("source") != network.source:
        message(
            f"note: the file that makes {network.name} is not the one of the training: where its "
            "forward differs, these are figures of another model; put the file back as it was"
        )
    return loaded
