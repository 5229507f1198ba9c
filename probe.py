"""The paper's experiments on a world whose motion is known exactly: Fig. 3, Fig. 8, Tabs. 1 and 3, and the report.

    python probe.py permute                                  # Fig. 3: does the loss notice that frames were shuffled?
    python probe.py sdedit                                   # Fig. 8: by which step are motion and appearance settled?
    python probe.py ablate                                   # Tabs. 1, 3: base, control, VideoJAM, its ablations, read from the pixels
    python probe.py speed preset=small                       # clips, tokens and FLOPs per second, memory; key=value as train.py takes them
    torchrun --nproc_per_node=2 -- probe.py ablate --run runs/hour      # without the -- torchrun takes --run for its own

Results go to <run>/probe as CSV and PNG. Letters: T frames, H height, W width, z = [x, d] appearance and motion latents, t flow-matching
time (0 noise, 1 data), k a step of the sampler's schedule.
"""
import argparse
import csv
import ctypes
import json
import math
import os
import pathlib
import re
import shlex
import sys
import time
import types

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import flow
import metrics
import model as nets
import sample
import train

AT_ONCE = 32                                                                    # clips in a batch


# ---------------------------------------------------------------------------------------------------------------------
# Shared by the experiments.

def command(run, stage):
    """The line that trains a stage of this run, with every setting in which the run differs from its preset."""
    config = common.flatten(common.read_config(pathlib.Path(run) / "config.json"))
    usual = common.flatten(common.load_config([f"preset={config['preset']}"]))
    usual |= dict(run="", stages="", precision=config["precision"], device=config["device"])
    config |= dict(run=str(run), stages=",".join(dict.fromkeys(("tae", "base", stage))))
    return shlex.join(["python", "train.py"] + [f"{key}={value}" for key, value in config.items() if key == "preset" or value != usual[key]])


def load(a, *stages):
    """Those of the stages that the run has, name -> model, and its config; says how to train a missing one."""
    models = {}
    for stage in stages:
        if (pathlib.Path(a.run) / f"{stage}.pt").exists():
            models[stage] = common.load_run(a.run, stage, a.device)
        elif (pathlib.Path(a.run) / "config.json").exists():
            common.print0(f"no {stage}.pt in {a.run}; to have it: {command(a.run, stage)}")
    if not models:
        raise FileNotFoundError(f"{a.run} has none of {', '.join(stages)}: train it first, python train.py run={a.run}")
    config = next(iter(models.values())).config
    if config["data"]["root"]:
        raise ValueError(f"{a.run} was trained on {config['data']['root']}: the probe needs the embedded world, whose motion is known exactly")
    return models, config


def batches(a, world, device):
    """This rank's share of the clips, up to AT_ONCE at a time: (their numbers, the batch)."""
    for first in range(AT_ONCE * common.RANK, a.clips, AT_ONCE * common.WORLD):
        index = list(range(first, min(first + AT_ONCE, a.clips)))
        yield index, world.batch(index, device)


def gather(rows):
    """The rows of all ranks, in order of their clips."""
    lists = [rows] * common.WORLD
    if common.WORLD > 1:
        dist.all_gather_object(lists, rows)
    return sorted((row for part in lists for row in part), key=lambda row: row["clip"])


def grouped(rows, key):
    """The value of the key -> its rows."""
    return {value: [row for row in rows if row[key] == value] for value in dict.fromkeys(row[key] for row in rows)}


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(path)


def cell(mean, low, high, share=False, sign=""):
    """A mean and its interval as text: a share in percent, a difference with its sign (of shares: in points)."""
    scale, digits, unit = (100, 0, "" if sign else " %") if share else (1, 2, "")
    show = lambda x: f"{scale * x:{sign}.{digits}f}"
    return "-" if math.isnan(mean) else f"{show(mean)}{unit} [{show(low)}, {show(high)}]"


def markdown(heads, lines):
    """A table; the first cell of each line is its name."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines])


def plot(path, curves, xlabel, ylabel, times):
    """curves: label -> {x: (mean, low, high)}; times: x -> t, a second axis if any. Without matplotlib no picture: the CSV has the numbers."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no curve: matplotlib is missing, pip install matplotlib")
    figure = Figure(figsize=(6, 4), layout="tight")
    axes = figure.subplots()
    for label, curve in curves.items():
        mean, low, high = zip(*curve.values())
        axes.fill_between(list(curve), low, high, alpha=0.25)
        axes.plot(list(curve), mean, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend()
    if times:
        some = list(times)[::max(1, len(times) // 6)]
        axes.twiny().set(xlim=axes.get_xlim(), xticks=some, xticklabels=[f"{times[x]:.2f}" for x in some], xlabel="t")
    figure.savefig(path, dpi=110)
    print(path)


# ---------------------------------------------------------------------------------------------------------------------
# The report: numbers read from pixels, on held-out prompts, beside what ground truth and reconstructions score.

@torch.no_grad()
def read_tae(model, batch):
    """PSNR of appearance; end-point error on moving pixels of the motion pictures read back, over their mean speed; both after the TAE."""
    sigma = model.config["flow"]["sigma"]
    rgb = flow.flow_to_rgb(batch["flow"], sigma)
    video2, rgb2 = sample.reconstruct(model, batch["video"], rgb)
    speed = batch["flow"].norm(dim=1)                                           # (B, T, H, W) px per frame
    moving = speed > 0.25 * min(speed.shape[-2:]) / 64                          # a third of the slowest named motion
    error = (flow.rgb_to_flow(rgb2, sigma) - batch["flow"]).norm(dim=1)[moving].mean()
    return {"psnr_db": metrics.psnr(batch["video"], video2), "epe_share": (error / speed[moving].mean()).item(), "speed_px": speed[moving].mean().item()}, video2


def report(model, seed=0, **options):
    """Measure a run of the embedded world; prints the tables, writes report-<stage>.json and .png, returns the numbers.

    What differs from the default settings stands in the files' names: report-videojam-w2-0.0.json.
    """
    c, prompts = model.config, data.STRAIGHT
    if c["data"]["root"]:
        raise ValueError(f"the report reads the embedded world's pixels; {model.run} was trained on {c['data']['root']}")
    world = data.open_data(c, "test")
    truth, mixed = world.of_prompts(prompts), world.batch(range(64))
    settings, usual = sample.settle(model, **options), sample.settle(model)
    changed = [f"-{key}-{value}" for key, value in settings.items() if value != usual[key]] + [f"-seed-{seed}"] * (seed != 0)
    changed += ["-literal"] * (c["guide_motion"] == "literal")
    name = model.run / f"report-{model.stage}{''.join(changed)}"
    numbers = {"stage": model.stage, "seed": seed, **settings, "guide_motion": c["guide_motion"], "tae_all_kinds": read_tae(model, mixed)[0]}
    numbers["tae_straight"], recon = read_tae(model, truth)
    video, motion = sample.generate(model, prompts, [seed + i for i in range(len(prompts))], **options)
    print("\nTAE, held-out clips           appearance   motion read back: end-point error on moving pixels (an all-white picture: 100 %)")
    for what, n in (("64 straight-line prompts", numbers["tae_straight"]), ("64 clips of all kinds", numbers["tae_all_kinds"])):
        print(f"  {what:<26}{n['psnr_db']:8.1f} dB   {100 * n['epe_share']:.0f} % of their mean speed of {n['speed_px']:.2f} px per frame")
    total = len(prompts)
    print(f"{total} straight-line prompts, half held out, read from the pixels   colour right          direction right   [95 % interval]")
    cell = lambda hits: "{:5.1f} % [{:.0f}, {:.0f}]".format(100 * hits / total, *metrics.interval(hits, total))
    for whose, clips in (("ground truth", truth["video"]), ("reconstructions", recon), (f"samples of {model.stage}", video)):
        colour, direction = metrics.read_clips(clips, prompts)
        numbers[whose.split()[0]] = {"colour": colour / total, "direction": direction / total}
        print(f"  {whose:<54}{cell(colour):<22}{cell(direction)}")
    if motion is not None:                                                      # what the model says of its own clips
        direction = metrics.read_motion(motion, prompts, c["flow"]["sigma"])
        numbers["motion_pictures"] = {"direction": direction / total}
        print(f"  {'their motion pictures, read back':<76}{cell(direction)}")
    numbers["sheet"] = prompts[::9]
    common.write_sheet(f"{name}.png", common.interleave(video[::9], None if motion is None else motion[::9]))       # every direction once
    pathlib.Path(f"{name}.json").write_text(json.dumps(numbers, indent=1))
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Fig. 3

@torch.no_grad()
def permute(a):
    """Fig. 3: loss of a clip against the same clip with its frames shuffled in pixel space, under the same noise, by t: the schedule's, and uniform.

    At t = 0 the input is noise and nothing can be noticed: the ratio there says only how far shuffled clips lie from the others.
    """
    models, config = load(a, "base", "control", "videojam")
    one, world, C, S = next(iter(models.values())), data.open_data(config, "test"), config["tae"]["channels"], config["sample"]["steps"]
    times = sample.linear_quadratic_schedule(S, S // 2, config["sample"]["emulated"]).tolist()
    points = [("schedule", k, times[k]) for k in range(0, S, max(1, S // 20))] + [("uniform", i, i / 20) for i in range(1, 20)]
    compared = {name: (model, model.motion) for name, model in models.items()}
    if "videojam" in models:                                                    # does the net notice, or only the motion that it is shown?
        compared["videojam, d = 0"] = models["videojam"], False
    order = torch.stack([torch.randperm(config["frames"], generator=common.generator(a.seed, "permute", i)) for i in range(a.clips)])   # (clips, T)
    order = torch.where((order.diff() == 1).all(1, keepdim=True), order.roll(1, 1), order)     # never the identity
    rows = []
    for index, got in batches(a, world, one.device):
        shuffled = torch.stack([video[:, p] for video, p in zip(got["video"], order[index])])
        # The exact flow of the shuffled clip takes its frame k, which is frame p_k, to frame p_k+1; the last one on as before.
        own = torch.stack([data.flow_between([spec], p, [*p[1:], p[-1] + 1], *world.shape[1:], one.device)[0]
                           for spec, p in zip(got["spec"], order[index])])
        encode = lambda video, d: data.encode(one.tae, dict(video=video, flow=d), config["flow"]["sigma"])
        z = dict(clean=encode(got["video"], got["flow"]), own=encode(shuffled, own), original=encode(shuffled, got["flow"]))
        noise = torch.stack([torch.randn(z["clean"].shape[1:], generator=common.generator(a.seed, "noise", i)) for i in index]).to(one.device)
        for name, (model, shown) in compared.items():
            text, streams = model.text(got["caption"]), slice(2 * C if model.motion else C)
            for point in points:
                t = torch.full((len(index),), point[2], device=one.device)      # (B,)
                for frames in z if shown else ("clean", "own"):
                    z1, z0 = z[frames][:, streams], noise[:, streams]           # (B, C or 2C, T, H, W)
                    zt, v = train.interpolate(z1, z0, t), train.velocity(z1, z0)
                    if not shown:
                        zt[:, C:] = 0
                    u = model.dit(zt, t, *text)
                    errors = train.mse(u[:, :C], v[:, :C]).tolist(), train.mse(u[:, C:], v[:, C:]).tolist()     # Eqs. 3 and 6, clip by clip
                    rows += [dict(model=name, point=point, frames=frames, clip=i, appearance=x, joint=x + d) for i, x, d in zip(index, *errors)]
    rows = gather(rows)
    return rows if common.RANK else report_permute(a, rows, S)


def report_permute(a, rows, S):
    """The ratio permuted / clean per model and t, with intervals over the clips."""
    table, curves, out = [], dict(schedule={}, uniform={}), pathlib.Path(a.run) / "probe"
    for model, its in grouped(rows, "model").items():
        for (axis, k, t), clips in grouped(its, "point").items():
            by = grouped(clips, "frames")
            for loss, which in (("appearance", "own"), ("joint", "own"), ("joint", "original"))[:3 if "original" in by else 1]:
                clean, permuted = ([r[loss] for r in by[frames]] for frames in ("clean", which))
                ratio, low, high = metrics.bootstrap(permuted, over=clean)
                table.append(dict(model=model, axis=axis, step=k, t=round(t, 4), flow_of=which, loss=loss, clean=np.mean(clean),
                                  permuted=np.mean(permuted), ratio=ratio, low=low, high=high))
                label, x = model if loss == "appearance" else f"joint, {which}", k if axis == "schedule" else t
                curves[axis].setdefault(label, {})[x] = ratio, low, high
    write_csv(out / "permute.csv", table)
    print(f"\nloss of permuted / clean clips, {a.clips} of them [95 %]; joint: appearance + motion, own: against the flow of the shuffled clip\n")
    steps, shown = {r["step"]: r["t"] for r in table if r["axis"] == "schedule"}, curves["schedule"]
    print(markdown([f"step of {S} (t)", *shown], [[f"{k} ({t:.2f})", *(cell(*curve[k]) for curve in shown.values())] for k, t in steps.items()]))
    for axis, xlabel, times in (("schedule", f"step of {S}", steps), ("uniform", "t", None)):
        some = {label: curve for label, curve in curves[axis].items() if not label.startswith("joint")}
        plot(out / f"permute-{axis}.png", some, xlabel, "appearance loss, permuted / clean", times)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Fig. 8

@torch.no_grad()
def sdedit(a):
    """Fig. 8: noise a clip to step k, finish the generation with its own caption, and see what of the clip is left."""
    models, config = load(a, "videojam")
    model, sigma, S = models["videojam"], config["flow"]["sigma"], config["sample"]["steps"]
    times = sample.linear_quadratic_schedule(S, S // 2, config["sample"]["emulated"])
    steps, rows, kept = sorted({round(S * p / 100) for p in range(0, 101, 10)}), [], {}
    for index, got in batches(a, data.open_data(config, "test"), model.device):
        z1, z0 = data.encode(model.tae, got, sigma), sample.noise(model, [a.seed + i for i in index])
        kept.setdefault("source", [got["video"].cpu(), flow.flow_to_rgb(got["flow"], sigma).cpu()])
        for k in steps:
            z = train.interpolate(z1, z0, times[k].to(model.device).expand(len(index)))
            for _, _, z in sample.sampler(model, got["caption"], index, start=k, z=z):
                pass
            video, motion = (stream.cpu() for stream in sample.decode(model, z))
            kept.setdefault(k, [video, motion])
            for i, clip, source, spec in zip(index, video, got["video"].cpu(), got["spec"]):
                seen, was = (metrics.see(v, spec["objects"][0]["color"]) for v in (clip, source))
                gap = (seen.centroid - was.centroid)[seen.found & was.found]    # (frames where both are seen, 2)
                rows.append(dict(step=k, clip=i, psnr=metrics.psnr(clip[None], source[None]), rms=(clip - source).square().mean().sqrt().item(),
                                 place_px=gap.norm(dim=1).mean().item(), path_px=(gap - gap.mean(0)).norm(dim=1).mean().item()))
    rows = gather(rows)
    return rows if common.RANK else report_sdedit(a, rows, times, kept)


def report_sdedit(a, rows, times, kept):
    """What is left of the source by step, with intervals over the clips; a sheet of three clips finished from 20, 60, 80 % of the steps."""
    S, out, by, table, curves = len(times) - 1, pathlib.Path(a.run) / "probe", {}, [], {}
    for k, clips in grouped(rows, "step").items():
        table.append(dict(step=k, t=round(times[k].item(), 4)))
        for name in ("psnr", "rms", "place_px", "path_px"):
            by[name, k] = metrics.bootstrap([r[name] for r in clips])
            table[-1].update(zip((name, f"{name}_low", f"{name}_high"), by[name, k]))
    write_csv(out / "sdedit.csv", table)
    steps = {r["step"]: r["t"] for r in table}
    print(f"\nwhat is left of the source, {a.clips} clips [95 %]; place: distance of the object's centre, path: the same after a common shift\n")
    print(markdown([f"from step of {S} (t)", "PSNR dB", "place px", "path px"],
                   [[f"{k} ({t:.2f})", *(cell(*by[name, k]) for name in ("psnr", "place_px", "path_px"))] for k, t in steps.items()]))
    for name, label in (("place_px", "place of the object"), ("path_px", "its path"), ("rms", "pixels (RMS)")):
        curves[label] = {k: np.array(by[name, k]) / max(r[name] for r in table) for k in steps}
    plot(out / "sdedit.png", curves, f"step of {S}", "distance from the source, of its largest", steps)
    some = ["source"] + sorted({round(S * p / 100) for p in (20, 60, 80)})
    common.write_sheet(out / "sdedit-sheet.png", [stream[i] for i in range(min(3, a.clips)) for k in some for stream in kept[k]])
    print(out / "sdedit-sheet.png")
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Tabs. 1 and 3

VARIANTS = {                                                                    # name -> (stage, how to sample)
    "base": ("base", {}), "control": ("control", {}), "VideoJAM": ("videojam", {}),
    "without text guidance": ("videojam", dict(w1=0.0)), "without Inner-Guidance": ("videojam", dict(w2=0.0)),
    "without optical flow": ("videojam", dict(use_motion=False)), "IP2P guidance": ("videojam", dict(guidance="ip2p")),
    "Eq. 8, other reading": ("videojam", {}),                                   # choice 4: the motion half to the letter, or not
    "shown the true motion": ("videojam", dict(guidance="none")),               # not in the paper: how well do the frames follow a perfect d?
}
SIZES = ("small", "medium", "large")
HITS = ("colour", "shape", "motion", "direction", "dynamic")                    # right or wrong
SHARES = ("found", *HITS[:4], "speed_error", "dynamic")                         # in percent
COLUMNS = (*SHARES[:5], "direction_error", "speed_error", "jerk", "area_variation", "parts", "dynamic", "warp", "agreement")


@torch.no_grad()
def show_motion(model, prompts, seeds, d, **options):
    """Sample with d_t overwritten at every step by the true flow d (B, 2, T, H, W), noised to that t -> video and motion picture."""
    C, z0 = model.config["tae"]["channels"], sample.noise(model, seeds)
    d1 = model.tae.encode(flow.flow_to_rgb(d, model.config["flow"]["sigma"]).to(model.device), motion=True)
    for _, t, z in sample.sampler(model, prompts, seeds, z=z0.clone(), **options):
        z[:, C:] = t * d1 + (1 - t) * z0[:, C:]                                 # the sampler goes on from this very tensor
    return [clip.cpu() for clip in sample.decode(model, z)]


def clips_of(a, name, prompts, d):
    """The variant's clips (B, 3, T, H, W) and motion pictures or None, made AT_ONCE at a time and kept; a batch already made is not made again."""
    stage, options = VARIANTS[name]
    model = common.load_run(a.run, stage, a.device)
    if name.startswith("Eq. 8"):
        model.config["guide_motion"] = "text" if model.config["guide_motion"] == "literal" else "literal"
    checksum = common.read_weights(pathlib.Path(a.run) / f"{stage}.pt")["checksum"]
    folder, paths = pathlib.Path(a.run) / "probe" / "clips" / name.replace(" ", "-").lower(), []
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(prompts), AT_ONCE):
        paths.append(folder / f"{first}.pt")
        some, mine = prompts[first:first + AT_ONCE], first // AT_ONCE % common.WORLD == common.RANK
        key = json.dumps([checksum, options, model.config["sample"], model.config["guide_motion"], a.seed, some])
        if not mine or paths[-1].exists() and torch.load(paths[-1], weights_only=True).get("key") == key:
            continue
        seeds = [a.seed + first + i for i in range(len(some))]
        if name == "shown the true motion":
            streams = show_motion(model, some, seeds, d[first:first + AT_ONCE], **options)
        else:
            streams = sample.generate(model, some, seeds, bar=common.RANK == 0, at_once=AT_ONCE, **options)
        streams = [((v + 1) * 127.5).round().byte() for v in streams if v is not None]
        torch.save(dict(key=key, streams=streams), f"{paths[-1]}.tmp")
        os.replace(f"{paths[-1]}.tmp", paths[-1])
    common.barrier()
    parts = zip(*(torch.load(path, weights_only=True)["streams"] for path in paths))
    video, *motion = (torch.cat(part).float() / 127.5 - 1 for part in parts)
    return video, motion[0] if motion else None


def side_by_side(clips, frames=4):
    """Clips (3, T, H, W) in one line of a sheet: `frames` of each, a white frame between two of them."""
    pick = torch.linspace(0, clips[0].shape[1] - 1, min(frames, clips[0].shape[1])).round().long()
    white = torch.ones_like(clips[0][:, :1])
    return torch.cat([part for clip in clips for part in (clip[:, pick], white)][:-1], dim=1)


def score(name, video, flows, prompts, config):
    """One row of metrics per clip."""
    rows = []
    for i in range(common.RANK, len(prompts), common.WORLD):
        words = data.parse(prompts[i])
        row = metrics.read_clip(video[i], words, None if flows is None else flows[i], config["fps"], config["world"]["size"])
        rows.append(dict(variant=name, clip=i, prompt=prompts[i], kind=words["kind"], asked=words["motion"], **row))
    return gather(rows)


def read_prompts(a):
    """The prompts that can be scored, and those that can only be shown: of --prompts, or of the held-out ones."""
    wanted = list(data.PROMPTS)
    if a.prompts:
        if not pathlib.Path(a.prompts).is_file():
            raise FileNotFoundError(f"--prompts {a.prompts}: no such file; expected a text file with one prompt per line")
        wanted = [line.strip() for line in pathlib.Path(a.prompts).read_text().splitlines() if line.strip()]
    count, scored, unread = min(a.clips, len(wanted)), [], []
    for prompt in (wanted[i * len(wanted) // count] for i in range(count)):     # of every kind, as they are in order of kind
        try:
            words = data.parse(prompt)
            if words.get("camera") or words["motion"] in data.PAIRED and len(words["objects"]) < 2:
                raise ValueError(f"{prompt!r}: found a panning camera or a motion of two with one named, expected neither")
            scored.append(prompt)
        except ValueError as error:
            unread.append(prompt)
            common.print0(f"{error}; sampled, shown, not scored")
    if not wanted:
        raise ValueError(f"--prompts {a.prompts}: found an empty file, expected at least one prompt")
    return scored, unread


@torch.no_grad()
def ablate(a):
    """Tabs. 1 and 3 on 128 held-out prompts, the same seeds for all: every metric, by kind of motion and by the size of the object."""
    models, config = load(a, "base", "control", "videojam")
    prompts, unread = read_prompts(a)
    sigma, out, rows, shown = config["flow"]["sigma"], pathlib.Path(a.run) / "probe", [], {}
    true = torch.zeros(len(prompts + unread), 5, *(config[key] for key in ("frames", "height", "width")))       # 0: no truth of what cannot be read
    if prompts:
        truth = data.open_data(config, "test").of_prompts(prompts)
        again, painted = sample.reconstruct(next(iter(models.values())), truth["video"], flow.flow_to_rgb(truth["flow"], sigma))
        rows += score("ground truth", truth["video"], truth["flow"], prompts, config)
        rows += score("reconstructions", again, flow.rgb_to_flow(painted, sigma), prompts, config)
        true[:len(prompts)] = torch.cat([truth["video"], truth["flow"]], 1)
        shown["ground truth"] = true[:, :3]
    for name, (stage, _) in VARIANTS.items():
        if stage in models:
            video, motion = clips_of(a, name, prompts + unread, true[:, 3:])
            rows += score(name, video, None if motion is None else flow.rgb_to_flow(motion, sigma), prompts, config)
            if name in ("base", "control", "VideoJAM"):
                shown[name] = video
            if name == "VideoJAM":
                shown["its motion"] = motion
    if common.RANK:
        return rows

    count = min(8, len(prompts))                                                # eight of the scored prompts, and all that could not be read
    some = [*(i * len(prompts) // count for i in range(count)), *range(len(prompts), len(prompts + unread))]
    common.write_sheet(out / "ablate.png", [side_by_side([clips[i] for clips in shown.values()]) for i in some], columns=1000)
    print(f"{out / 'ablate.png'}: {' | '.join(shown)}\nits rows: {' | '.join((prompts + unread)[i] for i in some)}")
    if rows:
        stats = summary(rows)
        write_csv(out / "ablate-clips.csv", rows)
        write_csv(out / "ablate.csv", stats)
        (out / "ablate.md").write_text(tables(rows, stats))
        print(tables(rows, stats))
    return rows


def summary(rows):
    """Every metric's mean and 95 % interval per variant: over all clips, by kind of motion, by the object's size in the clip (Fig. 7)."""
    cut, table = np.nanquantile([r["area"] for r in rows if r["variant"] == "ground truth"], (1 / 3, 2 / 3)), []
    size = lambda r: "lost" if math.isnan(r["area"]) else SIZES[np.searchsorted(cut, r["area"])]
    for variant, own in grouped(rows, "variant").items():
        for group in ("all", *data.KINDS, *SIZES):
            some = [r for r in own if group in ("all", r["kind"], size(r))]
            for metric in COLUMNS:
                values = [r[metric] for r in some if not math.isnan(r[metric])]
                mean, low, high = metrics.bootstrap(values)
                if metric in HITS and mean in (0, 1):                           # where all clips agree the bootstrap has no width: Wilson's interval
                    low, high = (max(share, 0) / 100 for share in metrics.interval(mean * len(values), len(values)))
                table.append(dict(variant=variant, group=group, clips=len(values), metric=metric, mean=mean, low=low, high=high))
    return table


def tables(rows, stats):
    """Markdown of `summary`'s stats: all metrics; VideoJAM less each variant, clip by clip; motion right by kind and by size."""
    own, found = grouped(rows, "variant"), {(r["variant"], r["group"], r["metric"]): (r["mean"], r["low"], r["high"]) for r in stats}
    table = lambda heads, text_of, names: markdown(["", *heads], [[name, *(text_of(name, head) for head in heads)] for name in names])
    every = lambda name, metric: cell(*found[name, "all", metric], metric in SHARES)
    motion = lambda name, group: cell(*found[name, group, "motion"], True)
    less = lambda name, metric: cell(*metrics.bootstrap([v[metric] - r[metric] for v, r in zip(own["VideoJAM"], own[name])]), metric in SHARES, "+")
    text = [table(COLUMNS, every, own)]
    if "VideoJAM" in own:
        others = [name for name in own if name != "VideoJAM"]
        text += ["VideoJAM less each, on the same prompts and seeds (shares in points):", table(COLUMNS, less, others)]
    text += ["Motion right, by kind:", table(data.KINDS, motion, own)]
    text += ["Motion right, by the object's size in the clip (cut at the ground truth's thirds; lost ones left out):", table(SIZES, motion, own)]
    return "\n\n".join(text) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Speed.

def peak_memory(device, reset=False):
    """The most bytes taken since the last reset, of the GPU or resident in the process (Linux; elsewhere nan)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if not os.path.exists("/proc/self/clear_refs"):
        return math.nan
    if reset:
        ctypes.CDLL(None).malloc_trim(0)                                        # what was freed before goes back to the system
        pathlib.Path("/proc/self/clear_refs").write_text("5")                   # VmHWM, the most that was resident, starts again
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])


def timed(device, work):
    """Seconds that work() takes, the GPU's included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def peak_flops(config, device):
    """FLOP/s that count as 100 %: the config's `tflops` for a GPU; elsewhere the best of ten products of 2048 x 2048 matrices, measured."""
    if device.type == "cuda":
        return 1e12 * config["tflops"], f"{config['tflops']:g} TFLOP/s (tflops=)"
    a = torch.ones(2048, 2048, dtype=torch.bfloat16 if config["precision"] == "bf16" else torch.float32, device=device)
    best = 2 * 2048 ** 3 / min(timed(device, lambda: a @ a) for _ in range(10))
    return best, f"{best / 1e12:.3f} TFLOP/s, measured: a product of 2048 x 2048 matrices"


def text_length(text, prompts):
    """Tokens that each of these prompts takes in one batch: the longest one's of our encoder, always text.length of a frozen one."""
    return text.tokenize(prompts).shape[1] if isinstance(text, nets.ByteText) else text.length


def time_training(config, device, seed, steps):
    """Steps of training, as train.py takes them, of base and joint net in turn -> seconds {motion: [...]}, peak bytes, the nets, tokens of the text.

    One net is both: the base is the joint one without its two layers of motion. At most `steps` of each, and two minutes once there are three.
    """
    C, *size = common.latent_size(config)
    micro, batch = train.micro_batches(config, config["batch"]), config["batch"]
    n, before, parts = len(micro[0]), peak_memory(device, reset=True), common.build_sharded(config, device, motion=True)
    state, layers = train.prepare(config, parts, 1e-4), (parts["dit"].motion_in, parts["dit"].motion_out)
    z = torch.randn(n, 2 * C, *size, generator=common.generator(seed, "speed")) # (n, 2C, T, H, W)
    prompts = (data.PROMPTS * (n // len(data.PROMPTS) + 1))[:n]
    stored = parts["text"](prompts) if config["text"]["frozen"] else None       # as data.py stores them

    def latents(index):
        return z[:len(index)], prompts[:len(index)], stored and [[x[:len(index)] for x in some] for some in stored]
    losses = {motion: train.dit_loss(config, parts, motion, latents, 0, device) for motion in (False, True)}

    def step(k, motion):
        parts["dit"].motion_in, parts["dit"].motion_out = layers if motion else (None, None)
        train.gradient(config, state, losses[motion], k, micro, batch)
        train.update(config, state, k, 1e-4)

    for motion in (False, True, False, True):                                   # allocations, compilation
        step(0, motion)
    peak_memory(device, reset=True)
    took, start = {False: [], True: []}, time.perf_counter()
    for k in range(steps):
        for motion in took:
            took[motion].append(timed(device, lambda: step(k, motion)))
        if k >= 2 and time.perf_counter() - start > 120 and common.WORLD == 1:  # several ranks must stop together
            break
    return took, peak_memory(device) - before, parts, text_length(parts["text"], prompts)


def time_encoding_and_sampling(config, parts, device, seed):
    """One batch through the TAE, one clip sampled, as data.py and sample.py do it: [(what, seconds, clips, FLOPs, peak bytes)]."""
    tae, prompts = common.build_tae(config).to(device, memory_format=torch.channels_last).eval().requires_grad_(False), data.STRAIGHT[:1]
    model = types.SimpleNamespace(config=config, tae=tae, motion=True, device=device, **{name: part.eval() for name, part in parts.items()})
    got = data.MovingShapes(config["frames"], config["height"], config["width"], seed).batch(range(min(4, config["batch"])), device)
    n, o = len(got["video"]), sample.settle(model)
    with torch.device("meta"), torch.no_grad():                                 # the TAE's FLOPs are torch's own count
        meta = common.build_tae(config)
        with FlopCounterMode(display=False) as encoding:
            latent = meta.encode(torch.empty(1, *got["video"].shape[1:]))
        with FlopCounterMode(display=False) as decoding:
            meta.decode(latent, config["frames"])
    evaluations = 2 * o["steps"] + o["motion_steps"]                            # Eq. 8: three in the first half, then two
    drawing = common.flops(config, True, text_length(model.text, prompts), texts=2 / evaluations)           # the prompt and "" are encoded once
    drawing = evaluations * drawing + 2 * decoding.get_total_flops()
    rows = []
    for what, clips, flops, times, work in (
            ("encoding, both streams", n, 2 * n * encoding.get_total_flops(), 3, lambda: data.encode(tae, got, config["flow"]["sigma"])),
            (f"sampling, {o['steps']} steps, {evaluations} evaluations", 1, drawing, 1, lambda: sample.generate(model, prompts, [seed]))):
        before = peak_memory(device, reset=True)
        seconds = min(timed(device, work) for _ in range(times))
        rows.append((what, seconds, clips, flops, peak_memory(device) - before))
    return rows


def speed(a):
    """Clips, tokens and FLOPs per second, their share of the peak (MFU) and memory of training (base and joint net in turn), encoding and sampling.

    FLOPs are the model's own, `common.flops`, a training step three times a forward pass. Attention counts whole; what checkpointing computes again
    does not count. Memory is what each part adds.
    """
    config = common.load_config(a.settings)
    device = common.find_device(a.device or config["device"])
    if config["precision"] == "auto":
        config["precision"] = common.fastest_precision(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                              # as train.py
    fastest, which = peak_flops(config, device)
    took, bytes_, parts, length = time_training(config, device, a.seed, a.steps)
    batch, N = config["batch"], math.prod(common.latent_size(config)[1:]) // config["dit"]["patch"] ** 2
    measured = []
    for motion, what in ((False, "base"), (True, "joint")):                     # dropped texts are one text, encoded once
        flops = 3 * batch * common.flops(config, motion, length, texts=1 - config["drop_text"]) / common.WORLD
        measured.append((f"training step, {what}", np.median(took[motion]), batch, flops, bytes_))
    if common.WORLD == 1:
        measured += time_encoding_and_sampling(config, parts, device, a.seed)
    if common.RANK:
        return
    rows = [dict(what=what, seconds=seconds, clips_per_s=clips / seconds, tokens_per_s=clips * N / seconds, tflops=flops / seconds / 1e12,
                 share=flops / seconds / fastest, peak_gb=peak / 1e9) for what, seconds, clips, flops, peak in measured]
    write_csv(pathlib.Path(config["run"]) / "probe" / "speed.csv", rows)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{config['preset']}: {N} tokens a clip, {batch} clips a step, micro_batch={config['micro_batch']}, {config['precision']}, "
          f"checkpointing={config['checkpointing']}, {common.WORLD} x {where}, torch {torch.__version__}\n")
    line = "{what}|{seconds:.3g}|{clips_per_s:.3g}|{tokens_per_s:,.0f}|{tflops:.3g}|{share:.1%}|{peak_gb:.2f} GB"
    print(markdown(["", "seconds", "clips/s", "tokens/s", "TFLOP/s each", "MFU", "memory"], [line.format(**row).split("|") for row in rows]))
    ratio, planned = np.divide(took[True], took[False]), train.plan_memory({**config, "gpus": common.WORLD})["together"]
    low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
    print(f"\njoint / base: {middle:.3f}x, the median of {len(ratio)} pairs (half of them within {low:.3f} to {high:.3f})\n"
          f"memory of training: planned {planned / 1e9:.2f} GB, measured {bytes_ / 1e9:.2f} GB\n100 % of MFU is {which}")


# ---------------------------------------------------------------------------------------------------------------------

EXPERIMENTS = dict(permute=permute, sdedit=sdedit, ablate=ablate, speed=speed)


def main(argv=None):
    p = argparse.ArgumentParser(description="The paper's experiments on the embedded world.")
    p.add_argument("experiment", choices=EXPERIMENTS)
    p.add_argument("settings", nargs="*", help="speed: key=value as for train.py, in place of a run")
    p.add_argument("--run", default="runs/tiny")
    p.add_argument("--clips", type=int, help="clips, or prompts of ablate (default 128, or all of --prompts)")
    p.add_argument("--steps", type=int, default=20, help="speed: training steps of each net (default 20, or as many as two minutes hold)")
    p.add_argument("--prompts", help="ablate: a file with one prompt per line in place of the held-out ones")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="")
    a = p.parse_args(argv)
    if a.clips is None:
        a.clips = sys.maxsize if a.prompts else 128
    if min(a.clips, a.steps) < 1:
        raise ValueError(f"--clips {a.clips} --steps {a.steps}: expected at least 1 of each")
    if a.prompts and a.experiment != "ablate":
        raise ValueError(f"--prompts is for ablate, found it with {a.experiment}: leave it out")
    if a.settings and a.experiment != "speed":
        raise ValueError(f"{a.experiment} reads the config from --run, found {' '.join(a.settings)}: leave it out")
    if common.WORLD > 1:
        a.device = a.device or (f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
        dist.init_process_group("nccl" if a.experiment == "speed" and a.device.startswith("cuda") else "gloo")
    EXPERIMENTS[a.experiment](a)
    common.close_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"probe.py: {error}")
