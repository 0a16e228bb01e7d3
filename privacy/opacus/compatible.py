"""Which modules, optimizers and loaders can be made private, asked before; and the ones that can.

Opacus' validators answer for its own modes, `privacy` for the fused one. What both take trains in
each; Opacus' layers have their rules here.
"""

import copy
import dataclasses
from typing import Any

import torch
from opacus.layers.dp_rnn import RNNLinear
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader

from privacy.batch import Forward, call_model
from privacy.clipping import register
from privacy.clipping.linear import LinearRule
from privacy.clipping.tuner import Tuner
from privacy.errors import UnsupportedLayer
from privacy.opacus.loader import Padding, first_batch, plan_for
from privacy.plan import DPPlan
from privacy.replacement import fix
from privacy.step import Prepared, prepare
from privacy.validate import check_layers, check_module, trainable_parameters

__all__ = ["compatible", "prepared", "validate"]

# An nn.Linear in all but name, in the cells of Opacus' recurrent layers.
register(RNNLinear, lambda layer, name: LinearRule(layer, name, Tuner()), replace=True)


def validate(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    data_loader: DataLoader[Any] | None,
) -> None:
    """Refuses what `make_private` would, as far as it shows in what is given; changes nothing."""
    check_layers(module)
    if errors := ModuleValidator.validate(module, strict=False):
        raise UnsupportedLayer(f"{type(module).__name__}: {'; '.join(map(str, errors))}")
    own = [{"params": list(module.parameters())}]
    trainable_parameters(module, torch.optim.SGD(own) if optimizer is None else optimizer)
    if data_loader is not None:
        plan = dataclasses.replace(plan_for(data_loader, 1.0, epochs=1), noise_multiplier=1.0)
        if optimizer is not None:
            prepared(plan, module, optimizer, data_loader)[0].undo()


def prepared(
    plan: DPPlan,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    forward: Forward | None = None,
) -> tuple[Prepared, Padding]:
    """The module, recorded, and how its rows are padded; where this raises, nothing has changed.

    `forward` says how the loop calls it on a batch, where that does not show in the batch.
    """
    if not check_module(module).training:
        raise UnsupportedLayer(
            "module: expected it in training mode; call module.train() before make_private"
        )
    call = call_model if forward is None else forward
    made = prepare(
        plan,
        module,
        optimizer,
        samples=plan.samples,
        examples=lambda: first_batch(data_loader, told=forward is not None),
        forward=call,
    )
    try:
        return made, Padding.of(module, data_loader, call)
    except BaseException:
        made.undo()
        raise


def compatible(module: nn.Module) -> nn.Module:
    """A copy that passes `validate`: replaced by `privacy.fix`, and by Opacus what that leaves.

    Ours come first: they keep the weights, and refuse what they cannot keep.
    """
    module = ModuleValidator.fix(fix(copy.deepcopy(module)))
    validate(module, None, None)
    return module
