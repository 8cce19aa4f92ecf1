"""Every method on a device that is not the CPU: its numbers, and how often the host waits."""

import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import accelerator
from helpers.methods import BASES, LEARNED, Net, follow, make, same, step, unchanged
from torch.testing import assert_close

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.core.gramian import gramian
from dbmtl.core.transform import Memory
from dbmtl.experiments.train import train

F32 = torch.float32
SILENT = {  # methods that solve nothing on the host: it waits for the check of the losses alone
    *("EW", "GLS", "RLW", "UW", "DWA", "IMTL-L", "loss-only", "LS", "UW-SO", "FAMO", "STCH"),
    *("gradient-only", "DB-MTL", "GradNorm"),
}


def begin():
    sys.path.insert(0, str(Path(__file__).parents[1]))
    torch.set_num_threads(1)
    accelerator.start()
    of_device = Memory.generator

    def generator(self, device="cpu"):  # one stream, wherever the numbers are drawn
        return of_device(self, "cpu")

    Memory.generator = generator


@pytest.fixture(scope="module")
def elsewhere():
    """Runs a function in a process that has the device, which the others are spared."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=begin) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)


class ToDevice(Net):
    """The network in float32, with what it reads on its own device."""

    def __init__(self, device):
        super().__init__(dtype=F32)
        self.to(device)


def stepped(name, device, steps=8, **options):
    """A network after some steps, the balancer, and what made the host wait in each `backward`."""
    warnings.simplefilter("ignore")
    torch.manual_seed(3)
    model = ToDevice(device)
    balancer = make(name, model, **options)
    reads = []
    for seed in range(steps):
        accelerator.reads.clear()
        step(balancer, model, seed)
        reads.append(list(accelerator.reads))
        follow(balancer, model, seed)
    return model, balancer, reads


def numbers(model):
    return [p.detach().cpu() for p in model.parameters()]


def compare(name, check):
    expected = numbers(stepped(name, "cpu", check=check)[0])
    model, _, reads = stepped(name, accelerator.NAME, check=check)
    assert all(p.device.type == accelerator.NAME for p in model.parameters())
    assert_close(numbers(model), expected, rtol=1e-5, atol=1e-6)
    return [len(of_step) for of_step in reads]


@pytest.mark.parametrize("check", ["now", "later"])
@pytest.mark.parametrize("name", BASES)
def test_a_method_gives_the_cpus_numbers_and_waits_at_most_once(elsewhere, name, check):
    """IGBv2 learns in these steps, and looks at its own gradients in each of its updates; GradNorm
    looks at the first losses. With `check="now"` the first steps also look whether learned scales
    and MTAdam's parameters move as they should."""
    reads = elsewhere(compare, name, check)
    if name == "IGBv2":
        return
    is_silent = name in SILENT and check == "later"
    assert reads[0] <= (0 if is_silent and name != "GradNorm" else 1)
    watches = check == "now" and name in {"MTAdam", *LEARNED}
    assert max(reads[1:]) <= (0 if is_silent else 1) + watches


def resume(name):
    """From a state that went through the CPU, as files do; on from there as without a stop."""
    model, balancer, _ = stepped(name, accelerator.NAME, 4)
    again = ToDevice(accelerator.NAME)
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    second = make(name, again)
    state = balancer.state_dict()
    second.load_state_dict(state)
    assert same_numbers(second.state_dict(), state)
    for seed in range(4, 7):
        for net, one in ((model, balancer), (again, second)):
            step(one, net, seed)
            follow(one, net, seed)
    assert_close(numbers(again), numbers(model), rtol=1e-6, atol=1e-7)


def same_numbers(a, b):
    return same(on_cpu(a), on_cpu(b))


def on_cpu(nested):
    if isinstance(nested, torch.Tensor):
        return nested.detach().cpu()
    if isinstance(nested, dict):
        return {key: on_cpu(value) for key, value in nested.items()}
    return type(nested)(map(on_cpu, nested)) if isinstance(nested, list | tuple) else nested


@pytest.mark.parametrize("name", BASES)
def test_a_state_goes_on(elsewhere, name):
    elsewhere(resume, name)


def accumulated(name, device):
    model = ToDevice(device)
    balancer = make(name, model)
    for seed in range(4):
        for part in range(2):
            balancer.accumulate(model.losses(model.features(2 * seed + part)), 3 + part)
        balancer.backward()
        follow(balancer, model, seed)
    return numbers(model)


def compare_accumulated(name):
    warnings.simplefilter("ignore")
    assert_close(
        accumulated(name, accelerator.NAME), accumulated(name, "cpu"), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "name", ["EW", "DB-MTL", "CAGrad", "UW", "MTAdam", "MoCo", "GradVac", "FAMO"]
)
def test_micro_batches(elsewhere, name):
    elsewhere(compare_accumulated, name)


def lacks_the_last(losses, batch):
    return [*losses[:-1], None]


def without_a_task(name, device):
    """Every other step lacks the last task, where the method can do without."""
    model = ToDevice(device)
    balancer = make(name, model)
    if not (balancer.transform.can_skip_tasks and balancer.aggregator.can_skip_tasks):
        return None
    balancer.missing = "skip"
    for seed in range(5):
        step(balancer, model, seed, unchanged if seed % 2 else lacks_the_last)
        with torch.no_grad():
            for p in [*model.parameters(), *balancer.parameters()]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=1e-3)
                p.grad = None
        balancer.end_epoch()
    return numbers(model)


def compare_without_a_task(name):
    warnings.simplefilter("ignore")
    expected = without_a_task(name, "cpu")
    assert_close(without_a_task(name, accelerator.NAME), expected, rtol=1e-5, atol=1e-6)
    return expected is not None


def test_a_task_may_be_missing(elsewhere):
    assert sum(elsewhere(compare_without_a_task, name) for name in BASES) >= 20


def in_order(name, grads):
    expected = numbers(stepped(name, "cpu", grads=grads)[0])
    assert_close(
        numbers(stepped(name, accelerator.NAME, grads=grads)[0]), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("grads", ["split", "batched"])
@pytest.mark.parametrize("name", ["DB-MTL", "CAGrad", "GradVac"])
def test_other_orders_of_the_passes(elsewhere, name, grads):
    elsewhere(in_order, name, grads)


def refuse(name):
    """The check of the losses came with the method's own transfer, and nothing was changed."""
    model, balancer, _ = stepped(name, accelerator.NAME, 3)
    before = on_cpu(balancer.state_dict())
    with pytest.raises(FloatingPointError, match="the loss of task 1 is nan"):
        step(balancer, model, 9, lambda losses, _: [losses[0], losses[1] * torch.nan, losses[2]])
    assert same(on_cpu(balancer.state_dict()), before)
    assert all(p.grad is None for p in model.parameters())
    step(balancer, model, 4)


@pytest.mark.parametrize("name", [name for name in BASES if name not in SILENT])
def test_a_bad_loss_is_refused_and_changes_nothing(elsewhere, name):
    elsewhere(refuse, name)


def refuse_between_measured_steps(name):
    model, balancer, reads = stepped(name, accelerator.NAME, 4, update_every=4)
    assert [len(of_step) for of_step in reads[1:]] == [1, 1, 1]
    step(balancer, model, 4)  # measured
    for p in model.parameters():
        p.grad = None
    with pytest.raises(FloatingPointError, match="the loss of task 1 is nan"):
        step(balancer, model, 5, lambda losses, _: [losses[0], losses[1] * torch.nan, losses[2]])
    assert all(p.grad is None for p in model.parameters())
    step(balancer, model, 5)


@pytest.mark.parametrize("name", ["DB-MTL", "CAGrad"])
def test_a_bad_loss_is_refused_between_measured_steps(elsewhere, name):
    elsewhere(refuse_between_measured_steps, name)


def products(scale):
    rows = [[torch.tensor([3.0, 4.0]) * scale], [torch.tensor([-1.0, 0.5]) * scale]]
    there = [[g.to(accelerator.NAME) for g in row] for row in rows]
    assert_close(gramian(there).cpu(), gramian(rows), rtol=1e-6, atol=0)
    other = [[g * 0.1 for g in row] for row in there]
    assert_close(gramian(there, other).cpu(), gramian(rows) * 0.1, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 0.0])
def test_a_gramian_of_any_size_is_right_without_a_look(elsewhere, scale):
    elsewhere(products, scale)


def mix():
    a = torch.ones(2, device=accelerator.NAME)
    with pytest.raises(RuntimeError, match="tensors of the device and of the CPU"):
        a + torch.ones(2)
    accelerator.reads.clear()
    assert (a + 1).sum().item() == 4 and a.tolist() == [1, 1] and a.cpu().device.type == "cpu"
    assert len(accelerator.reads) == 3


def test_the_device_is_one(elsewhere):
    elsewhere(mix)


def benchmark_on(device, method, out):
    record = train(get_benchmark("toy"), method, out=out, device=device, monitor_every=3)
    assert record["state"] == "finished" and record["device"].startswith(device)
    return record["curves"], record["monitors"]


def compare_training(method, out):
    of_cpu = benchmark_on("cpu", method, f"{out}/cpu")
    of_device = benchmark_on(accelerator.NAME, method, f"{out}/accel")
    assert list(flat(of_device)) == pytest.approx(list(flat(of_cpu)), rel=1e-4, abs=1e-6)


def flat(nested):
    if isinstance(nested, dict):
        nested = nested.values()
    if isinstance(nested, (int, float)):
        yield nested
    elif not isinstance(nested, str) and nested is not None:
        for part in nested:
            yield from flat(part)


@pytest.mark.full
@pytest.mark.parametrize("method", ["EW", "DB-MTL", "CAGrad"])
def test_a_benchmark_trains_there(elsewhere, method, tmp_path):
    """Training, evaluation, monitors and checkpoints of a small benchmark."""
    elsewhere(compare_training, method, str(tmp_path))
