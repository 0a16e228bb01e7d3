"""Which images a folder holds, and of which class: everything about it but the images themselves.

    pets/cat/1.jpg, pets/dog/2.png, …                          split by the seed, class by class
    pets/train/cat/1.jpg, …, pets/test/cat/9.png, …            split as it is

`val`, `valid` or `validation` stand for `test` where there is no `test`; upper case is no
difference. What hides (`.name`) and what systems leave behind (`Thumbs.db`, `__MACOSX`) is passed
over; a folder that holds nothing but one folder is that folder; folders inside a class folder
belong to the class. Anything else that is no image is refused, so that nothing is left out
silently.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from secure_cnn.data import source
from secure_cnn.data.source import Labels
from secure_cnn.errors import DataError

__all__ = ["SUFFIXES", "Layout", "Listing", "folder_layout"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
"""Endings of the files that are images, in lower case."""

_TRAIN = ("train", "training")
_TEST = ("test", "testing")
_VALIDATION = ("val", "valid", "validation")
_CLUTTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "icon\r", "@eadir")
_DEEPEST = 4  # folders inside a class folder, and around the class folders
_EXAMPLE = "such as {0}/cat/1.jpg and {0}/dog/2.jpg, or {0}/train/cat/1.jpg and {0}/test/cat/2.jpg"


@dataclass(frozen=True, kw_only=True, eq=False)
class Listing:
    """Images with their labels, in the order of their paths.

    `folders` names the folder inside the class folder that each lies in; empty where in none.
    """

    classes: tuple[str, ...]
    files: list[Path]
    labels: Labels
    folders: list[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """The images to train on, and those to test on where the folder sets them apart.

    `remarks` say what was passed over or understood that a reader might have meant otherwise.
    """

    train: Listing
    test: Listing | None
    remarks: list[str] = field(default_factory=list)


def folder_layout(root: Path) -> Layout:
    """What is below `root`; no image is opened.

    Raises:
        DataError: The folder has another form, holds what is no image, or cannot be read.
    """
    top = _unwrapped(root)
    folders = [entry for entry in _visible(top) if entry.is_dir()]
    train, tests = _part(folders, _TRAIN), [_part(folders, _TEST), _part(folders, _VALIDATION)]
    test = tests[0] or tests[1]
    if train is None or test is None:
        if test is not None and len(folders) == sum(part is not None for part in tests):
            raise DataError(
                f"{top}: expected train/ beside {test.name}/, got none; bring training images, or "
                "give the folder of the classes itself"
            )
        return Layout(train=_listed(top), test=None)
    return _given_split(top, folders, train, test)


def _given_split(top: Path, folders: list[Path], train: Path, test: Path) -> Layout:
    """Both parts as they are; they must have the same classes."""
    others = [f"{entry.name}/" for entry in folders if entry not in (train, test)]
    remarks = []
    if others:
        remarks.append(
            f"{source.some(others)} beside {train.name}/ and {test.name}/ is not read: training is "
            f"on {train.name}/, testing on {test.name}/"
        )
    elif test.name.lower() in _VALIDATION:
        remarks.append(f"{test.name}/ is what the model is tested on; there is no test/")
    parts = [_listed(_unwrapped(part)) for part in (train, test)]
    layout = Layout(train=parts[0], test=parts[1], remarks=remarks)
    assert layout.test is not None
    if layout.train.classes != layout.test.classes:
        only = sorted(set(layout.train.classes) ^ set(layout.test.classes))
        raise DataError(
            f"{top}: expected the same class folders in {train.name}/ and {test.name}/, "
            f"got {only} in one of them only"
        )
    return layout


def _part(folders: Sequence[Path], names: tuple[str, ...]) -> Path | None:
    """The folder of one part of the data, by any of its usual names."""
    found = [folder for folder in folders if folder.name.lower() in names]
    if len(found) > 1:
        raise DataError(
            f"{found[0].parent}: expected one folder of {names[0]} images, got "
            f"{' and '.join(folder.name for folder in found)}; join them, or remove one"
        )
    return found[0] if found else None


def _unwrapped(root: Path) -> Path:
    """The folder itself, or the one that it wraps, as archives do when they are unpacked."""
    top = root
    for _ in range(_DEEPEST):
        entries = _visible(top)
        folders = [entry for entry in entries if entry.is_dir()]
        if len(folders) != 1 or any(map(_is_image, entries)):
            return top
        if not any(entry.is_dir() for entry in _visible(folders[0])):
            return top  # a class folder, the only one
        top = folders[0]
    return top


def _listed(root: Path) -> Listing:
    """The class folders below `root` and their images."""
    entries = _visible(root)
    folders = [entry for entry in entries if entry.is_dir()]
    for folder in folders:
        source.check_name(folder.name, f"{folder}: the name of the class folder")
    stray = [entry for entry in entries if _is_image(entry)]
    if stray and folders:
        raise DataError(
            f"{root}: expected images inside class folders only, got {_names(stray, root)} beside "
            "them; move each into its class folder"
        )
    if len(folders) < 2:
        got = "one: " + folders[0].name if folders else "none"
        got = f"{len(stray)} images directly in it" if stray else got
        raise DataError(
            f"{root}: expected at least two class folders of images, got {got}; put each class "
            f"into a folder of its own, {_EXAMPLE.format(root.name or root)}"
        )
    members = [list(_inside(folder)) for folder in folders]
    _check_members(root, folders, members)
    return Listing(
        classes=tuple(folder.name for folder in folders),
        files=[file for files in members for file in files],
        labels=np.repeat(np.arange(len(folders)), [len(files) for files in members]),
        folders=[
            "" if file.parent == top else file.relative_to(top).parts[0]
            for files, top in zip(members, folders, strict=True)
            for file in files
        ],
    )


def _check_members(root: Path, folders: list[Path], members: list[list[Path]]) -> None:
    """Refuses, all at once, files that are no images, and classes without any."""
    strangers = [file for files in members for file in files if not _is_image(file)]
    if strangers:
        raise DataError(
            f"{root}: expected only images ({', '.join(SUFFIXES)}) in class folders, got "
            f"{_names(strangers, root)}; convert them, say to JPEG or PNG, or move them elsewhere"
        )
    empty = [folder for folder, files in zip(folders, members, strict=True) if not files]
    if empty:
        raise DataError(
            f"{root}: expected images of every class, got none in {_names(empty, root)}; add some, "
            "or remove the folder"
        )


def _inside(folder: Path, depth: int = 0) -> Iterator[Path]:
    """All files in a class folder, those of its own folders too."""
    if depth > _DEEPEST:
        raise DataError(
            f"{folder}: expected at most {_DEEPEST} folders inside a class folder; move its "
            "images up"
        )
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _inside(entry, depth + 1)
        else:
            yield entry


def _visible(folder: Path) -> list[Path]:
    with source.unusable(
        folder, OSError, expected="a folder that can be read", cure="look at its permissions"
    ):
        return sorted(
            entry
            for entry in folder.iterdir()
            if not entry.name.startswith(".") and entry.name.lower() not in _CLUTTER
        )


def _is_image(entry: Path) -> bool:
    return entry.suffix.lower() in SUFFIXES and not entry.is_dir()


def _names(entries: Sequence[Path], root: Path) -> str:
    return source.some([entry.relative_to(root).as_posix() for entry in entries])
