"""The public surface, what imports what, and the examples in the docstrings."""

import ast
import configparser
import doctest
import graphlib
import importlib
import inspect
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import keras_gdopt as gdopt
from tests.optimizer_cases import closure_classes, optimizer_classes
from tests.parameters import slow

PACKAGE = Path(gdopt.__file__).parent
RULES = [Path(inspect.getfile(cls)) for cls in optimizer_classes()]

# Floors of the house: a room may import from the floors below.
FLOORS = [
    ["keras_gdopt.optimizers", "keras_gdopt.functional"],
    ["keras_gdopt.losses", "keras_gdopt.initializers", "keras_gdopt.constraints"],
    ["keras_gdopt.closures", "keras_gdopt.gadam"],
    ["keras_gdopt.callbacks"],
]


def _modules():
    names = [gdopt.__name__]
    names += [m.name for m in pkgutil.walk_packages(gdopt.__path__, "keras_gdopt.")]
    names += [
        m.name for m in pkgutil.walk_packages(gdopt.callbacks.__path__, "keras_gdopt.callbacks.")
    ]
    return sorted(set(names))


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_a_name_that_is_not_public():
    with pytest.raises(AttributeError, match="no attribute 'Magic'"):
        _ = gdopt.Magic


def test_version_is_that_of_the_project():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert gdopt.__version__ == project["project"]["version"]


def test_typing_marker_ships():
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.slow
def test_the_package_does_not_import_its_callbacks():
    script = "import sys, keras_gdopt; sys.exit('keras_gdopt.callbacks' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("name", _modules())
def test_imports_run_downwards(name):
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    of = {room: floor for room, floor in floors.items() if name.startswith(room)}
    if not of:
        return  # the package itself, above all rooms
    ((own, floor),) = of.items()
    for imported in _imports(Path(importlib.import_module(name).__file__)):
        for room in floors:
            if imported.startswith(room) and room != own:
                assert floors[room] < floor, f"{name} imports {imported}"


def _path_of(name):
    return Path(importlib.import_module(name).__file__)


def test_no_files_import_each_other_in_a_circle():
    """Imports in functions and for type checkers count."""
    names = set(_modules())
    imports = {name: set() for name in names}
    for name in names:
        for node in ast.walk(ast.parse(_path_of(name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & names
                imports[name] |= inner or ({node.module} & names)
    del imports["keras_gdopt"]  # the package itself is above all files
    for imported in imports.values():
        imported.discard("keras_gdopt")
    graphlib.TopologicalSorter(imports).prepare()  # raises a CycleError that names the circle


# What Keras itself keeps private, and we cannot do without.
PRIVATE_IN_KERAS = {
    "_call_has_training_arg",
    "_compile_config",
    "_compute_loss",
    "_flatten_layers",
    "_iterations",
    "_learning_rate",
    "_loss_tracker",
    "_optimizer_map",
    "_output_shape",
    "_symbolic_build",
    "_trainable_variables",
}
_OF_NAMED_TUPLES = {"_asdict", "_fields", "_replace"}


@pytest.mark.parametrize("name", _modules())
def test_no_file_reads_what_another_one_keeps_private(name):
    tree = ast.parse(_path_of(name).read_text())
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
            continue
        is_special = node.attr.endswith("__")
        if is_special or node.attr in own | PRIVATE_IN_KERAS | _OF_NAMED_TUPLES:
            continue
        # A class may use what its base class has for its subclasses.
        assert ast.unparse(node.value) in ("self", "cls", "super()"), ast.unparse(node)


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_rules_contain_no_tensorflow_and_are_short(path):
    assert not any(name.startswith(("tensorflow", "jax", "torch")) for name in _imports(path))
    tree = ast.parse(path.read_text())
    docstrings = sum(
        node.body[0].end_lineno - node.body[0].lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    )
    # A wrapper is a Keras shell besides.
    most = 125 if path.stem == "lookahead" else 100
    assert len(path.read_text().splitlines()) - docstrings < most


@pytest.mark.parametrize("name", _modules())
def test_no_comparison_is_negated(name):
    """TensorFlow's graph optimizer turns `~(a > b)` into `a <= b`, which a NaN is not."""
    for node in ast.walk(ast.parse(_path_of(name).read_text())):
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            assert not isinstance(node.operand, ast.Compare), ast.unparse(node)


# The examples of the others of their kind are like these.
_ALIKE = ["bfgs", "conjugate_gradient", "levenberg_marquardt", "newton"]


@pytest.mark.parametrize(
    "name",
    [slow(name) if name.rpartition(".")[2] in _ALIKE else name for name in _modules()],
)
def test_examples_in_docstrings(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


@pytest.mark.parametrize(
    "public",
    [
        *optimizer_classes(),
        *closure_classes(),
        gdopt.GradientOptimizer,
        gdopt.losses.MulticlassHinge,
        gdopt.initializers.SparseNormal,
        gdopt.initializers.ClassPriorBias,
        gdopt.constraints.Bounds,
        gdopt.callbacks.ConvergenceStopping,
        gdopt.callbacks.OptimizerTensorBoard,
        gdopt.callbacks.PopulationTensorBoard,
        gdopt.Gadam,
    ],
    ids=lambda public: public.__name__,
)
def test_public_docstrings_are_complete(public):
    text = inspect.getdoc(public)
    assert ">>> " in text and "Args:" in text and "Raises:" in text
    documented = text[text.index("Args:") : text.index("Raises:")]
    for name in inspect.signature(public).parameters:
        assert f"{name}:" in documented, name
    if public in [*optimizer_classes(), *closure_classes()]:
        assert "$$" in text and "Source: " in text and "keras" in text.lower()


def test_each_folder_of_the_package_is_installed():
    """The list of packages is kept by hand, as the callbacks lie elsewhere."""
    root = Path(__file__).parents[1]
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {path.parent.relative_to(root) for path in root.glob("keras_gdopt/**/__init__.py")}
    assert listed == {".".join(folder.parts) for folder in folders} | {"keras_gdopt.callbacks"}
