"""`secure_cnn.data.photograph` and `reading`: whatever files people have, one kind of pixels."""

import contextlib
import signal
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from support.class_folders import write_images
from support.damaged import damaged

from secure_cnn.data import ImageReading, load_data
from secure_cnn.data.photograph import photograph
from secure_cnn.errors import DataError

AS_THEY_ARE = ImageReading()
FORMATS = ("png", "jpg", "webp", "bmp", "tiff")
# Each value of the tag, and what a camera does to a scene that it then undoes (Exif 2.32, 4.6.4).
CAMERA = {
    1: lambda scene: scene,
    2: lambda scene: scene[:, ::-1],
    3: lambda scene: scene[::-1, ::-1],
    4: lambda scene: scene[::-1],
    5: lambda scene: scene.swapaxes(0, 1),
    6: lambda scene: np.rot90(scene, 1),
    7: lambda scene: scene.swapaxes(0, 1)[::-1, ::-1],
    8: lambda scene: np.rot90(scene, 3),
    9: lambda scene: scene,
}


def folder_of(root, *images, suffix="png", **saved):
    """Two classes of two, each of these images in both; a folder to load."""
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(2):
            for place, image in enumerate(images):
                image.save(root / name / f"{place}{number}.{suffix}", **saved)
    return root


def read(file, *, reading=AS_THEY_ARE, channels=3):
    """The pixels of one file, channels last, as numbers that can be subtracted."""
    with Image.open(file) as image:
        height, width = reading.shape or image.size[::-1]
    return (
        photograph(file, (channels, height, width), reading).pixels.transpose(1, 2, 0).astype(int)
    )


def scene_of(height=24, width=16):
    """A scene without any symmetry: red above, blue to the left."""
    scene = np.zeros((height, width, 3), np.uint8)
    scene[: height // 3] += np.uint8([200, 0, 0])
    scene[:, : width // 2] += np.uint8([0, 0, 200])
    return scene


@pytest.fixture(scope="module")
def china():
    """A photograph of a camera, 427x640."""
    return load_sample_image("china.jpg").copy()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("tag", CAMERA)
def test_every_orientation_is_turned_upright(tmp_path, tag, suffix):
    """A scene that is not square comes out as it was, however the camera was held."""
    scene = scene_of()
    taken = Image.fromarray(np.ascontiguousarray(CAMERA[tag](scene)))
    exif = taken.getexif()
    exif[0x0112] = tag
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(suffix, {})
    folder_of(tmp_path / "pets", taken, suffix=suffix, exif=exif, **lossless)
    for cap in (1 << 30, 0):
        data = load_data(
            tmp_path / "pets", cache=tmp_path / "cache", memory_cap=cap, tell=lambda _: None
        )
        seen = data.train.images[0].permute(1, 2, 0).numpy().astype(int)
        assert data.spec.shape == (3, 24, 16)
        assert np.abs(seen - scene).mean() < (12 if suffix == "jpg" else 0.1)
    half = ImageReading(size=(12, 8))
    seen = load_data(tmp_path / "pets", reading=half, tell=lambda _: None).train.images[0]
    assert np.abs(seen.permute(1, 2, 0).numpy() - scene[::2, ::2].astype(int)).mean() < 20


@pytest.mark.parametrize("orientation", [1, 6, 8])
@pytest.mark.parametrize("size", [(64, 64), (40, 96)])
def test_resizing_a_photograph_agrees_with_another_library(tmp_path, china, orientation, size):
    """Crop and antialiased cubic of torch, on the whole picture: within few levels of ours.

    A JPEG is decoded at a part of its size where that is still large enough, which differs less
    from the whole than its own compression does.
    """
    taken = Image.fromarray(np.ascontiguousarray(CAMERA[orientation](china)))
    exif = taken.getexif()
    exif[0x0112] = orientation
    whole = torch.from_numpy(china).permute(2, 0, 1)[None].double()
    height, width = whole.shape[2:]
    scale = min(height / size[0], width / size[1])
    tall, wide = round(size[0] * scale), round(size[1] * scale)
    top, left = (height - tall) // 2, (width - wide) // 2
    want = torch.nn.functional.interpolate(
        whole[:, :, top : top + tall, left : left + wide],
        size,
        mode="bicubic",
        antialias=True,
        align_corners=False,
    )[0].permute(1, 2, 0)
    for suffix, bound in (("png", 2.0), ("jpg", 4.0)):
        taken.save(tmp_path / f"x.{suffix}", exif=exif, quality=95)
        found = read(tmp_path / f"x.{suffix}", reading=ImageReading(size=size))
        assert found.shape == (*size, 3)
        assert np.abs(found - want.clamp(0, 255).numpy()).mean() < bound
    # Control: another part of the picture is far from it.
    assert np.abs(found - want.clamp(0, 255).numpy()[:, ::-1]).mean() > 20


def test_each_fit_keeps_what_it_says(tmp_path):
    """Of three thirds side by side: the middle, all with the background beside, all squeezed."""
    wide = np.zeros((30, 90, 3), np.uint8)
    wide[:, :30, 0], wide[:, 30:60, 1], wide[:, 60:, 2] = 255, 255, 255
    Image.fromarray(wide).save(tmp_path / "x.png")
    crop = read(tmp_path / "x.png", reading=ImageReading(size=30))
    assert (crop == [0, 255, 0]).all()
    pad = read(tmp_path / "x.png", reading=ImageReading(size=30, fit="pad", background="#0a141e"))
    assert (pad[:10] == [10, 20, 30]).all()
    assert (pad[20:] == [10, 20, 30]).all()
    assert (pad[12:18, 2:8] == [255, 0, 0]).all()
    assert (pad[12:18, 22:28] == [0, 0, 255]).all()
    stretch = read(tmp_path / "x.png", reading=ImageReading(size=30, fit="stretch"))
    assert (stretch[:, :8] == [255, 0, 0]).all()
    assert (stretch[:, 22:] == [0, 0, 255]).all()


def test_an_image_that_has_the_size_is_not_touched(tmp_path):
    """Whatever the fit, pixel by pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    for fit in ("crop", "pad", "stretch"):
        reading = ImageReading(size="20x30", fit=fit)
        assert (read(tmp_path / "x.png", reading=reading) == pixels).all()


def test_mixed_sizes_are_refused_with_what_to_type(tmp_path):
    """How many, the smallest, the largest, the usual one, and the option; then that is enough."""
    sizes = [(120, 80), (120, 80), (400, 300), (90, 64)]
    images = [Image.new("RGB", size, (90, place, 0)) for place, size in enumerate(sizes)]
    folder_of(tmp_path / "pets", *images)
    with pytest.raises(DataError, match=r"3 sizes .* from 64x90 to 300x400.*--image-size 64") as it:
        load_data(tmp_path / "pets")
    assert "8 of 16 images of 80x120" in str(it.value)
    data = load_data(tmp_path / "pets", reading=ImageReading(size=64))
    assert data.spec.shape == (3, 64, 64)


def test_images_too_large_for_any_network_are_refused_by_their_heads(tmp_path, monkeypatch):
    """Not after 1000 photographs of 12 megapixels were decoded."""
    folder_of(tmp_path / "pets", Image.new("RGB", (4000, 3000)), suffix="jpg")
    monkeypatch.setattr("secure_cnn.data.folder.photograph", None)
    with pytest.raises(DataError, match=r"got 3x3000x4000; .* --image-size 64"):
        load_data(tmp_path / "pets")


def test_large_images_are_remarked_on(tmp_path):
    """They may be meant; the remark says what they cost."""
    told = []
    folder_of(tmp_path / "pets", Image.new("L", (300, 280), 7))
    load_data(tmp_path / "pets", tell=told.append)
    assert any("280x300 pixels, and the work grows" in words for words in told)
    told.clear()
    load_data(tmp_path / "pets", reading=ImageReading(size=280), tell=told.append)
    assert not any("work grows" in words for words in told)


def test_sizes_that_differ_by_their_orientation_are_mixed(tmp_path):
    """Upright and lying pictures of one camera."""
    scene = Image.fromarray(scene_of())
    exif = scene.getexif()
    exif[0x0112] = 6
    folder_of(tmp_path / "pets", scene, suffix="jpg")
    scene.save(tmp_path / "pets/cat/lying.jpg", exif=exif)
    with pytest.raises(DataError, match="2 sizes"):
        load_data(tmp_path / "pets")


def test_enlarged_images_are_remarked_on(tmp_path):
    """Once, with how many."""
    told = []
    folder_of(tmp_path / "pets", Image.new("RGB", (64, 64)), Image.new("RGB", (64, 20)))
    load_data(tmp_path / "pets", reading=ImageReading(size=32), tell=told.append)
    assert [words for words in told if "enlarged" in words] == [
        "images smaller than 32x32, enlarged: 4 of 8"
    ]


TRANSPARENT = {
    "RGBA": lambda: Image.fromarray(np.uint8([[[9, 9, 9, 255], [200, 0, 0, 0]]] * 8).repeat(4, 1)),
    "LA": lambda: Image.fromarray(np.uint8([[[9, 9, 9, 255], [200, 0, 0, 0]]] * 8).repeat(4, 1))
    .convert("LA"),
    "P": lambda: palette(),
}  # fmt: skip


def palette():
    """Eight columns of two colours, the second of which is declared transparent."""
    image = Image.new("P", (8, 8), 0)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.paste(1, (4, 0, 8, 8))
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize("mode", TRANSPARENT)
@pytest.mark.parametrize(("background", "level"), [("white", 255), ("#404040", 64), ("black", 0)])
def test_the_background_is_behind_what_is_transparent(tmp_path, mode, background, level):
    """Not the colour that is stored there, which nobody has ever seen; and it is said."""
    told = []
    folder_of(tmp_path / "pets", TRANSPARENT[mode]())
    data = load_data(
        tmp_path / "pets", reading=ImageReading(background=background), tell=told.append
    )
    assert (data.train.images[..., :4] == 9).all()
    assert (data.train.images[..., 4:] == level).all()
    assert f"images with transparent places: 4 of 4; {background} is behind them" in told[0]


def test_half_transparent_is_half_the_background(tmp_path):
    """As every viewer mixes them."""
    folder_of(tmp_path / "pets", Image.new("RGBA", (8, 8), (100, 100, 100, 128)))
    data = load_data(tmp_path / "pets", tell=lambda _: None)
    assert set(data.train.images.unique().tolist()) <= {177, 178}


def test_an_opaque_alpha_channel_is_no_transparency(tmp_path):
    """Nothing is said of what makes no difference."""
    told = []
    folder_of(tmp_path / "pets", Image.new("RGBA", (8, 8), (100, 50, 0, 255)))
    load_data(tmp_path / "pets", tell=told.append)
    assert not any("transparent" in words for words in told)


def test_the_default_background_is_in_every_way_the_same_as_saying_it(tmp_path):
    """White; so a run that says nothing can be repeated by one that does."""
    folder_of(tmp_path / "pets", TRANSPARENT["RGBA"]())
    quiet = {"tell": lambda _: None}
    said = load_data(tmp_path / "pets", reading=ImageReading(background="white"), **quiet)
    other = load_data(tmp_path / "pets", reading=ImageReading(background="black"), **quiet)
    assert load_data(tmp_path / "pets", **quiet).fingerprint == said.fingerprint
    assert other.fingerprint != said.fingerprint


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_read_whatever_its_ending_says(tmp_path, suffix):
    """Its bytes decide: as it is, in capitals, and under the ending of each other format."""
    pixels = np.asarray(Image.fromarray(scene_of(32, 32)))
    kind = {"jpg": "jpeg"}.get(suffix, suffix)
    for ending in (suffix, suffix.upper(), *FORMATS):
        Image.fromarray(pixels).save(tmp_path / f"x.{ending}", format=kind)
        assert np.abs(read(tmp_path / f"x.{ending}") - pixels).mean() < 12


@pytest.mark.parametrize("ending", ["jpe", "jfif", "JPG", "TIF", "Png", "WebP"])
def test_usual_endings_count_as_images(tmp_path, ending):
    """None of them is left out, none refused."""
    write_images(tmp_path / "pets", count=3)
    Image.new("RGB", (8, 9), (1, 2, 3)).save(tmp_path / f"pets/cat/x.{ending}", format="png")
    data = load_data(tmp_path / "pets", tell=lambda _: None)
    assert len(data.train) + len(data.test) == 7


def test_inks_palettes_and_bits_become_the_colours_that_they_show(tmp_path):
    """CMYK, 256 colours, black and white."""
    scene = Image.fromarray(scene_of(32, 32))
    for name, image, bound in (
        ("inks.tiff", scene.convert("CMYK"), 1),
        ("inks.jpg", scene.convert("CMYK"), 12),
        ("palette.png", scene.quantize(16), 1),
        ("palette.bmp", scene.quantize(16), 1),
    ):
        image.save(tmp_path / name)
        assert np.abs(read(tmp_path / name) - np.asarray(scene)).mean() < bound
    Image.fromarray(np.eye(8) > 0).save(tmp_path / "bits.png")
    assert (read(tmp_path / "bits.png", channels=1)[..., 0] == np.eye(8) * 255).all()


def deep_png(path, channels):
    """A PNG of 16 bits a channel, which Pillow reads in colour but does not write."""
    kind = {1: 0, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + b"\x12\x34" * channels * 8 for _ in range(8))

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def several(path, **saved):
    """Three pictures in one file."""
    pictures = [Image.new("RGB", (8, 8), (40 * k, 0, 0)) for k in range(3)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **saved)


REFUSED = {
    "16 bits of grey": (lambda path: deep_png(path, 1), "8 bits per channel, got more"),
    "16 bits of colour": (lambda path: deep_png(path, 3), "8 bits per channel, got more"),
    "16 bits and alpha": (lambda path: deep_png(path, 4), "8 bits per channel, got more"),
    "floats": (
        lambda path: Image.fromarray(np.zeros((8, 8), np.float32)).save(path, format="tiff"),
        "8 bits per channel, got more .Pillow mode F",
    ),
    "pages": (lambda path: several(path, format="tiff"), "one picture, got 3 in one TIFF file"),
    "film": (lambda path: several(path, format="webp"), "one picture, got 3 in one WEBP file"),
    "moving PNG": (lambda path: several(path, format="png"), "one picture, got 3 in one PNG file"),
    "GIF": (lambda path: several(path, format="gif"), "expected a readable image"),
    "no image": (lambda path: path.write_bytes(b"<html>not found</html>"), "a readable image"),
    "nothing": (lambda path: path.write_bytes(b""), "a readable image"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("reading", [AS_THEY_ARE, ImageReading(size=8)])
def test_what_would_have_to_be_guessed_at_is_refused_by_name(tmp_path, kind, reading):
    """Deep pixels, whose white nobody states, and files of several pictures."""
    make, words = REFUSED[kind]
    write_images(tmp_path / "pets", size=(8, 8))
    make(tmp_path / "pets/dog/x.png")
    with pytest.raises(DataError, match=rf"dog/x\.png: .*{words}"):
        load_data(tmp_path / "pets", reading=reading)


def test_of_a_photograph_that_carries_more_pictures_the_first_is_read(tmp_path):
    """MPO, as telephones write it: the depth behind the photograph is none of ours."""
    several(tmp_path / "x.jpg", format="mpo")
    assert (read(tmp_path / "x.jpg") == 0).all()


@pytest.mark.parametrize("kept", [0, -40])
def test_all_files_at_fault_are_named_at_once(tmp_path, kept):
    """The first in full, a few more by name, and how many; whether heads or bodies are broken."""
    files = list(write_images(tmp_path / "pets", count=12, size=(32, 32)))
    for file in files[2:10]:
        file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DataError) as caught:
        load_data(tmp_path / "pets")
    words = str(caught.value)
    assert "And 7 more of 24 images are at fault" in words
    assert words.count(".png") == 6
    assert "and 2 more" in words


@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_bytes_never_end_in_another_error(tmp_path, suffix):
    """Whatever a decoder makes of random damage, nothing but a `DataError` comes out."""
    path = next(iter(write_images(tmp_path / "pets", count=2, suffix=suffix)))
    for reading in (AS_THEY_ARE, ImageReading(size=8, fit="pad")):
        for _ in damaged(path, times=60, places=3):
            with contextlib.suppress(DataError):
                load_data(tmp_path / "pets", reading=reading, tell=lambda _: None)
        write_images(tmp_path / f"fresh-{reading.fit}", count=2, suffix=suffix)


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_truncation_is_an_error_or_harmless(tmp_path, suffix):
    """However short a file is cut, the error names it; if it loads, no image was lost."""
    path = next(iter(write_images(tmp_path / "pets", count=2, suffix=suffix)))
    whole = path.read_bytes()
    messages = []
    for length in range(0, len(whole), 23):
        path.write_bytes(whole[:length])
        try:
            load_data(tmp_path / "pets", tell=lambda _: None)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > len(whole) / 23 * 0.7
    assert all(str(path) in message for message in messages)


def test_a_grey_folder_stays_grey_and_channels_decide_where_given(tmp_path):
    """Three equal channels of grey; the luminance of colour."""
    folder_of(tmp_path / "grey", Image.new("L", (8, 8), 100))
    folder_of(tmp_path / "red", Image.new("RGB", (8, 8), (255, 0, 0)))
    quiet = {"tell": lambda _: None}
    assert load_data(tmp_path / "grey", **quiet).spec.channels == 1
    three = load_data(tmp_path / "grey", reading=ImageReading(channels=3), **quiet)
    assert (three.spec.channels, set(three.train.images.unique().tolist())) == (3, {100})
    told = []
    one = load_data(tmp_path / "red", reading=ImageReading(channels=1), tell=told.append)
    assert "images with colours, read as grey: 4 of 4" in told
    assert (one.spec.channels, set(one.train.images.unique().tolist())) == (1, {76})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 0}, "image_size: expected one number or HEIGHTxWIDTH.*got 0"),
        ({"size": -3}, "image_size"),
        ({"size": 5000}, "each side 1 to 4096"),
        ({"size": 2.5}, "image_size"),
        ({"size": True}, "image_size"),
        ({"size": "64*64"}, "such as 64 or 48x64, got '64.64'"),
        ({"size": "x64"}, "image_size"),
        ({"size": "²"}, "image_size"),
        ({"size": ""}, "image_size"),
        ({"size": (1, 2, 3)}, "image_size"),
        ({"size": [64, 64]}, "image_size"),
        ({"fit": "cover", "size": 8}, "image_fit: expected crop or pad or stretch, got 'cover'"),
        ({"fit": None}, "image_fit"),
        ({"fit": "pad"}, "image_fit=pad: expected image_size with it"),
        ({"background": "grün"}, "background: expected the name of a colour"),
        ({"background": "#12345678"}, "background"),
        ({"background": (1, 2, 3)}, "background"),
        ({"background": "rgb(300,0,0)"}, "background"),
        ({"channels": 2}, "channels: expected 1, 3 or None"),
        ({"channels": True}, "channels"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_they_are_made(settings, words):
    """By name, and with what they may be."""
    with pytest.raises(DataError, match=words):
        ImageReading(**settings)


@pytest.mark.parametrize("source", ["digits", "x.npz"])
def test_only_folders_are_brought_to_another_size(tmp_path, monkeypatch, source):
    """A size that other sources have anyway is no contradiction."""
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", images=np.eye(8)[None].repeat(20, 0), labels=np.arange(20) % 2)
    quiet = {"tell": lambda _: None}
    assert load_data(source, reading=ImageReading(size=8), **quiet).spec.shape == (1, 8, 8)
    for reading in (ImageReading(size=16), ImageReading(channels=3)):
        with pytest.raises(DataError, match="only the images of a folder are brought"):
            load_data(source, reading=reading, **quiet)


@pytest.mark.slow
def test_a_killed_decoding_leaves_nothing_that_is_believed(tmp_path):
    """The next call begins anew and finds all images."""
    write_images(tmp_path / "pets", count=8)
    load = f"""
import os, signal
import secure_cnn.data.folder as folder
from secure_cnn.data import load_data
decoded = folder.photograph
def killed(file, **how):
    if file.name == "7.png":
        os.kill(os.getpid(), signal.SIGKILL)
    return decoded(file, **how)
folder.photograph, folder._MOST_ROWS = killed, 4
load_data({str(tmp_path / "pets")!r}, cache=folder.Path({str(tmp_path / "cache")!r}), memory_cap=0)
"""
    ended = subprocess.run([sys.executable, "-c", load], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not list((tmp_path / "cache").glob("decoded-*"))
    data = load_data(tmp_path / "pets", cache=tmp_path / "cache", memory_cap=0)
    assert len(data.train) + len(data.test) == 16


def test_another_reading_is_decoded_anew(tmp_path):
    """What is kept in the cache belongs to one reading."""
    write_images(tmp_path / "pets", size=(20, 30))
    quiet = {"tell": lambda _: None, "cache": tmp_path / "cache", "memory_cap": 0}
    readings = [
        AS_THEY_ARE,
        *(ImageReading(size=size, fit=fit) for size in (8, 16) for fit in ("crop", "pad")),
        ImageReading(size=8, fit="pad", background="black"),
        ImageReading(channels=1),
    ]
    found = {load_data(tmp_path / "pets", reading=each, **quiet).fingerprint for each in readings}
    assert len(found) == len(readings) == len(list((tmp_path / "cache").iterdir()))


def test_an_interrupted_decoding_ends_and_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C while threads decode: those that wait are not begun, and the cache stays clean."""
    write_images(tmp_path / "pets", count=200)
    begun, cancelled, shutdown = [], threading.Event(), ThreadPoolExecutor.shutdown

    def interrupted(file, shape, reading):
        begun.append(file)
        if len(begun) > 1:
            assert cancelled.wait(600)
        raise KeyboardInterrupt

    def watched(pool, wait=True, *, cancel_futures=False):
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        cancelled.set()
        shutdown(pool, wait=wait)

    monkeypatch.setattr("secure_cnn.data.folder.photograph", interrupted)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", watched)
    with pytest.raises(KeyboardInterrupt):
        load_data(tmp_path / "pets", cache=tmp_path / "cache", memory_cap=0)
    assert len(begun) < 10
    assert list((tmp_path / "cache").iterdir()) == []
