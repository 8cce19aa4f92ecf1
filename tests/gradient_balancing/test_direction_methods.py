"""PCGrad, GradVac, GradDrop, IMTL-G, Aligned-MTL and ConFIG from outside: numbers by hand, other routes, edges."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.gramian import gramian
from dbmtl.gradient_balancing.graddrop import GradDrop, GradDropFeatures, batch_signs, sign_masks
from dbmtl.gradient_balancing.imtl_g import (
    IMTLG,
    AlignedMTL,
    ConFIG,
    aligned_weights,
    conflict_free_weights,
    impartial_weights,
)
from dbmtl.gradient_balancing.pcgrad import GradVac, PCGrad, project_conflicts, vaccinate, visits
from dbmtl.registry import make_balancer

D = torch.float64
ON_GRAMIAN = [
    lambda: PCGrad(order="fixed"), lambda: PCGrad(itself=False, eps=0, order="fixed"), lambda: GradVac(order="fixed"),
    IMTLG, ConFIG, AlignedMTL, lambda: AlignedMTL("median", "mean"), lambda: AlignedMTL("rmse"),
]  # fmt: skip
CLOSED = [
    IMTLG,
    ConFIG,
    AlignedMTL,
    lambda: AlignedMTL("median", "mean"),
    lambda: AlignedMTL("rmse"),
]


def name(maker):
    return repr(maker())


def draw(*shape, seed=0, mean=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D) + mean


def rows(*vectors):
    return torch.tensor(vectors, dtype=D)


def gram(G):
    return G @ G.T


# ------------------------------------------------------------------------------------------------- properties of all


@pytest.mark.parametrize("maker", ON_GRAMIAN, ids=name)
@pytest.mark.parametrize("T", [1, 2, 3, 7, 40])
def test_weights_have_shape_are_finite_and_precision_does_not_matter(maker, T):
    G = draw(T, 60, seed=T, mean=0.1)
    M, losses = gram(G), torch.ones(T, dtype=D)
    found = maker()(M, losses)
    assert found.shape == (T,) and found.isfinite().all()
    # an eigenvalue at rounding size could differ; these Gramians are regular
    assert_close(maker()(M.float(), losses.float()).double(), found, rtol=2e-3, atol=2e-4)
    if T == 1:
        assert_close(found, torch.ones(1, dtype=D))


EDGES = {
    "all zero": rows([0, 0], [0, 0], [0, 0]),
    "one zero": rows([1, 2], [0, 0], [-1, 1]),
    "equal": rows([1, 2], [1, 2], [1, 2]),
    "multiples": rows([1, 2], [3, 6], [1e-7, 2e-7]),
    "opposite": rows([1, 2], [-1, -2]),
    "opposite and unequal": rows([1, 2], [-3, -6], [5, 1]),
    "more tasks than dimensions": rows([1, 2], [-3, 1], [5, 1], [0, -1]),
    "extreme": rows([1e10, 0], [1e-10, 1e-10], [0, -1]),
    "tiny": rows([1e-10, 2e-10], [-1e-10, 1e-10]),
    "huge": rows([1e10, 2e10], [-1e10, 1e10]),
}


@pytest.mark.parametrize("maker", ON_GRAMIAN, ids=name)
@pytest.mark.parametrize("case", EDGES)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_edges_are_finite_for_several_steps(maker, case, dtype):
    G, aggregator = EDGES[case], maker()
    for _ in range(3):
        weights = aggregator(gram(G), torch.ones(len(G), dtype=dtype))
        assert weights.isfinite().all() and (weights @ G).isfinite().all()
    if case == "all zero":
        assert_close(weights @ G, torch.zeros(2, dtype=D))
    zero = G.norm(dim=1) == 0
    others = (weights @ G)[None] if not zero.any() else gram_without(maker, G, zero, dtype)
    assert_close(weights @ G, others[0], rtol=1e-6, atol=1e-12)


def gram_without(maker, G, zero, dtype):
    """A task without gradient changes nothing for the others (its own weight aside, and 1/T in a mean)."""
    rest, aggregator = G[~zero], maker()
    if not len(rest):
        return torch.zeros(1, 2, dtype=D)
    for _ in range(3):
        weights = aggregator(gram(rest), torch.ones(len(rest), dtype=dtype))
    factor = len(rest) / len(G) if getattr(aggregator, "reduction", "sum") == "mean" else 1
    return (weights @ rest)[None] * factor


@pytest.mark.parametrize("maker", CLOSED, ids=name)
@pytest.mark.parametrize(
    "case", ["general", "equal", "opposite and unequal", "one zero", "more tasks than dimensions"]
)
def test_closed_forms_are_equivariant_under_permutation(maker, case):
    G = draw(5, 8, seed=3) if case == "general" else EDGES[case]
    order = torch.randperm(len(G), generator=torch.Generator().manual_seed(1))
    losses = torch.ones(len(G), dtype=D)
    assert_close(
        maker()(gram(G[order]), losses), maker()(gram(G), losses)[order], rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("maker", ON_GRAMIAN[1:2] + CLOSED, ids=name)
@pytest.mark.parametrize("factor", [1e-10, 1e-3, 1e10])
def test_weights_do_not_change_when_all_losses_are_rescaled(maker, factor):
    G = draw(4, 9, seed=5)
    assert_close(maker()(gram(factor * G), None), maker()(gram(G), None), rtol=1e-8, atol=1e-10)


def test_bad_arguments_are_named():
    wrong = [
        (lambda: PCGrad(eps=-1.0), "eps"), (lambda: PCGrad(order="x"), "order"),
        (lambda: PCGrad(reduction="x"), "reduction"), (lambda: GradVac(beta=1.5), "beta"),
        (lambda: GradVac(group="layer"), "group"), (lambda: GradVac(update="x"), "update"),
        (lambda: GradVac(eps=float("nan")), "eps"), (lambda: GradVac(order="x"), "order"),
        (lambda: GradDrop(leak=-0.1), "leak"), (lambda: GradDrop(leak=[]), "leak"), (lambda: GradDrop(eps=-1), "eps"),
        (lambda: GradDropFeatures(leak=[0.1, 2]), "leak"), (lambda: GradDropFeatures(eps=-1), "eps"),
        (lambda: IMTLG(rtol=-1), "rtol"), (lambda: ConFIG(rtol=-1), "rtol"), (lambda: AlignedMTL(rtol=-1), "rtol"),
        (lambda: AlignedMTL(scale="max"), "scale"), (lambda: AlignedMTL(reduction="max"), "reduction"),
        (lambda: PCGrad(eps=float("inf")), "eps"), (lambda: PCGrad(eps=None), "eps"),
        (lambda: PCGrad(order=["fixed"]), "order"), (lambda: GradVac(eps=float("inf")), "eps"),
        (lambda: GradVac(beta=None), "beta"), (lambda: GradVac(group=[]), "group"),
        (lambda: GradVac(group=""), "group"), (lambda: GradVac(group=None), "group"),
        (lambda: GradVac(group=[["a"], ["b"]]), "group"), (lambda: GradDrop(leak=None), "leak"),
        (lambda: GradDrop(leak=[None, 0.1]), "leak"), (lambda: GradDrop(leak="ab"), "leak"),
        (lambda: GradDrop(leak=float("nan")), "leak"), (lambda: GradDrop(eps=float("inf")), "eps"),
        (lambda: GradDropFeatures(leak=None), "leak"), (lambda: GradDropFeatures(eps=None), "eps"),
        (lambda: AlignedMTL(scale=["min"]), "scale"), (lambda: AlignedMTL(scale=None), "scale"),
        *((lambda cls=cls, bad=bad: cls(rtol=bad), "rtol")
          for cls in (IMTLG, ConFIG, AlignedMTL) for bad in (float("inf"), float("nan"), None, "1e-7")),
    ]  # fmt: skip
    for make, argument in wrong:
        with pytest.raises(ValueError, match=argument):
            make()


@pytest.mark.parametrize(
    "aggregator",
    [PCGrad(False, 0.5, "fixed", "mean"), GradVac(0.25, ["a", "b"], "below", 0.5, "fixed"), GradDrop(0.5, 0.25),
     GradDropFeatures([0.5, 0.25], 0.125), IMTLG(0.5), ConFIG(0.5), AlignedMTL("rmse", "mean", True, 0.5)],
    ids=lambda a: type(a).__name__,
)  # fmt: skip
def test_repr_evaluates_to_the_same(aggregator):
    again = eval(repr(aggregator), {cls.__name__: cls for cls in [type(aggregator)]})
    assert repr(again) == repr(aggregator)
    hidden = ("memory", "seed", "training")
    plain = {k: v for k, v in vars(aggregator).items() if not k.startswith("_") and k not in hidden}
    assert plain and plain == {k: vars(again)[k] for k in plain}


# ---------------------------------------------------------------------------------------------------- PCGrad, GradVac


def pcgrad_in_vectors(G, order, itself):
    out = []
    for i, path in enumerate(order.tolist()):
        g = G[i]
        for j in path:
            if (itself or i != j) and g @ G[j] < 0:
                g = g - (g @ G[j]) / (G[j] @ G[j]) * G[j]
        out.append(g)
    return torch.stack(out)


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("T", [2, 3, 6, 12])
def test_pcgrad_from_the_gramian_is_pcgrad_on_vectors(T, itself):
    for seed in range(5):
        G, order = draw(T, T, seed=seed, mean=-0.2), visits(T, torch.Generator().manual_seed(seed))
        assert_close(
            project_conflicts(gram(G), order, itself) @ G, pcgrad_in_vectors(G, order, itself)
        )


def test_pcgrad_by_hand():
    G = rows([1, 0], [-1, 1])
    for itself in (True, False):
        assert_close(PCGrad(itself, eps=0)(gram(G), None), torch.tensor([2.0, 1.5], dtype=D))
    # eps enters as in LibMTL: 1 - M12 / (M_tt + eps)
    assert_close(PCGrad(eps=1.0)(gram(G), None), torch.tensor([1 + 1 / 2, 1 + 1 / 3], dtype=D))


def test_pcgrad_passes_over_a_gradient_whose_square_underflows():
    M = rows([1, -1e-200], [-1e-200, 0])
    assert_close(PCGrad(eps=0)(M, None), torch.ones(2, dtype=D))


def test_pcgrad_own_visit_matters_from_three_tasks_on():
    G = rows([1, -3], [0, 1], [-1, 1])
    order = torch.tensor([[1, 2, 0], [0, 1, 2], [0, 1, 2]])
    assert_close(project_conflicts(gram(G), order, False)[0] @ G, torch.tensor([0.5, 0.5], dtype=D))
    assert_close(project_conflicts(gram(G), order, True)[0] @ G, torch.tensor([0.6, 0.2], dtype=D))


def test_pcgrad_mean_over_all_orders_is_equivariant():
    G, orders = draw(3, 4, seed=2, mean=-0.3), list(itertools.permutations(range(3)))

    def mean(
        G,
    ):  # each task's order is its own, so the mean over all of them can be taken task by task
        tables = [torch.tensor([path] * 3) for path in orders]
        return sum(project_conflicts(gram(G), table) for table in tables).sum(0) / len(orders)

    assert_close(mean(G[[2, 0, 1]]), mean(G)[[2, 0, 1]])


def test_pcgrad_one_rescaled_loss_rescales_its_own_row_alone():
    G, scale = draw(5, 5, seed=1, mean=-0.2), torch.tensor([1, 1e4, 1e-4, 3, 1], dtype=D)[:, None]
    assert_close(
        project_conflicts(gram(scale * G), visits(5)) @ (scale * G),
        scale * (project_conflicts(gram(G), visits(5)) @ G),
    )


def test_random_orders_are_uniform_seeded_and_saved():
    generator = torch.Generator().manual_seed(0)
    first = torch.cat([visits(3, generator) for _ in range(400)])[:, 0]
    assert (torch.bincount(first) - 400).abs().max() < 100  # six standard errors
    G = draw(6, 6, seed=4, mean=-0.4)
    a, b, other = PCGrad(seed=5), PCGrad(seed=5), PCGrad(seed=6)
    assert_close(a(gram(G), None), b(gram(G), None), rtol=0, atol=0)
    assert not torch.equal(other(gram(G), None), PCGrad(seed=5)(gram(G), None))
    fresh = PCGrad()
    fresh.load_state_dict(a.state_dict())
    ahead = [a(gram(G), None) for _ in range(3)]
    assert_close([fresh(gram(G), None) for _ in range(3)], ahead, rtol=0, atol=0)
    assert not torch.equal(ahead[0], ahead[1])


def test_gradvac_reaches_the_usual_cosine():
    G, rho = rows([1, 0], [0, 1]), torch.full((2, 2), 0.6, dtype=D)
    C, after = vaccinate(gram(G), visits(2), rho, beta=0.25)
    assert_close(C, torch.tensor([[1, 0.75], [0.75, 1]], dtype=D))
    assert_close(after, torch.tensor([[0.6, 0.45], [0.45, 0.6]], dtype=D))
    assert_close(torch.cosine_similarity(C @ G, G.flip(0)), torch.full((2,), 0.6, dtype=D))


def test_gradvac_update_below_learns_from_corrected_pairs_alone():
    G, rho = rows([1, 0], [1, 1]), torch.zeros(2, 2, dtype=D)
    assert_close(vaccinate(gram(G), visits(2), rho, update="below")[1], rho)
    assert_close(vaccinate(gram(G), visits(2), rho)[1][0, 1].item(), 0.5 * 0.5**0.5)
    G = rows([1, 0], [-1, 1])
    assert_close(
        vaccinate(gram(G), visits(2), rho, update="below")[1][0, 1].item(), -0.5 * 0.5**0.5
    )


def test_gradvac_sees_each_pair_as_left_by_the_visit_before():
    G = rows(
        [1, 0, 0], [-1, 1, 0], [-1, 0, 1]
    )  # g1' = (.5, .5, 0) after task 2; its cosine with g3 is -.5
    C, rho = vaccinate(gram(G), visits(3), torch.zeros(3, 3, dtype=D), beta=1.0)
    assert_close(rho[0], torch.tensor([0, -(0.5**0.5), -0.5], dtype=D))
    assert_close(C[0], torch.tensor([1, 0.5, 0.25], dtype=D))


def test_gradvac_groups():
    steps = draw(5, 3, 4, 6, seed=8, mean=-0.1)  # step, tensor, task, coordinate
    tensor, labels = (
        GradVac(group="tensor", order="fixed"),
        GradVac(group=["x", "y", "x"], order="fixed"),
    )
    each = [GradVac(order="fixed") for _ in range(3)]
    x, y = GradVac(order="fixed"), GradVac(order="fixed")
    assert x.at_features and not (tensor.at_features or labels.at_features)
    for grads in steps:
        M = grads @ grads.mT
        assert_close(
            tensor(M, None, [0, 1, 2]),
            torch.stack([a(m, None) for a, m in zip(each, M, strict=True)], 1),
        )
        w = labels(M, None, [0, 1, 2])
        assert_close(w, torch.stack([x(M[0] + M[2], None), y(M[1], None), w[:, 0]], 1))
        assert_close(w[:, 2], w[:, 0])


def test_gradvac_keeps_the_average_of_a_tensor_that_is_missing_for_a_step():
    steps = draw(3, 2, 4, 6, seed=9, mean=-0.1)
    vac, alone = GradVac(group="tensor", order="fixed"), GradVac(order="fixed")
    for grads, where in zip(steps, ([0, 1], [1], [0, 1]), strict=True):
        M = (grads @ grads.mT)[[0, 1] if len(where) == 2 else [1]]
        found = vac(M, None, where)
        if 0 in where:
            assert_close(found[:, 0], alone(M[0], None))


def test_gradvac_state_goes_on_bit_by_bit():
    steps = draw(8, 5, 5, seed=10, mean=-0.3)
    a, b = GradVac(), GradVac()
    for G in steps[:4]:
        a(gram(G), None)
    b.load_state_dict(a.state_dict())
    for G in steps[4:]:
        assert_close(b(gram(G), None), a(gram(G), None), rtol=0, atol=0)


def test_gradvac_zero_and_cancelled_gradients_teach_nothing():
    vac = GradVac(order="fixed")
    vac(gram(rows([1, 0], [1, 1], [0, 2])), None)
    before = vac.memory["rho"]["model"].clone()
    vac(gram(rows([0, 0], [1, 1], [0, 2])), None)
    after = vac.memory["rho"]["model"]
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert_close(after[:, 0], before[:, 0], rtol=0, atol=0)
    assert after[1, 2] != before[1, 2]
    C, rho = vaccinate(
        gram(rows([1, 2, 3], [-1, -2, -3], [0.3, 0, 1])), visits(3), torch.zeros(3, 3, dtype=D)
    )
    assert rho[0, 2] == 0 and C[0, 2] == 0  # task 1 has vanished before it meets task 3


def test_gradvac_first_step_is_pcgrad():
    G = rows([1, 0], [-1, 1])
    assert_close(GradVac(eps=0)(gram(G), None), torch.tensor([2.0, 1.5], dtype=D))
    assert_close(
        GradVac(eps=0, group="tensor")(gram(G)[None], None, [0]),
        torch.tensor([[2.0], [1.5]], dtype=D),
    )


def test_gradvac_opposite_gradients_cancel_and_are_passed_over_whatever_the_rounding():
    for seed in range(100):
        g, third = draw(2, 7, seed=seed)
        G = torch.stack([g, -3 * g, third])
        C, rho = vaccinate(gram(G), visits(3), torch.zeros(3, 3, dtype=D))
        assert_close(C[0] @ G, torch.zeros(7, dtype=D), rtol=0, atol=1e-12)
        assert rho[0, 2] == 0 and C[0, 2] == 0


def test_gradvac_equal_gradients_for_long():
    vac = GradVac(eps=0)
    for _ in range(200):
        weights = vac(torch.ones(3, 3, dtype=D), None)
    assert_close(weights, torch.ones(3, dtype=D))
    assert vac(gram(rows([1, 0], [1, 1], [0, 1])), None).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_gradvac_duplicate_losses_stay_the_sum_in_training(dtype, eps):
    torch.manual_seed(0)
    x, y = torch.randn(64, 5, dtype=dtype), torch.randn(64, 1, dtype=dtype)
    net = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).to(
        dtype
    )
    balancer = make_balancer("GradVac", shared=net, num_tasks=2, seed=0, eps=eps)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        balancer.backward([loss, 3 * loss])
        assert_close(balancer.weights.double(), torch.ones(2, dtype=D), rtol=0, atol=0)
        optimizer.step()


@pytest.mark.parametrize("length", [100, 100_000])
def test_gradvac_float32_multiples_stay_the_sum(length):
    vac = GradVac(eps=0, seed=0)
    for seed in range(60):
        g = draw(length, seed=seed).float()
        assert_close(
            vac(gramian([[g], [3.7 * g]]), torch.ones(2)), torch.ones(2, dtype=D), rtol=0, atol=0
        )


@pytest.mark.parametrize("small", [1e-1, 1e-2, 1e-4, 1e-8])
def test_gradvac_equal_gradients_that_get_short_stay_the_sum(small):
    vac = GradVac()
    for _ in range(40):
        vac(torch.ones(2, 2, dtype=D), None)
    for _ in range(3):
        weights = vac(small**2 * torch.ones(2, 2, dtype=D), None)
        assert_close(weights, torch.ones(2, dtype=D), rtol=0, atol=0)


def test_gradvac_amount_rises_to_a_bound_and_stays_there():
    less = rows([1, 0.9], [0.9, 1])
    found = []
    for k in (1, 5, 10, 20, 40, 53, 54, 60, 300):
        vac = GradVac(eps=0)
        for _ in range(k):
            vac(torch.ones(2, 2, dtype=D), None)
        found.append(vac(less, None)[0].item())
    assert found[0] < found[1] < found[2] < found[3]
    assert found[3:] == pytest.approx([found[-1]] * 6, rel=1e-12)
    target = 1 - 1e-5  # 1 + sin(angle - usual angle) / sin(usual angle)
    bound = (target * (1 - 0.81) ** 0.5 - 0.9 * (1 - target**2) ** 0.5) / (1 - target**2) ** 0.5
    assert found[-1] == pytest.approx(1 + bound, rel=1e-9)
    worst = vaccinate(gram(rows([1, 0], [0, 1e-3])), visits(2), torch.ones(2, 2, dtype=D))[0]
    assert 223e3 < worst[0, 1] < 224e3  # right angle, times the ratio of lengths


def test_gradvac_correction_sets_in_without_a_jump():
    rho = torch.full((2, 2), 1.0, dtype=D)
    for off, largest in ((1e-5, 1e-9), (1e-5 + 6e-8, 4e-3), (1.1e-5, 0.06)):
        C, _ = vaccinate(rows([1, 1 - off], [1 - off, 1]), visits(2), rho)
        assert 0 <= C[0, 1] < largest


def test_gradvac_lengths_at_the_ends_of_the_range_are_finite():
    for M in (
        rows([1e300, 0], [0, 1e-299]),
        rows([1e306, 0], [0, 1e-320]),
        rows([1e-310, 0], [0, 1e-310]),
    ):
        C, rho = vaccinate(M, visits(2), torch.full((2, 2), 1.0, dtype=D))
        assert C.isfinite().all() and rho.isfinite().all()


# ----------------------------------------------------------------------------------------------------------- GradDrop


def test_graddrop_keeps_what_all_agree_on_for_every_random_number():
    for sign in (-1.0, 1.0):
        for u in (0.0, 0.5, 1 - 2**-24):
            masks = sign_masks([torch.tensor([sign]), torch.tensor([3 * sign])], torch.tensor([u]))
            assert torch.stack(masks).all()
    assert not torch.stack(sign_masks([torch.zeros(1)] * 2, torch.zeros(1))).any()


def test_graddrop_random_numbers_do_not_follow_the_default_type():
    g = [[row] for row in draw(3, 200, seed=15)]
    sent, a = [row[0].view(1, -1) for row in g], draw(1, 200, seed=16)
    single = GradDrop(seed=4)(g, None), GradDropFeatures(seed=4)(sent, None, [a] * 3)
    torch.set_default_dtype(D)
    try:
        double = GradDrop(seed=4)(g, None), GradDropFeatures(seed=4)(sent, None, [a] * 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(double, single, rtol=0, atol=0)


def test_graddrop_by_hand():
    G = [[torch.tensor([1.0, 2.0, -1.0, 0.0])], [torch.tensor([2.0, -1.0, -3.0, 0.0])]]
    found = torch.stack([GradDrop(seed=s)(G, None)[0] for s in range(400)])
    assert_close(found[:, [0, 2, 3]], torch.tensor([3.0, -4.0, 0.0]).expand(400, 3))
    up = found[:, 1] == 2.0
    assert (up | (found[:, 1] == -1.0)).all()
    assert abs(up.double().mean() - 2 / 3) < 5 * (2 / 9 / 400) ** 0.5


def test_graddrop_is_unbiased_with_variance_of_the_conflict():
    g = draw(3, 1, seed=11)
    p, m = g.clamp(min=0).sum(), -g.clamp(max=0).sum()
    assert p > 0 and m > 0
    many = GradDrop(seed=0)([[x.expand(100_000)] for x in g], None)[0]
    assert abs(many.mean() - g.sum()) < 5 * (p * m / 1e5).sqrt()
    assert_close(many.var(), p * m, rtol=0.05, atol=0)


def test_graddrop_leak():
    G = [[torch.tensor([4.0])], [torch.tensor([-4.0])]]
    found = {GradDrop((0.25, 0.5), seed=s)(G, None)[0].item() for s in range(30)}
    assert found == {
        4 - 0.5 * 4,
        0.25 * 4 - 4,
    }  # either task 1 whole and half of task 2, or a quarter of 1 and 2 whole
    with pytest.raises(ValueError, match="3 numbers for 2 tasks"):
        GradDrop([0, 0, 0])(G, None)


def test_graddrop_does_not_depend_on_precision_or_partition():
    flat = draw(4, 100, seed=12)
    whole = GradDrop(seed=1)([[g] for g in flat], None)[0]
    parts = GradDrop(seed=1)([[g[:7], g[7:63].view(8, 7), g[63:]] for g in flat], None)
    assert [p.shape for p in parts] == [(7,), (8, 7), (37,)]
    assert_close(torch.cat([p.flatten() for p in parts]), whole, rtol=0, atol=0)
    single = GradDrop(seed=1)([[g.float()] for g in flat], None)[0]
    assert single.dtype == torch.float32
    assert_close(single.double(), whole, rtol=1e-5, atol=1e-6)
    shuffled = GradDrop(seed=1)([[g] for g in flat[[2, 0, 3, 1]]], None)[0]
    assert_close(shuffled, whole)
    double = GradDrop(seed=1)([[g] for g in 2 * flat], None)[0]
    assert_close(double, 2 * whole)


def test_graddrop_sums_half_precision_in_single():
    G = [
        [torch.full((4000,), 60_000.0).half()],
        [torch.full((4000,), -6_000.0).half()],
    ]  # sizes sum to above 65504
    up = (GradDrop(seed=0)(G, None)[0] > 0).double().mean()
    assert abs(up - 10 / 11) < 5 * (10 / 121 / 4000) ** 0.5


def test_graddrop_eps_makes_small_gradients_uncertain():
    G = [[torch.full((1000,), 1e-9)], [torch.full((1000,), 2e-9)]]
    assert (GradDrop(seed=0)(G, None)[0] > 0).all()
    features = [torch.ones(1, 1000)] * 2
    sent = [g[0][None] for g in G]
    for drop, expected in (
        (GradDropFeatures(seed=0), 0.5 * (1 + 3 / 103)),
        (GradDropFeatures(eps=0, seed=0), 1.0),
    ):
        kept = (drop(sent, None, features)[0] > 0).double().mean()
        assert abs(kept - expected) < 5 * 0.5 / 1000**0.5 * (expected < 1) + 1e-12


def test_graddrop_edges_and_state():
    assert_close(
        GradDrop()([[torch.tensor([1.0, -2.0, 0.0])]], None), [torch.tensor([1.0, -2.0, 0.0])]
    )
    assert_close(GradDrop()([[torch.zeros(3)]] * 2, None), [torch.zeros(3)])
    for scale in (1e-30, 1e30):
        assert GradDrop()([[draw(9) * scale], [draw(9, seed=1) * scale]], None)[0].isfinite().all()
    G = [[g] for g in draw(3, 20, seed=13)]
    kept = [[x.clone() for x in row] for row in G]
    a, b = GradDrop(), GradDrop()
    first = a(G, None)[0]
    b.load_state_dict(a.state_dict())
    second = a(G, None)[0]
    assert_close(b(G, None)[0], second, rtol=0, atol=0)
    assert not torch.equal(first, second)
    assert_close(G, kept, rtol=0, atol=0)


def test_graddrop_features_by_hand():
    a = torch.tensor([[1.0, 3.0], [-1.0, 0.0]])
    sent = [torch.tensor([[2.0, 1.0], [3.0, 5.0]]), torch.tensor([[1.0, 2.0], [-1.0, -9.0]])]
    # feature 1: votes 2 - 3 = -1 and 1 + 1 = 2, purity 2/3; feature 2: votes 1 and 2, all positive; its zero is silent
    heard = torch.stack(
        [torch.stack(GradDropFeatures(seed=s)(sent, None, [a, a])) for s in range(400)]
    )
    assert_close(heard[:, :, :, 1], torch.stack(sent)[:, :, 1].expand(400, 2, 2))
    second = heard[:, 1, 0, 0] == 1
    assert_close(
        heard[second][:, :, :, 0],
        torch.tensor([[0.0, 0.0], [1.0, -1.0]]).expand(int(second.sum()), 2, 2),
    )
    assert_close(
        heard[~second][:, :, :, 0],
        torch.tensor([[2.0, 3.0], [0.0, 0.0]]).expand(int((~second).sum()), 2, 2),
    )
    assert abs(second.double().mean() - 2 / 3) < 5 * (2 / 9 / 400) ** 0.5


def test_graddrop_features_votes_count_the_sign_of_a_feature_not_its_size():
    a = torch.tensor([[3.0], [-1.0], [0.0]])
    assert_close(batch_signs([torch.tensor([[1.0], [2.0], [9.0]])], [a]), [torch.tensor([-1.0])])


def test_graddrop_features_dead_feature_is_dropped_and_leak_lets_it_through():
    a, sent = torch.zeros(3, 2), [torch.ones(3, 2), -torch.ones(3, 2)]
    assert_close(GradDropFeatures()(sent, None, [a, a]), [torch.zeros(3, 2)] * 2)
    assert_close(GradDropFeatures((0.5, 1.0))(sent, None, [a, a]), [0.5 * sent[0], sent[1]])


def test_graddrop_features_of_their_own_for_each_task():
    features = [torch.ones(2, 1), -torch.ones(2, 1)]
    sent = [torch.ones(2, 1), torch.ones(2, 1)]  # votes 2 and -2: one of the two is kept, not both
    kept = torch.stack(
        [torch.stack(GradDropFeatures(seed=s)(sent, None, features)).sum() for s in range(20)]
    )
    assert_close(kept, torch.full((20,), 2.0))


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((), ())])
def test_graddrop_features_shapes(shapes):
    features = [torch.ones(s) for s in shapes]
    drop = GradDropFeatures(seed=0)
    before = drop.state_dict()["_extra_state"]["streams"]
    with pytest.raises(ValueError, match="one shape"):
        drop([f.clone() for f in features], None, features)
    assert drop.state_dict()["_extra_state"]["streams"] == before == {}


# ---------------------------------------------------------------------------------------- IMTL-G, ConFIG, Aligned-MTL


@pytest.mark.parametrize("T", [2, 3, 6, 12])
def test_imtlg_projects_equally_and_sums_to_one(T):
    G = draw(T, 20, seed=T, mean=0.2) * torch.logspace(-4, 4, T, dtype=D)[:, None]
    weights = IMTLG()(gram(G), torch.ones(T, dtype=D))
    on_units = (G / G.norm(dim=1, keepdim=True)) @ (weights @ G)
    assert_close(on_units, on_units[:1].expand(T), rtol=1e-7, atol=0)
    assert_close(weights.sum().item(), 1.0)
    unit = G / G.norm(dim=1, keepdim=True)
    difference, of_units = G[0] - G[1:], unit[0] - unit[1:]
    assert_close(
        weights[1:],
        torch.linalg.solve((difference @ of_units.T).T, of_units @ G[0]),
        rtol=1e-5,
        atol=1e-6,
    )


def test_imtlg_by_hand_and_where_the_inverse_fails():
    half = impartial_weights(gram(rows([3, 0], [0, 4])))
    assert_close(half, torch.tensor([4 / 7, 3 / 7], dtype=D))
    assert_close(
        impartial_weights(gram(rows([1, 2], [2, 4]))), torch.tensor([2 / 3, 1 / 3], dtype=D)
    )
    assert_close(
        impartial_weights(gram(rows([1, 2], [-2, -4]))), torch.tensor([2 / 3, 1 / 3], dtype=D)
    )
    three = impartial_weights(gram(rows([3, 0], [0, 4], [0, 0])))
    assert_close(three, torch.tensor([4 / 7, 3 / 7, 0], dtype=D))
    assert_close(impartial_weights(gram(rows([0, 0], [0, 0]))), torch.zeros(2, dtype=D))
    plane = rows(
        [1, 0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]
    )  # three at 120 degrees: no common angle
    assert_close(impartial_weights(gram(plane)), torch.full((3,), 1 / 3, dtype=D))


def test_imtlg_is_the_limit_of_nearly_equal_and_nearly_opposite_gradients():
    for base in (0.0, torch.pi):
        angle = torch.tensor(base + 1e-5, dtype=D)
        near = torch.stack([rows([1.0, 0.0])[0], 3 * torch.stack([angle.cos(), angle.sin()])])
        exact = torch.stack([rows([1.0, 0.0])[0], rows([3.0 if base == 0 else -3.0, 0.0])[0]])
        assert_close(
            impartial_weights(gram(near)), impartial_weights(gram(exact)), rtol=1e-4, atol=1e-4
        )


def test_imtlg_sum_of_zero_gives_zero_weights():
    units = rows([0.6, 0, 0.8], [-0.6, 0, 0.8], [0, 0.6, 0.8])
    units[2] = torch.tensor([0, 0.3, 1.0], dtype=D) / 1.09**0.5
    beta = torch.linalg.solve(gram(units), torch.ones(3, dtype=D))
    assert beta[2] < 0
    units[2] *= -beta[2] / (beta[0] + beta[1])
    weights = impartial_weights(gram(units))
    assert (
        weights.abs().max() == 0 or weights.abs().max() > 1e9
    )  # exactly on the pole, or rounding beside it
    assert weights.isfinite().all()


@pytest.mark.parametrize("T", [1, 2, 5, 12])
def test_config_is_the_pseudoinverse_of_unit_rows(T):
    G = draw(T, 20, seed=20 + T) * torch.logspace(-3, 3, T, dtype=D)[:, None]
    x = torch.linalg.pinv(G / G.norm(dim=1, keepdim=True)).sum(1)
    x = x / x.norm()
    direction = ConFIG()(gram(G), torch.ones(T, dtype=D)) @ G
    assert_close(direction, (G @ x).sum() * x, rtol=1e-8, atol=1e-8 * direction.norm().item())


def test_config_by_hand_and_rank_deficient():
    assert_close(
        conflict_free_weights(gram(rows([3, 0], [0, 4]))), torch.tensor([7 / 6, 7 / 8], dtype=D)
    )
    assert_close(conflict_free_weights(gram(rows([1, 2], [-1, -2]))), torch.zeros(2, dtype=D))
    for G in (
        EDGES["more tasks than dimensions"],
        EDGES["one zero"],
        EDGES["opposite and unequal"],
    ):
        unit = torch.nan_to_num(G / G.norm(dim=1, keepdim=True))
        x = torch.linalg.pinv(unit).sum(1)
        x = x / x.norm()
        assert_close(conflict_free_weights(gram(G)) @ G, (G @ x).sum() * x)


@pytest.mark.parametrize("weights", [impartial_weights, conflict_free_weights])
def test_rescaling_a_loss_keeps_the_direction_of_equal_angles(weights):
    G, scale = draw(4, 9, seed=30, mean=0.3), torch.tensor([1, 1e3, 1e-3, 5], dtype=D)[:, None]
    before, after = weights(gram(G)) @ G, weights(gram(scale * G)) @ (scale * G)
    assert_close(torch.cosine_similarity(before, after, dim=0).abs().item(), 1.0)


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_gradients_are_orthogonal_and_of_one_length(scale):
    G = draw(6, 15, seed=40) * torch.logspace(-1, 2, 6, dtype=D)[:, None]
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    common = {"min": S[-1], "median": S[3], "rmse": S.square().mean().sqrt()}[
        scale
    ]  # of six, the lower median
    aligned = common * U @ Vh
    assert_close(torch.linalg.cond(aligned).item(), 1.0)
    assert_close(aligned_weights(gram(G), scale) @ G, aligned.sum(0), rtol=1e-6, atol=1e-8)
    losses = torch.ones(6, dtype=D)
    assert_close(6 * AlignedMTL(scale, "mean")(gram(G), losses), AlignedMTL(scale)(gram(G), losses))


def test_aligned_by_hand_rank_and_tolerance():
    assert_close(aligned_weights(gram(rows([3, 0], [0, 4]))), torch.tensor([1, 0.75], dtype=D))
    assert_close(aligned_weights(gram(rows([1, 2], [-3, -6]))), torch.tensor([-0.2, 0.6], dtype=D))
    assert_close(AlignedMTL()(torch.zeros(3, 3, dtype=D), None), torch.ones(3, dtype=D))
    assert_close(
        AlignedMTL(reduction="mean")(torch.zeros(2, 2, dtype=D), None),
        torch.full((2,), 0.5, dtype=D),
    )
    M = gram(rows([1, 0], [0, 1e-4]))  # the second eigenvalue is 1e-8
    assert_close(AlignedMTL()(M, torch.ones(2)), torch.tensor([1.0, 0.0], dtype=D))
    assert_close(AlignedMTL()(M, torch.ones(2, dtype=D)), torch.tensor([1.0, 0.0], dtype=D))
    assert_close(AlignedMTL(rtol=2.2e-16)(M, torch.ones(2)), torch.tensor([1e-4, 1.0], dtype=D))


@pytest.mark.parametrize("T", [2, 3, 11])
def test_aligned_drops_a_gradient_below_the_root_of_the_tolerance(T):
    for factor, kept in ((0.99, False), (1.01, True)):
        M = torch.eye(T, dtype=D)
        M[-1, -1] = factor**2 * T * 1.2e-7
        assert (AlignedMTL()(M, torch.ones(T))[-1] > 0.5) == kept


@pytest.mark.parametrize("maker", CLOSED, ids=name)
def test_float64_losses_on_float32_gradients_of_lower_rank_change_nothing(maker):
    for seed in range(20):
        a, b = draw(2, 1000, seed=seed).float()
        G = [[a], [1.7 * a], [b]]
        M, found = gramian(G), maker()(gramian(G), torch.ones(3))
        assert_close(maker()(M, torch.ones(3, dtype=D)), found, rtol=0, atol=0)
        exact = torch.stack([a.double(), 1.7 * a.double(), b.double()])
        assert_close(found, maker()(gram(exact), None), rtol=1e-4, atol=1e-5)


def test_which_parameters_are_weighted():
    assert AlignedMTL(weights_heads=True).weights_heads
    for maker in (PCGrad, GradVac, GradDrop, GradDropFeatures, IMTLG, ConFIG, AlignedMTL):
        assert not maker().weights_heads
