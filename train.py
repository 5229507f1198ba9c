"""Training: the TAE, the base DiT (Eqs. 1 to 4), its control, VideoJAM (secs. 4.2, 4.3, Eq. 6).

    python train.py                                         # everything, ten minutes on a CPU
    python train.py preset=hour                             # the same world, learned well
    python train.py preset=small                            # one GPU
    torchrun --nproc_per_node=8 train.py preset=small       # eight GPUs, the same global batch
    python train.py preset=videos data.root=folder run=runs/mine        # your own videos

Each stage leaves its weights in the run folder. The same command skips finished stages and goes
on with an interrupted one.

Letters: x appearance latent, d motion latent, both (B, C, T, H, W); z = [x, d] (B, 2C, T, H, W);
t (B,) flow-matching time, 0 noise, 1 data; u prediction, v its target, the velocity.
"""
import functools
import gc
import json
import math
import pathlib
import time
import types

import torch
import torch.nn.functional as F
from torch import nn

import common
import data
import sample
from common import RANK, WORLD, autocast, generator, print0, to_device
from flow import flow_to_rgb

BETAS = (0.9, 0.95)     # of AdamW, without weight decay
BAD_STEPS = 10          # in a row without a finite gradient: training has failed

# -------------------------------------------------------------------------------------------------
# The equations


def per_clip(values, like):
    """values (B,) -> (B, 1, ...), one for each clip of `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


# Eq. 1
def interpolate(x1, x0, t):
    """x_t, a mix of data x1 and noise x0 (B, ...) at times t (B,)."""
    t = per_clip(t, x1)
    return t * x1 + (1 - t) * x0


# Eq. 2
def velocity(x1, x0):
    """v = dx_t / dt."""
    return x1 - x0


def mse(u, v):
    """Squared error of each clip, a mean over its numbers: (B, ...) -> (B,)."""
    return (u - v).float().square().flatten(1).mean(1)


# Eq. 6. Where motion was dropped only appearance counts: sec. 4.3 of the ICML version, not arXiv's.
def joint_loss(u, v, keep):
    """u, v (B, 2C, T, H, W), keep (B,) bool: was motion kept? -> the mean over the clips."""
    u_x, u_d = u.chunk(2, dim=1)
    v_x, v_d = v.chunk(2, dim=1)
    return (mse(u_x, v_x) + keep * mse(u_d, v_d)).mean()


# -------------------------------------------------------------------------------------------------
# The draws. They depend on (seed, step, row of the global batch) and on nothing else: a run gives
# the same numbers on one GPU or many, also after an interruption.


# sec. 4.3: text is dropped in 30 % of the clips, motion in 20 %, each by itself.
def draw(config, step, row, shape):
    """For one clip: t, noise of `shape`, keep_text, keep_motion."""
    g = generator(config.seed, step, row)
    t = torch.sigmoid(config.t_mean + torch.randn((), generator=g))     # logit-normal (Movie Gen)
    keep_text = torch.rand((), generator=g) >= config.drop_text
    keep_motion = torch.rand((), generator=g) >= config.drop_motion
    return t, torch.randn(shape, generator=g), keep_text, keep_motion


@functools.lru_cache(maxsize=2)
def shuffled(seed, epoch, count):
    return torch.randperm(count, generator=generator(seed, "epoch", epoch)).tolist()


def clip_numbers(seed, step, rows, batch, count):
    """Numbers of the clips of these rows: each once for count = 0, else `count` in a new order each
    epoch."""
    positions = [step * batch + row for row in rows]
    if count == 0:
        return positions
    return [shuffled(seed, p // count, count)[p % count] for p in positions]


def micro_batches(config, stage):
    """This rank's rows of the stage's global batch, in the same number of passes on every rank."""
    part = config.tae if stage == "tae" else config
    rows = list(range(RANK, part.batch, WORLD))
    largest = math.ceil(part.batch / WORLD)
    cuts = math.ceil(largest / (part.micro_batch or largest))
    if cuts > part.batch // WORLD:
        raise ValueError(f"{stage}: found {part.batch} clips over {WORLD} ranks in {cuts} "
                         "micro-batches, expected a clip in each: take fewer ranks, a larger batch "
                         "or a larger micro_batch")
    return [rows[i::cuts] for i in range(cuts)]


# -------------------------------------------------------------------------------------------------
# The training loop, the same for all stages


def rate_share(config, step, steps):
    """The share of the full learning rate: warm-up, constant, cool-down. Paper: constant."""
    warmup = (step + 1) / (config.warmup + 1)
    cooldown = (steps - step) / max(1, config.cooldown * steps)
    return min(1, warmup, cooldown)


def make_optimizer(config, net, lr):
    groups = []
    for name, part in net.items():
        own = lr * config.text.lr if name == "text" else lr
        groups.append(dict(params=list(part.parameters()), full_lr=own))
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, weight_decay=0, fused=True)


def tally(values, counted):
    """values (B,), counted (B,), or (B, n) for n bins -> their sum and number, for Log."""
    counted = counted.float()
    weighted = values.detach().float() * counted.t()    # (B,) or (n, B); @ would be bf16 on GPUs
    return weighted.sum(-1), counted.sum(0)


@torch.no_grad()
def exchange(weights, average):
    """Give the net its averaged weights; once more to undo."""
    for name, w in weights.items():
        own = w.clone()
        w.copy_(average[name])
        average[name].copy_(own)


def fit(config, stage, net, read, loss_of, steps, lr, parent="none", look=None):
    """Train `net`, a ModuleDict, up to `steps` steps. It ends with its averaged weights.

    read(step, rows): what these rows of the global batch are made of, on the CPU.
    loss_of(that): their mean loss, and what to log.
    """
    device = next(net.parameters()).device
    optimizer = make_optimizer(config, net, lr)
    net.train()
    weights = dict(net.state_dict(keep_vars=True))
    average = {name: w.detach().clone() for name, w in weights.items()}
    checkpoint = common.Checkpoint(config, stage, net, optimizer, average, parent)
    start = checkpoint.load()
    if start > steps:
        raise ValueError(f"{stage} is at step {start} already, found {steps} steps: ask for more")
    batch = config.tae.batch if stage == "tae" else config.batch
    cuts = micro_batches(config, stage)
    log = common.Log(config, stage, start)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    print0(f"{stage}: {size:.2f} M parameters, step {start} to {steps}, {batch} clips = {WORLD} "
           f"ranks x {len(cuts)} micro-batches x {len(cuts[0])}")
    todo = range(start, steps)
    bar = common.progress(todo, f"{stage:>8}", total=steps, initial=start)
    # On CPUs a thread that reads ahead would only take its core from the step.
    depth = 2 if device.type == "cuda" else 0
    batches = common.read_ahead(read, cuts, todo, depth)
    bad_steps = torch.zeros((), device=device)          # in a row
    done = start
    saved_at = time.time()
    with common.catch_sigterm() as caught:
        answers = common.ask_all(bad_steps, bool(caught), False)        # as after each step below
        for step, parts in zip(bar, batches):
            # Forward and backward. Gradients are averaged over the ranks, whose shares of the
            # batch may differ: so each clip counts 1 / batch, times the number of ranks.
            for rows, part in zip(cuts, parts):
                loss, numbers = loss_of(part)
                (loss * len(rows) / batch * WORLD).backward()
                log.add(numbers)
            norm = common.average_and_limit_gradients(net, config.clip)
            # Step. Where the gradient is not finite, AdamW leaves weights and moments as they are:
            # found_inf is the attribute by which torch's GradScaler tells it so.
            bad = (~norm.isfinite()).float()
            bad_steps = (bad_steps + 1) * bad
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * rate_share(config, step, steps)
            optimizer.found_inf = bad
            optimizer.step()
            optimizer.zero_grad()
            # Average. It warms up, or it would remember the random start.
            decay = min(config.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.values()), list(weights.values()), 1 - decay)
            # Log
            done = step + 1
            log.add(dict(skipped=(bad, torch.ones_like(bad))))
            if done % config.log_every == 0 or done == steps:
                rate = optimizer.param_groups[-1]["lr"]         # of the DiT, or the TAE
                line = log.write(done, batch, lr=rate, grad_norm=round(norm.item(), 4))
                bar.set_postfix(loss=line["loss"], refresh=False)
                if line["skipped"]:
                    print0(f"{stage}: {line['skipped']:.0%} of the gradients up to step {done} "
                           "were not finite and changed nothing")
            # Save, also when a scheduler asks one of the ranks to leave. All must do the same after
            # the same step. So each step ends with a question to all, and the next reads the
            # answers: at once, Python would wait for the GPU.
            failed, leaving, due = answers()
            if leaving or due or done % config.save_every == 0 or done == steps:
                checkpoint.save(done)
                saved_at = time.time()
            if leaving or failed >= BAD_STEPS:
                break
            is_due = time.time() - saved_at > 60 * config.save_minutes
            answers = common.ask_all(bad_steps, bool(caught), is_due)
            # Look
            if look and config.sample_every and done % config.sample_every == 0 and done < steps:
                exchange(weights, average)
                look(net.eval(), done)
                net.train()
                exchange(weights, average)
    failed, leaving, _ = answers()
    if failed >= BAD_STEPS:
        raise ValueError(f"{stage}: at step {done}, {failed:.0f} gradients in a row were not "
                         "finite and changed nothing: go on with a lower learning rate or clip")
    if leaving:
        raise common.Stopped(f"{stage}: SIGTERM after step {done} of {steps}, saved; the same "
                             "command goes on")
    exchange(weights, average)          # the average is what is kept
    net.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------
# Stage 1: the TAE (App. C, Movie Gen). Half of each batch is painted optical flow, because one net
# serves both streams.


def tae_loss(config, tae, video, noise):
    """Of each clip (B, 3, T, H, W): reconstruction error, regulariser, squared error; (B,) each."""
    mean, logvar = [latent.float() for latent in tae.moments(video)]    # (B, C, T', H', W')
    again = tae.reconstruct(mean + (0.5 * logvar).exp() * noise)[:, :, :video.shape[2]]
    error = (again - video).float()
    square = error.square().flatten(1).mean(1)
    reconstruction = error.abs().flatten(1).mean(1) + config.tae.l2 * square
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)
    # Movie Gen's outlier penalty: vectors of channels further than 3 standard deviations out
    centre = mean.mean((2, 3, 4), keepdim=True)
    spread = mean.std((2, 3, 4), keepdim=True).norm(dim=1)
    outlier = ((mean - centre).norm(dim=1) - 3 * spread).clamp(min=0).flatten(1).mean(1)
    return reconstruction, config.tae.kl * kl + config.tae.outlier * outlier, square


def train_tae(config, clips, device):
    seed = config.seed
    tae = common.build_tae(config).to(device, memory_format=torch.channels_last)
    common.load_into(tae, tae.state_dict(), "tae")      # all ranks begin with rank 0's weights
    # Of long clips one tile at a random place: probe.py plan preset=4b says 25 GB for a tile, and
    # 93 for the whole clip (tae.tile=128).
    frames = min(config.frames, config.tae.tile)
    C, _, h, w = common.latent_size(config)
    shape = (C, math.ceil(frames / config.tae.temporal), h, w)

    def read(step, rows):
        noise, starts = [], []
        for row in rows:
            g = generator(seed, step, row)
            noise.append(torch.randn(shape, generator=g))
            starts.append(torch.randint(config.frames - frames + 1, (), generator=g).item())
        painted = torch.tensor([row % 2 == 1 for row in rows])
        numbers = clip_numbers(seed, step, rows, config.tae.batch, clips.count)
        return clips.read(numbers), torch.stack(noise), starts, painted

    def loss_of(part):
        got, noise, starts, painted = part
        got = clips.render(got, device)
        painted = to_device(painted, device)
        rgb = flow_to_rgb(got["flow"], config.flow.sigma)
        video = torch.where(per_clip(painted, rgb), rgb, got["video"])
        video = torch.stack([clip[:, i:i + frames] for clip, i in zip(video, starts)])
        with autocast(config, device):                  # (B, 3, frames, H, W)
            losses = tae_loss(config, tae, video, to_device(noise, device))
        reconstruction, regulariser, square = losses
        loss = torch.where(painted, config.tae.motion, 1.0) * reconstruction + regulariser
        numbers = dict(loss=tally(loss, torch.ones_like(loss)), mse_x=tally(square, ~painted),
                       mse_d=tally(square, painted))
        return loss.mean(), numbers

    net = nn.ModuleDict(dict(tae=tae))
    fit(config, "tae", net, read, loss_of, config.tae.steps, config.tae.lr)
    measure_statistics(config, tae, clips, device)
    common.save_weights(config, "tae", tae, config.tae.steps)
    if RANK == 0:
        show_reconstruction(config, tae, clips, device)


def measure_statistics(config, tae, clips, device):
    """Mean and deviation of each channel of both streams, over 256 clips; stored in the TAE."""
    number = min(256, clips.count or 256)
    numbers = clip_numbers(config.seed, 0, range(number), number, clips.count)
    chunks = [data.encode(config, tae, clips.batch(numbers[chunk.start:chunk.stop], device))
              for chunk in data.chunks(0, number, config)]
    for stream, z in enumerate(torch.cat(chunks).chunk(2, dim=1)):      # (n, C, T', H', W') each
        tae.statistics[stream, 0] = z.mean((0, 2, 3, 4))
        tae.statistics[stream, 1] = z.std((0, 2, 3, 4)).clamp(min=1e-6)


def show_reconstruction(config, tae, clips, device):
    """Three clips and their painted flow, then both through the TAE."""
    got = clips.batch(range(min(3, clips.count or 3)), device)
    rgb = flow_to_rgb(got["flow"], config.flow.sigma)
    video = torch.cat([got["video"].cpu(), data.through_tae(config, tae, got["video"])])
    motion = torch.cat([rgb.cpu(), data.through_tae(config, tae, rgb, motion=True)])
    shown = "clips and their motion, then both through the TAE"
    write_samples(config, "reconstruction", video, motion, shown)


def write_samples(config, name, video, motion, shown):
    """<run>/samples/name.mp4 and .png. Training goes on where they cannot be written."""
    path = f"{config.run}/samples/{name}.mp4"
    try:
        common.write_clips(path, video, motion, config.fps)
        print0(f"{path} and .png: {shown}")
    except (OSError, RuntimeError) as error:
        print0(f"{path} could not be written, training goes on ({error})")


# -------------------------------------------------------------------------------------------------
# Stages 2 to 4: the DiT on latents. base and control are Eq. 3, videojam is Eq. 6.


def dit_loss(net, z1, prompts, t, z0, keep_motion, motion):
    """The loss of clips z1 = [x, d] (B, 2C, T', H', W') and what to log. prompts: B captions,
    empty where text is dropped; z0: noise like z1."""
    C = z1.shape[1] // 2
    if not motion:                                                      # x alone
        z1, z0 = z1[:, :C], z0[:, :C]
    zt = interpolate(z1, z0, t)                                         # Eq. 1, one t for x and d
    v = velocity(z1, z0)                                                # Eq. 2
    # sec. 4.3: where motion is dropped d_t is exactly 0, unlike the latent of any real motion.
    if motion:
        zt = torch.cat([zt[:, :C], zt[:, C:] * per_clip(keep_motion, zt)], dim=1)
    u = net.dit(zt, t, *net.text(prompts))                              # Eq. 4
    loss_x = mse(u[:, :C], v[:, :C])
    loss = joint_loss(u, v, keep_motion) if motion else loss_x.mean()   # Eq. 6, or Eq. 3
    everyone = torch.ones_like(t)
    tenths = F.one_hot((10 * t).long().clamp(max=9), 10)               # (B, 10), bins of t
    numbers = dict(loss=(loss.detach() * len(t), everyone.sum()), loss_x=tally(loss_x, everyone),
                   loss_x_by_t=tally(loss_x, tenths))
    if motion:
        numbers["loss_d"] = tally(mse(u[:, C:], v[:, C:]), keep_motion)
    return loss, numbers


def train_dit(config, stage, latents, device):
    """Stages base, videojam, and control: the base trained on for as long as videojam."""
    motion = stage == "videojam"
    recipe = config.base if stage == "base" else config.videojam
    net = common.build_nets(config, device, motion)
    for part in net.values():
        part.init()
    tae_id = common.broadcast(common.identity, f"{config.run}/tae.pt")
    parent_id = tae_id
    first = 0
    if stage != "base":         # sec. 4.2: the base, but for the new motion layers; all are trained
        saved = common.read_stage(config.run, "base")
        new = ("dit.motion_in.weight", "dit.motion_out.weight")
        common.load_into(net, saved["weights"], f"{config.run}/base.pt", new)
        parent_id = common.broadcast(common.identity, f"{config.run}/base.pt")
        first = saved["step"]
        del saved
    C, *size = common.latent_size(config)

    def read(step, rows):
        position = first + step     # after the base's clips and noise; control and videojam alike
        numbers = clip_numbers(config.seed, position, rows, config.batch, latents.count)
        draws = [draw(config, position, row, (2 * C, *size)) for row in rows]
        t, z0, keep_text, keep_motion = [torch.stack(values) for values in zip(*draws)]
        return latents.read(numbers), keep_text.tolist(), (t, z0, keep_motion)

    def loss_of(part):
        got, keep_text, draws = part
        z1, captions = latents.to_z(*got)
        prompts = [caption if kept else "" for caption, kept in zip(captions, keep_text)]
        draws = [to_device(values, device) for values in draws]
        with autocast(config, device):
            return dit_loss(net, z1, prompts, *draws, motion)

    def look(net, step):
        show_samples(config, stage, latents, net, step)

    fit(config, stage, net, read, loss_of, recipe.steps, recipe.lr, parent_id, look)
    common.save_weights(config, stage, net, recipe.steps, parent_id, tae_id)
    look(net, recipe.steps)


def show_samples(config, stage, latents, net, step):
    """A sheet and an mp4 of four prompts. All ranks sample: FSDP gathers weights for each pass."""
    model = types.SimpleNamespace(config=config, tae=latents.tae, text=net.text, dit=net.dit,
                                  motion=stage == "videojam", device=latents.device)
    prompts = latents.clips.prompts()[:4]
    video, motion = sample.generate(model, prompts, range(len(prompts)))
    if RANK == 0:
        write_samples(config, f"{stage}-{step}", video, motion, " | ".join(prompts))


# -------------------------------------------------------------------------------------------------
# The stages in turn


def is_finished(config, stage):
    """Are its weights there, with all steps? ValueError if they started from other weights than
    those beside them, or if steps are missing and later stages have already started from them.
    """
    run = pathlib.Path(config.run)
    path = run / f"{stage}.pt"
    if not path.exists():
        return False
    saved = common.read_weights(path, check=False)
    below = run / ("tae.pt" if stage == "base" else "base.pt")
    if stage != "tae" and not (below.exists() and saved["parent"] == common.identity(below)):
        raise ValueError(f"{path} was trained on another {below.name} than the one beside it: "
                         f"delete {stage}.*, or take another run=folder")
    steps = config["videojam" if stage == "control" else stage].steps
    if saved["step"] >= steps:
        return True
    above = {"tae": common.STAGES[1:], "base": common.STAGES[2:]}.get(stage, ())
    later = [f"{name}.pt" for name in above if (run / f"{name}.pt").exists()]
    if later:
        raise ValueError(f"{path} has {saved['step']} steps, expected {steps}, but "
                         f"{', '.join(later)} stand on it: delete those first")
    return False


def unfinished(config, stages):
    """Those of the stages that are to be trained. ValueError, one line, where the batch of one of
    them does not fit the ranks."""
    todo = [stage for stage in stages if not is_finished(config, stage)]
    wrong = []
    for stage in todo:
        try:
            micro_batches(config, stage)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong))
    return todo


def fits_one_device(config, device):
    """Do the nets that the report loads fit on this rank's GPU, with room for their clips?"""
    if device.type != "cuda":
        return True
    with torch.device("meta"):
        dit = common.build_dit(config, motion=True)
    size = sum(p.numel() for p in dit.parameters()) * (2 if common.uses_bf16(config, device) else 4)
    nets = sum(pathlib.Path(config.run, f"{stage}.pt").exists() for stage in common.STAGES[1:])
    # The rest is for the TAE and the clips.
    return nets * size < 0.7 * torch.cuda.get_device_properties(device).total_memory


def finish(config, device, stage):
    """The report, where the nets fit on this device; and how to sample."""
    prompt = "a caption like yours" if config.data.root else data.STRAIGHT[0]
    launch = "Next: python"
    if not fits_one_device(config, device):
        gpus = torch.cuda.device_count()
        launch = f"No report: the nets do not fit on one GPU. torchrun --nproc_per_node={gpus} --"
    elif not config.data.root:
        import probe                            # here, because probe.py imports this file
        probe.main(["report", "--run", config.run, "--device", config.device])
    print(f'{launch} sample.py "{prompt}" --run {config.run} --stage {stage}')


def main(arguments):
    began = time.time()
    config, device = common.start_from(arguments)
    stages = [stage for stage in common.STAGES if stage in config.stages.split(",")]
    todo = common.broadcast(unfinished, config, stages)
    common.compiles(config, device)             # refuses what torch cannot do, before any stage
    clips = data.open_data(config, "train", device)
    text = json.dumps(config, indent=1)
    common.broadcast(common.write_text, f"{config.run}/config.json", text)
    print0(f"run {config.run}, {WORLD} x {device}, stages {config.stages}")
    latents = None
    for stage in stages:
        if stage not in todo:
            print0(f"{stage}: already in {config.run}, skipped")
            continue
        torch.manual_seed(config.seed)          # of the first weights, nothing else
        if stage == "tae":
            train_tae(config, clips, device)
        else:
            if latents is None:
                latents = data.Latents(config, common.load_tae(config, device), clips, device)
            train_dit(config, stage, latents, device)
            gc.collect()                        # sharded and compiled nets are cycles
    common.stop()
    if RANK > 0:
        return
    if stages != ["tae"]:
        finish(config, device, stages[-1])
    print(f"all in {(time.time() - began) / 60:.1f} minutes; look at {config.run}/samples")


if __name__ == "__main__":
    common.command_line(main, __doc__, keys=True)
