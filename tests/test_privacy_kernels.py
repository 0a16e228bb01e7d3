"""Every kernel gives the gradients of the per-example loop; the tuner takes the fastest allowed."""

import dataclasses
import itertools
import weakref
from collections.abc import Iterator
from functools import partial
from types import FunctionType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import privacy
from privacy.clipping import rule_of
from privacy.clipping.convolution import ConvolutionRule
from privacy.clipping.gradients import AfterBackward, Instantiated
from privacy.clipping.layers import install
from privacy.clipping.patches import CACHE
from privacy.clipping.tape import Tape
from privacy.clipping.tuner import Kernel, Tuner
from privacy.differentiation import differentiate
from privacy.native import compiled
from secure_cnn.bench.memory import peak_bytes

needs_compiler = pytest.mark.skipif(
    compiled() is None, reason="no C compiler when this was installed"
)


def loop(layer: nn.Conv2d, images: torch.Tensor, output_gradient: torch.Tensor) -> torch.Tensor:
    """The truth: autograd on one example at a time, [n, *weight.shape]."""
    rows = [
        torch.autograd.grad(layer(x[None]), layer.weight, dy[None])[0]
        for x, dy in zip(images, output_gradient, strict=True)
    ]
    return torch.stack(rows)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv2d, torch.Tensor, int]:
    """A convolution, images for it in either memory layout, and how many are one example's."""
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    layer = nn.Conv2d(
        groups * integer(1, 3),
        groups * integer(1, 4),
        (integer(1, 3), integer(1, 3)),
        stride=(integer(1, 2), integer(1, 2)),
        padding=(integer(0, 2), integer(0, 2)),
        dilation=(integer(1, 2), integer(1, 2)),
        groups=groups,
        bias=False,
        dtype=torch.float64,
    )
    copies = draw(st.sampled_from([1, 1, 2, 3]))
    shape = (copies * integer(1, 70 // copies), layer.in_channels, integer(5, 8), integer(5, 8))
    images = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layout = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    return layer, images.contiguous(memory_format=layout), copies


@given(convolutions())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_every_kernel_equals_the_per_example_loop(
    drawn: tuple[nn.Conv2d, torch.Tensor, int],
) -> None:
    """Norms, clipped sum and gradients agree to 1e-9 for every candidate the rule offers."""
    layer, images, copies = drawn
    output = layer(images)
    gradient = torch.randn(output.shape, dtype=torch.float64).contiguous(
        memory_format=torch.channels_last
    )
    truth = torch.unflatten(loop(layer, images, gradient), 0, (-1, copies)).sum(1)
    factors = torch.rand(len(truth), dtype=torch.float64)
    rule = ConvolutionRule(layer, "conv", Tuner())
    for kernel in rule._kernels(images, gradient, copies):
        part = kernel.run(images, gradient)
        expected = truth.flatten(1).square().sum(1)
        torch.testing.assert_close(
            part.squared_norms(), expected, rtol=1e-9, atol=1e-9, msg=lambda m, k=kernel: k.name + m
        )
        torch.testing.assert_close(
            part.weighted_sum(factors), torch.einsum("n,n...->...", factors, truth)
        )
        torch.testing.assert_close(part.instantiate(), truth)
        some = torch.arange(0, len(truth), 2)
        torch.testing.assert_close(part.select(some).instantiate(), truth[some])


def names_of(layer: nn.Conv2d, images: torch.Tensor, gradient: torch.Tensor) -> set[str]:
    """The kernels that a convolution is offered."""
    return {k.name for k in ConvolutionRule(layer, "c", Tuner())._kernels(images, gradient, 1)}


@needs_compiler
def test_the_compiled_kernel_takes_the_place_of_patches() -> None:
    """In float32; a grouped convolution and float64 have the others."""
    layer, images, gradient = nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 6, 6)
    expected = {"direct", "direct, postponed", "direct, twice", "grouped", "gram, then native"}
    assert names_of(layer, images, gradient) == expected
    grouped = nn.Conv2d(4, 4, 3, groups=2)
    assert names_of(grouped, torch.zeros(2, 4, 8, 8), gradient) == {"grouped"}


@needs_compiler
def test_another_device_is_offered_its_own_kernels() -> None:
    """A model that moves keeps its rules; compiled code would follow an address of the GPU's."""
    rule = ConvolutionRule(nn.Conv2d(3, 4, 3), "c", Tuner())
    images, gradient = torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 6, 6)
    assert "direct" in {k.name for k in rule._kernels(images, gradient, 1)}
    elsewhere = rule._kernels(images.to("meta"), gradient.to("meta"), 1)
    assert not any(k.name.startswith("direct") for k in elsewhere)


def held(thing: Any) -> Iterator[torch.Tensor]:
    """Every tensor that something keeps alive: in its fields, lists, arguments and closures."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from held(part)
    elif isinstance(thing, partial):
        yield from held((thing.func, *thing.args, *thing.keywords.values()))
    elif isinstance(thing, FunctionType):
        yield from held([cell.cell_contents for cell in thing.__closure__ or ()])
    elif dataclasses.is_dataclass(thing):
        yield from held([getattr(thing, field.name) for field in dataclasses.fields(thing)])


@pytest.mark.parametrize("name", ["direct", "columns", "rows", "grouped"])
def test_kept_gradients_let_the_activations_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a step rests on it: of a layer only sizes may stay."""
    if name != "direct":
        monkeypatch.setattr("privacy.clipping.direct.compiled", lambda: None)
    elif compiled() is None:
        pytest.skip("no C compiler when this was installed")
    last = torch.channels_last
    images, gradient = (torch.ones(2, n, 8, 8).contiguous(memory_format=last) for n in (3, 16))
    rule = ConvolutionRule(nn.Conv2d(3, 16, 3, padding=1), "c", Tuner())
    kernels = {kernel.name: kernel for kernel in rule._kernels(images, gradient, 1)}
    theirs = {tensor.data_ptr() for tensor in (images, gradient)}
    kept = {tensor.data_ptr() for tensor in held(kernels[name].run(images, gradient))}
    assert kept
    assert not kept & theirs
    deferred = kernels["gram, then native"].run(images, gradient)
    assert {tensor.data_ptr() for tensor in held(deferred)} > theirs  # control: this one needs them


@needs_compiler
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("outputs", [250, 256])
def test_the_compiled_kernels_take_no_more_room_than_they_say(
    outputs: int, layout: torch.memory_format
) -> None:
    """The memory cap rests on it: laying out, borders, whole vectors, and each thread's own."""
    layer = nn.Conv2d(256, outputs, 3, padding=1)
    images, gradient = (
        torch.zeros(8, channels, 10, 10).contiguous(memory_format=layout)
        for channels in (256, outputs)
    )
    for kernel in ConvolutionRule(layer, "c", Tuner())._kernels(images, gradient, 1):
        if not kernel.name.startswith("direct"):
            continue

        def step(kernel: Kernel = kernel) -> None:
            part = kernel.run(images, gradient)
            part.weighted_sum(torch.ones(len(part.squared_norms())))

        sums = layer.weight.nbytes * 256 / outputs  # the result itself, of whole vectors
        allowed = kernel.peak_bytes + kernel.later_bytes + sums + CACHE + 2**13
        assert peak_bytes(lambda step=step: step) <= allowed, kernel.name


def test_patches_are_there_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel made of torch's operations, with the room that it takes."""
    monkeypatch.setattr("privacy.clipping.direct.compiled", lambda: None)
    layer, images, gradient = nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 6, 6)
    kept = {"columns", "rows"}
    deferred = {f"{name}, then native" for name in kept | {"gram"}}
    assert names_of(layer, images, gradient) == kept | deferred | {"grouped"}
    last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (images, gradient)]
    peak = {k.name: k.peak_bytes for k in ConvolutionRule(layer, "c", Tuner())._kernels(*last, 1)}
    assert peak["grouped"] == peak["columns"] + sum(tensor.nbytes for tensor in last)


def fake(name: str, seconds: float, room: int, clock: list[float]) -> Kernel:
    """A kernel that takes as long as it says, on a clock of its own."""

    def run(x: torch.Tensor, dy: torch.Tensor) -> Instantiated:
        clock[0] += seconds
        return Instantiated([x * dy])

    return Kernel(name=name, run=run, peak_bytes=room, work=1)


def test_a_tuner_shows_its_settings() -> None:
    """And how much it has chosen by now; no number of examples."""
    assert repr(Tuner()) == "Tuner(memory_cap=1; 0 chosen)"
    assert (
        repr(Tuner(fixed={"c": "grouped"}))
        == "Tuner(memory_cap=1, fixed={'c': 'grouped'}; 0 chosen)"
    )


def test_the_tuner_takes_the_fastest_kernel_and_times_it_once() -> None:
    """The second call at the same shape runs the choice and nothing else."""
    clock = [0.0]
    kernels = [fake("slow", 3.0, 0, clock), fake("fast", 1.0, 0, clock), fake("mid", 2.0, 0, clock)]
    tuner, batch = Tuner(clock=lambda: clock[0]), torch.ones(8, 2)
    tuner.run("fc", kernels, batch, batch)
    assert [choice.kernel for choice in tuner.choices] == ["fast"]
    before = clock[0]
    tuner.run("fc", kernels, batch, batch)
    assert clock[0] - before == 1.0
    tuner.run("fc", kernels, torch.ones(32, 2), torch.ones(32, 2))
    assert len(tuner.choices) == 2


def test_the_memory_cap_excludes_a_faster_kernel() -> None:
    """Input and output gradient of [8, 2] floats make 128 bytes of room."""
    clock = [0.0]
    kernels = [fake("large", 1.0, 200, clock), fake("small", 2.0, 100, clock)]
    batch = torch.ones(8, 2)
    for cap, expected in ((1.0, "small"), (2.0, "large"), (0.1, "small")):
        tuner = Tuner(memory_cap=cap, clock=lambda: clock[0])
        tuner.run("fc", kernels, batch, batch)
        assert tuner.choices[0].kernel == expected


def test_what_is_postponed_fits_into_what_the_whole_pass_lets_go() -> None:
    """Two layers of 128 bytes make 256 bytes of room.

    Where the other layer keeps 4 bytes a row, 32 in all, one may postpone 200 bytes, not both;
    where it keeps 8, none.
    """
    clock, batch = [0.0], torch.ones(8, 2)
    slow = fake("slow", 2.0, 0, clock)
    postponed = dataclasses.replace(fake("postponed", 1.0, 0, clock), later_bytes=200)
    for weight, expected in ((1, ["postponed", "slow"]), (2, ["slow", "slow"])):
        tuner = Tuner(clock=lambda: clock[0])
        for layer in ("first", "second"):
            tuner.expect(layer, batch, batch, torch.ones(weight))
        for layer in ("second", "first"):
            tuner.run(layer, [slow, postponed], batch, batch)
        assert [choice.kernel for choice in tuner.choices] == expected


def test_what_fits_at_once_is_not_postponed() -> None:
    """Though it were faster: the activations of earlier layers are still there."""
    clock, batch = [0.0], torch.ones(8, 2)
    tuner = Tuner(clock=lambda: clock[0])
    kernels = [
        fake("kept", 2.0, 128, clock),
        dataclasses.replace(fake("postponed", 1.0, 0, clock), later_bytes=128),
    ]
    tuner.expect("fc", batch, batch, torch.ones(1))
    tuner.run("fc", kernels, batch, batch)
    assert tuner.choices[0].kernel == "kept"


def test_postponed_gradients_let_go_what_they_are_formed_of() -> None:
    """Once asked for, and they are formed once."""
    formed = []

    def form(x: torch.Tensor, dy: torch.Tensor) -> Instantiated:
        formed.append(None)
        return Instantiated([x * dy])

    images = torch.ones(4, 3)
    alive = weakref.ref(images)
    part = AfterBackward(images, torch.full((4, 3), 2.0), form)
    del images
    assert alive() is not None
    assert part.squared_norms().round().tolist() == [12.0] * 4
    assert alive() is None
    assert part.weighted_sum(torch.ones(4)).tolist() == [8.0] * 3
    assert part.select(torch.tensor([1])).instantiate().shape == (1, 3)
    assert len(formed) == 1


def test_a_fixed_kernel_is_taken_untimed_and_an_unknown_one_refused() -> None:
    """What an earlier training chose can be fixed by layer."""
    clock = [0.0]
    kernels = [fake("slow", 3.0, 0, clock), fake("fast", 1.0, 0, clock)]
    batch = torch.ones(8, 2)
    tuner = Tuner(fixed={"fc": "slow"}, clock=lambda: clock[0])
    tuner.run("fc", kernels, batch, batch)
    assert tuner.choices[0].kernel == "slow"
    assert tuner.choices[0].seconds == {}
    with pytest.raises(privacy.PlanError, match="fc: expected one of the kernels slow, fast, got"):
        Tuner(fixed={"fc": "no such"}).run("fc", kernels, batch, batch)


def test_the_choice_changes_only_rounding() -> None:
    """One private sum is the same to float32 rounding whichever kernel is fixed for a layer."""
    torch_generator = torch.Generator().manual_seed(0)
    images = torch.rand(16, 3, 8, 8, generator=torch_generator)
    images = images.contiguous(memory_format=torch.channels_last)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    gradient = torch.rand(16, 4, 8, 8, generator=torch_generator)
    sums = []
    for kernel in ConvolutionRule(layer, "c", Tuner())._kernels(images, gradient, 1):
        part = kernel.run(images, gradient)
        sums.append(part.weighted_sum(torch.ones(16)))
    for first, second in itertools.pairwise(sums):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("size", [1, 3])
def test_no_kernel_measures_less_than_it_releases(size: int, copies: int) -> None:
    """Positions that nearly cancel cost a float32 Gram product 7 percent of the norm, unnoticed."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(8, 8, size, padding=size // 2, bias=False)
    images = 1 + 1e-3 * torch.randn(16, 8, 8, 8, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(16, 8, 8, 8, generator=generator)
    gradient -= gradient.mean((2, 3), keepdim=True)
    for kernel in ConvolutionRule(layer, "c", Tuner())._kernels(images, gradient, copies):
        part = kernel.run(images, gradient)
        for row in range(len(images) // copies):
            one = torch.zeros(16 // copies, dtype=torch.float64)
            one[row] = 1.0
            released = part.weighted_sum(one).double().norm()
            assert released <= part.squared_norms()[row].sqrt() * (1 + 1e-5), kernel.name


KERNELS = [
    kernel.name
    for kernel in ConvolutionRule(nn.Conv2d(3, 4, 3, padding=1), "0", Tuner())._kernels(
        *(torch.zeros(2, n, 6, 6, dtype=torch.float64) for n in (3, 4)), 1
    )
]


@pytest.mark.parametrize("name", KERNELS)
def test_two_passes_are_one_gradient_through_any_kernel(name: str) -> None:
    """As in TRADES, also where a kernel keeps no gradients."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(144, 2)).double()
    images = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    images = images.contiguous(memory_format=torch.channels_last)

    def losses(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().sum(1) + model(0.9 * x - 0.1).sum(1)

    expected = [torch.autograd.grad(losses(x[None]).sum(), model[0].weight)[0] for x in images]
    tape, tuner = Tape(), Tuner(fixed={"0": name})
    installation = install(model, tape, lambda layer, name: rule_of(layer, name, tuner))
    parameters = dict(model.named_parameters())
    images.requires_grad_()  # as what an earlier layer gives does
    parts = differentiate(losses(images), parameters, tape, examples=len(images))
    installation.remove()
    torch.testing.assert_close(
        parts[model[0].weight].instantiate(), torch.stack(expected), rtol=1e-9, atol=1e-9
    )


def test_a_selection_is_taken_at_the_largest_batch() -> None:
    """A last small batch, which is not timed, does not override what was."""
    clock = [0.0]
    kernels = [fake("slow", 3.0, 0, clock), fake("fast", 1.0, 0, clock)]
    tuner = Tuner(clock=lambda: clock[0])
    for rows in (32, 2):
        tuner.run("fc", kernels, torch.ones(rows, 2), torch.ones(rows, 2))
    assert tuner.selection == {"fc": "fast"}
    again = Tuner(fixed=tuner.selection)
    again.run("fc", kernels, torch.ones(32, 2), torch.ones(32, 2))
    assert again.choices[0].kernel == "fast"
