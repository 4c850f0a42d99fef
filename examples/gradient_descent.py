"""Vanilla, stochastic and mini-batch gradient descent on a loss of two weights.

    python examples/gradient_descent.py
    python examples/gradient_descent.py --epochs 20 --seed 1

A linear model predicts the progression of diabetes after a year from body-mass index and blood
serum s5, on 442 patients (from scikit-learn). With two weights the loss is a surface that can be
drawn. The three variants differ only in `batch_size` (Zhang 2019, section 2). One more run
lowers the learning rate of stochastic descent in every step,
ε_k = (1 - k/r) ε_0 + (k/r) ε_r (Luo 2020, section 3), so that its noise dies out.

Then the same full-batch descent runs in batches of 32, as for data that does not fit into
memory: with `gradient_accumulation_steps` an update takes the mean of the batches' gradients.
This is the full batch's gradient only if all batches have the same size. Here the last one is
smaller, and the example shows two corrections: weights for the samples, and losses that are sums.

The results are two tables and a picture.
"""

import argparse
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides most start-up messages

import keras
import numpy as np
import tensorflow as tf

import keras_gdopt as gdopt

BATCH_SIZE = 32
START = (-0.6, 1.0)
VANILLA_RATE = 0.2
STOCHASTIC_RATE = 0.02
LAST_RATE = STOCHASTIC_RATE / 100


class Data(NamedTuple):
    """Two features and the target, each with mean 0 and variance 1."""

    x: np.ndarray
    y: np.ndarray

    def loss(self, weights: np.ndarray) -> np.ndarray:
        """The mean squared error at weights of shape `(..., 2)`."""
        return np.mean((weights @ self.x.T - self.y[:, 0]) ** 2, axis=-1)

    def minimum(self) -> np.ndarray:
        """The weights of the lowest loss."""
        return np.linalg.lstsq(self.x, self.y[:, 0], rcond=None)[0]


class Variant(NamedTuple):
    """A kind of gradient descent."""

    name: str
    batch_size: int
    learning_rate: Any


class Recorder(keras.callbacks.Callback):
    """Records the weights before the first update and after each; shows a progress bar."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.path: list[np.ndarray] = []
        self._label = label

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        print(f"{self._label:34} ", end="", flush=True)
        self._bar = keras.utils.Progbar(
            self.params["epochs"], stateful_metrics=["loss"], unit_name="epoch"
        )
        self._note()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._note()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        last = epoch + 1 == self.params["epochs"]
        self._bar.update(epoch + 1, [("loss", (logs or {})["loss"])], finalize=last)

    def _note(self) -> None:
        self.path.append(self.model.get_weights()[0][:, 0])


def load() -> Data:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    both = np.column_stack([x[:, [2, 8]], y])
    both = (both - both.mean(axis=0)) / both.std(axis=0)
    return Data(both[:, :2], both[:, 2:])


def new_model() -> keras.Model:
    """Two weights, always from the same start."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([np.reshape(START, (2, 1))])
    return model


# --- three variants, and a learning rate that falls ------------------------------------


def decaying_rate(steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """ε_k = (1 - k/r) ε_0 + (k/r) ε_r for the step k, counted from 0, with r = `steps`."""
    return keras.optimizers.schedules.PolynomialDecay(
        STOCHASTIC_RATE, decay_steps=steps, end_learning_rate=LAST_RATE, power=1.0
    )


def variants(samples: int, epochs: int) -> list[Variant]:
    return [
        Variant("vanilla (full batch)", samples, VANILLA_RATE),
        Variant(f"mini-batches of {BATCH_SIZE}", BATCH_SIZE, STOCHASTIC_RATE),
        Variant("stochastic, rate decays", 1, decaying_rate(samples * epochs)),
        Variant("stochastic", 1, STOCHASTIC_RATE),
    ]


def run(variant: Variant, data: Data, epochs: int, seed: int) -> np.ndarray:
    """The path of a variant's weights, see `descend`."""
    # In a new order in each epoch; with a seed, `fit` itself would use one order for all.
    shuffled = tf.data.Dataset.from_tensor_slices(tuple(data)).shuffle(len(data.x), seed)
    optimizer = gdopt.GradientDescent(variant.learning_rate)
    return descend(variant.name, shuffled.batch(variant.batch_size), optimizer, epochs)


def descend(
    label: str, batches: tf.data.Dataset, optimizer: Any, epochs: int, loss: Any = "mse"
) -> np.ndarray:
    """The weights before the first batch and after each, of shape `(batches + 1, 2)`."""
    model = new_model()
    model.compile(optimizer, loss)
    recorder = Recorder(label)
    model.fit(batches, epochs=epochs, shuffle=False, verbose=0, callbacks=[recorder])
    return np.stack(recorder.path)


# --- the full batch, in parts ----------------------------------------------------------


def batch_count(data: Data) -> int:
    return math.ceil(len(data.x) / BATCH_SIZE)


def accumulations(data: Data, epochs: int) -> dict[str, np.ndarray]:
    """The last weights of full-batch descent in batches, with one update per epoch."""
    batches, samples = batch_count(data), len(data.x)
    parts = tf.data.Dataset.from_tensor_slices(tuple(data)).batch(BATCH_SIZE)

    def weighted(x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, ...]:
        # A batch's loss is the mean over its samples, and the update is the mean over the
        # batches. With these weights each sample counts 1/N in the update.
        size = tf.shape(x)[0]
        return x, y, tf.fill((size,), tf.cast(size, x.dtype) * batches / samples)

    # The update is the mean over the batches of sums over their samples, hence another rate.
    rate_of_sums = VANILLA_RATE * batches / samples
    sums = keras.losses.MeanSquaredError(reduction="sum")
    ways: dict[str, tuple[tf.data.Dataset, float, Any]] = {
        "means of the batches": (parts, VANILLA_RATE, "mse"),
        "weighted samples": (parts.map(weighted), VANILLA_RATE, "mse"),
        "sums": (parts, rate_of_sums, sums),
    }
    ends = {}
    for name, (batched, rate, loss) in ways.items():
        optimizer = gdopt.GradientDescent(rate, gradient_accumulation_steps=batches)
        ends[name] = descend(f"accumulated {name}", batched, optimizer, epochs, loss)[-1]
    return ends


# --- results -------------------------------------------------------------------------


def print_variants(paths: dict[str, np.ndarray], data: Data) -> None:
    lowest, minimum = data.loss(data.minimum()), data.minimum()
    print(f"\nThe lowest loss is {lowest:.6f}, at weights {np.round(minimum, 4)}.")
    print(f"\n{'gradient descent':28}{'updates':>9}{'loss above it':>16}{'distance':>11}")
    for name, path in paths.items():
        above = data.loss(path[-1]) - lowest
        distance = np.linalg.norm(path[-1] - minimum)
        print(f"{name:28}{len(path) - 1:>9,}{above:>16.2e}{distance:>11.2e}")


def print_accumulations(ends: dict[str, np.ndarray], full: np.ndarray, data: Data) -> None:
    rest = len(data.x) % BATCH_SIZE
    print(
        f"\nFull-batch descent in {batch_count(data)} batches, {BATCH_SIZE} samples each and "
        f"{rest} in the last:\n\n{'accumulated':22}{'weights differ from the full batch by':>38}"
    )
    for name, end in ends.items():
        print(f"{name:22}{np.max(np.abs(end - full)):>38.2e}")


def draw(paths: dict[str, np.ndarray], data: Data, epochs: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    minimum, lowest = data.minimum(), data.loss(data.minimum())
    figure, (surface, curves) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    ends = np.concatenate(list(paths.values()))
    low, high = ends.min(axis=0) - 0.1, ends.max(axis=0) + 0.1
    grid = np.stack(np.meshgrid(*np.linspace(low, high, 200).T), axis=-1)
    levels = lowest + np.geomspace(1e-3, data.loss(np.array(START)) - lowest, 12)
    surface.contour(
        *np.moveaxis(grid, -1, 0), data.loss(grid), levels, colors="lightgrey", linewidths=0.8
    )
    # Noisier paths are drawn further back.
    for depth, (name, weights) in enumerate(paths.items()):
        few = len(weights) < 100
        style: dict[str, Any] = {
            "marker": "o" if few else None,
            "markersize": 3,
            "linewidth": 1.5 if len(weights) < 1000 else 0.6,
            "zorder": 10 - depth,
        }
        (line,) = surface.plot(*weights.T, label=name, **style)
        end: dict[str, Any] = {"markeredgecolor": "black", "markersize": 7, "zorder": 12}
        surface.plot(*weights[-1], "o", color=line.get_color(), **end)
        curves.plot(np.linspace(0, epochs, len(weights)), data.loss(weights) - lowest, **style)
    surface.plot(*minimum, "k+", markersize=16, zorder=11)
    surface.set(xlabel="weight of the body-mass index", ylabel="weight of s5", title="paths")
    surface.legend()
    curves.set(yscale="log", xlabel="epochs", ylabel="loss above the lowest", title="losses")
    curves.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


# --- the command line ----------------------------------------------------------------


def stop(message: str) -> NoReturn:
    sys.exit(f"gradient_descent: error: {message}")


def parsed_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples")
    parser.add_argument("--logdir", type=Path, default=Path("runs"), help="for the picture")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        stop(f"--epochs must be at least 1; received {args.epochs}")
    if args.seed < 0:
        stop(f"--seed must not be negative; received {args.seed}")
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
    keras.config.set_floatx("float64")  # so that equal results can be seen
    data = load()
    print(f"diabetes: {len(data.x)} samples, 2 weights, {args.epochs} epochs")
    paths = {}
    for variant in variants(len(data.x), args.epochs):
        paths[variant.name] = run(variant, data, args.epochs, args.seed)
    ends = accumulations(data, args.epochs)
    print_variants(paths, data)
    print_accumulations(ends, next(iter(paths.values()))[-1], data)
    picture = args.logdir / "gradient_descent.png"
    draw(paths, data, args.epochs, picture)
    print(f"\nPicture: {picture}")


if __name__ == "__main__":
    main()
