"""Vectors of numbers inside numba kernels: a batch in one register.

LLVM does not find the vectors of a loop over a short batch by itself; with these functions a kernel names them.
A vector is a value like any other: ``total = fma(total, weight, load(x, index, LANES))``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core.datamodel import models

#: Declared by a typing function, called as what that function returns; types cannot say so.
intrinsic: Any = extending.intrinsic


class Lanes(types.Type):
    """Type of ``count`` numbers of one floating-point type, held together."""

    def __init__(self, dtype: Any, count: int) -> None:
        self.dtype, self.count = dtype, count
        super().__init__(name=f"Lanes({dtype}, {count})")


@extending.register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    """An LLVM vector."""

    def __init__(self, dmm: Any, fe_type: Any) -> None:
        element = ir.FloatType() if fe_type.dtype == types.float32 else ir.DoubleType()
        super().__init__(dmm, fe_type, ir.VectorType(element, fe_type.count))


def _place(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


@intrinsic(prefer_literal=True)
def load(typingctx: Any, array: Any, index: Any, count: Any) -> Any:
    """Return ``count`` numbers of a flat array from an index on; ``count`` is a constant of the kernel."""
    vector = Lanes(array.dtype, count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out = builder.load(
            _place(context, builder, array, arguments[0], arguments[1], context.get_value_type(vector))
        )
        out.align = array.dtype.bitwidth // 8
        return out

    return vector(array, types.intp, count), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write a vector to a flat array from an index on."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _place(context, builder, array, arguments[0], arguments[1], context.get_value_type(value))
        builder.store(arguments[2], place, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic(prefer_literal=True)
def zeros(typingctx: Any, array: Any, count: Any) -> Any:
    """Return ``count`` zeros of the type that an array holds."""
    vector = Lanes(array.dtype, count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(vector)
        return ir.Constant(kind, [0.0] * vector.count)

    return vector(array, count), codegen


@intrinsic
def fma(typingctx: Any, total: Any, weight: Any, value: Any) -> Any:
    """Return ``total + weight * value`` for a number ``weight``."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, number = context.get_value_type(value), ir.IntType(32)
        before, scalar, vector = arguments
        single = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(number, 0))
        first = ir.Constant(ir.VectorType(number, value.count), [0] * value.count)
        many = builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), first)
        # "contract" lets the two become one instruction, and nothing else
        product = builder.fmul(many, vector, flags=("contract",))
        return builder.fadd(before, product, flags=("contract",))

    return total(total, total.dtype, value), codegen
