"""``check_botorch_model``: what acquisition functions rely on in a model, as plain assertions for one's own tests."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from botorch.acquisition.objective import ExpectationPosteriorTransform, ScalarizedPosteriorTransform
from botorch.models.transforms import Normalize, Standardize
from botorch.sampling.normal import SobolQMCNormalSampler
from torch import Tensor

from mercer.interop.botorch import MercerModel
from mercer.testing._twin import difference, draw
from mercer.testing.family import _near

SAME = 1e-9  # agreement of two routes to one number
REFIT = 1e-8  # agreement with a fit to all rows at the same hyperparameters
STEP = 1e-4  # of differences, in units of the spread of X
DRAWS = 4096


def check_botorch_model(model: Any, X: Tensor, *, rtol: float = 1e-6, refit: bool | None = None) -> None:
    """Assert that a model keeps BoTorch's contract, with fantasies and transforms.

    Parameters
    ----------
    model : MercerModel or fitted estimator
        One with ``to_botorch``; left as it was.
    X : (n, d), in the user's units
        Distinct float64 rows, n ≥ 6, among the training rows or near them.
    rtol : float, default=1e-6
        Agreement of gradients with differences and, where covariances are approximations that depend on which rows
        come together, of what they make. What is the same by definition agrees to 1e-9 everywhere.
    refit : bool, optional
        Whether conditioning must equal a fit to all rows at the same hyperparameters, to 1e-8. By default where that
        is so by theory: for Gaussian noise and the exact family.

    Raises
    ------
    AssertionError
        Naming the property that fails.

    Notes
    -----
    Checked: shapes for (q, d), (b, q, d) and (b1, b2, q, d); sets of a batch equal each alone; gradients; samples of a
    Sobol sampler; fantasies equal conditioning on their targets one by one, and a refit; that twice equals once; no
    rows at all; input, outcome and posterior transforms; subsets of outputs; copies and pickles.

    Examples
    --------
    >>> import torch
    >>> from mercer import GPRegressor
    >>> X = torch.linspace(0, 1, 8, dtype=torch.float64).unsqueeze(-1)
    >>> check_botorch_model(GPRegressor().fit(X, X[:, 0].sin()), X[1:7] + 0.03)
    """
    model = model if isinstance(model, MercerModel) else model.to_botorch()
    assert X.dim() == 2 and len(X) >= 6 and X.dtype == torch.float64, "X must be float64 (n, d) with n ≥ 6"
    own = model.known.fitted.model
    refit = own.family.name == "exact" and own.likelihood.conjugate if refit is None else refit
    _check_shapes(model, X)
    _check_gradients(model, X, rtol)
    _check_samples(model, X)
    _check_conditioning(model, X, rtol, refit)
    _check_fantasies(model, X, rtol)
    _check_no_rows(model, X)
    _check_outputs(model, X)
    _check_transforms(model, X)
    _check_copies(model, X)


def _moments(model: Any, X: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return mean (*t, q, m) and joint covariance (*t, q m, q m)."""
    posterior = model.posterior(X, **options)
    return posterior.mean, posterior.distribution.covariance_matrix


def _same(model: Any, other: Any, X: Tensor, rtol: float, message: str) -> None:
    for name, one, reference in zip(("mean", "covariance"), _moments(model, X), _moments(other, X), strict=True):
        size = max(1.0, float(reference.abs().max()))
        _near(one / size, reference.expand(one.shape) / size, rtol, f"{message}: {name}")


def _check_shapes(model: Any, X: Tensor) -> None:
    m = model.num_outputs
    assert model.batch_shape == torch.Size(), f"a fitted model has batch_shape {tuple(model.batch_shape)}"
    assert model.train_inputs[0].shape[-1] == X.shape[-1], "train_inputs have other columns than X"
    for rows in (X[:3], X[:6].reshape(2, 3, -1), torch.stack([X[:4], X[2:6]]).reshape(2, 2, 2, -1)):
        shape = (*rows.shape[:-1], m)
        for noise in (False, True, torch.full(shape, 0.3, dtype=X.dtype)):
            posterior = model.posterior(rows, observation_noise=noise)
            found = {"mean": posterior.mean.shape, "variance": posterior.variance.shape}
            found["sample"] = posterior.rsample(torch.Size([5])).shape[1:]
            for name, size in found.items():
                assert size == shape, f"{name} has shape {tuple(size)} for X of shape {tuple(rows.shape)}"
        mean, variance = model.posterior(rows).mean, model.posterior(rows).variance
        _near(
            mean, model.posterior(rows).distribution.mean.reshape(shape), SAME, "mean is not that of the distribution"
        )
        noisy = model.posterior(rows, observation_noise=True).variance
        assert (noisy > variance).all(), "observation noise does not add to the variance"
        given = model.posterior(rows, observation_noise=torch.full(shape, 0.3, dtype=X.dtype)).variance
        _near(given, variance + 0.3, SAME, "a given noise variance is not added")
        for i, alone in enumerate(rows.reshape(-1, *rows.shape[-2:])):
            found_pair, alone_pair = _moments(model, rows), _moments(model, alone)
            for name, part, one in zip(("mean", "covariance"), found_pair, alone_pair, strict=True):
                part = part.reshape(-1, *one.shape)[i]
                _near(part, one, SAME, f"the {name} of a set in a batch differs from that of the set alone")
    single = model.posterior(X[:3].float())
    assert single.mean.dtype == torch.float32, "the posterior does not have the dtype of X"


def _check_gradients(model: Any, X: Tensor, rtol: float) -> None:
    rows = (X[:4].reshape(2, 2, -1) + 0.017 * X.std(0)).requires_grad_()
    unit = X.std(0)

    def functional() -> Tensor:
        mean, covariance = _moments(model, rows)
        return (mean * draw(*mean.shape, seed=1)).sum() + (covariance * draw(*covariance.shape, seed=2)).sum()

    value = functional()
    assert value.requires_grad, "the posterior carries no gradient in X"
    (slope,) = torch.autograd.grad(value, rows)
    direction = draw(*rows.shape, seed=3) * unit
    expected = difference(functional, rows, direction, step=STEP)
    _near((slope * direction).sum(), expected, rtol, "the gradient in X differs from finite differences")
    assert not _moments(model, X[:2])[0].requires_grad, "the posterior carries gradients in hyperparameters"


@torch.no_grad()
def _check_samples(model: Any, X: Tensor) -> None:
    """Moments of Sobol draws within the error of independent ones; equal seeds, equal draws."""
    posterior = model.posterior(X[:3], observation_noise=True)
    samples = SobolQMCNormalSampler(torch.Size([DRAWS]), seed=4)(posterior)
    again = SobolQMCNormalSampler(torch.Size([DRAWS]), seed=4)(posterior)
    assert torch.equal(samples, again), "equal seeds give different draws"
    for name, values, expected in (
        ("mean", samples, posterior.mean),
        ("variance", (samples - posterior.mean).square(), posterior.variance),
    ):
        error = values.std(0) / DRAWS**0.5
        off = (values.mean(0) - expected).abs()
        assert (off <= 5.0 * error).all(), f"the sample {name} is off by {(off / error).max():.1f} s.e."


def _targets(model: Any, X: Tensor, n: int, seed: int) -> Tensor:
    """Return n draws of targets at X, (n, *t, q, m) or one column of classes."""
    with torch.no_grad():
        sampler = SobolQMCNormalSampler(torch.Size([n]), seed=seed)
        return model.known.draw(sampler(model.posterior(X)))


def _check_conditioning(model: Any, X: Tensor, rtol: float, refit: bool) -> None:
    before = _moments(model, X)
    rows, Y = X[1:4] + 0.05 * X.std(0), _targets(model, X[1:4] + 0.05 * X.std(0), 1, seed=5)[0]
    conditioned = model.condition_on_observations(rows, Y)
    after = _moments(model, X)
    assert all(map(torch.equal, before, after)), "conditioning changes the model itself"
    n = model.train_inputs[0].shape[-2]
    assert conditioned.train_inputs[0].shape[-2] == n + 3, "conditioning does not add to train_inputs"
    targets = conditioned.train_targets[..., -3:]
    targets = targets.mT if Y.shape[-1] > 1 else targets.unsqueeze(-1)
    _near(targets, Y, SAME, "train_targets do not end with the new targets")
    if model.known.likelihood.conjugate:
        twice = model.condition_on_observations(rows[:1], Y[:1]).condition_on_observations(rows[1:], Y[1:])
        _same(twice, conditioned, X[:4], max(rtol, SAME), "conditioning twice differs from once on all")
        noise = model.posterior(rows, observation_noise=True).variance - model.posterior(rows).variance
        given = model.condition_on_observations(rows, Y, noise=noise)
        _same(given, conditioned, X[:4], 1e3 * SAME, "the likelihood's noise, when given, changes the result")
    nothing = model.condition_on_observations(rows, torch.full_like(Y, torch.nan))
    _same(nothing, model, X[:4], max(rtol, SAME), "missing targets change the model")
    if refit:
        anew = type(model).of(conditioned.known.merged().conditioned())
        _same(conditioned, anew, X, REFIT, "conditioning differs from a fit to all rows")


def _check_fantasies(model: Any, X: Tensor, rtol: float) -> None:
    """Fantasies are what conditioning on each set of targets gives, and broadcast with X."""
    rows = X[:4].reshape(2, 2, -1) + 0.03 * X.std(0)
    sampler = SobolQMCNormalSampler(torch.Size([3]), seed=6)
    smooth = model.fantasize(rows, sampler)
    drawn = model.fantasize(rows, sampler, labels=True)
    for fantasies in (smooth, drawn):
        assert fantasies.batch_shape == (3, 2), f"fantasies have batch_shape {tuple(fantasies.batch_shape)}"
        for new in (X[4:6], X[:4].reshape(2, 2, -1), X[:6].reshape(3, 1, 2, -1), X[:2].expand(4, 1, 1, 2, -1)):
            sets = torch.broadcast_shapes((3, 2), new.shape[:-2])
            mean, variance = fantasies.posterior(new).mean, fantasies.posterior(new).variance
            assert mean.shape == (*sets, 2, model.num_outputs), f"fantasies' mean has shape {tuple(mean.shape)}"
            assert variance.shape == mean.shape, f"fantasies' variance has shape {tuple(variance.shape)}"
    targets = drawn.train_targets[..., -2:]
    targets = targets.mT if targets.dim() > 3 else targets.unsqueeze(-1)
    found = drawn.posterior(X[4:6])
    for i in range(3):
        for j in range(2):
            alone = model.condition_on_observations(rows[j], targets[i, j]).posterior(X[4:6])
            for name in ("mean", "variance"):
                part, one = getattr(found, name)[i, j], getattr(alone, name)
                _near(part, one, max(rtol, SAME), f"the {name} of a fantasy differs from conditioning on its targets")
    leaf = rows.clone().requires_grad_()
    value = model.fantasize(leaf, sampler).posterior(X[:6].reshape(3, 1, 2, -1)).mean
    (slope,) = torch.autograd.grad((value * draw(*value.shape, seed=7)).sum(), leaf)
    direction = draw(*leaf.shape, seed=8) * X.std(0)

    def functional() -> Tensor:
        value = model.fantasize(leaf, sampler).posterior(X[:6].reshape(3, 1, 2, -1)).mean
        return (value * draw(*value.shape, seed=7)).sum()

    expected = difference(functional, leaf, direction, step=STEP)
    size = max(1.0, float(value.detach().abs().max()))
    gap = ((slope * direction).sum() - expected) / size
    _near(gap, torch.zeros_like(gap), 10 * rtol, "the gradient of fantasies in their rows differs from differences")


def _check_no_rows(model: Any, X: Tensor) -> None:
    m = model.num_outputs
    for shape in ((0,), (2, 0)):
        rows = X.new_zeros(*shape, X.shape[-1])
        mean = model.posterior(rows).mean
        assert mean.shape == (*shape, m), f"the mean of no rows has shape {tuple(mean.shape)}"
        fantasies = model.fantasize(rows, SobolQMCNormalSampler(torch.Size([3]), seed=9))
        assert fantasies.batch_shape == (3, *shape[:-1]), "fantasies of no rows have another batch_shape"
        _near(
            fantasies.posterior(X[:2]).mean,
            model.posterior(X[:2]).mean.expand(3, *shape[:-1], 2, m),
            SAME,
            "fantasies of no rows change the mean",
        )


def _check_outputs(model: Any, X: Tensor) -> None:
    every, noise = model.posterior(X[:3], observation_noise=True), torch.full((3, 1), 0.2, dtype=X.dtype)
    for i in range(model.num_outputs):
        subset = model.subset_output([i])
        assert subset.num_outputs == 1, "subset_output keeps other outputs"
        for found in (subset.posterior(X[:3], None, True), model.posterior(X[:3], [i], True)):
            _near(found.mean, every.mean[..., [i]], SAME, "the mean of one output differs from that among all")
            _near(found.variance, every.variance[..., [i]], SAME, "the variance of one output differs from all")
        if not model.known.coupled:
            alone = subset.condition_on_observations(X[:3], every.mean.detach()[..., [i]], noise)
            missing = torch.full_like(every.mean.detach(), torch.nan)
            missing[..., i] = every.mean.detach()[..., i]
            whole = model.condition_on_observations(X[:3], missing, noise.expand_as(missing))
            found, expected = alone.posterior(X[3:5]).mean, whole.posterior(X[3:5]).mean[..., [i]]
            _near(found, expected, SAME, "conditioning one output differs from conditioning all with others missing")


def _check_transforms(model: Any, X: Tensor) -> None:
    m, fitted = model.num_outputs, model.known.fitted
    weights = torch.linspace(0.5, -1.5, m, dtype=X.dtype)
    scalar: Any = model.posterior(X[:3], posterior_transform=ScalarizedPosteriorTransform(weights, offset=2.0))
    plain = model.posterior(X[:3])
    _near(scalar.mean[..., 0], plain.mean @ weights + 2.0, SAME, "a scalarized mean is off")
    _near(scalar.variance[..., 0], plain.variance @ weights.square(), SAME, "a scalarized variance is off")
    averaged = model.posterior(X[:4], posterior_transform=ExpectationPosteriorTransform(n_w=2))
    by_pair = model.posterior(X[:4]).mean.reshape(2, 2, m).mean(1)
    _near(averaged.mean, by_pair, SAME, "the mean over pairs of rows is off")
    inputs = Normalize(X.shape[-1], bounds=torch.stack([X.amin(0) - 1.0, X.amax(0) + 2.0]))
    moved: Any = type(model).of(fitted, input_transform=inputs)
    inputs.eval()
    _near(moved.posterior(inputs.untransform(X)).mean, model.posterior(X).mean, SAME, "input_transform is not applied")
    if not model.known.f_is_y:
        return
    outcome = Standardize(m)
    outcome(draw(7, m, seed=10) * 3.0 + 5.0)
    moved = type(model).of(fitted, outcome_transform=outcome)
    outcome.eval()
    Y = _targets(model, X[:3], 1, seed=11)[0]
    conditioned = moved.condition_on_observations(X[:3], outcome.untransform(Y)[0])
    pairs = ((moved, model), (conditioned, model.condition_on_observations(X[:3], Y)))
    for other, reference in pairs:
        found, expected = other.posterior(X[3:6]), reference.posterior(X[3:6])
        mean, variance = outcome.untransform(expected.mean, expected.variance)
        assert variance is not None
        _near(found.mean, mean, 10 * SAME, "outcome_transform is not applied to the mean")
        _near(found.variance, variance, 10 * SAME, "outcome_transform is not applied to the variance")


def _check_copies(model: Any, X: Tensor) -> None:
    fantasies = model.fantasize(X[:2], SobolQMCNormalSampler(torch.Size([2]), seed=12))
    for name, own in (("a model", model), ("fantasies", fantasies)):
        for how, other in (("deepcopy", copy.deepcopy(own)), ("pickling", pickle.loads(pickle.dumps(own)))):
            for one, reference in zip(_moments(other, X[:3]), _moments(own, X[:3]), strict=True):
                assert torch.equal(one, reference), f"{how} of {name} changes its posterior"
