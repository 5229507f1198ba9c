"""Guidance, the schedule, the sampler, files. References: hand-written sums, closed formulas, ffmpeg's reading of what was written."""
import json
import math
import shutil
import types

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import common
import data
import metrics
import sample
from conftest import TINY

CONFIG = common.load_config(TINY)                         # C 4, T 2, H 4, W 4


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- The schedule ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("S, L, N", [(100, 50, 1000), (50, 25, 100), (4, 2, 20), (7, 3, 7), (100, 1, 250), (3, 2, 10)])
def test_linear_quadratic_schedule(S, L, N):
    """App. C and choice 5. Reference: i / N up to L, then the one parabola through (L, L/N) with slope 1/N there and through (S, 1): a linear
    system in numpy. 1e-6: float32."""
    t = sample.linear_quadratic_schedule(S, L, N)
    a, b, c = np.linalg.solve([[1, L, L * L], [0, 1, 2 * L], [1, S, S * S]], [L / N, 1 / N, 1])
    expected = [i / N if i <= L else a + b * i + c * i * i for i in range(S + 1)]
    assert t.shape == (S + 1,) and t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()
    np.testing.assert_allclose(t, expected, atol=1e-6)


def test_the_papers_schedule():
    """App. C: 100 steps; the first half covers t <= 0.05 and both parts have the same slope where they meet (choice 5). Reference: the
    quadratic part, continued one step to the left by its constant second difference, meets the linear one."""
    t = sample.linear_quadratic_schedule().double()
    torch.testing.assert_close(t, sample.linear_quadratic_schedule(100, 50, 1000).double())
    assert t[50].item() == pytest.approx(0.05)
    second = t[50:].diff().diff()
    assert second.std() < 1e-6 and second.mean() > 0
    slope = (t[51] - t[50] - second.mean() / 2).item()
    assert slope == pytest.approx(1e-3, rel=1e-3) and slope == pytest.approx((t[50] - t[49]).item(), rel=1e-3)


@pytest.mark.parametrize("S, L, N", [(100, 100, 1000), (100, 50, 99), (1, 0, 10), (0, 0, 10), (2, -1, 10), (100, 101, 1000)])
def test_impossible_schedules_are_refused(S, L, N):
    """Choice 5: L = S and any t that does not increase are refused, in one line with the numbers."""
    with pytest.raises(ValueError, match=str(S)) as error:
        sample.linear_quadratic_schedule(S, L, N)
    assert "\n" not in str(error.value)


# ---- Eq. 8 and App. A -----------------------------------------------------------------------------------------------

def test_equation_8_by_hand():
    """Eq. 8 with the paper's w1=5, w2=3: 9 u - 5 u_no_text - 3 u_no_motion. Reference: 9*2 - 5*1 - 3*(-4) = 25."""
    number = lambda x: torch.tensor([float(x)])
    assert sample.inner_guidance(number(2), number(1), number(-4)) == 25
    assert sample.inner_guidance(number(2), number(1), number(-4), 0, 0) == 2   # neutral
    assert sample.inner_guidance(number(2), number(1), number(-4), 1.5, 0) == 2.5 * 2 - 1.5 * 1      # text guidance
    assert sample.inner_guidance(number(2), number(1), number(-4), 0, 2) == 3 * 2 - 2 * -4           # w2 is motion


def test_ip2p_by_hand():
    """App. A with w_motion=3, w_text=5: -4 + 3 (1 - -4) + 5 (2 - 1) = 16. Neutral at 1, 1; first the motion, then the text."""
    number = lambda x: torch.tensor([float(x)])
    assert sample.ip2p_guidance(number(2), number(1), number(-4)) == 16
    assert sample.ip2p_guidance(number(2), number(1), number(-4), 1, 1) == 2
    assert sample.ip2p_guidance(number(2), number(1), number(-4), w_text=0, w_motion=1) == 1
    assert sample.ip2p_guidance(number(2), number(1), number(-4), w_text=0, w_motion=0) == -4
    u, no_text, none = rand(5), rand(5, seed=1), rand(5, seed=2)
    torch.testing.assert_close(sample.ip2p_guidance(u, no_text, none, 6.0, 1.0), sample.inner_guidance(u, no_text, none, 5.0, 0.0))   # a scale more


# ---- One guided velocity --------------------------------------------------------------------------------------------

def response(x, text, t):
    """What the fake DiT answers, per sample: not linear in d or text, and x and d are mixed, so that no mistake cancels."""
    return torch.sin(2 * x) + text[:, 0, :1, None, None, None] * torch.cos(x.flip(1)) + t.view(-1, 1, 1, 1, 1)


class Fake:
    """A model for the sampler whose DiT is `response`, or any function of (x, text, t); it remembers every input."""

    def __init__(self, answer=response, motion=True, **config):
        self.config, self.motion, self.device, self.answer, self.seen = {**CONFIG, **config}, motion, torch.device("cpu"), answer, []

    def text(self, prompts):                            # one token of two numbers, and a masked one; "" is 0.5
        return torch.tensor([[[0.5 + len(p), 1.0], [9.0, 9.0]] for p in prompts]), torch.tensor([[True, False]] * len(prompts))

    def dit(self, x, t, text, mask):
        assert len(x) == len(t) == len(text) == len(mask) and mask.tolist() == [[True, False]] * len(x)
        self.seen.append((x.clone(), text.clone(), t.clone()))
        return self.answer(x, text, t)


PROMPTS = ["ab", "abcd"]


def guided(model, z, guidance="inner", w1=5.0, w2=3.0, motion_on=True, use_motion=True):
    return sample.guided_velocity(model, z, torch.tensor(0.25), *model.text([*PROMPTS, ""]), guidance, w1, w2, motion_on, use_motion)


def parts(z):
    """u([x,d],y), u([x,d],0), u([x,0],y), u([x,0],0) and u of text alone, each called by itself."""
    text, t = Fake().text([*PROMPTS, ""])[0], torch.full((2,), 0.25)
    zero_d = torch.cat([z[:, :4], 0 * z[:, 4:]], 1)
    return (response(z, text[:2], t), response(z, text[2:].expand(2, -1, -1), t), response(zero_d, text[:2], t),
            response(zero_d, text[2:].expand(2, -1, -1), t))


def test_equation_7_gives_equation_8():
    """Eq. 7's product of densities has Eq. 8's combination as its score. Reference: autograd through the log of the product, p(y | z) and p(d | x, y)
    by Bayes from one random Gaussian of (x, d, y), where every conditional score is known; 1e-9: float64."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 3, generator=g, dtype=torch.float64)
    cov, w1, w2 = a @ a.T + 0.1 * torch.eye(3), 5.0, 3.0
    at = torch.randn(3, generator=g, dtype=torch.float64)                       # x, d, y

    def logp(v, rows):                                                          # log density of the marginal of these rows
        return torch.distributions.MultivariateNormal(torch.zeros(len(rows), dtype=v.dtype), cov[rows][:, rows]).log_prob(v[rows])

    def score(f):
        z = at[:2].clone().requires_grad_()
        return torch.autograd.grad(f(torch.cat([z, at[2:]])), z)[0]             # with respect to [x, d]

    product = lambda v: ((logp(v, [0, 1, 2]) - logp(v, [2])) + w1 * (logp(v, [0, 1, 2]) - logp(v, [0, 1]))
                         + w2 * (logp(v, [0, 1, 2]) - logp(v, [0, 2])))
    u, u_no_text = score(lambda v: logp(v, [0, 1, 2]) - logp(v, [2])), score(lambda v: logp(v, [0, 1]))
    u_no_motion = score(lambda v: logp(v, [0, 2]) - logp(v, [2]))
    assert u_no_motion[1] == 0                                                  # p(x | y) has no score on d (choice 4)
    torch.testing.assert_close(score(product), sample.inner_guidance(u, u_no_text, u_no_motion, w1, w2), rtol=1e-9, atol=1e-9)


CASES = {  # the velocity that is expected for (appearance, motion), from the four parts; by hand, from Eq. 8 and App. A
    ("inner", True, "literal"): lambda u, no_y, no_d, none: (9 * u - 5 * no_y - 3 * no_d,) * 2,
    ("inner", True, "text"): lambda u, no_y, no_d, none: (9 * u - 5 * no_y - 3 * no_d, 6 * u - 5 * no_y),
    ("inner", False, "text"): lambda u, no_y, no_d, none: (6 * u - 5 * no_y,) * 2,
    ("inner", False, "literal"): lambda u, no_y, no_d, none: (6 * u - 5 * no_y,) * 2,
    ("ip2p", True, "literal"): lambda u, no_y, no_d, none: (none + 3 * (no_y - none) + 5 * (u - no_y),) * 2,
    ("ip2p", True, "text"): lambda u, no_y, no_d, none: (none + 3 * (no_y - none) + 5 * (u - no_y), no_y + 5 * (u - no_y)),
    ("ip2p", False, "text"): lambda u, no_y, no_d, none: (no_y + 5 * (u - no_y),) * 2,
    ("text", True, "text"): lambda u, no_y, no_d, none: (6 * u - 5 * no_y,) * 2,
    ("none", True, "text"): lambda u, no_y, no_d, none: (u,) * 2,
}


@pytest.mark.parametrize("guidance, on, guide_motion", CASES)
def test_guided_velocity(guidance, on, guide_motion):
    """Eq. 8 and App. A as the sampler uses them, choice 4 for the motion half, neutral weights outside the steps where motion guides.
    Reference: the parts evaluated one by one, and the sums written out. 1e-4: sums of ten times larger numbers."""
    z = rand(2, 8, 2, 4, 4)
    found = guided(Fake(guide_motion=guide_motion), z, guidance, motion_on=on)
    x, d = CASES[guidance, on, guide_motion](*parts(z))
    torch.testing.assert_close(found, torch.cat([x[:, :4], d[:, 4:]], 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance, on, drops", [
    ("inner", True, [(0, 0), (0, 1), (1, 0)]), ("inner", False, [(0, 0), (0, 1)]), ("ip2p", True, [(0, 0), (0, 1), (1, 1)]),
    ("ip2p", False, [(0, 0), (0, 1)]), ("text", True, [(0, 0), (0, 1)]), ("none", True, [(0, 0)])])
def test_the_branches_run_as_one_batch(guidance, on, drops):
    """One call of the DiT with as many branches as are used: which have d exactly 0 and which the empty text. Reference: (d dropped, y dropped)
    by Eq. 8 and App. A, as a set: their order is free."""
    model, z = Fake(), rand(2, 8, 2, 4, 4)
    guided(model, z, guidance, motion_on=on)
    (x, text, t), = model.seen
    assert len(x) == 2 * len(drops) and (t == 0.25).all()
    found = set()
    for branch in range(len(drops)):
        rows = slice(2 * branch, 2 * branch + 2)
        assert torch.equal(x[rows, :4], z[:, :4])
        zero, empty = not x[rows, 4:].any(), text[rows, 0, 0].tolist() == [0.5, 0.5]
        assert zero or torch.equal(x[rows, 4:], z[:, 4:])
        assert empty or text[rows, 0, 0].tolist() == [2.5, 4.5]
        found.add((int(zero), int(empty)))
    assert found == set(drops)


def test_neutral_weights_are_no_guidance():
    """Inner-Guidance (0, 0) and IP2P (1, 1) give u alone; Eq. 8 with w2 = 0 is text guidance. Reference: `none` and `text`."""
    z = rand(2, 8, 2, 4, 4)
    alone = guided(Fake(), z, "none")
    for guide_motion in ("text", "literal"):
        torch.testing.assert_close(guided(Fake(guide_motion=guide_motion), z, "inner", 0.0, 0.0), alone)
        torch.testing.assert_close(guided(Fake(guide_motion=guide_motion), z, "ip2p", 1.0, 1.0), alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(guided(Fake(guide_motion=guide_motion), z, "inner", 5.0, 0.0), guided(Fake(), z, "text"), rtol=1e-5, atol=1e-5)


def test_without_optical_flow_every_branch_sees_zero():
    """Tab. 3, without optical flow: d = 0 in both branches (choice 4), no third. Reference: text guidance on parts with d = 0."""
    model, z = Fake(), rand(2, 8, 2, 4, 4)
    found = guided(model, z, "inner", use_motion=False)
    assert len(model.seen[0][0]) == 4 and not model.seen[0][0][:, 4:].any()
    _, _, no_d, none = parts(z)
    torch.testing.assert_close(found[:, :4], (6 * no_d - 5 * none)[:, :4], rtol=1e-4, atol=1e-4)


# ---- The sampler ----------------------------------------------------------------------------------------------------

def states(model, steps=10, seeds=(3, 4), **options):
    return list(sample.sampler(model, PROMPTS, list(seeds), steps=steps, **options))


def test_the_sampler_yields_every_state():
    """A generator of steps + 1 states (k, t_k, z) from noise at t = 0 to t = 1. Reference: the schedule, and the noise of the seeds."""
    model = Fake()
    found = states(model, 10)
    assert [k for k, _, _ in found] == list(range(11))
    times = sample.linear_quadratic_schedule(10, 5, 50)                         # N = 20 for 4 steps, in proportion for 10
    assert [t for _, t, _ in found] == pytest.approx(times.tolist()) and found[0][1] == 0 and found[-1][1] == 1
    assert torch.equal(found[0][2], sample.noise(model, [3, 4]))
    assert [t[0].item() for _, _, t in model.seen] == pytest.approx(times[:-1].tolist())
    assert isinstance(sample.sampler(model, PROMPTS, [3, 4]), types.GeneratorType)


def test_euler_steps():
    """z_(k+1) = z_k + (t_(k+1) - t_k) u(z_k). References: a constant field is integrated exactly; u = c - z gives
    c + (z_0 - c) prod(1 - dt). 1e-5: float32 over ten steps."""
    c = torch.full((1, 8, 2, 4, 4), 0.7)
    found = states(Fake(lambda x, text, t: c.expand(len(x), -1, -1, -1, -1)), guidance="none")
    torch.testing.assert_close(found[-1][2], found[0][2] + c, rtol=1e-5, atol=1e-5)
    found = states(Fake(lambda x, text, t: c - x), guidance="none")
    for n, (_, _, z) in enumerate(found):
        shrink = np.prod(1 - np.diff([t for _, t, _ in found])[:n])
        torch.testing.assert_close(z, c + (found[0][2] - c) * float(shrink), rtol=1e-5, atol=1e-5)


def test_euler_needs_the_guided_velocity():
    """Each step of the sampler uses guided_velocity with motion in the first half of the steps only (Eq. 8's schedule in sec. 4.3), and the
    config's weights. Reference: the same steps by hand."""
    model = Fake()
    found = states(model, 6)
    w = CONFIG["sample"]
    for k in range(6):
        z, dt = found[k][2], found[k + 1][1] - found[k][1]
        u = sample.guided_velocity(model, z, torch.tensor(found[k][1]), *model.text([*PROMPTS, ""]), "inner", w["w_text"], w["w_motion"], k < 3, True)
        torch.testing.assert_close(found[k + 1][2], z + dt * u, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options, branches", [
    ({}, 250), ({"guidance": "ip2p"}, 250), ({"guidance": "text"}, 200), ({"guidance": "none"}, 100), ({"motion_steps": 0}, 200),
    ({"motion_steps": 100}, 300), ({"use_motion": False}, 200)])
def test_branch_evaluations(options, branches):
    """The third branch is evaluated only where it is used: 250 evaluations per clip in 100 steps, 200 with text alone. Reference: rows counted."""
    model = Fake(lambda x, text, t: 0 * x)
    states(model, 100, **options)
    assert sum(len(x) for x, _, _ in model.seen) == 2 * branches and len(model.seen) == 100


def test_no_motion_never_integrates_d():
    """Choice 4: without optical flow d is 0 at every input, and never integrated. Reference: d's half of the state stays what it was."""
    model = Fake()
    found = states(model, 6, use_motion=False)
    assert all(torch.equal(z[:, 4:], found[0][2][:, 4:]) for _, _, z in found)
    assert all(not x[:, 4:].any() for x, _, _ in model.seen) and not torch.equal(found[-1][2][:, :4], found[0][2][:, :4])


@pytest.mark.parametrize("guidance", ["inner", "ip2p"])
def test_a_base_is_guided_by_text_alone(guidance):
    """A stage without motion has no d to guide with: C channels, two branches. Reference: Eq. 8 with w2 = 0."""
    model = Fake(motion=False)
    found = states(model, 4, guidance=guidance)
    assert found[-1][2].shape == (2, 4, 2, 4, 4) and all(len(x) == 4 for x, _, _ in model.seen)
    again = states(Fake(motion=False), 4, guidance="text")
    torch.testing.assert_close(found[-1][2], again[-1][2])


def test_going_on_from_a_given_state():
    """SDEdit (Fig. 8): z given at step `start` is finished as the whole run would. Reference: the whole run."""
    whole = states(Fake(), 6)
    rest = states(Fake(), 6, start=4, z=whole[4][2])
    assert [k for k, _, _ in rest] == [4, 5, 6]
    torch.testing.assert_close(rest[-1][2], whole[-1][2])


def test_noise_follows_from_the_seed_alone():
    """One seed, one noise: in any batch, for the base (the first C channels) and for the joint net; standard normal. Reference: each other."""
    joint, base = Fake(), Fake(motion=False)
    together = sample.noise(joint, [5, 6, 7])
    assert torch.equal(sample.noise(joint, [6])[0], together[1]) and not torch.equal(together[0], together[1])
    assert torch.equal(sample.noise(base, [5, 6, 7]), together[:, :4])
    many = sample.noise(joint, range(100))
    assert abs(many.mean()) < 4 / math.sqrt(many.numel()) and abs(many.var() - 1) < 4 * math.sqrt(2 / many.numel())


def test_no_prompt_is_refused():
    """An empty list of prompts is an error in one line, for the sampler and for generate."""
    for call in (lambda: list(sample.sampler(Fake(), [], [])), lambda: sample.generate(Fake(), [], [])):
        with pytest.raises(ValueError, match="no prompt"):
            call()


# ---- Runs -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def shake(model):
    """The trained run has seen two steps; larger weights make its samples differ by more than rounding."""
    g = torch.Generator().manual_seed(0)
    for w in model.dit.parameters():
        w.add_(0.1 * torch.randn(w.shape, generator=g))
    return model


def test_the_same_seed_gives_the_same_clip(trained):
    """A clip depends on its prompt and seed only: alone, in a batch, in chunks, on a second call. 1e-4: matrix products of another height round
    differently, four guided steps enlarge it."""
    model = shake(common.load_run(trained[0]))
    prompts = ["a red square moving right", "a blue circle falling", "a red square moving right"]
    video, motion = sample.generate(model, prompts, [1, 2, 3], bar=False)
    assert video.shape == motion.shape == (3, 3, 8, 16, 16) and video.abs().max() <= 1
    alone, _ = sample.generate(model, prompts[1:2], [2], bar=False)
    chunks, _ = sample.generate(model, prompts, [1, 2, 3], bar=False, at_once=2)
    torch.testing.assert_close(alone[0], video[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(chunks, video, rtol=0, atol=1e-4)
    assert (video[0] - video[2]).abs().max() > 1e-2


def test_load_run_gives_the_averaged_weights(trained):
    """load_run: the EMA weights that the stage wrote, in eval mode, without gradients, for every stage. Reference: the file's own tensors."""
    for stage, motion in (("base", False), ("control", False), ("videojam", True)):
        model = common.load_run(trained[0], stage)
        stored = torch.load(trained[0] / f"{stage}.pt", weights_only=True)["weights"]
        own = {f"{part}.{name}": w for part in ("text", "dit") for name, w in getattr(model, part).state_dict().items()}
        assert own.keys() == stored.keys() and all(torch.equal(own[name], stored[name]) for name in own)
        assert model.motion is motion and (model.dit.motion_in is not None) is motion and model.stage == stage
        assert not any(p.requires_grad for net in (model.tae, model.text, model.dit) for p in net.parameters()) and not model.dit.training


def test_a_flipped_byte_is_found(run):
    """torch.load does not see a flipped byte; the checksum does. Reference: a byte of a weight found in the file by its value."""
    path = run / "videojam.pt"
    content, weight = bytearray(path.read_bytes()), torch.load(path, weights_only=True)["weights"]["dit.blocks.0.ffn.up.weight"]
    at = bytes(content).find(weight.numpy().tobytes())
    assert at > 0
    content[at + 10] ^= 64
    path.write_bytes(content)
    torch.load(path, weights_only=True)                                          # silent
    with pytest.raises(ValueError, match="videojam.pt is damaged") as error:
        common.load_run(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["truncated", "random bytes", "empty", {"a": torch.zeros(2)}, [1, 2]], ids=["cut", "random", "empty", "dict", "list"])
def test_unreadable_weights_are_one_line(run, content):
    """A truncated file, random bytes, and files that torch reads but train.py did not write: a ValueError that names the file."""
    path = run / "base.pt"
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    elif isinstance(content, str):
        path.write_bytes(np.random.default_rng(0).bytes(500) if content == "random bytes" else b"")
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="base.pt") as error:
        common.load_run(run, "base")
    assert "\n" not in str(error.value)


def test_weights_of_another_shape_are_refused(run):
    """A weights file of another shape: the tensor, what was found, what was expected. Reference: the two widths."""
    config = json.loads((run / "config.json").read_text())
    config["dit"].update(dim=64)
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"videojam.pt: .*found \(.*32.*expected \(.*64") as error:
        common.load_run(run)
    assert "\n" not in str(error.value)


def test_a_run_of_an_older_version(trained, tmp_path):
    """A config.json without the keys that came later, and with one that is gone, loads. Reference: the same run with its own config."""
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    config = json.loads((run / "config.json").read_text())
    for key in ("checkpointing", "compile", "keep_states", "gpus"):
        del config[key]
    (run / "config.json").write_text(json.dumps({**config, "keep": 2}))
    a, b = common.load_run(run), common.load_run(trained[0])
    assert a.config == b.config and all(torch.equal(w, b.dit.state_dict()[name]) for name, w in a.dit.state_dict().items())


def test_checksum_sees_names_and_values():
    """The checksum changes with the last bit of a value and with a name, not with the memory layout (shapes are load_into's). Reference: the change made."""
    w = {"a": rand(4, 6), "b": rand(3)}
    first = common.checksum(w)
    assert first == common.checksum({"a": w["a"].t().contiguous().t(), "b": w["b"].clone()})
    assert first != common.checksum({"a": w["a"], "c": w["b"]})
    changed = w["a"].clone()
    changed[3, 5] = torch.nextafter(changed[3, 5], torch.tensor(9.0))
    assert first != common.checksum({"a": changed, "b": w["b"]})


@pytest.mark.parametrize("missing, expected", [("config.json", "no run folder"), ("tae.pt", "train the tae first"), ("videojam.pt", "train the videojam first")])
def test_a_missing_stage_is_named(run, missing, expected):
    """What is missing, and the command that makes it, in one line."""
    (run / missing).unlink()
    with pytest.raises(FileNotFoundError, match=expected) as error:
        common.load_run(run)
    assert "python train.py" in str(error.value) and "\n" not in str(error.value)


# ---- Pictures -------------------------------------------------------------------------------------------------------

def clip(T=6, H=16, W=24):
    """Frame k is grey of brightness 40 k, in [-1, 1]: (3, T, H, W)."""
    return (40 * torch.arange(T) / 127.5 - 1).view(1, T, 1, 1).expand(3, T, H, W)


def test_to_uint8():
    """[-1, 1] -> 0..255, clamped, rounded. Reference: by hand."""
    frames = common.to_uint8(torch.tensor([-2.0, -1, 0, 1, 5]).view(1, 5, 1, 1).expand(3, 5, 2, 2))
    assert frames.shape == (5, 2, 2, 3) and frames[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("fps", [8, 24])
def test_an_mp4_that_browsers_play(tmp_path, fps):
    """H.264, yuv420p, the fps in the header, every frame, not resized to multiples of 16. Reference: ffmpeg's reading. Grey survives the codec
    within 3 of 255 (measured in test_videos.py: 2)."""
    path = tmp_path / "new" / "clip.mp4"
    common.write_video(path, clip(), fps, motion=-clip(), least=18)
    meta = iio.immeta(path, plugin="FFMPEG")
    frames = np.stack(list(iio.imiter(path, plugin="FFMPEG")))
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and meta["fps"] == fps
    assert frames.shape == (6, 32, 96, 3)                                        # 16 px doubled; motion to the right
    left, right = frames[:, 4:28, 4:44].mean((1, 2, 3)), frames[:, 4:28, 52:92].mean((1, 2, 3))
    np.testing.assert_allclose(left, 40 * np.arange(6), atol=3)
    np.testing.assert_allclose(right, 255 - 40 * np.arange(6), atol=3)


def test_a_gif(tmp_path):
    """A gif of every frame that repeats for ever. Reference: Pillow's reading; grey needs no dithering."""
    path = tmp_path / "clip.gif"
    common.write_video(path, clip(), 8, least=16)
    frames, meta = iio.imread(path, plugin="pillow", index=None), iio.immeta(path, plugin="pillow")
    assert frames.shape[:3] == (6, 16, 24) and meta["loop"] == 0 and meta["duration"] == pytest.approx(125, abs=5)
    np.testing.assert_allclose(frames[..., 0].mean((1, 2)), 40 * np.arange(6), atol=2)


@pytest.mark.parametrize("least, factor", [(1, 1), (16, 1), (17, 2), (128, 8)])
def test_small_frames_are_enlarged(least, factor):
    """VBench's RAFT needs 128 px: the shorter side reaches `least` by whole factors, pixels repeated. Reference: slices."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    large = common.enlarge(frames, least)
    assert large.shape == (2, 16 * factor, 24 * factor, 3)
    assert all((large[:, i::factor, j::factor] == frames).all() for i in range(factor) for j in range(factor))


def test_a_sheet(tmp_path):
    """One line per clip, columns spread evenly from the first frame to the last. Reference: the grey of each cell's middle."""
    path = tmp_path / "new" / "sheet.png"
    common.write_sheet(path, [clip(6), -clip(6)], columns=3, least=16)
    sheet = iio.imread(path)
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 3
    middle = [[int(sheet[int((r + 0.5) * height), int((c + 0.5) * width), 0]) for c in range(3)] for r in range(2)]
    assert middle[0] == [0, 80, 200] and middle[1] == [255, 175, 55] and height >= 16 and width >= 24
    common.write_sheet(path, [clip(2)], columns=8, least=16)                     # fewer frames than columns
    assert iio.imread(path).shape[1] == 2 * width


def test_an_unknown_ending_is_one_line(tmp_path):
    """--out x.txt: refused in one line that names the endings, before anything is written."""
    with pytest.raises(ValueError, match="mp4") as error:
        common.write_video(tmp_path / "x.txt", clip(), 8)
    assert "\n" not in str(error.value) and not (tmp_path / "x.txt").exists()


# ---- Measures -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("hits, n, low, high", [(8, 10, 49.0, 94.3), (0, 10, 0.0, 27.8), (10, 10, 72.2, 100.0), (48, 64, 63.2, 84.0)])
def test_wilson_interval(hits, n, low, high):
    """Wilson's 95 % interval. Reference: published values (8 of 10: 0.490 to 0.943; 0 of 10: 0.278), else the roots of
    (p - hits/n)^2 = 1.96^2 p (1 - p) / n in numpy."""
    p, z2 = hits / n, 1.96 ** 2
    roots = sorted(np.roots([1 + z2 / n, -(2 * p + z2 / n), p * p]).real)
    found = metrics.interval(hits, n)
    assert found == pytest.approx([100 * r for r in roots], abs=1e-6) and found == pytest.approx([low, high], abs=0.1)


def test_psnr():
    """PSNR of pictures in [-1, 1], the mean over clips of each clip's own. Reference: numpy on 0..255 with peak 255."""
    a, b = rand(3, 3, 2, 8, 8).clamp(-1, 1), rand(3, 3, 2, 8, 8, seed=1).clamp(-1, 1)
    b[1] = a[1] + 0.1
    as255 = lambda x: (x.double().numpy() + 1) * 127.5
    expected = np.mean([10 * np.log10(255 ** 2 / ((as255(a[i]) - as255(b[i])) ** 2).mean()) for i in range(3)])
    assert metrics.psnr(a, b) == pytest.approx(expected, rel=1e-5)


def test_reading_clips():
    """The report's counts: ground truth has every colour and direction right; clips of the wrong prompt do not. Reference: the world itself."""
    world, prompts = data.MovingShapes(16, 32, 32, split="test"), data.STRAIGHT[:16]
    video = world.of_prompts(prompts)["video"]
    assert metrics.read_clips(video, prompts) == (16, 16)
    still = video[:, :, :1].expand_as(video)
    assert metrics.read_clips(still, prompts)[0] == 16 and metrics.read_clips(still, prompts)[1] <= 4
    other = [p.replace("red", "X").replace("blue", "red").replace("X", "blue") for p in prompts]
    changed = sum(p != q for p, q in zip(prompts, other))
    assert changed and metrics.read_clips(video, other)[0] == 16 - changed
