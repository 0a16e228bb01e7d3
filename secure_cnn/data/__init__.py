"""Image data sets as uint8 tensors, and the batches that are cut from them.

`load_data` reads named sets, folders of class folders and `.npz` files into one `ImageData`, whose
splits are map-style data sets with values in [0, 1]. Not here: anything about models, and any
statistic of the data (a model's input normalisation is fixed; see `secure_cnn.models`).
"""

from collections.abc import Callable
from pathlib import Path

from secure_cnn.data.batches import Augmentation, ShuffledBatches
from secure_cnn.data.folder import folder_source
from secure_cnn.data.named import NAMES, named_source
from secure_cnn.data.npz import npz_source
from secure_cnn.data.reading import ImageReading
from secure_cnn.data.source import Source
from secure_cnn.data.split import DataSpec, ImageData, Split
from secure_cnn.data.store import decode, default_cache
from secure_cnn.errors import DataError
from secure_cnn.printable import Terminal

__all__ = [
    "Augmentation",
    "DataSpec",
    "ImageData",
    "ImageReading",
    "ShuffledBatches",
    "Split",
    "load_data",
]

_AS_THEY_ARE = ImageReading()


def _told(remark: str) -> None:
    Terminal(stderr=True).print(f"note: {remark}")


def load_data(
    source: str | Path,
    *,
    reading: ImageReading = _AS_THEY_ARE,
    groups: str | Path | None = None,
    cache: Path | None = None,
    memory_cap: int = 2 << 30,
    test_fraction: float = 0.2,
    seed: int = 0,
    tell: Callable[[str], None] = _told,
) -> ImageData:
    """Load a data set by name, from a folder of class folders, or from a `.npz` file.

    A set larger than `memory_cap` is decoded once into a file in `cache`, and mapped from there,
    now and by later calls. The file is copy-on-write: what is done to the tensors does not reach
    it. Old files in `cache` may be deleted at any time. What takes more than a second has a
    progress bar, on standard error where that is a terminal.

    Args:
        source: `"digits"`, `"mnist"`, `"fashion-mnist"` or `"cifar10"`; or the path of a folder
            (`<class>/*.jpg`, or both `train/<class>/…` and `test/<class>/…` or `val/<class>/…`;
            PNG, JPEG, WebP, BMP or TIFF); or of a `.npz` file with `images` and `labels`, and
            perhaps `test_images` and `test_labels` (`secure_cnn.data.npz` says in which form). A
            name wins over a path: write `./digits`.
        reading: What each image of a folder becomes; its `size` is refused where other sources
            have images of another.
        groups: Whose the images are: `"folder"` where the folders inside class folders are persons
            (`<class>/<person>/*.jpg`), or a CSV file (`secure_cnn.data.groups` says in which form).
            Then all images of a person are on one side of the split. A `.npz` file may have them
            itself.
        cache: Where downloads and decoded pixels go; `$SECURE_CNN_CACHE` or `~/.cache/secure-cnn`.
            Asked for only when there is something to keep.
        memory_cap: Bytes of pixels, of both splits together, that are kept in memory.
        test_fraction: Share of each class to test on, in (0, 1), where the source has no test set.
        seed: Decides that split, at least 0.
        tell: Called with each remark about the images, such as that some are transparent, or in
            both parts; prints it on standard error by default. Remarks are figures of the images
            that no epsilon covers.

    Returns:
        The training and the test split, and what they have in common.

    Raises:
        DataError: The source is missing, damaged or not of its form, or the cache cannot hold it.
            The message names the file and says what to do. Nothing half-written stays behind.

    Example:
        A folder of photographs is `load_data("pets", reading=ImageReading(size=64))`.

        >>> data = load_data("digits")
        >>> data.train, data.spec.channels, data.spec.classes[:3]
        (Split(1438 images, 1x8x8), 1, ('0', '1', '2'))
    """
    cache = default_cache() if cache is None else cache
    persons = None if groups is None else str(groups)
    described = _describe(
        source, reading, persons, cache=cache, test_fraction=test_fraction, seed=seed
    )
    asked = (reading.channels or described.shape[0], *(reading.shape or described.shape[1:]))
    if asked != described.shape:
        shape, found = ("x".join(map(str, sides)) for sides in (asked, described.shape))
        raise DataError(
            f"{source}: expected images of {shape} (channels x height x width), got {found}; only "
            "the images of a folder are brought to another size (image_size)"
        )
    return decode(described, cache, memory_cap, tell)


def _describe(
    source: str | Path,
    reading: ImageReading,
    groups: str | None,
    *,
    cache: Path | None,
    test_fraction: float,
    seed: int,
) -> Source:
    if isinstance(source, str) and source in NAMES:
        if groups is not None:
            raise DataError(
                f"{source}: expected no groups, got {groups}: nobody says whose the images of this "
                "data set are"
            )
        return named_source(source, cache=cache, test_fraction=test_fraction, seed=seed)
    path = _expanded(source)
    if path.is_dir():
        return folder_source(
            path,
            reading=reading,
            groups=groups,
            cache=cache,
            test_fraction=test_fraction,
            seed=seed,
        )
    if path.is_file() and path.suffix.lower() == ".npz":
        return npz_source(path, groups=groups, test_fraction=test_fraction, seed=seed)
    raise DataError(
        f"{source}: expected one of {', '.join(NAMES)}, a folder of class folders, or a .npz file, "
        f"got {'another kind of file' if path.exists() else 'a path where nothing is'}"
    )


def _expanded(source: str | Path) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"{source}: expected a path, got one in a home directory that nobody has ({error}); "
            "write the whole path"
        ) from error
