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
from keras_gdopt.gadam.samples import (
    all_of,
    are_alike,
    as_dataset,
    check_counts,
    check_is_no_generator,
    concatenate,
    count_batches,
    cut_to_size,
    drawn,
    drawn_batches,
    in_memory,
    is_endless,
    sample_count,
    stack_batches,
    take_rows,
    tells_its_shapes,
)
from keras_gdopt.tensor import Tensor

# Steps that are handed to the device at a time, at most.
_PORTION = 16


class Portion(NamedTuple):
    """Steps that are made in one call.

    `data` and `order` are what an engine's `train` takes. Where batches differ in shape or are
    ragged, `data` has a list for each step, with a batch for each member, as `train_apart` takes.
    """

    data: Data | list[list[Data]]
    order: Tensor | None
    steps: int


class ArrayData:
    """Samples that lie in memory; each member goes through them in an order of its own.

    Args:
        x: Inputs, an array or a structure of them.
        y: Targets, likewise, or `None`.
        sample_weight: One for each sample, or `None`.
        class_weight: A weight for each class, or `None`.
        batch_size: Of training. 32 by default; where there are fewer samples, all of them.
        steps_per_epoch: Batches of an epoch; by default one pass over the samples, the
            last batch of which may be smaller.
        fixed_batch_size: The only number of samples that the model takes, or `None`.
        seed: Of the run.

    Raises:
        ValueError: If there are no samples, they differ in number, or some batch has
            another size than the model takes.
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
        fixed_batch_size: int | None = None,
        seed: int,
    ) -> None:
        self.data = in_memory(x, y, sample_weight, class_weight)
        self._alike = are_alike([self.data])
        self._count = sample_count(self.data)
        batch_size = min(32 if batch_size is None else batch_size, self._count)
        self._batch_size = batch_size
        self._full_steps, self._rest = divmod(self._count, batch_size)
        if steps_per_epoch is not None:
            self._full_steps, self._rest = steps_per_epoch, 0
        _check_batch_size(batch_size, self._rest, fixed_batch_size)
        self.steps_per_epoch = self._full_steps + bool(self._rest)
        self._seed = seed

    def first_batch(self) -> Data | list[Data]:
        """A batch from the beginning; in a list where batches differ in shape."""
        batch = take_rows(self.data, np.arange(self._batch_size))
        return batch if self._alike else [batch]

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
        if not self._alike:
            yield from self._apart(order)
            return
        full = order[:, :needed].reshape(len(places), self._full_steps, self._batch_size)
        yield Portion(self.data, tf.constant(full.swapaxes(0, 1)), self._full_steps)
        if self._rest:
            rest = order[None, :, needed : needed + self._rest]
            yield Portion(self.data, tf.constant(rest), 1)

    def fitness_batch(self, generation: int, phase: Phase, size: int) -> Data:
        """A sample of all members' common batch, without repetition."""
        return drawn(self.data, size, keys.generator(self._seed, generation, phase))

    def _apart(self, order: np.ndarray) -> Iterator[Portion]:
        """The steps of an epoch of ragged samples, in orders of shape `(members, samples)`."""
        size, end = self._batch_size, self._full_steps * self._batch_size + self._rest
        for first in range(0, self.steps_per_epoch, _PORTION):
            last = min(first + _PORTION, self.steps_per_epoch)
            steps = [
                [take_rows(self.data, row[at : min(at + size, end)]) for row in order]
                for at in range(first * size, last * size, size)
            ]
            yield Portion(steps, None, last - first)


class StreamData:
    """Batches of a `tf.data.Dataset` or a `keras.utils.PyDataset`, dealt to the members.

    The first batch goes to the first member, the next to the second, and so on; then
    comes the next step. When the data ends it begins anew, and the deal moves on, so that
    over the passes each member sees all of it. Batches are of the first one's size: the
    last of a pass, if smaller, is filled up from the next pass. Fitness batches are whole
    steps of the same stream.

    Where the dataset does not tell the shapes of samples, as after `padded_batch`, and where it is
    ragged or sparse, batches are dealt as they are.

    Args:
        dataset: Of `x`, `(x, y)` or `(x, y, sample_weight)`.
        class_weight: A weight for each class, or `None`.
        steps_per_epoch: Batches that each member gets in an epoch; by default as many as
            the data has, which are counted where it does not tell.
        fixed_batch_size: The only number of samples that the model takes, or `None`.
        members: How many.
        portion: How many steps are handed to the device at a time, at most.

    Raises:
        ValueError: If the data is empty, or endless without `steps_per_epoch`, or its batches
            have another size than the model takes.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        class_weight: dict[int, float] | None = None,
        steps_per_epoch: int | None = None,
        fixed_batch_size: int | None = None,
        members: int,
        portion: int = _PORTION,
    ) -> None:
        batches = as_dataset(dataset, class_weight)
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("The training data is empty. Expected at least one batch.")
        check_counts(first)
        self._batch_size = sample_count(first)
        _check_batch_size(self._batch_size, 0, fixed_batch_size)
        count = int(batches.cardinality())
        if steps_per_epoch is None:
            if is_endless(dataset):
                raise ValueError(
                    "`steps_per_epoch` must be given for data that is endless. Received: "
                    f"steps_per_epoch=None with {dataset!r}"
                )
            if count < 0:
                count = count_batches(batches)
            steps_per_epoch = count
        self.steps_per_epoch = steps_per_epoch
        self._portion = portion
        self._members = members
        self._fixed_batch_size = fixed_batch_size
        # After as many passes as make whole steps, each member would get the same batches
        # again; so the deal then begins with another member.
        self._together = math.lcm(max(count, 1), members) // members
        self._as_they_are = not tells_its_shapes(batches)
        if self._as_they_are:
            self._steps = batches.repeat()
        else:
            same_size = batches.repeat().rebatch(self._batch_size, drop_remainder=True)
            self._steps = same_size.batch(members, drop_remainder=True)
        self._taken = 0
        self._stream: Iterator[Data] | None = None
        self._first = first

    def first_batch(self) -> Data | list[Data]:
        """A batch from the beginning, see `ArrayData.first_batch`; the stream stays where it is."""
        return [self._first] if self._as_they_are else self._first

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
            if self._as_they_are:
                if not are_alike([batch for batches in steps for batch in batches]):
                    chosen = [[batches[place] for place in places] for batches in steps]
                    yield Portion(chosen, None, length)
                    continue
                steps = [stack_batches(batches) for batches in steps]
            data = stack_batches(steps)
            if not everyone:
                data = tf.nest.map_structure(lambda p: tf.gather(p, list(places), axis=1), data)
            yield Portion(data, None, length)

    def fitness_batch(self, generation: int, phase: Phase, size: int) -> Data | list[Data]:
        """The batches of the next steps together, about as many samples as `size`.

        Batches that differ in shape come as a list.
        """
        del generation, phase
        steps = [self._next() for _ in range(self.steps_of_fitness(size))]
        if self._as_they_are:
            return concatenate([batch for batches in steps for batch in batches])

        def joined(*parts: Tensor) -> Tensor:
            return tf.concat([tf.reshape(part, [-1, *part.shape[2:]]) for part in parts], axis=0)

        return tf.nest.map_structure(joined, *steps)

    def steps_of_fitness(self, size: int) -> int:
        """How many steps of the stream a fitness batch of about `size` samples takes."""
        return max(1, size // (self._members * self._batch_size))

    def _next(self) -> Any:
        """The next step: batches with an axis for the members, or a list of them."""
        if self._stream is None:
            taken = self._taken * (self._members if self._as_they_are else 1)
            self._stream = iter(self._steps.skip(taken).prefetch(2))
        turned = self._taken // self._together % self._members
        self._taken += 1
        if self._as_they_are:
            batches = [next(self._stream) for _ in range(self._members)]
            for batch in batches:
                _check_batch_size(sample_count(batch), 0, self._fixed_batch_size)
            return [batches[place - turned] for place in range(self._members)]
        step = next(self._stream)
        if not turned:
            return step
        return tf.nest.map_structure(lambda part: tf.roll(part, turned, axis=0), step)


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
    fixed_batch_size: int | None = None
    """The only number of samples that the model takes."""

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
            fitness_data=None if self.fitness_data is None else all_of(self.fitness_data),
            fitness_samples=self.fitness_samples,
            epochs=self.epochs,
            fixed_batch_size=self.fixed_batch_size,
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
            return tf.nest.map_structure(
                lambda a: a if a is None or isinstance(a, tf.RaggedTensor) else np.asarray(a), part
            )

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
                fixed_batch_size=self.fixed_batch_size,
                members=self.members,
            )
        check_is_no_generator("x", x)
        return ArrayData(
            x,
            y,
            sample_weight=sample_weight,
            class_weight=self.class_weight,
            batch_size=self.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            fixed_batch_size=self.fixed_batch_size,
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
        fixed_batch_size: The only number of samples that the model takes, or `None`.
        seed: Of the run.
    """

    def __init__(
        self,
        data: ArrayData | StreamData,
        *,
        fitness_data: Data | list[Data] | None,
        fitness_samples: int,
        epochs: int,
        fixed_batch_size: int | None = None,
        seed: int,
    ) -> None:
        self._data = data
        self._fitness_data = fitness_data
        self._fitness_samples = fitness_samples
        self.epochs = epochs
        self._fixed_batch_size = fixed_batch_size
        self._seed = seed
        self._latest_batch: tuple[tuple[int, Phase] | None, Data | list[Data]] = (None, {})

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

    def first_batch(self) -> Data | list[Data]:
        """A batch of the shapes that members are judged by; a list where they differ."""
        batch: Data | list[Data]
        if self._fitness_data is None:
            batch = self._data.first_batch()
        elif isinstance(self._fitness_data, list):
            batch = self._fitness_data
        else:
            count = min(sample_count(self._fitness_data), self._fitness_samples)
            batch = take_rows(self._fitness_data, np.arange(count))
        return (
            batch if self._fixed_batch_size is None else cut_to_size(batch, self._fixed_batch_size)
        )

    def fitness_batch(self, generation: int, phase: Phase) -> Data | list[Data]:
        """What all members are judged by in a phase; a list where batches differ in shape."""
        if self._latest_batch[0] == (generation, phase):
            return self._latest_batch[1]
        batch: Data | list[Data]
        if self._fitness_data is not None:
            draw = keys.generator(self._seed, generation, phase)
            if isinstance(self._fitness_data, list):
                batch = drawn_batches(self._fitness_data, self._fitness_samples, draw)
            else:
                batch = drawn(self._fitness_data, self._fitness_samples, draw)
        else:
            if isinstance(self._data, StreamData):
                self._data.go_to(self._start(generation, phase))
            batch = self._data.fitness_batch(generation, phase, self._fitness_samples)
        if self._fixed_batch_size is not None:
            batch = cut_to_size(batch, self._fixed_batch_size)
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


def _check_batch_size(size: int, rest: int, fixed: int | None) -> None:
    """Raises if the model does not take batches of this size, or the last one's."""
    if fixed is not None and (size != fixed or rest):
        smaller = f", the last of {rest}" if rest else ""
        raise ValueError(
            f"The model's input has a batch size of its own (as stateful layers need): expected "
            f"batches of {fixed} samples. Use `batch_size={fixed}` and a multiple of {fixed} "
            f"samples, or `steps_per_epoch`. Received: batches of {size} samples{smaller}"
        )
