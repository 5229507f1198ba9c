"""Folders of real videos, and the latents of a whole data set kept in files.

VideoJAM was trained on real videos, whose optical flow RAFT estimated (sec. 4.1, appendix C).
Their captions stand in metadata.jsonl or metadata.csv (file_name, text), or in one .txt per video.

    python videos.py preset=videos data.root=clips      writes folder.png: what training would see

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
        # Rank 0 looks, so that all ranks have the same windows.
        self.captions, self.windows, self.prints = common.broadcast(self.look)
        self.count = len(self.windows)
        self.raft_print = fingerprint(raft) if raft else None

    def look(self):
        """{file name: caption}, [(file name, first frame)], {file name: its checksum}."""
        names = sorted(path.name for path in self.root.iterdir() if path.suffix.lower() in ENDINGS)
        captions = read_captions(self.root, names)
        windows = self.find_windows(names)
        if not windows:
            raise ValueError(f"found {len(names)} videos in {self.root} ({' '.join(ENDINGS)}) and "
                             f"no usable one, expected {self.frames} frames at {self.fps} fps")
        # Kept flow is known by what is in the file and in the RAFT. So an edited clip loses it.
        used = {name for name, _ in windows}
        prints = {name: zlib.crc32(np.memmap(self.root / name, mode="r")) for name in used}
        return captions, windows, prints

    def find_windows(self, names):
        """[(file name, number of the first frame)], one window after the other."""
        # The header of a file that was cut off still promises all frames, so each is decoded once.
        counts = thread_map(self.count_frames, names, max_workers=4, desc="opening videos")
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
        video = to_video(self.pixels(i)[None])[0]                           # (3, T, H, W)
        return dict(video=video, caption=self.captions[name], name=f"{name}:{start}")

    def prompts(self):
        """The folder's own captions, each once, to look at."""
        return sorted({self.captions[name] for name, _ in self.windows})

    def read(self, indices):
        """What `render` needs of these windows: pixels (B, T, H, W, 3) uint8, flow where it is kept
        already (2, T, H, W) float16, else None."""
        # Threads are enough, because ffmpeg does the work in processes of its own.
        pixels = thread_map(self.pixels, indices, max_workers=4, disable=True)
        return list(indices), torch.stack(pixels), [self.kept_flow(i) for i in indices]

    def render(self, got, device="cpu"):
        """Windows -> dict: video (B, 3, T, H, W), flow (B, 2, T, H, W), caption (list of B).
        ValueError where flow is neither kept nor can be estimated."""
        indices, pixels, flows = got
        video = to_video(common.to_device(pixels, torch.device(device)))    # (B, 3, T, H, W)
        captions = [self.captions[self.windows[i][0]] for i in indices]
        for n, i in enumerate(indices):
            if flows[n] is None:
                flows[n] = self.flow(i, video[n])
        flow = common.to_device(torch.stack(flows), torch.device(device)).float()
        return dict(video=video, flow=flow, caption=captions)

    def batch(self, indices, device="cpu"):
        """`read`, then `render`."""
        return self.render(self.read(indices), device)

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
    def flow_path(self, i):
        name, start = self.windows[i]
        if self.raft is None or self.flow_dir is None:
            raise ValueError(f"no RAFT or no flow_dir for {name}:{start}: set flow.weights")
        size = f"{self.height}x{self.width}x{self.frames}-{self.fps:g}fps"
        prints = f"{self.prints[name]:08x}-{self.raft_print:08x}"
        return pathlib.Path(self.flow_dir, f"{name}-{start}-{size}-{prints}.npy")

    def kept_flow(self, i):
        """Optical flow (2, T, H, W) of window i; None if it is not there yet, or was torn."""
        with contextlib.suppress(OSError, ValueError, EOFError):
            return torch.from_numpy(np.load(self.flow_path(i)))

    def flow(self, i, video):
        """The same, estimated if need be, and kept as float16: a step of 1/256 px at 5 px."""
        kept = self.kept_flow(i)        # since it was read ahead
        if kept is not None:
            return kept
        path = self.flow_path(i)
        flow = estimate_flow(video[None], self.raft)[0].half().cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.{RANK}-{os.getpid()}.tmp", "wb") as file:
            np.save(file, flow.numpy())
        os.replace(file.name, path)     # whole or not at all, also if two ranks write it
        return flow


def to_video(pixels):
    """(B, T, H, W, 3) uint8 -> (B, 3, T, H, W) in [-1, 1]."""
    return pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


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
    """-> the paths of all files, made or not, and a dict of what they depend on, which is kept in
    index.json. ValueError where the folder has other latents."""
    count = clips.count or config.data.cache
    content = [config.seed, config.world]
    if config.data.root:
        content = [clips.windows, sorted(clips.prints.items()), clips.captions, config.fps]
    about = dict(
        tae=common.identity(pathlib.Path(config.run, "tae.pt")), clips=count, file=CLIPS_PER_FILE,
        size=[config.frames, config.height, config.width], sigma=config.flow.sigma,
        data=f"{zlib.crc32(json.dumps(content).encode()):08x}")
    folder = pathlib.Path(config.run, "latents")
    index = folder / "index.json"
    found = json.loads(index.read_text()) if index.exists() else about
    for key, expected in about.items():
        if found.get(key) != expected:
            raise ValueError(f"{folder} was made with another {key}: found {found.get(key)}, "
                             f"expected {expected}; delete it, and it is made again")
    common.write_text(index, json.dumps(about, indent=1))
    return [folder / f"{k:05d}.pt" for k in range(math.ceil(count / CLIPS_PER_FILE))], about


def open_latents(config, tae, clips, device):
    """The run's files of latents, in order, each a dict: z (b, 2C, T, H, W) float16, caption.
    Missing ones are made, each by one rank. Mapped: only rows that are used come into memory.
    ValueError: files of another TAE, of other clips or sizes."""
    import data
    paths, about = common.broadcast(latent_files, config, clips)
    mine = [path for path in paths[RANK::WORLD] if not path.exists()]
    for path in common.progress(mine, f"encoding {about['clips']} clips", unit="file"):
        first = int(path.stem) * CLIPS_PER_FILE
        latents = []
        captions = []
        for chunk in data.chunks(first, min(first + CLIPS_PER_FILE, about["clips"]), config):
            batch = clips.batch(chunk, device)
            latents.append(data.encode(config, tae, batch).half().cpu())    # (b, 2C, T, H, W)
            captions += batch["caption"]
        common.save(path, dict(z=torch.cat(latents), caption=captions))
    common.barrier()
    return [common.patiently(load, path) for path in paths]


def load(path):
    return torch.load(path, mmap=True, weights_only=True)


def show(arguments):
    """folder.png: 16 clips, their frames over their optical flow."""
    import data
    config = common.load_config(arguments)
    if not config.data.root:
        raise ValueError("found no data.root, expected a folder of videos: data.root=clips")
    device = common.find_device(config.device)
    clips = data.open_data(config, device=device)
    batch = clips.batch(range(0, len(clips), math.ceil(len(clips) / 16)), device)
    motion = flow_to_rgb(batch["flow"], config.flow.sigma)
    pairs = torch.stack([batch["video"], motion], dim=1)        # (B, 2, 3, T, H, W)
    common.write_sheet("folder.png", pairs.flatten(0, 1))
    print(*batch["caption"], sep="\n")
    print("folder.png: each clip's frames over its optical flow (Eq. 5)")


if __name__ == "__main__":
    common.command_line(show, __doc__, keys=True)
