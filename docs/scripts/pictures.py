"""Draws pictures of the pages when the site is built; those in `examples/pictures` are added.

For `mkdocs serve`, they are kept in `build/docs_pictures` until the package or the drawing
changes.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kept import ROOT, kept
from mkdocs.structure.files import File, Files

SCRIPTS = Path(__file__).parent
SYMPTOMS = SCRIPTS.parent / "training_fails.md"


def on_files(files: Files, config: Any) -> Files:
    """MkDocs calls this when it has found the pages."""
    sys.path.insert(0, str(SCRIPTS))  # MkDocs has it there only while it imports this file
    for name, sources, draw in _drawings():
        made = kept("docs_pictures", f"{name}.svg", sources, functools.partial(draw, name))
        files.append(File.generated(config, f"pictures/{name}.svg", content=made))
    for picture in sorted((ROOT / "examples" / "pictures").glob("*.png")):
        name = f"pictures/{picture.name}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def _drawings() -> Iterator[tuple[str, list[Path], Callable[[str], bytes]]]:
    """Yields the name of each picture, the files it depends on, and the function that draws it."""
    for name in ("choosing", "gadam_loop"):
        yield name, [SCRIPTS / "diagrams.py"], _diagram
    paths = [SCRIPTS / "paths_on_a_surface.py"]
    for room in ("optimizers", "closures"):
        paths += sorted((ROOT / "keras_gdopt" / room).glob("*.py"))
    watched = [SCRIPTS / "symptoms.py", SCRIPTS / "plain_axes.py"]
    watched += sorted((ROOT / "callbacks").glob("*alarms.py"))
    for name in re.findall(r"pictures/(symptom_\w+)\.svg", SYMPTOMS.read_text()):
        yield name, watched, _symptom
    sources = [SCRIPTS / "stability.py", SCRIPTS / "plain_axes.py"]
    yield "stability", [*sources, ROOT / "callbacks" / "curvature.py"], _stability
    for page in sorted((SCRIPTS.parent / "algorithms").glob("*.md")):
        if f"pictures/{page.stem}.svg" in page.read_text():
            yield page.stem, paths, _path


# Imported only when a picture must be drawn, because TensorFlow takes seconds to import.


def _diagram(name: str) -> bytes:
    import diagrams

    return getattr(diagrams, name)()


def _symptom(name: str) -> bytes:
    import symptoms

    return symptoms.picture(name)


def _stability(name: str) -> bytes:
    import stability

    return stability.picture(name)


def _path(name: str) -> bytes:
    import paths_on_a_surface

    return paths_on_a_surface.picture(name)
