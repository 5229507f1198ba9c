"""Optical flow: how far every pixel moves to the next frame. VideoJAM's second signal (section 4.1).

RAFT (Teed & Deng, 2020) estimates it from two frames, Eq. 5 paints it as an RGB picture, so that the same TAE can
encode it, and the inverse reads it back. To try it (and `python tests/raft_shift.py raft_small.pth`):

    raft = flow.load_raft("small", "raft_small.pth")               # without a path the published file is downloaded
    rgb = flow.flow_to_rgb(flow.estimate_flow(video, raft))        # what VideoJAM learns beside the video

Letters: B videos, T frames, H x W pixels; d = (u, v) optical flow in pixels per frame, u to the right, v down;
m, alpha its normalised length and its angle; rgb and frames in [-1, 1].
Inside RAFT: N pairs of frames, h x w = H/8 x W/8 cells, C channels, r radius of the look-up, K = 2r + 1.
"""
import math
import os
import zipfile
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- Eq. 5: optical flow as colour ----------------------------------------------------------------------------------
def checked_picture(picture, channels, sigma, background):
    """Refuses what Eq. 5 cannot read; half precision is lifted to float32, because the hue needs the digits."""
    if picture.ndim < 4 or picture.shape[-4] != channels or not picture.is_floating_point():
        raise ValueError(f"found {tuple(picture.shape)} {picture.dtype}, expected float (B, {channels}, T, H, W)")
    if background not in ("white", "black") or not sigma > 0:
        raise ValueError(f"found background={background!r}, sigma={sigma}, expected 'white' or 'black', sigma above 0")
    return picture.to(torch.promote_types(picture.dtype, torch.float32))


def full_speed(picture, sigma):
    """The speed in px per frame at which m reaches 1: sigma times the picture's diagonal (Eq. 5)."""
    return sigma * math.hypot(*picture.shape[-2:])


# Eq. 5. The paper's "opacity" is read as that of a white veil over the pure colour: HSV with hue alpha / 2 pi,
# saturation m, value 1. No motion is white, right is red, then clockwise on the screen: down yellow-green, left cyan.
def flow_to_rgb(flow, sigma=0.15, background="white"):
    """Paints optical flow (B, 2, T, H, W) in px as rgb (B, 3, T, H, W) in [-1, 1]: Eq. 5, sigma = 0.15 is the paper's.
    m = min(1, |d| / (sigma sqrt(H² + W²))) is the saturation on white; on "black" it is the value, saturation 1.
    ValueError for another shape, an integer type, a sigma that is not positive or an unknown background."""
    flow = checked_picture(flow, 2, sigma, background)
    u, v = flow.split(1, dim=-4)                                      # (B, 1, T, H, W) each
    m = (torch.hypot(u, v) / full_speed(flow, sigma)).clamp(max=1)    # (B, 1, T, H, W)
    alpha = torch.atan2(v, u)                                         # (B, 1, T, H, W) -pi..pi
    # HSV's pure hue: red, green and blue sit at 0, 2, 4 sixths of the circle; full up to 1 from there, gone from 2 on.
    place = flow.new_tensor([0, 2, 4]).view(3, 1, 1, 1)
    distance = ((alpha * 3 / math.pi - place + 3) % 6 - 3).abs()      # (B, 3, T, H, W) in sixths, 0..3
    hue = (2 - distance).clamp(0, 1)                                  # (B, 3, T, H, W)
    rgb = 1 - m * (1 - hue) if background == "white" else m * hue     # (B, 3, T, H, W) 0..1
    return 2 * rgb - 1


# Eq. 5 backwards. On either background the largest minus the smallest channel is m, so a grey cast cancels out.
def rgb_to_flow(rgb, sigma=0.15, background="white"):
    """Reads optical flow (B, 2, T, H, W) in px back from rgb (B, 3, T, H, W); values outside [-1, 1] are clamped.
    Inverse of flow_to_rgb up to float rounding for m < 1; where m = 1 the direction holds, the length is a lower bound.
    ValueError as in flow_to_rgb. Eq. 5 backwards, which the paper does not need: it only looks at its flow pictures."""
    rgb = (checked_picture(rgb, 3, sigma, background).clamp(-1, 1) + 1) / 2
    r, g, b = rgb.split(1, dim=-4)                                    # (B, 1, T, H, W) each
    high = rgb.amax(-4, keepdim=True)                                 # (B, 1, T, H, W)
    m = high - rgb.amin(-4, keepdim=True)                             # (B, 1, T, H, W)
    c = m.clamp(min=1e-12)                                            # grey has no hue; with m = 0 any will do
    sixths = torch.where(high == r, (g - b) / c, torch.where(high == g, 2 + (b - r) / c, 4 + (r - g) / c))
    alpha = sixths * math.pi / 3                                      # (B, 1, T, H, W)
    return full_speed(rgb, sigma) * m * torch.cat([alpha.cos(), alpha.sin()], dim=-4)


# ---- RAFT: compare every cell of one frame with every cell of the other, then walk to the match in small steps -------
# Section numbers are the RAFT paper's (arXiv 2003.12039). The attributes carry torchvision's names (hence such words as
# `convnormrelu1`), so that its published weights load unchanged.

RAFT_SIZES = dict(
    large=dict(widths=(64, 64, 96, 128), bottleneck=False, context_norm=nn.BatchNorm2d, features=256, hidden=128,
               context=128, radius=4, corr=(256, 192), flow=(128, 64), motion=128, kernels=((1, 5), (5, 1)), head=256),
    small=dict(widths=(32, 32, 64, 96), bottleneck=True, context_norm=None, features=128, hidden=96,
               context=64, radius=3, corr=(96,), flow=(64, 32), motion=82, kernels=((3, 3),), head=128))
LEVELS = 4                  # of the correlation pyramid (sec. 3.2)
MIN_SIDE = 8 * 2**LEVELS    # px; below, the last level is one cell wide, and a position inside it is 0 / 0


def conv(inputs, outputs, kernel=3, stride=1, norm=None, relu=True):
    """Convolution that keeps the size (up to the stride), then a norm and a ReLU where asked for."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2),
                         *([norm(outputs)] if norm else []), *([nn.ReLU(inplace=True)] if relu else []))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions (large), or 1x1, 3x3, 1x1 through a quarter of the channels (small), plus the input."""

    def __init__(self, inputs, outputs, stride, norm, bottleneck):
        super().__init__()
        width = outputs // 4 if bottleneck else outputs
        self.convnormrelu1 = conv(inputs, width, 1, 1, norm) if bottleneck else conv(inputs, width, 3, stride, norm)
        self.convnormrelu2 = conv(width, width, 3, stride if bottleneck else 1, norm)
        self.convnormrelu3 = conv(width, outputs, 1, 1, norm) if bottleneck else nn.Identity()
        self.downsample = conv(inputs, outputs, 1, stride, norm, relu=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        return (self.downsample(x) + self.convnormrelu3(self.convnormrelu2(self.convnormrelu1(x)))).relu_()


# sec. 3.1: a frame (N, 3, H, W) becomes features (N, outputs, H/8, W/8)
def encoder(widths, outputs, norm, bottleneck):
    pair = lambda inputs, width, stride: nn.Sequential(ResidualBlock(inputs, width, stride, norm, bottleneck),
                                                       ResidualBlock(width, width, 1, norm, bottleneck))
    a, b, c, d = widths
    return nn.Sequential(OrderedDict(convnormrelu=conv(3, a, 7, 2, norm), layer1=pair(a, b, 1), layer2=pair(b, c, 2),
                                     layer3=pair(c, d, 2), conv=nn.Conv2d(d, outputs, 1)))


# sec. 3.2: all pairs of cells, then coarser and coarser on the side of the second frame
def correlation_pyramid(features1, features2):
    """(N, C, h, w) twice -> LEVELS volumes (N h w, 1, h/2^l, w/2^l): one map of similarities per cell of frame 1."""
    N, C, h, w = features1.shape
    volume = features1.flatten(2).transpose(1, 2) @ features2.flatten(2) / math.sqrt(C)      # (N, h w, h w)
    pyramid = [volume.view(N * h * w, 1, h, w)]
    for _ in range(LEVELS - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    return pyramid


# sec. 3.2: what lies within r cells of where each cell is believed to have gone, at every level
def look_up(pyramid, target, radius):
    """target (N, 2, h, w), positions (x, y) in frame 2 -> similarities around them (N, LEVELS K², h, w)."""
    N, _, h, w = target.shape
    K = 2 * radius + 1
    step = torch.arange(-radius, radius + 1, device=target.device, dtype=target.dtype)
    x, y = target.transpose(0, 1).reshape(2, N * h * w, 1)
    found = []
    for level, volume in enumerate(pyramid):
        high, wide = volume.shape[-2:]
        xs = (x / 2**level + step) * (2 / (wide - 1)) - 1                        # (N h w, K) -1..1 inside
        ys = (y / 2**level + step) * (2 / (high - 1)) - 1                        # (N h w, K)
        # The weights expect the neighbours column by column: x is the slow index.
        grid = torch.stack([xs[:, :, None].expand(-1, K, K), ys[:, None].expand(-1, K, K)], -1)
        found.append(F.grid_sample(volume, grid, align_corners=True).view(N, h, w, K * K))
    return torch.cat(found, -1).permute(0, 3, 1, 2)                              # (N, LEVELS K², h, w)


class ConvGRU(nn.Module):
    """sec. 3.3: a gated recurrent unit whose matrices are convolutions."""

    def __init__(self, hidden, inputs, kernel):
        super().__init__()
        gate = lambda: nn.Conv2d(hidden + inputs, hidden, kernel, padding=(kernel[0] // 2, kernel[1] // 2))
        self.convz, self.convr, self.convq = gate(), gate(), gate()

    def forward(self, hidden, x):
        both = torch.cat([hidden, x], 1)
        z, r = self.convz(both).sigmoid(), self.convr(both).sigmoid()
        q = self.convq(torch.cat([r * hidden, x], 1)).tanh()
        return (1 - z) * hidden + z * q


class UpdateBlock(nn.Module):
    """sec. 3.3: one step of the walk. Large has two recurrent units, one along the rows and one along the columns."""

    def __init__(self, similarities, corr, flow, motion, hidden, context, kernels, head):
        super().__init__()
        self.motion_encoder = nn.ModuleDict(dict(
            convcorr1=conv(similarities, corr[0], 1), convcorr2=conv(*corr) if len(corr) == 2 else nn.Identity(),
            convflow1=conv(2, flow[0], 7), convflow2=conv(*flow), conv=conv(corr[-1] + flow[-1], motion - 2)))
        grus = [ConvGRU(hidden, context + motion, kernel) for kernel in kernels]
        self.recurrent_block = nn.ModuleDict({f"convgru{i}": gru for i, gru in enumerate(grus, 1)})
        self.flow_head = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(hidden, head, 3, padding=1), relu=nn.ReLU(), conv2=nn.Conv2d(head, 2, 3, padding=1)))

    def forward(self, hidden, context, similar, flow):
        e = self.motion_encoder
        seen = torch.cat([e.convcorr2(e.convcorr1(similar)), e.convflow2(e.convflow1(flow))], 1)   # (N, C, h, w)
        x = torch.cat([context, e.conv(seen), flow], 1)                          # (N, C, h, w)
        for gru in self.recurrent_block.values():
            hidden = gru(hidden, x)                                              # (N, C, h, w)
        return hidden, self.flow_head(hidden)                                    # (N, C, h, w), (N, 2, h, w)


# sec. 3.3 and appendix B: each of the 8 x 8 fine pixels is its own weighted mean of the 3 x 3 coarse ones around it
def convex_upsample(flow, mask):
    """flow (N, 2, h, w) in cells, mask (N, 9 * 8 * 8, h, w) -> flow (N, 2, 8 h, 8 w) in px; keeps edges sharp."""
    N, _, h, w = flow.shape
    weights = mask.view(N, 9, 8, 8, h, w).softmax(1)                             # i, j: the place inside a cell
    around = F.unfold(8 * flow, 3, padding=1).view(N, 2, 9, h, w)
    return torch.einsum("nkijhw,nckhw->nchiwj", weights, around).reshape(N, 2, 8 * h, 8 * w)


class RAFT(nn.Module):
    """RAFT of size "large" (5,257,536 parameters) or "small" (990,162); VideoJAM takes its optical flow from it.
    raft(frame1, frame2, iters=12): (N, 3, H, W) in [-1, 1] twice -> flow (N, 2, H, W) in px from frame 1 to frame 2.
    ValueError for an unknown size, frames of different shapes, or a side under 121 px (estimate_flow takes any)."""

    def __init__(self, size="large"):
        super().__init__()
        if size not in RAFT_SIZES:
            raise ValueError(f"found RAFT size {size!r}, expected 'large' or 'small'")
        s = RAFT_SIZES[size]
        self.hidden, self.context, self.radius = s["hidden"], s["context"], s["radius"]
        self.feature_encoder = encoder(s["widths"], s["features"], nn.InstanceNorm2d, s["bottleneck"])
        self.context_encoder = encoder(s["widths"], s["hidden"] + s["context"], s["context_norm"], s["bottleneck"])
        self.update_block = UpdateBlock(LEVELS * (2 * s["radius"] + 1)**2, s["corr"], s["flow"], s["motion"],
                                        s["hidden"], s["context"], s["kernels"], s["head"])
        mask = nn.Sequential(OrderedDict(convrelu=conv(s["hidden"], 256), conv=nn.Conv2d(256, 9 * 8 * 8, 1)))
        self.mask_predictor = mask if size == "large" else None

    def forward(self, frame1, frame2, iters=12):
        H, W = frame1.shape[-2:]
        if frame1.ndim != 4 or frame1.shape != frame2.shape or min(H, W) + 7 < MIN_SIDE:
            raise ValueError(f"found frames {tuple(frame1.shape)} and {tuple(frame2.shape)}, expected the same shape "
                             f"(N, 3, H, W) with sides of {MIN_SIDE} px or more (estimate_flow enlarges smaller ones)")
        frames = torch.cat([frame1, frame2])                                     # (2N, 3, H, W)
        if H % 8 or W % 8:
            frames = F.pad(frames, (0, -W % 8, 0, -H % 8), mode="replicate")     # (2N, 3, 8h, 8w)
        pyramid = correlation_pyramid(*self.feature_encoder(frames).chunk(2))    # LEVELS of (N h w, 1, h/2^l, w/2^l)
        hidden, context = self.context_encoder(frames.chunk(2)[0]).split([self.hidden, self.context], dim=1)
        hidden, context = hidden.tanh(), context.relu()                          # the memory's start; what stays
        rows, columns = (torch.arange(n, device=hidden.device) for n in hidden.shape[-2:])
        home = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))         # (2, h, w) each cell's own (x, y)
        flow = torch.zeros_like(hidden[:, :2])                                   # (N, 2, h, w) in cells of 8 px
        for _ in range(iters):
            similar = look_up(pyramid, home + flow, self.radius)                 # (N, LEVELS K², h, w)
            hidden, step = self.update_block(hidden, context, similar, flow)     # (N, C, h, w), (N, 2, h, w)
            flow = flow + step                                                   # (N, 2, h, w)
        if self.mask_predictor is None:
            flow = 8 * F.interpolate(flow, scale_factor=8, mode="bilinear", align_corners=True)   # (N, 2, 8h, 8w)
        else:
            mask = 0.25 * self.mask_predictor(hidden)                            # (N, 9 * 64, h, w); trained with 0.25
            flow = convex_upsample(flow, mask)                                   # (N, 2, 8h, 8w)
        return flow[..., :H, :W]                                                 # (N, 2, H, W)


# ---- Weights --------------------------------------------------------------------------------------------------------
PUBLISHED = dict(large="https://download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth",   # the end of a name
                 small="https://download.pytorch.org/models/raft_small_C_T_V2-01064c6d.pth")        # is the file's hash


def load_raft(size="large", weights=None):
    """RAFT in eval mode without gradients. weights: the path of a file with torchvision's names (size=None: whichever
    size it holds); None downloads torchvision's own, hash checked (size=None: large). VideoJAM's estimator (app. C).
    FileNotFoundError: no such file, or no network. ValueError: a damaged file, or one that is not RAFT of that size."""
    with torch.device("meta"):          # shapes only, no memory; RAFT itself refuses an unknown size
        nets = {s: RAFT(s).state_dict() for s in (size or "large", *RAFT_SIZES)}
    url = PUBLISHED[size or "large"]
    state = read_weights(weights) if weights else fetch_weights(url)
    shapes = lambda tensors: {name: value.shape for name, value in tensors.items()}
    found = next((s for s in nets if shapes(nets[s]) == shapes(state)), None)
    if found is None or size not in (None, found):
        advice = f"looks like RAFT-{found}: ask for size={found!r}" if found else f"is no RAFT: get {url}"
        raise ValueError(f"{weights or url}: found {len(state)} tensors, {list(state)[:1]} ..., expected the names "
                         f"and shapes of torchvision's RAFT-{size or 'large or -small'}: this file {advice}")
    raft = RAFT(found)
    raft.load_state_dict(state, strict=True)
    return raft.eval().requires_grad_(False)


def read_weights(path):
    """A file of weights -> {name: tensor}. The checksums beside the tensors catch what would load as a wrong weight."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file of RAFT weights at {str(path)!r}: set another path (config key flow.weights)")
    try:
        damage = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()    # torch.load ignores the checksums
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:          # damaged bytes raise a dozen different types
        damage, state = type(error).__name__, None
    if damage or not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: found {damage or type(state).__name__}, expected an undamaged file that torch.save "
                         f"wrote, with torchvision's RAFT names: get the file again")
    return state


def fetch_weights(url):
    """torchvision's published weights {name: tensor}, through torch.hub's cache."""
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:          # no network, a proxy's answer, a wrong hash, a broken file in the cache
        raise FileNotFoundError(f"cannot fetch {url} ({type(error).__name__}: {error}): download it where there is a "
                                f"network and pass its path (config key flow.weights)") from error


# ---- Whole videos: VideoJAM's motion signal for real clips (sec. 4.1, app. C) ---------------------------------------
@torch.no_grad()
def estimate_flow(video, raft, iters=12, pairs=12):
    """Video (B, 3, T, H, W) in [-1, 1] -> optical flow (B, 2, T, H, W) in px from each frame to the next. Sec. 4.1.
    The last frame repeats the flow before it (zeros when T = 1); pairs = frame pairs per call of RAFT, for memory only.
    Sides under 128 px are enlarged for RAFT, the flow divided, per axis. ValueError: another shape, or pairs < 1."""
    if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point() or pairs < 1:
        raise ValueError(f"found a video {tuple(video.shape)} {video.dtype} and pairs={pairs}, "
                         f"expected float (B, 3, T, H, W) and pairs of 1 or more")
    B, _, T, H, W = video.shape
    if T < 2:
        return video.new_zeros(B, 2, T, H, W)
    tall, wide = max(H, MIN_SIDE), max(W, MIN_SIDE)
    resize = lambda x, *size: x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear")
    shrink = video.new_tensor([W / wide, H / tall]).view(2, 1, 1)                # u lies along the width, v the height
    frames = video.transpose(1, 2)                                               # (B, T, 3, H, W)
    now, after = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)       # (B (T-1), 3, H, W) each
    flow = torch.cat([resize(raft(resize(a, tall, wide), resize(b, tall, wide), iters=iters), H, W) * shrink
                      for a, b in zip(now.split(pairs), after.split(pairs))])    # (B (T-1), 2, H, W)
    flow = flow.view(B, T - 1, 2, H, W).transpose(1, 2)                          # (B, 2, T-1, H, W)
    return torch.cat([flow, flow[:, :, -1:]], dim=2)                             # (B, 2, T, H, W)
