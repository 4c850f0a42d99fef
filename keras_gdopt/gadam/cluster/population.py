"""A population whose members lie, and are trained, in the workers of a Ray cluster."""

import math
import pickle
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import ray
import tensorflow as tf
from ray import cloudpickle

from keras_gdopt.gadam import population
from keras_gdopt.gadam.breeding import Plan
from keras_gdopt.gadam.cluster import placement
from keras_gdopt.gadam.cluster.engine import RayEngine
from keras_gdopt.gadam.cluster.pool import LostError, Pool, Task, alive_nodes, connect, this_node
from keras_gdopt.gadam.cluster.worker import Setup, Shard
from keras_gdopt.gadam.data import DataArguments, GenerationData
from keras_gdopt.gadam.engines.stacked import StackedEngine
from keras_gdopt.gadam.engines.unrolled import UnrolledEngine
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.population import Members
from keras_gdopt.gadam.progress import Progress


class _Held(NamedTuple):
    """A member somewhere in the cluster: references, and where they are."""

    weights: Any
    state: Any
    optimizer: Any
    home: int
    """The shard that it was trained in."""
    node: str


class _Past(NamedTuple):
    """A generation, as it can be made again."""

    plan: Plan
    homes: list[int]
    nurseries: list[int]
    places: np.ndarray


class RayPopulation:
    """Has the methods of `LocalPopulation`, which say what each does.

    Shards, not workers, are what members are dealt to: a shard has the same members
    whichever worker trains it, so that no fault changes a result. What workers return
    belongs to this process and lies on their nodes. This process has a copy of the
    survivors of every n-th generation; from it, and the plans since then, all can be
    trained again that was on a node that is gone.

    Args:
        engine: What the user said.
        model: Compiled and built.
        inner_engine: `"stacked"` or `"unrolled"`.
        weights: Of all members, of shape `(g, ...)`.
        state: Likewise.
        breeding: The arguments of `Breeding`, but for the seed.
        seed: Of the run.
    """

    def __init__(
        self,
        engine: RayEngine,
        model: keras.Model,
        inner_engine: str,
        weights: list[np.ndarray],
        state: list[np.ndarray],
        *,
        breeding: dict[str, Any],
        seed: int,
    ) -> None:
        self._size = len(weights[0])
        self._shards = min(engine.num_workers, self._size)
        self._capacity = math.ceil(self._size / self._shards)
        self._safekeeping_freq = engine.safekeeping_freq
        # Trains nothing here: it knows the optimizer's state.
        self._engine: StackedEngine | UnrolledEngine
        if inner_engine == "stacked":
            self._engine = StackedEngine(model, 1)
        else:
            self._engine = UnrolledEngine(model, [model])
        connect(engine.address, self._shards * engine.threads_per_worker)
        setup = Setup(
            model=_as_bytes(model),
            custom_objects=cloudpickle.dumps(dict(keras.saving.get_custom_objects())),
            engine=inner_engine,
            capacity=self._capacity,
            breeding=breeding,
            seed=seed,
            floatx=keras.config.floatx(),
        )
        self._pool = Pool(
            self._shards,
            threads=engine.threads_per_worker,
            resources=engine.resources_per_worker,
            setup=ray.put(setup),
            task_timeout=engine.task_timeout,
        )
        weakref.finalize(self, self._pool.close)
        self._replaying = False
        self._diversity = tf.function(population.diversity)
        self._moved = dict.fromkeys(("bytes_moved", "bytes_rebalanced", "bytes_kept"), 0)
        self.members = Members(
            weights,
            state,
            tf.nest.map_structure(np.asarray, self._engine.fresh_optimizer_state(self._size)),
            np.zeros(self._size, "int64"),
        )

    # --- the survivors, and the copy of them ----------------------------------

    @property
    def members(self) -> Members:
        """A copy of the survivors of the last generation, in this process."""
        if self._past:
            self._keep()
        return self._kept

    @members.setter
    def members(self, members: Members) -> None:
        self._kept = tf.nest.map_structure(np.asarray, members)
        self._past: list[_Past] = []
        self._parents: list[_Held | None] = []
        self._children: list[_Held | None] = []
        self._survivors = [self._put(place) for place in range(self._size)]

    def use(self, data: GenerationData, arguments: DataArguments) -> None:
        """Trains and judges with this data from now on."""
        del data  # is for this process
        if self._past:
            self._keep()  # as it could not be made again with other data
        arguments = arguments.for_workers()
        try:
            reference = ray.put(arguments)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise ValueError(
                "The training data cannot be sent to workers. Use arrays, or "
                "`RayEngine(data_fn=...)` with a function that makes the data in each worker. "
                f"Received this error: {error}"
            ) from error
        self._pool.use(reference)

    # --- the phases of a generation --------------------------------------------

    def train_parents(self, generation: int, progress: Progress) -> np.ndarray:
        """Trains the members; returns their losses."""
        self._parents, self._children = [None] * self._size, [None] * self._size
        self._generation = generation
        homes = [member.home for member in self._survivors]
        self._homes = placement.balanced(homes, self._shards, self._capacity)
        moved = sum(home != old for home, old in zip(self._homes, homes, strict=True))
        self._moved["bytes_rebalanced"] += moved * self._bytes_of_a_member()
        return self._train_parents(generation, range(self._size), progress)

    def parents_fitness(self, generation: int) -> np.ndarray:
        """The trained parents' losses of the batch that decides who begets."""
        (losses,) = self._fitness(generation, Phase.FITNESS, [self._parents])
        return losses

    def train_children(self, plan: Plan, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        """Breeds and trains; returns the children's losses and mutated entries."""
        self._plan = plan
        self._nurseries = placement.of_children(
            plan.parents.tolist(), self._homes, self._shards, self._capacity
        )
        weights, state = self._bytes_of(self._kept.weights), self._bytes_of(self._kept.state)
        for child, shard in enumerate(self._nurseries):
            away = {int(parent) for parent in plan.parents[child]}
            away = {parent for parent in away if self._homes[parent] != shard}
            self._moved["bytes_moved"] += len(away) * weights
            self._moved["bytes_moved"] += (int(plan.fitter[child]) in away) * state
        return self._train_children(range(self._size), progress)

    def survival_fitness(self, generation: int) -> tuple[np.ndarray, np.ndarray]:
        """Parents' and children's losses of the batch that decides who survives."""
        both = [self._parents, self._children]
        parents, children = self._fitness(generation, Phase.SURVIVAL, both)
        return parents, children

    def select(self, places: np.ndarray) -> None:
        """Keeps the survivors, see `genetics.surviving`."""
        everyone = [*self._parents, *self._children]
        self._survivors = [_there(everyone[place]) for place in places]
        self._parents = self._children = []
        self._past.append(_Past(self._plan, self._homes, self._nurseries, places))
        if (self._plan.generation + 1) % self._safekeeping_freq == 0:
            self._keep()

    def diversity(self) -> float:
        """The mean distance of two members' weights; NaN where there is no copy of them."""
        if self._past:
            return math.nan
        return float(self._diversity([tf.constant(array) for array in self._kept.weights]))

    def load(self, place: int, model: keras.Model) -> None:
        """Puts a member into a model, its optimizer's state included."""
        weights, state, (optimizer, updates) = self._got([self._survivors[place]])[0]
        for variable, value in zip(model.trainable_variables, weights, strict=True):
            variable.assign(value)
        for variable, value in zip(model.non_trainable_variables, state, strict=True):
            variable.assign(value)
        model.optimizer.build(model.trainable_variables)
        alone = tf.nest.map_structure(
            lambda value: tf.constant(value)[None], Members(weights, state, optimizer, updates)
        )
        self._engine.load_optimizer(alone, 0, model.optimizer)

    def report(self) -> dict[str, Any]:
        """What was moved since the last report, and what happened to workers."""
        report = {**self._moved, "events": self._pool.events}
        self._moved = dict.fromkeys(self._moved, 0)
        self._pool.events = []
        return report

    # --- what workers do ---------------------------------------------------------

    def _train_parents(
        self, generation: int, places: Sequence[int], progress: Progress | None = None
    ) -> np.ndarray:
        def arguments(shard: Shard) -> list[Any]:
            members = [self._survivors[place] for place in shard.places]
            parts = [part for m in members for part in (m.weights, m.state, m.optimizer)]
            return [shard, *parts]

        return self._trained(
            self._parents,
            self._in_shards(generation, Phase.TRAIN_PARENTS, self._homes, places),
            "train_parents",
            arguments,
            progress,
        )[0]

    def _train_children(
        self, places: Sequence[int], progress: Progress | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        plan = self._plan

        def arguments(shard: Shard) -> list[Any]:
            parts = []
            for child in shard.places:
                first, second = (_there(self._parents[parent]) for parent in plan.parents[child])
                fitter = _there(self._parents[plan.fitter[child]])
                parts += [first.weights, second.weights, fitter.state]
            return [shard, plan, *parts]

        losses, mutated = self._trained(
            self._children,
            self._in_shards(plan.generation, Phase.TRAIN_CHILDREN, self._nurseries, places),
            "train_children",
            arguments,
            progress,
        )
        return losses, mutated

    def _trained(
        self,
        members: list[_Held | None],
        shards: dict[int, Shard],
        method: str,
        arguments: Any,
        progress: Progress | None,
    ) -> list[np.ndarray]:
        """Runs a method for each shard, and commits what each member became, once."""
        tasks = {}
        for number, shard in shards.items():

            def of_shard(shard: Shard = shard) -> list[Any]:
                return arguments(shard)

            tasks[number] = Task(number, method, of_shard, returns=1 + 3 * len(shard.places))
        self._run(list(tasks.values()))
        values: list[np.ndarray] = []
        for number, shard in shards.items():
            task = tasks[number]
            for index, place in enumerate(shard.places):
                weights, state, optimizer = task.rest[3 * index : 3 * index + 3]
                members[place] = _Held(weights, state, optimizer, home=number, node=task.node)
            for column, value in enumerate(task.first):
                if column == len(values):
                    values.append(np.zeros(self._size, value.dtype))
                values[column][shard.places] = value
        if progress is not None:
            progress.add(progress.steps // 2, values[0])
        return values

    def _fitness(
        self, generation: int, phase: Phase, groups: list[list[_Held | None]]
    ) -> list[np.ndarray]:
        tasks = []
        for group, members in enumerate(groups):
            homes = [_there(member).home for member in members]
            for number, shard in self._in_shards(generation, phase, homes).items():

                def arguments(shard: Shard = shard, members: list = members) -> list[Any]:
                    there = [_there(members[place]) for place in shard.places]
                    return [shard, *[part for m in there for part in (m.weights, m.state)]]

                tasks.append((group, shard, Task(number, "fitness", arguments)))
        self._run([task for *_, task in tasks])
        losses = [np.zeros(self._size, tasks[0][2].first.dtype) for _ in groups]
        for group, shard, task in tasks:
            losses[group][shard.places] = task.first
        return losses

    def _in_shards(
        self,
        generation: int,
        phase: Phase,
        homes: Sequence[int],
        places: Sequence[int] | None = None,
    ) -> dict[int, Shard]:
        shards = {}
        for number in range(self._shards):
            own = [p for p in places or range(self._size) if homes[p] == number]
            if own:
                shards[number] = Shard(generation, phase, own)
        return shards

    # --- what gets lost -----------------------------------------------------------

    def _run(self, tasks: list[Task]) -> None:
        while True:
            try:
                self._pool.run(tasks)
                return
            except LostError:
                if self._replaying:
                    raise
                self._restore()

    def _restore(self) -> None:
        """Makes again what was on nodes that are gone."""
        lost = self._lost(self._survivors)
        if lost and self._past:
            self._replay()
        else:
            for place in lost:
                self._survivors[place] = self._put(place)
        lost = self._lost(self._parents)
        if lost:
            self._train_parents(self._generation, lost)
        lost = self._lost(self._children)
        if lost:
            self._train_children(lost)

    def _replay(self) -> None:
        """Goes from the copy of the survivors through the generations since then."""
        now = self._generation, self._plan, self._homes, self._nurseries
        members = self._parents, self._children
        self._replaying = True
        while True:
            try:
                self._survivors = [self._put(place) for place in range(self._size)]
                for past in self._past:
                    self._plan, self._homes, self._nurseries, places = past
                    self._parents, self._children = [None] * self._size, [None] * self._size
                    self._train_parents(self._plan.generation, range(self._size))
                    self._train_children(range(self._size))
                    everyone = [*self._parents, *self._children]
                    self._survivors = [_there(everyone[place]) for place in places]
                break
            except LostError:
                continue  # one more node left
        self._replaying = False
        self._generation, self._plan, self._homes, self._nurseries = now
        self._parents, self._children = members

    def _lost(self, members: Sequence[_Held | None]) -> list[int]:
        nodes = alive_nodes()
        return [p for p, m in enumerate(members) if m is not None and m.node not in nodes]

    # --- in and out of the cluster -------------------------------------------------

    def _put(self, place: int) -> _Held:
        """A member's copy, back in the cluster."""
        own = tf.nest.map_structure(lambda array: array[place], self._kept)
        return _Held(
            ray.put(own.weights),
            ray.put(own.state),
            ray.put((own.optimizer, own.updates)),
            home=place // self._capacity,
            node=this_node(),
        )

    def _keep(self) -> None:
        """Takes a copy of the survivors."""
        parts = self._got(self._survivors)
        weights, state = ([np.stack(a) for a in zip(*(p[of] for p in parts), strict=True)]
                          for of in (0, 1))  # fmt: skip
        optimizer, updates = tf.nest.map_structure(
            lambda *arrays: np.stack(arrays), *(own[2] for own in parts)
        )
        self._kept = Members(weights, state, optimizer, updates)
        self._past = []
        self._moved["bytes_kept"] += self._size * self._bytes_of_a_member()

    def _got(self, members: Sequence[_Held]) -> list[tuple[Any, ...]]:
        references = [part for m in members for part in (m.weights, m.state, m.optimizer)]
        parts = ray.get(references, timeout=600)
        return [tuple(parts[3 * index : 3 * index + 3]) for index in range(len(members))]

    def _bytes_of_a_member(self) -> int:
        return self._bytes_of(self._kept)

    def _bytes_of(self, arrays: Any) -> int:
        return sum(array.nbytes for array in tf.nest.flatten(arrays)) // self._size


def _there(member: _Held | None) -> _Held:
    assert member is not None
    return member


def _as_bytes(model: keras.Model) -> bytes:
    try:
        return cloudpickle.dumps(model)
    except Exception as error:  # whatever saving a model may raise
        raise ValueError(
            f"The model '{model.name}' cannot be sent to workers. Expected one that can be saved: "
            "its layers, loss and metrics with a `get_config`. Received this error: "
            f"{type(error).__name__}: {error}"
        ) from error
