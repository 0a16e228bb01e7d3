"""How the command starts: a light front door, and Ctrl-C while it loads the rest."""

import os
import signal
import subprocess
import sys

import pytest
from support.processes import printed_by

import secure_cnn


def loaded_by(statement):
    """Modules in memory after a statement, in a process of its own."""
    told = f"{statement}\nimport sys\nprint(*sys.modules)"
    return set(printed_by(sys.executable, "-c", told).split())


def test_the_front_door_loads_nothing_heavy():
    """Neither the package alone nor the command's entry takes torch in."""
    assert not {"torch", "numpy", "rich"} & loaded_by("import secure_cnn.__main__")


def test_public_names_are_there_when_asked_for():
    """Each is there, and no other."""
    assert set(secure_cnn.__all__) <= set(dir(secure_cnn))
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        _ = secure_cnn.nothing_of_ours


@pytest.mark.parametrize("how", [["-m", "secure_cnn"], ["-c", "CONSOLE"]])
def test_ctrl_c_while_the_command_is_loading_is_one_line(tmp_path, how):
    """A real SIGINT in the middle of an import: no traceback, exit code 130."""
    (tmp_path / "torch.py").write_text(
        "import os, time\nos.write(1, b'loading')\ntime.sleep(600)\n", encoding="utf-8"
    )
    console = "from secure_cnn.__main__ import main; main()"  # what the installed script does
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    program = subprocess.Popen(
        [sys.executable, *[console if word == "CONSOLE" else word for word in how], "--help"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stdout.read(7) == "loading"
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=600)
    assert said == "interrupted\n"
    assert program.returncode == 130
