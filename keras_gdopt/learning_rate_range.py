"""The learning-rate range test: Smith 2017, section 3.3."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.optimizers.argument_checks import (
    check_tensorflow,
    checked_count,
    checked_number,
)
from keras_gdopt.optimizers.recording import RecordingOptimizer
from keras_gdopt.optimizers.wrapping_optimizer import chain, is_multi_optimizer

_WIDTH = 0.02  # of the smoothing, as a fraction of the number of rates
_MOST_RISE = 3.0  # how far the loss may rise, in units of its fall or of itself
_DECAY = 0.8  # of the moving average that tells whether the loss has exploded


class LearningRateRange(NamedTuple):
    """The loss at learning rates from low to high, see `find_learning_rate`."""

    rates: np.ndarray
    """The learning rate of each step, ascending; shape `(steps,)`."""
    losses: np.ndarray
    """The loss of each step's batch, before the step; shape `(steps,)`."""
    smoothed_losses: np.ndarray
    """The losses, each averaged with its neighbors; shape `(steps,)`."""
    suggestion: float
    """The rate at which the smoothed loss falls fastest; NaN if it never falls."""

    def plot(self, ax: Any = None) -> Any:
        """Draws the losses and the suggestion; needs Matplotlib.

        Args:
            ax: Matplotlib's axes to draw in. Defaults to `None`: new ones.

        Returns:
            The axes.
        """
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(layout="constrained").subplots()
        ax.plot(self.rates, self.losses, ".", color="tab:gray", alpha=0.5, label="loss of a batch")
        ax.plot(self.rates, self.smoothed_losses, color="tab:blue", label="smoothed")
        if math.isfinite(self.suggestion):
            label = f"suggestion: {self.suggestion:.1e}"
            ax.axvline(self.suggestion, color="tab:orange", linestyle="--", label=label)
        ax.set(xscale="log", xlabel="learning rate", ylabel="loss")
        low, high = np.min(self.smoothed_losses), self.smoothed_losses[0]
        margin = max(high - low, 0.05 * abs(high), 1e-12)
        ax.set_ylim(low - 0.2 * margin, max(high, low) + margin)
        ax.legend()
        return ax


def find_learning_rate(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    batch_size: int | None = None,
    sample_weight: Any = None,
    class_weight: dict[int, float] | None = None,
    min_learning_rate: float = 1e-7,
    max_learning_rate: float = 10.0,
    steps: int = 100,
    verbose: str | int = "auto",
) -> LearningRateRange:
    r"""Tries rising learning rates, one in each training step, and suggests one.

    $$\eta_i = \eta_{min} \left(\frac{\eta_{max}}{\eta_{min}}\right)^{i / (n - 1)},
    \qquad i = 0, \dots, n - 1$$

    It trains the compiled model for n steps, each with a higher rate, until the highest rate is
    reached or the loss explodes: is not finite, or rises to several times what it was. The
    suggestion is the rate at which the smoothed loss falls fastest,

    $$\eta^* = \text{argmin}_\eta \frac{d \bar L}{d \log \eta}$$

    which suits a constant rate, or the highest rate of a schedule. The suggestion is for the
    optimizer, batch size and model that it was found with, and differs a little from run to run.

    Afterwards the model's weights, its layers' state, its seed generators and its optimizer are
    what they were, to the last bit, also if an error or Ctrl-C ends the test. (Keras's global
    random state, and a dataset that shuffles anew in each pass, have moved on. Metrics are reset.)
    A learning rate schedule of the optimizer is set aside during the test.

    Keras has no such function.

    Args:
        model: A compiled model, whose optimizer is of this package or of Keras.
        x: Inputs, as Keras's `fit` takes them: arrays, a `tf.data.Dataset` or a
            `keras.utils.PyDataset`. Data that ends early is gone through again.
        y: Targets, for arrays.
        batch_size: As in Keras's `fit`. Use the one that you train with.
        sample_weight: As in Keras's `fit`.
        class_weight: As in Keras's `fit`.
        min_learning_rate: The first rate, above 0. Defaults to 1e-7.
        max_learning_rate: The last rate, above the first one. Defaults to 10.
        steps: The number n of rates, at least 10. Defaults to 100.
        verbose: 0 for silence, 1 for a progress bar. Defaults to `"auto"`, which is 1.

    Returns:
        The rates, the losses and the suggestion.

    Raises:
        ValueError: If the model is not compiled, its optimizer evaluates the loss itself or is a
            `MultiOptimizer`, the rates are out of range, or the first loss is not finite.
        RuntimeError: With a backend other than TensorFlow.

    Example:

    >>> import keras, numpy as np
    >>> import keras_gdopt as gdopt
    >>> x = np.linspace(-1, 1, 64, dtype="float32").reshape(64, 1)
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(gdopt.Adam(), "mse")
    >>> found = gdopt.find_learning_rate(model, x, 3 * x + 1, verbose=0)
    >>> model.optimizer.learning_rate = found.suggestion
    >>> bool(1e-3 < found.suggestion < 10)
    True

    Source: Smith 2017, *Cyclical learning rates for training neural networks* (arXiv 1506.01186),
    section 3.3. The rate of steepest descent is the usual suggestion of fastai's `lr_find`.
    """
    check_tensorflow("`find_learning_rate`")
    _check_model(model)
    steps = checked_count("steps", steps, minimum=10)
    lowest = checked_number("min_learning_rate", min_learning_rate, above=0.0)
    highest = checked_number("max_learning_rate", max_learning_rate, above=lowest)
    rates = np.geomspace(lowest, highest, steps)
    test = _RangeTest(rates, verbose=1 if verbose == "auto" else int(verbose))
    history = getattr(model, "history", None)
    data = {"x": x, "y": y, "batch_size": batch_size, "sample_weight": sample_weight}
    if not all(layer.built for layer in model._flatten_layers()):
        model.evaluate(**data, steps=1, verbose=0)  # builds it, as `fit` would in its first step
    try:
        model.fit(
            **data,
            class_weight=class_weight,
            epochs=steps,  # enough if each has a single batch
            callbacks=[test],
            verbose=0,
        )
    finally:
        test.restore()
        model.history = history
    losses = np.array(test.losses)
    if not losses.size or not math.isfinite(losses[0]):
        raise ValueError(
            "Expected a finite loss at the model's weights, to see how it changes. Look for NaN in "
            f"the data or the weights. Received: a loss of {losses[0] if losses.size else None} "
            "before the first step"
        )
    return _result(rates[: len(losses)], losses)


def _check_model(model: Any) -> None:
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise ValueError(
            "`find_learning_rate` needs a compiled model: call `model.compile(optimizer=..., "
            f"loss=...)` first. Received: model={model!r}, which is not compiled"
        )
    for each in chain(optimizer):
        if isinstance(each, RecordingOptimizer) and each.evaluates_loss:
            raise ValueError(
                f"{type(each).__name__} finds the length of each step by itself, so there is no "
                "learning rate to find. Expected an optimizer that makes steps from gradients, "
                f"such as keras_gdopt.Adam(). Received: {type(each).__name__}"
            )
        if is_multi_optimizer(each):
            raise ValueError(
                "A `MultiOptimizer` has a learning rate for each of its optimizers. Expected a "
                "model with one; find the rates one after the other, with the other layers frozen."
                f" Received: {[type(one).__name__ for one in each.optimizers]}"
            )


class _RangeTest(keras.callbacks.Callback):
    """Sets the rates, keeps the losses, and puts everything back.

    Args:
        rates: Ascending.
        verbose: 0 or 1.
    """

    def __init__(self, rates: np.ndarray, verbose: int) -> None:
        super().__init__()
        self.losses: list[float] = []
        self._rates = rates
        self._average, self._lowest = 0.0, math.inf
        self._metrics_at_first: list[tuple[tf.Variable, tf.Tensor]] | None = None
        self._restore: list[Callable[[], None]] = []
        self._bar = None
        if verbose:
            self._bar = keras.utils.Progbar(
                len(rates), stateful_metrics=["learning_rate", "loss"], unit_name="rate"
            )

    # --- what Keras calls ----------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Takes note of all that training changes; by now everything is built."""
        model = self.model
        optimizer = model.optimizer
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        kept = {id(v): v for v in (*model.variables, *optimizer.variables)}
        values = [(variable, tf.identity(variable.value)) for variable in kept.values()]

        def put_back() -> None:
            for variable, value in values:
                variable.assign(value)

        self._restore.append(put_back)
        self._set_rates_aside()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Sets the next rate."""
        self._rate.value.assign(self._rates[len(self.losses)])

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Keeps the loss of the batch, and ends the test after the last rate or an explosion."""
        loss = float((logs or {})["loss"])
        self._reset_metrics()  # so that the next loss is of one batch
        self.losses.append(loss)
        count = len(self.losses)
        if self._bar is not None:
            now = [("learning_rate", self._rates[count - 1]), ("loss", loss)]
            self._bar.update(count, now, finalize=False)
        if count == len(self._rates) or self._has_exploded(loss):
            self.model.stop_training = True

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Ends the progress bar."""
        if self._bar is not None:
            self._bar.target = len(self.losses)
            self._bar.update(len(self.losses), finalize=True)

    # --- the parts -----------------------------------------------------------

    def restore(self) -> None:
        """Puts back all that the test changed."""
        while self._restore:
            self._restore.pop()()

    def _set_rates_aside(self) -> None:
        """Makes the rate a variable, and a step of `fit` one batch."""
        model = self.model
        innermost = chain(model.optimizer)[-1]
        own, executed = innermost._learning_rate, model.steps_per_execution
        if isinstance(own, keras.Variable):
            self._rate = own  # `put_back` restores its value
            if executed == 1:
                return
        else:
            self._rate = keras.Variable(self._rates[0], trainable=False, name="learning_rate")
            innermost.learning_rate = _ValueOf(self._rate)

        def put_back() -> None:
            model.steps_per_execution = executed
            if innermost._learning_rate is not own:
                innermost.learning_rate = own
            model.train_function = None  # traced with the other rate

        model.steps_per_execution = 1
        self._restore.append(put_back)
        model.make_train_function(force=True)

    def _reset_metrics(self) -> None:
        """As the model's `reset_metrics`, which takes a sixth of a small model's step."""
        is_distributed = self.model.distribute_strategy.num_replicas_in_sync > 1
        if is_distributed or self._metrics_at_first is None:
            self.model.reset_metrics()
            variables = [variable.value for variable in self.model.metrics_variables]
            self._metrics_at_first = [(each, tf.identity(each)) for each in variables]
        else:
            for variable, value in self._metrics_at_first:
                variable.assign(value)

    def _has_exploded(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        count = len(self.losses)
        self._average = _DECAY * self._average + (1 - _DECAY) * loss
        average = self._average / (1 - _DECAY**count)
        self._lowest = min(self._lowest, average)
        fall = self.losses[0] - self._lowest
        return average > self._lowest + _MOST_RISE * max(abs(self._lowest), fall)


class _ValueOf(keras.optimizers.schedules.LearningRateSchedule):
    """The value of a variable, at each step."""

    def __init__(self, variable: keras.Variable) -> None:
        self._variable = variable

    def __call__(self, step: Any) -> Any:
        """The value."""
        del step
        return keras.ops.convert_to_tensor(self._variable)


def _result(rates: np.ndarray, losses: np.ndarray) -> LearningRateRange:
    """Smooths the losses and finds where they fall fastest."""
    finite = np.isfinite(losses)
    rates, losses = rates[finite], losses[finite]
    places = np.arange(len(losses))
    width = max(1.0, _WIDTH * len(losses))
    weights = np.exp(-0.5 * ((places[:, None] - places) / width) ** 2)
    smoothed = weights @ losses / weights.sum(axis=1)
    suggestion = math.nan
    if len(losses) > 1:
        slopes = np.gradient(smoothed, np.log(rates))
        # Behind the lowest loss, noise may fall fast, too.
        steepest = int(np.argmin(slopes[: int(np.argmin(smoothed)) + 1]))
        if slopes[steepest] < 0:
            suggestion = float(rates[steepest])
    return LearningRateRange(rates, losses, smoothed, suggestion)
