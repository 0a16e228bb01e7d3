"""The run's folder: made once, never overwritten unless asked for.

run.json                        the record
report.html                     its page
checkpoints/model.*             the finished model, `.sealed` or `.safetensors`
checkpoints/training.*          the training under way, gone once it is complete
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from secure_cnn.errors import RunError

__all__ = ["RunFolder"]

_AUDIT = ("audit.json", "audit.html")
"""What an audit adds to a run's folder."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The places in a run's folder.

    Attributes:
        root: The folder.
        sealed: Whether its checkpoints are.

    Example:
        >>> RunFolder(root=Path("runs/1"), sealed=True).model.as_posix()
        'runs/1/checkpoints/model.sealed'
    """

    root: Path
    sealed: bool

    @property
    def record(self) -> Path:
        """Where the record is.

        Example:
            >>> RunFolder(root=Path("runs/1"), sealed=True).record.name
            'run.json'
        """
        return self.root / "run.json"

    @property
    def page(self) -> Path:
        """Where the page is.

        Example:
            >>> RunFolder(root=Path("runs/1"), sealed=True).page.name
            'report.html'
        """
        return self.root / "report.html"

    @property
    def model(self) -> Path:
        """Where the finished model is.

        Example:
            >>> RunFolder(root=Path("runs/1"), sealed=False).model.name
            'model.safetensors'
        """
        return self._checkpoint("model")

    @property
    def training(self) -> Path:
        """Where the training under way is.

        Example:
            >>> RunFolder(root=Path("runs/1"), sealed=False).training.name
            'training.safetensors'
        """
        return self._checkpoint("training")

    def create(self, *, force: bool) -> None:
        """Makes the folder; with `force` an earlier run in it goes first, and nothing but a run.

        Raises:
            RunError: It exists, holds something else than a run, or cannot be written to.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as parent:
            ...     folder = RunFolder(root=Path(parent, "1"), sealed=False)
            ...     folder.create(force=False)
            ...     folder.model.parent.is_dir()
            True
        """
        try:
            if self.root.exists():
                self._clear(force=force)
            self.model.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{self.root}: expected a folder that can be made and written to: {error}"
            ) from error
        if not os.access(self.root, os.W_OK):
            raise RunError(f"{self.root}: expected a folder that can be written to")

    def _clear(self, *, force: bool) -> None:
        """Removes an earlier run, if that is what the folder holds and it may go."""
        if self.root.is_dir() and not any(self.root.iterdir()):
            return
        if not force:
            raise RunError(
                f"{self.root}: exists already, and a run is never overwritten; choose another "
                "folder, go on with --resume, or replace it with --force"
            )
        if not self.record.is_file():
            raise RunError(
                f"{self.root}: holds no run, so it is not replaced; choose another folder"
            )
        own = {self.record.name, self.page.name, self.model.parent.name, *_AUDIT}
        strangers = sorted(entry.name for entry in self.root.iterdir() if entry.name not in own)
        if strangers:
            raise RunError(
                f"{self.root}: holds more than a run, so it is not replaced: "
                f"{', '.join(strangers[:8])}; move that elsewhere, or choose another folder"
            )
        shutil.rmtree(self.root)

    def _checkpoint(self, stem: str) -> Path:
        return self.root / "checkpoints" / f"{stem}.{'sealed' if self.sealed else 'safetensors'}"
