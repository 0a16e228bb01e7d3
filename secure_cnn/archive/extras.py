"""Libraries that only some adapters need: who misses one is told which extra brings it."""

from secure_cnn.archive.errors import ArchiveError

__all__ = ["MissingExtra"]


class MissingExtra(ArchiveError):
    """A library that is not installed with the package itself is needed for this.

    Args:
        what: What needs it.
        extra: The extra of this package that brings it.

    Example:
        >>> raise MissingExtra("a bill of materials", "bom")
        Traceback (most recent call last):
        ...
        secure_cnn.archive.extras.MissingExtra: a bill of materials needs a library that is not
        installed; run: pip install 'secure-cnn[bom]'
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs a library that is not installed; run: pip install 'secure-cnn[{extra}]'"
        )
