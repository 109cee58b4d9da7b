"""Triton's interpreter, on which kernels run where there is no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
from latentrt.kernels._dispatch import version_of
from triton import language
from triton.runtime import interpreter

__all__ = ["mend"]


def mend() -> None:
    """Patch what it lacks: bfloat16 matmuls, and in 3.6 loops with NumPy 2.4."""
    # bfloat16 is held as its bits, and tl.dot multiplies those (3.9): widen them first.
    plain = interpreter.InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != language.bfloat16 or x.data.dtype != np.uint16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), language.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot

    # Before 3.7 it takes int() of arrays of one element, which NumPy 2.4 refuses.
    if version_of(triton.__version__) < (3, 7):
        patch_tensor = interpreter._patch_lang_tensor

        def patched(tensor: Any, scope: Any) -> None:
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patched
