"""BrainLM in one file: a foundation model for brain activity (fMRI), to read, run and trust.

A recording is a matrix (timepoints, parcels): for each of, say, 424 regions of a brain the oxygen
in its blood (BOLD), which follows neural activity by seconds, scaled to median 0, interquartile
range 1. The model hides three quarters of a window of 200 timepoints and learns to fill them in;
what it learns predicts age or clinical scores. After Ortega Caro et al., BrainLM, ICLR 2024:
https://openreview.net/forum?id=RwI7ZEfR27

Part I is the lesson (sections 1 to 9; it runs alone in a notebook cell), Part II the program.

Shapes: B batch, T timepoints, V parcels, P patch length, N = T / P temporal tokens, H hidden size,
D = H / heads, S = 1 + N * V sequence length. "Temporal token n": the n-th patch of all parcels.
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
from torch.optim import Muon

# ==================================================================================================
# Part I: the lesson
# ==================================================================================================
class BadInput(ValueError):
    """A fault in data, flags or files that the user can mend: the commands print it as one line."""


# --------------------------------------------------------------------------------------------------
# 1. Configuration

@dataclass
class BrainLMConfig:
    """What defines a model: the config.json of a run folder. Each field is a flag of `pretrain`."""

    num_timepoints_per_voxel: int = 200       # T of a training window (names: the published code's)
    timepoint_patching_size: int = 20         # P
    hidden_size: int = 128                    # H, width of a token
    num_hidden_layers: int = 4
    num_attention_heads: int = None           # None: an even number, about H / 64
    intermediate_size: int = None             # width of the MLP in a layer; None: 4 * H
    hidden_dropout_prob: float = 0.0          # of what a layer adds; 0.1 gained nothing
    attention_probs_dropout_prob: float = 0.0  # any above 0 rules out the fast kernels on CPUs
    mask_ratio: float = 0.75                  # share of the tokens that a random mask hides
    loss_fn: str = "mse"                      # or "mae", which outliers move less

    def __post_init__(self):
        if self.num_attention_heads is None:    # even: section 9 makes half of them temporal
            even = range(2, max(2, self.hidden_size // 64) + 1, 2)
            self.num_attention_heads = max([n for n in even if self.hidden_size % n == 0] + [2])
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size


@dataclass
class TrainingConfig:
    """How a model is trained. Each field is a flag of `pretrain`; finetuning uses some of them."""

    per_device_train_batch_size: int = 2      # windows a process takes at once
    gradient_accumulation_steps: int = 1      # batches that make one step
    learning_rate: float = 2e-3               # after warm-up
    weight_decay: float = 0.1                 # of matrices alone
    warmup_ratio: float = 0.05                # share of the steps in which the rate rises
    forward_mask_prob: float = 0.3            # share of the steps that learn to forecast
    stride_prob: float = 0.0                  # share of the steps with every 2nd or 3rd timepoint
    seed: int = 0


# Knobs that have no flag; like the factors of section 9, they were found by trying.
ADAM_BETAS = 0.9, 0.95         # not 0.999: a run of 250 steps has no time to average over 1,000
MUON_RATE = 3.0                # Muon's learning rate = this times AdamW's; 6 was no better
MAX_GRADIENT_NORM = 1.0        # longer gradients are cut to this: one odd recording moves little
FORWARD_HIDDEN = 1 / 3         # probability that a forward step hides an earlier temporal token


# --------------------------------------------------------------------------------------------------
# 2. Data: folders as datasets.Dataset.save_to_disk of Hugging Face writes them

def read_arrow(path):
    """The dataset in a folder as a pyarrow.Table. state.json lists its files, which are Arrow IPC
    streams. They are memory-mapped: a number stays on disk until somebody looks at it."""
    state = json.loads(Path(path, "state.json").read_text())
    shards = []
    for entry in state["_data_files"]:
        file = pa.memory_map(str(Path(path, entry["filename"])))
        shards.append(pa.ipc.open_stream(file).read_all())
    return pa.concat_tables(shards)


def read_coordinates(path):
    """Parcel centres, float32 [V, 3], in mm of MNI space (a standard brain), from columns X, Y, Z
    of a dataset, a row a parcel; and the V functional systems of its column Network, or None."""
    table = read_arrow(path)
    xyz = np.stack([np.array(table[axis].to_pylist(), dtype=np.float32) for axis in "XYZ"], axis=1)
    networks = table["Network"].to_pylist() if "Network" in table.column_names else None
    return torch.from_numpy(xyz), networks


class RecordingDataset:
    """The recordings in the column `recording_col` of a dataset, (timepoints, parcels) each, handed
    out as windows without loading them. Numbers may be of any type, recordings of any length.
    max_samples: only the first rows. Has lengths, int64 [rows] in timepoints, and num_parcels."""

    def __init__(self, path, recording_col, max_samples=None):
        self.path, self.recording_col = path, recording_col
        self.table = read_arrow(path)[:max_samples]
        # `datasets` may wrap the nested lists into an extension type, Array2D: take what it stores.
        chunks = [getattr(chunk, "storage", chunk) for chunk in self.table[recording_col].chunks]
        recordings = pa.chunked_array(chunks)
        # Flattening drops a level of list offsets and copies nothing.
        timepoints = pc.list_flatten(recordings)         # of all recordings, one after the other
        self.values = pc.list_flatten(timepoints)        # every number of the column, in one row
        self.num_parcels = len(timepoints[0])
        self.lengths = pc.list_value_length(recordings).to_numpy().astype(np.int64)
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
        return values.chunk(0).to_numpy(zero_copy_only=False).reshape(T, V)  # is in one chunk

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
        order = torch.randperm(len(rows), generator=generator(seed, "order of the rows", epoch))
        row = int(rows[order[i]])
        num_starts = int(self.lengths[row]) - num_timepoints + 1
        return row, int(torch.randint(num_starts, (), generator=generator(seed, "window", n)))


def generator(seed, stream, number):
    """A source of random numbers for one use: (0, "random mask", 17) is that of sample 17's mask.
    No draw depends on what was drawn before. So a run that was stopped goes on as if it had not
    been, and any number of processes together draws what one would (dropout in `train` aside)."""
    digest = hashlib.sha256(f"{seed}, {stream}, {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))   # torch takes 32 bits


# --------------------------------------------------------------------------------------------------
# 3. Tokens: what (a patch of signal) + where (the parcel) + when (the patch's place in the window)

def patchify(signal, P):
    """Cut every parcel's time series into patches of P timepoints: [B, T, V] -> [B, N, V, P]."""
    B, T, V = signal.shape
    return signal.reshape(B, T // P, P, V).transpose(2, 3)


def unpatchify(patches):
    """Inverse of patchify: [B, N, V, P] -> [B, T, V]."""
    B, N, V, P = patches.shape
    return patches.transpose(2, 3).reshape(B, N * P, V)


class SpatialEncoding(nn.Module):
    """Where a parcel is, learned from its coordinates: [V, 3] in MNI mm -> [V, H].

    Why not a Linear on xyz itself? Attention compares tokens by products, and those of three
    numbers cannot say "I read my neighbours". Those of sines and cosines of many wavelengths can:
    they add up where two places agree, and cancel elsewhere.
    """

    def __init__(self, hidden_size, num_octaves=8):
        super().__init__()
        self.num_octaves = num_octaves
        self.linear = nn.Linear(6 * num_octaves, hidden_size)      # 3 axes x sine, cosine x octaves

    def forward(self, xyz):
        # From 256 mm, which spans a brain once, down to 2 mm, which tells any two parcels apart.
        wavelengths = 256.0 / 2 ** torch.arange(self.num_octaves, device=xyz.device)
        angles = 2 * math.pi * xyz.float()[:, :, None] / wavelengths            # [V, 3, octaves]
        waves = torch.cat([angles.sin(), angles.cos()], dim=2)                  # [V, 3, 2 octaves]
        return self.linear(waves.flatten(1).to(self.linear.weight.dtype))       # [V, H]


def temporal_encoding(N, hidden_size, device=None):
    """When a patch is: the sinusoid of Vaswani et al. 2017, section 3.5, [N, H]. Its base is 100,
    theirs 10,000: over the tens of patches of a window, waves that slow would stand still."""
    place = torch.arange(N, device=device)[:, None]                             # [N, 1]
    exponent = -torch.arange(0, hidden_size, 2, device=device) / hidden_size    # [H / 2], 0 to ~ -1
    angles = place * 100.0 ** exponent                                          # [N, H / 2]
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)         # [N, H]


# --------------------------------------------------------------------------------------------------
# 4. Attention. The sequence is [CLS, all parcels' tokens of patch 0, all parcels' of patch 1, ...]

def block_causal_mask(N, V):
    """Who may read whom (for tests and pictures): bool [S, S], mask[i, j] = token i may read j.
    A parcel's token reads all parcels of its own and earlier patches, never of later ones: so one
    model fills gaps and forecasts. CLS (row 0) reads everything, and no parcel reads CLS (column
    0): CLS knows the future, and would hand it back to the past from the second layer on."""
    block = torch.arange(N).repeat_interleave(V)                # [N * V]: 0 0 0 1 1 1 ... (V = 3)
    mask = torch.ones(1 + N * V, 1 + N * V, dtype=torch.bool)
    mask[1:, 0] = False
    mask[1:, 1:] = block[:, None] >= block[None, :]
    return mask


def block_causal_attention(q, k, v, V, dropout=0.0):
    """Attention under block_causal_mask, which is never built: q, k, v and the result
    [B, heads, S, D]. All rows of block t read the same columns, those of blocks 0..t: one dense
    attention on slices of k and v. The fast kernels take no mask, but they do take slices; and
    the upper triangle, nearly half of the S x S products, is never computed."""
    S = q.shape[2]
    outputs = [F.scaled_dot_product_attention(q[:, :, :1], k, v, dropout_p=dropout)]      # CLS
    for start in range(1, S, V):
        stop = start + V
        outputs.append(F.scaled_dot_product_attention(
            q[:, :, start:stop], k[:, :, 1:stop], v[:, :, 1:stop], dropout_p=dropout))
    return torch.cat(outputs, dim=2)


# --------------------------------------------------------------------------------------------------
# 5. Model

class Layer(nn.Module):
    """A pre-norm transformer layer: attention, then an MLP, each added to the residual stream x."""

    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.hidden_dropout_prob
        self.attention_dropout = config.attention_probs_dropout_prob
        self.attention_norm = nn.LayerNorm(H)
        self.qkv = nn.Linear(H, 3 * H)
        self.position_qk = nn.Linear(2 * H, 2 * H, bias=False)
        self.out = nn.Linear(H, H)
        self.mlp_norm = nn.LayerNorm(H)
        self.up = nn.Linear(H, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, H)

    def queries_keys_values(self, x, position):
        """x [B, S, H], position [S, 2 * H] -> q, k, v, [B, heads, S, D] each. Where and when enter
        queries and keys of every layer anew: who reads whom stays sharp as x fills with content."""
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)              # [B, S, H] each
        position_q, position_k = self.position_qk(position).chunk(2, dim=-1)     # [S, H] each
        # [B, S, H] -> [B, heads, S, D]: each head works on its own D of the H numbers of a token.
        return [tensor.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                for tensor in (q + position_q, k + position_k, v)]

    def forward(self, x, position, V):
        """x [B, S, H], position [S, 2 * H] -> [B, S, H]."""
        q, k, v = self.queries_keys_values(x, position)
        dropout = self.attention_dropout if self.training else 0.0
        attended = block_causal_attention(q, k, v, V, dropout)                   # [B, heads, S, D]
        attended = self.out(attended.transpose(1, 2).flatten(2))                 # [B, S, H]
        x = x + F.dropout(attended, self.dropout, self.training)
        mlp = self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))   # [B, S, H]
        return x + F.dropout(mlp, self.dropout, self.training)


class BrainLM(nn.Module):
    """The backbone: reconstructs a recording from what the mask leaves of it. No parameter depends
    on V or N: the same weights run on any atlas and any number of patches."""

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
        initial_weights(self)

    def positions(self, xyz, N):
        """Where each parcel is, [V, H], when each temporal token is, [N, H], and both side by side
        for each token of the sequence, [S, 2 * H]. CLS has no place and no time: zeros."""
        where = self.spatial_encoding(xyz)                                           # [V, H]
        when = temporal_encoding(N, where.shape[1], xyz.device).to(self.cls_token.dtype)  # [N, H]
        of_parcels = torch.cat([where.repeat(N, 1), when.repeat_interleave(len(xyz), dim=0)], dim=1)
        of_cls = torch.zeros_like(of_parcels[:1])
        return where, when, torch.cat([of_cls, of_parcels])    # [V, H], [N, H], [S, 2 * H]

    def tokens(self, signal, xyz, mask=None):
        """signal [B, T, V], xyz [V, 3] in mm, mask bool [B, N, V] or None -> the sequence [B, S, H]
        and its positions [S, 2 * H]. Raises BadInput where the shapes do not fit."""
        B, T, V = signal.shape
        P = self.config.timepoint_patching_size
        if T % P or V != len(xyz):
            raise BadInput(f"signal has {T} timepoints and {V} parcels: the first must be a "
                           f"multiple of {P}, the second equal the {len(xyz)} coordinates")
        patches = patchify(signal, P).to(self.cls_token.dtype)                       # [B, N, V, P]
        what = self.patch_projection(patches)                                        # [B, N, V, H]
        if mask is not None:                    # a hidden token keeps its where and its when
            what = torch.where(mask[..., None], self.mask_token.to(what.dtype), what)
        where, when, position = self.positions(xyz, T // P)    # [V, H], [N, H], [S, 2 * H]
        tokens = what + where + when[:, None]   # [B, N, V, H] + [V, H] + [N, 1, H]
        cls = self.cls_token.expand(B, 1, -1)                                        # [B, 1, H]
        return torch.cat([cls, tokens.flatten(1, 2)], dim=1), position

    def forward(self, signal, xyz, mask=None):
        """signal float [B, T, V], xyz float [V, 3] in mm, mask bool [B, N, V] (True = hidden) or
        None. Returns the reconstruction [B, T, V] and the hidden states [B, S, H], CLS first."""
        V = signal.shape[2]
        x, position = self.tokens(signal, xyz, mask)                      # [B, S, H], [S, 2 * H]
        for layer in self.layers:
            x = layer(x, position, V)
        states = self.norm(x)                                                        # [B, S, H]
        patches = self.head(states[:, 1:]).unflatten(1, (-1, V))                     # [B, N, V, P]
        return unpatchify(patches), states

    @torch.no_grad()
    def forecast(self, signal, xyz, num_timepoints):
        """Continue a recording: signal [B, >= P timepoints, V] -> [B, num_timepoints, V].
        Patch by patch: append a hidden one, predict it, take the prediction for truth. Once the
        window is as long as in training, the oldest patch leaves it."""
        P, T = self.config.timepoint_patching_size, self.config.num_timepoints_per_voxel
        known = signal
        while known.shape[1] < signal.shape[1] + num_timepoints:
            context = min(known.shape[1] // P * P, max(T - P, P))     # whole patches, room for one
            window = torch.cat([known[:, -context:], torch.zeros_like(known[:, :P])], dim=1)
            mask = forward_mask(len(window), window.shape[1] // P, window.shape[2])
            patch = self(window, xyz, mask.to(signal.device))[0][:, -P:]             # [B, P, V]
            known = torch.cat([known, patch.to(signal.dtype)], dim=1)
        return known[:, signal.shape[1]:][:, :num_timepoints]

    @torch.no_grad()
    def embed(self, signal, xyz):
        """Features for other tools: signal [B, T, V] -> CLS [B, H], which only finetuning with
        --no-freeze_backbone trains, and the parcels' mean hidden states over time [B, V, H]."""
        states = self(signal, xyz)[1]                                                # [B, S, H]
        parcels = states[:, 1:].unflatten(1, (-1, signal.shape[2]))                  # [B, N, V, H]
        return states[:, 0], parcels.mean(dim=1)


# --------------------------------------------------------------------------------------------------
# 6. Masking and loss

def random_mask(B, N, V, mask_ratio, generator=None):
    """bool [B, N, V], True = hidden: exactly round(mask_ratio * N * V) tokens of each sample."""
    num_hidden = round(mask_ratio * N * V)
    if num_hidden == 0:
        raise BadInput(f"mask_ratio {mask_ratio} hides none of {N * V} tokens: nothing to learn")
    order = torch.rand(B, N * V, generator=generator).argsort(dim=1)     # B permutations
    mask = torch.zeros(B, N * V, dtype=torch.bool)                       # [B, N * V]
    return mask.scatter_(1, order[:, :num_hidden], True).view(B, N, V)


def forward_mask(B, N, V):
    """bool [B, N, V], True = hidden: the last temporal token of each parcel. To reconstruct it is
    to forecast, since nothing reads the future."""
    mask = torch.zeros(B, N, V, dtype=torch.bool)
    mask[:, -1] = True
    return mask


def reconstruction_loss(prediction, signal, mask, loss_fn="mse"):
    """Mean squared ("mse") or absolute ("mae") error over hidden tokens alone: a visible one could
    simply be copied. prediction, signal [B, T, V], mask bool [B, N, V]."""
    P = signal.shape[1] // mask.shape[1]
    hidden = mask.repeat_interleave(P, dim=1)                                        # [B, T, V]
    error = (prediction - signal)[hidden]
    return error.square().mean() if loss_fn == "mse" else error.abs().mean()


def pretraining_batch(dataset, config, training, samples, step):
    """What a step learns from: signal [B, T, V] and mask bool [B, N, V] of the samples with these
    numbers. Sampling rate and kind of mask are one for the step, in all its batches."""
    T, V = config.num_timepoints_per_voxel, dataset.num_parcels
    N, B, seed = T // config.timepoint_patching_size, len(samples), training.seed
    stride, random = 1, generator(seed, "stride", step)
    if torch.rand((), generator=random) < training.stride_prob:     # a slower scan, as rows allow
        stride = min(int(torch.randint(2, 4, (), generator=random)), dataset.lengths.min() // T)
    windows = [dataset.training_window(n, range(len(dataset)), stride * T, seed) for n in samples]
    random = generator(seed, "kind of mask", step)
    if torch.rand((), generator=random) < training.forward_mask_prob:
        # Some earlier patches too, the same in all samples, [N, 1]: several forecasts in a window.
        mask = forward_mask(B, N, V) | (torch.rand(N, 1, generator=random) < FORWARD_HIDDEN)
    else:
        mask = torch.cat([random_mask(1, N, V, config.mask_ratio, generator(seed, "random mask", n))
                          for n in samples])
    return dataset.batch(windows, stride * T)[:, ::stride], mask             # [B, T, V], [B, N, V]


def pretraining_loss(model, signal, xyz, mask, loss_fn="mse"):
    """Hide, reconstruct, compare: the loss of a batch."""
    prediction, _ = model(signal, xyz, mask)                                         # [B, T, V]
    return reconstruction_loss(prediction, signal, mask, loss_fn)


# --------------------------------------------------------------------------------------------------
# 7. Regression head, for finetuning

class BrainLMRegressor(nn.Module):
    """Backbone and a 3-layer MLP: signal [B, T, V] -> [B], in the target's own units (years, ...).

    The paper's MLP reads CLS alone. Here no parcel reads CLS, so the pretraining loss never reaches
    it: the MLP also reads mean and spread of all parcel tokens. People differ by a few percent in
    these: so `finetune` sets the four buffers, by which features and target get mean 0 and std 1.
    """

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


def regression_loss(model, signal, xyz, target, target_std):
    """Mean squared error over target_std ** 2, so that years and scores train alike. target [B]."""
    return ((model(signal, xyz) - target) / target_std).square().mean()


# --------------------------------------------------------------------------------------------------
# 8. Training

def learning_rate_factor(step, num_steps, warmup_ratio):
    """Share of the learning rate in step 0..num_steps-1: a straight line up, then half a cosine."""
    warmup = max(1, round(warmup_ratio * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (num_steps - warmup)                        # from 0 to below 1
    return 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(model, learning_rate, weight_decay):
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for the rest. Muon makes a matrix's
    step equally long in all directions: what few samples agree on is learned as fast as what all
    do. Only matrices decay. "scale" is ours: train multiplies the learning rate by it."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    in_layers = [p for name, p in trained.items() if "layers." in name and p.dim() == 2]
    elsewhere = [p for name, p in trained.items() if "layers." not in name and p.dim() == 2]
    vectors = [p for p in trained.values() if p.dim() < 2]
    optimizers = [torch.optim.AdamW(
        [{"params": elsewhere, "weight_decay": weight_decay, "scale": 1.0},
         {"params": vectors, "weight_decay": 0.0, "scale": 1.0}],
        lr=learning_rate, betas=ADAM_BETAS, fused=True)]
    if in_layers:                               # none where the backbone is frozen
        optimizers.append(Muon([{"params": in_layers, "scale": MUON_RATE}], learning_rate,
                               weight_decay, adjust_lr_fn="match_rms_adamw"))   # steps as AdamW's
    return optimizers


def train(model, optimizers, batch_loss, training, num_steps, first_step=0, sample=0, rank=0,
          num_processes=1):
    """Train the model in place: `for step, loss in train(...)`, from first_step to num_steps.

    Before each update it yields: `step` updates are done, the next gradient is finite (else
    BadInput), these weights are fit to save or validate. sample: number of samples used before.
    batch_loss(model, samples, step) -> scalar loss of the samples with these numbers.
    """
    B, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    for step in range(first_step, num_steps):
        rate = training.learning_rate * learning_rate_factor(step, num_steps, training.warmup_ratio)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]

        model.train()
        seed = generator(training.seed, "dropout", step * num_processes + rank).initial_seed()
        torch.manual_seed(seed)                 # dropout draws from torch's global stream
        loss = 0.0
        for i in range(accumulation):
            mine = sample + (i * num_processes + rank) * B
            part = batch_loss(model, range(mine, mine + B), step) / accumulation
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
        sample += B * accumulation * num_processes


# --------------------------------------------------------------------------------------------------
# 9. The start: initial weights

def continuation(P):
    """What to expect after a patch, a matrix [P, P]: next patch = continuation @ patch. It is the
    conditional mean of a signal that is smooth over 4 timepoints, in noise of half its variance:
    the last few values go on, and decay. (On real and on sample data, 4 is best of 2 to 6.)"""
    time = torch.arange(2 * P)
    covariance = torch.exp(-0.5 * ((time[:, None] - time) / 4) ** 2)             # [2 * P, 2 * P]
    return covariance[P:, :P] @ torch.linalg.inv(covariance[:P, :P] + 0.5 * torch.eye(P))


@torch.no_grad()
def initial_weights(model):
    """A start with which the untrained BrainLM makes a fair first guess. Half of the heads, spatial
    ones, average what is near at the same time; temporal ones continue the patch before."""
    H, P = model.config.hidden_size, model.config.timepoint_patching_size
    N, heads = model.config.num_timepoints_per_voxel // P, model.config.num_attention_heads
    D = H // heads
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    # 1. [MASK] is about as large as the other terms of a token; CLS starts near zero.
    nn.init.normal_(model.mask_token, std=0.3)
    nn.init.normal_(model.cls_token, std=0.02)

    # 2. The patch projection keeps lengths (its P columns are orthonormal), and model.head inverts
    #    it. No other term may lie along these directions: the head would print it as signal. So QR
    #    turns the P columns away from ones (LayerNorm removes the mean over H) and the sinusoid;
    #    where and [MASK] lose their part along them.
    taken = torch.cat([torch.ones(1, H), temporal_encoding(N, H)]).T             # [H, 1 + N]
    directions = torch.cat([taken, torch.randn(H, P)], dim=1)                    # [H, 1 + N + P]
    projection = model.patch_projection.weight                                   # [H, P]
    projection.copy_(torch.linalg.qr(directions)[0][:, -P:])
    model.head.weight.copy_(projection.T)
    signal_space = projection @ projection.T                                     # [H, H]
    model.spatial_encoding.linear.weight -= signal_space @ model.spatial_encoding.linear.weight
    model.mask_token -= signal_space @ model.mask_token

    # 3. One patch later: the matrix with next_patch @ when(n) = when(n + 1), which turns each pair
    #    (sine, cosine) of the sinusoid by its own angle.
    sine, cosine = temporal_encoding(2, H)[1].view(-1, 2).T                      # [H / 2] each
    turns = torch.stack([cosine, sine, -sine, cosine], dim=1).view(-1, 2, 2)     # [H / 2, 2, 2]
    next_patch = torch.block_diag(*turns)                                        # [H, H]

    for layer in model.layers:
        # 4. Content: keys equal queries, so that a token reads those like itself. The factor 0.2
        #    makes that weak: it is place and time that should choose at first.
        query, key, value = layer.qkv.weight.chunk(3)                            # [H, H] each
        nn.init.orthogonal_(query).mul_(0.2)
        key.copy_(query)

        # 5. Hidden tokens have nothing to tell: the bias, 4 long in each head, turns all queries
        #    from [MASK]'s key. That lowers its score by about 0.3, its weight by a quarter.
        hidden_key = F.normalize((key @ model.mask_token).view(heads, D), dim=1)     # [heads, D]
        layer.qkv.bias.chunk(3)[0].copy_(-4 * hidden_key.flatten())

        # 6. Position: again keys equal queries, once for where and once for when, so that a token
        #    reads what is near it; only, keys of temporal heads tell the time of the next patch.
        #    The factors say how near: spatial heads average, temporal heads want one patch.
        query, key = layer.position_qk.weight.chunk(2)                           # [H, 2 * H] each
        nn.init.orthogonal_(query[:, :H])
        nn.init.orthogonal_(query[:, H:])
        query.view(heads, D, 2, H)[0::2] *= torch.tensor([2.0, 4.0])[:, None]    # where, when
        query.view(heads, D, 2, H)[1::2] *= torch.tensor([8.0, 6.0])[:, None]
        key.copy_(query)
        temporal_when = key.view(heads, D, 2, H)[1::2, :, 1]                     # [heads / 2, D, H]
        temporal_when.copy_(temporal_when @ next_patch)

        # 7. What is read: the first P numbers of every head are the patch itself. Spatial heads
        #    pass it on unchanged, temporal ones its continuation, each layer its share. The shares
        #    of a kind add up to 0.6, since both kinds often say the same. The MLP adds little yet.
        nn.init.orthogonal_(value)
        value.view(heads, D, H)[:, :P] = projection.T[:D]
        nn.init.zeros_(layer.out.weight)
        out = layer.out.weight.view(H, heads, D)[:, :, :P]                       # [H, heads, P]
        share = 0.6 / len(model.layers)
        out[:, 0::2] = share / math.ceil(heads / 2) * projection[:, None, :D]
        out[:, 1::2] = share / max(1, heads // 2) * (projection @ continuation(P))[:, None, :D]
        nn.init.normal_(layer.down.weight, std=0.002)


# ==================================================================================================
# Part II: the program
# ==================================================================================================

import argparse
import csv
import datetime
import functools
import importlib
import io
import os
import sys
import textwrap
import time
from dataclasses import asdict, fields

import torch.distributed as dist
import torch.utils.checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# 10. Refusing broken input: what Part I takes for granted, looked at once before anything is trained


def one_line(error):
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")


def check_numbers(settings):
    """BadInput names the first number that cannot be, in {name: value} of the flags or of a config.json."""
    for name, value in settings.items():
        least = 0 if type(value) is float or name in ("seed", "eval_steps") else 1
        most = 1 if name.endswith(("_prob", "_ratio")) else sys.maxsize
        if type(value) in (int, float) and not least <= value <= most:
            raise BadInput(f"{name} is {value}: it must lie between {least} and {most}")


def check_config(config):
    """The config again; BadInput names the setting that cannot be."""
    check_numbers(asdict(config))
    for option in fields(config):
        if option.type is int and type(getattr(config, option.name)) is not int:
            raise BadInput(f"{option.name} is {getattr(config, option.name)!r}: it must be a whole number")
    T, P, H = config.num_timepoints_per_voxel, config.timepoint_patching_size, config.hidden_size
    if T % P:
        raise BadInput(f"num_timepoints_per_voxel {T} is not divisible by timepoint_patching_size {P}: "
                       f"try {max(T // P, 1) * P}")
    if H % config.num_attention_heads or H % 2:
        raise BadInput(f"hidden_size {H} must be even and divisible by num_attention_heads "
                       f"{config.num_attention_heads}")
    if H < P:
        raise BadInput(f"hidden_size {H} is less than timepoint_patching_size {P}: a token must hold a patch")
    if config.loss_fn not in ("mse", "mae"):
        raise BadInput(f"loss_fn is {config.loss_fn!r}: it must be mse or mae")
    return config


LARGEST = 1e30                  # of a coordinate or target: its square must fit into a float32 too


def open_table(path):
    """read_arrow, with every fault of the folder or its files as BadInput."""
    if Path(path, "dataset_dict.json").exists():
        raise BadInput(f"{path} holds several datasets: name one of the folders in it")
    file = Path(path, "state.json")                     # the one that a fault below is in
    try:
        state = json.loads(file.read_text())
        for entry in state["_data_files"]:
            file = Path(path, entry["filename"])
            stream = pa.memory_map(str(file))
            # A stream that was cut between two record batches reads as a shorter one: only its end marker tells.
            if stream.read_at(8, stream.size() - 8) != b"\xff\xff\xff\xff\0\0\0\0":
                raise ValueError("no end-of-stream marker")
            # Finds offsets out of bounds; reads no number of a recording.
            pa.ipc.open_stream(stream).read_all().validate(full=True)
        table = read_arrow(path)
    except (OSError, ValueError, KeyError, TypeError) as error:         # pyarrow's are ValueErrors
        raise BadInput(f"{file} is missing, truncated or not what save_to_disk writes ({one_line(error)}): write the "
                       "dataset again, with write_dataset of sample_data.py or datasets.save_to_disk") from None
    if state.get("_indices_data_files"):
        raise BadInput(f"{path} was saved with an index mapping by an old `datasets`: load and save it again there")
    if len(table) == 0:
        raise BadInput(f"{path}: the dataset has no rows")
    return table


def open_column(table, name, path):
    """One column; BadInput lists the columns there are if it is missing."""
    if table.column_names.count(name) != 1:
        raise BadInput(f"{path}: no column {name!r} (there are {', '.join(table.column_names)})")
    return table[name]


def is_number(kind):
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def is_list(kind):
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def open_numbers(table, name, path):
    """A column of scalars as float64 [rows]; a missing value (None) becomes NaN. BadInput if it is not numeric."""
    column = open_column(table, name, path)
    if not (is_number(column.type) or pa.types.is_boolean(column.type) or pa.types.is_null(column.type)):
        raise BadInput(f"{path}: column {name!r} is not numeric but {column.type}")
    return np.array(column.to_pylist(), dtype=np.float64)


def open_coordinates(path):
    """read_coordinates, with BadInput for a coordinate that is missing or not finite, and a note for odd units."""
    table = open_table(path)
    for axis in "XYZ":
        for row, value in enumerate(open_numbers(table, axis, path)):
            if not abs(value) < LARGEST:
                raise BadInput(f"{path}: coordinate {axis} of row (parcel) {row} is {value}")
    xyz, networks = read_coordinates(path)
    low, high = xyz.min().item(), xyz.max().item()
    # A brain reaches at most 110 mm (11 cm) from the origin of MNI space; voxel indices are never negative.
    if low >= 0 or not 12 <= max(-low, high) <= 200:
        print_once(f"note: {path}: coordinates from {low:.4g} to {high:.4g} do not look like MNI millimetres "
                   "(about -110 to 90), and the model needs these to tell which parcels are near each other")
    return xyz, networks


def open_recordings(path, recording_col, window=1, num_parcels=None, max_samples=None):
    """A RecordingDataset in which every number has been looked at once.

    window is the shortest recording that is accepted, in timepoints; num_parcels how many there must be (None: as many
    as in the first row). Raises BadInput naming row, timepoint and parcel.
    """
    def refuse(fault):
        raise BadInput(f"{path}: column {recording_col!r}: {fault}")

    column = open_column(open_table(path)[:max_samples], recording_col, path)
    column = pa.chunked_array([getattr(chunk, "storage", chunk) for chunk in column.chunks])
    kind = column.type
    if not (is_list(kind) and is_list(kind.value_type) and is_number(kind.value_type.value_type)):
        refuse(f"holds {kind}: a recording is a two-dimensional list of numbers, (timepoints, parcels)")
    for row, recording in enumerate(column):
        if not recording.is_valid:
            refuse(f"row {row} is missing")
        timepoints = recording.values                   # an Arrow list of parcels for each
        if timepoints.null_count:
            refuse(f"row {row}, timepoint {timepoints.is_null().index(True)} is missing")
        widths = pc.list_value_length(timepoints).to_numpy()
        num_parcels = num_parcels or max(1, max(widths, default=0))
        if (widths != num_parcels).any():
            t = np.argmax(widths != num_parcels)
            refuse(f"row {row}, timepoint {t} has {widths[t]} parcels, expected {num_parcels}: is it ragged, "
                   "transposed (timepoints come first) or of another atlas than the coordinates?")
        if len(timepoints) < window:
            refuse(f"row {row} has {len(timepoints)} timepoints, fewer than the window of {window}: leave it out or "
                   "lower --num_timepoints_per_voxel")
        signal = timepoints.flatten().to_numpy(zero_copy_only=False)        # [timepoints * parcels]
        with np.errstate(over="ignore"):                # what is too large for float32 is infinite for the model
            finite = np.isfinite(signal.astype(np.float32, copy=False))
        if not finite.all():
            t, v = divmod(np.argmin(finite), num_parcels)
            refuse(f"row {row}, timepoint {t}, parcel {v} is {signal[np.argmin(finite)]}: "
                   "repair it or leave the row out")
    return RecordingDataset(path, recording_col, max_samples)


# dataset[row]: the whole recording, float32 [T, V]. Iteration ends at the IndexError of the row after the last.
RecordingDataset.__getitem__ = lambda self, row: torch.from_numpy(self.window(row).astype(np.float32))


def open_target(dataset, column, num_values):
    """The rows that have a target, int64, and the targets of all rows, float64 with NaN. BadInput where there are fewer
    than num_values different ones (0: the column may be absent)."""
    target = np.full(len(dataset), np.nan)
    if num_values or column in dataset.table.column_names:
        target = open_numbers(dataset.table, column, dataset.path)
    huge = np.flatnonzero(np.abs(target) >= LARGEST)
    if len(huge):
        raise BadInput(f"{dataset.path}: column {column!r} is {target[huge[0]]} in row {huge[0]}")
    rows = np.flatnonzero(~np.isnan(target))
    values = np.unique(target[rows])
    if len(values) < num_values:
        raise BadInput(f"{dataset.path}: column {column!r} is {values[0] if len(values) else 'missing'} in every row")
    if len(rows) < len(target):
        print_once(f"{dataset.path}: {len(target) - len(rows)} of {len(target)} recordings have no {column}: neither "
                   "learned from nor scored")
    return rows, target


def note_signal_units(dataset):
    """A line where one of a few recordings, zeros and constant parcels left out, is not of order one."""
    for row in range(0, len(dataset), math.ceil(len(dataset) / 5)):
        signal = dataset.window(row).astype(np.float32)                                      # [T, V]
        sizes = np.abs(signal[:, (signal != signal[0]).any(axis=0)])
        size = np.median(sizes[sizes > 0]) if sizes.any() else 1
        # Half of a robust-scaled parcel lies in a range of 1 around 0: its median size is at most 1, whatever the
        # outliers, and usually 0.5. A tenth of that taught nothing in 250 steps (60 parcels: masked R2 .01, not .18).
        if not 0.1 <= size <= 10:
            print_once(f"note: {dataset.path}: row {row} has values of about {size:.4g}, where the model expects 1: "
                       "scale each parcel to median 0, interquartile range 1, with robust_scale of sample_data.py")
            break


# ----------------------------------------------------------------------------------------------------------------------
# 11. Checkpoints: folders that survive a kill and are Hugging Face Hub repositories


def import_optional(package):
    """A package that only some features need; BadInput says how to install it. (transformers would take an `import`
    statement for a requirement, when it loads this file from the Hub.)"""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.split(".")[0].replace("sklearn", "scikit-learn")
        raise BadInput(f"this needs the package {name}: pip install {name} ({error})") from None


def write_atomically(path, content):
    """Write text, or what torch.save takes, into a new file beside path and rename it into place: at any instant path
    is the old file or the new one. Raises OSError if that fails (disk full, no permission)."""
    temporary = Path(path).with_name(f".{Path(path).name}.part")
    try:
        with open(temporary, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                        # torch.save wraps OSError into RuntimeError
        raise OSError(f"could not write {path} ({one_line(error)}): what was saved before is intact") from None


def to_json(content, indent=None):
    """JSON has no NaN and no infinity: null stands for them."""
    without = json.loads(json.dumps(content), parse_constant=lambda name: None)
    return json.dumps(without, indent=indent) + "\n"


def load_tensors(path):
    """The dict in a file of torch.save (plain values only) or, by its name, of safetensors."""
    load = functools.partial(torch.load, map_location="cpu", weights_only=True)
    if path.suffix == ".safetensors":
        load = import_optional("safetensors.torch").load_file
    try:
        return dict(load(path))
    except Exception as error:                          # a cut file raises one of half a dozen kinds
        raise BadInput(f"{path} is missing, truncated or no checkpoint ({type(error).__name__})") from None


def save_pretrained(model, folder):
    """Write a model as a folder that from_pretrained and the Hugging Face Hub can read. Where this file was pasted into
    a notebook there is no file to copy: the Hub then lacks brainlm.py."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hub_class = "BrainLMForRegression" if isinstance(model, BrainLMRegressor) else "BrainLMForPreTraining"
    write_atomically(folder / "config.json", to_json(asdict(model.config) | {
        "model_type": "brainlm", "architectures": [hub_class],
        "auto_map": {"AutoConfig": f"brainlm.{hub_class}Config", "AutoModel": f"brainlm.{hub_class}",
                     "AutoModelForPreTraining": f"brainlm.{hub_class}"}}, indent=2))
    if "__file__" in globals():
        write_atomically(folder / "brainlm.py", Path(__file__).read_text(encoding="utf-8"))
    write_atomically(folder / "pytorch_model.bin", model.state_dict())
    (folder / "model.safetensors").unlink(missing_ok=True)          # of another model: one folder, one model


def from_pretrained(model_class, name_or_path, **changes):
    """A BrainLM or BrainLMRegressor from a run folder, or from the Hub by its "user/name", in evaluation mode. BrainLM
    also takes the backbone of a regressor's folder. changes: fields of its BrainLMConfig that shall be others, such as
    mask_ratio. Raises BadInput if anything is missing, broken or does not fit."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = download_from_hub(str(name_or_path))
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text())
        settings = {option.name: settings[option.name] for option in fields(BrainLMConfig)}
        config = check_config(BrainLMConfig(**settings | changes))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file} is missing or no configuration of a BrainLM ({error!r})") from None
    if config.num_attention_heads != settings["num_attention_heads"]:           # the shapes of weights do not tell
        raise BadInput(f"{folder}: the weights are of {settings['num_attention_heads']} attention heads, not of "
                       f"{config.num_attention_heads}")
    file = folder / "model.safetensors"                 # of two, the one that transformers takes
    if not file.exists():
        file = folder / "pytorch_model.bin"
    weights = load_tensors(file)
    weights = {str(name).removeprefix("model."): value for name, value in weights.items()}          # the Hub's prefix
    if model_class is BrainLM and "target_mean" in weights:
        weights = {name.removeprefix("backbone."): value for name, value in weights.items() if "backbone." in name}
    if model_class is BrainLMRegressor and "target_mean" not in weights:
        raise BadInput(f"{folder} holds a BrainLM without a regression head: python brainlm.py finetune makes one")
    model = model_class(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise BadInput(f"{folder}: the weights do not fit {model_class.__name__} with {config} "
                       f"({one_line(error)})") from None
    return model.eval()


def download_from_hub(name):
    """The local folder of a Hub repository "user/name"."""
    if name.startswith((".", "/", "~")) or Path(*Path(name).parts[:1]).exists():       # no user of the Hub
        raise BadInput(f"{name}: no such run folder (python brainlm.py pretrain makes one)")
    try:
        return Path(import_optional("huggingface_hub").snapshot_download(name))
    except Exception as error:                          # offline, unknown, private, ...: the Hub's own words say which
        raise BadInput(f"{name}: no such run folder (python brainlm.py pretrain makes one), nor did the Hub give it "
                       f"({one_line(error)})") from None


BrainLM.save_pretrained = BrainLMRegressor.save_pretrained = save_pretrained
BrainLM.from_pretrained = BrainLMRegressor.from_pretrained = classmethod(from_pretrained)

# The classes that the Hub looks up by name (auto_map in config.json). Where it loads this file, transformers is there
# already; importing brainlm alone never imports it.
if sys.modules.get("transformers"):
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput

    class BrainLMForPreTrainingConfig(PretrainedConfig):
        model_type, keys_to_ignore_at_inference = "brainlm", ["hidden_states"]

        def __init__(self, **settings):
            ours = {option.name: settings[option.name] for option in fields(BrainLMConfig) if option.name in settings}
            super().__init__(**settings | asdict(BrainLMConfig(**ours)))

    class BrainLMForRegressionConfig(BrainLMForPreTrainingConfig):
        """One of its own, since transformers remembers one model class for each configuration class."""

    class BrainLMForPreTraining(PreTrainedModel):
        config_class, base_model_prefix, model_class = BrainLMForPreTrainingConfig, "model", BrainLM
        main_input_name, supports_gradient_checkpointing = "signal", True

        def __init__(self, config):
            super().__init__(config)
            dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)      # bfloat16 lacks the matrix inverse of the initial weights
            self.model = self.model_class(BrainLMConfig(**{option.name: getattr(config, option.name)
                                                           for option in fields(BrainLMConfig)})).to(dtype)
            torch.set_default_dtype(dtype)
            self.post_init()

        def _init_weights(self, module):
            """Nothing to add: BrainLM initialises itself."""

        def __getattr__(self, name):
            if name in ("embed", "forecast", "attention", "similarity"):
                return getattr(getattr(self.model, "backbone", self.model), name)
            return super().__getattr__(name)

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            recompute_layers(self)

        def forward(self, signal, xyz, mask=None, labels=None, return_dict=None):
            """As BrainLM's: xyz [V, 3] is one for the batch, not stacked. labels [B, T, V], the signal itself, add a
            loss over hidden tokens, by default those of a random mask."""
            if mask is None and labels is not None:
                N = signal.shape[1] // self.config.timepoint_patching_size
                mask = random_mask(len(signal), N, len(xyz), self.config.mask_ratio).to(signal.device)
            prediction, states = self.model(signal, xyz, mask)
            loss = None if labels is None else reconstruction_loss(prediction, labels, mask, self.config.loss_fn)
            output = MaskedLMOutput(loss=loss, logits=prediction, hidden_states=(states,))
            return output.to_tuple() if return_dict is False else output

    class BrainLMForRegression(BrainLMForPreTraining):
        config_class, model_class = BrainLMForRegressionConfig, BrainLMRegressor
        _keep_in_fp32_modules_strict = ["feature_mean", "feature_std", "target_mean", "target_std"]

        def forward(self, signal, xyz, labels=None, return_dict=None):
            """As BrainLMRegressor's: xyz [V, 3] is one for the batch. labels [B], the target, add a loss."""
            prediction = self.model(signal, xyz)                                     # [B]
            loss = None if labels is None else ((prediction - labels.flatten()) / self.model.target_std).square().mean()
            output = SequenceClassifierOutput(loss=loss, logits=prediction)
            return output.to_tuple() if return_dict is False else output


# ----------------------------------------------------------------------------------------------------------------------
# 12. Evaluation: a model and its opponents are functions (signal, mask, ridge) -> prediction, scored on the same tokens

RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)    # times the mean variance; the best on the evaluated windows counts
HORIZONS = (1, 2, 3, 5, 10, 20)                     # timepoints ahead
MAX_BASELINE_ROWS = 500                             # training recordings that opponents are fitted to, at most


def fixed_windows(dataset, rows, num_timepoints, spacing):
    """[(row, start), ...]: windows every `spacing` timepoints, and one at the very end of each recording."""
    windows = []
    for row in rows:
        last = int(dataset.lengths[row]) - num_timepoints
        windows += [(int(row), start) for start in sorted({*range(0, last, spacing), last})]
    return windows


def baseline_recordings(dataset):
    """What opponents are fitted to: float64 [T, V], one recording at a time."""
    return (dataset.window(row).astype(np.float64) for row in range(min(len(dataset), MAX_BASELINE_ROWS)))


def error_sums(prediction, target, mask):
    """What every score is made of, at each timepoint of the hidden patches, float64 [5, P]: count, sum of the target,
    of its square, of the squared and of the absolute error. Sums add up over batches and processes."""
    P = target.shape[1] // mask.shape[1]
    target = patchify(target, P)[mask].double()                                      # [hidden tokens, P]
    error = patchify(prediction, P)[mask].double() - target
    sums = torch.ones_like(target), target, target.square(), error.square(), error.abs()
    return torch.stack([values.sum(dim=0) for values in sums])


def scores(sums):
    """R2 = 1 - SSE / SST (never clipped), MSE and MAE from one column of error_sums, or from its sum over columns."""
    count, target, target_square, square, absolute = sums.tolist()
    variation = target_square - target ** 2 / count
    R2 = 1 - square / variation if variation > 0 else -math.inf
    return {"R2": R2, "MSE": square / count, "MAE": absolute / count}


def model_predictor(model, xyz, dtype=torch.float32):
    """A BrainLM as a function (signal, mask, ridge) -> prediction [B, T, V], all on the CPU in float32."""
    @torch.no_grad()
    def predict(signal, mask, ridge=None):
        model.eval()
        with autocast(xyz.device, dtype):
            return model(signal.to(xyz.device), xyz, mask.to(xyz.device))[0].float().cpu()
    return predict


def centred_moments(pairs):
    """Of pairs (inputs [n, a], outputs [n, b]), one for each recording: the means [a] and [b], the inputs' covariance
    [a, a] and theirs with the outputs [a, b]."""
    count, input_sum, output_sum, gram, moment = 0, 0.0, 0.0, 0.0, 0.0
    for inputs, outputs in pairs:
        count += len(inputs)
        input_sum = input_sum + inputs.sum(axis=0)
        output_sum = output_sum + outputs.sum(axis=0)
        gram = gram + inputs.T @ inputs
        moment = moment + inputs.T @ outputs
    input_mean, output_mean = input_sum / count, output_sum / count
    covariance = gram / count - np.outer(input_mean, input_mean)
    return input_mean, output_mean, covariance, moment / count - np.outer(input_mean, output_mean)


def penalty(covariance):
    """The mean variance, [a, a] diagonal, which ridges multiply. Where all is constant it still is not zero."""
    return max(np.trace(covariance) / len(covariance), 1e-12) * np.eye(len(covariance))


def gaussian_conditional(dataset):
    """The opponent in masked reconstruction: the parcels' covariance C from training data, and at each timepoint
    x_hidden = mean + C_hv (C_vv + ridge)^-1 (x_visible - mean)."""
    V = dataset.num_parcels
    mean, _, covariance, _ = centred_moments((signal, signal) for signal in baseline_recordings(dataset))

    def predict(signal, mask, ridge):
        ridged = covariance + ridge * penalty(covariance)
        prediction = patchify(signal, signal.shape[1] // mask.shape[1]).numpy().copy()       # [B, N, V, P]
        for patches, hidden in zip(prediction.reshape(-1, V, prediction.shape[3]), mask.flatten(0, 1).numpy()):
            visible = ~hidden
            weights = np.linalg.solve(ridged[np.ix_(visible, visible)], patches[visible] - mean[visible, None])
            patches[hidden] = mean[hidden, None] + covariance[np.ix_(hidden, visible)] @ weights
        return unpatchify(torch.from_numpy(prediction))
    return predict


def ridge_regression(pairs):
    """Of pairs (inputs [n, a], outputs [n, b]) a function: ridge -> the weights [a, b] and the intercept [b], which no
    ridge shrinks, since inputs and outputs are centred."""
    input_mean, output_mean, covariance, moment = centred_moments(pairs)

    @functools.cache
    def solve(ridge):
        weights = np.linalg.solve(covariance + ridge * penalty(covariance), moment)
        return weights, output_mean - input_mean @ weights
    return solve


def forecasting_baselines(dataset, P):
    """The opponents in forecasting P timepoints, {name: predictor}. Persistence repeats the last value; ridge
    autoregression maps a parcel's own last P timepoints to its next P, one map for all parcels; vector autoregression
    maps the last two timepoints of all parcels to the next one, and is iterated."""
    sliding = np.lib.stride_tricks.sliding_window_view
    runs = (sliding(signal, 2 * P, axis=0).reshape(-1, 2 * P) for signal in baseline_recordings(dataset))
    own = ridge_regression((run[:, :P], run[:, P:]) for run in runs)
    everyone = ridge_regression((np.hstack([signal[1:-1], signal[:-2]]), signal[2:])
                                for signal in baseline_recordings(dataset))

    def persistence(past, ridge):
        return past[:, -1:].repeat(P, axis=1)

    def autoregression(past, ridge):
        weights, intercept = own(ridge)
        return (past[:, -P:].swapaxes(1, 2) @ weights + intercept).swapaxes(1, 2)            # [B, P, V]

    def vector_autoregression(past, ridge):
        weights, intercept = everyone(ridge)
        steps = [past[:, -2], past[:, -1]]                                                   # [B, V] each
        for _ in range(P):
            steps.append(np.hstack([steps[-1], steps[-2]]) @ weights + intercept)
        return np.stack(steps[2:], axis=1)

    def predictor(future):
        def predict(signal, mask, ridge):
            past = signal[:, :-P]
            return torch.cat([past, torch.from_numpy(future(past.numpy(), ridge).astype(np.float32))], dim=1)
        return predict
    return {"persistence": predictor(persistence), "ridge autoregression": predictor(autoregression),
            "2-lag vector autoregression": predictor(vector_autoregression)}


def score_reconstruction(predict, ridge, dataset, windows, config, forecasting, batch_size):
    """error_sums of a predictor over windows [(row, start), ...] under the forward mask, or a random one, the same for
    the i-th window every time. In a distributed run every process takes its share of the windows."""
    T, P, V = config.num_timepoints_per_voxel, config.timepoint_patching_size, dataset.num_parcels
    total = torch.zeros(5, P, dtype=torch.float64)
    mine = range(RANK, len(windows), WORLD_SIZE)
    for i in range(0, len(mine), batch_size):
        chosen = mine[i:i + batch_size]
        signal, mask = dataset.batch([windows[j] for j in chosen], T), forward_mask(len(chosen), T // P, V)
        if not forecasting:
            mask = torch.cat([random_mask(1, T // P, V, config.mask_ratio, torch.Generator().manual_seed(j))
                              for j in chosen])
        total += error_sums(predict(signal, mask, ridge), signal, mask)
    return sum_over_processes(total)


def evaluate_reconstruction(model, xyz, dtype, train_set, val_set, windows, batch_size):
    """The first two tables of the evaluation, {title: {method: {score: value}}}: masked patches and forecasting, the
    model, then the baselines, the best first, each at the ridge that suits these very windows best."""
    config, tables = model.config, {}
    T, P = config.num_timepoints_per_voxel, config.timepoint_patching_size
    tasks = [(False, f"masked patches ({config.mask_ratio:.0%} hidden, {len(windows)} windows)",
              {"Gaussian conditional mean": gaussian_conditional(train_set)})]
    if T - P >= max(P, 2):
        tasks.append((True, f"forecasting {P} timepoints from {T - P} ({len(windows)} windows)",
                      forecasting_baselines(train_set, P)))
    for forecasting, title, baselines in tasks:
        table = {}
        for name, predict in {"BrainLM": model_predictor(model, xyz, dtype), **baselines}.items():
            for ridge in [None] if name in ("BrainLM", "persistence") else RIDGES:
                sums = score_reconstruction(predict, ridge, val_set, windows, config, forecasting, batch_size)
                row = scores(sums.sum(dim=1))
                if forecasting:
                    row |= {f"R2 at {h}": scores(sums[:, h - 1])["R2"] for h in HORIZONS if h <= P}
                if ridge:
                    row["ridge"] = ridge
                if name not in table or row["R2"] > table[name]["R2"]:
                    table[name] = row
        order = sorted(table, key=lambda name: (name != "BrainLM", -table[name]["R2"]))
        tables[title] = {name: table[name] for name in order}
    return tables


def knn_accuracy(distance, labels, k=5):
    """Share of V items, distance [V, V], whose label is the commonest among their k nearest others (ties: nearest)."""
    distance = distance + np.diag(np.full(len(distance), np.inf))
    right = 0
    for row, label in zip(distance, labels):
        nearest = [labels[i] for i in np.argsort(row, kind="stable")[:min(k, len(row) - 1)]]
        right += max(nearest, key=nearest.count) == label
    return right / len(labels)


def evaluate_networks(model, xyz, dataset, windows, networks, folder):
    """Zero-shot functional networks of the parcels that have a label, {title: {method: {score: value}}}: the share of
    them that get theirs from their nearest neighbours among the others, and, where scikit-learn is installed, the
    adjusted Rand index of the labels and as many clusters (1: the same, about 0: chance). Near is what is alike in the
    model's states, in functional connectivity, in the rows of either (profiles), or in coordinates."""
    labelled = [parcel for parcel, network in enumerate(networks) if network == network is not None]     # nor NaN
    labels, chosen = [networks[parcel] for parcel in labelled], np.ix_(labelled, labelled)
    if not 1 < len(set(labels)) < len(labels):          # nothing to find
        return {}
    similarity, connectivity = np.zeros((2, len(networks), len(networks)))
    for window in windows:
        signal = dataset.batch([window], model.config.num_timepoints_per_voxel)
        similarity += model.similarity(signal.to(xyz.device), xyz)[0].cpu().numpy() / len(windows)
        connectivity += correlation(signal[0].numpy()) / len(windows)
    draw(folder / "networks.png", plot_networks, labels, similarity[chosen], connectivity[chosen])
    methods = {"BrainLM similarity": 1 - similarity, "BrainLM similarity profile": 1 - correlation(similarity),
               "functional connectivity": 1 - connectivity,
               "functional connectivity profile": 1 - correlation(connectivity),
               "coordinates": torch.cdist(xyz, xyz).cpu().numpy()}
    table = {name: {"accuracy": knn_accuracy(distance[chosen], labels)} for name, distance in methods.items()}
    try:
        cluster, metrics = import_optional("sklearn.cluster"), import_optional("sklearn.metrics")
        linkage = cluster.AgglomerativeClustering(len(set(labels)), metric="precomputed", linkage="average")
        for name, distance in methods.items():
            table[name]["Rand"] = metrics.adjusted_rand_score(labels, linkage.fit_predict(distance[chosen]))
    except BadInput as error:
        print_once(f"no clusters: {error}")
    return {f"functional networks of {len(labels)} parcels (5 nearest neighbours)": table}


def correlation(signal):
    """Correlation of columns, [T, V] -> [V, V], 0 for constant ones: a recording's functional connectivity."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(np.atleast_2d(np.corrcoef(signal, rowvar=False)))


@torch.no_grad()
def predict_recordings(model, xyz, dataset, rows, dtype, batch_size):
    """A BrainLMRegressor's predictions, float64 numpy [rows]: each the mean over the recording's fixed windows."""
    model.eval()
    T, predictions = model.config.num_timepoints_per_voxel, torch.zeros(len(rows), dtype=torch.float64)
    for i in range(RANK, len(rows), WORLD_SIZE):
        windows = fixed_windows(dataset, rows[i:i + 1], T, spacing=T)
        batches = (dataset.batch(windows[j:j + batch_size], T) for j in range(0, len(windows), batch_size))
        with autocast(xyz.device, dtype):
            of_windows = torch.cat([model(signal.to(xyz.device), xyz).cpu() for signal in batches])
        predictions[i] = of_windows.double().mean()
    return sum_over_processes(predictions).numpy()


def regression_scores(prediction, target):
    """MAE, MSE, R2 (never clipped) and Pearson r of two numpy vectors; of a target of 0 and 1 also AUC and accuracy."""
    error = prediction - target
    with np.errstate(invalid="ignore", divide="ignore"):
        row = {"MAE": float(np.abs(error).mean()), "MSE": float(np.square(error).mean()),
               "R2": float(1 - np.square(error).sum() / np.square(target - target.mean()).sum()),
               "r": float(np.corrcoef(prediction, target)[0, 1])}
    if set(target) == {0, 1}:
        no, yes = np.sort(prediction[target == 0]), prediction[target == 1]
        rank = (np.searchsorted(no, yes, "left") + np.searchsorted(no, yes, "right")) / 2       # among no: ties half
        row |= {"AUC": float(rank.mean() / len(no)), "accuracy": float(((prediction > 0.5) == target).mean())}
    return row


def connectivity_ridge(train_set, train_rows, train_target, val_set, val_rows, projections):
    """The opponent in regression: ridge on the functional connectivity of projected signals. Penalty and projection,
    one of [V, V] each, are chosen by leave-one-out on the training recordings. Returns predictions for val_rows."""
    upper = np.triu_indices(train_set.num_parcels, k=1)
    train_rows, train_target = train_rows[:MAX_BASELINE_ROWS], train_target[:MAX_BASELINE_ROWS]
    mean, fits = train_target.mean(), []
    for projection in projections:
        train = np.stack([correlation(train_set.window(row) @ projection)[upper] for row in train_rows])
        center = train.mean(axis=0)
        train = train - center
        values, vectors = np.linalg.eigh(train @ train.T)      # dual form: many more connections than recordings
        for ridge in np.logspace(-3, 3, 25) * max(values.mean(), 1e-12):
            inverse = vectors / (values + ridge) @ vectors.T
            weights = inverse @ (train_target - mean)
            # The error of each recording, predicted from the others; their mean is one more thing that they tell.
            errors = weights / (np.diag(inverse) - 1 / (ridge * len(train)))
            fits.append((np.square(errors).mean(), projection, center, train.T @ weights))
    _, projection, center, slope = min(fits, key=lambda fit: fit[0])
    val = np.stack([correlation(val_set.window(row) @ projection)[upper] for row in val_rows])
    return mean + (val - center) @ slope


def coskewness_projections(dataset, rows):
    """Onto the leading directions of the parcels' co-skewness, E[x_u x_v x_w] as a matrix [V, V * V], in which
    connectivity is reported to tell more of cognition (arXiv 2606.04010): [V, V] each."""
    V = dataset.num_parcels
    squared = np.zeros((V, V))                          # that matrix times its transpose, summed over recordings
    for row in rows[:MAX_BASELINE_ROWS]:
        signal = dataset.window(row) - dataset.window(row).mean(axis=0)
        signal = signal / np.maximum(signal.std(axis=0), 1e-12)
        squared += signal.T @ np.square(signal @ signal.T) @ signal / len(signal) ** 2
    directions = np.linalg.eigh(squared)[1][:, ::-1]    # the leading one first
    return [directions[:, :k] @ directions[:, :k].T for k in (10, 20, 50, 100) if k <= max(V, 10)]


def evaluate_regression(model, xyz, dtype, train, val, column, batch_size, folder):
    """The table of a BrainLMRegressor and its opponents, {title: {method: {score: value}}}, {} where val has no target;
    and predictions.csv in the folder. train, val: (dataset, rows that have a target, targets of all rows)."""
    (train_set, train_rows, train_target), (val_set, rows, target) = train, val
    prediction = predict_recordings(model, xyz, val_set, range(len(val_set)), dtype, batch_size)
    write_predictions(folder / "predictions.csv", val_set, prediction)
    if not len(rows):
        return {}
    draw(folder / "predictions.png", plot_predictions, column, prediction[rows], target[rows])
    methods = {"BrainLM": prediction[rows], "training mean": np.full(len(rows), train_target[train_rows].mean())}
    for name, projections in (("ridge on functional connectivity", [np.eye(len(xyz))]),
                              ("the same in the co-skewness subspace", coskewness_projections(train_set, train_rows))):
        methods[name] = connectivity_ridge(train_set, train_rows, train_target[train_rows], val_set, rows, projections)
    return {f"{column}, {len(rows)} validation recordings":
            {name: regression_scores(values, target[rows]) for name, values in methods.items()}}


def write_predictions(path, dataset, prediction):
    """A csv file with a line for each recording: its row, what scalars the dataset has, the prediction."""
    kinds = [field.type for field in dataset.table.schema]
    scalars = [i for i, kind in enumerate(kinds) if pa.types.is_primitive(kind) or kind in (pa.string(), pa.null())]
    ours = {"row": range(len(dataset)), "prediction": prediction.tolist()}
    columns = {"row": None} | dataset.table.select(scalars).to_pydict() | ours
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *zip(*columns.values())])
    if RANK == 0:
        write_atomically(path, text.getvalue())
        print_once(f"predictions in {path}")


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
            lines.append(f"| {name:<{width}} |" + "".join(f"{text:>10} |" for text in numbers))
    return "\n".join(lines)


@torch.no_grad()
def attention_weights(model, signal, xyz, layer, rows=slice(None)):
    """Attention weights of one layer of a BrainLM (0 is the first), [B, heads, S, S] or the rows of it in a slice; they
    sum to one. Row 0 is CLS: its columns 1.., unflattened to (N, V), say how much it reads each parcel at each temporal
    token. For looking at: it builds the S x S matrix that training avoids."""
    x, position = model.tokens(signal, xyz)
    for earlier in model.layers[:layer]:
        x = earlier(x, position, signal.shape[2])
    q, k, _ = model.layers[layer].queries_keys_values(x, position)
    mask = block_causal_mask(signal.shape[1] // model.config.timepoint_patching_size, signal.shape[2])[rows]
    scores = q[:, :, rows] @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    return scores.masked_fill(~mask.to(x.device), -math.inf).softmax(dim=-1)


@torch.no_grad()
def parcel_similarity(model, signal, xyz):
    """How alike a BrainLM finds what parcels do: signal [B, T, V] -> float32 [B, V, V], correlations of their hidden
    states along time. Each state counts as it differs from the parcel's mean state, which tells where it lies."""
    states = model(signal, xyz)[1][:, 1:].float().unflatten(1, (-1, signal.shape[2]))        # [B, N, V, H]
    states = states - states.mean(dim=1, keepdim=True)
    states = F.normalize(states.transpose(1, 2).flatten(2), dim=2)                           # [B, V, N * H]
    return states @ states.mT


BrainLM.attention = attention_weights
BrainLM.similarity = parcel_similarity


def draw(path, plot, *what):
    """Save the picture that plot(figure, *what) makes, where matplotlib is installed."""
    try:
        figure = import_optional("matplotlib.figure").Figure(layout="constrained", dpi=110)
        plot(figure, *what)
        if RANK == 0:
            figure.savefig(path, bbox_inches="tight")           # nothing cut off
            print_once(f"picture in {path}")
    except BadInput as error:
        print_once(f"no picture: {error}")


def plot_evaluation(figure, model, xyz, dataset, windows, tables):
    """A picture of what the tables say, for one window of the dataset."""
    config = model.config
    T, P, V = config.num_timepoints_per_voxel, config.timepoint_patching_size, dataset.num_parcels
    signal, predict = dataset.batch(windows[:1], T), model_predictor(model, xyz)
    figure.set_size_inches(16, 4.5)
    left, middle, right = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    hidden = random_mask(1, T // P, V, config.mask_ratio, torch.Generator().manual_seed(0))
    for axis, mask, first, title in ((left, hidden, 0, "hidden patches, reconstructed"),
                                     (middle, forward_mask(1, T // P, V), max(0, T - 3 * P), "forecast")):
        shown = np.arange(first, T)
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


def plot_predictions(figure, column, prediction, target):
    """Predictions against the truth, and the line on which both are equal."""
    axis = figure.subplots()
    axis.scatter(target, prediction, color="C3")
    axis.axline((target.mean(), target.mean()), slope=1, color="0.6", zorder=0)
    axis.set(xlabel="truth", ylabel="prediction", title=column.replace("$", r"\$"))


def plot_networks(figure, networks, similarity, connectivity):
    """Both matrices [V, V] with the parcels of a network side by side."""
    labels = np.array(networks, dtype=str)
    names, sizes = np.unique(labels, return_counts=True)
    order, ends = np.argsort(labels, kind="stable"), np.cumsum(sizes) - 0.5
    figure.set_size_inches(13, 6.5)
    matrices = ("BrainLM similarity", similarity), ("functional connectivity", connectivity)
    text = {"fontsize": min(10, 240 / len(names)), "parse_math": False}
    for axis, (title, matrix) in zip(figure.subplots(1, 2, sharey=True), matrices):
        image = axis.imshow(matrix[np.ix_(order, order)], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="none")
        axis.set_title(title)
        axis.set_xticks(ends - sizes / 2, names, rotation=90, **text)
        axis.set_yticks(ends - sizes / 2, names, **text)
        for end in ends[:-1]:
            axis.axhline(end, color="black", linewidth=0.5)
            axis.axvline(end, color="black", linewidth=0.5)
    figure.colorbar(image, ax=figure.axes, label="correlation, mean over windows")


def plot_attention(figure, model, xyz, dataset):
    """What CLS of a BrainLM reads of each parcel, as a map: one window tells, it hardly differs in others (r 0.98)."""
    signal = dataset.batch([(0, 0)], model.config.num_timepoints_per_voxel).to(xyz.device)
    weights = model.attention(signal, xyz, layer=-1, rows=slice(1))[0, :, 0, 1:]             # [heads, N * V]
    share = 100 * weights.mean(dim=0).view(-1, len(xyz)).sum(dim=0).cpu()                    # [V], %
    order = share.argsort()                             # what is read most is drawn on top
    place = dict(zip("xyz", xyz.cpu()[order].T))
    figure.set_size_inches(12, 6)
    figure.suptitle("What CLS reads in the last layer (learned only if finetune had --no-freeze_backbone)")
    views = ("from above, left is left", "x", "y"), ("from the right", "y", "z")
    for axis, (title, across, up) in zip(figure.subplots(1, 2), views):
        points = axis.scatter(place[across], place[up], c=share[order], s=60, vmin=0, vmax=share.quantile(0.98))
        axis.set(title=title, xlabel=f"{across}, mm", ylabel=f"{up}, mm", aspect="equal")
    figure.colorbar(points, ax=figure.axes, extend="max", label=f"% of CLS's attention (even: {100 / len(xyz):.2g})")


# ----------------------------------------------------------------------------------------------------------------------
# 13. Devices, and many processes


RANK = int(os.environ.get("RANK", 0))                   # torchrun sets them
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def print_once(message):
    if RANK == 0:
        print(message, flush=True)


def from_rank_0(value):
    """What rank 0 passes, on every rank: whatever depends on one machine's files or processor is decided there."""
    box = [value]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(box)
    return box[0]


def sum_over_processes(tensor):
    """The sum of a tensor on the CPU, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def prepare_device(name):
    """--device, where auto is the fastest that the machine has; under torchrun also the process group."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available[name]:
        raise BadInput(f"--device {name}: this machine or this build of torch has none")
    if name == "cuda":
        torch.cuda.set_device(LOCAL_RANK)               # which "cuda" means from here on
    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
    return torch.device(name)


def pick_dtype(name, device, state=None):
    """--dtype, where auto is what a resumed run was trained in so far, else bfloat16 where it is faster: on CUDA and on
    CPUs with AMX. No stopwatch: the same machine always gets the same type, and all ranks that of rank 0."""
    if name == "auto":
        amx = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16")
        name = "bfloat16" if device.type == "cuda" or amx else "float32"
        if state:
            name = state["dtype"]
    return getattr(torch, from_rank_0(name))


def recompute_layers(model):
    """--gradient_checkpointing: backward computes each layer again instead of storing what it needs."""
    for layer in (module for module in model.modules() if isinstance(module, Layer)):
        layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)


class FloatMuon(Muon):
    """torch.optim.Muon in float32. Torch's own step works in bfloat16: on CPUs without units for that (no AVX-512), a
    training step takes five times as long with it."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            a, b, c = group["ns_coefficients"]
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                step = matrix.grad.lerp(average, group["momentum"])                  # Nesterov's momentum
                tall = step.shape[0] > step.shape[1]
                step = step.T if tall else step         # so that step @ step.T is the smaller of the two products
                # Newton-Schulz: an odd polynomial of U S V' is U p(S) V', and this one brings S from (0, 1] near 1.
                step = step / (step.norm() + group["eps"])
                for _ in range(group["ns_steps"]):
                    gram = step @ step.T
                    step = a * step + (b * gram + c * gram @ gram) @ step
                step = step.T if tall else step
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(0.2 * group["lr"] * math.sqrt(max(matrix.shape)) * step)         # "match_rms_adamw"


Muon = FloatMuon                                        # from here on what make_optimizers takes


# ----------------------------------------------------------------------------------------------------------------------
# 14. The run folder


class RunFolder:
    """The output folder of a run, one process's own while it trains. Rank 0 alone reads and writes it: other ranks may
    be on machines without this disk, and are told what it holds.

    state is what a stopped run left there, else None; metrics are the lines of metrics.jsonl.
    """

    def __init__(self, args, config):
        self.path = Path(args.output_dir)
        self.args = {name: value for name, value in vars(args).items()
                     if name not in ("run", "output_dir", "overwrite_output_dir")}
        if args.model_name_or_path and Path(args.model_name_or_path).resolve() == self.path.resolve():
            raise BadInput(f"--output_dir {self.path} is the folder that training starts from: choose another")
        parcels = read_arrow(args.coords_dataset_path)
        self.coordinates = {name: parcels[name].to_pylist() for name in parcels.column_names
                            if name in ("X", "Y", "Z", "Network")}
        state = None
        if RANK == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            self.take_lock()
            present = sorted(file.name for file in self.path.iterdir() if not file.name.startswith("."))
            if present and "training_state.pt" not in present:
                raise BadInput(f"{self.path} holds {present[0]}, and not of a run: choose another --output_dir")
            if args.overwrite_output_dir:               # what tells of the old model; the first save replaces the rest
                for name in ("README.md", "evaluation.json", "evaluation.png", "networks.png", "attention.png",
                             "predictions.csv", "predictions.png"):
                    (self.path / name).unlink(missing_ok=True)
            elif present:
                state = self.read_state(config)
        self.state = from_rank_0(state)
        self.metrics = self.state["metrics"] if self.state else []

    def take_lock(self):
        try:
            import fcntl
            self.lock = open(self.path / ".lock", "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)           # ends with the process, however it ends
        except BlockingIOError:
            raise BadInput(f"{self.path} is in use: another process is training there") from None
        except (ImportError, OSError):
            pass                                        # Windows, or a file system without locks

    def read_state(self, config):
        """training_state.pt, refused if it is of another kind of run or of another model."""
        anew = "start anew with --overwrite_output_dir, or choose another --output_dir"
        try:
            state = load_tensors(self.path / "training_state.pt")
            before = state["args"] | state["config"]
        except (BadInput, KeyError) as error:
            raise BadInput(f"{self.path} holds no run of this program ({one_line(error)}): {anew}") from None
        now = self.args | asdict(config)
        fixed = {*asdict(config), "command", "variable_of_interest_col_name", "freeze_backbone"}
        changed = [name for name in now if before.get(name) != now[name]]
        refused = [f"{name} {before.get(name)} there and {now[name]} now" for name in changed if name in fixed]
        if refused:
            raise BadInput(f"{self.path} holds a run with other flags ({'; '.join(refused)}): use the same, or {anew}")
        if changed:
            print_once(f"note: resuming with another {', '.join(changed)}")
        return state

    def log(self, **metrics):
        self.metrics.append(to_json(metrics))
        if RANK == 0:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(self.metrics[-1])

    def save(self, model, **state):
        """First training_state.pt, complete, so that what resumes is always of one step; then what users read."""
        if RANK == 0:
            state |= {"model": model.state_dict(), "metrics": self.metrics, "args": self.args,
                      "config": asdict(model.config)}
            write_atomically(self.path / "training_state.pt", state)
            write_atomically(self.path / "args.json", to_json(self.args, indent=2))
            write_atomically(self.path / "coordinates.json", to_json(self.coordinates))
            write_atomically(self.path / "metrics.jsonl", "".join(self.metrics))
            model.save_pretrained(self.path)


def flags_of(config_class, args):
    """Those fields of BrainLMConfig or TrainingConfig that the command was given, or has defaults for."""
    return {option.name: getattr(args, option.name) for option in fields(config_class) if option.name in args}


def run_training(args, training, model, folder, xyz, dtype, num_recordings, batch_loss, validate):
    """The loop of Part I, and around it resuming, progress, validation and checkpoints; both commands come here.
    batch_loss(model, samples, step) -> scalar loss; validate() -> {metric: value}. Returns the number of steps."""
    config, device = model.config, xyz.device
    samples_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * WORLD_SIZE
    optimizers = make_optimizers(model, training.learning_rate, training.weight_decay)
    first_step, first_sample, loss_sum, loss_count = 0, 0, 0.0, 0       # losses since the last line of progress
    if folder.state:
        try:
            model.load_state_dict(folder.state["model"])
            for optimizer, state in zip(optimizers, folder.state["optimizers"], strict=True):
                groups = optimizer.state_dict()["param_groups"]         # from the flags of now
                optimizer.load_state_dict(state | {"param_groups": groups})
            first_step, first_sample = folder.state["step"], folder.state["samples"]
            loss_sum, loss_count = folder.state["loss_sum"], folder.state["loss_count"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{folder.path / 'training_state.pt'} does not fit this model ({one_line(error)}): start "
                           "anew with --overwrite_output_dir") from None
        folder.state = None
    samples_left = max(0, math.ceil(args.num_train_epochs * num_recordings) - first_sample)
    num_steps = args.max_steps or first_step + math.ceil(samples_left / samples_per_step)
    if num_steps < first_step:
        raise BadInput(f"--max_steps {num_steps}: {folder.path} has been trained for {first_step} steps already")
    if first_step:
        print_once(f"resuming {folder.path} after step {first_step} of {num_steps}")
    elif num_steps * samples_per_step < 100:    # 60 parcels: masked R2 .01 after 50 windows, as before the first
        print_once(f"note: {num_steps} steps of {samples_per_step} windows are too few to learn much: "
                   "raise --max_steps")

    def save(step):
        folder.save(model, step=step, samples=first_sample + (step - first_step) * samples_per_step,
                    loss_sum=loss_sum, loss_count=loss_count, dtype=str(dtype).removeprefix("torch."),
                    optimizers=[optimizer.state_dict() for optimizer in optimizers])

    save(first_step)                                    # loadable from the start, however the last run ended
    tokens = (1 + config.num_timepoints_per_voxel // config.timepoint_patching_size * len(xyz)) * samples_per_step
    print_once(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {tokens:,} tokens a step, "
               f"{WORLD_SIZE} x {device.type}, {str(dtype).removeprefix('torch.')}")
    if args.gradient_checkpointing:
        recompute_layers(model)
    trained = nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    if args.compile or args.compile is None and device.type == "cuda":
        trained = torch.compile(trained)
    started = time.monotonic()
    for step, loss in train(trained, optimizers, batch_loss, training, num_steps, first_step, first_sample,
                            RANK, WORLD_SIZE):
        if step > first_step and args.eval_steps and step % args.eval_steps == 0:
            metrics = validate()
            print_once("  validation  " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
            folder.log(step=step, **metrics)
        if step > first_step and step % args.save_steps == 0:
            save(step)
        loss_sum += sum_over_processes(torch.tensor(loss, dtype=torch.float64)).item() / WORLD_SIZE
        loss_count += 1
        done = step + 1
        if done % args.logging_steps == 0 or done == num_steps:
            seconds, mean = time.monotonic() - started, loss_sum / loss_count
            rate = optimizers[0].param_groups[0]["lr"]
            speed = (done - first_step) / seconds
            left = datetime.timedelta(seconds=round((num_steps - done) / speed))
            print_once(f"step {done:>{len(str(num_steps))}}/{num_steps}  loss {mean:.4f}  lr {rate:.2e}  "
                       f"{speed * samples_per_step:.1f} samples/s  {left} left")
            folder.log(step=done, loss=mean, learning_rate=rate, seconds=round(seconds, 2))
            loss_sum, loss_count = 0.0, 0
    save(num_steps)
    model.eval()
    return num_steps


def report(folder, model, num_steps, tables, dataset):
    """Print the tables, log them, and put them into the run folder's model card, which the Hub shows."""
    print_once(markdown(tables))
    folder.log(step=num_steps, tables=tables)
    if RANK > 0:
        return
    name, T = type(model).__name__, model.config.num_timepoints_per_voxel
    TR = sorted(set(map(str, dataset.table["TR"].to_pylist()))) if "TR" in dataset.table.column_names else ["not known"]
    write_atomically(folder.path / "README.md", f"""---
tags: [fmri, brainlm]
---
# {name}

Trained for {num_steps} steps on `{dataset.recording_col}` of `{Path(dataset.path).name}` ({len(dataset)} recordings of
{dataset.num_parcels} parcels; TR: {", ".join(TR)}), and compared with closed-form baselines:
{markdown(tables)}

To run it, in this folder:
```python
import json, torch
from brainlm import {name}
xyz = torch.tensor([json.load(open("coordinates.json"))[axis] for axis in "XYZ"]).T      # [V, 3] in mm
signal = torch.zeros(1, {T}, len(xyz))        # your recordings, [B, T, V], scaled as those it was trained on
output = {name}.from_pretrained(".")(signal, xyz)
```
The method: Ortega Caro et al., BrainLM: A foundation model for brain activity recordings, ICLR 2024.
""")
    print_once(f"\nthe model is in {folder.path}")


# ----------------------------------------------------------------------------------------------------------------------
# 15. Commands


def open_data(args, window, device):
    """Coordinates [V, 3] on the device, networks, training and validation recordings of a command; makes the sample
    data if none are named."""
    paths = (args.train_dataset_path, args.val_dataset_path, args.coords_dataset_path)
    if all(path.startswith("./sample_data/") for path in paths):
        made = Path("sample_data/train/state.json").exists()            # written last
        if not made and LOCAL_RANK == 0:
            print_once("no ./sample_data yet: making it (python sample_data.py)")
            try:
                from sample_data import make_sample_data
            except ImportError:                         # or an installed package has the name by chance
                raise BadInput("no sample_data.py beside brainlm.py: get it, or name datasets of your own") from None
            make_sample_data("./sample_data")
        if WORLD_SIZE > 1:
            dist.barrier()                              # one process of each machine makes them, all wait
    xyz, networks = open_coordinates(args.coords_dataset_path)
    column, V = args.recording_col_name, len(xyz)
    print_once("checking every number of the recordings")
    train_set = open_recordings(args.train_dataset_path, column, window, V, args.max_train_samples)
    val_set = open_recordings(args.val_dataset_path, column, window, V, args.max_eval_samples)
    print_once(f"data: {len(train_set)} training and {len(val_set)} validation recordings, {V} parcels, windows of "
               f"{window}")
    note_signal_units(train_set)
    if Path(args.train_dataset_path).resolve() == Path(args.val_dataset_path).resolve():
        print_once("note: training and validation data are the same: scores will tell nothing of new recordings")
    else:
        note_signal_units(val_set)
    return xyz.to(device), networks, train_set, val_set


def pretrain(args):
    """Learn to reconstruct hidden tokens."""
    settings, training = flags_of(BrainLMConfig, args), TrainingConfig(**flags_of(TrainingConfig, args))
    torch.manual_seed(args.seed)
    if args.model_name_or_path:
        model = BrainLM.from_pretrained(args.model_name_or_path, **settings)
    else:
        model = BrainLM(check_config(BrainLMConfig(**settings)))
    config, T, device = model.config, model.config.num_timepoints_per_voxel, prepare_device(args.device)
    xyz, _, train_set, val_set = open_data(args, T, device)
    random_mask(1, T // config.timepoint_patching_size, len(xyz), config.mask_ratio)    # refuses one that hides nothing
    folder = RunFolder(args, config)
    dtype = pick_dtype(args.dtype, device, folder.state)
    model.to(device)
    model.cls_token.requires_grad_(False)               # no parcel reads CLS: reconstruction cannot train it
    windows = fixed_windows(val_set, range(len(val_set)), T, spacing=T)
    watched = windows[::max(1, len(windows) // 20)]     # enough to watch; the tables at the end take all

    def batch_loss(model, samples, step):
        batch = pretraining_batch(train_set, config, training, samples, step)
        signal, mask = (tensor.to(device) for tensor in batch)
        with autocast(device, dtype):
            return pretraining_loss(model, signal, xyz, mask, config.loss_fn)

    def validate():
        predict, metrics = model_predictor(model, xyz, dtype), {}
        for name, forecasting in (("masked_R2", False), ("forecast_R2", True)):
            sums = score_reconstruction(predict, None, val_set, watched, config, forecasting,
                                        args.per_device_eval_batch_size)
            metrics[name] = scores(sums.sum(dim=1))["R2"]
        return metrics

    num_steps = run_training(args, training, model, folder, xyz, dtype, len(train_set), batch_loss, validate)
    tables = evaluate_reconstruction(model, xyz, dtype, train_set, val_set, windows, args.per_device_eval_batch_size)
    report(folder, model, num_steps, tables, train_set)


def finetune(args):
    """Learn to predict a scalar of each recording."""
    training, column = TrainingConfig(**flags_of(TrainingConfig, args)), args.variable_of_interest_col_name
    backbone = BrainLM.from_pretrained(args.model_name_or_path)
    config, T, device = backbone.config, backbone.config.num_timepoints_per_voxel, prepare_device(args.device)
    xyz, _, train_set, val_set = open_data(args, T, device)
    (rows, target), (val_rows, val_target) = open_target(train_set, column, 2), open_target(val_set, column, 1)
    mean, std, size = target[rows].mean(), target[rows].std(), args.per_device_eval_batch_size
    folder = RunFolder(args, config)
    dtype = pick_dtype(args.dtype, device, folder.state)
    torch.manual_seed(args.seed)
    model = BrainLMRegressor(config, mean, std).to(device)
    model.backbone.load_state_dict(backbone.state_dict())
    if args.freeze_backbone:
        model.backbone.requires_grad_(False)
    for unused in (model.backbone.head.weight, model.backbone.head.bias, model.backbone.mask_token):
        unused.requires_grad_(False)

    def batch_loss(model, samples, step):
        windows = [train_set.training_window(n, rows, T, args.seed) for n in samples]
        truth = torch.tensor([target[row] for row, _ in windows], dtype=torch.float32, device=device)
        with autocast(device, dtype):
            return regression_loss(model, train_set.batch(windows, T).to(device), xyz, truth, std)

    model.eval()                                        # features as they are used, without dropout
    if folder.state is None:
        with torch.no_grad(), autocast(device, dtype):
            features = torch.cat([model.features(train_set.batch([(row, 0)], T).to(device), xyz)
                                  for row in rows[:MAX_BASELINE_ROWS]])
        model.feature_mean.copy_(features.mean(dim=0))
        model.feature_std.copy_(features.std(dim=0).nan_to_num(1.0).clamp(min=1e-6))
    num_steps = run_training(args, training, model, folder, xyz, dtype, len(rows), batch_loss,
                             lambda: regression_scores(predict_recordings(model, xyz, val_set, val_rows, dtype, size),
                                                       val_target[val_rows]))
    train, val = (train_set, rows, target), (val_set, val_rows, val_target)
    tables = evaluate_regression(model, xyz, dtype, train, val, column, size, folder.path)
    report(folder, model, num_steps, tables, train_set)


def evaluate(args):
    """What the paper's tables print, for a checkpoint and any dataset, each number beside its baselines."""
    source = folder = Path(args.model_name_or_path)
    if not folder.is_dir():                             # a model of the Hub
        source, folder = download_from_hub(args.model_name_or_path), Path("runs", folder.name)
        folder.mkdir(parents=True, exist_ok=True)
    regressor = b"BrainLMForRegression" in (source / "config.json").read_bytes()
    model = (BrainLMRegressor if regressor else BrainLM).from_pretrained(source)
    column, size = args.variable_of_interest_col_name, args.per_device_eval_batch_size
    if regressor and not column:
        try:
            column = json.loads((source / "args.json").read_text())["variable_of_interest_col_name"]
        except (OSError, ValueError, KeyError):
            raise BadInput(f"{source / 'args.json'} does not say which column the model predicts: name it with "
                           "--variable_of_interest_col_name") from None
    T, device = model.config.num_timepoints_per_voxel, prepare_device(args.device)
    xyz, networks, train_set, val_set = open_data(args, T, device)
    dtype = pick_dtype(args.dtype, device)
    model.to(device)
    if regressor:
        val = val_set, *open_target(val_set, column, num_values=0)
        train = train_set, *open_target(train_set, column, num_values=2 if len(val[1]) else 0)
        tables = evaluate_regression(model, xyz, dtype, train, val, column, size, folder)
        picture = folder / "attention.png", plot_attention, model.backbone, xyz, val_set    # pretraining trains no CLS
    else:
        windows = fixed_windows(val_set, range(len(val_set)), T, spacing=max(T // 4, 1))
        tables = evaluate_reconstruction(model, xyz, dtype, train_set, val_set, windows, size)
        tables |= evaluate_networks(model, xyz, val_set, windows, networks or [], folder)
        picture = folder / "evaluation.png", plot_evaluation, model, xyz, val_set, windows, tables
    print_once(markdown(tables))
    if RANK == 0 and tables:
        content = {"dataset": args.val_dataset_path, "tables": tables}
        write_atomically(folder / "evaluation.json", to_json(content, indent=2))
        print_once(f"\nwritten to {folder / 'evaluation.json'}")
    draw(*picture)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")


def command_line():
    """The flags, named as in the reference implementation where it has them."""
    parser = OneLineParser(prog="brainlm.py", description="BrainLM: a foundation model for brain activity, in one file")
    commands = parser.add_subparsers(dest="command", required=True, metavar="pretrain | finetune | evaluate")
    for run in (pretrain, finetune, evaluate):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        flag = command.add_argument
        flag("--train_dataset_path", default="./sample_data/train", help="folder with the training recordings")
        flag("--val_dataset_path", default="./sample_data/val", help="folder with the validation recordings")
        flag("--coords_dataset_path", default="./sample_data/coords", help="folder with the parcels' X, Y, Z in mm")
        flag("--recording_col_name", default="Voxelwise_RobustScaler_Normalized_Recording",
             help="column of (timepoints, parcels) recordings")
        flag("--max_train_samples", type=int, help="use only the first training recordings")
        flag("--max_eval_samples", type=int, help="use only the first validation recordings")
        flag("--model_name_or_path", default=None if run is pretrain else "./runs/pretrain",
             help="start from the weights in this run folder or on the Hub")
        flag("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: the fastest there is")
        flag("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
             help="auto: bfloat16 on CUDA and on CPUs with AMX; a resumed run keeps its type")
        flag("--per_device_eval_batch_size", type=int, default=8,
             help="windows that a process takes at once in evaluation")
        if run is evaluate:
            flag("--variable_of_interest_col_name", help="column to compare with; None: that of the finetuning")
            continue

        if run is finetune:
            flag("--variable_of_interest_col_name", default="Age.At.MHQ", help="column to predict")
            flag("--freeze_backbone", action=argparse.BooleanOptionalAction, default=True,
                 help="train the MLP head alone; for all, --no-freeze_backbone, try smaller batches and rates")
        flag("--output_dir", default=f"./runs/{run.__name__}",
             help="checkpoints, metrics.jsonl, args.json; a run that was stopped there is resumed")
        flag("--overwrite_output_dir", action="store_true", help="start anew instead")
        flag("--num_train_epochs", type=float, default=5.0 if run is pretrain else 16.0,
             help="one window of each recording is an epoch")
        flag("--max_steps", type=int, help="steps of training, instead of epochs")
        flag("--logging_steps", type=int, default=10, help="steps between progress lines")
        flag("--eval_steps", type=int, default=100 if run is pretrain else 50,
             help="steps between validations; 0: only at the end")
        flag("--save_steps", type=int, default=50, help="steps between checkpoints")
        flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; None: on CUDA only")
        flag("--gradient_checkpointing", action="store_true", help="recompute layers in backward: less memory, slower")

        training = command.add_argument_group("training", "what they are: TrainingConfig in brainlm.py")
        for option in fields(TrainingConfig):
            if run is pretrain or option.name not in ("forward_mask_prob", "stride_prob"):
                training.add_argument(f"--{option.name}", type=option.type, default=option.default,
                                      help="(default: %(default)s)")
        if run is finetune:
            command.set_defaults(per_device_train_batch_size=8)         # a frozen backbone takes no backward
            continue

        model = command.add_argument_group("model", "what they are: BrainLMConfig in brainlm.py; given "
                                           "--model_name_or_path, the default is what those weights have")
        for option in fields(BrainLMConfig):            # left out of args where not given
            model.add_argument(f"--{option.name}", type=option.type, default=argparse.SUPPRESS,
                               help=f"(default: {option.default})")
    return parser


def main(arguments=None):
    (args, unknown), status = command_line().parse_known_args(arguments), 0
    if unknown:                                         # parse_args would name the help that lists no flags
        OneLineParser(prog=f"brainlm.py {args.command}").error(f"unrecognized arguments: {' '.join(unknown)}")
    for kind in (np.float32, np.float64):
        np.finfo(kind)                                  # numpy 1.26 warns if it first looks after the next line
    torch.set_flush_denormal(True)                      # below 1e-38 is 0: such attention weights are slow on CPUs
    try:
        check_numbers(vars(args))
        args.run(args)
    except (BadInput, OSError) as error:                # OSError: a disk that is full, a folder that is not ours
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\nstopped; a run folder keeps its last checkpoint: the same command goes on from it", file=sys.stderr)
        status = 130                                    # what shells expect of a program that Ctrl-C ended
    if status:
        sys.exit(status)                                # not above: an exception in flight would keep the folder's lock


if __name__ == "__main__" and "__file__" in globals():  # not in a notebook cell, where sys.argv is the kernel's
    main()
