"""Triton's interpreter without work whose results are not used, which is more than half of its time.

Most of the time of kernel tests is spent in the interpreter. Results of kernels and all checks of the
interpreter stay the same.
"""

from dataclasses import replace

from triton.runtime import interpreter


def spare_wasted_work() -> None:
    """Patch Triton for this process; call it once, before the first kernel is launched."""
    options = interpreter.interpreter_builder.options
    if not options.debug:  # overflows, found by computing in int64 too, raise only in debug mode
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)

    patch_lang, np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    execute, dtypes, launches = interpreter.GridExecutor.__call__, {}, []

    def launch(self, *args, **kwargs):
        launches.append({})
        try:
            return execute(self, *args, **kwargs)
        finally:
            launches.pop()

    def patch_once(fn):
        """Replace `triton.language` in the globals of `fn` once per launch, not at every call within it."""
        patched = launches[-1] if launches else {}
        key = id(fn.__globals__)
        if key not in patched:
            patched[key] = patch_lang(fn)
        return patched[key]

    def look_up(dtype):
        key = repr(dtype.scalar)
        if key not in dtypes:
            dtypes[key] = np_dtype(dtype)
        return dtypes[key]

    interpreter.GridExecutor.__call__ = launch
    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = look_up
