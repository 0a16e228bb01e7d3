"""A ridge head that people leave: the same as if they had never been in it."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privacy.errors import UnlearningError
from privacy.unlearning import RidgeHead

ROWS, WIDTH, CLASSES = 1_300, 40, 5


def drawn(rows: int = ROWS, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Features of which one column is nearly another, some beyond the bound, and labels."""
    random = np.random.default_rng(3)
    features = random.normal(size=(rows, width))
    features[:, 1] = features[:, 0] + 1e-3 * features[:, 1]
    return features, random.permutation(np.arange(rows) % CLASSES)


def head_of(features: Any, labels: Any, **changed: Any) -> RidgeHead:
    """Trained on these."""
    settings: dict[str, Any] = {"classes": CLASSES, "bound": 3.0, "penalty": 1e-2}
    return RidgeHead(features, labels, **{**settings, **changed})


def textbook(features: np.ndarray, labels: np.ndarray, penalty: float) -> np.ndarray:
    """Least squares of the rows and of the penalty's, by orthogonal factors; free intercepts."""
    width = features.shape[1]
    rows = np.hstack([features, np.ones((len(features), 1))])
    system = np.vstack([rows, np.hstack([np.sqrt(penalty) * np.eye(width), np.zeros((width, 1))])])
    targets = np.vstack([np.eye(CLASSES)[labels], np.zeros((width, CLASSES))])
    return np.linalg.lstsq(system, targets, rcond=None)[0]


def test_a_thousand_removals_are_a_training_without_them_bit_for_bit() -> None:
    """One by one, in any order, half of them together: and equal to another solver's to 1e-9."""
    features, labels = drawn()
    leave = np.random.default_rng(4).permutation(ROWS)[:1_000]
    stay = np.setdiff1d(np.arange(ROWS), leave)
    head = head_of(features, labels)
    for row in leave[:500]:
        head.remove(features[row : row + 1], labels[row : row + 1])
    head.remove(features[leave[500:]], labels[leave[500:]])
    again = head_of(features[stay], labels[stay])
    np.testing.assert_array_equal(head.weights, again.weights)
    assert len(head) == len(again) == ROWS - 1_000
    unit = 3.0 / 2**17
    rounded = np.rint(np.clip(features[stay], -3, 3) / unit) * unit
    expected = textbook(rounded, labels[stay], 1e-2)
    np.testing.assert_allclose(head.weights, expected, rtol=0, atol=1e-9)


def test_sums_of_floats_would_not_do() -> None:
    """Control: the usual sums keep a trace of who left."""
    features, _ = drawn()
    gram = features.T @ features
    for row in features[:1_000]:
        gram -= np.outer(row, row)
    assert (gram != features[1_000:].T @ features[1_000:]).any()


@given(st.data())
def test_the_order_of_leaving_does_not_matter(data: st.DataObject) -> None:
    """Nor does in how many requests they leave; rows that are there twice leave once."""
    count = data.draw(st.integers(CLASSES + 1, 12))
    cells = st.lists(st.sampled_from([-4.0, -0.1, 0.0, 0.3, 1e9]), min_size=3, max_size=3)
    features = np.array(data.draw(st.lists(cells, min_size=count, max_size=count)))
    labels = np.arange(count) % CLASSES
    leave = np.array(data.draw(st.permutations(range(CLASSES, count))))
    cut = data.draw(st.integers(0, len(leave)))
    head = head_of(features, labels)
    for part in (leave[:cut], leave[cut:]):
        if len(part):
            head.remove(features[part], labels[part])
    again = head_of(features[:CLASSES], labels[:CLASSES])
    np.testing.assert_array_equal(head.weights, again.weights)


def test_it_tells_classes_apart_and_takes_tensors() -> None:
    """As a tensor of float32 or as an array, on new rows too."""
    random = np.random.default_rng(5)
    labels = np.arange(200) % CLASSES
    features = 2 * np.eye(CLASSES)[labels] + 0.3 * random.normal(size=(200, CLASSES))
    head = head_of(torch.tensor(features[:100], dtype=torch.float32), torch.tensor(labels[:100]))
    assert (head.scores(features[100:]).argmax(1) == labels[100:]).mean() > 0.95
    head.remove(torch.tensor(features[:3], dtype=torch.float32), torch.tensor(labels[:3]))
    assert repr(head) == "RidgeHead(rows=97, width=5, classes=5)"


def test_who_looks_at_the_weights_cannot_change_them() -> None:
    """They are a copy."""
    head = head_of(*drawn())
    head.weights[:] = 0
    assert head.weights.any()


def test_whoever_is_not_in_it_cannot_leave() -> None:
    """A stranger, somebody with another label, whoever left before, or twice where once is there.

    After each refusal the head is what it was.
    """
    features, labels = drawn()
    head = head_of(features[:100], labels[:100])
    head.remove(features[7:8], labels[7:8])
    before = head.weights
    other = (labels + 1) % CLASSES
    for rows, of in (
        (features[200:201], labels[200:201]),
        (features[3:4], other[3:4]),
        (features[7:8], labels[7:8]),
        (features[[5, 5]], labels[[5, 5]]),
        (features[[5, 200]], labels[[5, 200]]),
        (features[3:4] + 1e-3, labels[3:4]),
    ):
        with pytest.raises(UnlearningError, match="expected one of the training"):
            head.remove(rows, of)
    np.testing.assert_array_equal(head.weights, before)
    head.remove(features[5:6], labels[5:6])
    assert len(head) == 98


def test_who_is_there_twice_leaves_twice() -> None:
    """And not three times."""
    features, labels = drawn(60)
    rows, of = np.vstack([features, features[:1]]), np.append(labels, labels[0])
    head = head_of(rows, of)
    head.remove(features[[0, 0]], labels[[0, 0]])
    np.testing.assert_array_equal(head.weights, head_of(features[1:], labels[1:]).weights)
    with pytest.raises(UnlearningError, match="row 0: expected one of the training"):
        head.remove(features[:1], labels[:1])


def test_all_of_a_class_cannot_leave() -> None:
    """Together or one after the other."""
    features, labels = drawn(40)
    of_one = np.flatnonzero(labels == 2)
    head = head_of(features, labels)
    with pytest.raises(UnlearningError, match="all that there are of class 2"):
        head.remove(features[of_one], labels[of_one])
    head.remove(features[of_one[1:]], labels[of_one[1:]])
    with pytest.raises(UnlearningError, match="all that there are of class 2"):
        head.remove(features[of_one[:1]], labels[of_one[:1]])
    assert len(head) == 40 - len(of_one) + 1


def test_nothing_that_tells_of_a_row_is_kept_of_who_left() -> None:
    """Digests are keyed, anew in each head, and gone when their row is."""
    features, labels = drawn(60)
    one, other = head_of(features, labels), head_of(features, labels)
    kept = [head._sums.present._digests for head in (one, other)]
    assert not set(kept[0]) & set(kept[1])
    one.remove(features[:1], labels[:1])
    left = one._sums.present._digests
    assert set(left) < set(kept[0])
    assert len(left) == 59
    assert "_digests" not in repr(one._sums.present)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"features": "features"}, "features: expected numbers"),
        ({"features": np.zeros(4)}, "features: expected numbers"),
        ({"features": np.zeros((0, 4))}, "features: expected numbers"),
        ({"features": np.full((10, 4), np.nan)}, "features: expected finite"),
        ({"features": np.zeros((2**19 + 1, 1), dtype=np.int8)}, "at most 524288 rows"),
        ({"labels": np.arange(9) % 5}, r"labels: expected whole numbers \[10\]"),
        ({"labels": np.arange(10) / 5}, "labels: expected whole numbers"),
        ({"labels": np.arange(10)}, "labels: expected classes from 0 to 4, got 0 to 9"),
        ({"labels": np.arange(10) - 1}, "labels: expected classes"),
        ({"labels": np.arange(10) % 4}, "got nobody of class 4"),
        ({"classes": 1}, "classes: expected"),
        ({"classes": 2.0}, "classes: expected"),
        ({"bound": 0.0}, "bound: expected"),
        ({"bound": 1e200}, "bound: expected"),
        ({"penalty": -1.0}, "penalty: expected"),
        ({"penalty": 1e-30}, "penalty: expected one that"),
        ({"penalty": None}, "penalty: expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_makes_no_head_is_refused(changed: dict[str, Any], says: str) -> None:
    """By the name of the argument."""
    given_all = {"features": np.ones((10, 4)), "labels": np.arange(10) % 5, **changed}
    with pytest.raises(UnlearningError, match=says):
        head_of(given_all.pop("features"), given_all.pop("labels"), **given_all)


def test_rows_of_another_width_are_refused() -> None:
    """By scores and by removal."""
    features, labels = drawn(60)
    head = head_of(features, labels)
    with pytest.raises(UnlearningError, match="expected 40 in each row"):
        head.scores(features[:, :3])
    with pytest.raises(UnlearningError, match="expected 40 in each row"):
        head.remove(features[:1, :3], labels[:1])


def test_rows_leave_what_was_written_and_read() -> None:
    """As if it had never been put away: whoever left before is not in it, others are."""
    features, labels = drawn(60)
    head = head_of(features, labels)
    head.remove(features[:1], labels[:1])
    again = RidgeHead.from_state(head.state())
    np.testing.assert_array_equal(again.weights, head.weights)
    with pytest.raises(UnlearningError, match="expected one of the training"):
        again.remove(features[:1], labels[:1])
    again.remove(features[1:3], labels[1:3])
    np.testing.assert_array_equal(again.weights, head_of(features[3:], labels[3:]).weights)
    # What was read is its own: the state and the head that it is of stay what they were.
    assert len(head) == 59
    assert len(RidgeHead.from_state(head.state())) == 59


def test_a_state_tells_nothing_of_the_order_of_the_rows() -> None:
    """Digests stand in an order of their own, which the key decides."""
    features, labels = drawn(60)
    state = head_of(features, labels).state()
    digests = [bytes(each) for each in state["digests"].numpy()]
    assert digests == sorted(digests)


def test_blocks_of_rows_are_the_rows() -> None:
    """However they are cut; none, or one of another width, is refused."""
    features, labels = drawn(60)
    cut = [slice(7), slice(7, 8), slice(8, 60)]
    settings: dict[str, Any] = {"classes": CLASSES, "bound": 3.0, "penalty": 1e-2}
    head = RidgeHead.of_blocks(((features[each], labels[each]) for each in cut), **settings)
    np.testing.assert_array_equal(head.weights, head_of(features, labels).weights)
    with pytest.raises(UnlearningError, match="nobody of class 0"):
        RidgeHead.of_blocks([], **settings)
    with pytest.raises(UnlearningError, match="expected 40 in each row"):
        RidgeHead.of_blocks([(features, labels), (features[:, :3], labels)], **settings)


def changed_in(name: str, change: Any) -> Any:
    def of(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, name: change(state[name])}

    return of


def with_at(index: Any, value: Any) -> Any:
    def of(tensor: torch.Tensor) -> torch.Tensor:
        found = tensor.clone()
        found[index] = found[index] + value
        return found

    return of


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {},
        *(lambda state, name=name: {**state, name: None} for name in
          ("width", "classes", "bound", "penalty", "gram", "moments", "digests", "times", "key")),
        changed_in("width", lambda n: n + 1),
        changed_in("width", lambda n: 1 << 62),
        changed_in("classes", lambda n: n + 1),
        changed_in("bound", lambda n: -n),
        changed_in("penalty", lambda n: float("nan")),
        changed_in("gram", lambda t: t.float()),
        changed_in("gram", lambda t: t[:-1]),
        changed_in("gram", with_at(1, 0.5)),
        changed_in("gram", with_at(1, float("nan"))),
        changed_in("gram", with_at(1, float("inf"))),
        changed_in("gram", with_at(1, 2.0**52)),
        changed_in("gram", with_at(0, -(2.0**50))),
        changed_in("gram", with_at(-1, 2.0**34)),
        changed_in("moments", with_at((0, 0), 1.0)),
        changed_in("moments", with_at((-1, 0), 2.0**17)),
        changed_in("moments", lambda t: t * 0),
        changed_in("digests", lambda t: t[:-1]),
        changed_in("digests", lambda t: t[:1].repeat(len(t), 1)),
        changed_in("digests", lambda t: t.to(torch.int8)),
        changed_in("times", with_at(0, 1)),
        changed_in("times", lambda t: t * 0),
        changed_in("times", lambda t: torch.cat([t[:-2], torch.tensor([0, 2])])),
        changed_in("key", lambda t: t[:, 1:]),
        changed_in("key", lambda t: t.repeat(2, 1)),
    ],
)  # fmt: skip
def test_a_state_that_cannot_be_is_refused(change: Any) -> None:
    """Another type, shape or range, or numbers that contradict each other."""
    with pytest.raises(UnlearningError):
        RidgeHead.from_state(change(head_of(*drawn(60)).state()))
