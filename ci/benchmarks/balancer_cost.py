#!/usr/bin/env python3
"""What a balanced step costs beside plain backward passes, in one run: ratios, not absolute claims.

    python ci/benchmarks/balancer_cost.py [--repetitions 15] [--threads 1]
                                          [--out figures/benchmarks]

Only the backward part of a step is timed, on a fresh graph each time, in processor time on one
thread, so that other work on the machine disturbs it little; the contenders take turns, and medians
are compared with the floor: T calls of `torch.autograd.grad`, one a task, each to the trunk and to
its own head, the last one freeing the graph. "flat" is Algorithm 1 on concatenated gradient
vectors. TorchJD's row is one `mtl_backward` and one `jac_to_grad`: Sum needs no Gramian, IMTL-G
does, and neither needs a solver; chunk 1 is one pass a task.
Whole steps with `update_every`, on the same clock, are compared with EW's in the same run.
Peak memory of two steps of a wide MLP, each in a process of its own, above what forward and one
plain backward take: once as the process is, with the holes that small and large tensors leave in
its heap, and once with every tensor from 1 MB mapped by itself, which is what is held.
Writes balancer_cost.json and balancer_cost.md.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from dbmtl import make_balancer
from dbmtl.core.task_gradients import loss_edges, task_gradients, trace


def mlp(tasks, width=384):
    trunk = nn.Sequential(
        nn.Linear(256, width), *(m for _ in range(3) for m in (nn.ReLU(), nn.Linear(width, width)))
    )
    layers = [[nn.ReLU(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 1)] for _ in range(tasks)]
    return trunk, nn.ModuleList(nn.Sequential(*layer) for layer in layers), torch.randn(64, 256)


def conv(tasks):
    sizes = [(3, 16), (16, 32), (32, 32), (32, 32)]
    layers = [[nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()] for a, b in sizes]
    heads = nn.ModuleList(nn.Conv2d(32, 2, 1) for _ in range(tasks))
    return nn.Sequential(*sum(layers, [])), heads, torch.randn(4, 3, 24, 24)


def wide(tasks):
    trunk, heads, x = mlp(tasks, width=1536)
    return trunk, heads, x[:8]


NETWORKS = {"mlp": mlp, "conv": conv, "wide": wide}


class Step:
    """A network and one contender; `losses()` runs forward, `work(losses, features)` the rest."""

    def __init__(self, name, network, tasks):
        torch.manual_seed(0)
        self.trunk, self.heads, self.x = NETWORKS[network](tasks)
        self.tasks = tasks
        self.average = None
        self.count = 0
        method, _, self.options = name.partition(", ")
        own_way = method.replace(" ", "_").replace("-", "_").lower()
        self.work = getattr(self, own_way, self.balanced)
        if self.work == self.balanced:
            hyper = {"beta": 0} if "beta 0" in self.options else {}
            hyper |= {"in_place": True} if "in place" in self.options else {}
            if "every" in self.options:
                hyper["update_every"] = int(self.options.rpartition("every ")[2])
            routes = [route for route in ("split", "batched") if route in self.options]
            self.balancer = make_balancer(
                method,
                shared=self.trunk,
                num_tasks=tasks,
                grads=routes[0] if routes else "loop",
                **hyper,
            )

    def forward(self):
        self.trunk.zero_grad()
        self.heads.zero_grad()
        z = self.trunk(self.x)
        return [head(z).square().mean() + 0.1 for head in self.heads], z

    def backward(self, losses, z):
        sum(losses).backward()

    def floor(self, losses, z):
        shared = list(self.trunk.parameters())
        rows = []
        for t, loss in enumerate(losses):
            inputs = shared + list(self.heads[t].parameters())
            gradients = torch.autograd.grad(loss, inputs, retain_graph=t < self.tasks - 1)
            rows.append(gradients[: len(shared)])
        return rows

    def trace(self, losses, z):
        trace(loss_edges(losses))

    def task_gradients(self, losses, z):
        task_gradients(losses, self.trunk)

    def balanced(self, losses, z):
        self.balancer.backward(losses)

    def flat(self, losses, z):
        self.count += 1
        rows = []
        for row, loss in zip(self.floor(losses, z), losses, strict=True):
            rows.append(torch.cat([g.reshape(-1) for g in row]) / (loss.detach() + 1e-8))
        rows = torch.stack(rows)
        beta = 0.5 / self.count**0.5
        if self.average is None:
            self.average = rows * (1 - beta)
        else:
            self.average = beta * self.average + (1 - beta) * rows
        norms = self.average.norm(dim=1)
        step = (self.average * (norms.max() / (norms + 1e-8))[:, None]).sum(0)
        parameters = list(self.trunk.parameters())
        for p, g in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p).clone()

    def torchjd(self, losses, z):
        from torchjd.aggregation import IMTLG, Sum
        from torchjd.autojac import jac_to_grad, mtl_backward

        mtl_backward(losses, z, parallel_chunk_size=1 if "chunk 1" in self.options else None)
        jac_to_grad(self.trunk.parameters(), Sum() if "Sum" in self.options else IMTLG())


TIMED = [
    "floor",
    "backward",
    "EW",
    "trace",
    "task gradients",
    "DB-MTL, loop",
    "DB-MTL, split",
    "DB-MTL, batched",
    "DB-MTL, loop, beta 0",
    "flat",
    "torchjd, Sum",
    "torchjd, Sum, chunk 1",
    "torchjd, IMTL-G",
]
TASKS = (3, 11)
MEASURED = [
    "EW",
    "DB-MTL, loop",
    "DB-MTL, split",
    "DB-MTL, batched",
    "DB-MTL, loop, beta 0",
    "DB-MTL, loop, in place",
    "DB-MTL, loop, in place, every 20",
    "DB-MTL, loop, beta 0, every 20",
    "flat",
    "torchjd, IMTL-G",
]
EVERY = (1, 5, 20)  # steps for which weights are used; a cycle is the longest
TASKS_OF_A_CYCLE = (3, 11, 20)


def resident_mib():
    """The peak of this process until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_mib(name, tasks):
    """What two steps add to the peak of a process that has run forward and backward of the summed
    losses, in MiB."""
    step = Step(name, "wide", tasks)
    plain = Step("backward", "mlp", tasks)
    plain.work(*plain.forward())
    losses, z = step.forward()
    step.backward(losses, z)
    del losses, z
    before = resident_mib()
    for _ in range(2):
        step.work(*step.forward())
    return resident_mib() - before


def milliseconds(network, tasks, repetitions):
    """Medians over interleaved repetitions; the first two are not counted."""
    steps = {name: Step(name, network, tasks) for name in TIMED}
    times = {name: [] for name in TIMED}
    for _ in range(repetitions + 2):
        for name, step in steps.items():
            losses, z = step.forward()
            start = time.process_time()
            step.work(losses, z)
            times[name].append(1000 * (time.process_time() - start))
    return {name: round(statistics.median(values[2:]), 3) for name, values in times.items()}


def cycle_milliseconds(network, tasks, cycles):
    """Whole steps, forward included, with weights used for K steps: the mean over a cycle, of
    which every place is a median over interleaved cycles, and the median of the steps between two
    measured ones; the first cycle is not counted."""
    names = ["EW", *(f"DB-MTL, every {every}" for every in EVERY)]
    steps = {name: Step(name, network, tasks) for name in names}
    times = {name: [] for name in names}
    length = max(EVERY)
    for _ in range((cycles + 1) * length):
        for name, step in steps.items():
            start = time.process_time()
            step.work(*step.forward())
            times[name].append(1000 * (time.process_time() - start))
    result = {}
    for name, values in times.items():
        counted = values[length:]
        places = [statistics.median(counted[place::length]) for place in range(length)]
        result[name] = round(statistics.mean(places), 3)
    between = times[f"DB-MTL, every {length}"][length:]
    result["between"] = statistics.median(t for i, t in enumerate(between) if i % length)
    return result


def peak_of_a_process(name, tasks, threads, mapped=False):
    """`peak_mib` in a process of its own; `mapped`: without holes in its heap."""
    command = [sys.executable, __file__, "--peak", name, "--tasks", str(tasks)]
    command += ["--threads", str(threads)]
    # glibc's own limit grows to the largest tensor that was freed
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "1000000"} if mapped else {})
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return round(float(done.stdout), 1)


def shares_of_a_step(ms):
    """Where the time of a DB-MTL step goes."""
    whole = ms["DB-MTL, loop"]
    return {
        "trace": round(ms["trace"] / whole, 4),
        "passes": round((ms["task gradients"] - ms["trace"]) / whole, 4),
        "balancing": round(1 - ms["task gradients"] / whole, 4),
    }


def measure(repetitions, threads):
    # memory first, because a new process inherits the peak of the one that starts it
    memory = {}
    held = {}
    for tasks in TASKS:
        memory[tasks] = {name: peak_of_a_process(name, tasks, threads) for name in MEASURED}
        held[tasks] = {name: peak_of_a_process(name, tasks, threads, True) for name in MEASURED}
    times = {}
    for network in ("mlp", "conv"):
        for tasks in TASKS:
            times[f"{network}, T = {tasks}"] = milliseconds(network, tasks, repetitions)
    cycles = {}
    for network in ("mlp", "conv"):
        for tasks in TASKS_OF_A_CYCLE:
            cycles[f"{network}, T = {tasks}"] = cycle_milliseconds(
                network, tasks, max(repetitions // 5, 1)
            )
    import torchjd  # noqa: F401  (must be installed: see extras `dev`)

    trunk = sum(p.numel() for p in wide(3)[0].parameters()) * 4 / 2**20
    return {
        "threads": threads,
        "torch": torch.__version__,
        "repetitions": repetitions,
        "milliseconds": times,
        "milliseconds of a whole step in a cycle": cycles,
        "shares of a DB-MTL step": {key: shares_of_a_step(ms) for key, ms in times.items()},
        "one trunk gradient, MiB": round(trunk, 1),
        "peak MiB above a plain step": memory,
        "peak MiB above a plain step, large tensors mapped": held,
    }


def table(head, rows):
    return "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows]
    )


def markdown(m):
    times = m["milliseconds"]
    memory = m["peak MiB above a plain step"]
    one = m["one trunk gradient, MiB"]
    parts = m["shares of a DB-MTL step"]
    ratios = [[n, *(f"{ms[n] / ms['floor']:.2f}" for ms in times.values())] for n in TIMED]
    floors = ["milliseconds of the floor", *(f"{ms['floor']:.1f}" for ms in times.values())]
    shares = []
    for part in ("trace", "passes", "balancing"):
        shares.append([part, *(f"{100 * share[part]:.1f} %" for share in parts.values())])
    held = m["peak MiB above a plain step, large tensors mapped"]
    peaks = []
    for name in MEASURED:
        of_tasks = [meter[tasks][name] for meter in (memory, held) for tasks in meter]
        peaks.append([name, *(f"{peak:.0f} ({peak / one:.1f})" for peak in of_tasks)])
    cycles = m["milliseconds of a whole step in a cycle"]
    in_cycles = [
        [name, *(f"{ms[name] / ms['EW']:.2f}" for ms in cycles.values())]
        for name in [f"DB-MTL, every {every}" for every in EVERY] + ["between"]
    ]
    return f"""# The cost of a balanced step

Backward part of one step on the CPU, processor time, threads: {m["threads"]}, \
torch {m["torch"]}, float32; medians of
{m["repetitions"]} interleaved repetitions, in units of the floor (T plain passes). Written by
`ci/benchmarks/balancer_cost.py`, which says what the rows are; `backward` is one pass of the \
summed losses.

{table(["", *times], [*ratios, floors])}

Where the time of a DB-MTL step (loop) goes:

{table(["", *times], shares)}

Weights used for several steps (`update_every`): a whole step, forward included, in units of EW's \
in the same run, mean over a cycle of {max(EVERY)} steps; `between` is a step with kept weights.

{table(["", *cycles], in_cycles)}

Peak memory of two steps of a wide MLP above that of a plain step, in MiB (in brackets: in trunk \
gradients of
{one} MiB); "held" is without holes in the heap:

{table(["", *(f"T = {t}" for t in memory), *(f"T = {t}, held" for t in held)], peaks)}
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "figures" / "benchmarks"
    )
    parser.add_argument(
        "--peak", choices=MEASURED, help="print the peak memory of one contender and stop"
    )
    parser.add_argument("--tasks", type=int, default=3, help="with --peak, --cycle")
    parser.add_argument(
        "--cycle", choices=("mlp", "conv"), help="print the times of `update_every` and stop"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        return print(peak_mib(options.peak, options.tasks))
    if options.cycle:
        cycles = max(options.repetitions // 5, 1)
        times = cycle_milliseconds(options.cycle, options.tasks, cycles)
        return print({name: round(ms / times["EW"], 2) for name, ms in times.items()})
    result = measure(options.repetitions, options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "balancer_cost.json").write_text(json.dumps(result, indent=1) + os.linesep)
    (options.out / "balancer_cost.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
