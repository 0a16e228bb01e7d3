"""A state out of a sealed file: whole, into tensors that are there already, or one at a time.

Everything in `opening` is checked first, then each segment against its signed hash and its tag, at
each read. Nothing is handed out before all of it held.
"""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Self, final

import torch

from secure_cnn.archive.errors import LimitExceeded, StateError, StorageError
from secure_cnn.archive.format.claims import JSON, check_claims
from secure_cnn.archive.format.payload import Payload, wipe
from secure_cnn.archive.format.slots import AnyIdentity, Secret
from secure_cnn.archive.format.state import (
    State,
    build_state,
    decode_state,
    index_of,
    named_tensors,
    tensor_names,
)
from secure_cnn.archive.format.tensors import Index, Pieces, Span, header_end, parse_index
from secure_cnn.archive.keys.signatures import Verifier
from secure_cnn.archive.opening import unlock
from secure_cnn.archive.storage import Path, opened

__all__ = ["LazyArchive", "load", "load_into", "open_lazy", "read_index", "read_tensor"]


def load(
    path: Path,
    *,
    identity: AnyIdentity,
    trusted: Sequence[Verifier] | None = None,
    expect: Mapping[str, object] | None = None,
    core_hash: str | None = None,
    only: Sequence[str] | None = None,
) -> State:
    """The state in a sealed file, after everything about it held; its tensors are in main memory.

    Args:
        path: A sealed file. A plain file is never accepted.
        identity: An `Identity`, a `Passphrase`, a `KeyEncryptionKey` or a `ServiceKey`.
        trusted: If given, the file must be signed by one of these, which is checked before anything
            is decrypted: to trust somebody is to require a signature, and an empty list refuses
            every file. If None, a signature that is there must still hold, but says nothing about
            who made the file.
        expect: Claims that must be in the file with these values. Public ones are compared before
            the payload is decrypted, private ones before anything is handed out.
        core_hash: The core hash the file must have, from `inspect`, `verify` or the lineage of its
            successor: whatever was decided on that is then true of what is loaded.
        only: Names of tensors; then the state is a dict of these, and the segments of others are
            not read. None loads everything.

    Raises:
        ArchiveError: One of its members: `NotSealed`, `UnsupportedVersion`, `LimitExceeded`,
            `Truncated`, `RolledBack`, `UntrustedSigner`, `Tampered`, `WrongKey`,
            `KeyServiceError`, `ClaimMismatch`, `StateError` or `StorageError`; `InvalidKey` where
            identity or trusted are something else.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me, signer = archive.generate_identity(), archive.generate_signer()
        >>> archive.save("m", {"w": 7}, recipients=[me.recipient], signer=signer, claims={"a": 1})
        >>> archive.load("m", identity=me, trusted=[signer.verifier], expect={"a": 1})
        {'w': 7}
    """
    wanted = expect or {}
    if only is not None:
        if isinstance(only, str) or not isinstance(only, Iterable):
            raise StateError(f"only: expected a list of names, got {type(only).__name__}")
        with open_lazy(
            path, identity=identity, trusted=trusted, expect=wanted, core_hash=core_hash
        ) as file:
            return {name: file.tensor(name) for name in only}
    with opened(path) as fd:
        header, payload = unlock(
            fd, identity=identity, trusted=trusted, expect=wanted, core_hash=core_hash
        )
        target = _empty_bytes(payload.layout.plaintext_length)
        payload.read_into(target.numpy().data)
    if wanted.keys() - header.core.claims.keys():
        check_claims({**index_of(target).claims, **header.core.claims}, wanted)
    return decode_state(target)


def load_into(
    state: State,
    path: Path,
    *,
    identity: AnyIdentity,
    trusted: Sequence[Verifier] | None = None,
    expect: Mapping[str, object] | None = None,
    core_hash: str | None = None,
) -> State:
    """Decrypts a sealed file straight into the tensors of a state, such as a `model.state_dict()`.

    The page faults of new memory take longer than decrypting, so this is the fastest way to resume.
    Everything that `load` checks before decrypting holds before a tensor is changed. If a segment
    of the payload then turns out to be damaged, or what is in it no bool, all the tensors are zero:
    build the model anew, or load another file. Do not call it between a forward pass and its
    backward pass, which would not notice that tensors changed.

    Args:
        state: A tree with the tensors of the file: the same names, shapes and dtypes, contiguous,
            in main memory, none over another; anything else is a `StateError`. Its plain data is
            not looked at. The other arguments, and what is raised, are as for `load`.

    Returns:
        The tree that was saved, with the memory of the given tensors in it.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me, state = archive.generate_identity(), {"weight": torch.zeros(2)}
        >>> archive.save("m", {"weight": torch.ones(2)}, recipients=[me.recipient])
        >>> _ = archive.load_into(state, "m", identity=me)
        >>> state
        {'weight': tensor([1., 1.])}
    """
    wanted, tensors = expect or {}, named_tensors(state)
    with opened(path) as fd:
        header, payload = unlock(
            fd, identity=identity, trusted=trusted, expect=wanted, core_hash=core_hash
        )
        index = read_index(payload)
        check_claims({**index.claims, **header.core.claims}, wanted)
        targets = _memory_of(index, tensors)
        built = build_state(index, tensors.__getitem__)
        if len(targets):
            payload.scatter_into(targets, index.data_start)
    try:
        for name, span in index.spans.items():
            span.check(tensors[name].reshape(-1).view(torch.uint8))
    except StateError:
        for buffer in targets.buffers:
            wipe(buffer)
        raise
    return built


def open_lazy(
    path: Path,
    *,
    identity: AnyIdentity,
    trusted: Sequence[Verifier] | None = None,
    expect: Mapping[str, object] | None = None,
    core_hash: str | None = None,
) -> "LazyArchive":
    """Opens a sealed file to read single tensors; the segments of others are never read.

    All arguments are as for `load`, and so is what is checked here.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me, state = archive.generate_identity(), {"a": torch.ones(2), "b": torch.zeros(9)}
        >>> archive.save("m", state, recipients=[me.recipient])
        >>> with archive.open_lazy("m", identity=me) as file:
        ...     file.names, file.shape("b"), file.dtype("b"), file.tensor("a")
        (('a', 'b'), (9,), torch.float32, tensor([1., 1.]))
    """
    wanted = expect or {}
    with opened(path) as fd:
        header, payload = unlock(
            fd, identity=identity, trusted=trusted, expect=wanted, core_hash=core_hash
        )
        index = read_index(payload)
        check_claims({**index.claims, **header.core.claims}, wanted)
        file = open(os.dup(fd), "rb", buffering=0)  # noqa: SIM115 - held until `close`
    return LazyArchive(path, file, payload.on(file.fileno()), index, header.core.claims)


@final
class LazyArchive(Secret):
    """A sealed file held open, after everything about it but its segments was checked.

    Made by `open_lazy`; close it, or use it in a `with` block. Safe to share between threads.

    Example:
        >>> assert issubclass(LazyArchive, Secret)  # `open_lazy` shows how it is used
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
        """The shape of a tensor."""
        return self._span(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor."""
        return self._span(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, with memory of its own; reads and decrypts only the segments that hold it."""
        span = self._span(name)
        if self._file.closed:
            raise StorageError(f"{self._path}: was closed; open it again")
        try:
            return read_tensor(self._payload, self._index, span)
        except OSError as error:
            raise StorageError(f"{self._path}: cannot read: {error.strerror}") from error

    def _span(self, name: str) -> Span:
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

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_index(payload: Payload) -> Index:
    """The index of the tensors in a payload; reads the segments that hold it."""
    length = payload.layout.plaintext_length
    first = bytearray(payload.layout.plaintext(0)[1])
    payload.read_into(memoryview(first))
    end = header_end(bytes(first[:8]), length)
    if end > len(first):
        rest = _empty_bytes(end - len(first)).numpy()
        payload.read_into(rest.data, start=len(first))
        first += rest.data
    return parse_index(bytes(first[8:end]), length)


def read_tensor(payload: Payload, index: Index, span: Span) -> torch.Tensor:
    """One tensor, from the segments that hold it."""
    data = _empty_bytes(span.stop - span.start)
    if len(data):
        payload.read_into(data.numpy().data, start=index.data_start + span.start)
    return span.view(data)


def _empty_bytes(length: int) -> torch.Tensor:
    try:
        return torch.empty(length, dtype=torch.uint8)
    except RuntimeError as error:
        raise LimitExceeded(f"no memory for {length} bytes of tensors") from error


def _memory_of(index: Index, tensors: Mapping[str, torch.Tensor]) -> Pieces:
    """The bytes of tensors in the order of the file, after each was found to fit."""
    if different := index.spans.keys() ^ tensors.keys():
        name = min(different)
        held, other = ("file", "state") if name in index.spans else ("state", "file")
        raise StateError(
            f"tensor {name}: is in the {held} but not in the {other}, as are "
            f"{len(different) - 1} others; load without a state to see what is in the file"
        )
    for name, span in index.spans.items():
        _check_fits(name, span, tensors[name])
    _check_apart(tensors)
    order = sorted(index.spans, key=lambda name: (index.spans[name].start, index.spans[name].stop))
    return Pieces([tensors[name].reshape(-1).view(torch.uint8).numpy().data for name in order])


def _check_fits(name: str, span: Span, tensor: torch.Tensor) -> None:
    """Refuses a tensor of another kind, and one whose memory is not its bytes in order."""
    if (tensor.dtype, tuple(tensor.shape)) != (span.dtype, span.shape):
        raise StateError(
            f"tensor {name}: expected {span.dtype} {list(span.shape)} as in the file, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )
    plain = tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()
    if not plain or not tensor.is_contiguous():
        raise StateError(
            f"tensor {name}: expected contiguous main memory, got strides {tensor.stride()} on "
            f"{tensor.device}; use load and copy"
        )


def _check_apart(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses tensors of which one begins within another."""
    ends, last = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.numel() and tensor.data_ptr() < ends:
            raise StateError(f"tensors {last} and {name}: share memory; use load and copy")
        if tensor.numel():
            ends, last = tensor.data_ptr() + tensor.nbytes, name
