"""How many people does it take? BrainLM and its opponents on sample data of more and more people.

    python benchmarks/people.py                                 # all of it
    OMP_NUM_THREADS=1 python benchmarks/people.py --seeds 0     # a part, another beside it
    python benchmarks/people.py --max_steps 1000 4000           # does longer training help?

The people to validate on are the same ones. Each run is a folder in runs/people, and what is
complete there is not run again. Prints tables of R2; when all runs are complete (of 2,000 steps) it
puts them into results.json and the READMEs, and `python benchmarks/pictures.py` draws them.
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

PEOPLE, SEEDS, STEPS = [5, 20, 100, 400], [0, 1, 2], 2000
HEAD_STEPS = 200                        # as many as of 100 people by default
MEASURES = {"masked patches": ("masked", "R2"), "forecasting 20 timepoints": ("forecast", "R2"),
            "1 timepoint ahead": ("forecast", "R2 at 1"),
            "2 timepoints ahead": ("forecast", "R2 at 2"),
            "3 timepoints ahead": ("forecast", "R2 at 3"), "age": ("Age", "R2")}

def pretrain_and_finetune(folder, people, steps, seed):
    """Pretrain and finetune, unless it has been done."""
    data = folder / f"data_{people}"
    if not Path(data, "train", "state.json").exists():
        sample_data.make_sample_data(data, num_train=people, num_val=50, num_parcels=100)
    run = run_folder(folder, people, steps, seed)
    paths = [f"--{split}_dataset_path={data / split}" for split in ("train", "val", "coords")]
    for command, flags in (("pretrain", ["--max_steps", str(steps)]),
                           ("finetune", ["--max_steps", str(HEAD_STEPS),
                                         "--model_name_or_path", run / "pretrain"])):
        if not Path(run, command, "evaluation.json").exists():         # is written at the end
            subprocess.run([sys.executable, ROOT / "brainlm.py", command, *flags, *paths,
                            "--seed", str(seed), "--output_dir", run / command,
                            "--eval_steps", "0", "--save_steps", "500", "--logging_steps", "500"],
                           check=True, stdout=subprocess.DEVNULL)

def run_folder(folder, people, steps, seed):
    return folder / f"{people}_people_{steps}_steps_{seed}"

def collect(folder, steps):
    """{title: {method: {"5 people": [mean, standard deviation]}}} of all runs that are complete."""
    tables = {}
    for title, (task, score) in MEASURES.items():
        tables[title] = {}
        for people in PEOPLE:
            runs = [run_folder(folder, people, steps, seed) for seed in SEEDS]
            files = [run / ("finetune" if task == "Age" else "pretrain") / "evaluation.json"
                     for run in runs]
            content = [json.loads(file.read_text()) for file in files if file.exists()]
            of_task = [table for each in content for name, table in each["tables"].items()
                       if name.startswith(task)]
            for method in of_task[0] if of_task else []:
                values = [table[method][score] for table in of_task]
                tables[title].setdefault(method, {})[f"{people} people"] = [
                    round(float(np.mean(values)), 4), round(float(np.std(values)), 4)]
    return {f"R2 of {title}": table for title, table in tables.items() if table}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", nargs="+", type=int, choices=PEOPLE, default=PEOPLE)
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--max_steps", nargs="+", type=int, default=[STEPS])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/people"))
    args = parser.parse_args()
    for steps in args.max_steps:
        for seed in args.seeds:
            for people in args.people:
                pretrain_and_finetune(args.output_dir, people, steps, seed)
                print(f"{people} people, {steps} steps, seed {seed}: done", flush=True)
        tables = collect(args.output_dir, steps)
        print(f"\n{steps} steps\n\n{results.markdown(tables)}")
        runs = list(args.output_dir.glob(f"*_{steps}_steps_*/finetune/evaluation.json"))
        if steps == STEPS and len(runs) == len(PEOPLE) * len(SEEDS):
            results.add_tables({"people": tables})

if __name__ == "__main__":
    main()
