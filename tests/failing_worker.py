"""A job of two processes for tests/test_alexnet.py, in which rank 1 fails while rank 0 waits for it."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.arguments import Parser
from training.distributed import barrier, rank
from training.launch import launch


def work(args, device, restarted):
    barrier()
    if rank() == 1:
        time.sleep(1)
        raise ValueError("boom in rank 1")
    barrier()
    return 0


if __name__ == "__main__":
    parser = Parser()
    parser.set_defaults(multiprocessing_distributed=True, nprocs_per_node=2, world_size=-1, rank=-1, dist_url=None)
    parser.set_defaults(dist_backend="gloo", dist_timeout=600, gpu=None)
    sys.exit(launch(parser.parse_args(), work))
