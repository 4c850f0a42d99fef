"""The example of a cluster, from its arguments to its table."""

import pytest

from tests.callbacks.test_event_files import read
from tests.examples import scripts

ray = pytest.importorskip("ray")

SCRIPT = scripts.EXAMPLES / "gadam_ray.py"
SMALL = ("--population", 4, "--generations", 2, "--epochs", 1)


@pytest.mark.slow  # tests/gadam/test_cluster.py starts Ray in the default run
def test_ends_with_a_table_of_generations(tmp_path, monkeypatch, capsys, cluster):
    monkeypatch.chdir(tmp_path)
    with scripts.imported(SCRIPT) as example:
        ray.cloudpickle.register_pickle_by_value(example)  # the workers cannot import it
        example.main([*map(str, SMALL), "--workers", "1", "--checkpoint-dir", "saved"])
        ray.cloudpickle.unregister_pickle_by_value(example)
    output = capsys.readouterr().out
    lines = output.splitlines()
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
