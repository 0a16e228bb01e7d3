"""What is of another kind than was asked for is told by its name: one `RunError`."""

import math
from collections.abc import Callable

import pytest
import torch

from secure_cnn.data import Split
from secure_cnn.errors import RunError
from secure_cnn.leakage import (
    BoundaryDistance,
    ExtractionSettings,
    FixedPool,
    GrowingPool,
    InversionSettings,
    LeakageSettings,
    MembershipSettings,
    Sharing,
    StudentTraining,
    halves,
    noise_images,
)

IMAGES = torch.zeros(4, 1, 8, 8)

WHOLE: dict[str, Callable[[object], object]] = {
    "rounds": lambda value: BoundaryDistance(rounds=value),  # type: ignore[arg-type]
    "starts": lambda value: BoundaryDistance(starts=value),  # type: ignore[arg-type]
    "squares": lambda value: BoundaryDistance(squares=value),  # type: ignore[arg-type]
    "halvings": lambda value: BoundaryDistance(halvings=value),  # type: ignore[arg-type]
    "boundary, seed": lambda value: BoundaryDistance(seed=value),  # type: ignore[arg-type]
    "membership, shadows": lambda value: MembershipSettings(shadows=value),  # type: ignore[arg-type]
    "membership, seed": lambda value: MembershipSettings(seed=value),  # type: ignore[arg-type]
    "budgets": lambda value: ExtractionSettings(budgets=(value,)),  # type: ignore[arg-type]
    "attacked": lambda value: ExtractionSettings(attacked=value),  # type: ignore[arg-type]
    "extraction, seed": lambda value: ExtractionSettings(seed=value),  # type: ignore[arg-type]
    "batches": lambda value: InversionSettings(batches=(value,)),  # type: ignore[arg-type]
    "inversion, images": lambda value: InversionSettings(images=value),  # type: ignore[arg-type]
    "leakage, images": lambda value: LeakageSettings(images=value),  # type: ignore[arg-type]
    "inversion, repeats": lambda value: InversionSettings(repeats=value),  # type: ignore[arg-type]
    "candidates": lambda value: InversionSettings(candidates=value),  # type: ignore[arg-type]
    "inversion, seed": lambda value: InversionSettings(seed=value),  # type: ignore[arg-type]
    "steps": lambda value: StudentTraining(build=_network, steps=value),  # type: ignore[arg-type]
    "batch_size": lambda value: StudentTraining(build=_network, batch_size=value),  # type: ignore[arg-type]
    "count": lambda value: noise_images((1, 8, 8), value, seed=0),  # type: ignore[arg-type]
    "noise, seed": lambda value: noise_images((1, 8, 8), 4, seed=value),  # type: ignore[arg-type]
    "shape": lambda value: noise_images((1, 8, value), 4, seed=0),  # type: ignore[arg-type]
    "halves, seed": lambda value: halves(
        Split(images=IMAGES.to(torch.uint8), labels=torch.zeros(4, dtype=torch.int64)),
        seed=value,  # type: ignore[arg-type]
    ),
}


def _network(seed: int) -> torch.nn.Module:
    raise AssertionError(seed)


@pytest.mark.parametrize("value", [2.0, "2", None, True, -1, [2], math.nan])
@pytest.mark.parametrize("name", WHOLE)
def test_what_is_no_whole_number_is_told_by_its_name(name: str, value: object) -> None:
    word = name.rpartition(" ")[2]
    with pytest.raises(RunError, match=rf"^{word}: expected an? (whole|even) number"):
        WHOLE[name](value)


NUMBERS: dict[str, Callable[[object], object]] = {
    "farthest": lambda value: BoundaryDistance(farthest=value),  # type: ignore[arg-type]
    "noise_multiplier": lambda value: Sharing(max_grad_norm=1.0, noise_multiplier=value),  # type: ignore[arg-type]
    "learning_rate": lambda value: StudentTraining(build=_network, learning_rate=value),  # type: ignore[arg-type]
    "step": lambda value: GrowingPool(name="x", images=IMAGES, step=value),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("value", ["1", None, True, -1, [1.0], math.nan, math.inf])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_told_by_its_name(name: str, value: object) -> None:
    with pytest.raises(RunError, match=rf"^{name}: expected a"):
        NUMBERS[name](value)


KINDS: list[tuple[Callable[[], object], str]] = [
    (lambda: MembershipSettings(attacks="lira"), "attacks: expected a tuple, got 'lira'"),  # type: ignore[arg-type]
    (lambda: MembershipSettings(attacks=None), "attacks: expected a tuple, got None"),  # type: ignore[arg-type]
    (lambda: MembershipSettings(attacks=(3,)), "attacks: expected some of .* got 3"),  # type: ignore[arg-type]
    (lambda: MembershipSettings(pool="2"), "pool: expected a whole number"),  # type: ignore[arg-type]
    (lambda: LeakageSettings(membership=3), "membership: expected a MembershipSettings, got 3"),  # type: ignore[arg-type]
    (lambda: LeakageSettings(inversion="no"), "inversion: expected a bool, got 'no'"),  # type: ignore[arg-type]
    (lambda: Sharing(max_grad_norm="1"), "max_grad_norm: expected a finite number > 0, got '1'"),  # type: ignore[arg-type]
    (lambda: ExtractionSettings(budgets=5), "budgets: expected a tuple, got 5"),  # type: ignore[arg-type]
    (lambda: ExtractionSettings(budgets=()), "budgets: expected one or more, got none"),
    (lambda: ExtractionSettings(answers="labels"), "answers: expected a tuple, got 'labels'"),  # type: ignore[arg-type]
    (lambda: ExtractionSettings(attack=3), "attack: expected an attack of defenses"),  # type: ignore[arg-type]
    (lambda: InversionSettings(batches=None), "batches: expected a tuple, got None"),  # type: ignore[arg-type]
    (lambda: InversionSettings(protections=(3,)), "protections: expected a Sharing, got 3"),  # type: ignore[arg-type]
    (lambda: InversionSettings(protections=None), "protections: expected a tuple, got None"),  # type: ignore[arg-type]
    (lambda: InversionSettings(inversion=3), "inversion: expected an Inversion, got 3"),  # type: ignore[arg-type]
    (lambda: StudentTraining(build=3), "build: expected a function of a seed"),  # type: ignore[arg-type]
    (lambda: StudentTraining(build=_network, stop=3), "stop: expected a StopRequest, got 3"),  # type: ignore[arg-type]
    (lambda: noise_images(3, 4, seed=0), "shape: expected a tuple, got 3"),  # type: ignore[arg-type]
    (lambda: noise_images((1, 8), 4, seed=0), "shape: expected channels, height and width"),  # type: ignore[arg-type]
    (lambda: FixedPool(name="x", images=None), "images: expected a Tensor, got None"),  # type: ignore[arg-type]
    (lambda: FixedPool(name="x", images=IMAGES, labels=3), "labels: expected a Tensor, got 3"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "words"), KINDS, ids=[words for _, words in KINDS])
def test_what_is_of_another_kind_is_told_by_its_name(
    call: Callable[[], object], words: str
) -> None:
    with pytest.raises(RunError, match=words):
        call()
