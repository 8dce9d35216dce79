"""Strings and "auto" become a model by rules that can be read, with reasons and refusals that help."""

import gpytorch
import pytest
import torch

from mercer.families import Exact, Prior, SparseInverseCholesky
from mercer.inference import Conjugate, Dual, Laplace, PowerEP
from mercer.kernels import RBF
from mercer.likelihoods import Bernoulli, Gaussian, NegativeBinomial, Ordinal, Poisson, Softmax, StudentT, adapt
from mercer.policy import NumericalPolicy
from mercer.resolve import ENGINE_RULES, ENGINES, FAMILIES, FAMILY_RULES, Problem, resolve

PRIOR = Prior(RBF(1.0))
POLICY = NumericalPolicy()
NON_GAUSSIAN = [Bernoulli(), Softmax(3), Poisson(), NegativeBinomial(), StudentT(), Ordinal(3)]


def decide(likelihood, family="auto", engine="auto", n_rows=100, policy=POLICY):
    return resolve(PRIOR, likelihood, family, engine, n_rows, policy, 2)


def test_the_model_holds_what_was_passed():
    likelihood = Gaussian()
    model, _ = decide(likelihood)
    assert model.prior is PRIOR and model.likelihood is likelihood and model.policy is POLICY


@pytest.mark.parametrize("likelihood", [Gaussian(), adapt(gpytorch.likelihoods.GaussianLikelihood())])
def test_gaussian_noise_is_conjugate(likelihood):
    model, reasons = decide(likelihood)
    assert isinstance(model.family, Exact) and isinstance(model.engine, Conjugate)
    assert "closed form" in reasons["engine"] and "n = 100" in reasons["family"]


@pytest.mark.parametrize("likelihood", NON_GAUSSIAN, ids=lambda item: type(item).__name__)
def test_other_likelihoods_get_natural_gradients(likelihood):
    model, reasons = decide(likelihood)
    assert isinstance(model.engine, Dual) and "natural-gradient" in reasons["engine"]


@pytest.mark.parametrize("rules", [FAMILY_RULES, ENGINE_RULES])
def test_the_first_rule_that_applies_wins(rules):
    problem = Problem(50, 2, Gaussian(), POLICY)
    first = next(rule for rule in rules if rule.applies(problem))
    model, reasons = decide(Gaussian(), n_rows=50)
    part, reason = (model.family, reasons["family"]) if rules is FAMILY_RULES else (model.engine, reasons["engine"])
    assert type(part) is type(first.make()) and reason == first.reason(problem)


@pytest.mark.parametrize(("rules", "table"), [(FAMILY_RULES, FAMILIES), (ENGINE_RULES, ENGINES)])
def test_every_automatic_choice_can_be_named(rules, table):
    for rule in rules:
        assert type(table[rule.name]()) is type(rule.make())
    for name, make in table.items():
        assert make().name == name


@pytest.mark.parametrize(("engine", "kind"), [("dual", Dual), ("laplace", Laplace), ("power_ep", PowerEP)])
def test_names_choose_and_say_so(engine, kind):
    model, reasons = decide(Bernoulli(), "exact", engine)
    assert type(model.engine) is kind and type(model.family) is Exact
    assert reasons == {"family": "chosen by the user", "engine": "chosen by the user"}


def test_objects_are_taken_as_they_are():
    family, engine = Exact(), Dual(step_size=0.5)
    model, reasons = decide(Poisson(), family, engine)
    assert model.family is family and model.engine is engine and reasons["engine"] == "chosen by the user"


@pytest.mark.parametrize("parameter", ["family", "engine"])
def test_unknown_names_are_refused_with_the_known_ones(parameter):
    with pytest.raises(ValueError, match=f"{parameter}='nystrom' is unknown.*'auto'") as caught:
        decide(Gaussian(), **{parameter: "nystrom"})
    for name in FAMILIES if parameter == "family" else ENGINES:
        assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "choice", [{"family": Exact}, {"family": 3}, {"family": Dual()}, {"engine": Dual}, {"engine": None}]
)
def test_classes_and_other_objects_are_refused_by_the_name_of_the_parameter(choice):
    (parameter,) = choice
    with pytest.raises(TypeError, match=f"{parameter} must be 'auto'"):
        decide(Gaussian(), **choice)


@pytest.mark.parametrize("likelihood", NON_GAUSSIAN, ids=lambda item: type(item).__name__)
@pytest.mark.parametrize("engine", ["conjugate", Conjugate()], ids=["name", "object"])
def test_closed_form_inference_is_refused_for_other_likelihoods(likelihood, engine):
    with pytest.raises(ValueError, match=f"{type(likelihood).__name__}; use engine='dual'"):
        decide(likelihood, engine=engine)
    assert decide(likelihood, engine="dual")[0].engine.name == "dual"  # the nearest pair works


@pytest.mark.parametrize("engine", ["laplace", "power_ep"])
def test_engines_for_one_latent_are_refused_for_several(engine):
    with pytest.raises(ValueError, match="one latent function and Softmax has 3; use engine='dual'"):
        decide(Softmax(3), engine=engine)


def test_many_rows_are_given_their_neighbours_and_the_report_says_why():
    model, reasons = decide(Gaussian(), n_rows=10_000_000)
    assert isinstance(model.family, SparseInverseCholesky)
    assert "n = 10000000" in reasons["family"] and "GB" in reasons["family"] and "neighbours" in reasons["family"]


def test_exact_fits_end_where_they_take_minutes():
    for likelihood, last in ((Gaussian(), 6000), (Softmax(8), 3000)):  # eight latents cost as much as twice the rows
        assert decide(likelihood, n_rows=last)[0].family.name == "exact"
        assert decide(likelihood, n_rows=last + 1)[0].family.name == "sic"


def test_memory_grows_with_rows_latents_and_precision():
    def needed(n, likelihood, dtype=torch.float64):
        return Problem(n, 2, likelihood, NumericalPolicy(dtype=dtype)).exact_bytes

    assert needed(2000, Gaussian()) == 4 * needed(1000, Gaussian())
    assert needed(1000, Softmax(5)) == 5 * needed(1000, Gaussian())
    # learning in float32 takes half, but the posterior is in float64 all the same
    assert needed(1000, Gaussian(), torch.float32) == needed(1000, Gaussian()) * 3 // 4
    assert needed(1000, Gaussian()) >= 1000**2 * 8


def test_the_limit_is_the_memory_of_the_device(monkeypatch):
    needed = Problem(1000, 2, Gaussian(), POLICY).exact_bytes
    monkeypatch.setattr("mercer.resolve._memory", lambda device: needed)
    assert decide(Gaussian(), n_rows=1000)[0].family.name == "exact"
    assert decide(Gaussian(), n_rows=1001)[0].family.name == "sic"
