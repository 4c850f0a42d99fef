"""Writes how a population develops, for TensorBoard."""

import os
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.image import metadata as image_plugin
from tensorboard.plugins.text.summary_v2 import text_pb

from keras_gdopt.callbacks import family_tree
from keras_gdopt.callbacks.event_files import (
    WRITE_ERRORS,
    EventFiles,
    scalar,
    unwritable,
    write_layout,
)
from keras_gdopt.callbacks.histograms import histogram
from keras_gdopt.gadam import PopulationCallback
from keras_gdopt.optimizers.argument_checks import check_tensorflow, checked_count

_RUN, _WINNER = "population", "winner"
# The keys of a generation's logs besides the best member's loss and metrics.
_OF_THE_POPULATION = {
    "fitness",
    "fitness_mean",
    "fitness_worst",
    "members_not_finite",
    "diversity",
    "children_survived",
}
# The keys that a cluster adds to them.
_OF_THE_CLUSTER = ("bytes_moved", "bytes_rebalanced", "bytes_kept")


class PopulationTensorBoard(PopulationCallback):
    r"""Writes how a population develops, after each generation, for TensorBoard.

    A step is a generation, counted from 0. The run `population` contains

    | tag | meaning |
    | --- | --- |
    | `population/fitness_loss/best`, `mean`, `worst`, `std` | fitness losses of the survivors |
    | `population/fitness_losses` | their histogram |
    | `population/diversity` | mean distance between two members' weights |
    | `population/selection_entropy` | $-\sum_i P_i \ln P_i$; ln g if all are equally likely |
    | `population/children_survived` | how many of the g survivors are children |
    | `population/survivor_age/mean`, `max` | generations that the survivors have outlived |
    | `population/mutation_rate` | mean probability that an entry mutated |
    | `population/mutated_entries` | mutated entries of all children |
    | `population/members_not_finite` | parents and children without a finite fitness loss |
    | `population/seconds_per_generation` | including validation |
    | `population/member_steps_per_second` | steps of all members, parents and children |
    | `population/bytes_moved` | bytes of weights moved between workers to breed (`RayEngine`) |
    | `population/bytes_rebalanced` | bytes of members that moved to another worker |
    | `population/bytes_kept` | bytes of the survivors' copy in the process that runs `fit` |
    | `population/events` | what happened to workers, in words |
    | `population/family_tree` | a picture of the last generations |
    | `population/family_table` | the fittest members and their parents |
    | `best/loss`, `best/…`, `best/val_…` | the best member's loss and metrics |

    Fitness losses that are not finite are left out. Each place in the population has its own
    run, `slot_00`, …; a parent stays in its place until a child takes it.

    | tag | meaning |
    | --- | --- |
    | `slot/loss` | training loss of the survivor there |
    | `slot/fitness_loss` | its fitness loss |
    | `slot/selection_probability` | probability of drawing the parent there |
    | `slot/learning_rate`, … | each evolving hyper-parameter of the survivor there |

    If hyper-parameters evolve, the run `winner` is written when `fit` ends. It shows what the
    fittest member and its ancestors trained with in each generation: under the same tags, as a
    line through the places, and as `winner/learning_rate`, …, by itself.

    The file `lineage.jsonl` beside the runs holds `gadam.lineage` and is updated after each
    generation; `Lineage.from_json_lines` reads it. The Custom Scalars tab has a margin chart of
    the fitness losses.

    A resumed run continues its curves: what an earlier process wrote about the generations that
    are repeated is removed from its files. This also removes what another run wrote from this
    one's first generation on, so use one directory for each run.

    Keras's `TensorBoard` may be used beside it, with its own directory.

    Args:
        log_dir: A directory, at any path that `tf.io.gfile` can write to.
        tree_freq: Generations between two family trees; the last generation of a `fit` has
            one, too. The picture needs matplotlib, which the extra `keras-gdopt[plots]`
            installs. Defaults to 50, because a picture may take as long as a generation of a
            small model. 0 for neither pictures nor the table beside them.

    Raises:
        ValueError: If `tree_freq` is not an integer of at least 0; before training starts, if
            the directory cannot be written to, or if the callback was not passed to `Gadam.fit`.
        RuntimeError: With a backend other than TensorFlow.

    Example:

    >>> import tempfile
    >>> import keras
    >>> import numpy as np
    >>> import keras_gdopt as gdopt
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(gdopt.Adam(), "mse")
    >>> callback = gdopt.callbacks.PopulationTensorBoard(tempfile.mkdtemp())
    >>> gadam = gdopt.Gadam(model, population_size=4)
    >>> x, y = np.ones((32, 3)), np.ones((32, 1))
    >>> history = gadam.fit(x, y, generations=2, verbose=0, callbacks=[callback])
    """

    def __init__(self, log_dir: str | os.PathLike[str], tree_freq: int = 50) -> None:
        check_tensorflow(type(self).__name__)
        super().__init__()
        self.log_dir = os.fspath(log_dir)
        self.tree_freq = checked_count("tree_freq", tree_freq, minimum=0)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Opens the files."""
        owner = type(self).__name__
        if getattr(self, "gadam", None) is None or self.gadam.model is not self.model:
            raise ValueError(
                f"{owner} shows a population, so it needs to be passed to the `fit` of a Gadam: "
                "`keras_gdopt.Gadam(model).fit(..., callbacks=[...])`. Received: the `fit` of "
                f"the model '{self.model.name}'"
            )
        size = self.gadam.population_size
        digits = max(2, len(str(size - 1)))
        self._slots = [f"slot_{place:0{digits}}" for place in range(size)]
        self._files = EventFiles(self.log_dir, owner=owner, runs=[_RUN, *self._slots])
        self._winner_files = None
        if self.gadam.evolve:
            self._winner_files = EventFiles(self.log_dir, owner=owner, runs=[_WINNER])
        write_layout(self.log_dir, _layout(self.gadam.evolve), owner=owner)
        self._generations = deque(
            family_tree.last_generations(self.gadam.lineage), maxlen=family_tree.GENERATIONS + 1
        )
        self._begun = self._tree_drawn = False
        self._open_lineage()

    def on_generation_begin(self, generation: int, logs: dict[str, Any] | None = None) -> None:
        """Starts the clock."""
        if not self._begun:
            self._begun = True
            self._files.restart(generation)
        self._started = time.perf_counter()

    def on_generation_end(self, generation: int, logs: dict[str, Any] | None = None) -> None:
        """Writes one event in each run."""
        seconds = time.perf_counter() - self._started
        logs = logs or {}
        survivors, identities = logs["survivors"], logs["identities"].tolist()
        losses = np.concatenate([logs["parent_losses"], logs["child_losses"]])[survivors]
        fitness = np.concatenate([logs["parent_fitness"], logs["child_fitness"]])[survivors]
        values = self._of_population(generation, logs, fitness, seconds)
        values += [
            scalar(f"best/{name}", value)
            for name, value in logs.items()
            if name not in {*_OF_THE_POPULATION, *_OF_THE_CLUSTER}
            and not isinstance(value, dict)
            and np.ndim(value) == 0
        ]
        if logs.get("events"):
            lines = [f"- generation {generation}: {event}" for event in logs["events"]]
            values += text_pb("population/events", "\n".join(lines)).value
        if not self._files.closed:
            self._note_lineage()
        self._generations.append(family_tree.ranked(generation, identities, fitness.tolist()))
        self._tree_drawn = bool(self.tree_freq) and (generation + 1) % self.tree_freq == 0
        if self._tree_drawn:
            values += self._family_tree()
        self._files.write(generation, values, run=_RUN)
        columns = {
            "slot/loss": losses,
            "slot/fitness_loss": fitness,
            "slot/selection_probability": logs["selection_probabilities"],
        }
        for name, of_parents in logs["parent_hyperparameters"].items():
            both = np.concatenate([of_parents, logs["child_hyperparameters"][name]])
            columns[f"slot/{name}"] = both[survivors]
        for place, slot in enumerate(self._slots):
            of_slot = [scalar(tag, float(values[place])) for tag, values in columns.items()]
            self._files.write(generation, of_slot, run=slot)
        self._last = generation

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Draws the last family tree and closes the files."""
        if self._begun and self.tree_freq and not self._tree_drawn:
            self._files.write(self._generations[-1].number, self._family_tree(), run=_RUN)
        if self._begun and self._winner_files is not None:
            self._draw_winner(self._winner_files)
        if not self._files.closed:
            self._close_lineage()
        self._files.close()
        del self.gadam  # the next `Gadam.fit` sets it again

    # --- what is written -----------------------------------------------------

    def _of_population(
        self, generation: int, logs: dict[str, Any], fitness: np.ndarray, seconds: float
    ) -> list[Summary.Value]:
        finite = fitness[np.isfinite(fitness)].astype("float64")
        drawn = logs["selection_probabilities"]
        drawn = drawn[drawn > 0]
        births = [self.gadam.lineage[one]["generation"] for one in logs["identities"].tolist()]
        ages = generation + 1 - np.array(births)
        steps = self.gadam.population_size * self.params["steps"]
        figures = {
            "fitness_loss/best": np.min(finite),
            "fitness_loss/mean": np.mean(finite),
            "fitness_loss/worst": np.max(finite),
            "fitness_loss/std": np.std(finite),
            "diversity": logs["diversity"],
            "selection_entropy": -np.sum(drawn * np.log(drawn)),
            "children_survived": logs["children_survived"],
            "survivor_age/mean": np.mean(ages),
            "survivor_age/max": np.max(ages),
            "mutation_rate": np.mean(logs["mutation_probabilities"]),
            "mutated_entries": np.sum(logs["mutated_entries"]),
            "members_not_finite": logs["members_not_finite"],
            "seconds_per_generation": seconds,
            "member_steps_per_second": steps / seconds,
        }
        figures.update({name: logs[name] for name in _OF_THE_CLUSTER if name in logs})
        if np.isnan(logs["diversity"]):  # no process has all members
            del figures["diversity"]
        values = [scalar(f"population/{name}", value) for name, value in figures.items()]
        return [*values, *histogram("population/fitness_losses", finite)]

    def _draw_winner(self, files: EventFiles) -> None:
        """Writes the hyper-parameters of the fittest member and its ancestors, by generation."""
        winner = self._generations[-1].identities[0]
        line = self.gadam.lineage.line(winner)
        files.restart(0)  # an earlier winner may have had other ancestors
        for generation in range(self._last + 1):
            # An individual's generation is the one after its birth.
            then = next(one for one in line if one["generation"] <= generation + 1)
            values = [
                scalar(f"{place}/{name}", value)
                for name, value in then["hyperparameters"].items()
                for place in ("slot", _WINNER)
            ]
            files.write(generation, values, run=_WINNER)
        files.close()

    def _family_tree(self) -> list[Summary.Value]:
        lineage, generations = self.gadam.lineage, list(self._generations)
        table = family_tree.table(lineage, generations[-1])
        values = list(text_pb("population/family_table", table).value)
        if family_tree.can_draw():
            picture = family_tree.drawn(lineage, generations)
            values.append(_image("population/family_tree", picture))
        return values

    # --- the lineage's file --------------------------------------------------

    def _open_lineage(self) -> None:
        self._lineage_path = os.path.join(self.log_dir, "lineage.jsonl")
        try:
            self._write_lineage()
            self._lineage_file = tf.io.gfile.GFile(self._lineage_path, "a")
        except WRITE_ERRORS as error:
            raise unwritable(self.log_dir, type(self).__name__, error) from error

    def _write_lineage(self) -> None:
        """Rewrites the file, with one line for each individual."""
        whole = f"{self._lineage_path}.new"
        self.gadam.lineage.to_json_lines(whole)
        tf.io.gfile.rename(whole, self._lineage_path, overwrite=True)

    def _note_lineage(self) -> None:
        """Adds what became of a generation's parents and their children."""
        lineage = self.gadam.lineage
        children = range(len(lineage) - self.gadam.population_size, len(lineage))
        evaluated = [*self._generations[-1].identities, *children]
        try:
            self._lineage_file.write(lineage.latest_json_lines(evaluated))
            self._lineage_file.flush()
        except WRITE_ERRORS as error:
            self._files.give_up(error)

    def _close_lineage(self) -> None:
        try:
            self._lineage_file.close()
            self._write_lineage()
        except WRITE_ERRORS as error:
            self._files.give_up(error)


def _layout(evolving: Iterable[str]) -> layout_pb2.Layout:
    losses = "population/fitness_loss/"
    margin = layout_pb2.MarginChartContent.Series(
        value=f"{losses}mean", lower=f"{losses}best", upper=f"{losses}worst"
    )
    charts = [
        layout_pb2.Chart(
            title="fitness loss: mean, best to worst",
            margin=layout_pb2.MarginChartContent(series=[margin]),
        )
    ]
    lines = {
        "fitness loss of each slot": ["slot/fitness_loss$"],
        "the best member's loss, trained and validated": ["best/loss$", "best/val_loss$"],
        "diversity": ["population/diversity$"],
        "children that survived": ["population/children_survived$"],
        **{f"{name} of each slot": [f"slot/{name}$"] for name in evolving},
        **{f"{name} of the winner's line": [f"{_WINNER}/{name}$"] for name in evolving},
    }
    charts += [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))
        for title, tags in lines.items()
    ]
    return layout_pb2.Layout(category=[layout_pb2.Category(title="Population", chart=charts)])


def _image(tag: str, png: bytes) -> Summary.Value:
    """An image for `EventFiles.write`."""
    # A PNG has its width and height after the signature and the name of its first chunk.
    sides = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    metadata = image_plugin.create_summary_metadata(
        display_name="", description="", converted_to_tensor=True
    )
    tensor = TensorProto(
        dtype=DT_STRING,
        string_val=[*(str(side).encode() for side in sides), png],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=3)]),
    )
    return Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
