"""The example of a cluster, run as its users run it."""

from functools import partial

import pytest

from tests.callbacks.test_event_files import read
from tests.examples import scripts

pytest.importorskip("ray")

SCRIPT = scripts.EXAMPLES / "gadam_ray.py"
SMALL = ("--population", 4, "--generations", 2, "--epochs", 1)

_run = partial(scripts.run, SCRIPT)


def test_ends_with_a_table_of_generations(tmp_path):
    run = _run(*SMALL, "--workers", 2, "--checkpoint-dir", "saved", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    (head,) = [index for index, line in enumerate(lines) if line.endswith("MB kept")]
    table = [line.split() for line in lines[head + 1 : head + 3]]
    assert [row[0] for row in table] == ["1", "2"]
    assert all(0.3 < float(row[2]) <= 1.0 for row in table)
    assert lines[-1].startswith("the best member on 360 other digits: accuracy 0.")
    assert "population/bytes_moved" in read(tmp_path / "runs" / "gadam_ray" / "population")
    assert list((tmp_path / "saved").glob("ckpt-2.index"))


@pytest.mark.parametrize("name", ["workers", "generations"])
def test_bad_arguments_get_one_line(name, error_of):
    assert error_of(SCRIPT, f"--{name}", 0) == f"--{name} must be at least 1; received 0"
