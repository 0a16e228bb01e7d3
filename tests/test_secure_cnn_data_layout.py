"""`secure_cnn.data.layout`: the folders that people have, and the words for those that are none."""

import shutil

import pytest
from support.class_folders import write_images

from secure_cnn.data import load_data
from secure_cnn.errors import DataError


@pytest.fixture
def load():
    """Loads a folder; the data, and what was said of them."""

    def call(root):
        told = []
        return load_data(root, tell=told.append), told

    return call


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("test", ["test", "Testing", "val", "valid", "Validation"])
def test_both_parts_are_known_by_their_usual_names(tmp_path, load, train, test):
    """In any case of letters; that a validation set is tested on is said."""
    write_images(tmp_path / train, count=5)
    write_images(tmp_path / test, count=2)
    data, told = load(tmp_path)
    assert (len(data.train), len(data.test)) == (10, 4)
    remarked = any("is what the model is tested on" in words for words in told)
    assert remarked == (test.lower()[0] == "v")


def test_the_test_part_is_tested_on_where_there_are_three(tmp_path, load):
    """And what is not read is named."""
    for part, count in (("train", 5), ("val", 3), ("test", 2)):
        write_images(tmp_path / part, count=count)
    data, told = load(tmp_path)
    assert len(data.test) == 4
    assert "val/ beside train/ and test/ is not read" in told[0]


def test_a_part_twice_is_refused(tmp_path):
    """Which of the two is meant cannot be known."""
    for part in ("train", "Training", "test"):
        write_images(tmp_path / part)
    with pytest.raises(DataError, match=r"one folder of train images, got Training and train"):
        load_data(tmp_path)


def test_a_training_part_alone_is_split_by_the_seed(tmp_path, load):
    """As if the folder inside had been given."""
    write_images(tmp_path / "pets/train", count=10)
    data, _ = load(tmp_path / "pets")
    assert (len(data.train), len(data.test), data.name) == (16, 4, "pets")


def test_a_test_part_without_its_training_part_is_refused(tmp_path):
    """It is no class called test."""
    for part in ("val", "test"):
        write_images(tmp_path / part)
    with pytest.raises(DataError, match=r"expected train/ beside test/"):
        load_data(tmp_path)


def test_a_part_in_a_folder_of_its_own_name_is_that_part(tmp_path, load):
    """As some archives have it: train/train/cat."""
    write_images(tmp_path / "train/train", count=5)
    write_images(tmp_path / "test", count=2)
    data, _ = load(tmp_path)
    assert (len(data.train), len(data.test)) == (10, 4)


@pytest.mark.parametrize("wrapper", ["data", "data/pets"])
@pytest.mark.parametrize("parts", [("train", "test"), ("",)])
def test_a_folder_in_a_folder_is_that_folder(tmp_path, load, wrapper, parts):
    """As archives are unpacked; what systems leave beside it makes no difference."""
    for part in parts:
        write_images(tmp_path / "mine" / wrapper / part, count=5)
    (tmp_path / "mine/__MACOSX/data").mkdir(parents=True)
    (tmp_path / "mine/__MACOSX/data/._1.png").write_text("x")
    (tmp_path / "mine/.DS_Store").write_text("x")
    data, _ = load(tmp_path / "mine")
    assert (data.name, data.spec.classes) == ("mine", ("cat", "dog"))


def test_what_systems_leave_behind_is_passed_over(tmp_path, load):
    """In every folder, silently."""
    write_images(tmp_path / "train")
    write_images(tmp_path / "test")
    for folder in (tmp_path, *tmp_path.glob("*"), *tmp_path.glob("*/*")):
        if folder.is_dir():
            for name in ("Thumbs.db", ".DS_Store", "._0.png", "desktop.ini"):
                (folder / name).write_text("x")
            (folder / ".ipynb_checkpoints").mkdir()
            (folder / "__MACOSX").mkdir()
    data, told = load(tmp_path)
    assert len(data.train) == 10
    assert not any("read" in words or "belong" in words for words in told)


def test_folders_inside_a_class_folder_belong_to_the_class(tmp_path, load):
    """At any depth up to four, and it is said; deeper ones are refused."""
    write_images(tmp_path / "pets", count=4)
    for place in ("anna", "2021/may"):
        (tmp_path / "pets/cat" / place).mkdir(parents=True)
        shutil.copy(tmp_path / "pets/cat/0.png", tmp_path / "pets/cat" / place / "x.png")
    data, told = load(tmp_path / "pets")
    assert len(data.train) + len(data.test) == 10
    assert told[0].startswith("folders inside class folders, such as pets/cat/2021/may, belong to")
    deep = tmp_path / "pets/cat/a/b/c/d/e"
    deep.mkdir(parents=True)
    with pytest.raises(DataError, match="at most 4 folders"):
        load_data(tmp_path / "pets")


def test_a_folder_that_holds_itself_is_an_error(tmp_path):
    """A link in a circle."""
    write_images(tmp_path / "pets")
    (tmp_path / "pets/cat/again").symlink_to(tmp_path / "pets/cat")
    with pytest.raises(DataError, match="at most 4 folders"):
        load_data(tmp_path / "pets")


def test_images_without_class_folders_are_told_the_layout(tmp_path):
    """Both forms, with the name of the folder that was given."""
    write_images(tmp_path / "made")
    (tmp_path / "pets").mkdir()
    for number, file in enumerate((tmp_path / "made").rglob("*.png")):
        file.rename(tmp_path / f"pets/{number}.png")
    with pytest.raises(DataError) as caught:
        load_data(tmp_path / "pets")
    words = str(caught.value)
    assert "got 10 images directly in it" in words
    for part in ("pets/cat/1.jpg and pets/dog/2.jpg", "pets/train/cat/1.jpg and pets/test/cat"):
        assert part in words


def test_a_test_part_without_classes_is_told_so(tmp_path):
    """As competitions hand it out."""
    write_images(tmp_path / "train")
    (tmp_path / "test").mkdir()
    (tmp_path / "train/cat/0.png").rename(tmp_path / "test/0.png")
    with pytest.raises(DataError, match=r"test: expected at least two class folders.*got 1 images"):
        load_data(tmp_path)


def test_all_strangers_and_all_empty_folders_are_named_at_once(tmp_path):
    """A few by name, and how many more."""
    write_images(tmp_path / "pets")
    for number in range(8):
        (tmp_path / f"pets/cat/{number}.heic").write_text("x")
    with pytest.raises(DataError, match=r"cat/0\.heic, .*cat/4\.heic and 3 more; convert them"):
        load_data(tmp_path / "pets")
    for number in range(8):
        (tmp_path / f"pets/cat/{number}.heic").unlink()
        (tmp_path / f"pets/owl{number}").mkdir()
    with pytest.raises(DataError, match="none in owl0, owl1, owl2, owl3, owl4 and 3 more"):
        load_data(tmp_path / "pets")


def test_the_same_image_in_both_parts_is_remarked_on(tmp_path, load):
    """With how many; under another label it is a fault of one of them."""
    write_images(tmp_path / "train", count=4)
    (tmp_path / "test").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "test" / name).mkdir()
        for number in range(3):
            shutil.copy(
                tmp_path / f"train/{name}/{number}.png", tmp_path / f"test/{name}/x{number}.png"
            )
    shutil.copy(tmp_path / "train/cat/0.png", tmp_path / "train/dog/9.png")
    _, told = load(tmp_path)
    assert any(words.startswith("6 of 6 test images are among the training") for words in told)
    assert any(words.startswith("3 images are in more than one class") for words in told)


def test_distinct_images_are_not_remarked_on(tmp_path, load):
    """Control."""
    write_images(tmp_path, count=50)
    assert load(tmp_path)[1] == []
