"""Streams an optimizer's step metrics to TensorBoard."""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import summary as hparams_session
from tensorboard.plugins.hparams import summary_v2 as hparams_summary

from keras_gdopt.callbacks.curvature import (
    Curvature,
    check_curvature_data,
    highest_stable_learning_rate,
)
from keras_gdopt.callbacks.event_files import EventFiles, scalar, values_of, write_layout
from keras_gdopt.callbacks.histograms import histogram
from keras_gdopt.callbacks.hyperparameters import hyperparameters
from keras_gdopt.callbacks.logs import numbers
from keras_gdopt.callbacks.optimizer_parts import OptimizerPart, loss_scale, totals
from keras_gdopt.callbacks.recording_callback import RecordingCallback
from keras_gdopt.optimizers.argument_checks import checked_choice, checked_count
from keras_gdopt.optimizers.recording import TIERS, distinct_paths
from keras_gdopt.optimizers.wrapping_optimizer import chain, is_multi_optimizer


class OptimizerTensorBoard(RecordingCallback):
    r"""Writes the optimizer's metrics to TensorBoard every few batches.

    The optimizer records the metrics inside its compiled step, and only on the steps that are
    written. Each write is one event that is flushed at once, so that the event file is complete
    even if training dies. The step of everything written is `optimizer.iterations`, the count
    of updates: a second `fit` continues where the first one ended, and one that resumes from a
    checkpoint continues where that was made (events written beyond it are removed).

    | tag | meaning |
    | --- | --- |
    | `optimizer/learning_rate` | the rate of the step |
    | `optimizer/learning_rate_log10` | its log10, if it is above 0 |
    | `optimizer/grad_norm` | norm of all gradients together, before clipping |
    | `optimizer/clipped_grad_norm` | the same after clipping, if the optimizer clips |
    | `optimizer/update_norm` | norm of the change that the rule made |
    | `optimizer/weight_norm` | norm of all weights after that change |
    | `optimizer/update_ratio_log10` | log10 of update norm to weight norm; around -3 is healthy |
    | `optimizer/loss_scale` | the loss scale, in mixed float16 |
    | `optimizer/skipped_steps` | how many steps were skipped, with `skip_nonfinite=True` |

    and one tag for each of the algorithm's own metrics: `velocity_norm` (Momentum, NAG),
    `effective_learning_rate_p10`, `_p50` and `_p90` (quantiles over a sample of 512
    entries; Adagrad, RMSprop, Adadelta, Adam, Nadam, RAdam), `rho_t` and `rectification`
    (RAdam), `slow_fast_distance` and `syncs` (Lookahead); `step_length`, `evaluations` and
    `steps_made` (all that search along lines), `beta` (ConjugateGradient), `damping` and
    `inner_iterations` (Newton), `updates` and `scaling` (BFGS), `memory_pairs` (LBFGS). The
    optimizers that search along lines take one training step per batch, which is often the
    whole epoch, so use `update_freq=1` to see each step.

    `update_ratio_log10` is left out if a norm is 0 or not finite. The numbers in each epoch's
    logs are written too (`epoch_loss`, `epoch_val_loss`, ...), and so are the optimizer's
    hyper-parameters, so that the HParams tab compares the runs. A learning rate that is not a
    number is text under `learning_rate_schedule`. The Custom Scalars tab shows the logarithm of
    the learning rate, the gradient norm, the update ratio, and the losses of all runs.

    With `curvature_data`, it also measures the largest eigenvalue λ of the Hessian of the loss on
    those samples, at the start and then every `curvature_freq` batches:

    | tag | meaning |
    | --- | --- |
    | `curvature/largest_eigenvalue` | λ, also called the sharpness |
    | `curvature/learning_rate` | the rate in use |
    | `curvature/highest_stable_learning_rate` | the rate above which steps along the \
    eigenvector diverge: 2 / λ for gradient descent, 2(1 + ρ) / λ for classical momentum |

    The last one is for `GradientDescent`, `Momentum`, `NAG` and Keras's `SGD`, without their
    clipping, and where λ is above 0. Training with full batches often settles where the rate in
    use equals it (Cohen et al. 2021, *Gradient descent on neural networks typically occurs at the
    edge of stability*, arXiv 2103.00065). A measurement takes about ten products of the Hessian
    with a vector (at most 40), each the work of about three gradients of these samples, and the
    memory of as many copies of the weights. A few hundred samples are enough.

    Works with mixed precision (the optimizer inside Keras's `LossScaleOptimizer`),
    `jit_compile`, distribution strategies (only the chief writes) and `steps_per_execution`,
    where only the last recording of each execution is visible. Several of these callbacks may
    be used in one `fit`, also beside `keras.callbacks.TensorBoard`.

    With Keras's `MultiOptimizer`, each optimizer inside has its own curves:
    `optimizer/Adam/learning_rate`, `optimizer/Momentum/grad_norm`. An optimizer made with a
    `name` is called by it, the others by their class; repeated names are numbered in the order
    of `MultiOptimizer.optimizers` (`Adam`, `Adam#2`). The norms without such a name cover all
    weights together, on steps that every optimizer recorded. If a function chooses the
    optimizers, the curves of the first `fit` start after its first batch.

    If the optimizer makes no update, because a `train_step` uses another one or no weight is
    trainable, a warning says so, and the epochs' logs are drawn at the count of batches.

    If the disk fills up, writing ends with one warning and training goes on.

    Args:
        log_dir: The directory of the run, a path or a remote URL that TensorFlow
            can write to. Use one for each training run.
        update_freq: Batches between two writes. Defaults to 100.
        tier: How much to write. `"scalars"`: the above. `"layers"`: also, for each
            variable by its path, `layer_grad_norm`, `layer_update_ratio_log10` and the
            norm of each slot, such as `layer_velocity_norm`. `"histograms"`: also, after
            each epoch, histograms of the weights, the slots and the gradients of the last
            step that was written, which needs memory for another copy of the gradients.
            Defaults to `"scalars"`.
        curvature_data: The samples on which the curvature is measured, as (x, y) or
            (x, y, sample_weight). Defaults to `None`: it is not measured.
        curvature_freq: Batches between two measurements of the curvature, or `"epoch"` for one
            after each epoch. Defaults to `"epoch"`.

    Raises:
        ValueError: If `update_freq` or `curvature_freq` is not a positive integer, `tier` is
            unknown or `curvature_data` are not arrays as described; before training starts, if
            the directory cannot be written, the model is not compiled, or it cannot compute its
            loss from `curvature_data` or computes in half precision.
        RuntimeError: With a backend other than TensorFlow.

    If the optimizer records no steps, as Keras's own do not, a warning says so, and only the
    learning rate, the weight norm and the epochs' logs are written.

    Keras's `TensorBoard` writes no gradients, updates or slots.

    Example:

    >>> import tempfile
    >>> import keras
    >>> import numpy as np
    >>> import keras_gdopt as gdopt
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(gdopt.Adam(), "mse")
    >>> callback = gdopt.callbacks.OptimizerTensorBoard(tempfile.mkdtemp(), update_freq=2)
    >>> history = model.fit(np.ones((8, 3)), np.ones((8, 1)), verbose=0, callbacks=[callback])
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        update_freq: int = 100,
        tier: str = "scalars",
        curvature_data: Sequence[Any] | None = None,
        curvature_freq: int | str = "epoch",
    ) -> None:
        super().__init__(update_freq, checked_choice("tier", tier, TIERS))
        self.log_dir = os.fspath(log_dir)
        self.curvature_data = curvature_data
        if curvature_data is not None:
            check_curvature_data(curvature_data)
        self.curvature_freq = curvature_freq
        if curvature_freq != "epoch":
            self.curvature_freq = checked_count("curvature_freq", curvature_freq, minimum=1)
            if curvature_data is None:
                raise ValueError(
                    "Argument `curvature_freq` needs `curvature_data`, the samples on which the "
                    f"curvature is measured. Received: curvature_freq={curvature_freq} and "
                    "curvature_data=None"
                )
        self._curvature: Curvature | None = None
        self._files: EventFiles | None = None
        self._has_warned = False
        self._last_measurement = 0

    # --- what Keras calls ----------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Opens the event files and asks the model's optimizer to record."""
        self._has_warned, self._curvature = False, None
        super().on_train_begin(logs)

    def _open_files(self) -> None:
        self._files = None
        if self._is_chief:
            layout = _layout(self.tier, self.curvature_data is not None)
            write_layout(self.log_dir, layout, owner=type(self).__name__)
            self._files = EventFiles(self.log_dir, owner=type(self).__name__)

    def _begin_recording(self) -> None:
        """Asks the optimizers to record and writes their hyper-parameters."""
        super()._begin_recording()
        if not self._has_parts:
            return
        session = hparams_summary.hparams_pb(
            hyperparameters(self.model.optimizer), trial_id=_trial(self.log_dir)
        )
        self._write(values_of(session))
        silent = [part for part in self._parts if part.recording is None]
        if silent:
            warnings.warn(_message_about(silent), stacklevel=2)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Continues the curves of a run that was interrupted; measures the first curvature."""
        is_first = not self._has_begun
        super().on_epoch_begin(epoch, logs)
        if not is_first or self._files is None:
            return
        if self._updates:
            self._files.restart(self._updates + 1)
        if self.curvature_data is not None:
            self._curvature = Curvature(self.model, self.curvature_data)
            self._measure_curvature()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes if a multiple of `update_freq` has been passed."""
        super().on_train_batch_end(batch, logs)
        every = self.curvature_freq
        if isinstance(every, int) and self._batches // every > self._last_measurement // every:
            self._measure_curvature()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the epoch's logs and histograms."""
        values = [scalar(f"epoch_{name}", value) for name, value in numbers(logs).items()]
        if self.tier == "histograms":
            values += self._histograms()
        updates = self._updates
        # Also if no step was taken that could be written.
        skipped: list[Summary.Value] = []
        for part in self._parts:
            number = part.new_skipped_steps()
            if number is not None:
                skipped += _curves(part.prefix, {"skipped_steps": number})
        self._write(skipped, step=updates)
        if not updates and not skipped and not self._has_warned:
            self._has_warned = True
            warnings.warn(_message_about_no_update(self._innermost), stacklevel=2)
        self._write(values, step=updates or self._batches)
        if self.curvature_freq == "epoch":
            self._measure_curvature()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Writes what is left, ends the recording and closes the event files."""
        self._look(logs)
        super().on_train_end(logs)
        self._curvature = None
        if self._files is not None:
            ended = hparams_session.session_end_pb(api_pb2.STATUS_SUCCESS)
            self._write(values_of(ended))
            self._files.close()

    # --- what is written -----------------------------------------------------

    def _write(self, values: Any, *, step: int | None = None, run: str = "") -> None:
        if self._files is not None and len(values):
            self._files.write(self._updates if step is None else step, values, run=run)

    def _look(self, logs: dict[str, Any] | None = None) -> None:
        """Writes the last recorded step of each optimizer, unless it was written before."""
        if self._files is None:
            return
        trainable = self.model.trainable_variables
        found = [(part, *part.new_metrics(trainable)) for part in self._parts]
        found = [(part, step, metrics) for part, step, metrics in found if metrics]
        # One optimizer may have recorded an earlier step than another.
        for step in sorted({step for _, step, _ in found}):
            now = {part: metrics for part, at, metrics in found if at == step}
            values: list[Summary.Value] = []
            for part, metrics in now.items():
                values += _curves(part.prefix, metrics)
                if self.tier != "scalars" and part.recording is not None:
                    values += self._of_layers(part)
            is_whole = all(part in now or not part.variables for part in self._parts)
            if is_whole and self._parts[0].name:
                values += _curves("", totals(list(now.values())))
            scale = loss_scale(self.model.optimizer)
            if scale is not None:
                values.append(scalar("optimizer/loss_scale", scale))
            self._write(values, step=step)

    def _measure_curvature(self) -> None:
        if self._curvature is None:
            return
        self._last_measurement = self._batches
        eigenvalue = self._curvature.largest_eigenvalue()
        values = [scalar("curvature/largest_eigenvalue", eigenvalue)]
        if not is_multi_optimizer(self._innermost):
            rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
            values.append(scalar("curvature/learning_rate", rate))
            stable = highest_stable_learning_rate(self.model.optimizer, eigenvalue)
            if stable is not None:
                values.append(scalar("curvature/highest_stable_learning_rate", stable))
        self._write(values)

    def _of_layers(self, part: OptimizerPart) -> Iterator[Summary.Value]:
        for own_path, metrics in part.recording.variable_metrics.items():
            path = part.distinct_name(own_path, self.model.trainable_variables)
            ratio = _ratio_log10(metrics)
            if ratio is not None:
                yield scalar(f"layer_update_ratio_log10/{path}", ratio)
            for name, value in metrics.items():
                if name not in ("update_norm", "weight_norm"):
                    yield scalar(f"layer_{name}/{path}", value)

    def _histograms(self) -> Iterator[Summary.Value]:
        trainable = self.model.trainable_variables
        for path, variable in zip(distinct_paths(trainable), trainable, strict=True):
            yield from histogram(f"weights/{path}", keras.ops.convert_to_numpy(variable))
        for part in self._parts:
            if part.recording is None:
                continue
            paths = [part.distinct_name(p, trainable) for p in distinct_paths(part.variables)]
            for name, slots in part.recording.slot_variables.items():
                for path, slot in zip(paths, slots, strict=True):
                    if slot is not None:
                        yield from histogram(f"{name}/{path}", keras.ops.convert_to_numpy(slot))
            for own_path, gradient in part.new_gradients().items():
                path = part.distinct_name(own_path, trainable)
                yield from histogram(f"gradients/{path}", gradient)


def _trial(log_dir: str) -> str:
    """A run's name in the HParams tab: the last two parts of its directory."""
    return "/".join(os.path.normpath(log_dir).split(os.sep)[-2:])


def _curves(prefix: str, metrics: dict[str, float]) -> Iterator[Summary.Value]:
    """The metrics of an optimizer, with the ratio of two of them."""
    for name, value in metrics.items():
        yield scalar(f"optimizer/{prefix}{name}", value)
    rate = metrics.get("learning_rate", 0.0)
    if 0 < rate < math.inf:
        yield scalar(f"optimizer/{prefix}learning_rate_log10", math.log10(rate))
    ratio = _ratio_log10(metrics)
    if ratio is not None:
        yield scalar(f"optimizer/{prefix}update_ratio_log10", ratio)


def _ratio_log10(metrics: dict[str, float]) -> float | None:
    """log10 of update norm to weight norm, if both are finite and not 0."""
    update, weight = metrics.get("update_norm", 0.0), metrics.get("weight_norm", 0.0)
    if not (0 < update < math.inf and 0 < weight < math.inf):
        return None
    return math.log10(update) - math.log10(weight)


def _message_about(parts: list[OptimizerPart]) -> str:
    chains = [
        " around ".join(f"{type(o).__module__}.{type(o).__name__}" for o in chain(part.optimizer))
        for part in parts
    ]
    written = "learning rate, weight norm and the epochs' logs"
    if parts[0].name:
        written = "their learning rate and weight norm"
    return (
        f"{', '.join(chains)} record{'' if len(chains) > 1 else 's'} no step metrics, so "
        f"OptimizerTensorBoard writes {written} alone. For norms of gradients and updates, use "
        "an optimizer of keras_gdopt, such as keras_gdopt.Adam()."
    )


def _message_about_no_update(optimizer: Any) -> str:
    return (
        "OptimizerTensorBoard follows `model.optimizer`, which made no update in this epoch. "
        "Expected: trainable weights, and a `train_step` that uses this optimizer. The epochs' "
        "logs are written by the count of batches. Received: "
        f"{type(optimizer).__name__}, with 0 updates"
    )


def _layout(tier: str, has_curvature: bool) -> layout_pb2.Layout:
    """Charts for the Custom Scalars tab. TensorBoard merges the layouts of several runs."""

    def lines(title: str, *tags: str) -> layout_pb2.Chart:
        return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))

    charts = [
        lines("learning rate, log10", "^optimizer/(.+/)?learning_rate_log10$"),
        lines("gradient norm", "^optimizer/(.+/)?(clipped_)?grad_norm$"),
        # In words, because each run would draw the band once more.
        lines(
            "update to weight, log10 (healthy: -4 to -2)", "^optimizer/(.+/)?update_ratio_log10$"
        ),
        lines("loss", "^epoch_(val_)?loss$"),
    ]
    if tier != "scalars":
        charts += [
            lines("gradient norm by layer", "^layer_grad_norm/"),
            lines("update to weight by layer, log10", "^layer_update_ratio_log10/"),
        ]
    if has_curvature:
        charts += [
            lines("largest eigenvalue of the Hessian", "^curvature/largest_eigenvalue$"),
            lines(
                "learning rate, and where it becomes unstable",
                "^curvature/(highest_stable_)?learning_rate$",
            ),
        ]
    return layout_pb2.Layout(category=[layout_pb2.Category(title="Optimizer", chart=charts)])
