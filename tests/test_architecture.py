"""The walls of the house, read from the sources: arrows, adapters, no pickle, small modules.

Every rule is a function of source text, so that each has a control: a made-up source it catches.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("secure_cnn", "defenses", "privacy")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# The ground that every room of secure_cnn stands on; it imports none of them.
GROUND = {"files", "printable"}
# Room of secure_cnn: the other rooms, and packages of ours, that it may import.
ARROWS = {
    "files": set(),
    "printable": set(),
    "errors": set(),
    "progress": set(),
    "interruption": set(),
    "data": {"errors", "progress"},
    "engine": {"errors", "interruption"},
    "archive": {"errors"},
    "record": {"errors"},
    "pages": {"errors", "record", "archive"},
    "own_network": {"errors", "data"},
    "scattering": set(),
    "handcrafted": {"scattering"},
    "cosines": set(),
    "layers": {"errors"},
    "nonexpansive": {"layers", "scattering"},
    "ensemble": set(),
    "models": {
        *(
            "errors",
            "data",
            "ensemble",
            "handcrafted",
            "cosines",
            "layers",
            "own_network",
            "scattering",
        )
    },
    "evaluate": {"errors", "data"},
    "optimizers": {"errors"},
    "initialization": {"errors"},
    "views": {"errors"},
    "checkpoint": {"errors", "archive", "models", "own_network"},
    "weights": {"errors", "archive", "checkpoint"},
    "bench": {
        *("errors", "archive", "data", "engine", "evaluate", "models", "record"),
        *("optimizers", "initialization", "views", "defenses", "privacy"),
    },
    "recipe": {
        *("errors", "archive", "checkpoint", "data", "engine", "evaluate", "models"),
        *(
            "handcrafted",
            "nonexpansive",
            "optimizers",
            "own_network",
            "weights",
            "interruption",
            "pages",
            "progress",
            "record",
            "defenses",
            "privacy",
        ),
    },
    "leakage": {
        *("errors", "checkpoint", "data", "engine", "evaluate", "interruption", "optimizers"),
        *("own_network", "progress", "recipe", "record", "defenses", "privacy"),
    },
    "unlearning": {
        *("errors", "archive", "checkpoint", "data", "ensemble", "evaluate", "interruption"),
        *("models", "own_network", "progress", "recipe", "record", "weights", "privacy"),
    },
    "__main__": {"cli"},
    "cli": {
        *("errors", "archive", "bench", "checkpoint", "data", "engine", "evaluate", "models"),
        *("nonexpansive", "own_network", "weights", "pages", "progress", "recipe", "record"),
        *("interruption", "leakage", "unlearning", "defenses", "privacy"),
    },
}
# Inside of a package, lowest first: a room may import itself and what stands before it. "actions"
# are all modules that are not named, where a package has such; "" is the package's own face.
INSIDE = {
    "defenses": (
        *("errors", "quantities", "shape", "threat", "scope", "attacks", "measuring", "checks"),
        *("evaluation", "smoothing", "lipschitz", "poisoning", "training", ""),
    ),
    "privacy": (
        *("errors", "_opacus", "native", "batch", "validate", "replacement", "statistics"),
        *("accounting", "group_privacy"),
        *("noise", "sampling", "persons", "clipping", "plan"),
        *("_ledger_file", "ledger", "summation", "differentiation", "update"),
        *("trial", "collation", "padding", "probe", "objectives", "step", "loading", "training"),
        *("attach", "opacus", "audit", "leakage", "unlearning", ""),
    ),
    "secure_cnn.archive": (
        *("errors", "format", "keys", "storage", "certificates"),
        *("actions", "store", "adapters", ""),
    ),
}
# Risky library: the only modules, or packages with all that is in them, that may import it.
ADAPTERS = {
    "torchattacks": {"defenses.attacks._torchattacks", "secure_cnn.bench.rivals"},
    "opacus": {"privacy._opacus", "privacy.opacus"},
    "cryptography": {
        *("secure_cnn.archive.format", "secure_cnn.archive.keys", "secure_cnn.archive.age"),
        *("privacy.noise", "secure_cnn.bench.rivals"),
    },
    "sklearn": {"secure_cnn.data", "secure_cnn.evaluate"},
    "PIL": {"secure_cnn.data", "secure_cnn.bench.loader"},
    "matplotlib": {"secure_cnn.pages"},
    "jinja2": {"secure_cnn.pages"},
    "lightning": {"secure_cnn.archive.adapters.lightning"},
    "cyclonedx": {"secure_cnn.archive.card"},
    "typer": {"secure_cnn.cli"},
}
CODE_RUNNERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
}
BANNED_CALLS = {
    "torch.load",
    "torch.save",
    "torch.manual_seed",
    "torch.seed",
    "numpy.random.seed",
    "np.random.seed",
    "importlib.import_module",
    "import_module",
    "importlib.machinery.SourceFileLoader",
    "importlib.util.spec_from_file_location",
    "runpy.run_path",
    "runpy.run_module",
    "__import__",
    "eval",
    "exec",
}
# Modules excused what they are there for: people's old files, read without running code; a rival;
# and the code of whoever is at the command line, which it names there.
EXCUSED = {
    "secure_cnn.archive.plain": {"torch.load"},
    "secure_cnn.bench.rivals": {"torch.save"},
    "secure_cnn.cli.network": {
        "importlib.import_module",
        "importlib.machinery.SourceFileLoader",
    },
}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
MOST_LINES = 400
LONGEST_BODY = 40


def module_of(path: Path) -> str:
    """The dotted name of a source file of ours."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Dotted names of everything a source imports, at any depth; relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + is_package]
                base = ".".join([*above, *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def within(name: str, places: set[str]) -> bool:
    """Whether a dotted name is one of the places or inside of one."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def wrong_arrows(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Imports of ours that point against the arrows."""
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    found = []
    for name in sorted(imported(source, module, is_package=is_package)):
        target, _, inside = name.partition(".")
        if target not in PACKAGES:
            continue
        if package != "secure_cnn" or target != "secure_cnn":
            allowed = target == package or target in ARROWS.get(room, set())
        elif room == "":
            allowed = inside.partition(".")[0] != "cli"
        else:
            goal = inside.partition(".")[0]
            allowed = goal == room or goal in GROUND | ARROWS.get(room, set())
        if not allowed:
            found.append(f"{module} imports {name}")
    return found


def level_of(name: str, package: str) -> int:
    """Place in `INSIDE` of a module, or of a name that an import statement takes from one."""
    order = INSIDE[package]
    inside = name.removeprefix(package).removeprefix(".").partition(".")[0]
    if inside in order:
        return order.index(inside)
    place = ROOT.joinpath(*package.split("."), inside)
    is_room = place.is_dir() or place.with_suffix(".py").exists()
    return order.index("actions" if is_room else "")


def wrong_inside(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Imports inside of a package that point from a lower room to a higher one."""
    return [
        f"{module} imports {name}"
        for name in sorted(imported(source, module, is_package=is_package))
        for package in INSIDE
        if within(module, {package}) and within(name, {package})
        if level_of(name, package) > level_of(module, package)
    ]


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """A way from a module back to itself, or nothing."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def module_behind(name: str, modules: set[str]) -> str:
    """The module of ours that an import statement's name stands in, or nothing."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def wrong_adapters(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Imports of a risky library outside of its adapter."""
    return [
        f"{module} imports {name}"
        for name in sorted(imported(source, module, is_package=is_package))
        for library, places in ADAPTERS.items()
        if within(name, {library}) and not within(module, places)
    ]


def code_runners(source: str, module: str) -> list[str]:
    """Whatever could run code on loading, seed the world, or import what no rule here sees."""
    found = [
        f"{module} imports {name}"
        for name in sorted(imported(source, module))
        if within(name, CODE_RUNNERS) or name in BANNED_CALLS
    ]
    for node in ast.walk(ast.parse(source)):
        banned = BANNED_CALLS - EXCUSED.get(module, set())
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in banned:
            found.append(f"{module} line {node.lineno} uses {ast.unparse(node)}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            told = {word.arg: ast.unparse(word.value) for word in node.keywords}
            found += [] if told.get("weights_only") == "True" else [f"{module} loads pickles"]
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            told = ast.unparse(node.value)
            found += [] if told == "False" else [f"{module} allows pickle: {told}"]
    return found


def imported_tests(source: str) -> list[str]:
    """Test modules that a source imports."""
    return sorted(name for name in imported(source, "") if name.startswith("test_"))


def vague_names(module: str) -> list[str]:
    """Parts of a module's name that say nothing."""
    return [part for part in module.split(".") if part.strip("_") in VAGUE_NAMES]


def too_long(source: str, module: str) -> list[str]:
    """Modules and function bodies that no longer fit a reader's head."""
    lines = len(source.splitlines())
    found = [f"{module} has {lines} lines"] if lines > MOST_LINES else []
    for name, length in body_lengths(source):
        if length > LONGEST_BODY:
            found.append(f"{module}.{name} has a body of {length} lines")
    return found


def body_lengths(source: str) -> Iterator[tuple[str, int]]:
    """Lines of every function's body, its docstring not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                yield node.name, body[-1].end_lineno - body[0].lineno + 1


def sources() -> Iterator[tuple[str, str, bool]]:
    """Source, dotted name, and whether it is a package's own."""
    for path in SOURCES:
        yield path.read_text(encoding="utf-8"), module_of(path), path.name == "__init__.py"


def test_there_is_something_to_check():
    """The walk finds the three packages, every room on the map, and nothing off it."""
    rooms = {m.split(".")[1] for _, m, _ in sources() if m.startswith("secure_cnn.")}
    assert {m.split(".")[0] for _, m, _ in sources()} == set(PACKAGES)
    assert rooms == set(ARROWS)


def test_arrows_point_one_way():
    """Each room imports only what the map says; only recipe, bench and cli know all three."""
    assert [w for s, m, p in sources() for w in wrong_arrows(s, m, is_package=p)] == []
    knowing = {room for room, allowed in ARROWS.items() if {"defenses", "privacy"} & allowed}
    assert knowing == {"recipe", "bench", "leakage", "unlearning", "cli"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("privacy.plan", "import defenses"),
        ("privacy.plan", "from secure_cnn.errors import RunError"),
        ("defenses.attacks.attack", "import torch, privacy.plan"),
        ("defenses.attacks.attack", "def f():\n    from secure_cnn import engine"),
        ("secure_cnn.engine", "import privacy"),
        ("secure_cnn.pages.run", "from defenses import ThreatModel"),
        ("secure_cnn.pages.run", "from secure_cnn.engine import train"),
        ("secure_cnn.data.split", "from ..models import build_model"),
        ("secure_cnn.archive", "from secure_cnn.checkpoint import read_model"),
        ("secure_cnn", "from secure_cnn import cli"),
        ("secure_cnn", "import defenses"),
        ("secure_cnn.new_room", "import secure_cnn.errors"),
    ],
)
def test_a_wrong_arrow_is_caught(module, source):
    """Control: each of these imports is an arrow in the wrong direction."""
    assert len(wrong_arrows(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("secure_cnn.recipe.run", "import privacy\nfrom defenses import attack"),
        ("secure_cnn.models", "from secure_cnn.data import DataSpec"),
        ("secure_cnn.data.folder", "from .split import Split\nimport torch"),
        ("privacy.clipping.linear", "from privacy.clipping.tape import Tape"),
    ],
)
def test_a_right_arrow_passes(module, source):
    """Control: the rule does not refuse everything."""
    assert wrong_arrows(source, module) == []


def test_arrows_inside_the_packages_point_one_way():
    """Rooms of a package import only those before them, and every room has its place."""
    assert [w for s, m, p in sources() for w in wrong_inside(s, m, is_package=p)] == []
    for package, order in INSIDE.items():
        levels = {level_of(m, package) for _, m, _ in sources() if within(m, {package})}
        assert levels == set(range(len(order)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("secure_cnn.archive.format.header", "from secure_cnn.archive.keys import identity"),
        ("secure_cnn.archive.format.header", "from secure_cnn.archive import opening"),
        ("secure_cnn.archive.format.header", "from ..storage import new_file"),
        ("secure_cnn.archive.keys.kek", "import secure_cnn.archive.sealing"),
        ("secure_cnn.archive.sealing", "from secure_cnn.archive.store.log import Log"),
        ("secure_cnn.archive.sealing", "from secure_cnn.archive import load"),
        ("secure_cnn.archive.store.store", "from secure_cnn.archive.adapters import lightning"),
        ("secure_cnn.archive.adapters.lightning", "from secure_cnn import archive"),
        ("secure_cnn.archive.errors", "def f():\n    from secure_cnn.archive.format import claims"),
        ("defenses.checks.checks", "from defenses.evaluation.report import RobustnessReport"),
        ("defenses.attacks.pgd", "from defenses.training import AdversarialTraining"),
        ("defenses.threat", "from defenses import attack"),
        ("privacy.clipping.tape", "from privacy.attach import attach"),
        ("privacy.plan", "if TYPE_CHECKING:\n    from privacy.training import PrivateTraining"),
    ],
)
def test_a_wrong_arrow_inside_a_package_is_caught(module, source):
    """Control: each of these imports, of a module or of the package itself, points upwards."""
    assert len(wrong_inside(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("secure_cnn.archive", "from secure_cnn.archive.adapters.lightning import X"),
        ("secure_cnn.archive.adapters.lightning", "from secure_cnn.archive.store import store"),
        ("secure_cnn.archive.sealing", "from secure_cnn.archive import opening"),
        ("secure_cnn.archive.keys.kek", "from secure_cnn.archive.format.slots import Slot"),
        ("secure_cnn.checkpoint", "from secure_cnn import archive"),
        ("defenses.evaluation.report", "from defenses.checks.checks import check"),
        ("privacy", "from privacy.attach import attach"),
    ],
)
def test_a_right_arrow_inside_a_package_passes(module, source):
    """Control: downwards, beside, and from outside of it, all is allowed."""
    assert wrong_inside(source, module) == []


def test_no_imports_go_in_a_circle():
    """Not even for types: from no module is there a way back to it."""
    modules = {module for _, module, _ in sources()}
    arrows = {
        module: {module_behind(name, modules) for name in imported(source, module, is_package=face)}
        - {module, ""}
        for source, module, face in sources()
    }
    assert circle_in(arrows) == []
    assert sum(map(len, arrows.values())) > 500


def test_a_circle_is_caught():
    """Control: of two modules, and of three."""
    assert set(circle_in({"a": {"b"}, "b": {"a"}})) == {"a", "b"}
    assert set(circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert circle_in({"a": {"b", "c"}, "b": {"c"}}) == []


def lost_on(text: str, paths: set[str]) -> list[str]:
    """Files and folders that a text names in backquotes and that are not there."""
    named = set(re.findall(r"`([\w./-]+(?:\.py|\.jinja|/))`", text))
    return sorted(
        name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in paths)
    )


def unknown_words(table: str, sources: dict[str, str]) -> list[str]:
    """Words in backquotes that are neither a module, a package nor a definition of the sources."""
    known = {part for module in sources for part in module.split(".")}
    kinds = ast.FunctionDef | ast.ClassDef
    for source in sources.values():
        known |= {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)}
    return sorted(word for word in re.findall(r"`(\w+)/?`", table) if word not in known)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_map_names_no_module_that_is_gone(package):
    """Each package's table speaks of what is in that package."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    (table,) = re.findall(rf"\n`{package}/`\n\n((?:\|.*\n)+)", text)
    own = {module: source for source, module, _ in sources() if within(module, {package})}
    assert unknown_words(table, own) == []


def test_a_module_that_is_gone_is_caught():
    """Control: a module of another package is not of this one; a function is."""
    own = {"privacy.step": "def prepare(): ...", "privacy.audit.gate": ""}
    assert unknown_words("`step`, `audit/`, `gate`, `prepare`", own) == []
    assert unknown_words("`quantities`, `audit/`, `affine`", own) == ["affine", "quantities"]


def test_the_map_is_of_this_house():
    """ARCHITECTURE.md names every room, and no file that is not there."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    found = [
        *ROOT.glob("*.py"),
        *(p for f in (*PACKAGES, "tests") for p in (ROOT / f).rglob("*.*")),
    ]
    places = [path.relative_to(ROOT).as_posix() for path in found]
    folders = {f"{above.as_posix()}/" for place in places for above in Path(place).parents}
    assert lost_on(text, {*places, *folders}) == []
    rooms = {*ARROWS, *(room for order in INSIDE.values() for room in order)} - {"", "actions"}
    assert {room for room in rooms if not re.search(rf"`{room}/?`", text)} == set()


def test_a_place_that_is_not_there_is_caught():
    """Control: a file and a folder, by their ends; a word in backquotes is no file."""
    paths = {"defenses/attacks/pgd.py", "defenses/attacks/"}
    assert lost_on("`pgd.py`, `attacks/` and `attack`", paths) == []
    assert lost_on("`gd.py`, `attack/`, `attacks/fab.py`", paths) == [
        *("attack/", "attacks/fab.py", "gd.py")
    ]


def test_relative_imports_are_resolved():
    """A relative import counts as what it names, from a module and from a package."""
    assert imported("from ..models import x", "secure_cnn.data.split") == {"secure_cnn.models.x"}
    assert imported("from . import x", "secure_cnn.data", is_package=True) == {"secure_cnn.data.x"}


def test_one_adapter_for_each_risky_library():
    """Attacks, accountants, ciphers, figures and options come in through one door each."""
    assert [w for s, m, p in sources() for w in wrong_adapters(s, m, is_package=p)] == []


def test_every_adapter_is_needed():
    """A library that its adapter no longer imports has no place in the table."""
    used = {name.partition(".")[0] for s, m, p in sources() for name in imported(s, m)}
    assert set(ADAPTERS) <= used


@pytest.mark.parametrize("library", sorted(ADAPTERS))
def test_a_second_adapter_is_caught(library):
    """Control: each risky library is refused elsewhere, however it is imported."""
    for source in (
        f"import {library}",
        f"import {library}.inside as other",
        f"def f():\n    from {library} import thing",
    ):
        assert len(wrong_adapters(source, "secure_cnn.engine")) == 1
        assert len(wrong_adapters(source, "defenses.evaluation.evaluation")) == 1


def test_loading_runs_no_code():
    """No pickle, no torch.load, no import by name, and no global seed."""
    assert [w for s, m, _ in sources() for w in code_runners(s, m)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as harmless",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import save",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "import torch\ntorch.manual_seed(0)",
        "eval('1')",
        "__import__('opacus')",
        "import importlib\nimportlib.import_module('opacus')",
        "import importlib.machinery\nimportlib.machinery.SourceFileLoader('a', 'a.py')",
        "from importlib.util import spec_from_file_location",
        "import runpy\nrunpy.run_path('a.py')",
    ],
)
def test_code_that_loads_code_is_caught(source):
    """Control: each of these would open the door."""
    assert code_runners(source, "secure_cnn.engine")


def test_an_excused_module_is_excused_one_call():
    """Control: the reader of old files may not unpickle, and may do nothing else."""
    reader = "secure_cnn.archive.plain"
    assert code_runners("import torch\ntorch.load('x', weights_only=True)", reader) == []
    assert code_runners("import torch\ntorch.load('x')", reader)
    assert code_runners("import torch\ntorch.save({}, 'x')", reader)


def test_only_the_command_line_runs_code_that_is_named():
    """What imports by name is out of reach of all that reads files."""
    runner = "secure_cnn.cli.network"
    users = {
        m for s, m, p in sources() if any(within(n, {runner}) for n in imported(s, m, is_package=p))
    }
    commands = (
        "audit",
        "bench_overhead",
        "bench_strategies",
        "evaluate",
        "forget",
        "leakage",
        "train",
    )
    assert users == {f"secure_cnn.cli.{name}" for name in commands}
    assert code_runners("import pickle", runner)
    assert code_runners("eval('1')", runner)


def test_a_generator_of_ones_own_may_be_seeded():
    """Control: seeding one's own generator and saving by other names is no offence."""
    harmless = "torch.Generator().manual_seed(0)\narchive.load(x)\nnp.load(x, allow_pickle=False)"
    assert code_runners(harmless, "secure_cnn.engine") == []


def test_modules_and_functions_stay_small():
    """No module over 400 lines, no body over 40; half of all bodies have at most 10."""
    assert [w for s, m, _ in sources() for w in too_long(s, m)] == []
    lengths = sorted(length for s, _, _ in sources() for _, length in body_lengths(s))
    assert lengths[len(lengths) // 2] <= 10


def test_a_module_that_grew_is_caught():
    """Control: 401 lines are one too many, and so are 41 in a body; docstrings are free."""
    assert too_long("\n" * 401, "m") == ["m has 401 lines"]
    assert too_long("\n" * 400, "m") == []
    body = "    x = 1\n" * 41
    assert too_long(f"def f():\n{body}", "m") == ["m.f has a body of 41 lines"]
    docstring = '    """' + "text\n" * 60 + '    """\n'
    assert too_long(f"def f():\n{docstring}    return 1\n", "m") == []


def test_no_test_imports_a_test_module():
    """What several test modules need stands in `tests/support`, which imports none of them."""
    tests = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    assert len(tests) > 100
    assert {path.name: found for path, s in tests.items() if (found := imported_tests(s))} == {}


def test_an_import_of_a_test_module_is_caught():
    """Control: in either form."""
    assert imported_tests("import test_suite") == ["test_suite"]
    assert imported_tests("from test_suite import x") == ["test_suite.x"]
    assert imported_tests("from support.networks import Net") == []


def test_every_module_is_named_after_what_it_holds():
    """No module is called utils, helpers or common."""
    assert [m for _, m, _ in sources() if vague_names(m)] == []


def test_a_vague_name_is_caught():
    """Control: in any place of the dotted name, with or without underscores."""
    assert vague_names("secure_cnn.utils.images") == ["utils"]
    assert vague_names("privacy._helpers") == ["_helpers"]
    assert vague_names("privacy.common_prefix") == []
