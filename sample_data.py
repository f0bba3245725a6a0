"""Data to learn from: made up, or from your own files; and a writer for arrays.

    python sample_data.py                                  # made up, into ./sample_data
    python sample_data.py --source files --input_dir DIR --coords atlas.tsv --output_dir my_data

    from sample_data import write_dataset                  # arrays of (timepoints, parcels)
    write_dataset("my_data/train", {"Recording": [array_1, array_2], "Age": [61.5, None]})
"""
import argparse
import contextlib
import gzip
import hashlib
import inspect
import io
import json
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

RECORDING_COL = "Voxelwise_RobustScaler_Normalized_Recording"

# Writing a dataset --------------------------------------------------------------------------------

NUMERIC = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()
HF_NAMES = {pa.string(): "string", pa.bool_(): "bool", pa.null(): "null",
            **{pa.from_numpy_dtype(name): name for name in NUMERIC}}

def write_dataset(folder, columns):
    """Write `columns`, a dict of name -> one value per row, as save_to_disk of `datasets` does.

    A column of arrays (timepoints, parcels), of numpy, torch or pandas, keeps its dtype; lengths
    may differ. Any other holds strings, ints, floats or bools; None, NaN or masked is missing. An
    older dataset in `folder` is replaced, and only once the new one is complete.
    """
    folder = Path(folder).resolve()
    columns = {name: [as_numpy(value) for value in as_numpy(values)]
               for name, values in columns.items()}
    lengths = {name: len(values) for name, values in columns.items()}
    num_rows = max(lengths.values(), default=0)
    if num_rows == 0 or num_rows != min(lengths.values()):
        raise ValueError(f"need columns of one length, of 1 or more, found {lengths}")
    present = []
    with contextlib.suppress(FileNotFoundError):
        present = os.listdir(folder)
    if present and "state.json" not in present:
        raise ValueError(f"{folder} holds {present[0]} and is no dataset: will not replace it")

    types = {name: column_type(name, values) for name, values in columns.items()}
    # Written beside its place and renamed when complete: a run that is killed leaves no half of a
    # dataset there.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        new = Path(beside, "new")
        new.mkdir()
        write_files(new, columns, types)
        if folder.exists():
            folder.rename(Path(beside, "old"))
        new.rename(folder)

def as_numpy(value):
    """What torch, on any device, pandas or numpy.ma hold as numpy array; all else as it is."""
    if isinstance(value, np.ma.MaskedArray):
        if value.ndim < 2:
            return value.tolist()  # None where masked
        return value.astype(np.result_type(value, np.float16)).filled(np.nan)
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()[()]  # [()]: a single number is no array
    return value.to_numpy() if hasattr(value, "to_numpy") else value

def write_files(folder, columns, types):
    """The files of a dataset. columns: as write_dataset takes them; types: name -> Arrow type."""
    num_rows, shard = len(next(iter(columns.values()))), "data-00000-of-00001.arrow"
    features = {name: hf_feature(type_) for name, type_ in types.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(list(types.items()), metadata)
    with pa.ipc.new_stream(folder / shard, schema) as stream:
        for start in range(0, num_rows, 16):
            batch = [column_values(columns[name][start:start + 16], types[name]) for name in types]
            stream.write_batch(pa.record_batch(batch, schema=schema))
    with pa.memory_map(str(folder / shard)) as file:
        content = hashlib.sha256(file.read_buffer())
    state = {"_data_files": [{"filename": shard}],
             "_fingerprint": content.hexdigest()[:16],  # `datasets` names what it caches after this
             "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
             "_output_all_columns": False, "_split": None}
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))

def column_type(name, values):
    """Arrow type, found from the whole column: a batch of it could hold nothing but None."""
    if any(isinstance(value, np.ndarray) for value in values):
        for row, value in enumerate(values):
            shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", None)
            usable = len(shape) == 2 and 0 not in shape and dtype.name in NUMERIC
            if not usable or dtype != values[0].dtype:
                raise ValueError(f"column {name!r}, row {row} is {dtype} of shape {shape}: need "
                                 "arrays (timepoints, parcels) of one numeric dtype")
        return pa.list_(pa.list_(pa.from_numpy_dtype(values[0].dtype.name)))
    try:
        type_ = pa.array(values, from_pandas=True).type  # NaN among strings is a missing one
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"column {name!r}: {error}") from None
    if type_ not in HF_NAMES:
        raise ValueError(f"column {name!r} holds {type_}: need 2-D arrays, strings or numbers")
    return type_

def column_values(values, type_):
    """One batch of a column as an Arrow array."""
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

def robust_scale(recording, nan="refuse"):
    """(timepoints, parcels) -> float32, each parcel with median 0 and interquartile range 1.

    A parcel without signal, its interquartile range at most a millionth of its largest value,
    becomes zeros, and a warning names it. So does, with nan="zero", one with NaN, masked, infinity,
    1e30 or more; with nan="refuse" these are a ValueError.
    """
    recording = np.asarray(as_numpy(recording))
    if nan not in ("refuse", "zero"):
        raise ValueError(f"nan is {nan!r}, must be 'refuse' or 'zero'")
    if recording.ndim != 2 or recording.size == 0 or recording.dtype.kind not in "biuf":
        raise ValueError(f"need numbers (time, parcels), found {recording.dtype} {recording.shape}")
    recording = recording.astype(np.result_type(recording, np.float32))  # integers would overflow
    broken = ~(abs(recording) < 1e30)  # NaN too; the difference of larger numbers could be infinite
    if nan == "refuse" and broken.any():
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
        warnings.warn(f"parcels {parcels} lack a signal or values: written as zeros", stacklevel=2)
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
    for name, value, least in (("num_train", num_train, 1), ("num_val", num_val, 1),
                               ("num_parcels", num_parcels, 2),
                               ("num_timepoints", num_timepoints, 20), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}, must be at least {least}")
    brain = make_brain(num_parcels, np.random.default_rng([seed, 0, 0]))
    write_dataset(Path(output_dir, "coords"), {
        "Index": list(range(num_parcels)), **dict(zip("XYZ", brain["xyz"].T)),
        "Network": brain["network"]})
    for stream, split, count in (2, "val", num_val), (1, "train", num_train):  # train goes last
        people = [make_person(brain, num_timepoints, np.random.default_rng([seed, stream, i]))
                  for i in range(count)]
        write_dataset(Path(output_dir, split), {
            "Subject": [f"{split}-{i:04d}" for i in range(count)],
            **{name: [person[name] for person in people] for name in people[0]}})
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
    network_of_patch, num_parcels = brain["network_of_patch"], len(brain["xyz"])
    num_patches = len(network_of_patch)

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

# Files of your own: right, or refused in one line -------------------------------------------------

FORMATS = ".tsv .csv .txt .1D .npy .ptseries.nii"  # in any case, each with or without .gz
FORMAT = re.compile(rf"({'|'.join(map(re.escape, FORMATS.split()))})(\.gz)?$", re.IGNORECASE)
MISSING = r"(?i)^\s*(n/a|na|nan|null|none)?\s*$"  # a cell without a value
BIDS = "(sub-[0-9A-Za-z]+)(_(?!sub-)[a-z]+-[^_]+)*(_[a-z]+[0-9]?)?"  # person, entities, suffix
XCP_D = {"network_label": "Network", "roi name": "Label"}  # what its atlases call these columns
WINDOW, PATCH, FEW = 200, 20, 50  # of brainlm.py: timepoints; recordings for 200 steps in 8 epochs

def make_files_data(input_dir, coords, participants, output_dir, pattern, subject_pattern, header,
                    val_share, min_timepoints, tr, seed):
    """Write {train,val,coords} from files of (timepoints, parcels) each; arguments as the flags."""
    if not 0 < val_share < 1 or min_timepoints < PATCH or tr is not None and not tr > 0:
        raise ValueError(f"--val_share is {val_share}, --min_timepoints {min_timepoints}, --tr "
                         f"{tr}: need a share between 0 and 1, {PATCH} or more, more than 0")
    parcels, labellings = read_parcels(Path(coords))
    people = read_participants(Path(participants)) if participants else {}
    nobody = {name: None for rows in people.values() for name in rows[0][1]}
    files = find_files(Path(input_dir), pattern, [coords, participants or coords])
    rows, short, strangers, first = [], [], 0, None
    for file, (subject, session) in zip(files, find_people(files, input_dir, subject_pattern)):
        with naming(file):
            names, series = read_series(file, header, labellings, len(parcels["X"]))
            first = first or (file, names)
            if not labellings and names != first[1]:
                raise ValueError(f"columns are named {listed(names)}, in {first[0]} "
                                 f"{listed(first[1])}: need one order, or labels in {coords}")
            if len(series) < min_timepoints:
                short.append(str(len(series)))
            elif (recording := cleaned(series, file)) is not None:
                said = said_of(people.get(plain(subject), []), session)
                strangers += said is None
                rows.append({**(said or nobody), "Subject": subject, "File": str(file),
                             **({"TR": tr} if tr else {}), RECORDING_COL: recording})

    subjects = sorted({row["Subject"] for row in rows})
    told = (f"{len(files)} files fit --pattern {pattern!r}, {len(short)} are shorter than "
            f"--min_timepoints {min_timepoints} ({listed(short)}), {len(rows)} are used, of "
            f"{len(subjects)} people ({listed(subjects)})")
    if len(subjects) < 2:
        raise ValueError(f"{told}: need two people, to train and to validate on")
    print(told)
    if subject_pattern and len(subjects) >= len(rows) - 1:
        print(f"note: --subject_pattern finds {len(subjects)} people in {len(rows)} files: right?")
    if people:
        absent = sorted(people.keys() - {plain(subject) for subject in subjects})
        told = (f"{participants}: {strangers} of {len(rows)} recordings have no row there, "
                f"{len(absent)} of {len(people)} people no recording ({listed(absent)})")
        if strangers == len(rows):
            raise ValueError(told)
        print(told)

    # All recordings of a person go into one split.
    num_val = min(max(1, round(val_share * len(subjects))), len(subjects) - 1)
    in_val = np.random.default_rng(seed).permutation(subjects)[:num_val]
    write_dataset(Path(output_dir, "coords"), parcels)
    for split in "val", "train":
        chosen = [row for row in rows if (row["Subject"] in in_val) == (split == "val")]
        columns = {name: [row[name] for row in chosen] for name in rows[0]}
        write_dataset(Path(output_dir, split), columns)
    command = ["python", os.path.relpath(Path(__file__).with_name("brainlm.py")), "pretrain"]
    for split in "train", "val", "coords":
        command += [f"--{split}_dataset_path", str(Path(output_dir, split))]
    shortest = min(len(row[RECORDING_COL]) for row in rows)
    if shortest < WINDOW:
        command += ["--num_timepoints_per_voxel", str(shortest // PATCH * PATCH)]
    if len(chosen) < FEW:
        command += ["--max_steps", "200"]
    print(f"wrote {output_dir}/{{train,val,coords}}: {len(subjects) - num_val} + {num_val} people. "
          f"Next:\n\n{shlex.join([*command, '--output_dir', 'runs/mine'])}")

@contextlib.contextmanager
def naming(file):
    """What goes wrong while reading what others wrote becomes one line that names the file."""
    try:
        yield
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ImportError):
            told += f": pip install {error.name}"
        raise ValueError(f"{file}: {told}") from None

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

def find_people(files, folder, pattern):
    """(person, session or "") of each file: sub-<label> or what a pattern finds, ses-<label>."""
    people, written = [], {}
    with naming(f"--subject_pattern {pattern}"):
        if pattern and re.compile(pattern).groups != 1:
            raise ValueError("need a regular expression with one group in ( )")
    for file in files:
        path = FORMAT.sub("", file.relative_to(folder).as_posix())
        parts = [part for part in path.split("/") if re.search("(?<![A-Za-z])sub-", part)]
        matches = ([re.search(pattern, path)] if pattern else
                   [re.fullmatch(BIDS, part) for part in parts])
        labels = {match and match[1] for match in matches}
        sessions = {*re.findall("(?<![^/_])ses-([0-9A-Za-z]+)", path)} or {""}
        if len(labels) != 1 or not all(labels) or len(sessions) > 1:
            raise ValueError(f"{file}: who is it? need one sub-<label>_key-value_suffix, one ses- "
                             f"or none; or --subject_pattern (now {pattern}), as {example(path)}")
        label, = labels
        other = written.setdefault(plain(label), label)
        if other != label:
            raise ValueError(f"{other} and {label}: one person or two? --subject_pattern tells")
        people.append((label, plain(*sessions)))
    return people

def example(path):
    """A --subject_pattern for a path, whose group is a part of it up to its longest number."""
    number = max(re.findall("[0-9]+", path), key=len, default="")
    label = re.search(f"[^/]*{number}", path)[0]
    group = re.sub("[A-Za-z]+", "[A-Za-z]+", re.sub("[0-9]+", "[0-9]+", re.escape(label)))
    return f"{shlex.quote(f'(?:^|/)({group})')} for {label}"

def plain(label):
    """A label without sub- or ses-, and without the leading zeros that spreadsheets take away."""
    return re.sub("^(sub-|ses-)?0*(?=.)", "", label)

def read_bytes(file):
    """The content of a file, unpacked."""
    with open(file, "rb") as start:
        if start.read(20).startswith((b"version https://git-", b"/annex/objects/")):
            raise ValueError("a pointer of git-lfs or git-annex: fetch the file that it stands for")
    with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as content:
        return content.read()

def read_cells(file):
    """A table as text [rows, columns], its header included, "" where a value is missing."""
    import pandas
    content = read_bytes(file)
    utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if utf_16 else "utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if ".1d" in file.name.lower():
        text = re.sub("(?m)^ *#.*\n", "", text)
    text = text.strip("\r\n")
    if not text:
        raise ValueError("no rows")
    separator = next((mark for mark in "\t;," if mark in text.partition("\n")[0]), r"\s+")
    table = pandas.read_csv(io.StringIO(text, newline=None), sep=separator, header=None, dtype=str,
                            keep_default_na=False, skip_blank_lines=False,
                            engine="python")  # which tells an empty cell from one that is not there
    for row in np.flatnonzero(table.isna().any(axis=1)):
        raise ValueError(f"row {row + 1} has fewer cells than row 1")
    return table.replace(rf"{MISSING}|^\s+|\s+$", "", regex=True).to_numpy(object)

def parse(cells):
    """Text -> float64 of its shape, NaN where it is no number; and where it is other text."""
    import pandas
    text = pandas.Series(np.ravel(cells), dtype=str)
    commas = text[text.str.contains(",", regex=False)]
    thousands = commas.str.fullmatch(r"[-+]?[1-9]\d{0,2}(,\d{3})+").all()
    if not thousands and not text.str.contains(".", regex=False).any():
        text = text.str.replace(",", ".", regex=False)
    values = pandas.to_numeric(text, errors="coerce").to_numpy(np.float64).reshape(cells.shape)
    return values, np.isnan(values) & (cells != "")

def numbers(cells, names, first_row):
    """Text -> float64, NaN where a value is missing; other text is refused by row and column."""
    values, other = parse(cells)
    for row, column in np.argwhere(other):
        raise ValueError(f"row {row + first_row}, column {names[column]}: {cells[row, column]!r}, "
                         "need numbers or n/a, decimals all with points or all with commas")
    return values

def has_header(cells, labellings):
    """Whether the first row of a series is names of parcels and no timepoint."""
    values, other = parse(cells[0])
    if other.any() or any(set(cells[0]) >= set(labels) for labels in labellings):
        return True
    ids = values[int(cells[0, 0] == ""):]  # pandas writes no name above an index
    if (ids % 1 != 0).any() or len(set(ids)) < len(ids):
        return False
    if (parse(cells[1:])[0] % 1 > 0).any():
        return True
    raise ValueError(f"row 1 is {listed([*cells[0]])}: values or names? --header yes or no tells")

def read_series(file, header, labellings, num_parcels):
    """Names of the columns or None, and float64 [timepoints, parcels], NaN where missing."""
    kind, names = FORMAT.search(file.name)[1].lower(), None
    if kind == ".npy":
        cells = np.load(io.BytesIO(read_bytes(file)))
        if cells.ndim != 2 or cells.dtype.kind not in "biuf":
            raise ValueError(f"{cells.dtype} of shape {cells.shape}, need (timepoints, parcels)")
    elif kind == ".ptseries.nii":
        import nibabel
        image = nibabel.Cifti2Image.from_bytes(read_bytes(file))
        cells, names = image.get_fdata(), [*image.header.get_axis(1).name]
    else:
        cells = read_cells(file)
    rows, columns = cells.shape
    named = any({*labels} in ({*cells[:, 0]}, {*cells[1:, 0]}) for labels in labellings)
    if named or num_parcels in (rows, rows - 1) and columns not in (num_parcels, num_parcels + 1):
        raise ValueError(f"{rows} rows of {columns} for {num_parcels} parcels: transposed")
    if cells.dtype == object:
        start = int(has_header(cells, labellings) if header == "auto" else header == "yes")
        counts = np.array_equal(parse(cells[start:, 0])[0], np.arange(len(cells) - start))
        if columns > num_parcels and (counts or start and cells[0, 0] == ""):  # pandas' index
            cells = cells[:, 1:]
        names = [*cells[0]] if start else None
        cells = numbers(cells[start:], names or range(1, cells.shape[1] + 1), 1 + start)
    series = np.array(cells, np.float64)
    for row, column in np.argwhere(abs(series) >= 1e30):
        raise ValueError(f"timepoint {row + 1}, column {column + 1} is {series[row, column]}")
    return names, in_atlas_order(names or [], series, labellings, num_parcels)

def in_atlas_order(names, series, labellings, num_parcels):
    """The columns of a series [timepoints, columns] in the atlas' order, by names if they have."""
    orders = [labels for labels in labellings if sorted(labels) == sorted(names)]
    counted = names == [str(i) for i in range(len(names))]  # by pandas, where there are no names
    if labellings and not orders and not counted:
        labels = max(labellings, key=lambda labels: len({*labels} & {*names}))
        lacking, surplus = Counter(labels) - Counter(names), Counter(names) - Counter(labels)
        raise ValueError(f"parcels of --coords without a column: {listed([*lacking])}; columns "
                         f"that are no parcel there: {listed([*surplus])}")
    if series.shape[1] != num_parcels:
        raise ValueError(f"{series.shape[1]} columns for {num_parcels} parcels, first and last are "
                         f"{listed(names[:1] + names[-1:])}")
    if any(labels != orders[0] for labels in orders):
        raise ValueError("two columns of --coords name the columns, in two orders: leave one out")
    return series[:, [names.index(label) for label in orders[0]]] if orders else series

def cleaned(series, file):
    """A series scaled, its gaps interpolated in time, or None where most of it is. All is told."""
    gaps = np.isnan(series).all(axis=1)
    lost = 2 * gaps.sum() > len(series)
    if gaps.any():
        print(f"{file}: {gaps.sum()} of {len(series)} timepoints have no values:",
              "left out" if lost else "interpolated")
    if lost:
        return None
    for signal in series.T:
        signal[gaps] = np.interp(np.flatnonzero(gaps), np.flatnonzero(~gaps), signal[~gaps])
    with warnings.catch_warnings(record=True) as silent:
        warnings.simplefilter("always")
        scaled = robust_scale(series, nan="zero")
    if not scaled.any():
        raise ValueError("no parcel varies")
    for warning in silent:
        print(f"{file}: {warning.message}")
    if (abs(scaled) > 50).any():
        print(f"note: {file}: {(abs(scaled) > 50).sum()} values are spikes, past 50 after scaling")
    if len(series) == series.shape[1]:
        print(f"note: {file}: as many rows as columns: rows are taken as timepoints")
    return scaled

def read_columns(file):
    """A table with a header as a DataFrame of text."""
    import pandas
    cells = read_cells(file)
    table = pandas.DataFrame(cells[1:], columns=cells[0], dtype=object)
    repeated = table.columns[table.columns.duplicated()]
    if table.empty or len(repeated):
        raise ValueError(f"need rows below the header, and no column twice: {listed([*repeated])}")
    return table

def read_parcels(file):
    """The columns of the coords dataset, and each column of the table that can name parcels."""
    with naming(file):
        table = read_columns(file)
        short = [name.lower().replace("mni_", "").replace("_mni", "") for name in table]
        axes = "xyz" if {*"xyz"} & {*short} else "ras"
        if axes == "xyz" and {*"ras"} <= {*short}:
            print(f"note: {file}: x, y, z are read, R, A, S are not")
        if [short.count(axis) for axis in axes] != [1, 1, 1]:
            raise ValueError(f"need one x, y, z (or R, A, S), in MNI mm; found {', '.join(table)}")
        axes = [table.columns[short.index(axis)] for axis in axes]
        xyz = numbers(table[axes].to_numpy(), axes, first_row=2)
        reach = abs(xyz).max(axis=1)  # of a brain 110 mm, and not all of it is above 0
        for row in np.flatnonzero(~(reach < 200) | (reach < 1).all() | ~(xyz < 0).any()):
            raise ValueError(f"row {row + 2}: {', '.join(axes)} are {xyz[row].tolist()}: need MNI "
                             "mm, no voxel indices, no metres, none missing")
        parcels, labellings = dict(zip("XYZ", xyz.T)), []
        for name, cells in table.drop(columns=axes).items():
            kind = XCP_D.get(name.lower(), name.title())
            if kind == "Label" and not cells.is_unique:
                raise ValueError(f"column {name}: {cells.mode()[0]} names several parcels")
            if kind in ("Label", "Network"):
                parcels[kind] = np.where(cells == "", None, cells)
            if cells.is_unique and all(cells) and not (parse(cells)[0] % 1 > 0).any():
                labellings.append([*cells])
    return parcels, labellings

def read_participants(file):
    """{person: [(session or "", {column: value}), ...]}, a pair for each row."""
    people = {}
    with naming(file):
        table = read_columns(file)
        if "participant_id" not in table or {"Subject", "File", RECORDING_COL} & {*table}:
            raise ValueError(f"need participant_id, no Subject and File; found {', '.join(table)}")
        ids = table.pop("participant_id")
        for row in np.flatnonzero(ids == ""):
            raise ValueError(f"row {row + 2} lacks participant_id")
        sessions = table.get("session_id", [""] * len(ids))
        columns = {}
        for name, cells in table.items():
            values, other = parse(cells)
            columns[name] = np.where(cells == "", None, cells if other.any() else values).tolist()
        for label, session, *values in zip(ids, sessions, *columns.values()):
            row = plain(session), dict(zip(columns, values))
            people.setdefault(plain(label), []).append(row)
    return people

def said_of(rows, session):
    """{column: value} of a person in a session, None where the participants table lacks it."""
    own = [said for at, said in rows if "" in (at, session) or at == session]
    for name in own[0] if own else []:
        values = sorted({str(said[name]) for said in own})
        if len(values) > 1:
            raise ValueError(f"{name} is {listed(values)} in --participants: session_id tells")
    return own[0] if own else None

def main():
    parser = argparse.ArgumentParser(description="Write datasets for brainlm.py.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sources = {"synthetic": make_sample_data, "files": make_files_data}
    flag = parser.add_argument
    flag("--source", choices=[*sources], default="synthetic", help="made up, or your own")
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
    make = sources[args.pop("source")]
    try:
        make(**{name: args[name] for name in inspect.signature(make).parameters})
    except (OSError, ValueError) as error:
        print(f"sample_data.py: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
