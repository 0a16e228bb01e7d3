"""From a folder of photographs to a model and back, by the commands that people type."""

import importlib
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from secure_cnn import Recipe
from secure_cnn.errors import DataError

WORDS = ("--epochs", "1", "--no-baseline", "--batch-size", "8")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Cuttings of two real photographs, in sizes of their own, on their side, in five formats."""
    root = tmp_path_factory.mktemp("photographs") / "pets"
    random = np.random.default_rng(0)
    for name in ("china", "flower"):
        scene = Image.fromarray(load_sample_image(f"{name}.jpg"))
        for part, count in (("train", 12), ("val", 5)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                width, height = (int(side) for side in random.integers(40, 300, 2))
                left, top = (int(random.integers(0, 640 - width)), int(random.integers(0, 127)))
                cut = scene.crop((left, top, left + width, top + height))
                exif = cut.getexif()
                exif[0x0112] = int(random.integers(1, 9))
                suffix = ("JPG", "png", "webp", "tif", "bmp")[number % 5]
                extra = {} if suffix == "bmp" else {"exif": exif}
                cut.save(root / part / name / f"{number}.{suffix}", **extra)
    return root


def test_mixed_photographs_are_trained_on_and_evaluated_alike(cli, photographs, tmp_path, quick):
    """Refused with the option to add, trained with it; evaluated without a word of it."""
    code, _, told = cli("train", "--data", photographs, *WORDS, "--out", tmp_path / "run")
    assert code == 3
    assert "hint: bring them to one size as they are read, say --image-size 64" in told
    size = ("--image-size", "32x40", "--image-fit", "pad", "--background", "navy")
    code, _, told = cli("train", "--data", photographs, *size, *WORDS, "--out", tmp_path / "run")
    assert code == 0, told
    assert "note: val/ is what the model is tested on" in told
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["data"]["shape"] == [3, 32, 40]
    settings = {"image_size": "32x40", "image_fit": "pad", "background": "navy"}
    assert settings.items() <= record["settings"].items()
    assert record["claims"]["data"]["image_fit"] == "pad"
    model = tmp_path / "run/checkpoints/model.safetensors"
    found = tmp_path / "found.json"
    code, _, told = cli("evaluate", model, "--data", photographs, "--json", found)
    assert code == 0, told
    assert "is not the data that the checkpoint names" not in told
    clean = json.loads(found.read_text())["clean"]
    assert clean["accuracy"] == record["results"][0]["accuracy"]
    code, _, told = cli("evaluate", model, "--data", photographs, "--background", "white")
    assert code == 0, told
    assert "is not the data that the checkpoint names" in told


def readings_of(monkeypatch):
    """How images would have been read from now on, by commands that end there."""
    asked = []

    def refuse(source, *, reading, groups=None, seed=0):
        asked.append(reading)
        raise DataError("enough; for this test")

    for module in ("recipe.settings", "cli.bench", "cli.bench_overhead", "cli.images"):
        monkeypatch.setattr(importlib.import_module(f"secure_cnn.{module}"), "load_data", refuse)
    return asked


def test_every_command_reads_images_as_the_run_did(cli, photographs, tmp_path, monkeypatch, quick):
    """By the run's record, by the model's file, or by the same options; what is typed wins."""
    size = ("--image-size", "16x24", "--image-fit", "pad", "--background", "#102030")
    given = ("--data", photographs, *size)
    private = ("--epsilon", "8", "--delta", "0.01")
    code, _, told = cli("train", *given, *private, *WORDS, "--out", tmp_path / "run")
    assert code == 0, told
    model, readings = tmp_path / "run/checkpoints/model.safetensors", readings_of(monkeypatch)
    here = ("--data", photographs)
    for words in (
        ("audit", "--run", tmp_path / "run", "--out", tmp_path / "audit"),
        ("audit", *given, *private, "--epochs", "1", "--out", tmp_path / "audit"),
        ("bench", "overhead", *given),
        ("bench", "robustness", model, *here, "--eps", "0.1"),
        ("evaluate", model, *here),
        ("evaluate", model, *here, "--image-fit", "stretch", "--background", "white"),
    ):
        code, _, told = cli(*words)
        assert code == 3
        assert told.endswith("error: enough\nhint: for this test\n")
    assert {(reading.shape, reading.channels) for reading in readings} == {
        ((16, 24), None),  # as all images together have it
        ((16, 24), 3),  # as the model has it
    }
    looks = [(reading.fit, reading.colour) for reading in readings]
    assert looks == [("pad", (16, 32, 48))] * 5 + [("stretch", (255, 255, 255))]
    code, _, told = cli("audit", "--run", tmp_path / "run", "--image-size", "16")
    assert code == 3
    assert "--image-size" in told


def test_a_resumed_run_refuses_another_reading(cli, photographs, tmp_path):
    """It has its own."""
    code, _, told = cli("train", "--out", tmp_path / "x", "--resume", "--background", "black")
    assert code == 3
    assert "got --background too" in told


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_size": 0}, "image_size: expected one number or HEIGHTxWIDTH"),
        ({"image_size": 2.0}, "image_size"),
        ({"image_fit": "pad"}, "image_fit=pad: expected image_size with it"),
        ({"image_size": 8, "image_fit": "zoom"}, "image_fit: expected crop or pad or stretch"),
        ({"background": "see-through"}, "background: expected the name of a colour"),
    ],
)
def test_readings_that_cannot_be_are_refused_when_the_recipe_is_made(settings, words):
    """By name."""
    with pytest.raises(DataError, match=words):
        Recipe(out="run", **settings)


def test_a_size_has_one_form_in_the_record_however_it_was_written():
    """So that a resumed run is not refused for a way of writing."""
    forms = [Recipe(out="run", image_size=size) for size in (64, "64", "64x64", "64X64")]
    assert len({recipe.image_size for recipe in forms}) == 1
    assert Recipe.from_dict(forms[0].to_dict()) == forms[0]


def test_other_data_than_a_folder_are_not_brought_to_a_size(cli, tmp_path):
    """It would do nothing, and say so too late."""
    code, _, told = cli("train", "--image-size", "32", "--out", tmp_path / "run")
    assert code == 3
    assert "only the images of a folder are brought to another size" in told
    assert not (tmp_path / "run").exists()
