"""The command line as people type it: sizes as fractions, the version, `make` beside a link."""

import importlib.metadata
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from support.processes import printed_by

from secure_cnn.cli import app
from secure_cnn.cli.options import number
from secure_cnn.record import RunRecord

ROOT = Path(__file__).parent.parent
SIZES = {"eps", "gaussian_sigma", "certify", "delta", "learning_rate"}
COMMANDS = {
    *("train", "evaluate", "audit"),
    *("bench robustness", "bench overhead", "bench strategies"),
}
NO_NUMBERS = (
    *("0/0", "8/0", "8/0.0", "1/1e-400", "1e400", "1/1e400", "-1e400/1", "nan", "inf", "8/inf"),
    *("8 / 255", " 8/255", "8/255\n", "8/255/2", "8//255", "/255", "8/", "", "0x8", "1_0", "٨/٢"),
    *("8\\255", "8:255", "1,5", "[red]8", "8/255\x1b[2J"),
)


@given(above=st.integers(-(10**6), 10**6), below=st.integers(1, 10**6))
def test_a_fraction_is_the_nearest_float_to_it(above, below):
    """As Python's own division gives it, and as exact fractions round."""
    assert number(f"{above}/{below}") == float(Fraction(above, below))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_as_python_writes_it(value):
    """Whatever its exponent; a default that is a number already passes through."""
    assert number(repr(value)) == value
    assert number(value) == value


@pytest.mark.parametrize("text", NO_NUMBERS, ids=repr)
def test_what_is_no_finite_number_is_refused_and_shown(text):
    """In words that say how to write one, and that no terminal obeys."""
    with pytest.raises(typer.BadParameter, match=r"a finite number as 0\.03 or 8/255") as refused:
        number(text)
    assert "\x1b" not in str(refused.value)


def options(group, name=""):
    """Every option of every command, with the command's name."""
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from options(command, f"{name}{word} ")
        else:
            yield from ((f"{name}{word}", each) for each in command.params)


def test_every_size_takes_a_fraction(cli):
    """None of the commands reads its sizes in another way."""
    sizes = [
        (name, option.opts[-1])
        for name, option in options(typer.main.get_command(app))
        if option.name in SIZES
    ]
    assert {name for name, _ in sizes} == COMMANDS
    for name, option in sizes:
        code, _, err = cli(*name.split(), option, "8/0")
        assert (code, "a finite number" in err) == (2, True)


def test_a_fraction_reaches_the_record(cli, quick, shapes, tmp_path):
    """The number that Python makes of it, from the command to the claims."""
    words = ("--eps", "8/255", "--epochs", "1", "--robust-samples", "4", "--no-baseline")
    code, _, err = cli("train", "--data", shapes, *words, "--out", tmp_path / "run")
    assert code == 0, err
    record = RunRecord.read(tmp_path / "run" / "run.json")
    assert record.settings["eps"] == record.claims["robustness"]["eps"] == 8 / 255


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_the_version_is_told_with_those_that_figures_depend_on(cli, word):
    """One line on standard output."""
    code, out, err = cli(word)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert out.startswith(f"secure-cnn {importlib.metadata.version('secure-cnn')} (python ")
    assert f"torch {importlib.metadata.version('torch')}" in out


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("linked", [True, False])
def test_make_leaves_an_environment_behind_a_link_alone(tmp_path, linked):
    """It would install this checkout into another's environment, and `clean` take the link away."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "hatch_build.py"):
        (tmp_path / name).touch()
    environment = tmp_path / ("elsewhere" if linked else ".venv")
    environment.mkdir()
    if linked:
        (tmp_path / ".venv").symlink_to(environment)
    for verb in ("test", "check", "docs", "wheel", "demo", "clean"):
        planned = printed_by("make", "--dry-run", "--no-print-directory", verb, cwd=tmp_path)
        touches = "pip install" in planned or "rm -rf .venv" in planned
        assert touches is not linked


def test_every_option_of_train_is_under_a_title():
    """One of what it is about; the help's own option aside."""
    options = typer.main.get_command(app).commands["train"].params
    found = {option.name: option.rich_help_panel for option in options}
    assert found["epsilon"] == "Privacy: off without --epsilon"
    assert all(found.values()), found
