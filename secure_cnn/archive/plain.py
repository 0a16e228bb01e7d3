"""Plain files: safetensors of ours and of others, what `torch.save` wrote, and out of sealed ones.

Functions of their own, so that nothing that expects a sealed file ever takes a plain one. Only here
does torch read one of its own files, by its restricted reader, which runs no code of the file.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.header import MAGIC
from secure_cnn.archive.format.payload import Progress
from secure_cnn.archive.format.slots import AnyIdentity
from secure_cnn.archive.format.state import State, decode_state, encode_state
from secure_cnn.archive.keys.signatures import Verifier
from secure_cnn.archive.opening import unlock
from secure_cnn.archive.storage import Path, new_file, opened
from secure_cnn.files import write_at
from secure_cnn.printable import printable

__all__ = ["decrypt", "import_", "load_plain", "save_plain"]

# What `torch.save` writes today, a zip file, and what it wrote until 2020, a bare pickle.
_TORCH = (b"PK\x03\x04", b"\x80\x02")


def save_plain(path: Path, state: State, *, overwrite: bool = False) -> None:
    """Writes a state as a plain safetensors file with mode 0600, whole or not at all.

    Guarantee: none against reading or changing it; see `save` for that.

    Raises:
        StateError: The state holds something that the format cannot.
        StorageError: There is a file already, or the operating system refuses.

    Example:
        >>> save_plain("m.safetensors", {"step": 1, "w": torch.ones(1)})
        >>> load_plain("m.safetensors")
        {'step': 1, 'w': tensor([1.])}
    """
    buffers = encode_state(state)
    with new_file(path, length=sum(map(len, buffers)), overwrite=overwrite, mode=0o600) as fd:
        offset = 0
        for buffer in buffers:
            write_at(fd, buffer, offset)
            offset += len(buffer)


def load_plain(path: Path) -> State:
    """Reads a plain safetensors file: the tree that `save_plain` wrote, or another tool's tensors.

    A sealed file is refused, as is what is no valid safetensors file: `StateError`.

    Example:
        >>> save_plain("plain.safetensors", {"step": 1})
        >>> load_plain("plain.safetensors")
        {'step': 1}
    """
    data = bytearray(_read(path))
    if not data:
        raise StateError(f"{path}: expected a safetensors file, got an empty one")
    if data.startswith(MAGIC):
        raise StateError(
            f"{path}: is sealed; open it first, or give the identity or passphrase that opens it"
        )
    if _is_torch(bytes(data[:16])):
        raise StateError(
            f"{path}: expected a safetensors file, got one of torch.save; read it once with "
            "import_, or by secure-cnn archive import"
        )
    try:
        return decode_state(torch.frombuffer(data, dtype=torch.uint8))
    except StateError as error:
        raise StateError(f"{path}: {error}") from error


def import_(path: Path) -> State:
    """The state in a plain file of another tool, ready to be sealed.

    Takes a safetensors file, or a file of `torch.save` that holds tensors, numbers, texts and plain
    containers only. Read such files once, seal what came out, and keep the sealed file.

    Raises:
        StateError: It is neither, is sealed, or holds objects of classes, which would run code.

    Example:
        >>> import safetensors.torch
        >>> safetensors.torch.save_file({"w": torch.ones(2)}, "theirs.safetensors")
        >>> import_("theirs.safetensors")
        {'w': tensor([1., 1.])}
    """
    state = _load_torch(path) if _is_torch(_read(path, 16)) else load_plain(path)
    encode_state(state)  # refuses here, with the path of what cannot be sealed
    return state


def decrypt(
    path: Path,
    out: Path,
    *,
    identity: AnyIdentity,
    trusted: Sequence[Verifier] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the plain safetensors file inside a sealed file, with mode 0600, whole or not at all.

    Identity, trusted and what is raised are as for `load`; `StorageError` if there is a file at
    `out`.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me = archive.generate_identity()
        >>> archive.save("m.sealed", {"weight": torch.ones(2)}, recipients=[me.recipient])
        >>> archive.decrypt("m.sealed", "m.plain", identity=me)
        >>> load_plain("m.plain")
        {'weight': tensor([1., 1.])}
    """
    with opened(path) as fd:
        _, payload = unlock(fd, identity=identity, trusted=trusted, expect={}, core_hash=None)
        length = payload.layout.plaintext_length
        with new_file(out, length=length, overwrite=overwrite, mode=0o600) as plain:
            payload.copy_to(plain, progress)


def _read(path: Path, length: int = -1) -> bytes:
    with opened(path) as fd, open(fd, "rb", closefd=False) as file:
        file.seek(0)
        return file.read(length)


def _is_torch(first: bytes) -> bool:
    """Whether a file that begins so was written by `torch.save`.

    A safetensors file may begin with the same two bytes, if its header is 640 bytes long; but then
    a number that small stands before the brace of its JSON, and in neither of the others.
    """
    is_safetensors = first[8:9] == b"{" and not any(first[4:8])
    return first.startswith(_TORCH) and not is_safetensors


def _load_torch(path: Path) -> Any:
    """What torch's restricted reader makes of a file; it knows no classes but tensors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own old formats
            return torch.load(  # noqa: TID251 - the one adapter; weights_only runs no code
                path, map_location="cpu", weights_only=True
            )
    except Exception as error:
        got = _stranger_in(path) or f"something else ({type(error).__name__})"
        raise StateError(
            f"{path}: expected a state of tensors and plain data, got {got}; where it was made, "
            "save state_dict() or plain data in its place with torch.save, and import that"
        ) from None


class _Stranger(list[Any]):
    """Stands for an object of a class whose code is not run; a list, since such may be filled."""

    named = ""

    def __new__(cls, *_: object) -> "_Stranger":
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """What it held is not looked at."""


def _stranger_in(path: Path) -> str:
    """Where the first object of an unknown class is, and its class; "" where nobody can say.

    The restricted reader puts an empty stand-in of ours where it would need the class.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [
            (type("_Stranger", (_Stranger,), {"named": name}), name) for name in names
        ]
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            tree = torch.load(path, map_location="meta", weights_only=True)  # noqa: TID251
        where, stranger = next(_strangers(tree, ""))
    except Exception:  # the file may hold anything, and another sentence says so
        return ""
    kind = printable(stranger.named)
    return f"{printable(where)}: a {kind}" if where else f"a {kind}"


def _strangers(tree: object, where: str) -> Iterator[tuple[str, _Stranger]]:
    """Every stand-in below, with its place: `optimizer.param_groups[0].betas`."""
    if isinstance(tree, _Stranger):
        yield where, tree
    elif isinstance(tree, dict):
        for name, each in tree.items():
            yield from _strangers(each, f"{where}.{name}" if where else str(name))
    elif isinstance(tree, list | tuple):
        for number, each in enumerate(tree):
            yield from _strangers(each, f"{where}[{number}]")
