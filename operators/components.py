"""Data of several unknowns at once: source separation, dehazing, structured noise."""

from __future__ import annotations

from torch import Tensor

from invdiff.algebra import Adjoint
from invdiff.operator import LinearOperator, stack


class SumOf(Adjoint):
    """``(x_1, ..., x_n) -> A_1 x_1 + ... + A_n x_n``, the unknowns stacked along a leading axis ``component``.

    ``(B, n, *image)`` to ``(B, *range)``. With ``I = Identity(space)``, ``A @ SumOf(I, I)`` measures the sum of
    two images, ``A @ SumOf(0.7 * I, 0.3 * I)`` a blend of them, and ``SumOf(A, I)`` an image behind ``A`` under
    structured noise that lives among the data. It is ``stack([A_1.H, ..., A_n.H]).H``.

    Args:
        parts: Linear operators with the same spaces, one for each component.

    Raises:
        InvdiffError: If there are none, or their spaces differ.
    """

    base: LinearOperator

    def __init__(self, *parts: LinearOperator) -> None:
        super().__init__(stack([p.H for p in parts]))
        image = self.domain.dims[1:]
        self.domain = self.domain.replace(dims=("component", *image))
        self.parts = parts

    @property
    def name(self) -> str:
        """Names of the parts."""
        return "SumOf(" + ", ".join(p.name for p in self.parts) + ")"

    def rows(self, index: Tensor) -> LinearOperator:
        """Pick the parameters of every part."""
        return SumOf(*(p.rows(index) for p in self.parts))
