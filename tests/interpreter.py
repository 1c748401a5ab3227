"""Makes Triton's interpreter right for bf16 and tf32, and puts guards round every tensor that a kernel is given.

Imported by conftest where there is no GPU; not for production.

The interpreter keeps a bf16 tensor as the raw bits in uint16 and then computes on those bits as if they were integers,
and it rounds fp32 to bf16 by cutting. Here bf16 operands are widened to fp32, the result is rounded to nearest even,
and products of fp16 and bf16 are summed in fp32, as on a GPU; a tf32 product sees operands of 10 mantissa bits.
A load from outside of a tensor's storage gives NaN (true for booleans, -1 or so for integers), which no test forgives;
a store there is an error. Holds for Triton 3.6; TRITON_INTERPRET=1 has to be set before Triton is imported.
"""

import dataclasses
import functools
import math

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_original = {
    name: getattr(InterpreterBuilder, name)
    for name in ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "create_dot")
}


def _is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _round_to_bf16(x):
    """The bits of fp32 `x` rounded to bf16, ties to even, NaN kept."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    ties_to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint16(0x7FC0), ((bits + ties_to_even) >> np.uint32(16)).astype(np.uint16))


def _bf16(x):
    return TensorHandle(_round_to_bf16(x), tl.bfloat16)


def _values(handle):
    """The numbers in a tensor: fp32 for bf16, the array itself for every other dtype."""
    if _is_bf16(handle):
        return (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return handle.data


def _round_to_tf32(x):
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def cast_impl(self, src, dst_type):
    to_bf16 = dst_type.scalar == tl.bfloat16
    if to_bf16 and not _is_bf16(src):
        return _bf16(src.data.astype(np.float32))
    if _is_bf16(src) and not to_bf16:
        return TensorHandle(_values(src).astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)
    return _original["cast_impl"](self, src, dst_type)


def create_fp_to_fp(self, src, dst_type, rounding_mode):
    types = (src.dtype.scalar, dst_type.scalar)
    if tl.bfloat16 in types and all(t.primitive_bitwidth > 8 for t in types):
        return cast_impl(self, src, dst_type)
    return _original["create_fp_to_fp"](self, src, dst_type, rounding_mode)


def binary_op(self, lhs, rhs, op):
    if _is_bf16(lhs) or _is_bf16(rhs):
        result = op(_values(lhs), _values(rhs))
        return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else _bf16(result)
    result = _original["binary_op"](self, lhs, rhs, op)
    if result.data.dtype == np.bool_:  # else int64 where a number meets a vector: no mask in Triton 3.9
        result.dtype = tl.int1
    return result


def unary_op(self, arg, op):
    return _bf16(op(_values(arg))) if _is_bf16(arg) else _original["unary_op"](self, arg, op)


def create_fma(self, x, y, z):
    if _is_bf16(z):
        return _bf16(_values(x) * _values(y) + _values(z))
    return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    if a.dtype.primitive_bitwidth in (8, 64):
        return _original["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
    lhs, rhs = _values(a).astype(np.float32), _values(b).astype(np.float32)
    if a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
        lhs, rhs = _round_to_tf32(lhs), _round_to_tf32(rhs)
    return TensorHandle(np.matmul(lhs, rhs).astype(d.data.dtype) + d.data, d.dtype.scalar)


def get_bf16(self, value):
    return _bf16(np.array([value], np.float32))


for function in (cast_impl, create_fp_to_fp, binary_op, unary_op, create_fma, create_dot, get_bf16):
    setattr(InterpreterBuilder, function.__name__, function)


# Two thirds of the interpreter's time goes into what never changes between two operations: it patches all of
# triton.language for every call of a function by a kernel, and makes anew what it knows of a dtype and of a shape.


class _PatchOnce:
    """`_patch_lang`, once per launch for each module that functions know as tl or core; tl.core goes by both names."""

    def __init__(self, patch):
        self.patch, self.scopes, self.patched = patch, [], set()

    def __call__(self, fn):
        modules = {module for module in map(fn.__globals__.get, ("tl", "core")) if module in (tl, tl.core)}
        if not modules <= self.patched:
            self.scopes.append(self.patch(fn))
            self.patched |= modules
        return self

    def restore(self):
        while self.scopes:
            self.scopes.pop().restore()
        self.patched.clear()


interpreter._patch_lang = _PatchOnce(interpreter._patch_lang)
_np_dtype = functools.cache(lambda name, original=interpreter._get_np_dtype: original(tl.dtype(name)))


def _get_np_dtype(dtype):
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else _np_dtype(dtype.scalar.name)


interpreter._get_np_dtype = _get_np_dtype


@functools.cache
def _shape(sizes):
    return tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def _init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(tuple(type.shape) if type.is_block() else ())


@functools.cache
def _block(element, sizes):
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    return tl.core.tuple(sizes), tl.core.validate_block_shape(sizes), f"<{sizes}, {element}>"


def _init_block(self, element_ty, shape):
    sizes = tuple(tl.core._unwrap_if_constexpr(size) for size in shape)
    self.element_ty = element_ty
    self.shape, self.numel, self.name = _block(element_ty.name, sizes)


tl.core.tensor.__init__ = _init_tensor
tl.core.block_type.__init__ = _init_block


GUARD = 1 << 16  # bytes before and after a storage
# NaN in every float, with bits that no arithmetic makes: a NaN that a kernel stores is seen too.
PATTERN = np.array([0xA5, 0xFF, 0xA5, 0xFF, 0xA5, 0xFF, 0xF5, 0xFF], np.uint8).view(np.int64).item()


def _bytes(storage):
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _init_args_hst(self, args, kwargs):
    """The arguments with every tensor moved into the middle of a larger storage."""
    self.guarded = {}

    def moved(x):
        if isinstance(x, tuple):
            return interpreter._tuple_create(x, map(moved, x))
        if isinstance(x, interpreter.TensorDescriptor):
            return dataclasses.replace(x, base=moved(x.base))
        if not isinstance(x, torch.Tensor):
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.guarded:
            words = -(-storage.nbytes() // 8) + 2 * GUARD // 8
            buffer = torch.full((words,), PATTERN).view(torch.uint8)
            buffer[GUARD : GUARD + storage.nbytes()] = _bytes(storage)
            self.guarded[storage.data_ptr()] = storage, buffer
        inside = self.guarded[storage.data_ptr()][1].untyped_storage()
        start = GUARD // x.element_size() + x.storage_offset()
        return x.new_empty(0).set_(inside, start, x.size(), x.stride())

    return [moved(x) for x in args], {name: moved(x) for name, x in kwargs.items()}


def _restore_args_dev(self, *_):
    """Copies back what the kernel wrote, if it wrote nowhere else."""
    for storage, buffer in self.guarded.values():
        end = GUARD + storage.nbytes()
        clean = torch.full((len(buffer) // 8,), PATTERN).view(torch.uint8)
        if not all(torch.equal(buffer[band], clean[band]) for band in (slice(GUARD), slice(end, None))):
            raise AssertionError(f"{self.fn.__name__} wrote outside of a tensor of {storage.nbytes()} bytes")
        _bytes(storage).copy_(buffer[GUARD:end])


for function in (_init_args_hst, _restore_args_dev):
    setattr(GridExecutor, function.__name__, function)
