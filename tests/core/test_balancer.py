"""One line in place of `loss.backward()`: what goes in, what lands in `.grad`, what can be read
afterwards."""

import io
import warnings
from collections import OrderedDict
from types import MappingProxyType

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl import (
    DBMTL,
    EMA,
    Balancer,
    Identity,
    Log,
    MaxNorm,
    Sum,
    make_balancer,
    method_names,
)
from dbmtl.core.aggregator import GramianAggregator, LossWeighting, NormAggregator
from dbmtl.core.task_gradients import task_gradients

MODES = ["loop", "split", "batched"]
NAMES = ("depth", "normal", "segmentation")


class Net(nn.Module):
    def __init__(self, tasks=3, dtype=torch.float64):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(tasks))
        self.to(dtype)

    def features(self, seed=0):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).to(
            self.trunk[0].weight
        )
        return self.trunk(x).tanh()

    def losses(self, seed=0, z=None):
        z = self.features(seed) if z is None else z
        return [10.0**t * (head(z) - t).square().mean() + 0.1 for t, head in enumerate(self.heads)]

    def grads(self):
        return [None if p.grad is None else p.grad.clone() for p in self.parameters()]


def net(tasks=3, dtype=torch.float64):
    torch.manual_seed(0)
    return Net(tasks, dtype)


def asked(balancer, model, seed=0, form=list):
    """What a method's backward asks for: losses, three batches of them, or losses and features."""
    z, three = model.features(seed), balancer.aggregator.num_batches == 3
    batches = [
        form(model.losses(z=z)),
        *(form(model.losses(seed + more)) for more in ((100, 200) if three else ())),
    ]
    return batches, {"features": z} if balancer.level == "features" else {}


def stepped(form=list, method="DB-MTL", steps=1, **options):
    """The gradients of a network after some steps without moving."""
    model = net()
    balancer = make_balancer(method, shared=model.trunk, num_tasks=3, **options)
    for seed in range(steps):
        model.zero_grad()
        balancer.backward(form(model.losses(seed)))
    return model.grads()


# ------------------------------------------------------------------------------------------ losses

FORMS = {
    "tuple": tuple,
    "generator": lambda losses: (loss for loss in losses),
    "dict": lambda losses: dict(zip(NAMES, losses, strict=True)),
    "mapping": lambda losses: MappingProxyType(OrderedDict(zip(NAMES, losses, strict=True))),
    "stack": torch.stack,
    "shape [1]": lambda losses: [loss.reshape(1) for loss in losses],
    "unbound stack": lambda losses: torch.stack(losses).unbind(),
    "scaled stack": lambda losses: torch.stack(losses) * 1.0,
}


@pytest.mark.filterwarnings(
    "ignore:.*outside `shared`"
)  # a scaled stack: every loss reaches every head, with zeros
@pytest.mark.parametrize("method", ["EW", "DB-MTL"])
@pytest.mark.parametrize("form", FORMS)
def test_losses_of_every_form_give_the_same_gradients(form, method):
    assert_close(stepped(FORMS[form], method, 2), stepped(list, method, 2), rtol=1e-13, atol=1e-15)


def test_a_dict_may_change_its_order():
    def shuffled(losses):
        pairs = list(zip(NAMES, losses, strict=True))
        return dict(pairs if stepped.turn % 2 else pairs[::-1])

    results = []
    for turns in ((1, 1), (1, 2)):
        model = net()
        balancer = DBMTL(shared=model.trunk, num_tasks=3)
        for stepped.turn in turns:
            balancer.backward(shuffled(model.losses()))
        results.append((model.grads(), balancer.slopes))
    assert_close(*results)


@pytest.mark.parametrize("method", ["EW", "IMTL-L", "DB-MTL"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64, torch.float32), (torch.bfloat16,) * 3]
)
def test_losses_of_other_dtypes(dtypes, method):
    model = net(dtype=torch.float32)
    balancer = make_balancer(method, shared=model.trunk, num_tasks=3)
    balancer.backward([loss.to(d) for loss, d in zip(model.losses(), dtypes, strict=True)])
    plain = net(dtype=torch.float32)
    make_balancer(method, shared=plain.trunk, num_tasks=3).backward(plain.losses())
    assert_close(model.grads(), plain.grads(), rtol=0.02, atol=1e-3)
    assert balancer.slopes.dtype in (torch.float32, torch.float64)


# ------------------------------------------------------------------------------------------- .grad


@pytest.mark.parametrize("grads", MODES)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("method", ["EW", "loss-only", "gradient-only", "DB-MTL", "IMTL-L"])
def test_gradients_are_added_to_what_is_there(method, set_to_none, grads):
    fresh = stepped(method=method, grads=grads)
    model = net()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.zero_grad(set_to_none=set_to_none)
    make_balancer(method, shared=model.trunk, num_tasks=3, grads=grads).backward(model.losses())
    assert_close(model.grads(), fresh)
    make_balancer(method, shared=model.trunk, num_tasks=3, grads=grads).backward(model.losses())
    assert_close(model.grads(), [2 * g for g in fresh])


def test_equal_weighting_is_plain_backward():
    model = net()
    sum(model.losses()).backward()
    assert_close(stepped(method="EW"), model.grads())


@pytest.mark.parametrize("grads", MODES)
def test_loss_only_is_the_backward_of_the_log_losses(grads):
    model = net()
    sum((loss + 1e-8).log() for loss in model.losses()).backward()
    assert_close(stepped(method="loss-only", grads=grads), model.grads(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "method, transform",
    [("DB-MTL", lambda loss: (loss + 1e-8).log()), ("gradient-only", lambda loss: loss)],
)
def test_heads_get_the_gradient_of_the_sum_of_transformed_losses(method, transform):
    model = net()
    h = 1e-6

    def total():
        return sum(transform(loss) for loss in model.losses()).item()

    make_balancer(method, shared=model.trunk, num_tasks=3).backward(model.losses())
    for p in model.heads.parameters():
        for i in range(p.numel()):
            sides = []
            for side in (h, -2 * h):
                p.data.view(-1)[i] += side
                sides.append(total())
            p.data.view(-1)[i] += h
            assert p.grad.view(-1)[i].item() == pytest.approx(
                (sides[0] - sides[1]) / (2 * h), rel=1e-6, abs=1e-7
            )


def fixed_weights(kind, values, weights_heads):
    """An aggregator of a kind that always answers with the same weights."""

    class Weights(kind):
        def forward(self, measured, losses):
            return losses.new_tensor(values)

    aggregator = Weights()
    aggregator.weights_heads = weights_heads
    return aggregator


@pytest.mark.parametrize("ema", [None, 0.0])
@pytest.mark.parametrize("kind", [LossWeighting, NormAggregator, GramianAggregator])
@pytest.mark.parametrize("weights_heads", [False, True])
def test_heads_are_weighted_only_where_the_method_says_so(weights_heads, kind, ema):
    model = net()
    plain = net()
    values = [2.0, 0.5, 3.0]
    aggregator = fixed_weights(kind, values, weights_heads)
    ema = None if ema is None else EMA(ema, 0.0)
    Balancer(Identity(), aggregator, shared=model.trunk, num_tasks=3, ema=ema).backward(
        model.losses()
    )
    sum(w * loss for w, loss in zip(values, plain.losses(), strict=True)).backward()
    assert_close(
        [p.grad for p in model.trunk.parameters()], [p.grad for p in plain.trunk.parameters()]
    )
    for t, w in enumerate(values):
        assert_close(
            model.heads[t].weight.grad, plain.heads[t].weight.grad / (1 if weights_heads else w)
        )


def test_two_parameters_with_one_gradient_do_not_share_memory():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(3))
            self.b = nn.Parameter(torch.ones(3))

    for method in method_names():
        trunk = Twins()
        head = Twins()
        balancer = make_balancer(method, shared=trunk, num_tasks=2)
        zs = [(trunk.a + trunk.b)[None] for _ in range(balancer.aggregator.num_batches)]
        batches = [[(z + head.a + head.b).square().sum(), z.square().mean()] for z in zs]
        balancer.backward(*batches, **({"features": zs[0]} if balancer.level == "features" else {}))
        parameters = [*trunk.parameters(), *head.parameters()]
        before = [p.grad.clone() for p in parameters]
        nn.utils.clip_grad_value_(parameters[::2], 1e-3)
        for p, g in zip(parameters[1::2], before[1::2], strict=True):
            assert_close(p.grad, g)
        assert len({p.grad.data_ptr() for p in parameters}) == 4


def test_the_moving_average_is_not_the_gradient():
    model = net(1)
    balancer = DBMTL(shared=model.trunk, num_tasks=1)
    balancer.backward(model.losses())
    kept = [g.clone() for g in balancer.ema.rows[0].values()]
    for p in model.parameters():
        p.grad.zero_()
    assert_close(list(balancer.ema.rows[0].values()), kept)


# ------------------------------------------------------------------------------------------ shared


@pytest.mark.parametrize(
    "shared",
    [
        lambda m: m.trunk,
        lambda m: list(m.trunk.parameters()),
        lambda m: m.trunk.parameters(),
        lambda m: iter([*m.trunk.parameters(), *m.trunk.parameters()]),
    ],
    ids=["module", "list", "generator", "twice"],
)
def test_shared_is_a_module_or_an_iterable_read_once(shared):
    model = net()
    balancer = DBMTL(shared=shared(model), num_tasks=3)
    assert len(balancer.shared) == 4
    for seed in range(2):
        model.zero_grad()
        balancer.backward(model.losses(seed))
    assert_close(model.grads(), stepped(steps=2))


@pytest.mark.parametrize(
    "shared", [lambda m: [], lambda m: m.trunk.requires_grad_(False)], ids=["nothing", "all frozen"]
)
def test_nothing_shared_is_refused(shared):
    with pytest.raises(ValueError, match="`shared` holds no trainable parameter"):
        DBMTL(shared=shared(net()), num_tasks=3)


def test_frozen_and_unused_shared_parameters_keep_no_gradient():
    model = net()
    model.trunk[0].weight.requires_grad_(False)
    model.trunk.register_parameter("unused", nn.Parameter(torch.ones(2)))
    balancer = DBMTL(shared=model.trunk, num_tasks=3)
    for seed in range(2):
        balancer.backward(model.losses(seed))
    assert model.trunk[0].weight.grad is None and model.trunk.unused.grad is None
    assert model.trunk[0].bias.grad is not None
    assert "shared, but reached by no loss: 2 tensors, 22 parameters" in balancer.describe()


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_layer_frozen_on_the_way_gets_no_more_gradients(accumulate):
    model = net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3)
    balancer.backward(model.losses())
    model.zero_grad()
    model.trunk[0].requires_grad_(False)
    for seed in range(2):
        if accumulate:
            balancer.accumulate(model.losses(seed), 1)
            balancer.backward()
        else:
            balancer.backward(model.losses(seed))
    assert model.trunk[0].weight.grad is None and model.trunk[2].weight.grad is not None
    model.trunk[0].requires_grad_(True)
    balancer.backward(model.losses())
    assert model.trunk[0].weight.grad.abs().sum() > 0


def test_a_parameter_that_one_task_does_not_reach():
    """By hand: two tasks, shared (a, b), the second knows only b; both gradients get the longer
    one's length."""
    a, b = (nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2))
    balancer = Balancer(Identity(), MaxNorm(eps=0.0), shared=[a, b], num_tasks=2)
    with pytest.warns(UserWarning, match="nothing belongs to one task alone"):
        balancer.backward([3 * a + 4 * b, 2 * b])
    assert_close(balancer.weights, torch.tensor([1.0, 2.5]).double())
    assert_close((a.grad, b.grad), (torch.tensor(3.0).double(), torch.tensor(9.0).double()))


@pytest.mark.parametrize("grads", MODES)
def test_a_task_with_a_zero_gradient_does_nothing(grads):
    model = net()
    other = net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3, grads=grads)
    losses = model.losses()
    losses[1] = losses[1] * 0.0
    balancer.backward(losses)  # its loss is zero, too: legal under the log
    DBMTL(shared=other.trunk, num_tasks=2).backward(other.losses()[::2])
    assert_close(
        [p.grad for p in model.trunk.parameters()], [p.grad for p in other.trunk.parameters()]
    )
    assert balancer.slopes[1].item() == pytest.approx(1e8)


@pytest.mark.parametrize("method", method_names())
def test_one_task(method):
    model = net(1)
    plain = net(1)
    balancer = make_balancer(method, shared=model.trunk, num_tasks=1)
    batches, options = asked(balancer, model)
    balancer.backward(*batches, **options)
    for seed in (200,) if len(batches) == 3 else (0,):
        plain.losses(seed)[0].backward()
    assert all(ours.isfinite().all() for ours in model.grads())
    pairs = zip(model.grads(), plain.grads(), strict=True)
    for ours, right in list(pairs)[
        : 4 if len(batches) == 3 else None
    ]:  # the heads got all three batches
        if method == "MTAdam":  # Adam's first step is the sign
            assert_close(ours, right.sign(), rtol=1e-4, atol=1e-4)
        else:
            assert_close(ours / ours.norm(), right / right.norm())


# -------------------------------------------------------------------------------- forgotten layers


def test_a_forgotten_layer_warns_once_with_count_shapes_and_names():
    model = net()
    balancer = DBMTL(shared=model.trunk[0], num_tasks=3, model=model)
    with pytest.warns(UserWarning, match="2 trainable tensors outside `shared`") as caught:
        balancer.backward(model.losses())
    assert len(caught) == 1 and caught[0].filename == __file__
    for part in ("trunk.2.weight [3, 5]", "trunk.2.bias [3]"):
        assert part in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer.backward(model.losses())


def test_many_forgotten_tensors_are_counted_not_listed():
    weights = [nn.Parameter(torch.ones(())) for _ in range(9)]
    balancer = DBMTL(shared=weights[:1], num_tasks=2)
    with pytest.warns(UserWarning, match=r"8 trainable tensors .* unnamed \[\].* and 3 more"):
        balancer.backward([sum(weights), sum(w**2 for w in weights)])


def test_forgotten_layers_are_found_while_accumulating():
    model = net()
    balancer = DBMTL(shared=model.trunk[0], num_tasks=3)
    with pytest.warns(UserWarning, match="2 trainable tensors outside `shared`") as caught:
        balancer.accumulate(model.losses(), 4)
    assert caught[0].filename == __file__


def test_heads_alone_do_not_warn():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DBMTL(shared=model.trunk, num_tasks=3).backward(model.losses())


def test_describe_tells_the_partition():
    model = net()
    balancer = DBMTL(shared=model.trunk[0], num_tasks=3)
    assert "shared: 2 tensors, 25 parameters" in balancer.describe()
    assert "known after the first backward" in balancer.describe()
    with pytest.warns(UserWarning):
        balancer.backward(dict(zip(NAMES, model.losses(), strict=True)))
    lines = balancer.describe().splitlines()
    assert "outside shared, reached by depth: 2 tensors, 4 parameters" in lines
    assert (
        "outside shared, reached by depth, normal, segmentation: 2 tensors, 18 parameters" in lines
    )
    assert lines[0] == repr(balancer) and "DBMTL(Log(eps=1e-08), MaxNorm(alpha='max'" in lines[0]


def test_describe_tells_of_what_one_task_alone_reaches_in_shared():
    a, b, c = (nn.Parameter(torch.ones(n)) for n in (1, 2, 3))
    balancer = Balancer(Identity(), MaxNorm(), shared=[a, b, c], num_tasks=3)
    with pytest.warns(UserWarning, match="nothing belongs to one task alone"):
        balancer.backward([(a * b * c[:2]).sum(), (a * b).sum(), a.square().sum()])
    lines = balancer.describe().splitlines()
    assert [line for line in lines if "alone" in line] == [
        "in shared, but reached by 0 alone: 1 tensors, 3 parameters"
    ]


# ------------------------------------------------------------------------------ slopes and weights


def test_slopes_and_weights_of_the_last_step():
    model = net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3, beta=0)
    assert balancer.slopes is None and balancer.weights is None
    losses = model.losses()
    raw = task_gradients(losses, model.trunk, retain_graph=True).shared
    balancer.backward(losses)
    values = torch.stack(losses).detach()
    length = torch.stack([torch.cat([g.reshape(-1) for g in row]).norm() for row in raw]) / values
    assert_close(balancer.slopes, 1 / (values + 1e-8))
    assert_close(balancer.weights, length.max() / length, rtol=1e-6, atol=0)
    assert not balancer.slopes.requires_grad and not balancer.weights.requires_grad


def test_weights_of_equal_weighting_are_one():
    model = net()
    balancer = Balancer(Log(), Sum(), shared=model.trunk, num_tasks=3)
    balancer.backward(model.losses())
    assert_close(balancer.weights, torch.ones(3, dtype=torch.float64))


# ---------------------------------------------------------------------------------- learned scales


def test_methods_without_learned_scales_have_no_parameters():
    for method in ("EW", "DB-MTL", "loss-only", "gradient-only"):
        assert list(make_balancer(method, shared=net().trunk, num_tasks=3).parameters()) == []


def test_the_means_of_an_epoch_have_the_type_of_the_losses():
    class Noting(Identity):
        def end_epoch(self, means):
            self.means = means

    transform = Noting()
    model = net()
    balancer = Balancer(transform, Sum(), shared=model.trunk, num_tasks=3)
    balancer.backward(model.losses())
    balancer.end_epoch([1, 2, 3])
    assert_close(transform.means, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))


def test_learned_scales_join_an_optimizer():
    model = net()
    balancer = make_balancer("IMTL-L", shared=model.trunk, num_tasks=3)
    sgd = torch.optim.SGD(model.parameters(), 1e-4)
    sgd.add_param_group({"params": balancer.parameters(), "lr": 0.1})
    (s,) = balancer.parameters()
    for seed in range(5):
        before = s.detach().clone()
        losses = model.losses(seed)
        balancer.backward(losses)
        assert_close(
            s.grad,
            (before.exp() * torch.stack(losses).detach() - 1).to(s.dtype),
            rtol=1e-5,
            atol=1e-6,
        )
        sgd.step()
        assert_close(s.detach(), before - 0.1 * s.grad)
        sgd.zero_grad()


def imtl_l(steps, optimize, **options):
    model = net()
    balancer = make_balancer("IMTL-L", shared=model.trunk, num_tasks=3, **options)
    sgd = torch.optim.SGD(optimize(model, balancer), 1e-4)
    for seed in range(steps):
        balancer.backward(model.losses(seed))
        yield balancer
        sgd.step()
        sgd.zero_grad()


def test_scales_that_nobody_moves_are_noticed_in_the_third_backward():
    run = imtl_l(3, lambda model, balancer: model.parameters())
    next(run), next(run)
    with pytest.raises(RuntimeError, match="never moved.*add_param_group"):
        next(run)


def test_three_backward_calls_before_the_first_optimizer_step_are_legal():
    model = net()
    balancer = make_balancer("IMTL-L", shared=model.trunk, num_tasks=3)
    sgd = torch.optim.SGD([*model.parameters(), *balancer.parameters()], 1e-4)
    for turn in range(12):
        balancer.backward(model.losses(turn))
        if turn % 4 == 3:
            sgd.step()
            sgd.zero_grad()


def test_scales_frozen_on_the_way_are_legal():
    for turn, balancer in enumerate(
        imtl_l(7, lambda model, b: [*model.parameters(), *b.parameters()])
    ):
        (s,) = balancer.parameters()
        if turn == 3:
            s.requires_grad_(False)
            s.grad = None
        assert (s.grad is None) == (turn >= 3)


def test_scales_frozen_by_the_user_are_legal():
    def frozen(model, balancer):
        for p in balancer.parameters():
            p.requires_grad_(False)
        return model.parameters()

    for balancer in imtl_l(6, frozen):
        assert next(balancer.parameters()).grad is None


# ------------------------------------------------------------------------------------------- state


def train(model, balancer, seeds, form=list):
    adam = torch.optim.SGD([*model.parameters(), *balancer.parameters()], 1e-3)
    for seed in seeds:
        batches, options = asked(balancer, model, seed, form)
        balancer.backward(*batches, **options)
        adam.step()
        adam.zero_grad()
        balancer.after_step(form(model.losses(seed)))
    return [p.detach().clone() for p in (*model.parameters(), *balancer.parameters())]


def through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.full
@pytest.mark.parametrize("check", ["now", "later", "off"])
@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("carry", [lambda state: state, through_disk], ids=["memory", "disk"])
def test_state_goes_on_in_a_fresh_balancer(method, carry, check):
    make = lambda model: make_balancer(method, shared=model.trunk, num_tasks=3, check=check)  # noqa: E731
    whole = net()
    expected = train(whole, make(whole), range(6))
    model = net()
    first = make(model)
    train(model, first, range(3))
    second = make(model)
    second.load_state_dict(carry(first.state_dict()))
    assert_close(train(model, second, range(3, 6)), expected, rtol=0, atol=0)
    assert int(second.step) == 6


@pytest.mark.parametrize("check", ["now", "later"])
def test_two_balancers_share_no_state_after_loading(check):
    model = net()
    first, second = (DBMTL(shared=model.trunk, num_tasks=3, check=check) for _ in range(2))
    first.backward(model.losses())
    second.load_state_dict(first.state_dict())
    before = str(second.state_dict())
    losses = model.losses()
    losses[1].register_hook(lambda g: g * torch.inf)
    first.backward(losses)
    assert int(first.step) == 2 and first.nonfinite.tolist() == [0, 1, 0]
    assert str(second.state_dict()) == before


@pytest.mark.parametrize("check", ["now", "later"])
def test_a_state_taken_before_is_a_state_to_go_back_to(check):
    model = net()
    balancer = DBMTL(shared=model.trunk, num_tasks=3, check=check)
    balancer.backward(model.losses())
    state = balancer.state_dict()
    before = str(state)
    balancer.backward(model.losses(1))
    first = model.grads()
    assert str(state) == before
    balancer.load_state_dict(state)
    model.zero_grad()
    for p, g in zip(model.parameters(), stepped(), strict=True):
        p.grad = g
    balancer.backward(model.losses(1))
    assert_close(model.grads(), first, rtol=0, atol=0)


def test_state_remembers_the_names_of_the_tasks():
    model, form = net(), FORMS["dict"]
    first, second = (DBMTL(shared=model.trunk, num_tasks=3) for _ in range(2))
    train(model, first, range(2), form)
    second.load_state_dict(through_disk(first.state_dict()))
    with pytest.raises(ValueError, match="missing now: \\['depth'\\], unknown: \\['deep'\\]"):
        second.backward(dict(zip(("deep", *NAMES[1:]), model.losses(), strict=True)))


@pytest.mark.parametrize(
    "key, other",
    [
        ("num_tasks", lambda m: DBMTL(shared=m.trunk, num_tasks=2)),
        ("shapes", lambda m: DBMTL(shared=m.trunk[0], num_tasks=3)),
        ("method", lambda m: DBMTL(shared=m.trunk, num_tasks=3, beta=0.9)),
        ("method", lambda m: make_balancer("EW", shared=m.trunk, num_tasks=3)),
    ],
)
def test_the_state_of_another_balancer_is_refused(key, other):
    model = net()
    state = other(model).state_dict()
    with pytest.raises(ValueError, match=f"state of another balancer: {key} is"):
        DBMTL(shared=model.trunk, num_tasks=3).load_state_dict(state)


# ---------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("form", ["list", "stack", "shape [1]"])
@pytest.mark.parametrize("grads", MODES)
@pytest.mark.parametrize("method", ["EW", "DB-MTL"])
def test_a_step_runs_every_head_backward_once(method, grads, form):
    model, calls = net(), []
    balancer = make_balancer(method, shared=model.trunk, num_tasks=3, grads=grads)
    x = torch.randn(6, 4, dtype=torch.float64)
    for _ in range(2):
        calls.clear()
        z, losses = model.trunk(x), []
        for t, head in enumerate(model.heads):
            y = head(z)
            y.grad_fn.register_hook(lambda *_, t=t: calls.append(t))
            losses.append(y.square().mean() + 0.1)
        balancer.backward({"list": list, **FORMS}[form](losses))
        assert sorted(calls) == [0, 1, 2]


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("grads", MODES)
def test_the_graph_is_gone_after_a_step(grads, method):
    model = net()
    balancer = make_balancer(method, shared=model.trunk, num_tasks=3, grads=grads)
    batches, options = asked(balancer, model)
    balancer.backward(*batches, **options)
    balancer.after_step(model.losses(1))
    before = model.grads()
    with pytest.raises(
        RuntimeError, match="backward through the graph a second time|have already been freed"
    ):
        balancer.backward(*batches, **options)
    assert_close(model.grads(), before, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------- registry


@pytest.mark.parametrize(
    "name, hint",
    [("DBMTL", "DB-MTL"), ("ew", "EW"), ("IMTL-1", "IMTL-L"), ("DB-MLT+log", "DB-MTL")],
)
def test_unknown_methods_get_the_nearest_name(name, hint):
    with pytest.raises(
        ValueError, match=f"unknown method '{name.replace('+', '.')}'; did you mean '{hint}'"
    ):
        make_balancer(name, shared=net().trunk, num_tasks=3)


def test_unknown_hyper_parameters_are_named():
    with pytest.raises(
        ValueError, match="DB-MTL has no hyper-parameter 'betta'; did you mean 'beta'"
    ):
        make_balancer("DB-MTL", shared=net().trunk, num_tasks=3, betta=0.1)


def test_plus_log_is_the_log_transform():
    assert_close(stepped(method="gradient-only+log", steps=3), stepped(method="DB-MTL", steps=3))
    with pytest.raises(ValueError, match="DB-MTL has a loss transform already"):
        make_balancer("DB-MTL+log", shared=net().trunk, num_tasks=3)


@pytest.mark.parametrize(
    "option, value",
    [
        ("num_tasks", 0),
        ("grads", "lop"),
        ("check", "never"),
        ("beta", 1.0),
        ("beta", -0.1),
        ("beta_decay", -1.0),
        ("eps", -1.0),
        ("alpha", "maximum"),
    ],
)
def test_bad_options_are_named_with_their_value(option, value):
    with pytest.raises(ValueError, match=rf"{option}\b.*{value}"):
        DBMTL(**{"shared": net().trunk, "num_tasks": 3, option: value})
