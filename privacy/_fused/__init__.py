"""Opacus' three objects, a module, an optimizer and a data loader, with our private step in them.

The user's loss meets the model only at its outputs: there the graph is cut, and the user's
`backward()` leaves the gradient of the outputs. `FusedOptimizer.step` makes one loss an example of
it and lets the ordinary private step of `privacy.update` do the rest. Nothing here knows Opacus.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from privacy._fused.loader import Samples, first_images, plan_for, poisson_loader
from privacy._fused.module import FusedModule, Outputs
from privacy._fused.offers import check_settings, refuse_adaptive
from privacy._fused.optimizer import FusedOptimizer
from privacy._fused.settings import Account
from privacy._fused.writes import ENGINE, RefusedAttribute, refusal
from privacy.clipping import rule_of
from privacy.clipping.layers import install
from privacy.clipping.tape import Tape
from privacy.errors import PlanError, StepError
from privacy.ledger import Ledger
from privacy.plan import DPPlan
from privacy.probe import probe, rehearse
from privacy.step import Reserved
from privacy.update import ClippedSum
from privacy.validate import check_layers, trainable_parameters

__all__ = [
    "ENGINE",
    "Account",
    "FusedModule",
    "FusedOptimizer",
    "RefusedAttribute",
    "check_settings",
    "fuse",
    "plan_for",
    "refusal",
    "refuse_adaptive",
]


def fuse(
    plan: DPPlan,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    *,
    loss_reduction: str,
    account: Account,
    ledger: Ledger,
) -> tuple[FusedModule, FusedOptimizer, DataLoader[Any]]:
    """The private three; module and optimizer stay as they were where this raises.

    Raises:
        PlanError: The plan has no noise, the account holds what does not fit it, or the loader's
            batches have no tensor of inputs.
        StepError: The optimizer does not fit the module, or the module is private already.
        UnsupportedLayer: A layer mixes examples or cannot be recorded.
    """
    if loss_reduction not in ("mean", "sum"):
        raise PlanError(f'loss_reduction: expected "mean" or "sum", got {loss_reduction!r}')
    plan.event()
    if isinstance(optimizer, torch.optim.LBFGS):
        raise StepError("optimizer: LBFGS asks for several losses a step; use another optimizer")
    if not module.training:
        raise StepError("module: it is in eval mode; call module.train() before make_private")
    parameters = trainable_parameters(module, optimizer)
    check_layers(module)
    images = first_images(loader).to(next(iter(parameters.values())).device)
    probe(module, images)
    event = plan.event(steps=1)
    account.expect(noise_multiplier=event.noise_multiplier, sampling_rate=event.sampling_rate)
    if ledger.path is not None:
        ledger.bind(plan)
        account.cover(ledger.events)
    tape, outputs = Tape(), Outputs()
    installation = install(module, tape, rule_of)
    reserved, samples = Reserved(optimizer), Samples(prefetching=loader.num_workers > 0)
    try:
        rehearse(module, images, parameters, tape)
        private = FusedOptimizer(
            reserved,
            plan=plan,
            loss_reduction=loss_reduction,
            module=module,
            parameters=parameters,
            clipped=ClippedSum(parameters, tape, max_grad_norm=plan.max_grad_norm),
            outputs=outputs,
            samples=samples,
            account=account,
            ledger=ledger,
        )
        batches = poisson_loader(loader, samples, rate=plan.sampling_rate)
    except BaseException:
        installation.remove()
        reserved.free()
        raise
    optimizer.zero_grad()
    return FusedModule(module, outputs, installation, reserved), private, batches
