"""The compiled functions give what float64 autograd gives, whatever the shape and the processor."""

import ctypes
import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from privacy import SecureGenerator, native, noise
from privacy.clipping import direct, normalisation
from privacy.clipping.normalisation import GroupNormRule, InstanceNormRule
from privacy.clipping.patches import Geometry

pytestmark = pytest.mark.skipif(
    native.compiled() is None, reason="no C compiler when this was installed"
)
NATIVE = Path(native.__file__).parent
HOOK = Path(__file__).parents[1] / "hatch_build.py"
VARIANTS = [
    name
    for name, abilities in (("avx512", {"AVX512"}), ("avx2", {"AVX512", "AVX2"}), ("plain", None))
    if abilities is None or torch.backends.cpu.get_cpu_capability() in abilities
]
CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
quick = settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def compile_into(root: Path) -> list[str]:
    """Compiles a copy of the sources as an installation does; the warnings that it shows."""
    folder = root / "privacy" / "native"
    folder.mkdir(parents=True, exist_ok=True)
    for source in NATIVE.glob("*.[ch]"):
        shutil.copy(source, folder)
    specification = importlib.util.spec_from_file_location("hook", HOOK)
    assert specification is not None
    assert specification.loader is not None
    hook = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hook)
    shown = list[str]()
    app = SimpleNamespace(display_warning=shown.append)
    build: Any = hook.NativeBuildHook(str(root), {}, None, None, str(root), "wheel", app)
    build.initialize("standard", {"artifacts": []})
    return shown


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an installation of its own, with the one library that every processor has."""
    monkeypatch.setattr("platform.machine", lambda: "any")
    monkeypatch.setenv("CC", "")  # as good as not set
    assert compile_into(tmp_path) == []
    monkeypatch.setattr(native, "_FOLDER", tmp_path / "privacy" / "native")
    monkeypatch.setattr(native, "_variant", lambda: "plain")
    native._library.cache_clear()
    yield native._FOLDER
    native._library.cache_clear()


def test_a_library_of_other_sources_is_not_loaded(installed: Path) -> None:
    """Its structures may be others: after an update without an installation it writes anywhere."""
    assert native.compiled() == "plain"
    native._library.cache_clear()
    with (installed / "team.h").open("a") as header:
        header.write("\n")
    with pytest.warns(RuntimeWarning, match="install the project again"):
        assert native.compiled() is None


def test_a_library_that_does_not_load_is_as_good_as_none(installed: Path) -> None:
    """It may be another machine's, or of another C library; training goes on without."""
    native._path().write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match="install the project again"):
        assert native.compiled() is None


@pytest.mark.parametrize(
    "script",
    [
        'case "$*" in *-mavx512f*) exit 0;; esac; echo "\\377" >&2; exit 1',
        "exit 0",
    ],
    ids=["one of several fails, in no encoding", "nothing is written"],
)
def test_an_installation_goes_on_without_a_compiler_that_works(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half made stays behind."""
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    (shown,) = compile_into(tmp_path)
    assert shown.startswith("installing without compiled kernels")
    assert not list(tmp_path.rglob("*.so.1"))


def test_an_installation_goes_on_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout of somebody else's, with what they compiled in it."""

    def refused(path: Path) -> None:
        raise PermissionError(f"read-only: {path}")

    monkeypatch.setenv("CC", "no such compiler")
    (tmp_path / "privacy" / "native").mkdir(parents=True)
    (tmp_path / "privacy" / "native" / "privacy-plain.so.1").touch()
    monkeypatch.setattr(Path, "unlink", refused)
    (shown,) = compile_into(tmp_path)
    assert "read-only" in shown


@pytest.fixture(params=VARIANTS)
def variant(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each library that this processor can run."""
    native._library.cache_clear()
    monkeypatch.setattr(native, "_variant", lambda: request.param)
    if not native._path().exists():
        pytest.skip(f"the {request.param} library is not there on this kind of machine")
    yield request.param
    native._library.cache_clear()


@st.composite
def layers(draw: st.DrawFn) -> tuple[Any, torch.Tensor, int]:
    """A dense convolution in float64, its float32 images, and how many are one example's."""
    dimensions = draw(st.sampled_from([1, 2, 2, 2, 3]))
    several = lambda low, high: tuple(  # noqa: E731
        draw(st.integers(low, high)) for _ in range(dimensions)
    )
    layer = CONVOLUTIONS[dimensions](
        draw(st.sampled_from([1, 2, 3, 4, 8, 13, 16, 27])),
        draw(st.sampled_from([1, 5, 15, 16, 17, 32, 48, 64, 100])),
        several(1, 3),  # type: ignore[arg-type]
        stride=several(1, 3),  # type: ignore[arg-type]
        padding=several(0, 2),  # type: ignore[arg-type]
        dilation=several(1, 2),  # type: ignore[arg-type]
        bias=False,
        dtype=torch.float64,
    )
    copies, examples = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shape = (copies * examples, layer.in_channels, *several(5, 9))
    images = torch.randn(shape, generator=generator)
    if dimensions == 2 and draw(st.booleans()):
        images = images.contiguous(memory_format=torch.channels_last)
    return layer, images, copies


def geometry_of(layer: Any, copies: int = 1) -> Geometry:
    """Its sizes."""
    return Geometry(
        kernel=layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        copies=copies,
    )


@given(drawn=layers())
@quick
def test_weight_gradients_are_those_of_the_per_example_loop(
    variant: str, drawn: tuple[Any, torch.Tensor, int]
) -> None:
    """Every dimension, stride, border, dilation, number of channels and of copies."""
    layer, images, copies = drawn
    output = layer(images.double())
    dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    truth = torch.stack(
        [
            torch.autograd.grad(layer(x[None]), layer.weight, row[None])[0]
            for x, row in zip(images.double(), dy.double(), strict=True)
        ]
    )
    truth = torch.unflatten(truth, 0, (-1, copies)).sum(1)
    kept = direct.instantiated(geometry_of(layer, copies), images, dy)
    again = direct.twice(geometry_of(layer, copies), images, dy)
    factors = torch.rand(len(truth), generator=torch.Generator().manual_seed(1))
    expected = torch.einsum("n,n...->...", factors.double(), truth)
    # A number is a sum of that many products; float32 rounds each addition.
    close = {"rtol": 1e-4, "atol": 1e-4}
    for part in (kept, again):
        torch.testing.assert_close(part.instantiate().double(), truth, **close)
        torch.testing.assert_close(part.weighted_sum(factors).double(), expected, **close)
        some = torch.arange(0, len(truth), 2)
        torch.testing.assert_close(part.select(some).instantiate().double(), truth[some], **close)
    # Norms are of what is released, to float64: clipping rests on it.
    exact = kept.instantiate().double().flatten(1).square().sum(1)
    torch.testing.assert_close(kept.squared_norms(), exact, rtol=1e-12, atol=0)
    assert torch.equal(kept.squared_norms(), again.squared_norms())


def test_what_is_summed_up_twice_is_the_same_gradient(variant: str) -> None:
    """With a factor of one for a single example, not one bit is another."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(6, c, 9, 9, generator=generator) for c in (20, 40))
    geometry = Geometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    kept, again = (form(geometry, x, dy) for form in (direct.instantiated, direct.twice))
    for example, factors in enumerate(torch.eye(6)):
        assert torch.equal(again.weighted_sum(factors), kept.instantiate()[example])


def test_one_thread_and_several_give_the_same(variant: str) -> None:
    """Which thread takes an example is chance; its numbers are not."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(7, c, 6, 6, generator=generator) for c in (3, 16))
    geometry = Geometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(direct.instantiated(geometry, x, dy).instantiate())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, found[0]) for first in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_its_own_norm_only(
    variant: str, value: float
) -> None:
    """The step leaves that example out; its neighbours must be what they are."""
    x, dy = torch.ones(3, 2, 5, 5), torch.ones(3, 4, 5, 5)
    dy[1, 0, 0, 0] = value
    geometry = Geometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    norms = direct.twice(geometry, x, dy).squared_norms()
    assert norms.isfinite().tolist() == [True, False, True]
    assert norms[0] == norms[2]


@st.composite
def normalisations(draw: st.DrawFn) -> tuple[Any, torch.Tensor]:
    """A GroupNorm or InstanceNorm in float64 and float32 images with the channels last."""
    width, groups = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    images = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shape = (draw(st.integers(1, 5)), width * groups, *[draw(st.integers(2, 12))] * 2)
    # A ramp: groups of a few equal numbers would be ill-conditioned, and say nothing of the code.
    ramp = torch.linspace(0, 4, shape[-1]).view(-1, *[1] * (not images))
    x = ramp + torch.rand(shape if images else (*shape, 2), generator=generator)
    layout = torch.channels_last if images else torch.channels_last_3d
    layer: Any = nn.GroupNorm(groups, width * groups, dtype=torch.float64)
    if draw(st.booleans()):
        kind = nn.InstanceNorm2d if images else nn.InstanceNorm3d
        layer = kind(width * groups, affine=True, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2, generator=generator)
    return layer, x.contiguous(memory_format=layout)


@given(drawn=normalisations())
@quick
def test_line_and_input_gradients_are_those_of_autograd(
    variant: str, drawn: tuple[Any, torch.Tensor]
) -> None:
    """One pass gives what the per-example loop in float64 gives."""
    layer, x = drawn
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    leaf = x.double().requires_grad_()
    (through,) = torch.autograd.grad(layer(leaf), leaf, dy.double())
    truth = [
        torch.autograd.grad(layer(one[None]), [layer.weight, layer.bias], row[None])
        for one, row in zip(x.double(), dy.double(), strict=True)
    ]
    single = layer.float()
    rule: Any = GroupNormRule(single)
    if not isinstance(layer, nn.GroupNorm):
        rule = InstanceNormRule(single, "norm")
    assert normalisation.fits(x, dy) == (not x.is_contiguous())
    with torch.no_grad():
        _, saved = rule.forward(x)
        found, parts = rule.in_one_pass(x, saved, dy)
        alone = rule.per_example_gradients(x, saved, dy)
    torch.testing.assert_close(found.double(), through, rtol=1e-4, atol=1e-4)
    for index, ((_, part), (_, other)) in enumerate(zip(parts, alone, strict=True)):
        expected = torch.stack([gradients[index] for gradients in truth])
        torch.testing.assert_close(part.instantiate().double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(part.instantiate(), other.instantiate())
        exact = part.instantiate().double().square().sum(1)
        torch.testing.assert_close(part.squared_norms(), exact, rtol=1e-6, atol=1e-30)


def misaligned(values: torch.Tensor) -> torch.Tensor:
    """The same values where no float may lie: what `torch.frombuffer` makes of any offset."""
    buffer = bytearray(values.nbytes + 1)
    odd = torch.frombuffer(buffer, dtype=torch.float32, offset=1, count=values.numel())
    return odd.view(values.shape).copy_(values)


def test_floats_are_read_only_where_floats_may_lie(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere C says nothing about a read, and a compiler may make one that crashes."""
    seen = list[int]()

    def watched(function: str, work: Any, *, threads: int) -> None:
        names = [name for name, kind in work._fields_ if kind is ctypes.c_void_p]
        seen.extend(getattr(work, name) or 0 for name in names)
        native.call(function, work, threads=threads)

    for module in (direct, normalisation):
        monkeypatch.setattr(module, "call", watched)
    generator = torch.Generator().manual_seed(0)
    right = [torch.randn(3, 5, 5, 16, generator=generator) for _ in range(2)]
    x, dy = (misaligned(values).movedim(-1, 1) for values in right)
    geometry = Geometry(kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    one, factors = misaligned(torch.ones(3, 1)), misaligned(torch.ones(3))
    weight = misaligned(torch.ones(16))
    found = direct.twice(geometry, x, dy).weighted_sum(factors)
    _, line = normalisation.input_and_affine_gradients(x, dy, one, one, weight)
    assert seen
    assert not any(address % 4 for address in seen)
    expected = torch.einsum("nhwi,nhwo->oi", *right)
    torch.testing.assert_close(found[..., 0, 0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(line.shift.instantiate(), right[1].sum((1, 2)))


def test_a_weight_of_another_dtype_is_not_read_as_floats(variant: str) -> None:
    """Half as many bytes as are read would be one thing, garbage as a gradient another."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 5, 5, 8, generator=generator).movedim(-1, 1) for _ in range(2))
    zero, one, weight = torch.zeros(2, 2), torch.ones(2, 2), torch.rand(8, generator=generator)
    expected, _ = normalisation.input_and_affine_gradients(x, dy, zero, one, weight)
    found, _ = normalisation.input_and_affine_gradients(x, dy, zero, one, weight.double())
    assert torch.equal(found, expected)


def test_the_tables_lie_on_the_cpu_whatever_the_default_device() -> None:
    """The compiled code follows their addresses."""
    geometry = Geometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    with torch.device("meta"):
        tables = direct._tables.__wrapped__(geometry, (5, 5, 3), (5, 5))
    assert {part.device.type for part in (tables.line, tables.position, tables.tap)} == {"cpu"}


def test_the_structures_are_declared_alike_on_both_sides() -> None:
    """Same names in the same order as in the C: nothing else would notice."""
    for source, structure in (
        ("convolution.c", direct._Work),
        ("normalisation.c", normalisation._Work),
    ):
        text = (NATIVE / source).read_text()
        (body,) = re.findall(r"typedef struct \{([^}]*)\} work;", text)
        body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
        kinds = [
            (name.strip("* \n"), "c_long" if kind == "long" else "c_void_p")
            for kind, names in re.findall(
                r"(const long|long|const float|float|double) ([^;]*);", body
            )
            for name in names.split(",")
        ]
        assert kinds == [(name, kind.__name__) for name, kind in structure._fields_]


def test_noise_is_the_transform_of_its_words(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bits, at both ends of the uniforms too, on any number of threads."""
    words = SecureGenerator(bytes(32)).words(20_000)
    ends = torch.tensor([0, 1, 2**53 - 1, 2**53 - 2, 2**52, 2**52 - 1, 2**51, -1, -(2**63)])
    words[: len(ends)] = words[10_000 : 10_000 + len(ends)] = ends
    words[100 : 100 + len(ends)], words[10_200 : 10_200 + len(ends)] = ends, ends
    cells = (words & (2**53 - 1)).numpy().astype(np.float64)
    uniform = ((cells + 0.5) * 2.0**-53).astype(np.longdouble)
    radius, angle = np.sqrt(-2 * np.log(uniform[:10_000])), 2 * np.pi * uniform[10_000:]
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    for threads in (1, 2):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        found = noise._normal(words.clone())
        assert found.isfinite().all()
        assert np.abs(found.numpy() - expected).max() < 2e-14, variant
