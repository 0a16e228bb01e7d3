"""The progress line: what a person sees, and that nothing is drawn where nobody looks."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from secure_cnn.progress import count_progress, file_progress, part_progress, training_progress

SHOW_CURSOR = "\x1b[?25h"
ERASE_LINE = "\x1b[2K"


@pytest.fixture
def terminal(monkeypatch):
    """What is drawn on a terminal in place of standard error."""
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=160)
    monkeypatch.setattr("secure_cnn.progress.Terminal", lambda **_: console)
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


@pytest.fixture
def clock():
    """A clock that is set by hand."""
    return SimpleNamespace(now=100.0)


def test_a_file_shows_bytes_speed_and_time_left(terminal, clock):
    """After a second at 10 MiB a second, 19.5 MiB are left for 2 seconds."""
    with file_progress("sealing", clock=lambda: clock.now) as progress:
        for second in range(11):
            clock.now = 100 + second / 10
            progress(second << 20, 59 << 19)
        assert terminal.getvalue()
    shown = terminal.getvalue()
    for part in ("sealing", "10.0/29.5 MiB", "10.5 MB/s", "0:00:02"):
        assert part in shown


@pytest.mark.parametrize("seconds", [0.99, 1.0])
def test_a_file_has_no_bar_within_a_second(terminal, clock, seconds):
    """What is over by then draws not a byte; what is not does."""
    with file_progress("sealing", clock=lambda: clock.now) as progress:
        progress(1, 3)
        clock.now += seconds
        progress(2, 3)
    assert bool(terminal.getvalue()) == (seconds >= 1.0)


@pytest.mark.parametrize("seconds", [0.99, 1.0])
def test_many_things_are_counted_after_a_second(terminal, clock, seconds):
    """Such as images: how many of how many; nothing of what is over by then."""
    with count_progress("decoding [pets]", 400, clock=lambda: clock.now) as progress:
        progress(1)
        clock.now += seconds
        progress(200)
    shown = terminal.getvalue()
    assert ("decoding [pets]" in shown and "200/400" in shown) == bool(shown) == (seconds >= 1.0)


def test_a_file_has_no_bar_where_there_is_no_terminal(capsys, clock):
    """However long it takes."""
    with file_progress("sealing", clock=lambda: clock.now) as progress:
        clock.now += 60
        progress(1, 3)
    assert capsys.readouterr() == ("", "")


def test_the_bar_of_a_file_goes_when_the_work_fails(terminal, clock):
    """The line is erased and the cursor is back before the error is told."""

    def work():
        with file_progress("sealing", clock=lambda: clock.now) as progress:
            clock.now += 2
            progress(1, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    end = terminal.getvalue()[-40:]
    assert SHOW_CURSOR in end
    assert ERASE_LINE in end


def test_long_parts_are_told_one_by_one(terminal, clock):
    """Which is under way, for how long it goes on, and how long it will; what is kept, first."""
    with part_progress("shadow model", 16, kept=4, clock=lambda: clock.now) as progress:
        for done in (4, 4.5, 5, 5.5):
            progress(done)
            clock.now += 10
    shown = terminal.getvalue()
    assert "shadow models are kept from before" in shown
    assert "shadow model 5 of 16" in shown
    assert "shadow model 6 of 16" in shown
    assert " gone," in shown
    assert "is done" not in shown


def test_long_parts_are_a_line_each_where_there_is_no_terminal(capsys, clock):
    """With an estimate, but after the last; parts that are kept took no time."""
    with part_progress("model", 4, kept=1, clock=lambda: clock.now) as progress:
        for done in (1.0, 1.5, 2.0, 2.99, 3, 4):
            progress(done)
            clock.now += 30
    assert capsys.readouterr().err.splitlines() == [
        "1 of 4 models are kept from before",
        "model 2 of 4 is done after 0:01:00, about 0:02:00 left",
        "model 3 of 4 is done after 0:02:00, about 0:01:00 left",
        "model 4 of 4 is done after 0:02:30",
    ]
