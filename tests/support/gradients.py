"""Per-example gradients by a loop of one example at a time, and drawn layers to compare."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from privacy.clipping import rule_of
from privacy.clipping.layers import install
from privacy.clipping.tape import Tape

PRECISION = 1e-9


Objective = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def losses_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """One loss an example, different at every output."""
    output = model(inputs).flatten(1)
    return (output * torch.linspace(-1, 1, output.shape[1]).to(output) + output.sin()).sum(1)


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with drawn parameters."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * 0.5)
    return model


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    """Normal inputs in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: torch.Tensor, expected: torch.Tensor, precision: float = PRECISION) -> None:
    """Equal, relative to the largest entry."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=precision, atol=precision * scale + 1e-30)


def one_at_a_time(
    model: nn.Module, inputs: torch.Tensor, objective: Objective
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The oracle: plain autograd of one example after the other on a model nothing is done to."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in named}
    at_inputs = []
    for i in range(len(inputs)):
        example = inputs[i : i + 1].detach().clone()
        wanted = list(named.values())
        if example.is_floating_point():
            wanted.append(example.requires_grad_())
        gradients = torch.autograd.grad(objective(model, example).sum(), wanted)
        for name, gradient in zip(named, gradients, strict=False):
            rows[name].append(gradient)
        if example.is_floating_point():
            at_inputs.append(gradients[-1])
    stacked = {name: torch.stack(values) for name, values in rows.items()}
    return stacked, torch.cat(at_inputs) if at_inputs else None


def check(
    model: nn.Module,
    inputs: torch.Tensor,
    objective: Objective = losses_of,
    precision: float = PRECISION,
) -> None:
    """Norms, weighted sums, instantiated gradients and input gradients equal the oracle's."""
    expected, at_inputs = one_at_a_time(copy.deepcopy(model), inputs, objective)
    tape = Tape()
    install(model, tape, rule_of)
    inputs = inputs.detach().clone()
    if inputs.is_floating_point():
        inputs.requires_grad_()
    losses = objective(model, inputs)
    with tape.record(examples=len(inputs)):
        losses.sum().backward()
    parts = tape.take()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(parts) == set(named.values())
    factors = torch.linspace(0.1, 1.0, len(inputs), dtype=torch.float64)
    for name, parameter in named.items():
        wanted = expected[name]
        close(parts[parameter].instantiate(), wanted, precision)
        close(
            parts[parameter].squared_norms(),
            wanted.reshape(len(wanted), -1).square().sum(1),
            precision,
        )
        close(
            parts[parameter].weighted_sum(factors), torch.tensordot(factors, wanted, 1), precision
        )
        few = torch.tensor([len(inputs) - 1, 0])
        close(parts[parameter].select(few).instantiate(), wanted[few], precision)
        assert parameter.grad is None
    if at_inputs is not None:
        close(inputs.grad, at_inputs, precision)
