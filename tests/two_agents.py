"""Two torchrun agents on one machine with a worker each, one of which is killed after an epoch: the job comes back.

Run:    python tests/two_agents.py
Prints a line per try. Ends with status 1 unless each job ends with status 0 and, after a single restart, with the same
weights, bit for bit, as one that nobody disturbed.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.launch import free_port
from training.synthetic import synthetic_images

EPOCHS = 40
TRIES = (  # how the agents meet; the rank whose worker is killed; seconds by which the workers of each agent are late
    ("static", 0, (0, 0)),
    ("static", 1, (2, 0)),
    ("c10d", 0, (0, 2)),
    ("c10d", 1, (0, 0)),
    ("c10d", 1, (2, 0)),
)


def start_agents(folder: Path, rendezvous: str, late_s: tuple[int, int]) -> list[subprocess.Popen]:
    """Start both; each writes to `folder`/agentN.log."""
    port, agents = free_port(), []
    for node in range(2):
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        line += ["--max-restarts", "3", "--local-addr", "127.0.0.1"]
        if rendezvous == "static":
            line += ["--master-addr", "127.0.0.1", "--master-port", str(port), "--node-rank", str(node)]
        else:
            line += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"]
            line += ["--rdzv-conf", f"is_host={1 - node}"]
        line += [str(Path(__file__).with_name("small_alexnet.py")), str(folder), "--image-size", "64", "-b", "8"]
        line += ["--epochs", str(EPOCHS), "--out", str(folder / "run")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LATE_S": str(late_s[node])}
        with open(folder / f"agent{node}.log", "w") as log:
            agents.append(subprocess.Popen(line, env=environment, stdout=log, stderr=log))
    return agents


def output(folder: Path) -> str:
    """What both agents have written so far."""
    return "".join((folder / f"agent{node}.log").read_text() for node in range(2))


def kill_worker(agents: list[subprocess.Popen], rank: int) -> None:
    """Kill the worker of that rank."""
    workers = [Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split() for agent in agents]
    wanted = f"\0RANK={rank}\0".encode()
    (pid,) = (pid for pids in workers for pid in pids if wanted in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(pid), signal.SIGKILL)


def outcome(folder: Path, rendezvous: str, killed: int | None, late_s: tuple[int, int]) -> str:
    """Run a job and kill the worker of rank `killed`, if any; return what is wrong with its end, "" if nothing is."""
    folder.mkdir()
    arrays = {key: value.numpy() for key, value in synthetic_images(100, 48, 20).items()}
    np.savez(folder / "cifar100.npz", **arrays)
    agents = start_agents(folder, rendezvous, late_s)
    try:
        if killed is not None:
            deadline = time.monotonic() + 60
            while "epoch 1/" not in output(folder):
                if time.monotonic() > deadline:
                    return "no epoch within 60 s"
                time.sleep(0.02)
            kill_worker(agents, killed)
        statuses = [agent.wait(timeout=60) for agent in agents]
    except subprocess.TimeoutExpired:
        return "not over within 60 s"
    finally:
        for agent in agents:
            agent.terminate()
        for agent in agents:
            agent.wait(timeout=60)
    starts = len(re.findall("from epoch", output(folder)))
    if statuses != [0, 0]:
        return f"statuses {statuses}"
    return "" if starts == (1 if killed is None else 2) else f"{starts} starts"


def net_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "run" / "checkpoint.pth.tar", weights_only=True)["net"]


def main() -> int:
    """Run all tries and return the exit status."""
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        straight = Path(scratch) / "straight"
        problem = outcome(straight, "static", None, (0, 0))
        if problem:
            print(f"undisturbed: {problem}\n{output(straight)}")
            return 1
        for number, (rendezvous, killed, late_s) in enumerate(TRIES, start=1):
            folder, began = Path(scratch) / str(number), time.monotonic()
            problem = outcome(folder, rendezvous, killed, late_s)
            if not problem:
                same = all(torch.equal(value, net_of(folder)[name]) for name, value in net_of(straight).items())
                problem = "" if same else "other weights"
            failed += bool(problem)
            what = f"try {number}: {rendezvous}, rank {killed} killed, workers late by {late_s} s"
            print(f"{what}: {problem or 'came back'} ({time.monotonic() - began:.0f} s)", flush=True)
            if problem:
                print(output(folder))
    print(f"two agents: {len(TRIES) - failed} of {len(TRIES)} came back")
    return min(1, failed)


if __name__ == "__main__":
    sys.exit(main())
