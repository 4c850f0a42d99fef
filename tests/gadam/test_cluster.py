"""A population in the workers of a Ray cluster: the same results, whatever happens."""

import gc
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.gadam import PopulationCallback
from keras_gdopt.gadam.data import DataArguments
from tests.callbacks.test_event_files import read
from tests.gadam import models

pytest.importorskip("ray")

SIZE, SEED, GENERATIONS = 6, 3, 3
METHODS = ["train_parents", "fitness", "train_children"]


class Noted(PopulationCallback):
    def __init__(self):
        super().__init__()
        self.logs = []

    def on_generation_end(self, generation, logs=None):
        self.logs.append(logs)


def _run(
    engine,
    name="dense",
    *,
    optimizer=None,
    data=None,
    size=SIZE,
    callbacks=(),
    of_gadam=None,
    **kwargs,
):
    """A population after `GENERATIONS`; its callback has what it told."""
    keras.utils.set_random_seed(1)
    model = getattr(models, name)()
    model.compile(optimizer or gdopt.Adam(0.02), "mse", metrics=["mse"])
    settings = {"mutation_rate": 0.1, "seed": SEED, **(of_gadam or {})}
    gadam = gdopt.Gadam(model, size, engine=engine, **settings)
    if data is None:
        x, y = models.samples(np.random.default_rng(0), count=40)
        data = {"x": x, "y": y, "batch_size": 8}
    noted = Noted()
    settings = {"generations": GENERATIONS, "epochs": 2, "verbose": 0, **kwargs}
    gadam.history = gadam.fit(**data, callbacks=[noted, *callbacks], **settings)
    gadam.noted = noted.logs
    return gadam


def _assert_same_run(one, other, rtol=0.0):
    assert list(one.history.history) == list(other.history.history)
    for name, values in one.history.history.items():
        np.testing.assert_allclose(values, other.history.history[name], rtol=rtol, err_msg=name)
    for a, b in zip(one.lineage, other.lineage, strict=True):
        for name in ("parents", "mutated_entries", "heir_of", "hyperparameters", "steps"):
            assert a[name] == b[name]
        assert [s[2] for s in a["selections"]] == [s[2] for s in b["selections"]]
    members = (one._population.members, other._population.members)
    for a, b in zip(*map(tf.nest.flatten, members), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * 1e-2)
    for a, b in zip(one.model.get_weights(), other.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * 1e-2)
    for a, b in zip(one.model.optimizer.variables, other.model.optimizer.variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=rtol, atol=rtol * 1e-2)


# --- the same results --------------------------------------------------------------------


def test_a_cluster_gives_what_one_machine_gives(cluster, float64):
    """Five members in two shards, one of which is filled up; and a second `fit`."""
    local, distributed = (_run(engine, size=5) for engine in ("auto", gdopt.RayEngine(2)))
    _assert_same_run(local, distributed, rtol=1e-8)
    for gadam in (local, distributed):
        x, y = models.samples(np.random.default_rng(1), count=24)
        gadam.history = gadam.fit(x, y, generations=1, batch_size=8, verbose=0)
    _assert_same_run(local, distributed, rtol=1e-8)
    member = distributed.member(1)
    assert int(member.optimizer.iterations) > 0
    size = sum(weight.nbytes for weight in member.get_weights())
    for logs in distributed.noted:
        assert 0 < logs["bytes_moved"] <= 5 * size
        assert logs["bytes_moved"] % size == 0
        assert logs["bytes_kept"] > 5 * 3 * size  # weights and two moments
        assert logs["events"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers"),
    [("dense", 1), ("dense", 4), ("normalization", 2), ("convolution", 2), ("dropout", 4)],
)
def test_any_number_of_workers_gives_the_same(cluster, float64, name, workers):
    _assert_same_run(_run("auto", name), _run(gdopt.RayEngine(workers), name), rtol=1e-8)


@pytest.mark.slow
def test_several_optimizers_are_trained_in_workers(cluster, float64):
    """Each with a rate of its own."""
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this version of Keras has no MultiOptimizer")

    def optimizer():
        schedule = keras.optimizers.schedules.CosineDecay(0.05, 20)
        others = {".*bias": gdopt.Momentum(schedule)}
        optimizers = keras.optimizers.OptimizerMap(gdopt.Adam(0.02), others)
        return keras.optimizers.MultiOptimizer(optimizers)

    local, distributed = (
        _run(engine, optimizer=optimizer()) for engine in ("auto", gdopt.RayEngine(2))
    )
    _assert_same_run(local, distributed, rtol=1e-8)


@pytest.mark.slow
def test_streams_are_made_in_the_workers(cluster, float64):
    def dataset():
        x, y = models.samples(np.random.default_rng(0), count=40)
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(8)

    local = _run("auto", data={"x": dataset()})
    distributed = _run(gdopt.RayEngine(2, data_fn=dataset), data={})
    _assert_same_run(local, distributed, rtol=1e-8)


@pytest.mark.slow
def test_repeated_runs_are_equal_to_the_bit_in_whatever_order_workers_finish(cluster, monkeypatch):
    from keras_gdopt.gadam.cluster.pool import Pool

    first = _run(gdopt.RayEngine(3))
    submit = Pool._submit

    def late(pool, task, number):
        references = submit(pool, task, number)
        if number == 0:  # it begins when the others may have ended
            time.sleep(0.3)
        return references

    monkeypatch.setattr(Pool, "_submit", late)
    _assert_same_run(first, _run(gdopt.RayEngine(3)))


@pytest.mark.slow
def test_callbacks_change_the_learning_rate_of_workers(cluster, float64):
    def run(engine):
        slower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 4)
        return _run(engine, callbacks=[slower])

    _assert_same_run(run("auto"), run(gdopt.RayEngine(2)), rtol=1e-8)


@pytest.mark.slow
def test_an_initializer_draws_in_the_workers_what_it_draws_here(cluster, float64):
    def run(engine):
        initializer = keras.initializers.RandomNormal(stddev=0.3)
        return _run(engine, of_gadam={"initializer": initializer})

    _assert_same_run(run("auto"), run(gdopt.RayEngine(2)), rtol=1e-8)


EVOLVING = {
    "evolve": {"learning_rate": (1e-3, 1e-1), "beta_1": (0.0, 0.9)},
    "crossover": "entries",
    "inherit_optimizer_state": True,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "of_gadam"),
    [
        (1, EVOLVING),
        (2, EVOLVING),
        (4, EVOLVING),
        (2, {**EVOLVING, "crossover": "mean"}),
        (2, {**EVOLVING, "crossover": "fitter", "start": "model", "mutation_rate": 0.0}),
        (2, {"fitness": ("mse", "max")}),
    ],
)
def test_members_evolve_in_workers_as_on_one_machine(cluster, float64, workers, of_gadam):
    local, distributed = (
        _run(engine, of_gadam=of_gadam) for engine in ("auto", gdopt.RayEngine(workers))
    )
    _assert_same_run(local, distributed, rtol=1e-8)
    if of_gadam.get("crossover") == "fitter":  # one parent's weights travel, and what goes with it
        weights, state, optimizer = distributed._population._bytes_of_a_member()
        for logs in distributed.noted:
            assert logs["bytes_moved"] % (weights + state + optimizer) == 0


@pytest.mark.slow
def test_survivors_are_kept_in_files(cluster, float64, tmp_path):
    """The process of `fit` has none of them; only what a resumed run needs stays."""
    local = _run("auto")
    engine = gdopt.RayEngine(2, safekeeping="checkpoint_dir")
    board = gdopt.callbacks.PopulationTensorBoard(tmp_path / "runs")
    distributed = _run(engine, checkpoint_dir=str(tmp_path), callbacks=[board])
    assert np.all(np.isnan(distributed.history.history.pop("diversity")))
    del local.history.history["diversity"]
    _assert_same_run(local, distributed, rtol=1e-8)
    assert sorted(path.name for path in tmp_path.glob("members-*")) == ["members-2", "members-3"]
    assert len(list((tmp_path / "members-3").glob("*.index"))) == SIZE
    tags = read(tmp_path / "runs" / "population")
    assert "population/bytes_kept" in tags
    assert "population/diversity" not in tags
    again = _run(engine, checkpoint_dir=str(tmp_path))  # all is done: it is only loaded
    assert again.noted == []
    for a, b in zip(again.model.get_weights(), local.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)
    with pytest.raises(ValueError, match="members was 'checkpoint_dir' and is 'driver'"):
        _run(gdopt.RayEngine(2), checkpoint_dir=str(tmp_path))
    damaged = tmp_path / "members-3" / "00000.data-00000-of-00001"
    damaged.write_bytes(b"x" * 10)
    with pytest.raises(ValueError, match=r"The member in '.*members-3/00000' cannot be read"):
        _run(engine, checkpoint_dir=str(tmp_path), generations=4)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_breeding_moves_a_member_for_each_child_at_most(cluster, workers):
    gadam = _run(gdopt.RayEngine(workers), "wide", size=16)
    weights = sum(weight.nbytes for weight in gadam.model.get_weights())
    moved = [logs["bytes_moved"] for logs in gadam.noted]
    assert 0 < max(moved) <= 1.1 * 16 * weights
    print(f"{workers} workers: {[round(m / (16 * weights), 3) for m in moved]} of g d 4 bytes")


# --- faults ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faultless(cluster):
    return _run(gdopt.RayEngine(2), of_gadam=EVOLVING)


@pytest.fixture
def committed(monkeypatch):
    """Each generation, phase and member whose results were taken, in their order."""
    from keras_gdopt.gadam.cluster.population import RayPopulation

    taken = []
    trained = RayPopulation._trained

    def noted(population, generation, members, shards, *rest):
        values = trained(population, generation, members, shards, *rest)
        taken.extend((s.generation, s.phase, p) for s in shards.values() for p in s.places)
        return values

    monkeypatch.setattr(RayPopulation, "_trained", noted)
    return taken


def _strike(monkeypatch, method, workers=(0,), how=signal.SIGKILL, generation=1):
    """Signals workers as they begin with a generation's task of one kind, each once."""
    from keras_gdopt.gadam.cluster.pool import Pool

    submit, waiting = Pool._submit, set(workers)

    def struck(pool, task, number):
        references = submit(pool, task, number)
        due = task.method == method and number in waiting
        if due and task.arguments()[0].generation == generation:
            waiting.discard(number)
            pool._timeout = 20.0 if how == signal.SIGSTOP else pool._timeout
            os.kill(pool.processes[number], how)
        return references

    monkeypatch.setattr(Pool, "_submit", struck)
    return waiting


def _assert_recovered(gadam, faultless, committed, faults=1):
    _assert_same_run(faultless, gadam)
    assert len(committed) == len(set(committed)) == 2 * SIZE * GENERATIONS
    events = [event for logs in gadam.noted for event in logs["events"]]
    assert len(events) == faults
    assert all("was lost in" in event and "Replaced in" in event for event in events)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_worker_is_killed(method, faultless, committed, monkeypatch, caplog):
    waiting = _strike(monkeypatch, method)
    gadam = _run(gdopt.RayEngine(2), of_gadam=EVOLVING)
    assert not waiting
    _assert_recovered(gadam, faultless, committed)
    assert "Worker 0 (process" in caplog.text


@pytest.mark.slow
def test_two_workers_are_killed_at_once(faultless, committed, monkeypatch):
    waiting = _strike(monkeypatch, "train_children", workers=(0, 1))
    gadam = _run(gdopt.RayEngine(2), of_gadam=EVOLVING)
    assert not waiting
    _assert_recovered(gadam, faultless, committed, faults=2)


@pytest.mark.slow
def test_a_worker_hangs(faultless, committed, monkeypatch):
    waiting = _strike(monkeypatch, "train_parents", workers=(1,), how=signal.SIGSTOP)
    gadam = _run(gdopt.RayEngine(2), of_gadam=EVOLVING)
    assert not waiting
    _assert_recovered(gadam, faultless, committed)
    (event,) = [event for logs in gadam.noted for event in logs["events"]]
    assert "did not answer within 20 seconds" in event


@pytest.mark.slow
def test_a_worker_is_killed_between_return_and_commit(faultless, committed, monkeypatch):
    from keras_gdopt.gadam.cluster.pool import Pool

    run, killed = Pool.run, []

    def struck(pool, tasks):
        run(pool, tasks)
        if not killed and tasks[0].method == "train_children":
            killed.append(pool.processes[1])
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(Pool, "run", struck)
    gadam = _run(gdopt.RayEngine(2), of_gadam=EVOLVING)
    assert killed
    _assert_recovered(gadam, faultless, committed)


_RUN = """
import os, pickle, signal, sys
import ray
from ray.cluster_utils import Cluster
import keras_gdopt as gdopt
from tests.gadam import test_cluster as here

fault, safekeeping, freq, directory, path = sys.argv[1:]
cluster = None
if fault == "node":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    other = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)

class Strikes(gdopt.gadam.PopulationCallback):
    def on_generation_begin(self, generation, logs=None):
        if fault == "node" and generation == 2:
            cluster.remove_node(other)

    def on_generation_end(self, generation, logs=None):
        if fault == "driver" and generation == 1:
            os.kill(os.getpid(), signal.SIGKILL)

engine = gdopt.RayEngine(2, safekeeping=safekeeping, safekeeping_freq=int(freq))
if freq != "1":
    directory = None  # as each checkpoint takes a copy
gadam = here._run(
    engine, "wide", callbacks=[Strikes()], checkpoint_dir=directory, of_gadam=here.EVOLVING
)
events = [event for logs in gadam.noted for event in logs["events"]]
# The driver's copy has brought the survivors to its node; else those of the other are lost.
there = freq == "1" and safekeeping == "driver"
assert len(events) == (0 if cluster is None else 1 if there else 2), events
if cluster is not None:
    assert sorted(gadam._population._pool.processes) in ([0], [1])
with open(path, "wb") as file:
    weights = [gadam.member(rank).get_weights() for rank in range(here.SIZE)]
    optimizer = [v.numpy() for v in gadam.model.optimizer.variables]
    pickle.dump((weights, optimizer, gadam.history.history, list(gadam.lineage)), file)
if cluster is not None:
    ray.shutdown()
    cluster.shutdown()
"""


def _in_a_process(tmp_path, fault, safekeeping="driver", freq=1):
    path = tmp_path / "run.pkl"
    done = subprocess.run(
        [sys.executable, "-c", _RUN, fault, safekeeping, str(freq), tmp_path / "run", path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=400,
    )
    if fault == "driver":
        assert done.returncode == -signal.SIGKILL
        return None
    assert done.returncode == 0
    return pickle.loads(path.read_bytes())


@pytest.fixture(scope="module")
def faultless_process(tmp_path_factory):
    """With weights that are too large to lie in the process of `fit`."""
    return _in_a_process(tmp_path_factory.mktemp("faultless"), "none")


def _assert_same_results(received, expected):
    history = received[2].pop("diversity"), expected[2]["diversity"]
    if not np.any(np.isnan(history[0])):  # where there is a copy in the process of `fit`
        np.testing.assert_array_equal(*history)
    for a, b in zip(received[:2], expected[:2], strict=True):
        for one, other in zip(tf.nest.flatten(a), tf.nest.flatten(b), strict=True):
            np.testing.assert_array_equal(one, other)
    assert received[2] == {k: v for k, v in expected[2].items() if k != "diversity"}
    assert received[3] == expected[3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("safekeeping", "freq"), [("driver", 1), ("driver", 5), ("checkpoint_dir", 1)]
)
def test_a_node_leaves(safekeeping, freq, faultless_process, tmp_path):
    received = _in_a_process(tmp_path, "node", safekeeping, freq)
    _assert_same_results(received, faultless_process)


@pytest.mark.slow
@pytest.mark.parametrize("safekeeping", ["driver", "checkpoint_dir"])
def test_the_driver_is_killed(safekeeping, faultless_process, tmp_path):
    _in_a_process(tmp_path, "driver", safekeeping)
    received = _in_a_process(tmp_path, "none", safekeeping)
    _assert_same_results(received, faultless_process)


@pytest.mark.slow
def test_a_task_that_kills_every_worker_is_given_up(cluster, monkeypatch):
    """As one does that needs more memory than there is."""
    from keras_gdopt.gadam.cluster.pool import Pool

    submit = Pool._submit

    def struck(pool, task, number):
        references = submit(pool, task, number)
        if task.method == "train_children" and number == 1:
            os.kill(pool.processes[number], signal.SIGKILL)
        return references

    monkeypatch.setattr(Pool, "_submit", struck)
    with pytest.raises(RuntimeError, match=r"Worker 1 .*train_children[\s\S]*may need more memory"):
        _run(gdopt.RayEngine(2), of_gadam=EVOLVING)


_ONE_AND_THREE = """
import os
os.cpu_count = lambda: 1
import keras_gdopt as gdopt
from tests.gadam import test_cluster as here
for workers in (1, 3):
    here._run(gdopt.RayEngine(workers), generations=1)
"""


@pytest.mark.slow
def test_a_later_population_may_have_more_workers():
    """Ray is started for the first, on a machine with one processor."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _ONE_AND_THREE]
    assert subprocess.run(command, env=environment, timeout=400).returncode == 0


# --- errors ------------------------------------------------------------------------------


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'keras-gdopt\[ray\]'"):
        gdopt.RayEngine(2)


def test_files_need_a_directory():
    with pytest.raises(ValueError, match="Expected a `checkpoint_dir`"):
        _run(gdopt.RayEngine(2, safekeeping="checkpoint_dir"))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("num_workers", 0), ("threads_per_worker", 0), ("task_timeout", 0), ("data_fn", 3),
     ("safekeeping_freq", 0), ("safekeeping", "memory")],
)  # fmt: skip
def test_arguments_out_of_range(argument, value):
    with pytest.raises(ValueError, match=argument):
        gdopt.RayEngine(**{"num_workers": 2, argument: value})


def test_a_dataset_is_not_sent():
    arguments = DataArguments(tf.data.Dataset.range(4))
    with pytest.raises(ValueError, match="data_fn"):
        arguments.for_workers()


def test_data_comes_from_one_side_only():
    with pytest.raises(ValueError, match="`data_fn` makes the training data"):
        DataArguments(np.ones(4), data_fn=lambda: np.ones(4)).made()
    with pytest.raises(ValueError, match="Expected training data"):
        DataArguments(None).made()


def test_more_workers_than_the_cluster_has_room_for(cluster):
    with pytest.raises(ValueError, match="has room for"):
        _run(gdopt.RayEngine(2, threads_per_worker=1000))


@pytest.mark.slow
def test_a_worker_that_waits_for_resources_says_so(cluster, monkeypatch, caplog):
    import ray

    from keras_gdopt.gadam.cluster import pool

    monkeypatch.setattr(pool, "_PATIENCE", 2.0)
    monkeypatch.setattr(pool, "_TO_START", 6.0)
    everything = int(ray.cluster_resources()["CPU"])

    @ray.remote(num_cpus=1)
    class Other:
        def answer(self):
            return 1

    other = Other.remote()
    ray.get(other.answer.remote(), timeout=60.0)
    try:
        with pytest.raises(RuntimeError, match="Worker 0 of 1 did not start"):
            _run(gdopt.RayEngine(1, threads_per_worker=everything))
    finally:
        ray.kill(other)
    waiting = [one.message for one in caplog.records if "has not started" in one.message]
    assert len(waiting) == 1
    assert f"or wait for {{'CPU': {everything}" in waiting[0]


@pytest.mark.slow
def test_a_population_that_is_no_longer_in_use_leaves_room_for_the_next(cluster, monkeypatch):
    """Also where only the garbage collector can tell, as after an exception.

    Ray collects by itself, but only after waiting for resources for a while.
    """
    from keras_gdopt.gadam.cluster.pool import Pool

    prepare, is_gone = Pool._prepare, []

    def prepared(pool, number, handle):
        is_gone.append(earlier is not None and earlier() is None)
        return prepare(pool, number, handle)

    monkeypatch.setattr(Pool, "_prepare", prepared)
    earlier = None
    gc.disable()
    try:
        gadam = _run(gdopt.RayEngine(1))
        gadam.itself, earlier = gadam, weakref.ref(gadam)
        del gadam
        _run(gdopt.RayEngine(1))
    finally:
        gc.enable()
    assert is_gone == [False, True]


@pytest.mark.slow
def test_the_user_s_error_comes_once_and_names_the_worker(cluster):
    here = os.getpid()

    def breaks():
        if os.getpid() != here:
            raise KeyError("no such file")
        return models.samples(np.random.default_rng(0), count=40)

    with pytest.raises(KeyError, match="no such file") as caught:
        _run(gdopt.RayEngine(1, data_fn=breaks), data={})
    (note,) = caught.value.__notes__
    assert "worker" in note


def test_a_model_that_cannot_be_sent(cluster):
    class Unsavable(keras.layers.Layer):
        def call(self, inputs):
            return inputs

        def get_config(self):
            raise RuntimeError("has no config")

    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(3)(Unsavable()(inputs)))
    model.compile(gdopt.Adam(), "mse")
    with pytest.raises(ValueError, match=r"cannot be (sent|cloned)[\s\S]*has no config"):
        gdopt.Gadam(model, 4, engine=gdopt.RayEngine(2), initializer="ones").fit(
            np.ones((8, 6)), np.ones((8, 3)), batch_size=4, verbose=0
        )
