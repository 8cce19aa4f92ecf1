"""SegNet and its attention: sizes, formulas by another route, who gets which gradient."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from dbmtl import DBMTL, make_balancer
from dbmtl.experiments.step import trunk_features
from dbmtl.models.segnet import SegNet, SegNetTrunk, TaskAttention, parameter_counts, xavier_

TASKS = {"segmentation": 13, "depth": 1, "normal": 3}


def network(width=4, seed=0, **options):
    torch.manual_seed(seed)
    return SegNet(TASKS, width, **options)


def pictures(height=32, width=32, batch=2, seed=1):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def settled(model, images):
    """Evaluation mode with the statistics of these images: the initial ones give next to zero."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.momentum = 1.0
    with torch.no_grad():
        model(images)
    return model.eval()


def losses_of(model, images):
    """Losses of very different sizes; a random target keeps their gradients from being alike."""
    predictions = model(images)
    draw = torch.Generator().manual_seed(7)
    targets = {task: torch.randn(y.shape, generator=draw) for task, y in predictions.items()}
    sizes = {"segmentation": 0.01, "depth": 1, "normal": 100}
    return {task: sizes[task] * F.mse_loss(y, targets[task]) for task, y in predictions.items()}


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def log_gradients(losses, parameters):
    return [
        torch.autograd.grad((loss + 1e-8).log(), parameters, retain_graph=True)
        for loss in losses.values()
    ]


# ------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (36, 48), (63, 65)], ids=str)
def test_segnet_predicts_at_the_size_of_the_images(size, attention):
    model = network(attention=attention)
    for task, y in model(pictures(*size)).items():
        assert y.shape == (2, TASKS[task], *size)
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("attention", [True, False])
def test_segnet_for_one_task(attention):
    y = SegNet({"segmentation": 13}, 4, attention)(pictures(36, 48))
    assert list(y) == ["segmentation"] and y["segmentation"].shape == (2, 13, 36, 48)


def test_segnet_names_the_size_that_is_too_small():
    with pytest.raises(ValueError, match=r"32 pixels.*\(2, 3, 31, 40\)"):
        network()(pictures(31, 40))


def test_segnet_predictions_are_raw():
    """No softmax, no unit normals: values of both signs, sums and lengths that are no constant."""
    predictions = network()(pictures())
    assert predictions["segmentation"].min() < 0 and predictions["depth"].min() < 0
    assert predictions["segmentation"].sum(1).std() > 1e-4
    assert predictions["normal"].norm(dim=1).std() > 1e-4


def test_segnet_parameters_at_full_width_are_those_of_the_papers_code():
    with torch.device("meta"):
        model = SegNet(TASKS)
        bare = SegNet(TASKS, attention=False)
    counts = parameter_counts(model)
    masks = {task: sum(p.numel() for p in model.attention[task].parameters()) for task in TASKS}
    assert set(masks.values()) == {2_984_576}
    assert counts["shared"] == 35_163_456 and counts["shared"] + sum(masks.values()) == 44_117_184
    assert sum(p.numel() for p in model.trunk.carry.parameters()) == 10_220_160
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert parameter_counts(bare) == {
        "shared": 24_943_296,
        "segmentation": 37_773,
        "depth": 36_993,
        "normal": 37_123,
    }


def test_segnet_filters_and_layers_are_vgg16s():
    with torch.device("meta"):
        trunk = SegNetTrunk(64)
    convolutions = [m for m in trunk.encoder.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    mirrored = [m for m in trunk.decoder.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in mirrored] == [512] * 3 + [256] * 3 + [128] * 3 + [64] * 4
    assert {c.kernel_size for c in convolutions + mirrored} == {(3, 3)}


def test_segnet_xavier_draws_every_convolution_but_those_of_the_heads():
    model = network(width=16)
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d) and name.startswith("heads"):
            bound = (m.in_channels * m.kernel_size[0] ** 2) ** -0.5  # PyTorch's own
            assert m.bias.any() and float(m.weight.detach().abs().max()) <= bound, name
        elif isinstance(m, nn.Conv2d):
            fan = (m.in_channels + m.out_channels) * m.kernel_size[0] ** 2
            if m.weight.numel() > 400:
                spread = float(m.weight.detach().std())
                assert abs(spread / (2 / fan) ** 0.5 - 1) < 0.15, name
            assert m.bias is None or not m.bias.any(), name
    again = copy.deepcopy(model)
    assert xavier_(again) is again
    assert not torch.equal(again.heads["depth"][0].weight, model.heads["depth"][0].weight)


# ----------------------------------------------------------------------------------------- formulas


def windows(x):
    """[B, C, H, W] -> [B, C, H / 2, W / 2, 4]"""
    return x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)


def unwindows(x):
    """[B, C, h, w, 4] -> [B, C, 2h, 2w]"""
    return x.unflatten(4, (2, 2)).permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def test_segnet_trunk_is_pooling_and_unpooling_by_hand():
    """Each value of the decoder goes where the first largest of its window was; zeros elsewhere."""
    torch.manual_seed(0)
    trunk = settled(xavier_(SegNetTrunk(4)), pictures(32, 64))
    x = pictures(32, 64)
    places = []
    for level in trunk.encoder:
        x = level.rest(level.first(x))
        places.append(np.eye(4, dtype=np.float32)[windows(x).numpy().argmax(-1)])
        x = windows(x).amax(-1)
    for level, place in zip(trunk.decoder, reversed(places), strict=True):
        x = level.rest(level.first(unwindows(x[..., None] * torch.from_numpy(place))))
    assert float(x.std()) > 0.1
    assert_close(trunk(pictures(32, 64)), x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_segnet_attention_follows_its_formula():
    """What each mask sees, and what comes out, from hooks on masks and carrying convolutions."""
    task, images = "normal", pictures(45, 70)
    model = settled(network(), images)
    trunk, masks = model.trunk, model.attention["normal"].masks
    seen, said = [], []
    for mask in masks:
        mask.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        mask.register_forward_hook(lambda module, inputs, output: said.append(output))
    prediction = model(images)[task]
    first = [level.first for level in trunk.encoder]
    x, shared = images, []
    for j, level in enumerate(trunk.encoder):
        u = first[j](x)
        p = level.rest(u)
        shared.append((u, p))
        x = F.max_pool2d(p, 2)
    shared += trunk(images)[5:]
    assert len(seen) == len(shared) == 10
    before = None
    for j, (u, p) in enumerate(shared):
        if j == 0:
            expected = u
        elif j < 5:
            expected = torch.cat([u, F.max_pool2d(trunk.carry[j - 1](before), 2)], 1)
        else:
            below = F.max_pool2d(trunk.carry[4](before), 2) if j == 5 else before
            wide = F.interpolate(below, u.shape[2:], mode="bilinear", align_corners=True)
            expected = torch.cat([u, trunk.carry[j](wide)], 1)
        assert_close(seen[j], expected)
        assert 0 <= said[j].min() and said[j].max() <= 1 and said[j].shape == p.shape
        before = said[j] * p
    assert float(prediction.std()) > 0.01
    assert_close(prediction, model.heads[task](before))


def test_segnet_decoder_pairs_are_the_unpooled_input_and_the_output():
    model = settled(network(), pictures(40, 56))
    levels = model.trunk(pictures(40, 56))
    for level, (unpooled, p) in zip(model.trunk.decoder, levels[5:], strict=True):
        assert_close(level(unpooled)[1], p)
        nonzero = F.pad(unpooled, (0, unpooled.shape[3] % 2, 0, unpooled.shape[2] % 2)).ne(0)
        assert nonzero.unfold(2, 2, 2).unfold(3, 2, 2).sum((-2, -1)).max() <= 1


@pytest.mark.parametrize("attention", [True, False])
def test_segnet_gradient_is_the_slope_of_the_loss(slope_and_gradient, attention):
    """Along a random direction in all parameters: nothing is detached on the way."""
    images = pictures(36, 48).double()
    model = settled(network(attention=attention).double(), images)
    slope, expected = slope_and_gradient(model, images)
    assert slope == pytest.approx(expected, rel=1e-4)


def test_segnet_shares_one_trunk_pass_among_tasks():
    model, calls = network(), []
    model.trunk.register_forward_hook(lambda *_: calls.append(1))
    model(pictures())
    assert len(calls) == 1


def test_segnet_tasks_do_not_see_each_others_masks():
    images = pictures()
    model = settled(network(), images)
    before = model(images)
    for p in model.attention["depth"].parameters():
        p.data.add_(0.5)
    after = model(images)
    assert not torch.allclose(before["depth"], after["depth"])
    assert_close(before["segmentation"], after["segmentation"], rtol=0, atol=0)
    assert_close(before["normal"], after["normal"], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------- balancing


def test_segnet_trunk_is_what_several_losses_reach_and_nothing_else_is():
    model = network()
    losses = losses_of(model, pictures(36, 48))
    reach = {name: 0 for name, _ in model.named_parameters()}
    for loss in losses.values():
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for name, g in zip(reach, gradients, strict=True):
            reach[name] += g is not None
    assert {n for name, n in reach.items() if name.startswith("trunk.")} == {3}
    assert {n for name, n in reach.items() if not name.startswith("trunk.")} == {1}


@pytest.mark.parametrize("attention", [True, False])
def test_segnet_under_dbmtl_equals_the_algorithm_by_hand(attention):
    """Two steps with the moving average: trunk balanced, the rest gets its own log-loss."""
    model = network(attention=attention)
    shared, average = list(model.trunk.parameters()), [0.0, 0.0, 0.0]
    balancer = DBMTL(shared=model.trunk, num_tasks=3, beta=0.5, beta_decay=0.5)
    for k in (1, 2):
        losses = losses_of(model, pictures(36, 48, seed=k))
        beta = 0.5 / k**0.5
        rows = [flat(gradients) for gradients in log_gradients(losses, shared)]
        average = [beta * a + (1 - beta) * g for a, g in zip(average, rows, strict=True)]
        lengths = [float(a.norm()) for a in average]
        expected = max(lengths) * sum(a / (n + 1e-8) for a, n in zip(average, lengths, strict=True))
        of_task = {task: [*model.heads[task].parameters()] for task in TASKS}
        gradients = {}
        for task in TASKS:
            if attention:
                of_task[task] += model.attention[task].parameters()
            log = (losses[task] + 1e-8).log()
            gradients[task] = torch.autograd.grad(log, of_task[task], retain_graph=True)
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a forgotten layer would warn
            balancer.backward(losses)
        direction = flat(p.grad for p in shared)
        assert float((direction - expected).norm() / expected.norm()) < 1e-4
        for task in TASKS:
            for p, g in zip(of_task[task], gradients[task], strict=True):
                assert_close(p.grad, g, rtol=1e-4, atol=1e-7)


def test_segnet_attention_is_never_without_gradient():
    """What went wrong elsewhere: masks whose gradient was cleared by every task's pass."""
    model = network(width=8)
    DBMTL(shared=model.trunk, num_tasks=3).backward(losses_of(model, pictures(64, 64)))
    for task in TASKS:
        for j, mask in enumerate(model.attention[task].masks):
            assert mask[3].weight.grad.abs().sum() > 0, (task, j)


def test_segnet_describe_draws_the_line():
    model = network()
    balancer = DBMTL(shared=model.trunk, num_tasks=3)
    balancer.backward(losses_of(model, pictures()))
    counts = parameter_counts(model)
    text = balancer.describe()
    assert f"{counts['shared']:,} parameters" in text.splitlines()[1]
    for task in TASKS:
        head = f"outside shared, reached by {task}:"
        line = next(line for line in text.splitlines() if line.startswith(head))
        assert f"{counts[task]:,} parameters" in line
    assert "alone" not in text and "reached by no loss: 0 tensors" in text


def test_segnet_with_the_partition_of_the_papers_code_is_told_apart():
    """Masks inside `shared`: described as reached by one task, and no longer their own gradient."""
    model = network()
    losses = losses_of(model, pictures())
    masks = list(model.attention["segmentation"].parameters())
    alone = torch.autograd.grad((losses["segmentation"] + 1e-8).log(), masks, retain_graph=True)
    both = [*model.trunk.parameters(), *model.attention.parameters()]
    balancer = DBMTL(shared=both, num_tasks=3, beta=0)
    with pytest.warns(UserWarning, match="inside `shared` are reached by one loss alone"):
        balancer.backward(losses)
    assert balancer.describe().count("in shared, but reached by") == 3
    ratio = float(flat(p.grad for p in masks).norm() / flat(alone).norm())
    assert abs(ratio - 1) > 1e-3


def test_segnet_without_its_carrying_convolutions_in_shared_warns():
    model = network()
    shared = [*model.trunk.encoder.parameters(), *model.trunk.decoder.parameters()]
    balancer = DBMTL(shared=shared, num_tasks=3)
    with pytest.warns(UserWarning, match="carry|shared"):
        balancer.backward(losses_of(model, pictures()))


@pytest.mark.parametrize("method", ["EW", "CAGrad", "Nash-MTL", "GradDrop"])
def test_segnet_under_other_methods(method):
    model = network()
    make_balancer(method, shared=model.trunk, num_tasks=3).backward(losses_of(model, pictures()))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_segnet_at_feature_level_works_without_attention_and_is_refused_with_it():
    tasks = list(TASKS)
    images = pictures()
    plain = network(attention=False)
    with trunk_features(plain, tasks) as features:
        losses = losses_of(plain, images)
    make_balancer("MGDA-UB", shared=plain.trunk, num_tasks=3).backward(losses, features=features[0])
    assert all(p.grad is not None for p in plain.trunk.parameters())
    model = network()
    with pytest.raises(TypeError, match="returns list.*one tensor"), trunk_features(model, tasks):
        model(images)


@pytest.mark.full
def test_segnet_learns_all_tasks_at_once():
    model = network()
    images = F.interpolate(pictures(4, 4, batch=4), 32)
    balancer, losses = DBMTL(shared=model.trunk, num_tasks=3), []
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    label = (images.mean(1) * 12.99).long()
    for _ in range(14):
        y = model(images)
        step = [F.cross_entropy(y["segmentation"], label), F.l1_loss(y["depth"], images[:, :1])]
        step.append(F.mse_loss(y["normal"], images))
        balancer.backward(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append([float(loss.detach()) for loss in step])
    pairs = list(zip(losses[0], losses[-1], strict=True))
    assert all(last < 0.95 * first for first, last in pairs), pairs


# ------------------------------------------------------------------------------------ how it is run


def test_segnet_state_round_trip():
    model = network(seed=0)
    other = network(seed=5)
    images = pictures()
    settled(model, images)
    other.load_state_dict(model.state_dict())
    assert_close(model(images), other.eval()(images), rtol=0, atol=0)


@torch.no_grad()
def test_segnet_in_channels_last():
    images = pictures(36, 48)
    model = settled(network(width=8), images)
    plain = model(images)
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    predictions = channels_last(images.to(memory_format=torch.channels_last))
    assert_close(plain, predictions, rtol=1e-4, atol=1e-4)


def test_segnet_steps_in_bfloat16():
    """Poolings and unpoolings too: finite, and every parameter gets a gradient of its own type."""
    model = network(width=8)
    with torch.autocast("cpu", torch.bfloat16):
        predictions = model(pictures(36, 48))
        assert {y.dtype for y in predictions.values()} == {torch.bfloat16}
        losses = [y.float().square().mean() for y in predictions.values()]
    DBMTL(shared=model.trunk, num_tasks=3).backward(losses)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_segnet_attention_needs_ten_levels():
    with pytest.raises(ValueError):
        TaskAttention(4)(network().trunk(pictures())[:9], network().trunk.carry)
