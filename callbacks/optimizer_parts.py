"""The optimizers that update a model's weights: one, or those inside a `MultiOptimizer`."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_gdopt.optimizers.recording import distinct_paths
from keras_gdopt.optimizers.wrapping_optimizer import (
    chain,
    is_multi_optimizer,
    recording_optimizer,
)


class OptimizerPart:
    """An optimizer that updates some or all weights of a model, and its last step.

    Args:
        optimizer: The model's optimizer, or one inside its `MultiOptimizer`.
        name: What tells it apart from the model's other optimizers; "" if it is the only one.
        whole: The `MultiOptimizer` that it is inside, if there is one.
    """

    def __init__(
        self, optimizer: keras.optimizers.Optimizer, name: str = "", whole: Any = None
    ) -> None:
        self.optimizer = optimizer
        self.name = name
        self._whole = chain(optimizer)[-1] if whole is None else whole
        self.recording = recording_optimizer(optimizer)
        """The optimizer in the chain of wrappers that records its steps, or `None`."""
        self._innermost = chain(optimizer)[-1]
        self._last_update = 0
        self._updates_of_gradients = 0
        self._skipped_steps = 0
        self._names: dict[str, str] = {}

    @property
    def prefix(self) -> str:
        """What the tags of its curves begin with, after `optimizer/`."""
        return f"{self.name}/" if self.name else ""

    @property
    def variables(self) -> list[Any]:
        """The variables that it was built for; empty before it is built."""
        optimizer = self._innermost if self.recording is None else self.recording
        return list(optimizer._trainable_variables) if optimizer.built else []

    def new_metrics(self, model_variables: Sequence[Any]) -> tuple[int, dict[str, float]]:
        """The metrics of the last recorded step, and the step at which they are drawn.

        Args:
            model_variables: The model's trainable variables.

        Returns:
            The step, in the model's count of updates, and the metrics, which are empty if
            they were returned before.
        """
        if self.recording is not None:
            metrics = dict(self.recording.step_metrics)
            update = int(metrics.pop("iterations", 0))
        else:
            update = count(self._innermost)
            metrics = {}
        if update == self._last_update:
            return count(self._whole), {}
        self._last_update = update
        self._skipped_steps = int(metrics.get("skipped_steps", 0))
        if self.recording is None:
            metrics = self._metrics_of_any(self.variables if self.name else model_variables)
        if not self.name:
            return update, metrics
        # A `MultiOptimizer` counts batches; an inner optimizer that accumulates counts updates.
        batches = self._innermost.gradient_accumulation_steps or 1
        return count(self._whole) - (count(self._innermost) - update) * batches, metrics

    def new_skipped_steps(self) -> int | None:
        """The count of skipped steps, if it has grown since it or the metrics were returned."""
        if self.recording is None:
            return None
        skipped = int(self.recording.step_metrics.get("skipped_steps", 0))
        if skipped <= self._skipped_steps:
            return None
        self._skipped_steps = skipped
        return skipped

    def new_gradients(self) -> Mapping[str, Any]:
        """The gradients of the last recorded step; empty if they were returned before."""
        if self.recording is None or self._updates_of_gradients == self._last_update:
            return {}
        self._updates_of_gradients = self._last_update
        return self.recording.recorded_gradients

    def distinct_name(self, path: str, model_variables: Sequence[Any]) -> str:
        """The model's name of a variable, found by its optimizer's name of it.

        Variables of two optimizers may have the same path.
        """
        if not self.name:
            return path
        if not self._names:
            of_model = dict(
                zip(map(id, model_variables), distinct_paths(model_variables), strict=True)
            )
            variables = self.variables
            self._names = {
                own: of_model.get(id(variable), own)
                for own, variable in zip(distinct_paths(variables), variables, strict=True)
            }
        return self._names[path]

    def _metrics_of_any(self, variables: Sequence[Any]) -> dict[str, float]:
        """The metrics that any optimizer has, even one that records nothing."""
        metrics = {}
        rate = getattr(self._innermost, "_learning_rate", None)
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            rate = rate(self._innermost._iterations - 1)  # `learning_rate` is the next step's
        else:
            rate = getattr(self._innermost, "learning_rate", None)
        if rate is not None:
            metrics["learning_rate"] = float(keras.ops.convert_to_numpy(rate))
        if variables:
            weights = [tf.cast(v.value, tf.float32) for v in variables]
            metrics["weight_norm"] = float(tf.linalg.global_norm(weights))
        return metrics


def optimizer_parts(optimizer: keras.optimizers.Optimizer) -> list[OptimizerPart]:
    """The optimizer alone, or each optimizer inside a `MultiOptimizer`.

    Empty if a function chooses those of a `MultiOptimizer` that is not built yet.
    """
    multi = chain(optimizer)[-1]
    if not is_multi_optimizer(multi):
        return [OptimizerPart(optimizer)]
    return [OptimizerPart(inner, name, multi) for name, inner in named_optimizers(multi).items()]


def start_recording(
    model: Any, parts: Sequence[OptimizerPart], every: int, tier: str, listener: Any
) -> None:
    """Asks the optimizers for every n-th step; the model's step is traced again if it must be."""
    need_trace = [
        part.recording.record_step_metrics(every, tier=tier, listener=listener)
        for part in parts
        if part.recording is not None
    ]
    if any(need_trace):
        model.make_train_function(force=True)


def stop_recording(parts: Sequence[OptimizerPart], listener: Any) -> None:
    """Ends what `start_recording` began for a listener."""
    for part in parts:
        if part.recording is not None:
            part.recording.record_step_metrics(0, listener=listener)


def named_optimizers(multi_optimizer: Any) -> dict[str, Any]:
    """The optimizers inside a `MultiOptimizer`, by names that are the same in every run.

    An optimizer that was given a name keeps it; the others are named after their class.
    Repeated names are numbered from the second one on.
    """
    optimizers: dict[str, Any] = {}
    for optimizer in multi_optimizer.optimizers:
        name, kind = optimizer.name, type(optimizer).__name__
        # Keras names an optimizer after its class, and numbers it within the process.
        if re.sub(r"_\d+$", "", name).replace("_", "").lower() == kind.lower():
            name = kind
        alike = sum(other == name or other.startswith(f"{name}#") for other in optimizers)
        optimizers[f"{name}#{alike + 1}" if alike else name] = optimizer
    return optimizers


def count(optimizer: Any) -> int:
    """The number of updates that an optimizer has made."""
    # `convert_to_numpy` would take longer.
    return int(tf.convert_to_tensor(optimizer.iterations))


def loss_scale(optimizer: keras.optimizers.Optimizer) -> float | None:
    """What a `LossScaleOptimizer` multiplies the loss by; `None` without one."""
    scales = [getattr(each, "dynamic_scale", None) for each in chain(optimizer)]
    return next((float(tf.convert_to_tensor(s)) for s in scales if s is not None), None)


def totals(of_parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The norms over all weights together, from those of the parts in the same step."""
    norms = {}
    for name in ("grad_norm", "clipped_grad_norm", "update_norm", "weight_norm"):
        if not any(name in metrics for metrics in of_parts):
            continue
        # A part that does not clip counts with its plain norm.
        plain = name.removeprefix("clipped_")
        values = [metrics.get(name, metrics.get(plain)) for metrics in of_parts]
        if None not in values:
            norms[name] = math.hypot(*values)  # type: ignore[arg-type]
    return norms
