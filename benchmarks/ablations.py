"""What each choice of the recipe is worth: the model is trained with one of them changed at a time.

    python benchmarks/ablations.py                                          # every row, seed 0
    python benchmarks/ablations.py --only "4 heads" --seeds 0 1 2        # and the recipe
    python benchmarks/ablations.py --threads 1 --share 1/2                  # half of the runs, and
    python benchmarks/ablations.py --threads 1 --share 2/2                  # the others beside it
    python benchmarks/ablations.py --table                                  # of what there is

Scores are R2 on the sample data's validation recordings, and on HCP training subjects 0 and 3, each
left out: there the model learns from surrogates of the other four. Results go to a file as they
come, and what is in it is not run again: after a change of Part I name another one.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import brainlm
import hcp
import sample_data

SOURCES = {"sample": {"steps": 400, "subjects": [None]}, "hcp": {"steps": 500, "subjects": [0, 3]}}
MEASURES = "masked", "forecast", "horizon 1"
RECIPE = "the recipe"

# What stands in the place of a name of Part I -----------------------------------------------------

class LinearOnXyz(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.linear = nn.Linear(3, hidden_size)

    def forward(self, xyz):
        return self.linear(xyz / 50)            # mm; so it is about as large as the recipe's

def slower_sinusoid(N, hidden_size, device=None):
    place = torch.arange(N, device=device)[:, None]
    angles = place * 10000.0 ** (-torch.arange(0, hidden_size, 2, device=device) / hidden_size)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)

class PositionsOnlyAdded(brainlm.Layer):
    def queries_keys_values(self, x, position):
        return super().queries_keys_values(x, torch.zeros_like(position))

class PositionsOnlyInQueries(brainlm.BrainLM):
    def tokens(self, signal, xyz, mask=None):
        tokens, position = super().tokens(signal, xyz, mask)
        where, when = position.chunk(2, dim=1)
        return tokens - where - when, position

def random_start(model):                        # all else is PyTorch's own already
    for token in model.cls_token, model.mask_token:
        nn.init.normal_(token, std=0.02)

def start_then(change, initial_weights=brainlm.initial_weights):
    """The recipe's start, then change(model, own), where own has the random start."""
    @torch.no_grad()
    def start(model):
        own = copy.deepcopy(model)
        initial_weights(model)
        random_start(own)
        change(model, own)
    return {"initial_weights": start}

def start_without(*names, part=lambda weight: weight):
    """The start, but weights with one of the names in theirs, or a part of each, stay random."""
    def put_back(model, own):
        for (name, weight), of_own in zip(model.named_parameters(), own.parameters()):
            if any(each in name for each in names):
                part(weight).copy_(part(of_own))
    return start_then(put_back)

def same_patch(model, own):
    """Keys of temporal heads tell their own patch, as those of spatial heads do."""
    for layer in model.layers:
        query, key = layer.position_qk.weight.chunk(2)                           # [H, 2 * H] each
        key.chunk(2, dim=1)[1].copy_(query.chunk(2, dim=1)[1])

def where_and_mask(model, own):
    """They keep their part in the directions of a patch."""
    model.spatial_encoding.linear.weight.copy_(own.spatial_encoding.linear.weight)
    nn.init.normal_(model.mask_token, std=0.3)

def any_directions(model, own):
    """A patch is written along random directions: ones and the sinusoid have a part in them too."""
    where_and_mask(model, own)
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

def setting(config, **changes):
    return {config.__name__: partial(config, **changes)}

# A row: names of brainlm, and what they mean instead while it is trained and scored.
ROWS = {
    RECIPE: {},
    "where: Linear on xyz": {"SpatialEncoding": LinearOnXyz},
    "when: base 10,000": {"temporal_encoding": slower_sinusoid},
    "positions only added": {"Layer": PositionsOnlyAdded},
    "positions only in queries and keys": {"BrainLM": PositionsOnlyInQueries},
    "hidden tokens of the past read": {
        "visible_tokens": lambda mask, of=brainlm.visible_tokens: of(torch.zeros_like(mask))},
    "4 heads": setting(brainlm.BrainLMConfig, num_attention_heads=4),
    "forward_mask_prob 0": setting(brainlm.BrainLMConfig, forward_mask_prob=0.0),
    "forward_mask_prob .5": setting(brainlm.BrainLMConfig, forward_mask_prob=0.5),
    "FORWARD_HIDDEN 0": {"FORWARD_HIDDEN": 0.0},
    "Adam alone": {"Muon": torch.optim.Adam},
    "Adam alone, half the rate": {
        "Muon": torch.optim.Adam, **setting(brainlm.TrainingConfig, learning_rate=7e-4)},
    "learning_rate 7e-4": setting(brainlm.TrainingConfig, learning_rate=7e-4),
    "learning_rate 3e-3": setting(brainlm.TrainingConfig, learning_rate=3e-3),
    "no gradient clipping": {"MAX_GRADIENT_NORM": math.inf},
    "random start": {"initial_weights": random_start},
    "start: head and projection alone": start_without("layers.", "spatial_encoding.", "_token"),
    "start: no temporal heads": start_then(same_patch) | {           # all heads are of one kind
        "TEMPORAL_WHERE": brainlm.SPATIAL_WHERE, "TEMPORAL_WHEN": brainlm.SPATIAL_WHEN,
        "continuation": torch.eye, "GUESS": brainlm.GUESS / 2},
    "start: temporal queries of 8 and 6": {"TEMPORAL_WHERE": 8.0, "TEMPORAL_WHEN": 6.0},
    "start: content keys random": start_without(
        "qkv.weight", part=lambda weight: weight.chunk(3)[1]),
    "start: where in queries, keys random": start_without(
        "position_qk", part=lambda weight: weight.chunk(2, dim=1)[0]),
    "start: when in queries, keys random": start_without(
        "position_qk", part=lambda weight: weight.chunk(2, dim=1)[1]),
    "start: no keys of the next patch": start_then(same_patch),
    "start: values, out random": start_without(                     # the last H rows
        "qkv.weight", "out.weight", part=lambda weight: weight[-weight.shape[1]:]),
    "start: continuation by zeros": {"continuation": lambda P: torch.zeros(P, P)},
    "start: continuation by last value": {"continuation": lambda P: torch.eye(P)[-1].expand(P, P)},
    "start: four parts simpler": start_then(simpler) | {
        "continuation": lambda P: torch.eye(P)[-1].expand(P, P)},
    "start: where, [MASK] not turned away": start_then(where_and_mask),
    "start: nothing turned away": start_then(any_directions),
    "start: [MASK] of .02": start_without("mask_token"),
    "start: MLP not small": start_without("down.weight"),
    "start: biases random": start_without("bias")}
AGE_ROWS = {"CLS alone": [1, 0, 0], "mean alone": [0, 1, 0], "spread alone": [0, 0, 1],
            "all three": [1, 1, 1], "all three, not standardised": [1, 1, 1]}

# Data, training, scores ---------------------------------------------------------------------------

@functools.cache
def open_data(folder, source, subject):
    """The brainlm.Data of a source, which is made where it is missing."""
    def missing(folder):
        return not Path(folder, "train", "state.json").exists()      # is written last

    name, folder = sample_data.RECORDING_COL, Path(folder, source)
    if missing(folder) and source == "sample":
        sample_data.make_sample_data(folder)
    elif missing(folder):
        hcp.make_hcp_data(folder, num_surrogates=1, seed=0)
    xyz, networks = brainlm.read_coordinates(folder / "coords")
    if subject is not None:
        people, folder = brainlm.RecordingDataset(folder / "train", name), folder / f"no_{subject}"
        if missing(folder):
            others = [people.window(row) for row in range(len(people)) if row != subject]
            of_subject, rng = people.window(subject), np.random.default_rng(subject)
            sample_data.write_dataset(folder / "val", {name: [
                of_subject[i:i + 200] for i in range(0, len(of_subject) - 199, 50)]})
            sample_data.write_dataset(folder / "train", {name: [
                sample_data.surrogate(others, rng) for _ in range(200)]})
    return brainlm.Data(xyz, networks, *(brainlm.RecordingDataset(folder / split, name)
                                         for split in ("train", "val")))

def pretrain(data, num_steps, seed):
    torch.manual_seed(seed)
    config, training = brainlm.BrainLMConfig(), brainlm.TrainingConfig(seed=seed)
    model, B = brainlm.BrainLM(config), training.per_device_train_batch_size
    model.cls_token.requires_grad_(False)       # no parcel reads CLS: nothing trains it

    def batch_loss(model, step, i):
        signal, mask = brainlm.pretraining_batch(
            data.train, config, seed, range(step * B, (step + 1) * B), step)
        prediction, _ = model(signal, data.xyz, mask)
        return brainlm.reconstruction_loss(prediction, signal, mask, config.loss_fn)

    optimizers = brainlm.make_optimizers(model)
    for _ in brainlm.train(model, optimizers, batch_loss, training, num_steps):
        pass
    return model

def reconstruction_scores(model, data):
    """R2 of each of MEASURES, on the same windows and masks for every row."""
    result = {}
    for task, _, _, expected, target in brainlm.reconstructions(model, data, brainlm.MAX_WINDOWS):
        result[task] = brainlm.scores(expected, target)["R2"]
        if task == "forecast":
            result["horizon 1"] = brainlm.scores(expected[:, 0], target[:, 0])["R2"]
    return result

def age_scores(model, args, seed):
    """R2 of age for each of AGE_ROWS, by `finetune`."""
    folder, known, result = Path(args.data_dir, f"age_{seed}"), {}, {}
    model.save_pretrained(folder / "backbone")
    command = ["finetune", f"--model_name_or_path={folder / 'backbone'}", f"--seed={seed}",
               f"--output_dir={folder / 'head'}", "--overwrite_output_dir", "--eval_steps=0",
               "--device=cpu", *([f"--max_steps={args.steps}"] if args.steps else [])]
    command += [f"--{split}_dataset_path={Path(args.data_dir, 'sample', split)}"
                for split in ("train", "val", "coords")]

    class Regressor(brainlm.BrainLMRegressor):
        def features(self, signal, xyz):
            if "not standardised" in row:
                self.feature_mean.zero_()
                self.feature_std.fill_(1.0)
            key = hash(signal.numpy().tobytes())            # every row sees the same windows, and
            if key not in known:                            # their features need computing once
                known[key] = super().features(signal, xyz)
            return known[key] * torch.tensor(AGE_ROWS[row]).repeat_interleave(
                self.config.hidden_size)                                         # [B, 3 * H]

    for row in AGE_ROWS:
        with patch.object(brainlm, "BrainLMRegressor", Regressor):
            brainlm.main(command)
        content = json.loads((folder / "head" / "evaluation.json").read_text())
        (table,) = content["tables"].values()
        result[row] = table["BrainLM"]["R2"]
    return result

def run(args, row, source, subject, seed, steps):
    """{measure: R2} of one run, and the seconds that a step of it took."""
    data, began = open_data(args.data_dir, source, subject), time.perf_counter()
    with contextlib.ExitStack() as stack:       # puts back what was there
        for name, value in ROWS[row].items():
            stack.enter_context(patch.object(brainlm, name, value))
        try:
            model = pretrain(data, steps, seed)
        except brainlm.BadInput as error:       # the loss is infinite: the table shows a line
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
        """{seed: mean over the subjects}, where all of them are there."""
        subjects, steps = SOURCES[source]["subjects"], args.steps or SOURCES[source]["steps"]
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
    print("\n| the MLP head reads | R2 of age |\n| --- | --- |")
    for name in AGE_ROWS:
        print(f"| {name} | {cell(RECIPE, 'sample', name)} |")

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="of the table")
    flag("--data", nargs="+", choices=SOURCES, default=list(SOURCES))
    flag("--seeds", nargs="+", type=int, default=[0])
    flag("--steps", type=int, help="of training, in both data sets")
    flag("--share", default="1/1", help="I/N: this process takes every N-th run, from the I-th on")
    flag("--threads", type=int, default=torch.get_num_threads(), help="of this process")
    flag("--data_dir", default="./runs/ablations")
    flag("--results", default="./runs/ablations/results.jsonl")
    flag("--table", action="store_true", help="only print it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)              # else some starts, as 8 and 6, take 4 times as long
    args.only = list(dict.fromkeys([RECIPE, *args.only]))
    runs = [(row, source, subject, seed, args.steps or SOURCES[source]["steps"])
            for row in args.only for seed in args.seeds for source in args.data
            for subject in SOURCES[source]["subjects"]]
    first, every = map(int, args.share.split("/"))
    for key in [] if args.table else runs[first - 1::every]:
        if key not in read_results(args.results):       # read anew: others write into it too
            line = json.dumps(dict(zip(KEY, key)) | run(args, *key))
            Path(args.results).parent.mkdir(parents=True, exist_ok=True)
            with open(args.results, "a") as file:
                file.write(line + "\n")
            print(line, flush=True)
    print_tables(args)

if __name__ == "__main__":
    main()
