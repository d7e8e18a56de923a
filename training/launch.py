"""Start one process or many: by hand, through torch.multiprocessing, or found started by torchrun."""

import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.distributed_c10d import _abort_process_group
from torch.distributed.elastic.multiprocessing.errors import record

from training.arguments import Parser, flag
from training.console import outlast_the_terminal
from training.run import stop_signals

Worker = Callable[[Namespace, torch.device, bool], int]  # the arguments, this process's device, and whether torchrun
# has started this job anew after a failure; returns the exit status
# DistributedDataParallel keeps gloo's threads alive. They still let go of the last collective's tensors, for which they
# take Python's lock, and abort the process if the interpreter has begun to end by then.
LAST_TENSORS_S = 0.5
LET_OTHERS_SPEAK_S = 2  # seconds that a process waits whose neighbour is gone: the launcher shows what came first


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def refuse_torchrun(parser: Parser) -> None:
    """End a script that trains in one process where torchrun has started several."""
    if under_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
        parser.error(f"{parser.prog} trains in one process: start alexnet/main.py with torchrun, or this without")


def processes_per_node(args: Namespace) -> int:
    """How many processes of this job run on this machine."""
    if under_torchrun():
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if args.multiprocessing_distributed:
        return args.nprocs_per_node or max(1, torch.cuda.device_count())
    return 1


def check(args: Namespace, parser: Parser) -> None:
    """Refuse launch flags that contradict each other or the machine, and those that would be ignored.

    With --dist-url env:// and without torchrun, rank and world size come from RANK and WORLD_SIZE, as in the original.
    """
    if args.dist_url == "env://" and not under_torchrun() and {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = [flag(key) for key in ("dist_url", "dist_backend", "gpu") if getattr(args, key) is not None]
    given += [flag(key) for key in ("world_size", "rank") if getattr(args, key) != -1]
    if args.dist_backend == "nccl" and gpus == 0:
        parser.error("--dist-backend nccl needs a GPU, and there is none: take --dist-backend gloo, or leave it out")
    if under_torchrun():
        if int(os.environ["WORLD_SIZE"]) > 1 and "LOCAL_WORLD_SIZE" not in os.environ:
            parser.error("LOCAL_WORLD_SIZE is not set, and WORLD_SIZE is: how many processes does this node have?")
        if args.multiprocessing_distributed:
            parser.error("torchrun has started the processes: leave --multiprocessing-distributed out")
        refused = [name for name in given if name != "--dist-backend"]
        if refused:
            parser.error(f"{', '.join(refused)}: torchrun has said it already, leave it out")
        return
    if args.multiprocessing_distributed:
        if args.gpu is not None:
            parser.error("--gpu does not go with --multiprocessing-distributed: every GPU has its process")
        if args.nprocs_per_node is not None and args.nprocs_per_node > gpus > 0 and args.dist_backend != "gloo":
            parser.error(f"--nprocs-per-node: got {args.nprocs_per_node}, expected at most the {gpus} GPUs")
    else:
        if args.nprocs_per_node is not None:
            parser.error("--nprocs-per-node needs --multiprocessing-distributed")
        if args.gpu is not None and args.gpu >= gpus:
            parser.error(f"--gpu: got {args.gpu}, but there are {gpus} GPUs")
        refused = [name for name in given if name != "--gpu"]
        if args.world_size <= 1 and refused:
            parser.error(f"{', '.join(refused)}: needs --multiprocessing-distributed, or --world-size above 1")
    if args.rank > 0 and args.world_size <= 1:
        parser.error(f"--rank: got {args.rank}, expected --world-size with it, the number of nodes")
    if args.world_size > 1:
        if args.dist_url is None:
            parser.error("--world-size above 1 needs --dist-url tcp://HOST:PORT, an address of the machine of rank 0")
        if not 0 <= args.rank < args.world_size:
            parser.error(
                f"--rank: got {args.rank}, expected 0 to {args.world_size - 1} with --world-size {args.world_size}"
            )


def launch(args: Namespace, worker: Worker) -> int:
    """Run `worker` in every process that the arguments ask for; return the job's exit status.

    One process that fails ends the others; its error is printed first.
    """
    if under_torchrun():
        local_rank, rank, world_size = (int(os.environ[key]) for key in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))
        return record(join_and_work)(args, worker, local_rank, rank, world_size, "env://") or 0
    if not args.multiprocessing_distributed:
        if args.world_size > 1:
            return join_and_work(args, worker, args.gpu or 0, args.rank, args.world_size, args.dist_url)
        return worker(args, device_of(args.gpu or 0), False)
    count, nodes = processes_per_node(args), max(1, args.world_size)
    url = args.dist_url or f"tcp://127.0.0.1:{free_port()}"
    first = max(0, args.rank) * count
    job = (args, worker, first, nodes * count, url)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # the first error comes first
    processes = multiprocessing.start_processes(spawned, job, nprocs=count, join=False, start_method="spawn")

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:  # Ctrl-C reaches the processes by itself
            for process in processes.processes:
                process.terminate()

    previous = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        while not processes.join():
            pass
    except multiprocessing.ProcessRaisedException as error:
        print(f"error: process {error.error_index} failed: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        print(error, file=sys.stderr)
        return 1
    except multiprocessing.ProcessExitedException as error:
        if error.signal_name is not None:
            print(f"error: process {error.error_index} was ended by {error.signal_name}", file=sys.stderr)
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def spawned(local_rank: int, args: Namespace, worker: Worker, first: int, world_size: int, url: str) -> None:
    """What each process of `start_processes` runs."""
    outlast_the_terminal()
    try:
        status = join_and_work(args, worker, local_rank, first + local_rank, world_size, url)
    except KeyboardInterrupt:  # which torch would take for success
        status = 128 + signal.SIGINT
        if local_rank == 0:
            print("interrupted", file=sys.stderr, flush=True)
    if status != 0:
        sys.exit(status)


def join_and_work(args: Namespace, worker: Worker, local_rank: int, rank: int, world_size: int, url: str) -> int:
    """Join the process group at `url` as `rank`, work, and leave it.

    Returns:
        The worker's exit status; 1 where joining fails within --dist-timeout, or another process is gone.
    """
    device = device_of(local_rank)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes_per_node(args)))
    backend = args.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
    timeout = timedelta(seconds=args.dist_timeout)

    def give_up(reason: str) -> None:
        print(f"error: rank {rank} of {world_size} could not join at {url}: {reason}", file=sys.stderr, flush=True)

    def give_up_and_end() -> None:
        give_up(f"no answer within {args.dist_timeout} s")
        os._exit(1)

    # a port whose owner accepts and says nothing holds torch for longer than its own timeout
    watchdog = threading.Timer(args.dist_timeout + 2, give_up_and_end)
    watchdog.daemon = True
    watchdog.start()
    try:
        store, rank, world_size = next(dist.rendezvous(url, rank, world_size, timeout=timeout))
        tries = 1
        if under_torchrun():
            tries = meet(store, rank, world_size, timeout)
            store = dist.PrefixStore(f"try{tries}", store)
        if backend == "nccl":
            refuse_shared_gpus(store, rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        give_up(str(error).splitlines()[0])
        return 1
    finally:
        watchdog.cancel()
    try:
        status = worker(args, device, tries > 1)
    except SystemExit as error:  # of a parser's error
        status = error.code if isinstance(error.code, int) else 1
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, (dist.DistNetworkError, dist.DistBackendError)):
            raise
        time.sleep(LET_OTHERS_SPEAK_S)
        why = str(error).splitlines()[0]
        print(f"error: rank {rank} of {world_size} has lost another one: {why}", file=sys.stderr, flush=True)
        return 1
    if status != 0 and backend == "nccl":
        _abort_process_group()  # the others may never come to a collective that is under way
    else:
        dist.destroy_process_group()
        time.sleep(LAST_TENSORS_S)
    return status


def refuse_shared_gpus(store: dist.Store, rank: int, world_size: int) -> None:
    """Raise ValueError, on every rank, where two processes have the same GPU: NCCL takes one process each."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    store.set(f"gpu{rank}", f"{socket.gethostname()} {uuid}")
    gpus = [store.get(f"gpu{other}").decode() for other in range(world_size)]
    for other, gpu in enumerate(gpus):
        if gpu in gpus[:other]:
            pair = f"ranks {gpus.index(gpu)} and {other}"
            raise ValueError(f"{pair} have the same GPU: start a process for each GPU, by hand with --gpu N")


def meet(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> int:
    """Wait until every rank is there; return how often torchrun has tried to start the job, this time included.

    torchrun's agents keep a store over all tries, with the addresses of processes that are gone, and each counts its
    own restarts alone. So rank 0 counts. Every other process leaves a new name in the store and waits for the number
    under it: no answer from an earlier try can be there. Rank 0 answers until all have said that they have read it.
    """
    while isinstance(store, dist.PrefixStore):  # torch 2.6 has each agent's own count in it
        store = store.underlying_store
    if rank > 0:
        name = uuid.uuid4().hex
        store.set(f"name{rank}", name)
        store.wait([f"tries{name}"], timeout)
        tries = int(store.get(f"tries{name}"))
        store.set(f"try{tries}rank{rank}", "here")
        return tries
    deadline = time.monotonic() + timeout.total_seconds()
    # with a store for each try, the agent's count is what there is
    tries = max(store.add("tries", 1), 1 + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    while not store.check([f"try{tries}rank{other}" for other in range(1, world_size)]):
        for other in range(1, world_size):
            if store.check([f"name{other}"]):
                store.set(f"tries{store.get(f'name{other}').decode()}", str(tries))
        if time.monotonic() > deadline:
            raise RuntimeError("not all processes came")
        time.sleep(0.05)
    return tries


def device_of(local_rank: int) -> torch.device:
    """This process's GPU, made current, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpu = local_rank % torch.cuda.device_count()  # more processes than GPUs: by gloo alone
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
