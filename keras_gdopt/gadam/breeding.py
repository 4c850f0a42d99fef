"""A generation's children: selection, crossover and mutation of whole members."""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_gdopt.gadam import genetics, keys
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.population import Members

Tensor = Any


class Brood(NamedTuple):
    """Children, and how they came about."""

    weights: list[Tensor]
    state: list[Tensor]
    probabilities: Tensor
    """Each member's of being chosen as a parent."""
    parents: Tensor
    """Two places in the population for each child."""
    crossover_probabilities: Tensor
    mutation_probabilities: Tensor
    mutated_entries: Tensor


class Breeding:
    """Makes g children of g members, in one function on the device.

    Args:
        mutation_rate: See `Gadam`.
        mutation: See `Gadam`.
        mutation_stddev: See `Gadam`.
        seed: Of the run.
    """

    def __init__(
        self,
        *,
        mutation_rate: float,
        mutation: str,
        mutation_stddev: float,
        seed: int,
    ) -> None:
        self._rate = mutation_rate
        self._mutation = mutation
        self._stddev = mutation_stddev
        self._seed = seed
        self._breed = tf.function(self._brood, autograph=False)

    def __call__(self, members: Members, losses: Tensor, generation: int) -> Brood:
        """The children of a generation.

        Args:
            members: The trained parents.
            losses: Their fitness losses; at least one must be finite.
            generation: Its number, a part of each key.
        """
        count = losses.shape[0]

        def of_each(phase: Phase) -> Tensor:
            drawn = [keys.key(self._seed, generation, phase, child) for child in range(count)]
            return tf.constant(np.stack(drawn))

        return self._breed(
            members.weights,
            members.state,
            losses,
            tf.constant(keys.key(self._seed, generation, Phase.SELECT)),
            of_each(Phase.CROSS_OVER),
            of_each(Phase.MUTATE),
        )

    def _brood(
        self,
        weights: list[Tensor],
        state: list[Tensor],
        losses: Tensor,
        selection_key: Tensor,
        crossover_keys: Tensor,
        mutation_keys: Tensor,
    ) -> Brood:
        probabilities = genetics.selection_probabilities(losses)
        parents = genetics.chosen_parents(probabilities, selection_key)
        crossovers = genetics.crossover_probabilities(losses, parents)
        mutations = genetics.mutation_probabilities(self._rate, probabilities, parents)

        def child(inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
            (first, second), crossover, mutation, crossover_key, mutation_key = (
                tf.unstack(inputs[0]), *inputs[1:],
            )  # fmt: skip
            arrays, mutated = [], tf.zeros((), tf.int64)
            for index, weight in enumerate(weights):
                number = (index + 1) << 4  # below it are the numbers of a mutation's draws
                array = genetics.crossover(
                    tf.gather(weight, first),
                    tf.gather(weight, second),
                    crossover,
                    genetics.another_key(crossover_key, number),
                )
                array, entries = genetics.mutate(
                    array,
                    mutation,
                    genetics.another_key(mutation_key, number),
                    mutation=self._mutation,
                    stddev=self._stddev,
                )
                arrays.append(array)
                mutated += entries
            return arrays, mutated

        arrays, mutated = tf.map_fn(
            child,
            (parents, crossovers, mutations, crossover_keys, mutation_keys),
            fn_output_signature=(
                [tf.TensorSpec(weight.shape[1:], weight.dtype) for weight in weights],
                tf.TensorSpec((), tf.int64),
            ),
        )
        # State comes whole, from the fitter parent; from the first where they are as fit.
        fitness = tf.gather(genetics.normalized_losses(losses), parents)
        fitter = tf.where(fitness[:, 1] < fitness[:, 0], parents[:, 1], parents[:, 0])
        inherited = [tf.gather(value, fitter) for value in state]
        return Brood(arrays, inherited, probabilities, parents, crossovers, mutations, mutated)
