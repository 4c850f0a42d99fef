"""Stops training once it has converged: Zhang 2019, section 2.1."""

import warnings
from typing import Any

import keras
import numpy as np

from keras_gdopt.callbacks.logs import numbers
from keras_gdopt.optimizers.argument_checks import (
    checked_choice,
    checked_count,
    checked_flag,
    checked_number,
)


class ConvergenceStopping(keras.callbacks.Callback):
    r"""Stops training once it has converged.

    After epoch τ, with the monitored loss $L_\tau$ and the weights $\theta_\tau$, the
    conditions are

    $$|L_\tau - L_{\tau-1}| \le \delta_L \qquad
    \max_i |\theta_{\tau,i} - \theta_{\tau-1,i}| \le \delta_\theta$$

    With `relative=True`, the thresholds are multiplied by $\max(|L_\tau|, |L_{\tau-1}|)$ and
    $\max_i |\theta_{\tau,i}|$. With `norm="euclidean"`, $\|\cdot\|_2$ replaces both maxima over
    the entries. A third condition holds if the optimizer reports that it has `converged`, as those
    do that evaluate the loss themselves (`LBFGS` and its relatives). Training stops as soon as one
    condition has held for `patience` epochs in a row. The weights stay as they are.

    An epoch takes the place of the paper's iteration: with `batch_size=len(x)` both are one
    update. With mini-batches, `loss` is the mean over an epoch during which the weights move, and
    `converged` describes the epoch's last batch. In `Gadam.fit` an epoch is a generation, and
    the weights are the best member's. A loss that is not finite never counts as converged. The
    paper's third condition, a number of rounds, is `epochs`.

    `keras.callbacks.EarlyStopping` stops when a quantity no longer *improves*: it goes on as
    long as the loss falls by more than `min_delta`, however little that is, and stops when the
    loss rises. It does not look at weights.

    Args:
        loss_change: $\delta_L$, not negative, in units of the loss (or, with `relative`, as a
            fraction of it). Defaults to `None`: the loss is ignored.
        weight_change: $\delta_\theta$, not negative, for the change of the trainable weights
            in an epoch (or, with `relative`, as a fraction of the weights), measured by `norm`.
            Defaults to `None`: the weights are ignored. Keeps one copy of the weights in memory.
        relative: Whether both thresholds are fractions. Defaults to False.
        patience: Epochs in a row for which a condition must hold, at least 1. Defaults to 1.
        norm: How a change of the weights is measured: `"max"`, the largest change of an entry,
            which means the same for models of every size, or `"euclidean"`, the norm of all
            entries together. Defaults to `"max"`.
        monitor: The name of the loss in the epoch's logs, such as `"val_loss"` or, with Gadam,
            `"fitness"`. Defaults to `"loss"`. If an epoch logs no number under this name, a
            warning says so.
        verbose: 1 prints why training stopped. Defaults to 0.

    Raises:
        ValueError: If an argument is out of range; before training starts, if no threshold
            is given and the optimizer does not report whether it has converged.

    Attributes:
        stopped_epoch: The epoch, counted from 0, after which training stopped; `None` if it
            did not.
        reason: Why training stopped, in words; `None` if it did not.

    Example:

    >>> import keras, numpy as np
    >>> import keras_gdopt as gdopt
    >>> x = np.linspace(-1, 1, 32).reshape(32, 1)
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(gdopt.GradientDescent(0.3), "mse")
    >>> stopping = gdopt.callbacks.ConvergenceStopping(loss_change=1e-6)
    >>> history = model.fit(
    ...     x, 2 * x, batch_size=32, epochs=1000, verbose=0, callbacks=[stopping]
    ... )
    >>> stopping.stopped_epoch < 100
    True

    Source: Zhang 2019, *Gradient Descent based Optimization Algorithms for Deep Learning
    Models Training* (arXiv 1903.03614), section 2.1.
    """

    def __init__(
        self,
        loss_change: float | None = None,
        weight_change: float | None = None,
        relative: bool = False,
        patience: int = 1,
        norm: str = "max",
        monitor: str = "loss",
        verbose: int = 0,
    ) -> None:
        super().__init__()
        self.loss_change = _checked_threshold("loss_change", loss_change)
        self.weight_change = _checked_threshold("weight_change", weight_change)
        self.relative = checked_flag("relative", relative)
        self.patience = checked_count("patience", patience, minimum=1)
        self.norm = checked_choice("norm", norm, tuple(_NORMS))
        self.monitor = monitor
        self.verbose = checked_count("verbose", verbose, minimum=0)
        self.stopped_epoch: int | None = None
        self.reason: str | None = None
        self._start()

    def _start(self) -> None:
        self.stopped_epoch = self.reason = None
        self._loss: float | None = None
        self._weights: dict[int, np.ndarray] = {}  # by the variable's id
        self._held = {"loss": 0, "weights": 0, "optimizer": 0}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Copies the weights that training starts from."""
        self._start()
        if self.weight_change is not None:
            self._weights = self._copied_weights()
        elif self.loss_change is None and self._optimizer_converged() is None:
            raise ValueError(
                "ConvergenceStopping has nothing to monitor. Expected `loss_change`, "
                "`weight_change` or an optimizer with an attribute `converged`, such as "
                f"keras_gdopt.LBFGS(). Received: {getattr(self.model, 'optimizer', None)!r}"
            )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Stops training if a condition has held for long enough."""
        reasons = {
            "loss": self._loss_has_settled(logs or {}),
            "weights": self._weights_have_settled(),
            "optimizer": "the optimizer has converged" if self._optimizer_converged() else None,
        }
        for name, reason in reasons.items():
            self._held[name] = self._held[name] + 1 if reason else 0
            if self._held[name] >= self.patience and self.stopped_epoch is None:
                self.stopped_epoch, self.reason = epoch, reason
                self.model.stop_training = True

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Prints why training stopped, if `verbose` is set."""
        self._weights = {}
        if self.stopped_epoch is not None and self.verbose:
            print(f"Epoch {self.stopped_epoch + 1}: stopped, as {self.reason}")

    # --- the conditions ------------------------------------------------------

    def _loss_has_settled(self, logs: dict[str, Any]) -> str | None:
        """The reason to stop in words, or `None`."""
        if self.loss_change is None:
            return None
        available = numbers(logs)
        if self.monitor not in available:
            warnings.warn(
                f"ConvergenceStopping monitors `{self.monitor}`, which is not a number in this "
                f"epoch's logs. Available: {', '.join(available)}",
                stacklevel=2,
            )
            return None
        before, self._loss = self._loss, available[self.monitor]
        if before is None:
            return None
        change = abs(self._loss - before)
        size = max(abs(self._loss), abs(before)) if self.relative else 1.0
        return self._in_words(f"`{self.monitor}`", change, size, self.loss_change)

    def _weights_have_settled(self) -> str | None:
        """The reason to stop in words, or `None`."""
        if self.weight_change is None:
            return None
        before, self._weights = self._weights, self._copied_weights()
        if before.keys() != self._weights.keys():  # built, frozen or unfrozen in this epoch
            return None
        changes = [new - before[key] for key, new in self._weights.items()]
        measure = _NORMS[self.norm]
        size = measure(list(self._weights.values())) if self.relative else 1.0
        return self._in_words("the weights", measure(changes), size, self.weight_change)

    def _in_words(self, what: str, change: float, size: float, threshold: float) -> str | None:
        if not change <= threshold * size:  # true for NaN, too
            return None
        part = f" of {size:.3g}" if self.relative else ""
        return f"{what} changed by {change:.3g}{part} (threshold {threshold:g})"

    def _optimizer_converged(self) -> bool | None:
        """What the optimizer reports; `None` if it reports nothing."""
        return getattr(getattr(self.model, "optimizer", None), "converged", None)

    def _copied_weights(self) -> dict[int, np.ndarray]:
        variables = self.model.trainable_variables
        return {id(v): np.array(keras.ops.convert_to_numpy(v)) for v in variables}


def _largest(arrays: list[np.ndarray]) -> float:
    """The largest absolute value of all entries; NaN if any entry is NaN."""
    return float(np.max([0.0, *(np.max(np.abs(array), initial=0) for array in arrays)]))


def _length(arrays: list[np.ndarray]) -> float:
    """The Euclidean norm of all entries together; NaN if any entry is NaN."""
    return float(np.linalg.norm([np.linalg.norm(array.astype("float64")) for array in arrays]))


_NORMS = {"max": _largest, "euclidean": _length}


def _checked_threshold(name: str, value: Any) -> float | None:
    return None if value is None else checked_number(name, value)
