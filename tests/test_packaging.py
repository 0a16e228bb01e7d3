"""What leaves the repository: one wheel of three packages that works on its own."""

import importlib.metadata
import os
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from support.processes import printed_by

ROOT = Path(__file__).parent.parent
PACKAGES = {"secure_cnn", "defenses", "privacy"}

USES_EVERYTHING = """
import sys
import torch
import defenses, privacy, secure_cnn, secure_cnn.cli

threat = defenses.ThreatModel(norm="linf", eps=0.1)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
images, labels = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
for name in ("fgsm", "pgd", "apgd"):
    defenses.attack(name, threat)(model, images, labels)
defenses.evaluate(model, list(zip(images, labels.tolist())), threat, progress=False)
print("requests" in sys.modules)
"""

FINDS_PACKAGES = """
import sys
from importlib.util import find_spec

for name in sys.argv[1:]:
    print(find_spec(name).origin)
"""


def command(*words, cwd):
    """Runs a command that must succeed; its standard output."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return printed_by(*words, cwd=cwd, environment=environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built with what is installed here."""
    out = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, ROOT)
    command(*build, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """An environment with nothing but the wheel and a view of the dependencies of this one.

    The view is a `.pth` line; a `.pth` file inside of what it shows is not read, so that an
    editable install of this repository stays out of sight.
    """
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    command(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_holds_three_packages_and_all_of_them(wheel):
    """Exactly the three packages, each typed, every file in them, and the page's template."""
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    tops = {name.partition("/")[0] for name in names}
    (information,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops - {information} == PACKAGES
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources >= {f"{package}/py.typed" for package in PACKAGES}
    assert "secure_cnn/pages/run.html.jinja" in sources
    assert names - {name for name in names if name.startswith(information)} == sources
    assert f"{information}/licenses/LICENSE" in names


def test_the_wheel_works_in_a_fresh_environment(fresh, tmp_path):
    """The packages come from the wheel; the command trains on digits and leaves its folder."""
    python, program = fresh / "bin" / "python", fresh / "bin" / "secure-cnn"
    places = command(python, "-c", FINDS_PACKAGES, *sorted(PACKAGES), cwd=tmp_path).splitlines()
    assert len(places) == len(PACKAGES)
    assert all(Path(place).is_relative_to(fresh) for place in places)
    assert "train" in command(program, "--help", cwd=tmp_path)
    printed = command(program, "train", "--epochs", "1", "--out", "run", cwd=tmp_path)
    assert "plain" in printed
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "checkpoints" / "model.safetensors").is_file()


def test_requests_is_current():
    """The pin of torchattacks on an old `requests` is lifted, and everything works."""
    version = importlib.metadata.version("requests")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 32):
        pytest.skip(f"requests {version} is installed; `make` upgrades it, see SECURITY.md")
    assert importlib.metadata.version("torchattacks")


def test_requests_is_never_imported(tmp_path):
    """Attacks, evaluation and the command line work without importing it at all."""
    assert command(sys.executable, "-c", USES_EVERYTHING, cwd=tmp_path).strip() == "False"
