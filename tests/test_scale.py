"""One to many ranks, checkpoints that survive, latents in files. Reference: the same run in one
process, without interruption. The processes and the signals are real."""
import functools
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time

import imageio.v3 as iio
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.elastic.utils.distributed import get_free_port

import common
import data
import model
import sample
import train
import videos
from conftest import TINY, finished, folder, read_log, read_state, silence, start, state, states

# 12 frames are 3 latent ones, so two ranks share the positions in time unevenly.
TEN = "frames=12 stages=base,videojam base.steps=10 videojam.steps=10 save_every=5".split()
FORTY = "stages=base base.steps=40 log_every=5 save_every=1".split()
FORTY_AT_ONCE = [*FORTY, "save_every=39"]       # leaves step-39 and step-40


def weights(run, stage):
    return common.read_weights(run / f"{stage}.pt")["weights"]


def assert_equal(a, b, within=0):
    """|a - b| <= within |b| for every tensor of two nets; to the last bit if nothing is given."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= within * b[name].norm(), name


def assert_same_end(run, straight):
    """Weights, averages and AdamW's moments of both runs, to the last bit."""
    assert_equal(weights(run, "base"), weights(straight, "base"))
    other = read_state(straight, "base", 40)
    for kind, tensors in read_state(run, "base", 40).items():
        assert_equal(tensors, other[kind])


def copy_state(source, run, step):
    """A checkpoint of the base, or all of them, to another run of the same TAE."""
    path = state(source, "base")
    shutil.copytree(path / step, run / "base.state" / path.name / step)


@pytest.fixture(scope="module", autouse=True)
def no_samples_no_report():
    with pytest.MonkeyPatch.context() as patch:
        silence(patch)
        yield


# ---- Ranks --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """Ten steps of the base and ten of VideoJAM in one process."""
    run = folder(trained, tmp_path_factory.mktemp("scale") / "alone", "tae")
    train.main([*TINY, *TEN, f"run={run}"])
    return run


def as_a_rank(root, runs):
    """What torchrun starts twice: the runs {name: [port, arguments]} in turn. Rank 1 may not look
    at config and weights, draws other first weights, and in some runs fails once."""
    draw, look, read_data = train.draw, train.show_samples, dcp.FileSystemReader.read_data
    save, manual_seed = common.save, torch.manual_seed
    silence(pytest.MonkeyPatch())
    quiet = train.show_samples
    failures = []

    def backend(graph, inputs):                 # all that compiling does, but for a C compiler
        from torch._dynamo.backends.registry import lookup_backend
        print("a compiled block")
        return lookup_backend("aot_eager_decomp_partition")(graph, inputs)

    def draw_or_be_told(config, step, row, shape):
        if config.run.endswith("told") and train.RANK == 1 and step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        if config.run.endswith("killed") and train.RANK == 1 and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        t, noise, *kept = draw(config, step, row, shape)
        if config.run.endswith("nan") and train.RANK == 1 and step == 1:
            noise = noise * math.nan
        return t, noise, *kept

    def save_and_tell(path, content):
        save(path, content)
        print(f"rank {train.RANK} wrote {path}")

    def stumble(self, *args):
        if "/stumbling/" in str(self.path) and train.RANK == 1 and not failures:
            failures.append(1)
            raise OSError("stale file handle")
        return read_data(self, *args)

    def forbidden(*args):
        raise AssertionError("rank 1 reads what rank 0 should")

    if train.RANK == 1:
        common.load_config = common.read_weights = common.identity = forbidden
        torch.manual_seed = lambda seed: manual_seed(seed + 1)
    common.save = save_and_tell
    videos.CLIPS_PER_FILE = 3
    common.time.sleep = print                   # nobody waits
    model.Block.compile = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    dcp.FileSystemReader.read_data = stumble
    train.draw = draw_or_be_told
    for name, (port, arguments) in runs.items():
        train.show_samples = look if name == "bf16" else quiet
        if name != "together":                  # torchrun's own port serves one run
            os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
        try:
            train.main([*TINY, *arguments, f"run={root}/{name}"])
        except common.Stopped as stopped:
            print(stopped)
            common.stop()


TORCHRUN = "torch.distributed.run --standalone --nproc_per_node=2".split()


def torchrun(*arguments):
    return finished(start(*TORCHRUN, *arguments, script="-m"))


@pytest.fixture(scope="module")
def pair(trained, alone, tmp_path_factory):
    """Runs of two ranks, all in the same two processes: their folder, what they printed."""
    if torch.__version__ < (2, 9):
        pytest.skip("several ranks on CPUs need torch 2.9")
    root = tmp_path_factory.mktemp("pair")
    settings = dict(
        together=TEN, accumulation=[*TEN, "stages=base", "micro_batch=1", "checkpointing=true"],
        compiled=[*TEN, "stages=base", "compile=always"], resumed=[*TEN, "stages=base"],
        stumbling=[*TEN, "stages=base", "base.steps=12"], nan=["stages=base", "base.steps=3"],
        told=[*FORTY, "save_every=1000"],
        tae=["stages=tae"], bf16=["precision=bf16", "stages=tae,base"],
        killed=FORTY)                                   # the last, as it ends both
    for name in settings.keys() - {"tae", "bf16"}:      # which train their own TAE
        folder(trained, root / name, "tae")
    copy_state(alone, root / "resumed", "step-5")
    copy_state(alone, root / "stumbling", "")
    todo = json.dumps({name: [get_free_port(), more] for name, more in settings.items()})
    _, out, err = torchrun(__file__, root, todo)
    assert f"{root}/killed, 2 x cpu" in out and "Signal 9 (SIGKILL)" in err, err
    return root, out


def test_two_ranks_hold_the_same_weights(alone, pair):
    """Ten fp32 steps: weights, averages and the log are those of one process within 1e-5, and each
    rank writes about half of the state (FSDP2). Reference: the run of one process and its file."""
    run = pair[0] / "together"
    for stage in ("base", "videojam"):
        one, two = read_state(alone, stage, 10), read_state(run, stage, 10)
        assert_equal(two["net"], one["net"], within=1e-5)
        assert_equal(weights(run, stage), weights(alone, stage), within=1e-5)
    assert "step 0 to 10, 4 clips = 2 ranks x 1 micro-batches x 2" in pair[1]
    for a, b in zip(read_log(alone), read_log(run), strict=True):
        assert b["step"] == a["step"]
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-5)
        assert b["loss_x_by_t"] == pytest.approx(a["loss_x_by_t"], abs=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    whole = (state(alone, "videojam") / "step-10/__0_0.distcp").stat().st_size
    files = list(state(run, "videojam").glob("step-10/*.distcp"))
    assert len(files) == 2 and all(file.stat().st_size < 0.7 * whole for file in files)


@pytest.mark.parametrize("name, words, stages", [
    ("accumulation", "2 ranks x 2 micro-batches x 1", ["base"]),
    ("compiled", "a compiled block", ["base"]), ("resumed", "step 5 to 10", ["base"]),
    ("tae", "tae: 0.04 M parameters, step 0 to 2, 2 clips = 2 ranks", ["tae"])])
def test_two_ranks(alone, pair, name, words, stages):
    """One clip at a time with activation checkpointing, compiled blocks, a resume of what one
    process left at step 5, and the TAE: the weights of one process within 1e-5."""
    assert words in pair[1]
    for stage in stages:
        assert_equal(weights(pair[0] / name, stage), weights(alone, stage), within=1e-5)


def test_one_resumes_what_two_ranks_left(alone, pair, tmp_path, capsys):
    """Step 5 by two ranks, step 10 by one: within 1e-5."""
    together = pair[0] / "together"
    run = folder([together], tmp_path / "run", "tae")
    copy_state(together, run, "step-5")
    train.main([*TINY, *TEN, f"run={run}", "stages=base"])
    assert "step 5 to 10" in capsys.readouterr().out
    assert_equal(weights(run, "base"), weights(alone, "base"), within=1e-5)


def test_all_ranks_write_the_latents(pair):
    """Eight clips, three to a file: each file by one rank, in turn. Reference: what they said."""
    for number, rank in ((0, 0), (1, 1), (2, 0)):
        path = pair[0] / f"together/latents/{number:05d}.pt"
        assert pair[1].count(f"wrote {path}") == 1 and f"rank {rank} wrote {path}" in pair[1]


def test_all_ranks_skip_a_step(pair):
    """Rank 1 alone had NaN in the second of three steps: nothing of it is in the weights, and both
    counted it. Reference: finite numbers, the log, AdamW's step."""
    run = pair[0] / "nan"
    assert [line["skipped"] for line in read_log(run)] == [0, 1, 0]
    end = read_state(run, "base", 3)
    assert all(w.isfinite().all() for kind in end.values() for w in kind.values())
    assert {step.item() for step in end["step"].values()} == {2}


def test_one_rank_that_cannot_read(pair):
    """Rank 1 failed once to read its part of step-10: both tried again and went on from it, no
    older one, and none is lost. Reference: what they said."""
    assert "rank 1: " in pair[1] and "stale file handle" in pair[1]
    assert pair[1].count("trying again in 5 s") == 2 and "step 10 to 12, 4 clips" in pair[1]
    assert states(pair[0] / "stumbling", "base") == ["step-10", "step-12"]


def test_a_rank_is_killed_then_the_readmes_lines_go_on(pair, straight, tmp_path):
    """kill -9 of rank 1 ended both; torchrun train.py goes on from the last whole state to the
    weights of one process (1e-5), and torchrun sample.py samples from the sharded net what one
    process does (two of 255: rounding)."""
    run = pair[0] / "killed"
    left = newest(run)
    assert 2 <= left <= 6
    shutil.rmtree(run / "latents")              # made with fewer clips to a file
    status, out, err = torchrun("train.py", *TINY, *FORTY_AT_ONCE, f"run={run}")
    assert status == 0 and f"step {left} to 40" in out and "UserWarning" not in err, err
    assert_equal(weights(run, "base"), weights(straight, "base"), within=1e-5)
    status, out, err = torchrun("--", "sample.py", "a red square moving up", "--run", run,
                                "--stage", "base", "--device", "cpu")
    assert status == 0 and out.count("a red square moving up") == 1, err
    sheet, = run.glob("samples/base-a-red*.png")
    video, _ = sample.generate(common.load_run(run, "base"), ["a red square moving up"], [0])
    common.write_sheet(tmp_path / "alone.png", video)
    pixels = [iio.imread(path).astype(int) for path in (sheet, tmp_path / "alone.png")]
    assert abs(pixels[0] - pixels[1]).max() <= 2


def test_two_ranks_in_bf16(trained, pair):
    """bf16 computes, fp32 keeps; both ranks sample. References: the losses of one process in fp32,
    within 3 %, but not the same; weights on disk with more digits than bf16 has."""
    run = pair[0] / "bf16"
    net = read_state(run, "base", 2)["net"].values()
    assert all(w.dtype == torch.float32 for w in net)
    assert any((w.bfloat16() != w).any() for w in net)
    losses = [line["loss"] for line in read_log(run)]
    in_fp32 = [line["loss"] for line in read_log(trained[0])[:4]]       # TAE and base, two each
    assert losses == pytest.approx(in_fp32, rel=0.03) and losses != in_fp32
    assert (run / "samples/base-2.mp4").exists()


def test_one_rank_told_tells_all(pair):
    """SIGTERM reached rank 1 alone in its sixth step: both left after the next one, when they had
    heard of it, with one whole state."""
    run = pair[0] / "told"
    assert pair[1].count("base: SIGTERM after step 7 of 40, saved") == 2
    assert states(run, "base") == ["step-7"] and not (run / "base.pt").exists()
    assert len(list(state(run, "base").glob("step-7/*.distcp"))) == 2


def test_micro_batches_meet_on_every_rank(monkeypatch):
    """Each row once, as many micro-batches on every rank, none too large; uneven shares that would
    leave a rank idle are refused in a line. Reference: counting, over all small sizes."""
    for world, batch, size in itertools.product((1, 2, 3, 5), range(3, 12), range(13)):
        monkeypatch.setattr(train, "WORLD", world)
        parts = []
        for rank in range(world):
            monkeypatch.setattr(train, "RANK", rank)
            try:
                config = common.Config(batch=batch, micro_batch=size)
                parts.append(train.micro_batches(config, "base"))
            except ValueError as error:
                assert f"found {batch} clips over {world} ranks" in str(error) and batch % world
        if parts:
            assert len(parts) == world and len({len(of_rank) for of_rank in parts}) == 1
            cuts = sum(parts, [])
            assert sorted(sum(cuts, [])) == list(range(batch))
            assert all(0 < len(rows) <= (size or batch) for rows in cuts)


def test_checkpointing_changes_nothing():
    """Each block runs once more, in the backward pass, and the gradients are the same to the last
    bit. Reference: the net that keeps everything."""
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = model.DiT(4, 2, 8, 8, 32, 2, 2, [16], checkpointing=checkpointing).add_motion()
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
        calls = []
        net.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
        inputs = torch.randn(2, 8, 2, 8, 8), torch.tensor([0.2, 0.7]), torch.randn(2, 5, 16)
        net(*inputs, torch.ones(2, 5, dtype=torch.bool)).square().mean().backward()
        assert len(calls) == 1 + checkpointing
        grads.append({name: p.grad for name, p in net.named_parameters()})
    assert_equal(*grads)


def test_a_net_filled_later_is_the_same():
    """Built without memory and then filled, as for many GPUs. Reference: built plainly."""
    config = common.load_config([*TINY, "run=runs/none"])
    parts = dict(text=common.build_text(config), dit=common.build_dit(config, motion=True))
    plain = torch.nn.ModuleDict(parts)
    for p in plain.parameters():
        torch.nn.init.constant_(p, 7)           # what init leaves out would be seen
    torch.manual_seed(0)
    for part in plain.values():
        part.init()
    torch.manual_seed(0)
    later = common.build_nets(config, torch.device("cpu"), motion=True)
    for part in later.values():
        part.init()
    assert_equal(later.state_dict(), plain.state_dict())


# ---- Checkpoints that survive -------------------------------------------------------------------

@pytest.fixture(scope="module")
def straight(trained, tmp_path_factory):
    """Forty steps without interruption."""
    run = folder(trained, tmp_path_factory.mktemp("scale") / "straight", "tae")
    train.main([*TINY, *FORTY_AT_ONCE, f"run={run}"])
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A folder with a trained TAE."""
    return folder(trained, tmp_path / "run", "tae")


def newest(run):
    """The step of the newest whole checkpoint; 0 if there is none."""
    return max([int(path.name[5:]) for path in run.glob("base.state/*/step-*")], default=0)


def kill_often(run, arguments, kills, seed, longest=0.3):
    """kill -9 train.py `kills` times after its next checkpoint: in turn at a random moment and
    while it saves. Each start must go on from the newest whole checkpoint -> their steps."""
    moments = random.Random(seed)
    steps = [0]
    for n in range(kills):
        process = start(*arguments, f"run={run}", PYTHONUNBUFFERED="1")
        while newest(run) == steps[-1] and process.poll() is None:
            time.sleep(0.005)
        if n % 2 == 0:
            time.sleep(moments.uniform(0, longest))
        while n % 2 and process.poll() is None and not list(run.glob("base.state/*/writing")):
            time.sleep(0.0005)
        process.kill()
        out = finished(process)[1]
        assert f"step {steps[-1]} to " in out, out
        steps.append(newest(run))
    return steps[1:]


def test_kills(run, straight, capsys):
    """kill -9 at a random moment, then during a save: the end is bit for bit the same, and the
    log has no step twice."""
    first, second = kill_often(run, [*TINY, *FORTY], kills=2, seed=1)
    assert 0 < first < second < 40
    train.main([*TINY, *FORTY_AT_ONCE, f"run={run}"])
    assert f"step {second} to 40" in capsys.readouterr().out
    assert_same_end(run, straight)
    assert [line["step"] for line in read_log(run)] == list(range(5, 41, 5))
    assert states(run, "base") == ["step-39", "step-40"]


class Killed(BaseException):
    """Stands for kill -9 at a chosen moment: nothing catches it, no folder is tidied up."""


@pytest.mark.parametrize("holder, name, at, done, step", [
    (os, "replace", "step-3", False, 2), (os, "replace", "step-3", True, 3),
    (shutil, "rmtree", "step-1", False, 3)])
def test_killed_while_saving(run, straight, monkeypatch, capsys, holder, name, at, done, step):
    """Before and after the third checkpoint is renamed, and before an old one is deleted: the
    newest whole one goes on, and the end is bit for bit the same."""
    real = getattr(holder, name)

    def die(*args, **options):
        path = str(args[-1])
        chosen = path.endswith(f"/{at}") and (name != "rmtree" or os.path.exists(path))
        if not chosen or done:
            real(*args, **options)
        if chosen:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(holder, name, die)
        train.main([*TINY, *FORTY, f"run={run}"])
    train.main([*TINY, *FORTY_AT_ONCE, f"run={run}"])
    assert f"step {step} to 40" in capsys.readouterr().out
    assert_same_end(run, straight)
    assert states(run, "base") == ["step-39", "step-40"]


def test_sigterm_saves_and_leaves(run, straight):
    """The step in hand is finished and saved, exit status 143; the same command goes on."""
    process = start(*TINY, *FORTY, "save_every=1000", f"run={run}")
    while process.poll() is None and (not (run / "log.jsonl").exists() or not read_log(run)):
        time.sleep(0.01)
    process.terminate()
    status, out, err = finished(process)
    saved = newest(run)
    assert status == 143 and f"base: SIGTERM after step {saved} of 40, saved" in out, (out, err)
    assert 5 <= saved < 40 and states(run, "base") == [f"step-{saved}"]
    train.main([*TINY, *FORTY_AT_ONCE, f"run={run}"])
    assert_same_end(run, straight)


def test_files_that_are_missing_are_noticed_before_the_rename(run, straight, monkeypatch):
    """Another rank's file is not there after the save: one line, and the older states stay."""
    copy_state(straight, run, "")
    save = dcp.save

    def lose(tensors, checkpoint_id, process_group):
        save(tensors, checkpoint_id=checkpoint_id)
        (checkpoint_id / "__0_0.distcp").unlink()

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No such file") as error:
        patch.setattr(dcp, "save", lose)
        train.main([*TINY, *FORTY, "base.steps=41", f"run={run}"])
    assert "step-41 could not be written" in str(error.value)
    assert states(run, "base") == ["step-39", "step-40"]


@pytest.mark.parametrize("harm", ["cut", "flipped", ".metadata", "__0_0.distcp"])
def test_a_torn_checkpoint_falls_back(run, straight, capsys, harm):
    """The newest is damaged, or a file of it is gone: the one before is resumed, and said so."""
    copy_state(straight, run, "")
    torn = state(run, "base") / "step-40"
    if harm == "cut":
        os.truncate(torn / "__0_0.distcp", 100_000)
    elif harm == "flipped":
        content = bytearray((torn / ".metadata").read_bytes())
        content[20:40] = bytes(20)
        (torn / ".metadata").write_bytes(content)
    else:
        (torn / harm).unlink()
    train.main([*TINY, *FORTY, f"run={run}"])
    out = capsys.readouterr().out
    assert "step-40 is torn" in out and "step 39 to 40" in out
    assert_same_end(run, straight)              # the torn one was written anew


def test_when_all_are_torn(run, straight):
    """One line says what to delete; nothing is overwritten."""
    copy_state(straight, run, "")
    for file in run.rglob("*.distcp"):
        os.truncate(file, 100)
    with pytest.raises(ValueError, match="base.state/.* has no whole checkpoint: delete it") as e:
        train.main([*TINY, *FORTY, f"run={run}"])
    assert "\n" not in str(e.value)
    assert states(run, "base") == ["step-39", "step-40"] and not (run / "base.pt").exists()


@pytest.mark.parametrize("holder, name, words, every, left", [
    (common.Checkpoint, "save", "step-3 could not be written", 1, 2),
    (common, "save_weights", "base.pt could not be written", 39, 40)])
def test_a_full_disk(run, straight, monkeypatch, holder, name, words, every, left):
    """One line, and what was there goes on once there is room. The kernel's limit on the size of
    a file (RLIMIT_FSIZE) is the full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = getattr(holder, name)

    def fill(first, second, *more):
        if second in (3, "base"):               # the step of `save`, the stage of `save_weights`
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        real(first, second, *more)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=words) as error:
        patch.setattr(holder, name, fill)
        try:
            train.main([*TINY, *FORTY, f"save_every={every}", f"run={run}"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "is the disk full?" in str(error.value) and "\n" not in str(error.value)
    assert newest(run) == left and not list(run.glob("base.pt*"))
    assert "writing" not in states(run, "base")
    train.main([*TINY, *FORTY_AT_ONCE, f"run={run}"])
    assert_same_end(run, straight)


# ---- Latents in files ---------------------------------------------------------------------------

@pytest.fixture
def cached(run, monkeypatch):
    """The run's config, after a training that left the latents of 8 clips, three to a file."""
    monkeypatch.setattr(videos, "CLIPS_PER_FILE", 3)
    train.main([*TINY, f"run={run}", "stages=base"])
    return common.load_config([*TINY, f"run={run}"])


def test_latents_in_files_train_the_same(trained, cached, run):
    """References: the clips encoded here; training whose latents stand in one file, to the last
    bit."""
    device = torch.device("cpu")
    tae = common.load_tae(cached, device)
    latents = data.Latents(cached, tae, data.open_data(cached), device)
    batch = latents.clips.batch([7, 0, 4])
    z, captions = latents.to_z(*latents.read([7, 0, 4]))
    assert captions == batch["caption"] and latents.count == 8 and len(latents.files) == 3
    assert sys.platform != "linux" or str(run) in open("/proc/self/maps").read()     # not copied
    torch.testing.assert_close(z, data.encode(cached, tae, batch), atol=1e-3, rtol=1e-3)  # float16
    assert_equal(weights(run, "base"), weights(trained[0], "base"))


def test_writing_latents_goes_on(cached, run):
    """Whole files are kept, missing ones are made again by the next start. Reference: the files'
    own content and times."""
    first, second, third = sorted((run / "latents").glob("*.pt"))
    before = torch.load(first, weights_only=True)["z"]
    time_of_second = second.stat().st_mtime_ns
    first.rename(f"{first}.tmp")                # killed before the rename
    third.unlink()
    train.main([*TINY, f"run={run}", "stages=videojam"])
    assert torch.equal(torch.load(first, weights_only=True)["z"], before) and third.exists()
    assert second.stat().st_mtime_ns == time_of_second
    assert not list(run.glob("latents/*.tmp"))


@pytest.mark.parametrize("what, changed", [
    ("tae", []), ("file", []), ("size", ["frames=4"]), ("clips", ["data.cache=7"]),
    ("sigma", ["flow.sigma=0.2"]), ("data", ["world.texture=0.5"])])
def test_latents_of_something_else_are_refused(cached, run, monkeypatch, what, changed):
    """In one line that names it; no file is touched."""
    if what == "file":                          # of another number of clips
        monkeypatch.setattr(videos, "CLIPS_PER_FILE", 4)
    if what == "tae":
        saved = torch.load(run / "tae.pt", weights_only=True)
        saved["weights"]["statistics"] += 1
        common.save(run / "tae.pt", saved)
    (run / "base.pt").unlink()
    (run / "config.json").unlink()
    before = {path: path.read_bytes() for path in run.glob("latents/*")}
    with pytest.raises(ValueError, match=f"another {what}: found .*, expected .*; delete") as error:
        train.main([*TINY, *changed, f"run={run}", "stages=base"])
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in run.glob("latents/*")} == before
    assert len(before) == 4 and not (run / "base.pt").exists()


if __name__ == "__main__":
    as_a_rank(sys.argv[1], json.loads(sys.argv[2]))
