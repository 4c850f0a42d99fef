"""The example of a physics-informed network, from its arguments to its table and picture."""

import numpy as np
import pytest
import tensorflow as tf

from tests.examples import scripts

SCRIPT = scripts.EXAMPLES / "physics_informed.py"


@pytest.fixture(scope="module")
def example():
    with scripts.imported(SCRIPT) as module:
        yield module


def _by_fourier_series(times, viscosity, count=1024):
    """Burgers' equation on a circle; the solution is odd, and so 0 at the walls."""
    integrate = pytest.importorskip("scipy.integrate")
    x = np.arange(count) * 2 / count - 1
    wave = 1j * np.pi * np.arange(count // 2 + 1)

    def change(t, u):
        amplitudes = np.fft.rfft(u)
        u_x = np.fft.irfft(wave * amplitudes, count)
        u_xx = np.fft.irfft(wave**2 * amplitudes, count)
        return viscosity * u_xx - u * u_x

    start = -np.sin(np.pi * x)
    precise = {"method": "DOP853", "rtol": 1e-9, "atol": 1e-9}
    solved = integrate.solve_ivp(change, (0, max(times)), start, t_eval=times, **precise)
    return x, solved.y.T


def test_the_exact_solution_is_that_of_a_spectral_method(example):
    times = [0.0, 0.25, 0.5, 1.0]
    x, solutions = _by_fourier_series(times, example.VISCOSITY)
    for t, solution in zip(times, solutions, strict=True):
        exact = example.exact_solution(x, np.full_like(x, t))
        np.testing.assert_allclose(exact, solution, rtol=0, atol=1e-6)


def test_the_residual_is_that_of_burgers_equation(example, float64):
    """By hand for u = x² t: u_t + u u_x - ν u_xx = x² + 2 x³ t² - 2 ν t."""
    model = example.BurgersNetwork(2, 1)
    model.network = lambda points: points[:, :1] ** 2 * points[:, 1:]
    x, t = np.array([[0.5], [-1.0]]), np.array([[0.25], [1.0]])
    expected = x**2 + 2 * x**3 * t**2 - 2 * example.VISCOSITY * t
    residual = model.residual(tf.constant(np.concatenate([x, t], axis=1)))
    np.testing.assert_allclose(residual, expected, rtol=1e-14)


@pytest.mark.slow
def test_ends_with_a_table_and_a_picture(tmp_path, output_of):
    small = ("--units", 8, "--layers", 2, "--points", 256)
    output = output_of(SCRIPT, *small, "--adam-steps", 100, "--seconds", 3)
    lines = output[output.index("relative L2 error") :].splitlines()[1:6]
    table = {
        line[:20].strip(): [float(n.replace(",", "")) for n in line[20:].split()] for line in lines
    }
    assert list(table) == ["Adam at first", "Adam", "LBFGS", "BFGS", "LevenbergMarquardt"]
    loss, error, evaluations, seconds, _ = table.pop("Adam at first")
    assert evaluations == 100 and error < 1 and seconds > 0
    for name, contender in table.items():
        assert contender[0] < loss, name
        assert contender[2] > evaluations, name
        assert contender[3] > seconds, name
    assert (tmp_path / "runs" / "physics_informed.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--points", 0), "--points must be at least 1; received 0"),
        (("--adam-steps", 1), "--adam-steps must be at least 50; received 1"),
        (("--learning-rate", 0), "--learning-rate must be above 0; received 0.0"),
        (("--seconds", -1), "--seconds must be above 0; received -1.0"),
        (("--logdir", "file/runs"), "cannot write to --logdir file/runs: Not a directory"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, tmp_path, error_of):
    (tmp_path / "file").write_text("in the way")
    assert error_of(SCRIPT, *arguments) == f"physics_informed: error: {message}"
