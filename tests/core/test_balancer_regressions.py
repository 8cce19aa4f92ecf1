"""One test for each fault that a review found in the balancer, so that none comes back."""

import copy

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
    Transform,
    make_balancer,
)
from dbmtl.core.aggregator import GradientAggregator, LossWeighting, NormAggregator
from dbmtl.profile import anatomy


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"trunk": nn.Linear(3, 4), "a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})


def losses_of(model, rows=slice(None)):
    z = model["trunk"](torch.linspace(-1, 1, 15).view(5, 3)[rows]).tanh()
    return {name: (model[name](z) - 1).square().mean() for name in "ab"}


def test_accumulate_does_not_scale_the_pass_by_the_count():
    """A count of a hundred thousand pixels times a scale of 65536 has no place in float16."""
    model, seen = net(), []
    losses = losses_of(model)
    losses["a"].register_hook(lambda g: seen.append(g.item()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    balancer = DBMTL(shared=model["trunk"], num_tasks=2)
    balancer.accumulate(losses, 1e5, scaler=scaler)
    assert seen == [2.0**10]


def test_accumulate_with_a_task_left_out_names_the_right_task():
    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=2)
    losses = losses_of(model)
    with pytest.raises(ValueError, match="loss 'b' does not require grad"):
        balancer.accumulate({"a": losses["a"], "b": losses["b"].detach()}, {"a": 0, "b": 3})


def test_a_first_step_that_is_refused_leaves_no_description():
    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=2)
    before = balancer.describe()
    losses = losses_of(model)
    with pytest.raises(FloatingPointError, match="task 'b'"):
        balancer.backward({"a": losses["a"], "b": losses["b"] * float("nan")})
    assert balancer.describe() == before and "known after" in before


class Refusing(NormAggregator):
    def forward(self, norms, losses):
        raise RuntimeError("did not converge")


def test_an_aggregator_that_raises_leaves_the_average_alone():
    """Without saying anything about itself: an aggregator is taken to be able to fail."""
    model = net()
    balancer = Balancer(Log(), MaxNorm(), shared=model["trunk"], num_tasks=2, ema=EMA())
    balancer.backward(losses_of(model))
    before = copy.deepcopy(balancer.ema.rows)
    balancer.aggregator = Refusing()
    with pytest.raises(RuntimeError, match="did not converge"):
        balancer.backward(losses_of(model))
    assert_close(balancer.ema.rows, before, rtol=0, atol=0)
    assert balancer.step == 1


class HalfUsed(Transform):
    def __init__(self):
        super().__init__()
        self.used = nn.Parameter(torch.ones(2))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, losses):
        return self.used * losses


def test_a_learned_scale_that_is_not_used_gets_a_zero_gradient():
    model = net()
    balancer = Balancer(HalfUsed(), Sum(), shared=model["trunk"], num_tasks=2)
    balancer.backward(losses_of(model))
    assert_close(balancer.transform.unused.grad, torch.zeros(2))
    assert balancer.transform.used.grad.abs().min() > 0


def test_a_state_does_not_depend_on_how_a_number_was_written():
    model = net()
    state = DBMTL(shared=model["trunk"], num_tasks=2, beta=0.5, beta_decay=0).state_dict()
    DBMTL(shared=model["trunk"], num_tasks=2, beta=0.5, beta_decay=0.0).load_state_dict(state)
    make_balancer("DB-MTL", shared=model["trunk"], num_tasks=2, beta_decay=0).load_state_dict(state)


def test_micro_batches_can_be_dropped():
    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=2)
    balancer.accumulate(losses_of(model, slice(0, 2)), 2)
    balancer.discard()
    balancer.backward(losses_of(model))
    plain = net()
    DBMTL(shared=plain["trunk"], num_tasks=2).backward(losses_of(plain))
    assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_sizes_follow_the_order_of_the_losses_they_came_with():
    grads = []
    for order in ("ab", "ba"):
        model = net()
        balancer = Balancer(Identity(), MaxNorm(), shared=model["trunk"], num_tasks=2)
        for rows, sizes in ((slice(0, 1), {"a": 1, "b": 4}), (slice(1, 5), {"a": 4, "b": 1})):
            losses = losses_of(model, rows)
            first_is_ab = order if balancer.step == 0 and balancer._micro_batches else "ab"
            balancer.accumulate(
                {n: losses[n] for n in first_is_ab}, [sizes[n] for n in first_is_ab]
            )
        balancer.backward()
        grads.append([p.grad for p in model.parameters()])
    assert_close(*grads)


@pytest.mark.parametrize(
    "shared, message", [("tensor", "one tensor"), ("names", "must hold parameters, got tuple")]
)
def test_what_is_no_list_of_parameters_is_refused(shared, message):
    model = net()
    given = model["trunk"].weight if shared == "tensor" else model["trunk"].named_parameters()
    with pytest.raises(TypeError, match=message):
        DBMTL(shared=given, num_tasks=2)


def test_sparse_gradients_are_refused_in_words():
    trunk = nn.Embedding(5, 3, sparse=True)
    z = trunk(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="sparse"):
        DBMTL(shared=trunk, num_tasks=2).backward([z.square().sum(), z.abs().sum()])


@pytest.mark.filterwarnings("error")
def test_an_input_that_asks_for_gradients_is_no_forgotten_layer():
    model = net()
    x = torch.ones(2, 3, requires_grad=True)
    z = model["trunk"](x)
    DBMTL(shared=model["trunk"], num_tasks=2).backward([model[n](z).square().sum() for n in "ab"])
    assert x.grad is not None


def test_describe_tells_of_a_whole_model_given_as_shared():
    model = net()
    balancer = DBMTL(shared=model, num_tasks=2)
    with pytest.warns(UserWarning, match="the whole network was given"):
        balancer.backward(losses_of(model))
    assert "in shared, but reached by a alone: 2 tensors, 5 parameters" in balancer.describe()


@pytest.mark.parametrize("number", ["2", 2.0, 0, -1])
def test_num_tasks_is_a_whole_number_from_one(number):
    with pytest.raises(ValueError, match="num_tasks must be a whole number from 1, got"):
        DBMTL(shared=net()["trunk"], num_tasks=number)


def test_an_empty_state_is_refused_in_words():
    with pytest.raises(ValueError, match="the state of a balancer lacks .'num_tasks', 'shapes'"):
        DBMTL(shared=net()["trunk"], num_tasks=2).load_state_dict({})


def test_describe_counts_tasks_and_not_commas():
    model = net()
    balancer = DBMTL(shared=model, num_tasks=2)
    losses = losses_of(model)
    with pytest.warns(UserWarning, match="the whole network was given"):
        balancer.backward({"depth, in meters": losses["a"], "b": losses["b"]})
    assert (
        "in shared, but reached by depth, in meters alone: 2 tensors, 5 parameters"
        in balancer.describe()
    )


# --------------------------------------------------------------- found when all methods were added


def test_a_step_inside_autocast_is_the_step_outside():
    plain = net()
    cast = net()
    for model, enabled in ((plain, False), (cast, True)):
        balancer = make_balancer("MGDA", shared=model["trunk"], num_tasks=2)
        losses = {name: 1e4 * loss for name, loss in losses_of(model).items()}
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            balancer.backward(losses)
        assert balancer.weights.isfinite().all() and balancer.nonfinite.tolist() == [0, 0]
    assert_close(
        [p.grad for p in cast.parameters()], [p.grad for p in plain.parameters()], rtol=0, atol=0
    )


def test_what_is_held_of_half_precision_gradients_does_not_overflow():
    whole = net().half()
    pieces = net().half()
    x = torch.linspace(-1, 1, 15).view(5, 3).half()

    def losses(model):
        z = model["trunk"](x).tanh()
        return {name: (model[name](z).float() - 1).square().mean() for name in "ab"}

    make_balancer("EW", shared=whole["trunk"], num_tasks=2).backward(losses(whole))
    balancer = make_balancer("EW", shared=pieces["trunk"], num_tasks=2)
    balancer.accumulate(losses(pieces), 1e6)
    balancer.backward()
    assert_close(
        [p.grad for p in pieces.parameters()],
        [p.grad for p in whole.parameters()],
        rtol=2e-3,
        atol=2e-3,
    )


class Pair(LossWeighting):
    def forward(self, need, losses):
        return torch.ones_like(losses), torch.tensor([5.0, 7.0])


def test_weights_of_the_heads_alone_are_not_dropped_silently():
    model = net()
    with pytest.raises(ValueError, match="no weights of their own"):
        Balancer(Identity(), Pair(), shared=model["trunk"], num_tasks=2).backward(losses_of(model))
    assert all(p.grad is None for p in model.parameters())


def test_a_saved_state_does_not_follow_the_learned_scales():
    model = net()
    balancer = make_balancer("UW", shared=model["trunk"], num_tasks=2)
    optimizer = torch.optim.SGD([*model.parameters(), *balancer.parameters()], lr=0.1)
    state = balancer.state_dict()
    before = copy.deepcopy(state["transform"])
    balancer.backward(losses_of(model))
    optimizer.step()
    assert_close(state["transform"]["s"], before["s"], rtol=0, atol=0)


class FirstRow(GradientAggregator):
    max_norm = 0.01

    def forward(self, rows, losses, where):
        return rows[0]


def test_a_direction_that_is_a_row_shares_no_memory_with_the_average():
    model = net()
    balancer = Balancer(Identity(), FirstRow(), shared=model["trunk"], num_tasks=2, ema=EMA())
    balancer.backward(losses_of(model))
    before = copy.deepcopy(balancer.ema.rows)
    assert torch.cat([p.grad.flatten() for p in model["trunk"].parameters()]).norm() < 0.0101
    model.zero_grad(set_to_none=False)
    assert_close(balancer.ema.rows, before, rtol=0, atol=0)


def test_the_average_of_bfloat16_gradients_is_kept_in_float32():
    theta = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    ema = EMA(0.99, 0)
    balancer = Balancer(Identity(), Sum(), shared=[theta], num_tasks=1, ema=ema)
    for _ in range(1500):
        theta.grad = None
        balancer.backward([theta.float().sum()])
    assert_close(ema.rows[0][0], torch.ones(2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e24])
@pytest.mark.parametrize("method", ["MGDA", "CAGrad", "Nash-MTL", "IMTL-G", "Aligned-MTL"])
def test_gramians_of_tiny_and_huge_float32_gradients(method, scale):
    directions = []
    for factor in (1.0, scale):
        theta = nn.Parameter(torch.zeros(3))
        a = torch.tensor([1.0, 2.0, 0.5]) * factor
        b = torch.tensor([-1.0, 0.3, 1.0]) * factor
        balancer = make_balancer(method, shared=[theta], num_tasks=2)
        balancer.backward([(a * theta).sum() + 1, (b * theta).sum() + 1])
        g = theta.grad.double()
        directions.append(g / g.norm())
    assert_close(directions[1], directions[0], rtol=1e-4, atol=1e-5)


def test_micro_batches_that_never_hold_all_tasks_tell_the_partition_and_warn():
    model = net()
    balancer = DBMTL(shared=[model["trunk"].weight], num_tasks=2)
    balancer.accumulate(losses_of(model), {"a": 5, "b": 0})
    with pytest.warns(UserWarning, match="1 trainable tensors outside"):
        balancer.accumulate(losses_of(model), {"a": 0, "b": 5})
    balancer.backward()
    for part in (
        "reached by a: 2 tensors",
        "reached by b: 2 tensors",
        "reached by a, b: 1 tensors",
    ):
        assert part in balancer.describe()


@pytest.mark.parametrize("method", ["PCGrad", "GradDrop", "MoCo"])
def test_a_state_that_cannot_be_loaded_changes_nothing(method):
    model = net()
    first, second = (make_balancer(method, shared=model["trunk"], num_tasks=2) for _ in range(2))
    first.backward(losses_of(model))
    state = first.state_dict()
    state["aggregator"] = {}
    before = str(second.state_dict())
    with pytest.raises(ValueError, match="aggregator in the state"):
        second.load_state_dict(state)
    assert str(second.state_dict()) == before and second.step == 0


def test_loading_drops_what_was_held():
    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=2)
    balancer.backward(losses_of(model))
    state = balancer.state_dict()
    balancer.accumulate(losses_of(model), 1)
    balancer.load_state_dict(state)
    balancer.backward(losses_of(model))
    assert balancer.step == 2


def test_frozen_scores_of_gradnorm_are_no_error():
    model = net()
    balancer = make_balancer("GradNorm", shared=model["trunk"], num_tasks=2)
    for p in balancer.parameters():
        p.requires_grad_(False)
    balancer.backward(losses_of(model))
    assert balancer.step == 1


def test_verify_before_the_first_good_step_names_the_tasks_by_number():
    model = net()
    balancer = Balancer(Identity(), Refusing(), shared=model["trunk"], num_tasks=2, check="later")
    losses = losses_of(model)
    with pytest.raises(RuntimeError, match="did not converge"):
        balancer.backward([losses["a"] * float("nan"), losses["b"]])
    with pytest.raises(FloatingPointError, match=r"\[0\]"):
        balancer.verify()


def test_counting_draws_no_random_numbers():
    before = torch.get_rng_state()
    anatomy(lambda **options: make_balancer("EW", **options))
    assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["DB-MTL", "gradient-only"])
def test_an_average_is_kept_on_a_device_that_the_host_must_not_read(name):
    """The branch of accelerators, on a device without numbers: the first step used to be a
    TypeError."""
    trunk = torch.nn.Linear(4, 3, device="meta")
    heads = [torch.nn.Linear(3, 1, device="meta") for _ in range(2)]
    balancer = make_balancer(name, shared=trunk, num_tasks=2, check="later")
    for _ in range(2):
        z = trunk(torch.empty(5, 4, device="meta"))
        balancer.backward([head(z).square().mean() for head in heads])
    assert trunk.weight.grad.device.type == "meta" and trunk.weight.grad.shape == (3, 4)
