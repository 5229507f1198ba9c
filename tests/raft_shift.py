"""Does RAFT find a shift that is known? A frame moved by (5, 0), (0, 5) and (-7, 3) px must give that optical flow.

Outside pytest, because it needs a file of weights (large or small). The frame is smoothed noise, or the middle frame of
a video; both windows are cut from one larger picture, so the true flow is exact and nothing is made up at the borders.

    python tests/raft_shift.py raft_small.pth [clip.mp4]       # about 5 s; exit status 1 where a shift is missed

Passed: the mean of u and the mean of v over the interior (all but 32 px at each border, where pixels leave the picture)
lie within 0.3 px of the truth. Also printed: the mean distance of a single pixel's flow from the truth.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from flow import load_raft  # noqa: E402

SHIFTS = [(5, 0), (0, 5), (-7, 3)]
ROOM, BORDER, ENOUGH = 8, 32, 0.3       # px


def textured(side=272):
    """Noise at five scales, the coarser the stronger: (1, 3, side, side) in [-1, 1]. RAFT needs edges and shapes."""
    draw = torch.Generator().manual_seed(0)
    noise = lambda n: torch.randn(1, 3, n, n, generator=draw)
    picture = sum(cell**0.5 * F.interpolate(noise(side // cell), (side, side), mode="bicubic")
                  for cell in (2, 4, 8, 16, 34))
    return (picture / (2 * picture.std())).clamp(-1, 1)


def middle_frame(path):
    """(1, 3, H, W) in [-1, 1]."""
    import imageio.v3 as iio
    frames = [frame for frame, _ in zip(iio.imiter(path, plugin="FFMPEG"), range(60))]
    return torch.from_numpy(frames[len(frames) // 2]).permute(2, 0, 1)[None] / 127.5 - 1


def main():
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: python tests/raft_shift.py weights.pth [clip.mp4]")
    try:
        raft = load_raft(None, sys.argv[1])
        picture = middle_frame(sys.argv[2]) if len(sys.argv) == 3 else textured()
    except (OSError, ValueError) as error:
        raise SystemExit(f"raft_shift.py: {error}")
    height, width = (n - 2 * ROOM for n in picture.shape[-2:])
    if min(height, width) < 128:
        raise SystemExit(f"raft_shift.py: found a frame of {width + 2 * ROOM} x {height + 2 * ROOM} px, "
                         f"expected sides of {128 + 2 * ROOM} or more")
    # A window that starts d earlier shows everything d later: the content moves by +d.
    window = lambda u, v: picture[..., ROOM - v:ROOM - v + height, ROOM - u:ROOM - u + width]
    missed = 0
    print(f"{width} x {height} px, means over the interior\n true (u, v)   mean u   mean v   px off the truth")
    for u, v in SHIFTS:
        flow = raft(window(0, 0), window(u, v))[..., BORDER:-BORDER, BORDER:-BORDER]
        mean = flow.mean((0, 2, 3))
        off = (flow - flow.new_tensor([u, v]).view(2, 1, 1)).norm(dim=1).mean()
        good = bool(((mean - mean.new_tensor([u, v])).abs() <= ENOUGH).all())    # false for NaN too
        missed += not good
        print(f"   ({u:2}, {v:2})    {mean[0]:7.3f}  {mean[1]:7.3f}  {off:10.3f}   {'ok' if good else 'MISSED'}")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
