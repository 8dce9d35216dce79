"""Small problems with inducing points: the nine rows of `toys` and four places between them, and their dense twins."""

import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from oracles import inducing as oracle
from toys import DTYPE, PROBLEMS, X

from mercer._typing import Data
from mercer.families import Inducing, Prior
from mercer.families.inducing_plan import InducingPlan
from mercer.inference import Dual
from mercer.kernels import Matern52
from mercer.kernels.means import constant_mean
from mercer.model import Model
from mercer.policy import NumericalPolicy

Z = torch.tensor([[0.15], [1.1], [2.2], [3.3]], dtype=DTYPE)
THETA = (0.8, 1.2)  # lengthscale and outputscale


def kernel_of(lengthscale=THETA[0], outputscale=THETA[1]):
    """Return the closed formula of the prior's covariance."""
    return lambda A, B: oracle.matern52(A, B, lengthscale, outputscale)


def kernels_of_their_own():
    """Return one Matérn-5/2 kernel for each of two latents, in two columns."""
    batch = torch.Size([2])
    kernel = ScaleKernel(MaternKernel(2.5, ard_num_dims=2, batch_shape=batch), batch_shape=batch).double()
    kernel.base_kernel.lengthscale = torch.tensor([[[0.4, 0.9]], [[0.7, 0.5]]], dtype=DTYPE)
    kernel.outputscale = torch.tensor([1.3, 0.6], dtype=DTYPE)
    return kernel


def problem(name, engine=None, mean=0.2, places=Z, learned=False, **policy):
    """Return the model, its plan with inducing points at ``places``, and the data of one row of ``PROBLEMS``."""
    make, y = PROBLEMS[name]
    prior = Prior(Matern52(THETA[0], outputscale=THETA[1]), None if mean is None else constant_mean(mean))
    policy = NumericalPolicy(**{"tol": 1e-13, "max_inner": 1000, **policy})
    model = Model(prior, make(), Inducing(len(places)), Dual() if engine is None else engine, policy)
    y = torch.tensor(y, dtype=DTYPE)
    return model, InducingPlan(X, places, policy, learned), Data(X, y, torch.ones(len(y), dtype=DTYPE))


@torch.no_grad()
def q_of_u(posterior):
    """Return m and S of a posterior of one latent, from what its sites and ``rest`` say of u."""
    tied, plan = posterior.tied(), posterior.plan
    if plan.rest is not None:
        tied = tied + plan.rest
    K = oracle.between(lambda A, B: posterior.prior.kernel(A, B).to_dense(), plan.Z, plan.Z)
    return oracle.q_of_form("U", K, tied.linear, tied.precision)
