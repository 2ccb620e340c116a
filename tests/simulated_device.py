"""An accelerator for tests on machines without one: `SIMULATED_DEVICE=1 pytest …` runs every `lit-llm` command on it.

Importing this module registers the device `simulated` with torch and Lightning, which then choose it as they would
choose a GPU. Its tensors hold CPU tensors, so results are those of a CPU. As on a GPU, an operation refuses a tensor of
the CPU beside one of the device, NumPy cannot read the device's tensors, and `set_sync_debug_mode("error")` refuses
whatever would wait for the device. Autocast has CUDA's lists of operations, which differ from the CPU's. The fused
cells of LSTM and GRU are missing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors import accelerator_connector
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from lit_llm import products
from lit_llm.cli import trainer

NAME = "simulated"
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.to.other}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}  # indices may be on the CPU
LOW = """linear matmul mm bmm addmm baddbmm einsum conv1d conv2d conv3d convolution scaled_dot_product_attention"""
FULL = """exp expm1 log log1p log2 reciprocal rsqrt softplus layer_norm native_layer_norm rms_norm group_norm nll_loss
    kl_div l1_loss mse_loss smooth_l1_loss huber_loss cosine_similarity binary_cross_entropy_with_logits logsumexp
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar"""
WIDE_RESULTS = """prod softmax.int log_softmax.int cumprod cumsum linalg_vector_norm sum sum.dim_IntList"""
"""Operations that autocast computes from low precision, from float32, and with a result in float32, on CUDA."""

WAITS = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
}


class SimulatedModule(_DummyBackendModule):
    """What `torch.cuda` is for a GPU."""

    def __init__(self) -> None:
        self.waiting = "default"

    def set_sync_debug_mode(self, mode: str) -> None:
        self.waiting = mode

    def wait(self, why: object) -> None:
        if self.waiting == "error":
            raise RuntimeError(f"called a synchronizing operation: {why}")

    def manual_seed(self, seed: int) -> None:
        """Does nothing: the CPU's generator draws."""

    def synchronize(self, device: Any = None) -> None:
        """Does nothing: the CPU has computed already."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class OnDevice(Tensor):
    """A tensor of the device, which holds one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        with torch.inference_mode(False):
            return Tensor._make_wrapper_subclass(cls, held.size(), **layout, device=DEVICE)

    def __init__(self, held: Tensor) -> None:
        self.held = held.detach()

    def tolist(self) -> Any:
        MODULE.wait("tolist")
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu()")

    __array__ = numpy

    def __format__(self, form: str) -> str:
        MODULE.wait("format")
        return format(self.held, form)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # so that files hold plain tensors

    def __repr__(self) -> str:
        return f"{self.held}, device={DEVICE}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operation of torch with tensors or for the device on the CPU; its results are on the device."""
    leaves = tree_leaves((args, kwargs))
    given = [t for t in leaves if isinstance(t, OnDevice)]
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    others = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, OnDevice) and t.dim()]
    if given and others and func not in COPIES | INDEXING:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {DEVICE} and cpu")
    stays = devices[0].type == NAME if devices else bool(given)
    if func in WAITS or (given and not stays):
        MODULE.wait(func)

    def held(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu") if leaf.type == NAME else leaf
        return leaf.held if isinstance(leaf, OnDevice) else leaf

    args_held, kwargs_held = tree_map(held, (args, kwargs))
    if func is aten.copy_.default and not isinstance(args[0], OnDevice):
        MODULE.wait(func)
        return args[0].copy_(*args_held[1:], **kwargs_held)
    with torch.inference_mode(False):
        out = func(*args_held, **{key: value for key, value in kwargs_held.items() if key != "pin_memory"})
    if any(t.shape != t.held.shape for t in given):
        raise NotImplementedError(f"{func} resizes a tensor; if it makes one, the loop below must have it")
    same = {id(t.held): t for t in given}  # what an operation in place returns

    def wrapped(leaf: Any) -> Any:
        if not stays or not isinstance(leaf, Tensor):
            return leaf
        return same[id(leaf)] if id(leaf) in same else OnDevice(leaf)

    return tree_map(wrapped, out)


def autocast(names: str, dtype: torch.dtype | None, widens: bool = False) -> None:
    """Makes autocast compute operations from a type (`None`: its own), or with a result in it."""
    for name in names.split():
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet), overload or "default")

        def computed(*args: Any, operation: Any = operation, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
                if not widens:
                    args, kwargs = tree_map(functools.partial(cast, dtype=dtype), (args, kwargs))
                elif args[0].dtype in (torch.bfloat16, torch.float16) and not any(
                    isinstance(value, torch.dtype) for value in (*args, *kwargs.values())
                ):
                    args = args[:-1] if args[-1] is None else args  # a type that is not given
                    kwargs["dtype"] = dtype
                return operation(*args, **kwargs)

        ATEN.impl(operation, computed, "AutocastPrivateUse1")


def cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    """Casts a floating-point tensor of the device, except float64."""
    is_cast = isinstance(leaf, OnDevice) and leaf.is_floating_point() and leaf.dtype != torch.float64
    return leaf.to(dtype or torch.get_autocast_dtype(NAME)) if is_cast else leaf


@torch.no_grad()
def apply(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    """As `nn.Module._apply`, where a moved parameter stays the same object, also if it is tied or trained already."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, p in module._parameters.items():
        if p is None or (new := change(p)) is p:
            continue
        grad = None if p.grad is None else change(p.grad)
        if not isinstance(new, OnDevice) and torch._has_compatible_shallow_copy_type(p, new):
            p.data, p.grad = new, grad
            continue
        new = nn.Parameter(new, p.requires_grad)
        new.grad = grad
        try:
            torch.utils.swap_tensors(p, new)
        except RuntimeError:  # part of a graph: at the end of a run, when nothing refers to it any more
            module._parameters[name] = new
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


class CPUGenerator(torch.Generator):
    """A generator of the CPU for any device."""

    def __new__(cls, device: Any = "cpu") -> CPUGenerator:
        return super().__new__(cls, "cpu")


class SimulatedAccelerator(Accelerator):
    """The device for Lightning."""

    def setup_device(self, device: torch.device) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


def choose_strategy(connector: Any) -> Any:
    """As Lightning's, which would put the network of an accelerator that it does not know on the CPU."""
    is_here = connector._accelerator_flag == NAME
    return SingleDeviceStrategy(DEVICE) if is_here else lightnings_choice(connector)


def mixed_precision(plugin: MixedPrecision) -> torch.autocast:
    """As Lightning's, which takes every device but the CPU for CUDA's."""
    dtype = torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.half
    return torch.autocast("cpu" if plugin.device == "cpu" else NAME, dtype, cache_enabled=False)


MODULE = SimulatedModule()
_setup_privateuseone_for_python_backend(NAME, backend_module=MODULE)
DEVICE = torch.device(NAME, 0)
FALLBACK = torch.library.Library("_", "IMPL")  # an implementation is registered as long as its library exists
FALLBACK.fallback(lambda op, *args, **kwargs: compute(op, args, kwargs), "PrivateUse1")
FALLBACK.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
ATEN = torch.library.Library("aten", "IMPL")
for factory in (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.eye.default,
    aten.eye.m,
    aten.linspace.default,
    aten.randperm.default,
    aten.randperm.generator,
):
    ATEN.impl(factory, lambda *args, f=factory, **kwargs: compute(f, args, kwargs | {"device": DEVICE}), "PrivateUse1")
ATEN.impl("_copy_from", lambda new, old, *_: compute(aten.copy_.default, (old, new), {}), "PrivateUse1")
autocast(LOW, None)
autocast(FULL, torch.float32)
autocast(WIDE_RESULTS, torch.float32, widens=True)
nn.Module._apply = apply
torch.Generator = CPUGenerator
torch.accelerator.synchronize = MODULE.synchronize
AcceleratorRegistry.register(NAME, SimulatedAccelerator, description="for tests")
lightnings_choice = accelerator_connector._AcceleratorConnector._choose_strategy
accelerator_connector._AcceleratorConnector._choose_strategy = choose_strategy
MixedPrecision.autocast_context_manager = mixed_precision
trainer.multiplies_bfloat16 = lambda kind: kind == NAME or products.multiplies_bfloat16(kind)
accelerator_connector._select_auto_accelerator = trainer._select_auto_accelerator = lambda: NAME
