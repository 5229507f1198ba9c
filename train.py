"""Training: the TAE, then the base DiT (Eqs. 1-4), then VideoJAM (sec. 4.2, Eq. 6, and the drops of sec. 4.3).

    python train.py                                          # some minutes on a CPU: everything, then samples and a report
    python train.py preset=small                             # one GPU
    torchrun --nproc_per_node=8 train.py preset=small        # the same global batch, split; weights and optimizer sharded (FSDP2)
    python train.py preset=30b plan=true                     # parameters, memory and time, before the bill
    python train.py data.root=videos flow.weights=raft_small.pth run=runs/mine

Stages run in order and leave one weights file each in the run folder; finished ones are skipped, interrupted ones resumed.

Letters: x appearance latent, d motion latent, both (B, C, T, H, W); z = [x, d] (B, 2C, T, H, W); 0 noise, 1 data; t (B,) in [0, 1];
u prediction, v its target, the velocity; keep (B,) True where motion was not dropped; N video and L text tokens of width D.
"""
import contextlib
import datetime
import functools
import gc
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import time
import types
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import common
import data
import flow
import sample

STAGES = ("tae", "base", "control", "videojam")
MAY_CHANGE = ("stages", "device", "plan", "gpus", "utilisation", "tflops", "run", "micro_batch", "checkpointing", "compile", "log_every",
              "save_every", "keep_states", "sample_every", "tae.steps", "base.steps", "videojam.steps")


# ---------------------------------------------------------------------------------------------------------------------
# The equations.

def per_clip(t, like):
    return t.view(-1, *[1] * (like.dim() - 1))


# Eq. 1
def interpolate(x1, x0, t):
    """x_t = t x_1 + (1 - t) x_0; x1 data, x0 noise (B, ...), t (B,)."""
    t = per_clip(t, x1)
    return t * x1 + (1 - t) * x0


# Eq. 2
def velocity(x1, x0):
    """v = dx_t / dt = x_1 - x_0."""
    return x1 - x0


def mse(u, v):
    """Squared error of each clip, a mean over its own numbers: (B, ...) -> (B,)."""
    return (u - v).float().square().flatten(1).mean(1)


# Eq. 6 with the mask of sec. 4.3 (camera-ready): where motion is dropped the loss counts appearance only.
def joint_loss(u, v, keep):
    """u, v (B, 2C, T, H, W), keep (B,) bool -> scalar: mean over the clips of mse_x + keep * mse_d (README, choice 7)."""
    (ux, ud), (vx, vd) = u.chunk(2, dim=1), v.chunk(2, dim=1)
    return (mse(ux, vx) + keep * mse(ud, vd)).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Everything random is a function of (seed, step, index in the global batch), so it is the same on any machine and number of ranks.

def draw(seed, step, index, shape, drop_text=0.3, drop_motion=0.2, t_mean=0.0):
    """One sample's randomness: logit-normal t (Movie Gen), noise of `shape` (2C, T, H, W), keep_text, keep_motion (sec. 4.3)."""
    g = common.generator(seed, step, index)
    t = (t_mean + torch.randn((), generator=g)).sigmoid()
    keep_text = torch.rand((), generator=g) >= drop_text
    keep_motion = torch.rand((), generator=g) >= drop_motion
    return t, torch.randn(shape, generator=g), keep_text, keep_motion


@functools.lru_cache(maxsize=2)
def shuffled(seed, epoch, n):
    return torch.randperm(n, generator=common.generator(seed, "epoch", epoch)).tolist()


def clip_index(seed, position, n):
    """Which clip stands at this place of the endless training order: fresh ones for n = 0, else n clips shuffled anew per epoch."""
    return position if n == 0 else shuffled(seed, position // n, n)[position % n]


# ---------------------------------------------------------------------------------------------------------------------
# The state of training, and one step of it.

def prepare(config, parts, lr):
    """Parts (name -> net) -> net, params, optimizer, weights, ema, and `tensors`: all of it by name, what a checkpoint holds."""
    net = nn.ModuleDict(parts).train()
    scales = {"text": config["text"]["lr"]}                                     # an embedding of bytes forgets its text at the DiT's rate
    groups = [dict(params=list(part.parameters()), lr_scale=scales.get(name, 1.0)) for name, part in net.items()]
    params = dict(net.named_parameters())
    device = next(iter(params.values())).device
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=config["weight_decay"], fused=fused)
    where = device if fused else "cpu"
    for p in params.values():                                                   # DCP loads in place; AdamW has no state before its first step
        optimizer.state[p] = dict(step=torch.zeros((), device=where), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    weights = dict(net.state_dict(keep_vars=True))                              # the live tensors; detached ones FSDP may leave behind
    ema = {name: w.detach().clone() for name, w in weights.items()}
    moments = {key: {name: optimizer.state[p][key] for name, p in params.items()} for key in ("exp_avg", "exp_avg_sq")}
    tensors = dict(net=weights, ema=ema, **moments)
    return types.SimpleNamespace(net=net, params=params, optimizer=optimizer, weights=weights, ema=ema, device=device, tensors=tensors)


def micro_batches(config, batch):
    """This rank's samples of the global batch, cut for gradient accumulation: as many cuts on every rank, as their collectives meet in each."""
    rows, largest = list(range(common.RANK, batch, common.WORLD)), math.ceil(batch / common.WORLD)
    n = math.ceil(largest / (config["micro_batch"] or largest))
    if n > batch // common.WORLD:
        raise ValueError(f"batch={batch} over {common.WORLD} ranks in micro-batches of {config['micro_batch']}: some ranks have {batch // common.WORLD} clips "
                         f"for {n} micro-batches, expected a clip for each: take another micro_batch or number of ranks")
    return [rows[i::n] for i in range(n)]


def tally(x, counted):
    """Sum of x (B,) over the clips that are counted, and their number: (2,); counted (B,), or (B, 10), one column per tenth of t: (2, 10)."""
    return torch.stack([x.detach() @ counted.float(), counted.float().sum(0)])


def add(totals, new):
    for name, value in new.items():
        totals[name] = totals.get(name, 0) + value


def gradient(config, state, loss_of, step, micro, batch, sigterm=()):
    """Gradient of the global batch, clipped, in the parameters' .grad; micro-batches and ranks add up because the loss is linear in samples.

    Returns {name: sum and count over the global batch (2, 1 or 10)} on the CPU, how many ranks got SIGTERM, the gradient's norm.
    """
    sharded = any(isinstance(p, DTensor) for p in state.params.values())
    sums = {}
    for rows in micro:
        with common.kernels(config, state.device):
            loss, new = loss_of(step, rows)
            share = len(rows) / batch                                           # of the mean over the global batch
            (loss * share * (common.WORLD if sharded else 1)).backward()        # FSDP averages over the ranks; we want their sum
        add(sums, new)
    for p in state.params.values():                                             # probe.py speed leaves two out; all ranks reduce the same list
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    stop = torch.tensor([float(len(sigterm))], device=state.device)             # rides along: no collective of its own
    flat = torch.cat([value.flatten() for value in sums.values()] + [stop])
    common.sum_over_ranks([flat] + [p.grad for p in state.params.values() if not sharded])      # the TAE: whole on every rank, plain data parallel
    norm = nn.utils.clip_grad_norm_(state.params.values(), config["clip"])
    *values, stop = flat.cpu().double().split([value.numel() for value in sums.values()] + [1])
    return {name: value.view(2, -1) for name, value in zip(sums, values)}, stop.item(), (norm.full_tensor() if sharded else norm).item()


@torch.no_grad()
def update(config, state, step, lr):
    """AdamW, then the average of the weights (EMA)."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    decay = min(config["ema"], (1 + step) / (10 + step))                        # warm-up, or the average would be the noise of the start
    torch._foreach_lerp_(list(state.ema.values()), [state.weights[name] for name in state.ema], 1 - decay)


@torch.no_grad()
def swap(state):
    """Exchange the weights and their average, tensor by tensor; once more to undo."""
    for name, w in state.weights.items():
        kept = w.clone()
        w.copy_(state.ema[name])
        state.ema[name].copy_(kept)


# ---------------------------------------------------------------------------------------------------------------------
# The one training loop, for the TAE and for the DiT.

class Stopped(Exception):
    """SIGTERM came; the state is saved."""


def fit(config, stage, parts, loss_of, steps, batch, lr, parent="", look=lambda net, step: None):
    """Train `parts` (name -> net) by AdamW up to `steps` -> the net with its averaged weights.

    loss_of(step, rows) -> mean loss over these rows of the global batch, {name: sum and count over the rows, (2,) or per tenth of t (2, 10)}.
    Resumes from <run>/<stage>.state. ValueError at the first loss that is not finite, leaving the last state as it was; Stopped after a SIGTERM.
    """
    run = pathlib.Path(config["run"])
    folder = run / f"{stage}.state"
    state = prepare(config, parts, lr)
    step = common.load_state(folder, state, parent)
    if step > steps:
        raise ValueError(f"{folder} is at step {step}, beyond {stage}.steps={steps}: ask for at least as many, or take a new run folder")
    if step:
        common.print0(f"{stage}: resumed at step {step}")
    if common.RANK == 0:
        forget_lines(run / "log.jsonl", stage, step)
        for old in folder.glob("*.tmp"):                                        # saves that were killed
            shutil.rmtree(old, ignore_errors=True)
    micro = micro_batches(config, batch)
    common.print0(f"{stage}: {count(state.net) / 1e6:.2f} M parameters, {steps} steps of {batch} = {common.WORLD} ranks x "
           f"{len(micro)} micro-batches x {len(micro[0])} clips")
    totals, start, first, stop = {}, time.time(), step, False                   # of the log's next line
    with sigterm() as came, tqdm(total=steps, initial=step, desc=f"{stage:>8}", unit="step", disable=common.RANK > 0, dynamic_ncols=True) as bar:
        while step < steps and not stop:
            sums, stop, norm = gradient(config, state, loss_of, step, micro, batch, came)       # all ranks know of a SIGTERM in the same step
            if not (math.isfinite(sums["loss"][0]) and math.isfinite(norm)):    # stop before anything is spoilt
                bar.close()
                raise ValueError(f"{stage}: the loss or its gradient is not finite at step {step}; {folder} is as it was: "
                                 f"lower {stage}.lr or set another seed")
            # linear warm-up, constant, linear cool-down; the paper's is constant throughout
            lr_now = lr * min(1, (step + 1) / (config["warmup"] + 1), (steps - step) / max(config["cooldown"] * steps, 1))
            update(config, state, step, lr_now)
            step += 1
            # ---- log, save, look
            add(totals, sums)
            total, clips = totals["loss"]
            bar.set_postfix(loss=f"{(total / clips).item():.4f}")
            bar.update()
            if step % config["log_every"] == 0 or step == steps:
                seconds = (time.time() - start) / (step - first)
                if common.RANK == 0:
                    log_line(run, stage, step, totals, lr=lr_now, grad_norm=round(norm, 4),
                             clips_per_s=round(batch / seconds, 2), seconds_per_step=round(seconds, 4))
                totals, start, first = {}, time.time(), step
            if step % config["save_every"] == 0 or step == steps or stop:
                common.save_state(folder, state, step, parent, config["keep_states"])
            if config["sample_every"] and step % config["sample_every"] == 0 and step < steps and not stop:
                swap(state)
                look(state.net.eval(), step)
                state.net.train()
                swap(state)
    late = torch.tensor(float(len(came)), device=state.device)                  # SIGTERM in the last step, after it was asked for
    common.sum_over_ranks([late])
    if stop or late > 0:
        raise Stopped(f"{stage}: SIGTERM at step {step} of {steps}, saved in {folder}; the same command goes on")
    swap(state)
    return state.net.eval().requires_grad_(False)


@contextlib.contextmanager
def sigterm():
    """A list that has an entry once SIGTERM has come: schedulers send it some time before they kill."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def forget_lines(path, stage, step):
    """Drop the log's lines of a stage's steps that are about to be taken again."""
    if path.exists():
        complete = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]  # a kill may have torn the last
        lines = [line for line in complete if (got := json.loads(line))["stage"] != stage or got["step"] <= step]
        path.with_suffix(".tmp").write_text("".join(lines))
        os.replace(path.with_suffix(".tmp"), path)


def log_line(run, stage, step, sums, **rest):
    """Append one JSON line: means over the interval, of the whole or per tenth of t (None where there was no clip), and the rest."""
    line = dict(stage=stage, step=step)
    for name, (total, count) in sums.items():
        means = [round(mean, 5) if n else None for mean, n in zip((total / count).tolist(), count.tolist())]
        line[name] = means if len(means) > 1 else means[0]
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps({**line, **rest}) + "\n")


def finish(config, stage, net, step, parent="", tae=""):
    """<run>/<stage>.pt: plain averaged weights that torch.load(weights_only=True) reads, with config, checksum, the parent's and the TAE's."""
    weights = {}
    for name, w in net.state_dict().items():
        w = w.full_tensor() if isinstance(w, DTensor) else w                    # one at a time, and rank 0 alone keeps them, in its RAM
        if common.RANK == 0:
            weights[name] = w.cpu()
    if common.RANK == 0:
        about = dict(stage=stage, step=step, config=json.dumps(config), checksum=common.checksum(weights), parent=parent, tae=tae)
        common.save(pathlib.Path(config["run"]) / f"{stage}.pt", {**about, "weights": weights})
    common.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: the TAE (App. C, Movie Gen). Half of each batch is painted optical flow, so that one net serves both streams.

def tae_loss(video, tae, config, noise):
    """L1 + l2 MSE + a small KL + the outlier penalty; video (B, 3, T, H, W) -> (B,) reconstruction and regulariser."""
    c = config["tae"]
    mean, logvar = tae.moments(video)
    again = tae.reconstruct(mean + (0.5 * logvar).exp() * noise)[:, :, :video.shape[2]]
    error = (again - video).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)
    m, s = mean.mean((2, 3, 4), keepdim=True), mean.std((2, 3, 4), keepdim=True)
    outlier = ((mean - m).norm(dim=1) - 3 * s.norm(dim=1)).clamp(min=0).flatten(1).mean(1)
    return error.abs().flatten(1).mean(1) + c["l2"] * error.square().flatten(1).mean(1), c["kl"] * kl + c["outlier"] * outlier, error


def train_tae(config, clips, device):
    seed, batch, sigma = config["seed"], config["tae"]["batch"], config["flow"]["sigma"]
    tae = common.build_tae(config).to(device, memory_format=torch.channels_last)
    n = len(clips) if config["data"]["root"] else 0
    size = common.latent_size(config)

    def loss_of(step, rows):
        position = [step * batch + row for row in rows]
        got = clips.batch([clip_index(seed, p, n) for p in position], device)
        painted = torch.tensor([row % 2 == 1 for row in rows], device=device)
        video = got["video"]                                                    # this step's own: half of it is painted over
        video[painted] = flow.flow_to_rgb(got["flow"][painted], sigma)
        noise = torch.stack([torch.randn(size, generator=common.generator(seed, step, row)) for row in rows]).to(device)
        with common.precision(config, device):
            rec, reg, error = tae_loss(video, tae, config, noise)
        loss = torch.where(painted, config["tae"]["motion"], 1.0) * rec + reg
        square = error.square().flatten(1).mean(1)
        return loss.mean(), dict(loss=tally(loss, torch.ones_like(loss)), mse_x=tally(square, ~painted), mse_d=tally(square, painted))

    tae = fit(config, "tae", {"tae": tae}, loss_of, config["tae"]["steps"], batch, config["tae"]["lr"])["tae"]              # whole on every rank
    tae.statistics.copy_(measure_statistics(tae, clips, config, device))        # choice 3: measured once, stored with the weights
    finish(config, "tae", tae, config["tae"]["steps"])
    if common.RANK == 0:                                                        # look: three clips, and what the TAE makes of them
        got = clips.batch(range(min(3, n or 3)), device)
        video, rgb = got["video"], flow.flow_to_rgb(got["flow"], sigma)
        video2, rgb2 = sample.reconstruct(types.SimpleNamespace(tae=tae, device=device), video, rgb)
        path = pathlib.Path(config["run"]) / "samples" / "reconstruction.png"
        common.write_sheet(path, [clip for four in zip(video, video2, rgb, rgb2) for clip in four])
        common.print0(f"tae: {path}: clip, reconstruction, motion, reconstruction")


@torch.no_grad()
def measure_statistics(tae, clips, config, device, count=256):
    """Mean and standard deviation per channel of either stream's latents, over `count` training clips: (2, 2, C). The TAE's own are still 0 and 1."""
    n = len(clips) if config["data"]["root"] else count
    chunks = [data.encode(tae, clips.batch(chunk, device), config["flow"]["sigma"]).cpu() for chunk in data.in_chunks(0, min(n, count), config)]
    streams = torch.cat(chunks).chunk(2, dim=1)                                 # 2 x (n, C, T, H, W)
    return torch.stack([torch.stack([z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4)).clamp(min=1e-6)]) for z in streams])


# ---------------------------------------------------------------------------------------------------------------------
# Stages 2 and 3: the DiT on latents. `base` and `control` are Eq. 3, `videojam` is Eq. 6.

def dit_loss(config, parts, motion, latents, n, device, first=0):
    """The loss_of of `fit` for the DiT: Eq. 6 with motion, else Eq. 3; first: steps before this stage.

    latents(list of numbers of n clips, 0: endless) -> z, captions, stored features.
    """
    seed, batch, C = config["seed"], config["batch"], common.latent_size(config)[0]
    text, dit = parts["text"], parts["dit"]
    empty = functools.cache(lambda: text([""]))                                 # used where the encoders are frozen

    def loss_of(step, rows):
        step += first
        z1, captions, stored = latents([clip_index(seed, step * batch + row, n) for row in rows])
        z1 = z1.to(device)
        drawn = [draw(seed, step, row, z1.shape[1:], config["drop_text"], config["drop_motion"], config["t_mean"]) for row in rows]
        t, z0, keep_text, keep = map(torch.stack, zip(*drawn))
        t, z0, keep = t.to(device), z0.to(device), keep.to(device)
        if not motion:
            z1, z0 = z1[:, :C], z0[:, :C]                                       # the control sees the very noise that VideoJAM sees
        zt, v = interpolate(z1, z0, t), velocity(z1, z0)                        # Eqs. 1, 2: each stream its own noise, one shared t
        if motion:
            zt = torch.cat([zt[:, :C], zt[:, C:] * per_clip(keep, zt)], dim=1)  # dropped: d_t = 0 exactly, after the noising
        with common.precision(config, device):                                  # the nets alone: RAFT and the data stay in fp32
            u = dit(zt, t, *features(text, captions, keep_text, stored, empty))
        loss = joint_loss(u, v, keep) if motion else mse(u, v).mean()           # Eq. 6, or Eq. 3
        # what is logged
        loss_x, everyone = mse(u[:, :C], v[:, :C]), torch.ones_like(t)
        sums = dict(loss=tally(loss.expand(len(t)), everyone), loss_x=tally(loss_x, everyone))
        if motion:
            sums["loss_d"] = tally(mse(u[:, C:], v[:, C:]), keep)
        sums["loss_x_by_t"] = tally(loss_x, nn.functional.one_hot((t * 10).long().clamp(max=9), 10))
        return loss, sums
    return loss_of


def features(text, captions, keep, stored, empty):
    """Text features and mask of a batch, those of "" where the text is dropped (sec. 4.3).

    stored: those of frozen encoders, from <run>/latents; empty() those of "".
    """
    if stored is None:
        return text([caption if kept else "" for caption, kept in zip(captions, keep.tolist())])
    return tuple([torch.where(per_clip(keep.to(n.device), n), f.to(n), n) for f, n in zip(*pair)] for pair in zip(stored, empty()))


def train_dit(config, stage, latents, device):
    run, motion, first = pathlib.Path(config["run"]), stage == "videojam", 0
    parts = common.build_sharded(config, device, motion)                        # sec. 4.2: with `motion` the two layers are widened; all weights are trained
    tae = parent = common.read_weights(run / "tae.pt")["checksum"]
    steps, lr = (config["base" if stage == "base" else "videojam"][key] for key in ("steps", "lr"))
    if stage != "base":                                                         # control and videojam go on from the base, on the same new clips
        saved = common.read_weights(run / "base.pt")
        parent, first = saved["checksum"], saved["step"]
        widened = [f"dit.{name}" for name in parts["dit"].state_dict() if name.startswith("motion_")]
        common.load_into(nn.ModuleDict(parts), saved["weights"], run / "base.pt", new=widened)
    look = functools.partial(write_samples, config, stage, latents)
    loss_of = dit_loss(config, parts, motion, latents, latents.n, device, first)
    net = fit(config, stage, parts, loss_of, steps, config["batch"], lr, parent, look)
    finish(config, stage, net, steps, parent, tae)
    look(net, steps)


def write_samples(config, stage, latents, net, step):
    """Four prompts in <run>/samples: a sheet and a clip, the predicted motion beside the appearance. All ranks sample, as FSDP gathers weights in each forward; rank 0 writes."""
    model = types.SimpleNamespace(config=config, tae=latents.tae, text=net["text"], dit=net["dit"], motion=stage == "videojam", device=latents.device)
    prompts = latents.clips.prompts()[:4]
    with common.precision(config, latents.device):                              # sharded weights are gathered in bf16, their inputs must be too
        video, motion = sample.generate(model, prompts, range(len(prompts)), bar=common.RANK == 0)
    if common.RANK > 0:
        return
    path = pathlib.Path(config["run"]) / "samples" / f"{stage}-{step}.png"
    common.write_sheet(path, common.interleave(video, motion))
    stack = lambda clips: None if clips is None else torch.cat(list(clips), dim=2)              # one below the other
    common.write_video(path.with_suffix(".mp4"), stack(video), config["fps"], stack(motion), least=128 * len(prompts))
    common.print0(f"{stage}: {path} and .mp4: " + " | ".join(prompts))


# ---------------------------------------------------------------------------------------------------------------------

def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def kept_bytes(N, L, D, hidden, itemsize, stream, mode):
    """What autograd keeps of one block for one clip: N video and L text tokens of width D; bytes per number of its products and of its input (the residual stream).

    Of N D numbers each: the residual stream before each norm, and 11 of inputs and outputs of products (q, k, v, what attention makes of them, ...);
    2 N hidden in SwiGLU. Counted with the flash kernel, so without scores, and without compile, which keeps less: tests/test_scale.py compares with autograd.
    """
    everything = N * D * (3 * stream + 11 * itemsize) + 2 * itemsize * N * hidden + 3 * itemsize * L * D
    return {"none": everything, "attention": N * D * (stream + 2 * itemsize), "full": N * D * stream}[mode]


def plan_memory(config):
    """Bytes per GPU of training the joint net on config["gpus"] GPUs, by what takes them, without allocating any."""
    with torch.device("meta"):
        text, dit = common.build_text(config), common.build_dit(config, motion=True)
    C, T, H, W = common.latent_size(config)
    gpus, itemsize, mode = config["gpus"], 4 if config["precision"] == "fp32" else 2, config["checkpointing"]
    block, parameters = count(dit.blocks[0]), count(text, dit)
    clips = math.ceil(config["batch"] / gpus)
    clips = min(config["micro_batch"] or clips, clips)
    sizes = T * H * W // dit.patch ** 2, config["text"]["length"] * len(dit.text_in), config["dit"]["dim"], dit.blocks[0].ffn.down.in_features, itemsize, itemsize if gpus > 1 else 4
    kept = len(dit.blocks) * kept_bytes(*sizes, mode) + (mode != "none") * kept_bytes(*sizes, "none")       # and of the block that is being computed again
    memory = {"weights": 4 * parameters / gpus, "gradients": 4 * parameters / gpus, "AdamW": 8 * parameters / gpus, "EMA": 4 * parameters / gpus, "activations": clips * kept}
    if gpus > 1:            # all-gathered: what is outside the blocks, this block and the next; and this block's gradient before it is reduce-scattered
        memory["gathered"] = itemsize * (parameters - count(*dit.blocks) + 2 * block) + (itemsize + 4) * block
    elif itemsize == 2:     # autocast's copies of the weights: all live until the forward pass ends, or one block's at a time
        memory["bf16 copies"] = 2 * (parameters if mode == "none" else block)
    return {**memory, "together": sum(memory.values())}


def plan(config):
    """plan=true: parameters, FLOPs, time and memory of the DiT's training on config["gpus"] GPUs; computed on the meta device, in seconds."""
    with torch.device("meta"):
        tae, text, dit = common.build_tae(config), common.build_text(config), common.build_dit(config, motion=True)
        video = torch.empty(1, 3, config["frames"], config["height"], config["width"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tae.encode(video)
    (C, T, H, W), gpus = common.latent_size(config), config["gpus"]
    parts = {"TAE": [tae], "text": [text], "DiT": [dit], "  attention": [b.attn for b in dit.blocks], "  cross-attention": [b.cross for b in dit.blocks],
             "  feed-forward": [b.ffn for b in dit.blocks], "  time, modulation": [dit.time, dit.modulation], "  text in": [dit.text_in],
             "  patches, x": [dit.patch_in, dit.patch_out], "  patches, d": [dit.motion_in, dit.motion_out]}
    common.print0(f"{config['preset']}: {config['frames']} frames of {config['height']}x{config['width']}, latents {C} x {T} x {H} x {W}, {T * H * W // dit.patch ** 2} tokens a clip")
    common.print0("\nparameters")
    for name, modules in parts.items():
        n = count(*modules)
        common.print0(f"  {name:<20}{f'{n / 1e9:.2f} B' if n >= 1e9 else f'{n / 1e6:.2f} M':>12}")
    step = 3 * common.flops(config, motion=True) * config["batch"]              # forward once, backward twice as much
    encoding = 2 * counter.get_total_flops() * config["batch"]                  # appearance and motion
    seconds = step / (gpus * config["tflops"] * 1e12 * config["utilisation"])
    common.print0(f"\na step of {config['batch']} clips")
    common.print0(f"  {'DiT':<20}{step / 1e12:12,.2f} TFLOPs")
    common.print0(f"  {'encoding by the TAE':<20}{encoding / 1e12:12,.2f} TFLOPs, unless the latents are cached (data.py)")
    common.print0(f"  {f'on {gpus} GPU(s)':<20}{seconds:12.3g} s at an MFU of {100 * config['utilisation']:g} %, {config['tflops']:g} TFLOP/s each (gpus= utilisation= tflops=), the DiT alone")
    for stage in ("base", "videojam"):
        common.print0(f"  {stage + ', hours':<20}{seconds * config[stage]['steps'] / 3600:12.3g} for {config[stage]['steps']} steps")
    common.print0(f"\nmemory per GPU for training the DiT, checkpointing={config['checkpointing']}")
    for name, n in plan_memory(config).items():
        common.print0(f"  {name:<20}{n / 1e9:12.3f} GB")


def done(config, stage):
    """Is this stage's result there, as long as asked for? ValueError where it has another parent, or is shorter and others stand on it."""
    run = pathlib.Path(config["run"])
    path, parent = run / f"{stage}.pt", run / ("tae.pt" if stage == "base" else "base.pt")
    if not path.exists():
        return False
    saved = common.read_weights(path)
    if stage != "tae" and saved["parent"] != common.read_weights(parent)["checksum"]:
        raise ValueError(f"{path} was trained on another {parent.name} than the one beside it: delete {stage}.*, or take a new run folder")
    steps = config["videojam" if stage == "control" else stage]["steps"]
    later = [f"{name}.*" for name in {"tae": STAGES[1:], "base": STAGES[2:]}.get(stage, ()) if (run / f"{name}.pt").exists()]
    if saved["step"] < steps and later:
        raise ValueError(f"{run}: {stage} would be trained on to {steps} steps, but {', '.join(later)} stand on what it is now: "
                         f"delete them first, or take a new run=folder")
    return saved["step"] >= steps


def prepare_run(config, device):
    """Settle the precision, make the run folder -> the data, the stages that are to be trained; ValueError for a folder made with another config."""
    run = pathlib.Path(config["run"])
    path = run / "config.json"
    if path.exists():
        old = common.flatten(json.loads(path.read_text()))
        if config["precision"] == "auto":                                       # stays what it was when the run began
            config["precision"] = old.get("precision", "auto")
        for key, value in common.flatten(config).items():
            if key not in MAY_CHANGE and old.get(key) != value:
                raise ValueError(f"{run} was made with {key}={old.get(key)!r}, found {key}={value!r}: give the old value, or another run=folder")
    todo = [stage for stage in STAGES if stage in config["stages"] and not done(config, stage)]
    clips = data.open_data(config, "train", device)                             # a wrong data.root leaves no run folder behind
    if config["precision"] == "auto":
        votes = torch.tensor(float(common.fastest_precision(device) == "bf16"), device=device)
        common.sum_over_ranks([votes])
        config["precision"] = "bf16" if votes == common.WORLD else "fp32"
    common.print0(f"run {run}, device {device}, {config['precision']}")
    common.barrier()
    if common.RANK == 0:
        run.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(config, indent=1))
        os.replace(path.with_suffix(".tmp"), path)
    common.barrier()
    if not path.exists() or json.loads(path.read_text()) != config:
        raise ValueError(f"rank {common.RANK} does not see the {path} that rank 0 wrote: expected a run folder on a disk that all machines share")
    return clips, todo


def main(argv=None):
    config = common.load_config(sys.argv[1:] if argv is None else argv)
    stages = [stage.strip() for stage in config["stages"].split(",") if stage.strip()]
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"stages={config['stages']}: unknown stage {stage!r}, expected some of {', '.join(STAGES)}")
        batch = config["tae"]["batch"] if stage == "tae" else config["batch"]
        if common.WORLD > batch and not done(config, stage):
            raise ValueError(f"{stage}: found {common.WORLD} ranks for a global batch of {batch} clips, expected at most one rank per clip")
    if config["plan"]:
        return plan(config)
    device = common.find_device(config["device"])
    if device.type == "cpu" and common.WORLD > 1 and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        raise ValueError(f"several ranks on CPUs: found torch {torch.__version__}, expected at least 2.9, where gloo learned the mean that FSDP asks for: "
                         f"take one process, or GPUs")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", "torch.distributed is disabled")          # DCP says so where there is one process
    if common.WORLD > 1:
        patience = datetime.timedelta(hours=1)                                  # all wait while rank 0 writes 117 GB of 30b's weights
        backend = dict(backend="nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
        dist.init_process_group(**backend, timeout=patience)
    start = time.time()
    (clips, todo), latents = prepare_run(config, device), None
    for stage in stages:
        if stage not in todo:
            common.print0(f"{stage}: already in {config['run']}, skipped")
            continue
        gc.collect()                                                            # hooks keep a finished stage's net in cycles
        torch.manual_seed(config["seed"])                                       # the initial weights, the only use of the global generator
        if stage == "tae":
            train_tae(config, clips, device)
            continue
        if latents is None:
            path = pathlib.Path(config["run"]) / "tae.pt"
            tae = common.load_into(common.build_tae(config), common.read_weights(path)["weights"], path)
            tae = tae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
            latents = data.Latents(config, tae, clips, device, bar=common.RANK == 0)
        train_dit(config, stage, latents, device)
    common.close_process_group()                                                # nobody waits for rank 0's report
    if common.RANK == 0 and stages[-1] != "tae":
        finale(config, stages[-1])
    common.print0(f"all in {(time.time() - start) / 60:.1f} minutes")


def finale(config, stage):
    """The numbers, read from pixels, and what to do next."""
    run, prompt = config["run"], "a caption of your own"
    if not config["data"]["root"]:
        import probe                                                            # it stands above train.py: here alone, when all is done
        probe.report(common.load_run(run, stage, config["device"]))
        prompt = data.STRAIGHT[0]
    common.print0(f'\nLook at {run}/samples. Next:\n  python sample.py "{prompt}" --run {run} --stage {stage}')


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py{f', rank {common.RANK}' if common.RANK else ''}: {error}")
    except Stopped as stopped:
        common.print0(f"train.py: {stopped}")
        common.close_process_group()
        sys.exit(128 + signal.SIGTERM)
