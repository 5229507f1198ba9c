"""The schedule, guidance, the sampler, loading a run, pictures.
References: closed formulas, sums by hand, what ffmpeg and Pillow read back."""
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import common
import sample
from conftest import TINY, read_state

CONFIG = common.load_config([*TINY, "run=runs/none"])       # C 4, T 2, H 4, W 4


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("S, L, N", [(100, 50, 1000), (4, 2, 20), (7, 3, 7), (100, 1, 250)])
def test_linear_quadratic_schedule(S, L, N):
    """App. C: i / N up to L, then the parabola through (L, L/N) with slope 1/N and through (S, 1).
    Reference: numpy solves for that parabola."""
    t = sample.linear_quadratic_schedule(S, L, N)
    a, b, c = np.linalg.solve([[1, L, L * L], [0, 1, 2 * L], [1, S, S * S]], [L / N, 1 / N, 1])
    expected = [i / N if i <= L else a + b * i + c * i * i for i in range(S + 1)]
    np.testing.assert_allclose(t, expected, atol=1e-6)
    assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()


@pytest.mark.parametrize("S, L, N", [(100, 100, 1000), (100, 50, 99), (1, 0, 10), (2, -1, 10)])
def test_impossible_schedules_are_refused(S, L, N):
    """No quadratic step, no linear step, or more steps than emulated ones."""
    with pytest.raises(ValueError, match=f"found {S} steps, {L} linear, {N} emulated"):
        sample.linear_quadratic_schedule(S, L, N)


def test_guidance_by_hand():
    """Eq. 8 and App. A with the paper's weights, then each weight alone, then neutral ones.
    Reference: 9*2 - 5*1 - 3*(-4) = 25, and -4 + 3*(1 - -4) + 5*(2 - 1) = 16."""
    two, one, minus_four = torch.tensor([2.0, 1.0, -4.0])
    assert sample.inner_guidance(two, one, minus_four) == 25
    assert sample.inner_guidance(two, one, minus_four, w1=1.5, w2=0) == 2.5 * 2 - 1.5 * 1
    assert sample.inner_guidance(two, one, minus_four, w1=0, w2=2) == 3 * 2 - 2 * -4
    assert sample.inner_guidance(two, one, minus_four, w1=0, w2=0) == 2
    assert sample.ip2p_guidance(two, one, minus_four) == 16
    assert sample.ip2p_guidance(two, one, minus_four, w_text=1, w_motion=1) == 2
    assert sample.ip2p_guidance(two, one, minus_four, w_text=0, w_motion=1) == 1
    assert sample.ip2p_guidance(two, one, minus_four, w_text=0, w_motion=0) == -4


def test_equation_7_gives_equation_8():
    """The score of Eq. 7's product of densities is Eq. 8's combination of scores. Reference:
    autograd through the product, for a random Gaussian of (x, d, y), with conditionals by Bayes."""
    root = rand(3, 3).double()
    covariance = root @ root.T + 0.1 * torch.eye(3)
    at = rand(3, seed=1).double()                                   # x, d, y
    x, d, y = range(3)

    def log_p(point, *rows):                                        # but for a constant
        rows = list(rows)
        inverse = covariance[rows][:, rows].inverse()
        return -0.5 * point[rows] @ inverse @ point[rows]

    def eq_7(point):
        y_given_both = log_p(point, x, d, y) - log_p(point, x, d)
        d_given_others = log_p(point, x, d, y) - log_p(point, x, y)
        return log_p(point, x, d, y) - log_p(point, y) + 5 * y_given_both + 3 * d_given_others

    def score(log_density, *rows):
        both = at[:2].clone().requires_grad_()                      # with respect to [x, d]
        return torch.autograd.grad(log_density(torch.cat([both, at[2:]]), *rows), both)[0]

    guided = sample.inner_guidance(score(log_p, x, d, y), score(log_p, x, d), score(log_p, x, y))
    close(guided, score(eq_7), 1e-9)


# ---- The sampler, with a stub in the DiT's place ------------------------------------------------

PROMPTS = ["ab", "abcd"]


def answer(x, text, t):
    """Not linear in d or text, and x and d are mixed, so that no mistake cancels another."""
    first_number = text[:, 0, :1, None, None, None]
    return torch.sin(2 * x) + first_number * torch.cos(x.flip(1)) + t.view(-1, 1, 1, 1, 1)


class Stub:
    """A model for the sampler whose DiT is a function of (x, text, t) and remembers its inputs."""

    def __init__(self, answer=answer, motion=True):
        self.config = CONFIG
        self.device = torch.device("cpu")
        self.motion = motion
        self.answer = answer
        self.seen = []

    def text(self, prompts):
        """A token that says how long the prompt is, and for short ones a 9 that is masked."""
        y = torch.tensor([[[0.5 + len(prompt)], [9.0 - len(prompt) // 3]] for prompt in prompts])
        return y, y[:, :, 0] != 9

    def dit(self, x, t, text, mask):
        assert torch.equal(mask, text[:, :, 0] != 9)
        self.seen.append((x.clone(), text.clone(), t.clone()))
        return self.answer(x, text, t)


def branches(z, text):
    """What the DiT reads in each branch: latents and text of both prompts."""
    no_d = torch.cat([z[:, :4], torch.zeros_like(z[:, 4:])], dim=1)
    return {"u": (z, text[:2]), "no text": (z, text[[2, 2]]),
            "no motion": (no_d, text[:2]), "neither": (no_d, text[[2, 2]])}


@pytest.mark.parametrize("options, first_half, factors", [
    (dict(guidance="inner"), True, {"u": 9, "no text": -5, "no motion": -3}),
    (dict(guidance="inner"), False, {"u": 6, "no text": -5}),
    (dict(guidance="ip2p"), True, {"u": 5, "no text": -2, "neither": -2}),
    (dict(guidance="ip2p"), False, {"u": 5, "no text": -4}),
    (dict(guidance="text"), True, {"u": 6, "no text": -5}),
    (dict(guidance="none"), True, {"u": 1}),
    (dict(use_motion=False), True, {"no motion": 6, "neither": -5})])
def test_guided_velocity(options, first_half, factors):
    """One call of the DiT with the branches that are used and no other, d exactly 0 where it is
    dropped, and their sum. References: what the stub saw; factors by hand from Eq. 8 and App. A,
    with w2 = 0 or w_m = 1 in the second half of the steps."""
    model = Stub()
    z = rand(2, 8, 2, 4, 4)
    t = torch.tensor([0.25, 0.25])
    text, mask = model.text([*PROMPTS, ""])
    s = sample.settings(model, w_text=5, w_motion=3, **options)
    found = sample.guided_velocity(model, z, t[0], text, mask, s, first_half)
    parts = branches(z, text)
    close(found, sum(factor * answer(*parts[name], t) for name, factor in factors.items()))
    (x, words, times), = model.seen
    assert (times == 0.25).all()
    seen = []
    for rows in torch.arange(len(x)).split(2):
        same = [torch.equal(x[rows], a) and torch.equal(words[rows], b) for a, b in parts.values()]
        seen.append(list(parts)[same.index(True)])
    assert sorted(seen) == sorted(factors)


def states_of(model, steps=10, start=0, z=None, **options):
    s = sample.settings(model, steps, **options)
    return list(sample.sampler(model, PROMPTS, [3, 4], s, start, z))


def test_every_state_is_yielded():
    """(k, t_k, z) from noise to data, and from any state on (SDEdit, Fig. 8). References: the
    schedule by itself, 50 emulated steps for 10 as the config has 20 for 4; the whole run."""
    model = Stub()
    found = states_of(model, 10)
    times = sample.linear_quadratic_schedule(10, 5, 50).tolist()
    assert [k for k, _, _ in found] == list(range(11))
    assert [t for _, t, _ in found] == pytest.approx(times)
    assert [t[0].item() for _, _, t in model.seen] == pytest.approx(times[:-1])
    assert torch.equal(found[0][2], sample.noise(model, [3, 4]))
    rest = states_of(model, 10, start=4, z=found[4][2])
    assert [(k, t) for k, t, _ in rest] == [(k, t) for k, t, _ in found[4:]]
    assert torch.equal(rest[-1][2], found[-1][2])
    default = vars(sample.settings(model))              # what is not given is the config's
    assert all(default[name] == value for name, value in CONFIG.sample.items())


def test_euler_on_a_linear_field():
    """z_(k+1) = z_k + (t_(k+1) - t_k) u. Reference: u = c - z gives c + (z_0 - c) prod(1 - dt)."""
    def field(x, text, t):
        return 0.7 - x

    found = states_of(Stub(field), guidance="none")
    steps = np.diff([t for _, t, _ in found])
    for k, _, z in found:
        close(z, 0.7 + (found[0][2] - 0.7) * float(np.prod(1 - steps[:k])), 1e-5)


@pytest.mark.parametrize("options, first, then", [
    ({}, 3, 2), (dict(guidance="ip2p"), 3, 2), (dict(guidance="text"), 2, 2),
    (dict(guidance="none"), 1, 1), (dict(use_motion=False), 2, 2)])
def test_branches_of_each_step(options, first, then):
    """sec. 4.3: motion guides in the first 50 of 100 steps, so 250 evaluations make a clip.
    Tab. 3's "without optical flow": d is 0 at every input, and stays as it was at the start."""
    model = Stub()
    found = states_of(model, 100, **options)
    assert [len(x) // 2 for x, _, _ in model.seen] == [first] * 50 + [then] * 50
    use_motion = options.get("use_motion", True)
    assert use_motion == any(x[:, 4:].any().item() for x, _, _ in model.seen)
    assert use_motion != torch.equal(found[-1][2][:, 4:], found[0][2][:, 4:])


@pytest.mark.parametrize("guidance, w_text", [("inner", 5.0), ("ip2p", 6.0)])
def test_a_base_is_guided_by_text_alone(guidance, w_text):
    """A stage without motion has C channels and two branches. Reference: text guidance."""
    model = Stub(motion=False)
    found = states_of(model, 4, guidance=guidance, w_text=w_text)
    again = states_of(Stub(motion=False), 4, guidance="text", w_text=5.0)
    assert {x.shape for x, _, _ in model.seen} == {(2 * 2, 4, 2, 4, 4)}
    close(found[-1][2], again[-1][2])


def test_noise_follows_from_the_seed():
    """The same in any batch; the base gets the x of VideoJAM's; standard normal, within four
    standard errors of 25,600 numbers."""
    joint = sample.noise(Stub(), [5, 6, 7])
    assert torch.equal(sample.noise(Stub(), [6])[0], joint[1])
    assert not torch.equal(joint[0], joint[1])
    assert torch.equal(sample.noise(Stub(motion=False), [5, 6, 7]), joint[:, :4])
    many = sample.noise(Stub(), range(100))
    assert abs(many.mean()) < 0.025 and abs(many.var() - 1) < 0.036


# ---- A trained run ------------------------------------------------------------------------------

def test_a_clip_depends_on_its_prompt_and_seed_alone(trained, monkeypatch):
    """In a batch, alone, in batches of two. Reference: each other. 1e-4: matrix products of
    another height round differently, and guidance enlarges that."""
    model = common.load_run(trained[0])
    for w in model.dit.parameters():                    # after two steps all clips look alike
        w.add_(0.1 * rand(*w.shape))
    prompts = ["a red square moving right", "a blue circle falling", "a red square moving right"]
    video, motion = sample.generate(model, prompts, [1, 2, 3], bar=False)
    assert video.shape == motion.shape == (3, 3, 8, 16, 16)
    assert (video[0] - video[2]).abs().max() > 1e-2
    alone, _ = sample.generate(model, prompts[1:2], [2], bar=False)
    close(alone[0], video[1])
    monkeypatch.setattr(common, "PIXELS_AT_ONCE", 2 * 8 * 16 * 16)
    for one, other in zip(sample.generate(model, prompts, [1, 2, 3], bar=False), (video, motion)):
        close(one, other)
    no_motion = sample.settings(model, use_motion=False)
    assert sample.generate(model, prompts, [1, 2, 3], no_motion, bar=False)[1] is None
    with pytest.raises(ValueError, match="found no prompt"):
        sample.generate(model, [], [])


def test_decode(trained):
    """x through the TAE as appearance, d as motion, cut to [-1, 1]. Reference: the TAE itself."""
    model = common.load_run(trained[0])
    z = 3 * rand(1, 8, 2, 4, 4)
    video, motion = sample.decode(model, z)
    assert torch.equal(video, model.tae.decode(z[:, :4], 8).clamp(-1, 1))
    assert torch.equal(motion, model.tae.decode(z[:, 4:], 8, motion=True).clamp(-1, 1))
    assert video.abs().max() == 1
    model.motion = False
    assert sample.decode(model, z[:, :4])[1] is None


@pytest.mark.parametrize("stage, motion", [("base", False), ("control", False), ("videojam", True)])
def test_load_run_gives_the_averaged_weights(trained, stage, motion):
    """In eval mode, without gradients. Reference: `average` in the stage's last checkpoint."""
    model = common.load_run(trained[0], stage)
    average = read_state(trained[0], stage, 2)["average"]
    own = torch.nn.ModuleDict(dict(text=model.text, dit=model.dit)).state_dict()
    assert own.keys() == average.keys()
    assert all(torch.equal(own[name], average[name]) for name in own)
    assert model.motion is motion and (model.dit.motion_in is not None) is motion
    for net in (model.tae, model.text, model.dit):
        assert not net.training and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("how, words", [
    ("flipped bit", "videojam.pt is damaged"), ("cut", "videojam.pt is damaged"),
    ("a list", "videojam.pt is damaged, or no weights of train.py"),
    ("other width", r"videojam.pt: dit\.\S+: found \(.*32.*\), expected \(.*64.*\)"),
    ("other TAE", "videojam.pt was trained on another tae.pt"),
    ("config.json", "is no run folder; train first: python train.py run="),
    ("tae.pt", "tae.pt is missing; train it: python train.py run=.* stages=tae"),
    ("videojam.pt", "videojam.pt is missing; train it: python train.py run=.* stages=videojam")])
def test_a_spoilt_run_is_refused(trained, tmp_path, how, words):
    """One line that names the file, and what to do where something is missing."""
    run = shutil.copytree(trained[0], tmp_path / "run")
    path = run / "videojam.pt"
    content = bytearray(path.read_bytes())
    if how == "flipped bit":                            # of a weight: torch reads it in silence
        w = common.read_weights(path)["weights"]["dit.blocks.0.ffn.up.weight"]
        content[content.find(w.numpy().tobytes()) + 10] ^= 64
        path.write_bytes(content)
        torch.load(path, weights_only=True)
    elif how == "cut":
        path.write_bytes(content[:-1000])
    elif how == "a list":
        torch.save([1], path)
    elif how == "other width":
        text = (run / "config.json").read_text()
        (run / "config.json").write_text(text.replace('"dim": 32', '"dim": 64'))
    elif how == "other TAE":                            # by one number
        saved = torch.load(run / "tae.pt", weights_only=True)
        saved["weights"]["statistics"][0, 0, 0] += 1
        common.save(run / "tae.pt", saved)
    else:
        (run / how).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        common.load_run(run)
    assert "\n" not in str(error.value)


# ---- Pictures -----------------------------------------------------------------------------------

def greys(T):
    """Frame k is a grey of 40 k of 255: (3, T, 16, 24) in [-1, 1]."""
    return (40 * torch.arange(T) / 127.5 - 1).view(1, T, 1, 1).expand(3, T, 16, 24)


def test_to_uint8():
    """[-1, 1] -> 0 to 255, clamped and rounded. Reference: by hand."""
    pixels = torch.tensor([-2.0, -1, 0, 1, 5]).view(1, 5, 1, 1).expand(3, 5, 2, 2)
    frames = common.to_uint8(pixels)
    assert frames.shape == (5, 2, 2, 3) and frames.dtype == np.uint8
    assert frames[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_an_mp4_that_browsers_play(tmp_path):
    """H.264, yuv420p, fps in the header, every frame, 16 px doubled to reach 18, motion to the
    right. Reference: ffmpeg's reading; grey survives the codec within 3 of 255."""
    path = tmp_path / "new" / "clip.mp4"
    common.write_video(path, greys(6), 24, motion=-greys(6), least=18)
    header = iio.immeta(path, plugin="FFMPEG")
    frames = np.stack(list(iio.imiter(path, plugin="FFMPEG")))
    assert (header["codec"], header["fps"], header["pix_fmt"][:7]) == ("h264", 24, "yuv420p")
    assert frames.shape == (6, 32, 96, 3)
    for left, expected in ((4, 40 * np.arange(6)), (52, 255 - 40 * np.arange(6))):
        middle = frames[:, 4:28, left:left + 40]
        np.testing.assert_allclose(middle.mean((1, 2, 3)), expected, atol=3)


def test_a_gif(tmp_path):
    """Every frame, for ever, at its speed. Reference: Pillow's reading."""
    path = tmp_path / "clip.gif"
    common.write_video(path, greys(6), 8, least=16)
    frames = iio.imread(path, plugin="pillow", index=None)
    header = iio.immeta(path, plugin="pillow")
    assert frames.shape[:3] == (6, 16, 24)
    assert header["loop"] == 0 and header["duration"] == pytest.approx(125, abs=5)
    np.testing.assert_allclose(frames[..., 0].mean((1, 2)), 40 * np.arange(6), atol=2)


def test_a_sheet(tmp_path):
    """A line per clip, frames spread from the first to the last. Reference: each cell's middle."""
    path = tmp_path / "new" / "sheet.png"
    common.write_sheet(path, [greys(6), -greys(6)], columns=3, least=16)
    sheet = iio.imread(path)
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 3
    middles = sheet[height // 2::height, width // 2::width, 0]
    assert middles.tolist() == [[0, 80, 200], [255, 175, 55]]
    common.write_sheet(path, [greys(2)], columns=8, least=16)
    assert iio.imread(path).shape[1] == 2 * width       # fewer frames than columns
