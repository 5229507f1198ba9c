"""Optical flow: Eq. 5 and its inverse, RAFT against torchvision's recorded answers, weights files, whole videos.

About 5 s on one thread; no network, no torchvision, no file from elsewhere. The live check with trained weights is
tests/raft_shift.py; tests/record_raft.py wrote raft_reference.json.
"""
import colorsys
import json
import math
import sys
import urllib.error
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import flow as F  # noqa: E402
import record_raft  # noqa: E402

RECORDS = json.loads(record_raft.REFERENCE.read_text())
case_name = lambda record: "-".join(map(str, record["case"]))


def random_flow(*shape, reach=1.0, seed=0):
    """(*shape[:-3], 2, T, H, W) with lengths uniform in 0 .. reach times the speed where m = 1, in any direction."""
    *batch, T, H, W = shape
    length, angle = torch.rand(2, *batch, 1, T, H, W, generator=torch.Generator().manual_seed(seed))
    length, angle = length * reach * 0.15 * math.hypot(H, W), angle * 2 * math.pi
    return torch.cat([length * angle.cos(), length * angle.sin()], dim=-4)


def one_pixel(u, v, H=30, W=40, **options):
    """The colour of a picture that moves by (u, v) everywhere; its diagonal is 50 px, so m = 1 at 7.5 px per frame."""
    picture = torch.tensor([u, v], dtype=torch.float32).view(1, 2, 1, 1, 1).expand(1, 2, 1, H, W)
    return F.flow_to_rgb(picture, **options)[0, :, 0, H // 2, W // 2].tolist()


# ---- Eq. 5 ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("background, sigma", [("white", 0.15), ("black", 0.15), ("white", 0.08)])
def test_equation_5_pixel_by_pixel(background, sigma):
    """Eq. 5 and choice 1. Reference: Python's colorsys and math in float64, pixel by pixel, saturated ones included.
    Tolerance: float32 in an interval of length 2, a dozen roundings."""
    d = random_flow(2, 2, 5, 7, reach=1.5)
    rgb = F.flow_to_rgb(d, sigma, background)
    assert rgb.shape == (2, 3, 2, 5, 7) and rgb.min() >= -1 and rgb.max() <= 1
    for (u, v), found in zip(*(x.movedim(1, -1).flatten(0, -2).tolist() for x in (d, rgb))):
        m = min(1, math.sqrt(u * u + v * v) / (sigma * math.sqrt(5 * 5 + 7 * 7)))
        hue = math.atan2(v, u) / (2 * math.pi) % 1
        expected = colorsys.hsv_to_rgb(hue, m, 1) if background == "white" else colorsys.hsv_to_rgb(hue, 1, m)
        assert found == pytest.approx([2 * c - 1 for c in expected], abs=3e-6)


def test_colours_of_the_compass():
    """Choice 1 in words. Reference: the colours by name. Clockwise on the screen (v points down) the hue grows."""
    assert one_pixel(0, 0) == [1, 1, 1]
    assert one_pixel(9, 0) == pytest.approx([1, -1, -1], abs=1e-6)        # right: red
    assert one_pixel(0, 9) == pytest.approx([0, 1, -1], abs=1e-6)         # down: yellow-green
    assert one_pixel(-9, 0) == pytest.approx([-1, 1, 1], abs=1e-6)        # left: cyan
    assert one_pixel(0, -9) == pytest.approx([0, -1, 1], abs=1e-6)        # up: violet
    assert one_pixel(3.75, 0) == pytest.approx([1, 0, 0], abs=1e-6)       # right at half speed: pink, half veiled
    assert one_pixel(0, 0, background="black") == [-1, -1, -1]
    assert one_pixel(3.75, 0, background="black") == pytest.approx([0, -1, -1], abs=1e-6)


def test_m_stops_at_one():
    """Eq. 5's min. Reference: 7.5 px is sigma times the diagonal of 30 x 40; beyond it the colour no longer changes."""
    assert one_pixel(7.4, 0) != pytest.approx(one_pixel(7.5, 0), abs=1e-3)
    assert one_pixel(7.5, 0) == pytest.approx(one_pixel(75, 0), abs=1e-6)
    assert one_pixel(3, 4) != pytest.approx(one_pixel(3, 4, sigma=0.3), abs=1e-3)
    d = random_flow(1, 1, 30, 40)
    direction = d / d.norm(dim=1, keepdim=True)
    back = F.rgb_to_flow(F.flow_to_rgb(100 * direction))
    torch.testing.assert_close(back, 7.5 * direction, atol=1e-5, rtol=0)


@pytest.mark.parametrize("background", ["white", "black"])
@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-6), (torch.float64, 1e-15)])
def test_inverse_is_exact_below_one(background, dtype, digits):
    """rgb_to_flow(flow_to_rgb(d)) = d for m < 1. Reference: d itself.
    Tolerance: a colour in [-1, 1] is rounded to some 1e-7 (1e-16 in double); m and the hue times m inherit that error
    however small m is, and the flow is both times the full speed: a few roundings of the full speed."""
    d = random_flow(3, 2, 24, 33, reach=0.999).to(dtype)
    d[0, :, 0, 0, :2] = torch.tensor([[0, 1e-3], [0, 0]])       # no motion, and hardly any
    back = F.rgb_to_flow(F.flow_to_rgb(d, background=background), background=background)
    assert back.dtype == dtype
    torch.testing.assert_close(back, d, atol=5 * digits * 0.15 * math.hypot(24, 33), rtol=0)
    assert back[0, :, 0, 0, 0].tolist() == [0, 0]


def test_a_decoded_picture_is_noisy():
    """Values outside [-1, 1] are clamped and a grey cast cancels. Reference: the flow of the clean picture; noise of
    0.01 in a range of 2 moves m by at most 0.01, the direction by little more than the same share of the full speed."""
    d = random_flow(1, 2, 24, 33, reach=0.9)
    rgb = F.flow_to_rgb(d)
    assert torch.equal(F.rgb_to_flow(5 * rgb.sign()), F.rgb_to_flow(rgb.sign()))
    torch.testing.assert_close(F.rgb_to_flow(rgb - 0.1 * (1 + rgb.amin(1, keepdim=True))), d, atol=1e-4, rtol=0)
    noise = 0.01 * (2 * torch.rand(rgb.shape, generator=torch.Generator().manual_seed(1)) - 1)
    assert (F.rgb_to_flow(rgb + noise) - d).norm(dim=1).max() < 0.025 * F.full_speed(d, 0.15)


def test_pictures_of_any_batch_and_what_is_refused():
    """Leading dimensions are free, half precision is lifted to float32; anything else is one clear line."""
    d = random_flow(2, 4, 3, 8, 8, reach=0.9)
    rgb = F.flow_to_rgb(d)
    assert rgb.shape == (2, 4, 3, 3, 8, 8)
    assert torch.equal(rgb[1, 2], F.flow_to_rgb(d[1, 2]))
    assert torch.equal(F.rgb_to_flow(rgb)[0, 3], F.rgb_to_flow(rgb[0, 3]))
    assert F.flow_to_rgb(d.bfloat16()).dtype == torch.float32
    for call in (lambda: F.flow_to_rgb(d, background="green"), lambda: F.rgb_to_flow(rgb, background="green"),
                 lambda: F.flow_to_rgb(rgb), lambda: F.rgb_to_flow(d), lambda: F.flow_to_rgb(d, sigma=0),
                 lambda: F.rgb_to_flow((rgb * 127).to(torch.uint8))):
        with pytest.raises(ValueError, match="found .* expected") as error:
            call()
        assert "\n" not in str(error.value)


# ---- RAFT -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("record", RECORDS, ids=case_name)
@torch.no_grad()
def test_raft_is_torchvisions(record):
    """Same weights, same frames, same flow. Reference: torchvision 0.28.0, recorded by record_raft.py; sizes that are
    no multiple of 8 were padded there; where torchvision imports, it is also asked now, for every pixel. Tolerance:
    1e-4 px of flows up to 18 px. Rounding gave 2e-5; each of 14 wrong details tried (neighbours' order, ...) over 1."""
    size, N, H, W, iters = record["case"]
    found = record_raft.fill_(F.RAFT(size))(*record_raft.frames(N, H, W), iters=iters)
    assert found.shape == (N, 2, H, W)
    values = found.flatten()[record_raft.places(N, H, W)]
    torch.testing.assert_close(values, torch.tensor(record["values"]), atol=1e-4, rtol=0)
    assert found.abs().mean().item() == pytest.approx(record["mean_size"], abs=1e-4)
    torchvision_raft = record_raft.load_torchvision()
    if torchvision_raft is not None:
        torch.testing.assert_close(found, record_raft.answer(torchvision_raft, *record["case"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("record", RECORDS, ids=case_name)
def test_raft_has_torchvisions_parameters(record):
    """Its files load with strict=True. Reference: the checksum over all names and shapes of torchvision's own module,
    recorded with the flows, and the published counts."""
    found = record_raft.fingerprint(F.RAFT(record["case"][0]))
    assert found == record["fingerprint"] and found[0] == dict(large=5257536, small=990162)[record["case"][0]]


def test_raft_refuses():
    """One clear line each: an unknown size, frames of two shapes, no batch, sides whose lowest level would be NaN."""
    with pytest.raises(ValueError, match="found RAFT size 'medium', expected 'large' or 'small'"):
        F.RAFT("medium")
    raft, x = F.RAFT("small"), torch.zeros(1, 3, 128, 128)
    for a, b in ((x, x[..., :120]), (x[0], x[0]), (x[..., :120], x[..., :120])):
        with pytest.raises(ValueError, match="found frames .* expected the same shape .* 128 px"):
            raft(a, b)


# ---- Weights --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with small.pth and large.pth, filled by formula."""
    folder = tmp_path_factory.mktemp("raft")
    for size in ("small", "large"):
        torch.save(record_raft.fill_(F.RAFT(size)).state_dict(), folder / f"{size}.pth")
    return folder


@pytest.mark.parametrize("size", ["small", "large"])
def test_load_raft_takes_a_path(files, size):
    """By name or with size=None the file's tensors arrive. Reference: the formula that filled the file."""
    for asked in (size, None):
        raft = F.load_raft(asked, str(files / f"{size}.pth"))
        assert not raft.training and not any(p.requires_grad for p in raft.parameters())
        expected = record_raft.fill_(F.RAFT(size)).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in raft.state_dict().items())


def test_load_raft_refuses(files, tmp_path):
    """Every file that is not the RAFT asked for: one line with what was found, what was expected, what to do. One
    flipped byte in the middle of a weight, too, which torch.load alone would take."""
    small = files / "small.pth"
    data = small.read_bytes()
    flipped = data[:700000] + bytes([data[700000] ^ 64]) + data[700001:]
    bad = dict(cut=data[:len(data) // 2], flipped=flipped, empty=b"", text=b"not weights")
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    state = torch.load(small)
    state.pop("feature_encoder.conv.bias")
    torch.save(state, tmp_path / "partial")
    torch.save(dict(step=3), tmp_path / "numbers")
    torch.save(dict(weight=torch.zeros(3)), tmp_path / "other")
    cases = [(None, tmp_path / name, "found .* expected .* get the file again") for name in (*bad, "numbers")]
    cases += [(None, tmp_path / name, "found .* expected .* is no RAFT: get https://") for name in ("partial", "other")]
    cases += [("large", small, "expected .*RAFT-large.* looks like RAFT-small: ask for size='small'"),
              ("small", files / "large.pth", "looks like RAFT-large: ask for size='large'"),
              ("huge", small, "found RAFT size 'huge'")]
    for size, path, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            F.load_raft(size, str(path))
        assert "\n" not in str(error.value)
    for path in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="flow.weights"):
            F.load_raft("small", str(path))


def test_load_raft_without_a_path(files, monkeypatch):
    """The published file is asked for with its hash; without a network the error names it and the way around.
    Stand-in for the network: torch.hub's function, replaced."""
    asked = []
    def fetch(url, **options):
        asked.append((url.rsplit("/", 1)[-1], options["check_hash"], options["weights_only"]))
        return torch.load(files / ("small.pth" if "small" in url else "large.pth"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    for size in ("small", "large", None):
        F.load_raft(size)
    large = ("raft_large_C_T_SKHT_V2-ff5fadd5.pth", True, True)
    assert asked == [("raft_small_C_T_V2-01064c6d.pth", True, True), large, large]

    def offline(url, **options):
        raise urllib.error.URLError("no route")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match="https://download.pytorch.org/models/raft_large.*flow.weights"):
        F.load_raft()


# ---- Whole videos ---------------------------------------------------------------------------------------------------
class FakeRAFT:
    """Answers (8, 4) px everywhere plus the mean of both frames' first channel, and notes the shapes it was asked."""
    def __init__(self):
        self.asked = []

    def __call__(self, frame1, frame2, iters=12):
        self.asked.append(tuple(frame1.shape))
        assert frame1.shape == frame2.shape and not torch.is_grad_enabled()
        content = (frame1[:, :1] + 100 * frame2[:, :1]).mean((1, 2, 3)).view(-1, 1, 1, 1)
        return frame1.new_tensor([8, 4]).view(1, 2, 1, 1) + content.expand(-1, 2, *frame1.shape[-2:])


def numbered(B, T, H, W):
    """Frames of one value each: 0, 1, 2 ... through the videos, so that a pair can be read from its answer."""
    return torch.arange(B * T).float().view(B, 1, T, 1, 1).expand(B, 3, T, H, W).clone()


@pytest.mark.parametrize("pairs", [1, 3, 12])
def test_estimate_flow_pairs_frames_within_a_video(pairs):
    """Frame t goes with t + 1 of the same video whatever the chunks, and the last flow is repeated (choice 2).
    Reference: the fake's answer 8 + n + 100 (n + 1) for frame number n, worked out by hand."""
    raft = FakeRAFT()
    d = F.estimate_flow(numbered(2, 4, 128, 136), raft, pairs=pairs)
    assert d.shape == (2, 2, 4, 128, 136)
    firsts = torch.tensor([[0, 1, 2, 2], [4, 5, 6, 6]]).float()
    expected = torch.stack([8 + firsts + 100 * (firsts + 1), 4 + firsts + 100 * (firsts + 1)], 1)
    torch.testing.assert_close(d, expected[..., None, None].expand_as(d), atol=1e-3, rtol=0)
    assert [shape[0] for shape in raft.asked] == {1: [1] * 6, 3: [3, 3], 12: [6]}[pairs]


@pytest.mark.parametrize("H, W, asked, u, v", [(64, 32, (128, 128), 2, 2), (32, 200, (128, 200), 8, 1),
                                               (127, 128, (128, 128), 8, 4 * 127 / 128), (130, 141, (130, 141), 8, 4)])
def test_small_frames_are_enlarged_per_axis(H, W, asked, u, v):
    """A side under 128 px becomes 128 for RAFT and its component is divided by that. Reference: (8, 4) px times
    (W / enlarged W, H / enlarged H)."""
    raft = FakeRAFT()
    d = F.estimate_flow(torch.zeros(1, 3, 2, H, W), raft)
    assert raft.asked == [(1, 3, *asked)] and d.shape == (1, 2, 2, H, W)
    torch.testing.assert_close(d, torch.tensor([u, v]).view(1, 2, 1, 1, 1).expand_as(d).float(), atol=1e-5, rtol=1e-6)


def test_one_frame_does_not_move():
    """Choice 2: zeros when T = 1, and RAFT is not asked."""
    raft = FakeRAFT()
    d = F.estimate_flow(torch.ones(2, 3, 1, 20, 30), raft)
    assert torch.equal(d, torch.zeros(2, 2, 1, 20, 30)) and not raft.asked


def test_estimate_flow_with_the_real_net():
    """RAFT itself through estimate_flow. Reference: the net called pair by pair; chunks must not mix samples. Tolerance
    as above. And a video of 32 px, whose lowest level would be 0 / 0, gives finite numbers."""
    raft = record_raft.fill_(F.RAFT("small")).requires_grad_(False)
    frames = torch.cat(record_raft.frames(2, 128, 136))
    video = torch.stack([frames, frames.flip(0)]).transpose(1, 2)
    d = F.estimate_flow(video[:, :, :3], raft, iters=2, pairs=3)
    for b, t in ((0, 0), (0, 1), (1, 1)):
        alone = raft(video[b:b + 1, :, t], video[b:b + 1, :, t + 1], iters=2)[0]
        torch.testing.assert_close(d[b, :, t], alone, atol=1e-4, rtol=0)
    assert torch.equal(d[:, :, 2], d[:, :, 1])
    tiny = F.estimate_flow(video[:1, :, :2, :32, :32], raft, iters=2)
    assert tiny.shape == (1, 2, 2, 32, 32) and tiny.isfinite().all() and tiny.abs().max() > 0.01


def test_estimate_flow_refuses():
    """One clear line: a video without its batch, with another number of channels, of integers; no pairs at a time."""
    video = torch.zeros(1, 3, 2, 16, 16)
    for bad, pairs in ((video[0], 12), (video[:, :2], 12), (video.byte(), 12), (video, 0)):
        with pytest.raises(ValueError, match="found .* expected float"):
            F.estimate_flow(bad, FakeRAFT(), pairs=pairs)
