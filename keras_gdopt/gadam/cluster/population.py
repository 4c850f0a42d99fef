"""A population whose members are kept and trained in the workers of a Ray cluster."""

import math
import pickle
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import keras
import numpy as np
import ray
import tensorflow as tf
from ray import cloudpickle, exceptions

from keras_gdopt.gadam import population
from keras_gdopt.gadam.breeding import Breeding, Plan
from keras_gdopt.gadam.checkpoint import PopulationCheckpoint
from keras_gdopt.gadam.cluster import member_files, placement
from keras_gdopt.gadam.cluster.engine import RayEngine
from keras_gdopt.gadam.cluster.member_parts import (
    ChildParts,
    JudgedParts,
    MemberParts,
    pack,
)
from keras_gdopt.gadam.cluster.origin import FromKeys, Held, InDirectory, InDriver
from keras_gdopt.gadam.cluster.pool import LostError, Pool, Task, alive_nodes, connect
from keras_gdopt.gadam.cluster.worker import Setup, Shard
from keras_gdopt.gadam.data import DataArguments, GenerationData
from keras_gdopt.gadam.engine import Engine
from keras_gdopt.gadam.hyperparameters import Values
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.population import Members
from keras_gdopt.gadam.progress import Progress
from keras_gdopt.gadam.training import Fitness

# Seconds to wait for members to arrive here, and for Ray to notice that a node has left.
_TO_GET, _TO_SEE = 600.0, 60.0


@dataclass(frozen=True)
class RayGeneration:
    """The record of a generation, enough to repeat it from the survivors that it starts with."""

    number: int
    learning_rates: list[float | None]
    parent_shards: list[int]
    """The shard of each parent."""
    hyperparameters: Values = field(default_factory=dict)
    """Those of each parent; `inherited` holds those of each child."""
    inherited: Values = field(default_factory=dict)
    plan: Plan | None = None
    child_shards: list[int] = field(default_factory=list)
    """The shard of each child."""
    places: Sequence[int] = ()
    """The survivors among parents and children, see `genetics.surviving`."""
    parents: list[Held | None] = field(default_factory=list)
    children: list[Held | None] = field(default_factory=list)

    def begin(self) -> "RayGeneration":
        """A copy without the members."""
        nobody: list[Held | None] = [None] * len(self.parent_shards)
        return replace(self, parents=list(nobody), children=list(nobody))

    def survivors(self) -> list[Held]:
        """The members that the generation ends with."""
        everyone = [*self.parents, *self.children]
        return [_require(everyone[place]) for place in self.places]


class RayPopulation:
    """A `Population` whose members are in the workers of a Ray cluster.

    Members are assigned to shards, not to workers: a shard has the same members whichever
    worker trains it, so that no fault changes a result. What workers return stays on their
    nodes. The survivors of every n-th generation are copied to where no worker can lose them.
    From this copy and the plans since then, everything that is lost with a node can be made
    again.

    Args:
        engine: The user's settings of the cluster.
        model: The compiled and built model.
        inner_engine: The engine of each worker, `"stacked"` or `"mapped"`.
        size: The number of members.
        initializer: See `population.new_member`.
        start: See `population.new_member`.
        breeding: The arguments of `Breeding`, except the seed.
        fitness: What members are judged by.
        seed: The seed of the run.
    """

    def __init__(
        self,
        engine: RayEngine,
        model: keras.Model,
        inner_engine: str,
        size: int,
        *,
        initializer: Any,
        start: str,
        breeding: dict[str, Any],
        fitness: Fitness,
        seed: int,
    ) -> None:
        self._size = size
        self._model = model
        self._breeding = Breeding(**breeding, seed=seed)
        self._shards = min(engine.num_workers, size)
        self._capacity = math.ceil(size / self._shards)
        self._safekeeping_freq = engine.safekeeping_freq
        self._in_files = engine.safekeeping == "checkpoint_dir"
        # Trains nothing: it is needed for the optimizer's state and learning rates.
        self._engine = Engine(model, 1, inner_engine)
        connect(engine.address, self._shards * engine.threads_per_worker)
        setup = Setup(
            model=_as_bytes(model),
            custom_objects=cloudpickle.dumps(dict(keras.saving.get_custom_objects())),
            initializer=cloudpickle.dumps(initializer),
            start=start,
            engine=inner_engine,
            capacity=self._capacity,
            breeding=breeding,
            fitness=fitness,
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
        self._generations = 0
        """How many have ended."""
        self._committed: list[int] = []
        """The generations of the checkpoints."""
        homes = [place // self._capacity for place in range(size)]
        self._start_from(FromKeys(self._pool, homes))

    # --- the survivors and their copy ------------------------------------------

    @property
    def members(self) -> Members:
        """The survivors of the last generation, as arrays in this process."""
        if not self._in_files:
            self._back_up()
        if isinstance(self._origin, InDriver):
            return self._origin.members
        return self._fetch_all()

    def _start_from(self, origin: FromKeys | InDriver | InDirectory) -> None:
        self._origin = origin
        self._past: list[RayGeneration] = []
        self._survivors: list[Held] = []

    def _begin(self) -> None:
        """Puts the survivors into the cluster, unless they are already there."""
        if not self._survivors:
            self._survivors = self._retry_after_losses(lambda: self._origin.held(range(self._size)))

    def _back_up(self) -> None:
        """Copies the survivors, unless they have been copied already."""
        self._begin()
        wanted = InDirectory if self._in_files else InDriver
        if self._past or not isinstance(self._origin, wanted):
            self._origin = self._retry_after_losses(self._copy_survivors)
            self._past = []
            self._moved["bytes_kept"] += self._size * sum(self._bytes_of_a_member())
            self._remove_old_files()

    def _copy_survivors(self) -> InDriver | InDirectory:
        homes = [member.home for member in self._survivors]
        if not self._in_files:
            return InDriver(self._fetch_all(), homes)
        files = InDirectory(self._pool, self._directory, self._generations, homes)
        files.write(self._survivors)
        return files

    def _remove_old_files(self) -> None:
        """Removes files that neither the checkpoints nor this run need."""
        if isinstance(self._origin, InDirectory):
            needed = [*self._committed, self._origin.generation]
            member_files.remove_all_but(self._directory, needed)

    def use(
        self, data: GenerationData, arguments: DataArguments, directory: str | None = None
    ) -> None:
        """Trains and judges with this data from now on."""
        del data  # made for this process; each worker makes its own
        if self._past:
            self._back_up()  # past generations could not be repeated with other data
        self._directory = str(directory)
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

    def train_parents(
        self, generation: int, progress: Progress, hyperparameters: Values
    ) -> tuple[RayGeneration, np.ndarray]:
        """See `Population.train_parents`."""
        self._begin()
        old = [member.home for member in self._survivors]
        homes = placement.balanced(old, self._shards, self._capacity)
        moved = sum(home != before for home, before in zip(homes, old, strict=True))
        self._moved["bytes_rebalanced"] += moved * sum(self._bytes_of_a_member())
        now = RayGeneration(generation, self._engine.learning_rates(), homes, hyperparameters)
        now = now.begin()
        return now, self._train_parents(now, range(self._size), progress)

    def parents_fitness(self, generation: RayGeneration) -> np.ndarray:
        """See `Population.parents_fitness`."""
        (losses,) = self._fitness(generation, Phase.FITNESS, [generation.parents])
        return losses

    def train_children(
        self, generation: RayGeneration, plan: Plan, progress: Progress, hyperparameters: Values
    ) -> tuple[RayGeneration, np.ndarray, np.ndarray]:
        """See `Population.train_children`."""
        now = replace(generation, plan=plan, inherited=hyperparameters)
        sources = self._breeding.sources(plan).tolist()
        child_shards = placement.of_children(
            sources, now.parent_shards, self._shards, self._capacity
        )
        now = replace(now, child_shards=child_shards)
        weights, state, optimizer = self._bytes_of_a_member()
        if self._breeding.inherits_optimizer_state:
            state += optimizer
        for child, shard in enumerate(now.child_shards):
            away = {parent for parent in sources[child] if now.parent_shards[parent] != shard}
            self._moved["bytes_moved"] += len(away) * weights
            self._moved["bytes_moved"] += (int(plan.fitter[child]) in away) * state
        return now, *self._train_children(now, range(self._size), progress)

    def survival_fitness(self, generation: RayGeneration) -> tuple[np.ndarray, np.ndarray]:
        """See `Population.survival_fitness`."""
        groups = [generation.parents, generation.children]
        parents, children = self._fitness(generation, Phase.SURVIVAL, groups)
        return parents, children

    def select(self, generation: RayGeneration, places: np.ndarray) -> None:
        """See `Population.select`."""
        now = replace(generation, places=places.tolist())
        self._survivors = now.survivors()
        self._past.append(replace(now, parents=[], children=[]))
        self._generations = now.number + 1
        if self._generations % self._safekeeping_freq == 0:
            self._back_up()

    def diversity(self) -> float:
        """The mean distance between two members' weights; NaN if they are not in this process."""
        if self._past or not isinstance(self._origin, InDriver):
            return math.nan
        return float(self._diversity([tf.constant(a) for a in self._origin.members.weights]))

    def load(self, place: int, model: keras.Model) -> None:
        """Puts a member into a model, including its optimizer's state."""
        self._begin()
        ((weights, state, (optimizer, batches)),) = self._retry_after_losses(
            lambda: self._fetch([place])
        )
        population.fill(model, weights, state)
        alone = tf.nest.map_structure(
            lambda value: tf.constant(value)[None], Members(weights, state, optimizer, batches)
        )
        self._engine.load_optimizer(alone, 0, model.optimizer)

    def report(self) -> dict[str, Any]:
        """What has moved, and what has happened to workers, since the last report."""
        report = {**self._moved, "events": self._pool.events}
        self._moved = dict.fromkeys(self._moved, 0)
        self._pool.events = []
        return report

    # --- checkpoints -----------------------------------------------------------

    def save(self, checkpoint: PopulationCheckpoint, record: dict[str, Any]) -> None:
        """Writes the survivors and the record of the run."""
        self._back_up()
        members = _NONE if self._in_files else self.members
        homes = [member.home for member in self._survivors]
        checkpoint.save(members, {**record, "homes": homes})
        self._committed = [*self._committed, record["generation"]][-2:]
        self._remove_old_files()

    def restore(self, checkpoint: PopulationCheckpoint) -> dict[str, Any] | None:
        """Continues with the saved survivors; returns the record saved with them, if any."""
        saved = checkpoint.restore(_NONE if self._in_files else self._like(self._size))
        if saved is None:
            return None
        generation = saved.record["generation"]
        homes = saved.record.get("homes", [])
        if len(homes) != self._size or max(homes) >= self._shards:  # saved with another engine
            homes = [place // self._capacity for place in range(self._size)]
        if self._in_files:
            self._committed = [generation]
            self._start_from(InDirectory(self._pool, self._directory, generation, homes))
        else:
            self._start_from(InDriver(tf.nest.map_structure(np.asarray, saved.members), homes))
        self._generations = generation
        return saved.record

    # --- what workers do ---------------------------------------------------------

    def _train_parents(
        self, generation: RayGeneration, places: Sequence[int], progress: Progress | None = None
    ) -> np.ndarray:
        def arguments(shard: Shard) -> list[Any]:
            return [shard, *pack([self._survivors[place].parts for place in shard.places])]

        return self._trained(
            generation,
            generation.parents,
            self._in_shards(
                generation,
                Phase.TRAIN_PARENTS,
                generation.parent_shards,
                places,
                generation.hyperparameters,
            ),
            "train_parents",
            arguments,
            progress,
        )[0]

    def _train_children(
        self, generation: RayGeneration, places: Sequence[int], progress: Progress | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        plan, parents = _require(generation.plan), generation.parents
        sources = self._breeding.sources(plan)

        def arguments(shard: Shard) -> list[Any]:
            return [shard, plan, *pack([child_parts(child) for child in shard.places])]

        def child_parts(child: int) -> ChildParts:
            first, second = (_require(parents[parent]).parts for parent in sources[child])
            fitter = _require(parents[plan.fitter[child]]).parts
            inherits = self._breeding.inherits_optimizer_state
            optimizer = fitter.optimizer if inherits else None
            return ChildParts(first.weights, second.weights, fitter.state, optimizer)

        losses, mutated = self._trained(
            generation,
            generation.children,
            self._in_shards(
                generation,
                Phase.TRAIN_CHILDREN,
                generation.child_shards,
                places,
                generation.inherited,
            ),
            "train_children",
            arguments,
            progress,
        )
        return losses, mutated

    def _trained(
        self,
        generation: RayGeneration,
        members: list[Held | None],
        shards: dict[int, Shard],
        method: str,
        arguments: Callable[[Shard], list[Any]],
        progress: Progress | None,
    ) -> list[np.ndarray]:
        """Runs a method for each shard, and then stores what each member became, once."""
        tasks = {
            number: Task(number, method, partial(arguments, shard), members=len(shard.places))
            for number, shard in shards.items()
        }
        self._retry_after_losses(lambda: self._pool.run(list(tasks.values())), generation)
        values: list[np.ndarray] = []
        for number, shard in shards.items():
            task = tasks[number]
            for place, parts in zip(shard.places, task.members(), strict=True):
                members[place] = Held(parts, home=number, node=task.node)
            for column, value in enumerate(task.first):
                if column == len(values):
                    values.append(np.zeros(self._size, value.dtype))
                values[column][shard.places] = value
        if progress is not None:
            progress.add(progress.steps // 2, values[0])
        return values

    def _fitness(
        self, generation: RayGeneration, phase: Phase, groups: list[list[Held | None]]
    ) -> list[np.ndarray]:
        tasks = []
        for group, members in enumerate(groups):
            homes = [_require(member).home for member in members]
            shards = self._in_shards(generation, phase, homes, range(self._size))
            for number, shard in shards.items():

                def arguments(shard: Shard = shard, members: list = members) -> list[Any]:
                    judged = [_require(members[place]).parts for place in shard.places]
                    return [shard, *pack([JudgedParts(m.weights, m.state) for m in judged])]

                tasks.append((group, shard, Task(number, "fitness", arguments)))
        self._retry_after_losses(lambda: self._pool.run([task for *_, task in tasks]), generation)
        losses = [np.zeros(self._size, tasks[0][2].first.dtype) for _ in groups]
        for group, shard, task in tasks:
            losses[group][shard.places] = task.first
        return losses

    def _in_shards(
        self,
        generation: RayGeneration,
        phase: Phase,
        homes: Sequence[int],
        places: Sequence[int],
        hyperparameters: Values | None = None,
    ) -> dict[int, Shard]:
        shards = {}
        for number in range(self._shards):
            own = [place for place in places if homes[place] == number]
            if own:
                values = {name: of[own] for name, of in (hyperparameters or {}).items()}
                shards[number] = Shard(
                    generation.number, phase, own, generation.learning_rates, values
                )
        return shards

    # --- members that are lost ------------------------------------------------------

    def _retry_after_losses(
        self, work: Callable[[], Any], generation: RayGeneration | None = None
    ) -> Any:
        """Repeats work that needs members until no node leaves with some of them.

        Args:
            work: A function without arguments.
            generation: The generation that is being made, if there is one.
        """
        while True:
            try:
                return work()
            except LostError as error:
                if self._replaying:
                    raise
                self._restore(error, generation or RayGeneration(-1, [], []))

    def _restore(self, error: LostError, now: RayGeneration) -> None:
        """Rebuilds what was on nodes that have left."""
        until = time.monotonic() + _TO_SEE
        while not any(
            lost := [self._find_lost(held) for held in (self._survivors, now.parents, now.children)]
        ):
            if time.monotonic() > until:
                raise RuntimeError(
                    "Ray lost what a worker returned, though all nodes are there. The last "
                    f"checkpoint is kept. Ray says: {error}"
                ) from error
            time.sleep(0.5)
        survivors, parents, children = lost
        self._pool.note(
            f"A node left, and {len(survivors)} survivors, {len(parents)} parents and "
            f"{len(children)} children with it. What is needed of them is made again."
        )
        all_trained = bool(now.parents) and not parents and None not in now.parents
        if survivors and not all_trained:
            if self._past:
                self._replay()
            else:
                for place, member in zip(survivors, self._origin.held(survivors), strict=True):
                    self._survivors[place] = member
        if parents:
            self._train_parents(now, parents)
        if children:
            self._train_children(now, children)

    def _replay(self) -> None:
        """Repeats the generations since the copy of the survivors."""
        everyone = range(self._size)
        self._replaying = True
        while self._replaying:
            try:
                self._survivors = self._origin.held(everyone)
                for past in self._past:
                    again = past.begin()
                    self._train_parents(again, everyone)
                    self._train_children(again, everyone)
                    self._survivors = again.survivors()
                self._replaying = False
            except LostError:
                continue  # another node has left

    def _find_lost(self, members: Sequence[Held | None]) -> list[int]:
        nodes = alive_nodes()
        return [p for p, m in enumerate(members) if m is not None and m.node not in nodes]

    # --- members in this process ---------------------------------------------------

    def _fetch(self, places: Sequence[int]) -> list[MemberParts]:
        """Fetches survivors into this process."""
        held = [self._survivors[place] for place in places]
        try:
            return [MemberParts(*ray.get(list(member.parts), timeout=_TO_GET)) for member in held]
        except exceptions.ObjectLostError as error:
            raise LostError(str(error)) from error

    def _fetch_all(self) -> Members:
        """Fetches all survivors into this process, stacked."""
        parts = self._fetch(range(self._size))
        weights, state, (optimizer, batches) = tf.nest.map_structure(
            lambda *arrays: np.stack(arrays), *parts
        )
        return Members(weights, state, optimizer, batches)

    def _like(self, size: int) -> Members:
        """The shapes and types of stacked members."""
        weights, state = (
            [
                tf.TensorSpec((size, *v.shape), keras.backend.standardize_dtype(v.dtype))
                for v in variables
            ]
            for variables in (self._model.trainable_variables, self._model.non_trainable_variables)
        )
        optimizer = tf.nest.map_structure(
            lambda v: tf.TensorSpec((size, *v.shape[1:]), v.dtype),
            self._engine.fresh_optimizer_state(1),
        )
        return Members(weights, state, optimizer, tf.TensorSpec((size,), tf.int64))

    def _bytes_of_a_member(self) -> tuple[int, int, int]:
        """The bytes of its weights, its state and its optimizer's state."""
        like = self._like(1)
        weights, state, optimizer = (
            sum(spec.shape.num_elements() * spec.dtype.size for spec in tf.nest.flatten(part))
            for part in (like.weights, like.state, [like.optimizer, like.batches])
        )
        return weights, state, optimizer


_NONE = Members([], [], [], [])
"""What a checkpoint holds instead of members that are in files of their own."""


def _require(value: Any) -> Any:
    """A value that must have been set by now."""
    assert value is not None
    return value


def _as_bytes(model: keras.Model) -> bytes:
    try:
        return cloudpickle.dumps(model)
    except Exception as error:  # saving a model may raise anything
        raise ValueError(
            f"The model '{model.name}' cannot be sent to workers. Expected one that can be saved: "
            "its layers, loss and metrics with a `get_config`. Received this error: "
            f"{type(error).__name__}: {error}"
        ) from error
