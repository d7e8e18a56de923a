"""Stages in several processes are one process that accumulates the same micro-batches."""

import pytest
import torch
import torch.distributed as dist
from pipeline_worker import (
    BATCH,
    CASES,
    CUTS,
    DIRECT,
    EXAMPLE,
    POINTS,
    SPLIT_BY_TORCH,
    Net,
    batch,
    run,
    run_nets,
    run_replicas,
    stage_of,
    train_alone,
    train_stage,
    whole,
)
from torch import multiprocessing, nn

from feedback import RULES
from feedback.pipeline import Pipeline, parts_of
from training.launch import free_port

WORLD = max(CUTS)


def spawn(work, world, folder, *args):
    """Let `world` processes work; return what each has written, by rank."""
    multiprocessing.start_processes(work, (world, free_port(), str(folder), *args), nprocs=world, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By (variant, stages, micro-batches, options): the state of all stages, logits in eval mode and losses."""
    results = spawn(run, WORLD, tmp_path_factory.mktemp("stages"), CASES)
    return {key: value for result in results for key, value in result.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIRECT)
def test_stages_are_one_process_that_accumulates_micro_batches(trained, name):
    """In 1, 2 and 3 stages, 1, 2 and 4 micro-batches, both memory formats, float64, bfloat16."""
    cases = {key: value for key, value in trained.items() if key[0] == name}
    assert len(cases) == 3 * len(CUTS) + 2
    assert_equal_one_process(cases)


@pytest.mark.slow
def test_stages_that_torchs_splitter_has_cut_are_one_process(tmp_path):
    results = spawn(run, WORLD, tmp_path, SPLIT_BY_TORCH)
    assert len(results[-1]) == len(DIRECT)
    assert_equal_one_process(results[-1])


def assert_equal_one_process(cases):
    for (name, stages, micro_batches, *options), result in cases.items():
        memory_format = torch.channels_last if "memory_format" in options else torch.contiguous_format
        autocast = torch.bfloat16 if "autocast" in options else None
        net = whole(name, memory_format=memory_format, autocast=autocast)
        close = {"rtol": 1e-12, "atol": 1e-14} if autocast is None else {"rtol": 1e-5, "atol": 1e-6}
        if autocast is not None and RULES[net.rule].needs_target:  # the loss's factor is read off e in bfloat16
            close = {"rtol": 2**-7, "atol": 2**-10}
        start = {key: value.clone() for key, value in net.state_dict().items()}
        losses = train_alone(net, micro_batches, autocast=autocast)
        what = (name, stages, micro_batches, *options)
        assert result["state"].keys() == start.keys(), what
        for key, value in net.state_dict().items():
            torch.testing.assert_close(result["state"][key], value, **close, msg=f"{what} {key}")
            assert torch.equal(value, start[key]) == (key.startswith("feedback") and net.rule in ("DFA", "DRTP")), key
        torch.testing.assert_close(torch.stack(result["losses"]).double(), torch.stack(losses), **close)
        if result["logits"] is not None:
            net.load_state_dict(result["state"])
            x, _ = batch(99, dtype=next(net.parameters()).dtype)
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                assert torch.equal(result["logits"], net.eval()(x)) and len(x) == BATCH


@pytest.mark.slow
def test_convnet_and_vgg_in_two_stages_have_the_gradients_of_one_process(tmp_path):
    assert spawn(run_nets, 2, tmp_path) == [{"ConvNet": True, "VGG": True}] * 2


@pytest.mark.slow
def test_replicas_of_stages_are_one_process_with_all_the_images(tmp_path):
    """By LAS and DRTP, too: what is made of the labels is a mean over a replica's images, and all have as many."""
    results = spawn(run_replicas, 4, tmp_path)
    for name in DIRECT:
        net = whole(name, norm=False)
        train_alone(net, 1, images=8)
        for rank, states in enumerate(results):
            for key, value in net.state_dict().items():
                torch.testing.assert_close(states[name][key], value, rtol=1e-12, atol=1e-14, msg=f"{name} {rank} {key}")


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("name", DIRECT)
def test_a_single_stage_accumulates_micro_batches(alone, name, micro_batches):
    net, stage = whole(name), stage_of(whole(name), name, 1, None)
    expected = train_alone(net, micro_batches)
    losses = train_stage(stage, micro_batches)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
    for key, value in net.state_dict().items():
        torch.testing.assert_close(stage.net.state_dict()[key], value, rtol=1e-12, atol=1e-14, msg=key)


@pytest.mark.parametrize("name", ["DKP-inplace", "LAS-inplace"])
def test_an_error_that_is_not_finite_steps_no_b_in_place(alone, name):
    stage = stage_of(whole(name), name, 1, None)
    x, y = batch(0, 8)
    before = [B.clone() for B in stage.net.matrices()]
    x[len(x) // 2 :] = torch.nan  # in the second of two micro-batches, and in none of the next step
    stage.step(x, y, micro_batches=2)
    once = [B.clone() for B in stage.net.matrices()]
    assert all(B.isfinite().all() and not torch.equal(B, old) for B, old in zip(once, before, strict=True))
    stage.step(x.flip(0), y, micro_batches=2)  # now in the first: the second steps nothing, either
    assert all(torch.equal(B, old) for B, old in zip(stage.net.matrices(), once, strict=True))


@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule].chained])
def test_chained_rules_are_sent_to_torchs_pipelines(alone, rule):
    with pytest.raises(ValueError, match=r"for \w+ take torch\.distributed\.pipelining"):
        Pipeline([Net().double()], POINTS, rule, EXAMPLE)


def test_what_cannot_be_a_stage_is_refused(alone, monkeypatch):
    net = Net().double()
    with pytest.raises(ValueError, match="got 2 parts of the net for 1 processes"):
        Pipeline(parts_of(net, ["two"]), POINTS, "DFA", EXAMPLE)
    with pytest.raises(ValueError, match="'four' is in no part"):
        Pipeline([net], (*POINTS, "four"), "DFA", EXAMPLE)
    stage = Pipeline([net], POINTS, "DFA", EXAMPLE)
    with pytest.raises(ValueError, match="got 3 images for 4 micro-batches"):
        stage.step(*batch(0, 3), micro_batches=4)
    with pytest.raises(ValueError, match="x is None, expected the batch on the first stage"):
        stage.step(None, batch(0)[1])
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    with pytest.raises(ValueError, match="stage 1 has no feedback point"):
        Pipeline(parts_of(net, ["three"]), POINTS, "DFA", EXAMPLE)
    net.pool.append(nn.Linear(20, 20).double())
    with pytest.raises(ValueError, match="stage 0 has something that learns behind its last point 'two'"):
        Pipeline(parts_of(net, ["pool"]), POINTS, "DFA", EXAMPLE)


@pytest.mark.parametrize("cuts", [("four",), ("head",), ("two", "one"), ("one", "one"), ("one.0",)])
def test_cuts_that_are_none_are_refused(cuts):
    with pytest.raises(ValueError, match=r"behind which a model can be cut|expected them in order"):
        parts_of(Net(), cuts)
