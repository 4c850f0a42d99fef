"""Fences the examples in docstrings, which Markdown would read as quotations."""

from typing import Any

import griffe


class DoctestBlocks(griffe.Extension):
    """Puts each run of lines from `>>>` to the next empty line into a fence."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe calls this with each object that it reads."""
        if obj.docstring:
            obj.docstring.value = _fenced(obj.docstring.value)


def _fenced(text: str) -> str:
    lines: list[str] = []
    inside = False
    for line in [*text.splitlines(), ""]:
        if not inside and line.startswith(">>> "):
            lines.append("```pycon")
            inside = True
        elif inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(line)
    return "\n".join(lines).rstrip()
