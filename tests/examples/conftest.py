"""Runs examples in this process, which saves their imports.

One of them runs in a process of its own (`test_gradient_descent.py`); by `.ci/slow` all do, in
environments of their own.
"""

import pytest

from tests.examples import scripts


@pytest.fixture
def output_of(tmp_path, monkeypatch, capsys):
    """What an example prints, run in `tmp_path`."""

    def run(script, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MPLBACKEND", "agg")
        with scripts.imported(script) as module:
            module.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def error_of(tmp_path, monkeypatch):
    """What an example says that ends with an error."""

    def run(script, *arguments):
        monkeypatch.chdir(tmp_path)
        with scripts.imported(script) as module, pytest.raises(SystemExit) as stop:
            module.main([str(argument) for argument in arguments])
        return stop.value.code  # printed to stderr, with the exit code 1

    return run
