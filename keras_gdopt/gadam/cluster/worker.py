"""The process of a worker, which trains shards and keeps no members between its tasks."""

import os
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import ray
import tensorflow as tf

from keras_gdopt.gadam import population
from keras_gdopt.gadam.breeding import Breeding, Plan
from keras_gdopt.gadam.cluster import member_files
from keras_gdopt.gadam.cluster.member_parts import (
    Arrays,
    ChildParts,
    JudgedParts,
    MemberParts,
    pack,
    parts_of_member,
    unpack,
)
from keras_gdopt.gadam.data import DataArguments
from keras_gdopt.gadam.hyperparameters import Values
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.population import Members
from keras_gdopt.gadam.training import Fitness, Training


class Setup(NamedTuple):
    """What a worker needs to start."""

    model: bytes
    custom_objects: bytes
    initializer: bytes
    start: str
    engine: str
    capacity: int
    breeding: dict[str, Any]
    fitness: Fitness
    seed: int
    floatx: str


class Shard(NamedTuple):
    """The members that a worker trains together in one phase of a generation."""

    generation: int
    phase: Phase
    places: list[int]
    """Places in the population or, for children, in their order."""
    learning_rates: list[float | None]
    """See `Engine.learning_rates`."""
    hyperparameters: Values
    """The members' values, in the order of `places`."""


class Worker:
    """An actor whose results depend on the arguments of its methods alone.

    Methods that train return the losses of a shard first, then the `MemberParts` of each
    member. Shards smaller than a worker's capacity are filled up with copies of a member, so
    that nothing is compiled twice.
    """

    def __init__(self, threads: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)

    def start(self, setup: Setup) -> int:
        """Builds the model and what trains it; returns the process id."""
        keras.config.set_floatx(setup.floatx)
        keras.saving.get_custom_objects().update(pickle.loads(setup.custom_objects))
        self._model = pickle.loads(setup.model)
        self._initializer = pickle.loads(setup.initializer)
        self._start = setup.start
        self._seed = setup.seed
        self._training = Training(
            self._model,
            setup.engine,
            setup.capacity,
            breeding=Breeding(**setup.breeding, seed=setup.seed),
            fitness=setup.fitness,
            seed=setup.seed,
        )
        return os.getpid()

    def node(self) -> str:
        """The node that the worker runs on."""
        return ray.get_runtime_context().get_node_id()

    def use(self, arguments: DataArguments) -> None:
        """Makes the data that a `fit` uses."""
        self._data = arguments.made()

    # --- initial and stored members --------------------------------------------

    def new_members(self, places: Sequence[int]) -> tuple[Any, ...]:
        """Draws the initial members of some places; the first value is `None`."""
        fresh = self._fresh()
        members = []
        for place in places:
            weights, state = population.new_member(
                self._model, place, self._seed, self._initializer, self._start
            )
            members.append(MemberParts(weights, state, fresh))
        return (None, *pack(members))

    def write(self, paths: Sequence[str], *parts: Arrays) -> None:
        """Writes members; `parts` are their `MemberParts`."""
        for path, member in zip(paths, unpack(MemberParts, parts), strict=True):
            member_files.write(path, tuple(member))

    def read(self, paths: Sequence[str]) -> tuple[Any, ...]:
        """Reads members that were written; the first value is `None`."""
        like = (
            list(self._model.trainable_variables),
            list(self._model.non_trainable_variables),
            self._fresh(),
        )
        members = [MemberParts(*member_files.read(path, like)) for path in paths]
        return (None, *pack(members))

    # --- training and judging --------------------------------------------------

    def train_parents(self, shard: Shard, *parts: Arrays) -> tuple[Any, ...]:
        """Trains members; `parts` are their `MemberParts`."""
        weights, state, (optimizer, batches) = self._stack(unpack(MemberParts, parts))
        return self._train(Members(weights, state, optimizer, batches), shard, ())

    def train_children(self, shard: Shard, plan: Plan, *parts: Arrays) -> tuple[Any, ...]:
        """Breeds and trains children; `parts` are their `ChildParts`."""
        first, second, state, inherited = self._stack(unpack(ChildParts, parts))
        places = self._fill_up(shard.places)
        children, mutated = self._training.children(plan, first, second, state, inherited, places)
        return self._train(children, shard, (mutated[: len(shard.places)],))

    def fitness(self, shard: Shard, *parts: Arrays) -> np.ndarray:
        """The fitness losses of members; `parts` are their `JudgedParts`."""
        weights, state = self._stack(unpack(JudgedParts, parts))
        members = Members(weights, state, None, None)
        losses = self._training.fitness(members, shard.generation, shard.phase, self._data)
        return losses[: len(shard.places)]

    # --- steps of these methods --------------------------------------------------

    def _train(self, members: Members, shard: Shard, more: tuple[Any, ...]) -> tuple[Any, ...]:
        count = len(shard.places)
        self._training.engine.set_learning_rates(shard.learning_rates)
        members, losses = self._training.trained(
            members,
            self._fill_up(shard.places),
            shard.generation,
            shard.phase,
            {n: np.array(self._fill_up(list(v))) for n, v in shard.hyperparameters.items()},
            self._data,
        )
        arrays = tf.nest.map_structure(lambda value: value.numpy(), members)
        trained = [parts_of_member(arrays, index) for index in range(count)]
        return ((losses[:count], *more), *pack(trained))

    def _fresh(self) -> tuple[Any, np.ndarray]:
        """The optimizer's state and the batch count of a member that was never trained."""
        fresh = self._training.engine.fresh_optimizer_state(1)
        return tf.nest.map_structure(lambda value: value.numpy()[0], fresh), np.zeros((), "int64")

    def _fill_up(self, parts: Sequence[Any]) -> list[Any]:
        missing = self._training.count - len(parts)
        return [*parts, *[parts[0]] * missing]

    def _stack(self, members: Sequence[Any]) -> list[Any]:
        """Stacks each part of all members; `None` for a part that they do not have."""

        def stack(parts: Sequence[Arrays]) -> Any:
            if parts[0] is None:
                return None
            return tf.nest.map_structure(lambda *arrays: tf.constant(np.stack(arrays)), *parts)

        return [stack(parts) for parts in zip(*self._fill_up(members), strict=True)]
