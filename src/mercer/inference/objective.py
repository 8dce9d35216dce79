"""The one variational objective, Σᵢ wᵢ E_q[log p(yᵢ|fᵢ)] − KL[q ‖ p], and its gradient at a fixed point.

Replication weights w multiply the data term here and nowhere else. The exact evidence of a Gaussian likelihood
is the same functional at its own sites (y/σ², 1/σ²), written without the terms that cancel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from mercer._typing import Data
from mercer.likelihoods.base import ExpectedLogProb

if TYPE_CHECKING:
    from mercer.model import Model


def expected_log_prob(model: Model, data: Data, m: Tensor, v: Tensor) -> ExpectedLogProb:
    """Return E[log p(yᵢ|fᵢ)] and its derivatives for marginals N(m, v) of the centred latent g = f − μ."""
    mean = model.prior.mean_at(data.X)
    return model.likelihood.expected_log_prob(data.y, m + mean, v, **data.side)


def coupling(model: Model, data: Data, m: Tensor, v: Tensor) -> Tensor:
    """Return −E ∂² log p / ∂f∂fᵀ per row, (n, C, C), of a likelihood that reads C latents."""
    likelihood: Any = model.likelihood
    return likelihood.coupling(data.y, m + model.prior.mean_at(data.X), v, **data.side)


def evidence_lower_bound(model: Model, posterior: Any, data: Data) -> Tensor:
    """Return Σ wᵢ ℓᵢ(mᵢ, vᵢ) − KL[q ‖ p] in nats, a scalar.

    With gradients enabled it is the dual bound L_dual(θ): sites frozen, q_θ(f) ∝ p_θ(f) ∏ tᵢ(fᵢ) follows θ
    (Adam, Chang, Khan and Solin, 2021).
    """
    return bound_and_slopes(model, posterior, data)[0]


def bound_and_slopes(model: Model, posterior: Any, data: Data) -> tuple[Tensor, Tensor, ExpectedLogProb]:
    """Return the evidence lower bound with the means and (ℓ, α, β) that it was made from."""
    log_z, m, v = posterior.site_terms()
    expected = expected_log_prob(model, data, m, v)
    kl = posterior.expected_log_sites(m, v) - log_z
    return (data.weight * expected.value).sum() - kl.sum(), m, expected


def conjugate_evidence(model: Model, posterior: Any, data: Data) -> Tensor:
    """Return the exact log evidence of a Gaussian likelihood, in nats, a scalar.

    log p(y) = log ∫ p(f) ∏ exp(−½ wᵢ (yᵢ−fᵢ)²/σ²) df − ½ Σ wᵢ log 2πσ², which has replication semantics.
    """
    n_outputs = posterior.sites.linear.shape[:-1]
    quadratic = posterior.log_evidence().expand(n_outputs).sum()
    likelihood: Any = model.likelihood
    return quadratic + likelihood.log_scale(data.y, data.weight, **data.side).sum()


def envelope(model: Model, posterior: Any, data: Data, value: float, data_term: Tensor) -> Tensor:
    """Return ``value`` with its total gradient in θ at a fixed point of the sites.

    There the derivative through q vanishes (envelope theorem): what is left is ∂ log Z(λ)/∂θ of the prior and
    the derivative of ``data_term``, the likelihood's share at fixed marginals.
    """
    surrogate = posterior.log_normaliser()[0].sum() + data_term
    return surrogate + (value - surrogate.detach())
