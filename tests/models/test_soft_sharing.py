"""MTAN, Cross-stitch and MMoE: what is shared, formulas by another route, balancing."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from dbmtl import DBMTL, make_balancer
from dbmtl.experiments.step import trunk_features
from dbmtl.models.deeplab import DeepLab
from dbmtl.models.imagenet_weights import trunk_state
from dbmtl.models.resnet import resnet50_dilated
from dbmtl.models.segnet import parameter_counts
from dbmtl.models.soft_sharing import CrossStitch, MMoE, MTANNet

TASKS = {"segmentation": 13, "depth": 1, "normal": 3}
NETWORKS = {"MTAN": MTANNet, "Cross-stitch": CrossStitch, "MMoE": MMoE}
each_network = pytest.mark.parametrize("kind", NETWORKS)


def network(kind, tasks=TASKS, width=4, seed=0, **options):
    torch.manual_seed(seed)
    return NETWORKS[kind](tasks, width, **options)


def pictures(height=32, width=32, batch=2, seed=1):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def losses_of(model, images):
    """Losses of very different sizes, with random targets."""
    predictions = model(images)
    draw = torch.Generator().manual_seed(7)
    targets = {task: torch.randn(y.shape, generator=draw) for task, y in predictions.items()}
    sizes = {"segmentation": 0.01, "depth": 1, "normal": 100}
    return {task: sizes[task] * F.mse_loss(y, targets[task]) for task, y in predictions.items()}


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def parameters_of(model, task):
    """Parameters of a task alone."""
    parts = [module for name, module in model.named_children() if name != "trunk"]
    return [p for part in parts for p in part[task].parameters()]


# ------------------------------------------------------------------------------------------- shapes


@each_network
@pytest.mark.parametrize("size", [(32, 32), (36, 50), (41, 33)], ids=str)
def test_soft_sharing_predicts_at_the_size_of_the_images(kind, size):
    for task, y in network(kind)(pictures(*size)).items():
        assert y.shape == (2, TASKS[task], *size)
        assert torch.isfinite(y).all()


@each_network
def test_soft_sharing_for_one_task(kind):
    model = network(kind, {"segmentation": 13})
    losses = {"segmentation": model(pictures(36, 48))["segmentation"].square().mean()}
    DBMTL(shared=model.trunk, num_tasks=1).backward(losses)
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()


@each_network
def test_soft_sharing_predictions_are_raw(kind):
    predictions = network(kind)(pictures())
    assert predictions["segmentation"].min() < 0 and predictions["segmentation"].sum(1).std() > 1e-3
    assert predictions["normal"].norm(dim=1).std() > 1e-3


def test_soft_sharing_parameters_at_full_width():
    with torch.device("meta"):
        counts = {kind: parameter_counts(make(TASKS)) for kind, make in NETWORKS.items()}
    trunk = 23_508_032
    heads = {"segmentation": 16_128_781, "depth": 16_125_697, "normal": 16_126_211}
    assert counts["Cross-stitch"] == {"shared": 3 * trunk + 36} | heads
    with_gates = {task: n + 3 * 193 for task, n in heads.items()}
    assert counts["MMoE"] == {"shared": 3 * trunk} | with_gates
    masks, blocks, channels = 0, 0, [256, 512, 1024, 2048]
    for j, c in enumerate(channels):
        seen, hidden = c if j == 0 else 2 * c, c // 4
        masks += seen * hidden + 3 * hidden + hidden * c + 3 * c
    for a, b in zip(channels[:-1], channels[1:], strict=True):
        h = b // 4
        blocks += a * h + 9 * h * h + h * b + 2 * (h + h + b) + a * b + 2 * b
    with_masks = {task: n + masks for task, n in heads.items()}
    assert counts["MTAN"] == {"shared": trunk + blocks} | with_masks
    assert (blocks, masks) == (7_931_392, 4_175_936)


@each_network
def test_soft_sharing_backbones_take_torchvisions_names(kind):
    model = network(kind)
    state = resnet50_dilated(4).state_dict() | {"fc.weight": torch.zeros(1000, 128)}
    assert len(model.backbones) == {"MTAN": 1, "Cross-stitch": 3, "MMoE": 3}[kind]
    inside = {id(p) for p in model.trunk.parameters()}
    for backbone in model.backbones:
        backbone.load_state_dict(trunk_state(state, backbone))
        assert all(id(p) in inside for p in backbone.parameters())


# ----------------------------------------------------------------------------------------- formulas


@torch.no_grad()
def test_mtan_attention_follows_its_formula():
    model = network("MTAN").eval()
    images = pictures(44, 60)
    task = "depth"
    seen, said = [], []
    for mask in model.attention[task].masks:
        mask.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        mask.register_forward_hook(lambda module, inputs, output: said.append(output))
    prediction, net = model(images)[task], model.trunk.backbone
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    before = None
    for j in range(4):
        blocks = list(getattr(net, f"layer{j + 1}"))
        for block in blocks[:-1]:
            x = block(x)
        u, x = x, blocks[-1](x)
        expected = u
        if j:
            carried = model.trunk.carry[j - 1](before)
            if j == 1:  # the only stage with a stride: 11 x 15 to 6 x 8
                carried = F.max_pool2d(F.pad(carried, (0, 1, 0, 1), value=-torch.inf), 2)
            expected = torch.cat([u, carried], 1)
        assert_close(seen[j], expected)
        assert said[j].min() >= 0 and said[j].max() <= 1
        before = said[j] * x
    head = F.interpolate(model.heads[task](before), (44, 60), mode="bilinear", align_corners=True)
    assert float(prediction.std()) > 1e-3
    assert_close(prediction, head)


@torch.no_grad()
def test_mtan_masks_are_one_set_a_task():
    """No module is there twice, and a changed mask changes its own task's prediction alone."""
    model = network("MTAN").eval()
    images = pictures()
    masks = [id(p) for task in TASKS for p in model.attention[task].parameters()]
    assert len(set(masks)) == len(masks)
    before = model(images)
    for p in model.attention["segmentation"].parameters():
        p.add_(0.5)
    after = model(images)
    assert float((before["segmentation"] - after["segmentation"]).abs().max()) > 1e-3
    for task in ("depth", "normal"):
        assert_close(before[task], after[task], rtol=0, atol=0)


@torch.no_grad()
def test_cross_stitch_that_mixes_nothing_is_a_network_a_task():
    model = network("Cross-stitch", own=1.0).eval()
    images = pictures()
    for t, task in enumerate(TASKS):
        alone = DeepLab({task: TASKS[task]}, 4).eval()
        alone.trunk.load_state_dict(model.trunk.backbones[t].state_dict())
        alone.heads[task].load_state_dict(model.heads[task].state_dict())
        assert_close(model(images)[task], alone(images)[task])


@torch.no_grad()
def test_cross_stitch_mixes_as_its_units_say():
    model = network("Cross-stitch").eval()
    images = pictures()
    model.trunk.units.copy_(torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(3)))
    features = model.trunk(images)
    x = torch.stack([net.stem(images) for net in model.backbones])
    for j in range(4):
        pairs = zip(model.backbones, x, strict=True)
        x = torch.stack([getattr(net, f"layer{j + 1}")(z) for net, z in pairs])
        x = torch.einsum("ts,sbchw->tbchw", model.trunk.units[j], x)
    assert_close(torch.stack(features), x, rtol=1e-4, atol=1e-4)
    assert float(x.std()) > 0.01


def test_cross_stitch_starting_values():
    two = network("Cross-stitch", {"a": 1, "b": 1}).trunk.units
    assert_close(two.detach(), torch.tensor([[0.9, 0.1], [0.1, 0.9]]).expand(4, 2, 2))
    three = network("Cross-stitch", own=1 / 3).trunk.units
    assert_close(three.detach(), torch.full((4, 3, 3), 1 / 3))
    with pytest.raises(ValueError, match="own must be .* at most 1, got -0.1"):
        network("Cross-stitch", own=-0.1)


@torch.no_grad()
def test_mmoe_mixes_experts_image_by_image():
    model = network("MMoE", experts=2).eval()
    images = pictures(40, 48, batch=3)
    for gate in model.gates.values():
        gate[2].weight.mul_(5)  # so that the gates differ between images
    outputs = model(images)
    for task, gate in model.gates.items():
        score = F.adaptive_avg_pool2d(images, 8).reshape(3, -1) @ gate[2].weight.T + gate[2].bias
        share = score.exp() / score.exp().sum(1, keepdim=True)
        assert float((share[0] - share[1]).abs().max()) > 0.01
        mixed = []
        for b in range(3):
            experts = [net(images[b : b + 1]) for net in model.backbones]
            mixed.append(sum(share[b, e] * x for e, x in enumerate(experts)))
        small = model.heads[task](torch.cat(mixed))
        prediction = F.interpolate(small, (40, 48), mode="bilinear", align_corners=True)
        assert_close(outputs[task], prediction, rtol=1e-4, atol=1e-4)


@each_network
def test_soft_sharing_gradient_is_the_slope_of_the_loss(slope_and_gradient, kind):
    """Along a random direction in all parameters: nothing is detached on the way."""
    images = pictures(36, 48).double()
    model = network(kind).double().eval()
    slope, expected = slope_and_gradient(model, images)
    assert slope == pytest.approx(expected, rel=1e-4)


def test_mmoe_needs_an_expert():
    with pytest.raises(ValueError, match="experts must be a whole number from 1, got 0"):
        network("MMoE", experts=0)


# ---------------------------------------------------------------------------------------- balancing


@each_network
def test_soft_sharing_trunk_is_what_several_losses_reach_and_nothing_else_is(kind):
    """Reached with a gradient that is not zero by every loss, or by one alone."""
    model = network(kind)
    reach = {name: 0 for name, _ in model.named_parameters()}
    for loss in losses_of(model, pictures(64, 64)).values():
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for name, g in zip(reach, gradients, strict=True):
            reach[name] += g is not None and bool(g.any())
    assert {n for name, n in reach.items() if name.startswith("trunk.")} == {3}
    assert {n for name, n in reach.items() if not name.startswith("trunk.")} == {1}


@each_network
def test_soft_sharing_under_dbmtl_equals_the_algorithm_by_hand(kind):
    """Two steps with the moving average: trunk balanced, the rest gets its own log-loss."""
    model = network(kind)
    shared, average = list(model.trunk.parameters()), [0.0, 0.0, 0.0]
    balancer = DBMTL(shared=model.trunk, num_tasks=3, beta=0.5, beta_decay=0.5)
    for k in (1, 2):
        losses, beta = losses_of(model, pictures(36, 48, seed=k)), 0.5 / k**0.5
        logs = [(loss + 1e-8).log() for loss in losses.values()]
        rows = [flat(torch.autograd.grad(log, shared, retain_graph=True)) for log in logs]
        average = [beta * a + (1 - beta) * g for a, g in zip(average, rows, strict=True)]
        lengths = [float(a.norm()) for a in average]
        expected = max(lengths) * sum(a / (n + 1e-8) for a, n in zip(average, lengths, strict=True))
        of_task = [parameters_of(model, task) for task in TASKS]
        pairs = zip(logs, of_task, strict=True)
        alone = [flat(torch.autograd.grad(log, ps, retain_graph=True)) for log, ps in pairs]
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a forgotten layer would warn
            balancer.backward(losses)
        direction = flat(p.grad for p in shared)
        assert float((direction - expected).norm() / expected.norm()) < 1e-4
        for parameters, gradient in zip(of_task, alone, strict=True):
            difference = flat(p.grad for p in parameters) - gradient
            assert float(difference.norm() / gradient.norm()) < 1e-4
    text = balancer.describe()
    counts = parameter_counts(model)
    assert f"{counts['shared']:,} parameters" in text.splitlines()[1] and "alone" not in text
    for task in TASKS:
        head = f"outside shared, reached by {task}:"
        line = next(line for line in text.splitlines() if line.startswith(head))
        assert f"{counts[task]:,} parameters" in line


def test_mtan_attention_is_never_without_gradient():
    """What went wrong elsewhere: masks whose gradient every gradient-balancing method cleared."""
    for method in ("DB-MTL", "MGDA", "CAGrad", "EW"):
        model = network("MTAN")
        balancer = make_balancer(method, shared=model.trunk, num_tasks=3)
        balancer.backward(losses_of(model, pictures(64, 64)))
        for task in TASKS:
            for j, mask in enumerate(model.attention[task].masks):
                assert mask[3].weight.grad.abs().sum() > 0, (method, task, j)


def test_mtan_without_its_blocks_in_shared_warns():
    """The shared parameters of the paper's library leave the blocks between the stages out."""
    model = network("MTAN")
    with pytest.warns(UserWarning, match="shared"):
        DBMTL(shared=model.trunk.backbone, num_tasks=3).backward(losses_of(model, pictures()))


@pytest.mark.full
@each_network
@pytest.mark.parametrize("method", ["GLS", "IGBv2", "CAGrad+log"])
def test_soft_sharing_under_other_methods(kind, method):
    model = network(kind)
    make_balancer(method, shared=model.trunk, num_tasks=3).backward(losses_of(model, pictures()))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("method", ["MGDA-UB", "IMTL-G-features"])
def test_mmoe_works_at_feature_level(method):
    model = network("MMoE")
    with trunk_features(model, list(TASKS)) as features:
        losses = losses_of(model, pictures())
    make_balancer(method, shared=model.trunk, num_tasks=3).backward(losses, features=features[0])
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ["MTAN", "Cross-stitch"])
def test_soft_sharing_with_several_features_is_refused_at_feature_level(kind):
    model = network(kind)
    message, tasks = "returns list.*one tensor", list(TASKS)
    with pytest.raises(TypeError, match=message), trunk_features(model, tasks):
        model(pictures())


@each_network
def test_soft_sharing_update_does_not_depend_on_the_units_of_losses(kind):
    """DB-MTL's direction stays when one loss is given in thousandths; that of EW does not."""
    model = network(kind).eval()
    images = pictures()

    def direction(factor, method, **hyper):
        losses = losses_of(model, images)
        losses["depth"] = factor * losses["depth"]
        model.zero_grad()
        make_balancer(method, shared=model.trunk, num_tasks=3, **hyper).backward(losses)
        gradient = flat(p.grad for p in model.trunk.parameters())
        return gradient / gradient.norm()

    def cosine(method, **hyper):
        return float(direction(1, method, **hyper) @ direction(1000, method, **hyper))

    assert cosine("DB-MTL", eps=1e-12) > 1 - 1e-4
    assert cosine("EW") < 0.9


@pytest.mark.full
@each_network
def test_soft_sharing_learns_all_tasks_at_once(kind):
    model = network(kind)
    images = F.interpolate(pictures(4, 4, batch=4), 32)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    balancer, losses = DBMTL(shared=model.trunk, num_tasks=3), []
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    label = (images.mean(1) * 12.99).long()
    for _ in range(6):
        y = model(images)
        step = [F.cross_entropy(y["segmentation"], label), F.l1_loss(y["depth"], images[:, :1])]
        step.append(F.mse_loss(y["normal"], images))
        balancer.backward(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append([float(loss.detach()) for loss in step])
    pairs = list(zip(losses[0], losses[-1], strict=True))
    assert all(last < 0.95 * first for first, last in pairs), pairs
