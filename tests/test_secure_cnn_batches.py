"""`secure_cnn.data.batches`: every example once per epoch, and resumable anywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_cnn.data import Augmentation, ShuffledBatches, Split
from secure_cnn.errors import DataError


def numbered(count, side=8):
    """Images of which each is told by its first pixel and by its label."""
    images = torch.zeros(count, 1, side, side, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count)
    return Split(images=images, labels=torch.arange(count))


def generator(seed=0):
    """A generator of the test's own."""
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    count=st.integers(1, 30),
    batch_size=st.integers(1, 40),
    epochs=st.integers(0, 4),
    seed=st.integers(0, 2**63),
)
def test_each_epoch_holds_every_example_once(count, batch_size, epochs, seed):
    """Whatever the sizes, the batches of an epoch are a permutation, cut as said."""
    split = numbered(count)
    batches = ShuffledBatches(split, batch_size=batch_size, epochs=epochs, seed=seed)
    found = list(batches)
    assert len(batches) == len(found) == epochs * batches.steps_per_epoch
    for epoch in range(epochs):
        labels = [
            each for _, each in found[epoch * batches.steps_per_epoch :][: batches.steps_per_epoch]
        ]
        assert sorted(torch.cat(labels).tolist()) == list(range(count))
        assert all(len(each) == batch_size for each in labels[:-1])
    for images, labels in found:
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(start=st.integers(0, 12), augmented=st.booleans(), alternate=st.booleans())
def test_starting_later_gives_the_rest_bit_for_bit(start, augmented, alternate):
    """From any step on, a resumed iteration equals the uninterrupted one."""
    augment = Augmentation(flip=True, shift=2) if augmented else None
    arguments = {"batch_size": 3, "epochs": 3, "seed": 5, "augment": augment}
    arguments["alternate_flips"] = alternate
    images = torch.randint(256, (10, 3, 8, 9), dtype=torch.uint8, generator=generator())
    split = Split(images=images, labels=torch.arange(10))
    whole = list(ShuffledBatches(split, **arguments))
    rest = ShuffledBatches(split, start_step=start, **arguments)
    assert len(rest) == len(whole) - start
    for (images, labels), (want_images, want_labels) in zip(rest, whole[start:], strict=True):
        assert torch.equal(images, want_images)
        assert torch.equal(labels, want_labels)


def test_orders_differ_between_epochs_and_seeds():
    """No two epochs and no two seeds share an order."""
    orders = set()
    for seed in range(20):
        batches = ShuffledBatches(numbered(50), batch_size=50, epochs=3, seed=seed)
        orders |= {tuple(labels.tolist()) for _, labels in batches}
    assert len(orders) == 60


def test_iterating_twice_gives_the_same():
    """An iteration keeps no state in the object."""
    batches = ShuffledBatches(numbered(10), batch_size=3, epochs=2, seed=0)
    first = [labels.tolist() for _, labels in batches]
    next(iter(batches))
    assert [labels.tolist() for _, labels in batches] == first


def test_global_random_state_is_neither_read_nor_moved():
    """Another global state gives the same batches, and stays what it was."""
    found = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            before = torch.get_rng_state()
            batches = ShuffledBatches(
                numbered(9), batch_size=9, epochs=1, seed=0, augment=Augmentation(shift=1)
            )
            found += [images for images, _ in batches]
            assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 0}, {"epochs": -1}, {"seed": -1}, {"start_step": -1}, {"start_step": 9}],
)
def test_settings_outside_their_range_are_refused(arguments):
    """The error names the argument."""
    good = {"batch_size": 3, "epochs": 2, "seed": 0}
    with pytest.raises(DataError, match=next(iter(arguments))):
        ShuffledBatches(numbered(10), **{**good, **arguments})


class TestAugmentation:
    def test_every_result_is_a_flip_and_a_shift_of_its_own_image(self):
        """Against an oracle that tries all of them, one image after the other."""
        images = torch.rand(120, 3, 8, 9, generator=generator())
        out = Augmentation(flip=True, shift=2)(images, generator(1))
        seen = set()
        for image, result in zip(images, out, strict=True):
            matches = [
                (flip, down, right)
                for flip in (False, True)
                for down in range(-2, 3)
                for right in range(-2, 3)
                if torch.equal(self.moved(image.flip(-1) if flip else image, down, right), result)
            ]
            assert len(matches) == 1
            seen.add(matches[0])
        assert len(seen) > 40  # of 50, each equally likely: 120 draws miss about 4

    @staticmethod
    def moved(image, down, right):
        """The image rolled around, and what came in on the other side blackened."""
        out = image.roll((down, right), (1, 2))
        _, height, width = image.shape
        rows, columns = torch.arange(height) - down, torch.arange(width) - right
        inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
        return out * inside

    def test_an_image_does_not_depend_on_the_others(self):
        """Replacing all other images changes nothing: the change is per example."""
        images = torch.rand(6, 1, 8, 8, generator=generator())
        others = torch.rand(6, 1, 8, 8, generator=generator(1))
        others[2] = images[2]
        augment = Augmentation(flip=True, shift=3)
        assert torch.equal(augment(images, generator(2))[2], augment(others, generator(2))[2])

    def test_half_of_the_images_are_flipped(self):
        """Within five standard deviations; a coin of 0.6 would be outside."""
        images = torch.arange(64.0).view(1, 1, 8, 8).expand(4000, -1, -1, -1)
        out = Augmentation(flip=True)(images, generator())
        flipped = int((out[:, 0, 0, 0] == 7).sum())
        assert abs(flipped - 2000) < 5 * 31.6
        assert abs(2400 - 2000) > 5 * 31.6

    def test_the_input_is_left_alone(self):
        """The result is new memory, also where nothing is to be done."""
        images = torch.rand(4, 1, 8, 8)
        before = images.clone()
        for augment in (Augmentation(), Augmentation(flip=True), Augmentation(shift=1)):
            augment(images, generator()).zero_()
            assert torch.equal(images, before)

    def test_bad_shifts_are_refused(self):
        """Negative, or as large as the image."""
        with pytest.raises(DataError, match="shift"):
            Augmentation(shift=-1)
        with pytest.raises(DataError, match="8x8"):
            Augmentation(shift=8)(torch.zeros(1, 1, 8, 8), generator())


@pytest.mark.parametrize("batch_size", [4, 7, 30])
def test_alternate_flips_show_each_image_both_ways_in_two_epochs(batch_size):
    """Every image once as it is and once mirrored, which one first being a matter of the seed."""
    split = numbered(20)
    settings = {"batch_size": batch_size, "epochs": 4, "alternate_flips": True}

    def mirrored(seed):
        batches = ShuffledBatches(split, seed=seed, **settings)
        shown = [set() for _ in range(4)]
        for step, (images, labels) in enumerate(batches):
            for image, label in zip(images, labels.tolist(), strict=True):
                there = split[label][0]
                epoch = shown[step // batches.steps_per_epoch]
                if torch.equal(image, there.flip(-1)) and label:  # number 0 is black on both sides
                    epoch.add(label)
                else:
                    assert torch.equal(image, there)
        return shown

    first, second, third, fourth = mirrored(seed=1)
    assert first | second == set(range(1, 20))
    assert not first & second
    assert (third, fourth) == (first, second)
    assert 0 < len(first) < 19
    assert mirrored(seed=2)[0] != first
