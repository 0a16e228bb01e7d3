import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.run_records import (
    PROTECTED,
    Page,
    make_epoch,
    make_examples,
    make_record,
    make_result,
    number,
)

from secure_cnn import report
from secure_cnn.errors import RunError
from secure_cnn.report import _document

SECTIONS = ["summary", "training", "attack", "classes", "cost", "claims", "settings", "provenance"]
HOSTILE = '<script>alert("1")</script>&--> $x_1$'


share = st.floats(0, 1)
plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(0, 9) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@st.composite
def records(draw):
    names = tuple(draw(st.lists(st.text(), min_size=2, max_size=4)))
    epochs = [
        make_epoch(variant, n + 1, test_loss=draw(number), test_accuracy=draw(share))
        for variant in ("plain", PROTECTED)
        for n in range(draw(st.integers(0, 3)))
    ]
    return make_record(
        names=names,
        epochs=epochs,
        settings=draw(st.dictionaries(st.text(), plain_json, max_size=3)),
        claims=draw(st.dictionaries(st.text(), plain_json, max_size=3)),
        status=draw(st.sampled_from(["running", "complete", "interrupted"])),
        notes=draw(st.lists(st.text(), max_size=2)),
    )


@given(record=records())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_a_record_survives_json(tmp_path_factory, record):
    """What is written is strict JSON and is read back equal, whatever the text and the numbers."""
    path = tmp_path_factory.mktemp("record") / "run.json"
    record.write(path)
    assert report.RunRecord.read(path) == record
    assert report.RunRecord.from_dict(record.to_dict()) == record
    json.loads(path.read_bytes(), parse_constant=pytest.fail)


def test_a_record_keeps_what_json_lacks(tmp_path):
    """A diverged loss and a class name that is no UTF-8 do not cost the record."""
    epoch = make_epoch("plain", 1, test_loss=math.nan, train_loss=-math.inf)
    record = make_record(names=("cat", os.fsdecode(b"d\xffg")), epochs=[epoch])
    record.write(tmp_path / "run.json")
    again = report.RunRecord.read(tmp_path / "run.json")
    assert math.isnan(again.epochs[0].test_loss)
    assert again.epochs[0].train_loss == -math.inf
    assert again.data.classes == record.data.classes
    report.write_page(again, None, tmp_path / "report.html")


def test_the_file_has_the_documented_shape(tmp_path):
    """The names in the file are those that other programs rely on."""
    make_record().write(tmp_path / "run.json")
    content = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert set(content) == {
        *("schema", "kind", "status", "created", "seconds", "settings", "versions", "hardware"),
        *("data", "model", "privacy", "threat", "epochs", "results", "cost", "claims"),
        *("checkpoints", "notes"),
    }
    assert (content["schema"], content["kind"]) == (1, "run")
    assert content["epochs"][-1]["train_loss"] is None
    assert set(content["cost"][0]) == {
        *("case", "variant", "metric", "median", "low", "high", "unit", "n")
    }


@pytest.mark.parametrize("schema", [0, 2, "1", True, None, 1.0])
def test_an_unknown_schema_is_refused(schema):
    """Only schema 1, the number, is read; a newer file is not half understood."""
    with pytest.raises(RunError, match="schema: expected 1"):
        report.RunRecord.from_dict(make_record().to_dict() | {"schema": schema})
    with pytest.raises(RunError, match="schema: expected 1"):
        report.Measurements.from_dict({"schema": schema, "rows": []})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(extra=1), "got 'extra'"),
        (lambda d: d.pop("threat"), "expected 'threat'"),
        (lambda d: d.update(kind="bench"), "kind: expected 'run'"),
        (lambda d: d.update(status="done"), "'running', 'complete', 'interrupted'"),
        (lambda d: d.update(created="yesterday"), "ISO 8601"),
        (lambda d: d["epochs"][1].update(step="9"), r"epochs\[1\].step: .*type int"),
        (lambda d: d["epochs"][0].update(epoch=True), r"epochs\[0\].epoch: .*type int"),
        (lambda d: d["data"].update(shape=[8, 8]), "data.shape: expected 3 values, got 2"),
        (lambda d: d["results"][0].update(accuracy=1.5), r"a share in \[0, 1\]"),
        (lambda d: d["results"][0]["confusion"].pop(), "3 rows of 3"),
        (lambda d: d["results"][0].update(robust_low=None), "all or none"),
        (lambda d: d["results"].append(d["results"][0]), "one for each variant"),
        (lambda d: d.update(checkpoints=["../secret"]), "inside the run's folder"),
        (lambda d: d.update(checkpoints=["/etc/passwd"]), "inside the run's folder"),
        (lambda d: d["cost"][0].update(low=9.0), "low <= median <= high"),
    ],
)
def test_a_wrong_record_is_refused_by_name(change, message):
    """The message names the entry that is wrong."""
    content = make_record().to_dict()
    change(content)
    with pytest.raises(RunError, match=message):
        report.RunRecord.from_dict(content)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"privacy": None}, "the conditions of epsilon"),
        ({"threat": None}, "the conditions of robust_accuracy"),
        ({"settings": {"out": Path("x")}}, "settings.out: expected plain JSON"),
        ({"settings": {1: "x"}}, "text keys"),
    ],
)
def test_a_claim_needs_its_conditions(fields, message):
    """No epsilon without a plan, no robust accuracy without a threat model, no objects."""
    with pytest.raises(RunError, match=message):
        make_record(**fields)


def test_epsilon_is_never_claimed_for_what_it_does_not_cover():
    """Not for a plain result, and not beside an exact training loss."""
    with pytest.raises(RunError, match="epsilon of plain"):
        make_record(results=[make_result("plain", 3, epsilon=1.0)])
    with pytest.raises(RunError, match="does not cover"):
        make_epoch(PROTECTED, 1, train_loss=0.5)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"[" * 100_000, b'{"schema": 1, "schema": 1}', b"NaN"],
    ids=["empty", "cut", "no text", "list", "deep", "twice", "NaN"],
)
def test_a_damaged_file_is_one_error_that_names_it(tmp_path, content):
    """No traceback from inside the JSON reader."""
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"run\.json: "):
        report.RunRecord.read(path)


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    """The size limit holds for the file, not for what it turns into."""
    monkeypatch.setattr(_document, "MAX_BYTES", 100)
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    (tmp_path / "run.json").write_bytes(b" " * 101)
    with pytest.raises(RunError, match="expected at most 100 bytes"):
        report.RunRecord.read(tmp_path / "run.json")


def test_writing_is_atomic(tmp_path, monkeypatch):
    """Until all is on the disk the old record stands; a failure leaves it and nothing else."""
    path = tmp_path / "run.json"
    old = make_record(notes=["old"])
    old.write(path)
    seen = []

    def interrupted(descriptor):
        seen.append(report.RunRecord.read(path))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_record(notes=["new"]).write(path)
    monkeypatch.undo()
    assert seen == [old]
    assert report.RunRecord.read(path) == old
    assert os.listdir(tmp_path) == ["run.json"]
    make_record(notes=["new"]).write(path)
    assert report.RunRecord.read(path).notes == ("new",)


@pytest.mark.parametrize("place", ["missing/run.json", "file/run.json"])
def test_a_place_that_cannot_be_written_to_is_one_error(tmp_path, place):
    """The message names the file and says that nothing was lost."""
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="nothing was overwritten"):
        make_record().write(tmp_path / place)


def test_measurements_survive_json(tmp_path):
    """A benchmark's document has the same shape for everyone."""
    rows = make_record().cost
    document = report.Measurements(
        created="2025-11-03", hardware=report.hardware(), versions=report.versions(), rows=rows
    )
    document.write(tmp_path / "bench.json")
    assert report.Measurements.read(tmp_path / "bench.json") == document
    content = json.loads((tmp_path / "bench.json").read_bytes())
    assert set(content) == {"schema", "created", "hardware", "versions", "rows"}


def test_provenance_names_what_numbers_depend_on():
    """Versions and hardware are collected, and no host or user name with them."""
    assert report.versions()["torch"].startswith(torch.__version__.split("+")[0])
    assert set(report.versions()) == {
        *("python", "torch", "opacus", "torchattacks", "cryptography", "safetensors"),
        "secure-cnn",
    }
    assert set(report.hardware()) == {"cpu", "cores", "threads", "memory", "device"}


COMBINATIONS = {
    "plain only": (("plain",), "This run trained without privacy"),
    "with baseline": (("plain", PROTECTED), "plain baseline was trained without privacy"),
    "without baseline": ((PROTECTED,), "There is no plain baseline in this run"),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_section_is_there_and_says_what_is_missing(name):
    """Each combination of variants has all sections and its own honest sentence."""
    variants, sentence = COMBINATIONS[name]
    page = Page(report.render_page(make_record(variants)))
    assert [section for section in SECTIONS if section not in page.ids] == []
    assert sentence in page.text
    assert ("Not private" in page.text) == (PROTECTED not in variants)
    others = [other for _, other in COMBINATIONS.values() if other != sentence]
    assert not any(other in page.text for other in others)
    assert "No example images were kept" in page.text


def test_the_summary_quotes_guarantees_with_their_conditions():
    """Epsilon with delta, rounded up; robust accuracy with interval and attacks, and before."""
    text = Page(report.render_page(make_record())).text
    assert "ε = 3.00 ε spent, at δ = 1e-5" in text  # 2.991 was spent
    assert "60.0% 95% interval 55.0% to 65.0%; worst of pgd, apgd; plain: 60.0%" in text
    assert "ℓ∞ ≤ 0.1, pixels in [0, 1]" in text
    assert "2.00× of plain, 1.80 to 2.20, n = 30" in text
    assert "withheld" in text


def test_a_page_without_threat_epochs_or_results_says_so():
    """Nothing is left blank, and nothing is claimed."""
    empty = make_record(epochs=[], results=[], cost=[], claims={}, threat=None, status="running")
    text = Page(report.render_page(empty)).text
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


def test_an_unfinished_variant_is_named():
    """While the protected variant still trains, the page does not pass for a plain run's."""
    record = make_record(results=[make_result("plain", 3)], status="interrupted")
    text = Page(report.render_page(record)).text
    assert f"No result yet for: {PROTECTED}" in text
    assert "interrupted when this page was written" in text
    assert "This run trained without privacy" not in text


def test_the_page_needs_no_network_and_no_script():
    """No tag or style fetches anything, and the page forbids it to the browser as well."""
    text = report.render_page(make_record(), make_examples())
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
    page = Page(report.render_page(record, make_examples(names)))
    assert "script" not in page.tags
    assert HOSTILE in page.text
    record = make_record(
        variants=("plain",), results=[make_result(HOSTILE, 3)], checkpoints=[HOSTILE]
    )
    page = Page(report.render_page(record))
    assert "script" not in page.tags
    assert ("aria-label", f"Confusion matrix of {HOSTILE}") in page.attributes


def test_a_class_name_is_never_a_formula():
    """Dollar signs stay dollar signs, and a script that our own font lacks warns of nothing."""
    words = Page(report.class_recall(make_record(names=("$x_1$", "猫", "a\nb")))).words
    assert {"$x_1$", "猫", "a b"} <= set(words)


def test_the_page_is_the_same_every_time():
    """No clock, no random identifier, and no global setting of matplotlib shows in it."""
    code = (
        "import hashlib, sys, matplotlib; sys.path.insert(0, 'tests');"
        "matplotlib.rcParams['font.size'] = 33; matplotlib.rcParams['lines.color'] = 'red';"
        "import test_secure_cnn_report as t;"
        "page = t.report.render_page(t.make_record(), t.make_examples());"
        "assert 'matplotlib.pyplot' not in sys.modules and matplotlib.rcParams['font.size'] == 33;"
        "print(page)"
    )
    here = report.render_page(make_record(), make_examples())
    root = Path(__file__).parents[1]
    run = [sys.executable, "-X", "utf8", "-c", code]
    other = subprocess.run(run, cwd=root, capture_output=True, text=True, encoding="utf-8")
    assert other.returncode == 0, other.stderr
    assert other.stdout.rstrip("\n") == here


FIGURES = [
    report.accuracy_curve,
    report.loss_curve,
    report.epsilon_curve,
    report.class_recall,
    lambda record: report.confusion_matrix(record, "plain"),
    lambda record: report.cost_bars(record, "time_ratio"),
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
    colors = report.variant_colors(make_record((PROTECTED, "plain")))
    assert list(colors) == ["plain", PROTECTED]
    assert colors == report.variant_colors(make_record())
    assert len(set(colors.values())) == 2
    record = make_record()
    for figure in (report.accuracy_curve, report.class_recall):
        assert all(color in figure(record) for color in colors.values())


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_examples_render_with_any_number_of_channels(channels):
    """Grey, colour and anything else end in a picture with both predictions."""
    examples = make_examples(channels=channels)
    svg = report.example_figure(examples, 0)
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
            report.Examples(**(good | {name: value}))


def test_the_page_is_written_whole(tmp_path):
    """The file is UTF-8 and is what `render_page` gives."""
    record, examples = make_record(), make_examples()
    report.write_page(record, examples, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text == report.render_page(record, examples)
