"""Whose the images are: by folders, by a CSV file, by an array; a person is on one side."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from secure_cnn.data import load_data
from secure_cnn.data.groups import split_by_person
from secure_cnn.errors import DataError

PEOPLE = ("ann", "bob", "cid", "dora", "eve", "finn")


def photographs(root: Path, *, persons: bool = True) -> Path:
    """Two classes, six persons with three images each in both; each image is another."""
    grey = 0
    for kind in ("cat", "dog"):
        for person in PEOPLE:
            folder = root / kind / person if persons else root / kind
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(3):
                grey += 5
                name = f"{number}.png" if persons else f"{person}{number}.png"
                Image.new("L", (8, 8), grey).save(folder / name)
    return root


def owners_of(data) -> dict[int, str]:
    """The person of each image by its grey."""
    found = {}
    for split, groups in ((data.train, data.groups), (data.test, data.test_groups)):
        assert len(split) == len(groups)
        for image, person in zip(split.images, groups, strict=True):
            found[int(image.max())] = person
    return found


EXPECTED = {5 * (1 + i): PEOPLE[i // 3 % 6] for i in range(36)}


def check(data) -> None:
    """Every image has its person, and no person is on both sides."""
    assert owners_of(data) == EXPECTED
    assert data.shared_persons == 0
    assert 0 < len(data.test) < len(data.train)
    assert set(data.test.labels.tolist()) == {0, 1}


def test_folders_inside_class_folders_are_persons(tmp_path):
    """One name in two classes is one person."""
    check(load_data(photographs(tmp_path / "pets"), groups="folder"))


def test_an_accent_that_is_encoded_in_two_ways_makes_no_second_person(tmp_path):
    """A folder from a Mac beside one from elsewhere, rows of a table, names in an array."""
    one, other = "Andr\u00e9", "Andre\u0301"
    named = {"cat": one, "dog": other}
    root = photographs(tmp_path / "pets")
    for kind, name in named.items():
        (root / kind / "ann").rename(root / kind / name)
    found = load_data(root, groups="folder")
    assert len({*found.groups, *found.test_groups}) == len(PEOPLE)

    flat = photographs(tmp_path / "flat", persons=False)
    rows = [
        f"{kind}/{person}{number}.png,{named[kind] if person == 'ann' else person}"
        for kind in ("cat", "dog")
        for person in PEOPLE
        for number in range(3)
    ]
    table = tmp_path / "whose.csv"
    table.write_text("\n".join(["path,person", *rows]), encoding="utf-8")
    found = load_data(flat, groups=table)
    assert len({*found.groups, *found.test_groups}) == len(PEOPLE)

    images = np.arange(12, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    names = np.array([one, other, "bob", "cid"] * 3)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(12) // 4 % 2, groups=names)
    found = load_data(tmp_path / "set.npz")
    assert len({*found.groups, *found.test_groups}) == 3


def test_a_csv_file_names_the_person_of_each_path(tmp_path):
    """With blanks and a mark of its encoding, as tables export them."""
    root = photographs(tmp_path / "pets", persons=False)
    rows = [
        f"{kind}/{person}{number}.png, {person},x"
        for kind in ("cat", "dog")
        for person in PEOPLE
        for number in range(3)
    ]
    table = tmp_path / "whose.csv"
    table.write_text("\ufeffpath,person,note\r\n" + "\r\n".join(reversed(rows)), encoding="utf-8")
    check(load_data(root, groups=table))


def arrays() -> dict[str, np.ndarray]:
    """The same as arrays."""
    greys = np.arange(5, 185, 5, dtype=np.uint8)
    return {
        "images": np.broadcast_to(greys[:, None, None], (36, 8, 8)).copy(),
        "labels": np.repeat([0, 1], 18),
    }


@pytest.mark.parametrize("kind", [str, bytes])
def test_an_array_of_the_file_names_them(tmp_path, kind):
    """Without being asked for."""
    groups = np.array([kind(p, "ascii") if kind is bytes else p for p in EXPECTED.values()])
    np.savez(tmp_path / "pets.npz", **arrays(), groups=groups)
    check(load_data(tmp_path / "pets.npz"))


def test_a_csv_file_names_the_person_of_each_row(tmp_path):
    """Rows from 0 on, whatever their order in the table."""
    np.savez(tmp_path / "pets.npz", **arrays())
    lines = [f"{row},{person}" for row, person in enumerate(EXPECTED.values())]
    (tmp_path / "whose.csv").write_text("index,person\n" + "\n".join(reversed(lines)))
    check(load_data(tmp_path / "pets.npz", groups=tmp_path / "whose.csv"))


def test_a_part_of_its_own_has_persons_of_its_own(tmp_path):
    """And who is in both parts is counted."""
    whole = arrays()
    parts = {**whole, "test_images": whole["images"][:2], "test_labels": np.array([0, 1])}
    groups = np.arange(36)
    np.savez(tmp_path / "a.npz", **parts, groups=groups, test_groups=np.array([35, 99]))
    data = load_data(tmp_path / "a.npz")
    assert (len(data.groups), data.test_groups, data.shared_persons) == (36, ("35", "99"), 1)
    np.savez(tmp_path / "b.npz", **parts, groups=groups)
    with pytest.raises(
        DataError, match="groups and test_groups, both or neither, got groups alone"
    ):
        load_data(tmp_path / "b.npz")


def test_folders_may_mean_something_else(tmp_path):
    """Not asked for, they move no image to another side; whose they may be is known."""
    plain = load_data(photographs(tmp_path / "a" / "pets", persons=False))
    deeper = load_data(photographs(tmp_path / "b" / "pets"))
    assert plain.groups is None
    assert deeper.groups is not None
    assert plain.fingerprint == deeper.fingerprint


@pytest.mark.parametrize("split", [False, True])
def test_folders_are_explained_only_where_nobody_said_what_they_are(tmp_path, split):
    """With what says so, once for both parts."""
    photographs(tmp_path / "pets" / "train" if split else tmp_path / "pets")
    if split:
        photographs(tmp_path / "pets" / "val")
    told = []
    load_data(tmp_path / "pets", tell=told.append)
    (remark,) = [each for each in told if "inside class folders" in each]
    assert "say so (--groups folder)" in remark
    told.clear()
    load_data(tmp_path / "pets", groups="folder", tell=told.append)
    assert not [each for each in told if "inside class folders" in each]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,owner\ncat/a.png,x\n", "columns path,person, got path, owner"),
        ("path,person\ncat/ann0.png,ann\n", "got none for 35"),
        ("path,person\ncat/ann0.png,\n", "line 2: expected a path and a person"),
        ("path,person\ncat/ann0.png,ann\ncat/ann0.png,bob\n", "line 3: expected one person of"),
        ("", "columns path,person, got"),
        ("\udcff", "a CSV file"),
    ],
)
def test_a_csv_file_that_does_not_fit_is_refused(tmp_path, text, says):
    """With the line, or the images that it leaves out."""
    root = photographs(tmp_path / "pets", persons=False)
    table = tmp_path / "whose.csv"
    table.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=says):
        load_data(root, groups=table)


def test_what_cannot_be_is_refused(tmp_path):
    """Images of nobody, rows of no image, folders in a file, and a set that has no persons."""
    root = photographs(tmp_path / "pets")
    Image.new("L", (8, 8), 200).save(root / "cat" / "alone.png")
    with pytest.raises(DataError, match=r"1 images in none: cat/alone\.png"):
        load_data(root, groups="folder")
    np.savez(tmp_path / "pets.npz", **arrays())
    with pytest.raises(DataError, match="or save an array groups"):
        load_data(tmp_path / "pets.npz", groups="folder")
    table = tmp_path / "whose.csv"
    table.write_text("index,person\n" + "\n".join(f"{row},{row}" for row in range(37)))
    with pytest.raises(DataError, match="got 1 others: 36"):
        load_data(tmp_path / "pets.npz", groups=table)
    with pytest.raises(DataError, match="digits: expected no groups"):
        load_data("digits", groups="folder")
    with pytest.raises(DataError, match=r"none\.csv: expected a CSV file"):
        load_data(tmp_path / "pets.npz", groups=tmp_path / "none.csv")
    for wrong in (np.zeros((36, 1), int), np.zeros(35, int), np.zeros(36), np.array([""] * 36)):
        np.savez(tmp_path / "wrong.npz", **arrays(), groups=wrong)
        with pytest.raises(DataError, match="groups"):
            load_data(tmp_path / "wrong.npz")


@pytest.mark.parametrize("seed", range(5))
def test_a_split_keeps_persons_whole_and_classes_on_both_sides(seed):
    """About a fifth of each class, whatever the persons' sizes."""
    random = np.random.default_rng(seed)
    persons = random.integers(0, 60, 600)
    labels = random.integers(0, 5, 600)
    classes = tuple("abcde")
    cut = split_by_person(labels, classes, persons.astype(str), "x", test_fraction=0.2, seed=seed)
    train, test = cut
    assert sorted([*train, *test]) == list(range(600))
    assert not set(persons[train]) & set(persons[test])
    for label in range(5):
        assert 0.1 < (labels[test] == label).sum() / (labels == label).sum() < 0.3
    again = split_by_person(labels, classes, persons.astype(str), "x", test_fraction=0.2, seed=seed)
    assert [part.tolist() for part in again] == [part.tolist() for part in cut]


def test_a_class_of_one_person_cannot_be_split():
    """Nobody would be left to test on, or to train on."""
    with pytest.raises(DataError, match=r"two persons at least.* too few of b"):
        split_by_person(
            np.array([0, 0, 0, 1, 1]), ("a", "b"), list("xyzww"), "x", test_fraction=0.3, seed=0
        )
