"""The page of a run and its figures: complete in itself, honest, the same every time."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.run_records import (
    PROTECTED,
    Page,
    make_epoch,
    make_examples,
    make_record,
    make_result,
)

from secure_cnn import pages
from secure_cnn.errors import RunError

SECTIONS = ["summary", "training", "attack", "classes", "cost", "claims", "settings", "provenance"]
HOSTILE = '<script>alert("1")</script>&--> $x_1$'

COMBINATIONS = {
    "plain only": (("plain",), "This run trained without privacy"),
    "with baseline": (("plain", PROTECTED), "plain baseline was trained without privacy"),
    "without baseline": ((PROTECTED,), "There is no plain baseline in this run"),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_section_is_there_and_says_what_is_missing(name):
    """Each combination of variants has all sections and its own honest sentence."""
    variants, sentence = COMBINATIONS[name]
    page = Page(pages.render_page(make_record(variants)))
    assert [section for section in SECTIONS if section not in page.ids] == []
    assert sentence in page.text
    assert ("Not private" in page.text) == (PROTECTED not in variants)
    others = [other for _, other in COMBINATIONS.values() if other != sentence]
    assert not any(other in page.text for other in others)
    assert "No example images were kept" in page.text


def test_the_summary_quotes_guarantees_with_their_conditions():
    """Epsilon with delta, rounded up; robust accuracy with interval and attacks, and before."""
    text = Page(pages.render_page(make_record())).text
    assert "ε = 3.00 ε spent, at δ = 1e-5" in text  # 2.991 was spent
    assert "60.0% 95% interval 55.0% to 65.0%; worst of pgd, apgd; plain: 60.0%" in text
    assert "ℓ∞ ≤ 0.1, pixels in [0, 1]" in text
    assert "2.00× of plain, 1.80 to 2.20, n = 30" in text
    assert "withheld" in text


def test_a_page_without_threat_epochs_or_results_says_so():
    """Nothing is left blank, and nothing is claimed."""
    empty = make_record(epochs=[], results=[], cost=[], claims={}, threat=None, status="running")
    text = Page(pages.render_page(empty)).text
    for sentence in (
        "still running",
        "There is no result yet",
        "Not private",
        "the run names no threat model",
        "No epoch has been recorded",
        "cost of protections was not measured",
        "makes no claims",
    ):
        assert sentence in text
    assert "ε =" not in text


def test_what_is_to_be_said_of_a_run_stands_before_its_figures():
    """That a training did not learn is read before any curve of it."""
    record = make_record(notes=["The training plain did not learn: <accuracy> is at chance."])
    text = Page(pages.render_page(record)).text
    said = text.index("did not learn: <accuracy> is at chance.")
    assert said < text.index("Measured on the test images after each epoch")


def test_an_unfinished_variant_is_named():
    """While the protected variant still trains, the page does not pass for a plain run's."""
    record = make_record(results=[make_result("plain", 3)], status="interrupted")
    text = Page(pages.render_page(record)).text
    assert f"No result yet for: {PROTECTED}" in text
    assert "interrupted when this page was written" in text
    assert "This run trained without privacy" not in text


def test_the_page_needs_no_network_and_no_script():
    """No tag or style fetches anything, and the page forbids it to the browser as well."""
    text = pages.render_page(make_record(), make_examples())
    page = Page(text)
    banned = {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not banned & set(page.tags)
    sources = [v for n, v in page.attributes if n in ("src", "href", "xlink:href", "srcset")]
    assert len(sources) > 8
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in sources)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) <= namespaces
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in (
        page.attributes
    )
    assert len(page.ids) == len(set(page.ids))


def test_text_of_the_record_is_escaped_everywhere():
    """A hostile class, data set, note or variant is text, in the page and in every figure."""
    names = (HOSTILE, HOSTILE[:14], "eel")
    record = make_record(names=names, notes=[HOSTILE], settings={HOSTILE: HOSTILE})
    page = Page(pages.render_page(record, make_examples(names)))
    assert "script" not in page.tags
    assert HOSTILE in page.text
    record = make_record(
        variants=("plain",), results=[make_result(HOSTILE, 3)], checkpoints=[HOSTILE]
    )
    page = Page(pages.render_page(record))
    assert "script" not in page.tags
    assert ("aria-label", f"Confusion matrix of {HOSTILE}") in page.attributes


def test_a_class_name_is_never_a_formula():
    """Dollar signs stay dollar signs, and a script that our own font lacks warns of nothing."""
    words = Page(pages.class_recall(make_record(names=("$x_1$", "猫", "a\nb")))).words
    assert {"$x_1$", "猫", "a b"} <= set(words)


def test_the_page_is_the_same_every_time():
    """No clock, no random identifier, and no global setting of matplotlib shows in it."""
    code = (
        "import hashlib, sys, matplotlib; sys.path.insert(0, 'tests');"
        "matplotlib.rcParams['font.size'] = 33; matplotlib.rcParams['lines.color'] = 'red';"
        "import test_secure_cnn_pages_run as t;"
        "page = t.pages.render_page(t.make_record(), t.make_examples());"
        "assert 'matplotlib.pyplot' not in sys.modules and matplotlib.rcParams['font.size'] == 33;"
        "print(page)"
    )
    here = pages.render_page(make_record(), make_examples())
    root = Path(__file__).parents[1]
    run = [sys.executable, "-X", "utf8", "-c", code]
    other = subprocess.run(run, cwd=root, capture_output=True, text=True, encoding="utf-8")
    assert other.returncode == 0, other.stderr
    assert other.stdout.rstrip("\n") == here


FIGURES = [
    pages.accuracy_curve,
    pages.loss_curve,
    pages.epsilon_curve,
    pages.class_recall,
    lambda record: pages.confusion_matrix(record, "plain"),
    lambda record: pages.cost_bars(record, "time_ratio"),
]


@pytest.mark.parametrize("classes", [2, 10, 25, 100])
@pytest.mark.parametrize("length", [1, 40])
def test_figures_render_for_any_number_of_classes_and_epochs(classes, length):
    """Each figure is one SVG whose words stay inside its frame's width."""
    names = tuple(f"class {index}" for index in range(classes))
    record = make_record(names=names, length=length)
    for figure in FIGURES:
        svg = figure(record)
        assert svg.startswith("<svg")
        assert svg.endswith("</svg>")
        assert svg == figure(record)
        assert "nan" not in svg.lower()
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
        places = [float(x) for x in re.findall(r'<text[^>]* x="([-\d.]+)"', svg)]
        assert all(0 <= x <= width for x in places)


def test_figures_leave_out_what_is_not_finite():
    """A diverged loss and a class without test images draw nothing, and warn of nothing."""
    result = make_result("plain", 3, recall=(math.nan, 0.5, 1.0), robust_recall=(math.nan, 0, 0.1))
    epochs = [make_epoch("plain", n, test_loss=math.nan) for n in (1, 2)]
    record = make_record(("plain",), results=[result], epochs=epochs)
    assert all("nan" not in figure(record).lower() for figure in FIGURES)
    assert result.robust_macro_recall == pytest.approx(0.05)


def test_a_variant_keeps_its_colour():
    """Plain is always the first colour; the others follow in the order in which they appear."""
    colors = pages.variant_colors(make_record((PROTECTED, "plain")))
    assert list(colors) == ["plain", PROTECTED]
    assert colors == pages.variant_colors(make_record())
    assert len(set(colors.values())) == 2
    record = make_record()
    for figure in (pages.accuracy_curve, pages.class_recall):
        assert all(color in figure(record) for color in colors.values())


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_examples_render_with_any_number_of_channels(channels):
    """Grey, colour and anything else end in a picture with both predictions."""
    examples = make_examples(channels=channels)
    svg = pages.example_figure(examples, 0)
    assert svg.count("<image") == 3
    assert "✓ cat" in svg
    assert "✗ dog" in svg


def test_examples_that_do_not_fit_together_are_refused():
    """The message names the tensor that is wrong."""
    good = vars(make_examples())
    for name, value, message in [
        ("clean", good["clean"] * 255, r"examples.clean: expected floats in \[0, 1\]"),
        ("adversarial", good["clean"][:2], "examples.adversarial: expected shape"),
        ("after", good["after"] + 7, "examples.after: expected 4 class numbers"),
    ]:
        with pytest.raises(RunError, match=message):
            pages.Examples(**(good | {name: value}))


def test_the_page_is_written_whole(tmp_path):
    """The file is UTF-8 and is what `render_page` gives."""
    record, examples = make_record(), make_examples()
    pages.write_page(record, examples, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text == pages.render_page(record, examples)
