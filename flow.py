"""Optical flow: how far every pixel moves to the next frame. VideoJAM's second signal (sec. 4.1).

Eq. 5 paints the optical flow as an RGB video, so that the autoencoder of the frames can encode it
too. RAFT (Teed & Deng, 2020, arXiv 2003.12039) estimates the flow of real videos.

    raft = flow.load_raft("small", "raft_small.pth")    # without a path it is downloaded
    d = flow.estimate_flow(video, raft)
    picture = flow.flow_to_rgb(d)                       # what VideoJAM learns beside the video

Letters: B videos, T frames of H x W pixels. d = (u, v) is optical flow in pixels per frame, u to
the right, v down; m is its length from 0 to 1, alpha its angle. Pictures are in [-1, 1].
Inside RAFT: N pairs of frames, C channels, h x w cells of 8 x 8 pixels, K x K cells looked at.
"""
import math
import os
import zipfile
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

# -------------------------------------------------------------------------------------------------
# Eq. 5: optical flow as colour


def full_speed(picture, sigma):
    """The speed in pixels per frame at which m reaches 1: sigma times the picture's diagonal."""
    height, width = picture.shape[-2:]
    return sigma * math.hypot(height, width)


# Eq. 5. In the paper a larger m means less opacity. We read that as the opacity of a white veil
# over the colour: no motion is white. In HSV: hue alpha / 2 pi, saturation m, value 1.
def flow_to_rgb(flow, sigma=0.15, background="white"):
    """Optical flow (B, 2, T, H, W) in pixels per frame -> picture (B, 3, T, H, W) in [-1, 1].
    Right is red, down yellow-green, left cyan, up violet. On black, m is the value instead.
    ValueError: another shape, an integer type, sigma not above 0, an unknown background."""
    flow = checked(flow, 2, sigma, background)
    u, v = flow.split(1, dim=-4)                                        # (B, 1, T, H, W) each
    m = (torch.hypot(u, v) / full_speed(flow, sigma)).clamp(max=1)      # (B, 1, T, H, W)
    alpha = torch.atan2(v, u)                                           # (B, 1, T, H, W)

    # On the circle of hues, red, green and blue sit at 0, 2 and 4 sixths. A channel is full up to
    # one sixth away from its place and gone from two sixths on.
    place = flow.new_tensor([0, 2, 4]).view(3, 1, 1, 1)
    sixths = alpha * 3 / math.pi
    distance = ((sixths - place + 3) % 6 - 3).abs()                     # (B, 3, T, H, W) 0 to 3
    colour = (2 - distance).clamp(0, 1)                                 # (B, 3, T, H, W)
    if background == "white":
        rgb = 1 - m * (1 - colour)
    else:
        rgb = m * colour
    return 2 * rgb - 1


# Eq. 5 backwards. The paper only looks at its pictures of motion; our metrics read them.
def rgb_to_flow(rgb, sigma=0.15, background="white"):
    """Picture (B, 3, T, H, W) -> optical flow (B, 2, T, H, W) in pixels per frame.
    Exact for m < 1. Where m = 1, the direction is right and the length is a lower bound."""
    rgb = checked(rgb, 3, sigma, background)
    rgb = (rgb.clamp(-1, 1) + 1) / 2
    r, g, b = rgb.split(1, dim=-4)                                      # (B, 1, T, H, W) each
    largest = rgb.amax(dim=-4, keepdim=True)
    # The difference is m on both backgrounds, and adding grey does not change it.
    m = largest - rgb.amin(dim=-4, keepdim=True)                        # (B, 1, T, H, W)
    safe = m.clamp(min=1e-12)                                           # grey has no hue

    # The largest channel says in which third of the circle the hue lies.
    sixths = 4 + (r - g) / safe
    sixths = torch.where(largest == g, 2 + (b - r) / safe, sixths)
    sixths = torch.where(largest == r, (g - b) / safe, sixths)
    alpha = sixths * math.pi / 3
    direction = torch.cat([alpha.cos(), alpha.sin()], dim=-4)           # (B, 2, T, H, W)
    return full_speed(rgb, sigma) * m * direction


def checked(picture, channels, sigma, background):
    """Refuse what Eq. 5 cannot read -> the picture in float32 at least: hues need the digits."""
    shape = tuple(picture.shape)
    if len(shape) < 4 or shape[-4] != channels or not picture.is_floating_point():
        raise ValueError(
            f"found a picture {shape} {picture.dtype}, expected float (B, {channels}, T, H, W)")
    if background not in ("white", "black") or not sigma > 0:
        raise ValueError(
            f"found {background=} and {sigma=}, expected 'white' or 'black', and sigma above 0")
    return picture.to(torch.promote_types(picture.dtype, torch.float32))


# -------------------------------------------------------------------------------------------------
# RAFT compares every cell of one frame with every cell of the next, then walks to the match in
# small steps. The attributes have torchvision's names, so that its published weights load.

LEVELS = 4                      # of the correlation pyramid
MIN_SIDE = 8 * 2 ** LEVELS      # px; below, the last level is one cell wide, and its grid is 0 / 0

SIZES = {
    "large": dict(
        widths=(64, 64, 96, 128), bottleneck=False, context_norm=nn.BatchNorm2d, features=256,
        hidden=128, context=128, radius=4, corr=(256, 192), flow=(128, 64), motion=128,
        kernels=((1, 5), (5, 1)), head=256),
    "small": dict(
        widths=(32, 32, 64, 96), bottleneck=True, context_norm=None, features=128,
        hidden=96, context=64, radius=3, corr=(96,), flow=(64, 32), motion=82,
        kernels=((3, 3),), head=128)
}


def conv(inputs, outputs, kernel=3, stride=1, norm=None, relu=True):
    """A convolution that keeps the size (up to its stride), then a norm and a ReLU if wanted."""
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)]
    if norm:
        layers.append(norm(outputs))
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 through a quarter of the channels; plus the input."""

    def __init__(self, inputs, outputs, stride, norm, bottleneck):
        super().__init__()
        if bottleneck:
            quarter = outputs // 4
            self.convnormrelu1 = conv(inputs, quarter, 1, 1, norm)
            self.convnormrelu2 = conv(quarter, quarter, 3, stride, norm)
            self.convnormrelu3 = conv(quarter, outputs, 1, 1, norm)
        else:
            self.convnormrelu1 = conv(inputs, outputs, 3, stride, norm)
            self.convnormrelu2 = conv(outputs, outputs, 3, 1, norm)
            self.convnormrelu3 = nn.Identity()
        shortcut = conv(inputs, outputs, 1, stride, norm, relu=False)
        self.downsample = shortcut if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.convnormrelu3(self.convnormrelu2(self.convnormrelu1(x)))
        return F.relu(self.downsample(x) + y)


# RAFT sec. 3.1: a frame (N, 3, H, W) becomes features (N, outputs, h, w)
def encoder(widths, outputs, norm, bottleneck):
    def pair(inputs, width, stride):
        first = ResidualBlock(inputs, width, stride, norm, bottleneck)
        second = ResidualBlock(width, width, 1, norm, bottleneck)
        return nn.Sequential(first, second)

    a, b, c, d = widths
    net = nn.Sequential()       # runs its parts in the order in which they are added
    net.convnormrelu = conv(3, a, 7, 2, norm)
    net.layer1 = pair(a, b, 1)
    net.layer2 = pair(b, c, 2)
    net.layer3 = pair(c, d, 2)
    net.conv = nn.Conv2d(d, outputs, 1)
    return net


# RAFT sec. 3.2
def correlation_pyramid(features1, features2):
    """Features (N, C, h, w) of two frames -> LEVELS volumes (N h w, 1, h/2^l, w/2^l).
    Each cell of frame 1 has a map of its similarity to all cells of frame 2, finest first."""
    N, C, h, w = features1.shape
    volume = features1.flatten(2).transpose(1, 2) @ features2.flatten(2)    # (N, h w, h w)
    volume = volume / math.sqrt(C)
    pyramid = [volume.view(N * h * w, 1, h, w)]
    for _ in range(LEVELS - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    return pyramid


# RAFT sec. 3.2
def look_up(pyramid, target, radius):
    """Similarities (N, LEVELS K², h, w) within `radius` cells of where each cell went, by level.
    target (N, 2, h, w): the position (x, y) in frame 2 where each cell is believed to be."""
    N, _, h, w = target.shape
    K = 2 * radius + 1
    offsets = torch.arange(-radius, radius + 1, device=target.device)
    x, y = target.transpose(0, 1).reshape(2, N * h * w, 1)
    found = []
    for level, volume in enumerate(pyramid):
        height, width = volume.shape[-2:]
        xs = (x / 2 ** level + offsets) * (2 / (width - 1)) - 1         # (N h w, K), -1 to 1 inside
        ys = (y / 2 ** level + offsets) * (2 / (height - 1)) - 1        # (N h w, K)
        # The published weights expect the neighbours column by column: x is the slow index.
        places = torch.broadcast_tensors(xs[:, :, None], ys[:, None])
        grid = torch.stack(places, dim=-1)                              # (N h w, K, K, 2)
        similar = F.grid_sample(volume, grid, align_corners=True)       # (N h w, 1, K, K)
        found.append(similar.view(N, h, w, K * K))
    return torch.cat(found, dim=-1).permute(0, 3, 1, 2)                 # (N, LEVELS K², h, w)


# RAFT sec. 3.3
class ConvGRU(nn.Module):
    """A gated recurrent unit whose matrices are convolutions."""

    def __init__(self, hidden, inputs, kernel):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.convz = nn.Conv2d(hidden + inputs, hidden, kernel, padding=padding)
        self.convr = nn.Conv2d(hidden + inputs, hidden, kernel, padding=padding)
        self.convq = nn.Conv2d(hidden + inputs, hidden, kernel, padding=padding)

    def forward(self, hidden, x):
        both = torch.cat([hidden, x], dim=1)
        z = torch.sigmoid(self.convz(both))
        r = torch.sigmoid(self.convr(both))
        q = torch.tanh(self.convq(torch.cat([r * hidden, x], dim=1)))
        return (1 - z) * hidden + z * q


# RAFT sec. 3.3
class UpdateBlock(nn.Module):
    """One step of the walk. RAFT-large has two GRUs: one along the rows, one along the columns."""

    def __init__(self, similarities, corr, flow, motion, hidden, context, kernels, head):
        super().__init__()
        encode = self.motion_encoder = nn.Module()
        encode.convcorr1 = conv(similarities, corr[0], 1)
        encode.convcorr2 = conv(*corr) if len(corr) == 2 else nn.Identity()
        encode.convflow1 = conv(2, flow[0], 7)
        encode.convflow2 = conv(flow[0], flow[1])
        encode.conv = conv(corr[-1] + flow[1], motion - 2)
        self.recurrent_block = nn.ModuleDict()
        for i, kernel in enumerate(kernels, 1):
            self.recurrent_block[f"convgru{i}"] = ConvGRU(hidden, context + motion, kernel)
        self.flow_head = nn.Sequential()
        self.flow_head.conv1 = nn.Conv2d(hidden, head, 3, padding=1)
        self.flow_head.relu = nn.ReLU()
        self.flow_head.conv2 = nn.Conv2d(head, 2, 3, padding=1)

    def forward(self, hidden, context, similar, flow):
        encode = self.motion_encoder
        similar = encode.convcorr2(encode.convcorr1(similar))           # (N, C, h, w)
        moved = encode.convflow2(encode.convflow1(flow))                # (N, C, h, w)
        motion = encode.conv(torch.cat([similar, moved], dim=1))        # (N, C, h, w)
        x = torch.cat([context, motion, flow], dim=1)                   # (N, C, h, w)
        for gru in self.recurrent_block.values():
            hidden = gru(hidden, x)
        return hidden, self.flow_head(hidden)                           # and a step (N, 2, h, w)


# RAFT sec. 3.3, appendix B. A weighted mean keeps edges sharp where interpolation would blur them.
def convex_upsample(flow, mask):
    """Flow (N, 2, h, w) in cells, mask (N, 9 * 8 * 8, h, w) -> flow (N, 2, H, W) in pixels.
    Each pixel's flow is its own weighted mean of the 3 x 3 cells around it."""
    N, _, h, w = flow.shape
    weights = mask.view(N, 9, 8, 8, h, w).softmax(dim=1)
    around = F.unfold(8 * flow, 3, padding=1).view(N, 2, 9, h, w)
    # k: neighbour, c: u or v, (i, j): the pixel's place inside its cell (h, w)
    fine = torch.einsum("nkijhw,nckhw->nchiwj", weights, around)        # (N, 2, h, 8, w, 8)
    return fine.reshape(N, 2, 8 * h, 8 * w)


class RAFT(nn.Module):
    """RAFT, "large" (5,257,536 parameters) or "small" (990,162).
    raft(frame1, frame2): (N, 3, H, W) in [-1, 1] twice -> flow (N, 2, H, W) in pixels from
    frame 1 to frame 2. ValueError for sides under 121 px; estimate_flow takes any size."""

    def __init__(self, size="large"):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"found RAFT size {size!r}, expected 'large' or 'small'")
        s = SimpleNamespace(**SIZES[size])
        self.radius = s.radius
        self.split = [s.hidden, s.context]
        self.feature_encoder = encoder(s.widths, s.features, nn.InstanceNorm2d, s.bottleneck)
        self.context_encoder = encoder(s.widths, sum(self.split), s.context_norm, s.bottleneck)
        similarities = LEVELS * (2 * s.radius + 1) ** 2
        self.update_block = UpdateBlock(
            similarities, s.corr, s.flow, s.motion, s.hidden, s.context, s.kernels, s.head)
        self.mask_predictor = None
        if size == "large":
            self.mask_predictor = nn.Sequential()
            self.mask_predictor.convrelu = conv(s.hidden, 256)
            self.mask_predictor.conv = nn.Conv2d(256, 9 * 8 * 8, 1)

    def forward(self, frame1, frame2, iters=12):
        H, W = frame1.shape[-2:]
        if frame1.ndim != 4 or frame1.shape != frame2.shape or min(H, W) + 7 < MIN_SIDE:
            raise ValueError(
                f"found frames {tuple(frame1.shape)} and {tuple(frame2.shape)}, expected the same "
                f"shape (N, 3, H, W), sides of {MIN_SIDE} px or more (estimate_flow takes any)")
        frames = torch.cat([frame1, frame2])                            # (2N, 3, H, W)
        frames = F.pad(frames, (0, -W % 8, 0, -H % 8), mode="replicate")    # (2N, 3, 8h, 8w)
        frame1 = frames.chunk(2)[0]
        features1, features2 = self.feature_encoder(frames).chunk(2)    # (N, C, h, w) each
        pyramid = correlation_pyramid(features1, features2)
        hidden, context = self.context_encoder(frame1).split(self.split, dim=1)
        hidden = hidden.tanh()                                          # changes in every step
        context = context.relu()                                        # stays

        h, w = hidden.shape[-2:]
        x = torch.arange(w, device=hidden.device)
        y = torch.arange(h, device=hidden.device)
        home = torch.stack(torch.meshgrid(x, y, indexing="xy"))         # (2, h, w) own places
        flow = torch.zeros_like(hidden[:, :2])                          # (N, 2, h, w) in cells
        for _ in range(iters):
            similar = look_up(pyramid, home + flow, self.radius)
            hidden, step = self.update_block(hidden, context, similar, flow)
            flow = flow + step

        if self.mask_predictor is None:
            flow = F.interpolate(8 * flow, scale_factor=8, mode="bilinear", align_corners=True)
        else:
            mask = 0.25 * self.mask_predictor(hidden)                   # trained with this 0.25
            flow = convex_upsample(flow, mask)
        return flow[..., :H, :W]                                        # (N, 2, H, W) in pixels


# -------------------------------------------------------------------------------------------------
# Weights

# The end of a name is the file's hash.
PUBLISHED = {
    "large": "https://download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth",
    "small": "https://download.pytorch.org/models/raft_small_C_T_V2-01064c6d.pth"
}


def load_raft(size="large", weights=None):
    """RAFT for estimate_flow, from a file in torchvision's names, or downloaded where it is None.
    size=None: the size that the file holds. FileNotFoundError: no such file, or no network.
    ValueError: a damaged file, or not a RAFT of that size."""
    if size not in (None, *SIZES):
        raise ValueError(f"found RAFT size {size!r}, expected 'large' or 'small'")
    url = PUBLISHED[size or "large"]
    state = read_weights(weights) if weights else download(url)
    found = "large" if "mask_predictor.conv.weight" in state else "small"
    raft = RAFT(size or found)
    try:
        raft.load_state_dict(state)
    except RuntimeError:        # it lists every tensor
        raise ValueError(
            f"{weights}: found {len(state)} tensors, most like RAFT-{found}, expected those of "
            f"torchvision's RAFT-{size or found}: ask for another size, or get {url}") from None
    return raft.eval().requires_grad_(False)


def read_weights(path):
    """A file of weights -> {name: tensor}."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no RAFT weights at {str(path)!r}: set flow.weights to their file")
    try:
        # torch.load ignores the checksums in the file: a flipped bit would be a wrong weight.
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()
        state = torch.load(path, map_location="cpu", weights_only=True)
        damaged = damaged or not all(isinstance(value, torch.Tensor) for value in state.values())
    except Exception:       # damaged bytes raise a dozen different types
        damaged = True
    if damaged:
        raise ValueError(
            f"{path}: found damaged bytes or no tensors, expected a file of torch.save with "
            f"torchvision's RAFT names: get the file again")
    return state


def download(url):
    """torchvision's published weights {name: tensor}, kept in torch.hub's cache."""
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:      # no network, a proxy's answer, a wrong hash, a broken cache
        raise FileNotFoundError(
            f"cannot fetch {url} ({type(error).__name__}: {error}): download it where there is "
            f"a network and set flow.weights to its path") from error


# -------------------------------------------------------------------------------------------------
# Whole videos


# Sec. 4.1, appendix C: the optical flow of real clips
@torch.no_grad()
def estimate_flow(video, raft, iters=12, pairs=12):
    """Video (B, 3, T, H, W) in [-1, 1] -> optical flow (B, 2, T, H, W) in pixels per frame.
    The last frame has no next one and repeats the flow before it; one frame alone has zeros.
    RAFT sees up to `pairs` pairs of frames at a time. ValueError: another shape."""
    if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
        shape = tuple(video.shape)
        raise ValueError(f"found a video {shape} {video.dtype}, expected float (B, 3, T, H, W)")
    B, _, T, H, W = video.shape
    if T < 2:
        return video.new_zeros(B, 2, T, H, W)
    # RAFT sees small frames enlarged. Its flow is shrunk again: u with the width, v the height.
    height, width = max(H, MIN_SIDE), max(W, MIN_SIDE)
    shrink = video.new_tensor([W / width, H / height]).view(2, 1, 1)
    cells = math.ceil(height / 8) * math.ceil(width / 8)                # cuDNN takes 65,535

    frames = video.transpose(1, 2)                                      # (B, T, 3, H, W)
    now = frames[:, :-1].flatten(0, 1)                                  # (B (T-1), 3, H, W)
    after = frames[:, 1:].flatten(0, 1)                                 # (B (T-1), 3, H, W)
    pairs = max(1, min(pairs, 65535 // cells))
    found = []
    for frame1, frame2 in zip(now.split(pairs), after.split(pairs)):
        frame1 = F.interpolate(frame1, (height, width), mode="bilinear")
        frame2 = F.interpolate(frame2, (height, width), mode="bilinear")
        flow = raft(frame1, frame2, iters=iters)                        # (N, 2, height, width)
        found.append(F.interpolate(flow, (H, W), mode="bilinear") * shrink)
    flow = torch.cat(found).view(B, T - 1, 2, H, W).transpose(1, 2)     # (B, 2, T-1, H, W)
    return torch.cat([flow, flow[:, :, -1:]], dim=2)                    # (B, 2, T, H, W)
