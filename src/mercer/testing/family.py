"""``check_family``: what engines and estimators rely on in a family, as plain assertions for one's own tests."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from mercer._typing import Sites
from mercer.families.base import Family, Posterior, Prior
from mercer.kernels import Matern52, diag, gram, hyperparameters
from mercer.kernels.means import constant_mean
from mercer.policy import NumericalPolicy
from mercer.testing._twin import Twin, batch_of_sites, dense_twin, difference, draw, kinds_of_sites
from mercer.testing.kernel import _close

ALGEBRA = 1e-8  # agreement of two routes to one number in float64
SINGLE = 1e-3  # the same in float32, for covariances that are not ill-conditioned
DRAWS = 2000


def check_family(
    family: Family,
    prior: Prior | None = None,
    X: Tensor | None = None,
    *,
    rtol: float = 1e-6,
    negative_sites: bool = True,
    device: str = "cpu",
) -> None:
    """Assert that a family conditions a prior on Gaussian sites as the definition says.

    Parameters
    ----------
    family : Family
        Object under test, in a setting where it is exact or accurate to ``rtol``.
    prior : Prior, optional
        Kernel and mean in float64, left untouched; by default a Matérn-5/2 kernel with a constant mean.
    X : (n, d), optional
        Distinct float64 training rows, n ≥ 5, not much closer than a lengthscale, so that the twin is accurate.
    rtol : float, default=1e-6
        Agreement with a dense twin, relative to the size of each quantity. Widen it for an approximate family;
        what must agree with itself stays at 1e-8.
    negative_sites : bool, default=True
        Whether the family must take negative precisions that leave the posterior proper.
    device : str, default="cpu"
        A second device, on which everything must agree with the CPU.

    Raises
    ------
    AssertionError
        Naming the property that fails.

    Notes
    -----
    Checked: mean, marginals, joint, values at the data, log normaliser, evidence, KL and site terms; zero precision
    gives the prior; a batch equals its members; sets of rows equal each alone, with gradients in the inputs; rows may
    be permuted and chunked; gradients; moments and reproducibility of samples; float32, pickling and device.

    Examples
    --------
    >>> from mercer.families import Exact
    >>> check_family(Exact())
    """
    prior, X = _problem(prior, X)
    assert isinstance(family, Family), "the object lacks plan or condition"
    plan = family.plan(prior, X, NumericalPolicy())
    # a tenth of what the largest prior variance could bear
    negative = -0.1 / diag(prior.kernel, X).detach().max().item() if negative_sites else 0.0
    for kind, sites in kinds_of_sites(len(X), negative):
        posterior: Any = family.condition(prior, plan, sites)
        complete = isinstance(posterior, Posterior)
        assert complete, "the posterior lacks a method of the Posterior protocol"
        twin = dense_twin(prior, X, _test_rows(X), sites)
        _check_predictions(posterior, prior, X, twin, rtol, kind)
        _check_site_terms(posterior, len(X), twin, sites, rtol, kind)
        other: Any = family.condition(prior, plan, Sites(sites.linear + 1.0, sites.precision.abs() + 1.0))
        _ = other.mean(X)  # whatever it caches must not outlive its sites
        other = other.with_sites(sites)
        _check_same(other, posterior, X, ALGEBRA, f"{kind}: with_sites differs from condition")
    _check_zero_precision(family, prior, plan, X, rtol)
    _check_rows(family, prior, X, rtol)
    _check_gradients(family, prior, plan, len(X), rtol, negative)
    _check_sets(family.condition(prior, plan, batch_of_sites(len(X))), X, max(rtol, 1e-7))
    _check_samples(family.condition(prior, plan, batch_of_sites(len(X))), X, rtol)
    _check_copies(family.condition(prior, plan, batch_of_sites(len(X))), X)
    _check_moved(family, prior, X, NumericalPolicy(dtype=torch.float32), SINGLE)
    _check_moved(family, prior, X, NumericalPolicy(device=torch.device(device)), max(rtol, ALGEBRA))


def _problem(prior: Prior | None, X: Tensor | None) -> tuple[Prior, Tensor]:
    if prior is None:
        prior = Prior(Matern52(0.6, outputscale=1.5), constant_mean(0.4))
    if X is None:
        X = 2.0 * torch.rand(9, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert X.dim() == 2 and len(X) >= 5, "X must be (n, d) with n ≥ 5"
    return deepcopy(prior), X


def _test_rows(X: Tensor) -> Tensor:
    return X[[0, 2, 4]] + 0.37 * X.std(0)


def _near(value: Tensor, reference: Tensor, rtol: float, message: str) -> None:
    """Assert closeness relative to the largest entry of ``reference``, or to 1 where all are smaller."""
    _close(value.detach(), reference.detach(), max(1.0, reference.detach().abs().max().item()), rtol, message)


@torch.no_grad()
def _check_predictions(posterior: Any, prior: Prior, X: Tensor, twin: Twin, rtol: float, kind: str) -> None:
    n, X_new = len(X), _test_rows(X)
    mean = twin.mean + prior.mean_at(torch.cat([X, X_new]))
    variance = twin.covariance.diagonal(dim1=-2, dim2=-1)
    m, v = posterior.marginals(X_new)
    joint_mean, joint = posterior.joint(X_new)
    _near(posterior.mean(X_new), mean[..., n:], rtol, f"{kind}: mean differs from the twin")
    _near(m, mean[..., n:], rtol, f"{kind}: marginal mean differs from the twin")
    _near(v, variance[..., n:], rtol, f"{kind}: marginal variance differs from the twin")
    _near(joint, twin.covariance[..., n:, n:], rtol, f"{kind}: joint covariance differs from the twin")
    _near(joint_mean, m, ALGEBRA, f"{kind}: joint mean is not the marginal mean")
    _near(joint.diagonal(dim1=-2, dim2=-1), v, ALGEBRA, f"{kind}: marginals are not the diagonal of joint")
    m, v = posterior.at_data()
    _near(m, mean[..., :n], rtol, f"{kind}: at_data mean differs from the twin")
    _near(v, variance[..., :n], rtol, f"{kind}: at_data variance differs from the twin")


@torch.no_grad()
def _check_site_terms(posterior: Any, n: int, twin: Twin, sites: Sites, rtol: float, kind: str) -> None:
    mean, variance = twin.mean[..., :n], twin.covariance.diagonal(dim1=-2, dim2=-1)[..., :n]
    log_z, m = posterior.log_normaliser()
    _near(log_z, twin.log_z, rtol, f"{kind}: log_normaliser differs from the twin")
    _near(m, mean, rtol, f"{kind}: the mean of log_normaliser differs from the twin")
    log_z, m, v = posterior.site_terms()
    _near(log_z, twin.log_z, rtol, f"{kind}: log Z of site_terms differs from the twin")
    _near(m, mean, rtol, f"{kind}: the mean of site_terms differs from the twin")
    _near(v.expand_as(m), variance, rtol, f"{kind}: the variance of site_terms differs from the twin")
    _near(posterior.mean_at_data, m, ALGEBRA, f"{kind}: mean_at_data differs from site_terms")
    _near(posterior.variance_at_data, v, ALGEBRA, f"{kind}: variance_at_data differs from site_terms")
    vectors = draw(*mean.shape, seed=12)
    product = (twin.covariance[..., :n, :n] @ vectors.unsqueeze(-1)).squeeze(-1)
    _near(posterior.covariance_product(vectors), product, rtol, f"{kind}: covariance_product differs from the twin")
    pushed = (sites.linear * mean - 0.5 * sites.precision * (variance + mean.square())).sum(-1)
    _near(posterior.expected_log_sites(m, v), pushed, rtol, f"{kind}: expected_log_sites differs from the twin")
    _near(posterior.kl(), twin.kl, rtol, f"{kind}: kl differs from the twin")
    if bool(((sites.linear == 0) | (sites.precision != 0)).all()):
        found = posterior.log_evidence().expand_as(twin.log_evidence)
        _near(found, twin.log_evidence, rtol, f"{kind}: log_evidence differs from the twin")


@torch.no_grad()
def _check_same(one: Any, other: Any, X: Tensor, rtol: float, message: str) -> None:
    X_new = _test_rows(X)
    for left, right in zip(one.marginals(X_new), other.marginals(X_new), strict=True):
        _near(left, right, rtol, message)
    _near(one.mean(X_new), other.mean(X_new), rtol, message)
    _near(one.log_normaliser()[0], other.log_normaliser()[0], rtol, message)


@torch.no_grad()
def _check_zero_precision(family: Family, prior: Prior, plan: Any, X: Tensor, rtol: float) -> None:
    zeros = X.new_zeros(2, len(X))
    posterior: Any = family.condition(prior, plan, Sites(zeros, zeros))
    X_new = _test_rows(X)
    K = gram(prior.kernel, X_new)
    mean, covariance = posterior.joint(X_new)
    _near(mean, prior.mean_at(X_new).expand(2, -1), rtol, "sites that say nothing move the prior mean")
    _near(covariance, K.expand(2, -1, -1), rtol, "sites that say nothing change the prior covariance")
    _near(posterior.kl(), X.new_zeros(2), rtol, "KL[prior ‖ prior] is not zero")
    _near(posterior.log_normaliser()[0], X.new_zeros(2), rtol, "the prior does not integrate to one")


@torch.no_grad()
def _check_rows(family: Family, prior: Prior, X: Tensor, rtol: float) -> None:
    """Rows may come in any order, in any chunks, or alone; latents in a batch or one by one."""
    sites = batch_of_sites(len(X))

    def posterior(rows: Tensor, sites: Sites, policy: NumericalPolicy) -> Any:
        return family.condition(prior, family.plan(prior, rows, policy), sites)

    policy = NumericalPolicy()
    whole = posterior(X, sites, policy)
    order = torch.arange(len(X)).flip(0).roll(2)
    permuted = posterior(X[order], Sites(sites.linear[:, order], sites.precision[:, order]), policy)
    _check_same(permuted, whole, X, rtol, "the posterior depends on the order of the rows")
    chunked = posterior(X, sites, NumericalPolicy(chunk_elements=1))
    _check_same(chunked, whole, X, ALGEBRA, "the answer depends on the chunk size")
    batch = whole.marginals(_test_rows(X))
    for i in range(len(sites.linear)):
        member = posterior(X, Sites(sites.linear[i], sites.precision[i]), policy).marginals(_test_rows(X))
        for part, all_parts in zip(member, batch, strict=True):
            _near(all_parts[i], part, ALGEBRA, f"batch element {i} differs from the posterior of its own sites")
    alone = Sites(X.new_tensor([1.5]), X.new_tensor([2.0]))
    variance = dense_twin(prior, X[:1], X[1:2], alone).covariance[1:, 1]
    _near(posterior(X[:1], alone, policy).marginals(X[1:2])[1], variance, rtol, "a single training row is wrong")


def _outputs(posterior: Any) -> dict[str, Tensor]:
    """Return what must carry gradients in hyperparameters and sites."""
    log_z, mean = posterior.log_normaliser()
    site_log_z, site_mean, variance = posterior.site_terms()
    return {
        "log_evidence": posterior.log_evidence(),
        "log Z of log_normaliser": log_z,
        "the mean of log_normaliser": mean,
        "log Z of site_terms": site_log_z,
        "the mean of site_terms": site_mean,
        "the variance of site_terms": variance,
        "kl": posterior.kl(),
    }


def _check_gradients(family: Family, prior: Prior, plan: Any, n: int, rtol: float, negative: float) -> None:
    """Gradients in every hyperparameter and in the sites against finite differences of the values."""
    sites = batch_of_sites(n)
    if negative < 0:
        sites.precision[:, 0] = negative
    leaves: dict[str, Tensor] = {item.name: item.parameter for item in hyperparameters(prior.kernel)}
    leaves |= {"λ1": sites.linear.requires_grad_(), "λ2": sites.precision.requires_grad_()}

    def functionals() -> dict[str, Tensor]:
        """Sum each output with fixed weights."""
        found = _outputs(family.condition(prior, plan, sites))
        return {name: (value * draw(*value.shape, seed=seed)).sum() for seed, (name, value) in enumerate(found.items())}

    values, slopes = functionals(), {}
    for name, value in values.items():
        assert value.requires_grad, f"{name} carries no gradient"
        slopes[name] = torch.autograd.grad(value, [*leaves.values()], retain_graph=True, materialize_grads=True)
    with torch.no_grad():
        for name, plain in functionals().items():
            _near(values[name], plain, ALGEBRA, f"{name} differs when gradients are recorded")
    for i, (leaf, parameter) in enumerate(leaves.items()):
        direction = draw(*parameter.shape, seed=11)
        if leaf == "λ2":  # no precision may change its sign
            direction *= parameter.detach().abs()
        expected = difference(lambda: torch.stack(list(functionals().values())), parameter, direction)
        for name, slope in zip(values, expected, strict=True):
            message = f"the gradient of {name} in {leaf} differs from finite differences"
            _near((slopes[name][i] * direction).sum(), slope, max(rtol, 1e-7), message)


def _check_sets(posterior: Any, X: Tensor, rtol: float) -> None:
    """Sets of rows in a batch are what each is alone; no rows are none; gradients in the rows."""
    sets = torch.stack([_test_rows(X), _test_rows(X).flip(0) + 0.11, X[[1, 3, 0]]]).unsqueeze(1).requires_grad_()
    mean, covariance = posterior.joint(sets)
    for i, rows in enumerate(sets.squeeze(1)):
        alone = posterior.joint(rows)
        for name, found, expected in zip(
            ("mean", "covariance"), (mean[:, i, 0], covariance[:, i, 0]), alone, strict=True
        ):
            _near(found, expected, ALGEBRA, f"the joint {name} of a set in a batch differs from that of the set alone")
    no_rows, none = posterior.joint(sets[:, :, :0])
    assert no_rows.shape == (len(mean), 3, 1, 0), f"the joint mean of no rows has shape {tuple(no_rows.shape)}"
    assert none.shape == (len(mean), 3, 1, 0, 0), f"the joint covariance of no rows has shape {tuple(none.shape)}"
    weights = [draw(*value.shape, seed=seed) for seed, value in enumerate((mean, covariance))]

    def functional() -> Tensor:
        return sum(((a * b).sum() for a, b in zip(posterior.joint(sets[:2]), parts, strict=True)), mean.new_zeros(()))

    parts = [weight[:, :2] for weight in weights]  # the others are data, where a nugget leaves a kink
    (slope,) = torch.autograd.grad(functional(), sets)
    direction = draw(*sets.shape, seed=13)
    direction[2:] = 0.0
    expected = difference(functional, sets, direction, step=1e-4)
    _near(
        (slope * direction).sum(), expected, rtol, "the gradient of joint in the rows differs from finite differences"
    )


@torch.no_grad()
def _check_samples(posterior: Any, X: Tensor, rtol: float) -> None:
    """Means and covariances of draws within five standard errors; equal generators, equal draws."""
    X_new = _test_rows(X)
    draws = posterior.sample(X_new, DRAWS, torch.Generator().manual_seed(7))
    again = posterior.sample(X_new, DRAWS, torch.Generator().manual_seed(7))
    assert torch.equal(draws, again), "equal generators give different draws"
    other = posterior.sample(X_new, DRAWS, torch.Generator().manual_seed(8))
    assert not torch.equal(draws, other), "different generators give equal draws"
    mean, covariance = posterior.joint(X_new)
    assert draws.shape == (DRAWS, *mean.shape), f"sample has shape {tuple(draws.shape)}, not (n_samples, *b, n)"
    gap = draws - mean
    products = gap.unsqueeze(-1) * gap.unsqueeze(-2)
    for name, values, expected in (("mean", draws, mean), ("covariance", products, covariance)):
        error = values.std(0) / DRAWS**0.5
        off = (values.mean(0) - expected).abs()
        assert (off <= 5.0 * error + rtol).all(), f"the sample {name} is off by {(off / error).max():.1f} s.e."
    if getattr(posterior, "pathwise", False):
        paths = [posterior.sample(rows, 4, torch.Generator().manual_seed(7)) for rows in (X_new, X_new[1:])]
        _near(paths[1], paths[0][..., 1:], ALGEBRA, "a path changes with the rows at which it is evaluated")


@torch.no_grad()
def _check_copies(posterior: Any, X: Tensor) -> None:
    expected = posterior.marginals(_test_rows(X))
    for name, other in (("pickling", pickle.loads(pickle.dumps(posterior))), ("release", posterior.release())):
        for left, right in zip(other.marginals(_test_rows(X)), expected, strict=True):
            assert torch.equal(left, right), f"{name} changes predictions"


@torch.no_grad()
def _check_moved(family: Family, prior: Prior, X: Tensor, policy: NumericalPolicy, rtol: float) -> None:
    """The same numbers in the policy's dtype and on its device."""
    sites = batch_of_sites(len(X))
    expected = _values(family.condition(prior, family.plan(prior, X, NumericalPolicy()), sites), X)
    where: dict[str, Any] = {"dtype": policy.dtype, "device": policy.device}
    mean = None if prior.mean is None else deepcopy(prior.mean).to(**where)
    prior, X = Prior(deepcopy(prior.kernel).to(**where), mean), X.to(**where)
    sites = Sites(sites.linear.to(**where), sites.precision.to(**where))
    for name, value in _values(family.condition(prior, family.plan(prior, X, policy), sites), X).items():
        assert value.dtype == policy.dtype, f"{name} does not keep {policy.dtype}"
        assert value.device.type == policy.device.type, f"{name} does not stay on {policy.device}"
        _near(value.to(expected[name]), expected[name], rtol, f"{name} differs in {policy.dtype} on {policy.device}")


def _values(posterior: Any, X: Tensor) -> dict[str, Tensor]:
    mean, variance = posterior.marginals(_test_rows(X))
    draws = posterior.sample(_test_rows(X), 3, torch.Generator().manual_seed(7))
    found = {"mean": mean, "variance": variance, "joint": posterior.joint(_test_rows(X))[1], "samples": draws}
    return {**found, **_outputs(posterior)}
