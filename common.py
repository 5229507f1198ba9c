"""What every script shares: the config, weight files, the device, ranks, checkpoints, random numbers, precision, pictures, a run that is read back.

Letters: B clips, C latent channels, T H W latent frames, height, width (of pixels in pictures), N video and L text tokens, D width of the net.
"""
import contextlib
import difflib
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import shutil
import timeit
import types

import imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from model import TAE, ByteText, DiT, RandomText, put_whole

# ---------------------------------------------------------------------------------------------------------------------
# Config: config.yaml holds every key once with its default (the `tiny` preset), then what the other presets change.

def flatten(tree, prefix=""):
    """A nested dict -> {dotted key: value}."""
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def put(config, key, value, origin):
    """Set a dotted key that must exist, to a value of its default's type; raises ValueError naming the nearest key."""
    known = flatten(config)
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        raise ValueError(f"{origin}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "; config.yaml lists them all"))
    kind = type(known[key])
    try:                                                                        # YAML reads 1e-4 as a string, 3 as an int
        right = kind(value) if kind is float and not isinstance(value, bool) else str(value) if kind is str and value is not None else value
    except (TypeError, ValueError):
        right = value
    if type(right) is not kind:
        raise ValueError(f"{origin}: {key}={value!r} is a {type(value).__name__}, expected a {kind.__name__} like {known[key]!r}")
    *path, leaf = key.split(".")
    for part in path:
        config = config[part]
    config[leaf] = right


def load_config(overrides=()):
    """["preset=4b", "dit.depth=3"] -> the resolved, checked config as a nested dict; raises ValueError in one clear line."""
    path = pathlib.Path(__file__).with_name("config.yaml")
    document = yaml.safe_load(path.read_text())
    config, presets = document["default"], document["presets"]
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is no key=value pair; example: preset=small dit.depth=8")
        try:
            pairs.append((key.strip(), yaml.safe_load(value) if value.strip() else ""))
        except yaml.YAMLError:
            raise ValueError(f"command line: {text!r} is no value that YAML reads; quote it") from None
    preset = str(dict(pairs).get("preset", config["preset"]))
    if preset not in presets:
        raise ValueError(f"preset={preset}: unknown, expected one of {', '.join(presets)}")
    for key, value in flatten(presets[preset] or {}).items():
        put(config, key, value, f"config.yaml, preset {preset}")
    for key, value in pairs:
        put(config, key, value, "command line")
    config["run"] = config["run"] or f"runs/{preset}"
    check(config)
    return config


def read_config(path):
    """A run folder's config.json as a nested dict; a key that came after the run was made has its preset's value, one that is gone is left out."""
    stored = json.loads(pathlib.Path(path).read_text())
    config = load_config([f"preset={stored['preset']}"])
    for key, value in flatten(stored).items():
        if key in flatten(config):
            put(config, key, value, str(path))
    return config


def check(config):
    """Raise ValueError, one line, where numbers of the config do not fit together."""
    def need(ok, message):
        if not ok:
            raise ValueError(f"config: {message}")
    tae, dit = config["tae"], config["dit"]
    for key, value in flatten(config).items():
        need(not isinstance(value, float) or math.isfinite(value), f"{key}={value} is no finite number")
        need(key == "t_mean" or not (isinstance(value, (int, float)) and value < 0), f"{key}={value} is negative")
    for key in ("frames", "height", "width", "fps", "batch", "tae.batch", "tae.channels", "dit.dim", "dit.depth", "dit.heads", "dit.patch", "text.heads", "text.length", "tae.spatial",
                "tae.temporal", "tae.tile", "log_every", "save_every", "keep_states", "gpus"):
        need(flatten(config)[key] >= 1, f"{key}={flatten(config)[key]}, expected at least 1")
    for key in ("drop_text", "drop_motion", "ema", "cooldown", "world.basic", "world.texture"):
        need(flatten(config)[key] <= 1, f"{key}={flatten(config)[key]}, expected at most 1")
    steps, emulated = config["sample"]["steps"], config["sample"]["emulated"]
    need(2 <= steps <= emulated, f"sample.steps={steps}, sample.emulated={emulated}, expected 2 <= steps <= emulated")
    need(config["flow"]["sigma"] > 0, f"flow.sigma={config['flow']['sigma']}, expected more than 0")
    need(0.3 <= config["world"]["size"] <= 1.5, f"world.size={config['world']['size']}, expected 0.3 to 1.5")
    need(config["seed"] < 2 ** 31, f"seed={config['seed']}, expected less than 2**31")
    need(config["stages"].strip(" ,"), f"stages={config['stages']!r}, expected some of tae, base, control, videojam")
    need(all(type(n) is int and n >= 0 for n in tae["widths"] + tae["blocks"]) and all(tae["widths"]), f"tae.widths={tae['widths']}, tae.blocks={tae['blocks']}, expected whole numbers")
    cell = tae["spatial"] * dit["patch"]
    for key in ("height", "width"):
        need(config[key] % cell == 0, f"{key}={config[key]} does not divide by tae.spatial x dit.patch = {tae['spatial']} x {dit['patch']} = {cell}")
    need(dit["dim"] % dit["heads"] == 0, f"dit.dim={dit['dim']} does not divide by dit.heads={dit['heads']}")
    need(config["text"]["dim"] % config["text"]["heads"] == 0, f"text.dim={config['text']['dim']} does not divide by text.heads={config['text']['heads']}")
    need(tae["tile"] % (2 * tae["temporal"]) == 0, f"tae.tile={tae['tile']} does not divide by 2 x tae.temporal = {2 * tae['temporal']}")
    need(len(tae["blocks"]) == len(tae["widths"]) - 1, f"tae.blocks={tae['blocks']}, expected one number fewer than tae.widths={tae['widths']}")
    with torch.device("meta"):                                                  # its constructor knows what fits together
        build_tae(config)
    need(tae["batch"] % 2 == 0, f"tae.batch={tae['batch']} is odd, expected half appearance and half motion")
    for key, words in (("precision", ("auto", "bf16", "fp32")), ("guide_motion", ("text", "literal")), ("checkpointing", ("none", "attention", "full")),
                       ("compile", ("auto", "always", "never"))):
        need(config[key] in words, f"{key}={config[key]}, expected {', '.join(words[:-1])} or {words[-1]}")


def latent_size(config):
    """(C, T', H', W') of one stream's latents."""
    tae = config["tae"]
    return tae["channels"], math.ceil(config["frames"] / tae["temporal"]), config["height"] // tae["spatial"], config["width"] // tae["spatial"]


def build_tae(config):
    keys = ("channels", "widths", "blocks", "spatial", "temporal", "tile")
    return TAE(**{key: config["tae"][key] for key in keys})


def build_text(config):
    text = config["text"]
    if text["frozen"]:
        return RandomText(text["frozen"], text["length"])
    return ByteText(text["dim"], text["depth"], text["heads"], text["length"])


def build_dit(config, motion=False):
    dit, text = config["dit"], config["text"]
    hidden = dit["hidden"] or 64 * round(dit["dim"] * 8 / 3 / 64)                # SwiGLU's 8/3 d
    return DiT(*latent_size(config), dit["dim"], dit["depth"], dit["heads"], hidden, text["frozen"] or [text["dim"]], dit["patch"], motion, config["checkpointing"])


def flops(config, motion=False, length=None, texts=1.0):
    """FLOPs of one forward pass of the DiT for one clip, and of the text encoder for `texts` of them; training takes three times as many.

    length: tokens of the text, text.length if not given.

    A multiply-add counts two, attention whole, softmax, norms and gates not at all. With N video and L text tokens, D the width and h SwiGLU's, a block
    has 2N (6 D² + 3 D h) in its products with video tokens, 2L 2 D² with text tokens, and 4 N (N + L) D in its two attentions.
    """
    length = length or config["text"]["length"]
    with torch.device("meta"):
        dit = build_dit(config, motion)
    C, T, H, W = latent_size(config)
    p, D, h, depth = dit.patch, config["dit"]["dim"], dit.blocks[0].ffn.down.in_features, len(dit.blocks)
    N, L = T * H * W // p ** 2, length * len(dit.text_in)
    blocks = depth * (2 * N * (6 * D * D + 3 * D * h) + 2 * L * 2 * D * D + 4 * N * (N + L) * D)
    patches = 2 * N * D * 2 * C * p ** 2 * (2 if motion else 1)                 # W_in and W_out
    around = 2 * sum(lin.in_features * D for lin in dit.text_in) * length + 2 * (256 * D + D * D + 6 * D * D)
    own, d = 0, config["text"]["dim"]
    if not config["text"]["frozen"]:
        own = config["text"]["depth"] * (2 * L * (4 * d * d + 6 * d * d) + 4 * L * L * d)
    return blocks + patches + around + texts * own


# ---------------------------------------------------------------------------------------------------------------------
# Weights on disk: one plain file per finished stage, <run>/<stage>.pt. And where nets run.

def checksum(weights):
    """sha256 over names and bytes of a flat dict of tensors: a flipped bit would otherwise load without a word."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def read_weights(path):
    """A finished stage's file -> its dict; raises FileNotFoundError or ValueError, one line, where it is missing or damaged."""
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: train the {path.stem} first: python train.py run={path.parent} stages={path.stem}, with the run's own key=value")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)                 # read as it is used: 30B is 117 GB
    except Exception as error:                                                  # torch raises half a dozen types here
        raise ValueError(f"{path} is no readable weights file ({type(error).__name__}); delete it and train the {path.stem} again") from error
    if not isinstance(saved, dict) or not {"weights", "checksum", "step"} <= saved.keys():
        raise ValueError(f"{path} is no weights file of train.py; delete it and train the {path.stem} again")
    if checksum(saved["weights"]) != saved["checksum"]:
        raise ValueError(f"{path} is damaged: its checksum does not match; delete it and train the {path.stem} again")
    return saved


def save(path, content):
    """Write beside, then rename: whole or not at all. OSError, one line, where it cannot be written."""
    try:
        torch.save(content, f"{path}.tmp")
    except (OSError, RuntimeError) as error:                                    # torch's writer raises the latter
        pathlib.Path(f"{path}.tmp").unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}): is the disk full?") from None
    os.replace(f"{path}.tmp", path)


def load_into(net, weights, path, new=()):
    """Fill a net, sharded or not; the names in `new` keep what they are. ValueError names the first tensor that is missing, left over or of another shape."""
    own = {name: w for name, w in net.state_dict().items() if name not in new}
    for name in [*own, *weights]:
        found, expected = (tuple(w[name].shape) if name in w else "nothing" for w in (weights, own))
        if found != expected:
            raise ValueError(f"{path}: {name}: found {found}, expected {expected}; the file was made with another config or version")
    for name, w in own.items():
        put_whole(w, weights[name])
    return net


def find_device(wish=""):
    """The wish, or cuda, else mps, else cpu."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wish or found)
    except RuntimeError:
        raise ValueError(f"device={wish}: unknown, expected cuda, mps or cpu") from None
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device.type, lambda: True)
    if not there() or device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={wish}: this machine or this torch {torch.__version__} has none; leave it empty to take {found}")
    return device


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


def close_process_group():
    barrier()                                                                   # gloo aborts where one rank is gone before the others
    if WORLD > 1:
        dist.destroy_process_group()


def build_sharded(config, device, motion=False):
    """{"text", "dit"} on the device with their first weights; over several ranks sharded by FSDP2 (ZeRO-3): each DiT block, then what is left of each net.

    The shards are fp32. A block's weights are all-gathered when its turn comes (in bf16 where the config says so), gradients reduce-scattered in fp32.
    Alone there is nothing to shard, and the same lines build the nets.
    """
    with torch.device("meta"):                                                  # sizes without memory; filled below tensor by tensor
        parts = dict(text=build_text(config), dit=build_dit(config, motion))
    able = device.type == "cuda" and importlib.util.find_spec("triton") and torch.cuda.get_device_capability(device) >= (7, 0)
    if config["compile"] == "always" or config["compile"] == "auto" and able:
        for block in parts["dit"].blocks:                                       # compiled once for all blocks, as they are alike
            block.compile()
    if WORLD > 1:
        mesh = init_device_mesh(device.type, (WORLD,))
        # t in bf16 has 8 bits, which the timestep embedding multiplies by 1000: inputs are left alone, autocast casts what may be
        dtype = torch.bfloat16 if config["precision"] == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for net in [*parts["dit"].blocks, *parts.values()]:
            if list(net.parameters()):                                          # RandomText has none
                fully_shard(net, mesh=mesh, mp_policy=policy, reshard_after_forward=True)       # the root too: `swap` changes the shards between two forwards
    for part in parts.values():
        part.to_empty(device=device)
        part.init()
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers.

def generator(*key):
    """A generator seeded by a hash of the key, so that neighbouring keys have nothing in common."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big"))


# ---------------------------------------------------------------------------------------------------------------------
# Precision and kernels.

def fastest_precision(device):
    """"bf16" or "fp32": what this hardware multiplies faster. Some CPUs list bf16 and are slower in it, so those are timed."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu" or not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return "fp32"
    pair = [torch.ones(1024, 1024, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    rounds = [[timeit.timeit(lambda: a @ a, number=1) for a in pair] for _ in range(20)]        # in turn, or whoever else is busy would decide
    fp32, bf16 = map(min, zip(*rounds))
    return "bf16" if bf16 < 0.6 * fp32 else "fp32"                              # autocast itself costs time


def precision(config, device):
    """Autocast to bf16 where it pays; weights, gradients, optimizer and loss stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config["precision"] == "bf16")


def kernels(config, device):
    """For the forward and the backward pass: on CPUs the flash kernel is slow in bf16, and tokens are few."""
    return sdpa_kernel(SDPBackend.MATH) if config["precision"] == "bf16" and device.type == "cpu" else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: <run>/<stage>.state/step-N, one file per rank, written by torch's DCP, which also reads them for another number of ranks.

def cause(error):
    """DCP collects the errors of all ranks: the first one, in a line."""
    first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    return f"{type(first).__name__}: {str(first).splitlines()[0] if str(first) else ''}"


def checkpoints(folder):
    """The finished ones, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit()), key=lambda path: -int(path.name[5:]))


def save_state(folder, state, step, parent, keep):
    """Write step-N.tmp, rename it to step-N, delete all but the last `keep`; OSError where it cannot be written: the older ones stay."""
    path = folder / f"step-{step}"
    temporary = path.with_suffix(".tmp")
    try:
        dcp.save(state.tensors, checkpoint_id=temporary)
        if RANK == 0:
            (temporary / "state.json").write_text(json.dumps(dict(step=step, parent=parent)))
    except (CheckpointException, OSError) as error:
        if RANK == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        last = next(iter(checkpoints(folder)), "none")
        raise OSError(f"{path} could not be written ({cause(error)}): is the disk full? The last state is {last}; the same command goes on") from None
    if RANK == 0:
        shutil.rmtree(path, ignore_errors=True)                                 # a torn one, else this step would not be taken again
        os.replace(temporary, path)
        for old in [old for old in checkpoints(folder) if int(old.name[5:]) <= step][keep:]:    # a torn one of a later step is not one of the k
            shutil.rmtree(old, ignore_errors=True)
    barrier()


def load_state(folder, state, parent):
    """Fill the state from the newest checkpoint that can be read -> its step, 0 where there is none.

    ValueError for one of another parent or architecture, and where there are checkpoints and none can be read.
    """
    expected = {f"{kind}.{name}": tuple(w.shape) for kind, named in state.tensors.items() for name, w in named.items()}
    torn, paths = [], [checkpoints(folder)]
    if WORLD > 1:
        dist.broadcast_object_list(paths)                                       # all try what rank 0 sees
    for path in paths[0]:
        try:
            about = json.loads((path / "state.json").read_text())
            found = {name: tuple(w.size) for name, w in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items()}
            if about["parent"] == parent and found == expected:
                dcp.load(state.tensors, checkpoint_id=path)
        except (Exception, CheckpointException) as error:                       # unpickling raises anything
            torn.append(f"{path} is torn ({cause(error)})")
            print0(f"{torn[-1]}; trying the one before")
            continue
        if about["parent"] != parent:
            raise ValueError(f"{path} was trained on another base.pt or tae.pt than the one in {folder.parent}: delete {folder}, or take a new run folder")
        for name in [*expected, *found]:
            if found.get(name) != expected.get(name):
                raise ValueError(f"{path}: {name}: found {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}; "
                                 f"it was made with another config: delete {folder}, or take a new run folder")
        for moments in state.optimizer.state.values():
            moments["step"].fill_(about["step"])
        return about["step"]
    if torn:
        raise ValueError(f"{'; '.join(torn)}: delete {folder} to start this stage again")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Runs: what train.py leaves in its folder.

def load_run(run, stage="videojam", device=""):
    """Everything needed to sample: config, tae, text, dit (EMA weights, eval mode), motion (does it predict d?), device, stage, run."""
    run = pathlib.Path(run)
    if not (run / "config.json").exists():
        raise FileNotFoundError(f"{run} is no run folder (it has no config.json): train first, python train.py run={run}")
    config, device, motion = read_config(run / "config.json"), find_device(device), stage == "videojam"
    tae_file, dit_file = read_weights(run / "tae.pt"), read_weights(run / f"{stage}.pt")
    if dit_file.get("tae") != tae_file["checksum"]:
        raise ValueError(f"{run}: {stage}.pt was trained on the latents of another tae.pt than the one beside it; train the {stage} again")
    with torch.device("meta"):                                                  # no memory and no first weights: those of the files follow
        tae, text, dit = build_tae(config), build_text(config), build_dit(config, motion)
    for net, file, name in ((tae, tae_file, "tae.pt"), (nn.ModuleDict(dict(text=text, dit=dit)), dit_file, f"{stage}.pt")):
        load_into(net.to_empty(device=device), file["weights"], run / name).eval().requires_grad_(False)
    return types.SimpleNamespace(config=config, tae=tae, text=text, dit=dit, motion=motion, device=device, stage=stage, run=run)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures.

def to_uint8(video):
    """(3, T, H, W) in [-1, 1] -> (T, H, W, 3) uint8."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def enlarge(frames, least):
    """Repeat pixels of (T, H, W, 3) so that the shorter side has at least `least` of them."""
    factor = math.ceil(least / min(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def write_video(path, video, fps, motion=None, least=256):
    """Write an H.264 mp4 that browsers play, or a gif, by the name's ending; the motion picture to the right of the appearance."""
    path = pathlib.Path(path)
    options = {".mp4": dict(plugin="FFMPEG", fps=fps, codec="libx264", macro_block_size=2, pixelformat="yuv420p"),
               ".gif": dict(plugin="pillow", duration=1000 / fps, loop=0)}
    if path.suffix not in options:
        raise ValueError(f"{path}: unknown ending, expected .mp4 or .gif")
    frames = np.concatenate([enlarge(to_uint8(v), least) for v in (video, motion) if v is not None], axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.v3.imwrite(path, frames, **options[path.suffix])


def write_sheet(path, rows, columns=8, least=64):
    """Write a PNG: one line per clip of `rows` (3, T, H, W), `columns` frames spread evenly from the first to the last."""
    lines = []
    for row in rows:
        frames = enlarge(to_uint8(row), least)
        frames = frames[np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)]
        frames = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
        lines.append(np.concatenate(list(frames), axis=1))
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.v3.imwrite(path, np.concatenate(lines))


def interleave(video, motion):
    """Clips and their motion pictures in turn, for a sheet."""
    return list(video) if motion is None else [row for pair in zip(video, motion) for row in pair]
