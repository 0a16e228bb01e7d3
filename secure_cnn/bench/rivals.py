"""The same work by others, as their own users have it: training steps, and files of tensors.

Steps are on the same network, images and optimizer, files on the same disk and encrypted where they
can. The only place that imports them for the benchmark. A rival that is not installed is named with
the reason, never left out in silence.
"""

import base64
import copy
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, final, get_args

import safetensors.torch
import torch
import torch.nn.functional as F
import torchattacks
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from privacy.opacus import PrivacyEngine
from secure_cnn.bench.protection import Saver
from secure_cnn.bench.step import NOISE_MULTIPLIER, Workload
from secure_cnn.errors import RunError
from secure_cnn.record import version

__all__ = [
    "ARCHIVE_RIVALS",
    "RIVALS",
    "ArchiveRival",
    "RivalSaver",
    "Tensors",
    "archive_rivals",
    "raw_cipher",
    "rival_step",
]

Mode = Literal["hooks", "functorch", "ew", "ghost"]

_EPS, _STEPS, _BETA = 8 / 255, 10, 6.0
_ALPHA = 2.5 * _EPS / _STEPS
# An attack on a model by our objective, as torchattacks' own examples use it: nothing put back or
# checked. It has no N-FGSM: FFGSM is its single step with noise.
_ATTACKS: dict[str, Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]] = {
    "fgsm": partial(torchattacks.FGSM, eps=_EPS),
    "ffgsm": partial(torchattacks.FFGSM, eps=_EPS, alpha=1.25 * _EPS),
    "pgd": partial(torchattacks.PGD, eps=_EPS, alpha=_ALPHA, steps=_STEPS),
    "trades": partial(torchattacks.TPGD, eps=_EPS, alpha=_ALPHA, steps=_STEPS),
}

RIVALS = (
    *(f"opacus-{mode}" for mode in get_args(Mode)),
    *(f"torchattacks-{objective}" for objective in _ATTACKS),
)
"""Names of the rivals, as they stand in the variant column."""


def rival_step(load: Workload, rival: str) -> Callable[[], None]:
    """One training step of a copy of the model by a rival, as a call.

    For Opacus in-place activations are replaced: its hooks do not allow them. Its `ew` mode gets
    the default layout: it cannot read another. The loops of torchattacks have the default layout,
    as its own examples do; with the channels last most of our lead over them is gone. Its attacks
    have eps = 8/255, ten steps where they iterate, and leave the clean logits of TRADES to be taken
    by the loop.
    """
    if rival not in RIVALS:
        raise RunError(f"rival: expected one of {', '.join(RIVALS)}, got {rival}")
    if rival.startswith("torchattacks-"):
        return _attacked_step(load, rival.removeprefix("torchattacks-"))
    mode = cast(Mode, rival.removeprefix("opacus-"))
    layout = torch.contiguous_format if mode == "ew" else load.memory_format
    model = _without_inplace(copy.deepcopy(load.model)).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    criterion: nn.Module = nn.CrossEntropyLoss()
    images, labels = load.split.batch(torch.arange(len(load.split)))
    with _opacus_warnings_ignored():
        made = PrivacyEngine().make_private(
            module=model.train(),
            optimizer=optimizer,
            criterion=criterion,
            data_loader=DataLoader(TensorDataset(images, labels), batch_size=len(labels)),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
        )
    private, stepping = made[0], made[1]
    if mode == "ghost":
        criterion = made[2]

    def step() -> None:
        # Read and laid out anew each time, as the other variants do.
        images, labels = load.split.batch(torch.arange(len(load.split)))
        images = images.contiguous(memory_format=layout)
        stepping.zero_grad()
        with _opacus_warnings_ignored():
            criterion(private(images), labels).backward()
        stepping.step()

    return step


def _attacked_step(load: Workload, objective: str) -> Callable[[], None]:
    """Adversarial training with torchattacks in the usual way, so in the default layout."""
    model = copy.deepcopy(load.model).to(memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    attack = _ATTACKS[objective](model)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        adversarial = attack(images, labels)
        if objective != "trades":
            return F.cross_entropy(model(adversarial), labels)
        clean = model(images)
        divergence = F.kl_div(
            model(adversarial).log_softmax(1), clean.softmax(1), reduction="batchmean"
        )
        return F.cross_entropy(clean, labels) + _BETA * divergence

    def step() -> None:
        images, labels = load.split.batch(torch.arange(len(load.split)))
        optimizer.zero_grad()
        torch.autograd.backward(loss(images, labels))
        optimizer.step()

    return step


@contextmanager
def _opacus_warnings_ignored() -> Iterator[None]:
    """Opacus warns of its secure mode, its hooks and its layouts; none of it is about time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _without_inplace(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if getattr(module, "inplace", False):
            cast(Any, module).inplace = False
    return model


Tensors: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ArchiveRival:
    """How somebody else saves and loads tensors.

    `load` is None where it is not compared, `load_into` where it is to load and to copy; `versions`
    are those that `secure_cnn.record.versions` does not name.
    """

    save: Callable[[Path, Tensors], None]
    load: Callable[[Path], Tensors] | None
    load_into: Callable[[Path, Tensors], object] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def archive_rivals(names: Sequence[str]) -> tuple[dict[str, ArchiveRival], dict[str, str]]:
    """The rivals asked for that are here, and for each other one why it is not."""
    here: dict[str, ArchiveRival] = {}
    skipped: dict[str, str] = {}
    for name in names:
        if name not in _MAKERS:
            raise RunError(f"rival: expected one of {', '.join(_MAKERS)}, got {name}")
        try:
            here[name] = _MAKERS[name]()
        except (ImportError, OSError) as error:
            skipped[name] = f"{type(error).__name__}: {error}"
    return here, skipped


def raw_cipher(piece: int) -> Callable[[int], None]:
    """AES-256-GCM alone: so many calls on pieces of this size, in warm memory."""

    def work(calls: int) -> None:
        cipher, plain, sealed = AESGCM(os.urandom(32)), bytes(piece), bytearray(piece + 16)
        for _ in range(calls):
            cipher.encrypt_into(os.urandom(12), plain, None, sealed)

    return work


@final
class RivalSaver(Saver):
    """Saves the tensors of a training's state as somebody else's call does, in the loop."""

    def __init__(self, rival: ArchiveRival, folder: Path) -> None:
        self._write = partial(rival.save, folder / "training")

    def save(self, state: Mapping[str, object]) -> None:
        """Saves as others call it: no sync; dense, since some refuse other layouts."""
        self._write({name: tensor.contiguous() for name, tensor in _tensors(state, "")})


def _tensors(value: object, name: str) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(name, value.detach())]
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _tensors(item, f"{name}.{key}")]
    return []


def _torch_save() -> ArchiveRival:
    """The pickle that everyone writes; it is not read back here, since that could run code."""

    def save(path: Path, tensors: Tensors) -> None:
        torch.save(dict(tensors), path)  # noqa: TID251  what we are compared with; never loaded

    return ArchiveRival(save=save, load=None)


def _safetensors() -> ArchiveRival:
    def save(path: Path, tensors: Tensors) -> None:
        safetensors.torch.save_file(dict(tensors), path)

    return ArchiveRival(save=save, load=lambda path: safetensors.torch.load_file(path))


def _fernet() -> ArchiveRival:
    """What most people write themselves: all bytes in one token."""
    fernet = Fernet(Fernet.generate_key())

    def save(path: Path, tensors: Tensors) -> None:
        path.write_bytes(fernet.encrypt(safetensors.torch.save(dict(tensors))))

    def load(path: Path) -> Tensors:
        return _read(fernet.decrypt(path.read_bytes()))

    return ArchiveRival(save=save, load=load)


def _age() -> ArchiveRival:
    age, keygen = shutil.which("age"), shutil.which("age-keygen")
    if age is None or keygen is None:
        raise FileNotFoundError("the commands age and age-keygen are not on the path")
    identity = _call([keygen], b"").decode()
    recipient = identity.partition("public key: ")[2].split()[0]

    def save(path: Path, tensors: Tensors) -> None:
        path.unlink(missing_ok=True)
        plain = safetensors.torch.save(dict(tensors))
        _call([age, "--recipient", recipient, "--output", str(path)], plain)

    def load(path: Path) -> Tensors:
        with tempfile.NamedTemporaryFile("w") as key:
            key.write(identity)
            key.flush()
            return _read(_call([age, "--decrypt", "--identity", key.name, str(path)], b""))

    told = _call([age, "--version"], b"").decode().strip()
    return ArchiveRival(save=save, load=load, versions={"age": told})


def _cryptotensors() -> ArchiveRival:
    from cryptotensors import safe_open  # type: ignore[import-not-found]
    from cryptotensors.torch import save_file  # type: ignore[import-not-found]

    signer = Ed25519PrivateKey.generate()
    public = signer.public_key().public_bytes_raw()
    config = {
        "enc_key": _jwk(kty="oct", alg="aes256gcm", kid="seal", k=os.urandom(32)),
        "sign_key": _jwk(
            kty="okp", alg="ed25519", kid="sign", d=signer.private_bytes_raw(), x=public
        ),
    }

    def save(path: Path, tensors: Tensors) -> None:
        save_file(dict(tensors), path, config=config)

    def load(path: Path) -> Tensors:
        with safe_open(path, framework="pt", config=config) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict

    told = {"cryptotensors": version("cryptotensors")}
    return ArchiveRival(save=save, load=load, versions=told)


def _tensorizer() -> ArchiveRival:
    import tensorizer  # type: ignore[import-not-found]

    key = os.urandom(32)

    def save(path: Path, tensors: Tensors) -> None:
        writer = tensorizer.TensorSerializer(
            str(path), encryption=tensorizer.EncryptionParams(key=key)
        )
        writer.write_state_dict(dict(tensors))
        writer.close()

    def load(path: Path) -> Tensors:
        opening = tensorizer.DecryptionParams.from_key(key)
        with tensorizer.TensorDeserializer(str(path), device="cpu", encryption=opening) as file:
            return {name: file[name] for name in file.keys()}  # noqa: SIM118  reads on iteration

    return ArchiveRival(save=save, load=load, versions={"tensorizer": version("tensorizer")})


def _read(plain: bytes) -> Tensors:
    tensors: Tensors = safetensors.torch.load(plain)
    return tensors


def _jwk(*, kty: str, alg: str, kid: str, **keys: bytes) -> dict[str, str]:
    encoded = {name: base64.b64encode(raw).decode() for name, raw in keys.items()}
    return {"kty": kty, "alg": alg, "kid": kid, **encoded}


def _call(command: Sequence[str], data: bytes) -> bytes:
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout  # noqa: S603  a command we chose


_MAKERS: dict[str, Callable[[], ArchiveRival]] = {
    "torch.save": _torch_save,
    "safetensors": _safetensors,
    "fernet": _fernet,
    "age": _age,
    "cryptotensors": _cryptotensors,
    "tensorizer": _tensorizer,
}

ARCHIVE_RIVALS = tuple(_MAKERS)
"""Names of the rivals, as they stand in the variant column."""
