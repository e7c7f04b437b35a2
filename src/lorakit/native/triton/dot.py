"""Matrix products inside kernels, and whether Triton interprets them."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(one, two):
    """one @ two with sums in float32; float32 numbers are not shortened."""
    if INTERPRETED:  # the interpreter takes bfloat16 for whole numbers here
        one, two = one.to(tl.float32), two.to(tl.float32)
    return tl.dot(one, two, input_precision="ieee")
