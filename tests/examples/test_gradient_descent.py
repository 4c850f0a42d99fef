"""The example of the three variants, run as its users run it."""

from functools import partial

import numpy as np
import pytest

from tests.examples import scripts

SCRIPT = scripts.EXAMPLES / "gradient_descent.py"

_run = partial(scripts.run_as_a_process, SCRIPT)


@pytest.fixture(scope="module")
def example():
    with scripts.imported(SCRIPT) as module:
        yield module


def _descended(data, start, rate, updates):
    """Eq. 13 by hand: the gradient of the mean squared error of all samples."""
    weights = np.array(start)
    for _ in range(updates):
        weights = weights - rate * 2 * data.x.T @ (data.x @ weights - data.y[:, 0]) / len(data.x)
    return weights


def test_full_batch_and_its_parts_are_gradient_descent(example, float64):
    pytest.importorskip("sklearn")
    data = example.load()
    assert len(data.x) % example.BATCH_SIZE  # the last batch is smaller
    expected = _descended(data, example.START, example.VANILLA_RATE, 2)
    vanilla = example.variants(len(data.x), 2)[0]
    path = example.run(vanilla, data, 2, seed=0)
    np.testing.assert_allclose(path[0], example.START, rtol=0)
    np.testing.assert_allclose(path[-1], expected, rtol=1e-13)
    assert len(path) == 3
    ends = example.accumulations(data, 2)
    assert 1e-4 < np.max(np.abs(ends.pop("means of the batches") - expected)) < 0.1
    for end in ends.values():
        np.testing.assert_allclose(end, expected, rtol=1e-13)


def test_the_minimum_is_flat_and_the_loss_by_hand(example):
    pytest.importorskip("sklearn")
    data = example.load()
    np.testing.assert_allclose(data.x.T @ (data.x @ data.minimum() - data.y[:, 0]), 0, atol=1e-10)
    some = np.array([[0.3, -0.2], [1.0, 0.0]])
    by_hand = [((data.x[:, 0] * a + data.x[:, 1] * b - data.y[:, 0]) ** 2).mean() for a, b in some]
    np.testing.assert_allclose(data.loss(some), by_hand, rtol=1e-12)


def test_the_rate_decays_linearly(example):
    first, last, r = example.STOCHASTIC_RATE, example.LAST_RATE, 100
    for k in (0, 1, 50, 99, 100):
        expected = (1 - k / r) * first + k / r * last
        assert float(example.decaying_rate(r)(k)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_ends_with_tables_and_a_picture(tmp_path):
    pytest.importorskip("sklearn")
    run = _run("--epochs", 1, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = run.stdout[run.stdout.index("loss above it") :].splitlines()[1:5]
    table = {line[:28].strip(): line[28:].replace(",", "").split() for line in lines}
    updates = {name: int(row[0]) for name, row in table.items()}
    assert updates == {
        "vanilla (full batch)": 1,
        "mini-batches of 32": 14,
        "stochastic, rate decays": 442,
        "stochastic": 442,
    }
    assert all(0 < float(row[1]) < 0.7 for row in table.values())
    assert float(table["stochastic, rate decays"][1]) < float(table["vanilla (full batch)"][1])
    rows = run.stdout[run.stdout.index("accumulated   ") :].splitlines()[1:4]
    off = {row[:22].strip(): float(row[22:]) for row in rows}
    assert off.pop("means of the batches") > 1e-4
    assert set(off) == {"weighted samples", "sums"} and max(off.values()) < 1e-14
    assert (tmp_path / "runs" / "gradient_descent.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", 0), "--epochs must be at least 1; received 0"),
        (("--seed", -1), "--seed must not be negative; received -1"),
        (("--logdir", "file/runs"), "cannot write to --logdir file/runs: Not a directory"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, tmp_path, error_of):
    pytest.importorskip("sklearn")
    (tmp_path / "file").write_text("in the way")
    assert error_of(SCRIPT, *arguments) == f"gradient_descent: error: {message}"
