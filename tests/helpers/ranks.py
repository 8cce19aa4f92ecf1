"""Processes that train one network together, and the same steps in one process."""

import os
import queue
import socket
import traceback
import warnings
from datetime import timedelta

import torch
from helpers.methods import SMALL, base, same
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.testing import assert_close

from dbmtl import make_balancer
from dbmtl.registry import hyperparameters

F64 = torch.float64
WAIT = 30  # seconds, for a sum and for an answer
TORN = ("Timed out waiting", "pair closure", "Connection closed", "Connection reset")
START = 300  # seconds, until all processes have imported what they need
CUTS = {1: [12], 2: [9, 3], 3: [5, 1, 6], 4: [2, 5, 1, 4]}  # samples of each rank


class Net(nn.Module):
    """Three tasks of unlike scales behind one trunk; each sample counts for some of the tasks."""

    def __init__(self, unused=False, order=(0, 1, 2)):
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))
        self.spare = nn.Linear(4, 3)
        self.to(F64)

    def features(self, x):
        return self.trunk(x)

    def losses(self, z, y, valid):
        """The mean over each task's valid samples; NaN where it has none."""
        errors = [(head(z) - y[t]).square().mean(1) for t, head in enumerate(self.heads)]
        return [10.0**t * error[valid[t]].mean() + 0.1 * (t + 1) for t, error in enumerate(errors)]

    def grads(self):
        return [None if p.grad is None else p.grad.clone() for p in self.parameters()]


def batch(seed, size=12):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=g, dtype=F64)
    y = torch.randn(3, size, 2, generator=g, dtype=F64)
    valid = torch.rand(3, size, generator=g) < 0.8
    valid[:, -1] = True
    return x, y, valid


def part(data, rank, size):
    """One rank's samples, which are not as many as another's."""
    x, y, valid = data
    where = slice(sum(CUTS[size][:rank]), sum(CUTS[size][: rank + 1]))
    return x[where], y[:, where], valid[:, where]


def make(name, model, /, **options):
    seed = {"seed": 7} if "seed" in hyperparameters(name) else {}
    hyper = SMALL.get(base(name), {}) | seed | options
    return make_balancer(name, shared=model.trunk, num_tasks=3, **hyper)


class Seen(list):
    """What is compared after each step."""

    def note(self, model, balancer):
        state = balancer.gathered_state_dict()
        weights = [p.detach().clone() for p in balancer.parameters()]
        numbers = [balancer.slopes, balancer.weights, balancer.nonfinite.clone(), balancer.log()]
        self.append([model.grads(), numbers, weights, tensors(state)])


def tensors(nested):
    """The tensors and numbers of a nested state, without random streams."""
    if isinstance(nested, torch.Tensor):
        return nested.clone().double()
    if isinstance(nested, dict):
        return {str(k): tensors(v) for k, v in nested.items() if k not in ("streams", "seed")}
    if isinstance(nested, list | tuple):
        return [tensors(value) for value in nested]
    return nested


@torch.no_grad()
def follow(model, balancer, data, rate=1e-2):
    for p in [*model.parameters(), *balancer.parameters()]:
        if p.grad is not None:
            p.sub_(p.grad, alpha=rate)
        p.grad = None
    x, y, valid = data
    balancer.after_step(model.losses(model.features(x), y, valid), size=valid.sum(1))
    balancer.end_epoch()


def accumulate_by_sample(model, balancer, data):
    """Every sample of (x, y, valid) as a micro-batch of its own, with its counts."""
    x, y, valid = data
    for one in range(len(x)):
        piece = x[one : one + 1], y[:, one : one + 1], valid[:, one : one + 1]
        losses = model.losses(model.features(piece[0]), *piece[1:])
        balancer.accumulate(losses, piece[2].sum(1))


def train(rank, size, name, steps=5, accumulate=False, cosines=False, **options):
    """Some steps of one rank; one rank of one is the joined batch."""
    warnings.simplefilter("error")
    model = Net()
    balancer = make(name, model, **options)
    balancer.with_cosines = cosines
    seen = Seen()
    for seed in range(steps):
        drawn = [batch(10 * seed + k) for k in range(balancer.aggregator.num_batches)]
        pieces = [part(data, rank, size) for data in drawn]
        if accumulate:
            accumulate_by_sample(model, balancer, pieces[0])
            balancer.backward()
        else:
            zs = [model.features(x) for x, _, _ in pieces]
            losses = [model.losses(z, *data[1:]) for z, data in zip(zs, pieces, strict=True)]
            features = {"features": zs[0]} if balancer.level == "features" else {}
            counts = [valid.sum(1) for _, _, valid in pieces]
            sizes = dict(zip(("size", "size2", "size3"), counts, strict=False))
            balancer.backward(*losses, **sizes, **features)
        seen.note(model, balancer)
        follow(model, balancer, pieces[0])
    seen.append([p.detach().clone() for p in model.parameters()])
    return list(seen)


# processes that wait for work


def work(rank, size, port, tasks, answers):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=WAIT),
    )
    answers.put((rank, None, None))
    while True:
        function, arguments, options = tasks.get()
        try:
            torch.manual_seed(100 + rank)  # ranks draw other numbers
            with warnings.catch_warnings():  # a filter set by one function ends with it
                answers.put((rank, function(rank, size, *arguments, **options), None))
        except Exception as error:
            answers.put((rank, None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Processes:
    """`size` processes in one group; a function runs in all of them, with their rank and size.

    They are forks of a server that has imported torch.
    """

    def __init__(self, size):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo"])
        self.size = size
        self.is_broken = False
        self.answers = context.Queue()
        self.tasks = [context.Queue() for _ in range(size)]
        port = free_port()
        self.processes = [
            context.Process(
                target=work, args=(r, size, port, self.tasks[r], self.answers), daemon=True
            )
            for r in range(size)
        ]
        for process in self.processes:
            process.start()
        self.collect(START)

    def run(self, function, *arguments, **options):
        """The answers of all ranks; an error in one of them is raised, a missing one too."""
        answers = self.answers_of(function, *arguments, **options)
        for _, error in answers:
            assert error is None, error
        return [result for result, _ in answers]

    def answers_of(self, function, *arguments, **options):
        for tasks in self.tasks:
            tasks.put((function, arguments, options))
        return self.collect(2 * WAIT)

    def collect(self, seconds):
        answers = {}
        while len(answers) < self.size:
            try:
                rank, result, error = self.answers.get(timeout=seconds)
            except queue.Empty:
                self.is_broken = True
                raise AssertionError(f"ranks {sorted(answers)} answered, the others hang") from None
            answers[rank] = (result, error)
            # an error of the transport ends the group
            self.is_broken |= error is not None and any(word in error for word in TORN)
        return [answers[rank] for rank in range(self.size)]

    def stop(self):
        """At once: what the processes would tidy up, nobody needs."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def assert_alike(a, b, rtol):
    """Equal nested structures, numbers up to rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_alike(a[key], b[key], rtol)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_alike(one, other, rtol)
    elif isinstance(a, torch.Tensor | float):
        assert_close(a, b, rtol=rtol, atol=1e-11, equal_nan=True)
    else:
        assert a == b


def agree(ranks, one, rtol=1e-10):
    for rank in ranks:
        assert_alike(rank, one, rtol)
    for rank in ranks[1:]:
        assert same(rank, ranks[0])
