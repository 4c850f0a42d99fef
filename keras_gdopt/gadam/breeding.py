"""A generation's children: selection, crossover and mutation of whole members."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_gdopt.gadam import genetics, keys
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.tensor import Tensor

CROSSOVERS = ("entries", "mean", "fitter")
SELECTIONS = ("all", "truncation")


class Plan(NamedTuple):
    """Who begets whom in a generation, and with which probabilities. All are arrays."""

    generation: int
    probabilities: np.ndarray
    """Each member's of being chosen as a parent."""
    parents: np.ndarray
    """Two places in the population for each child."""
    crossover_probabilities: np.ndarray
    mutation_probabilities: np.ndarray
    fitter: np.ndarray
    """For each child the parent that its state and its hyper-parameters come from."""


class Breeding:
    """Makes g children of g members, in one function on the device.

    Args:
        mutation_rate: See `Gadam`.
        mutation: See `Gadam`.
        mutation_stddev: See `Gadam`.
        selection: See `Gadam`.
        crossover: See `Gadam`.
        inherit_optimizer_state: See `Gadam`.
        seed: Of the run.

    Attributes:
        inherits_optimizer_state: Whether a child goes on with its fitter parent's.
    """

    def __init__(
        self,
        *,
        mutation_rate: float,
        mutation: str,
        mutation_stddev: float,
        seed: int,
        selection: str = "all",
        crossover: str = "entries",
        inherit_optimizer_state: bool = False,
    ) -> None:
        self.inherits_optimizer_state = inherit_optimizer_state
        self._selection = selection
        self._crossover = crossover
        self._rate = mutation_rate
        self._mutation = mutation
        self._stddev = mutation_stddev
        self._seed = seed
        self._choose = tf.function(self._chosen, autograph=False)
        self._breed = tf.function(self._bred, autograph=False)

    def plan(self, losses: Any, generation: int) -> Plan:
        """Who begets whom.

        Args:
            losses: The trained parents' fitness losses; at least one must be finite.
            generation: Its number, a part of each key.
        """
        key = tf.constant(keys.key(self._seed, generation, Phase.SELECT))
        chosen = self._choose(tf.convert_to_tensor(losses), key)
        return Plan(generation, *(array.numpy() for array in chosen))

    def sources(self, plan: Plan) -> np.ndarray:
        """For each child the two places in the population whose weights it comes from."""
        if self._crossover == "fitter":
            return np.stack([plan.fitter, plan.fitter], axis=1)
        return plan.parents

    def children(
        self,
        plan: Plan,
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        children: Sequence[int] | None = None,
    ) -> tuple[list[Tensor], np.ndarray]:
        """The weights of children.

        Args:
            plan: Of the generation.
            first: The weights of each child's first parent in `sources`, or of shape `(g, ...)`
                those of all members.
            second: Those of the second one, likewise.
            children: Whose parents these are, in their order. `None` for all children, of
                all members' weights.

        Returns:
            Weights of shape `(children, ...)`, and how many entries of each mutated.
        """
        if children is None:
            children, rows = range(len(plan.parents)), self.sources(plan)
        else:
            rows = np.repeat(np.arange(len(children), dtype="int32")[:, None], 2, axis=1)

        def of_each(phase: Phase) -> Tensor:
            drawn = [keys.key(self._seed, plan.generation, phase, child) for child in children]
            return tf.constant(np.stack(drawn))

        chosen = list(children)
        weights, mutated = self._breed(
            list(first),
            list(second),
            tf.constant(rows),
            tf.constant(plan.crossover_probabilities[chosen]),
            tf.constant(plan.mutation_probabilities[chosen]),
            of_each(Phase.CROSS_OVER),
            of_each(Phase.MUTATE),
        )
        return list(weights), mutated.numpy()

    # --- what is traced ------------------------------------------------------

    def _chosen(self, losses: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        if self._selection == "truncation":
            losses = genetics.truncated(losses)
        probabilities = genetics.selection_probabilities(losses)
        parents = genetics.chosen_parents(probabilities, key)
        crossovers = genetics.crossover_probabilities(losses, parents)
        mutations = genetics.mutation_probabilities(self._rate, probabilities, parents)
        # State comes whole, from the fitter parent; from the first where they are as fit.
        fitness = tf.gather(genetics.normalized_losses(losses), parents)
        fitter = tf.where(fitness[:, 1] < fitness[:, 0], parents[:, 1], parents[:, 0])
        if self._crossover == "fitter":
            crossovers = tf.cast(tf.equal(fitter, parents[:, 0]), tf.float64)
        return probabilities, parents, crossovers, mutations, fitter

    def _bred(
        self,
        firsts: list[Tensor],
        seconds: list[Tensor],
        rows: Tensor,
        crossovers: Tensor,
        mutations: Tensor,
        crossover_keys: Tensor,
        mutation_keys: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        def child(inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
            (first, second), crossover, mutation, crossover_key, mutation_key = (
                tf.unstack(inputs[0]), *inputs[1:],
            )  # fmt: skip
            arrays, mutated = [], tf.zeros((), tf.int64)
            for index, (a, b) in enumerate(zip(firsts, seconds, strict=True)):
                number = (index + 1) << 4  # below it are the numbers of a mutation's draws
                array = tf.gather(a, first)
                if self._crossover == "mean":
                    array = genetics.mean(array, tf.gather(b, second), crossover)
                elif self._crossover == "entries":
                    key = genetics.another_key(crossover_key, number)
                    array = genetics.crossover(array, tf.gather(b, second), crossover, key)
                if self._rate:
                    array, entries = genetics.mutate(
                        array,
                        mutation,
                        genetics.another_key(mutation_key, number),
                        mutation=self._mutation,
                        stddev=self._stddev,
                    )
                    mutated += entries
                arrays.append(array)
            return arrays, mutated

        return tf.map_fn(
            child,
            (rows, crossovers, mutations, crossover_keys, mutation_keys),
            fn_output_signature=(
                [tf.TensorSpec(weight.shape[1:], weight.dtype) for weight in firsts],
                tf.TensorSpec((), tf.int64),
            ),
        )
