"""The secure generator: its key stream, its distribution far into the tails, its secrecy."""

import copy
import math
import os
import pickle
from collections.abc import Callable

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privacy import PlanError, SecureGenerator
from privacy.noise import _in_memory_order as in_memory_order

KEY = bytes(range(32))
BLOCK = 2**17
properties = settings(deadline=None, derandomize=True, max_examples=30)


def raw(words: torch.Tensor) -> bytes:
    """Words as the bytes of the key stream."""
    return words.numpy().tobytes()


def test_the_stream_begins_with_the_published_block() -> None:
    """AES-256 of a zero block under a zero key (McGrew and Viega 2004, GCM test case 13)."""
    words = SecureGenerator(bytes(32)).words(2)
    assert raw(words).hex() == "dc95c078a2408989ad48a21492842087"


def test_the_stream_is_aes_of_a_counter() -> None:
    """Counter mode made by hand out of single blocks (NIST SP 800-38A, section 6.5)."""
    encrypt = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()
    counters = b"".join(counter.to_bytes(16, "big") for counter in range(300))
    assert raw(SecureGenerator(KEY).words(600)) == encrypt.update(counters)


@properties
@given(counts=st.lists(st.integers(0, 40), max_size=6))
def test_the_stream_goes_on_where_it_stopped(counts: list[int]) -> None:
    """No bit is used twice and none is lost, however the draws are cut."""
    generator = SecureGenerator(KEY)
    pieces = [generator.words(count) for count in counts]
    assert b"".join(map(raw, pieces)) == raw(SecureGenerator(KEY).words(sum(counts)))


def test_a_key_fixes_the_noise() -> None:
    """Which is for tests alone: the same key, the same numbers."""
    assert torch.equal(SecureGenerator(KEY).normal(100), SecureGenerator(KEY).normal(100))


@pytest.mark.secret
def test_without_a_key_every_generator_differs() -> None:
    """The key comes from the operating system; two are alike with a probability of 2^-256."""
    assert not torch.equal(SecureGenerator().words(4), SecureGenerator().words(4))


def test_a_wrong_key_is_refused() -> None:
    """By its length, without showing it."""
    with pytest.raises(ValueError, match=r"^key: expected 32 bytes, got 16$"):
        SecureGenerator(b"sixteen bytes...")


def test_a_draw_of_less_than_nothing_does_not_take_the_stream_back() -> None:
    """It would give the same noise once more."""
    generator, other = SecureGenerator(KEY), SecureGenerator(KEY)
    first = generator.words(4)
    for draw in (generator.words, generator.normal, generator.uniform):
        for wrong in (-4, 1.5, "4", None):
            with pytest.raises(PlanError, match=r"^count: expected a whole number, at least 0"):
                draw(wrong)
    for wrong in ("x", None, -0.1, 1.1, float("nan")):
        with pytest.raises(PlanError, match=r"^probability: expected"):
            generator.bernoulli(4, wrong)
    assert torch.equal(torch.cat([first, generator.words(4)]), other.words(8))
    for key in ("x" * 32, 32, [0] * 32):
        with pytest.raises(PlanError, match=r"^key: expected 32 bytes, got \w+$"):
            SecureGenerator(key)


def twice(generator: SecureGenerator) -> torch.Tensor:
    """Two draws of ten."""
    return torch.stack([generator.normal(10), generator.normal(10)])


def test_no_seed_moves_the_noise_and_the_noise_moves_no_generator() -> None:
    """Attacks that re-seed torch have no hold on it, and it does not disturb them."""
    generator, undisturbed = SecureGenerator(KEY), SecureGenerator(KEY)
    torch.manual_seed(0)
    first = generator.normal(10)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    second = generator.normal(10)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([first, second]).view(2, 10), twice(undisturbed))


@pytest.mark.secret
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("taken_before", [False, True])
def test_a_forked_process_gets_a_stream_of_its_own(taken_before: bool) -> None:
    """Parent and child never share noise, even where a test fixed the key.

    Nor do they in the midst of a draw, whose place in the stream was taken before the fork. Four
    words of two keys are alike by chance with a probability of 2^-256.
    """
    generator = SecureGenerator(KEY)
    generator.words(1)
    place = generator._take(4)

    def draw() -> torch.Tensor:
        if taken_before:
            return generator._words(place, 4, torch.empty(8, dtype=torch.int64))
        return generator.words(4)

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, raw(draw()))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 32)
    os.close(reading)
    os.close(writing)
    assert len(theirs) == 32
    assert theirs != raw(draw())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_cannot_be_copied_or_saved(copied: Callable[[object], object]) -> None:
    """A copy would give the same noise twice."""
    with pytest.raises(TypeError, match="cannot be copied or saved"):
        copied(SecureGenerator(KEY))


def test_the_key_is_shown_nowhere() -> None:
    """Neither in the text of the object nor in an attribute."""
    key = b"a key that nobody must ever see!"
    generator = SecureGenerator(key)
    shown = f"{generator} {generator!r} {vars(generator)!r}"
    assert key.decode() not in shown
    assert key.hex() not in shown
    assert repr(generator) == "SecureGenerator()"


@pytest.mark.parametrize("word", [0, -1, 2**63 - 1, -(2**63)])
def test_the_open_interval_is_kept_at_its_ends(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extreme words give neither 0 nor 1, and finite normals."""
    generator = SecureGenerator(KEY)
    monkeypatch.setattr(generator, "_stream", lambda place, count, room: torch.full((count,), word))
    assert 0 < generator.uniform(1).item() < 1
    assert generator.normal(2).isfinite().all()
    assert generator.normal(2).abs().max() < 8.7


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_any_number_can_be_drawn(count: int) -> None:
    """Odd numbers and none among them."""
    generator = SecureGenerator(KEY)
    for drawn in (generator.words(count), generator.uniform(count), generator.normal(count)):
        assert drawn.shape == (count,)
    assert generator.bernoulli(count, 0.5).dtype == torch.bool


def test_coins_of_certain_outcome() -> None:
    """Probabilities 0 and 1 are exact."""
    generator = SecureGenerator(KEY)
    assert not generator.bernoulli(1000, 0.0).any()
    assert generator.bernoulli(1000, 1.0).all()


def p_value(values: torch.Tensor, law: str) -> float:
    """The Kolmogorov-Smirnov test of the values against a standard law."""
    return float(stats.kstest(values.numpy(), law).pvalue)


def test_the_normals_are_normal() -> None:
    """A million of them pass; five percent more deviation, or a small shift, does not."""
    normals = SecureGenerator(KEY).normal(1_000_000)
    assert p_value(normals, "norm") > 1e-3
    assert p_value(normals * 1.05, "norm") < 1e-9
    assert p_value(normals + 0.01, "norm") < 1e-9


def test_the_normals_are_independent() -> None:
    """The two halves of each pair, and neighbours, are uncorrelated, in value and in size."""
    normals = SecureGenerator(KEY).normal(16 * BLOCK)
    pairs = {
        "halves": normals.view(16, 2, -1).transpose(0, 1).flatten(1),
        "neighbours": normals.view(-1, 2).t(),
        "blocks": normals.view(2, -1),
    }
    for pair in pairs.values():
        for values in (pair, pair.square()):
            correlation = float(torch.corrcoef(values)[0, 1])
            assert abs(correlation) * math.sqrt(8 * BLOCK) < 4


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_normals_are_the_same_in_blocks(count: int) -> None:
    """A piece at a time or all at once; no block repeats another, and each is Box-Muller's."""
    whole = SecureGenerator(KEY).normal(count)
    blocks = list(SecureGenerator(KEY).normal_blocks(count))
    assert [len(block) for block in blocks[:-1]] == [BLOCK] * (len(blocks) - 1)
    assert torch.equal(torch.cat([torch.empty(0).double(), *blocks]), whole)
    assert len(whole.unique()) == count
    twin = SecureGenerator(KEY)
    for block in blocks:
        pairs = (len(block) + 1) // 2
        radius, angle = twin.uniform(2 * pairs).view(2, -1)
        radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
        expected = torch.cat([radius * angle.cos(), radius * angle.sin()])[: len(block)]
        torch.testing.assert_close(block, expected, rtol=1e-14, atol=1e-14)


def uneven() -> list[torch.Tensor]:
    """Tensors in several memory orders, one of them longer than a block, and an odd number."""
    image_first = (
        torch.arange(BLOCK * 16.0).view(2, 8, -1, 16).to(memory_format=torch.channels_last)
    )
    return [torch.ones(3), image_first, torch.ones(()), torch.zeros(0), torch.ones(2, 5).t()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perturbing_adds_the_stream_in_memory_order(dtype: torch.dtype) -> None:
    """Each value gets a number of its own, times the deviation; the rest is arithmetic."""
    values = [tensor.to(dtype) for tensor in uneven()]
    before = torch.cat([in_memory_order(tensor).clone() for tensor in values])
    strides = [tensor.stride() for tensor in values]
    SecureGenerator(KEY).perturb(values, deviation=1.7, scale=1 / 3)
    assert [tensor.stride() for tensor in values] == strides
    expected = (before.double() + 1.7 * SecureGenerator(KEY).normal(len(before))) / 3
    found = torch.cat([in_memory_order(tensor) for tensor in values])
    torch.testing.assert_close(
        found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-14, check_dtype=False
    )


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_compiled_functions_change_no_noise(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part of the stream is made once, whoever makes it; the next draw goes on after it."""
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    found, twin = uneven(), uneven()
    generator, other = SecureGenerator(KEY), SecureGenerator(KEY)
    generator.perturb(found, deviation=1.0)
    monkeypatch.setattr("privacy.noise.compiled", lambda: None)
    other.perturb(twin, deviation=1.0)
    for one, two in zip(found, twin, strict=True):
        torch.testing.assert_close(one, two, rtol=2**-23, atol=1e-14)
    assert torch.equal(generator.words(5), other.words(5))


def test_values_at_an_odd_address_are_perturbed_too() -> None:
    """C may not write floats there."""
    odd = torch.frombuffer(bytearray(4 * 7 + 1), dtype=torch.float32, offset=1)
    SecureGenerator(KEY).perturb([odd], deviation=1.0)
    assert torch.equal(odd.double(), SecureGenerator(KEY).normal(7).float().double())


def test_values_with_gaps_are_refused() -> None:
    """What lies between them is somebody else's."""
    with pytest.raises(AssertionError, match="strides"):
        SecureGenerator(KEY).perturb([torch.zeros(4, 4)[:, :2]], deviation=1.0)


def tail(normals: torch.Tensor) -> torch.Tensor:
    """What lies beyond three deviations, as uniforms if the law is normal."""
    beyond = normals.abs()[normals.abs() > 3].numpy()
    return torch.from_numpy(stats.norm.sf(beyond) / stats.norm.sf(3))


def test_the_tail_beyond_three_deviations_is_right() -> None:
    """Among four million draws, ten thousand lie there: their number and their law."""
    normals = SecureGenerator(KEY).normal(4_000_000)
    beyond = tail(normals)
    chance = 2 * float(stats.norm.sf(3))
    assert stats.binomtest(len(beyond), len(normals), chance).pvalue > 1e-3
    assert p_value(beyond, "uniform") > 1e-3
    wrong = tail(1.05 * normals)
    assert stats.binomtest(len(wrong), len(normals), chance).pvalue < 1e-9
    assert p_value(wrong, "uniform") < 1e-3


def far_tail(radii: torch.Tensor, bits: int) -> torch.Tensor:
    """Box-Muller radii whose uniform was below 2^-bits, as exponentials if the law is normal."""
    return radii.square() / 2 - bits * math.log(2)


def test_the_tail_beyond_seven_deviations_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is bent so that each draw lies there: 53 bits resolve it, 24 bits cannot."""
    bits, count = 40, 20_000
    generator = SecureGenerator(KEY)
    straight = generator._stream

    def bent(place: int, wanted: int, room: torch.Tensor) -> torch.Tensor:
        # Of the 53 bits that count the first 40 are zero. The angle is as small, so that the radius
        # comes out.
        return straight(place, wanted, room).bitwise_and(2 ** (53 - bits) - 1)

    monkeypatch.setattr(generator, "_stream", bent)
    uniforms = generator.uniform(2 * count)
    assert float(uniforms.max()) < 2.0**-bits
    radii = generator.normal(2 * count)[:count]
    assert float(radii.min()) > 7
    assert p_value(far_tail(radii, bits), "expon") > 1e-3
    coarse = (torch.floor(uniforms * 2.0**24) + 0.5) * 2.0**-24
    assert float((-2 * coarse.log()).sqrt().max()) < 6
    assert p_value(far_tail((-2 * coarse.log()).sqrt(), bits), "expon") < 1e-9


@pytest.mark.secret
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_has_its_parents_key_no_more() -> None:
    """Before it draws anything: what looks into the generator there finds another stream.

    Four words of two keys are alike by chance with a probability of 2^-256.
    """
    generator = SecureGenerator(KEY)

    def stream() -> bytes:
        return raw(generator._stream(0, 4, torch.empty(8, dtype=torch.int64)))

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, stream())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 32)
    os.close(reading)
    os.close(writing)
    assert len(theirs) == 32
    assert theirs != stream() == raw(SecureGenerator(KEY).words(4))
