"""Time and memory of a training step and of reading windows, against the obvious ways to do it.

    python benchmarks/bench.py                 # the demo size: 424 parcels, 10 temporal tokens
    python benchmarks/bench.py --all           # 94, 424 and 1000 parcels, 10 and 24 temporal tokens
    python benchmarks/bench.py --profile       # which operations, or kernels, a step's time goes to
    python benchmarks/bench.py --data          # windows a second from disk, against `datasets`

Every line is measured in a process of its own, one after the other: their memory stays apart.
"""

import argparse
import json
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

# "notebook" leaves numbers below 1e-38 as they are, which is slow where there are many.
METHODS = {"ours": "this file, denormals flushed", "notebook": "this file",
           "masked": "boolean mask", "reference": "additive mask, attention dropout 0.1"}
PATCH, BATCH = 20, 2


def masked_attention(method, N, V):
    """Attention with a mask of S x S, which reads hidden tokens of the past too, as the authors'
    code does. "reference" adds it as floats, and drops out 0.1."""
    dropout = 0.1 if method == "reference" else 0.0
    mask = brainlm.block_causal_mask(N, V)
    if method == "reference":
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)

    def attention(q, k, v, V, visible=None):
        bias = mask.to(q.device) if method == "masked" else mask.to(q.device, q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return attention


def arithmetic(model, N, V):
    """Floating-point operations that one training step of this file needs: 6 a weight and token,
    and the products of queries, keys and values that are read where three quarters are hidden,
    forward once and backward twice."""
    config, tokens = model.config, 1 + N * V
    visible = V - round(0.75 * V)
    pairs = N * V * V + V * visible * N * (N - 1) // 2 + tokens
    products = 12 * config.num_hidden_layers * config.hidden_size * pairs
    linears = [(name, 6 * module.weight.numel() * tokens)
               for name, module in model.layers.named_modules()
               if isinstance(module, torch.nn.Linear)]
    # Positions are the same in all samples: their layers see them once.
    return BATCH * products + sum(each if "position" in name else BATCH * each
                                  for name, each in linears)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(device):
    """Peak so far, bytes."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_step(method, V, N, dtype, device, compiled):
    """A function that does one training step (forward, loss, backward, update), and its model."""
    torch.set_flush_denormal(method != "notebook")
    device, dtype = torch.device(device), getattr(torch, dtype)
    torch.manual_seed(0)
    config = brainlm.BrainLMConfig(N * PATCH, PATCH, hidden_size=256, num_hidden_layers=4,
                                   num_attention_heads=8)
    model = brainlm.BrainLM(config).to(device)
    if method in ("masked", "reference"):
        brainlm.block_causal_attention = masked_attention(method, N, V)
    step_model = torch.compile(model) if compiled else model
    optimizers = brainlm.make_optimizers(model)
    signal = torch.randn(BATCH, N * PATCH, V, device=device)
    xyz = 50 * torch.randn(V, 3, device=device)
    mask = brainlm.random_mask(BATCH, N, V, 0.75)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = brainlm.reconstruction_loss(step_model(signal, xyz, mask)[0], signal, mask)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        synchronize(device)
    return step, model


def training_step(method, V, N, device, seconds=10.0, **others):
    """Seconds of the fastest training step, memory above the import, arithmetic."""
    device = torch.device(device)
    at_import = memory(device)
    (step, model), times = make_step(method, V, N, device=device, **others), []
    while len(times) < 2 or sum(times) < seconds:
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    # The first step allocates and compiles. The fastest other one is what nothing else disturbed.
    return {"seconds": min(times[1:]), "memory": memory(device) - at_import,
            "arithmetic": arithmetic(model, N, V)}


def profile(V, N, dtype, device, compiled):
    """Print where the time of a training step of ours goes; on a GPU, which kernels run."""
    step, _ = make_step("ours", V, N, dtype, device, compiled)
    step()
    with torch.profiler.profile() as profiler:
        step()
    print(profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=20,
                                        max_name_column_width=60))


def matmul_peak(dtype, device, size=4096):
    """Operations a second of what the machine does best: a product of two square matrices."""
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(4):
        synchronize(a.device)
        begin = time.perf_counter()
        a @ a
        synchronize(a.device)
        best = min(best, time.perf_counter() - begin)
    return {"peak": 2 * size ** 3 / best}


def fits(method, V, N, available):
    """Attention dropout stores S x S probabilities for each sample, head and layer, on CPUs three
    times in float32."""
    return method != "reference" or 3 * 4 * BATCH * 8 * 4 * (1 + N * V) ** 2 < available


def in_own_process(function, **arguments):
    """Run a function of this file in a new process; None if it fails (out of memory)."""
    call = json.dumps([function.__name__, arguments])
    done = subprocess.run([sys.executable, __file__, "--call", call], stdout=subprocess.PIPE,
                          text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def bench_training(sizes, dtypes, device, compiled):
    peak = {dtype: in_own_process(matmul_peak, dtype=dtype, device=device)["peak"]
            for dtype in dtypes}
    print(", ".join(f"{dtype} matrix products: {each / 1e9:.0f} GFLOP/s"
                    for dtype, each in peak.items()))
    print(f"training step of batch {BATCH}, hidden 256, 4 layers, 8 heads\n"
          f"{'parcels':>8}{'tokens':>8}  {'attention':<38}{'dtype':<10}{'s/step':>9}{'ours is':>9}"
          f"{'samples/s':>11}{'tokens/s':>11}{'GFLOP/s':>9}{'of peak':>9}{'GiB':>7}")
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device == "cpu" else \
        torch.cuda.get_device_properties(0).total_memory
    for V, N in sizes:
        for dtype in dtypes:
            results = {}
            # Twice, lest one fell into a slow moment.
            for method in list(METHODS) + ["masked", "notebook", "ours"]:
                before = results.get(method, [])
                if before and (before[0] is None or before[0]["seconds"] > 10):
                    continue                        # long enough to average over slow moments
                results[method] = before + [in_own_process(
                    training_step, method=method, V=V, N=N, dtype=dtype, device=device,
                    compiled=compiled) if fits(method, V, N, available) else None]
            ours = min(each["seconds"] if each else float("nan") for each in results["ours"])
            for method, name in METHODS.items():
                line = f"{V:>8}{N:>8}  {name:<38}{dtype:<10}"
                if None in results[method]:
                    print(f"{line}{'more memory than there is':>30}", flush=True)
                    continue
                seconds = min(each["seconds"] for each in results[method])
                operations, taken = results[method][0]["arithmetic"], results[method][0]["memory"]
                print(f"{line}{seconds:>9.3f}{seconds / ours:>8.1f}x{BATCH / seconds:>11.2f}"
                      f"{BATCH * (1 + N * V) / seconds:>11.0f}{operations / seconds / 1e9:>9.0f}"
                      f"{operations / seconds / peak[dtype]:>9.0%}{taken / 2 ** 30:>7.2f}",
                      flush=True)


def read_windows(reader, folder, count=2000, T=200):
    """Windows a second, and the memory that reading them took that is not the file's own pages."""
    column = "Voxelwise_RobustScaler_Normalized_Recording"

    def private():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])               # it is in KiB

    if reader == "ours":
        dataset = brainlm.RecordingDataset(folder, column)
        window = lambda n: dataset.batch([dataset.training_window(n, range(len(dataset)), T, 0)], T)
    else:
        import datasets
        dataset = datasets.load_from_disk(folder)
        if reader == "datasets, numpy format":
            dataset = dataset.with_format("numpy")
        window = lambda n: torch.tensor(dataset[n % len(dataset)][column])[:T]
    window(0)
    before, begin, n = private(), time.perf_counter(), 0
    while n < count and time.perf_counter() - begin < 10:
        n += 1
        window(n)
    return {"rate": n / (time.perf_counter() - begin), "private": private() - before}


def bench_data():
    import sample_data
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        sample_data.make_sample_data(folder)
        print(f"sample_data.py: {time.perf_counter() - begin:.1f} s for 100 + 20 recordings of "
              "500 x 424\n")
        sample_data.make_sample_data(f"{folder}/large", num_train=500, num_val=1)
        print(f"\n{'windows of 200 x 424 from':<34}{'recordings':>12}{'windows/s':>12}"
              f"{'ms/window':>12}{'private MiB':>13}")
        for reader, path, rows in (("ours", f"{folder}/train", 100),
                                   ("ours", f"{folder}/large/train", 500),
                                   ("datasets, default format", f"{folder}/train", 100),
                                   ("datasets, numpy format", f"{folder}/train", 100)):
            result = in_own_process(read_windows, reader=reader, folder=path)
            print(f"{reader:<34}{rows:>12}{result['rate']:>12.0f}{1000 / result['rate']:>12.3f}"
                  f"{result['private'] / 2 ** 20:>13.1f}"
                  if result else f"{reader:<34}  not installed")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all sizes instead of the demo's")
    parser.add_argument("--data", action="store_true", help="reading windows instead of training")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        name, arguments = json.loads(args.call)
        print(json.dumps(globals()[name](**arguments)))
    elif args.data:
        bench_data()
    elif args.profile:
        profile(424, 10, args.dtypes[-1], args.device, args.compile)
    else:
        sizes = [(V, N) for V in (94, 424, 1000) for N in (10, 24)] if args.all else [(424, 10)]
        bench_training(sizes, args.dtypes, args.device, args.compile)


if __name__ == "__main__":
    main()
