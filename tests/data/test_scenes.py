"""Generated rooms and streets: exact where another road can check them, learnable, not trivial."""

import math

import numpy as np
import pytest
import torch

from dbmtl.data import raycast, scenes
from dbmtl.data.raycast import Dice, camera
from dbmtl.data.scenes import office_images, rooms, streets

SIZE = (36, 48)


@pytest.fixture(scope="module")
def many():
    return rooms(260, SIZE, seed=1)


@pytest.fixture(scope="module")
def roads():
    return streets(60, (48, 96), seed=1)


# ------------------------------------------------------------------------------------------ formats


def test_room_formats(many):
    assert {name: (value.dtype, tuple(value.shape)) for name, value in many.items()} == {
        "image": (torch.uint8, (260, 3, *SIZE)),
        "label": (torch.uint8, (260, *SIZE)),
        "depth": (torch.int16, (260, *SIZE)),
        "normal": (torch.int8, (260, 3, *SIZE)),
    }
    assert all(value.is_contiguous() for value in many.values())
    depth = many["depth"][many["depth"] != 0] * scenes.ROOM_DEPTH_UNIT
    assert 0.7 <= depth.min() < 1.5 and 4 < depth.max() <= 10 and 2 < depth.mean() < 4
    assert set(many["label"].unique().tolist()) == {*range(13), 255}


def test_street_formats(roads):
    assert {name: (value.dtype, tuple(value.shape)) for name, value in roads.items()} == {
        "image": (torch.uint8, (60, 3, 48, 96)),
        "label": (torch.uint8, (60, 48, 96)),
        "depth": (torch.int16, (60, 48, 96)),
    }
    assert set(roads["label"].unique().tolist()) == {*range(7), 255}
    inverse = roads["depth"][roads["depth"] != 0] * scenes.STREET_DEPTH_UNIT
    assert 1 / 260 < inverse.min() and inverse.max() < 1 / 3
    assert (roads["depth"][roads["label"] == 4] == 0).all(), "the sky has a depth"
    assert 0.1 < (roads["depth"] == 0).float().mean() < 0.4


def test_classes_are_named_in_the_order_of_their_numbers():
    assert len(scenes.ROOM_CLASSES) == 13 and sorted(scenes.ROOM_CLASSES) == list(
        scenes.ROOM_CLASSES
    )
    assert len(scenes.STREET_CLASSES) == 7


@pytest.mark.parametrize(("name", "number", "down"), [("floor", 4, True), ("ceiling", 2, False)])
def test_floor_is_below_and_ceiling_above(many, name, number, down):
    assert scenes.ROOM_CLASSES[number] == name
    mask = (many["label"] == number) & (many["depth"] > 0)
    normal = many["normal"].permute(0, 2, 3, 1)[mask].float()
    assert len(normal) and ((normal[:, 1] < -100) if down else (normal[:, 1] > 100)).all()


def test_every_class_appears_in_a_decent_share_of_the_scenes(many, roads):
    for labels, count, least in (many["label"], 13, 0.2), (roads["label"], 7, 0.6):
        for number in range(count):
            share = (labels == number).flatten(1).any(1).float().mean()
            assert share > least, (number, share)


def test_voids_and_holes_are_few_but_there(many, roads):
    for labels in many["label"], roads["label"]:
        assert 0.005 < (labels == 255).float().mean() < 0.15
        assert (labels == 255).flatten(1).float().mean(1).max() < 0.5
    assert 0.0005 < (many["depth"] == 0).float().mean() < 0.05


def test_normals_are_units_that_face_the_camera(many):
    normal, valid = many["normal"].float(), many["depth"] != 0
    length = normal.norm(dim=1)
    assert (length[valid] - 127).abs().max() <= 0.5 * math.sqrt(3) + 1e-3
    assert (length[~valid] == 0).all()
    wide = math.tan(0.55)  # any field of view that the rooms have differs little from this one
    v, u = torch.meshgrid(*(2 * (torch.arange(n) + 0.5) / n - 1 for n in SIZE), indexing="ij")
    rays = torch.stack([u * wide, v * wide * SIZE[0] / SIZE[1], torch.ones(SIZE)])
    cosine = (normal * rays).sum(1) / (length * rays.norm(dim=0)).clamp(min=1)
    assert (cosine[valid] < 0.1).all() and (cosine[valid] < 0).float().mean() > 0.999


# -------------------------------------------------------------------------------------------- seeds


@pytest.mark.full
@pytest.mark.parametrize(("make", "size"), [(rooms, (17, 23)), (streets, (20, 33))])
def test_a_scene_does_not_depend_on_how_many_there_are(make, size):
    large = make(700, size, seed=3)
    for count in (1, 5, 640):
        small = make(count, size, seed=3)
        for name in large:
            assert torch.equal(small[name], large[name][:count]), (name, count)
    assert not torch.equal(make(1, size, seed=4)["image"], large["image"][:1])
    assert len({image.numpy().tobytes() for image in large["image"]}) == 700


def test_global_seeds_do_not_matter_and_are_left_alone():
    torch.manual_seed(0)
    first = rooms(1, (8, 12))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(rooms(1, (8, 12))["image"], first["image"])
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_scenes_is_a_clear_answer():
    with pytest.raises(ValueError, match="count.*0"):
        rooms(0, SIZE)
    with pytest.raises(ValueError, match="size"):
        streets(1, (0, 4))


# ----------------------------------------------------------------------------------------- geometry


def test_depth_of_a_plane_lies_on_it(many):
    """Depth and normal agree: n . (z d) is one number on a wall, for the best field of view."""
    v, u = torch.meshgrid(*(2 * (torch.arange(n) + 0.5) / n - 1 for n in SIZE), indexing="ij")
    fitted = []
    for scene in range(12):
        z = many["depth"][scene] * scenes.ROOM_DEPTH_UNIT
        normal = many["normal"][scene].permute(1, 2, 0).float() / 127
        groups = []
        for number in (4, 11):  # the floor is one plane, a wall each normal that many pixels share
            mask = (many["label"][scene] == number) & (z > 0)
            kinds, counts = normal[mask].unique(dim=0, return_counts=True)
            groups += [
                mask & (normal == kind).all(-1)
                for kind, n in zip(kinds, counts, strict=True)
                if n > 100
            ]

        def spread(wide, z=z, normal=normal, groups=groups):
            rays = torch.stack([u * wide, v * wide * SIZE[0] / SIZE[1], torch.ones(SIZE)], -1)
            offset = (normal * rays).sum(-1) * z
            return max(offset[group].std().item() for group in groups)

        wide = min((math.tan(angle / 2) for angle in np.linspace(0.85, 1.2, 71)), key=spread)
        fitted.append(spread(wide))
        # metres: a normal in steps of 1/127 at some metres
        assert fitted[-1] < 0.015, (scene, fitted[-1])
    assert len(fitted) == 12


def test_differences_of_depth_show_the_normal():
    """Where three pixels share a face the cross product of their differences is its normal."""
    dice = Dice([(0, 0)], 400)
    bodies, pose, light = scenes._room(dice, 1)
    size = (90, 120)
    seen = raycast.render(dice, bodies, pose, size, light, 255)
    wide = camera(*pose, size).slope
    v, u = torch.meshgrid(*(2 * (torch.arange(n) + 0.5) / n - 1 for n in size), indexing="ij")
    rays = torch.stack([u * wide, v * wide * size[0] / size[1], torch.ones(size)])
    points = (rays * seen["depth"][0]).double()
    normal = seen["normal"][0].double()
    across = points[:, :-1, 1:] - points[:, :-1, :-1]
    down = points[:, 1:, :-1] - points[:, :-1, :-1]
    crossed = torch.nn.functional.normalize(torch.linalg.cross(down, across, dim=0), dim=0)
    crossed = crossed * torch.where((crossed * rays[:, :-1, :-1]).sum(0) > 0, -1, 1)
    cosine = (crossed * normal[:, :-1, :-1]).sum(0)
    label = seen["label"][0]
    same = (label[:-1, :-1] == label[1:, :-1]) & (label[:-1, :-1] == label[:-1, 1:])
    n = normal[:, :-1, :-1]
    for other in (normal[:, 1:, :-1], normal[:, :-1, 1:]):
        same &= (n * other).sum(0) > 0.99999
    assert same.float().mean() > 0.6
    assert (cosine[same] > 0.999).double().mean() > 0.97  # the rest: two parallel faces


# ---------------------------------------------------------------------------------------- learnable


def features(image, width=120):
    """Blocks of 5x5 pixels, the means of larger ones and the place, through fixed random units."""
    image = image.float() / 255
    blocks = torch.nn.functional.unfold(image, 5, padding=2).unflatten(-1, image.shape[-2:])
    wide = [
        torch.nn.functional.avg_pool2d(image, k, 1, k // 2, count_include_pad=False)
        for k in (9, 17)
    ]
    v, u = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in image.shape[-2:]), indexing="ij")
    place = torch.stack([u, v, u * v, u**2, v**2, v**3, v**4]).expand(len(image), -1, -1, -1)
    mean = image.mean((2, 3), keepdim=True).expand(-1, -1, *image.shape[-2:])
    x = torch.cat([blocks, *wide, mean, place], 1).movedim(1, -1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(x.shape[-1], width, generator=generator) / x.shape[-1] ** 0.5
    hidden = (x @ weight * 3 + torch.randn(width, generator=generator)).relu()
    return torch.cat([x, hidden, torch.ones_like(x[..., :1])], -1)


def ridge(x, y):
    gram = (x.T @ x).double()
    return torch.linalg.solve(
        gram + 1e-4 * len(x) * torch.eye(len(gram)), (x.T @ y).double()
    ).float()


class Small(torch.nn.Module):
    """Five layers, two of them at half size: 13 scores, a depth, a normal."""

    def __init__(self, width=20):
        super().__init__()

        def layer(inputs, outputs, dilation=1):
            convolution = torch.nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)
            return torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(outputs), torch.nn.ReLU())

        self.first = layer(5, width)
        self.second = layer(width, 2 * width)
        self.wide = torch.nn.Sequential(
            layer(2 * width, 2 * width, 2), layer(2 * width, 2 * width, 4)
        )
        self.last = torch.nn.Conv2d(3 * width, 17, 1)

    def forward(self, image):
        place = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in image.shape[-2:]), indexing="ij")
        place = torch.stack(place).expand(len(image), -1, -1, -1)
        fine = self.first(torch.cat([image.float() / 255 - 0.5, place], 1))
        coarse = self.wide(self.second(torch.nn.functional.max_pool2d(fine, 2)))
        coarse = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")
        return self.last(torch.cat([fine, coarse], 1)).split([13, 1, 3], 1)


@pytest.mark.full
def test_rooms_can_be_learned_and_are_not_trivial(many):
    torch.manual_seed(0)
    image, label = many["image"], many["label"].long()
    depth, normal = many["depth"] * 1e-3, many["normal"].float() / 127
    network, steps = Small(), 120
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    cosine = torch.nn.functional.cosine_similarity
    for _ in range(steps):
        index = torch.randint(0, 200, (8,))
        valid = depth[index] > 0
        scores, distance, direction = network(image[index])
        loss = torch.nn.functional.cross_entropy(scores, label[index], ignore_index=255)
        loss = loss + (distance[:, 0] + 2.5 - depth[index])[valid].abs().mean()
        loss = loss + 1 - cosine(direction, normal[index])[valid].mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    with torch.no_grad():
        scores, distance, direction = network.eval()(image[200:])

    def angle(prediction):
        return cosine(prediction, normal[200:])[valid].clamp(-1, 1).acos().rad2deg().mean().item()

    truth, valid = label[200:], depth[200:] > 0
    measured = depth[:200][depth[:200] > 0]
    right = (scores.argmax(1) == truth)[truth < 255].float().mean().item()
    most = label[:200][label[:200] < 255].bincount().argmax()
    majority = (truth == most)[truth < 255].float().mean().item()
    assert majority + 0.12 < right < 0.95, (majority, right)
    error = (distance[:, 0] + 2.5 - depth[200:])[valid].abs().mean().item()
    floor = (depth[200:][valid] - measured.mean()).abs().mean().item()
    assert 0.1 * floor < error < 0.85 * floor, (floor, error)
    error = angle(direction)
    floor = angle(normal[:200].mean((0, 2, 3))[None, :, None, None])
    assert 0.1 * floor < error < 0.8 * floor, (floor, error)


def test_color_alone_does_not_tell_the_class(many):
    """The best class for each of 512 colors, learned on the test scenes themselves."""
    judged = many["label"] != 255
    image = many["image"].movedim(1, -1)[judged].long() // 32
    table = torch.zeros(512, 13)
    color = image @ torch.tensor([64, 8, 1])
    truth = many["label"][judged].long()
    table.index_put_((color, truth), torch.ones(len(image)), accumulate=True)
    recall = [(table.argmax(1)[color] == c)[truth == c].float().mean().item() for c in range(13)]
    assert np.mean(recall) < 0.35, recall


@pytest.mark.full
def test_streets_can_be_learned_and_are_not_trivial(roads):
    x = features(roads["image"][:45])
    new = features(roads["image"][45:])
    label, truth = roads["label"][:45], roads["label"][45:]
    labelled, judged = label != 255, truth != 255
    one_hot = torch.nn.functional.one_hot(label[labelled].long(), 7).float()
    weight = ridge(x[labelled], one_hot)
    right = ((new @ weight).argmax(-1) == truth)[judged].float().mean().item()
    most = label[labelled].long().bincount().argmax()
    majority = (truth[judged] == most).float().mean().item()
    assert majority + 0.2 < right < 0.97, (majority, right)
    depth = roads["depth"][:45].float()
    truth = roads["depth"][45:].float()
    measured, judged = depth > 0, truth > 0
    predicted = (new @ ridge(x[measured], depth[measured][:, None] / 1e4))[..., 0] * 1e4
    error = (predicted - truth)[judged].abs().mean().item()
    floor = (truth[judged] - depth[measured].mean()).abs().mean().item()
    assert 0.05 * floor < error < 0.7 * floor, (floor, error)


# ------------------------------------------------------------------------------------------- office


def test_office_images_formats_and_seeds():
    domains = office_images(40, ("amazon", "dslr", "webcam"), classes=31, size=(32, 40), seed=2)
    assert list(domains) == ["amazon", "dslr", "webcam"]
    for images, labels in domains.values():
        assert images.dtype == torch.uint8 and images.shape == (40, 3, 32, 40)
        assert labels.dtype == torch.int64 and labels.tolist() == [i % 31 for i in range(40)]
    fewer = office_images(7, ("amazon", "dslr"), classes=31, size=(32, 40), seed=2)
    assert torch.equal(fewer["dslr"][0], domains["dslr"][0][:7])
    other = office_images(7, ("amazon",), 31, (32, 40), seed=3)
    assert not torch.equal(other["amazon"][0], fewer["amazon"][0])
    for wrong in (0, 73):
        with pytest.raises(ValueError, match=str(wrong)):
            office_images(1, ("amazon",), classes=wrong)


def test_office_domains_look_different():
    domains = office_images(30, ("a", "b", "c", "d"), classes=5, size=(32, 32)).values()
    means = torch.stack([images.float().mean((0, 2, 3)) for images, _ in domains])
    spread = torch.stack([images.float().std() for images, _ in domains])
    assert means[0].min() > means[1].max()
    assert means[3].min() > means[0].max()
    assert spread[2] < spread[1]


def test_office_classes_have_as_many_lobes_as_they_say():
    """Independent road: the Fourier transform of the outline about its center counts the lobes."""
    images, labels = office_images(120, ("product",), classes=6, size=(64, 64))["product"]
    v, u = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    right = []
    for image, label in zip(images.float(), labels.tolist(), strict=True):
        mask = (image.min(0).values < 215).double()
        y = v - (mask * v).sum() / mask.sum()
        x = u - (mask * u).sum() / mask.sum()
        angle = torch.atan2(y, x)
        waves = torch.arange(2, 9).double()
        power = [
            ((mask * torch.exp(1j * k * angle)).sum().abs() / mask.sum()).item() for k in waves
        ]
        guess = 0 if max(power) < 0.05 else int(waves[int(np.argmax(power))])
        right.append(guess == (0, 3, 4, 5, 6, 2)[label])
    assert np.mean(right) > 0.9
