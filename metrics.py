"""Everything that is read from pixels: colours, tracks, directions, which motion it was, how good a copy is; and the intervals of such numbers.

Letters: B clips, T frames, H height, W width; a law is a family of paths (line, circle, parabola ...), n its frames less one, N numbers that were measured.
"""
import functools
import math
import types

import numpy as np
import torch
import torch.nn.functional as F

import data
import flow

NOISE = types.SimpleNamespace(place=0.06, size=0.04, turn=0.06)                 # of a measurement: px, log radius, radians per frame
SPAN = 1.1                                                                      # half-width of a shape's template, in square roots of its area


# ---------------------------------------------------------------------------------------------------------------------
# VBench's aggregation, as the paper's tables use it.

RANGES = dict(aesthetic=(0, 100), imaging=(0, 100), subject=(14.62, 100), background=(26.15, 100), smoothness=(70.6, 99.75), dynamic=(0, 100))


# Tabs. 4, 5, 7 -> Tabs. 1, 2, 6
def vbench_aggregate(**scores):
    """VBench's six scores in percent (aesthetic, imaging, subject, background, smoothness, dynamic) -> (appearance, motion) in percent."""
    s = {name: (scores[name] - low) / (high - low) for name, (low, high) in RANGES.items()}
    return 25 * (s["aesthetic"] + s["imaging"] + s["subject"] + s["background"]), 100 * (s["smoothness"] + 0.5 * s["dynamic"]) / 1.5


# ---------------------------------------------------------------------------------------------------------------------
# Reading pictures back


def _hues(video):
    """The nearest palette index (T, H, W) of each pixel of (3, T, H, W), and its saturation: 0 where too grey."""
    r, g, b = rgb = (video.float().clamp(-1, 1) + 1) / 2
    top, chroma = rgb.amax(0), rgb.amax(0) - rgb.amin(0)
    hue = torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)
    saturation = chroma / top.clamp(min=1e-6)  # the same in the light and the dark parts of a pattern
    return (hue / (math.pi / 3)).round().long() % 6, saturation * ((chroma > 0.25) & (saturation > 0.4))


def track(video, color):
    """Where a colour is in (3, T, H, W): area (T,) as a share of the picture, centroid (T, 2) px, found (T,) bool.
    A frame with less than 0.4 % of the colour is lost: its centroid is nan."""
    nearest, saturation = _hues(video)
    weight = saturation * (nearest == list(data.COLORS).index(color))                                # (T, H, W)
    area, total = (weight > 0).float().mean((1, 2)), weight.sum((1, 2))
    x = (weight.sum(1) * torch.arange(weight.shape[2], device=weight.device)).sum(1) / total
    y = (weight.sum(2) * torch.arange(weight.shape[1], device=weight.device)).sum(1) / total
    found = area >= 0.004
    return area, torch.stack([x, y], 1).masked_fill(~found[:, None], math.nan), found


def dominant_color(video):
    """The palette colour of most coloured pixels of (3, T, H, W); None where all is grey."""
    nearest, saturation = _hues(video)
    counts = torch.bincount(nearest[saturation > 0], minlength=6)
    return list(data.COLORS)[counts.argmax()] if counts.any() else None


def direction(centroid, found):
    """The least-squares line through the found centroids: angle in degrees (0 right, 90 down), speed in px per frame.
    Both are nan where fewer than 3 frames were found."""
    if found.sum() < 3:
        return math.nan, math.nan
    t, path = found.nonzero()[:, 0].cpu(), centroid[found].cpu().double()                            # (n,), (n, 2)
    u, v = np.polyfit(t, path - path[0], 1)[0]
    return math.degrees(math.atan2(v, u)), math.hypot(u, v)


def nearest_direction(angle):
    """The name of the nearest of the eight DIRECTIONS to an angle in degrees; None for nan."""
    return None if math.isnan(angle) else list(data.DIRECTIONS)[round(angle / 45) % 8]


# ---------------------------------------------------------------------------------------------------------------------
# Counting what clips show, and intervals.

def psnr(a, b):
    """Mean over clips of the PSNR in dB of (B, 3, T, H, W) in [-1, 1], whose peak-to-peak is 2."""
    return (10 * torch.log10(4 / (a - b).square().flatten(1).mean(1))).mean().item()


def interval(hits, n):
    """Wilson's 95 % interval of a share, as percentages."""
    z, p = 1.96, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * (middle - half) / (1 + z * z / n), 100 * (middle + half) / (1 + z * z / n)


def bootstrap(values, over=None):
    """Mean of the values that are not nan, over that of others if given, and its 95 % interval by resampling the clips: (mean, low, high)."""
    v = np.asarray(values, dtype=float)
    w = np.ones_like(v) if over is None else np.asarray(over)
    v, w = v[~np.isnan(v)], w[~np.isnan(v)]
    if len(v) == 0:
        return math.nan, math.nan, math.nan
    draws = np.random.default_rng(0).integers(len(v), size=(1000, len(v)))
    return v.mean() / w.mean(), *np.quantile(v[draws].mean(1) / w[draws].mean(1), (0.025, 0.975))


def read_clips(videos, prompts):
    """How many clips show the named colour, and move in the named direction (nearest of eight): (colour hits, direction hits)."""
    colour = way = 0
    for video, prompt in zip(videos, prompts):
        words = data.parse(prompt)
        name = words["objects"][0]["color"]
        colour += dominant_color(video) == name
        angle, speed = direction(*track(video, name)[1:])
        way += nearest_direction(angle) == words["motion"]
    return colour, way


def read_motion(rgb, prompts, sigma):
    """How many motion pictures (B, 3, T, H, W) name the prompt's direction: that of their flow, averaged with the speed as weight."""
    d = flow.rgb_to_flow(rgb, sigma)                                            # (B, 2, T, H, W)
    u, v = (d * d.norm(dim=1, keepdim=True)).mean((2, 3, 4)).unbind(1)
    angles = torch.rad2deg(torch.atan2(v, u)).tolist()
    return sum(nearest_direction(angle) == data.parse(prompt)["motion"] for angle, prompt in zip(angles, prompts))


# ---------------------------------------------------------------------------------------------------------------------
# Seeing one object: where, how large, how turned, in which shape.

def widest(x):
    """Maximum of each pixel and its eight neighbours, (..., H, W): max_pool2d(x, 3, 1, 1), ten times as fast on CPUs."""
    x = F.pad(x, (1, 1, 1, 1), value=-math.inf)
    x = torch.maximum(torch.maximum(x[..., :-2], x[..., 1:-1]), x[..., 2:])
    return torch.maximum(torch.maximum(x[..., :-2, :], x[..., 1:-1, :]), x[..., 2:, :])


def see(video, color):
    """One colour in (3, T, H, W): mask (T, H, W), area (T,) px, centroid (T, 2) px, found (T,), value (T, H, W) its brightness."""
    nearest, saturation = _hues(video)
    same = nearest == list(data.COLORS).index(color)
    mask = saturation * same
    area, _, found = track(video, color)
    rgb = (video.clamp(-1, 1) + 1) / 2
    value = rgb.amax(0)
    # The centroid to a tenth of a pixel needs the half-covered rim, which the mask leaves out: its saturation says how far it is covered.
    soft = (value - rgb.amin(0)) / value.clamp(min=1e-6) * same * widest((mask > 0).float())
    ys, xs = torch.arange(mask.shape[1])[:, None], torch.arange(mask.shape[2])
    centroid = torch.stack([(soft * xs).sum((1, 2)), (soft * ys).sum((1, 2))], 1) / soft.sum((1, 2))[:, None]
    centroid[~found] = math.nan
    return types.SimpleNamespace(mask=mask, area=area * mask[0].numel(), centroid=centroid, found=found, value=value)


def look(images, x, y):
    """Images (n, C, H, W) read between their pixels, at x, y (n, ...) px: (n, C, ...)."""
    H, W = images.shape[-2:]
    at = torch.stack([2 * x / (W - 1) - 1, 2 * y / (H - 1) - 1], dim=-1).float()
    return F.grid_sample(images, at, align_corners=True)


def crop(images, centre, side, angles, points=25):
    """(n, H, W) on squares of half-width `side` (n,) px around `centre` (n, 2), turned by each of `angles` (n, K): (n, K, points, points)."""
    r = torch.linspace(-1, 1, points)
    y, x = torch.meshgrid(r, r, indexing="ij")                                  # (points, points)
    x, y = data._rotate(x, y, angles[:, :, None, None])                         # (n, K, points, points)
    u, v, side = (w.view(-1, 1, 1, 1) for w in (*centre.unbind(1), side))
    return look(images[:, None], (u + side * x).flatten(1, 2), (v + side * y).flatten(1, 2))[:, 0].unflatten(1, (-1, points))


def turns(seen, limit=40, count=81):
    """How far the texture turns from each frame to the next, in radians (T-1,): the best of `count` rotations up to `limit` degrees."""
    mask = (seen.mask > 0).float()
    mean = (seen.value * mask).sum((1, 2), keepdim=True) / mask.sum((1, 2), keepdim=True).clamp(min=1)
    texture = F.avg_pool2d((((seen.value - mean) * mask)[None]), 3, 1, padding=1)[0]           # no step at the outline, no grid in the pixels
    centre, T = seen.centroid.nan_to_num(), len(mask)
    side = (1.3 * (mask.sum((1, 2)).max() / math.pi).sqrt() + 1).expand(T - 1)
    angles = torch.linspace(-math.radians(limit), math.radians(limit), count)
    before = crop(texture[:-1], centre[:-1], side, torch.zeros(T - 1, 1))
    error = (crop(texture[1:], centre[1:], side, angles.expand(T - 1, -1)) - before).square().sum((2, 3))           # (T-1, count)
    k, i = error.argmin(1).clamp(1, count - 2), torch.arange(T - 1)
    left, mid, right = error[i, k - 1], error[i, k], error[i, k + 1]            # the vertex of the parabola through three
    return angles[k] + (angles[1] - angles[0]) * (0.5 * (left - right) / (left - 2 * mid + right).clamp(min=1e-9)).clamp(-0.5, 0.5)


@functools.cache
def templates():
    """The world's shapes at 24 angles each, with unit area and centred on their centroid: (shapes, 24, points, points)."""
    r = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(r, r, indexing="ij")
    rows, angles = [], torch.arange(24) * (2 * math.pi / 24)
    for name in data.SHAPES:
        inside = (data.SDF[name](x, y) < 0).float()
        area = inside.sum() * 0.01 ** 2
        centre = torch.stack([(inside * x).sum(), (inside * y).sum()]) / inside.sum() / 0.01 + 150
        rows.append(crop(inside[None], centre[None], SPAN * area.sqrt()[None] / 0.01, angles[None])[0])
    return torch.stack(rows)


def shape_of(seen):
    """The shape whose turned template overlaps the object best, averaged over the frames in which it was found."""
    mask = (seen.mask[seen.found] > 0).float()
    seen_as = crop(mask, seen.centroid[seen.found], SPAN * mask.sum((1, 2)).sqrt(), torch.zeros(len(mask), 1))[:, 0]       # (n, P, P)
    a, b = seen_as[:, None, None], templates()[None]                            # (n, 1, 1, P, P), (1, shapes, 24, P, P)
    overlap = torch.minimum(a, b).sum((3, 4)) / torch.maximum(a, b).sum((3, 4))
    return data.SHAPES[overlap.amax(2).mean(0).argmax()]


def parts(mask, least=3):
    """The mean number of connected pieces of at least `least` pixels per frame of a mask (T, H, W): labels spread until they rest."""
    on = mask > 0
    label, before = torch.arange(1, on.numel() + 1.0).view(on.shape) * on, None
    while before is None or (label != before).any():
        label, before = widest(label) * on, label
    return sum((torch.unique(frame[frame > 0], return_counts=True)[1] >= least).sum().item() for frame in label) / len(on)


# ---------------------------------------------------------------------------------------------------------------------
# Naming a motion: least squares of the tracks to every law, the best by Bayes' information criterion.

@functools.cache
def laws(T, pair, slow):
    """name -> (its designs (L, T, P, k), the parameters beside the k linear ones, does a fit (k,) deserve the name?).

    P = 2 numbers per frame, x and y, or 4 for a pair; `slow` px per frame is hardly a motion.
    """
    t, n, P, table = torch.arange(T, dtype=torch.float64), max(T - 1, 1), 4 if pair else 2, {}

    def only(i, f):                                                             # f(t) in number i, 0 in the others
        column = torch.zeros(T, P, dtype=torch.float64)
        column[:, i] = f
        return column                                                           # (T, P)

    def add(name, *columns, movers=1, extra=0, allowed=lambda p: True):
        place = [only(i, 1) for i in range(P)]                                  # where the movers start, how they move, where the other one rests
        design = torch.stack([*place[:2 * movers], *columns, *place[2 * movers:]], dim=2)      # (T, P, k)
        table.setdefault(name, ([], extra, allowed))[0].append(design)

    add("still")
    add("line", only(0, t), only(1, t))
    for sweep in np.linspace(0.8, 6.6, 30):                                     # radians in all
        for sign, turn in zip((1, -1), data.TURNS):
            cos, sin = (sweep / n * t).cos(), sign * (sweep / n * t).sin()
            add(f"orbiting {turn}", only(0, cos) + only(1, sin), only(0, -sin) + only(1, cos), extra=1)
    if pair:
        add("crossing", *(only(i, t) for i in range(4)), movers=2, allowed=lambda p: min(p[4:6].norm(), p[6:8].norm()) > slow)
        for i in (0, 1):
            for hit in np.linspace(0.35, 0.65, 13) * n:                         # equal masses: they exchange their velocities
                before, after = (t - hit).clamp(max=0), (t - hit).clamp(min=0)
                add("colliding", only(i, before) + only(i + 2, after), only(i, after) + only(i + 2, before), movers=2, extra=2)
    else:
        add("falling", only(1, t ** 2), allowed=lambda p: p[2] > 0)
        up_first = lambda p: p[4] > 0 and -p[3] / (2 * p[4]) > 0.15             # the apex lies within the clip
        add("thrown", only(0, t), only(1, t), only(1, t ** 2), allowed=up_first)
        wave = (2 * (t / n * 2 % 1) - 1).abs()
        add("zigzag", only(0, t), only(1, t), only(0, wave), only(1, wave))
        for hit in np.linspace(0.22, 0.38, 9) * n:                              # the frame of the first bounce; heights in units of the drop
            arcs, start, v = [], -hit, 2 / hit
            for _ in range(10):
                arcs.append(v * (t - start) - ((t - start) / hit) ** 2)
                start, v = start + v * hit ** 2, data.RESTITUTION * v
            add("bouncing", only(0, t), only(1, -torch.stack(arcs).amax(0)), extra=1, allowed=lambda p: p[3] > 0)
    return {name: (torch.stack(designs), extra, allowed) for name, (designs, extra, allowed) in table.items()}


def solve(design, target, weight):
    """Weighted least squares of (..., N, k) to (N,): parameters (..., k) and the weighted sum of squares (...)."""
    w = weight.sqrt()
    p = torch.linalg.pinv(design * w[:, None], rtol=1e-10) @ (target * w)       # lstsq goes astray where a lost partner takes rank away
    return p, ((design @ p[..., None])[..., 0] - target).square().mul(weight).sum(-1)


def name_motion(objects, turn, slow):
    """The named object (and its partner) as `see` returns them, turn (T-1,) -> (motion or "line", {law: rms residual in px}, spin per frame).

    Three measurements per frame, each over its noise: place, log radius, turn; the last two rest but for their own motions. With a partner the
    laws are those of a pair, a line and standing still; without, all others.
    """
    T, pair = len(objects[0].area), len(objects) > 1

    def weigh(o):                                                               # one of a pair that is half hidden counts little
        whole = 0.85 * o.area[o.found].quantile(0.9) if pair and o.found.any() else 0
        return o.found.double() * torch.where(o.area < whole, 0.02, 1.0)        # (T,)

    place = torch.cat([o.centroid for o in objects], 1).double().nan_to_num().flatten() / NOISE.place           # (T P,)
    weights = torch.stack([weigh(o) for o in objects], 1).repeat_interleave(2, 1).flatten()                     # (T P,)
    size, turn, own = 0.5 * objects[0].area.double().clamp(min=1e-3).log() / NOISE.size, turn.double() / NOISE.turn, weigh(objects[0])
    both, one, time = torch.minimum(own[1:], own[:-1]), torch.ones(T, 1, dtype=torch.float64), torch.arange(T, dtype=torch.float64)
    (_, steady), (growth, grows) = solve(one, size, own), solve(torch.cat([one, time[:, None]], 1), size, own)
    rests, (spin, spins) = turn.square().mul(both).sum(), solve(one[1:], turn, both)
    spinning, growing = f"spinning {data.TURNS[int(spin[0] < 0)]}", "growing" if growth[1] > 0 else "shrinking"
    found, residual = [], {}                                                    # (name, sum of squares, parameters); law -> px
    rms = lambda rss: NOISE.place * (rss / weights.sum().clamp(min=1)).sqrt().item()

    for name, (designs, extra, allowed) in laws(T, pair, slow).items():
        p, rss = solve(designs.flatten(1, 2), place, weights)                   # (L, k), (L,)
        k, residual[name] = designs.shape[-1] + extra, rms(rss.min())
        if pair or "orbit" not in name:
            found += [(name, rss[i] + steady + rests, k) for i in rss.argsort()[:5] if allowed(p[i] * NOISE.place)][:1]
        if not pair and name in ("still", spinning.replace("spinning", "orbiting")):            # a turning triangle's centroid goes round
            found.append((spinning, rss.min() + steady + spins, k + 1))
        if not pair and name == "still":
            found.append((growing, rss.min() + grows + rests, k + 1))
            radius = (size * NOISE.size).exp()                                  # a triangle's centroid lies below its middle: it moves with the size
            column = torch.stack([torch.zeros_like(radius), radius], 1)         # (T, P)
            _, rss = solve(torch.cat([designs[0], column[..., None]], 2).flatten(0, 1), place, weights)
            found.append((growing, rss + grows + rests, k + 2))
            residual["growing"] = residual["shrinking"] = rms(rss)
    for way in data.TURNS:
        residual[f"spinning {way}"] = min(residual["still"], residual[f"orbiting {way}"])
    N = 2 * T * len(objects) + 2 * T - 1                                        # measurements
    criterion = lambda law: N * (1 + law[1] / N).log() + law[2] * math.log(N)
    return min(found, key=criterion)[0], residual, (spin[0] * NOISE.turn).item()


# ---------------------------------------------------------------------------------------------------------------------
# All metrics of one clip.

def tracked_flow(seen, turn, step=1):
    """The object's pixels carried along by its measured motion over `step` frames, 0 elsewhere: (2, T-step, H, W) px."""
    H, W = seen.mask.shape[1:]
    column = lambda x: x.view(-1, 1, 1)                                         # (T-step,) -> (T-step, 1, 1)
    c, c2 = seen.centroid[:-step].nan_to_num(), seen.centroid[step:].nan_to_num()
    grow = column((seen.area[step:] / seen.area[:-step].clamp(min=1)).sqrt())
    angle = column(F.avg_pool1d(turn[None], step, 1)[0]) * step                 # the turns of these frames, added
    dx, dy = torch.arange(W) - column(c[:, 0]), torch.arange(H)[:, None] - column(c[:, 1])      # (T-step, H|1, W|1)
    x, y = data._rotate(dx, dy, angle)                                          # (T-step, H, W)
    d = torch.stack([grow * x - dx + column((c2 - c)[:, 0]), grow * y - dy + column((c2 - c)[:, 1])])
    return d * ((seen.mask[:-step] > 0) & column(seen.found[:-step] & seen.found[step:]))


def dynamic(seen, turn, fps):
    """VBench's dynamic degree: are at least 4 n / 16 of the n looks at the clip moving, by the top 5 % of their pixels?"""
    step = min(max(1, round(fps / 8)), len(seen.area) - 1)
    d = tracked_flow(seen, turn, step)[:, ::step].norm(dim=0).flatten(1)                       # (n, H W)
    top = d.topk(max(1, int(0.05 * d.shape[1])), dim=1).values.mean(1)
    return float((top > 6 * min(seen.mask.shape[1:]) / 256).sum() >= round(4 * len(d) / 16))


@functools.cache
def speeds(motion, word, frames, height, width, size):
    """The slowest and the fastest line that the world shows under these words, in px per frame, over 200 draws."""
    words = dict(kind="basic", motion=motion, speed=word, objects=[dict(color="red", shape="circle")])
    poses = [data.complete(words, frames, height, width, np.random.default_rng(i), size=size)["objects"][0]["pose"] for i in range(200)]
    steps = [math.dist(pose[0][:2], pose[1][:2]) for pose in poses]
    return min(steps), max(steps)


def read_clip(video, words, motion=None, fps=8, size=1.0):
    """Every metric of one clip (3, T, H, W) against the words of its prompt; motion: the flow that was generated with it, (2, T, H, W) px.

    nan: does not apply (direction of a spin), or cannot be known because the named object is lost. A lost object is never right.
    """
    nan, named, asked = math.nan, words["objects"][0], words["motion"]
    row = dict(found=nan, colour=0.0, shape=0.0, motion=0.0, direction=0.0 if asked in data.DIRECTIONS else nan, direction_error=nan, speed=nan,
               speed_error=nan, spin=nan, jerk=nan, area_variation=nan, parts=nan, dynamic=0.0, warp=nan, agreement=nan, area=nan, read_as="lost")
    objects = [see(video, o["color"]) for o in words["objects"][:1 + (asked in data.PAIRED)]]
    seen, lost = objects[0], lambda o: o.found.sum() < max(3, len(o.found) / 2)
    row["found"] = seen.found.float().mean().item()
    others = {o["color"] for o in words["objects"]} - {named["color"]}
    area = {color: track(video, color)[0].sum() for color in data.COLORS if color not in others}
    row["colour"] = float(area[named["color"]] > 0 and max(area, key=area.get) == named["color"])
    if lost(seen):
        return row

    turn, slow = turns(seen), 0.25 * min(video.shape[-2:]) / 64                 # a third of the slowest named motion, px per frame
    read_as, residual, spin = name_motion(objects, turn, slow)
    angle, speed = direction(seen.centroid, seen.found)
    if read_as == "line":
        read_as = nearest_direction(angle)
    if any(map(lost, objects)):
        read_as = "partner lost"
    if not read_as.startswith("spinning"):                                      # the best turn of a blob without a texture is noise
        turn = torch.zeros_like(turn)
    if asked in data.DIRECTIONS:
        aim = math.degrees(math.atan2(*data.DIRECTIONS[asked][::-1]))
        low, high = speeds(asked, words["speed"], *video.shape[1:], size)       # the words leave a range open
        row.update(direction=float(nearest_direction(angle) == asked), direction_error=abs((angle - aim + 180) % 360 - 180),
                   speed_error=max(low - speed, speed - high, 0) / ((low + high) / 2))

    shown = seen.found & (seen.area > 0.85 * seen.area[seen.found].median()) if len(objects) > 1 else seen.found
    radius, t = 0.5 * seen.area[shown].double().log(), torch.nonzero(shown)[:, 0].double()
    trend = torch.stack([torch.ones_like(t)] + [t] * (asked in ("growing", "shrinking")), 1)
    unsteady = radius - (trend @ torch.linalg.lstsq(trend, radius[:, None]).solution)[:, 0]
    d, mask = tracked_flow(seen, turn), seen.mask[:-1] > 0                      # (2, T-1, H, W), (T-1, H, W)
    frames, (H, W) = video.transpose(0, 1), mask.shape[1:]                      # (T, 3, H, W)
    carried = look(frames[1:], d[0] + torch.arange(W), d[1] + torch.arange(H)[:, None])        # frame t+1 brought back onto t
    if motion is not None:                                                      # what the model said against what it drew
        core = -widest(-seen.mask[:-1])                                         # without the rim, whose flow is half the background's
        pairs = shown[:-1] & shown[1:] & (core.sum((1, 2)) > 0)
        share = core / core.sum((1, 2), keepdim=True).clamp(min=1e-6)
        said, drew = ((v * share).sum((2, 3)) for v in (motion[:, :-1], d))     # (2, T-1) px
        row["agreement"] = (said - drew).norm(dim=0)[pairs].mean().item()
    row.update(shape=float(shape_of(seen) == named["shape"]), motion=float(read_as == asked), speed=speed, spin=spin,
               jerk=residual[asked if asked in residual else "line"], area_variation=(2 * unsteady).std().item(), parts=parts(seen.mask[seen.found]),
               dynamic=dynamic(seen, turn, fps), warp=(carried - frames[:-1]).abs().mean(1)[mask].mean().item() / 2,
               area=(seen.area[shown].mean() / (H * W)).item(), read_as=read_as)
    return row
