"""Functions run in two processes that know each other, as torchrun would start them."""

from __future__ import annotations

import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

SIZE = 2
_PATIENCE = 180  # seconds
# A server that has imported everything, and nothing else, is forked for every process: an import takes 8 s.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.common.preloaded"])


def in_processes(function: Callable, *args: object, folder: Path, joined: bool = True) -> list:
    """What `function(rank, *args)` returns in each of two processes, by rank; a string that starts with "died" where
    one raised or ended itself. joined: torch.distributed is initialised between them."""
    store = str(folder / f"store-{len(list(folder.glob('store-*')))}") if joined else None
    pipes, workers = [], []
    for rank in range(SIZE):
        mine, its = _FORKS.Pipe(duplex=False)
        pipes.append(mine)
        workers.append(_FORKS.Process(target=_work, args=(its, rank, store, function, args), daemon=True))
    for worker in workers:
        worker.start()
    results = [_received(pipe, worker) for pipe, worker in zip(pipes, workers, strict=True)]
    for worker in workers:
        worker.join(_PATIENCE)
    return results


def _received(pipe: Connection, worker: multiprocessing.Process) -> object:
    waited = multiprocessing.connection.wait([pipe, worker.sentinel], _PATIENCE)
    if pipe.poll():
        return torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
    worker.kill()
    return f"died with exit code {worker.exitcode}" if waited else f"died: nothing for {_PATIENCE} s"


def _work(pipe: Connection, rank: int, store: str | None, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE)}
    try:
        if store:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
        _send(pipe, function(rank, *args))
        if store:
            dist.destroy_process_group()
    except BaseException:
        _send(pipe, f"died: {traceback.format_exc()}")
        raise


def _send(pipe: Connection, result: object) -> None:
    """As bytes: tensors in memory that processes share would end with this one."""
    file = io.BytesIO()
    torch.save(result, file)
    pipe.send_bytes(file.getvalue())
