"""flow.py: Eq. 5 and its inverse, RAFT against torchvision's recorded answers, files of weights,
whole videos. No network, no torchvision. About 3 s on one thread. raft_shift.py is the check with
real weights; record_raft.py wrote raft_reference.json.
"""
import colorsys
import json
import math

import pytest
import torch
import torch.nn.functional as F

import flow
import record_raft

RECORDS = json.loads(record_raft.REFERENCE.read_text())


def random_flow(B, T, H, W, reach):
    """(B, 2, T, H, W) of any direction; lengths up to `reach` times the speed at which m = 1."""
    draw = torch.Generator().manual_seed(0)
    length = torch.rand(B, 1, T, H, W, generator=draw) * reach * 0.15 * math.hypot(H, W)
    angle = torch.rand(B, 1, T, H, W, generator=draw) * 2 * math.pi
    return torch.cat([length * angle.cos(), length * angle.sin()], dim=1)


# -------------------------------------------------------------------------------------------------
# Eq. 5

@pytest.mark.parametrize("background, sigma", [("white", 0.15), ("black", 0.15), ("white", 0.08)])
def test_equation_5_pixel_by_pixel(background, sigma):
    """Reference: Python's colorsys and math in float64, for every pixel, saturated ones included.
    Tolerance: float32 in [-1, 1], a dozen roundings."""
    d = random_flow(2, 2, 5, 7, reach=1.5)
    rgb = flow.flow_to_rgb(d, sigma, background)
    vectors = d.movedim(1, -1).flatten(0, -2).tolist()
    colours = rgb.movedim(1, -1).flatten(0, -2).tolist()
    for (u, v), found in zip(vectors, colours):
        m = min(1, math.sqrt(u * u + v * v) / (sigma * math.sqrt(5 * 5 + 7 * 7)))
        hue = math.atan2(v, u) / (2 * math.pi) % 1
        saturation, value = (m, 1) if background == "white" else (1, m)
        expected = colorsys.hsv_to_rgb(hue, saturation, value)
        assert found == pytest.approx([2 * c - 1 for c in expected], abs=3e-6)


@pytest.mark.parametrize("d, colour", [
    ((0, 0), (1, 1, 1)),            # none: white
    ((9, 0), (1, -1, -1)),          # right: red
    ((0, 9), (0, 1, -1)),           # down: yellow-green
    ((-9, 0), (-1, 1, 1)),          # left: cyan
    ((0, -9), (0, -1, 1)),          # up: violet
    ((3.75, 0), (1, 0, 0))])        # right, half as fast: pink
def test_colours_of_the_compass(d, colour):
    """README, choice 1, by the names of colours. A picture of 30 x 40 px has a diagonal of 50 px,
    so m = 1 at 0.15 * 50 = 7.5 px per frame. One clip, in bf16, becomes float32."""
    d = torch.tensor(d).bfloat16().view(2, 1, 1, 1).expand(2, 1, 30, 40)
    found = flow.flow_to_rgb(d)[:, 0, 15, 20]
    torch.testing.assert_close(found, torch.tensor(colour).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("background", ["white", "black"])
@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-6), (torch.float64, 1e-15)])
def test_inverse_is_exact_below_one(background, dtype, digits):
    """rgb_to_flow(flow_to_rgb(d)) = d for m < 1. Reference: d itself; where it is too fast, its
    direction at full speed. A decoded picture may leave [-1, 1], and is clamped. Tolerance:
    colours are rounded to 1e-7 (1e-16 in double) of the full speed, a few times."""
    full = 0.15 * math.hypot(24, 33)
    d = random_flow(3, 2, 24, 33, reach=0.999).to(dtype)
    d[0, :, 0, 0, :2] = torch.tensor([[0, 1e-3], [0, 0]])       # none, and hardly any
    for given, expected in ((d, d), (1e6 * d, full * F.normalize(d, dim=1))):
        picture = flow.flow_to_rgb(given, background=background)
        back = flow.rgb_to_flow(picture, background=background)
        torch.testing.assert_close(back, expected, atol=5 * digits * full, rtol=0)
        assert back[0, :, 0, 0, 0].tolist() == [0, 0]
    wild = 3 * picture
    assert torch.equal(flow.rgb_to_flow(wild), flow.rgb_to_flow(wild.clamp(-1, 1)))


@pytest.mark.parametrize("function, picture, options", [
    (flow.flow_to_rgb, torch.zeros(2, 3, 8, 8), dict(background="green")),
    (flow.flow_to_rgb, torch.zeros(2, 3, 8, 8), dict(sigma=0)),
    (flow.flow_to_rgb, torch.zeros(3, 3, 8, 8), {}),
    (flow.rgb_to_flow, torch.zeros(2, 3, 8, 8), {}),
    (flow.rgb_to_flow, torch.zeros(3, 3, 8, 8).byte(), {}),
    (flow.estimate_flow, torch.zeros(3, 2, 16, 16), dict(raft=None)),
    (flow.estimate_flow, torch.zeros(1, 2, 2, 16, 16), dict(raft=None)),
    (flow.estimate_flow, torch.zeros(1, 3, 2, 16, 16).byte(), dict(raft=None))])
def test_refused_pictures(function, picture, options):
    """In one line: another background, sigma, number of channels or axes, integers."""
    with pytest.raises(ValueError, match=r"^found .* expected .*\Z"):
        function(picture, **options)


# -------------------------------------------------------------------------------------------------
# RAFT

@pytest.mark.parametrize("record", RECORDS)
@torch.no_grad()
def test_raft_is_torchvisions(record):
    """Same weights, same frames, same flow; and the same names and shapes, so that its files load.
    Reference: torchvision 0.28.0, recorded. Tolerance: 1e-4 px of flow up to 18 px, as rounding
    gave 2e-5; wrong details (the order of the neighbours, say) gave over 1."""
    size, N, H, W, iters = record["case"]
    raft = record_raft.fill_(flow.RAFT(size))
    fingerprint = record_raft.fingerprint(raft)
    assert fingerprint == record["fingerprint"]
    assert fingerprint[0] == dict(large=5257536, small=990162)[size]
    found = raft(*record_raft.frames(N, H, W), iters=iters)
    values = found.flatten()[record_raft.places(N, H, W)]
    torch.testing.assert_close(values, torch.tensor(record["values"]), atol=1e-4, rtol=0)
    assert found.abs().mean().item() == pytest.approx(record["mean_size"], abs=1e-4)


def test_raft_refuses():
    """Frames of two shapes, no batch, sides under 121 px."""
    raft = flow.RAFT("small")
    x = torch.zeros(1, 3, 128, 128)
    narrow = x[..., :120]
    for frame1, frame2 in [(x, narrow), (x[0], x[0]), (narrow, narrow)]:
        with pytest.raises(ValueError, match="found frames .* expected the same shape .* 128 px"):
            raft(frame1, frame2)


# -------------------------------------------------------------------------------------------------
# Weights

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with small.pth and large.pth, filled by formula, and files that do not load."""
    folder = tmp_path_factory.mktemp("raft")
    for size in ("small", "large"):
        state = record_raft.fill_(flow.RAFT(size)).state_dict()
        torch.save(state, folder / f"{size}.pth")
    state.pop("feature_encoder.conv.bias")
    torch.save(state, folder / "partial")
    torch.save(dict(step=3), folder / "numbers")
    content = bytearray((folder / "small.pth").read_bytes())
    (folder / "cut").write_bytes(content[:500000])
    content[700000] ^= 64           # in the middle of a weight: torch.load alone would take it
    (folder / "flipped").write_bytes(content)
    return folder


@pytest.mark.parametrize("size, asked", [("small", "small"), ("small", None), ("large", None)])
def test_load_raft_takes_a_path(files, size, asked):
    """With its size or with None, the file's tensors arrive. Reference: the formula."""
    raft = flow.load_raft(asked, str(files / f"{size}.pth"))
    assert not raft.training and not any(p.requires_grad for p in raft.parameters())
    expected = record_raft.fill_(flow.RAFT(size)).state_dict()
    assert all(torch.equal(w, expected[name]) for name, w in raft.state_dict().items())


@pytest.mark.parametrize("size, name, message", [
    (None, "flipped", "found damaged bytes .* get the file again"),
    (None, "cut", "found damaged bytes .* get the file again"),
    (None, "numbers", "found .* no tensors, .* get the file again"),
    ("large", "partial", "found 168 tensors.* or get https://.*raft_large"),
    ("large", "small.pth", "most like RAFT-small, expected .*RAFT-large: ask"),
    ("small", "large.pth", "most like RAFT-large, expected .*RAFT-small: ask"),
    ("huge", "small.pth", "found RAFT size 'huge', expected 'large' or 'small'"),
    ("small", "missing.pth", "set flow.weights"),
    ("small", "", "set flow.weights")])         # the folder
def test_load_raft_refuses(files, size, name, message):
    """A damaged file, a RAFT without one tensor, the other size, an unknown size, no file."""
    error = FileNotFoundError if "flow.weights" in message else ValueError
    with pytest.raises(error, match=message + r".*\Z"):         # \Z: in one line
        flow.load_raft(size, str(files / name))


def test_load_raft_without_a_path(files, monkeypatch):
    """The published file is fetched, its hash checked; without a network the error says what to do.
    A stand-in takes the place of torch.hub's function."""
    asked = []

    def fetch(url, **options):
        asked.append(url.rsplit("/", 1)[-1])
        if len(asked) > 2:
            raise OSError("no route")
        assert options["check_hash"] and options["weights_only"]
        return torch.load(files / ("small.pth" if "small" in url else "large.pth"))

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    flow.load_raft("small")
    flow.load_raft(None)
    assert asked == ["raft_small_C_T_V2-01064c6d.pth", "raft_large_C_T_SKHT_V2-ff5fadd5.pth"]
    with pytest.raises(FileNotFoundError, match="https://.*/raft_large.*flow.weights"):
        flow.load_raft()


# -------------------------------------------------------------------------------------------------
# Whole videos

class FakeRAFT:
    """Answers (8, 4) px plus n + 100 k where frame 1 is n everywhere and frame 2 is k."""

    def __init__(self):
        self.asked = []         # shapes

    def __call__(self, frame1, frame2, iters):
        self.asked.append(tuple(frame1.shape))
        content = (frame1 + 100 * frame2)[:, :2]
        return content + torch.tensor([8, 4]).view(2, 1, 1)


@pytest.mark.parametrize("pairs, calls", [(1, [1] * 6), (4, [4, 2]), (12, [6])])
def test_estimate_flow_pairs_frames_within_a_video(pairs, calls):
    """Sec. 4.1 and choice 2: frame n goes with n + 1 of the same video, the last flow is repeated;
    one frame alone does not move. Reference: the fake's answer for frames that are numbered
    through two videos of four."""
    raft = FakeRAFT()
    video = torch.arange(8.0).view(2, 1, 4, 1, 1).expand(2, 3, 4, 128, 136)
    d = flow.estimate_flow(video, raft, pairs=pairs)
    first = torch.tensor([[0, 1, 2, 2], [4, 5, 6, 6]]).float()
    content = first + 100 * (first + 1)
    expected = torch.stack([8 + content, 4 + content], dim=1)[..., None, None]
    torch.testing.assert_close(d, expected.expand(2, 2, 4, 128, 136), atol=1e-3, rtol=0)
    assert [shape[0] for shape in raft.asked] == calls
    still = flow.estimate_flow(video[:, :, :1], raft=None)
    assert torch.equal(still, torch.zeros(2, 2, 1, 128, 136))


@pytest.mark.parametrize("H, W, asked, u, v", [
    (64, 32, (128, 128), 8 / 4, 4 / 2), (32, 200, (128, 200), 8, 4 / 4),
    (127, 128, (128, 128), 8, 4 * 127 / 128), (130, 141, (130, 141), 8, 4)])
def test_small_frames_are_enlarged_per_axis(H, W, asked, u, v):
    """A side under 128 px becomes 128 for RAFT, and its component of the flow shrinks again.
    Reference: the fake's (8, 4) px times (W / wide, H / tall) by hand."""
    raft = FakeRAFT()
    d = flow.estimate_flow(torch.zeros(1, 3, 2, H, W), raft)
    assert raft.asked == [(1, 3, *asked)]
    expected = torch.tensor([u, v]).float().view(1, 2, 1, 1, 1).expand(1, 2, 2, H, W)
    torch.testing.assert_close(d, expected, atol=1e-5, rtol=1e-6)


def test_estimate_flow_with_the_real_net():
    """Reference: the net called by itself. A video of 32 px, whose lowest level would be 0 / 0,
    gives finite numbers."""
    raft = record_raft.fill_(flow.RAFT("small")).requires_grad_(False)
    frame1, frame2 = record_raft.frames(1, 128, 136)
    video = torch.stack([frame1, frame2], dim=2)                        # (1, 3, 2, 128, 136)
    d = flow.estimate_flow(video, raft, iters=2)
    torch.testing.assert_close(d[:, :, 0], raft(frame1, frame2, iters=2), atol=1e-4, rtol=0)
    tiny = flow.estimate_flow(video[..., :32, :32], raft, iters=2)
    assert tiny.isfinite().all() and tiny.abs().max() > 0.01
