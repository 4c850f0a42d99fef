"""Records the parents of each individual of a population, and what became of it."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_gdopt.gadam.breeding import Plan


class Lineage:
    """All individuals that were ever born, in the order of birth.

    An individual is a dictionary. Its id is its place in the lineage.

    - `id`: its id; `generation`: the generation of its birth, 0 for the first population,
    - `parents`: the ids of its two parents, which may be equal; empty in the first population,
    - `selection_probabilities`: those of its parents; `crossover_probability`: the probability
      with which an entry came from the first parent; `mutation_rate`: the probability with which
      an entry mutated; `mutated_entries`: how many did. All are `None` in the first population,
    - `heir_of`: the id of the fitter parent, whose hyper-parameters it inherited, or `None`;
      `hyperparameters`: the values of those that evolve, by name,
    - `first_step`: the number of steps that its line of fitter parents had made before its birth;
      `steps`: the number of steps that it has made itself,
    - `fitness`: its fitness loss when it was first evaluated,
    - `selections`: one `[generation, fitness loss, whether it survived]` for each selection of
      survivors that it took part in.

    >>> from keras_gdopt.gadam.lineage import Lineage
    >>> lineage = Lineage()
    >>> first = lineage.born(0)
    >>> lineage.born(1, parents=[first, first], mutated_entries=3)
    1
    >>> [individual["id"] for individual in lineage.ancestry(1)]
    [1, 0]
    """

    def __init__(self, individuals: Iterable[dict[str, Any]] = ()) -> None:
        self._individuals = list(individuals)

    def __len__(self) -> int:
        return len(self._individuals)

    def __getitem__(self, identity: int) -> dict[str, Any]:
        return self._individuals[identity]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._individuals)

    def born(
        self,
        generation: int,
        *,
        parents: list[int] | None = None,
        selection_probabilities: list[float] | None = None,
        crossover_probability: float | None = None,
        mutation_rate: float | None = None,
        mutated_entries: int | None = None,
        heir_of: int | None = None,
        hyperparameters: dict[str, float] | None = None,
    ) -> int:
        """Adds an individual and returns its id."""
        identity = len(self._individuals)
        first_step = 0
        if heir_of is not None:
            parent = self._individuals[heir_of]
            # Version 0.1.0 did not count steps.
            first_step = parent.get("first_step", 0) + parent.get("steps", 0)
        self._individuals.append(
            {
                "id": identity,
                "generation": generation,
                "parents": parents or [],
                "selection_probabilities": selection_probabilities,
                "crossover_probability": crossover_probability,
                "mutation_rate": mutation_rate,
                "mutated_entries": mutated_entries,
                "heir_of": heir_of,
                "hyperparameters": hyperparameters or {},
                "first_step": first_step,
                "steps": 0,
                "fitness": None,
                "selections": [],
            }
        )
        return identity

    def trained(self, identity: int, steps: int) -> None:
        """Records that an individual made more steps."""
        individual = self._individuals[identity]
        individual["steps"] = individual.get("steps", 0) + steps

    def line(self, identity: int) -> list[dict[str, Any]]:
        """Returns the individual, its fitter parent, that parent's fitter parent, and so on."""
        line = [self._individuals[identity]]
        while line[-1].get("heir_of") is not None:
            line.append(self._individuals[line[-1]["heir_of"]])
        return line

    def evaluated(self, identity: int, fitness: float) -> None:
        """Records an individual's fitness loss, unless there is one already."""
        individual = self._individuals[identity]
        if individual["fitness"] is None:
            individual["fitness"] = fitness

    def selected(self, identity: int, generation: int, fitness: float, survives: bool) -> None:
        """Records an individual's loss at the end of a generation, and whether it survived."""
        self.evaluated(identity, fitness)
        self._individuals[identity]["selections"].append([generation, fitness, survives])

    def ancestry(self, identity: int) -> list[dict[str, Any]]:
        """Returns the individual and all its ancestors, each once, the youngest first."""
        found, waiting = set(), [identity]
        while waiting:
            one = waiting.pop()
            if one not in found:
                found.add(one)
                waiting.extend(self._individuals[one]["parents"])
        return [self._individuals[one] for one in sorted(found, reverse=True)]

    def to_json_lines(self, path: str | Path) -> None:
        """Writes a line of JSON for each individual, to any path that `tf.io.gfile` accepts."""
        with tf.io.gfile.GFile(str(path), "w") as file:
            for individual in self:
                file.write(json.dumps(individual) + "\n")

    def latest_json_lines(self, identities: Iterable[int]) -> str:
        """Returns the lines to append to a file of the lineage after a generation.

        A line has only the last of the individual's `selections`, so that it stays short however
        long the individual lives. `from_json_lines` joins them.

        Args:
            identities: The ids of all individuals that were evaluated at the generation's end.
        """
        latest = (
            {**self[identity], "selections": self[identity]["selections"][-1:]}
            for identity in identities
        )
        return "".join(json.dumps(individual) + "\n" for individual in latest)

    @classmethod
    def from_json_lines(cls, path: str | Path) -> "Lineage":
        """Reads a file of `to_json_lines`, and lines of `latest_json_lines` appended to it."""
        individuals: dict[int, dict[str, Any]] = {}
        with tf.io.gfile.GFile(str(path)) as file:
            for line in file:
                individual = json.loads(line)
                earlier = individuals.get(individual["id"], {"selections": []})
                individual["selections"] = earlier["selections"] + individual["selections"]
                individuals[individual["id"]] = individual
        return cls(individuals[identity] for identity in sorted(individuals))


def record_generation(
    lineage: Lineage,
    identities: Sequence[int],
    plan: Plan,
    *,
    steps: int,
    mutated: np.ndarray,
    fitness: np.ndarray,
    survival: np.ndarray,
    places: np.ndarray,
    hyperparameters: Sequence[dict[str, float]],
) -> list[int]:
    """Records what became of a generation's parents and children.

    Args:
        lineage: The lineage to add them to.
        identities: The ids of the parents.
        plan: Which parents each child has.
        steps: The number of steps that each individual made.
        mutated: The number of mutated entries of each child.
        fitness: The parents' losses by which parents of children were selected.
        survival: The losses of parents, then children, by which survivors were selected.
        places: The indices of the survivors in `survival`.
        hyperparameters: The hyper-parameters of each child.

    Returns:
        The ids of the survivors.
    """
    for identity, loss in zip(identities, fitness, strict=True):
        lineage.trained(identity, steps)
        lineage.evaluated(identity, float(loss))
    children = []
    for child, parents in enumerate(plan.parents):
        identity = lineage.born(
            plan.generation + 1,
            parents=[identities[parent] for parent in parents],
            selection_probabilities=[float(plan.probabilities[parent]) for parent in parents],
            crossover_probability=float(plan.crossover_probabilities[child]),
            mutation_rate=float(plan.mutation_probabilities[child]),
            mutated_entries=int(mutated[child]),
            heir_of=identities[plan.fitter[child]],
            hyperparameters=hyperparameters[child],
        )
        lineage.trained(identity, steps)
        children.append(identity)
    everyone = [*identities, *children]
    surviving = set(places.tolist())
    for index, identity in enumerate(everyone):
        lineage.selected(identity, plan.generation, float(survival[index]), index in surviving)
    return [everyone[place] for place in places]
