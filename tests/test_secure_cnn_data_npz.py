"""`secure_cnn.data.npz`: arrays under the names and in the forms in which people have them."""

import numpy as np
import pytest

from secure_cnn.data import load_data
from secure_cnn.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 9), dtype=np.uint8)
NUMBERS = np.arange(20) % 3
NAMES = np.array(["cat", "dog", "eel"])


@pytest.fixture
def load(tmp_path):
    """Saves arrays and loads them; the data, and what was said of them."""

    def call(**arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        told = []
        return load_data(tmp_path / "x.npz", tell=told.append), told

    return call


@pytest.mark.parametrize(
    ("images", "labels"),
    [("x_train", "y_train"), ("X_train", "Y_train"), ("train_images", "train_labels"), ("X", "y")],
)
def test_arrays_are_known_by_their_usual_names(load, images, labels):
    """Those of Keras, MedMNIST and scikit-learn, in any case of letters."""
    want, _ = load(images=IMAGES, labels=NUMBERS)
    found, _ = load(**{images: IMAGES, labels: NUMBERS})
    assert found.fingerprint == want.fingerprint


@pytest.mark.parametrize(
    ("images", "labels"),
    [("x_test", "y_test"), ("test_images", "test_labels"), ("val_images", "val_labels")],
)
def test_a_test_set_is_known_by_its_usual_names(load, images, labels):
    """That a validation set is tested on is said."""
    data, told = load(
        x_train=IMAGES, y_train=NUMBERS, **{images: IMAGES[:6] // 2, labels: NUMBERS[:6]}
    )
    assert (len(data.train), len(data.test)) == (20, 6)
    assert (data.test.images[:, 0].numpy() == IMAGES[:6] // 2).all()
    assert any("is what the model is tested on" in words for words in told) == ("val" in images)


def test_the_test_set_is_tested_on_where_there_are_three(load):
    """As MedMNIST has them, whose labels are a column."""
    parts = {"train": IMAGES, "val": IMAGES[:9] // 2, "test": IMAGES[:6] // 3}
    arrays = {f"{name}_images": images for name, images in parts.items()}
    arrays |= {f"{name}_labels": NUMBERS[: len(images), None] for name, images in parts.items()}
    data, told = load(**arrays)
    assert (len(data.train), len(data.test)) == (20, 6)
    assert told == ["val_images is not read: the model is tested on test_images"]


FORMS = {
    "a column": NUMBERS[:, None],
    "small": NUMBERS.astype(np.uint8),
    "names": NAMES[NUMBERS],
    "a column of names": NAMES[NUMBERS][:, None],
    "names in bytes": NAMES[NUMBERS].astype("S"),
    "one of k": np.eye(3)[NUMBERS],
    "one of k, whole": np.eye(3, dtype=int)[NUMBERS],
    "one of k, flags": np.eye(3, dtype=bool)[NUMBERS],
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_mean_the_same_in_every_form(load, form):
    """Numbers, names in the order of the alphabet, or a one among zeros."""
    data, _ = load(
        images=IMAGES, labels=FORMS[form], test_images=IMAGES[:6], test_labels=FORMS[form][:6]
    )
    assert data.train.labels.tolist() == NUMBERS.tolist()
    assert data.test.labels.tolist() == NUMBERS[:6].tolist()
    assert data.spec.classes == (("cat", "dog", "eel") if "names" in form else ("0", "1", "2"))


def test_yes_and_no_are_two_classes(load):
    """Flags are numbers."""
    data, _ = load(images=IMAGES, labels=NUMBERS > 0)
    assert data.spec.classes == ("0", "1")


def test_numbers_may_have_names_beside_them(load):
    """In the order of the numbers, not of the alphabet."""
    data, _ = load(images=IMAGES, labels=NUMBERS, classes=NAMES[::-1])
    assert data.spec.classes == ("eel", "dog", "cat")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": IMAGES % 2}, r"uint8 in 0..255, got 0 and 1 alone.*save images \* 255"),
        ({"images": IMAGES.astype(float)}, r"in \[0, 1\], got 0.0..255.0; .*astype\(numpy.uint8\)"),
        ({"images": IMAGES / 127.5 - 1}, r"save \(images \+ 1\) / 2"),
        ({"images": IMAGES / 20.0 - 5}, r"rescale them as they are meant to be seen"),
        ({"images": IMAGES.astype(int)}, r"got int64; if .* save images.astype\(numpy.uint8\)"),
        ({"x_train": IMAGES, "y_train": NUMBERS}, "one array of these images, got images and x_tr"),
        ({"x_test": IMAGES}, "x_test and y_test, both or neither.*add y_test"),
        ({"labels": None, "y_train": NUMBERS}, "add labels, x_train"),
        ({"labels": np.eye(3)[NUMBERS] * 0.5}, "one 1 and else 0 in each row"),
        ({"labels": np.ones((20, 3))}, "one 1 and else 0 in each row"),
        ({"labels": NUMBERS + 0.5}, r"20 integers or names.*save them as labels.astype\(int\)"),
        ({"labels": NUMBERS.reshape(4, 5)}, "20 integers or names"),
        ({"labels": NAMES[NUMBERS].astype(object)}, "Python objects.*dtype=str"),
        ({"labels": np.where(NUMBERS == 1, "", "cat")}, "name for every image, got 7 empty"),
        ({"labels": np.array(["cat"] * 20)}, "at least two classes"),
        ({"labels": NAMES[NUMBERS], "classes": NAMES}, "leave classes out"),
        ({"labels": NAMES[NUMBERS].astype("S"), "images": IMAGES[:19]}, "19 integers or names"),
        ({"labels": np.array([b"\xff", b"a"])[NUMBERS % 2]}, "utf-8"),
        ({"labels": np.array(["\ud800", "a"])[NUMBERS % 2]}, "expected UTF-8"),
        ({"classes": NAMES[:2]}, r"labels in 0..1, got 0..2"),
        ({"classes": np.array(["a", "a", "b"])}, "expected classes to differ"),
        ({"classes": NUMBERS}, "expected classes as 2..65536 texts"),
        (
            {"test_images": IMAGES[:2], "test_labels": np.array([0, 1]), "labels": NAMES[NUMBERS]},
            "of one kind, got names in one and numbers in the other",
        ),
        (
            {"test_images": IMAGES[:1], "test_labels": np.array(["owl"]), "labels": NAMES[NUMBERS]},
            "the classes of labels in test_labels, got owl too",
        ),
    ],
)
def test_what_cannot_be_understood_is_refused_with_what_to_save(load, arrays, words):
    """Rather than guessed at, before anything is trained."""
    given = {"images": IMAGES, "labels": NUMBERS, **arrays}
    with pytest.raises(DataError, match=words):
        load(**{name: array for name, array in given.items() if array is not None})


def test_dark_images_are_not_taken_for_zeros_and_ones(load):
    """Control: a two among them, and floats that are as good as 0 and 1."""
    dark = IMAGES % 3
    assert load(images=dark, labels=NUMBERS)[0].train.images.max() == 2
    assert load(images=(IMAGES % 2).astype(float), labels=NUMBERS)[0].train.images.max() == 255
