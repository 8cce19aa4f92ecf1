"""What the methods that change directions share: shapes, edge cases, symmetry, scales, repr."""

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.gramian import gramian
from dbmtl.gradient_balancing.aligned_mtl import AlignedMTL
from dbmtl.gradient_balancing.config import ConFIG, conflict_free_weights
from dbmtl.gradient_balancing.graddrop import GradDrop, GradDropFeatures
from dbmtl.gradient_balancing.gradvac import GradVac
from dbmtl.gradient_balancing.imtl_g import IMTLG, impartial_weights
from dbmtl.gradient_balancing.pcgrad import PCGrad

D = torch.float64
CLOSED = [
    IMTLG,
    ConFIG,
    AlignedMTL,
    lambda: AlignedMTL("median", "mean"),
    lambda: AlignedMTL("rmse"),
]
ON_GRAMIANS = [
    lambda: PCGrad(order="fixed"),
    lambda: PCGrad(itself=False, eps=0, order="fixed"),
    lambda: GradVac(order="fixed"),
    *CLOSED,
]


def name(maker):
    return repr(maker())


@pytest.mark.parametrize("maker", ON_GRAMIANS, ids=name)
@pytest.mark.parametrize("T", [1, 2, 3, 7, 40])
def test_weights_have_shape_are_finite_and_precision_does_not_matter(maker, T, draw, gram):
    G = draw(T, 60, seed=T, mean=0.1)
    M = gram(G)
    losses = torch.ones(T, dtype=D)
    weights = maker()(M, losses)
    assert weights.shape == (T,) and weights.isfinite().all()
    # an eigenvalue at rounding size could differ; these Gramians are regular
    assert_close(maker()(M.float(), losses.float()).double(), weights, rtol=2e-3, atol=2e-4)
    if T == 1:
        assert_close(weights, torch.ones(1, dtype=D))


EDGES = {  # rows are gradients
    "all zero": [[0, 0], [0, 0], [0, 0]],
    "one zero": [[1, 2], [0, 0], [-1, 1]],
    "equal": [[1, 2], [1, 2], [1, 2]],
    "multiples": [[1, 2], [3, 6], [1e-7, 2e-7]],
    "opposite": [[1, 2], [-1, -2]],
    "opposite and unequal": [[1, 2], [-3, -6], [5, 1]],
    "more tasks than dimensions": [[1, 2], [-3, 1], [5, 1], [0, -1]],
    "extreme": [[1e10, 0], [1e-10, 1e-10], [0, -1]],
    "tiny": [[1e-10, 2e-10], [-1e-10, 1e-10]],
    "huge": [[1e10, 2e10], [-1e10, 1e10]],
}


@pytest.mark.parametrize("maker", ON_GRAMIANS, ids=name)
@pytest.mark.parametrize("case", EDGES)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_edges_are_finite_for_several_steps(maker, case, dtype, float64, gram):
    G = float64(*EDGES[case])
    aggregator = maker()
    for _ in range(3):
        weights = aggregator(gram(G), torch.ones(len(G), dtype=dtype))
        assert weights.isfinite().all() and (weights @ G).isfinite().all()
    if case == "all zero":
        assert_close(weights @ G, torch.zeros(2, dtype=D))
    zero = G.norm(dim=1) == 0
    if zero.any():
        expected = direction_without(maker, G, zero, dtype)
        assert_close(weights @ G, expected, rtol=1e-6, atol=1e-12)


def direction_without(maker, G, zero, dtype):
    """A task without gradient changes nothing for the others, the 1/T of a mean aside."""
    others = G[~zero]
    aggregator = maker()
    if not len(others):
        return torch.zeros(2, dtype=D)
    for _ in range(3):
        weights = aggregator(others @ others.T, torch.ones(len(others), dtype=dtype))
    factor = len(others) / len(G) if getattr(aggregator, "reduction", "sum") == "mean" else 1
    return weights @ others * factor


@pytest.mark.parametrize("maker", CLOSED, ids=name)
@pytest.mark.parametrize(
    "case", ["general", "equal", "opposite and unequal", "one zero", "more tasks than dimensions"]
)
def test_closed_forms_are_equivariant_under_permutation(maker, case, float64, draw, gram):
    G = draw(5, 8, seed=3) if case == "general" else float64(*EDGES[case])
    order = torch.randperm(len(G), generator=torch.Generator().manual_seed(1))
    losses = torch.ones(len(G), dtype=D)
    assert_close(
        maker()(gram(G[order]), losses), maker()(gram(G), losses)[order], rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("maker", [ON_GRAMIANS[1], *CLOSED], ids=name)
@pytest.mark.parametrize("factor", [1e-10, 1e-3, 1e10])
def test_weights_do_not_change_when_all_losses_are_rescaled(maker, factor, draw, gram):
    G = draw(4, 9, seed=5)
    assert_close(maker()(gram(factor * G), None), maker()(gram(G), None), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("weights_of", [impartial_weights, conflict_free_weights])
def test_rescaling_a_loss_keeps_the_direction_of_equal_angles(weights_of, draw, gram, float64):
    G = draw(4, 9, seed=30, mean=0.3)
    scaled = float64(1, 1e3, 1e-3, 5)[:, None] * G
    before = weights_of(gram(G)) @ G
    after = weights_of(gram(scaled)) @ scaled
    assert_close(torch.cosine_similarity(before, after, dim=0).abs().item(), 1.0)


@pytest.mark.parametrize("maker", CLOSED, ids=name)
def test_float64_losses_on_float32_gradients_of_lower_rank_change_nothing(maker, draw, gram):
    for seed in range(20):
        a, b = draw(2, 1000, seed=seed).float()
        G = [[a], [1.7 * a], [b]]
        M = gramian(G)
        found = maker()(gramian(G), torch.ones(3))
        assert_close(maker()(M, torch.ones(3, dtype=D)), found, rtol=0, atol=0)
        exact = torch.stack([a.double(), 1.7 * a.double(), b.double()])
        assert_close(found, maker()(gram(exact), None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "aggregator",
    [
        PCGrad(False, 0.5, "fixed", "mean"),
        GradVac(0.25, ["a", "b"], "below", 0.5, "fixed"),
        GradDrop(0.5, 0.25),
        GradDropFeatures([0.5, 0.25], 0.125),
        IMTLG(0.5),
        ConFIG(0.5),
        AlignedMTL("rmse", "mean", True, 0.5),
    ],
    ids=lambda aggregator: type(aggregator).__name__,
)
def test_repr_evaluates_to_the_same(aggregator):
    again = eval(repr(aggregator))
    assert repr(again) == repr(aggregator)
    hidden = ("memory", "seed", "training")
    plain = {k: v for k, v in vars(aggregator).items() if not k.startswith("_") and k not in hidden}
    assert plain and plain == {k: vars(again)[k] for k in plain}


@pytest.mark.parametrize("method", [IMTLG, ConFIG, AlignedMTL])
@pytest.mark.parametrize("rtol", [-1, float("inf"), float("nan"), None, "1e-7"])
def test_a_tolerance_out_of_range_is_named(method, rtol):
    with pytest.raises(ValueError, match="rtol"):
        method(rtol=rtol)


@pytest.mark.parametrize(
    "method", [PCGrad, GradVac, GradDrop, GradDropFeatures, IMTLG, ConFIG, AlignedMTL]
)
def test_heads_are_not_weighted_by_default(method):
    assert not method().weights_heads
