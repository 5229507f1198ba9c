"""Sampling with Inner-Guidance (sec. 4.3, Eqs. 7 and 8, App. A and C).

    python sample.py "a red square moving right"            # mp4 and png in runs/tiny/samples
    python sample.py "a blue circle falling" --out fall.gif --w-motion 0 --seed 3
    python sample.py --prompts prompts.txt --out vbench     # a folder as VBench reads it
    torchrun --nproc_per_node=8 -- sample.py "a red square falling" --run runs/30b
    python probe.py report --stages base                    # numbers instead of pictures

Letters: B clips, C latent channels of one stream, T H W latent frames, height, width; z = [x, d]
appearance and motion latents (B, 2C, T, H, W); t flow-matching time, 0 noise, 1 data.
"""
import argparse
import json
import pathlib
import re
import types

import torch

import common

# -------------------------------------------------------------------------------------------------
# The equations


# App. C; Movie Gen defines it.
def linear_quadratic_schedule(steps=100, linear_steps=50, emulated_steps=1000):
    """Times 0 = t_0 < ... < t_steps = 1, (steps+1,): the first linear_steps of emulated_steps equal
    ones, then ever longer ones, from the same slope. ValueError where a step would not go forward.
    """
    S, L, N = steps, linear_steps, emulated_steps
    if not 0 < L < S <= N:
        raise ValueError(f"schedule: found {S} steps, {L} linear, {N} emulated; "
                         "expected 0 < linear < steps <= emulated")
    Q = S - L
    k = torch.arange(1, Q + 1, dtype=torch.float64)
    linear = torch.arange(L + 1, dtype=torch.float64)
    quadratic = L + k + (N - L - Q) * (k / Q) ** 2
    return (torch.cat([linear, quadratic]) / N).float()


def schedule(s):
    """The times of s, which is config.sample or `settings`: half of the steps are linear."""
    return linear_quadratic_schedule(s.steps, s.steps // 2, s.emulated)


# Eq. 7 asks for p([x,d] | y) p(y | [x,d])^w1 p(d | x, y)^w2. By Bayes both factors are ratios of
# joint densities; the gradient of the logarithm with respect to [x_t, d_t] is Eq. 8. A velocity is
# affine in that score and the weights of Eq. 8 add up to 1, so it holds for velocities as well.


# Eq. 8
def inner_guidance(u, u_no_text, u_no_motion, w1=5.0, w2=3.0):
    """u([x,d], y), u([x,d], no text), u([x,0], y) -> the guided u; neutral at 0, 0."""
    return (1 + w1 + w2) * u - w1 * u_no_text - w2 * u_no_motion


# App. A: InstructPix2Pix, whose scales are one more than those of Eq. 8.
def ip2p_guidance(u, u_no_text, u_no_both, w_text=5.0, w_motion=3.0):
    """u([x,d], y), u([x,d], no text), u([x,0], no text) -> the guided u; neutral at 1, 1."""
    return u_no_both + w_motion * (u_no_text - u_no_both) + w_text * (u - u_no_text)


# -------------------------------------------------------------------------------------------------
# The sampler


def settings(model, steps=None, w_text=None, w_motion=None, guidance="inner", use_motion=True):
    """The sampler's settings; what is not given is the config's. guidance: inner, ip2p, text, none.

    use_motion=False is Tab. 3's "without optical flow": d = 0 at every step.
    """
    default = model.config.sample
    steps = default.steps if steps is None else steps
    return types.SimpleNamespace(
        steps=steps, guidance=guidance, use_motion=use_motion and model.motion,
        emulated=round(default.emulated * steps / default.steps),       # the same curve
        w_text=default.w_text if w_text is None else w_text,
        w_motion=default.w_motion if w_motion is None else w_motion)


def noise(model, seeds):
    """(B, 2C, T, H, W), or the same x alone (B, C, ...) without motion; a clip's from its seed."""
    C, *size = common.latent_size(model.config)
    clips = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        clips.append(torch.randn(2 * C, *size, generator=generator))
    z = torch.stack(clips).to(model.device)
    return z if model.motion else z[:, :C]


def guided_velocity(model, z, t, text, mask, s, first_half):
    """The guided u at z and one time t, its branches in one batch.

    text (B+1, L, D), mask (B+1, L): of the prompts and, in the last row, of no text; s: `settings`.
    """
    B, C = len(z), common.latent_size(model.config)[0]
    no_d = z.clone()
    no_d[:, C:] = 0                                                     # exactly, as in training
    own = z if s.use_motion else no_d                                   # the base has no d at all
    with_text = torch.arange(B)
    no_text = torch.full((B,), B)
    # sec. 4.3: motion guides in the first half of the steps, then text alone, in two branches.
    motion_guides = s.use_motion and first_half and s.guidance in ("inner", "ip2p")
    branches = [(own, with_text)]
    if s.guidance != "none":
        branches.append((own, no_text))
    if motion_guides:
        branches.append((no_d, with_text if s.guidance == "inner" else no_text))
    latents, rows = zip(*branches)
    rows = torch.cat(rows).to(z.device)
    with common.autocast(model.config, model.device):
        u = model.dit(torch.cat(latents), t.expand(len(rows)), text[rows], mask[rows])
    u = u.float().chunk(len(branches))                                  # large weights: in fp32
    if s.guidance == "none":
        return u[0]
    # Where motion does not guide, u stands in for the branch without it, and the w2 terms cancel.
    if s.guidance == "ip2p":        # with the same two weights, as in the paper
        u_no_both = u[2] if motion_guides else u[1]
        return ip2p_guidance(u[0], u[1], u_no_both, s.w_text, s.w_motion)
    # With motion dropped the net was never trained to predict d. Yet Eq. 8 to the letter uses the
    # d half of u_no_motion too. Leaving it out made no difference that could be measured.
    u_no_motion = u[2] if motion_guides else u[0]
    return inner_guidance(u[0], u[1], u_no_motion, s.w_text, s.w_motion)


@torch.no_grad()
def sampler(model, prompts, seeds, s=None, start=0, z=None, bar=False):
    """Euler steps from noise to data: yields (k, t_k, z) for k = start ... steps.

    prompts, seeds: B each; s: `settings`; z: go on from it at step `start` (SDEdit).
    """
    s = s or settings(model)
    times = schedule(s).to(model.device)
    with common.autocast(model.config, model.device):
        text, mask = model.text([*prompts, ""])
    z = noise(model, seeds) if z is None else z
    C = common.latent_size(model.config)[0]
    yield start, times[start].item(), z
    ks = range(start, s.steps)
    if bar:
        ks = common.progress(ks, f"sampling {len(z)}", leave=False)
    for k in ks:
        u = guided_velocity(model, z, times[k], text, mask, s, k < s.steps // 2)
        if not s.use_motion:
            u[:, C:] = 0                        # d is not integrated
        z = z + (times[k + 1] - times[k]) * u
        yield k + 1, times[k + 1].item(), z


@torch.no_grad()
def decode(model, z):
    """z -> video (B, 3, frames, height, width) in [-1, 1], and the motion picture or None."""
    C, frames = common.latent_size(model.config)[0], model.config.frames
    few = common.clips_at_once(model.config)

    def stream(latents, motion):
        clips = [model.tae.decode(part, frames, motion) for part in latents.split(few)]
        return torch.cat(clips).float().clamp(-1, 1)

    with common.autocast(model.config, model.device):
        video = stream(z[:, :C], motion=False)
        return video, stream(z[:, C:], motion=True) if model.motion else None


def generate(model, prompts, seeds, s=None, bar=True):
    """In batches -> video and motion picture (or None) as `decode`, on the CPU."""
    if not prompts:
        raise ValueError('found no prompt, expected one: python sample.py "a red square falling"')
    s = s or settings(model)
    videos, motions = [], []
    batch = common.clips_at_once(model.config)
    for i in range(0, len(prompts), batch):
        some = slice(i, i + batch)
        for _, _, z in sampler(model, prompts[some], seeds[some], s, bar=bar):
            pass                                # the last state is the clips
        video, motion = decode(model, z)
        videos.append(video.cpu())
        if s.use_motion:                        # else d stayed noise
            motions.append(motion.cpu())
    return torch.cat(videos), torch.cat(motions) if motions else None


# -------------------------------------------------------------------------------------------------
# The command line


def unquoted(text):
    """Without the quotes around it, straight or curly; a prompt keeps its own."""
    for opening, closing in ("“”", '""'):
        inner = text[1:-1]
        first = re.search(f"[{opening}{closing}]", inner)
        # '"Go" says a "man"' begins and ends with its own: the next quote closes, after a letter.
        own = first and inner[:first.start()][-1:].strip()
        if len(text) > 1 and text[0] == opening and text[-1] == closing and not own:
            return inner.strip()
    return text


def read_prompts(path):
    """One prompt a line; or as a paper's appendix is pasted: numbered ("12." or "12. 12.", before
    the text or alone on a line) and quoted. OSError or ValueError where nothing can be read.
    """
    prompts = []
    number = None
    for line in pathlib.Path(path).read_text("utf-8-sig").splitlines():
        line = line.strip()
        found = re.match(r"(\d+)\.(?:\s+\1\.)?(?:\s+|$)", line)
        if found and number in (None, int(found[1]) - 1):       # "1984. A street" is no number 12
            number = int(found[1])
            line = line[found.end():]
        if line:
            prompts.append(unquoted(line))
    return prompts


def arguments_of(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="*", help="texts; quote each")
    add("--prompts", help="a file with one prompt per line, or a numbered and quoted list")
    add("--run", default="runs/tiny", help="the run folder")
    add("--stage", default="videojam", choices=common.STAGES[1:])
    add("--steps", type=int, help="Euler steps (the run's own, as the weights)")
    add("--w-text", type=float, help="w1 of Eq. 8")
    add("--w-motion", type=float, help="w2 of Eq. 8")
    add("--guidance", default="inner", choices=("inner", "ip2p", "text", "none"))
    add("--no-motion", action="store_true", help="d = 0 at every step (Tab. 3)")
    add("--seed", type=int, default=0)
    add("--count", type=int, default=1, help="clips per prompt")
    add("--out", help="a .mp4 or .gif, or a folder (with --prompts: VBench's layout)")
    add("--device", default="")
    return parser.parse_args(argv)


def main(argv):
    a = arguments_of(argv)
    out = pathlib.Path(a.out or f"{a.run}/samples")
    if out.suffix not in ("", ".mp4", ".gif") or a.count < 1:
        raise ValueError(f"--out {out} --count {a.count}: expected .mp4, .gif or a folder, "
                         "and at least one clip per prompt")
    common.start(a.device)
    prompts = a.prompt + (common.broadcast(read_prompts, a.prompts) if a.prompts else [])
    model = common.load_run(a.run, a.stage, a.device)
    s = settings(model, a.steps, a.w_text, a.w_motion, a.guidance, not a.no_motion)
    prompts = [prompt for prompt in prompts for _ in range(a.count)]
    seeds = range(a.seed, a.seed + len(prompts))
    videos, motions = generate(model, prompts, seeds, s)    # on all ranks, which hold the net
    common.stop()
    if common.RANK > 0:
        return
    print(vars(s))
    if a.prompts and a.out and not out.suffix:
        return write_vbench(out, prompts, videos, a.count, model.config.fps)
    if out.suffix:                              # all in one picture, below each other
        common.write_clips(out, videos, motions, model.config.fps)
        return print(f"{out} and .png: {' | '.join(prompts)}")
    for n, (prompt, seed) in enumerate(zip(prompts, seeds)):
        words = re.sub("[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        path = out / f"{a.stage}-{words}-{seed}.mp4"
        motion = None if motions is None else motions[n:n + 1]
        common.write_clips(path, videos[n:n + 1], motion, model.config.fps)
        print(f"{path} and .png: {prompt}")


# App. C.1
def write_vbench(folder, prompts, videos, count, fps):
    """Flat mp4 files of the appearance alone, of 128 px or more, and {file name: prompt}."""
    names = {}
    for n, (prompt, video) in enumerate(zip(prompts, videos)):
        name = f"{n:04d}-{n % count}.mp4"
        names[name] = prompt
        common.write_video(folder / name, video, fps, least=128)
    common.write_text(folder / "prompts.json", json.dumps(names, indent=1))
    print(f"{len(names)} clips in {folder}; vbench evaluate --videos_path {folder} "
          f"--mode=custom_input --prompt_file {folder / 'prompts.json'}")


if __name__ == "__main__":
    common.command_line(main, __doc__)
