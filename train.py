"""Training: the TAE, then the base DiT (Eqs. 1-4), then VideoJAM (sec. 4.2, Eq. 6, and the drops of sec. 4.3).

    python train.py                                          # ten minutes on a laptop: everything, then samples and a report
    python train.py preset=small                             # one GPU
    torchrun --nproc_per_node=2 train.py run=runs/two        # data parallel: the same global batch, split
    python train.py data.root=videos flow.weights=raft_small.pth run=runs/mine

Stages run in order and leave one weights file each in the run folder; finished ones are skipped, interrupted ones resumed.

Letters: x appearance latent, d motion latent, both (B, C, T, H, W); z = [x, d] (B, 2C, T, H, W); 0 noise, 1 data; t (B,) in [0, 1];
u prediction, v its target, the velocity; keep (B,) True where motion was not dropped.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
import sys
import time
import timeit
import types

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import data
import flow
import model as nets
import sample

STAGES = ("tae", "base", "control", "videojam")
LONGER = "run=runs/hour data.cache=20000 tae.steps=6000 base.steps=2000 videojam.steps=11000 videojam.lr=2e-3"
MAY_CHANGE = ("stages", "device", "plan", "run", "micro_batch", "log_every", "save_every", "sample_every", "tae.steps", "base.steps", "videojam.steps")


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

def generator(*key):
    """A generator seeded by a hash of the key, so that neighbouring keys have nothing in common."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big"))


def draw(seed, step, index, shape, drop_text=0.3, drop_motion=0.2, t_mean=0.0):
    """One sample's randomness: logit-normal t (Movie Gen), noise of `shape` (2C, T, H, W), keep_text, keep_motion (sec. 4.3)."""
    g = generator(seed, step, index)
    t = (t_mean + torch.randn((), generator=g)).sigmoid()
    keep_text = torch.rand((), generator=g) >= drop_text
    keep_motion = torch.rand((), generator=g) >= drop_motion
    return t, torch.randn(shape, generator=g), keep_text, keep_motion


@functools.lru_cache(maxsize=2)
def shuffled(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, "epoch", epoch)).tolist()


def clip_index(seed, position, n):
    """Which clip stands at this place of the endless training order: fresh ones for n = 0, else n clips shuffled anew per epoch."""
    return position if n == 0 else shuffled(seed, position // n, n)[position % n]


# ---------------------------------------------------------------------------------------------------------------------
# One to many processes. torchrun sets the environment; alone, rank 0 of 1.

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(*text):
    if RANK == 0:
        tqdm.write(" ".join(map(str, text)))


def sum_over_ranks(tensors):
    if WORLD > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def barrier():
    if WORLD > 1:
        dist.barrier()


def save(path, content):
    """Write beside, then rename: a crash leaves the old file."""
    if RANK == 0:
        torch.save(content, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    barrier()


# ---------------------------------------------------------------------------------------------------------------------
# The one training loop, for the TAE and for the DiT.

def fit(config, stage, parts, loss_of, steps, batch, lr, device, parent="", after=lambda parts, step: None):
    """Train `parts` (name -> net) by AdamW up to `steps` and write <run>/<stage>.pt with the averaged weights.

    loss_of(step, rows) -> (mean loss over these rows of the global batch, {name: sum of it over the rows}, {name: (10,) sums per tenth of t}).
    Resumes from <run>/<stage>.state.pt. Raises ValueError at the first loss that is not finite, leaving the last state as it was.
    """
    run = pathlib.Path(config["run"])
    net = nn.ModuleDict(parts).to(device).train()
    params = [p for p in net.parameters() if p.requires_grad]
    shares = {"text": config["text"]["lr"]}                                     # an embedding of bytes forgets its text at the DiT's rate
    groups = [dict(params=list(part.parameters()), share=shares.get(name, 1.0)) for name, part in net.items() if list(part.parameters())]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=config["weight_decay"], fused=device.type in ("cuda", "cpu"))
    ema = {name: w.detach().clone() for name, w in net.state_dict().items()}
    step, state_path = 0, run / f"{stage}.state.pt"
    if state_path.exists():
        try:
            state = torch.load(state_path, map_location=device, weights_only=True)
        except Exception as error:                                              # torch raises half a dozen types here
            raise ValueError(f"{state_path} is damaged ({type(error).__name__}): delete it, {stage} then starts again") from error
        if state["parent"] != parent:
            raise ValueError(f"{state_path} was trained on another {'base' if stage != 'base' else 'tae'} than the one in {run}: delete it, or take a new run folder")
        sample.load_into(net, state["net"], state_path)
        optimizer.load_state_dict(state["optimizer"])
        ema, step = state["ema"], state["step"]
        if step > steps:
            raise ValueError(f"{state_path} is at step {step}, beyond {stage}.steps={steps}: ask for at least as many, or take a new run folder")
        print0(f"{stage}: resumed at step {step}")
    forget_lines(run / "log.jsonl", stage, step)
    rows = list(range(RANK, batch, WORLD))                                      # this rank's share of the global batch
    micro = config["micro_batch"] or len(rows)
    print0(f"{stage}: {sum(p.numel() for p in params) / 1e6:.2f} M parameters, {steps} steps of {batch} = {WORLD} ranks x "
           f"{-(-len(rows) // micro)} micro-batches x {min(micro, len(rows))} clips")
    bar = tqdm(total=steps, initial=step, desc=f"{stage:>8}", unit="step", disable=RANK > 0, dynamic_ncols=True)
    sums, tenths, clock, since = {}, {}, time.time(), step
    while step < steps:
        # ---- gradient of the global batch: micro-batches and ranks add up because the loss is linear in samples
        logs = {}
        for i in range(0, len(rows), micro):
            part = rows[i:i + micro]
            loss, scalars, bins = loss_of(step, part)
            (loss * len(part) / batch).backward()
            for name, value in scalars.items():
                logs[name] = logs.get(name, 0) + value.detach()
            for name, value in bins.items():
                tenths[name] = tenths.get(name, 0) + value.detach()
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        total = torch.stack(list(logs.values()))
        sum_over_ranks([p.grad for p in params] + [total])
        # ---- stop before anything is spoilt
        logs = dict(zip(logs, total.tolist()))
        norm = nn.utils.clip_grad_norm_(params, config["clip"]).item()
        if not all(map(torch.isfinite, (total.sum(), torch.tensor(norm)))):
            bar.close()
            raise ValueError(f"{stage}: the loss or its gradient is not finite at step {step}; nothing was saved, the last state is "
                             f"{state_path if state_path.exists() else 'none'}; lower {stage}.lr or set another seed")
        # ---- update
        rise, fall = (step + 1) / (config["warmup"] + 1), (steps - step) / max(config["cooldown"] * steps, 1)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"] * min(1, rise, fall)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(config["ema"], (1 + step) / (10 + step))                    # warm-up, or the average would be the noise of the start
        own = net.state_dict()
        torch._foreach_lerp_([ema[n] for n in own if own[n].is_floating_point()], [w for w in own.values() if w.is_floating_point()], 1 - decay)
        step += 1
        # ---- log, save, look
        for name, value in logs.items():
            sums[name] = sums.get(name, 0) + value
        bar.set_postfix(loss=f"{sums['loss'] / max(sums['clips'], 1):.4f}")
        bar.update()
        if step % config["log_every"] == 0 or step == steps:
            sum_over_ranks(list(tenths.values()))
            if RANK == 0:
                log_line(run, stage, step, sums, tenths, lr=lr * min(1, rise, fall), norm=norm, seconds=time.time() - clock, steps=step - since)
            sums, tenths, clock, since = {}, {}, time.time(), step
        if step % config["save_every"] == 0 or step == steps:
            save(state_path, dict(net=net.state_dict(), ema=ema, optimizer=optimizer.state_dict(), step=step, parent=parent))
        if config["sample_every"] and step % config["sample_every"] == 0 and step < steps:
            average = net.state_dict() | ema
            keep = {name: w.clone() for name, w in net.state_dict().items()}
            net.load_state_dict(average)
            after(net.eval(), step)
            net.load_state_dict(keep)
            net.train()
    bar.close()
    weights = {name: w.cpu() for name, w in ema.items()}
    net.load_state_dict(ema)
    return net.eval().requires_grad_(False), weights


def fastest_precision(device):
    """"bf16" or "fp32": what this hardware multiplies faster. Some CPUs list bf16 and are slower in it, so those are timed."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu" or not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        return "fp32"
    seconds = []
    for a in (torch.ones(1024, 1024), torch.ones(1024, 1024, dtype=torch.bfloat16)):
        seconds.append(min(timeit.repeat(lambda: a @ a, number=1, repeat=10)))
    return "bf16" if seconds[1] < 0.6 * seconds[0] else "fp32"                  # autocast itself costs time


@contextlib.contextmanager
def precision(config, device):
    """Autocast to bf16 where it pays; weights, gradients, optimizer and loss stay in fp32."""
    with contextlib.ExitStack() as stack:
        if config["precision"] == "bf16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":                                            # its flash kernel is slow in bf16, and tokens are few here
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def forget_lines(path, stage, step):
    """Drop the log's lines of a stage's steps that are about to be taken again."""
    if RANK == 0 and path.exists():
        whole = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]    # a kill may have torn the last
        lines = [line for line in whole if (got := json.loads(line))["stage"] != stage or got["step"] <= step]
        path.write_text("".join(lines))


def log_line(run, stage, step, sums, tenths, lr, norm, seconds, steps):
    """Append one JSON line: means over the interval, the loss per tenth of t, clips per second."""
    clips, kept = sums.pop("clips"), sums.pop("kept", None)
    line = dict(stage=stage, step=step, **{k: round(v / (kept if k == "loss_d" and kept else clips), 5) for k, v in sums.items()})
    counts = tenths.pop("count", None)
    for name, values in tenths.items():
        line[f"{name}_by_t"] = [round(v, 4) if n else None for v, n in zip((values / counts.clamp(min=1)).tolist(), counts.tolist())]
    line.update(lr=lr, grad_norm=round(norm, 4), clips_per_s=round(clips / seconds, 2), seconds_per_step=round(seconds / steps, 4))
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def finish(config, stage, net, weights, step, parent="", tae=""):
    """<run>/<stage>.pt: plain averaged weights that torch.load(weights_only=True) reads, with config, checksum, the parent's and the TAE's."""
    save(pathlib.Path(config["run"]) / f"{stage}.pt",
         dict(stage=stage, step=step, config=json.dumps(config), weights=weights, checksum=sample.checksum(weights), parent=parent, tae=tae))


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
    tae = nets.build_tae(config).to(device, memory_format=torch.channels_last)
    n = len(clips) if config["data"]["root"] else 0
    size = nets.latent_size(config)

    def loss_of(step, rows):
        position = [step * batch + row for row in rows]
        got = clips.batch([clip_index(seed, p, n) for p in position], device)
        painted = torch.tensor([row % 2 == 1 for row in rows], device=device)
        video = torch.where(per_clip(painted, got["video"]), flow.flow_to_rgb(got["flow"], sigma), got["video"])
        noise = torch.stack([torch.randn(size, generator=generator(seed, step, row)) for row in rows]).to(device)
        with precision(config, device):
            rec, reg, error = tae_loss(video, tae, config, noise)
        square = error.detach().square().flatten(1).mean(1)                     # summed over half of the clips each, hence the 2 below
        loss = torch.where(painted, config["tae"]["motion"], 1.0) * rec + reg
        scalars = dict(loss=loss.sum(), mse_x=2 * square[~painted].sum(), mse_d=2 * square[painted].sum(), clips=torch.tensor(float(len(rows)), device=device))
        return loss.mean(), scalars, {}

    net, weights = fit(config, "tae", {"tae": tae}, loss_of, config["tae"]["steps"], batch, config["tae"]["lr"], device)
    tae = net["tae"]
    tae.statistics.copy_(measure_statistics(tae, clips, config, device))        # choice 3: measured once, stored with the weights
    finish(config, "tae", tae, {name: w.cpu() for name, w in tae.state_dict().items()}, config["tae"]["steps"])
    if RANK == 0:                                                               # look: three clips and below each what the TAE makes of it
        got = clips.batch(range(min(3, n or 3)), device)
        pairs = [(got["video"], False), (flow.flow_to_rgb(got["flow"], sigma), True)]
        with torch.no_grad():
            columns = [(v, tae.decode(tae.encode(v, m), v.shape[2], m)) for v, m in pairs]
        path = pathlib.Path(config["run"]) / "samples" / "reconstruction.png"
        sample.write_sheet(path, [clip[i] for i in range(len(got["video"])) for column in columns for clip in column])
        print0(f"tae: {path}: clip, reconstruction, motion, reconstruction")


@torch.no_grad()
def measure_statistics(tae, clips, config, device, count=256):
    """Mean and standard deviation per channel of either stream's latents, over `count` training clips: (2, 2, C)."""
    n = len(clips) if config["data"]["root"] else count
    streams = ([], [])
    for i in range(0, min(n, count), 16):
        got = clips.batch(range(i, min(i + 16, n, count)), device)
        for stream, video in zip(streams, (got["video"], flow.flow_to_rgb(got["flow"], config["flow"]["sigma"]))):
            stream.append(torch.cat([tae.moments(v)[0] for v in video.split(tae.tile, dim=2)], dim=2).cpu())
    return torch.stack([torch.stack([z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4)).clamp(min=1e-6)]) for z in map(torch.cat, streams)])


# ---------------------------------------------------------------------------------------------------------------------
# Stages 2 and 3: the DiT on latents. `base` and `control` are Eq. 3, `videojam` is Eq. 6.

@torch.no_grad()
def encode(tae, got, sigma):
    """A batch of clips -> z = [x, d] (B, 2C, T, H, W), each stream normalised by its own statistics."""
    return torch.cat([tae.encode(got["video"]), tae.encode(flow.flow_to_rgb(got["flow"], sigma), motion=True)], dim=1)


class Latents:
    """z and captions by clip number: encoded once and kept (data.cache), or encoded when asked for."""

    def __init__(self, config, tae, clips, device):
        self.tae, self.clips, self.device, self.sigma = tae, clips, device, config["flow"]["sigma"]
        self.n = len(clips) if config["data"]["root"] else config["data"]["cache"]
        self.kept = None
        if 0 < self.n <= config["data"]["cache"]:
            chunks = [range(i, min(i + 32, self.n)) for i in range(0, self.n, 32)]
            got = [self.fresh(chunk) for chunk in tqdm(chunks, desc="encoding", unit_scale=32, unit="clip", disable=RANK > 0, dynamic_ncols=True)]
            self.kept = torch.cat([z.half() for z, _ in got]), list(itertools.chain(*(captions for _, captions in got)))

    def fresh(self, indices):
        got = self.clips.batch(indices, self.device)
        return encode(self.tae, got, self.sigma), got["caption"]

    def __call__(self, indices):
        if self.kept is None:
            return self.fresh(indices)
        return self.kept[0][indices].float(), [self.kept[1][i] for i in indices]


def train_dit(config, stage, latents, device):
    run, seed, batch = pathlib.Path(config["run"]), config["seed"], config["batch"]
    motion, steps, lr = stage == "videojam", config["videojam"]["steps"], config["videojam"]["lr"]
    text, dit = nets.build_text(config), nets.build_dit(config)
    first, C = 0, nets.latent_size(config)[0]
    tae = parent = sample.read_weights(run / "tae.pt")["checksum"]
    if stage == "base":
        steps, lr = config["base"]["steps"], config["base"]["lr"]
    else:                                                                       # control and videojam go on from the base, on the same new clips
        saved = sample.read_weights(run / "base.pt")
        parent, first = saved["checksum"], saved["step"]
        sample.load_into(nn.ModuleDict(dict(text=text, dit=dit)), saved["weights"], run / "base.pt")
    if motion:
        dit.add_motion()                                                        # sec. 4.2: the surgery; all weights are trained

    def loss_of(step, rows):
        step += first
        z1, captions = latents([clip_index(seed, step * batch + row, latents.n) for row in rows])
        z1 = z1.to(device)
        t, z0, keep_text, keep = map(torch.stack, zip(*(draw(seed, step, row, z1.shape[1:], config["drop_text"], config["drop_motion"], config["t_mean"]) for row in rows)))
        t, z0, keep = t.to(device), z0.to(device), keep.to(device)
        if not motion:
            z1, z0 = z1[:, :C], z0[:, :C]                                       # the control sees the very noise that VideoJAM sees
        zt, v = interpolate(z1, z0, t), velocity(z1, z0)                        # Eqs. 1, 2: each stream its own noise, one shared t
        if motion:
            zt = torch.cat([zt[:, :C], zt[:, C:] * per_clip(keep, zt)], dim=1)  # dropped: d_t = 0 exactly, after the noising
        prompts = [caption if kept else "" for caption, kept in zip(captions, keep_text.tolist())]
        with precision(config, device):                                         # the nets alone: RAFT and the data stay in fp32
            u = dit(zt, t, *text(prompts))
        loss = joint_loss(u, v, keep) if motion else mse(u, v).mean()           # Eq. 6, or Eq. 3
        # what is logged
        loss_x = mse(u[:, :C], v[:, :C]).detach()
        tenth = nn.functional.one_hot((t * 10).long().clamp(max=9), 10).float() # (B, 10)
        scalars = dict(loss=loss * len(rows), loss_x=loss_x.sum(), clips=torch.tensor(float(len(rows)), device=device))
        bins = dict(count=tenth.sum(0), loss_x=loss_x @ tenth)
        if motion:
            loss_d = keep * mse(u[:, C:], v[:, C:]).detach()
            scalars.update(loss_d=loss_d.sum(), kept=keep.float().sum())
        return loss, scalars, bins

    def look(net, step):
        if RANK == 0:
            write_samples(config, stage, net, latents, device, step)

    net, weights = fit(config, stage, dict(text=text, dit=dit), loss_of, steps, batch, lr, device, parent, look)
    finish(config, stage, net, weights, steps, parent, tae)
    look(net, steps)


def write_samples(config, stage, net, latents, device, step):
    """Four prompts in <run>/samples: a sheet and a clip, the predicted motion beside the appearance."""
    model = types.SimpleNamespace(config=config, tae=latents.tae, text=net["text"], dit=net["dit"], motion=stage == "videojam", device=device)
    prompts = latents.clips.prompts()[:4]
    video, motion = sample.generate(model, prompts, range(len(prompts)))
    path = pathlib.Path(config["run"]) / "samples" / f"{stage}-{step}.png"
    sample.write_sheet(path, sample.interleave(video, motion))
    stack = lambda clips: None if clips is None else torch.cat(list(clips), dim=2)              # one below the other
    sample.write_video(path.with_suffix(".mp4"), stack(video), config["fps"], stack(motion), least=128 * len(prompts))
    print0(f"{stage}: {path} and .mp4: " + " | ".join(prompts))


# ---------------------------------------------------------------------------------------------------------------------

def plan(config):
    """plan=true: the sizes, counted without memory."""
    count = lambda net: sum(p.numel() for p in net.parameters()) / 1e6
    with torch.device("meta"):
        tae, text, dit = nets.build_tae(config), nets.build_text(config), nets.build_dit(config, motion=True)
    C, T, H, W = nets.latent_size(config)
    print0(f"latents {C} x {T} x {H} x {W}, {T * H * W // config['dit']['patch'] ** 2} tokens; "
           f"parameters: TAE {count(tae):.2f} M, text {count(text):.2f} M, DiT with motion {count(dit):.2f} M")


def refuse_to_spoil(config):
    """ValueError where a finished stage would be trained on although later ones stand on what it is now."""
    run = pathlib.Path(config["run"])
    for stage, later in (("tae", STAGES[1:]), ("base", STAGES[2:])):
        later = [name for name in later if (run / f"{name}.pt").exists()]
        if stage in config["stages"] and later and (run / f"{stage}.pt").exists() and not done(config, stage):
            raise ValueError(f"{run}: {stage} would be trained on to {config[stage]['steps']} steps, but {', '.join(f'{name}.pt' for name in later)} stand on what it is now: "
                             f"delete {', '.join(f'{name}.*' for name in later)} first, or take a new run=folder")


def prepare_run(config, device):
    """Open the data, settle the precision, make the run folder; ValueError for a folder that was made with another config."""
    run = pathlib.Path(config["run"])
    path, why = run / "config.json", "as asked for"
    if path.exists():
        old = nets.flatten(json.loads(path.read_text()))
        if config["precision"] == "auto":
            config["precision"], why = old.get("precision", "auto"), "as this run began"
        new = nets.flatten(config)
        for key in new:
            if key not in MAY_CHANGE and old.get(key) != new[key]:
                raise ValueError(f"{run} was made with {key}={old.get(key)!r}, found {key}={new[key]!r}: give the old value, or another run=folder")
    refuse_to_spoil(config)
    clips = data.open_data(config, "train", device)                             # a wrong data.root leaves no run folder behind
    if config["precision"] == "auto":
        votes = torch.tensor(float(fastest_precision(device) == "bf16"), device=device)
        sum_over_ranks([votes])
        config["precision"], why = "bf16" if votes == WORLD else "fp32", "what this hardware multiplies fastest"
    print0(f"run {run}, device {device}, {config['precision']}: {why}")
    barrier()
    if RANK == 0:
        run.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(config, indent=1))
        os.replace(path.with_suffix(".tmp"), path)
    barrier()
    return clips


def done(config, stage):
    """Is this stage's result in the run folder, at least as long as asked for?"""
    run, before = pathlib.Path(config["run"]), {"tae": None, "base": "tae"}.get(stage, "base")
    if not (run / f"{stage}.pt").exists():
        return False
    saved = sample.read_weights(run / f"{stage}.pt")
    if before and (run / f"{before}.pt").exists() and saved["parent"] != sample.read_weights(run / f"{before}.pt")["checksum"]:
        raise ValueError(f"{run / stage}.pt was trained on another {before}.pt than the one beside it: delete {stage}.*, or take a new run folder")
    return saved["step"] >= config["videojam" if stage == "control" else stage]["steps"]


def main(argv=None):
    config = nets.load_config(sys.argv[1:] if argv is None else argv)
    stages = [stage.strip() for stage in config["stages"].split(",") if stage.strip()]
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"stages={config['stages']}: unknown stage {stage!r}, expected some of {', '.join(STAGES)}")
    if config["plan"]:
        return plan(config)
    batch = min(config["tae"]["batch"] if stage == "tae" else config["batch"] for stage in stages)
    if WORLD > batch:
        raise ValueError(f"{WORLD} ranks for a global batch of {batch} clips: expected at most one rank per clip")
    device = sample.find_device(config["device"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    start = time.time()
    clips, latents = prepare_run(config, device), None
    for stage in stages:
        if done(config, stage):
            print0(f"{stage}: already in {config['run']}, skipped")
            continue
        torch.manual_seed(config["seed"])                                       # the initial weights, the only use of the global generator
        if stage == "tae":
            train_tae(config, clips, device)
            continue
        if latents is None:
            tae_path = pathlib.Path(config["run"]) / "tae.pt"
            tae = sample.load_into(nets.build_tae(config), sample.read_weights(tae_path)["weights"], tae_path)
            latents = Latents(config, tae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), clips, device)
        train_dit(config, stage, latents, device)
    if RANK == 0:
        print0(f"trained in {(time.time() - start) / 60:.1f} minutes")
        finale(config, stages)
        print0(f"all in {(time.time() - start) / 60:.1f} minutes")
    barrier()
    if WORLD > 1:
        dist.destroy_process_group()


def finale(config, stages):
    """The numbers, read from pixels, and what to do next."""
    run, stage = config["run"], stages[-1]
    if stage != "tae" and not config["data"]["root"]:
        sample.report(sample.load_run(run, stage, config["device"]))
    where = "" if run == "runs/tiny" else f" --run {run}"
    print0(f"\nLook at {run}/samples. Next:")
    if stage != "tae":
        option = "" if stage == "videojam" else f" --stage {stage}"
        prompt = data.STRAIGHT[0] if not config["data"]["root"] else "a caption of your own"
        print0(f'  python sample.py "{prompt}"{where}{option}')
    if config["preset"] == "tiny" and not config["data"]["root"]:
        print0(f"  python train.py {LONGER}   # about an hour on 2 cores")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}" if RANK == 0 else 1)
