"""Makes a notebook of each example when the site is built, and runs it on a small setting.

For `mkdocs serve`, they are kept in `build/docs_notebooks` until the package or the example
changes.
"""

import functools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kept import ROOT, kept
from mkdocs.structure.files import File, Files

# Seconds each, instead of minutes. (`gadam_ray.py` is for a cluster.)
ARGUMENTS = {
    "compare_optimizers": "--epochs 5 --optimizers Adam Momentum RAdam",
    "gradient_descent": "--epochs 5",
    "embeddings": "--epochs 2 --texts 1000 --words 1000",
    "regression_to_precision": "--evaluations 300",
    "physics_informed": "--units 10 --layers 2 --points 512 --adam-steps 300 --seconds 2",
    "population_study": "--data digits --seeds 1 --members 4 --generations 2 --epochs 1",
}

_TITLE = re.compile(r"^# --- (.*?) -+$", re.MULTILINE)
_MAIN = 'if __name__ == "__main__":'


def on_files(files: Files, config: Any) -> Files:
    """MkDocs calls this when it has found the pages."""
    package = [*ROOT.glob("keras_gdopt/**/*.py"), *ROOT.glob("callbacks/*.py"), Path(__file__)]
    for name, arguments in ARGUMENTS.items():
        script = ROOT / "examples" / f"{name}.py"
        run = functools.partial(_executed, script.read_text(), arguments.split())
        made = kept("docs_notebooks", f"{name}.ipynb", [script, *sorted(package)], run)
        files.append(File.generated(config, f"notebooks/{name}.ipynb", content=made))
    return files


def _executed(script: str, arguments: list[str]) -> bytes:
    # Imported only when a notebook must be run.
    import nbclient
    import nbformat

    kinds = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = [kinds[kind](source) for kind, source in _cells(script, arguments)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            coalesce_streams=True,  # a progress bar is its last state
        )
        client.execute()
    for cell in notebook.cells:  # without TensorFlow's messages when it starts
        shown = cell.get("outputs", [])
        shown[:] = [output for output in shown if output.get("name") != "stderr"]
    return nbformat.writes(notebook).encode()


def _cells(script: str, arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yields the kind and the source of each cell.

    The docstring and the comments that divide the script become text, and what runs it as a
    program becomes a call with `arguments` and the pictures that it draws.
    """
    _, docstring, rest = script.split('"""', 2)
    summary, *explanation = docstring.split("\n", 1)
    yield "markdown", f"# {summary.rstrip('.')}\n{''.join(explanation)}".strip()
    imports, *sections = _TITLE.split(rest.split(_MAIN)[0])
    yield "code", imports.strip()
    for title, code in zip(sections[::2], sections[1::2], strict=True):
        yield "markdown", f"## {title[0].upper()}{title[1:]}"
        yield "code", code.strip()
    yield "markdown", "## Run it\n\nOn a small setting; take arguments away for the whole of it."
    yield "code", f"main({arguments})"
    yield (
        "code",
        "from pathlib import Path\n\nfrom IPython.display import Image, display\n\n"
        "display(*(Image(path) for path in sorted(Path().rglob('*.png'))))",
    )
