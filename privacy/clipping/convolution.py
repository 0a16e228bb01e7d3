"""Convolutions of one, two and three dimensions, plain and transposed.

The native kernel gives the input gradient alone, the weight gradient of scaled output gradients,
and, with each example a group of one large convolution, per-example weight gradients. Dense
convolutions have faster ways (`direct`, or where nothing is compiled `patches`; Gram matrices where
positions are few); the tuner chooses.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privacy.clipping import direct
from privacy.clipping.gradients import (
    AfterBackward,
    GhostNorm,
    Instantiated,
    Parts,
    PerExampleGradients,
    Saved,
    sum_copies,
)
from privacy.clipping.patches import (
    Columns,
    Geometry,
    PatchLayout,
    Rows,
    gram_squares,
    instantiated,
    rounded_up,
    squares,
)
from privacy.clipping.tuner import Kernel, Tuner

__all__ = ["ConvolutionRule"]

Convolution = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)

# By their public names they follow autocast.
_CONVOLVE: dict[tuple[int, bool], Callable[..., Tensor]] = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}


class ConvolutionRule:
    """The rule of one convolution, with any stride, padding and its mode, dilation and groups."""

    def __init__(self, layer: Convolution, name: str, tuner: Tuner) -> None:
        self.layer, self.name, self.tuner = layer, name, tuner
        self.parameters = tuple(layer.parameters(recurse=False))
        self._known: dict[tuple[object, ...], list[Kernel]] = {}
        # Padding that the kernel cannot express (a mode, or an uneven "same") is done before it, on
        # the input.
        self.outer_padding, self.padding = _split_padding(layer)

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The convolution, and the padded input where padding happens outside the kernel."""
        padded = self._padded(inputs)
        layer = self.layer
        convolve = partial(
            _CONVOLVE[len(layer.kernel_size), layer.transposed],
            stride=layer.stride,
            padding=self.padding,
            dilation=layer.dilation,
            groups=layer.groups,
        )
        if layer.transposed:
            convolve = partial(convolve, output_padding=layer.output_padding)
        output = convolve(padded, layer.weight, layer.bias)
        self.tuner.expect(self.name, padded, output, layer.weight)
        return output, (() if padded is inputs else (padded,))

    def input_gradient(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Tensor:
        """The kernel's input gradient, carried through the outer padding where there is one."""
        padded = saved[0] if saved else inputs
        weight, groups = self.layer.weight, self.layer.groups
        gradient = self._backward(output_gradient, padded, weight, groups, of_input=True)
        if not saved:
            return gradient
        with torch.enable_grad():
            leaf = inputs.detach().requires_grad_()
            (through,) = torch.autograd.grad(self._padded(leaf), leaf, gradient)
        return through

    def per_example_gradients(self, inputs: Tensor, saved: Saved, output_gradient: Tensor) -> Parts:
        """Weight gradients by the fastest kernel, bias gradients by a sum over positions."""
        return self.gradients_of_copies(inputs, saved, output_gradient, copies=1)

    def gradients_of_copies(
        self, inputs: Tensor, saved: Saved, output_gradient: Tensor, *, copies: int
    ) -> Parts:
        """Copies of an example are more positions of it: the same sums add them up."""
        padded = saved[0] if saved else inputs
        layer, parts = self.layer, Parts()
        if layer.weight.requires_grad:
            weight = cast(nn.Parameter, layer.weight)
            # Kernels for float32 and float64 only: norms of rounded gradients would be too small.
            dtype = torch.promote_types(output_gradient.dtype, torch.float32)
            x, dy = padded.to(dtype), output_gradient.to(dtype)
            kernels = self._kernels(x, dy, copies)
            parts.append((weight, self.tuner.run(self.name, kernels, x, dy, copies=copies)))
        if layer.bias is not None and layer.bias.requires_grad:
            bias = cast(nn.Parameter, layer.bias)
            of_rows = Instantiated([output_gradient.flatten(2).sum(2)])
            parts.append((bias, sum_copies(of_rows, copies, size=bias.numel())))
        return parts

    def grouped_weight_gradients(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Per-example weight gradients [n, *weight.shape], of any convolution.

        Each example becomes a group of one large grouped convolution (Rochette, Manoel and Tramel
        2019, arXiv 1912.06015). Its channels must lie side by side: channels-last tensors are
        copied.
        """
        layer, examples, shape = self.layer, len(inputs), self.layer.weight.shape
        # Of the weight only the shape counts: one number, repeated, stands for all of it.
        stacked = layer.weight.detach().new_empty((1,)).expand(examples * shape[0], *shape[1:])
        gradient = self._backward(
            output_gradient.reshape(1, -1, *output_gradient.shape[2:]),
            inputs.reshape(1, -1, *inputs.shape[2:]),
            stacked,
            layer.groups * examples,
            of_input=False,
        )
        return gradient.view(examples, *shape)

    def _kernels(self, inputs: Tensor, output_gradient: Tensor, copies: int) -> list[Kernel]:
        """Every way to the weight's gradients that is exact for this layer, likely ones first."""
        layouts = (inputs.stride(), output_gradient.stride())
        key = (inputs.shape, output_gradient.shape, *layouts, inputs.dtype, inputs.device, copies)
        if key not in self._known:
            self._known[key] = self._candidates(inputs, output_gradient, copies)
        return self._known[key]

    def _candidates(self, inputs: Tensor, output_gradient: Tensor, copies: int) -> list[Kernel]:
        """The same, made anew; they hold no tensor."""
        examples, positions = len(inputs) // copies, copies * output_gradient[0, 0].numel()
        size = examples * self.layer.weight.numel() * inputs.element_size()
        product = float(examples * positions * self.layer.weight.numel())
        # In another layout than the default one, both tensors are laid out anew.
        copied = sum(t.nbytes for t in (inputs, output_gradient) if not t.is_contiguous())
        grouped, peak = partial(self._grouped, copies=copies), copies * size + copied
        geometry = self._geometry(copies)
        kernels = list[Kernel]()
        compiled = geometry is not None and direct.fits(inputs)
        if geometry is not None and compiled:
            kernels += _direct_kernels(geometry, inputs, output_gradient, product)
        kernels.append(Kernel(name="grouped", run=grouped, peak_bytes=peak, work=product))
        if geometry is None or len(geometry.kernel) != 2:
            return kernels
        ghost = partial(self._ghost, geometry=geometry)
        layouts: dict[str, PatchLayout] = {} if compiled else {"columns": Columns(geometry)}
        if not compiled and geometry.plain and geometry.kernel[0] > 1:
            layouts["rows"] = Rows(geometry)
        for name, layout in layouts.items():
            kept = partial(instantiated, layout)
            kernels.append(Kernel(name=name, run=kept, peak_bytes=size, work=product))
            found = partial(squares, layout)
            kernels.append(ghost(name, found, work=2 * product, gram=False))
        pairs, outputs = float(examples * positions**2), output_gradient.shape[1]
        patch = self.layer.weight[0].numel()
        found, work = partial(gram_squares, geometry), pairs * (patch + outputs) + product
        kernels.append(ghost("gram", found, work=work, gram=True))
        return kernels

    def _geometry(self, copies: int) -> Geometry | None:
        """The layer's sizes, where it is a dense convolution."""
        layer = self.layer
        if layer.transposed or layer.groups != 1:
            return None
        whole = cast(Callable[[object], tuple[int, ...]], tuple)
        return Geometry(
            kernel=whole(layer.kernel_size),
            stride=whole(layer.stride),
            padding=whole(self.padding),
            dilation=whole(layer.dilation),
            copies=copies,
        )

    def _ghost(
        self,
        name: str,
        norms: Callable[[Tensor, Tensor], Tensor],
        *,
        geometry: Geometry,
        work: float,
        gram: bool,
    ) -> Kernel:
        """A kernel that finds norms only, and leaves the clipped sum to the native kernel."""

        def run(inputs: Tensor, output_gradient: Tensor) -> PerExampleGradients:
            measured = norms(inputs, output_gradient)
            found = rounded_up(measured, geometry, inputs, output_gradient, gram=gram)
            second, kept = self._weight_gradient, self.grouped_weight_gradients
            return GhostNorm(found, inputs, output_gradient, second, kept, geometry.copies)

        return Kernel(name=f"{name}, then native", run=run, peak_bytes=0, work=work)

    def _grouped(self, inputs: Tensor, dy: Tensor, *, copies: int) -> PerExampleGradients:
        rows = Instantiated([self.grouped_weight_gradients(inputs, dy)])
        return sum_copies(rows, copies, size=self.layer.weight.numel())

    def _weight_gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """The native kernel's weight gradient, summed over the examples."""
        weight, groups = self.layer.weight.detach(), self.layer.groups
        return self._backward(output_gradient, inputs, weight, groups, of_input=False)

    def _backward(
        self,
        output_gradient: Tensor,
        inputs: Tensor,
        weight: Tensor,
        groups: int,
        *,
        of_input: bool,
    ) -> Tensor:
        """One of the native kernel's two gradients, in the dtype of the output gradient."""
        layer, dtype = self.layer, output_gradient.dtype
        tensors = output_gradient, inputs.to(dtype), weight.to(dtype)
        sizes = layer.stride, self.padding, layer.dilation, layer.transposed, layer.output_padding
        wanted = of_input, not of_input, False
        gradients = torch.ops.aten.convolution_backward(*tensors, None, *sizes, groups, wanted)
        gradient: Tensor = gradients[0] if of_input else gradients[1]
        return gradient

    def _padded(self, inputs: Tensor) -> Tensor:
        if not any(self.outer_padding):
            return inputs
        mode = self.layer.padding_mode
        return F.pad(inputs, self.outer_padding, "constant" if mode == "zeros" else mode)


def _direct_kernels(
    geometry: Geometry, inputs: Tensor, output_gradient: Tensor, work: float
) -> list[Kernel]:
    """The compiled kernel: its gradients kept, formed after the backward pass, or formed twice."""
    kept_peak, twice_peak = direct.peak_bytes(geometry, inputs, output_gradient)
    kept = partial(direct.instantiated, geometry)
    after = partial(AfterBackward, form=kept)
    twice = partial(direct.twice, geometry)
    return [
        Kernel(name="direct", run=kept, peak_bytes=kept_peak, work=work),
        Kernel(name="direct, postponed", run=after, peak_bytes=0, work=work, later_bytes=kept_peak),
        Kernel(name="direct, twice", run=twice, peak_bytes=twice_peak, work=2 * work),
    ]


def _split_padding(layer: Convolution) -> tuple[list[int], tuple[int, ...]]:
    """Padding to do on the input (as `F.pad` takes it) and padding left to the kernel."""
    dimensions = len(layer.kernel_size)
    nothing = [0] * (2 * dimensions)
    if layer.transposed:
        return nothing, tuple(int(p) for p in layer.padding)
    sides = list(layer._reversed_padding_repeated_twice)
    uneven = any(sides[i] != sides[i + 1] for i in range(0, len(sides), 2))
    if layer.padding_mode != "zeros" or uneven:
        return sides, (0,) * dimensions
    return nothing, tuple(sides[::-1][::2])
