"""A run that was stopped goes on as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.gadam.checkpoint import PopulationCheckpoint
from tests.gadam import models
from tests.parameters import slow

SIZE = 3


def _gadam(build=models.dropout, seed=5, size=SIZE, amsgrad=False, **kwargs):
    keras.utils.set_random_seed(1)
    model = build()
    model.compile(gdopt.Adam(0.02, amsgrad=amsgrad), "mse")
    return gdopt.Gadam(model, population_size=size, seed=seed, **kwargs)


def _data(rng, kind):
    x, y = (part.astype("float32") for part in models.samples(rng, count=40))
    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": 16}
    if kind == "ragged":  # and does not tell its length
        ids = tf.RaggedTensor.from_row_lengths(rng.integers(0, 8, 100), np.arange(40) % 4 + 1)
        dataset = tf.data.Dataset.from_tensor_slices((ids, y[:, :1]))
        return {"x": dataset.filter(lambda ids, y: y[0] < 0.5).ragged_batch(8)}
    return {"x": tf.data.Dataset.from_tensor_slices((x, y)).shuffle(40, seed=1).batch(16)}


def _arrays():
    return _data(np.random.default_rng(0), "arrays")


def _assert_same_run(one, other):
    for a, b in zip(
        tf.nest.flatten(one._population.members),
        tf.nest.flatten(other._population.members),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert list(one.lineage) == list(other.lineage)
    np.testing.assert_array_equal(one.fitness, other.fitness)
    for a, b in zip(one.model.get_weights(), other.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("arrays", "stacked"),
        slow("dataset", "mapped"),
        slow("ragged", "stacked"),
        slow("arrays", "mapped"),
        slow("dataset", "stacked"),
    ],
)
def test_a_resumed_run_equals_one_that_was_not_stopped(kind, engine, rng, tmp_path):
    """Dropout included: the seeds of its generators come from the keys."""
    draw = rng.integers(1000)
    build = models.texts if kind == "ragged" else models.dropout
    whole = _gadam(build, engine=engine)
    data = _data(np.random.default_rng(draw), kind)
    expected = whole.fit(**data, generations=2, epochs=2, verbose=0)
    history = None
    for generations in (1, 2):
        parts = _gadam(build, engine=engine)
        data = _data(np.random.default_rng(draw), kind)  # as another process has it
        history = parts.fit(
            **data, generations=generations, epochs=2, verbose=0, checkpoint_dir=str(tmp_path)
        )
    _assert_same_run(parts, whole)
    assert history.history == expected.history
    assert history.epoch == expected.epoch == [0, 1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three generations that was not stopped, in `whole.directory`."""
    gadam = _gadam()
    gadam.directory = tmp_path_factory.mktemp("whole")
    gadam.fit(**_arrays(), generations=3, verbose=0, checkpoint_dir=gadam.directory)
    return gadam


@pytest.fixture
def directory(whole, tmp_path):
    """A copy of what the whole run left, to go on from or to damage."""
    return shutil.copytree(whole.directory, tmp_path / "checkpoints")


@pytest.mark.slow
def test_nothing_is_done_where_all_is_done(whole, directory):
    other = _gadam()
    history = other.fit(**_arrays(), generations=3, verbose=0, checkpoint_dir=directory)
    _assert_same_run(other, whole)
    assert history.epoch == [0, 1, 2]


@pytest.mark.slow
def test_a_changed_learning_rate_is_remembered(rng, tmp_path):
    data = _data(rng, "arrays")
    slower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    _gadam().fit(**data, generations=2, verbose=0, checkpoint_dir=tmp_path, callbacks=[slower])
    resumed = _gadam()
    resumed.fit(**data, generations=3, verbose=0, checkpoint_dir=tmp_path)
    np.testing.assert_allclose(float(resumed.model.optimizer.learning_rate), 0.005, rtol=1e-6)


@pytest.mark.slow
def test_only_some_generations_are_saved(rng, tmp_path):
    gadam = _gadam()
    gadam.fit(
        **_data(rng, "arrays"), generations=5, verbose=0, checkpoint_dir=tmp_path, checkpoint_freq=2
    )
    assert sorted(path.name for path in tmp_path.glob("*.index")) == [
        "ckpt-4.index",
        "ckpt-5.index",
    ]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"build": models.dense}, "model was"),
        ({"size": 4}, "population_size was 3 and is 4"),
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"amsgrad": True}, "optimizer was"),
        ({"engine": "mapped"}, "engine was 'stacked' and is 'mapped'"),
    ],
)
def test_a_directory_of_another_run_is_refused(other, message, directory):
    with pytest.raises(ValueError, match=rf"holds another run.*Received: {message}"):
        _gadam(**other).fit(**_arrays(), generations=4, verbose=0, checkpoint_dir=directory)


def _saved_by_version_0_1_0(directory, **identity):
    """A run of two generations, with what that version wrote in another way."""
    gadam = _gadam()
    gadam.fit(**_arrays(), generations=2, verbose=0)
    record = gadam._record(gadam.model.history)
    (rate,) = record["learning_rate"]
    checkpoint = PopulationCheckpoint(directory, {**gadam._run_identity(), **identity})
    checkpoint.save(gadam._population.members, {**record, "learning_rate": rate})


@pytest.mark.slow
def test_a_stack_of_version_0_1_0_goes_on(tmp_path):
    _saved_by_version_0_1_0(tmp_path)
    expected, resumed = _gadam(), _gadam()
    history = expected.fit(**_arrays(), generations=3, verbose=0).history
    received = resumed.fit(**_arrays(), generations=3, verbose=0, checkpoint_dir=tmp_path).history
    assert received == history
    np.testing.assert_array_equal(resumed.fitness, expected.fitness)


@pytest.mark.slow
def test_clones_of_version_0_1_0_do_not(tmp_path):
    _saved_by_version_0_1_0(tmp_path, engine="unrolled")
    with pytest.raises(ValueError, match=r"(?s)engine 'unrolled' of version 0\.1\.0.*best member"):
        _gadam(engine="mapped").fit(**_arrays(), generations=3, verbose=0, checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("data-00000-of-00001", "cut"),
        slow("index", "gone"),
        slow("data-00000-of-00001", "garbled"),
        slow("data-00000-of-00001", "gone"),
        slow("index", "cut"),
        slow("index", "garbled"),
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(part, damage, whole, directory):
    path = directory / f"ckpt-3.{part}"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "garbled":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    else:
        path.unlink()
    resumed = _gadam()
    with pytest.warns(UserWarning, match=r"A checkpoint is damaged.*ckpt-2"):
        resumed.fit(**_arrays(), generations=3, verbose=0, checkpoint_dir=directory)
    _assert_same_run(resumed, whole)


def test_a_damaged_list_of_checkpoints_loses_none(whole, directory):
    (directory / "checkpoint").write_text("model_checkpoint_path: ")
    resumed = _gadam()
    with pytest.warns(UserWarning, match=r"A checkpoint is damaged.*ckpt-3"):
        resumed.fit(**_arrays(), generations=3, verbose=0, checkpoint_dir=directory)
    _assert_same_run(resumed, whole)


def test_a_directory_in_which_nothing_can_be_read(directory):
    for path in directory.glob("ckpt-*.data-00000-of-00001"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"No checkpoint in .* can be read"):
        _gadam().fit(**_arrays(), generations=4, verbose=0, checkpoint_dir=directory)


SCRIPT = """
    import json, sys
    import keras, numpy as np, tensorflow as tf
    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(1)
    import keras_gdopt as gdopt
    from tests.gadam import models
    x, y = (part.astype("float32") for part in models.samples(np.random.default_rng(0), count=400))
    model = models.dropout()
    model.compile(gdopt.Adam(0.02), "mse")
    evolving = {"evolve": {"learning_rate": (1e-3, 1e-1), "beta_1": (0.0, 0.9)}}
    evolving |= {"crossover": "entries", "mutation_rate": 0.01}
    gadam = gdopt.Gadam(model, population_size=4, seed=5, engine=sys.argv[2], **evolving)
    print("ready", flush=True)
    history = gadam.fit(x, y, generations=40, batch_size=16, verbose=0, checkpoint_dir=sys.argv[1])
    gadam.lineage.to_json_lines(sys.argv[1] + "/lineage.jsonl")
    members = tf.nest.flatten(gadam._population.members)
    arrays = [np.asarray(v) for v in members] + model.get_weights()
    np.savez(sys.argv[1] + "/arrays.npz", *arrays)
    with open(sys.argv[1] + "/history.json", "w") as file:
        json.dump([history.history, gadam.fitness.tolist()], file)
"""


def _start(directory, engine):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(directory), engine],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["stacked", "mapped"])
def test_killed_ten_times_it_ends_as_if_never_killed(engine, tmp_path, rng):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert _start(whole, engine).wait() == 0
    kills = 0
    while kills < 10:
        process = _start(killed, engine)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 8.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        elif kills < 10:  # it was done: begin anew, for there are kills left
            for path in killed.iterdir():
                path.unlink()
    assert _start(killed, engine).wait() == 0
    for name in ("lineage.jsonl", "history.json"):
        assert (killed / name).read_text() == (whole / name).read_text()
    with np.load(whole / "arrays.npz") as expected, np.load(killed / "arrays.npz") as received:
        assert sorted(expected) == sorted(received)
        for array in expected:
            np.testing.assert_array_equal(received[array], expected[array])
    assert len(json.loads((whole / "history.json").read_text())[0]["fitness"]) == 40
