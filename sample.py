"""Sampling with Inner-Guidance (paper sec. 4.3, Eqs. 7-8, App. A and C).

    python sample.py "a red square moving right"                        # mp4 + sheet.png + settings.json in runs/tiny/samples
    python sample.py "a blue circle falling" --out fall.gif --w-motion 0 --seed 3
    python sample.py --prompts prompts.txt --out vbench/                # VBench's custom-input layout
    python sample.py --report --stage base                              # the numbers that train.py prints at its end

Letters: B clips, C latent channels of one stream, T H W latent frames, height, width; z = [x, d] appearance and motion latents side
by side (B, 2C, T, H, W); t flow-matching time, 0 noise, 1 data; w1 text, w2 motion, in that order everywhere.
"""
import argparse
import json
import math
import pathlib
import re
import sys

import torch
from tqdm import tqdm

import common


# ---------------------------------------------------------------------------------------------------------------------
# The equations.

# App. C names the schedule, Movie Gen defines it.
def linear_quadratic_schedule(steps=100, linear_steps=50, emulated_steps=1000):
    """Times t_0 = 0 < ... < t_steps = 1 (steps+1,): linear_steps of an emulated_steps-step linear schedule, then quadratic with the same slope."""
    S, L, N = steps, linear_steps, emulated_steps
    if not 0 < L < S <= N:                                                      # S > N would step back
        raise ValueError(f"schedule: found {S} steps, {L} linear, {N} emulated; expected 0 < linear < steps <= emulated")
    Q = S - L
    k = torch.arange(1, Q + 1, dtype=torch.float64)
    t = torch.cat([torch.arange(L + 1, dtype=torch.float64), L + k + (N - L - Q) * (k / Q) ** 2]) / N
    return t.float()


# Eq. 7 asks for p([x,d] | y) p(y | [x,d])^w1 p(d | x, y)^w2. Bayes turns both factors into ratios of joint densities, and the gradient
# of the logarithm (with respect to [x_t, d_t]; the paper prints theta') is Eq. 8. Velocities are linear in scores, so it holds for u.
def inner_guidance(u, u_no_text, u_no_motion, w1=5.0, w2=3.0):
    """Eq. 8 on tensors of one shape: (1+w1+w2) u([x,d],y) - w1 u([x,d],0) - w2 u([x,0],y). Neutral at w1 = w2 = 0."""
    return (1 + w1 + w2) * u - w1 * u_no_text - w2 * u_no_motion


# App. A. InstructPix2Pix conditions on the visual signal first; its scales are one more than Eq. 8's.
def ip2p_guidance(u, u_no_text, u_no_both, w_text=5.0, w_motion=3.0):
    """u([x,0],0) + w_motion (u([x,d],0) - u([x,0],0)) + w_text (u([x,d],y) - u([x,d],0)). Neutral at 1, 1."""
    return u_no_both + w_motion * (u_no_text - u_no_both) + w_text * (u - u_no_text)


# ---------------------------------------------------------------------------------------------------------------------
# The sampler.

def noise(model, seeds):
    """One clip's noise follows from its seed alone: (B, 2C, T, H, W), or (B, C, ...) of the same numbers without motion."""
    C, *size = common.latent_size(model.config)
    z = torch.stack([torch.randn(2 * C, *size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return z[:, :(2 if model.motion else 1) * C].to(model.device)


def guided_velocity(model, z, t, text, mask, guidance, w1, w2, motion_on, use_motion):
    """One evaluation of the guided u~ at z (B, 2C, T, H, W) and one time t; the branches run as one batch.

    text, mask: features of the B prompts and, in the last row, of the empty one. motion_on: within the steps where d guides.
    """
    B, C = len(z), common.latent_size(model.config)[0]
    combine, neutral = (ip2p_guidance, 1.0) if guidance == "ip2p" else (inner_guidance, 0.0)
    # Each branch is (keeps d, keeps y). The third is evaluated only where it is used: 250 instead of 300 branches in 100 steps.
    branches = [(1, 1)] + [(1, 0)] * (guidance != "none")
    if guidance in ("inner", "ip2p") and motion_on and use_motion:
        branches += [(0, 1) if guidance == "inner" else (0, 0)]
    zero_d = torch.cat([z[:, :C], torch.zeros_like(z[:, C:])], dim=1)           # d = 0 exactly, as in training
    inputs = torch.cat([z if keep_d and use_motion else zero_d for keep_d, _ in branches])
    rows = torch.cat([torch.arange(B) if keep_y else torch.full((B,), -1) for _, keep_y in branches])
    pick = lambda f: [x[rows.to(x.device)] for x in f] if isinstance(f, list) else f[rows.to(f.device)]
    u = model.dit(inputs, t.expand(len(inputs)), pick(text), pick(mask)).chunk(len(branches))
    if len(branches) == 1:
        return u[0]
    if len(branches) == 2:                                                      # text guidance: both formulas without motion
        return combine(u[0], u[1], u[1], w1, neutral)
    out = combine(*u, w1, w2)
    if model.config["guide_motion"] == "text":                                  # README, choice 4: the third branch's motion half is untrained
        out = torch.cat([out[:, :C], combine(*u, w1, neutral)[:, C:]], dim=1)
    return out


def settle(model, steps=None, w1=None, w2=None, guidance="inner", motion_steps=None, use_motion=True, emulated=None):
    """The sampler's settings, the config's where none is given: a dict. Motion guides in the first half of the steps (sec. 4.3)."""
    c = model.config["sample"]
    steps = c["steps"] if steps is None else steps
    emulated = round(c["emulated"] * steps / c["steps"]) if emulated is None else emulated     # N in proportion to S: the same curve
    if not model.motion and guidance in ("inner", "ip2p"):
        guidance = "text"                                                       # the base and the control predict no motion
    return dict(steps=steps, w1=c["w_text"] if w1 is None else w1, w2=c["w_motion"] if w2 is None else w2, guidance=guidance,
                motion_steps=steps // 2 if motion_steps is None else motion_steps, use_motion=use_motion and model.motion, emulated=emulated)


@torch.no_grad()
def sampler(model, prompts, seeds, start=0, z=None, **options):
    """Euler steps from noise to data: a generator of (k, t_k, z), k = start..steps. z given: continue it from step `start` (SDEdit).

    prompts: B strings; seeds: B ints; options: those of `settle`.
    """
    if not prompts:
        raise ValueError("no prompt: found an empty list, expected at least one text")
    o, C = settle(model, **options), common.latent_size(model.config)[0]
    times = linear_quadratic_schedule(o["steps"], o["steps"] // 2, o["emulated"]).to(model.device)     # L = S / 2 (README, choice 5)
    text, mask = model.text([*prompts, ""])
    z = noise(model, seeds) if z is None else z
    yield start, times[start].item(), z
    for k in range(start, o["steps"]):
        u = guided_velocity(model, z, times[k], text, mask, o["guidance"], o["w1"], o["w2"], k < o["motion_steps"], o["use_motion"])
        if model.motion and not o["use_motion"]:
            u = torch.cat([u[:, :C], torch.zeros_like(u[:, C:])], dim=1)        # without optical flow d is never integrated
        z = z + (times[k + 1] - times[k]) * u
        yield k + 1, times[k + 1].item(), z


@torch.no_grad()
def decode(model, z):
    """z (B, C or 2C, T, H, W) -> video (B, 3, frames, height, width) and the motion picture of that shape, or None, in [-1, 1]."""
    C, frames = common.latent_size(model.config)[0], model.config["frames"]
    video = model.tae.decode(z[:, :C], frames).clamp(-1, 1)
    return video, model.tae.decode(z[:, C:], frames, motion=True).clamp(-1, 1) if model.motion else None


def generate(model, prompts, seeds, bar=True, at_once=32, **options):
    """Sample clip after clip in batches -> video (B, 3, frames, height, width), motion picture or None, on the CPU.

    options: those of `settle`. Without optical flow (use_motion=False) d stays noise, so there is no motion picture.
    """
    if not prompts:
        raise ValueError('no prompt: found none, expected python sample.py "a red square moving right", or --prompts with a file of them')
    videos, motions, use_motion = [], [], settle(model, **options)["use_motion"]
    with tqdm(total=math.ceil(len(prompts) / at_once) * (options.get("steps") or model.config["sample"]["steps"]),
              desc=f"sampling {len(prompts)}", unit="step", disable=not bar, leave=False) as progress:
        for i in range(0, len(prompts), at_once):
            for k, t, z in sampler(model, prompts[i:i + at_once], seeds[i:i + at_once], **options):
                progress.update(k > 0)
            video, motion = decode(model, z)
            videos.append(video.cpu())
            motions.append(motion.cpu() if use_motion else None)
    return torch.cat(videos), torch.cat(motions) if use_motion else None


@torch.no_grad()
def reconstruct(model, video, rgb):
    """Both streams through the TAE and back, 16 clips at a time, on the CPU."""
    frames, device = video.shape[2], model.device
    there_and_back = lambda v, motion: torch.cat([model.tae.decode(
        model.tae.encode(c.to(device), motion), frames, motion).clamp(-1, 1).cpu() for c in v.split(16)])
    return there_and_back(video, False), there_and_back(rgb, True)


# ---------------------------------------------------------------------------------------------------------------------

def arguments(argv=None):
    p = argparse.ArgumentParser(description="Sample videos from a trained run.")
    p.add_argument("prompt", nargs="*", help="texts; quote each")
    p.add_argument("--prompts", help="a file with one prompt per line")
    p.add_argument("--run", default="runs/tiny")
    p.add_argument("--stage", default="videojam", choices=("videojam", "base", "control"))
    p.add_argument("--steps", type=int, help="Euler steps (default: the config's)")
    p.add_argument("--emulated", type=int, help="N of the schedule (default: the config's, in proportion to the steps)")
    p.add_argument("--w-text", type=float, dest="w1")
    p.add_argument("--w-motion", type=float, dest="w2")
    p.add_argument("--guidance", default="inner", choices=("inner", "ip2p", "text", "none"))
    p.add_argument("--guide-motion", choices=("text", "literal"), help="the motion half under Eq. 8 (README, choice 4; default: the config's)")
    p.add_argument("--motion-steps", type=int, help="steps in which motion guides (default: the first half)")
    p.add_argument("--no-motion", action="store_true", help="feed d = 0 at every step (Tab. 3, without optical flow)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--count", type=int, default=1, help="clips per prompt")
    p.add_argument("--out", help="a .mp4 or .gif, or a folder (with --prompts: VBench's layout); default: samples/ in the run")
    p.add_argument("--device", default="")
    p.add_argument("--report", action="store_true", help="measure the run on fixed test prompts instead")
    return p.parse_args(argv)


def main(argv=None):
    a = arguments(argv)
    model = common.load_run(a.run, a.stage, a.device)
    model.config["guide_motion"] = a.guide_motion or model.config["guide_motion"]
    options = dict(steps=a.steps, w1=a.w1, w2=a.w2, guidance=a.guidance, motion_steps=a.motion_steps, use_motion=not a.no_motion, emulated=a.emulated)
    if a.report:
        import probe                                                            # it stands above sample.py
        return probe.report(model, a.seed, **options)
    prompts = a.prompt
    if a.prompts:
        if not pathlib.Path(a.prompts).is_file():
            raise FileNotFoundError(f"--prompts {a.prompts}: no such file; expected a text file with one prompt per line")
        prompts += [line.strip() for line in pathlib.Path(a.prompts).read_text().splitlines() if line.strip()]
    if a.count < 1:
        raise ValueError(f"--count {a.count}: expected at least 1")
    out, fps = pathlib.Path(a.out) if a.out else model.run / "samples", model.config["fps"]
    if out.suffix not in ("", ".mp4", ".gif"):
        raise ValueError(f"--out {out}: unknown ending, expected .mp4, .gif or a folder's name without a dot")
    (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)      # before the work, not after
    prompts = [prompt for prompt in prompts for _ in range(a.count)]
    seeds = range(a.seed, a.seed + len(prompts))
    video, motion = generate(model, prompts, seeds, **options)
    settings = settle(model, **options)
    if a.prompts and a.out and not out.suffix:                                  # VBench: flat mp4 files of the appearance alone
        names = {f"{n:04d}-{n % a.count}.mp4": prompt for n, prompt in enumerate(prompts)}
        for clip, name in zip(video, names):
            common.write_video(out / name, clip, fps, least=128)                # VBench's RAFT breaks below 128 px
        (out / "prompts.json").write_text(json.dumps(names, indent=1))
        print(f"seeds {seeds[0]} to {seeds[-1]}, {settings}")
        print(f"{len(names)} clips in {out}; vbench evaluate --videos_path {out} --mode=custom_input --prompt_file {out / 'prompts.json'}")
        return
    settings = {"run": a.run, "stage": a.stage, **settings, "guide_motion": model.config["guide_motion"], "config": model.config}
    for prompt, seed, clip, picture in zip(prompts, seeds, video, [None] * len(video) if motion is None else motion):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        path = out if out.suffix else out / f"{a.stage}-{slug}-{seed}.mp4"
        if out.suffix and len(prompts) > 1:
            path = out.with_stem(f"{out.stem}-{seed - a.seed}")
        common.write_video(path, clip, fps, picture)
        common.write_sheet(path.with_suffix(".png"), [clip] if picture is None else [clip, picture])
        path.with_suffix(".json").write_text(json.dumps({**settings, "prompt": prompt, "seed": seed}, indent=1))
        print(f"{path} and its .png sheet and .json settings")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
