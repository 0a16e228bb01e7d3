"""The errors of `secure_cnn`: whose fault it is, and what to do next.

`secure_cnn.archive` adds its own branch; `defenses` and `privacy` have trees of their own, since
each works alone.
"""

__all__ = ["DataError", "ModelError", "RunError", "SecureCNNError"]


class SecureCNNError(Exception):
    """Every error this package raises on purpose; never raised itself.

    Example:
        >>> issubclass(DataError, SecureCNNError)
        True
    """


class DataError(SecureCNNError, ValueError):
    """A data set cannot be used: the message names the file and says what to do.

    Example:
        >>> raise DataError("cats/1.png: expected a readable image, got a truncated file")
        Traceback (most recent call last):
        ...
        secure_cnn.errors.DataError: cats/1.png: expected a readable image, got a truncated file
    """


class ModelError(SecureCNNError, ValueError):
    """A model cannot be built, or does not fit the data or the checkpoint it is asked to meet.

    Example:
        >>> issubclass(ModelError, ValueError)
        True
    """


class RunError(SecureCNNError, ValueError):
    """A run cannot start or go on: its settings, its folder or its checkpoint are at fault.

    Example:
        >>> issubclass(RunError, ValueError)
        True
    """
