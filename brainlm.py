"""
BrainLM in one file: a foundation model for brain activity (parcellated fMRI), to read, run and trust.

A recording is a matrix of BOLD signals, (timepoints, parcels), e.g. 200 x 424. This file goes the way of the data:

    1. configuration     the handful of numbers that define a model
    2. data              Hugging Face Arrow folders, memory-mapped with pyarrow
    3. tokens            20 timepoints of one parcel + where the parcel is + when it was
    4. attention         block-causal: everything inside a timepoint, nothing from the future
    5. model             a transformer that starts as a spatial smoother
    6. masking and loss  hide most tokens, reconstruct them
    7. head              a 3-layer MLP on the CLS token predicts a scalar (age, PHQ9, ...)
    8. checkpoints       run folders that survive a kill and are Hugging Face Hub repositories
    9. evaluation        every number beside the closed-form baseline that a sceptic would try first
   10. training          one loop for pretraining and finetuning, on one or many devices
   11. commands          python brainlm.py pretrain | finetune | evaluate

Shapes: B batch, T timepoints, V parcels, P patch length, N = T / P temporal tokens, H hidden size,
S = 1 + N * V sequence length. BrainLM: Ortega Caro et al., ICLR 2024 (https://openreview.net/forum?id=RwI7ZEfR27).
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import hashlib
import importlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn


class BadInput(ValueError):
    """A fault in data, flags or files that the user can mend. The commands print it as one line and exit with 2."""


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


# ----------------------------------------------------------------------------------------------------------------------
# 1. Configuration


def setting(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class BrainLMConfig:
    """What defines a model; as JSON it is the config.json of a run folder, and each field is a flag of pretrain."""

    num_timepoints_per_voxel: int = setting(200, "T, timepoints in the windows that the model is trained on")
    timepoint_patching_size: int = setting(20, "P, timepoints in a patch")
    hidden_size: int = setting(128, "H, width of a token")
    num_hidden_layers: int = setting(4, "transformer layers")
    num_attention_heads: int = setting(None, "attention heads in a layer; None: hidden_size / 64")
    intermediate_size: int = setting(None, "width of the MLP in a layer; None: 4 * hidden_size")
    hidden_dropout_prob: float = setting(0.0, "dropout of what a layer adds")
    attention_probs_dropout_prob: float = setting(0.0, "dropout of attention weights; slow on CPUs")
    mask_ratio: float = setting(0.75, "share of the tokens that a random mask hides")
    loss_fn: str = setting("mse", "mse or mae")

    def __post_init__(self):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_attention_heads is None:
            self.num_attention_heads = math.gcd(self.hidden_size, max(1, self.hidden_size // 64))
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            if option.type is int and (not isinstance(value, int) or value < 1):
                raise BadInput(f"{name} is {value!r}: it must be a whole number, at least 1")
            if "dropout" in name and not 0 <= value < 1:
                raise BadInput(f"{name} is {value}: it must lie in [0, 1)")
        T, P, H = self.num_timepoints_per_voxel, self.timepoint_patching_size, self.hidden_size
        if T % P:
            raise BadInput(f"num_timepoints_per_voxel {T} is not divisible by timepoint_patching_size {P}: "
                           f"try {max(T // P, 1) * P}")
        if H % self.num_attention_heads or H % 2:
            raise BadInput(f"hidden_size {H} must be even and divisible by num_attention_heads "
                           f"{self.num_attention_heads}")
        if not 0 < self.mask_ratio <= 1:
            raise BadInput(f"mask_ratio is {self.mask_ratio}: it must lie in (0, 1]")
        if self.loss_fn not in ("mse", "mae"):
            raise BadInput(f"loss_fn is {self.loss_fn!r}: it must be mse or mae")

    @classmethod
    def from_dict(cls, values):
        """From a config.json, which has more in it than this. Raises KeyError where a setting is missing."""
        return cls(**{each.name: values[each.name] for each in fields(cls)})


# ----------------------------------------------------------------------------------------------------------------------
# 2. Data: folders written by datasets.Dataset.save_to_disk, i.e. Arrow IPC streams listed in state.json


def read_arrow(path):
    """Memory-map a save_to_disk folder: a pyarrow.Table whose numbers stay on disk until they are used.

    Raises BadInput, naming the folder or file, if it is no complete Arrow dataset.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder (a dataset is a folder written by datasets.save_to_disk)")
    if (folder / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise BadInput(f"{folder} holds several datasets, name one of them: "
                       f"{', '.join(str(folder / split) for split in splits) or 'there is none'}")
    try:
        state = json.loads((folder / "state.json").read_text())
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except FileNotFoundError:
        raise BadInput(f"{folder} is no Arrow dataset: no state.json in it (write one with write_dataset of "
                       "sample_data.py or datasets.save_to_disk)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / 'state.json'} is not what save_to_disk writes: {error!r}") from None
    if state.get("_indices_data_files"):
        raise BadInput(f"{folder} was saved with an index mapping by an old `datasets`: load and save it again there")
    if not files:
        raise BadInput(f"{folder / 'state.json'} lists no Arrow file: the dataset is empty")
    tables = []
    for file in files:
        try:
            # A stream that was cut between two record batches reads as a shorter one: only its end marker tells.
            with open(file, "rb") as stream:
                stream.seek(-8, os.SEEK_END)
                if stream.read() != b"\xff\xff\xff\xff\0\0\0\0":
                    raise pa.ArrowInvalid("no end-of-stream marker")
            tables.append(pa.ipc.open_stream(pa.memory_map(str(file))).read_all())
            tables[-1].validate(full=True)              # offsets out of bounds; reads no number of a recording
        except (pa.ArrowInvalid, OSError) as error:
            raise BadInput(f"{file} is missing, truncated or no Arrow stream ({first_line(error)}): "
                           "copy or write the dataset again") from None
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise BadInput(f"{folder}: its files have different columns ({first_line(error)})") from None
    if not len(table):
        raise BadInput(f"{folder}: the dataset has no rows")
    return table


def read_column(table, name, path):
    """One column as a pyarrow.ChunkedArray; BadInput lists the columns there are if it is missing."""
    if table.column_names.count(name) != 1:
        raise BadInput(f"{path}: no column {name!r} (there are {', '.join(table.column_names)})")
    return table.column(name)


def is_list(kind):
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_number(kind):
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def read_numbers(table, name, path):
    """A column of scalars as float64 [rows]; a missing value (None) becomes NaN. BadInput if it is not numeric."""
    column = read_column(table, name, path)
    if not (is_number(column.type) or pa.types.is_boolean(column.type) or pa.types.is_null(column.type)):
        raise BadInput(f"{path}: column {name!r} is not numeric but {column.type}")
    return np.array(column.to_pylist(), dtype=np.float64)      # None becomes NaN


def read_coordinates(path):
    """Parcel centres and, where the dataset has them, network labels.

    Returns xyz float32 [V, 3] (columns X, Y, Z; MNI mm) and a list of V labels (column Network) or None.
    """
    table = read_arrow(path)
    with np.errstate(over="ignore"):                    # too large for float32: infinite, and refused as such
        xyz = np.stack([read_numbers(table, axis, path) for axis in "XYZ"], axis=1).astype(np.float32)
    faults = np.argwhere(~np.isfinite(xyz))
    if len(faults):
        row, axis = faults[0]
        raise BadInput(f"{path}: coordinate {'XYZ'[axis]} of row (parcel) {row} is missing or not finite")
    networks = table.column("Network").to_pylist() if "Network" in table.column_names else None
    return torch.from_numpy(xyz), networks


class RecordingDataset:
    """The recordings of one Arrow dataset, handed out as windows without loading them.

    path            folder written by save_to_disk
    recording_col   column of (timepoints, parcels) recordings; lengths may differ between rows
    window          shortest recording that is accepted, in timepoints
    num_parcels     how many parcels there must be (None: as many as the first row has)
    max_samples     use only the first rows

    Attributes: table (all columns), lengths int64 [rows] in timepoints, num_parcels.
    Raises BadInput naming column, row and timepoint if the column is not what it should be.
    """

    def __init__(self, path, recording_col, window=1, num_parcels=None, max_samples=None):
        self.path, self.recording_col = path, recording_col
        self.table = read_arrow(path)[:max_samples]
        # Array2D is an extension type over nested lists. Flattening drops a level of offsets, and copies no number.
        column = pa.chunked_array([getattr(chunk, "storage", chunk)
                                   for chunk in read_column(self.table, recording_col, path).chunks])
        if not (is_list(column.type) and is_list(column.type.value_type)
                and is_number(column.type.value_type.value_type)):
            self.refuse(f"holds {column.type}: a recording is a two-dimensional list of numbers, (timepoints, parcels)")
        if column.null_count:
            self.refuse(f"row {np.argmax(column.is_null().to_numpy())} is missing")
        self.lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths            # of each row, in timepoints of the whole column
        timepoints = pc.list_flatten(column)
        if timepoints.null_count:
            row, where = self.locate(np.argmax(timepoints.is_null().to_numpy()))
            self.refuse(f"{where} is missing")
        widths = pc.list_value_length(timepoints).to_numpy()            # parcels at every timepoint
        self.num_parcels = num_parcels or max(1, int(widths[:1].sum()))
        if (widths != self.num_parcels).any():
            fault = np.argmax(widths != self.num_parcels)
            row, where = self.locate(fault)
            hint = "the recording is ragged"
            if (widths[self.starts[row]:self.starts[row] + self.lengths[row]] == widths[fault]).all():
                hint = "do the recordings and the coordinates come from the same atlas?"
                if self.lengths[row] == self.num_parcels:
                    hint = "transposed? a recording is (timepoints, parcels)"
            self.refuse(f"{where} has {widths[fault]} parcels, expected {self.num_parcels}: {hint}")
        if self.lengths.min() < window:
            row = np.argmax(self.lengths < window)
            self.refuse(f"row {row} has {self.lengths[row]} timepoints, fewer than the window of {window}: leave it "
                        "out or lower --num_timepoints_per_voxel")
        self.values = pc.list_flatten(timepoints)                       # every number of the column, in one row

    def refuse(self, fault):
        raise BadInput(f"{self.path}: column {self.recording_col!r}: {fault}")

    def locate(self, timepoint):
        """The row that a timepoint of the whole column is in, and both in words."""
        row = int(np.searchsorted(self.starts, timepoint, side="right")) - 1
        return row, f"row {row}, timepoint {timepoint - self.starts[row]}"

    def __len__(self):
        return len(self.lengths)

    def window(self, row, start=0, num_timepoints=None, stride=1):
        """num_timepoints of one recording (None: to its end), every stride-th from timepoint start on, as numpy [T, V]
        in the dataset's own dtype: a view of the file, not a copy. Raises BadInput past the recording's end."""
        length, V = int(self.lengths[row]), self.num_parcels
        T = length - start if num_timepoints is None else stride * num_timepoints
        if not 0 <= start <= start + T <= length:
            self.refuse(f"row {row} has {length} timepoints: there is no window of {T} from timepoint {start} on")
        values = self.values.slice((int(self.starts[row]) + start) * V, T * V)       # of one chunk, as all rows are
        signal = values.chunk(0).to_numpy(zero_copy_only=False).reshape(T, V)
        return signal[::stride]

    def check_values(self):
        """Read every number once and refuse NaN, infinity and missing values: better before the first step of training
        than in the middle of it. Says how far it is where that takes longer than a few seconds."""
        told = time.monotonic()
        for row in range(len(self)):
            signal = self.window(row)
            with np.errstate(over="ignore"):            # what is too large for float32 is infinite for the model
                finite = np.isfinite(signal.astype(np.float32, copy=False))
            if not finite.all():
                t, v = np.argwhere(~finite)[0]
                self.refuse(f"row {row}, timepoint {t}, parcel {v} is {signal[t, v]}: repair it or leave the row out")
            if time.monotonic() > told + 5:
                told = time.monotonic()
                say(f"checking {self.path}: {row + 1} of {len(self)} recordings")

    def batch(self, windows, num_timepoints):
        """float32 tensor [B, T, V] of the windows [(row, start) or (row, start, stride), ...]."""
        out = np.empty((len(windows), num_timepoints, self.num_parcels), dtype=np.float32)
        for signal, (row, start, *stride) in zip(out, windows):
            signal[:] = self.window(row, start, num_timepoints, *stride)
        return torch.from_numpy(out)

    def fixed_windows(self, rows, num_timepoints, stride):
        """[(row, start), ...]: windows every `stride` timepoints, and one at the very end of each recording."""
        return [(int(row), int(start)) for row in rows for last in [self.lengths[row] - num_timepoints]
                for start in sorted({*range(0, last, stride), last})]

    def training_window(self, n, rows, num_timepoints, seed, stride_prob=0.0):
        """(row, start, stride) of the n-th training sample: the rows in a new random order each epoch, a random window
        of each; with probability stride_prob of every 2nd or 3rd timepoint, where the recording is long enough, as if
        scanned more slowly. A function of seed and n: resumed and distributed runs see the same samples."""
        epoch, i = divmod(n, len(rows))
        row = int(rows[torch.randperm(len(rows), generator=generator(seed, "order of the rows", epoch))[i]])
        random = generator(seed, "window", n)
        stride = 1
        if torch.rand((), generator=random) < stride_prob:
            stride = min(int(torch.randint(2, 4, (), generator=random)), int(self.lengths[row]) // num_timepoints)
        last = int(self.lengths[row]) - stride * num_timepoints
        return row, int(torch.randint(last + 1, (), generator=random)), stride


def generator(seed, stream, number):
    """A random generator for one use: (0, "mask", 17) is that of the mask of sample 17. All randomness of training is a
    function of the seed and the number of the step or sample, not of a stream that is consumed: a resumed run needs no
    random state, and any number of processes draws the same."""
    digest = hashlib.sha256(f"{seed}, {stream}, {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ----------------------------------------------------------------------------------------------------------------------
# 3. Tokens: what (a patch of signal), where (the parcel's coordinates), when (the patch's place in the window)


def patchify(signal, P):
    """Cut every parcel's time series into patches of P timepoints: [B, T, V] -> [B, N, V, P]."""
    B, T, V = signal.shape
    return signal.reshape(B, T // P, P, V).transpose(2, 3)


def unpatchify(patches):
    """Inverse of patchify: [B, N, V, P] -> [B, T, V]."""
    B, N, V, P = patches.shape
    return patches.transpose(2, 3).reshape(B, N * P, V)


class SpatialEncoding(nn.Module):
    """Encoding of a parcel learned from its coordinates: [V, 3] in MNI mm -> [V, H].

    With a Linear on xyz itself, attention could compare parcels by a bilinear form of three numbers only: too little to
    find "the same parcel earlier" or "my neighbours". Waves of eight wavelengths along each axis tell parcels apart.
    """

    def __init__(self, hidden_size, num_octaves=8):
        super().__init__()
        self.num_octaves = num_octaves
        self.linear = nn.Linear(6 * num_octaves, hidden_size)

    def forward(self, xyz):
        wavelengths = 256.0 / 2 ** torch.arange(self.num_octaves, device=xyz.device)  # mm: 256, 128, ..., 2
        angles = 2 * math.pi * xyz.float()[:, :, None] / wavelengths                         # [V, 3, octaves]
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)           # [V, 6 * octaves]
        return self.linear(waves.to(self.linear.weight.dtype))


def temporal_encoding(N, hidden_size, device=None):
    """The sinusoid of Vaswani et al. 2017, section 3.5, over temporal tokens 0..N-1: [N, H]. With base 100 where they
    have 10,000: windows hold tens of temporal tokens, and slower waves would stand still."""
    position = torch.arange(N, device=device)[:, None]
    frequency = 100.0 ** (-torch.arange(0, hidden_size, 2, device=device) / hidden_size)
    return torch.stack([torch.sin(position * frequency), torch.cos(position * frequency)], dim=-1).flatten(1)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Attention: [CLS, all parcels at t0, all parcels at t1, ...]


def block_causal_mask(N, V):
    """Who may read whom: bool [S, S], True = the token of this row may attend to the token of this column.

    A parcel reads all parcels of its own and of earlier temporal tokens. CLS (row 0) reads everything, and no parcel
    reads CLS (column 0): CLS knows the future, and from the second layer on it would hand it back to the past.
    """
    block = torch.arange(N).repeat_interleave(V)
    mask = torch.ones(1 + N * V, 1 + N * V, dtype=torch.bool)
    mask[1:, 0] = False
    mask[1:, 1:] = block[:, None] >= block[None, :]
    return mask


def block_causal_attention(q, k, v, V, dropout=0.0):
    """scaled_dot_product_attention under block_causal_mask, which is never built: q, k, v, result [B, heads, S, D].

    Block t reads blocks 0..t, all of each: dense attention on a slice of k and v, which the flash kernels can do, and
    nearly half of the S x S products is never computed.
    """
    if q.device.type == "cpu" and v.dtype == torch.bfloat16 and not dropout:
        heads = (each.to(v.dtype).flatten(0, 1) for each in (q / math.sqrt(q.shape[3]), k, v))
        return CPUAttention.apply(*heads, V).view(q.shape)
    return torch.cat([F.scaled_dot_product_attention(q[:, :, rows], k[:, :, past], v[:, :, past], dropout_p=dropout)
                      for rows, past in blocks(q.shape[2], V)], dim=2)


def blocks(S, V):
    """Slices of the sequence, (rows, past that they read): CLS all, each block itself and the blocks before it."""
    return [(slice(0, 1), slice(0, S))] + [(slice(start, start + V), slice(1, start + V)) for start in range(1, S, V)]


class CPUAttention(torch.autograd.Function):
    """The same in bfloat16 on CPUs, where torch's own kernel leaves their bfloat16 units idle: plain matrix products.
    q (scaled), k, v [B * heads, S, D].

    Rows' largest scores are taken off before scores are rounded, where bfloat16 would cost large ones a tenth of their
    weight: as one more column of q, beside ones in k, they are part of the product, which sums in float32. (Above some
    10,000 the largest is itself rounded by tens: the clamp keeps exp and its sum finite.) Backward computes the weights again
    instead of storing S x S of them; transposed, as two of its three products need them.
    """

    @staticmethod
    def tiles(num_heads, S, V):
        """(heads, rows, past): one head a thread, more while their scores take at most 8 MB and so stay in caches."""
        at_once = max(torch.get_num_threads(), 2 ** 22 // (V * S))
        return [(slice(head, head + at_once), rows, past)
                for head in range(0, num_heads, at_once) for rows, past in blocks(S, V)]

    @staticmethod
    def forward(ctx, q, k, v, V):
        q1, k1 = F.pad(q, (0, 1)), F.pad(k, (0, 1), value=1.0)
        out, total = torch.empty_like(v), torch.empty_like(q[:, :, :1])
        for heads, rows, past in CPUAttention.tiles(*q.shape[:2], V):
            q1[heads, rows, -1:] = -(q[heads, rows] @ k[heads, past].mT).amax(dim=2, keepdim=True)
            weights = (q1[heads, rows] @ k1[heads, past].mT).clamp_(-64, 64).exp_()   # [heads, rows, past], at most ~1
            total[heads, rows] = weights.sum(dim=2, keepdim=True)
            out[heads, rows] = weights @ v[heads, past]
        out /= total
        ctx.save_for_backward(q1, k1, v, out, total)
        ctx.V = V
        return out

    @staticmethod
    def backward(ctx, grad):
        q1, k1, v, out, total = ctx.saved_tensors
        q, k, grad = q1[:, :, :-1].contiguous(), k1[:, :, :-1].contiguous(), grad / total
        # Softmax takes from each score's gradient their mean over the row: one more column again.
        grad1, v1 = torch.cat([grad, -(grad * out).sum(dim=2, keepdim=True)], dim=2), F.pad(v, (0, 1), value=1.0)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for heads, rows, past in CPUAttention.tiles(*q.shape[:2], ctx.V):
            weights = (k1[heads, past] @ q1[heads, rows].mT).clamp_(-64, 64).exp_()   # [heads, past, rows]
            dv[heads, past] += weights @ grad[heads, rows]
            dscores = weights.mul_(v1[heads, past] @ grad1[heads, rows].mT)
            dk[heads, past] += dscores @ q[heads, rows]
            dq[heads, rows] = dscores.mT @ k[heads, past]
        return dq, dk, dv, None


# ----------------------------------------------------------------------------------------------------------------------
# 5. Model


class Layer(nn.Module):
    """One pre-norm transformer layer: attention, then an MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout, self.attention_dropout = config.hidden_dropout_prob, config.attention_probs_dropout_prob
        self.attention_norm = nn.LayerNorm(H)
        self.qkv = nn.Linear(H, 3 * H)
        self.position_qk = nn.Linear(2 * H, 2 * H, bias=False)
        self.out = nn.Linear(H, H)
        self.mlp_norm = nn.LayerNorm(H)
        self.up = nn.Linear(H, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, H)

    def queries_keys_values(self, x, position):
        """x [B, S, H], position [S, 2 * H] -> q, k, v, each [B, heads, S, D]. Where and when a token is enters queries
        and keys once more in each layer: who reads whom should not blur as the content of the stream grows."""
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        position_q, position_k = self.position_qk(position).chunk(2, dim=-1)
        return [each.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                for each in (q + position_q, k + position_k, v)]

    def forward(self, x, position, V):
        q, k, v = self.queries_keys_values(x, position)
        attended = block_causal_attention(q, k, v, V, self.attention_dropout if self.training else 0.0)
        x = x + F.dropout(self.out(attended.transpose(1, 2).reshape(x.shape)), self.dropout, self.training)
        mlp = self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))
        return x + F.dropout(mlp, self.dropout, self.training)


class Pretrained(nn.Module):
    """A model that is saved as a run folder, and loaded from one or from the Hub (section 8)."""

    def save_pretrained(self, folder):
        save_model(self, folder)

    @classmethod
    def from_pretrained(cls, name_or_path):
        return load_model(cls, name_or_path)


class BrainLM(Pretrained):
    """The backbone: reconstructs a recording from what the mask leaves of it.

    No parameter depends on V or N: the same weights run on any atlas and any number of temporal tokens.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        H, P = config.hidden_size, config.timepoint_patching_size
        self.patch_projection = nn.Linear(P, H)
        self.spatial_encoding = SpatialEncoding(H)
        self.mask_token = nn.Parameter(torch.empty(H))
        self.cls_token = nn.Parameter(torch.empty(H))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(H)
        self.head = nn.Linear(H, P)
        self.gradient_checkpointing = False             # True: backward recomputes each layer instead of storing it
        self.start_as_smoother()

    @torch.no_grad()
    def start_as_smoother(self):
        """Initialise so that the untrained model averages the visible signals of nearby parcels at the same time, a
        fair first guess at a hidden one. Queries equal keys, so that a token reads those with a similar position, and
        hidden tokens get keys that all queries dislike. Values and outputs pass tokens on unchanged. The head undoes
        the patch projection, which shares no direction with the other terms of a token or with the mean that LayerNorm
        removes: else the head would take them for signal. The MLPs start near zero."""
        H, P = self.config.hidden_size, self.config.timepoint_patching_size
        N = self.config.num_timepoints_per_voxel // P
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.3)
        nn.init.normal_(self.cls_token, std=0.02)
        taken = torch.cat([torch.ones(1, H), temporal_encoding(N, H)]) if N + P < H else torch.zeros(0, H)
        directions = torch.cat([taken.T, nn.init.orthogonal_(torch.empty(H, P))], dim=1)
        self.patch_projection.weight.copy_(torch.linalg.qr(directions)[0][:, -P:] if P < H else directions)
        patch_space = self.patch_projection.weight @ self.patch_projection.weight.T        # [H, H], a projection
        self.head.weight.copy_(self.patch_projection.weight.T)
        self.spatial_encoding.linear.weight -= patch_space @ self.spatial_encoding.linear.weight
        self.mask_token -= patch_space @ self.mask_token
        for layer in self.layers:
            query, key, value = layer.qkv.weight.chunk(3)
            key.copy_(nn.init.orthogonal_(query).mul_(0.2))
            nn.init.eye_(value)
            hidden_key = F.normalize((key @ self.mask_token).view(layer.num_heads, -1), dim=1).flatten()
            layer.qkv.bias.chunk(3)[0].copy_(-4 * hidden_key)
            query, key = layer.position_qk.weight.chunk(2)                                  # of where, when [H, 2 * H]
            nn.init.orthogonal_(query[:, :H])
            nn.init.orthogonal_(query[:, H:])
            key.copy_(query.mul_(2))
            nn.init.eye_(layer.out.weight).div_(len(self.layers))
            nn.init.normal_(layer.down.weight, std=0.002)

    def positions(self, xyz, N):
        """Where each parcel is, [V, H], when each temporal token is, [N, H], and both, side by side, for each token of
        the sequence, [S, 2 * H], zero for CLS."""
        where = self.spatial_encoding(xyz)
        when = temporal_encoding(N, self.config.hidden_size, xyz.device).to(self.cls_token.dtype)
        both = torch.cat([where.repeat(N, 1), when.repeat_interleave(len(xyz), dim=0)], dim=1)
        return where, when, F.pad(both, (0, 0, 1, 0))

    def tokens(self, signal, xyz, mask=None):
        """signal [B, T, V], xyz [V, 3] in mm, mask bool [B, N, V] or None -> the sequence [B, S, H] and the tokens'
        positions [S, 2 * H]."""
        B, T, V = signal.shape
        P = self.config.timepoint_patching_size
        if T % P or V != len(xyz):
            raise BadInput(f"signal has {T} timepoints and {V} parcels: the first must be a multiple of {P}, the "
                           f"second equal the {len(xyz)} coordinates")
        content = self.patch_projection(patchify(signal, P).to(self.cls_token.dtype))                # [B, N, V, H]
        if mask is not None:
            content = torch.where(mask[..., None], self.mask_token.to(content.dtype), content)
        where, when, position = self.positions(xyz, T // P)
        tokens = content + where + when[:, None]
        return torch.cat([self.cls_token.expand(B, 1, -1), tokens.flatten(1, 2)], dim=1), position

    def forward(self, signal, xyz, mask=None):
        """signal float [B, T, V], xyz float [V, 3] in mm, mask bool [B, N, V] (True = hidden) or None.

        Returns the reconstruction [B, T, V] and the hidden states [B, S, H], CLS first.
        """
        V = signal.shape[2]
        x, position = self.tokens(signal, xyz, mask)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(layer, x, position, V, use_reentrant=False)
            else:
                x = layer(x, position, V)
        hidden = self.norm(x)
        return unpatchify(self.head(hidden[:, 1:]).unflatten(1, (-1, V))), hidden

    @torch.no_grad()
    def forecast(self, signal, xyz, num_timepoints):
        """Continue a recording: signal [B, T, V] with any T >= P -> the next num_timepoints, [B, num_timepoints, V].

        Patch by patch: append a hidden one, predict it, take the prediction for truth. Once the window that the model
        was trained on is full, the oldest patch leaves it. Timepoints before a whole number of patches are not used.
        """
        P, T = self.config.timepoint_patching_size, self.config.num_timepoints_per_voxel
        if signal.shape[1] < P:
            raise BadInput(f"forecast needs at least one patch of {P} timepoints, got {signal.shape[1]}")
        window, future = signal, []
        for _ in range(math.ceil(num_timepoints / P)):
            context = min(window.shape[1] // P * P, max(T - P, P))
            window = F.pad(window[:, -context:], (0, 0, 0, P))                       # the patch to come, as zeros
            mask = forward_mask(len(window), window.shape[1] // P, window.shape[2]).to(signal.device)
            patch = self(window, xyz, mask)[0][:, -P:]
            window = torch.cat([window[:, :-P], patch.to(window.dtype)], dim=1)
            future.append(patch)
        return torch.cat(future, dim=1)[:, :num_timepoints] if future else signal[:, :0]

    @torch.no_grad()
    def embed(self, signal, xyz):
        """Features for other tools: signal [B, T, V] -> CLS [B, H], and the parcels' mean over time [B, V, H]."""
        hidden = self(signal, xyz)[1]
        return hidden[:, 0], hidden[:, 1:].unflatten(1, (-1, signal.shape[2])).mean(dim=1)

    @torch.no_grad()
    def attention(self, signal, xyz, layer):
        """Attention weights of one layer (0 is the first), [B, heads, S, S], rows sum to one. Row 0 is CLS: its columns
        1.., unflattened to (N, V), say how much it reads each parcel at each temporal token. For looking at: it builds
        the S x S matrix that training avoids."""
        x, position = self.tokens(signal, xyz)
        for earlier in self.layers[:layer]:
            x = earlier(x, position, signal.shape[2])
        q, k, _ = self.layers[layer].queries_keys_values(x, position)
        mask = block_causal_mask(signal.shape[1] // self.config.timepoint_patching_size, signal.shape[2]).to(x.device)
        scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(~mask, -math.inf)
        return scores.softmax(dim=-1)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Masking and loss


def random_mask(B, N, V, mask_ratio, generator=None):
    """bool [B, N, V], True = hidden: exactly round(mask_ratio * N * V) tokens of each sample, anywhere."""
    num_hidden = round(mask_ratio * N * V)
    if num_hidden == 0:
        raise BadInput(f"mask_ratio {mask_ratio} hides none of {N * V} tokens: there is nothing to reconstruct")
    order = torch.rand(B, N * V, generator=generator).argsort(dim=1)
    return torch.zeros(B, N * V, dtype=torch.bool).scatter_(1, order[:, :num_hidden], True).view(B, N, V)


def forward_mask(B, N, V):
    """bool [B, N, V], True = hidden: the last temporal token of each parcel. Reconstructing it is forecasting."""
    mask = torch.zeros(B, N, V, dtype=torch.bool)
    mask[:, -1] = True
    return mask


def repeated_forward_mask(B, N, V, generator=None):
    """The forward mask, and of the earlier temporal tokens a third, the same in all samples, hidden as well: a forecast
    after each gap, several times the lesson of a single one at the window's end. For training."""
    return forward_mask(B, N, V) | (torch.rand(N, 1, generator=generator) < 1 / 3)


def reconstruction_loss(prediction, signal, mask, loss_fn="mse"):
    """Mean squared or absolute error over hidden tokens. prediction, signal [B, T, V], mask [B, N, V]."""
    P = signal.shape[1] // mask.shape[1]
    error = (prediction - signal)[mask.repeat_interleave(P, dim=1)]
    return error.square().mean() if loss_fn == "mse" else error.abs().mean()


# ----------------------------------------------------------------------------------------------------------------------
# 7. Head


class BrainLMRegressor(Pretrained):
    """Backbone and a 3-layer MLP: signal [B, T, V] -> [B], in the target's own units (years, points, ...).

    The MLP reads CLS beside the mean and the spread of all parcel tokens: reconstruction trains these and not CLS, and
    few recordings are enough to use them. Features and target are standardised by the training data's means and
    standard deviations, which are part of the model: what tells people apart is a few percent of a feature.
    """

    def __init__(self, config, target_mean=0.0, target_std=1.0):
        super().__init__()
        H = config.hidden_size
        self.config = config
        self.backbone = BrainLM(config)
        self.mlp = nn.Sequential(nn.Linear(3 * H, H), nn.GELU(), nn.Linear(H, H // 2), nn.GELU(), nn.Linear(H // 2, 1))
        self.register_buffer("feature_mean", torch.zeros(3 * H))
        self.register_buffer("feature_std", torch.ones(3 * H))
        self.register_buffer("target_mean", torch.tensor(float(target_mean)))
        self.register_buffer("target_std", torch.tensor(float(target_std)))

    def features(self, signal, xyz):
        """CLS, mean and standard deviation over the parcel tokens, side by side: [B, T, V] -> float32 [B, 3 * H]."""
        hidden = self.backbone(signal, xyz)[1].float()                               # [B, S, H]
        return torch.cat([hidden[:, 0], hidden[:, 1:].mean(dim=1), hidden[:, 1:].std(dim=1, correction=0)], dim=1)

    def forward(self, signal, xyz):
        features = (self.features(signal, xyz) - self.feature_mean) / self.feature_std
        return self.mlp(features).squeeze(1).float() * self.target_std + self.target_mean


# ----------------------------------------------------------------------------------------------------------------------
# 8. Checkpoints


def optional(package):
    """Import a package that only some features need; BadInput says how to install it when it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise BadInput(f"this needs the package {package}: pip install {package.split('.')[0]} ({error})") from None


def write_atomically(path, write):
    """Call write(file) on a new file beside path and rename it into place: at any instant path is the old file or the
    new one. Raises OSError if that fails (disk full, no permission); the old file is then still there."""
    temporary = Path(path).with_name(f".{Path(path).name}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                        # torch.save wraps OSError into RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path} ({first_line(error)}): what was saved before is intact") from None


def to_json(content, indent=None):
    """JSON has no NaN and no infinity: null stands for them."""
    def finite(value):
        if isinstance(value, dict):
            return {name: finite(each) for name, each in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps(finite(content), indent=indent) + "\n"


def write_json(path, content):
    write_atomically(path, lambda file: file.write(to_json(content, indent=2).encode()))


def load_tensors(path):
    """The dict in a file of torch.save (plain tensors and numbers only) or, by its name, of safetensors."""
    load = optional("safetensors.torch").load_file if path.suffix == ".safetensors" else functools.partial(
        torch.load, map_location="cpu", weights_only=True)
    try:
        return dict(load(path))
    except Exception as error:      # a cut file raises one of half a dozen kinds
        raise BadInput(f"{path} is missing, truncated or no checkpoint ({type(error).__name__})") from None


def save_model(model, folder):
    """Write a BrainLM or BrainLMRegressor as a folder that from_pretrained, and the Hugging Face Hub, can read. In a
    notebook into which this file was pasted there is no file to copy: the Hub then lacks brainlm.py."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hub_model = "BrainLMForRegression" if isinstance(model, BrainLMRegressor) else "BrainLMForPreTraining"
    write_json(folder / "config.json", asdict(model.config) | {
        "model_type": "brainlm", "architectures": [hub_model],
        "auto_map": {"AutoConfig": f"brainlm.{hub_model}Config", "AutoModel": f"brainlm.{hub_model}",
                     "AutoModelForPreTraining": f"brainlm.{hub_model}"}})
    if "__file__" in globals():
        source = Path(__file__).read_bytes()
        write_atomically(folder / "brainlm.py", lambda file: file.write(source))
    write_atomically(folder / "pytorch_model.bin", lambda file: torch.save(model.state_dict(), file))
    (folder / "model.safetensors").unlink(missing_ok=True)      # of another model: one folder, one model


def load_model(model_class, name_or_path):
    """A BrainLM or BrainLMRegressor from a run folder, or from the Hub by its "user/name", in evaluation mode.

    BrainLM also takes the backbone of a regressor's folder. Raises BadInput if anything is missing, broken or of
    another shape.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if str(name_or_path).count("/") != 1 or str(name_or_path).startswith((".", "/", "~")):
            raise BadInput(f"{folder}: no such run folder (python brainlm.py pretrain makes one)")
        hub = optional("huggingface_hub")
        try:
            folder = Path(hub.snapshot_download(str(name_or_path)))
        except Exception as error:      # offline, unknown, private, ...: the Hub's own words say which
            raise BadInput(f"{name_or_path}: no such folder here, and the Hub did not give it "
                           f"({first_line(error)})") from None
    try:
        config = BrainLMConfig.from_dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / 'config.json'} is missing or is no BrainLM configuration ({error!r})") from None
    safe, plain = folder / "model.safetensors", folder / "pytorch_model.bin"
    weights = load_tensors(safe if safe.exists() else plain)    # of two, the one that transformers takes
    weights = {str(name).removeprefix("model."): value for name, value in weights.items()}       # the Hub's prefix
    if model_class is BrainLM and "target_mean" in weights:
        weights = {name.removeprefix("backbone."): value for name, value in weights.items() if "backbone." in name}
    model = model_class(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        fault = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise BadInput(f"{folder}: the weights do not fit {model_class.__name__} and config.json: {fault}") from None
    return model.eval()


def __getattr__(name):
    """The classes that the Hub looks up by name (auto_map in config.json), made on first use (PEP 562): importing
    brainlm never imports transformers. Each model has a configuration class of its own, since transformers remembers
    one model class for each configuration class."""
    hub_model = name.removesuffix("Config")
    if hub_model not in ("BrainLMForPreTraining", "BrainLMForRegression"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    model_class = BrainLM if hub_model == "BrainLMForPreTraining" else BrainLMRegressor
    transformers = optional("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "brainlm"

        def __init__(self, **values):
            settings = {option.name for option in fields(BrainLMConfig)} & values.keys()
            super().__init__(**values | asdict(BrainLMConfig(**{name: values[name] for name in settings})))

    class Model(transformers.PreTrainedModel):
        config_class, base_model_prefix = Config, "model"

        def __init__(self, config):
            super().__init__(config)
            self.model = model_class(BrainLMConfig.from_dict(config.to_dict()))
            self.post_init()

        def _init_weights(self, module):
            """Nothing to add: BrainLM initialises itself."""

        def forward(self, *inputs, **named):
            return self.model(*inputs, **named)

    for made, made_name in ((Config, f"{hub_model}Config"), (Model, hub_model)):
        made.__module__, made.__name__, made.__qualname__ = __name__, made_name, made_name
        globals()[made_name] = made
    return globals()[name]


# ----------------------------------------------------------------------------------------------------------------------
# 9. Evaluation: models and baselines are functions (signal, mask) -> prediction, scored on the same hidden tokens

RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)    # times the mean variance; the best on the evaluated windows counts
HORIZONS = (1, 2, 3, 5, 10, 20)                     # timepoints ahead
MAX_BASELINE_ROWS = 500                             # training recordings that the baselines are fitted to, at most


def error_sums(prediction, target, mask):
    """What every score is made of, at each timepoint of the hidden patches, in float64: count, sum of the target, of
    its square, of the squared and of the absolute error, [5, P]. Sums add up over batches and processes."""
    P = target.shape[1] // mask.shape[1]
    target = patchify(target, P)[mask].double()                                      # [hidden tokens, P]
    error = patchify(prediction, P)[mask].double() - target
    sums = torch.ones_like(target), target, target.square(), error.square(), error.abs()
    return torch.stack([each.sum(dim=0) for each in sums])


def scores(sums):
    """R2 = 1 - SSE / SST (never clipped), MSE and MAE from one column of error_sums, or from its sum over columns."""
    count, target, target_square, square, absolute = sums.tolist()
    variation = target_square - target ** 2 / count
    R2 = 1 - square / variation if variation > 0 else -math.inf
    return {"R2": R2, "MSE": square / count, "MAE": absolute / count}


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def model_predictor(model, xyz, device, dtype=torch.float32):
    """A BrainLM as a function (signal, mask) -> prediction, all on the CPU in float32."""
    @torch.no_grad()
    def predict(signal, mask):
        model.eval()
        with autocast(device, dtype):
            return model(signal.to(device), xyz.to(device), mask.to(device))[0].float().cpu()
    return predict


def score_reconstruction(predictors, dataset, windows, config, forward, batch_size):
    """{name: error_sums} of {name: predictor} over windows [(row, start), ...] under the random or the forward mask.

    The i-th window always gets the same mask. In a distributed run every process takes its share of the windows.
    """
    T, P, V = config.num_timepoints_per_voxel, config.timepoint_patching_size, dataset.num_parcels
    totals = torch.zeros(len(predictors), 5, P, dtype=torch.float64)
    mine = range(rank(), len(windows), world_size())
    for i in range(0, len(mine), batch_size):
        chosen = mine[i:i + batch_size]
        signal = dataset.batch([windows[j] for j in chosen], T)
        mask = forward_mask(len(chosen), T // P, V) if forward else torch.cat([
            random_mask(1, T // P, V, config.mask_ratio, torch.Generator().manual_seed(j)) for j in chosen])
        for total, predict in zip(totals, predictors.values()):
            total += error_sums(predict(signal, mask), signal, mask)
    return dict(zip(predictors, sum_over_processes(totals)))


def gaussian_conditional(dataset):
    """The opponent in masked reconstruction: the parcels' covariance S from training data, and at each timepoint
    x_hidden = mean + S_hv (S_vv + ridge)^-1 (x_visible - mean). Returns {(name, ridge): predictor}."""
    V, rows = dataset.num_parcels, range(min(len(dataset), MAX_BASELINE_ROWS))
    count, total, square = 0, np.zeros(V), np.zeros((V, V))
    for row in rows:
        signal = dataset.window(row).astype(np.float64)
        count, total, square = count + len(signal), total + signal.sum(0), square + signal.T @ signal
    mean = total / count
    covariance = square / count - np.outer(mean, mean)

    def predictor(ridge):
        penalty = ridge * max(np.trace(covariance) / V, 1e-12)       # all constant: predict the mean

        def predict(signal, mask):
            prediction = patchify(signal, signal.shape[1] // mask.shape[1]).numpy().copy()       # [B, N, V, P]
            for patches, hidden in zip(prediction.reshape(-1, V, prediction.shape[3]), mask.flatten(0, 1).numpy()):
                visible = ~hidden
                gram = covariance[np.ix_(visible, visible)] + penalty * np.eye(visible.sum())
                weights = np.linalg.solve(gram, patches[visible] - mean[visible, None])
                patches[hidden] = mean[hidden, None] + covariance[np.ix_(hidden, visible)] @ weights
            return unpatchify(torch.from_numpy(prediction))
        return predict
    return {("Gaussian conditional mean", ridge): predictor(ridge) for ridge in RIDGES}


def ridge_regression(pairs):
    """Sums over pairs (inputs [n, a], outputs [n, b]), one for each recording. Returns a function: ridge -> the weights
    [a, b] and the intercept [b], which no ridge shrinks: inputs and outputs are centred first."""
    count, input_sum, output_sum, gram, moment = 0, 0.0, 0.0, 0.0, 0.0
    for inputs, outputs in pairs:
        count += len(inputs)
        input_sum = input_sum + inputs.sum(axis=0)
        output_sum = output_sum + outputs.sum(axis=0)
        gram = gram + inputs.T @ inputs
        moment = moment + inputs.T @ outputs
    input_mean, output_mean = input_sum / count, output_sum / count
    gram = gram - count * np.outer(input_mean, input_mean)
    moment = moment - count * np.outer(input_mean, output_mean)
    scale = max(np.trace(gram) / len(gram), 1e-12)              # all constant: predict the mean

    def solve(ridge):
        weights = np.linalg.solve(gram + ridge * scale * np.eye(len(gram)), moment)
        return weights, output_mean - input_mean @ weights
    return solve


def forecasting_baselines(dataset, P):
    """The opponents in forecasting P timepoints: {(name, ridge): predictor}. Persistence repeats the last value; ridge
    autoregression maps a parcel's own last P timepoints to its next P, one map for all parcels; vector
    autoregression maps the last two timepoints of all parcels to the next one, and is iterated."""
    def recordings():
        return (dataset.window(row).astype(np.float64) for row in range(min(len(dataset), MAX_BASELINE_ROWS)))
    sliding = np.lib.stride_tricks.sliding_window_view
    runs = (sliding(signal, 2 * P, axis=0).reshape(-1, 2 * P) for signal in recordings())
    own = ridge_regression((run[:, :P], run[:, P:]) for run in runs)
    everyone = ridge_regression((np.hstack([signal[1:-1], signal[:-2]]), signal[2:]) for signal in recordings())

    def persistence(past):
        return past[:, -1:].repeat(P, axis=1)

    def autoregression(ridge):
        weights, intercept = own(ridge)
        return lambda past: (past[:, -P:].swapaxes(1, 2) @ weights + intercept).swapaxes(1, 2)

    def vector_autoregression(ridge):
        weights, intercept = everyone(ridge)

        def iterate(past):
            before, last, future = past[:, -2], past[:, -1], []
            for _ in range(P):
                before, last = last, np.hstack([last, before]) @ weights + intercept
                future.append(last)
            return np.stack(future, axis=1)
        return iterate

    def predictor(future):
        def predict(signal, mask):
            past = signal[:, :-P]
            return torch.cat([past, torch.from_numpy(future(past.numpy()).astype(np.float32))], dim=1)
        return predict
    return {("persistence", 0): predictor(persistence)} | {
        (name, ridge): predictor(method(ridge)) for ridge in RIDGES for name, method in
        [("ridge autoregression", autoregression), ("2-lag vector autoregression", vector_autoregression)]}


def evaluate_reconstruction(model, xyz, device, dtype, train_set, val_set, windows, batch_size):
    """The first two tables of the evaluation, {title: {method: {score: value}}}: masked patches and forecasting, the
    model beside the baselines, each baseline at the ridge that suits these very windows best."""
    config, tables = model.config, {}
    T, P = config.num_timepoints_per_voxel, config.timepoint_patching_size
    tasks = [(f"masked patches ({config.mask_ratio:.0%} hidden, {len(windows)} windows)", False, gaussian_conditional)]
    if T - P >= max(P, 2):
        tasks.append((f"forecasting {P} timepoints from {T - P} ({len(windows)} windows)", True,
                      functools.partial(forecasting_baselines, P=P)))
    for title, forward, opponents in tasks:
        predictors = {("BrainLM", 0): model_predictor(model, xyz, device, dtype), **opponents(train_set)}
        sums = score_reconstruction(predictors, val_set, windows, config, forward, batch_size)
        rows = []
        for (name, ridge), each in sums.items():
            by_horizon = {f"R2 at {h}": scores(each[:, h - 1])["R2"] for h in HORIZONS if forward and h <= P}
            rows.append((name, scores(each.sum(dim=1)) | by_horizon | ({"ridge": ridge} if ridge else {})))
        rows.sort(key=lambda row: row[1]["R2"], reverse=True)
        table = tables[title] = {"BrainLM": {}}                      # the first line; then the best method first
        for name, row in rows:
            if not table.get(name):                                  # of one method the best ridge
                table[name] = row
    return tables


def knn_accuracy(distance, labels, k=5):
    """Share of V items, distance [V, V], whose label is the commonest among their k nearest others (ties: nearest)."""
    distance = distance + np.diag(np.full(len(distance), np.inf))
    right = 0
    for row, label in zip(distance, labels):
        nearest = [labels[i] for i in np.argsort(row, kind="stable")[:min(k, len(row) - 1)]]
        right += max(nearest, key=nearest.count) == label
    return right / len(labels)


def evaluate_networks(model, xyz, device, dataset, windows, networks):
    """Zero-shot functional networks: the label of a left-out parcel from its nearest neighbours among the others, by
    the model's embedding, by the coordinates, by functional connectivity. {title: {method: {score: value}}}"""
    T, V = model.config.num_timepoints_per_voxel, dataset.num_parcels
    embedding, connectivity = np.zeros((model.config.hidden_size, V)), np.zeros((V, V))
    for window in windows:
        signal = dataset.batch([window], T)
        embedding += model.embed(signal.to(device), xyz.to(device))[1][0].float().cpu().numpy().T
        connectivity += correlation(signal[0].numpy())
    methods = {"BrainLM embedding": 1 - correlation(embedding), "coordinates": torch.cdist(xyz, xyz).numpy(),
               "functional connectivity profile": 1 - correlation(connectivity)}
    return {f"functional networks of left-out parcels (5 nearest neighbours of {V})":
            {name: {"accuracy": knn_accuracy(distance, networks)} for name, distance in methods.items()}}


def correlation(signal):
    """Correlation of columns, [T, V] -> [V, V], 0 for constant ones: a recording's functional connectivity."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(np.atleast_2d(np.corrcoef(signal, rowvar=False)))


def regression_scores(prediction, target):
    """MAE and MSE in the target's units, R2 (never clipped) and Pearson r, of two numpy vectors."""
    error = prediction - target
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"MAE": float(np.abs(error).mean()), "MSE": float(np.square(error).mean()),
                "R2": float(1 - np.square(error).sum() / np.square(target - target.mean()).sum()),
                "r": float(np.corrcoef(prediction, target)[0, 1])}


def connectivity_ridge(train_set, train_rows, train_target, val_set, val_rows):
    """The opponent in regression: ridge on functional connectivity, its penalty chosen by leave-one-out on the training
    recordings. Returns predictions for val_rows."""
    upper = np.triu_indices(train_set.num_parcels, k=1)
    train_rows, train_target = train_rows[:MAX_BASELINE_ROWS], train_target[:MAX_BASELINE_ROWS]
    train = np.stack([correlation(train_set.window(row))[upper] for row in train_rows])
    val = np.stack([correlation(val_set.window(row))[upper] for row in val_rows])
    center, mean = train.mean(axis=0), train_target.mean()
    train, val, target = train - center, val - center, train_target - mean
    values, vectors = np.linalg.eigh(train @ train.T)          # dual form: many more connections than recordings
    least, best = np.inf, None
    for ridge in np.logspace(-3, 3, 25) * max(values.mean(), 1e-12):
        inverse = vectors / (values + ridge) @ vectors.T
        weights = inverse @ target
        error = np.square(weights / np.diag(inverse)).mean()   # of each recording, predicted from the others
        if best is None or error < least:
            least, best = error, weights
    return mean + val @ train.T @ best


def markdown(tables):
    """The tables as lines of Markdown, for the terminal and for the model card."""
    lines = []
    for title, table in tables.items():
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
        width = max(map(len, [title, *table]))
        lines += ["", f"| {title:<{width}} |" + "".join(f"{column:>10} |" for column in columns),
                  f"| {'-' * width} |" + " --------: |" * len(columns)]
        for name, row in table.items():
            numbers = (f"{row[column]:.4g}" if column in row else "" for column in columns)
            lines.append(f"| {name:<{width}} |" + "".join(f"{number:>10} |" for number in numbers))
    return "\n".join(lines)


def plot_evaluation(path, model, xyz, device, dataset, windows, tables):
    """A picture of what the tables say, for one window of the dataset; needs matplotlib."""
    optional("matplotlib").use("Agg")
    plt, config = optional("matplotlib.pyplot"), model.config
    T, P, V = config.num_timepoints_per_voxel, config.timepoint_patching_size, dataset.num_parcels
    signal, predict = dataset.batch(windows[:1], T), model_predictor(model, xyz, device)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.5), width_ratios=[2, 1, 1], layout="constrained")
    for axis, mask, title in ((left, random_mask(1, T // P, V, config.mask_ratio, torch.Generator().manual_seed(0)),
                               "hidden patches, reconstructed"), (middle, forward_mask(1, T // P, V), "forecast")):
        shown = np.arange(max(0, T - 3 * P) if axis is middle else 0, T)
        prediction = torch.where(mask.repeat_interleave(P, dim=1), predict(signal, mask), math.nan)
        for i, parcel in enumerate(range(0, V, max(1, V // 3))[:3]):
            for name, curve, color in (("truth", signal, "0.6"), ("BrainLM", prediction, "C3")):
                axis.plot(shown, curve[0, shown, parcel] - 4 * i, color=color, label=None if i else name)
        axis.set(title=title, xlabel="timepoint", ylabel="BOLD, three parcels", yticks=[])
        axis.margins(y=0.15)                            # room for the legend
        axis.legend(loc="upper left", ncols=2)
    for name, row in (item for table in tables.values() for item in table.items() if "R2 at 1" in item[1]):
        steps = [h for h in HORIZONS if f"R2 at {h}" in row]
        color = "C3" if name == "BrainLM" else None
        right.plot(steps, [row[f"R2 at {h}"] for h in steps], "o-", label=name, color=color)
    right.set(title="forecast R2", xlabel="timepoints ahead", ylim=(-0.5, 1))
    right.axhline(0, color="0.8", zorder=0)
    if right.lines[1:]:
        right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# 10. Training


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def say(message):
    if rank() == 0:
        print(message, flush=True)


def barrier():
    if world_size() > 1:
        dist.barrier()


def from_rank_0(value):
    """What rank 0 passes, on every rank: whatever depends on one machine's files or processor is decided there."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def sum_over_processes(tensor):
    if world_size() > 1:
        on_device = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        dist.all_reduce(on_device)
        tensor = on_device.cpu()
    return tensor


def pick_device(args):
    """--device, where auto is the fastest that the machine has. Starts the process group under torchrun."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise BadInput(f"--device {name}: this machine or this build of torch has none")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
    if name == "cuda":
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
    if name == "cpu":
        keep_freed_memory()
    return device


def pick_dtype(args, device, recorded=None):
    """--dtype, where auto is what a resumed run was trained in so far, else bfloat16 where it is faster: on GPUs of CUDA
    and on CPUs with units for it. Other CPUs emulate it. No stopwatch: the same machine always gets the same type."""
    name = args.dtype
    if name == "auto":
        name = recorded or "float32"
        units = torch.cpu.get_capabilities()
        if not recorded and (device.type == "cuda" or
                             device.type == "cpu" and (units.get("amx_bf16") or units.get("avx512_bf16"))):
            name = "bfloat16"
    return getattr(torch, from_rank_0(name))


def keep_freed_memory():
    """glibc returns the pages of large tensors to the system at once and faults them in again a moment later, which
    costs a quarter of a training step: tell it to keep them."""
    with contextlib.suppress(OSError, AttributeError):  # another system, another libc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 2 ** 28)):    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)


class RunFolder:
    """The output folder of a run, one process's own while it trains. Rank 0 alone reads and writes it: other ranks, that
    may be on machines without this disk, are told what it holds.

    state is what a stopped run left there, else None; metrics are the lines of metrics.jsonl.
    """

    FILES = ("training_state.pt", "config.json", "pytorch_model.bin", "brainlm.py", "args.json", "metrics.jsonl",
             "README.md", "evaluation.json", "evaluation.png")

    def __init__(self, args, config):
        self.path, self.lock, state = Path(args.output_dir), None, None
        self.args = {name: value for name, value in vars(args).items() if name != "run"}
        if args.model_name_or_path and Path(args.model_name_or_path).resolve() == self.path.resolve():
            raise BadInput(f"--output_dir {self.path} is the folder that training starts from: choose another")
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            self.take_lock()
            present = [name for name in self.FILES if (self.path / name).exists()]
            if present and "training_state.pt" not in present:
                raise BadInput(f"{self.path} holds {present[0]}, and not of a run: choose another --output_dir")
            if args.overwrite_output_dir:
                for name in reversed(present):          # training_state.pt last: until then it is known as a run
                    (self.path / name).unlink()
            elif present:
                state = self.read_state(args, config)
        self.state = from_rank_0(state)
        self.metrics = self.state["metrics"] if self.state else []

    def take_lock(self):
        with contextlib.suppress(ImportError):          # Windows has no fcntl: no lock there
            fcntl = importlib.import_module("fcntl")
            self.lock = open(self.path / ".lock", "w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)       # ends with the process, however it ends
            except BlockingIOError:
                raise BadInput(f"{self.path} is in use: another process is training there") from None
            except OSError:
                pass                                    # a file system without locks

    def read_state(self, args, config):
        """training_state.pt, refused if it is of another kind of run or of another model."""
        try:
            state = load_tensors(self.path / "training_state.pt")
        except BadInput as error:
            raise BadInput(f"{error}: start anew with --overwrite_output_dir") from None
        before, before_config = state.get("args"), state.get("config")
        if before is None or before_config is None:
            raise BadInput(f"{self.path} holds a run of another version of this program: choose another --output_dir, "
                           "or start anew with --overwrite_output_dir")
        differences = [f"{name} {before_config.get(name)} there and {value} now"
                       for name, value in asdict(config).items() if before_config.get(name) != value]
        for name in ("command", "variable_of_interest_col_name", "freeze_backbone"):
            if before.get(name) != self.args.get(name):
                differences.append(f"{name} {before.get(name)} there and {self.args.get(name)} now")
        if differences:
            raise BadInput(f"{self.path} holds a run with other flags ({'; '.join(differences)}): use the same flags "
                           "to resume it, another --output_dir, or --overwrite_output_dir to start anew")
        for name, value in self.args.items():
            if name not in ("output_dir", "overwrite_output_dir") and before.get(name) != value:
                say(f"note: resuming with {name} {value}, was {before.get(name)}")
        return state

    def log(self, **metrics):
        self.metrics.append(to_json(metrics))
        if rank() == 0:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(self.metrics[-1])

    def save(self, model, state):
        """First training_state.pt, complete, so that what resumes is always of one step; then what users read."""
        if rank() == 0:
            state = state | {"model": model.state_dict(), "metrics": self.metrics, "args": self.args,
                             "config": asdict(model.config)}
            write_atomically(self.path / "training_state.pt", lambda file: torch.save(state, file))
            write_json(self.path / "args.json", self.args)
            write_atomically(self.path / "metrics.jsonl", lambda file: file.write("".join(self.metrics).encode()))
            model.save_pretrained(self.path)


def make_optimizers(model, learning_rate, weight_decay):
    """Muon for the layers' matrices, at three times the learning rate (its steps have AdamW's size, all directions of a
    matrix alike: here the largest single gain in learning speed), AdamW for the rest. Only matrices decay."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if "layers." in name and p.dim() == 2]
    others = [p for name, p in trained.items() if "layers." not in name and p.dim() == 2]
    vectors = [p for p in trained.values() if p.dim() < 2]
    adamw = torch.optim.AdamW([{"params": others, "weight_decay": weight_decay, "scale": 1.0},
                               {"params": vectors, "weight_decay": 0.0, "scale": 1.0}],
                              lr=learning_rate, betas=(0.9, 0.95), fused=True)
    if not matrices:                                    # a frozen backbone
        return [adamw]
    return [adamw, torch.optim.Muon([{"params": matrices, "scale": 3.0}], lr=learning_rate, momentum=0.95,
                                    weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]


def fit(args, model, folder, device, dtype, num_recordings, batch_loss, validate):
    """Train model and leave it in folder; both commands come here. Returns the number of steps.

    batch_loss(model, samples, step) -> scalar loss of the samples with these numbers; validate() -> {metric: value}.
    Sample numbers go on from step to step; of each step's, every process and every accumulated batch takes its own.
    """
    batch, accumulation, world = args.per_device_train_batch_size, args.gradient_accumulation_steps, world_size()
    samples_per_step = batch * accumulation * world
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(model, args.learning_rate, args.weight_decay)
    first_step, samples, loss_sum, loss_count = 0, 0, 0.0, 0         # losses since the last line of progress
    if folder.state:
        try:
            model.load_state_dict(folder.state["model"])
            for optimizer, state in zip(optimizers, folder.state["optimizers"], strict=True):
                settings = optimizer.state_dict()["param_groups"]   # from the flags of now
                optimizer.load_state_dict(state | {"param_groups": settings})
            first_step, samples = folder.state["step"], folder.state["samples"]
            loss_sum, loss_count = folder.state["loss_sum"], folder.state["loss_count"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{folder.path / 'training_state.pt'} does not fit this model "
                           f"({first_line(error)}): start anew with --overwrite_output_dir") from None
        folder.state = None
    left = math.ceil(args.num_train_epochs * num_recordings - samples) / samples_per_step
    num_steps = args.max_steps or first_step + max(0, math.ceil(left))
    if num_steps < first_step:
        raise BadInput(f"--max_steps {num_steps}: {folder.path} has been trained for {first_step} steps already")
    if first_step:
        say(f"resuming {folder.path} after step {first_step} of {num_steps}")
    warmup = max(1, round(args.warmup_ratio * num_steps))

    def save(step):
        folder.save(model, {"step": step, "samples": samples, "loss_sum": loss_sum, "loss_count": loss_count,
                            "dtype": str(dtype).removeprefix("torch."),
                            "optimizers": [optimizer.state_dict() for optimizer in optimizers]})

    save(first_step)                                    # loadable from the start, however the last run ended
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    compiled = device.type == "cuda" if args.compile is None else args.compile
    stepper = torch.compile(parallel) if compiled else parallel
    started = time.monotonic()
    for step in range(first_step, num_steps):
        decayed = max(0, step - warmup) / max(1, num_steps - warmup)                 # 0 at the end of warm-up, to 1
        rate = args.learning_rate * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * decayed))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group["scale"]
        torch.manual_seed(generator(args.seed, "dropout", step * world + rank()).initial_seed())
        model.train()
        loss = torch.zeros((), dtype=torch.float64)
        for i in range(accumulation):
            first = samples + (i * world + rank()) * batch
            with autocast(device, dtype):
                part = batch_loss(stepper, range(first, first + batch), step) / accumulation
            part.backward()
            loss += part.item()
        loss = sum_over_processes(loss).item() / world
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        if not math.isfinite(loss) or not norm.isfinite():
            raise BadInput(f"step {step + 1}: the loss is {loss} and its gradient's norm {norm:.3g}, training "
                           f"stops and {folder.path} keeps its last checkpoint (try a lower --learning_rate, or "
                           "--dtype float32)")
        if step > first_step and step % args.save_steps == 0:       # only now is it known that this model was good
            save(step)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

        samples, loss_sum, loss_count = samples + samples_per_step, loss_sum + loss, loss_count + 1
        done, last = step + 1, step + 1 == num_steps
        if done % args.logging_steps == 0 or last:
            seconds, mean = time.monotonic() - started, loss_sum / loss_count
            speed = (done - first_step) / seconds
            left = datetime.timedelta(seconds=round((num_steps - done) / speed))
            say(f"step {done:>{len(str(num_steps))}}/{num_steps}  loss {mean:.4f}  lr {rate:.2e}  "
                f"{speed * samples_per_step:.1f} samples/s  {left} left")
            folder.log(step=done, loss=mean, learning_rate=rate, seconds=round(seconds, 2))
            loss_sum, loss_count = 0.0, 0
        if args.eval_steps and done % args.eval_steps == 0 and not last:
            metrics = validate()
            say("  validation  " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
            folder.log(step=done, **metrics)
    save(num_steps)
    model.eval()
    return num_steps


# ----------------------------------------------------------------------------------------------------------------------
# 11. Commands


def open_data(args, window, max_train=None, max_val=None):
    """Coordinates, training and validation recordings of a command; makes the sample data if none are named."""
    paths = (args.train_dataset_path, args.val_dataset_path, args.coords_dataset_path)
    if all(path.startswith("./sample_data/") for path in paths):
        if not Path("sample_data/train/state.json").exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            say("no ./sample_data yet: making it (python sample_data.py)")
            if not Path(__file__).with_name("sample_data.py").exists():
                raise BadInput(f"no sample_data.py beside {__file__}: get it too, or name datasets of your own")
            importlib.import_module("sample_data").make_sample_data("./sample_data")
        barrier()                                       # one process of each machine makes them, all wait
    xyz, networks = read_coordinates(args.coords_dataset_path)
    sets = [RecordingDataset(path, args.recording_col_name, window, len(xyz), max_samples)
            for path, max_samples in ((args.train_dataset_path, max_train), (args.val_dataset_path, max_val))]
    for dataset in sets:
        dataset.check_values()
    say(f"data: {len(sets[0])} training and {len(sets[1])} validation recordings, {len(xyz)} parcels, "
        f"windows of {window}")
    return xyz, networks, *sets


def describe(args, model, S, device, dtype):
    """One line on what is about to run, with an estimate of its memory: weights, gradients and two moments in float32,
    and what backward needs of every token, as measured (with gradient checkpointing, of one layer at a time)."""
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    tokens, size, layers = args.per_device_train_batch_size * S, torch.finfo(dtype).bits // 8, config.num_hidden_layers
    layer = tokens * (22 * config.hidden_size + 3 * config.intermediate_size) * size
    stored = layer + layers * tokens * config.hidden_size * 4 if args.gradient_checkpointing else layers * layer
    say(f"model: {parameters:,} parameters, {tokens * args.gradient_accumulation_steps * world_size():,} tokens a "
        f"step, about {0.2 + (16 * parameters + stored) / 2 ** 30:.1f} GiB, {world_size()} x {device.type}, "
        f"{str(dtype).removeprefix('torch.')}")


def finish(folder, num_steps, tables, dataset):
    """Print the tables, log them, and put them into the run folder's model card, which the Hub shows."""
    say(markdown(tables))
    if rank() > 0:
        return
    with open(folder.path / "metrics.jsonl", "a") as file:      # after what the training state holds: made anew each time
        file.write(to_json({"step": num_steps, "tables": tables}))
    config = json.loads((folder.path / "config.json").read_text())
    card = f"""---
license: apache-2.0
library_name: transformers
tags: [fmri, brainlm]
---
# BrainLM

{config["architectures"][0]}: {config["num_hidden_layers"]} layers, hidden size {config["hidden_size"]}, patches of
{config["timepoint_patching_size"]} timepoints, trained for {num_steps} steps on windows of
{config["num_timepoints_per_voxel"]} timepoints from `{dataset.recording_col}` of `{Path(dataset.path).name}`
({len(dataset)} recordings, {dataset.num_parcels} parcels). Beside it, closed-form baselines on the same windows.
{markdown(tables)}

Load it with `AutoModelForPreTraining.from_pretrained(..., trust_remote_code=True)`, or with the file `brainlm.py` here.
The method: Ortega Caro et al., BrainLM: A foundation model for brain activity recordings, ICLR 2024.
"""
    write_atomically(folder.path / "README.md", lambda file: file.write(card.encode()))


def pretrain(args):
    """Learn to reconstruct hidden tokens."""
    flags = {each.name: getattr(args, each.name) for each in fields(BrainLMConfig) if each.name in args}
    if args.model_name_or_path:
        weights = BrainLM.from_pretrained(args.model_name_or_path)
        flags = asdict(weights.config) | flags
        shape = [name for name in ("timepoint_patching_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                   "intermediate_size") if flags[name] != getattr(weights.config, name)]
        if shape:
            raise BadInput(f"--{shape[0]} {flags[shape[0]]}: the weights of {args.model_name_or_path} have "
                           f"{getattr(weights.config, shape[0])}")
    config = BrainLMConfig(**flags)
    T, P = config.num_timepoints_per_voxel, config.timepoint_patching_size
    device = pick_device(args)
    xyz, _, train_set, val_set = open_data(args, T, args.max_train_samples, args.max_eval_samples)
    random_mask(1, T // P, len(xyz), config.mask_ratio)     # refuses a ratio that hides nothing; no folder is made yet
    folder = RunFolder(args, config)
    dtype = pick_dtype(args, device, folder.state and folder.state["dtype"])
    torch.manual_seed(args.seed)
    model = BrainLM(config)
    if args.model_name_or_path:
        model.load_state_dict(weights.state_dict())
    model.to(device)
    model.cls_token.requires_grad_(False)               # no parcel reads CLS: reconstruction cannot train it
    xyz_on_device, rows = xyz.to(device), np.arange(len(train_set))
    windows = val_set.fixed_windows(range(len(val_set)), T, stride=T)
    model.gradient_checkpointing = args.gradient_checkpointing
    describe(args, model, 1 + T // P * len(xyz), device, dtype)

    def batch_loss(model, samples, step):
        signal = train_set.batch([train_set.training_window(n, rows, T, args.seed, args.stride_prob)
                                  for n in samples], T).to(device)
        N, V = T // P, len(xyz)
        of_step = generator(args.seed, "kind of mask", step)     # the same on every rank
        if torch.rand((), generator=of_step) < args.forward_mask_prob:
            mask = repeated_forward_mask(len(samples), N, V, of_step)
        else:
            mask = torch.cat([random_mask(1, N, V, config.mask_ratio, generator(args.seed, "random mask", n))
                              for n in samples])
        mask = mask.to(device)
        # Recordings of another scanner or with movement are louder at times: a random gain, undone in the prediction.
        gain = torch.cat([torch.empty(1, 1, 1).log_normal_(0, 0.5, generator=generator(args.seed, "gain", n))
                          for n in samples]).to(device)                              # [B, 1, 1]
        return reconstruction_loss(model(gain * signal, xyz_on_device, mask)[0] / gain, signal, mask, config.loss_fn)

    def validate():
        predictors, metrics = {"BrainLM": model_predictor(model, xyz, device, dtype)}, {}
        for name, forward in (("masked", False), ("forecast", True)):
            some = windows[::max(1, len(windows) // 20)]            # enough to watch; the tables at the end take all
            sums = score_reconstruction(predictors, val_set, some, config, forward, args.per_device_eval_batch_size)
            metrics[f"{name}_R2"] = scores(sums["BrainLM"].sum(dim=1))["R2"]
        return metrics

    num_steps = fit(args, model, folder, device, dtype, len(rows), batch_loss, validate)
    tables = evaluate_reconstruction(model, xyz, device, dtype, train_set, val_set, windows,
                                     args.per_device_eval_batch_size)
    finish(folder, num_steps, tables, train_set)
    say(f"\nthe model is in {folder.path}")


def read_target(dataset, column):
    """The rows that have a target, int64, and the targets of all rows, float64 with NaN."""
    target = read_numbers(dataset.table, column, dataset.path)
    huge = np.flatnonzero(np.abs(target) > 1e30)        # its square must fit into a float32 too
    if len(huge):
        raise BadInput(f"{dataset.path}: column {column!r} is infinite in row {huge[0]} ({target[huge[0]]})")
    rows = np.flatnonzero(~np.isnan(target))
    if not len(rows):
        raise BadInput(f"{dataset.path}: column {column!r} is missing in every row")
    if len(rows) < len(target):
        say(f"{dataset.path}: {len(target) - len(rows)} of {len(target)} recordings have no {column} and are left out")
    return rows, target


def finetune(args):
    """Learn to predict a scalar of each recording."""
    backbone = BrainLM.from_pretrained(args.model_name_or_path)
    config, column = backbone.config, args.variable_of_interest_col_name
    T = config.num_timepoints_per_voxel
    device = pick_device(args)
    xyz, _, train_set, val_set = open_data(args, T, args.max_train_samples, args.max_eval_samples)
    (rows, target), (val_rows, val_target) = read_target(train_set, column), read_target(val_set, column)
    mean, std = target[rows].mean(), target[rows].std()
    if np.ptp(target[rows]) == 0:
        raise BadInput(f"{train_set.path}: column {column!r} is {mean} in every row: there is nothing to learn")
    folder = RunFolder(args, config)
    dtype = pick_dtype(args, device, folder.state and folder.state["dtype"])
    torch.manual_seed(args.seed)
    model = BrainLMRegressor(config, mean, std)
    model.backbone.load_state_dict(backbone.state_dict())
    model.to(device)
    model.backbone.gradient_checkpointing = args.gradient_checkpointing
    describe(args, model, 1 + T // config.timepoint_patching_size * len(xyz), device, dtype)
    xyz = xyz.to(device)
    if args.freeze_backbone:
        model.backbone.requires_grad_(False)
    for unused in (model.backbone.head.weight, model.backbone.head.bias, model.backbone.mask_token):
        unused.requires_grad_(False)

    def batch_loss(model, samples, step):
        windows = [train_set.training_window(n, rows, T, args.seed) for n in samples]
        wanted = torch.tensor([target[row] for row, *_ in windows], dtype=torch.float32, device=device)
        return ((model(train_set.batch(windows, T).to(device), xyz) - wanted) / std).square().mean()

    @torch.no_grad()
    def predict():
        """Predictions for val_rows: each the mean over the recording's fixed windows."""
        model.eval()
        predictions = torch.zeros(len(val_rows), dtype=torch.float64)
        for i in range(rank(), len(val_rows), world_size()):
            windows = val_set.fixed_windows(val_rows[i:i + 1], T, stride=T)
            size = args.per_device_eval_batch_size
            batches = (val_set.batch(windows[j:j + size], T) for j in range(0, len(windows), size))
            with autocast(device, dtype):
                of_windows = torch.cat([model(signal.to(device), xyz).cpu() for signal in batches])
            predictions[i] = of_windows.double().mean()
        return sum_over_processes(predictions).numpy()

    model.eval()                                        # features as they are used, without dropout
    if folder.state is None:
        with torch.no_grad(), autocast(device, dtype):
            features = torch.cat([model.features(train_set.batch([(row, 0)], T).to(device), xyz)
                                  for row in rows[:MAX_BASELINE_ROWS]])
        model.feature_mean.copy_(features.mean(dim=0))
        model.feature_std.copy_(features.std(dim=0).nan_to_num(1.0).clamp(min=1e-6))
    num_steps = fit(args, model, folder, device, dtype, len(rows), batch_loss,
                    lambda: regression_scores(predict(), val_target[val_rows]))
    methods = {"BrainLM": predict(), "training mean": np.full(len(val_rows), mean), "ridge on functional connectivity":
               connectivity_ridge(train_set, rows, target[rows], val_set, val_rows)}
    table = {name: regression_scores(prediction, val_target[val_rows]) for name, prediction in methods.items()}
    finish(folder, num_steps, {f"{column}, {len(val_rows)} validation recordings": table}, train_set)
    say(f"\nahead by MAE: {min(table, key=lambda name: table[name]['MAE'])}; the model is in {folder.path}")


def evaluate(args):
    """What the paper's tables print, for a checkpoint and any dataset, each number beside its baselines."""
    model = BrainLM.from_pretrained(args.model_name_or_path)
    T = model.config.num_timepoints_per_voxel
    device = pick_device(args)
    dtype = pick_dtype(args, device)
    xyz, networks, train_set, val_set = open_data(args, T, max_val=args.max_eval_samples)
    model.to(device)
    windows = val_set.fixed_windows(range(len(val_set)), T, stride=max(T // 4, 1))
    tables = evaluate_reconstruction(model, xyz, device, dtype, train_set, val_set, windows,
                                     args.per_device_eval_batch_size)
    if networks and len(xyz) > 1:
        tables |= evaluate_networks(model, xyz, device, val_set, windows, networks)
    say(markdown(tables))
    if rank() > 0:
        return
    name = Path(args.model_name_or_path)
    folder = name if name.is_dir() else Path("runs", name.name)          # of a model of the Hub
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", {"dataset": args.val_dataset_path, "tables": tables})
    say(f"\nwritten to {folder / 'evaluation.json'}")
    try:
        plot_evaluation(folder / "evaluation.png", model, xyz, device, val_set, windows, tables)
        say(f"pictures in {folder / 'evaluation.png'}")
    except BadInput as error:
        say(f"no picture: {error}")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")


def number(kind, low, high=math.inf, above=False):
    """A type for argparse: a number in [low, high], or in (low, high] if above."""
    def convert(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value
    convert.__name__ = kind.__name__                   # argparse names it where text is no number at all
    return convert


def command_line():
    """The flags of all commands, named as in the reference implementation where it has them."""
    parser = OneLineParser(prog="brainlm.py", description="BrainLM: a foundation model for brain activity, in one file")
    commands = parser.add_subparsers(dest="command", required=True, metavar="pretrain | finetune | evaluate")
    count, share, positive = number(int, 1), number(float, 0, 1), number(float, 0, above=True)
    for run, output_dir, model in ((pretrain, "./runs/pretrain", None),
                                   (finetune, "./runs/finetune", "./runs/pretrain"),
                                   (evaluate, None, "./runs/pretrain")):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)

        flag = command.add_argument_group("data").add_argument
        flag("--train_dataset_path", default="./sample_data/train", help="folder with the training recordings")
        flag("--val_dataset_path", default="./sample_data/val", help="folder with the validation recordings")
        flag("--coords_dataset_path", default="./sample_data/coords", help="folder with the parcels' X, Y, Z in mm")
        flag("--recording_col_name", default="Voxelwise_RobustScaler_Normalized_Recording",
             help="column of (timepoints, parcels) recordings")
        flag("--max_eval_samples", type=count, help="use only the first validation recordings")
        if run is not evaluate:
            flag("--max_train_samples", type=count, help="use only the first training recordings")
        if run is finetune:
            flag("--variable_of_interest_col_name", default="Age.At.MHQ", help="column to predict")

        flag = command.add_argument_group("model").add_argument
        flag("--model_name_or_path", default=model, help="start from the weights in this run folder or on the Hub")
        if run is finetune:
            flag("--freeze_backbone", action="store_true", help="train the MLP head alone")
        if run is pretrain:
            for each in fields(BrainLMConfig):      # suppressed where not given: a checkpoint's own value counts then
                flag(f"--{each.name}", type=each.type, default=argparse.SUPPRESS,
                     help=f"{each.metadata['help']} (default: {each.default})")

        flag = command.add_argument_group("machine").add_argument
        flag("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: the fastest there is")
        flag("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
             help="auto: bfloat16 on CUDA and on CPUs with units for it; a resumed run keeps its type")
        flag("--per_device_eval_batch_size", type=count, default=8, help="windows that evaluation takes at once")
        if run is evaluate:
            continue
        flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (None: on cuda only)")
        flag("--gradient_checkpointing", action="store_true", help="recompute layers in backward: less memory, slower")
        flag("--per_device_train_batch_size", type=count, default=2, help="recordings a process takes at once")
        flag("--gradient_accumulation_steps", type=count, default=1, help="batches that make one step")

        flag = command.add_argument_group("training").add_argument
        flag("--num_train_epochs", type=positive, default=5.0 if run is pretrain else 2.0,
             help="one window of each recording is an epoch")
        flag("--max_steps", type=count, help="steps of training, instead of epochs")
        flag("--learning_rate", type=positive, default=2e-3 if run is pretrain else 3e-4,
             help="after warm-up; cosine decay")
        flag("--weight_decay", type=number(float, 0), default=0.1, help="of matrices")
        flag("--warmup_ratio", type=share, default=0.05, help="share of the steps")
        if run is pretrain:
            flag("--forward_mask_prob", type=share, default=0.3,
                 help="share of the steps that hide temporal tokens of all parcels")
            flag("--stride_prob", type=share, default=0.4, help="share of the windows that take every 2nd or 3rd "
                 "timepoint, as if scanned more slowly: for recordings with other repetition times")
        flag("--seed", type=number(int, 0, 2 ** 63), default=0, help="of weights, windows and masks")

        flag = command.add_argument_group("run folder").add_argument
        flag("--output_dir", default=output_dir, help="checkpoints, metrics.jsonl, args.json")
        flag("--overwrite_output_dir", action="store_true", help="start anew; else the same command resumes a run")
        flag("--logging_steps", type=count, default=10, help="steps between progress lines")
        flag("--eval_steps", type=number(int, 0), default=100 if run is pretrain else 50,
             help="steps between validations; 0: only at the end")
        flag("--save_steps", type=count, default=50, help="steps between checkpoints")
    return parser


def main(words=None):
    args = command_line().parse_args(words)
    try:
        args.run(args)
    except (BadInput, OSError) as error:                # OSError: a disk that is full, a folder that is not ours
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; a run folder keeps its last checkpoint, and the same command (without --overwrite_output_dir) "
              "goes on from it", file=sys.stderr)
        sys.exit(130)                                   # what shells expect of a program that Ctrl-C ended


if __name__ == "__main__" and "__file__" in globals():  # not in a notebook cell, where sys.argv is the kernel's
    main()
