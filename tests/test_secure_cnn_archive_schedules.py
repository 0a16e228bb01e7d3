"""The states of all of torch's optimizers and schedules are sealed, and come back equal."""

import inspect
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from secure_cnn import archive
from secure_cnn.archive.format.state import decode_state, encode_state

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer(post_quantum=False)
STEPS = 5


def classes(module, base):
    """Every public class of a module that is one of a kind, but the kind itself."""
    found = {each for _, each in inspect.getmembers(module, inspect.isclass)}
    own = {each for each in found if issubclass(each, base) and each is not base}
    return sorted(
        (each for each in own if not each.__name__.startswith("_")), key=lambda each: each.__name__
    )


OPTIMIZERS = classes(torch.optim, Optimizer)
SCHEDULES = [*classes(lr_scheduler, lr_scheduler.LRScheduler), SWALR]
NEEDED = {
    "CosineAnnealingLR": {"T_max": 4},
    "CosineAnnealingWarmRestarts": {"T_0": 2, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "ExponentialLR": {"gamma": 0.9},
    "LambdaLR": {"lr_lambda": lambda epoch: 0.5**epoch},
    "MultiStepLR": {"milestones": [2, 3, 3, 7]},
    "MultiplicativeLR": {"lr_lambda": lambda _: 0.5},
    "OneCycleLR": {"max_lr": np.float64(0.1), "total_steps": 20},
    "ReduceLROnPlateau": {"patience": 1},
    "SWALR": {"swa_lr": 0.05},
    "StepLR": {"step_size": 2},
}
"""What a schedule cannot be made without; a new one of torch that needs something fails here."""


def weights():
    """One matrix, which is all that Muon takes."""
    return [nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))]


def trained(optimizer, parameters, steps=STEPS):
    """Steps on a bowl, with a sparse gradient where nothing else is taken."""
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in parameters)
            loss.backward()
            for p in parameters:
                if isinstance(optimizer, torch.optim.SparseAdam):
                    p.grad = p.grad.to_sparse()
            return loss

        optimizer.step(closure)


def schedule_for(kind, optimizer):
    """A schedule of this class, composed where the class composes."""
    if kind is lr_scheduler.SequentialLR:
        parts = [
            lr_scheduler.ConstantLR(optimizer),
            lr_scheduler.MultiStepLR(optimizer, [1, 2]),
        ]
        return kind(optimizer, parts, milestones=[2])
    if kind is lr_scheduler.ChainedScheduler:
        return kind(
            [lr_scheduler.LinearLR(optimizer), lr_scheduler.MultiStepLR(optimizer, [2])], optimizer
        )
    return kind(optimizer, **NEEDED.get(kind.__name__, {}))


def moved(schedule, steps=STEPS):
    """Steps of a schedule; one that watches a figure is shown a numpy scalar that is stuck."""
    watches = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
    for _ in range(steps):
        schedule.optimizer.step()
        schedule.step(*([np.float32(1.5)] if watches else []))


def equal(left, right) -> bool:
    """Whether two trees are equal, tensors by their values; a numpy scalar equals its number."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return (
            type(left) is type(right)
            and left.keys() == right.keys()
            and all(equal(left[key], right[key]) for key in left)
        )
    if isinstance(left, list | tuple):
        return (
            type(left) is type(right) and len(left) == len(right) and all(map(equal, left, right))
        )
    return bool(left == right)


def kept(tmp_path, state):
    """A state by both ways to the disk and back: one sealed file, and a store of them."""
    archive.save(tmp_path / "one", state, recipients=[ME.recipient])
    alone = archive.load(tmp_path / "one", identity=ME)
    with archive.CheckpointStore(
        tmp_path / "many", recipients=[ME.recipient], identity=ME, signer=SIGNER
    ) as store:
        store.save(state, step=1)
        store.wait()
        return alone, store.load()


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_every_optimizer_goes_on_from_a_sealed_state(tmp_path, kind):
    """The state is equal, and the next steps of who takes it up are those of who did not stop."""
    parameters = weights()
    optimizer = kind(parameters, lr=0.05)
    trained(optimizer, parameters)
    state = optimizer.state_dict()
    for found in kept(tmp_path, state):
        assert equal(state, found)
        copies = [nn.Parameter(p.detach().clone()) for p in parameters]
        resumed = kind(copies, lr=0.7)
        resumed.load_state_dict(found)
        trained(resumed, copies)
    trained(optimizer, parameters)
    assert all(map(torch.equal, parameters, copies))


@pytest.mark.parametrize("kind", SCHEDULES, ids=lambda kind: kind.__name__)
def test_every_schedule_goes_on_from_a_sealed_state(tmp_path, kind):
    """The state is equal, and the rates that follow are the same."""
    optimizer = torch.optim.SGD(weights(), lr=0.1, momentum=0.9)
    schedule = schedule_for(kind, optimizer)
    moved(schedule)
    state = {"schedule": schedule.state_dict(), "optimizer": optimizer.state_dict()}
    for found in kept(tmp_path, state):
        assert equal(state, found)
        other = torch.optim.SGD(weights(), lr=0.1, momentum=0.9)
        resumed = schedule_for(kind, other)
        other.load_state_dict(found["optimizer"])
        resumed.load_state_dict(found["schedule"])
    rates = []
    for each in (schedule, resumed):
        rates.append([])
        for _ in range(STEPS):
            moved(each, steps=1)
            rates[-1].append(each.optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]


def read_back(state):
    """A state through its bytes."""
    raw = bytearray(b"".join(encode_state(state)))
    return decode_state(torch.frombuffer(raw, dtype=torch.uint8))


def test_a_counter_comes_back_as_one():
    """It answers what a dict does not, at any depth, with the keys of numpy or of Python."""
    found = read_back({"m": [Counter({np.int64(2): 1, "a": 3})]})["m"][0]
    assert type(found) is Counter
    assert sorted(map(str, found.elements())) == ["2", "a", "a", "a"]


@pytest.mark.parametrize(
    "value",
    [
        *(np.float64(0.1), np.float32(0.1), np.float16(0.1), np.int8(-3), np.uint64(2**64 - 1)),
        *(np.bool_(True), np.str_("é"), np.float64("nan"), np.float32("-inf")),
    ],
    ids=repr,
)
def test_scalars_of_numpy_come_back_as_equal_ones_of_python(value):
    """Exactly, and of the type that Python has for them."""
    found = read_back([value])[0]
    assert type(found) in (bool, int, float, str)
    assert found == value or (math.isnan(found) and math.isnan(value))


@pytest.mark.parametrize(
    "value", [np.longdouble(1), np.complex64(1j), np.datetime64("2020-01-01"), np.bytes_(b"x")]
)
def test_scalars_that_python_has_no_number_for_are_refused(value):
    """With their path, before anything is written."""
    with pytest.raises(archive.StateError, match=r"state\.a"):
        encode_state({"a": value})
