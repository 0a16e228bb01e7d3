"""The tuner: which kernel gets a layer's per-example gradients fastest, found by timing it once.

Published rules (2T² <= pD; Bu, Mao, Xu 2022, arXiv 2205.10683) minimise memory, not time. Here the
candidates run once at the real shape, and the fastest is kept, under a cap on the memory that it
holds. The choice changes speed and rounding, never the guarantee.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from privacy.clipping.gradients import PerExampleGradients
from privacy.errors import PlanError

__all__ = ["Choice", "Kernel", "Tuner"]

_HOPELESS = 2.0
"""A candidate whose first run takes this many times the best one's is not run again."""
_TOO_MUCH = 4.0
"""A candidate that needs this many times the least multiplications is not timed."""
_REPEATS = 2
_WORTH_TIMING = 8
"""Examples from which on a choice is worth the time it takes."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way from a layer's input and output gradient to its per-example gradients.

    `peak_bytes` is what it takes at most, beyond these two and what it has in the processor's
    cache, `later_bytes` what its result takes once the backward pass is over, and not before, and
    `work` roughly its multiplications: what is hopeless need not be timed.
    """

    name: str
    run: Callable[[Tensor, Tensor], PerExampleGradients]
    peak_bytes: int
    work: float
    later_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen for one parameter at one shape, and why.

    Attributes:
        layer: Dotted name of the layer.
        inputs: Shape of its input.
        kernel: The kernel chosen.
        seconds: Best time of every candidate that was run, its share of the clipped sum included.

    Example:
        >>> Choice(layer="conv1", inputs=(2, 1, 8, 8), kernel="rows", seconds={"rows": 1e-3}).kernel
        'rows'
    """

    layer: str
    inputs: tuple[int, ...]
    kernel: str
    seconds: Mapping[str, float]


class Tuner:
    """Times kernels and remembers the fastest; a class because it remembers.

    Args:
        memory_cap: Most that kernels may take, in units of the bytes of inputs and output
            gradients, > 0: during the backward pass each layer's own, which a layer with kept
            gradients frees, and after it, when all are freed, all convolutions' together.
        fixed: Kernel names by layer, from an earlier training's choices; they are not timed. An
            installation without compiled kernels has others.
        clock: A monotonic clock, in seconds.

    Raises:
        PlanError: The cap is not positive.

    Example:
        >>> tuner = Tuner(fixed={"conv1": "grouped"})
        >>> tuner.choices
        ()
    """

    def __init__(
        self,
        *,
        memory_cap: float = 1.0,
        fixed: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not memory_cap > 0:
            raise PlanError(f"memory_cap: expected a number > 0, got {memory_cap}")
        self._memory_cap = memory_cap
        self._fixed = dict(fixed or {})
        self._clock = clock
        self._choices: dict[tuple[object, ...], Choice] = {}
        # Bytes a row, by layer: of activations until the backward pass gets there, and after it.
        self._activations: dict[str, float] = {}
        self._after: dict[str, float] = {}

    def __repr__(self) -> str:
        fixed = f", fixed={self._fixed}" if self._fixed else ""
        return f"Tuner(memory_cap={self._memory_cap:g}{fixed}; {len(self._choices)} chosen)"

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Everything chosen so far, in the order of the first backward pass."""
        return tuple(self._choices.values())

    @property
    def selection(self) -> dict[str, str]:
        """The kernel of each layer at its largest batch: what `fixed` takes."""
        by_size = sorted(self._choices.values(), key=lambda choice: choice.inputs[0])
        return {choice.layer: choice.kernel for choice in by_size}

    def expect(self, layer: str, inputs: Tensor, output: Tensor, weight: Tensor) -> None:
        """Notes in the forward pass what the layer will hold during the backward pass and after it.

        The gradient at the output is as large as the output, so that its bytes are known by now.
        """
        activations = _bytes(inputs, output) / max(1, len(inputs))
        self._activations[layer] = activations
        # Gradients that fit are kept; of others the layer's input and output gradient are.
        self._after.setdefault(layer, min(activations, _bytes(weight)))

    def run(
        self,
        layer: str,
        kernels: Sequence[Kernel],
        inputs: Tensor,
        output_gradient: Tensor,
        *,
        copies: int = 1,
    ) -> PerExampleGradients:
        """Runs the kernel that is, or turns out to be, the fastest for these shapes.

        Where the cap allows none of the `kernels`, the one with the least peak is taken. A fixed
        kernel that is not among them is refused.
        """
        # Sizes of about the same magnitude share a choice: a Poisson sample's last batch varies.
        magnitude, threads = len(inputs).bit_length(), torch.get_num_threads()
        layouts = inputs.shape[1:], inputs.stride()[1:], output_gradient.stride()[1:]
        kind = output_gradient.dtype, output_gradient.device
        key = (layer, magnitude, copies, *layouts, *kind, threads)
        if key not in self._choices:
            self._choices[key] = self._choose(layer, kernels, inputs, output_gradient)
        name = self._choices[key].kernel
        chosen = next(kernel for kernel in kernels if kernel.name == name)
        if chosen.later_bytes:
            self._after[layer] = chosen.later_bytes / len(inputs)
        return chosen.run(inputs, output_gradient)

    def _choose(
        self, layer: str, kernels: Sequence[Kernel], inputs: Tensor, output_gradient: Tensor
    ) -> Choice:
        shape = tuple(inputs.shape)
        names = [kernel.name for kernel in kernels]
        if layer in self._fixed:
            if self._fixed[layer] not in names:
                raise PlanError(
                    f"{layer}: expected one of the kernels {', '.join(names)}, got "
                    f"{self._fixed[layer]}; leave it out to have it timed"
                )
            return Choice(layer=layer, inputs=shape, kernel=self._fixed[layer], seconds={})
        allowed = self._within_cap(layer, kernels, inputs, output_gradient)
        least = min(kernel.work for kernel in allowed)
        candidates = [kernel for kernel in allowed if kernel.work <= _TOO_MUCH * least]
        if len(candidates) == 1 or len(inputs) < _WORTH_TIMING:
            return Choice(layer=layer, inputs=shape, kernel=candidates[0].name, seconds={})
        seconds: dict[str, float] = {}
        for kernel in candidates:
            best = min(seconds.values(), default=float("inf"))
            seconds[kernel.name] = self._time(kernel, inputs, output_gradient, best)
        fastest = min(seconds, key=lambda name: seconds[name])
        return Choice(layer=layer, inputs=shape, kernel=fastest, seconds=seconds)

    def _within_cap(
        self, layer: str, kernels: Sequence[Kernel], inputs: Tensor, output_gradient: Tensor
    ) -> list[Kernel]:
        """The kernels that the memory cap allows, or else the one with the least peak."""
        now = self._memory_cap * _bytes(inputs, output_gradient)
        others = sum(size for name, size in self._after.items() if name != layer)
        later = len(inputs) * (self._memory_cap * sum(self._activations.values()) - others)
        # Gradients that fit now need not wait for the end of the backward pass.
        allowed = [
            kernel
            for kernel in kernels
            if kernel.peak_bytes <= now
            and (not kernel.later_bytes or now < kernel.later_bytes <= later)
        ]
        at_once = (kernel for kernel in kernels if not kernel.later_bytes)
        return allowed or [min(at_once, key=lambda kernel: kernel.peak_bytes)]

    def _time(self, kernel: Kernel, inputs: Tensor, output_gradient: Tensor, best: float) -> float:
        """Seconds of a kernel and its clipped sum: the best of a few runs after a warm-up."""
        seconds = float("inf")
        for number in range(1 + _REPEATS):
            _synchronise(inputs.device)
            start = self._clock()
            part = kernel.run(inputs, output_gradient)
            part.weighted_sum(torch.ones_like(part.squared_norms()))
            del part
            _synchronise(inputs.device)
            elapsed = self._clock() - start
            if number == 0 and elapsed > _HOPELESS * best:
                return elapsed
            seconds = min(seconds, elapsed) if number else float("inf")
        return seconds


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
