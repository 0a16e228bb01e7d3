"""Names from elsewhere, from the first step to the last page: text that only says what it holds."""

import numpy as np
import pytest
import torch
from PIL import Image

from secure_cnn import ImageData, Recipe, Sealing, Split, archive, run
from secure_cnn.data import DataSpec
from secure_cnn.printable import printable

# Markup, an unknown style, an emoji's name; a line turned round; mathematics and HTML. None is a
# closing tag: a name has no slash. Names of classes with control characters are refused.
CLASSES = ("[cat]", "[red]dog :smile: [[", "c \u202e$x$ <b>&amp;")
ODD = "[bold]\x1b[31m\u202e:cat:"
RAW = ("\x1b", "\u202e")


@pytest.fixture
def cli(cli):
    """Runs the command on a wide terminal; exit code and all that it printed."""

    def call(*words):
        code, out, err = cli(*words, columns=200)
        return code, out + err

    return call


def photographs(folder):
    """Eight small images of each class, under its name."""
    random = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(8):
            pixels = random.integers(0, 60, (8, 8)) + 60 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def test_names_pass_through_all_commands_as_text(cli, tmp_path):
    """Train, evaluate, compare, and refuse, in a folder and on classes of the worst names."""
    root = tmp_path / ODD
    data, first = photographs(root / "[x]data"), root / "run[1]"
    model = first / "checkpoints" / "model.safetensors"
    quick = ("--data", data, "--epochs", "1", "--eps", "0.1", "--robust-samples", "4")
    several = (
        (0, ("train", *quick, "--out", first)),
        (0, ("train", "--data", data, "--epochs", "1", "--no-baseline", "--out", root / "two]")),
        (0, ("evaluate", model, "--data", data, "--out", root / "[ev", "--samples", "4")),
        (3, ("evaluate", model)),  # a data set of that name is known to nobody
        (0, ("compare", first, root / "two]", "--out", root / "[compared]")),
        (3, ("train", *quick, "--out", first)),
    )
    for code, words in several:
        found, told = cli(*words)
        assert (found, words[0]) == (code, words[0]), told
        assert not any(mark in told for mark in RAW)
        assert printable(ODD) in told or words[0] == "evaluate"
    pages = {page.name: page.read_text() for page in root.rglob("*.html")}
    assert set(pages) == {"report.html", "robustness.html", "compare.html"}
    for page in pages.values():
        assert not any(mark in page for mark in RAW)
        assert "<b>&amp;amp;" not in page
        assert "&lt;b&gt;&amp;amp;" in page
        assert "[red]dog :smile: [[" in page


def test_names_that_a_sealed_file_has_no_room_for_are_refused_before_the_first_step(tmp_path):
    """Nothing is trained and no folder is made; a plain file has no such head."""
    names = [f"{number:04}" + 240 * "é" for number in range(800)]
    images = np.zeros((2, 800, 8, 8), np.uint8)
    data = ImageData(
        name="long",
        spec=DataSpec(shape=(1, 8, 8), classes=tuple(names)),
        train=Split(images=torch.from_numpy(images[0, :, None]), labels=torch.arange(800)),
        test=Split(images=torch.from_numpy(images[1, :, None]), labels=torch.arange(800)),
    )
    sealing = Sealing(recipients=(archive.generate_identity().recipient,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "images", lambda _: data)
        with pytest.raises(archive.LimitExceeded, match="use fewer claims"):
            run(Recipe(out=tmp_path / "run"), sealing=sealing)
    assert not (tmp_path / "run").exists()
