"""The example of Gadam, from its arguments to its table and picture."""

import pytest

from tests.callbacks.test_event_files import read
from tests.examples import scripts

SCRIPT = scripts.EXAMPLES / "gadam_mnist.py"


def test_ends_with_a_table_and_a_picture(tmp_path, output_of):
    small = ("--seeds", 1, "--members", 2, "--generations", 1, "--epochs", 1)
    output = output_of(SCRIPT, *small, "--output", "races.png", "--logdir", "runs")
    table = output[output.index("test accuracy  ") :].splitlines()[1:7]
    assert [line[:32].strip() for line in table] == [
        "Gadam (mutation from U(0, 1))",
        "Gadam, mutation='normal'",
        "Gadam without mutation",
        "Gadam without crossover",
        "best of as many Adams",
        "one Adam with all the steps",
    ]
    assert all(0.7 < float(line[32:].split()[0]) < 1.0 for line in table)
    populations = {path.name for path in (tmp_path / "runs").iterdir()}
    assert populations == {f"{line[:32].strip()}, seed 0" for line in table[:4]}
    for name in populations:
        assert "best/accuracy" in read(tmp_path / "runs" / name / "population")
    assert (tmp_path / "races.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["seeds", "generations"])
def test_bad_arguments_get_one_line(name, error_of):
    assert error_of(SCRIPT, f"--{name}", 0) == f"--{name} must be at least 1; received 0"
