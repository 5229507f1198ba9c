"""What the model sees: the embedded world of moving shapes with its exact optical flow, or a folder of real videos.

VideoJAM was trained on O(100 M) captioned videos whose flow RAFT estimated (section 4, appendix C). `MovingShapes`
stands in for them: no download, infinite, exact. Its four kinds of motion bear the names of VideoJAM-bench.
videos.py's `VideoFolder` reads your own clips, and has their flow estimated once.

    python data.py [key=value]      writes world.png: clips of every kind, a row of frames over a row of flow pictures (Eq. 5)
    python data.py data.root=videos flow.weights=raft_small.pth     the same of your own clips, folder.png
    torchrun --nproc_per_node=2 data.py run=runs/mine data.root=videos      with run=: the latents of every clip, for a run whose TAE
                                    is trained, into <run>/latents, where train.py finds them; start it again if it was interrupted

Letters: B clips, b of them that are drawn together, T frames, H height, W width, A actors (objects whose motion is named).
Pixel centres are whole numbers, x to the right, y down, so that a growing angle turns clockwise on the screen. Videos lie
in [-1, 1], optical flow is in pixels per frame.
"""

import itertools
import json
import math
import os
import re
import sys
import zlib
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import build_tae, build_text, checksum, find_device, flatten, load_config, load_into, read_config, read_weights, save
from flow import flow_to_rgb, load_raft

# ---------------------------------------------------------------------------------------------------------------------
# The vocabulary

# 60 degrees of hue apart, in the order of the colour circle: the nearest hue names even a dark or blurred pixel.
COLORS = {"red": (0.9, 0.1, 0.1), "yellow": (0.9, 0.9, 0.1), "green": (0.1, 0.9, 0.1),
          "cyan": (0.1, 0.9, 0.9), "blue": (0.1, 0.1, 0.9), "magenta": (0.9, 0.1, 0.9)}
SHAPES = ("circle", "square", "triangle", "cross")
SPLITS = ("train", "val", "test")
DIRECTIONS = {"right": (1, 0), "down-right": (1, 1), "down": (0, 1), "down-left": (-1, 1),
              "left": (-1, 0), "up-left": (-1, -1), "up": (0, -1), "up-right": (1, -1)}
DIRECTIONS = {name: np.array(d) / math.hypot(*d) for name, d in DIRECTIONS.items()}
TURNS = ("clockwise", "counter-clockwise")
PACE = {"slow": (0.3, 0.45), "fast": (0.7, 1.0), None: (0.3, 1.0)}  # shares of the top speed: slow is never fast
RESTITUTION = 0.75  # speed after a bounce / speed before it

# motion: (kind, the phrase after "a red square", the phrase after "it"); {other} is the second object of the motion
MOTIONS = {
    **{d: ("basic", f"moving{{adv}} {d}", f"moves{{adv}} {'' if d[0] in 'ud' else 'to the '}{d}") for d in DIRECTIONS},
    "still": ("basic", "standing still", "stands still"),
    "zigzag": ("complex", "zigzagging", "zigzags"),
    "crossing": ("complex", "crossing a {other}", "crosses a {other}"),
    "growing": ("complex", "growing", "grows"),
    "shrinking": ("complex", "shrinking", "shrinks"),
    **{f"spinning {t}": ("rotational", f"spinning {t}", f"spins {t}") for t in TURNS},
    **{f"orbiting {t}": ("rotational", f"orbiting a {{other}} {t}", f"orbits a {{other}} {t}") for t in TURNS},
    "falling": ("physics", "falling", "falls"),
    "thrown": ("physics", "thrown in an arc", "is thrown in an arc"),
    "bouncing": ("physics", "bouncing on the floor", "bounces on the floor"),
    "colliding": ("physics", "colliding with a {other}", "collides with a {other}"),
}
KINDS = {kind: [m for m in MOTIONS if MOTIONS[m][0] == kind] for kind in ("basic", "complex", "rotational", "physics")}
PAIRED = [m for m in MOTIONS if "{other}" in MOTIONS[m][1]]
TEMPLATES = ("a {named} {ing}", "a {named} {does}", "the video shows a {named}, it {does}", "there is a {named} {ing}", "{named}, {ing}")

# Two of the 24 (colour, shape) pairs of each motion are never the named object of a training clip: does the model
# compose what it saw apart?
LOOKS = list(itertools.product(COLORS, SHAPES))
HELD_OUT = {(*look, motion) for m, motion in enumerate(MOTIONS) for n, look in enumerate(LOOKS) if (n + 5 * m) % 12 == 0}

# ---------------------------------------------------------------------------------------------------------------------
# Words: drawing them, saying them, reading them


def draw_words(rng, split, texture, basic=0.5):
    """What a caption can say: kind, motion, speed, objects (the named one first), camera. `basic` is that kind's share."""
    kind = "basic" if rng.random() < basic else ("complex", "rotational", "physics")[rng.integers(3)]
    motion = KINDS[kind][rng.integers(len(KINDS[kind]))]
    basic, objects = kind == "basic", [_draw_object(rng)]
    while split == "train" and (*objects[0].values(), motion) in HELD_OUT:
        objects = [_draw_object(rng)]
    speed = (None, "slow", "fast")[rng.integers(3)] if motion in DIRECTIONS else None
    objects += [_draw_object(rng, objects)] if motion in PAIRED else []
    bystander = (motion in DIRECTIONS or motion in PAIRED) and rng.random() < (0.1 if basic else 0.05)
    objects += [_draw_object(rng, objects)] if bystander else []
    pans = texture > 0 and not basic and not bystander and rng.random() < 0.15
    camera = ("left", "right")[rng.integers(2)] if pans else None
    template = int(rng.integers(len(TEMPLATES)))
    return dict(kind=kind, motion=motion, speed=speed, objects=objects, camera=camera, template=template)


def _draw_object(rng, others=()):
    colors = [c for c in COLORS if c not in [o["color"] for o in others]]
    return {"color": colors[rng.integers(len(colors))], "shape": SHAPES[rng.integers(len(SHAPES))]}


def caption(spec):
    """The sentence of a spec, or of words: at most 64 bytes, 96 with a bystander or a pan. `parse` is its inverse."""
    names = [f"{o['color']} {o['shape']}" for o in spec["objects"]]
    words = {"adv": {"slow": " slowly", "fast": " quickly", None: ""}[spec["speed"]], "other": names[1:] and names[1]}
    ing, does = (phrase.format(**words) for phrase in MOTIONS[spec["motion"]][1:])
    says = [template.format(named=names[0], ing=ing, does=does) for template in TEMPLATES]
    says = [s for s in says if len(s) <= 64]  # a byte is a token of the text encoder: too long a template gives way
    bystanders = names[2 if spec["motion"] in PAIRED else 1:]
    camera = camera_word(spec.get("camera"))
    return (says[spec.get("template", 0) % len(says)] + "".join(f" past a still {name}" for name in bystanders)
            + (f", camera panning {camera}" if camera else ""))


def camera_word(camera):
    """The word for a spec's pan [u, v] px per frame (the picture flows against it); None if there is none."""
    if camera is None or isinstance(camera, str):
        return camera
    return next((d for d in ("left", "right", "up", "down") if any(camera) and np.dot(camera, DIRECTIONS[d]) < 0), None)


READ = {  # tried in order, on a text whose named objects have become "it"
    "orbiting": r"orbit|circling|circles|around (a|the) it", "spinning": r"spin|rotat|turn", "bouncing": r"bounc",
    "falling": r"\bfall|drop", "thrown": r"thr[oe]w|toss", "colliding": r"collid|\bhit|bump", "zigzag": r"zig-?\s?zag",
    "crossing": r"\bcross", "growing": r"grow|larger|bigger", "shrinking": r"shrink|smaller",
    "still": r"still|not mov|motionless|static"}


def parse(text):
    """The words of a caption, ours or freely typed: a dict of kind, motion, speed, objects (named first) and camera.
    ValueError where no colour, shape, motion or sense of turning can be read."""
    def need(found, what, expected):
        if not found:
            raise ValueError(f"prompt {text!r} names no {what}: expected {expected}, as in 'a red square moving right'")

    low = " ".join(text.lower().replace("counterclockwise", "counter-clockwise").split())
    need(re.search("|".join(COLORS), low), "colour", f"one of {', '.join(COLORS)}")
    need(re.search("|".join(SHAPES), low), "shape", f"one of {', '.join(SHAPES)}")
    named = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b"
    objects = [{"color": c, "shape": s} for c, s in re.findall(named, low)]
    need(objects, "object", "a colour and, right after it, a shape")
    pan = re.search(r"camera (?:is )?pan\w*(?: to the)? (left|right|up|down)", low)
    low = low.replace(pan[0], "") if pan else low
    low = re.sub(named, "it", re.sub(rf"past (a )?still {named}", "", low))  # a cross is a shape, crossing is a motion
    straight = "-".join(sorted(set(re.findall(r"\b(up|down|left|right)", low)), key="up down left right".find))
    motion = next((m for m, pattern in READ.items() if re.search(pattern, low)), straight)
    if motion in ("orbiting", "spinning"):
        need("clockwise" in low, "sense of turning", "clockwise or counter-clockwise")
        motion += " " + TURNS[bool(re.search("counter|anti", low))]
    need(motion in MOTIONS, "motion", f"one of {', '.join(MOTIONS)}")
    speed = "slow" if "slow" in low else "fast" if re.search("fast|quick", low) else None
    return dict(kind=MOTIONS[motion][0], motion=motion, speed=speed, objects=objects, camera=pan[1] if pan else None)


def _fixed_prompts(motions, count):
    """`count` prompts over the motions in turn, no random numbers; every other round is made of held-out triples."""
    prompts, colors = [], list(COLORS)
    for n in range(count):
        turn, m = divmod(n, len(motions))
        unseen, seen = ([look for look in LOOKS if ((*look, motions[m]) in HELD_OUT) == held] for held in (True, False))
        color, shape = unseen[turn // 2 % 2] if turn % 2 == 0 else seen[(7 * turn + 5 * m) % len(seen)]
        other = {"color": colors[(colors.index(color) + 1 + n % 5) % 6], "shape": SHAPES[(turn + m) % 4]}
        prompts.append(caption({
            "motion": motions[m], "speed": (None, "slow", "fast")[(turn + m) % 3], "template": turn + m,
            "objects": [{"color": color, "shape": shape}, other][:2 if motions[m] in PAIRED else 1]}))
    return prompts


PROMPTS = [prompt for kind in KINDS for prompt in _fixed_prompts(KINDS[kind], 32)]
STRAIGHT = _fixed_prompts(list(DIRECTIONS), 64)  # eight per direction: for the share of clips that move the right way

# ---------------------------------------------------------------------------------------------------------------------
# From words to a spec: sizes, paths, background


def complete(words, frames, height, width, rng, texture=0.0, size=1.0):
    """A full spec (JSON-able) of parsed words, the rest drawn from `rng`: each object's T+1 poses (x, y, angle, scale), the drawing order,
    the camera's flow [u, v], the background. The named object stays in the picture for T frames; the pose after them is for the last flow."""
    motion, n, side, box = words["motion"], max(frames - 1, 1), min(height, width), np.array([width, height])
    t, objects = np.arange(frames + 1.0), [dict(o) for o in words["objects"]]
    if motion in PAIRED and len(objects) < 2:
        objects.append(_draw_object(rng, objects))
    actors = 2 if motion in PAIRED else 1
    for k, o in enumerate(objects):  # two actors need room to move, and so does growth
        share = 0.6 if actors == 2 or k > 0 else 0.75 if motion in ("growing", "shrinking") else 1.0
        o["radius"] = float(size * side * share * rng.uniform(0.16, 0.24))
        o["pattern"], o["pattern_angle"] = list(PAINT)[rng.integers(len(PAINT))], float(rng.uniform(0, 2 * math.pi))
    if motion == "colliding":
        objects[1]["radius"] = objects[0]["radius"]  # equal masses
    pace = rng.uniform(*PACE[words["speed"] or (None if words["kind"] == "basic" else "fast")])
    camera = -DIRECTIONS[words["camera"]] * rng.uniform(0.15, 0.25) * side / n if words.get("camera") else np.zeros(2)
    angle, scale = 0 * t, 0 * t + 1
    if motion.startswith("spinning"):  # at most 22.5 degrees a frame, far below the 90 at which a pattern repeats
        rate = pace * min(math.pi / 8, 1.5 * math.pi / n) * (-1 if "counter" in motion else 1)
        angle = rng.uniform(0, 2 * math.pi) + rate * t
    if motion in ("growing", "shrinking"):
        scale = (1 + pace) ** ((t if motion == "growing" else n - t) / n)

    # One shift for all actors: random where the picture leaves a choice, the middle where not, the floor for a bounce.
    reach = np.array([[o["radius"]] for o in objects[:actors]]) * scale[:frames].max() * (1.25 if angle.any() else 1)     # (A, 1)
    room = np.maximum(box - 2 * reach.max() - np.abs(camera) * n, 0.2 * side)
    paths = np.array(_paths(motion, objects, t, n, room.tolist(), 5 / 64 * side, pace, rng)) + camera * t[:, None]    # (A, T+1, 2)
    least, most = (paths[:, :frames].min(1) - reach).min(0), (paths[:, :frames].max(1) + reach).max(0)
    spare, share = box - (most - least), rng.random(2)
    if motion == "bouncing":
        share[1] = 1.0
    paths = list(paths - least - 0.5 + spare * np.where(spare > 0, share, 0.5))
    for o in objects[actors:]:  # a bystander stands behind, at the emptiest of a few places
        places = rng.uniform(o["radius"], box - o["radius"], (8, 2))
        gaps = [min(np.linalg.norm(path - place, axis=1).min() for path in paths) for place in places]
        paths.append(places[np.argmax(gaps)] + camera * t[:, None])
    for k, (o, path) in enumerate(zip(objects, paths)):
        o["pose"] = np.column_stack([path, angle, scale] if k == 0 else [path, 0 * t, 0 * t + 1]).tolist()

    order = list(range(len(objects)))[::-1]  # back to front: the named object last, but hidden in half of the crossings
    if motion == "crossing" and rng.random() < 0.5:
        order[-2:] = [0, 1]
    background = {"seed": int(rng.integers(2**31)), "level": float(rng.uniform(0.6, 0.85)), "texture": float(texture),
                  "light": rng.uniform(-0.25, 0.25, 2).tolist(), "tint": rng.uniform(-0.04, 0.04, 3).tolist()}
    return {"template": 0, **words, "objects": objects, "order": order, "camera": camera.tolist(), "background": background}


def _paths(motion, objects, t, n, room, cap, pace, rng):
    """The actors' paths, (T+1, 2) each, up to a common shift: n steps are shown, `room` px are free, `cap` px per frame is the top speed."""
    def speed(d):  # along d, by the cap or by the room there is
        return pace * min(cap, *(there / abs(along) / n for there, along in zip(room, d.tolist()) if along))

    t, still, down = t[:, None], np.zeros((len(t), 2)), DIRECTIONS["down"]
    ahead = list(DIRECTIONS.values())[2 * rng.integers(4)]  # where the words leave it open: right, down, left or up
    aside = ahead[::-1] * (-1, 1)[rng.integers(2)]
    across = DIRECTIONS["right"] * (-1, 1)[rng.integers(2)]
    if motion in DIRECTIONS:
        return [t * DIRECTIONS[motion] * speed(DIRECTIONS[motion])]
    if motion == "zigzag":  # four legs of a triangle wave
        return [0.7 * speed(ahead) * t * ahead + speed(aside) * n / 4 * np.abs(2 * (t / n * 2 % 1) - 1) * aside]
    if motion == "crossing":  # head on or at a right angle, the middles never quite on each other
        way, miss = (-ahead, aside)[rng.integers(2)], 0.3 * objects[0]["radius"] * rng.uniform(-1, 1)
        return [speed(ahead) * (t - n / 2) * ahead, speed(way) * (t - n / 2) * way + miss * aside]
    if motion.startswith("orbiting"):
        radius = min(1.1 * (objects[0]["radius"] + objects[1]["radius"]) + 1, min(room) / 2)
        sweep = pace * min(2 * math.pi, cap * n / radius) / n * (-1 if "counter" in motion else 1)
        phi = rng.uniform(0, 2 * math.pi) + sweep * t
        return [radius * np.hstack([np.cos(phi), np.sin(phi)]), still]
    if motion == "falling":  # from rest: y = g t^2 / 2
        return [speed(down) / n * t**2 * down]
    if motion == "thrown":  # the apex is at frame `top`
        top, height = rng.uniform(0.45, 0.6) * n, speed(down) * n / 1.5
        return [t * across * speed(across) + height * (t / top - 1) ** 2 * down]
    if motion == "bouncing":  # dropped, it meets the floor first at frame `hit`
        hit = rng.uniform(0.25, 0.35) * n
        height = pace * min(room[1], 0.75 * cap * hit)
        start, v, arcs = -hit, 2 * height / hit, []
        for _ in range(8):  # every flight is a parabola, below the floor outside its own time
            arcs.append(v * (t - start) - height / hit**2 * (t - start) ** 2)
            start, v = start + v * hit**2 / height, RESTITUTION * v
        return [t * across * 0.3 * speed(across) - np.max(arcs, 0) * down]
    if motion == "colliding":  # equal masses: along the line of impact they exchange their velocities
        hit, contact = rng.uniform(0.4, 0.6) * n, 2 * objects[0]["radius"]
        fast = pace * min(cap, max(np.abs(ahead) @ room - contact, 0.2 * cap * n) / (1.2 * n))
        slow = -fast * (0.0, rng.uniform(0.3, 1.0))[rng.integers(2)]
        before, after = np.minimum(t - hit, 0), np.maximum(t - hit, 0)
        return [(fast * before + slow * after) * ahead, (contact + slow * before + fast * after) * ahead]
    return [still]


# ---------------------------------------------------------------------------------------------------------------------
# From specs to pixels and flow. The only random numbers are the backgrounds' small grids, drawn on the CPU

SDF = {  # signed distance to the outline in radii, negative inside
    "circle": lambda x, y: torch.hypot(x, y) - 1,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.9,
    "triangle": lambda x, y: torch.maximum(y, 0.866 * x.abs() - 0.5 * y + 0.45) - 0.9,
    "cross": lambda x, y: torch.maximum(torch.maximum(x.abs(), y.abs()) - 1, torch.minimum(x.abs(), y.abs()) - 0.4),
}
PAINT = {  # the same for the dark parts of a pattern, so that a spin or a zoom can be seen
    "stripes": lambda x, y: 0.13 * torch.sin(7.5 * x + 0.8),
    "halves": lambda x, y: x,
    "dot": lambda x, y: torch.hypot(x - 0.35, y) - 0.4,
    "checker": lambda x, y: torch.minimum(x.abs(), y.abs()).copysign(x * y),
}


def render(specs, frames, height, width, device="cpu"):
    """The specs' video (B, 3, T, H, W) in [-1, 1] and its optical flow (B, 2, T, H, W) in pixels per frame."""
    return _draw(specs, range(frames), range(1, frames + 1), height, width, device)


def flow_between(specs, i, j, height, width, device="cpu"):
    """The exact displacement of frame i's pixels by frame j: (B, 2, H, W) px, or (B, 2, n, H, W) for n frames each."""
    flow = _draw(specs, np.atleast_1d(i).tolist(), np.atleast_1d(j).tolist(), height, width, device)[1]
    return flow[:, :, 0] if isinstance(i, int) else flow


def _draw(specs, i, j, height, width, device):
    """Frames i of every spec and the flow that takes them to frames j, painted back to front."""
    tensor = lambda values: torch.tensor(values, dtype=torch.float32, device=device)
    camera, i, j = tensor([s["camera"] for s in specs]), *(torch.tensor(list(f), device=device) for f in (i, j))     # (B, 2), (T,), (T,)
    video = _background(specs, camera, i, height, width)                                         # (B, 3, T, H, W)
    flow = (camera[..., None] * (j - i))[..., None, None].repeat(1, 1, 1, height, width)         # (B, 2, T, H, W)
    ys, xs = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)    # (H, 1), (W,)
    for k in range(max(len(s["order"]) for s in specs)):
        rows = [b for b, s in enumerate(specs) if k < len(s["order"])]                           # the b clips with one
        its = slice(None) if len(rows) == len(specs) else rows                                   # video[slice] is video itself, video[rows] a copy to put back
        objects = [specs[b]["objects"][specs[b]["order"][k]] for b in rows]
        poses = tensor([o["pose"] for o in objects])[..., None, None]                            # (b, T+1, 4, 1, 1)
        (cx, cy, a, s), (cx2, cy2, a2, s2) = (poses[:, frames].unbind(2) for frames in (i, j))         # (b, T, 1, 1)
        radius = tensor([o["radius"] for o in objects]).view(-1, 1, 1, 1) * s
        dx, dy = xs - cx, ys - cy                                                                # (b, T, H|1, W|1)

        # Into the shape's own frame, R^-1 S^-1 (p - c): outline and pattern live there; edges are one pixel wide.
        # Much is done in place: fresh memory takes longer than the arithmetic.
        dx1, dy1 = dx / radius, dy / radius
        drawn = lambda table, key, x, y: torch.stack([table[o[key]](*xy) for o, *xy in zip(objects, x, y)]).mul_(-radius).add_(0.5).clamp_(0, 1)
        inside = drawn(SDF, "shape", *_rotate(dx1, dy1, -a))                                     # (b, T, H, W)
        dark = drawn(PAINT, "pattern", *_rotate(dx1, dy1, -a - tensor([o["pattern_angle"] for o in objects]).view(-1, 1, 1, 1)))
        paint = tensor([COLORS[o["color"]] for o in objects]).view(-1, 3, 1, 1, 1)               # (b, 3, 1, 1, 1)
        # The dark parts have 65 % of the colour, so the hue stays: 2 (1 - 0.35 dark) paint - 1.
        video[its] = video[its].lerp_(2 * paint - 1, inside[:, None]).addcmul_(-0.7 * paint, dark.mul_(inside)[:, None])

        # R_j S_j S_i^-1 R_i^-1 (p - c_i) + c_j - p, the terms in x and those in y
        cos, sin = (s2 / s) * torch.cos(a2 - a), (s2 / s) * torch.sin(a2 - a)                    # (b, T, 1, 1)
        of_x = torch.stack([cos * dx + (cx2 - xs), sin * dx], 1)                                 # (b, 2, T, 1, W)
        of_y = torch.stack([-sin * dy, cos * dy + (cy2 - ys)], 1)                                # (b, 2, T, H, 1)
        covered = inside.round_()                                                                # 0 or 1; exactly a half is 0
        flow[its] = flow[its].lerp_(of_x + of_y, covered[:, None])
    return video, flow


def _rotate(x, y, angle):
    cos, sin = torch.cos(angle), torch.sin(angle)
    return cos * x - sin * y, sin * x + cos * y


def _background(specs, camera, at, height, width):
    """(B, 3, T, H, W): light grey plus `texture` times noise at three scales and a ramp of light; a pan moves it."""
    side, video = min(height, width), camera.new_empty(len(specs), 3, len(at), height, width)
    for moves in (False, True):  # a still background is made once for all its frames
        rows = [b for b, s in enumerate(specs) if any(s["camera"]) == moves]
        if not rows:
            continue
        its = slice(None) if len(rows) == len(specs) else rows                                       # a slice copies nothing
        ground = [specs[b]["background"] for b in rows]
        numbers = camera.new_tensor([[g["level"], g["texture"], *g["light"], *g["tint"]] for g in ground])[..., None, None, None]     # (b, 7, 1, 1, 1)
        level, texture, to_right, down = numbers[:, :4].unbind(1)                                    # (b, 1, 1, 1)
        pan = (camera[its][..., None] * (at if moves else 0 * at[:1]))[..., None, None]              # (b, 2, T|1, 1, 1)
        x = (torch.arange(width, device=at.device) - pan[:, 0]) / side - 0.5                         # (b, T, 1, W)
        y = (torch.arange(height, device=at.device)[:, None] - pan[:, 1]) / side - 0.5               # (b, T, H, 1)
        grey = 2 * (to_right * x + down * y) - 0.2                                                   # (b, T, H, W)
        if texture.any():  # nothing of it is left on a plain background
            grey = _add_noise(grey, ground, x, y)
        grey = (level + texture * grey).clamp(0.08, 0.92)[:, None]                                   # (b, 1, T, H, W)
        video[its] = 2 * grey * (1 + texture[:, None] * numbers[:, 4:]) - 1
    return video


def _add_noise(grey, ground, x, y):
    """grey (b, T, H, W) and noise at three scales, each background's own, at the places x (b, T, 1, W), y (b, T, H, 1): (b, T, H, W)."""
    on = "cpu" if grey.device.type == "mps" else grey.device       # mps has no bicubic sampling
    grids = np.stack([np.random.default_rng(g["seed"]).uniform(-1, 1, (3, 16, 16)) for g in ground])
    grids = torch.tensor(grids, dtype=grey.dtype, device=on)                                         # (b, 3, 16, 16)
    where = torch.stack(torch.broadcast_tensors(x, y), -1).flatten(1, 2).to(on)                      # (b, T H, W, 2)
    for n, (amount, cells) in enumerate(((0.4, 3), (0.25, 6), (0.15, 12))):
        noise = F.grid_sample(grids[:, n:n + 1], where * (cells * 2 / 15), mode="bicubic", padding_mode="reflection", align_corners=True)
        grey = grey + amount * noise.to(grey.device).view_as(grey)
    return grey


class MovingShapes:
    """The embedded world: ds[i] is a dict of video (3, T, H, W), flow (2, T, H, W), caption and spec.
    A pure function of (seed, split, i): any worker, rank or resumed run makes the same clip."""

    def __init__(self, frames, height, width, seed=0, split="train", texture=0.0, size=1.0, basic=0.5):
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown: expected one of {', '.join(SPLITS)}")
        if frames < 1 or min(height, width) < 16:
            raise ValueError(f"{frames} frames of {height}x{width} is too small: ask for at least 1 frame of 16x16")
        self.split, self.rng_key, self.texture = split, [seed, SPLITS.index(split)], texture
        self.shape, self.size, self.basic = (frames, height, width), size, basic

    def spec(self, i):
        """The spec of clip i, without its pixels."""
        rng = np.random.default_rng([*self.rng_key, i])
        return complete(draw_words(rng, self.split, self.texture, self.basic), *self.shape, rng, self.texture, self.size)

    def batch(self, indices, device="cpu"):
        """The clips of the indices: video (B, 3, T, H, W), flow (B, 2, T, H, W), lists of captions and of specs."""
        specs = [self.spec(int(i)) for i in indices]
        video, flow = render(specs, *self.shape, device)
        return {"video": video, "flow": flow, "caption": [caption(s) for s in specs], "spec": specs}

    def __getitem__(self, i):
        return {key: value[0] for key, value in self.batch([i]).items()}

    def of_prompts(self, prompts, device="cpu"):
        """A ground-truth clip for each prompt, as `batch` returns them; what the words leave open is drawn."""
        rngs = [np.random.default_rng([*self.rng_key, 1, n]) for n in range(len(prompts))]
        specs = [complete(parse(p), *self.shape, rng, self.texture, self.size) for p, rng in zip(prompts, rngs)]
        video, flow = render(specs, *self.shape, device)
        return {"video": video, "flow": flow, "caption": list(prompts), "spec": specs}

    def prompts(self):
        """Held-out prompts to look at, one of each kind of motion."""
        return PROMPTS[0::33]


# ---------------------------------------------------------------------------------------------------------------------
# The config's clips

def open_data(config, split="train", device="cpu"):
    """The config's data set: the embedded world's split, or the folder data.root, whose flow is kept in <run>/flow."""
    size, world = (config["frames"], config["height"], config["width"]), config["world"]
    if not config["data"]["root"]:
        return MovingShapes(*size, config["seed"], split, world["texture"], world["size"], world["basic"])
    if not Path(config["data"]["root"]).is_dir():  # before RAFT is fetched
        raise FileNotFoundError(f"found nothing at {config['data']['root']}, expected a folder of videos: correct data.root")
    from videos import VideoFolder
    raft = load_raft(None if config["flow"]["weights"] else "large", config["flow"]["weights"] or None).to(device)
    return VideoFolder(config["data"]["root"], *size, config["fps"], Path(config["run"], "flow"), raft)


# ---------------------------------------------------------------------------------------------------------------------
# Latents: what the DiT is trained on.

CLIPS_PER_FILE = 256
PIXELS_AT_ONCE = 2**23  # that the TAE encodes: 64 clips of 32x32x32, 4 tiles of 32x256x256


@torch.no_grad()
def encode(tae, got, sigma):
    """A batch of clips -> z = [x, d] (B, 2C, T, H, W), each stream normalised by its own statistics."""
    return torch.cat([tae.encode(got["video"]), tae.encode(flow_to_rgb(got["flow"], sigma), motion=True)], dim=1)


def in_chunks(start, stop, config):
    """range(start, stop) in pieces of as many clips as are encoded at once: 1 to 32."""
    n = min(32, PIXELS_AT_ONCE // (min(config["frames"], config["tae"]["tile"]) * config["height"] * config["width"])) or 1
    return [range(i, min(i + n, stop)) for i in range(start, stop, n)]


def encode_file(config, tae, clips, device, k, n, text=None):
    """File k of the latents of n clips -> dict: z (b, 2C, T, H, W) float16, b captions, each text encoder's features (b, L, D) float16 and masks."""
    z, captions = [], []                                           # the TAE's batches are smaller than a file
    for chunk in in_chunks(k * CLIPS_PER_FILE, min((k + 1) * CLIPS_PER_FILE, n), config):
        got = clips.batch(chunk, device)
        z.append(encode(tae, got, config["flow"]["sigma"]).half().cpu())
        captions += got["caption"]
    features, masks = text(captions) if text else ((), ())
    return dict(z=torch.cat(z), caption=captions, features=[f.half().cpu() for f in features], masks=[m.cpu() for m in masks])


def latent_files(config, tae, clips):
    """What the files in <run>/latents depend on, and their paths, made or not; ValueError where those there depend on something else."""
    n, what = config["data"]["cache"], [config["seed"], config["world"]]
    if config["data"]["root"]:
        n, what = len(clips), [clips.windows, clips.prints, clips.captions, config["fps"]]
    frozen, size = config["text"]["frozen"], [config["frames"], config["height"], config["width"]]
    own = dict(tae=checksum(tae.state_dict()), size=size, clips=n, sigma=config["flow"]["sigma"],
               data=f"{zlib.crc32(json.dumps(what).encode()):08x}", text=frozen and [*frozen, config["text"]["length"]])
    folder = Path(config["run"], "latents")
    found = json.loads((folder / "index.json").read_text()) if (folder / "index.json").exists() else own
    for key in own:
        if found.get(key) != own[key]:
            raise ValueError(f"{folder} was made with another {key}: found {found.get(key)}, expected {own[key]}; delete it, then make it "
                             "again with data.py if you like")
    return own, [folder / f"{k:05d}.pt" for k in range(math.ceil(n / CLIPS_PER_FILE))]


class Latents:
    """z and captions by clip number; n clips, 0: endless. [0, 5] -> z (2, 2C, T, H, W) float, two captions, stored text features and masks or None.
    From the files that data.py wrote, by memory map; else from memory, where no more than data.cache clips are encoded now, by every rank for
    itself; else encoded when asked for. ValueError for files that are not finished, or made by another TAE, of other clips or sizes."""

    def __init__(self, config, tae, clips, device, bar=True):
        self.tae, self.clips, self.device, self.sigma = tae, clips, device, config["flow"]["sigma"]
        own, paths = latent_files(config, tae, clips)
        self.n, self.files, folder = own["clips"], [], Path(config["run"], "latents")
        if (folder / "index.json").exists():
            missing = sum(not path.exists() for path in paths)
            if missing:
                raise ValueError(f"{folder} is not finished, {missing} of its files are missing: torchrun data.py run={config['run']} goes on, "
                                 "or delete it")
            # Mapped, not read: of a file only the rows that are used come into memory.
            self.files = [torch.load(path, mmap=True, weights_only=True) for path in paths]
        elif 0 < self.n <= config["data"]["cache"]:
            numbers = tqdm(range(len(paths)), f"encoding {self.n} clips", unit="file", disable=not bar, dynamic_ncols=True)
            self.files = [encode_file(config, tae, clips, device, k, self.n) for k in numbers]

    def __call__(self, indices):
        if not self.files:
            got = self.clips.batch(indices, self.device)
            return encode(self.tae, got, self.sigma), got["caption"], None
        rows = [(self.files[i // CLIPS_PER_FILE], i % CLIPS_PER_FILE) for i in indices]
        z, captions = torch.stack([file["z"][row] for file, row in rows]).float(), [file["caption"][row] for file, row in rows]
        encoders = range(len(self.files[0]["features"]))
        stored = [[torch.stack([file[key][e][row] for file, row in rows]) for e in encoders] for key in ("features", "masks")]
        return z, captions, stored if encoders else None


def run_config(config, argv):
    """The run folder's own config (the command line's, where it has none); ValueError where the command line wants other clips."""
    run = Path(config["run"])
    if not (run / "config.json").exists():
        return config
    stored = read_config(run / "config.json")
    old, new = flatten(stored), flatten(config)
    for key in (text.partition("=")[0].strip() for text in argv):
        if key.split(".")[0] in ("seed", "frames", "height", "width", "fps", "data", "world", "flow", "text") and old[key] != new[key]:
            raise ValueError(f"{run} was made with {key}={old[key]!r}, found {key}={new[key]!r}: give the old value, or another run=folder")
    return {**stored, "run": config["run"], "device": config["device"]}


def write_latents(config, rank=0, world=1):
    """The latents of every clip and the features of frozen text encoders in <run>/latents, each file by one rank. A file stands under its name
    when it is whole; those are kept when the command runs again. ValueError for a folder of another TAE, data or size."""
    run, device = Path(config["run"]), find_device(config["device"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    tae = load_into(build_tae(config), read_weights(run / "tae.pt")["weights"], run / "tae.pt").to(device).eval()
    text = build_text(config).to(device) if config["text"]["frozen"] else None  # ours is trained with the DiT
    clips = open_data(config, "train", device)
    own, paths = latent_files(config, tae, clips)
    if not paths:
        raise ValueError(f"{run} was made with data.cache=0: found an endless world, expected a number of clips to encode: make a run with "
                         "data.cache=10000")
    folder, temporary = paths[0].parent, paths[0].with_name(f"index.{rank}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(own, indent=1))
    os.replace(temporary, folder / "index.json")
    todo = [k for k in range(rank, len(paths), world) if not paths[k].exists()]
    for k in tqdm(todo, f"encoding {own['clips']} clips", unit="file", disable=rank > 0, dynamic_ncols=True):
        save(paths[k], encode_file(config, tae, clips, device, k, own["clips"], text))
    if rank == 0:
        print(f"{folder}: {own['clips']} clips" + (f", as soon as the other {world - 1} ranks are done" if world > 1 else ""))


def main(argv=None):
    """Write world.png, or with data.root folder.png: what train.py would see with the same key=value. With run= latents instead."""
    argv = sys.argv[1:] if argv is None else argv
    config = load_config(argv)
    if any(text.startswith("run=") for text in argv):
        return write_latents(run_config(config, argv), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    clips, name = open_data(config), "folder.png" if config["data"]["root"] else "world.png"
    got = clips.batch(range(0, len(clips), -(-len(clips) // 16))) if config["data"]["root"] else clips.of_prompts(
        [PROMPTS[8 * n + 3 * n % 8] for n in range(16)])  # 4 of each kind
    print("\n".join(got["caption"]))
    at = np.linspace(0, config["frames"] - 1, min(8, config["frames"])).round().astype(int)
    pictures = torch.stack([got["video"], flow_to_rgb(got["flow"], config["flow"]["sigma"])], 1)[:, :, :, at]  # (B, 2, 3, 8, H, W)
    times = max(1, 64 // min(config["height"], config["width"]))
    pictures = pictures.repeat_interleave(times, 4).repeat_interleave(times, 5)
    pictures = F.pad(pictures, (0, 2, 0, 2), value=-1).permute(0, 1, 4, 3, 5, 2)                 # (B, 2, H, 8, W, 3)
    iio.imwrite(name, ((pictures.flatten(3, 4).flatten(0, 2) + 1) * 127.5).round().byte().numpy())
    print(f"{name}: each clip's frames over its optical flow (Eq. 5)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
