"""Converts the equations of a page to MathML, which browsers show without a script."""

import html
import re
from typing import Any

import latex2mathml.converter

# What `pymdownx.arithmatex` turns $...$ and $$...$$ into with `generic: true`.
_EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs calls this with each page's HTML."""
    return _EQUATION.sub(_as_mathml, content)


def _as_mathml(equation: re.Match[str]) -> str:
    tex = " ".join(html.unescape(equation["tex"]).split())
    # The converter has other names for an alignment, a space and an underscore.
    tex = tex.replace("{aligned}", "{align*}").replace(r"\_", "_")
    tex = re.sub(r"(?<!\\)\\ ", r"\\;", tex)
    display = "block" if equation["tag"] == "div" else "inline"
    mathml = latex2mathml.converter.convert(tex, display=display)
    if "\\" in mathml:  # the converter leaves unknown commands unchanged
        raise ValueError(f"Cannot write this equation as MathML: {tex}")
    return mathml
