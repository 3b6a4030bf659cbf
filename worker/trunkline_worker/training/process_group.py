"""The process group of a fine-tuning run's workers, on one address of each node alone.

What Ray Train sets up by itself has torch listen on every interface of the machine, without a password. Here the first
worker listens on its node's own address, which on an embedded cluster is loopback, and gloo and NCCL are told to stay
on the interface of that address. Like Ray's own ports, these are for the nodes of the cluster alone.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig

TIMEOUT_S = 1800
"""How long workers wait for each other, in seconds: the first one reads and measures while the others wait."""

_SIOCGIFADDR = 0x8915
_listening: dict[str, socket.socket] = {}


@dataclass
class OneAddressConfig(TorchConfig):
    """Like ``TorchConfig``, but for what is listened on. A single worker gets no group: it needs none."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Who sets it up."""
        return _OneAddressBackend


class _OneAddressBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        size = len(worker_group)
        if size == 1:
            return
        on_gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        backend = "nccl" if on_gpu else "gloo"
        host, port = worker_group.execute_single(0, _listen)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, host=host, port=port, world_rank=rank, world_size=size, backend=backend
                )
                for rank in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        if len(worker_group) > 1:
            # Those that wait for a lost worker cannot answer: Ray Train ends them in a moment.
            ray.wait(worker_group.execute_async(_leave), timeout=5.0, num_returns=len(worker_group))


def _listen() -> tuple[str, int]:
    """Listen where the other workers are to come, and return the address."""
    host = ray.util.get_node_ip_address()
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.bind((host, 0))
    sock.listen()
    _listening["store"] = sock
    return host, sock.getsockname()[1]


def _join(host: str, port: int, world_rank: int, world_size: int, backend: str) -> None:
    import torch.distributed as dist

    name = interface_of(ray.util.get_node_ip_address())
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name
    sock = _listening.pop("store", None) if world_rank == 0 else None
    timeout = timedelta(seconds=TIMEOUT_S)
    store = dist.TCPStore(  # type: ignore[attr-defined]  # torch has it in C++
        host,
        port,
        world_size,
        is_master=world_rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        # The store closes it.
        master_listen_fd=None if sock is None else sock.detach(),
    )
    dist.init_process_group(backend, store=store, rank=world_rank, world_size=world_size, timeout=timeout)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def interface_of(address: str) -> str:
    """Return the name of the network interface that has an IPv4 address; empty if none is found to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""
