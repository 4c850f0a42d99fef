"""To machine precision: least squares and BFGS beside SciPy and torch, on np.sinc(10 x).

python -m benchmarks.precision                   # everything, about 10 minutes
python -m benchmarks.precision levenberg         # one part; `--help` lists them

Trains a network of 61 weights in float64 on 2,000 points, from five starts, with one thread each.
The seconds do not include compiling. `examples/physics_informed.py` does the same for Burgers'
equation.
"""

import os

# One thread for each library; the libraries read this when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

import keras_gdopt as gdopt

SEEDS = range(5)
UNITS = 20
LOW = 1e-6  # count seconds and iterations until this loss
X = np.linspace(-1, 1, 2000)[:, None]
Y = np.sinc(10 * X)
ITERATIONS_PER_STEP = 10

Arrays = tuple[np.ndarray, ...]


class Way(NamedTuple):
    """The result of one optimizer from one start."""

    loss: float
    seconds: float
    seconds_to_low: float
    """Infinite if the loss stayed above `LOW`; NaN if not measured."""
    iterations_to_low: float
    iterations: int


# --- ours -----------------------------------------------------------------------------------


def new_model(seed: int) -> keras.Model:
    """The network, with weights from Keras's initializers."""
    keras.utils.set_random_seed(seed)
    hidden = keras.layers.Dense(UNITS, activation="tanh")
    return keras.Sequential([keras.Input((1,)), hidden, keras.layers.Dense(1)])


def by_keras(
    seed: int, optimizer: Any, most: int, floatx: str = "float64", until_low: bool = False
) -> Way:
    """Trains from a start, in steps of a few iterations.

    Args:
        seed: The seed of the start.
        optimizer: An optimizer with `iterations_per_step`.
        most: The most iterations.
        floatx: The dtype of weights and data.
        until_low: Whether to stop at the loss `LOW`.
    """
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(floatx)
    model = new_model(seed)
    model.compile(optimizer, "mse")
    optimizer.attach(model)
    x, y = keras.ops.convert_to_tensor(X, floatx), keras.ops.convert_to_tensor(Y, floatx)
    optimizer.build(model.trainable_variables)
    variables = [*model.variables, *optimizer.variables]
    at_start = [v.numpy() for v in variables]
    model.train_on_batch(x, y)  # compiles
    for variable, value in zip(variables, at_start, strict=True):
        variable.assign(value)
    iterations, lowest, low = 0, math.inf, (math.inf, math.inf)
    started = time.perf_counter()
    while iterations < most and not (until_low and lowest <= LOW):
        model.reset_metrics()
        loss = float(model.train_on_batch(x, y))
        made = int(optimizer.step_metrics["steps_made"])
        iterations += made
        lowest = min(lowest, loss)
        if loss <= LOW and low[0] == math.inf:
            low = (time.perf_counter() - started, iterations)
        if optimizer.converged or not made:
            break
    return Way(lowest, time.perf_counter() - started, *low, iterations)


# --- the same by hand -----------------------------------------------------------------------


def start_of(seed: int) -> np.ndarray:
    """The weights of a start, as one vector."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    return np.concatenate([w.ravel() for w in new_model(seed).get_weights()])


def residuals(theta: np.ndarray) -> np.ndarray:
    """The network's output minus the target, at each point."""
    kernel, bias, last, last_bias = np.split(theta, [UNITS, 2 * UNITS, 3 * UNITS])
    return np.tanh(X * kernel + bias) @ last + last_bias - Y[:, 0]


def jacobian(theta: np.ndarray) -> np.ndarray:
    """The Jacobian of the residuals by the weights."""
    kernel, bias, last, _ = np.split(theta, [UNITS, 2 * UNITS, 3 * UNITS])
    hidden = np.tanh(X * kernel + bias)
    slopes = (1 - hidden**2) * last
    return np.concatenate([slopes * X, slopes, hidden, np.ones_like(X)], axis=1)


def loss_and_gradient(theta: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean squared error and its gradient."""
    left = residuals(theta)
    return float(np.mean(left**2)), 2 / len(left) * jacobian(theta).T @ left


def levenberg_marquardt_by_hand(theta: np.ndarray, iterations: int) -> float:
    """Madsen, Nielsen and Tingleff 2004, Algorithm 3.16; returns the seconds of an iteration."""
    left, damping, growth = residuals(theta), 0.0, 2.0
    started = time.perf_counter()
    for _ in range(iterations):
        rows = jacobian(theta)
        matrix, gradient = rows.T @ rows, rows.T @ left
        damping = damping or 1e-3 * np.max(np.diag(matrix))
        while True:
            step = np.linalg.solve(matrix + damping * np.eye(len(theta)), -gradient)
            after = residuals(theta + step)
            fallen = left @ left - after @ after
            if fallen > 0:
                gain = fallen / (step @ (damping * step - gradient))
                damping, growth = damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
                theta, left = theta + step, after
                break
            damping, growth = damping * growth, 2 * growth
    return (time.perf_counter() - started) / iterations


def by_minpack(seed: int, most: int) -> Way:
    """`scipy.optimize.least_squares(method="lm")`; each Jacobian counts as an iteration."""
    from scipy.optimize import least_squares

    made, low = [0], [math.inf, math.inf]
    started = time.perf_counter()

    def count_jacobian(theta: np.ndarray) -> np.ndarray:
        made[0] += 1
        return jacobian(theta)

    def record_residuals(theta: np.ndarray) -> np.ndarray:
        left = residuals(theta)
        if low[0] == math.inf and np.mean(left**2) <= LOW:
            low[:] = [time.perf_counter() - started, made[0]]
        return left

    found = least_squares(
        record_residuals, start_of(seed), count_jacobian, method="lm", max_nfev=2 * most,
        ftol=1e-15, xtol=1e-15, gtol=1e-15,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    return Way(float(np.mean(found.fun**2)), seconds, low[0], low[1], made[0])


def by_scipy(seed: int, method: str, most: int) -> Way:
    """`scipy.optimize.minimize`."""
    from scipy.optimize import minimize

    options: dict[str, Any] = {"maxiter": most, "gtol": 0.0}
    if method == "L-BFGS-B":
        options |= {"ftol": 0.0, "maxfun": 10 * most}
    started = time.perf_counter()
    found = minimize(loss_and_gradient, start_of(seed), jac=True, method=method, options=options)
    spent = time.perf_counter() - started
    return Way(float(found.fun), spent, math.nan, math.nan, int(found.nit))  # NaN: not measured


def by_torch(seed: int, most: int) -> Way:
    """`torch.optim.LBFGS` with its strong Wolfe line search."""
    import torch

    torch.set_num_threads(1)
    theta = torch.from_numpy(start_of(seed)).requires_grad_()
    x, y = torch.from_numpy(X), torch.from_numpy(Y[:, 0])
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=most, max_eval=10 * most, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=0.0, tolerance_change=0.0,
    )  # fmt: skip
    lowest = low = math.inf

    def closure() -> Any:
        nonlocal lowest, low
        optimizer.zero_grad()
        kernel, bias, last, last_bias = torch.split(theta, [UNITS, UNITS, UNITS, 1])
        loss = torch.mean((torch.tanh(x * kernel + bias) @ last + last_bias - y) ** 2)
        loss.backward()
        lowest = min(lowest, loss.item())
        if low == math.inf and lowest <= LOW:
            low = time.perf_counter() - started
        return loss

    started = time.perf_counter()
    optimizer.step(closure)
    made = optimizer.state[theta]["n_iter"]
    return Way(lowest, time.perf_counter() - started, low, math.nan, made)


# --- the parts ------------------------------------------------------------------------------


def levenberg() -> None:
    """Levenberg-Marquardt: loss, iterations and seconds."""
    ours = rows_of(
        "LevenbergMarquardt, 2,200 iterations",
        lambda seed: by_keras(seed, _levenberg_marquardt(), 2200),
    )
    lbfgs = rows_of(
        f"LBFGS, to {LOW:g}",
        lambda seed: by_keras(
            seed, gdopt.LBFGS(iterations_per_step=50, memory=50), 30_000, until_low=True
        ),
    )
    rows_of("torch, LBFGS, 9,000 iterations", lambda seed: by_torch(seed, 9000))
    minpack = rows_of('SciPy, least_squares(method="lm")', lambda seed: by_minpack(seed, 2200))
    rows_of(
        "LevenbergMarquardt in float32",
        lambda seed: by_keras(seed, _levenberg_marquardt(), 2200, "float32"),
    )
    bound("median loss", _median(ours, "loss"), 1e-8)
    ratio = _median(ours, "seconds_to_low") / _median(lbfgs, "seconds_to_low")
    bound(f"seconds to {LOW:g} against LBFGS's", ratio, 1 / 20)
    ratio = _median(ours, "iterations_to_low") / _median(minpack, "iterations_to_low")
    bound(f"iterations to {LOW:g} against MINPACK's", ratio, 2)


def iteration() -> None:
    """An iteration of Levenberg-Marquardt against the same by hand in NumPy, in turns."""
    ours, by_hand = [], []
    for seed in SEEDS:
        way = by_keras(seed, _levenberg_marquardt(), 300)
        ours.append(way.seconds / way.iterations)
        by_hand.append(levenberg_marquardt_by_hand(start_of(seed), 300))
    for name, seconds in (("LevenbergMarquardt", ours), ("by hand in NumPy", by_hand)):
        print(f"{name:40} {1e3 * statistics.median(seconds):8.3f} ms an iteration")
    bound("an iteration against NumPy's", statistics.median(ours) / statistics.median(by_hand), 3)


def bfgs() -> None:
    """Self-scaled BFGS, 3,000 iterations."""
    most = 3000

    def rows(self_scaled: bool) -> list[Way]:
        def way(seed: int) -> Way:
            optimizer = gdopt.BFGS(
                self_scaled=self_scaled,
                iterations_per_step=ITERATIONS_PER_STEP,
                gradient_tolerance=0.0,
            )
            return by_keras(seed, optimizer, most)

        return rows_of(f"BFGS(self_scaled={self_scaled}), {most:,} iterations", way)

    scaled, plain = rows(True), rows(False)
    rows_of(f"SciPy, BFGS, {most:,} iterations", lambda seed: by_scipy(seed, "BFGS", most))
    rows_of("SciPy, L-BFGS-B, 9,000 iterations", lambda seed: by_scipy(seed, "L-BFGS-B", 9000))
    bound("median loss of self-scaled BFGS", _median(scaled, "loss"), 5e-6)
    bound("... against plain BFGS's", _median(scaled, "loss") / _median(plain, "loss"), 1 / 20)


def _levenberg_marquardt() -> gdopt.LevenbergMarquardt:
    return gdopt.LevenbergMarquardt(iterations_per_step=ITERATIONS_PER_STEP, gradient_tolerance=0.0)


def rows_of(name: str, way: Callable[[int], Way]) -> list[Way]:
    """Runs from each start and prints a line."""
    ways = [way(seed) for seed in SEEDS]
    losses = sorted(w.loss for w in ways)
    line = f"{name:40} loss {losses[0]:.1e} to {losses[-1]:.1e}, median {_median(ways, 'loss'):.1e}"
    line += f"; {_median(ways, 'seconds'):.1f} s"
    if not math.isnan(ways[0].seconds_to_low):
        reached = sum(way.seconds_to_low < math.inf for way in ways)
        line += f"; {LOW:g} reached by {reached}, in {_median(ways, 'seconds_to_low'):.2f} s"
    if not math.isnan(ways[0].iterations_to_low):
        line += f" and {_median(ways, 'iterations_to_low'):.0f} iterations"
    print(line, flush=True)
    return ways


def bound(name: str, value: float, most: float) -> None:
    """Prints a value beside its bound."""
    print(f"    {name}: {value:.3g} (bound {most:g}){'' if value <= most else '  EXCEEDED'}")


def _median(ways: list[Way], name: str) -> float:
    return statistics.median(getattr(way, name) for way in ways)


PARTS = {"levenberg": levenberg, "iteration": iteration, "bfgs": bfgs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; defaults to all")
    chosen = parser.parse_args().parts or list(PARTS)
    for part in chosen:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}; expected some of {', '.join(PARTS)}")
        print(f"\n{part}: {PARTS[part].__doc__}")
        PARTS[part]()
