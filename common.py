"""What every script shares and no part of the paper: config, ranks, weights, checkpoints, pictures.

    load_config, build_*            config.yaml and the command line -> a config -> the networks
    start, stop, broadcast          one process, or many under torchrun (FSDP2)
    save_weights, load_run          the weights of a finished stage, one plain file
    Checkpoint, Log                 the state of an unfinished stage, and its lines in log.jsonl
    write_video, write_sheet        mp4, gif and png
"""
import contextlib
import difflib
import hashlib
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
import zipfile
import zlib

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from model import TAE, ByteText, DiT, put_whole

RANK = int(os.environ.get("RANK", 0))                   # torchrun sets these three
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
STAGES = ("tae", "base", "control", "videojam")

# -------------------------------------------------------------------------------------------------
# Config: config.yaml has every key with its default, then what the presets change.

# A run folder keeps its config. These keys may change later; all others decide what it holds.
MAY_CHANGE = """run stages device micro_batch checkpointing compile tae.steps tae.lr base.steps
    base.lr videojam.steps videojam.lr text.lr log_every save_every sample_every""".split()


class Config(dict):
    """A nested dict whose keys are attributes too: config.tae.steps."""
    __setattr__ = dict.__setitem__

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


def flatten(tree, prefix=""):
    """A nested dict -> {dotted key: value}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def nest(flat):
    """{dotted key: value} -> a nested Config."""
    config = Config()
    for key, value in flat.items():
        part, _, name = key.rpartition(".")
        place = config.setdefault(part, Config()) if part else config
        place[name] = value
    return config


def read_pair(argument, defaults):
    """"dit.depth=3" -> ("dit.depth", 3), a value of the default's type; ValueError in one line."""
    key, equals, text = argument.partition("=")
    if key not in defaults or not equals:
        near = difflib.get_close_matches(key, defaults, n=1) or ["preset"]
        raise ValueError(f"found {argument!r}, expected key=value: did you mean {near[0]}=...? "
                         "--help prints all keys")
    kind = type(defaults[key])
    if kind is str:
        return key, text
    try:
        value = float(text) if kind is float else json.loads(text)
    except ValueError:
        value = None
    if type(value) is not kind or kind is list and {type(n) for n in value} != {int}:
        like = json.dumps(defaults[key])
        raise ValueError(f"found {argument}, expected a {kind.__name__} like {like}")
    return key, value


def load_config(arguments=()):
    """["preset=4b", "dit.depth=3"] -> the resolved, checked Config; ValueError in one line.
    A run folder that exists knows its config: keys given again must agree, or be in MAY_CHANGE."""
    document = yaml.safe_load(pathlib.Path(__file__).with_name("config.yaml").read_text())
    flat = flatten(document["default"])
    given = dict(read_pair(argument, flat) for argument in arguments)
    run = given.get("run") or f"runs/{given.get('preset', flat['preset'])}"
    path = pathlib.Path(run, "config.json")
    try:
        stored = flatten(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is no config of train.py: repair or delete it") from None
    preset = given.get("preset", stored.get("preset", flat["preset"]))
    if preset not in document["presets"]:
        raise ValueError(f"preset={preset}: expected one of {', '.join(document['presets'])}")
    flat.update(flatten(document["presets"][preset]))
    flat.update({key: stored[key] for key in flat.keys() & (stored.keys() - {"stages"})})
    for key, value in given.items():
        if key not in MAY_CHANGE and key in stored and stored[key] != value:
            raise ValueError(f"{run} was made with {key}={stored[key]}, found {key}={value}: "
                             "leave it out, or take another run=folder")
    flat.update(given, preset=preset, run=run)
    check(flat)
    return nest(flat)


MAY_BE_ZERO = """seed micro_batch data.cache tae.steps base.steps videojam.steps text.depth warmup
    sample_every""".split()


def check(flat):
    """ValueError, one line, where values do not fit each other or the code."""
    def need(ok, key, expected):
        if not ok:
            raise ValueError(f"config: found {key}={flat[key]}, expected {expected}")

    for key, value in flat.items():
        if type(value) is float:
            need(math.isfinite(value), key, "a finite number")
        if type(value) in (int, float) and key != "t_mean":
            least = 0 if type(value) is float or key in MAY_BE_ZERO else 1
            need(value >= least, key, f"{least} or more")
    for key in ("drop_text", "drop_motion", "ema", "cooldown", "world.texture", "world.basic"):
        need(flat[key] <= 1, key, "at most 1")
    need(flat["precision"] in ("auto", "bf16", "fp32"), "precision", "auto, bf16 or fp32")
    need(flat["compile"] in ("auto", "always", "never"), "compile", "auto, always or never")
    need(set(flat["stages"].split(",")) <= set(STAGES), "stages", f"some of {','.join(STAGES)}")
    need(1 < flat["sample.steps"] <= flat["sample.emulated"], "sample.steps", "2 to emulated")
    pixels = flat["tae.spatial"] * flat["dit.patch"]        # of a token
    divisors = {"height": pixels, "width": pixels, "dit.dim": flat["dit.heads"],
                "text.dim": flat["text.heads"], "tae.batch": 2,     # half is painted optical flow
                "tae.tile": 2 * flat["tae.temporal"]}               # tiles overlap by half
    for key, divisor in divisors.items():
        need(flat[key] % divisor == 0, key, f"a multiple of {divisor}")
    need(min(flat["tae.widths"], default=0) > 0, "tae.widths", "numbers of 1 or more")
    need(min(flat["tae.blocks"], default=0) >= 0, "tae.blocks", "numbers of 0 or more")
    halvings = len(flat["tae.widths"]) - 1
    need(len(flat["tae.blocks"]) == halvings, "tae.blocks", "one number fewer than tae.widths")
    with torch.device("meta"):          # its constructor knows which widths fit together
        build_tae(nest(flat))


def latent_size(config):
    """(C, T', H', W') of one stream's latents."""
    tae = config.tae
    frames = math.ceil(config.frames / tae.temporal)
    return tae.channels, frames, config.height // tae.spatial, config.width // tae.spatial


def build_tae(config):
    tae = config.tae
    return TAE(tae.channels, tae.widths, tae.blocks, tae.spatial, tae.temporal, tae.tile)


def build_text(config):
    text = config.text
    return ByteText(text.dim, text.depth, text.heads, text.length)


def build_dit(config, motion=False):
    dit = config.dit
    return DiT(*latent_size(config), dit.dim, dit.depth, dit.heads, [config.text.dim], dit.patch,
               motion, config.checkpointing)


# -------------------------------------------------------------------------------------------------
# One process or many. All ranks do the same work on their share of each batch.


def print0(text):
    """Print on rank 0, above the progress bar."""
    if RANK == 0:
        tqdm.write(text)


def barrier():
    if WORLD > 1:
        dist.barrier()


def broadcast(work):
    """What work() returns on rank 0, or its error, on every rank: ranks that looked at the disk
    each for itself could disagree, and then wait for each other for ever."""
    box = [None, None]
    if RANK == 0:
        try:
            box[0] = work()
        except (ValueError, OSError) as error:
            box[1] = error
    if WORLD > 1:
        dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def find_device(name=""):
    """That device, or cuda, else mps, else cpu; under torchrun each rank has its own GPU."""
    there = [f"cuda:{n}" for n in range(torch.cuda.device_count())] + ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    name = name or there[0]
    if name == "cuda" or name.startswith("cuda") and WORLD > 1:
        name = f"cuda:{LOCAL_RANK}"
    if name not in there:
        raise ValueError(f"found device={name}, expected one of {', '.join(there)}")
    return torch.device(name)


def start(config):
    """Join the other ranks -> this rank's device."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP, of a single process
    device = find_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if WORLD > 1:
        if device.type == "cpu" and torch.__version__ < (2, 9):
            raise ValueError(f"found torch {torch.__version__}, expected 2.9 for several ranks on "
                             "CPUs: before, gloo sums where FSDP asks for the mean")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop():
    """Leave the other ranks. gloo aborts where one is gone before the others, hence the barrier."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def uses_bf16(config, device):
    return config.precision == "bf16" or config.precision == "auto" and device.type == "cuda"


def autocast(config, device):
    """bf16 inside the networks; weights, gradients, optimizer and loss stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config, device))


def build_nets(config, device, motion=False):
    """Text encoder and DiT with their first weights, over several ranks sharded (FSDP2, ZeRO-3).

    A block's weights are gathered when its turn comes, in bf16 where the config says so;
    gradients are averaged over the ranks in fp32. Alone the same lines build the nets whole."""
    with torch.device("meta"):          # sizes without memory: no GPU ever holds a large net whole
        net = nn.ModuleDict(dict(text=build_text(config), dit=build_dit(config, motion)))
    if config.compile == "always" or config.compile == "auto" and device.type == "cuda":
        for block in net.dit.blocks:
            block.compile()
    if WORLD > 1:
        mesh = dist.init_device_mesh(device.type, (WORLD,))
        dtype = torch.bfloat16 if uses_bf16(config, device) else None
        # Inputs are not cast: bf16 has too few digits for t. Autocast casts what may be.
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for module in [*net.dit.blocks, net.text, net.dit]:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for part in net.values():
        part.to_empty(device=device)
        part.init()
    return net


def average_and_limit_gradients(net, limit):
    """Average them over the ranks, then scale them down to that norm -> the norm they had."""
    for p in net.parameters():
        if WORLD > 1 and not isinstance(p, DTensor):    # FSDP averages by itself; the TAE is whole
            dist.all_reduce(p.grad)
            p.grad /= WORLD
    norm = nn.utils.clip_grad_norm_(net.parameters(), limit)
    return norm.full_tensor().item() if isinstance(norm, DTensor) else norm.item()


def generator(*key):
    """A generator seeded by a hash of the key: neighbouring keys have nothing in common."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class Stopped(Exception):
    """SIGTERM came and the state is saved."""


@contextlib.contextmanager
def catch_sigterm():
    """A list that has an entry once SIGTERM came: schedulers send it some time before they kill."""
    caught = []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append(True))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGTERM, before)


def on_any_rank(caught, device):
    """Has one of the ranks caught something? All must leave after the same step."""
    count = torch.tensor(len(caught), device=device)
    if WORLD > 1:
        dist.all_reduce(count)
    return count.item() > 0


def command_line(main, doc, keys=False):
    """Run a script's main: --help prints its docstring, an expected error is one line."""
    script = pathlib.Path(sys.argv[0]).name
    if keys and {"-h", "--help"} & set(sys.argv):
        text = pathlib.Path(__file__).with_name("config.yaml").read_text()
        return print(f"{doc}\nKeys, given as key=value (nested ones as tae.steps=100):\n\n{text}")
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"{script}: {error}")
    except Stopped as stopped:
        print0(f"{script}: {stopped}")
        stop()
        sys.exit(128 + signal.SIGTERM)


# -------------------------------------------------------------------------------------------------
# A run's files: the log, the weights of finished stages, the state of an unfinished one


def write_text(path, text):
    """Write beside, then rename: whole or not at all."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(f"{path}.tmp").write_text(text)
    os.replace(f"{path}.tmp", path)


class Log:
    """<run>/log.jsonl: a line per interval, each number a mean over its steps, clips and ranks."""

    def __init__(self, config, stage, step):
        self.path = pathlib.Path(config.run, "log.jsonl")
        self.stage = stage
        self.begin(step)
        if RANK == 0 and self.path.exists():
            kept = []                   # steps that are taken again shall not stand there twice
            for text in self.path.read_text().splitlines(keepends=True):
                line = json.loads(text) if text.endswith("}\n") else {}     # a kill may tear one
                if line and (line["stage"] != stage or line["step"] <= step):
                    kept.append(text)
            write_text(self.path, "".join(kept))

    def begin(self, step):
        self.first = step
        self.time = time.time()
        self.sums = {}

    def add(self, numbers):
        """numbers: name -> (sum, count), two tensors of any one shape."""
        for name, pair in numbers.items():
            self.sums[name] = self.sums.get(name, 0) + torch.stack(pair)

    def write(self, step, batch, **more):
        """Append the line of the steps since the last one -> its numbers."""
        line = dict(stage=self.stage, step=step)
        for name, pair in self.sums.items():
            if WORLD > 1:
                dist.all_reduce(pair)
            mean = pair[0] / pair[1]                    # nan where nothing was counted
            line[name] = mean.cpu().double().numpy().round(5).tolist()
        seconds = (time.time() - self.time) / (step - self.first)
        line.update(more, seconds_per_step=round(seconds, 4), clips_per_s=round(batch / seconds, 2))
        if RANK == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(line).replace("NaN", "null") + "\n")
        self.begin(step)
        return line


def save(path, content):
    """torch.save beside, then rename: whole or not at all; OSError where it cannot be written."""
    try:
        torch.save(content, f"{path}.tmp")
    except RuntimeError as error:                       # of torch's own writer
        pathlib.Path(f"{path}.tmp").unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}): is the disk full?") from None
    os.replace(f"{path}.tmp", path)


def save_weights(config, stage, net, step, parent="none", tae="none"):
    """<run>/<stage>.pt: the net's weights, the config, and on whose weights this stage stands."""
    weights = {}
    for name, w in net.state_dict().items():
        whole = w.full_tensor() if isinstance(w, DTensor) else w    # gathered one at a time
        if RANK == 0:
            weights[name] = whole.cpu()
    if RANK == 0:
        about = dict(stage=stage, step=step, parent=parent, tae=tae, config=json.dumps(config))
        save(pathlib.Path(config.run, f"{stage}.pt"), dict(about, weights=weights))
    barrier()


def identity(path):
    """Eight letters that tell one file of weights from another: from the checksums in its zip."""
    try:
        members = zipfile.ZipFile(path).infolist()
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is damaged: delete it and train that stage again") from None
    sums = [member.CRC for member in members if "/data/" in member.filename]
    return f"{zlib.crc32(repr(sums).encode()):08x}"


def read_weights(path):
    """A finished stage's file -> its dict; FileNotFoundError or ValueError, one line."""
    path = pathlib.Path(path)
    advice = f"python train.py run={path.parent} stages={path.stem}"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; train it: {advice}")
    try:
        damaged = zipfile.ZipFile(path).testzip()       # torch.load does not look at checksums
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise
    except Exception:                                   # damaged bytes raise a dozen types
        damaged = True
    if damaged or "weights" not in saved:
        raise ValueError(f"{path} is damaged, or no weights of train.py; delete it, {advice}")
    return saved


def read_stage(run, stage):
    """`read_weights` of a stage of the DiT; ValueError if another TAE made its latents."""
    saved = read_weights(run / f"{stage}.pt")
    if saved["tae"] != identity(run / "tae.pt"):
        raise ValueError(f"{run}/{stage}.pt was trained on another tae.pt than the one beside it: "
                         f"delete {stage}.* and train it again")
    return saved


def load_into(net, weights, path, new=()):
    """Fill a net, sharded or not; names in `new` keep what they have. ValueError names a misfit."""
    own = {name: w for name, w in net.state_dict().items() if name not in new}
    for name in [*own, *weights]:
        found, expected = [tuple(w[name].shape) if name in w else None for w in (weights, own)]
        if found != expected:
            raise ValueError(f"{path}: {name}: found {found}, expected {expected}; "
                             "the file was made with another config or version")
    for name, w in own.items():
        put_whole(w, weights[name])
    return net


def load_tae(config, device):
    """The run's trained TAE, for use."""
    path = pathlib.Path(config.run, "tae.pt")
    tae = load_into(build_tae(config), read_weights(path)["weights"], path)
    return tae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def load_run(run, stage="videojam", device=""):
    """All that sampling needs, with averaged weights; motion: does this stage predict d?
    FileNotFoundError or ValueError, one line each."""
    run = pathlib.Path(run)
    if not (run / "config.json").exists():
        raise FileNotFoundError(f"{run} is no run folder; train first: python train.py run={run}")
    config = load_config([f"run={run}"])
    device = find_device(device or config.device)
    tae = load_tae(config, device)
    saved = read_stage(run, stage)
    motion = stage == "videojam"
    with torch.device("meta"):
        net = nn.ModuleDict(dict(text=build_text(config), dit=build_dit(config, motion)))
    net = load_into(net.to_empty(device=device), saved["weights"], run / f"{stage}.pt")
    net.eval().requires_grad_(False)
    return types.SimpleNamespace(config=config, tae=tae, text=net.text, dit=net.dit,
                                 motion=motion, device=device)


class Checkpoint:
    """<run>/<stage>.state/<parent>/step-N: weights, their average, AdamW's moments.

    parent: the identity of the weights that the stage started from. torch's DCP writes a file per
    rank, and reads them for any other number of ranks. A folder is written beside, then renamed.
    """

    def __init__(self, config, stage, net, optimizer, average, parent):
        self.folder = pathlib.Path(config.run, f"{stage}.state", parent)
        self.tensors = {}
        for name, w in net.state_dict(keep_vars=True).items():
            self.tensors[f"net.{name}"] = w
            self.tensors[f"average.{name}"] = average[name]
        for name, p in net.named_parameters():      # DCP fills tensors in place: they must be there
            optimizer.state[p] = dict(step=torch.zeros((), device=p.device),
                                      exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            for kind, tensor in optimizer.state[p].items():
                self.tensors[f"{kind}.{name}"] = tensor

    def steps(self):
        """The steps of the checkpoints that are there, newest first."""
        names = [path.name[5:] for path in self.folder.glob("step-*")]
        found = [int(name) for name in names if name.isdigit()]
        return sorted(found, reverse=True)

    def load(self):
        """Fill everything from the newest one that can be read -> its step; 0 if there is none."""
        steps = broadcast(self.steps)
        others = [path for path in self.folder.parent.glob("*") if path != self.folder]
        if others:
            print0(f"{', '.join(map(str, others))}: left by a training from other weights, delete "
                   "it if you do not need it")
        for step in steps:
            try:
                dcp.load(self.tensors, checkpoint_id=self.folder / f"step-{step}")
                return step
            except dcp.CheckpointException as error:        # of all ranks, with tracebacks
                reason = str(error).splitlines()[-1]
                print0(f"{self.folder}/step-{step} is torn ({reason}), trying the one before")
        if steps:
            raise ValueError(f"{self.folder} has no whole checkpoint: delete it to start again")
        return 0

    def save(self, step):
        """Write step-N, keep the one before it; OSError leaves the older ones as they are."""
        path = self.folder / f"step-{step}"
        writing = self.folder / "writing"
        broadcast(lambda: shutil.rmtree(writing, ignore_errors=True))   # what a kill has left
        try:
            dcp.save(self.tensors, checkpoint_id=writing)
        except dcp.CheckpointException as error:
            reason = str(error).splitlines()[-1]
            raise OSError(f"{path} could not be written ({reason}): is the disk full?") from None
        if RANK == 0:
            shutil.rmtree(path, ignore_errors=True)     # a torn one
            os.replace(writing, path)
            older = [old for old in self.steps() if old <= step]
            for old in older[2:]:
                shutil.rmtree(self.folder / f"step-{old}", ignore_errors=True)
        barrier()


# -------------------------------------------------------------------------------------------------
# Pictures


def to_uint8(video, least=1):
    """(3, T, H, W) in [-1, 1] -> (T, H, W, 3) uint8, pixels repeated until H and W are `least`."""
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().byte()
    frames = pixels.permute(1, 2, 3, 0).cpu().numpy()
    factor = math.ceil(least / min(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def write_video(path, video, fps, motion=None, least=256):
    """An H.264 mp4 that browsers play, or a gif, by the ending; motion to the right of video."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    streams = [video] if motion is None else [video, motion]
    frames = np.concatenate([to_uint8(stream, least) for stream in streams], axis=2)
    if path.suffix == ".gif":
        iio.imwrite(path, frames, plugin="pillow", duration=1000 / fps, loop=0)
    else:                               # a macro block of 16 would resize frames without a word
        iio.imwrite(path, frames, plugin="FFMPEG", fps=fps, codec="libx264",
                    macro_block_size=2, pixelformat="yuv420p")


def write_sheet(path, rows, columns=8, least=64):
    """A PNG with a line per clip (3, T, H, W): `columns` frames from the first to the last."""
    lines = []
    for row in rows:
        frames = to_uint8(row, least)
        chosen = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
        frames = np.pad(frames[chosen], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
        lines.append(np.concatenate(list(frames), axis=1))
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, np.concatenate(lines))


def write_clips(path, videos, motions, fps):
    """Clips and their motion (or None) as one video, below each other, and as a sheet (.png)."""
    rows = list(videos)
    if motions is not None:
        rows = [row for pair in zip(videos, motions) for row in pair]
        motions = torch.cat(list(motions), dim=2)
    write_video(path, torch.cat(list(videos), dim=2), fps, motions)
    write_sheet(pathlib.Path(path).with_suffix(".png"), rows)
