"""The embedded world. References are written per pixel in plain Python, or follow from physics."""
import cmath
import collections
import json
import math
import types
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import data
from data import COLORS, DIRECTIONS, HELD_OUT, KINDS, MOTIONS, PAIRED, PROMPTS, SHAPES, STRAIGHT

seeds = pytest.mark.parametrize("seed", range(5))


def make(motion, seed=0, frames=16, height=32, width=32, shape="circle", texture=0.0, color="red"):
    """A spec of one motion; the second object, where there is one, is a blue circle."""
    objects = [{"color": color, "shape": shape}, {"color": "blue", "shape": "circle"}]
    words = dict(kind=MOTIONS[motion], motion=motion, speed=None,
                 objects=objects[:2 if motion in PAIRED else 1])
    return data.complete(words, frames, height, width, np.random.default_rng(seed), texture)


def render(specs, frames, height, width, device="cpu"):
    return data.draw(specs, range(frames), range(1, frames + 1), height, width, device)


def drawn(count, split="train", **knobs):
    clips = data.MovingShapes(16, 32, 32, split=split, **knobs)
    return [clips.spec(i) for i in range(count)]


def triple(words):
    named = words["objects"][0]
    return named["color"], named["shape"], words["motion"]


def centres(spec, k=0):
    return np.array(spec["objects"][k]["pose"])[:, :2]                  # (T+1, 2)


def velocities(spec, k=0):
    return np.diff(centres(spec, k), axis=0)                            # (T, 2)


def pixels(side):
    """The place (x, y) of each pixel: (2, H, W)."""
    ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([xs, ys])


def distance_to_centre(spec, t, side, k=0):
    return (pixels(side) - torch.tensor(centres(spec, k)[t])[:, None, None]).norm(dim=0)


def look_up(picture, places):
    """picture (C, H, W) at places (2, H, W) px, bilinearly."""
    grid = 2 * places.movedim(0, -1)[None].double() / (picture.shape[-1] - 1) - 1
    return F.grid_sample(picture[None].double(), grid, align_corners=True)[0]


def contains(shape, q):
    """Is the complex number q in the unit shape? By corners and boxes, data.py has distances."""
    if shape == "circle":
        return abs(q) < 1
    if shape == "triangle":
        half = 1.8 / math.sqrt(3)
        corners = [complex(0, -0.9), complex(half, 0.9), complex(-half, 0.9)]
        edges = zip(corners, corners[1:] + corners[:1])
        return all(((b - a).conjugate() * (q - a)).imag > 0 for a, b in edges)
    boxes = {"square": [(0.9, 0.9)], "cross": [(1, 0.4), (0.4, 1)]}[shape]
    return any(abs(q.real) < a and abs(q.imag) < b for a, b in boxes)


def flow_of_point(spec, p, i, j):
    """By complex arithmetic: where the front-most object at p is carried; nan near an outline."""
    for k in reversed(spec["order"]):
        o = spec["objects"][k]
        x, y, angle, scale = o["pose"][i]
        x2, y2, angle2, scale2 = o["pose"][j]
        q = (p - complex(x, y)) * cmath.exp(-1j * angle) / (scale * o["radius"])
        inside = contains(o["shape"], 0.97 * q)
        if inside != contains(o["shape"], 1.03 * q):
            return complex(math.nan, math.nan)
        if inside:
            return complex(x2, y2) + q * scale2 * o["radius"] * cmath.exp(1j * angle2) - p
    return 0j


@pytest.mark.parametrize("motion", MOTIONS)
def test_flow_of_every_pixel_is_that_of_the_poses(motion):
    """From any frame to any other against `flow_of_point`; clips have the same."""
    shape = SHAPES[list(MOTIONS).index(motion) % 4]
    spec = make(motion, 3, frames=8, height=18, width=24, shape=shape)
    ours = data.flow_between([spec], [7, 1, 6], [8, 6, 2], 18, 24)[0]   # (2, n, H, W)
    for n, (i, j) in enumerate([(7, 8), (1, 6), (6, 2)]):
        errors = [abs(complex(*ours[:, n, y, x]) - flow_of_point(spec, complex(x, y), i, j))
                  for y in range(18) for x in range(24)]
        assert np.isnan(errors).mean() < 0.2
        assert np.nanmax(errors) < 1e-4                                 # float32 at 24 px
    clip = data.MovingShapes(8, 18, 24).clips([spec], [""], "cpu")
    assert torch.equal(ours[:, 0], clip["flow"][0, :, 7])


@pytest.mark.parametrize("motion", [motion for motion in MOTIONS if motion != "still"])
def test_next_frame_at_p_plus_flow_is_this_frame(motion):
    """Flow and pixels alone: warped back, the pattern fits, and far better than unwarped."""
    spec = make(motion, 5, frames=6, height=96, width=96)
    spec["objects"][0].update(pattern="dot", radius=20.0)
    spec["order"] = [*range(1, len(spec["objects"])), 0]
    video, flow = render([spec], 6, 96, 96)
    middle = distance_to_centre(spec, 1, 96) < 14
    this, following = video[0, :, 1], video[0, :, 2]
    warped = look_up(following, pixels(96) + flow[0, :, 1])
    error = (warped - this).abs()[:, middle].mean()
    assert error < 0.02
    assert error < 0.5 * (following - this).abs()[:, middle].mean()


@seeds
def test_straight_lines_and_standing_still(seed):
    """Constant velocity along the named direction; none."""
    for name, direction in DIRECTIONS.items():
        v = velocities(make(name, seed))
        assert np.allclose(v, v[0])
        assert v[0] @ direction > (1 - 1e-9) * np.linalg.norm(v[0]) > 0.1
    assert not velocities(make("still", seed)).any()


@seeds
@pytest.mark.parametrize("motion", ["falling", "thrown"])
def test_gravity(motion, seed):
    """Newton: the second difference is g, down. What falls starts at rest, what is thrown goes up
    first, and keeps its speed across."""
    across, down = velocities(make(motion, seed)).T
    g = np.diff(down)
    assert g[0] > 0.02 and np.allclose(g, g[0])
    assert np.allclose(across, across[0])
    if motion == "falling":
        assert across[0] == 0 and np.isclose(down[0], g[0] / 2)
    else:
        assert abs(across[0]) > 0.1 and down[0] < 0 < down[14]


@seeds
@pytest.mark.parametrize("turn, sign", [("clockwise", 1), ("counter-clockwise", -1)])
def test_spins_and_orbits(turn, sign, seed):
    """y points down: clockwise is a growing angle, of the pose or of the arm between centres."""
    spec = make(f"spinning {turn}", seed)
    steps = sign * np.diff(np.array(spec["objects"][0]["pose"])[:, 2])
    assert np.allclose(steps, steps[0]) and 0.05 < steps[0] < math.pi / 8 + 1e-9
    assert not velocities(spec).any()
    spec = make(f"orbiting {turn}", seed)
    arm = (centres(spec) - centres(spec, 1)) @ (1, 1j)
    assert np.allclose(abs(arm), abs(arm[0])) and not velocities(spec, 1).any()
    assert (sign * np.angle(arm[1:] / arm[:-1]) > 0.02).all()


@seeds
def test_growth_and_zigzag(seed):
    """The scale changes by one ratio at every step; a zigzag goes ahead and turns back 3 times."""
    for motion, power in (("growing", 1), ("shrinking", -1)):
        scale = np.array(make(motion, seed)["objects"][0]["pose"])[:, 3]
        ratio = (scale[1:] / scale[:-1]) ** power
        assert ratio[0] > 1.02 and np.allclose(ratio, ratio[0])
    v = velocities(make("zigzag", seed, frames=33))[:32]
    ahead = np.abs(v.sum(0)).argmax()
    assert abs(v[0, ahead]) > 0.1 and np.allclose(v[:, ahead], v[0, ahead])
    assert (np.diff(np.sign(v[:, 1 - ahead])) != 0).sum() == 3


@seeds
def test_bounce_loses_its_share_at_the_floor(seed):
    """The lower edge is the floor of a disc. Each flight reaches e^2 of the height before."""
    spec = make("bouncing", seed, frames=2001)
    height = 31.5 - spec["objects"][0]["radius"] - centres(spec)[:2001, 1]
    assert -1e-9 < height.min() < 0.01
    hits = [t for t in range(1, 2000) if height[t - 1] >= height[t] < height[t + 1]]
    peak = height[hits[0]:hits[1]].max()
    assert np.isclose(peak / height[0], data.RESTITUTION**2, atol=0.02)
    g = np.diff(height[:hits[0] - 1], 2)
    assert g[0] < 0 and np.allclose(g, g[0])


@seeds
def test_collision_of_equal_masses(seed):
    """On a line they exchange their velocities, which keeps momentum and energy. The discs touch
    between two frames and never overlap."""
    spec = make("colliding", seed)
    a = velocities(spec)
    b = velocities(spec, 1)
    assert np.linalg.norm(a[0]) > 0.1 and not np.allclose(a[0], b[0])
    assert np.allclose(a[0], b[-1]) and np.allclose(b[0], a[-1])
    radii = [o["radius"] for o in spec["objects"]]
    gap = np.linalg.norm(centres(spec) - centres(spec, 1), axis=1) - sum(radii)
    assert radii[0] == radii[1]
    assert -1e-9 < gap.min() < np.linalg.norm(a[0] - b[0])
    assert gap[0] > gap.min() < gap[-1]


def test_crossing_hides_what_is_behind():
    """Where two discs overlap the pixel is red or blue, as the order says; either may be in front,
    and there is always something to hide."""
    fronts = collections.Counter()
    for seed in range(12):
        spec = make("crossing", seed, height=64, width=64)
        video = render([spec], 16, 64, 64)[0][0]
        t = np.linalg.norm(centres(spec) - centres(spec, 1), axis=1)[:16].argmin()
        both = torch.ones(64, 64, dtype=torch.bool)
        for k, o in enumerate(spec["objects"]):
            both &= distance_to_centre(spec, t, 64, k) < o["radius"] - 1
        assert both.sum() > 3
        red = video[0, t][both] > video[2, t][both]
        assert red.all() if spec["order"][-1] == 0 else not red.any()
        fronts[spec["order"][-1]] += 1
    assert fronts[0] >= 2 and fronts[1] >= 2


@pytest.mark.parametrize("pattern", data.PATTERNS)
def test_pattern_changes_the_brightness_never_the_hue(pattern):
    """Inside a shape each pixel is 65 to 100 % of its palette colour, and both ends occur."""
    for color, rgb in COLORS.items():
        spec = make("still", 1, frames=1, height=64, width=64, color=color)
        spec["objects"][0]["pattern"] = pattern
        picture = (render([spec], 1, 64, 64)[0][0, :, 0] + 1) / 2
        inside = distance_to_centre(spec, 0, 64) < spec["objects"][0]["radius"] - 1
        share = picture[:, inside] / torch.tensor(rgb)[:, None]
        assert torch.allclose(share, share[:1].expand_as(share), atol=1e-5)
        assert abs(share.min() - 0.65) < 0.01 and abs(share.max() - 1) < 0.01


@pytest.mark.parametrize("texture, low, high", [(0.0, -1, 1e-6), (1.0, 0.25, 1)])
def test_background_is_still_and_as_rich_as_asked_for(texture, low, high):
    """Away from the object a clip is the picture that is left when the object is far outside: of
    one grey, or with a large standard deviation (of a range of 2)."""
    for seed in range(10):
        spec = make("still", seed, texture=texture)
        away = distance_to_centre(spec, 0, 32) > spec["objects"][0]["radius"] + 1
        video = render([spec], 3, 32, 32)[0][0]
        spec["objects"][0]["pose"] = [[-99, -99, 0, 1]] * 4
        empty = render([spec], 1, 32, 32)[0][0]
        assert torch.equal(video[:, :, away], empty[:, :, away].expand(-1, 3, -1))
        assert low < empty.std((2, 3)).mean() < high


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_devices_agree():
    """Within 1e-5, but where rounding decides on which side of an outline a pixel is."""
    specs = drawn(32, texture=1.0)
    for cpu, gpu in zip(render(specs, 16, 64, 64), render(specs, 16, 64, 64, "cuda")):
        assert ((cpu - gpu.cpu()).abs() > 1e-5).float().mean() < 1e-5


@pytest.mark.parametrize("frames, height, width", [(1, 16, 16), (1, 40, 24), (3, 16, 64)])
def test_every_motion_in_any_size(frames, height, width):
    """Images (T = 1) have a flow as well. It is zero for what stands still, and only there."""
    for motion in MOTIONS:
        video, flow = render([make(motion, 1, frames, height, width)], frames, height, width)
        assert video.shape == (1, 3, frames, height, width) and video.abs().max() <= 1
        assert flow.shape == (1, 2, frames, height, width) and flow.isfinite().all()
        assert (flow.abs().max() == 0) == (motion == "still")


def test_a_clip_is_a_function_of_seed_split_and_number():
    """The same bits alone and in company, with one object or two; another clip for any other seed,
    split or number. The global generators of torch and numpy are left alone."""
    clips = data.MovingShapes(5, 24, 32, seed=7, texture=1.0)
    batch = clips.batch(range(8))
    assert {len(spec["objects"]) for spec in batch["spec"]} == {1, 2}
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for i in range(8):
        again = data.MovingShapes(5, 24, 32, seed=7, texture=1.0)[i]
        assert torch.equal(again["video"], batch["video"][i])
        assert torch.equal(again["flow"], batch["flow"][i])
        assert again["caption"] == batch["caption"][i]
        assert again["spec"] == json.loads(json.dumps(batch["spec"][i]))
    assert before == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    seen = set()
    for seed, split in [(0, "train"), (1, "train"), (0, "val"), (0, "test")]:
        clips = data.MovingShapes(2, 16, 16, seed, split)
        seen |= {json.dumps(clips.spec(i)) for i in range(50)}
    assert len(seen) == 200


def test_training_never_names_a_held_out_triple():
    """Two looks of each motion: none in 3,000 training clips, a twelfth of the test clips (250).
    All that they are made of is seen. Kinds are as frequent as asked for (750 and three times
    750). All counts within 4.6 standard deviations."""
    assert collections.Counter(motion for _, _, motion in HELD_OUT) == {m: 2 for m in MOTIONS}
    specs = drawn(3000, basic=0.25)
    train = {triple(spec) for spec in specs}
    assert not HELD_OUT & train
    assert [set(names) for names in zip(*train)] == [set(COLORS), set(SHAPES), set(MOTIONS)]
    assert 180 < sum(triple(spec) in HELD_OUT for spec in drawn(3000, "test")) < 320
    for kind in KINDS:
        assert 641 < sum(spec["kind"] == kind for spec in specs) < 859


def test_the_named_object_stays_in_the_picture():
    """Its inner disc (0.9 radii) in every frame of 1,000 clips."""
    for spec in drawn(1000):
        pose = np.array(spec["objects"][0]["pose"])[:16]
        reach = 0.9 * spec["objects"][0]["radius"] * pose[:, 3:]
        assert (pose[:, :2] - reach).min() > -0.5 - 1e-6, spec["motion"]
        assert (pose[:, :2] + reach).max() < 31.5 + 1e-6, spec["motion"]


def test_speeds_and_sizes_scale():
    """Twice as fast at twice the side; 0.75 to 5 px per frame at 64 px, fast above slow. `size`
    scales the radius, and nothing that a caption says."""
    speeds = {"slow": [], "fast": [], None: []}
    for i in range(300):
        small = data.MovingShapes(6, 32, 32).spec(i)
        large = data.MovingShapes(6, 64, 64).spec(i)
        half = data.MovingShapes(6, 32, 32, size=0.5).spec(i)
        assert np.isclose(small["objects"][0]["radius"], 2 * half["objects"][0]["radius"])
        assert data.caption(small) == data.caption(large) == data.caption(half)
        if small["motion"] in DIRECTIONS:
            assert np.allclose(velocities(large), 2 * velocities(small))
            speeds[large["speed"]].append(np.linalg.norm(velocities(large)[0]))
    assert 0.75 < min(speeds["slow"]) and max(speeds["slow"]) < min(speeds["fast"])
    assert max(speeds["fast"]) < 5 + 1e-9 and max(speeds[None]) < 5 + 1e-9


def test_captions_say_what_the_spec_does():
    """`parse` gives back the words of 1,000 specs in all templates, within 64 bytes."""
    for spec in drawn(500) + drawn(500, "val"):
        texts = {data.caption({**spec, "template": n}) for n in range(len(data.TEMPLATES))}
        assert data.caption(spec) in texts and len(texts) > 1
        for text in texts:
            words = data.parse(text)
            looks = [{"color": o["color"], "shape": o["shape"]} for o in spec["objects"]]
            assert words["objects"] == looks, text
            assert all(words[key] == spec[key] for key in ("kind", "motion", "speed")), text
            assert len(text.encode()) <= 64, text


@pytest.mark.parametrize("text, color, shape, motion, speed, objects", [
    ("a bright red square moving LEFT", "red", "square", "left", None, 1),
    ("a blue circle slowly drifts to the upper left", "blue", "circle", "up-left", "slow", 1),
    ("red cross turns anticlockwise", "red", "cross", "spinning counter-clockwise", None, 1),
    ("red cross goes around a red cross clockwise", "red", "cross", "orbiting clockwise", None, 2),
    ("green cross and yellow circle crossing fast", "green", "cross", "crossing", "fast", 2),
    ("a red cross moving down past a blue circle", "red", "cross", "down", None, 1),
    ("a yellow square that does not move, motionless", "yellow", "square", "still", None, 1)])
def test_free_typing_is_read(text, color, shape, motion, speed, objects):
    """Against the words a person would give the sentence."""
    words = data.parse(text)
    assert triple(words) == (color, shape, motion)
    assert (words["speed"], len(words["objects"])) == (speed, objects)


@pytest.mark.parametrize("text, missing", [
    ("", "no object"), ("a square moving right", "no object"), ("a red ball moving", "no object"),
    ("a red square", "no motion"), ("a red square spinning", "no sense of turning")])
def test_unreadable_prompt_says_what_is_missing(text, missing):
    """One line that quotes the prompt and names the missing part."""
    with pytest.raises(ValueError, match=missing) as error:
        data.parse(text)
    assert "\n" not in str(error.value) and repr(text) in str(error.value)


def test_fixed_prompts():
    """32 of each kind, in order, half of them held-out. Their fingerprint keeps the numbers that
    are measured on them comparable."""
    assert zlib.crc32("\n".join(PROMPTS + STRAIGHT).encode()) == 2364737344
    words = [data.parse(prompt) for prompt in PROMPTS]
    assert [w["kind"] for w in words] == [kind for kind in KINDS for _ in range(32)]
    assert len(set(PROMPTS)) == 128 and {w["motion"] for w in words} == set(MOTIONS)
    assert 55 < sum(triple(w) in HELD_OUT for w in words) < 75


def test_clips_of_prompts():
    """They are described by the same words. A partner that is not named is of another colour."""
    prompts = [*PROMPTS, "a red square crossing"]
    batch = data.MovingShapes(1, 16, 16).of_prompts(prompts)
    assert batch["caption"] == prompts
    *specs, crossing = batch["spec"]
    assert [data.caption(data.parse(p)) for p in PROMPTS] == [data.caption(s) for s in specs]
    assert [o["color"] == "red" for o in crossing["objects"]] == [True, False]


@pytest.mark.parametrize("split", data.SPLITS)
def test_straight_prompts(split):
    """64 different ones, eight of each direction. Those of the test split are STRAIGHT, the
    others have none of them, and training's name no held-out triple."""
    prompts = data.straight_prompts(split)
    words = [data.parse(prompt) for prompt in prompts]
    assert collections.Counter(w["motion"] for w in words) == dict.fromkeys(DIRECTIONS, 8)
    assert {w["speed"] for w in words} == {None, "slow", "fast"}
    assert len(set(prompts)) == 64
    assert len(set(prompts) & set(STRAIGHT)) == (64 if split == "test" else 0)
    assert split != "train" or not HELD_OUT & {triple(w) for w in words}


class MeanTAE:
    """Stands in for a TAE: the mean colour of each frame, ten times it for motion pictures."""
    encoded = 0

    def encode(self, video, motion=False):
        self.encoded += len(video)
        return video.mean((3, 4), keepdim=True) * (10 if motion else 1)


def settings(run, *more):
    return common.load_config(["frames=4", "height=16", "width=16", "seed=3", f"run={run}", *more])


@pytest.mark.parametrize("clips, cache, count, kept", [
    (0, 40, 40, 40), (0, 0, 0, 0), (5, 5, 5, 5), (6, 5, 6, 6)])
def test_latents(tmp_path, clips, cache, count, kept):
    """The world is endless or data.cache clips, a folder has its own number of clips. With a cache
    they are encoded once into files (float16: 2^-11 of values up to 10), which a second start
    reads; else when asked for. z = [x, d] is computed by hand here."""
    config = settings(tmp_path, f"data.cache={cache}")
    torch.save({}, tmp_path / "tae.pt")
    world = data.open_data(config)
    tae = MeanTAE()
    source = types.SimpleNamespace(
        count=clips, batch=world.batch, read=world.read, render=world.render)
    for _ in range(2):
        latents = data.Latents(config, tae, source, torch.device("cpu"))
    assert latents.count == count and tae.encoded == 2 * kept
    numbers = [(count or 1000) - 1, 0]
    z, captions = latents.to_z(*latents.read(numbers))
    assert tae.encoded == (2 * kept or 4) and z.dtype == torch.float32
    for row, clip in enumerate(world[number] for number in numbers):
        picture = data.flow_to_rgb(clip["flow"][None], config.flow.sigma)[0]
        expected = torch.cat([clip["video"].mean((2, 3)), 10 * picture.mean((2, 3))])
        assert torch.allclose(z[row, :, :, 0, 0], expected, atol=5e-3)
        assert captions[row] == clip["caption"]


def test_chunks_cover_the_clips_in_order(tmp_path):
    """At most 32 clips and 2^21 pixels at once, or one clip."""
    for side, most in ((16, 32), (512, 2), (4096, 1)):
        chunks = data.chunks(3, 103, settings(tmp_path, f"height={side}", f"width={side}"))
        assert [n for chunk in chunks for n in chunk] == list(range(3, 103))
        assert max(len(chunk) for chunk in chunks) == most


def test_open_data_follows_the_config(tmp_path):
    """Size, seed, split and knobs of the world."""
    config = settings(tmp_path, "world.texture=0.5", "world.size=0.7", "world.basic=0.2")
    clips = data.MovingShapes(4, 16, 16, 3, "val", texture=0.5, size=0.7, basic=0.2)
    assert data.open_data(config, "val").spec(5) == clips.spec(5)
