"""Examples that end before they begin, run in this process to save its imports."""

import pytest

from tests.examples import scripts


@pytest.fixture
def error_of(tmp_path, monkeypatch):
    """What an example says that ends with an error."""

    def run(script, *arguments):
        monkeypatch.chdir(tmp_path)
        with scripts.imported(script) as module, pytest.raises(SystemExit) as stop:
            module.main([str(argument) for argument in arguments])
        return stop.value.code  # printed to stderr, with the exit code 1

    return run
