"""IGBv2: timetable and rewards by hand, its agent by plain torch modules, a bandit to learn."""

import copy
import io

import pytest
import torch
from helpers.methods import same
from torch import nn
from torch.testing import assert_close

from dbmtl.core.balancer import Balancer
from dbmtl.core.transform import slopes
from dbmtl.gradient_balancing.sum import Sum
from dbmtl.loss_balancing.igb import IGBv2, SoftActorCritic, run_network, weight_policy

SMALL = dict(
    window=5, random_epochs=4, update_every=4, updates=2, batch=16, hidden=(8,), capacity=30
)


def some_losses(steps, num_tasks=2, seed=0):
    return 0.2 + torch.rand(steps, num_tasks, generator=torch.Generator().manual_seed(seed))


def feed(igb, losses):
    """The weights that each row of losses gets."""
    weights = []
    for row in losses:
        weights.append(slopes(igb, row)[0] * row)
        igb.advance(row)
    return torch.stack(weights)


# ------------------------------------------------------------ weights and slopes


@pytest.mark.parametrize("num_tasks", [1, 2, 11])
@pytest.mark.parametrize("random_epochs", [0, 5])
def test_igb_weights_are_positive_with_sum_t(num_tasks, random_epochs):
    weights = feed(
        IGBv2(num_tasks, random_epochs=random_epochs, seed=0), some_losses(10, num_tasks)
    )
    assert (weights > 0).all()
    assert_close(weights.sum(1), torch.full((10,), float(num_tasks)))


@pytest.mark.filterwarnings("ignore:IGBv2 waits for the end of an epoch")
@pytest.mark.full
def test_igb_random_weights_are_a_softmax_of_standard_normals():
    igb = IGBv2(2, seed=3)
    weights = feed(igb, torch.ones(4000, 2).double()) / 2
    difference = torch.logit(weights[:, 1])  # of two standard normal numbers
    assert abs(difference.mean()) < 4 * (2 / 4000) ** 0.5
    assert difference.std().item() == pytest.approx(2**0.5, rel=0.05)


@pytest.mark.parametrize("random_epochs", [0, 5])
def test_igb_slopes_are_weights_over_losses(random_epochs):
    igb = IGBv2(3, random_epochs=random_epochs, seed=0)
    losses = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    slope, learned = slopes(igb, losses)
    assert learned == [] and list(igb.parameters()) == []
    assert_close(slope, igb.weights(losses) / losses)
    assert_close(igb(losses), igb.weights(losses) * losses.log())


def test_igb_random_weights_follow_a_permutation_of_the_tasks():
    igb = IGBv2(4, seed=0)
    order = torch.tensor([2, 0, 3, 1])
    other = copy.deepcopy(igb)
    other.memory["noise"] = igb.memory["noise"][order]
    losses = some_losses(1, 4)[0]
    assert_close(other(losses[order]), igb(losses)[order])


@pytest.mark.parametrize("random_epochs", [0, 5])
def test_igb_forward_changes_nothing(random_epochs):
    igb = IGBv2(2, random_epochs=random_epochs, seed=0)
    losses = torch.tensor([0.5, 2.0])
    before = copy.deepcopy(igb.state_dict())
    assert_close(igb(losses), igb(losses), rtol=0, atol=0)
    assert same(before, igb.state_dict())


def test_igb_float32_and_float64_losses_agree():
    single, double = (IGBv2(3, random_epochs=0, window=2, seed=0) for _ in range(2))
    losses = some_losses(9, 3)
    assert_close(feed(single, losses).double(), feed(double, losses.double()), rtol=1e-5, atol=1e-6)


def test_bounded_weights_differ_by_e_squared_at_most():
    output = 40 * torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    bounded, density = weight_policy(output, torch.zeros(500, 4))
    free, same_density = weight_policy(output, torch.zeros(500, 4), bounded=False)
    assert (bounded.amax(1) / bounded.amin(1)).max() <= 7.3891 * (1 + 1e-5)
    assert free.max() / 4 > 0.999
    assert_close(density, same_density)
    assert density.isfinite().all()


# ------------------------------------------------------------ timetable and rewards


@pytest.mark.parametrize("means", [None, torch.tensor([3.0, 5.0])])
def test_igb_base_losses_are_the_means_of_epoch_one(means):
    igb = IGBv2(2, seed=0)
    losses = some_losses(9)
    for epoch in range(3):
        assert igb.memory["base"] is None or epoch == 2
        assert igb.agent.filled == 0
        feed(igb, losses[3 * epoch : 3 * epoch + 2])
        if epoch < 2:
            igb.end_epoch(means if epoch == 1 else None)
    expected = losses[3:5].double().mean(0) if means is None else means.double()
    assert_close(igb.memory["base"], expected)
    assert igb.agent.filled == 2  # each of the two steps of epoch 2 ends a transition
    igb.end_epoch(torch.tensor([9.0, 9.0]))
    assert_close(igb.memory["base"], expected)


def test_igb_transitions_by_hand():
    igb = IGBv2(2, window=2, seed=0)
    losses = some_losses(9)
    weights = feed(igb, losses)
    base = losses[2:4].mean(0)
    assert igb.agent.filled == 5
    for i, row in enumerate(igb.agent.memory["replay"][:5]):
        reward = min((losses[i + 3, t] - losses[i + 4, t]) / base[t] for t in range(2))
        assert_close(row, torch.cat([losses[i + 3], weights[i + 3], reward[None], losses[i + 4]]))


def test_igb_lr_ratio_multiplies_the_reward_and_is_saved():
    plain, lowered, told = (IGBv2(2, window=2, seed=0) for _ in range(3))
    losses = some_losses(9)
    lowered.lr_ratio = 4
    told.set_learning_rate_ratio(4)
    for igb in (plain, lowered, told):
        feed(igb, losses)
    assert_close(lowered.agent.memory["replay"][:5, 4], 4 * plain.agent.memory["replay"][:5, 4])
    assert torch.equal(told.agent.memory["replay"], lowered.agent.memory["replay"])
    plain.load_state_dict(lowered.state_dict())
    assert plain.lr_ratio == 4.0


def test_igb_learns_when_and_as_much_as_it_should(monkeypatch):
    igb = IGBv2(1, window=10, update_every=5, capacity=40, seed=0)
    log = []
    monkeypatch.setattr(igb.agent, "learn", log.append)
    for step in range(70):
        log.clear()
        igb.advance(torch.ones(1) + 0.1 * (step % 3))
        k = 1 + min(max(step - 19, 0), 40) / 40  # stored from epoch 2 on, by forty steps full
        due = step >= 30 and (step + 1) % 5 == 0
        assert log == ([int(128 * k)] * int(25 * k) if due else [])
    assert log == [256] * 50


def test_igb_is_random_before_epoch_five_and_the_agents_from_then_on():
    igb = IGBv2(2, window=1, seed=0)
    for epoch, row in enumerate(some_losses(8)):
        noise = igb.memory["noise"]
        chosen = 2 * noise.softmax(0) if epoch < 5 else igb.agent.choose(row, noise)
        assert_close(igb.weights(row), chosen, rtol=0, atol=0)
        igb.advance(row)


def test_igb_names_a_forgotten_end_epoch_and_needs_none_once_it_is_trained():
    igb = IGBv2(1, longest=3, seed=0)
    feed(igb, torch.ones(4, 1))
    with pytest.raises(RuntimeError, match=r"IGBv2.*end_epoch.*window"):
        igb(torch.ones(1))
    trained = IGBv2(1, longest=3, seed=0)
    for _ in range(5):
        feed(trained, torch.ones(2, 1))
        trained.end_epoch(None)
    feed(trained, torch.ones(9, 1))


# ------------------------------------------------------------ the agent


def module(network, sizes):
    layers = []
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layer = nn.Linear(inputs, outputs)
        layer.weight.data = network[2 * i].T.clone()
        layer.bias.data = network[2 * i + 1].flatten().clone()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def assert_networks(agent, name, modules):
    for i, expected in enumerate(modules):
        ours = [p[i] if len(modules) > 1 else p for p in agent.memory[name]]
        for p, q in zip(ours, expected.parameters(), strict=False):
            assert_close(p.T.squeeze(), q.detach().squeeze(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bounded", [True, False])
def test_updates_equal_a_plain_soft_actor_critic(bounded):
    """The textbook's five lines by torch's modules, on the agent's random numbers."""
    agent = SoftActorCritic(
        2, hidden=(6, 5), lr=1e-2, tau=0.1, bounded=bounded, capacity=50, seed=0
    ).double()
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        losses, after, z = torch.rand(3, 2, generator=generator)
        agent.store(losses, 2 * z.softmax(0), torch.rand(1, generator=generator), after)
    kept = agent.memory
    actor = module(kept["policy"], [2, 6, 5, 4])
    critics = [module([p[i] for p in kept["critics"]], [4, 6, 5, 1]) for i in range(2)]
    slow = copy.deepcopy(critics)
    log_alpha = kept["policy"][-1].clone().requires_grad_()
    both = [p for critic in critics for p in critic.parameters()]
    steps = [torch.optim.Adam(p, lr=1e-2) for p in (actor.parameters(), both, [log_alpha])]
    stream = torch.Generator().set_state(agent.generator().get_state())

    def act(losses, noise):
        mean, log_std = actor(losses).chunk(2, 1)
        u = mean + log_std.exp() * noise
        density = (
            torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - (1 - u.tanh() ** 2).log()
        )
        return 2 * (u.tanh() if bounded else u).softmax(1), density.sum(1, keepdim=True)

    for _ in range(5):
        agent.learn(16)
        batch = kept["replay"][torch.randint(20, (16,), generator=stream)]
        losses, weights, reward, after = batch[:, :2], batch[:, 2:4], batch[:, 4:5], batch[:, 5:]
        noise = [torch.randn(16, 2, generator=stream, dtype=torch.float64) for _ in range(2)]
        with torch.no_grad():
            chosen, density = act(after, noise[0])
            future = (
                torch.minimum(*(q(torch.cat([after, chosen], 1)) for q in slow))
                - log_alpha.exp() * density
            )
        error = sum(
            ((q(torch.cat([losses, weights], 1)) - reward - 0.99 * future) ** 2).mean()
            for q in critics
        )
        steps[1].zero_grad()
        error.backward()
        steps[1].step()
        chosen, density = act(losses, noise[1])
        value = torch.minimum(*(q(torch.cat([losses, chosen], 1)) for q in critics))
        steps[0].zero_grad()
        (log_alpha.exp().detach() * density - value).mean().backward()
        steps[0].step()
        steps[2].zero_grad()
        (-log_alpha * (density.detach() - 2).mean()).backward()  # target entropy -2
        steps[2].step()
        with torch.no_grad():
            for old, new in zip(slow, critics, strict=True):
                for p, q in zip(old.parameters(), new.parameters(), strict=True):
                    p.mul_(0.9).add_(0.1 * q)
    assert_networks(agent, "policy", [actor])
    assert_networks(agent, "critics", critics)
    assert_networks(agent, "slow", slow)
    assert_close(kept["policy"][-1], log_alpha.detach(), rtol=1e-10, atol=0)


@pytest.mark.full
def test_the_temperature_brings_the_entropy_to_minus_t():
    agent = SoftActorCritic(2, hidden=(16,), gamma=0.0, lr=1e-2, seed=0)
    for weights in feed(IGBv2(2, seed=0), torch.ones(100, 2)):
        agent.store(torch.ones(2), weights, weights[1:], torch.ones(2))
    for _ in range(600):
        agent.learn(64)
    output = run_network(agent.memory["policy"][:-1], torch.ones(4000, 2))
    entropy = -weight_policy(
        output, torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    )[1].mean()
    assert entropy.item() == pytest.approx(-2, abs=0.4)
    fixed = SoftActorCritic(2, automatic=False, hidden=(4,), seed=0)
    fixed.store(torch.ones(2), torch.ones(2), torch.zeros(1), torch.ones(2))
    fixed.learn(4)
    assert_close(fixed.memory["policy"][-1].exp(), torch.tensor(0.2))


def test_an_empty_buffer_teaches_nothing():
    agent = SoftActorCritic(2, seed=0)
    before = copy.deepcopy(agent.state_dict())
    agent.learn(8)
    assert same(before, agent.state_dict())


# ------------------------------------------------------------ it learns


def play(seed, steps=600, **changes):
    """The mean share, in the last hundred steps, of task 2, which alone lowers the losses."""
    options = (
        dict(gamma=0.0, lr=5e-3, hidden=(32, 32), window=50, update_every=10, updates=15, batch=128)
        | changes
    )
    igb = IGBv2(2, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    losses = torch.ones(2)
    shares = []
    for _ in range(steps):
        shares.append((slopes(igb, losses)[0] * losses)[1] / 2)
        igb.advance(losses)
        losses = 1 - 0.8 * shares[-1] + 0.02 * torch.randn(2, generator=generator)
    return torch.stack(shares[-100:]).mean().item()


def learned(share):
    return share > 0.8


@pytest.mark.full
@pytest.mark.parametrize("seed", [10, 11, 12])
def test_igb_learns_the_bandit(seed):
    assert learned(play(seed))


@pytest.mark.full
def test_igb_with_a_bound_learns_it_too():
    assert 0.8 < play(13, bounded=True) < 0.89  # softmax of actions in (-1, 1) gives at most 0.881


@pytest.mark.full
@pytest.mark.parametrize(
    "frozen", [dict(lr=0.0), dict(updates=0), dict(update_epoch=1000)], ids=str
)
def test_a_frozen_agent_does_not_learn_the_bandit(frozen):
    share = play(10, **frozen)
    assert not learned(share)
    assert 0.4 < share < 0.6


# ------------------------------------------------------------ state and errors


def training(igb, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        torch.randn(*shape, generator=generator).requires_grad_()
        for shape in ((3, 4), (4, 1), (4, 1))
    ]
    return Balancer(igb, Sum(), shared=parameters[:1], num_tasks=2), parameters


def train(balancer, parameters, batches):
    trace = []
    for x in batches:
        hidden = (x @ parameters[0]).tanh()
        balancer.backward([(hidden @ head - x[:, :1]).square().mean() for head in parameters[1:]])
        trace.append(balancer.slopes)
        with torch.no_grad():
            for p in parameters:
                p.sub_(0.01 * p.grad)
                p.grad = None
    return torch.stack(trace)


@pytest.mark.parametrize(
    "stop", [3, 12, 31]
)  # before the base, before the agent, in the middle of its work
def test_igb_resumes_bit_for_bit(stop):
    batches = torch.randn(50, 8, 3, generator=torch.Generator().manual_seed(0))
    balancer, parameters = training(IGBv2(2, **SMALL, seed=0))
    train(balancer, parameters, batches[:stop])
    file = io.BytesIO()
    torch.save(
        {"balancer": balancer.state_dict(), "parameters": [p.detach() for p in parameters]}, file
    )
    straight = train(balancer, parameters, batches[stop:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, copies = training(IGBv2(2, **SMALL, seed=1))
    with torch.no_grad():
        for p, q in zip(copies, saved["parameters"], strict=True):
            p.copy_(q)
    resumed.load_state_dict(saved["balancer"])
    assert_close(train(resumed, copies, batches[stop:]), straight, rtol=0, atol=0)


def test_igb_same_seed_same_numbers_and_no_global_random_numbers():
    before = torch.get_rng_state()
    first, second, other = (
        feed(IGBv2(2, **SMALL, seed=seed), some_losses(40)) for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_igb_refuses_losses_that_have_no_logarithm_and_stays_as_it_was():
    balancer, parameters = training(IGBv2(2, **SMALL, seed=0))
    train(balancer, parameters, torch.randn(30, 8, 3, generator=torch.Generator().manual_seed(0)))
    before = copy.deepcopy(balancer.state_dict())
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises((ValueError, FloatingPointError)):
            balancer.backward([(parameters[0] * 0).sum() + value for value in (1.0, bad)])
        balancer.transform.advance(torch.tensor([1.0, bad]))  # check="off" lets it through
    assert same(before, balancer.state_dict())


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e18, 1e20, 1e30])
def test_igb_extreme_losses(scale):
    igb = IGBv2(2, **SMALL | dict(random_epochs=2, window=2, update_every=1), seed=0)
    assert_close(feed(igb, scale * some_losses(20)).sum(1), torch.full((20,), 2.0))
    assert all(p.isfinite().all() for p in igb.agent.memory["policy"] + igb.agent.memory["critics"])


def test_igb_repr_evaluates_to_the_same():
    changed = IGBv2(
        2, base_epoch=0, **SMALL, gamma=0.5, bounded=True, automatic=False, alpha=1.0, longest=7
    )
    for igb in (IGBv2(3), changed):
        assert repr(eval(repr(igb))) == repr(igb)
    agent = SoftActorCritic(2, hidden=(4,), lr=0.1)
    assert repr(eval(repr(agent))) == repr(agent)


def test_igb_moves_with_its_dtype():
    igb = IGBv2(2, **SMALL, seed=0).double()
    assert feed(igb, some_losses(40).double()).dtype == torch.float64
    assert igb.agent.memory["critics"][0].dtype == torch.float64


@pytest.mark.parametrize(
    "bad",
    [
        dict(num_tasks=0), dict(base_epoch=-1), dict(random_epochs=1.5), dict(update_every=0),
        dict(updates=-1), dict(batch=1), dict(hidden=(0,)), dict(gamma=1.1), dict(tau=-0.1),
        dict(lr=float("nan")), dict(alpha=0.0), dict(capacity=0), dict(window=0), dict(longest=0),
    ],
    ids=str,
)  # fmt: skip
def test_igb_bad_options_are_named(bad):
    [(name, value)] = bad.items()
    with pytest.raises(ValueError, match=f"{name}.*{value if name != 'hidden' else 0}"):
        IGBv2(**dict(num_tasks=2) | bad)
    with pytest.raises(ValueError, match="positive"):
        IGBv2(2).end_epoch(torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("hidden", [128, "wide", None])
def test_igb_hidden_is_a_tuple_of_widths(hidden):
    with pytest.raises(ValueError, match=f"hidden must be a tuple of widths, got {hidden!r}"):
        IGBv2(2, hidden=hidden)
