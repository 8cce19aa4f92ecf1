"""The ray caster against slow roads: a march along the ray, gradients of surfaces, no windows."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dbmtl.data import raycast
from dbmtl.data.raycast import BOX, CYLINDER, ELLIPSOID, Bodies, camera, first_hit


def random_bodies(seed, count=24):
    """Bodies of all kinds before one camera, and the same as a list for the slow road."""
    rng = np.random.default_rng(seed)
    bodies, plain = Bodies(1), []
    bodies.add(BOX, 0, (0, 2, 5), (20, 0.5, 20), [1.0] * 3)
    plain.append((BOX, (0, 2, 5), (20, 0.5, 20), (0, 0, 0, 0)))
    for _ in range(count):
        kind = int(rng.choice([BOX, ELLIPSOID, CYLINDER]))
        frame = tuple(float(v) for v in rng.uniform((-2, -1, 2, -3), (2, 1, 8, 3)))
        center = tuple(float(v) for v in rng.uniform(-0.5, 0.5, 3))
        half = tuple(float(v) for v in rng.uniform(0.1, 0.7, 3))
        bodies.add(kind, len(plain), center, half, [0.5] * 3, frame=bodies.frame(*frame))
        plain.append((kind, center, half, frame))
    return bodies, plain


def outside(body, points):
    """How far outside a body points are, in its own measure: 0 on its surface, negative inside."""
    kind, center, half, (x, y, z, yaw) = body
    moved = points - np.array([x, y, z])
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    p = (moved @ turn - center) / half
    if kind == BOX:
        return np.abs(p).max(1) - 1
    if kind == ELLIPSOID:
        return np.sqrt((p**2).sum(1)) - 1
    return np.maximum(np.sqrt(p[:, 0] ** 2 + p[:, 2] ** 2), np.abs(p[:, 1])) - 1


def cast(bodies, size, angles=(0.2, 0.1, 0.05), field=1.0):
    view = camera(torch.tensor([field]), *(torch.tensor([a]) for a in angles), size)
    table = bodies.table()
    depth, which = first_hit(bodies, table, view, size)
    return view, table, depth, which


def slow_ray(plain, ray, far=30.0, steps=3000):
    """March along one ray in small steps until a body holds the point, then halve the step."""
    z = np.linspace(0.2, far, steps)
    inside = np.stack([outside(body, z[:, None] * ray) < 0 for body in plain])
    if not inside.any():
        return None
    step = inside.any(0).argmax()
    number = inside[:, step].argmax()
    low, high = z[max(step - 1, 0)], z[step]
    for _ in range(40):
        middle = (low + high) / 2
        if outside(plain[number], middle * ray[None])[0] < 0:
            high = middle
        else:
            low = middle
    return high, number


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4))
def test_first_hit_is_that_of_a_slow_march_along_the_ray(seed):
    bodies, plain = random_bodies(seed)
    view, _, depth, which = cast(bodies, (20, 30))
    later, kinds = 0, set()
    for pixel in range(0, 600, 7):
        march = slow_ray(plain, view.rays[0, :, pixel].double().numpy())
        if march is None:
            assert depth[0, pixel] == math.inf or depth[0, pixel] > 29
            continue
        march_depth, number = march
        if abs(march_depth - depth[0, pixel].item()) > 1e-4 * march_depth:
            later += 1  # a corner thinner than a step: only then may the march come later
            assert march_depth > depth[0, pixel]
        else:
            kinds.add(plain[which[0, pixel]][0])
            assert number == which[0, pixel]
    assert later <= 2 and kinds == {BOX, ELLIPSOID, CYLINDER}


@pytest.mark.parametrize("seed", range(4))
def test_no_body_is_missed_outside_its_window(seed, monkeypatch):
    bodies, _ = random_bodies(seed, count=40)
    for angles in (0.2, 0.1, 0.05), (-1.0, 0.4, -0.3), (2.5, -0.5, 0.5):
        _, table, depth, which = cast(bodies, (40, 60), angles, field=1.4)

        def everything(table, rotation, slope, size):
            zero = torch.zeros(table.shape[1:], dtype=torch.long)
            return torch.stack([zero, zero + size[0], zero, zero + size[1]])

        with monkeypatch.context() as patch:
            patch.setattr(raycast, "_windows", everything)
            _, _, whole, whole_which = cast(bodies, (40, 60), angles, field=1.4)
        assert_close(depth, whole)
        assert (which == whole_which).float().mean() > 0.999


@pytest.mark.parametrize("seed", range(3))
def test_normals_are_the_gradients_of_the_surface(seed):
    bodies, plain = random_bodies(seed)
    view, table, depth, which = cast(bodies, (20, 30))
    seen = raycast.surface(table, view.rays, torch.where(depth < 29, depth, 1.0), which)
    agree = 0
    pixels = torch.nonzero(depth[0] < 29)[::5, 0].tolist()
    for pixel in pixels:
        body = plain[which[0, pixel]]
        point = (view.rays[0, :, pixel] * depth[0, pixel]).double().numpy()
        step = 1e-4
        shifts = np.concatenate([np.eye(3), -np.eye(3)]) * step
        value = outside(body, point + shifts)
        gradient = (value[:3] - value[3:]) / (2 * step)
        if np.isclose(outside(body, point[None])[0], 0, atol=1e-4):
            normal = seen.normal[:, 0, pixel].double().numpy()
            agree += gradient @ normal / np.linalg.norm(gradient) > 0.999
    assert agree > 0.93 * len(pixels)  # an edge is between two normals
