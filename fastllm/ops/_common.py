"""What the op files share: argument checks and the second derivative."""

import torch
import torch.nn.functional as F

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOWERED = FLOATS[:-1]  # by autocast, which leaves fp64 alone
STRIDED = torch.strided


def check_tensor(op: str, name: str, x, *, like=None, dtypes=FLOATS):
    """`x` is a dense tensor of one of `dtypes`, on the device (and, where `like` is given, of the dtype) of `like`."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if not is_dense(x):
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").strip("_").replace("_", " ")
        way = "to_padded_tensor(0)" if x.is_nested else "to_dense()"
        raise TypeError(f"{op}: {name} must be a dense tensor, got one that is {kind}: {way} makes a dense one")
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be one of {names}, got {str(x.dtype).removeprefix('torch.')}")
    if like is not None:
        if not (x.is_cpu and like.is_cpu) and x.device != like.device:  # to compare devices takes as long as all else
            raise ValueError(f"{op}: {name} must be on {like.device} like the first input, got {x.device}")
        if dtypes is FLOATS and x.dtype != like.dtype:
            raise TypeError(f"{op}: {name} must be {like.dtype} like the first input, got {x.dtype}")


def is_dense(x) -> bool:
    """Whether `x` has memory with strides, unlike nested and sparse tensors, of which no kernel knows anything."""
    return x.layout is STRIDED and not x.is_nested


def check_broadcast(op: str, name: str, x: torch.Tensor, shape):
    """`x` can be expanded to `shape`."""
    fits = x.ndim <= len(shape) and all(n in (1, m) for n, m in zip(reversed(x.shape), reversed(shape), strict=False))
    if not fits:
        raise ValueError(f"{op}: {name} must broadcast to {list(shape)}, got {list(x.shape)}")


def no_fp64(x):
    """`unsupported` for dispatch.choose: the GPU kernels compute in fp32."""
    if x.dtype != torch.float64:
        return None
    return lambda backend: "float64: the GPU kernels compute in fp32" if backend in ("triton", "cuda") else None


def is_autocast(x) -> bool:
    """Whether autocast is on where `x` is; some devices ("meta") have none."""
    if x.is_cpu:  # asking for the device's name takes longer than all else here
        return torch.is_autocast_enabled("cpu")
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(*tensors):
    """What autocast does for torch's own products: low precision, but for fp64; None stays None, and so does what is no
    float: the checks refuse it."""
    if not is_autocast(tensors[0]):
        return tensors
    low = torch.get_autocast_dtype(tensors[0].device.type)
    return [x.to(low) if isinstance(x, torch.Tensor) and x.dtype in LOWERED else x for x in tensors]


def in_dtype(x, dtype):
    """What the forward pass of an autograd.Function returns: `x` itself where it has that dtype. A conversion that does
    nothing gives torch.compile in PyTorch 2.11 one result under two names, of which the other one gets the gradient."""
    return x if x.dtype == dtype else x.to(dtype)


def promoted(x, y):
    """x and y as they are, or under autocast in the wider of their dtypes: there one may come from a product in low
    precision and the other not, and PyTorch adds and multiplies them. Without autocast that is a mistake."""
    tensors = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    if tensors and x.dtype != y.dtype and is_autocast(x):
        wide = torch.promote_types(x.dtype, y.dtype)
        return x.to(wide), y.to(wide)
    return x, y


def as_4d(x: torch.Tensor) -> torch.Tensor:
    """A view of `x` with leading dimensions of size 1."""
    return x.reshape((1,) * (4 - x.ndim) + tuple(x.shape)) if x.ndim < 4 else x


def check_dropout(op: str, dropout_p):
    if dropout_p is None or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")


def drop_all(x):
    """x and dropout_p where dropout_p is 1, for kernels that scale by 1 / (1 - dropout_p): 0, and zeros with a gradient
    of zeros, as torch's dropout makes them."""
    return F.dropout(x, 1.0), 0.0


def wants_gradient(*tensors) -> bool:
    """Whether autograd has to see this call; without it an op is called directly, which saves its bookkeeping."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def apart(*tensors):
    """`tensors`; under torch.compile, where a tensor stands twice (attention(x, y, y)), the second is an alias: Dynamo
    takes none twice into an autograd Function."""
    if not torch.compiler.is_compiling():
        return tensors
    return [x.view_as(x) if x is not None and any(x is y for y in tensors[:n]) else x for n, x in enumerate(tensors)]


def gradients_through(function, inputs, grads):
    """Gradients of `function(*inputs)` that can be differentiated again; None for what is None or needs none."""
    # Fresh aliases, so that a tensor given twice (attention(x, x, x)) gets a gradient for each of its roles.
    aliases = [x.view_as(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    wanted = [a for a in aliases if isinstance(a, torch.Tensor) and a.requires_grad]
    outputs = function(*aliases)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    found = torch.autograd.grad(
        [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
    )
    found = iter(found)
    return tuple(next(found) if isinstance(a, torch.Tensor) and a.requires_grad else None for a in aliases)
