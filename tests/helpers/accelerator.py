"""A device that is not the CPU, over the CPU's memory, for machines without an accelerator.

Its tensors mix with those of the CPU as little as a GPU's do, and every time that the host waits
for one of its numbers is counted. It stays in the process that `start` was called in.
"""

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
NAME = "accel"
reads = []  # what made the host wait, in order


class OnDevice(torch.Tensor):
    """A tensor of the device; `inner` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"OnDevice({self.inner})"

    def __deepcopy__(self, memo):
        copied = OnDevice(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied

    def tolist(self):
        reads.append("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})


def run(operator, args, kwargs):
    """An operator on the numbers; reads are counted, and tensors of the CPU refused."""
    target = kwargs.get("device")
    to_cpu = operator is aten._to_copy.default and torch.device(target or NAME).type == "cpu"
    if operator is aten.copy_.default and not isinstance(args[0], OnDevice):
        return copy_from(args[1], args[0])
    if to_cpu or operator is aten._local_scalar_dense.default:
        reads.append(str(operator))
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if operator not in (aten.copy_.default, aten._to_copy.default):
        strangers = [x for x in tensors if not isinstance(x, OnDevice) and x.dim()]
        if strangers:
            raise RuntimeError(f"{operator}: tensors of the device and of the CPU")
    inner_args, inner_kwargs = tree_map(
        lambda x: x.inner if isinstance(x, OnDevice) else x, (args, dict(kwargs))
    )
    if target is not None:
        inner_kwargs["device"] = "cpu"
    answer = operator(*inner_args, **inner_kwargs)
    if to_cpu:
        return answer
    outer = {id(x.inner): x for x in tensors if isinstance(x, OnDevice)}  # of in-place operators

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        return outer[id(x)] if id(x) in outer else OnDevice(x)

    return tree_map(wrap, answer)


def copy_from(source, target, non_blocking=False):
    """A copy to or from the device."""
    numbers = source.inner if isinstance(source, OnDevice) else source
    if isinstance(target, OnDevice):
        target.inner.copy_(numbers)
    else:
        reads.append("copy to the CPU")
        target.copy_(numbers)
    return target


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    memory_format = memory_format or torch.contiguous_format
    return OnDevice(torch.empty(size, dtype=dtype, memory_format=memory_format))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


class _Generator(torch.Generator):
    """The device's random numbers are the CPU's, so that both can be compared."""

    def __new__(cls, device="cpu"):
        device = torch.device(device)
        return super().__new__(cls, "cpu" if device.type == NAME else device)


_libraries = []


def start():
    """Make the device known to this process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    operators = torch.library.Library("aten", "IMPL")
    operators.impl("empty.memory_format", _empty, "PrivateUse1")
    operators.impl("empty_strided", _empty_strided, "PrivateUse1")
    operators.impl("_copy_from", copy_from, "PrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(lambda operator, *args, **kwargs: run(operator, args, kwargs), "PrivateUse1")
    _libraries.extend([operators, others])
    torch.Generator = _Generator
