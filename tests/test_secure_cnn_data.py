"""`secure_cnn.data`: every source becomes the same thing, and every bad source one clear error."""

import ast
import contextlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.damaged import damaged

import secure_cnn.data
from secure_cnn.data import DataSpec, ImageData, Split, load_data, source, store
from secure_cnn.data.source import stratified_split
from secure_cnn.errors import DataError


def save_npz(path, count=20, shape=(8, 8), classes=2, **arrays):
    """A good `.npz` file, in which `arrays` replace the good ones; None leaves one out."""
    random = np.random.default_rng(0)
    good = {
        "images": random.integers(0, 256, (count, *shape), dtype=np.uint8),
        "labels": np.arange(count) % classes,
    }
    every = {name: array for name, array in {**good, **arrays}.items() if array is not None}
    np.savez(path, **every)
    return every


class TestDigits:
    def test_scale_and_split(self):
        """Grey levels reach from 0 to 255, and a fifth of each class is held out."""
        data = load_data("digits")
        assert data.train.images.min() == 0
        assert data.train.images.max() == 255
        assert len(data.train) + len(data.test) == 1797
        train = torch.bincount(data.train.labels)
        test = torch.bincount(data.test.labels)
        assert ((test / (train + test) - 0.2).abs() < 0.01).all()

    def test_split_depends_on_the_seed_only(self):
        """The same seed gives the same data set, another seed another one."""
        assert load_data("digits", seed=1).fingerprint == load_data("digits", seed=1).fingerprint
        assert load_data("digits", seed=1).fingerprint != load_data("digits", seed=2).fingerprint

    def test_global_random_state_is_left_alone(self):
        """Loading moves neither torch's nor NumPy's global generator."""
        state = np.random.get_state  # the legacy state is what is watched
        before = torch.get_rng_state(), state()[1].copy()
        load_data("digits", seed=3)
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1] == state()[1]).all()


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    counts=st.lists(st.integers(2, 40), min_size=2, max_size=6),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**40),
)
def test_stratified_split_is_a_partition(counts, fraction, seed):
    """Every example is on exactly one side, and every class is on both."""
    labels = np.repeat(np.arange(len(counts)), counts)
    classes = tuple(map(str, range(len(counts))))
    train, test = stratified_split(labels, classes, "x", test_fraction=fraction, seed=seed)
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert set(labels[train]) == set(labels[test]) == set(range(len(counts)))


class TestSplit:
    def test_item_and_batch_agree(self):
        """One by one or as a batch, an example is the same float image in [0, 1]."""
        split = load_data("digits").train
        index = torch.tensor([3, 0, -1])
        images, labels = split.batch(index)
        assert images.dtype == torch.float32
        for row, position in enumerate(index.tolist()):
            image, label = split[position]
            assert torch.equal(image, images[row])
            assert label == labels[row]
        assert torch.equal((images * 255).round().byte(), split.images[index])

    def test_is_a_map_style_data_set(self):
        """A `DataLoader` takes it, and iterating ends."""
        split = load_data("digits").test
        loader = torch.utils.data.DataLoader(split, batch_size=100)
        assert sum(len(labels) for _, labels in loader) == len(split)

    def test_repr_shows_no_pixel(self):
        """Neither pixels nor labels reach a log by accident."""
        assert repr(load_data("digits").test) == "Split(359 images, 1x8x8)"

    @pytest.mark.parametrize(
        ("images", "labels"),
        [
            (torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)),
            (torch.zeros(2, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
            (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
            (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2)),
        ],
    )
    def test_wrong_tensors_are_refused(self, images, labels):
        """Another dtype, rank or length is an error."""
        with pytest.raises(DataError, match="expected"):
            Split(images=images, labels=labels)


class TestImageData:
    def data(self, **changes):
        """A data set of two images in each split."""
        images = torch.arange(2 * 64, dtype=torch.uint8).view(2, 1, 8, 8)
        parts = {"images": images, "labels": torch.tensor([0, 1]), "classes": ("a", "b")} | changes
        split = Split(images=parts["images"], labels=parts["labels"])
        test = Split(images=images, labels=torch.tensor([0, 1]))
        spec = DataSpec(shape=(1, 8, 8), classes=parts["classes"])
        return ImageData(name=parts.get("name", "x"), train=split, test=test, spec=spec)

    def test_fingerprint_sees_every_change_but_the_name(self):
        """A pixel, a label, the order and a class name count; the name of the set does not."""
        base = self.data()
        changed = base.train.images.clone()
        changed[1, 0, 7, 7] += 1
        others = [
            self.data(images=changed),
            self.data(labels=torch.tensor([1, 0])),
            self.data(images=base.train.images.flip(0), labels=torch.tensor([1, 0])),
            self.data(classes=("a", "c")),
        ]
        assert len({data.fingerprint for data in [base, *others]}) == 5
        assert self.data(name="y").fingerprint == base.fingerprint

    def test_all_images_have_one_fingerprint_however_they_are_divided(self):
        """And another where one pixel is another, or one image is there once more."""
        first, second = (load_data("digits", seed=seed) for seed in (1, 2))
        assert first.fingerprint != second.fingerprint
        assert first.pool_fingerprint == second.pool_fingerprint
        images, labels = first.train.images.clone(), first.train.labels
        images[7, 0, 3, 3] += 1
        changed = replace(first, train=Split(images=images, labels=labels))
        rows = torch.tensor([0, *range(len(labels))])
        more = replace(first, train=Split(images=first.train.images[rows], labels=labels[rows]))
        found = {data.pool_fingerprint for data in (first, changed, more)}
        assert len(found) == 3

    def test_the_training_images_have_one_fingerprint_whatever_is_tested_on(self):
        """In any order; and another where one of them is another, or is left out."""
        first = load_data("digits", seed=1)
        images, labels = first.train.images, first.train.labels
        turned = replace(
            first,
            train=Split(images=images.flip(0), labels=labels.flip(0)),
            test=Split(images=first.test.images[1:], labels=first.test.labels[1:]),
        )
        assert turned.train_fingerprint == first.train_fingerprint
        assert turned.pool_fingerprint != first.pool_fingerprint
        fewer = replace(first, train=Split(images=images[1:], labels=labels[1:]))
        other = load_data("digits", seed=2)
        found = {data.train_fingerprint for data in (first, fewer, other)}
        assert len(found | {first.pool_fingerprint, first.fingerprint}) == 5

    def test_fingerprint_does_not_depend_on_its_chunks(self, monkeypatch):
        """Hashing three images at a time gives what hashing all at once gives."""
        whole = load_data("digits").fingerprint
        monkeypatch.setattr("secure_cnn.data.split._HASH_CHUNK", 200)
        assert load_data("digits").fingerprint == whole

    @pytest.mark.parametrize(
        "changes",
        [
            {"labels": torch.tensor([0, 2])},
            {"labels": torch.tensor([-1, 0])},
            {"images": torch.zeros(2, 1, 8, 9, dtype=torch.uint8)},
            {
                "images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
                "labels": torch.zeros(0, dtype=torch.int64),
            },
            {"classes": ("a", "a")},
            {"classes": ("a",)},
            {"classes": ("a", "\udce9")},
            {"name": "caf\udce9"},
        ],
    )
    def test_contradictions_are_refused(self, changes):
        """Labels outside the classes, other shapes, no images, one class, and wrong names."""
        with pytest.raises(DataError, match="expected"):
            self.data(**changes)


class TestNpz:
    @pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
    def test_layouts_agree(self, tmp_path, layout):
        """Grey images are the same data set in each of the three layouts."""
        images = save_npz(tmp_path / "base.npz")["images"]
        views = {"NHW": images, "NHWC": images[..., None], "NCHW": images[:, None]}
        save_npz(tmp_path / "x.npz", images=views[layout])
        want = load_data(tmp_path / "base.npz").fingerprint
        assert load_data(tmp_path / "x.npz").fingerprint == want

    def test_channels_last_and_first_agree_in_colour(self, tmp_path):
        """Colour images are transposed, not reshaped."""
        images = save_npz(tmp_path / "last.npz", shape=(8, 9, 3))["images"]
        save_npz(tmp_path / "first.npz", images=np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        last, first = load_data(tmp_path / "last.npz"), load_data(tmp_path / "first.npz")
        assert last.spec.shape == (3, 8, 9)
        assert last.fingerprint == first.fingerprint

    @pytest.mark.parametrize("dtype", ["float16", "float32", ">f4", "float64"])
    def test_floats_become_the_nearest_level(self, tmp_path, dtype):
        """uint8 divided by 255 and back is the identity in every float type."""
        images = save_npz(tmp_path / "bytes.npz")["images"]
        save_npz(tmp_path / "floats.npz", images=(images / 255).astype(dtype))
        want = load_data(tmp_path / "bytes.npz").fingerprint
        assert load_data(tmp_path / "floats.npz").fingerprint == want

    def test_a_test_set_is_kept_apart(self, tmp_path):
        """With test arrays nothing is shuffled."""
        arrays = save_npz(
            tmp_path / "x.npz",
            test_images=np.full((3, 8, 8), 7, np.uint8),
            test_labels=np.array([1, 1, 1]),
        )
        data = load_data(tmp_path / "x.npz")
        assert (data.train.images[:, 0].numpy() == arrays["images"]).all()
        assert data.test.labels.tolist() == [1, 1, 1]
        assert (data.test.images == 7).all()

    def test_chunks_and_mapping_change_nothing(self, tmp_path, monkeypatch):
        """Three images at a time, split by the seed, into a mapped file: the same data set."""
        save_npz(tmp_path / "x.npz", count=50, classes=3)
        want = load_data(tmp_path / "x.npz").fingerprint
        monkeypatch.setattr(source, "CHUNK_BYTES", 200)
        load = {"cache": tmp_path / "cache", "memory_cap": 0}
        assert load_data(tmp_path / "x.npz").fingerprint == want
        assert load_data(tmp_path / "x.npz", **load).fingerprint == want
        assert load_data(tmp_path / "x.npz", seed=1, **load).fingerprint != want

    @pytest.mark.parametrize(
        ("arrays", "match"),
        [
            ({"images": np.full((20, 8, 8), 1.5)}, r"in \[0, 1\]"),
            ({"images": np.full((20, 8, 8), -0.1)}, r"in \[0, 1\]"),
            ({"images": np.full((20, 8, 8), np.nan)}, r"in \[0, 1\]"),
            ({"images": np.zeros((20, 8, 8), np.int64)}, "uint8 or float"),
            ({"images": np.zeros((20, 64), np.uint8)}, "height, width"),
            ({"images": np.zeros((20, 3, 8, 3), np.uint8)}, "both"),
            ({"images": np.zeros((20, 8, 8, 2), np.uint8)}, "neither"),
            ({"images": np.zeros((20, 0, 8), np.uint8)}, "none of them 0"),
            ({"images": np.zeros((8, 8, 20), np.uint8).T}, "row-major"),
            ({"images": np.array([{}] * 20, dtype=object)}, "never loaded"),
            ({"labels": np.zeros(20, int)}, "at least two classes"),
            ({"labels": np.arange(20) % 2 * 2}, r"none of \['1'\]"),
            ({"labels": np.arange(20) - 1}, "got -1..18"),
            ({"labels": np.full(20, 2**40)}, "expected labels in"),
            ({"labels": np.zeros(20)}, "integers"),
            ({"labels": np.zeros(19, int)}, "20 integers"),
            ({"labels": None}, "add labels"),
            ({"test_images": np.zeros((2, 8, 8), np.uint8)}, "add test_labels"),
            (
                {"test_images": np.zeros((2, 8, 9), np.uint8), "test_labels": np.zeros(2, int)},
                "like images",
            ),
            (
                {"test_images": np.zeros((2, 8, 8), np.uint8), "test_labels": np.full(2, 2)},
                "got 2..2",
            ),
        ],
    )
    def test_bad_arrays_are_refused(self, tmp_path, arrays, match):
        """Each is one error that names the file and what was expected."""
        save_npz(tmp_path / "x.npz", **arrays)
        with pytest.raises(DataError, match=match) as caught:
            load_data(tmp_path / "x.npz")
        assert "x.npz" in str(caught.value)

    def test_every_truncation_is_an_error(self, tmp_path):
        """However short the file is cut."""
        path = tmp_path / "x.npz"
        save_npz(path)
        whole = path.read_bytes()
        for length in range(0, len(whole), 37):
            path.write_bytes(whole[:length])
            with pytest.raises(DataError, match=r"x\.npz"):
                load_data(path)

    def test_damaged_bytes_never_end_in_another_error(self, tmp_path):
        """Whatever random damage does to headers, nothing but a `DataError` comes out."""
        path = tmp_path / "x.npz"
        save_npz(path, count=4)
        for _ in damaged(path, times=300, places=2):
            with contextlib.suppress(DataError):
                load_data(path)


@pytest.mark.parametrize("name", ["nothing", "data.csv", "digit", "~/no/such/folder"])
def test_an_unknown_source_lists_what_is_known(tmp_path, name):
    """The names of the data sets and the kinds of files are in the message."""
    with pytest.raises(DataError, match=r"expected one of digits, mnist, .*folder"):
        load_data(name)


def test_bad_settings_are_refused():
    """A share outside (0, 1) and a negative seed are errors."""
    for settings_ in ({"test_fraction": 0.0}, {"test_fraction": 1.0}, {"seed": -1}):
        with pytest.raises(DataError, match=next(iter(settings_))):
            load_data("digits", **settings_)


def test_a_file_larger_than_memory_can_be_mapped(tmp_path):
    """A sparse file of 1 TiB is mapped: no swap is reserved for what is only read."""
    path = tmp_path / "huge.u8"
    with path.open("wb") as file:
        try:
            file.truncate(1 << 40)
        except OSError:
            pytest.skip("the file system has no sparse files of this size")
    images = store._map(path, (1 << 28, 1, 64, 64))
    assert images[-1].sum() == 0


def test_the_room_knows_nothing_of_models():
    """No module of `secure_cnn.data` imports another room of the package but the ground."""
    ground = {f"secure_cnn.{name}" for name in ("errors", "files", "printable", "progress")}
    for path in Path(secure_cnn.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("secure_cnn"):
                assert node.module in ground or node.module.startswith("secure_cnn.data")


def test_keys_depend_on_files_and_settings(tmp_path):
    """Name, size, both times and settings each change the key; nothing else does."""
    one, two = tmp_path / "1", tmp_path / "2"
    for path in (one, two):
        path.write_bytes(b"a")
        os.utime(path, (1, 1))
    keys = {source.key_of([one]), source.key_of([two]), source.key_of([one], 1)}
    os.utime(one, (2, 2))
    keys.add(source.key_of([one]))
    one.write_bytes(b"ab")
    os.utime(one, (1, 1))
    keys.add(source.key_of([one]))
    assert len(keys) == 5
    assert source.key_of([one]) in keys

    # Another file in its place, as a copy that keeps size and time puts it there.
    changed = one.stat().st_ctime_ns
    one.write_bytes(b"ba")
    os.utime(one, (1, 1))
    while one.stat().st_ctime_ns == changed:  # the clock of the file system has ticks
        os.utime(one, (1, 1))
    assert source.key_of([one]) not in keys
