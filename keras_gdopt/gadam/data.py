"""The data arguments of `Gadam.fit`, and the batches that members train on and are judged by."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.functional import Data
from keras_gdopt.gadam import keys
from keras_gdopt.gadam.array_data import ArrayData
from keras_gdopt.gadam.class_weight import check_class_weight
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.samples import (
    all_of,
    check_is_no_generator,
    cut_to_size,
    drawn,
    drawn_batches,
    sample_count,
    take_rows,
)
from keras_gdopt.gadam.stream_data import StreamData
from keras_gdopt.gadam.training_data import Portion, TrainingData
from keras_gdopt.optimizers.argument_checks import checked_count


class DataArguments(NamedTuple):
    """The arguments of `Gadam.fit` that concern data; `for_workers` makes them fit to be sent."""

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
    """Makes the training data, in place of `x`, `y` and `sample_weight`."""
    fixed_batch_size: int | None = None
    """The only batch size that the model accepts."""

    def made(self) -> "GenerationData":
        """Makes the data that the arguments describe.

        Raises:
            ValueError: See `Gadam.fit`.
        """
        checked_count("epochs", self.epochs, minimum=1)
        for name in ("batch_size", "steps_per_epoch"):
            if getattr(self, name) is not None:
                checked_count(name, getattr(self, name), minimum=1)
        if self.class_weight is not None:
            check_class_weight(self.class_weight)
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
        """Returns a copy with NumPy arrays, to be sent to workers; ragged tensors are kept.

        Raises:
            ValueError: If `x` or `fitness_data` is a dataset.
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

    def _training_data(self, x: Any, y: Any, sample_weight: Any) -> TrainingData:
        if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)):
            if y is not None or sample_weight is not None or self.batch_size is not None:
                raise ValueError(
                    "A dataset already has its targets, sample weights and batches. Received: "
                    "`y`, `sample_weight` or `batch_size` beside a dataset"
                )
            return StreamData(
                x,
                class_weight=self.class_weight,
                steps_per_epoch=self.steps_per_epoch,
                fixed_batch_size=self.fixed_batch_size,
                members=self.members,
                epochs=self.epochs,
                fitness_samples=self.fitness_samples if self.fitness_data is None else None,
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
    """The batches that members train on and are judged by, in each phase of each generation.

    They depend on the generation, the phase and the member alone, not on earlier calls.

    Args:
        data: The training data.
        fitness_data: The samples that fitness batches are drawn from. `None` takes fitness
            batches from the training data.
        fitness_samples: The approximate number of samples in a fitness batch.
        epochs: The number of epochs that a member trains in a generation.
        fixed_batch_size: The only batch size that the model accepts, or `None`.
        seed: The seed of the run.
    """

    def __init__(
        self,
        data: TrainingData,
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
        """The number of steps that a member makes in a phase of training."""
        return self.epochs * self._data.steps_per_epoch

    def epoch(
        self, generation: int, phase: Phase, epoch: int, places: Sequence[int]
    ) -> Iterator[Portion]:
        """Yields the steps of one epoch for the members at some places of the population."""
        return self._data.epoch(generation, phase, epoch, places)

    def first_batch(self) -> Data | list[Data]:
        """Returns a batch of the shapes that members are judged by.

        If shapes differ, or if the model accepts only one batch size, it is a list of batches.
        """
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
        """Returns the batch that all members are judged by in a phase.

        If shapes differ, or if the model accepts only one batch size, it is a list of batches.
        """
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
            batch = self._data.fitness_batch(generation, phase, self._fitness_samples)
        if self._fixed_batch_size is not None:
            batch = cut_to_size(batch, self._fixed_batch_size)
        self._latest_batch = ((generation, phase), batch)
        return batch
