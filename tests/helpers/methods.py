"""Every method by its name, small networks to try it on, and a step of each in one line."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from dbmtl import make_balancer, method_names
from dbmtl.registry import hyperparameters

F64 = torch.float64


def takes_log(name):
    try:
        hyperparameters(f"{name}+log")
    except ValueError:
        return False
    return True


BASES = method_names()
NAMES = BASES + [f"{name}+log" for name in BASES if takes_log(name)]
VARIANTS = [(name, {}) for name in NAMES] + [
    ("RLW", {"total": "T"}),
    ("DWA", {"window": 2}),
    ("UW", {"half": (True, False, True)}),
    ("GradNorm", {"initial": "first"}),
    ("MGDA", {"normalize": "l2", "raw": True}),
    ("PCGrad", {"itself": False, "eps": 0.0, "reduction": "mean"}),
    ("GradVac", {"group": "tensor", "update": "below"}),
    ("GradDrop", {"leak": (0.1, 0.2, 0.3)}),
    ("CAGrad", {"times_tasks": True}),
    ("Nash-MTL", {"update_every": 3}),
    ("FairGrad", {"alpha": 0.5, "max_norm": 1.0}),
    ("UPGrad", {"reg_eps": 1e-4}),
    ("MoCo", {"projection": "simplex", "normalize": False, "c": 1e-3}),
    ("ExcessMTL", {"step_size": 1.0, "warmup": 3}),
    ("Aligned-MTL", {"scale": "rmse"}),
    ("SDMGrad", {"heads": "mean"}),
    ("DB-MTL", {"beta": 0.9, "beta_decay": 0.0}),
    ("DB-MTL", {"beta": 0}),
]
SMALL = {  # short warm-ups, so that few steps show all phases
    "IGBv2": {
        "base_epoch": 0,
        "random_epochs": 1,
        "update_epoch": 1,
        "update_every": 1,
        "updates": 1,
        "batch": 4,
        "hidden": (4, 4),
    },
    "STCH": {"warmup": 1},
}
RANDOM = {"RLW", "IGBv2", "PCGrad", "GradDrop", "GradVac", "GradDrop-features"}
FEATURES = {"MGDA-UB", "IMTL-G-features", "GradDrop-features"}
THREE = {"SDMGrad", "MoDo"}
LEARNED = {"UW", "IMTL-L", "IMTL", "GradNorm"}
EPOCHS = {"DWA", "IGBv2", "STCH", "GradNorm"}

every = pytest.mark.parametrize("name", NAMES)
every_base = pytest.mark.parametrize("name", BASES)  # where the loss axis has no part in it
every_variant = pytest.mark.parametrize(
    "name, hyper", VARIANTS, ids=lambda v: v if isinstance(v, str) else ",".join(v)
)


def base(name):
    return name.removesuffix("+log")


def make(name, model, *, num_tasks=None, **options):
    seed = {"seed": 7} if "seed" in hyperparameters(name) else {}
    hyper = SMALL.get(base(name), {}) | seed | options
    num_tasks = num_tasks or len(model.heads)
    return make_balancer(name, shared=model.trunk, num_tasks=num_tasks, **hyper)


class Net(nn.Module):
    """Three losses of sizes 1, 10, 100 behind one trunk, whose numbers stand in four tensors or in
    one."""

    def __init__(self, tasks=(0, 1, 2), dtype=F64, flat=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(43, generator=generator, dtype=F64) / 2
        heads = torch.randn(4, 4, generator=generator, dtype=F64)
        pieces = [numbers] if flat else numbers.split([20, 5, 15, 3])
        self.tasks = tasks
        self.trunk = nn.ParameterList(nn.Parameter(piece.clone().to(dtype)) for piece in pieces)
        self.heads = nn.ParameterList(nn.Parameter(heads[t].clone().to(dtype)) for t in tasks)

    def features(self, seed=0):
        flat = torch.cat([p.reshape(-1) for p in self.trunk])
        a, b, c, d = flat.split([20, 5, 15, 3])
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 4, generator=generator, dtype=F64).to(flat)
        hidden = (x @ a.view(4, 5) + b).tanh()
        return (hidden @ c.view(5, 3) + d).tanh()

    def losses(self, z):
        pairs = zip(self.tasks, self.heads, strict=True)
        return [10.0**t * (z @ h[:3] + h[3] - t).square().mean() + 0.1 for t, h in pairs]

    def grads(self):
        return [None if p.grad is None else p.grad.clone() for p in self.parameters()]

    def shared_gradient(self):
        return torch.cat([p.grad.reshape(-1) for p in self.trunk])


class Lines(nn.Module):
    """Losses with given gradients: row t of the Jacobian. No heads; the parameters are the
    features, all positive."""

    def __init__(self, jacobian):
        super().__init__()
        self.J = jacobian
        self.heads = [None] * len(jacobian)
        ones = torch.ones(jacobian.shape[1], dtype=jacobian.dtype)
        self.trunk = nn.ParameterList([nn.Parameter(ones)])

    def features(self, seed=0):
        return self.trunk[0][None] * 1

    def losses(self, z):
        dot = self.J @ z[0]
        return list(dot - dot.detach() + 1.0 + torch.arange(len(dot)))

    shared_gradient = Net.shared_gradient


def unchanged(losses, batch):
    return losses


def step(balancer, model, seed=0, change=unchanged):
    """One backward, with features or three batches where the method asks for them."""
    batches = range(balancer.aggregator.num_batches)
    zs = [model.features(3 * seed + batch) for batch in batches]
    losses = [change(model.losses(z), batch) for batch, z in enumerate(zs)]
    features = {"features": zs[0]} if balancer.level == "features" else {}
    balancer.backward(*losses, **features)


@torch.no_grad()
def follow(balancer, model, seed=0, rate=1e-3, epoch=True):
    """What a training loop does after the backward."""
    for p in [*model.parameters(), *balancer.parameters()]:
        if p.grad is not None:
            p.sub_(p.grad, alpha=rate)
        p.grad = None
    balancer.after_step(model.losses(model.features(3 * seed)))
    if epoch:
        balancer.end_epoch()


class Training(NamedTuple):
    """What a few steps gave."""

    gradients: list  # of each step: those of the trunk and of the heads
    scales: list  # the learned ones at the end


def train(balancer, model, seeds):
    gradients = []
    for seed in seeds:
        step(balancer, model, seed)
        gradients.append([p.grad.clone() for p in model.parameters()])
        follow(balancer, model, seed)
    return Training(gradients, [p.detach().clone() for p in balancer.parameters()])


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


def same(a, b):
    """Equal nested structures, to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
