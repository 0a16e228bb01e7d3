"""Shows the doctests of our docstrings as code in the API reference.

The Google style knows a section `Examples:`; we write `Example:`, of which there is mostly one.
"""

import re
from typing import Any

import griffe

__all__ = ["ExampleSections"]

_HEADING = re.compile(r"^(\s*)Example:[ \t]*$", re.MULTILINE)


class ExampleSections(griffe.Extension):
    """Reads `Example:` as the section `Examples:`."""

    def on_package(self, *, pkg: griffe.Module, **_kwargs: Any) -> None:
        """Renames the heading in every docstring of a package, before any is parsed."""
        todo: list[griffe.Object] = [pkg]
        while todo:
            each = todo.pop()
            if each.docstring is not None:
                each.docstring.value = _HEADING.sub(r"\1Examples:", each.docstring.value)
            todo += [it for it in each.members.values() if isinstance(it, griffe.Object)]
