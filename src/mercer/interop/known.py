"""What a model knows: a fit, and the observations that it was conditioned on since; in the user's units.

Moments have their outputs first, mean (m, *t, q) and covariance (m, *t, q, q); targets have them last, (*s, *t, q, m).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mercer._typing import Data, Sites
from mercer.families.conditioned import ConditionedPosterior, condition_further
from mercer.families.sets import lined_up
from mercer.inference.fantasy import expected_precision, sites_of
from mercer.interop.fitted import Fitted

_SEED = 20110415  # of targets drawn for fantasies, so that they are a function of the draws of f


@dataclass(frozen=True)
class Observed:
    """Later observations in model units: rows (*t, q, d), targets (*p, *s, *t, q) and noise, of y or ``of_f``."""

    X: Tensor
    y: Tensor
    variance: Tensor | None
    of_f: bool


@dataclass(frozen=True)
class Known:
    """A fit and what was observed since.

    Parameters
    ----------
    fitted : Fitted
    process : Process
        Its posterior, conditioned on ``added``.
    outputs : tuple of int
        Those that are shown.
    added : tuple of Observed
    """

    fitted: Fitted
    process: Any
    outputs: tuple[int, ...]
    added: tuple[Observed, ...] = ()

    @staticmethod
    def all_of(fitted: Fitted) -> Known:
        """Return what a fit knows by itself."""
        return Known(fitted, fitted.posterior, tuple(range(len(fitted.outputs.scale))))

    @property
    def likelihood(self) -> Any:
        """The likelihood, with its parameters in model units."""
        return self.fitted.model.likelihood

    @property
    def f_is_y(self) -> bool:
        """Whether y is a noisy f, in its units."""
        return self.likelihood.support == "real"

    @property
    def coupled(self) -> bool:
        """Whether one target reads several latents."""
        return self.likelihood.n_latents > 1

    @property
    def sets(self) -> torch.Size:
        """Dimensions (*s, *t) of alternatives and sets."""
        return self.process.sets if isinstance(self.process, ConditionedPosterior) else torch.Size()

    @property
    def n_latents(self) -> int:
        """Number of dimensions *b of latents or outputs that the process has."""
        return 1 if self.coupled else self.fitted.data.y.dim() - 1

    # ---- moments

    def in_model_units(self, X: Tensor) -> Tensor:
        """Return rows (*t, q, d) as the process has them."""
        d, policy = self.fitted.data.X.shape[-1], self.fitted.model.policy
        if X.dim() < 2 or X.shape[-1] != d:
            raise ValueError(f"X must be (..., q, {d}), as many columns as were fitted; got {tuple(X.shape)}.")
        return self.fitted.inputs.to_model(X.to(dtype=policy.dtype, device=policy.device))

    def in_user_units(self, mean: Tensor) -> Tensor:
        """Return means (*b, *t, q) of the process as (m, *t, q)."""
        shown = self._shown(mean).movedim(0, -1)
        return self.fitted.outputs.of(self.outputs).to_user(shown).movedim(-1, 0)

    def _shown(self, value: Tensor) -> Tensor:
        return value[list(self.outputs)] if self.n_latents else value.unsqueeze(0)

    def mean(self, X: Tensor) -> Tensor:
        """Return the mean of f at X (*t, q, d), (m, *sets, q)."""
        rows = self.in_model_units(X)
        if isinstance(self.process, ConditionedPosterior):
            return self.in_user_units(self.process.mean(rows))
        flat = self.process.mean(rows.reshape(-1, rows.shape[-1]))
        return self.in_user_units(flat.unflatten(-1, rows.shape[:-1]))

    def joint(self, X: Tensor, noise: bool | Tensor = False) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of f at X (*t, q, d), or of observations with the likelihood's noise or one given.

        A given noise variance is (*t, q, m).
        """
        mean, covariance = self.process.joint(self.in_model_units(X))
        if noise is True:
            own = self._noise_variance(mean, covariance.diagonal(dim1=-2, dim2=-1))
            covariance = covariance + torch.diag_embed(own)
        covariance = self._shown(covariance)
        scale = self.fitted.outputs.of(self.outputs).scale.to(covariance)
        covariance = covariance * scale.square().reshape(-1, *[1] * (covariance.dim() - 1))
        if isinstance(noise, Tensor):
            given = noise.to(covariance).movedim(-1, 0)
            covariance = covariance + torch.diag_embed(given.expand(covariance.shape[:-1]))
        return self.in_user_units(mean), covariance

    def noise_variance(self, X: Tensor) -> Tensor:
        """Return the noise variance of new observations at X (*t, q, d), (*sets, q, m)."""
        mean, covariance = self.process.joint(self.in_model_units(X))
        noise = self._shown(self._noise_variance(mean, covariance.diagonal(dim1=-2, dim2=-1))).movedim(0, -1)
        return noise * self.fitted.outputs.of(self.outputs).scale.to(noise).square()

    def _noise_variance(self, m: Tensor, v: Tensor) -> Tensor:
        """Return the noise variance of new observations where f is N(m, v), all (*b, *t, q), in model units.

        That of y where y is a noisy f; elsewhere that of the Gaussian observation of f which is worth what one of y is
        expected to be.
        """
        likelihood, n_latents = self.likelihood, self.n_latents
        if likelihood.conjugate:
            data = self.fitted.data
            known = data.side.get("noise_variance")
            if known is None:
                noise = likelihood.variance(m.new_zeros(*m.shape[:n_latents], 1))
            else:
                noise = (known * data.weight).sum(-1, keepdim=True) / data.weight.sum()
            return lined_up(noise, n_latents, m.dim() - n_latents - 1, 1).expand_as(m)
        worth = expected_precision(likelihood, m, v).clamp_min(torch.finfo(m.dtype).eps)
        if not self.f_is_y:
            return worth.reciprocal()
        matched = likelihood.predictive(m, v).variance - v
        return torch.where(matched.isfinite(), matched, worth.reciprocal())

    # ---- more data

    def observing(self, X: Tensor, Y: Tensor, noise: Tensor | None = None, of_f: bool = False) -> Known:
        """Return what is known after observations; hyperparameters are held.

        Parameters
        ----------
        X : (*t, q, d)
        Y : (*s, *t, q, m)
            Targets, or measurements of f; NaN where missing.
        noise : (*t, q, m), optional
            Known noise variance.
        of_f : bool
            Whether Y measures f, with Gaussian noise of that variance.
        """
        rows = self.in_model_units(X)
        expected = 1 if self.coupled and not of_f else len(self.outputs)
        if Y.shape[-1] != expected and Y.shape[-2] > 0:
            raise ValueError(f"Y must be (..., q, {expected}) for this model, got {tuple(Y.shape)}.")
        if Y.dim() < X.dim():
            Y = Y.expand(*torch.broadcast_shapes(Y.shape[:-2], X.shape[:-2]), *Y.shape[-2:])
        units = self.fitted.outputs.of(self.outputs)
        y = Y.to(rows)[..., 0] if self.coupled and not of_f else self._whole(units.to_model(Y.to(rows)), torch.nan)
        variance = None
        if noise is not None:
            variance = self._whole(noise.to(rows) / units.scale.to(rows).square(), 1.0)
            variance = lined_up(variance, self.n_latents, y.dim() - 1 - self.n_latents, 1)
        if of_f:
            assert variance is not None
            sites = _measurements(y - self.fitted.model.prior.mean_at(rows), variance)
        else:
            self.likelihood.validate(y)
            if variance is None and "noise_variance" in self.fitted.data.side:
                variance = self._noise_variance(y, y)
            side = {} if variance is None else {"noise_variance": variance}
            sites = sites_of(self.likelihood, self.process, rows, y, **side)
        process = condition_further(self.process, rows, sites)
        return replace(self, process=process, added=(*self.added, Observed(rows, y, variance, of_f)))

    def _whole(self, values: Tensor, fill: float) -> Tensor:
        """Return (*s, *t, q, m) as (*p, *s, *t, q), with ``fill`` for outputs that are not shown."""
        if self.n_latents == 0:
            return values[..., 0]
        whole = values.new_full((*values.shape[:-1], len(self.fitted.outputs.scale)), fill)
        index = torch.tensor(self.outputs, device=values.device)
        return whole.index_copy(-1, index, values.expand(*values.shape[:-1], len(index))).movedim(-1, 0)

    def draw(self, f: Tensor) -> Tensor:
        """Draw targets (*t, q, m) from the likelihood, given f of all outputs (*t, q, m); one column of classes."""
        f = self.fitted.outputs.to_model(f).mT
        drawn = self.likelihood.sample(f, generator=torch.Generator(f.device).manual_seed(_SEED))
        if self.coupled:
            return drawn.unsqueeze(-1)
        return self.fitted.outputs.to_user(drawn.mT)[..., list(self.outputs)]

    # ---- all of the data

    @property
    def rows(self) -> Tensor:
        """All rows, (*sets, n, d)."""
        parts = [self.fitted.data.X, *(each.X for each in self.added)]
        rows = torch.cat([each.expand(*self.sets, *each.shape[-2:]) for each in parts], -2)
        return self.fitted.inputs.to_user(rows)

    @property
    def targets(self) -> Tensor:
        """All targets, (*sets, n, m)."""
        if any(each.of_f for each in self.added):
            raise AttributeError("measurements of f are no targets; fantasize with labels=True to have targets.")
        parts = [self.fitted.data.y, *(each.y for each in self.added)]
        several = self.fitted.data.y.dim() - 1
        parts = [each.movedim(0, -1) if several else each.unsqueeze(-1) for each in parts]
        y = torch.cat([each.expand(*self.sets, *each.shape[-2:]) for each in parts], -2)
        return y if self.coupled else self.fitted.outputs.to_user(y)[..., list(self.outputs)]

    def merged(self) -> Fitted:
        """Return a fit to all of the data at the same hyperparameters, not conditioned yet.

        Raises
        ------
        ValueError
            The data are fantasies, or some of them have known noise and others not.
        """
        if self.sets or any(each.of_f for each in self.added):
            raise ValueError("a model is not fitted to fantasies; fit the one that they came from.")
        data, known = self.fitted.data, "noise_variance" in self.fitted.data.side
        if any((each.variance is not None) != known for each in self.added):
            raise ValueError("noise must be known for all observations or for none; it was given for some of them.")
        side = dict(data.side)
        for each in self.added:
            for name, value in side.items():
                new = each.variance if name == "noise_variance" else value.new_ones(len(each.X))
                assert new is not None
                side[name] = torch.cat([value, new.expand(*value.shape[:-1], -1)], -1)
        X = torch.cat([data.X, *(each.X for each in self.added)])
        y = torch.cat([data.y, *(each.y for each in self.added)], -1)
        weight = torch.cat([data.weight, data.weight.new_ones(len(X) - len(data.X))])
        return replace(self.fitted, data=Data(X, y, weight, side), posterior=None)


def _measurements(g: Tensor, variance: Tensor) -> Sites:
    """Return the sites of measurements g of the centred latent with that noise variance; NaN says nothing."""
    observed, precision = ~torch.isnan(g), variance.reciprocal()
    if not bool(observed.all()):
        precision = torch.where(observed, precision, 0.0)
    return Sites(precision * torch.where(observed, g, 0.0), precision)
