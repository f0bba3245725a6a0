"""What each choice of the recipe is worth: the model is trained with one of them changed at a time.

    python benchmarks/ablations.py                                          # every row, seed 0
    python benchmarks/ablations.py --only "4 heads" --seeds 0 1 2        # and the recipe
    python benchmarks/ablations.py --threads 1 --part 1/2                   # half of the runs, and
    python benchmarks/ablations.py --threads 1 --part 2/2                   # the others beside it
    python benchmarks/ablations.py --table                                  # of what there is

Scores are R2 on the sample data's validation recordings, and on HCP training subjects 0 and 3: each
of the two is left out in turn, and the model is trained on the other four. Results are appended to
a file, and runs that are in it are not repeated: after a change of Part I pass another --results.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import brainlm
import hcp
import sample_data

SOURCES = {"sample": {"steps": 800, "subjects": [None]}, "hcp": {"steps": 1000, "subjects": [0, 3]}}
MEASURES = "masked", "forecast", "horizon 1"
RECIPE = "the recipe"

# What replaces a name of Part I -------------------------------------------------------------------

class LinearOnXyz(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.linear = nn.Linear(3, hidden_size)

    def forward(self, xyz):
        return self.linear(xyz / 50)            # mm; now about as large as the recipe's

def slower_sinusoid(N, hidden_size, device=None):
    step = torch.arange(N, device=device)[:, None]
    angles = step * 10000.0 ** (-torch.arange(0, hidden_size, 2, device=device) / hidden_size)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)

class PositionsOnlyAdded(brainlm.Layer):
    def queries_keys_values(self, x, position):
        return super().queries_keys_values(x, torch.zeros_like(position))

class PositionsOnlyInQueries(brainlm.BrainLM):
    def tokens(self, signal, xyz, mask=None):
        tokens, position = super().tokens(signal, xyz, mask)
        spatial, temporal = position.chunk(2, dim=1)
        return tokens - spatial - temporal, position

class VisiblePast(brainlm.BrainLM):
    """Of earlier time steps, a token attends to the visible tokens alone."""
    may_attend = None                           # of the latest batch: bool [B, 1, S, S]

    def forward(self, signal, xyz, mask=None):
        (B, T, V), P = signal.shape, self.config.timepoint_patching_size
        if mask is None:
            mask = torch.zeros(B, T // P, V, dtype=torch.bool)
        time_step = torch.arange(T // P).repeat_interleave(V)                    # [N * V]
        same = time_step[:, None] == time_step                                   # [N * V, N * V]
        allowed = brainlm.block_causal_mask(T // P, V).repeat(B, 1, 1, 1)        # [B, 1, S, S]
        allowed[:, :, 1:, 1:] &= same | ~mask.flatten(1)[:, None, None]
        VisiblePast.may_attend = allowed
        return super().forward(signal, xyz, mask)

def attention_with_mask(q, k, v, V):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=VisiblePast.may_attend)

def one_kind_of_mask(dataset, xyz, config, seed, samples, step, batch=brainlm.pretraining_batch):
    """A batch whose samples have all random masks, or all forecast masks."""
    coin = torch.rand((), generator=brainlm.seeded_generator(seed, "kind of mask", step))
    forward = float(coin < config.forward_mask_prob)
    config = dataclasses.replace(config, forward_mask_prob=forward)
    return batch(dataset, xyz, config, seed, samples, step)

def random_initialisation(model):               # all else is PyTorch's own already
    for token in model.cls_token, model.mask_token:
        nn.init.normal_(token, std=0.02)

def initialise_then(change, initialise=brainlm.initialise):
    """The recipe's initialisation, then change(model, own), where own is initialised at random."""
    @torch.no_grad()
    def initialise_and_change(model):
        own = copy.deepcopy(model)
        initialise(model)
        random_initialisation(own)
        change(model, own)
    return {"initialise": initialise_and_change}

def initialise_without(*names, part=lambda weight: weight):
    """As the recipe, but weights with one of these names, or a part of each, stay random."""
    def put_back(model, own):
        for (name, weight), of_own in zip(model.named_parameters(), own.parameters()):
            if any(each in name for each in names):
                part(weight).copy_(part(of_own))
    return initialise_then(put_back)

def same_time_step(model, own):
    """Keys of temporal heads carry their own time step, as those of spatial heads do."""
    for layer in model.layers:
        query, key = layer.position_qk.weight.chunk(2)                           # [H, 2 * H] each
        key.chunk(2, dim=1)[1].copy_(query.chunk(2, dim=1)[1])

def not_orthogonal(model, own):
    """Spatial encoding and [MASK] keep their part in the directions of a patch."""
    model.spatial_encoding.linear.weight.copy_(own.spatial_encoding.linear.weight)
    nn.init.normal_(model.mask_token, std=0.3)

def any_directions(model, own):
    """Patches are written along random directions, in which everything else has a part too."""
    not_orthogonal(model, own)
    turn = nn.init.orthogonal_(torch.empty(2 * [model.config.hidden_size]))
    for matrix in [model.patch_projection.weight, *(layer.out.weight for layer in model.layers)]:
        matrix.copy_(turn @ matrix)
    for matrix in [model.head.weight, *(layer.qkv.weight.chunk(3)[2] for layer in model.layers)]:
        matrix.copy_(matrix @ turn.T)

def simpler(model, own):
    """Keys of content, the MLP's last matrix and biases stay random."""
    for (name, weight), of_own in zip(model.named_parameters(), own.parameters()):
        if "down.weight" in name or "bias" in name:
            weight.copy_(of_own)
        if "qkv.weight" in name:
            weight.chunk(3)[1].copy_(of_own.chunk(3)[1])

def repeat_last_value(P):
    return torch.eye(P)[-1].expand(P, P)

def setting(config, **changes):
    return {config.__name__: partial(config, **changes)}

# A row: names of brainlm, and what replaces them while a model is trained and scored.
ROWS = {
    RECIPE: {},
    "LEFT_OUT 0, steps x .5": {"LEFT_OUT": 0.0},
    "LEFT_OUT 1/2": {"LEFT_OUT": 1 / 2},
    "LEFT_OUT .8": {"LEFT_OUT": 0.8},
    "one kind of mask per step": {"pretraining_batch": one_kind_of_mask},
    "attention to visible tokens of the past alone": {
        "BrainLM": VisiblePast, "block_causal_attention": attention_with_mask},
    "forward_mask_prob 0": setting(brainlm.BrainLMConfig, forward_mask_prob=0.0),
    "forward_mask_prob .2": setting(brainlm.BrainLMConfig, forward_mask_prob=0.2),
    "forward_mask_prob .5": setting(brainlm.BrainLMConfig, forward_mask_prob=0.5),
    "FORWARD_MASKED 0": {"FORWARD_MASKED": 0.0},
    "FORWARD_MASKED 1/2": {"FORWARD_MASKED": 1 / 2},
    "spatial encoding: Linear on xyz": {"SpatialEncoding": LinearOnXyz},
    "temporal encoding: base 10,000": {"temporal_encoding": slower_sinusoid},
    "positions only added": {"Layer": PositionsOnlyAdded},
    "positions only in queries and keys": {"BrainLM": PositionsOnlyInQueries},
    "4 heads": setting(brainlm.BrainLMConfig, num_attention_heads=4),
    "Adam alone": {"Muon": torch.optim.Adam},
    "learning_rate 7e-4": setting(brainlm.TrainingConfig, learning_rate=7e-4),
    "learning_rate 3e-3": setting(brainlm.TrainingConfig, learning_rate=3e-3),
    "no gradient clipping": {"MAX_GRADIENT_NORM": math.inf},
    "random initialisation": {"initialise": random_initialisation},
    "initialisation: no temporal heads": initialise_then(same_time_step) | {
        "TEMPORAL_HEAD": brainlm.SPATIAL_HEAD, "extrapolation": torch.eye,
        "HEAD_GAIN": brainlm.HEAD_GAIN / 2},
    "initialisation: temporal queries of 8 and 6": {"TEMPORAL_HEAD": (8.0, 6.0)},
    "initialisation: temporal keys of the same time step": initialise_then(same_time_step),
    "initialisation: extrapolation by the last value": {"extrapolation": repeat_last_value},
    "initialisation: four parts simpler": initialise_then(simpler) | {
        "extrapolation": repeat_last_value},
    "initialisation: nothing orthogonal": initialise_then(any_directions),
    "initialisation: [MASK] of .02": initialise_without("mask_token"),
    "initialisation: MLP not small": initialise_without("down.weight")}
HEAD_ROWS = {"CLS alone": [1, 0, 0], "mean alone": [0, 1, 0], "standard deviation alone": [0, 0, 1],
             "all three": [1, 1, 1]}

# Data, training, scores ---------------------------------------------------------------------------

@functools.cache
def open_data(folder, source, subject):
    """The brainlm.Data of a source, which is made if it is missing."""
    def missing(folder):
        return not Path(folder, "train", "state.json").exists()      # written last

    name, folder = sample_data.RECORDING_COL, Path(folder, source)
    if missing(folder) and source == "sample":
        sample_data.make_sample_data(folder)
    elif missing(folder):
        hcp.make_hcp_data(folder)
    xyz, networks = brainlm.read_coordinates(folder / "coords")
    if subject is not None:
        subjects = brainlm.RecordingDataset(folder / "train", name)
        folder = folder / f"no_{subject}"
        if missing(folder):
            left_out = subjects.window(subject)
            sample_data.write_dataset(folder / "val", {name: [
                left_out[i:i + 200] for i in range(0, len(left_out) - 199, 50)]})
            sample_data.write_dataset(folder / "train", {name: [
                subjects.window(row) for row in range(len(subjects)) if row != subject]})
    return brainlm.Data(xyz, networks, *(brainlm.RecordingDataset(folder / split, name)
                                         for split in ("train", "val")))

def pretrain(data, num_steps, seed):
    torch.manual_seed(seed)
    config, training = brainlm.BrainLMConfig(), brainlm.TrainingConfig(seed=seed)
    model = brainlm.BrainLM(config)
    model.cls_token.requires_grad_(False)       # nothing attends to CLS, so nothing trains it

    def batch_loss(model, samples, step):
        return brainlm.pretraining_loss(model, data.train, data.xyz, config, seed, samples, step)

    optimizers = brainlm.make_optimizers(model)
    for _ in brainlm.train(model, optimizers, batch_loss, training, num_steps):
        pass
    return model

def reconstruction_scores(model, data):
    """R2 of each of MEASURES, on the same windows and masks for every row."""
    signal, masks = brainlm.reconstruction_tasks(data.val, model.config, brainlm.MAX_WINDOWS)
    method = brainlm.reconstruction_of(model, data)
    scores = {task: brainlm.reconstruction_scores(method, signal, data.xyz, masks[task], [1])
              for task in masks}
    return {"masked": scores["masked"]["R2"], "forecast": scores["forecast"]["R2"],
            "horizon 1": scores["forecast"]["R2 at 1"]}

def age_scores(model, args, seed):
    """R2 of age for each of HEAD_ROWS, by `finetune`."""
    folder, known, result = Path(args.data_dir, f"age_{seed}"), {}, {}
    model.save_pretrained(folder / "backbone")
    command = ["finetune", f"--model_name_or_path={folder / 'backbone'}", f"--seed={seed}",
               f"--output_dir={folder / 'head'}", "--overwrite_output_dir", "--eval_steps=0",
               "--device=cpu", *([f"--max_steps={args.steps}"] if args.steps else [])]
    command += [f"--{split}_dataset_path={Path(args.data_dir, 'sample', split)}"
                for split in ("train", "val", "coords")]

    class Regressor(brainlm.BrainLMRegressor):
        def features(self, signal, xyz):
            key = hash(signal.numpy().tobytes())        # every row sees the same windows, whose
            if key not in known:                        # features are computed once
                known[key] = super().features(signal, xyz)
            return known[key] * torch.tensor(HEAD_ROWS[row]).repeat_interleave(
                self.config.hidden_size)                                         # [B, 3 * H]

    for row in HEAD_ROWS:
        with patch.object(brainlm, "BrainLMRegressor", Regressor):
            brainlm.main(command)
        content = json.loads((folder / "head" / "evaluation.json").read_text())
        (table,) = content["tables"].values()
        result[row] = table["BrainLM"]["R2"]
    return result

def steps_of(args, row, source):
    """The number of training steps. A row whose steps cost more takes fewer: LEFT_OUT 0 ends in
    ", steps x .5", and takes half of the recipe's."""
    factor = float(row.partition(", steps x ")[2] or 1)
    return round(factor * (args.steps or SOURCES[source]["steps"]))

def run(args, row, source, subject, seed, steps):
    """{measure: R2} of one run, and the seconds that a step of it took."""
    data, began = open_data(args.data_dir, source, subject), time.perf_counter()
    with contextlib.ExitStack() as stack:       # restores what was there
        for name, value in ROWS[row].items():
            stack.enter_context(patch.object(brainlm, name, value))
        try:
            model = pretrain(data, steps, seed)
        except brainlm.InputError as error:     # the loss is infinite: the table shows a dash
            return {"failed": str(error)}
        result = {"seconds a step": round((time.perf_counter() - began) / steps, 3)}
        result |= reconstruction_scores(model, data)
    if (row, source, seed) == (RECIPE, "sample", 0):
        result |= age_scores(model, args, seed)
    return result

# Results: a file of JSON lines --------------------------------------------------------------------

KEY = "row", "data", "subject", "seed", "steps"

def read_results(path):
    """{values of KEY: line}."""
    lines = map(json.loads, Path(path).read_text().splitlines()) if Path(path).exists() else []
    return {tuple(line[name] for name in KEY): line for line in lines}

def print_tables(args):
    results = read_results(args.results)

    def by_seed(row, source, measure):
        """{seed: mean over the subjects}, where all of them have been run."""
        subjects, steps = SOURCES[source]["subjects"], steps_of(args, row, source)
        found = {seed: [results.get((row, source, subject, seed, steps), {}).get(measure)
                        for subject in subjects] for seed in {key[3] for key in results}}
        return {seed: mean(found[seed]) for seed in found if None not in found[seed]}

    def cell(row, source, measure):
        values, recipe = by_seed(row, source, measure), by_seed(RECIPE, source, measure)
        text, shared = f"{mean(values.values()):.3f}" if values else "-", values.keys() & recipe
        if shared and row != RECIPE:
            text += f" {mean(values[seed] - recipe[seed] for seed in shared):+.3f}"
        if len(values) > 1:
            text += f" [{max(values.values()) - min(values.values()):.3f}]"
        return text

    columns = [(source, measure) for source in args.data for measure in MEASURES]
    print("\nR2, difference from the recipe on the same seeds, [largest less smallest of the seeds]"
          "\n\n| |", *(f"{source}: {measure} |" for source, measure in columns))
    print("| --- |" + " --- |" * len(columns))
    for row in args.only:
        cells = [cell(row, *column) for column in columns]
        if set(cells) != {"-"}:                 # else it has not been run
            print(f"| {row} |", *(f"{text} |" for text in cells))
    print("\n| the MLP head gets | R2 of age |\n| --- | --- |")
    for name in HEAD_ROWS:
        print(f"| {name} | {cell(RECIPE, 'sample', name)} |")

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="rows")
    flag("--data", nargs="+", choices=SOURCES, default=list(SOURCES))
    flag("--seeds", nargs="+", type=int, default=[0])
    flag("--steps", type=int, help="training steps, for both data sets")
    flag("--part", default="1/1", help="I/N: this process takes every N-th run, from the I-th on")
    flag("--threads", type=int, default=torch.get_num_threads(), help="threads of this process")
    flag("--data_dir", default="./runs/ablations")
    flag("--results", default="./runs/ablations/results.jsonl")
    flag("--table", action="store_true", help="only print the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)              # else long temporal queries take 4 times as long
    args.only = list(dict.fromkeys([RECIPE, *args.only]))
    runs = [(row, source, subject, seed, steps_of(args, row, source))
            for row in args.only for seed in args.seeds for source in args.data
            for subject in SOURCES[source]["subjects"]]
    first, every = map(int, args.part.split("/"))
    for key in [] if args.table else runs[first - 1::every]:
        if key not in read_results(args.results):       # read again: others write to it
            line = json.dumps(dict(zip(KEY, key)) | run(args, *key))
            Path(args.results).parent.mkdir(parents=True, exist_ok=True)
            with open(args.results, "a") as file:
                file.write(line + "\n")
            print(line, flush=True)
    print_tables(args)

if __name__ == "__main__":
    main()
