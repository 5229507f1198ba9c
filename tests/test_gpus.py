"""What only GPUs and many ranks need, shown without them: sizes on the device "meta", a stand-in
for the other ranks, injected errors. Two real ranks are in test_scale.py."""
import copy
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
import types
import weakref

import pytest
import torch
import torch.nn.functional as F

import common
import data
import flow
import model
import probe
import sample
import train
from conftest import TINY, folder, states

CUDA = torch.device("cuda")


def config_of(*arguments):
    return common.load_config([*arguments, "run=runs/none"])


def go(run, *arguments):
    train.main([*TINY, f"run={run}", *arguments])


@pytest.fixture
def run(trained, tmp_path, quiet):
    """A folder with a trained TAE."""
    return folder(trained, tmp_path / "run", "tae")


# -------------------------------------------------------------------------------------------------
# The large presets


@pytest.mark.parametrize("preset, gpus", [("4b", 32), ("30b", 256)])
def test_the_papers_gpus_have_work_in_every_stage(monkeypatch, preset, gpus):
    """App. C's number of GPUs: at least a clip for each, one at a time through the TAE. Where a
    batch is too small, all such stages are named before the first of them begins."""
    monkeypatch.setattr(train, "WORLD", gpus)
    config = config_of(f"preset={preset}")
    assert train.unfinished(config, common.STAGES) == list(common.STAGES)
    assert {len(rows) for rows in train.micro_batches(config, "tae")} == {1}
    config = config_of(f"preset={preset}", "tae.batch=16", "batch=8")
    with pytest.raises(ValueError) as error:
        train.unfinished(config, common.STAGES)
    assert str(error.value).count(f"clips over {gpus} ranks") == 4 and "\n" not in str(error.value)


def test_the_tae_trains_on_a_tile_at_a_random_place(run, monkeypatch):
    """Of clips of 24 frames 8 are trained on, picture and painted flow alike. Reference: the
    world's own clips, whose slices are compared."""
    (run / "tae.pt").unlink()
    seen = []
    tae_loss = train.tae_loss

    def watched(config, tae, video, noise):
        seen.append(video)
        return tae_loss(config, tae, video, noise)

    monkeypatch.setattr(train, "tae_loss", watched)
    go(run, "stages=tae", "frames=24", "tae.steps=6")
    world = data.MovingShapes(24, 16, 16)
    starts = []
    for step, video in enumerate(seen):
        assert video.shape == (2, 3, 8, 16, 16)
        for row, tile in enumerate(video):
            clip = world[2 * step + row]
            whole = flow.flow_to_rgb(clip["flow"][None], 0.1)[0] if row else clip["video"]
            gaps = [(whole[:, i:i + 8] - tile).abs().max().item() for i in range(17)]
            assert min(gaps) < 1e-5
            starts.append(gaps.index(min(gaps)))
    assert len(set(starts)) > 4


def test_fits_one_device(tmp_path, monkeypatch, capsys):
    """The report's nets in bf16 against 70 % of the card; else how to sample. Reference: 2 bytes
    times the paper's 4.9 B parameters for each of two stages, by hand."""
    for stage in ("tae", "base", "videojam"):
        (tmp_path / f"{stage}.pt").touch()

    def fits(preset, gigabytes):
        card = types.SimpleNamespace(total_memory=gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        config = common.load_config([f"preset={preset}", "precision=bf16", f"run={tmp_path}"])
        return train.fits_one_device(config, CUDA)

    assert fits("small", 2) and fits("4b", 19.7 / 0.7) and not fits("4b", 19.5 / 0.7)
    assert not fits("30b", 80)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    config = common.load_config(["preset=30b", "precision=bf16", f"run={tmp_path}"])
    train.finish(config, CUDA, "videojam")
    out = capsys.readouterr().out
    assert out.startswith("No report") and "torchrun --nproc_per_node=8 -- sample.py" in out
    assert out.count("\n") == 1
    assert train.fits_one_device(config_of("preset=30b"), torch.device("cpu"))


def peak(work):
    """The most bytes that work() allocates at a time on this CPU, by torch's profiler."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        work()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_planned_memory_of_the_tae():
    """A training step and encoding, counted without memory. Reference: torch's profiler while a
    real TAE does the same in fp32; 10 %."""
    config = config_of("preset=small", "precision=fp32", "frames=8", "tae.widths=[16,32,32,32]")
    tae = common.build_tae(config)
    video = torch.rand(2, 3, 8, 64, 64)

    def step():
        tae.reconstruct(tae.moments(video)[0]).square().mean().backward()

    def encode():
        with torch.no_grad():
            tae.encode(video)

    own = probe.parameters(tae)
    for work, training, kept in ((step, True, 20), (encode, False, 4)):
        planned = probe.tae_costs(config, 2, training)[1] - kept * own
        assert planned == pytest.approx(peak(work), rel=0.1)


class Fused(torch.autograd.Function):
    """Attention as the fused kernels of GPUs keep it: inputs and output, no N x N weights."""
    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@pytest.mark.parametrize("preset, bf16", [
    ("small", False), ("small", True), ("4b", True), ("30b", True)])
def test_planned_memory_of_the_dit(monkeypatch, preset, bf16):
    """The total of each preset as it is, with checkpointing where it has that. Reference: bytes of
    the nets on the device "meta" and what a step's two passes make there at most; 10 %."""
    monkeypatch.setattr(model.F, "scaled_dot_product_attention",
                        lambda q, k, v, attn_mask: Fused.apply(q, k, v))
    linear = F.linear
    if bf16:                            # as autocast has it, which "meta" does not know
        monkeypatch.setattr(F, "linear", lambda x, w, _: linear(x.bfloat16(), w.bfloat16()))
    precision = "bf16" if bf16 else "fp32"
    config = config_of(f"preset={preset}", f"precision={precision}", "batch=4")
    with torch.device("meta"):
        text, dit = common.build_text(config), common.build_dit(config, motion=True)
        C, *size = dit.size
        inputs = torch.empty(4, 2 * C, *size), torch.empty(4)
    with probe.Bytes() as made:
        u = dit(*inputs, *text(["x" * (config.text.length - 1)] * 4))
        before = made.peak
        u.float().square().mean().backward()
    own = 4 * sum(p.numel() for p in [*text.parameters(), *dit.parameters()])
    parts = probe.dit_memory(config, 1)
    counted = 4 * own + max(before + own, made.peak) + parts["TAE"]     # gradients come last
    assert u.is_meta and parts["TAE"] == 4 * probe.parameters(common.build_tae(config))
    assert parts["together"] == pytest.approx(counted, rel=0.1)


def test_planned_memory_of_a_shard():
    """On 32 GPUs: a 32nd of 20 bytes a parameter, and two blocks gathered in bf16 with the
    gradients of one in bf16 and in fp32. Reference: the paper's width, by hand; 1 % for text."""
    parts = probe.dit_memory(config_of("preset=4b"), 32)
    state = sum(parts[key] for key in ("weights", "gradients", "AdamW", "averaged weights"))
    block = 8 * 3072 ** 2 + 3 * 3072 * 8192
    assert state == pytest.approx(20 * 4.9e9 / 32, rel=0.01)
    assert parts["copies"] == pytest.approx(block * (2 * 2 + 2 + 4), rel=0.01)
    assert parts["together"] == sum(size for name, size in parts.items() if name != "together")


# -------------------------------------------------------------------------------------------------
# Numbers that do not depend on where the net runs


def test_a_deep_net_loses_little_by_bf16_weights():
    """32 blocks: sharded, where blocks get their weights in bf16, the error is hardly larger than
    alone, where autocast rounds them. Reference: fp32. Were the sum over the blocks in bf16, it
    would be 1.7 %."""
    torch.manual_seed(0)
    net = model.DiT(4, 2, 8, 8, 64, 32, 2, [16]).add_motion().requires_grad_(False)
    for name, p in net.named_parameters():
        if name.endswith("table") or "pos_" in name:
            torch.nn.init.normal_(p, std=0.2)
        elif p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    inputs = (torch.randn(2, 8, 2, 8, 8), torch.tensor([0.2, 0.7]), torch.randn(2, 5, 16),
              torch.ones(2, 5, dtype=torch.bool))
    u = net(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        alone, sharded = net(*inputs), copy.deepcopy(net).bfloat16()(*inputs)
    errors = [((v.float() - u).norm() / u.norm()).item() for v in (alone, sharded)]
    assert errors[0] < 0.005 and errors[1] < 0.007


def test_guidance_is_summed_in_fp32():
    """Eq. 8 of a DiT that answers in bf16. Reference: the same numbers, combined in fp32."""
    config = config_of(*TINY)
    answers = torch.randn(3, 8, 2, 4, 4).bfloat16()
    stub = types.SimpleNamespace(config=config, motion=True, device=torch.device("cpu"),
                                 dit=lambda *inputs: answers)
    s = sample.settings(stub, w_text=5, w_motion=3)
    z = torch.zeros(1, 8, 2, 4, 4)
    found = sample.guided_velocity(stub, z, torch.zeros(()), torch.zeros(2, 1, 1),
                                   torch.ones(2, 1).bool(), s, first_half=True)
    u, no_text, no_motion = answers.float().split(1)
    torch.testing.assert_close(found, 9 * u - 5 * no_text - 3 * no_motion, rtol=0, atol=1e-6)


def test_a_run_in_bf16_is_loaded_in_bf16(trained, tmp_path):
    """The matrices, as autocast rounds them anyway. Reference: the same clip from fp32 weights
    under autocast, to the last bit."""
    run = shutil.copytree(trained[0], tmp_path / "run")
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"fp32"', '"bf16"'))
    loaded = common.load_run(run, device="cpu")
    prompt = ["a red square moving up"]
    clip, _ = sample.generate(loaded, prompt, [0], bar=False)
    assert loaded.dit.blocks[0].ffn.up.weight.dtype == torch.bfloat16
    whole = common.build_nets(loaded.config, loaded.device, motion=True)
    common.load_into(whole, common.read_weights(run / "videojam.pt")["weights"], "")
    loaded.text, loaded.dit = whole.text, whole.dit
    assert whole.dit.blocks[0].ffn.up.weight.dtype == torch.float32
    assert torch.equal(sample.generate(loaded, prompt, [0], bar=False)[0], clip)


class Witness:
    """A TAE that says how many clips it gets at a time, and the type of a product there."""
    def __init__(self):
        self.statistics = torch.zeros(1)
        self.seen = set()

    def encode(self, clips, motion=False):
        self.seen.add((len(clips), (torch.ones(1, 1) @ torch.ones(1, 1)).dtype))
        return clips[:, :1]

    def decode(self, z, frames, motion=False):
        self.encode(z)
        return z


def test_the_tae_is_used_clip_by_clip_in_bf16():
    """At the paper's size one clip at a time, encoded and decoded under autocast."""
    config = config_of("preset=4b", "precision=bf16")
    assert common.clips_at_once(config) == 1 and common.clips_at_once(config_of(*TINY)) == 32
    clips = torch.zeros(3, 3, 1, 2, 2)
    stub = types.SimpleNamespace(config=config, motion=True, device=torch.device("cpu"))
    for work in ("encode", "through_tae", "decode"):
        stub.tae = Witness()
        if work == "encode":
            data.encode(config, stub.tae, dict(video=clips, flow=clips[:, :2]))
        elif work == "through_tae":
            data.through_tae(config, stub.tae, clips)
        else:
            sample.decode(stub, torch.zeros(3, 32, 1, 2, 2))
        assert stub.tae.seen == {(1, torch.bfloat16)}, work


@pytest.mark.parametrize("name, world, expected", [
    ("", 4, "cuda:3"), ("cuda", 4, "cuda:3"), ("cuda:1", 4, "cuda:3"), ("cpu", 4, "cpu"),
    ("cuda", 1, "cuda:3"), ("", 1, "cuda:0"), ("cuda:1", 1, "cuda:1")])
def test_the_device_has_an_index(monkeypatch, name, world, expected):
    """On a machine with four GPUs, for the fourth of the ranks there, or for one process."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(common, "WORLD", world)
    monkeypatch.setattr(common, "LOCAL_RANK", 3)
    assert str(common.find_device(name)) == expected
    with pytest.raises(ValueError, match="found device=tpu, expected one of cuda:0"):
        common.find_device("tpu")


def test_text_of_one_length():
    """As on CUDA: padded to text.length, whatever the prompts. Reference: the features of the same
    prompts padded to the longest."""
    text = model.ByteText(8, 1, 2, 16)
    ids = [[100, 101, 102, 1] + 12 * [0], [1] + 15 * [0]]
    assert text.tokenize(["abc", ""], 16).tolist() == ids
    short = text(["abc", ""])[0]
    text.tokenize = lambda prompts, least: model.ByteText.tokenize(text, prompts, 16)
    features, mask = text(["abc", ""])
    assert mask.sum(1).tolist() == [4, 1]
    torch.testing.assert_close(features[:, :4], short)


@pytest.mark.parametrize("side, frames, most", [(256, 14, 12), (1024, 5, 3), (1536, 3, 1)])
def test_pairs_of_raft_stay_below_cudnns_limit(side, frames, most):
    """Fewer than 65,536 cells of 8 x 8 pixels at once. Reference: counting them."""
    asked = []

    def raft(frame1, frame2, iters):
        asked.append(len(frame1))
        return frame1[:, :2]

    flow.estimate_flow(torch.zeros(1, 3, frames, side, side), raft)
    assert sum(asked) == frames - 1 and max(asked) == most
    assert most * (side // 8) ** 2 < 65536


def test_convolutions_get_the_channels_last():
    """On the way up as well, also where interpolation would return another layout, as on CUDA."""
    up = model.Up(8, 4, 2, 2)
    seen = []
    up.conv.register_forward_pre_hook(lambda conv, inputs: seen.append(inputs[0]))
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        up(torch.randn(1, 8, 2, 4, 4).contiguous(memory_format=layout))
    assert all(x.is_contiguous(memory_format=torch.channels_last_3d) for x in seen)


# -------------------------------------------------------------------------------------------------
# Steps that do not wait


def test_reading_ahead_changes_no_number(trained, run, monkeypatch):
    """A training whose batches a thread reads two steps ahead. Reference: the one without."""
    read_ahead = common.read_ahead
    threads = set()

    def ahead(read, cuts, steps, depth):
        def watched(step, rows):
            threads.add(threading.current_thread())
            return read(step, rows)
        return read_ahead(watched, cuts, steps, depth=2)

    monkeypatch.setattr(common, "read_ahead", ahead)
    go(run, "stages=base,videojam")
    assert threading.main_thread() not in threads and len(threads) == 2
    for stage in ("base", "videojam"):
        saved, other = [common.read_weights(f"{path}/{stage}.pt") for path in (run, trained[0])]
        assert all(torch.equal(w, other["weights"][name]) for name, w in saved["weights"].items())


def test_two_steps_are_read_ahead():
    """While step k is worked on, k + 1 and k + 2 are there. An error is raised at its own step."""
    done = []

    def read(step, rows):
        if step == 4:
            raise ValueError("step 4")
        done.append(step)
        return step, rows

    steps = common.read_ahead(read, [[0], [1]], range(5), depth=2)
    assert next(steps) == [(0, [0]), (0, [1])]
    while len(done) < 6:
        time.sleep(0.001)
    time.sleep(0.05)
    assert done == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="step 4"):
        list(steps)


@pytest.fixture
def others(monkeypatch):
    """As if there were other ranks: a list of the tensors that were summed over them."""
    summed = []
    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(common, "together", lambda: True)
    monkeypatch.setattr(common.dist, "all_reduce", lambda x, *op: summed.append(x.clone()))
    return summed


def test_one_all_reduce_for_all_gradients(others):
    """Of a net that is whole on every rank. Reference: halves, as the stand-in adds nothing."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(2, 5))
    net.to(memory_format=torch.channels_last)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    before = [p.grad.clone() for p in net.parameters()]
    common.average_and_limit_gradients(net, 1e9)
    assert [len(x) for x in others] == [sum(grad.numel() for grad in before)]
    for p, grad in zip(net.parameters(), before):
        torch.testing.assert_close(p.grad, grad / 2)


def test_the_ranks_ask_each_other_once_a_step(others):
    """Everything in one tensor, whose largest values are read when they are wanted."""
    answers = common.ask_all(torch.tensor(3.0), True, False)
    assert [x.tolist() for x in others] == [[3, 1, 0]] and answers() == [3, 1, 0]


@pytest.mark.parametrize("terminal, seconds", [(True, 0.5), (False, 30)])
def test_the_bar_is_redrawn_rarely(monkeypatch, terminal, seconds):
    """Twice a second, or in a file twice a minute."""
    monkeypatch.setattr(common.sys.stderr, "isatty", lambda: terminal)
    bar = common.progress(range(3), "a bar", leave=False)
    assert bar.mininterval == bar.maxinterval == seconds
    bar.close()


# -------------------------------------------------------------------------------------------------
# Long runs


@pytest.mark.parametrize("device, version", [("cpu", "2.8.1"), ("cuda:0", "2.7.1"),
                                             ("cpu", "2.9.0"), ("cuda:0", "2.8.0")])
def test_start(monkeypatch, device, version):
    """Several ranks give up after torch's ten minutes, but wait for hours where one of them writes;
    too old a torch is refused, and cuDNN's attention stays off. Reference: torch's own calls."""
    calls = {}

    def record(module, name):
        monkeypatch.setattr(module, name, lambda *args, **more: calls.update({name: (args, more)}))

    for module, name in ((torch.cuda, "set_device"), (torch.backends.cuda, "enable_cudnn_sdp"),
                         (common.dist, "init_process_group"), (common.dist, "new_group")):
        record(module, name)
    monkeypatch.setattr(common, "PATIENT", None)
    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(common, "find_device", torch.device)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    precision = torch.get_float32_matmul_precision()
    old = version in ("2.8.1", "2.7.1")
    if old:
        least = "2.9" if device == "cpu" else "2.8"
        with pytest.raises(ValueError, match=f"found torch {version}, expected {least} for sev"):
            common.start(device)
    else:
        assert common.start(device) == torch.device(device)
        assert calls["init_process_group"] == (("gloo" if device == "cpu" else "nccl",), {})
        assert calls["new_group"][1]["timeout"].total_seconds() > 3600
    torch.set_float32_matmul_precision(precision)
    if device == "cuda:0":
        assert calls["set_device"] == ((torch.device("cuda:0"),), {})
        assert calls["enable_cudnn_sdp"] == ((False,), {})


def test_nothing_is_missed_in_a_last_step(run, monkeypatch, capsys):
    """SIGTERM in the last of two steps: the state is saved, the next stage does not begin, and the
    same command finishes. Reference: a run that nobody stopped has these weights too."""
    draw = train.draw

    def draw_and_be_told(config, step, row, shape):
        if step == 1 and row == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(config, step, row, shape)

    with monkeypatch.context() as patch:
        patch.setattr(train, "draw", draw_and_be_told)
        with pytest.raises(common.Stopped, match="SIGTERM after step 2 of 2, saved"):
            go(run, "stages=base,videojam")
    assert not (run / "base.pt").exists() and states(run, "base") == ["step-1", "step-2"]
    go(run, "stages=base,videojam")
    assert "base: 0.05 M parameters, step 2 to 2" in capsys.readouterr().out


def test_states_are_saved_by_minutes_too(run):
    """save_minutes=0: a save after every step that has heard of it, though save_every is large."""
    go(run, "stages=base", "base.steps=4", "save_every=99", "save_minutes=0")
    assert states(run, "base") == ["step-3", "step-4"]


def test_a_sheet_that_fails_does_not_end_the_training(run, monkeypatch, capsys):
    """No room for pictures: one line, and the weights are there."""
    def full(*args):
        raise OSError("no space left")

    monkeypatch.undo()                                  # with samples, this time
    monkeypatch.setattr(common, "write_clips", full)
    monkeypatch.setitem(sys.modules, "probe", types.SimpleNamespace(main=print))
    go(run, "stages=base")
    assert "base-2.mp4 could not be written, training goes on (no space left)" in \
        capsys.readouterr().out
    assert (run / "base.pt").exists()


def test_optimizer_and_net_are_gone_before_the_report(run, monkeypatch):
    """Else the report would need the memory of the training as well. Reference: weak references."""
    made = []
    make_optimizer = train.make_optimizer

    def make(config, net, lr):
        optimizer = make_optimizer(config, net, lr)
        made.extend([weakref.ref(optimizer), weakref.ref(net)])
        net.__dict__["cycle"] = net                     # as sharded and compiled nets have them
        return optimizer

    def report(arguments):
        made.append([ref() for ref in made])

    monkeypatch.setattr(train, "make_optimizer", make)
    monkeypatch.setitem(sys.modules, "probe", types.SimpleNamespace(main=report))
    go(run, "stages=base,videojam")
    assert made[-1] == [None] * 4


def test_patience_with_files_of_others(monkeypatch):
    """Several ranks: tried again after 5, 15 and 40 seconds, then the error. Alone: at once."""
    waits, calls = [], []
    monkeypatch.setattr(common.time, "sleep", waits.append)

    def read(until):
        calls.append(1)
        if len(calls) < until:
            raise OSError("not there")
        return "content"

    with pytest.raises(OSError):
        common.patiently(read, 2)
    assert (len(calls), waits) == (1, [])
    monkeypatch.setattr(common, "together", lambda: True)
    assert common.patiently(read, 4) == "content" and waits == [5, 15]
    with pytest.raises(OSError):
        common.patiently(read, 99)
    assert waits == [5, 15, 5, 15, 40]


@pytest.mark.parametrize("setting, compiler, version, compiled", [
    ("auto", "gcc", "2.12.0", True), ("auto", None, "2.12.0", False),
    ("auto", "gcc", "2.9.1", False), ("never", "gcc", "2.12.0", False),
    ("always", None, "2.12.0", True)])
def test_compile_auto(monkeypatch, capsys, tmp_path, setting, compiler, version, compiled):
    """On CUDA with triton, Python.h and a C compiler, with checkpointing from torch 2.12 on; else
    says why not, or refuses before the run has a folder."""
    config = config_of("checkpointing=true", f"compile={setting}")
    monkeypatch.setattr(shutil, "which", lambda name: compiler if name == "gcc" else None)
    monkeypatch.setattr(common, "find_spec", lambda name: name)
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: path.name == "Python.h")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    assert common.compiles(config, CUDA) == compiled
    said = "not compiled, slower" in capsys.readouterr().out
    assert said == (setting == "auto" and not compiled)
    assert not common.compiles(config_of(), torch.device("cpu"))
    if version == "2.9.1":
        config = config_of("checkpointing=true", "compile=always")
        with pytest.raises(ValueError, match="compile=always checkpointing=true and torch 2.9"):
            common.compiles(config, CUDA)
        with pytest.raises(ValueError, match="expected 2.12"):
            go(tmp_path / "run", "checkpointing=true", "compile=always")
        assert not (tmp_path / "run").exists()
