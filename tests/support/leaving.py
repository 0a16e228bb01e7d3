"""Images of noise, files of ids, and a forgetting of data that are no file."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from secure_cnn import Recipe
from secure_cnn.data import DataSpec, ImageData, Split
from secure_cnn.unlearning import forget


def data_of(count=40, *, seed=0, groups=None):
    """Random 8x8 images, no two alike, of two classes."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count + 8, 1, 8, 8), generator=random, dtype=torch.uint8)
    labels = torch.arange(count + 8) % 2
    return ImageData(
        name="noise",
        train=Split(images=images[:count], labels=labels[:count]),
        test=Split(images=images[count:], labels=labels[count:]),
        spec=DataSpec(shape=(1, 8, 8), classes=("cat", "dog")),
        groups=groups,
    )


def some_rows(data, rows):
    """The data with these rows of the training images alone."""
    rows = torch.as_tensor(rows)
    return replace(
        data,
        train=data.train.some(rows),
        groups=data.groups and tuple(data.groups[row] for row in rows.tolist()),
    )


def csv_file(path, column, ids):
    """A file of ids."""
    with Path(path).open("w", newline="") as file:
        csv.writer(file).writerows([[column], *([each] for each in ids)])
    return Path(path)


def forget_in(wanted, data, **named):
    """`forget` with data that are no file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "images", lambda _: data)
        return forget(wanted, **named)
