"""Weights that a training starts from, and which of a model's weights it changes.

Only tensors are taken out of a file, by their names: safetensors, a sealed file of ours, or what
`torch.save` wrote, read without running code.
"""

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from secure_cnn import archive
from secure_cnn.archive.format.header import MAGIC
from secure_cnn.checkpoint import Unlocking
from secure_cnn.errors import ModelError
from secure_cnn.files import reading

__all__ = ["StartReport", "Weights", "freeze", "is_sealed", "read_weights", "start_from"]

_WRAPPERS = ("state_dict", "model_state_dict", "model", "weights", "module")
"""Where other tools, and a training under way of ours, keep the model among other things."""
_FINGERPRINTS = ("fingerprint", "pool_fingerprint", "train_fingerprint")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK = 1 << 20
_NAMED = 6


@final
@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of a file, by name.

    `file` is its name without its folder, `digest` the SHA-256 of its bytes in hexadecimal, and
    `trained_on` the fingerprints of the data that the file claims: of all of it in order, of all
    images as a heap, of the training images as one. `key` is their key; empty if it claims none.
    """

    file: str
    digest: str
    trained_on: tuple[str, ...] = ()
    key: str = field(repr=False, default="")
    tensors: Mapping[str, Tensor] = field(repr=False)


@final
@dataclass(frozen=True, kw_only=True)
class StartReport:
    """What of a model was in a file of weights.

    Attributes:
        file: Its name.
        digest: SHA-256 of its bytes, in hexadecimal.
        matched: Names that model and file have, in one shape: these were taken.
        reshaped: Names that both have in different shapes, each with both: drawn anew.
        missing: Names of the model that the file does not have: drawn anew.
        unexpected: Names of the file that the model does not have: left out.
    """

    file: str
    digest: str
    matched: tuple[str, ...]
    reshaped: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def words(self) -> str:
        """All of it in one sentence, with the first few names."""
        parts = [
            f"of another shape and drawn anew: {_few(self.reshaped.values())}"
            if self.reshaped
            else "",
            f"not in the file and drawn anew: {_few(self.missing)}" if self.missing else "",
            f"in the file alone and left out: {_few(self.unexpected)}" if self.unexpected else "",
        ]
        found = len(self.matched) + len(self.reshaped) + len(self.missing)
        said = "; ".join([f"{len(self.matched)} of {found} tensors taken", *filter(None, parts)])
        return f"It starts from the weights in {self.file} (SHA-256 {self.digest[:16]}…): {said}."


def read_weights(path: Path, *, unlocking: Unlocking | None) -> Weights:
    """Reads the weights in a file: sealed with `unlocking`, else safetensors or of `torch.save`.

    Where a file holds more than a model, the model is looked for under `state_dict`,
    `model_state_dict`, `model`, `weights` and `module`.

    Raises:
        ArchiveError: The file cannot be read, opened or believed, or holds more than data.
        ModelError: There are no named tensors in it; or it is not sealed, and a signature is
            demanded.

    Example:
        >>> archive.save_plain("w.safetensors", {"head.weight": torch.ones(2, 3)})
        >>> sorted(read_weights(Path("w.safetensors"), unlocking=None).tensors)
        ['head.weight']
    """
    digest = _digest(path)
    secret: object = None
    if is_sealed(path):
        if unlocking is None:
            raise ModelError(
                f"{path}: is sealed; give the identity or the passphrase that opens the weights"
            )
        sealed = archive.inspect(path).claims
        state = archive.load(
            path, identity=unlocking.identity, trusted=unlocking.trusted, expect=sealed
        )
        claims: object = sealed
        if "privacy" in sealed:  # only such a model has any, and a passphrase takes its time
            with archive.open_lazy(
                path, identity=unlocking.identity, trusted=unlocking.trusted, expect=sealed
            ) as lazy:
                secret = lazy.private_claims
    else:
        if unlocking is not None and unlocking.trusted is not None:
            raise ModelError(
                f"{path}: expected weights that are signed by whom you trust, got a plain file, "
                "which carries no signature; seal and sign it, or leave --trusted out"
            )
        state = archive.import_(path)
        claims = state.get("claims") if isinstance(state, dict) else None
    tensors = _tensors(state)
    if not tensors:
        raise ModelError(
            f"{path}: expected the named tensors of a model, got none; save its state_dict()"
        )
    # A finished model claims them; the state of a training under way has them among its own.
    told = [_text(claims, "data", name) or _text(state, name) for name in _FINGERPRINTS]
    return Weights(
        file=path.name,
        digest=digest,
        trained_on=tuple(filter(None, told)),
        key=_text(secret, "data_fingerprint_key") or _text(state, "run", "key"),
        tensors=tensors,
    )


def is_sealed(path: Path) -> bool:
    """Whether a file says of itself that it is sealed; one that cannot be read does not.

    Example:
        >>> is_sealed(Path("nowhere"))
        False
    """
    try:
        with reading(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def start_from(model: nn.Module, weights: Weights) -> StartReport:
    """Puts weights into a model, where names and shapes agree; all others stay as drawn.

    A first part of the name that all tensors of the file share, and none of the model has, is left
    out: that of `DataParallel` (`module.`), of a compiled module, of a module that holds the model.

    Raises:
        ModelError: Nothing in the file fits the model, or what does holds numbers that are not
            finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
        >>> state = {f"module.{name}": t for name, t in model.state_dict().items()}
        >>> report = start_from(model, Weights(file="w.pt", digest="0" * 64, tensors=state))
        >>> len(report.matched), report.missing
        (4, ())
    """
    own = model.state_dict()
    tensors = _without_prefix(weights.tensors, own)
    common = [name for name in own if name in tensors]
    matched = tuple(name for name in common if _fits(own[name], tensors[name]))
    other = {
        name: f"{name} ({_form(tensors[name])} there, {_form(own[name])} here)"
        for name in common
        if name not in matched
    }
    if not matched:
        raise ModelError(
            f"weights: nothing in {weights.file} fits the model: "
            + (
                f"of another shape or kind of numbers are {_few(other.values())}; choose the model "
                "that they were trained in, or save them as float32"
                if other
                else f"it has {_few(tensors)}, the model {_few(own)}; choose the model that they "
                "were trained in"
            )
        )
    _check_finite(weights.file, {name: tensors[name] for name in matched}, own)
    with torch.no_grad():
        for name in matched:
            own[name].copy_(tensors[name])
    return StartReport(
        file=weights.file,
        digest=weights.digest,
        matched=matched,
        reshaped=other,
        missing=tuple(name for name in own if name not in tensors),
        unexpected=tuple(name for name in tensors if name not in own),
    )


def freeze(
    model: nn.Module, *, train_only: Sequence[str] = (), freeze: Sequence[str] = ()
) -> tuple[str, ...]:
    """Freezes the parameters that a training is not to change; returns the names of all frozen.

    Patterns are those of shells (`head.*`, `*.bias`), over the names of `named_parameters`. Trained
    is what a pattern of `train_only` names, all where there is none, and no pattern of `freeze`;
    what was frozen before stays so.

    Raises:
        ModelError: A pattern names no parameter, or nothing is left to train.

    Example:
        >>> freeze(nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 3)), train_only=["1.*"])
        ('0.weight', '0.bias')
    """
    named = list(model.named_parameters(remove_duplicate=False))
    names = [name for name, _ in named]
    for option, patterns in (("train_only", train_only), ("freeze", freeze)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.0)
                raise ModelError(
                    f"{option}: expected a pattern that names parameters of the model, got "
                    f"{pattern}, which names none; there are {', '.join(near)}"
                )
    chosen = {id(p) for name, p in named if not train_only or _named_by(name, train_only)}
    chosen -= {id(p) for name, p in named if _named_by(name, freeze)}
    for _, parameter in named:
        if id(parameter) not in chosen:
            parameter.requires_grad = False
    if not any(p.requires_grad for _, p in named):
        raise ModelError(
            "freeze: expected parameters that are left to train, got none; freeze fewer of them"
        )
    return tuple(name for name, p in named if not p.requires_grad)


def _named_by(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _digest(path: Path) -> str:
    try:
        digest = hashlib.sha256()
        with reading(path) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()
    except OSError as error:
        raise ModelError(
            f"{path}: expected a file of weights: {error.strerror}; check the path"
        ) from error


def _text(values: object, *path: str) -> str:
    """The text at this place in nested mappings; empty where there is none."""
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values if isinstance(values, str) else ""


def _tensors(state: Any) -> dict[str, Tensor]:
    """The named tensors of a model, below one of the usual names or at the top of a state."""
    if not isinstance(state, dict):
        return {}
    inner = (_tensors(state.get(name)) for name in _WRAPPERS)
    found = {n: t for n, t in state.items() if isinstance(n, str) and isinstance(t, Tensor)}
    # Beside a model under one of these names, a tensor is a count of epochs, a learning rate.
    return next(filter(None, inner), found)


def _without_prefix(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(tensors)
    while not found.keys() & own.keys():
        first = {name.partition(".")[0] for name in found}
        if len(first) != 1 or not all("." in name for name in found):
            return dict(tensors)
        found = {name.partition(".")[2]: tensor for name, tensor in found.items()}
    return found


def _fits(own: Tensor, given: Tensor) -> bool:
    """Whether one can be written into the other: floats of the usual sizes, all else as it is."""
    floats = own.dtype in _FLOATS and given.dtype in _FLOATS
    return own.shape == given.shape and (floats or own.dtype == given.dtype)


def _check_finite(file: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuses numbers that are not finite, in the file or as the model's own kind of numbers."""
    broken = [name for name, tensor in given.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ModelError(
            f"weights: expected finite numbers, got others in {_few(broken)} of {file}; "
            "that training had diverged, take an earlier state of it"
        )
    large = [n for n, tensor in given.items() if not bool(tensor.to(own[n].dtype).isfinite().all())]
    if large:
        raise ModelError(
            f"weights: expected numbers that are finite in the model too, got larger ones in "
            f"{_few(large)} of {file} than {_form(own[large[0]]).partition(' ')[0]} has; that "
            "training had diverged, take an earlier state of it"
        )


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more
