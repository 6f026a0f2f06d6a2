"""Makes Triton's interpreter patch the language once, for good, where it is imported.

The interpreter patches triton.language at each launch and at each call of a device function, two
thirds of its time in these tests. For a process that does nothing else with Triton.
"""

from triton.runtime import interpreter

_patch, _patched = interpreter._patch_lang, []


class _Scope:
    def restore(self):
        pass


def _patch_once(function):
    if not any(seen is function.__globals__ for seen in _patched):
        _patched.append(function.__globals__)
        _patch(function)
    return _Scope()


interpreter._patch_lang = _patch_once
