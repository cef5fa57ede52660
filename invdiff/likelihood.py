"""The likelihood contract: p(y given z = A(x)), the only owner of the noise level."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.rng import Streams
from invdiff.spaces import real_inner
from invdiff.tensors import Movable, take_rows, tensor_digest


class Likelihood(Movable, ABC):
    """p(y | z) for noiseless data ``z = A(x)``; every method takes and returns batches of rows.

    Complex data: the noise level is per real component, so a complex Gaussian of level ``sigma`` has
    variance ``2 sigma^2``.
    """

    #: Whether p(y + b | z + b) = p(y | z), so that a constant may move from the operator to the data.
    shift_invariant: bool = False

    @abstractmethod
    def sample(self, z: Tensor, rng: Streams) -> Tensor:
        """Draw ``y`` given ``z``, ``(B, *range)``."""

    @abstractmethod
    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the normalised log-density of ``y`` given ``z``, shape ``(B,)``."""

    @abstractmethod
    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of ``log_prob`` with respect to ``z`` (for ``Re <.,.>``), ``(B, *range)``."""

    def mean(self, z: Tensor) -> Tensor:
        """What residuals of the data are measured from, ``z`` and its background, ``(B, *range)``."""
        return z

    def gaussian_sigma(self, z: Tensor) -> Tensor | None:
        """Noise level per real component of a local quadratic surrogate at ``z``.

        Broadcasts over ``(B, *range)``; None where no such surrogate serves.
        """
        return None

    def curvature(self, z: Tensor, y: Tensor) -> Tensor | None:
        """Upper estimate of ``-d score / dz`` between ``z`` and the data, element by element, for step sizes.

        None where the local derivative serves.
        """
        return None

    def whiten(self) -> LinearOperator | None:
        """Return ``W`` such that ``W y`` has independent unit noise, for correlated Gaussian noise only."""
        return None

    @property
    def n_cases(self) -> int | None:
        """Number of cases the parameters are given for, or None where all cases share them."""
        counts = [v.shape[0] for v in self.__dict__.values() if isinstance(v, Tensor) and v.ndim]
        return max(counts) if counts and max(counts) > 1 else None

    def rows(self, index: Tensor) -> Any:
        """Return the likelihood whose row ``r`` has the parameters of case ``index[r]``."""
        new = copy.copy(self)
        for key, value in self.__dict__.items():
            if isinstance(value, Tensor) and value.ndim:
                new.__dict__[key] = take_rows(value, index)
        return new

    @property
    def name(self) -> str:
        """Name used in messages and provenance."""
        return type(self).__name__

    def describe(self) -> dict[str, Any]:
        """Return what provenance records: name, numbers, and a digest of arrays."""
        numbers = {
            k: (float(v) if isinstance(v, Tensor) and v.numel() == 1 else v)
            for k, v in self.__dict__.items()
            if isinstance(v, (int, float)) or (isinstance(v, Tensor) and v.numel() == 1)
        }
        return {"name": self.name, **numbers, "sha256": tensor_digest(self.__dict__)}

    def __repr__(self) -> str:
        inner = ", ".join(
            f"{k}={v:g}" if isinstance(v, (int, float)) else f"{k}={_short(v)}"
            for k, v in self.__dict__.items()
            if isinstance(v, (int, float, Tensor))
        )
        return f"{self.name}({inner})"


def positive(value: float | Tensor, what: str) -> Tensor:
    """Return ``value`` as a tensor that is finite and at least 0 everywhere.

    A number becomes a 0-d tensor shared by all cases; an array needs a leading case axis (1 or N).
    """
    out = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
    if not bool(torch.isfinite(out).all()) or bool((out < 0).any()):
        shown = f"{float(out):g}" if out.numel() == 1 else f"values from {float(out.min()):g}"
        raise InvdiffError(f"{what} must be finite and not negative, got {shown}.")
    return out


def real_count(z: Tensor) -> int:
    """Number of real components of one row."""
    return z[0].numel() * (2 if z.is_complex() else 1)


def quadratic(r: Tensor) -> Tensor:
    """``||r||^2`` per row, ``(B,)``."""
    return real_inner(r, r)


def array_sha256(values: Tensor) -> str:
    """SHA-256 of the bytes of a tensor."""
    return hashlib.sha256(values.detach().cpu().contiguous().resolve_conj().numpy().tobytes()).hexdigest()


def _short(value: Tensor) -> str:
    return f"{float(value):g}" if value.numel() == 1 else f"tensor{tuple(value.shape)}"
