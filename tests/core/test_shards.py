"""Rows and averages in shards: the numbers of whole rows, less traffic, states for any ranks."""

import pytest
import torch
from helpers.methods import BASES, FEATURES, THREE, same
from helpers.ranks import (
    Net,
    agree,
    assert_alike,
    batch,
    make,
    part,
    tensors,
    train,
)
from torch import distributed as dist
from torch import nn

from dbmtl import EMA, Balancer, Log, make_balancer
from dbmtl.core.aggregator import why_not_sharded
from dbmtl.core.ranks import joined_shards, shards

WHOLE = {"GradDrop", "MTAdam", "MoCo", "ExcessMTL"}  # read gradients coordinate by coordinate
SHARDED = [name for name in BASES if name not in WHOLE | FEATURES | THREE]


# without processes


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,), (4, 1, 3)])
def test_shards_are_cut_and_joined(size, shape):
    tensor = torch.randn(shape)
    cut = shards(tensor, size)
    assert cut.shape == (size, -(-tensor.numel() // size))
    assert torch.equal(joined_shards(cut, tensor), tensor)
    assert torch.equal(cut.flatten()[tensor.numel() :], cut.new_zeros(-tensor.numel() % size))


@pytest.mark.parametrize("name", sorted(WHOLE | FEATURES | THREE))
def test_methods_that_need_whole_rows_say_so_by_name(name):
    with pytest.raises(ValueError, match="sync='shard' cannot be had with [A-Za-z]+: it|at level"):
        make_balancer(name, shared=nn.Linear(2, 2), num_tasks=3, sync="shard")
    aggregator = make_balancer(name, shared=nn.Linear(2, 2), num_tasks=3).aggregator
    level = "features" if name in FEATURES else "parameters"
    assert why_not_sharded(aggregator, level)


def test_other_settings_that_do_not_go_together():
    shared = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="sync must be .*'all'.*'shard'"):
        make_balancer("EW", shared=shared, num_tasks=3, sync="shards")
    with pytest.raises(ValueError, match="sync='shard' cannot be had with in_place=True"):
        make_balancer("DB-MTL", shared=shared, num_tasks=3, sync="shard", in_place=True)


@pytest.mark.parametrize("name", SHARDED)
def test_one_rank_is_as_without_to_the_bit(name):
    assert same(train(0, 1, name, 3, sync="shard"), train(0, 1, name, 3))


# the same numbers


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("size", [2, 3])
def test_shards_equal_one_process_on_the_joined_batch(pools, size, name):
    agree(pools(size).run(train, name, sync="shard"), train(0, 1, name))


@pytest.mark.parametrize("name", ["DB-MTL", "gradient-only", "CAGrad", "MGDA", "Nash-MTL", "EW"])
def test_shards_equal_whole_rows(pools, name):
    whole = pools(3).run(train, name)
    assert_alike(pools(3).run(train, name, sync="shard"), whole, 1e-10)


@pytest.mark.parametrize("sync", ["all", "shard"])
def test_noise_is_measured_of_whole_rows(pools, sync):
    options = {"shrinkage": 2.0, "beta": 0.9, "beta_decay": 0.0}
    agree(pools(2).run(train, "DB-MTL", sync=sync, **options), train(0, 1, "DB-MTL", **options))


@pytest.mark.parametrize("name", ["DB-MTL", "CAGrad", "EW", "MetaBalance"])
def test_micro_batches_of_shards(pools, name):
    agree(pools(2).run(train, name, 3, accumulate=True, sync="shard"), train(0, 1, name, 3))


@pytest.mark.parametrize("name", ["DB-MTL", "CAGrad", "GradNorm"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_kept_weights_of_shards(pools, name, accumulate):
    options = {"update_every": 3, "accumulate": accumulate}
    agree(pools(2).run(train, name, sync="shard", **options), train(0, 1, name, **options))


@pytest.mark.parametrize("grads", ["split", "batched"])
def test_every_order_of_passes(pools, grads):
    agree(pools(2).run(train, "DB-MTL", 3, grads=grads, sync="shard"), train(0, 1, "DB-MTL", 3))


def train_with_average(rank, size, kind, sync):
    """Methods that have no average of their own, with one."""
    model = Net()
    made = make(kind, model)
    balancer = Balancer(
        Log(), made.aggregator, shared=model.trunk, num_tasks=3, ema=EMA(), sync=sync
    )
    balancer.with_cosines = True
    seen = []
    for seed in range(4):
        x, y, valid = part(batch(seed), rank, size)
        balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))
        state = tensors(balancer.gathered_state_dict())
        seen.append([model.grads(), state, balancer.norms, balancer.log()])
    return seen


@pytest.mark.parametrize("kind", ["EW", "RLW", "CAGrad", "GradVac", "MetaBalance", "GradNorm"])
def test_averages_of_other_methods_norms_and_cosines(pools, kind):
    agree(pools(2).run(train_with_average, kind, "shard"), train_with_average(0, 1, kind, "all"))


def train_with_more_parameters(rank, size, sync):
    """Later steps reach a layer of `shared` that the first did not, and miss another one."""
    model = Net()
    shared = [*model.trunk.parameters(), *model.spare.parameters()]
    balancer = make_balancer("DB-MTL", shared=shared, num_tasks=3, sync=sync)
    seen = []
    for seed in range(4):
        x, y, valid = part(batch(seed), rank, size)
        z = model.features(x)
        if seed in (1, 2):
            z = z + model.spare(x)
        losses = model.losses(z, y, valid)
        balancer.backward(losses, size=valid.sum(1))
        seen.append([model.grads(), tensors(balancer.gathered_state_dict())])
        for p in model.parameters():
            p.grad = None
    return seen


def test_a_parameter_keeps_its_shard_when_others_are_moved(pools):
    one = train_with_more_parameters(0, 1, "all")
    agree(pools(3).run(train_with_more_parameters, "shard"), one)
    assert one[0][0][10] is None and one[-1][0][10] is not None  # reached once, then remembered


def train_missing(rank, size, sync):
    model = Net()
    balancer = make("DB-MTL", model, missing="skip", sync=sync)
    seen = []
    for seed in range(3):
        x, y, valid = part(batch(seed), rank, size)
        losses = model.losses(model.features(x), y, valid)
        if seed != 1:
            losses[2] = None
        balancer.backward(
            losses, size=[n * (seed == 1 or t < 2) for t, n in enumerate(valid.sum(1))]
        )
        seen.append([model.grads(), tensors(balancer.gathered_state_dict())])
    return seen


def test_missing_tasks(pools):
    agree(pools(2).run(train_missing, "shard"), train_missing(0, 1, "all"))


def in_dtype(rank, size, dtype, sync):
    model = Net().to(dtype)
    balancer = make("DB-MTL", model, sync=sync)
    for seed in range(2):
        x, y, valid = part(batch(seed), rank, size)
        z = model.features(x.to(dtype))
        balancer.backward(model.losses(z, y.to(dtype), valid), size=valid.sum(1))
    state = balancer.gathered_state_dict()
    return model.grads(), [average.dtype for average in state["ema"][0].values()]


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_other_dtypes(pools, dtype, rtol):
    first, second = pools(2).run(in_dtype, dtype, "shard")
    assert same(first, second)
    one, dtypes = in_dtype(0, 1, dtype, "all")
    assert first[1] == dtypes
    for a, b in zip(first[0], one, strict=True):
        if a is not None:
            assert a.dtype == dtype
            assert (a - b).float().norm() < rtol * b.float().norm()


def scaled(rank, size, sync):
    model = Net()
    balancer = make("CAGrad", model, sync=sync)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for seed in range(2):
        x, y, valid = part(batch(seed), rank, size)
        losses = model.losses(model.features(x), y, valid)
        balancer.backward(losses, size=valid.sum(1), scaler=scaler)
    return model.grads(), tensors(balancer.gathered_state_dict())


def test_a_scaler(pools):
    agree(pools(2).run(scaled, "shard"), scaled(0, 1, "all"))


def infinite(rank, size):
    """In the second step one rank's gradient overflows."""
    model = Net()
    balancer = make("DB-MTL", model, sync="shard")
    states = []
    for seed in range(3):
        x, y, valid = part(batch(seed), rank, size)
        losses = model.losses(model.features(x), y, valid)
        if seed == 1 and rank == 1:
            losses[1] = losses[1] * 1.0
            losses[1].register_hook(lambda gradient: gradient * float("inf"))
        balancer.backward(losses, size=valid.sum(1))
        states.append(tensors(balancer.gathered_state_dict()))
    return states


def test_a_gradient_that_is_not_finite_leaves_every_shard_of_its_average(pools):
    ranks = pools(2).run(infinite)
    for first, second, third in ranks:
        assert same(second["ema"]["1"], first["ema"]["1"])
        assert not same(second["ema"]["0"], first["ema"]["0"])
        assert third["nonfinite"].tolist() == [0, 1, 0]
    assert same(*ranks)


# what is sent and kept


def numbers_of_a_step(rank, size, sync, tasks):
    """Numbers of the large buffers of a step by collective, and those of the averages."""
    torch.manual_seed(0)
    trunk = nn.Linear(30, 40)
    balancer = make_balancer("DB-MTL", shared=trunk, num_tasks=tasks, sync=sync)
    sent = {}
    plain = {}

    def counting(name, place):
        def call(*given, **options):
            buffer = given[place]
            if buffer.numel() > 256:  # no exchange
                sent[name] = sent.get(name, 0) + buffer.numel()
            return plain[name](*given, **options)

        return call

    for name, place in {"all_reduce": 0, "all_to_all_single": 1, "all_gather": 1}.items():
        plain[name] = getattr(dist, name)
        setattr(dist, name, counting(name, place))
    try:
        z = trunk(torch.ones(2, 30))
        balancer.backward([(z - t).square().mean() for t in range(tasks)])
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
    kept = sum(average.numel() for row in balancer.ema.rows.values() for average in row.values())
    return sent, kept, sum(p.numel() for p in trunk.parameters())


@pytest.mark.parametrize("tasks", [2, 5])
def test_traffic_and_memory(pools, tasks):
    """Each number of an all-reduce counts twice (W - 1) / W, of an exchange once."""
    [(sent, kept, size), _] = pools(2).run(numbers_of_a_step, "all", tasks)
    assert kept == tasks * size
    whole = 2 * 0.5 * sent["all_reduce"]
    [(sent, kept, size), _] = pools(2).run(numbers_of_a_step, "shard", tasks)
    assert kept == tasks * size / 2
    assert set(sent) == {"all_to_all_single", "all_gather"}
    sharded = 0.5 * sent["all_to_all_single"] + 1 * sent["all_gather"]
    assert sharded / whole == pytest.approx((tasks + 1) / (2 * tasks), rel=0.01)


# errors: on all ranks or on none


def spoiled(rank, size, what):
    """A good step, one that goes wrong on rank 1 alone, and a good one again."""
    model = Net()
    balancer = make("DB-MTL", model, sync="shard")
    told = None
    for seed in range(3):
        x, y, valid = part(batch(seed), rank, size)
        losses = model.losses(model.features(x), y, valid)
        if seed == 1 and rank == 1 and what == "loss":
            losses[1] = losses[1] * float("nan")
        if seed == 1 and rank == 1 and what == "pass":
            losses[1] = losses[1] * 1.0
            losses[1].register_hook(fail)
        forward = balancer.aggregator.forward
        if seed == 1 and rank == 1 and what == "method":
            balancer.aggregator.forward = fail
        before = [model.grads(), tensors(balancer.gathered_state_dict())]
        try:
            balancer.backward(losses, size=valid.sum(1))
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            assert same([model.grads(), tensors(balancer.gathered_state_dict())], before)
        balancer.aggregator.forward = forward
    return told, model.grads(), tensors(balancer.gathered_state_dict())


def fail(*given):
    raise MemoryError("in the middle of it")


SPOILED = {
    "loss": "the loss of task 1 is nan",
    "pass": "in the middle of it",
    "method": "in the middle of it",
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_bad_on_one_rank_raises_on_all_and_changes_nothing(pools, what):
    answers = pools(2).run(spoiled, what)
    for told, _, state in answers:
        assert SPOILED[what] in told and state["step"] == 2
    assert same(answers[0][1:], answers[1][1:])


def unlike_modes(rank, size):
    model = Net()
    balancer = make("DB-MTL", model, sync="shard" if rank else "all")
    x, y, valid = part(batch(0), rank, size)
    balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))


def cosines_on_one_rank(rank, size):
    model = Net()
    balancer = make("DB-MTL", model, sync="shard")
    balancer.with_cosines = rank == 0
    x, y, valid = part(batch(0), rank, size)
    balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))


def gathered_on_one_rank(rank, size):
    model = Net()
    balancer = make("DB-MTL", model, sync="shard")
    for _ in range(2):
        x, y, valid = part(batch(0), rank, size)
        balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))
        if rank == 0:
            balancer.gathered_state_dict()


def state_of_a_part(rank, size):
    model = Net()
    balancer = make("DB-MTL", model, sync="shard")
    assert balancer.state_dict()["ema"] == {}  # nothing is cut yet
    assert "each of 2 ranks keeps 1/2" in balancer.describe()
    assert "sync='shard'" in repr(balancer)
    x, y, valid = part(batch(0), rank, size)
    balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))
    balancer.state_dict()


ALIKE = {
    unlike_modes: "sync is shard, there all",
    cosines_on_one_rank: "not at the same place",
    gathered_on_one_rank: "not at the same place",
    state_of_a_part: "let all ranks call gathered_state_dict()",
}


@pytest.mark.parametrize("function", ALIKE, ids=lambda function: function.__name__)
def test_errors_are_alike_on_all_ranks(pools, function):
    for _, error in pools(2).answers_of(function):
        assert ALIKE[function] in error


# states


def resumed(rank, size, state, sync, steps=2):
    model = Net()
    balancer = make("DB-MTL", model, sync=sync)
    if state is not None:
        balancer.load_state_dict(state)
    assert state is None or same(tensors(balancer.gathered_state_dict()), tensors(state))
    for seed in range(steps):
        x, y, valid = part(batch(seed), rank, size)
        balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))
    return model.grads(), balancer.gathered_state_dict()


def test_a_gathered_state_goes_on_on_any_number_of_ranks(pools):
    (_, state), (_, other) = pools(2).run(resumed, None, "shard")
    assert same(tensors(state), tensors(other))
    _, unsharded = resumed(0, 1, None, "all")
    assert_alike(tensors(state), tensors(unsharded), 1e-10)
    grads, after = resumed(0, 1, state, "all")
    runs = [[resumed(0, 1, state, "shard")]]
    runs += [pools(3).run(resumed, state, sync) for sync in ("shard", "all")]
    runs += [pools(2).run(resumed, state, "shard")]
    for ranks in runs:
        for rank in ranks:
            assert_alike(rank[0], grads, 1e-10)
            assert_alike(tensors(rank[1]), tensors(after), 1e-10)


def with_another_group(rank, size):
    """A balancer of three ranks whose group is changed under it."""
    model = Net()
    balancer = make("DB-MTL", model, sync="shard")

    def step(rank, size):
        x, y, valid = part(batch(0), rank, size)
        balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))

    step(rank, size)
    state = balancer.gathered_state_dict()
    balancer.ranks.group = False
    told = None
    try:
        step(0, 1)
    except RuntimeError as error:
        told = str(error)
    balancer.reset_averages()
    step(0, 1)
    balancer.load_state_dict(state)
    step(0, 1)
    return told, model.grads(), tensors(balancer.state_dict())


def test_shards_of_another_number_of_ranks_are_refused(pools):
    ranks = pools(3).run(with_another_group)
    for told, _, _ in ranks:
        assert "a shard for 3 ranks, and there are 1 now" in told
    assert same(ranks[0][1:], ranks[1][1:])


def started_alone(rank, size):
    """Averages that were made by every process alone are cut when the ranks meet."""
    model = Net()
    balancer = make("DB-MTL", model, sync="shard")
    group = balancer.ranks.group
    balancer.ranks.group = False
    for seed, place in ((0, (0, 1)), (1, (rank, size))):
        x, y, valid = part(batch(seed), *place)
        balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))
        balancer.ranks.group = group
    return model.grads(), tensors(balancer.gathered_state_dict())


def test_averages_that_a_process_made_alone(pools):
    agree(pools(2).run(started_alone), started_alone(0, 1))
