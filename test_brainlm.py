"""What brainlm.py promises, one test a promise. First in the order of the file: data, tokens, attention, model, masking and
loss, head, checkpoints, baselines, commands. Then what must hold when things go wrong: kills, broken input, Arrow layouts,
many processes, the Hub.

    pytest

Shapes: B batch, T timepoints, V parcels, P patch length, N = T / P temporal tokens, H hidden size, S = 1 + N * V.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal as signals
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

import brainlm
import sample_data
from brainlm import (BadInput, BrainLM, BrainLMConfig, BrainLMRegressor, RecordingDataset, block_causal_attention,
                     block_causal_mask, error_sums, forward_mask, patchify, random_mask, reconstruction_loss, scores,
                     temporal_encoding, unpatchify)
from sample_data import make_sample_data, robust_scale, write_dataset

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp()}    # no network, and nothing in the user's cache
REPOSITORY = Path(brainlm.__file__).parent
torch.set_num_threads(1)    # the tensors here are tiny: more threads would only wait for each other


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def stir(module, seed=0):
    """Move every parameter off its start, where queries equal keys and biases are zero, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def tiny_config(N=4, P=5, **others):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} | others
    return BrainLMConfig(num_timepoints_per_voxel=N * P, timepoint_patching_size=P, **sizes)


def tiny_model(N=4, P=5, **others):
    return stir(BrainLM(tiny_config(N, P, **others)))


def tiny_input(B=2, T=20, V=3, seed=0):
    """signal [B, T, V] and xyz [V, 3] in mm."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, V, generator=generator), 50 * torch.randn(V, 3, generator=generator)


def tiny_dataset(folder, lengths=(40, 33, 52), V=3, seed=0, **columns):
    """A dataset in `folder` of recordings that have a past to learn from: each value is half the one before, plus noise
    that all parcels share in part. Returns it opened, and its recordings as arrays."""
    rng = np.random.default_rng(seed)
    recordings = []
    for T in lengths:
        signal = rng.standard_normal((T, V)) + rng.standard_normal((T, 1)) + 0.3
        for t in range(1, T):
            signal[t] += 0.5 * signal[t - 1]
        recordings.append(signal.astype(np.float32))
    write_dataset(folder, {"Recording": recordings, **columns})
    return RecordingDataset(folder, "Recording"), recordings


def masked_attention(q, k, v, V, dropout=0.0, column_0_open=False):
    """Attention as block_causal_mask defines it; same arguments and result as brainlm.block_causal_attention."""
    mask = block_causal_mask((q.shape[2] - 1) // V, V)
    if column_0_open:
        mask[:, 0] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def look_ahead(model, signal, xyz, mask=None):
    """How the future reaches the past in a model: {"value", "gradient"} at worst, the empty set if it does not."""
    P, found = model.config.timepoint_patching_size, set()
    signal = signal.clone().requires_grad_()
    output = model(signal, xyz, mask)[0]
    for end in range(P, signal.shape[1], P):            # the past: [0, end), some whole patches
        other = signal.detach().clone()
        other[:, end:] = 3 * torch.randn_like(other[:, end:])
        if not torch.equal(model(other, xyz, mask)[0][:, :end], output[:, :end]):
            found.add("value")
        weights = torch.randn_like(output[:, :end])     # any function of the past's outputs
        gradient, = torch.autograd.grad((weights * output[:, :end]).sum(), signal, retain_graph=True)
        if gradient[:, end:].any():
            found.add("gradient")
    return found


def command(*words):
    """Run brainlm.py as a user does; returns what it printed."""
    done = subprocess.run([sys.executable, REPOSITORY / "brainlm.py", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_windows_are_what_was_written(tmp_path):
    dataset, recordings = tiny_dataset(tmp_path / "data")
    assert len(dataset) == 3 and dataset.num_parcels == 3 and list(dataset.lengths) == [40, 33, 52]
    for row, recording in enumerate(recordings):
        assert np.array_equal(dataset.window(row), recording)
    assert np.array_equal(dataset.window(2, 30, 7), recordings[2][30:37])
    batch = dataset.batch([(1, 4), (0, 30)], 10)
    assert batch.dtype == torch.float32
    assert np.array_equal(batch, np.stack([recordings[1][4:14], recordings[0][30:40]]))


def test_a_window_past_the_end_is_refused_and_never_the_next_persons(tmp_path):
    dataset, recordings = tiny_dataset(tmp_path / "data")                    # of 40, 33 and 52 timepoints
    np.testing.assert_array_equal(dataset.window(0, 20, 20), recordings[0][20:])
    assert dataset.window(0, 40, 0).shape == (0, 3)
    for window in ((0, 21, 20), (0, 41), (0, -1, 20), (0, 0, 15, 3), (2, 40, 13)):
        with pytest.raises(BadInput, match=f"row {window[0]} has {len(recordings[window[0]])} timepoints"):
            dataset.window(*window)
    with pytest.raises(BadInput, match="200"):
        dataset.batch([(0, 0)], 200)


def test_training_windows_are_a_function_of_seed_and_sample_number(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data")
    rows = np.arange(3)
    windows = [dataset.training_window(n, rows, 20, seed=7) for n in range(1200)]
    backwards = [dataset.training_window(n, rows, 20, seed=7) for n in reversed(range(1200))]
    assert backwards[::-1] == windows
    assert windows != [dataset.training_window(n, rows, 20, seed=8) for n in range(1200)]

    epochs = [tuple(row for row, *_ in windows[i:i + 3]) for i in range(0, 1200, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs), "each recording once an epoch"
    assert len(set(epochs)) == 6, "in an order that changes"
    for row, length in enumerate(dataset.lengths):      # every start that leaves a whole window turns up, and no other
        assert {start for r, start, _ in windows if r == row} == set(range(length - 20 + 1))


def test_slower_training_windows_take_every_2nd_or_3rd_timepoint_where_the_recording_is_long_enough(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data", lengths=(70, 50, 25))
    windows = [dataset.training_window(n, np.arange(3), 20, seed=0, stride_prob=0.5) for n in range(600)]
    strides = [{stride for row, _, stride in windows if row == each} for each in range(3)]
    assert strides == [{1, 2, 3}, {1, 2}, {1}]
    assert all(0 <= start <= (70, 50, 25)[row] - 20 * stride for row, start, stride in windows)
    assert 160 < sum(stride > 1 for row, _, stride in windows if row < 2) < 240       # half of 400
    np.testing.assert_array_equal(dataset.window(0, 4, 20, 3), dataset.window(0)[4:64:3])


def test_training_windows_come_from_the_given_rows_alone(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data")
    assert {dataset.training_window(n, np.array([0, 2]), 20, seed=0)[0] for n in range(20)} == {0, 2}


def test_fixed_windows_reach_the_end_of_every_recording(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data", lengths=(40, 33, 52, 20))
    assert dataset.fixed_windows(range(4), 20, stride=20) == [
        (0, 0), (0, 20), (1, 0), (1, 13), (2, 0), (2, 20), (2, 32), (3, 0)]
    assert dataset.fixed_windows([1], 20, stride=5) == [(1, 0), (1, 5), (1, 10), (1, 13)]


def test_datasets_reads_what_sample_data_writes(tmp_path):
    datasets = pytest.importorskip("datasets")
    make_sample_data(tmp_path, num_train=3, num_val=2, num_parcels=10, num_timepoints=60)
    theirs = datasets.load_from_disk(str(tmp_path / "train"))
    ours = RecordingDataset(tmp_path / "train", "Voxelwise_RobustScaler_Normalized_Recording", num_parcels=10)
    assert len(theirs) == len(ours) == 3
    for row in range(3):
        assert np.array_equal(np.float32(theirs[row][ours.recording_col]), ours.window(row))
    assert theirs["Age.At.MHQ"][:] == ours.table.column("Age.At.MHQ").to_pylist()
    coords = datasets.load_from_disk(str(tmp_path / "coords"))
    xyz, networks = brainlm.read_coordinates(tmp_path / "coords")
    assert np.array_equal(np.float32([coords["X"][:], coords["Y"][:], coords["Z"][:]]).T, xyz)
    assert networks == coords["Network"][:]


def test_sample_data_has_the_same_bytes_for_the_same_seed(tmp_path):
    def contents(name, seed):
        make_sample_data(tmp_path / name, num_train=2, num_val=1, num_parcels=6, num_timepoints=40, seed=seed)
        return {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
    assert contents("a", seed=0) == contents("b", seed=0)


def test_sample_data_has_other_people_for_another_seed_and_split(tmp_path):
    ages = []
    for seed in (0, 1):
        make_sample_data(tmp_path, num_train=3, num_val=3, num_parcels=6, num_timepoints=40, seed=seed)
        for split in ("train", "val"):
            ages.extend(brainlm.read_numbers(brainlm.read_arrow(tmp_path / split), "Age.At.MHQ", split))
    assert len(set(ages)) == len(ages) == 12


def written_column(folder, name):
    """A column of a one-shard dataset as a list, read with pyarrow alone."""
    with pa.memory_map(str(Path(folder, "data-00000-of-00001.arrow"))) as file:
        return pa.ipc.open_stream(file).read_all().column(name).to_pylist()


def some_recording(timepoints=60, parcels=5, seed=0):
    return np.random.default_rng(seed).normal(1000, 20, (timepoints, parcels)).astype(np.float32)


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


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def test_a_patch_is_consecutive_timepoints_of_one_parcel():
    signal, _ = tiny_input(B=2, T=20, V=3)
    patches = patchify(signal, 5)
    assert patches.shape == (2, 4, 3, 5)
    for n in range(4):
        for v in range(3):
            assert torch.equal(patches[:, n, v], signal[:, 5 * n:5 * n + 5, v])


def test_unpatchify_is_the_inverse_of_patchify():
    signal, _ = tiny_input(B=2, T=20, V=3)
    for P in (1, 2, 5, 20):
        assert torch.equal(unpatchify(patchify(signal, P)), signal)


def test_temporal_encoding_is_the_sinusoid():
    N, H = 7, 6
    expected = np.zeros((N, H))
    for t in range(N):
        for i in range(H // 2):
            expected[t, 2 * i] = np.sin(t / 100 ** (2 * i / H))
            expected[t, 2 * i + 1] = np.cos(t / 100 ** (2 * i / H))
    np.testing.assert_allclose(temporal_encoding(N, H), expected, atol=1e-6)


def test_spatial_encoding_is_a_function_of_a_parcels_own_coordinates():
    encoding, (_, xyz) = tiny_model().spatial_encoding, tiny_input(V=3)
    together = encoding(xyz)
    assert together.shape == (3, 16)
    torch.testing.assert_close(torch.cat([encoding(xyz[v:v + 1]) for v in range(3)]), together)
    for axis in range(3):
        moved = xyz.clone()
        moved[1, axis] += 4.0
        difference = (encoding(moved) - together).abs().amax(dim=1)
        assert difference[1] > 0.1 and not difference[[0, 2]].any()


def test_tokens_are_timepoint_major_with_cls_first():
    B, N, V = 2, 4, 3
    model, (signal, xyz) = tiny_model(), tiny_input(V=V)
    tokens, _ = model.tokens(signal, xyz)
    assert tokens.shape == (B, 1 + N * V, 16)
    assert torch.equal(tokens[:, 0], model.cls_token.expand(B, -1))
    for t in range(N):
        for v in range(V):
            other = signal.clone()
            other[:, 5 * t + 2, v] += 1
            changed = (model.tokens(other, xyz)[0] != tokens).any(dim=2)
            assert changed.nonzero().tolist() == [[b, 1 + t * V + v] for b in range(B)]


def test_a_token_is_patch_or_mask_plus_where_plus_when():
    N, V = 4, 3
    model, (signal, xyz) = tiny_model(), tiny_input(V=V)
    mask = random_mask(2, N, V, 0.5)
    sequence, position = model.tokens(signal, xyz, mask)
    tokens, position = sequence[:, 1:].unflatten(1, (N, V)), position[1:].unflatten(0, (N, V))
    for b, t, v in np.ndindex(2, N, V):
        what = model.mask_token if mask[b, t, v] else model.patch_projection(signal[b, 5 * t:5 * t + 5, v])
        where_and_when = model.spatial_encoding(xyz)[v] + temporal_encoding(N, 16)[t]
        where_beside_when = torch.cat([model.spatial_encoding(xyz)[v], temporal_encoding(N, 16)[t]])
        torch.testing.assert_close(position[t, v], where_beside_when)
        torch.testing.assert_close(tokens[b, t, v], what + where_and_when)


def test_a_signal_that_does_not_fit_is_refused():
    model, (signal, xyz) = tiny_model(), tiny_input(V=3)
    with pytest.raises(BadInput, match="19 timepoints"):
        model(signal[:, :19], xyz)
    with pytest.raises(BadInput, match="2 coordinates"):
        model(signal, xyz[:2])


# ----------------------------------------------------------------------------------------------------------------------
# Attention


def test_the_mask_of_two_parcels_at_three_times():
    assert block_causal_mask(N=3, V=2).int().tolist() == [
        # CLS t0    t1    t2
        [1, 1, 1, 1, 1, 1, 1],  # CLS reads everything
        [0, 1, 1, 0, 0, 0, 0],  # t0 reads t0, and nobody but CLS reads CLS
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],  # t1 reads t0 and t1
        [0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1, 1],  # t2 reads all parcels
        [0, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("N", [1, 2, 5])
@pytest.mark.parametrize("V", [1, 3, 4])
def test_the_mask_is_block_lower_triangular(N, V):
    mask = block_causal_mask(N, V)
    assert mask.shape == (1 + N * V, 1 + N * V) and mask.dtype == torch.bool
    assert mask[0].all(), "CLS reads every token"
    assert mask[:, 0].nonzero().flatten().tolist() == [0], "nobody but CLS reads CLS"
    for i, j in np.ndindex(N * V, N * V):
        assert mask[1 + i, 1 + j] == (j // V <= i // V)


@pytest.mark.parametrize("masking", ["nothing hidden", "random", "forward"])
def test_the_past_does_not_depend_on_the_future(masking):
    """By not one bit, over four layers, and with a gradient of exactly zero."""
    model, (signal, xyz) = tiny_model(num_hidden_layers=4), tiny_input(V=3)
    mask = {"nothing hidden": None, "random": random_mask(2, 4, 3, 0.5), "forward": forward_mask(2, 4, 3)}[masking]
    assert look_ahead(model, signal, xyz, mask) == set()


def test_the_past_does_not_depend_on_the_future_in_bfloat16():
    model, (signal, xyz) = tiny_model(num_hidden_layers=4), tiny_input(V=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert look_ahead(model, signal, xyz) == set()


def test_the_future_depends_on_all_of_the_past():
    """Without this, a model that reads nothing would pass the test above."""
    model, (signal, xyz) = tiny_model(num_hidden_layers=4), tiny_input(V=3)
    signal.requires_grad_()
    output = model(signal, xyz)[0]
    for t, v in np.ndindex(4, 3):
        gradient, = torch.autograd.grad(output[:, 5 * t + 4, v].sum(), signal, retain_graph=True)
        assert gradient[:, :5 * t + 5].all()


def test_opening_column_0_of_the_mask_would_let_the_future_in(monkeypatch):
    """CLS reads everything, so parcels that read CLS know the future from the second layer on: no parcel may."""
    model, (signal, xyz) = tiny_model(num_hidden_layers=4), tiny_input(V=3)
    monkeypatch.setattr(brainlm, "block_causal_attention", masked_attention)
    assert look_ahead(model, signal, xyz) == set()
    monkeypatch.setattr(brainlm, "block_causal_attention", lambda *qkv_V: masked_attention(*qkv_V, column_0_open=True))
    assert look_ahead(model, signal, xyz) == {"value", "gradient"}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("N, V", [(1, 1), (1, 4), (4, 1), (3, 5)])
def test_fast_attention_is_masked_attention(N, V, dtype, tolerance):
    qkv = torch.randn(3, 2, 2, 1 + N * V, 8, dtype=dtype, requires_grad=True)
    weights = torch.randn(2, 2, 1 + N * V, 8, dtype=dtype)
    results = []
    for attention in (block_causal_attention, masked_attention):
        out = attention(*qkv, V)
        results.append((out, *torch.autograd.grad((weights * out).sum(), qkv)))
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("N, V", [(1, 1), (1, 4), (4, 1), (3, 5)])
def test_bfloat16_attention_on_cpus_is_masked_attention(N, V):
    """Its formulas, outputs and gradients, in float64, where they can be held to the last digits; then in bfloat16."""
    def bfloat16_path(q, k, v, V):
        scaled, k, v = (each.flatten(0, 1) for each in (q / math.sqrt(8), k, v))
        return brainlm.CPUAttention.apply(scaled, k, v, V).view(q.shape)
    qkv = torch.randn(3, 2, 2, 1 + N * V, 8, dtype=torch.float64, requires_grad=True)
    weights, results = torch.randn_like(qkv[0]), []
    for attention in (bfloat16_path, masked_attention):
        out = attention(*qkv, V)
        results.append((out, *torch.autograd.grad((weights * out).sum(), qkv)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    rounded = block_causal_attention(*qkv.bfloat16(), V)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), results[1][0], rtol=0.05, atol=0.05)


def test_bfloat16_attention_does_not_round_large_scores():
    """Trained models have scores of 60, where bfloat16 knows only quarters: weights would be wrong by a tenth."""
    N, V = 4, 50
    qkv = torch.randn(3, 1, 2, 1 + N * V, 32)
    qkv[0] *= 10
    qkv = qkv.bfloat16().requires_grad_()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        out = (block_causal_attention if dtype == torch.bfloat16 else masked_attention)(*qkv.to(dtype), V)
        results.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    for rounded, exact, tolerance in zip(*results, (0.008, 0.036, 0.036, 0.008)):      # out, and gradients of q, k, v
        assert (rounded.double() - exact.double()).norm() < tolerance * exact.double().norm()


def test_bfloat16_attention_stays_finite_where_scores_are_huge():
    generator = torch.Generator().manual_seed(0)
    for scale in 50, 100, 1000:                         # scores around 10,000, 40,000 and 4 millions
        q, k, v = (scale * torch.randn(1, 1, 13, 16, generator=generator) for _ in range(3))
        q, k, v = (each.bfloat16().requires_grad_() for each in (q, k, v))
        output = block_causal_attention(q, k, v, V=3)
        output.float().square().sum().backward()
        assert all(each.isfinite().all() for each in (output, q.grad, k.grad, v.grad)), scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_model_runs_in_any_type(dtype):
    model, (signal, xyz) = tiny_model(), tiny_input()
    mask = random_mask(2, 4, 3, 0.5, torch.Generator().manual_seed(0))
    expected = model(signal, xyz, mask)[0]
    output = model.to(dtype)(signal, xyz, mask)[0]
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_the_model_on_the_fast_path_is_the_model_under_the_mask(monkeypatch, dtype, tolerance):
    model, (signal, xyz) = tiny_model(num_hidden_layers=4).to(dtype), tiny_input(V=3)
    signal, xyz, mask = signal.to(dtype).requires_grad_(), xyz.to(dtype), random_mask(2, 4, 3, 0.5)
    results = []
    for attention in (block_causal_attention, masked_attention):
        monkeypatch.setattr(brainlm, "block_causal_attention", attention)
        prediction, hidden = model(signal, xyz, mask)
        loss = reconstruction_loss(prediction, signal, mask) + hidden.square().mean()    # CLS takes part by the latter
        results.append((prediction, hidden, *torch.autograd.grad(loss, [signal, *model.parameters()])))
    assert all(gradient.any() for gradient in results[0][2:]), "every parameter takes part"
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_attention_weights_sum_to_one_and_respect_the_mask():
    model, (signal, xyz) = tiny_model(), tiny_input(V=3)
    for layer in range(2):
        weights = model.attention(signal, xyz, layer)
        assert weights.shape == (2, 2, 13, 13)
        torch.testing.assert_close(weights.sum(dim=3), torch.ones(2, 2, 13))
        assert not weights[~block_causal_mask(4, 3).expand_as(weights)].any()


def test_attention_weights_are_those_of_the_fast_path():
    model, (signal, xyz) = tiny_model(), tiny_input(V=3)
    x, position = model.tokens(signal, xyz)
    x = model.layers[0](x, position, 3)                 # what layer 1 sees
    q, k, v = model.layers[1].queries_keys_values(x, position)
    torch.testing.assert_close(model.attention(signal, xyz, 1) @ v, block_causal_attention(q, k, v, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Model


def test_a_hidden_value_never_reaches_the_output():
    model, (signal, xyz) = tiny_model(), tiny_input(V=3)
    mask = random_mask(2, 4, 3, 0.5)
    hidden_timepoints = mask.repeat_interleave(5, dim=1)
    expected = model(signal, xyz, mask)
    for value in (100.0, math.inf, math.nan):           # not even as 0 * nan
        other = signal.masked_fill(hidden_timepoints, value)
        assert all(map(torch.equal, model(other, xyz, mask), expected))
    visible = signal.masked_fill(~hidden_timepoints, 100.0)
    assert not torch.equal(model(visible, xyz, mask)[0], expected[0])


def test_parcels_have_no_order():
    """Only their coordinates tell them apart: permuting parcels and coordinates permutes the output."""
    model, (signal, xyz) = tiny_model(), tiny_input(V=6)
    mask, order = random_mask(2, 4, 6, 0.5), torch.tensor([3, 0, 5, 1, 4, 2])
    prediction, hidden = model(signal, xyz, mask)
    permuted, permuted_hidden = model(signal[:, :, order], xyz[order], mask[:, :, order])
    torch.testing.assert_close(permuted, prediction[:, :, order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(permuted_hidden[:, 0], hidden[:, 0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(signal, xyz[order], mask)[0], prediction, atol=0.01), "coordinates matter"


def test_samples_of_a_batch_do_not_mix():
    model, (signal, xyz) = tiny_model(), tiny_input(B=3)
    mask = random_mask(3, 4, 3, 0.5)
    alone = torch.cat([model(signal[b:b + 1], xyz, mask[b:b + 1])[0] for b in range(3)])
    torch.testing.assert_close(model(signal, xyz, mask)[0], alone)


@pytest.mark.parametrize("T, V", [(5, 1), (20, 3), (45, 7)])
def test_the_same_weights_run_on_any_number_of_parcels_and_timepoints(T, V):
    model, (signal, xyz) = tiny_model(N=4), tiny_input(B=2, T=T, V=V)
    prediction, hidden = model(signal, xyz, forward_mask(2, T // 5, V))
    assert prediction.shape == (2, T, V) and hidden.shape == (2, 1 + T // 5 * V, 16)
    assert prediction.isfinite().all()


def test_a_model_overfits_one_batch():
    model, (signal, xyz) = BrainLM(tiny_config(hidden_size=32)), tiny_input(B=2, V=4)
    mask, optimizer = random_mask(2, 4, 4, 0.5), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = reconstruction_loss(model(signal, xyz, mask)[0], signal, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * signal.var()


def test_gradient_checkpointing_changes_no_value():
    model, (signal, xyz) = tiny_model().train(), tiny_input()
    mask, results = random_mask(2, 4, 3, 0.5), []
    for model.gradient_checkpointing in (False, True):
        prediction, hidden = model(signal, xyz, mask)
        loss = reconstruction_loss(prediction, signal, mask) + hidden.square().mean()
        results.append((prediction, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_acts_in_training_alone(kind):
    model, plain, (signal, xyz) = tiny_model(**{kind: 0.5}), tiny_model(), tiny_input()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(signal, xyz)[0], plain(signal, xyz)[0])
    model.train()
    assert not torch.equal(model(signal, xyz)[0], model(signal, xyz)[0])


def test_one_step_of_forecast_is_forward_masking():
    model, (signal, xyz) = tiny_model(), tiny_input(V=3)
    expected = model(signal, xyz, forward_mask(2, 4, 3))[0][:, -5:]
    assert torch.equal(model.forecast(signal[:, :-5], xyz, 5), expected)


def test_a_long_forecast_feeds_on_itself_in_a_sliding_window():
    model, (signal, xyz) = tiny_model(N=4), tiny_input(V=3, T=15)
    known = signal
    for _ in range(3):
        patch = model.forecast(known[:, -15:], xyz, 5)  # 15 known + 5 hidden timepoints fill the trained window
        known = torch.cat([known, patch], dim=1)
    assert torch.equal(model.forecast(signal, xyz, 15), known[:, 15:])


@pytest.mark.parametrize("context", [5, 13, 15, 100])
@pytest.mark.parametrize("length", [0, 1, 5, 23])
def test_forecast_takes_any_context_and_any_length(context, length):
    model, (signal, xyz) = tiny_model(N=4), tiny_input(B=3, T=context, V=2)
    future = model.forecast(signal, xyz, length)
    assert future.shape == (3, length, 2) and future.isfinite().all()
    used = min(context // 5 * 5, 15)                    # whole patches, of the trained window at most, and the latest
    assert torch.equal(future, model.forecast(signal[:, -used:], xyz, length))
    assert torch.equal(future, model.forecast(signal, xyz, 30)[:, :length])


def test_forecast_needs_one_patch():
    model, (signal, xyz) = tiny_model(), tiny_input(T=4)
    with pytest.raises(BadInput, match="at least one patch of 5"):
        model.forecast(signal, xyz, 5)


def test_embed_gives_cls_and_the_parcels_means_over_time():
    N, V = 4, 3
    model, (signal, xyz) = tiny_model(), tiny_input(V=V)
    cls, parcels = model.embed(signal, xyz)
    hidden = model(signal, xyz)[1].detach().numpy()
    assert cls.shape == (2, 16) and parcels.shape == (2, V, 16)
    assert np.array_equal(cls, hidden[:, 0])
    for v in range(V):
        mean = np.mean([hidden[:, 1 + t * V + v] for t in range(N)], axis=0)
        np.testing.assert_allclose(parcels[:, v], mean, rtol=1e-5, atol=1e-6)


def test_any_small_configuration_trains_and_is_causal():
    """Forty drawn at random, and the smallest there is: loss and gradients are finite, shapes right, the past blind."""
    for seed in range(41):
        rng = np.random.default_rng(seed)
        V, N, P, B = (int(rng.integers(1, high + 1)) for high in (40, 6, 20, 3))
        heads, layers, ratio = int(rng.choice([1, 2, 4])), int(rng.integers(1, 4)), float(rng.choice([0.5, 0.75, 1.0]))
        if seed == 0:
            V = N = P = B = heads = layers = 1
            ratio = 0.75
        config = tiny_config(N, P, hidden_size=8 * heads, num_attention_heads=heads, num_hidden_layers=layers,
                             intermediate_size=int(rng.integers(1, 40)), mask_ratio=ratio,
                             loss_fn=str(rng.choice(["mse", "mae"])))
        torch.manual_seed(seed)
        model, (signal, xyz) = stir(BrainLM(config), seed), tiny_input(B, N * P, V, seed)
        mask = forward_mask(B, N, V) if rng.random() < 0.5 else random_mask(B, N, V, ratio)
        where = f"seed {seed}: {B=} {V=} {config}"

        prediction, hidden = model(signal, xyz, mask)
        assert prediction.shape == signal.shape and hidden.shape == (B, 1 + N * V, 8 * heads), where
        loss = reconstruction_loss(prediction, signal, mask, config.loss_fn)
        loss.backward()
        assert loss.isfinite() and loss > 0, where
        trained = [parameter.grad for name, parameter in model.named_parameters() if name != "cls_token"]
        assert all(gradient.isfinite().all() for gradient in trained), where
        assert look_ahead(model, signal, xyz, mask) == set(), where


# ----------------------------------------------------------------------------------------------------------------------
# Masking and loss


@pytest.mark.parametrize("N, V, ratio", [(4, 3, 0.75), (1, 1, 1.0), (3, 7, 0.2), (10, 42, 0.123)])
def test_random_mask_hides_an_exact_number_of_every_sample(N, V, ratio):
    mask = random_mask(5, N, V, ratio)
    assert mask.shape == (5, N, V) and mask.dtype == torch.bool
    assert mask.sum(dim=(1, 2)).tolist() == 5 * [round(ratio * N * V)]


def test_a_mask_ratio_that_hides_nothing_is_refused():
    with pytest.raises(BadInput, match="hides none of 3 tokens"):
        random_mask(2, 1, 3, 0.1)


def test_random_mask_hides_every_token_equally_often_and_samples_differ():
    mask = random_mask(4000, 3, 4, 0.25, torch.Generator().manual_seed(0))
    assert (mask.float().mean(dim=0) - 0.25).abs().max() < 0.03
    assert len(mask.flatten(1).unique(dim=0)) == math.comb(12, 3), "every choice of 3 of 12 tokens turns up"


def test_random_mask_is_reproducible_with_a_generator():
    first, again, other = (random_mask(2, 5, 8, 0.5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_forward_mask_hides_the_last_temporal_token():
    mask = forward_mask(2, 3, 4)
    assert mask.shape == (2, 3, 4) and mask.dtype == torch.bool
    assert mask[:, 2].all() and not mask[:, :2].any()


def test_repeated_forward_mask_hides_whole_temporal_tokens_and_always_the_last():
    mask = brainlm.repeated_forward_mask(3, 100, 4, torch.Generator().manual_seed(0))
    assert mask.shape == (3, 100, 4) and mask[:, -1].all()
    assert torch.equal(mask, mask[:1, :, :1].expand_as(mask))                # all parcels, the same in all samples
    assert 20 < mask[0, :, 0].sum() < 50


def test_losses_are_numpys_on_hidden_tokens_alone():
    (signal, _), (prediction, _) = tiny_input(seed=0), tiny_input(seed=1)
    mask = random_mask(2, 4, 3, 0.5)
    difference = prediction.numpy() - signal.numpy()
    errors = [difference[b, t, v] for b, t, v in np.ndindex(2, 20, 3) if mask[b, t // 5, v]]
    assert len(errors) == 2 * 6 * 5
    assert reconstruction_loss(prediction, signal, mask, "mse").item() == pytest.approx(np.mean(np.square(errors)))
    assert reconstruction_loss(prediction, signal, mask, "mae").item() == pytest.approx(np.mean(np.abs(errors)))
    visible = prediction.masked_fill(~mask.repeat_interleave(5, dim=1), 1e6)
    assert torch.equal(reconstruction_loss(visible, signal, mask), reconstruction_loss(prediction, signal, mask))


# ----------------------------------------------------------------------------------------------------------------------
# Head and checkpoints


def test_the_regressor_reads_standardised_cls_mean_and_spread_and_predicts_in_the_targets_units():
    model, (signal, xyz) = stir(BrainLMRegressor(tiny_config(), target_mean=63.0, target_std=7.5)), tiny_input(B=3)
    model.feature_mean.normal_()
    model.feature_std.uniform_(0.5, 2)
    hidden = model.backbone(signal, xyz)[1]
    tokens = hidden[:, 1:].detach().numpy()
    features = torch.cat([hidden[:, 0], torch.tensor(tokens.mean(1)), torch.tensor(tokens.std(1))], dim=1)
    torch.testing.assert_close(model.features(signal, xyz), features)
    years = model(signal, xyz)
    assert years.shape == (3,)
    standard = (features - model.feature_mean) / model.feature_std
    torch.testing.assert_close(years, 63.0 + 7.5 * model.mlp(standard)[:, 0])
    assert sum(isinstance(module, torch.nn.Linear) for module in model.mlp) == 3


@pytest.mark.parametrize("kind", [BrainLM, BrainLMRegressor])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, kind):
    extra = {"target_mean": 63.1, "target_std": 7.7} if kind is BrainLMRegressor else {}
    model, (signal, xyz) = stir(kind(tiny_config(hidden_dropout_prob=0.5), **extra)), tiny_input()
    model.save_pretrained(tmp_path / "run")
    loaded = kind.from_pretrained(tmp_path / "run")
    assert loaded.config == model.config and not loaded.training
    assert all(map(torch.equal, loaded(signal, xyz), model(signal, xyz)))


def test_the_backbone_of_a_saved_regressor_loads_as_brainlm(tmp_path):
    model, (signal, xyz) = stir(BrainLMRegressor(tiny_config())), tiny_input()
    model.save_pretrained(tmp_path / "run")
    assert all(map(torch.equal, BrainLM.from_pretrained(tmp_path / "run")(signal, xyz), model.backbone(signal, xyz)))


def test_a_backbone_alone_is_no_regressor(tmp_path):
    tiny_model().save_pretrained(tmp_path / "run")
    with pytest.raises(BadInput, match="do not fit BrainLMRegressor"):
        BrainLMRegressor.from_pretrained(tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------------------
# Scores and baselines, against the shortest numpy that says the same


def test_scores_are_numpys_on_hidden_tokens_and_never_clipped():
    (signal, _), (noise, _) = tiny_input(seed=0), tiny_input(seed=1)
    mask = random_mask(2, 4, 3, 0.5)
    chosen = mask.repeat_interleave(5, dim=1).numpy()
    for prediction in (signal + 0.3 * noise, 5 + noise):
        x, y = prediction.numpy()[chosen].astype(float), signal.numpy()[chosen].astype(float)
        expected = {"R2": 1 - np.sum((x - y) ** 2) / np.sum((y - y.mean()) ** 2),
                    "MSE": np.mean((x - y) ** 2), "MAE": np.mean(abs(x - y))}
        assert scores(error_sums(prediction, signal, mask).sum(dim=1)) == pytest.approx(expected)
    assert expected["R2"] < -1


def test_scores_by_horizon_are_those_of_single_timepoints():
    (signal, _), (prediction, _) = tiny_input(seed=0), tiny_input(seed=1)
    sums = error_sums(prediction, signal, forward_mask(2, 4, 3))
    assert sums.shape == (5, 5)
    for horizon in range(1, 6):
        x, y = (each[:, 14 + horizon].double().numpy() for each in (prediction, signal))
        r2 = 1 - np.sum((x - y) ** 2) / np.sum((y - y.mean()) ** 2)
        assert scores(sums[:, horizon - 1])["R2"] == pytest.approx(r2)


def test_a_constant_signal_has_no_variance_to_explain():
    constant, (prediction, _) = torch.ones(2, 20, 3), tiny_input()
    assert scores(error_sums(prediction, constant, forward_mask(2, 4, 3)).sum(dim=1))["R2"] == -math.inf


def test_error_sums_add_up_over_batches():
    (signal, _), (prediction, _) = tiny_input(B=4, seed=0), tiny_input(B=4, seed=1)
    mask = random_mask(4, 4, 3, 0.5)
    parts = error_sums(prediction[:1], signal[:1], mask[:1]) + error_sums(prediction[1:], signal[1:], mask[1:])
    torch.testing.assert_close(parts, error_sums(prediction, signal, mask))


def test_two_evaluations_hide_the_same_tokens(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data")
    windows, seen = dataset.fixed_windows(range(3), 20, stride=20), []

    def predictor(signal, mask):
        seen.extend(mask)
        return torch.zeros_like(signal)
    for batch_size in (1, 3):
        brainlm.score_reconstruction({"zero": predictor}, dataset, windows, tiny_config(), False, batch_size)
    first, second = torch.stack(seen).chunk(2)
    assert torch.equal(first, second) and not torch.equal(first[0], first[1])


def test_regression_scores_are_numpys():
    rng = np.random.default_rng(0)
    target = rng.normal(60, 8, 30)
    prediction = target + rng.normal(3, 12, 30)
    assert brainlm.regression_scores(prediction, target) == pytest.approx({
        "MAE": np.mean(abs(prediction - target)), "MSE": np.mean((prediction - target) ** 2),
        "R2": 1 - np.mean((prediction - target) ** 2) / np.var(target), "r": np.corrcoef(prediction, target)[0, 1]})


def test_gaussian_conditional_mean(tmp_path):
    V, ridge = 5, 0.1
    dataset, recordings = tiny_dataset(tmp_path / "data", V=V)
    predictors = brainlm.gaussian_conditional(dataset)
    signal, mask = dataset.batch([(0, 0), (1, 5)], 20), random_mask(2, 4, V, 0.5)
    mask[0, 0], mask[0, 1] = True, False                # all hidden, none hidden
    prediction = predictors["Gaussian conditional mean", ridge](signal, mask)

    timepoints = np.concatenate(recordings).astype(float)
    mean, covariance = timepoints.mean(axis=0), np.cov(timepoints.T, bias=True)
    regular = covariance + ridge * np.diag(covariance).mean() * np.eye(V)
    for b, t in np.ndindex(2, 20):
        x, hidden, expected = signal[b, t].numpy(), mask[b, t // 5].numpy(), signal[b, t].numpy().copy()
        weights = covariance[hidden][:, ~hidden] @ np.linalg.inv(regular[~hidden][:, ~hidden])
        expected[hidden] = mean[hidden] + weights @ (x - mean)[~hidden]
        np.testing.assert_allclose(prediction[b, t], expected, rtol=1e-4, atol=1e-5)


def ridge_regression(inputs, outputs, ridge):
    """Weights, and last a constant that is not penalised; the penalty is relative to the mean variance of an input."""
    inputs, outputs = np.array(inputs, dtype=float), np.array(outputs, dtype=float)
    penalty = ridge * inputs.var(axis=0).sum() / inputs.shape[1] * len(inputs)
    design = np.column_stack([inputs, np.ones(len(inputs))])
    penalties = np.diag([penalty] * inputs.shape[1] + [0.0])
    return np.linalg.inv(design.T @ design + penalties) @ design.T @ outputs


def test_persistence_repeats_the_last_value(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data")
    signal = dataset.batch([(0, 0), (1, 3)], 20)
    prediction = brainlm.forecasting_baselines(dataset, 5)["persistence", 0](signal, forward_mask(2, 4, 3))
    assert torch.equal(prediction, torch.cat([signal[:, :15], signal[:, 14:15].expand(-1, 5, -1)], dim=1))


def test_ridge_autoregression_maps_a_parcels_last_patch_to_its_next(tmp_path):
    P, ridge = 4, 0.03
    dataset, recordings = tiny_dataset(tmp_path / "data")
    past, future = [], []
    for recording in recordings:
        for t in range(len(recording) - 2 * P + 1):
            past.extend(recording[t:t + P].T)
            future.extend(recording[t + P:t + 2 * P].T)
    weights = ridge_regression(past, future, ridge)

    signal = dataset.batch([(0, 0), (1, 3)], 20)
    prediction = brainlm.forecasting_baselines(dataset, P)["ridge autoregression", ridge](signal, forward_mask(2, 5, 3))
    assert torch.equal(prediction[:, :-P], signal[:, :-P])
    for b, v in np.ndindex(2, 3):
        expected = [*signal[b, -2 * P:-P, v], 1.0] @ weights
        np.testing.assert_allclose(prediction[b, -P:, v], expected, rtol=1e-4, atol=1e-5)


def test_vector_autoregression_is_iterated_from_the_last_two_timepoints(tmp_path):
    P, ridge = 4, 0.03
    dataset, recordings = tiny_dataset(tmp_path / "data")
    lags = [[*x[t - 1], *x[t - 2]] for x in recordings for t in range(2, len(x))]
    weights = ridge_regression(lags, [x[t] for x in recordings for t in range(2, len(x))], ridge)

    signal = dataset.batch([(0, 0), (1, 3)], 20)
    baselines = brainlm.forecasting_baselines(dataset, P)
    prediction = baselines["2-lag vector autoregression", ridge](signal, forward_mask(2, 5, 3))
    expected = signal.numpy().astype(float)
    for b, t in np.ndindex(2, P):
        t += 20 - P
        expected[b, t] = [*expected[b, t - 1], *expected[b, t - 2], 1.0] @ weights
    np.testing.assert_allclose(prediction, expected, rtol=1e-4, atol=1e-5)


def test_an_offset_of_the_signal_cripples_no_baseline(tmp_path):
    """The intercept is not penalised: what is predicted of x + 10 is 10 more than what is predicted of x."""
    dataset, recordings = tiny_dataset(tmp_path / "data")
    write_dataset(tmp_path / "shifted", {"Recording": [recording + 10 for recording in recordings]})
    shifted, signal = RecordingDataset(tmp_path / "shifted", "Recording"), dataset.batch([(0, 0), (1, 3)], 20)
    mask = forward_mask(2, 5, 3)
    far = brainlm.forecasting_baselines(shifted, 4) | brainlm.gaussian_conditional(shifted)
    for method, predict in (brainlm.forecasting_baselines(dataset, 4) | brainlm.gaussian_conditional(dataset)).items():
        torch.testing.assert_close(far[method](signal + 10, mask), predict(signal, mask) + 10, rtol=1e-4, atol=1e-4)


def test_tables_stand_in_the_order_of_each_methods_best_ridge(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data", lengths=(60, 70, 80))
    tables = brainlm.evaluate_reconstruction(tiny_model(), torch.randn(3, 3), torch.device("cpu"), torch.float32, dataset, dataset,
                                             [(0, 0), (1, 0)], 8)
    for title, table in tables.items():
        name, *baselines = [row["R2"] for row in table.values()]
        assert list(table)[0] == "BrainLM" and baselines == sorted(baselines, reverse=True) and baselines
        predictors = (brainlm.forecasting_baselines(dataset, 5) if "forecast" in title else brainlm.gaussian_conditional(dataset))
        sums = brainlm.score_reconstruction(predictors, dataset, [(0, 0), (1, 0)], tiny_config(), "forecast" in title, 8)
        for method, row in list(table.items())[1:]:
            assert row["R2"] == max(scores(each.sum(dim=1))["R2"] for (name, _), each in sums.items() if name == method)


def test_baselines_never_see_what_is_hidden(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data")
    signal = dataset.batch([(0, 0), (1, 3)], 20)
    tasks = [(random_mask(2, 4, 3, 0.5), brainlm.gaussian_conditional(dataset)),
             (forward_mask(2, 4, 3), brainlm.forecasting_baselines(dataset, 5))]
    for mask, predictors in tasks:
        hidden = mask.repeat_interleave(5, dim=1)
        for name, predict in predictors.items():
            other = predict(signal.masked_fill(hidden, math.nan), mask)
            assert torch.equal(other[hidden], predict(signal, mask)[hidden]), name


def test_connectivity_ridge_finds_a_target_that_is_written_in_the_connectivity(tmp_path):
    rng, V = np.random.default_rng(0), 6

    def people(folder, number):
        coupling = rng.uniform(0.1, 0.9, number)        # between parcels 0 and 1; the target is made of it
        recordings = [rng.standard_normal((300, V)) for _ in coupling]
        for recording, c in zip(recordings, coupling):
            recording[:, 1] = c * recording[:, 0] + (1 - c ** 2) ** 0.5 * recording[:, 1]
        write_dataset(folder, {"Recording": recordings})
        return RecordingDataset(folder, "Recording"), 60 + 20 * coupling
    (train_set, train_target), (val_set, val_target) = people(tmp_path / "train", 40), people(tmp_path / "val", 20)

    rows = np.arange(40)
    prediction = brainlm.connectivity_ridge(train_set, rows, train_target, val_set, np.arange(20))
    assert brainlm.regression_scores(prediction, val_target)["R2"] > 0.9
    noise = brainlm.connectivity_ridge(train_set, rows, rng.normal(60, 5, 40), val_set, np.arange(20))
    assert noise.std() < 2.5 and abs(noise.mean() - 60) < 2.5, "where there is nothing to find: near the training mean"


def test_nearest_neighbours_leave_the_parcel_itself_out():
    x = np.array([0, 1, 2, 50, 51, 52])
    distance = np.abs(x[:, None] - x).astype(float)
    assert brainlm.knn_accuracy(distance, list("aaabbb"), k=2) == 1
    assert brainlm.knn_accuracy(distance, list("abcdef"), k=1) == 0
    assert brainlm.knn_accuracy(distance[:3, :3], list("baa"), k=5) == 1 / 3, "even with fewer others than k"


# ----------------------------------------------------------------------------------------------------------------------
# Commands, as a user runs them


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """What a tiny `pretrain` printed and left: (its flags for the data, its run folder, its output)."""
    folder = tmp_path_factory.mktemp("pretrained")
    make_sample_data(folder, num_train=6, num_val=3, num_parcels=8, num_timepoints=60)
    data = ["--train_dataset_path", folder / "train", "--val_dataset_path", folder / "val",
            "--coords_dataset_path", folder / "coords"]
    output = command("pretrain", *data, "--output_dir", folder / "run", "--num_timepoints_per_voxel", 20,
                     "--timepoint_patching_size", 5, "--hidden_size", 16, "--num_hidden_layers", 2,
                     "--num_attention_heads", 2, "--max_steps", 6, "--eval_steps", 3, "--logging_steps", 2)
    return data, folder / "run", output


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_pretrain_leaves_a_complete_run_folder(pretrained):
    _, run, _ = pretrained
    assert {path.name for path in run.iterdir()} >= {
        "config.json", "pytorch_model.bin", "brainlm.py", "training_state.pt", "metrics.jsonl", "args.json"}
    assert json.loads((run / "config.json").read_text())["timepoint_patching_size"] == 5
    assert (run / "brainlm.py").read_bytes() == (REPOSITORY / "brainlm.py").read_bytes()
    signal, xyz = tiny_input(V=8)
    assert BrainLM.from_pretrained(run)(signal, xyz)[0].isfinite().all()


def test_pretrain_reports_its_progress_and_its_opponents(pretrained):
    _, run, output = pretrained
    assert "step 6/6  loss" in output and "samples/s" in output
    assert [line["step"] for line in metrics_of(run) if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in metrics_of(run) if "masked_R2" in line] == [3]
    masked, forecasting = metrics_of(run)[-1]["tables"].values()
    assert set(masked) == {"BrainLM", "Gaussian conditional mean"}
    assert set(forecasting) == {"BrainLM", "persistence", "ridge autoregression", "2-lag vector autoregression"}
    assert {"R2", "MSE", "MAE", "R2 at 1", "R2 at 5"} <= set(forecasting["BrainLM"])
    assert all(name in output for name in (*masked, *forecasting))


def test_finetune_predicts_on_another_atlas_than_it_was_pretrained_on(pretrained, tmp_path):
    _, pretrained_run, _ = pretrained
    make_sample_data(tmp_path, num_train=6, num_val=3, num_parcels=5, num_timepoints=60)
    output = command("finetune", "--model_name_or_path", pretrained_run, "--train_dataset_path", tmp_path / "train",
                     "--val_dataset_path", tmp_path / "val", "--coords_dataset_path", tmp_path / "coords",
                     "--output_dir", tmp_path / "run", "--max_steps", 6)
    table, = metrics_of(tmp_path / "run")[-1]["tables"].values()
    assert set(table) == {"BrainLM", "training mean", "ridge on functional connectivity"}
    assert set(table["BrainLM"]) == {"MAE", "MSE", "R2", "r"} and all(name in output for name in table)
    signal, xyz = tiny_input(B=1, V=5)
    years = BrainLMRegressor.from_pretrained(tmp_path / "run")(signal, xyz)
    assert 40 < years.item() < 85, "sample ages go from 45 to 80: the mean and spread of the target are in the model"


def test_evaluate_sets_the_model_beside_the_baselines(pretrained):
    data, run, _ = pretrained
    output = command("evaluate", "--model_name_or_path", run, *data)
    tables = json.loads((run / "evaluation.json").read_text())["tables"]
    masked, forecasting, networks = tables.values()
    assert set(networks) == {"BrainLM embedding", "coordinates", "functional connectivity profile"}
    for name in (*masked, *forecasting, *networks):
        assert name in output


def test_one_parcel_one_token_and_one_layer_go_through_all_commands(tmp_path):
    for split, seed in (("train", 0), ("val", 1)):
        tiny_dataset(tmp_path / split, V=1, seed=seed, Age=[50.0, 60.0, None])
    write_dataset(tmp_path / "coords", {"X": [1.0], "Y": [2.0], "Z": [3.0], "Network": ["Default"]})
    data = [f"--{split}_dataset_path={tmp_path / split}" for split in ("train", "val", "coords")]
    data.append("--recording_col_name=Recording")
    run, finetuned = tmp_path / "run", tmp_path / "finetuned"
    brainlm.main(["pretrain", *data, f"--output_dir={run}", "--max_steps=2", "--num_timepoints_per_voxel=5",
                  "--timepoint_patching_size=5", "--hidden_size=2", "--num_hidden_layers=1", "--num_attention_heads=1"])
    brainlm.main(["finetune", *data, f"--model_name_or_path={run}", f"--output_dir={finetuned}", "--max_steps=2",
                  "--variable_of_interest_col_name=Age"])
    brainlm.main(["evaluate", *data, f"--model_name_or_path={run}"])
    losses = [line["loss"] for folder in (run, finetuned) for line in metrics_of(folder) if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()


# ----------------------------------------------------------------------------------------------------------------------
# README


def test_every_python_block_of_the_readme_runs_in_order(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    make_sample_data("sample_data", num_train=1, num_val=1, num_parcels=20, num_timepoints=220)
    BrainLM(BrainLMConfig(hidden_size=32)).save_pretrained("runs/pretrain")
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["forecast"].shape == (1, 40, 20) and Path("my_data/train/state.json").exists()


def test_the_readme_links_to_the_lines_of_its_functions():
    lines = (REPOSITORY / "brainlm.py").read_text().splitlines()
    links = re.findall(r"\[`(?:\w+\.)?(\w+)`]\(brainlm\.py#L(\d+)\)", (REPOSITORY / "README.md").read_text())
    assert len(links) >= 10
    for name, line in links:
        where = [i for i, text in enumerate(lines, start=1) if re.match(rf"\s*(def|class) {name}\b", text)]
        assert int(line) in where, f"README.md links {name} to line {line}, it is in {where}"


def test_the_readme_names_every_flag():
    readme = (REPOSITORY / "README.md").read_text()
    for command in ("pretrain", "finetune", "evaluate"):
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
            brainlm.main([command, "--help"])
        flags = set(re.findall(r"--(?!no-)\w+", text.getvalue())) - {"--help"}
        assert not [flag for flag in flags if f"`{flag}`" not in readme]


# ----------------------------------------------------------------------------------------------------------------------
# When things go wrong: tiny data, commands in processes of their own

V, T, P = 6, 12, 4                                                       # parcels, window, patch of all tiny data here
MODEL = ("--num_timepoints_per_voxel 12 --timepoint_patching_size 4 --hidden_size 8 --num_hidden_layers 2 "
         "--num_attention_heads 2").split()
TRAINING = ("--max_steps 6 --save_steps 2 --logging_steps 3 --eval_steps 3 --gradient_accumulation_steps 2 --dtype float32 "
            "--device cpu").split()
processes = multiprocessing.get_context("forkserver")      # forks from a process that has imported torch: quick to start
processes.set_forkserver_preload(["brainlm", "pytest", "torch._dynamo"])       # AdamW imports the last one


def words(command, data, run, *more):
    """A command line on tiny data; what comes later overrides what came before."""
    paths = [f"--{name}_dataset_path={data / name}" for name in ("train", "val", "coords")]
    shape = MODEL + ["--hidden_dropout_prob", "0.1"] if command == "pretrain" else \
        ["--model_name_or_path", data / "pretrained"]
    return [str(word) for word in [command, *paths, "--recording_col_name", "R", "--output_dir", run, *TRAINING, *shape,
                                   *(["--variable_of_interest_col_name", "Age"] if command == "finetune" else []), *more]]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tiny datasets {train,val,coords} and a pretrained model to finetune."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, rows in ("train", 8), ("val", 3):
        write_dataset(folder / split, {"R": [rng.standard_normal((20 + i, V), np.float32) for i in range(rows)],
                                       "Age": [50.0 + i for i in range(rows)]}, num_shards=2)
    write_dataset(folder / "coords", {axis: list(rng.normal(size=V) * 40) for axis in "XYZ"})
    torch.manual_seed(0)
    brainlm.BrainLM(brainlm.BrainLMConfig(T, P, 8, 2, 2)).save_pretrained(folder / "pretrained")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """{command: folder of a run that nothing disturbed}"""
    folders = {command: tmp_path_factory.mktemp(command) / "run" for command in ("pretrain", "finetune")}
    started = [start(words(command, data, folder)) for command, folder in folders.items()]
    assert [ended(process) for process in started] == [0, 0]
    return folders


def start(command_line, environment={}, kill_at=None, number=signals.SIGKILL, largest_file=None, full=signals.SIG_IGN):
    """Run a command in a process of its own, what it prints going to process.log.

    kill_at         it gets the signal `number` when it is about to do this file operation in its run folder
    largest_file    bytes; writing more fails as on a full disk or, with full=signals.SIG_DFL, kills it in mid-write
    """
    log = tempfile.mkstemp(suffix=".log")[1]
    process = processes.Process(target=in_process, daemon=True,
                                args=(command_line, log, environment, kill_at, number, largest_file, full))
    process.start()
    process.log = Path(log)
    return process


def in_process(command_line, log, environment, kill_at, number, largest_file, full):
    for stream in 1, 2:
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    os.environ |= environment
    torch.set_num_threads(1)
    if largest_file:
        signals.signal(signals.SIGXFSZ, full)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if kill_at is not None:
        run, seen = command_line[command_line.index("--output_dir") + 1], []

        def kill(event, arguments):            # Python reports every file that it is about to open, rename or remove
            if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(run + "/"):
                seen.append(event)
                if len(seen) == kill_at + 1:
                    os.kill(os.getpid(), number)
        sys.addaudithook(kill)
    brainlm.main(command_line)


def ended(process, timeout=60):
    process.join(timeout)
    assert process.exitcode is not None, f"still running: {process.log.read_text()}"
    return process.exitcode


def wait_until(condition, timeout=60):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def load(folder):
    model = brainlm.BrainLMRegressor if "Regression" in (folder / "config.json").read_text() else brainlm.BrainLM
    return model.from_pretrained(folder)


def assert_loadable(folder):
    """From the first model on, there is one at any instant; before that there is none."""
    if (folder / "pytorch_model.bin").exists():
        load(folder)


def test_a_file_is_replaced_not_written_over(tmp_path):
    """Who has the old one open, or mapped, still reads the old one to its end."""
    path = tmp_path / "file"
    for content in (b"old", b"new"):
        before = path.open("rb") if path.exists() else None
        brainlm.write_atomically(path, lambda file: file.write(content))
    assert (before.read(), path.read_bytes(), list(tmp_path.iterdir())) == (b"old", b"new", [path])


def assert_same_run(folder, expected):
    assert (folder / "pytorch_model.bin").read_bytes() == (expected / "pytorch_model.bin").read_bytes()
    assert metrics(folder) == metrics(expected)
    assert not list(folder.glob("*.part")) and not list(folder.glob(".*.part"))


# ----------------------------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_run_killed_at_random_instants_resumes_to_the_same_bits(data, uninterrupted, tmp_path, command):
    run, rng, kills = tmp_path / "run", random.Random(command), 0
    for _ in range(6):
        process = start(words(command, data, run))
        wait_until(lambda: (run / "training_state.pt").exists() or process.exitcode is not None)
        time.sleep(0.15 * rng.random())
        process.kill()
        kills += ended(process) == -signals.SIGKILL
        assert_loadable(run)
    assert kills
    assert ended(process := start(words(command, data, run))) == 0, process.log.read_text()
    assert_same_run(run, uninterrupted[command])


@pytest.mark.parametrize("written", [1000, 10_000, 20_000, 60_000])
def test_a_run_killed_while_it_writes_a_file_resumes_to_the_same_bits(data, uninterrupted, tmp_path, written):
    run = tmp_path / "run"
    ended(start(words("pretrain", data, run), kill_at=24))
    assert ended(start(words("pretrain", data, run), largest_file=written, full=signals.SIG_DFL)) == -signals.SIGXFSZ
    assert written in [file.stat().st_size for file in run.glob(".*.part")]
    assert_loadable(run)
    assert ended(process := start(words("pretrain", data, run))) == 0, process.log.read_text()
    assert_same_run(run, uninterrupted["pretrain"])


@pytest.mark.parametrize("command, step", [("pretrain", 3), ("finetune", 5)])
def test_a_run_killed_before_any_of_its_file_operations_resumes_to_the_same_bits(data, uninterrupted, tmp_path, command,
                                                                                 step):
    last, kills = 0, []
    while last == 0 or kills[-1] != 0:                                   # two at a time, until one is not killed any more
        runs = [tmp_path / str(kill_at) for kill_at in (last, last + step)]
        started = [start(words(command, data, run), kill_at=int(run.name)) for run in runs]
        kills += [ended(process) for process in started]
        for run in runs:
            assert_loadable(run)
        resumed = [start(words(command, data, run)) for run in runs]
        for process, run in zip(resumed, runs):
            assert ended(process) == 0, f"killed at file operation {run.name}: {process.log.read_text()}"
            assert_same_run(run, uninterrupted[command])
        last += 2 * step
    assert len(kills) * step > 30 and set(kills) == {0, -signals.SIGKILL}


@pytest.mark.parametrize("number, code", [(signals.SIGINT, 130), (signals.SIGTERM, -signals.SIGTERM)])
def test_ctrl_c_and_sigterm_stop_at_once_and_keep_the_last_checkpoint(data, uninterrupted, tmp_path, number, code):
    run = tmp_path / "run"
    process = start(words("pretrain", data, run), kill_at=24, number=number)
    assert ended(process) == code, process.log.read_text()
    assert "Traceback" not in process.log.read_text()
    assert number != signals.SIGINT or "goes on from it" in process.log.read_text()
    steps = torch.load(run / "training_state.pt", weights_only=True)["step"]
    assert ended(process := start(words("pretrain", data, run))) == 0, process.log.read_text()
    assert f"resuming {run} after step {steps}" in process.log.read_text()
    assert_same_run(run, uninterrupted["pretrain"])


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(data, uninterrupted, tmp_path):
    run = tmp_path / "run"
    ended(start(words("pretrain", data, run), kill_at=24))
    before, step = (run / "pytorch_model.bin").read_bytes(), torch.load(run / "training_state.pt")["step"]
    full = start(words("pretrain", data, run), largest_file=20_000)
    assert ended(full) == 2
    errors = [line for line in full.log.read_text().splitlines() if not line.startswith(("step", "data", "model", "resum", " "))]
    assert len(errors) == 1 and errors[0].startswith("error: could not write") and "intact" in errors[0], errors
    assert (run / "pytorch_model.bin").read_bytes() == before and torch.load(run / "training_state.pt")["step"] == step
    assert_loadable(run)
    assert ended(process := start(words("pretrain", data, run))) == 0, process.log.read_text()
    assert_same_run(run, uninterrupted["pretrain"])


def test_a_full_disk_for_metrics_is_one_line_too(data, tmp_path, monkeypatch, capsys):
    def full(self, **metrics):
        raise OSError(28, "No space left on device", str(self.path / "metrics.jsonl"))
    monkeypatch.setattr(brainlm.RunFolder, "log", full)
    assert_refused(words("pretrain", data, tmp_path / "run"), ["No space left", "metrics.jsonl"], capsys)
    assert_loadable(tmp_path / "run")


def test_a_second_process_on_the_same_folder_is_refused(data, uninterrupted, tmp_path):
    run = tmp_path / "run"
    first = start(words("pretrain", data, run), kill_at=16, number=signals.SIGSTOP)
    wait_until(lambda: (run / "pytorch_model.bin").exists())
    second = start(words("pretrain", data, run))
    try:
        assert ended(second) == 2, second.log.read_text()
        assert re.search(f"error: {run}.* in use", second.log.read_text())
    finally:
        os.kill(first.pid, signals.SIGCONT)
    assert ended(first) == 0
    assert_same_run(run, uninterrupted["pretrain"])


def test_a_finished_run_started_again_changes_nothing(data, uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted["pretrain"], tmp_path / "run")
    assert ended(process := start(words("pretrain", data, run))) == 0, process.log.read_text()
    assert_same_run(run, uninterrupted["pretrain"])


@pytest.mark.parametrize("command, flags, told", [
    ("pretrain", ["--hidden_size", 16], ["hidden_size", "8", "16"]),
    ("pretrain", ["--num_hidden_layers", 1], ["num_hidden_layers", "2", "1"]),
    ("pretrain", ["--mask_ratio", 0.5], ["mask_ratio", "0.75", "0.5"]),
    ("pretrain", ["--loss_fn", "mae"], ["loss_fn", "mse", "mae"]),
    ("finetune", [], ["command", "pretrain", "finetune"])])
def test_a_resume_with_other_flags_is_refused(data, uninterrupted, tmp_path, capsys, command, flags, told):
    run = shutil.copytree(uninterrupted["pretrain"], tmp_path / "run")
    assert_refused(words(command, data, run, *flags), [str(run), "--overwrite_output_dir", *told], capsys)
    assert_same_run(run, uninterrupted["pretrain"])


def test_overwrite_output_dir_starts_anew(data, uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted["finetune"], tmp_path / "run")
    process = start(words("pretrain", data, run, "--overwrite_output_dir"))
    assert ended(process) == 0 and "resuming" not in process.log.read_text()
    assert_same_run(run, uninterrupted["pretrain"])


def test_overwriting_never_mixes_two_runs(data, uninterrupted, tmp_path):
    """Killed while it starts anew, a folder holds the old model, none, or the new one: never new numbers on old weights."""
    for kill_at in range(1, 16):
        run = shutil.copytree(uninterrupted["pretrain"], tmp_path / str(kill_at))
        process = start(words("pretrain", data, run, "--overwrite_output_dir", "--mask_ratio", 0.5), kill_at=kill_at)
        assert ended(process) == -signals.SIGKILL
        if (run / "pytorch_model.bin").exists() and (run / "config.json").exists():
            old = (run / "pytorch_model.bin").read_bytes() == (uninterrupted["pretrain"] / "pytorch_model.bin").read_bytes()
            assert load(run).config.mask_ratio == (0.75 if old else 0.5)


def test_same_seed_same_flags_same_metrics(data, uninterrupted, tmp_path):
    runs = [tmp_path / "again", tmp_path / "other"]
    started = [start(words("pretrain", data, run, "--seed", seed)) for run, seed in zip(runs, (0, 1))]
    assert [ended(process) for process in started] == [0, 0]
    assert_same_run(runs[0], uninterrupted["pretrain"])
    assert metrics(runs[1])[0]["loss"] != metrics(runs[0])[0]["loss"]


# ----------------------------------------------------------------------------------------------------------------------
# Broken input


def assert_refused(command_line, told, capsys):
    """The command exits with 2 and prints one line on stderr that contains all of `told`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                               # two would only wait for each other on inputs this small
    capsys.readouterr()
    try:
        brainlm.main([str(word) for word in command_line])
    except SystemExit as stop:
        code = stop.code
    else:
        pytest.fail(f"was not refused: {capsys.readouterr().out}")
    finally:
        torch.set_num_threads(threads)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert [word for word in told if str(word) not in error] == [], error


# A warning would be a second line on stderr. (A lock file is left to the garbage collector: that one nobody sees.)
LOUD = "error", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"


def write_arrow(folder, *batches, **state):
    """A save_to_disk folder of one shard from record batches, with anything in them, right or wrong."""
    folder.mkdir(exist_ok=True)
    with pa.ipc.new_stream(folder / "data.arrow", batches[0].schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}], **state}))
    return folder


def numbers(rows=20, columns=V, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def spoilt(value, timepoint=7, parcel=2):
    """A recording as lists with one number replaced."""
    recording = numbers().tolist()
    recording[timepoint][parcel] = value
    return recording


def changed(timepoint, value):
    return numbers().tolist()[:timepoint] + [value] + numbers().tolist()[timepoint + 1:]


def fixed_size_with_a_gap():
    """A timepoint that is null by the validity bitmap only: the numbers of its slot are there, and mean nothing."""
    gap = pa.array([i == 7 for i in range(20)])
    return pa.ListArray.from_arrays([0, 20], pa.FixedSizeListArray.from_arrays(numbers().ravel(), V, mask=gap))


GOOD = numbers().tolist()
RECORDINGS = {                                             # the whole column R, and what the message names
    "no recordings at all": ([], ["no rows"]),
    "transposed": ([numbers(V, 20).tolist()], ["'R'", "row 0", "20 parcels, expected 6", "transposed?"]),
    "second is transposed": ([GOOD, numbers(V, 20).tolist()], ["row 1", "20 parcels, expected 6", "transposed?"]),
    "other atlas": ([numbers(20, 5).tolist()], ["row 0", "5 parcels, expected 6", "atlas"]),
    "ragged": ([GOOD, changed(7, [0.0] * 4)], ["row 1, timepoint 7", "4 parcels, expected 6", "ragged"]),
    "ragged by as much as it has too little": ([changed(7, [0.0] * 5)[:8] + changed(8, [0.0] * 7)[8:]],
                                               ["row 0, timepoint 7", "5 parcels", "ragged"]),
    "timepoint missing": ([GOOD, changed(7, None)], ["row 1", "timepoint 7"]),
    "timepoint missing in fixed-size lists": (fixed_size_with_a_gap(), ["row 0", "timepoint 7"]),
    "recording missing": ([GOOD, None], ["'R'", "row 1"]),
    "every recording missing": ([None, None], ["'R'"]),
    "one-dimensional": ([[0.0] * 20], ["'R'", "two-dimensional"]),
    "three-dimensional": ([[GOOD]], ["'R'", "two-dimensional"]),
    "a number": ([1.5], ["'R'", "two-dimensional"]),
    "strings": ([[["a"] * V] * 20], ["'R'", "numbers"]),
    "a text": (["1 2 3"], ["'R'", "string"]),
    "booleans": ([[[True] * V] * 20], ["'R'", "bool"]),
    "dicts": ([[[{"a": 1}] * V] * 20], ["'R'", "struct"]),
    "no timepoints": ([GOOD, []], ["row 1", "0 timepoints"]),
    "no timepoints anywhere": (pa.array([[], []], pa.list_(pa.list_(pa.float32()))), ["row 0", "0 timepoints"]),
    "no parcels": (pa.array([[[]] * 20], pa.list_(pa.list_(pa.float32()))), ["row 0", "0 parcels"]),
    "too short": ([GOOD, numbers(T - 1).tolist()], ["row 1", f"{T - 1} timepoints", f"window of {T}"]),
    "NaN": ([spoilt(float("nan"))], ["row 0", "timepoint 7", "parcel 2", "nan"]),
    "infinity": ([spoilt(float("inf"))], ["row 0", "timepoint 7", "parcel 2", "inf"]),
    "minus infinity": ([spoilt(-float("inf"))], ["row 0", "timepoint 7", "parcel 2", "inf"]),
    "None inside": ([spoilt(None)], ["row 0", "timepoint 7", "parcel 2"]),
    "None inside integers": ([np.array(GOOD).round().astype(int).tolist()[:7] + [[1, 2, None, 4, 5, 6]] +
                              np.array(GOOD).round().astype(int).tolist()[8:]], ["row 0", "timepoint 7", "parcel 2"]),
    "too large for float32": ([(numbers().astype(float) * 1e300).tolist()], ["row 0", "timepoint", "parcel"]),
    "loss overflows": (pa.array([(numbers() * 1e30).tolist()], pa.list_(pa.list_(pa.float32()))), ["loss", "step 1"]),
}


@pytest.mark.filterwarnings(*LOUD)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", RECORDINGS)
def test_broken_recordings_are_refused(data, tmp_path, capsys, case, split):
    column, told = RECORDINGS[case]
    if split == "val" and "loss" in told:
        pytest.skip("has no loss")
    column = column if isinstance(column, pa.Array) else pa.array(column)
    folder = write_arrow(tmp_path / "broken", pa.record_batch({"R": column}))
    assert_refused(words("pretrain", data, tmp_path / "run", f"--{split}_dataset_path={folder}", "--warmup_ratio=0"),
                   told if "loss" in told else [folder, *told], capsys)


def test_empty_recordings_are_refused_where_no_coordinates_say_how_wide_they_are(tmp_path):
    for column in ([[], []], [[[]] * 20]):
        folder = write_arrow(tmp_path / "broken", pa.record_batch({
            "R": pa.array(column, pa.list_(pa.list_(pa.float32())))}))
        with pytest.raises(BadInput, match="row 0.*(0 timepoints|0 parcels)"):
            RecordingDataset(folder, "R")


def test_heads_are_64_wide_where_that_divides_the_hidden_size():
    assert [BrainLMConfig(hidden_size=H).num_attention_heads for H in (32, 128, 200, 256)] == [1, 2, 1, 4]


def replaced(axis, value):
    return lambda folder: write_arrow(folder, pa.record_batch(
        {name: pa.array([1.0, 2.0, 3.0, 4.0, 5.0, value if name == axis else 6.0]) for name in "XYZ"}))


def without_z(folder):
    return write_arrow(folder, pa.record_batch({"X": [1.0] * V, "Y": [1.0] * V, "Network": ["Visual"] * V}))


def text_coordinates(folder):
    return write_arrow(folder, pa.record_batch({name: ["1.0"] * V for name in "XYZ"}))


@pytest.mark.filterwarnings(*LOUD)
@pytest.mark.parametrize("make, told", [
    (replaced("Y", float("nan")), ["coordinate Y", "parcel", "5"]), (replaced("X", None), ["coordinate X", "parcel", "5"]),
    (replaced("Z", float("inf")), ["coordinate Z", "parcel", "5"]), (replaced("Z", 1e300), ["coordinate Z", "parcel", "5"]),
    (without_z, ["'Z'", "X, Y, Network"]), (text_coordinates, ["'X'", "not numeric", "string"])],
    ids=["NaN", "None", "infinite", "too large", "missing column", "text"])
def test_broken_coordinates_are_refused(data, tmp_path, capsys, make, told):
    folder = make(tmp_path / "broken")
    assert_refused(words("pretrain", data, tmp_path / "run", f"--coords_dataset_path={folder}"), [folder, *told], capsys)


def copied(change):
    """A dataset of two shards and four record batches, then changed."""
    def make(folder):
        write_dataset(folder, {"R": [numbers() for _ in range(4)], "Age": [1.0, 2.0, 3.0, 4.0]}, 2, rows_per_batch=1)
        change(folder)
        return folder
    return make


SHARD = "data-00001-of-00002.arrow"


def cut(where):
    """The second shard cut at a byte; "batch" is the byte exactly between its two record batches."""
    def change(folder):
        content = (folder / SHARD).read_bytes()
        with pa.ipc.open_stream(reader := pa.OSFile(str(folder / SHARD))) as stream:
            starts = [reader.tell()]                                 # after the schema
            for _ in stream:
                starts.append(reader.tell())                         # after each batch
        at = {"schema": starts[0], "batch": starts[1], "marker": len(content) - 8}.get(where, where)
        (folder / SHARD).write_bytes(content[:at if isinstance(at, int) else int(at * len(content))])
    return copied(change)


def state(content):
    return copied(lambda folder: (folder / "state.json").write_text(content))


def dataset_dict(folder):
    for split in "train", "test":
        write_dataset(folder / split, {"R": [numbers()]})
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return folder


def empty_folder(folder):
    folder.mkdir()
    return folder


def just_a_file(folder):
    folder.write_text("no dataset")
    return folder


def other_columns(folder):
    write_dataset(folder, {"Recording": [numbers()], "Age": [3.0]})
    return folder


def shards_that_differ(folder):
    one, two = (write_arrow(folder.with_name(name), pa.record_batch({"R": [numbers().tolist()], name: [1]})) for name in "ab")
    folder.mkdir()
    for shard, source in (("0", one), ("1", two)):
        shutil.copy(source / "data.arrow", folder / shard)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "0"}, {"filename": "1"}]}))
    return folder


DATASETS = {
    "missing folder": (lambda folder: folder, ["no such folder"]),
    "a file": (just_a_file, ["no such folder"]),
    "empty folder": (empty_folder, ["no state.json"]),
    "several datasets": (dataset_dict, ["several datasets", "broken/test", "train"]),
    "missing column": (other_columns, ["no column 'R'", "Recording, Age"]),
    "missing shard": (copied(lambda folder: (folder / SHARD).unlink()), [SHARD, "missing"]),
    "empty shard": (cut(0), [SHARD, "truncated"]),
    "shard of 3 bytes": (cut(3), [SHARD, "truncated"]),
    "shard cut in its schema": (cut(50), [SHARD, "truncated"]),
    "shard cut after its schema": (cut("schema"), [SHARD, "truncated"]),
    "shard cut in the first batch": (cut(0.4), [SHARD, "truncated"]),
    "shard cut between two batches": (cut("batch"), [SHARD, "truncated"]),
    "shard cut in the last batch": (cut(0.9), [SHARD, "truncated"]),
    "shard without its end": (cut("marker"), [SHARD, "truncated"]),
    "shard is text": (copied(lambda folder: (folder / SHARD).write_text("text " * 99)), [SHARD, "no Arrow stream"]),
    "shard is a folder": (copied(lambda folder: ((folder / SHARD).unlink(), (folder / SHARD).mkdir())), [SHARD]),
    "shards differ": (shards_that_differ, ["different columns"]),
    "state.json empty": (state(""), ["state.json"]), "state.json cut": (state('{"_data_files": [{"file'), ["state.json"]),
    "state.json a list": (state("[]"), ["state.json"]), "state.json without files": (state("{}"), ["state.json"]),
    "state.json lists nothing": (state('{"_data_files": []}'), ["state.json"]),
    "state.json names numbers": (state('{"_data_files": [1]}'), ["state.json"]),
    "state.json names a number": (state('{"_data_files": [{"filename": 1}]}'), ["state.json"]),
    "state.json binary": (copied(lambda folder: (folder / "state.json").write_bytes(b"\xff\x00\x80")), ["state.json"]),
    "state.json a folder": (copied(lambda folder: ((folder / "state.json").unlink(), (folder / "state.json").mkdir())),
                            ["state.json"]),
}


@pytest.mark.filterwarnings(*LOUD)
@pytest.mark.parametrize("case", DATASETS)
def test_broken_dataset_folders_are_refused(data, tmp_path, capsys, case):
    make, told = DATASETS[case]
    folder = make(tmp_path / "broken")
    assert_refused(words("pretrain", data, tmp_path / "run", f"--train_dataset_path={folder}"), [folder, *told], capsys)


@pytest.mark.filterwarnings(*LOUD)
@pytest.mark.parametrize("ages, told", [
    (["old", "young"], ["'Age'", "not numeric", "string"]), ([[1.0], [2.0]], ["'Age'", "not numeric", "list"]),
    ([None, None], ["'Age'", "missing in every row"]), ([float("nan"), None], ["'Age'", "missing in every row"]),
    ([7, 7], ["'Age'", "7", "every row"]), ([0.1] * 3, ["'Age'", "0.1", "every row"]),
    ([50.0, float("inf")], ["'Age'", "infinite", "row 1"]), ([-float("inf"), 1.0], ["'Age'", "infinite", "row 0"]),
    ([1e300, -1e300], ["'Age'"])],
    ids=["text", "lists", "None", "NaN", "constant", "constant 0.1", "infinite", "minus infinite", "too large for float32"])
def test_broken_targets_are_refused(data, tmp_path, capsys, ages, told):
    folder = write_arrow(tmp_path / "broken", pa.record_batch({"R": pa.array([GOOD] * len(ages)), "Age": pa.array(ages)}))
    assert_refused(words("finetune", data, tmp_path / "run", f"--train_dataset_path={folder}"), [folder, *told], capsys)


def test_a_missing_target_column_is_refused(data, tmp_path, capsys):
    assert_refused(words("finetune", data, tmp_path / "run", "--variable_of_interest_col_name", "Height"),
                   ["no column 'Height'", "R, Age"], capsys)


@pytest.mark.parametrize("flags, told", [(flags.split(), told) for flags, told in (
    ("--timepoint_patching_size 5", ["num_timepoints_per_voxel 12", "timepoint_patching_size 5", "divisible"]),
    ("--num_timepoints_per_voxel 3", ["num_timepoints_per_voxel 3", "timepoint_patching_size 4", "divisible"]),
    ("--num_timepoints_per_voxel 0", ["num_timepoints_per_voxel"]), ("--timepoint_patching_size 0", ["timepoint_patching_size"]),
    ("--hidden_size 10 --num_attention_heads 4", ["hidden_size 10", "num_attention_heads 4", "divisible"]),
    ("--hidden_size 0", ["hidden_size"]), ("--hidden_size -8", ["hidden_size"]), ("--hidden_size 8.5", ["hidden_size"]),
    ("--num_hidden_layers 0", ["num_hidden_layers"]), ("--num_attention_heads 0", ["num_attention_heads"]),
    ("--intermediate_size 0", ["intermediate_size"]),
    ("--mask_ratio 0", ["mask_ratio"]), ("--mask_ratio 1.5", ["mask_ratio"]), ("--mask_ratio nan", ["mask_ratio"]),
    ("--mask_ratio 0.001", ["mask_ratio"]), ("--hidden_dropout_prob 1", ["hidden_dropout_prob"]),
    ("--attention_probs_dropout_prob -0.1", ["attention_probs_dropout_prob"]), ("--loss_fn huber", ["loss_fn"]),
    ("--forward_mask_prob 2", ["forward_mask_prob"]), ("--learning_rate -1", ["learning_rate"]),
    ("--learning_rate 0", ["learning_rate"]), ("--learning_rate nan", ["learning_rate"]),
    ("--learning_rate inf", ["learning_rate"]), ("--learning_rate fast", ["learning_rate"]),
    ("--weight_decay -1", ["weight_decay"]), ("--warmup_ratio 2", ["warmup_ratio"]), ("--num_train_epochs inf", ["num_train_epochs"]),
    ("--num_train_epochs 0", ["num_train_epochs"]), ("--max_steps 0", ["max_steps"]), ("--seed -1", ["seed"]),
    ("--seed 99999999999999999999999", ["seed"]), ("--save_steps 0", ["save_steps"]), ("--logging_steps 0", ["logging_steps"]),
    ("--per_device_train_batch_size 0", ["per_device_train_batch_size"]), ("--max_train_samples 0", ["max_train_samples"]),
    ("--gradient_accumulation_steps 0", ["gradient_accumulation_steps"]), ("--device tpu", ["device"]),
    ("--dtype float64", ["dtype"]), ("--depth 3", ["--depth"]), ("stray", ["stray"]))], ids=lambda value: " ".join(value))
def test_broken_flags_are_refused(data, tmp_path, capsys, flags, told):
    assert_refused(words("pretrain", data, tmp_path / "run", *flags), told, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command_line", [[], ["train"], ["pretrain", "--no_such_flag"]])
def test_broken_commands_are_refused(capsys, command_line):
    assert_refused(command_line, [], capsys)


def weights(change):
    def make(folder):
        content = torch.load(folder / "pytorch_model.bin")
        torch.save(change(content), folder / "pytorch_model.bin")
    return make


def config(**changes):
    return lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | changes))


def cut_to(name, share):
    def make(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:int(share * len(content))])
    return make


def safetensors_of_noise(folder):
    pytest.importorskip("safetensors")
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").write_bytes(b"\xff" * 99)


CHECKPOINTS = {
    "no folder": (shutil.rmtree, ["no such"]),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), []),
    "no weights": (lambda folder: (folder / "pytorch_model.bin").unlink(), ["pytorch_model.bin"]),
    **{f"weights cut to {share:.0%}": (cut_to("pytorch_model.bin", share), ["pytorch_model.bin", "truncated"])
       for share in (0, 0.01, 0.5, 0.999)},
    "weights are text": (lambda folder: (folder / "pytorch_model.bin").write_text("weights"), ["pytorch_model.bin"]),
    "weights are a list": (weights(lambda content: list(content.values())), []),
    "weights are named by numbers": (weights(lambda content: dict(enumerate(content.values()))), []),
    "a weight is no tensor": (weights(lambda content: content | {"norm.bias": "text"}), ["norm.bias"]),
    "a weight is missing": (weights(lambda content: {name: content[name] for name in content if name != "norm.bias"}),
                            ["norm.bias"]),
    "weights are not finite": (weights(lambda content: content | {"norm.bias": torch.full((8,), torch.nan)}), ["nan"]),
    "a weight too many": (weights(lambda content: content | {"extra.weight": torch.zeros(3)}), ["extra.weight"]),
    "weights of another shape": (config(hidden_size=16), ["size mismatch"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "config cut": (cut_to("config.json", 0.5), ["config.json"]),
    "config binary": (lambda folder: (folder / "config.json").write_bytes(b"\xff\x00\x80"), ["config.json"]),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), ["config.json"]),
    "config of another model": (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), ["config.json"]),
    "config with text for a number": (config(hidden_size="wide"), ["config.json"]),
    "config with a fraction for a count": (config(hidden_size=8.0), []),
    "config with an impossible number": (config(num_attention_heads=3), ["num_attention_heads 3"]),
    "safetensors broken": (safetensors_of_noise, ["model.safetensors"]),
}


@pytest.mark.filterwarnings(*LOUD)
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_broken_checkpoints_are_refused(data, tmp_path, capsys, case):
    change, told = CHECKPOINTS[case]
    folder = shutil.copytree(data / "pretrained", tmp_path / "checkpoint")
    change(folder)
    assert_refused(words("finetune", data, tmp_path / "run", "--model_name_or_path", folder),
                   told if "nan" in told else [folder, *told], capsys)


def test_pretraining_from_weights_of_another_shape_is_refused(data, tmp_path, capsys):
    assert_refused(words("pretrain", data, tmp_path / "run", "--model_name_or_path", data / "pretrained", "--hidden_size", 16),
                   ["--hidden_size 16", data / "pretrained", "8"], capsys)


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_run_folder_with_a_broken_training_state_is_not_resumed(data, uninterrupted, tmp_path, capsys, share):
    run = shutil.copytree(uninterrupted["pretrain"], tmp_path / "run")
    cut_to("training_state.pt", share)(run)
    assert_refused(words("pretrain", data, run), [run, "--overwrite_output_dir"], capsys)


@pytest.mark.parametrize("name", ["config.json", "args.json", "metrics.jsonl", "pytorch_model.bin"])
def test_all_but_the_training_state_is_made_anew_from_it(data, uninterrupted, tmp_path, name):
    run = shutil.copytree(uninterrupted["pretrain"], tmp_path / "run")
    cut_to(name, 0.5)(run)
    assert ended(process := start(words("pretrain", data, run))) == 0, process.log.read_text()
    assert_same_run(run, uninterrupted["pretrain"])
    assert (run / name).read_bytes() == (uninterrupted["pretrain"] / name).read_bytes() or name in ("args.json", "metrics.jsonl")


@pytest.mark.parametrize("place", ["{tmp}/file", "{tmp}/file/run", "/proc/run", "/dev/null", "/proc/self"])
def test_an_output_folder_that_cannot_be_written_is_refused(data, tmp_path, capsys, place):
    (tmp_path / "file").write_text("in the way")
    run = place.format(tmp=tmp_path)
    if run.startswith("/") and not Path("/proc/self").exists():
        pytest.skip("needs Linux")
    assert_refused(words("pretrain", data, run), [run], capsys)


@pytest.mark.filterwarnings(*LOUD)
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(data, tmp_path, capsys, command):
    run = tmp_path / "run"
    assert_refused(words(command, data, run, "--learning_rate", 1e30, "--warmup_ratio", 0, "--save_steps", 1), ["step", run],
                   capsys)
    model = load(run)
    inputs = torch.from_numpy(numbers())[None, :T], torch.from_numpy(numbers(V, 3))
    output = model(*inputs)[0]
    assert torch.isfinite(output).all() and all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_nan_late_in_a_validation_recording_is_found_before_the_first_step(data, tmp_path, capsys):
    late = numbers(50)
    late[49, 1] = math.nan
    write_dataset(tmp_path / "val", {"R": [numbers(), late]})
    assert_refused(words("pretrain", data, tmp_path / "run", f"--val_dataset_path={tmp_path / 'val'}"),
                   ["row 1", "timepoint 49", "parcel 1"], capsys)
    assert not (tmp_path / "run").exists()


def test_the_commands_exit_with_2_and_one_line_on_stderr(data, tmp_path):
    done = subprocess.run([sys.executable, REPOSITORY / "brainlm.py", *words("pretrain", data, tmp_path, "--mask_ratio", 0)],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch("error: .*mask_ratio.*\n", done.stderr)


def test_constant_recordings_and_single_parcels_train(tmp_path, capsys):
    """Nothing to explain, or nothing to correlate with: no reason to fall over."""
    for parcels, recording in ((V, np.zeros((20, V), np.float32)), (1, numbers(20, 1))):
        folder = tmp_path / str(parcels)
        for split in "train", "val":
            write_dataset(folder / split, {"R": [recording] * 3, "Age": [1.0, 2.0, 3.0]})
        write_dataset(folder / "coords", {axis: [1.0] * parcels for axis in "XYZ"})
        for command in "pretrain", "finetune":
            output = folder / ("pretrained" if command == "pretrain" else "finetuned")
            assert ended(process := start(words(command, folder, output))) == 0, process.log.read_text()
            assert "Warning" not in process.log.read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Arrow layouts


def layouts():
    """name -> (values of the column R, its datasets feature as a function of datasets, arguments of save_to_disk)"""
    lists = [numbers(12 + i, seed=i).tolist() for i in range(7)]
    same = [numbers(12, seed=i).tolist() for i in range(7)]
    integers = [(10 * numbers(12 + i, seed=i)).round().astype(int).tolist() for i in range(7)]

    def nested(dtype, outer=-1, inner=-1):
        return lambda d: d.Sequence(d.Sequence(d.Value(dtype), length=inner), length=outer)

    def large(dtype):
        return lambda d: d.LargeList(d.LargeList(d.Value(dtype)))

    return {
        **{f"nested lists, {dtype}": (lists, nested(dtype), {}) for dtype in ("float16", "float32", "float64")},
        **{f"nested lists, {dtype}": (integers, nested(dtype), {}) for dtype in ("int8", "int16", "int32", "int64")},
        "nested lists, uint8": ([np.abs(recording).tolist() for recording in integers], nested("uint8"), {}),
        "type left to datasets": (lists, None, {}),
        "fixed-size inner lists": (lists, nested("float32", inner=V), {}),
        "fixed-size outer lists": (same, nested("float64", outer=12), {}),
        "fixed-size both": (same, nested("float32", outer=12, inner=V), {}),
        "large lists": (lists, large("float32"), {}),
        "large list of fixed-size lists": (lists, lambda d: d.LargeList(d.Sequence(d.Value("float32"), length=V)), {}),
        "large list in a list": (lists, lambda d: d.Sequence(d.LargeList(d.Value("float64"))), {}),
        "Array2D": (same, lambda d: d.Array2D((12, V), "float32"), {}),
        "Array2D of any length": (lists, lambda d: d.Array2D((None, V), "float32"), {}),
        "Array2D of any length, float16": (lists, lambda d: d.Array2D((None, V), "float16"), {}),
        "Array2D of integers": ([recording[:12] for recording in integers], lambda d: d.Array2D((12, V), "int32"), {}),
        **{f"{count} shards": (lists, nested("float32"), {"num_shards": count}) for count in (2, 3, 5)},
        "Array2D in shards": (lists, lambda d: d.Array2D((None, V), "float32"), {"num_shards": 3}),
        "fixed-size lists in shards": (same, nested("float32", outer=12, inner=V), {"num_shards": 5}),
    }


LAYOUTS = layouts()


def assert_reads_what_datasets_returns(folder, expected):
    """Every window of every row, and the first rows alone."""
    for rows in None, 3:
        recordings = brainlm.RecordingDataset(folder, "R", window=2, num_parcels=V, max_samples=rows)
        assert len(recordings) == len(expected["R"][:rows])
        for row, values in enumerate(expected["R"][:rows]):
            values = np.asarray(values, dtype=np.float64)
            assert recordings.lengths[row] == len(values)
            assert np.array_equal(recordings.window(row), values)
            for start, length in (0, 2), (3, 5), (len(values) - 4, 4):
                assert np.array_equal(recordings.window(row, start, length), values[start:start + length])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_reads_as_datasets_does(tmp_path, name):
    datasets = pytest.importorskip("datasets")
    values, feature, how = LAYOUTS[name]
    features = datasets.Features({"R": feature(datasets)}) if feature else None
    datasets.Dataset.from_dict({"R": values}, features=features).save_to_disk(tmp_path / "saved", **how)
    assert_reads_what_datasets_returns(tmp_path / "saved", datasets.load_from_disk(tmp_path / "saved")[:])


@pytest.mark.parametrize("change", ["select", "filter", "sort", "slice", "shuffle", "concatenate", "train_test_split"])
@pytest.mark.parametrize("name", ["nested lists, float32", "Array2D", "Array2D of any length", "fixed-size both", "large lists"])
def test_chosen_rows_read_as_datasets_does(tmp_path, name, change):
    datasets = pytest.importorskip("datasets")
    values, feature, _ = LAYOUTS[name]
    dataset = datasets.Dataset.from_dict({"R": values, "k": [3, 1, 2, 6, 5, 4, 0]},
                                         datasets.Features({"R": feature(datasets), "k": datasets.Value("int64")}))
    dataset = {"select": lambda: dataset.select([5, 2, 6, 0]), "filter": lambda: dataset.filter(lambda row: row["k"] % 2),
               "sort": lambda: dataset.sort("k"), "slice": lambda: dataset.select(range(2, 6)),
               "shuffle": lambda: dataset.shuffle(seed=1),
               "concatenate": lambda: datasets.concatenate_datasets([dataset.select(range(3, 7)), dataset]),
               "train_test_split": lambda: dataset.train_test_split(0.4, seed=0)["train"]}[change]()
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    assert_reads_what_datasets_returns(tmp_path / "saved", datasets.load_from_disk(tmp_path / "saved")[:])


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_many_record_batches_read_as_datasets_does(tmp_path, batch_size):
    datasets = pytest.importorskip("datasets")
    for name in "nested lists, float32", "Array2D of any length", "fixed-size both", "large lists":
        values, feature, _ = LAYOUTS[name]
        folder = tmp_path / name.replace(" ", "_")
        features = datasets.Features({"R": feature(datasets)})
        generated = datasets.Dataset.from_generator(lambda: ({"R": recording} for recording in values), features=features,
                                                    cache_dir=str(tmp_path / "cache"), writer_batch_size=batch_size)
        generated.map(lambda row: row, writer_batch_size=batch_size).save_to_disk(folder)
        assert_reads_what_datasets_returns(folder, datasets.load_from_disk(folder)[:])


def test_one_split_of_a_dataset_dict_reads_as_datasets_does(tmp_path):
    datasets = pytest.importorskip("datasets")
    values = LAYOUTS["nested lists, float32"][0]
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"R": values}),
                                   "test": datasets.Dataset.from_dict({"R": values[:2]})})
    splits.save_to_disk(tmp_path / "saved")
    for split in splits:
        assert_reads_what_datasets_returns(tmp_path / "saved" / split, datasets.load_from_disk(tmp_path / "saved")[split][:])


def test_columns_of_any_type_may_stand_beside_the_recordings(tmp_path):
    datasets = pytest.importorskip("datasets")
    from datetime import date, datetime, timezone
    values = LAYOUTS["nested lists, float32"][0]
    columns = {"text": ["a", None, "Ω", "", "e", "f", "g"], "nothing": [None] * 7, "yes": [True, None, False, True, False, True, True],
               "Age": [50, None, 60, 61, 62, 63, None], "Score": [1.5, float("nan"), None, 2.5, 3.5, 4.5, 5.5],
               "dict": [{"a": i, "b": [str(i)]} for i in range(7)], "list": [list(range(i)) for i in range(7)],
               "time": [datetime(2020, 1, 1 + i, tzinfo=timezone.utc) for i in range(7)], "day": [date(2020, 1, 1 + i) for i in range(7)],
               "bytes": [b"\0\xff" * i for i in range(7)], "label": [0, 1, 0, 1, 0, 1, 0]}
    dataset = datasets.Dataset.from_dict({**columns, "R": values})
    dataset = dataset.cast_column("label", datasets.ClassLabel(names=["control", "patient"]))
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    assert_reads_what_datasets_returns(tmp_path / "saved", datasets.load_from_disk(tmp_path / "saved")[:])
    table = brainlm.read_arrow(tmp_path / "saved")
    for name, expected in (("Age", [50, np.nan, 60, 61, 62, 63, np.nan]), ("Score", [1.5, np.nan, np.nan, 2.5, 3.5, 4.5, 5.5]),
                           ("yes", [1, np.nan, 0, 1, 0, 1, 1]), ("label", columns["label"])):
        assert np.array_equal(brainlm.read_numbers(table, name, "here"), np.array(expected, float), equal_nan=True)


def test_rows_without_a_target_are_left_out_and_counted(data, tmp_path, capsys):
    folder = tmp_path / "gaps"
    write_dataset(folder, {"R": [numbers(seed=i) for i in range(5)], "Age": [50.0, None, float("nan"), 60.0, 61.0]})
    process = start(words("finetune", data, tmp_path / "run", f"--train_dataset_path={folder}", "--max_steps", 1))
    assert ended(process) == 0, process.log.read_text()
    assert re.search("2 of 5 recordings have no Age", process.log.read_text())
    assert load(tmp_path / "run").target_mean == pytest.approx(57.0)


def test_array2d_trains_without_the_datasets_library(data, uninterrupted, tmp_path):
    """Where `datasets` is not imported, pyarrow does not know its extension types."""
    datasets = pytest.importorskip("datasets")
    nested = datasets.load_from_disk(data / "train")
    features = datasets.Features({"R": datasets.Array2D((None, V), "float32"), "Age": datasets.Value("float64")})
    nested.cast(features).save_to_disk(tmp_path / "array2d")
    process = start(words("pretrain", data, tmp_path / "run", f"--train_dataset_path={tmp_path / 'array2d'}"))
    assert ended(process) == 0, process.log.read_text()
    assert_same_run(tmp_path / "run", uninterrupted["pretrain"])


# ----------------------------------------------------------------------------------------------------------------------
# Many processes


def start_two(command_line, **to_first):
    """What torchrun --nproc_per_node=2 does, without its start-up time."""
    port = free_port()
    return [start(command_line, environment_of(rank, port), **(to_first if rank == "0" else {})) for rank in "01"]


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return str(server.getsockname()[1])


def environment_of(rank, port):
    return {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}


def assert_same_but_for_rounding(folder, expected):
    for mine, other in zip(metrics(folder), metrics(expected), strict=True):
        flat, other_flat = (json.dumps(line, sort_keys=True) for line in (mine, other))
        values, other_values = (list(map(float, re.findall(r"-?\d+\.\d+(?:e-?\d+)?", text))) for text in (flat, other_flat))
        assert values == pytest.approx(other_values, rel=2e-3, abs=1e-4)     # Muon orthogonalises in bfloat16
    weights, other_weights = load(folder).state_dict(), load(expected).state_dict()
    for name, value in weights.items():
        if name.endswith("qkv.bias"):                     # adding to all keys changes no softmax: AdamW blows up its noise
            value, other_weights[name] = value[16:], other_weights[name][16:]
        torch.testing.assert_close(value, other_weights[name], rtol=1e-3, atol=1e-3, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("command, more", [("pretrain", ["--hidden_dropout_prob", 0]), ("finetune", []),
                                           ("finetune", ["--freeze_backbone"])], ids=["pretrain", "finetune", "frozen"])
def test_two_processes_equal_one_of_twice_the_batch(data, tmp_path, command, more):
    started = [start(words(command, data, tmp_path / "one", "--per_device_train_batch_size", 4, *more)),
               *start_two(words(command, data, tmp_path / "two", "--per_device_train_batch_size", 2, *more))]
    assert [ended(process) for process in started] == [0, 0, 0], [process.log.read_text() for process in started]
    assert_same_but_for_rounding(tmp_path / "two", tmp_path / "one")
    assert "step 6/6" in started[1].log.read_text() and started[2].log.read_text() == ""         # only rank 0 prints


def test_two_processes_killed_and_resumed_as_one_or_two(data, tmp_path):
    more = "--hidden_dropout_prob", 0
    assert ended(start(words("pretrain", data, tmp_path / "one", "--per_device_train_batch_size", 4, *more))) == 0
    run = tmp_path / "run"
    two = words("pretrain", data, run, "--per_device_train_batch_size", 2, *more)
    for kill_at in 24, 32:
        first, second = start_two(two, kill_at=kill_at)
        assert ended(first) == -signals.SIGKILL
        second.kill()
        ended(second)
        assert_loadable(run)
    step = torch.load(run / "training_state.pt")["step"]
    assert ended(process := start(words("pretrain", data, run, "--per_device_train_batch_size", 4, *more))) == 0
    assert f"resuming {run} after step {step}" in process.log.read_text()
    assert_same_but_for_rounding(run, tmp_path / "one")


def test_two_machines_without_a_common_disk_train_and_resume(data, tmp_path):
    """Rank 0 tells the other one, which sees another folder, what the run's state is."""
    more = "--hidden_dropout_prob", 0
    assert ended(start(words("pretrain", data, tmp_path / "one", "--per_device_train_batch_size", 4, *more))) == 0

    def two(**to_first):
        port = free_port()
        return [start(words("pretrain", data, tmp_path / rank, *more), environment_of(rank, port), **(to_first if rank == "0" else {}))
                for rank in "01"]
    first, second = two(kill_at=32)
    assert ended(first) == -signals.SIGKILL
    second.kill()
    ended(second)
    assert 0 < torch.load(tmp_path / "0" / "training_state.pt")["step"] < 6
    started = two()
    assert [ended(process) for process in started] == [0, 0], [process.log.read_text() for process in started]
    assert_same_but_for_rounding(tmp_path / "0", tmp_path / "one")
    assert not (tmp_path / "1").exists()


def test_torchrun_makes_the_sample_data_once_prints_once_and_ends_at_ctrl_c(tmp_path):
    for name in "brainlm.py", "sample_data.py":
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "sample_data").mkdir()                  # as an interrupted creation leaves it
    torchrun = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "brainlm.py",
                                 "pretrain", "--timepoint_patching_size", "100", "--hidden_size", "8", "--num_attention_heads", "1",
                                 "--num_hidden_layers", "1", "--logging_steps", "1", "--device", "cpu", "--dtype", "float32"],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
    printed = []
    while not printed or not printed[-1].startswith("step "):
        printed.append(torchrun.stdout.readline())
        assert printed[-1], torchrun.stderr.read()
    torchrun.send_signal(signals.SIGINT)
    torchrun.communicate(timeout=60)
    for start_of_line in "no ./sample_data", "wrote ./sample_data", "data:", "model:":
        assert len([line for line in printed if line.startswith(start_of_line)]) == 1, printed
    assert torch.load(tmp_path / "runs/pretrain/training_state.pt")["step"] == 0


def test_evaluate_in_two_processes_writes_what_one_writes(data, tmp_path):
    folders = [shutil.copytree(data / "pretrained", tmp_path / name) for name in ("one", "two")]
    paths = [word for word in words("pretrain", data, "") if "dataset_path" in word]
    one, two = (["evaluate", *paths, "--recording_col_name", "R", "--device", "cpu", "--model_name_or_path", str(folder)]
                for folder in folders)
    started = [start(one), *start_two(two)]
    assert [ended(process) for process in started] == [0, 0, 0], [process.log.read_text() for process in started]
    one, two = (json.loads((folder / "evaluation.json").read_text())["tables"] for folder in folders)
    for title, table in one.items():
        for method, row in table.items():
            assert two[title][method] == pytest.approx(row, rel=1e-4, abs=1e-5)
    assert started[2].log.read_text() == ""


# ----------------------------------------------------------------------------------------------------------------------
# The same bits wherever a run is restarted, and nobody's files lost


def run_here(command_line, capsys):
    """Run a command in this process; returns what it printed."""
    capsys.readouterr()
    brainlm.main([str(word) for word in command_line])
    return capsys.readouterr().out


@pytest.mark.parametrize("units, name", [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"),
                                         ({"avx512_bf16": False, "avx2": True}, "float32"), ({}, "float32")])
def test_auto_dtype_is_what_the_processor_has_and_a_resumed_run_keeps_its_own(data, tmp_path, monkeypatch, capsys, units, name):
    run = tmp_path / "run"
    for steps, found in (1, units), (2, {"avx512_bf16": name == "float32"}):       # the second machine is the other kind
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        run_here(words("pretrain", data, run, "--dtype", "auto", "--max_steps", steps), capsys)
        assert torch.load(run / "training_state.pt")["dtype"] == name
    run_here(words("pretrain", data, run, "--dtype", "float32", "--max_steps", 3), capsys)
    assert torch.load(run / "training_state.pt")["dtype"] == "float32", "said by the user"


def test_a_resume_with_another_batch_size_goes_on_with_the_next_sample(data, tmp_path, monkeypatch, capsys):
    drawn, training_window = [], RecordingDataset.training_window
    monkeypatch.setattr(RecordingDataset, "training_window",
                        lambda self, n, *arguments: drawn.append(n) or training_window(self, n, *arguments))
    for steps, batch in (3, 2), (5, 4):
        run_here(words("pretrain", data, tmp_path / "run", "--max_steps", steps, "--per_device_train_batch_size", batch), capsys)
    assert drawn == list(range(3 * 4 + 2 * 8)), "two batches make a step"


def test_the_loss_that_is_logged_is_the_mean_since_the_last_line_whatever_happened_between(data, tmp_path):
    run = tmp_path / "run"
    assert ended(start(words("pretrain", data, tmp_path / "all", "--logging_steps", 1, "--eval_steps", 0))) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "all") if "loss" in line]
    assert ended(start(words("pretrain", data, run, "--logging_steps", 3, "--eval_steps", 0), kill_at=36)) == -signals.SIGKILL
    assert torch.load(run / "training_state.pt")["step"] == 4 and len(losses) == 6
    assert ended(start(words("pretrain", data, run, "--logging_steps", 5, "--eval_steps", 0))) == 0
    logged = {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}
    assert logged == pytest.approx({3: np.mean(losses[:3]), 5: np.mean(losses[3:5]), 6: losses[5]})


def test_fewer_steps_than_were_trained_are_refused(data, uninterrupted, tmp_path, capsys):
    run = shutil.copytree(uninterrupted["pretrain"], tmp_path / "run")
    assert_refused(words("pretrain", data, run, "--max_steps", 5), ["--max_steps 5", run, "6 steps"], capsys)


@pytest.mark.parametrize("name", ["README.md", "brainlm.py", "config.json"])
@pytest.mark.parametrize("more", [[], ["--overwrite_output_dir"]])
def test_files_of_others_are_not_overwritten(data, tmp_path, capsys, name, more):
    (tmp_path / name).write_text("mine")
    assert_refused(words("pretrain", data, tmp_path, *more), [tmp_path, name, "--output_dir"], capsys)
    assert (tmp_path / name).read_text() == "mine"


def test_the_model_to_start_from_is_not_overwritten(data, uninterrupted, tmp_path, capsys):
    run = shutil.copytree(uninterrupted["pretrain"], tmp_path / "run")
    assert_refused(words("pretrain", data, run, "--model_name_or_path", run, "--overwrite_output_dir"), [run, "--output_dir"], capsys)
    assert_same_run(run, uninterrupted["pretrain"])


def test_starting_anew_leaves_nothing_of_the_old_run(data, uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted["pretrain"], tmp_path / "run")
    (run / "evaluation.json").write_text("{}")
    process = start(words("pretrain", data, run, "--overwrite_output_dir"), kill_at=40)
    assert ended(process) == -signals.SIGKILL
    assert not (run / "evaluation.json").exists() and not (run / "README.md").exists()


def test_a_file_system_without_locks_is_good_enough(data, uninterrupted, tmp_path, monkeypatch, capsys):
    def flock(*arguments):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", flock)
    run_here(words("pretrain", data, tmp_path / "run"), capsys)
    assert_same_run(tmp_path / "run", uninterrupted["pretrain"])


def test_dropout_of_the_flags_acts_on_given_weights_and_not_on_what_features_look_like(data, tmp_path, monkeypatch, capsys):
    seen = {}

    def fit(args, model, *others):
        seen[args.command] = model
        sys.exit(0)
    monkeypatch.setattr(brainlm, "fit", fit)
    torch.manual_seed(0)
    BrainLM(BrainLMConfig(T, P, 8, 2, 2, hidden_dropout_prob=0.9)).save_pretrained(tmp_path / "dropout")
    for command in "pretrain", "finetune":
        more = ["--hidden_dropout_prob", 0.3] if command == "pretrain" else []
        with pytest.raises(SystemExit):
            run_here(words(command, data, tmp_path / command, "--model_name_or_path", tmp_path / "dropout", *more), capsys)
    assert {layer.dropout for layer in seen["pretrain"].layers} == {seen["pretrain"].config.hidden_dropout_prob} == {0.3}
    model, dataset = seen["finetune"].eval(), RecordingDataset(data / "train", "R")
    xyz = brainlm.read_coordinates(data / "coords")[0]
    features = torch.cat([model.features(dataset.batch([(row, 0)], T), xyz) for row in range(8)])
    torch.testing.assert_close(model.feature_std, features.std(dim=0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("command", ["pretrain", "finetune", "evaluate"])
def test_evaluation_never_takes_more_windows_at_once_than_it_is_told(data, tmp_path, monkeypatch, capsys, command):
    write_dataset(tmp_path / "val", {"R": [numbers(100)] * 2, "Age": [50.0, 60.0]})
    sizes, forward = set(), BrainLM.forward

    def counting(self, signal, *others):
        if not self.training:
            sizes.add(len(signal))
        return forward(self, signal, *others)
    line = words("finetune" if command == "evaluate" else command, data, tmp_path / "run", "--max_steps", 2)
    if command == "evaluate":
        line = ["evaluate", *line[1:4], "--recording_col_name", "R", "--model_name_or_path",
                shutil.copytree(data / "pretrained", tmp_path / "pretrained"), "--dtype", "float32", "--device", "cpu"]
    monkeypatch.setattr(BrainLM, "forward", counting)
    run_here([*line, f"--val_dataset_path={tmp_path / 'val'}", "--per_device_eval_batch_size", 3], capsys)
    assert max(sizes) == 3


def test_pasted_into_a_notebook_the_file_neither_parses_the_kernels_arguments_nor_needs_a_file(tmp_path):
    code = (f"import sys; sys.argv = ['ipykernel_launcher.py', '-f', 'kernel.json']\n"
            f"cell = open({str(REPOSITORY / 'brainlm.py')!r}).read()\n"
            "import types; sys.modules['__main__'] = notebook = types.ModuleType('__main__')\n"
            "exec(compile(cell, '<cell>', 'exec'), notebook.__dict__)\n"
            "model = notebook.BrainLM(notebook.BrainLMConfig(20, 5, 16)).eval()\n"
            f"model.save_pretrained({str(tmp_path)!r})\n"
            f"again = notebook.BrainLM.from_pretrained({str(tmp_path)!r})\n"
            "torch = notebook.torch; x = torch.randn(1, 20, 3), torch.randn(3, 3)\n"
            "assert torch.equal(model(*x)[0], again(*x)[0])\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_one_folder_holds_one_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"of another model")
    tiny_model().save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    BrainLM.from_pretrained(tmp_path)


def test_sample_data_are_not_looked_for_among_installed_packages(tmp_path):
    shutil.copy(REPOSITORY / "brainlm.py", tmp_path)
    done = subprocess.run([sys.executable, "brainlm.py", "pretrain"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and re.fullmatch("error: no sample_data.py beside .*\n", done.stderr)


def test_a_run_folder_of_another_version_is_refused(data, uninterrupted, tmp_path, capsys):
    run = shutil.copytree(uninterrupted["pretrain"], tmp_path / "run")
    torch.save({"step": 3}, run / "training_state.pt")
    assert_refused(words("pretrain", data, run), [run, "another version", "--overwrite_output_dir"], capsys)


# ----------------------------------------------------------------------------------------------------------------------
# The Hugging Face Hub


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    return torch.randn(2, T, V), torch.randn(V, 3) * 40, brainlm.random_mask(2, T // P, V, 0.75)


def assert_equal_outputs(model, other, *inputs):
    with torch.no_grad():
        for mine, expected in zip(model.eval()(*inputs), other.eval()(*inputs), strict=True):
            assert torch.equal(mine, expected)


def test_importing_brainlm_imports_no_transformers(data):
    code = "import brainlm, sys; sys.exit(any(name in sys.modules for name in ('transformers', 'datasets', 'huggingface_hub')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_a_run_folder_loads_from_the_hub_bit_for_bit(uninterrupted, inputs):
    transformers = pytest.importorskip("transformers")
    run = uninterrupted["pretrain"]
    config = transformers.AutoConfig.from_pretrained(run, trust_remote_code=True)
    assert (config.hidden_size, config.num_hidden_layers, config.mask_ratio, config.loss_fn) == (8, 2, 0.75, "mse")
    model = transformers.AutoModelForPreTraining.from_pretrained(run, trust_remote_code=True)
    assert not model.training
    assert_equal_outputs(model, brainlm.BrainLM.from_pretrained(run), *inputs)
    half = transformers.AutoModelForPreTraining.from_pretrained(run, trust_remote_code=True, dtype=torch.bfloat16)
    torch.testing.assert_close(half(*inputs)[0].float(), model(*inputs)[0], rtol=0.1, atol=0.1)
    wide, ours = type(config)(hidden_size=256), BrainLMConfig(hidden_size=256)
    assert {name: getattr(wide, name) for name in vars(ours)} == vars(ours)


def test_save_pretrained_of_the_hub_model_round_trips(uninterrupted, inputs, tmp_path):
    transformers = pytest.importorskip("transformers")
    run, saved = uninterrupted["pretrain"], tmp_path / "saved"
    model = transformers.AutoModelForPreTraining.from_pretrained(run, trust_remote_code=True)
    model.save_pretrained(saved)
    assert (saved / "model.safetensors").exists() and (saved / "brainlm.py").exists()
    again = transformers.AutoModelForPreTraining.from_pretrained(saved, trust_remote_code=True)
    assert_equal_outputs(again, model, *inputs)
    assert_equal_outputs(brainlm.BrainLM.from_pretrained(saved), model, *inputs)
    assert brainlm.BrainLM.from_pretrained(saved).config == brainlm.BrainLM.from_pretrained(run).config
    brainlm.BrainLM.from_pretrained(saved).save_pretrained(tmp_path / "back")          # there and back again
    assert_equal_outputs(brainlm.BrainLM.from_pretrained(tmp_path / "back"), model, *inputs)


def test_a_finetuned_run_loads_from_the_hub_with_its_head(uninterrupted, inputs, tmp_path):
    transformers = pytest.importorskip("transformers")
    run = uninterrupted["finetune"]
    model = transformers.AutoModelForPreTraining.from_pretrained(run, trust_remote_code=True)
    assert_equal_outputs(model, brainlm.BrainLMRegressor.from_pretrained(run), *inputs[:2])
    model.save_pretrained(tmp_path / "saved")
    assert_equal_outputs(brainlm.BrainLMRegressor.from_pretrained(tmp_path / "saved"), model, *inputs[:2])
    assert_equal_outputs(brainlm.BrainLM.from_pretrained(tmp_path / "saved"), model.model.backbone, *inputs)


def test_training_goes_on_from_what_the_hub_saved(data, uninterrupted, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForPreTraining.from_pretrained(uninterrupted["pretrain"], trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved")
    runs = [tmp_path / "from_hub", tmp_path / "from_run"]
    started = [start(words("finetune", data, run, "--model_name_or_path", source))
               for run, source in zip(runs, (tmp_path / "saved", uninterrupted["pretrain"]))]
    assert [ended(process) for process in started] == [0, 0], started[0].log.read_text()
    assert_same_run(*runs)


def test_a_name_that_the_hub_does_not_give_is_refused_in_one_line(data, tmp_path, capsys):
    pytest.importorskip("huggingface_hub")
    assert_refused(words("finetune", data, tmp_path / "run", "--model_name_or_path", "nobody/nothing"), ["nobody/nothing"], capsys)
