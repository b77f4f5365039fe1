"""Triton's interpreter in two thirds of the time, with the same results.

For every call of one kernel's function by another it looks through the whole of ``triton.language`` for what it has to
replace, most often by what is there already; and for every operation it makes a table of NumPy's types. Both are
private to Triton: where another version calls them otherwise, they stay as they are.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Once per process, before the first kernel runs."""
    if hasattr(interpreter, "_LangPatchScope") and hasattr(interpreter, "_patch_lang"):
        _replace_once_per_launch()
    if hasattr(interpreter, "_get_np_dtype"):
        _remember_types()


def _replace_once_per_launch() -> None:
    replace, replaced = interpreter._patch_lang, set[str]()

    def replace_once(fn: Any) -> Any:
        found = {value.__name__ for value in fn.__globals__.values() if isinstance(value, ModuleType)}
        found &= {tl.__name__, tl.core.__name__}
        if found and found <= replaced:  # the kernel that calls this function puts back what it needs
            return interpreter._LangPatchScope()
        scope = replace(fn)
        if not replaced:  # the kernel itself, which puts everything back at its end
            restore = scope.restore

            def restore_and_forget() -> None:
                restore()
                replaced.clear()

            scope.restore = restore_and_forget
        replaced.update(found)
        return scope

    interpreter._patch_lang = replace_once


def _remember_types() -> None:
    look_up, known = interpreter._get_np_dtype, dict[str, np.dtype]()

    def remembered(dtype: Any) -> np.dtype:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if type(scalar) is not tl.dtype:  # pointers
            return look_up(dtype)
        if scalar.name not in known:
            known[scalar.name] = look_up(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = remembered
