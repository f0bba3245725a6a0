"""Windows per second: training with the default recipe and with others, and reading from disk.

    python benchmarks/bench.py                          # training, 424 parcels, hidden size 64
    python benchmarks/bench.py --parcels 94 424 1000 --hidden_size 256 --dtype bfloat16
    python benchmarks/bench.py --profile                # where the time of a training step goes
    python benchmarks/bench.py --data                   # reading windows, beside `datasets`

Every line is measured in its own process, one after the other, so that memory is measured too.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import brainlm
import sample_data

METHODS = {
    "default": "this recipe: half of the parcels, all of the past",
    "all parcels": "all parcels, all of the past",
    "f1b2762": "all parcels, visible tokens of the past (f1b2762)",
    "boolean": "all parcels, boolean mask S x S",
    "reference": "all parcels, additive mask S x S, attention dropout 0.1"}
BATCH, STEPS = 2, 10                            # windows per step; steps that are timed together


def attention_to_visible_past(q, k, v, V, mask):
    """block_causal_attention of f1b2762: of earlier time steps only the tokens that mask, bool
    [B, N, V], leaves visible, equally many in all samples."""
    counts = (~mask[0]).sum(dim=1).tolist()                                          # [N]
    index = 1 + (~mask).flatten(1).nonzero()[:, 1].view(len(mask), 1, -1, 1).to(q.device)
    index = index.expand(-1, k.shape[1], -1, k.shape[3])                     # [B, heads, K, D]
    past_k, past_v = k.gather(2, index), v.gather(2, index)
    outputs = [F.scaled_dot_product_attention(q[:, :, :1], k, v)]            # CLS
    for n, count in enumerate(counts):
        own, past = slice(1 + n * V, 1 + (n + 1) * V), slice(sum(counts[:n]))
        outputs.append(F.scaled_dot_product_attention(
            q[:, :, own], torch.cat([past_k[:, :, past], k[:, :, own]], dim=2),
            torch.cat([past_v[:, :, past], v[:, :, own]], dim=2)))
    return torch.cat(outputs, dim=2)


def make_step(method, V, hidden_size, dtype, device):
    """A function that does one training step: reading, forward, loss, backward, update."""
    torch.manual_seed(0)
    config = brainlm.BrainLMConfig(hidden_size=hidden_size)
    model = brainlm.BrainLM(config).to(device)
    optimizers = brainlm.make_optimizers(model)
    folder = tempfile.TemporaryDirectory()
    sample_data.make_sample_data(folder.name, num_train=20, num_val=1, num_parcels=V)
    dataset = brainlm.RecordingDataset(f"{folder.name}/train", sample_data.RECORDING_COL)
    all_xyz = brainlm.read_coordinates(f"{folder.name}/coords")[0].to(device)
    if method != "default":
        brainlm.LEFT_OUT = 0
    if method in ("boolean", "reference"):
        may_attend = brainlm.block_causal_mask(
            config.num_timepoints_per_voxel // config.timepoint_patching_size, V).to(device)
        additive = torch.zeros(may_attend.shape, device=device).masked_fill_(~may_attend, -math.inf)

    def step(number):
        samples = range(BATCH * number, BATCH * (number + 1))
        signal, xyz, mask = brainlm.pretraining_batch(dataset, all_xyz, config, 0, samples, number)
        if method == "f1b2762":
            mask = mask[:1].expand_as(mask)     # one kind of mask per step
            brainlm.block_causal_attention = lambda q, k, v, V: attention_to_visible_past(
                q, k, v, V, mask)
        elif method == "boolean":
            brainlm.block_causal_attention = lambda q, k, v, V: F.scaled_dot_product_attention(
                q, k, v, attn_mask=may_attend)
        elif method == "reference":
            brainlm.block_causal_attention = lambda q, k, v, V: F.scaled_dot_product_attention(
                q, k, v, attn_mask=additive.to(q.dtype), dropout_p=0.1)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            prediction, _ = model(signal.to(device), xyz, mask)
            loss = brainlm.reconstruction_loss(prediction, signal, mask)
        loss.backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-4
            optimizer.step()
        model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
    step.folder = folder                        # it lives as long as the function
    return step


def peak_memory(device):
    """Bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def time_training(method, device, seconds=20.0, **others):
    """Windows per second in the fastest of several rounds of STEPS steps, and bytes of memory."""
    step, before, rounds = make_step(method, device=device, **others), peak_memory(device), []
    step(0)                                     # the first step allocates
    while not rounds or sum(rounds) < seconds:
        begin = time.perf_counter()
        for number in range(STEPS):
            step(number)
        rounds.append(time.perf_counter() - begin)
    return {"rate": BATCH * STEPS / min(rounds), "memory": peak_memory(device) - before}


def profile(device, **others):
    """Print where the time of a training step goes: operations or, on a GPU, kernels."""
    step = make_step("default", device=device, **others)
    step(0)
    with torch.profiler.profile() as profiler:
        step(1)
    print(profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=20,
                                        max_name_column_width=60))


def in_own_process(function, **arguments):
    """The result of a function of this file in a new process; None if it failed."""
    call = json.dumps([function.__name__, arguments])
    done = subprocess.run([sys.executable, __file__, "--call", call], stdout=subprocess.PIPE,
                          text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def bench_training(parcels, hidden_size, dtype, device):
    heads = brainlm.BrainLMConfig(hidden_size=hidden_size).num_attention_heads
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device == "cpu" else \
        torch.cuda.get_device_properties(0).total_memory
    for V in parcels:
        print(f"\n| {V} parcels x 200 timepoints, hidden size {hidden_size}, batch {BATCH}, "
              f"{dtype}, {device} | windows/s | time per window | GiB |\n| --- | --- | --- | --- |")
        default = None
        for method, name in METHODS.items():
            # Attention dropout keeps S x S probabilities for each layer, sample and head.
            needed = 4 * 3 * 4 * BATCH * heads * (1 + 10 * V) ** 2 if method == "reference" else 0
            row = None if needed > memory else in_own_process(
                time_training, method=method, V=V, hidden_size=hidden_size, dtype=dtype,
                device=device)
            if row is None:
                print(f"| {name} | - | - | more than there is |", flush=True)
                continue
            default = default or row["rate"]
            print(f"| {name} | {row['rate']:.2f} | {default / row['rate']:.2f}x | "
                  f"{row['memory'] / 2 ** 30:.2f} |", flush=True)


def read_windows(reader, folder, count=2000, T=200):
    """Windows per second, and memory of the process for them besides the file's own pages."""
    def private():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])               # it is in KiB

    if reader == "brainlm":
        dataset = brainlm.RecordingDataset(folder, sample_data.RECORDING_COL)
        window = lambda n: dataset.batch([dataset.training_window(n, range(len(dataset)), T, 0)], T)
    else:
        import datasets
        dataset = datasets.load_from_disk(folder)
        if reader == "datasets, numpy format":
            dataset = dataset.with_format("numpy")
        window = lambda n: torch.tensor(dataset[n % len(dataset)][sample_data.RECORDING_COL])[:T]
    window(0)
    before, begin, n = private(), time.perf_counter(), 0
    while n < count and time.perf_counter() - begin < 10:
        n += 1
        window(n)
    return {"rate": n / (time.perf_counter() - begin), "private": private() - before}


def bench_data():
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        sample_data.make_sample_data(folder)
        print(f"sample_data.py: {time.perf_counter() - begin:.1f} s")
        sample_data.make_sample_data(f"{folder}/large", num_train=500, num_val=1)
        print("\n| windows of 200 x 424 from | recordings | windows/s | private MiB |\n"
              "| --- | --- | --- | --- |")
        for reader, path, rows in (("brainlm", f"{folder}/train", 100),
                                   ("brainlm", f"{folder}/large/train", 500),
                                   ("datasets, default format", f"{folder}/train", 100),
                                   ("datasets, numpy format", f"{folder}/train", 100)):
            row = in_own_process(read_windows, reader=reader, folder=path)
            numbers = f"{row['rate']:.0f} | {row['private'] / 2 ** 20:.1f}" if row else "- | -"
            print(f"| {reader} | {rows} | {numbers} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="store_true", help="reading windows instead of training")
    parser.add_argument("--profile", action="store_true",
                        help="where the time of a training step goes, with the first --parcels")
    parser.add_argument("--parcels", nargs="+", type=int, default=[424],
                        help="a table for each number (default: 424)")
    parser.add_argument("--hidden_size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = {"hidden_size": args.hidden_size, "dtype": args.dtype, "device": args.device}
    if args.call:
        name, arguments = json.loads(args.call)
        print(json.dumps(globals()[name](**arguments)))
    elif args.data:
        bench_data()
    elif args.profile:
        profile(V=args.parcels[0], **settings)
    else:
        bench_training(args.parcels, **settings)


if __name__ == "__main__":
    main()
