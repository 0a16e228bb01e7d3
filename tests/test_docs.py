"""What the documents say is true: their code runs, their files exist, their examples work."""

import ast
import contextlib
import io
import os
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.processes import printed_by

from secure_cnn import cli
from secure_cnn.interruption import stop_on_signals

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PACKAGES = {"secure_cnn", "defenses", "privacy"}
MOST_LINES = 60

_FENCE = re.compile(
    r"^(?P<fence>```+|~~~+)(?P<kind>[^\n`]*)\n(?P<text>.*?)^(?P=fence)\s*$", re.M | re.S
)
_EPOCHS = re.compile(r"\bepochs=\d+,")
_CODE = re.compile(r"# exit code (?P<code>\d+)\s*$")
_TEST = re.compile(r"(?:tests/)?(?P<file>test_\w+\.py)::(?P<name>test_\w+)")
_NOT_RUN = re.compile(r"<!--\s*not run:(?P<reason>.*?)-->\s*\Z", re.S)
_LINK = re.compile(r"\]\((?P<target>[^)\s#]+)(?:#[^)]*)?\)")
_PATH = re.compile(r"`(?P<path>[A-Za-z_.][\w./-]*(?:/|\.(?:py|md|toml|json)))`")
# A home, a temporary or a work folder of one machine, and file URLs; not /usr.
_LOCAL = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|mnt|var/tmp)/|file://|[A-Z]:\\")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a document."""

    kind: str
    text: str
    line: int
    reason: str | None


def blocks(text: str) -> Iterator[Block]:
    """Every fenced block, with the reason where a comment before it says that it is not run."""
    for match in _FENCE.finditer(text):
        skipped = _NOT_RUN.search(text[: match.start()])
        yield Block(
            kind=match["kind"].strip(),
            text=match["text"],
            line=text[: match.start("text")].count("\n") + 1,
            reason=skipped["reason"].strip() if skipped else None,
        )


def file_map(text: str) -> set[str]:
    """Paths in the first column of tables headed `path`; a bare name is in the folder before it."""
    found, inside = set(), False
    for row in text.splitlines():
        cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
        if not row.startswith("|"):
            inside = False
        elif cells[0] == "path":
            inside = True
        elif inside:
            folder = ""
            for match in _PATH.finditer(cells[0]):
                path = match["path"]
                if "/" in path.rstrip("/"):
                    folder = path.partition("/")[0] + "/"
                    found.add(path)
                else:
                    found.add(folder + path)
    return found


def relative(path: Path) -> str:
    """A path as the tests are named after it."""
    return path.relative_to(ROOT).as_posix()


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of ours in a shell block: its words, where its output goes, its exit code."""

    words: list[str]
    output: str | None
    code: int


def commands(text: str) -> Iterator[Command]:
    """Every command of a shell block; only `secure-cnn`, with `> file` and `# exit code N`."""
    for line in text.replace("\\\n", " ").splitlines():
        words, output = shlex.split(line, comments=True), None
        if ">" in words:
            words, (_, output) = words[:-2], words[-2:]
        if words:
            assert words[0] == "secure-cnn", f"only our own command is run, got {line!r}"
            found = _CODE.search(line)
            yield Command(words=words, output=output, code=int(found["code"]) if found else 0)


def run(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command in this process, which has torch loaded, and compares its exit code."""
    monkeypatch.setattr(sys, "argv", command.words)
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    assert code == command.code, f"{' '.join(command.words)}: {code}, {said.getvalue()}"
    if command.output is not None:
        Path(command.output).write_text(out.getvalue(), encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_snippets_run(document, tmp_path, monkeypatch):
    """Python and shell, in order, in one namespace, in one empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    todo = [b for b in blocks(document.read_text(encoding="utf-8")) if b.kind in ("python", "sh")]
    assert all(block.reason for block in todo if block.reason is not None)
    for block in (block for block in todo if block.reason is None):
        if block.kind == "sh":
            for command in commands(block.text):
                run(command, monkeypatch)
        else:
            # Numbered as in the document, so that a traceback points there.
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, relative(document), "exec"), namespace)
    if todo and all(block.reason for block in todo):
        pytest.skip("; ".join(block.reason for block in todo))


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_tests_that_are_named_exist(document):
    """A claim names the test that shows it, and that test is there."""
    assert missing_tests(document.read_text(encoding="utf-8"), ROOT / "tests") == []


def missing_tests(text: str, folder: Path) -> list[str]:
    """Tests that a text names and that are not in the folder."""
    named = {(match["file"], match["name"]) for match in _TEST.finditer(text)}
    return [
        f"{file}::{name}" for file, name in sorted(named) if name not in functions(folder / file)
    ]


def functions(path: Path) -> set[str]:
    """Names of the functions at the top of a file of tests; none where it is missing."""
    source = path.read_text(encoding="utf-8") if path.exists() else ""
    return {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document):
    """Every relative link names a file that is there."""
    text = document.read_text(encoding="utf-8")
    targets = {match["target"] for match in _LINK.finditer(text)}
    local = {t for t in targets if not re.match(r"[a-z]+:", t)}
    assert [t for t in sorted(local) if not (document.parent / t).exists()] == []


def test_the_file_map_is_right():
    """README's map names the three packages and nothing that is not there."""
    paths = file_map((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {path.partition("/")[0] for path in paths} >= PACKAGES
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", [*DOCUMENTS, *EXAMPLES], ids=relative)
def test_no_path_of_one_machine(document):
    """Nothing refers to somebody's own folders."""
    lines = document.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if _LOCAL.search(line)] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=relative)
def test_an_example_is_short_and_public(example):
    """At most 60 lines, numbered, and no name with an underscore from our packages."""
    source = example.read_text(encoding="utf-8")
    assert re.fullmatch(r"\d\d_[a-z_]+\.py", example.name)
    assert len(source.splitlines()) <= MOST_LINES
    assert private_names(source) == []


def private_names(source: str) -> list[str]:
    """Names with a leading underscore that a source imports, or reads as an attribute."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        else:
            continue
        found += [name for name in names if name.startswith("_") and not name.endswith("__")]
    return found


@pytest.mark.parametrize("example", EXAMPLES, ids=relative)
def test_an_example_runs(example, tmp_path):
    """As a script, from an empty folder, with warnings as errors; it says something."""
    source, count = _EPOCHS.subn("epochs=2,", example.read_text(encoding="utf-8"))
    assert count == (example.name == "01_demo.py")  # `make demo` runs it at full length
    script = tmp_path / example.name
    script.write_text(source, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    words = (sys.executable, "-W", "error", script)
    assert printed_by(*words, cwd=tmp_path, environment=environment).strip()


def test_an_interrupted_demo_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    """One plain line and 130, no traceback: a checkpoint without its key cannot be resumed."""

    @contextlib.contextmanager
    def signalled():
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            yield stop

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["secure_cnn.recipe.run"], "stop_on_signals", signalled)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "examples" / "01_demo.py"), run_name="__main__")
    assert left.value.code == 130
    assert capsys.readouterr().out.splitlines()[1:] == [
        "interrupted; run it again from the start: its keys were in memory only"
    ]


def test_blocks_are_found():
    """Control: kinds, lines, and the comment that says why a block is not run."""
    text = "a\n\n```python\nx = 1\n```\n\n<!-- not run: needs a GPU -->\n```python\ny\n```\n"
    text += "```\nz\n```\n"
    found = list(blocks(text))
    assert [(b.kind, b.line, b.reason) for b in found] == [
        ("python", 4, None),
        ("python", 9, "needs a GPU"),
        ("", 12, None),
    ]
    assert found[0].text == "x = 1\n"


def test_commands_are_read():
    """Control: words, redirection, exit code, continued lines, and no stranger's command."""
    text = "# first\nsecure-cnn a --b \\\n  'c>d' > out  # exit code 6\n"
    assert list(commands(text)) == [
        Command(words=["secure-cnn", "a", "--b", "c>d"], output="out", code=6)
    ]
    with pytest.raises(AssertionError, match="only our own"):
        list(commands("rm -r x"))


def test_another_exit_code_is_caught(monkeypatch):
    """Control: a command that fails where the page says it works, and the reverse."""
    with pytest.raises(AssertionError, match="bench"):
        run(Command(words=["secure-cnn", "bench", "nothing"], output=None, code=0), monkeypatch)
    with pytest.raises(AssertionError, match="help"):
        run(Command(words=["secure-cnn", "--help"], output=None, code=2), monkeypatch)


def test_a_test_that_is_not_there_is_caught(tmp_path):
    """Control: a missing function, and a missing file."""
    (tmp_path / "test_a.py").write_text("def test_b(): ...\n", encoding="utf-8")
    text = "`tests/test_a.py::test_b`, `test_a.py::test_c` and `test_d.py::test_e`"
    assert missing_tests(text, tmp_path) == ["test_a.py::test_c", "test_d.py::test_e"]


def test_the_file_map_is_read():
    """Control: paths of the first column, bare names inside the folder before them."""
    rows = ["| path | what |", "|---|---|", "| `a/b.py`, `c.py`, `d/` | `e/f.py` |", "| `g/` | x |"]
    assert file_map("\n".join([*rows, "", "| `h/` | i |"])) == {"a/b.py", "a/c.py", "a/d/", "g/"}


@pytest.mark.parametrize(
    "text", ["/home/me/x", "see /tmp/x.", "(/root/.cache/)", "file:///x", "C:\\x"]
)
def test_a_local_path_is_caught(text):
    """Control: folders of one machine; a web address or a system folder is none."""
    assert _LOCAL.search(text)
    assert not _LOCAL.search("https://example.org/home/x and /usr/share/datasets and runs/tmp/x")


def test_a_private_name_is_caught():
    """Control: in an import, in a module's name, and behind a dot."""
    assert private_names("from privacy import _opacus") == ["_opacus"]
    assert private_names("import defenses.attacks._torchattacks") == ["_torchattacks"]
    assert private_names("private._generator = 1") == ["_generator"]
    assert private_names("import privacy\nprivacy.attach()") == []
