"""Saves a run at the end of a generation, and restores it."""

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

from keras_gdopt.gadam.population import Members


class SavedRun(NamedTuple):
    """A run as it was at the end of a generation."""

    members: Members
    record: dict[str, Any]
    """Everything about the run that is not in `members`, as JSON values."""


class PopulationCheckpoint:
    """A directory with the last two saved generations of a run.

    `tf.train.CheckpointManager` lists a generation only when it is completely written, so a
    process that dies while writing leaves the previous one usable.

    Args:
        directory: The path of the directory, which is created if it does not exist.
        identity: What a run must have in common with the run that wrote the directory, by name.
    """

    def __init__(self, directory: str, identity: dict[str, Any]) -> None:
        self._directory = str(directory)
        self._identity = identity
        self._variables: list[tf.Variable] = []
        self._record = tf.Variable("", dtype=tf.string, trainable=False)
        self._manager: tf.train.CheckpointManager | None = None

    def save(self, members: Members, record: dict[str, Any]) -> None:
        """Saves a generation, whose number is `record["generation"]`."""
        manager = self._made_for(members)
        for variable, value in zip(self._variables, tf.nest.flatten(members), strict=True):
            variable.assign(value)
        self._record.assign(json.dumps({"identity": self._identity, **record}))
        manager.save(checkpoint_number=record["generation"])

    def restore(self, like: Members) -> SavedRun | None:
        """Reads the newest generation that is not damaged; `None` if there is no checkpoint.

        Args:
            like: Members of the expected shapes and types.

        Raises:
            ValueError: If the directory belongs to another run, or all checkpoints are damaged.
        """
        manager = self._made_for(like)
        failures, paths = [], list(manager.checkpoints)
        if not paths:
            paths = self._without_a_list()
            failures = [f"{self._directory}/checkpoint, the list of them"] if paths else []
        for path in reversed(paths):
            try:
                record = _record_in(path)
                self._check_identity(record)
                self._checkpoint.restore(path).assert_existing_objects_matched()
            except _OtherRunError:
                raise
            except Exception as error:  # reading a damaged file may raise anything
                failures.append(f"{path}: {str(error).splitlines()[0]}")
                continue
            if failures:
                warnings.warn(
                    f"A checkpoint is damaged, so the run goes on from {path}. This could not "
                    f"be read: {'; '.join(failures)}",
                    stacklevel=2,
                )
            values = [tf.convert_to_tensor(variable) for variable in self._variables]
            members = tf.nest.pack_sequence_as(like, values)
            return SavedRun(members, record)
        if failures:
            raise ValueError(
                f"No checkpoint in '{self._directory}' can be read. Expected an empty directory, "
                f"or one that Gadam wrote. Received: {'; '.join(failures)}"
            )
        return None

    def _without_a_list(self) -> list[str]:
        """Finds the checkpoints of a directory that has lost its list of them, oldest first."""
        found = Path(self._directory).glob("ckpt-*.index")
        stems = [str(path.with_suffix("")) for path in found]
        return sorted(stems, key=lambda stem: int(stem.rpartition("-")[2]))

    def _made_for(self, members: Members) -> tf.train.CheckpointManager:
        if self._manager is None:
            self._variables = [
                tf.Variable(tf.zeros(value.shape, value.dtype), trainable=False)
                for value in tf.nest.flatten(members)
            ]
            self._checkpoint = tf.train.Checkpoint(members=self._variables, record=self._record)
            self._manager = tf.train.CheckpointManager(
                self._checkpoint, self._directory, max_to_keep=2
            )
        return self._manager

    def _check_identity(self, record: dict[str, Any]) -> None:
        """Raises an `_OtherRunError` if a checkpoint belongs to another run."""
        if record["identity"].get("engine") == "unrolled":
            raise _OtherRunError(
                f"The directory '{self._directory}' is of the engine 'unrolled' of version 0.1.0, "
                "whose members were Keras models, each with an optimizer of its own; no engine of "
                "this version knows what they kept. Let version 0.1.0 end the run, or begin one "
                "in another `checkpoint_dir` from the weights of its best member. Received: "
                f"generation {record['generation']} of {len(record['identities'])} members"
            )
        differences = [
            f"{name} was {record['identity'].get(name)!r} and is {value!r}"
            for name, value in self._identity.items()
            if record["identity"].get(name) != value
        ]
        if differences:
            raise _OtherRunError(
                f"The directory '{self._directory}' holds another run. Use another "
                f"`checkpoint_dir`, or what it was written with. Received: "
                f"{'; '.join(differences)}"
            )


class _OtherRunError(ValueError):
    """Raised if a directory holds a run that this one cannot continue."""


def _record_in(path: str) -> dict[str, Any]:
    """Reads the record of a checkpoint, and nothing else of it."""
    reader = tf.train.load_checkpoint(path)
    return json.loads(reader.get_tensor("record/.ATTRIBUTES/VARIABLE_VALUE"))
