"""Saved or pickled, a fitted estimator predicts the same bits; a file that says anything unknown is refused."""

import json
import os
import pickle
import stat

import gpytorch
import numpy as np
import pandas as pd
import pytest
import safetensors
import safetensors.torch
import torch
from gpytorch import constraints, likelihoods, means, priors
from gpytorch.kernels import ConstantKernel, MaternKernel, RBFKernel, ScaleKernel, SpectralMixtureKernel
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import mercer
from mercer import GPClassifier, GPCountRegressor, GPRegressor
from mercer.kernels import RBF, Matern52
from mercer.kernels.factories import _SHORTHANDS

rng = np.random.default_rng(0)
X = rng.uniform(size=(30, 2))
Y = np.sin(5 * X[:, 0]) + 0.1 * rng.normal(size=30)
NAMES = np.array(["ash", "elm", "oak"])[np.digitize(X[:, 0], [0.3, 0.7])]
COUNTS = rng.poisson(np.exp(1 + X[:, 0]))
FITS = {
    "default": lambda: GPRegressor(max_iter=5).fit(X, Y),
    "frame": lambda: GPRegressor(max_iter=3).fit(pd.DataFrame(X, columns=["a", "b"]), Y),
    "student_t": lambda: GPRegressor(likelihood="student_t", max_iter=3).fit(X, Y),
    "outputs": lambda: GPRegressor(max_iter=3).fit(X, np.column_stack([Y, Y**2])),
    "missing": lambda: GPRegressor(max_iter=3).fit(X, np.column_stack([np.where(X[:, 0] > 0.5, np.nan, Y), Y])),
    "known noise": lambda: GPRegressor(max_iter=3).fit(X, Y, noise_variance=np.full(30, 0.01)),
    "float32": lambda: GPRegressor(dtype="float32", max_iter=3).fit(X, Y),
    "mean": lambda: GPRegressor(mean=means.LinearMean(2), max_iter=3).fit(X, Y),
    "logit": lambda: GPClassifier(max_iter=3).fit(X, NAMES == "oak"),
    "laplace": lambda: GPClassifier(engine="laplace", max_iter=3).fit(X, NAMES == "oak"),
    "probit": lambda: GPClassifier(likelihood="probit", engine="power_ep", max_iter=3).fit(X, NAMES == "oak"),
    "softmax": lambda: GPClassifier(max_iter=3).fit(X, NAMES),
    "object labels": lambda: GPClassifier(max_iter=3).fit(X, NAMES.astype(object)),
    "ordinal": lambda: GPClassifier(likelihood="ordinal", max_iter=3).fit(X, NAMES),
    "poisson": lambda: GPCountRegressor(max_iter=3).fit(X, COUNTS, exposure=1 + X[:, 1]),
    "negative_binomial": lambda: GPCountRegressor(likelihood="negative_binomial", max_iter=3).fit(X, COUNTS),
    "gpytorch gaussian": lambda: GPRegressor(
        likelihood=likelihoods.GaussianLikelihood(noise_prior=priors.GammaPrior(1.1, 0.5)), max_iter=3
    ).fit(X, Y),
    "gpytorch student_t": lambda: GPRegressor(likelihood=likelihoods.StudentTLikelihood(), max_iter=3).fit(X, Y),
}
KERNELS = {
    **{name: lambda name=name: name for name in _SHORTHANDS},
    "sum": lambda: "rbf + linear",
    "product": lambda: "periodic * rbf + constant",
    "ard": lambda: Matern52([0.3, 2.0], outputscale=1.5),
    "isotropic": lambda: RBF(0.5, ard=False),
    "columns": lambda: RBF(active_dims=[0]) * Matern52(active_dims=[1]),
    "mixture": lambda: SpectralMixtureKernel(num_mixtures=2, ard_num_dims=2),
    "bounds": lambda: ScaleKernel(
        RBFKernel(lengthscale_constraint=constraints.Interval(0.1, 3.0)),
        outputscale_constraint=constraints.LessThan(5.0),
    ),
}
PRIORS = [
    priors.GammaPrior(2.0, 3.0),
    priors.HalfCauchyPrior(1.0),
    priors.HalfNormalPrior(1.0),
    priors.HorseshoePrior(0.1),
    priors.LogNormalPrior(0.0, 1.0),
    priors.NormalPrior(0.0, 1.0, transform=torch.log),
    priors.SmoothedBoxPrior(0.1, 3.0),
    priors.UniformPrior(0.01, 5.0),
]
pytestmark = pytest.mark.filterwarnings("ignore")


def numbers(model):
    """Everything that a model says about new rows, its training rows and its evidence."""
    new = np.linspace(0, 1, 8).reshape(4, 2)
    if hasattr(model, "feature_names_in_"):
        new = pd.DataFrame(new, columns=model.feature_names_in_)
    if isinstance(model, GPClassifier):
        found = [model.predict_proba(new), model.loo_predict_proba()]
    else:
        found = [*model.predict(new, return_std=True), *model.loo_predict(return_std=True)]
    value, gradient = model.log_marginal_likelihood(model.theta_, eval_gradient=True)
    return [*found, np.asarray(value), gradient, model.sample_y(new, 2, random_state=3)]


def assert_same(one, other):
    for a, b in zip(numbers(one), numbers(other), strict=True):
        np.testing.assert_array_equal(a, b)


def reloaded(model, tmp_path):
    path = tmp_path / "model.mercer"
    model.save(path)
    return mercer.load(path)


@pytest.fixture
def path(tmp_path):
    """A file with a small model that has a kernel, a constraint and a prior."""
    path = tmp_path / "model.mercer"
    kernel = ScaleKernel(RBFKernel(lengthscale_prior=priors.GammaPrior(2.0, 3.0)))
    GPRegressor(kernel, optimizer=None).fit(X, Y).save(path)
    return path


@pytest.mark.parametrize("name", FITS)
def test_a_loaded_model_says_the_same_to_the_bit(name, tmp_path):
    model = FITS[name]()
    loaded = reloaded(model, tmp_path)
    assert_same(model, loaded)
    assert str(loaded.fit_report_) == str(model.fit_report_)
    assert loaded.diagnose() == model.diagnose()
    assert repr(clone(loaded)) == repr(clone(model))
    assert [p.name for p in tmp_path.iterdir()] == ["model.mercer"]


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_survives(name, tmp_path):
    model = GPRegressor(KERNELS[name](), max_iter=3, warm_start=True).fit(X, Y)
    loaded = reloaded(model, tmp_path)
    assert_same(model, loaded)
    assert loaded.get_params().keys() == model.get_params().keys()
    np.testing.assert_array_equal(loaded.fit(X, Y).theta_, model.fit(X, Y).theta_)


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: type(prior).__name__)
def test_priors_keep_weighing_on_the_fit(prior, tmp_path):
    kernel = ScaleKernel(MaternKernel(lengthscale_prior=prior))
    model = GPRegressor(kernel, max_iter=4).fit(X, Y)
    loaded = pickle.loads(pickle.dumps(reloaded(reloaded(model, tmp_path), tmp_path)))
    assert_same(model, loaded)
    np.testing.assert_array_equal(clone(loaded).fit(X, Y).theta_, model.theta_)
    ((_, owner, read, closure, _),) = loaded.kernel_.named_priors()
    ((_, _, written, _, _),) = model.kernel_.named_priors()
    points = torch.tensor([[0.05, 0.3, 1.0, 2.9]], dtype=torch.float64).mT
    assert torch.equal(read.log_prob(points), written.log_prob(points))
    assert torch.equal(closure(owner), owner.lengthscale)


def test_priors_know_their_attribute_however_they_were_registered(tmp_path):
    free = RBFKernel()
    free.register_prior("belief", priors.GammaPrior(2.0, 3.0), "lengthscale")
    kernel = ScaleKernel(free) + ConstantKernel(constant_prior=priors.GammaPrior(1.0, 1.0))
    mean = means.ConstantMean(constant_prior=priors.NormalPrior(0.0, 1.0))
    loaded = reloaded(GPRegressor(kernel, mean=mean, max_iter=3).fit(X, Y), tmp_path)
    named = {name: (owner, closure) for name, owner, _, closure, _ in loaded.kernel.named_priors()}
    owner, closure = named["kernels.0.base_kernel.belief"]
    assert torch.equal(closure(owner), owner.lengthscale)
    owner, closure = named["kernels.1.constant_prior"]
    assert torch.equal(closure(owner), owner.constant)
    loaded.kernel.kernels[1].sample_from_prior("constant_prior")
    ((_, owner, _, closure, _),) = loaded.mean.named_priors()
    assert torch.equal(closure(owner), owner.constant)


def test_the_layout_of_factors_survives_with_the_bits_of_their_products(tmp_path):
    generator = np.random.default_rng(1)
    many = generator.uniform(size=(300, 2))
    model = GPRegressor(optimizer=None).fit(many, np.sin(5 * many[:, 0]))
    loaded = reloaded(model, tmp_path)
    assert loaded.posterior_.factor.chol.stride() == model.posterior_.factor.chol.stride()
    new = generator.uniform(size=(50, 2))
    for a, b in zip(model.predict(new, return_cov=True), loaded.predict(new, return_cov=True), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["default", "softmax", "poisson"])
def test_pickles_before_and_after_predict_agree(name):
    model = FITS[name]()
    before = pickle.loads(pickle.dumps(model))
    numbers(model)
    after = pickle.loads(pickle.dumps(model))
    assert_same(before, after)
    assert_same(before, model)


def test_saving_after_prediction_is_saving_before(tmp_path):
    model = FITS["softmax"]()
    before = reloaded(model, tmp_path)
    numbers(model)
    assert_same(before, reloaded(model, tmp_path))


def test_parts_that_were_shared_are_shared_again(tmp_path):
    loaded = reloaded(FITS["default"](), tmp_path)
    assert loaded.posterior_.prior is loaded._model.prior
    assert loaded.posterior_.prior.kernel is not loaded.kernel_


# ---------------------------------------------------------------------------- what is not written


def test_an_unfitted_model_is_not_saved(tmp_path):
    with pytest.raises(NotFittedError):
        GPRegressor().save(tmp_path / "model.mercer")
    assert not list(tmp_path.iterdir())


class Own(RBFKernel):
    """A class that a reader of the file does not have."""


def hooked():
    kernel = RBFKernel()
    kernel.register_forward_hook(lambda module, arguments, output: output)
    return kernel


def with_own_function():
    kernel = RBFKernel()
    kernel.register_prior("lengthscale_prior", priors.NormalPrior(0.0, 1.0), lambda module: module.lengthscale.log())
    return kernel


def patched():
    kernel = RBFKernel()
    kernel.covar_dist = 3
    return kernel


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (Own, r"kernel.*Own.*pickle"),
        (hooked, r"kernel.*hooks.*pickle"),
        (with_own_function, r"kernel.*lengthscale_prior.*function.*pickle"),
        (patched, r"kernel\.covar_dist.*pickle"),
        (lambda: RBFKernel(lengthscale_prior=priors.NormalPrior(0.0, 1.0, transform=lambda x: x)), "transform.*pickle"),
        (lambda: RBFKernel(lengthscale_prior=priors.MultivariateNormalPrior(torch.ones(1), torch.eye(1))), "pickle"),
    ],
)
def test_code_of_the_user_is_refused_by_name(kernel, message, tmp_path):
    model = GPRegressor(max_iter=2).fit(X, Y).set_params(kernel=kernel())
    with pytest.raises(TypeError, match=message):
        model.save(tmp_path / "model.mercer")
    assert not list(tmp_path.iterdir())


def test_nothing_of_torchs_own_bookkeeping_is_in_the_file(path):
    document, tensors = opened(path)
    internal = vars(gpytorch.Module()).keys() - {"training"}
    names = {name for node in nodes(document) for name, _ in node.get("state", ())}
    assert not names & internal
    assert not any("hook" in name for name in names)
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


def test_the_file_says_who_wrote_it(path):
    document, _ = opened(path)
    assert document["mercer"] == mercer.__version__
    assert document["version"] == 1


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def full_disk(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        FITS["default"]().save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions and links")
def test_permissions_are_the_usual_ones_and_links_are_followed(tmp_path):
    plain, link = tmp_path / "plain", tmp_path / "link"
    plain.write_text("")
    link.symlink_to(plain)
    FITS["default"]().save(link)
    (tmp_path / "other").write_text("")
    assert link.is_symlink()
    assert stat.S_IMODE(plain.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert isinstance(mercer.load(plain), GPRegressor)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FITS["default"]().save(tmp_path / "nowhere" / "model.mercer")


# ---------------------------------------------------------------------------- what is not read


def opened(path):
    """Return the JSON document and the tensors of a saved model."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["mercer"]), tensors


def nodes(value):
    """Yield all dictionaries of a document."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(item)


def tampered(path, change):
    """Rewrite the JSON document of a saved model."""
    document, tensors = opened(path)
    change(document)
    safetensors.torch.save_file(tensors, path, metadata={"mercer": json.dumps(document)})


def node_of(document, name):
    return next(node for node in nodes(document) if node.get("class") == name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99, mercer="7.0"), r"version 99.*7\.0"),
        (lambda d: d.update(format="other"), "not a model"),
        (lambda d: d["estimator"].update({"class": "os.system"}), r"os\.system"),
        (lambda d: d["estimator"].update({"$": "call"}), "call"),
        (lambda d: d["estimator"].update({"$": "__class__"}), "damaged"),
        (lambda d: d.pop("estimator"), "damaged"),
        (lambda d: d.update(estimator=[1]), "does not hold"),
        (lambda d: d["estimator"].pop("state"), "damaged"),
        (lambda d: node_of(d, "mercer.Model").update({"class": "mercer.Problem"}), r"mercer\.Problem"),
    ],
)
def test_what_the_format_does_not_know_is_refused(change, message, path):
    tampered(path, change)
    with pytest.raises(ValueError, match=message):
        mercer.load(path)


@pytest.mark.parametrize("name", ["__class__", "__reduce__", "predict", "theta_", "_forward_hooks", "_parameters"])
def test_a_file_sets_no_code_and_nothing_internal(name, path):
    tampered(path, lambda d: d["estimator"]["state"].append([name, None]))
    with pytest.raises(ValueError, match=f"damaged.*{name}"):
        mercer.load(path)


@pytest.mark.parametrize(
    ("part", "name"),
    [("state", "forward"), ("state", "_modules"), ("modules", "forward"), ("buffers", "__class__"), ("buffers", "")],
)
def test_a_module_takes_no_part_under_a_name_of_its_class(part, name, path):
    def change(document):
        kernel = node_of(document, "gpytorch.kernels.RBFKernel")
        kernel[part].append([name, kernel["modules"][0][1] if part == "modules" else None])

    tampered(path, change)
    with pytest.raises(ValueError, match=f"damaged.*{name}"):
        mercer.load(path)


def test_a_prior_reads_parameters_and_properties_only(path):
    def change(document):
        node_of(document, "gpytorch.kernels.RBFKernel")["priors"][0][1] = "cuda"

    tampered(path, change)
    with pytest.raises(ValueError, match=r"lengthscale_prior.*cuda"):
        mercer.load(path)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(keep, path):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"model\.mercer.*damaged"):
        mercer.load(path)


def test_absent_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.mercer"):
        mercer.load(tmp_path / "absent.mercer")
    foreign = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, foreign)
    with pytest.raises(ValueError, match=r"weights\.safetensors.*not a model"):
        mercer.load(foreign)


# ---------------------------------------------------------------------------- devices


def test_the_device_given_to_load_is_that_of_later_fits(path):
    assert mercer.load(path).device is None
    assert mercer.load(path, device="cpu").device == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_is_named(path):
    with pytest.raises(ValueError, match="device='cuda'"):
        mercer.load(path, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_moves_to_the_gpu(path):
    here, there = mercer.load(path), mercer.load(path, device="cuda")
    assert there.posterior_.factor.chol.is_cuda
    for a, b in zip(here.predict(X, return_std=True), there.predict(X, return_std=True), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-8)
    assert there.fit(X, Y).fit_report_.device.startswith("cuda")
