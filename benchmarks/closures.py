"""L-BFGS beside torch's by evaluation, and beside Adam by the loss it reaches in a time.

python -m benchmarks.closures             # everything
python -m benchmarks.closures digits      # one part of the first table; `--help` lists them
"""

import math
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_gdopt as gdopt
from benchmarks.side_by_side import Contender, Work, run
from benchmarks.update_step import torch_device

ITERATIONS = 100
SECONDS = 8.0
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
Arrays = tuple[np.ndarray, np.ndarray]


def digits() -> Arrays:
    """1,797 handwritten digits of 8 x 8 pixels, from scikit-learn."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16.0).astype("float32"), y.astype("int64")


def diabetes() -> Arrays:
    """442 patients with 10 measurements each, standardized, from scikit-learn."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(axis=0)) / x.std(axis=0), ((y - y.mean()) / y.std())[:, None]
    return x.astype("float32"), y.astype("float32")


DATA: dict[str, Callable[[], Arrays]] = {"digits": digits, "diabetes": diabetes}
UNITS = {"digits": (64, 64, 10), "diabetes": (10, 32, 1)}


def keras_model(name: str, optimizer: Any) -> keras.Model:
    """A model with one hidden layer and the same weights each time."""
    keras.utils.set_random_seed(0)
    inputs, hidden, outputs = UNITS[name]
    layers = [keras.layers.Dense(hidden, activation="tanh"), keras.layers.Dense(outputs)]
    model = keras.Sequential([keras.Input((inputs,)), *layers])
    loss = "mse"
    if name == "digits":
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    return model


# --- the time of an evaluation --------------------------------------------------------------


def ours(name: str) -> Contender:
    """A training step of 100 iterations, always from the same weights."""

    def make() -> Callable[[], object]:
        optimizer = gdopt.LBFGS(iterations_per_step=ITERATIONS)
        model = keras_model(name, optimizer)
        optimizer.attach(model)
        x, y = map(tf.constant, DATA[name]())
        optimizer.build(model.trainable_variables)
        variables = [*model.trainable_variables, *optimizer.variables]
        at_start = [v.numpy() for v in variables]

        def step() -> object:
            for variable, value in zip(variables, at_start, strict=True):
                variable.assign(value)
            return model.train_on_batch(x, y)

        step()
        contender.steps = int(optimizer.step_metrics["evaluations"])
        return step

    contender = Contender("LBFGS", make)
    return contender


def of_torch(name: str) -> Contender:
    """The same iterations with torch's L-BFGS and its strong Wolfe line search."""

    def make() -> Callable[[], object]:
        import torch

        weights = [w.copy() for w in keras_model(name, "sgd").get_weights()]
        inputs, hidden, outputs = UNITS[name]
        model = torch.nn.Sequential(
            torch.nn.Linear(inputs, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, outputs)
        )
        model.to(torch_device())
        loss = torch.nn.CrossEntropyLoss() if name == "digits" else torch.nn.MSELoss()
        x, y = (torch.from_numpy(array).to(torch_device()) for array in DATA[name]())
        arrays = [torch.from_numpy(np.ascontiguousarray(w.T)) for w in weights]

        def step() -> object:
            with torch.no_grad():
                for parameter, array in zip(model.parameters(), arrays, strict=True):
                    parameter.copy_(array)
            optimizer = torch.optim.LBFGS(
                model.parameters(), max_iter=ITERATIONS, max_eval=10 * ITERATIONS, history_size=10,
                tolerance_change=0.0, line_search_fn="strong_wolfe",
            )  # fmt: skip

            def closure() -> Any:
                optimizer.zero_grad()
                value = loss(model(x), y)
                value.backward()
                return value

            optimizer.step(closure)
            return optimizer.state_dict()["state"][0]["func_evals"]

        contender.steps = int(step())  # type: ignore[call-overload]
        return step

    contender = Contender("torch.optim.LBFGS", make)
    return contender


def _by_evaluation(name: str) -> list[Work]:
    work = f"L-BFGS on {name}, {ITERATIONS} iterations, by evaluation"
    return [Work(work, [of_torch(name), ours(name)], bounds={"LBFGS": 1.0})]


# --- the loss in a time ---------------------------------------------------------------------


def loss_in_time(name: str, optimizer: Any, batch_size: int) -> tuple[float, float, float]:
    """Trains for `SECONDS` seconds.

    Returns:
        The loss on all data afterwards, the seconds of training, and the seconds of compiling
        before it.
    """
    x, y = DATA[name]()
    model = keras_model(name, optimizer)
    if hasattr(optimizer, "attach"):
        optimizer.attach(model)
    optimizer.build(model.trainable_variables)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).cache().shuffle(len(x), seed=0)
    batches = batches.batch(batch_size).prefetch(4)
    variables = [*model.variables, *optimizer.variables]
    at_start = [v.numpy() for v in variables]
    started = time.perf_counter()
    model.fit(batches, epochs=2, shuffle=False, verbose=0)
    compiled = time.perf_counter() - started
    for variable, value in zip(variables, at_start, strict=True):
        variable.assign(value)
    ends = _StopAt(time.perf_counter() + SECONDS)
    started = time.perf_counter()
    model.fit(batches, epochs=10**6, shuffle=False, verbose=0, callbacks=[ends])
    passed = time.perf_counter() - started
    return model.evaluate(x, y, batch_size=len(x), verbose=0), passed, compiled


class _StopAt(keras.callbacks.Callback):
    """Stops training at a time of `time.perf_counter`."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self._at = at

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if time.perf_counter() >= self._at:
            self.model.stop_training = True


def losses_table() -> str:
    """The best of Adam's runs, with five rates in mini-batches and full batches, and L-BFGS."""
    lines = [
        "| data | optimizer | training loss | seconds | to the first step, s |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name in DATA:
        count = len(DATA[name]()[0])
        runs = [
            (f"Adam({rate:g}), batches of {size}", gdopt.Adam(rate), size)
            for size in (32, count)
            for rate in RATES
        ]
        adams = [(label, *loss_in_time(name, adam, size)) for label, adam, size in runs]
        best = min(adams, key=lambda run: run[1] if math.isfinite(run[1]) else math.inf)
        lbfgs = gdopt.LBFGS(iterations_per_step=ITERATIONS)
        own = ("LBFGS(iterations_per_step=100)", *loss_in_time(name, lbfgs, count))
        for label, loss, seconds, compiled in (best, own):
            lines.append(f"| {name} | {label} | {loss:.3e} | {seconds:.1f} | {compiled:.1f} |")
    return "\n".join(lines)


WORKS = {name: lambda name=name: _by_evaluation(name) for name in DATA}


if __name__ == "__main__":
    run(__doc__.splitlines()[0], WORKS)
    print(f"\nThe loss in {SECONDS:g} seconds, Adam's best of {len(RATES)} rates:\n")
    print(losses_table())
