"""What the pages share: the table of before and after, the map, the proof, one design."""

import math
import re

import pytest
from support.audit_records import record_of as audit_record
from support.certificates import report as certification
from support.leakage_records import record_of as leakage_record
from support.robustness_records import record_of as robustness_record
from support.run_records import PROTECTED, Page, make_record, make_result

from secure_cnn.errors import RunError
from secure_cnn.pages import (
    render_audit,
    render_bench,
    render_leakage,
    render_page,
    render_robustness,
)
from secure_cnn.pages.canvas import tick_percent
from secure_cnn.pages.classes import recall_table
from secure_cnn.record import Measurements, RobustnessRecord, Row
from secure_cnn.record.wording import date, epsilon, shown


def bench_of(**metrics):
    """A benchmark of plain and one protection, trained too."""
    rows = [
        Row(case="compact", variant=v, metric=m, median=x, low=x, high=x, unit="x", n=5)
        for v in ("plain", "private")
        for m, x in {
            **{"time": 0.1, "time_ratio": 1.0, "images_per_second": 9.0},
            **{"accuracy_same_examples": 0.9, "macro_recall_same_examples": 0.8},
            **(metrics if v == "private" else {}),
        }.items()
    ]
    return Measurements(created="2026-01-01", hardware={}, versions={}, rows=tuple(rows))


def certified(**changes):
    """An evaluation with a certification."""
    fields = vars(robustness_record()) | {"certification": certification().to_dict()}
    return RobustnessRecord(**(fields | changes))


def test_the_change_is_in_points_with_its_sign():
    """Against the baseline, of which there is no change; nothing for a class without images."""
    before = make_result("plain", 3, recall=(1.0, 0.5, math.nan), robust_recall=None)
    after = make_result("x", 3, accuracy=0.75, recall=(0.9, 0.5004, math.nan))
    head, rows = recall_table({"plain": before, "x": after}, ("a", "b", "c"), "plain")
    assert head == ("class", "plain", "x", "change", "attacked")
    assert rows == [
        ("accuracy", "80.0%", "75.0%", "−5.0", "60.0%"),
        ("macro recall", "80.0%", "80.0%", "0.0", "60.0%"),
        ("a", "100.0%", "90.0%", "−10.0", "60.0%"),
        ("b", "50.0%", "50.0%", "0.0", "60.0%"),
        ("c", "–", "–", "–", "60.0%"),
    ]
    head, _ = recall_table({"x": after}, ("a", "b", "c"), None)
    assert head == ("class", "x", "attacked")


def test_words_round_in_nobodys_favour():
    """ε goes up, and what is no date stays as it was."""
    assert epsilon(2.991) == epsilon(3.0) == "3.00"
    assert epsilon(2.9901) == "3.00"
    assert epsilon(None) == "–"
    assert date("2025-11-03T14:20:00+00:00") == "3 November 2025, 14:20 UTC"
    assert date("yesterday") == "yesterday"


def test_a_run_shows_what_its_protection_gives_and_takes():
    """Both variants on the front, with the rule; one alone is a table without a map."""
    page = render_page(make_record())
    assert 'aria-label="Accuracy and privacy"' in page
    assert "on the Pareto front: no other variant is at least as good" in page
    assert page.count("● yes") == 2
    alone = render_page(make_record((PROTECTED,)))
    assert "Accuracy and privacy" not in alone
    assert alone.count("● yes") == 1


def test_a_bench_shows_the_map_where_a_protection_was_measured():
    """Without ε and robust accuracy, accuracy and time are in its other figures."""
    assert "Pareto front" not in render_bench(bench_of())
    page = render_bench(bench_of(epsilon_same_examples=3.0))
    assert 'aria-label="Accuracy and privacy"' in page


def test_an_evaluation_shows_what_was_proven():
    """With the chance of error and the abstentions; and nothing where nothing was proven."""
    text = Page(render_robustness(certified())).text
    assert "noise of σ = 0.25 (1000 samples an image; each statement fails with a chance" in text
    assert "0.0% abstained" in text
    assert "not a measurement" in text
    assert "What is proven" not in Page(render_robustness(robustness_record())).text
    with pytest.raises(RunError, match=r"robustness\.certification: expected entries"):
        certified(certification={"summary": {}})
    with pytest.raises(RunError, match=r"robustness\.certification: expected entries"):
        certified(certification={})


def test_a_tick_says_where_it_is():
    """Ticks between whole percents are not rounded to others, and no two read the same."""
    assert [tick_percent(n / 1000) for n in (575, 600, 0, 1000)] == ["57.5%", "60%", "0%", "100%"]


def test_what_is_inside_of_a_claim_has_its_own_line():
    """Objects are opened, however deep, lists are read as such; nothing of either is lost."""
    content = {
        "max_norm": 1.0,
        "privacy": {"epsilon": 0.1234567891, "by": {"part": None}, "none": {}},
        "interval": [0.25, 1 / 3],
        "empty": [],
    }
    assert shown(content) == [
        ("max norm", "1"),
        ("privacy: epsilon", "0.123457"),
        ("privacy: by: part", "not set"),
        ("privacy: none", "none"),
        ("interval", "0.25, 0.333333"),
        ("empty", "none"),
    ]


def test_a_bench_names_its_variants_whole_and_its_curves_in_numbers():
    """A long name stands whole above its bar and below the curves; each point is in a table."""
    long = "private+n-fgsm+average+sealed-background"
    rows = [
        Row(case=case, variant=long, metric=m, median=x, low=x, high=x, unit=unit, n=5)
        for case, m, x, unit in (
            *(("net", m, x, "s") for m, x in (("time", 0.1), ("time_forward", 0.1))),
            *(("net", m, 1.0, "x") for m in ("time_ratio", "images_per_second")),
            *(("batch 8", "time", 0.01234, "s"), ("batch 16", "time", 0.02345, "s")),
            ("batch", "exponent", 0.9, "1"),
        )
    ]
    page = render_bench(
        Measurements(created="2026-01-01", hardware={}, versions={}, rows=tuple(rows))
    )
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", page)
    assert drawn.count(long) == 3
    for words in ("batch 8", "batch 16", "12.34", "23.45"):
        assert words in page


def test_the_skip_link_leads_past_the_links():
    """Who skips is after the navigation of a bench, not before it again."""
    page = render_bench(bench_of())
    assert page.index("</nav>") < page.index('id="first"') < page.index("<section")


def test_all_pages_have_one_design():
    """The same styles, the same promise to the browser, links that lead somewhere."""
    pages = [
        render_page(make_record()),
        render_audit(audit_record()),
        render_robustness(certified()),
        render_leakage(leakage_record()),
        render_bench(bench_of(epsilon_same_examples=3.0)),
    ]
    assert len({re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1] for page in pages}) == 1
    for text in pages:
        page = Page(text)
        assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
        links = [v[1:] for n, v in page.attributes if n == "href" and v.startswith("#")]
        assert "first" in links
        assert set(links) <= set(page.ids)
        assert len(page.ids) == len(set(page.ids))
        assert not {"script", "link", "iframe"} & set(page.tags)
        figures = text.count("<figure")
        assert text.count("<table") >= min(figures, 2)
