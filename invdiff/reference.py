"""Exact posteriors of linear-Gaussian problems under Gaussian and mixture priors: the yardstick of samplers.

For ``x ~ sum_k w_k N(m_k, C_k)`` and ``y = A x + noise`` the posterior is again a mixture: every component is
conditioned in closed form, and its weight is multiplied by its evidence ``p(y | k)``. Complex data count as
twice as many real ones; an affine codec is followed exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invdiff.codec import AffineCodec
from invdiff.conditioning import Factor, Frame, Measurement, factorise, stack_real
from invdiff.directions import singular_directions
from invdiff.errors import InvdiffError
from invdiff.likelihoods import Gaussian
from invdiff.operator import LinearOperator
from invdiff.prior import Prior
from invdiff.priors.exact import ExactDenoiser
from invdiff.problem import Problem
from invdiff.rng import Streams, resolve_seed

#: Block of the random streams that exact draws read; no sampler comes this far.
_STEP = 1 << 40


@dataclass(frozen=True)
class Component:
    """One Gaussian of the posterior of one case.

    Attributes:
        log_weight: Log of its posterior weight.
        log_evidence: ``log p(y | k)``, None where it is out of reach.
        offset: Prior mean ``m_k``, flat, in prior coordinates.
        white: Posterior mean in white coordinates, ``u = m_k + R w``.
        factor: Solves with the posterior precision.
    """

    log_weight: float
    log_evidence: float | None
    offset: Tensor
    white: Tensor
    factor: Factor

    @property
    def mean(self) -> Tensor:
        """Posterior mean in prior coordinates, flat."""
        return self.offset + self.factor.frame.root(self.white[None])[0]


class ExactPosterior:
    """Exact posterior of every case: moments, density, draws; in image space unless said otherwise.

    Attributes:
        problem: In image space and double precision.
        prior: Bound to the problem, double precision.
        cases: Posterior components per case.
    """

    def __init__(self, problem: Problem, prior: Prior, cases: Sequence[Sequence[Component]]) -> None:
        self.problem, self.prior, self.cases = problem, prior, [list(c) for c in cases]
        self._cache: dict[Any, Any] = {}

    @property
    def weights(self) -> Tensor:
        """Posterior weights of the components, ``(N, K)``."""
        return torch.tensor([[math.exp(c.log_weight) for c in case] for case in self.cases], dtype=torch.float64)

    @property
    def means(self) -> Tensor:
        """Posterior means of the components, ``(N, K, *image)``."""
        if "means" not in self._cache:
            rows = [self._decode(torch.stack([c.mean for c in cs]), i) for i, cs in enumerate(self.cases)]
            self._cache["means"] = torch.stack(rows)
        return self._cache["means"]

    def mean(self) -> Tensor:
        """Return ``E[x | y]``, ``(N, *image)``."""
        means = self.means
        return (self.weights.reshape(*means.shape[:2], *([1] * (means.ndim - 2))).to(means.dtype) * means).sum(1)

    def std(self) -> Tensor:
        """Return the standard deviation per pixel, ``(N, *image)``, real.

        A complex pixel has ``sqrt(E |x - mean|^2)``, as in numpy. Where the problem is too large for closed
        forms, 512 exact draws estimate it with the relative standard error `std_error`.
        """
        flat = self._std_real()
        image = self.prior_codec.image
        if image.is_complex:
            flat = flat.reshape(*flat.shape[:1], -1, 2).square().sum(-1).sqrt()
        return flat.reshape(-1, *image.shape)

    @property
    def std_error(self) -> float:
        """Relative standard error of `std`: 0 where it is exact."""
        return max(c.factor.variance_error for case in self.cases for c in case)

    def _std_real(self) -> Tensor:
        """Standard deviation per real component, ``(N, real_size)``."""
        if "std" not in self._cache:
            means, mean = self._real(self.means), self._real(self.mean()[:, None])
            rows = []
            for i, case in enumerate(self.cases):
                var = torch.zeros_like(mean[i, 0])
                for k, c in enumerate(case):
                    spread = (means[i, k] - mean[i, 0]) ** 2
                    var = var + math.exp(c.log_weight) * (self._variance(c.factor) + spread)
                rows.append(var.sqrt())
            self._cache["std"] = torch.stack(rows)
        return self._cache["std"]

    def _variance(self, factor: Factor) -> Tensor:
        key = ("variance", id(factor))
        if key not in self._cache:
            self._cache[key] = factor.variance()
        return self._cache[key]

    def covariance(self) -> Tensor:
        """Return the covariance over flattened real components, ``(N, n, n)`` (at most 4,200 of them)."""
        means, mean = self._real(self.means), self._real(self.mean()[:, None])
        out = []
        for i, case in enumerate(self.cases):
            total = torch.zeros(())
            for k, c in enumerate(case):
                key = ("covariance", id(c.factor))
                if key not in self._cache:
                    self._cache[key] = c.factor.covariance()
                d = means[i, k] - mean[i, 0]
                total = total + math.exp(c.log_weight) * (self._cache[key] + d[:, None] * d)
            out.append(total)
        return torch.stack(out)

    def marginals(self, directions: Tensor | None = None, case: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return the one-dimensional marginal mixtures of ``v . x``.

        Args:
            directions: ``(r, n)`` over real components; None takes every real component by itself.
            case: Which case.

        Returns:
            Weights ``(K,)``, means ``(K, r)`` and standard deviations ``(K, r)``.
        """
        components = self.cases[case]
        means = self._real(self.means[case][None])[0]
        done: dict[int, Tensor] = {}
        for c in components:
            key = id(c.factor)
            if key in done:
                continue
            if directions is None:
                done[key] = self._variance(c.factor).sqrt()
            else:
                z = c.factor.frame.from_image(directions)
                done[key] = (z * c.factor.solve(z)).sum(1).clamp_min(0).sqrt()
        stds = torch.stack([done[id(c.factor)] for c in components])
        return self.weights[case], means if directions is None else means @ directions.T, stds

    def log_prob(self, x: Tensor, case: int | None = None) -> Tensor:
        """Return ``log p(x | y)`` with respect to the volume of image space.

        Args:
            x: ``(N, B, *image)``; or ``(B, *image)`` with ``case``, or for a problem of one case.
            case: Which case, for ``x`` without a case axis.

        Returns:
            ``(N, B)``, or ``(B,)``.

        Raises:
            InvdiffError: If the codec drops coordinates, the prior is singular, or the problem is too large.
        """
        codec = self.prior_codec
        if codec.prior.real_size != codec.image.real_size:
            raise InvdiffError(
                "The posterior density needs as many prior coordinates as pixels, and this codec drops some; "
                "compare moments or draws instead."
            )
        if x.ndim == len(codec.image.shape) + 1 and (case is not None or len(self.cases) == 1):
            return self._log_prob(x, case or 0)
        if x.ndim != len(codec.image.shape) + 2 or x.shape[0] != len(self.cases):
            raise InvdiffError(
                f"log_prob got shape {tuple(x.shape)}, expected ({len(self.cases)}, B, *image) "
                f"for images {codec.image}."
            )
        return torch.stack([self._log_prob(rows, i) for i, rows in enumerate(x)])

    def _log_prob(self, x: Tensor, i: int) -> Tensor:
        codec = _row(self.prior_codec, i)
        u = codec.encode(x.to(codec.image.dtype))
        volume = codec.image.real_size * float(codec.gain.reshape(-1)[0].log())
        own = self.problem.rows(torch.full((x.shape[0],), i, dtype=torch.long))
        return self._denoiser.log_prob(u) - volume + own.log_likelihood(x) - self._evidence(self.cases[i])

    def log_evidence(self) -> Tensor:
        """Return ``log p(y)``, ``(N,)``."""
        return torch.tensor([self._evidence(case) for case in self.cases], dtype=torch.float64)

    def _evidence(self, case: Sequence[Component]) -> float:
        if any(c.log_evidence is None for c in case):
            raise InvdiffError("The evidence of this problem is out of reach (too large for a factorisation).")
        prior = [w for w, _, _ in self._denoiser.components()]
        terms = [w + float(c.log_evidence or 0.0) for w, c in zip(prior, case)]
        return float(torch.logsumexp(torch.tensor(terms, dtype=torch.float64), 0))

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return exact independent draws, ``(N, n, *image)``; draw ``s`` depends on (seed, case, s) only."""
        seed = resolve_seed(seed)
        return torch.stack([self._sample(i, n, seed) for i in range(len(self.cases))])

    def _sample(self, i: int, n: int, seed: int) -> Tensor:
        case = self.cases[i]
        rng = Streams(seed, [(i, s) for s in range(n)]).at(_STEP)
        pick = rng.uniform(torch.empty(n, 1, dtype=torch.float64))[:, 0]
        edges = self.weights[i].cumsum(0)
        which = torch.searchsorted(edges / edges[-1], pick, right=True).clamp_max(len(case) - 1)
        u = torch.empty(n, case[0].offset.numel(), dtype=torch.float64, device=case[0].offset.device)
        for k, c in enumerate(case):
            rows = (which == k).nonzero()[:, 0].tolist()
            if rows:
                own = Streams(seed, [(i, s) for s in rows]).at(_STEP + 1)
                white = c.white + c.factor.deviations(u[rows], own)
                u[rows] = c.offset + c.factor.frame.root(white)
        return self._decode(u, i)

    def directions(
        self, case: int = 0, rtol: float = 1e-6, limit: int = 512, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return orthonormal bases of the measured directions and of the null space of the operator.

        Args:
            case: Which case.
            rtol: Singular values above ``rtol`` times the largest count as measured.
            limit: At most so many of each are returned, picked at random.
            seed: Seed of the pick.

        Returns:
            Measured ``(r, n)`` and null ``(q, n)`` directions over real components of image space; where the
            operator publishes a singular value decomposition, these are its singular vectors.
        """
        key = ("directions", case, rtol, limit, seed)
        if key not in self._cache:
            problem = self.problem.rows(torch.tensor([case]))
            assert isinstance(problem.operator, LinearOperator)
            self._cache[key] = singular_directions(problem.operator, rtol, limit, seed)
        return self._cache[key]

    @property
    def prior_codec(self) -> AffineCodec:
        """The codec the prior was bound with."""
        assert isinstance(self.prior.codec, AffineCodec)
        return self.prior.codec

    @property
    def _denoiser(self) -> ExactDenoiser:
        assert isinstance(self.prior.denoiser, ExactDenoiser)
        return self.prior.denoiser

    def _decode(self, u: Tensor, case: int) -> Tensor:
        return _row(self.prior_codec, case).decode(u.reshape(-1, *self.prior_codec.prior.shape))

    def _real(self, x: Tensor) -> Tensor:
        """``(N, B, *image) -> (N, B, real_size)``."""
        return stack_real(x.flatten(0, 1)).reshape(*x.shape[:2], -1)


def posterior(problem: Problem, prior: Prior) -> ExactPosterior:
    """Return the exact posterior of a linear problem with Gaussian noise under a Gaussian or mixture prior.

    With ``u = m + R w`` in prior coordinates and unit noise, ``w | y ~ N(P^-1 B^T r, P^-1)``, ``P = I + B^T B``.

    Args:
        problem: Linear operator, Gaussian or correlated Gaussian noise (any level per element above 0).
        prior: From `invdiff.priors`: ``Gaussian``, ``StationaryGaussian`` or ``GaussianMixture``, with any
            affine codec.

    Raises:
        InvdiffError: If the problem is not linear, the noise not Gaussian, the prior not known in closed form,
            or a mixture too large to be weighed.
    """
    if not isinstance(prior.denoiser, ExactDenoiser):
        raise InvdiffError(
            f"The exact posterior needs a prior in closed form (Gaussian, StationaryGaussian or GaussianMixture), "
            f"and {prior.name} is not."
        )
    if not isinstance(problem.operator, LinearOperator) or "linear" not in problem.operator.capabilities:
        raise InvdiffError(f"The exact posterior needs a linear operator, and {problem.operator.name} is not.")
    problem = problem.to(dtype=torch.float64)
    if not isinstance(problem.whiten().likelihood, Gaussian):
        raise InvdiffError(f"The exact posterior needs Gaussian noise, and {problem.likelihood.name} is not.")
    prior = prior.to(dtype=torch.float64).adapt(problem)
    codec = prior.codec
    if not isinstance(codec, AffineCodec) or not codec.is_affine:
        raise InvdiffError("The exact posterior needs an affine codec between images and prior coordinates.")
    factors: dict[tuple[int, int], Factor] = {}
    cases = [_condition(problem, prior, codec, i, factors) for i in range(problem.n_cases)]
    return ExactPosterior(problem, prior, cases)


def _condition(
    problem: Problem, prior: Prior, codec: AffineCodec, i: int, factors: dict[tuple[int, int], Factor]
) -> list[Component]:
    """Condition every component on the data of case ``i``; cases that differ in ``y`` only share factors."""
    own = problem.rows(torch.tensor([i]))
    row = _row(codec, i)
    pulled = own.whiten().pullback(row)
    assert isinstance(pulled.operator, LinearOperator) and isinstance(pulled.likelihood, Gaussian)
    shared = all(
        n in (None, 1) for n in (problem.operator.n_cases, problem.likelihood.n_cases, max(codec.gain.numel(), 1))
    )
    group = 0 if shared else i
    denoiser = prior.denoiser
    assert isinstance(denoiser, ExactDenoiser)
    measurement: Measurement | None = None
    out: list[tuple[float, float | None, Tensor, Tensor, Factor]] = []
    for log_w, mean, cov in denoiser.components():
        key = (group, id(cov))
        if key not in factors:
            measurement = measurement or Measurement(pulled.operator, pulled.likelihood.sigma)
            factors[key] = factorise(Frame(measurement, cov, row))
        factor = factors[key]
        m = mean.flatten().to(torch.float64)
        a = factor.frame.measurement
        white = factor.mean(a.data(pulled.y) - a.forward(m[None]))[0]
        evidence = None
        if factor.logdet is not None:
            u = (m + factor.frame.root(white[None])[0]).reshape(1, *codec.prior.shape)
            fit = float(own.log_likelihood(row.decode(u))[0])
            evidence = fit - 0.5 * float(white @ white) - 0.5 * factor.logdet
        out.append((log_w, evidence, m, white, factor))
    if len(out) > 1 and any(e is None for _, e, *_ in out):
        raise InvdiffError("This mixture problem is too large for exact weights; use fewer data or unknowns.")
    joint = torch.tensor([w + (e or 0.0) for w, e, *_ in out], dtype=torch.float64)
    log_weights = torch.log_softmax(joint, 0).tolist()
    return [Component(w, e, m, white, f) for w, (_, e, m, white, f) in zip(log_weights, out)]


def _row(codec: AffineCodec, i: int) -> AffineCodec:
    row = codec.rows(torch.tensor([i]))
    assert isinstance(row, AffineCodec)
    return row
