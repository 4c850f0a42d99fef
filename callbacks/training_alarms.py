"""Watches a training and says in words what is wrong with it."""

import math
import os
import warnings
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from tensorboard.plugins.text import summary_v2 as text_summary

from keras_gdopt.callbacks.alarms import ALARMS, Alarm, Epoch, Finding, RecordedStep
from keras_gdopt.callbacks.event_files import EventFiles, values_of
from keras_gdopt.callbacks.logs import number, numbers
from keras_gdopt.callbacks.optimizer_parts import loss_scale
from keras_gdopt.callbacks.recording_callback import RecordingCallback
from keras_gdopt.optimizers.arithmetic import common_dtype, machine_epsilon

NAMES = tuple(sorted(alarm.name for alarm in ALARMS))


class Raised(NamedTuple):
    """An alarm that was raised."""

    name: str
    step: int
    """The count of updates at which it was noticed."""
    layer: str | None
    """The path of the variable in which it showed first or most, if there is one."""
    message: str


class TrainingAlarms(RecordingCallback):
    """Says what is wrong with a training: what, where, since about which step, and what to try.

    Each alarm is raised once, by a warning and, with a `log_dir`, a text in TensorBoard:

    | name | raised if |
    | --- | --- |
    | `nonfinite` | the loss, a gradient or a weight is infinite or NaN, or steps are skipped |
    | `exploding_gradients` | the gradients' norm is 1,000 times what it usually was |
    | `vanishing_gradients` | a layer's gradient, relative to its weights, nearly is 0 |
    | `zero_gradients` | a layer's gradient stays exactly 0 |
    | `large_updates` | steps change the weights by more than a tenth of their norm |
    | `constant_clipping` | nearly every step is clipped |
    | `learning_rate_gone` | the rate stays below a millionth of its highest value |
    | `no_movement` | steps change the weights by less than their rounding |
    | `loss_at_entropy` | a classifier's loss is that of a model that ignores its inputs |
    | `overfitting` | the validation loss has risen for longer than it fell |
    | `ended_by_rounding` | an optimizer that evaluates the loss has reached its precision |
    | `children_die` | no child of a population has survived for three generations |

    `keras_gdopt.callbacks.alarms` has the definition of each. What needs gradients is judged in
    the recorded steps alone, and only with optimizers of this package; with others, `nonfinite`
    knows the loss and the weights, but no layer. `loss_at_entropy` needs `labels`.

    Args:
        update_freq: Batches between two recorded steps. Defaults to 20. What happens between them
            is seen by its aftermath: after a NaN all layers are NaN. To find the first such layer
            and step, run again with 1.
        labels: The labels of a classification, as integers or one-hot, for `loss_at_entropy`.
            Defaults to `None`.
        stop_on: Names of alarms that end the training. Defaults to none.
        log_dir: Where to write the texts. Defaults to `None`: nowhere.

    Raises:
        ValueError: If `update_freq` is not a positive integer, or an alarm in `stop_on` is
            unknown; before training starts, if the model is not compiled or the directory cannot
            be written.
        RuntimeError: With a backend other than TensorFlow.

    Attributes:
        raised: What was raised, a `Raised` by the alarm's name.

    Keras has `TerminateOnNaN`, which ends the training without a word about the cause.

    Example:

    >>> import keras, numpy as np
    >>> import keras_gdopt as gdopt
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(gdopt.Adam(), "mse")
    >>> alarms = gdopt.callbacks.TrainingAlarms(stop_on=["nonfinite"])
    >>> history = model.fit(np.ones((8, 3)), np.ones((8, 1)), verbose=0, callbacks=[alarms])
    >>> alarms.raised
    {}
    """

    def __init__(
        self,
        update_freq: int = 20,
        labels: Any = None,
        stop_on: Collection[str] = (),
        log_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(update_freq, tier="layers")
        unknown = [stop_on] if isinstance(stop_on, str) else sorted(set(stop_on) - set(NAMES))
        if unknown:
            raise ValueError(
                f"Argument `stop_on` must be a list of names of alarms, some of {list(NAMES)}. "
                f"Received: stop_on={stop_on!r}"
            )
        self.stop_on = frozenset(stop_on)
        self.log_dir = None if log_dir is None else os.fspath(log_dir)
        self.raised: dict[str, Raised] = {}
        self._entropy = None if labels is None else _entropy(labels)
        self._alarms: Sequence[Alarm] = ()
        self._files: EventFiles | None = None
        self._trainable: Sequence[Any] = ()
        self._epsilon = 0.0

    # --- what Keras calls ----------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Asks the model's optimizer to record, and forgets what was raised before."""
        self.raised, self._alarms = {}, [alarm() for alarm in ALARMS]
        super().on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Looks up the weights anew."""
        super().on_epoch_begin(epoch, logs)
        self._trainable = ()  # may be others than in the epoch before

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Judges the epoch."""
        self._look(logs)
        seen = Epoch(
            epoch,
            self._updates,
            numbers(logs),
            self._innermost,
            self._entropy,
            loss_scale(self.model.optimizer),
        )
        for alarm in self._alarms:
            self._raise(alarm, seen.step, alarm.on_epoch(seen))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Ends the recording and closes the event file."""
        super().on_train_end(logs)
        if self._files is not None:
            self._files.close()

    # --- the parts -----------------------------------------------------------

    def _open_files(self) -> None:
        self._files = None
        if self.log_dir is not None and self._is_chief:
            self._files = EventFiles(self.log_dir, owner=type(self).__name__)

    def _look(self, logs: dict[str, Any] | None) -> None:
        loss = number((logs or {}).get("loss"))
        if not self._trainable:  # once an epoch, as it takes as long as all alarms together
            self._trainable = self.model.trainable_variables
            self._epsilon = machine_epsilon(common_dtype(self._trainable))
        scale = loss_scale(self.model.optimizer)
        for part in self._parts:
            step, metrics = part.new_metrics(self._trainable)
            layers = {}
            if metrics and part.recording is not None:
                layers = part.recording.variable_metrics
            skipped = None if metrics else part.new_skipped_steps()
            if skipped is not None:
                metrics = {"skipped_steps": skipped}
            if metrics or (loss is not None and not math.isfinite(loss)):
                searches = part.recording is not None and part.recording.evaluates_loss
                can_skip = part.recording is not None and not searches
                seen = RecordedStep(step, loss, metrics, layers, self._epsilon, can_skip, scale)
                # Weights that are NaN explain all that comes after them.
                is_lost = not math.isfinite(metrics.get("weight_norm", 0.0))
                for alarm in self._alarms:
                    if alarm.judges_line_searches or not (searches or is_lost):
                        self._raise(alarm, step, alarm.on_step(seen))

    def _raise(self, alarm: Alarm, step: int, found: Finding | None) -> None:
        if found is None or alarm.name in self.raised:
            return
        message = f"{alarm.name}, noticed at step {step:,}"
        if found.layer is not None:
            message += f", in '{found.layer}'"
        message += f": {found.message}"
        self.raised[alarm.name] = Raised(alarm.name, step, found.layer, message)
        warnings.warn(message, stacklevel=2)
        if self._files is not None:
            summary = text_summary.text_pb(f"alarms/{alarm.name}", message)
            self._files.write(step, values_of(summary))
        if alarm.name in self.stop_on:
            self.model.stop_training = True


def _entropy(labels: Any) -> float:
    """The entropy of the labels' frequencies, in nats."""
    labels = np.asarray(labels)
    if labels.ndim > 1 and labels.shape[-1] > 1:
        frequencies = labels.reshape(-1, labels.shape[-1]).sum(axis=0).astype("float64")
    else:
        frequencies = np.unique(labels, return_counts=True)[1].astype("float64")
    p = frequencies[frequencies > 0] / frequencies.sum()
    return float(-np.sum(p * np.log(p)))
