"""Whose the images are: persons by the folders inside class folders, by a CSV file, by an array.

    pets/cat/ann/1.jpg, pets/dog/ann/2.jpg, pets/dog/bob/3.jpg     "folder": ann and bob
    path,person                                                    a CSV file beside a folder,
    cat/1.jpg,ann                                                  its paths from that folder on
    index,person                                                   a CSV file beside a `.npz` file,
    0,ann                                                          its rows from 0 on, test's last

One name is one person, in whatever class it comes, however its accents are encoded. A person's
images are on one side of a split.
"""

import csv
import io
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secure_cnn.data.source import Labels, some, unusable
from secure_cnn.errors import DataError
from secure_cnn.files import reading

__all__ = ["BY_FOLDER", "one_name", "persons_of_files", "persons_of_rows", "split_by_person"]

BY_FOLDER = "folder"
"""What stands for the folders' own level in the place of a CSV file."""
_MOST_BYTES = 1 << 28


def one_name(person: str) -> str:
    r"""A person's name in one encoding of its accents, without blanks around it.

    What looks alike is not two persons; `privacy.persons` has the same rule for ids that are text.
    Files that were moved from a Mac have `é` as two characters, others as one.

    Example:
        >>> one_name("Andre\u0301") == one_name("Andr\u00e9")
        True
    """
    return unicodedata.normalize("NFC", person).strip()


def persons_of_files(
    root: Path, files: Sequence[Path], folders: Sequence[str], groups: str | None
) -> list[str] | None:
    """The person of each image below `root`; None where nobody says.

    `folders` names the folder inside the class folder that each lies in, or is empty. Where nothing
    is asked for, these may be persons: an image that lies in none is then somebody of its own.
    """
    if groups is not None and groups != BY_FOLDER:
        found = _read(Path(groups), "path")
        return _looked_up(found, [file.relative_to(root).as_posix() for file in files], groups)
    alone = [file.relative_to(root).as_posix() for file, of in zip(files, folders, strict=True)
             if not of]  # fmt: skip
    if groups == BY_FOLDER and alone:
        raise DataError(
            f"{root}: expected a folder for each person inside every class folder, such as "
            f"cat/ann/1.jpg, got {len(alone)} images in none: {some(alone)}; move them, or name a "
            "CSV file with the columns path,person (--groups FILE.csv)"
        )
    if len(alone) == len(files):
        return None
    return [one_name(of or f"/{file}") for file, of in zip(files, folders, strict=True)]


def persons_of_rows(path: Path, count: int, groups: str | None) -> list[str] | None:
    """The person of each of `count` rows of the `.npz` file `path`, by a CSV file."""
    if groups is None:
        return None
    if groups == BY_FOLDER:
        raise DataError(
            f"{path}: expected a CSV file of its rows' persons, got folder, which a folder of "
            "images has; or save an array groups (and test_groups) in the file, one id an image"
        )
    return _looked_up(_read(Path(groups), "index"), [str(row) for row in range(count)], groups)


def split_by_person(
    labels: Labels,
    classes: tuple[str, ...],
    persons: Sequence[str],
    source: object,
    *,
    test_fraction: float,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted indices of the training and the test examples, all of a person on one side.

    About the share of each class is held out that `test_fraction` says, as far as whole persons
    allow; each class is on either side. Deterministic in `seed`.
    """
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, person in enumerate(persons):
        rows_of[person].append(row)
    totals = np.bincount(labels, minlength=len(classes))
    wanted = np.maximum(1, np.round(test_fraction * totals)).astype(np.int64)
    held = np.zeros_like(wanted)
    test: list[int] = []
    random = np.random.Generator(np.random.PCG64(seed))
    for number in random.permutation(len(rows_of)):
        rows = list(rows_of.values())[number]
        counts = np.bincount(labels[rows], minlength=len(classes))
        # Whoever fills a gap at least as much as they overfill another class.
        useful = 2 * np.minimum(counts, wanted - held).clip(min=0).sum() >= counts.sum()
        if useful and ((held + counts < totals) | (counts == 0)).all():
            test += rows
            held += counts
    missing = [name for name, count in zip(classes, held, strict=True) if count == 0]
    if missing:
        raise DataError(
            f"{source}: expected images of every class by two persons at least, one to train and "
            f"one to test on, got too few of {some(missing)}; add persons, or bring a test set of "
            "other persons"
        )
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[test] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _read(path: Path, key: str) -> dict[str, str]:
    """The person of each path or index of a CSV file."""
    expected = f"a CSV file with the columns {key},person"
    cure = "write one, in UTF-8, with its first line as these names"
    with unusable(path, OSError, UnicodeDecodeError, csv.Error, expected=expected, cure=cure):
        with reading(path) as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise DataError(f"{path}: expected at most {_MOST_BYTES} bytes of a CSV file, got more")
        table = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        names = table.fieldnames or ()
        if key not in names or "person" not in names:
            raise DataError(f"{path}: expected {expected}, got {some(list(names))}; {cure}")
        found: dict[str, str] = {}
        for line in table:
            where, person = (line[key] or "").strip(), (line["person"] or "").strip()
            if not where or not person:
                raise DataError(
                    f"{path}: line {table.line_num}: expected a {key} and a person; who is not "
                    "known is a person of their own: give them a name that nobody else has"
                )
            person = one_name(person)
            if found.setdefault(where, person) != person:
                raise DataError(
                    f"{path}: line {table.line_num}: expected one person of {where}, got two; keep "
                    "one"
                )
    return found


def _looked_up(found: dict[str, str], wanted: list[str], groups: str) -> list[str]:
    """The person of each; refuses images that the file does not have, and rows without image."""
    missing = [each for each in wanted if each not in found]
    if missing:
        raise DataError(
            f"{groups}: expected a person for each of {len(wanted)} images, got none for "
            f"{len(missing)}: {some(missing)}; add them"
        )
    strange = sorted(found.keys() - set(wanted))
    if strange:
        raise DataError(
            f"{groups}: expected rows for images that are there, got {len(strange)} others: "
            f"{some(strange)}; correct or remove them"
        )
    return [found[each] for each in wanted]
