"""Operators seen from prior coordinates: the decoder itself, and a linear operator behind an affine codec."""

from __future__ import annotations

from torch import Tensor

from invdiff.codec import AffineCodec, Codec
from invdiff.operator import SVD, LinearOperator, Operator
from invdiff.spaces import per_row

__all__ = ["DecodeOperator", "Pulled"]


class DecodeOperator(Operator):
    """``decode`` of any codec as a (possibly nonlinear) operator."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.domain, self.range = codec.prior, codec.image

    @property
    def name(self) -> str:
        """What stands in messages; it is no operator of the user's."""
        return "decoder"

    def _forward(self, x: Tensor) -> Tensor:
        return self.codec.decode(x.to(self.domain.dtype))

    def rows(self, index: Tensor) -> Operator:
        """Pick the parameters of the given cases."""
        return DecodeOperator(self.codec.rows(index))


class Pulled(LinearOperator):
    """``A L`` for a linear ``A`` and the linear part ``L`` of an affine codec with ``L L^H = c^2 I``.

    ``prox`` passes through exactly: with ``p = prox_A(L z; rho / c^2)``, the minimiser over prior coordinates is
    ``z + L^H (p - L z) / c^2``.
    """

    def __init__(self, operator: LinearOperator, codec: AffineCodec) -> None:
        self.operator, self.codec = operator, codec
        self.domain, self.range = codec.prior, operator.range

    @property
    def name(self) -> str:
        """Name of the operator in image space."""
        return self.operator.name

    @property
    def n_cases(self) -> int | None:
        """Cases of the operator, or of the scale."""
        gain = self.codec.gain
        return gain.shape[0] if gain.ndim and gain.shape[0] > 1 else self.operator.n_cases

    @property
    def capabilities(self) -> frozenset[str]:
        """What survives the change of coordinates."""
        return self.operator.capabilities & {"linear", "vjp", "normal", "prox", "svd", "pinv"}

    def _down(self, u: Tensor) -> Tensor:
        return self.codec.linear(u.to(self.domain.dtype))

    def _forward(self, x: Tensor) -> Tensor:
        return self.operator(self._down(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.codec.linear_adjoint(self.operator.adjoint(y))

    def normal(self, x: Tensor) -> Tensor:
        """Return ``L^H A^H A L x``."""
        return self.codec.linear_adjoint(self.operator.normal(self._down(x)))

    def prox(self, z: Tensor, y: Tensor, rho: Tensor) -> Tensor:
        """Return the exact prox in prior coordinates; ``rho`` has shape ``(B,)``."""
        x = self._down(z)
        gain2 = (self.codec.gain**2).to(rho)
        step = self.codec.linear_adjoint(self.operator.prox(x, y, rho / gain2) - x)
        return z + step / self._gain(step) ** 2

    def pinv(self, y: Tensor) -> Tensor:
        """Return ``(A L)^+ y = L^H A^+ y / c^2``."""
        back = self.codec.linear_adjoint(self.operator.pinv(y))
        return back / self._gain(back) ** 2

    def svd(self) -> SVD:
        """Return ``A L = U diag(c s) (V^H L / c)``.

        Where the codec pads or restricts, ``v vh`` is the projection on what the data could see, not the
        identity: write updates as ``x + v(f(s) * ...)`` with ``f`` zero where ``s`` is.
        """
        d = self.operator.svd()

        def vh(x: Tensor) -> Tensor:
            c = d.vh(self._down(x))
            return c / self._gain(c)

        def v(c: Tensor) -> Tensor:
            x = self.codec.linear_adjoint(d.v(c))
            return x / self._gain(x)

        return SVD(s=d.s * self._gain(d.s), vh=vh, v=v, uh=d.uh, u=d.u)

    def _gain(self, like: Tensor) -> Tensor:
        return per_row(self.codec.gain.to(like.device), like)

    def rows(self, index: Tensor) -> LinearOperator:
        """Pick the parameters of the given cases."""
        codec = self.codec.rows(index)
        assert isinstance(codec, AffineCodec)
        return Pulled(self.operator.rows(index), codec)
