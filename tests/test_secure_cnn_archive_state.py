"""State trees go to safetensors bytes and come back exactly; all else is refused with its path."""

import json
import math
from collections import OrderedDict, namedtuple

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.state import decode_state, encode_state

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


def file_of(state) -> bytes:
    """The safetensors bytes of a state."""
    return b"".join(encode_state(state))


def read(raw: bytes):
    """The state in safetensors bytes."""
    data = torch.empty(len(raw), dtype=torch.uint8)
    data.numpy()[:] = bytearray(raw)
    return decode_state(data)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes in row-major order, by another way than the code under test."""
    return bytes(tensor.resolve_conj().contiguous().untyped_storage())[: tensor.nbytes]


def same(left, right) -> bool:
    """Whether two trees are equal in type, structure and every bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        meta = left.dtype == right.dtype and left.shape == right.shape
        return meta and raw_bytes(left.clone()) == raw_bytes(right.clone())
    if isinstance(left, dict):
        keys = list(left) == list(right) and [*map(type, left)] == [*map(type, right)]
        return keys and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return math.isnan(left) == math.isnan(right) and (
            math.isnan(left)
            or (left == right and math.copysign(1, left) == math.copysign(1, right))
        )
    return left == right


@st.composite
def tensors(draw):
    """Small tensors of any dtype and shape, 0-d, empty and strided ones included."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape)
    size = count * dtype.itemsize
    values = draw(st.binary(min_size=size, max_size=size))
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(bytearray(values), dtype=torch.uint8)
    tensor = (tensor % 2).bool() if dtype == torch.bool else tensor.view(dtype)
    tensor = tensor.reshape(shape)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats() | text
trees = st.recursive(
    scalars | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(text | st.integers(-3, 3), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(trees)
def test_trees_round_trip_exactly(tree):
    """Any tree of plain data and tensors comes back bit for bit, and safetensors opens the file."""
    raw = file_of(tree)
    assert same(read(raw), tree)
    safetensors.torch.load(raw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_dtype_reads_the_same_in_safetensors(dtype):
    """The library reads our file as we do, and we read its file as it does."""
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    theirs = safetensors.torch.load(file_of({"a.b": tensor}))
    assert list(theirs) == ["a.b"]
    assert same(theirs["a.b"], tensor)
    assert same(read(safetensors.torch.save({"a.b": tensor})), {"a.b": tensor})


NEWER = {torch.float8_e8m0fnu: "F8_E8M0", torch.float4_e2m1fn_x2: "F4"}


@pytest.mark.parametrize("dtype", NEWER, ids=str)
@pytest.mark.parametrize("shape", [(2, 8), (0, 8), (2, 0), (16,)], ids=str)
def test_newer_dtypes_are_what_safetensors_writes(dtype, shape):
    """Its file is ours; two numbers of F4 are a byte, and the library counts the numbers."""
    count = math.prod(shape)
    tensor = torch.arange(count, dtype=torch.uint8).view(dtype).reshape(shape)
    written = safetensors.torch.save({"a": tensor})
    found, ours = safetensors.deserialize(written), safetensors.deserialize(file_of({"a": tensor}))
    assert found == ours
    assert found[0][1]["dtype"] == NEWER[dtype]
    assert same(read(written), {"a": tensor})
    if len(shape) == 2:
        turned = tensor.view(torch.uint8).t().view(dtype)
        expected = turned.view(torch.uint8).contiguous().view(dtype)
        assert same(read(file_of([turned])), [expected])


def test_numbers_that_torch_does_not_have_are_refused_by_name():
    """Of six bits, half a byte, a scalar of two numbers: none is read as something else."""
    for kind in ("F6_E2M3", "F6_E3M2"):
        with pytest.raises(StateError, match=f"{kind}.*torch has no such"):
            read(edited(dtype=kind, shape=[4], data_offsets=[0, 3]))
    for shape in ([15], []):
        with pytest.raises(StateError, match="pairs"):
            read(edited(dtype="F4", shape=shape))
    scalar = torch.zeros(1, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(())
    with pytest.raises(StateError, match=r"state\.a.*reshape"):
        encode_state({"a": scalar})


def test_flat_state_dict_keeps_its_names_and_order():
    """The names of a module's state dict are the names in the file."""
    state = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).state_dict()
    raw = file_of(state)
    assert safetensors.torch.load(raw).keys() == state.keys()
    assert same(read(raw), dict(state))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    ],
)
def test_optimizer_states_round_trip(make):
    """Integer keys, betas, None and step counters come back, and the optimizer takes them."""
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    state["model"] = dict(state["model"])
    loaded = read(file_of(state))
    assert same(loaded, state)
    make(model.parameters()).load_state_dict(loaded["optimizer"])


def test_tied_tensors_are_stored_once_and_stay_tied():
    """Two names of one tensor cost one, and come back as one."""
    weight = torch.randn(64)
    raw = file_of({"a": weight, "b": weight.view(64), "c": weight[:32]})
    assert len(raw) < 64 * 4 + 32 * 4 + 512
    loaded = read(raw)
    assert loaded["a"] is loaded["b"]
    assert same(loaded["c"], weight[:32])
    loaded["c"].zero_()
    assert same(loaded["a"], weight)


def test_a_square_matrix_and_its_transpose_are_not_taken_for_one():
    """The same memory and shape with other strides holds other values."""
    square = torch.arange(9).reshape(3, 3)
    loaded = read(file_of([square, square.t()]))
    assert same(loaded, [square, square.t()])


def test_equal_tensors_that_are_not_tied_stay_apart():
    """Equal values are no tie, and changing a loaded tensor changes no other."""
    loaded = read(file_of([torch.ones(2), torch.ones(2), torch.zeros(0), torch.zeros(0)]))
    loaded[0].zero_()
    assert loaded[1].tolist() == [1.0, 1.0]
    assert loaded[2] is not loaded[3]


def test_loaded_tensors_have_storages_of_their_own():
    """Copying or saving one loaded tensor does not drag the whole file along."""
    loaded = read(file_of({"big": torch.zeros(1000), "small": torch.zeros(2)}))
    assert loaded["small"].untyped_storage().nbytes() == 8


def test_names_that_collide_are_made_unique():
    """A dotted key, a nested path, an int key and a reserved name can stand side by side."""
    one, two = torch.tensor(1), torch.tensor(2)
    tree = {"a.b": one, "a": {"b": two}, 1: one + 2, "1": one + 3, "__metadata__": one + 4}
    assert same(read(file_of(tree)), tree)


def test_conjugates_and_ordered_dicts_are_resolved():
    """Lazy conjugates hold their values; an OrderedDict is a dict afterwards."""
    values = torch.tensor([1 + 2j], dtype=torch.complex64)
    loaded = read(file_of(OrderedDict(a=values, b=values.conj())))
    assert type(loaded) is dict
    assert loaded["b"].tolist() == [1 - 2j]


Point = namedtuple("Point", "x")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        pytest.param(object(), "state.a.0", id="object()"),
        ({1, 2}, "state.a.0"),
        (Point(1), "state.a.0"),
        (b"bytes", "state.a.0"),
        (1j, "state.a.0"),
        ({1.5: 2}, "state.a.0"),
        ({True: 2}, "state.a.0"),
        ({"k": {None: 1}}, "state.a.0.k"),
        ("\ud800", "state.a.0"),
        (1 << 2000, "state.a.0"),
        (torch.zeros(2).to_sparse(), "state.a.0"),
        (torch.zeros(2, device="meta"), "state.a.0"),
        (torch.zeros(2, dtype=torch.complex128), "state.a.0"),
        (torch.zeros(2).numpy(), "state.a.0"),
    ],
    ids=repr,
)
def test_other_objects_are_refused_with_their_path(value, path):
    """What could not come back exactly is refused before anything is written."""
    with pytest.raises(StateError, match=path.replace(".", r"\.")):
        encode_state({"a": [value]})


def test_cycles_are_refused():
    """A tree that contains itself ends in an error, not in a crash."""
    tree = []
    tree.append(tree)
    with pytest.raises(StateError, match="contains itself"):
        encode_state(tree)


def edited(**changes) -> bytes:
    """A file of one tensor `a` whose header entry was changed."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    header = json.dumps({"a": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8)


def test_the_edited_file_is_valid_when_nothing_is_changed():
    """The control of the next test; data that another tool left unaligned is aligned when read."""
    assert len(edited()) % 4
    loaded = read(edited())
    assert same(loaded, {"a": torch.zeros(2)})
    assert loaded["a"].data_ptr() % 4 == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        bytes(7),
        (2**63).to_bytes(8, "little") + b"{}",
        (50).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}" + b"x",
        edited(shape=[3]),
        edited(shape=[-2]),
        edited(shape=[2**70]),
        edited(shape=[0, 2**49], data_offsets=[0, 0])[:-8],
        edited(shape="2"),
        edited(dtype="F128"),
        edited(data_offsets=[4, 12]),
        edited(data_offsets=[0, 2**70]),
        edited(data_offsets=[0]),
        edited(extra=1),
        edited() + b"\0",
    ],
)
def test_malformed_plaintexts_are_refused(raw):
    """A maker who can encrypt still cannot make the reader over-read, allocate or crash."""
    with pytest.raises(StateError):
        read(raw)


@pytest.mark.parametrize(
    "structure",
    [
        "{",
        '{"tensor":"b"}',
        '{"tensor":1}',
        '{"dict":[[1.5,null]]}',
        '{"dict":[[null,null]]}',
        '{"set":[]}',
        '{"float":"1"}',
        "[]",
        "[" * 100_000,
    ],
)
def test_malformed_structures_are_refused(structure):
    """Structure that does not fit is an error, and no class is ever looked up by name."""
    metadata = {"secure_cnn.state": structure}
    raw = safetensors.torch.save({"a": torch.zeros(2)}, metadata=metadata)
    with pytest.raises(StateError):
        read(raw)
