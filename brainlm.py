"""BrainLM in one file: a foundation model for brain activity (fMRI), to read, run and trust.

A recording is a matrix (timepoints, parcels): for each of, say, 424 regions (parcels) of a brain
the oxygen in its blood (BOLD), which follows neural activity by seconds, scaled to median 0 and
interquartile range 1. The model hides, say, three quarters of a window of 200 timepoints and learns
to fill them in; what it learns predicts age or clinical scores. After Ortega Caro et al., BrainLM,
ICLR 2024: https://openreview.net/forum?id=RwI7ZEfR27

Part I is the lesson (sections 1 to 9; it runs alone in a notebook cell), Part II the program.

Shapes: B batch, T timepoints, V parcels, P patch length, N = T / P temporal tokens, H hidden size,
D = H / heads, S = 1 + N * V sequence length (1: CLS, a token of no parcel, which reads all the
others). "Temporal token n", or "patch n": the n-th patches of all parcels.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Part I: the lesson, in the order of the data =====================================================

# 1. Configuration ---------------------------------------------------------------------------------

@dataclass
class BrainLMConfig:
    """What defines a model: the config.json of a run folder. Each field is a flag of `pretrain`,
    its comment the help; the names are those of the published code."""
    num_timepoints_per_voxel: int = 200       # T, timepoints of a window
    timepoint_patching_size: int = 20         # P, timepoints of a patch
    hidden_size: int = 64                     # H, width of a token
    num_hidden_layers: int = 4                # each: attention, then an MLP
    num_attention_heads: int = None           # None: an even number, about H / 64, at least 2
    intermediate_size: int = None             # width of the MLP in a layer; None: 4 * H
    mask_ratio: float = 0.75                  # share of the parcels that a random mask hides
    forward_mask_prob: float = 0.3            # share of the training steps that learn to forecast
    loss_fn: str = "mse"                      # or "mae", which outliers move less

    def __post_init__(self):
        if self.num_attention_heads is None:    # half start out looking around in space, half back
            # in time (see the appendix); few: a head has D = H / heads numbers to tell places by
            even = range(2, max(2, self.hidden_size // 64) + 1, 2)
            self.num_attention_heads = max([n for n in even if self.hidden_size % n == 0] + [2])
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size

@dataclass
class TrainingConfig:
    """How a model is trained. Each field is a flag of `pretrain` and of `finetune`."""
    per_device_train_batch_size: int = 2      # windows a process takes at once
    gradient_accumulation_steps: int = 1      # batches that make one step
    learning_rate: float = 1.5e-3             # how far a step moves a number at first; falls to 0
    seed: int = 0                             # of all that is random

# Knobs that have no flag; benchmarks/ablations.py shows what each is worth.
MAX_GRADIENT_NORM = 1.0        # longer gradients are cut to this: one odd recording moves little
FORWARD_HIDDEN = 1 / 3         # probability that a forward step hides an earlier temporal token

# 2. Data: folders as datasets.Dataset.save_to_disk of Hugging Face writes them --------------------

class BadInput(ValueError):
    """A fault in data, flags or files that the user can mend: the commands print it as one line."""

def seeded_generator(seed, stream, number):
    """A source of random numbers for one use: (0, "random mask", 17) is that of sample 17's mask.
    No draw depends on what was drawn before. So a run that was stopped goes on as if it had not
    been, and any number of processes together draws what one would."""
    digest = hashlib.sha256(f"{seed}, {stream}, {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))   # it uses 32 bits

def read_arrow(path):
    """The dataset in a folder as a pyarrow.Table. state.json lists its files, which are Arrow IPC
    streams. They are memory-mapped: a number stays on disk until somebody looks at it."""
    file, shards = Path(path, "state.json"), []
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if state.get("_indices_data_files"):
            raise ValueError("rows were selected or shuffled: flatten_indices() before saving")
        for entry in state["_data_files"]:
            file = Path(path, entry["filename"])
            shard = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
            shard.validate(full=True)           # finds offsets out of bounds, looks at no number
            shards.append(shard)
        return pa.concat_tables(shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{file} is missing, cut or not of save_to_disk; of several datasets, name "
                       f"one ({error})") from error

def read_column(table, name, path):
    """A column of the table that was read from path."""
    if table.column_names.count(name) != 1:
        raise BadInput(f"{path}: no column {name!r} (there are {', '.join(table.column_names)})")
    return table[name]

def read_coordinates(path):
    """Parcel centres, float32 [V, 3], in mm of MNI space (a standard brain), from columns X, Y, Z
    of a dataset, a row a parcel; and the V functional systems of its column Network, or None."""
    table = read_arrow(path)
    axes = [read_column(table, axis, path).to_pylist() for axis in "XYZ"]
    networks = None
    if "Network" in table.column_names:
        networks = read_column(table, "Network", path).to_pylist()
    return torch.from_numpy(np.array(axes, dtype=np.float32).T), networks    # [V, 3]

class RecordingDataset:
    """The recordings in the column `recording_col` of a dataset, (timepoints, parcels) each, handed
    out as windows without loading them. Numbers may be of any type, recordings of any length.
    max_samples: only the first rows. Has lengths, int64 [rows] in timepoints, and num_parcels."""

    def __init__(self, path, recording_col, max_samples=None):
        self.path, self.recording_col = path, recording_col
        self.table = read_arrow(path)[:max_samples]
        column = read_column(self.table, recording_col, path)
        # `datasets` may wrap the nested lists into an extension type, Array2D: take what it stores.
        recordings = pa.chunked_array([getattr(chunk, "storage", chunk) for chunk in column.chunks])
        # Arrow keeps nested lists as one flat array and where each list starts: [[1, 2], [3, 4]] is
        # 1 2 3 4 and 0 2 4. So to flatten is to leave out the starts, and copies nothing.
        self.timepoints = pc.list_flatten(recordings)    # of all recordings, one after the other
        self.values = pc.list_flatten(self.timepoints)   # every number of the column, in one row
        self.num_parcels = len(self.values) // max(1, len(self.timepoints))
        self.lengths = pc.list_value_length(recordings).fill_null(0).to_numpy().astype(np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths       # of each row in `timepoints`

    def __len__(self):
        return len(self.lengths)

    def window(self, row, start=0, num_timepoints=None):
        """num_timepoints of one recording from `start` on (None: to its end), as numpy [T, V] in
        the dataset's own dtype: a view of the file wherever Arrow can give one."""
        length, V = int(self.lengths[row]), self.num_parcels
        T = length - start if num_timepoints is None else num_timepoints
        if not 0 <= start <= start + T <= length:
            raise BadInput(f"{self.path}: column {self.recording_col!r}: row {row} has {length} "
                           f"timepoints: there is no window of {T} from timepoint {start} on")
        values = self.values.slice((int(self.starts[row]) + start) * V, T * V)
        return values.chunk(0).to_numpy(zero_copy_only=False).reshape(T, V)  # a row is in one chunk

    def __getitem__(self, row):
        """A whole recording, float32 [timepoints, V]."""
        return torch.from_numpy(self.window(row).astype(np.float32))

    def batch(self, windows, num_timepoints):
        """float32 [B, T, V] of the windows [(row, start), ...]."""
        signals = np.empty((len(windows), num_timepoints, self.num_parcels), dtype=np.float32)
        for signal, (row, start) in zip(signals, windows):
            signal[:] = self.window(row, start, num_timepoints)
        return torch.from_numpy(signals)

    def training_window(self, n, rows, num_timepoints, seed):
        """(row, start) of the n-th training sample. Each epoch takes a random window of every row,
        the rows in a new random order."""
        epoch, i = divmod(n, len(rows))         # the order is drawn anew each time: nothing is kept
        shuffle = seeded_generator(seed, "order of the rows", epoch)
        row = int(rows[torch.randperm(len(rows), generator=shuffle)[i]])
        num_starts = int(self.lengths[row]) - num_timepoints + 1
        start = torch.randint(num_starts, (), generator=seeded_generator(seed, "window", n))
        return row, int(start)

# 3. Tokens: what (a patch) + where (its parcel) + when (its place in the window) ------------------

def patchify(signal, P):
    """Cut every parcel's time series into patches of P timepoints: [B, T, V] -> [B, N, V, P]."""
    B, T, V = signal.shape
    return signal.reshape(B, T // P, P, V).transpose(2, 3)

def unpatchify(patches):
    """Inverse of patchify: [B, N, V, P] -> [B, T, V]."""
    return patches.transpose(2, 3).flatten(1, 2)

class SpatialEncoding(nn.Module):
    """Where a parcel is, learned from its coordinates: [V, 3] in MNI mm -> [V, H]. Why not a Linear
    on xyz itself? Attention compares tokens by products, and those of three numbers cannot say "I
    read my neighbours". Those of sines and cosines of many wavelengths can: they add up where two
    places agree, and cancel elsewhere."""

    def __init__(self, hidden_size):
        super().__init__()
        self.linear = nn.Linear(3 * 2 * 8, hidden_size)            # axes x sine, cosine x octaves

    def forward(self, xyz):
        # From 256 mm, longer than any brain, down to 2 mm, shorter than any parcel is wide.
        wavelengths = 256.0 / 2 ** torch.arange(8, device=xyz.device)
        angles = 2 * math.pi * xyz.float()[:, :, None] / wavelengths            # [V, 3, 8]
        waves = torch.cat([angles.sin(), angles.cos()], dim=2)                  # [V, 3, 16]
        return self.linear(waves.flatten(1).to(self.linear.weight.dtype))       # [V, H]

def temporal_encoding(N, hidden_size, device=None):
    """When a patch is: the sinusoid of Vaswani et al. 2017, section 3.5, [N, H]. Their base 10,000
    is for thousands of words: over ten patches two waves in three would stand still. Here 100."""
    place = torch.arange(N, device=device)[:, None]                             # [N, 1]
    exponent = -torch.arange(0, hidden_size, 2, device=device) / hidden_size    # [H / 2], 0 to ~ -1
    angles = place * 100.0 ** exponent                                          # [N, H / 2]
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)         # [N, H]

# 4. Masks: two that hide tokens, for pretraining, and one that says who may read whom -------------

def random_mask(B, N, V, mask_ratio, generator=None):
    """bool [B, N, V], True = hidden: exactly round(mask_ratio * V) parcels of each patch."""
    num_hidden = round(mask_ratio * V)
    if num_hidden == 0:
        raise BadInput(f"mask_ratio {mask_ratio} hides none of {V} parcels: nothing to learn")
    order = torch.rand(B, N, V, generator=generator).argsort(dim=2)      # B * N permutations of V
    mask = torch.zeros(B, N, V, dtype=torch.bool)
    return mask.scatter_(2, order[:, :, :num_hidden], True)

def forward_mask(B, N, V):
    """bool [B, N, V], True = hidden: the last temporal token. To fill it in is to forecast, since
    no parcel's token reads the future."""
    mask = torch.zeros(B, N, V, dtype=torch.bool)
    mask[:, -1] = True
    return mask

def block_causal_mask(N, V, hidden=None):
    """Who may read whom (for tests and pictures): bool [S, S], may_read[i, j]: token i token j. The
    sequence is [CLS, all parcels' tokens of patch 0, all parcels' tokens of patch 1, ...].
    A parcel's token reads all tokens of its own patch and, of earlier patches, those that `hidden`,
    bool [N, V], leaves visible: a hidden one brings no signal. It reads no later patch: so one
    model fills gaps and forecasts. CLS (row 0) reads everything, and no parcel reads CLS
    (column 0): it knows the future, and would hand that to the past from the second layer on."""
    block = torch.arange(N).repeat_interleave(V)                # [N * V]: 0 0 0 1 1 1 ... (V = 3)
    visible = torch.ones(N * V, dtype=torch.bool) if hidden is None else ~hidden.flatten()
    same, earlier = block[:, None] == block, block[:, None] > block              # [N * V, N * V]
    may_read = torch.ones(1 + N * V, 1 + N * V, dtype=torch.bool)
    may_read[1:, 0] = False
    may_read[1:, 1:] = same | earlier & visible
    return may_read

# 5. Attention under block_causal_mask, without building it ----------------------------------------

def visible_tokens(mask):
    """What a mask, bool [B, N, V], leaves visible: where among the N * V parcel tokens, int64
    [B, K], and how many in each patch, a list of N, the same for all samples, as a tensor needs."""
    visible = ~mask
    counts = visible.sum(dim=2)                                                  # [B, N]
    if len(mask) == 0 or (counts != counts[0]).any():
        raise BadInput("a mask must hide as many parcels of a patch in each sample of a batch")
    index = visible.flatten(1).nonzero()[:, 1]                                   # [B * K]
    return index.view(len(mask), int(counts[0].sum())), counts[0].tolist()

def block_causal_attention(q, k, v, V, visible=None):
    """q, k, v and the result [B, heads, S, D]; visible: as of visible_tokens, None for all. All
    tokens of a patch read the same tokens: so there is one dense attention for each patch, which
    the fast kernels take. What nobody may read, 45% to 80% of all pairs, is never computed."""
    sizes, attend = [1] + [V] * ((q.shape[2] - 1) // V), F.scaled_dot_product_attention
    q_cls, *q_patches = q.split(sizes, dim=2)            # [B, heads, 1, D], [B, heads, V, D] each
    outputs = [attend(q_cls, k, v)]
    if visible is None:                         # what a patch reads is one slice
        for n, q_n in enumerate(q_patches):
            stop = 1 + (n + 1) * V
            outputs.append(attend(q_n, k[:, :, 1:stop], v[:, :, 1:stop]))
        return torch.cat(outputs, dim=2)

    index, counts = visible
    index = 1 + index[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])   # [B, heads, K, D]
    past_k = k.gather(2, index).split(counts, dim=2)     # N of [B, heads, visible in n, D]
    past_v = v.gather(2, index).split(counts, dim=2)
    own_k, own_v = k.split(sizes, dim=2)[1:], v.split(sizes, dim=2)[1:]
    for n, q_n in enumerate(q_patches):
        k_n = torch.cat([*past_k[:n], own_k[n]], dim=2)
        v_n = torch.cat([*past_v[:n], own_v[n]], dim=2)
        outputs.append(attend(q_n, k_n, v_n))
    return torch.cat(outputs, dim=2)

# 6. Model -----------------------------------------------------------------------------------------

class Layer(nn.Module):
    """A pre-norm transformer layer: attention, then an MLP, each added to the residual stream x."""

    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attention_norm = nn.LayerNorm(H)
        self.qkv = nn.Linear(H, 3 * H)
        self.position_qk = nn.Linear(2 * H, 2 * H, bias=False)
        self.out = nn.Linear(H, H)
        self.mlp_norm = nn.LayerNorm(H)
        self.up = nn.Linear(H, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, H)

    def queries_keys_values(self, x, position):
        """x [B, S, H], position [S, 2 * H] -> q, k, v, [B, heads, S, D] each. Tokens hold where and
        when already; here both enter once more, side by side, into queries and keys of every layer:
        in x they mix with content, and who reads whom would blur from layer to layer."""
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)              # [B, S, H] each
        position_q, position_k = self.position_qk(position).chunk(2, dim=-1)     # [S, H] each
        # [B, S, H] -> [B, heads, S, D]: each head works on its own D of the H numbers.
        return [tensor.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                for tensor in (q + position_q, k + position_k, v)]

    def forward(self, x, position, V, visible=None):
        """x [B, S, H], position [S, 2 * H] -> [B, S, H]."""
        q, k, v = self.queries_keys_values(x, position)
        attended = block_causal_attention(q, k, v, V, visible)                   # [B, heads, S, D]
        x = x + self.out(attended.transpose(1, 2).flatten(2))                    # [B, S, H]
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))

class BrainLM(nn.Module):
    """The backbone: reconstructs a window from what the mask leaves of it. No parameter's shape
    depends on V or N: the same weights run on any atlas and any number of patches."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        H, P = config.hidden_size, config.timepoint_patching_size
        self.patch_projection = nn.Linear(P, H)
        self.spatial_encoding = SpatialEncoding(H)
        self.mask_token = nn.Parameter(torch.zeros(H))
        self.cls_token = nn.Parameter(torch.zeros(H))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(H)
        self.head = nn.Linear(H, P)
        self.gradient_checkpointing = False     # True: less memory, a third more time to train
        initial_weights(self)                   # a start that is worth minutes: see the appendix

    def tokens(self, signal, xyz, mask=None):
        """signal [B, T, V], xyz [V, 3] in mm, mask bool [B, N, V] or None, on any device -> the
        sequence [B, S, H] and its positions [S, 2 * H]. Raises BadInput where shapes do not fit."""
        B, T, V = signal.shape
        H, P = self.config.hidden_size, self.config.timepoint_patching_size
        if T % P or V != len(xyz):
            raise BadInput(f"signal has {T} timepoints and {V} parcels: the first must be a "
                           f"multiple of {P}, the second equal the {len(xyz)} coordinates")
        patches = patchify(signal, P).to(self.cls_token)                             # [B, N, V, P]
        what = self.patch_projection(patches)                                        # [B, N, V, H]
        if mask is not None:                    # a hidden token keeps its where and its when
            is_hidden = mask[..., None].to(what.device)                              # [B, N, V, 1]
            what = torch.where(is_hidden, self.mask_token.to(what.dtype), what)
        where = self.spatial_encoding(xyz.to(what.device))                           # [V, H]
        when = temporal_encoding(T // P, H, what.device).to(self.cls_token.dtype)    # [N, H]
        tokens = what + where + when[:, None]   # [B, N, V, H] + [V, H] + [N, 1, H]
        cls = self.cls_token.expand(B, 1, -1)                                        # [B, 1, H]
        position = torch.cat([where.repeat(T // P, 1), when.repeat_interleave(V, dim=0)], dim=1)
        position = F.pad(position, (0, 0, 1, 0))    # [S, 2 * H]: zeros, no place or time, for CLS
        return torch.cat([cls, tokens.flatten(1, 2)], dim=1), position

    def forward(self, signal, xyz, mask=None):
        """signal float [B, T, V], xyz float [V, 3] in mm, mask bool [B, N, V] (True = hidden) or
        None. Returns the reconstruction [B, T, V] and the states [B, S, H] behind it, CLS first."""
        V, visible = signal.shape[2], None
        x, position = self.tokens(signal, xyz, mask)                      # [B, S, H], [S, 2 * H]
        if mask is not None:                    # once for all layers, on the device of the mask
            index, counts = visible_tokens(mask.expand(len(signal), -1, -1))
            visible = index.to(x.device), counts
        for layer in self.layers:
            if self.gradient_checkpointing:     # keep x alone, compute the rest again in backward
                x = checkpoint(layer, x, position, V, visible, use_reentrant=False)
            else:
                x = layer(x, position, V, visible)
        states = self.norm(x)                                                        # [B, S, H]
        patches = self.head(states[:, 1:]).unflatten(1, (-1, V))                     # [B, N, V, P]
        return unpatchify(patches), states                          # [B, T, V], [B, S, H]

# 7. Pretraining: what a step sees, and its loss ---------------------------------------------------

def pretraining_batch(dataset, config, seed, samples, step):
    """Signal [B, T, V] and mask bool [B, N, V] of the samples with these numbers. The kind of mask
    is one for the step, in all its batches."""
    T, V = config.num_timepoints_per_voxel, dataset.num_parcels
    N, B = T // config.timepoint_patching_size, len(samples)
    windows = [dataset.training_window(n, range(len(dataset)), T, seed) for n in samples]
    coin = seeded_generator(seed, "kind of mask", step)
    if torch.rand((), generator=coin) < config.forward_mask_prob:
        # Some earlier patches too, [N, 1]: several forecasts; alike in all samples, as counts are.
        mask = forward_mask(B, N, V) | (torch.rand(N, 1, generator=coin) < FORWARD_HIDDEN)
    else:
        mask = torch.cat([random_mask(1, N, V, config.mask_ratio,
                                      seeded_generator(seed, "random mask", n)) for n in samples])
    return dataset.batch(windows, T), mask                                   # [B, T, V], [B, N, V]

def reconstruction_loss(prediction, signal, mask, loss_fn="mse"):
    """Mean squared ("mse") or absolute ("mae") error over hidden tokens alone: a visible one could
    simply be copied. prediction, signal [B, T, V], mask bool [B, N, V]."""
    P = signal.shape[1] // mask.shape[1]
    is_hidden = mask.repeat_interleave(P, dim=1).to(prediction.device)               # [B, T, V]
    error = (prediction - signal.to(prediction.device))[is_hidden]
    return error.square().mean() if loss_fn == "mse" else error.abs().mean()

# 8. Regression head, for finetuning ---------------------------------------------------------------

class BrainLMRegressor(nn.Module):
    """Backbone and a 3-layer MLP: signal [B, T, V] -> [B], in the target's own units (years, ...).
    The paper's MLP reads CLS alone. Here no parcel reads CLS, so the pretraining loss never reaches
    it: the MLP also reads mean and spread of all parcel tokens. People differ by a few percent in
    these: so `finetune` sets four buffers, by which features and target get mean 0 and std 1."""

    def __init__(self, config, target_mean=0.0, target_std=1.0):
        super().__init__()
        H = config.hidden_size
        self.config = config
        self.backbone = BrainLM(config)
        self.mlp = nn.Sequential(
            nn.Linear(3 * H, H), nn.GELU(), nn.Linear(H, H // 2), nn.GELU(), nn.Linear(H // 2, 1))
        self.register_buffer("feature_mean", torch.zeros(3 * H))
        self.register_buffer("feature_std", torch.ones(3 * H))
        self.register_buffer("target_mean", torch.tensor(float(target_mean)))
        self.register_buffer("target_std", torch.tensor(float(target_std)))

    def features(self, signal, xyz):
        """CLS, mean and spread over the parcel tokens: [B, T, V] -> float32 [B, 3 * H]."""
        states = self.backbone(signal, xyz)[1].float()                               # [B, S, H]
        cls, parcels = states[:, 0], states[:, 1:]               # [B, H], [B, N * V, H]
        return torch.cat([cls, parcels.mean(dim=1), parcels.std(dim=1, correction=0)], dim=1)

    def forward(self, signal, xyz):
        features = (self.features(signal, xyz) - self.feature_mean) / self.feature_std
        standardised = self.mlp(features.to(self.mlp[0].weight.dtype)).squeeze(1).float()      # [B]
        return standardised * self.target_std + self.target_mean

def regression_loss(prediction, target, target_std):
    """Mean squared error, in units of target_std: years and scores train alike. Both are [B]."""
    return ((prediction - target) / target_std).square().mean()

# 9. Training --------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024. A gradient A diag(s) C' (its singular values s tell how long it is in
    which direction) becomes the step A C', about equally long in all directions, so that what few
    samples agree on is learned as fast as what all do. In float32: bfloat16, which torch.optim.Muon
    takes, makes a training step five times as long on CPUs without units for it."""

    def __init__(self, matrices):
        super().__init__(matrices, {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        rate = self.param_groups[0]["lr"]
        for matrix in self.param_groups[0]["params"]:
            average = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
            average.lerp_(matrix.grad, 0.05)
            step = matrix.grad.lerp(average, 0.95)                         # Nesterov's momentum
            tall = step.shape[0] > step.shape[1]
            step = step.T if tall else step     # step @ step.T: the smaller of the two products
            # A C' without finding A and C (Newton-Schulz): odd powers of A diag(s) C' change s
            # alone, and this polynomial, five times, brings s from (0.003, 1] to 0.7 ... 1.2.
            step = step / (step.norm() + 1e-7)                             # s in [0, 1]
            for _ in range(5):
                gram = step @ step.T
                step = 3.4445 * step + (-4.7750 * gram + 2.0315 * gram @ gram) @ step
            step = step.T if tall else step
            matrix.sub_(rate * math.sqrt(max(matrix.shape)) * step)        # RMS about 1, as Adam's

def make_optimizers(model):
    """Muon for the layers' matrices, Adam for the rest."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trained.items() if "layers." in name and p.dim() == 2}
    others = [p for name, p in trained.items() if name not in matrices]
    optimizers = [torch.optim.Adam(others, fused=True)]
    if matrices:                                # none where the backbone is frozen
        optimizers.append(Muon(matrices.values()))
    return optimizers

def train(model, optimizers, batch_loss, training, num_steps, first_step=0):
    """Train the model in place: `for step, loss in train(...)`, from first_step to num_steps.
    batch_loss(model, step, i) -> scalar loss of the step's i-th batch.

    It yields before the update: `step` updates are done, and the next one is known to be finite.
    Who saves there saves sound weights, and who goes on from them computes this very step again."""
    accumulation = training.gradient_accumulation_steps
    for step in range(first_step, num_steps):
        share = 0.5 * (1 + math.cos(math.pi * step / num_steps))       # half a cosine, 1 to 0
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * share

        loss = 0.0
        for i in range(accumulation):
            part = batch_loss(model, step, i) / accumulation
            part.backward()                     # gradients add up over the parts
            loss += part.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        if not math.isfinite(loss) or not norm.isfinite():
            raise BadInput(f"step {step + 1}: the loss is {loss}, its gradient's norm {norm:.3g}; "
                           "try a lower --learning_rate; the last good checkpoint stays")
        yield step, loss

        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

# Appendix: the start. Nobody needs it to understand the rest. -------------------------------------
#
# Kriging (interpolation) in space, autoregression in time, written as attention. What a random
# network would find out first is known: a parcel is like its neighbours, and goes on as it was
# going. So even heads, the spatial ones, average what is near at the same time; odd heads, the
# temporal ones, continue what the same place did one patch ago. Without it the same comes later.

SPATIAL_WHERE, SPATIAL_WHEN = 2.0, 4.0      # factors of a query's parts: the larger, the choosier.
TEMPORAL_WHERE, TEMPORAL_WHEN = 4.0, 3.0    # Spatial heads average, temporal ones want one place;
CONTENT = 0.2                               # what a token holds decides little at first
GUESS = 0.6                 # what heads of one kind add in all layers: both kinds say much the same
SMOOTH, NOISE = 4.0, 0.5    # BOLD is smooth over 4 timepoints, in noise of half its variance

def continuation(P):
    """What to expect after a patch, a matrix [P, P]: next patch = continuation @ patch, its
    conditional mean. The last few values go on, and decay."""
    time = torch.arange(2 * P)
    covariance = torch.exp(-0.5 * ((time[:, None] - time) / SMOOTH) ** 2)        # [2 * P, 2 * P]
    return covariance[P:, :P] @ torch.linalg.inv(covariance[:P, :P] + NOISE * torch.eye(P))

@torch.no_grad()
def initial_weights(model):
    """Weights to learn fast from; from H = 128 on a fair first guess before any training."""
    H, P = model.config.hidden_size, model.config.timepoint_patching_size
    N, heads = model.config.num_timepoints_per_voxel // P, model.config.num_attention_heads
    D = H // heads
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(model.cls_token, std=0.02)
    nn.init.normal_(model.mask_token, std=0.3)          # two thirds as long as a patch

    # A patch is written along P orthonormal directions, and read from them again (about 1.4 times
    # as large, by the LayerNorm between). Nothing else may point there, or the head would print it
    # as signal: QR turns them away from ones, the mean that LayerNorm removes, and from the
    # sinusoid, as far as H has room; where and [MASK] lose their part.
    others = torch.cat([torch.ones(H, 1), temporal_encoding(N, H).T], dim=1)[:, :H - P]
    directions = torch.linalg.qr(torch.cat([others, torch.randn(H, P)], dim=1))[0][:, -P:]  # [H, P]
    model.patch_projection.weight.copy_(directions)
    model.head.weight.copy_(directions.T)
    for other in model.spatial_encoding.linear.weight, model.mask_token:
        other -= directions @ (directions.T @ other)

    # The matrix with one_later @ when(n) = when(n + 1) turns each pair (sine, cosine).
    sine, cosine = temporal_encoding(2, H)[1].view(-1, 2).T                      # [H / 2] each
    turns = torch.stack([cosine, sine, -sine, cosine], dim=1).view(-1, 2, 2)     # [H / 2, 2, 2]
    one_later = torch.block_diag(*turns)                                         # [H, H]

    for layer in model.layers:
        nn.init.zeros_(layer.out.weight)
        nn.init.normal_(layer.down.weight, std=0.002)   # the MLP: adds almost nothing yet
        for head in range(heads):
            rows, temporal = slice(head * D, (head + 1) * D), head % 2 == 1
            query, key, value = (matrix[rows] for matrix in layer.qkv.weight.chunk(3))    # [D, H]
            place_query, place_key = (matrix[rows] for matrix in layer.position_qk.weight.chunk(2))

            # Keys equal queries: a token reads those like itself. But keys of temporal heads tell
            # the time of the next patch, so that a query finds the patch before its own.
            key.copy_(nn.init.orthogonal_(query).mul_(CONTENT))
            where, when = place_query.chunk(2, dim=1)                            # [D, H] each
            nn.init.orthogonal_(where).mul_(TEMPORAL_WHERE if temporal else SPATIAL_WHERE)
            nn.init.orthogonal_(when).mul_(TEMPORAL_WHEN if temporal else SPATIAL_WHEN)
            place_key.copy_(torch.cat([where, when @ one_later if temporal else when], dim=1))

            # What is read: the patch. Spatial heads pass it on, temporal ones its continuation.
            nn.init.orthogonal_(value)[:P] = directions.T[:D]
            passed_on = directions @ continuation(P) if temporal else directions         # [H, P]
            of_its_kind = heads // 2 if temporal else math.ceil(heads / 2)
            share = GUESS / len(model.layers) / of_its_kind
            layer.out.weight[:, rows][:, :P] = share * passed_on[:, :D]

# Part II: the program =============================================================================

import argparse
import contextlib
import csv
import datetime
import importlib
import io
import os
import re
import sys
import textwrap
import time
from dataclasses import asdict, fields
from functools import partial
from typing import Callable

import torch.distributed as dist

# 10. Refusing broken input: what Part I takes for granted, looked at once before training ---------

@contextlib.contextmanager
def refusing(where):
    """For reading what others wrote: a file that is cut raises one of a dozen kinds of error.
    Whatever it is becomes a BadInput that tells where."""
    try:
        yield
    except (BadInput, MemoryError):
        raise
    except Exception as error:
        raise BadInput(f"{where} ({type(error).__name__}: {error})") from error

def settings_of(config_class, values):
    """Those of the values {name: value}, flags or a config.json, that are fields of the class."""
    return {option.name: values[option.name] for option in fields(config_class)
            if values.get(option.name) is not None}

def check_numbers(settings):
    """BadInput names the first of {name: number}, flags or a config.json, that cannot be."""
    for name, value in settings.items():
        share = name.endswith(("_prob", "_ratio"))
        least = 0 if share or type(value) is float or name in ("seed", "eval_steps") else 1
        most = 1 if share else sys.maxsize
        if type(value) in (int, float) and not least <= value <= most:
            raise BadInput(f"{name} is {value}: it must lie between {least} and {most}")

def check_config(config, source=""):
    """The config again; BadInput names the setting that cannot be, after where it comes from."""
    for option in fields(config):
        value = getattr(config, option.name)
        if type(value) is not option.type and (type(value), option.type) != (int, float):
            raise BadInput(f"{source}{option.name} is {value!r}, not {option.type.__name__}")
    check_numbers({source + name: value for name, value in asdict(config).items()})
    T, P = config.num_timepoints_per_voxel, config.timepoint_patching_size
    H, heads = config.hidden_size, config.num_attention_heads
    if T % P:
        raise BadInput(f"{source}num_timepoints_per_voxel {T} is no multiple of "
                       f"timepoint_patching_size {P}: try {max(T // P, 1) * P}")
    if H % 2 or H % heads or H < P:
        raise BadInput(f"{source}hidden_size {H} must be even, a multiple of num_attention_heads "
                       f"{heads} and at least timepoint_patching_size {P}")
    if config.loss_fn not in ("mse", "mae"):
        raise BadInput(f"{source}loss_fn {config.loss_fn} must be mse or mae")
    return config

def open_numbers(table, name, path):
    """A column of scalars as float64 [rows], NaN where a value is missing. Text, decimals and
    booleans are taken where each value is a number."""
    column = read_column(table, name, path)
    numbers = np.full(len(column), np.nan)
    for row, value in enumerate(column):
        with refusing(f"{path}: column {name!r}, row {row} is no number"):
            value = value.as_py()
            if str(value).strip().lower() not in ("none", "", "n/a", "na", "nan"):
                numbers[row] = float(value)
            if np.isinf(numbers[row]) or "_" in str(value):         # 1_000 is Python's, nobody's
                raise ValueError(f"it is {value!r}")
    return numbers

def open_coordinates(path):
    """read_coordinates, networks as text; BadInput for what is missing, a note for odd units."""
    table, networks = read_arrow(path), None
    xyz = np.stack([open_numbers(table, axis, path) for axis in "XYZ"], axis=1)      # [V, 3]
    if len(xyz) == 0:
        raise BadInput(f"{path} has no rows, of which each is a parcel")
    for row, axis in np.argwhere(np.isnan(xyz)):
        raise BadInput(f"{path}: column {'XYZ'[axis]!r}, row {row} is missing")
    reach = np.abs(xyz).max()           # of a brain: 110 mm; and voxel indices are never negative
    if xyz.min() >= 0 or not 12 <= reach <= 200:
        print(f"note: {path}: coordinates up to {reach:.4g} do not look like MNI millimetres")
    if "Network" in table.column_names:
        names = map(str, read_column(table, "Network", path).to_pylist())
        networks = [None if name in ("None", "nan") else name for name in names]
    return torch.tensor(xyz, dtype=torch.float32), networks

def open_recordings(path, recording_col, window=1, num_parcels=None, max_samples=None):
    """A RecordingDataset of which every number has been looked at. window: the least number of
    timepoints; num_parcels: None for as many as the first timepoint has."""
    where, odd = f"{path}: column {recording_col!r}", []
    with refusing(f"{where} must hold (timepoints, parcels), lists of lists of numbers, in one row "
                  "or more"):
        dataset = RecordingDataset(path, recording_col, max_samples)
        kind = dataset.values.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise TypeError(f"there are values of {kind}")
    if len(dataset) == 0:
        raise BadInput(f"{path} has no rows, of which each is a recording")
    widths = pc.list_value_length(dataset.timepoints).fill_null(0).to_numpy()
    V = dataset.num_parcels = num_parcels or max([1, *widths[:1]])
    for row, (start, length) in enumerate(zip(dataset.starts, dataset.lengths)):
        wrong = np.flatnonzero(widths[start:start + length] != V)
        if len(wrong):
            t, width = wrong[0], widths[start + wrong[0]]
            raise BadInput(f"{where}, row {row}, timepoint {t} has {width} parcels, not {V}: "
                           "ragged, transposed (timepoints come first) or of another atlas?")
        if length < window:
            raise BadInput(f"{where}, row {row} has {length} timepoints, the window {window}: "
                           "leave it out or lower --num_timepoints_per_voxel")
        signal = dataset.window(row)
        with np.errstate(over="ignore"):        # to the model, too large for float32 is infinite
            broken = np.argwhere(~np.isfinite(signal.astype(np.float32, copy=False)))
        if len(broken):
            t, v = broken[0]
            raise BadInput(f"{where}, row {row}, timepoint {t}, parcel {v} is {signal[t, v]}: "
                           "repair it or leave the row out")
        alive = signal[:, signal.any(axis=0)].astype(np.float32)     # zeros: a parcel has no signal
        if alive.size:
            offset, spread = np.median(np.abs(alive.mean(axis=0))), np.median(alive.std(axis=0))
            if not 0.15 <= spread <= 15 or offset > 2 * spread:
                odd.append(f"row {row}, whose parcels vary by {spread:.4g} around {offset:.4g}")
    if odd:
        print(f"note: {path}: {len(odd)} recordings are in odd units, such as {odd[0]}: "
              "robust_scale of sample_data.py brings parcels to median 0, interquartile range 1")
    return dataset

def open_target(dataset, column, least):
    """The targets of all rows, float64, NaN where there is none. BadInput where fewer than `least`
    differ; with 0 the column may be absent."""
    target = np.full(len(dataset), np.nan)
    if least or column in dataset.table.column_names:
        target = open_numbers(dataset.table, column, dataset.path)
    known = ~np.isnan(target)
    if len(np.unique(target[known])) < least:
        raise BadInput(f"{dataset.path}: column {column!r} has fewer than {least} different values")
    if not known.all():
        print(f"note: {dataset.path}: {(~known).sum()} rows have no {column}: neither learned from "
              "nor scored")
    return target

# 11. Checkpoints: folders that survive a kill and are Hugging Face Hub repositories ---------------

def write_atomically(path, content):
    """Write text, or what torch.save takes, beside path and rename it into place: at any instant
    path is the old file or the new one."""
    temporary = Path(path).with_name(f".{Path(path).name}.part")
    with refusing(f"could not write {path}, what was saved before is intact"):
        with open(temporary, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

def to_json(content, indent=None):
    """JSON has no NaN and no infinity: null stands for them."""
    without = json.loads(json.dumps(content), parse_constant=lambda name: None)
    return json.dumps(without, indent=indent) + "\n"

def save_pretrained(model, folder):
    """Write a model as a folder that from_pretrained and the Hugging Face Hub can read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hub = {"model_class": type(model).__name__, "model_type": "brainlm", "auto_map": {
        "AutoConfig": "brainlm.BrainLMHubConfig", "AutoModel": "brainlm.BrainLMHubModel",
        "AutoModelForPreTraining": "brainlm.BrainLMHubModel"}}
    write_atomically(folder / "config.json", to_json(asdict(model.config) | hub, indent=2))
    if "__file__" in globals():                         # else pasted into a notebook
        write_atomically(folder / "brainlm.py", Path(__file__).read_text(encoding="utf-8"))
    write_atomically(folder / "pytorch_model.bin", model.state_dict())
    for other in folder.glob("model*.safetensors*"):                # one folder, one model
        other.unlink()

def model_folder(name):
    """A local folder or, downloaded, the repository "user/name" of the Hub."""
    if Path(name).is_dir():
        return Path(name)
    missing = f"{name}: no such run folder (python brainlm.py pretrain makes one)"
    if str(name).startswith((".", "/", "~")) or Path(*Path(name).parts[:1]).exists():
        raise BadInput(missing)                         # nor a name on the Hub
    with refusing(f"{missing}, nor did the Hub give it (pip install huggingface_hub)"):
        return Path(importlib.import_module("huggingface_hub").snapshot_download(str(name)))

def from_pretrained(model_class, name_or_path, **changes):
    """A BrainLM (or a regressor's backbone) or BrainLMRegressor (nn.Module: what there is) from a
    run folder or, "user/name", from the Hub, in evaluation mode. changes: fields of its config that
    shall be others, such as mask_ratio."""
    folder = model_folder(name_or_path)
    file = folder / "config.json"
    with refusing(f"{file} is missing or not of a BrainLM"):
        saved = json.loads(file.read_text(encoding="utf-8"))
        lacking = {"model_class", *asdict(BrainLMConfig())} - set(saved)
        if lacking:
            raise BadInput(f"{file} lacks {', '.join(sorted(lacking))}: it is of another version")
        saved_class = MODELS[saved["model_class"]]
        settings = {option.name: saved[option.name] for option in fields(BrainLMConfig)}
        config = check_config(BrainLMConfig(**settings | changes), f"{file}: ")
    if model_class is BrainLMRegressor and saved_class is BrainLM:
        raise BadInput(f"{folder} holds no BrainLMRegressor: python brainlm.py finetune makes one")
    if config.num_attention_heads != settings["num_attention_heads"]:       # shapes do not tell
        raise BadInput(f"{folder}: the weights are of {settings['num_attention_heads']} "
                       f"num_attention_heads, not {config.num_attention_heads}")
    model, weights = saved_class(config), {}
    for file in sorted(folder.glob("model*.safetensors")) or [folder / "pytorch_model.bin"]:
        with refusing(f"{file} is missing, cut, a pointer of Git LFS or no weights"):
            if file.suffix == ".bin":           # of both kinds, the one that transformers takes
                weights |= torch.load(file, map_location="cpu", weights_only=True)
            else:                               # an `import` would be a requirement of the Hub's
                weights |= importlib.import_module("safetensors.torch").load_file(file)
    with refusing(f"{file} does not hold the weights of this {saved_class.__name__}"):
        weights = {name.removeprefix("model."): weights[name] for name in weights}   # the Hub's
        fitting = {name: value.shape for name, value in model.state_dict().items()}
        found = {name: getattr(value, "shape", None) for name, value in weights.items()}
        for name in fitting | found:
            if fitting.get(name) != found.get(name):
                raise ValueError(f"missing, unknown or size mismatch: {name}")
        model.load_state_dict(weights)
    return (model if isinstance(model, model_class) else model.backbone).eval()

MODELS = {"BrainLM": BrainLM, "BrainLMRegressor": BrainLMRegressor}
BrainLM.save_pretrained = BrainLMRegressor.save_pretrained = save_pretrained
BrainLM.from_pretrained = BrainLMRegressor.from_pretrained = classmethod(from_pretrained)

if sys.modules.get("transformers"):             # as where the Hub loads this file
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import MaskedLMOutput

    class BrainLMHubConfig(PretrainedConfig):
        model_type, keys_to_ignore_at_inference = "brainlm", ["hidden_states"]

        def __init__(self, **settings):
            ours = asdict(BrainLMConfig(**settings_of(BrainLMConfig, settings)))
            super().__init__(**{"model_class": "BrainLM"} | settings | ours)

    class BrainLMHubModel(PreTrainedModel):
        """What AutoModel gives and Trainer trains. Its `model` is a BrainLM or BrainLMRegressor."""
        config_class, base_model_prefix, main_input_name = BrainLMHubConfig, "model", "signal"
        supports_gradient_checkpointing = _supports_sdpa = True
        accepts_loss_kwargs = False             # Trainer divides by the accumulation steps
        _keep_in_fp32_modules_strict = ["feature_mean", "feature_std", "target_mean", "target_std"]

        def __init__(self, config):
            super().__init__(config)
            ours = BrainLMConfig(**settings_of(BrainLMConfig, vars(config)))
            dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)      # bfloat16 has no inverse for the start
            self.model = MODELS[config.model_class](ours).to(dtype)
            torch.set_default_dtype(dtype)
            self.post_init()

        def _init_weights(self, module):
            """Nothing to add: BrainLM initialises itself."""

        def __getattr__(self, name):
            if name in ("embed", "forecast", "attention", "similarity"):
                return getattr(getattr(self.model, "backbone", self.model), name)
            return super().__getattr__(name)

        def forward(self, signal, xyz, mask=None, labels=None, return_dict=None, **others):
            """xyz [V, 3] or, for what splits batches, the same B times. labels add a loss: the
            signal itself, over what the mask hides (without one: a random mask's tokens); for a
            regressor the target, [B]. others: what pipelines and Trainer pass besides."""
            loss = states = None
            xyz = xyz.reshape(-1, *xyz.shape[-2:])                       # [B or 1, V, 3]
            if (xyz != xyz[:1]).any():
                raise BadInput("xyz [B, V, 3]: a batch must be of one atlas")
            if isinstance(self.model, BrainLMRegressor):
                prediction = self.model(signal, xyz[0])                              # [B]
                if labels is not None:
                    loss = regression_loss(prediction, labels.flatten(), self.model.target_std)
            else:
                if mask is None and labels is not None:
                    N = signal.shape[1] // self.config.timepoint_patching_size
                    mask = random_mask(len(signal), N, len(xyz[0]), self.config.mask_ratio)
                prediction, states = self.model(signal, xyz[0], mask)    # [B, T, V], [B, S, H]
                if labels is not None:
                    loss = reconstruction_loss(prediction, labels, mask, self.config.loss_fn)
            output = MaskedLMOutput(loss=loss, logits=prediction, hidden_states=states)
            return output.to_tuple() if return_dict is False else output

# 12. Evaluation -----------------------------------------------------------------------------------

RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)    # times the mean variance; the best one counts
HORIZONS = (1, 2, 3, 5, 10, 20)                     # timepoints ahead
MAX_BASELINE_ROWS = 500                             # training recordings for opponents, at most
MAX_WINDOWS = 200                                   # windows or recordings to evaluate on, at most
WATCHED_WINDOWS = 20                                # of these while training

@dataclass
class Data:
    """What a model is trained and evaluated on."""
    xyz: torch.Tensor                           # [V, 3] in mm, on the model's device
    networks: list                              # V labels, None for a parcel without; or None
    train: RecordingDataset
    val: RecordingDataset
    column: str = None                          # for a BrainLMRegressor: the name of the target
    target: np.ndarray = None                   # and its values, float64 [rows] of train,
    val_target: np.ndarray = None               # of val, NaN where there is none
    batch_size: int = 8                         # windows to evaluate at once
    autocast: Callable = contextlib.nullcontext  # the context of a batch: bfloat16, or none

def fixed_windows(dataset, rows, T):
    """[(row, start), ...]: windows side by side, and one at the very end of each recording."""
    windows = []
    for row in rows:
        last = int(dataset.lengths[row]) - T
        windows += [(row, start) for start in [*range(0, last, T), last]]
    return windows

def evenly(items, most):
    """At most so many of the items, evenly spaced."""
    chosen = np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)
    return [items[i] for i in chosen]

@torch.no_grad()
def in_batches(data, function, *tensors):
    """function(*tensors) in float32 on the CPU, data.batch_size rows of the tensors at a time."""
    outputs = []
    for batch in zip(*(tensor.split(data.batch_size) for tensor in tensors)):
        with data.autocast():
            outputs.append(function(*batch).float().cpu())
    return torch.cat(outputs)

def scores(prediction, target):
    """R2 = 1 - SSE / SST (never clipped), MSE and MAE of arrays of one shape."""
    error, variance = np.float64(prediction) - target, target.var(dtype=np.float64)
    MSE = np.square(error).mean()
    R2 = 1 - MSE / variance if variance > 0 else -math.inf
    return {"R2": float(R2), "MSE": float(MSE), "MAE": float(np.abs(error).mean())}

def some_windows(dataset, T, most):
    """At most so many fixed windows of a dataset, float32 [B, T, V]."""
    return dataset.batch(evenly(fixed_windows(dataset, range(len(dataset)), T), most), T)

def reconstructions(model, data, most):
    """Yield of each task, "masked" patches and "forecast": its name, windows [B, T, V], what is
    hidden of them, bool [B, N, V], and of that, [hidden tokens, P], a BrainLM's guess and truth."""
    config = model.config
    T, P = config.num_timepoints_per_voxel, config.timepoint_patching_size
    signal = some_windows(data.val, T, most)
    B, N, V = len(signal), T // P, data.val.num_parcels
    random = [torch.Generator().manual_seed(i) for i in range(B)]      # the same masks each time
    masks = {"masked": torch.cat([random_mask(1, N, V, config.mask_ratio, r) for r in random])}
    if T - P >= max(P, 2):                      # else there is too little to go on from
        masks["forecast"] = forward_mask(B, N, V)
    for task, mask in masks.items():
        prediction = in_batches(
            data, lambda signal, mask: model(signal, data.xyz, mask)[0], signal, mask)
        guess, truth = (patchify(each, P)[mask].numpy() for each in (prediction, signal))
        yield task, signal, mask, guess, truth

def watch(model, data):
    """{name: score} of a model while it trains."""
    if isinstance(model, BrainLMRegressor):
        rows = evenly(np.flatnonzero(~np.isnan(data.val_target)), MAX_WINDOWS)
        prediction = predict_recordings(model, data, rows)
        return regression_scores(prediction, data.val_target[rows])
    return {f"{task}_R2": scores(prediction, target)["R2"]
            for task, _, _, prediction, target in reconstructions(model, data, WATCHED_WINDOWS)}

def evaluate_reconstruction(model, data):
    """{title: {method: {name: score}}} of masked patches and of forecasting."""
    tables = {}
    for task, signal, mask, prediction, target in reconstructions(model, data, MAX_WINDOWS):
        (B, T, _), P = signal.shape, model.config.timepoint_patching_size
        if task == "masked":
            title = f"masked patches ({model.config.mask_ratio:.0%} hidden, {B} windows)"
            opponents, horizons = masked_opponents(data.train, signal, mask), []
        else:
            title = f"forecasting {P} timepoints from {T - P} ({B} windows)"
            opponents = forecasting_opponents(data.train, signal, mask)
            horizons = [h for h in HORIZONS if h <= P]
        tables[title] = compare(prediction, opponents, target, horizons)
    return tables

def compare(prediction, opponents, target, horizons):
    """{method: {name: score}} of BrainLM's prediction, [hidden tokens, P], and of its opponents,
    (method, expected) for each ridge: the best one counts. horizons: timepoints ahead to score."""
    def row_of(expected):
        row = scores(expected, target)
        for h in horizons:
            row[f"R2 at {h}"] = scores(expected[:, h - 1], target[:, h - 1])["R2"]
        return row

    rows = {}
    for method, expected in opponents:
        row = row_of(expected)
        if method not in rows or row["R2"] > rows[method]["R2"]:
            rows[method] = row
    best_first = sorted(rows, key=lambda method: -rows[method]["R2"])
    return {"BrainLM": row_of(prediction)} | {method: rows[method] for method in best_first}

def gaussian(dataset, samples_of):
    """Mean [a] and covariance [a, a] of samples_of(signal [T, V]) -> [n, a], over recordings."""
    count, total, gram = 0, 0.0, 0.0
    for row in range(min(len(dataset), MAX_BASELINE_ROWS)):
        samples = samples_of(dataset.window(row).astype(np.float64))
        count += len(samples)
        total = total + samples.sum(axis=0)
        gram = gram + samples.T @ samples
    mean = total / count
    return mean, gram / count - np.outer(mean, mean)

def conditional_mean(mean, covariance, given, wanted, ridge):
    """All opponents are this function. Of a Gaussian vector some entries are given: what to expect
    of those wanted is mean_w + C_wg (C_gg + ridge)^-1 (x_g - mean_g). given, wanted: indices.
    Returns it as weights [given, wanted] and intercept [wanted]."""
    variance = max(covariance.diagonal().mean(), 1e-12)     # where all is constant it is not zero
    ridged = covariance[np.ix_(given, given)] + ridge * variance * np.eye(len(given))
    weights = np.linalg.solve(ridged, covariance[np.ix_(given, wanted)])
    return weights, mean[wanted] - mean[given] @ weights

def masked_opponents(dataset, signal, mask):
    """Yield (name, expected) for each ridge: hidden parcels from those visible at the same time."""
    mean, covariance = gaussian(dataset, lambda signal: signal)
    patches = patchify(signal, signal.shape[1] // mask.shape[1]).flatten(0, 1).numpy()
    for ridge in RIDGES:
        expected = []
        for patch, hidden in zip(patches, mask.flatten(0, 1).numpy()):       # [V, P], [V]
            weights, intercept = conditional_mean(
                mean, covariance, np.flatnonzero(~hidden), np.flatnonzero(hidden), ridge)
            expected.append(weights.T @ patch[~hidden] + intercept[:, None])
        yield "Gaussian conditional mean", np.concatenate(expected)

def forecasting_opponents(dataset, signal, mask):
    """Yield (name, expected) for each ridge: the last value repeated, a parcel's next P values from
    its own last P, and the next timepoint of all parcels from their last two, and so on."""
    V, P = dataset.num_parcels, signal.shape[1] // mask.shape[1]
    sliding = np.lib.stride_tricks.sliding_window_view
    own = gaussian(dataset, lambda signal: sliding(signal, 2 * P, axis=0).reshape(-1, 2 * P))
    joint = gaussian(dataset, lambda signal: np.hstack([signal[:-2], signal[1:-1], signal[2:]]))
    past = patchify(signal, P)[:, -2].flatten(0, 1).numpy()                  # [B * V, P]
    yield "persistence", past[:, -1:].repeat(P, axis=1)
    for ridge in RIDGES:
        weights, intercept = conditional_mean(*own, np.arange(P), np.arange(P, 2 * P), ridge)
        yield "ridge autoregression", past @ weights + intercept
        weights, intercept = conditional_mean(
            *joint, np.arange(2 * V), np.arange(2 * V, 3 * V), ridge)
        steps = [signal[:, -P - 2].numpy(), signal[:, -P - 1].numpy()]       # [B, V] each
        for _ in range(P):
            steps.append(np.hstack(steps[-2:]) @ weights + intercept)
        yield "2-lag vector autoregression", np.stack(steps[2:], axis=2).reshape(-1, P)

def correlation(signal):
    """Functional connectivity: correlation of columns, [T, V] -> [V, V], 0 for constant ones."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.atleast_2d(np.corrcoef(signal, rowvar=False)))

def knn_accuracy(distance, labels, k=5):
    """Share of V items, distance [V, V], whose label is the commonest of their k nearest others."""
    distance = distance + np.diag(np.full(len(distance), np.inf))
    right = 0
    for row, label in zip(distance, labels):
        nearest = [labels[i] for i in np.argsort(row, kind="stable")[:min(k, len(row) - 1)]]
        right += max(nearest, key=nearest.count) == label
    return right / len(labels)

def parcel_distances(model, data):
    """How far parcels are from each other, {method: [V, V]}, on average over windows: by states of
    the model, by functional connectivity, by rows of either (profiles), and by coordinates."""
    signal = some_windows(data.val, model.config.num_timepoints_per_voxel, MAX_WINDOWS)
    similarity, connectivity = np.zeros((2, len(data.xyz), len(data.xyz)))
    for window in signal.split(1):                                           # [1, T, V] each
        alike = in_batches(data, lambda window: model.similarity(window, data.xyz), window)
        similarity += alike[0].numpy() / len(signal)
        connectivity += correlation(window[0].numpy()) / len(signal)
    return {"BrainLM similarity": 1 - similarity,
            "BrainLM similarity profile": 1 - correlation(similarity),
            "functional connectivity": 1 - connectivity,
            "functional connectivity profile": 1 - correlation(connectivity),
            "coordinates": torch.cdist(data.xyz, data.xyz).cpu().numpy()}

def evaluate_networks(model, data):
    """Functional networks without training, {title: {method: {name: score}}}: the share of parcels
    that get their label from their nearest neighbours. Parcels without a label are left out."""
    labelled = [v for v, name in enumerate(data.networks or []) if name is not None]
    labels = [data.networks[v] for v in labelled]
    if not 1 < len(set(labels)) < len(labels):          # nothing to find
        return {}
    distances = parcel_distances(model, data)
    return {f"functional networks of {len(labels)} parcels (5 nearest neighbours)": {
        method: {"accuracy": knn_accuracy(distance[np.ix_(labelled, labelled)], labels)}
        for method, distance in distances.items()}}

def predict_recordings(model, data, rows):
    """What a BrainLMRegressor predicts for validation recordings, float64 [rows]: the mean over the
    windows of each."""
    T, predictions = model.config.num_timepoints_per_voxel, []
    for row in rows:
        signal = data.val.batch(fixed_windows(data.val, [row], T), T)        # [windows, T, V]
        of_windows = in_batches(data, lambda signal: model(signal, data.xyz), signal)
        predictions.append(of_windows.double().mean().item())
    return np.array(predictions)

def regression_scores(prediction, target):
    """Scores of predictions [n], also Pearson r; of a target of 0 and 1 also AUC and accuracy."""
    with np.errstate(divide="ignore", invalid="ignore"):
        row = scores(prediction, target) | {"r": float(np.corrcoef(prediction, target)[0, 1])}
    if set(target) == {0, 1}:
        no, yes = np.sort(prediction[target == 0]), prediction[target == 1]
        below = (np.searchsorted(no, yes, "left") + np.searchsorted(no, yes, "right")) / 2
        row["AUC"] = float(below.mean() / len(no))      # share of pairs in order, ties half
        row["accuracy"] = float(((prediction > 0.5) == target).mean())
    return row

def connectivity_ridge(train_set, target, val_set, val_rows):
    """The opponent in regression: ridge on functional connectivity, its penalty chosen by leaving
    out a training recording at a time. target [rows], or NaN -> predictions for val_rows."""
    upper = np.triu_indices(train_set.num_parcels, k=1)
    rows = np.flatnonzero(~np.isnan(target))[:MAX_BASELINE_ROWS]
    train = np.stack([correlation(train_set.window(row))[upper] for row in rows])
    val = np.stack([correlation(val_set.window(row))[upper] for row in val_rows])
    center, mean, fits = train.mean(axis=0), target[rows].mean(), []
    gram = (train - center) @ (train - center).T    # dual form: more connections than recordings
    for ridge in np.logspace(-3, 3, 25) * max(gram.diagonal().mean(), 1e-12):
        inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
        weights = inverse @ (target[rows] - mean)
        # The error of each recording, predicted from the others; the mean comes from these as well.
        errors = weights / (inverse.diagonal() - 1 / (ridge * len(gram)))
        fits.append((np.square(errors).mean(), ridge, weights))
    weights = min(fits)[-1]
    return mean + (val - center) @ (train - center).T @ weights

def evaluate_regression(data, prediction):
    """{title: {method: {name: score}}} of predictions [rows] for all of data.val and of opponents,
    over those that have a target; {} where nobody has."""
    known = np.flatnonzero(~np.isnan(data.val_target))
    if len(known) == 0:
        return {}
    target = data.val_target[known]
    methods = {
        "BrainLM": prediction[known],
        "training mean": np.full(len(known), np.nanmean(data.target)),
        "ridge on functional connectivity":
            connectivity_ridge(data.train, data.target, data.val, known)}
    return {f"{data.column}, {len(known)} validation recordings": {
        method: regression_scores(values, target) for method, values in methods.items()}}

def evaluate_model(model, data):
    """All there is to say about a model on data.val: tables {title: {method: {name: score}}} and
    the predictions of a BrainLMRegressor, [rows] (of a BrainLM: None)."""
    if isinstance(model, BrainLMRegressor):
        prediction = predict_recordings(model, data, range(len(data.val)))
        return evaluate_regression(data, prediction), prediction
    return evaluate_reconstruction(model, data) | evaluate_networks(model, data), None

def markdown(tables):
    """The tables as Markdown, for the terminal and for the model card."""
    lines = []
    for title, table in tables.items():
        title = title.replace("|", "\\|")       # a bar in a column's name
        width, columns = max(map(len, [title, *table])), next(iter(table.values()))
        lines += ["", f"| {title:<{width}} |" + "".join(f"{name:>10} |" for name in columns),
                  f"| {'-' * width} |" + " --------: |" * len(columns)]
        for name, row in table.items():
            numbers = "".join(f"{number:>10.4g} |" for number in row.values())
            lines.append(f"| {name:<{width}} |{numbers}")
    return "\n".join(lines)

@torch.no_grad()
def forecast(model, signal, xyz, num_timepoints):
    """Continue a recording: signal [B, >= P, V] -> [B, num_timepoints, V]. Patch by patch: append a
    hidden one, predict it, take the prediction for truth; no window is longer than in training."""
    P, T = model.config.timepoint_patching_size, model.config.num_timepoints_per_voxel
    known = signal
    while known.shape[1] < signal.shape[1] + num_timepoints:
        context = min(known.shape[1] // P * P, max(T - P, P))     # whole patches, room for one
        window = torch.cat([known[:, -context:], torch.zeros_like(known[:, :P])], dim=1)
        mask = forward_mask(len(window), window.shape[1] // P, window.shape[2])
        patch = model(window, xyz, mask)[0][:, -P:]                               # [B, P, V]
        known = torch.cat([known, patch.to(signal)], dim=1)
    return known[:, signal.shape[1]:][:, :num_timepoints]

@torch.no_grad()
def embed(model, signal, xyz):
    """Features for other tools: signal [B, T, V] -> CLS [B, H], which only finetuning with
    --no-freeze_backbone trains, and the parcels' mean hidden states over time [B, V, H]."""
    states = model(signal, xyz)[1]                                                   # [B, S, H]
    return states[:, 0], states[:, 1:].unflatten(1, (-1, signal.shape[2])).mean(dim=1)

@torch.no_grad()
def attention(model, signal, xyz, layer, mask=None):
    """Attention weights of a layer (0: the first), [B, heads, S, S], rows sum to one. Row 0 is CLS:
    its columns 1.., unflattened to (N, V), say how much it reads each parcel at each patch. For
    looking at: it builds the S x S matrix that training avoids."""
    B, T, V = signal.shape
    N = T // model.config.timepoint_patching_size
    hidden = torch.zeros(B, N, V, dtype=torch.bool) if mask is None else mask.cpu().expand(B, N, V)
    index, counts = visible_tokens(hidden)
    x, position = model.tokens(signal, xyz, mask)
    for earlier in model.layers[:layer]:
        x = earlier(x, position, V, (index.to(x.device), counts))
    q, k, _ = model.layers[layer].queries_keys_values(x, position)
    readable = torch.stack([block_causal_mask(N, V, of_sample) for of_sample in hidden])[:, None]
    products = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])             # [B, heads, S, S]
    return products.masked_fill(~readable.to(x.device), -math.inf).softmax(dim=-1)

@torch.no_grad()
def similarity(model, signal, xyz):
    """How alike a BrainLM finds what parcels do: signal [B, T, V] -> float32 [B, V, V], correlation
    of hidden states along time, less the parcel's mean state, which tells where it lies."""
    states = model(signal, xyz)[1][:, 1:].float().unflatten(1, (-1, signal.shape[2]))
    states = states - states.mean(dim=1, keepdim=True)                               # [B, N, V, H]
    states = F.normalize(states.transpose(1, 2).flatten(2), dim=2)                   # [B, V, N * H]
    return states @ states.mT

BrainLM.forecast, BrainLM.embed = forecast, embed
BrainLM.attention, BrainLM.similarity = attention, similarity

# 13. Devices, many processes, and the data of a command -------------------------------------------

RANK, LOCAL_RANK, WORLD_SIZE = 0, 0, 1
if dist.is_available() and dist.is_torchelastic_launched():        # by torchrun
    RANK, LOCAL_RANK = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    WORLD_SIZE = int(os.environ["WORLD_SIZE"])

def prepare_device(args):
    """The device and a function that makes the autocast context of a batch. Under torchrun it
    starts the process group."""
    name = args.device
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    with refusing(f"--device {name}: this machine or this build of torch has none"):
        torch.zeros(1, device=name)
    if args.dtype not in ("auto", "float32", "bfloat16"):
        raise BadInput(f"--dtype {args.dtype} must be auto, float32 or bfloat16")
    if name == "cuda":
        torch.cuda.set_device(LOCAL_RANK)               # which "cuda" means from here on
    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
    mixed = args.dtype == "bfloat16" or args.dtype == "auto" and name == "cuda"
    return torch.device(name), partial(torch.autocast, name, torch.bfloat16, enabled=mixed)

def make_missing_sample_data():
    """Under torchrun one process of each machine makes them, all wait."""
    if LOCAL_RANK == 0 and not Path("sample_data/train/state.json").exists():      # written last
        print("no ./sample_data yet: making it (python sample_data.py)")
        with refusing("no sample_data.py beside brainlm.py: get it, or name datasets of your own"):
            importlib.import_module("sample_data").make_sample_data("./sample_data")
    if WORLD_SIZE > 1:
        dist.barrier()

def people_of(dataset):
    """Who is in a RecordingDataset: its column Subject or, without one, its folder for them all."""
    if dataset.table.column_names.count("Subject") != 1:
        return {str(Path(dataset.path).resolve())}
    return {*map(str, dataset.table["Subject"].to_pylist())} - {"None"}

def open_data(args, T):
    """The Data of a command, whose windows are of T timepoints."""
    device, autocast = prepare_device(args)
    if args.train_dataset_path == DEMO["train_dataset_path"]:
        make_missing_sample_data()
    print("checking every number of the recordings", flush=True)
    xyz, networks = open_coordinates(args.coords_dataset_path)
    train_set, val_set = (
        open_recordings(path, args.recording_col_name, T, len(xyz), most)
        for path, most in ((args.train_dataset_path, args.max_train_samples),
                           (args.val_dataset_path, args.max_eval_samples)))
    print(f"data: {len(train_set)} training and {len(val_set)} validation recordings, {len(xyz)} "
          f"parcels, windows of {T}")
    both = people_of(train_set) & people_of(val_set)
    if both:
        print(f"note: {min(both)} ({len(both)} in all) is in the training and in the validation "
              "data: scores tell nothing of new people")
    return Data(xyz.to(device), networks, train_set, val_set, autocast=autocast,
                batch_size=args.per_device_eval_batch_size)

# 14. A run: training, and what makes it last ------------------------------------------------------

RESULTS = ("README.md", "evaluation.json", "predictions.csv",       # they tell of one model
           "evaluation.png", "networks.png", "predictions.png")

def prepare_folder(args):
    """Make args.output_dir; True if a run is to be resumed there. BadInput where others' files or
    the model to start from would be lost. With --overwrite_output_dir the old results go."""
    folder = Path(args.output_dir)
    if args.model_name_or_path and Path(args.model_name_or_path).resolve() == folder.resolve():
        raise BadInput(f"--output_dir {folder} is what training starts from: choose another")
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    if present and "training_state.pt" not in present:
        raise BadInput(f"{folder} holds {present[0]}, not a run: choose another --output_dir")
    if args.overwrite_output_dir:
        for name in RESULTS:
            (folder / name).unlink(missing_ok=True)
    return bool(present) and not args.overwrite_output_dir

def read_state(args, config):
    """What a stopped run left in args.output_dir. BadInput where it was of another kind."""
    file = Path(args.output_dir, "training_state.pt")
    anew = "start anew with --overwrite_output_dir, or choose another --output_dir"
    with refusing(f"{file} cannot be resumed: {anew}"):
        state = torch.load(file, map_location="cpu", weights_only=True)
        before, now = state["args"] | state["config"], vars(args) | asdict(config)
    for name in (*asdict(config), "command", "variable_of_interest_col_name", "freeze_backbone",
                 "model_name_or_path", "train_dataset_path", "coords_dataset_path",
                 "recording_col_name", "max_train_samples", "seed"):
        if before.get(name) != now.get(name):
            raise BadInput(f"{file}: {name} was {before.get(name)} there and is {now.get(name)} "
                           f"now: {anew}")
    return state

def run_training(args, model, data, num_recordings, batch_loss):
    """The loop of Part I, and around it resuming, progress, validation, checkpoints and, at the
    end, tables and model card. batch_loss(model, samples, step) -> scalar loss."""
    config, folder, device = model.config, Path(args.output_dir), data.xyz.device
    training = TrainingConfig(**settings_of(TrainingConfig, vars(args)))
    B, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    samples_per_step = B * accumulation * WORLD_SIZE
    optimizers = make_optimizers(model)
    first_step, first_sample, metrics, losses = 0, 0, [], []    # losses: since the last line
    states = [None]
    try:
        if RANK == 0 and prepare_folder(args):
            states = [read_state(args, config)]
    except (BadInput, OSError) as error:
        states = [error]
    if WORLD_SIZE > 1:                          # rank 0 may be the only one to see the folder
        dist.broadcast_object_list(states)
    state = states[0]
    if isinstance(state, Exception):
        raise state
    if state:
        with refusing(f"{folder / 'training_state.pt'} does not fit (--overwrite_output_dir?)"):
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            first_step, first_sample = state["step"], state["samples"]
            metrics, losses = state["metrics"], state["losses"]
    samples_left = math.ceil(args.num_train_epochs * num_recordings) - first_sample
    num_steps = args.max_steps or first_step + math.ceil(max(0, samples_left) / samples_per_step)
    if num_steps < first_step:
        raise BadInput(f"--max_steps {num_steps}: {folder} has {first_step} steps already")
    if state:
        print(f"resuming {folder} after step {first_step} of {num_steps}")
    elif num_steps * samples_per_step < 100:    # 60 parcels: masked R2 .01, as before the first
        print(f"note: {num_steps} steps are too few to learn much: raise --max_steps")

    def loss_of_samples(model, step, i):        # every process takes its own part of the samples
        batch = ((step - first_step) * accumulation + i) * WORLD_SIZE + RANK
        first = first_sample + batch * B
        with data.autocast():
            return batch_loss(model, range(first, first + B), step)

    def save(step):
        """First training_state.pt, complete: what resumes is always of one step. Then the rest."""
        if RANK == 0:
            write_atomically(folder / "training_state.pt", {
                "step": step, "samples": first_sample + (step - first_step) * samples_per_step,
                "metrics": metrics, "losses": losses, "args": vars(args), "config": asdict(config),
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
            write_atomically(folder / "args.json", to_json(vars(args), indent=2))
            parcels = dict(zip("XYZ", data.xyz.T.tolist())) | {"Network": data.networks}
            write_atomically(folder / "coordinates.json", to_json(parcels))
            write_atomically(folder / "metrics.jsonl", "".join(metrics))
            model.save_pretrained(folder)

    save(first_step)                            # loadable from the start, whatever happened before
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {samples_per_step} "
          f"windows a step, {WORLD_SIZE} x {device.type}")
    getattr(model, "backbone", model).gradient_checkpointing = args.gradient_checkpointing
    trained = nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    if args.compile:
        trained = torch.compile(trained)
    started = time.monotonic()
    for step, loss in train(trained, optimizers, loss_of_samples, training, num_steps, first_step):
        if step > first_step and args.eval_steps and step % args.eval_steps == 0:
            row = watch(model, data)
            print("  validation  " + "  ".join(f"{name} {row[name]:.4f}" for name in row))
            metrics.append(to_json({"step": step, **row}))
        if step > first_step and step % args.save_steps == 0:
            save(step)
        loss = torch.tensor(loss, dtype=torch.float64) / WORLD_SIZE
        if WORLD_SIZE > 1:
            dist.all_reduce(loss)
        losses.append(loss.item())
        done = step + 1
        if done % args.logging_steps == 0 or done == num_steps:
            seconds, mean = time.monotonic() - started, sum(losses) / len(losses)
            speed, rate = (done - first_step) / seconds, optimizers[0].param_groups[0]["lr"]
            left = datetime.timedelta(seconds=round((num_steps - done) / speed))
            print(f"step {done}/{num_steps}  loss {mean:.4f}  lr {rate:.2e}  "
                  f"{speed * samples_per_step:.1f} samples/s  {left} left", flush=True)
            metrics.append(to_json({"step": done, "loss": mean, "learning_rate": rate,
                                    "seconds": round(seconds, 2)}))
            losses.clear()
    save(num_steps)
    report(args, model, data, folder, num_steps)
    print(f"\nthe model is in {folder}")

def report(args, model, data, folder, num_steps=None):
    """Evaluate a model, print the tables and leave what comes of it in a folder, after num_steps of
    training with a model card: the results first, what could fail last."""
    tables, prediction = evaluate_model(model, data)
    print(markdown(tables), flush=True)
    if RANK > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if tables:                                  # none: nobody has a target, the older ones stay
        content = to_json({"args": vars(args), "tables": tables}, indent=2)
        write_atomically(folder / "evaluation.json", content)
    if num_steps is not None:
        write_atomically(folder / "README.md", model_card(model, data.train, num_steps, tables))
    if prediction is not None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(prediction_lines(data.val, prediction))
        write_atomically(folder / "predictions.csv", text.getvalue())
        print(f"predictions in {folder / 'predictions.csv'}")

def prediction_lines(dataset, prediction):
    """The lines of predictions.csv: of each recording its row, what of the dataset's columns can be
    text, and the prediction. A name that the dataset has already is its own."""
    others = dataset.table.drop_columns(dataset.recording_col)
    taken = others.column_names
    columns = {"brainlm_row" if "row" in taken else "row": range(len(dataset))}
    for name, column in zip(taken, others.columns):
        try:
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            columns[name] = column.cast(pa.string()).to_pylist()
        except pa.ArrowException as error:
            print(f"note: predictions.csv leaves out column {name!r}: it is no text ({error})")
    columns["brainlm_prediction" if "prediction" in taken else "prediction"] = prediction.tolist()
    return [list(columns), *zip(*columns.values())]

def model_card(model, dataset, num_steps, tables):
    """The README.md of a run folder, which the Hub shows."""
    name, T = type(model).__name__, model.config.num_timepoints_per_voxel
    return f"""---
tags: [fmri, brainlm]
---
# {name}

Trained for {num_steps} steps on `{dataset.recording_col}` of `{Path(dataset.path).name}`
({len(dataset)} recordings of {dataset.num_parcels} parcels), compared with closed-form baselines:
{markdown(tables)}

To run it, in this folder (the method: https://openreview.net/forum?id=RwI7ZEfR27):
```python
import json, torch
from brainlm import {name}
xyz = torch.tensor([json.load(open("coordinates.json"))[axis] for axis in "XYZ"]).T  # [V, 3], mm
signal = torch.zeros(1, {T}, len(xyz))          # yours, [B, T, V], scaled as those it learned from
output = {name}.from_pretrained(".")(signal, xyz)
```
"""

# 15. Commands -------------------------------------------------------------------------------------

def pretrain(args):
    """Learn to reconstruct hidden tokens."""
    torch.manual_seed(args.seed)
    settings = settings_of(BrainLMConfig, vars(args))
    if args.model_name_or_path:
        model = BrainLM.from_pretrained(args.model_name_or_path, **settings)
    else:
        model = BrainLM(check_config(BrainLMConfig(**settings)))
    config = model.config
    data = open_data(args, config.num_timepoints_per_voxel)
    model.to(data.xyz.device).cls_token.requires_grad_(False)   # no parcel reads CLS
    random_mask(1, 1, len(data.xyz), config.mask_ratio)         # refuses a ratio that hides nothing

    def batch_loss(model, samples, step):
        signal, mask = pretraining_batch(data.train, config, args.seed, samples, step)
        prediction, _ = model(signal, data.xyz, mask)
        return reconstruction_loss(prediction, signal, mask, config.loss_fn)

    run_training(args, model, data, len(data.train), batch_loss)

def finetune(args):
    """Learn to predict a scalar of each recording."""
    settings = settings_of(BrainLMConfig, vars(args))
    backbone = BrainLM.from_pretrained(args.model_name_or_path, **settings)
    T = backbone.config.num_timepoints_per_voxel
    data = open_data(args, T)
    data.column = args.variable_of_interest_col_name
    data.val_target = open_target(data.val, data.column, least=1)
    data.target = open_target(data.train, data.column, least=2)
    rows = np.flatnonzero(~np.isnan(data.target))
    std = data.target[rows].std()

    torch.manual_seed(args.seed)
    model = BrainLMRegressor(backbone.config, data.target[rows].mean(), std).to(data.xyz.device)
    model.backbone.load_state_dict(backbone.state_dict())
    model.backbone.requires_grad_(not args.freeze_backbone)
    for unused in model.backbone.head.weight, model.backbone.head.bias, model.backbone.mask_token:
        unused.requires_grad_(False)
    features = torch.cat([in_batches(data, lambda signal: model.features(signal, data.xyz),
                                     data.train.batch([(row, 0)], T))
                          for row in rows[:MAX_BASELINE_ROWS]])              # [rows, 3 * H]
    model.feature_mean.copy_(features.mean(dim=0))
    model.feature_std.copy_(features.std(dim=0).nan_to_num(1.0).clamp(min=1e-6))

    def batch_loss(model, samples, step):
        windows = [data.train.training_window(n, rows, T, args.seed) for n in samples]
        target = torch.tensor([data.target[row] for row, _ in windows], dtype=torch.float32)
        prediction = model(data.train.batch(windows, T), data.xyz)
        return regression_loss(prediction, target.to(data.xyz.device), std)

    run_training(args, model, data, len(rows), batch_loss)

def evaluate(args):
    """Tables as in the paper, of a checkpoint on any dataset, each number beside its opponents'."""
    name = args.model_name_or_path
    source = model_folder(name)
    folder = Path(args.output_dir or (name if Path(name).is_dir() else f"runs/{name}"))
    model = from_pretrained(nn.Module, source, **settings_of(BrainLMConfig, vars(args)))
    data = open_data(args, model.config.num_timepoints_per_voxel)
    model.to(data.xyz.device)
    if isinstance(model, BrainLMRegressor):
        data.column, file = args.variable_of_interest_col_name, source / "args.json"
        if data.column is None:
            with refusing(f"{file} does not tell --variable_of_interest_col_name: give it"):
                trained = json.loads(file.read_text(encoding="utf-8"))
                data.column = trained["variable_of_interest_col_name"]
        data.val_target = open_target(data.val, data.column, least=0)
        scored = not np.isnan(data.val_target).all()
        data.target = open_target(data.train, data.column, least=2 if scored else 0)
    report(args, model, data, folder)
    print(f"\nresults in {folder}; pictures of them: python benchmarks/pictures.py {folder}")

@dataclass
class DataConfig:
    """What every command takes. As in Part I, fields are flags, and their comments the help."""
    train_dataset_path: str = None            # training recordings; None: ./sample_data/train
    val_dataset_path: str = None              # validation recordings; None: ./sample_data/val
    coords_dataset_path: str = None           # parcels' X, Y, Z in mm; None: ./sample_data/coords
    recording_col_name: str = "Voxelwise_RobustScaler_Normalized_Recording"  # (timepoints, parcels)
    max_train_samples: int = None             # use only the first training recordings
    max_eval_samples: int = None              # use only the first validation recordings
    model_name_or_path: str = None            # a run folder, or user/name on the Hub, to start from
    output_dir: str = None                    # what comes out; None: where the model is
    device: str = "auto"                      # cpu, cuda, mps; auto: the fastest there is
    dtype: str = "auto"                       # float32, bfloat16; auto: bfloat16 on CUDA alone
    per_device_eval_batch_size: int = 8       # windows to evaluate at once

@dataclass
class RunConfig:
    """What pretrain and finetune take besides."""
    num_train_epochs: float = 8.0             # an epoch is one window of each recording
    max_steps: int = None                     # steps of training, instead of epochs
    logging_steps: int = 10                   # steps between lines of progress
    eval_steps: int = 200                     # steps between validations; 0: only at the end
    save_steps: int = 50                      # steps between checkpoints
    overwrite_output_dir: bool = False        # start anew in that folder
    compile: bool = False                     # torch.compile; no GPU has run it yet
    gradient_checkpointing: bool = False      # less memory, a third more time

@dataclass
class TargetConfig:
    """What finetune and evaluate take besides."""
    variable_of_interest_col_name: str = None  # column of numbers to predict
    num_timepoints_per_voxel: int = None      # timepoints of a window; None: as in pretraining

@dataclass
class HeadConfig:
    """What finetune takes besides."""
    freeze_backbone: bool = True              # train the MLP head alone

class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")

def comments_of(config_class):
    """{field: the comment behind it}, of this file; {} where it is pasted into a notebook."""
    source = Path(__file__).read_text(encoding="utf-8") if "__file__" in globals() else ""
    own = source.partition(f"\nclass {config_class.__name__}:")[2].partition("\n\n")[0]
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", own, re.M))

def command_line():
    """The flags are the fields of dataclasses, named as in the reference implementation."""
    parser = OneLineParser(
        prog="brainlm.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=(
            "BrainLM in one file. Without flags, on sample data (which pretrain makes):\n"
            "  python brainlm.py pretrain      learn to fill in and to forecast, some minutes\n"
            "  python brainlm.py finetune      then to predict people's age\n"
            "  python brainlm.py evaluate      tables of the pretrained model and simple methods\n"
            "Flags, for own data: python brainlm.py COMMAND --help"))
    commands = parser.add_subparsers(dest="command")
    for run, (groups, defaults) in COMMANDS.items():
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        for config_class in groups:
            group, comments = command.add_argument_group(), comments_of(config_class)
            for option in fields(config_class):
                default = defaults.get(option.name, option.default)
                flag = {"type": option.type, "default": default}
                if option.type is bool:
                    flag = {"action": argparse.BooleanOptionalAction, "default": default}
                if config_class is BrainLMConfig:       # not given: what --model_name_or_path has
                    flag["default"] = argparse.SUPPRESS
                group.add_argument(f"--{option.name}", **flag,
                                   help=f"{comments.get(option.name)} (default: {default})")
    for name in DROPOUT:
        commands.choices["pretrain"].add_argument(f"--{name}", type=float, choices=[0.0, 0.1],
                                                  help=argparse.SUPPRESS)
    return parser

COMMANDS = {        # its flags, and where its defaults are not those of the fields
    pretrain: ((DataConfig, BrainLMConfig, TrainingConfig, RunConfig),
               {"output_dir": "./runs/pretrain"}),
    finetune: ((DataConfig, TargetConfig, HeadConfig, TrainingConfig, RunConfig),
               {"output_dir": "./runs/finetune", "num_train_epochs": 16.0, "eval_steps": 50,
                "variable_of_interest_col_name": "Age.At.MHQ",
                "per_device_train_batch_size": 8}),     # frozen, a backbone takes little
    evaluate: ((DataConfig, TargetConfig), {})}
DROPOUT = "hidden_dropout_prob", "attention_probs_dropout_prob"         # flags of the reference
DEMO = {"train_dataset_path": "./sample_data/train", "val_dataset_path": "./sample_data/val",
        "coords_dataset_path": "./sample_data/coords", "model_name_or_path": "./runs/pretrain"}

def parse(arguments=None):
    """The flags of a command. Of the paths all or none are the demo's: own recordings must not meet
    its coordinates, people or model, which may fit by chance."""
    parser = command_line()
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        sys.exit(2)
    paths = [name for name in DEMO if (args.command, name) != ("pretrain", "model_name_or_path")]
    missing = [name for name in paths if getattr(args, name) is None]
    if 0 < len(missing) < len(paths):
        raise BadInput(f"give --{', --'.join(missing)} too: own paths and the demo's do not mix")
    for name in missing:
        setattr(args, name, DEMO[name])
    if any([vars(args).pop(name, None) is not None for name in DROPOUT]):
        print(f"note: --{' and --'.join(DROPOUT)} do nothing: no kind of dropout gained anything")
    check_numbers(vars(args))
    return args

def main(arguments=None):
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):              # a console may lack letters of a column
            stream.reconfigure(errors="replace")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")              # rank 0 speaks for all
    try:
        args = parse(arguments)
        globals()[args.command](args)
    except (BadInput, OSError) as error:                # OSError: a folder that cannot be written
        print("error:", textwrap.shorten(str(error), 500, placeholder=" ..."), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; without --overwrite_output_dir the same command goes on from the last "
              "checkpoint", file=sys.stderr)
        sys.exit(130)                                   # as shells expect after Ctrl-C

if __name__ == "__main__" and "__file__" in globals():  # not in a notebook cell
    main()
