"""Distances to a boundary that is known, by the class alone."""

import numpy as np
import pytest
import torch
from torch import nn

from defenses import ThreatModelError
from privacy.leakage import Question
from privacy.statistics import roc_area
from secure_cnn.data import load_data
from secure_cnn.errors import RunError
from secure_cnn.leakage.boundary import BoundaryDistance
from secure_cnn.leakage.student import StudentTraining

DISTANCE = BoundaryDistance()


class Corner:
    """Class 1 where the pixel in the corner is above a half; says it by logits of any size."""

    def __init__(self, size=1.0):
        self.size, self.asked = size, 0

    def __call__(self, images):
        self.asked += len(images)
        away = (images[:, 0, 0, 0] - 0.5) * self.size
        return torch.stack([-away, away], 1)


def images_at(*corners):
    """Grey but for the corner."""
    found = torch.full((len(corners), 1, 8, 8), 0.5)
    found[:, 0, 0, 0] = torch.tensor(corners)
    return found


def test_a_known_distance_is_found_and_what_is_wrong_has_none():
    """Every search moves each pixel, so that the corner alone decides; to the last halving."""
    images = images_at(0.55, 0.6, 0.7, 0.9, 0.2, 0.4)
    labels = torch.tensor([1, 1, 1, 1, 0, 1])
    found = DISTANCE(Corner(), images, labels)
    assert found.dtype == np.float64
    assert found == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.3, 0.0], abs=0.5 / 2**5)
    assert found[-1] == 0.0
    fine = BoundaryDistance(halvings=14)(Corner(), images, labels)
    assert fine[:5] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.3], abs=1e-4)


def test_what_never_changes_its_class_is_farthest():
    """And no boundary beyond the largest ball is looked for."""
    always = BoundaryDistance(farthest=0.3)(
        lambda images: torch.tensor([[0.0, 1.0]]).expand(len(images), -1),
        images_at(0.9),
        torch.tensor([1]),
    )
    assert always.tolist() == [0.3]
    near = BoundaryDistance(farthest=0.3)(Corner(), images_at(0.9), torch.tensor([1]))
    assert near.tolist() == [0.3]


def test_no_model_is_asked_more_often_than_was_said():
    """Whether its class is easily changed or never."""
    for value, answer in ((0.51, Corner()), (0.9, Corner()), (1.0, Corner(0.0))):
        answer.asked = 0
        DISTANCE(answer, images_at(value), torch.tensor([1]))
        assert 0 < answer.asked <= DISTANCE.queries
    answer = Corner()
    images = images_at(0.95, 1.0)
    unreached = BoundaryDistance(farthest=0.2)
    unreached(answer, images, torch.tensor([1, 1]))
    assert answer.asked == 2 * (unreached.queries - unreached.halvings)


def test_an_image_is_judged_alone_and_by_its_class_alone():
    """In any batch, by logits of any size; the global random state is not moved."""
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = (images[:, 0, 0, 0] > 0.5).long()
    state = torch.random.get_rng_state()
    whole = DISTANCE(Corner(), images, labels)
    parts = [DISTANCE(Corner(100.0), images[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(DISTANCE(Corner(), images[:0], labels[:0])) == 0


def test_members_of_a_model_that_knows_them_by_heart_are_farther_from_its_boundaries():
    """Of digits whose labels are random; the gap in accuracy alone gives less."""
    data = load_data("digits")
    images, _ = data.train.batch(torch.arange(96))
    labels = torch.arange(96) % 2

    def build(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2))

    learn = StudentTraining(build=build, steps=400)
    model = learn(images[:48], nn.functional.one_hot(labels[:48], 2).float(), seed=0)
    right = (model(images).argmax(1) == labels).double().numpy()
    assert right[:48].mean() == 1.0
    signal = BoundaryDistance(rounds=4, starts=8, squares=1)
    found = Question(signal=signal, queries=signal.queries).signal(model, images, labels)
    assert roc_area(found[:48], found[48:]) > roc_area(right[:48], right[48:]) > 0.65


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: BoundaryDistance(farthest=0.0), RunError, "a distance in"),
        (lambda: BoundaryDistance(farthest=1.5), RunError, "a distance in"),
        (
            lambda: BoundaryDistance(rounds=0),
            RunError,
            "rounds: expected a whole number",
        ),
        (
            lambda: BoundaryDistance(halvings=-1),
            RunError,
            "halvings: expected a whole",
        ),
        (
            lambda: DISTANCE(Corner(), 3 * images_at(0.9), torch.tensor([1])),
            ThreatModelError,
            "images in",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
