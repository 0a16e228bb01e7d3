"""The same step by others: Opacus in its own modes, on the same network, images and optimizer."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privacy.opacus import PrivacyEngine
from secure_cnn.bench.step import NOISE_MULTIPLIER, Workload
from secure_cnn.errors import RunError

__all__ = ["RIVALS", "rival_step"]

Mode = Literal["hooks", "functorch", "ew", "ghost"]

RIVALS = tuple(f"opacus-{mode}" for mode in get_args(Mode))
"""Names of the rivals, as they stand in the variant column."""


def rival_step(load: Workload, rival: str) -> Callable[[], None]:
    """One training step of a copy of the model by a rival, as a call.

    In-place activations are replaced: Opacus' hooks do not allow them. Its `ew` mode gets the
    default layout: it cannot read another.

    Args:
        load: The workload.
        rival: One of `RIVALS`.

    Raises:
        RunError: There is no such rival.

    Example:
        >>> from secure_cnn.bench.step import synthetic
        >>> from secure_cnn.data import DataSpec
        >>> from secure_cnn.models import build_model
        >>> spec = DataSpec(shape=(1, 8, 8), classes=("0", "1"))
        >>> model = build_model("compact", spec)
        >>> load = Workload(case="compact", model=model, split=synthetic(spec, 4))
        >>> rival_step(load, "opacus-hooks")()
    """
    if rival not in RIVALS:
        raise RunError(f"rival: expected one of {', '.join(RIVALS)}, got {rival}")
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


@contextmanager
def _opacus_warnings_ignored() -> Iterator[None]:
    """Opacus warns of its secure mode, its hooks and its layouts; none of it is about time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _without_inplace(model: nn.Module) -> nn.Module:
    """The model with every in-place activation made an ordinary one."""
    for module in model.modules():
        if getattr(module, "inplace", False):
            cast(Any, module).inplace = False
    return model
