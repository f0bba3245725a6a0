"""BrainLM in one file: a foundation model for brain activity (fMRI), to read, run and trust.

A recording is a matrix (timepoints, parcels): for each of, say, 424 regions of the brain (parcels)
the blood oxygenation (BOLD), which follows neural activity by a few seconds, scaled to median 0 and
interquartile range 1. The model masks three quarters of a window of 200 timepoints and learns to
reconstruct them; its features then predict age or clinical scores. After Ortega Caro et al.,
BrainLM, ICLR 2024: https://openreview.net/forum?id=RwI7ZEfR27

Part I is the lesson (it runs alone in a notebook cell), Part II the program. Shapes: B batch, T
timepoints, V parcels, P patch length, N = T / P time steps, H hidden size, D = H / heads,
S = 1 + N * V sequence length (CLS, then N * V patches). A *patch* is P timepoints of one parcel;
*time step* n holds the n-th patches of all parcels; each patch becomes one *token*.
"""

import contextlib
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

class InputError(ValueError):
    """Something in data, flags or files that the user can fix; commands print it as one line."""

@contextlib.contextmanager
def input_errors(message):
    """Any exception inside the block becomes an InputError: the message, then the cause."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{message} ({type(error).__name__}: {error})") from error

@dataclass
class BrainLMConfig:
    """What defines a model: config.json. Each field, named as in the published code, is a flag of
    `pretrain` and its comment the help. InputError if fields do not fit."""
    num_timepoints_per_voxel: int = 200       # T, timepoints in a window
    timepoint_patching_size: int = 20         # P, timepoints in a patch
    hidden_size: int = 64                     # H, numbers in a token
    num_hidden_layers: int = 4                # layers: each is attention, then an MLP
    num_attention_heads: int = None           # even is best; None: about H / 64, at least 2
    intermediate_size: int = None             # width of the MLP in a layer; None: 4 * H
    mask_ratio: float = 0.75                  # fraction of the parcels that a random mask hides
    forward_mask_prob: float = 0.3            # fraction of the samples that use the forward mask
    loss_fn: str = "mse"                      # mse, or mae, on which outliers have less effect

    def __post_init__(self):
        T, P, H = self.num_timepoints_per_voxel, self.timepoint_patching_size, self.hidden_size
        if self.num_attention_heads is None:    # even: half start out spatial, half temporal
            self.num_attention_heads = max(2, H // 128 * 2)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * H
        heads = self.num_attention_heads
        if P < 1 or T < P or T % P:
            raise InputError(f"num_timepoints_per_voxel ({T}) must be a multiple of "
                             f"timepoint_patching_size ({P})")
        if heads < 1 or H % heads or H % 2 or H < P:
            raise InputError(f"hidden_size ({H}) must be even, a multiple of num_attention_heads "
                             f"({heads}) and at least timepoint_patching_size ({P})")
        if self.loss_fn not in ("mse", "mae"):
            raise InputError(f"loss_fn must be mse or mae (got {self.loss_fn})")

@dataclass
class TrainingConfig:
    """How a model is trained. Each field is a flag of `pretrain` and `finetune`."""
    per_device_train_batch_size: int = 2      # windows in a batch, for each process
    gradient_accumulation_steps: int = 1      # batches in a training step
    learning_rate: float = 1.5e-3             # initial; decays to 0 along half a cosine
    seed: int = 0                             # random seed

# Settings without a flag; benchmarks/ablations.py measures what each is worth.
MAX_GRADIENT_NORM = 1.0        # longer gradients are scaled to this, against unusual recordings
FORWARD_MASKED = 1 / 3         # probability that a forward mask in training hides an earlier step
LEFT_OUT = 2 / 3               # fraction of the parcels to mask that a training step leaves out

# 2. Data: folders written by datasets.Dataset.save_to_disk of Hugging Face ------------------------
# On a first reading it is enough to know that RecordingDataset gives windows [T, V] of recordings.

def seeded_generator(seed, stream, number):
    """A generator for one purpose: (0, "mask", 17) draws the mask of sample 17. No draw depends on
    earlier ones, so a resumed run is identical, and any number of processes draws the same."""
    digest = hashlib.sha256(f"{seed}, {stream}, {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))     # 32 bits

def read_arrow(path):
    """The dataset in a folder as a pyarrow.Table. state.json lists its files, Arrow IPC streams,
    which are memory-mapped: numbers stay on disk until they are used."""
    folder = Path(path).expanduser()
    with input_errors(f"Cannot read {path}: expected a complete folder written by "
                      "Dataset.save_to_disk; for a DatasetDict, pass one split"):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.get("_indices_data_files"):
            raise ValueError("rows were selected or shuffled: flatten_indices() before saving")
        files = [pa.memory_map(str(folder / entry["filename"])) for entry in state["_data_files"]]
        table = pa.concat_tables(pa.ipc.open_stream(file).read_all() for file in files)
        table.validate(full=True)               # finds bad offsets without reading numbers
        return table

def read_column(table, name, path):
    """A column of the table that was read from path."""
    if table.column_names.count(name) != 1:
        raise InputError(f"{path}: no column {name!r} (found {', '.join(table.column_names)})")
    return table[name]

def read_coordinates(path):
    """Parcel centres, float32 [V, 3], in mm of MNI space (a standard brain), and V functional
    networks, None where unknown: columns X, Y, Z and Network of a dataset, one row per parcel."""
    table = read_arrow(path)
    with input_errors(f"{path}: columns X, Y and Z must hold numbers"):
        axes = [np.array(read_column(table, axis, path).to_pylist(), np.float32) for axis in "XYZ"]
    networks = [None] * len(table)
    if "Network" in table.column_names:
        names = map(str, read_column(table, "Network", path).to_pylist())
        networks = [None if name in ("None", "nan") else name for name in names]
    return torch.from_numpy(np.stack(axes, axis=1)), networks                    # [V, 3]

class RecordingDataset:
    """The recordings (timepoints, parcels) in one column of a dataset, of any number type and of
    different lengths, read as windows without loading the rest. max_samples: use the first rows.
    Attributes: lengths, int64 [rows] in timepoints, and num_parcels."""

    def __init__(self, path, recording_col, max_samples=None):
        self.path, self.recording_col = path, recording_col
        self.table = read_arrow(path)[:max_samples]
        column = read_column(self.table, recording_col, path)
        # `datasets` may wrap nested lists into an extension type, Array2D: take what it stores.
        chunks = [getattr(chunk, "storage", chunk) for chunk in column.chunks]
        # Arrow keeps nested lists as one flat array and the start of each list: [[1, 2], [3, 4]] is
        # 1 2 3 4 and 0 2 4. Flattening only drops the starts, and copies nothing.
        with input_errors(f"{path}: column {recording_col!r} must hold lists of lists of numbers"):
            recordings = pa.chunked_array(chunks)
            self.timepoints = pc.list_flatten(recordings)   # of all recordings, one after the other
            self.values = pc.list_flatten(self.timepoints)  # every number of the column
            self.lengths = pc.list_value_length(recordings).fill_null(0).to_numpy().astype(np.int64)
        self.num_parcels = len(self.values) // max(1, len(self.timepoints))
        self.starts = np.cumsum(self.lengths) - self.lengths       # of each row in `timepoints`

    def __len__(self):
        return len(self.lengths)

    def window(self, row, start=0, num_timepoints=None):
        """num_timepoints of a recording from `start` on (None: to its end), as numpy [T, V] in the
        dtype of the dataset: a view of the file wherever Arrow allows it."""
        length, V = int(self.lengths[row]), self.num_parcels
        T = length - start if num_timepoints is None else num_timepoints
        if not 0 <= start <= start + T <= length:
            raise InputError(f"{self.path}: row {row} has {length} timepoints: no {T} from {start}")
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
        """(row, start) of training sample n: in each epoch, a random window of each of the rows."""
        row = int(rows[shuffled_index(n, len(rows), seed)])
        num_starts = int(self.lengths[row]) - num_timepoints + 1
        start = torch.randint(num_starts, (), generator=seeded_generator(seed, "window", n))
        return row, int(start)

def shuffled_index(n, count, seed):
    """Which of `count` items training sample n is: each epoch takes each item once."""
    epoch, i = divmod(n, count)
    order = torch.randperm(count, generator=seeded_generator(seed, "order", epoch))
    return int(order[i])                        # drawn again for each sample: nothing is stored

# 3. Tokens: patch embedding + spatial encoding + temporal encoding (what + where + when) ----------

def patchify(signal, P):
    """Cut each parcel's time series into patches of P timepoints: [B, T, V] -> [B, N, V, P]."""
    return signal.unflatten(1, (-1, P)).transpose(2, 3)

def unpatchify(patches):
    """Inverse of patchify: [B, N, V, P] -> [B, T, V]."""
    return patches.transpose(2, 3).flatten(1, 2)

class SpatialEncoding(nn.Module):
    """Position of a parcel, learned from its coordinates: [V, 3] in MNI mm -> [V, H]. Attention
    compares dot products. Those of raw coordinates cannot express "attend to my neighbours"; those
    of waves of many lengths can: they add up where positions are close and cancel elsewhere."""

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
    """Sinusoids of the time step (Vaswani et al. 2017, section 3.5), [N, H]. Their base of 10,000
    is for thousands of words; two thirds of its frequencies would barely change over ten steps."""
    step = torch.arange(N, device=device)[:, None]                              # [N, 1]
    exponent = -torch.arange(0, hidden_size, 2, device=device) / hidden_size    # [H / 2], 0 to ~ -1
    angles = step * 100.0 ** exponent                                           # [N, H / 2]
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)         # [N, H]

# 4. Masks: which tokens are hidden in pretraining, and which token attends to which ---------------

def random_mask(B, N, V, mask_ratio, generator=None):
    """bool [B, N, V], True = masked: exactly round(mask_ratio * V) parcels of each time step."""
    num_masked = round(mask_ratio * V)
    if num_masked == 0:
        raise InputError(f"mask_ratio {mask_ratio} masks none of {V} parcels: nothing to learn")
    rank = torch.rand(B, N, V, generator=generator).argsort(dim=2).argsort(dim=2)    # 0 to V - 1
    return rank < num_masked

def forward_mask(B, N, V):
    """bool [B, N, V], True = masked: the whole last time step. To reconstruct it is to forecast."""
    mask = torch.zeros(B, N, V, dtype=torch.bool)
    mask[:, -1] = True
    return mask

def training_mask(N, V, mask_ratio, forward_mask_prob, generator=None):
    """bool [1, N, V], the mask of one sample: forward with this probability, otherwise random."""
    if torch.rand((), generator=generator) < forward_mask_prob:
        earlier = torch.rand(1, N, 1, generator=generator) < FORWARD_MASKED
        return forward_mask(1, N, V) | earlier
    return random_mask(1, N, V, mask_ratio, generator)

def block_causal_mask(N, V):
    """Which token (query, row) attends to which (key, column): bool [S, S]. The sequence is [CLS,
    parcels at time step 0, parcels at time step 1, ...]. A parcel attends to all parcels of its own
    and of earlier time steps, so one model fills gaps and forecasts. CLS (row 0) attends to all,
    and nothing else to CLS (column 0): it would leak the future from the second layer on."""
    step = torch.arange(N).repeat_interleave(V)                 # [N * V]: 0 0 0 1 1 1 ... (V = 3)
    attends = torch.ones(1 + N * V, 1 + N * V, dtype=torch.bool)
    attends[1:, 0] = False
    attends[1:, 1:] = step[:, None] >= step                     # [N * V, N * V]
    return attends

# 5. Attention under block_causal_mask, without building it ----------------------------------------

def block_causal_attention(q, k, v, V):
    """q, k, v and the result [B, heads, S, D]. All tokens of a time step attend to one slice of the
    tokens: one dense attention call per time step, eligible for fused kernels. The pairs that the
    mask excludes (45% for 10 time steps) are never computed."""
    outputs = [F.scaled_dot_product_attention(q[:, :, :1], k, v)]                # CLS
    for stop in range(1 + V, q.shape[2] + 1, V):
        query = q[:, :, stop - V:stop]
        outputs.append(F.scaled_dot_product_attention(query, k[:, :, 1:stop], v[:, :, 1:stop]))
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
        """x [B, S, H], position [S, 2 * H] -> q, k, v, [B, heads, S, D] each. The position in x
        blurs from layer to layer, so each layer adds both encodings to its queries and keys."""
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)              # [B, S, H] each
        position_q, position_k = self.position_qk(position).chunk(2, dim=-1)     # [S, H] each
        # [B, S, H] -> [B, heads, S, D]: each head works on its own D of the H numbers.
        return [tensor.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                for tensor in (q + position_q, k + position_k, v)]

    def forward(self, x, position, V):
        """x [B, S, H], position [S, 2 * H] -> [B, S, H]."""
        q, k, v = self.queries_keys_values(x, position)
        attended = block_causal_attention(q, k, v, V)                            # [B, heads, S, D]
        x = x + self.out(attended.transpose(1, 2).flatten(2))                    # [B, S, H]
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))

class BrainLM(nn.Module):
    """The backbone: reconstructs a window from its visible patches. No parameter's shape depends on
    V or N, so the same weights run on any atlas and any number of time steps."""

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
        self.gradient_checkpointing = False     # True: less memory, a third more time
        initialise(self)                        # see the appendix

    def tokens(self, signal, xyz, mask=None):
        """signal [B, T, V], xyz [V, 3] in mm, mask bool [B, N, V] or None, on any device -> the
        sequence [B, S, H] and its positions [S, 2 * H]. InputError if the shapes do not fit."""
        H, P = self.config.hidden_size, self.config.timepoint_patching_size
        if not torch.is_tensor(signal) or signal.dim() != 3 or not torch.is_tensor(xyz):
            raise InputError("signal [B, T, V] and xyz [V, 3] must be tensors")
        B, T, V = signal.shape
        if T % P or V != len(xyz):
            raise InputError(f"signal has {T} timepoints and {V} parcels: expected a multiple of "
                             f"{P} and as many as the {len(xyz)} coordinates")
        device, dtype = self.cls_token.device, self.cls_token.dtype     # input may have others
        patches = patchify(signal, P).to(device, dtype)                              # [B, N, V, P]
        patch_embedding = self.patch_projection(patches)                             # [B, N, V, H]
        if mask is not None:                    # a masked token keeps its two encodings
            masked = mask[..., None].to(device)                                      # [B, N, V, 1]
            mask_token = self.mask_token.to(patch_embedding.dtype)      # bfloat16 under autocast
            patch_embedding = torch.where(masked, mask_token, patch_embedding)
        spatial = self.spatial_encoding(xyz.to(device))                              # [V, H]
        temporal = temporal_encoding(T // P, H, device).to(dtype)                    # [N, H]
        tokens = patch_embedding + spatial + temporal[:, None]      # + [V, H] + [N, 1, H]
        cls = self.cls_token.expand(B, 1, -1)                                        # [B, 1, H]
        where, when = spatial.repeat(T // P, 1), temporal.repeat_interleave(V, dim=0)
        position = F.pad(torch.cat([where, when], dim=1), (0, 0, 1, 0))  # [S, 2 * H], CLS: zeros
        return torch.cat([cls, tokens.flatten(1, 2)], dim=1), position

    def forward(self, signal, xyz, mask=None):
        """signal float [B, T, V], xyz float [V, 3] in mm, mask bool [B, N, V] (True = masked) or
        None -> reconstruction [B, T, V] and the hidden states [B, S, H] behind it, CLS first."""
        V = signal.shape[-1]
        x, position = self.tokens(signal, xyz, mask)                      # [B, S, H], [S, 2 * H]
        for layer in self.layers:
            if self.gradient_checkpointing:     # keep x alone, recompute the rest in backward
                x = checkpoint(layer, x, position, V, use_reentrant=False)
            else:
                x = layer(x, position, V)
        hidden_states = self.norm(x)                                                 # [B, S, H]
        patches = self.head(hidden_states[:, 1:]).unflatten(1, (-1, V))              # [B, N, V, P]
        return unpatchify(patches), hidden_states                   # [B, T, V], [B, S, H]

# 7. Pretraining: a batch and its loss -------------------------------------------------------------

def pretraining_batch(dataset, xyz, config, seed, samples, step):
    """Signal [B, T, W], coordinates [W, 3] and mask bool [B, N, W] of the samples with these
    numbers, for W of all V parcels: a third of those to mask teaches nearly as much as all of them,
    and leaving out the others pays for twice the steps."""
    T, V = config.num_timepoints_per_voxel, dataset.num_parcels
    N = T // config.timepoint_patching_size
    num_masked = round(config.mask_ratio * V)
    num_left_out = int(LEFT_OUT * num_masked)
    W = V - num_left_out
    order = torch.randperm(V, generator=seeded_generator(seed, "parcels", step))
    parcels = order[num_left_out:]                                               # [W]
    ratio = (num_masked - num_left_out) / W
    mask = torch.cat([training_mask(N, W, ratio, config.forward_mask_prob,
                                    seeded_generator(seed, "mask", n)) for n in samples])
    windows = [dataset.training_window(n, range(len(dataset)), T, seed) for n in samples]
    signal = dataset.batch(windows, T)[:, :, parcels]                            # [B, T, W]
    return signal, xyz[parcels.to(xyz.device)], mask

def reconstruction_loss(prediction, signal, mask, loss_fn="mse"):
    """Mean squared ("mse") or absolute ("mae") error over masked tokens alone: visible ones could
    simply be copied. All samples count alike, however many tokens they mask, so that the losses of
    batches and processes average. prediction, signal [B, T, V], mask bool [B, N, V] -> scalar."""
    P = signal.shape[1] // mask.shape[1]
    masked = mask.repeat_interleave(P, dim=1).to(prediction.device)                  # [B, T, V]
    error = (prediction - signal.to(prediction.device)).masked_fill(~masked, 0)
    error = error.square() if loss_fn == "mse" else error.abs()                      # [B, T, V]
    return (error.sum(dim=(1, 2)) / masked.sum(dim=(1, 2))).mean()

def pretraining_loss(model, dataset, xyz, config, seed, samples, step):
    """Pretraining in three lines, for one batch of a training step -> scalar."""
    signal, xyz, mask = pretraining_batch(dataset, xyz, config, seed, samples, step)
    reconstruction, _ = model(signal, xyz, mask)
    return reconstruction_loss(reconstruction, signal, mask, config.loss_fn)

# 8. Finetuning: a regression head -----------------------------------------------------------------

class BrainLMRegressor(nn.Module):
    """Backbone and a 3-layer MLP: signal [B, T, V] -> [B], in the units of the target (years, ...).
    Pretraining does not train CLS, as nothing attends to it, so the MLP also gets mean and standard
    deviation of all other hidden states. Four buffers standardise features and target."""

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
        """CLS, mean and standard deviation over the other tokens: [B, T, V] -> float32 [B, 3H]."""
        hidden_states = self.backbone(signal, xyz)[1].float()                        # [B, S, H]
        cls, parcels = hidden_states[:, 0], hidden_states[:, 1:]     # [B, H], [B, N * V, H]
        return torch.cat([cls, parcels.mean(dim=1), parcels.std(dim=1, correction=0)], dim=1)

    def predict(self, features):
        """Features [B, 3H] -> predictions [B]."""
        features = (features - self.feature_mean) / self.feature_std
        standardised = self.mlp(features.to(self.mlp[0].weight.dtype)).squeeze(1).float()      # [B]
        return standardised * self.target_std + self.target_mean

    def forward(self, signal, xyz):
        return self.predict(self.features(signal, xyz))

def regression_loss(prediction, target, target_std):
    """Mean squared error in units of target_std, so years and scores train alike. Both are [B]."""
    return ((prediction - target) / target_std).square().mean()

# 9. Training --------------------------------------------------------------------------------------

def train(model, optimizers, batch_loss, training, num_steps, first_step=0,
          rank=0, num_processes=1):
    """Train the model in place: `for step, loss in train(...)`, from first_step to num_steps.
    batch_loss(model, samples, step) -> scalar loss of the training samples with these numbers, of
    which each of several processes takes its own. It yields before the update, which is known to be
    finite: a checkpoint saved there has seen `step` updates, and resuming repeats this step."""
    B, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    for step in range(first_step, num_steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))          # from 1 to 0
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * cosine
        loss = 0.0
        for i in range(accumulation):
            first = ((step * accumulation + i) * num_processes + rank) * B
            part = batch_loss(model, range(first, first + B), step) / accumulation
            part.backward()                     # gradients add up over the batches of a step
            loss += part.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        if not math.isfinite(loss) or not norm.isfinite():
            raise InputError(f"step {step + 1}: loss {loss}, gradient norm {norm:.3g}: "
                             "lower --learning_rate; the last checkpoint is intact")
        yield step, loss
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

def make_optimizers(model):
    """Muon for the matrices of the layers, Adam for all other parameters."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if "layers." in name and p.dim() == 2]
    others = [p for name, p in trained.items() if "layers." not in name or p.dim() != 2]
    optimizers = [torch.optim.Adam(others, fused=True)]
    if matrices:                                # none if the backbone is frozen
        optimizers.append(Muon(matrices))
    return optimizers

class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024 (can be read last). A gradient is U S V' (singular value decomposition), S
    its size in each direction. The step is U V', equally large in all: rare directions are learned
    as fast as common ones. In float32: torch.optim.Muon's bfloat16 is slow on many CPUs."""

    def __init__(self, matrices, lr=1.5e-3):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self.update(matrix, group["lr"])
        return loss

    def update(self, matrix, lr):
        average = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
        average.lerp_(matrix.grad, 0.05)
        step = matrix.grad.lerp(average, 0.95)                             # Nesterov momentum
        tall = step.shape[0] > step.shape[1]
        step = step.T if tall else step         # of step @ step.T, take the smaller
        # Newton-Schulz iteration. With X = U S V', X X' X = U S^3 V': a polynomial of odd powers
        # acts on S alone. Five times this one brings any S in (0.003, 1] to between 0.7 and 1.2.
        step = step / (step.norm() + 1e-7)                                 # S in [0, 1]
        for _ in range(5):
            gram = step @ step.T
            step = 3.4445 * step + (-4.7750 * gram + 2.0315 * gram @ gram) @ step
        step = step.T if tall else step
        matrix.sub_(lr * math.sqrt(max(matrix.shape)) * step)   # entries of about 1, as Adam's

# Appendix: initialisation. Read it last; without it, learning takes several times as long. --------
# Interpolation in space (kriging) and autoregression in time, written as attention. Even (spatial)
# heads average nearby parcels of the time step, odd (temporal) ones extrapolate the last patch.

SPATIAL_HEAD = 2.0, 4.0     # lengths of the spatial and the temporal part of queries: longer ones
TEMPORAL_HEAD = 4.0, 3.0    # select more sharply, and temporal heads need a single parcel
CONTENT = 0.2               # length of the content part of a query
HEAD_GAIN = 0.6             # summed output of all heads of one kind
SMOOTHNESS, NOISE = 4.0, 0.5    # BOLD is smooth over some 4 timepoints; half as much is white noise

def extrapolation(P):
    """The matrix [P, P] that maps a patch to the expected next one, for a Gaussian process."""
    time = torch.arange(2 * P)
    covariance = torch.exp(-0.5 * ((time[:, None] - time) / SMOOTHNESS) ** 2)    # [2 * P, 2 * P]
    return covariance[P:, :P] @ torch.linalg.inv(covariance[:P, :P] + NOISE * torch.eye(P))

@torch.no_grad()
def initialise(model):
    """Set the initial weights of a BrainLM, drawn from torch's global generator."""
    if model.cls_token.is_meta:                 # without memory: a checkpoint will be loaded
        return
    H, P = model.config.hidden_size, model.config.timepoint_patching_size
    N, heads = model.config.num_timepoints_per_voxel // P, model.config.num_attention_heads
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(model.cls_token, std=0.02)
    nn.init.normal_(model.mask_token, std=0.3)

    # Patches are written along P orthonormal directions and read from them. QR makes these
    # orthogonal to ones, which LayerNorm removes, and as far as possible to the temporal encoding.
    others = torch.cat([torch.ones(H, 1), temporal_encoding(N, H).T], dim=1)[:, :H - P]
    directions = torch.linalg.qr(torch.cat([others, torch.randn(H, P)], dim=1))[0][:, -P:]  # [H, P]
    model.patch_projection.weight.copy_(directions)
    model.head.weight.copy_(directions.T)
    for weight in model.spatial_encoding.linear.weight, model.mask_token:
        weight.sub_(directions @ (directions.T @ weight))

    # The matrix with next_step @ temporal_encoding[n] = temporal_encoding[n + 1] rotates each pair.
    sine, cosine = temporal_encoding(2, H)[1].view(-1, 2).T                      # [H / 2] each
    rotations = torch.stack([cosine, sine, -sine, cosine], dim=1).view(-1, 2, 2)
    next_step = torch.block_diag(*rotations)                                     # [H, H]

    for layer in model.layers:
        nn.init.zeros_(layer.out.weight)
        nn.init.normal_(layer.down.weight, std=0.002)       # the MLP adds almost nothing yet
        for head in range(heads):
            temporal = head % 2 == 1
            query, key, value = layer.qkv.weight.view(3, heads, -1, H)[:, head]      # [D, H] each
            position_query, position_key = (                                         # [D, 2 * H]
                layer.position_qk.weight.view(2, heads, -1, 2 * H)[:, head])
            nn.init.orthogonal_(query)
            query.mul_(CONTENT)
            lengths = TEMPORAL_HEAD if temporal else SPATIAL_HEAD
            for part, length in zip(position_query.chunk(2, dim=1), lengths):        # [D, H] each
                nn.init.orthogonal_(part)
                part.mul_(length)
            # Keys equal queries, so a token attends to similar ones. The keys of temporal heads
            # carry the next time step: a query finds the patch one step before its own.
            key.copy_(query)
            position_key.copy_(position_query)
            if temporal:
                position_key[:, H:] = position_query[:, H:] @ next_step
            # Values are patches: spatial heads pass them on, temporal heads extrapolate them.
            nn.init.orthogonal_(value)
            value[:P] = directions.T[:H // heads]
            output = directions @ extrapolation(P) if temporal else directions           # [H, P]
            gain = HEAD_GAIN / len(model.layers) / len(range(temporal, heads, 2))
            layer.out.weight.view(H, heads, -1)[:, head, :P] = gain * output[:, :H // heads]

# Part II: the program =============================================================================

import argparse
import csv
import importlib
import io
import os
import re
import sys
import textwrap
import time
from dataclasses import asdict, fields
from functools import cache, partial
from typing import Callable

import torch.distributed as dist

__all__ = """BrainLM BrainLMConfig BrainLMRegressor InputError RecordingDataset TrainingConfig
    block_causal_mask check_recordings forward_mask load_model make_optimizers patchify
    pretraining_batch pretraining_loss random_mask read_coordinates reconstruction_loss
    regression_loss scores temporal_encoding train training_mask unpatchify""".split()

# 10. Checking input: what Part I takes for granted ------------------------------------------------

def check_coordinates(xyz, path):
    """xyz [V, 3]: InputError if empty or not finite, a note if these do not look like MNI mm."""
    if len(xyz) == 0:
        raise InputError(f"{path} has no rows: expected one row per parcel")
    for row, axis in torch.nonzero(~xyz.isfinite()).tolist():
        raise InputError(f"{path}: column {'XYZ'[axis]!r}, row {row} is {xyz[row, axis]}")
    farthest = xyz.abs().max()          # a brain reaches 110 mm; voxel indices are never negative
    if xyz.min() >= 0 or not 12 <= farthest <= 200:
        print(f"note: {path}: coordinates up to {farthest:.4g} do not look like MNI millimetres")

def check_recordings(dataset, window=1, num_parcels=None):
    """Check every number of a RecordingDataset. InputError if a recording has fewer timepoints than
    a window, parcels other than num_parcels (None: than its first timepoint) or a value that is not
    finite in float32. Prints a note if recordings have unusual units."""
    where, unusual = f"{dataset.path}: column {dataset.recording_col!r}", []
    if len(dataset) == 0:
        raise InputError(f"{dataset.path} has no rows: expected one recording per row")
    if not (pa.types.is_integer(dataset.values.type) or pa.types.is_floating(dataset.values.type)):
        raise InputError(f"{where} must hold numbers (found {dataset.values.type})")
    widths = pc.list_value_length(dataset.timepoints).fill_null(0).to_numpy()
    V = dataset.num_parcels = num_parcels or max(1, *widths[:1])
    for row, (start, length) in enumerate(zip(dataset.starts, dataset.lengths)):
        of_row = widths[start:start + length]
        for t in np.flatnonzero(of_row != V):
            raise InputError(f"{where}, row {row}, timepoint {t} has {of_row[t]} parcels, not {V}: "
                             "ragged, of another atlas or transposed (timepoints come first)?")
        if length < window:
            raise InputError(f"{where}, row {row} has {length} timepoints, fewer than a window of "
                             f"{window}: leave it out or lower --num_timepoints_per_voxel")
        signal = dataset.window(row)
        with np.errstate(over="ignore"):        # what is too large for float32 becomes infinite
            numbers = signal.astype(np.float32, copy=False)
        for t, v in np.argwhere(~np.isfinite(numbers)):
            raise InputError(f"{where}, row {row}, timepoint {t}, parcel {v} is {signal[t, v]}: "
                             "correct it or leave the row out")
        varying = numbers[:, numbers.any(axis=0)]       # a parcel without signal is all zeros
        if varying.size:
            offset, std = np.median(np.abs(varying.mean(axis=0))), np.median(varying.std(axis=0))
            if not 0.15 <= std <= 15 or offset > 2 * std:
                unusual.append(f"row {row}, where parcels vary by {std:.4g} around {offset:.4g}")
    if unusual:
        print(f"note: {dataset.path}: {len(unusual)} recordings have unusual units, for example "
              f"{unusual[0]}: apply robust_scale of sample_data.py")

def read_target(dataset, column, min_values):
    """A column of numbers, or of text that holds numbers, as float64 [rows], NaN where missing.
    InputError if it has fewer than min_values different values; notes on what looks wrong."""
    where, target = f"{dataset.path}: column {column!r}", np.full(len(dataset), np.nan)
    for row, value in enumerate(read_column(dataset.table, column, dataset.path)):
        with input_errors(f"{where}, row {row} must be a finite number"):
            value = value.as_py()
            if str(value).strip().lower() not in ("none", "", "n/a", "na", "nan"):
                target[row] = float(value)
            if np.isinf(target[row]):
                raise ValueError(f"got {value!r}")
    known = target[~np.isnan(target)]
    values, counts = np.unique(known, return_counts=True)
    if len(values) < min_values:
        raise InputError(f"{where} must have at least {min_values} different values")
    if len(known) < len(target):
        print(f"note: {dataset.path}: {len(target) - len(known)} rows have no {column}: they are "
              "neither trained on nor scored")
    low, high = np.percentile(known, [25, 75]) if len(known) else (0, 0)
    for value, count in zip(values, counts):
        far = max(low - value, value - high) > 10 * (high - low) > 0
        if far and (count > 1 or abs(value) in (888, 999, 9999)):
            print(f"note: {where} is {value:g} in {count} rows, far from others: None if missing")
    return target

# 11. Checkpoints: folders that survive a kill and are Hugging Face Hub repositories ---------------

def write_atomically(path, content):
    """Write text, or what torch.save takes: at any instant path is the old file or the new one."""
    temporary = path.with_name(f".{path.name}.part")
    with input_errors(f"Cannot write {path}; what was saved before is intact"):
        with open(temporary, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

def to_json(content, indent=None):
    """JSON has neither NaN nor infinity: both become null."""
    without = json.loads(json.dumps(content), parse_constant=lambda name: None)
    return json.dumps(without, indent=indent) + "\n"

def save_pretrained(model, folder):
    """Write a model as a folder that from_pretrained and the Hugging Face Hub can read."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    hub = {"model_class": type(model).__name__, "model_type": "brainlm", "auto_map": {
        "AutoConfig": "brainlm.BrainLMHubConfig", "AutoModel": "brainlm.BrainLMHubModel",
        "AutoModelForPreTraining": "brainlm.BrainLMHubModel"}}
    write_atomically(folder / "config.json", to_json(asdict(model.config) | hub, indent=2))
    if "__file__" in globals():                         # else pasted into a notebook
        write_atomically(folder / "brainlm.py", Path(__file__).read_text(encoding="utf-8"))
    write_atomically(folder / "pytorch_model.bin", model.state_dict())
    for other in folder.glob("model*.safetensors*"):    # of an older model
        other.unlink()

def model_folder(name):
    """A local folder or, downloaded, the repository "user/name" of the Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    missing = f"{name}: no such run folder (python brainlm.py pretrain makes one)"
    if str(name).startswith((".", "/", "~")) or Path(*folder.parts[:1]).exists():
        raise InputError(missing)                       # not a name on the Hub either
    with input_errors(f"{missing}, and not downloaded from the Hub (pip install huggingface_hub)"):
        return Path(importlib.import_module("huggingface_hub").snapshot_download(str(name)))

def load_model(name_or_path, **changes):
    """The BrainLM or BrainLMRegressor of a run folder or, "user/name", of the Hub, in evaluation
    mode. changes: fields of its config to replace, such as mask_ratio."""
    file = model_folder(name_or_path) / "config.json"
    with input_errors(f"Cannot read {file}: expected the config of a BrainLM"):
        saved = json.loads(file.read_text(encoding="utf-8"))
        if "model_class" not in saved:
            raise ValueError("it is of another architecture, such as the published ViTMAE, which "
                             "cannot be loaded")
        settings = {option.name: saved[option.name] for option in fields(BrainLMConfig)}
        model = MODELS[saved["model_class"]](BrainLMConfig(**settings | changes))
    heads = settings["num_attention_heads"]
    if model.config.num_attention_heads != heads:       # no weight's shape depends on it
        raise InputError(f"{file}: the {heads} num_attention_heads cannot be changed")
    weights, folder = {}, file.parent
    for file in sorted(folder.glob("model*.safetensors")) or [folder / "pytorch_model.bin"]:
        with input_errors(f"{file} is missing, truncated, a Git LFS pointer or holds no weights"):
            if file.suffix == ".bin":           # of both formats, the one that transformers loads
                weights |= torch.load(file, map_location="cpu", weights_only=True)
            else:                               # transformers takes an `import` for a requirement
                weights |= importlib.import_module("safetensors.torch").load_file(file)
    with input_errors(f"{file} does not hold the weights of this {saved['model_class']}"):
        model.load_state_dict({name.removeprefix("model."): weights[name] for name in weights})
    return model.eval()

def from_pretrained(model_class, name_or_path, **changes):
    """load_model for one class: a BrainLM may also be the backbone of a BrainLMRegressor."""
    model = load_model(name_or_path, **changes)
    if model_class is BrainLM:
        return getattr(model, "backbone", model)
    if not isinstance(model, BrainLMRegressor):
        raise InputError(f"{name_or_path} holds no BrainLMRegressor: python brainlm.py finetune")
    return model

MODELS = {"BrainLM": BrainLM, "BrainLMRegressor": BrainLMRegressor}
BrainLM.save_pretrained = BrainLMRegressor.save_pretrained = save_pretrained
BrainLM.from_pretrained = BrainLMRegressor.from_pretrained = classmethod(from_pretrained)

# 12. Methods of a trained BrainLM -----------------------------------------------------------------

@torch.no_grad()
def forecast(model, signal, xyz, num_timepoints):
    """Continue a recording: signal [B, >= P, V] -> [B, num_timepoints, V]. Patch by patch: append a
    masked one, predict it, append the prediction; no window is longer than in training."""
    P, T = model.config.timepoint_patching_size, model.config.num_timepoints_per_voxel
    model.tokens(signal[:, :0], xyz)            # InputError if the shapes do not fit
    if signal.shape[1] < P:
        raise InputError(f"A forecast needs at least {P} timepoints (got {signal.shape[1]})")
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
    --no-freeze_backbone trains, and the parcels' hidden states averaged over time [B, V, H]."""
    hidden_states = model(signal, xyz)[1]                                            # [B, S, H]
    parcels = hidden_states[:, 1:].unflatten(1, (-1, signal.shape[2]))               # [B, N, V, H]
    return hidden_states[:, 0], parcels.mean(dim=1)

@torch.no_grad()
def attention(model, signal, xyz, layer, mask=None):
    """Attention weights of a layer (0: the first), [B, heads, S, S]; rows sum to one. Row 0 is CLS:
    its columns 1.., unflattened to (N, V), say how much it attends to each token."""
    V = len(xyz)
    x, position = model.tokens(signal, xyz, mask)
    for earlier in model.layers[:layer]:
        x = earlier(x, position, V)
    q, k, _ = model.layers[layer].queries_keys_values(x, position)
    attends = block_causal_mask((x.shape[1] - 1) // V, V).to(x.device)
    products = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])             # [B, heads, S, S]
    return products.masked_fill(~attends, -math.inf).softmax(dim=-1)

@torch.no_grad()
def similarity(model, signal, xyz):
    """Similarity of parcels: signal [B, T, V] -> float32 [B, V, V], the correlation of their hidden
    states along time, without each parcel's mean, which depends on its position."""
    parcels = model(signal, xyz)[1][:, 1:].float().unflatten(1, (-1, signal.shape[2]))
    parcels = parcels - parcels.mean(dim=1, keepdim=True)                            # [B, N, V, H]
    parcels = F.normalize(parcels.transpose(1, 2).flatten(2), dim=2)                 # [B, V, N * H]
    return parcels @ parcels.mT

BrainLM.forecast, BrainLM.embed = forecast, embed
BrainLM.attention, BrainLM.similarity = attention, similarity

# 13. Evaluation -----------------------------------------------------------------------------------

ALPHAS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)    # regularisation, times the mean variance
HORIZONS = (1, 2, 3, 5, 10, 20)                     # timepoints ahead
MAX_BASELINE_ROWS = 500                             # training recordings to fit a baseline to
MAX_WINDOWS = 200                                   # windows to evaluate on
MAX_WINDOWS_WHILE_TRAINING = 20                     # windows or recordings

@dataclass
class Data:
    """What a model is trained and evaluated on."""
    xyz: torch.Tensor                           # [V, 3] in mm, on the model's device
    networks: list                              # V names, None for a parcel without one
    train: RecordingDataset                     # None: evaluate without baselines
    val: RecordingDataset
    batch_size: int = 8                         # windows to evaluate at once
    autocast: Callable = contextlib.nullcontext  # makes the context of a batch: bfloat16, or none

def evenly(items, most):
    """At most so many of the items, evenly spaced: cohorts are often sorted, by site or age."""
    chosen = np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)
    return [items[i] for i in chosen]

def fixed_windows(dataset, rows, T):
    """[(row, start), ...]: windows side by side, and one at the very end of each recording."""
    windows = []
    for row in rows:
        last = int(dataset.lengths[row]) - T
        windows += [(row, start) for start in [*range(0, last, T), last]]
    return windows

def scores(prediction, target):
    """R2 = 1 - SSE / SST (never clipped), MSE and MAE of arrays of one shape."""
    error, variance = np.float64(prediction) - target, target.var(dtype=np.float64)
    MSE = np.square(error).mean()
    R2 = 1 - MSE / variance if variance > 0 else -math.inf
    return {"R2": float(R2), "MSE": float(MSE), "MAE": float(np.abs(error).mean())}

@torch.no_grad()
def in_batches(data, function, *tensors):
    """function(*tensors) as float32 on the CPU, data.batch_size rows of the tensors at a time."""
    outputs = []
    for batch in zip(*(tensor.split(data.batch_size) for tensor in tensors)):
        with data.autocast():
            outputs.append(function(*batch).float().cpu())
    return torch.cat(outputs)

# A reconstruction method is a function of signal [B, T, V], xyz [V, 3] and mask, bool [B, N, V],
# that returns a reconstruction [B, T, V]. A BrainLM is one. So are these baselines, each the
# conditional mean of a normal distribution that is fitted to data.

def moments(dataset, blocks_of):
    """Mean [a] and covariance [a, a] of samples: blocks_of(recording [T, V]) -> arrays [n, a]."""
    count, total, products = 0, 0.0, 0.0
    for row in evenly(range(len(dataset)), MAX_BASELINE_ROWS):
        for samples in blocks_of(dataset.window(row).astype(np.float64)):
            count += len(samples)
            total = total + samples.sum(axis=0)
            products = products + samples.T @ samples
    mean = total / count
    return mean, products / count - np.outer(mean, mean)

def conditional_mean(mean, covariance, observed, target, alpha):
    """Expected target entries of a normally distributed vector given the observed ones, mean_t +
    C_to (C_oo + alpha)^-1 (x_o - mean_o), as weights [observed, target] and intercept [target]."""
    variance = max(covariance.diagonal().mean(), 1e-12)     # 0 where all is constant
    regularised = covariance[np.ix_(observed, observed)] + alpha * variance * np.eye(len(observed))
    weights = np.linalg.solve(regularised, covariance[np.ix_(observed, target)])
    return weights, mean[target] - mean[observed] @ weights

class GaussianConditionalMean:
    """Predicts masked parcels from the visible ones at the same timepoint."""
    name = "Gaussian conditional mean"

    def fit(self, dataset):
        self.moments = moments(dataset, lambda signal: [signal])             # [V], [V, V]

    def __call__(self, signal, xyz, mask):
        patches = patchify(signal.to(torch.float64, copy=True), signal.shape[1] // mask.shape[1])
        for patch, masked in zip(patches.flatten(0, 1).numpy(), mask.flatten(0, 1).numpy()):
            weights, intercept = conditional_mean(
                *self.moments, np.flatnonzero(~masked), np.flatnonzero(masked), self.alpha)
            patch[masked] = weights.T @ patch[~masked] + intercept[:, None]
        return unpatchify(patches)

class Persistence:
    """Forecasts the last time step: each parcel keeps its last value."""
    name = "persistence"

    def fit(self, dataset):
        """There is nothing to fit."""

    def __call__(self, signal, xyz, mask):
        P = signal.shape[1] // mask.shape[1]
        last = signal[:, -P - 1:-P]                                          # [B, 1, V]
        return torch.cat([signal[:, :-P], last.expand(-1, P, -1)], dim=1)

class RidgeAutoregression:
    """Forecasts the last time step: each patch from the previous patch of the same parcel."""
    name = "ridge autoregression"

    def __init__(self, P):
        self.P = P

    def fit(self, dataset):
        def stretches(signal):                  # any 2 * P timepoints, of all parcels [V, 2 * P]
            return (signal[t:t + 2 * self.P].T for t in range(len(signal) - 2 * self.P + 1))
        self.moments = moments(dataset, stretches)                           # [2P], [2P, 2P]

    def __call__(self, signal, xyz, mask):
        P = self.P
        weights, intercept = conditional_mean(
            *self.moments, np.arange(P), np.arange(P, 2 * P), self.alpha)
        past = patchify(signal.double(), P)[:, -2].numpy()                   # [B, V, P]
        future = torch.from_numpy(past @ weights + intercept).transpose(1, 2)        # [B, P, V]
        return torch.cat([signal[:, :-P].double(), future], dim=1)

class VectorAutoregression:
    """Forecasts the last time step, one timepoint after the other, from the last two timepoints."""
    name = "2-lag vector autoregression"

    def fit(self, dataset):
        self.moments = moments(
            dataset, lambda signal: [np.hstack([signal[:-2], signal[1:-1], signal[2:]])])

    def __call__(self, signal, xyz, mask):
        (B, T, V), P = signal.shape, signal.shape[1] // mask.shape[1]
        weights, intercept = conditional_mean(
            *self.moments, np.arange(2 * V), np.arange(2 * V, 3 * V), self.alpha)
        forecast = signal.to(torch.float64, copy=True).numpy()               # [B, T, V]
        for t in range(T - P, T):
            forecast[:, t] = forecast[:, t - 2:t].reshape(B, 2 * V) @ weights + intercept
        return torch.from_numpy(forecast)

def reconstruction_tasks(dataset, config, max_windows):
    """Fixed windows, float32 [B, T, V], and {task: mask, bool [B, N, V]}; always the same."""
    T, P = config.num_timepoints_per_voxel, config.timepoint_patching_size
    windows = evenly(fixed_windows(dataset, range(len(dataset)), T), max_windows)
    signal = dataset.batch(windows, T)
    B, N, V = len(signal), T // P, signal.shape[2]
    masks = {"masked": torch.cat([
        random_mask(1, N, V, config.mask_ratio, torch.Generator().manual_seed(i))
        for i in range(B)])}
    if T - P >= max(P, 2):                      # else there is too little to forecast from
        masks["forecast"] = forward_mask(B, N, V)
    return signal, masks

def reconstruction_scores(method, signal, xyz, mask, horizons=()):
    """Scores of a reconstruction method on masked tokens, and its R2 at these timepoints ahead."""
    P = signal.shape[1] // mask.shape[1]
    prediction, target = (patchify(each, P)[mask].numpy()                    # [masked tokens, P]
                          for each in (method(signal, xyz, mask), signal))
    row = scores(prediction, target)
    for h in horizons:
        row[f"R2 at {h}"] = scores(prediction[:, h - 1], target[:, h - 1])["R2"]
    return row

def reconstruction_of(model, data):
    """A BrainLM as a reconstruction method, batch by batch."""
    def method(signal, xyz, mask):
        return in_batches(data, lambda signal, mask: model(signal, xyz, mask)[0], signal, mask)
    return method

def evaluate_reconstruction(model, data):
    """{title: {method: {score: value}}} of masked patches and of forecasts."""
    signal, masks = reconstruction_tasks(data.val, model.config, MAX_WINDOWS)
    (B, T, _), P = signal.shape, model.config.timepoint_patching_size
    tables = {}
    for task, mask in masks.items():
        if task == "masked":
            title = f"masked patches ({model.config.mask_ratio:.0%} hidden, {B} windows)"
            baselines, horizons = [GaussianConditionalMean()], []
        else:
            title = f"forecasting {P} timepoints from {T - P} ({B} windows)"
            baselines = [Persistence(), RidgeAutoregression(P), VectorAutoregression()]
            horizons = [h for h in HORIZONS if h <= P]
        method = reconstruction_of(model, data)
        table = {"BrainLM": reconstruction_scores(method, signal, data.xyz, mask, horizons)}
        rows = {}
        for baseline in baselines if data.train else []:
            baseline.fit(data.train)
            by_alpha = []
            for alpha in ALPHAS:                # the best one on these very windows counts
                baseline.alpha = alpha
                by_alpha.append(reconstruction_scores(baseline, signal, data.xyz, mask, horizons))
            rows[baseline.name] = max(by_alpha, key=lambda row: row["R2"])
        best_first = sorted(rows, key=lambda name: -rows[name]["R2"])
        tables[title] = table | {name: rows[name] for name in best_first}
    return tables

def correlation(signal):
    """Functional connectivity: correlation of columns, [T, V] -> [V, V], 0 for constant ones."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.atleast_2d(np.corrcoef(signal, rowvar=False)))

def knn_accuracy(distance, labels, k=5):
    """Fraction of V items, distance [V, V], whose k nearest others mostly share their label."""
    distance = distance + np.diag(np.full(len(distance), np.inf))
    correct = 0
    for row, label in zip(distance, labels):
        nearest = [labels[i] for i in np.argsort(row, kind="stable")[:min(k, len(row) - 1)]]
        correct += max(nearest, key=nearest.count) == label
    return correct / len(labels)

def parcel_distances(model, data):
    """Distances of parcels, {method: [V, V]}, averaged over recordings; a profile is a row of the
    similarity of hidden states or of the functional connectivity."""
    windows = [(row, 0) for row in evenly(range(len(data.val)), MAX_WINDOWS)]
    signal = data.val.batch(windows, model.config.num_timepoints_per_voxel)  # [windows, T, V]
    similarity, connectivity = np.zeros((2, len(data.xyz), len(data.xyz)))
    for window in signal.split(1):                                           # [1, T, V] each
        similar = in_batches(data, lambda window: model.similarity(window, data.xyz), window)
        similarity += similar[0].numpy() / len(signal)
        connectivity += correlation(window[0].numpy()) / len(signal)
    return {"BrainLM similarity": 1 - similarity,
            "BrainLM similarity profile": 1 - correlation(similarity),
            "functional connectivity": 1 - connectivity,
            "functional connectivity profile": 1 - correlation(connectivity),
            "coordinates": torch.cdist(data.xyz, data.xyz).cpu().numpy()}

def evaluate_networks(model, data):
    """Functional networks without training, {title: {method: {score: value}}}: the fraction of the
    labelled parcels that get their label from their nearest neighbours."""
    labelled = [v for v, name in enumerate(data.networks) if name is not None]
    labels = [data.networks[v] for v in labelled]
    if not 1 < len(set(labels)) < len(labels):          # nothing to find
        return {}
    return {f"functional networks of {len(labels)} parcels (5 nearest neighbours)": {
        method: {"accuracy": knn_accuracy(distance[np.ix_(labelled, labelled)], labels)}
        for method, distance in parcel_distances(model, data).items()}}

def recording_features(model, data, dataset, row):
    """What the head of a BrainLMRegressor gets of a recording: [fixed windows, 3H], float32."""
    T = model.config.num_timepoints_per_voxel
    signal = dataset.batch(fixed_windows(dataset, [row], T), T)              # [windows, T, V]
    return in_batches(data, lambda signal: model.features(signal, data.xyz), signal)

@torch.no_grad()
def predict_recordings(model, features):
    """features: [windows, 3H] of each recording -> predictions, means over windows, float64."""
    device = model.feature_mean.device
    return np.array([model.predict(windows.to(device)).double().mean().item()
                     for windows in features])

def regression_scores(prediction, target):
    """Scores of predictions [n] and Pearson r; for a target of two values also accuracy and AUC."""
    covariance = np.mean((prediction - prediction.mean()) * (target - target.mean()))
    with np.errstate(divide="ignore", invalid="ignore"):
        r = covariance / (prediction.std() * target.std())
    row, values = scores(prediction, target) | {"r": float(r)}, np.unique(target)
    if len(values) == 2:
        low, high = np.sort(prediction[target == values[0]]), prediction[target == values[1]]
        below = (np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")) / 2
        row[f"AUC of {values[1]:g}"] = float(below.mean() / len(low))   # ordered pairs, ties half
        row["accuracy"] = float(((prediction > values.mean()) == (target == values[1])).mean())
    return row

def fit_ridge(features, target):
    """Ridge regression of target [n] on features [n, F] -> coefficients [F] and intercept; alpha is
    the one with the smallest leave-one-out error."""
    center, mean, fits = features.mean(axis=0), target.mean(), []
    gram = (features - center) @ (features - center).T      # dual form: F may be larger than n
    for alpha in np.logspace(-3, 3, 25) * max(gram.diagonal().mean(), 1e-12):
        inverse = np.linalg.inv(gram + alpha * np.eye(len(gram)))
        weights = inverse @ (target - mean)
        # The error of each recording, predicted from the others, whose mean differs as well.
        errors = weights / (inverse.diagonal() - 1 / (alpha * len(gram)))
        fits.append((np.square(errors).mean(), alpha, weights))
    coefficients = (features - center).T @ min(fits)[-1]
    return coefficients, mean - center @ coefficients

def connectivity_ridge(train_set, target, val_set, val_rows):
    """Ridge regression on functional connectivity: a target [rows of train_set], NaN where missing
    -> predictions [val_rows]. Validation recordings are in memory one at a time."""
    upper = np.triu_indices(train_set.num_parcels, k=1)
    rows = evenly(np.flatnonzero(~np.isnan(target)), MAX_BASELINE_ROWS)
    features = np.stack([correlation(train_set.window(row))[upper] for row in rows])
    coefficients, intercept = fit_ridge(features, target[rows])
    return np.array([correlation(val_set.window(row))[upper] @ coefficients + intercept
                     for row in val_rows])

def evaluate_regression(model, data, features_of, column, target, val_target):
    """Predictions of a BrainLMRegressor for the validation recordings, and the table of its scores
    and of baselines, {title: {method: {score: value}}}, over those with a target; {} if there is
    none. target, val_target: NaN where missing. features_of(dataset, row): recording_features."""
    features = [features_of(data.val, row) for row in range(len(data.val))]
    prediction = predict_recordings(model, features)                         # [recordings]
    known = np.flatnonzero(~np.isnan(val_target))
    if len(known) == 0:
        return prediction, {}
    methods = {"BrainLM": prediction[known]}
    if data.train:
        rows = evenly(np.flatnonzero(~np.isnan(target)), MAX_BASELINE_ROWS)
        train = np.stack([features_of(data.train, row).double().mean(dim=0) for row in rows])
        val = np.stack([features[row].double().mean(dim=0) for row in known])        # [known, 3H]
        std = np.maximum(train.std(axis=0), 1e-6)
        coefficients, intercept = fit_ridge(train / std, target[rows])
        methods["ridge on BrainLM's features"] = val / std @ coefficients + intercept
        methods["ridge on functional connectivity"] = connectivity_ridge(
            data.train, target, data.val, known)
        methods["training mean"] = np.full(len(known), np.nanmean(target))
    return prediction, {f"{column}, {len(known)} validation recordings": {
        method: regression_scores(values, val_target[known]) for method, values in methods.items()}}

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

# 14. Devices, processes and the data of a command -------------------------------------------------

def torchrun_numbers():
    """(rank, local rank, number of processes) given by torchrun; (0, 0, 1) without it."""
    if dist.is_available() and dist.is_torchelastic_launched():
        return tuple(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return 0, 0, 1

def on_rank_0(function, *arguments):
    """Call a function on rank 0 while the others wait; every rank returns or raises the same."""
    rank, _, num_processes = torchrun_numbers()
    result = [None]
    if rank == 0:
        try:
            result = [function(*arguments)]
        except (InputError, OSError) as error:
            result = [error]
    if num_processes > 1:
        dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]

def leave_to_rank_0():
    """End the process group and all processes but rank 0."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if torchrun_numbers()[0] > 0:
        sys.exit()

def make_missing_sample_data():
    if not Path("sample_data/train/state.json").exists():              # written last
        print("no ./sample_data yet: making it (python sample_data.py)")
        with input_errors("No sample_data.py beside brainlm.py: get it, or pass your own datasets"):
            importlib.import_module("sample_data").make_sample_data("./sample_data")

def participants_of(dataset):
    """Names of the participants in a RecordingDataset; where no column has them, its folder's."""
    for name in dataset.table.column_names:
        if name.lower() in ("subject", "participant_id", "sub", "subject_id"):
            return {*map(str, dataset.table[name].to_pylist())} - {"None"}
    return {str(Path(dataset.path).resolve())}

def check_data(data, coords_path, T):
    print("checking every number of the recordings", flush=True)
    check_coordinates(data.xyz, coords_path)
    check_recordings(data.val, T, len(data.xyz))
    if data.train:
        check_recordings(data.train, T, len(data.xyz))
        both = participants_of(data.train) & participants_of(data.val)
        if both:
            print(f"note: {min(both)} ({len(both)} in all) is in the training and in the "
                  "validation data: scores say nothing about new participants")

def open_data(args, T):
    """Start the device and, under torchrun, the process group. Returns the Data of a command, with
    windows of T timepoints."""
    _, local_rank, num_processes = torchrun_numbers()
    device = args.device
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    with input_errors(f"--device {device} is not available on this machine or in this torch"):
        torch.zeros(1, device=device)
    if device == "cuda":
        torch.cuda.set_device(local_rank)               # which "cuda" means from here on
    if num_processes > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    mixed = args.dtype == "bfloat16" or args.dtype == "auto" and device == "cuda"
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=mixed)

    if args.train_dataset_path == SAMPLE_DATA["train_dataset_path"]:
        on_rank_0(make_missing_sample_data)
    column, train = args.recording_col_name, None
    if args.train_dataset_path:
        train = RecordingDataset(args.train_dataset_path, column, args.max_train_samples)
    val = RecordingDataset(args.val_dataset_path, column, args.max_eval_samples)
    xyz, networks = read_coordinates(args.coords_dataset_path)
    data = Data(xyz.to(device), networks, train, val, args.per_device_eval_batch_size, autocast)
    on_rank_0(check_data, data, args.coords_dataset_path, T)
    print(f"data: {len(train) if train else 'no'} training and {len(val)} validation recordings, "
          f"{len(xyz)} parcels, windows of {T}")
    return data

# 15. A run: training that can be stopped and resumed ----------------------------------------------

RESULTS = ("README.md", "evaluation.json", "predictions.csv",       # they describe one model
           "evaluation.png", "networks.png", "predictions.png")
FROM_SCRATCH = "start from scratch with --overwrite_output_dir, or choose another --output_dir"

def prepare_folder(args):
    """Make args.output_dir. Returns the state of the run to be resumed there or None. InputError if
    other files or the model to start from would be lost."""
    folder = Path(args.output_dir)
    if args.model_name_or_path and Path(args.model_name_or_path).resolve() == folder.resolve():
        raise InputError(f"--output_dir {folder} is the --model_name_or_path: choose another")
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    file = folder / "training_state.pt"
    if present and file.name not in present:
        raise InputError(f"--output_dir {folder} holds {present[0]}, not a run: choose another")
    if args.overwrite_output_dir:
        for name in RESULTS:
            (folder / name).unlink(missing_ok=True)
    elif present:
        with input_errors(f"{file} cannot be resumed: {FROM_SCRATCH}"):
            return torch.load(file, map_location="cpu", weights_only=True)
    return None

def fingerprint(*contents):
    """A short text that differs if any of the contents, texts or tensors, differs."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content.encode() if isinstance(content, str) else content.cpu().numpy())
    return digest.hexdigest()[:16]

def identity_of(args, model, data):
    """What must be the same for a run to be resumed, {name: value}: neither paths nor processes."""
    folder = Path(args.train_dataset_path)
    state = (folder / "state.json").read_text(encoding="utf-8")
    sizes = [(folder / entry["filename"]).stat().st_size
             for entry in json.loads(state)["_data_files"]]
    weights = getattr(model, "backbone", model).state_dict() if args.model_name_or_path else {}
    flags = ("command", "seed", "variable_of_interest_col_name", "freeze_backbone",
             "recording_col_name")
    return asdict(model.config) | {name: getattr(args, name, None) for name in flags} | {
        "windows per step": args.per_device_train_batch_size * args.gradient_accumulation_steps
        * torchrun_numbers()[2],
        "fingerprint of model_name_or_path": fingerprint(*weights.values()),
        "fingerprint of train_dataset_path": fingerprint(state, f"{sizes} {len(data.train)}"),
        "fingerprint of coords_dataset_path": fingerprint(f"{data.xyz.tolist()}")}

def run_training(args, model, trained, data, num_recordings, batch_loss, validate):
    """`train` of Part I, and around it resuming, progress, validation and checkpoints. trained: the
    part of the model that batch_loss(trained, samples, step) -> scalar trains; validate() ->
    {score: value}. Returns on rank 0 alone; the other processes end."""
    rank, _, num_processes = torchrun_numbers()
    folder, device = Path(args.output_dir), data.xyz.device
    training = TrainingConfig(**settings_of(TrainingConfig, args))
    optimizers, identity = make_optimizers(model), identity_of(args, model, data)
    windows_per_step = identity["windows per step"]
    num_steps = args.max_steps or math.ceil(
        args.num_train_epochs * num_recordings / windows_per_step)
    first_step, metrics, losses = 0, [], []             # losses: since the last line of metrics
    state = on_rank_0(prepare_folder, args)             # other machines may not see the folder
    if state:
        with input_errors(f"{folder / 'training_state.pt'} cannot be resumed: {FROM_SCRATCH}"):
            for name, value in identity.items():
                was = state["identity"][name]
                if was != value:
                    raise InputError(f"{folder}: {name} was {was}, is now {value}: {FROM_SCRATCH}")
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            first_step, metrics, losses = state["step"], state["metrics"], state["losses"]
        if num_steps < first_step:
            raise InputError(f"--max_steps {num_steps}: {folder} has {first_step} steps already")
        print(f"resuming {folder} after step {first_step} of {num_steps}")
        if num_steps != state["num_steps"]:
            print(f"note: the learning rate now decays over {num_steps} steps instead of "
                  f"{state['num_steps']}")
    elif num_steps * windows_per_step < 100:
        print(f"note: {num_steps} steps are too few to learn much: raise --max_steps")

    def loss_in_context(trained, samples, step):
        with data.autocast():
            return batch_loss(trained, samples, step)

    def save(step):
        if rank == 0:                           # first the one file that a run resumes from
            write_atomically(folder / "training_state.pt", {
                "identity": identity, "step": step, "num_steps": num_steps, "metrics": metrics,
                "losses": losses, "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
            write_atomically(folder / "args.json", to_json(vars(args), indent=2))
            parcels = dict(zip("XYZ", data.xyz.T.tolist())) | {"Network": data.networks}
            write_atomically(folder / "coordinates.json", to_json(parcels))
            write_atomically(folder / "metrics.jsonl", "".join(metrics))
            model.save_pretrained(folder)

    save(first_step)                            # from here on the folder can be loaded
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {windows_per_step} "
          f"windows per step, {num_processes} x {device.type}")
    getattr(model, "backbone", model).gradient_checkpointing = args.gradient_checkpointing
    if num_processes > 1:
        trained = nn.parallel.DistributedDataParallel(trained)
    started = time.monotonic()
    for step, loss in train(trained, optimizers, loss_in_context, training, num_steps, first_step,
                            rank, num_processes):
        if rank == 0 and step > first_step and args.eval_steps and step % args.eval_steps == 0:
            row = validate()
            print("  validation  " + "  ".join(f"{name} {row[name]:.4f}" for name in row))
            metrics.append(to_json({"step": step, **row}))
        if step > first_step and step % args.save_steps == 0:
            save(step)
        loss = torch.tensor(loss, dtype=torch.float64) / num_processes
        if num_processes > 1:
            dist.all_reduce(loss)
        losses.append(loss.item())
        done = step + 1
        if done % args.logging_steps == 0 or done == num_steps:
            mean, rate = sum(losses) / len(losses), optimizers[0].param_groups[0]["lr"]
            speed = (done - first_step) / (time.monotonic() - started)
            print(f"step {done}/{num_steps}  loss {mean:.4f}  lr {rate:.2e}  "
                  f"{speed * windows_per_step:.1f} windows/s  "
                  f"{(num_steps - done) / speed / 60:.1f} min left", flush=True)
            metrics.append(to_json({"step": done, "loss": mean, "learning_rate": rate}))
            losses.clear()
    save(num_steps)
    leave_to_rank_0()

def report(args, folder, tables):
    """Print the tables, then write evaluation.json."""
    print(markdown(tables), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    if tables:                                  # none if no recording has a target
        content = to_json({"args": vars(args), "tables": tables}, indent=2)
        write_atomically(folder / "evaluation.json", content)

def write_model_card(folder, model, dataset, tables):
    """The README.md of a run folder, which the Hub shows. It lists no path and no participant."""
    name = type(model).__name__
    write_atomically(folder / "README.md", f"""---
tags: [fmri, brainlm]
---
# {name}

Trained on {len(dataset)} recordings of {dataset.num_parcels} parcels (`{dataset.recording_col}`).
{markdown(tables)}

`brainlm.{name}.from_pretrained` loads this folder; coordinates.json holds its parcels.
The method: https://openreview.net/forum?id=RwI7ZEfR27
""")
    print(f"\nthe model is in {folder}")

def write_predictions(folder, dataset, prediction):
    """predictions.csv: for each recording its row, the other columns of the dataset, the
    prediction. If the dataset has a column of one of these names, both become brainlm_..."""
    others = dataset.table.drop_columns(dataset.recording_col)
    row, name = "row", "prediction"
    if {row, name} & {*others.column_names}:
        row, name = "brainlm_row", "brainlm_prediction"
    with input_errors(f"{dataset.path}: a column cannot be written as text, leave it out"):
        columns = [column.to_pylist() for column in others.columns]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([row, *others.column_names, name])
    writer.writerows(zip(range(len(dataset)), *columns, prediction))
    write_atomically(folder / "predictions.csv", text.getvalue())
    print(f"predictions in {folder / 'predictions.csv'}")

# 16. Commands -------------------------------------------------------------------------------------

def pretrain(args):
    """Learn to reconstruct masked patches."""
    torch.manual_seed(args.seed)
    settings = settings_of(BrainLMConfig, args)
    if args.model_name_or_path:
        model = BrainLM.from_pretrained(args.model_name_or_path, **settings)
    else:
        model = BrainLM(BrainLMConfig(**settings))
    config = model.config
    data = open_data(args, config.num_timepoints_per_voxel)
    model.to(data.xyz.device).cls_token.requires_grad_(False)   # nothing attends to CLS
    random_mask(1, 1, len(data.xyz), config.mask_ratio)         # InputError if it masks nothing

    def batch_loss(model, samples, step):
        return pretraining_loss(model, data.train, data.xyz, config, args.seed, samples, step)

    def validate():
        signal, masks = reconstruction_tasks(data.val, config, MAX_WINDOWS_WHILE_TRAINING)
        method = reconstruction_of(model, data)
        return {f"{task}_R2": reconstruction_scores(method, signal, data.xyz, masks[task])["R2"]
                for task in masks}

    run_training(args, model, model, data, len(data.train), batch_loss, validate)
    folder = Path(args.output_dir)
    tables = evaluate_reconstruction(model, data) | evaluate_networks(model, data)
    report(args, folder, tables)
    write_model_card(folder, model, data.train, tables)

def finetune(args):
    """Learn to predict a number, such as age, from each recording."""
    column = args.variable_of_interest_col_name
    backbone = BrainLM.from_pretrained(args.model_name_or_path, **settings_of(BrainLMConfig, args))
    T = backbone.config.num_timepoints_per_voxel
    data = open_data(args, T)
    val_target = read_target(data.val, column, min_values=1)
    target = read_target(data.train, column, min_values=2)
    rows = np.flatnonzero(~np.isnan(target))
    mean, std = target[rows].mean(), target[rows].std()

    torch.manual_seed(args.seed)
    model = BrainLMRegressor(backbone.config, mean, std)
    model.backbone = backbone.requires_grad_(not args.freeze_backbone)
    model.to(data.xyz.device)
    backbone.head.requires_grad_(False)         # it is unused, as is the mask
    backbone.mask_token.requires_grad_(False)
    features_of, chosen = partial(recording_features, model, data), evenly(rows, MAX_BASELINE_ROWS)
    if args.freeze_backbone:                    # features never change: compute them once
        features_of, chosen = cache(features_of), rows
    print(f"computing features of {len(chosen)} training recordings", flush=True)
    of_recordings = [features_of(data.train, row) for row in chosen]         # [windows, 3H] each
    features = torch.cat(of_recordings).to(data.xyz.device)
    model.feature_mean.copy_(features.mean(dim=0))
    model.feature_std.copy_(features.std(dim=0).nan_to_num(1.0).clamp(min=1e-6))

    # With a frozen backbone the MLP alone is trained, on standardised features and targets.
    features = (features - model.feature_mean) / model.feature_std           # [all windows, 3H]
    targets = np.repeat((target[chosen] - mean) / std, [len(each) for each in of_recordings])
    targets = torch.tensor(targets, dtype=torch.float32, device=data.xyz.device)     # [all windows]

    def mlp_loss(mlp, samples, step):
        windows = [shuffled_index(n, len(features), args.seed) for n in samples]
        return regression_loss(mlp(features[windows]).squeeze(1), targets[windows], 1.0)

    def loss(model, samples, step):
        windows = [data.train.training_window(n, rows, T, args.seed) for n in samples]
        targets = torch.tensor([target[row] for row, _ in windows], dtype=torch.float32)
        prediction = model(data.train.batch(windows, T), data.xyz)
        return regression_loss(prediction, targets.to(data.xyz.device), std)

    def validate():
        some = evenly(np.flatnonzero(~np.isnan(val_target)), MAX_WINDOWS_WHILE_TRAINING)
        prediction = predict_recordings(model, [features_of(data.val, row) for row in some])
        return regression_scores(prediction, val_target[some])

    trained, batch_loss = (model.mlp, mlp_loss) if args.freeze_backbone else (model, loss)
    run_training(args, model, trained, data, len(rows), batch_loss, validate)
    folder = Path(args.output_dir)
    prediction, tables = evaluate_regression(model, data, features_of, column, target, val_target)
    report(args, folder, tables)
    write_predictions(folder, data.val, prediction)
    write_model_card(folder, model, data.train, tables)

def evaluate(args):
    """Score a model on any dataset next to baselines, without training."""
    name = args.model_name_or_path
    source = model_folder(name)                 # or, of a model on the Hub, the cache of downloads
    run = source if Path(name).is_dir() else Path("runs", name)
    folder = Path(args.output_dir or run / "evaluate")
    if (folder / "training_state.pt").exists() or folder.resolve() == source.resolve():
        raise InputError(f"--output_dir {folder} would be overwritten: choose another")
    model = load_model(source, **settings_of(BrainLMConfig, args))
    data = open_data(args, model.config.num_timepoints_per_voxel)
    leave_to_rank_0()
    model.to(data.xyz.device)
    if not data.train:
        print("note: without --train_dataset_path there are no baselines")
    if isinstance(model, BrainLM):
        report(args, folder, evaluate_reconstruction(model, data) | evaluate_networks(model, data))
    else:
        column = args.variable_of_interest_col_name
        if column is None:
            file, flag = source / "args.json", "variable_of_interest_col_name"
            with input_errors(f"{file} names no target: pass --{flag}"):
                column = json.loads(file.read_text(encoding="utf-8"))[flag]
        target = val_target = np.full(len(data.val), np.nan)
        if column in data.val.table.column_names:
            val_target = read_target(data.val, column, min_values=0)
        else:
            print(f"note: {data.val.path} has no column {column!r}: predictions are not scored")
        if data.train and not np.isnan(val_target).all():
            target = read_target(data.train, column, min_values=2)
        features_of = partial(recording_features, model, data)
        prediction, tables = evaluate_regression(
            model, data, features_of, column, target, val_target)
        report(args, folder, tables)
        write_predictions(folder, data.val, prediction)
    print(f"\nresults in {folder}; pictures of them: python benchmarks/pictures.py {folder}")

def settings_of(config_class, args):
    """The flags that are fields of a config class, {name: value}."""
    return {option.name: getattr(args, option.name) for option in fields(config_class)
            if getattr(args, option.name, None) is not None}

SAMPLE_DATA = {"train_dataset_path": "./sample_data/train",
               "val_dataset_path": "./sample_data/val",
               "coords_dataset_path": "./sample_data/coords"}

class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} ({self.prog} --help lists the flags)")

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):                 # a default of None would say nothing
        return action.help if action.default is None else super()._get_help_string(action)

def number(kind, lowest, highest=10 ** 18):
    """An argparse type: an int or a float from lowest to highest."""
    def convert(text):
        if not lowest <= kind(text) <= highest:
            raise argparse.ArgumentTypeError(f"must be from {lowest} to {highest:g} (got {text})")
        return kind(text)
    convert.__name__ = kind.__name__                    # argparse: invalid int value
    return convert

def add_fields(group, config_class):
    """A flag for each field of a config class; the comment behind the field is the help."""
    source = Path(__file__).read_text(encoding="utf-8") if "__file__" in globals() else ""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    types = {int: number(int, 1), float: number(float, 0, 1), str: str}
    for option in fields(config_class):
        kind = number(int, 0) if option.name == "seed" else types[option.type]
        default, text = option.default, comments.get(option.name, "")
        if config_class is BrainLMConfig:       # without the flag: as in model_name_or_path
            default, text = argparse.SUPPRESS, f"{text} (default: {default})"
        group.add_argument(f"--{option.name}", type=kind, default=default, help=text)

def command_line():
    parser = OneLineParser(
        prog="brainlm.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=(
            "BrainLM in one file. Without flags, on sample data (which pretrain makes):\n"
            "  python brainlm.py pretrain      learn to fill in and to forecast, some minutes\n"
            "  python brainlm.py finetune      then to predict age\n"
            "  python brainlm.py evaluate      scores of the pretrained model and of baselines\n"
            "Flags, for your own data: python brainlm.py COMMAND --help"))
    commands = parser.add_subparsers(dest="command")
    count = number(int, 1)
    for function in pretrain, finetune, evaluate:
        name = function.__name__
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__,
                                      formatter_class=HelpFormatter)
        group = command.add_argument_group(
            "paths", "pass all of them, or none to use ./sample_data and ./runs/pretrain")
        flag = group.add_argument
        flag("--train_dataset_path", help="training recordings")
        flag("--val_dataset_path", help="validation recordings")
        flag("--coords_dataset_path", help="the parcels' X, Y, Z in MNI mm")
        flag("--model_name_or_path", help="run folder, or user/name on the Hub, to start from")
        flag = command.add_argument_group("data, results and device").add_argument
        flag("--recording_col_name", default="Voxelwise_RobustScaler_Normalized_Recording",
             help="column of recordings (timepoints, parcels)")
        flag("--max_train_samples", type=count, help="use only this many training recordings")
        flag("--max_eval_samples", type=count, help="use only this many validation recordings")
        flag("--output_dir", default=None if name == "evaluate" else f"./runs/{name}",
             help="folder for the results; evaluate: by default a folder in the run's")
        flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
             help="auto: the fastest available")
        flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
             help="auto: bfloat16 on CUDA, float32 elsewhere")
        flag("--per_device_eval_batch_size", type=count, default=8,
             help="windows evaluated at once")
        group = command.add_argument_group("model")
        flag = group.add_argument
        if name == "pretrain":
            add_fields(group, BrainLMConfig)
        else:
            flag("--variable_of_interest_col_name", help="column of numbers to predict")
            flag("--num_timepoints_per_voxel", type=count,
                 help="timepoints in a window; by default as in pretraining")
        if name == "evaluate":
            continue
        group = command.add_argument_group("training")
        add_fields(group, TrainingConfig)
        flag = group.add_argument
        flag("--num_train_epochs", type=number(float, 0), default=16,
             help="epochs, each of one window per recording")
        flag("--max_steps", type=count, help="training steps, instead of epochs")
        flag("--logging_steps", type=count, default=10, help="steps between lines of progress")
        flag("--eval_steps", type=number(int, 0), default=200,
             help="steps between validations; 0: only at the end")
        flag("--save_steps", type=count, default=50, help="steps between checkpoints")
        flag("--overwrite_output_dir", action="store_true", help="start from scratch")
        flag("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
        if name == "finetune":
            flag("--freeze_backbone", action=argparse.BooleanOptionalAction, default=True,
                 help="train the MLP head alone")
            command.set_defaults(variable_of_interest_col_name="Age.At.MHQ", num_train_epochs=32,
                                 per_device_train_batch_size=8, eval_steps=100)
    return parser

def parse(arguments=None):
    """The flags of a command. Either all paths are given or none, since the user's recordings might
    by chance fit the coordinates or the model of the sample data."""
    parser = command_line()
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        sys.exit(2)
    for name in "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE":
        if torchrun_numbers()[2] == 1 and int(os.environ.get(name, 1)) > 1:
            raise InputError(f"{name} is {os.environ[name]}, but every process would train alike: "
                             "start one torchrun --nproc_per_node=GPUS brainlm.py ... per machine")
    paths = dict(SAMPLE_DATA)
    if args.command != "pretrain":
        paths["model_name_or_path"] = "./runs/pretrain"
    missing = [name for name in paths if getattr(args, name) is None]
    if len(missing) == len(paths):
        vars(args).update(paths)
    elif missing and (args.command, missing) != ("evaluate", ["train_dataset_path"]):
        raise InputError(f"Also pass --{' and --'.join(missing)}, or no path for the sample data")
    for name in *paths, "output_dir":
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    return args

def main(arguments=None):
    local_rank = 0
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):              # a console may lack letters of a column
            stream.reconfigure(errors="replace")
    try:
        rank, local_rank, _ = torchrun_numbers()
        if rank > 0:
            sys.stdout = open(os.devnull, "w")          # rank 0 prints for all
        args = parse(arguments)
        {"pretrain": pretrain, "finetune": finetune, "evaluate": evaluate}[args.command](args)
    except (InputError, OSError) as error:              # OSError: a folder that cannot be written
        if local_rank == 0:                             # one line for each machine
            print("error:", textwrap.shorten(str(error), 500, placeholder=" ..."), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)                                   # as shells expect after Ctrl-C

# 17. The Hugging Face Hub: what AutoModel and Trainer use -----------------------------------------

if sys.modules.get("transformers"):             # as where the Hub loads this file
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import MaskedLMOutput

    class BrainLMHubConfig(PretrainedConfig):
        model_type, keys_to_ignore_at_inference = "brainlm", ["hidden_states"]

        def __init__(self, model_class="BrainLM", **settings):
            ours = BrainLMConfig(**settings_of(BrainLMConfig, argparse.Namespace(**settings)))
            super().__init__(model_class=model_class, **settings | asdict(ours))

    class BrainLMHubModel(PreTrainedModel):
        """What AutoModel loads and Trainer trains; `model` is the BrainLM or BrainLMRegressor."""
        config_class, base_model_prefix, main_input_name = BrainLMHubConfig, "model", "signal"
        supports_gradient_checkpointing = _supports_sdpa = True
        accepts_loss_kwargs = False             # Trainer divides by the accumulation steps

        def __init__(self, config):
            super().__init__(config)
            self.model = self.new_model()
            self.post_init()

        def new_model(self):
            """A new model; loading keeps these types: parameters the default, buffers float32."""
            config = BrainLMConfig(**settings_of(BrainLMConfig, self.config))
            dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)      # the initialisation needs an inverse
            model = MODELS[self.config.model_class](config)
            torch.set_default_dtype(dtype)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
            return model

        def initialize_weights(self):
            """Weights that a checkpoint lacks become those of a new model."""
            tensors = self.model.state_dict(keep_vars=True)
            missing = [name for name, tensor in tensors.items()
                       if not getattr(tensor, "_is_hf_initialized", False)]
            new = self.new_model().state_dict() if missing else {}
            for name in missing:
                tensors[name].data.copy_(new[name])

        def forward(self, signal, xyz, mask=None, labels=None, return_dict=None, **others):
            """xyz [V, 3] or, for what splits batches, the same B times. labels add a loss: the
            signal itself, over masked tokens (without a mask, drawn as in pretraining); for a
            regressor the target, [B]. others: what pipelines and Trainer also pass."""
            loss = states = None
            xyz = xyz.reshape(-1, *xyz.shape[-2:])                       # [B or 1, V, 3]
            if (xyz != xyz[:1]).any():
                raise InputError("xyz [B, V, 3]: a batch must be of one atlas")
            if isinstance(self.model, BrainLMRegressor):
                prediction = self.model(signal, xyz[0])                              # [B]
                if labels is not None:
                    loss = regression_loss(prediction, labels.flatten(), self.model.target_std)
            else:
                if mask is None and labels is not None:     # in evaluation always the same masks
                    seed = int(torch.randint(2 ** 31, ())) if self.training else 0
                    N = signal.shape[1] // self.config.timepoint_patching_size
                    mask = torch.cat([training_mask(
                        N, len(xyz[0]), self.config.mask_ratio, self.config.forward_mask_prob,
                        seeded_generator(seed, "mask", i)) for i in range(len(signal))])
                prediction, states = self.model(signal, xyz[0], mask)    # [B, T, V], [B, S, H]
                if labels is not None:
                    loss = reconstruction_loss(prediction, labels, mask, self.config.loss_fn)
            output = MaskedLMOutput(loss=loss, logits=prediction, hidden_states=states)
            return output.to_tuple() if return_dict is False else output

if __name__ == "__main__" and "__file__" in globals():  # not in a notebook cell
    main()
