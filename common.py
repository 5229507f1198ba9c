"""What every script shares and no part of the paper: config, ranks, weights, checkpoints, pictures.

    load_config, build_*            config.yaml and the command line -> a config -> the networks
    start, stop, broadcast          one process, or many under torchrun (FSDP2)
    read_ahead, to_device, ask_all  so that neither the GPU nor Python waits for the other
    save_weights, load_run          the weights of a finished stage, one plain file
    Checkpoint, Log                 the state of an unfinished stage, and its lines in log.jsonl
    write_video, write_sheet        mp4, gif and png
"""
import collections
import concurrent.futures
import contextlib
import datetime
import difflib
import hashlib
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import sysconfig
import time
import types
import warnings
import zipfile
import zlib
from importlib.util import find_spec

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
MAY_CHANGE = """run stages device micro_batch tae.micro_batch checkpointing compile tae.steps tae.lr
    base.steps base.lr videojam.steps videojam.lr text.lr clip log_every save_every save_minutes
    sample_every""".split()
NOT_KEPT = {"stages", "device"}         # a run takes these anew each time


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


def read_arguments(arguments):
    """["dit.depth=3"] -> what they give, the defaults (both flat), the presets of config.yaml."""
    document = yaml.safe_load(pathlib.Path(__file__).with_name("config.yaml").read_text())
    flat = flatten(document["default"])
    given = dict(read_pair(argument, flat) for argument in arguments)
    return given, flat, document["presets"]


def load_config(arguments=()):
    """["preset=4b", "dit.depth=3"] -> the resolved, checked Config; ValueError in one line.
    A run folder that exists knows its config: keys given again must agree, or be in MAY_CHANGE."""
    given, flat, presets = read_arguments(arguments)
    run = given.get("run") or f"runs/{given.get('preset', flat['preset'])}"
    path = pathlib.Path(run, "config.json")
    try:
        stored = flatten(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is no config of train.py: repair or delete it") from None
    preset = given.get("preset", stored.get("preset", flat["preset"]))
    if preset not in presets:
        raise ValueError(f"preset={preset}: expected one of {', '.join(presets)}")
    flat.update(flatten(presets[preset]))
    flat.update({key: stored[key] for key in flat.keys() & (stored.keys() - NOT_KEPT)})
    for key, value in given.items():
        if key not in MAY_CHANGE and key in stored and stored[key] != value:
            raise ValueError(f"{run} was made with {key}={stored[key]}, found {key}={value}: "
                             "leave it out, or take another run=folder")
    flat.update(given, preset=preset, run=run)
    check(flat)
    return nest(flat)


MAY_BE_ZERO = """seed micro_batch tae.micro_batch data.cache tae.steps base.steps videojam.steps
    text.depth warmup sample_every save_minutes""".split()


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


PIXELS_AT_ONCE = 2 ** 21        # one clip of 32 x 256 x 256


def clips_at_once(config):
    """How many clips fit where nothing is trained: one by one at the paper's size."""
    pixels = min(config.frames, config.tae.tile) * config.height * config.width
    return max(1, min(32, PIXELS_AT_ONCE // pixels))


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


PATIENT = None          # the group of all ranks that waits for hours; `start` makes it


def together():
    """Are there other ranks to talk to? Not alone, and not after `stop`."""
    return dist.is_initialized()


def barrier():
    """Wait for all ranks, also while rank 0 writes a hundred GB."""
    if together():
        dist.barrier(PATIENT)


def broadcast(work, *args):
    """What work(*args) returns on rank 0, or its error, on every rank: ranks that looked at the
    disk each for itself could disagree, and then wait for each other for ever."""
    box = [None, None]
    if RANK == 0:
        try:
            box[0] = work(*args)
        except (ValueError, OSError) as error:
            box[1] = error
    if together():
        dist.broadcast_object_list(box, group=PATIENT)
    if box[1] is not None:
        raise box[1] if RANK == 0 else SystemExit(1)        # one line is enough
    return box[0]


def patiently(work, *args):
    """work(*args), tried again for a minute while there are several ranks: for so long NFS may hide
    a file that another machine wrote. OSError after that."""
    for seconds in (5, 15, 40) if together() else ():
        try:
            return work(*args)
        except OSError as error:
            print(f"rank {RANK}: {error}; trying again in {seconds} s")
            time.sleep(seconds)
    return work(*args)


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


def start(name=""):
    """Join the other ranks -> this rank's device, chosen as `find_device` does."""
    global PATIENT
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP, of a single process
    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        # cuDNN's attention gives NaN gradients for some lengths (pytorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if WORLD > 1:
        least = "2.8" if device.type == "cuda" else "2.9"
        if torch.__version__ < least:
            raise ValueError(f"found torch {torch.__version__}, expected {least} for several ranks:"
                             " older ones keep averaged weights, or sum gradients on CPUs")
        # While training a rank that hears nothing gives up after torch's own time. PATIENT waits
        # where one of them reads, writes or encodes.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        PATIENT = dist.new_group(timeout=datetime.timedelta(hours=6))
    return device


def start_from(arguments):
    """`start`, then the config as rank 0 reads it -> config, device."""
    given, flat, _ = read_arguments(arguments)
    device = start(given.get("device", flat["device"]))
    return broadcast(load_config, arguments), device


def stop():
    """Leave the other ranks. gloo aborts where one is gone before the others, hence the barrier."""
    if together():
        barrier()
        dist.destroy_process_group()


def uses_bf16(config, device):
    if config.precision == "auto":      # GPUs before the A100 only imitate it
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return config.precision == "bf16"


def autocast(config, device):
    """bf16 inside the networks; weights, gradients, optimizer and loss stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config, device))


def compiles(config, device):
    """Are the DiT's blocks compiled? auto: on CUDA, where a compiler and torch allow it."""
    why_not = None
    forgets = config.checkpointing and torch.__version__ < "2.12"
    if config.compile == "always" and forgets:
        raise ValueError(f"found compile=always checkpointing=true and torch {torch.__version__}, "
                         "expected 2.12, as older ones forget checkpointing: compile=never")
    if config.compile != "auto" or device.type != "cuda":
        return config.compile == "always"
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
    if not (any(map(shutil.which, compilers)) and header.exists() and find_spec("triton")):
        why_not = "needs triton, a C compiler and Python.h: install gcc and python3-dev"
    elif forgets:
        why_not = f"torch {torch.__version__} forgets checkpointing there, expected 2.12"
    if why_not:
        print0(f"compile=auto: not compiled, slower ({why_not})")
    return not why_not


def build_nets(config, device, motion=False, training=True):
    """Text encoder and DiT without values, over several ranks sharded (FSDP2, ZeRO-3).

    A block's weights are gathered when its turn comes, in bf16 where the config says so;
    gradients are averaged over the ranks in fp32. Alone the same lines build the nets whole."""
    with torch.device("meta"):          # sizes without memory: no GPU ever holds a large net whole
        net = nn.ModuleDict(dict(text=build_text(config), dit=build_dit(config, motion)))
    if training and compiles(config, device):
        for block in net.dit.blocks:
            block.compile()
    dtype = torch.bfloat16 if uses_bf16(config, device) else None
    if together():
        mesh = dist.init_device_mesh(device.type, (WORLD,))
        # Inputs are not cast: bf16 has too few digits for t. Autocast casts what may be.
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for module in [*net.dit.blocks, net.text, net.dit]:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    elif dtype and not training:        # as autocast would round them, in half the memory
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
    return net.to_empty(device=device)


def average_and_limit_gradients(net, limit):
    """Average them over the ranks, then scale them down to that norm -> the norm they had."""
    own = [p.grad for p in net.parameters() if not isinstance(p, DTensor)]
    if own and together():              # FSDP averages by itself; the TAE is whole on every rank
        flat = torch.cat([grad.flatten() for grad in own])
        dist.all_reduce(flat)
        means = (flat / WORLD).split([grad.numel() for grad in own])
        for grad, mean in zip(own, means):
            grad.copy_(mean.view(grad.shape))
    norm = nn.utils.clip_grad_norm_(net.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def to_device(tensor, device):
    """A tensor of the CPU on the device; Python does not wait for a copy to a GPU."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def read_ahead(read, cuts, steps, depth):
    """Yield [read(step, rows) for rows in cuts] for each step, read by a thread up to `depth` steps
    before it is needed."""
    def batch(step):
        return [read(step, rows) for rows in cuts]

    if not depth:
        yield from map(batch, steps)
        return
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = collections.deque()
        for step in steps:
            waiting.append(pool.submit(batch, step))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def ask_all(bad_steps, *flags):
    """[bad_steps, *flags], of each the maximum over the ranks -> at once, a function that gives
    this list. Called a step later it finds the list there; called at once, Python would wait."""
    numbers = torch.stack([bad_steps, *(bad_steps.new_zeros(()) + flag for flag in flags)])
    if together():
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    copy = numbers.to("cpu", non_blocking=numbers.is_cuda)
    copied = torch.cuda.Event() if numbers.is_cuda else None
    if copied:
        copied.record()

    def answers():
        if copied:
            copied.synchronize()
        return copy.tolist()

    return answers


def progress(work, name, **more):
    """tqdm's bar on rank 0: redrawn twice a second, in a file twice a minute."""
    seconds = 0.5 if sys.stderr.isatty() else 30
    return tqdm(work, name, mininterval=seconds, maxinterval=seconds, disable=RANK > 0, **more)


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
            if together():
                dist.all_reduce(pair)
            mean = pair[0] / pair[1]                    # nan where nothing was counted
            line[name] = mean.cpu().double().numpy().round(5).tolist()
        seconds = (time.time() - self.time) / (step - self.first)
        line.update(more, seconds_per_step=round(seconds, 4), clips_per_s=round(batch / seconds, 2))
        if RANK == 0:
            with open(self.path, "a") as file:
                text = json.dumps(line).replace("NaN", "null").replace("Infinity", "null")
                file.write(text + "\n")
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
    """Eight hex digits that tell one file of weights from another: of the checksums in its zip."""
    try:
        members = zipfile.ZipFile(path).infolist()
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is damaged: delete it and train that stage again") from None
    sums = [member.CRC for member in members if "/data/" in member.filename]
    return f"{zlib.crc32(repr(sums).encode()):08x}"


def read_weights(path, check=True):
    """A finished stage's file -> its dict; FileNotFoundError or ValueError, one line.
    check=False trusts the checksums, where only the step and the parent are wanted."""
    path = pathlib.Path(path)
    advice = f"python train.py run={path.parent} stages={path.stem}"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; train it: {advice}")
    try:
        damaged = check and zipfile.ZipFile(path).testzip()     # torch.load does not look at them
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise
    except Exception:                                   # damaged bytes raise a dozen types
        damaged = True
    if damaged or "weights" not in saved:
        raise ValueError(f"{path} is damaged, or no weights of train.py; delete it, {advice}")
    return saved


def read_stage(run, stage):
    """A finished stage's dict, on every rank. Rank 0 reads and checks the file; the others get its
    tensors without values, and `load_into` fills them. ValueError if another TAE made its latents.
    """
    path = pathlib.Path(run, f"{stage}.pt")
    whole = {}

    def read():
        whole.update(read_weights(path))
        if stage != "tae" and whole["tae"] != identity(path.with_name("tae.pt")):
            raise ValueError(f"{path} was trained on another tae.pt than the one beside it: "
                             f"delete {stage}.* and train it again")
        empty = {name: w.to("meta") for name, w in whole["weights"].items()}
        return dict(whole, weights=empty)

    saved = broadcast(read)
    return whole if RANK == 0 else saved


def load_into(net, weights, path, new=()):
    """Fill a net, sharded or not, on all ranks with the weights of rank 0; names in `new` keep what
    they have. ValueError names a misfit."""
    own = {name: w for name, w in net.state_dict().items() if name not in new}
    for name in [*own, *weights]:
        found, expected = [tuple(w[name].shape) if name in w else None for w in (weights, own)]
        if found != expected:
            raise ValueError(f"{path}: {name}: found {found}, expected {expected}; "
                             "the file was made with another config or version")
    for name, w in own.items():
        whole = weights[name]
        whole = torch.empty_like(whole, device=w.device) if whole.is_meta else whole.to(w.device)
        whole = whole.contiguous()
        if together() and not isinstance(w, DTensor):       # put_whole sends a DTensor's parts
            dist.broadcast(whole, 0)
        put_whole(w, whole)
    return net


def load_tae(config, device):
    """The run's trained TAE, for use."""
    saved = read_stage(config.run, "tae")
    tae = build_tae(config).to(device, memory_format=torch.channels_last)
    load_into(tae, saved["weights"], f"{config.run}/tae.pt")
    return tae.eval().requires_grad_(False)


def load_run(run, stage="videojam", device=""):
    """All that sampling needs, with averaged weights, over several ranks sharded; motion: does this
    stage predict d? FileNotFoundError or ValueError, one line each."""
    def read():
        if not pathlib.Path(run, "config.json").exists():
            raise FileNotFoundError(
                f"{run} is no run folder; train first: python train.py run={run}")
        return load_config([f"run={run}"])

    config = broadcast(read)
    device = find_device(device)
    tae = load_tae(config, device)
    saved = read_stage(run, stage)
    motion = stage == "videojam"
    net = build_nets(config, device, motion, training=False)
    load_into(net, saved["weights"], f"{run}/{stage}.pt").eval().requires_grad_(False)
    return types.SimpleNamespace(config=config, tae=tae, text=net.text, dit=net.dit,
                                 motion=motion, device=device)


class Checkpoint:
    """<run>/<stage>.state/<parent>/step-N: weights, their average, AdamW's moments.

    parent: the identity of the weights that the stage started from. torch's DCP writes a file per
    rank, and reads them for any other number of ranks. A folder is written beside, then renamed.
    AdamW's moments are made here, as zeros, because DCP fills tensors in place.
    """

    def __init__(self, config, stage, net, optimizer, average, parent):
        self.folder = pathlib.Path(config.run, f"{stage}.state", parent)
        self.tensors = {}
        for name, w in net.state_dict(keep_vars=True).items():
            self.tensors[f"net.{name}"] = w
            self.tensors[f"average.{name}"] = average[name]
        for name, p in net.named_parameters():
            optimizer.state[p] = dict(step=torch.zeros((), device=p.device),
                                      exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            for kind, tensor in optimizer.state[p].items():
                self.tensors[f"{kind}.{name}"] = tensor

    def steps(self):
        """The steps of the checkpoints that are there, newest first."""
        names = [path.name[5:] for path in self.folder.glob("step-*")]
        found = [int(name) for name in names if name.isdigit()]
        return sorted(found, reverse=True)

    def newest(self):
        """The step of the newest whole one, 0 if there is none; ValueError if none is whole."""
        others = [path for path in self.folder.parent.glob("*") if path != self.folder]
        if others:
            print0(f"{', '.join(map(str, others))}: left by a training from other weights, delete "
                   "it if you do not need it")
        steps = self.steps()
        for step in steps:
            try:
                patiently(check_whole, self.folder / f"step-{step}")
                return step
            except OSError as error:
                print0(f"{self.folder}/step-{step} is torn ({error}), trying the one before")
        if steps:
            raise ValueError(f"{self.folder} has no whole checkpoint: delete it to start again")
        return 0

    def load(self):
        """Fill everything from the newest whole one, all ranks from the same -> its step."""
        step = broadcast(self.newest)
        path = self.folder / f"step-{step}"

        def read():
            try:
                dcp.load(self.tensors, checkpoint_id=path, process_group=PATIENT)
            except dcp.CheckpointException as error:        # raised by all ranks if one cannot read
                reason = str(error).splitlines()[-1]
                raise OSError(f"{path} could not be read ({reason}): repair it, or delete it to go "
                              "on from the one before") from None

        try:
            if step:
                patiently(read)
        except OSError:
            if RANK > 0:
                sys.exit(1)             # one line, of rank 0, is enough
            raise
        return step

    def save(self, step):
        """Write step-N, keep the one before it; OSError leaves the older ones as they are."""
        path = self.folder / f"step-{step}"
        writing = self.folder / "writing"
        reason = None
        broadcast(shutil.rmtree, writing, True)         # what a kill has left; no error if nothing
        try:
            dcp.save(self.tensors, checkpoint_id=writing, process_group=PATIENT)
        except dcp.CheckpointException as error:
            reason = str(error).splitlines()[-1]

        def keep():
            try:
                if reason:
                    raise OSError(reason)
                patiently(check_whole, writing)
            except OSError as error:
                shutil.rmtree(writing, ignore_errors=True)
                raise OSError(f"{path} could not be written ({error}): is the disk full?") from None
            shutil.rmtree(path, ignore_errors=True)     # a torn one
            os.replace(writing, path)
            there = [old for old in self.steps() if old <= step]
            for old in there[2:]:       # the newest two stay
                shutil.rmtree(self.folder / f"step-{old}", ignore_errors=True)

        broadcast(keep)


def check_whole(folder):
    """OSError where parts that the checkpoint's metadata names are missing or cut off."""
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except OSError:
        raise
    except Exception as error:                          # damaged bytes raise a dozen types
        raise OSError(f".metadata is damaged: {error}") from None
    for part in metadata.storage_data.values():
        if (folder / part.relative_path).stat().st_size < part.offset + part.length:
            raise OSError(f"{part.relative_path} is cut off")


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
