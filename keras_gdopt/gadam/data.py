"""Training data, and which of it each member sees in each step."""

import math
from collections.abc import Callable, Iterator, Sequence
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

    def epoch(
        self, generation: int, phase: Phase, epoch: int, places: Sequence[int]
    ) -> Iterator[Portion]:
        """The steps of one epoch of the members in some places of the population."""
        needed = self._full_steps * self._batch_size
        passes = max(1, math.ceil(needed / self._count))
        orders = []
        for member in places:
            draw = keys.generator(self._seed, generation, phase, member, epoch)
            orders.append(np.concatenate([draw.permutation(self._count) for _ in range(passes)]))
        order = np.stack(orders).astype("int32")
        full = order[:, :needed].reshape(len(places), self._full_steps, self._batch_size)
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

    def go_to(self, step: int) -> None:
        """Goes to a step of the stream, counted from its beginning."""
        if step != self._taken:
            self._taken, self._stream = step, None

    def epoch(
        self, generation: int, phase: Phase, epoch: int, places: Sequence[int]
    ) -> Iterator[Portion]:
        """The steps of one epoch of the members in some places of the population."""
        del generation, phase, epoch  # a stream goes on from where it is
        everyone = list(places) == list(range(self._members))
        for first in range(0, self.steps_per_epoch, self._portion):
            # Of two lengths at most, so that no more functions are compiled.
            length = min(self._portion, self.steps_per_epoch - first)
            steps = [self._next() for _ in range(length)]
            data = tf.nest.map_structure(lambda *parts: tf.stack(parts), *steps)
            if not everyone:
                data = tf.nest.map_structure(lambda p: tf.gather(p, list(places), axis=1), data)
            yield Portion(data, None, length)

    def fitness_batch(self, generation: int, phase: Phase, size: int) -> Data:
        """The batches of the next steps together, about as many samples as `size`."""
        del generation, phase
        steps = [self._next() for _ in range(self.steps_of_fitness(size))]

        def joined(*parts: Tensor) -> Tensor:
            return tf.concat([tf.reshape(part, [-1, *part.shape[2:]]) for part in parts], axis=0)

        return tf.nest.map_structure(joined, *steps)

    def steps_of_fitness(self, size: int) -> int:
        """How many steps of the stream a fitness batch of about `size` samples takes."""
        return max(1, size // (self._members * self._batch_size))

    def _next(self) -> Data:
        if self._stream is None:
            self._stream = iter(self._steps.skip(self._taken).prefetch(2))
        self._taken += 1
        return next(self._stream)


class DataArguments(NamedTuple):
    """What was said of data to `Gadam.fit`, in a form that can be sent to a worker."""

    x: Any
    y: Any = None
    sample_weight: Any = None
    class_weight: dict[int, float] | None = None
    batch_size: int | None = None
    steps_per_epoch: int | None = None
    fitness_data: Any = None
    fitness_samples: int = 1024
    epochs: int = 1
    members: int = 2
    seed: int = 0
    data_fn: Callable[[], Any] | None = None
    """Makes `x` and what belongs to it."""

    def made(self) -> "GenerationData":
        """The data itself.

        Raises:
            ValueError: See `Gadam.fit`.
        """
        x, y, sample_weight = self.x, self.y, self.sample_weight
        if self.data_fn is not None:
            if x is not None or y is not None or sample_weight is not None:
                raise ValueError(
                    "`data_fn` makes the training data. Received: `x`, `y` or `sample_weight` "
                    "in `fit`, too"
                )
            made = self.data_fn()
            parts = made if isinstance(made, tuple) else (made,)
            x, y, sample_weight = (*parts, None, None)[:3]
        if x is None:
            raise ValueError("Expected training data. Received: x=None")
        return GenerationData(
            self._training_data(x, y, sample_weight),
            fitness_data=None if self.fitness_data is None else _all_of(self.fitness_data),
            fitness_samples=self.fitness_samples,
            epochs=self.epochs,
            seed=self.seed,
        )

    def for_workers(self) -> "DataArguments":
        """The same with arrays of NumPy.

        Raises:
            ValueError: If there are datasets.
        """
        for name, value in (("x", self.x), ("fitness_data", self.fitness_data)):
            if isinstance(value, (tf.data.Dataset, keras.utils.PyDataset)):
                raise ValueError(
                    "A dataset cannot be sent to workers. Use arrays, or pass "
                    "`RayEngine(data_fn=...)` a function that makes the data in each worker. "
                    f"Received: {name}={value!r}"
                )

        def arrays(part: Any) -> Any:
            return tf.nest.map_structure(lambda a: None if a is None else np.asarray(a), part)

        return self._replace(
            x=arrays(self.x),
            y=arrays(self.y),
            sample_weight=arrays(self.sample_weight),
            fitness_data=arrays(self.fitness_data),
        )

    def _training_data(self, x: Any, y: Any, sample_weight: Any) -> ArrayData | StreamData:
        if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)):
            if y is not None or sample_weight is not None or self.batch_size is not None:
                raise ValueError(
                    "A dataset brings its own targets, sample weights and batches. Received: "
                    "`y`, `sample_weight` or `batch_size` beside a dataset"
                )
            return StreamData(
                x,
                class_weight=self.class_weight,
                steps_per_epoch=self.steps_per_epoch,
                members=self.members,
            )
        if hasattr(x, "__next__") or type(x).__module__.startswith("torch.utils"):
            raise ValueError(
                "A generator cannot be gone through again, as each generation and a resumed "
                "run must. Use arrays, a `tf.data.Dataset` (such as "
                "`tf.data.Dataset.from_generator(...)`) or a `keras.utils.PyDataset`. "
                f"Received: x={x!r}"
            )
        return ArrayData(
            x,
            y,
            sample_weight=sample_weight,
            class_weight=self.class_weight,
            batch_size=self.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            seed=self.seed,
        )


class GenerationData:
    """What members are trained on and judged by, in each phase of each generation.

    It depends on the generation, the phase and the member alone, not on what was asked
    for before.

    Args:
        data: To train on.
        fitness_data: To draw fitness batches from; `None`: from the training data.
        fitness_samples: How many samples a fitness batch has, about.
        epochs: Of a member in a generation.
        seed: Of the run.
    """

    def __init__(
        self,
        data: ArrayData | StreamData,
        *,
        fitness_data: Data | None,
        fitness_samples: int,
        epochs: int,
        seed: int,
    ) -> None:
        self._data = data
        self._fitness_data = fitness_data
        self._fitness_samples = fitness_samples
        self.epochs = epochs
        self._seed = seed
        self._latest_batch: tuple[tuple[int, Phase] | None, Data] = (None, {})

    @property
    def steps(self) -> int:
        """Of a member in a phase of training."""
        return self.epochs * self._data.steps_per_epoch

    def epoch(
        self, generation: int, phase: Phase, epoch: int, places: Sequence[int]
    ) -> Iterator[Portion]:
        """The steps of one epoch of the members in some places of the population."""
        if isinstance(self._data, StreamData):
            self._data.go_to(self._start(generation, phase) + epoch * self._data.steps_per_epoch)
        yield from self._data.epoch(generation, phase, epoch, places)

    def fitness_batch(self, generation: int, phase: Phase) -> Data:
        """What all members are judged by in a phase."""
        if self._latest_batch[0] == (generation, phase):
            return self._latest_batch[1]
        if self._fitness_data is not None:
            draw = keys.generator(self._seed, generation, phase)
            batch = drawn(self._fitness_data, self._fitness_samples, draw)
        else:
            if isinstance(self._data, StreamData):
                self._data.go_to(self._start(generation, phase))
            batch = self._data.fitness_batch(generation, phase, self._fitness_samples)
        self._latest_batch = ((generation, phase), batch)
        return batch

    def _start(self, generation: int, phase: Phase) -> int:
        """The step of the stream with which a phase begins."""
        assert isinstance(self._data, StreamData)
        of_fitness = 0
        if self._fitness_data is None:
            of_fitness = self._data.steps_of_fitness(self._fitness_samples)
        phases = {
            Phase.TRAIN_PARENTS: 0,
            Phase.FITNESS: self.steps,
            Phase.TRAIN_CHILDREN: self.steps + of_fitness,
            Phase.SURVIVAL: 2 * self.steps + of_fitness,
        }
        return generation * 2 * (self.steps + of_fitness) + phases[phase]


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
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    class_weight: dict[int, float] | None = None,
    *,
    what: str = "The training data",
) -> Data:
    """Samples as tensors, checked; an error calls them `what`.

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
            f"Received: {what[0].lower()}{what[1:]} with shapes {shapes}"
        )
    if not counts.pop():
        raise ValueError(f"{what} is empty. Expected at least one sample.")
    return _with_class_weight(data, class_weight)


def _all_of(data: Any) -> Data:
    """All samples of fitness data, in memory."""
    if isinstance(data, (tf.data.Dataset, keras.utils.PyDataset)):
        batches = list(as_dataset(data, what="`fitness_data`"))
        if not batches:
            raise ValueError("`fitness_data` is empty. Expected at least one batch.")
        return tf.nest.map_structure(lambda *parts: tf.concat(parts, axis=0), *batches)
    if not isinstance(data, (tuple, list)) or not 1 <= len(data) <= 3:
        raise ValueError(
            "`fitness_data` must be `(x, y)`, `(x, y, sample_weight)` or a dataset. Received: "
            f"{type(data).__name__}"
        )
    return in_memory(*data, what="`fitness_data`")


def as_dataset(
    dataset: Any,
    class_weight: dict[int, float] | None = None,
    *,
    what: str = "The training data",
) -> tf.data.Dataset:
    """A dataset of `Data`, from one of tuples or from a `PyDataset`; errors call it `what`."""
    if isinstance(dataset, keras.utils.PyDataset):
        dataset = _from_py_dataset(dataset, what)

    def named(*parts: Any) -> Data:
        if len(parts) == 1 and isinstance(parts[0], tuple):
            parts = parts[0]
        names = ("x", "y", "sample_weight")
        data = {n: p for n, p in zip(names, parts, strict=False) if p is not None}
        return _with_class_weight(data, class_weight)

    return dataset.map(named)


def _from_py_dataset(source: keras.utils.PyDataset, what: str) -> tf.data.Dataset:
    """Its batches, in their order."""
    count = source.num_batches
    if count is None:
        raise ValueError(
            "Expected a `PyDataset` that tells its length. Received: one without `__len__`"
        )
    if not count:
        raise ValueError(f"{what} is empty. Expected at least one batch.")
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
