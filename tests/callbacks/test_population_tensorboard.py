"""A population's event files, read back, against its lineage and its weights in NumPy."""

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import types
import warnings

import keras
import numpy as np
import pytest
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

import keras_gdopt as gdopt
from keras_gdopt.callbacks import PopulationTensorBoard
from keras_gdopt.gadam import Lineage, PopulationCallback
from tests.callbacks.conftest import eventually
from tests.callbacks.test_event_files import _open_files, read
from tests.gadam import models
from tests.parameters import slow

SIZE, GENERATIONS = 4, 5
SLOTS = [f"slot_{place:02}" for place in range(SIZE)]
FITNESS = ["best", "mean", "worst", "std"]
SCALARS = [
    *(f"population/fitness_loss/{name}" for name in FITNESS),
    "population/diversity",
    "population/selection_entropy",
    "population/children_survived",
    "population/survivor_age/mean",
    "population/survivor_age/max",
    "population/mutation_rate",
    "population/mutated_entries",
    "population/members_not_finite",
    "population/seconds_per_generation",
    "population/member_steps_per_second",
    "best/loss",
    "best/mae",
]


def _gadam(**kwargs):
    model = models.dense()
    model.compile(gdopt.Adam(0.02), "mse", metrics=["mae"])
    return gdopt.Gadam(model, SIZE, **{"seed": 5, "mutation_rate": 0.3, **kwargs})


def _samples(count=32):
    x, y = models.samples(np.random.default_rng(0), count)
    return x.astype("float32"), y.astype("float32")


def _fit(gadam, callbacks, **kwargs):
    arguments = {"generations": 2, "batch_size": 16, "verbose": 0, **kwargs}
    return gadam.fit(*_samples(), callbacks=callbacks, **arguments)


class _Weights(PopulationCallback):
    """Everybody's weights at the start and at the end of each generation."""

    def __init__(self):
        super().__init__()
        self.after = {}

    def on_train_begin(self, logs=None):
        self.after.setdefault(-1, [w.numpy() for w in self.gadam._population.members.weights])

    def on_generation_end(self, generation, logs=None):
        self.after[generation] = [w.numpy() for w in self.gadam._population.members.weights]


class _Dies(PopulationCallback):
    """Ends training after the events of a generation and before its checkpoint."""

    def __init__(self, generation, error):
        super().__init__()
        self._generation, self._error = generation, error

    def on_generation_end(self, generation, logs=None):
        if generation == self._generation:
            raise self._error


def _losses(weights, x, y):
    """Mean squared errors of all members, in float64."""
    kernel, bias, kernel_out, bias_out = (w.astype("float64") for w in weights)
    hidden = np.tanh(x @ kernel + bias[:, None])
    return np.mean((hidden @ kernel_out + bias_out[:, None] - y) ** 2, axis=(1, 2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two calls of `fit`, the second killed, and a third that resumes it.

    Every batch is the whole data, so that losses follow from the weights.
    """
    directory = tmp_path_factory.mktemp("run")
    log_dir, weights = directory / "logs", _Weights()
    x, y = _samples()
    arguments = {
        "batch_size": len(x),
        "fitness_data": (x, y),
        "validation_data": (x[:8], -y[:8]),
        "validation_freq": 2,
        "checkpoint_dir": str(directory / "checkpoints"),
    }
    gadam = _gadam(fitness_batch_size=len(x))
    _fit(gadam, [weights, PopulationTensorBoard(log_dir, tree_freq=2)], **arguments)
    arguments["generations"] = GENERATIONS
    callback = PopulationTensorBoard(log_dir, tree_freq=2)
    with pytest.raises(SystemExit):
        _fit(gadam, [callback, _Dies(3, SystemExit())], **arguments)
    gadam = _gadam(fitness_batch_size=len(x))
    weights.after = {number: weights.after[number] for number in (-1, 0, 1)}
    # Generation 2 was made by the fit that died, and 3 is made again.
    resumed = types.SimpleNamespace(log_dir=log_dir, killed=read(log_dir / "population"))
    resumed.third_weights = _third_weights = _Weights()
    callback = PopulationTensorBoard(log_dir, tree_freq=2)
    _fit(gadam, [_third_weights, callback], **arguments)
    resumed.weights = {**weights.after, 2: _third_weights.after.pop(-1), **_third_weights.after}
    resumed.gadam, resumed.x, resumed.y = gadam, x.astype("float64"), y.astype("float64")
    resumed.written = read(log_dir / "population")
    resumed.slots = [read(log_dir / slot) for slot in SLOTS]
    return resumed


def _survivors(lineage, generation):
    """Who was alive at the end of a generation, and everybody's fitness losses then."""
    last = {one["id"]: s for one in lineage for s in one["selections"] if s[0] == generation}
    alive = [identity for identity, (_, _, survives) in last.items() if survives]
    return alive, {identity: loss for identity, (_, loss, _) in last.items()}


def _expected(run, generation):
    """Values of a generation from the lineage and from weights alone."""
    lineage = run.gadam.lineage
    alive, losses = _survivors(lineage, generation)
    fitness = np.array([losses[identity] for identity in alive])
    children = [one for one in lineage if one["generation"] == generation + 1]
    ages = [generation + 1 - lineage[identity]["generation"] for identity in alive]
    parents = np.array([loss for one, loss in losses.items() if one < children[0]["id"]])
    odds = np.exp(-(parents - parents.min()) / (parents.max() - parents.min()))
    probabilities = odds / odds.sum()
    flat = np.concatenate([w.reshape(SIZE, -1) for w in run.weights[generation]], axis=1)
    flat = flat.astype("float64")
    distances = [np.linalg.norm(flat[i] - flat[j]) for i in range(SIZE) for j in range(i)]
    of_slots = _losses(run.weights[generation], run.x, run.y)
    best = int(np.argmin(of_slots))
    expected = {
        "fitness_loss/best": fitness.min(),
        "fitness_loss/mean": fitness.mean(),
        "fitness_loss/worst": fitness.max(),
        "fitness_loss/std": np.sqrt(np.mean((fitness - fitness.mean()) ** 2)),
        "diversity": np.mean(distances),
        "selection_entropy": -np.sum(probabilities * np.log(probabilities)),
        "children_survived": sum(identity >= children[0]["id"] for identity in alive),
        "survivor_age/mean": np.mean(ages),
        "survivor_age/max": max(ages),
        "mutation_rate": np.mean([child["mutation_rate"] for child in children]),
        "mutated_entries": sum(child["mutated_entries"] for child in children),
        "members_not_finite": 0,
    }
    expected = {f"population/{name}": value for name, value in expected.items()}
    kernel, bias, kernel_out, bias_out = (w[best] for w in run.weights[generation])
    errors = np.tanh(run.x @ kernel + bias) @ kernel_out + bias_out - run.y
    return {**expected, "best/mae": np.mean(np.abs(errors))}, of_slots, best


@pytest.mark.slow
def test_the_run_that_died_had_written_what_the_resumed_one_wrote_again(run):
    assert [step for step, _ in run.killed["population/fitness_loss/best"]] == [0, 1, 2, 3]


def test_every_tag_at_every_generation(run):
    others = ["best/val_loss", "best/val_mae", "population/fitness_losses"]
    trees = ["population/family_table", "population/family_tree"]
    assert set(run.written) == {*SCALARS, *others, *trees}
    for tag in [*SCALARS, "population/fitness_losses"]:
        assert [step for step, _ in run.written[tag]] == list(range(GENERATIONS)), tag
    for tag in ("best/val_loss", "best/val_mae"):
        assert [step for step, _ in run.written[tag]] == [1, 3], tag
    for tag in trees:  # every second one, and the last
        assert [step for step, _ in run.written[tag]] == [1, 3, 4], tag
    for slot in run.slots:
        assert set(slot) == {"slot/loss", "slot/fitness_loss", "slot/selection_probability"}
        for points in slot.values():
            assert [step for step, _ in points] == list(range(GENERATIONS))
    directories = {path.name for path in run.log_dir.iterdir() if path.is_dir()}
    assert directories == {"population", *SLOTS}


@pytest.mark.parametrize("generation", range(GENERATIONS))
def test_values_are_those_of_the_lineage_and_the_weights(generation, run):
    expected, of_slots, best = _expected(run, generation)
    for tag, value in expected.items():
        received = dict(run.written[tag])[generation]
        np.testing.assert_allclose(received, value, rtol=2e-5, atol=1e-7, err_msg=tag)
    lineage = run.gadam.lineage
    alive, losses = _survivors(lineage, generation)
    fitness = [dict(slot["slot/fitness_loss"])[generation] for slot in run.slots]
    np.testing.assert_allclose(fitness, of_slots, rtol=1e-5)
    np.testing.assert_allclose(sorted(fitness), sorted(losses[one] for one in alive), rtol=1e-6)
    trained = [dict(slot["slot/loss"])[generation] for slot in run.slots]
    assert dict(run.written["best/loss"])[generation] == trained[best]
    # One step on all data: the loss of a parent's training is that of its weights before,
    # unless a child came into its place. Of those that stay, none has its loss afterwards.
    before = _losses(run.weights[generation - 1], run.x, run.y)
    stayed = np.isclose(trained, before, rtol=1e-5)
    born = sum(lineage[one]["generation"] == generation + 1 for one in alive)
    assert np.sum(~stayed) == born
    np.testing.assert_allclose(
        sum(dict(slot["slot/selection_probability"])[generation] for slot in run.slots), 1.0
    )


def test_a_fitter_parent_is_drawn_with_a_greater_probability(run):
    """Each slot's probability is that of its parent, by Eq. 45."""
    for generation in range(1, GENERATIONS):
        lineage = run.gadam.lineage
        children = [one for one in lineage if one["generation"] == generation + 1]
        drawn = {
            parent: probability
            for child in children
            for parent, probability in zip(
                child["parents"], child["selection_probabilities"], strict=True
            )
        }
        shown = [dict(s["slot/selection_probability"])[generation] for s in run.slots]
        for probability in drawn.values():
            assert np.min(np.abs(np.array(shown) - probability)) < 1e-6
        _, losses = _survivors(lineage, generation)
        parents = np.array([loss for one, loss in losses.items() if one < children[0]["id"]])
        odds = np.exp(-(parents - parents.min()) / np.ptp(parents))
        np.testing.assert_allclose(sorted(shown), sorted(odds / odds.sum()), rtol=1e-4)


def test_speed_is_that_of_all_members(run):
    """Two trainings of one step for each of the members."""
    for generation in range(GENERATIONS):
        seconds = dict(run.written["population/seconds_per_generation"])[generation]
        speed = dict(run.written["population/member_steps_per_second"])[generation]
        assert seconds > 0
        np.testing.assert_allclose(seconds * speed, 2 * SIZE, rtol=1e-5)


def test_the_best_members_validation(run):
    for generation in (1, 3):
        _, _, best = _expected(run, generation)
        loss = _losses(run.weights[generation], run.x[:8], -run.y[:8])[best]
        received = dict(run.written["best/val_loss"])[generation]
        np.testing.assert_allclose(received, loss, rtol=1e-5)


def test_a_histogram_of_the_survivors_fitness(run):
    for generation, buckets in run.written["population/fitness_losses"]:
        alive, losses = _survivors(run.gadam.lineage, generation)
        fitness = [losses[one] for one in alive]
        assert buckets[:, 2].sum() == SIZE
        np.testing.assert_allclose(buckets[0, 0], min(fitness), rtol=1e-6)
        np.testing.assert_allclose(buckets[-1, 1], max(fitness), rtol=1e-6)


def test_the_lineage_beside_the_events(run):
    path = run.log_dir / "lineage.jsonl"
    assert [json.loads(line) for line in path.open()] == list(run.gadam.lineage)
    assert list(Lineage.from_json_lines(path)) == list(run.gadam.lineage)


def test_the_margin_chart(run):
    ((_, content),) = read(run.log_dir)[metadata.CONFIG_SUMMARY_TAG]
    (category,) = layout_pb2.Layout.FromString(content.item()).category
    (series,) = category.chart[0].margin.series
    names = [f"population/fitness_loss/{name}" for name in ("best", "mean", "worst")]
    assert [series.lower, series.value, series.upper] == names


@pytest.mark.slow
@pytest.mark.parametrize("load_fast", ["true", "false"])
def test_a_real_tensorboard_shows_it(load_fast, run, serving):
    runs = ["population", *SLOTS]
    with serving(run.log_dir, runs, "--load_fast", load_fast) as server:
        assert set(server.json("/data/runs")) == {".", *runs}
        for name, tag in [("population", "population/fitness_loss/best")] + [
            (slot, "slot/fitness_loss") for slot in SLOTS
        ]:
            shown = eventually(lambda n=name, t=tag: server.scalars(n, t), len)
            expected = read(run.log_dir / name)[tag]
            assert [step for step, _ in shown] == list(range(GENERATIONS))
            np.testing.assert_allclose(shown, expected, rtol=1e-6)
        layout = server.json("/data/plugin/custom_scalars/layout")
        assert layout["category"][0]["chart"][0]["margin"]["series"][0]["value"] == (
            "population/fitness_loss/mean"
        )
        for chart in layout["category"][0]["chart"][1:]:
            charted = [
                server.json("/data/plugin/custom_scalars/scalars", run=name, tag=tag)
                for tag in chart["multiline"]["tag"]
                for name in runs
            ]
            assert all(answer["regex_valid"] for answer in charted)
            assert any(answer["tag_to_events"] for answer in charted), chart["title"]
        tags = server.json("/data/plugin/images/tags")["population"]
        assert tags["population/family_tree"]["samples"] == 1
        images = server.json(
            "/data/plugin/images/images",
            run="population",
            tag="population/family_tree",
            sample=0,
        )
        assert [image["step"] for image in images] == [1, 3, 4]
        for image in images:
            picture = server.get(f"/data/plugin/images/individualImage?{image['query']}")
            assert picture.startswith(b"\x89PNG")
        texts = server.json(
            "/data/plugin/text/text", run="population", tag="population/family_table"
        )
        assert [text["step"] for text in texts] == [1, 3, 4]
        assert "<table>" in texts[0]["text"]


# --- how training ends -------------------------------------------------------------------


@pytest.mark.parametrize("error", [slow(RuntimeError("broken")), KeyboardInterrupt()], ids=repr)
def test_files_are_whole_and_closed_when_training_breaks(error, tmp_path):
    gadam, callback = _gadam(), PopulationTensorBoard(tmp_path)
    with pytest.raises(type(error)):
        _fit(gadam, [callback, _Dies(1, error)], generations=4)
    assert [step for step, _ in read(tmp_path / "population")["best/loss"]] == [0, 1]
    assert list(Lineage.from_json_lines(tmp_path / "lineage.jsonl")) == list(gadam.lineage)
    # The callback may be used again, and goes on.
    _fit(gadam, [callback], generations=1)
    assert [step for step, _ in read(tmp_path / "population")["best/loss"]] == [0, 1, 2]
    assert list(Lineage.from_json_lines(tmp_path / "lineage.jsonl")) == list(gadam.lineage)
    with pytest.raises(type(error)):
        _fit(gadam, [callback, _Dies(3, error)])
    del callback
    error.__traceback__ = None
    gc.collect()
    assert not _open_files(tmp_path)


@pytest.mark.slow
def test_a_killed_process_leaves_what_was_written(tmp_path):
    script = f"""
import os, signal
import keras, numpy as np, keras_gdopt as gdopt
class Kill(gdopt.gadam.PopulationCallback):
    def on_generation_end(self, generation, logs=None):
        if generation == 2:
            os.kill(os.getpid(), signal.SIGKILL)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile(gdopt.Adam(), "mse")
callback = gdopt.callbacks.PopulationTensorBoard({str(tmp_path)!r}, tree_freq=2)
gdopt.Gadam(model, 3).fit(
    np.ones((40, 4)), np.ones((40, 1)), generations=9, verbose=0, callbacks=[callback, Kill()]
)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    written = read(tmp_path / "population")
    assert [step for step, _ in written["best/loss"]] == [0, 1, 2]
    assert [step for step, _ in written["population/family_table"]] == [1]
    for place in range(3):
        slot = read(tmp_path / f"slot_0{place}")
        assert [step for step, _ in slot["slot/loss"]] == [0, 1, 2]
    lineage = Lineage.from_json_lines(tmp_path / "lineage.jsonl")
    assert len(lineage) == 3 + 3 * 3
    assert {s[0] for one in lineage for s in one["selections"]} == {0, 1, 2}


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path):
    """On a file system of 256 KiB, beside one that has room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        gadam = _gadam()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = _fit(gadam, [PopulationTensorBoard(disk)], generations=60)
        assert len(history.epoch) == 60
        ours = [str(w.message) for w in caught if "PopulationTensorBoard" in str(w.message)]
        assert len(ours) == 1
        assert "can no longer write to" in ours[0] and "training goes on" in ours[0]
        steps = [step for step, _ in read(disk / "population")["best/loss"]]
        assert steps == list(range(len(steps)))
        assert 2 < len(steps) < 60
        # The lines that it had room for, of the generations until then.
        lines = (disk / "lineage.jsonl").read_text().splitlines()
        assert len(lines) >= SIZE + 2 * SIZE * len(steps[1:])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- settings ----------------------------------------------------------------------------


@pytest.mark.slow
def test_losses_that_are_not_finite_are_left_out(tmp_path):
    class Spoils(PopulationCallback):
        """Of parents and of children, all but the first."""

        def on_generation_begin(self, generation, logs=None):
            engine = self.gadam._population._training.engine
            losses = engine.losses
            spoil = [0.0, *[np.nan] * (SIZE - 1)]
            engine.losses = lambda *arguments: losses(*arguments) + spoil

    gadam = _gadam()
    _fit(gadam, [Spoils(), PopulationTensorBoard(tmp_path)], generations=1)
    finite = gadam.fitness[np.isfinite(gadam.fitness)]
    assert len(finite) == 2
    written = {tag: dict(points)[0] for tag, points in read(tmp_path / "population").items()}
    np.testing.assert_allclose(written["population/fitness_loss/worst"], finite.max(), rtol=1e-6)
    np.testing.assert_allclose(written["population/fitness_loss/mean"], finite.mean(), rtol=1e-6)
    assert written["population/fitness_losses"][:, 2].sum() == 2
    assert written["population/members_not_finite"] == 2 * (SIZE - 1)
    assert np.isfinite(written["population/selection_entropy"])


@pytest.mark.slow
def test_no_family_trees(tmp_path):
    _fit(_gadam(), [PopulationTensorBoard(tmp_path, tree_freq=0)])
    assert not [tag for tag in read(tmp_path / "population") if "family" in tag]


@pytest.mark.slow
def test_without_matplotlib_the_table_alone(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest),
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _fit(_gadam(), [PopulationTensorBoard(tmp_path)])
    tags = [tag for tag in read(tmp_path / "population") if "family" in tag]
    assert tags == ["population/family_table"]


@pytest.mark.slow
def test_beside_keras_tensorboard_and_a_second_one(tmp_path):
    _fit(
        _gadam(),
        [
            PopulationTensorBoard(tmp_path / "one"),
            keras.callbacks.TensorBoard(tmp_path / "keras"),
            PopulationTensorBoard(str(tmp_path / "other")),
        ],
    )
    one, other = (read(tmp_path / name / "population") for name in ("one", "other"))
    assert one["best/loss"] == other["best/loss"]
    assert "epoch_loss" in read(tmp_path / "keras" / "train")


@pytest.mark.slow
def test_any_path_of_gfile(tmp_path):
    _fit(_gadam(), [PopulationTensorBoard(f"file://{tmp_path}/run")], generations=1)
    assert "best/loss" in read(tmp_path / "run" / "population")
    assert (tmp_path / "run" / "lineage.jsonl").exists()


# --- what is wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("tree_freq", [-1, 2.5, "epoch", True])
def test_tree_freq_out_of_range(tree_freq, tmp_path):
    with pytest.raises(ValueError, match=r"`tree_freq` must be an integer of at least 0\. Rec"):
        PopulationTensorBoard(tmp_path, tree_freq)


def test_a_plain_fit(tmp_path):
    gadam, callback = _gadam(), PopulationTensorBoard(tmp_path / "run")
    model, (x, y) = gadam.model, _samples()
    before = model.get_weights()
    message = r"needs to be passed to the `fit` of a Gadam: .*Received: the `fit` of the model"
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, verbose=0, callbacks=[callback])
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    assert not (tmp_path / "run").exists()
    _fit(gadam, [callback], generations=1)
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, verbose=0, callbacks=[callback])


@pytest.mark.parametrize(
    "in_the_way", ["run", "run/population", "run/slot_02", "run/lineage.jsonl"]
)
def test_a_directory_that_cannot_be_written(in_the_way, tmp_path):
    path = tmp_path / in_the_way
    path.parent.mkdir(exist_ok=True)
    if path.suffix:
        path.mkdir()
    else:
        path.write_text("in the way")
    gadam = _gadam()
    with pytest.raises(ValueError, match="`log_dir` of PopulationTensorBoard must be a directory"):
        _fit(gadam, [PopulationTensorBoard(tmp_path / "run")])
    assert not gadam.fitness.size


def test_a_cluster_s_figures_and_events(tmp_path):
    class Reports(PopulationCallback):
        """In the place of a population in a Ray cluster."""

        def set_gadam(self, gadam):
            super().set_gadam(gadam)
            gadam._start_population()
            bytes_of = {"bytes_moved": 7, "bytes_rebalanced": 8, "bytes_kept": 9}
            gadam._population.report = lambda: {**bytes_of, "events": ["one was lost", "another"]}

    _fit(_gadam(), [Reports(), PopulationTensorBoard(tmp_path)], generations=1)
    written = read(tmp_path / "population")
    for name, value in (("bytes_moved", 7), ("bytes_rebalanced", 8), ("bytes_kept", 9)):
        assert dict(written[f"population/{name}"])[0] == value
        assert f"best/{name}" not in written
    text = str(dict(written["population/events"])[0])
    assert "one was lost" in text
    assert "another" in text


@pytest.mark.slow
def test_hyperparameters_of_places_and_of_the_winner_s_line(tmp_path):
    """Also where a later `fit` finds another winner."""
    ranges = {"learning_rate": (1e-3, 1e-1), "beta_1": (0.0, 0.9)}
    gadam, board = _gadam(evolve=ranges, mutation_rate=None), PopulationTensorBoard(tmp_path)
    identities = []

    class Noted(PopulationCallback):
        def on_generation_end(self, generation, logs=None):
            identities.append(logs["identities"].tolist())

    for _ in range(2):
        _fit(gadam, [board, Noted()], generations=3)
        everyone = list(gadam.lineage)
        for name in ranges:
            for place, slot in enumerate(SLOTS):
                received = read(tmp_path / slot)[f"slot/{name}"]
                expected = [
                    (generation, everyone[those[place]]["hyperparameters"][name])
                    for generation, those in enumerate(identities)
                ]
                np.testing.assert_allclose(received, expected, rtol=1e-6)
            # Backwards from the fittest: a parent, where it was born later than that.
            one, expected = everyone[identities[-1][int(gadam._best())]], []
            for generation in reversed(range(len(identities))):
                while one["generation"] > generation + 1:
                    one = everyone[one["heir_of"]]
                expected.insert(0, (generation, one["hyperparameters"][name]))
            for tag in (f"slot/{name}", f"winner/{name}"):
                received = read(tmp_path / "winner")[tag]
                np.testing.assert_allclose(received, expected, rtol=1e-6)
    _fit(_gadam(), [PopulationTensorBoard(tmp_path / "none")], generations=1)
    assert not (tmp_path / "none" / "winner").exists()
