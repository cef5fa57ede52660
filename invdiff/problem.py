"""A problem: operator + likelihood + measurement, and its rewriting in prior coordinates."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from invdiff.codec import AffineCodec, Codec
from invdiff.errors import InvdiffError
from invdiff.likelihood import Likelihood, array_sha256
from invdiff.operator import Affine, LinearOperator, Operator, compose
from invdiff.pulled import DecodeOperator, Pulled
from invdiff.rng import INIT, Streams, resolve_seed
from invdiff.tensors import take_rows


@dataclass(frozen=True, eq=False)
class Problem:
    """``y ~ p(. | A(x))`` for one or several cases.

    Args:
        operator: Forward operator ``A``.
        likelihood: Noise model, the only owner of the noise level.
        y: Measurement, ``(N, *operator.range.shape)``; the case axis may be left out for one case.
        x_true: Truth where simulated, ``(N, *operator.domain.shape)``.
        meta: Anything worth keeping (title, source, scale), carried into provenance.
        gain: Image units per prior unit after ``pullback``, ``()`` or ``(N,)``; published guidance weights
            assume data in prior units, and dividing by it makes them independent of the image's scale.

    Raises:
        InvdiffError: If shapes, real/complex or case counts do not fit, or ``y`` is not finite.
    """

    operator: Operator
    likelihood: Likelihood
    y: Tensor
    x_true: Tensor | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    gain: Tensor | None = None

    def __post_init__(self) -> None:
        y = torch.as_tensor(self.y)
        if tuple(y.shape) == self.operator.range.shape:
            y = y[None]
        self.operator.range.check(y, "The measurement y")
        bad = int((~torch.isfinite(y)).sum())
        if bad:
            raise InvdiffError(
                f"The measurement y holds {bad} NaN or infinite values of {y.numel()}; "
                "mask those samples out or repair them first."
            )
        object.__setattr__(self, "y", y)
        if self.x_true is not None:
            x = torch.as_tensor(self.x_true)
            x = x[None] if tuple(x.shape) == self.operator.domain.shape else x
            self.operator.domain.check(x, "x_true")
            object.__setattr__(self, "x_true", x)
        for what, count in (("operator", self.operator.n_cases), ("likelihood", self.likelihood.n_cases)):
            if count not in (None, 1, y.shape[0]):
                raise InvdiffError(
                    f"The {what} has parameters for {count} cases and y has {y.shape[0]}; give one or as many."
                )

    @classmethod
    def simulate(
        cls,
        operator: Operator,
        likelihood: Likelihood,
        x_true: Tensor,
        seed: int = 0,
        meta: Mapping[str, Any] | None = None,
    ) -> Problem:
        """Simulate ``y`` from ``x_true`` ``(N, *domain)``; case ``i`` uses random stream ``(seed, i)``."""
        x = x_true[None] if tuple(x_true.shape) == operator.domain.shape else x_true
        z = operator(x)
        rng = Streams(resolve_seed(seed), [(i, 0) for i in range(z.shape[0])]).at(INIT)
        y = likelihood.sample(z, rng).to(z.dtype)
        if operator.support is not None:
            y = y * operator.support.to(y.device, z.real.dtype if z.is_complex() else z.dtype)
        return cls(operator, likelihood, y, x, {"simulated_with_seed": seed, **(meta or {})})

    @property
    def n_cases(self) -> int:
        """Number of measurements."""
        return self.y.shape[0]

    @property
    def capabilities(self) -> frozenset[str]:
        """Abilities of the operator and of the likelihood.

        ``quadratic``: it has a Gaussian surrogate; ``noise``: no datum has the noise level 0.
        """
        sigma = self.likelihood.gaussian_sigma(torch.zeros_like(self.y))
        found = set() if sigma is None else {"quadratic"}
        if sigma is None or not self.likelihood.shift_invariant or bool((sigma > 0).all()):
            found.add("noise")
        return self.operator.capabilities | found

    @cached_property
    def adjoint_y(self) -> Tensor:
        """``A^H y``, ``(N, *domain)``, computed once."""
        if not isinstance(self.operator, LinearOperator):
            raise InvdiffError(f"{self.operator.name} is not linear and has no adjoint.")
        return self.operator.adjoint(self.y)

    def residual(self, x: Tensor) -> Tensor:
        """Return ``y - A(x)`` less a known background, ``(B, *range)``."""
        return self.y - self.likelihood.mean(self.operator(x))

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Return ``log p(y | A(x))``, ``(B,)``."""
        return self.likelihood.log_prob(self.operator(x), self.y)

    def grad_log_likelihood(self, x: Tensor) -> Tensor:
        """Return the gradient of ``log p(y | A(x))`` with respect to ``x``, ``(B, *domain)``."""
        z = self.operator(x)
        return self.operator.vjp(x, self.likelihood.score(z, self.y))

    def sigma(self, x: Tensor) -> Tensor:
        """Noise level of the quadratic surrogate at ``A(x)``, broadcastable over ``(B, *range)``."""
        sigma = self.likelihood.gaussian_sigma(self.operator(x) if self.operator_dependent_noise else self.y)
        if sigma is None:
            raise InvdiffError(f"{self.likelihood.name} has no quadratic surrogate.")
        return sigma

    @property
    def operator_dependent_noise(self) -> bool:
        """Whether the noise level depends on the noiseless data (Poisson and its kin)."""
        return not self.likelihood.shift_invariant

    def rows(self, index: Tensor) -> Problem:
        """Return the problem whose row ``r`` is case ``index[r]``."""
        index = torch.as_tensor(index, dtype=torch.long)
        return replace(
            self,
            operator=self.operator.rows(index),
            likelihood=self.likelihood.rows(index),
            y=self.y[index.to(self.y.device)],
            x_true=None if self.x_true is None else self.x_true[index.to(self.x_true.device)],
            gain=self.gain if self.gain is None or not self.gain.ndim else take_rows(self.gain, index),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Problem:
        """Return a copy on another device or in the precision of ``dtype`` (complex stays complex)."""

        def move(v: Tensor) -> Tensor:
            target = None if dtype is None else dtype.to_complex() if v.is_complex() else dtype.to_real()
            return v.to(device=device, dtype=target)

        return replace(
            self,
            operator=self.operator.to(device, dtype),
            likelihood=self.likelihood.to(device, dtype),
            y=move(self.y),
            x_true=None if self.x_true is None else move(self.x_true),
        )

    def whiten(self) -> Problem:
        """Rewrite correlated Gaussian noise as independent unit noise: ``(W A, W y)``; else return self."""
        w = self.likelihood.whiten()
        if w is None:
            return self
        from invdiff.likelihoods import Gaussian

        return replace(self, operator=compose(w, self.operator), likelihood=Gaussian(1.0), y=w(self.y))

    def pullback(self, codec: Codec) -> Problem:
        """Rewrite the problem in prior coordinates ``u``, where ``x = codec.decode(u)``.

        An affine codec keeps a linear problem linear (its constant moves into the data where the likelihood
        allows), and so does any linear one, without closed forms; others compose the operator with ``decode`` and
        leave only ``vjp``. ``gain`` is then what the image is worth in the units of an autoencoder's images.
        """
        if codec.image.shape != self.operator.domain.shape:
            raise InvdiffError(
                f"The prior's codec gives images {codec.image}, and the operator takes {self.operator.domain}; "
                "use a prior (or a codec) for that shape."
            )
        x_true = None if self.x_true is None else codec.encode(self.x_true)
        if codec.is_linear and self._is_linear:
            return replace(self, operator=compose(self.operator, codec.linear_operator()), x_true=x_true)
        if not (isinstance(codec, AffineCodec) and codec.is_affine and self._is_linear):
            operator: Operator = compose(self.operator, DecodeOperator(codec))
            gain = None if codec.is_affine else codec.image_unit
            return replace(self, operator=operator, x_true=x_true, gain=gain)
        assert isinstance(self.operator, LinearOperator)
        pulled = Pulled(self.operator, codec)
        gain = codec.gain
        if codec.offset is None:
            return replace(self, operator=pulled, x_true=x_true, gain=gain)
        b = codec.offset.to(self.operator.domain.dtype)
        b = b.expand(max(1, b.shape[0] if b.ndim else 1), *self.operator.domain.shape)
        n = self.operator.n_cases
        image = self.operator(b.expand(n, *b.shape[1:]) if n and b.shape[0] == 1 else b)
        if self.likelihood.shift_invariant:
            return replace(self, operator=pulled, y=self.y - image, x_true=x_true, gain=gain)
        return replace(self, operator=Affine(pulled, image), x_true=x_true, gain=gain)

    @property
    def _is_linear(self) -> bool:
        return isinstance(self.operator, LinearOperator) and "linear" in self.operator.capabilities

    def describe(self) -> dict[str, Any]:
        """Return what provenance records of operator, likelihood and data."""
        return {
            "operator": self.operator.describe(),
            "likelihood": self.likelihood.describe(),
            "data_sha256": array_sha256(self.y),
            "cases": self.n_cases,
            "meta": {k: v for k, v in self.meta.items() if isinstance(v, (str, int, float, bool, list))},
        }

    def _repr_html_(self) -> str:
        from invdiff.html import problem_html

        return problem_html(self)

    def __repr__(self) -> str:
        truth = "" if self.x_true is None else ", with x_true"
        return (
            f"Problem: {self.n_cases} case(s){truth}\n"
            f"  y      {self.operator.range}\n  x      {self.operator.domain}\n"
            f"  noise  {self.likelihood!r}\n" + textwrap.indent(repr(self.operator), "  ")
        )
