"""Training data that comes as a stream of batches."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_gdopt.functional import Data
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.samples import (
    are_alike,
    as_dataset,
    check_counts,
    concatenate,
    count_batches,
    is_endless,
    sample_count,
    stack_batches,
    tells_its_shapes,
)
from keras_gdopt.gadam.training_data import MOST_STEPS, Portion, check_batch_size
from keras_gdopt.tensor import Tensor


class Schedule(NamedTuple):
    """How many steps of the stream a phase of training, and one of fitness, takes."""

    training: int
    fitness: int

    def start(self, generation: int, phase: Phase) -> int:
        """The step of the stream at which a phase of a generation begins."""
        before = {
            Phase.TRAIN_PARENTS: 0,
            Phase.FITNESS: self.training,
            Phase.TRAIN_CHILDREN: self.training + self.fitness,
            Phase.SURVIVAL: 2 * self.training + self.fitness,
        }
        return generation * 2 * (self.training + self.fitness) + before[phase]


class StreamData:
    """Batches of a `tf.data.Dataset` or a `keras.utils.PyDataset`, dealt out to the members.

    In each step the first member gets the next batch, the second member the batch after it,
    and so on. When the data ends, it is read again. When members would get the same batches
    as in earlier passes, the deal moves on by one member, so that each member sees all of the
    data in the end. If the length of a pass is not known, each step's deal begins with a random
    member instead. All batches have the size of the first one: a smaller last batch is filled
    up from the next pass. Fitness batches are whole steps of the same stream.

    If the dataset does not declare the shapes of its samples, as after `padded_batch`, or if it
    has ragged or sparse tensors, batches are dealt out unchanged.

    Args:
        dataset: A dataset of `x`, `(x, y)` or `(x, y, sample_weight)`.
        class_weight: A weight for each class, or `None`.
        steps_per_epoch: The number of batches that each member gets in an epoch. Defaults to
            the number of batches of the dataset, which are counted if it is unknown.
        fixed_batch_size: The only batch size that the model accepts, or `None`.
        members: The number of members.
        epochs: The number of epochs that a member trains in each phase of a generation.
        fitness_samples: The approximate number of samples in a fitness batch; `None` if members
            are judged by other data.
        portion: The largest number of steps that are handed to the device at a time.

    Raises:
        ValueError: If the data is empty, or endless without `steps_per_epoch`, or its batches
            do not have the size that the model accepts.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        class_weight: dict[int, float] | None = None,
        steps_per_epoch: int | None = None,
        fixed_batch_size: int | None = None,
        members: int,
        epochs: int = 1,
        fitness_samples: int | None = None,
        portion: int = MOST_STEPS,
    ) -> None:
        batches = as_dataset(dataset, class_weight)
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("The training data is empty. Expected at least one batch.")
        check_counts(first)
        self._batch_size = sample_count(first)
        check_batch_size(self._batch_size, 0, fixed_batch_size)
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
        # After this many steps the passes end with a whole step, and each member would get the
        # same batches again. The deal then begins with another member.
        self._together = math.lcm(count, members) // members if count > 0 else None
        self._as_they_are = not tells_its_shapes(batches)
        if self._as_they_are:
            self._steps = batches.repeat()
        else:
            same_size = batches.repeat().rebatch(self._batch_size, drop_remainder=True)
            self._steps = same_size.batch(members, drop_remainder=True)
        fitness_steps = 0 if fitness_samples is None else self._fitness_steps(fitness_samples)
        self._schedule = Schedule(epochs * steps_per_epoch, fitness_steps)
        self._taken = 0
        self._stream: Iterator[Data] | None = None
        self._first = first

    def first_batch(self) -> Data | list[Data]:
        """Returns the first batch, see `ArrayData.first_batch`; the stream does not move."""
        return [self._first] if self._as_they_are else self._first

    def epoch(
        self, generation: int, phase: Phase, epoch: int, places: Sequence[int]
    ) -> Iterator[Portion]:
        """Yields the steps of one epoch for the members at some places of the population.

        Each step is read for all members, and the batches of those elsewhere are dropped. So a
        member gets the same batches whichever process trains it.
        """
        self._go_to(self._schedule.start(generation, phase) + epoch * self.steps_per_epoch)
        everyone = list(places) == list(range(self._members))
        for first in range(0, self.steps_per_epoch, self._portion):
            # Portions have at most two lengths, so that at most two functions are compiled.
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
        """Joins the batches of a few steps, see `TrainingData.fitness_batch`."""
        self._go_to(self._schedule.start(generation, phase))
        steps = [self._next() for _ in range(self._fitness_steps(size))]
        if self._as_they_are:
            return concatenate([batch for batches in steps for batch in batches])

        def joined(*parts: Tensor) -> Tensor:
            return tf.concat([tf.reshape(part, [-1, *part.shape[2:]]) for part in parts], axis=0)

        return tf.nest.map_structure(joined, *steps)

    def _fitness_steps(self, size: int) -> int:
        """The number of steps that make a fitness batch of about `size` samples."""
        return max(1, size // (self._members * self._batch_size))

    def _go_to(self, step: int) -> None:
        """Moves the stream to a step, counted from its beginning."""
        if step != self._taken:
            self._taken, self._stream = step, None

    def _next(self) -> Any:
        """Reads the next step: batches stacked along an axis of members, or a list of batches.

        See the class about which member the deal begins with.
        """
        if self._stream is None:
            taken = self._taken * (self._members if self._as_they_are else 1)
            self._stream = iter(self._steps.skip(taken).prefetch(2))
        if self._together is None:
            turned = int(np.random.default_rng(self._taken).integers(self._members))
        else:
            turned = self._taken // self._together % self._members
        self._taken += 1
        if self._as_they_are:
            batches = [next(self._stream) for _ in range(self._members)]
            for batch in batches:
                check_batch_size(sample_count(batch), 0, self._fixed_batch_size)
            return [batches[place - turned] for place in range(self._members)]
        step = next(self._stream)
        if not turned:
            return step
        return tf.nest.map_structure(lambda part: tf.roll(part, turned, axis=0), step)
