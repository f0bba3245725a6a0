"""The pictures of a run and those of the README (needs matplotlib and scikit-learn):

    python benchmarks/pictures.py RUN                       # into the run's folder
    python benchmarks/pictures.py                       # into assets: architecture, mask, people
    python benchmarks/pictures.py --readme RUN              # and what was drawn into a run's folder
"""

import argparse
import csv
import json
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import brainlm

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
    from PIL import Image
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import adjusted_rand_score
except ImportError as missing:
    sys.exit(f"error: {missing}: pip install matplotlib scikit-learn")

plt.rcParams.update({"font.size": 14, "text.parse_math": False})
# Told apart in grey as well: by darkness, width and markers.
OURS = {"color": "#a50f15", "linewidth": 2.5, "zorder": 3}
OTHERS = ({"color": "#4393c3", "marker": "s", "linestyle": "--"},
          {"color": "0.3", "marker": "^", "linestyle": ":"},
          {"color": "#e08214", "marker": "D", "linestyle": "-."})


def save(figure, path, dpi=110):
    figure.savefig(path, dpi=dpi, bbox_inches="tight")      # nothing cut off
    plt.close(figure)
    print(f"picture in {path}")


# Of a run -----------------------------------------------------------------------------------------

def run_pictures(run):
    """What the tables of a run say, by its model, evaluation.json and the data that this names."""
    with brainlm.refusing(f"{run} holds no evaluation.json of a run: brainlm.py evaluate makes it"):
        evaluation = json.loads((run / "evaluation.json").read_text())
        args, tables = argparse.Namespace(**evaluation["args"]), evaluation["tables"]
    # Where a model of the Hub was evaluated the folder holds the results alone.
    source = run if (run / "config.json").exists() else args.model_name_or_path
    settings = brainlm.settings_of(brainlm.BrainLMConfig, vars(args))    # of another window
    model = brainlm.from_pretrained(brainlm.nn.Module, source, **settings)
    if isinstance(model, brainlm.BrainLMRegressor):
        (title,) = tables                       # "Age.At.MHQ, 20 validation recordings"
        return predictions_picture(run / "predictions.png", run / "predictions.csv",
                                   title.rpartition(", ")[0])
    device, autocast = brainlm.prepare_device(args)
    xyz, networks = brainlm.open_coordinates(args.coords_dataset_path)
    recordings = brainlm.open_recordings(
        args.val_dataset_path, args.recording_col_name, model.config.num_timepoints_per_voxel,
        len(xyz), args.max_eval_samples)
    data = brainlm.Data(xyz.to(device), networks, train=None, val=recordings, autocast=autocast,
                        batch_size=args.per_device_eval_batch_size)
    model.to(device)
    evaluation_picture(run / "evaluation.png", model, data, tables)
    networks_picture(run / "networks.png", model, data)


def evaluation_picture(path, model, data, tables):
    """A window with hidden patches reconstructed, a forecast, and R2 by horizon."""
    T, P = model.config.num_timepoints_per_voxel, model.config.timepoint_patching_size
    tasks = list(brainlm.reconstructions(model, data, 1))               # of the first window
    forecasts = [table for title, table in tables.items() if title.startswith("forecasting")]
    widths = [1.7] + [1] * (len(tasks) + len(forecasts) - 1)
    figure, axes = plt.subplots(1, len(widths), width_ratios=widths, squeeze=False,
                                figsize=(16, 5.5), layout="constrained")
    for axis, (task, signal, mask, hidden_patches, _) in zip(axes[0], tasks):
        shown = np.arange(0 if task == "masked" else max(0, T - 3 * P), T)
        patches = brainlm.patchify(signal, P) * np.nan                       # [1, N, V, P]
        patches[mask] = brainlm.torch.from_numpy(hidden_patches)
        prediction = brainlm.unpatchify(patches)                             # [1, T, V]
        parcels = range(0, len(data.xyz), max(1, len(data.xyz) // 3))[:3]
        for i, parcel in enumerate(parcels):
            axis.plot(shown, signal[0, shown, parcel] - 4 * i, color="0.6", linewidth=1.2,
                      label=None if i else "truth")
            axis.plot(shown, prediction[0, shown, parcel] - 4 * i, **OURS,
                      label=None if i else f"BrainLM, {task}")
        axis.set_yticks([-4 * i for i in range(len(parcels))], parcels)
        axis.set(xlabel="time (timepoints)", ylabel="parcel (BOLD, 4 interquartile ranges apart)")
        axis.margins(x=0.02, y=0.15)            # room for the legend
        axis.legend(loc="upper left", ncols=2, fontsize=12)
    for table in forecasts:
        styles = OURS | {"marker": "o"}, *OTHERS        # BrainLM comes first
        for (name, row), style in zip(table.items(), styles, strict=True):
            horizons = [h for h in brainlm.HORIZONS if f"R2 at {h}" in row]
            R2 = np.array([row[f"R2 at {h}"] for h in horizons], dtype=float)
            axes[0, -1].plot(horizons, R2, **style, label=name)
        axes[0, -1].axhline(0, color="0.8", zorder=0)
        axes[0, -1].set(xlabel="horizon (timepoints)", ylabel="R2 of forecasts", ylim=(-0.5, 1))
        axes[0, -1].legend(loc="upper right", fontsize=12)
    save(figure, path)


def networks_picture(path, model, data):
    """Similarity and connectivity [V, V] with the parcels of a network side by side. Prints, of
    each kind of distance, how well as many clusters of parcels agree with the networks."""
    known = [name is not None for name in data.networks or []]
    labelled = np.flatnonzero(known)
    labels = np.array([data.networks[v] for v in labelled], dtype=str)
    names, sizes = np.unique(labels, return_counts=True)
    if not 1 < len(names) < len(labels):
        print("no networks.png: the coordinates tell of no networks")
        return
    clusters = AgglomerativeClustering(len(names), metric="precomputed", linkage="average")
    distances, table = {}, {}
    for method, distance in brainlm.parcel_distances(model, data).items():
        distances[method] = distance[np.ix_(labelled, labelled)]
        rand = adjusted_rand_score(labels, clusters.fit_predict(distances[method]))
        table[method] = {"Rand": rand}
    print(brainlm.markdown({"clusters against networks (adjusted Rand index)": table}) + "\n")

    order, ends = np.argsort(labels, kind="stable"), np.cumsum(sizes) - 0.5
    shown = {method: 1 - distances[method][np.ix_(order, order)]
             for method in ("BrainLM similarity", "functional connectivity")}
    least = min(matrix.min() for matrix in shown.values())
    figure, axes = plt.subplots(1, 2, figsize=(13, 7), sharey=True, layout="constrained")
    size = min(14, 280 / len(names))
    for axis, (method, matrix) in zip(axes, shown.items()):
        image = axis.imshow(matrix, cmap="YlGnBu", vmin=least, vmax=1, interpolation="none")
        axis.set_title(f"{method}\nadjusted Rand index {table[method]['Rand']:.2f}")
        axis.set_xticks(ends - sizes / 2, names, rotation=90, fontsize=size)
        axis.set_yticks(ends - sizes / 2, names, fontsize=size)
        for end in ends[:-1]:
            axis.axhline(end, color="black", linewidth=0.7)
            axis.axvline(end, color="black", linewidth=0.7)
    figure.colorbar(image, ax=axes, label="correlation, mean over windows", shrink=0.8)
    save(figure, path)


def predictions_picture(path, source, column):
    """Predictions of a regressor against the truth, and the line on which both are equal."""
    with open(source, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(column) not in (None, "", "n/a")]
    if not rows:
        print(f"no predictions.png: {source} has no {column} to compare with")
        return
    truth = [float({"true": 1, "false": 0}.get(row[column], row[column])) for row in rows]
    ours = [float([*row.values()][-1]) for row in rows]         # the last column, whatever its name
    figure, axis = plt.subplots(figsize=(6.5, 6), layout="constrained")
    axis.scatter(truth, ours, s=60, facecolors="none", edgecolors=OURS["color"], linewidths=2)
    axis.axline((truth[0], truth[0]), slope=1, color="0.6", linestyle="--", zorder=0)
    axis.set(xlabel=f"{column}, true", ylabel=f"{column}, predicted")
    save(figure, path)


# Of the README ------------------------------------------------------------------------------------

WHAT, WHERE, WHEN, CLS = "#2f6da8", "#86c286", "#f3d9a4", "#7b4a94"     # dark, middle, light, dark
INK, BOX = "0.15", "#f2f4f7"


def architecture_picture(path):
    """From a recording to its reconstruction and to a prediction, with 3 parcels and 4 patches."""
    figure = plt.figure(figsize=(9.6, 4.9))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 124), ylim=(0, 63.3))
    axis.axis("off")
    V, N, P = 3, 4, 20
    random = np.random.default_rng(3)
    hidden = np.array([[1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]], dtype=bool)       # [V, N]
    signal = np.zeros((V, N * P))
    for t in range(1, N * P):
        signal[:, t] = 0.93 * signal[:, t - 1] + random.standard_normal(V)
    signal /= 4 * signal.std(axis=1, keepdims=True)

    def text(x, y, words, **style):
        axis.text(x, y, words, **{"ha": "center", "va": "center", "color": INK, "fontsize": 9.5}
                  | style)

    def title(x, y, words):
        text(x, y, words, weight="bold", fontsize=10.5)

    def square(x, y, color, height, **style):
        axis.add_patch(Rectangle((x, y), 3.3, height, facecolor=color, edgecolor="0.3", lw=0.6,
                                 **style))

    def box(x, y, width, height, words, face=BOX, **style):
        axis.add_patch(FancyBboxPatch((x, y), width, height, facecolor=face, edgecolor="0.5",
                                      boxstyle="round,pad=0,rounding_size=0.8"))
        text(x + width / 2, y + height / 2, words, **style)

    def arrow(start, end):
        axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12,
                                       color="0.3", shrinkA=0, shrinkB=0))

    def curves(x, y, drawn):
        """A line for each parcel, cut into patches; hidden ones are grey, and empty or `drawn`."""
        for v in range(V):
            for n in range(N):
                left, bottom = x + 6 * n, y - 5.5 * v
                axis.add_patch(Rectangle((left, bottom - 2.2), 5.7, 4.4, edgecolor="0.6", lw=0.8,
                                         facecolor="0.85" if hidden[v, n] else "white"))
                if drawn or not hidden[v, n]:
                    curve = signal[v, n * P:(n + 1) * P] * (1.2 if hidden[v, n] else 1.6)
                    axis.plot(left + np.linspace(0.2, 5.5, P), bottom + np.clip(curve, -2, 2),
                              color=OURS["color"] if hidden[v, n] else WHAT, lw=1.3)

    # The recording
    title(15, 60.8, "recording, in patches")
    curves(4, 53.5, drawn=False)
    for v in range(V):
        text(1.9, 53.5 - 5.5 * v, f"p{v}")
    for n in range(N):
        text(6.9 + 6 * n, 38.4, f"t{n}")
    text(15, 34.2, "BOLD of parcels over time;\non grey: hidden")

    # A token
    arrow((28.5, 48), (32, 48))
    title(48, 60.8, "a token is a sum")
    for y, color, name, source in ((52.8, WHAT, "what", "Linear(patch), or [MASK]"),
                                   (46.0, WHERE, "where", "Linear(waves of x, y, z)"),
                                   (39.2, WHEN, "when", "sinusoid of its place")):
        box(33, y, 8.5, 4.4, name, color, color="white" if name == "what" else INK)
        text(42.5, y + 2.2, source, ha="left")
    text(37.2, 51.6, "+")
    text(37.2, 44.8, "+")

    # The sequence
    arrow((68, 48), (71.5, 48))
    title(97.5, 60.8, "the sequence: CLS, parcels of t0, of t1, ...")
    square(72.5, 46.6, CLS, 2.4)
    text(74.2, 51.2, "CLS")
    for n in range(N):
        for v in range(V):
            x = 77.6 + 11.7 * n + 3.6 * v
            if hidden[v, n]:
                square(x, 46.6, "white", 2.4, hatch="/////")
            else:
                square(x, 46.6, WHAT, 2.4)
            square(x, 44.4, WHERE, 2.0)
            square(x, 42.4, WHEN, 1.8)
            text(x + 1.7, 51.2, f"p{v}")
        text(82.9 + 11.7 * n, 55.6, f"t{n}")
        axis.plot([77.6 + 11.7 * n, 88.1 + 11.7 * n], [53.3, 53.3], color="0.5", lw=1)

    # The layers
    arrow((96, 41.6), (96, 35.8))
    text(98, 38.8, "hatched: what is [MASK]", ha="left")
    axis.add_patch(FancyBboxPatch((64, 1.5), 58.5, 34, facecolor=BOX, edgecolor="0.5",
                                  boxstyle="round,pad=0,rounding_size=1"))
    title(93, 32.8, "layers, one after the other")
    box(95.5, 19.2, 25.5, 10.6,
        "attention by the mask;\nwhere and when enter it\nanew in each layer", "white")
    box(95.5, 5.0, 25.5, 8.0, "MLP, each token\nby itself", "white")
    arrow((108.2, 19.1), (108.2, 13.2))
    mask = figure.add_axes((0.578, 0.095, 0.175, 0.175 * 9.6 / 4.9))
    readable = brainlm.block_causal_mask(N, V, brainlm.torch.from_numpy(hidden.T))
    mask.imshow(readable, cmap="Blues", vmin=0, vmax=1.3)
    mask.set_xticks([0, 2.6, 5, 8, 11], ["CLS"] + [f"t{n}" for n in range(N)], fontsize=9)
    mask.set_yticks([0, 2, 5, 8, 11], ["CLS"] + [f"t{n}" for n in range(N)], fontsize=9)
    mask.tick_params(length=0, pad=2)

    # The two heads
    arrow((63.5, 21.5), (59.5, 21.5))
    box(45, 18.5, 14, 6, "head: Linear")
    arrow((44.5, 21.5), (28.8, 21.5))
    text(36.8, 25.4, "tokens\nto patches")
    title(15, 29.6, "reconstruction")
    curves(4, 25, drawn=True)
    text(15, 9.6, "the loss: on grey alone")
    arrow((63.5, 5.2), (59.5, 5.2))
    box(34, 1.7, 25, 7.2, "CLS, mean and spread\nof parcel tokens: MLP")
    arrow((33.5, 5.2), (28.8, 5.2))
    title(15, 5.2, "age, a clinical score, ...")
    save(figure, path, dpi=142)


def mask_picture(path, N=4, V=3):
    """Who may read whom, where nothing is hidden and where two parcels of each patch are."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 6), layout="constrained", sharey=True)
    random = brainlm.torch.Generator().manual_seed(3)
    for axis, hidden in zip(axes, (None, brainlm.random_mask(1, N, V, 2 / 3, random)[0])):
        names = ["CLS"] + [f"t{t} p{v}" for t in range(N) for v in range(V)]
        if hidden is not None:
            names = [name + (" hidden" if is_hidden else "") for name, is_hidden
                     in zip(names, [False, *hidden.flatten().tolist()])]
        axis.imshow(brainlm.block_causal_mask(N, V, hidden), cmap="Blues", vmin=0, vmax=1.4)
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), [name.removesuffix(" hidden") for name in names])
        axis.set_xlabel("token that is read (dark: it may be)")
    axes[0].set_ylabel("token that reads")
    save(figure, path)


def people_picture(path, tables):
    """R2 against the number of people, of the tables that benchmarks/people.py wrote."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained", sharex=True)

    def line(axis, method, values, style, label):
        people = [int(name.split()[0]) for name in values]
        means, deviations = np.array([*values.values()]).T
        axis.errorbar(people, means, deviations, capsize=3, label=label, **style)

    panels = "masked patches", "forecasting 20 timepoints", "age"
    for axis, title in zip(axes.flat[[0, 1, 3]], panels):
        table = tables[f"R2 of {title}"]
        styles = OURS | {"marker": "o"}, *OTHERS        # BrainLM comes first
        for (method, values), style in zip(table.items(), styles):
            if method != "persistence":                 # it is far below
                line(axis, method, values, style, method)
        axis.set(ylabel=f"R2 of {title}")
    axes[1, 1].set_ylim(bottom=-0.5)                    # few people's mean age is far off
    for h, marker in zip((1, 2, 3), "osD"):
        table = tables[f"R2 of {h} timepoint{'s' * (h > 1)} ahead"]
        for method, style in (("BrainLM", OURS),
                              ("2-lag vector autoregression", {"color": "0.3", "linestyle": ":"})):
            line(axes[1, 0], method, table[method], style | {"marker": marker},
                 f"{method}, {h} ahead")
    axes[1, 0].set(ylabel="R2 of single timepoints ahead", ylim=(0, 0.5))       # room for a legend
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_xticks([5, 20, 100, 400], [5, 20, 100, 400])
        axis.minorticks_off()
        axis.legend(fontsize=11)
    for axis in axes[1]:
        axis.set_xlabel("people to learn from")
    save(figure, path)


def readme_pictures(run):
    """run: the folder of one that has been drawn, or None."""
    assets = ROOT / "assets"
    assets.mkdir(exist_ok=True)
    architecture_picture(assets / "architecture.png")
    mask_picture(assets / "mask.png")
    results = json.loads((ROOT / "benchmarks/results.json").read_text())
    if "people" in results:
        people_picture(assets / "people.png", results["people"])
    for name in ("evaluation.png", "networks.png") if run else ():
        shutil.copy(run / name, assets / name)
    for file in assets.glob("*.png"):                           # with a palette they are smaller
        picture = Image.open(file).convert("RGB")
        picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(file, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="folder of pretrain, finetune, evaluate")
    parser.add_argument("--readme", type=Path, metavar="RUN", help="folder that has been drawn")
    args = parser.parse_args()
    try:
        if args.run:
            run_pictures(args.run)
        else:
            readme_pictures(args.readme)
    except (brainlm.BadInput, OSError) as error:
        print("error:", textwrap.shorten(str(error), 500, placeholder=" ..."), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
