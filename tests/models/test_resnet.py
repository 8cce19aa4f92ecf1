"""Residual networks: torchvision's names and shapes, and a second way to compute them."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from dbmtl.models.resnet import BasicBlock, Bottleneck, ResNet, resnet18_trunk, resnet50_dilated

MAKERS = {"resnet18": resnet18_trunk, "resnet50": resnet50_dilated}
DILATIONS = {3: (1, 2, 2, 2, 2, 2), 4: (2, 4, 4)}  # of the 3x3 convolutions of stages 3 and 4


@pytest.mark.parametrize(
    ("name", "entries", "numbers"), [("resnet18", 122, 11_689_512), ("resnet50", 320, 25_557_032)]
)
def test_resnet_has_torchvisions_names_shapes_and_order(published, name, entries, numbers):
    table = published(name)
    counted = sum(torch.Size(s).numel() for n, s in table if s and "running" not in n)
    assert (len(table), counted) == (entries, numbers)  # as torchvision documents them
    with torch.device("meta"):
        trunk = MAKERS[name]()
    assert [(n, tuple(v.shape)) for n, v in trunk.state_dict().items()] == table[:-2]


def trunk_by_hand(hand, x, blocks, dilations, layers):
    x = hand.norm(hand.conv(x, "conv1", 2), "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, count in enumerate(blocks, 1):
        for i in range(count):
            at, is_first = f"layer{stage}.{i}.", i == 0
            stride = 2 if is_first and stage > 1 and stage not in dilations else 1
            dilation = dilations.get(stage, (1,) * count)[i]
            y = x
            for k in range(1, layers + 1):
                has_stride = k == (1 if layers == 2 else 2)
                is_3x3 = hand.state[f"{at}conv{k}.weight"].shape[-1] == 3
                y = hand.conv(
                    y, f"{at}conv{k}", stride if has_stride else 1, dilation if is_3x3 else 1
                )
                y = hand.norm(y, f"{at}bn{k}")
                y = y.relu() if k < layers else y
            if f"{at}downsample.0.weight" in hand.state:
                x = hand.norm(hand.conv(x, f"{at}downsample.0", stride), f"{at}downsample.1")
            x = (x + y).relu()
    return x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "blocks", "dilations", "layers"),
    [(resnet18_trunk, (2, 2, 2, 2), {}, 2), (resnet50_dilated, (3, 4, 6, 3), DILATIONS, 3)],
)
def test_resnet_trunk_is_what_one_computes_by_hand(
    by_hand, scrambled, images, make, blocks, dilations, layers, training
):
    trunk = scrambled(make(4)).train(training)
    hand = by_hand(trunk, training)
    x = images()
    assert_close(trunk(x), trunk_by_hand(hand, x, blocks, dilations, layers))


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_resnet_dilated_agrees_with_strided_where_both_compute(scrambled, images, size):
    dilated = scrambled(resnet50_dilated(4)).eval()
    strided = ResNet(Bottleneck, (3, 4, 6, 3), 4).double().eval()
    strided.load_state_dict(dilated.state_dict())
    x = images(1, *size)
    assert_close(dilated(x)[:, :, ::4, ::4], strided(x))


def test_resnet_full_size_shapes():
    with torch.device("meta"):
        trunk = resnet18_trunk()
        assert trunk(torch.empty(64, 3, 224, 224)).shape == (64, 512, 7, 7)
        assert trunk.channels == [64, 128, 256, 512]
        x, channels = trunk.stem(torch.empty(2, 3, 224, 224)), []
        for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
            x = stage(x)
            channels.append(x.shape[1])
        assert channels == trunk.channels
        assert resnet50_dilated().channels == [256, 512, 1024, 2048]


@pytest.mark.parametrize("make", MAKERS.values())
@pytest.mark.parametrize("width", [0, -4, 2.5, "64", None, True])
def test_resnet_bad_width_is_named(make, width):
    with pytest.raises(ValueError, match=f"width must be a whole number from 1, got {width!r}"):
        make(width)


def test_resnet_initialization_is_torchvisions():
    torch.manual_seed(0)
    trunk = resnet50_dilated(16)
    for module in trunk.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 20_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert abs(module.weight.std().item() / (2 / fan_out) ** 0.5 - 1) < 0.03
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert not any(isinstance(m, torch.nn.Conv2d) and m.bias is not None for m in trunk.modules())


def test_resnet_basic_blocks_are_not_dilated():
    with pytest.raises(ValueError, match="dilate=.*BasicBlock"):
        ResNet(BasicBlock, (2, 2, 2, 2), 4, (False, False, True))
