"""What can be wrong with a training, and how one sees it in what an optimizer records.

Each alarm is a class; `TrainingAlarms` makes all of them and shows them each recorded step and each
epoch. An alarm keeps what it must remember of earlier ones, and returns what it found.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np


class RecordedStep(NamedTuple):
    """A step that the optimizer recorded, or the state of things where it skips its steps."""

    step: int
    """The count of updates."""
    loss: float | None
    """The loss in Keras's logs, a mean over the epoch so far."""
    metrics: Mapping[str, float]
    """The optimizer's `step_metrics`."""
    layers: Mapping[str, Mapping[str, float]]
    """Its `variable_metrics`, by the variable's path, in the model's order."""
    epsilon: float = 1.2e-7
    """The machine epsilon of the weights' dtype."""
    can_skip: bool = False
    """Whether its optimizer has `skip_nonfinite`."""
    loss_scale: float | None = None
    """What Keras multiplies the loss by in `mixed_float16`."""


class Epoch(NamedTuple):
    """The end of an epoch, or of a generation."""

    number: int
    """Counted from 0."""
    step: int
    """The count of updates."""
    logs: Mapping[str, float]
    optimizer: Any
    entropy: float | None = None
    """Of the labels of a classification, in nats."""
    loss_scale: float | None = None
    """What Keras multiplies the loss by in `mixed_float16`."""


class Finding(NamedTuple):
    """What an alarm has found."""

    message: str
    """What is wrong and what to try, in a sentence or two."""
    layer: str | None = None
    """The path of the variable in which it shows first or most, if there is one."""


class Alarm:
    """Looks for one thing that is wrong; the name is what `stop_on` takes."""

    name: ClassVar[str]
    judges_line_searches: ClassVar[bool] = False
    """Whether `on_step` also judges optimizers that find the length of a step by themselves."""

    def on_step(self, seen: RecordedStep) -> Finding | None:
        """Judges a recorded step."""
        del seen
        return None

    def on_epoch(self, seen: Epoch) -> Finding | None:
        """Judges an epoch by its logs."""
        del seen
        return None


class _Streak:
    """Counts how often in a row something was so."""

    def __init__(self, needed: int) -> None:
        self._needed, self._count = needed, 0

    def reached(self, is_so: bool) -> bool:
        self._count = self._count + 1 if is_so else 0
        return self._count >= self._needed


class NonFinite(Alarm):
    """The loss, a gradient or a weight is infinite or NaN, or a step was skipped for that.

    So is `mixed_float16` that has lowered its loss scale below 1, because it skips such steps.

    The layer is the last one, in the model's order, whose gradient is not finite: gradients go from
    the loss back to the inputs, so it is where they went wrong. If no gradient is finite, that
    cannot be told, and the layer is the first one, which sees the data.
    """

    name = "nonfinite"
    judges_line_searches = True

    def on_step(self, seen: RecordedStep) -> Finding | None:
        """Judges a recorded step."""
        skipped = int(seen.metrics.get("skipped_steps", 0))
        norms = {"gradients": "grad_norm", "updates": "update_norm", "weights": "weight_norm"}
        values = {"loss": seen.loss or 0.0}
        values |= {what: seen.metrics.get(name, 0.0) for what, name in norms.items()}
        broken = [what for what, value in values.items() if not math.isfinite(value)]
        if skipped:
            return Finding(
                f"{skipped} of the steps so far were skipped, because their gradients were not "
                "finite. Weights and optimizer are unharmed; the mean of the loss over the epoch "
                "and the statistics of batch normalization are not. Look for NaN or very large "
                "numbers in the data."
            )
        if not broken:
            return None
        if seen.loss_scale is not None and "weights" not in broken:
            return _skipped_in_float16(seen.loss_scale)
        layer, is_origin = _origin(seen, "grad_norm")
        if layer is None:
            layer, is_origin = _origin(seen, "weight_norm")
        message = f"What is not finite: {', '.join(broken)}. "
        if is_origin:
            message += "The gradients of the layers after this one are finite. "
        elif layer is not None:
            message += (
                "No layer's gradient is finite, so the cause is in the data, in the loss itself "
                "(a logarithm or a quotient), or in a step before the one that was looked at: "
                "`update_freq=1` looks at each. "
            )
        message += "Look for NaN in the data, lower the learning rate or clip the gradients"
        skips = "; `skip_nonfinite=True` leaves out single bad batches" if seen.can_skip else ""
        return Finding(f"{message}{skips}.", layer)

    def on_epoch(self, seen: Epoch) -> Finding | None:
        """Judges the loss scale."""
        if seen.loss_scale is None or seen.loss_scale >= 1:
            return None
        return _skipped_in_float16(seen.loss_scale)


class ExplodingGradients(Alarm):
    """The norm of all gradients is above 1,000 times its median in the earlier recorded steps.

    At least five must have been recorded. The layer is the one with the largest gradient.
    """

    name = "exploding_gradients"
    factor: ClassVar[float] = 1000.0

    def __init__(self) -> None:
        self._norms: list[float] = []

    def on_step(self, seen: RecordedStep) -> Finding | None:
        """Judges a recorded step."""
        norm = seen.metrics.get("grad_norm", math.nan)
        earlier = self._norms
        if math.isfinite(norm):
            self._norms = [*earlier, norm][-100:]
        if len(earlier) < 5 or not math.isfinite(norm):
            return None
        usual = statistics.median(earlier)
        if not norm > self.factor * usual > 0:
            return None
        return Finding(
            f"The gradients explode: their norm is {norm:.2g}, and was usually {usual:.2g}. Clip "
            "(`global_clipnorm`), lower the learning rate, or warm it up.",
            _largest(seen, "grad_norm"),
        )


class VanishingGradients(Alarm):
    """The gradient of a layer is below a millionth of the largest one, in five steps in a row.

    Both are taken relative to the norm of the weights. The layer is the one with the smallest.
    """

    name = "vanishing_gradients"
    fraction: ClassVar[float] = 1e-6

    def __init__(self) -> None:
        self._streak = _Streak(5)

    def on_step(self, seen: RecordedStep) -> Finding | None:
        """Judges a recorded step."""
        relative = {
            path: metrics["grad_norm"] / metrics["weight_norm"]
            for path, metrics in seen.layers.items()
            if metrics.get("weight_norm", 0.0) > 0 and metrics.get("grad_norm", 0.0) > 0
        }
        if len(relative) < 2:
            return None
        layer = min(relative, key=lambda path: relative[path])
        ratio = relative[layer] / max(relative.values())
        if not self._streak.reached(ratio < self.fraction):
            return None
        return Finding(
            f"Gradients vanish: that of '{layer}' is {ratio:.1g} of the largest. Use ReLU or GELU "
            "in place of saturating activations, normalization, residual connections, or "
            "initializers that fit the activation (`he_normal`).",
            layer,
        )


class ZeroGradients(Alarm):
    """The gradient of a layer is exactly 0 in five recorded steps in a row, that of others not.

    No gradient comes to the layers before dead units, and none leaves a kernel behind them, whose
    inputs are 0. So the layer is the last one, in the model's order, of which all is 0.
    """

    name = "zero_gradients"

    def __init__(self) -> None:
        self._streaks: dict[str, _Streak] = {}

    def on_step(self, seen: RecordedStep) -> Finding | None:
        """Judges a recorded step."""
        is_zero = {}
        for path, metrics in seen.layers.items():
            streak = self._streaks.setdefault(path, _Streak(5))
            is_zero[path] = streak.reached(
                metrics.get("grad_norm") == 0.0 and seen.metrics.get("grad_norm", 0.0) > 0.0
            )
        zero = [path for path in is_zero if is_zero[path]]
        if not zero:
            return None
        partly = {_layer(path) for path in is_zero if not is_zero[path]}
        whole = [path for path in zero if _layer(path) not in partly]
        layers = list(dict.fromkeys(map(_layer, whole or zero[:1])))
        layer = next(path for path in zero if _layer(path) == layers[-1])
        which = f"The gradient of '{layers[-1]}' is 0. Its units"
        if len(layers) > 1:
            which = (
                f"The gradients from '{layers[0]}' to '{layers[-1]}' are 0. Units of one of them"
            )
        return Finding(
            f"{which} may be dead (lower the learning rate, or use LeakyReLU), or the loss does "
            "not depend on it.",
            layer,
        )


class LargeUpdates(Alarm):
    """A step changes the weights by more than a tenth of their norm, five times in a row.

    The first five recorded steps do not count.
    """

    name = "large_updates"
    ratio: ClassVar[float] = 0.1

    def __init__(self) -> None:
        self._streak, self._count = _Streak(5), 0

    def on_step(self, seen: RecordedStep) -> Finding | None:
        """Judges a recorded step."""
        self._count += 1
        update, weight = seen.metrics.get("update_norm", 0.0), seen.metrics.get("weight_norm", 0.0)
        is_large = self._count > 5 and math.isfinite(update) and update > self.ratio * weight > 0
        if not self._streak.reached(is_large):
            return None
        return Finding(
            f"Each step changes the weights by {update / weight:.0%} of their norm, where about "
            "0.1 % is healthy. Lower the learning rate.",
            _largest(seen, "update_norm"),
        )


class ConstantClipping(Alarm):
    """At least 95 % of twenty or more recorded steps were clipped."""

    name = "constant_clipping"

    def __init__(self) -> None:
        self._clipped: list[bool] = []

    def on_step(self, seen: RecordedStep) -> Finding | None:
        """Judges a recorded step."""
        clipped, norm = seen.metrics.get("clipped_grad_norm"), seen.metrics.get("grad_norm", 0.0)
        if clipped is None or not math.isfinite(norm):
            return None
        self._clipped.append(clipped < 0.99 * norm)
        share = float(np.mean(self._clipped))
        if len(self._clipped) < 20 or share < 0.95:
            return None
        return Finding(
            f"{share:.0%} of the steps are clipped, so the threshold sets the learning rate. Raise "
            f"it: gradients have a norm of {norm:.2g} before clipping and {clipped:.2g} after it."
        )


class LearningRateGone(Alarm):
    """The learning rate is below a millionth of the highest one, in ten recorded steps in a row."""

    name = "learning_rate_gone"

    def __init__(self) -> None:
        self._streak, self._highest = _Streak(10), 0.0

    def on_step(self, seen: RecordedStep) -> Finding | None:
        """Judges a recorded step."""
        rate = seen.metrics.get("learning_rate", math.nan)
        self._highest = max(self._highest, rate) if math.isfinite(rate) else self._highest
        if not self._streak.reached(rate <= 1e-6 * self._highest):
            return None
        return Finding(
            f"The learning rate has fallen to {rate:.1g}, so nothing is learned any more. Make the "
            "schedule's `decay_steps` as long as the training."
        )


class NoMovement(Alarm):
    """Ten recorded steps in a row change the weights by less than their rounding.

    Gradients and learning rate are not 0.
    """

    name = "no_movement"

    def __init__(self) -> None:
        self._streak = _Streak(10)

    def on_step(self, seen: RecordedStep) -> Finding | None:
        """Judges a recorded step."""
        update, weight, gradient, rate = (
            seen.metrics.get(name, math.nan)
            for name in ("update_norm", "weight_norm", "grad_norm", "learning_rate")
        )
        is_still = update < 0.5 * seen.epsilon * weight and gradient > 0 and rate > 0
        if not self._streak.reached(is_still):
            return None
        return Finding(
            "The weights do not move: each step is less than their rounding. Raise the learning "
            "rate, or train in float64."
        )


class Overfitting(Alarm):
    """The validation loss has risen for longer than it fell, and for at least five epochs.

    It must lie above its minimum by at least a fiftieth, and the training loss below what it was
    then.
    """

    name = "overfitting"

    def __init__(self) -> None:
        self._lowest, self._at, self._training_loss = math.inf, 0, math.inf

    def on_epoch(self, seen: Epoch) -> Finding | None:
        """Judges an epoch by its logs."""
        loss, training_loss = (seen.logs.get(name, math.nan) for name in ("val_loss", "loss"))
        if loss < self._lowest:
            self._lowest, self._at, self._training_loss = loss, seen.number, training_loss
        since = seen.number - self._at
        has_risen = loss > self._lowest + 0.02 * abs(self._lowest)
        is_learning = training_loss < self._training_loss
        if not (has_risen and is_learning and since >= 5 and since > self._at + 1):
            return None
        return Finding(
            f"The validation loss was lowest in epoch {self._at + 1} ({self._lowest:.4g}) and is "
            f"{loss:.4g} now. Stop there (`keras.callbacks.EarlyStopping(restore_best_weights="
            "True)`), or use more data, dropout or weight decay."
        )


class LossAtEntropy(Alarm):
    """A classification's loss is within 1 % of the entropy of its labels, three epochs in a row.

    That is the loss of a model that ignores its inputs.
    """

    name = "loss_at_entropy"

    def __init__(self) -> None:
        self._streak = _Streak(3)

    def on_epoch(self, seen: Epoch) -> Finding | None:
        """Judges an epoch by its logs."""
        loss, entropy = seen.logs.get("loss", math.nan), seen.entropy
        if entropy is None or not self._streak.reached(abs(loss - entropy) <= 0.01 * entropy):
            return None
        return Finding(
            f"The loss stays at {loss:.4g}, which is what a model that ignores its inputs reaches "
            f"(the entropy of the labels is {entropy:.4g}). Look whether inputs and labels belong "
            "together, whether units are dead, and try another learning rate."
        )


class ChildrenDie(Alarm):
    """In a population, no child has survived for three generations in a row."""

    name = "children_die"

    def __init__(self) -> None:
        self._streak = _Streak(3)

    def on_epoch(self, seen: Epoch) -> Finding | None:
        """Judges a generation by its logs."""
        survived = seen.logs.get("children_survived")
        if survived is None or not self._streak.reached(survived == 0):
            return None
        return Finding(
            "No child has survived for three generations, so the population only trains its "
            "members. Breed with less harm: `crossover='fitter'`, `mutation='normal'` or a lower "
            "`mutation_rate`; or let hyper-parameters evolve."
        )


class EndedByRounding(Alarm):
    """An optimizer that evaluates the loss itself was ended by the rounding of the loss."""

    name = "ended_by_rounding"

    def on_epoch(self, seen: Epoch) -> Finding | None:
        """Judges an epoch by how the optimizer's last step ended."""
        status = str(getattr(seen.optimizer, "status", ""))
        if not getattr(seen.optimizer, "converged", False) or "rounding" not in status:
            return None
        return Finding(
            f"{type(seen.optimizer).__name__} was ended by rounding: {status}. This is as low as "
            "its precision allows; if that is float32, float64 has more digits (docs/float64.md)."
        )


def _skipped_in_float16(loss_scale: float) -> Finding:
    return Finding(
        "Losses or gradients are not finite. In mixed_float16 such steps are skipped, so the "
        f"weights are unharmed, and each halves the loss scale, which is {loss_scale:.2g} now: "
        "below 1, gradients are not finite however the loss is scaled. Look for NaN or numbers "
        "above 65,504 in the data and between the layers; mixed_bfloat16 has the range of float32."
    )


def _origin(seen: RecordedStep, name: str) -> tuple[str | None, bool]:
    """The last variable with a norm that is not finite, and True.

    The first one and False, if all are so that are not 0.
    """
    norms = {path: metrics.get(name, 0.0) for path, metrics in seen.layers.items()}
    broken = [path for path, norm in norms.items() if not math.isfinite(norm)]
    if not broken:
        return None, False
    is_known = len(broken) < sum(norm != 0 for norm in norms.values())
    return (broken[-1] if is_known else broken[0]), is_known


def _layer(path: str) -> str:
    """The path of the layer that a variable belongs to."""
    return path.rpartition("/")[0]


def _largest(seen: RecordedStep, name: str) -> str | None:
    """The path of the variable with the largest metric of a name."""
    values = {path: metrics.get(name, 0.0) for path, metrics in seen.layers.items()}
    return max(values, key=lambda path: values[path]) if values else None


ALARMS: tuple[type[Alarm], ...] = tuple(Alarm.__subclasses__())
"""All alarms."""
