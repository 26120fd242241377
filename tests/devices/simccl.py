"""A stand-in for NCCL between processes of the simulated device: it takes tensors of the device alone.

gloo carries them over the host. Importing this file makes Accelerate start it where it would start NCCL.
"""

import os
from collections import Counter

import simgpu  # noqa: F401  # registers the device
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState

calls = Counter()  # (what, dtype)


class SimCCL(dist.ProcessGroup):
    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self):
        return "simccl"

    def _run(self, what, tensors, call):
        """`call(tensors on the host)`, whose results are copied back."""
        for tensor in tensors:
            if tensor.device.type != "simgpu":
                raise RuntimeError(f"{what} got a tensor on {tensor.device}: NCCL knows the device's alone.")
            if not tensor.is_contiguous() and not tensor.is_contiguous(memory_format=torch.channels_last):
                raise ValueError(f"{what} got a tensor that is not contiguous.")
        calls.update([(what, str(tensors[0].dtype) if tensors else "")])
        on_host = [tensor.detach().cpu() for tensor in tensors]
        call(on_host).wait()
        for tensor, value in zip(tensors, on_host, strict=True):
            tensor.detach().copy_(value)
        done = torch.futures.Future()
        done.set_result(tensors)
        return torch._C._distributed_c10d._create_work_from_future(done)

    def allreduce(self, tensors, opts=None):
        return self._run(
            "allreduce", tensors, lambda host: self._gloo.allreduce(host, opts or dist.AllreduceOptions())
        )

    def broadcast(self, tensors, opts=None):
        return self._run(
            "broadcast", tensors, lambda host: self._gloo.broadcast(host, opts or dist.BroadcastOptions())
        )

    def allgather(self, outputs, inputs, opts=None):
        size = len(outputs[0])

        def call(host):
            return self._gloo.allgather([host[:size]], host[size:])

        return self._run("allgather", [*outputs[0], *inputs], call)

    def barrier(self, opts=None):
        return self._run("barrier", [], lambda host: self._gloo.barrier())


def _all_gather_into_tensor(output, given, **_):  # a process group in Python has none of its own
    return dist.all_gather([part.view_as(given) for part in output.chunk(dist.get_world_size())], given)


dist.Backend.register_backend("simccl", lambda *arguments: SimCCL(*arguments), devices=["simgpu"])
dist.all_gather_into_tensor = _all_gather_into_tensor
PartialState._prepare_backend = lambda self, *_: ("simccl", DistributedType.MULTI_GPU)
torch.simgpu.set_device(int(os.environ["LOCAL_RANK"]))
os.environ["ACCELERATE_TORCH_DEVICE"] = f"simgpu:{os.environ['LOCAL_RANK']}"
