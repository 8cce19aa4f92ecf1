#!/usr/bin/env python3
"""What a step of DB-MTL on several gloo processes sends and takes, with whole rows and with shards.

    python ci/benchmarks/ranks_cost.py [--repetitions 7] [--out figures/benchmarks]

Every process runs the same network with an MLP trunk of about two million float32 parameters on
eight samples of its own; the modes take turns, one step each, behind a barrier. The collectives of
`torch.distributed` that a balancer uses are wrapped, and the bytes that a rank sends are counted
by the formulas of their ring algorithms, B being the bytes of the whole buffer and W the ranks:

    all-reduce          2 (W - 1) / W B
    exchange of shards    (W - 1) / W B    (all_to_all_single; what a reduce-scatter sends)
    all-gather            (W - 1)     B    (B: what one rank contributes)

Beside that stands what the TCP sockets of the process say that they have sent (Linux), which tells
whether gloo follows the formulas. Seconds are wall time of `backward` alone, on the slowest rank,
medians over repetitions; the first two steps are not counted. The bytes of the averages that a
rank keeps come last. Writes ranks_cost.csv and ranks_cost.md.
"""

import argparse
import csv
import os
import socket
import stat
import statistics
import struct
import time
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from dbmtl import make_balancer

RANKS = (2, 4)
TASKS = (3, 11)
MODES = ("all", "shard")
WIDTH = 768
BYTES_ACKED = 120  # where struct tcp_info counts the bytes that arrived
COLUMNS = (
    "ranks",
    "tasks",
    "sync",
    "MB by formula",
    "MB on the wire",
    "milliseconds",
    "MB of averages",
)


class Traffic:
    """Counts what this rank sends by the formulas, while it is entered."""

    def __init__(self, size):
        self.size = size
        self.sent = 0.0
        self.plain = {}

    def __enter__(self):
        share = (self.size - 1) / self.size
        factors = {  # name -> (place of the buffer, bytes sent for each of its bytes)
            "all_reduce": (0, 2 * share),
            "all_to_all_single": (1, share),
            "all_gather": (1, self.size - 1),
        }
        for name, (place, factor) in factors.items():
            self.plain[name] = getattr(dist, name)
            setattr(dist, name, self.counting(self.plain[name], place, factor))
        return self

    def __exit__(self, *_):
        for name, function in self.plain.items():
            setattr(dist, name, function)

    def counting(self, plain, place, factor):
        def call(*given, **options):
            buffer = given[place]
            self.sent += factor * buffer.numel() * buffer.element_size()
            return plain(*given, **options)

        return call


def bytes_on_the_wire():
    """What all TCP connections of this process have sent; None where the system does not say."""
    if not hasattr(socket, "TCP_INFO"):
        return None
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # the folder itself, closed by now, or no TCP connection
            continue
        if len(info) >= BYTES_ACKED + 8:
            total += struct.unpack_from("Q", info, BYTES_ACKED)[0]
    return total


class Contender:
    """A network and its balancer in one mode."""

    def __init__(self, sync, tasks):
        torch.manual_seed(0)
        layers = [nn.Linear(256, WIDTH)]
        for _ in range(3):
            layers += [nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(tasks))
        self.balancer = make_balancer("DB-MTL", shared=self.trunk, num_tasks=tasks, sync=sync)
        self.times = []

    def step(self, x):
        """Seconds of `backward`, from the moment at which all ranks have their losses."""
        self.trunk.zero_grad()
        self.heads.zero_grad()
        z = self.trunk(x)
        losses = [head(z).square().mean() + 0.1 for head in self.heads]
        dist.barrier()
        start = time.perf_counter()
        self.balancer.backward(losses)
        return time.perf_counter() - start

    def bytes_of_averages(self):
        rows = self.balancer.ema.rows.values()
        return sum(a.numel() * a.element_size() for row in rows for a in row.values())


def slowest(seconds):
    longest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return longest.item()


def bytes_of_collectives(size):
    """What a rank sends in one call, in units of the whole buffer."""
    whole = torch.ones(size, 500_000)
    other = torch.ones_like(whole)
    calls = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "reduce_scatter": lambda: dist.reduce_scatter(other[0], list(whole.unbind())),
        "all_to_all_single": lambda: dist.all_to_all_single(other, whole),
        "all_gather": lambda: dist.all_gather(list(whole.unbind()), other[0]),
    }
    sent = {}
    for name, call in calls.items():
        call()  # connections are made
        dist.barrier()
        before = bytes_on_the_wire()
        call()
        dist.barrier()
        after = bytes_on_the_wire()
        buffer = whole.numel() * whole.element_size()
        sent[name] = "" if before is None else f"{(after - before) / buffer:.2f}"
    return sent


def measure_rank(rank, size, port, repetitions, answers):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    collectives = bytes_of_collectives(size)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(rank))
    rows = []
    for tasks in TASKS:
        contenders = {sync: Contender(sync, tasks) for sync in MODES}
        sent = {}
        for repetition in range(repetitions + 2):
            for sync, contender in contenders.items():
                before = bytes_on_the_wire()
                with Traffic(size) as traffic:
                    seconds = contender.step(x)
                dist.barrier()
                after = bytes_on_the_wire()
                wire = None if before is None else after - before
                seconds = slowest(seconds)
                if repetition >= 2:
                    contender.times.append(seconds)
                    sent[sync] = (traffic.sent, wire)
        for sync, contender in contenders.items():
            by_formula, wire = sent[sync]
            numbers = (
                size,
                tasks,
                sync,
                round(by_formula / 1e6, 1),
                "" if wire is None else round(wire / 1e6, 1),
                round(1000 * statistics.median(contender.times)),
                round(contender.bytes_of_averages() / 1e6, 1),
            )
            rows.append(dict(zip(COLUMNS, numbers, strict=True)))
    if rank == 0:
        answers.put((rows, collectives))
    dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(repetitions):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    rows = []
    collectives = {}
    for size in RANKS:
        arguments = (size, free_port(), repetitions, answers)
        multiprocessing.spawn(measure_rank, arguments, nprocs=size)
        of_steps, collectives[size] = answers.get()
        rows += of_steps
    return rows, collectives


def table(head, rows):
    return "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows]
    )


def ratios(rows):
    """Shards beside whole rows, for each number of ranks and tasks."""
    pairs = zip(rows[::2], rows[1::2], strict=True)
    for whole, shard in pairs:
        tasks = whole["tasks"]
        of_columns = []
        for column in COLUMNS[3:]:
            known = whole[column] != "" and shard[column] != ""
            of_columns.append(f"{shard[column] / whole[column]:.2f}" if known else "")
        yield [whole["ranks"], tasks, f"{(tasks + 1) / (2 * tasks):.2f}", *of_columns]


def markdown(rows, collectives, repetitions):
    names = list(collectives[RANKS[0]])
    singly = [[size, *sent.values()] for size, sent in collectives.items()]
    head = ["ranks", "tasks", "(T + 1) / 2T", *(f"{name}, ratio" for name in COLUMNS[3:])]
    return f"""# The cost of a step on several processes

One step of DB-MTL on gloo processes of one machine, torch {torch.__version__}, float32, one \
thread a process, an MLP
trunk of two million parameters (a row has 7.9 MB); what a rank sends, and milliseconds of
`backward` on the slowest rank, medians of {repetitions}. The machine had {os.cpu_count()} cores \
and other work to do, so times are rough,
with four processes more so. Written by `ci/benchmarks/ranks_cost.py`, which has the formulas.

{table(COLUMNS, [row.values() for row in rows])}

`sync="shard"` in units of `sync="all"`:

{table(head, list(ratios(rows)))}

The heads' gradients, the exchanges of a step and the squared norms are in these numbers. Bytes
between processes of one machine go through memory: to save them saves little time here, and the
copies that shards need take some.

What one call sends on the wire, in units of the whole buffer. A reduce-scatter of
gloo sends as much as an all-reduce, so the mode exchanges the shards by
`all_to_all_single` and adds up what arrives:

{table(["ranks", *names], singly)}
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "figures" / "benchmarks"
    )
    options = parser.parse_args()
    rows, collectives = measure(options.repetitions)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "ranks_cost.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = markdown(rows, collectives, options.repetitions)
    (options.out / "ranks_cost.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
