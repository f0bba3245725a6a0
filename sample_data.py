"""Write datasets for brainlm.py: synthetic data, your own files, or your own arrays.

    python sample_data.py                                  # synthetic data, in ./sample_data
    python sample_data.py --source files --input_dir DIR --coords atlas.tsv --output_dir my_data

    from sample_data import write_dataset                  # arrays of (timepoints, parcels)
    write_dataset("my_data/train", {"Recording": [array_1, array_2], "Age": [61.5, None]})
"""
import argparse
import contextlib
import csv
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import re
import shlex
import tempfile
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

RECORDING_COL = "Voxelwise_RobustScaler_Normalized_Recording"

# Writing a dataset --------------------------------------------------------------------------------

NUMERIC = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()
HF_NAMES = {pa.string(): "string", pa.bool_(): "bool", pa.null(): "null",
            **{pa.from_numpy_dtype(name): name for name in NUMERIC}}

def write_dataset(folder, columns):
    """Write a dataset in the layout of `datasets.Dataset.save_to_disk`.

    `columns` is a dict of name -> one value per row, or an iterable of rows, each a dict of name ->
    value; a generator of rows keeps only one row in memory. Values are strings, ints, floats, bools
    or arrays (timepoints, parcels) of numpy, torch or pandas, which keep their dtype and may differ
    in length; None, NaN and masked values are missing. An older dataset in `folder` is replaced
    when the new one is complete. Only one process at a time may write to a folder.
    """
    folder = Path(folder).expanduser().resolve()
    present = os.listdir(folder) if folder.exists() else []
    if present and "state.json" not in present:
        raise ValueError(f"{folder} is not a dataset: it holds {present[0]}; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)

    # Write to a temporary folder and rename it, so that a killed process leaves no partial dataset.
    with (tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside,
          open(Path(beside, "arrays"), "w+b") as disk):
        if not hasattr(columns, "items"):
            columns = columns_of([{name: on_disk(value, disk) for name, value in row.items()}
                                  for row in columns])
        columns = {name: [*as_numpy(values)] for name, values in columns.items()}
        lengths = {name: len(values) for name, values in columns.items()}
        if len({*lengths.values()}) != 1 or 0 in lengths.values():
            raise ValueError(f"expected columns of one length, at least 1; found {lengths}")
        types = {name: column_type(name, values) for name, values in columns.items()}
        features = {name: hf_feature(type_) for name, type_ in types.items()}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        schema = pa.schema(list(types.items()), metadata)
        new, shard = Path(beside, "new"), "data-00000-of-00001.arrow"
        new.mkdir()
        with pa.ipc.new_stream(new / shard, schema) as stream:
            for i in range(0, max(lengths.values()), 16):
                batch = [column_values(columns[name][i:i + 16], types[name]) for name in types]
                stream.write_batch(pa.record_batch(batch, schema=schema))
        content = hashlib.sha256()
        with open(new / shard, "rb") as file:
            while chunk := file.read(2 ** 20):
                content.update(chunk)
        state = {"_data_files": [{"filename": shard}],
                 "_fingerprint": content.hexdigest()[:16],  # `datasets` names its cache after this
                 "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
                 "_output_all_columns": False, "_split": None}
        (new / "state.json").write_text(json.dumps(state, indent=2))
        (new / "dataset_info.json").write_text(json.dumps({"features": features}, indent=2))
        if folder.exists():
            folder.rename(Path(beside, "old"))
        new.rename(folder)

def columns_of(rows):
    """Convert rows, dicts of name -> value, to a dict of name -> values, with None for missing."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}

def on_disk(value, file):
    """Move an array to an open file: return a function that loads it. Return other values as is."""
    value = as_numpy(value)
    if not isinstance(value, np.ndarray):
        return value
    start = file.seek(0, os.SEEK_END)
    np.save(file, value)

    def read():
        file.seek(start)
        return np.load(file)
    return read

@contextlib.contextmanager
def input_errors(what):
    """Turn any exception into a ValueError with a one-line message that starts with `what`."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ImportError):
            message += f": pip install {error.name}"
        raise ValueError(f"{what}: {message}") from None

def as_numpy(value):
    """Convert values of torch, pandas, numpy.ma and `on_disk` to numpy; return others as is."""
    if callable(value):
        return value()
    if isinstance(value, np.ma.MaskedArray):
        if value.ndim < 2:
            return value.tolist()  # None where masked
        return value.astype(np.result_type(value, np.float16)).filled(np.nan)
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()[()]  # [()] turns an array of one number into a number
    return value.to_numpy() if hasattr(value, "to_numpy") else value

def column_type(name, values):
    """The Arrow type of a whole column, because a batch could contain only None."""
    first = next((value for value in map(as_numpy, values) if value is not None), None)
    if isinstance(first, np.ndarray):
        for row, value in enumerate(map(as_numpy, values)):
            shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", None)
            usable = len(shape) == 2 and 0 not in shape and dtype.name in NUMERIC
            if not usable or dtype != first.dtype:
                raise ValueError(f"column {name!r}, row {row} is {dtype} of shape {shape}; need "
                                 "arrays (timepoints, parcels) of one numeric dtype")
        return pa.list_(pa.list_(pa.from_numpy_dtype(first.dtype.name)))
    with input_errors(f"column {name!r}"):
        values = [as_numpy(value) for value in values]
        type_ = pa.array(values, from_pandas=True).type  # NaN among strings is missing
    if type_ not in HF_NAMES:
        raise ValueError(f"column {name!r} is {type_}; expected 2-D arrays, strings or numbers")
    return type_

def column_values(values, type_):
    """Convert one batch of a column to an Arrow array."""
    values = [as_numpy(value) for value in values]
    if not pa.types.is_list(type_):
        return pa.array(values, type_, from_pandas=True)
    dtype = HF_NAMES[type_.value_type.value_type]
    timepoints = [list(np.ascontiguousarray(value, dtype)) for value in values]
    return pa.array(timepoints, type_)  # a list of 1-D arrays is faster than lists of numbers

def hf_feature(type_):
    """The feature in `datasets` for an Arrow type; all its versions know "Sequence"."""
    if pa.types.is_list(type_):
        return {"feature": hf_feature(type_.value_type), "_type": "Sequence"}
    return {"dtype": HF_NAMES[type_], "_type": "Value"}

def robust_scale(recording, nan="raise", warn=None):
    """Scale (timepoints, parcels) to float32 with median 0 and interquartile range 1 per parcel.

    A parcel without signal (interquartile range at most a millionth of its largest value) is set to
    zero and reported through `warn`, by default `warnings.warn`. So is, with nan="zero", a parcel
    with NaN, masked or infinite values, or values of 1e30 or more; with nan="raise" they raise.
    """
    recording = np.asarray(as_numpy(recording))
    if recording.ndim != 2 or recording.size == 0 or recording.dtype.kind not in "biuf":
        raise ValueError("expected a numeric array (timepoints, parcels), found "
                         f"{recording.dtype} {recording.shape}")
    recording = recording.astype(np.result_type(recording, np.float32))  # integers would overflow
    broken = ~(abs(recording) < 1e30)  # NaN too; differences of larger numbers could overflow
    if nan != "zero" and broken.any():
        timepoint, parcel = np.argwhere(broken)[0]
        raise ValueError(f"timepoint {timepoint}, parcel {parcel} is {recording[timepoint, parcel]}"
                         "; interpolate it, or pass nan='zero' to set the parcel to zero")
    recording[:, broken.any(axis=0)] = 0
    low, median, high = np.percentile(recording, [25, 50, 75], axis=0)
    silent = high - low <= 1e-6 * abs(recording).max(axis=0)
    scaled = (recording - median) / np.where(silent, 1, high - low)
    scaled[:, silent] = 0
    if silent.any():
        parcels = ", ".join(map(str, np.flatnonzero(silent)))
        warn = warn or partial(warnings.warn, stacklevel=2)
        warn(f"parcels {parcels} have no signal or missing values and are set to zero")
    return scaled.astype(np.float32)

# Synthetic recordings -----------------------------------------------------------------------------

TR = 0.735  # seconds between timepoints, as in UK Biobank
NETWORKS, SMOOTH_NOISE, WHITE_NOISE = 0.45, 0.20, 0.35  # fractions of a parcel's variance

# Centres of each network's patches in the right hemisphere, in MNI mm; the left one mirrors it.
PATCHES = {
    "Visual": [(10, -90, 5), (35, -80, -8)],
    "Somatomotor": [(38, -25, 58), (58, -8, 18)],
    "DorsalAttention": [(25, -60, 60), (28, -2, 60)],
    "VentralAttention": [(58, -38, 28), (38, 18, 0), (8, 8, 50)],
    "Limbic": [(35, 5, -32), (18, 42, -18)],
    "Frontoparietal": [(42, 38, 22), (45, -50, 48)],
    "Default": [(8, 55, 15), (8, -52, 28), (46, -66, 30), (58, -15, -18)],
}

def make_sample_data(output_dir, num_train=100, num_val=20, num_parcels=424, num_timepoints=500,
                     seed=0):
    """Write synthetic recordings, {train,val,coords}, with three kinds of structure to learn.

    Space: parcels in the patches of a network (7 networks, each in both hemispheres) share most of
    their signal, and neighbouring parcels share smooth noise. A third of the variance is white.
    Time: networks have their power at 0.01 to 0.1 Hz, so the past predicts the next few seconds.
    Age, 45 to 80 years: (a) with age, the cutoff of the networks' spectrum rises from about 0.04 to
    0.085 Hz, which does not change correlations between parcels; (b) the patches of the Default
    network become less correlated, which does. Clinical scores correlate with each other and weakly
    with age; one in ten is missing.
    A recording depends only on `seed`, its split and its number, not on the number of recordings.
    """
    if min(num_train, num_val) < 1 or num_parcels < 2 or num_timepoints < 20 or seed < 0:
        raise ValueError(f"{num_train=}, {num_val=}, {num_parcels=}, {num_timepoints=}, {seed=} "
                         "must be at least 1, 1, 2, 20 and 0")
    brain = make_brain(num_parcels, np.random.default_rng([seed, 0, 0]))
    write_dataset(Path(output_dir, "coords"), {
        "Index": list(range(num_parcels)), **dict(zip("XYZ", brain["xyz"].T)),
        "Network": brain["network"]})
    for stream, split, count in (2, "val", num_val), (1, "train", num_train):  # train is last
        write_dataset(Path(output_dir, split), (
            {"Subject": f"{split}-{i:04d}",
             **make_person(brain, num_timepoints, np.random.default_rng([seed, stream, i]))}
            for i in range(count)))
    print(f"wrote {output_dir}/{{train,val,coords}}: {num_train} + {num_val} synthetic recordings "
          f"of {num_timepoints} timepoints x {num_parcels} parcels")

def make_brain(num_parcels, rng):
    """Everything that all participants share: parcels, networks and their spatial weights."""
    # Jittered Fibonacci lattice on an ellipsoid for the right hemisphere; the left one mirrors it.
    half = (num_parcels + 1) // 2
    y, turn = 1 - (2 * np.arange(half) + 1) / half, np.pi * (3 - 5 ** 0.5) * np.arange(half)
    ring = np.sqrt(1 - y ** 2)
    sphere = np.stack([ring * np.cos(turn), y, ring * np.sin(turn)], 1)
    right = [35, -18, 15] + [30, 80, 52] * sphere
    xyz = np.concatenate([right * [-1, 1, 1], right])[:num_parcels]
    xyz = xyz + 1.5 * rng.standard_normal((num_parcels, 3))
    folded = np.where([True, False, False], abs(xyz), xyz)  # homologous parcels coincide

    centres = np.concatenate(list(PATCHES.values()))
    network_of_patch = np.repeat(np.arange(len(PATCHES)), [len(p) for p in PATCHES.values()])
    patch_of_parcel = closeness(folded, centres, 50).argmax(1)
    across, nearby = closeness(folded, folded, 8), closeness(xyz, xyz, 12)
    neighbours = np.argsort(-nearby, axis=1)[:, :10]
    loadings = [across[:, patch_of_parcel == patch].sum(1) for patch in range(len(centres))]
    return {"xyz": xyz, "network_of_patch": network_of_patch,
            "network": [list(PATCHES)[k] for k in network_of_patch[patch_of_parcel]],
            "across": unit_rows(across), "loadings": unit_rows(np.stack(loadings, 1)),
            "neighbours": neighbours,
            "nearness": unit_rows(np.take_along_axis(nearby, neighbours, 1))}

def make_person(brain, num_timepoints, rng):
    """One participant's row: age, clinical scores and recording (timepoints, parcels)."""
    age = rng.uniform(45, 80)
    older = (age - 62.5) / 17.5  # -1 to 1
    cutoff = 0.057 * np.exp(0.4 * older + 0.06 * rng.standard_normal())  # Hz
    network_of_patch = brain["network_of_patch"]
    num_parcels, num_patches = brain["loadings"].shape

    networks = time_courses(1 + len(PATCHES), num_timepoints, cutoff, rng)
    networks = 0.1 ** 0.5 * networks[:1] + 0.9 ** 0.5 * networks[1:]  # correlated
    coupling = np.full((num_patches, 1), 0.7, np.float32)  # a patch with its network
    default = network_of_patch == list(PATCHES).index("Default")
    coupling[default] = np.clip(0.6 - 0.25 * older + 0.06 * rng.standard_normal(), 0, 1)
    patches = (np.sqrt(coupling) * networks[network_of_patch]
               + np.sqrt(1 - coupling) * time_courses(num_patches, num_timepoints, cutoff, rng))

    # einsum instead of @, because the last bits of a BLAS product depend on the number of threads.
    own = rng.standard_normal((num_parcels, num_patches), np.float32)
    own = np.einsum("vw,wp->vp", brain["across"], own)
    signal = np.einsum("vp,pt->vt", unit_rows(brain["loadings"] + 0.1 * own), patches)
    noise = time_courses(num_parcels, num_timepoints, 0.06, rng)
    smooth = sum(weight[:, None] * noise[k]
                 for k, weight in zip(brain["neighbours"].T, brain["nearness"].T))
    white = rng.standard_normal((num_parcels, num_timepoints), np.float32)
    recording = NETWORKS ** 0.5 * signal + SMOOTH_NOISE ** 0.5 * smooth + WHITE_NOISE ** 0.5 * white

    distress = rng.standard_normal() - 0.2 * older
    scores = {name: min(least + int(rng.poisson(np.exp(0.9 + 0.7 * distress))), most)
              for name, least, most in (("PHQ9.Severity", 0, 27), ("PCL.Score", 5, 25),
                                        ("GAD7.Severity", 0, 21), ("Neuroticism", 0, 12))}
    for name in "Depressed.At.Baseline", "Self.Harm.Ever", "Not.Worth.Living":
        scores[name] = int(distress + rng.standard_normal() > 1.2)
    scores = {name: None if rng.random() < 0.1 else score for name, score in scores.items()}
    return {"Age.At.MHQ": round(age, 2), **scores, RECORDING_COL: robust_scale(recording.T)}

def time_courses(count, num_timepoints, cutoff, rng):
    """Signals [count, timepoints] of unit variance with power from 0.01 to about `cutoff` Hz."""
    length = 64 * (num_timepoints // 64 + 3)  # longer, because the inverse FFT is periodic
    f = np.fft.rfftfreq(length, TR)
    amplitude = f / np.hypot(f, 0.01) / (1 + (f / cutoff) ** 2)
    amplitude *= length / (2 * np.linalg.norm(amplitude))
    noise = rng.standard_normal((count, len(f), 2), np.float32).view(np.complex64)[..., 0]
    return np.fft.irfft(noise * amplitude.astype(np.float32), length)[:, :num_timepoints]

def closeness(a, b, width):
    """Gaussian kernel [n, m] of the distances in mm between points a [n, 3] and b [m, 3]."""
    return np.exp(-0.5 * ((a[:, None] - b) ** 2).sum(-1) / width ** 2).astype(np.float32)

def unit_rows(matrix):
    """Scale rows of weights so that weighted sums of independent signals keep unit variance."""
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)

# Surrogate recordings -----------------------------------------------------------------------------

def surrogate(recordings, rng):
    """A phase-randomised mixture of two recordings, float32 (timepoints, parcels).

    Draws two recordings (possibly the same one twice) and rotates each Fourier component by a
    random angle that is equal for all parcels, which preserves spectra and correlations (Prichard
    and Theiler 1994, Phys. Rev. Lett. 73, 951). With few recordings it reduces overfitting.
    """
    pair = [np.asarray(recordings[i]) for i in rng.integers(len(recordings), size=2)]
    num_timepoints, angle, mixture = min(map(len, pair)), rng.uniform(0, np.pi / 2), 0
    for recording, weight in zip(pair, (np.cos(angle), np.sin(angle))):
        recording = recording[:num_timepoints]
        components = np.fft.rfft(recording - recording.mean(axis=0), axis=0)
        rotations = np.exp(2j * np.pi * rng.random((len(components), 1)))
        mixture = mixture + weight * np.fft.irfft(components * rotations, num_timepoints, axis=0)
    return mixture.astype(np.float32)

# Files of your own --------------------------------------------------------------------------------

FORMATS = ".tsv .csv .txt .1D .npy .ptseries.nii"  # in any case, each with or without .gz
FORMAT = re.compile(rf"({'|'.join(map(re.escape, FORMATS.split()))})(\.gz)?$", re.IGNORECASE)
BIDS = "^(sub-[0-9A-Za-z]+)(_(?!sub-)[a-z]+-[^_]+)*(_[a-z]+[0-9]?)?$"  # label, entities, suffix
XCP_D = {"network_label": "network", "roi name": "label"}  # column names in its atlases
MISSING = "", "n/a", "na", "nan", "null", "none"  # cells without a value, in any case
MISSING_CODES = 99, 777, 888, 999, 8888, 9999  # and their negatives, common codes for n/a
WINDOW, PATCH = 200, 20  # defaults of brainlm.py, in timepoints
FEW = 50  # with fewer recordings, the default of 8 epochs is less than 200 steps

def make_files_data(input_dir, coords, participants, output_dir, pattern, subject_pattern, header,
                    val_fraction, min_timepoints, tr, seed):
    """Write {train,val,coords} from files of (timepoints, parcels); the arguments are the flags."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction must be between 0 and 1 (got {val_fraction})")
    if min_timepoints < PATCH:
        raise ValueError(f"--min_timepoints must be at least {PATCH} (got {min_timepoints})")
    if tr is not None and not tr > 0:
        raise ValueError(f"--tr must be above 0 seconds (got {tr})")
    input_dir, coords, output_dir, participants = (
        path and Path(path).expanduser() for path in (input_dir, coords, output_dir, participants))
    with input_errors(coords):
        parcels, labellings = read_parcels(coords)
    with input_errors(participants):
        table = read_participants(participants) if participants else {}
    files = find_files(input_dir, pattern, [coords, participants or coords])
    labelled_files = find_participants(files, input_dir, subject_pattern)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output_dir.parent) as disk:
        rows, lengths, short, unmatched, first, trs = [], [], [], 0, None, Counter()
        for file, subject, session in labelled_files:
            with input_errors(file):
                names, series, file_tr = read_series(file, header, labellings, len(parcels["X"]))
                first = first or (file, names)
                if not labellings and names != first[1]:
                    raise ValueError(f"columns are named {listed(names)}, but in {first[0]} "
                                     f"{listed(first[1])}; use one order, or add a column with "
                                     f"these names to {coords}")
                if len(series) < min_timepoints:
                    short.append(len(series))
                elif (recording := cleaned(series, file)) is not None:
                    row = participant_row(table.get(plain(subject), []), session)
                    unmatched += row is None
                    trs[file_tr] += 1
                    row = {**(row or {}), "Subject": subject, "File": str(file)}
                    if file_tr or tr:
                        row["TR"] = file_tr or tr
                    rows.append({**row, RECORDING_COL: on_disk(recording, disk)})
                    lengths.append(len(recording))

        subjects = sorted({row["Subject"] for row in rows})
        report = (f"{len(files)} files match --pattern {pattern!r}; {len(short)} are shorter than "
                  f"--min_timepoints {min_timepoints} ({listed(short)}); {len(rows)} are used, of "
                  f"{len(subjects)} participants ({listed(subjects)})")
        if len(subjects) < 2:
            raise ValueError(f"{report}; training and validation need at least two participants")
        print(report)
        if subject_pattern and len(subjects) >= len(rows) - 1:
            print(f"note: --subject_pattern finds {len(subjects)} participants in {len(rows)} "
                  "files; check that no participant has two labels")
        if len({each or tr for each in trs} | {tr or next(iter(trs))}) > 1:
            found = ", ".join(f"{each or 'unknown'} in {trs[each]} files" for each in trs)
            print(f"note: the TR differs: --tr is {tr}, headers have {found}; column TR holds the "
                  "header's. The model does not know the TR, so convert only files of one TR")
        if first[1] and not labellings:
            print(f"note: no column of {coords} names the parcels; its rows must be in the order "
                  f"of the columns of the files ({listed(first[1])})")
        if participants:
            absent = sorted(table.keys() - {plain(subject) for subject in subjects})
            report = (f"{participants}: {unmatched} of {len(rows)} recordings have no row; "
                      f"{len(absent)} of {len(table)} participants have no recording "
                      f"({listed(absent)})")
            if unmatched == len(rows):
                raise ValueError(report)
            print(report)

        # All recordings of a participant belong to the same split.
        num_val = min(max(1, round(val_fraction * len(subjects))), len(subjects) - 1)
        in_val = {*np.random.default_rng(seed).permutation(subjects)[:num_val]}
        write_dataset(output_dir / "coords", parcels)
        blank = dict.fromkeys(name for row in rows for name in row)
        for split in "val", "train":
            chosen = [blank | row for row in rows if (row["Subject"] in in_val) == (split == "val")]
            write_dataset(output_dir / split, columns_of(chosen))
    program = shlex.quote(os.path.relpath(Path(__file__).with_name("brainlm.py")))
    data = shlex.quote(str(output_dir))
    window = min(WINDOW, min(lengths) // PATCH * PATCH)
    steps = "--max_steps 200 " if len(chosen) < FEW else ""
    print(f"wrote {output_dir}/{{train,val,coords}}: {len(subjects) - num_val} participants to "
          f"train and {num_val} to validate. Next:\n\npython {program} pretrain "
          f"--train_dataset_path {data}/train --val_dataset_path {data}/val "
          f"--coords_dataset_path {data}/coords "
          f"--num_timepoints_per_voxel {window} {steps}--output_dir runs/mine")

def listed(names):
    """The first three items, for a message."""
    names = [str(name) or "''" for name in names or ["none"]]
    return ", ".join(names[:3]) + " ..." * (len(names) > 3)

def find_files(folder, pattern, tables):
    """The files below a folder whose paths end in a pattern; **/ matches up to 8 folders."""
    tables = [Path(table).resolve() for table in tables]
    there = [file for file in visible_files(folder, set()) if file.resolve() not in tables]
    patterns = [pattern.replace("**/", "*/" * folders) for folders in range(9)]
    picked = [file for file in there if any(map(file.relative_to(folder).match, patterns))]
    files = [file for file in picked if FORMAT.search(file.name)]
    others = [file.name for file in picked if not FORMAT.search(file.name)]
    if others:
        print(f"{len(others)} files are ignored, as they are not {FORMATS} (.gz): {listed(others)}")
    if not files:
        raise ValueError(f"{folder}: no file matches --pattern {pattern!r} and ends in {FORMATS}; "
                         f"found {listed([file.name for file in picked or there])}")
    return files

def visible_files(folder, seen):
    """All files below a folder, except hidden ones; follows links, but visits no folder twice."""
    if folder.resolve() not in seen:
        seen.add(folder.resolve())
        for path in sorted(path for path in folder.iterdir() if path.name[0] != "."):
            yield from visible_files(path, seen) if path.is_dir() else [path]

def find_participants(files, folder, pattern):
    """[(file, label, session or "")]: sub-<label>, or the group of a pattern, and ses-<label>."""
    with input_errors(f"--subject_pattern {pattern}"):
        if pattern and re.compile(pattern).groups != 1:
            raise ValueError("expected a regular expression with one group in ( )")
    paths = [FORMAT.sub("", file.relative_to(folder).as_posix()) for file in files]
    found, written = [], {}
    for file, path in zip(files, paths):
        parts = [path] if pattern else re.findall("[^/]*(?<![A-Za-z])sub-[^/]*", path)
        labels = {match and match[1] for match in map(re.compile(pattern or BIDS).search, parts)}
        sessions = {*re.findall("(?<![^/_])ses-([0-9A-Za-z]+)", path)} or {""}
        if len(labels) != 1 or not all(labels) or len(sessions) > 1:
            raise ValueError(f"{file}: cannot find one participant and at most one session; "
                             "expected sub-<label>_key-value_suffix and ses-<label>; or pass "
                             f"--subject_pattern (now {pattern}), as {example(path, paths)}")
        label, = labels
        other = written.setdefault(plain(label), label)
        if other != label:
            raise ValueError(f"{other} and {label} may be one participant or two; rename files or "
                             "pass --subject_pattern")
        found.append((file, label, plain(*sessions)))

    counts, numbers = Counter(label for _, label, _ in found), [*map(longest_number, paths)]
    (label, most), = counts.most_common(1)
    if pattern and len({*numbers}) == len(files) and (2 * len(counts) <= len(files) or most > 9):
        print(f"note: --subject_pattern {pattern} finds {len(counts)} participants in {len(files)} "
              f"files ({label} in {most}), but the longest numbers in their names all differ "
              f"({listed(numbers)}); to use these, pass {example(paths[0], paths)}")
    return found

def longest_number(path):
    """The longest run of digits in a path, or ""."""
    return max(re.findall("[0-9]+", path), key=len, default="")

def example(path, paths):
    """Propose a --subject_pattern that matches a name up to its longest number, for all paths."""
    digits = min(filter(None, map(len, map(longest_number, paths))), default=0)
    pattern = f"(?:^|/)([^/]*?[0-9]{{{digits},}})" if digits else "(?:^|/)([^/_]+)"
    label = re.search(pattern, path)
    return shlex.quote(pattern) + (f" for {label[1]}" if label else "")

def plain(label):
    """A label without sub- or ses- and without leading zeros, which spreadsheets remove."""
    return re.sub("^(sub-|ses-)?0*(?=.)", "", label)

def read_bytes(file):
    """The content of a file, decompressed."""
    with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as content:
        return content.read()

def read_rows(file, num_parcels=None, labellings=()):
    """The rows of a table, as lists of text, and its comments, the lines that start with #."""
    content = read_bytes(file)
    if content[:4] in (b"PK\3\4", b"\xd0\xcf\x11\xe0"):
        raise ValueError("this is an Excel workbook, not text; save it as .csv or .tsv")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1")
    lines = [line.strip(" \n") for line in io.StringIO(text.strip("\r\n"), newline=None)]
    comments = [line for line in lines if line.startswith("#")]
    lines = [line for line in lines if not line.startswith("#")]
    if not any(lines):
        raise ValueError("the file has no rows")
    separator = next((mark for mark in "\t;," if mark in lines[0]), None)
    rows = (csv.reader(lines, delimiter=separator, skipinitialspace=True) if separator
            else map(str.split, lines))
    rows = [[*map(str.strip, row)] for row in rows]
    # Remove empty last columns, from a separator at the end of every line.
    while len(rows) > 1 and all(row[-1:] == [""] for row in rows[1:]):
        width = len(rows[1])
        name = "".join(rows[0][width - 1:])
        if width == num_parcels or name and any(name in labels for labels in labellings):
            break  # the column is a parcel without values
        if name:
            print(f"note: {file}: column {name} is empty and ignored")
        for row in rows:
            del row[width - 1:]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise ValueError(f"row {number} has {len(row)} cells, but row 1 has {len(rows[0])}")
    return rows, comments

def to_number(cell):
    """Convert text to a float, NaN if the value is missing, or None if it is other text."""
    try:
        return None if "_" in cell else float(cell)  # float() accepts 1_000
    except ValueError:
        return math.nan if cell.lower() in MISSING else None

def numbers(rows, names, first_row=1):
    """Convert rows of text to float64, with NaN for missing values; other text raises."""
    commas = [cell for row in rows for cell in row if "," in cell]
    thousands = all(re.fullmatch(r"[-+]?[1-9]\d{0,2}(,\d{3})+", cell) for cell in commas)
    if not thousands and not any("." in cell for row in rows for cell in row):
        rows = [[cell.replace(",", ".") for cell in row] for row in rows]
    values = [[*map(to_number, row)] for row in rows]
    for i, row in enumerate(values):
        if None in row:
            j = row.index(None)
            raise ValueError(f"row {i + first_row}, column {names[j]}: {rows[i][j]!r} is no number;"
                             " use numbers or n/a, all decimals with points or all with commas")
    return np.array(values, np.float64).reshape(-1, len(names))

def column_numbers(cells):
    """Convert a column of text to float64, or to None if it contains other text."""
    try:
        return numbers([cells], cells)[0]
    except ValueError:
        return None

def is_whole(values):
    """Whether all values are integers or NaN."""
    return not (values % 1 > 0).any()

def has_header(names, values, labellings):
    """Whether the first row, given as text and in `values`, holds names rather than a timepoint."""
    if any({*names} >= {*labels} for labels in labellings):
        return True
    ids = values[0, int(names[0] == ""):]  # pandas writes an empty name for its index
    ids = ids[~np.isnan(ids)]
    whole = 2 * len(ids) > len(names) and is_whole(ids) and len({*ids}) == len(ids)
    if whole and is_whole(values[1:]):
        raise ValueError(f"row 1 ({listed(names)}) may be names or values; pass --header yes or no")
    return whole

def names_in_comments(comments, width, labellings):
    """Names of columns in a comment such as "#2001 #2002": one per column, or of most parcels."""
    for line in comments:
        names = re.findall('[^\\s#;,"]+', line)
        if len(names) == width or any(2 * len({*names} & {*labels}) > len(labels)
                                      for labels in labellings):
            return names
    return []

def read_text_series(file, header, labellings, num_parcels):
    """The names of the columns, [] if there are none, and the values [timepoints, columns]."""
    rows, comments = read_rows(file, num_parcels, labellings)
    column, width = [row[0] for row in rows], len(rows[0])
    if any({*labels} in ({*column}, {*column[1:]}) for labels in labellings):
        raise ValueError("column 1 names the parcels; transpose the file: rows are timepoints")
    in_comment = names_in_comments(comments, width, labellings)
    if header == "yes" and not in_comment or header == "auto" and column_numbers(rows[0]) is None:
        names, values = rows[0], numbers(rows[1:], rows[0], first_row=2)
    else:
        names, values = in_comment, numbers(rows, range(1, width + 1))
        if header == "no":
            names = []
        elif not names and has_header(rows[0], values, labellings):
            names, values = rows[0], values[1:]
    if names and len(names) != width:
        raise ValueError(f"{len(names)} names ({listed(names)}) do not fit {width} columns")
    counts = np.array_equal(values[:, 0], np.arange(len(values)))
    if width > num_parcels and (counts or names[:1] == [""]):  # index of pandas
        return names[1:], values[:, 1:]
    return names, values

def read_series(file, header, labellings, num_parcels):
    """Names of the columns in the file, values in the order of --coords, and TR in the header.

    Names are [] and the TR (seconds) None if missing; values are float64 [timepoints, parcels].
    """
    kind, names, tr = FORMAT.search(file.name)[1].lower(), [], None
    if kind == ".npy":
        series = np.load(io.BytesIO(read_bytes(file)))
        if series.ndim != 2 or series.dtype.kind not in "biuf":
            raise ValueError("expected numbers (timepoints, parcels), found "
                             f"{series.dtype} of shape {series.shape}")
    elif kind == ".ptseries.nii":
        import nibabel
        image = nibabel.Cifti2Image.from_bytes(read_bytes(file))
        time, parcels = image.header.get_axis(0), image.header.get_axis(1)
        series, names = image.get_fdata(), [*parcels.name]
        if getattr(time, "unit", "") == "SECOND" and time.step > 0:
            tr = round(float(time.step), 4)
    else:
        names, series = read_text_series(file, header, labellings, num_parcels)
    series = np.array(series, np.float64)
    for row, column in np.argwhere(abs(series) >= 1e30):
        raise ValueError(f"timepoint {row + 1}, column {column + 1} is {series[row, column]}; "
                         "write n/a where a value is missing")

    orders = [labels for labels in labellings if sorted(labels) == sorted(names)]
    counted = names == [str(i) for i in range(len(names))]  # default names of pandas
    if labellings and not orders and not counted:
        labels = max(labellings, key=lambda labels: len({*labels} & {*names}))
        lacking, surplus = Counter(labels) - Counter(names), Counter(names) - Counter(labels)
        raise ValueError(f"names do not match: parcels of --coords without a column: "
                         f"{listed([*lacking])}; columns without a parcel: {listed([*surplus])}; "
                         "correct them, or pass --header no if row 1 or a comment has no names")
    if series.shape[1] != num_parcels:
        hint = "; is the file transposed?" * (len(series) == num_parcels)
        raise ValueError(f"(timepoints, parcels) is {series.shape}, but --coords has {num_parcels} "
                         f"parcels{hint}")
    if any(labels != orders[0] for labels in orders):
        raise ValueError("two columns of --coords match the names, in two orders; remove one")
    if orders:
        series = series[:, [names.index(label) for label in orders[0]]]
    return names, series, tr

def cleaned(series, file):
    """Interpolate gaps in time and scale; return None if most timepoints have no values."""
    gaps = np.isnan(series).all(axis=1)
    if np.nansum(abs(series)):
        gaps = (np.isnan(series) | (series == 0)).all(axis=1)  # censored volumes can be zeros
    report = f"{file}: {gaps.sum()} of {len(series)} timepoints have no values (n/a or all zero)"
    if 2 * gaps.sum() > len(series):
        print(f"{report}, so the file is left out")
        return None
    if gaps.any():
        print(f"{report} and are interpolated")
    for signal in series.T:
        signal[gaps] = np.interp(np.flatnonzero(gaps), np.flatnonzero(~gaps), signal[~gaps])
    scaled = robust_scale(series, nan="zero", warn=lambda line: print(f"{file}: {line}"))
    if not scaled.any():
        raise ValueError("no parcel has a signal that varies")
    if (abs(scaled) > 50).any():
        print(f"note: {file}: {(abs(scaled) > 50).sum()} values are spikes, above 50 after scaling")
    if len(series) == series.shape[1]:
        print(f"note: {file} has as many rows as columns; rows are taken as timepoints")
    return scaled

def read_parcels(file):
    """The columns of the coords dataset, and a list of labels per column that can name parcels."""
    (names, *rows), _ = read_rows(file)
    kinds = [re.sub("_?mni_?", "", XCP_D.get(name.lower(), name.lower())) for name in names]
    axes = "xyz" if {*"xyz"} & {*kinds} else "ras"
    if axes == "xyz" and {*"ras"} <= {*kinds}:
        print(f"note: {file}: x, y, z are used; R, A, S are ignored")
    if [kinds.count(axis) for axis in axes] != [1, 1, 1] or len({*names}) < len(names):
        raise ValueError("expected columns x, y, z (or R, A, S) and no name twice; found "
                         f"{', '.join(names)}")
    table = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    axes = [names[kinds.index(axis)] for axis in axes]
    xyz = numbers([*zip(*(table[axis] for axis in axes))], axes, first_row=2)
    reach = abs(xyz).max(axis=1)  # at most 110 mm in a brain, in which some are negative
    for row in np.flatnonzero(~(reach < 200) | (reach < 1).all() | ~(xyz < 0).any()):
        raise ValueError(f"row {row + 2}: {', '.join(axes)} are {xyz[row].tolist()}; expected MNI "
                         "coordinates in mm for every parcel, not voxel indices or metres")
    parcels, labellings = dict(zip("XYZ", xyz.T)), []
    for kind, (name, cells) in zip(kinds, table.items()):
        twice = [cell for cell, count in Counter(cells).items() if count > 1]
        if kind == "label" and twice:
            raise ValueError(f"column {name}: {twice[0]!r} names several parcels; use unique names")
        if kind in ("label", "network"):
            missing = MISSING if kind == "network" else [""]  # NA may be the label of a parcel
            parcels[kind.title()] = [None if cell.lower() in missing else cell for cell in cells]
        named = [cell for cell in cells if cell.lower() not in MISSING]
        values = column_numbers(cells)
        if (name not in axes and (values is None or is_whole(values))
                and len({*named}) == len(named) >= len(cells) / 2):
            labellings.append([f"{name} '{cell}' of row {row}" if cell in twice else cell
                               for row, cell in enumerate(cells, start=2)])
    return parcels, labellings

def read_participants(file):
    """{label: [(session or "", {column: value}), ...]}, with a pair for each row of the table."""
    (names, *rows), _ = read_rows(file)
    reserved = [*names, "Subject", "File", RECORDING_COL]
    if "participant_id" not in names or len({*reserved}) < len(reserved):
        raise ValueError("expected participant_id, no name twice and no Subject or File; found "
                         f"{', '.join(names)}")
    text = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    table, participants = {}, {}
    for name, cells in text.items():
        numeric = column_numbers(cells)
        values = cells if numeric is None else numeric.tolist()
        table[name] = [None if cell.lower() in MISSING else value
                       for cell, value in zip(cells, values)]
        for value, count in {} if numeric is None else suspicious_values(numeric).items():
            print(f"note: {file}: column {name} is {value:g} in {count} rows, far from the other "
                  "values; if this means missing, write n/a")
    del table["participant_id"]
    for i, subject in enumerate(text["participant_id"]):
        if subject.lower() in MISSING:
            raise ValueError(f"row {i + 2} has no participant_id")
        row = {name: values[i] for name, values in table.items()}
        session = "" if row.get("session_id") is None else plain(text["session_id"][i])
        participants.setdefault(plain(subject), []).append((session, row))
    return participants

def suspicious_values(values):
    """{value: count} of values that may stand for "missing".

    They are more than ten interquartile ranges from the quartiles of the distinct values, and occur
    more than once or are one of MISSING_CODES.
    """
    counts = Counter(values[np.isfinite(values)].tolist())
    others = [value for value in counts if abs(value) not in MISSING_CODES] or [0]
    low, high = np.percentile(others, [25, 75])
    reach = 10 * (high - low)
    return {value: count for value, count in counts.items()
            if not low - reach <= value <= high + reach
            and (count > 1 or abs(value) in MISSING_CODES)}

def participant_row(rows, session):
    """{column: value} of a participant in a session, or None if the table has no such row."""
    own = [row for at, row in rows if "" in (at, session) or at == session]
    for name in own[0] if own else []:
        values = sorted({str(row[name]) for row in own})
        if len(values) > 1:
            raise ValueError(f"{name} is {listed(values)} in --participants; add session_id")
    return own[0] if own else None

def main():
    parser = argparse.ArgumentParser(description="Write datasets for brainlm.py.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--source", choices=["synthetic", "files"], default="synthetic", help="kind of data")
    flag("--output_dir", default="./sample_data", help="folder for the datasets")
    flag("--seed", type=int, default=0, help="random seed of the synthetic data or of the split")
    flag = parser.add_argument_group("synthetic data only").add_argument
    flag("--num_train", type=int, default=100, help="number of training recordings")
    flag("--num_val", type=int, default=20, help="number of validation recordings")
    flag("--num_parcels", type=int, default=424, help="number of parcels")
    flag("--num_timepoints", type=int, default=500, help="number of timepoints per recording")
    flag = parser.add_argument_group("files only").add_argument
    flag("--input_dir", default=".", help=f"folder with {FORMATS} files, searched recursively")
    flag("--coords", default="coords.tsv", help="table: x, y, z in MNI mm, maybe label and network")
    flag("--participants", help="table: participant_id, maybe session_id, columns to predict")
    flag("--pattern", default="*", help="end of the paths, e.g. '*seg-4S456Parcels*timeseries.tsv'")
    flag("--subject_pattern", help="regular expression with one group: the participant in a path")
    flag("--header", choices=["auto", "yes", "no"], default="auto", help="row 1 names the parcels")
    flag("--val_fraction", type=float, default=0.2, help="fraction of participants for validation")
    flag("--min_timepoints", type=int, default=200, help="shorter files are left out")
    flag("--tr", type=float, help="seconds between timepoints, for files without a TR in a header")
    args = vars(parser.parse_args())
    make = make_files_data if args["source"] == "files" else make_sample_data
    try:
        make(**{name: args[name] for name in inspect.signature(make).parameters})
    except (OSError, ValueError) as error:
        parser.exit(2, f"sample_data.py: {error}\n")

if __name__ == "__main__":
    main()
