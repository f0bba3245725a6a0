"""How many participants does it take? BrainLM and the baselines, trained on 5 to 400 of them.

    python benchmarks/participants.py                                   # everything
    OMP_NUM_THREADS=1 python benchmarks/participants.py --seeds 0       # one part of it
    python benchmarks/participants.py --max_steps 1000 4000             # does longer training help?

The data are sample data of 100 parcels; the 50 validation participants are always the same. Each
run is a folder in runs/participants, and a complete one is not repeated. Prints tables of R2. Once
all runs of 2,000 steps are complete it writes the tables into results.json and the READMEs, and
`python benchmarks/pictures.py` draws them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import results

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sample_data

PARTICIPANTS, SEEDS, STEPS = [5, 20, 100, 400], [0, 1, 2], 2000
HEAD_STEPS = 200                        # of finetuning
# Title: the beginning of the name of its table in evaluation.json, and the score in that table.
MEASURES = {"masked patches": ("masked", "R2"), "forecasting 20 timepoints": ("forecast", "R2"),
            "1 timepoint ahead": ("forecast", "R2 at 1"),
            "2 timepoints ahead": ("forecast", "R2 at 2"),
            "3 timepoints ahead": ("forecast", "R2 at 3"), "age": ("Age", "R2")}

def run_folder(folder, participants, steps, seed):
    return folder / f"{participants}_participants_{steps}_steps_{seed}"

def pretrain_and_finetune(folder, participants, steps, seed):
    """Pretrain and finetune, unless this has been done."""
    data = folder / f"data_{participants}"
    if not Path(data, "train", "state.json").exists():
        sample_data.make_sample_data(data, num_train=participants, num_val=50, num_parcels=100)
    run = run_folder(folder, participants, steps, seed)
    paths = [f"--{split}_dataset_path={data / split}" for split in ("train", "val", "coords")]
    for command, flags in (("pretrain", ["--max_steps", str(steps)]),
                           ("finetune", ["--max_steps", str(HEAD_STEPS),
                                         "--model_name_or_path", run / "pretrain"])):
        if not Path(run, command, "evaluation.json").exists():         # written at the end
            subprocess.run([sys.executable, ROOT / "brainlm.py", command, *flags, *paths,
                            "--seed", str(seed), "--output_dir", run / command,
                            "--eval_steps", "0", "--save_steps", "500", "--logging_steps", "500"],
                           check=True, stdout=subprocess.DEVNULL)

def collect(folder, steps):
    """{title: {method: {"5 participants": [mean, standard deviation]}}} of the complete runs."""
    tables = {}
    for title, (task, score) in MEASURES.items():
        table = tables[f"R2 of {title}"] = {}
        command = "finetune" if task == "Age" else "pretrain"
        for participants in PARTICIPANTS:
            runs = [run_folder(folder, participants, steps, seed) for seed in SEEDS]
            files = [run / command / "evaluation.json" for run in runs]
            rows = [rows for file in files if file.exists()
                    for name, rows in json.loads(file.read_text())["tables"].items()
                    if name.startswith(task)]
            for method in rows[0] if rows else []:
                values = [each[method][score] for each in rows]
                table.setdefault(method, {})[f"{participants} participants"] = [
                    round(float(np.mean(values)), 4), round(float(np.std(values)), 4)]
    return {title: table for title, table in tables.items() if table}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--participants", nargs="+", type=int, choices=PARTICIPANTS,
                        default=PARTICIPANTS, help="training participants (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS,
                        help="random seeds (default: %(default)s)")
    parser.add_argument("--max_steps", nargs="+", type=int, default=[STEPS],
                        help="steps of pretraining (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/participants"),
                        help="folder for data and runs (default: %(default)s)")
    args = parser.parse_args()
    for steps in args.max_steps:
        for seed in args.seeds:
            for participants in args.participants:
                pretrain_and_finetune(args.output_dir, participants, steps, seed)
                print(f"{participants} participants, {steps} steps, seed {seed}: done", flush=True)
        tables = collect(args.output_dir, steps)
        print(f"\n{steps} steps\n\n{results.markdown(tables)}")
        runs = list(args.output_dir.glob(f"*_{steps}_steps_*/finetune/evaluation.json"))
        if steps == STEPS and len(runs) == len(PARTICIPANTS) * len(SEEDS):
            results.add_tables({"participants": tables})

if __name__ == "__main__":
    main()
