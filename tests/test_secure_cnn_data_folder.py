"""`secure_cnn.data.folder`: class folders of images, in memory or mapped, and how to spoil one."""

import contextlib
import os
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from support.class_folders import write_images

from secure_cnn.data import load_data
from secure_cnn.errors import DataError


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_pixels_arrive_as_written(tmp_path, mode, channels):
    """Given train/ and test/, every pixel and label is where the sorted names put it."""
    train = write_images(tmp_path / "pets/train", mode=mode)
    write_images(tmp_path / "pets/test", count=2, mode=mode)
    (tmp_path / "pets/train/.hidden").write_text("ignored")
    data = load_data(tmp_path / "pets")
    assert (data.name, data.spec.classes) == ("pets", ("cat", "dog"))
    assert data.spec.shape == (channels, 9, 8)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5
    for image, array in zip(data.train.images, train.values(), strict=True):
        assert (image.permute(1, 2, 0).squeeze(-1).numpy() == array).all()


def test_one_colour_image_makes_all_colour(tmp_path):
    """A grey image among colour ones has three equal channels."""
    write_images(tmp_path, classes=("cat",), mode="RGB")
    write_images(tmp_path, classes=("dog",), mode="L")
    data = load_data(tmp_path)
    dogs = data.train.images[data.train.labels == 1]
    assert data.spec.channels == 3
    assert (dogs[:, :1] == dogs).all()


def test_jpeg_is_read(tmp_path):
    """JPEG files count as images whatever the case of their suffix."""
    write_images(tmp_path, suffix="JPG")
    assert len(load_data(str(tmp_path)).train) == 8


def test_a_broken_orientation_tag_is_an_error_or_harmless(tmp_path):
    """Whatever the bytes of the tags are, they end in pixels or in our own error."""
    random = np.random.default_rng(0)
    write_images(tmp_path, size=(8, 9), suffix="jpg", count=2)
    exif = Image.Exif()
    exif[0x0112] = 6
    sound = exif.tobytes()
    victim = tmp_path / "cat/0.jpg"
    image = Image.open(victim).copy()
    for _ in range(200):
        broken = bytearray(sound)
        for place in random.integers(6, len(broken), 3):
            broken[place] = random.integers(256)
        image.save(victim, exif=bytes(broken))
        with contextlib.suppress(DataError):
            assert len(load_data(tmp_path).train) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_a_name_that_no_file_can_hold_is_refused_before_any_image(tmp_path, monkeypatch):
    """A class folder or a data folder named in Latin-1, as an old zip leaves it, names itself."""
    write_images(tmp_path / "pets")
    monkeypatch.setattr("secure_cnn.data.photograph.Image.open", None)
    latin = os.fsdecode(b"caf\xe9")
    (tmp_path / "pets/cat").rename(tmp_path / "pets" / latin)
    with pytest.raises(DataError, match=r"the class folder: expected UTF-8.*rename it"):
        load_data(tmp_path / "pets")
    (tmp_path / "pets").rename(tmp_path / latin)
    with pytest.raises(DataError, match=r"the folder: expected UTF-8.*rename it"):
        load_data(tmp_path / latin)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no file has such a name")
@pytest.mark.parametrize("mark", ["\n", "\t", "\x1b[2J", "\u2028", "\x85"])
def test_a_name_that_breaks_a_table_is_refused_before_any_image(tmp_path, monkeypatch, mark):
    """A class would be two lines of every table; what is told of it is one line itself."""
    write_images(tmp_path / "pets")
    monkeypatch.setattr("secure_cnn.data.photograph.Image.open", None)
    (tmp_path / "pets/cat").rename(tmp_path / "pets" / f"a{mark}b")
    with pytest.raises(DataError, match=r"the class folder: expected no control.*rename") as told:
        load_data(tmp_path / "pets")
    assert str(told.value).isprintable()


def test_beyond_the_cap_it_is_decoded_once(tmp_path, monkeypatch):
    """A mapped data set equals the one in memory, and a second load decodes nothing."""
    write_images(tmp_path / "pets")
    cache = tmp_path / "cache"
    in_memory = load_data(tmp_path / "pets", cache=cache)
    assert not cache.exists()
    mapped = load_data(tmp_path / "pets", cache=cache, memory_cap=0)
    assert mapped.fingerprint == in_memory.fingerprint
    monkeypatch.setattr("secure_cnn.data.photograph.Image.open", None)
    again = load_data(tmp_path / "pets", cache=cache, memory_cap=0)
    assert again.fingerprint == in_memory.fingerprint
    assert len(list(cache.iterdir())) == 1


def test_writing_to_a_mapped_image_spares_the_file(tmp_path):
    """The mapping is copy-on-write."""
    write_images(tmp_path / "pets")
    load = {"cache": tmp_path / "cache", "memory_cap": 0}
    before = load_data(tmp_path / "pets", **load)
    fingerprint = before.fingerprint
    before.train.images.zero_()
    assert load_data(tmp_path / "pets", **load).fingerprint == fingerprint


def test_a_changed_file_is_decoded_anew(tmp_path):
    """Another modification time or size is another key."""
    pixels = write_images(tmp_path / "pets")
    load = {"cache": tmp_path / "cache", "memory_cap": 0}
    before = load_data(tmp_path / "pets", **load).fingerprint
    Image.new("RGB", (8, 9)).save(next(iter(pixels)))
    assert load_data(tmp_path / "pets", **load).fingerprint != before


def test_a_failed_decoding_leaves_nothing_behind(tmp_path):
    """A broken image behind a good header is found while decoding; the cache stays clean."""
    path = list(write_images(tmp_path / "pets", size=(8, 8)))[-1]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=path.name):
        load_data(tmp_path / "pets", cache=tmp_path / "cache", memory_cap=0)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unusable_cache_is_an_error(tmp_path):
    """A cache that is a file is named, with what to do."""
    write_images(tmp_path / "pets")
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match="SECURE_CNN_CACHE"):
        load_data(tmp_path / "pets", cache=tmp_path / "cache", memory_cap=0)


def test_a_disk_too_small_is_an_error_beforehand(tmp_path, monkeypatch):
    """What cannot fit is refused before a pixel is decoded."""
    write_images(tmp_path / "pets")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(DataError, match="larger disk"):
        load_data(tmp_path / "pets", cache=tmp_path / "cache", memory_cap=0)


def test_bad_folders_name_what_is_wrong(tmp_path):
    """Each way to spoil a folder is one error that names the file or folder."""
    for number, (spoil, match) in enumerate(
        [
            (lambda root: (root / "owl").mkdir(), "of every class, got none in owl"),
            (lambda root: (root / "cat/list.txt").write_text("x"), r"got cat/list\.txt; convert"),
            (lambda root: Image.new("L", (8, 9)).save(root / "1.png"), "inside class folders"),
            (lambda root: (root / "dog/z.png").symlink_to(root / "gone"), "z.png"),
            (lambda root: (root / "dog/z.png").write_bytes(b"GIF89a"), "z.png: expected"),
            (lambda root: Image.new("I;16", (8, 9)).save(root / "dog/z.png"), "8 bits"),
        ]
    ):
        root = tmp_path / str(number)
        write_images(root)
        spoil(root)
        with pytest.raises(DataError, match=match):
            load_data(root)


def test_one_class_is_refused(tmp_path):
    """A single class folder is no classification."""
    write_images(tmp_path / "one", classes=("cat",))
    with pytest.raises(DataError, match="at least two class folders"):
        load_data(tmp_path / "one")


def test_different_classes_in_train_and_test_are_refused(tmp_path):
    """The class that only one of them has is named."""
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", classes=("cat", "owl"))
    with pytest.raises(DataError, match=r"\['dog', 'owl'\]"):
        load_data(tmp_path)


def test_a_single_image_of_a_class_cannot_be_split(tmp_path):
    """It would be missing on one side."""
    write_images(tmp_path, count=1)
    with pytest.raises(DataError, match="at least 2 images of class 'cat'"):
        load_data(tmp_path)


@pytest.mark.parametrize("side", [11_586, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, side):
    """A small file that claims a huge image is refused before it is decoded."""
    path = next(iter(write_images(tmp_path)))
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", side, side)  # the size in the IHDR chunk, and its CRC
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    with pytest.raises(DataError, match="make it smaller") as caught:
        load_data(tmp_path)
    assert f"expected at most {1 << 27} pixels, got " in str(caught.value)
    assert "limit" not in str(caught.value)


@pytest.mark.parametrize("name", ["0.png", "z.jpg"])
def test_a_pipe_among_the_images_is_said_to_be_one(tmp_path, name):
    """It is not damaged, and nobody waits for what it may bring."""
    write_images(tmp_path)
    path = tmp_path / "cat" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(DataError) as caught:
        load_data(tmp_path)
    told = "expected a regular file, got a pipe; replace or remove it"
    assert str(caught.value) == f"{path}: {told}"
