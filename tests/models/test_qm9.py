"""QM9's network: the dense form against torch-geometric's NNConv, padding, order, capture."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from dbmtl.data.qm9 import load_sample
from dbmtl.models.qm9 import (
    DenseTrunk,
    QM9Network,
    ReferenceTrunk,
    chunk_shapes,
    dense_batch,
    graph_batch,
    gru_cell,
    lstm_cell,
)


@pytest.fixture(scope="module")
def molecules():
    return load_sample().molecules


def draw(count, seed=0):
    return torch.randperm(7000, generator=torch.Generator().manual_seed(seed))[:count]


def precise(molecules):
    return dataclasses.replace(molecules, position=molecules.position.double())


def both(molecules, index, width, dtype):
    """Features and gradients of the two forms, from one state dictionary."""
    torch.manual_seed(1)
    dense = DenseTrunk(width).to(dtype)
    reference = ReferenceTrunk(width).to(dtype)
    with torch.no_grad():
        dense.conv.bias.normal_()  # zero at the start, where an error would not show
    reference.load_state_dict(dense.state_dict())
    cotangent = torch.randn(len(index), width, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    batches = (dense_batch(molecules, index), graph_batch(molecules, index))
    for trunk, batch in zip((dense, reference), batches, strict=True):
        features = trunk(batch)
        names, weights = zip(*trunk.named_parameters(), strict=True)
        gradients = torch.autograd.grad(features, weights, cotangent)
        results.append((features.detach(), dict(zip(names, gradients, strict=True))))
    return results


@pytest.mark.full
@pytest.mark.parametrize(
    "dtype, width, tolerance",
    [(torch.float64, 64, 1e-10), (torch.float32, 64, 3e-6), (torch.float64, 8, 1e-10)],
)
def test_qm9_nnconv_dense_form_equals_torch_geometric(molecules, dtype, width, tolerance):
    pytest.importorskip("torch_geometric")
    data = precise(molecules) if dtype == torch.float64 else molecules
    (dense, dense_grads), (reference, grads) = both(data, draw(8), width, dtype)
    assert dense.abs().max() > 0.01
    assert (dense - reference).abs().max() <= tolerance * reference.abs().max()
    assert dense_grads.keys() == grads.keys()
    for name, gradient in grads.items():
        assert gradient.abs().max() > 0, name
        assert (dense_grads[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


def test_qm9_nnconv_parameter_count_and_names():
    pytest.importorskip("torch_geometric")
    dense = DenseTrunk()
    reference = ReferenceTrunk()
    assert sum(p.numel() for p in dense.parameters()) == 616_960
    shapes = [{n: p.shape for n, p in t.named_parameters()} for t in (dense, reference)]
    assert shapes[0] == shapes[1]
    reference.load_state_dict(dense.state_dict())
    dense.load_state_dict(reference.state_dict())
    assert sum(p.numel() for p in QM9Network(["mu"]).heads.parameters()) == 65


def test_qm9_nnconv_initial_weights_have_the_same_spread():
    pytest.importorskip("torch_geometric")
    torch.manual_seed(0)
    pairs = zip(DenseTrunk().named_parameters(), ReferenceTrunk().parameters(), strict=True)
    for (name, p), q in pairs:
        if p.numel() > 100:
            assert_close(p.std(), q.std(), rtol=0.15, atol=0, msg=name)
            assert_close(p.abs().max(), q.abs().max(), rtol=0.1, atol=0, msg=name)


def test_qm9_padding_and_company_change_nothing(molecules):
    data = precise(molecules)
    index = draw(12)
    trunk = DenseTrunk(16).double()
    alone = torch.cat([trunk(dense_batch(data, i[None])) for i in index])
    for shapes in (None, ((12, 29),), ((12, 40),), ((3, 25), (9, 29))):
        assert_close(trunk(dense_batch(data, index, shapes)), alone, rtol=1e-10, atol=1e-12)
    for rows in (1, 5, 12):
        assert_close(trunk(dense_batch(data, index, rows=rows)), alone, rtol=1e-10, atol=1e-12)
    back = torch.arange(11, -1, -1)
    assert_close(trunk(dense_batch(data, index[back])), alone[back], rtol=1e-10, atol=1e-12)


def test_qm9_order_of_atoms_does_not_matter(molecules):
    one = precise(molecules.select(draw(1)))
    n = int(one.size)
    pairs = torch.tril_indices(n, n, -1)
    order = torch.zeros(n, n, dtype=torch.uint8)
    order[pairs[0], pairs[1]] = one.pair_order
    order = order + order.T
    p = torch.randperm(n)
    moved = dataclasses.replace(
        one,
        number=one.number[p],
        hydrogens=one.hydrogens[p],
        position=one.position[p],
        pair_order=order[p][:, p][pairs[0], pairs[1]],
    )
    assert (moved.pair_order != one.pair_order).any()
    trunk = DenseTrunk(16).double()
    zero = torch.tensor([0])
    features = trunk(dense_batch(one, zero))
    assert_close(trunk(dense_batch(moved, zero)), features, rtol=1e-10, atol=1e-12)


def test_qm9_bonds_and_distances_matter(molecules):
    one = precise(molecules.select(draw(1)))
    zero = torch.tensor([0])
    trunk = DenseTrunk(16).double()
    same = trunk(dense_batch(one, zero))
    bonds = dataclasses.replace(one, pair_order=(one.pair_order > 0).to(torch.uint8) * 2)
    stretched = dataclasses.replace(one, position=one.position * 1.1)
    for changed in (bonds, stretched):
        assert (trunk(dense_batch(changed, zero)) - same).abs().max() > 1e-5


def test_qm9_dense_batch_agrees_with_the_edge_list(molecules):
    index = draw(9)
    dense = dense_batch(molecules, index, rows=9)
    graph = graph_batch(molecules, index)
    first = 0
    for row, m in enumerate(index.tolist()):
        n = int(molecules.size[m])
        block = dense.edges[0][dense.position[row]]
        off = ~torch.eye(n, dtype=torch.bool)
        listed = graph.edge_attr[first : first + n * (n - 1)]
        assert_close(block[:n, :n][off], listed)
        assert block[n:].abs().sum() == block[:, n:].abs().sum() == 0
        first += n * (n - 1)
    assert first == graph.edge_index.shape[1]
    assert (graph.edge_index[0] != graph.edge_index[1]).all()
    assert_close(dense.x[dense.position][dense.mask[dense.position]], graph.x)


@pytest.mark.parametrize("shapes", [None, ((8, 29),), ((1, 25), (7, 29))])
def test_qm9_batched_gradients_equal_the_loop(molecules, shapes):
    index = draw(8)
    network = QM9Network(["a", "b", "c"], width=8).double()
    batch = dense_batch(precise(molecules), index, shapes)
    losses = torch.stack([p.square().mean() for p in network(batch).values()])
    weights = list(network.trunk.parameters())
    rows = torch.autograd.grad(
        losses, weights, torch.eye(3).double(), is_grads_batched=True, retain_graph=True
    )
    for t in range(3):
        gradients = torch.autograd.grad(losses[t], weights, retain_graph=True)
        for row, alone in zip(rows, gradients, strict=True):
            assert_close(row[t], alone, rtol=1e-9, atol=1e-12)


def test_qm9_recurrent_cells_equal_torch():
    gru = torch.nn.GRU(5, 5).double()
    lstm = torch.nn.LSTM(10, 5).double()
    x = torch.randn(7, 10).double()
    h = torch.randn(7, 5).double()
    c = torch.randn(7, 5).double()
    assert_close(gru_cell(gru, x[:, :5], h), gru(x[None, :, :5], h[None])[0][0])
    out, (_, memory) = lstm(x[None], (h[None], c[None]))
    assert_close(lstm_cell(lstm, x, h, c), (out[0], memory[0]))


def test_qm9_chunk_shapes_cover_the_batch(molecules):
    sizes = molecules.size[draw(50)]
    shapes = chunk_shapes(sizes, rows=8)
    assert sum(rows for rows, _ in shapes) == 50 and shapes[-1][1] == int(sizes.max())
    assert [atoms for _, atoms in shapes] == sorted(atoms for _, atoms in shapes)
