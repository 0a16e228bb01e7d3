"""The certified-accuracy curve: what is drawn is what was found, and nonsense is refused."""

import re
from xml.etree import ElementTree

import pytest
from support.certificates import report

from secure_cnn.errors import SecureCNNError
from secure_cnn.pages import certificate_curve

POINTS = [(0.0, 0.8, 0.7, 0.9), (0.25, 0.5, 0.4, 0.6), (0.5, 0.0, 0.0, 0.1)]


def test_a_reports_summary_can_be_drawn():
    """As it comes out of `to_dict`; well-formed, with its name and its first value, repeatable."""
    curve = report().to_dict()["summary"]["curve"]
    svg = certificate_curve({"sigma 0.25": curve, "other": POINTS})
    ElementTree.fromstring(svg)
    for words in ("sigma 0.25", "75.0% at 0", "other", "80.0% at 0"):
        assert words in svg
    assert svg == certificate_curve({"sigma 0.25": curve, "other": POINTS})


def test_a_line_goes_through_its_points():
    """Linear from the drawing back to the values."""
    svg = certificate_curve({"a": POINTS})
    paths = re.findall(r'<path d="(M[^"]*)" clip-path="[^"]*" style="fill: none', svg)
    lines = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", path) for path in paths]
    (drawn,) = [line for line in lines if len(line) == len(POINTS)]
    xs, ys = zip(*[(float(x), float(y)) for x, y in drawn], strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.01)
    assert (ys[1] - ys[0]) / (ys[2] - ys[0]) == pytest.approx(0.3 / 0.8, abs=0.001)
    assert ys[2] > ys[0]


@pytest.mark.parametrize(
    "curves",
    [
        {},
        {"a": []},
        {"a": [(0.0, 0.5, 0.6, 0.7)]},
        {"a": [(0.0, 1.5, 0.5, 1.6)]},
        {"a": [(0.5, 0.5, 0.4, 0.6), (0.2, 0.4, 0.3, 0.5)]},
        {"a": [(float("nan"), 0.5, 0.4, 0.6)]},
        {"a": [(0.0, 0.5)]},
        {str(number): POINTS for number in range(9)},
    ],
)
def test_what_is_no_curve_is_refused(curves):
    """Before anything is drawn."""
    with pytest.raises(SecureCNNError):
        certificate_curve(curves)
