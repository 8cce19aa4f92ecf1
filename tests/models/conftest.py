"""What the tests of networks share: torchvision's table of layers, and layers computed by hand."""

import pytest
import torch
from torch.nn import functional as F


def _norm(name, channels):
    kinds = ("weight", "bias", "running_mean", "running_var")
    vectors = [(f"{name}.{kind}", (channels,)) for kind in kinds]
    return [*vectors, (f"{name}.num_batches_tracked", ())]


@pytest.fixture(scope="session")
def published():
    """Names and shapes of torchvision's state dict in its order, by the table of He et al. 2016."""

    def published(name):
        blocks = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}[name]
        table = [("conv1.weight", (64, 3, 7, 7)), *_norm("bn1", 64)]
        inside = 64
        for stage, (count, channels) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
            for i in range(count):
                at = f"layer{stage}.{i}."
                outside = channels
                kernels = [(channels, inside, 3), (channels, channels, 3)]
                if name == "resnet50":
                    outside = 4 * channels
                    kernels = [(channels, inside, 1), (channels, channels, 3)]
                    kernels.append((outside, channels, 1))
                for k, (rows, columns, side) in enumerate(kernels, 1):
                    table.append((f"{at}conv{k}.weight", (rows, columns, side, side)))
                    table += _norm(f"{at}bn{k}", rows)
                if i == 0 and (stage > 1 or name == "resnet50"):
                    table.append((f"{at}downsample.0.weight", (outside, inside, 1, 1)))
                    table += _norm(f"{at}downsample.1", outside)
                inside = outside
        return [*table, ("fc.weight", (1000, inside)), ("fc.bias", (1000,))]

    return published


class ByHand:
    """Layers from a state dict alone, in torch.nn.functional."""

    def __init__(self, module, training):
        self.state = {name: value.clone() for name, value in module.state_dict().items()}
        self.training = training

    def conv(self, x, name, stride=1, dilation=1):
        weight = self.state[f"{name}.weight"]
        padding = (weight.shape[-1] - 1) // 2 * dilation
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, padding, dilation)

    def norm(self, x, name):
        mean, var = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        if self.training:
            mean = x.mean((0, 2, 3))
            var = x.var((0, 2, 3), unbiased=False)
        scale = self.state[f"{name}.weight"] / (var + 1e-5).sqrt()
        bias = self.state[f"{name}.bias"]
        return (x - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]

    def layer(self, x, name, dilation=1):
        return self.norm(self.conv(x, f"{name}.0", 1, dilation), f"{name}.1").relu()


@pytest.fixture(scope="session")
def by_hand():
    return ByHand


@pytest.fixture(scope="session")
def scrambled():
    """Every parameter and statistic away from its initial value, so that each of them matters."""

    def scrambled(module, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for name, value in module.state_dict().items():
            if value.dim() == 1:
                low = 0.5 if name.endswith(("weight", "var")) else -0.5
                value.copy_(low + torch.rand(value.shape, generator=generator))
        return module.double()

    return scrambled


@pytest.fixture(scope="session")
def slope_and_gradient():
    """The slope of a loss along a random direction in all parameters, and what gradients say."""

    def slope_and_gradient(model, images):
        parameters = list(model.parameters())
        draw = torch.Generator().manual_seed(5)
        direction = []
        for p in parameters:
            random = torch.randn(p.shape, generator=draw, dtype=p.dtype)
            direction.append(random * p.detach().abs().mean())

        def loss():
            return sum(y.square().mean() for y in model(images).values())

        gradients = torch.autograd.grad(loss(), parameters)
        pairs = zip(gradients, direction, strict=True)
        expected = sum(float((g * d).sum()) for g, d in pairs)
        values, step = [], 1e-9  # smaller than the distance to the next kink of a maximum
        with torch.no_grad():
            for factor in (step, -2 * step):
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=factor)
                values.append(float(loss()))
        return (values[0] - values[1]) / (2 * step), expected

    return slope_and_gradient


@pytest.fixture(scope="session")
def images():
    def images(batch=2, height=40, width=64, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64)

    return images
