"""The progress line: what a person sees, and that nothing is drawn where nobody looks."""

import io

import pytest
import torch
from rich.console import Console

from secure_cnn.progress import training_progress


@pytest.fixture
def terminal(monkeypatch):
    """What is drawn on a terminal in place of standard error."""
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=160)
    monkeypatch.setattr("secure_cnn.progress.Console", lambda **_: console)
    return drawn


def test_the_line_shows_what_matters(terminal):
    """Name, steps, smoothed loss, speed, and what was told of accuracy and epsilon."""
    with training_progress("private+pgd", steps=10, done=2) as line:
        line.advance(torch.tensor([2.0, 4.0]), step=3)
        line.advance(torch.tensor([4.0, 4.0]), step=4)
        line.tell("accuracy 91.0 %, ε 1.25")
    shown = terminal.getvalue()
    for part in ("private+pgd", "4/10", "loss 3.100", "images/s", "accuracy 91.0 %, ε 1.25"):
        assert part in shown


def test_nothing_is_drawn_on_request(terminal):
    """Not shown: not a byte."""
    with training_progress("plain", steps=1, done=0, shown=False) as line:
        line.advance(torch.ones(1), step=1)
    assert terminal.getvalue() == ""


def test_nothing_is_drawn_where_there_is_no_terminal(capsys):
    """A log file gets no bars."""
    with training_progress("plain", steps=1, done=0) as line:
        line.advance(torch.ones(1), step=1)
        line.tell("accuracy 50 %")
    assert capsys.readouterr() == ("", "")
