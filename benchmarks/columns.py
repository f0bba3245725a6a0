"""Finetuning on every clinical column of the sample data, beside the opponents: a table of R2.

    python benchmarks/columns.py RUN [--max_steps 100 ...]  # to start from; flags of finetune
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

BRAINLM = Path(__file__).resolve().parent.parent / "brainlm.py"
sys.path.insert(0, str(BRAINLM.parent))
import brainlm

COLUMNS = ("Age.At.MHQ", "PHQ9.Severity", "PCL.Score", "GAD7.Severity", "Neuroticism",
           "Depressed.At.Baseline", "Self.Harm.Ever", "Not.Worth.Living")
FOLDS = 5


class Projected:
    """What connectivity_ridge asks of a dataset, with signals projected by a matrix [V, V]."""

    def __init__(self, dataset, projection):
        self.dataset, self.projection, self.num_parcels = dataset, projection, len(projection)

    def window(self, row):
        return self.dataset.window(row) @ self.projection


def coskewness_directions(dataset, rows):
    """Directions in parcel space, columns of [V, V], the leading one first: the left singular
    vectors of co-skewness, E[x_u x_v x_w] as a matrix [V, V * V], in the leading ones of which
    connectivity is reported to tell more of cognition (arXiv 2606.04010)."""
    squared = 0.0                       # that matrix times its transpose, summed over recordings
    for row in rows:
        signal = dataset.window(row) - dataset.window(row).mean(axis=0)
        signal = signal / np.maximum(signal.std(axis=0), 1e-12)
        squared += signal.T @ np.square(signal @ signal.T) @ signal / len(signal) ** 2
    return np.linalg.eigh(squared)[1][:, ::-1]


def coskewness_ridge(data, val_rows):
    """Predictions for val_rows by brainlm.connectivity_ridge in the leading 10, 20, 50 or 100
    directions, whichever predict training recordings best that were left out, a fifth at a time."""
    rows = np.flatnonzero(~np.isnan(data.target))[:brainlm.MAX_BASELINE_ROWS]
    directions, fits = coskewness_directions(data.train, rows), []
    for k in (10, 20, 50, 100):
        leading = directions[:, :k]
        train, val = (Projected(dataset, leading @ leading.T) for dataset in (data.train, data.val))
        error = 0.0
        for fold in range(FOLDS):
            target, left_out = data.target.copy(), rows[fold::FOLDS]
            target[left_out] = np.nan
            expected = brainlm.connectivity_ridge(train, target, train, left_out)
            error += np.square(expected - data.target[left_out]).sum()
        fits.append((error, brainlm.connectivity_ridge(train, data.target, val, val_rows)))
    return min(fits, key=lambda fit: fit[0])[1]


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    run, *flags = sys.argv[1:]
    lines = []
    for column in COLUMNS:
        folder = Path("runs", "columns", column)
        command = [sys.executable, BRAINLM, "finetune", "--model_name_or_path", run, "--output_dir",
                   folder, "--overwrite_output_dir", "--variable_of_interest_col_name", column]
        for split in "train", "val", "coords":
            command += [f"--{split}_dataset_path", f"./sample_data/{split}"]
        subprocess.run([*command, *flags], check=True)          # later flags count
        evaluation = json.loads((folder / "evaluation.json").read_text())
        (table,) = evaluation["tables"].values()
        data = brainlm.open_data(argparse.Namespace(**evaluation["args"]), 1)
        data.target, data.val_target = (brainlm.open_target(dataset, column, least=1)
                                        for dataset in (data.train, data.val))
        known = np.flatnonzero(~np.isnan(data.val_target))
        table["the same in the co-skewness subspace"] = brainlm.regression_scores(
            coskewness_ridge(data, known), data.val_target[known])
        if not lines:
            lines += ["| R2 | " + " | ".join(table) + " |", "| --- |" + " --- |" * len(table)]
        numbers = [math.nan if row["R2"] is None else row["R2"] for row in table.values()]
        lines.append(f"| {column} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
