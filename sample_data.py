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
    """Write `columns`, a dict of name -> one value per row, as save_to_disk of `datasets` does.

    A column of arrays (timepoints, parcels), of numpy, torch or pandas, keeps its dtype; lengths
    may differ. Any other holds strings, ints, floats or bools; None, NaN or masked is missing. An
    older dataset in `folder` is replaced, and only once the new one is complete; by one at a time.
    """
    folder = Path(folder).resolve()
    columns = {name: [as_numpy(value) for value in as_numpy(values)]
               for name, values in columns.items()}
    lengths = {name: len(values) for name, values in columns.items()}
    if len({*lengths.values()}) != 1 or 0 in lengths.values():
        raise ValueError(f"need columns of one length, of 1 or more, found {lengths}")
    present = os.listdir(folder) if folder.exists() else []
    if present and "state.json" not in present:
        raise ValueError(f"{folder} holds {present[0]} and is no dataset: will not replace it")
    types = {name: column_type(name, values) for name, values in columns.items()}
    features = {name: hf_feature(type_) for name, type_ in types.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(list(types.items()), metadata)

    # Written beside its place and renamed when complete: one that is killed leaves no half there.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        new, shard = Path(beside, "new"), "data-00000-of-00001.arrow"
        new.mkdir()
        with pa.ipc.new_stream(new / shard, schema) as stream:
            for i in range(0, max(lengths.values()), 16):
                batch = [column_values(columns[name][i:i + 16], types[name]) for name in types]
                stream.write_batch(pa.record_batch(batch, schema=schema))
        content = hashlib.sha256(pa.memory_map(str(new / shard)).read_buffer())
        state = {"_data_files": [{"filename": shard}],
                 "_fingerprint": content.hexdigest()[:16],  # `datasets` names its cache after this
                 "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
                 "_output_all_columns": False, "_split": None}
        (new / "state.json").write_text(json.dumps(state, indent=2))
        (new / "dataset_info.json").write_text(json.dumps({"features": features}, indent=2))
        if folder.exists():
            folder.rename(Path(beside, "old"))
        new.rename(folder)

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
    """What torch, on any device, pandas or numpy.ma hold as numpy array; all else as it is."""
    if isinstance(value, np.ma.MaskedArray):
        if value.ndim < 2:
            return value.tolist()  # None where masked
        return value.astype(np.result_type(value, np.float16)).filled(np.nan)
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()[()]  # [()]: a single number is no array
    return value.to_numpy() if hasattr(value, "to_numpy") else value

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
    with naming(f"column {name!r}"):
        type_ = pa.array(values, from_pandas=True).type  # NaN among strings is a missing one
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

# Files of your own: right, or refused in one line -------------------------------------------------

FORMATS = ".tsv .csv .txt .1D .npy .ptseries.nii"  # in any case, each with or without .gz
FORMAT = re.compile(rf"({'|'.join(map(re.escape, FORMATS.split()))})(\.gz)?$", re.IGNORECASE)
BIDS = "^(sub-[0-9A-Za-z]+)(_(?!sub-)[a-z]+-[^_]+)*(_[a-z]+[0-9]?)?$"  # person, entities, suffix
XCP_D = {"network_label": "network", "roi name": "label"}  # what its atlases call these columns
WINDOW, PATCH, FEW = 200, 20, 50  # of brainlm.py: timepoints; recordings for 200 steps in 8 epochs

def make_files_data(input_dir, coords, participants, output_dir, pattern, subject_pattern, header,
                    val_share, min_timepoints, tr, seed):
    """Write {train,val,coords} from files of (timepoints, parcels) each; arguments as the flags."""
    if not 0 < val_share < 1 or min_timepoints < PATCH or tr is not None and not tr > 0:
        raise ValueError(f"--val_share is {val_share}, --min_timepoints {min_timepoints}, --tr "
                         f"{tr}: need a share between 0 and 1, {PATCH} or more, more than 0")
    with naming(coords):
        parcels, labellings = read_parcels(Path(coords))
    with naming(participants):
        people = read_participants(Path(participants)) if participants else {}
    files = find_files(Path(input_dir), pattern, [coords, participants or coords])
    rows, short, strangers, first = [], [], 0, None
    for file, subject, session in [*find_people(files, input_dir, subject_pattern)]:
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
                rows.append({**(said or {}), "Subject": subject, "File": str(file),
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
    if participants:
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
    names = max(rows, key=len)  # of a row that has the participants' columns
    of_split = {"val": [row for row in rows if row["Subject"] in in_val],
                "train": [row for row in rows if row["Subject"] not in in_val]}
    for split, chosen in of_split.items():
        columns = {name: [row.get(name) for row in chosen] for name in names}
        write_dataset(Path(output_dir, split), columns)
    program = shlex.quote(os.path.relpath(Path(__file__).with_name("brainlm.py")))
    data = shlex.quote(str(Path(output_dir)))
    window = min(WINDOW, min(len(row[RECORDING_COL]) for row in rows) // PATCH * PATCH)
    steps = "--max_steps 200 " if len(of_split["train"]) < FEW else ""
    print(f"wrote {output_dir}/{{train,val,coords}}: {len(subjects) - num_val} + {num_val} people. "
          f"Next:\n\npython {program} pretrain --train_dataset_path {data}/train "
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

def find_people(files, folder, pattern):
    """Each file, person, session or "": sub-<label> or what a pattern finds, ses-<label>."""
    written = {}
    with naming(f"--subject_pattern {pattern}"):
        if pattern and re.compile(pattern).groups != 1:
            raise ValueError("need a regular expression with one group in ( )")
    for file in files:
        path = FORMAT.sub("", file.relative_to(folder).as_posix())
        parts = [path] if pattern else re.findall("[^/]*(?<![A-Za-z])sub-[^/]*", path)
        labels = {match and match[1] for match in map(re.compile(pattern or BIDS).search, parts)}
        sessions = {*re.findall("(?<![^/_])ses-([0-9A-Za-z]+)", path)} or {""}
        if len(labels) != 1 or not all(labels) or len(sessions) > 1:
            raise ValueError(f"{file}: who is it? need one sub-<label>_key-value_suffix, one ses- "
                             f"or none; or --subject_pattern (now {pattern}), as {example(path)}")
        label, = labels
        other = written.setdefault(plain(label), label)
        if other != label:
            raise ValueError(f"{other} and {label}: one person or two? --subject_pattern tells")
        yield file, label, plain(*sessions)

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
    with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as content:
        return content.read()

def read_table(file, header="yes", labellings=()):
    """A DataFrame of text, "" where a value is missing; rows, and columns without names, from 1."""
    import pandas
    content = read_bytes(file)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1")
    if ".1d" in file.name.lower():
        text = re.sub("(?m)^ *#.*\n", "", text)
    text = text.strip("\r\n")
    if not text:
        raise ValueError("no rows")
    separator = next((mark for mark in "\t;," if mark in text.partition("\n")[0]), r"\s+")
    table = pandas.read_csv(io.StringIO(text, newline=None), sep=separator, header=None, dtype=str,
                            keep_default_na=False, skip_blank_lines=False, engine="python")
    table = table.set_axis(range(1, len(table) + 1)).rename(columns=lambda column: column + 1)
    for row in table.index[table.isna().any(axis=1)]:  # an empty cell is "", one not there is NaN
        raise ValueError(f"row {row} has fewer cells than row 1")
    table = table.replace(r"(?i)^\s*(n/a|na|nan|null|none)?\s*$|^\s+|\s+$", "", regex=True)
    if any({*labels} in ({*table[1]}, {*table[1][1:]}) for labels in labellings):
        raise ValueError("column 1 names the parcels: transposed")
    if header == "yes" or header == "auto" and has_header(table, labellings):
        table = table[1:].set_axis(table.loc[1], axis=1)
    return table

def parse(cells):
    """Text -> float64 of its shape, NaN where it is no number; and where it is other text."""
    import pandas
    text = pandas.Series(np.ravel(cells), dtype=str)
    commas = text.str.contains(",") & ~text.str.fullmatch(r"[-+]?[1-9]\d{0,2}(,\d{3})+")
    if commas.any() and not text.str.contains(".", regex=False).any():  # 1,234 may be thousands
        text = text.str.replace(",", ".")
    values = pandas.to_numeric(text, errors="coerce").to_numpy(np.float64).reshape(np.shape(cells))
    return values, np.isnan(values) & (np.array(cells) != "")

def numbers(table):
    """Text -> float64, NaN where a value is missing; other text is refused by row and column."""
    values, other = parse(table)
    for row, column in np.argwhere(other):
        cell = f"row {table.index[row]}, column {table.columns[column]}: {table.iat[row, column]!r}"
        raise ValueError(f"{cell}, need numbers or n/a, decimals all with points or all commas")
    return values

def has_header(table, labellings):
    """Whether the first row of a series is names of parcels and no timepoint."""
    names, (ids, other) = [*table.loc[1]], parse(table.loc[1])
    if other.any() or any({*names} >= {*labels} for labels in labellings):
        return True
    ids = ids[int(names[0] == ""):]  # pandas writes no name above an index
    whole = not (ids % 1).any() and len({*ids}) == len(ids)
    if whole and not (parse(table[1:])[0] % 1 > 0).any():
        raise ValueError(f"row 1 is {listed(names)}: values or names? --header yes or no tells")
    return whole

def read_series(file, header, labellings, num_parcels):
    """The names of the columns in the file's order, if any, and, in the atlas' order, their values,
    float64 [timepoints, parcels]."""
    kind, names = FORMAT.search(file.name)[1].lower(), []
    if kind == ".npy":
        series = np.load(io.BytesIO(read_bytes(file)))
        if series.ndim != 2 or series.dtype.kind not in "biuf":
            raise ValueError(f"{series.dtype} of shape {series.shape}, need (timepoints, parcels)")
    elif kind == ".ptseries.nii":
        import nibabel
        image = nibabel.Cifti2Image.from_bytes(read_bytes(file))
        series, names = image.get_fdata(), [*image.header.get_axis(1).name]
    else:
        table = read_table(file, header, labellings)
        counts = np.array_equal(parse(table.iloc[:, 0])[0], np.arange(len(table)))
        if table.shape[1] > num_parcels and (counts or table.columns[0] == ""):  # pandas' index
            table = table.iloc[:, 1:]
        names, series = [name for name in table if isinstance(name, str)], numbers(table)
    series = np.array(series, np.float64)
    for row, column in np.argwhere(abs(series) >= 1e30):
        raise ValueError(f"timepoint {row + 1}, column {column + 1} is {series[row, column]}")

    orders = [labels for labels in labellings if sorted(labels) == sorted(names)]
    counted = names == [str(i) for i in range(len(names))]  # by pandas, where there are no names
    if labellings and not orders and not counted:
        labels = max(labellings, key=lambda labels: len({*labels} & {*names}))
        lacking, surplus = Counter(labels) - Counter(names), Counter(names) - Counter(labels)
        raise ValueError(f"parcels of --coords without a column: {listed([*lacking])}; columns "
                         f"that are no parcel there: {listed([*surplus])}")
    if series.shape[1] != num_parcels:
        hint = ": transposed?" * (len(series) == num_parcels)
        raise ValueError(f"(timepoints, parcels) are {series.shape} for {num_parcels} rows of "
                         f"--coords{hint}")
    if any(labels != orders[0] for labels in orders):
        raise ValueError("two columns of --coords name the columns, in two orders: leave one out")
    return names, series[:, [names.index(label) for label in orders[0]]] if orders else series

def cleaned(series, file):
    """A series scaled, its gaps interpolated in time, or None where most of it is. All is told."""
    gaps = np.isnan(series).all(axis=1)
    if 2 * gaps.sum() > len(series):
        print(f"{file}: {gaps.sum()} of {len(series)} timepoints have no values: left out")
        return None
    if gaps.any():
        print(f"{file}: {gaps.sum()} of {len(series)} timepoints have no values: interpolated")
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
    table = read_table(file)
    kinds = [re.sub("_?mni_?", "", XCP_D.get(name.lower(), name.lower())) for name in table]
    axes = "xyz" if {*"xyz"} & {*kinds} else "ras"
    if axes == "xyz" and {*"ras"} <= {*kinds}:
        print(f"note: {file}: x, y, z are read, R, A, S are not")
    if [kinds.count(axis) for axis in axes] != [1, 1, 1] or not table.columns.is_unique:
        raise ValueError(f"need x, y, z (or R, A, S), no name twice; found {', '.join(table)}")
    axes = [table.columns[kinds.index(axis)] for axis in axes]
    xyz = numbers(table[axes])
    reach = abs(xyz).max(axis=1)  # of a brain 110 mm, and not all of it is above 0
    for row in np.flatnonzero(~(reach < 200) | (reach < 1).all() | ~(xyz < 0).any()):
        raise ValueError(f"row {row + 2}: {', '.join(axes)} are {xyz[row].tolist()}: need MNI mm, "
                         "no voxel indices, no metres, none missing")
    parcels, labellings = dict(zip("XYZ", xyz.T)), []
    for kind, (name, cells) in zip(kinds, table.items()):
        if kind == "label" and not cells.is_unique:
            raise ValueError(f"column {name}: {cells.mode()[0]} names several parcels")
        if kind in ("label", "network"):
            parcels[kind.title()] = np.where(cells == "", None, cells)
        whole = not (parse(cells)[0] % 1 > 0).any()
        if name not in axes and cells.is_unique and all(cells) and whole:
            labellings.append([*cells])
    return parcels, labellings

def read_participants(file):
    """{person: [(session or "", {column: value}), ...]}, a pair for each row."""
    table, people = read_table(file), {}
    columns = [*table, "Subject", "File", RECORDING_COL]
    if "participant_id" not in columns or len({*columns}) < len(columns):
        raise ValueError("need participant_id, no column twice, none called Subject or File; found "
                         f"{', '.join(table)}")
    persons, sessions = table["participant_id"], table.get("session_id", [""] * len(table))
    for row in persons.index[persons == ""]:
        raise ValueError(f"row {row} lacks participant_id")
    columns = {}
    for name, cells in table.drop(columns="participant_id").items():
        values, other = parse(cells)
        columns[name] = np.where(cells == "", None, cells if other.any() else values).tolist()
    for person, session, *cells in zip(persons, sessions, *columns.values()):
        row = dict(zip(columns, cells))
        people.setdefault(plain(person), []).append((plain(session), row))
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
