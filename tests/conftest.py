"""Loads what all tests share, in the processes that run them."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """The process that only hands out tests need not import TensorFlow."""
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("tests.fixtures")
