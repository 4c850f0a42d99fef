"""Makes a generation's children: selects parents, crosses their weights and mutates them."""

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
    """Which parents the children of a generation have, and the probabilities used."""

    generation: int
    probabilities: np.ndarray
    """The probability of each member to be drawn as a parent."""
    parents: np.ndarray
    """The places of each child's two parents in the population."""
    crossover_probabilities: np.ndarray
    mutation_probabilities: np.ndarray
    fitter: np.ndarray
    """The place of each child's fitter parent, whose state and hyper-parameters it inherits."""


class Breeding:
    """Makes g children from g members, in one function on the device.

    Args:
        mutation_rate: See `Gadam`.
        mutation: See `Gadam`.
        mutation_stddev: See `Gadam`.
        selection: See `Gadam`.
        crossover: See `Gadam`.
        inherit_optimizer_state: See `Gadam`.
        seed: The seed of the run.

    Attributes:
        inherits_optimizer_state: Whether a child continues with the optimizer's state of its
            fitter parent.
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
        """Draws the parents of each child.

        Args:
            losses: The fitness losses of the trained parents; at least one must be finite.
            generation: The number of the generation, on which the draws depend.
        """
        key = tf.constant(keys.key(self._seed, generation, Phase.SELECT))
        chosen = self._choose(tf.convert_to_tensor(losses), key)
        return Plan(generation, *(array.numpy() for array in chosen))

    def sources(self, plan: Plan) -> np.ndarray:
        """Returns, for each child, the places of the two members that its weights come from."""
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
        """Makes the weights of children.

        Besides its parents' weights, a child depends only on the plan and its number, not on the
        children made with it.

        Args:
            plan: The plan of the generation.
            first: The weights of each child's first member in `sources`; if `children` is
                `None`, the weights of all members, of shape `(g, ...)`.
            second: The weights of the second member, likewise.
            children: The numbers of the children to make, in the order of `first` and `second`.
                `None` makes all children.

        Returns:
            Weights of shape `(children, ...)`, and the number of mutated entries of each child.
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

    # --- traced functions ----------------------------------------------------

    def _chosen(self, losses: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        """Computes the fields of a `Plan` from the members' fitness losses."""
        if self._selection == "truncation":
            losses = genetics.truncated(losses)
        probabilities = genetics.selection_probabilities(losses)
        parents = genetics.chosen_parents(probabilities, key)
        crossovers = genetics.crossover_probabilities(losses, parents)
        mutations = genetics.mutation_probabilities(self._rate, probabilities, parents)
        # State is not mixed: it comes from the fitter parent, or the first of two equally fit.
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
        """Crosses and mutates the weights of each child, and counts the mutated entries.

        `rows` has, for each child, its row in each of `firsts` and its row in each of `seconds`.
        Each weight of each child has keys of its own, derived from the child's two keys. So a
        child is the same, whichever children are made in the same call.
        """

        def child(inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
            (first, second), crossover, mutation, crossover_key, mutation_key = (
                tf.unstack(inputs[0]), *inputs[1:],
            )  # fmt: skip
            arrays, mutated = [], tf.zeros((), tf.int64)
            for index, (a, b) in enumerate(zip(firsts, seconds, strict=True)):
                number = (index + 1) << 4  # smaller numbers tell apart the draws of a mutation
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
