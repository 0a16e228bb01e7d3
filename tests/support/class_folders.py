"""Folders of class folders of random images, and the pixels that were written."""

import numpy as np
from PIL import Image


def write_images(folder, classes=("cat", "dog"), count=5, mode="RGB", size=(8, 9), suffix="png"):
    """A folder of class folders of random images; the pixels that were written, by file."""
    random = np.random.default_rng(0)
    pixels = {}
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
            array = random.integers(0, 256, shape, dtype=np.uint8)
            path = folder / name / f"{number}.{suffix}"
            Image.fromarray(array).save(path)
            pixels[path] = array
    return pixels
