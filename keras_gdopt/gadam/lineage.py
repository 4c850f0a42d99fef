"""Who descends from whom in a population, and what became of each."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_gdopt.gadam.breeding import Plan


class Lineage:
    """Every individual that was ever born, in the order of birth.

    An individual is a dictionary, and its place in the lineage is its id:

    - `id`; `generation` in which it was born, 0 for the first population,
    - `parents`: two ids (the same twice is possible), or none in the first population,
    - `selection_probabilities` of the parents, `crossover_probability` with which an
      entry came from the first of them, `mutation_rate` (the probability with which an
      entry mutated) and `mutated_entries`, a count; all `None` in the first population,
    - `heir_of`: the fitter parent's id, whose hyper-parameters it inherited, or `None`;
      `hyperparameters` that evolve, by name,
    - `first_step`: how many steps its line of fitter parents had made before its birth; `steps`:
      how many it has made itself,
    - `fitness`: its fitness loss when it was first evaluated,
    - `selections`: for each generation at whose end it was evaluated, `[generation,
      fitness loss, whether it survived]`.

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
        """Adds an individual, and returns its id."""
        identity = len(self._individuals)
        first_step = 0
        if heir_of is not None:
            parent = self._individuals[heir_of]
            # Version 0.1.0 counted no steps.
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
        """Notes that an individual made some more steps."""
        individual = self._individuals[identity]
        individual["steps"] = individual.get("steps", 0) + steps

    def line(self, identity: int) -> list[dict[str, Any]]:
        """The individual, its fitter parent, that one's, and so on."""
        line = [self._individuals[identity]]
        while line[-1].get("heir_of") is not None:
            line.append(self._individuals[line[-1]["heir_of"]])
        return line

    def evaluated(self, identity: int, fitness: float) -> None:
        """Notes an individual's fitness loss; the first one stays."""
        individual = self._individuals[identity]
        if individual["fitness"] is None:
            individual["fitness"] = fitness

    def selected(self, identity: int, generation: int, fitness: float, survives: bool) -> None:
        """Notes how an individual fared at the end of a generation."""
        self.evaluated(identity, fitness)
        self._individuals[identity]["selections"].append([generation, fitness, survives])

    def ancestry(self, identity: int) -> list[dict[str, Any]]:
        """The individual and all it descends from, youngest first, each once."""
        found, waiting = set(), [identity]
        while waiting:
            one = waiting.pop()
            if one not in found:
                found.add(one)
                waiting.extend(self._individuals[one]["parents"])
        return [self._individuals[one] for one in sorted(found, reverse=True)]

    def to_json_lines(self, path: str | Path) -> None:
        """Writes one line of JSON for each individual, to any path of `tf.io.gfile`."""
        with tf.io.gfile.GFile(str(path), "w") as file:
            for individual in self:
                file.write(json.dumps(individual) + "\n")

    def latest_json_lines(self, identities: Iterable[int]) -> str:
        """Lines that bring a file up to date after a generation.

        Args:
            identities: Of all that were evaluated at its end. Each has a line with this
                last one of its `selections` alone, so that a line stays short however long
                its individual lives; `from_json_lines` joins them.
        """
        latest = (
            {**self[identity], "selections": self[identity]["selections"][-1:]}
            for identity in identities
        )
        return "".join(json.dumps(individual) + "\n" for individual in latest)

    @classmethod
    def from_json_lines(cls, path: str | Path) -> "Lineage":
        """Reads what `to_json_lines` wrote, and `latest_json_lines` after it."""
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
    """Notes what became of a generation's parents and children.

    Args:
        lineage: Where to note it.
        identities: The parents' ids.
        plan: Which parents each child has.
        steps: How many each individual trained.
        mutated: How many entries of each child mutated.
        fitness: The parents' losses by which parents of children were selected.
        survival: Parents' and children's losses by which survivors were selected.
        places: Of the survivors among both.
        hyperparameters: Of each child.

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
