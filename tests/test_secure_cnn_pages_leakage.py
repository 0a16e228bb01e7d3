"""The page of a leakage measurement: what voids it, what it may say, and what it must not."""

import base64
import io
import json
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.leakage_records import (
    attack_of,
    extraction_of,
    inversion_of,
    membership_of,
    rate_of,
    record_of,
)
from support.run_records import Page

from privacy.leakage import MEMBERSHIP_ATTACKS
from secure_cnn.errors import RunError
from secure_cnn.leakage.membership import LABEL_ONLY
from secure_cnn.pages import InversionPicture, render_leakage, write_leakage
from secure_cnn.record import (
    MEMBERSHIP_ATTACKS_IN_WORDS,
    ControlRecord,
    ExposedRecord,
    LeakageRecord,
)
from secure_cnn.record.wording import fraction

HOSTILE = '</title><script>alert("x")</script>&$\\frac{a}{b}$<b>'
FAILED = ControlRecord(name="planted leak", expected="TPR 1", got="TPR 0.2", passed=False)


def whole(**changes):
    """A record of everything that can be measured."""
    values = {
        "inversion": [inversion_of(p, b, 3) for p in ("plain", "noised") for b in (1, 8)],
        "extraction": [extraction_of(queries=n) for n in (100, 1000)],
    }
    return record_of(**(values | changes))


def picture(count=2, channels=1, side=4, dtype=np.float64, title="plain gradient"):
    """Originals that are black, reconstructions that are white."""
    white = 255 if dtype == np.uint8 else 1
    shape = (count, channels, side, side)
    return InversionPicture(
        title=title,
        originals=np.zeros(shape, dtype),
        reconstructions=np.full(shape, white, dtype),
    )


def facts_of(page):
    """The figures of the summary by their names."""
    found = re.findall(r'<span class="name">(.*?)</span><b>(.*?)</b><span>(.*?)</span>', page)
    return {name: (value, detail) for name, value, detail in found}


def table_of(page, label):
    """The rows of a table by the label of its region, each a list of texts."""
    part = page.split(f'aria-label="{label}"')[1].partition("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", part.partition("<tbody>")[2], re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def test_the_summary_quotes_the_strongest_attack_with_its_spread():
    """The area over models, rates as fractions, and which are of all models."""
    record = record_of()
    facts = facts_of(render_leakage(record))
    best = record.membership.strongest
    assert facts["Strongest attack"][0] == "lira"
    assert facts["AUC"] == (fraction(best.areas[0]), "0.733–0.742 over 17 models; a guess: 0.5")
    assert facts["TPR at FPR 0.01"][0] == "0.0769"
    assert "all models" not in facts["TPR at FPR 0.01"][1]
    assert "all models together" in facts["TPR at FPR 0.001"][1]
    assert facts["ε"] == ("none", "nothing was promised of this training")
    assert facts["Accuracy"] == ("86.0%", "on its own training images 99.0%")
    few = facts_of(render_leakage(record_of(membership=membership_of(others=120, models=1))))
    assert [name for name in few if name.startswith("TPR")] == ["TPR at FPR 0.1"]


def test_a_failed_control_voids_the_page():
    """Above everything, and no figure of the measurement is left in the summary."""
    broken = membership_of(broken=("lira: TPR at least 0.9",))
    page = render_leakage(whole(membership=broken, controls=[*record_of().controls, FAILED]))
    assert re.search(r'<p class="lead bad">VOID: 1 of 2 controls failed \(planted leak\)', page)
    assert set(facts_of(page)) == {"Leakage", "ε", "Accuracy"}
    assert "✗ FAILED" in page
    assert "More than ε allows" not in page
    assert "No control was run" in render_leakage(record_of(controls=()))
    assert "No control was run" not in page


def test_more_than_epsilon_allows_fails_the_page():
    """With what was found; within ε it says so, and never that ε was verified."""
    broken = membership_of(broken=("lira: TPR at least 0.9",))
    page = render_leakage(record_of(membership=broken, epsilon=0.5, delta=1e-5))
    assert re.search(r'<p class="lead bad">FAILED: attacks find more than ε = 0.50', page)
    assert "<li>lira: TPR at least 0.9</li>" in page
    fine = Page(render_leakage(record_of(epsilon=3.0, delta=1e-5))).text
    assert "Nothing was found that ε = 3.00 rules out." in fine
    assert "A measurement, never a verification of ε" in fine
    assert "promised at δ = 1e-5; not verified here" in fine


def test_the_curve_has_what_epsilon_allows_and_hatches_what_is_not_resolved():
    """In the figure and in its table; a plain model's has no such line."""
    plain = render_leakage(record_of())
    record = record_of(epsilon=3.0, delta=1e-5)
    private = render_leakage(record)
    assert "allow no more" in private
    assert "allow no more" not in plain
    assert "too few others to tell: FPR below 0.0044" in plain
    assert "<pattern" in plain
    rows = table_of(private, "True positive rates by false positive rate")
    assert [row[0] for row in rows] == ["0.01", "0.1", "0.5"]
    assert rows[0][-1] == fraction(record.allowed_tpr(0.01))
    assert rows[0][1] == fraction(dict(record.membership.strongest.curve)[0.01])
    many = render_leakage(record_of(membership=membership_of({"lira": 0.9}, others=200_000)))
    assert "<pattern" in many  # of the legend alone: the sign stays, with the rate it is about
    assert "FPR below 5e-05" in many
    assert table_of(many, "True positive rates by false positive rate")[0][0] == "0.0001"


def test_every_attack_is_in_the_table_with_interval_oracle_ties_and_queries():
    """The strongest first; the oracle is named so."""
    attacks = [
        attack_of("weak", 0.1),
        attack_of("labels", 0.5, queries=9, rates=[rate_of("target", 0.1, 0.5, ties=7)]),
    ]
    rows = table_of(
        render_leakage(record_of(membership=membership_of(attacks=attacks))), "Attack by attack"
    )
    assert [row[0] for row in rows] == ["labels", "weak"]
    assert rows[0][3:] == ["–", "–", "7", "9"]
    assert rows[1][2].split("\n")[2] == "FPR 0.100"
    assert rows[1][2].split("\n")[3].startswith("oracle 0.1")
    assert rows[1][4].split("\n")[3] == "all models"
    value, ends = rows[1][2].split("\n")[:2]
    low, high = map(float, ends.split("–"))
    assert low < float(value) < high


def test_a_rate_that_was_not_kept_is_said_to_be_none():
    """In its cell, and it is not in the summary."""
    rate = rate_of("target", 0.01, 0.9, false_alarms=450, realised_fpr=0.2)
    page = render_leakage(
        record_of(membership=membership_of(attacks=[attack_of("ties", rates=[rate])]))
    )
    assert table_of(page, "Attack by attack")[0][2].split("\n")[2] == "but FPR 0.200"
    assert not any(name.startswith("TPR") for name in facts_of(page))


def test_what_a_verdict_is_worth_is_said_by_prior():
    """And where nobody is named it is nothing, not always right."""
    rates = [
        rate_of("target", 0.1, 1.0),
        rate_of(
            "target", 0.01, 1.0, hits=0, tpr=0.0, tpr_low=0.0, false_alarms=0, realised_fpr=0.0
        ),
    ]
    membership = membership_of(attacks=[attack_of("lira", rates=rates)])
    rows = table_of(render_leakage(record_of(membership=membership)), "PPV by prior")
    assert rows[0] == ["0.1", *(fraction(each) for each in rates[0].ppv.values())]
    assert rows[1] == ["0.01", *["nobody named"] * 3]


def test_parts_that_were_not_measured_are_left_out_by_name():
    """Each of the three; and what is there has its section."""
    parts = {
        "membership": (None, "who was in the data", "Attack by attack"),
        "inversion": ((), "images from gradients", "Images from gradients"),
        "extraction": ((), "copies from answers", "Copies from answers"),
    }
    full = render_leakage(whole())
    assert "Not measured" not in full
    for name, (nothing, words, heading) in parts.items():
        page = render_leakage(whole(**{name: nothing}))
        assert f"Not measured: {words}." in page
        assert f"<h2>{heading}</h2>" not in page
        assert f"<h2>{heading}</h2>" in full
    assert "Who was in the data was not measured." in render_leakage(whole(membership=None))


def test_controls_are_folded_behind_the_results_unless_one_failed():
    """Then they come first, and open."""
    fine = render_leakage(record_of())
    assert fine.index('id="membership"') < fine.index('<section id="controls">')
    assert "<details><summary>All 1 controls of memberships fired" in fine
    failed = render_leakage(record_of(controls=[*record_of().controls, FAILED]))
    assert failed.index('<section id="controls">') < failed.index('id="membership"')
    assert "controls of memberships fired" not in failed
    assert [row[1] for row in table_of(failed, "Controls")] == ["✗ FAILED", "✓ fired"]
    for page in (fine, failed):
        assert page.count('<section id="controls">') == 1
        assert len(table_of(page, "Controls")) in (1, 2)


def test_every_attack_is_told_in_words():
    """By those of the record's room, which have one for each there is."""
    assert set(MEMBERSHIP_ATTACKS_IN_WORDS) == {*MEMBERSHIP_ATTACKS, *LABEL_ONLY}
    page = render_leakage(record_of(membership=membership_of({"base": 0.9, "mine": 0.8})))
    words = MEMBERSHIP_ATTACKS_IN_WORDS["base"]
    assert f"<dt>base</dt><dd>{words}</dd>" in page
    assert MEMBERSHIP_ATTACKS_IN_WORDS["lira"] not in page


def test_of_two_shadow_models_it_is_said_that_lira_is_one_attack():
    """And that nobody can be told to be exposed; of eight, neither."""
    both = {"lira": 0.9, "lira-own-variance": 0.9}
    for models, said in ((3, True), (9, False)):
        page = render_leakage(record_of(membership=membership_of(both, models=models)))
        assert ("lira-own-variance is lira:" in page) == said
        assert ("Not told: with 2 shadow models each image is in the data of 1" in page) == said
        assert ('aria-label="The most exposed examples"' in page) != said


def test_who_is_found_by_chance_is_not_called_exposed():
    """3 of 8 are, among 4,500: a quarter of an image is to be expected so; 4 of 8 are not."""
    for found, shown in ((3, False), (4, True)):
        exposed = [ExposedRecord(digest="7e" * 32, found=found, of=8)]
        page = render_leakage(record_of(membership=membership_of(exposed=exposed)))
        assert ("7e7e7e7e7e7e7e7e" in page) == shown
        assert ("No example was given away more often than chance explains" in page) != shown


def test_classes_have_intervals_and_numbers():
    """For each attack that is shown."""
    found = membership_of({"lira": 0.9})
    (row, *_) = table_of(render_leakage(record_of(membership=found)), "AUC by class")
    one = found.strongest.classes[0]
    ends = f"{fraction(one.low)}–{fraction(one.high)}"
    assert row == ["cat", "750", "750", f"{fraction(one.area)}\n{ends}"]


def test_exposed_examples_are_digests():
    """The beginning of each, and in how many models."""
    found = [ExposedRecord(digest="0123456789abcdef" + "f" * 48, found=7, of=8)]
    page = render_leakage(record_of(membership=membership_of(exposed=found)))
    rows = table_of(page, "The most exposed examples")
    assert rows == [["0123456789abcdef", "7 of 8", "0.875"]]
    assert "abcdeff" not in page
    none = render_leakage(record_of(membership=membership_of(exposed=())))
    assert "No example was given away" in none


def test_images_and_copies_have_their_tables():
    """With intervals, and beside the copy that never asked; what is not known is a dash."""
    page = render_leakage(
        whole(
            inversion=[inversion_of("clipped", 4, 16, psnr=math.inf)],
            extraction=[extraction_of(baseline=None, transfer=None)],
        )
    )
    (row,) = table_of(page, "Images from gradients")
    assert row[:4] == ["clipped", "4", "16 of 16", "1.000"]
    assert row[5:] == ["1,000", "∞", "0.90"]
    (row,) = table_of(page, "Copies from answers")
    assert row == [
        *("unseen", "probabilities", "1,000", "84.0%", "–", "88.0%", "80.0%", "–", "44.0%")
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_are_in_the_page_alone(tmp_path, dtype, channels):
    """As PNG, originals above reconstructions, pixel for pixel; the record knows nothing of it."""
    write_leakage(whole(), tmp_path, [picture(channels=channels, dtype=dtype)])
    page = (tmp_path / "leakage.html").read_text(encoding="utf-8")
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)", page)
    images = [np.array(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]
    assert [image.shape[:2] for image in images] == [(4, 4)] * 4
    assert [int(image[..., :3].mean()) for image in images] == [0, 0, 255, 255]
    assert "png" not in (tmp_path / "leakage.json").read_text()
    assert LeakageRecord.read(tmp_path / "leakage.json") == whole()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["leakage.html", "leakage.json"]


def test_pictures_alone_are_shown_up_to_a_number():
    """More are counted, not drawn."""
    page = render_leakage(record_of(), [picture(1) for _ in range(14)])
    assert page.count("originals above reconstructions") == 12
    assert "because of their number: 2." in page
    assert "Not shown" not in render_leakage(record_of(), [picture(1)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 9}, r"picture\.originals: expected \[n, c, h, w\] of at most 8 images of 512"),
        ({"side": 513, "count": 1}, r"picture\.originals: .*513"),
        ({"count": 0}, r"picture\.originals"),
        ({"channels": 0}, r"picture\.originals"),
        ({"dtype": np.int64}, r"picture\.originals: expected uint8, or floats in \[0, 1\]"),
    ],
)
def test_pictures_of_another_kind_are_refused(changes, message):
    """Before anything is drawn."""
    with pytest.raises(RunError, match=message):
        picture(**changes)


def test_pictures_that_do_not_fit_together_are_refused():
    """Other shapes, other ranges, no numbers."""
    one = picture()
    for wrong, message in (
        (np.zeros((1, 1, 4, 4)), r"picture\.reconstructions: expected shape \(2, 1, 4, 4\)"),
        (np.full((2, 1, 4, 4), 1.5), r"picture\.reconstructions: expected uint8, or floats"),
        (np.full((2, 1, 4, 4), np.nan), r"picture\.reconstructions: expected uint8, or floats"),
        (np.zeros((2, 4, 4)), r"picture\.reconstructions: expected \[n, c, h, w\]"),
    ):
        with pytest.raises(RunError, match=message):
            replace(one, reconstructions=wrong)


def test_text_of_a_file_is_text_everywhere():
    """A hostile attack, class, control, pool, digest, note or prior, in the page and in figures."""
    attack = attack_of(HOSTILE, 1.0, classes=(HOSTILE, "dog"))
    rates = [replace(rate, ppv={HOSTILE: 0.5}) for rate in attack.rates]
    membership = membership_of(
        attacks=[replace(attack, rates=tuple(rates))],
        exposed=[ExposedRecord(digest=HOSTILE, found=8, of=8)],
        broken=(HOSTILE,),
    )
    control = ControlRecord(name=HOSTILE, expected=HOSTILE, got=HOSTILE, passed=True)
    record = whole(
        membership=membership, controls=[control], notes=(HOSTILE,), model=HOSTILE, data=HOSTILE,
        variant=HOSTILE, run=HOSTILE, recipe=HOSTILE, settings={HOSTILE: HOSTILE}, epsilon=0.1,
        delta=0.0, extraction=[extraction_of(pool=HOSTILE, answers=HOSTILE)],
        hardware={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE},
    )  # fmt: skip
    text = render_leakage(record, [picture(title=HOSTILE)])
    page = Page(text)
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) > 15
    assert ("aria-label", f"{HOSTILE}: originals above reconstructions") in page.attributes


def test_the_page_is_the_same_every_time_and_written_whole(tmp_path):
    """Its bytes depend on the record alone, and both files come as they are promised."""
    record = whole(epsilon=1.0, delta=1e-6)
    pages = {render_leakage(record, [picture()]) for _ in range(2)}
    assert len(pages) == 1
    write_leakage(record, tmp_path, [picture()])
    assert (tmp_path / "leakage.html").read_text(encoding="utf-8") in pages
    assert json.loads((tmp_path / "leakage.json").read_text())["kind"] == "leakage"


def test_links_lead_somewhere_whatever_was_measured():
    """And no identifier comes twice, even where images are alike; nothing is fetched."""
    for record in (
        whole(),
        whole(membership=None),
        whole(inversion=(), extraction=(), controls=()),
        whole(membership=membership_of({"lira": 0.9}, others=5, models=1, exposed=())),
    ):
        text = render_leakage(record, [picture(), picture(3)])
        page = Page(text)
        links = [v[1:] for n, v in page.attributes if n == "href" and v.startswith("#")]
        assert set(links) <= set(page.ids)
        assert len(page.ids) == len(set(page.ids))
        assert not {"script", "link", "iframe"} & set(page.tags)
        sources = [v for n, v in page.attributes if n in ("src", "href", "xlink:href")]
        assert all(value.startswith(("#", "data:image/png;base64,")) for value in sources)


@pytest.mark.parametrize(("epsilon", "mode"), [(3.0, 0o600), (None, 0o644)])
def test_what_a_private_run_leaks_is_for_its_owner_alone(tmp_path, epsilon, mode):
    """In whatever folder: others' files that it replaces get no less private."""
    before = os.umask(0o022)
    try:
        (tmp_path / "leakage.json").touch()
        delta = None if epsilon is None else 1e-5
        write_leakage(record_of(epsilon=epsilon, delta=delta), tmp_path)
    finally:
        os.umask(before)
    for name in ("leakage.json", "leakage.html"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode
