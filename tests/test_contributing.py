"""CONTRIBUTING.md tells the truth: its optimizer, put where it says, is tested by itself."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = {
    "keras_gdopt": "keras_gdopt",
    "callbacks": "keras_gdopt/callbacks",  # where it is installed
    "tests": "tests",
    "pyproject.toml": "pyproject.toml",
}
CROSS_CUTTING = [
    "tests/optimizers",
    "tests/callbacks",
    "tests/gadam/test_training.py",
    "tests/test_package.py",
]
TEMPLATE = "Momentum"
"""An optimizer with one variant, like the one in the page: it is tested by the same tests."""


def _files():
    """The files that the page shows, by the path in their title."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(
        r'^( *)```python title="(.+?)"\n(.*?)^ *```$', text, re.DOTALL | re.MULTILINE
    )
    return {path: textwrap.dedent(code) for _, path, code in blocks}


def copy_project(root):
    """What tests need of the project, where it can be changed."""
    for source, place in COPIED.items():
        if (ROOT / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, root / place, ignore=ignored)
        else:
            shutil.copy(ROOT / source, root / place)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with the page's optimizer in it, as a contributor would add it."""
    root = tmp_path_factory.mktemp("project")
    copy_project(root)
    for path, code in _files().items():
        (root / path).write_text(code)
    init = root / "keras_gdopt/__init__.py"
    text = init.read_text()
    text = text.replace(
        "\n__version__", "\nfrom keras_gdopt.optimizers.qhm import QHM\n\n__version__"
    )
    init.write_text(text.replace('"RAdam",', '"QHM",\n    "RAdam",'))
    return root


def _run(copy, *arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )


def _pytest(copy, *arguments):
    return _run(copy, "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *arguments)


def test_the_optimizer_is_short_and_clean(copy):
    (rule, code), (reference, _) = _files().items()
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    run = _run(copy, "ruff", "check", rule, reference)
    assert run.returncode == 0, run.stdout
    run = _run(copy, "ruff", "format", "--check", rule, reference)
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
def test_every_cross_cutting_test_covers_it(copy):
    """Where another optimizer of one rule is a parameter, this one is, too."""
    run = _pytest(copy, "--collect-only", "-m", "slow or not slow", *CROSS_CUTTING)
    assert run.returncode == 0, run.stdout[-2000:]
    collected = run.stdout.splitlines()
    tests = {
        name: {line.split("[")[0] for line in collected if re.search(rf"[\[-]{name}\(\)", line)}
        for name in (TEMPLATE, "QHM")
    }
    assert tests["QHM"] == tests[TEMPLATE]
    assert len(tests["QHM"]) > 50
    assert any("test_public_docstrings_are_complete[QHM]" in line for line in collected)
    assert any("test_rules_contain_no_tensorflow_and_are_short[qhm]" in line for line in collected)


@pytest.mark.slow
def test_a_selection_passes(copy):
    run = _pytest(
        copy, "-k", "QHM or qhm", "tests/optimizers/test_rules.py", "tests/test_package.py"
    )
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.slow
def test_all_of_them_pass(copy):
    run = _pytest(copy, "-m", "slow or not slow", "-k", "QHM or qhm", *CROSS_CUTTING)
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.slow
def test_a_rule_that_is_wrong_fails(copy, tmp_path):
    wrong = tmp_path / "project"
    shutil.copytree(copy, wrong)
    rule = wrong / "keras_gdopt/optimizers/qhm.py"
    rule.write_text(rule.read_text().replace("+ self.nu * velocity", "+ 0.5 * velocity"))
    run = _pytest(wrong, "-k", "QHM and equation", "tests/optimizers/test_rules.py")
    assert run.returncode == 1, run.stdout[-3000:]
