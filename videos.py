"""A folder of real videos: its clips, their captions, and their optical flow, which RAFT estimates once. All decoding is ffmpeg's.

Letters: B clips, T frames, H height, W width. Videos lie in [-1, 1], optical flow is in pixels per frame.
"""

import csv
import io
import json
import logging
import os
import warnings
import zlib
from contextlib import closing, suppress
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from tqdm.contrib.concurrent import thread_map

from common import checksum
from flow import estimate_flow

ENDINGS = (".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm")
KEPT_BYTES = 2 * 10**9                                             # decoded windows that stay in memory: small folders are read again and again
# imageio_ffmpeg logs a line for each reader whose filters change the size of the picture; ours all do.
logging.getLogger("imageio_ffmpeg").addFilter(lambda record: "frame size" not in record.msg)


class VideoFolder:
    """The videos of a folder at `fps`, cropped around the centre to height x width, cut into windows of `frames` frames, one after the other.
    [i] -> dict: video (3, T, H, W) in [-1, 1], caption, name "file:first frame"; the same for the same i, always.
    FileNotFoundError without a folder, ValueError for malformed captions or no usable video; single bad files are skipped with a warning."""

    def __init__(self, root, frames, height, width, fps, flow_dir=None, raft=None):
        self.root, self.frames, self.height, self.width, self.fps = Path(root), frames, height, width, fps
        self.flow_dir, self.raft = flow_dir, raft
        self.kept = {}
        if not self.root.is_dir():
            found = "a file" if self.root.exists() else "nothing"
            raise FileNotFoundError(f"found {found} at {root}, expected a folder of videos: correct data.root")
        names = sorted(p.name for p in self.root.iterdir() if p.suffix.lower() in ENDINGS and p.is_file())
        if not names:
            raise ValueError(f"found no video in {root}, expected files ending in {' '.join(ENDINGS)}: put some there")
        self.captions = _read_captions(self.root, names)

        # A header cannot be trusted with the number of frames (that of a file cut in the middle promises them all), so each is decoded once.
        counts = thread_map(self._count, names, max_workers=4, desc="opening videos", disable=len(names) < 20)
        count = dict(zip(names, counts))
        _warn([n for n in names if count[n] < 0], "skipped, unreadable or shorter than the header says", "cut off, or longer sound: encode again")
        _warn([n for n in names if 0 <= count[n] < frames], f"skipped, shorter than {frames} frames at {fps} fps", "lower `frames` or raise `fps`")
        self.windows = [(n, start) for n in names for start in range(0, count[n] - frames + 1, frames)]
        if not self.windows:
            raise ValueError(f"found no usable one among {len(names)} videos in {root}, expected {frames} frames at {fps} fps: see the warnings")
        # Stored flow goes by what is in the file and in the RAFT, not by dates: a copied folder keeps it, an edited clip loses it.
        self.prints = {n: zlib.crc32(np.memmap(self.root / n, mode="r")) for n in dict(self.windows)}
        self.raft_print = checksum(raft.state_dict())[:8] if raft else None

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"found index {i}, expected 0 to {len(self) - 1}")
        name, start = self.windows[i]
        video = self._pixels(i).permute(3, 0, 1, 2).float() / 127.5 - 1            # (3, T, H, W)
        return dict(video=video, caption=self.captions[name], name=f"{name}:{start}")

    def prompts(self):
        """The folder's own captions, each once, to look at."""
        return sorted({self.captions[name] for name, _ in self.windows})

    def batch(self, indices, device="cpu"):
        """Windows by index -> dict: video (B, 3, T, H, W) in [-1, 1], flow (B, 2, T, H, W) in px per frame, caption: list of B strings.
        RAFT (on `device`) sees a window once, flow_dir keeps its flow as float16 (steps of 1/256 px at 5 px). ValueError without either."""
        items = thread_map(self.__getitem__, indices, max_workers=4, disable=True)      # threads suffice: the work is done by ffmpeg processes
        video = torch.stack([item["video"] for item in items]).to(device)                                     # (B, 3, T, H, W)
        d = torch.stack([self._flow(i, clip) for i, clip in zip(indices, video)]).to(device)                  # (B, 2, T, H, W) float16
        return dict(video=video, flow=d.float(), caption=[item["caption"] for item in items])

    def _decode(self, name, start=0, stop=None):
        """Yields a file's header (a dict), then its frames start to stop, counted at self.fps, as H * W * 3 bytes each."""
        # Frames are counted behind the fps filter: seeking (-ss) shifts its phase (seen on a gif). dar is the shape as shown, not as stored.
        h, w, stop = self.height, self.width, "" if stop is None else f":end_frame={stop}"
        cover = f"scale=w='max({w},ceil({h}*dar))':h='max({h},ceil({w}/dar))',format=rgb24,crop={w}:{h}"
        # Of several video streams ffmpeg takes the default, then the largest. Without passthrough it adds copies to a picture that starts after
        # its sound, to each window anew. This is the reader underneath imageio's FFMPEG plugin, because the plugin refuses .gif by its name.
        return imageio_ffmpeg.read_frames(str(self.root / name), input_params=["-threads", "1"], output_params=[
            "-fps_mode", "passthrough", "-vf", f"fps={self.fps},trim=start_frame={start}{stop},{cover}"])

    def _count(self, name):
        """Number of frames that a file decodes to at self.fps; -1 if it is broken."""
        try:
            with closing(self._decode(name)) as stream:
                seconds, n = next(stream)["duration"], sum(1 for _ in stream)
        except (OSError, RuntimeError):                            # nothing that ffmpeg can read; ffmpeg died in the middle of a frame
            return -1
        # Half a second for sound that ends later, one frame for rounding. A header without duration says 0.
        return n if n and seconds - n / self.fps <= 0.5 + 1 / self.fps else -1

    def _pixels(self, i):
        """Window i as (T, H, W, 3) uint8."""
        if i in self.kept:
            return self.kept[i]
        name, start = self.windows[i]
        with closing(self._decode(name, start, start + self.frames)) as stream:
            data = bytearray().join([frame for frame in stream][1:])
        if len(data) != self.frames * self.height * self.width * 3:
            raise RuntimeError(f"found {name} shorter than when {self.root} was opened, expected it unchanged: start again")
        window = torch.frombuffer(data, dtype=torch.uint8).view(self.frames, self.height, self.width, 3)
        if (len(self.kept) + 1) * len(data) <= KEPT_BYTES:         # the first ones: in a shuffled order the least recently used is the wrong one to drop
            self.kept[i] = window
        return window

    def _flow(self, i, video):
        """Optical flow (2, T, H, W) of window i, video (3, T, H, W), as float16: read where it is stored, else estimated and stored."""
        name, start = self.windows[i]
        if self.raft is None or self.flow_dir is None:
            raise ValueError(f"found no RAFT, or no flow_dir, for the flow of {name}:{start} in {self.root}, expected both: set flow.weights to a "
                             "RAFT file, or let train.py fetch torchvision's")
        window = f"{name}-{start}-{self.height}x{self.width}x{self.frames}-{self.fps:g}fps"
        path = Path(self.flow_dir, f"{window}-{self.prints[name]:08x}-{self.raft_print}.npy")
        with suppress(OSError, ValueError, EOFError):              # not there, or torn by a full disk or half a copy
            d = torch.from_numpy(np.load(path))
            if d.shape == (2, *video.shape[1:]) and d.dtype == torch.float16:
                return d
        d = estimate_flow(video[None], self.raft)[0].half().cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.{os.environ.get('RANK', 0)}-{os.getpid()}.tmp", "wb") as file:
            np.save(file, d.numpy())
        os.replace(file.name, path)                                # whole or not at all, whatever kills this run or another rank
        return d


def _read_captions(root, names):
    """Caption of each file: that of metadata.jsonl or metadata.csv (file_name, text), else a .txt beside it, else the empty one."""
    captions, table = {}, next((root / t for t in ("metadata.jsonl", "metadata.csv") if (root / t).is_file()), None)
    for line, row in _rows(table) if table else ():
        # None is where csv puts what stands behind the last column: a caption with a comma and without quotes.
        if not isinstance(row, dict) or None in row or not all(isinstance(row.get(k), str) for k in ("file_name", "text")):
            raise ValueError(f"found {row!r} in line {line} of {table}, expected a file_name and a text: correct that line")
        captions[row["file_name"]] = row["text"].strip()
    _warn(sorted(captions.keys() - set(names)), f"named in {table} but not there", "correct file_name")
    for n in names:
        captions[n] = captions.get(n) or _text((root / n).with_suffix(".txt")).strip()
    _warn([n for n in names if not captions[n]], "without a caption", "used with the empty one")
    return captions


def _rows(table):
    """Yields (line number, row) of a .csv or a .jsonl; a line that is no JSON comes as the text it is."""
    lines = io.StringIO(_text(table))                              # not splitlines: a caption may hold other separators
    if table.suffix == ".csv":
        reader = csv.DictReader(lines)
        yield from ((reader.line_num, row) for row in reader)
        return
    for line, row in enumerate(lines, 1):
        if row.strip():
            with suppress(json.JSONDecodeError):
                row = json.loads(row)
            yield line, row


def _text(path):
    """The text of a caption file, "" where there is none; ValueError where it is not UTF-8."""
    try:
        return path.read_text("utf-8-sig") if path.is_file() else ""           # -sig: spreadsheets put a mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"found bytes in {path} that are not UTF-8 ({error}), expected UTF-8: save it as that") from None


def _warn(names, problem, advice):
    """One warning for all the files that share a problem."""
    if names:
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        warnings.warn(f"{len(names)} file(s) {problem}: {', '.join(names[:20])}{more} ({advice})", stacklevel=3)
