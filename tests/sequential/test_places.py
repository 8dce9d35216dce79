"""Where inducing points of a stream go: what is asked for, what may leave, and what that costs."""

import pytest
import torch
from inducing_toys import kernel_of
from oracles import inducing as oracle
from stream_toys import DTYPE, rows, toy

from mercer.families.base import Prior
from mercer.families.tied import Projection, TiedSites
from mercer.kernels import Matern52
from mercer.policy import NumericalPolicy
from mercer.sequential import places
from mercer.sequential.places import next_inducing

POLICY = NumericalPolicy()
PRIOR = Prior(Matern52(0.8, outputscale=1.2))
NONE = torch.zeros(0, 1, dtype=DTYPE)


def choose(X, Z=NONE, sites=None, **options):
    options = {"most": 50, "curvature": 10.0, "residual_tol": 0.01, "loss_tol": 0.1, "policy": POLICY, **options}
    return next_inducing(PRIOR, Z, X, TiedSites.none(Z) if sites is None else sites, **options)


def left(Z, X):
    """Prior variance of rows given the values at Z, dense."""
    kernel = kernel_of()
    Kuf = kernel(Z, X)
    return 1.2 - (Kuf * torch.linalg.solve(oracle.between(kernel, Z, Z), Kuf)).sum(0)


def told(Z, X, noise):
    """Sites that noisy rows X have at Z."""
    kernel = kernel_of()
    A = torch.linalg.solve(oracle.between(kernel, Z, Z), kernel(Z, X))
    return TiedSites(A.sum(1), A @ A.T / noise)


@pytest.mark.parametrize("tol", [0.3, 0.01, 1e-4])
def test_all_rows_are_explained_where_there_is_room(tol):
    """To ``residual_tol`` over the curvature, and hardly better: no point is there for nothing."""
    X, _ = rows()
    Z = choose(X, residual_tol=tol)
    assert float(left(Z, X).max()) <= tol / 10.0 * 1.01
    assert float(left(Z[:-1], X).max()) > tol / 10.0
    assert torch.isin(Z, X).all() and len(Z.unique()) == len(Z)


def test_more_is_asked_for_where_the_likelihood_is_sharper():
    X, _ = rows()
    sizes = [len(choose(X, curvature=curvature)) for curvature in (0.1, 1.0, 10.0, 100.0)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def test_more_than_half_of_the_prior_is_never_left():
    X, _ = rows()
    Z = choose(X, curvature=1e-12)
    assert float(left(Z, X).max()) <= 0.6 * 1.01 < 1.01 * float(left(Z[:-1], X).max())
    assert torch.equal(choose(X, curvature=0.0), Z)


def test_rows_that_are_explained_change_nothing():
    X, _ = rows()
    Z = choose(X)
    assert torch.equal(choose(X[:7], Z), Z)


def test_old_points_come_first_in_their_order():
    X, _ = rows()
    Z = choose(X[:6])
    grown = choose(X, Z)
    assert len(grown) > len(Z) and torch.equal(grown[: len(Z)], Z)


@pytest.mark.parametrize("most", [1, 3, 8])
def test_there_are_never_more_points_than_allowed(most):
    X, _ = rows()
    Z = None
    for part in X.split(10):
        Z = choose(part, NONE if Z is None else Z, most=most, residual_tol=1e-3)
        assert len(Z) <= most
    assert len(Z) == most


def test_equal_rows_are_one_point():
    X = torch.full((20, 1), 1.7, dtype=DTYPE)
    Z = choose(X)
    assert torch.equal(Z, X[:1]) and torch.equal(choose(X, Z), Z)


def test_a_row_that_is_a_point_already_is_not_added_again():
    """Also where one is asked for at every row, to the last digit."""
    X, _ = rows(n=12)
    Z = choose(X, residual_tol=1e-12, curvature=1.0)
    assert len(Z) == 12
    assert torch.equal(choose(X, Z, residual_tol=1e-12, curvature=1.0), Z)


def test_a_long_sorted_batch_is_seen_to_its_end(monkeypatch):
    """Rows of a batch come sorted: its beginning is a corner of the space."""
    monkeypatch.setattr(places, "_AT_ONCE", 30)
    X = torch.linspace(0.0, 10.0, 301, dtype=DTYPE)[:, None]
    Z = choose(X)
    assert float(left(Z, X).max()) < 0.05 and float(Z.max()) > 9.5


def test_points_move_where_more_is_learned_than_lost():
    """Nobody knows much of the left; the right is full of rows that nothing explains."""
    X, _ = rows()
    near, far = X[X[:, 0] < 2.0], torch.linspace(6.0, 9.0, 200, dtype=DTYPE)[:, None]
    Z = choose(near, most=6)
    sites = told(Z, near[:1], 10.0)
    moved = choose(far, Z, sites, most=6)
    assert len(moved) == 6 and float(left(moved, far).mean()) < 0.3
    assert float(sites.loss(Projection(PRIOR, Z, moved, POLICY))) < 0.1


def test_points_stay_where_more_would_be_lost_than_learned():
    X, _ = rows()
    near, far = X[X[:, 0] < 2.0], torch.tensor([[9.0]], dtype=DTYPE)
    Z = choose(near, most=6)
    sites = told(Z, near.repeat(200, 1), 0.01)
    assert torch.equal(choose(far, Z, sites, most=6), Z)
    # with room the row is welcome
    assert torch.equal(choose(far, Z, sites, most=7), torch.cat([Z, far]))


def test_room_is_filled_before_anything_is_asked_to_leave():
    X, _ = rows()
    near, far = X[X[:, 0] < 2.0], torch.linspace(6.0, 9.0, 4, dtype=DTYPE)[:, None]
    Z = choose(near, most=6)
    sites = told(Z, near.repeat(2000, 1), 1e-4)
    grown = choose(far, Z, sites, most=8)
    assert torch.equal(grown[:6], Z) and torch.isin(grown[6:], far).all() and len(grown) == 8


def test_a_smaller_limit_does_not_add_points():
    """The user has lowered it since: points leave if little is lost, and none come in any case."""
    X, _ = rows()
    Z = choose(X)
    sites = told(Z, X.repeat(200, 1), 1e-9)
    for most in (3, len(Z) - 1):
        assert torch.equal(choose(X + 20.0, Z, sites, most=most), Z)
    assert len(choose(X, Z, TiedSites.none(Z), most=3)) <= len(Z)


def test_spare_points_are_taken_rather_than_lose_more_and_may_go_again():
    """Known ones come first; those that nothing is known of go for nothing, where the known ones are not worth less."""
    X, _ = rows()
    Z = choose(X)
    most, sites = len(Z), told(Z, X.repeat(3, 1), 0.5)
    new = (X + 20.0).repeat(200, 1)  # saves more than leaving Z behind loses
    traded = choose(new, Z, sites, most=most)
    assert len(traded) == most and not torch.equal(traded, Z)
    wide = choose(new, Z, sites, most=most, spare=5)
    assert len(wide) == most + 5 and torch.equal(wide[:most], Z)
    # what is known is known at Z alone: where much is, the rest goes and nothing is lost
    move = Projection(PRIOR, Z, wide, POLICY)
    assert float(sites.loss(move)) == pytest.approx(0.0, abs=1e-9)
    held = told(Z, X.repeat(200, 1), 1e-9).project(move)
    assert torch.equal(choose(X + 20.0, wide, held, most=most, known=most), Z)
    again = choose(new, wide, sites.project(move), most=most, known=most)
    assert len(again) == most and not torch.equal(again, Z)


def test_latents_with_kernels_of_their_own_share_points():
    """A row counts as explained only if it is for every latent."""
    kernel = Matern52(0.8, outputscale=1.2)
    kernel.base_kernel.raw_lengthscale = torch.nn.Parameter(torch.zeros(2, 1, 1, dtype=DTYPE))
    kernel.base_kernel.lengthscale = torch.tensor([[[0.2]], [[3.0]]], dtype=DTYPE)
    kernel.base_kernel.batch_shape = kernel.batch_shape = torch.Size([2])
    X, _ = rows()
    options = {"most": 60, "curvature": 10.0, "residual_tol": 0.1, "loss_tol": 0.1, "policy": POLICY}
    Z = next_inducing(Prior(kernel), NONE, X, TiedSites.none(NONE, (2,)), **options)
    alone = Prior(Matern52(0.2, outputscale=1.2))
    expected = next_inducing(alone, NONE, X, TiedSites.none(NONE), **options)
    assert abs(len(Z) - len(expected)) <= 2 and len(Z) > 10


def test_a_stream_of_one_place_stays_at_one():
    model, data = toy(n_inducing=1)
    Z = next_inducing(
        model.prior,
        NONE,
        data.X,
        TiedSites.none(NONE),
        most=1,
        curvature=10.0,
        residual_tol=0.01,
        loss_tol=0.1,
        policy=POLICY,
    )
    assert Z.shape == (1, 1)
