"""Data to learn from: made up, or from your own files; and a writer for arrays.

    python sample_data.py                                  # made up, into ./sample_data
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
    value, of which only one is held in memory at a time. Values are arrays (timepoints, parcels) of
    numpy, torch or pandas, whose dtype is kept and whose lengths may differ, or strings, ints,
    floats or bools; None, NaN and masked values are missing. An older dataset in `folder` is
    replaced once the new one is complete. Only one process at a time may write to a folder.
    """
    folder = Path(folder).expanduser().resolve()
    present = os.listdir(folder) if folder.exists() else []
    if present and "state.json" not in present:
        raise ValueError(f"{folder} holds {present[0]} and is no dataset: will not replace it")
    folder.parent.mkdir(parents=True, exist_ok=True)

    # Written beside its place and renamed when complete: one that is killed leaves no half there.
    with (tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside,
          open(Path(beside, "arrays"), "w+b") as disk):
        if not hasattr(columns, "items"):
            columns = columns_of([{name: on_disk(value, disk) for name, value in row.items()}
                                  for row in columns])
        columns = {name: [*as_numpy(values)] for name, values in columns.items()}
        lengths = {name: len(values) for name, values in columns.items()}
        if len({*lengths.values()}) != 1 or 0 in lengths.values():
            raise ValueError(f"need columns of one length, of 1 or more, found {lengths}")
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
    """Rows, dicts of name -> value, as a dict of name -> values; None where a row has no value."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}

def on_disk(value, file):
    """An array as a function that reads it back from an open file; any other value as it is."""
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
def naming(what):
    """What goes wrong with what others wrote becomes one line that names it."""
    try:
        yield
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ImportError):
            told += f": pip install {error.name}"
        raise ValueError(f"{what}: {told}") from None

def as_numpy(value):
    """Values of torch, pandas, numpy.ma and `on_disk` as numpy arrays; all others as they are."""
    if callable(value):
        return value()
    if isinstance(value, np.ma.MaskedArray):
        if value.ndim < 2:
            return value.tolist()  # None where masked
        return value.astype(np.result_type(value, np.float16)).filled(np.nan)
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()[()]  # [()]: a single number is no array
    return value.to_numpy() if hasattr(value, "to_numpy") else value

def column_type(name, values):
    """Arrow type, found from the whole column: a batch of it could hold nothing but None."""
    first = next((value for value in map(as_numpy, values) if value is not None), None)
    if isinstance(first, np.ndarray):
        for row, value in enumerate(map(as_numpy, values)):
            shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", None)
            usable = len(shape) == 2 and 0 not in shape and dtype.name in NUMERIC
            if not usable or dtype != first.dtype:
                raise ValueError(f"column {name!r}, row {row} is {dtype} of shape {shape}: need "
                                 "arrays (timepoints, parcels) of one numeric dtype")
        return pa.list_(pa.list_(pa.from_numpy_dtype(first.dtype.name)))
    with naming(f"column {name!r}"):
        values = [as_numpy(value) for value in values]
        type_ = pa.array(values, from_pandas=True).type  # NaN among strings is a missing one
    if type_ not in HF_NAMES:
        raise ValueError(f"column {name!r} holds {type_}: need 2-D arrays, strings or numbers")
    return type_

def column_values(values, type_):
    """One batch of a column as an Arrow array."""
    values = [as_numpy(value) for value in values]
    if not pa.types.is_list(type_):
        return pa.array(values, type_, from_pandas=True)
    dtype = HF_NAMES[type_.value_type.value_type]
    timepoints = [list(np.ascontiguousarray(value, dtype)) for value in values]
    return pa.array(timepoints, type_)  # rows are arrays: no number becomes a Python object

def hf_feature(type_):
    """What `datasets` calls an Arrow type; lists by the name that all its versions know."""
    if pa.types.is_list(type_):
        return {"feature": hf_feature(type_.value_type), "_type": "Sequence"}
    return {"dtype": HF_NAMES[type_], "_type": "Value"}

def robust_scale(recording, nan="refuse", tell=None):
    """(timepoints, parcels) -> float32, each parcel with median 0 and interquartile range 1.

    A parcel without signal, its interquartile range at most a millionth of its largest value,
    becomes zeros, and `tell`, by default a warning, names it. So does, with nan="zero", one with
    NaN, masked, infinity, 1e30 or more; with nan="refuse" these are a ValueError.
    """
    recording = np.asarray(as_numpy(recording))
    if recording.ndim != 2 or recording.size == 0 or recording.dtype.kind not in "biuf":
        raise ValueError(f"need numbers (time, parcels), found {recording.dtype} {recording.shape}")
    recording = recording.astype(np.result_type(recording, np.float32))  # integers would overflow
    broken = ~(abs(recording) < 1e30)  # NaN too; the difference of larger numbers could be infinite
    if nan != "zero" and broken.any():
        timepoint, parcel = np.argwhere(broken)[0]
        raise ValueError(f"timepoint {timepoint}, parcel {parcel} is {recording[timepoint, parcel]}"
                         ": repair it, or nan='zero' makes the whole parcel zeros")
    recording[:, broken.any(axis=0)] = 0
    low, median, high = np.percentile(recording, [25, 50, 75], axis=0)
    silent = high - low <= 1e-6 * abs(recording).max(axis=0)
    scaled = (recording - median) / np.where(silent, 1, high - low)
    scaled[:, silent] = 0
    if silent.any():
        parcels = ", ".join(map(str, np.flatnonzero(silent)))
        tell = tell or partial(warnings.warn, stacklevel=2)
        tell(f"parcels {parcels} lack a signal or values: written as zeros")
    return scaled.astype(np.float32)

# Synthetic recordings -----------------------------------------------------------------------------

TR = 0.735  # seconds between timepoints, as in UK Biobank
NETWORKS, SMOOTH_NOISE, WHITE_NOISE = 0.45, 0.20, 0.35  # shares of a parcel's variance, about

# Where the networks' patches are centred in the right hemisphere, MNI mm; the left mirrors it.
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
    """Write {train,val,coords} of a made-up population, in which there are three things to learn.

    Space: the patches of one of 7 networks, each in both hemispheres, share most of their time
    course; neighbours share smooth noise besides. A third of the variance is white noise.
    Time: networks have their power at 0.01 to 0.1 Hz, so the past tells of the next few seconds.
    Age, 45 to 80 years: (a) networks get faster, their cutoff rising from about 0.04 to 0.085 Hz,
    which correlations of parcels do not show, and (b) the patches of the Default network couple
    less, which they do. Clinical scores hang together, depend on age weakly, one in ten is missing.
    A recording depends on `seed`, its split and its number alone: asking for more changes none.
    """
    if min(num_train, num_val) < 1 or num_parcels < 2 or num_timepoints < 20 or seed < 0:
        raise ValueError(f"{num_train=}, {num_val=}, {num_parcels=}, {num_timepoints=}, {seed=}: "
                         "must be at least 1, 1, 2, 20, 0")
    brain = make_brain(num_parcels, np.random.default_rng([seed, 0, 0]))
    write_dataset(Path(output_dir, "coords"), {
        "Index": list(range(num_parcels)), **dict(zip("XYZ", brain["xyz"].T)),
        "Network": brain["network"]})
    for stream, split, count in (2, "val", num_val), (1, "train", num_train):  # train goes last
        write_dataset(Path(output_dir, split), (
            {"Subject": f"{split}-{i:04d}",
             **make_person(brain, num_timepoints, np.random.default_rng([seed, stream, i]))}
            for i in range(count)))
    print(f"wrote {output_dir}/{{train,val,coords}}: {num_train} + {num_val} synthetic recordings "
          f"of {num_timepoints} timepoints x {num_parcels} parcels")

def make_brain(num_parcels, rng):
    """What all people share: parcels, networks, and how time courses spread over parcels."""
    # A Fibonacci lattice on an ellipsoid per hemisphere, the left mirrors the right; jittered.
    half = (num_parcels + 1) // 2
    y, turn = 1 - (2 * np.arange(half) + 1) / half, np.pi * (3 - 5 ** 0.5) * np.arange(half)
    ring = np.sqrt(1 - y ** 2)
    sphere = np.stack([ring * np.cos(turn), y, ring * np.sin(turn)], 1)
    right = [35, -18, 15] + [30, 80, 52] * sphere
    xyz = np.concatenate([right * [-1, 1, 1], right])[:num_parcels]
    xyz = xyz + 1.5 * rng.standard_normal((num_parcels, 3))
    folded = np.where([True, False, False], abs(xyz), xyz)  # homologous parcels fall together

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
    """One row: age, clinical scores and the recording, (timepoints, parcels)."""
    age = rng.uniform(45, 80)
    older = (age - 62.5) / 17.5  # -1 to 1
    cutoff = 0.057 * np.exp(0.4 * older + 0.06 * rng.standard_normal())  # Hz
    network_of_patch = brain["network_of_patch"]
    num_parcels, num_patches = brain["loadings"].shape

    networks = time_courses(1 + len(PATCHES), num_timepoints, cutoff, rng)
    networks = 0.1 ** 0.5 * networks[:1] + 0.9 ** 0.5 * networks[1:]  # all correlate a little
    coupling = np.full((num_patches, 1), 0.7, np.float32)  # what a patch shares with its network
    default = network_of_patch == list(PATCHES).index("Default")
    coupling[default] = np.clip(0.6 - 0.25 * older + 0.06 * rng.standard_normal(), 0, 1)
    patches = (np.sqrt(coupling) * networks[network_of_patch]
               + np.sqrt(1 - coupling) * time_courses(num_patches, num_timepoints, cutoff, rng))

    # einsum and not @: the last bits of a BLAS product depend on its number of threads.
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
    """(count, timepoints) of unit variance, slow as BOLD: from 0.01 Hz up to about `cutoff` Hz."""
    length = 64 * (num_timepoints // 64 + 3)  # noise from an FFT ends as it began: make more
    f = np.fft.rfftfreq(length, TR)
    amplitude = f / np.hypot(f, 0.01) / (1 + (f / cutoff) ** 2)
    amplitude *= length / (2 * np.linalg.norm(amplitude))
    noise = rng.standard_normal((count, len(f), 2), np.float32).view(np.complex64)[..., 0]
    return np.fft.irfft(noise * amplitude.astype(np.float32), length)[:, :num_timepoints]

def closeness(a, b, width):
    """Gaussian of the distances in mm between points a [n, 3] and b [m, 3]: [n, m]."""
    return np.exp(-0.5 * ((a[:, None] - b) ** 2).sum(-1) / width ** 2).astype(np.float32)

def unit_rows(matrix):
    """Weights by which independent time courses of unit variance add up to unit variance."""
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)

# More recordings than there are -------------------------------------------------------------------

def surrogate(recordings, rng):
    """A recording that never was, between two of the recordings: float32 (timepoints, parcels).

    Two are drawn (maybe one twice), each Fourier component turned by a random angle, the same for
    all parcels, which keeps their spectra and correlations (Prichard and Theiler 1994, Phys. Rev.
    Lett. 73, 951), and mixed. A model learns a few recordings by heart; of these there is no end.
    """
    pair = [np.asarray(recordings[i]) for i in rng.integers(len(recordings), size=2)]
    num_timepoints, proportion, mixture = min(map(len, pair)), rng.uniform(0, np.pi / 2), 0
    for recording, share in zip(pair, (np.cos(proportion), np.sin(proportion))):
        recording = recording[:num_timepoints]
        waves = np.fft.rfft(recording - recording.mean(axis=0), axis=0)
        turns = np.exp(2j * np.pi * rng.random((len(waves), 1)))
        mixture = mixture + share * np.fft.irfft(waves * turns, num_timepoints, axis=0)
    return mixture.astype(np.float32)

# Files of your own --------------------------------------------------------------------------------

FORMATS = ".tsv .csv .txt .1D .npy .ptseries.nii"  # in any case, each with or without .gz
FORMAT = re.compile(rf"({'|'.join(map(re.escape, FORMATS.split()))})(\.gz)?$", re.IGNORECASE)
BIDS = "^(sub-[0-9A-Za-z]+)(_(?!sub-)[a-z]+-[^_]+)*(_[a-z]+[0-9]?)?$"  # subject, entities, suffix
XCP_D = {"network_label": "network", "roi name": "label"}  # what its atlases call these columns
MISSING = "", "n/a", "na", "nan", "null", "none"  # a cell without a value, in any case
MISSING_CODES = 99, 777, 888, 999, 8888, 9999  # and their negatives: often in place of n/a
WINDOW, PATCH, FEW = 200, 20, 50  # of brainlm.py: timepoints; recordings for 200 steps in 8 epochs

def make_files_data(input_dir, coords, participants, output_dir, pattern, subject_pattern, header,
                    val_share, min_timepoints, tr, seed):
    """Write {train,val,coords} from files of (timepoints, parcels) each; arguments as the flags."""
    if not 0 < val_share < 1:
        raise ValueError(f"--val_share must be between 0 and 1 (got {val_share})")
    if min_timepoints < PATCH:
        raise ValueError(f"--min_timepoints must be at least {PATCH} (got {min_timepoints})")
    if tr is not None and not tr > 0:
        raise ValueError(f"--tr must be above 0 seconds (got {tr})")
    input_dir, coords, output_dir, participants = (
        path and Path(path).expanduser() for path in (input_dir, coords, output_dir, participants))
    with naming(coords):
        parcels, labellings = read_parcels(coords)
    with naming(participants):
        table = read_participants(participants) if participants else {}
    files = find_files(input_dir, pattern, [coords, participants or coords])
    subjects = find_subjects(files, input_dir, subject_pattern)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output_dir.parent) as disk:
        rows, lengths, short, strangers, first, trs = [], [], [], 0, None, Counter()
        for file, subject, session in subjects:
            with naming(file):
                names, series, file_tr = read_series(file, header, labellings, len(parcels["X"]))
                first = first or (file, names)
                if not labellings and names != first[1]:
                    raise ValueError(f"columns are named {listed(names)}, in {first[0]} "
                                     f"{listed(first[1])}: need one order, or labels in {coords}")
                if len(series) < min_timepoints:
                    short.append(str(len(series)))
                elif (recording := cleaned(series, file)) is not None:
                    said = said_of(table.get(plain(subject), []), session)
                    strangers += said is None
                    trs[file_tr] += 1
                    row = {**(said or {}), "Subject": subject, "File": str(file)}
                    if file_tr or tr:
                        row["TR"] = file_tr or tr
                    rows.append({**row, RECORDING_COL: on_disk(recording, disk)})
                    lengths.append(len(recording))

        used = sorted({row["Subject"] for row in rows})
        report = (f"{len(files)} files fit --pattern {pattern!r}, {len(short)} are shorter than "
                  f"--min_timepoints {min_timepoints} ({listed(short)}), {len(rows)} are used, of "
                  f"{len(used)} participants ({listed(used)})")
        if len(used) < 2:
            raise ValueError(f"{report}: need two participants, to train and to validate on")
        print(report)
        if subject_pattern and len(used) >= len(rows) - 1:
            print(f"note: --subject_pattern finds {len(used)} participants in {len(rows)} files: "
                  "right?")
        if len({each or tr for each in trs} | {tr or next(iter(trs))}) > 1:
            found = ", ".join(f"{each or 'unknown'} in {trs[each]} files" for each in trs)
            print(f"note: the TRs differ: --tr is {tr}, by the headers it is {found}. Column TR "
                  "holds the header's; the model does not know the TR, so use files of one TR")
        if first[1] and not labellings:
            print(f"note: no column of {coords} names the parcels: they are taken to be in the "
                  f"order of the columns in the files ({listed(first[1])})")
        if participants:
            absent = sorted(table.keys() - {plain(subject) for subject in used})
            report = (f"{participants}: {strangers} of {len(rows)} recordings have no row there, "
                      f"{len(absent)} of {len(table)} participants no recording ({listed(absent)})")
            if strangers == len(rows):
                raise ValueError(report)
            print(report)

        # All recordings of a participant go into one split.
        num_val = min(max(1, round(val_share * len(used))), len(used) - 1)
        in_val = {*np.random.default_rng(seed).permutation(used)[:num_val]}
        write_dataset(output_dir / "coords", parcels)
        blank = dict.fromkeys(name for row in rows for name in row)
        for split in "val", "train":
            chosen = [blank | row for row in rows if (row["Subject"] in in_val) == (split == "val")]
            write_dataset(output_dir / split, columns_of(chosen))
    program = shlex.quote(os.path.relpath(Path(__file__).with_name("brainlm.py")))
    data = shlex.quote(str(output_dir))
    window = min(WINDOW, min(lengths) // PATCH * PATCH)
    steps = "--max_steps 200 " if len(chosen) < FEW else ""
    print(f"wrote {output_dir}/{{train,val,coords}}: {len(used) - num_val} + {num_val} "
          f"participants. Next:\n\npython {program} pretrain --train_dataset_path {data}/train "
          f"--val_dataset_path {data}/val --coords_dataset_path {data}/coords "
          f"--num_timepoints_per_voxel {window} {steps}--output_dir runs/mine")

def listed(names):
    """The first three names, for a line."""
    names = [name or "''" for name in names or ["none"]]
    return ", ".join(names[:3]) + " ..." * (len(names) > 3)

def find_files(folder, pattern, tables):
    """The files below a folder that end in a pattern, in which **/ is up to 8 folders."""
    tables = [Path(table).resolve() for table in tables]
    there = [file for file in visible_files(folder, set()) if file.resolve() not in tables]
    patterns = [pattern.replace("**/", "*/" * folders) for folders in range(9)]
    picked = [file for file in there if any(map(file.relative_to(folder).match, patterns))]
    files = [file for file in picked if FORMAT.search(file.name)]
    others = [file.name for file in picked if not FORMAT.search(file.name)]
    if others:
        print(f"{len(others)} files are left out, not of {FORMATS} (.gz): {listed(others)}")
    if not files:
        raise ValueError(f"{folder}: no file fits --pattern {pattern!r} and is of {FORMATS}: there "
                         f"is {listed([file.name for file in picked or there])}")
    return files

def visible_files(folder, seen):
    """The files below a folder, through links too, but no folder twice and nothing hidden."""
    if folder.resolve() not in seen:
        seen.add(folder.resolve())
        for path in sorted(path for path in folder.iterdir() if path.name[0] != "."):
            yield from visible_files(path, seen) if path.is_dir() else [path]

def find_subjects(files, folder, pattern):
    """[(file, subject, session or "")]: sub-<label> or what a pattern finds, and ses-<label>."""
    with naming(f"--subject_pattern {pattern}"):
        if pattern and re.compile(pattern).groups != 1:
            raise ValueError("need a regular expression with one group in ( )")
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
            raise ValueError(f"{other} and {label} may be one participant or two; rename the files "
                             "or pass --subject_pattern")
        found.append((file, label, plain(*sessions)))

    counts, numbers = Counter(label for _, label, _ in found), [*map(longest_number, paths)]
    (label, most), = counts.most_common(1)
    if pattern and len({*numbers}) == len(files) and (2 * len(counts) <= len(files) or most > 9):
        print(f"note: --subject_pattern {pattern} finds {len(counts)} participants in {len(files)} "
              f"files ({label} in {most}), but the longest numbers of the files all differ "
              f"({listed(numbers)}): should it be {example(paths[0], paths)}?")
    return found

def longest_number(path):
    """The longest run of digits, "" where there is none."""
    return max(re.findall("[0-9]+", path), key=len, default="")

def example(path, paths):
    """A --subject_pattern for these paths: what comes before their longest numbers, and these."""
    digits = min(filter(None, map(len, map(longest_number, paths))), default=0)
    pattern = f"(?:^|/)([^/]*?[0-9]{{{digits},}})" if digits else "(?:^|/)([^/_]+)"
    label = re.search(pattern, path)
    return shlex.quote(pattern) + (f" for {label[1]}" if label else "")

def plain(label):
    """A label without sub- or ses-, and without the leading zeros that spreadsheets take away."""
    return re.sub("^(sub-|ses-)?0*(?=.)", "", label)

def read_bytes(file):
    """The content of a file, unpacked."""
    with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as content:
        return content.read()

def read_rows(file, num_parcels=None, labellings=()):
    """The rows of a table, lists of text, and its comments, lines that start with #."""
    content = read_bytes(file)
    if content[:4] in (b"PK\3\4", b"\xd0\xcf\x11\xe0"):
        raise ValueError("is an Excel workbook; save it as .csv or .tsv")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1")
    lines = [line.strip(" \n") for line in io.StringIO(text.strip("\r\n"), newline=None)]
    comments = [line for line in lines if line.startswith("#")]
    lines = [line for line in lines if not line.startswith("#")]
    if not any(lines):
        raise ValueError("no rows")
    separator = next((mark for mark in "\t;," if mark in lines[0]), None)
    rows = (csv.reader(lines, delimiter=separator, skipinitialspace=True) if separator
            else map(str.split, lines))
    rows = [[*map(str.strip, row)] for row in rows]
    while len(rows) > 1 and all(row[-1:] == [""] for row in rows[1:]):
        width = len(rows[1])
        name = "".join(rows[0][width - 1:])
        if width == num_parcels or name and any(name in labels for labels in labellings):
            break  # a parcel without values
        if name:
            print(f"note: {file}: column {name} is empty and left out")
        for row in rows:
            del row[width - 1:]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise ValueError(f"row {number} has {len(row)} cells, row 1 has {len(rows[0])}")
    return rows, comments

def to_number(cell):
    """A float, NaN where the value is missing, or None for other text."""
    try:
        return None if "_" in cell else float(cell)  # float() accepts 1_000
    except ValueError:
        return math.nan if cell.lower() in MISSING else None

def numbers(rows, names, first_row=1):
    """Text -> float64, NaN where a value is missing; other text raises by row and column."""
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
    """A column of text -> float64, or None where it holds other text."""
    try:
        return numbers([cells], cells)[0]
    except ValueError:
        return None

def is_whole(values):
    """Whether no value has a fraction."""
    return not (values % 1 > 0).any()

def has_header(names, values, labellings):
    """Whether the first row of a series, as text and numbers, is names of parcels."""
    if any({*names} >= {*labels} for labels in labellings):
        return True
    ids = values[0, int(names[0] == ""):]  # pandas writes no name above an index
    ids = ids[~np.isnan(ids)]
    whole = 2 * len(ids) > len(names) and is_whole(ids) and len({*ids}) == len(ids)
    if whole and is_whole(values[1:]):
        raise ValueError(f"row 1 is {listed(names)}: values or names? --header yes or no tells")
    return whole

def names_in_comments(comments, width, labellings):
    """The names in a line such as "#2001 #2002": one for each column, or most of the parcels."""
    for line in comments:
        names = re.findall('[^\\s#;,"]+', line)
        if len(names) == width or any(2 * len({*names} & {*labels}) > len(labels)
                                      for labels in labellings):
            return names
    return []

def read_text_series(file, header, labellings, num_parcels):
    """The names of the columns, if any, and the values [timepoints, columns] of a text file."""
    rows, comments = read_rows(file, num_parcels, labellings)
    column, width = [row[0] for row in rows], len(rows[0])
    if any({*labels} in ({*column}, {*column[1:]}) for labels in labellings):
        raise ValueError("column 1 names the parcels: transposed")
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
        raise ValueError(f"{len(names)} names ({listed(names)}) for {width} columns")
    counts = np.array_equal(values[:, 0], np.arange(len(values)))
    if width > num_parcels and (counts or names[:1] == [""]):  # the index of pandas
        return names[1:], values[:, 1:]
    return names, values

def read_series(file, header, labellings, num_parcels):
    """The names of the columns in the file's order, if any; their values in the order of --coords,
    float64 [timepoints, parcels]; the TR in seconds, if the file has it."""
    kind, names, tr = FORMAT.search(file.name)[1].lower(), [], None
    if kind == ".npy":
        series = np.load(io.BytesIO(read_bytes(file)))
        if series.ndim != 2 or series.dtype.kind not in "biuf":
            raise ValueError(f"{series.dtype} of shape {series.shape}, need (timepoints, parcels)")
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
        raise ValueError(f"timepoint {row + 1}, column {column + 1} is {series[row, column]}")

    orders = [labels for labels in labellings if sorted(labels) == sorted(names)]
    counted = names == [str(i) for i in range(len(names))]  # by pandas, where there are no names
    if labellings and not orders and not counted:
        labels = max(labellings, key=lambda labels: len({*labels} & {*names}))
        lacking, surplus = Counter(labels) - Counter(names), Counter(names) - Counter(labels)
        raise ValueError(f"parcels of --coords without a column: {listed([*lacking])}; columns "
                         f"that are no parcel there: {listed([*surplus])}; correct the names, or "
                         "pass --header no if row 1 or a comment holds no names")
    if series.shape[1] != num_parcels:
        hint = ": transposed?" * (len(series) == num_parcels)
        raise ValueError(f"(timepoints, parcels) are {series.shape} for {num_parcels} rows of "
                         f"--coords{hint}")
    if any(labels != orders[0] for labels in orders):
        raise ValueError("two columns of --coords name the columns, in two orders: leave one out")
    if orders:
        series = series[:, [names.index(label) for label in orders[0]]]
    return names, series, tr

def cleaned(series, file):
    """A series scaled, its gaps interpolated in time, or None where most of it is. All is told."""
    gaps = np.isnan(series).all(axis=1)
    if np.nansum(abs(series)):
        gaps = (np.isnan(series) | (series == 0)).all(axis=1)  # censored volumes may be zeros
    report = f"{file}: {gaps.sum()} of {len(series)} timepoints have no values (n/a or all 0)"
    if 2 * gaps.sum() > len(series):
        print(f"{report}: left out")
        return None
    if gaps.any():
        print(f"{report}: interpolated")
    for signal in series.T:
        signal[gaps] = np.interp(np.flatnonzero(gaps), np.flatnonzero(~gaps), signal[~gaps])
    scaled = robust_scale(series, nan="zero", tell=lambda line: print(f"{file}: {line}"))
    if not scaled.any():
        raise ValueError("no parcel varies")
    if (abs(scaled) > 50).any():
        print(f"note: {file}: {(abs(scaled) > 50).sum()} values are spikes, past 50 after scaling")
    if len(series) == series.shape[1]:
        print(f"note: {file}: as many rows as columns: rows are taken as timepoints")
    return scaled

def read_parcels(file):
    """The columns of the coords dataset, and each column of the table that can name parcels."""
    (names, *rows), _ = read_rows(file)
    kinds = [re.sub("_?mni_?", "", XCP_D.get(name.lower(), name.lower())) for name in names]
    axes = "xyz" if {*"xyz"} & {*kinds} else "ras"
    if axes == "xyz" and {*"ras"} <= {*kinds}:
        print(f"note: {file}: x, y, z are read, R, A, S are not")
    if [kinds.count(axis) for axis in axes] != [1, 1, 1] or len({*names}) < len(names):
        raise ValueError(f"need x, y, z (or R, A, S), no name twice; found {', '.join(names)}")
    table = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    axes = [names[kinds.index(axis)] for axis in axes]
    xyz = numbers([*zip(*(table[axis] for axis in axes))], axes, first_row=2)
    reach = abs(xyz).max(axis=1)  # of a brain 110 mm, and not all of it is above 0
    for row in np.flatnonzero(~(reach < 200) | (reach < 1).all() | ~(xyz < 0).any()):
        raise ValueError(f"row {row + 2}: {', '.join(axes)} are {xyz[row].tolist()}: need MNI mm, "
                         "no voxel indices, no metres, none missing")
    parcels, labellings = dict(zip("XYZ", xyz.T)), []
    for kind, (name, cells) in zip(kinds, table.items()):
        twice = [cell for cell, count in Counter(cells).items() if count > 1]
        if kind == "label" and twice:
            raise ValueError(f"column {name}: {twice[0]} names several parcels")
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
    """{participant: [(session or "", {column: value}), ...]}, a pair for each row."""
    (names, *rows), _ = read_rows(file)
    reserved = [*names, "Subject", "File", RECORDING_COL]
    if "participant_id" not in names or len({*reserved}) < len(reserved):
        raise ValueError("need participant_id, no column twice, none called Subject or File; found "
                         f"{', '.join(names)}")
    text = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    table, participants = {}, {}
    for name, cells in text.items():
        numeric = column_numbers(cells)
        values = cells if numeric is None else numeric.tolist()
        table[name] = [None if cell.lower() in MISSING else value
                       for cell, value in zip(cells, values)]
        for value, count in {} if numeric is None else suspicious_values(numeric).items():
            print(f"note: {file}: column {name} is {value:g} in {count} rows, far from all other "
                  "values; if this means missing, write n/a")
    del table["participant_id"]
    for i, subject in enumerate(text["participant_id"]):
        if subject.lower() in MISSING:
            raise ValueError(f"row {i + 2} lacks participant_id")
        row = {name: values[i] for name, values in table.items()}
        session = "" if row.get("session_id") is None else plain(text["session_id"][i])
        participants.setdefault(plain(subject), []).append((session, row))
    return participants

def suspicious_values(values):
    """{value: count} of those more than ten interquartile ranges from the quartiles of the distinct
    values that occur more than once or are one of MISSING_CODES."""
    counts = Counter(values[~np.isnan(values)].tolist())
    others = [value for value in counts if abs(value) not in MISSING_CODES] or [0]
    low, high = np.percentile(others, [25, 75])
    reach = 10 * (high - low)
    return {value: count for value, count in counts.items()
            if not low - reach <= value <= high + reach
            and (count > 1 or abs(value) in MISSING_CODES)}

def said_of(rows, session):
    """{column: value} of a participant in a session, None where the table has no row for it."""
    own = [said for at, said in rows if "" in (at, session) or at == session]
    for name in own[0] if own else []:
        values = sorted({str(said[name]) for said in own})
        if len(values) > 1:
            raise ValueError(f"{name} is {listed(values)} in --participants: session_id tells")
    return own[0] if own else None

def main():
    parser = argparse.ArgumentParser(description="Write datasets for brainlm.py.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--source", choices=["synthetic", "files"], default="synthetic", help="made up, or yours")
    flag("--output_dir", default="./sample_data", help="where the datasets go")
    flag("--seed", type=int, default=0, help="same seed, same bytes or split")
    flag = parser.add_argument_group("synthetic data only").add_argument
    flag("--num_train", type=int, default=100, help="recordings to train on")
    flag("--num_val", type=int, default=20, help="recordings to validate on")
    flag("--num_parcels", type=int, default=424, help="parcels of a recording")
    flag("--num_timepoints", type=int, default=500, help="timepoints of a recording")
    flag = parser.add_argument_group("files only").add_argument
    flag("--input_dir", default=".", help=f"folder with {FORMATS} files, maybe in folders")
    flag("--coords", default="coords.tsv", help="x, y, z in MNI mm, maybe label and network")
    flag("--participants", help="table with participant_id and columns to predict")
    flag("--pattern", default="*", help="which files, as '*seg-4S456Parcels*timeseries.tsv'")
    flag("--subject_pattern", help="regular expression whose one group in a path is the person")
    flag("--header", choices=["auto", "yes", "no"], default="auto", help="row 1 names parcels")
    flag("--val_share", type=float, default=0.2, help="share of the people to validate on")
    flag("--min_timepoints", type=int, default=200, help="leave out shorter files")
    flag("--tr", type=float, help="seconds between timepoints, for a column TR")
    args = vars(parser.parse_args())
    make = make_files_data if args["source"] == "files" else make_sample_data
    try:
        make(**{name: args[name] for name in inspect.signature(make).parameters})
    except (OSError, ValueError) as error:
        parser.exit(2, f"sample_data.py: {error}\n")

if __name__ == "__main__":
    main()
