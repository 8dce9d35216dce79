"""The conformance suites reject parts with one planted fault each, and name the property that fails."""

from dataclasses import replace

import pytest
import torch
from gpytorch.kernels import LinearKernel, RBFKernel
from linear_operator.operators import DenseLinearOperator

from mercer._typing import Sites
from mercer.families.exact import Exact, ExactPosterior
from mercer.inference import Dual
from mercer.likelihoods import Bernoulli, Gaussian, Poisson
from mercer.testing import check_engine, check_family, check_kernel, check_likelihood, check_operator

BINARY = torch.tensor([0, 1, 1, 0, 1, 1, 0], dtype=torch.float64)


def rejects(check, match, *args, **options):
    with pytest.raises(AssertionError, match=match):
        check(*args, **options)


# ---- families


class Broken(Exact):
    """An exact family whose posterior is of another class."""

    def __init__(self, posterior):
        super().__init__()
        object.__setattr__(self, "posterior", posterior)

    def condition(self, prior, plan, sites):
        return self.posterior(prior, plan, sites)


class VarianceOfThePrior(ExactPosterior):
    def marginals(self, X):
        mean, variance = super().marginals(X)
        return mean, torch.full_like(variance, 1.5)


class NoMean(ExactPosterior):
    def mean(self, X):
        return super().mean(X) - self.prior.mean_at(X)


class UnexpandedJoint(ExactPosterior):
    def joint(self, X):
        return self._joint(X)


class DependentJoint(ExactPosterior):
    def joint(self, X):
        mean, covariance = super().joint(X)
        return mean, covariance.diagonal(dim1=-2, dim2=-1).diag_embed()


class CoupledSets(ExactPosterior):
    def joint(self, X):
        mean, covariance = super().joint(X)
        return (mean if X.dim() == 2 else mean + 1e-6 * X.sum()), covariance


class NoGradientInRows(ExactPosterior):
    def joint(self, X):
        mean, covariance = super().joint(X)
        return mean, covariance.detach() + 0.0 * X.sum()


class HalfKL(ExactPosterior):
    def kl(self):
        return 0.5 * super().kl()


class WrongNormaliser(ExactPosterior):
    def log_normaliser(self):
        log_z, mean = super().log_normaliser()
        return log_z + 1e-4, mean


class ProductOfThePrior(ExactPosterior):
    def covariance_product(self, vectors):
        return (self.K @ vectors.unsqueeze(-1)).squeeze(-1)


class NoGradientOfVariance(ExactPosterior):
    def site_terms(self):
        log_z, mean, variance = super().site_terms()
        return log_z, mean, variance.detach()


class WrongGradient(ExactPosterior):
    def log_evidence(self):
        value = super().log_evidence()
        return value.detach() + 1.001 * (value - value.detach())


class StaleSites(ExactPosterior):
    def with_sites(self, sites):
        return self


class GlobalSeed(ExactPosterior):
    def sample(self, X, n_samples, generator):
        return super().sample(X, n_samples, torch.Generator().manual_seed(torch.seed() % 1000))


class NarrowSamples(ExactPosterior):
    def sample(self, X, n_samples, generator):
        mean = self.mean(X)
        return mean + 0.8 * (super().sample(X, n_samples, generator) - mean)


class JumpingPaths(ExactPosterior):
    def sample(self, X, n_samples, generator):
        mean, covariance = self.joint(X)
        noise = torch.randn((n_samples, *mean.shape), generator=generator, dtype=torch.float64).to(X)
        return mean + (torch.linalg.cholesky(covariance) @ noise.unsqueeze(-1)).squeeze(-1)


class ChunkDependent(ExactPosterior):
    def mean(self, X):
        return super().mean(X) + (1e-6 if self.plan.policy.chunk_elements == 1 else 0.0)


class FirstRowIsSpecial(ExactPosterior):
    def __init__(self, prior, plan, sites, K=None):
        # right at the rows as they come, so that only the comparison of orders can tell
        moved = plan.X[0, 0] < plan.X[1, 0]
        super().__init__(prior, plan, Sites(1.01 * sites.linear, sites.precision) if moved else sites, K)


class CoupledLatents(ExactPosterior):
    """Wrong by less than the tolerance for approximate families, but not the same in a batch and alone."""

    def __init__(self, prior, plan, sites, K=None):
        batch = sites.linear.dim() > 1
        super().__init__(prior, plan, Sites((1.0 + 1e-6 * batch) * sites.linear, sites.precision), K)

    def with_sites(self, sites):
        return CoupledLatents(self.prior, self.plan, sites, self.K)


class AlwaysDouble(ExactPosterior):
    def marginals(self, X):
        return tuple(value.double() for value in super().marginals(X))


class ForgetsOnPickling(ExactPosterior):
    def __getstate__(self):
        return {**super().__getstate__(), "sites": Sites(0 * self.sites.linear, self.sites.precision), "factor": None}

    def __setstate__(self, state):
        state.pop("factor")
        self.__dict__.update(state)


BROKEN_FAMILIES = {
    "marginal variance differs from the twin": VarianceOfThePrior,
    "one latent: mean differs from the twin": NoMean,
    "a shared precision: joint covariance": UnexpandedJoint,
    "joint covariance differs": DependentJoint,
    "a set in a batch differs": CoupledSets,
    "gradient of joint in the rows": NoGradientInRows,
    "kl differs": HalfKL,
    "log_normaliser differs": WrongNormaliser,
    "covariance_product differs": ProductOfThePrior,
    "variance of site_terms carries no gradient": NoGradientOfVariance,
    "gradient of log_evidence": WrongGradient,
    "with_sites": StaleSites,
    "equal generators give different draws": GlobalSeed,
    "sample covariance is off": NarrowSamples,
    "a path changes": JumpingPaths,
    "depends on the chunk size": ChunkDependent,
    "depends on the order": FirstRowIsSpecial,
    "batch element": CoupledLatents,
    "does not keep torch.float32": AlwaysDouble,
    "pickling changes predictions": ForgetsOnPickling,
}


@pytest.mark.parametrize("match", BROKEN_FAMILIES)
def test_a_broken_family_is_rejected(match):
    rejects(check_family, match, Broken(BROKEN_FAMILIES[match]), rtol=1e-3 if match == "batch element" else 1e-6)


# ---- engines


class IgnoresWeights(Dual):
    def step(self, model, plan, state, data):
        return super().step(model, plan, state, replace(data, weight=torch.ones_like(data.weight)))


class Overshoots(Dual):
    """Takes the whole natural-gradient step and half as much again, whatever the bound says."""

    def step(self, model, plan, state, data):
        sites = state.sites.blend(state.target, 2.6)
        return self.init(model, plan, data, sites), {"converged": False}


class StopsEarly(Dual):
    def step(self, model, plan, state, data):
        state, info = super().step(model, plan, state, data)
        return state, {**info, "converged": True}


class StaysWhereItIsPut(Dual):
    def init(self, model, plan, data, sites=None):
        state = super().init(model, plan, data, sites)
        return state if sites is None else replace(state, target=state.sites)


class ForgetsTheLikelihood(Dual):
    """The objective lacks the derivative in the likelihood's parameters and the prior mean."""

    def objective(self, model, plan, state, data):
        whole = super().objective(model, plan, state, data)
        return frozen(model, plan, state) if torch.is_grad_enabled() else whole


def frozen(model, plan, state):
    surrogate = model.family.condition(model.prior, plan, state.sites).log_normaliser()[0].sum()
    return surrogate + (state.value - surrogate.detach())


class MissingIsZero(Dual):
    def init(self, model, plan, data, sites=None):
        return super().init(model, plan, replace(data, y=data.y.nan_to_num(0.0)), sites)

    def step(self, model, plan, state, data):
        return super().step(model, plan, state, replace(data, y=data.y.nan_to_num(0.0)))


class FirstRowCountsMore(Dual):
    def init(self, model, plan, data, sites=None):
        return super().init(model, plan, tilted(data), sites)

    def step(self, model, plan, state, data):
        return super().step(model, plan, state, tilted(data))


def tilted(data):
    return replace(data, weight=torch.cat([1.01 * data.weight[:1], data.weight[1:]]))


class CountsOneOutput(Dual):
    def objective(self, model, plan, state, data):
        value = super().objective(model, plan, state, data)
        return value if data.y.dim() == 1 else value / len(data.y)


BROKEN_ENGINES = {
    "weight 2 is not the row twice": IgnoresWeights(memory=0),
    "lowers the bound|no convergence": Overshoots(),
    "does not stay|converged start": StopsEarly(),
    "lead to another fixed point": StaysWhereItIsPut(),
    "gradient in mean|gradient in likelihood": ForgetsTheLikelihood(),
    "missing target": MissingIsZero(),
    "order of the rows": FirstRowCountsMore(),
    "evidence of two outputs": CountsOneOutput(),
}


@pytest.mark.parametrize("match", BROKEN_ENGINES)
def test_a_broken_engine_is_rejected(match):
    rejects(check_engine, match, BROKEN_ENGINES[match], Bernoulli(), BINARY)


def test_an_engine_that_takes_every_newton_step_is_rejected_on_counts():
    class Unguarded(Dual):
        def _try(self, model, plan, state, *rest):
            return super()._try(model, plan, replace(state, value=-torch.inf), *rest)

    counts = torch.tensor([0, 300, 0, 2, 500, 1, 0], dtype=torch.float64)
    rejects(check_engine, "lowers the bound", Unguarded(memory=0), Poisson(), counts)


# ---- operators


def covariance():
    A = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return A @ A.mT + torch.eye(5, dtype=torch.float64)


class WrongProduct(DenseLinearOperator):
    def _matmul(self, rhs):
        return super()._matmul(rhs) + 1e-6


class NotTransposed(DenseLinearOperator):
    def _transpose_nonbatch(self):
        return self


class WrongDiagonal(DenseLinearOperator):
    def _diagonal(self):
        return super()._diagonal() + 1e-6


class WrongSolve(DenseLinearOperator):
    def solve(self, right_tensor, left_tensor=None):
        return right_tensor / self.tensor.diagonal().unsqueeze(-1)


class WrongLogdet(DenseLinearOperator):
    def logdet(self):
        return self.tensor.diagonal().log().sum()


class NoGradient(DenseLinearOperator):
    def logdet(self):
        return super().logdet() + 0.0 * self.tensor.sum() - super().logdet() + torch.logdet(self.tensor.detach())


class StaysDouble(DenseLinearOperator):
    def _matmul(self, rhs):
        return super()._matmul(rhs).double()


class WrongShape(DenseLinearOperator):
    def to_dense(self):
        return self.tensor[..., :-1]


BROKEN_OPERATORS = {
    "matmul with a matrix differs": (WrongProduct(covariance()), True),
    "from the left differs|transpose differs": (NotTransposed(covariance().tril()), False),
    "not symmetric": (DenseLinearOperator(covariance().tril()), True),
    "diagonal differs": (WrongDiagonal(covariance()), True),
    "solve differs": (WrongSolve(covariance()), True),
    "logdet differs": (WrongLogdet(covariance()), True),
    "gradient of logdet": (NoGradient(covariance()), True),
    "does not keep float32": (StaysDouble(covariance()), True),
    "to_dense has shape": (WrongShape(covariance()), True),
}


@pytest.mark.parametrize("match", BROKEN_OPERATORS)
def test_a_broken_operator_is_rejected(match):
    operator, positive_definite = BROKEN_OPERATORS[match]
    rejects(check_operator, match, operator, positive_definite=positive_definite)


# ---- kernels and likelihoods


class Indefinite(RBFKernel):
    def forward(self, x1, x2, diag=False, **params):
        return super().forward(x1, x2, diag=diag, **params) - 0.5


class OneSided(LinearKernel):
    def forward(self, x1, x2, diag=False, **params):
        value = super().forward(x1, x2, diag=diag, **params).to_dense()
        return value if diag else value + x1[..., :1] * (1.0 + 0.0 * x2[..., :1].mT)


class PositionDependent(LinearKernel):
    def forward(self, x1, x2, diag=False, **params):
        value = super().forward(x1, x2, diag=diag, **params)
        value = value if diag else value.to_dense()
        return value * (2.0 if not diag and x1.shape[-2] == 1 else 1.0)


BROKEN_KERNELS = {
    "semi-definite": Indefinite(),
    "not symmetric": OneSided(),
    "one row differs": PositionDependent(),
}


@pytest.mark.parametrize("match", BROKEN_KERNELS)
def test_a_broken_kernel_is_rejected(match):
    rejects(check_kernel, match, BROKEN_KERNELS[match])


class WrongScale(Gaussian):
    def log_predictive_density(self, y, m, v, **side):
        return super().log_predictive_density(y, m, 1.1 * v, **side)


class WrongMean(Bernoulli):
    def predictive(self, m, v, **side):
        found = super().predictive(m, v, **side)
        return found._replace(mean=0.99 * found.mean)


class UnseededDraws(Gaussian):
    def sample(self, f, generator=None, **side):
        return super().sample(f, None, **side)


class WideDraws(Gaussian):
    def sample(self, f, generator=None, **side):
        return f + 1.1 * (super().sample(f, generator, **side) - f)


class NegativeCurvature(Bernoulli):
    def expected_log_prob(self, y, m, v, **side):
        found = super().expected_log_prob(y, m, v, **side)
        return found._replace(beta=torch.where(v > 500.0, -found.beta, found.beta))


class MissingCounts(Gaussian):
    def log_prob(self, y, f, **side):
        return super().log_prob(y, f, **side) - torch.isnan(y).to(f)


BROKEN_LIKELIHOODS = {
    "log_predictive_density against brute force": WrongScale(0.3),
    "predictive mean": WrongMean(),
    "seeded draws differ": UnseededDraws(0.3),
    "sample mean": WideDraws(0.3),
    "log-concave": NegativeCurvature(),
    "0 where y is NaN": MissingCounts(0.3),
}


@pytest.mark.parametrize("match", BROKEN_LIKELIHOODS)
def test_a_broken_likelihood_is_rejected(match):
    rejects(check_likelihood, match, BROKEN_LIKELIHOODS[match], BINARY)
