"""Training data in memory."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_gdopt.functional import Data
from keras_gdopt.gadam import keys
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.samples import are_alike, drawn, in_memory, sample_count, take_rows
from keras_gdopt.gadam.training_data import MOST_STEPS, Portion, check_batch_size


class ArrayData:
    """Samples in memory. Each member goes through them in an order of its own.

    Args:
        x: The inputs, an array or a structure of arrays.
        y: The targets, in the same form, or `None`.
        sample_weight: A weight for each sample, or `None`.
        class_weight: A weight for each class, or `None`.
        batch_size: The batch size of training. Defaults to 32. If there are fewer samples, a
            batch has all of them.
        steps_per_epoch: The number of batches in an epoch. Defaults to one pass over the
            samples; the last batch may then be smaller.
        fixed_batch_size: The only batch size that the model accepts, or `None`.
        seed: The seed of the run.

    Raises:
        ValueError: If there are no samples, arrays differ in their number of samples, or a
            batch does not have the size that the model accepts.
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
        check_batch_size(batch_size, self._rest, fixed_batch_size)
        self.steps_per_epoch = self._full_steps + bool(self._rest)
        self._seed = seed

    def first_batch(self) -> Data | list[Data]:
        """Returns the first samples as a batch, in a list if batches may differ in shape."""
        batch = take_rows(self.data, np.arange(self._batch_size))
        return batch if self._alike else [batch]

    def epoch(
        self, generation: int, phase: Phase, epoch: int, places: Sequence[int]
    ) -> Iterator[Portion]:
        """Yields the steps of one epoch for the members at some places of the population.

        Each member gets permutations of all samples, as many as the steps need. They depend on
        the seed, the generation, the phase, the place and the epoch alone.
        """
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
        """Draws the batch that all members are judged by, without repeated samples."""
        return drawn(self.data, size, keys.generator(self._seed, generation, phase))

    def _apart(self, order: np.ndarray) -> Iterator[Portion]:
        """Yields the steps of an epoch of ragged samples; `order` is `(members, samples)`."""
        size, end = self._batch_size, self._full_steps * self._batch_size + self._rest
        for first in range(0, self.steps_per_epoch, MOST_STEPS):
            last = min(first + MOST_STEPS, self.steps_per_epoch)
            steps = [
                [take_rows(self.data, row[at : min(at + size, end)]) for row in order]
                for at in range(first * size, last * size, size)
            ]
            yield Portion(steps, None, last - first)
