"""The embedded world. References are written out here, per pixel and in plain Python, or follow from the physics."""
import cmath
import collections
import json
import math
import random
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import metrics  # noqa: E402
from data import (COLORS, DIRECTIONS, HELD_OUT, KINDS, MOTIONS, PAIRED, PROMPTS, SHAPES, STRAIGHT,  # noqa: E402
                  MovingShapes)

torch.set_num_threads(1)
OPEN = [m for m in MOTIONS if m != "still"]


def make(motion, seed=0, frames=16, height=32, width=32, color="red", shape="circle", others=(), camera=None,
         texture=0.0):
    """A spec of one motion; a partner where the motion needs one is blue, then green."""
    others = list(others) or ([("blue", "square")] if motion in PAIRED else [])
    objects = [{"color": c, "shape": s} for c, s in [(color, shape), *others]]
    words = {"kind": MOTIONS[motion][0], "motion": motion, "speed": None, "camera": camera, "objects": objects}
    return data.complete(words, frames, height, width, np.random.default_rng(seed), texture)


def poses(spec, k=0):
    """(T+1, 2) centres in the world, the camera's flow taken out; angles; scales."""
    pose = np.array(spec["objects"][k]["pose"])
    return pose[:, :2] - np.arange(len(pose))[:, None] * spec["camera"], pose[:, 2], pose[:, 3]


def contains(shape, q):
    """Is the complex number q inside the unit shape? Corners and rectangles, where data.py has signed distances."""
    x, y = q.real, q.imag
    if shape == "circle":
        return x * x + y * y < 1
    if shape == "triangle":  # the same side of all three edges
        half = (0.9 + 0.9) / math.sqrt(3)
        corners = [complex(0, -0.9), complex(half, 0.9), complex(-half, 0.9)]
        return all(((b - a).conjugate() * (q - a)).imag > 0 for a, b in zip(corners, corners[1:] + corners[:1]))
    boxes = {"square": [(0.9, 0.9)], "cross": [(1, 0.4), (0.4, 1)]}[shape]
    return any(abs(x) < a and abs(y) < b for a, b in boxes)


def reference_flow(spec, i, j, height, width):
    """Per pixel: the front-most shape's flow by complex arithmetic; nan within 3 % of an outline, the anti-aliased
    edge."""
    flow = np.empty((2, height, width))
    for y in range(height):
        for x in range(width):
            p = complex(x, y)
            moved, unsure = p + (j - i) * complex(*spec["camera"]), False
            for k in reversed(spec["order"]):
                o = spec["objects"][k]
                (cx, cy, a, s), (cx2, cy2, a2, s2) = o["pose"][i], o["pose"][j]
                q = (p - complex(cx, cy)) * cmath.exp(-1j * a) / (s * o["radius"])
                inside = {contains(o["shape"], q * m) for m in (0.97, 1.03)}
                unsure |= len(inside) == 2
                if inside == {True}:
                    moved = complex(cx2, cy2) + q * s2 * o["radius"] * cmath.exp(1j * a2)
                    break
            flow[:, y, x] = (math.nan, math.nan) if unsure else ((moved - p).real, (moved - p).imag)
    return flow


@pytest.mark.parametrize("motion", MOTIONS)
def test_flow_of_every_pixel_is_that_of_the_poses(motion):
    """Flow from any frame to any other, forwards and backwards, with a pan and a bystander, against
    `reference_flow`."""
    shape = SHAPES[list(MOTIONS).index(motion) % 4]
    others = [("blue", "square"), ("green", "triangle")][0 if motion in PAIRED else 1:]
    spec = make(motion, 3, frames=8, height=18, width=24, shape=shape, others=others, camera="left")
    for i, j in ((0, 1), (7, 8), (1, 6), (6, 2)):
        ours = data.flow_between([spec], i, j, 18, 24)[0].numpy()
        reference = reference_flow(spec, i, j, 18, 24)
        sure = ~np.isnan(reference)
        assert sure.mean() > 0.8
        np.testing.assert_allclose(ours[sure], reference[sure], atol=1e-4)  # float32 at coordinates up to 24


def sample(picture, p):
    """picture (C, H, W) at the points p (2, H, W) px, bilinearly."""
    height, width = picture.shape[-2:]
    grid = torch.stack([2 * p[0] / (width - 1) - 1, 2 * p[1] / (height - 1) - 1], -1)
    return F.grid_sample(picture[None].double(), grid[None].double(), align_corners=True)[0]


def grid_of(height, width):
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([xs, ys])


@pytest.mark.parametrize("motion", OPEN)
def test_next_frame_at_p_plus_flow_is_this_frame(motion):
    """The pictures move as the flow says: warped back, the texture fits far better than where it was. Flow and pixels
    only; the middle of the shape, which nothing hides, at a size where the pattern's edges are thin."""
    spec = make(motion, 5, frames=6, height=96, width=96)
    spec["objects"][0].update(pattern="dot", radius=20.0)
    spec["order"] = [*range(1, len(spec["objects"])), 0]
    video, flow = data.render([spec], 6, 96, 96)
    t = 1
    middle = (grid_of(96, 96) - torch.tensor(spec["objects"][0]["pose"][t][:2])[:, None, None]).norm(dim=0) < 14
    now = video[0, :, t]
    warped = sample(video[0, :, t + 1], grid_of(96, 96) + flow[0, :, t])
    error, stayed = ((x - now).abs()[:, middle].mean() for x in (warped, video[0, :, t + 1]))
    assert error < 0.02 and error < 0.5 * stayed


def test_pan_moves_the_background_and_all_flow():
    """A pan is one flow for every pixel that no object covers, and the frames follow it: the picture of the next frame
    at p + camera is this one. Panning left carries the world to the right."""
    spec = make("growing", 1, frames=6, height=64, width=64, camera="left", texture=1.0)
    video, flow = data.render([spec], 6, 64, 64)
    camera = torch.tensor(spec["camera"])
    assert camera[0] > 0.5 and camera[1] == 0 and data.caption(spec).endswith(", camera panning left")
    o = spec["objects"][0]
    away = (grid_of(64, 64) - torch.tensor(o["pose"][3][:2])[:, None, None]).norm(dim=0) > 2 * o["radius"] * 2
    away &= grid_of(64, 64)[0] < 60
    assert torch.allclose(flow[0, :, 3][:, away], camera[:, None].expand(-1, int(away.sum())))
    warped = sample(video[0, :, 4], grid_of(64, 64) + flow[0, :, 3])
    error, stayed = ((x - video[0, :, 3]).abs()[:, away].mean() for x in (warped, video[0, :, 4]))
    assert error < 0.01 and 5 * error < stayed


@pytest.mark.parametrize("motion", ["up-left", "growing", "spinning clockwise", "thrown"])
def test_flows_compose(motion):
    """i -> k is i -> j followed by j -> k looked up where the pixel has gone: exact inside one shape, whose flow is
    affine (so bilinear look-up is exact); a list of frames gives the same as its members; j = i + 1 is the clip's own
    flow."""
    spec = make(motion, 2, frames=8, height=40, width=40)
    one, two, both = (data.flow_between([spec], *ij, 40, 40)[0] for ij in ((2, 4), (4, 7), (2, 7)))
    o = spec["objects"][0]
    middle = (grid_of(40, 40) - torch.tensor(o["pose"][2][:2])[:, None, None]).norm(dim=0) < 0.6 * o["radius"]
    composed = one + sample(two, grid_of(40, 40) + one)
    assert both[:, middle].abs().max() > 0.5 and torch.allclose(composed[:, middle].float(), both[:, middle], atol=1e-4)
    listed = data.flow_between([spec], torch.tensor([2, 4, 2]), [4, 7, 7], 40, 40)[0]
    assert torch.equal(listed, torch.stack([one, two, both], 1))
    assert torch.equal(data.flow_between([spec], range(8), range(1, 9), 40, 40), data.render([spec], 8, 40, 40)[1])


def test_last_frame_flow_is_exact():
    """A falling object's flow pictures alone: the flow grows by g at every step, the last frame included (a repeated
    last flow would break the rule)."""
    for seed in range(5):
        spec = make("falling", seed, frames=10)
        flow = data.render([spec], 10, 32, 32)[1][0, 1]
        speed = flow.flatten(1).amax(1)
        assert torch.allclose(speed.diff(), (speed[1] - speed[0]).expand(9), atol=1e-4) and speed[1] > speed[0] + 0.02


@pytest.mark.parametrize("seed", range(4))
def test_kinds_of_motion_obey_their_laws(seed):
    """Newton and geometry on the poses, camera taken out: constant velocities, constant second differences, ratios."""
    for name, d in DIRECTIONS.items():
        step = np.diff(poses(make(name, seed))[0], axis=0)
        assert np.allclose(step, step[0]) and step[0] @ d / np.linalg.norm(step[0]) > 1 - 1e-9
    assert not np.diff(poses(make("still", seed))[0], axis=0).any()

    path = poses(make("falling", seed))[0]
    g = np.diff(path[:, 1], 2)
    assert np.allclose(g, g[0]) and g[0] > 0 and np.isclose(path[1, 1] - path[0, 1], g[0] / 2)
    assert not np.diff(path[:, 0]).any()
    path = poses(make("thrown", seed))[0]
    g = np.diff(path[:, 1], 2)
    assert np.allclose(g, g[0]) and g[0] > 0
    assert np.allclose(np.diff(path[:, 0], 2), 0) and abs(path[1, 0] - path[0, 0]) > 0.1
    assert path[1, 1] < path[0, 1] and 0 < path[:16, 1].argmin() < 15  # up first, then down

    for motion, turns in (("spinning clockwise", 1), ("spinning counter-clockwise", -1)):
        path, angle, _ = poses(make(motion, seed))
        step = np.diff(angle)
        assert np.allclose(step, step[0]) and 0.05 < turns * step[0] < math.pi / 4 and not np.diff(path, axis=0).any()
    for motion, turns in (("orbiting clockwise", 1), ("orbiting counter-clockwise", -1)):
        spec = make(motion, seed, camera="right")
        arm = (poses(spec)[0] - poses(spec, 1)[0]) @ (1, 1j)
        assert np.ptp(poses(spec, 1)[0], 0).max() < 1e-9 and np.ptp(abs(arm)) < 1e-9
        assert (turns * np.angle(arm[1:] / arm[:-1]) > 0.02).all()  # y down: a growing angle is clockwise
    for motion, grows in (("growing", 1), ("shrinking", -1)):
        scale = poses(make(motion, seed))[2]
        ratio = scale[1:] / scale[:-1]
        assert np.allclose(ratio, ratio[0]) and grows * math.log(ratio[0]) > 0.02
    step = np.diff(poses(make("zigzag", seed, frames=33))[0], axis=0)
    turns = (np.abs(np.diff(step, axis=0)).max(1) > 1e-6).sum()
    assert turns in range(3, 8) and np.isclose(abs(np.linalg.norm(step[1]) / np.linalg.norm(step[-2])), 1)


@pytest.mark.parametrize("seed", range(6))
def test_bounce_loses_its_share_and_stays_above_the_floor(seed):
    """The radius of the circle is the floor's distance; v after / v before is e, so a flight reaches e^2 of the one
    before."""
    path = poses(make("bouncing", seed, frames=2001))[0]
    radius = make("bouncing", seed, frames=2001)["objects"][0]["radius"]
    height = 31.5 - radius - path[:2001, 1]  # the picture ends half a pixel below the last pixel's centre
    assert height.min() > -1e-9 and height.min() < 0.01
    hits = [t for t in range(1, 2000) if height[t] <= height[t - 1] and height[t] < height[t + 1]]
    peaks = [height[a:b].max() for a, b in zip([0, *hits], [*hits, 2001])]
    assert len(hits) >= 2 and np.isclose(peaks[1] / peaks[0], data.RESTITUTION**2, atol=0.02)
    g = np.diff(height[:hits[0] - 1], 2)
    assert np.allclose(g, g[0]) and g[0] < 0


@pytest.mark.parametrize("seed", range(8))
def test_collision_conserves_momentum_and_energy(seed):
    """Equal masses on a line: sums of v and of v^2 stay, the two exchange velocities, and they touch but never
    overlap."""
    spec = make("colliding", seed, others=[("blue", "circle")])
    (a, a2), (b, b2) = (np.diff(poses(spec, k)[0], axis=0)[[0, -1]] for k in (0, 1))
    assert np.linalg.norm(a) > 0.1 and np.allclose(a + b, a2 + b2)
    assert np.isclose((a**2 + b**2).sum(), (a2**2 + b2**2).sum())
    assert np.allclose(a, b2) and np.allclose(b, a2) and not np.allclose(a, b)
    gap = np.linalg.norm(poses(spec)[0] - poses(spec, 1)[0], axis=1) - 2 * spec["objects"][0]["radius"]
    assert spec["objects"][0]["radius"] == spec["objects"][1]["radius"]
    assert gap.min() > -1e-9 and gap.min() < np.linalg.norm(a - b) and gap[0] > gap.min() < gap[-1]


def test_crossing_meets_and_the_front_one_hides_the_other():
    """Where both discs cover a pixel it has the colour of the last in the drawing order; either may be in front; the
    paths come closer than the radii, so there is something to hide."""
    fronts = collections.Counter()
    for seed in range(12):
        spec = make("crossing", seed, height=64, width=64, others=[("blue", "circle")])
        video = data.render([spec], 16, 64, 64)[0][0]
        centres = [poses(spec, k)[0] for k in (0, 1)]
        t = int(np.linalg.norm(centres[0] - centres[1], axis=1)[:16].argmin())
        far = [(grid_of(64, 64) - torch.tensor(c[t])[:, None, None]).norm(dim=0) for c in centres]
        both = torch.stack([f < o["radius"] - 1 for f, o in zip(far, spec["objects"])]).all(0)
        assert both.sum() > 3
        named = video[0, t][both] > video[2, t][both]  # more red than blue
        assert named.all() or not named.any()
        assert bool(named.all()) == (spec["order"][-1] == 0)
        fronts[bool(named.all())] += 1
    assert min(fronts[True], fronts[False]) >= 2


@pytest.mark.parametrize("motion, turns", [("spinning clockwise", 1), ("spinning counter-clockwise", -1)])
def test_texture_turns_with_the_shape(motion, turns):
    """On the picture alone: the dark dot on a spinning disc runs round its centre the way the word says, by the pose's
    angle."""
    spec = make(motion, 4, height=64, width=64)
    spec["objects"][0]["pattern"] = "dot"
    video = data.render([spec], 16, 64, 64)[0][0]
    o = spec["objects"][0]
    offset = grid_of(64, 64) - torch.tensor(o["pose"][0][:2])[:, None, None]
    disc = offset.norm(dim=0) < o["radius"] - 1.5
    dark = (disc * (0.8 - video[0]).clamp(min=0))[:, None]
    arm = (dark * offset).sum((2, 3)) / dark.sum((2, 3))
    angle = torch.atan2(arm[:, 1], arm[:, 0]).numpy()
    step = np.angle(np.exp(1j * np.diff(angle)))
    assert abs(np.angle(np.exp(1j * (angle[0] - o["pose"][0][2] - o["pattern_angle"])))) < 0.05
    assert np.allclose(step, o["pose"][1][2] - o["pose"][0][2], atol=0.05) and (turns * step > 0.05).all()


@pytest.mark.parametrize("pattern", data.PAINT)
def test_pattern_changes_the_brightness_never_the_hue(pattern):
    """Every pixel well inside a shape is a multiple of its palette colour, between 65 and 100 % of it, and both
    occur."""
    for color, rgb in COLORS.items():
        spec = make("still", 1, frames=1, height=64, width=64, color=color)
        spec["objects"][0]["pattern"] = pattern
        picture = (data.render([spec], 1, 64, 64)[0][0, :, 0] + 1) / 2
        o = spec["objects"][0]
        inside = (grid_of(64, 64) - torch.tensor(o["pose"][0][:2])[:, None, None]).norm(dim=0) < o["radius"] - 1
        share = picture[:, inside] / torch.tensor(rgb)[:, None]
        assert torch.allclose(share, share[:1].expand_as(share), atol=1e-5)
        assert abs(share.min() - 0.65) < 0.01 and abs(share.max() - 1) < 0.01


def test_clip_is_a_pure_function_of_seed_split_and_index():
    """Alone, in batches of any order and company, under any global random state, which it leaves alone: the same bits.
    Other seeds, splits and indices give other clips."""
    ds = MovingShapes(5, 24, 32, seed=7, texture=1.0)
    batch = ds.batch([9, 3, 40, 5])
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    again = MovingShapes(5, 24, 32, seed=7, texture=1.0).batch([5, 40])
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    first, second = ({key: value[n] for key, value in again.items()} for n in (0, 1))
    for row, other in ((3, first), (2, second), (0, ds[9]), (1, ds[3])):
        assert torch.equal(batch["video"][row], other["video"]) and torch.equal(batch["flow"][row], other["flow"])
        assert batch["caption"][row] == other["caption"] and batch["spec"][row] == other["spec"]
    assert batch["video"].shape == (4, 3, 5, 24, 32) and batch["flow"].shape == (4, 2, 5, 24, 32)
    assert batch["video"].abs().max() <= 1 and ds.spec(9) == batch["spec"][0]
    assert json.loads(json.dumps(batch["spec"])) == batch["spec"]
    keys = [(s, split, i) for s in (0, 1) for split in data.SPLITS for i in range(50)]
    seen = {json.dumps(MovingShapes(2, 16, 16, s, split).spec(i)) for s, split, i in keys}
    assert len(seen) == len(keys)


def test_mixed_batch_equals_its_clips():
    """Texture, pans and numbers of objects share a batch: each row is what the clip alone is."""
    specs = [make("growing", 1, camera="left", texture=1.0), make("left", 2), make("crossing", 3, texture=0.5)]
    video, flow = data.render(specs, 16, 32, 32)
    for b, spec in enumerate(specs):
        alone = data.render([spec], 16, 32, 32)
        assert torch.equal(video[b], alone[0][0]) and torch.equal(flow[b], alone[1][0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_devices_agree():
    """The same specs on the GPU: pixels within 1e-5 but where rounding decides which side of an outline a centre is
    on."""
    specs = [MovingShapes(16, 64, 64, texture=1.0).spec(i) for i in range(32)]
    for cpu, gpu in zip(data.render(specs, 16, 64, 64), data.render(specs, 16, 64, 64, "cuda")):
        assert ((cpu - gpu.cpu()).abs() > 2e-5).float().mean() < 1e-5


def drawn(count, **kwargs):
    ds = MovingShapes(16, 32, 32, **kwargs)
    return [ds.spec(i) for i in range(count)]


def test_training_never_names_a_held_out_triple():
    """HELD_OUT is two (colour, shape) pairs of each motion; 3,000 training clips name none of them, other splits name
    about one in twelve, and training shows all the colours, shapes and motions one by one."""
    assert collections.Counter(m for _, _, m in HELD_OUT) == {m: 2 for m in MOTIONS}
    assert {c for c, _, _ in HELD_OUT} == set(COLORS) and {s for _, s, _ in HELD_OUT} == set(SHAPES)
    triple = lambda spec: (spec["objects"][0]["color"], spec["objects"][0]["shape"], spec["motion"])
    triples = {split: [triple(spec) for spec in drawn(3000, split=split)] for split in ("train", "test")}
    assert not HELD_OUT & set(triples["train"])
    assert 180 < sum(t in HELD_OUT for t in triples["test"]) < 320  # 250, plus or minus 4.6 standard deviations
    assert [set(names) for names in zip(*triples["train"])] == [set(COLORS), set(SHAPES), set(MOTIONS)]


def test_frequencies_are_the_stated_ones():
    """Within five standard deviations over 3,000 clips: half basic, a ninth of it still, a tenth with a bystander; pans
    in 15 % of the others, where there is a texture, and never in straight-line clips."""
    specs = drawn(3000, texture=1.0)
    near = lambda count, total, share: abs(count - total * share) < 5 * math.sqrt(total * share * (1 - share))
    kinds = collections.Counter(s["kind"] for s in specs)
    assert near(kinds["basic"], 3000, 1 / 2) and all(near(kinds[k], 3000, 1 / 6) for k in list(KINDS)[1:])
    basic, rest = ([s for s in specs if (s["kind"] == "basic") == b] for b in (True, False))
    assert near(sum(s["motion"] == "still" for s in basic), len(basic), 1 / 9)
    moving = [s for s in basic if s["motion"] != "still"]
    assert near(sum(len(s["objects"]) > 1 for s in moving), len(moving), 0.1)
    assert not any(any(s["camera"]) for s in basic) and near(sum(any(s["camera"]) for s in rest), len(rest), 0.15)
    assert max(len(s["objects"]) for s in specs) == 3
    assert not any(any(s["camera"]) for s in drawn(500))


@pytest.mark.parametrize("texture", [0.0, 1.0])
def test_named_object_stays_in_the_picture_and_speeds_in_their_range(texture):
    """Bounding circles of 1,000 clips against the picture; at most 5 px per frame at 64 px (falls end and bounces meet
    the floor at up to twice the average); slow is slower than fast for the same clip."""
    for spec in drawn(1000, texture=texture):
        o = spec["objects"][0]
        pose = np.array(o["pose"])[:16]
        reach = 0.9 * o["radius"] * pose[:, 3:]
        assert (pose[:, :2] - reach > -0.5 - 1e-6).all() and (pose[:, :2] + reach < 31.5 + 1e-6).all(), spec["motion"]
        fastest = np.linalg.norm(np.diff(poses(spec)[0], axis=0), axis=1).max()
        assert fastest < (2.5 * (1 if spec["kind"] == "basic" else 2.5)) + 1e-6
    words = data.parse("a red square moving left")
    for n in range(50):
        specs = [data.complete({**words, "speed": s}, 16, 32, 32, np.random.default_rng(n)) for s in ("slow", "fast")]
        slow, fast = (poses(spec)[0][0, 0] - poses(spec)[0][1, 0] for spec in specs)
        assert 0.1 < slow < fast


def words_of(spec):
    objects = [{"color": o["color"], "shape": o["shape"]} for o in spec["objects"]]
    return {**{key: spec[key] for key in ("kind", "motion", "speed")}, "objects": objects,
            "camera": data.camera_word(spec["camera"])}


def test_captions_say_what_the_spec_does():
    """`parse` gives back the words of 4,000 drawn specs in every one of the templates; at most 64 bytes, 96 with
    extras."""
    for spec in drawn(2000, texture=1.0) + drawn(2000, split="val"):
        plain = len(spec["objects"]) == 1 + (spec["motion"] in PAIRED) and not any(spec["camera"])
        texts = {data.caption({**spec, "template": n}) for n in range(len(data.TEMPLATES))}
        assert data.caption(spec) in texts and len(texts) > 1
        for text in texts:
            assert data.parse(text) == words_of(spec), text
            assert len(text.encode()) <= (64 if plain else 96), text


def test_free_typing_is_read():
    """Sentences nobody generated, against the words a person would give them."""
    for text, color, shape, motion, speed, others, camera in (
            ("Red square moving to the right", "red", "square", "right", None, 0, None),
            ("a bright red square moving LEFT", "red", "square", "left", None, 0, None),
            ("a blue circle slowly drifts towards the upper left", "blue", "circle", "up-left", "slow", 0, None),
            ("red circle goes around a blue cross clockwise", "red", "circle", "orbiting clockwise", None, 1, None),
            ("a red cross turns anticlockwise", "red", "cross", "spinning counter-clockwise", None, 0, None),
            ("green cross and yellow circle crossing fast", "green", "cross", "crossing", "fast", 1, None),
            ("a red square falls while the camera pans right", "red", "square", "falling", None, 0, "right"),
            ("a cyan cross is thrown", "cyan", "cross", "thrown", None, 0, None),
            ("a cyan cross drops down", "cyan", "cross", "falling", None, 0, None),
            ("a red cross moving down past a still blue circle", "red", "cross", "down", None, 1, None),
            ("a yellow square that does not move, motionless", "yellow", "square", "still", None, 0, None)):
        words = data.parse(text)
        assert (words["objects"][0], words["motion"]) == ({"color": color, "shape": shape}, motion), text
        assert (words["speed"], len(words["objects"]) - 1, words["camera"]) == (speed, others, camera), text
        data.complete(words, 4, 16, 16, np.random.default_rng(0))
    spec = data.complete(data.parse("a red square crossing"), 4, 16, 16, np.random.default_rng(0))
    assert len(spec["objects"]) == 2 and spec["objects"][1]["color"] != "red"  # the partner that was not named


@pytest.mark.parametrize("text, missing", [
    ("a square moving right", "no colour"), ("a red ball moving right", "no shape"), ("a red square", "no motion"),
    ("", "no colour"), ("a red square spinning", "no sense of turning"), ("a square, red, moving up", "no object")])
def test_unreadable_prompt_says_what_is_missing(text, missing):
    """One line that quotes the prompt and names the missing part."""
    with pytest.raises(ValueError, match=missing) as error:
        data.parse(text)
    assert "\n" not in str(error.value) and repr(text) in str(error.value)


def test_fixed_prompts():
    """128 different prompts, 32 per kind in order, half of them held-out triples; 64 straight ones, eight per
    direction, all colours, shapes and speeds; a fingerprint, so that numbers measured on them stay comparable."""
    assert zlib.crc32("\n".join(PROMPTS + STRAIGHT).encode()) == 2364737344
    words = [data.parse(p) for p in PROMPTS]
    assert [w["kind"] for w in words] == [k for k in ("basic", "complex", "rotational", "physics") for _ in range(32)]
    assert len(set(PROMPTS)) == 128 and {w["motion"] for w in words} == set(MOTIONS)
    held = [(*w["objects"][0].values(), w["motion"]) in HELD_OUT for w in words]
    assert 55 < sum(held) < 75
    straight = [data.parse(p) for p in STRAIGHT]
    named = [w["objects"][0] for w in straight]
    assert len(set(STRAIGHT)) == 64 and collections.Counter(w["motion"] for w in straight) == {d: 8 for d in DIRECTIONS}
    assert {o["color"] for o in named} == set(COLORS) and {o["shape"] for o in named} == set(SHAPES)
    assert {w["speed"] for w in straight} == {None, "slow", "fast"} and all(len(w["objects"]) == 1 for w in straight)
    assert all(len(p.encode()) <= 64 for p in PROMPTS + STRAIGHT)


@pytest.mark.parametrize("side, texture", [(32, 0.0), (32, 1.0), (64, 0.0), (64, 1.0)])
def test_pictures_are_read_back(side, texture):
    """On the 64 straight prompts, sharp and blurred by 3x3 (as an autoencoder may): the dominant colour is the named
    one, the nearest of the eight directions the named one, no frame is lost, the centroid within a tenth of the radius
    of the shape's, the speed within 0.05 px per frame, the area that of a shape (the cross is the smallest, the square
    the largest)."""
    words = [data.parse(p) for p in STRAIGHT]
    specs = [data.complete(w, 16, side, side, np.random.default_rng(n), texture) for n, w in enumerate(words)]
    sharp = data.render(specs, 16, side, side)[0]
    blurred = F.avg_pool2d(F.pad(sharp.flatten(1, 2), (1, 1, 1, 1), mode="replicate"), 3, 1).view_as(sharp)
    for videos in (sharp, blurred):
        for video, spec, w in zip(videos, specs, words):
            o = spec["objects"][0]
            assert metrics.dominant_color(video) == o["color"]
            area, centroid, found = metrics.track(video, o["color"])
            path = poses(spec)[0][:16]
            offset = 0.3 * o["radius"] * (o["shape"] == "triangle")  # a third of its height above its base
            assert found.all() and np.abs(centroid.numpy() - path - (0, offset)).max() < 0.1 * o["radius"]
            box = (2 * o["radius"]) ** 2 / side**2
            assert (area > 0.4 * box).all() and (area < 1.1 * box).all()
            angle, speed = metrics.direction(centroid, found)
            heading = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            assert max(DIRECTIONS, key=lambda d: DIRECTIONS[d] @ heading) == w["motion"]
            assert math.isclose(speed, np.linalg.norm(path[1] - path[0]), abs_tol=0.05)


def test_lost_object_counts_as_lost():
    """Grey noise and other colours: nothing found, centroids nan, no colour, no direction. Two found frames are too
    few."""
    grey = torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1) * 2 - 1
    assert metrics.dominant_color(grey) is None
    video = data.render([make("left", frames=4, color="green")], 4, 32, 32)[0][0]
    for clip, color in ((grey, "red"), (video, "red"), (video, "cyan")):
        area, centroid, found = metrics.track(clip, color)
        assert not found.any() and centroid.isnan().all() and area.shape == found.shape == (4,)
        assert all(math.isnan(x) for x in metrics.direction(centroid, found))
    video[:, 1:3] = 0
    area, centroid, found = metrics.track(video, "green")
    assert found.tolist() == [True, False, False, True] and math.isnan(metrics.direction(centroid, found)[0])
    points = torch.tensor([[0.0, 0.0], [math.nan, math.nan], [2.0, -2.0], [3.0, -3.0]])
    angle, speed = metrics.direction(points, torch.tensor([True, False, True, True]))
    assert math.isclose(angle, -45, abs_tol=1e-9) and math.isclose(speed, math.sqrt(2))


@pytest.mark.parametrize("frames, height, width", [(1, 16, 16), (1, 40, 24), (3, 16, 64)])
def test_images_and_odd_shapes(frames, height, width):
    """A clip of one frame is an image with a flow; every kind of motion can be made at any shape."""
    for motion in MOTIONS:
        spec = make(motion, 1, frames=frames, height=height, width=width, texture=0.5)
        video, flow = data.render([spec], frames, height, width)
        assert video.shape == (1, 3, frames, height, width) and flow.shape == (1, 2, frames, height, width)
        assert video.isfinite().all() and flow.isfinite().all() and (motion == "still") == (flow.abs().max() == 0)
        assert metrics.track(video[0], "red")[2].any() or motion == "crossing"  # which may hide it


@pytest.mark.parametrize("bad, said", [
    ({"split": "training"}, "training.*train, val, test"), ({"frames": 0}, "0 frames"), ({"height": 15}, "15x32"),
    ({"width": 8}, "32x8")])
def test_bad_arguments_are_refused(bad, said):
    """ValueError: one line with what was found and what is expected."""
    with pytest.raises(ValueError, match=said):
        MovingShapes(**{"frames": 4, "height": 32, "width": 32, **bad})


def test_knobs():
    """texture 0 is one light grey per clip, 1 is grey noise that varies more than the mover does; size scales the
    radius and nothing else of the draw."""
    for spec in drawn(20):
        picture = data.render([spec], 1, 32, 32)[0][0, :, 0]
        corner = picture[:, picture.std(0) < 1e-6]
        assert corner.shape[1] > 300 and corner.std() < 1e-6 and corner.mean() > 0.1
    rich = data._background(drawn(20, texture=1.0), torch.zeros(20, 2), torch.zeros(1), 32, 32)[:, :, 0]
    assert rich.std((2, 3)).mean() > 0.25  # of a range of 2
    assert ((rich.amax(1) - rich.amin(1)) / (rich.amax(1) + 1)).max() < 0.1  # saturation
    one, half = (MovingShapes(4, 32, 32, size=size).spec(3) for size in (1.0, 0.5))
    assert half["objects"][0]["radius"] == pytest.approx(one["objects"][0]["radius"] / 2)
    assert words_of(one) == words_of(half)
