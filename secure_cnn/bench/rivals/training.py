"""The same step by others, on the same network, images, layout and optimizer.

Opacus in its own modes; adversarial training with torchattacks as its own examples use it.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from privacy.opacus import PrivacyEngine
from secure_cnn.bench.step import NOISE_MULTIPLIER, Workload
from secure_cnn.errors import RunError

__all__ = ["RIVALS", "rival_step"]

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
