"""The tables in the documents: each figure of the rows in its place, and none that was typed."""

import importlib
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from secure_cnn.record import Measurements, Row

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def modules():
    """The scripts of docs/, each of which finds the others beside it."""
    names = ("cells", "archive_tables", "tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


@pytest.fixture
def tables(modules):
    """docs/tables.py, which is a script."""
    return modules["tables"]


@pytest.fixture
def archive(modules):
    """docs/archive_tables.py."""
    return modules["archive_tables"]


@pytest.fixture
def cells(modules):
    """docs/cells.py."""
    return modules["cells"]


def row(variant, metric, median, unit="x", *, case="compact", spread=0.0):
    """A row, of the middle of its interval."""
    ends = {"low": median - spread, "median": median, "high": median + spread}
    return Row(case=case, variant=variant, metric=metric, unit=unit, n=9, **ends)


def document(*rows):
    """Rows measured on one machine."""
    return Measurements(
        created="2026-01-02T03:04:05+00:00",
        hardware={"cpu": "Abacus", "threads": 2},
        versions={"torch": "1", "opacus": "2", "torchattacks": "3"},
        rows=rows,
    )


def grids(text):
    """The tables of a text: of each the cells by line and by column, both by name."""
    found = []
    for block in text.split("\n\n"):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        if block.startswith("|"):
            assert len({len(line) for line in lines}) == 1, block
            found.append({line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]})
    return found


def test_the_documents_show_what_was_measured(tables, tmp_path, monkeypatch):
    """Made anew from the JSON files, README and the page of measurements stay as they are."""
    (tmp_path / "docs/how-to").mkdir(parents=True)
    names = [path.relative_to(ROOT) for path in DOCS.glob("*.json")]
    how_to = (
        "how-to/recipes.md",
        "how-to/slow-path.md",
        "how-to/leakage.md",
        "how-to/erasure.md",
        "how-to/train-faster.md",
    )
    made = ("benchmarks.md", "defaults.md", "pitfalls.md", *how_to)
    pages = ("README.md", *(f"docs/{name}" for name in made))
    for name in [*names, *pages, "docs/demo.txt"]:
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(tables, "DOCS", tmp_path / "docs")
    tables.main()
    for name in pages:
        assert (tmp_path / name).read_text("utf-8") == (ROOT / name).read_text("utf-8"), (
            f"{name}: `make docs` was not run after a measurement, or a figure was typed"
        )


def test_a_network_has_a_table_of_its_own(tables):
    """A variant a line, with its time, its ratio and its interval, and its memory if measured."""
    rows = [
        *(row("plain", "time", 0.01, "s", case=case) for case in ("compact", "vgg11")),
        *(row("plain", "time_ratio", 1.0, case=case) for case in ("compact", "vgg11")),
        row("private", "time", 0.0152, "s"),
        row("private", "time_ratio", 1.52, spread=0.04),
        row("private", "memory_ratio", 1.25),
    ]
    text = tables.step_tables(document(*rows))
    first, second = grids(text)
    assert list(first["private"].values()) == ["private", "15.2", "1.52 (1.48 to 1.56)", "1.25"]
    assert list(second) == ["plain"]
    assert "**compact**, 256 images of 1x28x28 a step" in text
    assert "Abacus, 2 threads; torch 1" in text
    assert text.endswith("medians of 9 rounds, measured 2026-01-02.")


def test_copies_are_told_below_their_network(tables):
    """With their goal, and whether it is met: the same rows on both sides of it."""
    steps = [row("plain", "time", 0.01, "s"), row("plain", "time_ratio", 1.0)]
    assert "copies" not in tables.step_tables(document(*steps))
    for ratio, verdict in ((0.9, "met"), (1.6, "missed")):
        copies = row("private-4-copies", "copies_ratio", ratio, spread=0.05)
        text = tables.step_tables(document(*steps, copies))
        figure = f"{ratio:.2f} ({ratio - 0.05:.2f} to {ratio + 0.05:.2f})"
        line = f"`private-4-copies` ÷ as many plain steps: {figure}; the goal, at most 1.0, is"
        assert f"{line} {verdict}." in text.split("\n\n")


def test_the_front_sets_rivals_beside_ours(tables):
    """Networks across, below ours the mode of Opacus that is fastest there; no figure, no words."""
    hooks = {"compact": 3.0, "resnet20": 5.0}
    rows = [
        row(variant, metric, value, unit, case=case)
        for case, step in (("compact", 0.01), ("resnet20", 0.05))
        for variant, ratio in (
            *(("opacus-hooks", hooks[case]), ("opacus-ghost", 4.0)),
            *(("plain", 1.0), ("private", 1.5)),
        )
        for metric, value, unit in (("time", step * ratio, "s"), ("time_ratio", ratio, "x"))
    ]
    memory = [
        row("opacus-hooks", "memory_ratio", 2.5),
        row("opacus-ghost", "memory_ratio", 1.25, case="resnet20"),
    ]
    elsewhere = row("private", "time_ratio", 9.0, case="vgg11")
    text = tables.front_table(document(*rows, *memory, elsewhere))
    (grid,) = grids(text)
    ours, theirs, *others = grid.values()
    assert list(ours.values()) == ["DP-SGD", "1.50", "", "1.50", ""]
    assert list(theirs.values())[1:] == ["3.00", "2.50", "4.00", "1.25"]
    assert all(set(list(each.values())[1:]) == {""} for each in others)
    assert "10.0 ms and 50.0 ms" in text


def test_parts_have_a_table_beside_the_whole(tables):
    """The case is said once, above; a part that a variant does not have is empty."""
    case = "net, digits, batch 8, save every 5"
    rows = [
        row(variant, metric, value, unit, case=case)
        for variant, part in (("plain", "forward"), ("pgd", "attack"), ("plain-again", "forward"))
        for metric, value, unit in (
            ("time", 0.5, "s"),
            ("time_ratio", 1.0, "x"),
            ("images_per_second", 16.0, "images/s"),
            (f"time_{part}", 0.25, "s"),
        )
    ]
    text = tables.overhead_tables(document(*rows, row("pgd", "disk", 2048.0, "B", case=case)))
    whole, parts = grids(text)
    assert text.startswith(f"**{case}**\n\n|")
    assert list(whole["pgd"].values()) == ["pgd", "500.0", "1.00", "", "2"]
    assert parts["pgd"] == {"variant": "pgd", "attack": "250.00", "forward": ""}
    assert f"{case}: plain against plain gave 1.00" in text


def test_growth_has_the_axes_across(tables):
    """An exponent with its standard error in a cell."""
    rows = [
        row("plain", "exponent", 0.9, "1", case="batch"),
        row("plain", "exponent_error", 0.02, "1", case="batch"),
        row("pgd", "exponent", 1.2, "1", case="side"),
        row("pgd", "exponent_error", 0.1, "1", case="side"),
    ]
    (grid,) = grids(tables.exponent_table(document(*rows)))
    assert grid["plain"] == {"variant": "plain", "batch": "0.90 ± 0.02", "side": ""}
    assert grid["pgd"] == {"variant": "pgd", "batch": "", "side": "1.20 ± 0.10"}


def archive_rows(load):
    """Rows of a sealed file whose load is so many times that of safetensors."""
    size = {"case": "fp32-1MiB"}
    return [
        row("sealed", "save", 0.02, "s", **size),
        row("sealed", "one_tensor", 0.001, "s", **size),
        row("age", "save", 0.1, "s", **size),
        row("age", "durable_save", 0.2, "s", **size),
        row("sealed", "durable_save_vs_age", 0.1, **size),
        row("sealed", "load_vs_safetensors", load, **size),
        row("sealed", "payload_vs_aesgcm", 1.6 - load / 2, **size),
        row("sealed", "inspect", 0.001, "s", **size),
        row("sealed+signed", "size_overhead", load / 15000, "1", **size),
    ]


def test_every_planted_defect_is_told(tables):
    """Where it was planted and how often it was found; honest trainings have their own table."""
    planted = Row(
        case="noise",
        variant="halved",
        metric="caught",
        median=0.9,
        low=0.6,
        high=1.0,
        unit="1",
        n=10,
    )
    honest = replace(
        planted, case="honest", variant="adam", metric="false_alarm", median=0.0, low=0.0
    )
    defects, trainings = grids(tables.audit_tables(document(planted, honest)))
    assert defects["halved"] == {"planted": "halved", "in": "noise", "caught": "9 of 10"}
    assert trainings["adam"]["failed"] == "0 of 10"


def test_a_sealed_file_is_told_in_three_tables(archive):
    """Times of all, ours against the others, and the rest; each figure where it belongs."""
    times, against, rest = grids(archive.archive_tables(document(*archive_rows(1.2))))
    assert times["sealed"]["`save`"] == times["sealed"]["`durable_save`"] == "20.0"
    assert times["age"]["`durable_save`"] == "200"
    assert list(against) == ["sealed ÷ safetensors", "sealed ÷ age"]
    assert against["sealed ÷ safetensors"]["`load`"] == "1.20"
    assert against["sealed ÷ safetensors"]["goal"] == "load ≤ 1.5"
    assert against["sealed ÷ age"]["`durable_save`"] == "0.10"
    assert list(rest["inspect"].values()) == ["inspect", "1.00 ms", "", "≤ 20 ms"]
    assert rest["payload ÷ aesgcm"]["goal"] == "≥ 0.9"


def test_a_missed_goal_is_bold(archive):
    """Control: the same rows on both sides of their goals, at most and at least."""
    held = archive.archive_tables(document(*archive_rows(1.2))).rpartition("Bold")[0]
    assert "**" not in held
    missed = archive.archive_tables(document(*archive_rows(1.8))).rpartition("Bold")[0]
    bold = [cell.strip() for cell in missed.split("|") if "**" in cell]
    assert bold == ["**1.80**", "**0.70**", "**0.012 %**"]


def test_nothing_that_was_measured_of_an_archive_is_lost(cells, archive):
    """Each row of the published file has its median in the tables of its size."""
    measured = Measurements.read(DOCS / "archive.json")
    for case in cells.cases_of(measured, "save"):
        rows = [each for each in measured.rows if each.case == case]
        text = archive.archive_tables(replace(measured, rows=tuple(rows)))
        for each in rows:
            scale, unit = archive.SHOWN[each.unit]
            shown = cells.spread(each, scale=scale, unit=unit)
            assert shown in text or cells.spread(each, scale=scale) in text, each


def explained(metric, text):
    """Whether a table has the metric in its first column, or `start…` of it."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall("`(.+?)`", cell)]
    return any(
        metric.startswith(n.removesuffix("…")) if n.endswith("…") else metric == n for n in names
    )


def test_every_metric_is_explained():
    """What stands in a published file stands in the page about these files; a control does not."""
    text = (DOCS / "measurements.md").read_text(encoding="utf-8")
    files = [Measurements.read(path) for path in DOCS.glob("*.json")]
    metrics = {each.metric for measured in files for each in measured.rows}
    assert [metric for metric in sorted(metrics) if not explained(metric, text)] == []
    assert not explained("save_against_age", text)


def test_a_name_without_its_marks_is_refused(tables):
    """A page that lost its place for a table is not left with the old one."""
    assert tables.replaced("<!-- a -->\nold\n<!-- /a -->", "a", "new") == (
        "<!-- a -->\nnew\n<!-- /a -->"
    )
    with pytest.raises(SystemExit, match="expected <!-- b -->"):
        tables.replaced("<!-- a -->\n<!-- /a -->", "b", "new")


def test_the_versions_of_rivals_stand_under_their_table(cells, archive):
    """As far as the document names them; the others' tables stay as they are."""
    measured = document(*archive_rows(1.2))
    told = {"torch": "1", "cryptography": "5", "age": "6.7", "tensorizer": "8"}
    text = archive.archive_tables(replace(measured, versions=told))
    assert "2 threads; torch 1, cryptography 5, age 6.7, tensorizer 8; measured" in text
    assert "2 threads; torch 1, opacus 2, torchattacks 3; measured" in cells.made_on(measured)


def test_the_defaults_have_a_line_for_each_data_set(tables):
    """Its accuracies with each protection, and for how long and against what it was trained."""
    rows = [
        row("plain", "accuracy", 0.8, "1", case="cats", spread=0.01),
        row("private", "accuracy", 0.6, "1", case="cats", spread=0.02),
        row("n-fgsm", "accuracy", 0.5, "1", case="cats"),
        row("n-fgsm", "robust_accuracy", 0.4, "1", case="cats", spread=0.05),
        row("n-fgsm", "eps", 0.05, "1", case="cats"),
        row("private", "noise_multiplier", 1.234, "1", case="cats"),
        *(row("plain", metric, 2, "1", case="cats") for metric in ("epochs", "steps")),
        *(row("private", metric, 10, "1", case="cats") for metric in ("epochs", "steps")),
        row("plain", "accuracy", 0.9, "1", case="dogs"),
        *(row(v, "epochs", 3, "1", case="dogs") for v in ("plain", "private")),
    ]
    reached, conditions = grids(tables.defaults_tables(document(*rows)))
    assert reached["cats"] == {
        "data": "cats",
        "plain": "80.0 % (79.0 to 81.0)",
        "private": "60.0 % (58.0 to 62.0)",
        "adversarial": "50.0 %",
        "both": "",
        "seeds": "9",
    }
    assert reached["dogs"]["plain"] == "90.0 %"
    assert conditions["cats"]["epochs"] == "2 / 10"
    assert conditions["cats"]["noise multiplier"] == "1.23"
    assert conditions["cats"]["adversarial under PGD"] == "40.0 % (35.0 to 45.0)"
    assert conditions["dogs"]["epochs"] == "3"


def test_each_strategy_has_a_line_with_its_way_to_the_target(tables):
    """A case a table; what was not reached, and has no ratio, is empty."""
    rows = [
        row("before", "seconds", 100.0, "s"),
        row("before", "accuracy", 0.921, "1", spread=0.001),
        row("before", "reached", 0.0, "1"),
        row("fast", "seconds", 20.0, "s", spread=2.0),
        row("fast", "macro_recall", 0.92, "1"),
        row("fast", "time_ratio", 0.2),
        row("fast", "seconds_to_target", 15.0, "s"),
        row("fast", "mean_seconds_to_target", 16.0, "s"),
        row("fast", "target_ratio", 0.25),
        row("fast", "reached", 1.0, "1"),
        row("before", "seconds", 3.0, "s", case="other"),
        row("before", "reached", 1.0, "1", case="other"),
    ]
    text = tables.strategies_tables(document(*rows))
    first, second = grids(text)
    assert (list(first), list(second)) == (["before", "fast"], ["before"])
    assert first["before"]["accuracy, %"] == "92.1 (92.0 to 92.2)"
    assert first["before"]["s to target"] == ""
    assert first["before"]["reached"] == "0 of 9"
    assert first["fast"]["recall, %"] == "92.0"
    assert first["fast"]["s"] == "20.0 (18.0 to 22.0)"
    assert first["fast"]["s to target"] == "15.0"
    assert first["fast"]["reached"] == "9 of 9"
    assert "| 0.20 | 16.0 | 15.0 | 0.25 |" in text
    assert "medians of 9 seeds" in text


def test_each_recipe_on_record_has_a_line_with_its_protections(tables):
    """Those without figures have none; of an attack the number of its images is said."""
    rows = [
        row("plain", "accuracy", 0.92106, "1", case="fashion-fast", spread=0.001),
        row("n-fgsm", "accuracy", 0.8, "1", case="robust"),
        row("n-fgsm", "macro_recall", 0.79, "1", case="robust"),
        row("n-fgsm", "autoattack", 0.5, "1", case="robust", spread=0.01),
        row("n-fgsm", "attacked", 2000, "1", case="robust"),
        row("plain", "accuracy", 0.5, "1", case="nobody's"),
    ]
    text = tables.recipes_table(document(*rows))
    assert "| `fashion-fast` |  |  | 92.11 (92.01 to 92.21) |  |  | 9 |" in text
    assert "| `robust` |  | 8/255 | 80.00 | 79.00 | 50.0 (49.0 to 51.0) of 2,000 | 9 |" in text
    assert "nobody" not in text
    assert "`fashion-private-3`" not in text


def test_a_radius_is_shown_as_it_is_written(tables):
    assert [tables.pixels(each) for each in (None, 8 / 255, 0.1)] == ["", "8/255", "0.1"]
