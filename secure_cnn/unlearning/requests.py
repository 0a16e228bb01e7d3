"""Whom to forget: a CSV file of paths, rows or persons, found among the training images.

    path                 index            person
    cat/ann-1.jpg        17               ann
    dog/ann-2.jpg        4021             bob

Columns stand between commas, semicolons or tabs, and others than these are not read. Paths go from
the data's folder on; rows count from 0 in the file of a data set, those to test on last; persons
are those of the run (`--groups`).
"""

import csv
import io
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import numpy as np

from secure_cnn.data.groups import one_name
from secure_cnn.errors import RunError
from secure_cnn.files import reading
from secure_cnn.printable import printable
from secure_cnn.unlearning.inventory import Entry, Recognised, digests_of

__all__ = ["Request", "read_request"]

_MOST_BYTES = 1 << 26
_MOST_IMAGES = 1 << 12
_WORDS = {"path": "a path", "index": "an index", "person": "a person"}
_EXPECTED = (
    "a CSV file whose first line has path, index or person as one of its columns, and then one of "
    "them a line"
)
_MARKS = {",": "comma", ";": "semicolon", "\t": "tab"}
"""What stands between columns; where a comma is in numbers, spreadsheets write semicolons."""
_FROM = "; paths count from the data's folder on, as cat/1.jpg"
_LONGEST = 200
_SHOWN = 5


@final
@dataclass(frozen=True, kw_only=True)
class Request:
    """The images of those who leave.

    Attributes:
        rows: Those that are there, among the training images, ascending; every copy of one of
            theirs is with them.
        missing: Those that are not there, as the run's inventory knows them.
        left: All of them, as the inventory knows them.
        digests: By which a certificate names the request: of each person, or of each image where
            nobody said whose they are, or where a single image was missing.
        persons: The names of those who leave, where they were asked for by their names.
        copies: How many of the rows were not asked for, and hold the same image as one that was.
        tested: Rows among the test images that are theirs, or copies: these leave too.
    """

    rows: tuple[int, ...] = field(repr=False)
    missing: tuple[Entry, ...] = field(repr=False)
    left: tuple[Entry, ...] = field(repr=False)
    digests: tuple[bytes, ...] = field(repr=False)
    persons: tuple[str, ...] = field(repr=False)
    copies: int
    tested: tuple[int, ...] = field(repr=False)

    @property
    def people(self) -> int:
        """How many leave: persons, or images where nobody said whose they are."""
        return len(self.digests)

    def without_tested(self, count: int) -> list[int]:
        """Those of so many test images that stay."""
        gone = set(self.tested)
        return [row for row in range(count) if row not in gone]

    def without(self, count: int) -> list[int]:
        """Those of so many training images that stay."""
        leaving = set(self.rows)
        return [row for row in range(count) if row not in leaving]


def read_request(path: Path | None, there: Recognised, *, missing_leave: bool = False) -> Request:
    """Finds those whom a file names.

    Args:
        path: The file; None where the missing alone leave.
        there: The images of the run, and what of them is missing.
        missing_leave: Whether the training images that are missing leave too, whosever they are.

    Raises:
        RunError: The file is none of the kind; an id is not in the data, or is of a test image, on
            which nothing was trained; training images are missing that nobody asked for; or nobody
            of a class would be left.
    """
    if path is None and not (missing_leave and there.missing):
        raise RunError(
            "ids: expected a file of who leaves, got none"
            + ("; no training image is missing" if missing_leave else "")
        )
    column, ids = ("", []) if path is None else _read(path)
    persons = [one_name(each) for each in ids] if column == "person" else []
    asked, tested = _rows_of(column, persons or ids, there, path) if path else (set(), set())
    entries, theirs = there.inventory.train, {there.inventory.person(name) for name in persons}
    wanted = {entries[row].image for row in asked}
    missing = tuple(
        each
        for each in there.missing
        if missing_leave or each.image in wanted or each.person in theirs
    )
    if len(missing) != len(there.missing):
        raise RunError(_not_asked(there, missing))
    wanted |= {each.image for each in missing}
    rows = [row for row, each in enumerate(entries) if each.image in wanted]
    _check_left(rows, there, wanted)
    left = (*(entries[row] for row in rows), *missing)
    return Request(
        rows=tuple(rows),
        missing=missing,
        left=left,
        digests=tuple(_digests(left, theirs)),
        persons=tuple(dict.fromkeys(persons)),
        copies=len(rows) - len(asked),
        tested=tuple(
            row
            for row, each in enumerate(there.inventory.test)
            if row in tested or each.image in wanted or each.person in theirs
        ),
    )


def _digests(left: Sequence[Entry], theirs: set[bytes]) -> list[bytes]:
    """Each person who was asked for and had training images, and each image of nobody asked for."""
    persons = dict.fromkeys(each.person for each in left if each.person in theirs)
    copied = {each.image for each in left if each.person in theirs}
    images = dict.fromkeys(each.image for each in left if each.image not in copied)
    return [*persons, *images]


def _not_asked(there: Recognised, missing: Sequence[Entry]) -> str:
    """That training images are missing which stay, or else are to leave."""
    asked = {*missing}
    others = [each for each in there.missing if each not in asked]
    return (
        f"data: expected the training images of who stays, with their labels and persons, got "
        f"{there.data.name} without {digests_of(others)}; put them back, say where they are with "
        "--data, or let them leave too (--missing-leave)"
    )


def _check_left(rows: Sequence[int], there: Recognised, wanted: Collection[bytes]) -> None:
    """Passes if a certificate has room for them, and somebody of each class stays."""
    if len(wanted) > _MOST_IMAGES:
        raise RunError(
            f"ids: expected at most {_MOST_IMAGES} images in one request, since each is proven "
            f"absent in its certificate, got {len(wanted)}; make several requests of it"
        )
    labels, classes = there.data.train.labels.numpy(), there.data.spec.classes
    before = np.bincount(labels, minlength=len(classes))
    left = before - np.bincount(labels[rows], minlength=len(before))
    emptied = [
        name
        for name, n, was in zip(classes, left, before, strict=True)
        if not n and (was or there.missing)
    ]
    if emptied:
        raise RunError(
            f"ids: expected somebody of each class to stay, got all images of "
            f"{printable(emptied[0])}; train anew without the class"
        )


def _rows_of(
    column: str, ids: Sequence[str], there: Recognised, path: Path
) -> tuple[set[int], set[int]]:
    """The training and the test images of these ids; of the former one, there or missing."""
    data, gone = there.data, set[str]()
    if column == "person":
        if data.groups is None:
            raise RunError(
                f"{path}: expected a run that knows whose its images are, got {data.name}; name "
                "the images by path or index, or train with --groups"
            )
        names, others = data.groups, data.test_groups or ()
        absent = {each.person for each in there.missing}
        gone = {each for each in ids if there.inventory.person(each) in absent}
    else:
        count, last = len(data.train), len(data.train) + len(data.test)
        names = data.train.ids or tuple(map(str, range(count)))
        others = data.test.ids or tuple(map(str, range(count, last)))
        _check_column(column, names, path)
    rows, tested = _places(names), _places(others)
    unknown = [each for each in ids if not (each in rows or each in tested or each in gone)]
    if unknown:
        raise RunError(
            f"{path}: expected {_WORDS[column]} of {data.name}, got {_some(unknown)}, not in it; "
            "it was misspelt, or forgotten before"
            + (
                ", or its image was deleted: leave it out, and say --missing-leave"
                if there.missing
                else ""
            )
            + (_FROM if column == "path" else "")
        )
    found = {row for each in ids for row in rows.get(each, ())}
    if not found and not gone:
        raise RunError(
            f"{path}: expected training images, got {_some(ids)} of the test images: the model was "
            "not trained on them, so that there is nothing to forget; delete the images"
        )
    return found, {row for each in ids for row in tested.get(each, ())}


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each name."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return rows


def _check_column(column: str, names: Sequence[str], path: Path) -> None:
    """Paths are of folders, rows of files."""
    numbered = names[0].isdecimal()
    if numbered != (column == "index"):
        own, other = ("index", "path") if numbered else ("path", "index")
        raise RunError(f"{path}: expected the column {own} for these data, got {other}")


def _read(path: Path) -> tuple[str, list[str]]:
    """The column of a file, and what is in it, each once."""
    text = _text(path)
    first = re.split(r"[\r\n]", text, maxsplit=1)[0]
    heads = {mark: _head(first, mark) for mark in _MARKS}
    fitting = [mark for mark, head in heads.items() if len(_known(head)) == 1]
    mark = fitting[0] if fitting else ""
    if not mark or sum(len(heads[each]) > 1 for each in fitting) > 1:
        head = max(heads.values(), key=len)
        got = printable(", ".join(head)[:_LONGEST]) if any(head) else "nothing"
        raise RunError(f"{path}: expected {_EXPECTED}, got {got} in the first line")
    column, at = _known(heads[mark])[0], heads[mark].index(_known(heads[mark])[0])
    ids: dict[str, None] = {}
    for number, line in _lines(text, mark, path):
        if len(line) != len(heads[mark]):
            raise RunError(
                f"{path}: line {number}: expected as many columns as in the first line, "
                f"{len(heads[mark])}, got {len(line)}; put what holds a {_MARKS[mark]} in quotes"
            )
        if not line[at].strip():
            raise RunError(f"{path}: line {number}: expected {_WORDS[column]}, got an empty one")
        ids[line[at].strip()] = None
    if not ids:
        raise RunError(f"{path}: expected {_EXPECTED}, got none")
    return column, list(ids)


def _text(path: Path) -> str:
    """All of a file, as UTF-8, with or without a byte order mark."""
    try:
        with reading(path) as file:
            content = file.read(_MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise RunError(f"{path}: expected {_EXPECTED}, got {error}") from error
    except UnicodeDecodeError as error:
        raise RunError(
            f"{path}: expected {_EXPECTED}, got text in another encoding than UTF-8; save it as "
            "CSV UTF-8"
        ) from error
    if len(content) > _MOST_BYTES:
        raise RunError(f"{path}: expected at most {_MOST_BYTES} bytes, got more")
    return text


def _head(first: str, mark: str) -> list[str]:
    """The names of the columns in a first line, in small letters."""
    try:
        fields = next(csv.reader([first], delimiter=mark), [])
    except csv.Error:
        return []
    return [name.strip().lower() for name in fields]


def _known(head: Sequence[str]) -> list[str]:
    return [name for name in head if name in _WORDS]


def _lines(text: str, mark: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines behind the first that are not empty, with their numbers."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=mark)
    try:
        next(reader)
        for line in reader:
            if any(each.strip() for each in line):  # spreadsheets leave marks in empty rows
                yield reader.line_num, line
    except csv.Error as error:
        raise RunError(
            f"{path}: line {reader.line_num}: expected {_EXPECTED}, got {error}"
        ) from error


def _some(ids: Sequence[str]) -> str:
    more = len(ids) - _SHOWN
    return ", ".join(printable(each) for each in ids[:_SHOWN]) + (f" and {more} more" if more > 0
                                                                  else "")  # fmt: skip
