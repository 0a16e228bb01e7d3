"""The data sets that have a name: digits, mnist, fashion-mnist and cifar10.

Files are looked for in the system's data folder, then in the cache, and are downloaded only when
they are in neither. A download is pinned by size and SHA-256, so that it does not matter whom the
bytes come from; a file that somebody put there is not (Debian packs Fashion-MNIST anew), but its
format, sizes and labels are checked.
"""

import hashlib
import http.client
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import DownloadColumn, Progress
from sklearn.datasets import load_digits

from secure_cnn.data.binary import MNIST_FILES, cifar_source, mnist_source
from secure_cnn.data.source import Source, key_of, stratified_split
from secure_cnn.data.store import needed
from secure_cnn.errors import DataError
from secure_cnn.files import new_file, write_at
from secure_cnn.printable import Terminal

__all__ = ["NAMES", "RemoteFile", "download", "named_source"]

_DIGITS = tuple("0123456789")
_CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_CIFAR = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
_SYSTEM = Path("/usr/share/datasets")
_TIMEOUT = 15.0  # seconds without a byte before a mirror is given up
_CHUNK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file that mirrors offer, and what it must be."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Remote:
    classes: tuple[str, ...]
    files: tuple[RemoteFile, ...]
    mirrors: tuple[str, ...]
    package: str | None = None


def _mnist_files(*pinned: tuple[int, str]) -> tuple[RemoteFile, ...]:
    return tuple(
        RemoteFile(name=name, size=size, sha256=sha256)
        for name, (size, sha256) in zip(MNIST_FILES, pinned, strict=True)
    )


# Sizes and digests: TensorFlow Datasets' `url_checksums`.
_REMOTE = {
    "mnist": _Remote(
        classes=_DIGITS,
        files=_mnist_files(
            (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        ),
        mirrors=(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
    ),
    "fashion-mnist": _Remote(
        classes=tuple(_CLOTHES.split(",")),
        files=_mnist_files(
            (26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        ),
        mirrors=(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        package="dataset-fashion-mnist",
    ),
    "cifar10": _Remote(
        classes=tuple(_CIFAR.split(",")),
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
    paths, classes = _locate(name, cache), _REMOTE[name].classes
    if name == "cifar10":
        return cifar_source(name, paths[0], classes)
    return mnist_source(name, paths, classes)


def download(file: RemoteFile, mirrors: Sequence[str], folder: Path) -> Path:
    """Fetches `file` into `folder` from the first mirror (a URL that ends in a slash) that has it.

    The file appears under its name only when it is complete and its digest is right; otherwise
    there is one `DataError` with what every mirror said.
    """
    failures = []
    for mirror in mirrors:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _fetch(file, mirror + file.name, folder)
        except (OSError, http.client.HTTPException, DataError) as error:
            failures.append(f"{mirror + file.name}: {error}")
    raise DataError(", then ".join(failures))


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
        ids=[str(row) for row in rows.tolist()],
    )


def _locate(name: str, cache: Path | None) -> list[Path]:
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


def _fetch(file: RemoteFile, url: str, folder: Path) -> Path:
    """Fetch one URL; the file appears once its digest is right."""
    path = folder / file.name
    with new_file(path, overwrite=True, mode=0o600) as fd:
        # The table above holds only http and https addresses, never the user's.
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:  # noqa: S310
            digest = _copy(response, fd, file)
        if digest != file.sha256:
            raise DataError(f"expected SHA-256 {file.sha256}, got {digest}")
    return path


def _copy(response: http.client.HTTPResponse, fd: int, file: RemoteFile) -> str:
    """Copy at most one byte more than is expected; the SHA-256 of what came."""
    digest, taken = hashlib.sha256(), 0
    columns = (*Progress.get_default_columns(), DownloadColumn())
    with Progress(*columns, console=Terminal(stderr=True, wrap=True)) as progress:
        task = progress.add_task(f"downloading {file.name}", total=file.size)
        while data := response.read(min(_CHUNK, file.size + 1 - taken)):
            write_at(fd, memoryview(data), taken)
            digest.update(data)
            taken += len(data)
            progress.advance(task, len(data))
    return digest.hexdigest()
