"""The embedded world, moving shapes with captions and exact optical flow; and the latents of clips.

VideoJAM was trained on O(100 M) captioned videos whose flow RAFT estimated (section 4, appendix C).
MovingShapes stands in for them: no download, endless, exact. Its four kinds of motion bear the
names of VideoJAM-bench. Your own videos are read by videos.py.

    python data.py [key=value]      writes world.png: a clip of every motion over its flow pictures

A clip is first words (what a caption says), then a spec (words, sizes, paths, background), then
pixels and flow. To add a shape, write its function and name it in SDF. To add a motion, write the
function of its path, name it in KINDS, PHRASES and PATHS, and give it a rule in metrics.py.

Letters: B clips, T frames, H height, W width, A objects (1 or 2). Pixel centres are whole numbers,
x points right and y down, so that a growing angle turns clockwise. Videos lie in [-1, 1], optical
flow is in pixels per frame.
"""
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
from flow import flow_to_rgb, load_raft

# -------------------------------------------------------------------------------------------------
# Shapes and the dark parts of their patterns: signed distances in radii, negative inside


def circle(x, y):
    return torch.hypot(x, y) - 1

def square(x, y):
    return torch.maximum(x.abs(), y.abs()) - 0.9

def triangle(x, y):
    side = 0.866 * x.abs() - 0.5 * y + 0.45
    return torch.maximum(y, side) - 0.9

def cross(x, y):
    longer = torch.maximum(x.abs(), y.abs())
    shorter = torch.minimum(x.abs(), y.abs())
    return torch.maximum(longer - 1, shorter - 0.4)

def stripes(x, y):
    return 0.13 * torch.sin(7.5 * x + 0.8)

def halves(x, y):
    return x

def dot(x, y):
    return torch.hypot(x - 0.35, y) - 0.4

def checker(x, y):
    return torch.minimum(x.abs(), y.abs()).copysign(x * y)

SDF = {"circle": circle, "square": square, "triangle": triangle, "cross": cross}
PATTERNS = {"stripes": stripes, "halves": halves, "dot": dot, "checker": checker}

# -------------------------------------------------------------------------------------------------
# Words: the vocabulary; then drawing, saying and reading a caption

# Neighbours are 60 degrees of hue apart, so that the nearest hue names even a blurred pixel.
COLORS = {
    "red": (0.9, 0.1, 0.1), "yellow": (0.9, 0.9, 0.1), "green": (0.1, 0.9, 0.1),
    "cyan": (0.1, 0.9, 0.9), "blue": (0.1, 0.1, 0.9), "magenta": (0.9, 0.1, 0.9)}
SHAPES = tuple(SDF)
SPLITS = ("train", "val", "test")
DIRECTIONS = {
    "right": (1, 0), "down-right": (1, 1), "down": (0, 1), "down-left": (-1, 1),
    "left": (-1, 0), "up-left": (-1, -1), "up": (0, -1), "up-right": (1, -1)}
for name, way in DIRECTIONS.items():
    DIRECTIONS[name] = np.array(way) / math.hypot(*way)

KINDS = {
    "basic": [*DIRECTIONS, "still"],
    "complex": ["zigzag", "crossing", "growing", "shrinking"],
    "rotational": ["spinning clockwise", "spinning counter-clockwise",
                   "orbiting clockwise", "orbiting counter-clockwise"],
    "physics": ["falling", "thrown", "bouncing", "colliding"]}
MOTIONS = {motion: kind for kind, motions in KINDS.items() for motion in motions}
PAIRED = ["crossing", "orbiting clockwise", "orbiting counter-clockwise", "colliding"]
ZOOMS = ["growing", "shrinking"]

# What tells a motion in a text whose objects have become "it" (the first row that is found counts),
# the phrase after "a red square", the phrase after "it". Straight lines are read by their way.
PHRASES = {
    "orbiting": (r"orbit|circling|circles|around (a|the) it",
                 "orbiting a {other} {turn}", "orbits a {other} {turn}"),
    "spinning": (r"spin|rotat|turn", "spinning {turn}", "spins {turn}"),
    "bouncing": (r"bounc", "bouncing on the floor", "bounces on the floor"),
    "falling": (r"\bfall|drop", "falling", "falls"),
    "thrown": (r"thr[oe]w|toss", "thrown in an arc", "is thrown in an arc"),
    "colliding": (r"collid|\bhit|bump", "colliding with a {other}", "collides with a {other}"),
    "zigzag": (r"zig-?\s?zag", "zigzagging", "zigzags"),
    "crossing": (r"\bcross", "crossing a {other}", "crosses a {other}"),
    "growing": (r"grow|larger|bigger", "growing", "grows"),
    "shrinking": (r"shrink|smaller", "shrinking", "shrinks"),
    "still": (r"still|not mov|motionless|static", "standing still", "stands still"),
}
TEMPLATES = ("a {named} {ing}", "a {named} {does}", "the video shows a {named}, it {does}",
             "there is a {named} {ing}", "{named}, {ing}")
ADVERBS = {None: "", "slow": " slowly", "fast": " quickly"}
SPEEDS = tuple(ADVERBS)

# Two of the 24 looks of each motion are never the named object of a training clip.
# Does the model compose what it saw apart?
LOOKS = [(color, shape) for color in COLORS for shape in SHAPES]
HELD_OUT = set()
for m, motion in enumerate(MOTIONS):
    for n, look in enumerate(LOOKS):
        if (n + 5 * m) % 12 == 0:
            HELD_OUT.add((*look, motion))


def pick(rng, values):
    return values[rng.integers(len(values))]


def draw_look(rng, unlike=None):
    """A colour and a shape, not of the colour of `unlike`."""
    colors = [color for color in COLORS if unlike is None or color != unlike["color"]]
    return {"color": pick(rng, colors), "shape": pick(rng, SHAPES)}


def draw_words(rng, split, basic=0.5, motion=None):
    """What a caption says: kind, motion, speed, objects (the named one first), and its template.
    Where no motion is given it is drawn; `basic` is the share of that kind."""
    if motion is None:
        kind = "basic" if rng.random() < basic else pick(rng, list(KINDS)[1:])
        motion = pick(rng, KINDS[kind])
    objects = [draw_look(rng)]
    while split == "train" and (*objects[0].values(), motion) in HELD_OUT:
        objects = [draw_look(rng)]
    if motion in PAIRED:
        objects.append(draw_look(rng, objects[0]))
    speed = pick(rng, SPEEDS) if motion in DIRECTIONS else None
    template = int(rng.integers(len(TEMPLATES)))
    return dict(kind=MOTIONS[motion], motion=motion, speed=speed, objects=objects,
                template=template)


def caption(words):
    """The sentence of words, or of a spec: at most 64 bytes. `parse` is its inverse."""
    motion, _, turn = words["motion"].partition(" ")
    adverb = ADVERBS[words["speed"]]
    if motion in DIRECTIONS:
        to_the = "to the " if motion in ("left", "right") else ""
        ing = f"moving{adverb} {motion}"
        does = f"moves{adverb} {to_the}{motion}"
    else:
        _, ing, does = PHRASES[motion]
    names = [f"{look['color']} {look['shape']}" for look in words["objects"]]
    texts = []
    for template in TEMPLATES:
        text = template.format(named=names[0], ing=ing, does=does)
        texts.append(text.format(other=names[-1], turn=turn))
    short = [text for text in texts if len(text) <= 64]     # a byte is a token of the text encoder
    return short[words["template"] % len(short)]


def parse(text):
    """The words of a caption, ours or freely typed. ValueError where no coloured shape, motion or
    sense of turning can be read."""
    low = " ".join(text.lower().split())
    look = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b"
    objects = [{"color": color, "shape": shape} for color, shape in re.findall(look, low)]
    low = re.sub(look, "it", low)           # a cross is a shape, crossing is a motion
    found = [name for name, row in PHRASES.items() if re.search(row[0], low)]
    straight = [way for way in ("up", "down", "left", "right") if re.search(rf"\b{way}", low)]
    motion = found[0] if found else "-".join(straight)
    if motion in ("orbiting", "spinning") and "clockwise" in low:
        motion += " counter-clockwise" if re.search("counter|anti", low) else " clockwise"
    speed = None
    if "slow" in low:
        speed = "slow"
    elif "fast" in low or "quick" in low:
        speed = "fast"

    missing = None
    if not objects:
        missing = (f"object: expected a colour ({', '.join(COLORS)}) and, right after it, "
                   f"a shape ({', '.join(SHAPES)})")
    elif motion in ("orbiting", "spinning"):
        missing = "sense of turning: expected clockwise or counter-clockwise"
    elif motion not in MOTIONS:
        missing = f"motion: expected one of {', '.join(MOTIONS)}"
    if missing:
        raise ValueError(f"prompt {text!r} names no {missing}, as in 'a red square moving right'")
    actors = 2 if motion in PAIRED else 1   # whatever else is named takes no part
    return dict(kind=MOTIONS[motion], motion=motion, speed=speed, objects=objects[:actors],
                template=0)


def fixed_prompts(motions, count):
    """`count` captions over the motions in turn, no random numbers; every other round of them
    is made of held-out triples."""
    colors = list(COLORS)
    prompts = []
    for n in range(count):
        turn, m = divmod(n, len(motions))
        motion = motions[m]
        unseen = [look for look in LOOKS if (*look, motion) in HELD_OUT]
        seen = [look for look in LOOKS if look not in unseen]
        color, shape = seen[(7 * turn + 5 * m) % len(seen)]
        if turn % 2 == 0:
            color, shape = unseen[turn // 2 % 2]
        objects = [{"color": color, "shape": shape}]
        if motion in PAIRED:
            other = colors[(colors.index(color) + 1 + n % 5) % 6]
            objects.append({"color": other, "shape": SHAPES[(turn + m) % len(SHAPES)]})
        speed = SPEEDS[(turn + m) % 3]
        words = dict(motion=motion, speed=speed, objects=objects, template=turn + m)
        prompts.append(caption(words))
    return prompts


PROMPTS = []
for motions in KINDS.values():
    PROMPTS += fixed_prompts(motions, 32)
STRAIGHT = fixed_prompts(list(DIRECTIONS), 64)      # eight of each direction


def straight_prompts(split, count=64):
    """Captions of straight lines. "test": STRAIGHT. "val", on which settings are chosen: others."""
    if split == "test":
        return STRAIGHT[:count]
    rng = np.random.default_rng(SPLITS.index(split))
    prompts = []
    while len(prompts) < count:
        motion = list(DIRECTIONS)[len(prompts) % 8]
        prompt = caption(draw_words(rng, split, motion=motion))
        if prompt not in STRAIGHT + prompts:
            prompts.append(prompt)
    return prompts


# -------------------------------------------------------------------------------------------------
# Paths: a function per motion -> the centres of its objects, (T+1, 2) px each, the named one first.
# Only their course counts: `poses` shifts them into the picture.

TOP_SPEED = 5 / 64                          # picture sides per frame
PACE = {"slow": (0.3, 0.45), "fast": (0.7, 1.0), None: (0.3, 1.0)}      # shares of the top speed
RESTITUTION = 0.75                          # speed after a bounce / speed before it
RIGHT = DIRECTIONS["right"]
DOWN = DIRECTIONS["down"]
AXES = (RIGHT, DOWN, -RIGHT, -DOWN)


class Space:
    """What a path is made of: the time, the room, the pace of a clip, and chance."""

    def __init__(self, motion, radii, pace, frames, box, rng):
        self.motion = motion
        self.radii = radii                                  # (A,) px
        self.pace = pace                                    # the clip's share of the top speed
        self.box = box                                      # width and height of the picture
        self.rng = rng
        self.t = np.arange(frames + 1.0)[:, None]           # (T+1, 1) frame numbers
        self.steps = max(frames - 1, 1)                     # between the T shown frames
        self.top_speed = TOP_SPEED * box.min()              # px per frame
        self.turn = -1 if "counter" in motion else 1
        self.reach = radii
        if motion.startswith("spinning"):
            self.reach = 1.25 * radii                       # corners swing round
        if motion in ZOOMS:
            self.reach = (1 + pace) * radii
        self.room = np.maximum(box - 2 * self.reach.max(), 0.2 * box.min())     # for a centre

    def speed(self, way):
        """In px per frame: the top speed, or what crosses the room in the clip, times the pace."""
        crossing = self.room / np.maximum(np.abs(way), 1e-9) / self.steps
        return self.pace * min(self.top_speed, crossing.min())

    def travel(self, way):
        """The path of constant speed, (T+1, 2)."""
        return self.speed(way) * self.t * way


def straight(space):
    """What spins, grows or stands still stays at its place."""
    return [space.travel(DIRECTIONS.get(space.motion, 0 * RIGHT))]

def zigzag(space):
    """Ahead at constant speed, to and fro across it in four legs."""
    ahead = pick(space.rng, AXES)
    aside = ahead[::-1]
    legs = 2 * space.t / space.steps
    wave = np.abs(2 * (legs % 1) - 1)                                   # 1, 0, 1, 0, 1
    swing = space.speed(aside) * space.steps / 4
    aside = pick(space.rng, (-aside, aside))
    return [0.7 * space.travel(ahead) + swing * wave * aside]

def crossing(space):
    """Head on or at a right angle, nearly meeting in the middle of the clip."""
    ahead = pick(space.rng, AXES)
    aside = ahead[::-1]
    aside = pick(space.rng, (-aside, aside))
    way = pick(space.rng, (-ahead, aside))
    miss = 0.3 * space.radii[0] * space.rng.uniform(-1, 1)
    since = space.t - space.steps / 2
    named = space.speed(ahead) * since * ahead
    other = space.speed(way) * since * way + miss * aside
    return [named, other]

def orbiting(space):
    """Around a partner at rest, at constant speed."""
    radius = min(1.1 * space.radii.sum() + 1, space.room.min() / 2)
    sweep = min(2 * math.pi, space.top_speed * space.steps / radius)    # of the whole clip
    rate = space.turn * space.pace * sweep / space.steps
    angle = space.rng.uniform(0, 2 * math.pi) + rate * space.t
    around = np.hstack([np.cos(angle), np.sin(angle)])                  # (T+1, 2)
    return [radius * around, 0 * around]

def falling(space):
    """From rest: y = g t^2 / 2."""
    return [space.speed(DOWN) / space.steps * space.t**2 * DOWN]

def thrown(space):
    """A parabola whose top is near the middle of the clip."""
    top = space.rng.uniform(0.45, 0.6) * space.steps
    height = space.speed(DOWN) * space.steps / 1.5
    across = pick(space.rng, (-RIGHT, RIGHT))
    below = height * (space.t / top - 1) ** 2
    return [space.travel(across) + below * DOWN]

def bouncing(space):
    """Dropped, it meets the floor at frame `hit`. Each flight is a parabola that is below the
    floor outside its own time, so that the highest one is the path."""
    hit = space.rng.uniform(0.25, 0.35) * space.steps
    height = space.pace * min(space.room[1], 0.75 * space.top_speed * hit)
    half_g = height / hit**2
    start = -hit                            # as if it had been thrown up before the clip
    speed = 2 * half_g * hit                # upwards, at the start of a flight
    flights = []
    for _ in range(8):
        since = space.t - start
        flights.append(speed * since - half_g * since**2)
        start += speed / half_g
        speed *= RESTITUTION
    across = pick(space.rng, (-RIGHT, RIGHT))
    above = np.max(flights, axis=0)                                     # (T+1, 1)
    return [0.3 * space.travel(across) - above * DOWN]

def colliding(space):
    """Equal masses on a line: when they touch, they exchange their velocities."""
    ahead = pick(space.rng, AXES)
    hit = space.rng.uniform(0.4, 0.6) * space.steps
    contact = space.radii.sum()             # the distance of the centres when they touch
    room = max(np.abs(ahead) @ space.room - contact, 0.2 * space.top_speed * space.steps)
    fast = space.pace * min(space.top_speed, room / (1.2 * space.steps))
    slow = -fast * pick(space.rng, (0.0, space.rng.uniform(0.3, 1.0)))  # the other rests or comes
    before = np.minimum(space.t - hit, 0)
    after = np.maximum(space.t - hit, 0)
    named = fast * before + slow * after
    other = contact + slow * before + fast * after
    return [named * ahead, other * ahead]

PATHS = {"zigzag": zigzag, "crossing": crossing, "orbiting": orbiting, "falling": falling,
         "thrown": thrown, "bouncing": bouncing, "colliding": colliding}


def poses(space):
    """(x, y, angle, scale) of each object, (T+1, 4). Paths are shifted at random, within the
    picture where it has room for them."""
    path = PATHS.get(space.motion.split()[0], straight)
    paths = np.stack(path(space))           # (A, T+1, 2)
    shown = paths[:, :-1]                   # the last pose is only for the last frame's flow
    reach = space.reach[:, None]
    least = (shown.min(1) - reach).min(0)
    most = (shown.max(1) + reach).max(0)
    spare = space.box - (most - least)
    share = space.rng.random(2)
    if space.motion == "bouncing":
        share[1] = 1                        # the floor is the lower edge of the picture
    paths = paths - least - 0.5 + spare * np.where(spare > 0, share, 0.5)

    angle = np.zeros_like(space.t)
    scale = np.ones_like(space.t)
    progress = space.t / space.steps
    if space.motion.startswith("spinning"):
        rate = min(math.pi / 8, 1.5 * math.pi / space.steps)    # 90 degrees may look like none
        start = space.rng.uniform(0, 2 * math.pi)
        angle = start + space.turn * space.pace * rate * space.t
    if space.motion == "growing":
        scale = (1 + space.pace) ** progress
    if space.motion == "shrinking":
        scale = (1 + space.pace) ** (1 - progress)
    return [np.hstack([path, angle, scale]) for path in paths]


def complete(words, frames, height, width, rng, texture=0.0, size=1.0):
    """Words -> a spec, JSON-able: objects with T+1 poses (x, y, angle, scale) each, their order
    from back to front, the background. The pose after the T frames is for the last flow."""
    motion = words["motion"]
    side = size * min(height, width)
    if motion in ZOOMS:
        side *= 0.75                        # growth needs room
    looks = list(words["objects"])
    if motion in PAIRED:
        side *= 0.6                         # so do two
        if len(looks) == 1:                 # a prompt may not name the other
            looks.append(draw_look(rng, looks[0]))
    objects = []
    for look in looks:
        radius = side * rng.uniform(0.16, 0.24)
        pattern = pick(rng, list(PATTERNS))
        angle = rng.uniform(0, 2 * math.pi)
        objects.append(dict(look, radius=radius, pattern=pattern, pattern_angle=angle))
    if motion == "colliding":
        objects[1]["radius"] = objects[0]["radius"]         # equal masses

    speed = words["speed"]
    if speed is None and words["kind"] != "basic":
        speed = "fast"
    pace = rng.uniform(*PACE[speed])
    radii = np.array([o["radius"] for o in objects])
    space = Space(motion, radii, pace, frames, np.array([width, height]), rng)
    for o, pose in zip(objects, poses(space)):
        o["pose"] = pose.tolist()
    order = [1, 0] if motion in PAIRED else [0]             # the named object in front
    if motion == "crossing" and rng.random() < 0.5:
        order = [0, 1]
    background = dict(texture=texture, seed=int(rng.integers(2**31)))
    background["level"] = rng.uniform(0.6, 0.85)
    background["light"] = rng.uniform(-0.25, 0.25, 2).tolist()
    background["tint"] = rng.uniform(-0.04, 0.04, 3).tolist()
    return dict(words, objects=objects, order=order, background=background)


# -------------------------------------------------------------------------------------------------
# Pixels and flow


def flow_between(specs, i, j, height, width, device="cpu"):
    """How far the pixels of frames i are by frames j, exactly: (B, 2, n, H, W) px."""
    return draw(specs, i, j, height, width, device)[1]


def draw(specs, i, j, height, width, device="cpu"):
    """The specs' frames i (B, 3, n, H, W), painted from back to front, and the flow from each to
    its frame of j (B, 2, n, H, W) px. A: the clips that have an object in a layer."""
    video = draw_background(specs, height, width, device).repeat(1, 1, len(i), 1, 1)
    flow = torch.zeros_like(video[:, :2])
    columns = torch.arange(width, device=device)                        # (W,)
    lines = torch.arange(height, device=device)[:, None]                # (H, 1)
    for layer in range(max(len(spec["order"]) for spec in specs)):
        rows = [row for row, spec in enumerate(specs) if layer < len(spec["order"])]
        objects = []
        for row in rows:
            k = specs[row]["order"][layer]
            objects.append(specs[row]["objects"][k])

        def numbers(key):
            return torch.tensor([o[key] for o in objects], device=device)

        poses = numbers("pose")[..., None, None]                        # (A, T+1, 4, 1, 1)
        x, y, angle, scale = poses[:, list(i)].unbind(2)                # (A, n, 1, 1)
        x2, y2, angle2, scale2 = poses[:, list(j)].unbind(2)
        dx = columns - x                                                # (A, n, 1, W)
        dy = lines - y                                                  # (A, n, H, 1)

        # Into the shape's own frame, R^-1 S^-1 (p - c). Outline and pattern live there.
        radius = scale * numbers("radius").view(-1, 1, 1, 1)
        own = rotate(dx / radius, dy / radius, -angle)                  # (A, n, H, W)
        inside = coverage([SDF[o["shape"]] for o in objects], *own, radius)
        angle_of_pattern = angle + numbers("pattern_angle").view(-1, 1, 1, 1)
        own = rotate(dx / radius, dy / radius, -angle_of_pattern)
        dark = coverage([PATTERNS[o["pattern"]] for o in objects], *own, radius)
        paint = torch.tensor([COLORS[o["color"]] for o in objects], device=device)
        paint = paint.view(-1, 3, 1, 1, 1)
        color = 2 * paint * (1 - 0.35 * dark) - 1                       # darker, of the same hue
        video[rows] = torch.lerp(video[rows], color, inside)

        # Out of it again in frame j: R_j S_j S_i^-1 R_i^-1 (p - c_i) + c_j - p.
        cos = scale2 / scale * torch.cos(angle2 - angle)
        sin = scale2 / scale * torch.sin(angle2 - angle)
        of_columns = torch.stack([cos * dx + x2 - columns, sin * dx], dim=1)
        of_lines = torch.stack([-sin * dy, cos * dy + y2 - lines], dim=1)
        flow[rows] = torch.where(inside > 0.5, of_columns + of_lines, flow[rows])
    return video, flow


def coverage(distances, x, y, radius):
    """How much of each pixel is inside, 0 to 1: edges are one pixel wide. (A, 1, n, H, W)."""
    rows = [distance(x[row], y[row]) for row, distance in enumerate(distances)]
    return (0.5 - radius * torch.stack(rows)).clamp(0, 1)[:, None]


def rotate(x, y, angle):
    cos, sin = torch.cos(angle), torch.sin(angle)
    return cos * x - sin * y, sin * x + cos * y


def draw_background(specs, height, width, device):
    """Light grey, plus `texture` times a ramp of light and noise, tinted: (B, 3, 1, H, W)."""
    grounds = [spec["background"] for spec in specs]

    def numbers(key):
        values = torch.tensor([ground[key] for ground in grounds], device=device)
        return values.float().view(len(grounds), -1, 1, 1)

    side = min(height, width)
    x = torch.arange(width, device=device) / side - 0.5                 # (W,)
    y = torch.arange(height, device=device)[:, None] / side - 0.5       # (H, 1)
    light = numbers("light")
    texture = numbers("texture")
    rough = 2 * (light[:, :1] * x + light[:, 1:] * y) - 0.2             # (B, 1, H, W)
    if any(ground["texture"] for ground in grounds):
        rough = rough + smooth_noise([ground["seed"] for ground in grounds], x, y)
    grey = (numbers("level") + texture * rough).clamp(0.08, 0.92)
    rgb = grey * (1 + texture * numbers("tint"))                        # (B, 3, H, W)
    return 2 * rgb[:, :, None] - 1


def smooth_noise(seeds, x, y):
    """Noise at three scales, each seed its own, at the places x (W,), y (H, 1): (B, 1, H, W)."""
    on = "cpu" if x.device.type == "mps" else x.device      # mps has no bicubic sampling
    grids = [np.random.default_rng(seed).uniform(-1, 1, (3, 16, 16)) for seed in seeds]
    grids = torch.tensor(np.stack(grids), dtype=torch.float32, device=on)
    places = torch.stack(torch.broadcast_tensors(x, y), dim=-1)         # (H, W, 2)
    places = places.expand(len(seeds), -1, -1, -1).to(on)
    noise = 0
    for scale, (amount, cells) in enumerate(((0.4, 3), (0.25, 6), (0.15, 12))):
        noise = noise + amount * F.grid_sample(
            grids[:, scale:scale + 1], places * cells * 2 / 15, mode="bicubic",
            padding_mode="reflection", align_corners=True)
    return noise.to(x.device)


class MovingShapes:
    """The embedded world: [i] is a dict of video (3, T, H, W), flow (2, T, H, W), caption, spec.
    A pure function of (seed, split, i): any worker, rank or resumed run makes the same clip."""
    count = 0                               # endless

    def __init__(self, frames, height, width, seed=0, split="train",
                 texture=0.0, size=1.0, basic=0.5):
        self.shape = (frames, height, width)
        self.key = [seed, SPLITS.index(split)]
        self.split = split
        self.texture = texture
        self.size = size
        self.basic = basic

    def spec(self, i):
        """The spec of clip i, without its pixels."""
        rng = np.random.default_rng([*self.key, i])
        words = draw_words(rng, self.split, self.basic)
        return complete(words, *self.shape, rng, self.texture, self.size)

    def __getitem__(self, i):
        return {key: values[0] for key, values in self.batch([i]).items()}

    def read(self, indices):
        """What `render` needs of these clips."""
        return [self.spec(i) for i in indices]

    def render(self, specs, device="cpu"):
        """Clips as a dict: video (B, 3, T, H, W), flow (B, 2, T, H, W), lists caption and spec."""
        return self.clips(specs, [caption(spec) for spec in specs], device)

    def batch(self, indices, device="cpu"):
        """`read`, then `render`."""
        return self.render(self.read(indices), device)

    def of_prompts(self, prompts, device="cpu"):
        """A true clip of each prompt, as `batch` gives them. What the words leave open is drawn."""
        specs = []
        for n, prompt in enumerate(prompts):
            rng = np.random.default_rng([*self.key, 1, n])
            specs.append(complete(parse(prompt), *self.shape, rng, self.texture, self.size))
        return self.clips(specs, list(prompts), device)

    def clips(self, specs, captions, device):
        frames, height, width = self.shape
        following = range(1, frames + 1)
        video, flow = draw(specs, range(frames), following, height, width, device)
        return dict(video=video, flow=flow, caption=captions, spec=specs)

    def prompts(self):
        """Held-out prompts to look at, one of each kind of motion."""
        return PROMPTS[0::33]


def open_data(config, split="train", device="cpu"):
    """The config's clips: the embedded world, or the folder data.root with its flow in <run>/flow.
    FileNotFoundError where there is no such folder."""
    root = config.data.root
    shape = (config.frames, config.height, config.width)
    if not root:
        return MovingShapes(*shape, config.seed, split, **config.world)
    if not Path(root).is_dir():             # before RAFT is fetched
        raise FileNotFoundError(f"found no folder {root}, expected videos: correct data.root")
    from videos import VideoFolder
    weights = config.flow.weights
    raft = common.broadcast(load_raft, None if weights else "large", weights or None).to(device)
    return VideoFolder(root, *shape, config.fps, Path(config.run, "flow"), raft)


# -------------------------------------------------------------------------------------------------
# Latents: what the DiT is trained on


# z = [x, d] (section 4.2)
@torch.no_grad()
def encode(config, tae, batch):
    """Clips -> z (B, 2C, T, H, W), each stream normalised by its own statistics."""
    rgb = flow_to_rgb(batch["flow"], config.flow.sigma)
    few = common.clips_at_once(config)
    z = []
    with common.autocast(config, rgb.device):
        for video, motion in zip(batch["video"].split(few), rgb.split(few)):
            z.append(torch.cat([tae.encode(video), tae.encode(motion, motion=True)], dim=1))
    return torch.cat(z)


@torch.no_grad()
def through_tae(config, tae, video, motion=False):
    """Clips (B, 3, T, H, W) encoded and decoded again, on the CPU."""
    clips = []
    device = tae.statistics.device
    for part in video.split(common.clips_at_once(config)):
        with common.autocast(config, device):
            z = tae.encode(part.to(device), motion)
            again = tae.decode(z, video.shape[2], motion)
        clips.append(again.float().clamp(-1, 1).cpu())
    return torch.cat(clips)


def chunks(start, stop, config):
    """The range start to stop in ranges of as many clips as are encoded at once."""
    n = common.clips_at_once(config)
    return [range(first, min(first + n, stop)) for first in range(start, stop, n)]


class Latents:
    """z (B, 2C, T, H, W) and captions of `count` clips, 0: endless: `read`, then `to_z`.
    From the run's files, which all ranks write first if need be; with data.cache=0 encoded when
    they are asked for. ValueError for files of other clips."""

    def __init__(self, config, tae, clips, device):
        self.config = config
        self.tae = tae
        self.clips = clips
        self.device = device
        self.count = clips.count or config.data.cache
        self.files = []                     # dicts of z and caption, the last may be short
        if config.data.cache:
            from videos import open_latents
            self.files = open_latents(config, tae, clips, device)

    def read(self, numbers):
        """-> z (B, 2C, T, H, W) float16 on the CPU, captions; without files: what the clips'
        `render` needs, None."""
        if not self.files:
            return self.clips.read(numbers), None
        z = []
        captions = []
        for n in numbers:
            k, row = divmod(n, len(self.files[0]["caption"]))
            z.append(self.files[k]["z"][row])
            captions.append(self.files[k]["caption"][row])
        return torch.stack(z), captions

    def to_z(self, got, captions):
        """What was read -> z (B, 2C, T, H, W) float on the device, captions."""
        if self.files:
            return common.to_device(got, self.device).float(), captions
        batch = self.clips.render(got, self.device)
        return encode(self.config, self.tae, batch), batch["caption"]


def main(arguments):
    config = common.load_config(arguments)
    clips = MovingShapes(
        config.frames, config.height, config.width, config.seed, "test", **config.world)
    prompts = {parse(prompt)["motion"]: prompt for prompt in PROMPTS}   # one of every motion
    batch = clips.of_prompts(prompts.values())
    motion = flow_to_rgb(batch["flow"], config.flow.sigma)
    pairs = torch.stack([batch["video"], motion], dim=1)                # (B, 2, 3, T, H, W)
    common.write_sheet("world.png", pairs.flatten(0, 1))
    print(*batch["caption"], "world.png: each clip over its optical flow (Eq. 5)", sep="\n")


if __name__ == "__main__":
    common.command_line(main, __doc__, keys=True)
