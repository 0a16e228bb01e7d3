"""What a secret key never does: become bytes by the way, in a pickle or a copy of something else.

A trainer that pickles its settings, or a worker process that they are sent to, would carry the key
along unseen. A secret leaves by `write_key`, or by `to_text`, which says so.
"""

from typing import NoReturn, SupportsIndex

from secure_cnn.archive.errors import SecretKeptError

__all__ = ["Secret"]


class Secret:
    """A class whose objects hold a secret: they are neither copied nor pickled."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise SecretKeptError(
            f"a {type(self).__name__} is neither copied nor pickled, since its secret would go "
            "along; hand over the object itself, or write_key and the path of the file"
        )

    def __getstate__(self) -> NoReturn:
        self.__reduce_ex__(2)
