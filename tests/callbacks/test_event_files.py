"""Event files, read back by TensorBoard's own reader."""

import gc
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from tensorboard.plugins.histogram.summary_v2 import histogram_pb

from keras_gdopt.callbacks.event_files import EventFiles, scalar, write_layout
from tests.callbacks.conftest import eventually


def read(log_dir):
    """{tag: [(step, array)]} of all event files of a directory."""
    accumulator = EventAccumulator(str(log_dir), size_guidance={"tensors": 0})
    accumulator.Reload()
    return {
        tag: [(e.step, tf.make_ndarray(e.tensor_proto)) for e in accumulator.Tensors(tag)]
        for tag in accumulator.Tags()["tensors"]
    }


def _open_files(directory):
    """Which files below a directory this process has open."""
    links = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if link.is_symlink()]
    return [target for target in targets if target.startswith(str(directory))]


def test_one_event_a_step_in_each_run(tmp_path):
    files = EventFiles(str(tmp_path), owner="Test", runs=["a", "b"])
    for step in (0, 1, 5):
        values = histogram_pb("h", np.arange(step + 1)).value
        files.write(step, [scalar("x", step / 10), scalar("y", -step), *values], run="a")
    files.write(3, [scalar("x", float("nan"))], run="b")
    # All is there before the files are closed.
    written = read(tmp_path / "a")
    np.testing.assert_allclose(written["x"], [(0, 0.0), (1, 0.1), (5, 0.5)], rtol=1e-6)
    assert written["y"] == [(0, 0.0), (1, -1.0), (5, -5.0)]
    assert [(step, h[:, 2].sum()) for step, h in written["h"]] == [(0, 1), (1, 2), (5, 6)]
    ((step, value),) = read(tmp_path / "b")["x"]
    assert step == 3 and np.isnan(value)
    (path,) = (tmp_path / "a").iterdir()
    assert sum(1 for _ in tf.data.TFRecordDataset(str(path))) == 1 + 3
    files.close()
    files.write(6, [scalar("x", 1.0)], run="a")
    assert len(read(tmp_path / "a")["x"]) == 3


@pytest.mark.parametrize("again", [0, 2, 3, 4])
def test_what_is_written_again_counts_once(again, tmp_path):
    for first, value in ((0, 1.0), (again, 2.0)):
        files = EventFiles(str(tmp_path), owner="Test")
        files.restart(first)
        for step in range(first, 4):
            files.write(step, [scalar("x", value)])
            if step % 2:
                files.write(step, [scalar("sometimes", value)])
    expected = [(step, 2.0 if step >= again else 1.0) for step in range(4)]
    assert read(tmp_path)["x"] == expected
    assert read(tmp_path)["sometimes"] == expected[1::2]


@pytest.mark.slow
@pytest.mark.parametrize("load_fast", ["true", "false"])
def test_a_tensorboard_that_runs_shows_each_step_once(load_fast, serving, tmp_path):
    def write(first, last, value):
        files = EventFiles(str(tmp_path), owner="Test", runs=["run"])
        files.restart(first)
        for step in range(first, last):
            files.write(step, [scalar("x", value)], run="run")
        files.close()

    write(0, 4, 1.0)
    arguments = ["--load_fast", load_fast, "--reload_interval", "1"]
    with serving(tmp_path, ["run"], *arguments) as server:
        shown = eventually(lambda: server.scalars("run", "x"), lambda found: len(found) == 4)
        assert shown == [(step, 1.0) for step in range(4)]
        write(2, 6, 2.0)
        shown = eventually(lambda: server.scalars("run", "x"), lambda found: (5, 2.0) in found)
        assert shown == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_a_killed_process_ends_in_the_middle_of_a_record(tmp_path):
    files = EventFiles(str(tmp_path), owner="Test")
    for step in range(3):
        files.write(step, [scalar("x", step)])
    files.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert read(tmp_path)["x"] == [(0, 0.0), (1, 1.0)]
    files = EventFiles(str(tmp_path), owner="Test")
    files.restart(1)
    files.write(1, [scalar("x", 7.0)])
    assert read(tmp_path)["x"] == [(0, 0.0), (1, 7.0)]


def test_other_files_keep_what_they_hold(tmp_path):
    with tf.summary.create_file_writer(str(tmp_path)).as_default():
        tf.summary.scalar("theirs", 1.0, step=5)
    for owner in ("Other", "Test"):
        files = EventFiles(str(tmp_path), owner=owner)
        files.write(5, [scalar(owner, 2.0)])
        files.close()
    files = EventFiles(str(tmp_path), owner="Test")
    files.restart(0)
    assert read(tmp_path) == {"theirs": [(5, 1.0)], "Other": [(5, 2.0)]}
    # Nor is anything else left.
    assert len(list(tmp_path.iterdir())) == 4


def test_files_close_with_their_owner(tmp_path):
    files = EventFiles(str(tmp_path), owner="Test", runs=["a", "b"])
    assert len(_open_files(tmp_path)) == 2
    files.close()
    files.close()
    assert not _open_files(tmp_path)
    files = EventFiles(str(tmp_path), owner="Test", runs=["a", "b"])
    files.write(0, [scalar("x", 1.0)], run="a")
    del files
    gc.collect()
    assert not _open_files(tmp_path)
    assert read(tmp_path / "a")["x"] == [(0, 1.0)]


@pytest.mark.parametrize(
    "make",
    [
        lambda path: EventFiles(path, owner="Test"),
        lambda path: EventFiles(path, owner="Test", runs=["a"]),
        lambda path: write_layout(path, layout_pb2.Layout(), owner="Test"),
    ],
)
def test_a_directory_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = str(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match=rf"`log_dir` of Test must be.*Received: .*{path}"):
        make(path)


class _FullAfter:
    """A writer of records whose disk is full after so many writes or flushes."""

    def __init__(self, writer, fails, error):
        self._writer, self._fails, self._error = writer, fails, error
        self.close = writer.close

    def write(self, record):
        self._writer.write(record)
        if self._fails == "write":
            raise self._error

    def flush(self):
        self._writer.flush()
        if self._fails == "flush":
            raise self._error


FULL = [OSError(28, "full"), tf.errors.ResourceExhaustedError(None, None, "full")]


@pytest.mark.parametrize("error", FULL, ids=["OSError", "OpError"])
@pytest.mark.parametrize("fails", ["write", "flush"])
def test_one_warning_when_a_write_fails(fails, error, tmp_path):
    files = EventFiles(str(tmp_path), owner="Test", runs=["a", "b"])
    files._writers = {r: _FullAfter(w, fails, error) for r, w in files._writers.items()}
    with pytest.warns(
        UserWarning, match="Test can no longer write to .* training goes on"
    ) as caught:
        for step in range(3):
            for run in "ab":
                files.write(step, [scalar("x", 1.0)], run=run)
        files.restart(1)
        files.close()
    assert len(caught) == 1
    assert files.closed
    assert not _open_files(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_device_that_is_full(tmp_path):
    files = EventFiles(str(tmp_path), owner="Test")
    files._writers[""] = tf.io.TFRecordWriter("/dev/full")
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        for step in range(3):
            files.write(step, [scalar("x", 1.0)])
    assert len(caught) == 1
    del files
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gc.collect()


def test_one_layout_however_often_it_is_written(tmp_path):
    for title in ("old", "new"):
        layout = layout_pb2.Layout(category=[layout_pb2.Category(title=title)])
        write_layout(str(tmp_path), layout, owner="Test")
    ((step, content),) = read(tmp_path)[metadata.CONFIG_SUMMARY_TAG]
    assert step == 0
    assert layout_pb2.Layout.FromString(content.item()).category[0].title == "new"
    assert len(list(tmp_path.iterdir())) == 1
