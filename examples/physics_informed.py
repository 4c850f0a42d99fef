"""Solves Burgers' equation with a network: four optimizers continue from Adam's weights.

    python examples/physics_informed.py
    python examples/physics_informed.py --floatx float32 --units 32

The network u(x, t) is trained to fulfil

    u_t + u u_x = (0.01 / π) u_xx,    u(x, 0) = -sin(π x),    u(-1, t) = u(1, t) = 0

for x in [-1, 1] and t in [0, 1] (Raissi, Perdikaris and Karniadakis 2019). The loss is the sum
of the mean squares of the three residuals, on fixed points that are all used in every step. No
data is involved; the exact solution, by the Cole-Hopf transformation, only measures the error.

After the same first steps of Adam, four optimizers train for the same number of seconds: Adam
with a learning rate that falls to zero along a cosine, L-BFGS, self-scaled BFGS and
Levenberg-Marquardt. Compiling is timed separately. The results are a table and a picture.

Weights are in float64, so that rounding does not affect the comparison: near a minimum, the loss
distinguishes weights only to half of its digits. At the precision reached here,
`--floatx float32` ends at about the same error.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides most start-up messages

import keras
import numpy as np
import tensorflow as tf

import keras_gdopt as gdopt

VISCOSITY = 0.01 / math.pi
STEPS_PER_EPOCH = 50  # the error is measured after each epoch
TIMES_SHOWN = (0.25, 0.5, 1.0)
POSITIONS_SHOWN = np.linspace(-1, 1, 401)

Tensor = Any


# --- the problem ---------------------------------------------------------------------


def exact_solution(x: np.ndarray, t: np.ndarray, nodes: int = 200) -> np.ndarray:
    """The Cole-Hopf solution, with integrals by Gauss-Hermite quadrature.

    Args:
        x: Positions.
        t: Times, in the shape of `x`.
        nodes: The number of nodes of the quadrature.
    """
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    origin = x[..., None] - z * np.sqrt(4 * VISCOSITY * t[..., None])
    heat = weights * np.exp(-np.cos(math.pi * origin) / (2 * math.pi * VISCOSITY))
    return -(np.sin(math.pi * origin) * heat).sum(axis=-1) / heat.sum(axis=-1)


def spread_points(count: int) -> np.ndarray:
    """Points (x, t), spread evenly without a grid (Roberts' additive recurrence)."""
    plastic = 1.32471795724474602596
    parts = (0.5 + np.arange(1, count + 1)[:, None] / plastic ** np.arange(1, 3)) % 1
    return parts * (2, 1) - (1, 0)


def on_a_line(x: Any, t: Any) -> np.ndarray:
    """Points (x, t) with one coordinate fixed."""
    return np.stack(np.broadcast_arrays(x, t), axis=-1)


class BurgersNetwork(keras.Model):
    """A network u(x, t) whose loss measures how far it is from solving Burgers' equation."""

    def __init__(self, units: int, layers: int) -> None:
        super().__init__()
        # Biases of zero would make u(x, t) = -u(-x, -t), with the origin as a special point.
        biases = [keras.initializers.RandomUniform(-1.0, 1.0) for _ in range(layers)]
        hidden = [
            keras.layers.Dense(units, activation="tanh", bias_initializer=bias) for bias in biases
        ]
        self.network = keras.Sequential([keras.Input((2,)), *hidden, keras.layers.Dense(1)])
        at_start = on_a_line(np.linspace(-1, 1, 201), 0.0)
        at_walls = [on_a_line(wall, np.linspace(0, 1, 101)) for wall in (-1.0, 1.0)]
        self.at_start = keras.ops.convert_to_tensor(at_start, keras.config.floatx())
        self.at_walls = keras.ops.convert_to_tensor(np.concatenate(at_walls), keras.config.floatx())

    def call(self, points: Tensor) -> Tensor:
        return self.network(points)

    def residual(self, points: Tensor) -> Tensor:
        """u_t + u u_x - ν u_xx."""
        x, t = tf.split(points, 2, axis=1)
        with tf.GradientTape() as second:
            second.watch(x)
            with tf.GradientTape() as first:
                first.watch([x, t])
                u = self.network(tf.concat([x, t], axis=1))
            u_x, u_t = first.gradient(u, [x, t])
        u_xx = second.gradient(u_x, x)
        return u_t + u * u_x - VISCOSITY * u_xx

    def residuals(self, x: Tensor, **unused: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The residuals of the equation at the points `x` and of the start and wall conditions."""
        wrong_start = self.network(self.at_start) + tf.sin(math.pi * self.at_start[:, :1])
        return self.residual(x), wrong_start, self.network(self.at_walls)

    def compute_loss(
        self,
        x: Tensor = None,
        y: Tensor = None,
        y_pred: Tensor = None,
        sample_weight: Tensor = None,
        training: bool = True,
    ) -> Tensor:
        """The sum of the mean squares of all residuals."""
        del y, y_pred, sample_weight, training
        return sum(tf.reduce_mean(part**2) for part in self.residuals(x))


class Error:
    """The relative L2 error of a model's u on a grid of 201 positions and 101 times."""

    def __init__(self) -> None:
        t, x = np.meshgrid(np.linspace(0, 1, 101), np.linspace(-1, 1, 201))
        self._solution = exact_solution(x, t).ravel()
        self._points = np.stack([x.ravel(), t.ravel()], axis=1)

    def __call__(self, model: keras.Model) -> float:
        wrong = model(self._points).numpy()[:, 0] - self._solution
        return float(np.linalg.norm(wrong) / np.linalg.norm(self._solution))


# --- training ------------------------------------------------------------------------


class Recorder(keras.callbacks.Callback):
    """Records the error after each epoch, with the gradient evaluations and seconds until then.

    The first epoch compiles, so its seconds are estimated from its evaluations and the time for
    each in the second epoch. Counting continues from the recorder `before`.
    """

    def __init__(self, error: Error, before: "Recorder | None" = None) -> None:
        super().__init__()
        self._error = error
        self._before = before
        self._seconds: list[float] = []
        self._evaluations: list[int] = []
        self._errors: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._seconds.append(time.perf_counter() - self._start)
        made = self.model.optimizer.step_metrics.get("evaluations", STEPS_PER_EPOCH)
        self._evaluations.append(int(made))
        self._errors.append(self._error(self.model))

    @property
    def evaluations(self) -> np.ndarray:
        return self._going_on("evaluations", np.cumsum(self._evaluations))

    @property
    def seconds(self) -> np.ndarray:
        return self._going_on("seconds", np.cumsum(self._training_seconds()))

    @property
    def errors(self) -> np.ndarray:
        errors = np.array(self._errors)
        return errors if self._before is None else np.append(self._before.errors, errors)

    @property
    def seconds_to_compile(self) -> float:
        own = max(self._seconds[0] - self._training_seconds()[0], 0.0)
        return own if self._before is None else self._before.seconds_to_compile + own

    def _training_seconds(self) -> np.ndarray:
        seconds = np.array(self._seconds)
        if len(seconds) > 1:
            seconds[0] = seconds[1] * self._evaluations[0] / self._evaluations[1]
        return seconds

    def _going_on(self, name: str, own: np.ndarray) -> np.ndarray:
        if self._before is None:
            return own
        before = getattr(self._before, name)
        return np.append(before, before[-1] + own)


class FallingRate(keras.callbacks.Callback):
    """Lowers the learning rate along a cosine and ends training when time is up."""

    def __init__(self, recorder: Recorder, rate: float, seconds: float) -> None:
        super().__init__()
        self._recorder = recorder
        self._rate = rate
        self._seconds = seconds

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if epoch == 0:
            return  # the first epoch's seconds without compiling are known after the second
        share = min(self._recorder.seconds[-1] / self._seconds, 1.0)
        self.model.optimizer.learning_rate = 0.5 * self._rate * (1 + math.cos(math.pi * share))
        self.model.stop_training = share == 1.0


class UntilItIsTime(keras.callbacks.Callback):
    """Ends training when time is up or the optimizer cannot lower the loss any further."""

    def __init__(self, recorder: Recorder, seconds: float) -> None:
        super().__init__()
        self._recorder = recorder
        self._seconds = seconds

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        optimizer = self.model.optimizer
        if optimizer.converged or not optimizer.step_metrics["steps_made"]:
            print(f"{optimizer.name} ends: {optimizer.status}")
            self.model.stop_training = True
        elif epoch > 0:  # the first epoch's seconds without compiling are known after the second
            self.model.stop_training = self._recorder.seconds[-1] >= self._seconds


def with_adam(
    model: keras.Model,
    points: Tensor,
    recorder: Recorder,
    rate: float,
    steps: int | None = None,
    seconds: float | None = None,
) -> None:
    """Trains for a number of steps, or for a number of seconds with a falling rate."""
    # The fastest way for Adam: compiled, with all steps of an epoch in one call.
    model.compile(gdopt.Adam(rate), jit_compile=True, steps_per_execution=STEPS_PER_EPOCH)
    callbacks: list[keras.callbacks.Callback] = [recorder]
    if seconds is not None:
        callbacks.append(FallingRate(recorder, rate, seconds))
    epochs = sys.maxsize if steps is None else steps // STEPS_PER_EPOCH
    batches = tf.data.Dataset.from_tensors(points).repeat(STEPS_PER_EPOCH)
    model.fit(batches, epochs=epochs, shuffle=False, callbacks=callbacks, verbose=0)


def with_closures(
    model: keras.Model, points: Tensor, recorder: Recorder, optimizer: Any, seconds: float
) -> None:
    """Continues training with an optimizer that evaluates the loss itself."""
    model.compile(optimizer)
    if isinstance(optimizer, gdopt.LevenbergMarquardt):
        optimizer.attach(model, residuals=model.residuals)
    else:
        optimizer.attach(model)
    callbacks = [recorder, UntilItIsTime(recorder, seconds)]
    model.fit(points, batch_size=len(points), epochs=sys.maxsize, callbacks=callbacks, verbose=0)


# --- results -------------------------------------------------------------------------


class Curve(NamedTuple):
    """What the table and the picture show of a contender."""

    name: str
    recorder: Recorder
    loss: float
    u: np.ndarray
    """Its values at the positions and times shown."""


def result(name: str, model: keras.Model, points: Tensor, recorder: Recorder) -> Curve:
    loss = model.compute_loss(points)
    u = [model(on_a_line(POSITIONS_SHOWN, t)).numpy()[:, 0] for t in TIMES_SHOWN]
    return Curve(name, recorder, float(loss), np.array(u))


def print_table(curves: list[Curve]) -> None:
    print(
        f"\n{'':20}{'loss':>10}{'relative L2 error':>19}{'gradient evaluations':>22}"
        f"{'seconds':>9}{'to compile':>12}"
    )
    for curve in curves:
        recorder = curve.recorder
        print(
            f"{curve.name:20}{curve.loss:10.2e}{recorder.errors[-1]:19.2e}"
            f"{recorder.evaluations[-1]:22,}{recorder.seconds[-1]:9.1f}"
            f"{recorder.seconds_to_compile:12.1f}"
        )


def draw(curves: list[Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first, *contenders = curves
    colors = [f"C{place}" for place in range(len(contenders))]
    figure = pyplot.figure(figsize=(9, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1))[:, 0]

    axis = upper.subplots()
    for curve, color in zip(contenders, colors, strict=True):
        axis.plot(curve.recorder.seconds, curve.recorder.errors, color=color, label=curve.name)
    axis.axvline(first.recorder.seconds[-1], color="gray", linewidth=1, linestyle=":")
    axis.set(yscale="log", xlim=(0, None), xlabel="seconds, without compiling")
    axis.set_ylabel("relative L2 error of u")
    axis.grid(alpha=0.3, which="both")
    axis.legend()

    axes = lower.subplots(2, 3, sharex=True, sharey="row")
    for place, t in enumerate(TIMES_SHOWN):
        solution, wrong = axes[:, place]
        exact = exact_solution(POSITIONS_SHOWN, np.full_like(POSITIONS_SHOWN, t))
        solution.plot(POSITIONS_SHOWN, exact, color="black", linewidth=4, alpha=0.25, label="exact")
        for curve, color in zip(contenders, colors, strict=True):
            solution.plot(POSITIONS_SHOWN, curve.u[place], color=color, linestyle="--")
            wrong.plot(POSITIONS_SHOWN, np.abs(curve.u[place] - exact), color=color, linewidth=1)
        solution.set_title(f"t = {t}", fontsize="medium")
        wrong.set(xlabel="x", yscale="log", ylim=(1e-8, 3))
        solution.grid(alpha=0.3)
        wrong.grid(alpha=0.3)
    axes[0, 0].set_ylabel("u(x, t)")
    axes[0, 0].legend()
    axes[1, 0].set_ylabel("error of u")
    figure.savefig(path, dpi=100)


# --- the command line ----------------------------------------------------------------


def stop(message: str) -> NoReturn:
    sys.exit(f"physics_informed: error: {message}")


def parsed_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--units", type=int, default=20, help="of each hidden layer")
    parser.add_argument("--layers", type=int, default=4, help="hidden ones")
    parser.add_argument("--points", type=int, default=4096, help="where the residual is taken")
    parser.add_argument("--adam-steps", type=int, default=1000, help="before the race")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each contender after them")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="of Adam")
    parser.add_argument("--floatx", choices=("float64", "float32"), default="float64")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--logdir", type=Path, default=Path("runs"), help="for the picture")
    args = parser.parse_args(argv)
    for name in ("units", "layers", "points"):
        if getattr(args, name) < 1:
            stop(f"--{name} must be at least 1; received {getattr(args, name)}")
    if args.adam_steps < STEPS_PER_EPOCH:
        stop(f"--adam-steps must be at least {STEPS_PER_EPOCH}; received {args.adam_steps}")
    for name in ("learning_rate", "seconds"):
        if not getattr(args, name) > 0:
            option, value = name.replace("_", "-"), getattr(args, name)
            stop(f"--{option} must be above 0; received {value}")
    if args.seed < 0:
        stop(f"--seed must not be negative; received {args.seed}")
    if importlib.util.find_spec("matplotlib") is None:
        stop("the picture needs matplotlib: pip install 'keras-gdopt[examples]'")
    try:
        args.logdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"cannot write to --logdir {args.logdir}: {error.strerror}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parsed_arguments(argv)
    keras.config.set_floatx(args.floatx)
    keras.utils.set_random_seed(args.seed)
    model, error = BurgersNetwork(args.units, args.layers), Error()
    model.build((None, 2))
    print(
        f"Burgers' equation: {args.layers} hidden layers of {args.units} units, "
        f"{model.count_params():,} weights in {args.floatx}, {args.points:,} points"
    )

    points = tf.constant(spread_points(args.points), args.floatx)

    first = Recorder(error)
    with_adam(model, points, first, args.learning_rate, steps=args.adam_steps)
    curves = [result("Adam at first", model, points, first)]
    weights = model.get_weights()

    recorder = Recorder(error, before=first)
    seconds = first.seconds[-1] + args.seconds
    with_adam(model, points, recorder, args.learning_rate, seconds=seconds)
    curves.append(result("Adam", model, points, recorder))
    for optimizer in (
        gdopt.LBFGS(memory=50, iterations_per_step=STEPS_PER_EPOCH),
        gdopt.BFGS(iterations_per_step=STEPS_PER_EPOCH),
        gdopt.LevenbergMarquardt(iterations_per_step=STEPS_PER_EPOCH // 10),
    ):
        model.set_weights(weights)
        recorder = Recorder(error, before=first)
        with_closures(model, points, recorder, optimizer, seconds)
        curves.append(result(type(optimizer).__name__, model, points, recorder))

    print_table(curves)
    picture = args.logdir / "physics_informed.png"
    draw(curves, picture)
    print(f"\nPicture: {picture}")


if __name__ == "__main__":
    main()
