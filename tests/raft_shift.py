"""Does RAFT find a known shift? Moves of (5, 0), (0, 5) and (-7, 3) px must come out as that flow.

Not a pytest, because it needs a file of weights (large or small). Two windows are cut from one
picture, smoothed noise or the middle frame of a video, so the true flow is exact.

    python tests/raft_shift.py raft_small.pth [clip.mp4]    # 5 s; exit status 1 where one is missed

Passed: the means of u and v are within 0.3 px of the truth, 32 px at each border left out.
"""
import sys
from pathlib import Path

import imageio.v3 as iio
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from flow import load_raft  # noqa: E402

SHIFTS = [(5, 0), (0, 5), (-7, 3)]
ROOM = 8        # px of the picture around a window
BORDER = 32     # px of a window that are not judged: there, pixels leave the picture


def textured(side=272):
    """Noise at five scales, the coarser the stronger: (1, 3, side, side). RAFT needs shapes."""
    draw = torch.Generator().manual_seed(0)
    picture = torch.zeros(1, 3, side, side)
    for cell in (2, 4, 8, 16, 34):
        noise = torch.randn(1, 3, side // cell, side // cell, generator=draw)
        picture += cell ** 0.5 * F.interpolate(noise, (side, side), mode="bicubic")
    return (picture / (2 * picture.std())).clamp(-1, 1)


def middle_frame(path):
    frames = [frame for frame, _ in zip(iio.imiter(path, plugin="FFMPEG"), range(60))]
    return torch.from_numpy(frames[len(frames) // 2]).permute(2, 0, 1)[None] / 127.5 - 1


def window(picture, u, v):
    """A window that starts d earlier shows everything d later: the content moves by +d."""
    height, width = picture.shape[-2:]
    return picture[..., ROOM - v:height - ROOM - v, ROOM - u:width - ROOM - u]


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python tests/raft_shift.py weights.pth [clip.mp4]")
    missed = 0
    try:
        raft = load_raft(None, sys.argv[1])
        picture = middle_frame(sys.argv[2]) if len(sys.argv) == 3 else textured()
        for u, v in SHIFTS:
            flow = raft(window(picture, 0, 0), window(picture, u, v))
            flow = flow[0, :, BORDER:-BORDER, BORDER:-BORDER]
            mean_u, mean_v = flow.mean((1, 2)).tolist()
            good = abs(mean_u - u) <= 0.3 and abs(mean_v - v) <= 0.3        # false for NaN too
            missed += not good
            verdict = "ok" if good else "MISSED"
            print(f"true ({u:2}, {v:2})   found ({mean_u:6.3f}, {mean_v:6.3f})   {verdict}")
    except (OSError, ValueError) as error:
        sys.exit(f"raft_shift.py: {error}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
