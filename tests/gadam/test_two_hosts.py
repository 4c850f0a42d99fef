"""A population on two hosts: two network namespaces of this machine, with a cable between them."""

import os
import pickle
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest

pytest.importorskip("ray")

HOSTS = {"gdopt_head": "10.77.0.1", "gdopt_other": "10.77.0.2"}
HEAD, OTHER = HOSTS
CABLES = {HEAD: "gdopt_h", OTHER: "gdopt_o"}

# What `fit` runs in, on the head. The fault comes in the second generation.
_RUN = """
import os, pickle, signal, subprocess, sys, threading
import keras, ray
import keras_gdopt as gdopt
from keras_gdopt.gadam.cluster.pool import Pool
from tests.gadam import test_cluster as here
from tests.gadam.test_two_hosts import CABLES, HEAD, HOSTS, kill

fault, method, path, *directory = sys.argv[1:]
keras.config.set_floatx("float64")
submit, struck = Pool._submit, []

def strike():
    struck.append(fault)
    if fault in HOSTS:
        return kill(fault)
    cable = ["ip", "link", "set", CABLES[HEAD]]
    subprocess.run([*cable, "down"], check=True)
    again = threading.Timer(float(fault), lambda: subprocess.run([*cable, "up"], check=True))
    again.daemon = True
    again.start()

def submitted(pool, task, number):
    references = submit(pool, task, number)
    if task.method == method and not struck and task.arguments()[0].generation == 1:
        strike()
    return references

Pool._submit = submitted
ray.init(address=HOSTS[HEAD] + ":6379", log_to_driver=False)
keep = {"checkpoint_dir": directory[0]} if directory else {}
gadam = here._run(gdopt.RayEngine(2, address="auto", task_timeout=60.0), **keep)
assert bool(struck) == (fault != "none")
events = [event for logs in gadam.noted for event in logs["events"]]
members = [gadam.member(rank).get_weights() for rank in range(here.SIZE)]
with open(path, "wb") as file:
    pickle.dump((events, members, gadam.history.history, list(gadam.lineage)), file)
"""


def kill(host):
    """Ends all that runs on a host."""
    pids = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout
    for pid in pids.split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue


def _ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """What runs a command on a host, and what starts Ray on both; afterwards they are gone."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs the right to make network namespaces, and the command `ip`")
    made = [_ip("netns", "add", host, check=False).returncode for host in HOSTS]
    if any(made):
        pytest.skip("this machine makes no network namespaces")
    directories = []
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }

    def run(host, *command):
        words = ["ip", "netns", "exec", host, *command]
        subprocess.run(words, env=environment, check=True, timeout=400)

    def start():
        for host, address in HOSTS.items():
            kill(host)
            directories.append(tempfile.mkdtemp(prefix="ray_"))
            role = [f"--address={HOSTS[HEAD]}:6379"]
            if host == HEAD:
                role = ["--head", "--port=6379", "--include-dashboard=false"]
            its = [f"--node-ip-address={address}", f"--temp-dir={directories[-1]}", "--num-cpus=1"]
            run(host, "ray", "start", *role, *its)

    try:
        cable = ["link", "add", CABLES[HEAD], "netns", HEAD, "type", "veth"]
        _ip(*cable, "peer", "name", CABLES[OTHER], "netns", OTHER)
        for host, address in HOSTS.items():
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "addr", "add", f"{address}/24", "dev", CABLES[host])
            _ip("-n", host, "link", "set", CABLES[host], "up")
        start()
        yield run, start
    finally:
        for host in HOSTS:
            kill(host)
            _ip("netns", "del", host, check=False)
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)


def _results(path):
    with open(path, "rb") as file:
        return pickle.load(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "method", "lost"),
    [
        ("none", "none", 0),
        (OTHER, "train_parents", 1),
        (OTHER, "fitness", 1),
        (OTHER, "train_children", 1),
        ("5", "train_children", 0),
        ("120", "train_parents", 1),
    ],
    ids=["no fault", "parents", "fitness", "children", "a short cut", "a long cut"],
)
def test_the_results_are_those_of_one_machine(fault, method, lost, hosts, tmp_path, float64):
    """Whether the other host is lost, or the cable between them for some seconds or for good."""
    run, _ = hosts
    run(HEAD, sys.executable, "-c", _RUN, fault, method, str(tmp_path / "run.pkl"))
    assert len(_assert_as_on_one_machine(tmp_path / "run.pkl")) == lost


@pytest.mark.slow
def test_the_head_is_lost_and_the_run_goes_on_from_its_checkpoint(hosts, tmp_path, float64):
    """With it the process that runs `fit` dies, and the cluster, which is started again."""
    run, start = hosts
    script = [sys.executable, "-c", _RUN]
    path, directory = str(tmp_path / "run.pkl"), str(tmp_path / "checkpoints")
    with pytest.raises(subprocess.CalledProcessError):
        run(HEAD, *script, HEAD, "train_children", path, directory)
    start()
    run(HEAD, *script, "none", "none", path, directory)
    assert _assert_as_on_one_machine(path) == []


def _assert_as_on_one_machine(path):
    """Returns the events of the run."""
    from tests.gadam import test_cluster

    events, members, history, lineage = _results(path)
    local = test_cluster._run("auto")
    assert lineage == list(local.lineage)
    np.testing.assert_allclose(history["fitness"], local.history.history["fitness"], rtol=1e-8)
    for rank, weights in enumerate(members):
        for received, expected in zip(weights, local.member(rank).get_weights(), strict=True):
            np.testing.assert_allclose(received, expected, rtol=1e-8, atol=1e-10)
    return events
