"""What version 0.1.0 saved loads, and goes on as it went on there."""

import json
import shutil
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.data.version_0_1_0 import make
from tests.parameters import slow

SAVED = Path(make.__file__).parent
ALIKE = [name for name in make.OPTIMIZERS if name not in ("nag", "adam", "lookahead", "lbfgs")]


@pytest.fixture(scope="module")
def arrays():
    with np.load(SAVED / "arrays.npz") as file:
        return dict(file)


def _kept(arrays, prefix):
    return [arrays[f"{prefix}/{i}"] for i in range(sum(key.startswith(prefix) for key in arrays))]


def _release(version):
    return [int(part) for part in version.split(".")[:2]]


@pytest.mark.parametrize(
    "name", [slow(name) if name in ALIKE else name for name in make.OPTIMIZERS]
)
def test_a_model_loads_and_goes_on(name, arrays):
    with zipfile.ZipFile(SAVED / f"{name}.keras") as file:
        saved_by = json.loads(file.read("metadata.json"))["keras_version"]
    if _release(keras.__version__) < _release(saved_by):  # layers may have other arguments
        pytest.skip(f"Keras reads no files of newer versions, and this is of Keras {saved_by}")
    model = keras.models.load_model(SAVED / f"{name}.keras")
    # What was added since then comes last.
    for received, saved in zip(make.arrays(model), _kept(arrays, f"{name}/saved"), strict=False):
        np.testing.assert_array_equal(received, saved)
    make.steps(model, 2)
    for received, later in zip(model.get_weights(), _kept(arrays, f"{name}/later"), strict=True):
        np.testing.assert_allclose(received, later, rtol=1e-6, atol=1e-7)


def test_a_population_goes_on(arrays, tmp_path):
    shutil.copytree(SAVED / "population", tmp_path, dirs_exist_ok=True)
    gadam = make.fit_gadam(tmp_path, 2)
    later = _kept(arrays, "population/later")
    for received, expected in zip(gadam.model.get_weights(), later, strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-6, atol=1e-7)
