"""A GPU for tests where there is none: tensors that say they are not on the CPU and refuse to meet those that are.

What runs on it gives the numbers of the CPU, and fails where code for a GPU would: at an operation on tensors of both
places, or at a result that is handed to numpy before it is brought back. It bears the name of torch's device without
data, the only one that torch lets be somewhere else on every build.
"""

import importlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
# A GPU's tensor may be indexed by numbers on the CPU.
INDEXED = ("aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_")


class Elsewhere(torch.Tensor):
    """A tensor on the pretended GPU; ``inner`` holds its numbers."""

    @staticmethod
    def __new__(cls, inner):
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})

    def tolist(self):
        return self.inner.tolist()


class _Dispatch(TorchDispatchMode):
    """For what is made there of nothing: zeros, random numbers, copies of tensors of the CPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


def _run(operation, args, kwargs):
    name = operation.name()
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    if there and name not in ("aten::_to_copy", "aten::copy_"):
        for tensor in tensors:
            index = name in INDEXED and isinstance(tensors[0], Elsewhere)
            # A single number of the CPU may take part anywhere.
            if not isinstance(tensor, Elsewhere) and tensor.ndim and not index:
                raise RuntimeError(f"{name} on tensors of two devices: {[(t.device, *t.shape) for t in tensors]}")
    asked = kwargs.get("device")
    if asked is not None:
        there, kwargs = torch.device(asked) == DEVICE, {**kwargs, "device": "cpu"}
    result = operation(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if isinstance(result, torch.Tensor) and name.endswith("_local_scalar_dense"):
        return result
    known = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, Elsewhere)}

    def placed(value):
        if not there or not isinstance(value, torch.Tensor):
            return value
        same = known.get(id(value))  # an operation in place returns what it was given
        return Elsewhere(value) if same is None else same

    return tree_map(placed, result)


def _inner(value):
    return value.inner if isinstance(value, Elsewhere) else value


def pretended_gpu(monkeypatch):
    """A context in which ``DEVICE`` can be used like a GPU."""
    for name in ("tensor", "as_tensor"):
        made = getattr(torch, name)  # they look for the device before the context is asked

        def there(*args, made=made, device=None, **kwargs):
            elsewhere = device is not None and torch.device(device) == DEVICE
            return made(*args, **kwargs, device="cpu").to(DEVICE) if elsewhere else made(*args, **kwargs, device=device)

        monkeypatch.setattr(torch, name, there)
    optimizer = importlib.import_module("torch.optim.optimizer")
    supported = [*optimizer._get_fused_kernels_supported_devices(), DEVICE.type]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: supported)
    return _Dispatch()
