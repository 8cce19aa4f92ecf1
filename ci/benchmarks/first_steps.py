#!/usr/bin/env python3
"""The first optimizer step of the large scales, and the cost of dbmtl.models.precision's switches.

    python ci/benchmarks/first_steps.py [nyuv2/paper cityscapes/gpu ...] [--method DB-MTL]
                                        [--threads 2] [--ways]

Each step runs in a process of its own: seconds, peak resident memory, parameters, losses. Where the
data set is missing its generated stand-in of the same shape takes its place, and where ImageNet
weights are missing the network starts from scratch; both are named. `--ways` measures plain,
channels-last, recomputed and bfloat16 runs of one convolutional network, taking turns. Writes
first_steps.json and first_steps.md; what was measured before and is not asked for again stays.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = {
    "plain": {},
    "channels-last": {"channels_last": True},
    "checkpoint": {"checkpoint": True},
    "bf16": {"precision": "bf16"},
}
SIZES = [8, 3, 144, 192]  # images of --ways


def peak_mib():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


# --------------------------------------------------------------------- one step, in its own process


def stand_ins(scale, option, values):
    """No change, and each of the values in place of one that may be missing."""
    current = scale.extra.get(option)
    if current in (None, *values):
        return [{}]
    return [{}, *({option: value} for value in values)]


def attempts(scale):
    """The scale itself, then with what may be missing replaced: weights, data, both."""
    for source in stand_ins(scale, "source", ["generated", "sample"]):
        few = {}
        if source:
            # a stand-in has no more samples than the step and the evaluation need; classes are
            # those of generated objects: rooms and streets know theirs
            few = {"train_size": 2 * scale.batch_size, "eval_size": scale.batch_size}
            source = {"classes": 31, **source}
        yield [
            dataclasses.replace(scale, extra={**scale.extra, **source, **weights}, **few)
            for weights in stand_ins(scale, "weights", ["none"])
        ]


def load(benchmark, scale):
    """(data, scales to try for the network) of the first source that is there; every other error
    passes on."""
    missing = None
    for scales in attempts(scale):
        try:
            return benchmark.load(scales[0], "cpu", 0), scales
        except (FileNotFoundError, ModuleNotFoundError) as error:
            missing = missing or error
        except ValueError:  # of two kinds of stand-in a benchmark knows one
            if missing is None:
                raise
    raise missing


def first_loop(benchmark, data, method, scales):
    """(loop, scale) of the first of the scales whose ImageNet weights are there."""
    from dbmtl.experiments.loop import Loop

    missing = None
    for scale in scales:
        try:
            return Loop(benchmark, data, benchmark.tasks, method, 0, scale), scale
        except OSError as error:
            missing = error
    raise missing


def first_step(name, method):
    """Numbers of the first step of "benchmark/scale"."""
    import torch

    from dbmtl.benchmarks.base import get_benchmark

    benchmark_name, scale_name = name.split("/")
    benchmark = get_benchmark(benchmark_name)
    asked = benchmark.scale(scale_name)
    before = peak_mib()
    start = time.perf_counter()
    data, scales = load(benchmark, asked)
    loop, scale = first_loop(benchmark, data, method, scales)
    prepared = time.perf_counter()
    loop.step()
    done = time.perf_counter()
    changed = {key: value for key, value in scale.extra.items() if asked.extra.get(key) != value}
    losses = dict(zip(loop.names, loop.losses.tolist(), strict=True))
    finite_losses = all(math.isfinite(loss) for loss in losses.values())
    finite_parameters = all(bool(p.isfinite().all()) for p in loop.model.parameters())
    return {
        "benchmark": name,
        "method": method,
        "data": data.note,
        "instead of what is missing": changed,
        "batch": scale.batch_size,
        "tasks": len(benchmark.tasks),
        "options": {**scale.extra},
        "shared parameters": sum(p.numel() for p in loop.model.trunk.parameters()),
        "all parameters": sum(p.numel() for p in loop.model.parameters()),
        "seconds to load": round(prepared - start, 2),
        "seconds of the step": round(done - prepared, 2),
        "peak MiB": peak_mib(),
        "peak MiB before": before,
        "losses": {k: round(v, 4) for k, v in losses.items()},
        "finite": finite_losses and finite_parameters,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


# ------------------------------------------------------------------------------ the ways of running


def conv_net(how):
    """A trunk of six convolutions with batch norm, three heads."""
    import torch
    from torch import nn

    from dbmtl.models.precision import efficient

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            widths = (3, 32, 32, 64, 64, 64, 64)
            layers = []
            for n, (before, after) in enumerate(itertools.pairwise(widths)):
                stride = 2 if n == 2 else 1
                convolution = nn.Conv2d(before, after, 3, padding=1, stride=stride)
                layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
            self.trunk = nn.Sequential(*layers)
            self.heads = nn.ModuleList(nn.Conv2d(64, 1, 1) for _ in range(3))

        def forward(self, images):
            shared = self.trunk(images)
            return {t: head(shared) for t, head in enumerate(self.heads)}

    torch.manual_seed(0)
    return efficient(Network(), **how)


def step_of(how):
    """A closure that does one step of DB-MTL's gradients."""
    import torch

    from dbmtl import make_balancer

    model = conv_net(how)
    balancer = make_balancer("DB-MTL", shared=model.trunk, num_tasks=3)
    images = torch.randn(SIZES)

    def step():
        start = time.perf_counter()
        balancer.backward([p.float().square().mean() + 1 for p in model(images).values()])
        for p in model.parameters():
            p.grad = None
        return time.perf_counter() - start

    return step


def peak_of_way(way):
    """What one step adds to a fresh process's peak, in MiB."""
    step = step_of(WAYS[way])
    before = peak_mib()
    step()
    step()
    return round(peak_mib() - before, 1)


def measure_ways(repetitions, threads):
    memory = {way: child("--peak-of", way, threads=threads) for way in WAYS}
    return {
        "sizes": SIZES,
        "repetitions": repetitions,
        "threads": threads,
        "peak MiB": memory,
        **child("--seconds-of-ways", str(repetitions), threads=threads),
    }


def seconds_of_ways(repetitions):
    import torch

    steps = {way: step_of(how) for way, how in WAYS.items()}
    times = {way: [] for way in WAYS}
    for step in steps.values():
        step()
    for _ in range(repetitions):
        for way, step in steps.items():
            times[way].append(step())
    median = {way: statistics.median(values) for way, values in times.items()}
    return {
        "torch": torch.__version__,
        "seconds": {way: round(s, 4) for way, s in median.items()},
        "times plain": {way: round(s / median["plain"], 2) for way, s in median.items()},
    }


# ---------------------------------------------------------------------------------------- reporting


def child(*arguments, threads, limit=900):
    """The JSON of this script in a fresh process. This one never imports torch: a child inherits
    its parent's peak."""
    command = [sys.executable, __file__, *arguments, "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def described(step):
    changed = ", ".join(
        f"{key}: {value}" for key, value in step["instead of what is missing"].items()
    )
    return f"{step['data']}; {changed}" if changed else step["data"]


def row(step):
    """A line of the table of first steps."""
    cells = [
        step["benchmark"],
        step["method"],
        step["batch"],
        f"{step['shared parameters']:,}",
        f"{step['all parameters']:,}",
        f"{step['seconds of the step']:.1f}",
        f"{step['peak MiB']:,.0f}",
        "yes" if step["finite"] else "NO",
        described(step),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def steps_section(steps):
    rows = "\n".join(row(step) for _, step in sorted(steps.items()))
    return f"""
One optimizer step of the large scales on a CPU, each in a fresh process: whether it runs, what \
it costs, and whether
losses and parameters are finite afterwards. Nothing is learned here: these scales are for a GPU. \
Peak memory is that
of the process, libraries and data included. Threads and version are with each step in \
`first_steps.json`.

| benchmark/scale | method | batch | shared parameters | all parameters | s | peak MiB | finite | \
data and network |
|---|---|---|---|---|---|---|---|---|
{rows}
"""


def ways_section(ways):
    lines = []
    for way in WAYS:
        seconds = ways["seconds"][way]
        ratio = ways["times plain"][way]
        lines.append(f"| {way} | {seconds:.3f} | {ratio:.2f} | {ways['peak MiB'][way]:,.0f} |")
    rows = "\n".join(lines)
    return f"""
## Ways of running

A step of DB-MTL with three tasks (one forward pass, three backward passes) through six \
convolutions with batch norm,
images {ways["sizes"]}, CPU threads: {ways["threads"]}, torch {ways["torch"]}; \
median of {ways["repetitions"]}
interleaved repetitions, and what two steps add to the peak memory of a fresh process. \
`checkpoint` runs the trunk
forward once more in each of the three backward passes, as a whole, so that its activations are \
all there again while a
pass runs: what it saves of the peak is what waits beside them. Ratios of a CPU say little about \
a GPU.

| way | s | times plain | peak MiB |
|---|---|---|---|
{rows}
"""


def markdown(result):
    text = "# The first step\n"
    if result["steps"]:
        text += steps_section(result["steps"])
    if result.get("ways"):
        text += ways_section(result["ways"])
    return text + "\nWritten by `ci/benchmarks/first_steps.py`.\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", help="benchmark/scale")
    parser.add_argument("--method", default="DB-MTL")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", action="store_true", help="measure the ways of running, too")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "figures" / "benchmarks"
    )
    parser.add_argument("--step-of", help="print the numbers of one step and stop")
    parser.add_argument("--peak-of", choices=WAYS, help="print the peak memory of one way and stop")
    parser.add_argument(
        "--seconds-of-ways", type=int, help="print the seconds of each way and stop"
    )
    options = parser.parse_args()
    if options.step_of:
        return print(json.dumps(first_step(options.step_of, options.method)))
    if options.peak_of:
        return print(json.dumps(peak_of_way(options.peak_of)))
    if options.seconds_of_ways:
        return print(json.dumps(seconds_of_ways(options.seconds_of_ways)))
    written = options.out / "first_steps.json"
    result = json.loads(written.read_text()) if written.exists() else {"steps": {}}
    for name in options.steps:
        numbers = child("--step-of", name, "--method", options.method, threads=options.threads)
        result["steps"][f"{name} {options.method}"] = numbers
    if options.ways:
        result["ways"] = measure_ways(options.repetitions, options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "first_steps.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
