"""Triton's interpreter without work whose results are not used, which is most of its time.

Most of the time of kernel tests is spent in the interpreter, and most of that in Python objects that say what
is known already: types, shapes and constants. Results of kernels and all checks of the interpreter stay the
same; `tests/kernels/test_interpreter.py` compares.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from inspect import unwrap
from math import prod
from typing import Any

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patches: list[tuple[Any, str, Any, Any]] = []  # owner, name, Triton's own, ours


def _patch(owner: Any, name: str, ours: Any) -> None:
    _patches.append((owner, name, getattr(owner, name), ours))
    setattr(owner, name, ours)


@contextmanager
def as_triton_has_it() -> Iterator[None]:
    """The interpreter without what `spare_wasted_work` has patched."""
    for owner, name, own, _ in reversed(_patches):
        setattr(owner, name, own)
    try:
        yield
    finally:
        for owner, name, _, ours in _patches:
            setattr(owner, name, ours)


def spare_wasted_work() -> None:
    """Patch Triton for this process; call it once, before the first kernel is launched."""
    options = interpreter.interpreter_builder.options
    if not options.debug:  # overflows, found by computing in int64 too, raise only in debug mode
        _patch(interpreter.interpreter_builder, "options", replace(options, sanitize_overflow=False))
    _patch_once_per_launch()
    _look_up_numpy_types()
    _share_shapes()
    _unwrap_quickly()
    _know_equal_types()
    _add_the_semantic_only()
    _patch(interpreter.ReduceOps, "generic_reduce", _reduce_in_pairs(interpreter.ReduceOps.generic_reduce))


def _patch_once_per_launch() -> None:
    """Replace `triton.language` in the globals of a function once per launch, not at every call within it."""
    patch_lang, execute, launches = interpreter._patch_lang, interpreter.GridExecutor.__call__, []

    def launch(self, *args, **kwargs):
        launches.append({})
        try:
            return execute(self, *args, **kwargs)
        finally:
            launches.pop()

    def patch_once(fn):
        patched = launches[-1] if launches else {}
        key = id(fn.__globals__)
        if key not in patched:
            patched[key] = patch_lang(fn)
        return patched[key]

    _patch(interpreter.GridExecutor, "__call__", launch)
    _patch(interpreter, "_patch_lang", patch_once)


def _look_up_numpy_types() -> None:
    np_dtype, dtypes = interpreter._get_np_dtype, {}

    def look_up(dtype):
        key = dtype.scalar.name
        if key not in dtypes:
            dtypes[key] = np_dtype(dtype)
        return dtypes[key]

    _patch(interpreter, "_get_np_dtype", look_up)


def _share_shapes() -> None:
    """One object for each shape of types, and for each of tensors; each is checked when first made."""
    check_block, init_tensor = core.block_type.__init__, core.tensor.__init__
    name_of, no_shape = core.dtype.__str__, core.tuple([])
    one = core.constexpr(1)

    shared = {}  # by identity of the shape of a type

    @cache
    def known(sizes):
        checked = core.block_type.__new__(core.block_type)
        check_block(checked, core.int1, list(sizes))
        of_tensors = core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(prod(sizes))
        facts = checked.shape, checked.numel, str(checked.shape), of_tensors
        shared[id(checked.shape)] = facts
        return facts

    def init_block(self, element_ty, shape):
        facts = shared.get(id(shape))
        if facts is None:
            sizes = shape.values if type(shape) is core.tuple else shape
            sizes = tuple([size.value if type(size) is core.constexpr else size for size in sizes])
            if not all(type(size) is int for size in sizes):
                return check_block(self, element_ty, shape)
            facts = known(sizes)
        self.element_ty = element_ty
        self.shape, self.numel, written, self.of_tensors = facts
        self.name = f"<{written}, {name_of(element_ty)}>"

    def init(self, handle, type):
        if not type.is_block():
            self.shape, self.numel = no_shape, one
        elif hasattr(type, "of_tensors"):
            self.shape, self.numel = type.of_tensors
        else:
            return init_tensor(self, handle, type)
        self.handle, self.type, self.dtype = handle, type, type.scalar

    _patch(core.block_type, "__init__", init_block)
    _patch(core.tensor, "__init__", init)


def _unwrap_quickly() -> None:
    slowly = core._unwrap_if_constexpr

    def unwrap_quickly(value):
        if isinstance(value, core.constexpr):
            return value.value
        return value if isinstance(value, (int, float, core.dtype, core.tensor)) else slowly(value)

    _patch(core, "_unwrap_if_constexpr", unwrap_quickly)


def _know_equal_types() -> None:
    """What operands of one type, or of one shape, need not be asked, cast or broadcast."""
    for cls in (core.dtype, core.block_type, core.pointer_type):
        _patch(cls, "__eq__", _equal_if_same(cls.__eq__))
    check, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    to_tensor, constants = TritonSemantic.to_tensor, {}

    def check_quickly(self, lhs, rhs, *args, **kwargs):
        if type(lhs) is not core.tensor or id(lhs.dtype) not in _NUMBERS:
            return check(self, lhs, rhs, *args, **kwargs)
        if type(rhs) is core.tensor and lhs.dtype is rhs.dtype:
            return self.broadcast_impl_value(lhs, rhs)
        if type(rhs) is int and id(lhs.dtype) in _INTEGERS and -(2**31) <= rhs < 2**31:
            key = rhs, id(lhs.dtype), id(lhs.shape)
            if key not in constants:
                lhs, constant = check(self, lhs, rhs, *args, **kwargs)
                constants[key] = lhs.shape, _frozen(constant)  # holds the shape: no other gets its id
            return lhs, constants[key][1]
        return check(self, lhs, rhs, *args, **kwargs)

    def broadcast_quickly(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    def to_tensor_quickly(self, x, check_type=True):
        if type(x) is core.tensor:
            return x
        if type(x) is not int:
            return to_tensor(self, x, check_type)
        if x not in constants:
            constants[x] = _frozen(to_tensor(self, x, check_type))
        return constants[x]

    _patch(TritonSemantic, "binary_op_type_checking_impl", check_quickly)
    _patch(TritonSemantic, "broadcast_impl_value", broadcast_quickly)
    _patch(TritonSemantic, "to_tensor", to_tensor_quickly)


# By identity. Two operands of one of these types keep it in every operation, and ...
_NUMBERS = set(map(id, (core.int1, core.int32, core.uint32, core.int64, core.uint64, core.float32)))
# ... of these also one operand and any int32.
_INTEGERS = set(map(id, (core.int32, core.int64)))


def _frozen(constant):
    """A tensor that is used again: the interpreter writes to none, and would raise if it wrote to this."""
    constant.handle.data.flags.writeable = False
    return constant


def _equal_if_same(equal):
    return lambda self, other: self is other or equal(self, other)


def _add_the_semantic_only() -> None:
    """A function of `triton.language` in the interpreter is the function and its argument `_semantic`."""

    def patch_attr(obj, name, member, builder, scope):
        semantic, function = interpreter.interpreter_semantic, unwrap(member)

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    _patch(interpreter, "_patch_attr", patch_attr)


def _reduce_in_pairs(one_by_one):
    """Reductions by a function of the kernel join all pairs of neighbours at once, then pairs of these."""

    def generic_reduce(self, input):
        if self.axis is None:
            return one_by_one(self, input)
        arrays = [x.handle.data for x in input]
        while arrays[0].shape[self.axis] > 1:
            pairs = [np.moveaxis(x, self.axis, 0) for x in arrays]
            operands = [
                self.to_tensor(np.moveaxis(x[side::2], 0, self.axis), of.dtype)
                for side in (0, 1)
                for x, of in zip(pairs, input)
            ]
            joined = self.combine_fn.fn(*operands)
            arrays = [x.handle.data for x in (joined if isinstance(joined, tuple) else (joined,))]
        if not self.keep_dims:
            arrays = [x.squeeze(self.axis) for x in arrays]
        return [self.to_tensor(x, of.dtype) for x, of in zip(arrays, input)]

    return generic_reduce
