"""Models for BoTorch: the shipped check for every family and likelihood, BoTorch's own models, and its acquisitions."""

import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

from mercer import GPClassifier, GPCountRegressor, GPRegressor

botorch = pytest.importorskip("botorch")

from botorch.acquisition import (  # noqa: E402
    LogExpectedImprovement,
    qKnowledgeGradient,
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
    qMaxValueEntropy,
    qNegIntegratedPosteriorVariance,
)
from botorch.acquisition.joint_entropy_search import qJointEntropySearch  # noqa: E402
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement  # noqa: E402
from botorch.acquisition.utils import get_optimal_samples  # noqa: E402
from botorch.fit import fit_gpytorch_mll  # noqa: E402
from botorch.models import ModelListGP, SingleTaskGP  # noqa: E402
from botorch.models.transforms import Normalize, Standardize  # noqa: E402
from botorch.optim import optimize_acqf  # noqa: E402
from botorch.sampling import SobolQMCNormalSampler  # noqa: E402
from botorch.sampling.pathwise import draw_matheron_paths  # noqa: E402
from gpytorch.mlls import ExactMarginalLogLikelihood, SumMarginalLogLikelihood  # noqa: E402

from mercer.interop.botorch import MercerModel  # noqa: E402
from mercer.testing import check_botorch_model  # noqa: E402

DTYPE = torch.float64
RNG = np.random.default_rng(0)
X = RNG.uniform(0, 5, size=(30, 2))
F = np.sin(2 * X[:, 0]) + 0.3 * X[:, 1]
Y = 100 + 30 * (F + 0.1 * RNG.normal(size=30))
TWO = np.column_stack([Y, -Y / 50 + RNG.normal(size=30)])
CLASSES, COUNTS, LABELS = np.digitize(F, [0, 1]), RNG.poisson(np.exp(F)), F > 0.5
NEAR = torch.as_tensor(X[:8]) + 0.03
BOUNDS = torch.tensor([[0.0, 0.0], [5.0, 5.0]], dtype=DTYPE)


def regressor(y=Y, noise_variance=None, **options):
    return GPRegressor(max_iter=15, **options).fit(X, y, noise_variance=noise_variance)


def classifier(y=LABELS, **options):
    return GPClassifier(max_iter=15, **options).fit(X, y)


@pytest.fixture(scope="module")
def fitted():
    """Gaussian and Bernoulli with the exact family."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"gaussian": regressor(), "bernoulli": classifier()}


# ---- the contract

APPROXIMATE = {"rtol": 0.05}  # what new rows are given depends on the rows before them
TABLE = {
    "exact": (regressor, {}),
    "two outputs": (lambda: regressor(TWO), {}),
    "known noise": (lambda: regressor(noise_variance=RNG.uniform(3, 20, size=30)), {}),
    "student t": (lambda: regressor(likelihood="student_t"), {}),
    "bernoulli": (classifier, {}),
    "softmax": (lambda: classifier(CLASSES), {"rtol": 0.03}),  # derivatives of its sites are those of no finite sample
    "poisson": (lambda: GPCountRegressor(max_iter=15).fit(X, COUNTS), {}),
    "inducing": (lambda: regressor(family="inducing"), {}),
    "inducing, bernoulli": (lambda: classifier(family="inducing"), {}),
    "sic": (lambda: regressor(family="sic"), {}),
    "sic, bernoulli": (lambda: classifier(family="sic"), {}),
    "sic, two outputs": (lambda: regressor(TWO, family="sic"), {}),
    "inducing vecchia": (lambda: regressor(family="inducing_vecchia"), {}),
    "inducing vecchia, bernoulli": (lambda: classifier(family="inducing_vecchia"), {}),
    "dklgp": (lambda: GPClassifier(family="dklgp").fit(X, LABELS), APPROXIMATE),
}
QUICK = ("exact", "two outputs", "student t", "bernoulli", "inducing", "inducing, bernoulli", "sic", "sic, bernoulli")


@pytest.mark.filterwarnings("ignore:.*did not converge")
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TABLE])
def test_models_keep_the_contract(name):
    make, options = TABLE[name]
    check_botorch_model(make(), NEAR, **options)


# ---- against the estimator


@pytest.mark.parametrize("y", [Y, TWO])
def test_the_posterior_is_what_the_estimator_predicts(y):
    estimator = regressor(y)
    model = estimator.to_botorch()
    mean, std = estimator.predict(X[:5] + 0.1, return_std=True)
    posterior = model.posterior(torch.as_tensor(X[:5] + 0.1), observation_noise=True)
    m = model.num_outputs
    np.testing.assert_allclose(posterior.mean.numpy(), mean.reshape(5, m), rtol=1e-10)
    np.testing.assert_allclose(posterior.variance.sqrt().numpy(), std.reshape(5, m), rtol=1e-9)
    covariance = estimator.predict(X[:5] + 0.1, return_cov=True, latent=True)[1].reshape(5, 5, m)
    for i in range(m):
        found = model.posterior(torch.as_tensor(X[:5] + 0.1), [i]).distribution.covariance_matrix
        np.testing.assert_allclose(found.numpy(), covariance[..., i], rtol=1e-8, atol=1e-9 * covariance.max())


def test_the_latent_of_classes_is_that_of_the_estimator(fitted):
    estimator = fitted["bernoulli"]
    posterior = estimator.to_botorch().posterior(NEAR)
    moments = posterior.mean.squeeze(-1), posterior.variance.squeeze(-1)
    probs = estimator.likelihood_.predictive(*moments).probs
    np.testing.assert_allclose(probs.detach().numpy(), estimator.predict_proba(NEAR.numpy()), rtol=1e-10)


def test_data_without_noise():
    X = torch.linspace(0, 1, 8, dtype=DTYPE).unsqueeze(-1)
    check_botorch_model(GPRegressor().fit(X, X[:, 0].sin()), X[1:7] + 0.03)


def test_model_and_estimator_share_nothing(fitted):
    estimator = fitted["gaussian"]
    before = estimator.predict(X)
    model = estimator.to_botorch()
    model.custom_fit(max_iter=1)
    assert np.array_equal(estimator.predict(X), before)
    assert all(each.requires_grad for each in estimator.kernel_.parameters())
    labels = model.train_targets
    assert labels.sort().values == pytest.approx(np.sort(Y))


def test_hyperparameters_are_learned_again_with_what_was_observed(fitted):
    estimator = fitted["gaussian"]
    new = X[:6] + 0.4
    y = 100 + 30 * (np.sin(2 * new[:, 0]) + 0.3 * new[:, 1])
    model = estimator.to_botorch().condition_on_observations(torch.as_tensor(new), torch.as_tensor(y).unsqueeze(-1))
    model.custom_fit()
    whole = GPRegressor().fit(np.vstack([X, new]), np.concatenate([Y, y]))
    gap = model.posterior(NEAR).mean.squeeze(-1).numpy() - whole.predict(NEAR.numpy())
    assert np.abs(gap).max() < 0.5  # other units and another subset at the start, of a spread of 30
    fantasies = model.fantasize(NEAR[:2], SobolQMCNormalSampler(torch.Size([2])))
    with pytest.raises(ValueError, match="not fitted to fantasies"):
        fantasies.custom_fit()


# ---- against BoTorch's own exact Gaussian process, at equal hyperparameters


def twins():
    """Our model and BoTorch's of the same data, prior and noise."""
    inputs = torch.as_tensor(X[:20] / 5.0)
    targets = torch.as_tensor((F[:20] - F[:20].mean()) / F[:20].std()).unsqueeze(-1)
    theirs = SingleTaskGP(inputs, targets, outcome_transform=None)
    theirs.mean_module.initialize(constant=0.0)
    theirs.covar_module.initialize(lengthscale=torch.tensor([[0.3, 0.8]], dtype=DTYPE))
    theirs.likelihood.initialize(noise=torch.tensor([0.02], dtype=DTYPE))
    theirs.eval()
    kernel = theirs.covar_module
    ours = GPRegressor(kernel, likelihood="gaussian", standardize=False, optimizer=None)
    ours.fit(inputs.numpy(), targets[:, 0].numpy(), noise_variance=0.02)
    return ours.to_botorch(), theirs, inputs


@pytest.fixture(scope="module")
def pair():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return twins()


def test_posterior_and_fantasies_equal_botorchs(pair):
    ours, theirs, inputs = pair
    new = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    for noise in (False, True):
        one, other = (model.posterior(new, observation_noise=noise) for model in (ours, theirs))
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(
            one.distribution.covariance_matrix, other.distribution.covariance_matrix, rtol=1e-8, atol=1e-8
        )
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=1)
    one, other = (model.fantasize(new, sampler).posterior(inputs[:5]) for model in (ours, theirs))
    assert one.mean.shape == other.mean.shape == (4, 2, 5, 1)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(one.variance, other.variance, rtol=1e-7, atol=1e-7)


def test_acquisition_values_equal_those_of_botorchs_model(pair):
    ours, theirs, inputs = pair
    candidates = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(2), dtype=DTYPE)
    one_shot = torch.rand(3, 2 + 8, 2, generator=torch.Generator().manual_seed(3), dtype=DTYPE)
    points = torch.rand(50, 2, generator=torch.Generator().manual_seed(4), dtype=DTYPE)

    def sampler(n):
        return SobolQMCNormalSampler(torch.Size([n]), seed=5)

    def entropy(model):
        torch.manual_seed(0)
        found = qMaxValueEntropy(model, points)
        found.sampler = sampler(128)
        return found(candidates[:, :1])

    values = {
        "LogEI": lambda model: LogExpectedImprovement(model, 0.8)(candidates[:, :1]),
        "qLogNEI": lambda model: qLogNoisyExpectedImprovement(model, inputs, sampler=sampler(64))(candidates),
        "qKG": lambda model: qKnowledgeGradient(model, num_fantasies=None, sampler=sampler(8))(one_shot),
        "qMES": entropy,
        "NIPV": lambda model: qNegIntegratedPosteriorVariance(model, points, sampler=sampler(1))(candidates),
    }
    for name, value in values.items():
        # BoTorch adds jitter where covariances are nearly singular
        torch.testing.assert_close(
            value(ours), value(theirs), rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n} {text}"
        )


# ---- acquisition functions, unmodified


def acquisitions(model, inputs):
    best = model.posterior(inputs).mean.max()
    return {
        "LogEI": (LogExpectedImprovement(model, best), 1),
        "qLogEI": (qLogExpectedImprovement(model, best, sampler=SobolQMCNormalSampler(torch.Size([32]))), 2),
        "qLogNEI": (qLogNoisyExpectedImprovement(model, inputs, sampler=SobolQMCNormalSampler(torch.Size([32]))), 2),
        "qKG": (qKnowledgeGradient(model, num_fantasies=4), 2),
        "qMES": (qMaxValueEntropy(model, 5.0 * torch.rand(30, 2, dtype=DTYPE)), 1),
        "qMES, pending": (qMaxValueEntropy(model, 5.0 * torch.rand(30, 2, dtype=DTYPE), X_pending=NEAR[:2]), 1),
    }


def optimise(model):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # at a converged start a line search may end in rounding; BoTorch says so and tries again
        warnings.filterwarnings("ignore", "Optimization failed", category=RuntimeWarning)
        for name, (acquisition, q) in acquisitions(model, torch.as_tensor(X)).items():
            options = {"maxiter": 4}
            found, value = optimize_acqf(acquisition, BOUNDS, q=q, num_restarts=2, raw_samples=8, options=options)
            assert found.shape == (q, 2) and ((found >= BOUNDS[0]) & (found <= BOUNDS[1])).all(), name
            assert value.isfinite(), name
        assert acquisitions(model, torch.as_tensor(X))["qLogNEI"][0]._cache_root


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_acquisition_functions_run_unmodified(fitted, kind):
    optimise(fitted[kind].to_botorch())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["inducing", "sic", "inducing_vecchia"])
@pytest.mark.parametrize("make", [regressor, classifier])
def test_acquisition_functions_run_unmodified_on_sparse_families(family, make):
    optimise(make(family=family).to_botorch())


@pytest.mark.slow
def test_several_objectives_and_joint_entropy(fitted):
    model = regressor(TWO).to_botorch()
    acquisition = qLogNoisyExpectedHypervolumeImprovement(model, ref_point=[90.0, -3.0], X_baseline=torch.as_tensor(X))
    assert acquisition._cache_root
    assert acquisition(NEAR[:6].reshape(3, 2, 2)).isfinite().all()
    for estimator in fitted.values():
        model = estimator.to_botorch()
        optima = get_optimal_samples(model, BOUNDS, num_optima=4, raw_samples=32, num_restarts=2)
        assert qJointEntropySearch(model, *optima)(NEAR[:3].unsqueeze(1)).isfinite().all()


def test_the_gradient_of_the_knowledge_gradient(fitted):
    for estimator in fitted.values():
        acquisition = qKnowledgeGradient(estimator.to_botorch(), num_fantasies=4)
        rows = (5.0 * torch.rand(1, 6, 2, generator=torch.Generator().manual_seed(1), dtype=DTYPE)).requires_grad_()
        (slope,) = torch.autograd.grad(acquisition(rows).sum(), rows)
        direction, h = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2), dtype=DTYPE), 1e-5
        with torch.no_grad():
            expected = (acquisition(rows + h * direction) - acquisition(rows - h * direction)) / (2 * h)
        assert float((slope * direction).sum()) == pytest.approx(float(expected), rel=1e-6)


def test_the_mean_alone_never_computes_a_covariance(fitted):
    posterior = (
        fitted["gaussian"].to_botorch().fantasize(NEAR[:2], SobolQMCNormalSampler(torch.Size([4]))).posterior(NEAR)
    )
    assert posterior.mean.shape == (4, 8, 1)
    assert "distribution" not in posterior.__dict__


# ---- functions


@pytest.mark.parametrize("family", ["exact", "inducing"])
@pytest.mark.parametrize("y", [Y, TWO])
def test_matheron_paths_are_functions_with_the_posteriors_moments(family, y):
    model = regressor(y, family=family).to_botorch()
    model = model.condition_on_observations(NEAR[:2], model.posterior(NEAR[:2]).mean + 20.0)
    torch.manual_seed(0)
    paths = draw_matheron_paths(model, torch.Size([2000]))
    shape = (lambda value: value.unsqueeze(-3)) if model.num_outputs > 1 else (lambda value: value)
    rows = NEAR.clone().requires_grad_()
    draws = paths(shape(rows))
    again = paths(shape(rows[2:5]))
    torch.testing.assert_close(again, draws[..., 2:5], rtol=1e-9, atol=1e-9)
    assert torch.autograd.grad(draws[0].sum(), rows)[0].abs().sum() > 0
    posterior = model.posterior(NEAR)
    mean, spread = posterior.mean.squeeze(-1), posterior.variance.sqrt().squeeze(-1)
    mean, spread = (each.mT if model.num_outputs > 1 else each for each in (mean, spread))
    draws = draws.detach()
    assert ((draws.mean(0) - mean).abs() < 6 * spread / 2000**0.5).all()
    assert (draws.std(0) / spread - 1.0).abs().max() < 0.15  # 32 groups of random features


@pytest.mark.parametrize("y", [Y, TWO])
def test_each_draw_may_meet_rows_of_its_own(y):
    """As when every draw is maximised: X of shape (n, draws, q, d)."""
    model = regressor(y, optimizer=None).to_botorch()
    paths = draw_matheron_paths(model, torch.Size([3]))
    several = model.num_outputs > 1
    own = torch.stack([NEAR[:6].reshape(3, 2, 2), NEAR[:6].reshape(3, 2, 2) + 0.1])
    found = paths(own.unsqueeze(-3) if several else own)
    for n in range(2):
        for i in range(3):
            alone = paths(own[n, i].unsqueeze(-3) if several else own[n, i])[i]
            torch.testing.assert_close(found[n, i], alone, rtol=1e-9, atol=1e-9)


def test_paths_that_there_are_not_are_refused():
    with pytest.raises(NotImplementedError, match="family='exact'"):
        draw_matheron_paths(regressor(family="sic").to_botorch(), torch.Size([2]))


# ---- from data, as BoTorch's own models


def test_models_from_data_are_fitted_by_fit_gpytorch_mll():
    inputs, targets = torch.as_tensor(X), torch.as_tensor(Y).unsqueeze(-1)
    model = MercerModel(inputs, targets)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    reference = GPRegressor().fit(X, Y)
    assert model.likelihood.noise.item() == pytest.approx(reference.noise_variance_, rel=1e-3)
    np.testing.assert_allclose(model.posterior(NEAR).mean[:, 0].numpy(), reference.predict(NEAR.numpy()), rtol=1e-4)
    moved = MercerModel(inputs, targets, input_transform=Normalize(2), outcome_transform=Standardize(1))
    both = ModelListGP(moved, model)
    fit_gpytorch_mll(SumMarginalLogLikelihood(both.likelihood, both))
    # model starts where it was, and moved afresh
    torch.testing.assert_close(moved.posterior(NEAR).mean, model.posterior(NEAR).mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moved.train_inputs[0].sort(0).values, inputs.sort(0).values)
    torch.testing.assert_close(moved.train_targets.sort().values, targets[:, 0].sort().values)


@pytest.mark.parametrize(
    ("likelihood", "y"), [("logit", LABELS), ("softmax", CLASSES), ("poisson", COUNTS), ("student_t", Y)]
)
def test_models_from_data_of_other_likelihoods(likelihood, y):
    model = MercerModel(torch.as_tensor(X), torch.as_tensor(y.astype(float)).unsqueeze(-1), likelihood=likelihood)
    model.custom_fit(max_iter=3)
    mean = model.posterior(torch.as_tensor(X)).mean
    assert mean.shape == (30, 3 if likelihood == "softmax" else 1)
    if likelihood == "softmax":
        assert (mean.argmax(-1).numpy() == CLASSES).mean() > 0.8
    else:
        assert np.corrcoef(mean[:, 0].numpy(), y)[0, 1] > 0.7
    assert model.construct_inputs is not None


# ---- refusals


def test_what_does_not_fit_is_refused_by_name(fitted):
    model = fitted["gaussian"].to_botorch()
    with pytest.raises(ValueError, match=r"X must be \(\.\.\., q, 2\)"):
        model.posterior(torch.zeros(3, 4, dtype=DTYPE))
    with pytest.raises(ValueError, match=r"Y must be \(\.\.\., q, 1\)"):
        model.condition_on_observations(NEAR[:2], torch.zeros(2, 3, dtype=DTYPE))
    classes = fitted["bernoulli"].to_botorch()
    with pytest.raises(ValueError, match="y must hold integers from 0 to 1"):
        classes.condition_on_observations(NEAR[:2], torch.full((2, 1), 0.5, dtype=DTYPE))
    with pytest.raises(ValueError, match="outcome_transform is for real targets"):
        fitted["bernoulli"].to_botorch(outcome_transform=Standardize(1))
    smooth = classes.fantasize(NEAR[:2], SobolQMCNormalSampler(torch.Size([2])))
    assert not hasattr(smooth, "train_targets")
    given = model.condition_on_observations(
        NEAR[:2], torch.full((2, 1), 90.0, dtype=DTYPE), torch.ones(2, 1, dtype=DTYPE)
    )
    with pytest.raises(ValueError, match="noise must be known for all"):
        given.custom_fit()


def test_an_estimator_must_be_fitted_and_botorch_installed(fitted, monkeypatch):
    with pytest.raises(NotFittedError):
        GPRegressor().to_botorch()
    monkeypatch.delitem(sys.modules, "mercer.interop.botorch")
    monkeypatch.setitem(sys.modules, "botorch.models.gpytorch", None)
    with pytest.raises(ImportError, match=r"mercer\[bo\]"):
        fitted["gaussian"].to_botorch()


@pytest.mark.slow
def test_transforms_of_the_estimators_inputs_and_targets():
    scaled, center = (X - 2.0) / 3.0, Y.mean()
    estimator = GPRegressor(max_iter=15).fit(scaled, Y - center)
    outcome = Standardize(1)
    outcome.means, outcome.stdvs, outcome._stdvs_sq = (torch.full((1, 1), v, dtype=DTYPE) for v in (center, 1.0, 1.0))
    outcome._is_trained = torch.tensor(True)
    inputs = Normalize(2, bounds=torch.tensor([[2.0, 2.0], [5.0, 5.0]], dtype=DTYPE))
    model = estimator.to_botorch(input_transform=inputs, outcome_transform=outcome)
    expected = estimator.predict((NEAR.numpy() - 2.0) / 3.0) + center
    np.testing.assert_allclose(model.posterior(NEAR).mean[:, 0].numpy(), expected, rtol=1e-9)
    torch.testing.assert_close(model.train_inputs[0].sort(0).values, torch.as_tensor(X).sort(0).values)
