"""The documentation site: every page and every public name is in it, and nothing is from elsewhere.

The site itself is built where mkdocs is installed (`make docs` does that); the rest needs no tool.
"""

import importlib
import importlib.util
import inspect
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.processes import printed_by

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
PACKAGES = ("secure_cnn", "secure_cnn.archive", "secure_cnn.bench", "defenses", "privacy")
TOOLS = ("mkdocs", "mkdocstrings", "material")

_DIRECTIVE = re.compile(r"^::: (?P<name>[\w.]+)$", re.M)
_PAGE = re.compile(r"\b[\w/.-]+\.md$", re.M)
_VERDICT = re.compile(r"\b(compliant|complies|comply|certified (by|for|under)|conforms?)\b", re.I)

needs_tools = pytest.mark.skipif(
    not all(importlib.util.find_spec(tool) for tool in TOOLS),
    reason="mkdocs, mkdocstrings or mkdocs-material is not installed; `make docs` installs them",
)


class Page(HTMLParser):
    """The anchors of a page, and the addresses that a browser fetches to show it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes an anchor, and an address unless it is only followed when somebody clicks."""
        values = dict(attrs)
        self.anchors.add(values.get("id") or "")
        if tag != "a":
            self.fetched += [values[name] or "" for name in ("src", "href") if name in values]

    @property
    def strangers(self) -> list[str]:
        """Fetched addresses that are not beside the page."""
        return [it for it in self.fetched if re.match(r"(?:[a-z]+:)?//", it)]


def shown(package: str) -> dict[str, str]:
    """Public classes and functions of a package, and where each is defined."""
    module = importlib.import_module(package)
    values = {name: getattr(module, name) for name in module.__all__}
    return {
        name: f"{it.__module__}.{it.__qualname__}"
        for name, it in values.items()
        if inspect.isclass(it) or inspect.isfunction(it)
    }


def missing(package: str, anchors: set[str]) -> list[str]:
    """Public names without an anchor, neither under the package nor under where they are defined.

    The second is for a function that is called as its module is, which hides it from the tool.
    """
    return [
        name for name, place in shown(package).items() if not {f"{package}.{name}", place} & anchors
    ]


def test_every_page_is_in_the_navigation_once():
    """A page that nothing leads to is not read; one that is gone is no entry."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert sorted(_PAGE.findall(navigation)) == PAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_its_page(package):
    """The reference is made from the docstrings of the package, not written beside them."""
    page = (DOCS / "reference" / f"{package}.md").read_text(encoding="utf-8")
    assert _DIRECTIVE.search(page)["name"] == package


def test_vocabularies_speak_of_evidence():
    """No page says that somebody's document is satisfied."""
    text = (DOCS / "vocabularies.md").read_text(encoding="utf-8")
    assert "evidence" in text
    assert _VERDICT.findall(text) == []
    assert _VERDICT.search("secure-cnn complies with ML01")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder)
    printed_by(*command, cwd=ROOT, environment={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return folder


@needs_tools
def test_the_site_builds_without_a_warning(site):
    """Strictly: no dead link, no dead anchor, no docstring that cannot be read."""
    assert {page.removesuffix(".md") for page in PAGES} <= {
        path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")
    }


@needs_tools
def test_every_public_name_is_in_the_reference(site):
    """Classes and functions of the top-level packages, each with an anchor to link to."""
    lost = {}
    for package in PACKAGES:
        text = (site / "reference" / f"{package}.html").read_text(encoding="utf-8")
        lost[package] = missing(package, Page(text).anchors)
    assert lost == {package: [] for package in PACKAGES}


@needs_tools
def test_no_page_loads_anything_from_elsewhere(site):
    """Scripts, styles, fonts and pictures lie beside the pages."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert {path: page.strangers for path, page in pages.items() if page.strangers} == {}
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not any(re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", text) for text in styles)


@needs_tools
def test_examples_are_shown_as_code(site):
    """A doctest is a block of code, not a quotation, which is what `>>>` means in Markdown."""
    for path in (site / "reference").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert '<span class="gp">&gt;&gt;&gt; </span>' in text, path.name
        assert "<blockquote>" not in text, path.name


def test_what_comes_from_elsewhere_is_caught():
    """Control: a script, a font and a picture; a link to click and a neighbour are none."""
    page = Page(
        '<script src="https://a/x.js"></script><link href="//b/f.css"><img src="http://c/p.png">'
        '<a id="here" href="https://d/"></a><img src="report.png"><link href="assets/s.css">'
    )
    assert page.strangers == ["https://a/x.js", "//b/f.css", "http://c/p.png"]
    assert "here" in page.anchors


def test_a_name_that_is_not_shown_is_caught():
    """Control: one anchor of two, and the place of a function that is called as its module."""
    anchors = {f"privacy.{name}" for name in shown("privacy")} - {"privacy.DPPlan"}
    assert missing("privacy", anchors) == ["DPPlan"]
    assert missing("privacy", anchors - {"privacy.attach"} | {"privacy.attach.attach"}) == [
        "DPPlan"
    ]
