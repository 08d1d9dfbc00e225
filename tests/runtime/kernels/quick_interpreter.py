"""Triton's interpreter, without looking for the same things again and again.

At every launch, and at every call of a function within one, the interpreter looks through the whole language for functions to
replace by its own: a third of the time of small kernels. What it finds is always the same, and within a launch it is replaced
already. The functions that do the replacing stay the interpreter's own.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any


def install() -> None:
    """For this process and its forks. Does nothing where there is no triton, or one that works in another way."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_patch_builtin", "_patch_attr", "_LangPatchScope")):
        return
    patch_lang, language = interpreter._patch_lang, interpreter.tl
    found: dict[Any, list[tuple[str, Any]]] = {}
    replaced: set[ModuleType] = set()

    class Launch(interpreter._LangPatchScope):  # type: ignore[misc, name-defined]
        """The replacements of one launch."""

        def restore(self) -> None:
            super().restore()
            replaced.clear()

    def patch_builtin(where: Any, builder: Any, scope: Any) -> None:
        if where not in found:
            found[where] = [(name, one) for name, one in inspect.getmembers(where) if language.core.is_builtin(one)]
        for name, one in found[where]:
            if getattr(where, name) is one:
                interpreter._patch_attr(where, name, one, builder, scope)

    def patch_once(function: Any) -> Any:
        wanted = {one for one in function.__globals__.values() if one is language or one is language.core}
        if replaced and wanted <= replaced:
            return interpreter._LangPatchScope()
        scope = patch_lang(function) if replaced else _as_launch(patch_lang(function))
        replaced.update(wanted)
        return scope

    def _as_launch(scope: Any) -> Launch:
        launch = Launch()
        launch._changes = scope._changes
        return launch

    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_once
