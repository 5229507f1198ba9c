"""Records what torchvision's own RAFT answers, so that test_flow.py can hold flow.RAFT against it without torchvision.

Weights and frames come from closed formulas, so the file holds answers only. Where torchvision imports (a build that
fits the torch at hand), give no folder; otherwise unpack its wheel anywhere and name the folder. It need not be
installed: RAFT there is plain Python, and stand-ins take the place of the compiled parts around it.

    pip download --no-deps -d wheel torchvision==0.28.0 && (cd wheel && unzip -q torchvision-*.whl)
    python tests/record_raft.py wheel/torchvision          # writes tests/raft_reference.json, about 10 s

Letters: N pairs of frames, H x W pixels.
"""
import importlib
import json
import math
import sys
import types
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

REFERENCE = Path(__file__).with_name("raft_reference.json")
# (size, N, H, W, iterations). 130 x 141 is no multiple of 8: torchvision, which refuses it, gets it padded beforehand.
CASES = [("small", 2, 128, 136, 4), ("small", 1, 130, 141, 3), ("large", 1, 128, 136, 3), ("large", 1, 130, 141, 2)]


def wave(count, name):
    """`count` float64 numbers in [-1, 1] that look random and depend on the name. The squares make it a chirp: a plain
    sine would fill a matrix with rank 2, and swapped channels would go unnoticed. Integers keep it exact anywhere."""
    index = torch.arange(count, dtype=torch.int64) + zlib.crc32(name.encode()) % 9973
    return torch.sin((index * index % 9973).double() * (2 * math.pi / 9973))


def fill_(net):
    """Sets every weight, bias and statistic of a RAFT by formula; a signal keeps its size from layer to layer."""
    state = net.state_dict()
    for name, value in state.items():
        noise = wave(value.numel(), name).view(value.shape)
        if value.ndim == 4:
            # variance of a sine: 1/2. 2 / fan_in keeps the size under ReLU.
            new = noise * 2 / math.sqrt(value[0].numel())
            if name.startswith("update_block.flow_head.conv2"):
                new = new / 4              # steps of a pixel or two, as a trained net takes them
        elif name.endswith("running_var"):
            new = 1 + 0.5 * noise
        elif name.endswith("weight"):      # of a batch norm
            new = 1 + 0.2 * noise
        else:
            new = 0.1 * noise              # biases and running means
        if value.is_floating_point():
            value.copy_(new)
    net.load_state_dict(state)
    return net.eval()


def frames(N, H, W):
    """Two frames (N, 3, H, W) in [-1, 1]: waves of several lengths, the second frame moved by (3, -2) px and dimmed."""
    n, c, y, x = torch.meshgrid(*[torch.arange(k, dtype=torch.float64) for k in (N, 3, H, W)], indexing="ij")
    def picture(x, y):
        return (torch.sin(x / 5 + y / 11 + c + 2 * n) + torch.sin(x / 23 - y / 7 - c) + torch.sin(x * y / 400 + n)) / 3
    return picture(x, y).float(), (0.9 * picture(x - 3, y + 2)).float()


def places(N, H, W, count=40):
    """Indices of `count` values of a flow (N, 2, H, W), spread over it; corners included."""
    total = N * 2 * H * W
    return [0, W - 1, total - W, total - 1] + [int(k * 7919 * 97 % total) for k in range(1, count - 3)]


def fingerprint(net):
    """[parameters, tensors, checksum of all names and shapes]: equal where a weights file loads with strict=True."""
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in net.state_dict().items())
    return [sum(p.numel() for p in net.parameters()), len(lines), zlib.crc32("\n".join(lines).encode())]


def load_torchvision(folder=None):
    """torchvision's module of RAFT: a plain import, or its files in `folder` between stand-ins; else None."""
    if folder is None:
        try:
            return importlib.import_module("torchvision.models.optical_flow.raft")
        except Exception:       # absent, or compiled for another torch: RuntimeError, AttributeError, OSError ...
            return None
    ignore = lambda *args, **kwargs: (args[0] if args and callable(args[0]) else ignore)     # also as a decorator
    def package(name, **contents):
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [str(Path(folder, *name.split(".")[1:]))]      # so that its real files are found
        module.__dict__.update(contents)
    package("torchvision")
    package("torchvision.utils", _log_api_usage_once=ignore,
            _make_ntuple=lambda x, n: tuple(x) if isinstance(x, (tuple, list)) else (x,) * n)
    package("torchvision.transforms")
    package("torchvision.transforms._presets", OpticalFlow=None)
    package("torchvision.ops")
    misc = importlib.import_module("torchvision.ops.misc")
    sys.modules["torchvision.ops"].Conv2dNormActivation = misc.Conv2dNormActivation
    package("torchvision.models")
    package("torchvision.models._api", register_model=ignore, Weights=ignore,
            WeightsEnum=type("WeightsEnum", (), dict(verify=staticmethod(lambda weights: weights))))
    package("torchvision.models._utils", handle_legacy_interface=ignore)
    package("torchvision.models.optical_flow")
    return importlib.import_module("torchvision.models.optical_flow.raft")


@torch.no_grad()
def answer(torchvision_raft, size, N, H, W, iters):
    """torchvision's flow (N, 2, H, W), its weights from fill_, its frames padded on the right and below if need be."""
    net = fill_(getattr(torchvision_raft, f"raft_{size}")(weights=None))
    padded = [F.pad(frame, (0, -W % 8, 0, -H % 8), mode="replicate") for frame in frames(N, H, W)]
    return net(*padded, num_flow_updates=iters)[-1][..., :H, :W]


def main():
    torchvision_raft = load_torchvision(*sys.argv[1:2])
    if torchvision_raft is None:
        raise SystemExit("found no torchvision that imports, expected one, or its unpacked folder as argument")
    records = []
    for case in CASES:
        flow = answer(torchvision_raft, *case)
        values = [round(value, 6) for value in flow.flatten()[places(*case[1:4])].tolist()]
        names = fingerprint(getattr(torchvision_raft, f"raft_{case[0]}")(weights=None))
        records.append(dict(case=case, fingerprint=names, mean_size=round(float(flow.abs().mean()), 6), values=values))
        print(*case, f"mean |flow| {flow.abs().mean():.3f} px, largest {flow.abs().max():.3f} px")
    rows = ",\n".join(json.dumps(record) for record in records)
    REFERENCE.write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
