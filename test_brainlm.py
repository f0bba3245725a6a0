"""What brainlm.py promises, one test a promise, in the order of the file: Part I, the lesson; then Part II,
the program, which runs tiny commands and breaks things; last the README and sample_data.py.

    pytest

Shapes: B batch, T timepoints, V parcels, P patch length, N = T / P temporal tokens, H hidden size,
S = 1 + N * V sequence length.
"""

import contextlib
import dataclasses
import datetime
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
import threading
import types
import warnings
from dataclasses import fields
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
                     block_causal_mask, error_sums, forward_mask, patchify, random_mask,
                     reconstruction_loss, scores, temporal_encoding, unpatchify)
from sample_data import RECORDING_COL, make_sample_data, robust_scale, write_dataset

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp()}    # no network, no cache of the user's
REPOSITORY = Path(brainlm.__file__).parent
SOURCE = (REPOSITORY / "brainlm.py").read_text()
PART_I = SOURCE[:SOURCE.index("# Part II: the program")]
torch.set_num_threads(1)    # the tensors here are tiny: more threads would only wait for each other


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def tiny_config(N=4, P=5, **others):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} | others
    return BrainLMConfig(num_timepoints_per_voxel=N * P, timepoint_patching_size=P, **sizes)


def tiny_model(N=4, P=5, **others):
    return stir(BrainLM(tiny_config(N, P, **others)))


def stir(module, seed=0):
    """Move every parameter off its start: queries that equal keys, and biases of zero, hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def tiny_input(B=2, T=20, V=3, seed=0):
    """signal [B, T, V] and xyz [V, 3] in mm."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, V, generator=generator), 50 * torch.randn(V, 3, generator=generator)


def tiny_dataset(folder, lengths=(40, 33, 52), V=3, seed=0, **columns):
    """A dataset of recordings that have a past to learn from: each value is half the one before, plus noise
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


# ======================================================================================================
# Part I: the lesson
# ======================================================================================================

# ------------------------------------------------------------------------------------------------------
# 1. Configuration


def test_heads_are_64_wide_where_that_divides_the_hidden_size():
    assert [BrainLMConfig(hidden_size=H).num_attention_heads for H in (32, 128, 200, 256)] == [1, 2, 1, 4]


# ------------------------------------------------------------------------------------------------------
# 2. Data


def test_windows_are_what_was_written(tmp_path):
    dataset, recordings = tiny_dataset(tmp_path / "data")
    assert len(dataset) == 3 and dataset.num_parcels == 3 and list(dataset.lengths) == [40, 33, 52]
    for row, recording in enumerate(recordings):
        assert np.array_equal(dataset.window(row), recording)
    assert np.array_equal(dataset.window(2, start=30, num_timepoints=7), recordings[2][30:37])
    assert np.array_equal(dataset.window(0, start=4, stride=3, num_timepoints=12), recordings[0][4:40:3])
    batch = dataset.batch([(1, 4), (0, 10, 3)], num_timepoints=10)
    assert batch.dtype == torch.float32
    assert np.array_equal(batch, np.stack([recordings[1][4:14], recordings[0][10:40:3]]))


def test_a_window_past_the_end_is_refused_and_never_the_next_persons(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data")                             # of 40, 33 and 52 timepoints
    assert dataset.window(0, start=40, num_timepoints=0).shape == (0, 3)
    for row, start, stride, num in ((0, 21, 1, 20), (0, 41, 1, None), (0, -1, 1, 20), (0, 0, 3, 15),
                                    (2, 40, 1, 13)):
        with pytest.raises(BadInput, match=f"row {row} has {dataset.lengths[row]} timepoints"):
            dataset.window(row, start, stride, num_timepoints=num)


def test_training_windows_are_a_function_of_seed_and_sample_number(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data")

    def windows(seed, numbers, rows=range(3)):
        return [dataset.training_window(n, rows, 20, seed) for n in numbers]
    first = windows(7, range(1200))
    assert windows(7, reversed(range(1200)))[::-1] == first != windows(8, range(1200))

    epochs = [tuple(row for row, *_ in first[i:i + 3]) for i in range(0, 1200, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs), "each recording once an epoch"
    assert len(set(epochs)) == 6, "in an order that changes"
    for row, length in enumerate(dataset.lengths):
        starts = {start for r, start, _ in first if r == row}
        assert starts == set(range(length - 20 + 1)), "each start that leaves a whole window, and no other"
    assert {row for row, *_ in windows(0, range(20), np.array([0, 2]))} == {0, 2}, "of the given rows alone"


def test_slower_training_windows_take_every_2nd_or_3rd_timepoint_of_recordings_that_are_long_enough(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data", lengths=(70, 50, 25))
    windows = [dataset.training_window(n, range(3), 20, seed=0, stride_prob=0.5) for n in range(600)]
    assert [{stride for row, _, stride in windows if row == i} for i in range(3)] == [{1, 2, 3}, {1, 2}, {1}]
    assert all(0 <= start <= dataset.lengths[row] - 20 * stride for row, start, stride in windows)
    assert 160 < sum(stride > 1 for row, _, stride in windows if row < 2) < 240       # half of 400


# ------------------------------------------------------------------------------------------------------
# 3. Tokens


def test_a_patch_is_consecutive_timepoints_of_one_parcel_and_unpatchify_the_inverse():
    signal, _ = tiny_input(B=2, T=20, V=3)
    patches = patchify(signal, 5)
    assert patches.shape == (2, 4, 3, 5)
    for n, v in np.ndindex(4, 3):
        assert torch.equal(patches[:, n, v], signal[:, 5 * n:5 * n + 5, v])
    for P in (1, 2, 5, 20):
        assert torch.equal(unpatchify(patchify(signal, P)), signal)


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


def test_temporal_encoding_is_the_sinusoid():
    N, H = 7, 6
    expected = np.zeros((N, H))
    for t, i in np.ndindex(N, H // 2):
        expected[t, 2 * i] = np.sin(t / 100 ** (2 * i / H))
        expected[t, 2 * i + 1] = np.cos(t / 100 ** (2 * i / H))
    np.testing.assert_allclose(temporal_encoding(N, H), expected, atol=1e-6)


def test_tokens_are_timepoint_major_with_cls_first():
    B, N, V = 2, 4, 3
    model, (signal, xyz) = tiny_model(), tiny_input(V=V)
    tokens, _ = model.tokens(signal, xyz)
    assert tokens.shape == (B, 1 + N * V, 16)
    assert torch.equal(tokens[:, 0], model.cls_token.expand(B, -1))
    for t, v in np.ndindex(N, V):
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
        what = model.patch_projection(signal[b, 5 * t:5 * t + 5, v])
        where, when = model.spatial_encoding(xyz)[v], temporal_encoding(N, 16)[t]
        if mask[b, t, v]:
            what = model.mask_token
        torch.testing.assert_close(tokens[b, t, v], what + where + when)
        torch.testing.assert_close(position[t, v], torch.cat([where, when]))


def test_a_signal_that_does_not_fit_is_refused():
    model, (signal, xyz) = tiny_model(), tiny_input(V=3)
    with pytest.raises(BadInput, match="19 timepoints"):
        model(signal[:, :19], xyz)
    with pytest.raises(BadInput, match="2 coordinates"):
        model(signal, xyz[:2])


# ------------------------------------------------------------------------------------------------------
# 4. Attention


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


SHAPES = pytest.mark.parametrize("N, V", [(1, 1), (1, 4), (4, 1), (3, 5)])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@SHAPES
def test_attention_by_slices_is_masked_attention(N, V, dtype, tolerance):
    qkv = torch.randn(3, 2, 2, 1 + N * V, 8, dtype=dtype, requires_grad=True).unbind()
    by_slices, by_mask = (output_and_gradients(attention, qkv, V)
                          for attention in (brainlm.plain_attention, masked_attention))
    torch.testing.assert_close(by_slices, by_mask, rtol=tolerance, atol=tolerance)


def look_ahead(model, signal, xyz, mask=None):
    """How the future reaches the past in a model: {"value", "gradient"} at worst, the empty set if not."""
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


@pytest.mark.parametrize("case", ["nothing hidden", "random mask", "forward mask", "bfloat16"])
def test_the_past_does_not_depend_on_the_future(case):
    """By not one bit, over four layers, and with a gradient of exactly zero."""
    model, (signal, xyz) = tiny_model(num_hidden_layers=4), tiny_input(V=3)
    mask = {"random mask": random_mask(2, 4, 3, 0.5), "forward mask": forward_mask(2, 4, 3)}.get(case)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "bfloat16"):
        assert look_ahead(model, signal, xyz, mask) == set()


def test_the_future_depends_on_all_of_the_past():
    """Without this, a model that reads nothing would pass the test above."""
    model, (signal, xyz) = tiny_model(num_hidden_layers=4), tiny_input(V=3)
    signal.requires_grad_()
    output = model(signal, xyz)[0]
    for t, v in np.ndindex(4, 3):
        gradient, = torch.autograd.grad(output[:, 5 * t + 4, v].sum(), signal, retain_graph=True)
        assert gradient[:, :5 * t + 5].all()


def test_opening_column_0_of_the_mask_would_let_the_future_in(monkeypatch):
    """CLS reads everything; parcels that read CLS would know the future from the second layer on."""
    model, (signal, xyz) = tiny_model(num_hidden_layers=4), tiny_input(V=3)
    monkeypatch.setattr(brainlm, "block_causal_attention", masked_attention)
    assert look_ahead(model, signal, xyz) == set()
    monkeypatch.setattr(brainlm, "block_causal_attention",
                        lambda *qkv_V: masked_attention(*qkv_V, column_0_open=True))
    assert look_ahead(model, signal, xyz) == {"value", "gradient"}


# ------------------------------------------------------------------------------------------------------
# 5. Model


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_model_runs_in_any_type(dtype):
    model, (signal, xyz), mask = tiny_model(), tiny_input(), random_mask(2, 4, 3, 0.5)
    expected = model(signal, xyz, mask)[0]
    output = model.to(dtype)(signal, xyz, mask)[0]
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_acts_in_training_alone(kind):
    model, plain, (signal, xyz) = tiny_model(**{kind: 0.5}), tiny_model(), tiny_input()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(signal, xyz)[0], plain(signal, xyz)[0])
    model.train()
    assert not torch.equal(model(signal, xyz)[0], model(signal, xyz)[0])


def test_any_small_configuration_trains_and_is_causal():
    """Forty drawn at random, and the smallest there is."""
    for seed in range(41):
        rng = np.random.default_rng(seed)
        V, N, P, B, heads, layers = (int(rng.integers(1, high + 1)) for high in (40, 6, 20, 3, 4, 3))
        if seed == 0:
            V = N = P = B = heads = layers = 1
        config = tiny_config(N, P, hidden_size=8 * heads, num_hidden_layers=layers, num_attention_heads=heads,
                             intermediate_size=int(rng.integers(1, 40)), loss_fn=rng.choice(["mse", "mae"]))
        model, (signal, xyz) = stir(BrainLM(config), seed), tiny_input(B, N * P, V, seed)
        mask = forward_mask(B, N, V) if rng.random() < 0.5 else random_mask(B, N, V, rng.choice([0.75, 1.0]))

        prediction, hidden = model(signal, xyz, mask)
        assert prediction.shape == signal.shape and hidden.shape == (B, 1 + N * V, 8 * heads)
        loss = reconstruction_loss(prediction, signal, mask, config.loss_fn)
        loss.backward()
        trained = [parameter.grad for name, parameter in model.named_parameters() if name != "cls_token"]
        finite = all(value.isfinite().all() for value in [loss, *trained])
        assert finite and loss > 0, f"seed {seed}: {B=} {V=} {config}"
        assert look_ahead(model, signal, xyz, mask) == set(), f"seed {seed}: {B=} {V=} {config}"


def test_a_forecast_is_forward_masking_and_feeds_on_itself_in_a_sliding_window():
    model, (signal, xyz) = tiny_model(N=4), tiny_input(T=15)
    known = signal
    for _ in range(3):                                  # 15 known + 5 hidden timepoints fill the window
        window = torch.cat([known[:, -15:], torch.zeros(2, 5, 3)], dim=1)
        known = torch.cat([known, model(window, xyz, forward_mask(2, 4, 3))[0][:, -5:]], dim=1)
    assert torch.equal(model.forecast(signal, xyz, 15), known[:, 15:])


@pytest.mark.parametrize("context", [5, 13, 15, 100])
def test_forecast_takes_any_context_of_one_patch_or_more_and_any_length(context):
    model, (signal, xyz) = tiny_model(N=4), tiny_input(B=3, T=context, V=2)
    used = min(context // 5 * 5, 15)                    # whole patches, the latest, that leave room for one
    for length in (0, 1, 5, 23):
        future = model.forecast(signal, xyz, length)
        assert future.shape == (3, length, 2) and future.isfinite().all()
        assert torch.equal(future, model.forecast(signal[:, -used:], xyz, length))
        assert torch.equal(future, model.forecast(signal, xyz, 30)[:, :length])
    with pytest.raises(BadInput, match="patch of 5"):
        model.forecast(signal[:, :4], xyz, 5)


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


# ------------------------------------------------------------------------------------------------------
# 6. Masking and loss


def test_random_mask_hides_an_exact_number_of_every_sample():
    for N, V, ratio in (4, 3, 0.75), (1, 1, 1.0), (3, 7, 0.2), (10, 42, 0.123):
        mask = random_mask(5, N, V, ratio)
        assert mask.shape == (5, N, V) and mask.dtype == torch.bool
        assert mask.sum(dim=(1, 2)).tolist() == 5 * [round(ratio * N * V)]
    with pytest.raises(BadInput, match="hides none of 3 tokens"):
        random_mask(2, 1, 3, 0.1)


def test_random_mask_hides_every_token_equally_often_samples_differ_and_a_generator_repeats_it():
    mask, again, other = (random_mask(4000, 3, 4, 0.25, torch.Generator().manual_seed(seed))
                          for seed in (0, 0, 1))
    assert (mask.float().mean(dim=0) - 0.25).abs().max() < 0.03
    assert len(mask.flatten(1).unique(dim=0)) == math.comb(12, 3), "every choice of 3 of 12 tokens turns up"
    assert torch.equal(mask, again) and not torch.equal(mask, other)


def test_forward_mask_hides_the_last_temporal_token_and_the_repeated_one_a_third_of_the_others_too():
    mask = forward_mask(2, 3, 4)
    assert mask.shape == (2, 3, 4) and mask.dtype == torch.bool
    assert mask[:, 2].all() and not mask[:, :2].any()
    mask = brainlm.repeated_forward_mask(3, 100, 4, torch.Generator().manual_seed(0))
    assert mask.shape == (3, 100, 4) and mask[:, -1].all()
    assert torch.equal(mask, mask[:1, :, :1].expand_as(mask)), "all parcels, the same in all samples"
    assert 20 < mask[0, :, 0].sum() < 50, "a third"


def test_losses_are_numpys_on_hidden_tokens_alone():
    (signal, _), (prediction, _) = tiny_input(seed=0), tiny_input(seed=1)
    mask = random_mask(2, 4, 3, 0.5)
    difference = prediction.numpy() - signal.numpy()
    errors = [difference[b, t, v] for b, t, v in np.ndindex(2, 20, 3) if mask[b, t // 5, v]]
    assert len(errors) == 2 * 6 * 5
    mse, mae = (reconstruction_loss(prediction, signal, mask, kind).item() for kind in ("mse", "mae"))
    assert mse == pytest.approx(np.mean(np.square(errors))) and mae == pytest.approx(np.mean(np.abs(errors)))
    visible = prediction.masked_fill(~mask.repeat_interleave(5, dim=1), 1e6)
    assert reconstruction_loss(visible, signal, mask).item() == mse


def test_the_answer_to_an_amplified_signal_is_divided_by_the_gain():
    (signal, xyz), gain = tiny_input(), torch.tensor([0.5, 3.0]).view(2, 1, 1)

    def one_too_much(signal, xyz, mask):
        return signal + 1, None
    loss = brainlm.pretraining_loss(one_too_much, signal, xyz, forward_mask(2, 4, 3), gain)
    assert loss.item() == pytest.approx((1 / 0.5 ** 2 + 1 / 3 ** 2) / 2, rel=1e-5)


# ------------------------------------------------------------------------------------------------------
# 7. Head


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
    assert years.shape == (3,)
    standard = (features - model.feature_mean) / model.feature_std
    torch.testing.assert_close(years, 63.0 + 7.5 * model.mlp(standard)[:, 0])
    assert sum(isinstance(module, torch.nn.Linear) for module in model.mlp) == 3
    loss = brainlm.regression_loss(model, signal, xyz, years + 7.5, target_std=7.5)
    assert loss.item() == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------
# 8. Training


def names_in(code):
    """The globals and attributes that compiled code and the functions in it name."""
    return set(code.co_names).union(*(names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def test_part_1_alone_in_a_notebook_cell_trains(tmp_path):
    make_sample_data(tmp_path, num_train=8, num_val=1, num_timepoints=120)
    *lines, ruler_of_part_2 = PART_I.splitlines()
    assert len(lines) <= 600 and max(map(len, lines)) <= 100
    lesson = types.ModuleType("lesson")                 # no file, and nothing of Part II
    exec(PART_I, lesson.__dict__)
    assert not names_in(compile(PART_I, "cell", "exec")) & (set(vars(brainlm)) - set(vars(lesson)))

    dataset = lesson.RecordingDataset(tmp_path / "train", RECORDING_COL)
    xyz, _ = lesson.read_coordinates(tmp_path / "coords")
    config = lesson.BrainLMConfig(num_timepoints_per_voxel=60, hidden_size=64, num_hidden_layers=2)
    training = lesson.TrainingConfig(forward_mask_prob=0.0)
    model = lesson.BrainLM(config)
    optimizers = lesson.make_optimizers(model, training.learning_rate, training.weight_decay)

    def batch_loss(model, samples, step):
        signal, mask, gain = lesson.pretraining_batch(dataset, config, training, samples, step)
        return lesson.pretraining_loss(model, signal, xyz, mask, gain)
    before = batch_loss(model, range(1000, 1010), step=0).item()
    for step, loss in lesson.train(model, optimizers, batch_loss, training, num_steps=20):
        print(step, loss)
    after = batch_loss(model, range(1000, 1010), step=0).item()

    assert step == 19 and after < 0.98 * before


# ------------------------------------------------------------------------------------------------------
# 9. The start


def test_the_untrained_model_is_a_smoother_that_already_explains_hidden_tokens(tmp_path):
    make_sample_data(tmp_path, num_train=2, num_val=1, num_timepoints=100)
    dataset = RecordingDataset(tmp_path / "train", RECORDING_COL)
    xyz, _ = brainlm.read_coordinates(tmp_path / "coords")
    signal, mask = dataset.batch([(0, 0), (1, 0)], 100), random_mask(2, 5, 424, 0.75)
    prediction = BrainLM(BrainLMConfig())(signal, xyz, mask)[0]
    assert scores(error_sums(prediction, signal, mask).sum(dim=1))["R2"] > 0.03


# ======================================================================================================
# Part II: the program
# ======================================================================================================

# Commands run on tiny data, in this process or, to be killed or in pairs, in processes of their own.
V, T, P = 6, 12, 4                                      # parcels, window, patch
MODEL = ("--num_timepoints_per_voxel 12 --timepoint_patching_size 4 --hidden_size 8 --num_hidden_layers 2 "
         "--num_attention_heads 2 --hidden_dropout_prob 0.1")
TRAINING = ("--max_steps 6 --save_steps 2 --logging_steps 3 --eval_steps 3 --gradient_accumulation_steps 2 "
            "--dtype float32 --device cpu")
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
        ages = [50.0 + i for i in range(rows)]
        write_dataset(folder / split, {"R": recordings, "Age": ages}, num_shards=2)
    xyz = {axis: list(rng.normal(size=V) * 40) for axis in "XYZ"}
    write_dataset(folder / "coords", {**xyz, "Network": ["Visual", "Default"] * 3})
    BrainLM(BrainLMConfig(T, P, 8, 2, 2)).save_pretrained(folder / "pretrained")
    return folder


def words(command, data, run, *more):
    """A command line on tiny data; what comes later overrides what came before."""
    line = [command, *(f"--{name}_dataset_path={data / name}" for name in ("train", "val", "coords"))]
    line += ["--recording_col_name=R", "--device=cpu", "--dtype=float32"]
    line += [f"--model_name_or_path={data / 'pretrained'}"] if command != "pretrain" else MODEL.split()
    line += [f"--output_dir={run}", *TRAINING.split()] if command != "evaluate" else []
    line += ["--variable_of_interest_col_name=Age"] if command == "finetune" else []
    return line + [str(word) for word in more]


def python(*line, **options):
    """Run python in a process of its own."""
    return subprocess.run([sys.executable, *line], capture_output=True, text=True, **options)


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


def start(line, environment={}, **trouble):
    """Run a command in a process of its own, what it prints going to process.log; trouble: of in_process."""
    log = tempfile.mkstemp(suffix=".log")[1]
    process = processes.Process(target=in_process, args=(line, log, environment), kwargs=trouble, daemon=True)
    process.start()
    process.log = Path(log)
    return process


def in_process(line, log, environment, kill_at=None, number=signals.SIGKILL, largest_file=None,
               full=signals.SIG_IGN):
    """kill_at: it gets the signal `number` when it is about to do this file operation in its run folder.
    largest_file: bytes; writing more fails as on a full disk or, with full=SIG_DFL, kills it in mid-write."""
    for stream in 1, 2:
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    os.environ |= environment
    torch.set_num_threads(1)
    if largest_file:
        signals.signal(signals.SIGXFSZ, full)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    seen = []

    def watch(event, arguments):        # Python reports every file that it is about to open, rename or remove
        on_file = event in ("open", "os.rename", "os.remove")
        if on_file and f"--output_dir={Path(str(arguments[0])).parent}" in line:
            seen.append(event)
            if len(seen) - 1 == kill_at:
                os.kill(os.getpid(), number)
    if kill_at is not None:
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


def assert_loadable(folder):
    """From the first model on, there is one at any instant; before that there is none."""
    if (folder / "pytorch_model.bin").exists():
        load(folder)


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


# ------------------------------------------------------------------------------------------------------
# 10. Refusing broken input

TENSORS = BrainLM(BrainLMConfig(T, P, 8, 2, 2)).state_dict()
GOOD = numbers().tolist()


def files(**contents):
    """A folder of these files, as a list of pairs (name, bytes)."""
    return [(re.sub("_(json|bin)$", r".\1", name), content) for name, content in contents.items()]


def stream(**columns):
    """The bytes of an Arrow stream, with anything in it, right or wrong."""
    table, file = pa.table(columns), io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def dataset(*shards, **columns):
    """A dataset folder of these shards or of one with these columns."""
    shards = dict(enumerate(shards or [stream(**columns)]))
    entries = [{"filename": f"shard_{i}"} for i in shards]
    return files(state_json=json.dumps({"_data_files": entries}).encode(),
                 **{f"shard_{i}": content for i, content in shards.items()})


def coordinates(**axes):
    return dataset(**{axis: axes.get(axis, [1.0] * V) for axis in "XYZ"})


def checkpoint(tensors=TENSORS, **settings):
    file = io.BytesIO()
    torch.save(tensors, file)
    settings = dataclasses.asdict(BrainLMConfig(T, P, 8, 2, 2)) | settings
    return files(config_json=json.dumps(settings).encode(), pytorch_model_bin=file.getvalue())


def write_files(folder, contents):
    folder.mkdir()
    for name, content in contents:
        (folder / name).write_bytes(content)


def with_row_7(row):
    return GOOD[:7] + [row] + GOOD[8:]


SOUND = stream(R=[GOOD] * 2, Age=[1.0, 2.0])
WEIGHTS = checkpoint()[1][1]
FAULTS = {  # flag: {what: (the files of a folder that it names, what the error says besides the folder)}
    "train_dataset_path": {
        "no folder": (None, "no such folder"),
        "an empty folder": (files(), "no state.json"),
        "several datasets": (files(dataset_dict_json=b"{}"), "several datasets, name one of them"),
        "no column": (dataset(Recording=[GOOD], Age=[3.0]), "no column 'R' (there are Recording, Age)"),
        "no rows": (dataset(R=[]), "no rows"),
        "shard missing": (dataset(SOUND, SOUND)[:-1], "shard_1 is missing"),
        "shard empty": (dataset(SOUND, b""), "shard_1 ... truncated"),
        "shard of 3 bytes": (dataset(SOUND, SOUND[:3]), "shard_1 ... truncated"),
        "shard cut in a batch": (dataset(SOUND, SOUND[:999]), "shard_1 ... truncated"),
        "shard cut between batches": (dataset(SOUND, SOUND[:-8]), "shard_1 ... truncated"),
        "shard of text": (dataset(SOUND, b"text" + SOUND[-8:]), "shard_1 ... truncated"),
        "shards that differ": (dataset(SOUND, stream(R=[GOOD], b=[1])), ""),
        "state.json cut": (files(state_json=b'{"_data_files": [{"file'), "state.json"),
        "state.json a list": (files(state_json=b"[]"), "state.json"),
        "state.json without files": (files(state_json=b"{}"), "state.json"),
        "state.json names no names": (files(state_json=b'{"_data_files": [1]}'), "state.json"),
        "saved with indices": (files(state_json=b'{"_data_files": [], "_indices_data_files": [1]}'), "index"),
        "recording missing": (dataset(R=[GOOD, None]), "'R': row 1 is missing"),
        "no lists": (dataset(R=["1 2 3"]), "'R' ... string ... two-dimensional"),
        "one-dimensional": (dataset(R=[[0.0] * 20]), "'R' ... two-dimensional"),
        "booleans": (dataset(R=[[[True] * V] * 20]), "'R' ... bool ... numbers"),
        "timepoint missing": (dataset(R=[GOOD, with_row_7(None)]), "row 1, timepoint 7 is missing"),
        "timepoint missing, of fixed size": (           # its slot holds numbers, which mean nothing
            dataset(R=pa.array([with_row_7(None)], pa.list_(pa.list_(pa.float64(), V)))),
            "row 0, timepoint 7 is missing"),
        "other atlas": (dataset(R=[numbers(20, 5).tolist()]), "row 0 ... 5 parcels, expected 6 ... atlas"),
        "ragged": (dataset(R=[GOOD, with_row_7([0.0] * 4)]), "row 1, timepoint 7 has 4 parcels ... ragged"),
        "no timepoints": (dataset(R=[GOOD, []]), "row 1 has 0 timepoints"),
        "no parcels": (dataset(R=pa.array([[[]] * 20], pa.list_(pa.list_(pa.float32())))), "row 0"),
        "NaN": (dataset(R=[with_row_7([1.0, 1.0, math.nan] * 2)]), "row 0, timepoint 7, parcel 2 is nan"),
        "None among integers": (dataset(R=[[[1, 2, 3, 4, 5, None]] * 20]), "row 0, timepoint 0, parcel 5"),
        "too large for float32": (dataset(R=[with_row_7([1e300] * V)]), "timepoint 7, parcel 0 is 1e+300"),
        "target of text": (dataset(R=[GOOD] * 2, Age=["old", "young"]), "'Age' is not numeric but string"),
        "constant target": (dataset(R=[GOOD] * 3, Age=[0.1] * 3), "'Age' is 0.1 ... in every row"),
        "target too large": (dataset(R=[GOOD] * 2, Age=[50.0, -1e300]), "'Age' is infinite in row 1")},
    "val_dataset_path": {
        "transposed": (dataset(R=[GOOD, numbers(V, 20).tolist()]), "row 1 ... 20 parcels ... transposed?"),
        "too short": (dataset(R=[GOOD, GOOD[:11]]), "row 1 has 11 timepoints ... window of 12"),
        "infinity late": (dataset(R=[GOOD, GOOD + [[math.inf] * V]]), "row 1, timepoint 20, parcel 0 is inf"),
        "no target": (dataset(R=[GOOD] * 2, Age=[math.nan, None]), "'Age' is missing in every row")},
    "coords_dataset_path": {
        "coordinate None": (coordinates(X=[1.0] * 5 + [None]), "coordinate X of row (parcel) 5"),
        "coordinate too large": (coordinates(Z=[1.0] * 5 + [1e300]), "coordinate Z of row (parcel) 5"),
        "coordinates of text": (coordinates(Y=["1.0"] * V), "'Y' is not numeric but string")},
    "model_name_or_path": {
        "no checkpoint": (None, "no such"),
        "no config": (checkpoint()[1:], "config.json"),
        "config cut": (files(config_json=b'{"hidden'), "config.json"),
        "config a list": (files(config_json=b"[]"), "config.json"),
        "config of another model": (files(config_json=b"{}"), "config.json"),
        "config with a fraction for a count": (checkpoint(hidden_size=8.0), "hidden_size"),
        "config with an impossible number": (checkpoint(num_attention_heads=3), "num_attention_heads 3"),
        "no weights": (checkpoint()[:1], "pytorch_model.bin"),
        "weights cut": (checkpoint()[:1] + files(pytorch_model_bin=WEIGHTS[:999]), "truncated"),
        "weights are a list": (checkpoint(list(TENSORS.values())), "pytorch_model.bin"),
        "weights are numbered": (checkpoint(dict(enumerate(TENSORS.values()))), "do not fit"),
        "a weight is no tensor": (checkpoint(TENSORS | {"norm.bias": "text"}), "norm.bias"),
        "a weight too many": (checkpoint(TENSORS | {"extra.bias": torch.zeros(3)}), "extra.bias"),
        "weights of another shape": (checkpoint(hidden_size=16), "size mismatch")},
}
# A warning would be a second line on stderr. (A lock left to the garbage collector is one that nobody sees.)
LOUD = pytest.mark.filterwarnings("error", "ignore::ResourceWarning",
                                  "ignore::pytest.PytestUnraisableExceptionWarning")


@LOUD
@pytest.mark.parametrize("flag, what", [(flag, what) for flag, faults in FAULTS.items() for what in faults])
def test_broken_input_is_refused_in_one_line_that_names_it(data, tmp_path, flag, what):
    contents, told = FAULTS[flag][what]
    if contents is not None:
        write_files(tmp_path / "broken", contents)
    line = words("finetune", data, tmp_path / "run", f"--{flag}={tmp_path / 'broken'}")
    assert_refused(line, f"{tmp_path / 'broken'} ... {told}")
    assert not (tmp_path / "run").exists(), "before the first step"


@LOUD
@pytest.mark.parametrize("flags", [
    "--timepoint_patching_size 5", "--num_timepoints_per_voxel 3", "--timepoint_patching_size 0",
    "--hidden_size 10 --num_attention_heads 4", "--hidden_size -8", "--hidden_size 8.5", "--mask_ratio 0",
    "--mask_ratio 1.5", "--mask_ratio nan", "--mask_ratio 0.001", "--hidden_dropout_prob 1",
    "--attention_probs_dropout_prob -0.1", "--loss_fn huber", "--forward_mask_prob 2", "--learning_rate 0",
    "--learning_rate nan", "--learning_rate inf", "--learning_rate fast", "--weight_decay -1",
    "--warmup_ratio 2", "--max_steps 0", "--num_train_epochs 0", "--seed -1", "--seed 99999999999999999999",
    "--save_steps 0", "--per_device_train_batch_size 0", "--device tpu", "--dtype float64", "--depth 3"])
def test_broken_flags_are_refused_and_named_with_their_value(data, tmp_path, flags):
    told = flags.replace("--", "").replace(" ", " ... ")
    assert_refused(words("pretrain", data, tmp_path / "run", *flags.split()), told)
    assert not (tmp_path / "run").exists()


def test_the_program_exits_with_2_and_one_line_on_stderr(data, tmp_path):
    for line in [], ["train"], words("pretrain", data, tmp_path, "--mask_ratio", 0):
        done = python(REPOSITORY / "brainlm.py", *line)
        assert done.returncode == 2 and done.stdout == "" and re.fullmatch("error: .*\n", done.stderr)


# ------------------------------------------------------------------------------------------------------
# 11. Checkpoints and the Hugging Face Hub


def test_a_file_is_replaced_not_written_over(tmp_path):
    """Who has the old one open, or mapped, still reads the old one to its end."""
    path = tmp_path / "file"
    for content in (b"old", b"new"):
        before = path.open("rb") if path.exists() else None
        brainlm.write_atomically(path, lambda file: file.write(content))
    assert (before.read(), path.read_bytes(), list(tmp_path.iterdir())) == (b"old", b"new", [path])


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
    assert not (tmp_path / "model.safetensors").exists()
    backbone.save_pretrained(tmp_path)
    assert same_outputs(BrainLM.from_pretrained(tmp_path), backbone, *inputs)
    with pytest.raises(BadInput, match="do not fit BrainLMRegressor"):
        BrainLMRegressor.from_pretrained(tmp_path)


def test_importing_brainlm_imports_no_transformers():
    optional = "{'transformers', 'datasets', 'huggingface_hub'}"
    code = f"import brainlm, sys; sys.exit(bool({optional} & {{*sys.modules}}))"
    assert python("-c", code, cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_run_folder_goes_to_the_hub_and_back_bit_for_bit(uninterrupted, tmp_path, command):
    transformers = pytest.importorskip("transformers")
    folder, inputs = uninterrupted[command], tiny_input(B=2, T=T, V=V)
    if command == "pretrain":
        inputs += (random_mask(2, T // P, V, 0.75),)

    def from_hub(folder, **more):
        auto = transformers.AutoModelForPreTraining
        return auto.from_pretrained(folder, trust_remote_code=True, **more)
    ours, theirs = load(folder), from_hub(folder)
    assert not theirs.training and same_outputs(theirs, ours, *inputs)
    theirs.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= {"model.safetensors", "brainlm.py"}
    again = type(ours).from_pretrained(tmp_path / "saved")
    assert same_outputs(from_hub(tmp_path / "saved"), ours, *inputs)
    assert same_outputs(again, ours, *inputs) and again.config == ours.config
    again.save_pretrained(tmp_path / "back")
    assert same_outputs(load(tmp_path / "back"), ours, *inputs)
    if command == "finetune":
        assert same_outputs(BrainLM.from_pretrained(tmp_path / "saved"), ours.backbone, *inputs)
    else:
        half = from_hub(folder, dtype=torch.bfloat16)
        torch.testing.assert_close(half(*inputs)[0].float(), ours(*inputs)[0], rtol=0.1, atol=0.1)


def test_the_hubs_configuration_is_ours(uninterrupted):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.from_pretrained(uninterrupted["pretrain"], trust_remote_code=True)
    of_run = load(uninterrupted["pretrain"]).config
    for hub, ours in (theirs, of_run), (type(theirs)(hidden_size=256), BrainLMConfig(hidden_size=256)):
        assert {name: getattr(hub, name) for name in vars(ours)} == vars(ours)


def test_a_name_that_the_hub_does_not_give_is_refused_in_one_line(data, tmp_path):
    pytest.importorskip("huggingface_hub")
    line = words("finetune", data, tmp_path / "run", "--model_name_or_path=nobody/nothing")
    assert_refused(line, "nobody/nothing")


def test_pasted_into_a_notebook_the_file_neither_parses_the_kernels_arguments_nor_needs_a_file(tmp_path):
    code = f"""
import sys, types
sys.argv = ["ipykernel_launcher.py", "-f", "kernel.json"]
sys.modules["__main__"] = notebook = types.ModuleType("__main__")
source = open({str(REPOSITORY / "brainlm.py")!r}).read()
for cell in source, source[source.index("# Part II: the program"):]:       # and Part II's cell once more
    exec(compile(cell, "<cell>", "exec"), notebook.__dict__)
model = notebook.BrainLM(notebook.BrainLMConfig(20, 5, 16)).eval()
model.save_pretrained({str(tmp_path)!r})
again = notebook.BrainLM.from_pretrained({str(tmp_path)!r})
inputs = notebook.torch.randn(1, 20, 3), notebook.torch.randn(3, 3)
assert notebook.torch.equal(model(*inputs)[0], again(*inputs)[0])
notebook.main(["pretrain"])"""
    done = python("-c", code, cwd=tmp_path)
    assert re.fullmatch("error: no sample_data.py beside .*\n", done.stderr), done.stderr
    assert done.returncode == 2


# ------------------------------------------------------------------------------------------------------
# 12. Evaluation, against the shortest numpy that says the same


def test_fixed_windows_reach_the_end_of_every_recording(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data", lengths=(40, 33, 52, 20))
    assert brainlm.fixed_windows(dataset, range(4), 20, spacing=20) == [
        (0, 0), (0, 20), (1, 0), (1, 13), (2, 0), (2, 20), (2, 32), (3, 0)]
    assert brainlm.fixed_windows(dataset, [1], 20, spacing=5) == [(1, 0), (1, 5), (1, 10), (1, 13)]


def test_scores_are_numpys_on_hidden_tokens_at_each_horizon_and_over_all_and_never_clipped():
    (signal, _), (noise, _) = tiny_input(seed=0), tiny_input(seed=1)
    for mask in forward_mask(2, 4, 3), random_mask(2, 4, 3, 0.5):
        for prediction in (signal + 0.3 * noise, 5 + noise):
            sums = error_sums(prediction, signal, mask)
            x, y = (patchify(values, 5)[mask].double().numpy() for values in (prediction, signal))
            columns = [(sums.sum(dim=1), x, y)] + [(sums[:, i], x[:, i], y[:, i]) for i in range(5)]
            for sums, x, y in columns:
                assert scores(sums) == pytest.approx({
                    "R2": 1 - np.sum((x - y) ** 2) / np.sum((y - y.mean()) ** 2),
                    "MSE": np.mean((x - y) ** 2), "MAE": np.mean(abs(x - y))})
        assert scores(sums)["R2"] < -1
    constant = error_sums(noise, torch.ones(2, 20, 3), mask).sum(dim=1)
    assert scores(constant)["R2"] == -math.inf, "no variance to explain"


def test_two_evaluations_hide_the_same_tokens_whatever_the_batch_size(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data")
    windows, seen = brainlm.fixed_windows(dataset, range(3), 20, spacing=20), []

    def predict(signal, mask, ridge):
        seen.extend(mask)
        return torch.zeros_like(signal)
    sums = [brainlm.score_reconstruction(predict, None, dataset, windows, tiny_config(), False, batch_size)
            for batch_size in (1, 3)]
    first, second = torch.stack(seen).chunk(2)
    assert torch.equal(first, second) and not torch.equal(first[0], first[1])
    torch.testing.assert_close(*sums)


def test_regression_scores_are_numpys():
    rng = np.random.default_rng(0)
    target = rng.normal(60, 8, 30)
    prediction = target + rng.normal(3, 12, 30)
    error = prediction - target
    assert brainlm.regression_scores(prediction, target) == pytest.approx({
        "MAE": np.mean(abs(error)), "MSE": np.mean(error ** 2),
        "R2": 1 - np.mean(error ** 2) / np.var(target), "r": np.corrcoef(prediction, target)[0, 1]})


def test_gaussian_conditional_mean(tmp_path):
    V, ridge = 5, 0.1
    dataset, recordings = tiny_dataset(tmp_path / "data", V=V)
    signal, mask = dataset.batch([(0, 0), (1, 5)], 20), random_mask(2, 4, V, 0.5)
    mask[0, 0], mask[0, 1] = True, False                # all hidden, none hidden
    prediction = brainlm.gaussian_conditional(dataset)(signal, mask, ridge)

    timepoints = np.concatenate(recordings).astype(float)
    mean, covariance = timepoints.mean(axis=0), np.cov(timepoints.T, bias=True)
    regular = covariance + ridge * np.diag(covariance).mean() * np.eye(V)
    for b, t in np.ndindex(2, 20):
        x, hidden, expected = signal[b, t].numpy(), mask[b, t // 5].numpy(), signal[b, t].numpy().copy()
        weights = covariance[hidden][:, ~hidden] @ np.linalg.inv(regular[~hidden][:, ~hidden])
        expected[hidden] = mean[hidden] + weights @ (x - mean)[~hidden]
        np.testing.assert_allclose(prediction[b, t], expected, rtol=1e-4, atol=1e-5)


def ridge_weights(inputs, outputs, ridge):
    """Weights, and last a constant that is not penalised; the penalty is relative to the inputs' variance."""
    inputs, outputs = np.array(inputs, dtype=float), np.array(outputs, dtype=float)
    penalty = ridge * inputs.var(axis=0).mean() * len(inputs)
    design = np.column_stack([inputs, np.ones(len(inputs))])
    penalties = np.diag([penalty] * inputs.shape[1] + [0.0])
    return np.linalg.inv(design.T @ design + penalties) @ design.T @ outputs


def test_forecasting_baselines(tmp_path):
    P, ridge = 4, 0.03
    dataset, recordings = tiny_dataset(tmp_path / "data")
    signal, mask, predictions = dataset.batch([(0, 0), (1, 3)], 20), forward_mask(2, 5, 3), {}
    for name, predict in brainlm.forecasting_baselines(dataset, P).items():
        prediction = predict(signal, mask, ridge)
        assert torch.equal(prediction[:, :-P], signal[:, :-P])
        predictions[name] = prediction[:, -P:]

    assert torch.equal(predictions["persistence"], signal[:, -P - 1:-P].expand(-1, P, -1)), "the last value"

    past, future = [], []                               # ridge: a parcel's last patch to its next
    for x in recordings:
        for t in range(len(x) - 2 * P + 1):
            past.extend(x[t:t + P].T)
            future.extend(x[t + P:t + 2 * P].T)
    weights = ridge_weights(past, future, ridge)
    for b, v in np.ndindex(2, 3):
        np.testing.assert_allclose(predictions["ridge autoregression"][b, :, v],
                                   [*signal[b, -2 * P:-P, v], 1.0] @ weights, rtol=1e-4, atol=1e-5)

    lags = [[*x[t - 1], *x[t - 2]] for x in recordings for t in range(2, len(x))]
    weights = ridge_weights(lags, [x[t] for x in recordings for t in range(2, len(x))], ridge)
    expected = signal.numpy().astype(float)
    for b, t in np.ndindex(2, P):                       # the last two timepoints of all parcels, iterated
        t += 20 - P
        expected[b, t] = [*expected[b, t - 1], *expected[b, t - 2], 1.0] @ weights
    np.testing.assert_allclose(predictions["2-lag vector autoregression"], expected[:, -P:], rtol=1e-4,
                               atol=1e-5)


def baselines(dataset, P):
    """[(name, predict, a mask that it is made for), ...]"""
    forecasting = brainlm.forecasting_baselines(dataset, P).items()
    mask = random_mask(2, 20 // P, 3, 0.5, torch.Generator().manual_seed(0))
    return [(name, predict, forward_mask(2, 20 // P, 3)) for name, predict in forecasting] + [
        ("Gaussian conditional mean", brainlm.gaussian_conditional(dataset), mask)]


def test_an_offset_of_the_signal_cripples_no_baseline_and_none_sees_what_is_hidden(tmp_path):
    """The intercept is not penalised: what is predicted of x + 10 is 10 more than what is predicted of x."""
    dataset, recordings = tiny_dataset(tmp_path / "data")
    write_dataset(tmp_path / "shifted", {"Recording": [recording + 10 for recording in recordings]})
    shifted, signal = RecordingDataset(tmp_path / "shifted", "Recording"), dataset.batch([(0, 0), (1, 3)], 20)
    for (name, predict, mask), (_, predict_shifted, _) in zip(baselines(dataset, 4), baselines(shifted, 4)):
        expected, hidden = predict(signal, mask, 0.1), mask.repeat_interleave(4, dim=1)
        far = predict_shifted(signal + 10, mask, 0.1)
        torch.testing.assert_close(far, expected + 10, rtol=1e-4, atol=1e-4)
        blind = predict(signal.masked_fill(hidden, math.nan), mask, 0.1)
        assert torch.equal(blind[hidden], expected[hidden]), name


def test_tables_stand_in_the_order_of_each_methods_best_ridge(tmp_path):
    dataset, _ = tiny_dataset(tmp_path / "data", lengths=(60, 70, 80))
    windows, (_, xyz), best = [(0, 0), (1, 0)], tiny_input(), {"BrainLM": math.inf}
    for name, predict, _ in baselines(dataset, 5):
        task = dataset, windows, tiny_config(), name != "Gaussian conditional mean", 8
        sums = [brainlm.score_reconstruction(predict, ridge, *task) for ridge in brainlm.RIDGES]
        best[name] = max(scores(of_ridge.sum(dim=1))["R2"] for of_ridge in sums)
    tables = brainlm.evaluate_reconstruction(tiny_model(), xyz, torch.device("cpu"), torch.float32, dataset,
                                             dataset, windows, 8)
    for table in tables.values():
        assert len(table) > 1 and list(table) == sorted(table, key=best.get, reverse=True)
        assert all(row["R2"] == best[name] for name, row in table.items() if name != "BrainLM")


def test_connectivity_ridge_finds_a_target_that_is_written_in_the_connectivity(tmp_path):
    rng, V = np.random.default_rng(0), 6

    def people(folder, number):
        coupling = rng.uniform(0.1, 0.9, number)        # between parcels 0 and 1; the target is made of it
        recordings = [rng.standard_normal((300, V)) for _ in coupling]
        for recording, c in zip(recordings, coupling):
            recording[:, 1] = c * recording[:, 0] + (1 - c ** 2) ** 0.5 * recording[:, 1]
        write_dataset(folder, {"Recording": recordings})
        return RecordingDataset(folder, "Recording"), 60 + 20 * coupling
    (train_set, target), (val_set, val_target) = people(tmp_path / "train", 40), people(tmp_path / "val", 20)
    rows, val_rows = np.arange(40), np.arange(20)
    prediction = brainlm.connectivity_ridge(train_set, rows, target, val_set, val_rows)
    assert brainlm.regression_scores(prediction, val_target)["R2"] > 0.9
    noise = brainlm.connectivity_ridge(train_set, rows, rng.normal(60, 5, 40), val_set, val_rows)
    assert noise.std() < 2.5 and abs(noise.mean() - 60) < 2.5, "nothing to find: near the training mean"


def test_nearest_neighbours_leave_the_parcel_itself_out():
    x = np.array([0, 1, 2, 50, 51, 52])
    distance = np.abs(x[:, None] - x).astype(float)
    assert brainlm.knn_accuracy(distance, list("aaabbb"), k=2) == 1
    assert brainlm.knn_accuracy(distance, list("abcdef"), k=1) == 0
    assert brainlm.knn_accuracy(distance[:3, :3], list("baa"), k=5) == 1 / 3, "even with fewer others than k"


def test_attention_weights_sum_to_one_respect_the_mask_and_are_those_of_training():
    model, (signal, xyz) = tiny_model(), tiny_input(V=3)
    x, position = model.tokens(signal, xyz)
    for i, layer in enumerate(model.layers):
        weights = model.attention(signal, xyz, i)
        assert weights.shape == (2, 2, 13, 13)
        torch.testing.assert_close(weights.sum(dim=3), torch.ones(2, 2, 13))
        assert not weights[~block_causal_mask(4, 3).expand_as(weights)].any()
        q, k, v = layer.queries_keys_values(x, position)
        torch.testing.assert_close(weights @ v, brainlm.plain_attention(q, k, v, 3))
        x = layer(x, position, 3)


# ------------------------------------------------------------------------------------------------------
# 13. Devices: the kernel for bfloat16 on CPUs, and many processes


@SHAPES
def test_the_kernel_for_bfloat16_is_masked_attention(N, V):
    """Outputs and gradients; its formulas in float64, where they can be held to the last digits."""
    def kernel(q, k, v, V):
        q, k, v = ((tensor * factor).flatten(0, 1) for tensor, factor in ((q, 8 ** -0.5), (k, 1), (v, 1)))
        return brainlm.CPUAttention.apply(q, k, v, V).unflatten(0, (2, 2))
    qkv = torch.randn(3, 2, 2, 1 + N * V, 8, dtype=torch.float64, requires_grad=True).unbind()
    exact = output_and_gradients(masked_attention, qkv, V)
    torch.testing.assert_close(output_and_gradients(kernel, qkv, V), exact, rtol=1e-12, atol=1e-12)
    rounded = brainlm.block_causal_attention(*(tensor.bfloat16() for tensor in qkv), V)
    torch.testing.assert_close(rounded, exact[0].bfloat16(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("scale, tolerance", [(10, 0.04), (100, None), (1000, None)])
def test_the_kernel_does_not_round_large_scores_and_stays_finite_at_huge_ones(scale, tolerance):
    """Trained models have scores of 60, where bfloat16 knows only quarters: weights would be wrong by a
    tenth. Scores of 40,000 and of millions are rounded, but overflow nothing."""
    qkv = torch.randn(3, 1, 2, 1 + 4 * 50, 32)
    qkv[0] *= scale
    qkv[1] *= 1 if tolerance else scale
    qkv = qkv.bfloat16().requires_grad_().unbind()
    results = output_and_gradients(brainlm.block_causal_attention, qkv, V=50)
    assert all(result.isfinite().all() for result in results)
    if tolerance:
        exact = output_and_gradients(masked_attention, [tensor.double() for tensor in qkv], V=50)
        for rounded, truth in zip(results, exact):
            assert (rounded.double() - truth).norm() < tolerance * truth.norm()


def test_gradient_checkpointing_changes_no_value():
    model, (signal, xyz) = tiny_model().train(), tiny_input()
    mask, results = random_mask(2, 4, 3, 0.5), []
    for change in (lambda model: None, brainlm.recompute_layers):
        change(model)
        prediction, hidden = model(signal, xyz, mask)
        loss = reconstruction_loss(prediction, signal, mask) + hidden.square().mean()
        results.append((prediction, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(map(torch.equal, *results)) and all(gradient.any() for gradient in results[0])


@pytest.mark.parametrize("units, name", [
    ({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"),
    ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, "float32"),          # no AMX: slower than float32
    ({"avx512_bf16": False, "avx2": True}, "float32"), ({}, "float32")])
def test_auto_dtype_is_what_the_processor_has_and_a_resumed_run_keeps_its_own(
        data, tmp_path, monkeypatch, units, name):
    elsewhere = {"avx512_bf16": name == "float32"}      # a processor of the other kind
    for steps, found, dtype in (1, units, "auto"), (2, elsewhere, "auto"), (3, elsewhere, "float32"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        run_here(words("pretrain", data, tmp_path, "--dtype", dtype, "--max_steps", steps))
        assert state(tmp_path)["dtype"] == (name if dtype == "auto" else dtype)


def start_two(line, line_of_other=None, **of_first):
    """What torchrun --nproc_per_node=2 does, without its start-up time."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
    return [start(line, world | {"RANK": "0", "LOCAL_RANK": "0"}, **of_first),
            start(line_of_other or line, world | {"RANK": "1", "LOCAL_RANK": "1"})]


def assert_same_but_for_rounding(folder, expected):
    values, others = (re.findall(r"-?\d+\.\d+(?:e-?\d+)?", json.dumps(metrics(run), sort_keys=True))
                      for run in (folder, expected))
    assert [*map(float, values)] == pytest.approx([*map(float, others)], rel=2e-3, abs=1e-4)  # Muon: bfloat16
    others = load(expected).state_dict()
    for name, value in load(folder).state_dict().items():
        start = 16 if name.endswith("qkv.bias") else 0      # what adds to all keys changes no softmax: noise
        value, other = value.reshape(-1)[start:], others[name].reshape(-1)[start:]
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-3, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("command, more", [("pretrain", "--hidden_dropout_prob=0"), ("finetune", "--seed=0"),
                                           ("finetune", "--freeze_backbone")])
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
    for kill_at in IN_SAVE_2, IN_SAVE_2:
        first, second = start_two(words("pretrain", data, run, more), elsewhere, kill_at=kill_at)
        ended(first, -signals.SIGKILL)
        second.kill()
        second.join()
        assert_loadable(run)
    shutil.copytree(run, tmp_path / "as_one")
    step = state(run)["step"]
    assert 0 < step < 6
    assert f"after step {step} of" in run_here(words("pretrain", data, tmp_path / "as_one", more, one))
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
            "--timepoint_patching_size 100 --hidden_size 8 --num_hidden_layers 1 --logging_steps 1")
    environment, pipe = os.environ | {"OMP_NUM_THREADS": "1"}, subprocess.PIPE
    torchrun = subprocess.Popen([sys.executable, *line.split()], cwd=tmp_path, env=environment, text=True,
                                stdout=pipe, stderr=pipe)
    printed = []
    while not printed or not printed[-1].startswith("step "):
        printed.append(torchrun.stdout.readline())
        assert printed[-1], torchrun.stderr.read()
    torchrun.send_signal(signals.SIGINT)
    torchrun.communicate(timeout=60)
    for start_of_line in "no ./sample_data", "wrote ./sample_data", "data:", "model:":
        assert len([line for line in printed if line.startswith(start_of_line)]) == 1, printed
    assert state(tmp_path / "runs/pretrain")["step"] == 0


# ------------------------------------------------------------------------------------------------------
# 14. The run folder: the same bits wherever a run is restarted, and nobody's files lost


@pytest.mark.parametrize("command, step", [("pretrain", 3), ("finetune", 5)])
def test_a_run_killed_before_any_of_its_file_operations_resumes_to_the_same_bits(
        data, uninterrupted, tmp_path, command, step):
    last, codes = 0, []
    while last == 0 or codes[-1] != 0:                  # two at a time, until one is not killed any more
        runs = [tmp_path / str(kill_at) for kill_at in (last, last + step)]
        for process in [start(words(command, data, run), kill_at=int(run.name)) for run in runs]:
            process.join(60)
            codes.append(process.exitcode)
        for run in runs:
            assert_loadable(run)
        for process in [start(words(command, data, run)) for run in runs]:
            ended(process)
        for run in runs:
            assert_same_run(run, uninterrupted[command])
        last += 2 * step
    assert len(codes) * step > 30 and set(codes) == {0, -signals.SIGKILL}


@pytest.mark.parametrize("written", [1000, 20_000])
@pytest.mark.parametrize("full, code", [(signals.SIG_DFL, -signals.SIGXFSZ), (signals.SIG_IGN, 2)],
                         ids=["killed while it writes", "disk full"])
def test_a_run_that_cannot_write_a_file_to_its_end_resumes_to_the_same_bits(
        data, uninterrupted, tmp_path, written, full, code):
    run = tmp_path / "run"
    ended(start(words("pretrain", data, run), kill_at=IN_SAVE_2), -signals.SIGKILL)
    before = (run / "pytorch_model.bin").read_bytes(), state(run)["step"]
    printed = ended(start(words("pretrain", data, run), largest_file=written, full=full), code)
    assert ((run / "pytorch_model.bin").read_bytes(), state(run)["step"]) == before
    assert_loadable(run)
    if code == 2:
        assert len(re.findall("^error: could not write .*intact$", printed, re.MULTILINE)) == 1
        assert "Traceback" not in printed
    else:
        assert written in [file.stat().st_size for file in run.glob(".*.part")]
    run_here(words("pretrain", data, run))
    assert_same_run(run, uninterrupted["pretrain"])


@pytest.mark.parametrize("number, code", [(signals.SIGINT, 130), (signals.SIGTERM, -signals.SIGTERM)])
def test_ctrl_c_and_sigterm_stop_at_once_and_keep_the_last_checkpoint(
        data, uninterrupted, tmp_path, number, code):
    run = tmp_path / "run"
    printed = ended(start(words("pretrain", data, run), kill_at=IN_SAVE_2, number=number), code)
    assert "Traceback" not in printed and (number != signals.SIGINT or "goes on from it" in printed)
    step = state(run)["step"]
    assert f"resuming {run} after step {step} of 6" in run_here(words("pretrain", data, run))
    assert_same_run(run, uninterrupted["pretrain"])


def test_a_second_process_on_the_same_folder_is_refused(data, tmp_path, monkeypatch):
    def log(self, **metrics):                           # in the midst of training
        assert f"error: {tmp_path} is in use" in ended(start(words("pretrain", data, tmp_path)), 2)
        refused.append(metrics)
    refused = []
    monkeypatch.setattr(brainlm.RunFolder, "log", log)
    run_here(words("pretrain", data, tmp_path, "--max_steps", 1))
    assert len(refused) == 1


def test_a_refused_command_lets_go_of_the_folder(data, run):
    assert_refused(words("pretrain", data, run, "--mask_ratio=0.5"), "mask_ratio")
    ended(start(words("pretrain", data, run)))


def test_a_file_system_without_locks_is_good_enough(data, tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", flock)
    run_here(words("pretrain", data, tmp_path / "run", "--max_steps", 1))


@pytest.mark.parametrize("name", [None, "config.json", "args.json", "metrics.jsonl", "pytorch_model.bin"])
def test_a_finished_run_started_again_changes_nothing_and_mends_its_files(data, uninterrupted, run, name):
    if name:
        (run / name).write_text("cut")
    run_here(words("pretrain", data, run))
    assert_same_run(run, uninterrupted["pretrain"])
    for other in {name} & {"config.json", "pytorch_model.bin"}:
        assert (run / other).read_bytes() == (uninterrupted["pretrain"] / other).read_bytes()


@pytest.mark.parametrize("line, told", [
    ("pretrain --hidden_size=16", "hidden_size 8 there and 16 now ... --overwrite_output_dir"),
    ("pretrain --num_hidden_layers=1", "num_hidden_layers 2 there and 1 now ... --overwrite_output_dir"),
    ("pretrain --mask_ratio=0.5", "mask_ratio 0.75 there and 0.5 now ... --overwrite_output_dir"),
    ("pretrain --loss_fn=mae", "loss_fn mse there and mae now ... --overwrite_output_dir"),
    ("finetune --model_name_or_path={pretrained}", "command pretrain there and finetune now"),
    ("pretrain --max_steps=5", "6 steps"),
    ("pretrain --model_name_or_path={pretrained} --hidden_size=16", "hidden_size 16 ... 8"),
    ("pretrain --model_name_or_path={run} --overwrite_output_dir", "choose another")])
def test_a_run_is_not_resumed_with_other_flags(data, uninterrupted, run, line, told):
    command, *flags = line.format(run=run, pretrained=data / "pretrained").split()
    assert_refused(words(command, data, run, *flags), told)
    assert_same_run(run, uninterrupted["pretrain"])


@pytest.mark.parametrize("what", ["empty", "cut", "of another version"])
def test_a_broken_training_state_is_not_resumed(data, run, what):
    content, other = (run / "training_state.pt").read_bytes(), io.BytesIO()
    torch.save({"step": 3}, other)
    content = {"empty": b"", "cut": content[:len(content) // 2], "of another version": other.getvalue()}[what]
    (run / "training_state.pt").write_bytes(content)
    assert_refused(words("pretrain", data, run), f"{run} ... --overwrite_output_dir")


def test_overwrite_output_dir_starts_anew_and_never_mixes_two_runs(data, uninterrupted, tmp_path):
    """Killed on the way, a folder holds the old model, none, or the new one: no new number on old weights."""
    expected = (uninterrupted["pretrain"] / "pytorch_model.bin").read_bytes()
    for kill_at in (*range(1, 16), 30):
        run = shutil.copytree(uninterrupted["pretrain"], tmp_path / str(kill_at))
        (run / "evaluation.json").write_text("{}")
        line = words("pretrain", data, run, "--overwrite_output_dir", "--mask_ratio", 0.5)
        ended(start(line, kill_at=kill_at), -signals.SIGKILL)
        if (run / "pytorch_model.bin").exists() and (run / "config.json").exists():
            old = (run / "pytorch_model.bin").read_bytes() == expected
            assert load(run).config.mask_ratio == (0.75 if old else 0.5)
        left = {path.name for path in run.iterdir()} & {*brainlm.RunFolder.FILES}
        assert "training_state.pt" in left or not left, "else the next start takes it for somebody else's"
    assert not old and not (run / "evaluation.json").exists() and not (run / "README.md").exists()
    run = shutil.copytree(uninterrupted["finetune"], tmp_path / "run")
    assert "resuming" not in run_here(words("pretrain", data, run, "--overwrite_output_dir"))
    assert_same_run(run, uninterrupted["pretrain"])


@pytest.mark.parametrize("name", ["README.md", "brainlm.py", "config.json"])
@pytest.mark.parametrize("more", [[], ["--overwrite_output_dir"]])
def test_files_of_others_are_not_overwritten(data, tmp_path, name, more):
    (tmp_path / name).write_text("mine")
    assert_refused(words("pretrain", data, tmp_path, *more), f"{tmp_path} ... {name} ... --output_dir")
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("place", ["{tmp}/file", "{tmp}/file/run", "/proc/run", "/proc/self"])
def test_an_output_folder_that_cannot_be_written_is_refused(data, tmp_path, place):
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("needs Linux")
    (tmp_path / "file").write_text("in the way")
    place = place.format(tmp=tmp_path)
    assert_refused(words("pretrain", data, place), place)


def test_a_resume_with_another_batch_size_goes_on_with_the_next_sample(data, tmp_path, monkeypatch):
    drawn, training_window = [], RecordingDataset.training_window
    monkeypatch.setattr(RecordingDataset, "training_window",
                        lambda self, n, *others: drawn.append(n) or training_window(self, n, *others))
    for steps, batch_size in (3, 2), (5, 4):
        run_here(words("pretrain", data, tmp_path, f"--max_steps={steps}",
                       f"--per_device_train_batch_size={batch_size}"))
    assert drawn == list(range(3 * 4 + 2 * 8)), "two batches make a step"


def test_the_loss_that_is_logged_is_the_mean_since_the_last_line_whatever_happened_between(data, tmp_path):
    def losses(run):
        return {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}
    run, every = tmp_path / "run", tmp_path / "every"
    run_here(words("pretrain", data, every, "--logging_steps", 1, "--eval_steps", 0))
    each = list(losses(every).values())
    ended(start(words("pretrain", data, run, "--eval_steps", 0), kill_at=IN_SAVE_4), -signals.SIGKILL)
    assert state(run)["step"] == 4 and len(each) == 6
    run_here(words("pretrain", data, run, "--logging_steps", 5, "--eval_steps", 0))
    assert losses(run) == pytest.approx({3: np.mean(each[:3]), 5: np.mean(each[3:5]), 6: each[5]})


@LOUD
@pytest.mark.parametrize("command, more", [
    ("pretrain", "--learning_rate=1e30"), ("finetune", "--learning_rate=1e30"),
    ("pretrain", "--train_dataset_path={tmp}/loud"), ("finetune", "--model_name_or_path={tmp}/nan")])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(data, tmp_path, command, more):
    write_dataset(tmp_path / "loud", {"R": [1e30 * numbers()] * 2})
    write_files(tmp_path / "nan", checkpoint(TENSORS | {"norm.bias": torch.full((8,), math.nan)}))
    more = ["--warmup_ratio=0", "--save_steps=1", more.format(tmp=tmp_path)]
    assert_refused(words(command, data, tmp_path / "run", *more), "step ")
    if "nan" not in more[-1]:
        signal, xyz = tiny_input(B=2, T=T, V=V)
        model = load(tmp_path / "run")
        assert all(value.isfinite().all() for value in (*model.state_dict().values(), model(signal, xyz)[0]))


# ------------------------------------------------------------------------------------------------------
# 15. Commands


def test_every_setting_is_a_flag_with_the_same_default():
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        brainlm.main(["pretrain", "--help"])
    flags = " ".join(printed.getvalue().split("options:")[1].split())
    told = dict(re.findall(r"--(\w+) [^-].*?\(default: (.*?)\)", flags))
    settings = vars(brainlm.command_line().parse_args(["pretrain"]))
    for option in fields(BrainLMConfig) + fields(TrainingConfig):
        assert told[option.name] == str(option.default)
        assert settings.get(option.name, option.default) == option.default


def test_pretrain_leaves_a_complete_run_folder_and_reports_its_progress_and_its_opponents(uninterrupted):
    run = uninterrupted["pretrain"]
    assert {path.name for path in run.iterdir()} >= {
        "config.json", "pytorch_model.bin", "brainlm.py", "training_state.pt", "metrics.jsonl", "args.json"}
    assert json.loads((run / "config.json").read_text())["timepoint_patching_size"] == P
    assert (run / "brainlm.py").read_text() == SOURCE
    *lines, last = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == [3, 6]
    assert [line["step"] for line in lines if "masked_R2" in line] == [3]
    masked, forecasting = last["tables"].values()
    assert set(masked) == {"BrainLM", "Gaussian conditional mean"}
    assert set(forecasting) == {"BrainLM", "persistence", "ridge autoregression",
                                "2-lag vector autoregression"}
    assert {"R2", "MSE", "MAE", "R2 at 1", "R2 at 3"} <= set(forecasting["BrainLM"])
    printed = (run.parent / "printed").read_text()
    assert all(text in printed for text in ("step 6/6  loss", "samples/s", *masked, *forecasting))


def test_finetune_takes_another_atlas_than_pretraining_and_leaves_out_rows_without_a_target(data, tmp_path):
    for split in "train", "val":
        recordings = [numbers(columns=5, seed=i) for i in range(5)]
        write_dataset(tmp_path / split, {"R": recordings, "Age": [50.0, None, math.nan, 60.0, 61.0]})
    write_dataset(tmp_path / "coords", {axis: [1.0, 2.0, 3.0, 4.0, 5.0] for axis in "XYZ"})
    given = f"--model_name_or_path={data / 'pretrained'}"
    printed = run_here(words("finetune", tmp_path, tmp_path / "run", given))
    table, = metrics(tmp_path / "run")[-1]["tables"].values()
    assert set(table) == {"BrainLM", "training mean", "ridge on functional connectivity"}
    assert set(table["BrainLM"]) == {"MAE", "MSE", "R2", "r"}
    assert all(text in printed for text in ("2 of 5 recordings have no Age", *table))
    model, (signal, xyz) = load(tmp_path / "run"), tiny_input(B=1, T=T, V=5)
    assert model.target_mean.item() == pytest.approx(57.0) and 40 < model(signal, xyz).item() < 75


def test_evaluate_sets_the_model_beside_the_baselines_in_two_processes_as_in_one(data, tmp_path):
    one, two = (shutil.copytree(data / "pretrained", tmp_path / name) for name in ("one", "two"))
    first, second = start_two(words("evaluate", data, None, f"--model_name_or_path={two}"))
    printed = run_here(words("evaluate", data, None, f"--model_name_or_path={one}"))
    assert all(text in ended(first) for text in printed.splitlines()[:1]) and ended(second) == ""
    tables, of_two = (json.loads((folder / "evaluation.json").read_text())["tables"] for folder in (one, two))
    masked, forecasting, networks = tables.values()
    assert set(networks) == {"BrainLM embedding", "coordinates", "functional connectivity profile"}
    assert all(name in printed for name in (*masked, *forecasting, *networks))
    for title, table in tables.items():
        for method, row in table.items():
            assert of_two[title][method] == pytest.approx(row, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("V, recording", [(1, numbers(20, 1)), (V, np.zeros((20, V), np.float32))],
                         ids=["one parcel, one token, one layer", "constant recordings"])
def test_the_least_there_can_be_goes_through_all_commands(tmp_path, V, recording):
    for split in "train", "val":
        write_dataset(tmp_path / split, {"R": [recording] * 4, "Age": [1.0, 2.0, 3.0, None]})
    write_dataset(tmp_path / "coords", {**{axis: [1.0] * V for axis in "XYZ"}, "Network": ["Default"] * V})
    smallest = "--num_timepoints_per_voxel=4 --hidden_size=2 --num_hidden_layers=1 --num_attention_heads=1"
    lines = [words("pretrain", tmp_path, tmp_path / "pretrained", *smallest.split()),
             words("finetune", tmp_path, tmp_path / "finetuned"), words("evaluate", tmp_path, None)]
    for line in lines:
        assert "Warning" not in ended(start(line))
    lines = metrics(tmp_path / "pretrained") + metrics(tmp_path / "finetuned")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and np.isfinite(losses).all()


def test_dropout_of_the_flags_acts_on_given_weights_and_not_on_what_features_look_like(
        data, tmp_path, monkeypatch):
    def run_training(args, training, model, *others):
        seen[args.command] = model
        sys.exit(0)
    seen, given = {}, f"--model_name_or_path={tmp_path / 'dropout'}"
    monkeypatch.setattr(brainlm, "run_training", run_training)
    BrainLM(BrainLMConfig(T, P, 8, 2, 2, hidden_dropout_prob=0.9)).save_pretrained(tmp_path / "dropout")
    for command, more in ("pretrain", ["--hidden_dropout_prob=0.3"]), ("finetune", []):
        with pytest.raises(SystemExit):
            run_here(words(command, data, tmp_path / command, given, *more))
    model = seen["pretrain"]
    assert {layer.dropout for layer in model.layers} == {model.config.hidden_dropout_prob} == {0.3}
    model, dataset = seen["finetune"].eval(), RecordingDataset(data / "train", "R")
    xyz, _ = brainlm.read_coordinates(data / "coords")
    features = torch.cat([model.features(dataset.batch([(row, 0)], T), xyz) for row in range(8)])
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
    def counting(self, signal, *others):
        if not self.training:
            sizes.add(len(signal))
        return forward(self, signal, *others)
    sizes, forward = set(), BrainLM.forward
    monkeypatch.setattr(BrainLM, "forward", counting)
    write_dataset(tmp_path / "val", {"R": [numbers(100)] * 2, "Age": [50.0, 60.0]})
    given = shutil.copytree(data / "pretrained", tmp_path / "pretrained")
    run_here(words(command, data, tmp_path / "run", f"--val_dataset_path={tmp_path / 'val'}",
                   "--per_device_eval_batch_size=3", f"--model_name_or_path={given}"))
    assert max(sizes) == 3


def test_sample_data_are_not_looked_for_among_installed_packages(tmp_path):
    shutil.copy(REPOSITORY / "brainlm.py", tmp_path)
    done = python("brainlm.py", "pretrain", cwd=tmp_path)
    assert done.returncode == 2 and re.fullmatch("error: no sample_data.py beside .*\n", done.stderr)


# ------------------------------------------------------------------------------------------------------
# Datasets that the library `datasets` writes: {layout: its feature, as a function of the library}

RECORDINGS = [np.abs(10 * numbers(12 + i, seed=i)).round().astype(int).tolist() for i in range(7)]
LAYOUTS = {
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
            for start, length in (0, 2), (3, 5), (len(values) - 4, 4):
                window = dataset.window(row, start, num_timepoints=length)
                assert np.array_equal(window, values[start:start + length])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_reads_as_datasets_does(tmp_path, name):
    """In one shard and in three, whatever was done to the rows, and in record batches of any size."""
    datasets = pytest.importorskip("datasets")
    recordings = [recording[:12] if "12" in name else recording for recording in RECORDINGS]
    features = datasets.Features({"R": LAYOUTS[name](datasets), "k": datasets.Value("int64")})
    whole = datasets.Dataset.from_dict({"R": recordings, "k": [3, 1, 2, 6, 5, 4, 0]}, features)
    for change in (lambda: whole, lambda: whole.select([5, 2, 6, 0]), lambda: whole.select(range(2, 6)),
                   lambda: whole.filter(lambda row: row["k"] % 2), lambda: whole.shuffle(seed=1),
                   lambda: whole.sort("k"), lambda: whole.train_test_split(0.4, seed=0)["train"],
                   lambda: datasets.concatenate_datasets([whole.select(range(3, 7)), whole]),
                   lambda: whole.map(lambda row: row, writer_batch_size=2)):
        for num_shards in 1, 3:
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            change().save_to_disk(folder, num_shards=num_shards)
            assert_reads_as_datasets_does(folder)


def test_one_split_of_a_dataset_dict_with_types_left_to_datasets_reads_as_datasets_does(tmp_path):
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"R": RECORDINGS})
    datasets.DatasetDict({"train": split, "test": split.select([1, 2, 3])}).save_to_disk(tmp_path)
    for name in "train", "test":
        assert_reads_as_datasets_does(tmp_path / name)


def test_columns_of_any_type_may_stand_beside_the_recordings(tmp_path):
    datasets = pytest.importorskip("datasets")
    day = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    columns = {"R": RECORDINGS, "text": ["a", None, "Ω", "", "e", "f", "g"], "nothing": [None] * 7,
               "dict": [{"a": 1, "b": ["x"]}] * 7, "list": [list(range(i)) for i in range(7)],
               "time": [day] * 7, "day": [day.date()] * 7, "bytes": [b"\0\xff" * i for i in range(7)],
               "yes": [True, None, False, True, False, True, True], "label": [0, 1, 0, 1, 0, 1, 0],
               "Age": [50, None, 60, 61, 62, 63, None], "Score": [1.5, math.nan, None, 2.5, 3.5, 4.5, 5.5]}
    dataset = datasets.Dataset.from_dict(columns)
    dataset = dataset.cast_column("label", datasets.ClassLabel(names=["control", "patient"]))
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    assert_reads_as_datasets_does(tmp_path / "saved")
    table = brainlm.open_table(tmp_path / "saved")
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


# ------------------------------------------------------------------------------------------------------
# sample_data.py


def test_datasets_reads_what_sample_data_writes(tmp_path):
    datasets = pytest.importorskip("datasets")
    make_sample_data(tmp_path, num_train=3, num_val=2, num_parcels=10, num_timepoints=60)
    theirs, coords = (datasets.load_from_disk(str(tmp_path / name)) for name in ("train", "coords"))
    ours = RecordingDataset(tmp_path / "train", RECORDING_COL)
    xyz, networks = brainlm.read_coordinates(tmp_path / "coords")
    assert len(theirs) == len(ours) == 3
    for row in range(3):
        assert np.array_equal(np.float32(theirs[row][RECORDING_COL]), ours.window(row))
    assert theirs["Age.At.MHQ"][:] == ours.table["Age.At.MHQ"].to_pylist()
    assert np.array_equal(np.float32([coords[axis][:] for axis in "XYZ"]).T, xyz)
    assert networks == coords["Network"][:]


def test_sample_data_have_the_same_bytes_for_a_seed_and_other_people_for_another_seed_or_split(tmp_path):
    ages, contents = [], []
    for i, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(i)
        make_sample_data(folder, num_train=3, num_val=3, num_parcels=6, num_timepoints=40, seed=seed)
        contents.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")})
        ages.append([age for split in ("train", "val") for age in column_of(folder / split, "Age.At.MHQ")])
    assert contents[0] == contents[1] and len({*ages[1], *ages[2]}) == 12


def column_of(folder, name):
    return brainlm.read_arrow(folder)[name].to_pylist()


@pytest.mark.parametrize("dtype", ["float16", ">f4", "float64", "int16", "uint8"])
def test_write_dataset_needs_no_pandas(dtype, tmp_path):
    (tmp_path / "pandas.py").write_text("raise ImportError('pandas is not here')")
    script = ("import numpy as np; from sample_data import write_dataset\n"
              f"recording = np.arange(12).reshape(4, 3).astype({dtype!r})\n"
              f"write_dataset({str(tmp_path / 'data')!r}, {{'R': [recording], 'Age': [None], 'n': [1]}})")
    done = python("-c", script, env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"})
    assert done.returncode == 0, done.stderr
    assert column_of(tmp_path / "data", "R") == [np.arange(12).reshape(4, 3).tolist()]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16])
def test_robust_scale_gives_median_0_and_range_1_and_zeros_where_a_parcel_hardly_varies(dtype):
    recording = (1000 + 20 * numbers(60, 5)).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled = robust_scale(recording)
    low, median, high = np.percentile(scaled, [25, 50, 75], axis=0)
    assert scaled.dtype == np.float32
    assert np.allclose(median, 0, atol=1e-6) and np.allclose(high - low, 1, atol=1e-6)
    recording[:, 1] = 0
    recording[:, 3] = 1000
    recording[7, 3] = 1100                              # a spike in a parcel that is constant otherwise
    if dtype == np.float64:
        recording[:, 3] += 1e-12 * recording[:, 0]      # rounding noise is no variance
    with pytest.warns(UserWarning, match=r"parcels 1, 3 .*written as zeros"):
        with_zeros = robust_scale(recording)
    assert not with_zeros[:, [1, 3]].any()
    assert np.array_equal(with_zeros[:, [0, 2, 4]], scaled[:, [0, 2, 4]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_robust_scale_refuses_nan_and_infinity_unless_told_to_write_zeros(value):
    recording = numbers(60, 5)
    recording[4, 2] = value
    with pytest.raises(ValueError, match=rf"^timepoint 4, parcel 2 is {value}.*nan=.zero.[^\n]*$"):
        robust_scale(recording)
    with pytest.warns(UserWarning, match="parcels 2 .*written as zeros"):
        scaled = robust_scale(recording, nan="zero")
    assert np.isfinite(scaled).all() and not scaled[:, 2].any() and scaled[:, 3].any()
    with pytest.raises(ValueError, match="nan is 'ignore'"):
        robust_scale(recording, nan="ignore")
    with pytest.raises(ValueError, match=r"\(timepoints, parcels\).*\(60,\)"):
        robust_scale(recording[:, 0])


def test_an_interrupted_creation_leaves_no_train_and_can_be_repeated(tmp_path, monkeypatch):
    def interrupted(*arguments):
        made.append(arguments)
        if len(made) == 4:                              # of 2 in val and 3 in train
            raise KeyboardInterrupt
        return make_person(*arguments)
    made, make_person = [], sample_data.make_person
    sizes = {"num_train": 3, "num_val": 2, "num_parcels": 6, "num_timepoints": 40}
    monkeypatch.setattr(sample_data, "make_person", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_sample_data(tmp_path, **sizes)
    assert not (tmp_path / "train").exists()
    make_sample_data(tmp_path, **sizes)
    assert {path.name for path in tmp_path.iterdir()} == {"train", "val", "coords"}


@pytest.mark.parametrize("death", ["raise KeyboardInterrupt", "os.kill(os.getpid(), 9)"])
def test_a_write_that_dies_keeps_the_older_dataset_and_harms_no_later_one(tmp_path, death):
    write_dataset(tmp_path / "data", {"n": [1]})
    script = (f"import os, sample_data\ndef die(*_): {death}\nsample_data.column_values = die\n"
              f"sample_data.write_dataset({str(tmp_path / 'data')!r}, {{'n': [2]}})")
    assert python("-c", script, cwd=REPOSITORY).returncode != 0
    assert column_of(tmp_path / "data", "n") == [1]
    leftovers = [path.name for path in tmp_path.iterdir() if path.name != "data"]
    assert len(leftovers) == ("kill" in death) and all(name.startswith(".data.") for name in leftovers)
    write_dataset(tmp_path / "data", {"n": [3]})
    assert column_of(tmp_path / "data", "n") == [3]


def test_writers_of_one_folder_do_not_collide(tmp_path):
    def write_often(writer):
        try:
            for _ in range(40):
                write_dataset(tmp_path / "data", {"n": [writer] * 100})
        except Exception as error:
            failures.append(error)
    failures, writers = [], [threading.Thread(target=write_often, args=(i,)) for i in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert not failures and len(set(column_of(tmp_path / "data", "n"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# ------------------------------------------------------------------------------------------------------
# README.md


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
    lines = SOURCE.splitlines()
    links = re.findall(r"\[`(?:\w+\.)?(\w+)`]\(brainlm\.py#L(\d+)\)", (REPOSITORY / "README.md").read_text())
    assert len(links) >= 10
    for name, line in links:
        where = [i for i, text in enumerate(lines, start=1) if re.match(rf"\s*(def|class) {name}\b", text)]
        assert int(line) in where, f"README.md links {name} to line {line}, it is in {where}"


# ------------------------------------------------------------------------------------------------------
# sample_data.py: files of a lab, arrays of other libraries, and a notebook from images to a prediction


def lab(folder, subjects=("01", "02", "03"), header="a\tb\tc\td"):
    """A folder as XCP-D leaves it, with coords.csv and participants.tsv; returns the flags that read it."""
    for k, subject in enumerate(subjects):
        place = folder / f"sub-{subject}/func/sub-{subject}_ses-1_task-rest_seg-4S4Parcels_stat-mean_timeseries.tsv"
        place.parent.mkdir(parents=True)
        lines = ["\t".join(str(round(x, 4)) for x in row) for row in numbers(40, 4, seed=k)]
        place.write_text("\n".join([header, *lines]) + "\n")
        place.with_name(f"sub-{subject}_motion.tsv").write_text("framewise_displacement\nn/a\n0.1\n")
    (folder / "coords.csv").write_text("ROI Name,R,A,S\na,1,2,3\nb,4,5,6\nc,7,8,9\nd,-1,-2,-3\n")
    (folder / "participants.tsv").write_text("participant_id\tage\tsex\tborn\nsub-01\t21\tF\t1999-12-31\n"
                                             "02\tn/a\tM\tn/a\n")
    return ["--source", "files", "--input_dir", str(folder), "--coords", str(folder / "coords.csv"), "--participants",
            str(folder / "participants.tsv"), "--output_dir", str(folder / "data"), "--pattern", "*timeseries*",
            "--min_timepoints", "40"]


def files_here(line, monkeypatch):
    """sample_data.py with these flags: exit status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["sample_data.py", *line])
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            sample_data.main()
        except SystemExit as end:
            return end.code, out.getvalue()
    return 0, out.getvalue()


def test_files_of_a_lab_become_datasets_that_the_printed_command_reads(tmp_path, monkeypatch):
    line = lab(tmp_path)
    series = sorted(tmp_path.rglob("*timeseries.tsv"))
    cells = [row.split("\t") for row in series[1].read_text().splitlines()]
    series[1].write_text("\n".join("\t".join([row[0], "n/a", *row[2:]]) for row in cells))      # b is out of view
    np.save(series[1].with_name("sub-02_run-2_timeseries.npy"), numbers(41, 4))
    np.savetxt(series[2].with_name("sub-03_run-2_timeseries.csv"), numbers(41, 4), delimiter=", ")
    np.save(series[2].with_name("sub-04_timeseries.npy"), numbers(39, 4))
    code, told = files_here([*line, "--tr", "0.8"], monkeypatch)
    assert code == 0 and re.search(f"{series[1].name}: parcels 1 .*written as zeros\n6 files fit .*, 5 of them", told)
    assert "3 subjects (sub-01, sub-02, sub-03" in told and ", 2 of them in --participants" in told
    tables = [brainlm.read_arrow(tmp_path / "data" / split) for split in ("train", "val")]
    people = {name: sum((table[name].to_pylist() for table in tables), []) for name in tables[0].column_names}
    by_subject = {subject: values for subject, *values in zip(*(people[name] for name in
                  ("Subject", "age", "sex", "born", "TR")))}
    assert by_subject == {"sub-01": [21, "F", "1999-12-31", 0.8], "sub-02": [None, "M", None, 0.8],
                          "sub-03": [None, None, None, 0.8]}
    assert len(people["Subject"]) == 5 and not {*tables[0]["Subject"].to_pylist()} & {*tables[1]["Subject"].to_pylist()}
    kept = {Path(name).name: np.array(values) for name, values in zip(people["File"], people[RECORDING_COL])}
    assert np.allclose(kept[series[0].name], robust_scale(numbers(40, 4, seed=0)), atol=1e-3)
    assert kept[series[1].name].any(axis=0).tolist() == [True, False, True, True]
    xyz, _ = brainlm.read_coordinates(tmp_path / "data/coords")
    assert xyz[3].tolist() == [-1, -2, -3] and column_of(tmp_path / "data/coords", "Label") == list("abcd")
    command = told[told.index("brainlm.py pretrain"):].split()[1:]
    run_here([*command, "--num_timepoints_per_voxel", "40", "--hidden_size", "16", "--max_steps", "1", "--output_dir",
              str(tmp_path / "run")])


def edit(name, old, new):
    """A change to the one file whose path ends in `name`."""
    def change(folder):
        file, = (path for path in folder.rglob("*.?sv") if path.name.endswith(name))
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))
    return change


SERIES = "sub-01_ses-1_task-rest_seg-4S4Parcels_stat-mean_timeseries.tsv"
LAB_FAULTS = {      # what is changed, more flags, and what the line names
    "none": (None, ["--pattern", "*.nii"], "files of two subjects"),
    "one subject": (None, ["--pattern", "sub-01*series.tsv"], "files of two subjects"),
    "too short": (None, ["--min_timepoints", "41"], "files of two subjects"),
    "all files": (None, ["--pattern", "*"], "sub-01_motion.tsv: shape .2, 1., but .*csv has 4 parcels.*--pattern"),
    "a word": (edit(SERIES, "d\n", "d\n1\tx\t2\t3\n"), [], f"{SERIES}: In CSV column #2: Row #2: .*'x'.*n/a"),
    "ragged": (edit(SERIES, "d\n", "d\n1\t2\t3\n"), [], f"{SERIES}: .*Row #2: Expected 4 columns, got 3"),
    "counted": (edit(SERIES, "a\tb\tc\td", "0\t1\t2\t3"), [], f"{SERIES}: row #1 is 0.0, 1.0, .*no numbers"),
    "half a header": (edit(SERIES, "a\tb\tc\td", "0.3\tb\t2\t3"), [], f"{SERIES}: row #1 is 0.3, b, 2.0"),
    "empty": (edit("coords.csv", "c,7,8,9", "c,7,,9"), [], "coords.csv: row #4 lacks Y"),
    "no place": (edit("coords.csv", "R,A,S", "i,j,k"), [], "coords.csv: .* lacks X.*columns are ROI Name, i, j, k"),
    "place": (edit("coords.csv", "c,7,8,9", "c,7,8,9mm"), [], "coords.csv: .*column #4: Row #4: .*'9mm'"),
    "no coords": (None, ["--coords", "nowhere.csv"], "No such file.*nowhere.csv"),
    "twice": (edit("participants.tsv", "02", "sub-01"), [], "participants.tsv: row #3, .*participant_id: 01 .*twice"),
    "no ids": (edit("participants.tsv", "participant_id", "id"), [], "participants.tsv: row #2, column participant_id"),
    "latin": (lambda folder: (folder / "participants.tsv").write_bytes(b"participant_id\tsite\n01\tM\xfcnster\n"), [],
              "participants.tsv: .*UTF"),
    "pickle": (lambda folder: np.save(folder / "sub-00_timeseries.npy", np.array([{}])), [], "sub-00_.*npy: .*pickle"),
}


@pytest.mark.parametrize("change, flags, told", LAB_FAULTS.values(), ids=LAB_FAULTS)
def test_a_fault_in_files_of_a_lab_is_one_line_that_names_it(tmp_path, monkeypatch, change, flags, told):
    line = lab(tmp_path)
    if change:
        change(tmp_path)
    code, printed = files_here([*line, *flags], monkeypatch)
    assert code == 2 and re.fullmatch(f"sample_data.py: .*{told}.*", printed.splitlines()[-1])
    assert not (tmp_path / "data").exists()


def test_columns_may_be_of_numpy_torch_and_pandas(tmp_path):
    tensor = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    columns = {"R": tensor, "age": torch.tensor([1.5, 2]), "site": np.array(["a", "b"]),
               "n": [torch.tensor(3), np.int64(4)], "text": ["a", float("nan")]}
    expected = {"age": [1.5, 2.0], "site": ["a", "b"], "n": [3, 4], "text": ["a", None]}
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"name": ["x", None], "score": [np.nan, 3]}, index=[7, 9])
    columns |= {"P": [pandas.DataFrame(recording.detach().numpy()) for recording in tensor], **table}
    write_dataset(tmp_path / "data", columns | {name: table[name] for name in table})
    expected |= {"name": ["x", None], "score": [None, 3.0], "R": tensor.tolist(), "P": tensor.tolist()}
    assert {name: column_of(tmp_path / "data", name) for name in expected} == expected
    assert np.array_equal(robust_scale(columns["P"][0]), robust_scale(tensor[0]))
    with pytest.raises(ValueError, match="need numbers, found"):
        robust_scale(table)


def test_robust_scale_never_writes_nan():
    recording = np.float64(numbers(60, 2))
    recording[:, 0] *= 5e307
    with pytest.warns(UserWarning, match="parcels 0 "):
        assert np.isfinite(robust_scale(recording, nan="zero")).all()


NOTEBOOK = """
import numpy as np, nibabel, matplotlib.pyplot as plt
from nilearn.maskers import NiftiLabelsMasker
from nilearn.plotting import find_parcellation_cut_coords
rng, affine = np.random.default_rng(0), np.diag([4, 4, 4, 1]) + np.array([[0, 0, 0, -24]] * 3 + [[0] * 4])
atlas = np.zeros((12, 12, 12), dtype=np.int16)
for k, (x, y, z) in enumerate([(2, 2, 2), (2, 2, 8), (2, 8, 2), (8, 2, 2), (8, 8, 2), (8, 8, 8)], start=1):
    atlas[x:x + 2, y:y + 2, z:z + 2] = k
atlas = nibabel.Nifti1Image(atlas, affine)
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
main(f"pretrain {flags} --output_dir pretrained --num_timepoints_per_voxel 40 --hidden_size 16".split())
main(f"finetune {flags} --output_dir tuned --model_name_or_path pretrained --variable_of_interest_col_name Age".split())
#
signal, xyz = torch.tensor(scaled[3][None, :40]), torch.tensor(xyz, dtype=torch.float32)
with torch.no_grad():
    print("age", BrainLMRegressor.from_pretrained("tuned")(signal, xyz).item())
    forecast = BrainLM.from_pretrained("pretrained").forecast(signal[:, :20], xyz, 20)
_ = plt.plot(forecast[0])
"""


def test_a_notebook_goes_from_images_to_a_prediction(tmp_path, monkeypatch):
    packages = "nbclient", "nbformat", "ipykernel", "matplotlib", "nilearn", "nibabel"
    nbclient, nbformat, *_ = map(pytest.importorskip, packages)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    cells = [nbformat.v4.new_code_cell(cell) for cell in NOTEBOOK.split("\n#\n")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed, picture = cells[-1].outputs
    assert 30 < float(printed.text.split()[1]) < 100 and "image/png" in picture.data
