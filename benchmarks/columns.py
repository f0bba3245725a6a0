"""Finetuning on every clinical column of the sample data, beside the opponents: one table of R2.

    python benchmarks/columns.py runs/pretrain [--max_steps 100 ...]      # the run to start from; flags of finetune
"""

import json
import subprocess
import sys
from pathlib import Path

COLUMNS = ("Age.At.MHQ", "PHQ9.Severity", "PCL.Score", "GAD7.Severity", "Neuroticism", "Depressed.At.Baseline",
           "Self.Harm.Ever", "Not.Worth.Living")
BRAINLM = Path(__file__).parent.parent / "brainlm.py"

run, *flags = sys.argv[1:]
lines = []
for column in COLUMNS:
    folder = Path("runs", "columns", column)
    subprocess.run([sys.executable, BRAINLM, "finetune", "--model_name_or_path", run, "--output_dir", folder,
                    "--variable_of_interest_col_name", column, *flags], check=True)
    *_, last = (folder / "metrics.jsonl").read_text().splitlines()
    (table,) = json.loads(last)["tables"].values()
    if not lines:
        lines += ["| R2 | " + " | ".join(table) + " |", "| --- |" + " --- |" * len(table)]
    lines.append(f"| {column} | " + " | ".join(f"{row['R2']:.3f}" for row in table.values()) + " |")
print("\n" + "\n".join(lines))
