"""A pretended GPU: tensors that report `cuda:0` and hold real numbers in main memory, under CUDA's rules.

    with Pretend(total=80e9) as gpu:
        model = model.to("cuda")
        ...
    gpu.syncs, gpu.kernels, gpu.uploads, gpu.attention

It refuses what CUDA refuses: operands on two devices, mixed dtypes of a matrix product, addmm's out_dtype rules,
operations without a deterministic kernel under use_deterministic_algorithms, pinned copies that are read before they
were waited for. It counts kernels (operations that give or change a tensor there), times that the host waits for the
device (`syncs`, with file and line in `where`), uploads, and the kernel and shapes that scaled_dot_product_attention
takes on an H100 (`attention`). It cannot show faults of the kernels themselves, streams, NCCL, graphs, or speed.

transformers must have loaded one model before the block is entered: what it imports then must not meet the patches.
"""

from __future__ import annotations

import collections
import concurrent.futures.thread as pools
import contextlib
import functools
import threading
import traceback
import weakref
from unittest import mock

import torch
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers import PreTrainedModel

from grpo_gsm8k.engines import static_cache
from grpo_gsm8k.trainer import head_triton, packing

CUDA = torch.device("cuda:0")
aten = torch.ops.aten
MATH, CUDNN = "math: T x T scores", "cudnn: a plan for each shape"

VIEWS_OR_FREE = {  # no kernel
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "as_strided",
    "unbind",
    "split",
    "split_with_sizes",
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "_reshape_alias",
    "unfold",
    "diagonal",
    "set_",
    "resize_",
}
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_consecutive", "_unique2"}
MIX = {"copy_", "_to_copy"}  # may read from one device and write to another
NOT_DETERMINISTIC = {
    "put_",
    "histc",
    "median",
    "kthvalue",
    "ctc_loss",
    "grid_sampler_2d_backward",
    "nll_loss2d_forward",
}


class OnGpu(torch.Tensor):
    """A tensor whose device says cuda:0."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
            requires_grad=requires_grad,  # what C++ sees: not the CPU, and no driver is asked
        )

    def __init__(self, inner, requires_grad=False):
        assert type(inner) is torch.Tensor or type(inner) is torch.nn.Parameter, type(inner)
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert Pretend.here is not None, "a pretended tensor outside of its block"
        return Pretend.here.run(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        new = Pretend.here.wrap(self.inner.detach().clone())
        new.requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            new._is_param = True
        memo[id(self)] = new
        return new

    def __repr__(self):
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def to(self, *args, **kwargs):
        device, rest, named = _device_of(args, kwargs)
        if device is None or device.type == "cuda":
            named.pop("non_blocking", None)
            return super().to(*rest, **named) if rest or named else self
        return Pretend.here.download(self, bool(kwargs.get("non_blocking"))).to(*rest, **named)

    def cpu(self, **kwargs):
        return Pretend.here.download(self, False)

    def cuda(self, *args, **kwargs):
        return self

    def __getitem__(self, index):
        return super().__getitem__(_index(index))

    def __setitem__(self, index, value):
        super().__setitem__(_index(index), value)

    def tolist(self):
        Pretend.here.wait("tolist")
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def data_ptr(self):
        return self.inner.data_ptr()

    def pin_memory(self, *args):
        raise RuntimeError("cannot pin a tensor of a GPU")

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        assert isinstance(value, OnGpu), "a tensor on the CPU set as the data of one on cuda"
        torch._C.TensorBase.data.__set__(self, value)
        self.inner = value.inner


class Pretend(TorchDispatchMode):
    here = None

    def __init__(self, total=80e9, name="NVIDIA H100 80GB HBM3"):
        super().__init__()
        self.total, self.name = int(total), name
        self.syncs, self.kernels = collections.Counter(), collections.Counter()
        self.where = collections.Counter()
        self.waits_of = collections.Counter()  # by thread: one that samples captures graphs while another learns
        self.uploads = collections.Counter()
        self.attention = collections.Counter()
        self.graphs = 0  # captured, as far as one can without a GPU: replayed by running the function again
        self.live = self.top = self.reserved = 0  # bytes: in tensors, the most of that, and what the allocator keeps
        self.paused = False
        self._known = set()
        self._pinned = {}  # storage → event number of the copy into it that was not waited for

    # ------------------------------------------------------------------ in and out

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        for patch in self.patches():
            self._stack.enter_context(patch)
        self._stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        Pretend.here = self
        return super().__enter__()

    def __exit__(self, *fault):
        super().__exit__(*fault)
        self._stack.close()
        Pretend.here = None

    def patches(self):
        cuda = torch.cuda
        state = torch.zeros(16, dtype=torch.uint8)
        yield mock.patch.object(cuda, "_lazy_init", lambda: None)
        yield mock.patch.object(cuda, "is_available", lambda: True)
        yield mock.patch.object(cuda, "device_count", lambda: 1)
        yield mock.patch.object(cuda, "current_device", lambda: 0)
        yield mock.patch.object(cuda, "get_device_name", lambda *a: self.name)
        yield mock.patch.object(cuda, "is_current_stream_capturing", lambda: False)
        yield mock.patch.object(cuda, "synchronize", lambda *a: self.wait("synchronize"))
        yield mock.patch.object(cuda, "empty_cache", lambda: setattr(self, "reserved", self.live))
        yield mock.patch.object(cuda, "get_rng_state", lambda *a: state.clone())
        yield mock.patch.object(cuda, "set_rng_state", lambda s, *a: None)
        yield mock.patch.object(cuda, "mem_get_info", lambda *a: (self.total - self.reserved, self.total))
        yield mock.patch.object(cuda, "memory_reserved", lambda *a: self.reserved)
        yield mock.patch.object(cuda, "memory_allocated", lambda *a: self.live)
        yield mock.patch.object(cuda, "max_memory_allocated", lambda *a: self.top)
        yield mock.patch.object(cuda, "reset_peak_memory_stats", lambda *a: setattr(self, "top", self.live))
        yield mock.patch.object(torch.accelerator, "current_stream", lambda *a: mock.Mock(is_capturing=lambda: False))
        yield mock.patch.object(torch.accelerator, "current_device_index", lambda: 0)
        yield mock.patch.object(pools._WorkItem, "run", _in_thread(pools._WorkItem.run))
        yield mock.patch.object(
            PreTrainedModel, "from_pretrained", classmethod(_loaded(PreTrainedModel.from_pretrained.__func__))
        )
        yield mock.patch.object(PreTrainedModel, "save_pretrained", _saved(PreTrainedModel.save_pretrained))
        yield mock.patch.object(torch, "tensor", _tensor)
        yield mock.patch.object(head_triton, "serves", lambda hidden: False)
        yield mock.patch.object(packing, "varlen", self.varlen)
        yield mock.patch.object(static_cache, "capture", self.capture)
        yield mock.patch.object(torch.profiler, "supported_activities", lambda: {torch.profiler.ProfilerActivity.CPU})
        yield mock.patch.object(DeviceContext, "__torch_function__", _no_default_device)
        yield mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", self.sdpa)
        yield mock.patch.object(torch.Tensor, "to", _tensor_to, create=True)
        yield mock.patch.object(torch.Tensor, "cuda", lambda self, *a, **k: self.to("cuda"), create=True)
        yield mock.patch.object(torch.nn.Module, "to", functools.partialmethod(_module_to, torch.nn.Module.to))

    def capture(self, step, decoder):
        """What a graph would replay: a function that must not wait for the device."""
        self.graphs += 1

        def replay():
            before = self.waits_of[threading.get_ident()]
            step()
            assert self.waits_of[threading.get_ident()] == before, ("a captured step waits", self.where.most_common())

        return replay

    def onto(self, model):
        """The model's parameters and buffers there; tied ones stay tied."""
        known = {}

        def move(tensor):
            if tensor is None or isinstance(tensor, OnGpu):
                return tensor
            if id(tensor) not in known:
                new = self.wrap(tensor.detach().clone())
                if isinstance(tensor, torch.nn.Parameter):
                    new.requires_grad_(tensor.requires_grad)
                    new._is_param = True
                known[id(tensor)] = (new, tensor)
            return known[id(tensor)][0]

        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    store[name] = move(tensor)
        return model

    def download(self, tensor, non_blocking):
        assert not (tensor.requires_grad and torch.is_grad_enabled()), "no gradient through a copy to the CPU"
        self.wait("copy to cpu")  # what is not pinned is waited for, whatever was asked
        return tensor.detach().inner.clone()

    def upload(self, tensor, non_blocking):
        pinned = tensor.untyped_storage()._cdata in self._pinned
        self.uploads[f"{'pinned' if pinned else 'pageable'}, {'non_blocking' if non_blocking else 'blocking'}"] += 1
        assert not (tensor.requires_grad and torch.is_grad_enabled()), "no gradient through a copy"
        return self.wrap(tensor.detach().clone())

    def wrap(self, inner):
        self.meet(inner)
        return OnGpu(inner)

    @contextlib.contextmanager
    def offstage(self, model):
        """The model's own tensors for a while: what writes files looks at addresses."""
        known, changed = {}, []
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if isinstance(tensor, OnGpu):
                        plain = known.setdefault(id(tensor), torch.nn.Parameter(tensor.inner, False))
                        changed.append((store, name, tensor))
                        store[name] = plain
        try:
            yield
        finally:
            for store, name, tensor in changed:
                store[name] = tensor

    def meet(self, inner):
        storage = inner.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.top, self.reserved = max(self.top, self.live), max(self.reserved, self.live)

        def gone():
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)

    # ------------------------------------------------------------------ one operation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        name = func._schema.name.partition("::")[2]
        flat, spec = tree_flatten((args, kwargs))
        there = [t for t in flat if isinstance(t, OnGpu)]
        if self.paused and not there:
            return func(*args, **kwargs)
        here = [t for t in flat if torch.is_tensor(t) and not isinstance(t, OnGpu)]
        asked = kwargs.get("device")
        asked = torch.device(asked) if asked is not None else None
        to_gpu = (asked is not None and asked.type in ("cuda", "meta")) or (asked is None and bool(there))
        if not there and not to_gpu:
            self._unread(here, name)
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
                out = func(*args, **kwargs)
                key = out.untyped_storage()._cdata
                self._pinned[key] = False
                weakref.finalize(out.untyped_storage(), self._pinned.pop, key, None)
                return out
            return func(*args, **kwargs)
        self.check(func, name, args, kwargs, there, here)
        back = {}

        def open_(x):
            if isinstance(x, OnGpu):
                back[id(x.inner)] = x
                return x.inner
            return x

        inner = [open_(x) for x in flat]
        a, k = tree_unflatten(inner, spec)
        k = dict(k)
        if k.get("device") is not None:
            k["device"] = torch.device("cpu")
        k.pop("pin_memory", None)
        out = self.compute(func, name, a, k)
        self.count(func, name, args, kwargs, there, here, to_gpu)

        def close(x):
            if not torch.is_tensor(x):
                return x
            if id(x) in back:
                return back[id(x)]
            return self.wrap(x) if to_gpu else x

        if name == "copy_" and not isinstance(args[0], OnGpu):  # from there into main memory
            return args[0]
        return tree_map(close, out)

    def compute(self, func, name, a, k):
        if func is aten.addmm.dtype_out or func is aten.addmm.dtype:
            self_, mat1, mat2, out_dtype = a[:4] if len(a) > 3 else (*a, k["out_dtype"])
            assert mat1.dtype == mat2.dtype, f"mat1 and mat2 must have the same dtype, {mat1.dtype} and {mat2.dtype}"
            assert out_dtype == mat1.dtype or (
                out_dtype == torch.float32 and mat1.dtype in (torch.bfloat16, torch.float16)
            )
            assert self_.dtype in (out_dtype, mat1.dtype), "self dtype must match either out_dtype or mat1 dtype"
            beta, alpha = k.get("beta", 1), k.get("alpha", 1)
            product = mat1.to(out_dtype) @ mat2.to(out_dtype) * alpha
            result = product if beta == 0 else product + beta * self_.to(out_dtype)
            if "out" in k:
                assert k["out"].dtype == out_dtype
                return k["out"].copy_(result)
            return result
        return func(*a, **k)

    def check(self, func, name, args, kwargs, there, here):
        big = [t for t in here if t.ndim]
        if there and big and name not in MIX:
            indices_only = name in ("index", "index_put", "index_put_", "_index_put_impl_") and isinstance(
                args[0], OnGpu
            )
            assert indices_only, f"{func}: expected all tensors on one device, but {len(big)} of them on cpu: " + str(
                [tuple(t.shape) for t in big]
            )
            self.uploads[name] += 1
        if there and name in ("index", "index_put", "index_put_") and not isinstance(args[0], OnGpu):
            raise RuntimeError(f"{func}: indices on cuda of a tensor on cpu")
        if torch.are_deterministic_algorithms_enabled():
            floating = any(t.is_floating_point() for t in there)
            if name in NOT_DETERMINISTIC or (name in ("cumsum", "cumsum_", "cumprod") and floating):
                raise RuntimeError(
                    f"{name}_cuda_kernel does not have a deterministic implementation, but you set "
                    "'torch.use_deterministic_algorithms(True)'"
                )

    def count(self, func, name, args, kwargs, there, here, to_gpu):
        if name == "_to_copy" or name == "copy_":
            source = args[0] if name == "_to_copy" else args[1]
            target_gpu = to_gpu if name == "_to_copy" else isinstance(args[0], OnGpu)
            blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if isinstance(source, OnGpu) and not target_gpu:
                pinned = name == "copy_" and args[0].untyped_storage()._cdata in self._pinned
                if blocking or not pinned:
                    self.wait("copy to cpu")
                else:
                    self._pinned[args[0].untyped_storage()._cdata] = True  # not complete until waited for
                return
            if not isinstance(source, OnGpu) and torch.is_tensor(source):
                key = "pinned" if source.untyped_storage()._cdata in self._pinned else "pageable"
                self.uploads[f"{key}, {'blocking' if blocking else 'non_blocking'}"] += 1
                return
        if name in SYNCS:
            self.wait(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        ):
            self.wait(f"{name} by a mask")
        if name not in VIEWS_OR_FREE:
            self.kernels[name] += 1

    def wait(self, why):
        self.syncs[why] += 1
        self.waits_of[threading.get_ident()] += 1
        for key in self._pinned:
            self._pinned[key] = False
        for frame in reversed(traceback.extract_stack(limit=40)):
            if "/grpo_gsm8k/" in frame.filename:
                self.where[f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {why}"] += 1
                return
        self.where[f"outside: {why}"] += 1

    def _unread(self, tensors, name):
        for t in tensors:
            assert not self._pinned.get(t.untyped_storage()._cdata), f"{name} reads a pinned copy that is not complete"

    # ------------------------------------------------------------------ attention

    def varlen(self, query, key, value, starts, longest, scaling):
        assert query.dtype == torch.bfloat16 and starts[0].dtype == starts[1].dtype == torch.int32
        self.attention["varlen", (len(query), len(key))] += 1
        return varlen_by_hand(query, key, value, starts, longest, scaling)

    def sdpa(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        gpu = isinstance(query, OnGpu)
        if gpu:
            self.attention[_kernel(query, key, attn_mask, is_causal, enable_gqa)] += 1
        assert dropout_p == 0.0, "attention dropout is on"
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = (query.float() @ key.float().transpose(-1, -2)) * (scale or query.shape[-1] ** -0.5)
        if is_causal:
            columns = torch.arange(key.shape[2], device=query.device)
            scores = scores.masked_fill(columns > torch.arange(query.shape[2], device=query.device).unsqueeze(1), -1e30)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -1e30) if attn_mask.dtype == torch.bool else scores + attn_mask
        return (scores.softmax(-1) @ value.float()).to(query.dtype)


def varlen_by_hand(query, key, value, starts, longest, scaling):
    """torch's `varlen_attn` with grouped heads, row by row."""
    starts, outs = [x.inner if isinstance(x, OnGpu) else x for x in starts], []
    for q0, q1, k0, k1 in zip(starts[0][:-1], starts[0][1:], starts[1][:-1], starts[1][1:], strict=True):
        groups = query.shape[1] // key.shape[1]
        q, k, v = query[q0:q1], *(x[k0:k1].repeat_interleave(groups, 1) for x in (key, value))
        assert len(q) <= longest[0] and len(k) <= longest[1]
        scores = torch.einsum("qhd,khd->hqk", q, k).float() * (scaling or q.shape[-1] ** -0.5)
        seen = torch.ones(len(q), len(k)).tril(len(k) - len(q)).bool()
        probs = scores.masked_fill(~seen.to(scores.device), float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", probs.to(v.dtype), v))
    return torch.cat(outs)


def _kernel(query, key, mask, causal, gqa):
    """Which kernel torch 2.13 takes on sm90 (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp), and its shape."""
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    flash = mask is None and query.shape[-1] <= 256 and not (causal and query.shape[2] != key.shape[2])
    if query.dtype == torch.float32:
        return (MATH if gqa else "efficient", shape)
    if torch.backends.cuda.cudnn_sdp_enabled() and not torch.are_deterministic_algorithms_enabled():
        return (CUDNN, shape)
    return ("flash" if flash else MATH if gqa else "efficient", shape)


_DEFAULT_DEVICE = DeviceContext.__torch_function__


def _no_default_device(context, func, types, args=(), kwargs=None):
    """`with torch.device("cuda")`: C++ would make the tensor; whoever means to have it there moves it."""
    if context.device.type != "cuda":
        return _DEFAULT_DEVICE(context, func, types, args, kwargs)
    return func(*args, **(kwargs or {}))


def _module_to(module, original, *args, **kwargs):
    wanted = kwargs.get("device") or next((a for a in args if isinstance(a, (str, torch.device))), None)
    if wanted is not None and torch.device(wanted).type == "cuda":
        dtype = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), None)
        return Pretend.here.onto(original(module, dtype) if dtype else module)
    return original(module, *args, **kwargs)


_TO = torch._C.TensorBase.to


def _device_of(args, kwargs):
    """The device that `Tensor.to` was asked for, and what else."""
    kwargs, rest, device = dict(kwargs), list(args), None
    if "device" in kwargs:
        device = kwargs.pop("device")
    elif rest and isinstance(rest[0], (str, torch.device)):
        device = rest.pop(0)
    elif rest and torch.is_tensor(rest[0]):
        other = rest.pop(0)
        device, rest = other.device, [other.dtype, *rest]
    return (torch.device(device) if device is not None else None), rest, kwargs


def _tensor_to(self, *args, **kwargs):
    device, rest, named = _device_of(args, kwargs)
    if isinstance(self, OnGpu) or device is None or device.type != "cuda":
        return _TO(self, *args, **kwargs)
    there = Pretend.here.upload(self, bool(named.pop("non_blocking", False)))
    named.pop("copy", None)
    return there.to(*rest, **named) if rest or named else there


_TENSOR = torch.tensor


def _tensor(data, *args, device=None, **kwargs):
    made = _TENSOR(data, *args, **kwargs)
    return made.to(device) if device is not None else made


def _index(index):
    """Lists among the indices as tensors there: C++ would make them where it believes the tensor to be."""
    if isinstance(index, list):
        return torch.tensor(index).to(CUDA)
    return tuple(_index(i) if isinstance(i, list) else i for i in index) if isinstance(index, tuple) else index


class _Thread(TorchDispatchMode):
    """A mode is a thread's own; this one hands on to the pretended GPU of the process."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return Pretend.here.run(func, args, kwargs or {})


def _in_thread(run):
    def run_there(self, *args):
        if Pretend.here is None:
            return run(self, *args)
        with _Thread():
            return run(self, *args)

    return run_there


def _loaded(from_pretrained):
    def load(cls, *args, **kwargs):
        gpu = Pretend.here
        before, gpu.paused = gpu.paused, True
        try:
            return from_pretrained(cls, *args, **kwargs)
        finally:
            gpu.paused = before

    return load


def _saved(save_pretrained):
    def save(self, *args, **kwargs):
        given = kwargs.get("state_dict")
        if given is not None and not any(isinstance(t, OnGpu) for t in given.values()):
            return save_pretrained(self, *args, **kwargs)  # a copy, which a thread writes while the model is trained
        with Pretend.here.offstage(self):
            return save_pretrained(self, *args, **kwargs)

    return save
