"""What a cluster gains and costs: workers side by side, and an estimate for a large one.

python -m benchmarks.ray_scale                  # both
python -m benchmarks.ray_scale workers          # one worker against two, on this machine
python -m benchmarks.ray_scale estimate         # what 100 nodes would take
"""

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_gdopt as gdopt
from benchmarks.population import BATCH, cnn, compiled, data
from benchmarks.side_by_side import HEADER, Contender, Work, environment, measure, rows
from keras_gdopt.gadam.cluster import placement
from keras_gdopt.gadam.cluster.pool import connect

MEMBERS, STEPS = 8, 20
# The cluster to estimate.
NODES, POPULATION, WEIGHTS, GIGABITS = 100, 1_000, 10**8, 10
# Tasks of a worker in a generation: train parents, judge them, train children, and two to select
# survivors.
TASKS = 5


def generations_of_cnn(workers: int) -> Contender:
    """Whole generations on workers with one thread each."""

    def make() -> Callable[[], object]:
        x, y = data()
        engine = gdopt.RayEngine(workers)
        gadam = gdopt.Gadam(compiled(cnn, gdopt.Adam()), MEMBERS, seed=0, engine=engine)
        return lambda: gadam.fit(
            x, y, generations=1, steps_per_epoch=STEPS, batch_size=BATCH, verbose=0
        )

    name = f"{workers} worker{'s' * (workers > 1)} of one thread"
    return Contender(name, make, steps=2 * MEMBERS * STEPS)


def workers() -> None:
    """One worker against two."""
    contenders = [generations_of_cnn(1), generations_of_cnn(2)]
    work = Work(f"CNN, g = {MEMBERS}", contenders, bounds={contenders[1].name: 0.6})
    measure(work, repetitions=4)
    print(f"{HEADER}\n{rows(work)}\n", flush=True)


def generations_of_one_step(members: int, units: int) -> Contender:
    """Generations whose time is nearly all overhead of the cluster."""

    def make() -> Callable[[], object]:
        model = keras.Sequential([keras.Input((7,)), keras.layers.Dense(units)])
        model.add(keras.layers.Dense(1))
        model.compile(gdopt.Adam(), "mse")
        x, y = np.ones((8, 7), "float32"), np.ones((8, 1), "float32")
        gadam = gdopt.Gadam(model, members, seed=0, engine=gdopt.RayEngine(2))
        return lambda: gadam.fit(x, y, generations=1, batch_size=8, verbose=0)

    return Contender(f"g = {members}, d = {9 * units + 1:,}", make)


def estimate() -> None:
    """Estimates a large cluster from the costs of a task, a member and a weight on this machine."""
    few, more, wide = contenders = [
        generations_of_one_step(4, 1),
        generations_of_one_step(32, 1),
        generations_of_one_step(4, 60_000),
    ]
    work = Work("a generation of one step, two workers", contenders)
    measure(work, repetitions=8)
    print(f"{HEADER}\n{rows(work)}\n", flush=True)
    a_member = max((more.median - few.median) / (28 / 2), 0.0)  # on each of two workers
    a_task = max((few.median - 2 * a_member) / TASKS, 0.0)
    a_weight = (wide.median - few.median) / (2 * 9 * 60_000)

    rng = np.random.default_rng(0)
    parent_shards = (np.arange(POPULATION) % NODES).tolist()
    parents = rng.integers(0, POPULATION, (POPULATION, 2)).tolist()
    child_shards = placement.of_children(parents, parent_shards, NODES, POPULATION // NODES)
    away = sum(
        len({parent for parent in pair if parent_shards[parent] != shard})
        for pair, shard in zip(parents, child_shards, strict=True)
    )

    own = POPULATION // NODES
    moved = away * WEIGHTS * 4
    kept = POPULATION * WEIGHTS * 4 * 3
    seconds = {
        "tasks, one after the other in the driver": NODES * TASKS * a_task,
        "members of a node, besides their weights": own * a_member,
        "copying, breeding and one step of a node's members": own * WEIGHTS * a_weight,
        f"the other parents' weights, at {GIGABITS} Gbit/s": moved / NODES / (GIGABITS / 8 * 1e9),
        f"survivors to shared storage, at {GIGABITS} Gbit/s": kept / NODES / (GIGABITS / 8 * 1e9),
    }
    print(
        f"Measured here: {a_task * 1e3:.1f} ms a task, {a_member * 1e3:.2f} ms a member, "
        f"{a_weight * 1e9:.1f} ns a weight of a member.\n\n"
        f"**Estimate**, not measured: g = {POPULATION:,}, d = {WEIGHTS:,} on {NODES} nodes, Adam, "
        "a generation of one step\n\n| part | seconds | bytes |\n| --- | ---: | ---: |"
    )
    sizes = [0, 0, 0, moved, kept]
    for (part, value), size in zip(seconds.items(), sizes, strict=True):
        print(f"| {part} | {value:.1f} | {f'{size / 1e9:.0f} GB' if size else ''} |")
    ratio = moved / (POPULATION * WEIGHTS * 4)
    print(
        f"| all, nothing at the same time | {sum(seconds.values()):.1f} | |\n\n"
        f"Breeding moves {ratio:.3f} g d 4 bytes. A node holds survivors, parents and children, "
        f"{3 * own * WEIGHTS * 4 * 3 / 1e9:.0f} GB."
    )


PARTS = {"workers": workers, "estimate": estimate}


def main() -> None:
    """Runs the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", help=f"any of {', '.join(PARTS)}; default: both")
    parts = parser.parse_args().part or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part named {sorted(unknown)}; expected any of {list(PARTS)}")
    print(f"{environment()}\n")
    connect(None, cpus=9)  # enough for all populations; one trains at a time
    for part in parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
