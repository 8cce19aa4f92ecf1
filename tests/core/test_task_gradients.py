"""T gradients from one graph: three orders of the passes, many architectures, one answer."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from dbmtl.core.gramian import combine, cosines, gramian, norms
from dbmtl.core.task_gradients import task_gradients

MODES = ["loop", "split", "batched"]


class Net(nn.Module):
    """A trunk and T heads; `features` is what a subclass changes."""

    def __init__(self, trunk, heads):
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(heads)

    def forward(self, x):
        z = self.trunk(x)
        return [head(z).square().mean() + 0.1 for head in self.heads]


def mlp(tasks=3):
    trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
    return Net(trunk, [nn.Linear(5, 1) for _ in range(tasks)]), torch.randn(7, 4)


def norm_and_dropout():
    trunk = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.LayerNorm(6)
    )
    return Net(trunk, [nn.Linear(6, 2) for _ in range(3)]), torch.randn(9, 4)


def convolution():
    trunk = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU()
    )
    net = Net(trunk, [nn.Conv2d(5, 1, 1), nn.Sequential(nn.Flatten(), nn.Linear(80, 2))])
    return net.to(memory_format=torch.channels_last), torch.randn(2, 3, 8, 8).contiguous(
        memory_format=torch.channels_last
    )


def embedding():
    trunk = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 5))
    return Net(trunk, [nn.Linear(5, 1) for _ in range(2)]), torch.tensor([[1, 2], [2, 2], [9, 0]])


def expanded():
    """Sums and biases give expanded gradients: stride 0."""

    class Trunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.scale = (nn.Parameter(torch.randn(s)) for s in ((4, 3), (3,), ()))

        def forward(self, x):
            return self.scale * (self.a.sum(0) + self.b.expand(5, 3).T.sum(1) + x)

    return Net(Trunk(), [nn.Identity(), nn.Linear(3, 1)]), torch.randn(3)


class Depths(Net):
    """Heads tap the trunk at three depths."""

    def forward(self, x):
        outputs = []
        for layer, head in zip(self.trunk, self.heads, strict=True):
            x = layer(x).tanh()
            outputs.append(head(x).square().mean() + 0.1)
        return outputs


class DepthsOfAll(Net):
    """Each head reads the features of two depths: a cut with two edges a task."""

    def forward(self, x):
        y = self.trunk[0](x).tanh()
        z = self.trunk[1](x).tanh()
        return [
            head(y + t * z).square().mean() + (y * z).mean() ** 2
            for t, head in enumerate(self.heads)
        ]


class TwoBranches(Net):
    """Two trunks side by side; the first head reads both, each other head one of them."""

    def forward(self, x):
        left, right = (branch(x).tanh() for branch in self.trunk)
        features = [left * right, left, right]
        return [head(z).square().mean() + 0.1 for head, z in zip(self.heads, features, strict=True)]


class Forwards(Net):
    """One forward a task, as with one data loader a task."""

    def forward(self, x):
        return [head(self.trunk(x + t)).square().mean() for t, head in enumerate(self.heads)]


class Tied(Net):
    """A head uses a weight of the trunk again."""

    def forward(self, x):
        z = self.trunk(x)
        return [head(F.linear(z, self.trunk[0].weight.T)).square().mean() for head in self.heads]


class Chained(Net):
    """The second loss contains the first."""

    def forward(self, x):
        first, second, third = super().forward(x)
        return [first, second + first.square(), third]


class Partial(Net):
    """Task 0 skips the last layer of the trunk, and a parameter is used by nobody."""

    def __init__(self, trunk, heads):
        super().__init__(trunk, heads)
        self.trunk.register_parameter("unused", nn.Parameter(torch.ones(2)))

    def forward(self, x):
        y = self.trunk[0](x).tanh()
        return [y.square().mean(), *(head(self.trunk[1](y)).square().mean() for head in self.heads)]


def layers(kind, tasks=3, depth=3):
    return kind(
        nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth))),
        [nn.Linear(4, 1) for _ in range(tasks)],
    )


class Checkpointed(Net):
    def forward(self, x):
        z = checkpoint(self.trunk, x, use_reentrant=False)
        return [head(z).square().mean() for head in self.heads]


ZOO = {
    "mlp": mlp,
    "one task": lambda: mlp(1),
    "norm and dropout": norm_and_dropout,
    "convolution, channels last": convolution,
    "embedding": embedding,
    "expanded": expanded,
    "depths": lambda: (layers(Depths), torch.randn(5, 4)),
    "two depths each": lambda: (layers(DepthsOfAll, depth=2), torch.randn(5, 4)),
    "two branches": lambda: (layers(TwoBranches, depth=2), torch.randn(5, 4)),
    "one forward a task": lambda: (layers(Forwards), torch.randn(5, 4)),
    "tied": lambda: (layers(Tied, depth=1), torch.randn(5, 4)),
    "chained losses": lambda: (layers(Chained), torch.randn(5, 4)),
    "unused parts": lambda: (layers(Partial, tasks=2, depth=2), torch.randn(5, 4)),
    "checkpoint": lambda: (layers(Checkpointed), torch.randn(5, 4)),
}


def case(name, dtype=torch.float64):
    net, x = ZOO[name]()
    return net.to(dtype), x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize("grads", MODES)
@pytest.mark.parametrize("name", ZOO)
def test_task_gradients_equal_one_plain_pass_each(name, grads):
    net, x = case(name)
    shared = list(net.trunk.parameters())
    of_heads = list(net.heads.parameters())
    losses = net(x)
    cotangents = torch.linspace(0.5, 2, len(losses), dtype=torch.float64)
    expected = [
        torch.autograd.grad(c * loss, shared + of_heads, retain_graph=True, materialize_grads=True)
        for c, loss in zip(cotangents, losses, strict=True)
    ]
    found = task_gradients(losses, net.trunk, cotangents, grads=grads)
    assert len(found.shared) == len(found.heads) == len(losses)
    for row, heads, right in zip(found.shared, found.heads, expected, strict=True):
        assert_close(row, list(right[: len(shared)]), rtol=1e-12, atol=1e-14)
        assert set(heads) <= set(of_heads)
        for p, g in zip(of_heads, right[len(shared) :], strict=True):
            assert_close(heads.get(p, torch.zeros_like(p)), g, rtol=1e-12, atol=1e-14)


@pytest.mark.full
@pytest.mark.parametrize("grads", MODES)
def test_task_gradients_under_a_compiled_trunk(grads):
    net, x = case("mlp")
    expected = task_gradients(net(x), net.trunk)
    compiled = Net(torch.compile(net.trunk, backend="aot_eager"), net.heads)
    assert_close(
        task_gradients(compiled(x), net.trunk, grads=grads).shared,
        expected.shared,
        rtol=1e-12,
        atol=1e-14,
    )


# --------------------------------------------------------------------------------- forms of losses

STACKED = {
    "list": list,
    "tuple": tuple,
    "stack": torch.stack,
    "indexed stack": lambda ls: [torch.stack(ls)[t] for t in range(len(ls))],
    "from the end": lambda ls: [torch.stack(ls)[t - len(ls)] for t in range(len(ls))],
    "unbound stack": lambda ls: torch.stack(ls).unbind(),
    "last dimension": lambda ls: torch.stack(ls, dim=-1),
    "shape [1]": lambda ls: [loss.reshape(1) for loss in ls],
}


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("form", STACKED)
def test_task_gradients_of_every_form_of_losses(form, no_grad):
    net, x = case("mlp")
    expected = task_gradients(net(x), net.trunk)
    losses = STACKED[form](net(x))
    with torch.set_grad_enabled(not no_grad):
        found = task_gradients(losses, net.trunk)
    assert_close(found.shared, expected.shared)
    assert_close(found.heads, expected.heads)


@pytest.mark.parametrize("shape", [(2, 3), (3, 1)])
def test_stacked_losses_must_be_one_dimensional(shape):
    p = nn.Parameter(torch.ones(shape))
    with pytest.raises(ValueError, match=r"stacked losses must have shape \[T\], got \[\d, \d\]"):
        task_gradients(p * 2, [p])


def test_a_loss_that_is_no_scalar_or_a_constant_is_named_by_number():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"loss 1 must be a scalar, got shape \[2\]"):
        task_gradients([p.sum(), p], [p])
    for form in (list, torch.stack):
        with pytest.raises(ValueError, match="loss 1 .*require grad"):
            task_gradients(form([p.sum(), torch.ones(())]), [p])


def test_unknown_order_is_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="grads must be 'loop', 'split' or 'batched', got 'lop'"):
        task_gradients([p.sum()], [p], grads="lop")


# --------------------------------------------------------------------------------- cost and memory


class Spy(torch.autograd.Function):
    """The identity; notes every backward call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, name, calls):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.name, ctx.calls = inputs

    @staticmethod
    def backward(ctx, g):
        ctx.calls.append(ctx.name)
        return g, None, None


def spied(net, x, calls):
    z = Spy.apply(net.trunk(x), "trunk", calls)
    return [Spy.apply(head(z), t, calls).square().mean() + 0.1 for t, head in enumerate(net.heads)]


@pytest.mark.parametrize("form", ["list", "stack", "indexed stack", "unbound stack", "shape [1]"])
@pytest.mark.parametrize("grads", MODES)
def test_every_head_runs_backward_once(grads, form):
    (net, x), calls = case("mlp"), []
    task_gradients(STACKED[form](spied(net, x, calls)), net.trunk, grads=grads)
    heads = [name for name in calls if name != "trunk"]
    assert sorted(heads) == [0, 1, 2]
    assert calls.count("trunk") == (1 if grads == "batched" else 3)
    if grads != "loop":
        assert calls[:3] == [0, 1, 2]


@pytest.mark.parametrize("grads", MODES)
@pytest.mark.parametrize("name", [n for n in ZOO if n != "expanded"])
def test_the_graph_is_freed_unless_retained(name, grads):
    net, x = case(name)
    losses = net(x)
    first = task_gradients(losses, net.trunk, grads=grads, retain_graph=True)
    assert_close(task_gradients(losses, net.trunk, grads=grads).shared, first.shared)
    for loss in losses:
        with pytest.raises(
            RuntimeError, match="backward through the graph a second time|have already been freed"
        ):
            loss.backward()


@pytest.mark.parametrize("grads", MODES)
def test_the_trunk_is_freed_with_the_heads(grads):
    net, x = case("mlp")
    z = net.trunk(x)
    losses = [head(z).square().mean() for head in net.heads]
    task_gradients(losses, net.trunk, grads=grads)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        z.sum().backward()


class Token:
    """Stands for a saved activation; dies when autograd lets go of it."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("grads", ["split", "batched"])
def test_heads_are_freed_before_the_trunk_is_passed(grads):
    (net, x), kept, alive = case("mlp"), [], []

    def pack(tensor):
        token = Token(tensor)
        kept.append(weakref.ref(token))
        return token

    z = net.trunk(x)
    z.register_hook(lambda g: alive.append(sum(ref() is not None for ref in kept)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda token: token.tensor):
        losses = [head(z).exp().square().mean() for head in net.heads]
    seen = len(kept)
    z.grad_fn.register_prehook(lambda g: alive.append(sum(ref() is not None for ref in kept)))
    task_gradients(losses, net.trunk, grads=grads)
    assert (
        seen >= 6 and alive[-1] == 0
    )  # when the trunk's last pass starts, no head holds an activation


# ----------------------------------------------------------------------------------------- Gramian


def rows(tasks=4, dtype=torch.float64):
    return [[torch.randn(s, dtype=dtype) for s in ((3, 2), (), (5,), (0,))] for _ in range(tasks)]


def flat(row):
    return torch.cat([g.reshape(-1) for g in row])


def test_gramian_norms_cosines_and_sums_are_those_of_flat_vectors():
    G = rows()
    J = torch.stack([flat(row) for row in G])
    assert_close(norms(G), J.norm(dim=1))
    assert_close(gramian(G), J @ J.T)
    assert_close(cosines(gramian(G)), torch.corrcoef(torch.cat([J, -J], dim=1))[:4, :4])
    weights = torch.randn(4, dtype=torch.float64)
    assert_close(flat(combine(G, weights)), weights @ J)


def test_cosine_of_a_zero_gradient_is_zero():
    G = [[torch.zeros(3)], [torch.ones(3)]]
    assert_close(cosines(gramian(G)).float(), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_measured_in_float32(dtype):
    G = [[torch.full((400,), 200.0, dtype=dtype)]]  # a square is beyond float16
    assert_close(norms(G), torch.tensor([4000.0]))
    assert_close(gramian(G).float(), torch.tensor([[1.6e7]]))


def test_gradients_of_mixed_dtypes():
    G = [[torch.ones(2), torch.ones(2, dtype=torch.float64), torch.ones(5, dtype=torch.bfloat16)]]
    assert norms(G).item() == pytest.approx(3.0, rel=1e-12)
    assert [g.dtype for g in combine(G, torch.ones(1))] == [
        torch.float32,
        torch.float64,
        torch.bfloat16,
    ]


def test_combining_makes_fresh_tensors():
    G = rows(1)
    total = combine(G, torch.ones(1))
    assert not {g.data_ptr() for g in total if g.numel()} & {g.data_ptr() for g in G[0]}
