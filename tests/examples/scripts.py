"""Runs and imports the scripts in `examples/`."""

import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_as_a_process(script, *arguments, cwd):
    """As its users run it."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


@contextmanager
def imported(script):
    """As a module of this process, until the block ends."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    outside = sys.modules.get(spec.name)  # within another such block
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]
        if outside is not None:
            sys.modules[spec.name] = outside
