"""The data sets that have a name: digits, mnist, fashion-mnist and cifar10.

Files are looked for in the system's data folder, then in the cache, and are downloaded only when
they are in neither. A download is pinned by SHA-256; a file that somebody put there is not (Debian
packs Fashion-MNIST anew), but its format, sizes and labels are checked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from secure_cnn.data import cifar, idx
from secure_cnn.data.download import RemoteFile, download
from secure_cnn.data.labels import Labels, check_labels, check_range, stratified_split
from secure_cnn.data.source import Chunk, Source, key_of
from secure_cnn.data.store import needed
from secure_cnn.errors import DataError

__all__ = ["NAMES", "named_source"]

_DIGITS = tuple("0123456789")
_SYSTEM = Path("/usr/share/datasets")
_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


@dataclass(frozen=True, kw_only=True)
class _Remote:
    """What a named data set is made of and where it can be had."""

    classes: tuple[str, ...]
    files: tuple[RemoteFile, ...]
    mirrors: tuple[str, ...]
    package: str | None = None


# Sizes and digests: TensorFlow Datasets' `url_checksums`.
_REMOTE = {
    "mnist": _Remote(
        classes=_DIGITS,
        files=tuple(
            RemoteFile(name=name, size=size, sha256=sha256)
            for name, size, sha256 in zip(
                _IDX_FILES,
                (9_912_422, 28_881, 1_648_877, 4_542),
                (
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                ),
                strict=True,
            )
        ),
        mirrors=(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
    ),
    "fashion-mnist": _Remote(
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        files=tuple(
            RemoteFile(name=name, size=size, sha256=sha256)
            for name, size, sha256 in zip(
                _IDX_FILES,
                (26_421_880, 29_515, 4_422_102, 5_148),
                (
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
                strict=True,
            )
        ),
        mirrors=(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        package="dataset-fashion-mnist",
    ),
    "cifar10": _Remote(
        classes=(
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        files=(
            RemoteFile(
                name="cifar-10-binary.tar.gz",
                size=170_052_171,
                sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        mirrors=("https://www.cs.toronto.edu/~kriz/",),
    ),
}

NAMES = ("digits", *_REMOTE)


def named_source(name: str, *, cache: Path | None, test_fraction: float, seed: int) -> Source:
    """The data set called `name`, one of `NAMES`; only `digits` is split here, by `seed`."""
    if name == "digits":
        return _digits(test_fraction, seed)
    paths = _locate(name, cache)
    return _cifar(name, paths[0]) if name == "cifar10" else _idx(name, paths)


def _digits(test_fraction: float, seed: int) -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8, whose 17 grey levels become 0..255."""
    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    rows = np.concatenate(
        split := stratified_split(labels, _DIGITS, "digits", test_fraction=test_fraction, seed=seed)
    )
    pixels = np.rint(bunch.images[rows, None] * (255 / 16)).astype(np.uint8)
    return Source(
        name="digits",
        key=key_of([], "digits", test_fraction, seed),
        classes=_DIGITS,
        labels=labels[rows],
        train_count=len(split[0]),
        shape=(1, 8, 8),
        chunks=lambda: iter([(0, pixels)]),
    )


def _locate(name: str, cache: Path | None) -> list[Path]:
    """Each file of `name`, in the order of its table; downloaded if it is nowhere."""
    remote = _REMOTE[name]
    folders = [_SYSTEM / name] if remote.package else []
    folders += [cache / name] if cache is not None else []
    paths = []
    for file in remote.files:
        present = [folder / file.name for folder in folders if (folder / file.name).is_file()]
        if not present:
            needed(cache, name)
        paths.append(present[0] if present else _obtain(name, file, folders))
    return paths


def _obtain(name: str, file: RemoteFile, folders: list[Path]) -> Path:
    """Download one file, or say everything that the user can do instead."""
    remote = _REMOTE[name]
    try:
        return download(file, remote.mirrors, folders[-1])
    except DataError as error:
        install = f"install the Debian package {remote.package}, or " if remote.package else ""
        raise DataError(
            f"{name}: expected {file.name} in {' or '.join(map(str, folders))}, it is missing, and "
            f"the download failed ({error}); {install}put "
            f"{', '.join(each.name for each in remote.files)} into {folders[-1]}"
        ) from error


def _idx(name: str, paths: list[Path]) -> Source:
    """MNIST, and what was made in its image: images and labels to train on, then to test on."""
    train = _idx_labels(name, paths[0], paths[1])
    test = _idx_labels(name, paths[2], paths[3])
    check_labels(train, _REMOTE[name].classes, paths[1])

    def chunks() -> Iterator[Chunk]:
        start = 0
        for path in (paths[0], paths[2]):
            for images in idx.read_images(path):
                yield start, images
                start += len(images)

    return Source(
        name=name,
        key=key_of(paths, name),
        classes=_REMOTE[name].classes,
        labels=np.concatenate([train, test]),
        train_count=len(train),
        shape=(1, 28, 28),
        chunks=chunks,
    )


def _idx_labels(name: str, images: Path, labels: Path) -> Labels:
    """The labels in one file, once they fit the images in the other."""
    count, *size = idx.read_shape(images, 3)
    if size != [28, 28]:
        raise DataError(f"{images}: expected images of 28x28, its header says {size}")
    values = idx.read_labels(labels)
    if len(values) != count:
        raise DataError(
            f"{labels}: expected {count} labels, one for each image in {images}, got {len(values)}"
        )
    check_range(values, _REMOTE[name].classes, labels)
    return values


def _cifar(name: str, path: Path) -> Source:
    """CIFAR-10: one pass over the archive for the labels, which are few, and one for the pixels."""
    found = cifar.read_labels(path)
    files = (*cifar.TRAIN_FILES, *cifar.TEST_FILES)
    starts, row = {}, 0
    for file in files:
        starts[file] = row
        row += len(found[file])
    labels = np.concatenate([found[file] for file in files])
    train_count = starts[cifar.TEST_FILES[0]]
    check_labels(labels[:train_count], _REMOTE[name].classes, path)
    check_range(labels[train_count:], _REMOTE[name].classes, path)
    return Source(
        name=name,
        key=key_of([path], name),
        classes=_REMOTE[name].classes,
        labels=labels,
        train_count=train_count,
        shape=cifar.SHAPE,
        chunks=lambda: cifar.read_images(path, starts),
    )
