"""Folders of real videos, and the latents of a whole data set kept in files.

VideoJAM was trained on real videos, whose optical flow RAFT estimated (sec. 4.1, appendix C).
Their captions stand in metadata.jsonl or metadata.csv (file_name, text), or in a .txt each.

    python videos.py preset=videos data.root=clips      writes folder.png: what training would see
    python videos.py run=runs/mine      once this run's TAE is trained: writes the latents of every
        clip into runs/mine/latents, where train.py reads them. It goes on where it was
        interrupted, and under torchrun the ranks share the work.

Letters: B clips, T frames, H height, W width, C latent channels.
Videos are in [-1, 1], optical flow is in pixels per frame.
"""
import contextlib
import csv
import io
import json
import logging
import math
import os
import pathlib
import warnings
import zlib

import imageio_ffmpeg
import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

import common
from common import RANK, WORLD
from flow import estimate_flow, flow_to_rgb

ENDINGS = (".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm")
KEPT_BYTES = 2 * 10 ** 9        # of decoded windows in memory: small folders are read many times
CLIPS_PER_FILE = 256            # of latents

# imageio_ffmpeg logs a line whenever the size of the picture is changed. We always change it.
logging.getLogger("imageio_ffmpeg").addFilter(lambda record: "frame size" not in record.msg)

# -------------------------------------------------------------------------------------------------
# Videos


class VideoFolder:
    """Windows of `frames` frames at `fps`, cropped around the centre to height x width.
    [i] -> dict: video (3, T, H, W), caption, name "file:first frame". Bad files are skipped with a
    warning. FileNotFoundError: no folder. ValueError: bad captions, or no usable video."""

    def __init__(self, root, frames, height, width, fps, flow_dir=None, raft=None):
        self.root = pathlib.Path(root)
        self.frames = frames
        self.height = height
        self.width = width
        self.fps = fps
        self.flow_dir = flow_dir        # where estimated flow is kept
        self.raft = raft
        self.kept = {}                  # {index: decoded window}
        if not self.root.is_dir():
            raise FileNotFoundError(f"found no folder at {root}: correct data.root")
        names = sorted(path.name for path in self.root.iterdir() if path.suffix.lower() in ENDINGS)
        self.captions = read_captions(self.root, names)
        self.windows = self.find_windows(names)         # [(name, first frame)]
        if not self.windows:
            raise ValueError(f"found {len(names)} videos in {root} ({' '.join(ENDINGS)}) and no "
                             f"usable one, expected {frames} frames at {fps} fps")
        self.count = len(self.windows)

        # Kept flow is known by what is in the file and in the RAFT. So an edited clip loses it.
        used = {name for name, _ in self.windows}
        self.prints = {name: zlib.crc32(np.memmap(self.root / name, mode="r")) for name in used}
        self.raft_print = fingerprint(raft) if raft else None

    def find_windows(self, names):
        """[(file name, number of the first frame)], one window after the other."""
        # The header of a file that was cut off still promises all frames, so each is decoded once.
        counts = thread_map(
            self.count_frames, names, max_workers=4, desc="opening videos", disable=RANK > 0)
        count = dict(zip(names, counts))
        broken = [name for name in names if count[name] < 0]
        short = [name for name in names if 0 <= count[name] < self.frames]
        warn(broken, "skipped, unreadable or shorter than the header says", "encode them again")
        warn(short, f"skipped, under {self.frames} frames at {self.fps} fps", "lower `frames`")
        return [(name, start) for name in names
                for start in range(0, count[name] - self.frames + 1, self.frames)]

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        name, start = self.windows[i]
        video = self.pixels(i).permute(3, 0, 1, 2).float() / 127.5 - 1      # (3, T, H, W)
        return dict(video=video, caption=self.captions[name], name=f"{name}:{start}")

    def prompts(self):
        """The folder's own captions, each once, to look at."""
        return sorted({self.captions[name] for name, _ in self.windows})

    def batch(self, indices, device="cpu"):
        """Windows -> dict: video (B, 3, T, H, W), flow (B, 2, T, H, W), caption (list of B).
        ValueError where flow is neither kept nor can be estimated."""
        # Threads are enough, because ffmpeg does the work in processes of its own.
        items = thread_map(self.__getitem__, indices, max_workers=4, disable=True)
        video = torch.stack([item["video"] for item in items]).to(device)
        flow = [self.flow(i, clip) for i, clip in zip(indices, video)]
        flow = torch.stack(flow).to(device).float()
        return dict(video=video, flow=flow, caption=[item["caption"] for item in items])

    def decode(self, name, start=0, stop=None):
        """Yield a file's header (a dict), then its frames start to stop at our fps, as bytes."""
        # Frames are counted at our fps. Seeking in the file would shift the fps filter.
        end = "" if stop is None else f":end_frame={stop}"
        trim = f"fps={self.fps},trim=start_frame={start}{end}"
        # The picture must cover the crop. dar is its aspect ratio as shown, not as stored.
        h = self.height
        w = self.width
        scale = f"scale=w='max({w},ceil({h}*dar))':h='max({h},ceil({w}/dar))'"
        filters = f"{trim},{scale},format=rgb24,crop={w}:{h}"
        # Without passthrough, a picture that starts later than its sound would be repeated.
        # imageio's own FFMPEG plugin refuses .gif by its name, so we call what it stands on.
        return imageio_ffmpeg.read_frames(
            str(self.root / name), input_params=["-threads", "1"],
            output_params=["-fps_mode", "passthrough", "-vf", filters])

    def count_frames(self, name):
        """How many frames a file decodes to at our fps; -1 if it is broken."""
        try:
            with contextlib.closing(self.decode(name)) as stream:
                seconds = next(stream)["duration"]
                count = sum(1 for _ in stream)
        except (OSError, RuntimeError):
            return -1
        # Sound may end half a second later. A header without a duration says 0.
        whole = seconds - count / self.fps <= 0.5 + 1 / self.fps
        return count if count and whole else -1

    def pixels(self, i):
        """Window i as (T, H, W, 3) uint8."""
        if i in self.kept:
            return self.kept[i]
        name, start = self.windows[i]
        with contextlib.closing(self.decode(name, start, start + self.frames)) as stream:
            next(stream)                                # the header
            content = bytearray().join(stream)
        shape = (self.frames, self.height, self.width, 3)
        if len(content) != math.prod(shape):
            raise ValueError(f"{name} is shorter than when {self.root} was opened: start again")
        window = torch.frombuffer(content, dtype=torch.uint8).view(shape)
        if (len(self.kept) + 1) * len(content) <= KEPT_BYTES:
            self.kept[i] = window
        return window

    # Sec. 4.1: RAFT sees a window once; its flow is kept in a file.
    def flow(self, i, video):
        """Optical flow (2, T, H, W) of window i, as float16: a step of 1/256 px at 5 px."""
        name, start = self.windows[i]
        if self.raft is None or self.flow_dir is None:
            raise ValueError(f"no RAFT or no flow_dir for {name}:{start}: set flow.weights")
        size = f"{self.height}x{self.width}x{self.frames}-{self.fps:g}fps"
        prints = f"{self.prints[name]:08x}-{self.raft_print:08x}"
        path = pathlib.Path(self.flow_dir, f"{name}-{start}-{size}-{prints}.npy")
        # It may not be there yet, or be torn by a full disk.
        with contextlib.suppress(OSError, ValueError, EOFError):
            return torch.from_numpy(np.load(path))
        flow = estimate_flow(video[None], self.raft)[0].half().cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.{RANK}-{os.getpid()}.tmp", "wb") as file:
            np.save(file, flow.numpy())
        os.replace(file.name, path)     # whole or not at all, also if two ranks write it
        return flow


def fingerprint(net):
    """A number that tells one net's weights from another's."""
    crc = 0
    for tensor in net.state_dict().values():
        crc = zlib.crc32(tensor.cpu().contiguous().numpy(), crc)
    return crc


# -------------------------------------------------------------------------------------------------
# Captions


def read_captions(root, names):
    """{file name: caption}, from the table, else from a .txt beside the video, else empty."""
    tables = [root / "metadata.jsonl", root / "metadata.csv"]
    table = next((path for path in tables if path.is_file()), None)
    captions = read_table(table) if table else {}
    absent = sorted(captions.keys() - set(names))
    warn(absent, f"named in {table} but not there", "correct file_name")
    for name in names:
        beside = (root / name).with_suffix(".txt")
        captions[name] = captions.get(name) or read_text(beside).strip()
    warn([name for name in names if not captions[name]], "without a caption", "taken as empty")
    return captions


def read_table(table):
    """{file name: caption}; ValueError names the line that is malformed."""
    lines = io.StringIO(read_text(table))       # not splitlines: it would split at U+2028 too
    if table.suffix == ".csv":
        reader = csv.DictReader(lines)
        rows = [(reader.line_num, row) for row in reader]
    else:
        rows = [(number, parse(line)) for number, line in enumerate(lines, 1) if line.strip()]
    captions = {}
    for number, row in rows:
        # csv puts what stands behind the last column under None: a comma without quotes.
        good = isinstance(row, dict) and None not in row
        for key in ("file_name", "text"):
            good = good and isinstance(row.get(key), str)
        if not good:
            raise ValueError(f"found {row!r} in line {number} of {table}, expected a file_name "
                             "and a text: correct that line")
        captions[row["file_name"]] = row["text"].strip()
    return captions


def parse(line):
    """A line of JSON; one that is none stays the text it is."""
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(line)
    return line


def read_text(path):
    """The text of a file, "" where there is none; ValueError where it is not UTF-8."""
    if not path.is_file():
        return ""
    try:
        return path.read_text("utf-8-sig")      # spreadsheets put a mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"found bytes in {path} that are not UTF-8 ({error})") from None


def warn(names, problem, advice):
    """One warning for all the files that share a problem."""
    if names:
        some = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
        warnings.warn(f"{len(names)} file(s) {problem}: {some} ({advice})", stacklevel=3)


# -------------------------------------------------------------------------------------------------
# Files of latents: <run>/latents/00000.pt and so on, and an index that says what they depend on


def latent_files(config, clips):
    """(paths, made or not; what they depend on). ValueError where the folder has other latents."""
    count = config.data.cache
    content = [config.seed, config.world]
    if config.data.root:
        count = len(clips)
        content = [clips.windows, sorted(clips.prints.items()), clips.captions, config.fps]
    about = dict(
        tae=common.identity(pathlib.Path(config.run, "tae.pt")), clips=count,
        size=[config.frames, config.height, config.width], sigma=config.flow.sigma,
        data=f"{zlib.crc32(json.dumps(content).encode()):08x}")
    folder = pathlib.Path(config.run, "latents")
    index = folder / "index.json"
    found = json.loads(index.read_text()) if index.exists() else about
    for key, expected in about.items():
        if found.get(key) != expected:
            raise ValueError(f"{folder} was made with another {key}: found {found.get(key)}, "
                             f"expected {expected}; delete it, then make it again with videos.py")
    return [folder / f"{k:05d}.pt" for k in range(math.ceil(count / CLIPS_PER_FILE))], about


def open_latents(config, clips):
    """The run's files of latents, in order, each a dict: z (b, 2C, T, H, W) float16, caption.
    Mapped: only rows that are used come into memory. [] where there are none. ValueError: files
    of another TAE, of other clips or sizes, or not all of them."""
    def find():
        if not pathlib.Path(config.run, "latents", "index.json").exists():
            return []
        paths, _ = latent_files(config, clips)
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise ValueError(f"{config.run}/latents lacks {len(missing)} of its files: python "
                             f"videos.py run={config.run} goes on, or delete the folder")
        return paths

    return [torch.load(path, mmap=True, weights_only=True) for path in common.broadcast(find)]


def write_latents(config):
    """Encode every clip; each file is made by one rank. Files that are there are kept."""
    import data
    device = common.find_device(config.device)
    tae = common.load_tae(config, device)
    clips = data.open_data(config, "train", device)
    paths, about = latent_files(config, clips)
    if not paths:
        raise ValueError(f"{config.run} was made with data.cache=0: found an endless world, "
                         "expected a number of clips to encode: make a run with data.cache=10000")
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        common.write_text(folder / "index.json", json.dumps(about, indent=1))
    mine = [k for k in range(RANK, len(paths), WORLD) if not paths[k].exists()]
    for k in tqdm(mine, f"encoding {about['clips']} clips", unit="file", disable=RANK > 0):
        latents = []
        captions = []
        stop = min((k + 1) * CLIPS_PER_FILE, about["clips"])
        for chunk in data.chunks(k * CLIPS_PER_FILE, stop, config):
            batch = clips.batch(chunk, device)
            z = data.encode(tae, batch, config.flow.sigma)      # (b, 2C, T, H, W)
            latents.append(z.half().cpu())
            captions += batch["caption"]
        common.save(paths[k], dict(z=torch.cat(latents), caption=captions))
    common.print0(f"{folder}: this rank's share of {about['clips']} clips is there")


def show(config):
    """folder.png: 16 clips, their frames over their optical flow."""
    import data
    if not config.data.root:
        raise ValueError("found no data.root, expected a folder of videos: data.root=clips")
    clips = data.open_data(config)
    batch = clips.batch(range(0, len(clips), math.ceil(len(clips) / 16)))
    motion = flow_to_rgb(batch["flow"], config.flow.sigma)
    pairs = torch.stack([batch["video"], motion], dim=1)        # (B, 2, 3, T, H, W)
    common.write_sheet("folder.png", pairs.flatten(0, 1))
    print(*batch["caption"], sep="\n")
    print("folder.png: each clip's frames over its optical flow (Eq. 5)")


def main(arguments):
    config = common.load_config(arguments)
    if pathlib.Path(config.run, "tae.pt").exists():
        write_latents(config)
    else:
        show(config)


if __name__ == "__main__":
    common.command_line(main, __doc__, keys=True)
