"""The copy that a background save is made of: complete, apart from the original, without waste."""

import math
import re
from collections import OrderedDict, defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.state import decode_state, encode_state
from secure_cnn.archive.store.background import HostBuffer

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32),
    *(torch.uint64, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16),
    *(torch.bfloat16, torch.float32, torch.float64, torch.complex64),
]


def sealed_bytes(state):
    """What a file would hold of a state."""
    return b"".join(encode_state(state))


def random_bytes(shape, dtype):
    """A tensor of any bytes that its type can hold."""
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_any_type_and_shape_is_copied_bit_by_bit(dtype, shape):
    """Beside a neighbour of odd length, so that alignment matters."""
    state = {"odd": torch.ones(3, dtype=torch.uint8), "it": random_bytes(shape, dtype)}
    copy = HostBuffer().copy(state)
    assert copy["it"].dtype == dtype
    assert sealed_bytes(copy) == sealed_bytes(state)


def test_a_file_of_the_copy_is_a_file_of_the_state():
    """Ties, strides, views, parameters, conjugates, plain data and nesting, all at once."""
    base = torch.arange(24.0).reshape(2, 3, 4)
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    weight = torch.nn.Parameter(torch.randn(3, 2))
    state = {
        "base": base,
        "again": base,
        "transposed": base.transpose(0, 2),
        "every second": base[:, ::2],
        "expanded": torch.ones(1).expand(3, 4),
        "overlapping": torch.arange(6.0).unfold(0, 3, 1),
        "images": images,
        "weight": weight,
        "tied": weight.detach(),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "empty": [torch.empty(0), torch.empty(0, 2)],
        "plain": OrderedDict(a=(1, 2.5, None), b=["x", True, float("inf")]),
        7: {"deep": [({"er": torch.zeros(())},)]},
    }
    copy = HostBuffer().copy(state)
    assert sealed_bytes(copy) == sealed_bytes(state)
    assert copy["base"] is copy["again"]
    assert copy["weight"] is copy["tied"]
    assert not copy["weight"].requires_grad
    data = torch.frombuffer(bytearray(sealed_bytes(copy)), dtype=torch.uint8)
    assert decode_state(data)["plain"] == state["plain"]


def test_dense_strides_are_kept():
    """A copy in the same layout is a plain copy of memory, which the loop waits for."""
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {"a": images, "b": images.transpose(0, 1), "c": images[:, :, ::2]}
    copy = HostBuffer().copy(state)
    assert copy["a"].stride() == images.stride()
    assert copy["b"].stride() == state["b"].stride()
    assert copy["c"].is_contiguous() or copy["c"].numel() < state["a"].numel()


def test_later_changes_do_not_reach_the_copy():
    """Neither of tensors nor of containers."""
    state = {"w": torch.ones(3), "list": [1, {"x": 2}]}
    copy = HostBuffer().copy(state)
    state["w"].zero_()
    state["list"][1]["x"] = 3
    state["list"].append(4)
    assert copy["w"].tolist() == [1, 1, 1]
    assert copy["list"] == [1, {"x": 2}]


def test_memory_is_used_again():
    """By the same shapes and by smaller ones; only what does not fit is allocated anew."""
    buffer = HostBuffer()
    first = buffer.copy({"a": torch.zeros(100), "b": torch.zeros(7)})
    again = buffer.copy({"a": torch.ones(100), "b": torch.ones(7)})
    assert again["a"] is first["a"]
    assert first["b"].tolist() == [1] * 7
    smaller = buffer.copy([torch.ones(50)])
    assert smaller[0].data_ptr() == first["a"].data_ptr()
    larger = buffer.copy([torch.full((1000,), 2.0)])
    assert larger[0].tolist() == [2] * 1000
    assert sealed_bytes(buffer.copy({"a": torch.zeros(100)})) == sealed_bytes(
        {"a": torch.zeros(100)}
    )


class Shape(NamedTuple):
    """A container of a class of its own."""

    height: int
    width: int


@pytest.mark.parametrize(
    "value",
    [
        defaultdict(list, a=[1]),
        Shape(2, 3),
        {1.5: 2},
        {True: 2},
        torch.tensor([0, 1, 2], dtype=torch.uint8).view(torch.bool),
        torch.tensor([[0, 1], [2, 1]], dtype=torch.uint8).view(torch.bool).T,
        "\udce9",
        1 << 2000,
        np.longdouble(1.0),
        {1, 2},
        bytearray(b"changeable"),
        object(),
        torch.ones(2).to_sparse(),
        torch.empty(2, device="meta"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_copied_is_refused(value):
    """At once, wherever it is, in the words in which a save without a store refuses it."""
    with pytest.raises(StateError) as direct:
        encode_state({"a": [value]})
    with pytest.raises(StateError, match="^" + re.escape(str(direct.value)) + "$"):
        HostBuffer().copy({"a": [value]})


def test_a_state_that_contains_itself_is_refused():
    """Through lists and through dicts."""
    around = []
    around.append(around)
    ring = {}
    ring["ring"] = ring
    for state in (around, ring):
        with pytest.raises(StateError, match="contains itself"):
            HostBuffer().copy(state)


def test_no_memory_is_an_error_of_ours():
    """A state of a petabyte, of which every byte is at the same place."""
    with pytest.raises(StateError, match="no memory"):
        HostBuffer().copy({"a": torch.ones(1).expand(1 << 48)})
