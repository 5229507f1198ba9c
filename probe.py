"""The paper's experiments, on a world whose motion is known exactly.

    python probe.py report --run runs/tiny  # colours, directions, coherence of each stage's clips
    python probe.py permute                 # Fig. 3: does the loss notice shuffled frames?
    python probe.py sdedit                  # Fig. 8: when are motion and appearance settled?
    python probe.py ablate                  # Tabs. 1 and 3, Fig. 7
    python probe.py predicates              # are the rules that read motion from pixels right?
    python probe.py plan preset=4b gpus=32  # parameters, FLOPs, hours and memory, on paper
    python probe.py speed preset=small      # clips, tokens and FLOPs per second, measured

plan and speed take the keys of config.yaml; plan also gpus=1 utilisation=0.4 tflops=0 (the share of
a GPU's peak that is reached, and that peak; 0: of an H100 and an A100), speed also steps=20
tflops=989. The others take the flags below; those from --split on are for report alone. ablate's
CSV has every clip, its tables are printed.

Tables go to <run>/probe as CSV, beside pictures. The control is the base, trained on for as long
as VideoJAM. All models get the same prompts and the same noise, so differences are paired.

Letters: z = [x, d] appearance and motion latents (B, 2C, T, H, W), z0 noise, z1 data; k a step of
sampling, t its time (0 noise, 1 data).
"""
import argparse
import csv
import itertools
import json
import math
import pathlib
import time
import weakref

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import metrics
import sample
import train
from flow import rgb_to_flow

HITS = ("colour", "direction", "motion", "picture", "shape")     # right or wrong: Wilson's interval
SHARES = (*HITS, "lost")                                         # in percent

# -------------------------------------------------------------------------------------------------
# Shared by the experiments


def load_models(run, device="", stages=common.STAGES[1:]):
    """{stage: model} of those stages that are trained, and the config."""
    models = {}
    for stage in stages:
        if pathlib.Path(run, f"{stage}.pt").exists():
            models[stage] = common.load_run(run, stage, device)
        else:
            print(f"{run} has no {stage}.pt, so it is left out")
    if not models:
        raise FileNotFoundError(f"{run} has none of {', '.join(stages)}: train first, "
                                f"python train.py run={run}")
    config = next(iter(models.values())).config
    if config.data.root:
        raise ValueError(f"{run} was trained on {config.data.root}, expected the embedded world, "
                         "whose motion is known: take a run without data.root")
    return models, config


def compare(models, prompts, split, seed, variants):
    """Clips of the same prompts, from the same noise, of ground truth, the TAE and the variants
    {name: (stage, settings)}: {name: videos}, {name: motion pictures}, {name: metrics of each}."""
    first = next(iter(models.values()))
    sigma = first.config.flow.sigma
    truth = data.open_data(first.config, split).of_prompts(prompts)
    again = data.through_tae(first.config, first.tae, truth["video"])
    videos = {"ground truth": truth["video"], "through the TAE": again}
    flows = {"ground truth": truth["flow"]}
    motions = {}
    for name, (stage, options) in variants.items():
        if stage not in models:
            continue
        s = sample.settings(models[stage], **options)
        seeds = range(seed, seed + len(prompts))
        videos[name], motion = sample.generate(models[stage], prompts, seeds, s)
        if motion is not None:
            motions[name] = motion
            flows[name] = rgb_to_flow(motion, sigma)
    words = [data.parse(prompt) for prompt in prompts]
    rows = {}
    for name, clips in videos.items():
        its_flows = flows.get(name, [None] * len(prompts))
        rows[name] = [metrics.read_clip(*clip) for clip in zip(clips, words, its_flows)]
    return videos, motions, rows


def summary(rows, metric):
    """(mean, low, high) over the clips to which the metric applies."""
    values = [row[metric] for row in rows if not math.isnan(row[metric])]
    if metric in HITS and values:
        return sum(values) / len(values), *metrics.wilson(sum(values), len(values))
    return metrics.bootstrap(values)


def cell(numbers, metric, sign=""):
    """(mean, low, high) as text; with sign="+" a difference, of shares in points."""
    if math.isnan(numbers[0]):
        return "-"
    if metric not in SHARES:
        mean, low, high = [f"{number:{sign}.2f}" for number in numbers]
        return f"{mean} [{low}, {high}]"
    mean, low, high = [f"{100 * number:{sign}.0f}" for number in numbers]
    return f"{mean}{'' if sign else ' %'} [{low}, {high}]"


def print_table(title, heads, lines):
    print(f"\n{title}")
    widths = [max(map(len, column)) for column in zip(heads, *lines)]
    for line in [heads, *lines]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def write_csv(run, name, rows):
    path = pathlib.Path(run, "probe", f"{name}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(path)


def write_side_by_side(path, streams, numbers, frames=4):
    """A sheet with a line per clip: some frames of each stream {name: (B, 3, T, H, W)}."""
    sheet = []
    for i in numbers:
        line = []
        for clips in streams.values():
            shown = torch.linspace(0, clips.shape[2] - 1, frames).round().long()
            line += [clips[i][:, shown], torch.ones_like(clips[i][:, :1])]     # a white frame
        sheet.append(torch.cat(line[:-1], dim=1))
    common.write_sheet(path, sheet, columns=sheet[0].shape[1])
    print(f"{path}: {' | '.join(streams)}")


def plot_steps(run, name, rows, value, label):
    """A curve per stage over the steps of sampling and their times; a table of the same."""
    curves = {}
    for row in rows:
        curves.setdefault(row["stage"], []).append(row)
    lines = []
    for points in zip(*curves.values()):
        cells = [cell((point[value], point["low"], point["high"]), value) for point in points]
        lines.append([str(points[0]["step"]), f"{points[0]['t']:.3f}", *cells])
    print_table(f"{label} [95 % interval]", ["step", "t", *curves], lines)
    write_csv(run, name, rows)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no curves: matplotlib is missing, pip install matplotlib")
    axes = Figure(layout="tight").subplots()
    for stage, points in curves.items():
        steps = [point["step"] for point in points]
        axes.plot(steps, [point[value] for point in points], label=stage)
        axes.fill_between(steps, [p["low"] for p in points], [p["high"] for p in points], alpha=0.2)
    axes.set_xticks(steps[::2], [f"{p['step']}\n{p['t']:.2f}" for p in points[::2]])
    axes.set(xlabel="step of sampling, and below it t", ylabel=label)
    axes.legend()
    axes.figure.savefig(pathlib.Path(run, "probe", f"{name}.png"))


# -------------------------------------------------------------------------------------------------
# How good is a run? train.py ends with this.

REPORT = {"colour": "colour right", "direction": "direction right", "roughness": "roughness, px",
          "lost": "object lost", "shape": "shape right"}


def report(a):
    """Ground truth, the TAE and each stage on prompts of straight lines: <run>/<out>.json, .png."""
    models, _ = load_models(a.run, a.device, a.stages.split(","))
    prompts = data.straight_prompts(a.split, a.count or 64)
    options = dict(w_text=a.w_text, w_motion=a.w_motion, guidance=a.guidance,
                   use_motion=not a.no_motion)
    variants = {stage: (stage, options) for stage in models}
    videos, motions, rows = compare(models, prompts, a.split, a.seed, variants)
    s = sample.settings(list(models.values())[-1], **options)
    numbers = dict(seed=a.seed, split=a.split, settings=vars(s))
    lines = []
    for name, its in rows.items():
        numbers[name] = {metric: summary(its, metric) for metric in [*REPORT, "picture"]}
        lines.append([name, *(cell(numbers[name][metric], metric) for metric in REPORT)])
    title = f"{len(prompts)} straight lines, split {a.split}, seed {a.seed} [95 % interval]"
    print_table(title, ["", *REPORT.values()], lines)
    again = videos.pop("through the TAE")
    numbers["tae_psnr_db"] = metrics.psnr(videos["ground truth"], again)
    print(f"TAE: {numbers['tae_psnr_db']:.1f} dB")
    for stage, motion in motions.items():
        right = cell(numbers[stage]["picture"], "picture")
        print(f"direction right in the motion pictures of {stage}: {right}")
        videos["its motion"] = motion
    some = range(0, len(prompts), 9)                    # each of the eight directions once
    numbers["sheet"] = [prompts[i] for i in some]
    text = json.dumps(numbers, indent=1).replace("NaN", "null")
    common.write_text(f"{a.run}/{a.out}.json", text)
    write_side_by_side(f"{a.run}/{a.out}.png", videos, some)


# -------------------------------------------------------------------------------------------------
# Fig. 3


def shuffle_frames(batch, orders):
    """Clips with their frames in other orders (B, T), and the exact flow of these clips."""
    videos, flows = [], []
    for video, spec, order in zip(batch["video"], batch["spec"], orders.tolist()):
        after = order[1:] + [order[-1] + 1]             # the last one goes on as it did before
        videos.append(video[:, order])
        flows.append(data.flow_between([spec], order, after, *video.shape[2:], video.device)[0])
    return dict(video=torch.stack(videos), flow=torch.stack(flows))


def appearance_loss(model, z1, z0, t, captions):
    """Eq. 3, or the appearance half of Eq. 6, of each clip: (B,)."""
    C = common.latent_size(model.config)[0]
    if not model.motion:
        z1, z0 = z1[:, :C], z0[:, :C]
    t = t.to(z1.device).expand(len(z1))
    with common.autocast(model.config, model.device):
        u = model.dit(train.interpolate(z1, z0, t), t, *model.text(captions))
    return train.mse(u[:, :C], train.velocity(z1, z0)[:, :C])


# Fig. 3. At t = 0 the input is noise alone, so no model can notice anything there.
@torch.no_grad()
def permute(a):
    """The loss of clips with shuffled frames over that of the same clips, by step of sampling."""
    models, config = load_models(a.run, a.device)
    first = next(iter(models.values()))
    world = data.open_data(config, "test")
    times = sample.schedule(config.sample)
    steps = range(0, config.sample.steps, max(1, config.sample.steps // 20))
    losses = {key: ([], []) for key in itertools.product(models, steps)}    # clean, shuffled
    for numbers in data.chunks(0, a.count or 256, config):
        draws = [common.generator(a.seed, "permute", i) for i in numbers]
        orders = torch.stack([torch.randperm(config.frames, generator=g) for g in draws])
        batch = world.batch(numbers, first.device)
        clean = data.encode(config, first.tae, batch)
        shuffled = data.encode(config, first.tae, shuffle_frames(batch, orders))
        z0 = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in draws]).to(clean)
        for (stage, k), both in losses.items():
            for values, z1 in zip(both, (clean, shuffled)):
                loss = appearance_loss(models[stage], z1, z0, times[k], batch["caption"])
                values += loss.tolist()
    rows = []
    for (stage, k), (clean, shuffled) in losses.items():
        row = dict(stage=stage, step=k, t=times[k].item())
        row["clean"] = np.mean(clean)
        row["shuffled"] = np.mean(shuffled)
        row["ratio"], row["low"], row["high"] = metrics.ratio(shuffled, clean)
        rows.append(row)
    plot_steps(a.run, "permute", rows, "ratio", "appearance loss, shuffled over clean")


# -------------------------------------------------------------------------------------------------
# Fig. 8


@torch.no_grad()
def sdedit(a):
    """Noise clips to step k and finish them with their own captions: what of them is left?"""
    models, config = load_models(a.run, a.device)
    count = a.count or 32
    batch = data.open_data(config, "test").batch(range(count), next(iter(models.values())).device)
    source = batch["video"].cpu()
    seeds = range(a.seed, a.seed + count)
    times = sample.schedule(config.sample)
    C, steps = common.latent_size(config)[0], config.sample.steps
    rows = []
    streams = {"source": source}
    for stage, model in models.items():
        z0 = sample.noise(model, seeds)
        z1 = torch.zeros_like(z0)
        z1[:, :C] = data.encode(config, model.tae, batch)[:, :C]
        # VideoJAM must not see how the source moves. Of its d nothing is known, so it is the mean
        # of all d, which is 0, under as much fresh noise as the sampler has left at this step.
        for k in sorted({round(steps * tenth / 10) for tenth in range(11)}):
            z = train.interpolate(z1, z0, times[k].to(model.device).expand(count))
            for _, _, z in sample.sampler(model, batch["caption"], seeds, start=k, z=z):
                pass
            videos = sample.decode(model, z)[0].cpu()
            gaps = [path_gap(*clips) for clips in zip(videos, source, batch["spec"])]
            row = dict(stage=stage, step=k, t=times[k].item())
            row["place"], row["low"], row["high"] = metrics.bootstrap(gaps)
            row["psnr_db"] = metrics.psnr(videos, source)
            rows.append(row)
            if k in (round(0.2 * steps), round(0.6 * steps), round(0.8 * steps)):
                streams[f"{stage} from {k}"] = videos
    plot_steps(a.run, "sdedit", rows, "place", "distance of the object from its place, px")
    write_side_by_side(f"{a.run}/probe/sdedit-sheet.png", streams, range(min(3, count)))


def path_gap(video, source, spec):
    """Mean distance in px between the places of the named object in two clips; nan if lost."""
    color = spec["objects"][0]["color"]
    gap = metrics.track(video, color).centroid - metrics.track(source, color).centroid
    return gap.norm(dim=1).nanmean().item()


# -------------------------------------------------------------------------------------------------
# Tabs. 1 and 3, Fig. 7

VARIANTS = {                                            # name: (stage, how it samples)
    "base": ("base", {}),
    "control": ("control", {}),
    "VideoJAM": ("videojam", {}),
    "without text guidance": ("videojam", dict(w_text=0.0)),
    "without Inner-Guidance": ("videojam", dict(w_motion=0.0)),
    "without optical flow": ("videojam", dict(use_motion=False)),
    "IP2P guidance": ("videojam", dict(guidance="ip2p")),
}
METRICS = ("motion", "direction", "colour", "shape", "lost", "roughness", "area_variation",
           "agreement")


def ablate(a):
    """Every variant on the same prompts and noise, read from the pixels."""
    models, _ = load_models(a.run, a.device)
    count = min(a.count or 128, len(data.PROMPTS))
    prompts = [data.PROMPTS[i * len(data.PROMPTS) // count] for i in range(count)]
    videos, _, rows = compare(models, prompts, "test", a.seed, VARIANTS)
    print_ablation(prompts, rows)
    clips = []
    for name, its in rows.items():
        clips += [dict(variant=name, prompt=prompt, **row) for prompt, row in zip(prompts, its)]
    write_csv(a.run, "ablate", clips)
    write_side_by_side(f"{a.run}/probe/ablate.png", videos, range(0, count, max(1, count // 8)))


def print_ablation(prompts, rows):
    """rows {variant: metrics of each clip} as tables: all clips; less VideoJAM; by group."""
    whole, less, by_group = [], [], []
    groups = groups_of(prompts, rows["ground truth"])
    best = rows.get("VideoJAM")
    for name, its in rows.items():
        whole.append([name, *(cell(summary(its, metric), metric) for metric in METRICS)])
        if best:
            gaps = []
            for metric in METRICS:
                gap = metrics.paired([row[metric] for row in best], [row[metric] for row in its])
                gaps.append(cell(gap, metric, sign="+"))
            less.append([name, *gaps])
        parts = [summary([its[i] for i in members], "motion") for members in groups.values()]
        by_group.append([name, *(cell(part, "motion") for part in parts)])
    print_table("all clips [95 % interval]", ["", *METRICS], whole)
    if best:
        print_table("VideoJAM less each, clip by clip (shares in points)", ["", *METRICS], less)
    print_table("motion right, by kind and by size of the object", ["", *groups], by_group)


# Fig. 7: small objects are a limit of VideoJAM, as m of Eq. 5 shrinks with them.
def groups_of(prompts, truth):
    """{name: numbers of its clips}: by kind of motion, and by thirds of the true object's area."""
    groups = {kind: [] for kind in data.KINDS}
    for i, prompt in enumerate(prompts):
        groups[data.parse(prompt)["kind"]].append(i)
    by_area = np.argsort([row["area"] for row in truth])
    for name, third in zip(("small", "medium", "large"), np.array_split(by_area, 3)):
        groups[name] = third
    return groups


# Tabs. 4, 5, 7 -> Tabs. 1, 2, 6. VBench's scores in percent are stretched to these ranges.
RANGES = {"aesthetic": (0, 100), "imaging": (0, 100), "subject": (14.62, 100),
          "background": (26.15, 100), "smoothness": (70.6, 99.75), "dynamic": (0, 100)}


# App. C.1
def vbench_aggregate(**scores):
    """The six scores of RANGES in percent -> (appearance, motion) in percent."""
    part = {}
    for name, (low, high) in RANGES.items():
        part[name] = 100 * (scores[name] - low) / (high - low)
    appearance = part["aesthetic"] + part["imaging"] + part["subject"] + part["background"]
    return appearance / 4, (part["smoothness"] + 0.5 * part["dynamic"]) / 1.5


# -------------------------------------------------------------------------------------------------
# Do the rules of metrics.py read ground truth right?


def confusion(frames, side, count, seed=0):
    """{motion: {rule: which share of the motion's true clips it accepts}}."""
    world = data.MovingShapes(frames, side, side, seed, "val")
    matrix = {}
    for motion in data.MOTIONS:
        accepted = dict.fromkeys(data.MOTIONS, 0)
        prompts = data.fixed_prompts([motion], count)
        for video, prompt in zip(world.of_prompts(prompts)["video"], prompts):
            for rule, agrees in metrics.judge(video, data.parse(prompt)).items():
                accepted[rule] += bool(agrees)
        matrix[motion] = {rule: n / count for rule, n in accepted.items()}
    return matrix


def predicates(a):
    """The confusion matrix at two sizes, in percent."""
    for frames, side in ((8, 32), (16, 64)):
        matrix = confusion(frames, side, a.count or 40, a.seed)
        lines, wrong = [], []
        for k, (motion, shares) in enumerate(matrix.items(), 1):
            shown = [f"{100 * share:.0f}" if share else "." for share in shares.values()]
            lines.append([f"{k} {motion}", *shown])
            wrong += [share for rule, share in shares.items()
                      if rule != motion and (motion, rule) not in metrics.IMPLIED]
        right = [shares[motion] for motion, shares in matrix.items()]
        title = f"{frames} x {side} x {side}: a motion's clips, accepted by each rule, in %"
        print_table(title, ["", *map(str, range(1, len(right) + 1))], lines)
        print(f"right: {np.mean(right):.1%}, of each motion at least {min(right):.1%}")
        print(f"wrong and not implied: {np.mean(wrong):.2%}, in a cell at most {max(wrong):.1%}")
        rows = [dict(motion=motion, **shares) for motion, shares in matrix.items()]
        write_csv(a.run, f"predicates-{frames}x{side}", rows)


# -------------------------------------------------------------------------------------------------
# How large, how long? (App. C)


def parameters(*nets):
    return sum(p.numel() for net in nets for p in net.parameters())


def forward_flops(config, motion):
    """FLOPs of the DiT and its text encoder for one clip, counted on a device without memory."""
    with torch.device("meta"):
        text = common.build_text(config)
        dit = common.build_dit(config, motion)
        C, *size = dit.size
        z = torch.empty(1, 2 * C if motion else C, *size)
        t = torch.empty(1)
    longest = "x" * (config.text.length - 1)            # and the end token
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dit(z, t, *text([longest]))
    return counter.get_total_flops()


class Bytes(TorchDispatchMode):
    """Counts what tensors take that are made inside, now and at most; also on the device "meta"."""
    now = 0
    peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        old = {storage._cdata for storage in storages_of((args, kwargs))}
        for storage in storages_of(out):
            if storage._cdata not in old:               # no view, nothing in place
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def storages_of(tree):
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


def tae_costs(config, clips, training):
    """(FLOPs, bytes) of the TAE for so many clips: a training step on tiles, or encoding."""
    tae = config.tae
    frames = min(config.frames, tae.tile) if training else config.frames
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    with torch.device("meta"):
        net = common.build_tae(config).to(dtype)
        video = torch.empty(clips, 3, frames, config.height, config.width, dtype=dtype)
    with FlopCounterMode(display=False) as flops, Bytes() as made, torch.set_grad_enabled(training):
        if training:
            latent, _ = net.moments(video)
            net.reconstruct(latent).float().square().mean().backward()
        else:
            net.encode(video)
    # In fp32: weights alone, or with gradients, two moments of AdamW and the average
    return flops.get_total_flops(), made.peak + (20 if training else 4) * parameters(net)


def dit_memory(config, gpus, motion=True):
    """{what: bytes} on each GPU while the DiT is trained."""
    with torch.device("meta"):
        text = common.build_text(config)
        dit = common.build_dit(config, motion)
        tae = common.build_tae(config)
    D = config.dit.dim
    N = math.prod(dit.size[1:]) // dit.patch ** 2
    hidden = dit.blocks[0].ffn.down.in_features
    # What autograd keeps of one block: of every token 8 vectors of the residual stream and its
    # norms in fp32, 11 in and around attention (14 in bf16), and 4 inside SwiGLU.
    fp32 = config.precision == "fp32"
    size = 4 if fp32 else 2
    vectors = 11 if fp32 else 14
    block = N * (4 * 8 * D + size * (vectors * D + 4 * hidden))
    # Of every token of the text the keys and values, and in its own encoder 19 vectors a block.
    L = config.text.length
    block += L * size * 2 * D
    blocks = len(dit.blocks) * block
    if config.checkpointing:                            # the inputs, and one block at a time
        blocks = len(dit.blocks) * N * 4 * D + block
    blocks += len(text.blocks) * L * (4 * 4 + size * 15) * config.text.dim
    clips = math.ceil(config.batch / gpus)
    clips = min(clips, config.micro_batch or clips)
    share = 4 * parameters(text, dit) / gpus            # in fp32
    # Weights as they are computed with, in bf16: alone all of them, but for checkpointing; sharded
    # two blocks, and the gradients of one, once more in fp32 to be summed.
    kept = dit.blocks[:1] if config.checkpointing else [text, dit]
    copies = 0 if fp32 else 2 * parameters(*kept)
    if gpus > 1:
        copies = parameters(dit.blocks[0]) * (16 if fp32 else 10)
    parts = {"weights": share, "gradients": share, "AdamW": 2 * share, "averaged weights": share,
             "copies": copies, "TAE": 4 * parameters(tae), "activations": clips * blocks}
    return {**parts, "together": sum(parts.values())}


PEAKS = {"H100": 989, "A100": 312}          # TFLOP/s in bf16; the paper's were A100


def plan(config, gpus, utilisation, tflops):
    """The size, FLOPs, hours and memory of each stage of a training, without doing it."""
    peaks = {f"{tflops:g} TFLOP/s": tflops} if tflops else PEAKS
    with torch.device("meta"):
        nets = {"TAE": common.build_tae(config), "text encoder": common.build_text(config),
                "DiT": common.build_dit(config), "VideoJAM's DiT": common.build_dit(config, True)}
    for name, net in nets.items():
        print(f"{name:<15}{parameters(net) / 1e6:10,.3f} M parameters")
    stages = config.stages.split(",")
    costs = []                              # name, steps, FLOPs of a step, bytes on each GPU
    if "tae" in stages:
        clips = math.ceil(config.tae.batch / gpus)
        clips = min(clips, config.tae.micro_batch or clips)
        flops, size = tae_costs(config, clips, training=True)
        costs.append(["tae", config.tae.steps, flops / clips * config.tae.batch, size])
    dits = [(stage, config["base" if stage == "base" else "videojam"].steps)
            for stage in stages if stage != "tae"]
    flops, size = tae_costs(config, common.clips_at_once(config), training=False)
    flops = 2 * flops / common.clips_at_once(config)            # of a clip: x and d
    if config.data.cache:
        costs.append(["encoding, once", 1, flops * config.data.cache, size])
    else:
        costs.append(["encoding", sum(steps for _, steps in dits), flops * config.batch, size])
    for stage, steps in dits:
        motion = stage == "videojam"
        flops = 3 * config.batch * forward_flops(config, motion)        # backward is two forwards
        costs.append([stage, steps, flops, dit_memory(config, gpus, motion)["together"]])
    heads = ["stage", "steps", "TFLOPs", *(f"s, {gpu}" for gpu in peaks),
             *(f"hours, {gpu}" for gpu in peaks), "GB per GPU"]
    lines = []
    for name, steps, flops, size in costs:
        seconds = [flops / (gpus * peak * 1e12 * utilisation) for peak in peaks.values()]
        hours = [steps * s / 3600 for s in seconds]
        numbers = [flops / 1e12, *seconds, *hours, size / 1e9]
        lines.append([name, str(steps), *(f"{number:,.3g}" for number in numbers)])
    print_table(f"{gpus:g} GPUs, {utilisation:g} of their peak; TFLOPs and s are of a step, with "
                f"{config.batch} clips (tae: {config.tae.batch})", heads, lines)


def speed(config, device, steps, tflops):
    """Time training steps of the joint net on latents of noise; MFU is a share of tflops=."""
    net = common.build_nets(config, device, motion=True)
    for part in net.values():
        part.init()
    optimizer = train.make_optimizer(config, net, 1e-4)
    C, T, H, W = net.dit.size
    B = config.batch
    z1 = torch.randn(B, 2 * C, T, H, W).to(device)
    prompts = (data.PROMPTS * B)[:B]
    draws = [train.draw(config, 0, row, z1.shape[1:]) for row in range(B)]
    t, z0, _, keep_motion = [torch.stack(values).to(device) for values in zip(*draws)]
    times = []
    for _ in range(int(steps) + 2):
        start = time.perf_counter()
        for rows in train.micro_batches(config, "videojam"):
            with common.autocast(config, device):
                captions = [prompts[row] for row in rows]
                loss, _ = train.dit_loss(net, z1[rows], captions, t[rows], z0[rows],
                                         keep_motion[rows], motion=True)
            (loss * len(rows) / B).backward()
        common.average_and_limit_gradients(net, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = np.median(times[2:])                      # the first two allocate and compile
    rate = 3 * B * forward_flops(config, motion=True) / 1e12 / seconds / common.WORLD
    row = dict(seconds=seconds, clips_per_s=B / seconds)
    row["tokens_per_s"] = row["clips_per_s"] * T * H * W / net.dit.patch ** 2
    planned = dit_memory(config, common.WORLD)
    here = planned["together"] - planned["averaged weights"] - planned["TAE"]
    row.update(tflops=rate, mfu=rate / tflops, planned_gb=here / 1e9)
    if device.type == "cuda":
        row["allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
    common.stop()
    if common.RANK == 0:
        print_table(f"a step of {B} clips on {common.WORLD} x {device}, TFLOP/s of each",
                    list(row), [[f"{x:.4g}" for x in row.values()]])
        write_csv(config.run, "speed", [row])


# -------------------------------------------------------------------------------------------------
# The command line


EXPERIMENTS = {"report": report, "permute": permute, "sdedit": sdedit, "ablate": ablate,
               "predicates": predicates}
# These take key=value: their own, and those of config.yaml.
KEYED = {"plan": dict(gpus=1, utilisation=0.4, tflops=0), "speed": dict(steps=20, tflops=989)}


def main(argv):
    if argv and argv[0] in KEYED and not {"-h", "--help"} & set(argv):
        own = KEYED[argv[0]]
        rest = []
        for argument in argv[1:]:
            key, _, value = argument.partition("=")
            if key not in own:
                rest.append(argument)
            elif value.replace(".", "", 1).isdigit():
                own = {**own, key: float(value)}
            else:
                raise ValueError(f"found {argument}, expected {key}= and a number")
        if argv[0] == "plan":
            return plan(common.load_config(rest), **own)
        return speed(*common.start_from(rest), **own)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("experiment", choices=[*EXPERIMENTS, *KEYED])
    add("--run", default="runs/tiny", help="the run folder")
    add("--count", type=int, help="prompts or clips")
    add("--seed", type=int, default=0, help="of the first clip's noise")
    add("--device", default="")
    add("--split", default="test", choices=("test", "val"), help="of the prompts")
    add("--stages", default=",".join(common.STAGES[1:]), help="those of these")
    add("--w-text", type=float, help="w1 of Eq. 8")
    add("--w-motion", type=float, help="w2 of Eq. 8")
    add("--guidance", default="inner", choices=("inner", "ip2p", "text", "none"))
    add("--no-motion", action="store_true", help="d = 0 at every step")
    add("--out", default="report", help="the name of its two files")
    a = parser.parse_args(argv)
    EXPERIMENTS[a.experiment](a)


if __name__ == "__main__":
    common.command_line(main, __doc__)
