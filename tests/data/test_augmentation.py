"""Crops, scales and flips against slices and the geometry of planes; the split that draws them."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from dbmtl.benchmarks.base import Benchmark, Data, Scale
from dbmtl.benchmarks.dense_prediction import angle_degrees, dense_floors, dense_tasks, depth_loss
from dbmtl.data.augmentation import DenseSplit, random_crop_scale, random_flip
from dbmtl.experiments.loop import Loop, load_loop_state, loop_state


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def some_batch(count=6, size=(24, 32), seed=0):
    g, (H, W) = gen(seed), size
    depth = 1 + 8 * torch.rand(count, 1, H, W, generator=g)
    normal = F.normalize(torch.randn(count, 3, H, W, generator=g), dim=1)
    hole = torch.rand(count, 1, H, W, generator=g) < 0.2
    return {
        "image": torch.rand(count, 3, H, W, generator=g),
        "label": torch.tensor([0, 2, 6, 255], dtype=torch.uint8)[
            torch.randint(4, (count, H, W), generator=g)
        ],
        "depth": depth.masked_fill(hole, 0),
        "normal": normal.masked_fill(hole, 0),
    }


def draws(count, size, scales, seed):
    """Number of the source pixel [B, H, W] and scale [B] of the draw that this seed makes."""
    number = torch.arange(math.prod(size)).view(1, *size).expand(count, *size)
    batch = {"label": number, "depth": torch.ones(count, 1, *size)}
    crop = random_crop_scale(batch, scales, gen(seed))
    return crop["label"], 1 / crop["depth"][:, 0, 0, 0]


# ----------------------------------------------------------------------------------- crop and scale


@pytest.mark.parametrize("size", [(24, 32), (72, 96), (33, 47), (5, 3)])
@pytest.mark.parametrize("scales", [(1, 1.2, 1.5), (1,), (1.7, 3)])
def test_each_sample_is_a_slice_resized(size, scales):
    batch = some_batch(8, size)
    result = random_crop_scale(batch, scales, gen(5))
    source, drawn = draws(8, size, scales, 5)
    for b in range(8):
        s = min(scales, key=lambda s: abs(s - float(drawn[b])))
        h = int(size[0] / s)
        w = int(size[1] / s)
        i, j = divmod(int(source[b, 0, 0]), size[1])
        assert 0 <= i <= size[0] - h and 0 <= j <= size[1] - w
        crop = {name: x[b : b + 1, ..., i : i + h, j : j + w] for name, x in batch.items()}
        rows = np.arange(size[0]) * h // size[0]
        columns = np.arange(size[1]) * w // size[1]
        for name in ("label", "depth", "normal"):
            chosen = crop[name].numpy()[..., rows[:, None], columns[None, :]][0]
            if name == "depth":
                assert_close(result[name][b], torch.from_numpy(chosen) / s)
            else:
                assert np.array_equal(result[name][b].numpy(), chosen)
        image = F.interpolate(crop["image"], size=size, mode="bilinear", align_corners=True)[0]
        assert_close(result["image"][b], image, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(72, 96), (128, 256), (288, 384)])
def test_nearest_is_that_of_mtans_interpolate(size):
    batch = {"normal": torch.rand(6, 3, *size, generator=gen())}
    result = random_crop_scale(batch, generator=gen(1))["normal"]
    source, drawn = draws(6, size, (1, 1.2, 1.5), 1)
    assert len(drawn.round(decimals=1).unique()) == 3
    for b, s in enumerate(round(s, 1) for s in drawn.tolist()):
        i, j = divmod(int(source[b, 0, 0]), size[1])
        crop = batch["normal"][b : b + 1, :, i : i + int(size[0] / s), j : j + int(size[1] / s)]
        assert torch.equal(result[b], F.interpolate(crop, size=size, mode="nearest")[0])


def test_draws_are_independent_uniform_and_reach_every_corner():
    source, scale = draws(3000, (6, 9), (1, 1.5, 3), 0)
    kinds = scale.round(decimals=1)
    for s, h, w in ((1.0, 6, 9), (1.5, 4, 6), (3.0, 2, 3)):
        first = source[kinds == s, 0, 0]
        assert abs(len(first) / 3000 - 1 / 3) < 0.05
        places = torch.stack([first // 9, first % 9], 1).unique(dim=0, return_counts=True)
        assert len(places[0]) == (6 - h + 1) * (9 - w + 1)  # all of them
        assert places[0].max(0).values.tolist() == [6 - h, 9 - w]
        assert places[1].min() > 0.5 * len(first) / len(places[0])


def test_nothing_is_blended_but_colors():
    batch = some_batch(4, (33, 47))
    crop = random_crop_scale(batch, generator=gen(2))
    _, scale = draws(4, (33, 47), (1, 1.2, 1.5), 2)
    assert set(crop["label"].unique().tolist()) <= {0, 2, 6, 255}
    assert crop["label"].dtype == torch.uint8
    for b in range(4):
        depths = batch["depth"][b].flatten()
        normals = batch["normal"][b].flatten(1).T
        back = crop["depth"][b].flatten() * scale[b]
        assert (back[:, None] - depths[None]).abs().min(1).values.max() < 1e-5
        chosen = crop["normal"][b].flatten(1).T
        assert (chosen[:, None] - normals[None]).abs().amax(2).min(1).values.max() == 0
    invalid = crop["depth"][:, 0] == 0
    assert invalid.any() and torch.equal(invalid, ~crop["normal"].any(1))


def test_fields_move_together():
    number = torch.arange(24 * 32).view(1, 1, 24, 32).expand(6, 1, 24, 32).float()
    batch = {"label": number[:, 0].int(), "depth": number, "normal": number.expand(-1, 3, -1, -1)}
    for change in (random_crop_scale, random_flip):
        result = change(batch, generator=gen(4))
        scale = torch.ones(6)
        if change is random_crop_scale:
            _, scale = draws(6, (24, 32), (1, 1.2, 1.5), 4)
        assert torch.equal(result["normal"][:, 1], result["label"].float())
        assert_close(result["depth"][:, 0] * scale[:, None, None], result["label"].float())


def test_colors_stay_near_the_pixels_that_are_chosen():
    ramp = torch.arange(96.0).expand(6, 3, 72, 96)
    crop = random_crop_scale({"image": ramp, "normal": ramp}, generator=gen(3))
    assert 0.1 < (crop["image"] - crop["normal"]).abs().max() <= 1.01


def test_inverse_depth_is_multiplied():
    batch = some_batch(6)
    near = {"depth": (1 / batch["depth"]).nan_to_num(posinf=0)}
    depth = random_crop_scale({"depth": batch["depth"]}, generator=gen(1))["depth"]
    inverse = random_crop_scale(near, generator=gen(1), inverse_depth=True)["depth"]
    assert torch.equal(depth == 0, inverse == 0) and (depth > 0).any()
    assert_close((depth * inverse)[depth > 0], torch.ones_like(depth)[depth > 0])


# ------------------------------------------------------------------------------------------- planes


def rays(size, focal):
    y, x = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in size], indexing="ij")
    return torch.stack(
        [(x - (size[1] - 1) / 2) / focal, (y - (size[0] - 1) / 2) / focal, torch.ones_like(x)]
    )


def roof(size=(36, 48), focal=50.0):
    """Two slanted planes that meet in front of the camera: their depth and normals."""
    r = rays(size, focal)
    planes = F.normalize(
        torch.tensor([[0.6, 0.1, -1.0], [-0.4, 0.2, -1.0]], dtype=torch.float64), dim=1
    )
    depths = -4 / torch.einsum("pc,chw->phw", planes, r)
    depth, which = depths.min(0)
    return depth[None], planes[which].movedim(-1, 0)


def test_a_planes_depth_and_normals_fit_after_crop_and_scale():
    size, focal, n = (36, 48), 50.0, 9
    depth, normal = (x.expand(n, *x.shape) for x in roof(size, focal))
    crop = random_crop_scale({"depth": depth, "normal": normal}, generator=gen(7))
    source, scale = draws(n, size, (1, 1.2, 1.5), 7)
    r = rays(size, focal).flatten(1)[:, source.flatten()].view(3, n, *size).movedim(0, 1)
    offset = (crop["normal"] * r).sum(1) * crop["depth"][:, 0]
    assert_close(offset * scale[:, None, None], torch.full_like(offset, -4.0), rtol=1e-6, atol=0)
    assert len(scale.round(decimals=1).unique()) == 3


def from_depth(depth, focal):
    """Normals of depths [B, 1, H, W] by differences, where all neighbors lie on one plane."""
    points = depth * rays(depth.shape[-2:], focal)
    right = points[..., 1:-1, 2:] - points[..., 1:-1, :-2]
    down = points[..., 2:, 1:-1] - points[..., :-2, 1:-1]
    return F.normalize(torch.linalg.cross(down, right, dim=1), dim=1)


def test_normals_of_the_flipped_scene_are_the_flipped_normals():
    depth, normal = (x.expand(8, *x.shape) for x in roof())
    result = random_flip({"depth": depth, "normal": normal}, gen(1))
    inner = result["normal"][..., 1:-1, 1:-1]
    estimated = from_depth(result["depth"], 50.0)
    angle = angle_degrees(estimated, inner)
    ridge = (inner[..., 1:] != inner[..., :-1]).any(1)
    far = F.max_pool2d(F.pad(ridge, (1, 0)).float()[:, None], 5, 1, 2)[:, 0] == 0
    assert far.double().mean() > 0.7 and angle[far].mean() < 1e-5
    flipped = (result["normal"] != normal).flatten(1).any(1)
    assert 1 <= flipped.sum() <= 7
    x_not_negated = angle_degrees(estimated, normal.flip(-1)[..., 1:-1, 1:-1])
    assert x_not_negated[flipped].mean() > 20


# -------------------------------------------------------------------------------------------- flips


def test_flip_reverses_rows_and_the_normals_x():
    batch = some_batch(50)
    result = random_flip(batch, gen(3))
    flipped = (result["image"] != batch["image"]).flatten(1).any(1)
    assert 10 < flipped.sum() < 40
    sign = torch.tensor([-1.0, 1, 1]).view(3, 1, 1)
    for b in range(50):
        for name, x in batch.items():
            expected = x[b]
            if flipped[b]:
                expected = expected.flip(-1)
                if name == "normal":
                    expected = expected * sign
            assert torch.equal(result[name][b], expected)


def test_flipping_twice_is_the_identity():
    batch = some_batch()
    twice = random_flip(random_flip(batch, gen(1)), gen(1))
    assert all(torch.equal(twice[name], x) for name, x in batch.items())


def test_flip_with_probability_one_half():
    ramp = torch.arange(2.0).expand(4000, 1, 1, 2)
    is_flipped = random_flip({"depth": ramp}, gen())["depth"][:, 0, 0, 0] == 1
    assert abs(float(is_flipped.float().mean()) - 0.5) < 0.03


@pytest.mark.parametrize("change", [random_crop_scale, random_flip])
def test_the_batch_that_came_in_is_left_alone(change):
    batch = some_batch()
    before = {name: x.clone() for name, x in batch.items()}
    result = change(batch, generator=gen(1))
    assert list(result) == list(batch)
    for name, x in batch.items():
        assert torch.equal(x, before[name]) and result[name].data_ptr() != x.data_ptr()
        assert (result[name].shape, result[name].dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("change", [random_crop_scale, random_flip])
def test_the_global_generator_is_used_unless_one_is_given(change):
    batch = some_batch()
    state = torch.get_rng_state()
    change(batch, generator=gen())
    assert torch.equal(torch.get_rng_state(), state)
    first = change(batch)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    again = change(batch)
    assert all(torch.equal(first[name], x) for name, x in again.items())


def test_fields_are_checked():
    batch = some_batch()
    for change in (random_crop_scale, random_flip):
        with pytest.raises(ValueError, match="did you mean 'normal'"):
            change({"normals": batch["normal"]})
        with pytest.raises(ValueError, match="height and width differ"):
            change({**batch, "label": batch["label"][:, :-1]})
        with pytest.raises(ValueError, match="batch is empty"):
            change({})
    with pytest.raises(ValueError, match="scales: each must be .* at least 1, got 0.5"):
        random_crop_scale(batch, scales=(0.5, 1))
    with pytest.raises(ValueError, match="scales is empty"):
        random_crop_scale(batch, scales=())
    for name in ("image", "depth"):
        with pytest.raises(ValueError, match=f"'{name}'.*decode"):
            random_crop_scale({name: batch[name].to(torch.int16)})


# ---------------------------------------------------------------------------------------- the split


def store_arrays(count=9, size=(12, 16), seed=0):
    g = np.random.default_rng(seed)
    normal = g.integers(-127, 128, (count, 3, *size)).astype(np.int8)
    normal[:, :, :2] = 0
    arrays = {
        "image": g.integers(0, 256, (count, 3, *size)).astype(np.uint8),
        "label": g.choice(np.array([0, 1, 12, 255], np.uint8), (count, *size)),
        "depth": g.integers(0, 9999, (count, *size)).astype(np.int16),
        "normal": normal,
    }
    return {name: torch.from_numpy(x) for name, x in arrays.items()}


def test_split_decodes_what_a_store_holds():
    arrays = store_arrays()
    index = torch.tensor([7, 0, 7])
    images, targets = DenseSplit(arrays, 0.002).batch(index)
    raw = {name: x.numpy()[[7, 0, 7]].astype(np.float64) for name, x in arrays.items()}
    assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
    assert_close(images.double(), torch.from_numpy(raw["image"] / 255), rtol=1e-6, atol=0)
    assert targets["segmentation"].dtype == torch.uint8
    assert torch.equal(targets["segmentation"], arrays["label"][index])
    meters = torch.from_numpy(raw["depth"] * 0.002)[:, None]
    assert_close(targets["depth"].double(), meters, rtol=1e-6, atol=0)
    length = np.sqrt((raw["normal"] ** 2).sum(1, keepdims=True))
    normal = torch.from_numpy(raw["normal"] / np.maximum(length, 1))
    assert_close(targets["normal"].double(), normal, rtol=1e-5, atol=1e-7)
    assert not targets["normal"][:, :, :2].any()


def test_split_leaves_the_store_alone_and_decodes_only_its_tasks():
    arrays = store_arrays()
    before = {name: x.clone() for name, x in arrays.items()}
    for augment in (False, True):
        split = DenseSplit(arrays, 0.001, dense_tasks(["depth"]), augment)
        assert list(split.batch(torch.arange(3))[1]) == ["depth"]
        assert set(split.arrays) == {"image", "depth"}
        DenseSplit(arrays, 0.001, augment=augment).batch(torch.arange(9))
    assert all(torch.equal(x, before[name]) for name, x in arrays.items()) and len(split) == 9


def test_split_reads_only_the_rows_of_a_batch_from_a_mapped_file(tmp_path):
    count, size = 40_000, (288, 384)  # 13 GB of images that take no space on disk
    mapped = np.memmap(tmp_path / "image.bin", np.uint8, "w+", shape=(count, 3, *size))
    mapped[count - 1] = 51
    depth = torch.ones(1, dtype=torch.int16).expand(count, *size)
    split = DenseSplit({"image": torch.from_numpy(mapped), "depth": depth}, 1.0, ["depth"])
    images, targets = split.batch(torch.tensor([count - 1, 5]))
    assert images[0].unique().tolist() == [pytest.approx(0.2)]
    assert not images[1].any() and targets["depth"].eq(1).all()


@pytest.mark.parametrize("augment", [False, True])
def test_split_on_a_mapped_file_equals_the_split_in_memory(tmp_path, augment):
    arrays, mapped = store_arrays(), {}
    for name, x in arrays.items():
        x.numpy().tofile(tmp_path / name)
        mapped[name] = torch.from_numpy(
            np.memmap(tmp_path / name, x.numpy().dtype, "c", shape=tuple(x.shape))
        )
    batches = []
    for source in (arrays, mapped):
        torch.manual_seed(1)
        batches.append(DenseSplit(source, 0.001, augment=augment).batch(torch.tensor([8, 3, 1])))
    assert_close(batches[0], batches[1], rtol=0, atol=0)


def test_augmented_split_crops_then_flips_with_the_global_generator():
    arrays = store_arrays()
    plain = DenseSplit(arrays, 0.001)
    split = DenseSplit(arrays, 0.001, augment=True)
    torch.manual_seed(3)
    images, targets = split.batch(torch.arange(9))
    whole, truth = plain.batch(torch.arange(9))
    torch.manual_seed(3)
    batch = {
        "image": whole,
        "label": truth["segmentation"],
        "depth": truth["depth"],
        "normal": truth["normal"],
    }
    expected = random_flip(random_crop_scale(batch))
    assert torch.equal(images, expected["image"])
    assert torch.equal(targets["segmentation"], expected["label"])
    assert torch.equal(targets["depth"], expected["depth"])
    assert torch.equal(targets["normal"], expected["normal"])


def test_the_crops_of_a_task_do_not_depend_on_the_other_tasks():
    arrays, depths = store_arrays(), []
    for tasks in (["depth"], ["segmentation", "depth", "normal"]):
        torch.manual_seed(3)
        _, targets = DenseSplit(arrays, 0.001, tasks, augment=True).batch(torch.arange(9))
        depths.append(targets["depth"])
    assert torch.equal(*depths)


def test_split_with_inverse_depth():
    arrays, depths = store_arrays(), []
    for inverse in (False, True):
        torch.manual_seed(3)
        split = DenseSplit(arrays, 1.0, ["depth"], True, inverse_depth=inverse)
        depths.append(split.batch(torch.arange(9))[1]["depth"])
    ratio = (depths[1] / depths[0])[depths[0] > 0].sqrt()
    assert set(ratio.double().mul(10).round().div(10).unique().tolist()) == {1.0, 1.2, 1.5}


def test_splits_are_checked():
    arrays = store_arrays()
    with pytest.raises(ValueError, match="no 'normal'; it has"):
        DenseSplit({name: arrays[name] for name in ("image", "label")}, 0.001, ["normal"])
    with pytest.raises(ValueError, match="'depth'.*has 4 samples"):
        DenseSplit({**arrays, "depth": arrays["depth"][:4]}, 0.001)
    with pytest.raises(ValueError, match="did you mean 'segmentation'"):
        DenseSplit(arrays, 0.001, ["segmentaton"])
    with pytest.raises(IndexError):
        DenseSplit(arrays, 0.001).batch(torch.tensor([9]))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("image", lambda x: x.float() / 255, r"is torch.float32 .* store has torch.uint8"),
        ("image", lambda x: x[:, :1], r"\[9, 1, 12, 16\], a store has .* \[9, 3, 12, 16\]"),
        ("label", lambda x: x.long() - 1, r"is torch.int64 .* store has torch.uint8.*void is 255"),
        ("label", lambda x: x[:, :6], r"\[9, 6, 16\], a store has .* \[9, 12, 16\]"),
        ("label", lambda x: x[:, None], r"\[9, 1, 12, 16\], a store has .* \[9, 12, 16\]"),
        ("label", lambda x: torch.full_like(x, 255), r"void \(255\) everywhere"),
        ("depth", lambda x: x[:, None], r"\[9, 1, 12, 16\], a store has .* \[9, 12, 16\]"),
        ("depth", lambda x: x / 1000, r"is torch.float32 .* store has torch.int16"),
        ("normal", lambda x: x.movedim(1, -1), r"\[9, 12, 16, 3\], a store has .* \[9, 3,"),
        ("normal", lambda x: x.numpy(), r"is int8 .* store has torch.int8"),
    ],
)
def test_arrays_that_no_store_has_are_refused(name, change, message):
    arrays = store_arrays()
    with pytest.raises(ValueError, match=f"'{name}'.*{message}"):
        DenseSplit({**arrays, name: change(arrays[name])}, 0.001)


def test_voids_are_no_error_while_one_label_is_left():
    arrays = store_arrays()
    arrays["label"][:] = 255
    arrays["label"][8, 3, 4] = 1
    assert len(DenseSplit(arrays, 0.001)) == 9
    arrays["label"][8, 3, 4] = 255
    assert len(DenseSplit(arrays, 0.001, ["depth"])) == 9  # labels are not looked at


def test_moving_a_split_keeps_what_it_is():
    split = DenseSplit(store_arrays(), 0.001, ["depth"], augment=True, inverse_depth=True)
    moved = split.to("meta")
    assert moved.device.type == "meta" and split.device.type == "cpu" and len(moved) == 9
    assert moved.tasks == ["depth"] and moved.augment and moved.inverse_depth
    assert moved.depth_unit == 0.001


def test_floors_ignore_the_augmentation_of_the_training_split():
    arrays = store_arrays()
    tasks = dense_tasks()
    plain = DenseSplit(arrays, 0.001)
    split = DenseSplit(arrays, 0.001, augment=True)
    state = torch.get_rng_state()
    assert dense_floors(tasks, split, plain) == dense_floors(tasks, plain, plain)
    assert split.augment and torch.equal(torch.get_rng_state(), state)


def test_a_resumed_loop_sees_the_same_crops():
    """The loop stores the device's global random state: augmentation needs nothing else."""
    arrays = store_arrays()
    tasks = dense_tasks(["depth"])

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = torch.nn.Conv2d(3, 4, 3, padding=1)
            self.head = torch.nn.Conv2d(4, 1, 1)

        def forward(self, images):
            return {"depth": self.head(self.trunk(images).relu())}

    split = DenseSplit(arrays, 0.001, tasks, augment=True)
    test = DenseSplit(arrays, 0.001, tasks)
    data = Data(split, test, test, "hash")
    scale = Scale(epochs=2, batch_size=4, width=4)
    bench = Benchmark(
        "dense",
        tasks,
        {"smoke": scale},
        lambda *a: data,
        lambda *a: Network(),
        lambda p, s: torch.optim.Adam(p, lr=1e-3),
    )

    def steps(loop, n):
        losses = []
        for _ in range(n):
            if loop.position == loop.steps:
                loop.end_epoch()
            loop.step()
            losses.append(float(loop.losses))
        return losses

    loop = Loop(bench, data, tasks, "EW", 0, scale)
    steps(loop, 2)

    state = copy.deepcopy(loop_state(loop))
    random = torch.get_rng_state()
    rest = steps(loop, 3)
    other = Loop(bench, data, tasks, "EW", 1, scale)
    load_loop_state(other, state)
    torch.set_rng_state(random)
    assert steps(other, 3) == rest
    load_loop_state(other, state)
    torch.manual_seed(99)
    assert steps(other, 3) != rest  # the crops matter


@pytest.mark.cuda
def test_cuda_crops_are_slices_without_a_synchronization():
    batch = {name: x.cuda() for name, x in some_batch(8, (72, 96)).items()}
    random_crop_scale(batch)  # makes the table of sizes
    state = torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = random_flip(random_crop_scale(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_rng_state(state)
    again = random_flip(random_crop_scale(batch))
    assert all(x.is_cuda and torch.equal(x, again[name]) for name, x in result.items())
    number = torch.arange(72 * 96, device="cuda").view(1, 72, 96).expand(8, 72, 96)
    torch.cuda.set_rng_state(state)
    source = random_flip(random_crop_scale({"label": number}))["label"]
    expected = batch["label"].flatten(1).gather(1, source.flatten(1)).view_as(source)
    assert torch.equal(result["label"], expected)


@pytest.mark.cuda
def test_cuda_split_takes_an_index_from_either_side():
    arrays = store_arrays()
    mapped = DenseSplit(arrays, 0.001)
    there = mapped.to("cuda")
    expected = mapped.batch(torch.tensor([5, 2]))
    for split in (mapped, there):
        images, targets = split.batch(torch.tensor([5, 2], device="cuda"))
        assert images.is_cuda and all(y.is_cuda for y in targets.values())
        assert_close(images.cpu(), expected[0])
        assert_close({name: y.cpu() for name, y in targets.items()}, expected[1])
    assert not there.batch(torch.tensor([5, 2]))[0].is_cuda
    assert depth_loss(targets["depth"], targets["depth"]) == 0


@pytest.mark.parametrize("rows", [[7, 2, 4], [0], []])
def test_a_part_of_a_split_has_its_own_samples_and_the_same_arrays(rows):
    whole = DenseSplit(store_arrays(), 0.001)
    part = whole.part(torch.tensor(rows, dtype=torch.long))
    assert len(part) == len(rows) and len(whole) == 9
    assert part.arrays["image"] is whole.arrays["image"]
    every = torch.arange(len(rows))
    assert_close(part.batch(every)[0], whole.batch(torch.tensor(rows, dtype=torch.long))[0])
    if rows:
        with pytest.raises(IndexError):
            part.batch(torch.tensor([len(rows)]))
        again = part.part(torch.tensor([len(rows) - 1])).batch(torch.tensor([0]))[0]
        assert_close(again, whole.batch(torch.tensor(rows[-1:]))[0], rtol=0, atol=0)
        assert part.to("cpu").batch(every)[0].shape == part.batch(every)[0].shape
    part.augment = True
    assert not whole.augment
