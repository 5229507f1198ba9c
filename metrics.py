"""Reading clips back from their pixels: where an object is, in which shape, and what it does.

No network judges anything here. The world (data.py) paints its objects in six hues that are 60
degrees apart, so even a blurred pixel can be named. What an object does is decided by `rules`, one
for each motion of data.MOTIONS; `python probe.py predicates` tries them on ground truth.
Coherence, which VideoJAM is about, is measured apart from obedience to the text: roughness, area
variation, agreement of the generated motion with the frames, and frames without the object.

Letters: T frames, H height, W width, n frames or clips, K places on a ring; x right, y down, px.
"""
import functools
import math
import types

import numpy as np
import torch
import torch.nn.functional as F

import data

# -------------------------------------------------------------------------------------------------
# Where: one colour, frame by frame


def nearest_hue(video):
    """(3, T, H, W) in [-1, 1] -> the nearest palette colour of each pixel, and its saturation."""
    rgb = (video.float().clamp(-1, 1) + 1) / 2
    r, g, b = rgb
    largest = rgb.amax(0)
    chroma = largest - rgb.amin(0)
    # COLORS stand in the order of their hues: 0, 60, 120, ... degrees.
    hue = torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)
    nearest = (hue / (math.pi / 3)).round().long() % 6  # (T, H, W)
    return nearest, chroma / largest.clamp(min=1e-6) * (chroma > 0.1)


def dominant_color(video, without=()):
    """The palette colour of most coloured pixels of (3, T, H, W); None where all is grey."""
    nearest, saturation = nearest_hue(video)
    counts = torch.bincount(nearest[saturation > 0.4], minlength=6).tolist()
    counts = {color: n for color, n in zip(data.COLORS, counts) if color not in without}
    return max(counts, key=counts.get) if any(counts.values()) else None


def area_and_centre(weight):
    """Pictures (n, H, W) -> the sum of each (n,) and its centre of mass (n, 2) px."""
    H, W = weight.shape[1:]
    area = weight.sum((1, 2))
    x = weight.sum(1) @ torch.arange(W).float()
    y = weight.sum(2) @ torch.arange(H).float()
    return area, torch.stack([x / area, y / area], dim=1)


def track(video, color):
    """A colour in (3, T, H, W): mask (T, H, W) bool, area (T,) px, centroid (T, 2) px, found (T,).
    A frame with less than 0.4 % of the colour has lost it, and its centroid is nan."""
    nearest, saturation = nearest_hue(video)
    saturation = saturation * (nearest == list(data.COLORS).index(color))
    mask = saturation > 0.4  # (T, H, W)
    found = mask.float().mean((1, 2)) >= 0.004
    # The rim is mixed with the background: its saturation tells how much of a pixel is covered.
    near = F.max_pool2d(mask.float(), 3, stride=1, padding=1)
    area, centroid = area_and_centre(saturation * near)
    centroid[~found] = math.nan
    return types.SimpleNamespace(mask=mask, area=area, centroid=centroid, found=found)


def read_at(pictures, x, y):
    """Pictures (n, H, W) read between their pixels, at x, y (n, K, P) px: (n, K, P)."""
    H, W = pictures.shape[1:]
    x = 2 * x / (W - 1) - 1
    y = 2 * y / (H - 1) - 1
    at = torch.stack([x, y], dim=-1)
    return F.grid_sample(pictures[:, None], at, align_corners=True)[:, 0]


def turns(video, seen):
    """How far the object turns from each frame to the next: degrees (T-1,), clockwise positive.

    Three rings around its centre are read at 72 places. The turn is the shift, up to 40 degrees,
    that fits the rings to the next frame's; 0 where no shift fits clearly better than none.
    """
    brightness = (video.float().amax(0) + 1) * seen.mask
    brightness = F.avg_pool2d(brightness[None], 3, stride=1, padding=1)[0]  # (T, H, W)
    radius = (seen.area / math.pi).sqrt().view(-1, 1, 1)
    radius = radius * torch.tensor([0.4, 0.65, 0.9]).view(3, 1)  # (T, 3, 1)
    angle = torch.arange(72) * math.pi / 36  # (K,)
    x, y = seen.centroid.nan_to_num().view(-1, 2, 1, 1).unbind(1)
    x = x + radius * angle.cos()
    y = y + radius * angle.sin()
    rings = read_at(brightness, x, y)  # (T, 3, K)
    errors = []
    for shift in range(-8, 9):
        gap = rings[:-1].roll(shift, dims=2) - rings[1:]
        errors.append(gap.square().mean((1, 2)))
    errors = torch.stack(errors)  # (17, T-1)
    clear = errors.amin(0) < 0.7 * errors[8]
    return (errors.argmin(0) - 8) * 5.0 * clear


# -------------------------------------------------------------------------------------------------
# In which shape


def on_square(masks, angle=torch.tensor(0.0)):
    """Masks (n, H, W), each moved to its centre, turned and scaled to area 1: (n, 25, 25)."""
    area, centre = area_and_centre(masks)
    r = torch.linspace(-1.1, 1.1, 25)
    y, x = torch.meshgrid(r, r, indexing="ij")
    x, y = data.rotate(x, y, angle)
    side = area.sqrt().view(-1, 1, 1)
    cx, cy = centre.view(-1, 2, 1, 1).unbind(1)
    return read_at(masks, cx + side * x, cy + side * y)


@functools.cache
def templates():
    """The world's shapes, drawn large and turned by 24 angles: (shapes, 24, 25, 25)."""
    r = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(r, r, indexing="ij")
    drawn = torch.stack([outline(x, y) < 0 for outline in data.SDF.values()]).float()
    angles = torch.arange(24) * math.pi / 12
    return torch.stack([on_square(drawn, angle) for angle in angles], dim=1)


def shape_of(seen):
    """The shape whose turned template overlaps best, on average over the frames; None if lost."""
    if not seen.found.any():
        return None
    masks = on_square(seen.mask[seen.found].float())[:, None, None]  # (n, 1, 1, 25, 25)
    both = torch.minimum(masks, templates()).sum((3, 4))
    either = torch.maximum(masks, templates()).sum((3, 4))
    overlap = (both / either).amax(2).mean(0)  # (shapes,)
    return list(data.SDF)[overlap.argmax()]


# -------------------------------------------------------------------------------------------------
# What it does: one rule for each motion. The thresholds were set on true clips of the world.


def observe(path, area, turn, partner=None):
    """What the rules look at, from an object's path (T, 2), area (T,) and turn (T-1,), and the path
    of its partner."""
    half = len(path) // 2
    quarter = max(1, len(area) // 4)
    o = types.SimpleNamespace(path=path, partner=partner)
    o.radius = math.sqrt(np.median(area) / math.pi)
    o.way = (len(path) - 1) * step(path)                # from the start to the end
    o.length = norm(o.way)
    line = path.mean(0) + np.outer(np.linspace(-0.5, 0.5, len(path)), o.way)
    o.off_line = norm(path - line).mean()
    o.first = step(path[:half + 1])                     # the mean step in the first half
    o.last = step(path[-half - 1:])
    o.wander = wander(path)
    o.in_place = o.wander < 0.6 * o.radius              # the centre of a triangle that spins strays
    o.growth = area[-quarter:].mean() / area[:quarter].mean()
    o.spin = (turn > 7).mean() - (turn < -7).mean()     # -1 to 1, clockwise positive
    return o


def rules(o):
    """{motion: does what was observed look like it?} Those of two objects, if both were seen."""
    does = {}
    even = norm(o.first - o.last) < 0.25 * norm(o.first + o.last)
    for direction in data.DIRECTIONS:
        does[direction] = heads(o, direction) and o.off_line < 0.065 * o.length and even
    same_size = 1 / 1.2 < o.growth < 1.2
    does["still"] = o.wander < o.radius / 4 and same_size and abs(o.spin) <= 0.6
    does["growing"] = o.in_place and o.growth > 1.2
    does["shrinking"] = o.in_place and o.growth < 1 / 1.2
    does["spinning clockwise"] = o.in_place and o.spin > 0.6
    does["spinning counter-clockwise"] = o.in_place and o.spin < -0.6
    faster = o.last[1] > 1.6 * o.first[1] > 0
    does["falling"] = heads(o, "down") and o.off_line < 0.12 * o.length and faster
    does["zigzag"] = zigzags(o)
    does["thrown"] = is_thrown(*o.path.T)
    does["bouncing"] = bounces(*o.path.T, o.radius)
    if o.partner is not None:
        does["crossing"] = crosses(o)
        does["colliding"] = collides(o)
        advance = orbit(o)                              # in degrees, clockwise positive
        does["orbiting clockwise"] = advance > 35
        does["orbiting counter-clockwise"] = advance < -35
    return does


# What also holds wherever the first does: the object that crosses another moves in a straight line.
IMPLIED = [("crossing", direction) for direction in ("right", "down", "left", "up")]


def norm(vectors):
    return np.linalg.norm(vectors, axis=-1)


def step(path):
    """The mean step (2,) of a path in px per frame: the slope of the line through it."""
    return np.polyfit(np.arange(len(path)), path, 1)[0]


def wander(path):
    """How far it gets from its own middle."""
    return norm(path - path.mean(0)).max()


def legs(places):
    """What one coordinate (T,) gains in each quarter of the clip: (4,)."""
    quarters = np.linspace(0, len(places) - 1, 5)
    return np.diff(np.interp(quarters, np.arange(len(places)), places))


def angle_between(a, b):
    """In degrees, 0 to 180."""
    cosine = a @ b / max(norm(a) * norm(b), 1e-9)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def heads(o, direction):
    """It gets ahead, and its mean step points within 22.5 degrees of a direction."""
    moves = o.length > o.radius / 2
    return moves and angle_between(o.way, data.DIRECTIONS[direction]) <= 22.5


def zigzags(o):
    """Across its way it goes to and fro, in four legs of like size."""
    across = np.array([-o.way[1], o.way[0]]) / max(o.length, 1e-9)
    gains = legs(o.path @ across)
    sizes = abs(gains)
    turns_back = (gains[1:] * gains[:-1]).max() < 0
    alike = sizes.min() > max(0.55 * sizes.max(), 0.05 * o.length)
    return o.length > o.radius / 2 and turns_back and alike


def drifts(x):
    """It goes on to one side, at an even pace."""
    gains = legs(x)
    sizes = abs(gains)
    one_way = abs(gains.sum()) > 0.999 * sizes.sum()
    return one_way and sizes.min() > 0.6 * sizes.max()


def is_thrown(x, y):
    """It is highest in the middle of the clip, by a quarter of its way, as it drifts aside."""
    middle = 0.35 < y.argmin() / (len(y) - 1) < 0.7
    height = min(y[0], y[-1]) - y.min()
    return middle and height > 0.25 * abs(x[-1] - x[0]) and drifts(x)


def bounces(x, y, radius):
    """It drops, rises to less than before, and drops again, as it drifts aside."""
    floor = y[:len(y) // 2 + 1].argmax()
    apex = floor + y[floor:].argmin()
    drop = y[floor] - y[0]
    rise = y[floor] - y[apex]
    next_drop = y[apex:].max() - y[apex]
    steep = drop > max(0.2 * radius, 0.45 * abs(x[-1] - x[0]))
    return steep and 0.25 * drop < rise < 0.8 * drop and next_drop > rise / 2 and drifts(x)


def crosses(o):
    """Both move, they come near, and each ends on the other's other side."""
    between = o.partner - o.path
    gap = norm(between)
    near = gap.min() < 0.6 * min(gap[0], gap[-1])
    passed = angle_between(between[0], between[-1]) > 120
    return min(o.wander, wander(o.partner)) > o.radius / 2 and near and passed


def collides(o):
    """They come near and do not pass, and each goes on with the step that the other had."""
    between = o.partner - o.path
    hit = norm(between).argmin()
    passed = angle_between(between[0], between[-1]) > 60
    if passed or not 2 <= hit <= len(between) - 3:
        return False
    before = step(o.path[:hit])
    after = step(o.path[hit + 1:])
    its_before = step(o.partner[:hit])
    its_after = step(o.partner[hit + 1:])
    change = norm(after - its_before) + norm(its_after - before)
    return change < 0.5 * norm(before - its_before)


def orbit(o):
    """By how many degrees it advances around a partner at rest, at a steady distance; else 0."""
    x, y = (o.path - o.partner).T
    gap = np.hypot(x, y)
    angle = np.unwrap(np.arctan2(y, x))
    rests = wander(o.partner) < o.radius / 4
    steady = gap.std() < 0.15 * gap.mean()
    return math.degrees(angle[-1] - angle[0]) * (rests and steady)


# -------------------------------------------------------------------------------------------------
# All metrics of a clip


def look_at(video, words):
    """The `track` of the named object, and what `observe` says of it; None if one is lost."""
    objects = [track(video, thing["color"]) for thing in words["objects"]]
    named = objects[0]
    if any(seen.found.sum() < max(3, len(seen.found) / 2) for seen in objects):
        return named, None
    paths = [without_gaps(seen.centroid.double().numpy()) for seen in objects]
    area = named.area[named.found].numpy()
    return named, observe(paths[0], area, turns(video, named).numpy(), *paths[1:2])


def without_gaps(path):
    """A path (T, 2) with straight lines where it is nan."""
    frames = np.arange(len(path))
    known = ~np.isnan(path[:, 0])
    columns = [np.interp(frames, frames[known], column[known]) for column in path.T]
    return np.stack(columns, axis=1)


def judge(video, words):
    """What the objects that the words name do in a clip, by all `rules`; {} if one is lost."""
    _, o = look_at(video, words)
    return {} if o is None else rules(o)


def nearest_direction(u, v):
    """The name of the nearest of the eight DIRECTIONS to the vector (u, v)."""
    eighth = round(math.degrees(math.atan2(v, u)) / 45) % 8
    return list(data.DIRECTIONS)[eighth]


def motion_direction(flow):
    """The direction that optical flow (2, T, H, W) names: its mean, fast pixels counting most."""
    weighted = flow * flow.norm(dim=0)
    return nearest_direction(*weighted.mean((1, 2, 3)).tolist())


def agreement(seen, motion):
    """How far, in px, the flow (2, T, H, W) inside the object is from the object's own step."""
    whole = F.avg_pool2d(seen.mask.float(), 3, stride=1, padding=1)
    core = (whole > 0.99)[:-1].float()  # (T-1, H, W), without the rim
    said = (motion[:, :-1] * core).sum((2, 3)) / core.sum((1, 2))  # (2, T-1)
    gap = said - seen.centroid.diff(dim=0).T  # nan where it is lost
    return gap.norm(dim=0).nanmean().item()


def read_clip(video, words, motion=None):
    """The metrics of a clip (3, T, H, W) whose prompt says `words`: a dict of numbers.

    motion: the optical flow (2, T, H, W) px that was generated with it. nan: does not apply, or
    the object is lost; a lost object is never right. Roughness is the rms of the path's second
    difference in px; that of ground truth is the motion itself.
    """
    asked = words["motion"]
    named = words["objects"][0]
    others = [thing["color"] for thing in words["objects"][1:]]
    seen, o = look_at(video, words)
    area = seen.area[seen.found]
    names = "direction", "picture", "roughness", "area_variation", "agreement"
    row = dict.fromkeys(names, math.nan)
    row["motion"] = float(o is not None and rules(o).get(asked, False))
    if asked in data.DIRECTIONS:
        row["direction"] = float(o is not None and nearest_direction(*o.way) == asked)
        if motion is not None:
            row["picture"] = float(motion_direction(motion) == asked)
    row["colour"] = float(dominant_color(video, others) == named["color"])
    row["shape"] = float(shape_of(seen) == named["shape"])
    row["lost"] = 1 - seen.found.float().mean().item()
    row["area"] = area.mean().item() / seen.mask[0].numel()
    if o is None:
        return row
    bends = norm(np.diff(o.path, 2, axis=0))
    row["roughness"] = math.sqrt(np.square(bends).mean())
    row["area_variation"] = area.log().diff().std().item()
    if motion is not None:
        row["agreement"] = agreement(seen, motion)
    return row


# -------------------------------------------------------------------------------------------------
# How good, how sure


def psnr(a, b):
    """In dB, of clips (B, 3, T, H, W) in [-1, 1]: the mean over the clips."""
    error = (a - b).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item()


def wilson(hits, n):
    """The 95 % interval (low, high) of a share of hits among n."""
    z2 = 1.96 ** 2
    middle = hits + z2 / 2
    half = math.sqrt(z2 * (hits * (n - hits) / n + z2 / 4))
    return max(middle - half, 0.0) / (n + z2), (middle + half) / (n + z2)


def bootstrap(values):
    """Mean of the values that are not nan and its 95 % interval: (mean, low, high)."""
    return ratio(values, np.ones(len(values)))


def paired(a, b):
    """Mean of a - b and its interval; a[i] and b[i] are of the same prompt and noise."""
    return bootstrap(np.subtract(a, b))


def ratio(a, b):
    """mean(a) / mean(b) and its interval; each draw takes the same clips of both."""
    both = np.array([a, b], dtype=float)                # (2, n)
    both = both[:, ~np.isnan(both).any(0)]
    n = both.shape[1]
    if n == 0:
        return math.nan, math.nan, math.nan
    draws = np.random.default_rng(0).integers(n, size=(1000, n))
    means = both[:, draws].mean(2)                      # (2, 1000)
    low, high = np.quantile(means[0] / means[1], (0.025, 0.975))
    return both[0].mean() / both[1].mean(), low, high
