"""As a stranger runs it: README's commands, and each example, in environments of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# The tests' own command is what `.ci/run` runs, as it stands.
COMMANDS = [
    command
    for command in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if "pytest" not in command
]
EXAMPLES = re.findall(
    r"^\| `(\w+\.py)` \|.*\| ([^|]+) \|[^|]*\|$",
    (ROOT / "examples/README.md").read_text(),
    re.MULTILINE,
)
SMALL = {
    "compare_optimizers.py": "--epochs 2",
    "embeddings.py": "--texts 600 --words 300 --epochs 1",
    "gadam_ray.py": "--population 2 --generations 1 --epochs 1",
    "gradient_descent.py": "--epochs 2",
    "population_study.py": "--data digits --seeds 1 --members 2 --generations 1 --epochs 1",
    "physics_informed.py": "--points 256 --adam-steps 50 --seconds 2",
    "regression_to_precision.py": "--units 2 --evaluations 300",
}


def _succeeds(command, tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = os.pathsep.join([f"{sys.base_prefix}/bin", environment["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(clone)  # an environment is large
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_readmes_commands(tmp_path):
    assert len(COMMANDS) == 2
    _succeeds("\n".join(COMMANDS), tmp_path)


@pytest.mark.parametrize(("script", "needs"), EXAMPLES, ids=[script for script, _ in EXAMPLES])
def test_an_example(script, needs, tmp_path):
    if "Chromium" in needs and shutil.which("chromium") is None:
        pytest.skip("needs Chromium")
    extras = ",".join(re.findall(r"`(\w+)`", needs))
    also = "playwright" if "Playwright" in needs else ""
    _succeeds(
        f"""
        python -m venv .venv && . .venv/bin/activate && pip install --quiet -e '.[{extras}]' {also}
        python examples/{script} --help
        python examples/{script} {SMALL.get(script, "")}
        """,
        tmp_path,
    )


def test_each_example_is_in_the_index():
    assert {script for script, _ in EXAMPLES} == {
        path.name for path in (ROOT / "examples").glob("*.py")
    }
