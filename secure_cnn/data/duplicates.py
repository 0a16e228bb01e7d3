"""The same image twice: in the training and the test part, or in two classes.

An image that was trained on says nothing when it is tested on, and one of two classes is wrong in
one of them. Only equal pixels are found: a copy that was cropped or saved anew is not.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

from secure_cnn.data.source import Labels, Pixels

__all__ = ["Duplicates"]


class Duplicates:
    """Looks for equal images as they pass; a class because it keeps a digest of each.

    Digests have 64 bits: that two of a million images meet by chance has a probability of 3e-8, and
    nothing but a remark follows from it.
    """

    def __init__(self, labels: Labels, train_count: int) -> None:
        self._labels, self._train_count = labels, train_count
        self._digests = np.zeros(len(labels), np.uint64)

    def add(self, start: int, images: Pixels) -> None:
        """Takes images `[k, channels, height, width]`, of which the first has the row `start`."""
        self._digests[start : start + len(images)] = [
            int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest())
            for image in images
        ]

    def remarks(self) -> Iterator[str]:
        """A sentence on each kind that was found, once all images have passed."""
        train, test = np.split(self._digests, [self._train_count])
        again = int(np.isin(test, train).sum())
        if again:
            yield (
                f"{again} of {len(test)} test images are among the training images too, so that "
                "accuracy looks better than it is; remove the copies, or keep copies of one image "
                "on one side"
            )
        _, inverse = np.unique(self._digests, return_inverse=True)
        first = np.full(inverse.max() + 1, len(self._labels), np.int64)
        last = np.full(inverse.max() + 1, -1, np.int64)
        np.minimum.at(first, inverse, self._labels)
        np.maximum.at(last, inverse, self._labels)
        divided = int((first < last)[inverse].sum())
        if divided:
            yield (
                f"{divided} images are in more than one class, as the same pixels under another "
                "label; one of the labels is wrong"
            )
