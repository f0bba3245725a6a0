"""What sample_data.py promises: versions, scaling, and creations that are interrupted or collide."""

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import sample_data
from sample_data import make_sample_data, robust_scale, write_dataset

REPOSITORY = Path(sample_data.__file__).parent


def written_column(folder, name):
    """A column of a one-shard dataset as a list, read with pyarrow alone."""
    with pa.memory_map(str(Path(folder, "data-00000-of-00001.arrow"))) as file:
        return pa.ipc.open_stream(file).read_all().column(name).to_pylist()


def some_recording(timepoints=60, parcels=5, seed=0):
    return np.random.default_rng(seed).normal(1000, 20, (timepoints, parcels)).astype(np.float32)


# Versions


@pytest.mark.parametrize("dtype", ["float16", ">f4", "float64", "int16", "uint8"])
def test_write_dataset_needs_no_pandas(dtype, tmp_path):
    (tmp_path / "pandas.py").write_text("raise ImportError('pandas is not here')")
    script = ("import numpy as np; from sample_data import write_dataset\n"
              f"recording = np.arange(12).reshape(4, 3).astype({dtype!r})\n"
              f"write_dataset({str(tmp_path / 'data')!r}, {{'R': [recording], 'Age': [None], 'n': [1]}})")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"})
    assert done.returncode == 0, done.stderr
    assert written_column(tmp_path / "data", "R") == [np.arange(12).reshape(4, 3).tolist()]


# Scaling


def test_robust_scale_gives_median_0_and_interquartile_range_1():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled = robust_scale(some_recording())
    low, median, high = np.percentile(scaled, [25, 50, 75], axis=0)
    assert scaled.dtype == np.float32
    assert np.allclose(median, 0, atol=1e-6)
    assert np.allclose(high - low, 1, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16])
def test_robust_scale_makes_parcels_that_hardly_vary_zeros_and_names_them(dtype):
    recording = some_recording().astype(dtype)
    recording[:, 1] = 0
    recording[:, 3] = 1000
    recording[7, 3] = 1100          # a spike in a parcel that is constant otherwise
    with pytest.warns(UserWarning, match=r"parcels 1, 3 .*written as zeros"):
        scaled = robust_scale(recording)
    assert np.isfinite(scaled).all()
    assert not scaled[:, [1, 3]].any()
    assert np.array_equal(scaled[:, [0, 2, 4]], robust_scale(recording[:, [0, 2, 4]]))


def test_robust_scale_takes_rounding_noise_for_no_variance():
    recording = some_recording().astype(np.float64)
    recording[:, 2] = 1000 + 1e-12 * recording[:, 2]
    with pytest.warns(UserWarning, match="parcels 2 "):
        assert not robust_scale(recording)[:, 2].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_robust_scale_refuses_nan_and_infinity_unless_told_to_write_zeros(value):
    recording = some_recording()
    recording[4, 2] = value
    with pytest.raises(ValueError, match=rf"timepoint 4, parcel 2 is {value}.*nan=.zero.") as refusal:
        robust_scale(recording)
    assert "\n" not in str(refusal.value)
    with pytest.warns(UserWarning, match="parcels 2 .*written as zeros"):
        scaled = robust_scale(recording, nan="zero")
    assert np.isfinite(scaled).all() and not scaled[:, 2].any() and scaled[:, 3].any()


def test_robust_scale_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="nan is 'ignore'"):
        robust_scale(some_recording(), nan="ignore")
    with pytest.raises(ValueError, match=r"\(timepoints, parcels\).*\(60,\)"):
        robust_scale(some_recording()[:, 0])


# Creations that are interrupted or collide


def test_an_interrupted_creation_leaves_no_train_and_can_be_repeated(tmp_path, monkeypatch):
    made, make_person = [], sample_data.make_person

    def interrupted(*arguments):
        made.append(arguments)
        if len(made) == 4:          # of 2 in val and 3 in train
            raise KeyboardInterrupt
        return make_person(*arguments)

    sizes = {"num_train": 3, "num_val": 2, "num_parcels": 6, "num_timepoints": 40}
    monkeypatch.setattr(sample_data, "make_person", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_sample_data(tmp_path, **sizes)
    assert not (tmp_path / "train").exists()
    make_sample_data(tmp_path, **sizes)
    assert {path.name for path in tmp_path.iterdir()} == {"train", "val", "coords"}


def test_a_failed_write_keeps_the_older_dataset_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", {"n": [1, 2]})

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_data, "column_values", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "data", {"n": [3, 4]})
    assert written_column(tmp_path / "data", "n") == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_leftovers_of_killed_runs_harm_nothing(tmp_path):
    killed = ("import os, signal, sample_data\n"
              "sample_data.column_values = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
              f"sample_data.write_dataset({str(tmp_path / 'data')!r}, {{'n': [1]}})")
    assert subprocess.run([sys.executable, "-c", killed], cwd=REPOSITORY).returncode == -9
    leftovers = list(tmp_path.iterdir())
    assert len(leftovers) == 1 and leftovers[0].name.startswith(".data.")
    write_dataset(tmp_path / "data", {"n": [2]})
    write_dataset(tmp_path / "data", {"n": [3]})
    assert written_column(tmp_path / "data", "n") == [3]


def test_writers_of_one_folder_do_not_collide(tmp_path):
    failures = []

    def write_often(writer):
        for _ in range(40):
            try:
                write_dataset(tmp_path / "data", {"n": [writer] * 100}, num_shards=1)
            except Exception as error:
                failures.append(error)

    writers = [threading.Thread(target=write_often, args=(k,)) for k in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert not failures
    assert len(set(written_column(tmp_path / "data", "n"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
