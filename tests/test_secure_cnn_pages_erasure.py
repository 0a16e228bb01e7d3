"""The page of a certificate of erasure: what it says, what it leaves out, and hostile text."""

from dataclasses import replace

import pytest
from support.erasures import bounded, following, make_erasure, verified

from secure_cnn.archive import Certificate, Verified
from secure_cnn.archive.certificates import Artefact, whole_inventory
from secure_cnn.errors import RunError
from secure_cnn.pages import render_certificate, write_certificate_page

IT = make_erasure()


def test_everything_of_the_certificate_is_on_it():
    """Guarantee first; every artefact, assumption, figure, unknown, digest and key."""
    found = verified()
    text = render_certificate(found)
    assert text.index(IT.guarantee) < text.index("What was done")
    keys = (found.made_by, *found.checked_by, *found.others)
    for words in (
        *(each.kind for each in IT.artefacts),
        *(each.name for each in IT.evidence),
        *IT.assumptions,
        *IT.not_known,
        *IT.requests,
        *(repr(each) for each in keys),
        *(IT.certificate_id, found.digest, IT.data_after.root, IT.run_after.digest, IT.ground),
        *("tape, by law", "before the deadline", "vouches for nothing", "No certificate went"),
    ):
        assert words in text.replace("&#39;", "'"), words


def test_the_guarantee_names_its_method():
    assert "by the method sharded" in render_certificate(verified(make_erasure(method="sharded")))


def test_a_page_is_complete_in_itself(tmp_path):
    """It loads nothing and runs no script."""
    write_certificate_page(verified(), tmp_path / "c.html")
    text = (tmp_path / "c.html").read_text()
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_the_bound_is_never_rounded_down():
    """And what is so far is said beside it."""
    text = render_certificate(verified(bounded(6.573)))
    assert "ε ≤ 6.58" in text
    assert "so far" not in text
    more = replace(bounded(1.0).cumulative, people=7, epsilon=2.001)
    text = render_certificate(verified(replace(bounded(1.0), cumulative=more)))
    assert "ε ≤ 2.01 so far" in text
    assert "7 so far" in text


def test_no_guarantee_is_told_from_afar():
    """In the first line, and as a figure; a late one says late."""
    text = render_certificate(
        verified(
            make_erasure(
                exact=False,
                guarantee="There is no guarantee.",
                assumptions=(),
                evidence=(),
                deadline="2026-11-15T00:00:00Z",
            )
        )
    )
    assert '<p class="lead bad">There is no guarantee.</p>' in text
    assert "<b>none</b>" in text
    assert "Done after the deadline." in text
    assert "Nothing else was measured" in text


def test_the_certificate_before_is_named():
    """With how to check that this one follows it."""
    text = render_certificate(verified(following(IT, "cd" * 32)))
    assert "cd" * 32 in text
    assert "--previous FILE" in text


def test_hostile_text_stays_text():
    """No markup, and nothing unseen."""
    known = [Artefact(kind="logs", name="<b>x", action="destroyed", detail="\u202e<script>")]
    it = make_erasure(artefacts=whole_inventory(known), ground="<i>\x1b[1m", method="<u>")
    text = render_certificate(verified(it))
    assert "&lt;b&gt;x" in text
    for words in ("<b>x", "<script", "<i>\x1b", "\u202e", "\x1b", "<u>"):
        assert words not in text


def test_a_certificate_of_destruction_has_no_page():
    """It is told so."""
    done = Certificate(
        destroyed="2026-11-20T10:30:00Z",
        file="m",
        file_id="1" * 64,
        core_hash="2" * 64,
        file_length=10,
        overwritten=5,
        other_names=0,
    )
    fields = {name: getattr(verified(), name) for name in Verified.__dataclass_fields__}
    with pytest.raises(RunError, match="destruction"):
        render_certificate(Verified(**{**fields, "value": done}))
