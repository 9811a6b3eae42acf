"""Triton's interpreter with bfloat16 as a GPU has it: products of widened operands, rounding to nearest even.

Its own tl.dot multiplies the bit patterns as integers, and its conversion from float32 cuts the low bits off.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

cast, dot, launch = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, interpreter.GridExecutor.__call__


def round_to_even(self, src: TensorHandle, dst_type) -> TensorHandle:
    if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
        return cast(self, src, dst_type)
    bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return TensorHandle(bits.reshape(src.data.shape), tl.bfloat16)


def widened_dot(self, a: TensorHandle, b: TensorHandle, *rest) -> TensorHandle:
    wide = [TensorHandle((v.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            if v.dtype.scalar == tl.bfloat16 else v for v in (a, b)]
    return dot(self, *wide, *rest)


def repair() -> None:
    """Idempotent; does nothing where kernels run on a GPU."""
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = round_to_even, widened_dot
