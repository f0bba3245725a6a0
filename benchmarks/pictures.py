"""The pictures of a run and those of the README (needs matplotlib and scikit-learn).

    python benchmarks/pictures.py RUN           # of a run folder, or its subfolder `evaluate`
    python benchmarks/pictures.py               # into assets: architecture, mask, participants
    python benchmarks/pictures.py --readme RUN  # these, and the pictures that are already in RUN
"""

import argparse
import csv
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import brainlm
import sample_data

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import BoundaryNorm
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
    from PIL import Image
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import adjusted_rand_score
except ImportError as missing:
    sys.exit(f"error: {missing}: pip install matplotlib scikit-learn")

WIDTH, DPI = 10.12, 200                 # inches: GitHub shows 1,012 pixels; two for each of these
plt.rcParams.update({
    "font.size": 11, "text.parse_math": False, "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "figure.constrained_layout.w_pad": 0.08, "figure.constrained_layout.h_pad": 0.08})

# One style per method in all pictures; they also differ in markers and lines, for prints in grey.
STYLES = {
    "BrainLM": {"color": "#a50f15", "marker": "o", "linewidth": 2.4, "zorder": 3},
    "Gaussian conditional mean": {"color": "#2171b5", "marker": "s", "linestyle": "--"},
    "ridge autoregression": {"color": "#238b45", "marker": "D", "linestyle": "--"},
    "2-lag vector autoregression": {"color": "0.25", "marker": "^", "linestyle": ":"},
    "persistence": {"color": "#d98200", "marker": "v", "linestyle": "-."},
    "training mean": {"color": "0.5", "marker": "v", "linestyle": ":"},
    "ridge on functional connectivity": {"color": "#6a51a3", "marker": "P", "linestyle": "--"},
    "ridge on BrainLM's features": {"color": "#d6604d", "marker": "X", "linestyle": "-."}}


def save(figure, path):
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    picture = Image.open(path).convert("RGB")               # a palette makes the file smaller
    picture.quantize(64, Image.Quantize.MAXCOVERAGE, kmeans=1).save(path, optimize=True)
    print(f"picture in {path}")


class Sketch:
    """Shapes and words on a figure; the unit is a tenth of an inch."""

    def __init__(self, width, height):
        self.figure = plt.figure(figsize=(width / 10, height / 10))
        self.axis = self.axes(0, 0, width, height)
        self.axis.set(xlim=(0, width), ylim=(0, height))
        self.axis.axis("off")

    def axes(self, x, y, width, height):
        all_width, all_height = 10 * self.figure.get_size_inches()
        return self.figure.add_axes((x / all_width, y / all_height, width / all_width,
                                     height / all_height))

    def text(self, x, y, words, **style):
        self.axis.text(x, y, words, **{"ha": "center", "va": "center", "color": "0.15",
                                       "fontsize": 10, "linespacing": 1.3} | style)

    def title(self, x, y, words):
        self.text(x, y, words, ha="left", va="baseline", weight="bold", fontsize=12.5)

    def rectangle(self, x, y, width, height, color, **style):
        self.axis.add_patch(Rectangle((x, y), width, height, facecolor=color,
                                      **{"edgecolor": "0.35", "linewidth": 0.6} | style))

    def box(self, x, y, width, height, words="", face="#f2f4f7", **style):
        self.axis.add_patch(FancyBboxPatch((x, y), width, height, facecolor=face, edgecolor="0.5",
                                           boxstyle="round,pad=0,rounding_size=0.8"))
        self.text(x + width / 2, y + height / 2, words, **style)

    def arrow(self, start, end):
        self.axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14,
                                            color="0.3", linewidth=1.3, shrinkA=0, shrinkB=0))


def label_lines(axis, lines, gap):
    """Write the labels of lines, [(label, color, x, y of its last point)], to the right of an axis,
    at least `gap` of its height apart."""
    low, high = axis.get_ylim()
    lines = sorted(lines, key=lambda line: line[3])
    ends = np.array([(y - low) / (high - low) for *_, y in lines])
    heights = np.clip(ends, 0, 1)
    for _ in range(200):                                    # push apart what is too close
        push = np.clip(gap - np.diff(heights), 0, None) / 2
        heights[:-1] -= push
        heights[1:] += push
    for (label, color, x, y), end, height in zip(lines, ends, heights):
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.7} if 0 <= end <= 1 else None
        axis.annotate(label if leader else f"{label} ↓", (x, y), (1.06, height), color=color,
                      textcoords=axis.transAxes, va="center", arrowprops=leader,
                      annotation_clip=False, fontsize=10)


# Of a run -----------------------------------------------------------------------------------------

def run_pictures(folder):
    """Draw what the tables in the evaluation.json of a folder say."""
    with brainlm.input_errors(f"Cannot read {folder / 'evaluation.json'}: expected the folder of a "
                              "run or of `brainlm.py evaluate`"):
        evaluation = json.loads((folder / "evaluation.json").read_text())
        args, tables = argparse.Namespace(**evaluation["args"]), evaluation["tables"]
    # `evaluate` writes results beside no model.
    source = folder if (folder / "config.json").exists() else args.model_name_or_path
    model = brainlm.load_model(source, **brainlm.settings_of(brainlm.BrainLMConfig, args))
    if isinstance(model, brainlm.BrainLMRegressor):
        predictions_picture(folder / "predictions.png", folder / "predictions.csv", tables)
        return
    data = brainlm.open_data(args, model.config.num_timepoints_per_voxel)
    model.to(data.xyz.device)
    # The repetition time is known where the data have a column TR, and of the sample data.
    TR = None
    if "TR" in data.val.table.column_names:
        TR = data.val.table["TR"][0].as_py()
    elif args.val_dataset_path == brainlm.SAMPLE_DATA["val_dataset_path"]:
        TR = sample_data.TR
    evaluation_picture(folder / "evaluation.png", model, data, tables, TR)
    networks_picture(folder / "networks.png", model, data)


def fitted_baseline(name, data, signal, mask):
    """The baseline of this name, with the regularisation strength that suits these windows best."""
    P = signal.shape[1] // mask.shape[1]
    baselines = (brainlm.GaussianConditionalMean(), brainlm.Persistence(),
                 brainlm.RidgeAutoregression(P), brainlm.VectorAutoregression())
    (baseline,) = [each for each in baselines if each.name == name]
    baseline.fit(data.train)

    def R2(alpha):
        baseline.alpha = alpha
        return brainlm.reconstruction_scores(baseline, signal, data.xyz, mask)["R2"]
    baseline.alpha = max(brainlm.ALPHAS, key=R2)
    return baseline


def time_axis(axis, what, ticks, TR):
    """An x axis in timepoints and, if the repetition time is known, below them in seconds."""
    axis.set_xticks(ticks, [f"{t}\n{t * TR:.1f}" if TR else f"{t}" for t in ticks])
    axis.set_xlabel(f"{what} (timepoints; below, seconds)" if TR else f"{what} (timepoints)")


def evaluation_picture(path, model, data, tables, TR):
    """Masked patches and a forecast of the first validation window, and R2 by horizon."""
    T, P = model.config.num_timepoints_per_voxel, model.config.timepoint_patching_size
    signal, masks = brainlm.reconstruction_tasks(
        data.val, model.config, brainlm.MAX_WINDOWS_WHILE_TRAINING)
    figure = plt.figure(figsize=(WIDTH, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    panels = {"masked": top.subplots(), "forecast": None}
    if "forecast" in masks:
        panels["forecast"], by_horizon = bottom.subplots(1, 2, width_ratios=[1.4, 1])
    titles = {"masked": f"A   Masked patches: {model.config.mask_ratio:.0%} of the parcels are "
                        "masked at each time step",
              "forecast": f"B   Forecast of {P} timepoints from {T - P}"}
    for (task, mask), table in zip(masks.items(), tables.values()):
        best = list(table)[1]                   # after BrainLM come the baselines, best first
        baseline = fitted_baseline(best, data, signal, mask)
        methods = {"BrainLM": brainlm.reconstruction_of(model, data), baseline.name: baseline}
        window = {name: method(signal[:1], data.xyz, mask[:1])[0].numpy()   # [T, V]
                  for name, method in methods.items()}
        shown = np.arange(0 if task == "masked" else max(0, T - 3 * P), T)
        traces(panels[task], signal[0].numpy(), mask[0].numpy(), window, shown, data.networks)
        time_axis(panels[task], "time", range(shown[0], T + 1, P), TR)
        panels[task].set_title(titles[task])
    if "forecast" in masks:
        horizon_panel(by_horizon, table, TR)
    save(figure, path)


def traces(axis, signal, mask, reconstructions, shown, networks):
    """The recording, signal [T, V], of three parcels, evenly spaced, and what methods put in place
    of masked patches, mask [N, V], {method: [T, V]}, at the timepoints that are shown."""
    P, V = len(signal) // len(mask), signal.shape[1]
    unit = np.subtract(*np.percentile(signal, [75, 25]))        # the interquartile range
    spacing = 4.5 * unit
    parcels = range(0, V, max(1, V // 3))[:3]
    for i, parcel in enumerate(parcels):
        base = -spacing * i
        for n in np.flatnonzero(mask[:, parcel]):
            axis.add_patch(Rectangle((n * P - 0.5, base - 0.48 * spacing), P, 0.96 * spacing,
                                     color="0.93", zorder=0, linewidth=0))
        is_masked = np.repeat(mask[:, parcel], P)
        axis.plot(shown, (signal[:, parcel] + base)[shown], color="0.55", linewidth=1.1,
                  label=None if i else "recording")
        for name, prediction in reconstructions.items():
            drawn = np.where(is_masked, prediction[:, parcel] + base, np.nan)
            axis.plot(shown, drawn[shown], label=None if i else name,
                      **STYLES[name] | {"marker": ""})
    names = [spaced(networks[v]) + "\n" if networks[v] else "" for v in parcels]
    axis.set_yticks([-spacing * i for i in range(len(parcels))],
                    [f"{name}parcel {v}" for name, v in zip(names, parcels)])
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.spines["bottom"].set_bounds(shown[0], len(signal))
    bar = len(signal) + 0.015 * len(shown)                      # the scale
    axis.set(xlim=(shown[0] - 0.5, bar), ylim=(-spacing * (len(parcels) - 0.42), 0.95 * spacing))
    axis.plot([bar, bar], [-unit / 2, unit / 2], color="black", linewidth=2, clip_on=False)
    axis.annotate("1 interquartile\nrange", (bar, 0), (4, 0), textcoords="offset points",
                  rotation=90, va="center", fontsize=9, annotation_clip=False)
    axis.legend(loc="upper left", ncols=3, frameon=False, borderpad=0, fontsize=10,
                handlelength=1.5, borderaxespad=0, columnspacing=1.2)


def spaced(name):
    """The name of a network as words: DorsalAttention is Dorsal attention."""
    return re.sub(r"(?<=[a-z])[A-Z]", lambda found: " " + found[0].lower(), name)


def horizon_panel(axis, table, TR):
    """R2 of the forecasts of a table's methods by horizon."""
    horizons = [h for h in brainlm.HORIZONS if f"R2 at {h}" in table["BrainLM"]]
    axis.axhline(0, color="0.8", zorder=0)
    ends = []
    for name, row in table.items():
        R2 = np.array([row[f"R2 at {h}"] for h in horizons], dtype=float)
        axis.plot(horizons, R2, **STYLES[name])
        ends.append((textwrap.fill(name, 16), STYLES[name]["color"], horizons[-1], R2[-1]))
    axis.set(xscale="log", ylabel="R2 over all windows", title="C   R2 of forecasts",
             ylim=(-0.5, 0.75))
    time_axis(axis, "horizon", horizons, TR)
    axis.minorticks_off()
    label_lines(axis, ends, gap=0.15)


def networks_picture(path, model, data):
    """Similarity and connectivity [V, V] with the parcels of a network side by side. Prints how
    well clusters of parcels, as many as networks, agree with them, for each kind of distance."""
    labelled = np.array([v for v, name in enumerate(data.networks) if name is not None], dtype=int)
    labels = np.array([data.networks[v] for v in labelled], dtype=str)
    names, sizes = np.unique(labels, return_counts=True)
    if not 1 < len(names) < len(labels):
        print("no networks.png: the coordinates name no networks")
        return
    clusters = AgglomerativeClustering(len(names), metric="precomputed", linkage="average")
    distances, table = {}, {}
    for method, distance in brainlm.parcel_distances(model, data).items():
        distances[method] = distance[np.ix_(labelled, labelled)]
        rand = adjusted_rand_score(labels, clusters.fit_predict(distances[method]))
        table[method] = {"Rand": rand}
    print(brainlm.markdown({"clusters against networks (adjusted Rand index)": table}) + "\n")

    order = np.lexsort((data.xyz[labelled, 1].cpu().numpy(), labels))   # by network, back to front
    panels = {"BrainLM similarity": "A   BrainLM: similarity of hidden states",
              "functional connectivity": "B   Functional connectivity"}
    shown = {method: 1 - distances[method][np.ix_(order, order)] for method in panels}
    least = min(matrix.min() for matrix in shown.values())
    levels = np.arange(np.floor(10 * least), 11) / 10                   # steps of 0.1
    sketch, font = Sketch(10 * WIDTH, 57.6), min(10.5, 250 / len(names))
    ends = np.cumsum(sizes) - 0.5
    for i, (method, matrix) in enumerate(shown.items()):
        axis = sketch.axes(14.5 + 43.6 * i, 8.6, 42.4, 42.4)    # of 424 parcels, each is 2 pixels
        image = axis.imshow(matrix, cmap="YlGnBu", norm=BoundaryNorm(levels, 256),
                            interpolation="nearest")
        axis.set_title(panels[method], pad=22)
        axis.text(0, 1.02, f"clusters against networks: adjusted Rand index "
                  f"{table[method]['Rand']:.2f}", transform=axis.transAxes, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks(ends - sizes / 2, [] if i else map(spaced, names), fontsize=font)
        axis.tick_params(length=0)
        for end in ends[:-1]:
            axis.axhline(end, color="black", linewidth=0.6)
            axis.axvline(end, color="black", linewidth=0.6)
    sketch.figure.colorbar(image, cax=sketch.axes(50, 5.2, 42, 1.8), orientation="horizontal",
                           spacing="proportional")
    sketch.text(14.5, 6, "correlation of two parcels, mean over windows", ha="left")
    save(sketch.figure, path)


def predictions_picture(path, source, tables):
    """Predictions of a regressor against the target, and the line on which both are equal."""
    (title, table), = tables.items()                        # "Age.At.MHQ, 20 validation recordings"
    column = title.rpartition(", ")[0]
    with open(source, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(column) not in (None, "", "n/a")]
    target = [float({"true": 1, "false": 0}.get(row[column], row[column])) for row in rows]
    prediction = [float([*row.values()][-1]) for row in rows]       # it is the last column
    figure, axis = plt.subplots(figsize=(WIDTH / 2, WIDTH / 2), layout="constrained")
    axis.scatter(target, prediction, s=50, facecolors="none", linewidths=1.8,
                 edgecolors=STYLES["BrainLM"]["color"])
    both = min(target + prediction), max(target + prediction)
    axis.plot(both, both, color="0.6", linestyle="--", zorder=0)
    R2, MAE, r = (np.nan if table["BrainLM"][name] is None else table["BrainLM"][name]
                  for name in ("R2", "MAE", "r"))
    axis.set_title(f"{title}\nR2 {R2:.2f}, mean absolute error {MAE:.2g}, r {r:.2f}", fontsize=11)
    axis.set(xlabel=f"{column}: target", ylabel=f"{column}: prediction", aspect="equal")
    axis.text(0.97, 0.03, "dashed: prediction = target", transform=axis.transAxes, ha="right",
              color="0.4", fontsize=10)
    save(figure, path)


# Of the README ------------------------------------------------------------------------------------

PATCH, SPACE, TIME, CLS, MASKED = "#2f6da8", "#86c286", "#f3d9a4", "#7b4a94", "0.86"


def shaded_mask(N, V):
    """block_causal_mask, lighter where a parcel attends to an earlier time step."""
    mask, step = brainlm.block_causal_mask(N, V).float(), np.arange(N).repeat(V)
    mask[1:, 1:][step[:, None] > step] *= 0.55
    return mask


def architecture_picture(path, V=4, N=4, P=20):
    """From a recording to its reconstruction and to a prediction, with V parcels and N patches."""
    sketch = Sketch(10 * WIDTH, 67)
    text, title, box, arrow = sketch.text, sketch.title, sketch.box, sketch.arrow
    random, red = np.random.default_rng(3), STYLES["BrainLM"]["color"]
    masked = np.array([[0, 1, 1, 0], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]], bool)    # [V, N]
    slow = [np.convolve(random.standard_normal(N * P + 12), np.hanning(13), "valid")
            for _ in range(V)]
    slow /= np.std(slow, axis=1, keepdims=True)                             # [V, N * P]
    signal = 0.85 * slow + 0.4 * random.standard_normal(slow.shape)

    def curves(x, y, reconstructed):
        """A row for each parcel, a box for each patch; masked ones are grey."""
        for v, n in np.ndindex(V, N):
            left, bottom, part = x + 5.2 * n, y - 4.6 * v, slice(n * P, (n + 1) * P)
            times = left + np.linspace(0.2, 4.7, P)
            sketch.rectangle(left, bottom, 4.9, 4.2, MASKED if masked[v, n] else "white",
                             edgecolor="0.6")
            if reconstructed or not masked[v, n]:
                sketch.axis.plot(times, bottom + 2.1 + 0.75 * signal[v, part].clip(-2.5, 2.5),
                                 color="0.55" if masked[v, n] else PATCH, linewidth=1.1)
            if reconstructed and masked[v, n]:
                sketch.axis.plot(times, bottom + 2.1 + 0.6 * slow[v, part].clip(-2.5, 2.5),
                                 color=red, linewidth=2)
        for n in range(N):
            text(x + 2.45 + 5.2 * n, y + 5.4, f"t{n}")
        for v in range(V):
            text(x - 1.6, y + 2.1 - 4.6 * v, f"p{v}")

    # 1. A recording: where its parcels are, and their time series.
    title(1, 64, "1  Recording")
    brain = sample_data.make_brain(424, np.random.default_rng(0))["xyz"]
    inset = sketch.axes(0.3, 42, 13.6, 15)
    inset.scatter(brain[:, 1], brain[:, 2], s=3, color="0.78", linewidths=0)
    for v, (y, z) in enumerate([(30, 42), (-75, 25), (30, -15), (-60, -15)]):
        y, z = min(brain[:, 1:], key=lambda other: np.hypot(*(other - (y, z))))
        inset.scatter(y, z, s=45, color=SPACE, edgecolors="0.3", linewidths=0.7, zorder=3)
        inset.text(y, z + 10, f"p{v}", fontsize=9.5, ha="center")
    inset.axis("off")
    inset.set_aspect("equal")
    text(7.1, 58, "424 parcels\nof a brain")
    text(1, 43.2, "back", ha="left", fontsize=9, color="0.45")
    text(13, 43.2, "front", ha="right", fontsize=9, color="0.45")
    curves(17.2, 54.3, reconstructed=False)
    text(27.4, 62.2, "time steps")
    text(1, 36.6, "BOLD, cut into patches of 20 timepoints. A training\nstep leaves out half of "
         "the parcels; of the others,\nhalf are masked at each time step (grey).", ha="left",
         fontsize=9.5)

    # 2. Tokens.
    arrow((38.8, 49.2), (42.4, 49.2))
    title(44, 64, "2  Tokens")
    text(44, 60.3, "A patch becomes a token, the sum of", ha="left")
    for y, color, name, source in (
            (53.4, PATCH, "patch\nembedding", "Linear(20 values),\nor [MASK] if masked"),
            (46.2, SPACE, "spatial\nencoding", "Linear(sines and\ncosines of x, y, z)"),
            (39.0, TIME, "temporal\nencoding", "sines and cosines\nof the time step")):
        box(44, y, 9.4, 5, name, color, color="white" if color == PATCH else "0.15")
        text(54.4, y + 2.5, source, ha="left")
    text(48.7, 52.3, "+", fontsize=12)
    text(48.7, 45.1, "+", fontsize=12)

    # 3. The sequence.
    arrow((68.2, 49.2), (71.8, 49.2))
    title(73, 64, "3  Sequence")
    text(73, 60.3, "CLS, then all parcels of t0, of t1, ...", ha="left")
    sketch.rectangle(73.2, 45.2, 1.35, 7.2, CLS)
    text(73.9, 54, "CLS", fontsize=9)
    for n, v in np.ndindex(N, V):
        x = 75.9 + 6.25 * n + 1.4 * v
        hatch = {"hatch": "//////"} if masked[v, n] else {}
        sketch.rectangle(x, 50.0, 1.35, 2.4, "white" if hatch else PATCH, **hatch)
        sketch.rectangle(x, 47.6, 1.35, 2.4, SPACE, alpha=0.55 + 0.15 * v)
        sketch.rectangle(x, 45.2, 1.35, 2.4, TIME, alpha=0.4 + 0.2 * n)
    for n in range(N):
        text(78.7 + 6.25 * n, 56.6, f"t{n}")
        text(78.7 + 6.25 * n, 54, "p0 ... p3", fontsize=8.5)
    text(86.8, 42.9, "hatched: [MASK]", fontsize=9.5)

    # 4. The layers.
    arrow((86.8, 40.8), (86.8, 35.4))
    box(54.5, 1, 45.7, 34)
    title(56, 31.9, "4  Layers")
    text(66, 32.4, "four, one after the other", ha="left")
    mask = sketch.axes(61, 7.2, 19, 19)
    mask.imshow(shaded_mask(N, V), cmap="Blues", vmin=0, vmax=1.35)
    groups = [0, *(2.5 + V * np.arange(N))], ["CLS", *(f"t{n}" for n in range(N))]
    mask.set_xticks(*groups, fontsize=9)
    mask.set_yticks(*groups, fontsize=9)
    mask.tick_params(length=0, pad=2)
    mask.set_ylabel("query", fontsize=9.5, labelpad=0)
    for spine in mask.spines.values():
        spine.set(visible=True, edgecolor="0.5")
    text(70.5, 28, "block-causal mask", fontsize=9.5)
    text(70.5, 3.8, "key (blue: may attend)", fontsize=9.5)
    box(82, 14.2, 17, 14.2, "Attention\n\nSpatial and temporal\nencoding enter the\n"
        "queries and keys\nof each layer again.", "white", fontsize=9.5)
    box(82, 4.2, 17, 6.6, "MLP, each token\nby itself", "white", fontsize=9.5)
    arrow((90.5, 14.1), (90.5, 11))

    # 5 and 6. The two heads.
    title(1, 31, "5  Reconstruction")
    arrow((54.3, 20.2), (51.6, 20.2))
    box(40.7, 17, 10.8, 6.4, "reconstruction\nhead: Linear to\n20 values", fontsize=9)
    arrow((40.5, 20.2), (38.2, 20.2))
    curves(17.2, 23.3, reconstructed=True)
    text(1, 24, "reconstruction", ha="left", color=red)
    text(1, 21.4, "recording", ha="left", color="0.4")
    text(1, 14.7, "The loss is the\nmean squared\nerror of masked\npatches only.", ha="left",
         fontsize=9.5)
    title(1, 3.4, "6  Prediction")
    text(14.5, 3.9, "age, clinical scores", ha="left")
    arrow((54.3, 3.9), (51.6, 3.9))
    box(33.2, 1, 18.3, 6, "regression head: MLP on\nCLS, mean and standard\n"
        "deviation of the tokens", fontsize=9)
    arrow((33, 3.9), (30.6, 3.9))
    save(sketch.figure, path)


def mask_picture(path, N=4, V=3):
    """Which tokens attend to which."""
    figure, axis = plt.subplots(figsize=(WIDTH, 4.9))
    figure.subplots_adjust(left=0.13, right=1, bottom=0.02, top=0.82)
    axis.set_anchor("W")
    axis.imshow(shaded_mask(N, V), cmap="Blues", vmin=0, vmax=1.35)
    names = ["CLS"] + [f"t{n} p{v}" for n in range(N) for v in range(V)]
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=10)
    axis.set_yticks(range(len(names)), names, fontsize=10)
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    axis.set_xlabel("key (blue: may attend)", weight="bold")
    axis.set_ylabel("query", weight="bold")
    axis.tick_params(length=0)
    for edge in np.arange(len(names) + 1) - 0.5:            # white lines between tokens
        axis.axhline(edge, color="white", linewidth=1)
        axis.axvline(edge, color="white", linewidth=1)
    for edge in 0.5 + V * np.arange(N):                     # grey ones between time steps
        axis.axhline(edge, color="0.6", linewidth=1)
        axis.axvline(edge, color="0.6", linewidth=1)
    for row, words in (
            (0, "CLS attends to all tokens."),
            (3, "A parcel attends to all parcels of its own time\nstep (dark) and of earlier time "
                "steps (light),\nmasked tokens included."),
            (7, "It does not attend to later time steps: the\n"
                "same model fills gaps and forecasts."),
            (11, "No parcel attends to CLS (first column): CLS\nattends to the future, and would "
                 "pass it on.")):
        axis.annotate(words, (0, 0), (N * V + 1, row), va="center", fontsize=12,
                      annotation_clip=False)
    save(figure, path)


def participants_picture(path, tables):
    """R2 by the number of training participants, from the tables of benchmarks/participants.py."""
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 7.6), layout="constrained", sharex=True)

    def draw(axis, title, methods):
        """Lines of some methods of a table, and their labels for label_lines."""
        labels = []
        for method in methods:
            values = tables[f"R2 of {title}"][method]
            numbers = [int(name.split()[0]) for name in values]
            means, deviations = np.array([*values.values()]).T
            axis.errorbar(numbers, means, deviations, capsize=3, **STYLES[method])
            labels.append((textwrap.fill(method, 16), STYLES[method]["color"], numbers[-1],
                           means[-1]))
        return labels

    def best_two(title):
        """BrainLM and the baseline that is best with the most participants."""
        last = {name: [*values.values()][-1] for name, values in tables[f"R2 of {title}"].items()}
        return "BrainLM", max(last.keys() - {"BrainLM"}, key=last.get)

    panels = (("A   Masked patches", "masked patches", (0, 0.3)),
              ("B   Forecast of 20 timepoints", "forecasting 20 timepoints", (0, 0.15)),
              ("D   Age", "age", (-0.5, 1)))
    for axis, (heading, title, limits) in zip(axes.flat[[0, 1, 3]], panels):
        axis.set(title=heading, ylabel="R2", ylim=limits)
        methods = [name for name in tables[f"R2 of {title}"] if name != "persistence"]
        label_lines(axis, draw(axis, title, methods), gap=0.15)
    labels = []
    for h in 1, 2, 3:
        title = f"{h} timepoint{'s' * (h > 1)} ahead"
        drawn = draw(axes[1, 0], title, best_two(title))
        axes[1, 0].annotate(title, drawn[-1][2:], (0, -9), textcoords="offset points", fontsize=10,
                            ha="right", va="top", color="0.4")
        labels += drawn
    axes[1, 0].set(title="C   Single timepoints, and the best baseline", ylabel="R2", ylim=(0, 0.5))
    label_lines(axes[1, 0], labels, gap=0.1)
    for axis in axes.flat:
        axis.axhline(0, color="0.8", zorder=0)
        axis.set_xscale("log")
        axis.set_xticks([5, 20, 100, 400], [5, 20, 100, 400])
        axis.minorticks_off()
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("training participants")
    save(figure, path)


def readme_pictures(run):
    """run: a folder that holds evaluation.png and networks.png, or None."""
    assets = ROOT / "assets"
    assets.mkdir(exist_ok=True)
    architecture_picture(assets / "architecture.png")
    mask_picture(assets / "mask.png")
    results = json.loads((ROOT / "benchmarks/results.json").read_text())
    participants_picture(assets / "participants.png", results["participants"])
    for name in ("evaluation.png", "networks.png") if run else ():
        shutil.copy(run / name, assets / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path,
                        help="folder of pretrain, finetune or evaluate")
    parser.add_argument("--readme", type=Path, metavar="RUN",
                        help="copy the pictures of this folder into assets, too")
    args = parser.parse_args()
    try:
        if args.run:
            run_pictures(args.run)
        else:
            readme_pictures(args.readme)
    except (brainlm.InputError, OSError) as error:
        print("error:", textwrap.shorten(str(error), 500, placeholder=" ..."), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
