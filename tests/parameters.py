"""Parameters of tests."""

import pytest


def slow(*values):
    """One that only `.ci/slow` tests: those beside it test the same mechanism."""
    return pytest.param(*values, marks=pytest.mark.slow)
