"""Training data, and which of it each member sees in each step."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.functional import Data
from keras_gdopt.gadam import keys
from keras_gdopt.gadam.keys import Phase

Tensor = Any


class Portion(NamedTuple):
    """Steps that are made in one call.

    `data` and `order` are what an engine's `train` takes.
    """

    data: Data
    order: Tensor | None
    steps: int


class ArrayData:
    """Samples that lie in memory; each member goes through them in an order of its own.

    Args:
        x: Inputs, an array or a structure of them.
        y: Targets, likewise, or `None`.
        sample_weight: One for each sample, or `None`.
        class_weight: A weight for each class, or `None`.
        batch_size: Of training. 32 by default.
        steps_per_epoch: Batches of an epoch; by default one pass over the samples, the
            last batch of which may be smaller.
        seed: Of the run.

    Raises:
        ValueError: If there are no samples, they differ in number, or are fewer than a
            batch.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        class_weight: dict[int, float] | None = None,
        batch_size: int | None = None,
        steps_per_epoch: int | None = None,
        seed: int,
    ) -> None:
        batch_size = 32 if batch_size is None else batch_size
        self.data = in_memory(x, y, sample_weight, class_weight)
        self._count = sample_count(self.data)
        if batch_size > self._count:
            raise ValueError(
                "`batch_size` must be at most the number of samples. Received: "
                f"batch_size={batch_size} with {self._count} sample(s)"
            )
        self._batch_size = batch_size
        self._full_steps, self._rest = divmod(self._count, batch_size)
        if steps_per_epoch is not None:
            self._full_steps, self._rest = steps_per_epoch, 0
        self.steps_per_epoch = self._full_steps + bool(self._rest)
        self._seed = seed

    def epoch(self, generation: int, phase: Phase, epoch: int, members: int) -> Iterator[Portion]:
        """The steps of one epoch of all members."""
        needed = self._full_steps * self._batch_size
        passes = max(1, math.ceil(needed / self._count))
        orders = []
        for member in range(members):
            draw = keys.generator(self._seed, generation, phase, member, epoch)
            orders.append(np.concatenate([draw.permutation(self._count) for _ in range(passes)]))
        order = np.stack(orders).astype("int32")
        full = order[:, :needed].reshape(members, self._full_steps, self._batch_size)
        yield Portion(self.data, tf.constant(full.swapaxes(0, 1)), self._full_steps)
        if self._rest:
            rest = order[None, :, needed : needed + self._rest]
            yield Portion(self.data, tf.constant(rest), 1)

    def fitness_batch(self, generation: int, phase: Phase, size: int) -> Data:
        """A sample of all members' common batch, without repetition."""
        return drawn(self.data, size, keys.generator(self._seed, generation, phase))


class StreamData:
    """Batches of a `tf.data.Dataset` or a `keras.utils.PyDataset`, dealt to the members.

    The first batch goes to the first member, the next to the second, and so on; then
    comes the next step. When the data ends it begins anew, and the deal moves on, so that
    over the passes each member sees all of it. Batches are of the first one's size: the
    last of a pass, if smaller, is filled up from the next pass. Fitness batches are whole
    steps of the same stream.

    Args:
        dataset: Of `x`, `(x, y)` or `(x, y, sample_weight)`.
        class_weight: A weight for each class, or `None`.
        steps_per_epoch: Batches that each member gets in an epoch; by default as many as
            the data has.
        members: How many.
        portion: How many steps are handed to the device at a time, at most.

    Raises:
        ValueError: If the data is empty, or endless without `steps_per_epoch`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        class_weight: dict[int, float] | None = None,
        steps_per_epoch: int | None = None,
        members: int,
        portion: int = 16,
    ) -> None:
        batches = as_dataset(dataset, class_weight)
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("The training data is empty. Expected at least one batch.")
        self._batch_size = sample_count(first)
        count = int(batches.cardinality())
        if steps_per_epoch is None:
            if count < 0:
                raise ValueError(
                    "`steps_per_epoch` must be given for data that is endless or does not tell "
                    f"its length. Received: steps_per_epoch=None with {dataset!r}"
                )
            steps_per_epoch = count
        self.steps_per_epoch = steps_per_epoch
        self._portion = portion
        self._members = members
        self._steps = _dealt(batches, count, self._batch_size, members)
        self._taken = 0
        self._stream: Iterator[Data] | None = None

    def skip(self, epochs: int, fitness_batches: int, fitness_size: int) -> None:
        """Goes to where a run was that is resumed."""
        of_fitness = fitness_batches * self._steps_of_fitness(fitness_size)
        self._taken = epochs * self.steps_per_epoch + of_fitness
        self._stream = None

    def epoch(self, generation: int, phase: Phase, epoch: int, members: int) -> Iterator[Portion]:
        """The steps of one epoch of all members."""
        del generation, phase, epoch, members  # a stream goes on from where it is
        for first in range(0, self.steps_per_epoch, self._portion):
            # Of two lengths at most, so that no more functions are compiled.
            length = min(self._portion, self.steps_per_epoch - first)
            steps = [self._next() for _ in range(length)]
            data = tf.nest.map_structure(lambda *parts: tf.stack(parts), *steps)
            yield Portion(data, None, length)

    def fitness_batch(self, generation: int, phase: Phase, size: int) -> Data:
        """The batches of the next steps together, about as many samples as `size`."""
        del generation, phase
        steps = [self._next() for _ in range(self._steps_of_fitness(size))]

        def joined(*parts: Tensor) -> Tensor:
            return tf.concat([tf.reshape(part, [-1, *part.shape[2:]]) for part in parts], axis=0)

        return tf.nest.map_structure(joined, *steps)

    def _steps_of_fitness(self, size: int) -> int:
        return max(1, size // (self._members * self._batch_size))

    def _next(self) -> Data:
        if self._stream is None:
            self._stream = iter(self._steps.skip(self._taken).prefetch(2))
        self._taken += 1
        return next(self._stream)


def _dealt(batches: tf.data.Dataset, count: int, size: int, members: int) -> tf.data.Dataset:
    """Steps, each with a batch of `size` samples for each member, without end."""
    # After as many passes as make whole steps, each member would get the same batches
    # again; so the deal then begins with another member.
    together = math.lcm(max(count, 1), members) // members

    def turned(step: Tensor, batches: Data) -> Data:
        by = step // together % members
        return tf.nest.map_structure(lambda part: tf.roll(part, by, axis=0), batches)

    same_size = batches.repeat().rebatch(size, drop_remainder=True)
    return same_size.batch(members, drop_remainder=True).enumerate().map(turned)


# --- what data is made of ---------------------------------------------------------------


def in_memory(
    x: Any, y: Any = None, sample_weight: Any = None, class_weight: dict[int, float] | None = None
) -> Data:
    """Samples as tensors, checked.

    Raises:
        ValueError: If there are none, or the parts differ in their number.
    """
    parts = {"x": x, "y": y, "sample_weight": sample_weight}
    data = {
        name: tf.nest.map_structure(_as_tensor, _without_lists(part))
        for name, part in parts.items()
        if part is not None
    }
    counts = {part.shape[0] if part.shape.rank else None for part in tf.nest.flatten(data)}
    if len(counts) != 1:
        shapes = {
            name: tf.nest.map_structure(lambda p: tuple(p.shape), p) for name, p in data.items()
        }
        raise ValueError(
            "All inputs, targets and sample weights must have the same number of samples. "
            f"Received: shapes {shapes}"
        )
    if not counts.pop():
        raise ValueError("The training data is empty. Expected at least one sample.")
    return _with_class_weight(data, class_weight)


def as_dataset(dataset: Any, class_weight: dict[int, float] | None = None) -> tf.data.Dataset:
    """A dataset of `Data`, from one of tuples or from a `PyDataset`."""
    if isinstance(dataset, keras.utils.PyDataset):
        dataset = _from_py_dataset(dataset)

    def named(*parts: Any) -> Data:
        if len(parts) == 1 and isinstance(parts[0], tuple):
            parts = parts[0]
        names = ("x", "y", "sample_weight")
        data = {n: p for n, p in zip(names, parts, strict=False) if p is not None}
        return _with_class_weight(data, class_weight)

    return dataset.map(named)


def _from_py_dataset(source: keras.utils.PyDataset) -> tf.data.Dataset:
    """Its batches, in their order."""
    count = source.num_batches
    if count is None:
        raise ValueError(
            "Expected a `PyDataset` that tells its length. Received: one without `__len__`"
        )
    if not count:
        raise ValueError("The training data is empty. Expected at least one batch.")
    example = tf.nest.map_structure(_as_tensor, source[0])
    signature = tf.nest.map_structure(
        lambda part: tf.TensorSpec([None, *part.shape[1:]], part.dtype), example
    )

    def batches() -> Iterator[Any]:
        for index in range(count):
            yield source[index]

    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    return dataset.apply(tf.data.experimental.assert_cardinality(count))


def sample_count(data: Data) -> int:
    """How many samples there are."""
    return int(tf.nest.flatten(data)[0].shape[0])


def drawn(data: Data, size: int, draw: np.random.Generator) -> Data:
    """Some of the samples, without repetition; all of them where `size` is more."""
    count = sample_count(data)
    if size >= count:
        return data
    rows = tf.constant(draw.choice(count, size, replace=False).astype("int32"))
    return tf.nest.map_structure(lambda part: tf.gather(part, rows), data)


def _as_tensor(part: Any) -> tf.Tensor:
    part = tf.convert_to_tensor(part)
    # As Keras does: Python and NumPy floats become floatx.
    return tf.cast(part, keras.config.floatx()) if part.dtype == tf.float64 else part


def _without_lists(part: Any) -> Any:
    """A list of arrays as a tuple; a list of numbers as an array."""
    if isinstance(part, list):
        return tuple(part) if part and hasattr(part[0], "shape") else np.asarray(part)
    return part


def _with_class_weight(data: Data, class_weight: dict[int, float] | None) -> Data:
    if class_weight is None:
        return data
    y = data.get("y")
    if y is None or tf.nest.is_nested(y):
        raise ValueError(
            "`class_weight` needs a model with one output. Received: targets in the structure "
            f"{y!r}"
        )
    one_hot = y.shape.rank is not None and y.shape.rank > 1 and y.shape[-1] != 1
    classes = tf.argmax(y, axis=-1) if one_hot else tf.reshape(tf.cast(y, tf.int64), [-1])
    table = np.ones(max(class_weight) + 1, keras.config.floatx())
    for index, weight in class_weight.items():
        table[index] = weight
    # Classes without a weight count once, those beyond the table, too.
    weights = tf.gather(table, tf.minimum(classes, len(table) - 1))
    weights = tf.where(classes < len(table), weights, tf.ones_like(weights))
    if "sample_weight" in data:
        weights *= tf.cast(tf.reshape(data["sample_weight"], [-1]), weights.dtype)
    return {**data, "sample_weight": weights}
