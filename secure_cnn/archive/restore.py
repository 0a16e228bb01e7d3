"""A sealed file into tensors that are there already: no new memory, no second copy.

What `load` is to a new state, this is to a model that was built before its weights were read. The
page faults of new memory take longer than decrypting, so this is also the fastest way to resume.
"""

from collections.abc import Mapping, Sequence

import torch

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.claims import check_claims
from secure_cnn.archive.format.payload import wipe
from secure_cnn.archive.format.pieces import Pieces
from secure_cnn.archive.format.slots import SlotReader
from secure_cnn.archive.format.state import State, build_state, named_tensors
from secure_cnn.archive.format.tensors import Index, Span
from secure_cnn.archive.keys.signatures import Verifier
from secure_cnn.archive.lazy import read_index
from secure_cnn.archive.opening import Path, opened, unlock

__all__ = ["load_into"]


def load_into(
    state: State,
    path: Path,
    *,
    identity: SlotReader,
    trusted: Sequence[Verifier] | None = None,
    expect: Mapping[str, object] | None = None,
    core_hash: str | None = None,
) -> State:
    """Decrypts a sealed file straight into the tensors of a state, such as a `model.state_dict()`.

    Everything that `load` checks before decrypting holds before a tensor is changed. If a segment
    of the payload then turns out to be damaged, or what is in it no bool, all the tensors are zero:
    build the model anew, or load another file. Do not call it between a forward pass and its
    backward pass, which would not notice that tensors changed.

    Args:
        state: A tree with the tensors of the file: the same names, shapes and dtypes, contiguous,
            in main memory, none over another. Its plain data is not looked at.
        path: A sealed file.
        identity: As for `load`.
        trusted: As for `load`.
        expect: As for `load`.
        core_hash: As for `load`.

    Returns:
        The tree that was saved, with the memory of the given tensors in it.

    Raises:
        StateError: The tensors are not those of the file, or cannot be decrypted into.
        ArchiveError: As for `load`.

    Example:
        >>> import tempfile, secure_cnn.archive as archive
        >>> me, model = archive.generate_identity(), torch.nn.Linear(1, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = {"weight": torch.ones(1, 1), "bias": torch.zeros(1)}
        ...     archive.save(f"{folder}/m", saved, recipients=[me.recipient])
        ...     _ = archive.load_into(model.state_dict(), f"{folder}/m", identity=me)
        >>> model.weight.item(), model.bias.item()
        (1.0, 0.0)
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
