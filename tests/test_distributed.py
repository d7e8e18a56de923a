"""Several gloo ranks are one process with all the images; B is the same on all of them."""

import pytest
import torch
from distributed_worker import make_net, run, train
from torch import multiprocessing
from variants import VARIANTS

from training.checkpoint import load_checkpoint
from training.launch import free_port

WORLD, STEPS = 2, 9


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The state dict and train metrics of every mode and rank, by mode; two processes train them all.

    Then they train on a NaN that rank 1 alone has: both ranks end before the update. Last a signal comes to rank 1, at
    a test batch that rank 0 does not have: both ranks stop there, and the epoch is saved.
    """
    folder = tmp_path_factory.mktemp("ranks")
    args = (WORLD, free_port(), VARIANTS, STEPS, str(folder))
    multiprocessing.start_processes(run, args, nprocs=WORLD, start_method="spawn")
    diverged = [(folder / f"diverged-{rank}.txt").read_text() for rank in range(WORLD)]
    assert all("the loss is nan at epoch 1, step 4: stopped before the update" in text for text in diverged)
    stopped = [(folder / f"stopped-{rank}.txt").read_text() for rank in range(WORLD)]
    assert all(text.startswith(f"143 stopped at epoch 1, step {STEPS}; ") for text in stopped)
    kept = load_checkpoint(folder / "checkpoint.pt", "ConvNet")
    assert (kept["epoch"], [rank["tally"]["step"] for rank in kept["ranks"]]) == (0, [STEPS] * WORLD)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(WORLD)]
        for name in VARIANTS
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_equal_one_process(name, trained, tmp_path):
    rule, options = VARIANTS[name]
    alone = make_net(rule, options)
    start = {key: value.clone() for key, value in alone.state_dict().items()}
    loss, accuracy = train(alone, alone, 0, 1, STEPS, tmp_path)
    for rank in trained[name]:
        assert rank["metrics"] == pytest.approx((loss, accuracy), rel=1e-12)
    first, second = (rank["net"] for rank in trained[name])
    for key, value in alone.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value)
        fixed = ".1.running" in key or ".1.num" in key or (rule in ("FA", "DFA", "DRTP") and key.startswith("feedback"))
        assert torch.equal(start[key], value) == fixed, key
