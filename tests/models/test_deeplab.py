"""DeepLab: heads and predictions computed a second way, sizes, gradients, what is refused."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from dbmtl.models.deeplab import ASPPHead, DeepLab
from dbmtl.models.segnet import SegNet
from dbmtl.models.soft_sharing import CrossStitch, MMoE, MTANNet

TASKS = {"segmentation": 13, "depth": 1, "normal": 3}


def head_by_hand(hand, x):
    parts = [hand.layer(x, "branches.0")]
    parts += [hand.layer(x, f"branches.{i}", rate) for i, rate in ((1, 12), (2, 24), (3, 36))]
    pooled = hand.layer(F.adaptive_avg_pool2d(x, 1), "pool")
    parts.append(F.interpolate(pooled, x.shape[2:], mode="bilinear"))
    x = hand.layer(torch.cat(parts, 1), "project")
    return hand.conv(hand.layer(x, "read"), "read.3")


@pytest.mark.parametrize("training", [True, False])
def test_deeplab_aspp_head_is_what_one_computes_by_hand(by_hand, scrambled, training):
    head = scrambled(ASPPHead(6, 5, 4)).train(training)
    head.project[3].p = 0.0
    x = torch.rand(3, 6, 41, 17, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    hand = by_hand(head, training)
    assert_close(head(x), head_by_hand(hand, x))


def test_deeplab_aspp_head_drops_half_in_training_and_nothing_in_evaluation():
    drops = [m for m in ASPPHead(6, 5, 4).modules() if isinstance(m, torch.nn.Dropout)]
    assert [m.p for m in drops] == [0.5]
    torch.manual_seed(0)
    head = ASPPHead(6, 5, 64)
    x = torch.rand(2, 6, 9, 9, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(head(x), head(x))
    zeros = (head.project(torch.rand(2, 320, 9, 9)) == 0).float().mean()
    assert 0.7 < zeros < 0.8  # a relu before it takes a half already
    head.eval()
    assert_close(head(x), head(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("outputs", "numbers"), [(13, 16_128_781), (1, 16_125_697), (3, 16_126_211), (7, 16_127_239)]
)
def test_deeplab_head_sizes_are_the_published_ones(outputs, numbers):
    with torch.device("meta"):
        assert sum(p.numel() for p in ASPPHead(2048, outputs).parameters()) == numbers
        network = DeepLab({"task": outputs})
    assert sum(p.numel() for p in network.trunk.parameters()) == 23_508_032
    assert sum(p.numel() for p in network.heads["task"].parameters()) == numbers
    assert sum(p.numel() for p in network.parameters()) == 23_508_032 + numbers


def test_deeplab_full_size_shapes():
    with torch.device("meta"):
        network = DeepLab(TASKS)
        x = torch.empty(8, 3, 288, 384)
        assert network.trunk(x).shape == (8, 2048, 36, 48)
        shapes = {task: tuple(p.shape) for task, p in network(x).items()}
    assert shapes == {task: (8, outputs, 288, 384) for task, outputs in TASKS.items()}
    assert network.trunk.channels == [256, 512, 1024, 2048]


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (8, 8)])
def test_deeplab_tiny_networks_run_on_small_images_of_any_size(width, size):
    network = DeepLab({"a": 2}, width)
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert network(x)["a"].shape == (2, 2, *size)
    assert network.heads["a"].read[0].in_channels == 4 * width


NETWORKS = [DeepLab, SegNet, MTANNet, CrossStitch, MMoE]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("width", [0, -4, 2.5, "64"])
def test_bad_width_is_named(network, width):
    with pytest.raises(ValueError, match=f"width must be a whole number from 1, got {width!r}"):
        network(TASKS, width)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["segmentation", "depth"], r"tasks must be a dict .*, got \['segmentation', 'depth'\]"),
        ("segmentation", "tasks must be a dict .*, got 'segmentation'"),
        (13, "tasks must be a dict .*, got 13"),
        ({"depth": 0}, r"tasks\['depth'\] must be a whole number from 1, got 0"),
        ({"depth": 1, "normal": "3"}, r"tasks\['normal'\] must be a whole number from 1, got '3'"),
    ],
)
def test_bad_tasks_are_named(network, tasks, message):
    with pytest.raises(ValueError, match=message):
        network(tasks, 4)


def between(count, points):
    """The matrix of linear interpolation from `points` values to `count`, first and last kept."""
    place = torch.arange(count, dtype=torch.float64) * (points - 1) / (count - 1)
    return (1 - (place[:, None] - torch.arange(points)).abs()).clamp(min=0)


def test_deeplab_predictions_are_resized_with_aligned_corners(scrambled, images):
    network = scrambled(DeepLab({"a": 2}, 4)).eval()
    x = images(2, 48, 64)
    logits = network.heads["a"](network.trunk(x))
    assert logits.shape[2:] == (6, 8)
    assert_close(network(x)["a"], between(48, 6) @ logits @ between(64, 8).T)


def test_deeplab_gradients_reach_all_parameters_and_no_other_head(images):
    network = DeepLab(TASKS, 4)
    assert set(network.heads) == set(TASKS)
    shared = {id(p) for p in network.trunk.parameters()}
    predictions = network(images().float())
    for task, prediction in predictions.items():
        network.zero_grad()
        prediction.square().mean().backward(retain_graph=True)
        with_gradient = [p for p in network.parameters() if p.grad is not None]
        reached = {id(p) for p in with_gradient if p.grad.abs().sum() > 0}
        other = {id(p) for t in TASKS if t != task for p in network.heads[t].parameters()}
        assert shared <= reached and not reached & other
        names = [n for n, p in network.heads[task].named_parameters() if id(p) not in reached]
        assert names == []


def test_deeplab_a_batch_of_one_is_an_error_in_training_only(images):
    network = DeepLab(TASKS, 4)
    with pytest.raises(ValueError, match="batch of one image in training mode.*batch_size >= 2"):
        network(images(1).float())
    assert network.eval()(images(1).float())["depth"].shape == (1, 1, 40, 64)
