"""The SVD by the Gram matrix against LAPACK's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from projected_grpo import tensor_files
from projected_grpo.proj import haar_basis
from projected_grpo.tensor_files import SVD, compute_svd, is_exact, svd_by_gram


def drawn(d_out, d_in, rank, values, seed, halved):
    """A weight of these singular values, repeated where they are few; rounded to bfloat16 if `halved`."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (haar_basis(rank, d, generator).T.double() for d in (d_out, d_in))
    S = torch.tensor([values[i % len(values)] for i in range(rank)], dtype=torch.float64)
    W = ((U * S) @ V.T).float()
    return W.bfloat16().float() if halved else W


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    rank=st.integers(0, 40),
    values=st.lists(st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 0.5, 1.0, 3.0, 1e3]), min_size=1, max_size=6),
    seed=st.integers(0, 999),
    halved=st.booleans(),
)
def test_it_is_the_svd_whatever_the_rank_and_shape(shape, rank, values, seed, halved):
    W = drawn(*shape, min(rank, *shape), values, seed, halved)
    found, r = svd_by_gram(W), min(shape)
    assert found.U.shape == (shape[0], r) and found.Vh.shape == (r, shape[1])
    assert is_exact(found, W)
    reference = torch.linalg.svdvals(W.double())
    scale = float(reference.max())
    assert torch.allclose(found.S.double(), reference, rtol=1e-5, atol=1e-7 * scale)
    assert bool((found.S.diff() <= 0).all())


def test_a_dead_input_is_no_trouble():
    W = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    W[:, 5] = 0
    assert is_exact(svd_by_gram(W), W)


def test_what_is_not_an_svd_is_not_exact():
    W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = svd_by_gram(W)
    assert is_exact(found, W)
    assert not is_exact(SVD(found.U, 1.001 * found.S, found.Vh), W)
    assert not is_exact(SVD(found.U, found.S, 1.001 * found.Vh), W)
    assert not is_exact(SVD(found.U * float("nan"), found.S, found.Vh), W)


@pytest.mark.parametrize("broken", [False, True])
def test_a_gpu_has_it_by_the_gram_matrix_and_falls_back_where_that_is_not_exact(monkeypatch, broken):
    """`is_cuda` is all that tells this CPU's tensors from a GPU's."""
    W = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    plain, by_gram, asked = compute_svd(W), svd_by_gram(W), []

    def gram(A):
        asked.append(A)
        return SVD(2 * by_gram.U, by_gram.S, by_gram.Vh) if broken else by_gram

    monkeypatch.setattr(tensor_files, "svd_by_gram", gram)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = compute_svd(W)
    assert len(asked) == 1 and torch.equal(found.U, plain.U if broken else by_gram.U)
    assert compute_svd(W.double()).S.dtype == torch.float64 and len(asked) == 1
