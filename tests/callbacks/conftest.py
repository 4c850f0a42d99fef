"""A real TensorBoard, started and stopped."""

import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest


class Server:
    """What a TensorBoard on a directory answers."""

    def __init__(self, address):
        self._address = address

    def get(self, path, **query):
        """The body of an answer, in bytes."""
        url = self._address + path + ("?" + urllib.parse.urlencode(query) if query else "")
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read()

    def json(self, path, **query):
        return json.loads(self.get(path, **query))

    def post(self, path, body):
        """The JSON that answers JSON."""
        request = urllib.request.Request(
            f"{self._address}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def scalars(self, run, tag):
        """[(step, value)] of a tag; none before TensorBoard has read them."""
        try:
            points = self.json("/data/plugin/scalars/scalars", run=run, tag=tag)
        except urllib.error.HTTPError:
            return []
        return [(step, value) for _, step, value in points]


def eventually(read, holds, seconds=120):
    """What `read` returns as soon as it `holds`."""
    deadline = time.monotonic() + seconds
    while not holds(found := read()):
        assert time.monotonic() < deadline, f"still {found}"
        time.sleep(0.2)
    return found


@contextlib.contextmanager
def _serving(log_dir, runs, *arguments):
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir)]
    # On any free port. Of an option that is given twice the second counts.
    command += ["--port", "0", "--host", "127.0.0.1", "--reload_interval", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if "http://" in line:
                break
        else:
            raise AssertionError(f"TensorBoard ended with {process.wait()}")
        server = Server("http://" + line.split("http://")[1].split("/")[0])
        eventually(lambda: server.json("/data/runs"), lambda found: set(runs) <= set(found))
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)
        process.stderr.close()


@pytest.fixture
def serving():
    """`with serving(log_dir, runs, *arguments) as server`, once it knows of the runs."""
    return _serving
