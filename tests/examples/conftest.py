"""Examples that end before they begin, run in this process to save its imports."""

import importlib.util
import sys

import pytest


@pytest.fixture
def error_of(tmp_path, monkeypatch):
    """What an example says that ends with an error."""

    def run(script, *arguments):
        monkeypatch.chdir(tmp_path)
        spec = importlib.util.spec_from_file_location(script.stem, script)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, script.stem, module)
        spec.loader.exec_module(module)
        with pytest.raises(SystemExit) as stop:
            module.main([str(argument) for argument in arguments])
        return stop.value.code  # printed to stderr, with the exit code 1

    return run
