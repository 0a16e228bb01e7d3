"""`secure_cnn.data.named`: IDX files and the CIFAR archive, where they are found, and downloads."""

import gzip
import hashlib
import io
import os
import struct
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from secure_cnn.data import binary, load_data, named
from secure_cnn.data.named import RemoteFile, download
from secure_cnn.errors import DataError

FASHION = Path("/usr/share/datasets/fashion-mnist")


def write_idx(path, array, *, magic=None, cut=0):
    """A gzipped IDX file of `array`, with another magic number or cut short if asked."""
    header = magic or bytes([0, 0, 8, array.ndim])
    data = header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data[: len(data) - cut]))


def write_mnist(folder, **broken):
    """The four files of MNIST with 20 and 10 images; `broken` is for the training images."""
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 20), ("t10k", 10)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        arrays[part] = images, labels
        write_idx(
            folder / f"{part}-images-idx3-ubyte.gz", images, **(broken if part == "train" else {})
        )
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return arrays


def write_cifar(path, names=binary.CIFAR_TRAIN[::-1] + binary.CIFAR_TEST, record=3073):
    """A small CIFAR archive, its files not in order; the records in each."""
    random = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    records = {}
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            array = random.integers(0, 256, (10, record), dtype=np.uint8)
            array[:, 0] = np.arange(10)
            member = tarfile.TarInfo(name)
            member.size = array.nbytes
            archive.addfile(member, io.BytesIO(array.tobytes()))
            records[name] = array
    return records


@pytest.fixture
def closed_network(monkeypatch):
    """No address answers."""

    def refuse(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_mnist_in_the_cache_is_read(tmp_path):
    """Pixels and labels of the IDX files arrive as written."""
    arrays = write_mnist(tmp_path / "mnist")
    data = load_data("mnist", cache=tmp_path)
    assert (data.train.images[:, 0].numpy() == arrays["train"][0]).all()
    assert (data.test.labels.numpy() == arrays["t10k"][1]).all()


def test_mapped_mnist_equals_mnist_in_memory(tmp_path, monkeypatch):
    """Also when it is read a few images at a time."""
    write_mnist(tmp_path / "mnist")
    want = load_data("mnist", cache=tmp_path).fingerprint
    monkeypatch.setattr("secure_cnn.data.source.CHUNK_BYTES", 3000)
    assert load_data("mnist", cache=tmp_path, memory_cap=0).fingerprint == want


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        ({"cut": 1}, "truncated"),
        ({"cut": 28 * 28 * 20 + 3}, "truncated"),
        ({"magic": b"\0\0\x0d\x03"}, "magic number"),
        ({"magic": b"\0\0\x08\x01"}, "magic number"),
    ],
)
def test_bad_idx_files_are_refused(tmp_path, broken, match):
    """Truncation and a wrong magic number are one error that names the file."""
    write_mnist(tmp_path / "mnist", **broken)
    with pytest.raises(DataError, match=match) as caught:
        load_data("mnist", cache=tmp_path)
    assert "train-images-idx3-ubyte.gz" in str(caught.value)


def test_contradicting_idx_files_are_refused(tmp_path):
    """Labels outside the classes, too few labels, other sizes, and bytes at the end."""
    labels = tmp_path / "mnist/train-labels-idx1-ubyte.gz"
    images = tmp_path / "mnist/train-images-idx3-ubyte.gz"
    for path, array, match in (
        (labels, np.full(20, 10, np.uint8), "expected labels in 0..9"),
        (labels, np.zeros(20, np.uint8), "none of"),
        (labels, np.zeros(19, np.uint8), "expected 20 labels"),
        (images, np.zeros((20, 28, 27), np.uint8), "28x28"),
        (images, np.zeros((0, 28, 28), np.uint8), "filled"),
    ):
        write_mnist(tmp_path / "mnist")
        write_idx(path, array)
        with pytest.raises(DataError, match=match):
            load_data("mnist", cache=tmp_path)
    write_mnist(tmp_path / "mnist")
    images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes()) + b"x"))
    with pytest.raises(DataError, match="expected its end"):
        load_data("mnist", cache=tmp_path)


@pytest.mark.parametrize("length", [0, 5, 100, 1000])
def test_a_truncated_gzip_file_is_refused(tmp_path, length):
    """A download that broke off is told apart from a whole file."""
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match="fresh copy"):
        load_data("mnist", cache=tmp_path)


def test_cifar_is_read_in_its_own_order(tmp_path):
    """Whatever the order in the archive, batch 1 comes first; channels are planes."""
    records = write_cifar(tmp_path / "cifar10/cifar-10-binary.tar.gz")
    data = load_data("cifar10", cache=tmp_path)
    train = np.concatenate([records[name] for name in binary.CIFAR_TRAIN])
    assert (data.train.images.numpy() == train[:, 1:].reshape(-1, 3, 32, 32)).all()
    assert (data.train.labels.numpy() == train[:, 0]).all()
    assert len(data.test) == 10
    mapped = load_data("cifar10", cache=tmp_path, memory_cap=0)
    assert mapped.fingerprint == data.fingerprint


def test_bad_cifar_archives_are_refused(tmp_path):
    """A missing file, records of another length, a broken archive, another kind of file."""
    path = tmp_path / "cifar10/cifar-10-binary.tar.gz"
    for spoil, match in (
        (lambda: write_cifar(path, binary.CIFAR_TRAIN), "test_batch.bin"),
        (lambda: write_cifar(path, record=3072), "records of 3073 bytes"),
        (lambda: write_cifar(path) and os.truncate(path, 50_000), "truncated"),
        (lambda: path.write_bytes(b"PK\3\4" * 300), "truncated"),
    ):
        spoil()
        with pytest.raises(DataError, match=match):
            load_data("cifar10", cache=tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_without_files_and_network_the_error_says_what_to_do(
    tmp_path, name, closed_network, monkeypatch
):
    """One error with the folder to put the files in and, if there is one, the package."""
    monkeypatch.setattr(named, "_SYSTEM", tmp_path / "system")
    with pytest.raises(DataError, match="put ") as caught:
        load_data(name, cache=tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert ("dataset-fashion-mnist" in str(caught.value)) == (name == "fashion-mnist")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_cache_folder_follows_the_environment(tmp_path, closed_network, monkeypatch):
    """`$SECURE_CNN_CACHE` is the default cache."""
    monkeypatch.setenv("SECURE_CNN_CACHE", str(tmp_path))
    write_mnist(tmp_path / "mnist")
    assert load_data("mnist").name == "mnist"


def test_without_a_home_only_what_is_kept_needs_a_folder(tmp_path, closed_network, monkeypatch):
    """A container's user has no HOME and no entry: digits load, and the rest say what to set."""

    def nobody(_uid):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("SECURE_CNN_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(named, "_SYSTEM", tmp_path / "system")
    assert len(load_data("digits").train) == 1438
    for name, cap in (("mnist", 2 << 30), ("digits", 0)):
        with pytest.raises(DataError, match="no home directory; set SECURE_CNN_CACHE"):
            load_data(name, memory_cap=cap)
    with pytest.raises(DataError, match="write the whole path"):
        load_data("~/pets")
    monkeypatch.setenv("SECURE_CNN_CACHE", str(tmp_path))
    write_mnist(tmp_path / "mnist")
    assert load_data("mnist").name == "mnist"


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_of_the_system_is_whole(tmp_path):
    """The installed files are the 60 000 and 10 000 published images, ten equal classes."""
    data = load_data("fashion-mnist", cache=tmp_path)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert torch.bincount(data.train.labels).tolist() == [6_000] * 10
    # Published in torchvision and elsewhere: mean 0.2860, standard deviation 0.3530.
    pixels = data.train.images.float() / 255
    assert float(pixels.mean()) == pytest.approx(0.2860, abs=1e-4)
    assert float(pixels.std()) == pytest.approx(0.3530, abs=1e-4)


class TestDownload:
    CONTENT = b"the file"

    @pytest.fixture
    def mirrors(self, monkeypatch):
        """Two mirrors: what the first sends is up to the test, the second sends the file."""
        answers = {"https://a/x": b"", "https://b/x": self.CONTENT}

        def answer(url, timeout):
            assert timeout > 0
            if isinstance(answers[url], Exception):
                raise answers[url]
            return io.BytesIO(answers[url])

        monkeypatch.setattr("urllib.request.urlopen", answer)
        return answers

    def remote(self):
        """The file that is asked for."""
        return RemoteFile(
            name="x", size=len(self.CONTENT), sha256=hashlib.sha256(self.CONTENT).hexdigest()
        )

    @pytest.mark.parametrize(
        "first", [b"the evil", b"the file and more", b"the", TimeoutError("slow")]
    )
    def test_a_bad_mirror_is_passed_over(self, tmp_path, mirrors, first):
        """Another content, more, less or nothing: the next mirror is asked."""
        mirrors["https://a/x"] = first
        path = download(self.remote(), ("https://a/", "https://b/"), tmp_path / "new")
        assert path.read_bytes() == self.CONTENT
        assert list(path.parent.iterdir()) == [path]

    def test_without_a_good_mirror_nothing_is_left(self, tmp_path, mirrors):
        """The error says what each mirror sent, and no file appears."""
        mirrors["https://b/x"] = TimeoutError("slow")
        with pytest.raises(DataError, match=r"https://a/x: expected SHA-256 .*https://b/x: slow"):
            download(self.remote(), ("https://a/", "https://b/"), tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_an_endless_answer_ends(self, tmp_path, monkeypatch):
        """No more than one byte beyond the promised size is ever read."""
        stream = io.BytesIO(b"x" * 10_000)
        monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: stream)
        monkeypatch.setattr(stream, "close", lambda: None, raising=False)
        with pytest.raises(DataError, match="SHA-256"):
            download(self.remote(), ("https://a/",), tmp_path)
        assert stream.tell() == len(self.CONTENT) + 1
