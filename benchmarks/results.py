"""Tables of the READMEs, from the evaluation.json of runs that differ only in their seed.

    python benchmarks/results.py NAME RUN [RUN ...]     # into results.json and into the READMEs
    python benchmarks/results.py networks RUN ...       # only the tables of functional networks
    python benchmarks/results.py                        # from results.json into the READMEs

In README.md or benchmarks/README.md, tables stand below a line `<!-- results: NAME -->`, or, with
some columns only, `<!-- results: NAME: R2, MAE -->`. They show the mean over the runs, the standard
deviation where it is at least 0.0005, and the best value of a column in bold. A test compares them
with results.json.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
READMES = HERE.parent / "README.md", HERE / "README.md"
LOWER_IS_BETTER = "MSE", "MAE"

def collect(name, runs):
    """{title: {method: {score: [mean, standard deviation]}}} over the runs' evaluation.json: the
    tables of functional networks if the name is "networks", else all others."""
    tables = [json.loads(Path(run, "evaluation.json").read_text())["tables"] for run in runs]
    collected = {}
    for title, table in tables[0].items():
        if title.startswith("functional networks") != (name == "networks"):
            continue
        collected[title] = {}
        for method, row in table.items():
            values = {name: [float("nan" if other[title][method][name] is None
                                   else other[title][method][name]) for other in tables]
                      for name in row}
            collected[title][method] = {name: [round(float(np.mean(each)), 4),
                                               round(float(np.std(each)), 4)]
                                        for name, each in values.items()}
    return collected

def cell(mean, deviation, best):
    text = "-" if mean != mean else f"{mean:.3f}"
    text = f"**{text}**" if best else text
    return text + (f" ± {deviation:.3f}" if deviation >= 0.0005 else "")

def markdown(tables, only=None):
    """The tables as Markdown; only: the columns to show."""
    lines = []
    for title, table in tables.items():
        columns = [name for name in next(iter(table.values())) if not only or name in only]
        best = {}
        for name in columns:
            means = [row[name][0] for row in table.values() if row[name][0] == row[name][0]]
            best[name] = min(means) if name in LOWER_IS_BETTER else max(means)
        lines += [f"| {title} | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
        for method, row in table.items():
            cells = [cell(*row[name], best=row[name][0] == best[name]) for name in columns]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)

def with_tables(text, results):
    """A README's text with the tables of results.json below their lines."""
    def with_table(found):
        line, name, only = found.groups()
        if name not in results:
            return found[0]
        return line + markdown(results[name], only and only.split(", ")).rstrip("\n") + "\n"
    return re.sub(r"(<!-- results: (\S+?)(?:: (.*))? -->\n)(?:\|.*\n|\n(?=\|))*", with_table, text)

def add_tables(more):
    """Add {name: tables} to results.json, and write all of it into the READMEs."""
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results |= more
    file.write_text(json.dumps(results, indent=1) + "\n")
    for readme in READMES:
        readme.write_text(with_tables(readme.read_text(encoding="utf-8"), results),
                          encoding="utf-8")

def main():
    if len(sys.argv) == 2:
        sys.exit(__doc__)
    name, runs = sys.argv[1:2], sys.argv[2:]
    add_tables({name[0]: collect(name[0], runs)} if runs else {})

if __name__ == "__main__":
    main()
