"""Tensors that claim to be on a GPU, on a machine without one; the CPU computes their values.

Inside `PretendMode` every operation that mixes devices fails as it would on CUDA, and a `Watch`
counts the kernels that would be launched and the places where the host would wait for the device.
`install` changes torch for the rest of the process, so it belongs into a process of its own.
"""

import contextlib
import ctypes
import subprocess
import threading
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HERE = Path(__file__).resolve().parent
CUDA = torch.device("cuda", 0)

# They make no kernel: views, allocations and questions about a tensor.
NO_KERNEL = {
    "alias", "as_strided", "detach", "device", "empty", "empty_like", "empty_strided", "expand",
    "is_pinned", "is_same_size", "lift_fresh", "new_empty", "new_empty_strided", "permute",
    "_pin_memory", "record_stream", "reshape", "_reshape_alias", "resize_", "select", "set_",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold",
    "unsqueeze", "_unsafe_view", "view",
}  # fmt: skip
# The host needs to know their result.
WAIT = {
    "_local_scalar_dense", "bincount", "equal", "histc", "is_nonzero", "item", "masked_select",
    "nms", "nonzero", "repeat_interleave", "_unique2", "unique_consecutive", "unique_dim",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}


class Stream:
    """A stream of which nothing is asked."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


def compile_guard(folder: Path) -> Path:
    """Compile `cuda_guard.cpp` once for this version of torch."""
    library = folder / f"cuda_guard-{torch.__version__}.so"
    if not library.exists():
        torch_dir = Path(torch.__file__).parent
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(".part")
        subprocess.run(
            [
                *("g++", "-O1", "-std=c++20", "-shared", "-fPIC", f"-I{torch_dir}/include"),
                *(str(HERE / "cuda_guard.cpp"), "-o", str(unfinished)),
                *(f"-L{torch_dir}/lib", "-lc10", "-ltorch_cpu"),
            ],
            check=True,
        )
        unfinished.rename(library)
    return library


def install(folder: Path) -> None:
    """Let autograd run on pretended tensors, and torch.cuda answer as with one GPU."""
    ctypes.CDLL(str(compile_guard(folder))).install_guard()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.backends.cudnn.enabled = False
    answers = {
        "is_bf16_supported": True,
        "is_initialized": True,
        "_lazy_init": None,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "get_device_name": "pretended",
        "get_device_capability": (8, 0),
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "synchronize": None,
        "is_current_stream_capturing": False,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
    # Modes are of one thread: the loader's thread, which collects batches, makes real tensors.
    main = threading.main_thread()
    torch.cuda.is_available = lambda: threading.current_thread() is main
    torch.cuda.Stream = Stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.current_stream = lambda *args: Stream()
    Tensor.record_stream = lambda self, stream: None
    F.scaled_dot_product_attention = attend


class Watch:
    """Counts of kernels by operation, and of waits by what waits and where."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def wait(self, what: str) -> None:
        self.waits[f"{what} at {find_place()}"] += 1

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operation that had these arguments and this result."""
        name = func._schema.name.split("::")[-1]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not any(x.device.type == "cuda" for x in (*inputs, *outputs)):
            return
        if name in ("_to_copy", "copy_") and self._note_transfer(name, args, kwargs, outputs):
            return
        if name in WAIT and any(x.device.type == "cuda" for x in inputs):
            self.wait(name)
        if name in INDEXING:
            indices = [x for x in args[1] if isinstance(x, Tensor)]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self.wait(f"{name} with a mask")
            if any(x.device.type == "cpu" for x in indices):
                self.wait(f"{name} with indices of the CPU")
        if not func.is_view and name not in NO_KERNEL:
            self.kernels[name] += count_kernels(name, args)

    def _note_transfer(self, name: str, args: Any, kwargs: Any, outputs: list[Tensor]) -> bool:
        """Count a copy between the devices; return whether it is one."""
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], outputs[0])
        if source.device.type == target.device.type:
            return False
        asked = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if not asked or not getattr(source, "pinned", source.device.type == "cuda"):
            self.wait(f"{source.device.type}->{target.device.type} {tuple(source.shape)}")
        self.kernels["copy between devices"] += 1
        return True


def count_kernels(name: str, args: Any) -> int:
    """Return how many kernels an operation takes: one, but for lists of tensors.

    CUDA handles a list at once, up to some hundred tensors, unless the sizes of two lists differ.
    """
    if name in ("index_add", "_log_softmax_backward_data"):
        return 2 if name == "index_add" else 1  # index_add copies first
    if not name.startswith("_foreach"):
        return 1
    lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
    shapes = [[y.shape for y in x] for x in lists]
    if any(other != shapes[0] for other in shapes[1:]):
        return len(lists[0])
    return -(-len(lists[0]) // 100)


def find_place() -> str:
    """Return the innermost line of the product."""
    for frame in reversed(traceback.extract_stack()):
        if "/mugs/" in frame.filename and "site-packages" not in frame.filename:
            return f"{frame.filename.rpartition('/mugs/')[2]}:{frame.lineno}"
    return "elsewhere"


class PretendTensor(Tensor):
    """Claims to be on cuda:0; `values_on_cpu` are its values, on the CPU."""

    values_on_cpu: Tensor

    @staticmethod
    def __new__(cls, real: Tensor, requires_grad: bool = False):
        out = Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=CUDA,
            requires_grad=requires_grad,
        )
        out.values_on_cpu = real
        return out

    def __repr__(self) -> str:
        return f"pretended({self.values_on_cpu})"

    def tolist(self) -> Any:
        PretendMode.watch.wait("tolist")
        return self.values_on_cpu.tolist()

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        PretendMode.watch.wait("new_tensor")
        return PretendTensor(make_tensor(data, dtype=dtype or self.dtype))

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def unwrap(x: Any) -> Any:
    """Return the values of a pretended tensor, and anything else as it is."""
    return x.values_on_cpu if isinstance(x, PretendTensor) else x


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU; refuse a mix of devices that CUDA refuses."""
    name = func._schema.name.split("::")[-1]
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_cuda = any(isinstance(x, PretendTensor) for x in inputs)
    if name == "_pin_memory":
        return mark_pinned(args[0].clone())
    if name == "is_pinned":
        return getattr(args[0], "pinned", False)
    if on_cuda and name not in ("copy_", "_to_copy"):
        refuse_mixed_devices(func, name, args, inputs)

    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    real_kwargs = tree_map(unwrap, kwargs)
    if wanted == "cuda":
        real_kwargs["device"] = torch.device("cpu")
    pinned = bool(real_kwargs.pop("pin_memory", False))
    out = func(*tree_map(unwrap, args), **real_kwargs)
    if "out" in kwargs:
        return kwargs["out"]
    # In place; `__and__` and the like are not.
    if name.endswith("_") and not name.endswith("__") and isinstance(out, Tensor):
        return args[0]
    if name == "_to_copy":
        on_cuda = isinstance(args[0], PretendTensor)
    return wrap_results(out, inputs, on_cuda if wanted is None else wanted == "cuda", pinned)


def mark_pinned(tensor: Tensor) -> Tensor:
    """Let a tensor of the CPU claim to be in page-locked memory."""
    tensor.pinned = True
    return tensor


def wrap_results(out: Any, inputs: list[Tensor], on_cuda: bool, pinned: bool) -> Any:
    """Return results as pretended tensors if they are `on_cuda`; some may be arguments."""
    known = {id(unwrap(x)): x for x in inputs}

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, PretendTensor):
            return x
        if id(x) in known:
            return known[id(x)]
        if on_cuda:
            return PretendTensor(x)
        return mark_pinned(x) if pinned else x

    return tree_map(wrap, out)


def refuse_mixed_devices(func: Any, name: str, args: Any, inputs: list[Tensor]) -> None:
    """Raise RuntimeError as CUDA does. Tensors without dimensions may be of the CPU."""
    strict = name.startswith(("_foreach", "_fused"))
    wrong = [x for x in inputs if not isinstance(x, PretendTensor) and (strict or x.dim() > 0)]
    if name in INDEXING:
        wrong = [x for x in wrong if not any(x is index for index in args[1])]
    if wrong:
        shapes = [tuple(x.shape) for x in wrong]
        raise RuntimeError(f"{func}: cuda:0 and cpu, {shapes} at {find_place()}")


make_tensor = torch.tensor


def make_tensor_anywhere(data: Any, **options: Any) -> Tensor:
    """Take the place of torch.tensor, which on "cuda" is a copy that the host waits for."""
    device = options.pop("device", None)
    real = make_tensor(data, **options)
    if device is None or torch.device(device).type != "cuda":
        return real
    PretendMode.watch.wait("torch.tensor")
    return PretendTensor(real)


class PretendMode(TorchDispatchMode):
    """Computes on pretended tensors, and makes those that are asked for on cuda."""

    watch = Watch()

    def __enter__(self):
        PretendMode.watch = Watch()
        torch.tensor = make_tensor_anywhere
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.tensor = make_tensor
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = compute(func, args, dict(kwargs or {}))
        self.watch.note(func, args, kwargs or {}, out)
        return out


attend_plainly = F.scaled_dot_product_attention


class FusedAttention(torch.autograd.Function):
    """Attention as one kernel there and one back, as on a GPU."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        PretendMode.watch.kernels["attention"] += 1
        return PretendTensor(attend_plainly(*map(unwrap, (query, key, value))))

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, ...]:
        PretendMode.watch.kernels["attention backward"] += 1
        inputs = [x.values_on_cpu.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = attend_plainly(*inputs)
        return tuple(map(PretendTensor, torch.autograd.grad(out, inputs, outer.values_on_cpu)))


def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """Take the place of F.scaled_dot_product_attention."""
    if query.device.type != "cuda":
        return attend_plainly(query, key, value, *args, **options)
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    return FusedAttention.apply(query, key, value)
