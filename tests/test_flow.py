"""flow.py: Eq. 5 and its inverse, RAFT against torchvision's recorded answers, files of weights,
whole videos. No network, no torchvision, no file from elsewhere. About 5 s on one thread.

raft_shift.py is the check with real weights; record_raft.py wrote raft_reference.json.
"""
import colorsys
import json
import math
import urllib.error

import pytest
import torch

import flow
import record_raft

RECORDS = json.loads(record_raft.REFERENCE.read_text())


def random_flow(B, T, H, W, reach=1.0, seed=0):
    """(B, 2, T, H, W) of any direction; lengths up to `reach` times the speed at which m = 1."""
    draw = torch.Generator().manual_seed(seed)
    length = torch.rand(B, 1, T, H, W, generator=draw) * reach * 0.15 * math.hypot(H, W)
    angle = torch.rand(B, 1, T, H, W, generator=draw) * 2 * math.pi
    return torch.cat([length * angle.cos(), length * angle.sin()], dim=1)


def colour_of(u, v, **options):
    """The colour of a picture of 30 x 40 px that moves by (u, v) everywhere. Its diagonal is 50 px,
    so m = 1 at 0.15 * 50 = 7.5 px per frame."""
    picture = torch.tensor([u, v], dtype=torch.float32).view(1, 2, 1, 1, 1).expand(1, 2, 1, 30, 40)
    return flow.flow_to_rgb(picture, **options)[0, :, 0, 15, 20].tolist()


# -------------------------------------------------------------------------------------------------
# Eq. 5


@pytest.mark.parametrize("background, sigma", [("white", 0.15), ("black", 0.15), ("white", 0.08)])
def test_equation_5_pixel_by_pixel(background, sigma):
    """Reference: Python's colorsys and math in float64, for every pixel, saturated ones included.
    Tolerance: float32 in [-1, 1], a dozen roundings."""
    d = random_flow(2, 2, 5, 7, reach=1.5)
    rgb = flow.flow_to_rgb(d, sigma, background)
    assert rgb.shape == (2, 3, 2, 5, 7)
    vectors = d.movedim(1, -1).flatten(0, -2).tolist()
    colours = rgb.movedim(1, -1).flatten(0, -2).tolist()
    for (u, v), found in zip(vectors, colours):
        m = min(1, math.sqrt(u * u + v * v) / (sigma * math.sqrt(5 * 5 + 7 * 7)))
        hue = math.atan2(v, u) / (2 * math.pi) % 1
        on_white = background == "white"
        expected = colorsys.hsv_to_rgb(hue, m, 1) if on_white else colorsys.hsv_to_rgb(hue, 1, m)
        assert found == pytest.approx([2 * c - 1 for c in expected], abs=3e-6)


def test_colours_of_the_compass():
    """README, choice 1. Reference: the colours by their names. v points down."""
    assert colour_of(0, 0) == [1, 1, 1]
    assert colour_of(9, 0) == pytest.approx([1, -1, -1], abs=1e-6)      # right: red
    assert colour_of(0, 9) == pytest.approx([0, 1, -1], abs=1e-6)       # down: yellow-green
    assert colour_of(-9, 0) == pytest.approx([-1, 1, 1], abs=1e-6)      # left: cyan
    assert colour_of(0, -9) == pytest.approx([0, -1, 1], abs=1e-6)      # up: violet
    assert colour_of(3.75, 0) == pytest.approx([1, 0, 0], abs=1e-6)     # right, half as fast: pink
    assert colour_of(0, 0, background="black") == [-1, -1, -1]
    assert colour_of(3.75, 0, background="black") == pytest.approx([0, -1, -1], abs=1e-6)


def test_m_stops_at_one():
    """Eq. 5's min. Reference: 7.5 px by hand; faster flow keeps its direction only."""
    assert colour_of(7.4, 0) != pytest.approx(colour_of(7.5, 0), abs=1e-3)
    assert colour_of(7.5, 0) == pytest.approx(colour_of(75, 0), abs=1e-6)
    assert colour_of(3, 4) != pytest.approx(colour_of(3, 4, sigma=0.3), abs=1e-3)
    direction = torch.nn.functional.normalize(random_flow(1, 1, 30, 40), dim=1)
    back = flow.rgb_to_flow(flow.flow_to_rgb(100 * direction))
    torch.testing.assert_close(back, 7.5 * direction, atol=1e-5, rtol=0)


@pytest.mark.parametrize("background", ["white", "black"])
@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-6), (torch.float64, 1e-15)])
def test_inverse_is_exact_below_one(background, dtype, digits):
    """rgb_to_flow(flow_to_rgb(d)) = d for m < 1. Reference: d itself.
    Tolerance: colours are rounded to 1e-7 (1e-16 in double), whatever m is. The flow is that times
    the full speed, after a few roundings."""
    d = random_flow(3, 2, 24, 33, reach=0.999).to(dtype)
    d[0, :, 0, 0, :2] = torch.tensor([[0, 1e-3], [0, 0]])       # none, and hardly any
    back = flow.rgb_to_flow(flow.flow_to_rgb(d, background=background), background=background)
    torch.testing.assert_close(back, d, atol=5 * digits * flow.full_speed(d, 0.15), rtol=0)
    assert back[0, :, 0, 0, 0].tolist() == [0, 0]


def test_a_decoded_picture_is_noisy():
    """Values beyond [-1, 1] are clamped, and adding grey changes nothing. Reference: the flow of
    the clean picture. Noise of 0.01 in a range of 2 moves m by at most 0.01."""
    d = random_flow(1, 2, 24, 33, reach=0.9)
    rgb = flow.flow_to_rgb(d)
    assert torch.equal(flow.rgb_to_flow(5 * rgb.sign()), flow.rgb_to_flow(rgb.sign()))
    darker = rgb - 0.1 * (1 + rgb.amin(dim=1, keepdim=True))
    torch.testing.assert_close(flow.rgb_to_flow(darker), d, atol=1e-4, rtol=0)
    noise = 0.01 * (2 * torch.rand(rgb.shape, generator=torch.Generator().manual_seed(1)) - 1)
    error = (flow.rgb_to_flow(rgb + noise) - d).norm(dim=1)
    assert error.max() < 0.025 * flow.full_speed(d, 0.15)


def test_pictures_of_any_batch():
    """More or fewer leading dimensions give the same pixels; half precision becomes float32."""
    d = random_flow(4, 3, 8, 8, reach=0.9)
    rgb = flow.flow_to_rgb(d)
    assert torch.equal(flow.flow_to_rgb(d[2]), rgb[2])
    assert torch.equal(flow.flow_to_rgb(d.unflatten(0, (2, 2))), rgb.unflatten(0, (2, 2)))
    assert torch.equal(flow.rgb_to_flow(rgb[2]), flow.rgb_to_flow(rgb)[2])
    assert flow.flow_to_rgb(d.bfloat16()).dtype == torch.float32


def test_equation_5_refuses():
    """One line each: another background, sigma, number of channels, integers."""
    d = torch.zeros(1, 2, 3, 8, 8)
    rgb = torch.zeros(1, 3, 3, 8, 8)
    green = dict(background="green")
    wrong = [
        (flow.flow_to_rgb, d, green), (flow.flow_to_rgb, d, dict(sigma=0)),
        (flow.flow_to_rgb, rgb, {}), (flow.rgb_to_flow, rgb, green),
        (flow.rgb_to_flow, d, {}), (flow.rgb_to_flow, rgb.byte(), {})]
    for function, picture, options in wrong:
        with pytest.raises(ValueError, match="found .* expected") as error:
            function(picture, **options)
        assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------
# RAFT


@pytest.mark.parametrize("record", RECORDS)
@torch.no_grad()
def test_raft_is_torchvisions(record):
    """Same weights, same frames, same flow. Reference: torchvision 0.28.0, recorded.
    Tolerance: 1e-4 px of flow up to 18 px, as rounding gave 2e-5; wrong details (the order of the
    neighbours, say) gave over 1."""
    size, N, H, W, iters = record["case"]
    raft = record_raft.fill_(flow.RAFT(size))
    found = raft(*record_raft.frames(N, H, W), iters=iters)
    assert found.shape == (N, 2, H, W)
    values = found.flatten()[record_raft.places(N, H, W)]
    torch.testing.assert_close(values, torch.tensor(record["values"]), atol=1e-4, rtol=0)
    assert found.abs().mean().item() == pytest.approx(record["mean_size"], abs=1e-4)


@pytest.mark.parametrize("record", RECORDS)
def test_raft_has_torchvisions_parameters(record):
    """So its files load. Reference: the checksum over the names and shapes of torchvision's own
    module, and the published numbers of parameters."""
    size = record["case"][0]
    found = record_raft.fingerprint(flow.RAFT(size))
    assert found == record["fingerprint"] and found[0] == dict(large=5257536, small=990162)[size]


def test_raft_refuses():
    """One line each: an unknown size, frames of two shapes, no batch, sides under 121 px."""
    with pytest.raises(ValueError, match="found RAFT size 'medium', expected 'large' or 'small'"):
        flow.RAFT("medium")
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
    """A folder with small.pth and large.pth, filled by formula."""
    folder = tmp_path_factory.mktemp("raft")
    for size in ("small", "large"):
        torch.save(record_raft.fill_(flow.RAFT(size)).state_dict(), folder / f"{size}.pth")
    return folder


@pytest.mark.parametrize("size", ["small", "large"])
def test_load_raft_takes_a_path(files, size):
    """With its size or with None, the file's tensors arrive. Reference: the formula."""
    for asked in (size, None):
        raft = flow.load_raft(asked, str(files / f"{size}.pth"))
        assert not raft.training and not any(p.requires_grad for p in raft.parameters())
        expected = record_raft.fill_(flow.RAFT(size)).state_dict()
        assert all(torch.equal(w, expected[name]) for name, w in raft.state_dict().items())


def test_load_raft_refuses_damaged_files(files, tmp_path):
    """One line each. torch.load alone would take the flipped bit in the middle of a weight."""
    content = (files / "small.pth").read_bytes()
    flipped = bytearray(content)
    flipped[700000] ^= 64
    bad = dict(cut=content[:500000], flipped=flipped, empty=b"", text=b"not weights")
    for name, damaged in bad.items():
        (tmp_path / name).write_bytes(damaged)
    torch.save(dict(step=3), tmp_path / "numbers")
    torch.save([torch.zeros(3)], tmp_path / "list")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match="found .* expected .* get the file again") as error:
            flow.load_raft(None, str(path))
        assert "\n" not in str(error.value)


def test_load_raft_refuses_other_files(files, tmp_path):
    """One line each: a RAFT without one tensor, no RAFT, the other size, an unknown size, none."""
    state = torch.load(files / "small.pth", weights_only=True)
    state.pop("feature_encoder.conv.bias")
    torch.save(state, tmp_path / "partial")
    torch.save(dict(weight=torch.zeros(3)), tmp_path / "other")
    cases = [
        (None, tmp_path / "partial", "found 105 tensors.* or get https://.*raft_large"),
        ("small", tmp_path / "other", "found 1 tensors.* or get https://.*raft_small"),
        ("large", files / "small.pth", "most like RAFT-small, expected .*RAFT-large: ask"),
        ("small", files / "large.pth", "most like RAFT-large, expected .*RAFT-small: ask"),
        ("huge", files / "small.pth", "found RAFT size 'huge', expected 'large' or 'small'"),
    ]
    for size, path, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            flow.load_raft(size, str(path))
        assert "\n" not in str(error.value)
    for path in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="flow.weights"):
            flow.load_raft("small", str(path))


def test_load_raft_without_a_path(files, monkeypatch):
    """The published file is fetched, its hash checked; without a network the error says what to do.
    A stand-in takes the place of torch.hub's function."""
    asked = []

    def fetch(url, **options):
        asked.append(url.rsplit("/", 1)[-1])
        assert options["check_hash"] and options["weights_only"]
        return torch.load(files / ("small.pth" if "small" in url else "large.pth"))

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    for size in ("small", "large", None):
        flow.load_raft(size)
    large = "raft_large_C_T_SKHT_V2-ff5fadd5.pth"
    assert asked == ["raft_small_C_T_V2-01064c6d.pth", large, large]

    def offline(url, **options):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match="https://.*/raft_large.*flow.weights"):
        flow.load_raft()


# -------------------------------------------------------------------------------------------------
# Whole videos


class FakeRAFT:
    """Answers (8, 4) px plus n + 100 k where frame 1 is n everywhere and frame 2 is k."""

    def __init__(self):
        self.asked = []         # shapes

    def __call__(self, frame1, frame2, iters=12):
        assert frame1.shape == frame2.shape and not torch.is_grad_enabled()
        self.asked.append(tuple(frame1.shape))
        content = (frame1[:, :1] + 100 * frame2[:, :1]).mean((1, 2, 3), keepdim=True)
        flow = frame1.new_tensor([8, 4]).view(1, 2, 1, 1) + content
        return flow.expand(-1, 2, *frame1.shape[-2:])


@pytest.mark.parametrize("pairs, calls", [(1, [1] * 6), (3, [3, 3]), (12, [6])])
def test_estimate_flow_pairs_frames_within_a_video(pairs, calls):
    """Sec. 4.1 and choice 2: frame n goes with n + 1 of the same video, the last flow is repeated.
    Reference: the fake's answer for frames that are numbered through two videos of four."""
    raft = FakeRAFT()
    video = torch.arange(8.0).view(2, 1, 4, 1, 1).expand(2, 3, 4, 128, 136)
    d = flow.estimate_flow(video, raft, pairs=pairs)
    assert d.shape == (2, 2, 4, 128, 136)
    first = torch.tensor([[0, 1, 2, 2], [4, 5, 6, 6]]).float()
    content = first + 100 * (first + 1)
    expected = torch.stack([8 + content, 4 + content], dim=1)[..., None, None]
    torch.testing.assert_close(d, expected.expand_as(d), atol=1e-3, rtol=0)
    assert [shape[0] for shape in raft.asked] == calls


@pytest.mark.parametrize("H, W, asked, u, v", [
    (64, 32, (128, 128), 8 / 4, 4 / 2), (32, 200, (128, 200), 8, 4 / 4),
    (127, 128, (128, 128), 8, 4 * 127 / 128), (130, 141, (130, 141), 8, 4)])
def test_small_frames_are_enlarged_per_axis(H, W, asked, u, v):
    """A side under 128 px becomes 128 for RAFT, and its component of the flow shrinks again.
    Reference: the fake's (8, 4) px times (W / wide, H / tall) by hand."""
    raft = FakeRAFT()
    d = flow.estimate_flow(torch.zeros(1, 3, 2, H, W), raft)
    assert raft.asked == [(1, 3, *asked)] and d.shape == (1, 2, 2, H, W)
    expected = torch.tensor([u, v]).float().view(1, 2, 1, 1, 1)
    torch.testing.assert_close(d, expected.expand_as(d), atol=1e-5, rtol=1e-6)


def test_one_frame_does_not_move():
    """Choice 2: zeros when T = 1, and RAFT is not asked."""
    raft = FakeRAFT()
    d = flow.estimate_flow(torch.ones(2, 3, 1, 20, 30), raft)
    assert torch.equal(d, torch.zeros(2, 2, 1, 20, 30)) and not raft.asked


def test_estimate_flow_with_the_real_net():
    """Reference: the net called pair by pair; tolerance as above. A video of 32 px, whose lowest
    level would be 0 / 0, gives finite numbers."""
    raft = record_raft.fill_(flow.RAFT("small")).requires_grad_(False)
    frames = torch.cat(record_raft.frames(2, 128, 136))
    video = torch.stack([frames, frames.flip(0)]).transpose(1, 2)       # (2, 3, 4, 128, 136)
    d = flow.estimate_flow(video[:, :, :3], raft, iters=2, pairs=3)
    for b, t in [(0, 0), (0, 1), (1, 1)]:
        alone = raft(video[b:b + 1, :, t], video[b:b + 1, :, t + 1], iters=2)[0]
        torch.testing.assert_close(d[b, :, t], alone, atol=1e-4, rtol=0)
    tiny = flow.estimate_flow(video[:1, :, :2, :32, :32], raft, iters=2)
    assert tiny.isfinite().all() and tiny.abs().max() > 0.01


def test_estimate_flow_refuses():
    """One line each: a video without its batch, with two channels, of integers."""
    video = torch.zeros(1, 3, 2, 16, 16)
    for bad in (video[0], video[:, :2], video.byte()):
        with pytest.raises(ValueError, match="found a video .* expected float"):
            flow.estimate_flow(bad, FakeRAFT())
