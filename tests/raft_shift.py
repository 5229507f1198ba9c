"""Does RAFT find known shifts? It needs a real file of weights, so it is a command, not a pytest.

    python tests/raft_shift.py raft_small.pth       # 5 s; exit status 1 where a shift is missed

Two windows of one picture lie (u, v) px apart, so the true flow is exact. Found means that the
mean flow, 32 px at each border left out, is within 0.3 px of it.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from flow import load_raft  # noqa: E402

raft = load_raft(None, sys.argv[1])
draw = torch.Generator().manual_seed(0)
picture = torch.zeros(1, 3, 272, 272)
for cells in (8, 17, 34, 68, 136):          # RAFT needs shapes: the coarser, the stronger
    noise = torch.randn(1, 3, cells, cells, generator=draw)
    picture += F.interpolate(noise, (272, 272), mode="bicubic") / cells ** 0.5

missed = 0
for u, v in [(5, 0), (0, 5), (-7, 3)]:
    # A window that starts (u, v) earlier shows everything (u, v) later.
    moved = picture[..., 8 - v:264 - v, 8 - u:264 - u]
    flow = raft(picture[..., 8:264, 8:264], moved)[0, :, 32:-32, 32:-32]
    found_u, found_v = flow.mean((1, 2)).tolist()
    print(f"true ({u:2}, {v:2})   found ({found_u:6.3f}, {found_v:6.3f})")
    missed += not (abs(found_u - u) <= 0.3 and abs(found_v - v) <= 0.3)     # NaN is missed too
sys.exit(1 if missed else 0)
