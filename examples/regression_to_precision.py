"""Trains a small network to the last digits of its loss, with six optimizers.

    python examples/regression_to_precision.py
    python examples/regression_to_precision.py --units 32 --l2 0.01 --seed 1

A network with one hidden layer predicts the progression of diabetes after a year from ten
measurements, on 442 patients (from scikit-learn), all of them in every step. Adam, conjugate
gradient, Newton, L-BFGS, self-scaled BFGS and Levenberg-Marquardt start from the same weights;
Adam is shown with the best of several learning rates. The results are a table and a picture of
how far each loss is above the lowest that any optimizer found, by evaluations and by seconds.

An evaluation computes the loss and its gradient. A product of the Hessian with a vector, which
Newton's method also needs, counts as one, too. The Jacobian of Levenberg-Marquardt is not
counted, only timed. Compiling is timed separately.

Weights are in float64, and the L2 regularizer is so strong that almost every start leads to
the same minimum. With a weaker one, each optimizer finds its own minimum (see `--l2 0.001`).
"""

import argparse
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides most start-up messages

import keras
import numpy as np
import tensorflow as tf

import keras_gdopt as gdopt

GRADIENT_TOLERANCE = 1e-10
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
ADAM_STEPS_A_CALL = 100

Tensor = Any


class Contender(NamedTuple):
    """An optimizer and how the model is compiled with it."""

    name: str
    optimizer: Callable[[], keras.optimizers.Optimizer]
    compile_arguments: dict[str, Any]


def contenders() -> list[Contender]:
    precise: dict[str, Any] = {"gradient_tolerance": GRADIENT_TOLERANCE}
    # The fastest way for Adam: compiled, with many steps in one call.
    fast: dict[str, Any] = {"jit_compile": True, "steps_per_execution": ADAM_STEPS_A_CALL}
    return [
        *(
            Contender(f"Adam({rate})", functools.partial(gdopt.Adam, rate), fast)
            for rate in ADAM_RATES
        ),
        Contender(
            "ConjugateGradient",
            lambda: gdopt.ConjugateGradient(iterations_per_step=10, **precise),
            {},
        ),
        # One iteration per step, because Hessian products are counted for the last one only.
        Contender("Newton(solver='cg')", lambda: gdopt.Newton(solver="cg", **precise), {}),
        Contender("LBFGS", lambda: gdopt.LBFGS(iterations_per_step=10, **precise), {}),
        Contender("BFGS", lambda: gdopt.BFGS(iterations_per_step=10, **precise), {}),
        Contender("LevenbergMarquardt", lambda: gdopt.LevenbergMarquardt(**precise), {}),
    ]


def load() -> tuple[np.ndarray, np.ndarray]:
    """Measurements and progression, each with mean 0 and standard deviation 1."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return (x - x.mean(axis=0)) / x.std(axis=0), ((y - y.mean()) / y.std())[:, None]


def new_model(units: int, l2: float) -> keras.Model:
    """A network with one hidden layer."""
    return keras.Sequential(
        [
            keras.Input((10,)),
            keras.layers.Dense(units, "tanh", kernel_regularizer=keras.regularizers.L2(l2)),
            keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L2(l2)),
        ]
    )


# --- the race ------------------------------------------------------------------------


class Recorder(keras.callbacks.Callback):
    """Records a contender's loss after each call, with the evaluations and seconds until then.

    The first call compiles, so its seconds are estimated from its evaluations and the time for
    each in the second call. Training ends at a flat gradient, when the optimizer has converged,
    or after `most` evaluations.
    """

    def __init__(self, x: Tensor, y: Tensor, most: int) -> None:
        super().__init__()
        self._x, self._y, self._most = x, y, most
        self._seconds: list[float] = []
        self._evaluations: list[int] = []
        self.losses: list[float] = []
        self.gradient_norm = float("nan")
        self.hessian_products = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._measure = tf.function(self._loss_and_gradients)
        self._measure()  # compiles here, where it is not timed

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._seconds.append(time.perf_counter() - self._start)
        metrics = self.model.optimizer.step_metrics
        products = int(metrics.get("inner_iterations", 0))
        self.hessian_products += products
        self._evaluations.append(int(metrics.get("evaluations", ADAM_STEPS_A_CALL)) + products)
        loss, gradients = self._measure()
        self.losses.append(float(loss))
        self.gradient_norm = float(tf.linalg.global_norm(gradients))
        is_flat = max(np.abs(g).max() for g in gradients) <= GRADIENT_TOLERANCE
        converged = getattr(self.model.optimizer, "converged", False)
        is_over = sum(self._evaluations) >= self._most
        self.model.stop_training = is_flat or converged or is_over

    def _loss_and_gradients(self) -> tuple[Tensor, list[Tensor]]:
        with tf.GradientTape() as tape:
            loss = self.model.compute_loss(self._x, self._y, self.model(self._x))
        return loss, tape.gradient(loss, [v.value for v in self.model.trainable_variables])

    @property
    def evaluations(self) -> np.ndarray:
        return np.cumsum(self._evaluations)

    @property
    def seconds(self) -> np.ndarray:
        seconds = np.array(self._seconds)
        if len(seconds) > 1:
            seconds[0] = seconds[1] * self._evaluations[0] / self._evaluations[1]
        return np.cumsum(seconds)

    @property
    def seconds_to_compile(self) -> float:
        return max(self._seconds[0] - self.seconds[0], 0.0)


def race(contender: Contender, model: keras.Model, x: Tensor, y: Tensor, most: int) -> Recorder:
    """Trains a copy of the model from the same weights."""
    weights = model.get_weights()
    model = keras.models.clone_model(model)
    model.set_weights(weights)
    optimizer = contender.optimizer()
    model.compile(optimizer, "mse", **contender.compile_arguments)
    if hasattr(optimizer, "attach"):
        optimizer.attach(model)
    recorder = Recorder(x, y, most)
    all_of_it = tf.data.Dataset.from_tensors((x, y)).repeat(most)
    model.fit(all_of_it, shuffle=False, callbacks=[recorder], verbose=0)
    return recorder


def without_worse_adams(runs: dict[str, Recorder], lowest: float) -> dict[str, Recorder]:
    """Keeps only the best Adam: the lowest final loss, then the fewest evaluations."""
    adams = [name for name in runs if name.startswith("Adam")]

    def rank(name: str) -> tuple[float, int]:
        return max(runs[name].losses[-1] - lowest, 1e-14), runs[name].evaluations[-1]

    best = min(adams, key=rank)
    return {name: run for name, run in runs.items() if name == best or name not in adams}


# --- results -------------------------------------------------------------------------


def print_table(runs: dict[str, Recorder], lowest: float) -> None:
    print(
        f"\n{'':20}{'final loss':>16}{'above lowest':>14}{'gradient norm':>15}"
        f"{'evaluations':>13}{'seconds':>9}{'to compile':>12}"
    )
    for name, run in runs.items():
        print(
            f"{name:20}{run.losses[-1]:16.12f}{run.losses[-1] - lowest:14.1e}"
            f"{run.gradient_norm:15.1e}{run.evaluations[-1]:13,}{run.seconds[-1]:9.2f}"
            f"{run.seconds_to_compile:12.1f}"
        )
    for name, run in runs.items():
        if run.hessian_products:
            print(f"Hessian products among the evaluations of {name}: {run.hessian_products:,}")


def draw(runs: dict[str, Recorder], lowest: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axis, quantity in zip(axes, ("evaluations", "seconds"), strict=True):
        for name, run in runs.items():
            above = np.maximum(np.array(run.losses) - lowest, 1e-16)
            axis.plot(getattr(run, quantity), above, label=name)
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set(xlabel="evaluations", ylabel="loss above the lowest found")
    axes[1].set_xlabel("seconds, without compiling")
    axes[1].legend()
    figure.savefig(path, dpi=100)


# --- the command line ----------------------------------------------------------------


def stop(message: str) -> NoReturn:
    sys.exit(f"regression_to_precision: error: {message}")


def parsed_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--units", type=int, default=8, help="of the hidden layer")
    parser.add_argument("--l2", type=float, default=0.03, help="factor of the L2 regularizer")
    parser.add_argument("--evaluations", type=int, default=10_000, help="at most, of each")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--logdir", type=Path, default=Path("runs"), help="for the picture")
    args = parser.parse_args(argv)
    for name in ("units", "evaluations"):
        if getattr(args, name) < 1:
            stop(f"--{name} must be at least 1; received {getattr(args, name)}")
    for name in ("l2", "seed"):
        if not getattr(args, name) >= 0:
            stop(f"--{name} must not be negative; received {getattr(args, name)}")
    for package in ("matplotlib", "sklearn"):
        if importlib.util.find_spec(package) is None:
            stop(f"needs the package {package}: pip install 'keras-gdopt[examples]'")
    try:
        args.logdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"cannot write to --logdir {args.logdir}: {error.strerror}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parsed_arguments(argv)
    keras.config.set_floatx("float64")
    keras.utils.set_random_seed(args.seed)
    x, y = (tf.constant(part) for part in load())
    model = new_model(args.units, args.l2)
    print(f"diabetes: {len(x)} samples, all in every step, {model.count_params():,} weights")
    runs = {}
    for contender in contenders():
        runs[contender.name] = run = race(contender, model, x, y, args.evaluations)
        print(f"{contender.name}: loss {run.losses[-1]:.16f}", flush=True)
    lowest = min(min(run.losses) for run in runs.values())
    runs = without_worse_adams(runs, lowest)
    print_table(runs, lowest)
    picture = args.logdir / "regression_to_precision.png"
    draw(runs, lowest, picture)
    print(f"\nPicture: {picture}")


if __name__ == "__main__":
    main()
