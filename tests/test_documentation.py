"""The pages: their Python runs, what their commands name exists, and nothing has no page.

(`tests/test_package.py` runs the examples in docstrings.)
"""

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import keras
import numpy as np
import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

from tests.optimizer_cases import closure_classes, optimizer_classes

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    ROOT / "examples/README.md",
    ROOT / "benchmarks/README.md",
]
GALLERY = ROOT / "docs/gallery.md"
# Of what takes long to start or to compile.
SLOW = (
    "clusters.md",
    "closures.md",
    "float64.md",
    "gadam.md",
    "getting_started.md",
    "levenberg_marquardt.md",
    "losses_and_initializers.md",
    "other_libraries.md",
    "recipes.md",
)


def _each(pages):
    return [
        pytest.param(
            page,
            id=str(page.relative_to(ROOT)),
            marks=[pytest.mark.slow] if page.name in SLOW else [],
        )
        for page in pages
    ]


def _python_blocks(page):
    return list(Document.parse(str(page), PythonCodeBlockParser()).examples())


def _what_pages_need_not_say():
    """A small classifier, and data for it, which a page may use as it is."""
    x = np.random.default_rng(0).normal(size=(96, 8)).astype("float32")
    y = x[:, :3].argmax(axis=1).astype("int32")
    names = {"x": x[:64], "y": y[:64]}
    for part in ("val", "test"):
        names |= {f"x_{part}": x[64:], f"y_{part}": y[64:]}
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    return {"model": model, **names}


@pytest.mark.parametrize("page", _each(page for page in PAGES if _python_blocks(page)))
def test_python_on_a_page_runs_from_its_top_to_its_end(page, tmp_path, monkeypatch):
    if page.name == "recipes.md" and not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("a recipe needs Keras 3.15")
    monkeypatch.chdir(tmp_path)
    document = Document.parse(str(page), PythonCodeBlockParser())
    document.namespace.update(_what_pages_need_not_say())
    for block in document.examples():
        block.evaluate()


def test_the_gallery_shows_the_code_of_each_example():
    shown = re.findall(r'^ *--8<-- "examples/(\w+)\.py"$', GALLERY.read_text(), re.MULTILINE)
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert set(shown) == examples - {"tensorboard_pictures"}  # which only takes pictures
    notebooks = re.findall(r"\(notebooks/(\w+)\.ipynb\)", GALLERY.read_text())
    assert set(notebooks) == set(shown) - {"gadam_ray"}  # which is for a cluster


@pytest.mark.slow
def test_the_recipe_for_keras_tuner(tmp_path, monkeypatch):
    """Its block is not run with the page, because few have KerasTuner."""
    pytest.importorskip("keras_tuner")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(
        r"```py\n(import keras_tuner\n.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL
    )
    given = _what_pages_need_not_say()
    exec("import keras\nimport keras_gdopt as gdopt\n" + block, given)
    assert type(given["model"].optimizer).__name__ == "Adam"
    assert int(given["model"].optimizer.iterations) > 0


def test_a_block_that_fails_is_a_failure(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\na = 1\n```\n\ntext\n\n```python\nassert a == 2\n```\n")
    first, second = _python_blocks(page)
    first.evaluate()
    with pytest.raises(AssertionError):
        second.evaluate()


# --- commands ------------------------------------------------------------------------


def _commands(page):
    """Lines of the page's bash blocks, and commands within its text."""
    text = page.read_text()
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`(python [^`]+)`", text)]
    commands = [part for line in lines for part in re.split(r"&&|\|", line.split(" #")[0])]
    return [words for command in commands if (words := shlex.split(command))]


def _options(*scripts):
    """What the scripts give to `add_argument`."""
    calls = [
        node
        for script in scripts
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
    ]
    return {"--help"} | {ast.literal_eval(call.args[0]) for call in calls}


def _check(words):
    match words:
        case ["python", "-m", module, *arguments] if module.startswith("benchmarks"):
            script = ROOT / f"{module.replace('.', '/')}.py"
            _check_options(arguments, script, ROOT / "benchmarks/side_by_side.py")
        case ["python", "-m", module, *_] if module.startswith("tests"):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists()
        case ["python", script, *arguments] if script.endswith(".py"):
            _check_options(arguments, ROOT / script)
        case ["python", "-m", "pytest", *arguments]:
            assert all((ROOT / a).exists() for a in arguments if a.startswith("tests"))
        case ["pip", "install", *arguments]:
            extras = re.findall(r"\[(.*?)\]", " ".join(arguments))
            named = {extra for group in extras for extra in group.split(",")}
            assert named <= set(PROJECT["optional-dependencies"])


def _check_options(arguments, *scripts):
    assert scripts[0].exists(), scripts[0]
    given = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    assert given <= _options(*scripts), given - _options(*scripts)


@pytest.mark.parametrize("page", _each(PAGES))
def test_commands_name_what_exists(page):
    for words in _commands(page):
        _check(words)


@pytest.mark.parametrize(
    "command",
    [
        "python examples/none.py",
        "python examples/population_study.py --none 3",
        "python -m benchmarks.none",
        "python -m benchmarks.closures --none",
        "pip install -e '.[none]'",
    ],
)
def test_a_command_that_names_nothing_is_a_failure(command):
    with pytest.raises((AssertionError, FileNotFoundError)):
        _check(shlex.split(command))


# --- completeness --------------------------------------------------------------------


@pytest.mark.parametrize("cls", [*optimizer_classes(), *closure_classes()])
def test_every_optimizer_has_a_page(cls):
    name = cls.__module__.split(".")[-1]
    assert f"::: keras_gdopt.{cls.__name__}\n" in (ROOT / f"docs/algorithms/{name}.md").read_text()
    assert f"algorithms/{name}.md" in (ROOT / "mkdocs.yml").read_text()


def test_every_example_is_in_the_index():
    index = (ROOT / "examples/README.md").read_text()
    assert [p.name for p in ROOT.glob("examples/*.py") if f"`{p.name}`" not in index] == []


@pytest.mark.parametrize("page", _each(page for page in PAGES if ROOT / "docs" not in page.parents))
def test_links_between_files_lead_somewhere(page):
    """Those within `docs` are followed by `mkdocs build --strict`."""
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("page", _each(PAGES))
def test_the_members_of_a_class_that_a_page_lists_are_shown(page):
    """The reference leaves inherited ones out unless it is told otherwise."""
    for block in re.split(r"(?m)^::: ", page.read_text())[1:]:
        name, *options = block.split("\n\n")[0].splitlines()
        if "inherited_members: true" in block:
            continue
        module, _, attribute = name.strip().rpartition(".")
        cls = getattr(importlib.import_module(module), attribute)
        listed = re.findall(r"[\w]+", re.sub(r".*members:", "", " ".join(options)))
        missing = [member for member in listed if "members" in block and member not in vars(cls)]
        assert not missing, f"{name} inherits {missing}"
