"""Finetuning on every clinical column of the sample data, beside the baselines: a table of R2.

    python benchmarks/columns.py RUN [--max_steps 100 ...]  # RUN: a pretrained model, then flags of
                                                            # `finetune`
"""

import json
import math
import subprocess
import sys
from pathlib import Path

BRAINLM = Path(__file__).resolve().parent.parent / "brainlm.py"
COLUMNS = ("Age.At.MHQ", "PHQ9.Severity", "PCL.Score", "GAD7.Severity", "Neuroticism",
           "Depressed.At.Baseline", "Self.Harm.Ever", "Not.Worth.Living")


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
        subprocess.run([*command, *flags], check=True)          # of a flag given twice, the last
        (table,) = json.loads((folder / "evaluation.json").read_text())["tables"].values()
        if not lines:
            lines += ["| R2 | " + " | ".join(table) + " |", "| --- |" + " --- |" * len(table)]
        R2 = [math.nan if row["R2"] is None else row["R2"] for row in table.values()]
        lines.append(f"| {column} | " + " | ".join(f"{number:.3f}" for number in R2) + " |")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
