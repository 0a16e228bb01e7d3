"""The names that other people rely on: exactly those in `__all__`, each explained, each shown."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from types import FunctionType, ModuleType, SimpleNamespace

import pytest

PACKAGES = ("secure_cnn", "defenses", "privacy")


def modules() -> list[str]:
    """Dotted names of the packages and of every public module in them."""
    found = list(PACKAGES)
    for package in PACKAGES:
        walk = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
        found += [info.name for info in walk if "._" not in info.name]
    return sorted(found)


MODULES = modules()


def defined(source: str) -> set[str]:
    """Public functions and classes that a module's source defines at its top level."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    names = {node.name for node in ast.parse(source).body if isinstance(node, kinds)}
    return {name for name in names if not name.startswith("_")}


def statements(source: str) -> list[ast.stmt]:
    """A module's statements, with those for type checkers alone: the face of a lazy package."""
    found = []
    for node in ast.parse(source).body:
        checked = isinstance(node, ast.If) and ast.unparse(node.test) == "typing.TYPE_CHECKING"
        found += node.body if checked else [node]
    return found


def bound(source: str) -> set[str]:
    """Public names that a module's source may list: what it defines, assigns or takes in."""
    found = defined(source)
    for node in statements(source):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("_")}


def unexplained(owner: object, name: str) -> list[str]:
    """The value, and for a class its public methods and properties, that have no docstring."""
    value = getattr(owner, name)
    if isinstance(value, FunctionType):
        return [] if inspect.getdoc(value) else [name]
    if not inspect.isclass(value):
        return []
    # A dataclass without a docstring is given its signature as one.
    told = (value.__doc__ or "").strip() and not value.__doc__.startswith(f"{value.__name__}(")
    missing = [] if told else [name]
    for attribute, member in vars(value).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        function = getattr(function, "func", function)  # a cached property
        if attribute.startswith("_") or not isinstance(function, FunctionType):
            continue
        if not function.__doc__:
            missing.append(f"{name}.{attribute}")
    return missing


def without_example(owner: object, name: str) -> bool:
    """Whether a class or a function has no runnable example."""
    value = getattr(owner, name)
    shown = inspect.isclass(value) or isinstance(value, FunctionType)
    return shown and ">>>" not in (value.__doc__ or "")


@pytest.mark.parametrize("name", MODULES)
def test_all_is_what_a_module_defines(name):
    """Every public function and class is listed, once; a value may be; nothing else is."""
    source = inspect.getsource(importlib.import_module(name))
    listed = list(getattr(importlib.import_module(name), "__all__", []))
    assert len(set(listed)) == len(listed)
    assert defined(source) <= set(listed) <= bound(source)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_offers_exactly_its_public_names(name):
    """Everything without an underscore, submodules aside, is listed."""
    module = importlib.import_module(name)
    assert all(hasattr(module, each) for each in module.__all__)  # a lazy one takes them in
    public = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and not isinstance(value, ModuleType)
    }
    modules = {key for key in module.__all__ if isinstance(getattr(module, key), ModuleType)}
    assert set(module.__all__) == public | modules


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_explained(name):
    """Every module, and every class, function, method and property in `__all__`."""
    module = importlib.import_module(name)
    assert module.__doc__
    missing = [m for n in getattr(module, "__all__", []) for m in unexplained(module, n)]
    assert missing == []


@pytest.mark.parametrize("name", [*PACKAGES, "secure_cnn.archive", "defenses.attacks"])
def test_top_level_names_are_shown(name):
    """Every class and function of a top-level `__all__` has an example that runs."""
    module = importlib.import_module(name)
    assert [n for n in module.__all__ if without_example(module, n)] == []


def test_what_is_missing_is_caught():
    """Control: an undocumented class, method, property and function; an example that is not."""

    class Bare:
        def method(self): ...

        @property
        def value(self): ...

    def function():
        """Explained, not shown."""

    owner = SimpleNamespace(Bare=Bare, function=function)
    assert unexplained(owner, "Bare") == ["Bare", "Bare.method", "Bare.value"]
    assert unexplained(owner, "function") == []
    assert without_example(owner, "function")
    assert without_example(owner, "Bare")


def test_what_a_module_defines_is_read_from_its_source():
    """Control: functions and classes must be listed, values and what is taken in may be."""
    source = "import a\nfrom b import c\nD = 1\nE: int = 2\n_f = 3\ndef g(): ...\nclass H: ...\n"
    assert defined(source) == {"g", "H"}
    assert bound(source) == {"c", "D", "E", "g", "H"}


@pytest.mark.parametrize(
    "module", ["secure_cnn.checkpoint", "secure_cnn.archive", "secure_cnn.cli"]
)
def test_any_room_may_be_imported_first(module):
    """In an interpreter that knows none of them."""
    words = [sys.executable, "-c", f"import {module}"]
    assert subprocess.run(words, check=False).returncode == 0
