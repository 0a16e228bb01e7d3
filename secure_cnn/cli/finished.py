"""What `secure-cnn evaluate` is pointed at: a run that has ended, or a model's file."""

import shlex
from pathlib import Path

from secure_cnn.data.named import NAMES
from secure_cnn.errors import DataError, RunError
from secure_cnn.recipe import RunFolder

__all__ = ["located"]


def located(place: Path, data: str | None) -> tuple[Path, str | None]:
    """The file of the model, and the data: those given, or of a run's folder its own, as typed.

    Raises:
        RunError: A folder holds no run, it has not ended, or its model is gone.
        DataError: Its data are not where they were.
    """
    if not place.is_dir():
        return place, data
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
    return models[0], data or named
