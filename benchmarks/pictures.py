"""The pictures of the README (needs matplotlib):

    python benchmarks/pictures.py              # the architecture and the mask
    python benchmarks/pictures.py runs/hcp runs/pretrain    # and those of two runs that have been evaluated
"""

import json
import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from brainlm import block_causal_mask

WHAT, WHERE, WHEN, HIDDEN, CLS = "#4c8fc4", "#6fb06f", "#e3a44b", "#c9c9c9", "#b07cc0"
INK, BOX = "0.2", "#f2f4f7"


def architecture_picture(path):
    """From a recording to its reconstruction and to a prediction, with 3 parcels and 4 patches."""
    figure = plt.figure(figsize=(12.4, 6.0))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 124), ylim=(0, 60))
    axis.axis("off")
    V, N, P = 3, 4, 20
    random = np.random.default_rng(3)
    hidden = np.array([[1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]], dtype=bool)       # [V, N]
    signal = np.zeros((V, N * P))
    for t in range(1, N * P):
        signal[:, t] = 0.93 * signal[:, t - 1] + random.standard_normal(V)
    signal /= 4 * signal.std(axis=1, keepdims=True)

    def text(x, y, words, **style):
        axis.text(x, y, words, **dict(ha="center", va="center", color=INK, fontsize=10) | style)

    def square(x, y, color, width=1.5, height=1.8):
        axis.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", lw=1))

    def box(x, y, width, height, words, color=BOX, **style):
        axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.8",
                                      facecolor=color, edgecolor="0.6"))
        text(x + width / 2, y + height / 2, words, **style)

    def arrow(start, end, **style):
        axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="0.4",
                                       shrinkA=0, shrinkB=0, **style))

    def curves(x, y, drawn, known):
        """A line for each parcel, cut into patches; the patches not in `known` are grey, in `drawn` red."""
        for v in range(V):
            for n in range(N):
                left, bottom = x + 6 * n, y - 5.5 * v
                axis.add_patch(Rectangle((left, bottom - 2.2), 5.7, 4.4, facecolor="white" if known[v, n] else "0.9",
                                         edgecolor="0.7", lw=0.8))
                if known[v, n] or drawn:
                    axis.plot(left + np.linspace(0.2, 5.5, P), bottom + np.clip(
                        1.6 * signal[v, n * P:(n + 1) * P] * (1 if known[v, n] else 0.75), -2, 2),
                        color=WHAT if known[v, n] else "#c8443c", lw=1.2)

    # The recording
    text(14, 57, "recording, cut into patches", weight="bold")
    curves(2, 50, drawn=False, known=~hidden)
    for v in range(V):
        text(1.2, 50 - 5.5 * v, f"p{v}", fontsize=8)
    for n in range(N):
        text(4.9 + 6 * n, 35.2, f"t{n}", fontsize=8)
    text(14, 32.4, "BOLD over time, a row a parcel;\ngrey patches are hidden", fontsize=8.5, color="0.4")

    # A token
    arrow((26.5, 44.5), (32, 44.5))
    text(46.5, 57, "a token is a sum", weight="bold")
    for y, color, name, source in ((49.6, WHAT, "what", "Linear(patch), or [MASK]"),
                                   (44.1, WHERE, "where", "Linear(waves of x, y, z)"),
                                   (38.6, WHEN, "when", "sinusoid of the patch's place")):
        box(33, y, 8, 4, name, color)
        text(42.3, y + 2, source, ha="left", fontsize=8.5)
    text(37, 48.8, "+", fontsize=9)
    text(37, 43.3, "+", fontsize=9)

    # The sequence
    arrow((63.5, 44.1), (69, 44.1))
    text(94.5, 57, "the sequence: CLS, then all parcels of t0, of t1, ...", weight="bold")
    square(70, 43.6, CLS, 3.2)
    text(71.6, 47.2, "CLS", fontsize=8)
    for n in range(N):
        for v in range(V):
            square(75 + 12 * n + 3.5 * v, 43.6, HIDDEN if hidden[v, n] else WHAT, 3.2)
            square(75 + 12 * n + 3.5 * v, 41.9, WHERE, 3.2, 1.4)
            square(75 + 12 * n + 3.5 * v, 40.6, WHEN, 3.2, 1.0)
            text(76.6 + 12 * n + 3.5 * v, 47.2, f"p{v}", fontsize=8)
        text(80.2 + 12 * n, 50.2, f"t{n}", fontsize=9)
        axis.plot([75 + 12 * n, 85.2 + 12 * n], [48.8, 48.8], color="0.6", lw=1)

    # The layers
    arrow((98, 39.8), (98, 33.5))
    text(74.6, 38.4, "grey: hidden, its what is [MASK]", ha="left", fontsize=8.5, color="0.4")
    axis.add_patch(FancyBboxPatch((68, 5), 54, 28, boxstyle="round,pad=0,rounding_size=1", facecolor=BOX,
                                  edgecolor="0.6"))
    text(95, 30.6, "layers, one after the other", weight="bold")
    box(94.5, 20.6, 25, 6.6, "attention\nwho reads whom: the mask", "white", fontsize=9)
    box(94.5, 9.6, 25, 5, "MLP, each token by itself", "white", fontsize=9)
    arrow((107, 20.5), (107, 14.8))
    text(94.5, 28.2, "where and when enter each layer anew", ha="left", fontsize=7.5, color="0.4")
    mask = figure.add_axes((0.583, 0.125, 0.155, 0.336))
    mask.imshow(block_causal_mask(N, V), cmap="Blues", vmin=0, vmax=1.4)
    mask.set(xticks=[0, 2, 5, 8, 11], yticks=[0, 2, 5, 8, 11])
    mask.set_xticklabels(["CLS"] + [f"t{n}" for n in range(N)], fontsize=7)
    mask.set_yticklabels(["CLS"] + [f"t{n}" for n in range(N)], fontsize=7)
    mask.tick_params(length=0)

    # The two heads
    arrow((67.5, 21), (62, 21))
    box(49.5, 18.5, 12, 5, "head: Linear", fontsize=9)
    arrow((49, 21), (28, 21))
    text(38.5, 22.3, "parcel tokens to patches", fontsize=8.5)
    text(14, 28.6, "reconstruction", weight="bold")
    curves(2, 24.6, drawn=True, known=~hidden)
    text(14, 9.6, "red: the loss counts hidden patches alone", fontsize=8.5, color="0.4")
    arrow((67.5, 8), (62, 6))
    box(37, 3, 24.5, 5.6, "CLS, mean and spread of the\nparcel tokens: MLP", fontsize=9)
    arrow((36.5, 5.8), (28, 5.8))
    text(14, 5.8, "age, a clinical score, ...", weight="bold")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def mask_picture(path, N=4, V=3):
    figure, axis = plt.subplots(figsize=(4.6, 4.6), layout="constrained")
    axis.imshow(block_causal_mask(N, V), cmap="Blues", vmin=0, vmax=1.4)
    names = ["CLS"] + [f"t{t} p{v}" for t in range(N) for v in range(V)]
    axis.set(title="who reads (rows) whom (columns): blue", xticks=range(len(names)), yticks=range(len(names)))
    axis.set_xticklabels(names, rotation=90)
    axis.set_yticklabels(names)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    plt.close(figure)


def main():
    assets = ROOT / "assets"
    assets.mkdir(exist_ok=True)
    architecture_picture(assets / "architecture.png")
    mask_picture(assets / "mask.png")
    if len(sys.argv) > 1:
        real, sample = map(Path, sys.argv[1:])
        training_picture(assets / "training.png", real)
        shutil.copy(real / "evaluation.png", assets / "evaluation.png")
        networks = Image.open(sample / "networks.png").convert("RGB")
        networks.quantize(256, Image.Quantize.MAXCOVERAGE).save(assets / "networks.png", optimize=True)


if __name__ == "__main__":
    main()
