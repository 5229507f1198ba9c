"""Records what torchvision's RAFT answers, so that test_flow.py compares without torchvision.

Weights and frames come from formulas, so the file holds answers only. torchvision need not be
installed: its RAFT is plain Python, and stand-ins take the place of the compiled parts around it.

    pip download --no-deps -d wheel torchvision==0.28.0 && (cd wheel && unzip -q torchvision-*.whl)
    python tests/record_raft.py wheel/torchvision       # writes tests/raft_reference.json, 10 s
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
# size, N pairs, H x W px, iterations. torchvision refuses 130 x 141 and gets it padded.
CASES = [("small", 2, 128, 136, 4), ("small", 1, 130, 141, 3),
         ("large", 1, 128, 136, 3), ("large", 1, 130, 141, 2)]


def wave(count, name):
    """`count` numbers that look random and depend on the name. Without the square, the matrices
    would have rank 2, and swapped channels would go unnoticed."""
    index = torch.arange(count, dtype=torch.int64) + zlib.crc32(name.encode()) % 9973
    return torch.sin((index * index % 9973).double() * (2 * math.pi / 9973))


def fill_(net):
    """Set all weights and statistics of a RAFT by formula -> the net, in eval mode."""
    for name, value in net.state_dict().items():
        noise = wave(value.numel(), name).view(value.shape)
        if name.startswith("update_block.flow_head.conv2.weight"):
            value.copy_(noise / 2 / math.sqrt(value[0].numel()))    # small steps, as when trained
        elif value.ndim == 4:
            value.copy_(noise * 2 / math.sqrt(value[0].numel()))    # ReLU halves the signal
        elif name.endswith("running_var"):
            value.copy_(1 + 0.5 * noise)
        elif name.endswith("weight"):                               # of a batch norm
            value.copy_(1 + 0.2 * noise)
        elif value.is_floating_point():
            value.copy_(0.1 * noise)
    return net.eval()


def frames(N, H, W):
    """Two frames (N, 3, H, W) in [-1, 1]: waves; the second moved by (3, -2) px and dimmed."""
    axes = [torch.arange(size, dtype=torch.float64) for size in (N, 3, H, W)]
    n, c, y, x = torch.meshgrid(*axes, indexing="ij")

    def picture(x, y):
        waves = torch.sin(x / 5 + y / 11 + c + 2 * n) + torch.sin(x / 23 - y / 7 - c)
        return (waves + torch.sin(x * y / 400 + n)) / 3
    return picture(x, y).float(), (0.9 * picture(x - 3, y + 2)).float()


def places(N, H, W):
    """Indices of 40 values of a flow (N, 2, H, W), four corners among them."""
    total = N * 2 * H * W
    corners = [0, W - 1, total - W, total - 1]
    return corners + [k * 7919 * 97 % total for k in range(1, 37)]


def fingerprint(net):
    """[parameters, tensors, checksum of all names and shapes]: what decides if a file loads."""
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in net.state_dict().items())
    count = sum(p.numel() for p in net.parameters())
    return [count, len(lines), zlib.crc32("\n".join(lines).encode())]


def ignore(*arguments, **options):
    """Stands in for a function of torchvision, also as a decorator."""
    return arguments[0] if arguments and callable(arguments[0]) else ignore


def load_torchvision(folder):
    """torchvision's module of RAFT from the files in `folder`."""
    def package(name, **contents):
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [str(Path(folder, *name.split(".")[1:]))]     # where its real files are
        module.__dict__.update(contents)

    class Enum:
        def verify(weights):
            return weights

    for name in ("", ".transforms", ".ops", ".models", ".models.optical_flow"):
        package("torchvision" + name)
    package("torchvision.utils", _log_api_usage_once=ignore, _make_ntuple=ignore)
    package("torchvision.transforms._presets", OpticalFlow=None)
    package("torchvision.models._api", register_model=ignore, Weights=ignore, WeightsEnum=Enum)
    package("torchvision.models._utils", handle_legacy_interface=ignore)
    convolutions = importlib.import_module("torchvision.ops.misc").Conv2dNormActivation
    sys.modules["torchvision.ops"].Conv2dNormActivation = convolutions
    return importlib.import_module("torchvision.models.optical_flow.raft")


@torch.no_grad()
def main():
    torchvision_raft = load_torchvision(sys.argv[1])
    records = []
    for size, N, H, W, iters in CASES:
        net = fill_(getattr(torchvision_raft, f"raft_{size}")(weights=None))
        padded = [F.pad(x, (0, -W % 8, 0, -H % 8), mode="replicate") for x in frames(N, H, W)]
        flow = net(*padded, num_flow_updates=iters)[-1][..., :H, :W]        # (N, 2, H, W)
        values = flow.flatten()[places(N, H, W)].tolist()
        records.append(json.dumps(dict(
            case=[size, N, H, W, iters], fingerprint=fingerprint(net),
            mean_size=round(flow.abs().mean().item(), 6),
            values=[round(value, 6) for value in values])))
    REFERENCE.write_text("[\n" + ",\n".join(records) + "\n]\n")


if __name__ == "__main__":
    main()
