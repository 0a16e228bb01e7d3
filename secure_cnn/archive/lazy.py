"""One tensor at a time out of a sealed file: names and shapes first, bytes when they are asked for.

Everything that `load` checks before decrypting is checked on opening; then each segment against
its signed hash and its tag, at each read.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Self, final

import torch

from secure_cnn.archive.errors import LimitExceeded, StateError, StorageError
from secure_cnn.archive.format.claims import JSON, check_claims
from secure_cnn.archive.format.payload import Payload
from secure_cnn.archive.format.secret import Secret
from secure_cnn.archive.format.slots import SlotReader
from secure_cnn.archive.format.state import tensor_names
from secure_cnn.archive.format.tensors import Index, Span, header_end, parse_index
from secure_cnn.archive.keys.signatures import Verifier
from secure_cnn.archive.opening import Path, opened, unlock

__all__ = ["LazyArchive", "empty_bytes", "open_lazy", "read_index", "read_tensor"]


@final
class LazyArchive(Secret):
    """A sealed file held open, after everything about it but its segments was checked.

    Made by `open_lazy`; close it, or use it in a `with` block. Safe to share between threads.

    Example:
        See `open_lazy`.

        >>> LazyArchive.__name__
        'LazyArchive'
    """

    __slots__ = ("_file", "_index", "_names", "_path", "_payload", "claims")

    def __init__(
        self, path: Path, file: IO[bytes], payload: Payload, index: Index, claims: dict[str, JSON]
    ) -> None:
        self._path, self._file, self._payload, self._index = path, file, payload, index
        self._names, self.claims = tensor_names(index), claims

    @property
    def private_claims(self) -> dict[str, JSON]:
        """What the writer says about the content to its recipients only."""
        return self._index.claims

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors: their dotted paths in the tree, tied ones under each of their names."""
        return tuple(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            StateError: There is no such tensor.
        """
        return self._span(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor.

        Raises:
            StateError: There is no such tensor.
        """
        return self._span(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, with memory of its own; reads and decrypts only the segments that hold it.

        Raises:
            StateError: There is no such tensor.
            Tampered: A segment is not what was signed or encrypted.
            Truncated: The file became shorter.
            StorageError: The file is closed, or cannot be read.
        """
        span = self._span(name)
        if self._file.closed:
            raise StorageError(f"{self._path}: was closed; open it again")
        try:
            return read_tensor(self._payload, self._index, span)
        except OSError as error:
            raise StorageError(f"{self._path}: cannot read: {error.strerror}") from error

    def _span(self, name: str) -> Span:
        """Where a tensor lies."""
        if name not in self._names:
            near = difflib.get_close_matches(name, self._names, cutoff=0.0)
            raise StateError(
                f"{self._path}: expected one of its {len(self._names)} tensors, got {name!r}; "
                f"the nearest are {', '.join(map(repr, near)) or 'none'}"
            )
        return self._index.spans[self._names[name]]

    def close(self) -> None:
        """Closes the file; tensors that were read stay."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_lazy(
    path: Path,
    *,
    identity: SlotReader,
    trusted: Sequence[Verifier] | None = None,
    expect: Mapping[str, object] | None = None,
    core_hash: str | None = None,
) -> LazyArchive:
    """Opens a sealed file to read single tensors; the segments of others are never read.

    Args:
        path: A sealed file. A plain file is never accepted.
        identity: As for `load`.
        trusted: As for `load`.
        expect: As for `load`.
        core_hash: As for `load`.

    Raises:
        ArchiveError: As for `load`.

    Example:
        >>> import tempfile, secure_cnn.archive as archive
        >>> me, state = archive.generate_identity(), {"a": torch.ones(2), "b": torch.zeros(9)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(f"{folder}/m", state, recipients=[me.recipient])
        ...     with archive.open_lazy(f"{folder}/m", identity=me) as file:
        ...         file.names, file.shape("b"), file.dtype("b"), file.tensor("a")
        (('a', 'b'), (9,), torch.float32, tensor([1., 1.]))
    """
    with opened(path) as fd:
        header, payload = unlock(
            fd, identity=identity, trusted=trusted, expect=expect or {}, core_hash=core_hash
        )
        index = read_index(payload)
        check_claims({**index.claims, **header.core.claims}, expect or {})
        file = open(os.dup(fd), "rb", buffering=0)  # noqa: SIM115 - held until `close`
    return LazyArchive(path, file, payload.on(file.fileno()), index, header.core.claims)


def read_index(payload: Payload) -> Index:
    """The index of the tensors in a payload; reads the segments that hold it.

    Raises:
        StateError: The plaintext is no valid safetensors file.
        Tampered: A segment is not what was signed or encrypted.
    """
    length = payload.layout.plaintext_length
    first = bytearray(payload.layout.plaintext(0)[1])
    payload.read_into(memoryview(first))
    end = header_end(bytes(first[:8]), length)
    if end > len(first):
        rest = empty_bytes(end - len(first)).numpy()
        payload.read_into(rest.data, start=len(first))
        first += rest.data
    return parse_index(bytes(first[8:end]), length)


def read_tensor(payload: Payload, index: Index, span: Span) -> torch.Tensor:
    """One tensor, from the segments that hold it.

    Raises:
        Tampered: A segment is not what was signed or encrypted.
    """
    data = empty_bytes(span.stop - span.start)
    if len(data):
        payload.read_into(data.numpy().data, start=index.data_start + span.start)
    return span.view(data)


def empty_bytes(length: int) -> torch.Tensor:
    """Memory that is not initialised, as a uint8 tensor [length].

    Raises:
        LimitExceeded: There is not so much.
    """
    try:
        return torch.empty(length, dtype=torch.uint8)
    except RuntimeError as error:
        raise LimitExceeded(f"no memory for {length} bytes of tensors") from error
