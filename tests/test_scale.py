"""One to many GPUs: ranks, checkpoints that survive, cached latents, the plan, speed. References: the same run in one process, uninterrupted;
torch's own counters. Real processes (gloo) and real signals. The long form of the kills: python tests/kill_often.py."""
import csv
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import model as nets
import probe
import train
from conftest import TINY, finished, free_port, ranks, read_state, start, states

# 12 frames are 3 latent ones: two ranks share their positions, (3, 1, 1, D), unevenly
TEN = ["frames=12", "stages=base,videojam", "base.steps=10", "videojam.steps=10", "save_every=5", "keep_states=9"]
KILLED = ["stages=base", "base.steps=40", "save_every=1", "log_every=5"]
TO_THE_END = [*KILLED, "save_every=39"]                                         # what is not killed saves twice; the tests tear step 40 and fall back on 39


def weights(run, stage):
    return common.read_weights(run / f"{stage}.pt")["weights"]


def distance(a, b):
    """The largest ‖a - b‖ / ‖b‖ over the tensors of two states or weights."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-30)).item() for name in a)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def quiet():
    """train.main in this process without samples and report, which are not this file's matter."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "finale", lambda *args: None)
        m.setattr(train, "write_samples", lambda *args: None)
        yield


def folder(trained, path, *stages):
    """A run folder with these finished stages of the session's run."""
    path.mkdir()
    for stage in stages:
        shutil.copy(trained[0] / f"{stage}.pt", path)
    return path


# ---- Ranks ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def alone(trained, quiet, tmp_path_factory):
    """Ten steps of the base and ten of VideoJAM in one process, with a checkpoint every five."""
    run = folder(trained, tmp_path_factory.mktemp("scale") / "alone", "tae")
    train.main([*TINY, *TEN, f"run={run}"])
    return run


@pytest.fixture(scope="module")
def gloo():
    """Several ranks on CPUs: train.py refuses older torch, whose gloo adds up where FSDP asks for a mean."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        pytest.skip("several CPU ranks need torch 2.9")


@pytest.fixture(scope="module")
def together(gloo, trained, alone, tmp_path_factory):
    """The same by two ranks of torchrun, as the README has it."""
    run = folder(trained, tmp_path_factory.mktemp("scale") / "together", "tae")
    status, out, err = finished(start("torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *TINY, *TEN, f"run={run}", script="-m"))
    assert status == 0, err
    assert out.count(" M parameters, 10 steps of 4 = 2 ranks x 1 micro-batches x 2 clips") == 2     # one rank speaks, of both stages
    return run


def test_two_ranks_hold_the_same_weights(alone, together):
    """Issue, point 1: after 10 fp32 steps, ‖a-b‖/‖b‖ <= 1e-5 per tensor, base and VideoJAM, weights, averages and moments; the log agrees too."""
    for stage in ("base", "videojam"):
        one, two = read_state(alone, stage, 10), read_state(together, stage, 10)
        assert distance(two["net"], one["net"]) <= 1e-5 and distance(two["ema"], one["ema"]) <= 1e-5
        assert distance(weights(together, stage), weights(alone, stage)) <= 1e-5
    for one, two in zip(*([json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (alone, together))):
        assert one["step"] == two["step"] and one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
        assert one["loss"] == pytest.approx(two["loss"], abs=2e-5) and one["loss_x_by_t"] == pytest.approx(two["loss_x_by_t"], abs=2e-4)


def test_two_ranks_share_the_state(together):
    """fully_shard: each rank writes its own half of the weights, averages and moments. Reference: the sizes of the two files, four floats per parameter."""
    files = sorted((together / "base.state" / "step-10").glob("*.distcp"))
    floats = 4 * 4 * sum(w.numel() for w in weights(together, "base").values())
    assert len(files) == 2 and all(floats / 2 < file.stat().st_size < 0.9 * floats for file in files)


@pytest.fixture(scope="module")
def pair(gloo, trained, alone, tmp_path_factory):
    """Five runs of two ranks, one after the other in the same two processes: {name: run folder}, and what either printed. In the last, SIGTERM reaches rank 1
    alone, in its sixth step."""
    root = tmp_path_factory.mktemp("pair")
    runs = {name: folder(trained, root / name, *stages) for name, stages in (("accumulation", ["tae"]), ("bf16", []), ("resumed", ["tae"]), ("compiled", ["tae"]), ("told", ["tae"]))}
    shutil.copytree(alone / "base.state" / "step-5", runs["resumed"] / "base.state" / "step-5")
    in_bf16 = [text for text in TINY if not text.startswith("precision")] + ["precision=bf16", "stages=tae,base"]
    settings = {"accumulation": [*TINY, *TEN, "micro_batch=1", "checkpointing=attention"], "bf16": in_bf16, "resumed": [*TINY, *TEN, "stages=base"],
                "compiled": [*TINY, *TEN, "stages=base", "compile=always", "checkpointing=attention"],
                "told": [*TINY, *KILLED, "save_every=1000"]}
    driver = root / "driver.py"
    driver.write_text("import common, json, model, os, signal, sys, torch, train\nreal, name = train.dit_loss, None\n"
                      "model.Block.compile = lambda self: torch.nn.Module.compile(self, backend='eager')\n"       # dynamo's part of it, without a C compiler
                      "def told(*args):\n    loss_of = real(*args)\n    def spy(step, rows):\n"
                      "        if name == 'told' and common.RANK == 1 and step == 5: os.kill(os.getpid(), signal.SIGTERM)\n"
                      "        return loss_of(step, rows)\n    return spy\ntrain.dit_loss, train.finale, look = told, lambda *args: None, train.write_samples\n"
                      "train.write_samples = lambda *args: look(*args) if name == 'bf16' else None\n"
                      "for name, (port, args) in json.loads(sys.argv[1]).items():\n    os.environ['MASTER_PORT'] = str(port)\n    try:\n        train.main(args)\n"
                      "    except train.Stopped as stopped:\n        print(stopped)\n        common.close_process_group()\n")
    both = ranks(2, json.dumps({name: [free_port(), [*args, f"run={runs[name]}"]] for name, args in settings.items()}), script=driver)
    outs = list(map(finished, both))
    assert [status for status, _, _ in outs] == [0, 0], outs[0][2] + outs[1][2]
    return runs, [out for _, out, _ in outs]


def test_two_ranks_with_accumulation(alone, pair):
    """Issue, point 1: two ranks, one clip at a time, activation checkpointing beside it: the same weights within 1e-5."""
    runs, outs = pair
    assert "2 ranks x 2 micro-batches x 1 clips" in outs[0]
    for stage in ("base", "videojam"):
        assert distance(weights(runs["accumulation"], stage), weights(alone, stage)) <= 1e-5


def test_two_ranks_in_bf16(trained, pair):
    """bf16 computes, fp32 keeps: the state on disk is fp32 with more digits than bf16 has; the losses of the TAE (whole on both ranks) and of the base are those
    of one process in fp32 within 3 % (bf16 rounds to 0.4 %), and different."""
    run = pair[0]["bf16"]
    net = read_state(run, "base", 2)["net"]
    assert all(w.dtype == torch.float32 for w in net.values())
    assert any((w.bfloat16().float() != w).any() for w in net.values())
    losses = lambda run, stage: [line["loss"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if line["stage"] == stage]
    for stage in ("tae", "base"):
        assert losses(run, stage) == pytest.approx(losses(trained[0], stage), rel=0.03) and losses(run, stage) != losses(trained[0], stage)


def test_two_ranks_with_compiled_blocks(alone, pair):
    """torch.compile of each block, under FSDP, with activation checkpointing: the same weights within 1e-5."""
    assert distance(weights(pair[0]["compiled"], "base"), weights(alone, "base")) <= 1e-5


def test_two_ranks_resume_what_one_left(alone, pair):
    """Issue, point 2: five steps by one process, five more by two ranks: within 1e-5 of ten by one."""
    runs, outs = pair
    assert "base: resumed at step 5" in outs[0]
    assert distance(read_state(runs["resumed"], "base", 10)["net"], read_state(alone, "base", 10)["net"]) <= 1e-5
    assert distance(weights(runs["resumed"], "base"), weights(alone, "base")) <= 1e-5


def test_one_resumes_what_two_ranks_left(alone, together, quiet, tmp_path, capsys):
    """Issue, point 2: the other way round."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("tae.pt", "config.json"):
        shutil.copy(together / name, run)
    shutil.copytree(together / "base.state" / "step-5", run / "base.state" / "step-5")
    train.main([*TINY, *TEN, f"run={run}", "stages=base"])
    assert "base: resumed at step 5" in capsys.readouterr().out
    assert distance(read_state(run, "base", 10)["net"], read_state(alone, "base", 10)["net"]) <= 1e-5
    assert distance(weights(run, "base"), weights(alone, "base")) <= 1e-5


def test_one_rank_told_tells_all(pair):
    """Issue: ranks agree at the end of the step. Only rank 1 got SIGTERM: both left after that step, with one whole checkpoint."""
    runs, outs = pair
    assert all("base: SIGTERM at step 6 of 40, saved in" in out for out in outs)
    assert states(runs["told"], "base") == ["step-6"] and len(list((runs["told"] / "base.state" / "step-6").glob("*.distcp"))) == 2
    assert not (runs["told"] / "base.pt").exists()


def test_micro_batches_meet_on_every_rank(monkeypatch):
    """Gradient accumulation over ranks: every sample once, as many micro-batches on each rank (their collectives meet), none larger than micro_batch; where a
    rank would idle, one line instead of hanging. Reference: counting, over all small sizes."""
    for world in (1, 2, 3):
        monkeypatch.setattr(common, "WORLD", world)
        for batch in range(world, 12):
            for size in range(batch + 2):
                config, cuts = {"micro_batch": size}, []
                try:
                    for rank in range(world):
                        monkeypatch.setattr(common, "RANK", rank)
                        cuts.append(train.micro_batches(config, batch))
                except ValueError as error:
                    assert f"batch={batch} over {world} ranks in micro-batches of {size}" in str(error) and batch % world
                    continue
                assert sorted(row for rank in cuts for rows in rank for row in rows) == list(range(batch))
                assert len({len(rank) for rank in cuts}) == 1 and all(0 < len(rows) <= (size or batch) for rank in cuts for rows in rank)


def test_more_ranks_than_clips(monkeypatch, tmp_path):
    """Issue, point 7: five ranks for a batch of four: one line, before any process group or folder."""
    monkeypatch.setattr(common, "WORLD", 5)
    with pytest.raises(ValueError, match="base: found 5 ranks for a global batch of 4 clips"):
        train.main([*TINY, f"run={tmp_path / 'run'}", "stages=base"])
    assert not (tmp_path / "run").exists()


def test_checkpointing_changes_nothing():
    """Activation checkpointing computes again what it did not keep: gradients equal to the last bit, with less than half kept.
    Reference: the net that keeps everything; what is kept is counted by autograd's hooks (which do not see what "attention" keeps beside the inputs)."""
    grads, kept = {}, {}
    for mode in ("none", "attention", "full"):
        torch.manual_seed(0)
        net = nets.DiT(4, 2, 8, 8, dim=32, depth=2, heads=2, hidden=64, text_dims=[16], checkpointing=mode).add_motion()
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
        x, text = torch.randn(2, 8, 2, 8, 8), torch.randn(2, 5, 16)
        kept[mode], u = saved_bytes(lambda: net(x, torch.tensor([0.2, 0.7]), text, torch.ones(2, 5, dtype=torch.bool)), net)
        u.square().mean().backward()
        grads[mode] = {name: p.grad for name, p in net.named_parameters()}
    assert_equal(grads["full"], grads["none"])
    assert_equal(grads["attention"], grads["none"])
    assert kept["full"] < 0.5 * kept["none"] and kept["attention"] < 0.5 * kept["none"]


def test_attention_outputs_are_kept(monkeypatch):
    """checkpointing=attention runs each attention once, full twice, forward and backward together. Reference: the kernel's calls, counted by a mode."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            Count.calls += op in nets.ATTENTION
            return op(*args, **(kwargs or {}))

    calls = {}
    for mode in ("none", "attention", "full"):
        Count.calls, block = 0, nets.Block(32, 2, 64, mode)
        with Count():
            block(torch.randn(1, 6, 32, requires_grad=True), torch.randn(1, 6, 32), torch.randn(1, 4, 32), torch.ones(1, 4, dtype=torch.bool)).sum().backward()
        calls[mode] = Count.calls
    assert calls == {"none": 2, "attention": 2, "full": 4}                      # self- and cross-attention


def test_meta_device_and_plain_construction_agree():
    """A net built on the meta device and filled afterwards is the one built in memory and initialised with the same seed, to the last bit. Reference: that one."""
    config = common.load_config([*TINY, "compile=never"])
    plain = torch.nn.ModuleDict(dict(text=common.build_text(config), dit=common.build_dit(config, True)))
    torch.manual_seed(0)
    for part in plain.values():
        for p in part.parameters():
            torch.nn.init.constant_(p, 7)                                       # what init leaves out would be seen
        part.init()
    torch.manual_seed(0)
    assert_equal(plain.state_dict(), torch.nn.ModuleDict(common.build_sharded(config, torch.device("cpu"), motion=True)).state_dict())


# ---- Checkpoints that survive ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def straight(trained, quiet, tmp_path_factory):
    """Forty steps without interruption, the last two saved."""
    run = folder(trained, tmp_path_factory.mktemp("scale") / "straight", "tae")
    train.main([*TINY, *TO_THE_END, f"run={run}"])
    return run


def kill_often(run, wanted, kills, seed, longest=0.6):
    """Start train.py, kill -9 it at a random moment after its next checkpoint, `kills` times; returns the steps at which each but the first start resumed,
    and at the end the one that the next will. Asserts that each goes on from the newest checkpoint that was whole: no step before it is lost."""
    rng, resumed = random.Random(seed), []
    saved = lambda: max([int(name[5:]) for name in states(run, "base") if not name.endswith(".tmp")], default=0) if (run / "base.state").exists() else 0
    for n in range(kills):
        before, process = saved(), start(*wanted, f"run={run}")
        while process.poll() is None and saved() == before:
            time.sleep(0.005)                                                   # imports take seconds; the moments that matter come after them
        time.sleep(rng.uniform(0, longest))
        process.kill()
        out = finished(process)[1]
        assert not before or f"base: resumed at step {before}\n" in out, out
        resumed.append(saved())
    return resumed


def test_random_kills(trained, straight, quiet, tmp_path, capsys):
    """Issue, point 2: kill -9 at random moments, also in the middle of a save (there is one every step, and it takes longer than the step): each start goes
    on from the newest complete checkpoint, and the end is bit for bit the uninterrupted one. The long form: 20 kills by tests/kill_often.py."""
    run = folder(trained, tmp_path / "run", "tae")
    resumed = kill_often(run, [*TINY, *KILLED], kills=2, seed=1)
    assert 0 < resumed[0] < resumed[1] < 40
    train.main([*TINY, *TO_THE_END, f"run={run}"])
    assert f"base: resumed at step {resumed[1]}\n" in capsys.readouterr().out
    for kind, named in read_state(straight, "base", 40).items():
        assert_equal(read_state(run, "base", 40)[kind], named)
    assert_equal(weights(run, "base"), weights(straight, "base"))
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == list(range(5, 41, 5))
    assert states(run, "base") == ["step-39", "step-40"]                        # the last k = 2, and no half-written one


@pytest.fixture(scope="module")
def children(trained, tmp_path_factory):
    """Three processes of train.py, started together: {name: process}, {name: run folder}. "save" and "replace" kill themselves while the third checkpoint is half
    written, and when it is written but not yet renamed; "sigterm" goes on, without checkpoints, until it is told."""
    root = tmp_path_factory.mktemp("children")
    runs = {name: folder(trained, root / name, "tae") for name in ("save", "replace", "sigterm")}
    half = "p = next(__import__('pathlib').Path(k['checkpoint_id']).glob('*.distcp')); os.truncate(p, p.stat().st_size // 2); (p.parent / '.metadata').unlink()"
    code = lambda holder, name, harm: (
        f"import os, signal, sys, train, torch.distributed.checkpoint as dcp\nreal = {holder}.{name}\n"
        f"def die(*a, **k):\n    last = 'step-3.tmp' in str(k.get('checkpoint_id', a[0]))\n    if not last or '{name}' == 'save': real(*a, **k)\n    if last:\n"
        f"        {harm}\n        os.kill(os.getpid(), signal.SIGKILL)\n{holder}.{name} = die\ntrain.main(sys.argv[1:])")
    started = {"sigterm": start(*TINY, *KILLED, f"run={runs['sigterm']}", "save_every=1000")}
    started["save"] = start(code("dcp", "save", half), *TINY, *KILLED, f"run={runs['save']}", script="-c")
    started["replace"] = start(code("os", "replace", "pass"), *TINY, *KILLED, f"run={runs['replace']}", script="-c")
    while not (runs["sigterm"] / "log.jsonl").exists() and started["sigterm"].poll() is None:   # until the first five steps are done
        time.sleep(0.01)
    started["sigterm"].terminate()
    return started, runs


@pytest.mark.parametrize("name", ["save", "replace"])
def test_killed_while_saving(children, straight, quiet, name):
    """SIGKILL in the middle of a save: the checkpoint before it is resumed, and the end is bit for bit that of the run that was not killed."""
    started, runs = children
    run = runs[name]
    status, _, err = finished(started[name])
    assert status == -signal.SIGKILL, err
    assert states(run, "base") == ["step-1", "step-2", "step-3.tmp"]
    train.main([*TINY, *TO_THE_END, f"run={run}"])
    assert states(run, "base") == ["step-39", "step-40"]                        # the half-written one is gone
    assert_equal(read_state(run, "base", 40)["net"], read_state(straight, "base", 40)["net"])
    assert_equal(weights(run, "base"), weights(straight, "base"))


def test_sigterm_saves_and_leaves(children, straight, quiet):
    """SIGTERM: the step in hand is finished and saved, exit status 143, and the same command goes on, bit for bit."""
    started, runs = children
    run = runs["sigterm"]
    status, out, err = finished(started["sigterm"])
    saved = states(run, "base")
    assert status == 143 and len(saved) == 1 and f"base: SIGTERM at step {saved[0][5:]} of 40" in out, (out, err)
    assert not (run / "base.pt").exists() and 5 <= int(saved[0][5:]) < 40
    train.main([*TINY, *TO_THE_END, f"run={run}"])
    assert_equal(weights(run, "base"), weights(straight, "base"))


@pytest.mark.parametrize("harm", ["truncated", "emptied", "no metadata", "no state.json", "a file is gone"])
def test_a_torn_checkpoint_falls_back(trained, straight, quiet, tmp_path, capsys, harm):
    """Issue, point 7: the newest folder is damaged: the one before is resumed, which is said, and the end is bit for bit the same."""
    run = folder(trained, tmp_path / "run", "tae")
    shutil.copytree(straight / "base.state", run / "base.state")
    newest = run / "base.state" / "step-40"
    file = next(newest.glob("*.distcp"))
    if harm == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    if harm == "emptied":
        os.truncate(newest / ".metadata", 0)
    {"no metadata": newest / ".metadata", "no state.json": newest / "state.json", "a file is gone": file}.get(harm, newest / "x").unlink(missing_ok=True)
    train.main([*TINY, *KILLED, f"run={run}"])
    out = capsys.readouterr().out
    assert "step-40 is torn" in out and "resumed at step 39" in out
    assert_equal(weights(run, "base"), weights(straight, "base"))
    for kind, named in read_state(straight, "base", 40).items():
        assert_equal(read_state(run, "base", 40)[kind], named)                  # the torn one was written anew


def test_when_all_are_torn(trained, straight, quiet, tmp_path):
    """No checkpoint that can be read: one line that says what to delete; nothing is overwritten."""
    run = folder(trained, tmp_path / "run", "tae")
    shutil.copytree(straight / "base.state", run / "base.state")
    for file in run.rglob("*.distcp"):
        os.truncate(file, 100)
    with pytest.raises(ValueError, match=r"step-40 is torn .*; .*step-39 is torn .*: delete .*base.state") as error:
        train.main([*TINY, *KILLED, f"run={run}"])
    assert "\n" not in str(error.value) and states(run, "base") == ["step-39", "step-40"] and not (run / "base.pt").exists()


def test_a_checkpoint_of_another_architecture(trained, straight, quiet, tmp_path):
    """Issue, point 7: it is refused, not taken for torn; the line names a tensor and both shapes."""
    run = folder(trained, tmp_path / "run", "tae")
    shutil.copytree(straight / "base.state", run / "base.state")
    with pytest.raises(ValueError, match=r"step-40: net.dit\.\S+: found \(.*\), expected \(.*\)") as error:
        train.main([*TINY, *KILLED, f"run={run}", "dit.dim=48"])
    assert "\n" not in str(error.value)
    shutil.rmtree(run)
    run = folder(trained, tmp_path / "run", "tae")
    shutil.copytree(straight / "base.state", run / "base.state")
    with pytest.raises(ValueError, match=r"found nothing, expected \(.*\)|found \(.*\), expected nothing"):
        train.main([*TINY, *KILLED, f"run={run}", "dit.depth=3"])


def test_a_full_disk(trained, straight, quiet, tmp_path):
    """Issue, point 7: files may not grow beyond 40 kB: the save fails with one line, the checkpoint before stays and is resumed once there is room,
    bit for bit; the same for the weights file at a stage's end. The limit is the kernel's (RLIMIT_FSIZE)."""
    run, limits = folder(trained, tmp_path / "run", "tae"), resource.getrlimit(resource.RLIMIT_FSIZE)
    real = common.save_state

    def fails_at(step):
        def limited(*args):
            if args[2] == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
            real(*args)
        return limited

    try:
        with pytest.MonkeyPatch.context() as m:
            m.setattr(common, "save_state", fails_at(7))
            with pytest.raises(OSError, match="step-7 could not be written .*is the disk full.*step-6") as error:
                train.main([*TINY, *KILLED, f"run={run}"])
        assert "\n" not in str(error.value)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert states(run, "base") == ["step-5", "step-6"]
        with pytest.MonkeyPatch.context() as m:
            m.setattr(train, "finish", (lambda finish: lambda *args: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1])) or finish(*args))(train.finish))
            with pytest.raises(OSError, match="base.pt could not be written .*is the disk full"):
                train.main([*TINY, *TO_THE_END, f"run={run}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(run.glob("base.pt*"))
    train.main([*TINY, *TO_THE_END, f"run={run}"])
    assert_equal(weights(run, "base"), weights(straight, "base"))


# ---- Cached latents -------------------------------------------------------------------------------------------------

@pytest.fixture
def cached(trained, tmp_path, monkeypatch):
    """A function that writes the latents of 8 clips in files of 3, by one or two ranks, for a run with the trained TAE."""
    monkeypatch.setattr(data, "CLIPS_PER_FILE", 3)

    def make(name, ranks=1, *overrides):
        run = folder(trained, tmp_path / name, "tae")
        config = common.load_config([*TINY, f"run={run}", *overrides])
        (run / "config.json").write_text(json.dumps(config))
        for rank in reversed(range(ranks)):                                     # in any order
            data.write_latents(config, rank, ranks)
        return run, config
    return make


def test_cached_latents_train_the_same(trained, cached, quiet):
    """Training from the files equals training that encodes the same clips into memory, to the last bit, and the captions are the clips' own.
    Two ranks write what one writes; the latents are mapped, not read."""
    run, config = cached("disk", 2)
    one, _ = cached("one")
    assert sorted(p.name for p in (run / "latents").iterdir()) == ["00000.pt", "00001.pt", "00002.pt", "index.json"]
    tae = common.load_into(common.build_tae(config), weights(run, "tae"), "tae.pt").eval()
    clips = data.open_data(config)
    stored = data.Latents(config, tae, clips, torch.device("cpu"))
    z, captions, features = stored([7, 0, 4])
    assert captions == [clips[i]["caption"] for i in (7, 0, 4)] and features is None
    torch.testing.assert_close(z, data.encode(tae, clips.batch([7, 0, 4]), config["flow"]["sigma"]), atol=5e-3, rtol=5e-3)         # float16
    if os.path.exists("/proc/self/maps"):
        assert str(run / "latents" / "00002.pt") in Path("/proc/self/maps").read_text()
    for k in range(3):
        a, b = (torch.load(r / "latents" / f"{k:05d}.pt", weights_only=True) for r in (run, one))
        assert torch.equal(a["z"], b["z"]) and a["caption"] == b["caption"] and a["z"].dtype == torch.float16
    memory = folder(trained, run.parent / "memory", "tae")
    for r in (run, memory):
        train.main([*TINY, f"run={r}", "stages=base,videojam"])
    for stage in ("base", "videojam"):
        assert_equal(weights(run, stage), weights(memory, stage))


def test_caching_goes_on_where_it_stopped(cached, monkeypatch):
    """Finished files are kept, missing ones made, half-written ones made again; training refuses to start before. Reference: the files' own bytes and times."""
    run, config = cached("run")
    first, second, third = (run / "latents" / f"{k:05d}.pt" for k in range(3))
    kept, whole, bytes_ = second.stat().st_mtime_ns, first.read_bytes(), third.read_bytes()
    first.rename(first.with_name("00000.pt.tmp"))                               # killed before the rename
    third.unlink()
    tae = common.load_into(common.build_tae(config), weights(run, "tae"), "tae.pt")
    with pytest.raises(ValueError, match="not finished, 2 of its files are missing: torchrun data.py run="):
        data.Latents(config, tae, data.open_data(config), torch.device("cpu"))
    data.write_latents(config)
    assert second.stat().st_mtime_ns == kept and torch.equal(torch.load(first)["z"], torch.load(second.with_name("00000.pt"))["z"])
    assert len(first.read_bytes()) == len(whole) and len(third.read_bytes()) == len(bytes_)
    assert not list((run / "latents").glob("*.tmp"))


@pytest.mark.parametrize("what", ["tae", "size", "clips", "sigma", "data"])
def test_a_cache_of_something_else_is_refused(trained, cached, quiet, what):
    """Issue, point 7: latents of another TAE, size, number or choice of clips, or sigma: refused by name, by training and by data.py alike; nothing is written."""
    run, _ = cached("run")
    changed = {"size": ["frames=4"], "clips": ["data.cache=7"], "sigma": ["flow.sigma=0.2"], "data": ["world.texture=0.5"], "tae": []}[what]
    if what == "tae":
        saved = common.read_weights(run / "tae.pt")
        other = {name: w + 0.01 for name, w in saved["weights"].items()}
        common.save(run / "tae.pt", {**saved, "weights": other, "checksum": common.checksum(other)})
    (run / "config.json").unlink()
    before = {p: p.read_bytes() for p in (run / "latents").iterdir()}
    config = common.load_config([*TINY, *changed, f"run={run}"])
    for call in (lambda: train.main([*TINY, *changed, f"run={run}", "stages=base"]), lambda: data.write_latents(config)):
        with pytest.raises(ValueError, match=f"latents was made with another {what}: found .*, expected .*; delete it") as error:
            call()
        assert "\n" not in str(error.value)
    assert {p: p.read_bytes() for p in (run / "latents").iterdir()} == before and not (run / "base.pt").exists()


def test_features_of_frozen_encoders_are_cached(cached, quiet, monkeypatch):
    """Frozen text encoders run once per clip: their features lie beside the latents, and training looks up the empty prompt alone. Reference: the
    encoder itself, within float16; the calls that training makes of it."""
    frozen = ["text.frozen=[12,20]", "text.length=5", "drop_text=0.5"]
    run, config = cached("run", 1, *frozen)
    tae = common.load_into(common.build_tae(config), weights(run, "tae"), "tae.pt").eval()
    latents, text = data.Latents(config, tae, data.open_data(config), torch.device("cpu")), common.build_text(config)
    _, captions, stored = latents([5, 2])
    features, masks = text(captions)
    for a, b in zip(stored[0], features):
        torch.testing.assert_close(a.float(), b, atol=2e-3, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(stored[1], masks))
    keep = torch.tensor([True, False])
    for direct, looked_up in zip(*(train.features(text, captions, keep, s, lambda: text([""])) for s in (None, stored))):
        for a, b in zip(direct, looked_up):
            assert b.dtype == a.dtype
            torch.testing.assert_close(a.float(), b.float(), atol=2e-3, rtol=1e-3)
    asked, forward = set(), nets.RandomText.forward
    monkeypatch.setattr(nets.RandomText, "forward", lambda self, prompts: asked.update(prompts) or forward(self, prompts))
    train.main([*TINY, f"run={run}", "stages=base,videojam", *frozen])
    assert asked == {""}
    loaded = common.load_run(run)                                               # both read the base's file, which holds no tensor that the nets do not expect
    assert loaded.dit.motion_in is not None and not list(loaded.text.parameters())


def test_the_command_that_caches(trained, tmp_path):
    """torchrun data.py run=... on a run folder: its config is read, the files appear, whichever rank makes them; other keys than the run's, and a folder that
    is no run, are refused in one line."""
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    status, _, err = finished(*ranks(2, f"run={run}", "data.cache=8", script="data.py"))
    assert status == 0 and (run / "latents" / "00000.pt").exists(), err
    for args, words in (([f"run={run}", "frames=4"], "was made with frames=8, found frames=4"), ([f"run={tmp_path / 'no'}"], "tae.pt is missing: train the tae first")):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
            data.main(args)
        assert "\n" not in str(error.value)
    data.main([f"run={run}", "save_every=7"])                                   # what does not matter may differ
    bare = folder(trained, tmp_path / "bare", "tae")                            # a TAE from elsewhere: the command line says which clips
    data.main([*TINY, f"run={bare}"])
    assert torch.equal(*(torch.load(r / "latents" / "00000.pt")["z"] for r in (run, bare)))


# ---- The plan and the speed -----------------------------------------------------------------------------------------

def saved_bytes(call, net):
    """Bytes of the tensors, views counted once, that autograd keeps while call() runs, the net's own weights left out; and its result."""
    seen, own = {}, {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(x):
        seen[x.untyped_storage().data_ptr()] = x
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    return sum(x.untyped_storage().nbytes() for where, x in seen.items() if where not in own), out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "sharded"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_plan_of_the_activations(precision, mode):
    """train.kept_bytes against autograd's own: within 3 % of the bytes it keeps of a block, the text's included. Autocast's copies of weights
    are not activations (of SwiGLU's last matrix model.Gated keeps none)."""
    N, L, D, hidden = 512, 96, 256, 704
    torch.manual_seed(0)
    block = nets.Block(D, 4, hidden, mode)
    dtype = torch.bfloat16 if precision == "sharded" else torch.float32        # FSDP gathers bf16 weights, and all that comes of them is bf16
    block.to(dtype)
    inputs = [torch.randn(shape, requires_grad=True, dtype=dtype) * 1 for shape in ((1, N, D), (1, 6, D), (1, L, D))]
    weights = sum(w.numel() for name, w in block.named_parameters() if w.dim() == 2 and name not in ("table", "ffn.down.weight"))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        kept, _ = saved_bytes(lambda: block(*inputs, torch.ones(1, L, dtype=torch.bool)), block)
    if mode == "none":
        kept -= 2 * weights * (precision == "bf16")
    else:
        kept -= dtype.itemsize * (6 * D + L * D)                                # c and text, which all blocks share
    assert train.kept_bytes(N, L, D, hidden, 4 if precision == "fp32" else 2, dtype.itemsize, mode) == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("preset, billions, gpus", [("4b", 4.92, 32), ("30b", 29.3, 256)])
def test_the_plan_of_the_paper(capsys, preset, billions, gpus):
    """Issue: python train.py preset=30b plan=true, in seconds. Reference: 4.92 B and 29.3 B within 1 %; 20 bytes per parameter over the GPUs; the blocks'
    FLOPs from App. C's sizes, typed here, within 1 % (what is around the blocks is small); time at 40 % of 989 TFLOP/s."""
    begin = time.time()
    train.main([f"preset={preset}", "plan=true"])
    out, memory = capsys.readouterr().out, train.plan_memory(common.load_config([f"preset={preset}"]))
    assert time.time() - begin < 30
    D, depth, clips, steps, N = (3072, 32, 32, 50000, 4096) if preset == "4b" else (6144, 48, 256, 35000, 4096)
    assert f"{billions:.2f} B" in out and f"{N} tokens a clip" in out
    parameters = sum(memory[key] for key in ("weights", "gradients", "AdamW", "EMA")) * gpus / 20
    assert parameters == pytest.approx(billions * 1e9, rel=0.01)
    L, hidden = 3 * 256, 8 * D / 3                                              # three encoders of 256 tokens
    flops = 3 * clips * depth * (2 * N * (6 * D * D + 3 * D * hidden) + 2 * L * 2 * D * D + 4 * N * (N + L) * D)
    shown = float(out.split("DiT  ")[2].split("TFLOPs")[0].replace(",", "")) * 1e12
    assert shown == pytest.approx(flops, rel=0.01)
    seconds = float(out.split(f"on {gpus} GPU(s)")[1].split(" s at an MFU of 40 %")[0])
    assert seconds == pytest.approx(shown / (gpus * 989e12 * 0.4), rel=0.01)
    hours = float(out.split("videojam, hours")[1].split(f"for {steps} steps")[0])
    assert hours == pytest.approx(seconds * steps / 3600, rel=0.01)
    assert memory["together"] == pytest.approx(sum(n for name, n in memory.items() if name != "together"))
    fewer = train.plan_memory(common.load_config([f"preset={preset}", f"gpus={gpus // 2}"]))
    assert fewer["AdamW"] == 2 * memory["AdamW"] and fewer["activations"] == 2 * memory["activations"]     # twice the clips each


@pytest.mark.parametrize("motion", [False, True])
@pytest.mark.parametrize("overrides", [["preset=tiny"], ["preset=small", "dit.depth=2"], ["preset=tiny", "text.frozen=[40,24]", "text.length=16", "dit.patch=1"]])
def test_the_formula_of_the_flops(motion, overrides):
    """model.flops against torch's FlopCounterMode, on the longest text and on a short one: the forward pass exactly, the training step within 2 % of three times it (the first
    layers need no gradient of their inputs)."""
    config = common.load_config(overrides)
    text, dit, length = common.build_text(config), common.build_dit(config, motion), config["text"]["length"]
    C, T, H, W = common.latent_size(config)
    x, t = torch.zeros(1, (2 if motion else 1) * C, T, H, W), torch.zeros(1)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):       # the counter overlooks the CPU's flash kernel
        u = dit(x, t, *text(["x" * (length - 1)]))
    with FlopCounterMode(display=False) as backward:
        u.sum().backward()
    assert common.flops(config, motion) == forward.get_total_flops()
    if not config["text"]["frozen"]:
        with FlopCounterMode(display=False) as short, sdpa_kernel(SDPBackend.MATH):
            dit(x, t, *text(["x" * 9]))
        assert common.flops(config, motion, 10) == short.get_total_flops() < forward.get_total_flops()
    assert 3 * common.flops(config, motion) == pytest.approx(forward.get_total_flops() + backward.get_total_flops(), rel=0.02)


def test_the_speed_probe(tmp_path, capsys):
    """probe.py speed: a row each for training base and joint, encoding, sampling; TFLOP/s x seconds are the model's FLOPs, tokens and clips agree, shares lie
    between 0 and 100 %. Reference: model.flops and arithmetic; 100 evaluations by hand."""
    probe.main(["speed", *TINY, f"run={tmp_path}", "dit.dim=256", "dit.hidden=0", "sample.steps=8", "--steps", "2"])
    out = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "probe" / "speed.csv").read_text().splitlines()))
    assert [row["what"].split(",")[0] for row in rows] == ["training step", "training step", "encoding", "sampling"]
    config, length = common.load_config([*TINY, "dit.dim=256", "dit.hidden=0"]), max(len(p.encode()) for p in data.PROMPTS[:4]) + 1       # bytes and the end
    for row, motion in zip(rows, (False, True)):
        seconds = float(row["seconds"])
        assert float(row["tflops"]) * seconds * 1e12 == pytest.approx(3 * 4 * common.flops(config, motion, length, 1 - config["drop_text"]), rel=1e-3)
        assert float(row["clips_per_s"]) * seconds == pytest.approx(4, rel=1e-3) and float(row["tokens_per_s"]) * seconds == pytest.approx(4 * 8, rel=1e-3)
        assert 0 < float(row["share"]) < 1 and float(row["peak_gb"]) > 0
    assert "20 evaluations" in rows[3]["what"]                                  # 3 branches in 4 steps, 2 in 4 (sec. 4.3)
    assert "joint / base: " in out and "median of 2 pairs" in out
    with pytest.raises(ValueError, match="reads the config from --run, found preset=small"):
        probe.main(["permute", "preset=small"])
