"""The pictures of the README, from a pretrained run that has been evaluated (needs matplotlib):

    python benchmarks/pictures.py runs/hcp
"""

import json
import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from brainlm import block_causal_mask


def mask_picture(path, N=4, V=3):
    figure, axis = plt.subplots(figsize=(4.6, 4.6), layout="constrained")
    axis.imshow(block_causal_mask(N, V), cmap="Blues", vmin=0, vmax=1.4)
    names = ["CLS"] + [f"t{t} p{v}" for t in range(N) for v in range(V)]
    axis.set(title="who reads (rows) whom (columns): blue", xticks=range(len(names)), yticks=range(len(names)))
    axis.set_xticklabels(names, rotation=90)
    axis.set_yticklabels(names)
    figure.savefig(path, dpi=110)


def training_picture(path, run):
    """Loss and validation R2 by step, and where the baselines of the run's last table stand."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(*zip(*[(line["step"], line["loss"]) for line in lines if "loss" in line]), color="C3")
    left.set(title="training loss (random and forward masks)", xlabel="step", ylabel="MSE on hidden tokens")
    tables = list(next(line["tables"] for line in reversed(lines) if "tables" in line).values())
    for metric, name, table, color in (("masked_R2", "masked patches", tables[0], "C3"),
                                       ("forecast_R2", "forecast", tables[1], "C0")):
        points = [(line["step"], line[metric]) for line in lines if metric in line]
        points.append((lines[-1]["step"], table["BrainLM"]["R2"]))
        right.plot(*zip(*points), "o-", color=color, label=f"BrainLM, {name}")
        rival = max((row["R2"], method) for method, row in table.items() if method != "BrainLM")
        right.axhline(rival[0], color=color, linestyle="--", label=rival[1])
    right.set(title="validation R2", xlabel="step")
    right.legend()
    figure.savefig(path, dpi=110)


run, assets = Path(sys.argv[1]), ROOT / "assets"
assets.mkdir(exist_ok=True)
mask_picture(assets / "mask.png")
training_picture(assets / "training.png", run)
shutil.copy(run / "evaluation.png", assets / "evaluation.png")
