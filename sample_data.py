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
import os
import re
import shlex
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

RECORDING_COL = "Voxelwise_RobustScaler_Normalized_Recording"

# Writing a dataset --------------------------------------------------------------------------------

def write_dataset(folder, rows):
    """Write a dataset in the layout of `datasets.Dataset.save_to_disk`.

    `rows` is a dict of name -> one value per row, or an iterable of rows, each a dict of name ->
    value, of which one at a time is in memory. Values are strings, ints, floats, bools or arrays
    (timepoints, parcels) of numpy, torch or pandas, all of one dtype; lengths may differ. None, NaN
    and masked values are missing. The first row of an iterable decides the types; a value missing
    there is `pyarrow.scalar(None, type)`. An older dataset is replaced when all is written.
    """
    folder = Path(folder).expanduser().resolve()
    write_datasets(folder.parent, {folder.name: rows})

def write_datasets(folder, datasets):
    """Write {name: rows} below a folder; after an error, none of them."""
    folder = Path(folder).expanduser()
    for name in datasets:
        present = os.listdir(folder / name) if (folder / name).exists() else []
        if present and "state.json" not in present:
            raise ValueError(f"{folder / name} holds {present[0]}, no dataset; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
        for name, rows in datasets.items():
            write_files(Path(temporary, name), rows)
        for name in datasets:
            if (folder / name).exists():
                (folder / name).rename(Path(temporary, f"old {name}"))
            Path(temporary, name).rename(folder / name)

def write_files(folder, rows):
    rows = iter(rows_of(rows) if hasattr(rows, "items") else rows)
    row, number = next(rows, None), 0
    if not row:
        raise ValueError("expected at least one row and one column")
    types = {name: array.type for name, array in arrow_arrays(row, number, {}).items()}
    schema, shard = pa.schema(list(types.items())), "data-00000-of-00001.arrow"
    content = hashlib.sha256(schema.serialize())
    folder.mkdir()
    with pa.ipc.new_stream(folder / shard, schema) as stream:
        while row is not None:
            if row.keys() != types.keys():
                raise ValueError(f"row {number} has columns {[*row]}, but row 0 has {[*types]}")
            batch = pa.RecordBatch.from_pydict(arrow_arrays(row, number, types), schema)
            stream.write_batch(batch)
            content.update(batch.serialize())
            row, number = next(rows, None), number + 1
    state = {"_data_files": [{"filename": shard}],
             "_fingerprint": content.hexdigest()[:16],  # `datasets` names its cache after this
             "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
             "_output_all_columns": False, "_split": None}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text("{}")  # `datasets` takes the types from the file

def rows_of(columns):
    """Convert a dict of columns to rows, in which scalars have the type of their whole column."""
    columns = {name: [*map(as_numpy, as_numpy(values))] for name, values in columns.items()}
    lengths = {name: len(values) for name, values in columns.items()}
    if len({*lengths.values()}) != 1:
        raise ValueError(f"expected columns of one length; found {lengths}")
    for name, values in columns.items():
        if not any(isinstance(value, np.ndarray) for value in values):
            with input_errors(f"column {name!r}"):
                columns[name] = [*pa.array(values, from_pandas=True)]  # NaN among text is missing
    return (dict(zip(columns, values)) for values in zip(*columns.values()))

def arrow_arrays(row, number, types):
    """Convert a row to Arrow arrays of one element, by default of the values' own types."""
    arrays = {}
    for name, value in row.items():
        with input_errors(f"column {name!r}, row {number}"):
            value = as_numpy(value)
            if isinstance(value, np.ndarray):
                value = as_recording(value)
                array = pa.array([[*np.ascontiguousarray(value, value.dtype.name)]])
            elif isinstance(value, pa.Scalar):
                array = pa.array([value.as_py()], value.type)
            else:
                array = pa.array([value], from_pandas=True)
            type_ = types.get(name, array.type)
            if type_ != array.type and (type_ == pa.null() or pa.types.is_list(type_)):
                raise ValueError(f"expected {type_}, as in row 0, found {array.type}")
            arrays[name] = array.cast(type_)
    return arrays

@contextlib.contextmanager
def input_errors(what):
    """Turn any exception into a ValueError with a one-line message that starts with `what`."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what}: {message}") from None

def as_numpy(value):
    """Convert values of torch, pandas and numpy.ma to numpy; return others as is."""
    if isinstance(value, np.ma.MaskedArray) and value.ndim < 2:
        return value.tolist()  # None where masked
    if isinstance(value, np.ma.MaskedArray):
        return value.astype(np.result_type(value, np.float16)).filled(np.nan)
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()[()]  # [()] turns an array of one number into a number
    return value.to_numpy() if hasattr(value, "to_numpy") else value

def as_recording(value):
    value = np.asarray(as_numpy(value))
    if value.ndim != 2 or value.size == 0 or value.dtype.kind not in "iuf":
        raise ValueError(f"expected numbers (timepoints, parcels), got {value.dtype} {value.shape}")
    return value

def robust_scale(recording, nan="raise", warn=None):
    """Scale (timepoints, parcels) to float32 with median 0 and interquartile range 1 per parcel.

    A parcel without signal (interquartile range at most a millionth of its largest value) is set to
    zero and reported through `warn`, by default `warnings.warn`. So is, with nan="zero", a parcel
    with NaN, masked or infinite values, or values of 1e30 or more; with nan="raise" they raise.
    """
    recording = as_recording(recording)
    recording = recording.astype(np.result_type(recording, np.float32))  # integers would overflow
    broken = ~(abs(recording) < 1e30)  # NaN too; differences of larger numbers could overflow
    if nan != "zero" and broken.any():
        timepoint, parcel = np.argwhere(broken)[0]
        raise ValueError(f"timepoint {timepoint}, parcel {parcel} is {recording[timepoint, parcel]}"
                         "; interpolate it, or pass nan='zero'")
    recording[:, broken.any(axis=0)] = 0
    low, median, high = np.percentile(recording, [25, 50, 75], axis=0)
    silent = high - low <= 1e-6 * abs(recording).max(axis=0)
    scaled = (recording - median) / np.where(silent, 1, high - low)
    scaled[:, silent] = 0
    if silent.any():
        parcels = ", ".join(map(str, np.flatnonzero(silent)))
        (warn or warnings.warn)(f"parcels {parcels} (no signal or missing values) are set to zero")
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

    Space: parcels of one of 7 networks share signal, neighbours share noise; a third is white.
    Time: networks have their power at 0.01 to 0.1 Hz, so the past predicts the next few seconds.
    Age, 45 to 80 years: the cutoff of the networks' spectrum rises from about 0.04 to 0.085 Hz,
    and the patches of the Default network become less correlated. Clinical scores correlate with
    each other and weakly with age. A recording depends only on `seed`, its split and its number.
    """
    if num_parcels < 2 or num_timepoints < PATCH:
        raise ValueError(f"expected at least 2 parcels and {PATCH} timepoints")
    brain = make_brain(num_parcels, np.random.default_rng([seed, 0, 0]))

    def participants(split, stream, count):
        for i in range(count):
            rng = np.random.default_rng([seed, stream, i])
            yield {"Subject": f"{split}-{i:04d}", **make_person(brain, num_timepoints, rng)}

    write_datasets(output_dir, {
        "coords": {"Index": list(range(num_parcels)), **dict(zip("XYZ", brain["xyz"].T)),
                   "Network": brain["network"]},
        "val": participants("val", 2, num_val), "train": participants("train", 1, num_train)})
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
    scores = {name: pa.scalar(None if rng.random() < 0.1 else score, pa.int64())
              for name, score in scores.items()}
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

# Files of your own --------------------------------------------------------------------------------

FORMATS = ".tsv .csv .txt .1D .npy .ptseries.nii"  # in any case, each with or without .gz
FORMAT = re.compile(rf"({'|'.join(map(re.escape, FORMATS.split()))})(\.gz)?$", re.IGNORECASE)
BIDS = "^(sub-[0-9A-Za-z]+)(_(?!sub-)[a-z]+-[^_]+)*(_[a-z]+[0-9]?)?$"  # label, entities, suffix
XCP_D = {"network_label": "network", "roi name": "label"}  # column names in its atlases
MISSING = "", "n/a", "na", "nan", "null", "none"  # cells without a value, in any case
MISSING_CODES = 99, 777, 888, 999, 8888, 9999  # and their negatives, common codes for n/a
WINDOW, PATCH = 200, 20  # defaults of brainlm.py, in timepoints

def make_files_data(input_dir, coords, participants, output_dir, pattern, subject_pattern, header,
                    val_fraction, min_timepoints, tr, seed):
    """Write {train,val,coords} from files of (timepoints, parcels); the arguments are the flags."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction must be between 0 and 1 (got {val_fraction})")
    if min_timepoints < PATCH:
        raise ValueError(f"--min_timepoints must be at least {PATCH} (got {min_timepoints})")
    input_dir, coords, output_dir, participants = (
        path and Path(path).expanduser() for path in (input_dir, coords, output_dir, participants))
    with input_errors(coords):
        parcels, labellings = read_parcels(coords)
    files = find_files(input_dir, pattern, [coords, participants or coords])
    subjects, sessions = find_participants(files, input_dir, subject_pattern)
    labels = sorted({*subjects})
    print(f"{len(files)} files of {len(labels)} participants ({listed(labels)}) match --pattern")
    if len(labels) < 2:
        raise ValueError(f"expected at least two participants, found {listed(labels)}")
    scalars = {"Subject": subjects, "File": [*map(str, files)]}
    if participants:
        with input_errors(participants):
            scalars |= read_participants(participants, subjects, sessions)
    # All recordings of a participant belong to the same split.
    num_val = min(max(1, round(val_fraction * len(labels))), len(labels) - 1)
    in_val = {*np.random.default_rng(seed).permutation(labels)[:num_val]}
    trs, lengths = Counter(), {"val": [], "train": []}

    def recordings(split):
        for file, row in zip(files, rows_of(scalars)):
            if (row["Subject"].as_py() in in_val) != (split == "val"):
                continue
            with input_errors(file):
                series, header_tr = read_series(file, header, labellings, len(parcels["X"]))
                recording = cleaned(series, file, min_timepoints)
            if recording is not None:
                trs[header_tr or tr] += 1
                lengths[split].append(len(recording))
                row["TR"] = pa.scalar(header_tr or tr, pa.float64())
                yield row | {RECORDING_COL: recording}
        if not lengths[split]:
            raise ValueError(f"no recording is left for {split}; lower --min_timepoints")

    datasets = {"coords": parcels, "val": recordings("val"), "train": recordings("train")}
    write_datasets(output_dir, datasets)
    if len(trs) > 1 or tr and tr not in trs:
        found = ", ".join(f"{each or 'unknown'} in {count} files" for each, count in trs.items())
        print(f"note: the TR is {found} (--tr is {tr}); the model does not know the TR; use one")
    window = min(WINDOW, min(lengths["val"] + lengths["train"]) // PATCH * PATCH)
    command = ["python", os.path.relpath(Path(__file__).with_name("brainlm.py")), "pretrain",
               *(f"--{name}_dataset_path={output_dir}/{name}" for name in datasets),
               f"--num_timepoints_per_voxel={window}", "--output_dir=runs/mine"]
    print(f"wrote {output_dir}/{{train,val,coords}}: {len(lengths['train'])} recordings to train "
          f"and {len(lengths['val'])} to validate. Next:\n\n{shlex.join(command)}")

def listed(names):
    names = [str(name) or "''" for name in names or ["none"]]
    return ", ".join(names[:3]) + " ..." * (len(names) > 3)

def find_files(folder, pattern, tables):
    """The files below a folder whose paths end in a pattern; **/ matches up to 8 folders."""
    tables = [Path(table).resolve() for table in tables]
    there = [file for file in visible_files(folder, set()) if file.resolve() not in tables]
    patterns = [pattern.replace("**/", "*/" * folders) for folders in range(9)]
    matches = [file for file in there if any(map(file.relative_to(folder).match, patterns))]
    files = [file for file in matches if FORMAT.search(file.name)]
    if not files:
        found = listed([file.name for file in matches or there])
        raise ValueError(f"no file matches --pattern {pattern!r} and is {FORMATS}; got {found}")
    return files

def visible_files(folder, seen):
    """All files below a folder, except hidden ones; follows links, but visits no folder twice."""
    if folder.resolve() not in seen:
        seen.add(folder.resolve())
        for path in sorted(path for path in folder.iterdir() if path.name[0] != "."):
            yield from visible_files(path, seen) if path.is_dir() else [path]

def find_participants(files, folder, pattern):
    """The participant (sub-<label>, or the group of a pattern) and session of each file."""
    with input_errors(f"--subject_pattern {pattern}"):
        if pattern and re.compile(pattern).groups != 1:
            raise ValueError("expected a regular expression with one group in ( )")
    paths = [FORMAT.sub("", file.relative_to(folder).as_posix()) for file in files]
    numbers = [max(re.findall("[0-9]+", path), key=len, default="") for path in paths]  # longest
    subjects, sessions, written = [], [], {}
    for file, path in zip(files, paths):
        parts = [path] if pattern else re.findall("[^/]*(?<![A-Za-z])sub-[^/]*", path)
        labels = {match and match[1] for match in map(re.compile(pattern or BIDS).search, parts)}
        in_path = {*re.findall("(?<![^/_])ses-([0-9A-Za-z]+)", path)} or {""}
        if len(labels) != 1 or not all(labels) or len(in_path) > 1:
            raise ValueError(f"{file}: cannot find one sub-<label>_... and up to one ses-<label>; "
                             f"pass --subject_pattern (now {pattern}), as {example(path, numbers)}")
        label, = labels
        subjects.append(written.setdefault(plain(label), label))  # sub-1 and sub-01 are the same
        sessions += map(plain, in_path)
    count = len({*subjects})
    if pattern and 2 * count <= len(files) == len({*numbers}):
        print(f"note: --subject_pattern finds {count} participants in {len(files)} files, whose "
              f"numbers all differ ({listed(numbers)}); maybe use {example(paths[0], numbers)}")
    return subjects, sessions

def example(path, numbers):
    """Propose a --subject_pattern that matches a name up to its longest number, for all paths."""
    digits = min(map(len, filter(None, numbers)), default=0)
    pattern = f"(?:^|/)([^/]*?[0-9]{{{digits},}})" if digits else "(?:^|/)([^/_]+)"
    label = re.search(pattern, path)
    return shlex.quote(pattern) + (f" for {label[1]}" if label else "")

def plain(label):
    """A label without sub- or ses- and without leading zeros, which spreadsheets remove."""
    return re.sub("^(sub-|ses-)?0*(?=.)", "", label)

def read_bytes(file):
    with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as content:
        return content.read()

def read_rows(file, num_parcels=None):
    """The rows of a table, as lists of text, and its comments: in .1D, lines that start with #."""
    content = read_bytes(file)
    if content[:4] in (b"PK\3\4", b"\xd0\xcf\x11\xe0"):
        raise ValueError("this is an Excel workbook, not text; save it as .csv or .tsv")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1")
    lines = [line.strip(" \n") for line in io.StringIO(text.strip("\r\n"), newline=None)]
    afni = file.name.lower().endswith((".1d", ".1d.gz"))
    comments = [line for line in lines if afni and line.startswith("#")]
    lines = [line for line in lines if line not in comments]
    if not any(lines):
        raise ValueError("the file has no rows")
    separator = next((mark for mark in "\t;," if mark in lines[0]), None)
    rows = (csv.reader(lines, delimiter=separator, skipinitialspace=True) if separator
            else map(str.split, lines))
    rows = [[*map(str.strip, row)] for row in rows]
    # A separator at the end of every line makes an empty last column, which is no parcel.
    width = max(map(len, rows))
    while width not in (1, num_parcels) and not any(any(row[width - 1:]) for row in rows):
        width -= 1
    rows = [row[:width] for row in rows]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise ValueError(f"row {number} has {len(row)} cells, but row 1 has {len(rows[0])}")
    return rows, comments

def to_number(cell):
    """Convert text to a float, NaN if the value is missing, or None if it is other text."""
    try:
        return None if "_" in cell else float(cell)  # float() accepts 1_000
    except ValueError:
        return np.nan if cell.lower() in MISSING else None

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
                             " write n/a if it is missing, and all decimals with , or all with .")
    return np.array(values, np.float64).reshape(-1, len(names))

def column_numbers(cells):
    """Convert a column of text to float64, or to None if it has other text."""
    try:
        return numbers([cells], cells)[0]
    except ValueError:
        return None

def has_header(rows, labellings):
    """Whether the first row holds names of parcels rather than a timepoint."""
    if column_numbers(rows[0]) is None or any({*rows[0]} >= {*labels} for labels in labellings):
        return True
    ids = [cell for cell in rows[0] if cell.lower() not in MISSING]
    numbered = all(map(str.isdigit, ids)) and len({*ids}) == len(ids) > len(rows[0]) / 2
    if numbered and not any("." in cell or "," in cell for row in rows[1:] for cell in row):
        raise ValueError(f"row 1 ({listed(ids)}) may be names or values; pass --header yes or no")
    return numbered

def read_text_series(file, header, labellings, num_parcels):
    """The names of the columns, [] if there are none, and the values [timepoints, columns]."""
    rows, comments = read_rows(file, num_parcels)
    width, names = len(rows[0]), []
    for words in (re.findall('[^\\s#;,"]+', line) for line in comments):
        most = any(2 * len({*words} & {*labels}) > len(labels) for labels in labellings)
        if most or len(words) == width:
            names = words
    if header == "no":
        names = []
    elif not names and (header == "yes" or has_header(rows, labellings)):
        names = rows[0]
    is_row = names == rows[0]
    values = numbers(rows[is_row:], range(1, width + 1), 1 + is_row)
    counts = np.array_equal(values[:, 0], np.arange(len(values)))
    if width > num_parcels and (counts or names[:1] == [""]):  # index of pandas
        return names[1:], values[:, 1:]
    return names, values

def read_series(file, header, labellings, num_parcels):
    """Values [timepoints, parcels] in the order of --coords, and the TR in the header or None."""
    kind, names, tr, order = FORMAT.search(file.name)[1].lower(), [], None, slice(None)
    if kind == ".npy":
        series = as_recording(np.load(io.BytesIO(read_bytes(file))))
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
    if names and names != [str(i) for i in range(len(names))]:  # default names of pandas
        if not labellings:
            print(f"note: no column of --coords names the parcels; its rows must be in the order "
                  f"of the columns of {file} ({listed(names)})")
            labellings.append(names)
        order = column_order(names, labellings)
    if series.shape[1] != num_parcels:
        hint = "; is the file transposed?" * (len(series) == num_parcels)
        raise ValueError(f"{series.shape} does not fit {num_parcels} parcels in --coords{hint}")
    return series[:, order], tr

def column_order(names, labellings):
    """The number of the column for each parcel of --coords."""
    orders = [labels for labels in labellings if sorted(labels) == sorted(names)]
    if not orders or len({*names}) < len(names):
        labels = max(labellings, key=lambda labels: len({*labels} & {*names}))
        lacking, surplus = Counter(labels) - Counter(names), Counter(names) - Counter(labels)
        raise ValueError(f"parcels of --coords without a column: {listed([*lacking])}; columns "
                         f"without a parcel: {listed([*surplus])}; fix them or pass --header no")
    if any(labels != orders[0] for labels in orders):
        raise ValueError("two columns of --coords match the names, in two orders; remove one")
    return [names.index(label) for label in orders[0]]

def cleaned(series, file, min_timepoints):
    """Interpolate gaps in time and scale; return None if too few timepoints have values."""
    gaps = (np.isnan(series) | (series == 0)).all(axis=1)  # censored volumes can be zeros
    report = f"{file}: {gaps.sum()} of {len(series)} timepoints have no values (n/a or all zero)"
    if len(series) < min_timepoints or 2 * gaps.sum() > len(series):
        print(f"{report}; it is left out (--min_timepoints is {min_timepoints})")
        return None
    if gaps.any():
        print(f"{report}; they are interpolated")
    for signal in series.T:
        signal[gaps] = np.interp(np.flatnonzero(gaps), np.flatnonzero(~gaps), signal[~gaps])
    scaled = robust_scale(series, nan="zero", warn=lambda line: print(f"{file}: {line}"))
    if not scaled.any():
        raise ValueError("no parcel has a signal that varies")
    if (abs(scaled) > 50).any():
        print(f"note: {file}: {(abs(scaled) > 50).sum()} values are spikes, above 50 after scaling")
    return scaled

def read_table(file):
    """The columns of a table with a header, {name: cells}."""
    (names, *rows), _ = read_rows(file)
    if len({*names}) < len(names):
        raise ValueError(f"two columns have the same name: {', '.join(names)}")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}

def read_parcels(file):
    """The columns of the coords dataset, and a list of labels per column that can name parcels."""
    table = read_table(file)
    names = [*table]
    kinds = [re.sub("_?mni_?", "", XCP_D.get(name.lower(), name.lower())) for name in names]
    axes = "xyz" if {*"xyz"} & {*kinds} else "ras"
    if [kinds.count(axis) for axis in axes] != [1, 1, 1]:
        raise ValueError(f"expected columns x, y, z (or R, A, S); got {', '.join(names)}")
    axes = [names[kinds.index(axis)] for axis in axes]
    xyz = numbers([*zip(*(table[axis] for axis in axes))], axes, first_row=2)
    reach = abs(xyz).max(axis=1)  # at most 110 mm in a brain, in which some are negative
    for row in np.flatnonzero(~(reach < 200) | (reach < 1).all() | ~(xyz < 0).any()):
        raise ValueError(f"row {row + 2}: {', '.join(axes)} are {xyz[row].tolist()}; expected MNI "
                         "coordinates in mm, not voxel indices")
    parcels, labellings = dict(zip("XYZ", xyz.T)), []
    for kind, (name, cells) in zip(kinds, table.items()):
        if kind in ("label", "network"):
            missing = MISSING if kind == "network" else [""]  # NA may be the label of a parcel
            parcels[kind.title()] = [None if cell.lower() in missing else cell for cell in cells]
        named = [cell for cell in cells if cell.lower() not in MISSING]
        distinct = len({*named}) == len(named)
        if kind == "label" and not distinct:
            raise ValueError(f"column {name}: two parcels have the same name")
        if name not in axes and distinct and len(named) >= len(cells) / 2:
            labellings.append(cells)
    return parcels, labellings

def read_participants(file, subjects, sessions):
    """The columns of the table except participant_id, with a value, maybe None, per recording."""
    text, table, row_of = read_table(file), {}, {}
    if "participant_id" not in text or {*text} & {"Subject", "File", "TR", RECORDING_COL}:
        raise ValueError(f"expected participant_id, no Subject, File or TR; got {', '.join(text)}")
    for name, cells in text.items():
        numeric = column_numbers(cells)
        values = cells if numeric is None else numeric.tolist()
        table[name] = [None if cell.lower() in MISSING else value
                       for cell, value in zip(cells, values)]
        for value, count in {} if numeric is None else missing_codes(numeric).items():
            print(f"note: {file}: column {name} is {value:g} in {count} rows, far from the other "
                  "values; if this means missing, write n/a")
    for row, subject in enumerate(text["participant_id"]):
        session = text["session_id"][row] if "session_id" in text else ""
        key = plain(subject), "" if session.lower() in MISSING else plain(session)
        if subject.lower() in MISSING:
            raise ValueError(f"row {row + 2} has no participant_id")
        if key in row_of:
            raise ValueError(f"row {row + 2}: {subject} has two rows; add session_id")
        row_of[key] = row
    rows = [row_of.get((plain(subject), session), row_of.get((plain(subject), "")))
            for subject, session in zip(subjects, sessions)]
    absent = sorted({subject for subject, _ in row_of} - {*map(plain, subjects)})
    print(f"{file}: {rows.count(None)} of {len(rows)} recordings have no row; {len(absent)} "
          f"participants have no recording ({listed(absent)})")
    if rows.count(None) == len(rows):
        raise ValueError("no participant_id is the label of a recording")
    return {name: [None if row is None else values[row] for row in rows]
            for name, values in table.items() if name != "participant_id"}

def missing_codes(values):
    """{value: count} of values far from the others that are repeated or a common code for n/a."""
    counts = Counter(values[np.isfinite(values)].tolist())
    distinct = [value for value in counts if abs(value) not in MISSING_CODES] or [0]
    low, high = np.percentile(distinct, [25, 75])
    return {value: count for value, count in counts.items()
            if max(low - value, value - high) > 10 * (high - low)
            and (count > 1 or abs(value) in MISSING_CODES)}

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
