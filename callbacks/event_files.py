"""Writes event files for TensorBoard without TensorFlow operations."""

import contextlib
import os
import socket
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar
from tensorboard.plugins.scalar import metadata as scalar_plugin

# What writing to local and to remote file systems raises.
WRITE_ERRORS = (OSError, tf.errors.OpError)

_SCALAR = scalar_plugin.create_summary_metadata(display_name="", description="")


class EventFiles:
    """The event files of one callback during one `fit`: one in each of its runs.

    Each write is one event with all values of a step and is flushed at once, so that nothing
    written is lost, however training ends. (`tf.summary` would write the same records through
    an operation, which takes twenty times as long.)

    If a write fails, for example because the disk is full, there is one warning for all runs,
    nothing more is written, and training goes on. The files are closed when the object is
    deleted, if not earlier.

    Args:
        log_dir: Any path that `tf.io.gfile` can write to. Created if it does not exist.
        owner: The callback's class, for messages and the files' names.
        runs: Directories within `log_dir`, one for each run. Defaults to `log_dir` itself.

    Raises:
        ValueError: If a directory cannot be created or written to.

    Example:

    >>> import tempfile
    >>> from keras_gdopt.callbacks.event_files import EventFiles, scalar
    >>> files = EventFiles(tempfile.mkdtemp(), owner="MyCallback", runs=["one", "other"])
    >>> files.write(0, [scalar("loss", 0.5), scalar("rate", 0.1)], run="one")
    >>> files.close()
    """

    def __init__(self, log_dir: str, *, owner: str, runs: Sequence[str] = ("",)) -> None:
        self._log_dir = log_dir
        self._owner = owner
        self._writers: dict[str, tf.io.TFRecordWriter] = {}
        # TensorBoard reads the files of a run in the order of their names.
        where = f"{socket.gethostname()}.{os.getpid()}"
        self._name = f"events.out.tfevents.{time.time():.6f}.{where}.{owner}"
        for run in runs:
            self._writers[run] = _opened(os.path.join(log_dir, run), self._name, log_dir, owner)

    @property
    def closed(self) -> bool:
        """Whether writing has ended, by `close` or `give_up`."""
        return not self._writers

    def write(self, step: int, values: Iterable[Summary.Value], run: str = "") -> None:
        """Writes one event of a run.

        Args:
            step: The step at which TensorBoard draws the values.
            values: From `scalar`, or the `value` of any summary that TensorBoard's plugins
                make.
            run: One of the constructor's `runs`.
        """
        if self._writers:
            summary = Summary(value=values)
            self._write(run, Event(wall_time=time.time(), step=step, summary=summary))

    def restart(self, step: int) -> None:
        """Removes the events from `step` on from earlier files of this owner, in all runs.

        A run that was killed between an event and the next checkpoint writes the event again
        when it resumes. This removes it from the earlier files, and writes an event that makes
        a TensorBoard which has already read it forget it.
        """
        start = SessionLog(status=SessionLog.START)
        for run in list(self._writers):
            directory = os.path.join(self._log_dir, run)
            try:
                for name in tf.io.gfile.listdir(directory):
                    if name.endswith(f".{self._owner}") and name != self._name:
                        _shorten(directory, name, step)
            except WRITE_ERRORS as error:
                self.give_up(error)
            self._write(run, Event(wall_time=time.time(), step=step, session_log=start))

    def give_up(self, error: Exception) -> None:
        """Warns that a write failed, and ends writing."""
        if self._writers:
            warnings.warn(
                f"{self._owner} can no longer write to '{self._log_dir}', so training goes on "
                f"without it: {str(error) or type(error).__name__}",
                stacklevel=2,
            )
            self.close()

    def close(self) -> None:
        """Closes the files. Writing afterwards does nothing."""
        writers, self._writers = self._writers, {}
        for writer in writers.values():
            # What was flushed is safe, and a warning has told of the rest.
            with contextlib.suppress(*WRITE_ERRORS):
                writer.close()

    def _write(self, run: str, event: Event) -> None:
        if not self._writers:
            return
        writer = self._writers[run]
        try:
            writer.write(event.SerializeToString())
            writer.flush()
        except WRITE_ERRORS as error:
            self.give_up(error)


def scalar(tag: str, value: float) -> Summary.Value:
    """A scalar for `EventFiles.write`."""
    tensor = TensorProto(dtype=DT_FLOAT, float_val=[value])
    return Summary.Value(tag=tag, metadata=_SCALAR, tensor=tensor)


def values_of(summary: Any) -> list[Summary.Value]:
    """Converts a summary of TensorFlow's class to values for `EventFiles.write`.

    Some of TensorBoard's plugins make summaries of that class, others of TensorBoard's own.
    """
    return list(Summary.FromString(summary.SerializeToString()).value)


def write_layout(log_dir: str, layout: layout_pb2.Layout, *, owner: str) -> None:
    """Writes a layout of charts for TensorBoard's custom scalars.

    Its file always has the same name and is overwritten, so that a directory has one,
    however often training begins.

    Args:
        log_dir: Any path that `tf.io.gfile` can write to. TensorBoard reads one layout from
            each directory, and merges those of different directories.
        layout: The charts.
        owner: The callback's class, for messages and the file's name.

    Raises:
        ValueError: If the directory cannot be created or written to.
    """
    writer = _opened(log_dir, f"events.out.tfevents.0.{owner}.layout", log_dir, owner)
    summary = Summary(value=values_of(custom_scalar.pb(layout)))
    event = Event(wall_time=time.time(), step=0, summary=summary)
    try:
        writer.write(event.SerializeToString())
        writer.close()
    except WRITE_ERRORS as error:
        raise unwritable(log_dir, owner, error) from error


def _opened(directory: str, name: str, log_dir: str, owner: str) -> tf.io.TFRecordWriter:
    try:
        tf.io.gfile.makedirs(directory)
        writer = tf.io.TFRecordWriter(os.path.join(directory, name))
        writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        writer.flush()
    except WRITE_ERRORS as error:
        raise unwritable(log_dir, owner, error) from error
    return writer


def _shorten(directory: str, name: str, step: int) -> None:
    """Removes the events from a step on from a file."""
    path, kept = os.path.join(directory, name), []
    loses = False
    for record in RawEventFileLoader(path).Load():  # stops where a killed process stopped
        event = Event.FromString(record)
        if event.step < step or event.HasField("file_version"):
            kept.append(record)
        else:
            loses = True
    if loses:
        # TensorBoard reads no file of this name.
        shorter = os.path.join(directory, f"shorter.{os.getpid()}")
        with tf.io.TFRecordWriter(shorter) as writer:
            for record in kept:
                writer.write(record)
        tf.io.gfile.rename(shorter, path, overwrite=True)


def unwritable(log_dir: str, owner: str, error: Exception) -> ValueError:
    """The error to raise if a directory turns out to be unusable before training."""
    return ValueError(
        f"Argument `log_dir` of {owner} must be a directory that can be created and written "
        f"to. Received: log_dir={log_dir!r} ({error})"
    )
