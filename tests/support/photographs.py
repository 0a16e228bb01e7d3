"""Small photographs of ten classes: random crops of ten real ones, and drawn textures.

Training and test crops come from strips of the photograph that do not overlap. Each crop has a
scale, a turn, a mirroring, a brightness and a contrast of its own: no pixel tells the class.
"""

from pathlib import Path

import numpy as np
from PIL import Image

_SKIMAGE = (
    *("astronaut", "chelsea", "coffee", "ihc", "retina", "hubble_deep_field", "rocket"),
    "motorcycle_left",
)
_STRIPS = 5  # of which the last, upright, is for testing
_FLATTEST = 12.0  # standard deviation of a crop that shows something: no night sky


def originals():
    """Ten photographs that scikit-image and scikit-learn bring, uint8 [height, width, 3]."""
    import skimage.data  # only where the crops are made: no dependency of the tests
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.data.__file__).parent
    names = {path.stem: path for path in folder.iterdir() if path.suffix in (".png", ".jpg")}
    found = [np.asarray(Image.open(names[name]).convert("RGB")) for name in _SKIMAGE]
    return [*found, *load_sample_images().images]


def textures(classes=10, side=400):
    """Drawn pictures, a kind of stripes a class: a direction, a width and a colour."""
    random = np.random.default_rng(1)
    rows, columns = np.mgrid[:side, :side]
    pictures = []
    for number in range(classes):
        angle, period = np.pi * (number % 5) / 5, (7, 17)[number // 5]
        wave = np.sin(2 * np.pi * (rows * np.sin(angle) + columns * np.cos(angle)) / period)
        noise = random.normal(0, 60, (side, side, 3))
        pictures.append(np.clip(128 + 50 * wave[..., None] + noise, 0, 255).astype(np.uint8))
    return pictures


def crops(pictures, count, *, side=32, grey=False, contrast=1.0, testing=False, seed=0):
    """So many crops, uint8 [n, side, side(, 3)], and their classes, in turn.

    `contrast` scales their distance from middle grey, in (0, 1].
    """
    random = np.random.default_rng([seed, testing])
    labels = np.arange(count) % len(pictures)
    images = np.stack([_crop(pictures[label], side, random, testing) for label in labels])
    images = _lit(images, random)
    if grey:
        images = images.mean(3)
    images = 127.5 + contrast * (images - 127.5)
    return np.clip(np.rint(images), 0, 255).astype(np.uint8), labels


def _crop(picture, side, random, testing):
    height, width = picture.shape[:2]
    strip = width // _STRIPS
    # The larger the part of a picture, the more it tells: between 1/6 and 1/3 of its shorter side.
    size = int(min(strip, random.uniform(1 / 6, 1 / 3) * min(height, width)))
    top = random.integers(0, height - size + 1)
    span = (strip * (_STRIPS - 1), width) if testing else (0, strip * (_STRIPS - 1))
    left = random.integers(span[0], span[1] - size + 1)
    cut = picture[top : top + size, left : left + size]
    if cut.std() < _FLATTEST:
        return _crop(picture, side, random, testing)
    cut = np.rot90(cut, random.integers(4))[:, :: random.choice([1, -1])]
    small = Image.fromarray(np.ascontiguousarray(cut)).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small)


def _lit(images, random):
    """A brightness and a contrast of its own for each image."""
    shape = (len(images), 1, 1, 1)
    mean = images.mean((1, 2, 3), keepdims=True)
    return mean + random.uniform(0.5, 1.2, shape) * (images - mean) + random.uniform(-70, 70, shape)


def write_folder(root, pictures, train, test, **settings):
    """Writes crops as PNG files into `train/CLASS` and `test/CLASS`, the layout of a folder."""
    for part, count in (("train", train), ("test", test)):
        images, labels = crops(pictures, count, testing=part == "test", **settings)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = Path(root, part, f"class{label}")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number}.png")
    return str(root)


def write_npz(path, pictures, train, test, **settings):
    """Writes the same into a `.npz` file."""
    arrays = {}
    for part, count in (("", train), ("test_", test)):
        images, labels = crops(pictures, count, testing=bool(part), **settings)
        arrays |= {f"{part}images": images, f"{part}labels": labels}
    np.savez(path, **arrays)
    return str(path)
